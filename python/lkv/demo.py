"""The main job on real input: read a long text, keep 15 % of it, answer. Run `python -m lkv.demo --help`.

The retriever that comes with the package reads texts in which a few facts stand among filler and decoys, without
knowing the question. Then `lkv_ext` evicts its cache, and it answers from what is left: as LKV has learned to
keep it, as two heuristics keep it, and from the whole cache.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch

import lkv_ext

try:
    import transformers
    from tqdm import tqdm

    from lkv import models, retriever, tasks
    from lkv.evaluate import report
    from lkv.evaluate.kept import kept_positions
    from lkv.evaluate.methods import FULL, Method, heuristics
    from lkv.evaluate.run import Result, Setting, evaluate
    from lkv.policies.lkv import LKV, Learned
    from lkv.policies.lkv.checkpoint import load
except ModuleNotFoundError as error:
    raise SystemExit(f"lkv.demo: {error}; the demo needs: pip install 'lkv-ext[lkv]'") from error

HEURISTICS = ("snapkv", "streaming_llm")


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    # The newest transformers calls it `cache`, which older ones do not know.
    warnings.filterwarnings("ignore", "`past_key_values` is deprecated", FutureWarning)
    begin = time.perf_counter()
    model, tokenizer = retriever.load()
    model = model.to(options.device)
    lkv = load(models.RETRIEVER, model)
    known = heuristics()
    methods = [Method(FULL, None), Method("lkv", lkv), *(Method(name, known[name]) for name in HEURISTICS)]
    samples = [
        tasks.make(task, i, options.tokens, split="validation")
        for i in range(options.samples)
        for task in tasks.RETRIEVAL
    ]
    print(describe(model, options))
    setting = Setting(retentions=(options.retention,), batch=1 if options.samples < 2 else 8)
    results: list[Result] = []
    for task in tqdm(tasks.RETRIEVAL, desc="reading, evicting, answering", unit="task"):
        results += evaluate(model, tokenizer, [s for s in samples if s.task == task], methods, setting)
    print(example(results, samples, model))
    rows = report.rows(results)
    print(report.table(rows))
    print(f"pictures: {', '.join(map(str, pictures(model, tokenizer, lkv, samples, rows, options)))}")
    print(f"{time.perf_counter() - begin:.0f} s in all; `lkv eval --help` has the other methods and longer runs")
    return 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    on_gpu = torch.cuda.is_available() and lkv_ext.build_info()["cuda_archs"] is not None
    parser = argparse.ArgumentParser("python -m lkv.demo", description=(__doc__ or "").partition("\n\n")[2])
    parser.add_argument("--device", default="cuda" if on_gpu else "cpu", help="where to run; here: %(default)s")
    parser.add_argument("--tokens", type=int, default=1024, help="of a text, default %(default)s")
    parser.add_argument("--samples", type=int, default=8, help="texts of each of the five tasks, default %(default)s")
    parser.add_argument("--retention", type=float, default=0.15, help="share of the cache to keep, default %(default)s")
    parser.add_argument("--out", type=Path, default=Path("build/demo"), help="for the pictures, default %(default)s")
    options = parser.parse_args(argv)
    if options.tokens < 128:
        parser.error(f"expected at least 128 tokens, got {options.tokens}")
    if options.samples < 1:
        parser.error(f"expected at least 1 sample, got {options.samples}")
    if not 0 < options.retention <= 1:
        parser.error(f"expected a retention in (0, 1], got {options.retention}")
    return options


def describe(model: transformers.PreTrainedModel, options: argparse.Namespace) -> str:
    config, build = model.config, lkv_ext.build_info()
    where = torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else f"cpu, {build['cpu_isa']}"
    return (
        f"lkv_ext {build['version']} on {where}; torch {torch.__version__}, transformers {transformers.__version__}\n"
        f"retriever: {model.num_parameters() / 1e6:.1f} million parameters, {config.num_hidden_layers} layers, "
        f"{config.num_key_value_heads} KV heads of {config.head_dim}\n"
        f"texts of {options.tokens} tokens; the question comes after the eviction"
    )


def example(results: Sequence[Result], samples: Sequence[tasks.Sample], model: transformers.PreTrainedModel) -> str:
    """One question, and what each method answers from how many bytes of keys and values."""
    sample = next(s for s in samples if s.task == "multi_query")
    config = model.config
    row = 2 * config.head_dim * model.dtype.itemsize
    whole = config.num_hidden_layers * config.num_key_value_heads * (len(sample.context.split()) + 1) * row
    lines = [f"\n... {' '.join(sample.context.split()[-24:])}", f"{sample.question} {sample.answer}"]
    for result in results:
        if (result.task, result.index) == (sample.task, sample.index):
            right = "right" if result.score == 1 else f"{result.score:.0%} right"
            size = f"{result.kept * whole / 1024:6.0f} KiB"
            lines.append(f"  {result.method:10} {size} of keys and values: {result.text:36} {right}")
    return "\n".join([*lines, ""])


def pictures(
    model: transformers.PreTrainedModel,
    tokenizer: transformers.PreTrainedTokenizerBase,
    lkv: Learned,
    samples: Sequence[tasks.Sample],
    rows: Sequence[report.Row],
    options: argparse.Namespace,
) -> list[Path]:
    from lkv.evaluate.plots import draw

    sample = next(s for s in samples if s.task == "multi_query")
    assert isinstance(lkv, LKV)  # as the packaged checkpoint is
    table = lkv.table(round(options.retention * options.tokens), options.tokens)
    extra = {
        "shares": {f"{options.retention:g}": (table / options.tokens).tolist()},
        "kept_positions": kept_positions(model, tokenizer, lkv, sample, options.retention),
    }
    return draw({"rows": rows, **extra}, options.out)


if __name__ == "__main__":
    sys.exit(main())
