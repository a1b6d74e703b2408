"""What every policy adds to a prefill, seconds of one thread and bytes: of a small model, and of a layer of Llama's.

python bench/policies.py                         both, into bench/results/policies-<device>.json, and as a table
python bench/policies.py --work layer            one of them; what the file has of the other stays
python bench/policies.py --policies h2o tova     some policies, as well
python bench/policies.py --what peak             memory alone, which load does not change; times stay
python bench/policies.py --page docs/policies.md also puts the table between its two markers there

Counted is all that a policy makes of what was observed, until its rows are chosen: scores, budgets, and what it reads
beside keys and values. Moving the rows is the row "evict", the same for all. Of the model all layers are evicted by
`lkv.Cache.evict` after one text was read; of the layer random tensors are scored. Methods that do much for each
head alone are measured on one of the 8 KV heads of that layer, and their time is multiplied. Peaks are measured apart
from times.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from long import HERE, RETENTION, RETURN_BLOCKS, SAME
from peak import measure
from report import replace_between_markers, table
from results import machine, replace_text, slug
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

import lkv
import lkv_ext
from lkv import models, policies
from lkv.compression import prefill, second_pass_scores
from lkv.demo.pretrained import ESSAY
from lkv.hf.token_log import Rotary, RotaryView
from lkv.policies import Observation, Policy, Weighs
from lkv.policies.base import refiner

MARK = "costs"
MODEL, TOKENS = "smollm2", 4096
LENGTH, HEADS, GROUP, DIM, HIDDEN = 32768, 8, 4, 128, 4096  # of Llama-3.1-8B
ONE_HEAD = ("h2o", "rkv", "expected_attention", "compactor", "criticalkv", "defensivekv", "layer_defensivekv")
NEEDS = policies.NEEDS - {"hidden_states", "second_pass"}
Calls = Iterator[tuple[str, Callable[[], object], int]]  # name, what is measured, by how much it is multiplied


def of_the_model() -> Calls:
    """All layers of a small model that has read one text."""
    model, tokenizer = models.load(MODEL, dtype="bfloat16", device="cpu")
    words = tokenizer(ESSAY.read_text(encoding="utf-8"), add_special_tokens=False).input_ids
    ids = torch.tensor([(words * (TOKENS // len(words) + 1))[:TOKENS]])
    yield "prefill", lambda: prefill(model, ids[:, :TOKENS]), 1
    read = prefill(model, ids, needs=NEEDS, window=64)
    known = [torch.rand(layer.whole()[0].shape[:3]) for layer in read.ragged]

    def evict(policy: Policy) -> None:
        cache, scores = read.fork(), None
        if "second_pass" in policy.needs:
            scores = second_pass_scores(model, cache, ids, policy)
        cache.evict(policy, retention=RETENTION, scores=scores)

    yield "evict", lambda: read.fork().evict("random", retention=RETENTION, scores=known), 1
    for name in policies.POLICIES:
        yield name, lambda name=name: evict(policies.get(name)), 1
    yield "lkv", lambda: evict(lkv.load(MODEL, model)), 1


def of_the_layer() -> Calls:
    """One layer of random tensors in bfloat16."""
    keys, values = (torch.randn(1, HEADS, LENGTH, DIM, dtype=torch.bfloat16) for _ in range(2))
    queries = torch.randn(1, HEADS * GROUP, LENGTH, DIM, dtype=torch.bfloat16)
    config = LlamaConfig(hidden_size=HIDDEN, num_attention_heads=HEADS * GROUP, max_position_embeddings=2 * LENGTH)
    embedding, rotary = LlamaRotaryEmbedding(config), Rotary()
    rotary.push(0, *embedding(keys[:, 0], torch.arange(LENGTH)[None]), None)
    one = torch.full((1,), round(RETENTION * LENGTH))
    whole = Observation(
        *(keys, values, torch.arange(LENGTH).expand(1, HEADS, LENGTH)),
        *(torch.full((1, HEADS), LENGTH), torch.zeros(1, HEADS, dtype=torch.int64)),
        queries=queries,
        query_positions=torch.arange(LENGTH)[None],
        query_mask=torch.ones(1, LENGTH, dtype=torch.bool),
        scaling=DIM**-0.5,
        output_projection=torch.randn(HIDDEN, HEADS * GROUP * DIM, dtype=torch.bfloat16),
        rotary=RotaryView(rotary, embedding, [LENGTH]),
        attention_cosine=torch.ones(1),
        budget=one,
    )

    def choose(policy: Policy, seen: Observation) -> None:
        if "all_queries" not in policy.needs:
            seen = seen.last_queries(max(policy.window, 1))
        if "pre_rope_keys" in policy.needs:
            seen = replace(seen, pre_rope_keys=rotary.undo(seen.keys))
        scores, total = policy.score(0, seen), one * seen.keys.shape[1]
        together = policy.scope != "layer"
        more: dict[str, Any] = {}
        if isinstance(policy, Weighs):
            more = {"importance": policy.importance(0, seen, scores)[None]}
        lengths = seen.lengths[None] if together else seen.lengths
        budgets = policy.budgets([scores] if together else scores, lengths, total, starts=seen.starts, **more)
        chooses = refiner(policy)
        if chooses is not None:
            chooses.refine(0, seen, scores, budgets[0] if together else budgets)

    scores = torch.rand(keys.shape[:3])
    yield "evict", lambda: lkv_ext.evict(keys, values, scores, int(one)), 1
    for name in policies.POLICIES:
        policy = policies.get(name)
        if "second_pass" not in policy.needs:
            seen, times = (one_head(whole), HEADS) if name in ONE_HEAD else (whole, 1)
            yield name, lambda policy=policy, seen=seen: choose(policy, seen), times


def one_head(seen: Observation) -> Observation:
    names = ("keys", "values", "positions", "lengths", "starts")
    parts: dict[str, Any] = {name: getattr(seen, name)[:, :1] for name in names}
    parts["output_projection"] = seen.part("output_projection")[:, : GROUP * DIM]
    return replace(seen, queries=seen.part("queries")[:, :GROUP], **parts)


WORK = {"model": of_the_model, "layer": of_the_layer}
WHAT = ("times", "peak")


def child(work: str, what: str, names: list[str]) -> dict[str, float]:
    """Times in seconds, or peaks in bytes, of all calls, by a process of its own."""
    environment = os.environ | (RETURN_BLOCKS if what == "peak" else {})
    command = [sys.executable, __file__, "--work", work, "--child", what, "--policies", *names]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment)
    if done.returncode:
        raise SystemExit(f"{work}, {what}: failed")
    return json.loads(done.stdout.splitlines()[-1])


def seconds(call: Callable[[], object]) -> float:
    """The faster of two runs; of what takes long, one."""
    found: list[float] = []
    while len(found) < 2 and sum(found) < 3:
        begin = time.process_time()
        call()
        found.append(time.process_time() - begin)
    return min(found)


def measured(work: str, what: str, names: list[str]) -> dict[str, float]:
    found = {}
    for name, call, times in WORK[work]():
        if name not in names or (what == "peak" and name == "prefill"):
            continue
        found[name] = times * seconds(call) if what == "times" else measure(call, "cpu")
        print(work, what, name, found[name], file=sys.stderr, flush=True)
    return found


def markdown(facts: dict[str, object], found: dict[str, dict[str, dict[str, float]]]) -> str:
    head = ("policy", "model, added", "of the prefill", "memory", "layer, added", "memory")
    model, layer = ({"times": {}, "peak": {}} | found.get(work, {}) for work in WORK)
    base, read = model["times"].get("evict", 0.0), model["times"].get("prefill", float("nan"))
    body = []
    for name in [*policies.POLICIES, "lkv"]:
        row = [f"`{name}`", "", "", "", "", ""]
        if name in model["times"]:
            more = max(model["times"][name] - base, 0.0)
            row[1:3] = [f"{more:.2f} s", f"{more / read:.1%}"]
        if name in model["peak"]:
            row[3] = f"{model['peak'][name] / 2**20:.0f} MiB"
        time_of, memory = (" (8 times 1 head)", " (1 head)") if name in ONE_HEAD else ("", "")
        if name in layer["times"]:
            row[4] = f"{layer['times'][name]:.2f} s{time_of}"
        if name in layer["peak"]:
            row[5] = f"{layer['peak'][name] / 2**20:.0f} MiB{memory}"
        body.append(row)
    moved = f"{base:.2f} s and {model['peak'].get('evict', 0) / 2**20:.0f} MiB"
    return (
        f"{facts['cpu']}, {facts['cpu_isa']}, one thread, torch {facts['torch']}, {facts['date']}. Model: {MODEL}, "
        f"bfloat16, {TOKENS} tokens, {RETENTION:.0%} kept; its prefill takes {read:.1f} s; moving the rows "
        f"takes {moved}, which memory counts and time does not. "
        f"Layer: {LENGTH} tokens, {HEADS} KV heads of {GROUP} query heads, D = {DIM}, bfloat16.\n\n" + table(head, body)
    )


def earlier(path: Path, facts: dict[str, object]) -> dict[str, dict[str, dict[str, float]]]:
    """What the file has of the same machine, by work, times or peak, and policy."""
    known = json.loads(path.read_text()) if path.exists() else None
    same = known is not None and all(known["machine"].get(name) == facts.get(name) for name in SAME)
    return known["found"] if same else {}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", nargs="+", default=list(WORK), choices=WORK, help="default: %(default)s")
    every = ["prefill", "evict", *policies.POLICIES, "lkv"]
    parser.add_argument("--policies", nargs="*", default=every, choices=every, help="default: all")
    parser.add_argument("--what", nargs="+", default=list(WHAT), choices=WHAT, help="default: %(default)s")
    parser.add_argument("--page", type=Path, help="file with the two markers")
    parser.add_argument("--child", choices=WHAT, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if args.child:
        with torch.inference_mode():
            print(json.dumps(measured(args.work[0], args.child, args.policies)))
        return
    path, facts = HERE / "results" / f"policies-{slug('cpu')}.json", machine("cpu")
    for work in args.work if args.policies else ():
        for what in args.what:
            more = child(work, what, args.policies)
            found = earlier(path, facts)  # now: another process may have measured the other work
            found[work] = found.get(work, {})
            found[work][what] = found[work].get(what, {}) | more
            replace_text(path, json.dumps({"machine": facts, "found": found}, indent=1) + "\n")
    found = earlier(path, facts)
    shown = markdown(facts, found)
    print(shown)
    if args.page:
        replace_between_markers(args.page, shown, MARK)


if __name__ == "__main__":
    main()
