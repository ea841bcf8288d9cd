"""Hard attention: what it draws, how probable that is, and that its gradients are those of the exact expectation."""

import math
from functools import cache

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import pyattn
from pyattn import DtypeError, RangeError, dropout
from pyattn.nn import Chosen, hard, hard_attention, hard_attention_of_scores, next_baseline, reinforcement

B, H, HK, M, N, D, DV = 2, 4, 2, 5, 7, 3, 6
FLOAT64 = {"dtype": torch.float64}
LENGTHS = torch.tensor([N, 3])
MASK = torch.rand(B, 1, M, N, generator=torch.Generator().manual_seed(3)) > 0.4
SEGMENTS = torch.tensor([[0, 0, 1, 1, 2]] * B), torch.tensor([[0, 0, 1, 1, 1, 1, 0]] * B)
RANKS = torch.tensor([[3, 0, 5, 2, 9]] * B), torch.tensor([[4, 1, 2, 8, 0, 3, 6]] * B)
ROWS = torch.tensor([[0, 2, 5, 3, -1], [4, 1, 0, 6, 2]]), torch.tensor([[2, 7, 9, 3, 4], [7, 2, 1, 7, 6]])
AHEAD = torch.arange(N) - torch.arange(M)[:, None] - (N - M)  # of one's own key
HELD = (torch.arange(N) < LENGTHS[:, None])[:, None, None]
# Options, and who then sees whom.
MASKS: dict[str, tuple[dict, Tensor]] = {
    "everything": ({}, torch.ones(N, dtype=torch.bool)),
    "mask": ({"mask": MASK}, MASK),
    "key-lengths": ({"key_lengths": LENGTHS}, HELD),
    "causal": ({"causal": True}, AHEAD <= 0),
    "window": ({"window": (2, 1)}, (AHEAD >= -2) & (AHEAD <= 1)),
    "segments": ({"segment_ids": SEGMENTS}, (SEGMENTS[0][:, :, None] == SEGMENTS[1][:, None])[:, None]),
    "ranks": ({"ranks": RANKS}, (RANKS[1][:, None] < RANKS[0][:, :, None])[:, None]),
    "row-windows": (
        {"row_windows": ROWS},
        ((torch.arange(N) >= ROWS[0][..., None]) & (torch.arange(N) < ROWS[1][..., None]))[:, None],
    ),
    "several": ({"mask": MASK, "key_lengths": LENGTHS, "causal": True}, MASK & HELD & (AHEAD <= 0)),
}


@pytest.fixture(params=["reference", "cpu"], autouse=True)
def backend(request: pytest.FixtureRequest):
    with pyattn.use_backend(request.param):
        yield


def tensors(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    sizes = (B, H, M, D), (B, HK, N, D), (B, HK, N, DV)
    return tuple(torch.randn(size, **FLOAT64).to(dtype).requires_grad_() for size in sizes)


def logits(q: Tensor, k: Tensor, see: Tensor, scale: float = D**-0.5) -> Tensor:
    return (scale * q @ k.repeat_interleave(H // HK, 1).mT).masked_fill(~see, -torch.inf)


@cache
def gumbel(seed: int) -> Tensor:
    """The noise of each place, one word at a time, as `pyattn.spec` says where that word is."""
    noise = torch.empty(B, H, M, N, **FLOAT64)
    for b, h, i, j in torch.cartesian_prod(*map(torch.arange, (B, H, M, N))):
        word = dropout.philox(torch.tensor(seed), j // 4, i, h, b)[j % 4]
        noise[b, h, i, j] = -math.log(-math.log((int(word) + 0.5) / 2**32))
    return noise


def expected(s: Tensor, noise: Tensor, v: Tensor) -> Chosen:
    """A row at a time."""
    shape = s.shape[:3]
    out, index = torch.zeros(*shape, DV, **FLOAT64), torch.full(shape, -1)
    log_prob, entropy = torch.zeros(shape, **FLOAT64), torch.zeros(shape, **FLOAT64)
    for b, h, i in torch.cartesian_prod(*map(torch.arange, shape)).tolist():
        row = s[b, h, i]
        if (visible := row > -torch.inf).any():
            index[b, h, i] = (row + noise[b, h, i]).argmax()
            log_p = row[visible].log_softmax(0)
            log_prob[b, h, i] = row[index[b, h, i]] - row[visible].logsumexp(0)
            entropy[b, h, i] = -(log_p.exp() * log_p).sum()
            out[b, h, i] = v[b, h // (H // HK), index[b, h, i]]
    return Chosen(out, index, log_prob, entropy)


@pytest.mark.parametrize("greedy", [False, True])
@pytest.mark.parametrize("name", MASKS)
def test_hard_attention_chooses_by_score_and_noise(name: str, greedy: bool) -> None:
    options, see = MASKS[name]
    q, k, v = tensors()
    chosen = hard_attention(q, k, v, seed=5, greedy=greedy, **options)
    s = logits(q, k, see)
    wanted = expected(s, torch.zeros_like(s) if greedy else gumbel(5), v)
    assert_close(chosen, wanted)
    torch.manual_seed(1)
    weights = [torch.randn_like(t) for t in (chosen.out, chosen.log_prob, chosen.entropy)]

    def gradients(c: Chosen) -> tuple[Tensor, ...]:
        found = zip((c.out, c.log_prob, c.entropy), weights, strict=True)
        return torch.autograd.grad(sum((t * w).sum() for t, w in found), (q, k, v), retain_graph=True)

    assert_close(gradients(chosen), gradients(wanted))
    by_scores = hard_attention_of_scores(s, v, seed=5, greedy=greedy)
    assert_close(by_scores, wanted)
    assert_close(gradients(by_scores), gradients(wanted))


def test_a_query_without_keys_chooses_none() -> None:
    q, k, v = tensors()
    mask = torch.ones(M, 1, dtype=torch.bool)
    mask[2] = False
    for temperature in (None, 1.0):
        options = {"mask": mask, "key_lengths": torch.tensor([N, 0]), "temperature": temperature}
        chosen = hard_attention(q, k, v, **options)
        for t in (chosen.indices + 1, chosen.out, chosen.log_prob, chosen.entropy):
            assert not t[1].any() and not t[0, :, 2].any() and t[0, :, 1].all()
        found = torch.autograd.grad(sum(t.sum() for t in (chosen.out, chosen.log_prob, chosen.entropy)), (q, k, v))
        assert all(g.isfinite().all() for g in found) and not any(g[1].any() for g in found)
    for m, n in ((M, 0), (0, N)):
        chosen = hard_attention(q[:, :, :m], k[:, :, :n], v[:, :, :n], temperature=1.0)
        assert chosen.out.shape == (B, H, m, DV) and not chosen.out.any() and (chosen.indices == -1).all()
        by_scores = hard_attention_of_scores(torch.zeros(B, H, m, n, **FLOAT64), v[:, :, :n], temperature=1.0)
        assert_close(by_scores, chosen)
    assert hard_attention(q[:0], k[:0], v[:0], temperature=1.0).out.shape == (0, H, M, DV)
    assert hard_attention_of_scores(torch.zeros(0, H, M, N, **FLOAT64), v[:0], temperature=1.0).out.shape[0] == 0


def test_scores_that_do_not_fit_are_named() -> None:
    s, v = torch.zeros(1, 1, 2, 3), torch.zeros(1, 1, 3, 4)
    for options, error, text in (
        ({"scores": s.long()}, DtypeError, "scores: expected float16 or bfloat16 or float32 or float64, got int64"),
        ({"key_lengths": torch.tensor([4])}, RangeError, r"key_lengths: expected values in \[0, n=3\], got 4"),
        ({"key_lengths": torch.tensor([-1])}, RangeError, r"key_lengths: expected values in \[0, n=3\], got -1"),
        ({"soft": torch.tensor([1])}, DtypeError, "soft: expected bool"),
        ({"temperature": 0.0}, RangeError, "temperature: expected a positive number"),
    ):
        with pytest.raises(error, match=text):
            hard_attention_of_scores(**({"scores": s, "v": v} | options))


def test_any_positive_temperature_gives_the_chosen_row() -> None:
    q, k, v = (t.float() for t in tensors())
    plain = hard_attention(q, k, v, seed=3)
    for temperature in (1e-300, 1e-40, 1e30):
        chosen = hard_attention(q, k, v, seed=3, temperature=temperature)
        assert_close(chosen.out, plain.out)
        assert all(g.isfinite().all() for g in torch.autograd.grad(chosen.out.sum(), (q, k, v), retain_graph=True))


def test_a_draw_that_has_changed_since_has_no_gradient() -> None:
    seed, mask = torch.tensor(5), MASK.clone()
    for changed in (seed, mask):
        q, k, v = tensors()
        chosen = hard_attention(q, k, v, mask=mask, temperature=1.0, seed=seed)
        changed.fill_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            chosen.out.sum().backward()


def test_hard_attention_compiles_whole() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(hard_attention, fullgraph=True, backend="eager")
    assert_close(compiled(*tensors(), seed=4), hard_attention(*tensors(), seed=4))


def test_scores_behind_a_length_are_not_seen() -> None:
    q, k, v = tensors()
    s = logits(q, k, MASKS["everything"][1])
    found = hard_attention_of_scores(s, v, key_lengths=LENGTHS, seed=6)
    assert_close(found, hard_attention_of_scores(s.masked_fill(~HELD, -torch.inf), v, seed=6))
    assert found.indices[1].max() == LENGTHS[1] - 1


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_a_key_that_nobody_sees_is_not_there(poison: float) -> None:
    q, k, v = tensors()
    lengths = torch.tensor([5, 5])
    bad_k, bad_v = (t.detach().clone().requires_grad_() for t in (k, v))
    with torch.no_grad():
        bad_k[:, :, 5:], bad_v[:, :, 5:] = poison, poison
    for temperature in (None, 0.5):
        options = {"key_lengths": lengths, "seed": 1, "temperature": temperature}
        found = []
        for keys, values in ((k, v), (bad_k, bad_v)):
            chosen = hard_attention(q, keys, values, **options)
            loss = chosen.out.sum() + chosen.log_prob.sum() + chosen.entropy.sum()
            found.append((chosen, torch.autograd.grad(loss, (q, keys, values))))
        assert_close(*found)
        by_scores = []
        for values in (v, bad_v):
            s = torch.zeros(B, H, M, N, **FLOAT64, requires_grad=True)
            chosen = hard_attention_of_scores(s, values, soft=torch.tensor([True, False]), **options)
            by_scores.append((chosen, torch.autograd.grad(chosen.out.sum(), (s, values))))
        assert_close(*by_scores)


def test_draws_do_not_depend_on_how_many_queries_are_scored_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    for options in (
        {"mask": MASK, "causal": True, "segment_ids": SEGMENTS, "seed": 2, "temperature": 0.7},
        {"ranks": RANKS, "seed": 2, "temperature": 0.7},
        {"row_windows": ROWS, "seed": 2, "temperature": 0.7},
    ):
        whole = hard_attention(*tensors(), **options)
        with monkeypatch.context() as patch:
            patch.setattr(hard, "_SCORES_AT_ONCE", B * H * N * 2)
            assert len(list(hard._in_parts(*pyattn.core.prepare(*tensors())))) == 3
            assert_close(hard_attention(*tensors(), **options), whole)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_lower_precision_chooses_by_scores_that_are_not_rounded(dtype: torch.dtype) -> None:
    q, k, v = tensors(dtype)
    chosen = hard_attention(q, k, v, seed=3, temperature=0.5)
    wanted = hard_attention(q.double(), k.double(), v.double(), seed=3, temperature=0.5)
    assert chosen.out.dtype is dtype and chosen.log_prob.dtype is chosen.entropy.dtype is torch.float32
    assert_close(chosen, wanted, check_dtype=False, rtol=1e-5, atol=1e-5)
    by_scores = hard_attention_of_scores(logits(q, k, MASKS["everything"][1]), v, seed=3, temperature=0.5)
    assert by_scores.out.dtype is dtype and by_scores.log_prob.dtype is torch.float32
    for c in (chosen, by_scores):
        assert torch.autograd.grad(c.out.sum(), q)[0].any()
    with torch.autocast("cpu", torch.bfloat16):
        assert hard_attention(q, k, v, temperature=0.5).out.dtype is torch.bfloat16


def test_frequencies_are_the_probabilities() -> None:
    q, k, v = torch.randn(1, 1, 1, 4).expand(1, 1, 20000, 4), torch.randn(1, 1, 6, 4), torch.randn(1, 1, 6, 1)
    counts = hard_attention(q, k, v, seed=0).indices.flatten().bincount(minlength=6) / 20000
    assert_close(counts, (q[0, 0, 0] @ k[0, 0].T / 2).softmax(0), rtol=0, atol=0.015)


def test_entropy_and_log_probability_have_their_gradients() -> None:
    q, k, v = (t[1:, :2, :3].detach().requires_grad_() for t in tensors())
    options = {"key_lengths": torch.tensor([2]), "seed": 4}

    def of_products(q: Tensor, k: Tensor) -> tuple[Tensor, ...]:
        return hard_attention(q, k, v.detach(), causal=True, **options)[2:]

    def of_scores(s: Tensor) -> tuple[Tensor, ...]:
        return hard_attention_of_scores(s, v.detach(), **options)[2:]

    assert torch.autograd.gradcheck(of_products, (q, k))
    assert torch.autograd.gradcheck(of_scores, (torch.randn(1, 2, 2, 3, **FLOAT64, requires_grad=True),))


def test_reinforcement_is_the_gradient_of_the_exact_expectation() -> None:
    """The reward of a choice is a function of its value; its mean over all keys is what the estimate is of."""
    torch.manual_seed(0)
    draws, n, d = 10000, 5, 3
    q, k, v = (torch.randn(1, 1, rows, d, **FLOAT64, requires_grad=True) for rows in (1, n, n))
    target = torch.randn(d, **FLOAT64)

    def reward(value: Tensor) -> Tensor:
        return -(value - target).square().sum(-1)

    p = (q @ k.mT / math.sqrt(d)).softmax(-1)
    exact = (p * reward(v)).sum() + 0.3 * -(p * p.log()).sum()
    wanted = torch.autograd.grad(exact, (q, k, v))
    batch = [t.expand(draws, -1, -1, -1) for t in (q, k, v)]
    chosen = hard_attention(*batch, seed=1)
    found = reward(chosen.out[:, 0, 0])
    baseline = (p * reward(v)).sum().detach()
    loss = -found + reinforcement(found, chosen.log_prob, chosen.entropy, baseline, entropy_weight=0.3)
    for estimate, exactly in zip(torch.autograd.grad(-loss.mean(), (q, k, v)), wanted, strict=True):
        assert_close(estimate, exactly, rtol=0, atol=0.08)
        assert (exactly.abs() > 0.1).any()


def test_reinforcement_weighs_both_parts_by_row() -> None:
    log_prob, entropy = (torch.tensor([[-1.0, -2.0], [-3.0, 0.0]], requires_grad=True) for _ in range(2))
    found = reinforcement(torch.tensor([-4.0, -10.0]), log_prob, entropy, torch.tensor(-5.0), weight=2.0,
                          entropy_weight=0.5)  # fmt: skip
    assert_close(found, torch.tensor([2.0 * 3 + 1.5, -2.0 * 5 * 3 + 1.5]))
    torch.autograd.backward(found.sum())
    assert_close(log_prob.grad, torch.tensor([[-2.0, -2.0], [10.0, 10.0]]))
    assert_close(entropy.grad, torch.full((2, 2), -0.5))
    assert_close(next_baseline(torch.tensor(-5.0), torch.tensor([-4.0, -10.0])), torch.tensor(-4.5 - 0.7))


@pytest.mark.parametrize("greedy", [False, True])
def test_straight_through_has_the_values_of_the_choice_and_the_gradient_of_the_softmax(greedy: bool) -> None:
    q, k, v = tensors()
    tau = 0.6
    s = logits(q, k, MASKS["several"][1])
    noisy = (s + (0.0 if greedy else gumbel(7))) / tau
    sees = (s > -torch.inf).any(-1, keepdim=True)
    p = torch.where(sees, torch.where(sees, noisy, 0.0).softmax(-1), 0.0)
    one = torch.where(sees, torch.nn.functional.one_hot(noisy.argmax(-1), N).double(), 0.0)
    wanted = (one + p - p.detach()) @ v.repeat_interleave(H // HK, 1)  # as torch's gumbel_softmax(hard=True) is
    chosen = hard_attention(q, k, v, temperature=tau, seed=7, greedy=greedy, **MASKS["several"][0])
    by_scores = hard_attention_of_scores(s, v, temperature=tau, seed=7, greedy=greedy)
    weights = torch.randn_like(wanted)
    expected = torch.autograd.grad((wanted * weights).sum(), (q, k, v), retain_graph=True)
    for out in (chosen.out, by_scores.out):
        assert_close(out, wanted)
        assert_close(torch.autograd.grad((out * weights).sum(), (q, k, v), retain_graph=True), expected)


def test_soft_batch_elements_have_the_expectation_and_choose_nothing() -> None:
    q, k, v = tensors()
    soft, options = torch.tensor([True, False]), {"key_lengths": LENGTHS, "seed": 3}
    plain = hard_attention(q, k, v, **options)
    s = logits(q, k, HELD)
    for mixed in (hard_attention(q, k, v, soft=soft, **options), hard_attention_of_scores(s, v, soft=soft, seed=3)):
        assert_close(mixed.out[0], pyattn.attention(q, k, v, key_lengths=LENGTHS)[0])
        assert (mixed.indices[0] == -1).all() and not mixed.log_prob[0].any()
        assert_close(mixed.entropy, plain.entropy)
        assert_close([t[1] for t in mixed], [t[1] for t in plain])


def test_draws_are_new_ones_without_a_seed_and_follow_torchs_generator() -> None:
    q, k, v = torch.zeros(1, 1, 100, 2), torch.zeros(1, 1, 50, 2), torch.zeros(1, 1, 50, 2)
    torch.manual_seed(0)
    first, second = (hard_attention(q, k, v).indices for _ in range(2))
    torch.manual_seed(0)
    assert (first != second).any() and (hard_attention(q, k, v).indices == first).all()


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda q, k, v: hard_attention(q, k[..., :2], v), pyattn.ShapeError, "k: expected"),
        (lambda q, k, v: hard_attention(q, k, v, temperature=0), pyattn.RangeError, "temperature: expected a positive"),
        (lambda q, k, v: hard_attention(q, k, v, seed=1.5), pyattn.DtypeError, "seed: "),
        (lambda q, k, v: hard_attention(q, k, v, soft=torch.ones(3) > 0), pyattn.ShapeError, r"soft: expected \[b=2"),
        (lambda q, k, v: hard_attention(q, k, v, soft=torch.ones(2)), pyattn.DtypeError, "soft: expected bool"),
        (lambda q, k, v: hard_attention(q, k, v, key_lengths=torch.tensor([8, 1])), pyattn.RangeError, "key_lengths: "),
        (lambda q, k, v: hard_attention_of_scores(q[0], v), pyattn.ShapeError, r"scores: expected \[b, h, m, n\]"),
        (lambda q, k, v: hard_attention_of_scores(q, v), pyattn.ShapeError, r"v: expected \[b=2, hk, n=3, dv\]"),
        (lambda q, k, v: hard_attention_of_scores(q, k.mT, key_lengths=torch.ones(3).int()), pyattn.ShapeError,
         "key_lengths: "),
    ],
)  # fmt: skip
def test_bad_input_names_the_argument(call, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        call(*tensors())
