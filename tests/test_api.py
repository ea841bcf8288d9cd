"""The public functions around the kernels: dispatch, explanation, seeds, layouts, autocast."""

import importlib
import subprocess
import sys
from contextlib import nullcontext

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

import pyattn
from pyattn import ops
from pyattn.backends.cpu import CpuBackend
from pyattn.spec import Inputs


def _qkv(m=33, n=33, requires_grad=False):
    torch.manual_seed(0)
    return [torch.randn(2, 4, length, 16, requires_grad=requires_grad) for length in (m, n, n)]


def test_backends_are_ready_or_say_why():
    states = pyattn.list_backends()
    assert states["reference"] == "ready"
    assert states["cpu"] == "ready"
    if not torch.cuda.is_available():
        assert "CUDA" in states["triton"]


def test_tensors_of_the_cpu_ask_for_no_gpu(monkeypatch):
    """In a forked process torch raises when it is asked for one."""

    def unavailable(self: object) -> str:
        raise RuntimeError("Cannot re-initialize CUDA in forked subprocess")

    for name in ("hopper", "triton", "cuda"):
        monkeypatch.setattr(type(pyattn.registry.BACKENDS[name]), "unavailable", unavailable)
    q = torch.randn(1, 2, 8, 16)
    assert pyattn.attention(q, q, q).shape == q.shape
    assert "runs on cuda, got tensors on cpu" in str(pyattn.explain(q, q, q))


def test_use_backend_sets_the_default_until_it_ends():
    q, k, v = _qkv()
    fused = pyattn.attention(q, k, v)
    with pyattn.use_backend("reference"):
        inside = pyattn.attention(q, k, v)
        assert torch.equal(pyattn.attention(q, k, v, backend="cpu"), fused), "an explicit backend wins"
    assert torch.equal(inside, pyattn.attention(q, k, v, backend="reference"))
    assert torch.equal(pyattn.attention(q, k, v), fused)


def test_use_backend_reference_differentiates_twice():
    q, k, v = _qkv(5, 5, requires_grad=True)
    with pyattn.use_backend("reference"):
        (grad,) = torch.autograd.grad(pyattn.attention(q, k, v).square().sum(), q, create_graph=True)
    grad.sum().backward()
    assert k.grad.isfinite().all()


def test_explain_says_the_choice_every_refusal_and_bytes():
    q, k, v = _qkv(64, 128)
    text = pyattn.explain(q, k, v, causal=True, return_lse=True)
    assert "b=2 h=4 hk=4 m=64 n=128 d=16 dv=16 float32 on cpu; features: causal" in text
    assert "-> cpu" in text
    assert "triton" in text
    assert f"{2 * 4 * 64 * 128 * 4 / 1e6:.2f} MB" in text


def test_explain_shows_itself_as_text():
    explanation = pyattn.explain(*_qkv())
    assert repr(explanation) == str(explanation)
    assert len(repr(explanation).splitlines()) > 3


def test_explain_notices_lengths_in_the_place_of_heads():
    q, k, v = _qkv(40, 50)
    assert "h=40 > m=4 and hk=40 > n=4" in pyattn.explain(*(t.transpose(1, 2) for t in (q, q, q)))
    assert "transpose" not in pyattn.explain(q, k, v)
    assert "transpose" not in pyattn.explain(q[:, :, :1], k, v), "decoding has more heads than queries"


def test_explain_takes_a_short_cache_for_what_it_is():
    q, cache = torch.zeros(1, 12, 2, 16), torch.zeros(1, 12, 8, 16)
    assert "heads" not in pyattn.explain(q, cache, cache, key_lengths=torch.tensor([4]), cached=True)
    assert "heads" not in pyattn.explain(q[:, :, :1], cache, cache)


def test_dropout_seed_repeats_and_generator_advances():
    q, k, v = _qkv()
    first, again = (pyattn.attention(q, k, v, dropout_p=0.5, seed=7) for _ in range(2))
    assert torch.equal(first, again)
    torch.manual_seed(1)
    drawn, next_drawn = (pyattn.attention(q, k, v, dropout_p=0.5) for _ in range(2))
    assert not torch.equal(drawn, next_drawn)
    torch.manual_seed(1)
    assert torch.equal(pyattn.attention(q, k, v, dropout_p=0.5), drawn)


def test_output_keeps_the_layout_of_q():
    x = torch.randn(2, 33, 4, 16)
    out = pyattn.attention(*(x.transpose(1, 2) for _ in range(3)))
    assert out.transpose(1, 2).is_contiguous()
    assert pyattn.attention(*_qkv()).is_contiguous()


def test_strided_last_dimension_gives_the_same_result():
    q, k, v = _qkv()
    strided = (t.transpose(2, 3).contiguous().transpose(2, 3) for t in (q, k, v))
    assert torch.equal(pyattn.attention(*strided), pyattn.attention(q, k, v))


def test_autocast_lowers_the_inputs_as_torch_does():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert pyattn.attention(*_qkv()).dtype is torch.bfloat16


def test_lse_alone_is_differentiable():
    q, k, v = _qkv(requires_grad=True)
    _, lse = pyattn.attention(q, k, v, return_lse=True)
    (d_q,) = torch.autograd.grad(lse.sum(), q, retain_graph=True)
    scores = (q @ k.transpose(-1, -2) / 4).logsumexp(-1)
    torch.testing.assert_close(d_q, torch.autograd.grad(scores.sum(), q)[0])


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("learned", [False, True], ids=["constant", "learned"])
def test_gradient_of_a_bias_is_computed_where_it_is_wanted(monkeypatch, learned, compiled):
    wanted, run = [], CpuBackend.backward

    def backward(*given):
        wanted.append(given[-1])
        return run(*given)

    monkeypatch.setattr(CpuBackend, "backward", backward)
    function = torch.compile(pyattn.attention, fullgraph=True, backend="aot_eager") if compiled else pyattn.attention
    bias = torch.randn(33, 33, requires_grad=learned)
    function(*_qkv(requires_grad=True), bias=bias).sum().backward()
    assert wanted == [learned]
    assert (bias.grad is not None) == learned


def test_gradient_checkpointing_repeats_the_dropout_mask():
    q, k, v = _qkv(requires_grad=True)

    def attention(q):
        return pyattn.attention(q, k, v, dropout_p=0.3)

    grads = []
    for call in (attention, lambda q: torch.utils.checkpoint.checkpoint(attention, q, use_reentrant=False)):
        torch.manual_seed(3)
        grads.append(torch.autograd.grad(call(q).square().sum(), q)[0])
    assert torch.equal(*grads)


FACES = [
    *("pyattn", "pyattn.nn", "pyattn.models", "pyattn.decoding", "pyattn.testing", "pyattn.compat"),
    *("pyattn.compat.torch", "pyattn.compat.patch", "pyattn.compat.transformers", "pyattn.compat.xformers"),
    *("pyattn.compat.flash_attn", "pyattn.compat.flash_attn.bert_padding", "pyattn.compat.flash_attn_interface"),
    "pyattn.compat.flash_attn.flash_attn_interface",
]


@pytest.mark.parametrize("name", FACES)
def test_face_shows_its_public_names_alone(name):
    face = importlib.import_module(name)
    assert dir(face) == sorted(face.__all__)
    assert all(hasattr(face, name) for name in face.__all__)


def test_import_pyattn_reaches_every_face():
    names = (
        *("models.GPT", "models.Bert", "models.Transformer", "nn.MultiheadAttention", "decoding.beam_search"),
        *("compat.torch.scaled_dot_product_attention", "compat.flash_attn.install", "compat.transformers.register"),
        *("compat.flash_attn_interface.install", "compat.xformers.memory_efficient_attention"),
    )
    code = f"import pyattn; {'; '.join(f'pyattn.{name}' for name in names)}"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_name_that_pyattn_has_not_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'pyattn' has no attribute 'atention'") as raised:
        pyattn.atention  # noqa: B018 (it raises)
    assert (raised.value.name, raised.value.obj) == ("atention", pyattn)  # so that Python says what was meant


def test_import_pyattn_leaves_heavy_modules_alone():
    code = "import torch, sys; old = {*sys.modules}; import pyattn; print(*({*sys.modules} - old))"
    new = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    heavy = {"triton", "transformers", "matplotlib", "typer", "rich", "tokenizers", "pyattn.models", "pyattn.decoding"}
    assert not heavy & {*new}


def _parameters():
    return [torch.nn.Parameter(t) for t in _qkv()]


def _negated():
    return [torch.imag(torch.randn(*t.shape[:3], 1, dtype=torch.complex64).conj()) for t in _qkv()]


class _Subclass(torch.Tensor):
    pass


# Where torch's dispatcher has nothing to do but call the backend, and where it has: (tensors, context, alone).
SURROUNDINGS = {
    "plain": (_qkv, nullcontext, True),
    "parameters": (_parameters, nullcontext, False),
    "parameters, no_grad": (_parameters, torch.no_grad, True),
    "inference_mode": (_qkv, torch.inference_mode, True),
    "autocast": (_qkv, lambda: torch.autocast("cpu", dtype=torch.bfloat16), True),
    "dispatch mode": (_qkv, TorchDispatchMode, False),
    "function mode": (_qkv, lambda: torch.device("cpu"), False),
    "profiler": (_qkv, torch.autograd.profiler.profile, False),
    "subclass": (lambda: [t.as_subclass(_Subclass) for t in _qkv()], nullcontext, False),
    "meta": (lambda: [t.to("meta") for t in _qkv()], nullcontext, False),
    "negated": (_negated, nullcontext, False),
}


@pytest.mark.parametrize(("tensors", "context", "alone"), SURROUNDINGS.values(), ids=SURROUNDINGS)
def test_dispatcher_is_left_out_only_where_it_has_nothing_to_do(tensors, context, alone):
    tensors = tensors()
    with context():
        assert ops.concerns_the_backend_alone(Inputs(*tensors)) is alone


def test_dispatcher_is_not_left_out_of_transforms_and_traces():
    q, k, v = _qkv()
    found = []

    def attention(q):
        found.append(ops.concerns_the_backend_alone(Inputs(q, k, v)))
        return q

    torch.vmap(attention)(q[None])
    torch.func.grad(lambda q: attention(q).sum())(q)
    make_fx(attention)(q)
    assert found == [False] * 3


def test_dispatcher_left_out_gives_the_same_bits():
    q, k, v = _qkv()
    direct = pyattn.attention(q, k, v, causal=True, return_lse=True)
    with torch.autograd.profiler.profile() as profile:
        dispatched = pyattn.attention(q, k, v, causal=True, return_lse=True)
    assert "pyattn::attention" in [event.name for event in profile.function_events]
    assert all(torch.equal(a, b) for a, b in zip(direct, dispatched, strict=True))
