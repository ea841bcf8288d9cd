"""flash_attn's arguments: checked in its own layouts, and turned into those of `pyattn.attention`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from pyattn.check import DtypeError, ShapeError, UnsupportedError, by_names, check_dense, check_scale, number


def check_shape(name: str, t: Any, form: str, *sizes: int | None) -> Tensor:
    """t, which must be a tensor of these sizes, None being any; `form` names them: "b s h d"."""
    check_dense(name, t)
    shape = t.shape
    if len(shape) == len(sizes):
        for have, want in zip(shape, sizes):  # noqa: B905  # strict costs a tenth of the call
            if want is not None and have != want:
                break
        else:
            return t
    named = zip(form.split(), sizes, strict=True)
    expected = ", ".join(letter if size is None else f"{letter}={size}" for letter, size in named)
    raise ShapeError(f"{name}: expected [{expected}], got {list(shape)}")


def options(
    softmax_scale: float | None,
    causal: bool,
    window_size: Sequence[int],
    softcap: float,
    alibi_slopes: Tensor | None,
) -> dict[str, Any]:
    """The options that every function has, as pyattn's; what is not used is left out, which saves a microsecond."""
    given: dict[str, Any] = {"scale": softmax_scale, "causal": causal}
    if softmax_scale is not None:
        by_names({"scale": "softmax_scale"}, check_scale, softmax_scale, 1)
    if (window := _window(window_size)) is not None:
        given["window"] = window
    if not number("softcap", softcap) <= 0:
        given["softcap"] = softcap
    if alibi_slopes is not None:
        given["alibi_slopes"] = alibi_slopes
    return given


def _window(window_size: Sequence[int]) -> tuple[int | None, int | None] | None:
    """flash_attn's window, in which a negative side is unlimited, as pyattn's, in which None is."""
    if isinstance(window_size, tuple) and window_size == (-1, -1):
        return None
    if isinstance(window_size, Tensor):  # as flash_attn's tests draw it
        window_size = window_size.tolist()
    if (
        not isinstance(window_size, (tuple, list))
        or len(window_size) != 2
        or not all(isinstance(side, Integral) for side in window_size)
    ):
        raise DtypeError(f"window_size: expected a pair of ints (left, right), -1 for unlimited, got {window_size!r}")
    left, right = (None if side < 0 else side for side in window_size)
    return None if left is None and right is None else (left, right)


def refuse_with_dropout(dropout_p: float, return_attn_probs: bool, softcap: float | None) -> None:
    """What cannot be had with dropout."""
    if softcap is not None:
        raise UnsupportedError(
            f"softcap: expected 0 with dropout_p={dropout_p}, got {softcap}: flash_attn refuses the two together; "
            "pyattn.attention computes them"
        )
    if return_attn_probs:
        raise UnsupportedError(
            f"return_attn_probs: expected False with dropout_p={dropout_p}, got True: S_dmask would be a matrix of "
            "every query with every key, which no backend holds; pyattn.attention(..., return_lse=True) gives lse"
        )


def without_gradient(
    name: str, tensors: tuple[Tensor | None, ...], call: Callable[..., tuple[Tensor, Tensor]], *given: Any
) -> tuple[Tensor, Tensor]:
    """`call(*given)`, out and lse of a cache, which has no gradients: a backward through them to `tensors` raises."""
    if not (torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in tensors)):
        return call(*given)
    with torch.no_grad():
        out, lse = call(*given)
    return _NoGradient.apply(name, out, lse, *tensors)


class _NoGradient(torch.autograd.Function):
    @staticmethod
    def forward(name: str, out: Tensor, lse: Tensor, *tensors: Tensor | None) -> tuple[Tensor, Tensor]:
        return out, lse

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
        ctx.name = inputs[0]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> None:
        raise UnsupportedError(f"{ctx.name}: expected no backward through its results: a cache has no gradients")
