"""The score functions held against Keras, OpenNMT-py and JoeyNMT, and the module that has Keras' name.

`make_score_fixtures.py` wrote what these compute.
"""

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from torch.testing import assert_close

import pyattn
from pyattn import registry
from pyattn.nn import AdditiveAttention, AdditiveScore, DotScore, GeneralScore

FIXTURES = Path(__file__).parent / "fixtures" / "scores.safetensors"
PEERS = load_file(FIXTURES)
FUSED = ["cpu"] if "additive" in registry.BACKENDS["cpu"].features else []
Case = dict[str, Tensor]
# Keras computes in float64, but for the sums of values.
FLOAT32 = {"rtol": 1.3e-6, "atol": 1e-5, "check_dtype": False}


@pytest.fixture(params=["reference", *FUSED], autouse=True)
def backend(request: pytest.FixtureRequest) -> Iterator[None]:
    with pyattn.use_backend(request.param):
        yield


def leaves_of(peer: str) -> Case:
    """What the peer was given and has, requiring gradients, and what it gave."""
    case = {name.partition("/")[2]: t for name, t in PEERS.items() if name.startswith(f"{peer}/")}
    return {name: t.detach().requires_grad_(f"d_{name}" in case and name != "out") for name, t in case.items()}


def assert_agrees(case: Case, out: Tensor, weights: Tensor, **tolerance: float | bool) -> None:
    """out, weights and all gradients."""
    assert_close((out, weights), (case["out"], case["weights"]), **tolerance)
    leaves = [name for name, t in case.items() if t.requires_grad]
    found = torch.autograd.grad((out * case["d_out"]).sum(), [case[name] for name in leaves])
    for name, gradient in zip(leaves, found, strict=True):
        assert_close(gradient, case[f"d_{name}"], **tolerance, msg=lambda text, name=name: f"d_{name}: {text}")


def with_parameters(module: torch.nn.Module, **parameters: Tensor) -> Callable[..., tuple[Tensor, Tensor]]:
    """module's call, with these in place of its own parameters."""
    names = {name.replace(".", "_"): name for name, _ in module.named_parameters()}
    assert names.keys() == parameters.keys()
    given = {names[name]: t for name, t in parameters.items()}
    return lambda *args, **options: torch.func.functional_call(module, given, args, options)


def test_additive_attention_is_keras() -> None:
    case = leaves_of("keras-additive")
    call = with_parameters(AdditiveAttention(4), scale=case["scale"])
    out = call([case["query"], case["value"], case["key"]], return_attention_scores=True)
    assert_agrees(case, *out, **FLOAT32)


def test_additive_attention_masks_as_keras() -> None:
    case = leaves_of("keras-additive-masked")
    call = with_parameters(AdditiveAttention(4), scale=case["scale"])
    mask = [case["query_mask"], case["value_mask"]]
    out = call([case["query"], case["value"], case["key"]], mask=mask, return_attention_scores=True)
    assert_agrees(case, *out, **FLOAT32)


def test_additive_attention_is_causal_as_keras() -> None:
    case = leaves_of("keras-additive-causal")
    call = with_parameters(AdditiveAttention(4), scale=case["scale"])
    out = call([case["query"], case["value"]], return_attention_scores=True, use_causal_mask=True)
    assert_agrees(case, *out, **FLOAT32)


def test_additive_attention_function_is_keras_concat_score() -> None:
    case = leaves_of("keras-concat")
    q, k, v = (case[name].unsqueeze(1) for name in ("query", "key", "value"))
    weight = case["concat_score_weight"].expand(1, 4)
    values = v, torch.eye(4, dtype=torch.float64).expand(2, 1, 4, 4)
    out, weights = (pyattn.additive_attention(case["scale"] * q, case["scale"] * k, x, weight) for x in values)
    assert_agrees(case, out.squeeze(1), weights.squeeze(1), **FLOAT32)


@pytest.mark.parametrize("kind", ["dot", "general", "mlp"])
def test_score_is_opennmt(kind: str) -> None:
    case = leaves_of(f"opennmt-{kind}")
    if kind == "dot":
        call = with_parameters(DotScore())
    elif kind == "general":  # theirs projects the query
        call = with_parameters(GeneralScore(4, 4), key_projection_weight=case["linear_in.weight"].T)
    else:
        call = with_parameters(
            AdditiveScore(4, 4, 4, bias=True),
            query_projection_weight=case["linear_query.weight"], query_projection_bias=case["linear_query.bias"],
            key_projection_weight=case["linear_context.weight"], weight=case["v.weight"],
        )  # fmt: skip
    context, weights = call(case["query"], case["memory"], case["lengths"], return_weights=True)
    out = torch.cat([context, case["query"]], -1) @ case["linear_out.weight"].T
    out = out + case["linear_out.bias"] if kind == "mlp" else torch.tanh(out)
    assert_agrees(case, out, weights)


@pytest.mark.parametrize("kind", ["bahdanau", "luong"])
def test_score_is_joeynmt(kind: str) -> None:
    case = leaves_of(f"joeynmt-{kind}")
    if kind == "bahdanau":
        call = with_parameters(
            AdditiveScore(3, 4, 5), query_projection_weight=case["query_layer.weight"],
            key_projection_weight=case["key_layer.weight"], weight=case["energy_layer.weight"],
        )  # fmt: skip
    else:
        call = with_parameters(GeneralScore(3, 4), key_projection_weight=case["key_layer.weight"])
    assert_agrees(case, *call(case["query"], case["memory"], mask=case["mask"].unsqueeze(1), return_weights=True))


def inputs() -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(2, n, 4, dtype=torch.float64) for n in (3, 5, 5)]


def test_additive_attention_without_scale_adds_up_the_columns() -> None:
    module = AdditiveAttention(4, use_scale=False)
    query, value, key = inputs()
    p = torch.softmax(torch.tanh(query[:, :, None] + key[:, None]).sum(-1), -1)
    assert_close(module([query, value, key]), p @ value)
    assert not list(module.parameters())


def test_additive_attention_of_a_query_that_sees_nothing_is_zero() -> None:
    query, value, _ = inputs()
    value_mask = torch.tensor([[False] * 5, [True] * 5])
    out, weights = AdditiveAttention(4, dtype=torch.float64)(
        [query, value], [None, value_mask], return_attention_scores=True
    )
    assert (out[0] == 0).all() and (weights[0] == 0).all()
    assert_close(weights[1].sum(-1), torch.ones(3, dtype=torch.float64))


def test_additive_attention_drops_weights_in_training_alone() -> None:
    module = AdditiveAttention(4, dropout=0.5, dtype=torch.float64)
    query, value, key = inputs()
    out, weights = module([query, value, key], return_attention_scores=True)
    assert 0 < (weights == 0).sum() < weights.numel()
    assert_close(weights @ value, out)
    _, weights = module.eval()([query, value, key], return_attention_scores=True)
    assert (weights > 0).all()


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda module, q, v, k: module(q), pyattn.DtypeError, r"inputs: expected \[query, value\] or"),
        (lambda module, q, v, k: module([q]), pyattn.DtypeError, "inputs: .*got 1 of them"),
        (lambda module, q, v, k: module([q[..., :3], v]), pyattn.ShapeError, r"query: expected \[b, m, dim=4\]"),
        (lambda module, q, v, k: module([q, v[..., :3]]), pyattn.ShapeError, r"key: expected \[b, n, dim=4\]"),
        (lambda module, q, v, k: module([q, v[:, :3], k]), pyattn.ShapeError, r"value: expected n=5.*got \[2, 3, 4\]"),
        (lambda module, q, v, k: module([q, v[:1]]), pyattn.ShapeError, r"value: expected b=2.*got \[1, 5, 4\]"),
        (lambda module, q, v, k: module([q, v, k[:1]]), pyattn.ShapeError, r"key: expected b=2.*got \[1, 5, 4\]"),
        (lambda module, q, v, k: module([q.float(), v.float()]), pyattn.DtypeError, "scale: expected float32"),
        (lambda module, q, v, k: module([q, v], use_causal_mask=1), pyattn.DtypeError, "use_causal_mask: "),
        (lambda module, q, v, k: module([q, v.float(), k]), pyattn.DtypeError, "value: expected torch.float64"),
        (lambda module, q, v, k: module([q, v], v[..., 0] > 0), pyattn.DtypeError, "mask: "),
        (lambda module, q, v, k: module([q, v], [None, v[..., 0]]), pyattn.DtypeError, "value_mask: expected bool"),
        (lambda module, q, v, k: module([q, v], [v[..., 0] > 0, None]), pyattn.ShapeError, r"query_mask: .*\[2, 3\]"),
        (lambda module, q, v, k: AdditiveAttention(0), pyattn.RangeError, "dim: "),
        (lambda module, q, v, k: AdditiveAttention(4, dropout=1.0), pyattn.RangeError, "dropout: "),
    ],
)
def test_additive_attention_of_bad_input_names_the_argument(
    call: Callable[..., object], error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text):
        call(AdditiveAttention(4, dtype=torch.float64), *inputs())


def test_fixtures_come_from_the_versions_that_the_script_names() -> None:
    script = (Path(__file__).parent / "make_score_fixtures.py").read_text("utf-8")
    with safe_open(FIXTURES, "pt") as file:
        versions = file.metadata()
    named = dict(re.findall(r"([\w-]+)==([\d.]+)", script))
    assert named == {name: versions[name] for name in named} and named.keys() == versions.keys() - {"torch"}
