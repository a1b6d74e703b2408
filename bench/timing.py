"""Clocks, and rounds in which a subject and its rivals take turns.

Machines drift: the same code varies by a factor of two between minutes. Within one round, drift is common to all, so
what is judged is the median of the per-round ratios.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from statistics import median
from time import perf_counter
from typing import Any

import torch

Call = Callable[[], object]
Clock = Callable[[Call, int], float]  # (call, repeats) -> seconds for one call
LEAD_IN = 10e-3


class WallClock:
    """Host time. The result of a lone call is dropped after the clock has stopped.

    A call so short that its data may stay in the caches finds them as its own last call left them, not as a rival did:
    one call more leads in. Cold: they are overwritten before each call instead.
    """

    def __init__(self, cold: bool = False) -> None:
        self._flush = torch.zeros(1 << 27, dtype=torch.uint8) if cold else None

    def __call__(self, call: Call, repeats: int) -> float:
        if self._flush is not None:
            self._flush.add_(1)
            return self._lone(call)
        if repeats == 1:
            elapsed = self._lone(call)
            return self._lone(call) if elapsed < LEAD_IN else elapsed
        call()
        begin = perf_counter()
        for _ in range(repeats):
            call()
        return (perf_counter() - begin) / repeats

    @staticmethod
    def _lone(call: Call) -> float:
        begin = perf_counter()
        result = call()
        elapsed = perf_counter() - begin
        del result
        return elapsed


class CudaClock:
    """Device time between events. Cold: the L2 cache is overwritten before each call, outside the measured span,
    and read over: lines that are still to be written back would cost the call their way to memory.

    The overwriting also keeps the device busy while the host runs ahead, so that launch latency is not counted unless
    it exceeds that.
    """

    def __init__(self, cold: bool) -> None:
        l2 = torch.cuda.get_device_properties(0).L2_cache_size
        self._flush = torch.empty(l2, dtype=torch.int32, device="cuda") if cold else None
        self._sum = torch.empty((), dtype=torch.int64, device="cuda")

    def __call__(self, call: Call, repeats: int) -> float:
        spans = []
        for _ in range(repeats):
            if self._flush is not None:
                self._flush.zero_()
                torch.sum(self._flush, 0, out=self._sum)
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            call()
            end.record()
            spans.append((begin, end))
        torch.cuda.synchronize()
        return sum(begin.elapsed_time(end) for begin, end in spans) / repeats / 1e3


def captured(call: Call) -> Call:
    """The same work as a CUDA graph: what remains is what the device does."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()

    def replay() -> object:
        graph.replay()
        return result

    return replay


def take_turns(benchmark: Any, subject: Call, rivals: dict[str, Call], clock: Clock, seconds: float) -> dict[str, Any]:
    """Rounds of about `seconds` in all: pytest-benchmark measures the subject and calls the rivals as its setup.

    The rivals rotate, so that nobody always runs behind the same one and the cache it leaves.

    Returns:
        The fields of a `Result` that times decide: us, ratios, rival_us, rounds.
    """
    calls = {"": subject, **rivals}
    for call in calls.values():
        call()
    once = {name: clock(call, 1) for name, call in calls.items()}
    # Short calls repeat within a round until the clock's own cost and jitter do not show.
    repeats = {name: max(1, min(200, int(2e-4 / max(t, 1e-7)))) for name, t in once.items()}
    round_seconds = sum(t * repeats[name] for name, t in once.items())
    rounds = min(max(math.ceil(seconds / round_seconds), 7), 101)

    ours: list[float] = []
    theirs: dict[str, list[float]] = {name: [] for name in rivals}
    order = list(rivals)

    def run_rivals() -> None:
        for name in order:
            theirs[name].append(clock(rivals[name], repeats[name]))
        order.append(order.pop(0))

    benchmark.extra_info["calls_per_round"] = repeats[""]
    benchmark.pedantic(
        lambda: ours.append(clock(subject, repeats[""])), setup=run_rivals if rivals else None, rounds=rounds
    )
    return {
        "us": 1e6 * median(ours),
        "ratios": {name: median(b / a for a, b in zip(ours, times, strict=True)) for name, times in theirs.items()},
        "rival_us": {name: 1e6 * median(times) for name, times in theirs.items()},
        "rounds": len(ours),
    }
