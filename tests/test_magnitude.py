"""Scores and biases of every size: errors by norm against those of PyTorch's own fused and unfused attention.

Where scores are large, nearly all gradients are 0 but those of rows in which two keys nearly tie. With random keys such
rows are few, and each side is lucky in turn. So here every query has keys of its own that score highest, about 1 apart
whatever their size; errors are norms, and their ratios are averaged over several inputs.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import pyattn
from pyattn.spec import dtype_name

B, H, M, D = 1, 8, 32, 64
SEEDS = range(4)
NAMES = ("out", "d_q", "d_k", "d_v")


def exact(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, d_out: Tensor) -> list[Tensor]:
    """out and the gradients of q, k and v by their formulas, in float64."""
    q, k, v, d_out = (t.double() for t in (q, k, v, d_out))
    s = q @ k.transpose(-1, -2) / math.sqrt(D) + (0 if bias is None else bias.double())
    p = (s - s.amax(-1, keepdim=True)).exp()
    p = p / p.sum(-1, keepdim=True)
    d_p = d_out @ v.transpose(-1, -2)
    d_s = p * (d_p - (p * d_p).sum(-1, keepdim=True)) / math.sqrt(D)
    return [p @ v, d_s @ k, d_s.transpose(-1, -2) @ q, p.transpose(-1, -2) @ d_out]


def unfused(*given: Tensor, attn_mask: Tensor | None) -> Tensor:
    with sdpa_kernel(SDPBackend.MATH):
        return F.scaled_dot_product_attention(*given, attn_mask=attn_mask)


def errors(attention, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, d_out: Tensor) -> list[float]:
    """Relative to the exact results, by norm. Results below 1e-30 are no more than float32's smallest numbers."""
    leaves = [t.detach().requires_grad_() for t in (q, k, v)]
    out = attention(*leaves, attn_mask=bias)
    found = [out.detach(), *torch.autograd.grad(out, leaves, d_out)]
    expected = exact(q, k, v, bias, d_out)
    sizes = [max(float(t.norm()), 1e-30) for t in expected]
    return [float((a.double() - t).norm()) / size for a, t, size in zip(found, expected, sizes, strict=True)]


def tie(q: Tensor, k: Tensor, times: float, generator: torch.Generator) -> None:
    """Gives every query two keys of its own that score highest, about 1 apart."""
    along = (q / q.square().sum(-1, keepdim=True)).repeat_interleave(2, 2)
    wanted = torch.randn(*k.shape[:3], 1, generator=generator, dtype=torch.float64) / max(times, 1) + 3
    k += along * (wanted * math.sqrt(D) - (k * q.repeat_interleave(2, 2)).sum(-1, keepdim=True))


def align(q: Tensor, k: Tensor, times: float, keys: int) -> None:
    """Gives every query `keys` keys that are nearly parallel and score about 1 apart: in d_q they nearly cancel."""
    own = q[:, :, :: keys // 2].repeat_interleave(keys, 2)
    down = torch.arange(k.shape[2], dtype=torch.float64)[:, None] % keys * math.sqrt(D) / times
    k.copy_(own * (1 - down / own.square().sum(-1, keepdim=True)))


KEYS = {
    "tied": tie,
    "random": lambda q, k, times, generator: None,
    "pairs": lambda q, k, times, generator: align(q, k, times, 2),
    "fours": lambda q, k, times, generator: align(q, k, times, 4),
}


def ratios(
    backend: str, dtype: torch.dtype, times: float, bias_level: float = 0.0, keys: str = "tied"
) -> dict[str, float]:
    """The geometric mean of the backend's error over the better of torch's two; up to 1e-10 they count as none.

    times: what queries are multiplied by. bias_level: the bias of every other query, -inf for the dtype's lowest.
    """
    logs = dict.fromkeys(NAMES, 0.0)
    for seed in SEEDS:
        generator = torch.Generator().manual_seed(seed)
        q, k, v, d_out = (
            torch.randn(B, H, rows, D, generator=generator, dtype=torch.float64) for rows in (M, 2 * M, 2 * M, M)
        )
        KEYS[keys](q, k, times, generator)
        q, k, v, d_out = (t.to(dtype) for t in (q * times, k, v, d_out))
        bias = None
        if bias_level:
            bias = torch.zeros(B, 1, M, 2 * M, dtype=dtype)
            bias[:, :, ::2] = max(bias_level, torch.finfo(dtype).min)

        def own(*given: Tensor, attn_mask: Tensor | None) -> Tensor:
            return pyattn.attention(*given, bias=attn_mask, backend=backend)

        of_torch = [errors(f, q, k, v, bias, d_out) for f in (F.scaled_dot_product_attention, unfused)]
        for name, error, *others in zip(NAMES, errors(own, q, k, v, bias, d_out), *of_torch, strict=True):
            logs[name] += math.log((error + 1e-10) / (min(others) + 1e-10)) / len(SEEDS)
    return {name: math.exp(log) for name, log in logs.items()}


# From 1e5 to 1e7 the scores' own rounding decides which key is the larger, and each side is lucky in turn again.
TIMES = (1e-20, 1e-5, 1e-2, 1.0, 10.0, 1e2, 1e3, 1e4, 1e8, 1e10)
LEVELS = (-1e2, -1e4, -1e6, -1e9, -math.inf)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("times", TIMES)
def test_magnitude_of_scores_leaves_errors_below_twice_torchs(times, dtype):
    if dtype is torch.float16:
        times = min(max(times, 1e-5), 1e4)  # what it can hold
    found = ratios("cpu", dtype, times)
    assert max(found.values()) <= 2, found


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("level", LEVELS)
def test_magnitude_of_biases_leaves_errors_below_twice_torchs(level, dtype):
    found = ratios("cpu", dtype, 1.0, level)
    assert max(found.values()) <= 2, found


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("times", (1.0, 30.0, 300.0))
@pytest.mark.parametrize("keys", ("random", "pairs", "fours"))
def test_keys_that_nearly_cancel_leave_errors_below_twice_torchs(keys, times, dtype):
    found = ratios("cpu", dtype, times, keys=keys)
    assert max(found.values()) <= 2, found


def additive(q: Tensor, k: Tensor, v: Tensor, weight: Tensor, mask: Tensor | None = None) -> Tensor:
    k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], 1) for t in (k, v))
    s = (torch.tanh(q.unsqueeze(3) + k.unsqueeze(2)) * weight[:, None, None]).sum(-1)
    if mask is None:
        return s.softmax(-1) @ v
    return (s.masked_fill(~mask, -1e30).softmax(-1) @ v).masked_fill(~mask.any(-1, keepdim=True), 0.0)


def additive_ratios(tensors: list[Tensor], d_out: Tensor, mask: Tensor | None = None, **options: Tensor) -> Tensor:
    """Errors of the gradients of q, k, v and weight by norm, over those of the same in torch, unfused."""

    def gradients(attention, leaves: list[Tensor]) -> list[Tensor]:
        leaves = [t.detach().requires_grad_() for t in leaves]
        return torch.autograd.grad(attention(*leaves, mask=mask), leaves, d_out.to(leaves[0].dtype))

    def own(*given: Tensor, mask: Tensor | None) -> Tensor:
        return pyattn.additive_attention(*given, mask=mask, **options, backend="cpu")

    expected = gradients(additive, [t.double() for t in tensors])
    found, theirs = (
        torch.stack([(a.double() - t).norm() for a, t in zip(gradients(f, tensors), expected, strict=True)])
        for f in (own, additive)
    )
    return found / theirs


# How many queries are taken together, and which of them with exponentials that are given, differs in these between the
# rows that a forward and a backward see: a group of heads and one of them.
@pytest.mark.parametrize("a", (256, 250))
@pytest.mark.parametrize("given", (False, True))
@pytest.mark.parametrize("hides", (None, "key", "query"))
@pytest.mark.parametrize(("h", "hk", "m", "small"), [(4, 1, 1, 0), (2, 1, 4, 1), (4, 1, 8, 0), (1, 1, 4, 0)])
def test_additive_backward_computes_scores_as_its_forward(h, hk, m, small, hides, given, a):
    logs = torch.zeros(4, dtype=torch.float64)
    for seed in SEEDS:
        torch.manual_seed(seed)
        q, k, v, weight = (
            torch.randn(1, h, m, a),
            torch.randn(1, hk, 50, a),
            torch.randn(1, hk, 50, 16),
            torch.randn(h, a),
        )
        q *= 1.5
        q[:, :small] *= 0.05
        k = k[:, :, :1] + k / 300  # scores of about 300 that are about 1 apart
        mask = None if hides is None else torch.ones(1, h, m, 50, dtype=torch.bool)
        if hides == "key":
            mask[..., 7] = False
        if hides == "query":
            mask[:, 0, 0] = False
        options = {"exp_keys": torch.exp(2 * k)} if given else {}
        logs += additive_ratios([q, k, v, weight * 300 / 16], torch.randn(1, h, m, 16), mask, **options).log()
    assert (logs / len(SEEDS)).exp().max() <= 4


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("times", (4.0, 30.0))
@pytest.mark.parametrize("m", (1, 17))
def test_additive_rows_of_few_heavy_keys_leave_errors_below_twice_torchs(m, times, dtype):
    logs = torch.zeros(4, dtype=torch.float64)
    for seed in range(8):
        torch.manual_seed(seed)
        tensors = [torch.randn(size) for size in ((2, 2, m, 32), (2, 1, 50, 32), (2, 1, 50, 32))]
        tensors = [t.to(dtype) for t in (*tensors, torch.randn(2, 32) * times)]
        logs += (additive_ratios(tensors, torch.randn(2, 2, m, 32)) + 1e-10).log()
    assert (logs / 8).exp().max() <= 2
