"""Text to pieces and back as a language model does it: byte-level byte pairs in Hugging Face's tokenizer.json.

A model that was started from a language model reads text as that model does, piece for piece. No special piece is ever
added or read out of a text: what looks like one in a caption is a text like any other. Knows pieces, never the shared
vocabulary's ids. This is the only importer of Hugging Face's `tokenizers`.

Source: Radford et al., "Language Models are Unsupervised Multitask Learners", section 2.2, for byte pairs over bytes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, Self

from tokenizers import Tokenizer
from tokenizers.pre_tokenizers import ByteLevel

from poet_tokenizers import checkpoint
from poet_tokenizers.base import TextSpec
from poet_tokenizers.errors import CheckpointError, ShapeError

__all__ = ["MODEL_FILE", "ByteLevelTokenizer"]

KIND: Final = "byte_level_bpe"
MODEL_FILE: Final = "tokenizer.json"

_SURROGATES: Final = re.compile("[\ud800-\udfff]")
_PROBE: Final = "Two  spaces,\ta tab,\nlines, 1234 \u00c4\u00df \u4e2d\u6587 \U0001f642'll\u00a0."


class ByteLevelTokenizer:
    """A tokenizer.json of byte-level byte pairs.

    Args:
        model: the content of the file.
        num_pieces: rows that the language model has for its pieces; it may have more than there are pieces, and the
            rest stand for no text. None takes as many as there are pieces.
        source: named in messages.

    Attributes:
        num_known: codes with a text or a special meaning; those from here on stand for nothing.

    Raises:
        CheckpointError: the model is no such tokenizer, has more pieces than `num_pieces`, or does not give back what
            it was given.
    """

    def __init__(self, model: bytes, num_pieces: int | None = None, *, source: str | Path = MODEL_FILE) -> None:
        self._model = model
        self._tokenizer = _parse(model, source)
        # A caption that spells <|endoftext|> means these letters.
        self._tokenizer.encode_special_tokens = True
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        own = 1 + max(self._tokenizer.get_vocab(with_added_tokens=True).values())
        if num_pieces is not None and num_pieces < own:
            raise CheckpointError(
                f"{source} must hold at most {num_pieces} pieces, the rows of its model, it holds {own}. Put the "
                "tokenizer.json that belongs to the model in its place."
            )
        self.num_known = own
        self._spec = TextSpec(kind=KIND, num_pieces=num_pieces or own, checksum=hashlib.sha256(model).hexdigest())
        for probe in (_PROBE, f" {_PROBE} "):
            found = self.decode(self.encode(probe))
            if found != self.normalise(probe):
                raise CheckpointError(
                    f"{source} must give back the text that it was given, it gives {found!r} for {probe!r}. Poet takes "
                    "byte-level byte pairs without added spaces, as Qwen3 has them."
                )

    @property
    def spec(self) -> TextSpec:
        """What the shared vocabulary has to know; the checksum is that of tokenizer.json."""
        return self._spec

    def normalise(self, text: str) -> str:
        """What `decode(encode(text))` gives back: lone surrogates become U+FFFD, then the tokenizer's own normal form.

        Qwen3's is Unicode's NFC, which writes a letter and its accent as one character.
        """
        text = _SURROGATES.sub("\ufffd", text)
        normaliser = self._tokenizer.normalizer
        return text if normaliser is None else str(normaliser.normalize_str(text))

    def encode(self, text: str) -> list[int]:
        """Split text into pieces, as the language model was taught; none is added at either end.

        Args:
            text: any text; "" gives [].

        Returns:
            Codes in [0, num_pieces).
        """
        codes: list[int] = self._tokenizer.encode(_SURROGATES.sub("\ufffd", text), add_special_tokens=False).ids
        return codes

    def decode(self, codes: Sequence[int]) -> str:
        """Join pieces to text; the inverse of `encode` up to `normalise`.

        Args:
            codes: in [0, num_pieces); special pieces and those beyond `num_known` stand for no text, bytes that do not
                form UTF-8 become U+FFFD.

        Raises:
            ShapeError: a code is out of range.
        """
        for code in codes:
            if not 0 <= code < self._spec.num_pieces:
                raise ShapeError(
                    f"text codes must lie in [0, {self._spec.num_pieces}), got {code}. "
                    f"Subtract the vocabulary's offset first."
                )
        return str(self._tokenizer.decode([int(code) for code in codes], skip_special_tokens=True))

    def save(self, directory: str | Path) -> None:
        """Write `config.json` and `tokenizer.json`, the latter byte for byte as it was given."""
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
        model = checkpoint.read_text_model(directory, MODEL_FILE, "the text tokenizer", description)
        written = description["spec"]
        num_pieces = written.get("num_pieces")
        if not isinstance(num_pieces, int) or isinstance(num_pieces, bool) or num_pieces < 1:
            raise CheckpointError(
                f"{directory / checkpoint.CONFIG_FILE}: num_pieces must be a positive integer, got {num_pieces!r}. "
                "Copy the tokenizer's directory again."
            )
        tokenizer = cls(model, num_pieces, source=directory / MODEL_FILE)
        checkpoint.check_spec(directory, written, dataclasses.asdict(tokenizer.spec))
        return tokenizer


def _parse(model: bytes, source: str | Path) -> Any:
    """The tokenizer of a file's content, after a look at its parts."""
    try:
        content = json.loads(model)
    except ValueError as error:
        raise CheckpointError(f"{source} must be a tokenizer's JSON: {error}. Copy it again.") from error
    kind = content.get("model", {}).get("type") if isinstance(content, dict) else None
    if kind != "BPE" or not _names_byte_level(content.get("decoder")):
        raise CheckpointError(
            f'{source} must be a tokenizer of byte-level byte pairs (a model "BPE" and a decoder "ByteLevel"), it has '
            f"the model {kind!r}. Poet keeps no other kind beside sentencepiece."
        )
    try:
        tokenizer = Tokenizer.from_str(model.decode("utf-8"))
    except Exception as error:  # the package has no error of its own
        raise CheckpointError(f"{source} cannot be read as a tokenizer: {error}. Copy it again.") from error
    missing = [letter for letter in ByteLevel.alphabet() if tokenizer.token_to_id(letter) is None]
    if missing:
        raise CheckpointError(
            f"{source} must have a piece for each of the 256 bytes, it lacks {len(missing)}: some texts could not be "
            "spelled. Train the tokenizer with the whole byte-level alphabet."
        )
    return tokenizer


def _names_byte_level(decoder: object) -> bool:
    """Whether a decoder's description is `ByteLevel`, alone or in a sequence."""
    if not isinstance(decoder, dict):
        return False
    parts = decoder.get("decoders") if decoder.get("type") == "Sequence" else [decoder]
    return any(isinstance(part, dict) and part.get("type") == "ByteLevel" for part in parts or [])
