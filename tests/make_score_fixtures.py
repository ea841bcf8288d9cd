"""Writes fixtures/scores.safetensors: what Keras, OpenNMT-py and JoeyNMT compute, for test_score_peers.py.

Run where these are installed; pip's --no-deps keeps them from bringing a torch of their own:

    pip install --no-deps keras==3.15.1 optree namex absl-py h5py ml-dtypes rich
    pip install --no-deps OpenNMT-py==3.5.1 joeynmt==2.3.0 importlib_metadata zipp
    KERAS_BACKEND=torch python tests/make_score_fixtures.py

Everything is float64, but Keras sums the values up in float32. Of each case there are its inputs and parameters, out
and weights, d_out, and d_ of every input and parameter for the loss (out * d_out).sum(). The file says which versions
ran.
"""

import importlib.util
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from types import ModuleType

import keras
import torch
from safetensors.torch import save_file
from torch import Tensor

B, M, N, DIM, DV = 2, 3, 4, 4, 3
LENGTHS = torch.tensor([N, 2])


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def case(run: Callable[..., tuple[Tensor, Tensor]], module: torch.nn.Module, **inputs: Tensor) -> dict[str, Tensor]:
    """What `run(**inputs)` gives, which is (out, weights) by the module, whose parameters are drawn anew."""
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(normal(*p.shape))
    inputs = {name: t.requires_grad_() if t.is_floating_point() else t for name, t in inputs.items()}
    out, weights = run(**inputs)
    d_out = normal(*out.shape)
    leaves = {name: t for name, t in inputs.items() if t.requires_grad} | dict(module.named_parameters())
    grads = torch.autograd.grad((out * d_out).sum(), list(leaves.values()))
    results = {"out": out, "weights": weights, "d_out": d_out}
    results |= {f"d_{name}": grad for name, grad in zip(leaves, grads, strict=True)}
    return {name: t.detach().clone() for name, t in (inputs | dict(module.named_parameters()) | results).items()}


def of_keras() -> dict[str, dict[str, Tensor]]:
    keras.config.set_floatx("float64")

    def built(layer: keras.layers.Layer) -> torch.nn.Module:
        layer([normal(B, M, DIM), normal(B, N, DIM)])
        holder = torch.nn.Module()  # the layer's own names for its parameters are paths
        for weight in layer.trainable_variables:
            holder.register_parameter(weight.name, weight.value)
        return holder

    def three() -> dict[str, Tensor]:
        return {"query": normal(B, M, DIM), "value": normal(B, N, DV), "key": normal(B, N, DIM)}

    additive = keras.layers.AdditiveAttention()
    concat = keras.layers.Attention(use_scale=True, score_mode="concat")
    query_mask, value_mask = torch.arange(M) < torch.tensor([[3], [2]]), torch.arange(N) < LENGTHS[:, None]
    return {
        "keras-additive": case(
            lambda query, value, key: additive([query, value, key], return_attention_scores=True),
            built(additive), **three(),
        ),
        "keras-additive-masked": case(
            lambda query, value, key, query_mask, value_mask: additive(
                [query, value, key], mask=[query_mask, value_mask], return_attention_scores=True
            ),
            built(additive), **three(), query_mask=query_mask, value_mask=value_mask,
        ),
        "keras-additive-causal": case(
            lambda query, value: additive([query, value], return_attention_scores=True, use_causal_mask=True),
            built(additive), query=normal(B, M, DIM), value=normal(B, N, DIM),
        ),
        "keras-concat": case(
            lambda query, value, key: concat([query, value, key], return_attention_scores=True),
            built(concat), **three(),
        ),
    }  # fmt: skip


def of_opennmt() -> dict[str, dict[str, Tensor]]:
    # The package's own modules import a tokenizer and more; these three need nothing but torch.
    folder = Path(importlib.util.find_spec("onmt").submodule_search_locations[0])
    for name in ("onmt", "onmt.modules", "onmt.utils"):
        sys.modules[name] = ModuleType(name)
        sys.modules[name].__path__ = [str(folder.joinpath(*name.split(".")[1:]))]
    from onmt.modules.global_attention import GlobalAttention

    def of_type(attn_type: str) -> dict[str, Tensor]:
        module = GlobalAttention(DIM, attn_type=attn_type).double()
        return case(
            lambda query, memory, lengths: module(query, memory, lengths),
            module, query=normal(B, M, DIM), memory=normal(B, N, DIM), lengths=LENGTHS,
        )  # fmt: skip

    return {f"opennmt-{attn_type}": of_type(attn_type) for attn_type in ("dot", "general", "mlp")}


def of_joeynmt() -> dict[str, dict[str, Tensor]]:
    folder = Path(importlib.util.find_spec("joeynmt").submodule_search_locations[0])
    sys.modules["joeynmt"] = ModuleType("joeynmt")
    sys.modules["joeynmt"].__path__ = [str(folder)]
    from joeynmt.attention import BahdanauAttention, LuongAttention

    def of_module(module: torch.nn.Module, query_size: int) -> dict[str, Tensor]:
        def run(query: Tensor, memory: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
            module.compute_proj_keys(memory)
            return module(query, mask, memory)

        mask = (torch.arange(N) < LENGTHS[:, None])[:, None]
        return case(run, module, query=normal(B, 1, query_size), memory=normal(B, N, DIM), mask=mask)

    return {
        "joeynmt-bahdanau": of_module(BahdanauAttention(5, DIM, DV).double(), DV),
        "joeynmt-luong": of_module(LuongAttention(DV, DIM).double(), DV),
    }


if __name__ == "__main__":
    torch.manual_seed(0)
    tensors = {
        f"{name}/{key}": t
        for peer in (of_keras, of_opennmt, of_joeynmt)
        for name, results in peer().items()
        for key, t in results.items()
    }
    versions = {name: version(name) for name in ("torch", "keras", "OpenNMT-py", "joeynmt")}
    path = Path(__file__).parent / "fixtures" / "scores.safetensors"
    path.parent.mkdir(exist_ok=True)
    save_file(tensors, path, versions)
    print(f"{path.name}: {len(tensors)} tensors, {path.stat().st_size} bytes, {versions}")
