"""Where the interfaces that pyattn stands in for differ from each other: a test for each convention, over all of them.

Everything is held against `plain`, whose arguments say outright what is meant.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.bias import causal_lower_right, causal_upper_left

import pyattn
from pyattn.compat import flash_attn, xformers
from pyattn.compat.transformers import pyattn_attention_forward

B, H, M, N, D = 2, 4, 5, 7, 8
SLOPES = torch.linspace(1.0, 0.1, H)
ROW, KEY = torch.arange(M)[:, None], torch.arange(N)
AHEAD = KEY - ROW  # of the key of the same number
TOP_LEFT, BOTTOM_RIGHT = AHEAD <= 0, AHEAD <= N - M
AROUND = (AHEAD >= N - M - 2) & (AHEAD <= N - M + 1)  # bottom-right, two keys back and one on


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


Q, K, V = normal(B, H, M, D), normal(B, H, N, D, seed=1), normal(B, H, N, D, seed=2)


def plain(seen: Tensor | None = None, added: Tensor | float = 0.0, k: Tensor = K, v: Tensor = V) -> Tensor:
    s = Q @ k.mT / math.sqrt(D) + added
    if seen is None:
        return s.softmax(-1) @ v
    p = s.masked_fill(~seen, -torch.inf).softmax(-1).masked_fill(~seen.any(-1, keepdim=True), 0.0)
    return p @ v


def sdpa(mask: Any = None, q: Tensor = Q, k: Tensor = K, v: Tensor = V, **options: Any) -> Tensor:
    return pyattn.scaled_dot_product_attention(q, k, v, mask, **options)


def flash(q: Tensor = Q, k: Tensor = K, v: Tensor = V, **options: Any) -> Any:
    out = flash_attn.flash_attn_func(*(t.transpose(1, 2) for t in (q, k, v)), **options)
    return (out[0].transpose(1, 2), *out[1:]) if isinstance(out, tuple) else out.transpose(1, 2)


def xops(bias: Any = None, q: Tensor = Q, k: Tensor = K, v: Tensor = V, **options: Any) -> Tensor:
    return xformers.memory_efficient_attention(*(t.transpose(1, 2) for t in (q, k, v)), bias, **options).transpose(1, 2)


def hugging_face(
    mask: Tensor | None = None, q: Tensor = Q, k: Tensor = K, v: Tensor = V, training: bool = False, **options: Any
) -> tuple[Tensor, Tensor | None]:
    module = nn.Module().train(training)
    out, weights = pyattn_attention_forward(module, q, k, v, mask, **options)
    return out.transpose(1, 2), weights


def multihead(*, dropout: float = 0.0) -> nn.MultiheadAttention:
    torch.manual_seed(0)
    return pyattn.MultiheadAttention(H * D, H, dropout=dropout, batch_first=True, dtype=torch.float64)


CAUSAL: dict[str, tuple[Callable[[], Any], Tensor]] = {
    "attention": (lambda: pyattn.attention(Q, K, V, causal=True), BOTTOM_RIGHT),
    "sdpa": (lambda: sdpa(is_causal=True), TOP_LEFT),
    "sdpa, upper left": (lambda: sdpa(causal_upper_left(M, N)), TOP_LEFT),
    "sdpa, lower right": (lambda: sdpa(causal_lower_right(M, N)), BOTTOM_RIGHT),
    "flash_attn": (lambda: flash(causal=True), BOTTOM_RIGHT),
    "xformers, lower triangular": (lambda: xops(xformers.LowerTriangularMask()), TOP_LEFT),
    "xformers, from bottom right": (lambda: xops(xformers.LowerTriangularFromBottomRightMask()), BOTTOM_RIGHT),
    "transformers": (lambda: hugging_face(is_causal=True)[0], TOP_LEFT),
    "transformers, one query": (lambda: F.pad(hugging_face(q=Q[:, :, :1], is_causal=True)[0], (0, 0, 0, M - 1)),
                                (ROW == 0).expand(M, N)),
}  # fmt: skip


@pytest.mark.parametrize(("call", "seen"), CAUSAL.values(), ids=CAUSAL)
def test_causal_starts_at_the_first_or_ends_at_the_last_key(call: Callable[[], Tensor], seen: Tensor) -> None:
    torch.testing.assert_close(call(), plain(seen))


WINDOWS: dict[str, tuple[Callable[[], Any], Tensor]] = {
    "attention": (lambda: pyattn.attention(Q, K, V, window=(2, 1)), AROUND),
    "attention, one side": (lambda: pyattn.attention(Q, K, V, window=(None, 1)), AHEAD <= N - M + 1),
    "flash_attn": (lambda: flash(window_size=(2, 1)), AROUND),
    "flash_attn, one side": (lambda: flash(window_size=(2, -1)), AHEAD >= N - M - 2),
    "xformers": (lambda: xops(xformers.LocalAttentionFromBottomRightMask(2, 1)),
                 AROUND),
    "transformers, causal": (lambda: hugging_face(is_causal=True, sliding_window=2)[0], TOP_LEFT & (AHEAD > -2)),
    "transformers": (lambda: hugging_face(is_causal=False, sliding_window=2)[0], AHEAD.abs() < 2),
}  # fmt: skip


@pytest.mark.parametrize(("call", "seen"), WINDOWS.values(), ids=WINDOWS)
def test_window_counts_keys_besides_or_with_its_own(call: Callable[[], Tensor], seen: Tensor) -> None:
    torch.testing.assert_close(call(), plain(seen))


def test_true_means_attend_but_in_multihead_attention() -> None:
    seen = normal(B, 1, M, N) > 0
    for out in (pyattn.attention(Q, K, V, mask=seen), sdpa(seen), hugging_face(seen)[0]):
        torch.testing.assert_close(out, plain(seen))
    attend, x = multihead(), normal(B, M, H * D)
    ignored = torch.ones(M, M, dtype=torch.bool).triu(1)
    _, weights = attend(x, x, x, attn_mask=ignored)
    assert ((weights == 0) == ignored).all()
    _, weights = attend(x, x, x, key_padding_mask=ignored[:B])
    assert ((weights == 0) == ignored[:B, None]).all()


@pytest.mark.parametrize("patched", [False, True])
def test_float_mask_is_added_in_inference_too(patched: bool) -> None:
    """torch's inference kernel of an encoder layer has misread it: pytorch issue 107084."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(H * D, H, 16, dropout=0.0, batch_first=True, dtype=torch.float64)
    mask, x = normal(M, M), normal(B, M, H * D)
    expected = layer.train()(x, src_mask=mask)
    if not patched:
        attention = multihead()
        attention.load_state_dict(layer.self_attn.state_dict())
        layer.self_attn = attention
    with pyattn.patch(layer) if patched else torch.no_grad(), torch.no_grad():
        torch.testing.assert_close(layer.eval()(x, src_mask=mask), expected)


def test_row_of_minus_infinity_is_zero_and_row_of_the_least_number_the_mean() -> None:
    for value, row in ((-torch.inf, torch.zeros_like(V[:, :, 0])), (torch.finfo(torch.float64).min, V.mean(2))):
        added = torch.zeros(B, H, M, N, dtype=torch.float64)
        added[:, :, 1] = value
        for out in (pyattn.attention(Q, K, V, bias=added), sdpa(added), xops(added), hugging_face(added)[0]):
            torch.testing.assert_close(out[:, :, 1], row)


def test_weights_are_those_after_dropout_by_head_or_averaged() -> None:
    out, weights = hugging_face(training=True, dropout=0.4, output_attentions=True)
    assert weights is not None and weights.shape == (B, H, M, N) and (weights == 0).any()
    torch.testing.assert_close(out, weights @ V)
    attention, x = multihead(dropout=0.4), normal(B, M, H * D)
    torch.manual_seed(1)
    out, weights = attention(x, x, x, average_attn_weights=False)
    values = F.linear(x, *(t.chunk(3)[2] for t in (attention.in_proj_weight, attention.in_proj_bias)))
    heads = weights @ values.unflatten(-1, (H, D)).transpose(1, 2)
    assert (weights == 0).any()
    torch.testing.assert_close(out, attention.out_proj(heads.transpose(1, 2).flatten(2)))
    torch.manual_seed(1)
    torch.testing.assert_close(attention(x, x, x)[1], weights.mean(1))


def test_dropout_is_always_on_but_in_modules_and_scales_what_it_keeps() -> None:
    q, k, v = torch.zeros(1, 1, 400, 16), torch.zeros(1, 1, 64, 16), torch.eye(64)[None, None]
    always = {
        "attention": pyattn.attention(q, k, v, dropout_p=0.25),
        "sdpa": sdpa(q=q, k=k, v=v, dropout_p=0.25),
        "flash_attn": flash(q, k, v, dropout_p=0.25),
        "xformers": xops(q=q, k=k, v=v, p=0.25),
        "transformers": hugging_face(q=q, k=k, v=v, dropout=0.25, training=True)[0],
    }
    for name, weights in always.items():
        assert (weights == 0).double().mean().item() == pytest.approx(0.25, abs=0.02), name
        torch.testing.assert_close(weights[weights > 0], torch.full_like(weights[weights > 0], 1 / 64 / 0.75))
    assert (hugging_face(q=q, k=k, v=v, dropout=0.25)[0] > 0).all()
    x = normal(B, M, H * D)
    torch.testing.assert_close(multihead(dropout=0.25).eval()(x, x, x), multihead()(x, x, x))
    _, lse = pyattn.attention(Q, K, V, dropout_p=0.25, return_lse=True)
    torch.testing.assert_close(lse, (Q @ K.mT / math.sqrt(D)).logsumexp(-1))


def test_scale_comes_first_then_softcap_then_what_is_added() -> None:
    scores, added = Q @ K.mT * 0.7, normal(B, H, M, N)
    capped = 1.5 * torch.tanh(scores / 1.5)
    expected = (capped + added).softmax(-1) @ V
    torch.testing.assert_close(pyattn.attention(Q, K, V, scale=0.7, softcap=1.5, bias=added), expected)
    torch.testing.assert_close(hugging_face(added, scaling=0.7, softcap=1.5)[0], expected)
    torch.testing.assert_close(hugging_face(position_bias=added, scaling=0.7, softcap=1.5)[0], expected)
    torch.testing.assert_close(sdpa(added, scale=0.7), (scores + added).softmax(-1) @ V)
    torch.testing.assert_close(xops(added, scale=0.7), (scores + added).softmax(-1) @ V)
    distance = (AHEAD - N + M).abs()
    out = flash(softmax_scale=0.7, softcap=1.5, alibi_slopes=SLOPES)
    torch.testing.assert_close(out, (capped - SLOPES[:, None, None] * distance).softmax(-1) @ V)


def test_lse_is_a_natural_logarithm_by_head_in_float32() -> None:
    q, k, v = Q.float(), K.float(), V.float()
    expected = (q @ k.mT / math.sqrt(D)).logsumexp(-1)
    for _, lse, *_ in (pyattn.attention(q, k, v, return_lse=True), flash(q, k, v, return_attn_probs=True)):
        assert lse.dtype is torch.float32
        torch.testing.assert_close(lse, expected)
    lengths = (torch.arange(B + 1, dtype=torch.int32) * t.shape[2] for t in (q, k))
    packed = (t.transpose(1, 2).flatten(0, 1) for t in (q, k, v))
    _, lse, _ = flash_attn.flash_attn_varlen_func(*packed, *lengths, M, N, return_attn_probs=True)
    torch.testing.assert_close(lse, expected.transpose(0, 1).flatten(1))
    half = pyattn.attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), return_lse=True)[1]
    assert half.dtype is torch.float32


def test_lse_of_the_same_call_has_a_gradient() -> None:
    """flash-attn's own is silently without one."""
    q = Q.clone().requires_grad_()
    expected = (q @ K.mT / math.sqrt(D)).logsumexp(-1)
    for _, lse, *_ in (pyattn.attention(q, K, V, return_lse=True), flash(q, return_attn_probs=True)):
        grads = (torch.autograd.grad(of.square().sum(), q, retain_graph=True)[0] for of in (lse, expected))
        torch.testing.assert_close(*grads)


def test_head_reads_the_key_head_of_its_group() -> None:
    k, v = K[:, :2], V[:, :2]
    expected = plain(k=k.repeat_interleave(2, 1), v=v.repeat_interleave(2, 1))
    grouped = (t.transpose(1, 2).unflatten(2, (2, -1)) for t in (Q, k, v))
    by_group = xformers.memory_efficient_attention(*grouped).flatten(2, 3).transpose(1, 2)
    for out in (
        pyattn.attention(Q, k, v), sdpa(k=k, v=v, enable_gqa=True), flash(k=k, v=v), hugging_face(k=k, v=v)[0], by_group
    ):  # fmt: skip
        torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_what_no_query_sees_does_not_leak(poison: float) -> None:
    """A number that is added hides nothing: with NaN it is NaN, as in torch."""
    seen = torch.ones(M, N, dtype=torch.bool)
    seen[:, -2:] = False
    k, v = K.clone(), V.clone()
    k[:, :, -2:], v[:, :, -2:] = poison, poison
    lengths = torch.full((B,), N - 2)
    outs = {
        "attention": pyattn.attention(Q, k, v, mask=seen),
        "attention, lengths": pyattn.attention(Q, k, v, key_lengths=lengths),
        "sdpa": sdpa(seen, k=k, v=v),
        "transformers": hugging_face(seen[None, None], k=k, v=v)[0],
        "xformers": xops(
            xformers.BlockDiagonalPaddedKeysMask.from_seqlens([M], N, [N - 2]), *(t[:1] for t in (Q, k, v))
        ),
        "flash_attn": flash_attn.flash_attn_with_kvcache(
            *(t.transpose(1, 2) for t in (Q, k, v)), cache_seqlens=lengths.int()
        ).transpose(1, 2),
    }
    for name, out in outs.items():
        torch.testing.assert_close(out, plain(seen)[: len(out)], msg=lambda text, name=name: f"{name}: {text}")


def test_is_causal_joins_a_mask_in_sdpa_and_needs_one_in_multihead_attention() -> None:
    seen, added = normal(M, N) > -0.5, normal(M, N)
    torch.testing.assert_close(sdpa(seen, is_causal=True), plain(seen & TOP_LEFT))
    torch.testing.assert_close(sdpa(added, is_causal=True), plain(TOP_LEFT, added))
    x = normal(B, M, H * D)
    with pytest.raises(pyattn.RangeError, match="attn_mask"):
        multihead()(x, x, x, is_causal=True)


def test_segment_ids_beside_no_keys_give_zeros() -> None:
    q, k = torch.ones(2, 1, 2, 16), torch.ones(2, 1, 0, 16)
    ids = torch.tensor([[1, 2**40], [1, 1]]), torch.ones(2, 0, dtype=torch.int64)
    assert not pyattn.attention(q, k, k, segment_ids=ids, backend="cpu").any()
