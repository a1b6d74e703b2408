"""The differentiable relaxation of top-k: a mask between 0 and 1 whose sum is k."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from lkv_ext._common import errors
from lkv_ext._common.kinds import described
from lkv_ext._torch import derivatives, fake, vmap
from lkv_ext._torch.library import ops
from lkv_ext._torch.soft_slopes import Slopes
from lkv_ext._torch.vmap import EachSample, call

_ELEMENTS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2, torch.float64: 3}
_AXES = 4  # in front of n, as the kernels count them


def soft_topk(
    scores: Tensor,
    k: float | Tensor,
    temperature: float | Tensor,
    lengths: Tensor | Sequence | int | None = None,
    log: bool = False,
) -> Tensor:
    """`m = sigmoid((scores - tau) / temperature)` with tau of every row such that the row of m sums to k.

    As the temperature goes to 0 this is the mask of the k best scores; k need not be an integer. Differentiable in
    scores, k and temperature, in either mode and any number of times (with w = m (1 - m), W = sum w and g the gradient
    of m):

        dL/dk = sum(w g) / W,  dL/dscores = w (g - dL/dk) / T,  dL/dT = -sum(w (u - u') g) / T

    where u = (scores - tau) / T and u' = sum(w u) / W. With `log`, `w g` is `(1 - m) h` for the gradient h of log m:
    nothing is divided by m. W counts as at least 1e-6 for each score, so that gradients stay finite where no score is
    near tau.

    Args:
        scores: `[..., n]`, float32, float16, bfloat16 or (CPU) float64, any strides with a contiguous last axis.
        k: a number, or a tensor that broadcasts to `[...]`. At most 0: the mask is all 0; at least the number of
            scores: all 1. Gradients of such a row are zero.
        temperature: above 0; a number, or a tensor that broadcasts to `[...]`. Values of a tensor count as at least
            1e-6.
        lengths: integers that broadcast to `[...]`: a row has only its first `lengths` scores, the others are missing.
            Scores of -inf and NaN are missing too. Default: all.
        log: return `log m`, computed as `-softplus(-u)`: exact where m is too small for its type.

    Returns:
        `[..., n]`, contiguous, float32 (float64 for float64). Missing scores have mask 0 (`log`: -inf) and
        gradient 0; in a row with k <= 0 the others have `log` -1e4, so that a softmax over it stays defined. A score of
        +inf has mask 1 and is counted in k. Never NaN.

    Raises:
        ValueError, TypeError: for a wrong shape, dtype or device, and for a temperature that is not above 0.

    Source: J. Su, "ThreTopK" (kexue.fm/archives/10373); with T = eps / 2 the mask of SOFT (Xie et al., NeurIPS 2020).
    """
    try:
        if not isinstance(scores, Tensor) or scores.dim() == 0:
            got = list(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
            raise ValueError(f"expected scores of shape [..., n], got {got}")
        if log is not True and log is not False:
            raise TypeError(f"expected log as a bool, got {described(log)}")
        dtype = torch.float64 if scores.dtype == torch.float64 else torch.float32
        k_tensor, k_value = _number(k, "k", dtype)
        t_tensor, t_value = _number(temperature, "temperature", dtype)
        if t_tensor is None and not t_value > 0:
            raise ValueError(f"expected temperature above 0, got {temperature}")
        if torch.compiler.is_compiling():  # ops take no symbolic float: one graph would be made for every value
            one = torch.ones((), dtype=torch.float64, device=scores.device)
            k_tensor = one * k_value if k_tensor is None else k_tensor
            t_tensor = one * t_value if t_tensor is None else t_tensor
            k_value = t_value = 0.0
        if lengths is not None and not isinstance(lengths, Tensor):
            lengths = _integers(lengths, scores.device)
        if scores.dim() > _AXES + 1:
            return _flattened(scores, k_tensor, k_value, t_tensor, t_value, lengths, log)
        return _run(scores, k_tensor, k_value, t_tensor, t_value, lengths, log)
    except (RuntimeError, ValueError, TypeError, AttributeError) as error:
        errors.reraise("soft_topk", error, given=locals())


def _integers(lengths: Sequence | int, device: torch.device) -> Tensor:
    try:
        return torch.as_tensor(lengths, device=device)
    except (ValueError, RuntimeError, TypeError):
        raise ValueError(f"expected lengths as integers that fit in 64 bits, got {described(lengths)}") from None


def _number(given: float | Tensor, name: str, dtype: torch.dtype) -> tuple[Tensor | None, float]:
    if type(given) is float:
        return None, given
    if isinstance(given, Tensor):
        if given.is_complex() or given.dtype == torch.bool:
            raise TypeError(f"expected {name} of a real dtype, got {given.dtype}")
        return given if given.dtype == dtype else given.to(dtype), 0.0
    if isinstance(given, bool) or not isinstance(given, (Real, torch.SymInt, torch.SymFloat)):
        raise TypeError(f"expected {name} as a number or a tensor, got {type(given).__name__}")
    return None, float(given)


def _flattened(scores: Tensor, k: Tensor | None, k_value: float, t: Tensor | None, *rest: Any) -> Tensor:
    """More leading axes than the kernels count: as one."""
    leading = scores.shape[:-1]
    t_value, lengths, log = rest
    k, t, lengths = (x if x is None else x.broadcast_to(leading).reshape(-1) for x in (k, t, lengths))
    return _run(scores.reshape(-1, scores.shape[-1]), k, k_value, t, t_value, lengths, log).view(scores.shape)


def _run(scores: Tensor, k: Tensor | None, k_value: float, t: Tensor | None, *rest: Any) -> Tensor:
    if derivatives.wanted([x for x in (scores, k, t) if x is not None]):
        op = _SoftTopkInForwardMode if derivatives.in_forward_mode() else _SoftTopk
        return call(op, scores, k, k_value, t, *rest)[0]
    return ops.soft_topk(scores, k, k_value, t, *rest)[0]


def _summed(grad: Tensor, shape: torch.Size) -> Tensor:
    return grad if grad.shape == shape else grad.sum_to_size(shape)


class _SoftTopk(EachSample):
    @staticmethod
    def forward(
        scores: Tensor,
        k: Tensor | None,
        k_value: float,
        temperature: Tensor | None,
        t_value: float,
        lengths: Tensor | None,
        log: bool,
    ) -> Any:
        return ops.soft_topk(scores, k, k_value, temperature, t_value, lengths, log)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        scores, k, _, temperature, ctx.t_value, lengths, ctx.log = inputs
        mask, weights = output
        ctx.mark_non_differentiable(weights)
        ctx.save_for_backward(mask, weights, temperature, lengths)
        ctx.dtype = scores.dtype
        ctx.shapes = [None if x is None else x.shape for x in (k, temperature)]

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _weights: Tensor) -> Any:
        mask, weights, temperature, lengths = ctx.saved_tensors
        to_scores, to_k, to_temperature = (ctx.needs_input_grad[i] for i in (0, 1, 3))
        if derivatives.wanted((grad, mask)):  # the kernel has no derivative of its own
            slopes = Slopes(mask, weights, ctx.t_value if temperature is None else temperature, ctx.log)
            of_scores, of_k, of_temperature = slopes.backward(grad)
            of_scores = of_scores.to(ctx.dtype)
        else:
            of_scores, of_k, of_temperature = ops.soft_topk_backward(
                grad.contiguous(), mask, weights, temperature, ctx.t_value, lengths, _ELEMENTS[ctx.dtype], ctx.log,
                to_scores, to_temperature,
            )  # fmt: skip
        k_shape, t_shape = ctx.shapes
        return (
            of_scores if to_scores else None,
            _summed(of_k, k_shape) if to_k else None,
            None,
            _summed(of_temperature, t_shape) if to_temperature else None,
            None,
            None,
            None,
        )


class _SoftTopkInForwardMode(_SoftTopk):
    """A class of its own, as torch.compile traces no function with a `jvp`."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        _SoftTopk.setup_context(ctx, inputs, output)
        ctx.save_for_forward(*output, inputs[3])

    @staticmethod
    def jvp(ctx: Any, scores: Any, k: Any, _k_value: Any, temperature: Any, *_rest: Any) -> Any:
        with derivatives.outer_levels((*ctx.saved_tensors, scores, k, temperature)) as given:
            mask, weights, at, *tangents = given
            assert mask is not None and weights is not None
            return Slopes(mask, weights, ctx.t_value if at is None else at, ctx.log).forward(*tangents), None


@torch.library.register_fake("lkv_ext::soft_topk")
def fake_soft_topk(
    scores: Tensor,
    k: Tensor | None,
    k_value: float,
    temperature: Tensor | None,
    temperature_value: float,
    lengths: Tensor | None,
    log: bool,
) -> tuple[Tensor, Tensor]:
    fake.check_devices(scores.device, {"k": k, "temperature": temperature, "lengths": lengths})
    dtype = torch.float64 if scores.dtype == torch.float64 else torch.float32
    return scores.new_empty(scores.shape, dtype=dtype), scores.new_empty(scores.shape[:-1], dtype=dtype)


@torch.library.register_fake("lkv_ext::soft_topk_backward")
def fake_soft_topk_backward(
    grad: Tensor,
    mask: Tensor,
    weights: Tensor,
    temperature: Tensor | None,
    temperature_value: float,
    lengths: Tensor | None,
    element: int,
    log: bool,
    to_scores: bool,
    to_temperature: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = next(dtype for dtype, number in _ELEMENTS.items() if number == element)
    return (
        mask.new_empty(mask.shape if to_scores else [0], dtype=dtype),
        mask.new_empty(weights.shape),
        mask.new_empty(weights.shape if to_temperature else [0]),
    )


vmap.register("soft_topk")
vmap.register("soft_topk_backward")
