"""What `lkv.memory` says of a cache is what the cache holds: families of models, layer by layer, and by hand."""

from __future__ import annotations

import families
import pytest
import torch
import transformers
from transformers import (
    BloomConfig,
    DeepseekV3Config,
    DynamicCache,
    FalconH1Config,
    LlamaConfig,
    LlavaConfig,
    PretrainedConfig,
    T5Config,
)

import lkv
from lkv.hf.versions import RecurrentLayer
from lkv.memory import Footprint, Layer, footprint, measure_bandwidth

RECURRENT = ("qwen3_next", "qwen3_5", "jamba", "nemotron_h")
EXPERTS = ("gpt_oss", "mixtral", "qwen3_next", "jamba")
OTHERWISE = ("stablelm", "gpt2")
LENGTH, RETENTION = 41, 0.3
NAMES = [name for name in {**families.FAMILIES, **families.SPECIAL} if name != "nondefault"]  # which is our own class
KINDS = {
    "gemma2": ["sliding", "full"] * 2,
    "gemma3n": ["sliding", "full", "shared", "shared"],
    "gemma4": ["sliding", "full", "shared", "shared"],
    **dict.fromkeys(RECURRENT, ["recurrent", "full"] * 2),
}


def config_of(name: str) -> PretrainedConfig:
    try:
        config = families.build(name).config
    except AttributeError:
        pytest.skip(f"this transformers has no {name}")
    if name in RECURRENT and RecurrentLayer is None:
        pytest.skip("this transformers has no cache layers of a recurrent state")
    if name in EXPERTS and int(transformers.__version__.split(".")[0]) < 5:
        pytest.skip("this transformers runs experts by what came to each, which nothing without memory has")
    if name in OTHERWISE and int(transformers.__version__.split(".")[0]) < 5:
        pytest.skip(f"this transformers has {name} with an attention, or masks, of its own: lkv plan refuses it")
    config.architectures = None  # as a config.json without them: the type of the model is enough
    return config


def full(name: str) -> tuple[DynamicCache, Footprint]:
    """The cache of transformers after a prompt, and what is said of it."""
    config, model = config_of(name), families.build(name)
    cache = DynamicCache(config=model.get_decoder().config)
    with torch.no_grad():
        families.call(model, families.tokens(1, LENGTH), None, cache)
    return cache, footprint(config)


@pytest.mark.parametrize("name", NAMES)
def test_every_layer_is_what_a_cache_holds(name: str) -> None:
    cache, found = full(name)
    states = 0
    for layer, held in zip(found.layers, cache.layers, strict=False):
        tensors = [t for t in (getattr(held, "keys", None), getattr(held, "values", None)) if t is not None]
        parts = [vars(held).get(x) for x in ("conv_states", "recurrent_states")]
        state = [t for part in parts if isinstance(part, dict) for t in part.values() if t is not None]
        assert found.layer_bytes(layer, LENGTH) == sum(t.nbytes for t in tensors + state), layer
        states += sum(t.nbytes for t in state)
    assert all(found.layer_bytes(layer, LENGTH) == 0 for layer in found.layers[len(cache.layers) :])
    assert len(found.layers) == families.build(name).config.num_hidden_layers
    assert found.parameters == sum(p.numel() for p in families.build(name).parameters())
    assert (states > 0) == (name in RECURRENT)
    assert name not in KINDS or [layer.kind for layer in found.layers] == KINDS[name]
    assert {layer.window for layer in found.layers if layer.kind == "sliding"} <= {16}


@pytest.mark.parametrize("name", ["llama", "gemma3", "gemma3n", "gemma4", "qwen3_5"])
def test_what_is_kept_is_what_lkv_cache_holds(name: str) -> None:
    found, model = footprint(config_of(name)), families.build(name)
    cache = lkv.Cache(model, "knorm", retention=RETENTION, reserve=1)
    with torch.no_grad():
        families.call(model, families.tokens(2, LENGTH), None, cache)
    slack = sum(found.row_bytes(layer) for layer in found.layers if layer.kind == "full")
    states = sum(layer.state_bytes for layer in found.layers)
    assert cache.nbytes == 2 * (found.nbytes(LENGTH, RETENTION) - states + slack)


def test_llama_by_hand() -> None:
    """Llama 3.1 8B: 32 layers of 8 KV heads of 128 numbers, twice, of 2 bytes: 128 KiB a token."""
    config = LlamaConfig(
        hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8, intermediate_size=14336,
        vocab_size=128256, max_position_embeddings=131072, tie_word_embeddings=False,
    )  # fmt: skip
    found = footprint(config, torch.bfloat16, page=16)
    assert (found.parameters, found.limit) == (8_030_261_248, 131072)
    assert found.nbytes(131072) == 16 << 30 and found.waste(131072) == 0
    # 19661 rows are 1228 pages and 13 rows; the last page of the sequence is full, so that 1229 stay.
    assert found.nbytes(131072, 0.15) == 1229 * 16 * (128 << 10)
    assert found.waste(131072, 0.15) == 3 * (128 << 10)
    assert found.moved_bytes(131072, 0.15) == 32 * 8 * (131072 * 4 + 2 * 19661 * 512)
    assert found.moved_bytes(131072, 1.0) == 0  # nothing is evicted
    memory = (16 << 30) + 3 * 1229 * (2 << 20)
    assert (found.largest_batch(memory, 131072), found.largest_batch(memory, 131072, 0.15)) == (1, 4)
    assert (found.largest_batch(memory - 1, 131072, 0.15), found.largest_batch(1 << 30, 131072)) == (3, 0)
    assert (found.longest(16 << 30, 1), found.longest((16 << 30) - 1, 1)) == (131072, 131056)
    assert found.longest(memory, 4, 0.15) == 131072 and found.longest(1, 1) == 0


@pytest.mark.parametrize("page", [1, 4, 16])
def test_pages_of_rows_at_the_end_of_a_sequence(page: int) -> None:
    """By the slots themselves: those of kept rows and of all behind them, in the pages that the sequence has."""
    for length in range(1, 50):
        for retention in (0.1, 0.5, 1.0):
            for layer in (Layer(0, "full", 1, 1, 1), Layer(0, "sliding", 1, 1, 1, window=9)):
                last = (length - 1) // page
                first = (length - layer.rows(length, retention)) // page
                assert layer.slots(length, retention, page) == (last - first + 1) * page


def test_the_config_of_the_text_may_have_the_dtype() -> None:
    text = dict(model_type="llama", hidden_size=32, num_hidden_layers=2, num_attention_heads=4, vocab_size=64)
    vision = dict(model_type="clip_vision_model", hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
    config = LlavaConfig(text_config={**text, "dtype": "bfloat16", "torch_dtype": "bfloat16"}, vision_config=vision)
    config.architectures = ["LlavaForConditionalGeneration"]
    for outer in (None, torch.float16):
        config.dtype = config.torch_dtype = outer
        expected = outer or torch.bfloat16
        found = footprint(config)
        assert (found.dtype, found.weight_dtype) == (expected, expected) and found.nbytes(10) == 10 * 2 * 2 * 32 * 2


def test_a_dtype_of_a_byte_is_that_of_keys_and_values_alone() -> None:
    config = config_of("qwen3_next")
    whole, small, half = (footprint(config, getattr(torch, x)) for x in ("float32", "float8_e4m3fn", "bfloat16"))
    states = [[layer.state_bytes for layer in found.layers] for found in (whole, small, half)]
    assert states[0] == states[1] and sum(states[2]) < sum(states[0])
    assert [sum(map(x.row_bytes, x.layers)) for x in (whole, small, half)] == [64 * n for n in (4, 1, 2)]


def test_a_wrong_structure_is_refused() -> None:
    with pytest.raises(ValueError, match="ALiBi"):
        footprint(BloomConfig(hidden_size=32, n_layer=2, n_head=4))
    with pytest.raises(ValueError, match="encoder-decoder"):
        t5 = T5Config(d_model=32, d_kv=8, d_ff=16, num_layers=2, num_heads=4)
        t5.architectures = ["T5ForConditionalGeneration"]
        footprint(t5)
    with pytest.raises(ValueError, match="latents"):
        footprint(DeepseekV3Config(num_hidden_layers=2))
    if RecurrentLayer is not None:
        with pytest.raises(ValueError, match="no layers of full attention alone"):
            footprint(FalconH1Config(num_hidden_layers=2))


def test_a_config_is_left_as_it_is() -> None:
    config = config_of("llama")
    before = config.to_dict()
    assert footprint(config).dtype == torch.float32
    assert config.to_dict() == before


def test_bandwidth_is_of_bytes_read_and_written(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 0.5, 1.0, 1.25])
    monkeypatch.setattr("lkv.memory.time.perf_counter", lambda: next(clock))
    assert measure_bandwidth(nbytes=1000, rounds=2) == 2 * 1000 / 0.25
