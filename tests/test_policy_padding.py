"""A text in a padded batch is scored, budgeted and evicted as it is alone: every policy, padding on either side."""

from __future__ import annotations

import pytest
import torch
from observations import HIDDEN, SINKS, D, H, beside, observe, pad
from torch import Tensor

import lkv_ext
from lkv.policies import AdaKV, Ahead, KVzip, Observation, Policy, Random, SnapKV, StreamingLLM
from lkv.policies.lkv import Learned, learned
from lkv.policies.lkv.head_budget import HeadBudget
from lkv.policies.lkv.token_scorer import TokenScorer

LAYERS, LENGTHS = 2, [23, 17, 9, 4, 1]
TOTALS = torch.tensor([25, 31, 13, 7, 2])  # of a layer's heads; for the last ones less than is protected


def trained(input: str, kind: str) -> Learned:
    torch.manual_seed(0)
    scorer = TokenScorer(LAYERS, H, 2 * D if input == "kv" else HIDDEN, input, hidden=5)
    budget = HeadBudget(LAYERS, H, kind, floor=0.0)
    with torch.no_grad():
        budget.logits.mlp[2].weight.normal_()
    return learned(scorer, budget, sink=1, window=3)


POLICIES = {
    "snapkv": SnapKV(window=4),
    "snapkv max": SnapKV(window=7, kernel_size=3, pooling="max"),
    "streaming": StreamingLLM(sink=2),
    "adakv": AdaKV(SnapKV(window=3), alpha=0.3, floor="minimum"),
    "adakv blend": AdaKV(SnapKV(window=3), alpha=0.3, floor="blend"),
    "kvzip": KVzip(sink=2),
    "kvzip heads": KVzip(sink=1, across="heads"),
    "kvzip uniform": KVzip(across=None),
    "lkv": trained("kv", "capped"),
    "lkv hidden": trained("hidden", "softmax"),
    "lkv threshold": trained("kv", "threshold"),
    "lkv threshold hidden": trained("hidden", "threshold"),
}


def layers_of(length: int, policy: Policy) -> list[Observation]:
    """The second one has sinks."""
    sinks = [None, torch.tensor(SINKS)]
    window = max(policy.window, 4)
    return [observe(length, window, 7 * n + length, 1, softcap=3.0, sinks=sinks[n]) for n in range(LAYERS)]


def kept(policy: Policy, layers: list[Observation], total: Tensor) -> list[list[list[int]]]:
    """Per sequence, and per head of all layers: the rows that stay, counted from the first valid one."""
    scores = [policy.score(n, o) for n, o in enumerate(layers)]
    if isinstance(policy, Ahead):
        ahead = [policy.ahead(n, total // H, o.lengths[:, 0]) for n, o in enumerate(layers)]
        budgets = torch.stack(ahead)
    elif policy.scope == "model":
        lengths = torch.stack([o.lengths for o in layers])
        budgets = policy.budgets(scores, lengths, total * LAYERS, starts=layers[0].starts)
    else:
        budgets = torch.stack(
            [policy.budgets(s, o.lengths, total, starts=o.starts) for s, o in zip(scores, layers, strict=True)]
        )
    rows: list[list[list[int]]] = [[] for _ in total]
    for s, each, o in zip(scores, budgets, layers, strict=True):
        options = dict(lengths=o.lengths, starts=o.starts, sink=policy.sink, window=policy.window)
        index = lkv_ext.select(s, each, layout="padded", **options)
        for b, heads in enumerate((index.positions - o.starts[..., None]).tolist()):
            used = zip(heads, index.lengths[b].tolist(), strict=True)
            rows[b] += [positions[:count] for positions, count in used]
    return rows


@pytest.mark.parametrize("fill", [3.0, -40.0])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", POLICIES)
def test_beside_other_texts(name: str, side: str, fill: float) -> None:
    policy = POLICIES[name]
    alone = [layers_of(length, policy) for length in LENGTHS]
    together = [beside([layers[n] for layers in alone], side, fill) for n in range(LAYERS)]
    for n, batch in enumerate(together):
        scores = policy.score(n, batch)
        assert not scores.isnan().any()
        for b, layers in enumerate(alone):
            own = slice(batch.starts[b, 0], batch.starts[b, 0] + LENGTHS[b])
            torch.testing.assert_close(scores[b, :, own], policy.score(n, layers[n])[0], rtol=1e-5, atol=1e-6)
    for b, rows in enumerate(kept(policy, together, TOTALS)):
        assert rows == kept(policy, alone[b], TOTALS[b : b + 1])[0]
        count = min(int(TOTALS[b]) // H * H if isinstance(policy, Ahead) else int(TOTALS[b]), LENGTHS[b] * H)
        assert sum(map(len, rows)) == count * LAYERS


@pytest.mark.parametrize("left, right", [(0, 4), (5, 0), (3, 2)])
@pytest.mark.parametrize("name", [name for name in POLICIES if "lkv" not in name])
def test_padding_that_is_no_number(name: str, left: int, right: int) -> None:
    """Scores that look at queries survive even this; of learned ones padding has to be finite."""
    policy = POLICIES[name]
    observed = observe(17, 4, seed=1)
    scores, padded = policy.score(0, observed), policy.score(0, pad(observed, left, right, torch.nan))
    assert not padded.isnan().any()
    torch.testing.assert_close(padded[..., left : left + 17], scores, rtol=1e-6, atol=1e-8)


def test_random_rows_are_those_of_their_places() -> None:
    """Padding in front moves the places of a text, and with them what is drawn for it."""
    policy, alone = Random(), observe(9, 1, batch=1)
    batch = beside([observe(15, 1, batch=1), alone], "right")
    assert torch.equal(policy.score(1, batch)[1, :, :9], policy.score(1, alone)[0])
    shifted = policy.score(1, pad(alone, 6))[0, :, 6:]
    assert torch.equal(shifted, policy.score(1, batch)[0, :, 6:])
    assert not torch.equal(shifted, policy.score(1, alone)[0])
