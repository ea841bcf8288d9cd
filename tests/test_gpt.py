"""GPT held against transformers' GPT-2, and generation with a cache against generation without."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import pyattn
from pyattn.decoding.sampling import choose, generate
from pyattn.models.gpt import GPT, GPTConfig

SIZES = {"vocab": 97, "context": 48, "layers": 3, "heads": 4, "width": 32}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Models this small are slower on several threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=["torch", "pyattn-reference", "pyattn-cpu"])
def attention(request: pytest.FixtureRequest) -> Iterator[str]:
    """A value for GPTConfig.attention, with pyattn's backend chosen around the test."""
    name, _, backend = request.param.partition("-")
    if not backend:
        yield name
        return
    if (state := pyattn.backends()[backend]) != "ready":
        pytest.skip(f"{backend}: {state}")
    with pyattn.use_backend(backend):
        yield name


def _tokens(b: int, m: int, seed: int = 0) -> Tensor:
    return torch.randint(0, SIZES["vocab"], (b, m), generator=torch.Generator().manual_seed(seed))


def _gpt(attention: str = "torch", **options: float) -> GPT:
    torch.manual_seed(0)
    model = GPT(GPTConfig(**SIZES, attention=attention, **options))
    with torch.no_grad():
        for parameter in model.parameters():  # larger than at the start, so that every part shows in the logits
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def _peer(model: GPT) -> tuple[torch.nn.Module, dict[str, str]]:
    """transformers' GPT-2 with the weights of `model`, and their names there by ours."""
    transformers = pytest.importorskip("transformers")
    c = model.config
    config = transformers.GPT2Config(
        vocab_size=c.vocab, n_positions=c.context, n_embd=c.width, n_layer=c.layers, n_head=c.heads,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, attn_implementation="eager",
    )  # fmt: skip
    peer = transformers.GPT2LMHeadModel(config).eval()
    names = {name: f"transformer.{name}" for name in model.state_dict()}
    weights = {names[name]: _as_stored(name, tensor) for name, tensor in model.state_dict().items()}
    missing, unexpected = peer.load_state_dict(weights, strict=False)
    assert missing == ["lm_head.weight"], missing  # tied to wte
    assert not unexpected
    peer.tie_weights()
    return peer, names


def _as_stored(name: str, tensor: Tensor) -> Tensor:
    """GPT-2's checkpoints hold the matrices of a block as [in, out]."""
    return tensor.T.contiguous() if name.startswith("h.") and tensor.ndim == 2 else tensor


def test_gpt_logits_and_gradients_equal_transformers(attention: str) -> None:
    model = _gpt(attention)
    peer, names = _peer(model)
    tokens, targets = _tokens(2, 48), _tokens(2, 48, seed=1)
    logits, expected = model(tokens), peer(tokens).logits
    torch.testing.assert_close(logits, expected, atol=2e-5, rtol=0)
    for result in (logits, expected):
        F.cross_entropy(result.flatten(0, 1), targets.flatten()).backward()
    theirs = dict(peer.named_parameters())
    for name, parameter in model.named_parameters():
        grad = _as_stored(name, parameter.grad)
        difference = (grad - theirs[names[name]].grad).norm() / theirs[names[name]].grad.norm()
        assert difference < 1e-4, (name, difference)


def test_gpt_new_model_follows_gpt2_initialization() -> None:
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab=500, context=64, layers=8, heads=4, width=128))
    deviations = {name: p.std().item() for name, p in model.named_parameters() if p.ndim == 2}
    for name, deviation in deviations.items():
        assert deviation == pytest.approx(0.02 / 4 if name.endswith("c_proj.weight") else 0.02, rel=0.05), name
    assert all(p.eq(0).all() for name, p in model.named_parameters() if name.endswith("bias"))


def test_gpt_attentions_share_weights_from_one_seed() -> None:
    ours, torchs = _gpt("pyattn").state_dict(), _gpt("torch").state_dict()
    assert all(torch.equal(ours[name], torchs[name]) for name in torchs)


def test_gpt_dropout_acts_in_training_only() -> None:
    model, tokens = _gpt(dropout=0.3), _tokens(2, 20)
    assert torch.equal(model(tokens), model(tokens))
    model.train()
    assert not torch.equal(model(tokens), model(tokens))


def test_generate_greedy_with_cache_equals_without(attention: str) -> None:
    model, prompt = _gpt(attention), _tokens(3, 7)
    expected = prompt
    with torch.no_grad():
        for _ in range(30):
            expected = torch.cat([expected, model(expected)[:, -1].argmax(-1, keepdim=True)], 1)
    assert torch.equal(generate(model, prompt, 30, temperature=0), expected)


def test_gpt_tokens_in_pieces_give_the_logits_of_the_whole(attention: str) -> None:
    model, tokens, cache = _gpt(attention), _tokens(2, 40), None
    with torch.no_grad():
        cache = model.new_cache()
        pieces = [model(piece, cache) for piece in tokens.split([11, 1, 20, 8], 1)]
        torch.testing.assert_close(torch.cat(pieces, 1), model(tokens), atol=2e-5, rtol=0)


def test_generate_beyond_the_context_goes_on() -> None:
    model, prompt = _gpt(), _tokens(2, 60)
    out = generate(model, prompt, 80, temperature=0)
    assert out.shape == (2, 140)
    assert torch.equal(out[:, :60], prompt)
    with torch.no_grad():
        first = model(prompt[:, -48:])[:, -1].argmax(-1)
    assert torch.equal(out[:, 60], first)


def test_generate_same_generator_seed_gives_same_text() -> None:
    model, prompt = _gpt(), _tokens(2, 5)
    runs = [
        generate(model, prompt, 20, temperature=0.9, top_k=20, top_p=0.9, generator=torch.Generator().manual_seed(seed))
        for seed in (0, 0, 1)
    ]
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


@pytest.mark.parametrize(
    ("options", "allowed"),
    [
        ({"top_k": 2}, {1, 3}),
        ({"top_k": 1}, {3}),
        ({"top_p": 0.5}, {3}),
        ({"top_p": 0.6}, {1, 3}),
        ({"top_p": 1.0}, {0, 1, 2, 3}),
        ({"top_k": 3, "top_p": 0.6}, {1, 3}),
        ({}, {0, 1, 2, 3}),
    ],
)
def test_choose_draws_from_the_allowed_tokens_only(options: dict[str, float], allowed: set[int]) -> None:
    logits = torch.tensor([0.1, 0.25, 0.1, 0.55]).log().expand(2000, 4)
    arguments = {"top_k": None, "top_p": None} | options
    drawn = choose(logits, 1.0, generator=torch.Generator().manual_seed(0), **arguments)
    assert set(drawn.flatten().tolist()) == allowed


def test_choose_temperature_sharpens_the_distribution() -> None:
    logits = torch.tensor([0.5, 0.3, 0.2]).log().expand(20000, 3)
    drawn = choose(logits, 0.5, None, None, torch.Generator().manual_seed(0)).flatten()
    expected = torch.tensor([0.25, 0.09, 0.04]) / 0.38
    torch.testing.assert_close(drawn.bincount() / 20000, expected, atol=0.02, rtol=0)


@pytest.mark.parametrize(
    "options", [{"temperature": -1.0}, {"top_k": 0}, {"top_p": 0.0}, {"top_p": 1.5}, {"prompt": _tokens(2, 0)}]
)
def test_generate_bad_argument_is_named(options: dict) -> None:
    arguments = {"prompt": _tokens(1, 3)} | options
    with pytest.raises(pyattn.RangeError, match=next(iter(options))):
        generate(_gpt(), count=1, **arguments)


@pytest.mark.parametrize(
    "change", [{"layers": 0}, {"heads": 5}, {"dropout": 1.0}, {"attention": "flash"}, {"context": -1}]
)
def test_gpt_config_bad_value_is_named(change: dict) -> None:
    with pytest.raises(pyattn.RangeError, match=next(iter(change))):
        GPTConfig(**(SIZES | change))


def test_gpt_more_tokens_than_context_is_an_error() -> None:
    with pytest.raises(pyattn.RangeError, match="at most 48"):
        _gpt()(_tokens(1, 49))
