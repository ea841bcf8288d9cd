"""GPT held against transformers' GPT-1 and GPT-2, and reading step by step against reading at once."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

import pyattn
from pyattn.models.gpt import GPT, PUBLISHED, GPTConfig

SIZES = {"vocab": 97, "context": 48, "layers": 3, "heads": 4, "width": 32}


pytestmark = pytest.mark.usefixtures("one_thread")


def _tokens(b: int, m: int, seed: int = 0) -> Tensor:
    return torch.randint(0, SIZES["vocab"], (b, m), generator=torch.Generator().manual_seed(seed))


def _gpt(attention: str = "torch", **options: object) -> GPT:
    torch.manual_seed(0)
    model = GPT(GPTConfig(**SIZES, attention=attention, **options))  # type: ignore[arg-type]
    with torch.no_grad():
        for parameter in model.parameters():  # larger than at the start, so that every part shows in the logits
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def _transformers_class(norm: str) -> type:
    transformers = pytest.importorskip("transformers")
    return {"pre": transformers.GPT2LMHeadModel, "post": transformers.OpenAIGPTLMHeadModel}[norm]


@pytest.mark.parametrize("norm", ["pre", "post"])
def test_gpt_logits_and_gradients_equal_transformers(tmp_path: Path, attention: str, norm: str) -> None:
    model = _gpt(attention, norm=norm)
    model.save_pretrained(tmp_path)
    options = {"attn_implementation": "eager"} if norm == "pre" else {}
    peer = _transformers_class(norm).from_pretrained(tmp_path, **options).eval()
    tokens, targets = _tokens(2, 48), _tokens(2, 48, seed=1)
    logits, expected = model(tokens), peer(tokens).logits
    torch.testing.assert_close(logits, expected, atol=2e-5, rtol=0)
    for result in (logits, expected):
        F.cross_entropy(result.flatten(0, 1), targets.flatten()).backward()
    ours = dict(model.named_parameters())
    for parameter in ours.values():
        parameter.data = parameter.grad  # so that `stored` gives the gradients by their names in the file
    theirs = dict(peer.named_parameters())
    for name, grad in model.stored().items():
        difference = (grad - theirs[name].grad).norm() / theirs[name].grad.norm()
        assert difference < 1e-4, (name, difference)


@pytest.mark.parametrize("norm", ["pre", "post"])
@pytest.mark.parametrize("shards", ["5GB", "20KB"])
def test_gpt_from_the_folder_of_transformers(tmp_path: Path, norm: str, shards: str) -> None:
    model = _gpt(norm=norm)
    model.save_pretrained(tmp_path / "ours", max_shard_size=shards)
    peer = _transformers_class(norm).from_pretrained(tmp_path / "ours").eval()
    peer.save_pretrained(tmp_path / "theirs", max_shard_size=shards)
    assert (tmp_path / "theirs" / "model.safetensors.index.json").exists() == (shards == "20KB")
    again = GPT.from_pretrained(tmp_path / "theirs", attention="pyattn")
    assert again.config == replace(model.config, attention="pyattn")
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


def test_gpt_reads_files_without_prefix_with_masks_and_head(tmp_path: Path) -> None:
    """As the released gpt2 is stored, and as transformers once saved it."""
    model = _gpt()
    model.save_pretrained(tmp_path)
    stored = {name.removeprefix("transformer."): t.detach().clone().contiguous() for name, t in model.stored().items()}
    stored |= {"h.0.attn.bias": torch.ones(1, 1, 48, 48), "h.0.attn.masked_bias": torch.tensor(-1e4)}
    stored["lm_head.weight"] = stored["wte.weight"].clone()
    save_file(stored, tmp_path / "model.safetensors")
    assert torch.equal(GPT.from_pretrained(tmp_path).wte.weight, model.wte.weight)


# Parameters as the papers and releases state them, in millions.
@pytest.mark.parametrize(
    ("name", "millions"),
    [("openai-gpt", 117), ("gpt2", 124), ("gpt2-medium", 355), ("gpt2-large", 774), ("gpt2-xl", 1558)],
)
def test_gpt_published_sizes(name: str, millions: int) -> None:
    with torch.device("meta"):
        model = GPT(PUBLISHED[name])
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.6)


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


@torch.no_grad()
@pytest.mark.parametrize("page", [None, 4, 7])
def test_gpt_step_by_step_equals_the_whole(attention: str, page: int | None) -> None:
    """Unequal prompts, then rows that multiply, change places and go."""
    model, orders = _gpt(attention), {0: [0, 0, 1, 1, 1, 2], 4: [5, 3, 3, 0, 1, 0], 5: [1, 0, 2, 4, 3, 5], 9: [0, 2, 5]}
    tokens, lengths = _tokens(3, 20), torch.tensor([7, 20, 13])
    logits, state = model.prefill(tokens, lengths, count=20, page=page)
    texts = [row[:length].tolist() for row, length in zip(tokens, lengths, strict=True)]
    assert state.read == texts
    for step in range(20):
        for text, found in zip(texts, logits, strict=True):
            torch.testing.assert_close(found, model(torch.tensor([text]))[0, -1], atol=2e-5, rtol=0)
        if step in orders:
            state.reorder(orders[step])
            texts = [list(texts[row]) for row in orders[step]]
        new = _tokens(1, len(texts), seed=step)[0]
        for text, token in zip(texts, new.tolist(), strict=True):
            text.append(token)
        logits = model.step(new, state)
    with pytest.raises(pyattn.RangeError, match="at most 40"):
        model.step(_tokens(1, 3)[0], state)


@pytest.mark.parametrize(
    "change", [{"layers": 0}, {"heads": 5}, {"dropout": 1.0}, {"attention": "flash"}, {"context": -1}, {"norm": "no"}]
)
def test_gpt_config_bad_value_is_named(change: dict) -> None:
    with pytest.raises(pyattn.RangeError, match=next(iter(change))):
        GPTConfig(**(SIZES | change))


def test_gpt_more_tokens_than_context_is_an_error() -> None:
    with pytest.raises(pyattn.RangeError, match="at most context=48"):
        _gpt()(_tokens(1, 49))


def test_gpt_token_outside_the_vocabulary_is_named() -> None:
    with pytest.raises(pyattn.RangeError, match=r"tokens: expected values in \[0, 97\), got 3 to 97"):
        _gpt()(torch.tensor([[3, 97]]))
    with pytest.raises(pyattn.DtypeError, match="tokens: expected int64 or int32, got float32"):
        _gpt()(torch.zeros(1, 3))
