"""Random calls for the property tests: hypothesis draws the structure, a seed fills in the numbers."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from cases import DTYPES, PLACEMENTS, SCORE_DTYPES, SCORES, generator, interleave, place, rows_of, scores_of, twins
from hypothesis import strategies as st
from torch import Tensor

LENGTHS = st.one_of(st.integers(0, 40), st.integers(0, 400))
HUGE = 2**40


@dataclass
class Call:
    """The arguments of one evict, and what the reference needs beside them."""

    payload: list[Tensor]
    has_v: bool
    scores: Tensor
    budgets: object
    options: dict
    shape: tuple[int, int]  # B, H
    readable: bool = True  # the host may read the CPU tensors among the integers

    @property
    def arguments(self) -> tuple:
        return self.payload[0], self.payload[1] if self.has_v else None, self.scores, self.budgets

    def to(self, device: str) -> Call:
        """There, with the same strides; integers that the host may read stay with it."""
        if device == "cpu":
            return self
        options = {
            name: x.to(device) if isinstance(x, Tensor) and (name == "cu_seqlens" or not self.readable) else x
            for name, x in self.options.items()
        }
        budgets = self.budgets
        if isinstance(budgets, Tensor) and not self.readable:
            budgets = budgets.to(device)
        *payload, scores = twins([*self.payload, self.scores], device)
        return replace(self, payload=payload, scores=scores, budgets=budgets, options=options)

    @property
    def sized_exactly(self) -> bool:
        """All that sizes the output is on the host."""
        return self.readable and not (self.scores.is_cuda and "cu_seqlens" in self.options)

    @property
    def companions(self) -> list[Tensor]:
        return self.payload[2 if self.has_v else 1 :]


def as_integers(
    draw: st.DrawFn, shape: tuple[int, int], one: st.SearchStrategy[int], short: int, *, device_only: bool = False
) -> object:
    """[B, H] or its short form of one axis, as lists, NumPy or tensors of either width."""
    size = draw(st.sampled_from([shape, shape[short : short + 1]]))
    count = torch.Size(size).numel()
    values = torch.tensor(draw(st.lists(one, min_size=count, max_size=count)), dtype=torch.int64).view(size)
    kinds = ["int32", "int64"] if device_only else ["list", "list", "numpy", "int32", "int64"]
    kind = draw(st.sampled_from(kinds))
    if kind == "list" and count > 0:
        return values.tolist()
    if kind == "int32":
        return values.clamp(-(2**31), 2**31 - 1).int()
    return values.numpy() if kind == "numpy" else values


@st.composite
def budgets(draw: st.DrawFn, shape: tuple[int, int], tokens: int, *, device_only: bool = False) -> object:
    one = st.one_of(st.integers(0, tokens), st.integers(-3, tokens + 3), st.sampled_from([0, 1, HUGE, -HUGE]))
    if not device_only and draw(st.integers(0, 4)) == 0:
        return draw(one)
    return as_integers(draw, shape, one, 1, device_only=device_only)


@st.composite
def bounds(draw: st.DrawFn, shape: tuple[int, int], tokens: int, *, device_only: bool = False) -> object:
    """lengths or starts: [B] or [B, H], or none."""
    if draw(st.booleans()):
        return None
    one = st.one_of(st.integers(0, tokens), st.integers(-2, tokens + 2))
    return as_integers(draw, shape, one, 0, device_only=device_only)


@st.composite
def span_options(draw: st.DrawFn, shape: tuple[int, int], tokens: int) -> dict:
    """layout, reserve, align, capacity and max_budget; each left out in half of the calls."""
    options: dict = {}
    if draw(st.booleans()):
        options["layout"] = draw(st.sampled_from(["packed", "padded"]))
    if draw(st.booleans()):
        options["reserve"] = draw(st.integers(0, 5))
    if draw(st.booleans()):
        options["align"] = draw(st.sampled_from([1, 2, 3, 16]))
    align = options.get("align", 1)
    if draw(st.booleans()):
        most = tokens if options.get("layout") == "padded" else tokens * max(shape[0] * shape[1], 1)
        options["capacity"] = draw(st.integers(0, most // align + 1)) * align
    if draw(st.booleans()):
        options["max_budget"] = draw(st.integers(0, tokens + 2))
    return options


@st.composite
def protected(draw: st.DrawFn, tokens: int) -> dict:
    reach = st.one_of(st.just(0), st.integers(0, 8), st.integers(0, tokens + 5))
    return dict(sink=draw(reach), window=draw(reach))


@st.composite
def scores(draw: st.DrawFn, shape: tuple[int, ...], seed: int) -> Tensor:
    """`[B, H, L]` or `[T]`, hostile, of any dtype and any strides, also shared by all heads."""
    values = scores_of(draw(st.sampled_from(SCORES)), shape, seed).to(draw(st.sampled_from(SCORE_DTYPES)))
    if len(shape) == 1:
        return values if draw(st.booleans()) else torch.stack([values, values], 1)[:, 1]
    how = draw(st.sampled_from([*PLACEMENTS, "expanded"]))
    return values[:, :1].expand(values.shape) if how == "expanded" else place(values, how)


@st.composite
def payloads(draw: st.DrawFn, leading: tuple[int, ...], seed: int) -> tuple[list[Tensor], bool]:
    """k, v or none, and companions; rows of odd sizes in odd places, K and V perhaps in one storage."""
    dtype = draw(st.sampled_from(DTYPES))
    dims = draw(st.tuples(*[st.sampled_from([1, 3, 7, 8, 24, 64, 128])] * 2))
    k, v = (rows_of([*leading, dim], dtype, seed + i) for i, dim in enumerate(dims))
    how = draw(st.sampled_from([*PLACEMENTS, "interleaved"])) if len(leading) == 3 else "interleaved"
    if how == "interleaved":
        k, v = interleave(k, v)
    else:
        k, v = place(k, how), place(v, draw(st.sampled_from(PLACEMENTS)))
    has_v = draw(st.booleans()) or how == "interleaved"
    payload = [k, v] if has_v else [k]
    for i in range(draw(st.integers(0, 2))):
        trailing = draw(st.sampled_from([(), (1,), (2, 3), (0,)]))
        payload.append(rows_of([*leading, *trailing], draw(st.sampled_from(DTYPES)), seed + 2 + i))
    return payload, has_v


@st.composite
def calls(draw: st.DrawFn, *, fewest: int = 0, ragged: bool = True, placed_spans: bool = True) -> Call:
    """Dense or ragged, host or device values, any layout; at least `fewest` sequences and heads."""
    shape = (draw(st.integers(fewest, 3)), draw(st.integers(fewest, 3)))
    seed, readable = draw(st.integers(0, 2**20)), draw(st.booleans())
    options: dict = {}
    if not ragged or draw(st.booleans()):
        tokens = draw(LENGTHS)
        leading: tuple[int, ...] = (*shape, tokens)
        options["starts"] = draw(bounds(shape, tokens, device_only=not readable))
    else:
        sizes = torch.tensor([draw(LENGTHS) for _ in range(shape[0] * shape[1] + 2)])
        cu_seqlens = sizes.cumsum(0).int()[:-1]
        tokens = int(sizes.max())
        leading = (int(sizes.sum()),)
        options["cu_seqlens"] = cu_seqlens
    options["lengths"] = draw(bounds(shape, tokens, device_only=not readable))
    options |= draw(protected(tokens))
    if placed_spans:
        options |= draw(span_options(shape, tokens))
    on_device = not readable and placed_spans and draw(st.booleans())
    kept = draw(budgets(shape, tokens, device_only=on_device))
    if not readable and isinstance(kept, Tensor) and not {"capacity", "max_budget"} & options.keys():
        options["max_budget"] = tokens
    if "cu_seqlens" in options and not _tells_shape(kept, options["lengths"]):
        options["lengths"] = torch.full(shape, tokens)
    payload, has_v = draw(payloads(leading, seed))
    return Call(payload, has_v, draw(scores(leading, seed)), kept, options, shape, readable)


def _tells_shape(*integers: object) -> bool:
    """Ragged input has no B and H of its own: some integers must be [B, H]."""
    return any(torch.as_tensor(x).dim() == 2 for x in integers if x is not None)


def shuffled(count: int, seed: int) -> Tensor:
    return torch.randperm(count, generator=generator(seed))
