"""Every wrong argument raises an error that names it, before anything runs."""

import inspect

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import pyattn

B, H, HK, M, N, D = 2, 4, 2, 5, 7, 8


def _arguments(**changes):
    arguments = {"q": torch.randn(B, H, M, D), "k": torch.randn(B, HK, N, D), "v": torch.randn(B, HK, N, D)}
    return arguments | changes


def _ints(*shape):
    return torch.zeros(shape, dtype=torch.int64)


WRONG = {
    "q is a list": ({"q": [1.0]}, pyattn.DtypeError, "q: expected a torch.Tensor, got list"),
    "q has 3 dimensions": ({"q": torch.randn(H, M, D)}, pyattn.ShapeError, r"q: expected 4 dimensions .*\[4, 5, 8\]"),
    "q is integer": ({"q": _ints(B, H, M, D)}, pyattn.DtypeError, "q: expected float16, bfloat16, float32 or float64"),
    "k has another dtype": ({"k": torch.randn(B, HK, N, D).double()}, pyattn.DtypeError, "k: .*the dtype of q, got"),
    "k has another head size": (
        {"k": torch.randn(B, HK, N, 9)},
        pyattn.ShapeError,
        r"k: expected \[b=2, hk, n, d=8\], got \[2, 2, 7, 9\]: d is 8 in q",
    ),
    "k has another batch": ({"k": torch.randn(3, HK, N, D)}, pyattn.ShapeError, "k: .*b is 2 in q"),
    "k has heads that do not divide": (
        {"k": torch.randn(B, 3, N, D), "v": torch.randn(B, 3, N, D)},
        pyattn.ShapeError,
        "k: expected a number of heads that divides the 4 heads of q, got 3",
    ),
    "v has another length": ({"v": torch.randn(B, HK, N + 1, D)}, pyattn.ShapeError, "v: expected .*n=7"),
    "q and k have no heads": (
        {"q": torch.randn(B, 0, M, D), "k": torch.randn(B, 0, N, D), "v": torch.randn(B, 0, N, D)},
        pyattn.ShapeError,
        "expected at least 1 head",
    ),
    "k is on another device": ({"k": torch.randn(B, HK, N, D, device="meta")}, pyattn.DeviceError, "k: .*got meta"),
    "mask is float": ({"mask": torch.zeros(M, N)}, pyattn.DtypeError, "mask: expected bool, got float32: .* bias="),
    "mask is integer": ({"mask": _ints(M, N)}, pyattn.DtypeError, r"mask: expected bool, got int64: its \.bool\(\)"),
    "mask is of keys": (
        {"mask": torch.ones(B, N, dtype=torch.bool)},
        pyattn.ShapeError,
        r"mask: .* got \[2, 7\]: mask\[:, None, None\] does, and key_lengths",
    ),
    "bias is of keys": ({"bias": torch.zeros(B, N)}, pyattn.ShapeError, r"got \[2, 7\]: bias\[:, None, None\] does$"),
    "mask does not broadcast": (
        {"mask": torch.ones(M, N + 1, dtype=torch.bool)},
        pyattn.ShapeError,
        r"mask: expected a shape that broadcasts to \[b=2, h=4, m=5, n=7\], got \[5, 8\]",
    ),
    "mask has 5 dimensions": ({"mask": torch.ones(1, 1, 1, M, N, dtype=torch.bool)}, pyattn.ShapeError, "mask"),
    "bias is bool": ({"bias": torch.ones(M, N, dtype=torch.bool)}, pyattn.DtypeError, "bias: expected float32"),
    "bias has kv heads": ({"bias": torch.zeros(B, HK, M, N)}, pyattn.ShapeError, "bias: expected a shape that"),
    "window is one number": ({"window": 3}, pyattn.DtypeError, "window: expected a pair"),
    "window is negative": ({"window": (-1, 0)}, pyattn.RangeError, "window: expected at least 0 keys on the left"),
    "window is float": ({"window": (0, 1.5)}, pyattn.DtypeError, "window: expected an int or None on the right"),
    "key_lengths are float": ({"key_lengths": torch.ones(B)}, pyattn.DtypeError, "key_lengths: expected int8"),
    "key_lengths have another shape": (
        {"key_lengths": _ints(3)},
        pyattn.ShapeError,
        r"key_lengths: .*\[2\], got \[3\]",
    ),
    "key_lengths are too long": (
        {"key_lengths": torch.tensor([1, N + 1])},
        pyattn.RangeError,
        r"key_lengths: expected values in \[0, n=7\], got 8",
    ),
    "key_lengths are negative": ({"key_lengths": torch.tensor([-1, 2])}, pyattn.RangeError, "got -1"),
    "key_lengths are beyond 32 bits": (
        {"key_lengths": torch.tensor([1, 2**32 + 1])},
        pyattn.RangeError,
        "key_lengths: expected integers of 32 bits, got 4294967297",
    ),
    "causal is a string": ({"causal": "no"}, pyattn.DtypeError, "causal: expected a bool, got 'no'"),
    "q is sparse": (
        {"q": torch.zeros(B, H, M, D).to_sparse()},
        pyattn.DtypeError,
        "q: expected a dense tensor, got the",
    ),
    "segment_ids are one tensor": ({"segment_ids": _ints(B, M)}, pyattn.DtypeError, "segment_ids: expected a pair"),
    "segment_ids are swapped": (
        {"segment_ids": (_ints(B, N), _ints(B, M))},
        pyattn.ShapeError,
        r"segment_ids\[0\]: expected shape \[2, 5\], got \[2, 7\]",
    ),
    "scale is not finite": ({"scale": float("inf")}, pyattn.RangeError, "scale: expected a finite number"),
    "scale is a string": ({"scale": "1"}, pyattn.DtypeError, "scale: expected a number, got str"),
    "softcap is 0": ({"softcap": 0.0}, pyattn.RangeError, "softcap: expected a positive number"),
    "alibi_slopes have another shape": ({"alibi_slopes": torch.ones(3)}, pyattn.ShapeError, "alibi_slopes: expected"),
    "alibi_slopes require a gradient": (
        {"alibi_slopes": torch.ones(H, requires_grad=True)},
        pyattn.RangeError,
        "alibi_slopes: .*as `bias`",
    ),
    "sinks are per batch": ({"sinks": torch.ones(B, H)}, pyattn.ShapeError, r"sinks: expected \[h=4\]"),
    "dropout_p is 1": ({"dropout_p": 1.0}, pyattn.RangeError, r"dropout_p: expected a probability in \[0, 1\)"),
    "dropout_p is bool": ({"dropout_p": True}, pyattn.DtypeError, "dropout_p: expected a number, got bool"),
    "seed is float": ({"dropout_p": 0.1, "seed": 1.5}, pyattn.DtypeError, "seed: expected an int"),
    "seed is too large": ({"dropout_p": 0.1, "seed": 2**63}, pyattn.RangeError, "seed: expected an integer of 64 bits"),
    "seed is a vector": ({"dropout_p": 0.1, "seed": _ints(2)}, pyattn.DtypeError, "seed: .*int64 scalar tensor"),
    "softcap is below float32": ({"softcap": 1e-46}, pyattn.RangeError, "softcap: .*float32's range"),
    "scale is above float32": ({"scale": 1e39}, pyattn.RangeError, "scale: .*float32's range"),
    "backend is a list": ({"backend": []}, pyattn.RangeError, "backend: expected auto"),
    "backend is unknown": ({"backend": "magic"}, pyattn.RangeError, "backend: expected auto, .*got 'magic'"),
}


@pytest.mark.parametrize(("changes", "error", "message"), WRONG.values(), ids=WRONG)
def test_attention_wrong_argument_raises_named_error(changes, error, message):
    with pytest.raises(error, match=message) as caught:
        pyattn.attention(**_arguments(**changes))
    assert isinstance(caught.value, (ValueError, TypeError))
    assert isinstance(caught.value, pyattn.PyattnError)
    assert isinstance(caught.value, RuntimeError)  # which is what code written for torch catches


ELSEWHERE = {
    "is_causal": "did you mean causal=",
    "attn_mask": "did you mean mask=, .* bias=",
    "enable_gqa": "k and v may have fewer heads than q",
    "softmax_scale": "did you mean scale=",
    "window_size": "did you mean window=",
    "foo": "$",
}


@pytest.mark.parametrize("name", ELSEWHERE)
@pytest.mark.parametrize(
    "function", [pyattn.attention, pyattn.attention_varlen, pyattn.attention_kvcache, pyattn.explain]
)
def test_option_by_a_name_of_others_raises_and_says_ours(function, name):
    parameters = inspect.signature(function).parameters.values()
    tensors = [torch.zeros(0) for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    with pytest.raises(TypeError, match=f"^{function.__name__}: expected no argument {name}.*{ELSEWHERE[name]}"):
        function(*tensors, **{name: None})


def test_option_by_a_name_of_others_is_answered_in_a_trace_too():
    compiled = torch.compile(pyattn.attention, fullgraph=True, backend="eager")
    with pytest.raises(RuntimeError, match="did you mean causal="):
        compiled(**_arguments(is_causal=True))


def test_attention_numbers_may_be_numpys_or_tensors_without_dimensions():
    options = {"scale": np.float32(0.25), "softcap": torch.tensor(2.0), "dropout_p": np.float16(0.5)}
    whole = {"window": (np.int64(3), np.int32(1)), "seed": np.int64(5)}
    same = {"scale": 0.25, "softcap": 2.0, "dropout_p": 0.5, "window": (3, 1), "seed": 5}
    call = _arguments()
    assert torch.equal(pyattn.attention(**call, **options, **whole), pyattn.attention(**call, **same))
    for wrong in (torch.ones(1), torch.ones((), requires_grad=True), 1j, np.ones(1), True):
        with pytest.raises(pyattn.DtypeError, match=r"^scale: expected a number"):
            pyattn.attention(**_arguments(scale=wrong))


def test_attention_empty_inputs_of_any_strides_are_valid():
    x = torch.randn(0, 2, 8, 4).mT
    assert pyattn.attention(x, x, x).shape == (0, 2, 4, 8)
    q = torch.randn(0, 2, 4, 8, requires_grad=True)
    torch.autograd.grad(pyattn.attention(q, q, q), q, torch.randn(0, 2, 8, 4).mT)


def test_attention_forward_mode_is_refused_and_not_zero():
    q, k, v = _arguments().values()
    with pytest.raises(pyattn.UnsupportedError, match="forward-mode AD"):
        torch.func.jvp(lambda q: pyattn.attention(q, k, v), (q,), (q,))
    _, tangent = torch.func.jvp(lambda q: pyattn.attention(q, k, v, backend="reference"), (q,), (q,))
    assert tangent.abs().max() > 0


def test_attention_float64_stays_float64_under_autocast():
    q, k, v = (t.double() for t in _arguments().values())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert pyattn.attention(q, k, v).dtype is torch.float64


def test_attention_explicit_backend_never_falls_back():
    with pytest.raises(pyattn.UnsupportedError, match="triton: "):
        pyattn.attention(**_arguments(), backend="triton")


def test_attention_no_backend_lists_every_reason():
    q = torch.randn(1, 1, 4, 5000)
    with pytest.raises(pyattn.UnsupportedError) as caught:
        pyattn.attention(q, q, q)
    for words in ("triton: ", "cpu: head size is at most 4096, got d=5000", 'backend="reference"'):
        assert words in str(caught.value)


def test_attention_second_backward_raises_and_names_the_reference():
    q, k, v = (t.requires_grad_() for t in _arguments().values())
    (grad,) = torch.autograd.grad(pyattn.attention(q, k, v).sum(), q, create_graph=True)
    with pytest.raises(pyattn.UnsupportedError, match='backend="reference" is differentiable'):
        grad.sum().backward()


def test_fake_tensors_have_no_values_to_check():
    with FakeTensorMode():
        q, lengths = torch.randn(2, 1, 3, 8), torch.tensor([3, 1])
        assert pyattn.attention(q, q, q, key_lengths=lengths).shape == q.shape
        packed = q.transpose(1, 2).flatten(0, 1)
        starts = torch.tensor([0, 3, 6])
        assert pyattn.attention_varlen(packed, packed, packed, starts, starts).shape == packed.shape
        assert pyattn.attention_kvcache(q, q, q, lengths).shape == q.shape
