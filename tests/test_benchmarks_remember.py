"""`python -m benchmarks.remember`: the loss of one model by memory, as it would be read in one piece."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from pyattn.benchmarks import remember
from pyattn.models import TransformerXL, TransformerXLConfig
from pyattn.training.language import load_corpus

TEXT = "the quick brown fox jumps over the lazy dog. " * 12


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    (tmp_path / "text.txt").write_text(TEXT)
    source = tmp_path / "text.txt"
    tokenizer = load_corpus(source, tokens="characters", vocab=0, context=8, batch=2, cache=tmp_path).tokenizer
    config = TransformerXLConfig(
        vocab=tokenizer.get_vocab_size(), layers=1, heads=2, width=16, head_size=8, hidden=32, memory=8
    )
    model = TransformerXL(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(10)  # so that its guesses depend on what it reads
    model.save_pretrained(tmp_path / "model")
    tokenizer.save(str(tmp_path / "model" / "tokenizer.json"))
    return tmp_path


def test_loss_with_a_long_memory_is_that_of_the_whole_text(folder: Path) -> None:
    model = TransformerXL.from_pretrained(folder / "model").eval()
    tokens = torch.randint(model.config.vocab, (2, 41))
    logits, _ = model(tokens[:, :-1])  # one layer remembers all that it has read
    expected = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).item()
    assert remember.loss(model, tokens, 40, 8) == pytest.approx(expected, rel=1e-5)
    assert remember.loss(model, tokens, 0, 8) != pytest.approx(expected, rel=1e-5)


def test_remember_prints_a_row_for_each_memory_and_draws(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--model", folder / "model", "--text", folder / "text.txt", "--out", folder / "memory.png"]
    remember.main([*map(str, given), "--memory", "0", "8", "--segment", "16"])
    assert "8 streams of" in capsys.readouterr().out
    assert (folder / "memory.png").read_bytes().startswith(b"\x89PNG")
