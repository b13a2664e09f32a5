"""The errors that Poet raises on purpose. They stand at the bottom of the tree so that every package can use them.

A message says what the value must be, what it is, and what to do about it.
"""

__all__ = ["CheckpointError", "ConfigError", "PoetError", "ShapeError"]


class PoetError(Exception):
    """Base of every error that Poet raises on purpose; the command line prints its message alone."""


class ConfigError(PoetError, ValueError):
    """A setting, recipe or argument that cannot be used."""


class ShapeError(PoetError, ValueError):
    """A tensor or array of the wrong shape, type or range."""


class CheckpointError(PoetError, RuntimeError):
    """A bundle, checkpoint, tokenizer or shard that is missing, damaged or belongs to another vocabulary."""
