"""The definition of attention in plain torch, evaluated in float64: the oracle every other backend is held against.

Written from `pyattn.spec` and nothing else. It holds [b, h, m, n] matrices, so `auto` never chooses it.
It is differentiable torch code throughout: double backward, forward-mode AD and vmap work by torch's own rules.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pyattn import dropout
from pyattn.backends import Backend, Proof
from pyattn.spec import FEATURES, AttentionSpec, Grads, Inputs, Results, band_distances


class ReferenceBackend(Backend):
    name = "reference"
    devices = frozenset({"cpu", "cuda"})
    dtypes = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64})
    features = frozenset(FEATURES)
    max_head_dim = 1 << 30
    proof = Proof(source="is the definition", compiled="", hardware="")

    def unavailable(self) -> str | None:
        return None

    def forward(self, spec: AttentionSpec, x: Inputs) -> Results:
        out, lse = definition(spec, cast(x, torch.float64))
        lse = lse.to(spec.accumulator)
        return Results(out.to(spec.dtype), lse, lse, lse)  # its backward needs none of them

    def backward(
        self,
        spec: AttentionSpec,
        x: Inputs,
        y: Results,
        d_out: Tensor,
        d_lse: Tensor | None,
        bias_gradient: bool,
    ) -> Grads:
        grads = gradients(spec, cast(x, torch.float64), d_out, d_lse, like=x)
        return grads if bias_gradient else grads._replace(bias=None)

    def workspace_bytes(self, spec: AttentionSpec) -> tuple[int, int]:
        # Scores, visibility, probabilities and their dropped copy in float64; the backward doubles them.
        matrix = 8 * spec.b * spec.h * spec.m * spec.n
        return 4 * matrix, 8 * matrix


def definition(spec: AttentionSpec, x: Inputs) -> tuple[Tensor, Tensor]:
    """out [b, h, m, dv] and lse [b, h, m], each operation in the dtype of x.q or, up to the weights, a wider bias's."""
    see = visible(spec, x)  # [b, h, m, n]
    k, v = keys_and_values(spec, x, see)
    p, lse = weights(spec, x, scores(spec, x, k).masked_fill(~see, -torch.inf))
    if spec.dropout_p > 0:
        p = p * dropout_keep(spec, x) / (1 - spec.dropout_p)
    return p.to(v.dtype) @ v, lse


def weights(spec: AttentionSpec, x: Inputs, s: Tensor) -> tuple[Tensor, Tensor]:
    """softmax of the logits s [b, h, m, n] and the head's sink, where -inf is not seen. Returns p [b, h, m, n], lse."""
    # One more column for the sink logit. Without sinks it is -inf, which also gives n = 0 a column to reduce over.
    extra = s.new_full((spec.h,), -torch.inf) if x.sinks is None else x.sinks.to(s.dtype)
    s = torch.cat([s, extra.view(-1, 1, 1).expand(spec.b, spec.h, spec.m, 1)], -1)
    sees_any = (s != -torch.inf).any(-1, keepdim=True)
    s = torch.where(sees_any, s, 0.0)  # keeps an empty row's gradients finite; its results are replaced below
    p = torch.where(sees_any, torch.softmax(s, -1), 0.0)[..., : spec.n]
    # torch has exp(s - lse) for the gradient of logsumexp: not p, where lse is so large that log(n) is lost in it.
    largest = s.detach().amax(-1, keepdim=True)
    largest = torch.where(largest.isfinite(), largest, 0.0)
    lse = largest + torch.logsumexp(s - largest, -1, keepdim=True)
    return p, torch.where(sees_any, lse, -torch.inf).squeeze(-1)


def gradients(spec: AttentionSpec, x: Inputs, d_out: Tensor, d_lse: Tensor | None, like: Inputs) -> Grads:
    """Gradients of the definition at x by torch's autograd, rounded to the dtypes of `like`."""
    names = [name for name in Grads._fields if getattr(x, name) is not None]
    leaves = {name: getattr(x, name).detach().requires_grad_() for name in names}
    with torch.enable_grad():
        out, lse = definition(spec, x._replace(**leaves))
        loss = (out * d_out.to(out.dtype)).sum()
        if d_lse is not None:
            loss = loss + (torch.where(lse == -torch.inf, 0.0, lse) * d_lse.to(lse.dtype)).sum()
    found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True, materialize_grads=True)
    return Grads(**{name: g.to(getattr(like, name).dtype) for name, g in zip(names, found, strict=True)})


def visible(spec: AttentionSpec, x: Inputs) -> Tensor:
    """The one predicate of who sees whom. Returns bool [b, h, m, n]."""
    at = places(spec, x)
    see = (at.q_sequence[:, None, :, None] == at.k_sequence[:, None, None, :]).expand(spec.b, spec.h, spec.m, spec.n)
    if spec.left is not None:
        see = see & (at.j >= at.own_j - spec.left)
    if spec.right is not None:
        see = see & (at.j <= at.own_j + spec.right)
    if x.key_lengths is not None:
        see = see & (at.j < x.key_lengths.view(-1, 1, 1, 1))
    if x.q_segments is not None and x.k_segments is not None:
        see = see & (x.q_segments[:, None, :, None] == x.k_segments[:, None, None, :])
    if x.q_ranks is not None and x.k_ranks is not None:
        see = see & (x.q_ranks[:, None, :, None] > x.k_ranks[:, None, None, :])
    if x.row_first is not None and x.row_stop is not None:
        see = see & (at.j >= x.row_first[:, None, :, None]) & (at.j < x.row_stop[:, None, :, None])
    if x.mask is not None:
        see = see & x.mask
    return see


def scores(spec: AttentionSpec, x: Inputs, k: Tensor) -> Tensor:
    """The logits before masking. k: [b, h, n, d], already repeated over its group. Returns [b, h, m, n]."""
    if x.relative_k is not None:
        s = spec.scale * (x.q @ k.transpose(-1, -2) + relative(spec, x))
    elif x.weight is None:
        s = spec.scale * (x.q @ k.transpose(-1, -2))
    else:
        s = spec.scale * (hidden(x, k) * x.weight[:, None, None]).sum(-1)
    if spec.softcap is not None:
        s = spec.softcap * torch.tanh(s / spec.softcap)
    if x.bias is not None:
        s = s + x.bias
    if x.alibi_slopes is not None:
        at = places(spec, x)
        slopes = x.alibi_slopes[at.q_sequence].transpose(1, 2)[..., None]  # [b, h, 1|m, 1]
        s = s - slopes.to(s.dtype) * (at.own_j - at.j).abs().to(s.dtype)
    return s


def relative(spec: AttentionSpec, x: Inputs) -> Tensor:
    """relative_q_i . relative_k of the distance from key j to query i, [b, h, m, n]; 0 where there is no such row."""
    assert x.relative_q is not None
    products = x.relative_q @ band_rows(spec, x).transpose(-1, -2)  # [b, h, m, distances]
    row, has = distance_rows(spec, x)
    products = torch.nn.functional.pad(products, (0, 1))  # a column of zeros
    return products.gather(-1, torch.where(has, row, products.shape[-1] - 1).expand(spec.b, spec.h, spec.m, spec.n))


def band_rows(spec: AttentionSpec, x: Inputs) -> Tensor:
    """relative_k, with 0 for distances that no pair inside the band has: a NaN there goes nowhere."""
    assert x.relative_k is not None
    return torch.where(in_band(spec, x), x.relative_k, 0.0)


def in_band(spec: AttentionSpec, x: Inputs) -> Tensor:
    """Which rows of relative_k are of distances that a pair inside the band has, bool [distances, 1]."""
    assert spec.relative is not None and spec.first is not None and spec.offset is not None
    lowest, highest = band_distances(spec.m, spec.n, spec.offset, spec.left, spec.right)
    distance = torch.arange(spec.relative[0], device=x.q.device)[:, None] + spec.first
    return (lowest <= distance) & (distance <= highest)


def distance_rows(spec: AttentionSpec, x: Inputs) -> tuple[Tensor, Tensor]:
    """The row of relative_k for each query and key, int64 [m, n], and whether there is one."""
    assert spec.relative is not None and spec.first is not None
    at = places(spec, x)
    row = at.own_j - at.j - spec.first
    return row, (row >= 0) & (row < spec.relative[0])


def hidden(x: Inputs, k: Tensor) -> Tensor:
    """tanh(q_i + k_j) of additive scores, [b, h, m, n, d]."""
    return torch.tanh(x.q[:, :, :, None] + k[:, :, None])


def dropout_keep(spec: AttentionSpec, x: Inputs) -> Tensor:
    """Which weights dropout keeps: bool [b, h, m, n]."""
    assert x.seed is not None
    at = places(spec, x)
    h = torch.arange(spec.h, device=x.q.device).view(-1, 1)
    return dropout.keep(x.seed, spec.dropout_p, at.q_sequence[:, None], h, at.i, spec.n)[..., at.j]


class Places(NamedTuple):
    """Where queries and keys stand: in which sequence, and where inside it. A batch entry is a sequence, too."""

    q_sequence: Tensor  # int64 [b, 1|m]
    k_sequence: Tensor  # int64 [b, 1|n]
    i: Tensor  # int64 [m]
    own_j: Tensor  # int64 [m, 1] or [b, 1, m, 1], the key position at which a query stands: i + offset
    j: Tensor  # int64 [n]


def places(spec: AttentionSpec, x: Inputs) -> Places:
    i, j = (torch.arange(length, device=x.q.device) for length in (spec.m, spec.n))
    if x.cu_seqlens_q is None or x.cu_seqlens_k is None:
        b = torch.arange(spec.b, device=x.q.device).view(-1, 1)
        if spec.offset is not None:
            return Places(b, b, i, i.view(-1, 1) + spec.offset, j)
        assert x.key_lengths is not None
        return Places(b, b, i, i.view(-1, 1) + x.key_lengths.view(-1, 1, 1, 1) - spec.m, j)
    cu_q, cu_k = x.cu_seqlens_q.long(), x.cu_seqlens_k.long()
    # How many sequences end at or before a row: one without rows ends where it starts, and is passed over.
    of_q, of_k = torch.searchsorted(cu_q[1:], i, right=True), torch.searchsorted(cu_k[1:], j, right=True)
    i, j = i - cu_q[of_q], j - cu_k[of_k]
    own_j = i + (cu_k.diff() - cu_q.diff())[of_q]
    return Places(of_q[None], of_k[None], i, own_j.view(-1, 1), j)


def cast(x: Inputs, dtype: torch.dtype) -> Inputs:
    """x with every floating tensor in `dtype`."""
    return Inputs._make(t.to(dtype) if t is not None and t.is_floating_point() else t for t in x)


def keys_and_values(spec: AttentionSpec, x: Inputs, see: Tensor) -> tuple[Tensor, Tensor]:
    """k and v, [b, h, n, *]: out of their pages, one for each query head, and 0 where nobody sees them."""
    k, v = _in_a_row(x)
    group = spec.h // spec.hk
    seen = see.unflatten(1, (spec.hk, group)).any((2, 3))[..., None]  # a NaN that is not seen goes nowhere
    return torch.where(seen, k, 0.0).repeat_interleave(group, 1), torch.where(seen, v, 0.0).repeat_interleave(group, 1)


def _in_a_row(x: Inputs) -> tuple[Tensor, Tensor]:
    """k and v with their pages in a row, [b, hk, n, *].

    What the table says behind a batch element's length is without meaning.
    """
    if x.block_table is None:
        return x.k, x.v
    k, v = x.k, x.v
    if len(k) == 0:  # then no batch element has a key
        k, v = (t.new_zeros(1, *t.shape[1:]) for t in (k, v))
    pages = x.block_table.long().clamp(0, len(k) - 1)
    return k[pages].transpose(1, 2).flatten(2, 3), v[pages].transpose(1, 2).flatten(2, 3)
