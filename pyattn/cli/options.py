"""The options of a command out of a recipe's settings, and configuration files that set them."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from dataclasses import Field, fields
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, TypeVar, cast, get_args, get_type_hints

import typer

from pyattn.check import PyattnError
from pyattn.files import KINDS, is_kind
from pyattn.training.settings import Settings, optional_kind

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

Function = TypeVar("Function", bound=Callable[..., None])


class ConfigError(PyattnError, ValueError):
    """A configuration file is no TOML, or says something that the command has no option for."""


def settings_options(recipe: type[Settings]) -> Callable[[Function], Function]:
    """Gives a command an option for each of the recipe's settings, which come to it as keyword arguments, and --config,
    a file that sets any of its options."""
    types = get_type_hints(recipe)

    def decorate(function: Function) -> Function:
        own = inspect.signature(function, eval_str=True).parameters.values()
        named = [parameter for parameter in own if parameter.kind is not inspect.Parameter.VAR_KEYWORD]
        # Those of this model alone come first in its help: its data is what a user has to give.
        ordered = sorted(fields(recipe), key=lambda item: item.name in Settings.__dataclass_fields__)
        added = [_parameter(item, Path | None if item.metadata["path"] else types[item.name]) for item in ordered]
        kinds = {parameter.name: _kind(parameter.annotation) for parameter in [*named[1:], *added]}  # not the context
        signature = inspect.Signature([*named, _config(kinds), *added])
        function.__signature__ = signature  # type: ignore[attr-defined]  # typer reads it
        return function

    return decorate


def configurable(function: Function) -> Function:
    """Gives a command --config, a file that sets any of its options that have one value."""
    own = inspect.signature(function, eval_str=True).parameters
    kinds = {name: kind for name, parameter in own.items() if (kind := _kind(parameter.annotation)) in {*KINDS, Path}}

    @wraps(function)
    def command(*, config: Path | None, **options: Any) -> None:
        function(**options)

    command.__signature__ = inspect.Signature([*own.values(), _config(kinds)])  # type: ignore[attr-defined]
    return cast(Function, command)


def read_config(path: Path, kinds: dict[str, type]) -> dict[str, Any]:
    """The values of a TOML file by the names of options.

    Args:
        kinds: the type of each option.
    Raises:
        ConfigError: the file is no TOML, or has a key that is no option or a value of another type than the option's.
    """
    try:
        values = tomllib.loads(path.read_text("utf-8-sig"))
    except OSError as error:
        raise ConfigError(f"config: cannot read {path}: {error.strerror}") from error
    except RecursionError:
        raise ConfigError(f"config: {path} is nested too deeply") from None
    except ValueError as error:  # no TOML, no UTF-8, or a number of more digits than Python reads
        raise ConfigError(f"config: {path} is no TOML ({error})") from error
    for key, value in values.items():
        if (kind := kinds.get(key.replace("-", "_"))) is None:
            raise ConfigError(f"config: {path} has the key {key}, which is no option of this command")
        kind = str if kind is Path else kind
        if not is_kind(value, kind):
            raise ConfigError(f"config: {path}: expected {KINDS[kind][1]} for {key}, got {value!r}")
    return {key.replace("-", "_"): value for key, value in values.items()}


def settings_values(ctx: typer.Context, recipe: type[Settings]) -> tuple[dict[str, Any], set[str]]:
    """The settings as the command has them, paths made absolute, and the names of those that the user gave."""
    values = {}
    for item in fields(recipe):
        value = ctx.params[item.name]
        values[item.name] = str(value.absolute()) if isinstance(value, Path) else value
    sources = {name: ctx.get_parameter_source(name) for name in values}
    given = {name for name, source in sources.items() if source is not None and source.name != "DEFAULT"}
    return values, given


def _config(kinds: dict[str, type]) -> inspect.Parameter:
    """--config: its values become the defaults of the other options, so that the command line goes before them."""

    def read(ctx: typer.Context, path: Path | None) -> Path | None:
        ctx.default_map = None if path is None else read_config(path, kinds)
        return path

    declared = typer.Option(callback=read, is_eager=True, help="TOML file of options; the command line goes first.")
    return inspect.Parameter(
        "config", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[Path | None, declared]
    )


def _parameter(item: Field[Any], kind: Any) -> inspect.Parameter:
    shown = item.metadata["shown"]
    # Of a switch that says no, there is no opposite.
    names = (f"--{item.name.replace('_', '-')}",) if item.name.startswith("no_") else ()
    path: dict[str, Any] = {"parser": _path, "metavar": "<path>"} if item.metadata["path"] else {}
    declared = typer.Option(
        *names,
        **path,
        help=item.metadata["help"],
        show_default=True if shown is None else shown,
        rich_help_panel="Model and training" if item.name in Settings.__dataclass_fields__ else "Data and particulars",
    )
    annotation: Any = Annotated[kind, declared]
    return inspect.Parameter(item.name, inspect.Parameter.KEYWORD_ONLY, default=item.default, annotation=annotation)


def _path(text: str | Path) -> Path:
    """A path; nothing is none, although Python takes it for the current folder."""
    if text == "":
        raise typer.BadParameter("expected a path, got nothing")
    return Path(text)


def _kind(annotation: Any) -> type:
    """The type of an option that may also be None."""
    return optional_kind(get_args(annotation)[0])
