"""What cannot be evicted stops the start, in one sentence that says what to change."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

vllm = pytest.importorskip("vllm", reason="vLLM is not installed: make test-vllm")
from engine import SETTINGS  # noqa: E402
from vllm.engine.arg_utils import EngineArgs  # noqa: E402

import lkv.vllm  # noqa: E402
from lkv.vllm import refusals, requests  # noqa: E402
from lkv.vllm.settings import Settings, from_environment  # noqa: E402

HEADS = {"counts": "head", "shares": [[1.0, 1.0]]}
OF_RANKS = {"counts": "head", "shares": [[1.0, 1.5, 1.0, 0.5]] * 4}
LAYERS = {"counts": "layer", "shares": [[1.0]] * 3}


def configured(folder: Path, settings: Any, **options: Any) -> Any:
    lkv.vllm.register()
    options = {"dtype": "float32", "block_size": 32, "max_model_len": 512, "enable_prefix_caching": False, **options}
    additional = {} if settings is None else {"lkv": settings}
    return EngineArgs(
        str(folder), skip_tokenizer_init=True, additional_config=additional, **options
    ).create_engine_config()


@pytest.mark.parametrize(
    ("options", "settings", "words"),
    [
        ({"speculative_config": {"method": "ngram", "num_speculative_tokens": 2}}, {}, "remove --speculative-config"),
        ({"kv_cache_dtype": "fp8"}, {}, "remove --kv-cache-dtype"),
        ({"tensor_parallel_size": 2}, OF_RANKS, "expected shares of heads that are the same on each of 2 ranks, got"),
        ({"disable_hybrid_kv_cache_manager": True}, {}, "remove --disable-hybrid-kv-cache-manager"),
        ({"enable_prefix_caching": True}, {"counts": "head"}, "add --no-enable-prefix-caching"),
        ({}, HEADS, "expected shares of 4 layers, 4 for each with counts 'head', got [2]"),
        ({}, LAYERS, "expected shares of 4 layers, 1 for each with counts 'layer', got [1, 1, 1]"),
        ({}, {"counts": "layer"}, "expected counts 'equal' with a policy that has no shares of its own"),
        ({}, {"retention": 1.5}, "expected retention in"),
        ({}, {"counts": "rows"}, "expected counts of equal, layer, head"),
        ({}, {"budget": 3}, "expected settings of policy, retention"),
        ({}, {"min_prompt": -1}, "expected min_prompt >= 0"),
        ({}, {"shares": [[1.0]]}, "expected counts 'layer' or 'head' with shares"),
        ({}, {"counts": "layer", "shares": [[0]]}, "expected shares to be a list of positive numbers"),
        ({}, {"policy": "no_such_policy"}, "no_such_policy"),
    ],
    ids=[
        "speculative",
        "fp8",
        "tensor_parallel",
        "no_hybrid_manager",
        "prefix_cache",
        "heads",
        "layers",
        "no_shares",
        "retention",
        "counts",
        "unknown",
        "min_prompt",
        "shares_of_equal_counts",
        "shares",
        "policy",
    ],
)
def test_no_start(folder: Path, options: Any, settings: Any, words: str) -> None:
    with pytest.raises(ValueError, match="lkv.vllm") as raised:
        configured(folder, {**SETTINGS, **settings}, **options)
    assert words in str(raised.value) and "\n" not in str(raised.value)


CONFIG = {
    "model_config": {
        "use_mla": False, "is_mm_prefix_lm": False, "is_encoder_decoder": False, "is_hybrid": False,
        "has_inner_state": False, "is_multimodal_model": False, "runner_type": "generate",
        "enable_prompt_embeds": False, "get_total_num_kv_heads": lambda: 4,
    },
    "cache_config": {"cache_dtype": "auto", "kv_sharing_fast_prefill": False, "enable_prefix_caching": False},
    "parallel_config": {
        "decode_context_parallel_size": 1, "prefill_context_parallel_size": 1, "pipeline_parallel_size": 1,
        "tensor_parallel_size": 1, "data_parallel_size": 1, "use_ubatching": False,
    },
    "scheduler_config": {"disable_hybrid_kv_cache_manager": False},
}  # fmt: skip
OTHERS = {
    "model_config.use_mla": True,
    "model_config.is_mm_prefix_lm": True,
    "model_config.is_encoder_decoder": True,
    "model_config.is_hybrid": True,
    "model_config.has_inner_state": True,
    "model_config.is_multimodal_model": True,
    "model_config.runner_type": "pooling",
    "model_config.enable_prompt_embeds": True,
    "cache_config.kv_sharing_fast_prefill": True,
    "parallel_config.decode_context_parallel_size": 2,
    "parallel_config.prefill_context_parallel_size": 2,
    "parallel_config.pipeline_parallel_size": 2,
    "parallel_config.tensor_parallel_size": 8,
    "parallel_config.data_parallel_size": 2,
    "parallel_config.use_ubatching": True,
    "speculative_config": {"method": "eagle"},
    "kv_transfer_config": {"kv_connector": "any"},
    "use_v2_model_runner": True,
}


def config_of(changed: dict[str, Any]) -> Any:
    parts = copy.deepcopy(CONFIG)
    top = {"speculative_config": None, "kv_transfer_config": None, "use_v2_model_runner": False}
    for name, value in changed.items():
        part, _, field = name.partition(".")
        if field:
            assert field in parts[part]
            parts[part][field] = value
        else:
            top[part] = value
    return SimpleNamespace(**{name: SimpleNamespace(**part) for name, part in parts.items()}, **top)


def test_the_plain_config_passes() -> None:
    refusals.check(config_of({}), Settings("knorm", 0.5))


@pytest.mark.parametrize("name", OTHERS)
def test_no_start_of_what_needs_more_than_a_small_model(name: str) -> None:
    with pytest.raises(ValueError, match=r"^lkv.vllm \w+"):
        refusals.check(config_of({name: OTHERS[name]}), Settings("knorm", 0.5))


def test_other_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm, "__version__", "0.99.1")
    with pytest.raises(ValueError, match=r"runs on vLLM 0.32, not 0.99.1: .* LKV_VLLM_ANY_VERSION=1"):
        refusals.check(config_of({}), Settings("knorm", 0.5))
    monkeypatch.setenv(refusals.ANY_VERSION, "1")
    refusals.check(config_of({}), Settings("knorm", 0.5))


def test_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, equal = {"kv_sharing_target_layer_name": None, "alibi_slopes": None}, Settings("knorm", 0.5)
    refusals.check_layer(SimpleNamespace(**plain), equal)
    for name in plain:
        with pytest.raises(ValueError, match="lkv.vllm does not evict"):
            refusals.check_layer(SimpleNamespace(**{**plain, name: "model.layers.0"}), equal)
    with_sinks = SimpleNamespace(**plain, sinks=torch.zeros(2))
    refusals.check_layer(with_sinks, equal)
    with pytest.raises(ValueError, match="has no attention sinks where heads have blocks .* set counts to 'equal'"):
        refusals.check_layer(with_sinks, Settings("knorm", 0.5, "head"))


def test_without_settings_nothing_changes(folder: Path) -> None:
    assert configured(folder, None).model_config.logits_processors is None


def test_settings_from_the_environment(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LKV_VLLM", '{"policy": "knorm", "retention": 0.25}')
    config = configured(folder, None)
    assert Settings.of(config.additional_config) == Settings("knorm", 0.25)
    assert config.model_config.logits_processors == [requests.NAME]
    monkeypatch.setenv("LKV_VLLM", "knorm")
    with pytest.raises(ValueError, match="expected an object in JSON in LKV_VLLM, got 'knorm'"):
        from_environment()
