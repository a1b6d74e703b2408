"""What is collected of a model over texts: its queries, and of what use its rows are."""

from __future__ import annotations

import pytest
import torch
from families import build, call, tokens
from torch import Tensor

import lkv
from lkv.offline import budget_curves, query_statistics
from lkv.policies import H2O, LUKV, CriticalKV, ExpectedAttention, KNorm, Protect
from lkv.policies.lukv import Curves


def test_statistics_are_those_of_the_queries_before_rope() -> None:
    model, found = build("llama"), {0: [], 1: []}
    texts = [tokens(1, 20), tokens(2, 13, 1)]
    hooks = [
        layer.self_attn.q_proj.register_forward_hook(lambda module, args, out, n=n: found[n].append(out[:, 3:]))
        for n, layer in enumerate(model.model.layers)
    ]
    statistics = query_statistics(model, texts, sink=3)
    for hook in hooks:
        hook.remove()
    for n in range(2):
        rows = torch.cat([x.flatten(0, 1) for x in found[n]]).unflatten(1, (4, 8)).transpose(0, 1)
        assert rows.shape[1] == 17 + 2 * 10
        torch.testing.assert_close(statistics.mean[n], rows.mean(1), rtol=1e-4, atol=1e-5)
        spread = torch.stack([torch.cov(x.T, correction=0) for x in rows])
        torch.testing.assert_close(statistics.covariance[n], spread, rtol=1e-3, atol=1e-4)
    cache = lkv.Cache(model, ExpectedAttention(statistics=statistics), retention=0.5)
    with torch.no_grad():
        call(model, tokens(1, 30, 5), None, cache)
    assert cache.ragged[0].row_counts == [30]
    with pytest.raises(ValueError, match="expected a text of more than 40 tokens"):
        query_statistics(model, texts, sink=40)


@pytest.mark.parametrize("family", ["llama", "nondefault, full"])
def test_curves_of_a_model(family: str) -> None:
    """The use of a row is what eager attention shows that later tokens pay to it."""
    model, texts, scorer = build(family), [tokens(1, 40, n) for n in range(2)], Protect(KNorm(), sink=2, window=1)
    expected, own = [], model.config._attn_implementation
    for ids in texts:
        paid: list[Tensor] = []
        hooks = [
            layer.self_attn.register_forward_hook(lambda module, args, out, paid=paid: paid.append(out[1]))
            for layer in model.model.layers
        ]
        model.config._attn_implementation = "eager"
        with torch.no_grad():
            output = model(ids, use_cache=True)
        model.config._attn_implementation = own
        for hook in hooks:
            hook.remove()
        use = torch.stack([a[0, :, 20:, :20].sum(1).unflatten(0, (2, -1)).mean(1) for a in paid])
        keys = torch.stack([layer.keys[0, :, :20] for layer in output.past_key_values.layers])
        expected.append((-keys.norm(dim=-1), use))
    curves = budget_curves(model, texts, scorer)
    torch.testing.assert_close(curves.lost, Curves.fit(expected, 2, 1).lost)
    cache = lkv.Cache(model, LUKV(scorer, curves), retention=0.3)
    with torch.no_grad():
        call(model, texts[0], None, cache)
    lengths = torch.stack([layer.rows.lengths[0] for layer in cache.ragged])
    assert int(lengths.sum()) == 4 * 12 and len(lengths.unique()) > 1
    for policy in ("kvzip", CriticalKV(), H2O()):
        with pytest.raises(ValueError, match="expected a policy whose scores are made once"):
            budget_curves(model, texts, policy)
    with pytest.raises(ValueError, match=r"expected ids of shape \[1, n\]"):
        budget_curves(model, [tokens(2, 8)], scorer)
