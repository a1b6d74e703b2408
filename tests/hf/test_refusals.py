"""Whatever is refused or fails: all that a cache holds is as it was, and the next call goes on as if nothing was."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from families import build, tokens
from safetensors import SafetensorError
from snapshots import differences, snapshot
from test_bookkeeping import Past, gapped, hidden, packed, prefilled, whole

from lkv.policies import SnapKV


@dataclass(frozen=True)
class Broken(SnapKV):
    """Fails in the last layer, or answers what does not fit there."""

    window: int = 4
    what: str = "raises"

    def score(self, layer, observation):
        scores = super().score(layer, observation)
        if layer == 0:
            return scores
        if self.what == "raises":
            raise RuntimeError("no scores today")
        return {"short": scores[..., 1:], "none": None, "one head": scores[:, :1]}.get(self.what, scores)

    def budgets(self, scores, lengths, total, *, starts=None):
        budgets = super().budgets(scores, lengths, total, starts=starts)
        return {"no heads": budgets[:, :0], "fractions": budgets / 2}.get(self.what, budgets)


def run(past: Past, mask: object, count: int = 5, batch: int = 3, **options: object) -> None:
    with torch.no_grad():
        past.model(tokens(batch, count, 8), attention_mask=mask, past_key_values=past.cache, use_cache=True, **options)


def ones(past: Past, count: int = 5) -> torch.Tensor:
    return torch.cat([past.mask, torch.ones(3, count, dtype=torch.long)], 1)


def square(past: Past, *shape: int) -> torch.Tensor:
    return torch.ones(shape or (3, 1, 5, past.mask.shape[1] + 5), dtype=torch.bool)


def with_gradient(past: Past) -> None:
    past.model(tokens(3, 5), attention_mask=ones(past), past_key_values=past.cache, use_cache=True)


def behind_the_hooks(past: Past) -> None:
    with torch.no_grad():
        past.model.get_decoder().forward(tokens(3, 5), attention_mask=ones(past), past_key_values=past.cache)


def keys_by_hand(past: Past) -> None:
    past.cache.update(torch.zeros(3, 2, 1, 8), torch.zeros(3, 2, 1, 8), past.cache.ragged[0].index)


def scores(past: Past, *shape: int) -> list[torch.Tensor]:
    return [torch.zeros(shape) for _ in past.cache.ragged]


MASKS: dict[str, Callable[[Past], object]] = {
    "shows again": lambda past: run(past, torch.ones_like(ones(past))),
    "no mask": lambda past: run(past, None),
    "narrow": lambda past: run(past, ones(past)[:, 1:]),
    "of the new tokens alone": lambda past: run(past, ones(past)[:, -5:]),
    "of two sequences": lambda past: run(past, ones(past)[:2]),
    "of three dimensions": lambda past: run(past, ones(past)[None]),
    "square and narrow": lambda past: run(past, square(past, 3, 1, 5, past.mask.shape[1] + 4)),
    "square of two": lambda past: run(past, square(past, 2, 1, 5, past.mask.shape[1] + 5)),
}
CALLS: dict[str, Callable[[Past], object]] = {
    "gradient": with_gradient,
    "behind the hooks": behind_the_hooks,
    "by hand": keys_by_hand,
    "another batch": lambda past: run(past, torch.cat([ones(past), ones(past)]), batch=6),
}
METHODS: dict[str, Callable[[Past], object]] = {
    "crop": lambda past: past.cache.crop(-past.cache.get_seq_length() + 1),
    "two numbers": lambda past: past.cache.evict(budget=3, retention=0.5),
    "all and more": lambda past: past.cache.evict(retention=1.5),
    "no rows": lambda past: past.cache.evict(budget=0),
    "unknown policy": lambda past: past.cache.evict("h3o", budget=5),
    "not observed": lambda past: past.cache.evict(SnapKV(window=50), budget=5),
    "scores of a layer": lambda past: past.cache.evict(budget=5, scores=scores(past, 3, 2, 99)[1:]),
    "scores of another shape": lambda past: past.cache.evict(budget=5, scores=scores(past, 3, 2, 99)),
    "no such sequence": lambda past: past.cache.batch_select_indices(torch.tensor([0, 3])),
    "sequence below 0": lambda past: past.cache.batch_select_indices(torch.tensor([0, -1])),
    "no such beam": lambda past: past.cache.reorder_cache(torch.tensor([0, 1, 3])),
    "half a sequence": lambda past: past.cache.batch_select_indices(torch.tensor([0.5])),
    "attach": lambda past: past.cache.attach(build("qwen3")),
    "no folder": lambda past: past.cache.save("/no/such/folder/cache"),
}
for _what in ("raises", "short", "none", "one head", "no heads", "fractions"):
    METHODS[f"a policy: {_what}"] = lambda past, what=_what: past.cache.evict(Broken(what=what), budget=3)
PASTS = pytest.mark.parametrize("past", [whole, packed, prefilled, hidden], ids=lambda f: f.__name__)


@pytest.mark.parametrize("deed", MASKS | CALLS | METHODS)
@PASTS
def test_what_is_refused_changes_nothing(past, deed):
    made, twin = (past(build("nondefault")) for _ in range(2))
    before = snapshot(made.cache)
    assert differences(before, snapshot(twin.cache)) == []
    with pytest.raises((ValueError, TypeError, RuntimeError, SafetensorError)) as caught:
        (MASKS | CALLS | METHODS)[deed](made)
    assert differences(snapshot(made.cache), before) == [], caught.value
    assert torch.equal(made.feed(3, 9), twin.feed(3, 9))


@pytest.mark.parametrize("deed", METHODS)
def test_what_an_empty_cache_refuses(deed):
    if deed in ("crop", "no such sequence", "sequence below 0", "no such beam", "half a sequence"):
        return  # nothing to drop or to choose among
    past = Past(build("nondefault"))
    before = snapshot(past.cache)
    with pytest.raises((ValueError, TypeError, SafetensorError)):
        METHODS[deed](past)
    assert differences(snapshot(past.cache), before) == []


@pytest.mark.parametrize("past", [packed, prefilled, hidden], ids=lambda f: f.__name__)
def test_a_mask_that_packed_rows_cannot_follow(past):
    made = past(build("llama"))
    before = snapshot(made.cache)
    block = torch.ones(5, made.mask.shape[1] + 5).bool().tril(made.mask.shape[1])[None, None]
    block = block & ones(made).bool()[:, None, None]
    block[:, :, 1, -2] = True  # like two tokens of one picture
    with pytest.raises(ValueError, match="lkv.Cache: expected a causal mask"):
        run(made, block)
    assert differences(snapshot(made.cache), before) == []


@pytest.mark.parametrize("family", ["llama", "nondefault, full"])
@pytest.mark.parametrize("past, least", [(whole, 7), (packed, 20), (prefilled, 20), (hidden, 30), (gapped, 25)])
def test_crop_goes_back_as_far_as_rows_are_there(family, past, least):
    """To the padding of the shortest sequence, the last eviction, or the last padding: one token less is refused."""
    made = past(build(family))
    made.cache.settings = Past(made.model, chunks="last").cache.settings
    for i in range(3):
        made.feed(1, i) if past not in (whole, gapped) else None
    before = snapshot(made.cache)
    for argument in (least - 1, least - made.cache.get_seq_length() - 1):
        with pytest.raises(ValueError, match=f"lkv.Cache.crop: expected a length of at least {least}"):
            made.cache.crop(argument)
        assert differences(snapshot(made.cache), before) == []
    made.cache.crop(least)
    assert made.cache.get_seq_length() == least
    with pytest.raises(ValueError, match=f"lkv.Cache.crop: expected a length of at least {least}"):
        made.cache.crop(-1)


def test_settings_are_those_of_before():
    """Also after evict with other settings."""
    past = whole(build("llama"))
    settings = past.cache.settings
    past.cache.evict("streaming_llm", budget=5)
    assert past.cache.settings is settings
