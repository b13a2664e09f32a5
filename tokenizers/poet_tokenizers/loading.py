"""A tokenizer from a directory: `config.json` says of which kind it is, and its spec is checked against the weights.

A class is imported when a directory asks for it, so that reading text needs no audio package and the other way round.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from poet_tokenizers import checkpoint
from poet_tokenizers.errors import CheckpointError

if TYPE_CHECKING:
    import torch

    from poet_tokenizers.base import AudioTokenizer, TextTokenizer, VideoTokenizer

__all__ = ["load_audio_tokenizer", "load_text_tokenizer", "load_video_tokenizer", "tokenizer_kind"]

_KINDS = {"magvit2": "video", "encodec": "audio", "sentencepiece": "text", "byte_level_bpe": "text"}


def tokenizer_kind(directory: str | Path) -> str:
    """What a tokenizer's directory is for: "video", "audio" or "text".

    Raises:
        CheckpointError: it says nothing of itself that is known.
    """
    kind = checkpoint.read_description(Path(directory))["kind"]
    if kind not in _KINDS:
        raise _wrong_kind(directory, kind, "known", *_KINDS)
    return _KINDS[kind]


def load_video_tokenizer(directory: str | Path, device: str | torch.device = "cpu") -> VideoTokenizer:
    """Load a video tokenizer, in evaluation mode.

    Args:
        directory: what its `save` wrote.
        device: where its weights go.

    Raises:
        CheckpointError: a file is missing or damaged, or of a kind that is no video tokenizer; weights that are not
            those of the configuration, or not those that were saved.
    """
    kind = checkpoint.read_description(Path(directory))["kind"]
    if kind == "magvit2":
        from poet_tokenizers.magvit2.model import MagViT2

        return MagViT2.load(Path(directory), device)
    raise _wrong_kind(directory, kind, "video", "magvit2")


def load_audio_tokenizer(directory: str | Path, device: str | torch.device = "cpu") -> AudioTokenizer:
    """Load an audio tokenizer, in evaluation mode. Arguments and errors as `load_video_tokenizer`."""
    kind = checkpoint.read_description(Path(directory))["kind"]
    if kind == "encodec":
        from poet_tokenizers.audio import EncodecTokenizer

        return EncodecTokenizer.load(directory, device)
    raise _wrong_kind(directory, kind, "audio", "encodec")


def load_text_tokenizer(directory: str | Path) -> TextTokenizer:
    """Load a text tokenizer. Argument and errors as `load_video_tokenizer`."""
    kind = checkpoint.read_description(Path(directory))["kind"]
    if kind == "sentencepiece":
        from poet_tokenizers.text import SentencePieceTokenizer

        return SentencePieceTokenizer.load(directory)
    if kind == "byte_level_bpe":
        from poet_tokenizers.byte_level import ByteLevelTokenizer

        return ByteLevelTokenizer.load(directory)
    raise _wrong_kind(directory, kind, "text", "sentencepiece", "byte_level_bpe")


def _wrong_kind(directory: str | Path, kind: str, wanted: str, *known: str) -> CheckpointError:
    kinds = " or ".join(f'"{name}"' for name in known)
    return CheckpointError(
        f"{Path(directory) / checkpoint.CONFIG_FILE}: a {wanted} tokenizer must be of kind {kinds}, this one is of "
        f'kind "{kind}". Name the directory of a {wanted} tokenizer.'
    )
