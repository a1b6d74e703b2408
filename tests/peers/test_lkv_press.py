"""lkv.press: our policies as presses keep what lkv.Cache keeps, and what a press masks is evicted, row for row."""

from __future__ import annotations

import re
import sys
from functools import cache
from pathlib import Path

import pytest
import torch

kvpress = pytest.importorskip("kvpress", reason="kvpress is not installed: make test-kvpress")
sys.path.append(str(Path(__file__).parents[1] / "learning"))
import transformers  # noqa: E402
from tiny_folder import save  # noqa: E402
from tiny_models import MODELS, build  # noqa: E402
from transformers import DynamicCache, PreTrainedModel  # noqa: E402

import lkv  # noqa: E402
from lkv import policies  # noqa: E402
from lkv.policies import AdaKV, KNorm, SnapKV, SqueezeAttention  # noqa: E402
from lkv.press import TASK, CompactPress, LKVPress  # noqa: E402

LENGTH, RATIO = 240, 0.75
NAMES = [name for name in policies.POLICIES if "second_pass" not in policies.get(name).needs]
Kept = list[list[list[list[int]]]]  # of each layer, sequence and head


@cache
def tiny(name: str = "norm of keys") -> PreTrainedModel:
    return build(name, 97)


def texts(batch: int, length: int = LENGTH) -> torch.Tensor:
    return torch.randint(3, 97, (batch, length), generator=torch.Generator().manual_seed(batch))


def places_of(mask: torch.Tensor | None) -> torch.Tensor | None:
    return None if mask is None else (mask.cumsum(1) - 1).clamp(min=0)


@torch.no_grad()
def pressed(model: PreTrainedModel, ids: torch.Tensor, press: object, mask: torch.Tensor | None = None) -> DynamicCache:
    found = DynamicCache()
    with press(model):
        model.model(input_ids=ids, attention_mask=mask, position_ids=places_of(mask), past_key_values=found)
    return found


def of_dense(model: PreTrainedModel, ids: torch.Tensor, found: DynamicCache, mask: torch.Tensor | None = None) -> Kept:
    """By the keys that are left, or that are not marked."""
    marks = [layer.self_attn.masked_key_indices for layer in model.model.layers]  # the next prompt clears them
    whole, kept = DynamicCache(), []
    with torch.no_grad():
        model.model(input_ids=ids, attention_mask=mask, position_ids=places_of(mask), past_key_values=whole)
    for layer, marked, before, after in zip(model.model.layers, marks, whole.layers, found.layers, strict=True):
        layer.self_attn.masked_key_indices = marked
        stays = torch.ones(before.keys.shape[:3], dtype=torch.bool)
        if marked is not None:
            stays[marked] = False
        else:
            stays = (before.keys[:, :, :, None] == after.keys[:, :, None]).all(-1).any(-1)
        if mask is not None:
            stays &= mask.bool()[:, None]
        kept.append([[head.nonzero()[:, 0].tolist() for head in heads] for heads in stays])
    return kept


def of_ragged(found: lkv.Cache) -> Kept:
    kept = []
    for layer in found.ragged:
        rows, counts = layer.rows.padded(layer.rows.positions).tolist(), layer.rows.lengths.tolist()
        kept.append([[r[:n] for r, n in zip(*each, strict=True)] for each in zip(rows, counts, strict=True)])
    return kept


def forget(model: PreTrainedModel) -> None:
    for layer in model.model.layers:
        layer.self_attn.masked_key_indices = None


@pytest.mark.parametrize("padding", [0, 9], ids=["alone", "padded"])
@pytest.mark.parametrize("name", NAMES)
def test_a_policy_as_a_press_keeps_what_the_cache_keeps(name: str, padding: int) -> None:
    model, ids, mask = tiny(), texts(2), None
    if padding:
        mask = torch.ones_like(ids)
        mask[1, :padding] = 0
    lengths = [LENGTH, LENGTH - padding]
    # Binary fractions, of which kvpress and lkv.Cache keep the same number; of 231 rows they do not.
    budget = None if padding == 0 else [int(n * (1 - RATIO)) for n in lengths]
    found = pressed(model, ids, LKVPress(name, RATIO), mask)
    theirs = of_dense(model, ids, found, mask)
    ours: Kept = [[] for _ in theirs]
    for b in range(2):
        alone = lkv.Cache(model, name, **({"retention": 1 - RATIO} if budget is None else {"budget": budget[b]}))
        one = None if mask is None else mask[b : b + 1]
        with torch.no_grad():
            model.model(
                input_ids=ids[b : b + 1], attention_mask=one, position_ids=places_of(one), past_key_values=alone
            )
        for layer, rows in zip(ours, of_ragged(alone), strict=True):
            layer.append(rows[0])
    assert theirs == ours


@pytest.mark.parametrize("name", ["snapkv", "adakv", "lava", "kvzip"])
def test_rows_leave_or_are_hidden(name: str) -> None:
    if name == "kvzip":
        with pytest.raises(ValueError, match="expected a policy that scores while a text is read"):
            LKVPress(name, RATIO)
        return
    model = tiny()
    found = pressed(model, texts(1), LKVPress(name, RATIO))
    equal = name == "snapkv"
    assert found.get_seq_length() == (LENGTH // 4 if equal else LENGTH)
    marks = [layer.self_attn.masked_key_indices for layer in model.model.layers]
    assert all((mark is None) == equal for mark in marks)
    if not equal:
        heads = model.config.num_key_value_heads
        assert sum(len(mark[0]) for mark in marks) == len(marks) * heads * LENGTH * 3 // 4
    forget(model)


MASKING = {
    "adakv": lambda: kvpress.AdaKVPress(kvpress.SnapKVPress(RATIO, window_size=8)),
    "critical": lambda: kvpress.CriticalAdaKVPress(kvpress.KnormPress(RATIO)),
    "ours": lambda: LKVPress(AdaKV(SnapKV(8)), RATIO),
    "ours of all layers": lambda: LKVPress(SqueezeAttention(SnapKV(8)), RATIO),
}


@torch.no_grad()
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", MASKING)
def test_what_is_masked_is_evicted(name: str, model: str, batch: int) -> None:
    """The same rows, a cache of their size, and the logits that kvpress's mask gives."""
    if name == "critical" and batch > 1:
        pytest.skip("kvpress adds the budgets of all sequences up")
    if name == "ours" and model == "four heads on one":
        pytest.skip("one head has nobody to share with: rows leave without a mask")
    model, ids = tiny(model), texts(batch)
    masked = pressed(model, ids, MASKING[name]())
    expected = of_dense(model, ids, masked)
    places = torch.arange(LENGTH, LENGTH + 5)[None].expand(batch, -1)
    more = texts(batch, 5)
    # One by one: for the queries of several tokens kvpress does not always find a key that none of them looks at.
    each = zip(more.split(1, 1), places.split(1, 1), strict=True)
    steps = [model(input_ids=x, past_key_values=masked, position_ids=at).logits for x, at in each]
    theirs = torch.cat(steps, 1)
    forget(model)

    found = pressed(model, ids, CompactPress(MASKING[name]()))
    assert isinstance(found, lkv.Cache) and of_ragged(found) == expected
    heads = model.config.num_key_value_heads
    kept = sum(len(head) for layer in expected for sequence in layer for head in sequence)
    assert sum(sum(layer.row_counts) for layer in found.ragged) == kept == batch * 3 * heads * LENGTH // 4
    assert all(layer.self_attn.masked_key_indices is None for layer in model.model.layers)
    assert found.get_seq_length() == LENGTH
    ours = model(input_ids=more, past_key_values=found, position_ids=places).logits
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert of_ragged(found)[0][0][0] == [*expected[0][0][0], *range(LENGTH, LENGTH + 5)]
    found.crop(LENGTH)  # and on with another question
    again = model(input_ids=more, past_key_values=found, position_ids=places).logits
    torch.testing.assert_close(again, ours)


def test_the_page_runs(tmp_path: Path) -> None:
    """docs/policies.md: three answers to one question, each from the context alone."""
    page = (Path(__file__).parents[2] / "docs" / "policies.md").read_text().split("## In kvpress\n")[1]
    code = re.findall(r"```python\n(.*?)```", page, re.DOTALL)[0]
    model = transformers.AutoModelForCausalLM.from_pretrained(save(tmp_path))
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    names = {"transformers": transformers, "kvpress": kvpress, "model": model, "tokenizer": tokenizer}
    exec(code, names | {"context": "It was a bright cold day in April. " * 10, "question": "When?"})


def test_answers_do_not_depend_on_earlier_questions(tmp_path: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(save(tmp_path))
    pipe = transformers.pipeline(TASK, model=model, tokenizer=transformers.AutoTokenizer.from_pretrained(tmp_path))
    context, questions = "It was a bright cold day in April. " * 10, ["When?", "Who?", "When?"]
    press = CompactPress(LKVPress(AdaKV(SnapKV(8)), RATIO))
    first, second, third = pipe(context, questions=questions, press=press, max_new_tokens=6)["answers"]
    assert first == third
    assert second == pipe(context, question="Who?", press=press, max_new_tokens=6)["answer"]


def test_a_press_that_prunes_is_left_as_it_is() -> None:
    model, ids = tiny(), texts(2)
    plain = pressed(model, ids, kvpress.KnormPress(RATIO))
    found = pressed(model, ids, CompactPress(kvpress.KnormPress(RATIO)))
    assert type(found) is DynamicCache
    assert all(torch.equal(x.keys, y.keys) for x, y in zip(found.layers, plain.layers, strict=True))


def test_the_ratio_is_that_of_the_press() -> None:
    press = CompactPress(kvpress.KnormPress(0.25))
    press.compression_ratio = 0.5
    assert press.press.compression_ratio == press.compression_ratio == 0.5


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match=r"expected compression_ratio in \[0, 1\), got 1"):
        LKVPress("knorm", 1)
    with pytest.raises(ValueError, match="expected reserve >= 1, got 0"):
        CompactPress(kvpress.KnormPress(0.5), reserve=0)
    decoding = kvpress.DecodingPress(kvpress.KnormPress(), compression_interval=4, target_size=8)
    with pytest.raises(ValueError, match="expected a press that works while a prompt is read, got DecodingPress"):
        CompactPress(decoding)
    model, ids = tiny(), texts(1)
    press = LKVPress("adakv", RATIO)
    with pytest.raises(ValueError, match="expected a model whose layer 0 it knows"):
        press.compress(model.model.layers[0].self_attn, None, None, None, None, {})
    with pytest.raises(ValueError, match="expected padding in front"):
        mask = torch.ones_like(ids)
        mask[:, 5] = 0
        pressed(model, ids, press, mask)
    with pytest.raises(ValueError, match="expected keys of all 240 tokens, got 120"):
        pressed(model, ids, kvpress.ComposedPress([kvpress.KnormPress(0.5), press]))
    with pytest.raises(ValueError, match="measures the residual stream, got a hook alone"):
        pressed(model, ids, kvpress.ComposedPress([LKVPress(SqueezeAttention(), 0.5)]))
    with (
        pytest.raises(ValueError, match="expected one prompt in the context of a press that masks, got 2"),
        torch.no_grad(),
        CompactPress(LKVPress(AdaKV(KNorm()), 0.5))(model),
    ):
        for _ in range(2):
            model.model(input_ids=ids, past_key_values=DynamicCache())
    forget(model)
    with pytest.raises(ValueError, match="expected another attention than 'eager'"):
        pressed(build("no groups", 97, attn_implementation="eager"), ids, press)


def test_heads_that_happen_to_keep_as_many_are_masked_as_well() -> None:
    """Budgets that compete may agree in one layer: rows that left it there would make layers of several lengths."""
    model = tiny()
    for seed in range(12):
        ids = torch.randint(3, 97, (1, 40), generator=torch.Generator().manual_seed(seed))
        lengths = {layer.keys.shape[2] for layer in pressed(model, ids, LKVPress(AdaKV(SnapKV(4)), 0.2)).layers}
        assert lengths == {40}, seed
        forget(model)
        assert isinstance(pressed(model, ids, CompactPress(LKVPress(AdaKV(SnapKV(4)), 0.2))), lkv.Cache)
