"""Budgets per head: from learned shares, or by competition of scores for one total."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lkv_ext._common import errors
from lkv_ext._common.kinds import described, is_of
from lkv_ext._common.options import MOST, bounded, flatten, host_ints, integer, wrong_shape
from lkv_ext._torch.ints import Ints, split
from lkv_ext._torch.select import select

SCORES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Blend:
    """A floor of `budgets_from_scores`: `(1 - alpha) * won + alpha * mean` for every head (Ada-KV's safeguard).

    Attributes:
        alpha: in [0, 1]; 1: every head gets the mean.

    Source: Ada-KV, arXiv 2407.11550.
    """

    alpha: float

    def __post_init__(self) -> None:
        try:
            if not is_of("number", self.alpha) or not 0 <= self.alpha <= 1:
                raise ValueError(f"expected alpha in [0, 1], got {described(self.alpha)}")
            object.__setattr__(self, "alpha", float(self.alpha))
        except (RuntimeError, ValueError, TypeError) as error:
            errors.reraise("Blend", error, given=dict(alpha=self.alpha))


@dataclass(frozen=True)
class Minimum:
    """A floor of `budgets_from_scores`: every head keeps its best rows before the heads compete.

    Attributes:
        rows: at least 0; protected rows count.

    Source: AdaKVPress of kvpress.
    """

    rows: int

    def __post_init__(self) -> None:
        try:
            object.__setattr__(self, "rows", bounded(integer(self.rows, "rows")))
            if self.rows < 0:
                raise ValueError(f"expected rows >= 0, got {self.rows}")
        except (RuntimeError, ValueError, TypeError) as error:
            errors.reraise("Minimum", error)


def budgets_from_shares(
    shares: Tensor | Sequence,
    *,
    total: int | None = None,
    retention: float | None = None,
    lengths: int | Tensor | Sequence,
    floor: int = 0,
    cap: int | None = None,
) -> Tensor:
    """Integer budgets from fractional shares, such as the head budgets that LKV-H learns.

    Head i gets `clamp(t * share_i, floor, min(cap, length_i))` with the one t that spends the total: the other heads
    share what a full head cannot take. Fractions are settled by largest remainder, ties to the lower index.

    Args:
        shares: non-negative, any shape, on any device; only their ratios matter. Heads of share 0 get rows beyond the
            floor only after all others are full.
        total: rows of all heads together. Exactly one of `total` and `retention` is given.
        retention: fraction of all tokens in [0, 1]: the total is `round(retention * sum(lengths))`.
        lengths: tokens of each head: an int or integers that broadcast to the shape of `shares`.
        floor: fewest rows of a head; a head shorter than that keeps what it has.
        cap: most rows of a head; default: no cap.

    Returns:
        int64 of the shape of `shares`, on the host. They sum to the total, or to all rows that `cap` and `lengths`
        allow if that is less.

    Raises:
        ValueError: for negative or non-finite shares, both or neither of total and retention, a total below the floors.
        TypeError: for an argument of another kind.
    """
    try:
        return _from_shares(shares, total, retention, lengths, floor, cap)
    except (RuntimeError, ValueError, TypeError, OverflowError) as error:
        errors.reraise("budgets_from_shares", error, given=locals())


def _from_shares(
    shares: Tensor | Sequence,
    total: int | None,
    retention: float | None,
    lengths: int | Tensor | Sequence,
    floor: int,
    cap: int | None,
) -> Tensor:
    if not is_of("numbers", shares):
        raise TypeError(f"expected shares as numbers or a tensor of a real dtype, got {described(shares)}")
    try:
        weights = shares if isinstance(shares, Tensor) else torch.as_tensor(shares, dtype=torch.float64, device="cpu")
    except (ValueError, TypeError, RuntimeError):
        raise ValueError(f"expected shares as numbers in rows of one length, got {described(shares)}") from None
    weights = weights.detach().to("cpu", torch.float64)
    if not bool(weights.isfinite().all()) or bool((weights < 0).any()):
        raise ValueError("expected finite shares >= 0, got others")
    if (total is None) == (retention is None):
        raise ValueError("expected one of total and retention, got both or neither")
    floor = bounded(integer(floor, "floor"))
    cap = None if cap is None else bounded(integer(cap, "cap"))
    if floor < 0 or (cap is not None and cap < floor):
        raise ValueError(f"expected 0 <= floor <= cap, got {floor} and {cap}")
    tokens = _values(lengths, "lengths").cpu().clamp(min=0, max=MOST)
    try:
        tokens = tokens.broadcast_to(weights.shape)
    except RuntimeError:
        shapes = list(weights.shape), list(tokens.shape)
        raise ValueError(f"expected lengths that broadcast to shares of shape {shapes[0]}, got {shapes[1]}") from None
    if retention is not None:
        if not is_of("number", retention) or not 0 <= retention <= 1:
            raise ValueError(f"expected retention in [0, 1], got {described(retention)}")
        total = round(float(retention) * int(tokens.sum()))
    total = bounded(integer(total, "total"))
    upper = tokens if cap is None else tokens.clamp(max=cap)
    lower = upper.clamp(max=floor)
    if total < int(lower.sum()):
        raise ValueError(f"expected a total of at least the floors, {int(lower.sum())}, got {total} (floor {floor})")
    whole = torch.tensor([total], device="cpu")
    flat = apportion(weights.view(1, -1), whole, lower.reshape(1, -1), upper.reshape(1, -1))
    return flat.view(weights.shape)


def _values(values: Ints, name: str, device: torch.device | str = "cpu") -> Tensor:
    """int64, of the shape they have."""
    if isinstance(values, Tensor):
        host, tensor = split(values, name, [tuple(values.shape)])
        values = torch.tensor(host, device="cpu").view(values.shape) if tensor is None else tensor
        return values.to(device, torch.int64)
    shape = () if isinstance(values, int) else flatten(values, name)[1]
    return torch.tensor(host_ints(values, name, [shape]), dtype=torch.int64, device=device).view(shape)


def apportion(weights: Tensor, total: Tensor, lower: Tensor, upper: Tensor) -> Tensor:
    """Integers `[R, n]` near `clamp(t * weights, lower, upper)`, in each row summing to the total as far as they can.

    Args:
        weights: float64 `[R, n]`, non-negative.
        total: int64 `[R]`.
        lower: int64 `[R, n]`.
        upper: int64 `[R, n]`, at least `lower`.
    """
    if weights.shape[1] == 0:
        return lower.clone()
    total = torch.minimum(torch.maximum(total, lower.sum(1)), upper.sum(1))
    # Heads of weight zero stay at their floors until all others are full, and then share alike.
    served = weights > 0
    spare = (total > torch.where(served, upper, lower).sum(1))[:, None]
    lower, upper = torch.where(served & spare, upper, lower), torch.where(served | spare, upper, lower)
    # Relative to the largest, and no smaller than lets t be finite for every head.
    weights = torch.where(served, (weights / weights.amax(1, keepdim=True)).clamp(min=1e-290), 1.0)
    # The sum is piecewise linear in t; its corners are where a head leaves its floor or fills up.
    corners = torch.cat([lower / weights, upper / weights], 1).sort(1).values
    filled = torch.minimum(torch.maximum(corners[:, :, None] * weights[:, None], lower[:, None]), upper[:, None])
    sums = filled.sum(2)
    after = torch.searchsorted(sums, total[:, None].double()).clamp(1, corners.shape[1] - 1)
    (t0, t1), (s0, s1) = ((x.gather(1, after - 1), x.gather(1, after)) for x in (corners, sums))
    t = torch.where(s1 > s0, t0 + (t1 - t0) * ((total[:, None] - s0) / (s1 - s0)), t0)
    exact = torch.minimum(torch.maximum(t * weights, lower), upper)

    whole = exact.floor()
    # Rounded, so that equal remainders compare as equal. Full heads have none, and never one of the largest.
    remainder = ((exact - whole) * 2**30).round()
    rank = remainder.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    whole = whole.long()
    return whole + (rank < (total - whole.sum(1))[:, None]).long()


def budgets_from_scores(
    scores: Tensor | Sequence[Tensor],
    total: int | Tensor | Sequence[int],
    *,
    across: str = "heads",
    floor: Blend | Minimum | None = None,
    lengths: Ints | None = None,
    starts: Ints | None = None,
    sink: int = 0,
    window: int = 0,
) -> Tensor:
    """Budgets by competition: the best rows of all heads share one total per sequence, and each head gets what it won.

    Protected rows (the first `sink` and last `window` valid tokens of each head) are kept whatever their scores, and
    count in the total. The others compete by score, ties to the lower layer, then head, then position; NaN last. With
    `across="heads"` this is the allocation of Ada-KV (arXiv 2407.11550), with "layers" that of KVzip and LAVa.

    Args:
        scores: `[B, H, L]`, or one such tensor per layer (L may differ).
        total: rows of one sequence over all competing heads: an int or `[B]`. With several layers and `across="heads"`
            every layer has this total to itself.
        across: "heads" of a layer compete, or those of all "layers".
        floor: None, `Blend(alpha)` or `Minimum(rows)`.
        lengths: `[B]` or `[B, H]`, as in `evict`, the same for all layers; or `[N, B, H]`.
        starts: as `lengths`.
        sink: as in `evict`.
        window: as in `evict`.

    Returns:
        int64 `[B, H]`, for a list of layers `[N, B, H]`, on the device of the scores, no synchronisation. A sequence's
        budgets sum to its total, or to all its valid rows if these are fewer. Where the total does not cover the
        protected rows (with `Minimum`, the guaranteed ones), it is shared out evenly among them.

    Raises:
        ValueError, TypeError: for a wrong shape or dtype, `across` or `floor`.
    """
    try:
        return _from_scores(scores, total, across, floor, lengths, starts, sink, window)
    except (RuntimeError, ValueError, TypeError, AttributeError) as error:
        errors.reraise("budgets_from_scores", error, given=locals())


def _from_scores(
    scores: Tensor | Sequence[Tensor],
    total: int | Tensor | Sequence[int],
    across: str,
    floor: Blend | Minimum | None,
    lengths: Ints | None,
    starts: Ints | None,
    sink: int,
    window: int,
) -> Tensor:
    if not isinstance(across, str) or across not in ("heads", "layers"):
        raise ValueError(f"expected across 'heads' or 'layers', got {described(across)}")
    if floor is not None and not isinstance(floor, (Blend, Minimum)):
        raise TypeError(f"expected floor None, Blend or Minimum, got {described(floor)}")
    sink, window = bounded(integer(sink, "sink")), bounded(integer(window, "window"))
    if sink < 0 or window < 0:
        raise ValueError(f"expected sink and window >= 0, got {sink} and {window}")
    layers = [scores] if isinstance(scores, Tensor) else list(scores)
    for s in layers:
        if not is_of("tensor", s) or s.dtype not in SCORES:
            raise TypeError(f"expected scores of dtype float32, float16 or bfloat16, got {described(s)}")
        if s.device != layers[0].device:
            raise ValueError(f"expected scores on {layers[0].device}, got {s.device}")
        if s.dim() != 3 or s.shape[:2] != layers[0].shape[:2]:
            expected = "[B, H, L]" if s.dim() != 3 else f"[{layers[0].shape[0]}, {layers[0].shape[1]}, L]"
            raise ValueError(f"expected scores of shape {expected}, got {list(s.shape)}")
    if not layers:
        raise ValueError("expected at least one layer of scores, got none")
    if across == "heads":
        parts = [
            _compete([s], total, floor, _of_layer(lengths, n), _of_layer(starts, n), sink, window)[0]
            for n, s in enumerate(layers)
        ]
    else:
        parts = list(_compete(layers, total, floor, lengths, starts, sink, window))
    return parts[0] if isinstance(scores, Tensor) else torch.stack(parts)


def _compete(
    layers: list[Tensor],
    total: int | Tensor | Sequence[int],
    floor: Blend | Minimum | None,
    lengths: Ints | None,
    starts: Ints | None,
    sink: int,
    window: int,
) -> Tensor:
    """`[N, B, H]`: the budgets of layers that share one total per sequence."""
    batch, heads = layers[0].shape[:2]
    device = layers[0].device
    total = _values(total, "total", device)
    if total.dim() > 1 or total.numel() not in (1, batch):
        raise ValueError(f"expected total as an int or of shape [B] = [{batch}], got {list(total.shape)}")
    total = total.broadcast_to(batch)
    masks, at_ends, valid = [], [], []
    for n, s in enumerate(layers):
        begin = _per_head(_of_layer(starts, n), 0, s, "starts").clamp(0, s.shape[2])
        length = torch.minimum(
            _per_head(_of_layer(lengths, n), s.shape[2], s, "lengths").clamp(min=0), s.shape[2] - begin
        )
        first = length.clamp(max=sink)
        last = (length - first).clamp(max=window)
        position = torch.arange(s.shape[2], device=device)
        masks.append((position >= (begin + first)[..., None]) & (position < (begin + length - last)[..., None]))
        at_ends.append(first + last)
        valid.append(length)
    protected, available = (torch.stack(x, 1).flatten(1) for x in (at_ends, valid))  # [B, N * H]
    owner = torch.cat([torch.arange(heads, device=device).repeat_interleave(s.shape[2]) + n * heads
                       for n, s in enumerate(layers)])  # fmt: skip
    flat = torch.cat([s.detach().flatten(1) for s in layers], 1)
    free = torch.cat([m.flatten(1) for m in masks], 1)

    def count(chosen: Tensor) -> Tensor:
        return torch.zeros_like(protected).scatter_add_(1, owner.expand(batch, -1), chosen.long())

    sure = protected
    if isinstance(floor, Minimum):
        sure = torch.minimum(available, protected.clamp(min=floor.rows))
        forced = [
            _best(s.flatten(0, 1), m.flatten(0, 1), extra.flatten()).view(batch, -1)
            for s, m, extra in zip(layers, masks, (sure - protected).view(batch, -1, heads).unbind(1), strict=True)
        ]
        free = free & ~torch.cat(forced, 1)
    won = count(_best(flat, free, total - sure.sum(1)))
    if isinstance(floor, Blend):
        rest = won.sum(1)
        mean = rest[:, None].double() / max(won.shape[1], 1)
        wish = (1 - floor.alpha) * won.double() + floor.alpha * mean
        won = apportion(wish, rest, torch.zeros_like(won), available - protected)
    even = apportion(torch.ones_like(sure, dtype=torch.float64), total, torch.zeros_like(sure), sure)
    budgets = torch.where((total >= sure.sum(1))[:, None], sure + won, even)
    return budgets.view(batch, len(layers), heads).transpose(0, 1)


def _of_layer(values: Ints | None, layer: int) -> Ints | None:
    return values[layer] if isinstance(values, Tensor) and values.dim() == 3 else values


def _per_head(values: Ints | None, default: int, scores: Tensor, name: str) -> Tensor:
    if values is None:
        return torch.full(scores.shape[:2], default, device=scores.device)
    values = _values(values, name, scores.device)
    batch, heads = scores.shape[:2]
    if tuple(values.shape) not in ((), (1,), (batch,), (batch, heads)):
        raise wrong_shape(name, [(batch,), (batch, heads)], values.shape)
    return (values[:, None] if values.dim() == 1 else values).broadcast_to(scores.shape[:2])


def _best(scores: Tensor, mask: Tensor, keep: Tensor) -> Tensor:
    """Which of the entries in `mask` are the best `keep` of their row, as a mask `[R, M]`; ties to the lower index.

    All of them where there are no more than that, none where `keep` is negative.
    """
    rows, width = scores.shape
    lost = scores.isnan()
    # Entries outside the mask rank with NaN, below all others; so NaNs inside it are counted by hand, in order.
    ranked = torch.where(mask, scores, torch.nan)[:, None]
    positions = select(ranked, keep[:, None], layout="padded", capacity=width).positions[:, 0].long()
    taken = torch.zeros(rows, width + 1, dtype=torch.bool, device=scores.device)
    padded = torch.where(positions < 0, width, positions)
    chosen = taken.scatter_(1, padded, True)[:, :width] & mask & ~lost
    missing = keep - chosen.sum(1)
    return chosen | (mask & lost & ((mask & lost).cumsum(1) <= missing[:, None]))
