"""Greedy, sampled and beam-searched texts, held against transformers' `generate` and against exhaustive search."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from toy_decoder import ToyDecoder

import pyattn
from pyattn.decoding.beam import Hypothesis, beam_search, by_length, gnmt
from pyattn.decoding.protocol import pad_batch
from pyattn.decoding.rules import Rules, history_of
from pyattn.decoding.sampling import GREEDY, Sampling, generate, stream
from pyattn.models.gpt import GPT, GPTConfig

END = 5


pytestmark = pytest.mark.usefixtures("one_thread")


def _gpt(vocab: int = 61, context: int = 64, attention: str = "pyattn", seed: int = 0) -> GPT:
    torch.manual_seed(seed)
    model = GPT(GPTConfig(vocab=vocab, context=context, layers=2, heads=4, width=32, attention=attention))
    with torch.no_grad():
        for parameter in model.parameters():  # larger than at the start, so that texts are not all alike
            parameter.add_(torch.randn_like(parameter) * 0.25)
    return model.eval()


def _peer(model: GPT, folder: object) -> torch.nn.Module:
    transformers = pytest.importorskip("transformers")
    model.save_pretrained(folder)  # type: ignore[arg-type]
    return transformers.GPT2LMHeadModel.from_pretrained(folder, attn_implementation="eager").eval()


def _prompts(b: int, m: int, vocab: int = 61, seed: int = 0) -> Tensor:
    return torch.randint(6, vocab, (b, m), generator=torch.Generator().manual_seed(seed))


def _transformers_texts(peer: torch.nn.Module, prompt: Tensor, count: int, **options: object) -> list[list[int]]:
    """What `generate` of transformers appends to each prompt, up to the end token. Prompts one by one, unpadded."""
    texts = []
    for row in prompt:
        out = peer.generate(
            row[None], max_new_tokens=count, eos_token_id=END, pad_token_id=0, bos_token_id=None, do_sample=False,
            attention_mask=torch.ones_like(row[None]), **options,
        )  # fmt: skip
        for text in out[:, len(row) :].tolist():
            texts.append(text[: text.index(END)] if END in text else text)
    return texts


RULES = {
    "none": (Rules(), {}),
    "penalty": (Rules(repetition_penalty=1.7), {"repetition_penalty": 1.7}),
    "ngrams": (Rules(no_repeat_ngram=2), {"no_repeat_ngram_size": 2}),
    "minimum": (Rules(min_tokens=9), {"min_new_tokens": 9}),
    "forbidden": (Rules(forbidden=(7, 8, 9, 10)), {"suppress_tokens": [7, 8, 9, 10]}),
}


@pytest.mark.parametrize("rules", RULES)
def test_greedy_equals_transformers(tmp_path: object, rules: str) -> None:
    model, prompt = _gpt(), _prompts(6, 7)
    ours, theirs = RULES[rules]
    expected = _transformers_texts(_peer(model, tmp_path), prompt, 24, **theirs)
    assert generate(model, prompt, 24, rules=ours, end=END) == expected
    assert any(len(text) < 24 for text in expected) or rules == "minimum"


@pytest.mark.parametrize("rules", RULES)
@pytest.mark.parametrize("alpha", [0.0, 1.0, 2.0])
@pytest.mark.parametrize("beams", [2, 4])
def test_beam_search_equals_transformers(tmp_path: object, beams: int, alpha: float, rules: str) -> None:
    model, prompt = _gpt(), _prompts(4, 7)
    ours, theirs = RULES[rules]
    for early_stopping in ("never", True, False):
        expected = _transformers_texts(
            _peer(model, tmp_path), prompt, 16, num_beams=beams, num_return_sequences=beams, length_penalty=alpha,
            early_stopping=early_stopping, **theirs,
        )  # fmt: skip
        found = beam_search(
            model, prompt, 16, beams=beams, normalize=by_length(alpha), rules=ours, end=END,
            early_stopping=early_stopping,
        )  # fmt: skip
        assert [hypothesis.tokens for best in found for hypothesis in best] == expected, early_stopping


def test_beam_search_of_one_beam_is_greedy() -> None:
    model, prompt = _gpt(), _prompts(6, 7)
    found = beam_search(model, prompt, 24, beams=1, end=END, early_stopping=True)
    assert [best[0].tokens for best in found] == generate(model, prompt, 24, end=END)
    assert all(len(best) == 1 for best in found)


@torch.no_grad()
def _all_continuations(model: GPT, prompt: list[int], count: int, vocab: int, end: int) -> list[Hypothesis]:
    """Every text of at most `count` tokens with its exact log-probability, best first when divided by its length."""
    found = []
    for length in range(1, count + 1):
        for text in itertools.product(range(vocab), repeat=length):
            if end in text[:-1] or (length < count and text[-1] != end):
                continue
            log_p = model(torch.tensor([prompt + list(text)]))[0].log_softmax(-1)
            log_prob = sum(float(log_p[len(prompt) - 1 + i, token]) for i, token in enumerate(text))
            tokens = list(text[:-1]) if text[-1] == end else list(text)
            found.append(Hypothesis(log_prob / length, log_prob, tokens))
    return sorted(found, reverse=True)


def test_wide_beam_search_equals_exhaustive_search() -> None:
    model, prompt = _gpt(vocab=4, context=16), torch.tensor([[1, 2, 3], [2, 2, 1]])
    found = beam_search(model, prompt, 4, beams=150, end=0)
    for row, best in zip(prompt.tolist(), found, strict=True):
        expected = _all_continuations(model, row, 4, vocab=4, end=0)[:150]
        assert [h.tokens for h in best] == [h.tokens for h in expected]
        for ours, exact in zip(best, expected, strict=True):
            assert ours.log_prob == pytest.approx(exact.log_prob, abs=1e-5)
            assert ours.score == pytest.approx(exact.score, abs=1e-5)


def test_narrow_beam_search_may_miss_the_best_text() -> None:
    """Otherwise the test above could not tell a beam search from an exhaustive one."""
    misses = 0
    for seed in range(12):
        model = _gpt(vocab=4, context=16, seed=seed)
        best = beam_search(model, torch.tensor([[1, 2, 3]]), 4, beams=1, end=0)[0][0]
        misses += best.tokens != _all_continuations(model, [1, 2, 3], 4, vocab=4, end=0)[0].tokens
    assert misses


def _random_texts(vocab: int, count: int, seed: int) -> dict[tuple[int, ...], float]:
    """Every text of `count` tokens, or fewer up to its end token 0, and its probability."""
    texts = [
        text
        for length in range(1, count + 1)
        for text in itertools.product(range(vocab), repeat=length)
        if 0 not in text[:-1] and (length == count or text[-1] == 0)
    ]
    noise = torch.randn(len(texts), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    weights = [math.exp(2 * x) / vocab ** len(text) for text, x in zip(texts, noise.tolist(), strict=True)]
    return {text: weight / sum(weights) for text, weight in zip(texts, weights, strict=True)}


def _best(
    texts: dict[tuple[int, ...], float], normalize: Callable[[int], float], count_end: bool
) -> list[tuple[float, float, list[int]]]:
    """Score, log-probability and tokens of texts that 0 ends, best first."""
    found = []
    for text, p in texts.items():
        words = [token for token in text if token != 0]
        length = len(text) if count_end else max(1, len(words))
        found.append((math.log(p) / normalize(length), math.log(p), words))
    return sorted(found, reverse=True)


def _assert_equal(found: list[Hypothesis], expected: list[tuple[float, float, list[int]]]) -> None:
    assert [h.tokens for h in found] == [tokens for _, _, tokens in expected]
    assert [h.score for h in found] == pytest.approx([score for score, _, _ in expected], rel=1e-5)
    assert [h.log_prob for h in found] == pytest.approx([log_prob for _, log_prob, _ in expected], rel=1e-5)


NORMALIZE = {"by_length(0)": by_length(0), "by_length(1)": by_length(1), "by_length(-1)": by_length(-1), "gnmt": gnmt()}
ONE = torch.tensor([[1]])


@pytest.mark.parametrize("count_end", [True, False])
@pytest.mark.parametrize("normalize", NORMALIZE)
@pytest.mark.parametrize(("vocab", "count"), [(5, 1), (4, 2), (5, 3), (3, 4), (4, 4)])
def test_all_choices_and_enough_beams_find_the_best_of_all_texts(
    vocab: int, count: int, normalize: str, count_end: bool
) -> None:
    for seed in range(4):
        texts = _random_texts(vocab, count, seed)
        expected = _best(texts, NORMALIZE[normalize], count_end)
        model = ToyDecoder.of_texts(texts, vocab)
        for beams in ((vocab - 1) ** (count - 1), vocab ** (count - 1), vocab**count):
            (found,) = beam_search(
                model, ONE, count, beams=beams, choices=vocab, normalize=NORMALIZE[normalize], count_end=count_end,
                end=0,
            )  # fmt: skip
            _assert_equal(found, expected[:beams])


@pytest.mark.parametrize("count_end", [True, False])
@pytest.mark.parametrize("normalize", NORMALIZE)
def test_search_that_never_stops_early_loses_nothing_by_stopping(normalize: str, count_end: bool) -> None:
    """Held against the same search up to its count, which waits for more ended texts than there are."""
    saved = 0
    for seed, beams, choices in itertools.product(range(8), (1, 2, 4), (None, 2, 4)):
        model = ToyDecoder.of_texts(_random_texts(4, 5, seed), 4)
        options = {"beams": beams, "choices": choices, "normalize": NORMALIZE[normalize], "count_end": count_end}
        (found,) = beam_search(model, ONE, 5, end=0, early_stopping="never", **options)
        saved += 4 - model.steps
        (whole,) = beam_search(model, ONE, 5, end=0, finished=1000, **options)
        assert found == whole[:beams], (seed, beams, choices)
    assert saved > 0


def test_search_waits_for_a_text_that_the_rules_end_at_its_present_length() -> None:
    model = ToyDecoder(lambda text: [0.0, 0.0, 1.0] if text else [0.3, 0.2, 0.5])
    (found,) = beam_search(
        model, ONE, 4, beams=1, choices=3, normalize=by_length(-1), rules=Rules(no_repeat_ngram=1), end=0
    )
    _assert_equal(found, [(math.log(0.5), math.log(0.5), [2])])


def _within_two(model: ToyDecoder, text: tuple[int, ...]) -> bool:
    """Whether each token is one of the two most probable ones at its place."""
    tables = [model.probabilities(text[:i]) for i in range(len(text))]
    return all(p[token] >= sorted(p)[-2] for p, token in zip(tables, text, strict=True))


def test_few_choices_lose_the_texts_with_a_less_probable_token() -> None:
    """However many beams there are."""
    misses = 0
    for seed in range(8):
        texts = _random_texts(4, 4, seed)
        model = ToyDecoder.of_texts(texts, 4)
        kept = {text: p for text, p in texts.items() if _within_two(model, text)}
        (found,) = beam_search(model, ONE, 4, beams=256, choices=2, end=0)
        _assert_equal(found, _best(kept, by_length(), count_end=True))
        misses += found[0].tokens != _best(texts, by_length(), count_end=True)[0][2]
    assert misses


def test_one_choice_and_one_beam_are_greedy() -> None:
    model, prompt = _gpt(), _prompts(6, 7)
    for options in ({}, {"finished": 1}, {"count_end": False}):
        found = beam_search(model, prompt, 24, beams=1, choices=1, end=END, **options)
        assert [[h.tokens for h in best] for best in found] == [[text] for text in generate(model, prompt, 24, end=END)]


def test_text_that_ends_is_saved_at_any_rank_if_it_is_among_the_choices() -> None:
    model = ToyDecoder(lambda text: [0.2, 0.5, 0.3])
    for choices, expected in ((3, [[1, 1], [1], []]), (2, [[1, 1]]), (None, [[1, 1]])):
        (found,) = beam_search(model, ONE, 2, beams=1, choices=choices, end=0, finished=10)
        assert [h.tokens for h in found] == expected


def test_search_ends_when_enough_texts_have() -> None:
    model = ToyDecoder(lambda text: [0.2, 0.5, 0.3])
    steps = []
    for finished in (1, 3, 4):
        model.steps = 0
        (found,) = beam_search(model, ONE, 5, beams=1, choices=3, finished=finished, end=0)
        assert [len(h.tokens) for h in found] == list(range(finished))[::-1]
        steps.append(model.steps)
    assert steps == [0, 2, 3]
    (found,) = beam_search(model, ONE, 5, beams=2, choices=3, finished=2, normalize=by_length(0), end=0)
    assert [h.tokens for h in found] == [[], [1]]  # and not [2], which ended when [1] did


def test_prompts_end_their_searches_apart() -> None:
    model, prompt = _gpt(), _prompts(5, 7)
    options = {"beams": 3, "choices": 5, "finished": 2, "count_end": False, "end": END}
    found = beam_search(model, prompt, 24, **options)
    for row, best in zip(prompt, found, strict=True):
        (alone,) = beam_search(model, row[None], 24, **options)
        assert [h.tokens for h in best] == [h.tokens for h in alone] and len(best) == 2
    assert len({max(len(h.tokens) for h in best) for best in found}) > 1


def test_text_of_nothing_but_the_end_has_length_1() -> None:
    model = ToyDecoder(lambda text: [0.4, 0.6])
    for count_end in (True, False):
        (found,) = beam_search(model, ONE, 3, beams=1, choices=2, finished=1, count_end=count_end, end=0)
        _assert_equal(found, [(math.log(0.4), math.log(0.4), [])])


@pytest.mark.parametrize("attention", ["pyattn", "torch"])
def test_unequal_prompts_decode_as_each_alone(attention: str) -> None:
    model = _gpt(attention=attention)
    texts = [_prompts(1, length, seed=length)[0].tolist() for length in (3, 17, 1, 9, 12)]
    prompt, lengths = pad_batch(texts)
    end = generate(model, prompt, 30, lengths=lengths)[1][11]
    greedy = generate(model, prompt, 30, lengths=lengths, end=end)
    found = beam_search(model, prompt, 30, beams=3, lengths=lengths, end=end)
    for i, text in enumerate(texts):
        alone = torch.tensor([text])
        assert generate(model, alone, 30, end=end) == [greedy[i]]
        best = beam_search(model, alone, 30, beams=3, end=end)[0]
        assert [h.tokens for h in best] == [h.tokens for h in found[i]]
        assert [h.score for h in best] == pytest.approx([h.score for h in found[i]], abs=1e-5)
    assert len({len(text) for text in greedy}) > 1


def test_scores_are_the_model_s_log_probabilities() -> None:
    model, prompt = _gpt(), _prompts(2, 7)
    for normalize, divisor in ((by_length(0.7), lambda n: n**0.7), (gnmt(0.6), lambda n: ((5 + n) / 6) ** 0.6)):
        for row, best in zip(
            prompt.tolist(), beam_search(model, prompt, 20, normalize=normalize, end=END), strict=True
        ):
            assert len(best) == 4
            assert [h.score for h in best] == sorted((h.score for h in best), reverse=True)
            for h in best:
                text = h.tokens + [END] * (len(h.tokens) < 20)
                with torch.no_grad():
                    log_p = model(torch.tensor([row + text]))[0].log_softmax(-1)[len(row) - 1 :]
                log_prob = sum(float(log_p[i, token]) for i, token in enumerate(text))
                assert h.log_prob == pytest.approx(log_prob, abs=1e-4)
                assert h.score == pytest.approx(log_prob / divisor(len(text)), abs=1e-4)


def test_each_prompt_has_its_own_limit() -> None:
    model, prompt = _gpt(), _prompts(3, 7)
    found = beam_search(model, prompt, [3, 20, 1])
    assert [max(len(h.tokens) for h in best) for best in found] == [3, 20, 1]
    for row, count, best in zip(prompt, (3, 20, 1), found, strict=True):
        assert [h.tokens for h in best] == [h.tokens for h in beam_search(model, row[None], count)[0]]


def test_each_prompt_fills_the_context_with_its_own_continuation() -> None:
    model = _gpt(context=48)
    texts = [_prompts(1, length, seed=length)[0].tolist() for length in (40, 3)]
    prompt, lengths = pad_batch(texts)
    found = beam_search(model, prompt, [9, 46], beams=3, lengths=lengths)
    for text, count, best in zip(texts, (9, 46), found, strict=True):
        alone = beam_search(model, torch.tensor([text]), count, beams=3)[0]
        assert [h.tokens for h in best] == [h.tokens for h in alone]
    with pytest.raises(pyattn.RangeError, match="context=48, got 3 and 46 tokens"):
        beam_search(model, prompt, [9, 47], beams=3, lengths=lengths)


def test_beams_share_the_pages_of_their_prompt() -> None:
    model, prompt = _gpt(), _prompts(2, 40)
    with torch.no_grad():
        _, state = model.prefill(prompt, count=20, page=8)
        state.reorder([0, 0, 0, 0, 1, 1, 1, 1])
        model.step(torch.zeros(8, dtype=torch.long), state)
    table = state.cache.table
    assert all(table[row][:5] == table[0][:5] for row in range(4))
    assert len({row[5] for row in table}) == 8  # where each writes is its own
    stored = len({page for row in table for page in row})
    assert stored == 2 * 5 + 8


def test_generate_beyond_the_context_goes_on_from_its_last_half() -> None:
    model, prompt = _gpt(context=48), _prompts(2, 60)
    (first, second) = generate(model, prompt, 80)
    assert len(first) == len(second) == 80
    with torch.no_grad():
        assert first[0] == int(model(prompt[:1, -48:])[0, -1].argmax())
        text = prompt[0].tolist() + first
        assert first[1] == int(model(torch.tensor([text[61 - 24 : 61]]))[0, -1].argmax())


def test_text_with_room_is_not_cut_because_another_is_full() -> None:
    model = _gpt(context=16)
    texts = [_prompts(1, length, seed=length)[0].tolist() for length in (10, 14, 3)]
    prompt, lengths = pad_batch(texts)
    together = generate(model, prompt, 30, lengths=lengths)
    assert together == [generate(model, torch.tensor([text]), 30)[0] for text in texts]


def test_rules_that_leave_nothing_end_the_text() -> None:
    model, prompt = _gpt(vocab=12), torch.tensor([[6, 7, 8]])
    rules = Rules(no_repeat_ngram=1)
    for sampling in (GREEDY, Sampling()):
        (text,) = generate(model, prompt, 30, rules=rules, sampling=sampling)
        assert len(text) == 9 and len({6, 7, 8, *text}) == 12
    best = beam_search(model, prompt, 30, rules=rules)[0]
    assert best and all(len(h.tokens) == 9 and len({6, 7, 8, *h.tokens}) == 12 for h in best)


def test_logits_that_are_nan_are_an_error() -> None:
    model = _gpt()
    with torch.no_grad():
        model.wte.weight[3] = torch.nan
    for run in (generate, beam_search):
        with pytest.raises(pyattn.RangeError, match="logits: expected numbers, got NaN"):
            run(model, _prompts(2, 3), 3)


def test_stream_yields_what_generate_returns() -> None:
    model, prompt = _gpt(), _prompts(5, 7)
    texts = generate(model, prompt, 24, end=END)
    steps = list(stream(model, prompt, 24, end=END))
    assert [[token for token in column if token is not None] for column in zip(*steps, strict=True)] == texts
    for column in zip(*steps, strict=True):
        assert None not in column[: sum(token is not None for token in column)]  # nothing after the end
    assert len(next(iter(stream(model, prompt, 24)))) == 5


def test_same_generator_seed_gives_the_same_text() -> None:
    model, prompt, how = _gpt(), _prompts(2, 5), Sampling(temperature=0.9, top_k=20, top_p=0.9, min_p=0.01)
    runs = [
        generate(model, prompt, 20, sampling=how, generator=torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)
    ]
    assert runs[0] == runs[1] != runs[2]


@pytest.mark.parametrize(
    ("options", "allowed"),
    [
        ({"top_k": 2}, {1, 3}),
        ({"top_k": 1}, {3}),
        ({"top_p": 0.5}, {3}),
        ({"top_p": 0.6}, {1, 3}),
        ({"top_p": 1.0}, {0, 1, 2, 3}),
        ({"top_k": 3, "top_p": 0.6}, {1, 3}),
        ({"min_p": 0.0}, {0, 1, 2, 3}),
        ({"min_p": 0.3}, {1, 3}),
        ({"min_p": 1.0}, {3}),
        ({}, {0, 1, 2, 3}),
    ],
)
def test_draw_takes_allowed_tokens_only(options: dict[str, float], allowed: set[int]) -> None:
    logits = torch.tensor([0.1, 0.25, 0.1, 0.55]).log().expand(2000, 4)
    drawn = Sampling(**options).draw(logits, torch.Generator().manual_seed(0))
    assert set(drawn.tolist()) == allowed


def test_draw_temperature_sharpens_the_distribution() -> None:
    logits = torch.tensor([0.5, 0.3, 0.2]).log().expand(20000, 3)
    drawn = Sampling(temperature=0.5).draw(logits, torch.Generator().manual_seed(0))
    expected = torch.tensor([0.25, 0.09, 0.04]) / 0.38
    torch.testing.assert_close(drawn.bincount() / 20000, expected, atol=0.02, rtol=0)


@pytest.mark.parametrize("options", [{"top_k": 3}, {"top_p": 0.7}, {"min_p": 0.2}, {"top_k": 9, "top_p": 0.9}])
def test_draw_has_the_distribution_of_transformers_warpers(options: dict[str, float]) -> None:
    warpers = pytest.importorskip("transformers").generation.logits_process
    scores = torch.randn(1, 12, generator=torch.Generator().manual_seed(0)) * 2
    kinds = {"top_k": warpers.TopKLogitsWarper, "top_p": warpers.TopPLogitsWarper, "min_p": warpers.MinPLogitsWarper}
    expected = warpers.TemperatureLogitsWarper(1.3)(None, scores)
    for name, value in options.items():
        expected = kinds[name](value)(None, expected)
    drawn = Sampling(temperature=1.3, **options).draw(scores.expand(40000, -1), torch.Generator().manual_seed(0))
    torch.testing.assert_close(drawn.bincount(minlength=12) / 40000, expected.softmax(-1)[0], atol=0.01, rtol=0)


def test_rules_on_texts_of_unequal_length() -> None:
    history = history_of([[3, 4, 3], [4]], torch.device("cpu"))
    scores = Rules(no_repeat_ngram=2)(torch.zeros(2, 6), history, 0, None)
    assert scores.isneginf().nonzero().tolist() == [[0, 4]]
    scores = Rules(repetition_penalty=2.0)(torch.tensor([[1.0, -1.0] * 3] * 2), history, 0, None)
    assert scores.tolist() == [[1.0, -1.0, 1.0, -2.0, 0.5, -1.0], [1.0, -1.0, 1.0, -1.0, 0.5, -1.0]]
    scores = Rules(no_repeat_ngram=1)(torch.zeros(2, 6), history, 0, None)
    assert scores.isneginf().nonzero().tolist() == [[0, 3], [0, 4], [1, 4]]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda m: generate(m, torch.zeros(2, 0, dtype=torch.long), 3), "prompt: expected"),
        (lambda m: generate(m, torch.zeros(3, dtype=torch.long), 3), "prompt: expected"),
        (lambda m: generate(m, _prompts(2, 3), 3, lengths=torch.tensor([3, 4])), "lengths: expected 1 to 3"),
        (lambda m: generate(m, _prompts(2, 3), 3, lengths=torch.tensor([3, 0])), "lengths: expected 1 to 3"),
        (lambda m: generate(m, _prompts(2, 3), 3, lengths=torch.tensor([3])), r"lengths: expected \[2\]"),
        (lambda m: beam_search(m, _prompts(2, 3), 0), "count: expected at least 1"),
        (lambda m: beam_search(m, _prompts(2, 3), [3]), "count: expected one number, or 2, got 1"),
        (lambda m: beam_search(m, _prompts(2, 3), 3, beams=0), "beams: expected at least 1"),
        (lambda m: beam_search(m, _prompts(2, 3), 3, choices=0), "choices: expected at least 1, got 0"),
        (lambda m: beam_search(m, _prompts(2, 3), 3, finished=-1), "finished: expected at least 1, got -1"),
        (
            lambda m: beam_search(m, _prompts(2, 3), 3, finished=2, early_stopping=True),
            "finished: expected None with early_stopping=True, got 2",
        ),
        (lambda m: beam_search(m, _prompts(2, 3), 3, early_stopping="always"), "early_stopping: expected True"),
        (lambda m: beam_search(m, _prompts(2, 60), 9), "count: expected prompt and count within context=64"),
        (
            lambda m: generate(m, _prompts(2, 3), 3, rules=Rules(forbidden=(61,))),
            r"rules: expected tokens in \[0, 61\)",
        ),
        (lambda m: m.prefill(_prompts(2, 3), torch.tensor([0, 3]), count=1), "lengths: expected 1 to 3"),
        (lambda m: by_length(math.nan), "alpha: expected a number from -10 to 10"),
        (lambda m: gnmt(11), "alpha: expected a number from -10 to 10"),
        (lambda m: Sampling(temperature=-1), "temperature"),
        (lambda m: Sampling(temperature=math.nan), "temperature"),
        (lambda m: Sampling(top_k=0), "top_k"),
        (lambda m: Sampling(top_p=0.0), "top_p"),
        (lambda m: Sampling(top_p=1.5), "top_p"),
        (lambda m: Sampling(min_p=-0.1), "min_p"),
        (lambda m: Rules(repetition_penalty=0.0), "repetition_penalty"),
        (lambda m: Rules(no_repeat_ngram=-1), "no_repeat_ngram"),
        (lambda m: Rules(min_tokens=-1), "min_tokens"),
    ],
)
def test_bad_argument_is_named(make: object, message: str) -> None:
    with pytest.raises(pyattn.RangeError, match=message):
        make(_gpt())  # type: ignore[operator]


def test_nothing_asked_for_gives_nothing() -> None:
    assert generate(_gpt(), _prompts(2, 3), 0, sampling=GREEDY) == [[], []]
    assert generate(_gpt(), _prompts(0, 3), 4) == []
    assert beam_search(_gpt(), _prompts(0, 3), 4) == []


def test_no_token_allowed_ends_the_search() -> None:
    assert beam_search(_gpt(), _prompts(1, 3), 4, rules=Rules(forbidden=tuple(range(61)))) == [[]]
