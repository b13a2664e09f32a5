"""The errors of Poet, in one place. `poet_tokenizers.errors` holds those that the tokenizers raise themselves."""

from poet_tokenizers.errors import CheckpointError, ConfigError, PoetError, ShapeError

__all__ = ["CheckpointError", "ConfigError", "MediaError", "PoetError", "ShapeError", "VocabularyError"]


class MediaError(PoetError, OSError):
    """A media file that cannot be read or written; the message names the file and the reason."""

    def __str__(self) -> str:
        return str(self.args[0]) if self.args else ""


class VocabularyError(PoetError, ValueError):
    """A code, id or special name outside the shared vocabulary."""
