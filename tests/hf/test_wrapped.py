"""Models in wrappers, models in models, and types that differ within a model."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from families import SMALL, build, call, tokens
from torch import nn
from transformers import DynamicCache, PreTrainedModel

import lkv
from lkv.hf.compat import unwrapped
from lkv.hf.versions import RecurrentLayer

GREEDY = dict(max_new_tokens=8, do_sample=False)


def compiled(model: PreTrainedModel) -> nn.Module:
    return torch.compile(model, backend="eager")


def compiled_inside(model: PreTrainedModel) -> nn.Module:
    model.model = torch.compile(model.model, backend="eager")
    return model


def compiled_twice(model: PreTrainedModel) -> nn.Module:
    return torch.compile(compiled_inside(model), backend="eager")


def peft(model: PreTrainedModel) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(target_modules=["q_proj"], r=2))


def peft_compiled(model: PreTrainedModel) -> nn.Module:
    return compiled(peft(model))


@pytest.mark.parametrize("wrap", [compiled, compiled_inside, compiled_twice, peft, peft_compiled])
def test_wrappers(wrap):
    if "peft" in wrap.__name__:
        pytest.importorskip("peft", exc_type=ImportError)  # nor does it import beside an older transformers
    model = copy.deepcopy(build("llama"))
    ids = tokens(2, 30)
    expected = model.generate(ids, past_key_values=lkv.Cache(model, "streaming_llm", retention=0.3), **GREEDY)
    wrapper = wrap(model)
    torch._dynamo.reset()
    cache = lkv.Cache(wrapper, "streaming_llm", retention=0.3)
    outputs = unwrapped(wrapper).generate(ids, past_key_values=cache, **GREEDY)
    assert torch.equal(outputs, expected)
    cache.reset()
    with torch.no_grad():
        wrapper(input_ids=ids, past_key_values=cache)
        assert wrapper(input_ids=ids[:, :1], past_key_values=cache).logits.shape == (2, 1, 64)
    assert cache.ragged[0].row_counts == [2 * 9 + 2] * 2 and model.config._attn_implementation == "sdpa"


@pytest.mark.skipif(RecurrentLayer is None, reason="this transformers has breaks of its own in a graph")
def test_a_graph_of_all_is_refused_with_the_reason():
    model = copy.deepcopy(build("llama"))
    whole = torch.compile(model, backend="eager", fullgraph=True)
    cache = lkv.Cache(model, "streaming_llm", retention=0.3)
    torch._dynamo.reset()
    with torch.no_grad(), pytest.raises(Exception, match="compile without fullgraph"):
        whole(tokens(1, 20), past_key_values=cache, use_cache=True)
    assert cache.get_seq_length() == 0 and model.config._attn_implementation == "sdpa"
    torch._dynamo.reset()
    with torch.no_grad():  # other caches do not mind the hooks
        whole(tokens(1, 20), past_key_values=DynamicCache(config=model.config), use_cache=True)


@pytest.mark.parametrize("family", ["llama", "gemma3", "mistral"])
def test_autocast(family):
    """Queries and keys are float32, values bfloat16: what transformers' own cache does."""
    model, ids, more = build(family), tokens(2, 30), tokens(2, 3, seed=1)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        caches = DynamicCache(config=model.config), lkv.Cache(model, "streaming_llm", retention=1.0)
        outputs = [[call(model, part, None, cache) for part in (ids, more, more[:, :1])] for cache in caches]
        evicting = lkv.Cache(model, "snapkv", retention=0.3)
        for part in (ids, more, more[:, :1]):
            assert call(model, part, None, evicting).isfinite().all()
    for dense, ours in zip(*outputs, strict=True):
        assert dense.dtype == ours.dtype
        torch.testing.assert_close(ours.float(), dense.float(), rtol=0.05, atol=0.2)


@pytest.fixture(scope="module")
def llava() -> PreTrainedModel:
    """A language model with eyes: 16 patches of a picture of 32 x 32 and a class."""
    eyes = transformers.CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8
    )
    text = transformers.LlamaConfig(**SMALL, head_dim=8)
    torch.manual_seed(0)
    config = transformers.LlavaConfig(
        vision_config=eyes, text_config=text, image_token_index=63, image_token_id=63, vision_feature_layer=-1
    )
    model = transformers.LlavaForConditionalGeneration(config).eval()
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    return model


@pytest.mark.parametrize("padded", [False, True])
def test_pictures(llava, padded):
    """Two turns with a picture in the first, of one sequence and of three with padding."""
    batch = 3 if padded else 1
    ids = tokens(batch, 40).clamp(max=62)
    ids[:, 12:28] = 63
    mask = torch.ones_like(ids)
    if padded:
        mask[1, :7], mask[2, :11] = 0, 0
    pixels = torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    more = tokens(batch, 5, seed=1).clamp(max=62)
    outputs = {}
    for name, cache in {
        "dense": DynamicCache(config=llava.config.get_text_config()),
        "whole": lkv.Cache(llava, "snapkv", retention=1.0),
        "part": lkv.Cache(llava, "snapkv", retention=0.3),
    }.items():
        one = llava.generate(ids, pixel_values=pixels, attention_mask=mask, past_key_values=cache, **GREEDY)
        shown = torch.cat([mask, mask.new_ones(batch, 13)], 1)
        outputs[name] = llava.generate(torch.cat([one, more], 1), attention_mask=shown, past_key_values=cache, **GREEDY)
    assert torch.equal(outputs["whole"], outputs["dense"]) and not torch.equal(outputs["part"], outputs["dense"])
    assert cache.get_seq_length() == 40 + 13 + 7
