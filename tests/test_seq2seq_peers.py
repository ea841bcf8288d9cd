"""Recurrent sequence to sequence held against OpenNMT-py and JoeyNMT: outputs, weights, and gradients.

`make_seq2seq_fixtures.py` wrote what these compute.
"""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from torch.testing import assert_close

import pyattn
from pyattn import registry
from pyattn.models import Seq2Seq, Seq2SeqConfig

FIXTURES = Path(__file__).parent / "fixtures" / "seq2seq.safetensors"
PEERS = load_file(FIXTURES)
FUSED = ["cpu"] if "additive" in registry.BACKENDS["cpu"].features else []
Case = dict[str, Tensor]
SIZES = {"vocab": 9, "context": 8, "width": 3, "hidden": 4}
CASES = {
    "opennmt-feed-lstm-general": {"layers": 2},
    "opennmt-feed-gru-dot": {"layers": 1, "cell": "gru", "score": "dot"},
    "opennmt-std-lstm-general": {"layers": 1, "feed": False},
    "joeynmt-bahdanau-feed-lstm-bridge": {
        "layers": 2, "encoder_hidden": 3, "bridge": "linear", "score": "additive",
    },
    "joeynmt-luong-gru-bridge": {
        "layers": 1, "cell": "gru", "encoder_hidden": 3, "bridge": "linear", "feed": False,
    },
    "joeynmt-luong-feed-gru-last": {"layers": 1, "cell": "gru"},
    "joeynmt-bahdanau-gru-last": {"layers": 1, "cell": "gru", "score": "additive", "feed": False},
}  # fmt: skip


@pytest.fixture(params=["reference", *FUSED], autouse=True)
def backend(request: pytest.FixtureRequest) -> Iterator[None]:
    with pyattn.use_backend(request.param):
        yield


def leaves_of(peer: str) -> Case:
    """What the peer was given and has, its parameters requiring gradients, and what it gave."""
    case = {name.partition("/")[2]: t for name, t in PEERS.items() if name.startswith(f"{peer}/")}
    return {name: t.detach().requires_grad_(f"d_{name}" in case and name != "out") for name, t in case.items()}


def of_opennmt(case: Case, score: str) -> Case:
    """Our parameters, made of its own. The output layer shows o, with which its decoder ends."""
    by_name = {
        "source_embedding.weight": case["encoder.embeddings.make_embedding.emb_luts.0.weight"],
        "target_embedding.weight": case["decoder.embeddings.make_embedding.emb_luts.0.weight"],
        "output.weight": torch.eye(9, 4, dtype=torch.float64),
        "output.bias": torch.zeros(9, dtype=torch.float64),
        "readout.linear.weight": case["decoder.attn.linear_out.weight"].roll(4, 1),  # it reads [c; s]
        "readout.linear.bias": torch.zeros(4, dtype=torch.float64),
    }
    if score == "general":
        by_name["score.key_projection.weight"] = case["decoder.attn.linear_in.weight"].T
    cells = {name: t for name, t in case.items() if re.match(r"decoder\.rnn\.", name)}
    for name, t in cells.items():
        ours = re.sub(r"layers\.(\d)\.(.+)", r"\2_l\1", name.removeprefix("decoder.rnn."))
        by_name[f"lower.layers.{ours}"] = t
    return by_name | encoder_of(case)


def of_joeynmt(case: Case, score: str) -> Case:
    """Our parameters, made of its own."""
    by_name = {
        "source_embedding.weight": case["src_embed.lut.weight"],
        "target_embedding.weight": case["trg_embed.lut.weight"],
        "output.weight": case["decoder.output_layer.weight"],
        "output.bias": torch.zeros(9, dtype=torch.float64),
        "readout.linear.weight": case["decoder.att_vector_layer.weight"],
        "readout.linear.bias": case["decoder.att_vector_layer.bias"],
        "score.key_projection.weight": case["decoder.attention.key_layer.weight"],
    }
    if score == "additive":
        by_name["score.query_projection.weight"] = case["decoder.attention.query_layer.weight"]
        by_name["score.weight"] = case["decoder.attention.energy_layer.weight"]
    bridges = {name: t for name, t in case.items() if name.startswith("decoder.bridge_layer.")}
    by_name |= {name.replace("decoder.bridge_layer", "bridge"): t for name, t in bridges.items()}
    cells = {name: t for name, t in case.items() if name.startswith("decoder.rnn.")}
    by_name |= {name.replace("decoder.rnn", "lower.layers"): t for name, t in cells.items()}
    return by_name | encoder_of(case)


def encoder_of(case: Case) -> Case:
    cells = {name: t for name, t in case.items() if name.startswith("encoder.rnn.")}
    return {name.replace("encoder.rnn", "encoder.layers"): t for name, t in cells.items()}


@pytest.mark.parametrize("attention", ["pyattn", "torch"])
@pytest.mark.parametrize("peer", CASES)
def test_outputs_weights_and_gradients_are_the_peers(peer: str, attention: str) -> None:
    case = leaves_of(peer)
    config = Seq2SeqConfig(**SIZES, **CASES[peer], attention=attention)
    model = Seq2Seq(config).double()
    parameters = (of_opennmt if peer.startswith("opennmt") else of_joeynmt)(case, config.score)
    assert parameters.keys() == dict(model.named_parameters()).keys()

    inputs = (case["source"], case["target"], case["lengths"])
    logits = torch.func.functional_call(model, parameters, inputs)
    out = logits[..., : case["out"].shape[-1]]
    assert_close(out, case["out"])
    leaves = {name: t for name, t in case.items() if t.requires_grad}
    found = torch.autograd.grad((out * case["d_out"]).sum(), list(leaves.values()))
    for name, gradient in zip(leaves, found, strict=True):
        assert_close(gradient, case[f"d_{name}"], msg=lambda text, name=name: f"d_{name}: {text}")

    model.load_state_dict(parameters)
    assert_close(model.alignment(*inputs), case["weights"], check_stride=False)


def test_fixtures_name_the_versions_that_their_script_asks_for() -> None:
    script = (Path(__file__).parent / "make_seq2seq_fixtures.py").read_text("utf-8")
    with safe_open(FIXTURES, "pt") as file:
        versions = {name: value for name, value in file.metadata().items() if name != "torch"}
    assert dict(re.findall(r"([\w-]+)==([\w.]+)", script)) == versions
