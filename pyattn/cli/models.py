"""Which class reads a folder's model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pyattn.models.pretrained import Pretrained


def load(folder: Path, kinds: Mapping[str, type[Pretrained]], **changes: Any) -> Any:
    """The model of a folder, in eval mode.

    Args:
        kinds: the classes that a command can use, by the model_type of their config.json, or by their architecture
            where several classes have one type.
        changes: as for `Pretrained.from_pretrained`.
    Raises:
        PretrainedError: the folder's is none of them, or cannot be read.
    """
    from pyattn.models.pretrained import CONFIG, Fields, PretrainedError

    if not folder.is_dir():
        return next(iter(kinds.values())).from_pretrained(folder)  # each of them says why it is none
    fields = Fields.read(folder / CONFIG)
    architectures = fields.get("architectures")
    names = [fields["model_type"], *(architectures if isinstance(architectures, list) else [])]
    for name, kind in kinds.items():
        if name in names:
            return kind.from_pretrained(folder, **changes)
    raise PretrainedError(
        f"model: expected model_type or architecture {' or '.join(kinds)} in {fields.path}, "
        f"got {' and '.join(map(str, names))}"
    )
