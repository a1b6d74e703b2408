"""Metadata of evicted sequences for GPUs: nothing waits for the device, and no graph holds a whole step."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

vllm = pytest.importorskip("vllm", reason="vLLM is not installed: make test-vllm")
from stand_ins import FlashInfer  # noqa: E402
from torch import Tensor  # noqa: E402
from vllm.config import CompilationConfig, CompilationMode, CUDAGraphMode  # noqa: E402
from vllm.v1.attention.backend import AttentionCGSupport, CommonAttentionMetadata  # noqa: E402
from vllm.v1.kv_cache_interface import FullAttentionSpec, replace_as  # noqa: E402

from lkv.vllm import flash_attn, requests  # noqa: E402
from lkv.vllm.gpu import InPages  # noqa: E402
from lkv.vllm.requests import Requests  # noqa: E402
from lkv.vllm.settings import Settings, dropped  # noqa: E402
from lkv.vllm.spec import EvictedHeadsSpec, EvictedSpec  # noqa: E402

PAGE, HEADS, WIDTH = 16, 2, 12
PLAIN = FullAttentionSpec(block_size=PAGE, num_kv_heads=HEADS, head_size=8, dtype=torch.float16)
SETTINGS = Settings("knorm", 0.5, min_prompt=1)
SPECS = {
    "equal": replace_as(PLAIN, EvictedSpec, settings=SETTINGS),
    "heads": replace_as(PLAIN, EvictedHeadsSpec, settings=SETTINGS, shares=(0.5, 1.0), num_head_slots=1),
}
# A prompt that decodes, one that ends, one that ends and has outputs that are computed again, one that goes on.
PROMPTS, COMPUTED, NEW = (70, 100, 50, 90), (75, 64, 32, 16), (1, 36, 20, 16)


class Vllms:
    """What a builder of vLLM makes of a batch: the batch."""

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: Any) -> None:
        self.device = device

    def build(self, common_prefix_len: int, common: Any, fast_build: bool = False) -> Any:
        return SimpleNamespace(common=common)


class Builder(InPages, Vllms):
    def _one_head(self) -> None:
        self.one_head = True

    def _no_whole_graphs(self) -> None:
        self.whole_graphs = False


def batch(device: str, heads: int) -> tuple[CommonAttentionMetadata, Tensor]:
    """The batch of PROMPTS on a device, and its block tables."""
    starts = torch.tensor([0, *NEW]).cumsum(0).int()
    lengths = torch.tensor([a + b for a, b in zip(COMPUTED, NEW, strict=True)]).int()
    tables = torch.arange(1, len(PROMPTS) * WIDTH * heads + 1).view(len(PROMPTS), -1).int()
    positions = torch.cat([torch.arange(a, a + b) for a, b in zip(COMPUTED, NEW, strict=True)])
    common = CommonAttentionMetadata(
        query_start_loc=starts.to(device), query_start_loc_cpu=starts, seq_lens=lengths.to(device),
        num_reqs=len(PROMPTS), num_actual_tokens=sum(NEW), max_query_len=max(NEW), max_seq_len=int(lengths.max()),
        block_table_tensor=tables.to(device), slot_mapping=positions.to(device), positions=positions.to(device),
        seq_lens_cpu_upper_bound=lengths,
    )  # fmt: skip
    return common, tables


@pytest.fixture
def config() -> Any:
    found = SimpleNamespace(
        additional_config={"lkv": {"policy": "knorm", "retention": 0.5, "min_prompt": 1}},
        scheduler_config=SimpleNamespace(max_num_seqs=8),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(requests.backends, "install", lambda: None)
        found.batch = Requests(found, "cpu", False)
    for row, prompt in enumerate(PROMPTS):
        found.batch._set(row, prompt, 0.5)
    return found


@pytest.mark.parametrize("design", SPECS)
def test_what_attention_sees(config: Any, design: str) -> None:
    spec = SPECS[design]
    common, tables = batch("cpu", spec.tables)
    metadata = Builder(spec, [], config, torch.device("cpu")).build(0, common)
    seen, step = metadata.common, metadata.step
    drop = [dropped(PROMPTS[0], 0.5 * share, PAGE) for share in spec.shares]
    whole = tables.view(len(PROMPTS), WIDTH, spec.tables).transpose(1, 2)
    for head, gone in enumerate(drop):
        assert torch.equal(seen.block_table_tensor[head, : WIDTH - gone // PAGE], whole[0, head, gone // PAGE :])
        assert seen.seq_lens[head] == 76 - gone
    assert torch.equal(seen.block_table_tensor[spec.tables :], whole[1:].reshape(-1, WIDTH))
    assert seen.seq_lens[spec.tables :: spec.tables].tolist() == [100, 52, 32]
    assert torch.equal(seen.seq_lens, seen.seq_lens_cpu_upper_bound) and seen.max_seq_len == 100
    assert [one.prompt for one in step.ended] == step.pages.prompts == [100, 50]
    for i, (row, one) in enumerate(zip((1, 2), step.ended, strict=True)):
        blocks = -(-one.prompt // PAGE)
        assert torch.equal(one.tables, whole[row, :, :blocks].long())
        assert torch.equal(step.pages.tables[i].view(spec.tables, -1)[:, :blocks], one.tables)
    tokens, again = step.replayed
    assert tokens.tolist() == [55, 56]  # the third prompt's 51st and 52nd
    left = [52 - dropped(50, 0.5 * share, PAGE) for share in spec.shares]
    assert again.common.seq_lens.tolist() == left and again.common.query_start_loc.tolist()[-1] == 2 * spec.tables


@pytest.mark.parametrize("design", SPECS)
def test_nothing_is_read_on_the_host(config: Any, design: str) -> None:
    """On a device without numbers, whatever would wait for one raises."""
    spec = SPECS[design]
    common, _ = batch("meta", spec.tables)
    metadata = Builder(spec, [], config, torch.device("meta")).build(0, common)
    seen, step = metadata.common, metadata.step
    of_step = [seen.block_table_tensor, seen.seq_lens, step.pages.tables, step.pages.budgets, step.replayed[0]]
    assert {t.device.type for t in of_step} == {"meta"}
    assert seen.query_start_loc_cpu.device.type == seen.seq_lens_cpu_upper_bound.device.type == "cpu"


def test_tables_may_have_rows_of_padding(config: Any) -> None:
    common, _ = batch("cpu", HEADS)
    rows = torch.cat([common.block_table_tensor, torch.zeros(3, WIDTH * HEADS, dtype=torch.int32)])
    plain = Builder(SPECS["heads"], [], config, torch.device("cpu"))
    padded = plain.build(0, common.replace(block_table_tensor=rows)).common
    assert torch.equal(padded.block_table_tensor, plain.build(0, common).common.block_table_tensor)


def builders() -> list[Any]:
    with FlashInfer("native")():
        from lkv.vllm import flashinfer
    return [flash_attn.Builder, flashinfer.Builder]


@pytest.mark.parametrize("design", SPECS)
def test_no_graph_of_a_whole_step(design: str) -> None:
    """By vLLM's own rules, graphs become piecewise, and where that cannot be, the engine does not start."""
    for builder in builders():
        support = builder.get_cudagraph_support(None, SPECS[design])
        assert support is AttentionCGSupport.NEVER and not builder.supports_update_block_table
        compiled = CompilationConfig(mode=CompilationMode.VLLM_COMPILE, cudagraph_mode=CUDAGraphMode.FULL_AND_PIECEWISE)
        compiled.set_splitting_ops_for_v1("naive")
        assert compiled.splitting_ops_contain_kv_cache_update()
        assert compiled.resolve_cudagraph_mode_and_sizes(support, "ours") is CUDAGraphMode.PIECEWISE
        compiled.cudagraph_mode = CUDAGraphMode.FULL
        with pytest.raises(ValueError, match="please try cudagraph_mode=PIECEWISE"):
            compiled.resolve_cudagraph_mode_and_sizes(support, "ours")


def test_layers_that_are_not_evicted_keep_their_graphs() -> None:
    support = flash_attn.Builder.get_cudagraph_support(None, PLAIN)
    assert support is flash_attn.FlashAttentionMetadataBuilder._cudagraph_support is not AttentionCGSupport.NEVER


def test_a_group_of_several_specs_has_none() -> None:
    from vllm.v1.kv_cache_interface import UniformTypeKVCacheSpecs

    both = UniformTypeKVCacheSpecs(block_size=PAGE, kv_cache_specs={"a": PLAIN, "b": SPECS["equal"]})
    assert flash_attn.Builder.get_cudagraph_support(None, both) is AttentionCGSupport.NEVER
