"""Trains the text tokenizer on captions. Knows text only; where the captions come from is the caller's business."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from poet.errors import ConfigError
from poet_tokenizers.text import SentencePieceTokenizer

__all__ = ["CaptionSource", "TextTokenizerRecipe", "train_text_tokenizer"]

CaptionSource = Callable[[str, int], str]
"""(name of a source, index) to the caption of that clip; a pure function."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextTokenizerRecipe:
    """How to train the text tokenizer. The YAML recipe has the same keys.

    Attributes:
        source: name of the captions to learn from, for whoever hands in the `CaptionSource`.
        num_captions: clips 0 to num_captions - 1 of it are read.
        num_pieces: pieces in all, bytes included.
    """

    source: str
    num_captions: int = 20_000
    num_pieces: int = 640

    def __post_init__(self) -> None:
        if self.num_captions < 1:
            raise ConfigError(f"num_captions must be at least 1, got {self.num_captions}.")


def train_text_tokenizer(recipe: TextTokenizerRecipe, captions: CaptionSource) -> SentencePieceTokenizer:
    """Learn pieces from the captions that the recipe names; the same recipe and captions give the same model.

    Raises:
        ConfigError: the recipe's num_pieces is too small for the captions.
    """
    lines = (captions(recipe.source, index) for index in range(recipe.num_captions))
    return SentencePieceTokenizer.train(lines, recipe.num_pieces)
