"""A decoder with random weights that reads the words of the tasks: small, and as GQA as the real ones."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from lkv.retriever.tokenizer import build_tokenizer
from lkv.tasks import Words


@pytest.fixture(scope="session")
def words() -> Words:
    return Words()


@pytest.fixture(scope="session")
def tokenizer(words: Words) -> PreTrainedTokenizerBase:
    return build_tokenizer(words)


@pytest.fixture
def model(words: Words) -> PreTrainedModel:
    """3 layers, 4 query heads on 2 KV heads; weights large enough that attention is not uniform."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(words.vocabulary),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        initializer_range=0.2,
        pad_token_id=0,
        bos_token_id=2,
        eos_token_id=3,
    )
    return LlamaForCausalLM(config).eval()
