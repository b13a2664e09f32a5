"""LoRA adapters as the commands name them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from poet.errors import ConfigError

if TYPE_CHECKING:
    from poet.bundle import Bundle
    from poet.model.lora import Adapter

__all__ = ["read_named"]


def read_named(values: Sequence[str], bundle: Bundle) -> tuple[Adapter, ...]:
    """The adapters of a `--lora` that may be given several times.

    Args:
        values: NAME=DIR, or DIR, whose last part is the name then.
        bundle: whose model they change; its name is taken.

    Raises:
        ConfigError: a name twice, or one that cannot be used.
        CheckpointError: a directory holds no adapter of the bundle's model.
    """
    from poet.model.lora import read_adapters

    directories: dict[str, Path] = {}
    for value in values:
        name, equals, rest = value.partition("=")
        directory = Path(rest if equals else value)
        name = name if equals else directory.resolve().name
        if name in directories:
            raise ConfigError(f"--lora must have every name once, got {name!r} twice. Write NAME=DIR.")
        directories[name] = directory
    if not directories:
        return ()
    return read_adapters(directories, bundle.model_config, bundle.fingerprint, taken=(bundle.path.resolve().name,))
