"""The score functions of pyattn.nn held against loops over their formulas, in float64."""

import math
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import pyattn
from pyattn import registry
from pyattn.nn import (
    AdditiveScore,
    CosineScore,
    DotScore,
    GeneralScore,
    LearnedValue,
    LocationScore,
    ScaledDotScore,
    Score,
)

B, M, N, DV = 2, 3, 5, 6
LENGTHS = torch.tensor([N, 2])
FLOAT64 = {"dtype": torch.float64}
Formula = Callable[[Score, Tensor, Tensor, int], list[Tensor]]  # (score, s, h, position of h): the score of each head


def products(score: Score, s: Tensor, h: Tensor) -> list[Tensor]:
    return [a @ b for a, b in zip(s.chunk(score.heads), h.chunk(score.heads), strict=True)]


def additive(score: AdditiveScore, s: Tensor, h: Tensor, j: int) -> list[Tensor]:
    hidden = torch.tanh(score.query_projection(s) + score.key_projection.weight @ h)
    return [w @ t for w, t in zip(score.weight, hidden.chunk(score.heads), strict=True)]


def cosine(score: CosineScore, s: Tensor, h: Tensor, j: int) -> list[Tensor]:
    beta = score.scale if score.log_sharpening is None else score.log_sharpening.exp()
    pairs = zip(s.chunk(score.heads), h.chunk(score.heads), strict=True)
    return [beta * (a @ b) / (a.norm() * b.norm()) for a, b in pairs]


# Each score with its formula. Queries have 4 columns; memory has 6, where a score takes another size.
SCORES: dict[str, tuple[Callable[[int], Score], Formula, int]] = {
    "dot": (lambda heads: DotScore(heads=heads), lambda score, s, h, j: products(score, s, h), 4),
    "scaled-dot": (
        lambda heads: ScaledDotScore(heads=heads),
        lambda score, s, h, j: [p / math.sqrt(4 // score.heads) for p in products(score, s, h)],
        4,
    ),
    "general": (
        lambda heads: GeneralScore(4, 6, heads=heads, **FLOAT64),
        lambda score, s, h, j: products(score, s, score.key_projection.weight @ h),
        6,
    ),
    "low-rank": (
        lambda heads: GeneralScore(4, 6, 2, heads=heads, **FLOAT64),
        lambda score, s, h, j: products(score, score.query_projection.weight @ s, score.key_projection.weight @ h),
        6,
    ),
    "additive": (lambda heads: AdditiveScore(4, 6, 8, heads=heads, **FLOAT64), additive, 6),
    "additive-bias": (lambda heads: AdditiveScore(4, 6, 8, bias=True, heads=heads, **FLOAT64), additive, 6),
    "cosine": (lambda heads: CosineScore(heads=heads), cosine, 4),
    "cosine-sharp": (lambda heads: CosineScore(2.5, heads=heads), cosine, 4),
    "cosine-learned": (lambda heads: CosineScore(2.5, learned=True, heads=heads, **FLOAT64), cosine, 4),
    "location": (
        lambda heads: LocationScore(4, 7, heads=heads, **FLOAT64),
        lambda score, s, h, j: products(score, s, score.weight[j]),
        6,
    ),
}


def backends(name: str) -> list[str]:
    """Those of the CPU that run a score of this name; the fused ones take additive scores as soon as they say so."""
    is_additive = name.startswith("additive")
    fused = ["cpu"] if not is_additive or "additive" in registry.BACKENDS["cpu"].features else []
    return ["reference", *fused]


@pytest.fixture(params=[(name, backend) for name in SCORES for backend in backends(name)], ids="-".join)
def name(request: pytest.FixtureRequest) -> Iterator[str]:
    """Of a score, on each of its backends."""
    name, backend = request.param
    with pyattn.use_backend(backend):
        yield name


def made(name: str, heads: int = 1) -> tuple[Score, Tensor, Tensor, Tensor]:
    """A score, and query, memory and values for it."""
    torch.manual_seed(0)
    make, _, memory_size = SCORES[name]
    states = (B, M, 4), (B, N, memory_size), (B, N, DV)
    return make(heads), *(torch.randn(size, **FLOAT64, requires_grad=True) for size in states)


def loop(name: str, score: Score, query: Tensor, memory: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Contexts [B, M, DV] and weights [B, heads, M, N], one query, one key and one head at a time."""
    formula = SCORES[name][1]
    context, weights = torch.zeros(B, M, DV, **FLOAT64), torch.zeros(B, score.heads, M, N, **FLOAT64)
    for b in range(B):
        for i in range(M):
            scores = [formula(score, query[b, i], memory[b, j], j) for j in range(LENGTHS[b])]
            for head, (of_head, v) in enumerate(
                zip(zip(*scores, strict=True), values[b].chunk(score.heads, -1), strict=True)
            ):
                p = torch.softmax(torch.stack(of_head), 0)
                weights[b, head, i, : LENGTHS[b]] = p
                columns = slice(head * v.shape[1], (head + 1) * v.shape[1])
                context[b, i, columns] = sum(p[j] * v[j] for j in range(LENGTHS[b]))
    return context, weights


def gradients(score: nn.Module, context: Tensor, weights: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    torch.manual_seed(1)
    loss = (context * torch.randn_like(context)).sum() + (weights * torch.randn_like(weights)).sum()
    return torch.autograd.grad(loss, [*inputs, *score.parameters()], materialize_grads=True, allow_unused=True)


@pytest.mark.parametrize("heads", [1, 2])
def test_score_is_its_formula(name: str, heads: int) -> None:
    score, query, memory, values = made(name, heads)
    expected = loop(name, score, query, memory, values)
    context, weights = score.attend(query, score.keys(memory), values, LENGTHS, return_weights=True)
    actual = context, weights if heads > 1 else weights.unsqueeze(1)
    assert_close(actual, expected)
    assert_close(gradients(score, *actual, query, memory, values), gradients(score, *expected, query, memory, values))


def test_score_of_one_step_is_a_row_of_all(name: str) -> None:
    score, query, memory, values = made(name)
    keys = score.keys(memory)
    context, weights = score.attend(query, keys, values, LENGTHS, return_weights=True)
    for i in range(M):
        step = score.attend(query[:, i], keys, values, LENGTHS, return_weights=True)
        assert_close(step, (context[:, i], weights[:, i]))


def test_additive_keys_have_exponentials_that_change_nothing() -> None:
    score, query, memory, values = made("additive", heads=2)
    found = []
    for plain in (False, True):
        keys = score.keys(memory)
        step = score.attend(query[:, 0], keys.states if plain else keys, values, LENGTHS)
        found.append((step, *gradients(score, step, step, query, memory, values)))
    assert_close(found[0], found[1])
    assert_close(keys.exponentials, torch.exp(2 * keys.states))
    assert not keys.exponentials.requires_grad
    assert AdditiveScore(4, 6, 8, dtype=torch.bfloat16).keys(memory.bfloat16()).exponentials.dtype is torch.float32
    for wrong, error in (
        (keys.exponentials[:, 1:], pyattn.ShapeError),
        (keys.exponentials[0], pyattn.ShapeError),
        (keys.exponentials.float(), pyattn.DtypeError),
        (2.0, pyattn.DtypeError),
    ):
        with pytest.raises(error, match=r"^keys.exponentials: "):
            score.attend(query, keys._replace(exponentials=wrong), values)


def test_additive_keys_serve_a_score_with_values_of_its_own_and_no_product() -> None:
    _, query, memory, _ = made("additive")
    score = LearnedValue(AdditiveScore(4, 6, 8, **FLOAT64), 6, 3, **FLOAT64)
    keys = score.keys(memory)
    assert_close(score.attend(query, keys, score.values(memory)), score(query, memory))
    for other in (DotScore(), ScaledDotScore(), CosineScore(), LearnedValue(DotScore(), 6, 3)):
        with pytest.raises(pyattn.RangeError, match=r"^keys: expected those of this score, .* AdditiveScore"):
            other.attend(torch.randn(B, M, 8, **FLOAT64), keys, memory)


def test_score_without_keys_gives_zeros(name: str) -> None:
    score, query, memory, values = made(name)
    context, weights = score.attend(query, score.keys(memory[:, :0]), values[:, :0], return_weights=True)
    assert context.shape == (B, M, DV) and (context == 0).all() and weights.shape == (B, M, 0)
    context, weights = score.attend(query, score.keys(memory), values, torch.tensor([0, N]), return_weights=True)
    assert (context[0] == 0).all() and (weights[0] == 0).all() and (context[1] != 0).all()
    assert all(g.isfinite().all() for g in gradients(score, context, weights, query, memory, values))


def test_score_forward_is_attend_over_memory(name: str) -> None:
    score, query, memory, _ = made(name)
    assert_close(score(query, memory, LENGTHS), score.attend(query, score.keys(memory), memory, LENGTHS))


def test_score_weights_are_those_that_multiplied_the_values(name: str) -> None:
    score, query, *_ = made(name)
    torch.manual_seed(2)
    n, size = 300, SCORES[name][2]  # more than one pass computes
    score = LocationScore(4, n, **FLOAT64) if name == "location" else score
    memory, values = torch.randn(B, n, size, **FLOAT64), torch.randn(B, n, DV, **FLOAT64)
    mask = torch.rand(B, 1, M, n) > 0.3
    context, weights = score.attend(query, score.keys(memory), values, return_weights=True, mask=mask, dropout_p=0.5)
    assert_close(weights @ values, context)
    assert ((weights == 0) | mask[:, 0]).all() and 0.2 < (weights > 0).double().mean() < 0.5


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_score_takes_the_options_of_attention(backend: str) -> None:
    score, query, memory, values = made("dot", heads=2)
    torch.manual_seed(2)
    options = {"bias": torch.randn(1, 2, M, N, **FLOAT64), "window": (1, 1), "softcap": 2.0, "backend": backend}
    q, k, v = (t.unflatten(2, (2, -1)).transpose(1, 2) for t in (query, memory, values))
    expected = pyattn.attention(q, k, v, scale=1.0, **options).transpose(1, 2).flatten(2)
    assert_close(score.attend(query, memory, values, **options), expected)


def test_score_of_learned_values_multiplies_them() -> None:
    _, query, memory, _ = made("general")
    score = LearnedValue(GeneralScore(4, 6, 2, **FLOAT64), 6, 3, bias=True, **FLOAT64)
    keys, values = score.keys(memory), score.values(memory)
    assert_close(values, memory @ score.value_projection.weight.T + score.value_projection.bias)
    assert_close(score.attend(query, keys, values, LENGTHS), score.score.attend(query, keys, values, LENGTHS))
    assert_close(score(query, memory, LENGTHS), score.attend(query, keys, values, LENGTHS))
    score(query, memory).sum().backward()
    assert all(p.grad is not None for p in score.parameters())


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("has_bias", [False, True])
def test_score_from_concat_splits_the_weight_by_columns(heads: int, has_bias: bool) -> None:
    _, query, memory, values = made("additive")
    concat, weight = torch.randn(8, 10, **FLOAT64), torch.randn(heads, 8 // heads, **FLOAT64)
    bias = torch.randn(8, **FLOAT64) if has_bias else None
    score = AdditiveScore.from_concat(concat, weight if heads > 1 else weight[0], 4, bias)
    pairs = torch.cat([query.unsqueeze(2).expand(-1, -1, N, -1), memory.unsqueeze(1).expand(-1, M, -1, -1)], -1)
    hidden = torch.tanh(pairs @ concat.T + (0 if bias is None else bias)).unflatten(-1, (heads, -1))
    p = torch.softmax((hidden * weight).sum(-1), 2)  # [B, M, N, heads]
    expected = torch.einsum("bmnh,bnhd->bmhd", p, values.unflatten(-1, (heads, -1))).flatten(2)
    assert_close(score.attend(query, score.keys(memory), values, backend="reference"), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("learned", [False, True])
def test_cosine_of_zero_vectors_is_zero_with_finite_gradients(dtype: torch.dtype, learned: bool) -> None:
    score = CosineScore(3.0, learned=learned, dtype=dtype)
    query = torch.tensor([[[0.0, 0.0], [1.0, 2.0]]], dtype=dtype, requires_grad=True)
    memory = torch.tensor([[[0.0, 0.0], [-2.0, 1.0], [0.0, 0.0]]], dtype=dtype, requires_grad=True)
    values = torch.tensor([[[1.0], [2.0], [6.0]]], dtype=dtype)
    context = score.attend(query, score.keys(memory), values)
    assert_close(context, torch.full_like(context, 3.0))  # the mean: every product is 0
    context.sum().backward()
    assert query.grad.isfinite().all() and (query.grad[0, 0] == 0).all()
    assert memory.grad.isfinite().all() and (memory.grad[0, [0, 2]] == 0).all()


@pytest.mark.parametrize("power", [-120, -60, 60, 120])
def test_cosine_does_not_change_with_the_length_of_vectors(power: int) -> None:
    torch.manual_seed(0)
    query, memory, values = (torch.randn(1, n, 8) for n in (3, 5, 5))
    score, factor = CosineScore(4.0), 2.0**power
    lengthened = score.attend(query * factor, score.keys(memory / factor), values)
    assert_close(lengthened, score.attend(query, score.keys(memory), values))


def test_location_weights_do_not_depend_on_memory() -> None:
    score, query, memory, values = made("location")
    assert score.keys(memory).states.data_ptr() == score.weight.data_ptr()  # nothing is copied
    assert_close(score.attend(query, score.keys(memory), values), score.attend(query, score.keys(-memory), values))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_score_under_autocast_computes_in_the_lower_dtype(name: str, dtype: torch.dtype) -> None:
    score, query, memory, values = made(name)
    score, query, memory, values = score.float(), query.float(), memory.float(), values.float()
    with torch.autocast("cpu", dtype=dtype):
        context = score(query, memory, LENGTHS)
    assert context.dtype is dtype
    assert_close(context.float(), score(query, memory, LENGTHS), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("learned", [False, True])
def test_additive_score_of_float16_computes_in_bfloat16_under_autocast(learned: bool) -> None:
    score: Score = AdditiveScore(4, 6, 8, dtype=torch.float16)
    score = LearnedValue(score, 6, 6, dtype=torch.float16) if learned else score
    with torch.autocast("cpu", dtype=torch.bfloat16):
        context = score(torch.randn(B, M, 4).half(), torch.randn(B, N, 6).half())
    assert context.dtype is torch.bfloat16


def test_score_shows_its_settings() -> None:
    assert repr(CosineScore(2.5)) == "CosineScore(sharpening=2.5)"
    assert repr(CosineScore(learned=True, heads=2)) == "CosineScore(learned=True, heads=2)"
    assert repr(LocationScore(4, 7)) == "LocationScore(query_size=4, max_length=7)"
    assert repr(DotScore()) == "DotScore()"


def test_score_compiles_whole(name: str) -> None:
    score, query, memory, values = made(name)
    torch._dynamo.reset()
    compiled = torch.compile(score.attend, fullgraph=True, backend="eager")
    assert_close(
        compiled(query, score.keys(memory), values, LENGTHS), score.attend(query, score.keys(memory), values, LENGTHS)
    )


def _normal(*size: int) -> Tensor:
    return torch.zeros(size)


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: DotScore().attend(_normal(2, 3, 4), _normal(2, 5, 6), _normal(2, 5, 6)), pyattn.ShapeError,
         r"keys: expected \[b=2, n, 4\], got \[2, 5, 6\]: query is \[2, 3, 4\].*GeneralScore"),
        (lambda: DotScore().attend(_normal(2, 3, 4), _normal(1, 5, 4), _normal(2, 5, 6)), pyattn.ShapeError, "keys: "),
        (lambda: DotScore().attend(_normal(2, 3, 4), _normal(2, 5, 4), _normal(2, 4, 6)), pyattn.ShapeError,
         r"values: expected \[b=2, n=5, dv\]"),
        (lambda: DotScore().attend(_normal(4), _normal(2, 5, 4), _normal(2, 5, 6)), pyattn.ShapeError, "query: "),
        (lambda: DotScore().attend(None, _normal(2, 5, 4), _normal(2, 5, 6)), pyattn.DtypeError, "query: "),
        (lambda: DotScore().attend(_normal(2, 3, 4), _normal(2, 5, 4).double(), _normal(2, 5, 6)), pyattn.DtypeError,
         "keys: expected torch.float32, the dtype of query"),
        (lambda: DotScore(heads=3).attend(_normal(2, 3, 4), _normal(2, 5, 4), _normal(2, 5, 6)), pyattn.ShapeError,
         "query: expected a last dimension that heads=3 divides"),
        (lambda: DotScore().attend(_normal(2, 4), _normal(2, 5, 4), _normal(2, 5, 6), scale=2.0), TypeError, "scale"),
        (lambda: DotScore().attend(_normal(2, 4), _normal(2, 5, 4), _normal(2, 5, 6), torch.tensor([1, 6])),
         pyattn.RangeError, "key_lengths: "),
        (lambda: DotScore().keys(_normal(5, 4)), pyattn.ShapeError, "memory: "),
        (lambda: GeneralScore(4, 6).keys(_normal(2, 5, 4)), pyattn.ShapeError, r"memory: expected \[b, n, 6\]"),
        (lambda: AdditiveScore(4, 6, 8).attend(_normal(2, 5), _normal(2, 5, 8), _normal(2, 5, 6)), pyattn.ShapeError,
         r"query: expected \[b, m, 4\] or \[b, 4\]"),
        (lambda: LocationScore(4, 7).keys(_normal(2, 8, 6)), pyattn.RangeError,
         "memory: expected at most max_length=7 positions, got 8"),
        (lambda: GeneralScore(4, 6, 3, heads=2), pyattn.RangeError, "heads: .* divides rank=3"),
        (lambda: GeneralScore(4, 0), pyattn.RangeError, "memory_size: "),
        (lambda: AdditiveScore(4, 6, 0), pyattn.RangeError, "size: "),
        (lambda: AdditiveScore.from_concat(_normal(8, 10), _normal(8), 10), pyattn.ShapeError, "concat: "),
        (lambda: AdditiveScore.from_concat(_normal(8, 10), _normal(7), 4), pyattn.ShapeError, "weight: "),
        (lambda: AdditiveScore.from_concat(_normal(8, 10), _normal(8), 4, _normal(4)), pyattn.ShapeError, "bias: "),
        (lambda: AdditiveScore.from_concat(None, _normal(8), 4), pyattn.DtypeError, "concat: "),
        (lambda: AdditiveScore.from_concat(_normal(8, 10), None, 4), pyattn.DtypeError, "weight: "),
        (lambda: AdditiveScore.from_concat(_normal(8, 10), _normal(8), 4, 1.0), pyattn.DtypeError, "bias: "),
        (lambda: CosineScore(0.0), pyattn.RangeError, "sharpening: "),
        (lambda: CosineScore(math.nan), pyattn.RangeError, "sharpening: "),
        (lambda: CosineScore().keys(_normal(2, 5, 0)), pyattn.ShapeError, "memory: "),
        (lambda: LocationScore(4, 0), pyattn.RangeError, "max_length: "),
        (lambda: LearnedValue(DotScore(heads=2), 6, 5), pyattn.RangeError, "heads: .* divides value_size=5"),
    ],
)  # fmt: skip
def test_score_of_bad_input_names_the_argument(call: Callable[[], object], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        call()
