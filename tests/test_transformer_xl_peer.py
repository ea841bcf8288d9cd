"""Transformer-XL held against transformers' TransfoXL, whose folders it reads.

`make_transformer_xl_fixtures.py` wrote what that computes.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.testing import assert_close

from pyattn.models import PretrainedError, TransformerXL

FIXTURES = [Path(__file__).parent / "fixtures" / f"transformer_xl{kind}.safetensors" for kind in ("", "_adaptive")]
PEERS = load_file(FIXTURES[0]) | load_file(FIXTURES[1])
ADAPTIVE = {
    "shorter": {"cutoffs": (3, 5, 8), "div_val": 2, "tie_projections": True},
    "alike": {"cutoffs": (3, 5, 8), "div_val": 1},
    "untied": {"cutoffs": (3, 5, 8), "div_val": 2, "tie_projections": False},
}
CASES = {"plain": {}, "clamp": {"clamp": 3}, "same length": {"same_length": True}, "before": {"norm": "pre"}} | ADAPTIVE

pytestmark = pytest.mark.usefixtures("one_thread")


def _named(prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): tensor for key, tensor in PEERS.items() if key.startswith(prefix)}


def _folder(name: str, folder: Path, **changes: object) -> Path:
    """The folder that transformers wrote, with changes to its config.json."""
    save_file(_named(f"{name}/file."), folder / "model.safetensors")
    with safe_open(FIXTURES[name in ADAPTIVE], "pt") as file:
        config = json.loads(file.metadata()[name])
    (folder / "config.json").write_text(json.dumps(config | changes))
    return folder


def _zeros(model: TransformerXL) -> Tensor:
    """The memory that theirs begins with."""
    return torch.zeros(model.config.layers, 2, 5, 8)


@torch.no_grad()
@pytest.mark.parametrize("name", CASES)
def test_segments_equal_transformers(tmp_path: Path, name: str, attention: str) -> None:
    model = TransformerXL.from_pretrained(_folder(name, tmp_path), attention=attention)
    for option, value in CASES[name].items():
        assert getattr(model.config, option) == value
    memory = _zeros(model)
    for segment, expected in zip(*(PEERS[f"{name}/{key}"].unbind(1) for key in ("tokens", "log_probs")), strict=True):
        logits, memory = model(segment, memory)
        assert_close(logits.log_softmax(-1), expected, atol=2e-5, rtol=0)
        if name in ADAPTIVE:
            assert_close(logits, expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize("name", ADAPTIVE)
def test_losses_and_every_gradient_equal_transformers(tmp_path: Path, name: str, attention: str) -> None:
    model = TransformerXL.from_pretrained(_folder(name, tmp_path), attention=attention)
    memory, losses = _zeros(model), []
    for segment in PEERS[f"{name}/tokens"].unbind(1):
        found, memory = model(segment, memory, targets=segment.roll(-1, 1))
        losses.append(found[:, :-1])  # theirs have no token behind the last
    expected = PEERS[f"{name}/losses"]
    assert_close(
        torch.stack(losses, 1).transpose(0, 1).flatten(1).sort().values,
        expected.transpose(0, 1).flatten(1).sort().values,
        atol=2e-5,
        rtol=0,
    )
    torch.stack(losses).sum().backward()
    gradients = {model.current_name(key): gradient for key, gradient in _named(f"{name}/gradient.").items()}
    assert gradients.keys() == dict(model.named_parameters()).keys()
    for key, parameter in model.named_parameters():
        assert_close(parameter.grad, gradients[key], atol=1e-4, rtol=0, msg=lambda text, key=key: f"{key}: {text}")


def test_copies_of_what_is_tied_are_not_read(tmp_path: Path) -> None:
    """Files that were no safetensors had them."""
    expected = TransformerXL.from_pretrained(_folder("shorter", tmp_path))
    tensors = _named("shorter/file.")
    for i in range(4):
        tensors[f"crit.out_layers.{i}.weight"] = tensors[f"transformer.word_emb.emb_layers.{i}.weight"].clone()
    for i in range(1, 4):
        tensors[f"crit.out_projs.{i}"] = tensors[f"transformer.word_emb.emb_projs.{i}"].clone()
    save_file(tensors, tmp_path / "model.safetensors")
    model = TransformerXL.from_pretrained(tmp_path)
    assert all(map(torch.equal, model.parameters(), expected.parameters()))


@pytest.mark.parametrize("name", ["before", *ADAPTIVE])
def test_their_folder_becomes_ours(tmp_path: Path, name: str) -> None:
    model = TransformerXL.from_pretrained(_folder(name, tmp_path))
    (tmp_path / "ours").mkdir()
    model.save_pretrained(tmp_path / "ours")
    again = TransformerXL.from_pretrained(tmp_path / "ours")
    assert again.config == model.config
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cutoffs": [4]}, r"expected tie_projs \[False, True\] or \[False, False\]"),
        ({"cutoffs": [4], "tie_projs": [False, True]}, "missing: adaptive.cluster_weight, "),
        ({"cutoffs": "none"}, "expected a list of whole numbers for cutoffs"),
        ({"cutoffs": [True]}, "expected a list of whole numbers for cutoffs"),
        (
            {"cutoffs": [4, 2], "tie_projs": [False, True, True]},
            "cutoffs: expected increasing numbers",
        ),
        ({"div_val": 4}, "expected div_val 1"),
        ({"d_embed": 4}, "expected d_embed 8"),
        ({"attn_type": 1}, "expected attn_type 0"),
        ({"untie_r": False}, "expected untie_r True"),
        ({"architectures": ["TransfoXLForSequenceClassification"]}, "expected architectures .*TransfoXLLMHeadModel"),
        ({"mem_len": None}, "has no mem_len"),
        ({"n_layer": 3}, r"missing: layers\.2\."),
        ({"n_layer": 1}, r"unknown: layers\.1\."),
    ],
    ids=str,
)
def test_folder_of_another_model_is_refused(tmp_path: Path, change: dict[str, object], message: str) -> None:
    with pytest.raises(PretrainedError, match=message):
        TransformerXL.from_pretrained(_folder("plain", tmp_path, **change))
