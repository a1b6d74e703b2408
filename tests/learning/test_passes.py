"""Passes over a context that was read before: attention and divergence by hand, whatever a model's logits are."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from own_settings import FULL, SMALL, build
from torch import Tensor, nn
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    PreTrainedModel,
    StableLmConfig,
    StableLmForCausalLM,
)

from lkv import passes
from lkv.learn import distill
from lkv.passes import Context, Masked, attention, follow
from lkv.policies.lkv.checkpoint import Design, Shape

B, HQ, H, N, M, D = 2, 6, 2, 7, 4, 5
LENGTHS = [7, 3]


def normal(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def some_context(dtype: torch.dtype = torch.float32) -> Context:
    return Context((normal(B, H, N, D, seed=1, dtype=dtype),) * 2, (normal(B, H, N, D, seed=2),), torch.tensor(LENGTHS))


def one_by_one(
    query: Tensor, key: Tensor, value: Tensor, masks: Tensor, scale: float, softcap: float | None, sinks: Tensor | None
) -> Tensor:
    """float64 `[B, M, Hq, D]`, a query at a time."""
    query, key, value, masks = (t.double() for t in (query, key, value, masks))
    out = torch.zeros(B, M, HQ, D, dtype=torch.float64)
    for b in range(B):
        for head in range(HQ):
            kv = head // (HQ // H)
            for i in range(M):
                logits = key[b, kv] @ query[b, head, i] * scale
                if softcap is not None:
                    logits = softcap * torch.tanh(logits / softcap)
                logits = logits + torch.cat([masks[b, kv], torch.zeros(M)])
                seen = [j for j in range(N + M) if j < LENGTHS[b] or N <= j <= N + i]
                weights = logits[seen].exp()
                total = weights.sum() + (0 if sinks is None else sinks[head].double().exp())
                out[b, i, head] = weights / total @ value[b, kv][seen]
    return out


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("own", ["eager", "sdpa"])
@pytest.mark.parametrize("softcap", [None, 0.8])
@pytest.mark.parametrize("sinks", [False, True])
def test_attention_is_that_of_every_query_by_itself(layer: int, own: str, softcap: float | None, sinks: bool) -> None:
    """Scale, soft cap, sinks, the padding of the context, what is to come, and a mask of each layer and KV head.

    Transformers' sdpa knows neither caps nor sinks, and a model that runs with it is taught without them.
    """
    query = normal(B, HQ, M, D, seed=3)
    key, value = normal(B, H, N + M, D, seed=4), normal(B, H, N + M, D, seed=5)
    masks = -2 * normal(2, B, H, N, seed=6).abs()
    logits = normal(HQ, seed=7) if sinks else None
    module, context = SimpleNamespace(layer_idx=layer), some_context()
    given = dict(scaling=0.7, softcap=softcap, s_aux=logits, lkv_own=own)
    out, _ = attention(module, query, key, value, None, lkv_attend=Masked(context, masks), **given)
    softcap, logits = (None, None) if own == "sdpa" else (softcap, logits)
    wanted = one_by_one(query, key, value, masks[layer], 0.7, softcap, logits)
    torch.testing.assert_close(out.double(), wanted, rtol=1e-5, atol=1e-6)
    plain, _ = attention(module, query, key, value, None, lkv_attend=Masked(context), **given)
    wanted = one_by_one(query, key, value, torch.zeros(B, H, N), 0.7, softcap, logits)
    torch.testing.assert_close(plain.double(), wanted, rtol=1e-5, atol=1e-6)


def test_gradients_of_the_mask_are_summed_over_the_group() -> None:
    """Those of a float64 loop: all query heads of a KV head, and nothing in the padding."""
    query, key, value = (normal(B, h, n, D, seed=n + h) for h, n in ((HQ, M), (H, N + M), (H, N + M)))
    upstream, grads = normal(B, M, HQ, D, seed=9), []
    for op in (
        lambda m: attention(
            SimpleNamespace(layer_idx=0), query, key, value, None, lkv_attend=Masked(some_context(), [m])
        )[0],
        lambda m: one_by_one(query, key, value, m, D**-0.5, None, None),
    ):
        masks = (-normal(B, H, N, seed=6).abs()).requires_grad_()
        grads.append(torch.autograd.grad((op(masks) * upstream).sum(), masks)[0])
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-4, atol=1e-6)
    assert (grads[0][1, :, 3:] == 0).all() and (grads[0][0] != 0).all()


def test_masks_stay_float32_beside_bfloat16() -> None:
    """Two masks that bfloat16 could not tell from each other change the weights."""
    half = dict(dtype=torch.bfloat16)
    query, key = torch.zeros(B, HQ, M, D, **half), torch.zeros(B, H, N + M, D, **half)
    masks = torch.full((1, B, H, N), -10.0)
    masks[..., 0] = -10.02
    assert torch.equal(masks.bfloat16()[..., 0], masks.bfloat16()[..., 1])
    value = torch.zeros(B, H, N + M, D, **half)
    masks.requires_grad_()
    value[:, :, 0], value[:, :, N:] = 1.0, 0.0
    out, _ = attention(SimpleNamespace(layer_idx=0), query, key, value, None, lkv_attend=Masked(some_context(), masks))
    assert out.dtype == torch.bfloat16
    (grad,) = torch.autograd.grad(out[:, 0].float().sum(), masks)
    weight = math.exp(-10.02) / (1 + math.exp(-10.02) + 6 * math.exp(-10))
    want = torch.tensor(3 * D * weight * (1 - weight))
    torch.testing.assert_close(grad[0, 0, :, 0], want.expand(H), rtol=5e-3, atol=0)
    assert grad.dtype == torch.float32


def test_logits_are_float32_beside_bfloat16() -> None:
    """Soft caps and weights of a teacher too: in bfloat16 they would be off by 5 %."""
    query, key = torch.zeros(B, HQ, M, D), torch.zeros(B, H, N + M, D)
    query[..., 0] = 32.0
    key[..., 0] = 1 - torch.arange(N + M) / 64  # logits 32 - j / 2: exact in bfloat16
    value = normal(B, H, N + M, D, seed=4).abs()
    half = (t.bfloat16() for t in (query, key, value))
    given = dict(lkv_attend=Masked(some_context()), scaling=1.0, softcap=50.0)
    out, _ = attention(SimpleNamespace(layer_idx=0), *half, None, **given)
    wanted = one_by_one(query, key, value.bfloat16(), torch.zeros(B, H, N), 1.0, 50.0, None)
    torch.testing.assert_close(out.double(), wanted, rtol=8e-3, atol=0)


def test_contexts_are_repeated_and_picked_whole() -> None:
    context = Context(
        tuple(normal(3, H, N, D, seed=s) for s in (1, 2)), (normal(3, H, N, D, seed=3),), torch.tensor([7, 3, 5])
    )
    assert (context.batch, context.size) == (3, N)
    for got, rows in (
        (context.repeat(2), [0, 0, 1, 1, 2, 2]),
        (context.repeat(1), [0, 1, 2]),
        (context.pick([2, 0]), [2, 0]),
        (context.pick([0, 1, 2]), [0, 1, 2]),
        (context.pick([1, 0, 2]), [1, 0, 2]),
        (context.pick([0, 1]), [0, 1]),
    ):
        assert got.lengths.tolist() == [[7, 3, 5][row] for row in rows]
        for mine, theirs in zip((*got.keys, *got.values), (*context.keys, *context.values), strict=True):
            assert torch.equal(mine, theirs[rows])


@torch.no_grad()
@pytest.mark.parametrize("own", ["eager", "sdpa"])
def test_a_teacher_is_the_model_as_it_runs(own: str) -> None:
    """Gemma 3 may have a soft cap, which transformers' sdpa leaves out."""
    torch.manual_seed(0)
    options = dict(query_pre_attn_scalar=3, attn_logit_softcapping=0.5, **FULL)
    model = Gemma3ForCausalLM(Gemma3TextConfig(**{**SMALL, **options}, attn_implementation=own)).eval()
    text, after = normal(1, 30, seed=1).argsort(-1) + 3, torch.tensor([[5, 9, 7]])
    lkv = Design(hidden=4, input="hidden", sink=1, window=1).build(Shape.of(model))
    hidden = follow(model, distill.read(model, lkv, text.tolist()).context, after)
    whole = model.model(torch.cat([text, after], 1)).last_hidden_state[:, 30:]
    torch.testing.assert_close(hidden, whole, rtol=1e-4, atol=1e-4)
    assert model.config._attn_implementation == own


def test_a_model_has_its_own_attention_again_whatever_happens() -> None:
    model = build("scale")
    own = model.config._attn_implementation
    with pytest.raises(RuntimeError, match="stopped"), passes.using(model) as name:
        assert name == own and model.config._attn_implementation == passes.NAME
        raise RuntimeError("stopped")
    assert model.config._attn_implementation == own


def test_what_cannot_be_followed_is_refused() -> None:
    """Layers that slide, before anything is read; a decoder that keeps what it is called with to itself."""
    sliding = dict(head_dim=8, num_hidden_layers=2, layer_types=["sliding_attention", "full_attention"])
    model = Gemma2ForCausalLM(Gemma2Config(**{**SMALL, **sliding}, attn_implementation="eager")).eval()
    lkv = Design(hidden=4, sink=1, window=1).build(Shape.of(model))
    expected = r"^lkv.learn: expected full attention in all 2 layers, .* got 1 such layers in Gemma2ForCausalLM$"
    with pytest.raises(ValueError, match=expected):
        distill.read(model, lkv, [[5, 6, 7, 8]])
    silent = StableLmForCausalLM(StableLmConfig(**SMALL)).eval()
    shape = (1, 2, 4, 8)
    context = Context((torch.zeros(shape),) * 2, (torch.zeros(shape),) * 2, torch.tensor([4]))
    with pytest.raises(ValueError, match=r"^lkv: expected a model whose decoder hands keyword arguments on"):
        follow(silent, context, torch.tensor([[3]]))


def foretelling(monkeypatch: pytest.MonkeyPatch, teacher: Tensor, student: Tensor) -> PreTrainedModel:
    """A model whose logits `[B, m, V]` are given."""
    calls = []

    def feed(model: object, context: object, tokens: Tensor, log_masks: object = None) -> Tensor:
        assert tokens.shape == teacher.shape[:2]
        calls.append(log_masks is not None)
        return student if log_masks is not None else teacher

    monkeypatch.setattr(distill, "follow", feed)
    return SimpleNamespace(get_output_embeddings=nn.Identity, calls=calls)


def test_the_loss_is_the_forward_divergence_of_the_answers_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """By hand: KL of (1/2, 1/2) from (1/4, 3/4) is ln(4/3) / 2 = 0.1438; the other way round it would be 0.1308."""
    p, q = torch.tensor([0.5, 0.5]).log(), torch.tensor([0.25, 0.75]).log()
    other, far = torch.tensor([0.1, 0.9]).log(), torch.tensor([0.99, 0.01]).log()
    teacher, student = other.repeat(2, 4, 1), far.repeat(2, 4, 1)  # they differ wherever nobody answers
    # Question and answer: 2 + 3 tokens, foretold at 1, 2, 3; and 1 + 2, foretold at 0 and 1.
    for row, place in ((0, 1), (0, 2), (0, 3), (1, 0), (1, 1)):
        teacher[row, place], student[row, place] = p, q
    student[1, 1] = p - 5.0  # logits are no probabilities yet
    student.requires_grad_()
    model = foretelling(monkeypatch, teacher, student)
    results = [[8, 9, 4], [8, 9]]
    loss, count, same = distill.divergence(model, None, torch.zeros(1), [[5, 6], [7]], results)
    assert loss.item() == pytest.approx(4 * 0.5 * math.log(4 / 3), rel=1e-5)
    assert count == 5
    assert int(same) == 1  # of equals the first, where they agree; q foretells the second
    assert model.calls == [False, True]
    (grad,) = torch.autograd.grad(loss, student)
    torch.testing.assert_close(grad[0, 1], torch.tensor([0.25 - 0.5, 0.75 - 0.5]))  # q - p: of the forward one
    assert (grad[0, 0] == 0).all() and (grad[1, 2:] == 0).all()


def test_logits_of_half_precision_are_summed_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    teacher, student = normal(1, 300, 50, seed=1).bfloat16(), normal(1, 300, 50, seed=2).bfloat16()
    model = foretelling(monkeypatch, teacher, student)
    loss, count, _ = distill.divergence(model, None, torch.zeros(1), [[5]], [[6] * 300])
    log_p, log_q = (t.double().log_softmax(-1) for t in (teacher, student))
    assert loss.dtype == torch.float32 and count == 300
    assert loss.item() == pytest.approx((log_p.exp() * (log_p - log_q)).sum().item(), rel=1e-5)
