"""Recurrent sequence to sequence: its forms decode as they train, are independent of padding, and refuse what does not
fit."""

import json
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import pyattn
from pyattn import registry
from pyattn.check import DtypeError, RangeError, ShapeError
from pyattn.decoding import beam_search, generate
from pyattn.models import PretrainedError, Seq2Seq, Seq2SeqConfig
from pyattn.models.seq2seq_config import PUBLISHED, SCORES
from pyattn.nn import next_baseline, reinforcement

SIZES = {"vocab": 11, "context": 12, "layers": 2, "width": 6, "hidden": 8}
BAHDANAU = {"order": "bahdanau", "score": "additive", "readout": "maxout", "bridge": "backward", "encoder_hidden": 6,
            "cell": "gru", "feed": False}  # fmt: skip
FORMS = {
    "luong": {},
    "luong without feeding": {"feed": False},
    "bahdanau": BAHDANAU,
    "bahdanau with feeding": {"order": "bahdanau", "feed": True},
    "next layer": {"uses": ("layer",), "feed": False},
    "next layer and readout, fed": {"uses": ("layer", "readout")},
    "next layer, asked before": {"uses": ("layer", "input"), "order": "bahdanau", "feed": False},
    "input alone": {"uses": ("input",), "order": "bahdanau", "feed": False},
    "own states": {"self_attention": True, "feed": False},
    "own states, fed": {"self_attention": True},
    "own states alone": {"score": None, "self_attention": True, "order": "bahdanau", "feed": False},
    "no attention, reversed": {
        "score": None, "reverse": True, "bidirectional": False, "readout": "linear", "feed": False,
    },
    "attention to a reversed source": {"reverse": True, "bidirectional": False, "bridge": "linear"},
    "plain cells": {"cell": "rnn", "bridge": "linear", "encoder_hidden": 5},
    "layer norm in the cells": {"norm": True},
    "tied": {"tied": True, "readout_size": 6},
    "learned value": {"score": "low-rank", "score_size": 3, "value_size": 5},
    "local-m": {"window": "monotonic", "window_size": 1},
    "local-m, all steps at once": {"window": "monotonic", "window_size": 1, "feed": False},
    "local-p": {"window": "predictive", "window_size": 2},
    "local-p, asked before": BAHDANAU | {"window": "predictive"},
    "local-p, renormalized": {"window": "renormalized", "window_size": 1, "value_size": 3, "feed": False},
    "hard": {"hard": True, "temperature": 1.0},
    "hard, all steps at once": {"hard": True, "temperature": 0.5, "score": "additive", "feed": False},
} | {f"score {name}": {"score": name, "feed": False} for name in SCORES}  # fmt: skip
SOURCE_LENGTHS = torch.tensor([4, 6, 0])
FUSED = ["cpu"] if "additive" in registry.BACKENDS["cpu"].features else []


@pytest.fixture(params=["reference", *FUSED], autouse=True)
def backend(request: pytest.FixtureRequest) -> Iterator[None]:
    with pyattn.use_backend(request.param):
        yield


def built(**options: object) -> Seq2Seq:
    """A model in float64 and eval mode, with parameters far enough from 0 that every part of it matters."""
    torch.manual_seed(0)
    model = Seq2Seq(Seq2SeqConfig(**SIZES | options)).double().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.5)
    return model


def texts(rows: int = 3, n: int = 6, m: int = 5) -> tuple[Tensor, Tensor]:
    """Sources [rows, n] and targets [rows, m]."""
    generator = torch.Generator().manual_seed(1)
    source, target = (torch.randint(3, 11, (rows, size), generator=generator) for size in (n, m))
    target[:, :1] = 1
    return source, target


@pytest.mark.parametrize("form", FORMS)
def test_steps_give_what_the_whole_gives(form):
    model = built(**FORMS[form])
    source, target = texts()
    expected = model(source, target, SOURCE_LENGTHS)
    with torch.no_grad():
        logits, state = model.prefill(source, SOURCE_LENGTHS, count=4)
        assert_close(logits, expected[:, 0])
        for i in range(1, 5):
            if i == 3:  # beams: rows repeat, one is left out, and they change places
                rows = [2, 1, 1, 2]
                state.reorder(rows)
                expected, target = expected[rows], target[rows]
            assert_close(model.step(target[:, i], state), expected[:, i])


@pytest.mark.parametrize("form", FORMS)
def test_torchs_attention_gives_the_same_outputs_and_gradients(form):
    ours, theirs = built(**FORMS[form]), built(**FORMS[form], attention="torch")
    logits = [model(*texts(), SOURCE_LENGTHS) for model in (ours, theirs)]
    assert_close(*logits)
    for values in logits:
        values.square().sum().backward()
    for (name, p), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert p.grad is not None, name
        assert_close(p.grad, other.grad, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("form", FORMS)
def test_padding_changes_nothing_and_rows_know_nothing_of_each_other(form):
    model = built(**FORMS[form])
    source, target = texts()
    lengths = torch.tensor([4, 6, 3])
    logits = model(source, target, lengths)
    for row, length in enumerate(lengths.tolist()):
        alone = model(source[row : row + 1, :length], target[row : row + 1])
        assert_close(logits[row : row + 1], alone)


@pytest.mark.parametrize("form", FORMS)
def test_a_later_token_of_the_target_changes_nothing_before_it(form):
    model = built(**FORMS[form])
    source, target = texts()
    other = target.clone()
    other[:, 3] = (other[:, 3] - 2) % 8 + 3
    before, after = model(source, target), model(source, other)
    assert_close(after[:, :3], before[:, :3])
    assert not torch.allclose(after[:, 3], before[:, 3])


@pytest.mark.parametrize("form", [
    "luong", "luong without feeding", "bahdanau", "own states", "no attention, reversed", "local-m",
    "local-m, all steps at once", "local-p, renormalized", "hard", "hard, all steps at once",
])  # fmt: skip
def test_one_reading_serves_several_targets(form):
    model = built(**FORMS[form])
    source, target = texts()
    others = texts(rows=6)[1]
    together = torch.stack([target, others[:3], others[3:]], 1).flatten(0, 1)  # three targets of each source
    expected = torch.stack([model(source, each, SOURCE_LENGTHS) for each in (target, others[:3], others[3:])], 1)
    encoded = []
    model.encoder.register_forward_hook(lambda module, args, out: encoded.append(len(args[0])))
    assert_close(model(source, together, SOURCE_LENGTHS), expected.flatten(0, 1))
    assert encoded == [3]


def test_alignment_has_the_weights_of_each_step():
    model = built(feed=True)
    source, target = texts()
    weights = model.alignment(source, target, SOURCE_LENGTHS)
    assert weights.shape == (3, 5, 6)
    held = torch.arange(6) < SOURCE_LENGTHS[:, None]
    assert_close(weights.sum(-1), (SOURCE_LENGTHS > 0)[:, None].double().expand(3, 5))
    assert not weights[~held[:, None].expand_as(weights)].any()
    with pytest.raises(RangeError, match="score: expected attention, got a model without"):
        built(**FORMS["no attention, reversed"]).alignment(source, target)


@pytest.mark.parametrize("feed", [True, False])
def test_windows_move_along_the_source_or_to_where_the_state_says(feed):
    source, target = texts()
    weights = built(window="monotonic", window_size=1, feed=feed).alignment(source, target)
    near = (torch.arange(6) - torch.arange(5)[:, None]).abs() <= 1
    assert ((weights > 0) == near).all()
    model = built(window="predictive", window_size=1, feed=feed)
    centers = []
    found = model.score.centers
    model.score.centers = lambda *given: centers.append(found(*given)) or centers[-1]
    weights = model.alignment(source, target, torch.tensor([6, 4, 5]))
    p = torch.cat(centers, 1)
    near = (torch.arange(6) - p.round()[..., None]).abs() <= 1
    held = torch.arange(6) < torch.tensor([6, 4, 5])[:, None]
    assert ((weights > 0) == (near & held[:, None])).all()
    assert p.min() > 0 and (p.amax(1) < torch.tensor([6, 4, 5])).all() and p.std() > 0.1


@pytest.mark.parametrize("feed", [True, False])
def test_hard_attention_draws_in_training_and_takes_the_most_probable_otherwise(feed):
    source, target = texts(rows=40)
    lengths = torch.full((40,), 5)
    model, soft = built(hard=True, feed=feed), built(feed=feed)
    greedy = model.alignment(source, target, lengths)
    assert (greedy.sum(-1) == 1).all() and not greedy[..., 5:].any()
    expected = soft.alignment(source, target, lengths)[:, 0]  # later steps have read other contexts
    assert (greedy[:, 0].argmax(-1) == expected.argmax(-1)).all()
    model.train()
    logits, choices = model(source, target, lengths, return_choices=True)
    assert logits.requires_grad and choices.log_prob.requires_grad and choices.entropy.requires_grad
    is_soft = (choices.log_prob == 0).all(1)
    assert 10 < is_soft.sum() < 30 and (choices.log_prob[~is_soft] < 0).all()
    entropy = -(expected * expected.clamp(min=1e-300).log()).sum(-1)
    assert_close(choices.entropy[:, 0], entropy)
    assert (model.alignment(source, target, lengths)[~is_soft] != greedy[~is_soft]).any()
    first = soft.train()(source, target, lengths)[is_soft, 0]
    assert_close(logits[is_soft, 0], first)
    logits, choices = model(source, target[:, :0], return_choices=True)
    assert logits.shape == (40, 0, 11) and choices.log_prob.shape == choices.entropy.shape == (40, 0)
    for model in (soft, built(window="monotonic")):
        with pytest.raises(RangeError, match="return_choices: expected hard attention"):
            model(source, target, return_choices=True)


def test_a_reversed_source_is_read_from_the_end_and_attended_to_in_its_order():
    model = built(**FORMS["attention to a reversed source"])
    states = []
    model.encoder.register_forward_hook(lambda module, args, out: states.append((args[0], out[0])))
    memory = []
    keys = model.score.keys
    model.score.keys = lambda states: memory.append(states) or keys(states)
    source, target = texts(rows=1)
    model(source, target, torch.tensor([4]))
    read, out = states[0]
    embedded = model.source_embedding.weight[source[0]]
    assert_close(read[0, :4], embedded[:4].flip(0))
    assert_close(memory[0][0, :4], out[0, :4].flip(0))


def test_without_attention_all_of_a_source_goes_through_one_state():
    model = built(score=None, feed=False, layers=1)
    source, _ = texts()
    _, reading = model.prefill(source, count=1)
    assert reading.memory.layers == [()]
    assert reading.state.shape == (2, 1, 3, 8)


@pytest.mark.parametrize("options", [{}, {"window": "monotonic"}, {"window": "predictive"}, {"hard": True}], ids=str)
@pytest.mark.parametrize("order", ["luong", "bahdanau"])
def test_beams_of_a_sentence_share_its_keys(order, options):
    model = built(order=order, score="additive", **options).float()
    prepared = []
    keys = model.score.keys
    model.score.keys = lambda states: prepared.append(len(states)) or keys(states)
    source, _ = texts()
    found = beam_search(model, source, 6, beams=3, end=2)
    assert prepared == [3]
    assert all(len(best) == 3 for best in found)
    (alone,) = beam_search(model, source[1:2], 6, beams=3, end=2)
    assert [h.tokens for h in alone] == [h.tokens for h in found[1]]


def test_greedy_decoding_takes_the_best_token_of_the_whole_models_logits():
    model = built()
    source, _ = texts()
    tokens = torch.tensor(generate(model, source, 6))
    target = torch.cat([torch.ones(3, 1, dtype=torch.long), tokens[:, :-1]], 1)
    assert (model(source, target).argmax(-1) == tokens).all()


@pytest.mark.parametrize("form", FORMS)
def test_a_saved_model_comes_back(form, tmp_path):
    model = built(**FORMS[form]).float()
    model.save_pretrained(tmp_path)
    again = Seq2Seq.from_pretrained(tmp_path)
    assert again.config == model.config
    assert_close(again(*texts()), model(*texts()), rtol=0, atol=0)
    compared = Seq2Seq.from_pretrained(tmp_path, attention="torch", dropout=0.1)
    assert compared.config == replace(model.config, attention="torch", dropout=0.1)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"cell": "gru"}, r"of another shape: encoder.layers.weight_ih_l0 \[16, 6\] for \[12, 6\]"),
        ({"score": "additive"}, "missing: score.weight, score.query_projection.weight"),
        ({"layers": 3}, "missing: encoder.layers.weight_ih_l2"),
        ({"score": "plain"}, "score: expected one of"),
        ({"cell": None}, "expected a string for cell in .*, got None"),
        ({"hidden": "8"}, "expected a whole number for hidden in .*, got '8'"),
        ({"layers": 1.0}, "expected a whole number for layers in .*, got 1.0"),
        ({"layers": True}, "expected a whole number for layers in .*, got True"),
        ({"feed": None}, "expected true or false for feed in .*, got None"),
        ({"bidirectional": "false"}, "expected true or false for bidirectional in .*, got 'false'"),
        ({"uses": "input"}, "expected a list of strings or null for uses in .*, got 'input'"),
        ({"window": "predictive"}, "missing: .*score.center_weight"),
        ({"hard": "yes"}, "expected true or false for hard in .*, got 'yes'"),
        ({"score": 3}, "expected a string or null for score in .*, got 3"),
        ({"model_type": "marian"}, "expected model_type 'pyattn-seq2seq'"),
    ],
)
def test_a_checkpoint_of_another_form_is_named(changes, named, tmp_path):
    built().float().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | changes), encoding="utf-8")
    with pytest.raises(PretrainedError, match=named):
        Seq2Seq.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["order", "score", "uses", "feed", "vocab", "window", "hard"])
def test_a_file_without_a_field_is_refused(name, tmp_path):
    """Another order has tensors of the same shapes, so no default may take the field's place."""
    built().float().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    fields = json.loads(path.read_text("utf-8"))
    del fields[name]
    path.write_text(json.dumps(fields), encoding="utf-8")
    with pytest.raises(PretrainedError, match=f"config.json has no {name}"):
        Seq2Seq.from_pretrained(tmp_path)


def test_uses_may_be_a_list():
    config = Seq2SeqConfig(**SIZES, uses=["readout"])
    assert config == Seq2SeqConfig(**SIZES, uses=("readout",))
    assert hash(config)


def test_shapes_that_are_none_of_texts_are_named():
    model = built()
    source, target = texts()
    for call, error, message in (
        (lambda: model(source[0], target), ShapeError, r"source: expected \[b, m\]"),
        (lambda: model(source, target[0]), ShapeError, r"target: expected \[b, m\]"),
        (lambda: model.prefill(source[0], count=3), ShapeError, r"prompt: expected \[b, m\]"),
        (lambda: model(source[:0], target), ShapeError, "target: expected a multiple of the 0 sources"),
        (lambda: model(source, target, torch.ones(len(source))), DtypeError, "lengths: expected int64 or int32"),
        (lambda: model.prefill(source, count=[3]), RangeError, f"count: expected one number, or {len(source)}, got 1"),
        (lambda: beam_search(model, source, 3, end=99), RangeError, "end: expected a token of the model's 11, got 99"),
    ):
        with pytest.raises(error, match=message):
            call()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"score": "dot", "encoder_hidden": 5, "bridge": "linear"}, "score: expected states of one size for dot"),
        ({"score": "cosine", "encoder_hidden": 5, "bridge": "linear"}, "score: expected states of one size for cosine"),
        ({"score": "hard"}, "score: expected one of None, dot, scaled"),
        ({"hidden": 7}, "hidden: expected an even number"),
        ({"encoder_hidden": 5}, "bridge: expected states of hidden=8 columns from the encoder for copy, got 10"),
        ({"bridge": "backward", "bidirectional": False}, "bridge: expected a bidirectional encoder"),
        ({"bridge": "zero"}, "bridge: expected one of copy, linear, backward, got zero"),
        ({"reverse": True}, "reverse: expected an encoder of one direction"),
        ({"order": "Luong"}, "order: expected one of luong, bahdanau, got Luong"),
        ({"uses": ("input",)}, "uses: expected order=bahdanau for input"),
        ({"uses": ("layer",), "layers": 1}, "uses: expected at least 2 layers for layer, got 1"),
        ({"uses": ("output",)}, "uses: expected names out of input, layer, readout"),
        ({"uses": ("layer", "layer")}, "uses: expected names out of input, layer, readout, each once"),
        ({"uses": ()}, "uses: expected at least one use of the context"),
        ({"uses": ("readout",), "score": None}, "uses: expected none without score or self_attention"),
        ({"score_size": 4}, "score_size: expected None for score=general, got 4"),
        ({"score": None, "value_size": 4}, "value_size: expected None for score=None, got 4"),
        ({"window": "local-m"}, "window: expected one of None, monotonic, predictive, renormalized, got local-m"),
        ({"window": "predictive", "score": None}, "window: expected a score beside it, got predictive without"),
        ({"window_size": 4}, "window_size: expected None without a window, got 4"),
        ({"window": "monotonic", "window_size": 0}, "window_size: expected at least 1, got 0"),
        ({"hard": True, "score": None}, "hard: expected a score beside it"),
        ({"hard": True, "window": "monotonic"}, "hard: expected no window beside it, got monotonic"),
        ({"temperature": 1.0}, "temperature: expected None without hard attention, got 1.0"),
        ({"hard": True, "temperature": 0.0}, "temperature: expected a positive number, got 0.0"),
        ({"readout": "linear", "readout_size": 4}, "readout_size: expected None for readout=linear, got 4"),
        ({"tied": True}, "tied: expected a readout of width=6 columns, got 8"),
        ({"cell": "tree"}, "cell: expected one of lstm, gru, rnn, got tree"),
        ({"dropout": 1.0}, r"dropout: expected a probability in \[0, 1\), got 1.0"),
        ({"layers": 0}, "layers: expected at least 1, got 0"),
        ({"end": 11}, r"end: expected a token in \[0, vocab=11\), got 11"),
        ({"attention": "flash"}, "attention: expected one of pyattn, torch, got flash"),
    ],
)  # fmt: skip
def test_a_configuration_that_does_not_fit_names_the_field(options, message):
    with pytest.raises(RangeError, match=message):
        Seq2SeqConfig(**SIZES | options)


def test_bad_texts_name_the_argument():
    model = built()
    source, target = texts()
    for call, error, message in [
        (lambda: model(source, target[:2]), ShapeError, "target: expected a multiple of the 3 sources, got 2"),
        (lambda: model(source, target, torch.tensor([1, 2])), ShapeError, r"lengths: expected \[3\], one for each"),
        (lambda: model(source, target, torch.tensor([1, 7, 2])), RangeError, "lengths: expected 0 to 6, got 1 to 7"),
        (lambda: model(source.repeat(1, 3), target), RangeError, "source: expected at most context=12, got 18"),
        (lambda: model(source, target.repeat(1, 3)), RangeError, "target: expected at most context=12, got 15"),
        (lambda: model(source + 8, target), RangeError, r"source: expected values in \[0, 11\)"),
        (lambda: model(source, target.double()), DtypeError, "target: expected int64 or int32"),
        (lambda: model.prefill(source, count=12), RangeError, "count: expected at most 11, context=12 less the start"),
    ]:  # fmt: skip
        with pytest.raises(error, match=message):
            call()


@pytest.mark.parametrize("form", ["luong", "luong without feeding", "bahdanau", "no attention, reversed"])
def test_empty_sources_targets_and_batches_are_defined(form):
    model = built(**FORMS[form])
    source, target = texts()
    assert model(source, target[:, :0]).shape == (3, 0, 11)
    assert model(source[:0], target[:0]).shape == (0, 5, 11)
    of_nothing = model(source, target, torch.zeros(3, dtype=torch.long))
    assert_close(model(source[:, :0], target), of_nothing)
    assert of_nothing.isfinite().all()
    of_nothing.sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_dropout_acts_in_training_alone():
    model = built(dropout=0.5)
    assert_close(model(*texts()), model(*texts()), rtol=0, atol=0)
    model.train()
    assert not torch.allclose(model(*texts()), model(*texts()))


@pytest.mark.parametrize(("name", "shapes"), [
    ("sutskever", {"lower.layers.weight_ih_l3": [4000, 1000], "output.weight": [80000, 1000]}),
    ("bahdanau", {"lower.layers.weight_ih_l0": [3000, 2620], "score.weight": [1, 1000], "bridge.weight": [1000, 1000],
                  "readout.linear.weight": [1000, 3620], "output.weight": [30000, 500]}),
    ("luong", {"lower.layers.weight_ih_l0": [4000, 2000], "readout.linear.weight": [1000, 2000]}),
])  # fmt: skip
def test_published_models_have_the_papers_sizes(name, shapes):
    with torch.device("meta"):
        model = Seq2Seq(PUBLISHED[name])
    assert {name: list(p.shape) for name, p in model.named_parameters() if name in shapes} == shapes


@pytest.mark.parametrize("form", ["luong", "bahdanau", "own states"])
def test_autocast_runs(form):
    model = built(**FORMS[form]).float()
    expected = model(*texts())
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(*texts())
    assert_close(logits.float(), expected, rtol=0.1, atol=0.2)
    logits.float().sum().backward()


@pytest.mark.parametrize(("where", "reverses", "steps"), [
    ({}, True, 150),
    ({"window": "monotonic", "window_size": 1}, False, 250),
    ({"window": "predictive", "window_size": 2}, True, 150),
    ({"hard": True, "temperature": 1.0}, True, 150),
    ({"hard": True}, True, 250),
], ids=str)  # fmt: skip
def test_digits_are_copied_or_reversed_and_looked_for_where_they_are(where, reverses, steps):
    """Each digit of the answer is looked for at its place in the question, or at its place from the end."""
    torch.manual_seed(0)
    sizes = {"vocab": 13, "context": 8, "layers": 1, "width": 32, "hidden": 32}
    model = Seq2Seq(Seq2SeqConfig(**sizes, score="additive", feed=False, **where))
    draws = bool(where.get("hard")) and not where.get("temperature")
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    generator = torch.Generator().manual_seed(0)
    baseline = torch.zeros(())
    for _ in range(steps):
        source = torch.randint(3, 13, (64, 5), generator=generator)
        answer = source.flip(1) if reverses else source
        target = torch.cat([torch.ones(64, 1, dtype=torch.long), answer[:, :-1]], 1)
        logits, *choices = model(source, target, return_choices=True) if draws else (model(source, target),)
        found = torch.nn.functional.cross_entropy(logits.mT, answer, reduction="none").sum(1)
        loss = found.mean()
        if draws:
            loss = loss + reinforcement(-found, *choices[0], baseline, weight=0.1).mean()
            baseline = next_baseline(baseline, -found)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    source = torch.randint(3, 13, (200, 5), generator=generator)
    answer = source.flip(1) if reverses else source
    least = 0.75 if draws else 0.95  # an estimate of a gradient takes longer than the gradient
    assert (torch.tensor(generate(model, source, 5)) == answer).all(1).float().mean() > least
    target = torch.cat([torch.ones(200, 1, dtype=torch.long), answer[:, :-1]], 1)
    looked = model.alignment(source, target).argmax(-1)
    places = torch.arange(5).flip(0) if reverses else torch.arange(5)
    # A window of three is within what the encoder's states say of their neighbours: any of them will do there.
    assert where.get("window") == "monotonic" or (looked == places).float().mean() > least
