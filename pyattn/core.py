"""One call on its way from checked arguments to out and lse; every face goes through here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, SupportsFloat

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from pyattn import check, ops, registry
from pyattn.backends.reference import ReferenceBackend
from pyattn.spec import AttentionSpec, Inputs, Numbers, as_packed


def attend(q: Tensor, k: Tensor, v: Tensor, *, backend: str = "auto", **options: Any) -> tuple[Tensor, Tensor]:
    """out and lse of a call in any form that `prepare` takes."""
    return run(*prepare(q, k, v, **options), backend)


def prepare(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    causal: bool = False,
    window: Sequence[int | None] | None = None,
    key_lengths: Tensor | None = None,
    segment_ids: tuple[Tensor, Tensor] | None = None,
    scale: SupportsFloat | None = None,
    softcap: SupportsFloat | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    dropout_p: SupportsFloat = 0.0,
    seed: int | Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    block_table: Tensor | None = None,
    weight: Tensor | None = None,
    exp_keys: Tensor | None = None,
    relative_q: Tensor | None = None,
    relative_k: Tensor | None = None,
    first: int | None = None,
    ranks: tuple[Tensor, Tensor] | None = None,
    row_windows: tuple[Tensor, Tensor] | None = None,
    top_left: bool = False,
    cached: bool = False,
) -> tuple[Inputs, Numbers]:
    """The checked arguments of one call, in the form backends take."""
    if torch._C._is_any_autocast_enabled():
        q, k, v = (t.to(check.autocast_dtype(t)) if isinstance(t, Tensor) else t for t in (q, k, v))
    dropout_p = check.check_dropout(dropout_p)
    left, right = check.check_band(causal, window)
    x = check.check_inputs(
        q, k, v, mask=mask, bias=bias, key_lengths=key_lengths, segment_ids=segment_ids, alibi_slopes=alibi_slopes,
        sinks=sinks, seed=seed, dropout_p=dropout_p, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k,
        block_table=block_table, weight=weight, exp_keys=exp_keys, relative_q=relative_q, relative_k=relative_k,
        ranks=ranks, row_windows=row_windows,
    )  # fmt: skip
    _, _, m, d = x.q.shape
    offset = None if cached else 0 if top_left or x.cu_seqlens_q is not None else x.k.shape[2] - m
    scale = 1.0 if scale is None and weight is not None else check.check_scale(scale, d)
    softcap = check.check_softcap(softcap)
    if x.relative_k is not None:
        first = check.check_distances(first, x, offset, left, right)
    return x, Numbers(scale, offset, left, right, softcap, dropout_p, first)


def run(x: Inputs, numbers: Numbers, backend: str) -> tuple[Tensor, Tensor]:
    """out and lse, for packed sequences as [total_q, h, dv] and [h, total_q]."""
    name = registry.requested(backend)
    if name == ReferenceBackend.name:
        # Plain differentiable torch: outside the operator, torch derives it to any order.
        if not torch.compiler.is_compiling():
            check.check_values(x)
        out, lse, *_ = registry.BACKENDS[name].forward(AttentionSpec.of(x, numbers), x)
    elif forward_ad._current_level >= 0:
        # The operator has no formula for it, and torch would take the tangent to be zero.
        raise check.UnsupportedError(
            'forward-mode AD: expected backend="reference", the fused backends have derivatives in reverse mode only'
        )
    else:
        dv = x.v.shape[3]
        if dv == 0 or x.q.shape[3] == 0:  # no kernel need know sizes of 0: one column of zeros changes nothing
            weight = None if x.weight is None else _with_a_column(x.weight)
            x = x._replace(
                q=_with_a_column(x.q), k=_with_a_column(x.k), v=_with_a_column(x.v), weight=weight, exp_keys=None
            )
        out, lse = ops.attention(x, numbers, name)
        out = out[..., :0] if dv == 0 else out
    return (out, lse) if x.cu_seqlens_q is None else (as_packed(out), lse.squeeze(0))


def _with_a_column(t: Tensor) -> Tensor:
    """t, with a head size of 1 in the place of 0."""
    return F.pad(t, (0, 1)) if t.shape[-1] == 0 else t
