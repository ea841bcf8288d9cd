"""Folders of models: what is refused, and that it is named; what a failure leaves behind."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from pyattn.models.gpt import GPT, GPTConfig
from pyattn.models.pretrained import Pretrained, PretrainedError
from pyattn.models.transformer import Transformer, TransformerConfig
from pyattn.models.xlnet import XLNetConfig, XLNetLMHead

MODELS: dict[str, Callable[[], Pretrained]] = {
    "gpt": lambda: GPT(GPTConfig(vocab=31, context=8, layers=1, heads=2, width=8)),
    "transformer": lambda: Transformer(
        TransformerConfig(vocab=31, context=8, layers=1, heads=2, width=8, hidden=12, dropout=0.1)
    ),
}
# Of each model: an embedding in its file, and a tensor that is a view of a parameter there.
EMBEDDING = {"gpt": "transformer.wte.weight", "transformer": "model.shared.weight"}
VIEW = {
    "gpt": "transformer.h.0.attn.c_attn.weight",
    "transformer": "model.encoder.layers.0.self_attn.k_proj.weight",
}


@pytest.fixture(params=MODELS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


def _saved(kind: str, folder: Path, **options: str) -> Pretrained:
    torch.manual_seed(0)
    model = MODELS[kind]()
    model.save_pretrained(folder, **options)
    return model


def _change(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def _refused(kind: str, folder: Path, *words: str) -> None:
    with pytest.raises(PretrainedError) as caught:
        type(MODELS[kind]()).from_pretrained(folder)
    for word in words:
        assert word in str(caught.value)


def test_pretrained_names_every_tensor_that_does_not_fit(kind: str, tmp_path: Path) -> None:
    model = _saved(kind, tmp_path)

    def change(tensors: dict[str, Tensor]) -> None:
        del tensors[VIEW[kind]]
        tensors["extra.weight"] = torch.zeros(2)
        tensors[EMBEDDING[kind]] = torch.zeros(30, 8)

    _change(tmp_path, change)
    missing, unknown = f"missing: {VIEW[kind]}", "unknown: "
    _refused(
        kind, tmp_path, missing, unknown, "extra.weight", f"of another shape: {EMBEDDING[kind]} [30, 8] for [31, 8]"
    )
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(PretrainedError):
        model.load_stored({name: t + 1 for name, t in load_file(tmp_path / "model.safetensors").items()}, tmp_path)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_pretrained_many_missing_tensors_are_counted(kind: str, tmp_path: Path) -> None:
    _saved(kind, tmp_path)
    _change(tmp_path, dict.clear)
    _refused(kind, tmp_path, "missing: ", " more")


def test_pretrained_model_is_read_in_eval_mode_with_changes(kind: str, tmp_path: Path) -> None:
    model = _saved(kind, tmp_path)
    again = type(model).from_pretrained(tmp_path, dropout=0.2, attention="torch")
    assert not again.training
    assert (again.config.dropout, again.config.attention) == (0.2, "torch")
    assert type(model).from_pretrained(tmp_path).config == model.config
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in model.state_dict().items())


def test_pretrained_pickle_is_refused(kind: str, tmp_path: Path) -> None:
    model = _saved(kind, tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    _refused(kind, tmp_path, "model.safetensors", "pytorch_model.bin is a pickle")
    (tmp_path / "pytorch_model.bin").unlink()
    _refused(kind, tmp_path, "expected model.safetensors or model.safetensors.index.json in")


@pytest.mark.parametrize("text", [b"", b"{", b"[1]", b"\xff\xfe"])
def test_pretrained_damaged_config_is_named(kind: str, tmp_path: Path, text: bytes) -> None:
    _saved(kind, tmp_path)
    (tmp_path / "config.json").write_bytes(text)
    _refused(kind, tmp_path, str(tmp_path / "config.json"), "is damaged")


@pytest.mark.parametrize("text", [b'{"a":' * 100_000, b'{"vocab_size": ' + b"1" * 5000 + b"}"], ids=["deep", "digits"])
def test_pretrained_config_that_python_gives_up_is_named(kind: str, tmp_path: Path, text: bytes) -> None:
    _saved(kind, tmp_path)
    (tmp_path / "config.json").write_bytes(text)
    _refused(kind, tmp_path, str(tmp_path / "config.json"), "is damaged")


@pytest.mark.parametrize("size", [10**9, 2**40, 2**62])
def test_pretrained_config_that_asks_for_more_than_memory_is_refused(kind: str, tmp_path: Path, size: int) -> None:
    """A few bytes beside small weights: what they ask for is held against the weights before it is made."""
    _saved(kind, tmp_path)
    path = tmp_path / "config.json"
    fields = json.loads(path.read_text())
    words = "vocab", "layer", "embd", "d_model", "hidden", "intermediate", "ffn", "position"
    for name, value in fields.items():
        if isinstance(value, int) and not isinstance(value, bool) and any(word in name for word in words):
            path.write_text(json.dumps(fields | {name: size}))
            with pytest.raises(PretrainedError, match=str(tmp_path)):
                type(MODELS[kind]()).from_pretrained(tmp_path)


def test_pretrained_weights_that_are_no_numbers_are_named(kind: str, tmp_path: Path) -> None:
    model = _saved(kind, tmp_path)
    name, tensor = next(iter(model.stored().items()))
    with torch.no_grad():
        tensor.view(-1)[0] = torch.nan
    model.save_pretrained(tmp_path)
    _refused(kind, tmp_path, f"the tensors of {tmp_path} hold NaN or infinity: {name}")


def test_pretrained_missing_config_is_named(kind: str, tmp_path: Path) -> None:
    _refused(kind, tmp_path, str(tmp_path / "config.json"), "there is none")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_pretrained_pipe_in_the_place_of_a_config_is_not_waited_for(kind: str, tmp_path: Path) -> None:
    model = _saved(kind, tmp_path)
    (tmp_path / "config.json").unlink()
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(PretrainedError, match=r"expected a file .*config\.json"):
        type(model).from_pretrained(tmp_path)


def test_pretrained_name_on_the_hub_is_refused_and_says_how_to_get_its_folder(kind: str) -> None:
    _refused(kind, Path("gpt2"), "there is no gpt2", "huggingface_hub.snapshot_download")


def test_pretrained_missing_field_is_named(kind: str, tmp_path: Path) -> None:
    _saved(kind, tmp_path)
    path = tmp_path / "config.json"
    fields = json.loads(path.read_text())
    for value in ({}, {"vocab_size": None}):
        path.write_text(json.dumps({name: v for name, v in fields.items() if name != "vocab_size"} | value))
        _refused(kind, tmp_path, str(path), "has no vocab_size")


@pytest.mark.parametrize("change", [{"vocab_size": 0}, {"n_head": 3, "encoder_attention_heads": 3}])
def test_pretrained_impossible_size_is_named(kind: str, tmp_path: Path, change: dict) -> None:
    _saved(kind, tmp_path)
    path = tmp_path / "config.json"
    fields = json.loads(path.read_text()) | change
    if kind == "transformer":
        fields |= {
            "decoder_vocab_size": fields["vocab_size"],
            "decoder_attention_heads": fields["encoder_attention_heads"],
        }
    path.write_text(json.dumps(fields))
    _refused(kind, tmp_path, f"{path} is damaged (")


def test_pretrained_folder_of_another_model_is_refused(kind: str, tmp_path: Path) -> None:
    for other in MODELS.keys() - {kind}:
        _saved(other, tmp_path)
        _refused(kind, tmp_path, "expected model_type", "got ")


def test_pretrained_truncated_weights_are_named(kind: str, tmp_path: Path) -> None:
    _saved(kind, tmp_path)
    path = tmp_path / "model.safetensors"
    whole = path.read_bytes()
    for size in (0, 5, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        _refused(kind, tmp_path, str(path), "truncated or damaged")


def test_pretrained_missing_shard_is_named(kind: str, tmp_path: Path) -> None:
    _saved(kind, tmp_path, max_shard_size="1KB")
    shard = sorted(tmp_path.glob("model-*.safetensors"))[1]
    shard.unlink()
    _refused(kind, tmp_path, str(shard), "there is none")


@pytest.mark.parametrize(
    "weight_map", [None, ["a"], {"a": 1}, {"a": "../model.safetensors"}, {"a": "/model.safetensors"}]
)
def test_pretrained_damaged_index_is_refused(kind: str, tmp_path: Path, weight_map: object) -> None:
    """Also one that names files outside the folder."""
    _saved(kind, tmp_path / "folder", max_shard_size="1KB")
    (tmp_path / "folder" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    _saved(kind, tmp_path)
    _refused(kind, tmp_path / "folder", "model.safetensors.index.json is damaged")


@pytest.mark.parametrize("shards", [("5GB", "1KB"), ("1KB", "5GB")])
def test_pretrained_saving_replaces_an_older_model(kind: str, tmp_path: Path, shards: tuple[str, str]) -> None:
    for size in shards:
        model = _saved(kind, tmp_path, max_shard_size=size)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(1.0)
    model.save_pretrained(tmp_path, max_shard_size=shards[1])
    again = type(model).from_pretrained(tmp_path)
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in model.state_dict().items())


def test_pretrained_failed_save_leaves_the_older_model(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = _saved(kind, tmp_path)
    files = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def fail(*_: object, **__: object) -> None:
        raise OSError("no space")

    monkeypatch.setattr("safetensors.torch.save_file", fail)
    with torch.no_grad(), pytest.raises(OSError, match="no space"):
        for parameter in model.parameters():
            parameter.add_(1.0)
        model.save_pretrained(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == files


def test_pretrained_shards_hold_no_more_than_asked(kind: str, tmp_path: Path) -> None:
    """Views of one parameter share its memory, and are yet counted and written one by one."""
    model = _saved(kind, tmp_path, max_shard_size="2KB")
    sizes = [sum(t.nbytes for t in load_file(shard).values()) for shard in tmp_path.glob("model-*.safetensors")]
    assert max(sizes) <= 2000
    assert sum(sizes) == sum(t.nbytes for t in model.stored().values())


def test_pretrained_saving_that_fails_keeps_the_old_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The weights come first: a folder never says one thing and holds another."""
    _saved("gpt", tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    replaced: list[str] = []

    def replace(source: Path, target: Path) -> None:
        replaced.append(target.name)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", replace)
    with pytest.raises(OSError, match="No space left"):
        GPT(GPTConfig(vocab=31, context=8, layers=1, heads=4, width=8)).save_pretrained(tmp_path)
    assert replaced[0] == "model.safetensors"
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_pretrained_older_shards_go(tmp_path: Path) -> None:
    _saved("gpt", tmp_path, max_shard_size="1KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    _saved("gpt", tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


def test_pretrained_shard_that_the_index_does_not_describe_is_refused(tmp_path: Path) -> None:
    _saved("gpt", tmp_path, max_shard_size="1KB")
    shard = sorted(tmp_path.glob("model-*.safetensors"))[0]
    save_file(load_file(shard) | {"transformer.ln_f.bias": torch.ones(8)}, shard)
    _refused("gpt", tmp_path, shard.name, "does not hold the tensors")


def test_pretrained_integers_are_no_weights(kind: str, tmp_path: Path) -> None:
    _saved(kind, tmp_path)
    name = EMBEDDING[kind]
    _change(tmp_path, lambda tensors: tensors.update({name: tensors[name].to(torch.int8)}))
    _refused(kind, tmp_path, "not of floating point", name)


@pytest.mark.parametrize("value", [31.0, "31", True])
def test_pretrained_size_that_is_no_whole_number_is_refused(kind: str, tmp_path: Path, value: object) -> None:
    _saved(kind, tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(fields | {"vocab_size": value}))
    _refused(kind, tmp_path, f"whole number for vocab_size in {tmp_path / 'config.json'}, got {value!r}")


@pytest.mark.parametrize(("stored", "end"), [(None, None), (7, 7), ([7], 7), (50256, None)])
def test_pretrained_gpt_end_token(tmp_path: Path, stored: object, end: int | None) -> None:
    _saved("gpt", tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(fields | {"eos_token_id": stored}))
    assert GPT.from_pretrained(tmp_path).config.end == end
    (tmp_path / "config.json").write_text(json.dumps(fields | {"eos_token_id": [1, 2]}))
    _refused("gpt", tmp_path, "one eos_token_id")


@pytest.mark.parametrize(
    ("field", "wanted"),
    [
        *((name, "a whole number") for name in ("clamp_len", "mem_len", "reuse_len", "start_n_top", "end_n_top")),
        *((name, "a whole number") for name in ("pad_token_id", "eos_token_id", "num_labels")),
        ("dropout", "a number"),
        ("bi_data", "true or false"),
    ],
)
def test_pretrained_xlnet_field_of_another_type_is_refused(tmp_path: Path, field: str, wanted: str) -> None:
    XLNetLMHead(XLNetConfig(vocab=31, layers=1, heads=2, width=8, hidden=12)).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    fields = json.loads(path.read_text("utf-8"))
    for value in ("1", [1, 2], {}, *(() if wanted == "a number" else (0.5, float("nan")))):
        path.write_text(json.dumps(fields | {field: value}), "utf-8")
        with pytest.raises(PretrainedError, match=f"expected (one {field}|{wanted} for {field} in .*config.json)"):
            XLNetLMHead.from_pretrained(tmp_path)
    path.write_text(json.dumps(fields | {field: None}), "utf-8")
    XLNetLMHead.from_pretrained(tmp_path)  # null is the default, as in transformers
