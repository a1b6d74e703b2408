"""One process of `test_two_processes_are_one`: two steps of a tiny LKV, in so many parts, into a folder."""

from __future__ import annotations

import sys

import torch
from accelerate import Accelerator
from transformers import LlamaConfig, LlamaForCausalLM

from lkv.learn.config import TrainConfig
from lkv.learn.train import Trainer
from lkv.policies.lkv.checkpoint import Design
from lkv.retriever.tokenizer import build_tokenizer
from lkv.tasks import Words

if __name__ == "__main__":
    torch.set_num_threads(1)
    words = Words()
    torch.manual_seed(0)
    shape = dict(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        head_dim=16,
        initializer_range=0.2,  # attention is not uniform, and gradients are more than rounding
    )
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=len(words.vocabulary), num_key_value_heads=2, eos_token_id=3, bos_token_id=2, **shape)
    )
    config = TrainConfig(
        design=Design(hidden=8),
        tasks=("single", "multi_key"),
        steps=2,
        warm_steps=1,
        hard=0.0,  # the same word twice has one score in the first layer: rounding would decide which is kept
        batch=4,
        accumulate=int(sys.argv[2]),
        questions=2,
        length=96,
        answer_tokens=3,
        validate_every=100,
        retention=(0.45, 0.45),
    )
    Trainer(model, build_tokenizer(words), words, config, sys.argv[1], accelerator=Accelerator(cpu=True)).run()
