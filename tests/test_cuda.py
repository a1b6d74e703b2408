"""What only a GPU shows: graphs, streams, devices, and that nothing waits. Parity on the GPU is in the other files."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from cases import bits, check, expected, payload_of, rows_of, scores_of
from torch import Tensor

import lkv_ext

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]

B, H, L, D = 2, 4, 3000, 64


def cache(seed: int = 0, device: str = "cuda") -> tuple[Tensor, Tensor, Tensor]:
    payload = [rows_of([B, H, L, D], torch.bfloat16, seed + i).to(device) for i in range(2)]
    return *payload, scores_of("normal", [B, H, L], seed).to(device)


@contextlib.contextmanager
def no_waiting() -> Iterator[None]:
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def calls(k: Tensor, v: Tensor, scores: Tensor) -> dict:
    """Every way in that is documented to be free of synchronisation."""
    budgets = torch.tensor([[100, 7, 2000, 0], [1, 900, 30, 5000]])
    lengths, device_budgets = torch.tensor([3000, 1500]).cuda(), budgets.cuda()
    plan = lkv_ext.plan(budgets, [3000, 1500], device="cuda")
    layers = ([k, k], [v, v], [scores, scores])
    out = lkv_ext.evict(k, v, scores, budgets)
    return {
        "int": lambda: lkv_ext.evict(k, v, scores, 500),
        "host": lambda: lkv_ext.evict(k, v, scores, budgets.tolist(), starts=[0, 10]),
        "host, device lengths": lambda: lkv_ext.evict(k, v, scores, [1, 20, 300, 4000], lengths=lengths),
        "device, capacity": lambda: lkv_ext.evict(k, v, scores, device_budgets, capacity=5000, reserve=3),
        "device, max_budget": lambda: lkv_ext.evict(k, v, scores, device_budgets, max_budget=1000, layout="padded"),
        "plan": lambda: lkv_ext.evict(k, v, scores, plan, align=16),
        "layers": lambda: lkv_ext.evict_layers(*layers, 300),
        "out": lambda: lkv_ext.evict(k, v, scores, budgets, out=out),
        "select": lambda: lkv_ext.select(scores, budgets),
        "gather": lambda: lkv_ext.gather([k, v], out.index),
        "in place": lambda: lkv_ext.evict_(k.clone(), v.clone(), scores, plan),
    }


WAYS = ("int", "host", "host, device lengths", "device, capacity", "device, max_budget", "plan", "layers", "out")
WAYS += ("select", "gather", "in place")


def tensors_of(result: object) -> list[Tensor]:
    return [t for t in torch.utils._pytree.tree_leaves(result) if isinstance(t, Tensor)]


@pytest.mark.parametrize("way", WAYS)
def test_nothing_waits(way: str) -> None:
    call = calls(*cache())[way]
    call()
    with no_waiting():
        call()


@pytest.mark.parametrize("way", WAYS)
def test_graphs_replay_with_new_data(way: str) -> None:
    """A captured call computes anew at every replay, from what its inputs hold then."""
    k, v, scores = cache()
    call = calls(k, v, scores)[way]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
    for seed in range(1, 4):
        for t, new in zip((k, v, scores), cache(10 * seed), strict=True):
            t.copy_(new)
        for _ in range(3):
            graph.replay()
        got = [t.clone() for t in tensors_of(captured)]
        for mine, theirs in zip(got, tensors_of(call()), strict=True):
            assert torch.equal(bits(mine), bits(theirs))


def test_unbounded_device_budgets_are_read_outside_a_capture_only() -> None:
    k, v, scores = cache()
    budgets = torch.tensor([1, 20, 300, 4000]).cuda()
    out = lkv_ext.evict(k, v, scores, budgets)
    assert out.overflow is None
    check(out, expected([k, v], scores, budgets))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), pytest.raises(ValueError, match="expected capacity or max_budget with budgets"):
        lkv_ext.evict(k, v, scores, budgets)


def test_the_current_stream_is_used() -> None:
    """Inputs that a slow side stream is still writing are read behind it."""
    k, v, scores = cache()
    new = cache(5)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)
        for t, value in zip((k, v, scores), new, strict=True):
            t.copy_(value)
        out = lkv_ext.evict(k, v, scores, [1, 20, 300, 4000])
    side.synchronize()
    check(out, expected(list(new[:2]), new[2], [1, 20, 300, 4000]))


def test_two_streams_and_two_threads() -> None:
    """Back-to-back calls in flight at once share no scratch and no flags."""
    inputs = [cache(seed) for seed in (1, 2)]
    budgets = [[1, 20, 300, 4000], [2000, 5, 0, 64]]
    wanted = [expected([k, v], scores, b) for (k, v, scores), b in zip(inputs, budgets, strict=True)]

    def run(i: int) -> list[lkv_ext.RaggedKV]:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.default_stream())
        with torch.cuda.stream(stream):
            results = [lkv_ext.evict(*inputs[i], budgets[i]) for _ in range(50)]
        stream.synchronize()
        return results

    torch.cuda.synchronize()
    with ThreadPoolExecutor(2) as pool:
        for results, want in zip(pool.map(run, (0, 1)), wanted, strict=True):
            for out in results:
                check(out, want)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
def test_the_device_of_the_tensors_is_used() -> None:
    inputs = cache(device="cuda:1")
    with torch.cuda.device(0):
        out = lkv_ext.evict(*inputs, 100)
        assert torch.cuda.current_device() == 0
    assert out.k.device == torch.device("cuda:1")
    check(out, expected(list(inputs[:2]), inputs[2], 100))


def test_tensors_in_two_places_are_refused() -> None:
    k, v, scores = cache()
    for name, change in {"v": dict(v=v.cpu()), "scores": dict(scores=scores.cpu())}.items():
        with pytest.raises(ValueError, match=rf"^lkv_ext\.evict: expected {name} on cuda:0, got cpu"):
            lkv_ext.evict(**(dict(k=k, v=v, scores=scores, budgets=4) | change))
    with pytest.raises(ValueError, match=r"^lkv_ext\.evict: expected .* on "):
        lkv_ext.evict(k.cpu(), v, scores, 4)


def test_host_and_device_results_are_the_same_bits() -> None:
    for kind in ("normal", "ties", "nan_and_infinity", "tiny"):
        payload, scores = list(cache(device="cpu")[:2]), scores_of(kind, [B, H, L])
        on_host = lkv_ext.evict(*payload, scores, [7, 800, 2999, 50], sink=2, window=9)
        on_device = lkv_ext.evict(*(t.cuda() for t in payload), scores.cuda(), [7, 800, 2999, 50], sink=2, window=9)
        assert torch.equal(on_device.positions.cpu(), on_host.positions)
        for mine, theirs in zip(payload_of(on_device), payload_of(on_host), strict=True):
            assert torch.equal(bits(mine).cpu(), bits(theirs))


@pytest.mark.parametrize("way", ["calls", "graph"])
@pytest.mark.parametrize("length", [512, 8192, 40_000, 140_000])
def test_every_size(length: int, way: str) -> None:
    """A select with a gather beside it, back to back or replayed."""
    heads, budgets = 8, [length // 3, 1, 0, length // 50, length // 10, 77, length // 5, length]
    payload = [rows_of([1, heads, length, 128], torch.bfloat16, i) for i in range(2)]
    scores = scores_of("normal", [1, heads, length], 3)
    want = lkv_ext.evict(*payload, scores, budgets, sink=3, window=5)
    inputs = [t.cuda() for t in (*payload, scores)]
    for _ in range(3):
        got = lkv_ext.evict(*inputs, budgets, sink=3, window=5)
    if way == "graph":
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            got = lkv_ext.evict(*inputs, budgets, sink=3, window=5)
        for _ in range(3):
            graph.replay()
    assert torch.equal(got.positions.cpu(), want.positions)
    for mine, theirs in zip(payload_of(got), payload_of(want), strict=True):
        assert torch.equal(bits(mine).cpu(), bits(theirs))


@pytest.mark.parametrize("length", [3000, 40_000])
def test_other_budgets_at_the_same_addresses(length: int) -> None:
    """Back to back, nothing of the call before is found: neither its offsets nor its tables, positions and flags."""
    heads, most = 8, length // 2
    payload = [rows_of([1, heads, length, 128], torch.bfloat16, i) for i in range(2)]
    scores = scores_of("normal", [1, heads, length], 3)
    ramp = [most * h // heads for h in range(heads)]
    kinds = [ramp, ramp[::-1], [most * (h % 2) for h in range(heads)], [1] * heads]
    want = [lkv_ext.evict(*payload, scores, budgets, capacity=heads * most) for budgets in kinds]
    inputs, budgets = [t.cuda() for t in (*payload, scores)], torch.tensor(kinds, dtype=torch.int32).cuda()
    now = budgets[0].clone()
    out = lkv_ext.evict(*inputs, now, capacity=heads * most)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        lkv_ext.evict(*inputs, now, capacity=heads * most, out=out)
    for replay in (graph.replay, lambda: lkv_ext.evict(*inputs, now, capacity=heads * most, out=out)):
        for turn in range(40):
            for kind in range(turn, turn + 3):  # with nothing between them, and the last is looked at
                now.copy_(budgets[kind % len(kinds)])
                replay()
            right = want[kind % len(kinds)]
            kept = slice(0, int(right.cu_seqlens[-1]))
            assert torch.equal(out.cu_seqlens.cpu(), right.cu_seqlens)
            assert torch.equal(out.positions.cpu()[kept], right.positions[kept])
            for mine, theirs in zip(payload_of(out), payload_of(right), strict=True):
                assert torch.equal(bits(mine).cpu()[kept], bits(theirs)[kept])


@pytest.mark.parametrize("order", ["ascending", "any"])
@pytest.mark.parametrize("to", ["front", "back"])
def test_pages_as_on_the_host(to: str, order: str) -> None:
    pools = [rows_of([24, H, 16, D], torch.bfloat16, i) for i in range(2)]
    tables = torch.randperm(24, generator=torch.Generator().manual_seed(0)).view(B, 12).int()
    scores, lengths, options = scores_of("normal", [B, H, 192], 2), [192, 70], dict(to=to, order=order)

    def run(device: str) -> list[Tensor]:
        moved = [pool.to(device, copy=True) for pool in pools]
        args = (scores.to(device), [50, 7, 100, 0], tables.to(device), lengths)
        return [*moved, *tensors_of(lkv_ext.evict_paged_(moved, *args, **options))]

    for mine, theirs in zip(run("cuda"), run("cpu"), strict=True):
        assert torch.equal(bits(mine).cpu(), bits(theirs))


def test_gradients() -> None:
    k = torch.randn(1, 2, 40, 3, dtype=torch.float64, device="cuda", requires_grad=True)
    scores = torch.randn(1, 2, 40, device="cuda")
    assert torch.autograd.gradcheck(lambda t: lkv_ext.evict(t, None, scores, [5, 40], reserve=1).k, (k,))


def soft_mask(scores: Tensor, k: Tensor, temperature: Tensor) -> tuple[Tensor, ...]:
    leaves = [t.detach().requires_grad_() for t in (scores, k, temperature)]
    mask = lkv_ext.soft_topk(*leaves, log=True)
    return mask, *torch.autograd.grad(mask, leaves, scores)


def test_soft_topk_waits_for_nothing_and_replays() -> None:
    """A mask and its gradients, captured once: anew at every replay."""
    inputs = [t.cuda() for t in (torch.randn(3, 40_000), torch.rand(3) * 9000, torch.tensor(0.1))]
    soft_mask(*inputs)
    with no_waiting():
        soft_mask(*inputs)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        soft_mask(*inputs)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = soft_mask(*inputs)
    for _ in range(3):
        inputs[0].copy_(torch.randn(3, 40_000))
        inputs[1].copy_(torch.rand(3) * 9000)
        graph.replay()
        for mine, theirs in zip(captured, soft_mask(*inputs), strict=True):
            assert torch.equal(mine, theirs)
        sums = captured[0].double().exp().sum(-1)
        assert torch.allclose(sums, inputs[1].double(), rtol=1e-5)


def test_compile_with_device_budgets() -> None:
    """One graph for all budgets, with the real fake kernels of CUDA tensors."""
    k, v, scores = cache()
    shrink = torch.compile(lambda budgets: lkv_ext.evict(k, v, scores, budgets, capacity=6000).k, fullgraph=True)
    for budgets in ([1, 20, 300, 900], [5, 5, 0, 3000]):
        want = expected([k, v], scores, budgets, capacity=6000, total=6000)
        assert torch.equal(bits(shrink(torch.tensor(budgets).cuda())), want.tensors[0])
