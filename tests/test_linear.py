"""Products of few rows: right on every instruction set, and torch's own wherever torch does more than multiply."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F

from pyattn import processor
from pyattn.backends import cpu
from pyattn.nn.linear import FEW, LEAST_ROWS, MANY, WORK, Linear, _OneDNN, linear, onednn_is_faster

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# (rows, in, out): whole vectors and tiles, one number beside them, tails of each, a single one of everything.
SIZES = ((1, 768, 64), (2, 63, 5), (3, 1, 1), (4, 64, 33), (5, 65, 32), (7, 37, 4), (8, 130, 131), (32, 96, 66))


def _operands(rows: int, inputs: int, outputs: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((rows, inputs), (outputs, inputs), (outputs,))
    x, weight, bias = (torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes)
    return x, weight, bias


def _assert_right(out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Within the bound of a dot product in the accumulator's precision, and one rounding of the result."""
    exact = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    magnitude = F.linear(x.double().abs(), weight.double().abs(), None if bias is None else bias.double().abs())
    accumulator = torch.finfo(torch.float64 if x.dtype is torch.float64 else torch.float32).eps
    allowed = (x.shape[-1] + 2) * accumulator * magnitude + torch.finfo(x.dtype).eps * exact.abs()
    assert out.dtype is x.dtype
    assert out.shape == exact.shape
    assert bool(((out.double() - exact).abs() <= allowed).all())


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("isa", cpu.isas())
def test_linear_is_the_product(isa, dtype, size):
    x, weight, bias = _operands(*size, dtype)
    _assert_right(cpu.linear(x, weight, bias, isa), x, weight, bias)
    _assert_right(cpu.linear(x, weight, None, isa), x, weight, None)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_linear_reads_views_and_leaves_their_surroundings_alone(dtype):
    """Rows of something wider, whose other columns are NaN."""
    x, weight, bias = _operands(5, 37, 9, dtype)
    wide_x, wide_weight = (torch.full((len(t), 50), torch.nan, dtype=dtype) for t in (x, weight))
    wide_x[:, 3:40], wide_weight[:, 3:40] = x, weight
    for isa in cpu.isas():
        assert torch.equal(
            cpu.linear(wide_x[:, 3:40], wide_weight[:, 3:40], bias, isa), cpu.linear(x, weight, bias, isa)
        )
    expected = cpu.linear(x, weight, bias)
    assert torch.equal(cpu.linear(x.T.contiguous().T, weight, bias.repeat_interleave(2)[::2]), expected)
    assert torch.equal(cpu.linear(x.view(5, 1, 37), weight, bias), expected[:, None])
    assert torch.equal(cpu.linear(x[0], weight, bias), expected[0])
    same = bias[:1].expand(9)
    assert torch.equal(cpu.linear(x, weight, same), cpu.linear(x, weight, same.clone()))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("isa", cpu.isas())
def test_linear_rows_do_not_know_each_other(isa, dtype):
    """The same bits alone and in a batch, by one thread and by several, beside a row of NaN."""
    x, weight, bias = _operands(7, 100, 70, dtype)
    x[3] = torch.nan
    together = cpu.linear(x, weight, bias, isa)
    assert bool(together[3].isnan().all())
    for r in (0, 2, 4, 6):
        assert torch.equal(cpu.linear(x[r], weight, bias, isa), together[r])
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert torch.equal(cpu.linear(x, weight, bias, isa).view(torch.uint8), together.view(torch.uint8))
    finally:
        torch.set_num_threads(threads)


@pytest.fixture
def kernel_calls(monkeypatch) -> list[Tensor]:
    """What the kernel is called with, however few the weights."""
    calls: list[Tensor] = []

    def spy(x: Tensor, *others: Tensor, of: Callable[..., Tensor] = cpu.linear) -> Tensor:
        calls.append(x)
        return of(x, *others)

    monkeypatch.setattr(cpu, "linear", spy)
    monkeypatch.setattr("pyattn.nn.linear.MANY", 1)
    return calls


# (shape of x, dtype, whether they are few rows)
ROWS = (
    ((1, 16), torch.float32, True),
    ((16,), torch.float32, True),
    ((2, 16, 16), torch.float32, True),
    ((2, 17, 16), torch.float32, False),
    ((0, 16), torch.float32, False),
    ((FEW[torch.bfloat16], 16), torch.bfloat16, True),
    ((FEW[torch.bfloat16] + 1, 16), torch.bfloat16, False),
    ((1, 16), torch.float16, False),
)


@pytest.mark.parametrize(("shape", "dtype", "few"), ROWS, ids=str)
@torch.no_grad()
def test_linear_takes_few_rows_without_gradients(kernel_calls, shape, dtype, few):
    layer, x = Linear(16, 8, dtype=dtype), torch.randn(shape, dtype=dtype)
    torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias))
    assert bool(kernel_calls) is few


@torch.no_grad()
def test_linear_takes_many_weights(kernel_calls, monkeypatch):
    monkeypatch.setattr("pyattn.nn.linear.MANY", MANY)
    for outputs, many in ((MANY // 64, True), (MANY // 64 - 1, False)):
        kernel_calls.clear()
        linear(torch.ones(1, 64), torch.ones(outputs, 64))
        assert bool(kernel_calls) is many


def _nested(weight: Tensor) -> Tensor:
    return torch.nested.nested_tensor([weight], layout=torch.strided)


# Where torch does more than multiply, or the kernel cannot: (context, x, weight).
TORCHS_OWN = {
    "autocast": (lambda: torch.autocast("cpu", dtype=torch.bfloat16), Tensor.clone, Tensor.clone),
    "profiler": (torch.autograd.profiler.profile, Tensor.clone, Tensor.clone),
    "forward mode": (forward_ad.dual_level, Tensor.clone, lambda w: forward_ad.make_dual(w, torch.ones_like(w))),
    "gradient of the weight": (torch.enable_grad, Tensor.clone, Tensor.requires_grad_),
    "integers": (nullcontext, Tensor.int, Tensor.int),
    "another dtype": (nullcontext, Tensor.clone, Tensor.bfloat16),
    "another device": (nullcontext, lambda x: x.to("meta"), lambda w: w.to("meta")),
    "sparse": (nullcontext, Tensor.clone, Tensor.to_sparse_csr),
    "mkldnn": (nullcontext, Tensor.to_mkldnn, Tensor.to_mkldnn),
    "nested": (nullcontext, _nested, Tensor.clone),
    "stored transposed": (nullcontext, Tensor.clone, lambda w: w.T.contiguous().T),
    "no rows": (nullcontext, lambda x: x[0, 0], Tensor.clone),
}


@pytest.mark.parametrize(("context", "of_x", "of_weight"), TORCHS_OWN.values(), ids=TORCHS_OWN)
@torch.no_grad()
def test_linear_leaves_the_rest_to_torch(kernel_calls, context, of_x, of_weight):
    with context():
        x, weight = of_x(torch.ones(2, 16)), of_weight(torch.randn(8, 16))
        assert _outcome(linear, x, weight) == _outcome(F.linear, x, weight)
    assert not kernel_calls


@torch.no_grad()
def test_linear_without_compiled_kernels_is_torchs(kernel_calls, monkeypatch):
    monkeypatch.setattr(cpu, "is_built", lambda: False)
    linear(torch.ones(2, 16), torch.ones(8, 16))
    assert not kernel_calls


def test_linear_has_gradients_and_is_traced(kernel_calls):
    layer = Linear(16, 8)
    x = torch.randn(2, 16, requires_grad=True)
    layer(x).sum().backward()
    assert layer.weight.grad is not None
    assert x.grad is not None
    with torch.no_grad():
        expected = F.linear(x, layer.weight, layer.bias)
        assert torch.equal(torch.func.vmap(layer)(x[:, None])[:, 0], expected)
        for traced in (
            torch.compile(layer, backend="eager", fullgraph=True),
            torch.jit.trace(layer, x, check_trace=False),
            torch.fx.symbolic_trace(nn.Sequential(layer)),
        ):
            assert torch.equal(traced(x), expected)
        operands = (x, layer.weight, layer.bias)
        assert torch.equal(make_fx(linear, tracing_mode="symbolic")(*operands)(*operands), expected)
    assert not kernel_calls


@pytest.fixture
def onednn_calls(monkeypatch) -> list[torch.Size]:
    """The shapes of what oneDNN multiplies, as if it were faster here."""
    if not torch.backends.mkldnn.is_available():
        pytest.skip("this torch has no oneDNN")
    calls: list[torch.Size] = []

    def spy(ctx: object, x: Tensor, *others: Tensor | None, of: Callable[..., Tensor] = _OneDNN.forward) -> Tensor:
        calls.append(x.shape)
        return of(ctx, x, *others)

    monkeypatch.setattr(_OneDNN, "forward", staticmethod(spy))
    monkeypatch.setattr("pyattn.nn.linear.onednn_is_faster", lambda: True)
    return calls


# How weights [150, 100] may lie in memory.
LAYOUTS = {
    "rows": lambda: torch.randn(150, 100),
    "columns": lambda: torch.randn(100, 150).T,
    "rows of a wider one": lambda: torch.full((150, 130), torch.nan)[:, 7:107].normal_(),
    "columns of a wider one": lambda: torch.full((100, 180), torch.nan)[:, 9:159].normal_().T,
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("bias", [True, False])
def test_linear_by_onednn_is_the_product_with_its_gradients(onednn_calls, layout, bias):
    torch.manual_seed(0)
    x, weight = torch.randn(40, 3, 100).transpose(0, 1), LAYOUTS[layout]()
    given = [x, weight, *([torch.randn(150)] if bias else [])]
    _assert_right(linear(*given), x, weight, given[2] if bias else None)
    given, exact = ([t.to(dtype).requires_grad_() for t in given] for dtype in (torch.float32, torch.float64))
    d_out = torch.randn(3, 40, 150)
    found, expected = (
        torch.autograd.grad(function(*of), of, d_out.to(of[0].dtype), create_graph=True)
        for function, of in ((linear, given), (F.linear, exact))
    )
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours.double(), theirs, atol=1e-4, rtol=1e-5)
    second = [torch.randn_like(t) for t in given[:2]]
    ours, theirs = (
        torch.autograd.grad(firsts[:2], of[:2], [t.to(of[0].dtype) for t in second])
        for firsts, of in ((found, given), (expected, exact))
    )
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one.double(), other, atol=1e-4, rtol=1e-5)
    assert onednn_calls[:4] == [(120, 100), (120, 100), (120, 150), (150, 120)]
    assert len(onednn_calls) > 4  # gradients of gradients


@pytest.mark.parametrize(
    ("rows", "inputs", "outputs", "dtype", "much"),
    [
        (LEAST_ROWS, 512, WORK // LEAST_ROWS // 512, torch.float32, True),
        (LEAST_ROWS, 512, WORK // LEAST_ROWS // 512 - 1, torch.float32, False),
        (LEAST_ROWS - 1, 1024, 1024, torch.float32, False),
        (64, 128, 128, torch.float64, False),
        (64, 128, 128, torch.bfloat16, False),
    ],
    ids=str,
)
def test_linear_by_onednn_is_for_much_work(onednn_calls, rows, inputs, outputs, dtype, much):
    linear(torch.ones(rows, inputs, dtype=dtype), torch.ones(outputs, inputs, dtype=dtype, requires_grad=True))
    assert bool(onednn_calls) is much


@pytest.mark.parametrize("context", ["autocast", "forward mode"])
def test_linear_by_onednn_leaves_the_rest_to_torch(onednn_calls, context):
    of_context, _, of_weight = TORCHS_OWN[context]
    with of_context():
        x, weight = torch.randn(64, 128), of_weight(torch.randn(128, 128))
        assert torch.equal(linear(x, weight), F.linear(x, weight))
    rows = torch.arange(2).expand(128, 2).T  # one number in memory for a whole row
    assert torch.equal(linear(x, rows.float().expand(2, 128)), F.linear(x, rows.float()))
    layer = Linear(128, 128)
    expected = F.linear(x, layer.weight, layer.bias)
    for traced in (
        torch.compile(layer, backend="eager", fullgraph=True),
        torch.func.vmap(layer, chunk_size=64),
        torch.fx.symbolic_trace(nn.Sequential(layer)),
        torch.jit.trace(layer, x, check_trace=False),
    ):
        torch.testing.assert_close(traced(x), expected)
    assert not onednn_calls


def test_linear_by_onednn_has_batches_of_gradients(onednn_calls):
    x, weight = torch.randn(64, 128, requires_grad=True), torch.randn(128, 128, requires_grad=True)
    d_outs = torch.randn(3, 64, 128)
    found = torch.autograd.grad(linear(x, weight), (x, weight), d_outs, is_grads_batched=True)
    expected = torch.autograd.grad(F.linear(x, weight), (x, weight), d_outs, is_grads_batched=True)
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-5)
    assert onednn_calls == [(64, 128)]


@pytest.mark.parametrize(
    ("fields", "faster"),
    [
        ({"vendor_id": "AuthenticAMD", "cpu family": "26"}, True),
        ({"vendor_id": "AuthenticAMD", "cpu family": "25"}, False),
        ({"vendor_id": "GenuineIntel", "cpu family": "26"}, False),
        ({}, False),
    ],
    ids=str,
)
def test_linear_takes_onednn_on_zen_5(monkeypatch, fields, faster):
    monkeypatch.setattr(processor, "fields", lambda: fields)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    for library in (torch.backends.mkl, torch.backends.mkldnn):
        monkeypatch.setattr(library, "is_available", lambda: True)
    assert onednn_is_faster.__wrapped__() is faster
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    assert not onednn_is_faster.__wrapped__()


@pytest.mark.parametrize("shapes", [((2, 3), (4, 5), None), ((2, 3), (4, 3), (5,)), ((2, 3), (3,), None)], ids=str)
def test_linear_raises_what_torch_raises(shapes):
    x, weight, bias = (None if shape is None else torch.randn(shape) for shape in shapes)
    with torch.no_grad():
        assert _outcome(linear, x, weight, bias) == _outcome(F.linear, x, weight, bias)


def _outcome(function: Callable[..., Tensor], *args: Tensor | None) -> object:
    """Type, shape and bits, or the error."""
    try:
        out = function(*args)
    except (RuntimeError, NotImplementedError) as error:
        return str(error)
    if out.is_nested:
        out = out.to_padded_tensor(0)
    return type(out), out.shape, out.layout, None if out.is_meta else out.to_dense().tolist()


BORDER = {
    "x": (lambda given: given["x"].__setitem__(1, (2, 4)), "x: reaches outside|w: expected size 4"),
    "w outside": (lambda given: given["w"].__setitem__(4, 4), "w: reaches outside its storage of 4 bytes"),
    "w strides": (lambda given: given["w"].__setitem__(2, (1, 5)), "w: last stride must be 1"),
    "bias": (lambda given: given["bias"].__setitem__(1, (4,)), "bias: expected size 5"),
    "y": (lambda given: given["y"].__setitem__(1, (3, 5)), "y: expected size 2"),
    "negative": (lambda given: given["x"].__setitem__(1, (2, -1)), "x: expected sizes of at least 0, got -1"),
    "rows": (lambda given: given["x"].__setitem__(1, (1 << 60, 3)), "x: sizes and strides overflow"),
}


@pytest.mark.parametrize(("change", "message"), BORDER.values(), ids=BORDER)
def test_linear_border_refuses(change, message):
    x, weight, bias = _operands(2, 3, 5, torch.float32)
    tensors = {"x": x, "w": weight, "bias": bias, "y": torch.zeros(2, 5)}
    given = {name: list(cpu._described(t)) for name, t in tensors.items()}
    change(given)
    with pytest.raises(ValueError, match=message):
        cpu._module().linear("generic", "float32", *map(tuple, given.values()), 1)
    assert not tensors["y"].any()
