"""Writes fixtures/seq2seq.safetensors: what the recurrent models of OpenNMT-py and JoeyNMT compute, for
test_seq2seq_peers.py.

Run where these are installed; pip's --no-deps keeps them from bringing a torch of their own:

    pip install --no-deps OpenNMT-py==3.5.1 joeynmt==2.3.0 pyyaml
    python tests/make_seq2seq_fixtures.py

Everything is float64 and without dropout. A case has source, lengths and target; every parameter by the package's own
name; out, d_out, and d_ of every parameter for the loss (out * d_out).sum(); and weights, [b, m, n]. Of OpenNMT-py out
is the attentional vectors, which its decoder ends with; its "mlp" attention has no tanh there, as no model of ours.
Of JoeyNMT out is the logits, and there are its vectors as well. The file says which versions ran.
"""

import importlib.util
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from types import ModuleType

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

B, M, N = 3, 4, 5
WIDTH, HIDDEN, VOCAB = 3, 4, 9
PAD, START = 0, 1


def case(run: Callable[..., dict[str, Tensor]], module: nn.Module, lengths: list[int]) -> dict[str, Tensor]:
    """What `run(source, lengths, target)` gives by the module, whose parameters are drawn anew."""
    module.double()
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn(p.shape, dtype=torch.float64))
    tokens = torch.randint(START + 1, VOCAB, (B, N + M))
    source, target = tokens.split([N, M], 1)
    inputs = {"source": source, "lengths": torch.tensor(lengths), "target": target}
    source[torch.arange(N) >= inputs["lengths"][:, None]] = PAD
    target[:, 0] = START
    results = run(**inputs)
    results["d_out"] = torch.randn_like(results["out"])
    parameters = dict(module.named_parameters())
    grads = torch.autograd.grad((results["out"] * results["d_out"]).sum(), list(parameters.values()))
    results |= {f"d_{name}": grad for name, grad in zip(parameters, grads, strict=True)}
    return {name: t.detach().contiguous() for name, t in (inputs | parameters | results).items()}


def of_opennmt() -> dict[str, dict[str, Tensor]]:
    # The packages' own modules import a tokenizer and more; the recurrent ones need nothing but torch.
    folder = Path(importlib.util.find_spec("onmt").submodule_search_locations[0])
    for name in ("onmt", "onmt.modules", "onmt.utils", "onmt.encoders", "onmt.decoders"):
        sys.modules[name] = ModuleType(name)
        sys.modules[name].__path__ = [str(folder.joinpath(*name.split(".")[1:]))]
    from onmt.modules.embeddings import Embeddings
    from onmt.modules.gate import context_gate_factory
    from onmt.modules.global_attention import GlobalAttention

    sys.modules["onmt.modules"].context_gate_factory = context_gate_factory
    sys.modules["onmt.modules"].GlobalAttention = GlobalAttention
    from onmt.decoders.decoder import InputFeedRNNDecoder, StdRNNDecoder
    from onmt.encoders.rnn_encoder import RNNEncoder

    def of_decoder(decoder_type: type, cell: str, layers: int, attn_type: str) -> dict[str, Tensor]:
        encoder = RNNEncoder(cell, True, layers, HIDDEN, embeddings=Embeddings(WIDTH, VOCAB, PAD))
        decoder = decoder_type(cell, True, layers, HIDDEN, attn_type, embeddings=Embeddings(WIDTH, VOCAB, PAD))

        def run(source: Tensor, lengths: Tensor, target: Tensor) -> dict[str, Tensor]:
            source, target = source[..., None], target[..., None]  # one feature a token
            memory, last, _ = encoder(source, lengths)
            decoder.init_state(source, memory, last)
            out, attentions = decoder(target, memory, src_len=lengths)
            weights = attentions["std"]
            return {"out": out, "weights": weights.transpose(0, 1) if decoder_type is InputFeedRNNDecoder else weights}

        return case(run, nn.ModuleDict({"encoder": encoder, "decoder": decoder}), lengths=[5, 3, 4])

    return {
        "opennmt-feed-lstm-general": of_decoder(InputFeedRNNDecoder, "LSTM", 2, "general"),
        "opennmt-feed-gru-dot": of_decoder(InputFeedRNNDecoder, "GRU", 1, "dot"),
        "opennmt-std-lstm-general": of_decoder(StdRNNDecoder, "LSTM", 1, "general"),
    }


def of_joeynmt() -> dict[str, dict[str, Tensor]]:
    folder = Path(importlib.util.find_spec("joeynmt").submodule_search_locations[0])
    sys.modules["joeynmt"] = ModuleType("joeynmt")
    sys.modules["joeynmt"].__path__ = [str(folder)]
    # These import plots, tokenizers and more. Nothing that runs here calls them.
    for name, unused in (("helpers", ("freeze_params", "subsequent_mask")), ("vocabulary", ("Vocabulary",))):
        sys.modules[f"joeynmt.{name}"] = ModuleType(name)
        sys.modules[f"joeynmt.{name}"].__dict__.update(dict.fromkeys(unused))
    from joeynmt.decoders import RecurrentDecoder
    from joeynmt.embeddings import Embeddings
    from joeynmt.encoders import RecurrentEncoder

    def of_decoder(cell: str, layers: int, encoder_hidden: int, **options: object) -> dict[str, Tensor]:
        encoder = RecurrentEncoder(cell, encoder_hidden, WIDTH, layers)
        decoder = RecurrentDecoder(cell, WIDTH, HIDDEN, encoder, num_layers=layers, vocab_size=VOCAB, **options)
        embeddings = {name: Embeddings(WIDTH, vocab_size=VOCAB, padding_idx=PAD) for name in ("src_embed", "trg_embed")}
        model = nn.ModuleDict(embeddings | {"encoder": encoder, "decoder": decoder})

        def run(source: Tensor, lengths: Tensor, target: Tensor) -> dict[str, Tensor]:
            mask = (source != PAD)[:, None]
            memory, last = encoder(model["src_embed"](source), lengths, mask)
            out, _, weights, vectors = decoder(model["trg_embed"](target), memory, last, mask, unroll_steps=M)
            return {"out": out, "weights": weights, "vectors": vectors}

        return case(run, model, lengths=[5, 4, 3])  # it takes nothing but falling lengths

    return {
        "joeynmt-bahdanau-feed-lstm-bridge": of_decoder("lstm", 2, 3, attention="bahdanau"),
        "joeynmt-luong-gru-bridge": of_decoder("gru", 1, 3, attention="luong", input_feeding=False),
        "joeynmt-luong-feed-gru-last": of_decoder("gru", 1, HIDDEN // 2, attention="luong", init_hidden="last"),
        "joeynmt-bahdanau-gru-last": of_decoder(
            "gru", 1, HIDDEN // 2, attention="bahdanau", init_hidden="last", input_feeding=False
        ),
    }


if __name__ == "__main__":
    torch.manual_seed(0)
    tensors = {
        f"{name}/{key}": t
        for peer in (of_opennmt, of_joeynmt)
        for name, results in peer().items()
        for key, t in results.items()
    }
    versions = {name: version(name) for name in ("torch", "OpenNMT-py", "joeynmt")}
    path = Path(__file__).parent / "fixtures" / "seq2seq.safetensors"
    path.parent.mkdir(exist_ok=True)
    save_file(tensors, path, versions)
    print(f"{path.name}: {len(tensors)} tensors, {path.stat().st_size} bytes, {versions}")
