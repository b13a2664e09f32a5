"""Text to pieces and back: a sentencepiece model of byte pairs that can spell any text in bytes.

No normalisation is applied: decoding gives back the same text, with two exceptions that `normalise` states. Knows
pieces, never the shared vocabulary's ids.

Source: Kudo and Richardson, "SentencePiece", arXiv:1808.06226; Sennrich et al., byte pairs, arXiv:1508.07909.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Final, Self

import sentencepiece

from poet_tokenizers import checkpoint
from poet_tokenizers.base import TextSpec
from poet_tokenizers.errors import CheckpointError, ConfigError, ShapeError

__all__ = ["MODEL_FILE", "SentencePieceTokenizer", "normalise"]

KIND: Final = "sentencepiece"
MODEL_FILE: Final = "model.model"

_SMALLEST_VOCABULARY = 256 + 1 + 32  # one piece a byte, one for unknown text (never produced), and some to learn
_SURROGATES = re.compile("[\ud800-\udfff]")
_SPACE_MARK = "\u2581"  # how sentencepiece writes a space inside its pieces


def normalise(text: str) -> str:
    """What `decode(encode(text))` gives back: lone surrogates become U+FFFD, U+2581 a space, the rest stays as is."""
    return _SURROGATES.sub("\ufffd", text).replace(_SPACE_MARK, " ")


class SentencePieceTokenizer:
    """A trained sentencepiece model.

    Args:
        model: the serialised model, as `train` makes it and `model.model` holds it.

    Raises:
        CheckpointError: model is not a sentencepiece model.
    """

    def __init__(self, model: bytes) -> None:
        self._model = model
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        except RuntimeError as error:
            raise CheckpointError(
                f"a text tokenizer must be a sentencepiece model: {error}. Train it again."
            ) from error
        self._spec = TextSpec(
            kind=KIND, num_pieces=self._processor.get_piece_size(), checksum=hashlib.sha256(model).hexdigest()
        )

    @property
    def spec(self) -> TextSpec:
        """What the shared vocabulary has to know; the checksum is that of the model file."""
        return self._spec

    @classmethod
    def train(cls, lines: Iterable[str], num_pieces: int = 640) -> Self:
        """Learn pieces from text; the same lines always give the same model.

        Args:
            lines: text, a sentence or caption a line.
            num_pieces: pieces in all, of which 257 are taken by bytes and unknown text. Fewer are learnt where the
                lines do not hold as many different ones.

        Raises:
            ConfigError: num_pieces is too small, or the lines are empty or hold more different characters than fit.
        """
        if num_pieces < _SMALLEST_VOCABULARY:
            raise ConfigError(f"num_pieces must be at least {_SMALLEST_VOCABULARY}, got {num_pieces}.")
        sentences = [line for line in map(normalise, lines) if line.strip()]
        if not sentences:
            raise ConfigError("a text tokenizer must be trained on at least one line of text, got none.")
        model = io.BytesIO()
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(sentences),
                model_writer=model,
                # Not unigram: that starts from what occurs in two different words, so in a small world of words it
                # never considers most whole words, and captions become a third longer.
                model_type="bpe",
                vocab_size=num_pieces,
                hard_vocab_limit=False,
                byte_fallback=True,
                character_coverage=1.0,
                normalization_rule_name="identity",
                remove_extra_whitespaces=False,
                bos_id=-1,
                eos_id=-1,
                pad_id=-1,
                num_threads=1,
                minloglevel=2,
            )
        except RuntimeError as error:
            raise ConfigError(f"training a text tokenizer of {num_pieces} pieces failed: {error}.") from error
        return cls(model.getvalue())

    def encode(self, text: str) -> list[int]:
        """Split text into pieces.

        Args:
            text: any text; "" gives [].

        Returns:
            Codes in [0, num_pieces).
        """
        if not text:
            return []
        codes: list[int] = self._processor.encode(normalise(text))
        return codes

    def decode(self, codes: Sequence[int]) -> str:
        """Join pieces to text; the inverse of `encode` up to `normalise`.

        Args:
            codes: in [0, num_pieces); bytes that do not form UTF-8 become U+FFFD.

        Raises:
            ShapeError: a code is out of range.
        """
        for code in codes:
            if not 0 <= code < self._spec.num_pieces:
                raise ShapeError(
                    f"text codes must lie in [0, {self._spec.num_pieces}), got {code}. "
                    f"Subtract the vocabulary's offset first."
                )
        text: str = self._processor.decode([int(code) for code in codes])
        return text

    def save(self, directory: str | Path) -> None:
        """Write `config.json` and `model.model`."""
        directory = Path(directory)
        checkpoint.write_description(directory, KIND, {}, dataclasses.asdict(self.spec))
        (directory / MODEL_FILE).write_bytes(self._model)

    @classmethod
    def load(cls, directory: str | Path) -> Self:
        """Read what `save` wrote.

        Raises:
            CheckpointError: a file is missing or damaged, or the checksum is not that of the model.
        """
        directory = Path(directory)
        description = checkpoint.read_description(directory, KIND)
        model = checkpoint.read_text_model(directory, MODEL_FILE, "the sentencepiece model", description)
        tokenizer = cls(model)
        checkpoint.check_spec(directory, description["spec"], dataclasses.asdict(tokenizer.spec))
        return tokenizer
