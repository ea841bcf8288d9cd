"""The error that rounding leads one to expect in attention and its gradients, to first order.

Every operation rounds its result, by a random part of about one unit in the last place of the accumulator's dtype. Such
errors are independent, so that their squares add up: a sum has one square of each of its terms, also where the terms
cancel; q . k and d_out . v have two, one for multiplications and one for additions. A number that comes from another
takes over its error times the derivative. Two roundings are not random, and are taken as they are: fused kernels take
delta = d_out . out from an `out` in q's dtype, and torch takes the derivative of lse from exp(score - lse), in which a
large lse has lost the end of its logarithm.

The square of an error of x is called `of_x2`, in units of the accumulator's eps. Shapes are the definition's.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pyattn.backends import reference
from pyattn.spec import AttentionSpec, Inputs


def expected_errors(spec: AttentionSpec, x: Inputs, d_out: Tensor, d_lse: Tensor) -> dict[str, Tensor]:
    """The errors of out, lse, d_q, d_k and d_v, and where x has them of d_bias, d_sinks and d_weight.

    They are in units of the accumulator's eps, and not finite where their squares are too large for float64.

    Args:
        x: float64 tensors.
        d_out, d_lse: float64 gradients [b, h, m, dv] and [b, h, m].
    """
    f = _forward(spec, x)
    g = _score_gradients(spec, f, d_out, d_lse)
    d_product, of_product2 = _through_softcap(spec, f, g)
    found = {
        "out": f.of_kept2 @ f.v.square(),
        "lse": f.of_lse2 + f.of_log2,
        "d_v": _over_groups(spec, f.of_kept2.transpose(-1, -2) @ d_out.square()),
    }
    if x.relative_q is not None and x.relative_k is not None:
        found |= _of_relative(spec, x, x.relative_q, reference.band_rows(spec, x), of_product2)
    if x.weight is None or f.hidden is None:
        of_q2, of_k2 = of_product2 @ f.k.square(), of_product2.transpose(-1, -2) @ x.q.square()
    else:
        slope = 1 - f.hidden.square()  # of a tanh, whose own error it doubles where that is near 1
        of_slope2 = 5 * f.hidden**4 + slope.square()
        terms2 = of_product2[..., None] * slope.square() + d_product.square()[..., None] * of_slope2
        terms2 = terms2 * x.weight[:, None, None].square()
        of_q2, of_k2 = terms2.sum(3), terms2.sum(2)
        of_terms2 = (of_product2 + d_product.square())[..., None] * f.hidden.square()
        found["d_weight"] = spec.scale**2 * of_terms2.sum((0, 2, 3))
    found |= {"d_q": spec.scale**2 * of_q2, "d_k": spec.scale**2 * _over_groups(spec, of_k2)}
    if x.bias is not None:
        of_bias2 = g.of_ds2
        if x.bias.shape[-1] == 1:  # all keys of a row have one error of delta
            shared = f.p.sum(-1, keepdim=True).square() - f.p.square().sum(-1, keepdim=True)
            of_bias2 = of_bias2.sum(-1, keepdim=True) + shared * g.of_row2[..., None]
        found["d_bias"] = of_bias2.sum_to_size(x.bias.shape)
    if x.sinks is not None:
        sinks = torch.where(x.sinks == -torch.inf, 0.0, x.sinks)[:, None]
        p = torch.where(x.sinks[:, None] == -torch.inf, 0.0, (sinks - f.lse).exp())  # [b, h, m]
        of_p2 = p.square() * (1 + sinks.square() + f.lse.square() + f.of_lse2)
        of_terms2 = p.square() * g.of_delta2 + of_p2 * g.delta.square()
        found["d_sinks"] = of_terms2.sum((0, 2)) + _of_additions2((p * g.delta).transpose(0, 1).flatten(1))
    return {name: of_x2.sqrt() for name, of_x2 in found.items()}


class _Forward(NamedTuple):
    k: Tensor  # [b, h, n, d]
    v: Tensor  # [b, h, n, dv]
    hidden: Tensor | None  # [b, h, m, n, d], of additive scores
    product: Tensor  # [b, h, m, n], scores before scale
    of_s2: Tensor  # [b, h, m, n], of the product alone
    p: Tensor  # [b, h, m, n]
    of_p2: Tensor
    keep: Tensor  # [b, h, m, n], by what dropout multiplies a weight
    of_kept2: Tensor
    lse: Tensor  # [b, h, m], 0 of a row that sees nothing
    of_lse2: Tensor  # [b, h, m]
    of_log2: Tensor  # [b, h, m], of lse, the sum of the row's largest score and a logarithm, which may cancel
    lost2: Tensor  # [b, h, m], the square of what lse has lost when that sum was rounded


def _forward(spec: AttentionSpec, x: Inputs) -> _Forward:
    see = reference.visible(spec, x)
    k, v = reference.keys_and_values(spec, x, see)
    s = reference.scores(spec, x, k).masked_fill(~see, -torch.inf)
    p, lse = reference.weights(spec, x, s)
    if x.weight is None:
        hidden, product = None, x.q @ k.transpose(-1, -2)
        terms2 = x.q.square() @ k.square().transpose(-1, -2)
        if x.relative_q is not None and x.relative_k is not None:
            squared = x._replace(relative_q=x.relative_q.square(), relative_k=x.relative_k.square())
            product, terms2 = product + reference.relative(spec, x), terms2 + reference.relative(spec, squared)
    else:
        hidden, weight = reference.hidden(x, k), x.weight[:, None, None]
        product, terms2 = (hidden * weight).sum(-1), (hidden * weight).square().sum(-1)
    of_s2 = 2 * spec.scale**2 * terms2
    sink = s.new_full((spec.h,), -torch.inf) if x.sinks is None else x.sinks
    largest = torch.maximum(s.amax(-1) if spec.n else torch.full_like(lse, -torch.inf), sink[:, None])
    largest = torch.where(lse == -torch.inf, 0.0, largest)
    log_sum = torch.logaddexp((s - largest[..., None]).logsumexp(-1), sink[:, None] - largest)
    s, lse, log_sum = (torch.where(t == -torch.inf, 0.0, t) for t in (s, lse, log_sum))
    held = largest.to(spec.accumulator).double()
    lost = (held - (held + log_sum).to(spec.accumulator) + log_sum) / torch.finfo(spec.accumulator).eps
    # By the softmax's derivative p takes over 1 - p of its own score's error and p of each other's, so that a weight of
    # 1 has nothing of either. The score itself is rounded, too, when its terms have been summed.
    own2 = s.square() + of_s2
    of_lse2 = (p.square() * own2).sum(-1, keepdim=True)
    of_p2 = p.square() * (1 + (1 - p).square() * own2 - p.square() * own2 + of_lse2)
    keep = reference.dropout_keep(spec, x) / (1 - spec.dropout_p) if spec.dropout_p > 0 else torch.ones_like(p)
    of_log2 = log_sum.square() + (lse - log_sum).square() + lse.square()
    return _Forward(
        k, v, hidden, product, of_s2, p, of_p2, keep, of_p2 * keep.square(), lse, of_lse2.squeeze(-1), of_log2,
        lost.square(),
    )  # fmt: skip


class _ScoreGradients(NamedTuple):
    d_s: Tensor  # [b, h, m, n]
    of_ds2: Tensor
    of_row2: Tensor  # [b, h, m], what of_ds2 has from delta, by p2
    delta: Tensor  # [b, h, m], d_out . out - d_lse
    of_delta2: Tensor


def _score_gradients(spec: AttentionSpec, f: _Forward, d_out: Tensor, d_lse: Tensor) -> _ScoreGradients:
    out = (f.p * f.keep) @ f.v
    delta = (d_out * out).sum(-1) - d_lse
    d_p = d_out @ f.v.transpose(-1, -2) * f.keep
    products2 = d_out.square() @ f.v.square().transpose(-1, -2)
    of_out = (out.to(spec.dtype) - out) / torch.finfo(spec.accumulator).eps
    of_delta2 = (f.of_kept2 * products2).sum(-1) + d_lse.square()
    of_delta2 = of_delta2 + (d_out * out).square().sum(-1) + (d_out * of_out).sum(-1).square()
    of_dp2 = 2 * products2 * f.keep.square()
    away = d_p - delta[..., None]
    of_row2 = of_delta2 + f.lost2 * d_lse.square()
    of_ds2 = f.of_p2 * away.square() + f.p.square() * (of_dp2 + of_row2[..., None])
    return _ScoreGradients(f.p * away, of_ds2, of_row2, delta, of_delta2)


def _through_softcap(spec: AttentionSpec, f: _Forward, g: _ScoreGradients) -> tuple[Tensor, Tensor]:
    """The gradient of scale * product, and the square of its error. A rounded score has another slope of the cap."""
    if spec.softcap is None:
        return g.d_s, g.of_ds2
    t = torch.tanh(spec.scale / spec.softcap * f.product)
    slope = 1 - t.square()
    of_slope2 = 1 + (2 / spec.softcap * t * slope).square() * f.of_s2
    return slope * g.d_s, slope.square() * g.of_ds2 + of_slope2 * g.d_s.square()


def _of_relative(
    spec: AttentionSpec, x: Inputs, relative_q: Tensor, relative_k: Tensor, of_product2: Tensor
) -> dict[str, Tensor]:
    """Of the squares of errors that a relative term's gradients take over from those of the products."""
    assert spec.relative is not None
    row, has = reference.distance_rows(spec, x)
    of_rows2 = of_product2.new_zeros(spec.b, spec.h, spec.m, spec.relative[0] + 1)
    place = torch.where(has, row, spec.relative[0]).expand_as(of_product2)
    of_rows2 = of_rows2.scatter_add(-1, place, of_product2)[..., :-1]
    of_k2 = of_rows2.transpose(-1, -2) @ relative_q.square()
    return {
        "d_relative_q": spec.scale**2 * of_rows2 @ relative_k.square(),
        "d_relative_k": spec.scale**2 * of_k2.sum_to_size(relative_k.shape),
    }


def _of_additions2(terms: Tensor) -> Tensor:
    """The roundings of a sum over the last dimension that adds neighbours, then their sums, and so on."""
    of_sum2 = terms.new_zeros(terms.shape[:-1])
    while terms.shape[-1] > 1:
        terms = torch.nn.functional.pad(terms, (0, terms.shape[-1] % 2)).unflatten(-1, (-1, 2)).sum(-1)
        of_sum2 = of_sum2 + terms.square().sum(-1)
    return of_sum2


def _over_groups(spec: AttentionSpec, t: Tensor) -> Tensor:
    """Sums [b, h, n, *] over the query heads of a key head: [b, hk, n, *]."""
    return t.unflatten(1, (spec.hk, spec.h // spec.hk)).sum(2)
