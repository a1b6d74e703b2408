"""Scores by an engine's keys and values are those of the same policy in `lkv.Cache`."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

import lkv
from lkv import policies
from lkv.policies import KeyDiff, KNorm, Observation, StreamingLLM
from lkv.policies.base import scores_once
from lkv.policies.lkv import LKV, LKVThreshold
from lkv.policies.lkv.checkpoint import Design, Shape, save
from lkv.vllm import scores

SMALL = dict(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=4096, initializer_range=0.3,
)  # fmt: skip
LLAMA3 = dict(
    rope_type="llama3", rope_theta=1e4, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
    original_max_position_embeddings=64,
)  # fmt: skip
YARN = dict(rope_type="yarn", rope_theta=1e4, factor=4.0, original_max_position_embeddings=64)
MODELS = {
    "llama": ("Llama", {}),
    "llama3": ("Llama", dict(rope_parameters=LLAMA3)),
    "yarn": ("Llama", dict(rope_parameters=YARN)),
    "qwen3": ("Qwen3", dict(head_dim=8)),
    "phi3": ("Phi3", dict(partial_rotary_factor=0.5, pad_token_id=0)),
}
TOKENS = 150


def build(name: str) -> PreTrainedModel:
    family, options = MODELS[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**{**SMALL, **options})
    return getattr(transformers, f"{family}ForCausalLM")(config).eval()


def checkpoint(model: PreTrainedModel, folder: Path, **design: object) -> Path:
    torch.manual_seed(1)
    made, shape = Design(hidden=8, **design), Shape.of(model)
    learned = made.build(shape)
    with torch.no_grad():
        learned.token_scorer.mean.normal_()
        if learned.token_scorer.offset is not None:
            learned.token_scorer.offset.normal_()
    save(folder, learned, made, shape, {}, "another fine-tune")
    return folder


def read(model: PreTrainedModel, policy: lkv.Policy, ids: Tensor) -> list[Tensor]:
    """What a policy gives the rows of a prompt in `lkv.Cache`, `[H, T]` for each layer."""
    found = {}

    def score(layer: int, observation: Observation) -> Tensor:
        found[layer] = kind.score(policy, layer, observation)
        return found[layer]

    kind = type(policy)
    recording = type("Recording", (kind,), {"score": lambda self, layer, seen: score(layer, seen)})
    other = object.__new__(recording)
    other.__dict__.update(policy.__dict__)
    with torch.no_grad():
        model(ids, past_key_values=lkv.Cache(model, other, retention=0.5), use_cache=True)
    return [found[layer][0] for layer in sorted(found)]


def rows(model: PreTrainedModel, ids: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Keys and values of every layer as an engine gives them: `[T, H, D]`."""
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids, past_key_values=cache, use_cache=True)
    return [(layer.keys[0].transpose(0, 1), layer.values[0].transpose(0, 1)) for layer in cache.layers]


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(0, 64, (1, TOKENS), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("policy", [KNorm(), KeyDiff(), StreamingLLM()], ids=lambda policy: type(policy).__name__)
def test_policies_by_name(policy: lkv.Policy, ids: Tensor) -> None:
    model, name = build("llama"), {KNorm: "knorm", KeyDiff: "keydiff", StreamingLLM: "streaming_llm"}[type(policy)]
    engine = scores.scorer(name, model.config)
    assert (engine.sink, engine.window) == (policy.sink, policy.window)
    for layer, (wanted, (k, v)) in enumerate(zip(read(model, policy, ids), rows(model, ids), strict=True)):
        got = engine.score(layer, k, v, torch.arange(TOKENS))
        assert got.dtype == torch.float32 and torch.equal(got, wanted.float())


@pytest.mark.parametrize("design", [{}, {"budget": "threshold", "scale": "absolute"}], ids=["standard", "absolute"])
@pytest.mark.parametrize("name", MODELS)
def test_a_checkpoint(name: str, design: dict, ids: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scores, "CHUNK", 64)  # not a divisor of the tokens
    model = build(name)
    folder = checkpoint(model, tmp_path, **design)
    engine = scores.scorer(str(folder), SimpleNamespace(hf_text_config=model.config))
    second = scores.scorer(str(folder), model.config, heads=range(1, 2))
    assert (engine.sink, engine.window) == (4, 8)
    learned = lkv.load(folder, model, any_weights=True)
    assert type(learned) is (LKVThreshold if design else LKV)
    for layer, (wanted, (k, v)) in enumerate(zip(read(model, learned, ids), rows(model, ids), strict=True)):
        got = engine.score(layer, k, v, torch.arange(TOKENS))
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(second.score(layer, k[:, 1:], v[:, 1:], torch.arange(TOKENS)), got[1:])


def test_an_engine_of_half_precision_has_scores_in_float32(ids: Tensor, tmp_path: Path) -> None:
    """vLLM makes the dtype of a model the default while it builds it, and the scorers with it."""
    model = build("llama")
    folder = checkpoint(model, tmp_path)
    expected = scores.scorer(str(folder), model.config)
    torch.set_default_dtype(torch.bfloat16)
    try:
        engine = scores.scorer(str(folder), model.config)
        assert torch.get_default_dtype() == torch.bfloat16
    finally:
        torch.set_default_dtype(torch.float32)
    for layer, (k, v) in enumerate(rows(model, ids)):
        k, v = k.bfloat16(), v.bfloat16()
        got = engine.score(layer, k, v, torch.arange(TOKENS))
        assert got.dtype == torch.float32 and torch.equal(got, expected.score(layer, k, v, torch.arange(TOKENS)))


def by_rows(name: str) -> bool:
    """Of the policies that an engine takes; random numbers are of the heads that there are."""
    policy = policies.get(name)
    return not policy.needs and policy.scope == "layer" and scores_once(policy) and name != "random"


@pytest.mark.parametrize("name", [name for name in policies.names() if by_rows(name)])
def test_a_head_is_scored_by_its_own_rows(name: str, ids: Tensor) -> None:
    """A rank that has some of the heads gives them the scores that they have beside the others."""
    model = build("llama")
    (k, v), at = rows(model, ids)[0], torch.arange(TOKENS)
    wanted = scores.scorer(name, model.config).score(0, k, v, at)
    got = scores.scorer(name, model.config, heads=range(1, 2)).score(0, k[:, 1:], v[:, 1:], at)
    torch.testing.assert_close(got, wanted[1:])


def test_positions_are_those_of_the_keys(ids: Tensor, tmp_path: Path) -> None:
    """A prompt whose rows come in another order, each with its position: the same scores in that order."""
    model = build("llama")
    engine = scores.scorer(str(checkpoint(model, tmp_path)), model.config)
    (k, v), order = rows(model, ids)[0], torch.randperm(TOKENS)
    wanted = engine.score(0, k, v, torch.arange(TOKENS))[:, order]
    torch.testing.assert_close(engine.score(0, k[order], v[order], order), wanted, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(engine.score(0, k[order], v[order], torch.arange(TOKENS)), wanted, atol=1e-2)


@pytest.mark.parametrize("name", [*(name for name in policies.names() if by_rows(name)), "checkpoint"])
def test_scores_wait_for_no_device(name: str, ids: Tensor, tmp_path: Path) -> None:
    """On a device without numbers, whatever would wait for one raises."""
    model = build("llama")
    engine = scores.scorer(str(checkpoint(model, tmp_path)) if name == "checkpoint" else name, model.config)
    k, v = (x.to("meta") for x in rows(model, ids)[0])
    assert engine.score(0, k, v, torch.arange(TOKENS, device="meta")).device.type == "meta"


@pytest.mark.parametrize("name", ["snapkv", "kvzip", "expected_attention", "lava"])
def test_policies_that_need_more_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="expected a policy that scores by keys and values alone.*got '" + name):
        scores.scorer(name, build("llama").config)


def test_checkpoints_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    model = build("llama")
    with pytest.raises(FileNotFoundError):
        scores.scorer(str(tmp_path / "none"), model.config)
    folder = str(checkpoint(model, tmp_path / "kv"))
    with pytest.raises(ValueError, match="expected a model of model_type llama, got qwen3"):
        scores.scorer(folder, build("qwen3").config)
    with pytest.raises(ValueError, match="reads hidden states: train one with --input kv"):
        scores.scorer(str(checkpoint(model, tmp_path / "hidden", input="hidden")), model.config)


ROPES = {
    "dynamic": ("Llama", dict(rope_parameters=dict(rope_type="dynamic", rope_theta=1e4, factor=2.0))),
    "by layer": ("Gemma3Text", dict(head_dim=8, layer_types=["sliding_attention", "full_attention"])),
    "some layers without": ("SmolLM3", dict(no_rope_layers=[1, 0])),
    "pairs": ("Cohere", {}),
    "none": ("GPT2", {}),
}


@pytest.mark.parametrize("case", ROPES)
def test_rotations_that_are_not_known_are_refused(case: str) -> None:
    family, options = ROPES[case]
    config = getattr(transformers, f"{family}Config")(**{**SMALL, "pad_token_id": 0, **options})
    with pytest.raises(
        ValueError, match="expected a model of gemma2, .* with one rotary embedding of default, .*, got"
    ):
        scores.rotation_of(config)
