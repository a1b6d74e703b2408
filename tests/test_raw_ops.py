"""torch.ops.lkv_ext as somebody calls it who does not come through lkv_ext: refused, or done in bounds."""

from __future__ import annotations

import pytest
import torch
from cases import check, expected
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import lkv_ext
from lkv_ext._torch.library import ops
from lkv_ext._torch.request import Arguments

B, H, L, D, T = 2, 3, 20, 4, 60
SIZES = Arguments._fields


def offsets(count: int = B * H, step: int = 10) -> Tensor:
    return torch.arange(count + 1, dtype=torch.int32) * step


def sizes() -> dict:
    return dict(budgets=[5], total=30)


def rows(*shape: int) -> Tensor:
    return torch.randn(shape or (B, H, L, D))


def good() -> dict[str, dict]:
    """For every op, the arguments of a call that is right, in the order of its schema."""
    scores, index = torch.randn(B, H, L), lkv_ext.select(torch.zeros(B, H, L), 5)
    out = lkv_ext.evict(rows(), rows(), scores, 5)
    ragged = dict(cu_seqlens=offsets(), batch=B, heads=H)
    mask, weights = ops.soft_topk(scores, None, 3.0, None, 0.5, None, False)
    calls = {
        "select": dict(scores=[scores], **sizes()),
        "select_ragged": dict(scores=[torch.randn(T)], **sizes(), **ragged),
        "evict": dict(payload=[rows(), rows()], scores=[scores], **sizes()),
        "evict_padded": dict(payload=[rows()], scores=[scores], **sizes(), padded=5),
        "evict_layers": dict(payload=[rows()] * 2, scores=[scores] * 2, budgets=[5], total=60),
        "evict_ragged": dict(payload=[rows(T, D)], scores=[torch.randn(T)], **sizes(), **ragged),
        "evict_plain": dict(k=rows(), v=rows(), scores=scores, **sizes()),
        "evict_out": dict(out=[out.k, out.v, *(out.positions, out.lengths, out.cu_seqlens)], payload=[rows(), rows()],
                          scores=[scores], **sizes()),
        "evict_": dict(payload=[rows(), rows()], scores=[scores], **sizes()),
        "evict__ragged": dict(payload=[rows(T, D)], scores=[torch.randn(T)], **sizes(), **ragged),
        "evict_paged_": dict(pools=[rows(B * 5, H, L // 5, D), rows(B * 5, H, L // 5, D)], scores=[scores],
                             tables=[torch.arange(B * 5, dtype=torch.int32).view(B, 5)], **sizes()),
        "gather": dict(tensors=[rows()], positions=index.positions, cu_seqlens=index.cu_seqlens),
        "gather_ragged": dict(tensors=[rows(T, D)], positions=index.positions, cu_seqlens=index.cu_seqlens, layers=1,
                              source_cu_seqlens=offsets(), batch=B, heads=H),
        "append_": dict(cache=[rows(T, D), rows(T, D)], positions=torch.zeros(T, dtype=torch.int32),
                        lengths=torch.full((B, H), 2, dtype=torch.int32), cu_seqlens=offsets(),
                        rows=[rows(B, H, 3, D), rows(B, H, 3, D)], position=2),
        "attend": dict(q=rows(B, 2 * H, 2, D), k=rows(T, D), v=rows(T, D), cu_seqlens=offsets(),
                       lengths=torch.full((B, H), 7, dtype=torch.int32), longest=7, causal=True, scale=0.5),
        "attend_paged": dict(q=rows(B, 2 * H, 2, D), k=rows(T // 4, 4, D), v=rows(T // 4, 4, D),
                             tables=torch.arange(12, dtype=torch.int32).view(B, H, 2),
                             lengths=torch.full((B, H), 7, dtype=torch.int32), longest=7, causal=True, scale=0.5),
        "soft_topk": dict(scores=scores, k=None, k_value=3.0, temperature=None, temperature_value=0.5, lengths=None,
                          log=False),
        "soft_topk_backward": dict(grad=mask.clone(), mask=mask, weights=weights, temperature=None,
                                   temperature_value=0.5, lengths=None, element=0, log=False, to_scores=True,
                                   to_temperature=True),
    }  # fmt: skip
    return calls


def op_of(call: str):
    return getattr(ops, call.replace("_ragged", "").replace("_padded", "").replace("_layers", ""))


MEMORY = rows(T, D)
REFUSED = (
    ("evict_padded", dict(total=100), "a padded output of 6 spans of 5 rows, got 100 rows"),
    ("evict_padded", dict(total=10_000_000), "a padded output of 6 spans of 5 rows"),
    ("evict_padded", dict(padded=2**62, total=0), "a padded output of 6 spans"),
    ("evict_out", dict(padded=5), "contiguous of shape"),
    ("evict", dict(total=2**31), "at most 2\\*\\*31 - 1 rows"),
    ("evict", dict(total=-1), "at most 2\\*\\*31 - 1 rows"),
    ("evict", dict(reserve=2**63 - 1), "reserve and align of at most 2\\*\\*31 - 1"),
    ("evict", dict(align=2**63 - 1), "reserve and align of at most 2\\*\\*31 - 1"),
    ("evict", dict(align=0), "align >= 1"),
    ("evict", dict(reserve=-1), "reserve >= 0"),
    ("evict", dict(sink=-1), "sink and window of at least 0"),
    ("evict", dict(budgets=[], budgets_tensor=torch.ones(H - 1, dtype=torch.int64)), "budgets of shape"),
    ("evict", dict(budgets=[], budgets_tensor=torch.ones(B - 1, H + 1, dtype=torch.int64)), "budgets of shape"),
    ("evict", dict(lengths_tensor=torch.ones(B, H - 1, dtype=torch.int32)), "lengths of shape"),
    ("evict", dict(starts_tensor=torch.ones(1, B, H, 1, dtype=torch.int32)), "starts of shape"),
    ("evict_layers", dict(payload=[rows().half(), rows().bfloat16()]), "of the dtype of the first layer"),
    ("evict", dict(payload=[]), ""),  # counts as a select
    ("evict", dict(scores=[]), "one tensor per layer"),
    ("evict", dict(payload=[torch.empty(1, 1, 2**31, 0)], scores=[torch.zeros(1).expand(1, 1, 2**31)]), "tokens"),
    ("select", dict(scores=[torch.zeros(1).expand(2**20, 2**20, 4)]), "2\\*\\*31 - 1 heads"),
    # As many as fit in one layer, and one more than fit in two; they hold no tokens, and so no memory.
    ("select", dict(scores=[torch.empty(2**15, 2**15, 0)] * 2, budgets=[0, 0], total=0), "2\\*\\*31 - 1 heads"),
    ("select", dict(scores=[torch.randn(B, L)]), "of shape \\[B, H, L"),
    ("select_ragged", dict(batch=-B, heads=-H), "2\\*\\*31 - 1 heads"),
    ("select_ragged", dict(batch=2**40, heads=2**40), "2\\*\\*31 - 1 heads"),
    ("select_ragged", dict(batch=7), "cu_seqlens of shape"),
    ("select_ragged", dict(scores=[torch.randn(T)] * 2), "one layer of ragged rows"),
    ("evict_", dict(back=-1), "page in \\[1, 2"),
    ("evict_paged_", dict(back=2**31), "page in \\[1, 2"),
    ("evict_paged_", dict(pools=[]), "one pool per layer"),
    ("evict_paged_", dict(scores=[]), "one tensor per layer"),
    ("gather", dict(layers=0), "one tensor per layer"),
    ("gather", dict(layers=-1), "one tensor per layer"),
    ("gather", dict(layers=2), "one tensor per layer"),
    ("gather", dict(tensors=[]), "one tensor per layer"),
    ("gather", dict(positions=torch.zeros(6, 5, dtype=torch.int32)), "index.positions of shape"),
    ("gather", dict(cu_seqlens=offsets(B * H - 1)), "index.cu_seqlens of shape"),
    ("append_", dict(position=2**31 - 3), "2\\*\\*31 - 1 tokens"),
    ("append_", dict(position=-1), "2\\*\\*31 - 1 tokens"),
    ("append_", dict(rows=[]), "one tensor per layer"),
    ("append_", dict(cache=[]), "0 tensors of new rows"),
    ("append_", dict(valid=[1, 2, 3, 4]), "valid of shape"),
    ("append_", dict(positions=torch.zeros(2, T // 2, dtype=torch.int32)), "cache.positions of shape"),
    ("append_", dict(lengths=torch.zeros(H, B, dtype=torch.int32)), "cache.lengths of shape"),
    ("append_", dict(lengths=torch.zeros(B * H, dtype=torch.int32)), "cache.lengths of shape"),
    ("append_", dict(lengths=torch.zeros(B, H, dtype=torch.int64)), "cache.lengths of dtype int32"),
    ("append_", dict(cu_seqlens=offsets(B * H - 1)), "cache.cu_seqlens of shape"),
    ("append_", dict(rows=[rows(B, H, 3, D).view(torch.int32)] * 2), "of the cache's dtype"),
    ("append_", dict(cache=[rows(T, 2 * D)[:, ::2]] * 2), "rows like those of the cache"),
    ("append_", dict(cache=[rows(2 * T, D)[::2]] * 2), "rows like those of the cache"),
    ("append_", dict(positions=torch.zeros(2 * T, dtype=torch.int32)[::2]), "cache.positions contiguous"),
    ("append_", dict(cache=[MEMORY, rows(T, D)], rows=[MEMORY[:18].view(B, H, 3, D)] * 2), "without common memory"),
    ("attend", dict(longest=-1), "max_length of at least 0"),
    ("attend", dict(q=rows(B, H + 1, 2, D)), "Hq a multiple of H"),
    ("attend_paged", dict(longest=-1), "max_length of at least 0"),
    ("attend_paged", dict(q=rows(B, H + 1, 2, D)), "Hq a multiple of H"),
    ("attend_paged", dict(k=rows(T, D)), "k of shape \\[P, page, D\\]"),
    ("attend_paged", dict(v=rows(T // 2, 2, D)), "v of shape \\[P, page, Dv\\] with \\[P, page\\] = \\[15, 4\\]"),
    ("attend_paged", dict(v=rows(T // 4 - 1, 4, D)), "v of shape \\[P, page, Dv\\]"),
    ("attend_paged", dict(k=rows(20, 3, D), v=rows(20, 3, D)), "pages of a power of two of rows"),
    ("attend_paged", dict(k=rows(20, 0, D), v=rows(20, 0, D)), "pages of a power of two of rows"),
    ("attend_paged", dict(k=rows(T // 4, 4, 2 * D)[..., ::2]), "k contiguous after the token axis"),
    ("attend_paged", dict(tables=torch.zeros(B, 6, dtype=torch.int32)), "tables of shape \\[B, H, M\\], got"),
    ("attend_paged", dict(tables=torch.zeros(H, B, 2, dtype=torch.int32)), "tables of shape"),
    ("attend_paged", dict(tables=torch.zeros(B, H, 2)), "tables of dtype int32 or int64, got float32"),
    ("attend_paged", dict(tables=torch.zeros(B, H, 4, dtype=torch.int32)[..., ::2]), "tables contiguous in the last"),
    ("attend_paged", dict(lengths=torch.zeros(B, H, dtype=torch.int64)), "lengths of dtype int32"),
    ("soft_topk_backward", dict(element=4), "element in \\[0, 3\\]"),
    ("soft_topk_backward", dict(element=-1), "element in \\[0, 3\\]"),
    ("soft_topk_backward", dict(element=3), "like the mask"),
    ("soft_topk_backward", dict(weights=torch.ones(2 * B, H)[::2]), "weights of the rows of the mask"),
    ("soft_topk_backward", dict(weights=torch.ones(H)), "weights of the rows of the mask"),
    ("soft_topk_backward", dict(grad=torch.ones(B, H, 2 * L)[..., ::2]), "like the mask"),
    ("soft_topk_backward", dict(grad=torch.ones(H, B, L)), "like the mask"),
    ("soft_topk_backward", dict(grad=torch.ones(B, H, L + 1)), "like the mask"),
    ("soft_topk", dict(lengths=torch.ones(B, H, L, dtype=torch.int32)), "broadcasts to the rows"),
    ("soft_topk", dict(scores=torch.zeros(())), "of shape \\[..., n\\]"),
    ("soft_topk", dict(scores=torch.zeros(1, 1, 1, 1, 1, 4)), "of shape \\[..., n\\]"),
)  # fmt: skip


@pytest.mark.parametrize("call, change, message", REFUSED, ids=[f"{c}-{next(iter(d))}" for c, d, _ in REFUSED])
def test_refused(call: str, change: dict, message: str) -> None:
    arguments = good()[call] | change
    if not message:
        op_of(call)(**arguments)
        return
    with pytest.raises(RuntimeError, match=f"^(ValueError|TypeError): expected .*{message}"):
        op_of(call)(**arguments)


def test_every_op_has_a_good_call() -> None:
    names = {name.split("::")[1] for name in torch._C._dispatch_get_all_op_names() if name.startswith("lkv_ext::")}
    assert {op_of(call)._qualified_op_name.split("::")[1] for call in good()} == names
    for call, arguments in good().items():
        op_of(call)(**arguments)


def written_by(call: str) -> list[str]:
    """The arguments of a call that is right whose values it changes."""
    arguments = good()[call]
    tensors = {name: x if isinstance(x, list) else [x] for name, x in arguments.items()}
    tensors = {name: x for name, x in tensors.items() if x and isinstance(x[0], Tensor)}
    before = {name: [t.clone() for t in x] for name, x in tensors.items()}
    op_of(call)(**arguments)
    return [name for name, x in tensors.items() if not all(map(torch.equal, x, before[name]))]


@pytest.mark.parametrize("call", good())
def test_an_op_declares_what_it_writes(call: str) -> None:
    """torch.compile and autograd believe the schema."""
    declared = op_of(call).default._schema.arguments
    assert written_by(call) == [a.name for a in declared if a.alias_info is not None and a.alias_info.is_write]


def test_what_is_left_out_changes_nothing() -> None:
    """Budgets and a total alone."""
    payload, scores = [rows(), rows()], torch.randn(B, H, L)
    want = expected(payload, scores, 5)
    check(lkv_ext.RaggedKV(*ops.evict(payload, [scores], **sizes())[:2], (), *ops.select([scores], **sizes()), 5), want)
    in_place = [t.clone() for t in payload]
    lengths = ops.evict_(in_place, [scores], **sizes())[1]
    assert torch.equal(lengths, want.lengths.int())
    assert torch.equal(in_place[0][:, :, :5].flatten(0, 2).view(torch.int32), want.tensors[0])


@pytest.mark.parametrize("where", ["list", torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("valid", [None, [3, 3], [1, 2], [0, 9], [-1, 3]], ids=str)
def test_append_writes_what_fits(valid: list[int] | None, where: object) -> None:
    """Of every sequence the last `valid` tokens, as far as the spans have slack: nothing beyond, and lengths tell."""
    held = torch.tensor([[10, 9, 8], [7, 99, -3]], dtype=torch.int32)
    call = good()["append_"] | dict(lengths=held.clone(), position=40)
    given = {"valid": valid} if where == "list" or valid is None else {}
    if not given:
        given = {"valid_tensor": torch.tensor(valid, dtype=where).view(B, 1)}
    cache, positions = [t.clone() for t in call["cache"]], call["positions"].clone()
    ops.append_(**call, **given)
    for row in range(B * H):
        b, h = divmod(row, H)
        first = min(max(int(held[b, h]), 0), 10)
        new = 3 if valid is None else min(max(valid[b], 0), 3)
        fit = min(new, 10 - first)
        at, of = slice(10 * row + first, 10 * row + first + fit), slice(3 - new, 3 - new + fit)
        for mine, fresh in zip(cache, call["rows"], strict=True):
            mine[at] = fresh[b, h, of]
        positions[at] = torch.arange(40, 43, dtype=torch.int32)[of]
        assert int(call["lengths"][b, h]) == first + fit
    assert all(map(torch.equal, cache, call["cache"])) and torch.equal(positions, call["positions"])


def test_strides_beyond_64_bits() -> None:
    """An output without elements may have them all the same."""
    payload, scores = torch.empty(0, 4, 5, 2**34), torch.empty(0, 4, 5)
    with pytest.raises(RuntimeError, match="^MemoryError: cannot allocate a tensor of shape"):
        ops.evict([payload], [scores], budgets=[5], total=0, padded=2**30)


NUMBERS = st.sampled_from([0, 1, -1, 2, 3, 5, 7, 60, 1000, 2**31, 2**31 + 1, 2**32, 2**40, 2**62, 2**63 - 1, -(2**63)])
REALS = st.sampled_from([0.0, -1.0, 3.0, 1e300, -1e-300, float("nan"), float("inf"), -float("inf")])


def other_tensor(draw: st.DrawFn, t: Tensor) -> Tensor:
    """Another shape, dtype, stride or content."""
    change = draw(st.sampled_from(["narrow", "expand", "stride", "flip", "dtype", "junk", "axis", "squeeze", "empty"]))
    axis = draw(st.integers(0, t.dim() - 1)) if t.dim() else 0
    if change == "narrow" and t.dim():
        return t.narrow(axis, 0, t.shape[axis] // 2)
    if change == "expand" and t.dim() and t.shape[axis]:
        return t.narrow(axis, 0, 1).expand([2 * n if i == axis else n for i, n in enumerate(t.shape)])
    if change == "stride" and t.dim():
        return t.repeat_interleave(2, axis)[(slice(None),) * axis + (slice(None, None, 2),)]
    if change == "flip" and t.dim() > 1:
        return t.transpose(axis, axis - 1)
    if change == "dtype":
        dtypes = torch.int32, torch.int64, torch.float16, torch.float64, torch.bool, torch.uint8, torch.complex64
        return t.to(draw(st.sampled_from(dtypes)))
    if change == "junk" and not t.dtype.is_floating_point:
        values = draw(st.lists(st.integers(-(2**31), 2**31 - 1), min_size=1, max_size=4))
        return torch.tensor(values, dtype=t.dtype).repeat(t.numel())[: t.numel()].reshape(t.shape)
    if change == "axis":
        return t[None]
    if change == "squeeze" and t.dim():
        return t.select(axis, 0) if t.shape[axis] else t
    return t.new_empty(0)


def other(draw: st.DrawFn, value: object) -> object:
    if isinstance(value, Tensor):
        return other_tensor(draw, value)
    if isinstance(value, list) and value and isinstance(value[0], Tensor):
        how = draw(st.sampled_from(["one", "all", "fewer", "more"]))
        if how == "one":
            i = draw(st.integers(0, len(value) - 1))
            return [other_tensor(draw, t) if i == j else t for j, t in enumerate(value)]
        if how == "all":
            return [other_tensor(draw, t) for t in value]
        return value[1:] if how == "fewer" else [*value, value[0].clone()]
    if isinstance(value, list):
        return draw(st.lists(NUMBERS, max_size=7))
    if isinstance(value, bool):
        return not value
    if value is None:  # a number of every row: k, temperature or lengths
        values = torch.tensor(draw(st.lists(NUMBERS, min_size=1, max_size=H)))
        return values.to(draw(st.sampled_from([torch.int32, torch.int64, torch.float32, torch.float64])))
    return draw(NUMBERS) if isinstance(value, int) else draw(REALS)


def given_too(draw: st.DrawFn, arguments: dict) -> dict:
    """What the right call leaves to its defaults, now and then."""
    missing = [name for name in SIZES if name not in arguments] if "total" in arguments else []
    if "k" in arguments or not missing or draw(st.booleans()):
        return {}
    name = draw(st.sampled_from(missing))
    if name == "count_overflow":
        return {name: True}
    if name.endswith("_tensor"):
        shape = draw(st.sampled_from([(), (H,), (B, 1), (B, H), (1, B, H), (4,)]))
        values = draw(st.lists(NUMBERS, min_size=1, max_size=3))
        count = torch.Size(shape).numel()
        return {name: torch.tensor(values).repeat(count)[:count].view(shape)}
    if name == "cu_seqlens":
        return {name: offsets()}
    return {name: draw(st.lists(NUMBERS, max_size=7)) if name in ("lengths", "starts") else draw(NUMBERS)}


@given(st.data())
def test_wrong_arguments(data: st.DataObject) -> None:
    """Any argument of any op may be something else: an error of the op, or a result in bounds."""
    calls = good()
    call = data.draw(st.sampled_from(sorted(calls)))
    arguments = calls[call]
    for name in data.draw(st.lists(st.sampled_from(sorted(arguments)), min_size=1, max_size=2, unique=True)):
        arguments[name] = other(data.draw, arguments[name])
    arguments |= given_too(data.draw, arguments)
    try:
        op_of(call)(**arguments)
    except NotImplementedError as error:  # the dispatcher finds its way by the tensors
        assert "There were no tensor arguments" in str(error)
    except RuntimeError as error:
        assert str(error).startswith(("ValueError: ", "TypeError: ", "MemoryError: "))
