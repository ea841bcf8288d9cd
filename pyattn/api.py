"""The functions users call."""

from __future__ import annotations

from collections.abc import Sequence
from inspect import signature
from typing import TYPE_CHECKING, Any, Literal, SupportsFloat, overload

import torch
from torch import Tensor

from pyattn import check, core, registry
from pyattn.spec import AttentionSpec, dtype_name

if TYPE_CHECKING:
    from typing_extensions import TypedDict, Unpack

    # What return_lse makes the functions return is said in overloads, and the options of all overloads of one here.
    class SharedOptions(TypedDict, total=False):
        causal: bool
        window: Sequence[int | None] | None
        scale: SupportsFloat | None
        softcap: SupportsFloat | None
        alibi_slopes: Tensor | None
        sinks: Tensor | None
        backend: str

    class CacheOptions(SharedOptions, total=False):
        block_table: Tensor | None

    class VarlenOptions(SharedOptions, total=False):
        dropout_p: SupportsFloat
        seed: int | Tensor | None

    class Options(VarlenOptions, total=False):
        mask: Tensor | None
        bias: Tensor | None
        key_lengths: Tensor | None
        segment_ids: tuple[Tensor, Tensor] | None
        ranks: tuple[Tensor, Tensor] | None
        row_windows: tuple[Tensor, Tensor] | None

    class AdditiveOptions(Options, total=False):
        exp_keys: Tensor | None
        cu_seqlens_q: Tensor | None
        cu_seqlens_k: Tensor | None


@overload
def attention(
    q: Tensor, k: Tensor, v: Tensor, *, return_lse: Literal[False] = False, **options: Unpack[Options]
) -> Tensor: ...
@overload
def attention(
    q: Tensor, k: Tensor, v: Tensor, *, return_lse: Literal[True], **options: Unpack[Options]
) -> tuple[Tensor, Tensor]: ...
@overload
def attention(
    q: Tensor, k: Tensor, v: Tensor, *, return_lse: bool, **options: Unpack[Options]
) -> Tensor | tuple[Tensor, Tensor]: ...
def attention(
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
    ranks: tuple[Tensor, Tensor] | None = None,
    row_windows: tuple[Tensor, Tensor] | None = None,
    scale: SupportsFloat | None = None,
    softcap: SupportsFloat | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    dropout_p: SupportsFloat = 0.0,
    seed: int | Tensor | None = None,
    return_lse: bool = False,
    backend: str = "auto",
    **others: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    """out = softmax(cap(scale * q @ k.T) + bias, over the visible keys) @ v, without an m x n matrix in memory.

    `pyattn.spec` states the definition. A key is visible to a query when every one of `mask`, `causal`, `window`,
    `key_lengths`, `segment_ids`, `ranks` and `row_windows` lets it. A query that sees no key gets 0.

    Args:
        q: [b, h, m, d] float16, bfloat16, float32 or float64.
        k: [b, hk, n, d] in q's dtype; hk divides h, and head i reads key/value head i // (h // hk).
        v: [b, hk, n, dv] in q's dtype.
        mask: bool, broadcastable to [b, h, m, n]; True means attend.
        bias: q's dtype or float32, broadcastable to [b, h, m, n]; added to the scaled (and capped) scores. Its
            gradient is reduced over its broadcast dimensions.
        causal: query i sees keys j <= i + n - m: the last query is aligned with the last key.
        window: (left, right), the number of keys besides one's own that a query sees around i + n - m; None on a
            side is unlimited.
        key_lengths: integer [b]; batch element b sees its first key_lengths[b] keys.
        segment_ids: integer (q_ids [b, m], k_ids [b, n]); a query sees the keys of its own segment.
        ranks: integer (q_ranks [b, m], k_ranks [b, n]); a query sees the keys of lower rank, as in a permuted order.
        row_windows: integer (first [b, m], stop [b, m]); a query sees the keys from its first to before its stop.
        scale: factor of q @ k.T; 1 / sqrt(d) by default.
        softcap: scores become softcap * tanh(score / softcap), before the bias.
        alibi_slopes: [h] or [b, h]; adds -slope * |i + n - m - j| (Press et al. 2022).
        sinks: [h], a logit per head that takes part in the softmax and has no value.
        dropout_p: probability of dropping a weight, in [0, 1). Applied whenever it is positive.
        seed: int or int64 scalar tensor of the dropout mask, the same mask on every backend and device; drawn from
            torch's generator by default.
        return_lse: also return the log of the softmax's denominator, differentiable.
        backend: "auto", or a name out of `pyattn.list_backends()`, which then runs or raises.

    Returns:
        out [b, h, m, dv] in q's dtype, laid out as q is; with return_lse also lse [b, h, m] in float32 (float64 for
        float64 q), -inf for a query that sees nothing.

    Raises:
        ShapeError, DtypeError, DeviceError, RangeError: an argument does not fit.
        UnsupportedError: no backend can run the call; lists every backend's reason.

    Source: Dao 2023, arXiv:2307.08691, Algorithm 1. Differs from torch's SDPA: `causal` is bottom-right.
    """
    if others:
        check.refuse_unknown("attention", others)
    x, numbers = core.prepare(
        q, k, v, mask=mask, bias=bias, causal=causal, window=window, key_lengths=key_lengths, segment_ids=segment_ids,
        ranks=ranks, row_windows=row_windows, scale=scale, softcap=softcap, alibi_slopes=alibi_slopes, sinks=sinks,
        dropout_p=dropout_p, seed=seed,
    )  # fmt: skip
    out, lse = core.run(x, numbers, backend)
    return (out, lse) if return_lse else out


@overload
def attention_varlen(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, *, return_lse: Literal[False] = False,
    **options: Unpack[VarlenOptions],
) -> Tensor: ...  # fmt: skip
@overload
def attention_varlen(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, *, return_lse: Literal[True],
    **options: Unpack[VarlenOptions],
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
@overload
def attention_varlen(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, *, return_lse: bool,
    **options: Unpack[VarlenOptions],
) -> Tensor | tuple[Tensor, Tensor]: ...  # fmt: skip
def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *,
    causal: bool = False,
    window: Sequence[int | None] | None = None,
    scale: SupportsFloat | None = None,
    softcap: SupportsFloat | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    dropout_p: SupportsFloat = 0.0,
    seed: int | Tensor | None = None,
    return_lse: bool = False,
    backend: str = "auto",
    **others: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    """`attention` over sequences of different lengths, packed one after the other without padding.

    Sequence t is the queries cu_seqlens_q[t]:cu_seqlens_q[t + 1] and the keys cu_seqlens_k[t]:cu_seqlens_k[t + 1], and
    is attended to on its own: it gets what it would get as batch element t of a padded batch.

    Args:
        q: [total_q, h, d] float16, bfloat16, float32 or float64.
        k: [total_k, hk, d] in q's dtype; hk divides h, and head i reads key/value head i // (h // hk).
        v: [total_k, hk, dv] in q's dtype.
        cu_seqlens_q: integer [s + 1], where each of the s sequences starts in q, and total_q: 0 first, never falling.
        cu_seqlens_k: integer [s + 1], the same for k and v, ending in total_k.
        causal: of a sequence with m queries and n keys, query i sees keys j <= i + n - m.
        window: (left, right), the number of keys besides one's own that a query sees around i + n - m; None on a
            side is unlimited.
        alibi_slopes: [h] or [s, h]; adds -slope * |i + n - m - j| (Press et al. 2022).
        scale, softcap, sinks, dropout_p, seed, return_lse, backend: as for `attention`.

    Returns:
        out [total_q, h, dv] in q's dtype; with return_lse also lse [h, total_q] in float32 (float64 for float64 q).
        A query that sees no key gets 0 and -inf.

    Raises:
        As `attention`. The values of cu_seqlens are checked on the CPU; reading a GPU's would stall it.

    Source: the varlen interface of Dao 2023, arXiv:2307.08691.
    """
    if others:
        check.refuse_unknown("attention_varlen", others)
    check.check_dense("cu_seqlens_q", cu_seqlens_q)  # without it the call would be an unpacked one
    x, numbers = core.prepare(
        q, k, v, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, causal=causal, window=window, scale=scale,
        softcap=softcap, alibi_slopes=alibi_slopes, sinks=sinks, dropout_p=dropout_p, seed=seed,
    )  # fmt: skip
    out, lse = core.run(x, numbers, backend)
    return (out, lse) if return_lse else out


@overload
def attention_kvcache(
    q: Tensor, k: Tensor, v: Tensor, key_lengths: Tensor, *, return_lse: Literal[False] = False,
    **options: Unpack[CacheOptions],
) -> Tensor: ...  # fmt: skip
@overload
def attention_kvcache(
    q: Tensor, k: Tensor, v: Tensor, key_lengths: Tensor, *, return_lse: Literal[True], **options: Unpack[CacheOptions]
) -> tuple[Tensor, Tensor]: ...
@overload
def attention_kvcache(
    q: Tensor, k: Tensor, v: Tensor, key_lengths: Tensor, *, return_lse: bool, **options: Unpack[CacheOptions]
) -> Tensor | tuple[Tensor, Tensor]: ...
def attention_kvcache(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_lengths: Tensor,
    *,
    block_table: Tensor | None = None,
    causal: bool = False,
    window: Sequence[int | None] | None = None,
    scale: SupportsFloat | None = None,
    softcap: SupportsFloat | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    return_lse: bool = False,
    backend: str = "auto",
    **others: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    """`attention` of new queries over a key/value cache that is filled up to `key_lengths`, their own keys included.

    The last query stands at the last key of its batch element, whatever room the cache has behind it. Nothing there is
    read. For decoding: there are no gradients.

    Args:
        q: [b, h, m, d] float16, bfloat16, float32 or float64.
        k: [b, hk, n, d] in q's dtype; hk divides h. With a block table [pages, hk, page size, d].
        v: [b, hk, n, dv] in q's dtype. With a block table [pages, hk, page size, dv].
        key_lengths: integer [b], how many keys each batch element has.
        block_table: integer [b, n / page size]; key j of batch element b is row j % page size of page
            block_table[b, j // page size]. Pages may be shared. Entries behind key_lengths[b] are without meaning.
        causal: query i sees keys j <= i + key_lengths[b] - m. Without meaning for one query.
        window: (left, right), the number of keys besides one's own that a query sees around i + key_lengths[b] - m;
            None on a side is unlimited.
        alibi_slopes: [h] or [b, h]; adds -slope * |i + key_lengths[b] - m - j| (Press et al. 2022).
        scale, softcap, sinks, return_lse, backend: as for `attention`.

    Returns:
        As `attention`.

    Raises:
        As `attention`; UnsupportedError where a gradient would be recorded. The values of key_lengths and block_table
        are checked on the CPU; reading a GPU's would stall it.

    Source: Kwon et al. 2023, arXiv:2309.06180 (paged attention).
    """
    if others:
        check.refuse_unknown("attention_kvcache", others)
    check.check_dense("key_lengths", key_lengths)  # without them nothing says how much of the cache is filled
    x, numbers = core.prepare(
        q, k, v, key_lengths=key_lengths, block_table=block_table, causal=causal, window=window, scale=scale,
        softcap=softcap, alibi_slopes=alibi_slopes, sinks=sinks, cached=True,
    )  # fmt: skip
    if torch.is_grad_enabled() and any(t.requires_grad for t in (x.q, x.k, x.v)):
        raise check.UnsupportedError(
            "attention_kvcache: expected tensors without gradient, or torch.no_grad() around the call: a cache has none"
        )
    out, lse = core.run(x, numbers, backend)
    return (out, lse) if return_lse else out


@overload
def additive_attention(
    q: Tensor, k: Tensor, v: Tensor, weight: Tensor, *, return_lse: Literal[False] = False,
    **options: Unpack[AdditiveOptions],
) -> Tensor: ...  # fmt: skip
@overload
def additive_attention(
    q: Tensor, k: Tensor, v: Tensor, weight: Tensor, *, return_lse: Literal[True], **options: Unpack[AdditiveOptions]
) -> tuple[Tensor, Tensor]: ...
@overload
def additive_attention(
    q: Tensor, k: Tensor, v: Tensor, weight: Tensor, *, return_lse: bool, **options: Unpack[AdditiveOptions]
) -> Tensor | tuple[Tensor, Tensor]: ...
def additive_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weight: Tensor,
    *,
    exp_keys: Tensor | None = None,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    causal: bool = False,
    window: Sequence[int | None] | None = None,
    key_lengths: Tensor | None = None,
    segment_ids: tuple[Tensor, Tensor] | None = None,
    ranks: tuple[Tensor, Tensor] | None = None,
    row_windows: tuple[Tensor, Tensor] | None = None,
    scale: SupportsFloat | None = None,
    softcap: SupportsFloat | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    dropout_p: SupportsFloat = 0.0,
    seed: int | Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    return_lse: bool = False,
    backend: str = "auto",
    **others: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    """`attention` by additive scores, weight . tanh(q_i + k_j), without an [m, n, a] tensor in memory.

    The projections are the caller's: q = W s + b and k = U h, of the queries' states s and the keys' states h. Keys
    that do not change, those of one sentence, are projected once.

    Args:
        q: [b, h, m, a] float16, bfloat16, float32 or float64; of packed sequences [total_q, h, a].
        k: [b, hk, n, a] in q's dtype; hk divides h. Of packed sequences [total_k, hk, a].
        v: [b, hk, n, dv] in q's dtype. Of packed sequences [total_k, hk, dv].
        weight: [h, a] in q's dtype or float32.
        exp_keys: torch.exp(2 * k) in float32 (float64 for float64 k), of k's shape, where many calls share the keys. It
            saves the CPU the exponentials of up to 16 queries of a group of heads, those whose largest |q| is above 0.5
            and at most 30 (300 for float64), and changes nothing else. Exponentials of another k give wrong results
            there. The gradient is k's.
        scale: a factor of the scores; 1 by default.
        cu_seqlens_q, cu_seqlens_k: as for `attention_varlen`, for packed sequences. They exclude mask, bias,
            key_lengths, segment_ids, ranks and row_windows.
        alibi_slopes: as for `attention`; of s packed sequences [h] or [s, h].
        mask, bias, causal, window, key_lengths, segment_ids, ranks, row_windows, softcap, sinks, dropout_p, seed,
            return_lse, backend: as for `attention`.

    Returns:
        As `attention`, or for packed sequences as `attention_varlen`. There are gradients for q, k, v, weight, bias and
        sinks; tanh is computed again for them.

    Raises:
        As `attention`.

    Source: Bahdanau, Cho and Bengio 2015, arXiv:1409.0473, appendix A.1.2.
    """
    if others:
        check.refuse_unknown("additive_attention", others)
    check.check_dense("weight", weight)  # without it the scores would be products
    x, numbers = core.prepare(
        q, k, v, weight=weight, exp_keys=exp_keys, mask=mask, bias=bias, causal=causal, window=window,
        key_lengths=key_lengths, segment_ids=segment_ids, ranks=ranks, row_windows=row_windows, scale=scale,
        softcap=softcap, alibi_slopes=alibi_slopes, sinks=sinks, dropout_p=dropout_p, seed=seed,
        cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k,
    )  # fmt: skip
    out, lse = core.run(x, numbers, backend)
    return (out, lse) if return_lse else out


@overload
def relative_attention(
    q: Tensor, k: Tensor, v: Tensor, relative_q: Tensor, relative_k: Tensor, first: int, *,
    return_lse: Literal[False] = False, **options: Unpack[Options],
) -> Tensor: ...  # fmt: skip
@overload
def relative_attention(
    q: Tensor, k: Tensor, v: Tensor, relative_q: Tensor, relative_k: Tensor, first: int, *, return_lse: Literal[True],
    **options: Unpack[Options],
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
@overload
def relative_attention(
    q: Tensor, k: Tensor, v: Tensor, relative_q: Tensor, relative_k: Tensor, first: int, *, return_lse: bool,
    **options: Unpack[Options],
) -> Tensor | tuple[Tensor, Tensor]: ...  # fmt: skip
def relative_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    relative_q: Tensor,
    relative_k: Tensor,
    first: int,
    *,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    causal: bool = False,
    window: Sequence[int | None] | None = None,
    key_lengths: Tensor | None = None,
    segment_ids: tuple[Tensor, Tensor] | None = None,
    ranks: tuple[Tensor, Tensor] | None = None,
    row_windows: tuple[Tensor, Tensor] | None = None,
    scale: SupportsFloat | None = None,
    softcap: SupportsFloat | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    dropout_p: SupportsFloat = 0.0,
    seed: int | Tensor | None = None,
    return_lse: bool = False,
    backend: str = "auto",
    **others: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    """`attention` with a relative term beside q_i . k_j: relative_q_i . r, where r is the row of relative_k for the
    distance i + n - m - j from key j to query i. No [m, n] matrix is in memory, shifted or not.

    Biases are the caller's: in Transformer-XL q is q + u, relative_q is q + w, and relative_k projects the sinusoids of
    the distances. A bias that is learned by distance is e = 1 with relative_q = 1 / scale.

    Args:
        q: [b, h, m, d] float16, bfloat16, float32 or float64.
        k: [b, hk, n, d] in q's dtype; hk divides h.
        v: [b, hk, n, dv] in q's dtype.
        relative_q: [b, h, m, e] in q's dtype, with a size e of its own.
        relative_k: [1|b, h, distances, e] in q's dtype: row r is the distance first + r. It has a row for every
            distance that causal and window leave; what other rows hold has no effect.
        first: the distance of relative_k's first row, negative for keys that follow their query.
        scale: factor of the sum of both products; 1 / sqrt(d) by default.
        mask, bias, causal, window, key_lengths, segment_ids, ranks, row_windows, softcap, alibi_slopes, sinks,
            dropout_p, seed, return_lse, backend: as for `attention`.

    Returns:
        As `attention`. There are gradients for q, k, v, relative_q, relative_k, bias and sinks.

    Raises:
        As `attention`.

    Source: Dai et al. 2019, arXiv:1901.02860 (Transformer-XL), section 3.3; Yang et al. 2019, arXiv:1906.08237 (XLNet).
    """
    if others:
        check.refuse_unknown("relative_attention", others)
    check.check_dense("relative_k", relative_k)  # without it the scores would be products
    x, numbers = core.prepare(
        q, k, v, relative_q=relative_q, relative_k=relative_k, first=first, mask=mask, bias=bias,
        causal=causal, window=window, key_lengths=key_lengths, segment_ids=segment_ids, ranks=ranks,
        row_windows=row_windows, scale=scale, softcap=softcap, alibi_slopes=alibi_slopes, sinks=sinks,
        dropout_p=dropout_p, seed=seed,
    )  # fmt: skip
    out, lse = core.run(x, numbers, backend)
    return (out, lse) if return_lse else out


class Explanation(str):
    """Text that Python shows as it reads, also where it shows values."""

    __repr__ = str.__str__


def explain(q: Tensor, k: Tensor, v: Tensor, *, backend: str = "auto", **options: Any) -> Explanation:
    """Says which backend would run this call, why each other would not, and the memory it takes.

    Takes the arguments of `attention` or, all but q, k and v by name, of `attention_varlen`, or with `cached=True` of
    `attention_kvcache`, with `weight` of `additive_attention`; `top_left=True` aligns a causal mask as torch does.
    Runs nothing.
    """
    options.pop("return_lse", None)
    check.refuse_unknown("explain", options.keys() - signature(core.prepare).parameters.keys())
    spec = AttentionSpec.of(*core.prepare(q, k, v, **options))
    name = registry.requested(backend)
    refusals = {candidate: b.refusal(spec) for candidate, b in registry.BACKENDS.items()}
    order = registry.AUTOMATIC if name == "auto" else (name,)
    chosen = next((candidate for candidate in order if refusals[candidate] is None), None)
    features = ", ".join(sorted(spec.features)) or "none"
    sequences = "" if spec.sequences is None else f"sequences={spec.sequences} "
    lines = [f"attention {sequences}b={spec.b} h={spec.h} hk={spec.hk} m={spec.m} n={spec.n} d={spec.d} dv={spec.dv} "
             f"{dtype_name(spec.dtype)} on {spec.device}; features: {features}"]  # fmt: skip
    for candidate, b in registry.BACKENDS.items():
        arrow = "->" if candidate == chosen else "  "
        text = refusals[candidate] or _memory_line(spec, *b.workspace_bytes(spec))
        lines.append(f"{arrow} {candidate:<10} {text}")
    if spec.additive:
        unfused = f"{_megabytes(spec.score_bytes * spec.d)} for the tensor [b, h, m, n, a] of sums"
    else:
        unfused = f"{_megabytes(spec.score_bytes)} for each [b, h, m, n] matrix"
    lines.append(f"   {'unfused':<10} would hold {unfused}")
    # One query, or a cache that is still short, has fewer rows than heads where all is as it should be.
    if spec.sequences is None and spec.offset is not None and spec.h > spec.m > 1 and spec.hk > spec.n:
        lines.append(
            f"   more heads than rows, h={spec.h} > m={spec.m} and hk={spec.hk} > n={spec.n}: q, k and v are "
            "[batch, heads, length, head size]; .transpose(1, 2) makes them so of [batch, length, heads, head size]"
        )
    return Explanation("\n".join(lines))


def _memory_line(spec: AttentionSpec, forward: int, backward: int) -> str:
    return (
        f"can run: {_megabytes(spec.output_bytes)} for the output, "
        f"{_megabytes(forward)} of scratch forward, {_megabytes(backward)} backward"
    )


def _megabytes(n_bytes: int) -> str:
    return f"{n_bytes / 1e6:,.2f} MB"
