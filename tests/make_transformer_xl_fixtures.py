"""Writes fixtures/transformer_xl.safetensors and fixtures/transformer_xl_adaptive.safetensors: what transformers'
TransfoXL computes, for test_transformer_xl_peer.py.

That model was removed in transformers 5, and its last version that runs as it is comes with old companions:

    pip install --no-deps --target old transformers==4.37.2 tokenizers==0.15.2 huggingface_hub==0.20.3
    PYTHONPATH=old python tests/make_transformer_xl_fixtures.py

Of each case there are the tensors of the model's file, its config.json in the header, tokens [b, segments, m], and the
log-probabilities [b, segments, m, vocab] that they get segment by segment, from a memory of zeros on, which the model
attends to. Of adaptive softmaxes there are, too, the losses [b, segments, m - 1] of the tokens behind each segment's
first one, in the order of their parts, and the gradient of their sum for each tensor.
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
SIZES = {"d_model": 8, "d_embed": 8, "n_head": 2, "d_head": 3, "mem_len": 5}
WHOLE = SIZES | {"d_inner": 10, "n_layer": 2, "cutoffs": [], "div_val": 1}
ADAPTIVE = SIZES | {"d_inner": 4, "n_layer": 1, "cutoffs": [3, 5, 8], "same_length": False, "clamp_len": -1}
CASES = {
    "plain": WHOLE | {"same_length": False, "clamp_len": -1},
    "clamp": WHOLE | {"same_length": False, "clamp_len": 3},
    "same length": WHOLE | {"same_length": True, "clamp_len": 0},
    "before": WHOLE | {"pre_lnorm": True, "same_length": False, "clamp_len": 1000},
}
ADAPTIVE_CASES = {
    "shorter": ADAPTIVE | {"div_val": 2},
    "alike": ADAPTIVE | {"div_val": 1},
    "untied": ADAPTIVE | {"div_val": 2, "proj_share_all_but_first": False},
}


def case(**options: object) -> tuple[str, dict[str, Tensor]]:
    """A model's config.json, and its tensors and results."""
    model = TransfoXLLMHeadModel(TransfoXLConfig(vocab_size=VOCAB, **options)).eval()
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
    tensors |= {"tokens": tokens, "log_probs": torch.stack(results, 1)}
    return config, tensors | (learned(model, tokens) if options["cutoffs"] else {})


def learned(model: TransfoXLLMHeadModel, tokens: Tensor) -> dict[str, Tensor]:
    """Losses, segment by segment, and the gradients of their sum."""
    memory, losses = None, []
    for segment in tokens.unbind(1):
        found = model(segment, mems=memory, labels=segment.clone())
        memory = found.mems
        losses.append(found.losses)
    total = torch.stack(losses, 1)
    total.sum().backward()
    return {"losses": total.detach()} | {f"gradient.{name}": p.grad for name, p in model.named_parameters()}


def write(name: str, cases: dict[str, dict[str, object]]) -> None:
    torch.manual_seed(0)
    tensors, metadata = {}, {"versions": json.dumps({"transformers": transformers.__version__})}
    for title, options in cases.items():
        metadata[title], own = case(**options)
        tensors |= {f"{title}/{key}": tensor.contiguous() for key, tensor in own.items()}
    save_file(tensors, Path(__file__).parent / "fixtures" / f"{name}.safetensors", metadata)


if __name__ == "__main__":
    write("transformer_xl", CASES)
    write("transformer_xl_adaptive", ADAPTIVE_CASES)
