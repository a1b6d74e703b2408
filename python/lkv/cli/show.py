"""`lkv show`: a page on which a text shows what policies keep of it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedModel

from lkv import policies
from lkv.cli import models
from lkv.policies import Policy
from lkv.policies.lkv import packaged
from lkv.policies.lkv.checkpoint import load
from lkv.show import Shown, page

LEARNED = "lkv"  # the checkpoint of the package for the model


def run(argv: Sequence[str]) -> int:
    options = parse(argv)
    text = read(options.text)
    model, tokenizer, _ = models.load(options)
    chosen = {name: policy(name, options.model, model) for name in options.policy}
    shown = page(
        model,
        tokenizer,
        text,
        chosen,
        options.out,
        retention=options.retention,
        questions=options.question,
        protect=options.protect,
        limit=options.answer_tokens,
        title="text" if options.text == "-" else Path(options.text).name,
        name=Path(options.model).name,
    )
    print(report(shown))
    print(f"{options.out}: {options.out.stat().st_size / 1024:,.0f} KiB")
    return 0


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """What can be checked without the model is."""
    parser = argparse.ArgumentParser(
        "lkv show", description="One HTML page on which a text shows which of its tokens every head keeps."
    )
    models.add_arguments(parser)
    parser.add_argument("--text", required=True, metavar="FILE", help="the text, in UTF-8; - for standard input")
    parser.add_argument(
        "--policy",
        required=True,
        action="append",
        metavar="NAME",
        help=f"{', '.join(policies.names())}, {LEARNED} for the checkpoint that comes with the package for the model, "
        "or the folder of a checkpoint; a second one is shown beside it",
    )
    parser.add_argument("--retention", type=float, default=0.15, help="share of the rows to keep, default %(default)s")
    parser.add_argument("--question", action="append", default=[], help="of the text, as often as one likes")
    parser.add_argument("--answer-tokens", type=int, default=64, help="at most, default %(default)s")
    parser.add_argument(
        "--protect",
        type=int,
        help="first tokens that all heads keep; default: what the policy protects, and before a second pass all of the "
        "chat template that comes before the text",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="PAGE", help="the page, a file")
    options = parser.parse_args(argv)
    names = options.policy
    if len(names) > 2 or len(set(names)) < len(names):
        raise ValueError(f"lkv show: expected one --policy or two different ones, got {', '.join(names)}")
    known = [*policies.names(), LEARNED, *packaged.names()]
    for name in names:
        if name not in known and not Path(name).is_dir():
            raise ValueError(
                f"lkv show: expected a --policy of {', '.join(known)} or the folder of a checkpoint, got {name!r}"
            )
    if LEARNED in names and packaged.find(options.model) is None:
        raise ValueError(
            f"lkv show: expected a model with a checkpoint in the package for --policy {LEARNED}, of "
            f"{', '.join(packaged.names())}, got {options.model!r}; lkv train makes one"
        )
    if not 0 < options.retention <= 1:
        raise ValueError(f"lkv show: expected --retention in (0, 1], got {options.retention}")
    if options.out.is_dir():
        raise ValueError(f"lkv show: expected a file for --out, got the folder {options.out}")
    return options


def read(path: str) -> str:
    """
    Raises:
        ValueError: for a file that cannot be read, is no text or has none.
    """
    try:
        raw = sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()
        text = raw.decode("utf-8-sig")
    except OSError as error:
        raise ValueError(f"lkv show: expected a file with text for --text, got {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"lkv show: expected a text in UTF-8 in {path}, got other bytes: {error}") from None
    if not text.strip():
        raise ValueError(f"lkv show: expected a text in {path}, got none")
    return text.replace("\r\n", "\n")


def policy(name: str, model_name: str, model: PreTrainedModel) -> Policy:
    """A policy of the registry, or a checkpoint."""
    if name in policies.names():
        return policies.get(name)
    return load((packaged.find(model_name) or model_name) if name == LEARNED else name, model)


def report(shown: Shown) -> str:
    """Sizes and answers, as on the page."""
    caches = [("full", shown.rows, shown.nbytes, shown.answers)]
    caches += [(x.name, x.kept, x.nbytes, x.answers) for x in shown.methods]
    width = max(len(name) for name, *_ in caches)
    lines = [f"{shown.tokens:,} tokens, {len(shown.layers)} layers, {sum(shown.heads)} KV heads in all"]
    for name, rows, nbytes, _ in caches:
        share = rows / shown.rows
        lines.append(f"  {name:{width}} {rows:>10,} rows {share:>7.1%} {nbytes / 2**20:>8.2f} MiB of keys and values")
    for i, question in enumerate(shown.questions):
        lines += [question, *(f"  {name:{width}} {' '.join(answers[i].split())}" for name, *_, answers in caches)]
    return "\n".join(lines)
