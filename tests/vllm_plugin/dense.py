"""The model that vLLM is compared with: Hugging Face's, with the whole cache, whose evicted positions are masked."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor
from transformers import (
    AttentionInterface,
    AutoModelForCausalLM,
    DynamicCache,
    LlamaConfig,
    PreTrainedModel,
    Qwen3Config,
)

Kept = list[Tensor]  # per layer bool [H, P]: the rows of the prompt that stay
SIZES = {
    "vocab_size": 499,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
    "initializer_range": 0.3,
}
CONFIGS = {"llama": LlamaConfig, "qwen3": Qwen3Config}


def save(folder: Path, family: str = "llama", **sizes: int) -> Path:
    """A model of random weights: large ones, so that its tokens depend on what it attends to."""
    torch.manual_seed(0)
    config = CONFIGS[family](**{**SIZES, **sizes}, bos_token_id=None, eos_token_id=None)
    AutoModelForCausalLM.from_config(config).float().save_pretrained(folder)
    return folder


def load(folder: Path) -> PreTrainedModel:
    AttentionInterface.register("of_kept_rows", _attend)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model.config._attn_implementation = "of_kept_rows"
    return model


def kept_rows(keys: Tensor, scores: Tensor, drops: list[int], sink: int, window: int) -> Tensor:
    """bool `[H, P]`: the first `sink`, the last `window` and the best of the others, `P - drop` in each head."""
    heads, prompt = scores.shape
    kept = torch.zeros(heads, prompt, dtype=torch.bool)
    for head in range(heads):
        count = prompt - drops[head % len(drops)]
        first = min(sink, count)
        last = min(window, count - first)
        kept[head, :first] = True
        kept[head, prompt - last :] = True
        inner = scores[head, first : prompt - last]
        best = sorted(range(len(inner)), key=lambda i: (-inner[i].item(), i))[: count - first - last]
        kept[head, torch.tensor(best, dtype=torch.long) + first] = True
    return kept


@contextlib.contextmanager
def keys_before_rope(model: PreTrainedModel) -> Iterator[dict[int, Tensor]]:
    """Of the last forward, by layer: `[1, H, L, D]`."""
    found: dict[int, Tensor] = {}
    hooks = []
    for index, layer in enumerate(model.model.layers):
        attention = layer.self_attn
        shape = model.config.num_key_value_heads, attention.head_dim

        def note(module, args, output, index=index, shape=shape):
            found[index] = output.reshape(1, -1, *shape).transpose(1, 2)

        hooks.append(getattr(attention, "k_norm", attention.k_proj).register_forward_hook(note))
    yield found
    for hook in hooks:
        hook.remove()


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    prompt: list[int],
    tokens: int,
    keep: Callable[[int, Tensor, Tensor], Tensor] | None,
    forced: list[int] | None = None,
) -> tuple[list[int], list[float]]:
    """Greedy tokens, or `forced` ones, and their logprobs.

    `keep(layer, keys, values)` says which rows `[H, P]` of the prompt stay.
    """
    cache = DynamicCache()
    model.config.kept = None
    logits = model(torch.tensor([prompt]), past_key_values=cache).logits[0, -1]
    if keep is not None:
        model.config.kept = [keep(i, layer.keys[0], layer.values[0]) for i, layer in enumerate(cache.layers)]
    found, logprobs = [], []
    for step in range(tokens):
        logprob = logits.log_softmax(-1)
        found.append(int(logprob.argmax()) if forced is None else forced[step])
        logprobs.append(float(logprob[found[-1]]))
        logits = model(torch.tensor([found[-1:]]), past_key_values=cache).logits[0, -1]
    return found, logprobs


def _attend(module, query, key, value, attention_mask, scaling=None, **kwargs):
    """Causal attention `[B, Hq, L, D]` to the rows that stay and to what came behind the prompt."""
    group = query.shape[1] // key.shape[1]
    k, v = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    scores = query @ k.transpose(2, 3) * (scaling or 1 / math.sqrt(query.shape[-1]))
    length, total = query.shape[2], key.shape[2]
    hidden = torch.ones(length, total, dtype=torch.bool).triu(total - length + 1).expand(query.shape[1], -1, -1).clone()
    if module.config.kept is not None:
        kept = module.config.kept[module.layer_idx].repeat_interleave(group, 0)
        hidden[:, :, : kept.shape[1]] |= ~kept[:, None]
    weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
    return (weights @ v).transpose(1, 2), weights
