"""Puts a trained retriever and its checkpoint of LKV where the package looks for them.

python -m lkv.retriever.ship --model build/retriever [--lkv build/lkv/best]
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from lkv import retriever
from lkv.retriever.tokenizer import build_tokenizer
from lkv.tasks import Words


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser("python -m lkv.retriever.ship", description=__doc__)
    parser.add_argument("--model", type=Path, help="what lkv.retriever.train wrote; stored as bfloat16")
    parser.add_argument("--lkv", type=Path, help="a checkpoint of lkv train")
    options = parser.parse_args(argv)
    if options.model:
        model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.bfloat16)
        model.save_pretrained(retriever.PATH)
        build_tokenizer(Words()).save_pretrained(retriever.PATH)
    if options.lkv:
        retriever.LKV.mkdir(parents=True, exist_ok=True)
        for file in options.lkv.iterdir():
            shutil.copy(file, retriever.LKV)


if __name__ == "__main__":
    main()
