"""The oracle itself, held against sources that do not share its code: torch's SDPA, finite differences, Random123."""

import pytest
import torch
import torch.nn.functional as F

import pyattn
from pyattn import testing
from pyattn.dropout import philox


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_philox_known_answers_of_random123(counter, key, words):
    low, high = key
    seed = torch.tensor((high << 32 | low) - (1 << 64 if high >> 31 else 0))
    assert [int(word) for word in philox(seed, *(torch.tensor(c) for c in counter))] == words


@pytest.mark.parametrize("top_left", [False, True])
def test_reference_causal_agrees_with_torch(top_left):
    q, k, v = (torch.randn(2, 3, length, 8, dtype=torch.float64) for length in (5, 9, 9))
    mask = torch.ones(5, 9, dtype=torch.bool).tril(0 if top_left else 4)
    out, _ = pyattn.core.attend(q, k, v, causal=True, top_left=top_left, backend="reference")
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v, attn_mask=mask))


def test_reference_bias_and_grouped_heads_agree_with_torch():
    q, k, v = (torch.randn(2, heads, 7, 8, dtype=torch.float64) for heads in (6, 2, 2))
    bias = torch.randn(6, 7, 7, dtype=torch.float64)
    out = pyattn.attention(q, k, v, bias=bias, scale=0.3, backend="reference")
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=0.3, enable_gqa=True)
    torch.testing.assert_close(out, expected)


def test_reference_window_counts_keys_besides_ones_own():
    q = k = torch.zeros(1, 1, 6, 4, dtype=torch.float64)
    out = pyattn.attention(q, k, torch.eye(6, dtype=torch.float64)[None, None], window=(2, 1), backend="reference")
    i, j = torch.arange(6)[:, None], torch.arange(6)
    assert torch.equal(out[0, 0] > 0, (j >= i - 2) & (j <= i + 1))


def test_reference_gradients_agree_with_finite_differences():
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, length, 3, dtype=torch.float64, requires_grad=True) for length in (4, 5, 5))
    bias = torch.randn(1, 1, 4, 5, dtype=torch.float64, requires_grad=True)
    sinks = torch.randn(2, dtype=torch.float64, requires_grad=True)

    def attention(q, k, v, bias, sinks):
        return pyattn.attention(
            q, k, v, bias=bias, sinks=sinks, causal=True, softcap=2.0, dropout_p=0.2, seed=5, return_lse=True,
            alibi_slopes=torch.tensor([0.5, 0.25]), backend="reference",
        )  # fmt: skip

    assert torch.autograd.gradcheck(attention, (q, k, v, bias, sinks))
    assert torch.autograd.gradgradcheck(lambda *x: attention(*x)[0], (q, k, v, bias, sinks))


def test_reference_through_operator_gives_autograds_gradients():
    """The protocol's backward, which other backends' tests never call."""
    case = next(case for case in testing.CASES if case.id == "everything")
    call = testing.make_inputs(case, torch.float32)
    expected = testing.evaluate_backend(call, "reference")
    backend = pyattn.registry.BACKENDS["reference"]
    x, numbers = pyattn.core.prepare(**call.tensors, **call.options)
    spec = pyattn.spec.AttentionSpec.of(x, numbers)
    grads = backend.backward(spec, x, backend.forward(spec, x), call.d_out, call.d_lse, bias_gradient=True)
    for name in ("q", "k", "v", "bias", "sinks"):
        torch.testing.assert_close(getattr(grads, name), expected[f"d_{name}"], rtol=1e-5, atol=1e-5)


def test_reference_gradient_of_a_huge_lse_is_the_weights():
    q, k = (
        torch.randn(1, 1, 3, 4, dtype=torch.float64, requires_grad=True),
        torch.randn(1, 1, 5, 4, dtype=torch.float64),
    )
    for size in (0.0, -1e39, 1e39):  # beside which log(5) is lost
        bias = torch.full((3, 5), size, dtype=torch.float64)
        _, lse = pyattn.attention(q, k, k, bias=bias, return_lse=True, backend="reference")
        (found,) = torch.autograd.grad(lse.sum(), q)
        p = (q @ k.mT / 2 + bias).softmax(-1)
        torch.testing.assert_close(found, p @ k / 2)
