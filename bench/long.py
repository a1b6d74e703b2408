"""A pretrained model on long and on many prompts: lkv.Cache beside transformers' dense cache, each in its own process.

python bench/long.py                                   all cases, into bench/results/long-<device>.json, and as a table
python bench/long.py --cases 4096x1 --what times       some of them; what the file has of the others stays
python bench/long.py --page docs/benchmarks.md         also puts the table between its two markers there

On a CPU times are those that the process itself took, with one thread, so that what else runs there counts for little;
on a quiet machine they are the same as by the clock. All caches take turns, for some rounds, and the fastest round of
each counts: memory is faster at some times than at others. Peaks are measured apart from times, in processes whose
malloc returns large blocks at once: blocks that it keeps after they were freed are no peak.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from statistics import median

import torch
from peak import measure
from report import replace_between_markers, table
from results import machine, replace_text, slug
from transformers import Cache, DynamicCache

import lkv
from lkv import models
from lkv.demo.pretrained import ESSAY

HERE = Path(__file__).parent
MARK = "long"
CASES = ("4096x1", "8192x1", "1024x8")  # tokens x prompts
DTYPES = ("float32", "bfloat16")
DENSE = "dense"
LEARNED = ("lkv", "lkv-fixed")
RETENTION = 0.15
STEPS = 24  # of decoding, beside three before that count for nothing
ROUNDS = 2
WHAT = ("times", "peak")
SAME = ("gpu", "cpu", "driver", "torch", "threads", "version")  # else the rows of another run say nothing beside ours
RETURN_BLOCKS = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


@dataclass
class Row:
    """One cache in one case.

    Attributes:
        cache: "dense", "lkv" or "lkv-fixed" for a checkpoint of the package for the model, or the name of a policy.
        prefill_s: until all of the prompt is read and evicted. step_ms: of one token for every prompt.
        nbytes: of keys and values after the prefill. peak: memory that prefill and steps took beyond the model.
    """

    model: str
    tokens: int
    batch: int
    dtype: str
    cache: str
    prefill_s: float = 0.0
    step_ms: float = 0.0
    nbytes: int = 0
    peak: int = 0

    @property
    def key(self) -> tuple[object, ...]:
        return self.model, self.tokens, self.batch, self.dtype, self.cache


class Work:
    """A model, prompts and a cache. The prompts begin at different places of a text that comes over and over."""

    def __init__(self, row: Row, device: str) -> None:
        self.model, tokenizer = models.load(row.model, dtype=row.dtype, device=device)
        words = tokenizer(ESSAY.read_text(encoding="utf-8"), add_special_tokens=False).input_ids
        text = torch.tensor(words * (row.tokens // len(words) + 2), device=device)
        self.ids = torch.stack([text[97 * b :][: row.tokens] for b in range(row.batch)])
        learned = row.cache in LEARNED
        self.policy = lkv.load(row.model + row.cache.removeprefix("lkv"), self.model) if learned else row.cache
        self.cache = self.make()
        self.model(self.ids[:, :256], past_key_values=self.make(), logits_to_keep=1)  # libraries, threads, their stacks

    def make(self) -> Cache:
        if self.policy == DENSE:
            return DynamicCache(config=self.model.config)
        return lkv.Cache(self.model, self.policy, retention=RETENTION)

    def prefill(self) -> None:
        self.model(self.ids, past_key_values=self.cache, logits_to_keep=1)

    def step(self) -> None:
        self.model(self.ids[:, :1], past_key_values=self.cache)

    def nbytes(self) -> int:
        """Of keys and values in use."""
        if isinstance(self.cache, lkv.Cache):
            return self.cache.retained_bytes
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in self.cache.layers)


def times(row: Row, device: str) -> Row:
    """And bytes."""
    work = Work(row, device)
    prefill_s = _seconds(work.prefill, device)
    nbytes = work.nbytes()
    steps = [_seconds(work.step, device) for _ in range(STEPS + 3)][3:]
    return replace(row, prefill_s=prefill_s, step_ms=1e3 * median(steps), nbytes=nbytes)


def peak(row: Row, device: str) -> Row:
    work = Work(row, device)

    def both() -> None:
        work.prefill()
        work.step()

    return replace(row, peak=measure(both, device))


def _seconds(work: Callable[[], object], device: str) -> float:
    clock = time.perf_counter if device == "cuda" else time.process_time
    begin = clock()
    work()
    if device == "cuda":
        torch.cuda.synchronize()
    return clock() - begin


def child(row: Row, device: str, what: str) -> Row:
    """One row more complete, by a process that is given the others' memory back."""
    environment = os.environ | (RETURN_BLOCKS if what == "peak" else {})
    command = [sys.executable, __file__, "--child", json.dumps(asdict(row)), "--what", what, "--device", device]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(f"{row.key}:\n{done.stderr[-2000:]}")
    return Row(**json.loads(done.stdout.splitlines()[-1]))


def faster(first: Row, second: Row) -> Row:
    """Of two rounds."""
    times = {name: min(getattr(first, name), getattr(second, name)) for name in ("prefill_s", "step_ms")}
    return replace(second, **times)


def markdown(facts: dict[str, object], rows: list[Row]) -> str:
    head = ("tokens", "prompts", "dtype", "cache", "prefill", "a token", "K and V", "peak memory")
    mib = 2**20
    body = [
        (x.tokens, x.batch, x.dtype, x.cache)
        + ((f"{x.prefill_s:.1f} s", f"{x.step_ms:.0f} ms", f"{x.nbytes / mib:.1f} MiB") if x.nbytes else ("",) * 3)
        + (f"{x.peak / mib:.0f} MiB" if x.peak else "",)
        for x in sorted(rows, key=lambda x: (x.batch, x.tokens, x.dtype))
    ]
    where = facts.get("gpu") or f"{facts['cpu']}, {facts['cpu_isa']}, one thread"
    kept = f"{RETENTION:.0%} kept"
    return f"{rows[0].model}, {kept}; {where}, torch {facts['torch']}, {facts['date']}.\n\n" + table(head, body)


def earlier(path: Path, facts: dict[str, object]) -> dict[tuple[object, ...], Row]:
    """What a run before this one has measured on the same machine."""
    if not path.exists():
        return {}
    found = json.loads(path.read_text())
    if any(found["machine"].get(name) != facts.get(name) for name in SAME):
        return {}
    return {row.key: row for row in (Row(**x) for x in found["rows"])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="as lkv.models.load takes it")
    parser.add_argument("--caches", nargs="*", default=[DENSE, *LEARNED, "snapkv"], help="default: %(default)s")
    parser.add_argument("--cases", nargs="+", default=CASES, metavar="TOKENSxPROMPTS", help="default: %(default)s")
    parser.add_argument("--dtypes", nargs="+", default=DTYPES, choices=DTYPES)
    parser.add_argument("--what", nargs="+", default=WHAT, choices=WHAT)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--page", type=Path, help="file with the two markers")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.child:
        work = times if args.what == ["times"] else peak
        with torch.inference_mode():
            print(json.dumps(asdict(work(Row(**json.loads(args.child)), args.device))))
        return
    path, facts = HERE / "results" / f"long-{slug(args.device)}.json", machine(args.device)
    rows = earlier(path, facts)
    turns = [(what, turn) for what in args.what for turn in range(ROUNDS if what == "times" else 1)]
    for case in args.cases:
        tokens, batch = map(int, case.split("x"))
        for dtype, (what, turn), cache in product(args.dtypes, turns, args.caches):
            row = Row(args.model, tokens, batch, dtype, cache)
            before = rows.get(row.key, row)
            row = child(before, args.device, what)
            row = faster(before, row) if turn > 0 else row
            rows[row.key] = row
            print(row, flush=True)
            text = json.dumps({"machine": facts, "rows": [asdict(x) for x in rows.values()]}, indent=1)
            replace_text(path, text + "\n")
    shown = markdown(facts, list(rows.values()))
    print(shown)
    if args.page:
        replace_between_markers(args.page, shown, MARK)


if __name__ == "__main__":
    main()
