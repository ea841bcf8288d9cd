"""Hard attention: a query reads one key's value, drawn with the probabilities that soft attention has for weights.

    j_i     ~ p_ij = softmax of s_i over the visible j
    out_i   = v_{j_i}
    log p   = s_{i j_i} - lse_i
    H_i     = lse_i - mu_i,   mu_i = sum_j p_ij s_ij

The draw is argmax_j (s_ij + G_ij) with Gumbel noise G (Maddison et al. 2014, arXiv:1411.0030). Its random words are
Philox's at the weight's place, those of dropout (`pyattn.spec`): the same on every device and backend. The scores of a
draw are in memory for some queries at a time, with all their keys. What has a gradient is fused: lse and mu_i,
which is scale * q_i . k'_i with k' of attention that has the keys for values: an average of products is a product
with an average.

A choice has no derivative. There are two ways around that: `reinforcement`, whose estimate of the gradient is unbiased,
and the straight-through Gumbel-softmax, whose variance is small (Jang et al. 2017, arXiv:1611.01144).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple, SupportsFloat

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pyattn import check, core, dropout
from pyattn.backends import reference
from pyattn.check import RangeError, ShapeError
from pyattn.spec import AttentionSpec, Inputs, Numbers

_BY_QUERY = ("q_segments", "q_ranks", "row_first", "row_stop")  # of `Inputs`, [b, m]
_SCORES_AT_ONCE = 2**20  # of a draw; noise takes some ten numbers of 64 bits for each


class Chosen(NamedTuple):
    """What hard attention found. A query that sees no key has the index -1, and 0 for all else."""

    out: Tensor  # [b, h, m, dv]
    indices: Tensor  # int64 [b, h, m], the key; -1 also where the whole batch element was soft
    log_prob: Tensor  # [b, h, m], of that index, float32 (float64 of float64), differentiable; 0 where it is -1
    entropy: Tensor  # [b, h, m], of the probabilities, in the same dtype, differentiable


def hard_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None = None,
    causal: bool = False,
    window: Sequence[int | None] | None = None,
    key_lengths: Tensor | None = None,
    segment_ids: tuple[Tensor, Tensor] | None = None,
    ranks: tuple[Tensor, Tensor] | None = None,
    row_windows: tuple[Tensor, Tensor] | None = None,
    scale: SupportsFloat | None = None,
    greedy: bool = False,
    temperature: SupportsFloat | None = None,
    soft: Tensor | None = None,
    seed: int | Tensor | None = None,
    backend: str = "auto",
) -> Chosen:
    """One value for each query, chosen by the scores scale * q . k. Memory is linear in m and n.

    Args:
        q: [b, h, m, d] float16, bfloat16, float32 or float64.
        k: [b, hk, n, d] in q's dtype; hk divides h.
        v: [b, hk, n, dv] in q's dtype.
        mask, causal, window, key_lengths, segment_ids, ranks, row_windows, scale: as for `pyattn.attention`.
        greedy: take the most probable key, as inference does, and draw nothing.
        temperature: of the straight-through Gumbel-softmax: the gradient of out is then that of
            softmax((s + G) / temperature) @ v by the scores, with the noise G of the draw; by v it is the chosen row's
            alone, as always. None: out has no gradient by the scores.
        soft: bool [b], batch elements with the expectation for out, that is `pyattn.attention`, and nothing chosen.
        seed: int or int64 scalar tensor of the draw; from torch's generator by default. Dropout of the same seed would
            be of the same bits.
        backend: as for `pyattn.attention`, of lse and of what is soft.

    Returns:
        Chosen. The gradients of log_prob and entropy are exact, those of q and k.

    Raises:
        ShapeError, DtypeError, DeviceError, RangeError, UnsupportedError: as `pyattn.attention`.

    Source: Xu et al. 2015, arXiv:1502.03044, section 4.1.
    """
    x, numbers = core.prepare(
        q, k, v, mask=mask, causal=causal, window=window, key_lengths=key_lengths, segment_ids=segment_ids, ranks=ranks,
        row_windows=row_windows, scale=scale,
    )  # fmt: skip
    _check_soft(soft, x.q)
    tau, noise = _checked_temperature(temperature), None if greedy else check.check_seed(seed, x.q.device)
    wide = reference.cast(x, torch.promote_types(x.q.dtype, torch.float32))
    with check.without_autocast(x.q.device.type):
        # Of 16 bits a mean key would be too coarse: entropy is the difference of what may be large numbers.
        mean_key, lse = core.run(wide._replace(v=wide.k), numbers, backend)
        with torch.no_grad():
            parts = _in_parts(wide, numbers)
            index = torch.cat([_largest(_perturbed(_logits(part), noise, part.first)) for part in parts], 2)
        out = _rows_at(x.v, index)
        if tau is not None:
            out = _straight_through(out, _Relaxed.apply(wide.q, wide.k, wide, numbers, noise, tau))
        chosen_score = numbers.scale * (wide.q * _rows_at(wide.k, index)).sum(-1)
        mean_score = numbers.scale * (wide.q * mean_key).sum(-1)
        expected = None if soft is None else core.run(x, numbers, backend)[0]
    return _chosen(out, index, chosen_score - lse, lse - mean_score, expected, soft)


def hard_attention_of_scores(
    scores: Tensor,
    v: Tensor,
    *,
    key_lengths: Tensor | None = None,
    greedy: bool = False,
    temperature: SupportsFloat | None = None,
    soft: Tensor | None = None,
    seed: int | Tensor | None = None,
) -> Chosen:
    """`hard_attention` by scores of any kind that are in memory, such as those of one step of a decoder.

    Args:
        scores: [b, h, m, n], -inf for a key that is not visible.
        v: [b, hk, n, dv]; hk divides h.
        key_lengths: integer [b]; batch element b sees its first key_lengths[b] keys.
        greedy, temperature, soft, seed: as for `hard_attention`, which chooses the same keys by the same scores.

    Returns:
        Chosen. All the gradients of `hard_attention`, by the scores.

    Raises:
        ShapeError, DtypeError, DeviceError, RangeError: an argument does not fit.
    """
    _check_scores(scores, v, key_lengths)
    _check_soft(soft, scores)
    tau, noise = _checked_temperature(temperature), None if greedy else check.check_seed(seed, scores.device)
    s, j = scores.to(torch.promote_types(scores.dtype, torch.float32)), torch.arange(v.shape[2], device=v.device)
    if key_lengths is not None:
        s = s.masked_fill(j >= key_lengths.view(-1, 1, 1, 1), -torch.inf)
    with check.without_autocast(scores.device.type):
        wide = v.to(s.dtype).repeat_interleave(scores.shape[1] // v.shape[1], 1)
        # What nobody sees may be anything, and 0 times it NaN.
        wide = wide.masked_fill(~(s > -torch.inf).any(2)[..., None], 0.0)
        index = _largest(_perturbed(s.detach(), noise, 0))
        out = _rows_at(v, index)
        if tau is not None:
            out = _straight_through(out, _relaxed(s, noise, 0, tau) @ wide.detach())
        p, log_p = _softmax(s), torch.where(index[..., None] < 0, 0.0, s).log_softmax(-1)
        log_prob = torch.where(j == index[..., None], log_p, 0.0).sum(-1)
        entropy = -(p * log_p.masked_fill(s == -torch.inf, 0.0)).sum(-1)
        expected = None if soft is None else p @ wide
    return _chosen(out, index, log_prob, entropy, expected, soft)


def reinforcement(
    log_likelihood: Tensor,
    log_prob: Tensor,
    entropy: Tensor,
    baseline: Tensor,
    *,
    weight: float = 1.0,
    entropy_weight: float = 0.0,
) -> Tensor:
    """REINFORCE: what to add to the loss -log_likelihood, so that choices learn, too. Its value has no meaning.

    The gradient is -weight * (log_likelihood - baseline) * d log_prob - entropy_weight * d entropy, of which the first
    part is an unbiased estimate of what the expectation over the choices would have, whatever the baseline, as long as
    that knows nothing of them.

    Args:
        log_likelihood: [b], what came of a batch element's choices: log p of its answer.
        log_prob, entropy: [b, ...], of its choices.
        baseline: scalar, what log_likelihood is on average: `next_baseline`.
        weight, entropy_weight: the paper's lambda_r and lambda_e.
    Returns:
        [b]
    Source: Williams 1992; Xu et al. 2015, arXiv:1502.03044, the last equation of section 4.1.
    """
    advantage = log_likelihood.detach() - baseline
    return -weight * advantage * log_prob.flatten(1).sum(1) - entropy_weight * entropy.flatten(1).sum(1)


def half(b: int, device: torch.device) -> Tensor:
    """bool [b], half of it true: a training step's `soft`, by which choices also learn from the expectation.

    Drawn anew for each call. Source: Xu et al. 2015, section 4.1, the second way to reduce the estimate's variance.
    """
    return torch.rand(b, device=device) < 0.5


def check_temperature(hard: bool, temperature: float | None) -> None:
    """Of a model's configuration: hard attention or not, and its temperature."""
    if temperature is not None and not (hard and 0 < temperature < math.inf):
        wanted = "a positive number" if hard else "None without hard attention"
        raise RangeError(f"temperature: expected {wanted}, got {temperature}")


def next_baseline(baseline: Tensor, log_likelihood: Tensor) -> Tensor:
    """The moving average 0.9 * baseline + 0.1 * the mean of log_likelihood [b] (Xu et al. 2015, section 4.1)."""
    return 0.9 * baseline + 0.1 * log_likelihood.detach().mean()


class _Part(NamedTuple):
    """A call of some of the queries, and the place of the first of them."""

    x: Inputs
    numbers: Numbers
    first: int


def _in_parts(x: Inputs, numbers: Numbers) -> Iterator[_Part]:
    """A call, so many queries at a time that their scores are few; with none, one part without any."""
    b, h, m, _ = x.q.shape
    rows = max(1, _SCORES_AT_ONCE // max(1, b * h * x.n))
    for first in range(0, max(m, 1), rows):
        chosen = slice(first, first + rows)
        mask = x.mask if x.mask is None or x.mask.shape[2] == 1 else x.mask[:, :, chosen]
        by_query = {name: getattr(x, name)[:, chosen] for name in _BY_QUERY if getattr(x, name) is not None}
        part = x._replace(q=x.q[:, :, chosen], mask=mask, **by_query)
        yield _Part(part, numbers._replace(offset=(numbers.offset or 0) + first), first)


def _logits(part: _Part) -> Tensor:
    """The scores [b, h, m, n] of some queries by the definition, -inf where a key is not visible."""
    spec = AttentionSpec.of(part.x, part.numbers)
    see = reference.visible(spec, part.x)
    k, _ = reference.keys_and_values(spec, part.x, see)
    return reference.scores(spec, part.x, k).masked_fill(~see, -torch.inf)


class _Relaxed(torch.autograd.Function):
    """softmax((s + G) / temperature) @ v of a call, with gradients for q and k alone, which compute the scores again.

    Not by torch.utils.checkpoint, part by part: its peak of memory grew with m n, to 1.3 GB for m = n = 8192.
    """

    @staticmethod
    def forward(
        ctx, q: Tensor, k: Tensor, x: Inputs, numbers: Numbers, noise: Tensor | None, temperature: float
    ) -> Tensor:
        ctx.save_for_backward(noise, *x._replace(q=q, k=k))
        ctx.numbers, ctx.temperature = numbers, temperature
        return torch.cat([_relaxed_part(part, noise, temperature) for part in _in_parts(x, numbers)], 2)

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out: Tensor) -> tuple[Tensor | None, ...]:
        noise, *tensors = ctx.saved_tensors  # which raises where one of them has changed since
        call = Inputs(*tensors)
        d_q, d_k = [], torch.zeros_like(call.k)
        for part in _in_parts(call, ctx.numbers):
            given = part.x.q.detach().requires_grad_(), call.k.detach().requires_grad_()
            with torch.enable_grad():
                x = part.x._replace(q=given[0], k=given[1], v=call.v.detach())
                out = _relaxed_part(part._replace(x=x), noise, ctx.temperature)
            rows = slice(part.first, part.first + out.shape[2])
            of_q, of_k = torch.autograd.grad(out, given, d_out[:, :, rows])
            d_q.append(of_q)
            d_k += of_k
        return torch.cat(d_q, 2), d_k, None, None, None, None


def _relaxed_part(part: _Part, noise: Tensor | None, temperature: float) -> Tensor:
    spec = AttentionSpec.of(part.x, part.numbers)
    _, v = reference.keys_and_values(spec, part.x, reference.visible(spec, part.x))
    return _relaxed(_logits(part), noise, part.first, temperature) @ v


def _relaxed(s: Tensor, noise: Tensor | None, first: int, temperature: float) -> Tensor:
    """The Gumbel-softmax of s, in its dtype."""
    return _softmax(_perturbed(s, noise, first), temperature).to(s.dtype)


def _perturbed(s: Tensor, noise: Tensor | None, first: int) -> Tensor:
    """s [b, h, m, n], the first query of which is number `first`, with Gumbel noise of the seed `noise`, if any.

    In float64, in which every word has a number of its own between 0 and 1.
    """
    if noise is None:
        return s
    b, h, i = (torch.arange(size, device=s.device) for size in s.shape[:3])
    words = dropout.words(noise, b[:, None, None], h[:, None], i + first, s.shape[3])
    uniform = (words.double() + 0.5) / 2**32
    return s - (-uniform.log()).log()


def _largest(s: Tensor) -> Tensor:
    """Of each row of s [b, h, m, n] the index of a largest element; -1 where all are -inf."""
    if s.shape[3] == 0:
        return torch.full(s.shape[:3], -1, device=s.device)
    largest, index = s.max(-1)
    return index.masked_fill(largest == -torch.inf, -1)


def _softmax(s: Tensor, temperature: float = 1.0) -> Tensor:
    """Of s / temperature over the last dimension; 0 in rows that are -inf throughout."""
    if s.shape[-1] == 0:
        return s
    largest = s.detach().amax(-1, keepdim=True)
    is_empty = largest == -torch.inf
    # Before the division, which may make numbers infinite.
    s = (s - largest.masked_fill(is_empty, 0.0)) / temperature
    return s.masked_fill(is_empty, 0.0).softmax(-1).masked_fill(is_empty, 0.0)


def _rows_at(t: Tensor, index: Tensor) -> Tensor:
    """Rows index [b, h, m] of t [b, hk, n, d], of each head's own key head: [b, h, m, d]. 0 where the index is -1."""
    (b, hk, n, d), (_, h, m) = t.shape, index.shape
    if n == 0:
        return t.new_zeros(b, h, m, d)
    of_group = index.reshape(b, hk, h // hk * m, 1).clamp(min=0).expand(-1, -1, -1, d)
    return t.gather(2, of_group).view(b, h, m, d).masked_fill(index[..., None] < 0, 0.0)


def _straight_through(out: Tensor, relaxed: Tensor) -> Tensor:
    """out, with the gradient of `relaxed` beside its own."""
    return out + (relaxed - relaxed.detach()).to(out.dtype)


def _chosen(
    out: Tensor, index: Tensor, log_prob: Tensor, entropy: Tensor, expected: Tensor | None, soft: Tensor | None
) -> Chosen:
    """The parts of a result, 0 in rows that see nothing; in soft batch elements the expected values, and no choice."""
    entropy = torch.where(index < 0, 0.0, entropy)
    if soft is not None and expected is not None:
        out = torch.where(soft[:, None, None, None], expected.to(out.dtype), out)
        index = index.masked_fill(soft[:, None, None], -1)
    return Chosen(out, index, torch.where(index < 0, 0.0, log_prob), entropy)


def _checked_temperature(temperature: SupportsFloat | None) -> float | None:
    if temperature is None:
        return None
    if not 0 < check.number("temperature", temperature) < torch.inf:
        raise RangeError(f"temperature: expected a positive number (None for no gradient by scores), got {temperature}")
    return float(temperature)


def _check_soft(soft: Tensor | None, q: Tensor) -> None:
    if soft is None:
        return
    check.check_tensor("soft", soft, (torch.bool,), q)
    if soft.shape != q.shape[:1]:
        raise ShapeError(f"soft: expected [b={len(q)}], got {list(soft.shape)}")


def _check_scores(scores: Tensor, v: Tensor, key_lengths: Tensor | None) -> None:
    check.check_tensor("scores", scores, check.DTYPES, scores)
    check.check_tensor("v", v, check.DTYPES, scores)
    if scores.dim() != 4:
        raise ShapeError(f"scores: expected [b, h, m, n], got {list(scores.shape)}")
    b, h, _, n = scores.shape
    if v.dim() != 4 or (v.shape[0], v.shape[2]) != (b, n) or v.shape[1] == 0 or h % v.shape[1]:
        raise ShapeError(f"v: expected [b={b}, hk, n={n}, dv] with hk dividing h={h}, got {list(v.shape)}")
    if key_lengths is not None:
        check.check_integers("key_lengths", key_lengths, (b,), scores)
        check.check_lengths(key_lengths, v.shape[2])
