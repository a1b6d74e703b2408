"""Nothing depends on torch's default device, which an application may have set to its GPU.

Here it is "meta", whose tensors have no values: what is made on it by mistake fails, or comes out without values.
"""

from __future__ import annotations

import ast
import pickle
from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from pathlib import Path

import pytest
import torch
from cases import bits
from observations import SINKS, B, D, H, Still, observe, pad
from test_policy_padding import POLICIES as TRAINED
from torch import Tensor

import lkv_ext
from lkv import policies
from lkv.policies import Policy, SnapKV
from lkv.policies.lkv import TokenScorer, learned
from lkv.policies.lkv.head_budget import HeadBudget
from lkv.policies.protocol import Accumulates, Ahead, Layered, Refines, Weighs
from lkv.policies.tables import DuoAttention, HeadKV, load_table
from lkv_ext import layout

ROOT = Path(__file__).resolve().parents[1]
MAKE = {"tensor", "as_tensor", "asarray", "empty", "zeros", "ones", "full", "eye", "arange", "linspace"}
MAKE |= {"rand", "randn", "randint", "randperm", "scalar_tensor", "logspace", "tril_indices", "triu_indices"}
# Parameters lie where modules are made, as torch's own; what tests compare with is called by tests alone.
UNNAMED = ("python/lkv/policies/lkv/token_scorer.py", "python/lkv/reference/", "python/lkv/golden.py")
L, N, PAGE = 24, 2, 4


def elsewhere(f: Callable[[], object]) -> object:
    with torch.device("meta"):
        return f()


def leaves(value: object, path: str = "") -> dict[str, object]:
    """Tensors and numbers of a result, by where they are in it."""
    if is_dataclass(value):
        value = {field.name: getattr(value, field.name) for field in fields(value)}
    elif isinstance(value, lkv_ext.RaggedCache):
        value = value.__getstate__()
    elif isinstance(value, list | tuple):
        value = dict(enumerate(value))
    if not isinstance(value, dict):
        return {path: value}
    return {name: leaf for key, part in value.items() for name, leaf in leaves(part, f"{path}.{key}").items()}


def check_same(got: object, expected: object) -> None:
    one, other = leaves(got), leaves(expected)
    assert one.keys() == other.keys()
    for name, tensor in other.items():
        if isinstance(tensor, Tensor):
            assert one[name].device == tensor.device, name
            assert one[name].dtype == tensor.dtype and torch.equal(bits(one[name]), bits(tensor)), name
        elif isinstance(tensor, int | float | str):
            assert one[name] == tensor, name


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), device="cpu")


K, V, SCORES, QUERY = drawn(B, H, L, D), drawn(B, H, L, D + 1, seed=1), drawn(B, H, L, seed=2), drawn(B, 2 * H, 3, D)
EXTRA = drawn(B, H, L, 2, seed=3)
LENGTHS, STARTS, TOTALS = torch.tensor([[L - 5, 9], [5, 0], [20, 31]])
TABLES = torch.randperm(B * L // PAGE, generator=torch.Generator().manual_seed(0)).view(B, L // PAGE).int()
POOLS = [drawn(B * L // PAGE, H, PAGE, width, seed=width) for width in (D, D + 1, 2)]
SHARES = [[0.1, 0.0, 2.0], [0.5, 0.7, 0.1]]
VALID = dict(lengths=LENGTHS, starts=STARTS, sink=1, window=2)
KEPT = lkv_ext.evict(K, V, SCORES, [7, 3, 5], reserve=4, align=4)


def in_place(budgets: object, **options: object) -> object:
    k, v, extra = K.clone(), V.clone(), EXTRA.clone()
    return k, v, extra, lkv_ext.evict_(k, v, SCORES, budgets, companions=[extra], **options)


def in_pages(**options: object) -> object:
    pools = [pool.clone() for pool in POOLS]
    return pools, lkv_ext.evict_paged_(pools, SCORES, [7, 3, 5], TABLES, [L, 9], check=True, **options)


def with_gradients() -> object:
    k, v, scores = (x.clone().requires_grad_() for x in (K, V, SCORES))
    kept = lkv_ext.evict(k, v, scores, [7, 3, 5])
    mask = lkv_ext.soft_topk(scores, 5.0, 0.3, lengths=LENGTHS[:, None])
    return torch.autograd.grad(kept.k.sum() + (kept.v**2).sum() + (mask**2).sum(), [k, v, scores])


def a_cache() -> lkv_ext.RaggedCache:
    cache = lkv_ext.RaggedCache.empty(B, H, D, dim_v=D + 1, reserve=2, align=2, device="cpu")
    cache.append(K[:, :, :9], V[:, :, :9], valid=[9, 4])
    cache.append(K[:, :, 9:12], V[:, :, 9:12])
    return cache


def steps_of_a_cache() -> object:
    cache = a_cache()
    cache.crop(1)
    padded = cache.padded(cache.v)
    cache.evict(cache.packed(SCORES), [4, 2, 3], sink=1, window=1)
    cache.append(K[:, :, 12:14], V[:, :, 12:14], valid=LENGTHS.clamp(max=2))
    out = cache.attend(QUERY[:, :, -1:])
    cache.select_batch([1, 0, 1])
    cache.reorder(torch.tensor([2, 2, 0], device="cpu"))
    return cache, padded, out, cache.block_table, cache.retained_bytes, cache.to("cpu").k


def steps_of_pages() -> object:
    pools = [torch.zeros(80, PAGE, width, device="cpu") for width in (D, D + 1)]
    cache = lkv_ext.RaggedCache.paged(pools, lkv_ext.PageAllocator(80), heads=H, batch=B)
    cache.append(K, V)
    cache.evict(SCORES, torch.tensor([7, 3, 5], device="cpu"), window=1)
    cache.append(K[:, :, :3], V[:, :, :3])
    found = cache.attend(QUERY), cache.packed(), cache.block_table, cache.lengths
    cache.free()
    return found, cache.lengths


def saved(folder: Path) -> object:
    a_cache().save(folder / "cache")
    (folder / "table").write_text("0.2 0.9 0.4\n1.0 0.1 0.3\n")
    read = lkv_ext.RaggedCache.load(folder / "cache"), load_table(folder / "table")
    return read, pickle.loads(pickle.dumps(a_cache()))


scores, shares = lkv_ext.budgets_from_scores, lkv_ext.budgets_from_shares
CALLS: dict[str, Callable[[], object]] = {
    "evict": lambda: lkv_ext.evict(K, V, SCORES, [7, 3, 5], companions=[EXTRA], reserve=3, align=2, **VALID),
    "evict, nested budgets": lambda: lkv_ext.evict(K, None, SCORES, [[7, 3, 5], [1, 2, 3]], layout="padded"),
    "evict, budgets of a tensor": lambda: lkv_ext.evict(K, V, SCORES, TOTALS.new_tensor([7, 3, 5]).short()),
    "evict, ragged": lambda: lkv_ext.evict(KEPT.k, KEPT.v, KEPT.k[:, 0], 2, cu_seqlens=KEPT.cu_seqlens),
    "evict, derivatives": with_gradients,
    "evict_layers": lambda: lkv_ext.evict_layers([K, -K], None, [SCORES, SCORES.sin()], [[7, 3, 5], [1, 2, 3]]),
    "evict_": lambda: in_place([7, 3, 5], **VALID),
    "evict_ to the back": lambda: in_place((7, 3, 5), to="back", order="any", **VALID),
    "evict_, a plan": lambda: in_place(lkv_ext.plan([7, 3, 5], LENGTHS, device="cpu"), starts=STARTS),
    "evict_paged_": in_pages,
    "evict_paged_ to the back": lambda: in_pages(to="back", order="any"),
    "pages of heads": lambda: layout.heads_as_sequences(POOLS, TABLES[:, None].expand(-1, H, -1).contiguous()),
    "select": lambda: lkv_ext.select(SCORES, 5, page=4, **VALID),
    "gather": lambda: lkv_ext.gather([K, V], lkv_ext.select(SCORES, 5)),
    "plan": lambda: lkv_ext.plan([[7, 3, 5], [1, 2, 3]], LENGTHS, device="cpu"),
    "attend": lambda: lkv_ext.attend(QUERY, KEPT, sinks=torch.tensor(SINKS, device="cpu")),
    "budgets_from_shares": lambda: shares(SHARES, total=40, lengths=L, cap=15),
    "budgets_from_shares, retention": lambda: shares(KEPT.k[0].abs(), retention=0.3, lengths=[L] * D, floor=2),
    "budgets_from_scores": lambda: scores(SCORES, 30, floor=lkv_ext.Blend(0.2), sink=1, window=2),
    "budgets_from_scores, rows": lambda: scores(SCORES, TOTALS, floor=lkv_ext.Minimum(3), lengths=LENGTHS),
    "budgets_from_scores, layers": lambda: scores([SCORES, SCORES.sin()], [60, 50], across="layers"),
    "soft_topk": lambda: lkv_ext.soft_topk(SCORES, TOTALS[:, None] / 4, 0.3, lengths=[[9], [L]], log=True),
    "RaggedCache": steps_of_a_cache,
    "PagedCache": steps_of_pages,
}


@pytest.mark.parametrize("name", CALLS)
def test_functions(name: str) -> None:
    check_same(elsewhere(CALLS[name]), CALLS[name]())


def test_files_and_pickles(tmp_path: Path) -> None:
    check_same(elsewhere(lambda: saved(tmp_path)), saved(tmp_path))


TABLE = [[0.2, 0.9, 0.4], [1.0, 0.1, 0.3]]
POLICIES: dict[str, Policy] = {name: policies.get(name) for name in policies.POLICIES}
POLICIES |= {"headkv": HeadKV(SnapKV(window=4), TABLE), "duoattention": DuoAttention(TABLE, sink=1, recent=3)}
LEARNED = {name: policy for name, policy in TRAINED.items() if "lkv" in name}
LEARNED["uniform"] = learned(TokenScorer(N, H, 2 * D), HeadBudget(N, H, "uniform"), sink=1, window=3)
LEARNED["absolute"] = learned(TokenScorer(N, H, 2 * D, scale="absolute"), HeadBudget(N, H, "threshold"))
POLICIES |= LEARNED


def asked(policy: Policy, total: int) -> dict[str, object]:
    """All that a policy answers on two layers of a padded batch."""
    found: dict[str, object] = {}
    layers = [OBSERVED[n] for n in range(N)]
    for n, o in enumerate(layers):
        if isinstance(policy, Accumulates) and getattr(policy, "accumulates", True):
            o = replace(o, carried=policy.accumulate(n, o, None))
        layers[n] = o
        found[f"scores {n}"] = policy.score(n, o)
    scored, lengths = [found[f"scores {n}"] for n in range(N)], torch.stack([o.lengths for o in layers])
    starts, rows, counts = layers[0].starts, lengths.new_tensor([total, 5]), lengths[0, :, 0]
    more = {}
    if isinstance(policy, Weighs):
        weights = [policy.importance(n, o, s) for n, (o, s) in enumerate(zip(layers, scored, strict=True))]
        found["importance"] = more["importance"] = torch.stack(weights)
    if isinstance(policy, Layered):
        found["rows of layers"] = policy.layer_rows(N, rows.minimum(counts), counts)
    if isinstance(policy, Ahead):
        budgets = torch.stack([policy.ahead(n, rows.minimum(counts), counts) for n in range(N)])
    elif policy.scope == "layer":
        budgets = torch.stack([policy.budgets(s, lengths[0], rows * H, starts=starts) for s in scored])
    else:
        budgets = policy.budgets(scored, lengths, rows * H * N, starts=starts, **more)
    found["budgets"] = budgets
    if isinstance(policy, Refines):
        each = zip(layers, scored, budgets, strict=True)
        found["refined"] = [policy.refine(n, o, s, b) for n, (o, s, b) in enumerate(each)]
    return found


def shown(seed: int) -> object:
    o = pad(observe(L, L, seed), 3, 1)
    return replace(
        o,
        output_projection=drawn(5, 2 * H * D, seed=seed),
        attention_cosine=torch.tensor([0.3 + seed / 3, 0.9]),
        rotary=Still(torch.tensor([1.0, 0.1, 0.03, 0.001]), L + 4),
        budget=torch.tensor([7, 5]),
    )


OBSERVED = [shown(0), shown(1)]


@pytest.mark.parametrize("total", [0, 1, 9, L])
@pytest.mark.parametrize("name", POLICIES)
def test_policies(name: str, total: int) -> None:
    check_same(elsewhere(lambda: asked(POLICIES[name], total)), asked(POLICIES[name], total))


@pytest.mark.parametrize("name", LEARNED)
def test_weights_follow_what_they_score(name: str) -> None:
    """A checkpoint that was loaded for no model is on the host."""
    policy, o = LEARNED[name], OBSERVED[0]
    parts = [(part.name, getattr(o, part.name)) for part in fields(o)]
    o = replace(o, **{part: x.to("meta") for part, x in parts if isinstance(x, Tensor)})
    scored = [policy.score(n, o) for n in range(N)]
    assert {s.device.type for s in scored} == {"meta"}
    if policy.scope == "model":
        lengths = torch.stack([o.lengths] * N)
        assert policy.budgets(scored, lengths, torch.tensor([40, 30]), starts=o.starts).shape == (N, B, H)


def test_every_tensor_names_its_device() -> None:
    """Also where no test runs, as on the way to a GPU."""
    missing = []
    for path in sorted(path for folder in ("lkv_ext", "python/lkv") for path in (ROOT / folder).rglob("*.py")):
        name = path.relative_to(ROOT).as_posix()
        for call in ast.walk(ast.parse(path.read_text())):
            if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Attribute):
                continue
            made = call.func.attr in MAKE and ast.unparse(call.func.value) == "torch"
            if made and not any(keyword.arg in ("device", None) for keyword in call.keywords):
                missing.append(f"{name}:{call.lineno}: torch.{call.func.attr}")
    assert [line for line in missing if not line.startswith(UNNAMED)] == []
