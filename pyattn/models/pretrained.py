"""Models in the folders of transformers: config.json and model.safetensors, whole or in shards."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import fields, replace
from pathlib import Path
from types import UnionType
from typing import Any, ClassVar, TypeVar, get_args, get_origin, get_type_hints

import torch
from torch import Tensor, nn

from pyattn.check import PyattnError, RangeError
from pyattn.files import KINDS, is_kind, json_object, replacing

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
_SHOWN = 5  # names per list, in an error
_MANY_LAYERS = 1000  # that can be made to compare them, even where their tensors are missing
Self = TypeVar("Self", bound="Pretrained")
C = TypeVar("C")


class PretrainedError(PyattnError, ValueError):
    """A folder holds no model, a damaged one, or one of another architecture."""


class Pretrained(nn.Module):
    """A model that is read from and written to a folder as transformers does it, with the names and shapes it uses."""

    config: Any
    ignored: ClassVar[re.Pattern[str]] = re.compile("$^")  # tensors of a file that this model does without

    @classmethod
    def config_from(cls, fields: Fields) -> Any:
        """This model's configuration out of a config.json; raises PretrainedError where it says something else."""
        raise NotImplementedError

    def config_fields(self) -> dict[str, Any]:
        """What config.json says of this model."""
        raise NotImplementedError

    def stored(self) -> dict[str, Tensor]:
        """The tensors of the file by their names there: parameters, or views of them in the file's shape."""
        raise NotImplementedError

    def current_name(self, name: str) -> str:
        """The name in `stored` of a tensor that another version of transformers called `name`."""
        return name

    @classmethod
    def from_pretrained(cls: type[Self], folder: str | Path, **changes: Any) -> Self:
        """Reads a model, in eval mode. No pickle is ever loaded.

        Args:
            folder: with config.json and model.safetensors (or model.safetensors.index.json and its shards).
            changes: fields of the configuration that shall not be the folder's, such as attention and dropout.
        Raises:
            PretrainedError: a file is missing or damaged; the model is of another architecture; tensors are missing,
                unknown or of another shape: all of them are named.
        """
        folder = Path(folder)
        config, tensors = replace(cls.read_config(folder), **changes), _tensors(folder)
        cls._check_sizes(config, tensors, folder)
        model = cls(config)
        model.load_stored(tensors, folder)
        return model.eval()

    @classmethod
    def read_config(cls, folder: Path) -> Any:
        """The configuration of the folder's model; raises PretrainedError where it is not this one's or cannot be."""
        if not folder.is_dir():
            raise PretrainedError(
                f"model: expected a folder, there is no {folder}: names on the Hugging Face Hub are not downloaded; "
                "huggingface_hub.snapshot_download(name) does that and returns a folder"
            )
        fields = Fields.read(folder / CONFIG)
        try:
            return cls.config_from(fields)
        except (RangeError, TypeError) as error:
            raise PretrainedError(f"model: {fields.path} is damaged ({error})") from error

    @classmethod
    def _check_sizes(cls, config: Any, tensors: Mapping[str, Tensor], folder: Path) -> None:
        """Raises PretrainedError unless the folder's weights are those of its configuration.

        A configuration of a few bytes may ask for more memory than there is: it is held against the weights first, by
        the shapes of a model without data.
        """
        path = folder / CONFIG
        layers = max(getattr(config, field.name) or 0 for field in fields(config) if field.name.endswith("layers"))
        if layers > max(len(tensors), _MANY_LAYERS):
            held = f"the weights beside it are {len(tensors):,} tensors"
            raise PretrainedError(f"model: {path} asks for {layers:,} layers, {held}")
        try:
            with torch.device("meta"):
                sketch = cls(config)
        except (RuntimeError, OverflowError, TypeError) as error:
            reason = str(error).splitlines()[0]
            raise PretrainedError(f"model: {path} asks for what no memory holds ({reason})") from error
        sketch._fitting(tensors, folder)

    @torch.no_grad()
    def load_stored(self, tensors: Mapping[str, Tensor], source: str | Path) -> None:
        """Copies tensors named as in a file into the parameters. Changes nothing when it raises.

        Raises:
            PretrainedError: as `from_pretrained`; `source` is what it calls the tensors' origin.
        """
        given = self._fitting(tensors, source)
        if names := [name for name in self.stored() if not given[name].isfinite().all()]:
            raise PretrainedError(f"model: the tensors of {source} hold NaN or infinity: {_few(names)}")
        for name, target in self.stored().items():
            target.copy_(given[name])

    def _fitting(self, tensors: Mapping[str, Tensor], source: str | Path) -> dict[str, Tensor]:
        """Tensors of a file by the names in `stored`: all of them are there, and with their shapes."""
        given = {self.current_name(name): tensor for name, tensor in tensors.items()}
        expected = self.stored()
        given = {name: t for name, t in given.items() if name in expected or not self.ignored.search(name)}
        both = {name: (given[name], t) for name, t in expected.items() if name in given}
        lists = {
            "missing": [name for name in expected if name not in given],
            "unknown": [name for name in given if name not in expected],
            "of another shape": [
                f"{k} {list(a.shape)} for {list(b.shape)}" for k, (a, b) in both.items() if a.shape != b.shape
            ],
            "not of floating point": [name for name, (t, _) in both.items() if not t.is_floating_point()],
        }
        if problems := [f"{what}: {_few(names)}" for what, names in lists.items() if names]:
            model = type(self).__name__
            raise PretrainedError(f"model: the tensors of {source} do not fit {model}; {'; '.join(problems)}")
        return given

    def save_pretrained(self, folder: str | Path, *, max_shard_size: str = "5GB") -> None:
        """Writes the model so that transformers reads it. A failure to write leaves what the folder held before."""
        from huggingface_hub import split_torch_state_dict_into_shards
        from safetensors.torch import save_file

        folder = Path(folder)
        tensors = {name: tensor.detach().contiguous() for name, tensor in self.stored().items()}
        plan = split_torch_state_dict_into_shards(tensors, max_shard_size=max_shard_size)
        texts = {CONFIG: self.config_fields()}
        if plan.is_sharded:
            texts[INDEX] = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        with ExitStack() as files:  # which replaces the last first: weights, then what names them
            for name, fields in texts.items():
                path = files.enter_context(replacing(folder / name))
                path.write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
            for name, names in plan.filename_to_tensors.items():
                part = {tensor: tensors[tensor] for tensor in names}
                save_file(part, files.enter_context(replacing(folder / name)), metadata={"format": "pt"})
        written = {*texts, *plan.filename_to_tensors}
        for older in (*folder.glob("model-*-of-*.safetensors"), folder / WEIGHTS, folder / INDEX):
            if older.name not in written:
                older.unlink(missing_ok=True)


class Fields:
    """A config.json, which knows its path for the errors."""

    def __init__(self, path: Path, values: dict[str, Any]) -> None:
        self.path = path
        self.values = values

    @classmethod
    def read(cls, path: Path) -> Fields:
        return cls(path, _json(path))

    def get(self, name: str, default: Any = None) -> Any:
        """A field that may be missing. null counts as missing, as it does in transformers."""
        value = self.values.get(name)
        return default if value is None else value

    def __getitem__(self, name: str) -> Any:
        """A field that must be there."""
        if self.values.get(name) is None:
            raise PretrainedError(f"model: {self.path} has no {name}")
        return self.values[name]

    def integer(self, name: str) -> int:
        """A field that must be there, null counting as missing, and be a whole number."""
        if not is_kind(value := self[name], int):
            raise PretrainedError(f"model: expected {KINDS[int][1]} for {name} in {self.path}, got {value!r}")
        return value

    def typed(self, name: str, kind: Any) -> Any:
        """A field that must be there and be of a type: one of `pyattn.files.KINDS`, a tuple of one of them, which is an
        array in the file, or such a type or None, which is null."""
        if name not in self.values:
            raise PretrainedError(f"model: {self.path} has no {name}")
        value, kinds = self.values[name], get_args(kind) if isinstance(kind, UnionType) else (kind,)
        for each in kinds:
            if get_origin(each) is not tuple:
                if is_kind(value, each):
                    return value
            elif isinstance(value, list) and all(is_kind(item, get_args(each)[0]) for item in value):
                return tuple(value)
        wanted = " or ".join(map(_in_words, kinds))
        raise PretrainedError(f"model: expected {wanted} for {name} in {self.path}, got {value!r}")

    def all_of(self, config: type[C]) -> C:
        """A configuration of our own, each of whose fields is in the file by its name and of its type."""
        return config(**{name: self.typed(name, kind) for name, kind in get_type_hints(config).items()})

    def optional(self, name: str, kind: Any, default: Any = None) -> Any:
        """A field that may be missing, null counting as missing, and else is of a type, as for `typed`."""
        return default if self.values.get(name) is None else self.typed(name, kind)

    def expect(self, **expected: Any) -> None:
        """Raises PretrainedError unless each field, where it is given, has its value (or one out of a tuple)."""
        for name, value in expected.items():
            allowed = value if isinstance(value, tuple) else (value,)
            if self.get(name, allowed[0]) not in allowed:
                wanted = " or ".join(map(repr, allowed))
                raise PretrainedError(f"model: expected {name} {wanted} in {self.path}, got {self.values[name]!r}")

    def end(self) -> int | None:
        """The token that ends a text. One outside the vocabulary is transformers' default, and ends nothing."""
        end = self.get("eos_token_id")
        if isinstance(end, list):
            if len(end) != 1:
                raise PretrainedError(f"model: expected one eos_token_id in {self.path}, got {end}")
            (end,) = end
        if end is not None and not is_kind(end, int):
            raise PretrainedError(f"model: expected {KINDS[int][1]} for eos_token_id in {self.path}, got {end!r}")
        return end if end is None or end < self.integer("vocab_size") else None

    def label_names(self, labels: int) -> tuple[str, ...] | None:
        """What a classifier's labels are called; None where they have no names of their own, or not one for each."""
        given = self.get("id2label")
        if not isinstance(given, dict) or given.keys() != {str(i) for i in range(labels)}:
            return None
        names = tuple(str(given[str(i)]) for i in range(labels))
        return None if names == default_names(labels) else names


def _in_words(kind: Any) -> str:
    if get_origin(kind) is tuple:
        return f"a list of {KINDS[get_args(kind)[0]][1].removeprefix('a ')}s"
    return KINDS[kind][1]


def default_names(labels: int) -> tuple[str, ...]:
    """Of a classifier's labels, as transformers calls them."""
    return tuple(f"LABEL_{i}" for i in range(labels))


def _tensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor of the folder's weights."""
    if (folder / WEIGHTS).is_file():
        return dict(_file_tensors(folder / WEIGHTS))
    if not (folder / INDEX).is_file():
        pickles = sorted(path.name for path in folder.glob("*.bin"))
        reason = f"; {pickles[0]} is a pickle, which runs code when it is loaded: convert it" if pickles else ""
        raise PretrainedError(f"model: expected {WEIGHTS} or {INDEX} in {folder}{reason}")
    shards = _json(folder / INDEX).get("weight_map")
    if not isinstance(shards, dict) or any(Path(str(shard)).name != shard for shard in shards.values()):
        raise PretrainedError(f"model: {folder / INDEX} is damaged: its weight_map does not name files of the folder")
    tensors: dict[str, Tensor] = {}
    for shard in sorted(set(shards.values())):
        found = dict(_file_tensors(folder / shard))
        if found.keys() != {name for name, holder in shards.items() if holder == shard}:
            raise PretrainedError(f"model: {folder / shard} does not hold the tensors that {INDEX} says")
        tensors |= found
    return tensors


def _file_tensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise PretrainedError(f"model: expected a file {path}, there is none")
    try:
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 (it is no dict)
                yield name, file.get_tensor(name)
    except (SafetensorError, OSError) as error:
        raise PretrainedError(f"model: {path} is truncated or damaged ({error})") from error


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():  # a pipe would be waited for
        raise PretrainedError(f"model: expected a file {path}, there is none")
    try:
        return json_object(path.read_text("utf-8"))
    except ValueError as error:  # UnicodeDecodeError, too
        raise PretrainedError(f"model: {path} is damaged ({error})") from error


def _few(names: list[str]) -> str:
    rest = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {rest} more" if rest > 0 else "")
