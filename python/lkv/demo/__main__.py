"""A model reads a text without knowing the questions, keeps 15 % of its cache, and answers them from what is left.

With SmolLM2 the text is an essay with four facts in it, read once for all methods: the full cache, LKV, KVzip and
SnapKV. With the retriever, the small model that comes with the package, there are many short texts of five tasks.
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
    from transformers.utils import logging

    from lkv import models
    from lkv.demo import pretrained, retriever
    from lkv.extras import MissingPackage
    from lkv.models import RETRIEVER
    from lkv.policies.lkv import packaged
    from lkv.policies.lkv.checkpoint import load
except ModuleNotFoundError as error:
    raise SystemExit(f"lkv.demo: {error}; the demo needs: pip install 'lkv-ext[lkv]'") from error

TOKENS = {RETRIEVER: 1024}  # of a text; of models with another number of them, OTHER_TOKENS
OTHER_TOKENS = 1400


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    # The newest transformers calls it `cache`, which older ones do not know.
    warnings.filterwarnings("ignore", "`past_key_values` is deprecated", FutureWarning)
    logging.disable_progress_bar()
    begin = time.perf_counter()
    try:
        model, tokenizer = models.load(options.model, device=options.device)
    except MissingPackage as error:
        print(f"{error}\nWithout it, the demo shows the retriever.\n", flush=True)
        options.model, options.checkpoint = RETRIEVER, None
        model, tokenizer = models.load(RETRIEVER, device=options.device)
    path = options.checkpoint or packaged.find(options.model)
    lkv = None if path is None else load(path, model)
    options.tokens = options.tokens or TOKENS.get(options.model, OTHER_TOKENS)
    if options.model == RETRIEVER:
        retriever.show(model, tokenizer, lkv, options)
    else:
        pretrained.show(model, tokenizer, lkv, options)
    print(f"{time.perf_counter() - begin:.0f} s in all; `lkv eval --help` has the other methods and longer runs")
    return 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    on_gpu = torch.cuda.is_available() and lkv_ext.build_info()["cuda_archs"] is not None
    parser = argparse.ArgumentParser(
        "python -m lkv.demo", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2", help="as in lkv eval, default %(default)s")
    parser.add_argument("--checkpoint", type=Path, help="of LKV; default: the one of the package for the model")
    parser.add_argument("--device", default="cuda" if on_gpu else "cpu", help="where to run; here: %(default)s")
    parser.add_argument(
        "--tokens", type=int, help=f"of a text, default {OTHER_TOKENS}, for the retriever {TOKENS[RETRIEVER]}"
    )
    parser.add_argument("--retention", type=float, default=0.15, help="share of the cache to keep, default %(default)s")
    parser.add_argument("--text", type=Path, default=pretrained.ESSAY, help="another one, in place of the essay")
    parser.add_argument("--seed", type=int, default=0, help="others have other facts, default %(default)s")
    parser.add_argument(
        "--samples", type=int, default=8, help="retriever: texts of each of the five tasks, default %(default)s"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("build/demo"), help="for page or pictures, default %(default)s"
    )
    options = parser.parse_args(argv)
    if options.tokens is not None and options.tokens < 128:
        parser.error(f"expected at least 128 tokens, got {options.tokens}")
    if options.samples < 1:
        parser.error(f"expected at least 1 sample, got {options.samples}")
    if not 0 < options.retention <= 1:
        parser.error(f"expected a retention in (0, 1], got {options.retention}")
    if not options.text.is_file():
        parser.error(f"expected a file of plain text, got {options.text}")
    return options


if __name__ == "__main__":
    sys.exit(main())
