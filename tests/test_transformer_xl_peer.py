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
from torch.testing import assert_close

from pyattn.models import PretrainedError, TransformerXL

FIXTURES = Path(__file__).parent / "fixtures" / "transformer_xl.safetensors"
PEERS = load_file(FIXTURES)
CASES = {"plain": {}, "clamp": {"clamp": 3}, "same length": {"same_length": True}, "before": {"norm": "pre"}}

pytestmark = pytest.mark.usefixtures("one_thread")


def _folder(name: str, folder: Path, **changes: object) -> Path:
    """The folder that transformers wrote, with changes to its config.json."""
    tensors = {key.partition("/file.")[2]: t for key, t in PEERS.items() if key.startswith(f"{name}/file.")}
    save_file(tensors, folder / "model.safetensors")
    with safe_open(FIXTURES, "pt") as file:
        config = json.loads(file.metadata()[name])
    (folder / "config.json").write_text(json.dumps(config | changes))
    return folder


@torch.no_grad()
@pytest.mark.parametrize("name", CASES)
def test_segments_equal_transformers(tmp_path: Path, name: str, attention: str) -> None:
    model = TransformerXL.from_pretrained(_folder(name, tmp_path), attention=attention)
    for option, value in CASES[name].items():
        assert getattr(model.config, option) == value
    memory = torch.zeros(2, 2, 5, 8)
    for segment, expected in zip(*(PEERS[f"{name}/{key}"].unbind(1) for key in ("tokens", "log_probs")), strict=True):
        logits, memory = model(segment, memory)
        assert_close(logits.log_softmax(-1), expected, atol=2e-5, rtol=0)


def test_their_folder_becomes_ours(tmp_path: Path) -> None:
    model = TransformerXL.from_pretrained(_folder("before", tmp_path))
    (tmp_path / "ours").mkdir()
    model.save_pretrained(tmp_path / "ours")
    again = TransformerXL.from_pretrained(tmp_path / "ours")
    assert again.config == model.config
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cutoffs": [4]}, r"expected cutoffs \[\]"),
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
