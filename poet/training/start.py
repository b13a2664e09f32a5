"""Where the training of a codec begins: from random weights, or from those of a finished one."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol, Self, TypeVar

from poet.errors import ConfigError
from poet_tokenizers.checkpoint import read_description

__all__ = ["Codec", "begin", "shape_of"]


class Codec(Protocol):
    """What both codecs offer. `config` says the shape."""

    config: Any

    def __init__(self, config: Any) -> None: ...

    @classmethod
    def load(cls, directory: Path) -> Self:
        """Read what a training exported."""
        ...


C = TypeVar("C", bound=Codec)


def begin(kind: type[C], shape: Any, start_from: Path | None) -> C:
    """Build a codec of a shape.

    Args:
        kind: class of the codec.
        shape: its config.
        start_from: directory of a codec whose weights to begin with; None draws them.

    Raises:
        CheckpointError: `start_from` is missing or damaged.
        ConfigError: `start_from` has another shape.
    """
    if start_from is None:
        return kind(shape)
    codec = kind.load(start_from)
    if codec.config != shape:
        raise ConfigError(
            f"start_from {start_from} has the shape {codec.config}, the recipe asks for {shape}. "
            "Give both the same codec."
        )
    return codec


def shape_of(start_from: Path) -> dict[str, Any]:
    """What a finished codec says of its shape: a recipe that begins with it need not repeat it.

    Raises:
        CheckpointError: there is none, or its description is damaged.
    """
    return dict(read_description(start_from)["config"])
