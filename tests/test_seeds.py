"""Worked examples and exercises of two courses about attention, with their numbers.

SNU: Yoon's lecture on attention, whose example has scores 112 and 96. CSW182: Levine's discussion, which asks for the
variance of scores, the matrix form and the number of operations, and his lectures on beam search and on attention.
"""

import itertools
import math

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode
from toy_decoder import ToyDecoder

import pyattn
from pyattn.decoding import Rules, beam_search, by_length
from pyattn.models import Seq2Seq, Seq2SeqConfig
from pyattn.nn import AdditiveScore, CosineScore, DotScore, GeneralScore, ScaledDotScore

FLOAT64 = {"dtype": torch.float64}


def normal(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed), **FLOAT64)


def two_scores(d: int = 64) -> tuple[Tensor, Tensor, Tensor]:
    """A query [1, 1, d] and two keys [1, 2, d] with the products 112 and 96, and values [1, 2, 3]."""
    query = torch.ones(1, 1, d, **FLOAT64)
    keys = torch.tensor([112.0, 96.0], **FLOAT64).view(1, 2, 1).expand(1, 2, d) / d
    return query, keys, normal(1, 2, 3)


def test_scores_112_and_96_over_8_weigh_088_and_012():
    query, keys, values = two_scores()
    assert_close(query @ keys.mT, torch.tensor([[[112.0, 96.0]]], **FLOAT64))
    context, weights = ScaledDotScore().attend(query, keys, values, return_weights=True)
    expected = torch.tensor([0.8807970780, 0.1192029220], **FLOAT64)  # softmax of 14 and 12
    assert_close(weights.flatten(), expected, rtol=0, atol=5e-11)
    assert_close(context[0, 0], 0.8807970780 * values[0, 0] + 0.1192029220 * values[0, 1], rtol=0, atol=1e-9)


def test_scores_112_and_96_unscaled_leave_nothing_of_the_second():
    _, weights = DotScore().attend(*two_scores(), return_weights=True)
    assert_close(weights[0, 0, 1].item(), math.exp(-16) / (1 + math.exp(-16)))  # 1.1e-7
    assert weights[0, 0, 0] > 1 - 2e-7


def test_variance_of_a_score_is_d_sigma4_plus_2_sigma2_mu2():
    d, sigma, samples = 16, 0.7, 400_000
    mu = normal(d)
    mu = mu * math.sqrt((9.071 - d * sigma**4) / (2 * sigma**2)) / mu.norm()  # so that the variance is 9.071
    products = ((mu + sigma * normal(samples, d, seed=1)) * (mu + sigma * normal(samples, d, seed=2))).sum(-1)
    variance = d * sigma**4 + 2 * sigma**2 * (mu @ mu).item()
    assert variance == pytest.approx(9.071)
    # The estimates' own standard deviations, of the mean exactly and of the variance by the samples' fourth moment.
    centred = products - products.mean()
    spread = math.sqrt((centred.pow(4).mean() - centred.var() ** 2).item() / samples)
    assert abs(products.mean().item() - (mu @ mu).item()) < 4 * math.sqrt(variance / samples)
    assert abs(products.var().item() - variance) < 4 * spread


def test_scaled_scores_keep_their_variance_and_unscaled_ones_saturate():
    """The derivative p (1 - p) of the largest weight dies with unscaled scores as d grows, and not with scaled ones."""
    kept = {}
    for d in (4, 64, 512):
        products = (normal(4000, d) * normal(4000, d, seed=1)).sum(-1)  # of pairs, each independent of the others
        assert products.var().item() == pytest.approx(d, rel=0.15)
        assert (products / math.sqrt(d)).var().item() == pytest.approx(1, rel=0.15)
        query, keys, values = normal(1, 200, d), normal(1, 32, d, seed=1), normal(1, 32, 2)
        for score in (DotScore(), ScaledDotScore()):
            _, weights = score.attend(query, keys, values, return_weights=True)
            largest = weights.amax(-1)
            kept[type(score), d] = (largest * (1 - largest)).mean().item()
    assert kept[DotScore, 512] < kept[DotScore, 64] < kept[DotScore, 4]
    assert kept[DotScore, 512] < 0.05 < 0.8 * kept[ScaledDotScore, 4] < kept[ScaledDotScore, 512]


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_matrix_form_is_the_loop_over_queries(backend):
    q, k, v = normal(5, 8), normal(7, 8, seed=1), normal(7, 3, seed=2)
    matrix = pyattn.attention(*(t[None, None] for t in (q, k, v)), scale=1.0, backend=backend)[0, 0]
    for i in range(5):
        exponentials = [math.exp(q[i] @ k[j]) for j in range(7)]
        row = sum(e * v[j] for j, e in enumerate(exponentials)) / sum(exponentials)
        assert_close(matrix[i], row)


def counted(q: Tensor, k: Tensor, v: Tensor, **options) -> int:
    with FlopCounterMode(display=False) as counter:
        pyattn.attention(q, k, v, **options)
    return counter.get_total_flops()


def test_operations_of_a_translation_are_m2_k_and_m_n_k_and_n2_k():
    """Of M words to N, in the encoder's, the cross and the decoder's attention: 2 M N (d + dv) each."""
    source, target, d, dv = 11, 7, 16, 24

    def states(n: int, size: int) -> Tensor:
        return torch.randn(1, 1, n, size)

    encoder = counted(states(source, d), states(source, d), states(source, dv))
    cross = counted(states(target, d), states(source, d), states(source, dv))
    decoder = counted(states(target, d), states(target, d), states(target, dv), causal=True)
    assert encoder == 2 * source * source * (d + dv)
    assert cross == 2 * target * source * (d + dv)
    assert decoder == 2 * target * target * (d + dv)  # what the mask hides is counted, as torch does


def test_operations_of_another_target_language_leave_the_encoder_out():
    source, d, lengths = 11, 16, (7, 9)
    memory = torch.randn(1, 1, source, d)
    encoder = counted(memory, memory, memory)
    others = []
    for n in lengths:
        target = torch.randn(1, 1, n, d)
        others.append(counted(target, target, target, causal=True) + counted(target, memory, memory))
    assert encoder == 4 * source**2 * d
    assert others == [4 * (n**2 + n * source) * d for n in lengths]


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_masked_rows_see_their_own_column_and_those_before(backend):
    """Column <= row, in the order of the decoder's words; one of the courses writes i <= j, where i is the key."""
    x = normal(1, 6, 4)
    _, weights = ScaledDotScore().attend(x, x, x, causal=True, return_weights=True, backend=backend)
    rows = torch.arange(6)
    assert ((weights[0] > 0) == (rows <= rows[:, None])).all()
    assert_close(weights.sum(-1), torch.ones(1, 6, **FLOAT64))


def test_additive_and_concat_are_one_score():
    query, memory, concat, weight = normal(2, 3, 4), normal(2, 5, 6, seed=1), normal(8, 10, seed=2), normal(8, seed=3)
    additive = AdditiveScore.from_concat(concat, weight, query_size=4)
    together = torch.cat([query.unsqueeze(2).expand(-1, -1, 5, -1), memory.unsqueeze(1).expand(-1, 3, -1, -1)], -1)
    weights = torch.softmax(torch.tanh(together @ concat.T) @ weight, -1)
    assert_close(additive.attend(query, additive.keys(memory), memory, backend="reference"), weights @ memory)


def test_cosine_score_does_not_change_with_the_lengths_of_the_states():
    query, memory, values = normal(2, 3, 4), normal(2, 5, 4, seed=1), normal(2, 5, 6, seed=2)
    score = CosineScore()
    expected = score.attend(query, score.keys(memory), values)
    lengths = torch.tensor([1e-3, 0.5, 1.0, 7.0, 1e3], **FLOAT64).view(1, 5, 1)
    assert_close(score.attend(20 * query, score.keys(lengths * memory), values), expected)


def test_general_score_is_a_product_after_projecting_either_side():
    query, memory = normal(2, 3, 4), normal(2, 5, 6, seed=1)
    score = GeneralScore(4, 6, **FLOAT64)
    weight, dot = score.key_projection.weight, DotScore()
    general = score.attend(query, score.keys(memory), memory)
    assert_close(general, dot.attend(query, memory @ weight.T, memory))
    assert_close(general, dot.attend(query @ weight, memory, memory))


def test_general_score_of_low_rank_has_the_weight_wq_t_wk():
    query, memory = normal(2, 3, 4), normal(2, 5, 6, seed=1)
    low, full = GeneralScore(4, 6, 2, **FLOAT64), GeneralScore(4, 6, **FLOAT64)
    with torch.no_grad():
        full.key_projection.weight.copy_(low.query_projection.weight.T @ low.key_projection.weight)
    assert_close(low(query, memory), full(query, memory))


@pytest.mark.parametrize(
    ("alpha", "count_end", "scores"),
    [(1, False, (-0.75, -0.80, -0.80)), (1, True, (-0.643, -0.640, -0.720)), (0, True, (-4.5, -3.2, -7.2))],
)
def test_sentence_that_is_picked_depends_on_whether_its_end_counts(alpha, count_end, scores):
    """By words the first is the best, as the course says; with the end counted, or without division, the second."""
    sentences = "he hit me with a pie", "he threw a pie", "I was hit with a pie that he threw"
    words = ["<end>", "<other>", *dict.fromkeys(" ".join(sentences).split())]
    texts = {
        (*map(words.index, sentence.split()), 0): math.exp(log_prob)
        for sentence, log_prob in zip(sentences, (-4.5, -3.2, -7.2), strict=True)
    }
    model = ToyDecoder.of_texts({**texts, (1,): 1 - sum(texts.values())}, len(words))
    (found,) = beam_search(
        model, torch.tensor([[0]]), 10, beams=3, normalize=by_length(alpha), count_end=count_end,
        rules=Rules(forbidden=(1,)), end=0,
    )  # fmt: skip
    by_sentence = {" ".join(words[token] for token in h.tokens): h for h in found}
    assert [by_sentence[s].score for s in sentences] == pytest.approx(scores, abs=5e-4)
    assert [by_sentence[s].log_prob for s in sentences] == pytest.approx([-4.5, -3.2, -7.2], abs=1e-5)
    assert next(iter(by_sentence)) == sentences[scores.index(max(scores))]


def test_greedy_search_finds_0275_and_two_paths_0405():
    """p(a) = 0.55 and p(b) = 0.45; the best token after a has 0.5, after b 0.9."""
    a, b = 0, 1
    model = ToyDecoder(lambda text: {(): [0.55, 0.45, 0], (a,): [0.5, 0.3, 0.2], (b,): [0.9, 0.06, 0.04]}[text])
    for paths, text, p in ((1, [a, a], 0.275), (2, [b, a], 0.405)):
        best = beam_search(model, torch.tensor([[0]]), 2, beams=paths, choices=paths)[0][0]
        assert best.tokens == text
        assert math.exp(best.log_prob) == pytest.approx(p)


def test_beam_search_as_wide_as_m_to_the_t_minus_1_is_exact():
    m, t = 3, 4
    for seed in range(5):
        p = normal(m**t, seed=seed).mul(2).softmax(0).tolist()
        texts = dict(zip(itertools.product(range(m), repeat=t), p, strict=True))
        best = sorted(texts, key=texts.__getitem__, reverse=True)[: m ** (t - 1)]
        model = ToyDecoder.of_texts(texts, m)
        (found,) = beam_search(model, torch.tensor([[0]]), t, beams=m ** (t - 1), choices=m ** (t - 1))
        assert [tuple(h.tokens) for h in found] == best
        assert [math.exp(h.log_prob) for h in found] == pytest.approx([texts[text] for text in best], rel=1e-5)


def test_sum_of_log_probabilities_outlives_the_product():
    products = torch.full((400,), 0.1).cumprod(0)
    assert products[44] > 0 and products[45] == 0  # float32 has nothing below 1.4e-45: 0 from step 46 on
    model = ToyDecoder(lambda text: [0.1] * 10)
    best = beam_search(model, torch.tensor([[0]]), 400, beams=2, choices=2)[0][0]
    assert len(best.tokens) == 400
    assert best.log_prob == pytest.approx(400 * math.log(0.1), rel=1e-6)


Weights = dict[str, Tensor]


def gru(w: Weights, names: str, x: Tensor, h: Tensor) -> Tensor:
    """One step, as torch's cell has it: the reset gate is behind the product."""
    of_x = w[names.format("weight_ih")] @ x + w[names.format("bias_ih")]
    of_h = w[names.format("weight_hh")] @ h + w[names.format("bias_hh")]
    (rx, zx, nx), (rh, zh, nh) = of_x.chunk(3), of_h.chunk(3)
    r, z = torch.sigmoid(rx + rh), torch.sigmoid(zx + zh)
    return (1 - z) * torch.tanh(nx + r * nh) + z * h


def read_both_ways(w: Weights, source: Tensor, hidden: int) -> tuple[list[Tensor], Tensor]:
    """h_j = [forward; backward] of each word, and the backward state at the first one."""
    embedded = w["source_embedding.weight"][source]
    forward = backward = torch.zeros(hidden, **FLOAT64)
    forwards, backwards = [], []
    for x, x_from_the_end in zip(embedded, embedded.flip(0), strict=True):
        forward = gru(w, "encoder.layers.{}_l0", x, forward)
        backward = gru(w, "encoder.layers.{}_l0_reverse", x_from_the_end, backward)
        forwards.append(forward)
        backwards.insert(0, backward)
    return [torch.cat(pair) for pair in zip(forwards, backwards, strict=True)], backward


def weighted(scores: list[Tensor], memory: list[Tensor]) -> Tensor:
    exponentials = [score.exp() for score in scores]
    return sum(e * h for e, h in zip(exponentials, memory, strict=True)) / sum(exponentials)


def bahdanau(w: Weights, source: Tensor, target: Tensor) -> list[Tensor]:
    """Logits of each step. Bahdanau et al. 2015, section 3 and appendix A: e_ij = v . tanh(W s_{i-1} + U h_j),
    s_i = f(s_{i-1}, y_{i-1}, c_i), and a maxout of U_o s_{i-1} + V_o E y_{i-1} + C_o c_i."""
    memory, first = read_both_ways(w, source, 4)
    s = torch.tanh(w["bridge.weight"] @ first + w["bridge.bias"])
    logits = []
    for y in w["target_embedding.weight"][target]:
        asked = w["score.query_projection.weight"] @ s
        scores = [w["score.weight"][0] @ torch.tanh(asked + w["score.key_projection.weight"] @ h) for h in memory]
        c = weighted(scores, memory)
        t = w["readout.linear.weight"] @ torch.cat([s, c, y]) + w["readout.linear.bias"]
        s = gru(w, "lower.layers.{}_l0", torch.cat([y, c]), s)
        logits.append(w["output.weight"] @ torch.maximum(t[0::2], t[1::2]) + w["output.bias"])
    return logits


def luong(w: Weights, source: Tensor, target: Tensor) -> list[Tensor]:
    """Logits of each step. Luong et al. 2015, equations 5 and 8 ("general"), and input feeding: the state of the step
    asks, and h~ = tanh(W [s; c]) is told to the next one."""
    memory, first = read_both_ways(w, source, 4)
    s = torch.tanh(w["bridge.weight"] @ first + w["bridge.bias"])
    fed = torch.zeros(len(w["readout.linear.bias"]), **FLOAT64)
    logits = []
    for y in w["target_embedding.weight"][target]:
        s = gru(w, "lower.layers.{}_l0", torch.cat([y, fed]), s)
        c = weighted([s @ w["score.key_projection.weight"] @ h for h in memory], memory)
        fed = torch.tanh(w["readout.linear.weight"] @ torch.cat([s, c]) + w["readout.linear.bias"])
        logits.append(w["output.weight"] @ fed + w["output.bias"])
    return logits


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize(
    ("equations", "form"),
    [
        (bahdanau, {"order": "bahdanau", "score": "additive", "score_size": 7, "readout": "maxout", "feed": False}),
        (luong, {"order": "luong", "score": "general", "readout": "tanh", "feed": True}),
    ],
)
def test_seq2seq_computes_the_equations_of_the_paper(equations, form, backend):
    config = Seq2SeqConfig(
        vocab=9, layers=1, width=3, hidden=5, encoder_hidden=4, cell="gru", bridge="backward", readout_size=6, **form
    )
    model = Seq2Seq(config).double()
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            p.copy_(normal(*p.shape, seed=i))
    source, target = torch.tensor([3, 4, 8, 5]), torch.tensor([1, 7, 6])
    parameters = dict(model.named_parameters())
    expected = torch.stack(equations(parameters, source, target))
    d_logits = normal(3, 9, seed=99)
    with pyattn.use_backend(backend):
        logits = model(source[None], target[None])[0]
        assert_close(logits, expected)
        found = torch.autograd.grad(logits, list(parameters.values()), d_logits)
    d_expected = torch.autograd.grad(expected, list(parameters.values()), d_logits)
    for name, ours, d in zip(parameters, found, d_expected, strict=True):
        assert_close(ours, d, msg=lambda text, name=name: f"d_{name}: {text}")
