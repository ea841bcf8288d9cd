"""Show, Attend and Tell: the paper's equations in a loop, hard attention's gradient, decoding, what does not fit."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.testing import assert_close

import pyattn
from pyattn import registry
from pyattn.check import DtypeError, RangeError, ShapeError
from pyattn.decoding import Sampling, beam_search, generate
from pyattn.decoding.captions import tell
from pyattn.models import CaptionConfig, PretrainedError, ShowAttendTell, caption
from pyattn.models.caption import doubly_stochastic
from pyattn.nn import hard_attention_of_scores, reinforcement

SIZES: dict[str, Any] = {
    "vocab": 11, "context": 9, "grid_size": 6, "width": 5, "hidden": 8, "score_size": 7, "image_size": 8, "layers": 2,
}  # fmt: skip
FORMS: dict[str, dict[str, Any]] = {"soft": {}, "without a gate": {"gate": False}, "hard": {"hard": True}}
FUSED = ["cpu"] if "additive" in registry.BACKENDS["cpu"].features else []
TOKENS = torch.tensor([[1, 3, 4, 5, 2], [1, 6, 7, 2, 0], [1, 8, 2, 0, 0]])


@pytest.fixture(params=["reference", *FUSED], autouse=True)
def backend(request: pytest.FixtureRequest) -> Iterator[None]:
    with pyattn.use_backend(request.param):
        yield


def built(**options: Any) -> ShowAttendTell:
    """A model in float64 and eval mode, with parameters far enough from 0 that every part of it matters."""
    torch.manual_seed(0)
    model = ShowAttendTell(CaptionConfig(**SIZES | options)).double().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.5)
    return model


def images(b: int = 3, seed: int = 1) -> Tensor:
    return torch.rand(b, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def by_the_paper(
    p: dict[str, Tensor], grid: Tensor, tokens: Tensor, drawn: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Logits [m, vocab] and weights [m, L] of one caption over a grid [L, D], equation by equation.

    drawn: the positions that hard attention looks at, in place of the sum.
    """
    mean = grid.mean(0)
    h, c = (
        torch.tanh(torch.tanh(mean @ p[f"{n}.0.weight"].T + p[f"{n}.0.bias"]) @ p[f"{n}.2.weight"].T + p[f"{n}.2.bias"])
        for n in ("initial_h", "initial_c")
    )
    logits, weights = [], []
    for t, token in enumerate(tokens.tolist()):
        asked = p["score.query_projection.weight"] @ h + p["score.query_projection.bias"]
        scores = [
            p["score.weight"][0] @ torch.tanh(asked + p["score.key_projection.weight"] @ vector) for vector in grid
        ]
        alpha = torch.stack(scores).exp()
        alpha = alpha / alpha.sum()
        z = sum(alpha[i] * grid[i] for i in range(len(grid))) if drawn is None else grid[drawn[t]]
        if "gate.weight" in p:
            z = z / (1 + torch.exp(-(p["gate.weight"][0] @ h + p["gate.bias"])))
        y = p["embedding.weight"][token]
        gates = p["cell.layers.weight_ih_l0"] @ torch.cat([y, z]) + p["cell.layers.bias_ih_l0"]
        i, f, g, o = (gates + p["cell.layers.weight_hh_l0"] @ h + p["cell.layers.bias_hh_l0"]).chunk(4)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        h = torch.sigmoid(o) * torch.tanh(c)
        read = y + p["output_h.weight"] @ h + p["output_z.weight"] @ z
        logits.append(p["output.weight"] @ read + p["output.bias"])
        weights.append(alpha)
    return torch.stack(logits), torch.stack(weights)


def loss_of(logits: Tensor, weights: Tensor, tokens: Tensor) -> Tensor:
    """Of whole captions with the doubly stochastic term, over their words alone."""
    targets, is_word = tokens[:, 1:], tokens[:, 1:] != 0
    words = F.cross_entropy(logits[:, :-1].mT, targets, ignore_index=0, reduction="sum")
    coverage = 0.0
    for row in range(len(tokens)):
        for i in range(weights.shape[2]):
            looked = sum(weights[row, t, i] for t in range(targets.shape[1]) if is_word[row, t])
            coverage = coverage + (1 - looked) ** 2
    return words + 0.7 * coverage


@pytest.mark.parametrize("form", ["soft", "without a gate"])
@pytest.mark.parametrize("attention", ["pyattn", "torch"])
def test_outputs_and_every_gradient_are_those_of_a_loop_over_the_papers_equations(form: str, attention: str) -> None:
    model = built(**FORMS[form], attention=attention)
    logits, looks = model(images(), TOKENS, return_looks=True)
    is_word = TOKENS[:, 1:] != 0
    words = F.cross_entropy(logits[:, :-1].mT, TOKENS[:, 1:], ignore_index=0, reduction="sum")
    loss = words + 0.7 * doubly_stochastic(looks.weights[:, :-1], is_word).sum()
    gradients = torch.autograd.grad(loss, list(model.parameters()))

    own = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    grids = torch.func.functional_call(
        model.encoder, {n[8:]: p for n, p in own.items() if n[:8] == "encoder."}, images()
    )
    found = [by_the_paper(own, grid, tokens) for grid, tokens in zip(grids, TOKENS, strict=True)]
    expected, weights = (torch.stack(part) for part in zip(*found, strict=True))
    assert_close(logits, expected, rtol=1e-6, atol=1e-9)
    assert_close(looks.weights, weights, rtol=1e-6, atol=1e-9)
    assert_close(model(images(), TOKENS), expected, rtol=1e-6, atol=1e-9)  # without weights, by another call
    expected_gradients = torch.autograd.grad(loss_of(expected, weights, TOKENS), list(own.values()))
    for name, ours, theirs in zip(own, gradients, expected_gradients, strict=True):
        assert_close(ours, theirs, rtol=1e-6, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}")
        assert theirs.abs().max() > 1e-6, name


def test_the_encoder_is_its_convolutions_and_a_vector_for_each_position() -> None:
    model = built()
    x, p = images(1), dict(model.encoder.named_parameters())
    for layer in range(2):
        padded = F.pad(2 * x - 1 if layer == 0 else x, (2, 2, 2, 2))
        side = x.shape[2] // 2
        patches = [padded[0, :, 2 * r : 2 * r + 5, 2 * s : 2 * s + 5] for r in range(side) for s in range(side)]
        kernel = p[f"layers.{layer}.weight"]
        rows = torch.stack([(kernel * patch).sum((1, 2, 3)) + p[f"layers.{layer}.bias"] for patch in patches])
        rows = (rows - rows.mean(1, keepdim=True)) / (rows.var(1, unbiased=False, keepdim=True) + 1e-5).sqrt()
        rows = (rows * p[f"norms.{layer}.weight"] + p[f"norms.{layer}.bias"]).clamp(min=0)
        x = rows.T.reshape(1, -1, side, side)
    assert_close(model.encoder(images(1)), x.flatten(2).mT + p["positions"])
    bytes_of = (255 * images(1)).round().to(torch.uint8)
    assert_close(model.encoder(bytes_of), model.encoder(bytes_of / 255.0))


def never_soft(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(caption, "half", lambda b, device: torch.zeros(b, dtype=torch.bool))


def test_hard_attention_sees_the_drawn_positions_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    never_soft(monkeypatch)
    model = built(hard=True).train()
    own = {name: p.detach() for name, p in model.named_parameters()}
    logits, looks = model(images(), TOKENS, return_looks=True)
    grids = model.encoder(images()).detach()
    for row in range(3):
        expected, weights = by_the_paper(own, grids[row], TOKENS[row], looks.positions[row])
        assert_close(logits[row], expected)
        assert_close(looks.weights[row], weights)
        assert_close(looks.log_prob[row], weights.log().gather(1, looks.positions[row, :, None])[:, 0])
        assert_close(looks.entropy[row], -(weights * weights.log()).sum(1))
    assert not torch.equal(model(images(), TOKENS), logits)  # other positions are drawn
    model.eval()
    _, looks = model(images(), TOKENS, return_looks=True)
    assert torch.equal(looks.positions, looks.weights.argmax(-1))


def test_images_read_softly_show_the_sum_and_nothing_of_them_is_drawn() -> None:
    model, tokens = built(hard=True).train(), TOKENS.repeat(20, 1)
    given = images().repeat_interleave(10, 0)
    logits, looks = model(given, tokens, return_looks=True)  # two captions of each
    is_soft = (looks.positions == -1).all(1)
    assert 10 < is_soft.sum() < 50 and torch.equal(is_soft[::2], is_soft[1::2])
    assert not looks.log_prob[is_soft].any() and (looks.positions[~is_soft] >= 0).all()
    own = {name: p.detach() for name, p in model.named_parameters()}
    grids = model.encoder(given).detach()
    for row in is_soft.nonzero().flatten().tolist()[:3]:
        assert_close(logits[row], by_the_paper(own, grids[row // 2], tokens[row])[0])


def test_reinforcement_is_the_gradient_of_the_expected_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over all positions that two steps can look at, each by its probability, whatever the baseline."""
    never_soft(monkeypatch)
    model = built(hard=True, image_size=None).train()
    grid = torch.randn(1, 3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    tokens, targets = torch.tensor([[1, 4]]), torch.tensor([[4, 2]])
    parameters = list(model.parameters())
    estimate = [torch.zeros_like(p) for p in parameters]
    expected = torch.zeros((), dtype=torch.float64)

    def looking_at(position: int, scores: Tensor, *args: Any, **options: Any) -> Any:
        chosen = hard_attention_of_scores(scores.masked_fill(torch.arange(3) != position, -torch.inf), *args, **options)
        return chosen._replace(log_prob=scores.log_softmax(-1)[..., position])

    for first in range(3):
        for second in range(3):
            drawn = iter((first, second))
            monkeypatch.setattr(
                caption, "hard_attention_of_scores", lambda *args, drawn=drawn, **o: looking_at(next(drawn), *args, **o)
            )
            logits, looks = model(grid, tokens, return_looks=True)
            assert looks.positions.tolist() == [[first, second]]
            log_p = -F.cross_entropy(logits.mT, targets, reduction="none").sum(1)
            chance = looks.weights[0, 0, first] * looks.weights[0, 1, second]
            expected = expected - chance * log_p.sum()
            loss = -log_p + reinforcement(log_p, looks.log_prob, looks.entropy, torch.tensor(-3.0))
            found = torch.autograd.grad(loss.sum(), parameters, allow_unused=True, retain_graph=True)
            for total, gradient in zip(estimate, found, strict=True):
                total += 0 if gradient is None else chance.detach() * gradient
    for ours, theirs in zip(estimate, torch.autograd.grad(expected, parameters, allow_unused=True), strict=True):
        assert_close(ours, torch.zeros_like(ours) if theirs is None else theirs)


def test_rows_of_a_model_in_training_may_be_left_out() -> None:
    model = built(hard=True).train()
    decoder = model.decoder(images())
    _, state = decoder.prefill(decoder.start, count=2)
    state.reorder([0, 0, 2, 2])  # which images are read softly goes with them
    assert decoder.step(torch.tensor([3, 4, 5, 6]), state).shape == (4, 11)


def test_no_images_have_no_captions() -> None:
    assert tell(built(), None, images()[:0]) == []


def test_straight_through_reaches_the_scores() -> None:
    gradients = []
    for temperature in (0.5, 2.0):
        model = built(hard=True, temperature=temperature).train()
        torch.manual_seed(3)
        logits, looks = model(images(), TOKENS, return_looks=True)
        assert (looks.positions >= 0).all()  # nothing is soft beside it
        gradients.append(torch.autograd.grad(logits.square().sum(), model.score.weight)[0])
    assert gradients[0].any() and not torch.allclose(*gradients)


def test_doubly_stochastic_term_is_zero_where_everything_is_looked_at_once() -> None:
    weights, is_word = torch.eye(4)[None], torch.ones(1, 4, dtype=torch.bool)
    assert doubly_stochastic(weights, is_word).item() == 0
    is_word[0, 3] = False  # what padding looks at is not looked at
    assert doubly_stochastic(weights, is_word).item() == 1


@pytest.mark.parametrize("form", FORMS)
def test_steps_give_what_the_whole_gives_and_beams_share_a_grid(form: str) -> None:
    model = built(**FORMS[form])
    expected, tokens = model(images(), TOKENS), TOKENS
    with torch.no_grad():
        decoder = model.decoder(images())
        logits, state = decoder.prefill(decoder.start, count=4)
        assert_close(logits, expected[:, 0])
        for i in range(1, 5):
            if i == 3:  # beams: rows repeat, one is left out, and they change places
                rows = [2, 1, 1, 2]
                state.reorder(rows)
                expected, tokens = expected[rows], tokens[rows]
            assert_close(decoder.step(tokens[:, i], state), expected[:, i])
        assert len(state.memory.layers[0][1]) == 2  # grids, of four rows


def test_a_caption_goes_on_from_its_beginning() -> None:
    model = built()
    expected = model(images(), TOKENS)
    lengths = torch.tensor([3, 1, 2])
    with torch.no_grad():
        decoder = model.decoder(images())
        logits, state = decoder.prefill(TOKENS[:, :3], lengths, count=1)
        assert_close(logits, torch.stack([expected[0, 2], expected[1, 0], expected[2, 1]]))
        assert state.read == [[1, 3, 4], [1], [1, 8]]
        after = decoder.step(torch.tensor([5, 6, 2]), state)
    assert_close(after, torch.stack([expected[0, 3], expected[1, 1], expected[2, 2]]))


def test_greedy_beams_and_samples_agree_with_the_whole() -> None:
    model = built()
    decoder = model.decoder(images())
    greedy = generate(decoder, decoder.start, 6)
    assert [each[0].tokens for each in beam_search(decoder, decoder.start, 6, beams=1, choices=1)] == greedy
    best = beam_search(decoder, decoder.start, 6, beams=4, end=2)[1][0]
    tokens = [*best.tokens, *[2] * best.ended]
    log_p = model(images()[1:2], torch.tensor([[1, *tokens[:-1]]])).log_softmax(-1)[0]
    assert_close(sum(log_p[i, token].item() for i, token in enumerate(tokens)), best.log_prob, rtol=1e-5, atol=1e-5)
    drawn = [
        generate(decoder, decoder.start, 6, sampling=Sampling(), generator=torch.Generator().manual_seed(seed))
        for seed in (0, 0, 1)
    ]
    assert drawn[0] == drawn[1] != drawn[2]


def test_several_captions_share_one_encoding() -> None:
    model = built()
    tokens = torch.cat([TOKENS, TOKENS.flip(0)])
    together = torch.stack([tokens[:3], tokens[3:]], 1).flatten(0, 1)
    encoded = []
    model.encoder.register_forward_hook(lambda module, args, out: encoded.append(len(out)))
    found = model(images(), together)
    assert encoded == [3]
    assert_close(found, torch.stack([model(images(), tokens[:3]), model(images(), tokens[3:])], 1).flatten(0, 1))


def test_a_later_token_changes_nothing_before_it_and_padding_nothing_at_all() -> None:
    model = built()
    other = TOKENS.clone()
    other[:, 3:] = 9
    assert_close(model(images(), other)[:, :3], model(images(), TOKENS)[:, :3])
    assert_close(model(images(), TOKENS[:, :2]), model(images(), TOKENS)[:, :2])


def test_any_grid_takes_the_place_of_the_encoder() -> None:
    model, alone = built(), built(image_size=None)
    alone.load_state_dict(model.state_dict(), strict=False)
    grid = model.encoder(images())
    assert_close(alone(grid, TOKENS), model(images(), TOKENS))
    longer = torch.cat([grid, grid[:, :2]], 1)
    assert alone(longer, TOKENS).shape == (3, 5, 11)
    assert alone(grid[:, :1], TOKENS, return_looks=True)[1].weights.eq(1).all()


@pytest.mark.parametrize("form", FORMS)
def test_a_folder_gives_the_model_back(form: str, tmp_path: Any) -> None:
    model = built(**FORMS[form]).float()
    model.save_pretrained(tmp_path)
    read = ShowAttendTell.from_pretrained(tmp_path, dropout=0.1)
    assert read.config == replace(model.config, dropout=0.1)
    assert_close(read(images().float(), TOKENS), model(images().float(), TOKENS), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"hidden": 9}, r"of another shape: initial_h.0.weight \[8, 6\] for \[9, 6\]"),
        ({"gate": False}, "unknown: gate.bias, gate.weight"),
        ({"image_size": None}, "unknown: encoder.layers.0.bias"),
        ({"hard": None}, "expected true or false for hard in"),
        ({"image_size": 9}, "image_size: expected a multiple of 2\\^layers"),
        ({"layers": 10**9}, "image_size: expected a multiple of"),
        ({"model_type": "pyattn-seq2seq"}, "expected model_type 'pyattn-caption'"),
    ],
)
def test_a_folder_of_another_form_is_named(changes: dict[str, Any], named: str, tmp_path: Any) -> None:
    built().float().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | changes), encoding="utf-8")
    with pytest.raises(PretrainedError, match=named):
        ShowAttendTell.from_pretrained(tmp_path)


def test_what_does_not_fit_names_the_argument() -> None:
    model, grids = built(), torch.rand(3, 4, 6, dtype=torch.float64)
    for call, error, message in [
        (lambda: model(grids[..., :5], TOKENS), ShapeError, r"images: expected a grid .* grid_size=6\], got \[3, 4"),
        (lambda: model(grids[:, :0], TOKENS), ShapeError, r"images: expected a grid \[b, L >= 1"),
        (lambda: model(images()[..., :4], TOKENS), ShapeError, r"images: expected \[b, 3, 8, 8\] or a grid"),
        (lambda: model(images()[:, :1], TOKENS), ShapeError, r"images: expected \[b, 3, 8, 8\] or a grid"),
        (lambda: model(images().long(), TOKENS), DtypeError, "images: expected uint8, or floating numbers, got int64"),
        (lambda: built(image_size=None)(images(), TOKENS), RangeError, "images: expected a grid .* has no encoder"),
        (lambda: model(images(2), TOKENS), ShapeError, "tokens: expected captions for a multiple of the 2 images"),
        (lambda: model(images(), TOKENS[0]), ShapeError, r"tokens: expected \[b, m\]"),
        (lambda: model(images(), TOKENS + 8), RangeError, r"tokens: expected values in \[0, 11\)"),
        (lambda: model(images(), TOKENS.repeat(1, 2)), RangeError, "tokens: expected at most context=9, got 10"),
        (lambda: model.decoder(images()).prefill(TOKENS[:2], count=1), ShapeError, "prompt: expected one for each of"),
        (lambda: model.decoder(images()).prefill(TOKENS, count=5), RangeError, "count: expected a caption of at most"),
        (lambda: model.decoder(images()).prefill(TOKENS, count=[1]), RangeError, "count: expected one number, or 3"),
    ]:  # fmt: skip
        with pytest.raises(error, match=message):
            call()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_size": 10}, r"image_size: expected a multiple of 2\^layers = 2\^2, got 10"),
        ({"hidden": 0}, "hidden: expected at least 1, got 0"),
        ({"temperature": 1.0}, "temperature: expected None without hard attention, got 1.0"),
        ({"temperature": 0.0, "hard": True}, "temperature: expected a positive number, got 0.0"),
        ({"dropout": -0.1}, r"dropout: expected a probability in \[0, 1\), got -0.1"),
        ({"end": 11}, r"end: expected a token in \[0, vocab=11\), got 11"),
        ({"attention": "flash"}, "attention: expected one of pyattn, torch, got flash"),
    ],
)
def test_a_configuration_that_does_not_fit_names_the_field(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RangeError, match=message):
        CaptionConfig(**SIZES | options)


@pytest.mark.parametrize("form", FORMS)
def test_empty_captions_and_batches_are_defined(form: str) -> None:
    model = built(**FORMS[form])
    assert model(images(), TOKENS[:, :0]).shape == (3, 0, 11)
    logits, looks = model(images(), TOKENS[:, :0], return_looks=True)
    assert logits.shape == (3, 0, 11) and looks.weights.shape == (3, 0, 4)
    assert looks.positions is None if form != "hard" else looks.positions.shape == (3, 0)
    assert model(images()[:0], TOKENS[:0]).shape == (0, 5, 11)


def test_published_model_has_the_papers_sizes() -> None:
    with torch.device("meta"):
        model = ShowAttendTell(caption.PUBLISHED["xu"])
    assert list(model.cell.layers.weight_ih_l0.shape) == [4000, 1024] and model.encoder is None


def test_autocast_runs() -> None:
    model = built().float()
    expected = model(images().float(), TOKENS)
    with torch.autocast("cpu", torch.bfloat16):
        logits, looks = model(images().float(), TOKENS, return_looks=True)
    assert_close(logits.float(), expected, rtol=0.1, atol=0.3)
    (logits.float().sum() + looks.weights.float().square().sum()).backward()
