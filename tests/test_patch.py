"""pyattn.patch: torch's models compute through pyattn what they compute alone, and are torch's again afterwards."""

from __future__ import annotations

import contextlib
import copy
import io
import pickle
import sys
import threading
import types
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention as imported_by_name
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

import pyattn
from pyattn import core, registry
from pyattn.compat import patch as implementation

E, HEADS, B, M = 16, 4, 3, 7
TORCHS = (F.scaled_dot_product_attention, nn.MultiheadAttention.forward, nn.TransformerEncoderLayer.forward)

pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors", "error:.*runs torch's own")


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    implementation._warned.clear()
    yield
    assert installed() == TORCHS and imported_by_name is TORCHS[0]
    torch._dynamo.reset()


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """One entry for each attention that pyattn computes."""
    made: list[Any] = []
    attention = core.attend
    monkeypatch.setattr(core, "attend", lambda *t, **options: made.append(t) or attention(*t, **options))
    return made


def installed() -> tuple[Callable, ...]:
    return F.scaled_dot_product_attention, nn.MultiheadAttention.forward, nn.TransformerEncoderLayer.forward


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + 1000 * sum(shape)), dtype=torch.float64)


class Attention(nn.Module):
    """Calls the function by its module, or by the name it was imported under."""

    def __init__(self, by_name: bool = False) -> None:
        super().__init__()
        self.by_name = by_name
        self.project = nn.Linear(E, 3 * E, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.project(x).unflatten(-1, (3 * HEADS, -1)).transpose(-2, -3).chunk(3, -3)
        attention = imported_by_name if self.by_name else F.scaled_dot_product_attention
        return attention(q, k, v, is_causal=True).transpose(-2, -3).flatten(-2)


class OwnLayer(nn.TransformerEncoderLayer):
    def forward(self, *args: Any, **options: Any) -> Tensor:
        return super().forward(*args, **options)


class OwnForward(nn.MultiheadAttention):
    def forward(self, *args: Any, **options: Any) -> Any:
        raise NotImplementedError


def encoder(**options: Any) -> nn.TransformerEncoder:
    torch.manual_seed(0)
    options = {"dropout": 0.0, "batch_first": True, "dtype": torch.float64} | options
    layer = nn.TransformerEncoderLayer(E, HEADS, 24, **options)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=not layer.norm_first)


def transformer() -> nn.Transformer:
    torch.manual_seed(0)
    return nn.Transformer(E, HEADS, 1, 2, 24, dropout=0.0, batch_first=True, dtype=torch.float64)


PADDING = torch.arange(M) >= torch.tensor([[7], [5], [2]])
CAUSAL = nn.Transformer.generate_square_subsequent_mask(M, dtype=torch.float64)
X = normal(B, M, E)
# name: (model, arguments, options, how many attentions)
MODELS: dict[str, tuple[Callable[[], nn.Module], tuple, dict, int]] = {
    "encoder": (encoder, (X,), {}, 2),
    "encoder-padded": (encoder, (X,), {"src_key_padding_mask": PADDING}, 2),
    "encoder-causal": (encoder, (X,), {"mask": CAUSAL, "is_causal": True}, 2),
    "encoder-norm-first": (lambda: encoder(norm_first=True), (X,), {"src_key_padding_mask": PADDING}, 2),
    "transformer": (transformer, (X, X), {"memory_key_padding_mask": PADDING, "tgt_mask": CAUSAL}, 5),
    "custom": (Attention, (X,), {}, 1),
    "imported-by-name": (lambda: Attention(by_name=True), (X,), {}, 1),
}


def results(model: nn.Module, arguments: tuple, options: dict, inference: bool) -> list[Tensor]:
    """The output, and while training the gradients of inputs and parameters."""
    model.train(not inference)
    if inference:
        with torch.no_grad():
            return [model(*arguments, **options)]
    arguments = tuple(t.detach().clone().requires_grad_() for t in arguments)
    out = model(*arguments, **options)
    return [out, *torch.autograd.grad((out * normal(*out.shape, seed=3)).sum(), [*arguments, *model.parameters()])]


@pytest.mark.parametrize("inference", [False, True], ids=["training", "inference"])
@pytest.mark.parametrize("whole_process", [False, True], ids=["model", "process"])
@pytest.mark.parametrize("case", MODELS)
def test_patch_model_agrees_with_torch(case: str, whole_process: bool, inference: bool, calls: list) -> None:
    make, arguments, options, expected_calls = MODELS[case]
    model = make()
    expected = results(model, arguments, options, inference)
    assert not calls
    with pyattn.patch(None if whole_process else model, strict=True) as patch:
        actual = results(model, arguments, options, inference)
    torch.testing.assert_close(actual, expected)
    if isinstance(model, Attention) and not whole_process:
        assert not patch.patched and "scaled_dot_product_attention" in patch.skipped["(model)"]
        expected_calls = 0
    results(model, arguments, options, inference)
    assert len(calls) == expected_calls


@pytest.mark.parametrize("average", [False, True])
def test_patch_attention_weights_agree_with_torch(average: bool) -> None:
    module = nn.MultiheadAttention(E, HEADS, kdim=6, add_bias_kv=True, add_zero_attn=True, dtype=torch.float64)
    tensors = normal(5, B, E), normal(M, B, 6), normal(M, B, E, seed=1), PADDING
    expected = module(*tensors, average_attn_weights=average)
    for target in (None, module):
        with pyattn.patch(target, strict=True):
            torch.testing.assert_close(module(*tensors, average_attn_weights=average), expected)


def test_patch_query_that_sees_nothing_has_no_nan() -> None:
    model, everything = encoder().eval(), torch.ones(B, M, dtype=torch.bool)
    with torch.no_grad(), pyattn.patch(strict=True):
        assert model(X, CAUSAL.bool(), src_key_padding_mask=everything).isfinite().all()


def test_patch_ends_with_the_block_and_with_an_error_in_it() -> None:
    model = encoder()
    classes = [type(m) for m in model.modules()]
    for target in (None, model):
        with contextlib.suppress(ZeroDivisionError), pyattn.patch(target) as patch:
            assert installed() != TORCHS or target is model
            assert [type(m) for m in model.modules()] != classes or target is None
            raise ZeroDivisionError
        assert installed() == TORCHS and [type(m) for m in model.modules()] == classes
        patch.restore()
        assert installed() == TORCHS


def test_patch_overlaps_and_the_last_to_end_restores(monkeypatch: pytest.MonkeyPatch) -> None:
    module, x = nn.MultiheadAttention(E, HEADS, dtype=torch.float64), normal(2, 1, E)
    monkeypatch.setattr(registry.BACKENDS["cpu"], "refusal", lambda spec: "not today")
    for target in (None, module):
        with pyattn.patch(target), pyattn.patch(target, strict=True), pytest.raises(pyattn.UnsupportedError):
            module(x, x, x)
        lenient, strict = pyattn.patch(target), pyattn.patch(target, strict=True)
        lenient.restore()
        with pytest.raises(pyattn.UnsupportedError):
            module(x, x, x)
        strict.restore()
        assert installed() == TORCHS and type(module) is nn.MultiheadAttention


def test_patch_reaches_modules_imported_while_it_is_on(calls: list) -> None:
    module = types.ModuleType("imported_late")
    sys.modules["imported_late"] = module
    try:
        with pyattn.patch():
            exec("from torch.nn.functional import scaled_dot_product_attention as attend", vars(module))
            kept = F.scaled_dot_product_attention
        assert module.attend is TORCHS[0]
    finally:
        del sys.modules["imported_late"]
    q = normal(1, 2, 5, 4)
    torch.testing.assert_close(kept(q, q, q, is_causal=True), TORCHS[0](q, q, q, is_causal=True))
    assert not calls  # a name that was kept is torch's function again


def test_patch_leaves_what_other_code_has_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    def theirs(*args: Any, **options: Any) -> Any:
        return TORCHS[1](*args, **options)

    with monkeypatch.context() as m:
        m.setattr(nn.MultiheadAttention, "forward", theirs)
        m.setattr(F, "scaled_dot_product_attention", theirs)
        with pyattn.patch() as patch:
            assert installed()[:2] == (theirs, theirs)
        assert installed()[:2] == (theirs, theirs)
    assert {"torch.nn.functional.scaled_dot_product_attention", "torch.nn.MultiheadAttention.forward"} < {
        *patch.skipped
    }
    with pyattn.patch():
        nn.MultiheadAttention.forward = theirs
    assert nn.MultiheadAttention.forward is theirs
    nn.MultiheadAttention.forward = TORCHS[1]


def test_patch_is_seen_by_other_threads(calls: list) -> None:
    q = normal(1, 2, 5, 4)

    def attend() -> int:
        thread = threading.Thread(target=F.scaled_dot_product_attention, args=(q, q, q))
        thread.start()
        thread.join()
        return len(calls)

    with pyattn.patch():
        assert attend() == 1
    assert attend() == 1


BIG = normal(1, 1, 2, 4100)  # a larger head than the CPU kernels take


def test_patch_falls_back_to_torch_with_one_warning_per_place_and_reason() -> None:
    q, mask = BIG, causal_lower_right(2, 2)
    want = F.scaled_dot_product_attention(q, q, q, is_causal=True)
    with pyattn.patch(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            torch.testing.assert_close(F.scaled_dot_product_attention(q, q, q, is_causal=True), want)
        (warning,) = caught
        assert warning.filename == __file__
        assert all(text in str(warning.message) for text in ("functional.scaled_dot_product_attention", "d=4100"))
        for t in (q, q[..., :4099]):  # another place, another reason
            F.scaled_dot_product_attention(t, t, t)
        assert len(caught) == 3
        torch.testing.assert_close(F.scaled_dot_product_attention(q, q, q, mask), want)
    with pyattn.patch(strict=True), pytest.raises(pyattn.UnsupportedError, match="cpu: head size"):
        F.scaled_dot_product_attention(q, q, q)


@pytest.mark.parametrize("whole_process", [False, True], ids=["model", "process"])
def test_patch_module_falls_back_with_one_warning(whole_process: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    module, x = nn.MultiheadAttention(E, HEADS, dtype=torch.float64), normal(3, 2, E)
    monkeypatch.setattr(registry.BACKENDS["cpu"], "refusal", lambda spec: "not today")
    want = module(x, x, x, need_weights=False)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with pyattn.patch(None if whole_process else module):
            for _ in range(2):
                torch.testing.assert_close(module(x, x, x, need_weights=False), want)
        assert [(w.filename, "torch.nn.MultiheadAttention" in str(w.message)) for w in caught] == [(__file__, True)]
        with pyattn.patch(None if whole_process else module, strict=True), pytest.raises(pyattn.UnsupportedError):
            module(x, x, x)


def test_patch_takes_nested_tensors_and_of_a_bad_call_raises_torchs_error() -> None:
    x = torch.nested.nested_tensor([normal(length, 2, 8) for length in (4, 1)], layout=torch.jagged).transpose(1, 2)
    with pyattn.patch():
        out = F.scaled_dot_product_attention(x, x, x, is_causal=True)  # torch has no kernel for it on the CPU
        assert torch.equal(out.values(), pyattn.scaled_dot_product_attention(x, x, x, is_causal=True).values())
        with pytest.warns(UserWarning, match="attn_mask"), pytest.raises(ValueError, match="not yet supported"):
            F.scaled_dot_product_attention(x, x, x, torch.ones(1, 1, 1, 1, dtype=torch.bool))


def test_patch_leaves_tensor_subclasses_to_torch(calls: list) -> None:
    class Special(Tensor):
        pass

    q = normal(1, 2, 5, 4).as_subclass(Special)
    with pyattn.patch(), pytest.warns(UserWarning, match="Special"):
        assert type(F.scaled_dot_product_attention(q, q, q)) is Special
    assert not calls


def test_patch_report_names_what_it_reached_and_what_not() -> None:
    model = nn.ModuleDict({"encoder": encoder(), "own": OwnForward(E, HEADS), "custom": Attention()})
    model["instance"] = nn.MultiheadAttention(E, HEADS)
    model["instance"].forward = model["own"].forward
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        model["script"] = torch.jit.script(nn.Linear(2, 2))
    with pyattn.patch(model) as patch:
        layers = [f"encoder.layers.{i}" for i in range(2)]
        assert patch.patched == [name for layer in layers for name in (layer, f"{layer}.self_attn")]
        assert list(patch.skipped) == ["own", "custom", "instance", "script"]
        assert "patched encoder.layers.0\n" in str(patch) and "skipped own: OwnForward" in str(patch)
    with pyattn.patch() as patch:
        assert {f"{__name__}.imported_by_name", "torch.nn.functional.scaled_dot_product_attention"} < set(patch.patched)
        assert f"{__name__}.OwnForward.forward" in patch.skipped
    with pytest.raises(pyattn.DtypeError, match="model"):
        pyattn.patch("model")


@pytest.mark.parametrize("whole_process", [False, True])
def test_patch_reaches_inside_a_layer_with_a_forward_of_its_own(calls: list, whole_process: bool) -> None:
    model = OwnLayer(E, HEADS, 24, batch_first=True, dtype=torch.float64).eval()
    with torch.no_grad():
        expected = model(X)
        with pyattn.patch(None if whole_process else model, strict=True):
            torch.testing.assert_close(model(X), expected)
    assert len(calls) == 1 and type(model) is OwnLayer and model.activation_relu_or_gelu == 1


def test_patch_is_undone_beneath_a_parametrization(calls: list) -> None:
    model = nn.MultiheadAttention(E, HEADS, dtype=torch.float64)
    with pyattn.patch(model, strict=True):
        parametrize.register_parametrization(model, "in_proj_weight", nn.Identity())
        model(X, X, X, need_weights=False)
    assert len(calls) == 1
    model(X, X, X, need_weights=False)
    assert len(calls) == 1 and not hasattr(type(model), "_pyattn_strict")
    with pyattn.patch(model):
        model(X, X, X, need_weights=False)
    assert len(calls) == 2 and not hasattr(type(model), "_pyattn_strict")


def test_patch_copies_and_pickles_are_torchs() -> None:
    model = encoder()
    with pyattn.patch(model):
        saved = io.BytesIO()
        torch.save(model, saved)
        saved.seek(0)
        copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(saved, weights_only=False)]
        assert b"pyattn" not in saved.getvalue()
        plain = encoder()
        plain.load_state_dict(model.state_dict())
        expected = model(X)
    for other in (*copies, plain):
        assert type(other.layers[0].self_attn) is nn.MultiheadAttention
        torch.testing.assert_close(other(X), expected)


def test_patch_hooks_still_run(calls: list) -> None:
    model, seen = encoder().eval(), []
    for module in model.modules():
        module.register_forward_hook(lambda module, *_: seen.append(type(module).__name__))
    with torch.no_grad(), pyattn.patch(model):
        model(X)
    assert seen.count("MultiheadAttention") == seen.count("TransformerEncoderLayer") == len(calls) == 2


def test_patch_under_checkpointing_draws_the_same_dropout() -> None:
    model = encoder(dropout=0.3)
    with pyattn.patch(model, strict=True):
        grads = []
        for call in (model, lambda x: checkpoint(model, x, use_reentrant=False)):
            torch.manual_seed(0)
            grads.append(torch.autograd.grad(call(X).square().sum(), list(model.parameters())))
    torch.testing.assert_close(*grads)


def test_patch_under_autocast_has_torchs_dtype() -> None:
    model, x = encoder(dtype=torch.float32), X.float()
    with torch.autocast("cpu", torch.bfloat16):
        want = model(x)
        with pyattn.patch(strict=True):
            got = model(x)
    assert got.dtype is want.dtype
    torch.testing.assert_close(got, want, atol=0.1, rtol=0.1)


@pytest.mark.parametrize("whole_process", [False, True], ids=["model", "process"])
def test_patch_compiles_and_does_not_recompile_for_a_new_length(whole_process: bool) -> None:
    model = encoder().layers[0]
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)
    with pyattn.patch(None if whole_process else model, strict=True):
        for length in (M, 11, 5):
            x, padding = normal(B, length, E), (torch.arange(length) > 3).expand(B, length)
            with torch._dynamo.config.patch(error_on_recompile=length != M):
                out = compiled(x, src_key_padding_mask=padding)
            torch.testing.assert_close(out, model(x, src_key_padding_mask=padding))


def test_patch_compiled_call_follows_the_patch_and_falls_back() -> None:
    graphs: list[str] = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Callable:
        graphs.append(str(graph.graph))
        return graph

    compiled = torch.compile(lambda q: F.scaled_dot_product_attention(q, q, q), fullgraph=True, backend=backend)
    for q, served in ((normal(1, 2, 5, 4), True), (BIG, False)):
        for patched in (False, True):
            with warnings.catch_warnings(record=True) as caught, contextlib.ExitStack() as stack:
                warnings.simplefilter("always")
                if patched:
                    stack.enter_context(pyattn.patch())
                torch.testing.assert_close(compiled(q), TORCHS[0](q, q, q))
            assert ("pyattn.attention" in graphs[-1]) == (patched and served)
            assert bool(caught) == (patched and not served)
        n_graphs = len(graphs)
        torch.testing.assert_close(compiled(q), TORCHS[0](q, q, q))
        assert len(graphs) == n_graphs  # the first one again
