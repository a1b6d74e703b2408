"""Puts what was trained where the package looks for it: a checkpoint of LKV for a model, or the retriever itself.

python -m lkv.ship smollm2 --checkpoint build/smollm2/best
python -m lkv.ship smollm2 --checkpoint build/smollm2-fixed/best --name smollm2-fixed
python -m lkv.ship retriever --weights build/retriever --checkpoint build/lkv/best
"""

from __future__ import annotations

import argparse
import re
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from lkv import models, retriever
from lkv.policies.lkv import checkpoint, packaged
from lkv.retriever.tokenizer import build_tokenizer
from lkv.tasks import Words

MOST = 4_000_000  # bytes of all checkpoints in the package


def main(argv: Sequence[str] | None = None) -> int:
    names = (models.RETRIEVER, *models.PACKAGED)
    parser = argparse.ArgumentParser(
        "python -m lkv.ship", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", choices=names, help="as lkv.models.load knows it")
    parser.add_argument("--checkpoint", type=Path, help="folder of lkv train; its large matrix is stored as float16")
    parser.add_argument("--name", help="that lkv.load finds it under: the model's, which is the default, or MODEL-KIND")
    parser.add_argument("--weights", type=Path, help="what lkv.retriever.train wrote; stored as bfloat16")
    options = parser.parse_args(argv)
    if options.weights and options.model != models.RETRIEVER:
        parser.error(f"expected --weights of the model {models.RETRIEVER}, got {options.model}")
    name = options.name or options.model
    kind = name.removeprefix(options.model)
    if kind and not re.fullmatch(r"-\w+", kind):
        parser.error(f"expected --name {options.model} or {options.model}-KIND, got {name}")
    if options.weights:
        model = AutoModelForCausalLM.from_pretrained(options.weights, dtype=torch.bfloat16)
        model.save_pretrained(retriever.PATH)
        build_tokenizer(Words()).save_pretrained(retriever.PATH)
    if options.checkpoint:
        print(put(options.checkpoint, name))
    return 0


def put(source: Path, name: str) -> Path:
    """A copy of a checkpoint in the package, in place of the one of this name; its folder.

    Raises:
        ValueError, FileNotFoundError: for a folder without a whole checkpoint, for one that is too large beside the
            others, and for weights that float16 cannot hold. The old one is in place then.
    """
    checkpoint.load(source)  # whole, and of a design that this version knows
    tensors = load_file(source / checkpoint.WEIGHTS)
    tensors["scorer.up"] = tensors["scorer.up"].half()  # nearly all of it: a matrix for each head
    if not tensors["scorer.up"].isfinite().all():
        raise ValueError(f"lkv.ship: expected weights that float16 can hold, got larger ones in {source}")
    others = (path for path in packaged.FOLDER.rglob("*") if path.is_file() and path.parent.name != name)
    size = sum(t.nbytes for t in tensors.values()) + sum(path.stat().st_size for path in others)
    if size > MOST:
        raise ValueError(f"lkv.ship: expected checkpoints of {MOST} bytes at most in the package, got {size}")
    folder = packaged.FOLDER / name
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / checkpoint.WEIGHTS)
    shutil.copy(source / checkpoint.CONFIG, folder)
    return folder


if __name__ == "__main__":
    sys.exit(main())
