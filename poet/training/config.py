"""Recipes: YAML files read into frozen dataclasses. Knows how to fill a tree of dataclasses, not what is in it.

A recipe's top key `train` names what is trained; the rest are the fields of that thing's recipe class.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, Union, get_args, get_origin

import yaml

from poet.errors import ConfigError

__all__ = ["apply_overrides", "build", "read_recipe", "to_plain", "write_recipe"]

T = TypeVar("T")


def read_recipe(path: Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Read a YAML recipe and apply `key=value` overrides.

    Args:
        path: the YAML file.
        overrides: "a.b=value"; the value is read as YAML, so numbers, lists and booleans work.

    Raises:
        ConfigError: the file is missing or is no YAML mapping, or an override has no "=".
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"the recipe {path} does not exist. Recipes are kept in recipes/.") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"the recipe {path} cannot be read as YAML: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"the recipe {path} must be a mapping of keys to values, it is {type(values).__name__}.")
    return apply_overrides(values, overrides)


def apply_overrides(values: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """A copy of `values` with each "a.b=value" put in its place.

    Raises:
        ConfigError: an override has no "=", its value is no YAML, or it goes through a plain value.
    """
    result = _copy(values)
    for override in overrides:
        name, separator, text = override.partition("=")
        if not separator or not name:
            raise ConfigError(f"an override must be key=value, got {override!r}. Nested keys are joined with dots.")
        *parents, last = name.split(".")
        place = result
        for parent in parents:
            place = place.setdefault(parent, {})
            if not isinstance(place, dict):
                raise ConfigError(f"{name!r} cannot be set: {parent!r} is a plain value, not a group of keys.")
        try:
            place[last] = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ConfigError(f"the value of the override {override!r} cannot be read as YAML: {error}") from error
    return result


def build(cls: type[T], values: Mapping[str, Any], path: str = "") -> T:
    """Fill a dataclass, and the dataclasses in it, from plain values.

    Args:
        cls: a dataclass.
        values: its fields; those left out keep their defaults.
        path: where `values` stands in the recipe, for messages.

    Raises:
        ConfigError: an unknown key (the message names the nearest valid one), a missing key or a value of a wrong type.
    """
    if not isinstance(values, Mapping):
        raise ConfigError(f"{path or 'the recipe'} must be a group of keys, got {values!r}.")
    hints = typing.get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    arguments: dict[str, Any] = {}
    for name, value in values.items():
        where = f"{path}.{name}" if path else str(name)
        if name not in fields:
            near = difflib.get_close_matches(str(name), fields, n=1, cutoff=0.4)
            hint = f"Did you mean {near[0]!r}?" if near else f"Valid keys: {', '.join(fields)}."
            raise ConfigError(f"unknown recipe key {where!r}. {hint}")
        arguments[name] = _convert(hints[name], value, where)
    required = [
        name
        for name, field in fields.items()
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    ]
    missing = [name for name in required if name not in arguments]
    if missing:
        raise ConfigError(
            f"{path or 'the recipe'} lacks the key{'s' if len(missing) > 1 else ''} {', '.join(missing)}."
        )
    return cls(**arguments)


def to_plain(value: Any) -> Any:
    """Dataclasses, tuples and paths as plain values for YAML and JSON; inverse of `build`."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: to_plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): to_plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def write_recipe(path: Path, values: Mapping[str, Any]) -> None:
    """Write a resolved recipe as YAML."""
    path.write_text(yaml.safe_dump(to_plain(values), sort_keys=False, allow_unicode=True), encoding="utf-8")


def _copy(value: Any) -> Any:
    return {key: _copy(item) for key, item in value.items()} if isinstance(value, Mapping) else value


def _convert(hint: Any, value: Any, where: str) -> Any:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        return _convert(next(argument for argument in arguments if argument is not type(None)), value, where)
    if dataclasses.is_dataclass(hint):
        return value if isinstance(value, hint) else build(hint, value, where)  # type: ignore[arg-type]
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise ConfigError(f"{where} must be a list, got {value!r}.")
        inner = [arguments[0]] * len(value) if arguments[-1] is Ellipsis else list(arguments)
        if len(inner) != len(value):
            raise ConfigError(f"{where} must be a list of {len(inner)} values, got {value!r}.")
        return tuple(
            _convert(kind, item, f"{where}[{i}]") for i, (kind, item) in enumerate(zip(inner, value, strict=True))
        )
    if origin in (dict, Mapping) or hint is dict:
        if not isinstance(value, Mapping):
            raise ConfigError(f"{where} must be a group of keys, got {value!r}.")
        kind = arguments[1] if arguments else Any
        return {str(key): _convert(kind, item, f"{where}.{key}") for key, item in value.items()}
    if origin is typing.Literal:
        if value not in arguments:
            raise ConfigError(f"{where} must be one of {', '.join(map(str, arguments))}; got {value!r}.")
        return value
    return _convert_plain(hint, value, where)


def _convert_plain(hint: Any, value: Any, where: str) -> Any:
    if hint is Any:
        return value
    if hint is Path and isinstance(value, (str, Path)):
        return Path(value)
    if hint is float and isinstance(value, str):
        try:
            return float(value)  # YAML 1.1 reads 1e-3 as a string
        except ValueError:
            pass
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (hint in (int, float) and isinstance(value, bool)):
        raise ConfigError(f"{where} must be of type {getattr(hint, '__name__', hint)}, got {value!r}.")
    return value
