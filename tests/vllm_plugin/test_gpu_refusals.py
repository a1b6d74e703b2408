"""What starts on a GPU: only what was asked for, in one sentence that says what to change, and with a warning."""

from __future__ import annotations

import importlib
import logging
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

vllm = pytest.importorskip("vllm", reason="vLLM is not installed: make test-vllm")
from stand_ins import FlashInfer  # noqa: E402
from test_engine_refusals import config_of  # noqa: E402
from vllm.config import CompilationConfig, CompilationMode, CUDAGraphMode  # noqa: E402
from vllm.platforms import current_platform  # noqa: E402
from vllm.v1.attention import selector  # noqa: E402
from vllm.v1.attention.backends import registry  # noqa: E402
from vllm.v1.attention.backends.registry import AttentionBackendEnum  # noqa: E402

import lkv_ext  # noqa: E402
from lkv.vllm import backends, refusals  # noqa: E402
from lkv.vllm.settings import Settings  # noqa: E402

EQUAL, HEADS = Settings("knorm", 0.5), Settings("knorm", 0.5, "head")


@pytest.fixture(scope="module", autouse=True)
def loaded() -> None:
    """Both backends, as far as they can be imported where there is no GPU."""
    importlib.import_module("lkv.vllm.flash_attn")
    with FlashInfer("native")():
        importlib.import_module("lkv.vllm.flashinfer")


@pytest.fixture(autouse=True)
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An NVIDIA GPU, kernels for it, and the switch."""
    monkeypatch.setattr(type(current_platform), "is_cpu", lambda self: False)
    monkeypatch.setattr(type(current_platform), "is_cuda", lambda self: True)
    monkeypatch.setattr(lkv_ext, "build_info", lambda: {"cuda_compiler": "13.0"})
    monkeypatch.setenv("LKV_VLLM_GPU", "1")
    yield


def config(
    *,
    backend: str | None = None,
    kinds: dict[str, str] | None = None,
    dtype: torch.dtype = torch.bfloat16,
    mode: CUDAGraphMode = CUDAGraphMode.FULL_AND_PIECEWISE,
    **compilation: Any,
) -> Any:
    found = config_of({})
    found.model_config.dtype = dtype
    named = {kind: AttentionBackendEnum[name] for kind, name in (kinds or {}).items()}
    found.attention_config = SimpleNamespace(
        backend=None if backend is None else AttentionBackendEnum[backend], backend_per_kind=named
    )
    found.compilation_config = CompilationConfig(mode=CompilationMode.VLLM_COMPILE, cudagraph_mode=mode, **compilation)
    found.compilation_config.set_splitting_ops_for_v1("naive")
    return found


def refused(words: str, settings: Settings = EQUAL, **options: Any) -> None:
    with pytest.raises(ValueError, match=f"^lkv.vllm [^\n]*{words}[^\n]*$"):
        refusals.check(config(**options), settings)


@pytest.mark.parametrize("settings", [EQUAL, HEADS], ids=["equal", "heads"])
@pytest.mark.parametrize("backend", [None, "FLASH_ATTN", "FLASHINFER"])
def test_it_starts_with_a_warning(backend: str | None, settings: Settings, caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("vllm.lkv")
    logger.addHandler(caplog.handler)  # those of vLLM may hand nothing on, nor let warnings through
    try:
        with caplog.at_level(logging.WARNING, "vllm.lkv"):
            refusals.check(config(backend=backend), settings)
    finally:
        logger.removeHandler(caplog.handler)
    [(level, words)] = {(x.levelname, x.getMessage()) for x in caplog.records if x.name == "vllm.lkv"}
    assert level == "WARNING" and "checked with stand-ins for the attention kernels, not run on a GPU" in words


def test_it_has_to_be_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    for value in (None, "0", ""):
        monkeypatch.delenv("LKV_VLLM_GPU") if value is None else monkeypatch.setenv("LKV_VLLM_GPU", value)
        refused("checked with stand-ins for the kernels of GPUs, not run on a GPU: set LKV_VLLM_GPU=1")


def test_other_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(current_platform), "is_cuda", lambda self: False)
    refused("runs on vLLM for CPUs and NVIDIA GPUs, not for ")


def test_kernels_are_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lkv_ext, "build_info", lambda: {"cuda_compiler": None})
    refused("build it with LKV_CUDA=ON")


def test_what_has_no_backend_of_ours() -> None:
    refused("not TRITON_ATTN: set --attention-backend to one of them", backend="TRITON_ATTN")
    refused("not FLEX_ATTENTION: set", kinds={"full_attention": "FLEX_ATTENTION"})
    refusals.check(config(kinds={"sliding_window": "TRITON_ATTN"}), EQUAL)  # is not evicted
    refused("not torch.float32: set --dtype", dtype=torch.float32)


def test_rows_of_heads_are_written_outside_of_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    words = "writes rows of heads outside of CUDA graphs: add --enforce-eager"
    inside = dict(use_inductor_graph_partition=True)
    refused(words, HEADS, **inside)
    refusals.check(config(**inside), EQUAL)
    refusals.check(config(mode=CUDAGraphMode.NONE, **inside), HEADS)
    monkeypatch.setenv("VLLM_USE_BREAKABLE_CUDAGRAPH", "1")
    refused(words, HEADS)
    refusals.check(config(), EQUAL)


def test_backends_take_the_place_of_vllms(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_ATTN_OVERRIDES", {})
    selector._cached_get_attn_backend.cache_clear()
    backends.install()
    for name in refusals.GPU_BACKENDS:
        found = AttentionBackendEnum[name].get_class()
        assert found.get_name() == name
        assert (found.get_impl_cls(), found.get_builder_cls()) == (
            sys.modules[f"lkv.vllm.{name.lower()}"].Attention,
            sys.modules[f"lkv.vllm.{name.lower()}"].Builder,
        )
    assert set(registry._ATTN_OVERRIDES) == {AttentionBackendEnum[name] for name in refusals.GPU_BACKENDS}
