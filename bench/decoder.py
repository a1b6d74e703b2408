"""The model of the generate benchmarks, and as a child process its peak memory: `decoder.py CACHE LENGTH DEVICE`.

Eight layers of eight heads of 64, narrow elsewhere: at long prompts attention is nearly all of a decoding step.
"""

from __future__ import annotations

import sys

import torch
from peak import measure
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import lkv

LAYERS, HEADS, DIM = 8, 8, 64
POLICY, RETENTION = "adakv", 0.15


def build(length: int, device: str) -> LlamaForCausalLM:
    """Random weights; keys scaled head by head, so that heads are sharp and flat and win different budgets."""
    # Narrow between the layers, lest a prefill peak there, and hide what a cache takes.
    model = _llama(HEADS * DIM, 256, HEADS, HEADS, DIM, max_position_embeddings=length + 1024)
    for layer in model.model.layers:
        heads = layer.self_attn.k_proj.weight.data.view(HEADS, -1)
        heads *= torch.rand(HEADS, 1).mul(3).add(1).exp2()
    return model.to(device).eval()


def build_tiny(device: str) -> LlamaForCausalLM:
    """As many layers, and next to nothing in them."""
    return _llama(32, 48, 4, 2, 8).to(device).eval()


def _llama(width: int, between: int, heads: int, kv_heads: int, dim: int, **more: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=width,
        intermediate_size=between,
        num_hidden_layers=LAYERS,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=dim,
        **more,
    )
    return LlamaForCausalLM(config)


def prompt(length: int, device: str) -> Tensor:
    return torch.randint(0, 256, (1, length), generator=torch.Generator().manual_seed(1)).to(device)


def main(cache: str, length: str, device: str) -> None:
    """Prints the peak of a prefill beyond the model; "none": without any cache, so of activations alone."""
    torch.set_num_threads(2)
    model, ids = build(int(length), device), prompt(int(length), device)

    def prefill(ids: Tensor) -> None:
        if cache == "none":
            model(ids, use_cache=False, logits_to_keep=1)
            return
        with lkv.Cache(model, POLICY, retention=RETENTION) as kept:
            model(ids, past_key_values=kept, logits_to_keep=1)

    with torch.inference_mode():
        prefill(ids[:, :256])  # libraries, threads and their stacks
        print(measure(lambda: prefill(ids), device))


if __name__ == "__main__":
    main(*sys.argv[1:])
