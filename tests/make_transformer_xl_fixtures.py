"""Writes fixtures/transformer_xl.safetensors: what transformers' TransfoXL computes, for test_transformer_xl_peer.py.

That model was removed in transformers 5, and its last version that runs as it is comes with old companions:

    pip install --no-deps --target old transformers==4.37.2 tokenizers==0.15.2 huggingface_hub==0.20.3
    PYTHONPATH=old python tests/make_transformer_xl_fixtures.py

Of each case there are the tensors of the model's file, its config.json in the header, tokens [b, segments, m], and the
log-probabilities [b, segments, m, vocab] that they get segment by segment, from a memory of zeros on, which the model
attends to.
"""

import json
import tempfile
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import TransfoXLConfig, TransfoXLLMHeadModel

VOCAB, B, SEGMENTS, M = 11, 2, 3, 4
SIZES = {"d_model": 8, "d_embed": 8, "n_head": 2, "d_head": 3, "d_inner": 10, "n_layer": 2, "mem_len": 5}
CASES = {
    "plain": {"same_length": False, "clamp_len": -1},
    "clamp": {"same_length": False, "clamp_len": 3},
    "same length": {"same_length": True, "clamp_len": 0},
    "before": {"pre_lnorm": True, "same_length": False, "clamp_len": 1000},
}


def case(**options: object) -> tuple[str, dict[str, Tensor]]:
    """A model's config.json, and its tensors and results."""
    fields = {"vocab_size": VOCAB, "cutoffs": [], "div_val": 1} | SIZES
    model = TransfoXLLMHeadModel(TransfoXLConfig(**(fields | options))).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
        tokens, memory, results = torch.randint(VOCAB, (B, SEGMENTS, M)), None, []
        for segment in tokens.unbind(1):
            found = model(segment, mems=memory)
            memory = found.mems
            results.append(found.prediction_scores)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, safe_serialization=True)
        tensors = {f"file.{name}": tensor for name, tensor in load_file(Path(folder) / "model.safetensors").items()}
        config = (Path(folder) / "config.json").read_text()
    return config, tensors | {"tokens": tokens, "log_probs": torch.stack(results, 1)}


def main() -> None:
    torch.manual_seed(0)
    tensors, metadata = {}, {"versions": json.dumps({"transformers": transformers.__version__})}
    for name, options in CASES.items():
        metadata[name], own = case(**options)
        tensors |= {f"{name}/{key}": tensor.contiguous() for key, tensor in own.items()}
    save_file(tensors, Path(__file__).parent / "fixtures" / "transformer_xl.safetensors", metadata)


if __name__ == "__main__":
    main()
