"""`lkv lm-eval`: tasks of EleutherAI's lm-eval harness, with eviction on."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from lkv import policies as registry
from lkv.cli import models
from lkv.evaluate.methods import ALIASES, FULL, heuristics
from lkv.extras import need
from lkv.policies import Policy

EXTRA = "lm-eval"


def run(argv: Sequence[str]) -> int:
    options = parse(argv)
    harness = need("lm_eval", EXTRA, "its tasks")
    need("lm_eval.models.huggingface", EXTRA, "its models")
    from lkv.evaluate.harness import Compression, HarnessModel

    manager = _tasks(options)
    model, tokenizer, _ = models.load(options)
    policies = known(options, model)
    reports = []
    for name in options.policies:
        for retention in [1.0] if name == FULL else options.retentions:
            how = Compression(
                policies[name], retention, options.see_question, options.question_tokens, options.question_marker
            )
            judged = HarnessModel(model, tokenizer, how, options.max_length)
            try:
                results = harness.simple_evaluate(
                    judged,
                    tasks=options.tasks,
                    task_manager=manager,
                    num_fewshot=options.num_fewshot,
                    limit=options.limit,
                    gen_kwargs=options.gen_kwargs,
                    apply_chat_template=options.apply_chat_template,
                    log_samples=False,
                )
            finally:
                judged.close()
            title = f"{options.model}, {name}" + ("" if name == FULL else f" at retention {retention:g}")
            print(f"\n{title}; {how}\n{judged.totals}\n{harness.utils.make_table(results)}", flush=True)
            facts = {"policy": name, "retention": retention, "question_seen": options.see_question}
            reports.append({**facts, "compressed": str(how), **vars(judged.totals), "results": results["results"]})
            if options.out:
                write(options, reports, harness.__version__)
    return 0


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "lkv lm-eval", description="Tasks of the lm-eval harness on caches that were evicted, one prompt at a time."
    )
    models.add_arguments(parser)
    parser.add_argument("--tasks", nargs="+", required=True, help="as lm-eval names them")
    parser.add_argument("--include-path", help="folder with more tasks, in YAML")
    parser.add_argument(
        "--policies", nargs="+", default=[FULL, "snapkv"], help=f"{FULL}, {', '.join(registry.names())}, lkv"
    )
    parser.add_argument("--checkpoint", type=Path, help=models.CHECKPOINT)
    parser.add_argument("--any-weights", action="store_true", help="take one of another fine-tune of the model")
    parser.add_argument("--retentions", nargs="+", type=float, default=[0.15])
    parser.add_argument("--see-question", action="store_true", help="compress all of a prompt but its last token")
    parser.add_argument(
        "--question-tokens", type=int, help="last tokens of a prompt that are not compressed; default: 64"
    )
    parser.add_argument("--question-marker", help="or what the uncompressed rest of a prompt begins with")
    parser.add_argument("--num-fewshot", type=int)
    parser.add_argument("--limit", type=int, help="documents per task")
    parser.add_argument(
        "--max-length", type=int, help="tokens of prompt and answer; default: what the model is made for"
    )
    parser.add_argument("--gen-kwargs", help="for generation: name=value,name=value")
    parser.add_argument("--apply-chat-template", action="store_true")
    parser.add_argument("--out", type=Path, help="JSON file of all results")
    options = parser.parse_args(argv)
    for retention in options.retentions:
        if not 0 < retention <= 1:
            raise ValueError(f"lkv lm-eval: expected retentions in (0, 1], got {retention}")
    ways = {"--see-question": options.see_question, "--question-tokens": options.question_tokens is not None}
    given = [
        name for name, there in {**ways, "--question-marker": options.question_marker is not None}.items() if there
    ]
    if len(given) > 1:
        raise ValueError(f"lkv lm-eval: expected one way to choose what is compressed, got {' and '.join(given)}")
    if options.question_tokens is None:
        options.question_tokens = 64
    if options.question_tokens < 1:
        raise ValueError(f"lkv lm-eval: expected question tokens >= 1, got {options.question_tokens}")
    if options.question_marker == "":
        raise ValueError("lkv lm-eval: expected a question marker with at least one letter, got ''")
    names = [FULL, *registry.names(), *(["lkv"] if models.checkpoint(options) else [])]
    options.policies = [ALIASES.get(name, name) for name in options.policies]
    for name in options.policies:
        if name == "lkv" and "lkv" not in names:
            raise ValueError("lkv lm-eval: expected --checkpoint for the policy lkv and this model, got none")
        if name not in names:
            raise ValueError(f"lkv lm-eval: expected policies of {', '.join(names)}, got {name!r}")
    return options


def known(options: argparse.Namespace, model: PreTrainedModel) -> dict[str, Policy | None]:
    """All policies by name; that of the full cache is None."""
    policies: dict[str, Policy | None] = {FULL: None, **heuristics()}
    path = models.checkpoint(options)
    if path is not None and "lkv" in options.policies:
        from lkv.policies.lkv.checkpoint import load

        policies["lkv"] = load(path, model, any_weights=options.any_weights)
    return policies


def _tasks(options: argparse.Namespace) -> Any:
    """The harness' task manager. Its own tasks are thousands of files, read only if a name is not among the included.

    Raises:
        ValueError: for a name that is none of a task.
    """
    manager = need("lm_eval.tasks", EXTRA, "its tasks").TaskManager

    def unknown(tasks: Any) -> list[str]:
        return [name for name in options.tasks if not tasks.match_tasks([name])]

    if options.include_path:
        tasks = manager(include_path=options.include_path, include_defaults=False)
        if not unknown(tasks):
            return tasks
    tasks = manager(include_path=options.include_path)
    if missing := unknown(tasks):
        raise ValueError(f"lkv lm-eval: expected names of tasks that lm-eval knows, got {', '.join(missing)}")
    return tasks


def write(options: argparse.Namespace, reports: list[dict[str, object]], version: str) -> None:
    """JSON, whole or not at all."""
    options.out.parent.mkdir(parents=True, exist_ok=True)
    temporary = options.out.with_name(options.out.name + ".part")
    facts = {"model": options.model, "tasks": options.tasks, "limit": options.limit, "lm_eval": version}
    temporary.write_text(json.dumps({"facts": facts, "reports": reports}, indent=1, default=str) + "\n")
    os.replace(temporary, options.out)
