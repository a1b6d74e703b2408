"""The arguments that choose model, tokenizer and language."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lkv import models
from lkv.policies.lkv import packaged
from lkv.tasks import English, Language, Words

CHECKPOINT = f"of LKV; default: the one of the package for the model, which has some for: {', '.join(packaged.names())}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    names = ", ".join(repr(name) for name in (models.RETRIEVER, *models.PACKAGED))
    parser.add_argument(
        "--model", default=models.RETRIEVER, help=f"{names}, a GGUF file, a folder or a name that transformers knows"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="here: %(default)s")
    parser.add_argument(
        "--dtype", help="default: bfloat16 on CUDA, else as stored, in float32 where the CPU has no arithmetic for it"
    )


def load(options: argparse.Namespace) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, Language]:
    model, tokenizer = models.load(options.model, dtype=options.dtype, device=options.device)
    return model, tokenizer, Words() if options.model == models.RETRIEVER else English()


def checkpoint(options: argparse.Namespace) -> Path | None:
    """The checkpoint of LKV that was named, or else that of the package for the model; None where it has none."""
    return options.checkpoint or packaged.find(options.model)
