"""Relative attention and ranks beyond the contract's cases: other oracles, every alignment of tiles, errors."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import pyattn
from pyattn import testing
from pyattn.spec import dtype_name
from pyattn.testing import Case

BACKENDS = [
    name
    for name, backend in pyattn.registry.BACKENDS.items()
    if {"relative", "ranks"} <= backend.features and backend.unavailable() is None and "cpu" in backend.devices
]
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def normal(*shape: int, seed: int = 0, **options: Any) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(**options)


def shifted(x: Tensor) -> Tensor:
    """Transformer-XL's shift of [m, m + n - 1] products with the distances from the largest one downwards, [m, n]."""
    m, distances = x.shape[-2:]
    padded = torch.nn.functional.pad(x, (1, 0)).flatten(-2)[..., m:]
    return padded.unflatten(-1, (m, distances))[..., : distances - m + 1]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("m", "n"), [(1, 1), (1, 70), (5, 5), (67, 67), (40, 150)])
def test_relative_is_the_shifted_matrix_of_transformer_xl(backend, m, n):
    """The original's own computation (arXiv:1901.02860, appendix B), with its biases u and w."""
    q, k, v, r = normal(2, 3, m, 8), normal(2, 3, n, 8, seed=1), normal(2, 3, n, 8, seed=2), normal(3, m + n - 1, 8)
    u, w = normal(3, 1, 8, seed=3), normal(3, 1, 8, seed=4)
    scores = (q + u) @ k.transpose(-1, -2) + shifted((q + w) @ r.flip(1).transpose(-1, -2))
    expected = torch.softmax(scores / math.sqrt(8), -1) @ v
    out = pyattn.relative_attention(q + u, k, v, q + w, r[None], 1 - m, backend=backend)
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_relative_with_sinusoids_is_plain_attention_of_a_wider_head(backend):
    """sin and cos of a difference are sums of products: an oracle by a kernel that knows no distances."""
    m, n, d, width = 70, 130, 16, 24
    q, k, v = normal(1, 2, m, d), normal(1, 2, n, d, seed=1), normal(1, 2, n, d, seed=2)
    relative_q, project = normal(1, 2, m, d, seed=3), normal(2, width, d, seed=4)
    rates = 10000 ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)

    def sinusoids(positions: Tensor) -> Tensor:
        return torch.cat([(positions[:, None] * rates).sin(), (positions[:, None] * rates).cos()], -1)

    a, b = (relative_q @ project.transpose(-1, -2)).chunk(2, -1)  # of sin and cos of i - j
    at_i, at_j = sinusoids(torch.arange(n - m, n).double()), sinusoids(torch.arange(n).double())
    sin, cos = at_i.chunk(2, -1)
    wide_q = torch.cat([q, a * sin + b * cos, b * sin - a * cos], -1)
    wide_k = torch.cat([k, torch.cat(at_j.chunk(2, -1)[::-1], -1).expand(1, 2, -1, -1)], -1)
    expected = pyattn.attention(wide_q, wide_k, v, scale=0.3, causal=True, backend="reference")
    relative_k = (sinusoids(torch.arange(n).double()) @ project)[None]
    out = pyattn.relative_attention(
        q, k, v, relative_q, relative_k, 0, scale=0.3, causal=True, backend=backend
    )  # distances of earlier keys alone: a band leaves no others
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_relative_of_one_column_is_a_bias_learned_by_distance(backend):
    q, k, v, table = normal(2, 3, 50, 8), normal(2, 3, 90, 8, seed=1), normal(2, 3, 90, 8, seed=2), normal(1, 3, 139, 1)
    table.requires_grad_()
    distance = torch.arange(50)[:, None] + 40 - torch.arange(90)
    expected = pyattn.attention(q, k, v, bias=table[0, :, distance + 49, 0][None], backend="reference")
    ones = torch.full((2, 3, 50, 1), math.sqrt(8), dtype=torch.float64)
    out = pyattn.relative_attention(q, k, v, ones, table, -49, backend=backend)
    torch.testing.assert_close(out, expected)
    got, want = (torch.autograd.grad(t.square().sum(), table)[0] for t in (out, expected))
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize(
    ("m", "n"), [(1, 64), (8, 65), (63, 129), (64, 64), (65, 63), (128, 128), (130, 1), (193, 257)]
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_relative_of_tiles_of_any_alignment_agrees_with_definition(backend, m, n, dtype):
    for e, options in ((32, {}), (5, {"causal": True}), (70, {"window": (70, 3)})):
        case = Case("tiles", relative=e, b=1, h=2, hk=1, m=m, n=n, d=24, dv=20, **options)
        call = testing.make_inputs(case, dtype)
        results = testing.reference(call).compare(testing.evaluate_backend(call, backend))
        assert [r for r in results if not r.excess <= 1] == []


@pytest.mark.parametrize("backend", BACKENDS)
def test_relative_has_the_same_bits_on_any_number_of_threads(backend):
    call = testing.make_inputs(Case("threads", relative=40, relative_shared=True, b=3, m=150, n=170), torch.float32)
    found, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(testing.evaluate_backend(call, backend))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(other[name], t) for name, t in found[0].items())


@pytest.mark.parametrize("backend", BACKENDS)
def test_ranks_are_the_masks_of_a_permuted_order(backend):
    """XLNet's two streams (arXiv:1906.08237, section 2.3): content sees itself and what comes before it in the order,
    queries what comes before; and a prefix that all see."""
    order = torch.stack([torch.randperm(40, generator=torch.Generator().manual_seed(i)) for i in range(2)])
    q, k, v = (normal(2, 3, 40, 8, seed=i) for i in range(3))
    mask = order[:, None, :, None] > order[:, None, None, :]
    for own, ranks in ((False, order), (True, order + 1)):
        seen = mask | torch.eye(40, dtype=torch.bool) if own else mask
        expected = pyattn.attention(q, k, v, mask=seen, backend="reference")
        r = torch.zeros(1, 3, 79, 1, dtype=torch.float64)
        out = pyattn.relative_attention(q, k, v, r[:, :, :40].expand(2, -1, -1, -1), r, -39, ranks=(ranks, order),
                                        backend=backend)  # fmt: skip
        torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_keys_of_the_queries_own_rank_are_not_seen_in_whole_tiles_either(backend):
    q, k = normal(1, 1, 70, 8), normal(1, 1, 130, 8, seed=1)
    k_ranks = (torch.arange(130) >= 64).int()[None]  # a tile of the queries' rank less 1, the others of their own
    x, numbers = pyattn.core.prepare(q, k, k, ranks=(torch.ones(1, 70, dtype=torch.int32), k_ranks))
    out, _ = pyattn.core.run(x, numbers, backend)
    expected = pyattn.attention(q, k[:, :, :64], k[:, :, :64], backend="reference")
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=dtype_name)
@pytest.mark.parametrize("n", [2, 4])
@pytest.mark.parametrize("backend", BACKENDS)
def test_relative_gradients_are_those_of_q_and_k_where_rows_are_keys(backend, n, dtype):
    """One query, whose few keys are parallel and whose values nearly are: gradients are what is left of sums that
    cancel, and show the rounding of out. Both terms are to take it back alike."""
    q, d_out = normal(4, 8, 1, 32), normal(4, 8, 1, 32, seed=1)
    k = q / q.square().sum(-1, keepdim=True) * (20 - torch.arange(n, dtype=torch.float64)[:, None] / 2)
    v = normal(4, 8, 1, 32, seed=2) + normal(4, 8, n, 32, seed=3) / 20
    leaves = [t.to(dtype).requires_grad_() for t in (q, k, v, q, k.flip(2))]
    out = pyattn.relative_attention(*leaves, 0, scale=1.0, backend=backend)
    d_q, d_k, _, d_relative_q, d_relative_k = torch.autograd.grad(out, leaves, d_out.to(dtype))
    for got, expected in ((d_relative_q, d_q), (d_relative_k.flip(2), d_k)):
        assert (got.double() - expected.double()).norm() <= torch.finfo(dtype).eps * expected.double().norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_name)
@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_of_distances_that_no_pair_has_go_nowhere(backend, dtype):
    for m, n, options, band in (
        (3, 5, {}, (-2, 4)),
        (70, 90, {"window": (5, 2)}, (-2, 5)),
        (70, 200, {"causal": True}, (0, 199)),
        (130, 20, {"causal": True, "window": (65, None)}, (0, 19)),
        (40, 60, {"window": (None, 3)}, (-3, 59)),
        (0, 5, {}, (0, -1)),
        (5, 0, {}, (0, -1)),
    ):
        first = -m - 7
        distance = torch.arange(m + n + 20) + first
        has = (distance >= band[0]) & (distance <= band[1])
        q, k, v, relative_q = (normal(2, 2, t, 4, seed=i, dtype=dtype) for i, t in enumerate((m, n, n, m)))
        rows, found = normal(1, 2, len(distance), 4, seed=4, dtype=dtype), []
        for filling in (0.0, torch.nan, torch.inf):
            leaves = [q, k, v, relative_q, torch.where(has[:, None], rows, filling)]
            leaves = [t.clone().requires_grad_() for t in leaves]
            out = pyattn.relative_attention(*leaves, first, backend=backend, **options)
            found.append([out.detach(), *torch.autograd.grad(out.square().sum(), leaves)])
        for others in found[1:]:
            for got, expected in zip(others, found[0], strict=True):
                torch.testing.assert_close(got, expected, atol=0, rtol=0)
        d_rows = found[0][-1]
        assert (d_rows[:, :, ~has] == 0).all() and (d_rows[:, :, has] != 0).any(-1).all()


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "reference"])
def test_relative_query_that_sees_nothing_goes_nowhere(backend):
    q, k, rows = normal(1, 2, 70, 4), normal(1, 2, 60, 4, seed=1), normal(1, 2, 129, 4, seed=2)
    found = []
    for filling in (0.0, torch.nan):
        relative_q = normal(1, 2, 70, 4, seed=3)
        relative_q[:, :, :10] = filling  # under the causal mask they stand before the first key
        leaves = [t.clone().requires_grad_() for t in (q, k, relative_q, rows)]
        out = pyattn.relative_attention(leaves[0], leaves[1], k, *leaves[2:], -69, causal=True, backend=backend)
        found.append([out.detach(), *torch.autograd.grad(out.square().sum(), leaves)])
    assert all(map(torch.equal, *found))


Q, R, RANKS = torch.randn(2, 3, 5, 8), torch.randn(1, 3, 11, 4), torch.zeros(2, 5, dtype=torch.int32)
GIVEN: dict[str, Any] = {
    "q": Q, "k": torch.randn(2, 3, 7, 8), "v": torch.randn(2, 3, 7, 6), "relative_q": Q[..., :4], "relative_k": R,
    "first": -4,
}  # fmt: skip
WRONG = {
    "short": (
        {"relative_k": R[:, :, 1:]}, ValueError, r"relative_k: expected rows for the distances -4 to 6 .*10 from -4",
    ),
    "late": ({"first": -3}, ValueError, r"relative_k: expected rows for the distances -4 to 6 from key to query"),
    "band": (
        {"window": (2, 1), "relative_k": R[:, :, :3], "first": -1}, ValueError, r"distances -1 to 2 .*got 3 from -1",
    ),
    "e": ({"relative_q": Q}, ValueError, r"relative_k: expected \[1 or b=2, h=3, distances, e=8\], got \[1, 3, 11, 4"),
    "rows": (
        {"relative_q": Q[:, :, 1:, :4]}, ValueError, r"relative_q: expected \[b=2, h=3, m=5, e\] .*got \[2, 3, 4, 4\]",
    ),
    "no columns": ({"relative_q": Q[..., :0]}, ValueError, "relative_q: expected .* with e of at least 1"),
    "heads": ({"relative_k": R[:, :2]}, ValueError, r"relative_k: expected \[1 or b=2, h=3"),
    "dtype": ({"relative_k": R.double()}, TypeError, "relative_k: expected float32, got float64"),
    "no rows": ({"relative_k": None}, TypeError, "relative_k: expected a torch.Tensor, got NoneType"),
    "no queries": ({"relative_q": None}, TypeError, "relative_q: expected a torch.Tensor, got NoneType"),
    "first": ({"first": 0.0}, TypeError, "first: expected an int, the distance of relative_k's first row, got 0.0"),
    "ranks": ({"ranks": torch.zeros(2, 5)}, TypeError, "ranks: expected a pair"),
    "rank length": ({"ranks": (RANKS, RANKS)}, ValueError, r"ranks\[1\]: .*\[2, 7\]"),
    "rank dtype": ({"ranks": (RANKS.float(), RANKS)}, TypeError, r"ranks\[0\]: expected int8 or .*float32"),
    "name": ({"memory": 1}, TypeError, "relative_attention: expected no argument memory"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "kind", "message"), WRONG.values(), ids=WRONG)
def test_relative_wrong_argument_is_named(change, kind, message):
    pyattn.relative_attention(**GIVEN)
    with pytest.raises(kind, match=message):
        pyattn.relative_attention(**GIVEN | change)


@pytest.mark.parametrize("backend", BACKENDS)
def test_relative_first_distance_of_no_pair_may_be_any(backend):
    for first in (10**30, -(2**50)):
        no_queries = {name: GIVEN[name][:, :, :0] for name in ("q", "relative_q")}
        out = pyattn.relative_attention(**GIVEN | no_queries | {"first": first}, backend=backend)
        assert out.shape == (2, 3, 0, 6)


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "reference"])
def test_relative_term_wider_than_a_backend_takes_is_refused(backend):
    e = pyattn.registry.BACKENDS[backend].max_head_dim + 1
    wide = {"relative_q": torch.zeros(2, 3, 5, e), "relative_k": torch.zeros(1, 3, 11, e)}
    with pytest.raises(pyattn.UnsupportedError, match=f"size of a relative term is at most {e - 1}, got e={e}"):
        pyattn.relative_attention(**GIVEN | wide, backend=backend)


@pytest.mark.parametrize("backend", ["hopper", "cuda"])
def test_relative_is_refused_by_name_where_no_kernel_does_it(backend):
    given = {name: t.half() if isinstance(t, Tensor) else t for name, t in GIVEN.items()}
    spec = pyattn.spec.AttentionSpec.of(*pyattn.core.prepare(**given))._replace(device="cuda", ranks=True)
    refusal = pyattn.registry.BACKENDS[backend].refusal(spec)
    assert refusal == "does not do ranks (a query sees lower ones), relative term with gradient"


def test_relative_counts_its_products():
    given = {name: t.clone().requires_grad_() if isinstance(t, Tensor) else t for name, t in GIVEN.items()}
    counter = FlopCounterMode(display=False)
    with counter:
        out = pyattn.relative_attention(**given)
    pairs = 2 * 3 * 5 * 7
    assert counter.get_total_flops() == 2 * pairs * (8 + 4 + 6)
    with counter:
        out.sum().backward()
    assert counter.get_total_flops() == 2 * pairs * (3 * (8 + 4) + 2 * 6)


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "reference"])
def test_relative_memory_grows_with_the_length_and_not_with_its_square(backend):
    q = torch.zeros(1, 2, 1, 64)
    sizes = []
    for length in (1024, 2048):
        x = q.expand(1, 2, length, 64)
        given = (x, x, x, x, torch.zeros(1, 2, 2 * length, 64), -length)
        names = ("q", "k", "v", "relative_q", "relative_k", "first")
        spec = pyattn.spec.AttentionSpec.of(*pyattn.core.prepare(**dict(zip(names, given, strict=True))))
        sizes.append(sum(pyattn.registry.BACKENDS[backend].workspace_bytes(spec)))
    assert sizes[1] < 2.2 * sizes[0]
