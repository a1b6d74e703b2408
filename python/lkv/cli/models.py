"""The arguments that say which model, tokenizer and language."""

from __future__ import annotations

import argparse

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from lkv import retriever
from lkv.tasks import English, Language, Words

RETRIEVER = "retriever"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default=RETRIEVER, help="'retriever', a folder or a name that transformers knows")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="here: %(default)s")
    parser.add_argument("--dtype", help="default: float32 for the retriever, bfloat16 on CUDA, else as stored")


def load(options: argparse.Namespace) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, Language]:
    if options.model == RETRIEVER:
        model, tokenizer = retriever.load()
        if options.dtype:
            model = model.to(getattr(torch, options.dtype))
        return model.to(options.device), tokenizer, Words()
    dtype = options.dtype or ("bfloat16" if options.device.startswith("cuda") else "auto")
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=dtype).eval().to(options.device)
    return model, AutoTokenizer.from_pretrained(options.model), English()
