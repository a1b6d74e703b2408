"""Methods that were made for a model before: gates, curves and statistics, by hand and from files."""

from __future__ import annotations

import heapq
from dataclasses import replace

import numpy as np
import pytest
import torch
from observations import observe
from safetensors.torch import save_file

from lkv.policies import LUKV, ExpectedAttention, FastKVzip, KVzap, Protect, QueryStatistics, SnapKV
from lkv.policies.fastkvzip import FastGate
from lkv.policies.kvzap import Gate
from lkv.policies.lukv import Curves, _convex


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_a_gate_is_read_from_the_published_layout(kind: str, tmp_path) -> None:
    torch.manual_seed(0)
    maps = (
        {"": torch.nn.Linear(6, 2)} if kind == "linear" else {"0.": torch.nn.Linear(6, 5), "2.": torch.nn.Linear(5, 2)}
    )
    layers = [{name: torch.nn.Linear(m.in_features, m.out_features) for name, m in maps.items()} for _ in range(3)]
    tensors = {
        f"layers.{n}.{name}{k}": v
        for n, x in enumerate(layers)
        for name, m in x.items()
        for k, v in m.state_dict().items()
    }
    save_file(tensors, tmp_path / "model.safetensors")
    gate, hidden = Gate.load(tmp_path / "model.safetensors"), torch.randn(2, 11, 6)
    for n, layer in enumerate(layers):
        out = hidden
        for name, m in layer.items():
            out = m(torch.nn.functional.gelu(out) if name == "2." else out)
        torch.testing.assert_close(gate(n, hidden), out.transpose(1, 2))
    with pytest.raises(ValueError, match="expected hidden states of a width of 6, got 7"):
        gate(0, torch.randn(1, 3, 7))
    for wrong in ({"layers.0.weight": torch.ones(2, 6)}, {"up.weight": torch.ones(2)}, {}):
        save_file(wrong, tmp_path / "wrong.safetensors")
        with pytest.raises(ValueError, match="lkv.KVzap: expected a safetensors file of layers"):
            Gate.load(tmp_path / "wrong.safetensors")


def test_a_row_is_worth_what_the_gate_says_of_its_token() -> None:
    """Also where heads have rows of different tokens."""
    o = observe(12, 3, batch=2)
    heads = o.keys.shape[1]
    gate = Gate((((torch.randn(heads, 5), torch.randn(heads)),),))
    hidden = torch.randn(2, 20, 5)
    places = torch.randint(0, 20, o.positions.shape).sort(-1).values
    got = KVzap(gate).score(0, replace(o, hidden_states=hidden, positions=places))
    fast = fast_gate(heads=heads, hidden=5)
    of_fast = FastKVzip(fast).score(0, replace(o, hidden_states=hidden, positions=places))
    assert torch.equal(of_fast, fast(0, hidden).gather(2, places))
    for b in range(2):
        for h in range(heads):
            (weight, bias) = gate.layers[0][0]
            expected = hidden[b, places[b, h]] @ weight[h] + bias[h]
            torch.testing.assert_close(got[b, h], expected)
    with pytest.raises(ValueError, match=f"expected a gate for {heads} KV heads, got one for 1"):
        KVzap(Gate((((torch.randn(1, 5), torch.randn(1)),),))).score(0, replace(o, hidden_states=hidden))
    with pytest.raises(ValueError, match=f"lkv.FastKVzip: expected a gate for {heads} KV heads, got one for 1"):
        FastKVzip(fast_gate(heads=1, hidden=5)).score(0, replace(o, hidden_states=hidden))


def fast_gate(layers: int = 1, heads: int = 2, groups: int = 3, hidden: int = 6, sinks: int = 5) -> FastGate:
    generator = torch.Generator().manual_seed(layers + heads)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    return FastGate(
        tuple(
            {
                "q_proj.weight": drawn(heads * groups * 4, hidden),
                "q_proj.bias": drawn(heads * groups * 4),
                "k_proj.weight": drawn(heads * 4, hidden),
                "q_norm.weight": drawn(4),
                "k_norm.weight": drawn(4),
                "k_base": drawn(heads, 1, sinks, 4),
                "b": drawn(heads, 1, groups),
            }
            for _ in range(layers)
        )
    )


def test_a_fast_gate_is_a_share_of_a_softmax_with_sinks() -> None:
    """One token, one head and one query at a time."""
    gate, hidden = fast_gate(layers=2), torch.randn(2, 7, 6)

    def normed(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return x / (x.pow(2).mean() + 1e-6).sqrt() * weight

    for n, layer in enumerate(gate.layers):
        got = gate(n, hidden)
        for b, i, h in np.ndindex(2, 7, 2):
            x, shares = hidden[b, i], []
            key = normed(layer["k_proj.weight"][4 * h : 4 * h + 4] @ x, layer["k_norm.weight"])
            for g in range(3):
                at = slice(4 * (3 * h + g), 4 * (3 * h + g) + 4)
                query = normed(layer["q_proj.weight"][at] @ x + layer["q_proj.bias"][at], layer["q_norm.weight"])
                own = query @ key / 2 + layer["b"][h, 0, g]
                shares.append(torch.cat([own[None], layer["k_base"][h, 0] @ query / 2]).softmax(0)[0])
            torch.testing.assert_close(got[b, h, i], sum(shares) / 3)


def test_a_fast_gate_keeps_nothing_for_gradients() -> None:
    """Neither of its own tensors nor of hidden states of a model that could be trained."""
    gate = fast_gate()
    trained = FastGate(tuple({name: tensor.requires_grad_() for name, tensor in x.items()} for x in gate.layers))
    assert not trained(0, torch.randn(1, 4, 6, requires_grad=True)).requires_grad


def test_a_fast_gate_is_read_from_the_published_layout(tmp_path) -> None:
    """Also with numbers of numpy beside the tensors; nothing else of a file is run."""
    gate, hidden = fast_gate(layers=3), torch.randn(1, 4, 6)
    halves = [{name: tensor.bfloat16() for name, tensor in layer.items()} for layer in gate.layers]
    torch.save({"module": halves, "losses": np.array([0.5, 0.25])}, tmp_path / "gate.pt")
    read = FastGate.load(tmp_path / "gate.pt")
    assert len(read.layers) == 3
    expected = FastGate(tuple({name: tensor.float() for name, tensor in layer.items()} for layer in halves))
    assert torch.equal(read(2, hidden), expected(2, hidden))
    with pytest.raises(ValueError, match="expected hidden states of a width of 6, got 7"):
        gate(0, torch.randn(1, 3, 7))
    (tmp_path / "text.pt").write_text("gate")
    for name, wrong in {"list": [1], "nothing": {}, "numbers": {"module": [1]}, "code": {"module": slice}}.items():
        torch.save(wrong, tmp_path / f"{name}.pt")
    for name in ("text", "list", "nothing", "numbers", "code"):
        with pytest.raises(ValueError, match="lkv.FastKVzip: expected a file of torch.save"):
            FastGate.load(tmp_path / f"{name}.pt")


def test_a_fast_gate_of_another_layout_is_refused() -> None:
    (layer,) = fast_gate().layers
    for name, tensor in layer.items():
        with pytest.raises(ValueError, match="expected the published layout of a gate, got .* in layer 0"):
            FastGate((layer | {name: tensor[..., None].expand(*tensor.shape, 2)},))
        with pytest.raises(ValueError, match="expected the published layout of a gate, got tensors"):
            FastGate(({other: x for other, x in layer.items() if other != name},))
    with pytest.raises(ValueError, match="expected a gate of a layer or more, got none"):
        FastGate(())


def hull(costs: list[float]) -> list[float]:
    """Slopes of the lower hull of the sums, each by trying all later points."""
    sums = np.concatenate([[0], np.cumsum(costs)])
    slopes, at = [], 0
    while at < len(costs):
        to = min(range(at + 1, len(sums)), key=lambda j: ((sums[j] - sums[at]) / (j - at), -j))
        slopes += [(sums[to] - sums[at]) / (to - at)] * (to - at)
        at = to
    return slopes


def by_a_heap(scores: torch.Tensor, use: torch.Tensor, sink: int, window: int) -> torch.Tensor:
    """The authors' steps: always the head that loses the least gives its worst row."""
    layers, heads, length = scores.shape
    left, lost = {}, np.zeros((layers, heads))
    least = max(round(0.01 * length), sink + window)
    for n in range(layers):
        for h in range(heads):
            order = scores[n, h, sink : length - window].argsort(stable=True)
            left[n, h] = hull(use[n, h, sink : length - window][order].tolist())
    heap, done, steps = [(left[at][0], *at, 0) for at in left], 0, []
    heapq.heapify(heap)
    for step in range(1, 100):
        while done < round(step / 100 * layers * heads * length) and heap:
            _, n, h, i = heapq.heappop(heap)
            if length - lost[n, h] > least:
                lost[n, h] += 1
                done += 1
                if i + 1 < len(left[n, h]):
                    heapq.heappush(heap, (left[n, h][i + 1], n, h, i + 1))
        steps.append(lost / length)
    return torch.tensor(np.stack(steps))


def test_curves_are_those_of_a_heap_over_hulls() -> None:
    torch.manual_seed(0)
    texts = [(torch.rand(2, 3, 40), torch.rand(2, 3, 40) ** 4 * torch.tensor([1.0, 3, 9])[:, None]) for _ in range(3)]
    fitted = Curves.fit(texts, sink=3, window=2)
    expected = torch.stack([by_a_heap(*text, 3, 2) for text in texts]).mean(0)
    torch.testing.assert_close(fitted.lost, expected)
    assert (fitted.lost[49, :, 0] > fitted.lost[49, :, 2] + 0.1).all()  # a head of more use loses less
    costs = torch.rand(2, 30).double()
    convex = _convex(costs)
    assert (convex.diff() >= -1e-12).all() and (convex.cumsum(1) <= costs.cumsum(1) + 1e-12).all()
    torch.testing.assert_close(convex.sum(1), costs.sum(1))
    with pytest.raises(ValueError, match="expected a text or more"):
        Curves.fit([])
    with pytest.raises(ValueError, match=r"expected scores and use \[N, H, L\] with L > 5"):
        Curves.fit([(torch.rand(2, 3, 5), torch.rand(2, 3, 5))], sink=3, window=2)


def test_budgets_are_those_of_the_curves(tmp_path) -> None:
    """At a step of the curves exactly, in between by a line; whole rows, of the total."""
    torch.manual_seed(1)
    curves = Curves(torch.rand(99, 2, 3).double().sort(0).values)
    curves.save(tmp_path / "curves.npy")
    assert torch.equal(Curves.load(tmp_path / "curves.npy").lost, curves.lost)
    torch.testing.assert_close(curves.kept(0.7), 1 - curves.lost[29])
    torch.testing.assert_close(curves.kept(0.695), 1 - (curves.lost[29] + curves.lost[30]) / 2)
    assert (curves.kept(1.0) == 1).all()
    torch.testing.assert_close(curves.kept(0.001), 1 - curves.lost[98])
    policy = LUKV(Protect(SnapKV(window=1), sink=2), curves)
    for rows in (2, 30, 77, 100):
        table = policy.budget_table(rows, 100)
        assert int(table.sum()) == 6 * rows and int(table.min()) >= min(rows, 3) and int(table.max()) <= 100
    shares = curves.kept(0.3)
    wanted = shares / shares.sum() * 6 * 30
    free = (wanted > 4) & (wanted < 99)
    assert free.any() and ((policy.budget_table(30, 100) - wanted).abs()[free] < 3).all()
    ahead = torch.stack([policy.ahead(n, torch.tensor([30, 20]), torch.tensor([100, 100])) for n in range(2)])
    assert torch.equal(ahead[:, 0], policy.budget_table(30, 100))
    with pytest.raises(ValueError, match="expected curves, got none"):
        LUKV(SnapKV())
    for wrong in (torch.rand(98, 2, 3), torch.rand(99, 6), torch.rand(99, 2, 3) + 1):
        with pytest.raises(ValueError, match=r"expected curves \[99, N, H\] in \[0, 1\]"):
            Curves(wrong)
    (tmp_path / "text.npy").write_text("curves")
    with pytest.raises(ValueError, match=r"expected a .npy file of curves \[99, N, H\]"):
        Curves.load(tmp_path / "text.npy")


def test_statistics_in_a_file_of_kvpress(tmp_path) -> None:
    statistics = QueryStatistics(torch.randn(2, 4, 8), torch.randn(2, 4, 8, 8))
    statistics.save(tmp_path / "statistics")
    again = QueryStatistics.load(tmp_path / "statistics")
    assert torch.equal(again.mean, statistics.mean) and torch.equal(again.covariance, statistics.covariance)
    assert ExpectedAttention(statistics=again).needs == {"rotary"}
    save_file({"query_mean": torch.ones(2, 4, 8)}, tmp_path / "wrong")
    with pytest.raises(ValueError, match="expected a safetensors file with query_mean and query_cov"):
        QueryStatistics.load(tmp_path / "wrong")
