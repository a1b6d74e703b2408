"""What holds of a `lkv.Cache` behind every call and every method, whatever came before."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import wraps

import pytest
import torch
from invariants import check_cache
from torch import Tensor

import lkv
import lkv_ext
from lkv.hf import routing, state
from lkv.hf.calls import Calls
from lkv.hf.history import History
from lkv.hf.layer import RaggedLayer
from lkv.hf.queries import LastQueries
from lkv.hf.token_log import TokenLog
from lkv.hf.versions import HFCache

READ_ONLY = ("get_", "is_", "update")  # methods that change nothing, and those of a call, which is checked at its end


def check(cache: Calls) -> None:
    """All layers of a cache, between two calls."""
    if cache.call is not None or cache.broken is not None:
        return
    lengths = {layer.get_seq_length() for layer in cache.ragged}
    batches = {len(layer.token_counts) for layer in cache.ragged}
    assert len(lengths) == 1 == len(batches), f"layers of lengths {lengths} and batches {batches}"
    (length,), (batch,) = lengths, batches
    history = cache.history
    hidden = torch.zeros(batch, length, dtype=torch.bool, device="cpu")
    if history.hidden is not None:
        assert history.hidden.dtype == torch.bool and history.hidden.any()
        hidden = history.hidden
    assert hidden.shape == (batch, length)
    if history.places is not None:  # every token has a place of its own
        assert torch.equal(history.places.sort(1).values, torch.arange(length, device="cpu").expand(batch, -1))
        hidden = torch.zeros_like(hidden).scatter_(1, history.places, hidden)
    for layer in cache.ragged:
        _check_layer(layer, ~hidden)
        _check_observations(layer, ~hidden, history)
    used = [layer.observations.rotary for layer in cache.ragged]
    assert all(any(rotary is each for each in used) for rotary in history.rotations.all), "rotations of no layer"


def _check_layer(layer: RaggedLayer, present: Tensor) -> None:
    """`real`: bool `[B, L]`, the places of tokens that are no padding."""
    batch, length = present.shape
    assert layer.token_counts == present.sum(1).tolist(), (
        f"token_counts {layer.token_counts}, of the masks {present.sum(1).tolist()}"
    )
    assert 0 <= layer.evicted <= length and layer.is_initialized >= (length > 0)
    if layer.rows is not None:
        assert layer.keys is None and layer.values is None
        assert (layer.rows.batch, layer.rows.seen) == (batch, length)
        assert layer.row_counts == layer.rows.lengths.sum(1).tolist(), (
            f"row_counts {layer.row_counts}, there {layer.rows.lengths}"
        )
        check_cache(layer.rows)
        _check_positions(layer, present)
    elif layer.keys is not None:
        assert layer.keys.shape[:3] == layer.values.shape[:3] == (batch, layer.heads, length)
        assert layer.row_counts == [layer.heads * n for n in layer.token_counts]
        assert (layer.evicted, layer.evictions, layer.due) == (0, 0, True)
        padding = length - present.sum(1, keepdim=True)
        assert torch.equal(present, torch.arange(length, device="cpu") >= padding), (
            "whole rows with padding between tokens"
        )
    else:
        assert layer.row_counts == [] and length == layer.evicted == layer.evictions == 0 and not layer.due


def _check_positions(layer: RaggedLayer, present: Tensor) -> None:
    """Rows are of tokens that are there; of those that came since the last eviction, all are."""
    length = present.shape[1]
    for tokens, heads in zip(present, _heads(layer.rows), strict=True):
        for positions in heads:
            assert positions.numel() == 0 or 0 <= int(positions[0]) <= int(positions[-1]) < length
            assert tokens[positions].all(), "rows of tokens that are hidden"
            first = layer.evicted if layer.evictions else 0
            assert (positions >= first).sum() == tokens[first:].sum(), "tokens without rows that nobody evicted"
            assert layer.evictions or len(positions) == tokens.sum()


def _heads(rows: lkv_ext.RaggedCache) -> list[list[Tensor]]:
    """Per sequence and head, the positions of its rows."""
    begins, lengths = rows.cu_seqlens[:-1].view(rows.lengths.shape).tolist(), rows.lengths.tolist()
    return [
        [rows.positions[a : a + n].long() for a, n in zip(*one, strict=True)]
        for one in zip(begins, lengths, strict=True)
    ]


def _check_observations(layer: RaggedLayer, present: Tensor, history: History) -> None:
    """What is kept beside the rows is of all tokens, and of the last ones."""
    observations, (batch, length) = layer.observations, present.shape
    assert observations.captured is None, "what a call was on its way with"
    if observations.queries is not None:
        _check_queries(observations.queries, present)
    if observations.hidden_states is not None:
        _check_log(observations.hidden_states, batch, length)
    if observations.cosines is not None:
        _check_log(observations.cosines, batch, length)
        if length:
            known = copy.deepcopy(observations.cosines).read()[..., 0]
            assert torch.equal(known.isnan(), ~present)
    if observations.rotary is not None:
        assert any(observations.rotary is each for each in history.rotations.all)
        _check_log(observations.rotary.cos, batch, length)
        _check_log(observations.rotary.sin, batch, length)
    elif observations.rotates:
        assert length == 0


def _check_log(log: TokenLog, batch: int, length: int) -> None:
    """A batch of 1 may stand for any."""
    assert log.length == length
    log = copy.deepcopy(log)  # reading puts a log together
    assert length == 0 or log.read().shape[:2] in ((batch, length), (1, length))


def _check_queries(queries: LastQueries, present: Tensor) -> None:
    """Places are those of the last tokens, of fewer than the window where some were cropped or hidden."""
    assert queries.seen == present.shape[1]
    if queries.seen == 0:
        return
    _, places, there = copy.copy(queries).read()
    assert places.shape == there.shape == (len(present), queries.window)
    for one, valid, tokens in zip(places, there, present, strict=True):
        counts = one[valid]
        assert torch.equal(counts, tokens.nonzero().flatten()[int(tokens.sum()) - len(counts) :])


def checked(method: Callable[..., object]) -> Callable[..., object]:
    """The method, and a look at the cache behind it, also where it fails; at the cache that it returns, too."""

    @wraps(method)
    def with_check(self: Calls, *args: object, **kwargs: object) -> object:
        try:
            result = method(self, *args, **kwargs)
        finally:
            check(self)
        if isinstance(result, lkv.Cache):
            check(result)
        return result

    return with_check


def check_always(patch: pytest.MonkeyPatch) -> None:
    """From now on, behind whatever a cache does: forwards, public methods, and what comes out of files and pickles."""
    kinds = [kind for kind in reversed(lkv.Cache.__mro__) if issubclass(kind, HFCache)]
    own = {name: member for kind in kinds for name, member in vars(kind).items()}
    public = [name for name, member in own.items() if callable(member) and not name.startswith(("_", *READ_ONLY))]
    for name in (*public, "__copy__", "__deepcopy__", "__reduce__"):
        if not isinstance(own[name], (classmethod, staticmethod)):
            patch.setattr(lkv.Cache, name, checked(getattr(lkv.Cache, name)))
    restore = state.restore

    def restored(cache: lkv.Cache, *args: object) -> None:
        restore(cache, *args)
        check(cache)

    patch.setattr(state, "restore", restored)


def check_routes() -> None:
    """No model is left with our attention."""
    assert not routing._routed
