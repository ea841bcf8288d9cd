"""torch.compile sees one operator in attention: no graph break, no recompile for a new length, the eager result."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

import pyattn
from pyattn import core
from pyattn.testing import CASES, make_inputs


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def qkv(m: int, n: int, b: int = 2) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(m + n)
    return tuple(
        torch.randn(b, 3, length, 8, dtype=torch.float64, generator=generator).requires_grad_() for length in (m, n, n)
    )


def assert_compiled_agrees(function: Callable[..., Tensor], compiled: Callable[..., Tensor], *tensors: Tensor) -> None:
    """Outputs and gradients, with one random seed for both."""
    results = []
    for run in (function, compiled):
        torch.manual_seed(0)
        out = run(*tensors)
        results.append((out, *torch.autograd.grad(out.square().sum(), tensors)))
    for got, want in zip(*reversed(results), strict=True):
        torch.testing.assert_close(got, want)


def with_lse(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out, lse = pyattn.attention(q, k, v, return_lse=True)
    return out * lse[..., None]


def with_bias_of_its_own(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return pyattn.attention(q, k, v, bias=q[:, :, :, :1] * k[:, :, None, :, 0], softcap=3.0)


def with_every_key_restriction(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    b, m, n = q.shape[0], q.shape[2], k.shape[2]
    return pyattn.attention(
        q, k, v,
        causal=True, window=(6, None), mask=torch.arange(n) != 1,
        key_lengths=torch.full((b,), n - 1),
        segment_ids=(torch.arange(m).expand(b, m) // 4, torch.arange(n).expand(b, n) // 4),
    )  # fmt: skip


def with_segment_ids_of_64_bits(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q_ids, k_ids = (torch.arange(t.shape[2]).expand(t.shape[0], -1) // 4 * 2**32 for t in (q, k))
    return pyattn.attention(q, k, v, segment_ids=(q_ids, k_ids))


def varlen(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The batch as packed sequences of one length."""
    q_starts, k_starts = (torch.arange(t.shape[0] + 1) * t.shape[2] for t in (q, k))
    packed = (t.transpose(1, 2).flatten(0, 1) for t in (q, k, v))
    out, lse = pyattn.attention_varlen(*packed, q_starts, k_starts, causal=True, dropout_p=0.4, return_lse=True)
    return out + lse.T[..., None].clamp(min=-1.0)


def sdpa_with_float_mask(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return pyattn.scaled_dot_product_attention(q, k, v, q[:, :1, :, :1] + k[:, :1, None, :, 0])


FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    "attention": lambda q, k, v: pyattn.attention(q, k, v, causal=True),
    "attention-lse": with_lse,
    "attention-bias": with_bias_of_its_own,
    "attention-restricted": with_every_key_restriction,
    "attention-wide-segments": with_segment_ids_of_64_bits,
    "attention-dropout": lambda q, k, v: pyattn.attention(q, k, v, dropout_p=0.4),
    "attention-dropout-seed": lambda q, k, v: pyattn.attention(q, k, v, dropout_p=0.4, seed=7),
    "attention-gqa": lambda q, k, v: pyattn.attention(q, k[:, :1], v[:, :1]),
    "varlen": varlen,
    "additive": lambda q, k, v: pyattn.additive_attention(q, k, v, v[0, :, 0], causal=True, dropout_p=0.4),
    "relative": lambda q, k, v: pyattn.relative_attention(
        q, k, v, q, torch.cat([k, k, k, k], 2), -q.shape[2], causal=True, dropout_p=0.4
    ),
    "sdpa-causal": lambda q, k, v: pyattn.scaled_dot_product_attention(q, k, v, is_causal=True),
    "sdpa-float-mask": sdpa_with_float_mask,
    "sdpa-3d": lambda q, k, v: pyattn.scaled_dot_product_attention(q[0], k[0], v[0], dropout_p=0.4),
    "sdpa-5d": lambda q, k, v: pyattn.scaled_dot_product_attention(q[None], k.expand(2, -1, -1, -1, -1), v),
    "sdpa-gqa": lambda q, k, v: pyattn.scaled_dot_product_attention(q, k[:, :1], v[:, :1], enable_gqa=True),
}


@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
def test_compile_whole_graph_gives_the_eager_result(function: Callable[..., Tensor]) -> None:
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert_compiled_agrees(function, compiled, *qkv(5, 7))


@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
def test_compile_dynamic_does_not_recompile_for_a_new_length(function: Callable[..., Tensor]) -> None:
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=True)
    assert_compiled_agrees(function, compiled, *qkv(5, 7))
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert_compiled_agrees(function, compiled, *qkv(11, 13))
        assert_compiled_agrees(function, compiled, *qkv(17, 9))


def test_compile_marked_length_stays_dynamic() -> None:
    """mark_dynamic raises where anything fixes the size to a number."""
    tensors = qkv(5, 7)
    for t in tensors:
        torch._dynamo.mark_dynamic(t, 0)
        torch._dynamo.mark_dynamic(t, 2)
    function = FUNCTIONS["attention"]
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert_compiled_agrees(function, compiled, *tensors)
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert_compiled_agrees(function, compiled, *qkv(11, 13, b=3))


def test_compile_takes_a_scale_of_numpys() -> None:
    scale = np.float64(0.3)

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return pyattn.scaled_dot_product_attention(q, k, v, scale=scale)

    assert_compiled_agrees(function, torch.compile(function, fullgraph=True, backend="aot_eager"), *qkv(5, 7))


def test_compile_with_inductor_gives_the_eager_result() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return pyattn.scaled_dot_product_attention(q.relu(), k, v, is_causal=True).transpose(1, 2).flatten(2).tanh()

    assert_compiled_agrees(function, torch.compile(function, fullgraph=True), *qkv(5, 7))


def self_attention(module: pyattn.MultiheadAttention, x: Tensor, need_weights: bool) -> Tensor:
    padding = torch.arange(x.shape[1]).expand(x.shape[:2]) > 3
    out, weights = module(x, x, x, key_padding_mask=padding, need_weights=need_weights)
    return out if weights is None else weights @ out


@pytest.mark.parametrize(("need_weights", "dropout", "heads"), [(False, 0.4, 2), (True, 0.0, 2), (True, 0.4, 1)])
def test_compile_mha_gives_the_eager_result_without_recompiles(need_weights: bool, dropout: float, heads: int) -> None:
    torch.manual_seed(0)
    module = pyattn.MultiheadAttention(8, heads, dropout=dropout, batch_first=True, dtype=torch.float64)

    def function(x: Tensor) -> Tensor:
        return self_attention(module, x, need_weights)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=True)
    assert_compiled_agrees(function, compiled, torch.randn(2, 5, 8, dtype=torch.float64, requires_grad=True))
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert_compiled_agrees(function, compiled, torch.randn(2, 11, 8, dtype=torch.float64, requires_grad=True))


def test_compile_follows_a_change_of_backend() -> None:
    function = FUNCTIONS["attention"]
    compiled = torch.compile(function, backend="eager")
    tensors = qkv(5, 7)
    before = compiled(*tensors)
    with pyattn.use_backend("reference"):
        assert torch.equal(compiled(*tensors), function(*tensors))
    assert torch.equal(compiled(*tensors), before)


class Exported(torch.nn.Module):
    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.function(q, k, v)


@pytest.mark.parametrize(
    "name", ["attention", "attention-dropout-seed", "attention-gqa", "sdpa-causal", "sdpa-float-mask"]
)
def test_export_takes_any_batch_and_length(name: str) -> None:
    b, m, n = (torch.export.Dim(axis, min=2) for axis in "bmn")
    shapes = {"q": {0: b, 2: m}, "k": {0: b, 2: n}, "v": {0: b, 2: n}}
    module = Exported(FUNCTIONS[name])
    program = torch.export.export(module, qkv(5, 7), dynamic_shapes=shapes).module()
    for tensors in (qkv(5, 7), qkv(11, 13, b=3)):
        torch.testing.assert_close(program(*tensors), module(*tensors))


OPERATOR_CASES = (
    "plain",
    "layout-bmhd",
    "causal-top-left",
    "mask-per-key",
    "bias-per-head",
    "dropout",
    "no-keys",
    "gqa",
    "packed-causal",
    "packed-dropout-alibi-sinks",
    "additive-causal-gqa",
)


@pytest.mark.parametrize("case", [case for case in CASES if case.id in OPERATOR_CASES], ids=lambda case: case.id)
def test_operators_pass_torch_opcheck(case) -> None:
    call = make_inputs(case, torch.float32)
    leaves = {name: t.detach().requires_grad_() for name, t in call.tensors.items()}
    x, numbers = core.prepare(**leaves, **call.options)
    arguments = (*(getattr(x, name) for name in x._fields), *numbers, "auto")
    torch.library.opcheck(torch.ops.pyattn.attention.default, arguments)

    arguments = tuple(t.detach() if isinstance(t, Tensor) else t for t in arguments)
    results = torch.ops.pyattn.attention(*arguments)
    for bias_gradient in (True, False):
        backward = (*map(torch.ones_like, results[:2]), *results, bias_gradient, *arguments)
        torch.library.opcheck(torch.ops.pyattn.attention_backward.default, backward)
