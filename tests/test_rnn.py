"""Recurrent language models and heads: held against float64 loops, and reading step by step against reading at once."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F
from torch.testing import assert_close

import pyattn
from pyattn.decoding.beam import beam_search
from pyattn.decoding.sampling import generate
from pyattn.models.pretrained import PretrainedError
from pyattn.models.rnn import RNNLM, RNNConfig, RNNForSequenceClassification, RNNForTokenClassification
from pyattn.nn.recurrent import CELLS

SIZES = {"vocab": 23, "width": 6, "hidden": 8, "layers": 2}
CONDITIONS = [{}, {"condition": 3, "condition_use": "state"}, {"condition": 3, "condition_use": "input"}]
HEADS = [RNNForTokenClassification, RNNForSequenceClassification]

pytestmark = pytest.mark.usefixtures("one_thread")


def _tokens(b: int, m: int, seed: int = 0) -> Tensor:
    return torch.randint(0, SIZES["vocab"], (b, m), generator=torch.Generator().manual_seed(seed))


def _model(kind: type = RNNLM, **options: object) -> Any:
    torch.manual_seed(0)
    model = kind(RNNConfig(**(SIZES | options)))  # type: ignore[arg-type]
    with torch.no_grad():
        for parameter in model.parameters():  # larger than at the start, so that every part shows in the logits
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return model.double().eval()


def _condition(model: RNNLM, rows: int) -> Tensor | None:
    """A condition for a model that has one."""
    size = model.config.condition
    generator = torch.Generator().manual_seed(7)
    return None if size is None else torch.randn(rows, size, generator=generator, dtype=torch.float64)


def _loop(model: RNNLM, tokens: list[int], condition: Tensor | None) -> Tensor:
    """The logits [m, vocab] of one text, by the formulas, step by step."""
    config = model.config
    state = model.recurrent.initial(1, model.embedding.weight)
    if condition is not None and config.condition_use == "state":
        state = torch.tanh(model.start.weight @ condition + model.start.bias).view(-1, config.layers, 1, config.hidden)
    earlier: list[Tensor] = []
    logits = []
    for token in tokens:
        x = model.embedding.weight[token]
        if condition is not None and config.condition_use == "input":
            x = torch.cat([x, condition])
        out, state = model.recurrent.step(x[None], state)
        h = out[0]
        if config.self_attention:
            context = torch.zeros_like(h)
            if earlier:
                weights = torch.stack([h @ old for old in earlier]).div(math.sqrt(config.hidden)).softmax(0)
                context = sum(weight * old for weight, old in zip(weights, earlier, strict=True))
            earlier.append(h)
            h = torch.tanh(model.self_attention.join.weight @ torch.cat([h, context]))
        last = model.embedding.weight if config.tied else model.readout.weight
        logits.append(last @ h + model.readout.bias)
    return torch.stack(logits)


@pytest.mark.parametrize("options", [*CONDITIONS, {"tied": True, "width": 8}], ids=str)
@pytest.mark.parametrize("self_attention", [False, True])
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("cell", CELLS)
def test_rnn_logits_and_gradients_equal_a_loop(cell: str, norm: bool, self_attention: bool, options: dict) -> None:
    model = _model(cell=cell, norm=norm, self_attention=self_attention, **options)
    tokens, condition = _tokens(2, 5), _condition(model, 2)
    logits = model(tokens, condition)
    expected = torch.stack([
        _loop(model, row.tolist(), None if condition is None else condition[i]) for i, row in enumerate(tokens)
    ])  # fmt: skip
    assert_close(logits, expected, atol=1e-12, rtol=0)
    found, wanted = (
        torch.autograd.grad(F.cross_entropy(result.flatten(0, 1), _tokens(2, 5, seed=1).flatten()), model.parameters())
        for result in (logits, expected)
    )
    assert_close(found, wanted, atol=1e-12, rtol=0)


def test_rnn_self_attention_equals_a_loop_on_every_attention(attention: str) -> None:
    model = _model(self_attention=True, attention=attention)
    tokens = _tokens(3, 9)
    assert_close(model(tokens), torch.stack([_loop(model, row, None) for row in tokens.tolist()]), atol=1e-12, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("options", CONDITIONS, ids=str)
@pytest.mark.parametrize("self_attention", [False, True])
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("cell", CELLS)
def test_rnn_step_by_step_equals_the_whole(cell: str, norm: bool, self_attention: bool, options: dict) -> None:
    """Unequal prompts, one of a single token, then rows that multiply, change places and go."""
    model = _model(cell=cell, norm=norm, self_attention=self_attention, **options)
    orders = {0: [0, 0, 1, 1, 1, 2], 4: [5, 3, 3, 0, 1, 0], 5: [1, 0, 2, 4, 3, 5], 9: [0, 2, 5]}
    tokens, lengths, condition = _tokens(3, 10), torch.tensor([4, 10, 1]), _condition(model, 3)
    logits, state = model.prefill(tokens, lengths, count=12, condition=condition)
    texts = [row[:length].tolist() for row, length in zip(tokens, lengths, strict=True)]
    assert state.read == texts
    for step in range(12):
        for row, text in enumerate(texts):
            whole = model(torch.tensor([text]), None if condition is None else condition[row : row + 1])
            assert_close(logits[row], whole[0, -1], atol=1e-12, rtol=0)
        if step in orders:
            state.reorder(orders[step])
            texts = [list(texts[row]) for row in orders[step]]
            condition = None if condition is None else condition[orders[step]]
        new = _tokens(1, len(texts), seed=step)[0]
        for text, token in zip(texts, new.tolist(), strict=True):
            text.append(token)
        logits = model.step(new, state)


@torch.no_grad()
@pytest.mark.parametrize("page", [None, 1, 4])
@pytest.mark.parametrize("lengths", [[1, 1], [6, 6], [1, 6], [6, 1]])
def test_rnn_self_attention_steps_equal_the_whole(attention: str, lengths: list[int], page: int | None) -> None:
    model, tokens = _model(self_attention=True, attention=attention), _tokens(2, 6)
    logits, state = model.prefill(tokens, torch.tensor(lengths), count=[3, 3], page=page)
    texts = [row[:length] for row, length in zip(tokens.tolist(), lengths, strict=True)]
    for step in range(4):
        assert_close(logits, torch.stack([model(torch.tensor([text]))[0, -1] for text in texts]), atol=1e-12, rtol=0)
        if step < 3:
            state.reorder([1, 0])
            texts = [[*texts[1], step], [*texts[0], 5]]
            logits = model.step(torch.tensor([step, 5]), state)


@pytest.mark.parametrize("self_attention", [False, True])
@pytest.mark.parametrize("options", CONDITIONS, ids=str)
def test_rnn_later_token_changes_nothing_before(options: dict, self_attention: bool) -> None:
    model, tokens = _model(self_attention=self_attention, **options), _tokens(1, 8)
    before = model(tokens, _condition(model, 1))
    changed = tokens.clone()
    changed[0, 5] = (tokens[0, 5] + 1) % SIZES["vocab"]
    after = model(changed, _condition(model, 1))
    assert torch.equal(before[:, :5], after[:, :5])
    assert all(not torch.equal(before[:, i], after[:, i]) for i in (5, 6, 7))


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("options", CONDITIONS, ids=str)
def test_rnn_segments_with_their_state_equal_the_whole(cell: str, options: dict) -> None:
    model, tokens = _model(cell=cell, **options), _tokens(3, 10)
    condition = _condition(model, 3)
    beside = condition if options.get("condition_use") == "input" else None
    first, middle = model(tokens[:, :4], beside, state=model.initial(3, condition))
    second, last = model(tokens[:, 4:], beside, state=middle)
    assert_close(torch.cat([first, second], 1), model(tokens, condition), atol=1e-13, rtol=0)
    assert last.shape == (2 if cell == "lstm" else 1, 2, 3, SIZES["hidden"]) and last.dtype is torch.float64
    rows = model(tokens[[2, 0], 4:], None if beside is None else beside[[2, 0]], state=middle[:, :, [2, 0]])
    assert_close(rows[0], second[[2, 0]], atol=1e-13, rtol=0)


def test_rnn_self_attention_looks_at_its_segment_alone() -> None:
    model, tokens = _model(self_attention=True), _tokens(2, 6)
    _, middle = model(tokens[:, :3], state=model.initial(2))
    assert not torch.allclose(model(tokens[:, 3:], state=middle)[0], model(tokens)[:, 3:])
    plain = _model()
    plain.load_state_dict(model.state_dict(), strict=False)
    _, expected = plain(tokens[:, :3], state=plain.initial(2))
    assert torch.equal(middle, expected)


@pytest.mark.parametrize("options", CONDITIONS[1:], ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_rnn_gradients_flow_to_the_condition(cell: str, options: dict) -> None:
    model = _model(cell=cell, **options)
    condition = _condition(model, 2).requires_grad_()
    model(_tokens(2, 4), condition)[0, -1].logsumexp(-1).backward()
    assert condition.grad[0].ne(0).all() and condition.grad[1].eq(0).all()


@pytest.mark.parametrize("options", CONDITIONS[1:], ids=str)
def test_rnn_decoding_with_a_condition_uses_each_prompts_own(options: dict) -> None:
    model, prompt = _model(**options), _tokens(1, 2).expand(3, 2)
    condition = _condition(model, 3)
    together = generate(model.conditioned(condition), prompt, 6)
    beams = beam_search(model.conditioned(condition), prompt, 6, beams=3)
    for row in range(3):
        alone = model.conditioned(condition[row : row + 1])
        assert generate(alone, prompt[:1], 6) == [together[row]]
        (expected,) = beam_search(alone, prompt[:1], 6, beams=3)
        assert [found.tokens for found in beams[row]] == [found.tokens for found in expected]
        scores = [found.score for found in beams[row]]
        assert scores == pytest.approx([found.score for found in expected], abs=1e-6)
        assert all(abs(scores[0] - other[0].score) > 1e-5 for other in beams[:row]), "conditions make no difference"


@torch.no_grad()
@pytest.mark.parametrize("self_attention", [False, True])
def test_rnn_one_beam_is_greedy_and_best_of_many_is_probable(self_attention: bool) -> None:
    model, prompt, lengths = _model(self_attention=self_attention), _tokens(3, 5), torch.tensor([3, 5, 1])
    greedy = generate(model, prompt, 7, lengths=lengths)
    assert [found[0].tokens for found in beam_search(model, prompt, 7, beams=1, lengths=lengths)] == greedy
    for row, found in enumerate(beam_search(model, prompt, 7, beams=4, lengths=lengths)):
        start = prompt[row, : lengths[row]].tolist()
        for hypothesis in found:
            text = torch.tensor([start + hypothesis.tokens])
            log_probs = model(text).log_softmax(-1)[0, len(start) - 1 : -1]
            expected = log_probs.gather(1, text[0, len(start) :, None]).sum()
            assert hypothesis.log_prob == pytest.approx(expected.item(), abs=1e-6)


START, TEXT = 22, [1, 2, 3, 4, 1, 5, 6, 2, 7]  # 1 and 2 have two successors each: the state has to tell


@pytest.mark.parametrize(
    "options", [{}, {"cell": "gru", "norm": True, "tied": True}, {"self_attention": True}], ids=str
)
def test_rnn_learns_a_text_and_completes_it_from_any_beginning(options: dict) -> None:
    torch.manual_seed(0)
    model = RNNLM(RNNConfig(**(SIZES | {"width": 24, "hidden": 24, "layers": 1, "dropout": 0.1} | options)))
    tokens = torch.tensor([[START, *TEXT, *TEXT, *TEXT]])
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    for _ in range(120):
        loss = F.cross_entropy(model(tokens[:, :-1])[0], tokens[0, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    assert generate(model, torch.tensor([[START]]), 18) == [TEXT + TEXT]
    prompt = torch.tensor([[START, *TEXT[:5]], [START, *TEXT[:2], 0, 0, 0]])
    assert generate(model, prompt, 9, lengths=torch.tensor([6, 3])) == [TEXT[5:] + TEXT[:5], TEXT[2:] + TEXT[:2]]


def test_rnn_dropout_acts_in_training_only_and_where_it_says() -> None:
    model = _model(dropout=0.4, layers=1)
    tokens, seen = _tokens(2, 200), {}
    model.recurrent.register_forward_pre_hook(lambda _, given: seen.update(embedded=given[0]))
    model.readout.register_forward_pre_hook(lambda _, given: seen.update(read=given[0]))
    assert torch.equal(model(tokens), model(tokens)) and seen["read"].ne(0).all()
    model.train()
    assert not torch.equal(model(tokens), model(tokens))
    for name, tensor in seen.items():
        assert tensor.eq(0).double().mean().item() == pytest.approx(0.4, abs=0.05), name


def test_rnn_tied_matrix_is_the_embedding() -> None:
    model = _model(tied=True, width=8)
    assert model.readout.weight is model.embedding.weight and "readout.weight" not in model.stored()
    model(_tokens(1, 2)).sum().backward()
    assert model.embedding.weight.grad.ne(0).any(-1).all(), "every token's row is in the logits"
    with pytest.raises(pyattn.RangeError, match="tied: expected width and hidden of one size, got 6 and 8"):
        RNNConfig(**SIZES, tied=True)


def test_rnn_new_model_starts_as_documented() -> None:
    torch.manual_seed(0)
    for tied in (False, True):
        options = {"width": 128, "hidden": 128, "vocab": 500, "tied": tied}
        model = RNNLM(RNNConfig(**(SIZES | options), self_attention=True, condition=64))
        assert model.embedding.weight.std().item() == pytest.approx(1.0, rel=0.02)
        assert model.readout.bias.eq(0).all()
        bounds = {model.start.weight: 64, model.self_attention.join.weight: 256}
        for weight, inputs in (bounds if tied else bounds | {model.readout.weight: 128}).items():
            assert weight.abs().max().item() == pytest.approx(inputs**-0.5, rel=0.01)
            assert weight.std().item() == pytest.approx((3 * inputs) ** -0.5, rel=0.02)


@pytest.mark.parametrize("options", [*CONDITIONS, {"end": 0, "dropout": 0.25}, {"tied": True, "width": 8}], ids=str)
@pytest.mark.parametrize("more", [{}, {"cell": "gru", "norm": True, "self_attention": True}], ids=str)
def test_rnn_folder_round_trip(tmp_path: Path, options: dict, more: dict) -> None:
    model = _model(**options, **more).float()
    model.save_pretrained(tmp_path, max_shard_size="2KB")
    again = RNNLM.from_pretrained(tmp_path, attention="torch")
    assert again.config == replace(model.config, attention="torch") and not again.training
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in model.state_dict().items())
    condition = _condition(model, 2)
    condition = None if condition is None else condition.float()
    assert_close(again(_tokens(2, 5), condition), model(_tokens(2, 5), condition), atol=1e-5, rtol=0)


@pytest.mark.parametrize("head", HEADS)
def test_rnn_head_folder_round_trip(tmp_path: Path, head: type) -> None:
    model = _model(head, bidirectional=True, labels=3, label_names=("a", "b", "c")).float()
    model.save_pretrained(tmp_path)
    again = head.from_pretrained(tmp_path)
    assert again.config == model.config
    assert torch.equal(again(_tokens(2, 5)), model(_tokens(2, 5)))
    (other,) = {*HEADS} - {head}
    with pytest.raises(PretrainedError, match=f"expected architectures .*{other.__name__}.*{head.__name__}"):
        other.from_pretrained(tmp_path)


BAD_FIELDS = [
    ({"cell": "gru"}, r"of another shape: recurrent.layers.weight_ih_l0 \[32, 6\] for \[24, 6\]"),
    ({"cell": "elman"}, "cell: expected one of lstm, gru, rnn, got elman"),
    ({"hidden_size": 9}, r"of another shape: .*recurrent.layers.weight_hh_l0 \[32, 8\] for \[36, 9\]"),
    ({"num_hidden_layers": 1}, "unknown: .*recurrent.layers.weight_ih_l1"),
    ({"layer_norm": True}, "missing: recurrent.normed.0"),
    ({"layer_norm": "yes"}, "expected layer_norm False or True"),
    ({"tie_word_embeddings": True}, "tied: expected width and hidden of one size"),
    ({"self_attention": True}, "missing: self_attention.join.weight"),
    ({"condition_size": 3}, "missing: start.weight"),
    ({"condition_size": 3, "condition_use": "input"}, r"recurrent.layers.weight_ih_l0 \[32, 6\] for \[32, 9\]"),
    ({"bidirectional": True}, "bidirectional: expected none in RNNLM, got True"),
    ({"vocab_size": "23"}, "expected a whole number for vocab_size"),
    ({"dropout": 1.5}, r"dropout: expected a probability in \[0, 1\)"),
    ({"architectures": ["RNNForTokenClassification"]}, "expected architectures .*RNNLM"),
    ({"model_type": "gpt2"}, "expected model_type 'pyattn-rnn'"),
    ({"cell": None}, "has no cell"),
]


@pytest.mark.parametrize(("change", "message"), BAD_FIELDS, ids=[str(change) for change, _ in BAD_FIELDS])
def test_rnn_folder_that_says_something_else_is_an_error(tmp_path: Path, change: dict, message: str) -> None:
    _model().save_pretrained(tmp_path)
    config = tmp_path / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | change))
    with pytest.raises(PretrainedError, match=message):
        RNNLM.from_pretrained(tmp_path)


def test_rnn_file_holds_parameters_by_their_names(tmp_path: Path) -> None:
    model = _model().float()
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    assert stored.keys() == dict(model.named_parameters()).keys()
    assert torch.equal(stored["recurrent.layers.weight_hh_l1"], model.recurrent.layers.weight_hh_l1)


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("cell", CELLS)
def test_rnn_heads_read_each_text_as_if_alone(cell: str, norm: bool, bidirectional: bool) -> None:
    tokens, lengths = _tokens(4, 7), torch.tensor([3, 7, 1, 5])
    tagger, classifier = (_model(head, cell=cell, norm=norm, bidirectional=bidirectional, labels=5) for head in HEADS)
    tags, labels = tagger(tokens, lengths), classifier(tokens, lengths)
    assert tags.shape == (4, 7, 5) and labels.shape == (4, 5)
    for row, length in enumerate(lengths.tolist()):
        text = tokens[row : row + 1, :length]
        assert_close(tags[row, :length], tagger(text)[0], atol=1e-13, rtol=0)
        assert_close(labels[row], classifier(text)[0], atol=1e-13, rtol=0)


@pytest.mark.parametrize("cell", CELLS)
def test_rnn_heads_see_what_their_direction_has_read(cell: str) -> None:
    """One direction: a tag depends on what was before, a text's label on all of it. Two: both on all."""
    tokens = _tokens(1, 6)
    changed = tokens.clone()
    changed[0, 3] = (tokens[0, 3] + 1) % SIZES["vocab"]
    for bidirectional in (False, True):
        tagger, classifier = (_model(head, cell=cell, bidirectional=bidirectional) for head in HEADS)
        differs = tagger(tokens).ne(tagger(changed)).any(-1)[0].tolist()
        assert differs == ([True] * 6 if bidirectional else [False] * 3 + [True] * 3)
        assert classifier(tokens).ne(classifier(changed)).all()


@pytest.mark.parametrize("cell", CELLS)
def test_rnn_text_label_comes_from_the_last_states_of_both_directions(cell: str) -> None:
    """The forward direction's is the last one that the tagger has, the backward direction's its first."""
    model, lengths = _model(RNNForSequenceClassification, cell=cell, bidirectional=True), torch.tensor([4, 6])
    out, _ = model.recurrent(model.embedding(_tokens(2, 6)), None, lengths)
    hidden = SIZES["hidden"]
    last = torch.cat([out[[0, 1], lengths - 1, :hidden], out[:, 0, hidden:]], -1)
    expected = last @ model.classifier.weight.T + model.classifier.bias
    assert_close(model(_tokens(2, 6), lengths), expected, atol=1e-14, rtol=0)


def test_rnn_texts_of_no_tokens() -> None:
    tagger, classifier = (_model(head, bidirectional=True, labels=5) for head in HEADS)
    bias = classifier.classifier.bias
    labels = classifier(_tokens(2, 4), torch.tensor([0, 4]))
    assert torch.equal(labels[0], bias) and not torch.equal(labels[1], bias)
    assert torch.equal(classifier(_tokens(2, 0)), bias.expand(2, 5))
    assert tagger(_tokens(2, 0)).shape == (2, 0, 5) and classifier(_tokens(0, 4)).shape == (0, 5)


@pytest.mark.parametrize("self_attention", [False, True])
@pytest.mark.parametrize("options", CONDITIONS, ids=str)
def test_rnn_of_nothing(options: dict, self_attention: bool) -> None:
    model = _model(self_attention=self_attention, **options)
    for b, m in ((0, 4), (2, 0), (0, 0)):
        assert model(_tokens(b, m), _condition(model, b)).shape == (b, m, SIZES["vocab"])
    with pytest.raises(pyattn.RangeError, match=r"prompt: expected \[b, m\] with m >= 1"):
        generate(model if not options else model.conditioned(_condition(model, 2)), _tokens(2, 0), 3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("cell", CELLS)
def test_rnn_runs_in_half_precision(cell: str, dtype: torch.dtype) -> None:
    """As a whole, and as autocast: reading, steps, and gradients."""
    model, prompt = _model(cell=cell, self_attention=True, condition=3).float(), _tokens(2, 4)
    condition = torch.randn(2, 3)
    expected = model(prompt, condition)
    lowered = model.to(dtype)(prompt, condition)
    assert lowered.dtype is dtype
    assert_close(lowered.float(), expected, atol=0.1, rtol=0)
    model = model.float()
    with torch.autocast("cpu", dtype):
        assert model.initial(2, condition).dtype is torch.float32
        logits = model(prompt, condition)
        assert beam_search(model.conditioned(condition), prompt, 4, beams=3)
    assert_close(logits.float(), expected, atol=0.1, rtol=0)
    logits.float().logsumexp(-1).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize(
    ("change", "name"),
    [
        *(({size: 0}, size) for size in ("vocab", "width", "hidden", "layers", "condition", "labels")),
        ({"cell": "elman"}, "cell"),
        ({"dropout": 1.0}, "dropout"),
        ({"attention": "flash"}, "attention"),
        ({"condition_use": "output"}, "condition_use"),
        ({"end": 23}, "end"),
        ({"end": -1}, "end"),
        ({"labels": 3, "label_names": ("a", "b")}, "label_names"),
    ],
    ids=str,
)
def test_rnn_config_bad_value_is_named(change: dict, name: str) -> None:
    with pytest.raises(pyattn.RangeError, match=f"{name}: expected"):
        RNNConfig(**(SIZES | change))


def test_rnn_config_has_no_limit_of_context() -> None:
    assert RNNConfig(**SIZES, self_attention=True).context == sys.maxsize


@pytest.mark.parametrize("head", HEADS)
def test_rnn_model_refuses_what_it_has_not(head: type) -> None:
    with pytest.raises(pyattn.RangeError, match="bidirectional: expected none in RNNLM, got True"):
        _model(bidirectional=True)
    for change in ({"tied": True, "width": 8}, {"self_attention": True}, {"condition": 3}):
        with pytest.raises(pyattn.RangeError, match=f"{next(iter(change))}: expected none in {head.__name__}"):
            _model(head, **change)


@pytest.mark.parametrize("options", CONDITIONS[1:], ids=str)
def test_rnn_bad_condition_is_named(options: dict) -> None:
    model, tokens = _model(**options), _tokens(2, 3)
    with pytest.raises(pyattn.RangeError, match=r"condition: expected \[b=2, condition=3\], got None"):
        model(tokens)
    with pytest.raises(pyattn.RangeError, match=r"got None \(decoding takes `model\.conditioned"):
        generate(model, tokens, 3)
    for shape in ((2, 4), (3, 3), (3,)):
        for call in (model, lambda tokens, condition: generate(model.conditioned(condition), tokens, 2)):
            with pytest.raises(pyattn.ShapeError, match=r"condition: expected \[b=2, condition=3\], got"):
                call(tokens, torch.randn(shape))
    with pytest.raises(pyattn.DtypeError, match="condition: expected a floating dtype, got int64"):
        model(tokens, torch.ones(2, 3, dtype=torch.long))
    with pytest.raises(pyattn.RangeError, match=r"condition: expected None, got \[2, 3\]: the model's configuration"):
        _model()(tokens, torch.randn(2, 3))


def test_rnn_condition_beside_the_state_that_has_it_is_an_error() -> None:
    model, condition = _model(condition=3), torch.randn(2, 3)
    with pytest.raises(pyattn.RangeError, match="the state has it already"):
        model(_tokens(2, 3), condition, state=model.initial(2, condition))


@pytest.mark.parametrize("head", [RNNLM, *HEADS])
def test_rnn_bad_tokens_are_named(head: type) -> None:
    model = _model(head)
    for tokens in (_tokens(1, 4)[0], _tokens(1, 4)[None]):
        with pytest.raises(pyattn.ShapeError, match=r"tokens: expected \[b, m\], got"):
            model(tokens)
    for token in (-1, 23):
        with pytest.raises(pyattn.RangeError, match=r"tokens: expected values in \[0, 23\)"):
            model(torch.tensor([[3, token]]))
    with pytest.raises(pyattn.DtypeError, match="tokens: expected int64 or int32, got float32"):
        model(torch.zeros(1, 3))


@pytest.mark.parametrize("head", HEADS)
def test_rnn_bad_lengths_are_named(head: type) -> None:
    model, tokens = _model(head), _tokens(2, 4)
    with pytest.raises(pyattn.ShapeError, match=r"lengths: expected \[b=2\], got \[3\]"):
        model(tokens, torch.tensor([1, 2, 3]))
    for lengths in ([-1, 2], [2, 5]):
        with pytest.raises(pyattn.RangeError, match=r"lengths: expected values in \[0, m=4\]"):
            model(tokens, torch.tensor(lengths))


def test_rnn_bad_state_is_named() -> None:
    model = _model()
    with pytest.raises(pyattn.ShapeError, match=r"state: expected .* = \[2, 2, 3, 8\], got \[2, 2, 2, 8\]"):
        model(_tokens(3, 4), state=model.initial(2))
