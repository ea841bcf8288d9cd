"""pyattn.MultiheadAttention held against torch.nn.MultiheadAttention in every option."""

from __future__ import annotations

import copy
import inspect
import itertools
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pyattn
from pyattn import core
from pyattn.testing import assert_as_accurate

E, H, B, M, N = 8, 2, 2, 3, 5

pytestmark = [
    pytest.mark.filterwarnings("ignore:Support for mismatched"),
    pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors"),
]


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed + 1000 * sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def pair(**options: Any) -> tuple[nn.MultiheadAttention, pyattn.MultiheadAttention]:
    """torch's module and ours with the same, wholly random parameters."""
    options = {"embed_dim": E, "num_heads": H, "dtype": torch.float64} | options
    theirs, ours = nn.MultiheadAttention(**options), pyattn.MultiheadAttention(**options)
    with torch.no_grad():
        for i, parameter in enumerate(theirs.parameters()):
            parameter.copy_(0.5 * normal(*parameter.shape, seed=i))
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def inputs(module: nn.Module, kind: str, is_batched: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    """query, key, value; as one tensor ("self"), with one key and value ("memory"), or all different ("three")."""

    def sequence(length: int, size: int, seed: int) -> Tensor:
        if not is_batched:
            return normal(length, size, seed=seed)
        return normal(B, length, size, seed=seed) if module.batch_first else normal(length, B, size, seed=seed)

    if kind == "self":
        x = sequence(N, E, 0)
        return x, x, x
    query, key = sequence(M, E, 0), sequence(N, module.kdim, 1)
    return query, key, key if kind == "memory" else sequence(N, module.vdim, 2)


def random_mask(kind: str, *shape: int, seed: int = 5) -> Tensor:
    """ "bool": about a third True, that is ignored, never the first key. "float": normal numbers."""
    numbers = normal(*shape, seed=seed)
    if kind == "float":
        return numbers
    mask = numbers > 0.4
    mask[..., 0] = False
    return mask


def with_gradients(module: nn.Module, tensors: tuple[Tensor, ...], options: dict[str, Any]) -> dict[str, Tensor]:
    """Output, weights, and the gradients of the inputs, the parameters and the attn_mask that both depend on."""
    unique = {id(t): t.detach().clone().requires_grad_() for t in tensors}
    leaves = {f"input{i}": t for i, t in enumerate(unique.values())} | dict(module.named_parameters())
    mask = options.get("attn_mask")
    if mask is not None and mask.is_floating_point():
        leaves["attn_mask"] = mask.detach().clone().requires_grad_()
        options = options | {"attn_mask": leaves["attn_mask"]}
    out, weights = module(*(unique[id(t)] for t in tensors), **options)
    results = {"out": out} if weights is None else {"out": out, "weights": weights}
    loss = sum((t * normal(*t.shape, seed=7, dtype=t.dtype)).sum() for t in results.values())
    grads = torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True)
    return results | {f"d_{name}": g for name, g in zip(leaves, grads, strict=True)}


def assert_agrees(theirs: nn.Module, ours: nn.Module, tensors: tuple[Tensor, ...], **options: Any) -> None:
    """In float64, where a rounding error cannot be taken for a wrong meaning: torch's own comparison."""
    expected, actual = (with_gradients(module, tensors, options) for module in (theirs, ours))
    assert actual.keys() == expected.keys()
    for name, want in expected.items():
        torch.testing.assert_close(actual[name], want, msg=lambda text, name=name: f"{name}: {text}")


MODULES: dict[str, dict[str, Any]] = {
    "plain": {},
    "batch-first": {"batch_first": True},
    "without-bias": {"bias": False},
    "bias-kv": {"add_bias_kv": True},
    "zero-attn": {"add_zero_attn": True},
    "both-appended": {"add_bias_kv": True, "add_zero_attn": True, "batch_first": True},
    "kdim": {"kdim": 6},
    "vdim": {"vdim": 10, "bias": False},
    "everything": {"kdim": 6, "vdim": 10, "add_bias_kv": True, "add_zero_attn": True, "batch_first": True},
}
MASKS = list(itertools.product(["none", "bool", "float"], ["none", "bool-2d", "float-2d", "bool-3d", "float-3d"]))
RESULTS = [(False, True), (True, True), (True, False)]  # need_weights, average_attn_weights


@pytest.mark.parametrize("is_batched", [True, False], ids=["batched", "unbatched"])
@pytest.mark.parametrize("options", MODULES.values(), ids=MODULES)
def test_mha_masks_of_both_kinds_agree_with_torch(options: dict, is_batched: bool) -> None:
    theirs, ours = pair(**options)
    tensors = inputs(theirs, "three", is_batched)
    n_masks = B * H if is_batched else H
    for i, (padding, attn) in enumerate(MASKS):
        kind, _, form = attn.partition("-")
        need_weights, average = RESULTS[i % 3]
        assert_agrees(
            theirs, ours, tensors, need_weights=need_weights, average_attn_weights=average,
            key_padding_mask=None if padding == "none" else random_mask(padding, *((B, N) if is_batched else (N,))),
            attn_mask=None if kind == "none" else random_mask(kind, *((M, N) if form == "2d" else (n_masks, M, N))),
        )  # fmt: skip


@pytest.mark.parametrize("kind", ["self", "memory", "three"])
@pytest.mark.parametrize("is_batched", [True, False], ids=["batched", "unbatched"])
@pytest.mark.parametrize(("need_weights", "average"), RESULTS, ids=["no-weights", "averaged", "per-head"])
def test_mha_inputs_that_are_one_tensor_agree_with_torch(
    kind: str, is_batched: bool, need_weights: bool, average: bool
) -> None:
    for options in ({}, {"batch_first": True}, {"bias": False}):
        theirs, ours = pair(**options)
        tensors = inputs(theirs, kind, is_batched)
        assert_agrees(theirs, ours, tensors, need_weights=need_weights, average_attn_weights=average)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("need_weights", [False, True])
def test_mha_dtype_is_as_accurate_as_torch(dtype: torch.dtype, need_weights: bool) -> None:
    theirs, ours = pair(embed_dim=32, num_heads=4, dtype=dtype)
    query, key = normal(33, 2, 32, dtype=dtype), normal(40, 2, 32, dtype=dtype, seed=1)
    with torch.no_grad():
        actual, baseline, expected = (
            module(*(t.to(module.out_proj.weight.dtype) for t in (query, key, key)), need_weights=need_weights)
            for module in (ours, theirs, copy.deepcopy(theirs).double())
        )
    for got, plain, want in zip(actual, baseline, expected, strict=True):
        if want is not None:
            assert got.dtype is dtype
            assert_as_accurate(got, want, plain)


def test_mha_signatures_are_those_of_torch() -> None:
    for name in ("__init__", "forward"):
        ours, theirs = (
            [(p.name, p.default) for p in inspect.signature(getattr(cls, name)).parameters.values()]
            for cls in (pyattn.MultiheadAttention, nn.MultiheadAttention)
        )
        assert ours == theirs


@pytest.mark.parametrize("options", MODULES.values(), ids=MODULES)
def test_mha_one_seed_gives_the_parameters_of_torch(options: dict) -> None:
    states = []
    for cls in (nn.MultiheadAttention, pyattn.MultiheadAttention):
        torch.manual_seed(3)
        states.append(cls(E, H, **options).state_dict())
        states[-1]["next random number"] = torch.rand(())
    assert list(states[0]) == list(states[1])
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


@pytest.mark.parametrize("options", MODULES.values(), ids=MODULES)
def test_mha_state_dict_loads_strictly_in_both_directions(options: dict) -> None:
    theirs, ours = pair(**options)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    with pytest.raises(RuntimeError, match="proj_weight"):
        ours.load_state_dict({name: t for name, t in theirs.state_dict().items() if "proj_weight" not in name})


def test_mha_copies_and_pickles_keep_the_result() -> None:
    _, ours = pair(add_bias_kv=True, batch_first=True)
    tensors = inputs(ours, "self")
    expected = ours(*tensors)
    for twin in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        for got, want in zip(twin(*tensors), expected, strict=True):
            assert torch.equal(got, want)


def test_mha_output_is_contiguous_in_both_layouts() -> None:
    for batch_first in (False, True):
        _, ours = pair(batch_first=batch_first)
        assert ours(*inputs(ours, "self"), need_weights=False)[0].is_contiguous()


@pytest.mark.parametrize("dtype", [torch.bool, torch.float64])
def test_mha_bool_true_means_ignore_and_float_is_added(dtype: torch.dtype) -> None:
    _, ours = pair()
    query, key, value = inputs(ours, "three")
    ignored = torch.tensor([False, True, True, False, True])
    hidden = (
        ignored.expand(M, N) if dtype is torch.bool else torch.zeros(M, N, dtype=dtype).masked_fill(ignored, -torch.inf)
    )
    expected, _ = ours(query, key[~ignored], value[~ignored])
    out, weights = ours(query, key, value, attn_mask=hidden)
    torch.testing.assert_close(out, expected)
    assert (weights[..., ignored] == 0).all() and (weights[..., ~ignored] > 0).all()
    padded, _ = ours(query, key, value, key_padding_mask=ignored.expand(B, N))
    torch.testing.assert_close(padded, expected)


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("kind", ["bool", "float"])
def test_mha_query_that_sees_nothing_gives_the_output_bias_and_zero_weights(kind: str, need_weights: bool) -> None:
    _, ours = pair(batch_first=True)
    mask = torch.zeros(B, N, dtype=torch.bool)
    mask[1] = True
    if kind == "float":
        mask = torch.zeros(B, N, dtype=torch.float64).masked_fill(mask, -torch.inf)
    query, key, value = (t.requires_grad_() for t in inputs(ours, "three"))
    out, weights = ours(query, key, value, key_padding_mask=mask, need_weights=need_weights)
    torch.testing.assert_close(out[1], ours.out_proj.bias.expand(M, E))
    loss = out.sum()
    if need_weights:
        assert (weights[1] == 0).all() and (weights[0] > 0).all()
        loss = loss + (weights * normal(*weights.shape)).sum()
    grads = torch.autograd.grad(loss, (query, key, value))
    assert all(g.isfinite().all() and (g[1] == 0).all() and (g[0] != 0).any() for g in grads)


def test_mha_nan_in_padding_does_not_leak() -> None:
    _, ours = pair(batch_first=True)
    query, key, value = inputs(ours, "three")
    padding = torch.tensor([False, False, True, False, True]).expand(B, N)
    spoiled = (t.masked_fill(padding[..., None], torch.nan) for t in (key, value))
    for got, want in zip(
        ours(query, *spoiled, key_padding_mask=padding), ours(query, key, value, key_padding_mask=padding), strict=True
    ):
        torch.testing.assert_close(got, want)


def test_mha_is_causal_without_mask_raises_as_torch_does() -> None:
    theirs, ours = pair()
    tensors = inputs(ours, "self")
    with pytest.raises(RuntimeError):
        theirs(*tensors, is_causal=True)
    with pytest.raises(pyattn.RangeError, match="attn_mask"):
        ours(*tensors, is_causal=True)


@pytest.mark.parametrize("kind", ["self", "three"])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("options", [{}, {"add_zero_attn": True}], ids=["plain", "zero-attn"])
def test_mha_is_causal_hint_is_used_when_torch_uses_it(
    kind: str, padded: bool, need_weights: bool, options: dict
) -> None:
    """The mask is not the causal one, so that the hint and the mask give different results."""
    theirs, ours = pair(**options)
    tensors = inputs(ours, kind)
    mask = random_mask("bool", tensors[0].shape[0], N)
    padding = random_mask("bool", B, N) if padded else None
    assert_agrees(
        theirs, ours, tensors, attn_mask=mask, is_causal=True, key_padding_mask=padding, need_weights=need_weights
    )


@pytest.mark.parametrize("options", [{}, {"add_bias_kv": True}], ids=["plain", "bias-kv"])
def test_mha_weights_while_training_are_those_that_multiplied_the_values(options: dict) -> None:
    _, ours = pair(dropout=0.4, batch_first=True, **options)
    tensors = inputs(ours, "three")
    mask = random_mask("bool", M, N)
    torch.manual_seed(0)
    out, weights = ours(*tensors, attn_mask=mask, average_attn_weights=False)
    torch.manual_seed(0)
    _, averaged = ours(*tensors, attn_mask=mask)
    torch.manual_seed(0)
    unweighted, _ = ours(*tensors, attn_mask=mask, need_weights=False)
    value = ours._append_keys(*(ours._split_heads(t, True) for t in ours._project(*tensors)[1:]))[1]
    torch.testing.assert_close(ours.out_proj((weights @ value).transpose(1, 2).flatten(2)), out)
    torch.testing.assert_close(averaged, weights.mean(1))
    torch.testing.assert_close(unweighted, out)

    _, undropped = ours.eval()(*tensors, attn_mask=mask, average_attn_weights=False)
    kept = weights != 0
    assert 0 < kept.sum() < (undropped != 0).sum()
    torch.testing.assert_close(weights, torch.where(kept, undropped / 0.6, 0.0))


def test_mha_gradient_through_dropped_weights_is_their_derivative() -> None:
    _, ours = pair(dropout=0.4, batch_first=True)
    query, key, value = inputs(ours, "three")

    def results(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        torch.manual_seed(0)
        return ours(query, key, value, average_attn_weights=False)

    assert torch.autograd.gradcheck(results, tuple(t.requires_grad_() for t in (query, key, value)), fast_mode=True)


def test_mha_dropout_follows_torch_manual_seed_and_the_training_flag() -> None:
    theirs, ours = pair(dropout=0.5)
    tensors = inputs(ours, "self")

    def draw(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return ours(*tensors, need_weights=False)[0]

    assert torch.equal(draw(0), draw(0)) and not torch.equal(draw(0), draw(1))
    assert_agrees(theirs.eval(), ours.eval(), tensors)


@pytest.mark.parametrize("need_weights", [False, True])
def test_mha_dropout_of_everything_gives_the_output_bias(need_weights: bool) -> None:
    _, ours = pair(dropout=1.0)
    out, weights = ours(*inputs(ours, "self"), need_weights=need_weights)
    torch.testing.assert_close(out, ours.out_proj.bias.expand(N, B, E))
    assert weights is None or (weights == 0).all()


def test_mha_weights_leave_no_score_matrix_to_the_backward() -> None:
    _, ours = pair(batch_first=True)
    x = normal(1, 200, E).requires_grad_()
    saved: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        _, weights = ours(x, x, x)
    assert weights.numel() == 200 * 200
    assert saved and max(saved) < 200 * 200


def test_mha_under_autocast_agrees_with_torch() -> None:
    theirs, ours = pair(embed_dim=32, num_heads=4, dtype=torch.float32)
    x = normal(33, 2, 32, dtype=torch.float32)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        actual, baseline = ours(x, x, x), theirs(x, x, x)
    with torch.no_grad():
        expected = theirs.double()(*(x.double(),) * 3)
    for got, plain, want in zip(actual, baseline, expected, strict=True):
        assert got.dtype is torch.bfloat16
        assert_as_accurate(got, want, plain.to(got.dtype))


def encoder_pair(**options: Any) -> tuple[nn.TransformerEncoder, nn.TransformerEncoder]:
    """A torch encoder, and the same with our attention in each of its layers."""
    options = {"d_model": 16, "nhead": 4, "dim_feedforward": 24, "dtype": torch.float64, "batch_first": True} | options
    nests = not options.get("norm_first", False)
    theirs = nn.TransformerEncoder(nn.TransformerEncoderLayer(**options), 2, enable_nested_tensor=nests)
    ours = copy.deepcopy(theirs)
    for layer in ours.layers:
        attention = pyattn.MultiheadAttention(16, 4, batch_first=True, dtype=torch.float64)
        attention.load_state_dict(layer.self_attn.state_dict())
        layer.self_attn = attention
    return theirs, ours


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("mask", ["none", "causal-bool", "causal-float", "random-float"])
@pytest.mark.parametrize("inference", [False, True])
def test_mha_in_a_torch_encoder_agrees_with_torch(norm_first: bool, padded: bool, mask: str, inference: bool) -> None:
    theirs, ours = (e.eval() for e in encoder_pair(norm_first=norm_first))
    x = normal(3, 7, 16)
    padding = torch.arange(7) >= torch.tensor([[7], [5], [2]])
    masks = {
        "causal-bool": torch.ones(7, 7, dtype=torch.bool).triu(1),
        "causal-float": nn.Transformer.generate_square_subsequent_mask(7, dtype=torch.float64),
        "random-float": normal(7, 7),
    }
    options = {"mask": masks.get(mask), "src_key_padding_mask": padding if padded else None}
    with torch.set_grad_enabled(not inference):
        actual = ours(x, **options)
        expected = without_fast_path(theirs, x, **options)
    if padded:  # the encoder gives 0 for padded queries in inference alone
        actual, expected = (t.masked_fill(padding[..., None], 0.0) for t in (actual, expected))
    torch.testing.assert_close(actual, expected)


def without_fast_path(module: nn.Module, *args: Any, **options: Any) -> Tensor:
    """torch's layer without its inference kernel, which misreads float masks (pytorch#107084)."""
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        return module(*args, **options)
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


@pytest.mark.parametrize("padded", [False, True])
def test_mha_in_a_torch_encoder_is_called_in_inference(monkeypatch: pytest.MonkeyPatch, padded: bool) -> None:
    _, ours = encoder_pair()
    calls = []
    forward = pyattn.MultiheadAttention.forward
    monkeypatch.setattr(pyattn.MultiheadAttention, "forward", lambda *a, **k: calls.append(1) or forward(*a, **k))
    padding = torch.arange(7) >= torch.tensor([[7], [5], [2]])
    with torch.no_grad():
        ours.eval()(normal(3, 7, 16), src_key_padding_mask=padding if padded else None)
    assert len(calls) >= len(ours.layers)


def test_mha_in_a_torch_decoder_layer_agrees_with_torch() -> None:
    theirs = nn.TransformerDecoderLayer(16, 4, 24, dropout=0.0, dtype=torch.float64)
    ours = copy.deepcopy(theirs)
    for name in ("self_attn", "multihead_attn"):
        attention = pyattn.MultiheadAttention(16, 4, dtype=torch.float64)
        attention.load_state_dict(getattr(theirs, name).state_dict())
        setattr(ours, name, attention)
    mask = nn.Transformer.generate_square_subsequent_mask(7, dtype=torch.float64)
    options = {"tgt_mask": mask, "tgt_is_causal": True, "memory_key_padding_mask": random_mask("bool", 2, 9)}
    target, memory = normal(7, 2, 16), normal(9, 2, 16)
    torch.testing.assert_close(ours(target, memory, **options), theirs(target, memory, **options))


def test_mha_nested_self_attention_agrees_with_each_sequence_alone() -> None:
    _, ours = pair(batch_first=True)
    sequences = [normal(length, E, seed=length) for length in (4, 1, 6)]
    x = torch.nested.nested_tensor(sequences)
    out, _ = ours(x, x, x, need_weights=False)
    for got, sequence in zip(out.unbind(), sequences, strict=True):
        torch.testing.assert_close(got, ours(sequence, sequence, sequence)[0])


def test_mha_jagged_self_attention_is_never_padded(monkeypatch: pytest.MonkeyPatch) -> None:
    _, ours = pair(batch_first=True)
    sequences = [normal(length, E, seed=length).requires_grad_() for length in (4, 1, 6)]
    x = torch.nested.as_nested_tensor(sequences, layout=torch.jagged)
    rows: list[int] = []
    attend = core.attend
    monkeypatch.setattr(core, "attend", lambda q, *t, **options: rows.append(len(q)) or attend(q, *t, **options))
    out, weights = ours(x, x, x, need_weights=False)
    assert rows == [11] and weights is None and out.layout is torch.jagged
    monkeypatch.undo()
    for got, sequence in zip(out.unbind(), sequences, strict=True):
        want = ours(sequence, sequence, sequence)[0]
        torch.testing.assert_close(got, want)
        found = torch.autograd.grad(got.square().sum(), sequence, retain_graph=True)
        torch.testing.assert_close(found, torch.autograd.grad(want.square().sum(), sequence))


@pytest.mark.parametrize("average", [True, False])
def test_mha_weights_under_torch_func(average: bool) -> None:
    _, ours = pair(batch_first=True)
    x = normal(3, 2, 5, E)

    def loss(x: Tensor) -> Tensor:
        out, weights = ours(x, x, x, average_attn_weights=average)
        return out.square().sum() + weights.square().sum()

    found = torch.func.vmap(torch.func.grad(loss))(x)
    for sample, got in zip(x, found, strict=True):
        sample = sample.clone().requires_grad_()
        torch.testing.assert_close(got, torch.autograd.grad(loss(sample), sample)[0])


def test_mha_on_the_meta_device_has_the_shapes() -> None:
    ours, x = pyattn.MultiheadAttention(8, 2, device="meta"), torch.empty(3, 2, 8, device="meta")
    assert [t.shape for t in ours(x, x, x)] == [(3, 2, 8), (2, 3, 3)]


def test_mha_nested_input_with_a_mask_raises() -> None:
    _, ours = pair(batch_first=True)
    x = torch.nested.nested_tensor([normal(4, E), normal(2, E)])
    with pytest.raises(pyattn.UnsupportedError, match="nested"):
        ours(x, x, x, attn_mask=torch.zeros(4, 4, dtype=torch.bool))


@pytest.mark.parametrize(
    ("arguments", "named"),
    [((0, 1), "embed_dim"), ((8, 0), "num_heads"), ((8, 3), "num_heads"), ((8, 2, 1.5), "dropout")],
)
def test_mha_bad_construction_raises_and_names_it(arguments: tuple, named: str) -> None:
    with pytest.raises(pyattn.RangeError, match=named):
        pyattn.MultiheadAttention(*arguments)


q, k = torch.zeros(M, B, E), torch.zeros(N, B, E)
BAD_CALLS = {
    "4d-query": ((q[None], k, k), {}, pyattn.ShapeError, "query"),
    "dimensions-differ": ((q, k[:, 0], k[:, 0]), {}, pyattn.ShapeError, "key"),
    "query-size": ((q[..., :4], k, k), {}, pyattn.ShapeError, "query"),
    "key-size": ((q, k[..., :4], k), {}, pyattn.ShapeError, "key"),
    "lengths-differ": ((q, k, k[:2]), {}, pyattn.ShapeError, "value"),
    "batches-differ": ((q, k[:, :1], k[:, :1]), {}, pyattn.ShapeError, "key"),
    "padding-shape": ((q, k, k), {"key_padding_mask": torch.zeros(N, B).bool()}, pyattn.ShapeError, "key_padding_mask"),
    "padding-integer": (
        (q, k, k),
        {"key_padding_mask": torch.zeros(B, N).int()},
        pyattn.DtypeError,
        "key_padding_mask",
    ),
    "mask-shape": ((q, k, k), {"attn_mask": torch.zeros(N, M)}, pyattn.ShapeError, "attn_mask"),
    "mask-broadcast": ((q, k, k), {"attn_mask": torch.zeros(1, N)}, pyattn.ShapeError, "attn_mask"),
    "mask-heads": ((q, k, k), {"attn_mask": torch.zeros(H, M, N)}, pyattn.ShapeError, "attn_mask"),
    "mask-4d": ((q, k, k), {"attn_mask": torch.zeros(B, H, M, N)}, pyattn.ShapeError, "attn_mask"),
    "mask-integer": ((q, k, k), {"attn_mask": torch.zeros(M, N).long()}, pyattn.DtypeError, "attn_mask"),
    "not-a-tensor": ((q, [1.0], k), {}, pyattn.DtypeError, "key"),
}


@pytest.mark.parametrize(("tensors", "options", "error", "named"), BAD_CALLS.values(), ids=BAD_CALLS)
def test_mha_bad_input_raises_and_names_it(tensors: tuple, options: dict, error: type[Exception], named: str) -> None:
    with pytest.raises(error, match=named):
        pyattn.MultiheadAttention(E, H)(*tensors, **options)
