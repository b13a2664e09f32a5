"""LoRA adapters as the commands name them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from poet.errors import ConfigError

if TYPE_CHECKING:
    from poet.bundle import Bundle
    from poet.model.lora import Adapter

__all__ = ["read_named", "read_one"]


def read_one(directory: Path | None, bundle: Bundle) -> tuple[Adapter, ...]:
    """The adapter of a `--lora DIR`, if there is one.

    Args:
        directory: of the adapter, or None.
        bundle: whose model it changes.

    Raises:
        CheckpointError: the directory holds no adapter of the bundle's model.
        ConfigError: an adapter of a kind that cannot be used.
    """
    if directory is None:
        return ()
    from poet.model.lora import read_adapter

    return (read_adapter(directory, bundle.model_config, bundle.fingerprint),)


def read_named(values: Sequence[str], bundle: Bundle) -> tuple[Adapter, ...]:
    """The adapters of a `--lora` that may be given several times.

    Args:
        values: NAME=DIR, or DIR, whose last part is the name then.
        bundle: whose model they change; its name is taken.

    Raises:
        ConfigError: a name twice, or one that cannot be used.
        CheckpointError: a directory holds no adapter of the bundle's model.
    """
    from poet.model.lora import read_adapter

    adapters: dict[str, Adapter] = {}
    for value in values:
        name, equals, rest = value.partition("=")
        is_named = bool(equals) and "/" not in name  # a directory's name may hold a = as well
        if is_named and not rest:
            raise ConfigError(f"--lora must be NAME=DIR, got {value!r}.")
        directory = Path(rest if is_named else value)
        name = name if is_named else directory.resolve().name
        if name == bundle.name or name in adapters:
            taken = "is that of the bundle" if name == bundle.name else "was given before"
            raise ConfigError(f"an adapter must have a name of its own, {name!r} {taken}. Write --lora NAME=DIR.")
        adapters[name] = read_adapter(directory, bundle.model_config, bundle.fingerprint, name=name)
    return tuple(adapters.values())
