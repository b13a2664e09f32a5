"""The shared vocabulary: which integer stands for which special, video code, audio code or text piece.

This is the only file that adds or subtracts an offset (SPEC, section 2). It knows ranges and names; it does not know
the order of ids in a scene (`poet.sequence`), nor pixels, waveforms or codecs.

    0 .. 255 specials | video codes | audio level 0 | audio level 1 | ... | text pieces | padding to a multiple of 128

Code: an integer of one codebook. Id: an integer of the shared vocabulary.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import ArrayLike, NDArray

from poet.errors import CheckpointError, VocabularyError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

__all__ = ["FIRST_RESOLUTION_ID", "NUM_SPECIALS", "PADDING_MULTIPLE", "SPECIAL_NAMES", "Vocabulary"]

NUM_SPECIALS: Final = 256
FIRST_RESOLUTION_ID: Final = 64
PADDING_MULTIPLE: Final = 128
SPECIAL_NAMES: Final = (
    *("<pad>", "<bos>", "<eos>", "<mask>", "<null>", "<source>", "<parallel>"),
    *("<text>", "</text>", "<video_in>", "</video_in>", "<audio_in>", "</audio_in>"),
    *("<video_out>", "</video_out>", "<audio_out>", "</audio_out>", "<text_out>", "</text_out>"),
    *("<to_image>", "<to_video>", "<to_audio>", "<to_video_audio>", "<to_text>"),
)
"""The fixed special ids: a name's place is its id. Ids up to 64 that have no name are reserved; resolutions follow."""

_SPEC_KEYS: Final = {
    "video": {"kind", "codebook_size", "temporal_stride", "spatial_stride", "checksum"},
    "audio": {"kind", "sample_rate", "hop_length", "num_codebooks", "codebook_size", "checksum"},
    "text": {"kind", "num_pieces", "checksum"},
}
_SPEC_OF_FIELD: Final = {
    "video_codebook_size": ("video", "codebook_size"),
    "temporal_stride": ("video", "temporal_stride"),
    "spatial_stride": ("video", "spatial_stride"),
    "num_audio_codebooks": ("audio", "num_codebooks"),
    "audio_codebook_size": ("audio", "codebook_size"),
    "sample_rate": ("audio", "sample_rate"),
    "hop_length": ("audio", "hop_length"),
    "text_vocab_size": ("text", "num_pieces"),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """The layout of ids and the specs of the tokenizers whose codes they stand for.

    Attributes:
        video_codebook_size: video codes lie in [0, video_codebook_size).
        num_audio_codebooks: levels of audio codes, coarse to fine; every level has a range of ids of its own.
        audio_codebook_size: audio codes of every level lie in [0, audio_codebook_size).
        text_vocab_size: text pieces lie in [0, text_vocab_size).
        resolutions: (height, width) in pixels, each with an id; their order is part of the layout.
        spatial_stride: pixels per latent place.
        temporal_stride: video frames per latent frame; the first frame is a latent frame of its own.
        sample_rate: audio samples per second.
        hop_length: audio samples per latent.
        tokenizers: the specs as plain dictionaries under "video", "audio" and "text", checksums included.

    Raises:
        VocabularyError: a size that is not positive, a repeated resolution, or specs that disagree with the layout.
    """

    video_codebook_size: int
    num_audio_codebooks: int
    audio_codebook_size: int
    text_vocab_size: int
    resolutions: tuple[tuple[int, int], ...]
    spatial_stride: int
    temporal_stride: int
    sample_rate: int
    hop_length: int
    tokenizers: Mapping[str, Mapping[str, str | int]] = dataclasses.field(hash=False)

    def __post_init__(self) -> None:
        try:
            resolutions = tuple((_integer(height), _integer(width)) for height, width in self.resolutions)
        except (TypeError, ValueError) as error:
            raise VocabularyError(
                f"resolutions must be pairs (height, width) of integers, got {self.resolutions!r}."
            ) from error
        object.__setattr__(self, "resolutions", resolutions)
        object.__setattr__(self, "tokenizers", {name: dict(spec) for name, spec in self.tokenizers.items()})
        for name in _SPEC_OF_FIELD:
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise VocabularyError(f"{name} must be a positive integer, got {value!r}.")
        self._check_resolutions()
        self._check_specs()

    def _check_resolutions(self) -> None:
        room = NUM_SPECIALS - FIRST_RESOLUTION_ID
        if not 1 <= len(self.resolutions) <= room:
            raise VocabularyError(f"there must be 1 to {room} resolutions, got {len(self.resolutions)}.")
        if len(set(self.resolutions)) != len(self.resolutions):
            raise VocabularyError(f"every resolution must stand once, got {self.resolutions}.")
        if any(height < 1 or width < 1 for height, width in self.resolutions):
            raise VocabularyError(f"heights and widths must be positive, got {self.resolutions}.")

    def _check_specs(self) -> None:
        if set(self.tokenizers) != set(_SPEC_KEYS):
            raise VocabularyError(
                f"tokenizers must hold the specs of {sorted(_SPEC_KEYS)}, got {sorted(self.tokenizers)}."
            )
        for name, keys in _SPEC_KEYS.items():
            if set(self.tokenizers[name]) != keys:
                found = sorted(self.tokenizers[name])
                raise VocabularyError(f"the {name} tokenizer's spec must have the keys {sorted(keys)}, got {found}.")
        for field, (name, key) in _SPEC_OF_FIELD.items():
            if getattr(self, field) != self.tokenizers[name][key]:
                raise VocabularyError(
                    f"{field} is {getattr(self, field)}, but the {name} tokenizer's {key} is "
                    f"{self.tokenizers[name][key]}. Build the vocabulary with Vocabulary.from_specs()."
                )

    @classmethod
    def from_specs(
        cls,
        video: DataclassInstance,
        audio: DataclassInstance,
        text: DataclassInstance,
        resolutions: Iterable[tuple[int, int]],
    ) -> Vocabulary:
        """The vocabulary of three tokenizers.

        Args:
            video: a `poet_tokenizers.base.VideoSpec`.
            audio: a `poet_tokenizers.base.AudioSpec`.
            text: a `poet_tokenizers.base.TextSpec`.
            resolutions: (height, width) pairs in pixels.

        Raises:
            VocabularyError: a spec lacks something, or the resolutions cannot be used.
        """
        specs = {name: dataclasses.asdict(spec) for name, spec in (("video", video), ("audio", audio), ("text", text))}
        for name, keys in _SPEC_KEYS.items():
            if set(specs[name]) != keys:
                raise VocabularyError(
                    f"the {name} tokenizer's spec must have the keys {sorted(keys)}, got {sorted(specs[name])}."
                )
        fields = {field: specs[name][key] for field, (name, key) in _SPEC_OF_FIELD.items()}
        return cls(resolutions=tuple(resolutions), tokenizers=specs, **fields)

    # Layout

    @property
    def video_range(self) -> tuple[int, int]:
        """(low, high): video ids lie in [low, high)."""
        return NUM_SPECIALS, NUM_SPECIALS + self.video_codebook_size

    def audio_range(self, level: int) -> tuple[int, int]:
        """(low, high) of the ids of one audio level, 0 the coarsest.

        Raises:
            VocabularyError: there is no such level.
        """
        if not 0 <= level < self.num_audio_codebooks:
            raise VocabularyError(f"audio level {level} is outside [0, {self.num_audio_codebooks}).")
        low = self.video_range[1] + level * self.audio_codebook_size
        return low, low + self.audio_codebook_size

    @property
    def text_range(self) -> tuple[int, int]:
        """(low, high): the ids of text pieces lie in [low, high)."""
        low = self.audio_range(self.num_audio_codebooks - 1)[1]
        return low, low + self.text_vocab_size

    @property
    def vocab_size(self) -> int:
        """Number of ids in use; ids lie in [0, vocab_size)."""
        return self.text_range[1]

    @property
    def padded_vocab_size(self) -> int:
        """`vocab_size` rounded up to a multiple of 128: the rows of the embedding."""
        return -(-self.vocab_size // PADDING_MULTIPLE) * PADDING_MULTIPLE

    @property
    def frame_rate(self) -> float:
        """Audio latents per second."""
        return self.sample_rate / self.hop_length

    @cached_property
    def specials(self) -> dict[str, int]:
        """Every special name in use and its id, the resolutions' ("<height x width>" without spaces) included."""
        names = {name: place for place, name in enumerate(SPECIAL_NAMES)}
        for place, (height, width) in enumerate(self.resolutions, FIRST_RESOLUTION_ID):
            names[f"<{height}x{width}>"] = place
        return names

    @cached_property
    def _names(self) -> dict[int, str]:
        return {place: name for name, place in self.specials.items()}

    def special(self, name: str) -> int:
        """The id of a special name such as "<bos>".

        Raises:
            VocabularyError: there is no such name; the nearest is suggested.
        """
        if name not in self.specials:
            near = difflib.get_close_matches(name, self.specials, n=1)
            hint = f" Did you mean {near[0]}?" if near else ""
            raise VocabularyError(f"there is no special id called {name!r}.{hint}")
        return self.specials[name]

    def resolution_id(self, height: int, width: int) -> int:
        """The id of a resolution in pixels.

        Raises:
            VocabularyError: this vocabulary has no such resolution.
        """
        if (height, width) not in self.resolutions:
            known = ", ".join(f"{h} x {w}" for h, w in self.resolutions)
            raise VocabularyError(f"the resolution must be one of {known} (height x width), got {height} x {width}.")
        return FIRST_RESOLUTION_ID + self.resolutions.index((height, width))

    def resolution(self, id: int) -> tuple[int, int]:
        """(height, width) in pixels of a resolution id; inverse of `resolution_id`.

        Raises:
            VocabularyError: the id is not a resolution's.
        """
        place = id - FIRST_RESOLUTION_ID
        if not 0 <= place < len(self.resolutions):
            raise VocabularyError(f"{self.decode_id(id)} is not a resolution.")
        return self.resolutions[place]

    def latent_size(self, height: int, width: int) -> tuple[int, int]:
        """(h, w) latent places of one frame of `height` x `width` pixels, rounded up to whole places."""
        return -(-height // self.spatial_stride), -(-width // self.spatial_stride)

    def decode_id(self, id: int) -> str:
        """What an id stands for, in words: "<bos>", "video 17", "audio level 1 code 3", "text 4"; never raises."""
        if id in self._names:
            return self._names[id]
        if not 0 <= id < self.padded_vocab_size:
            return f"id {id} (outside [0, {self.padded_vocab_size}))"
        if id < NUM_SPECIALS:
            return f"reserved special {id}"
        if id < self.video_range[1]:
            return f"video {id - self.video_range[0]}"
        if id < self.text_range[0]:
            level, code = divmod(id - self.video_range[1], self.audio_codebook_size)
            return f"audio level {level} code {code}"
        return f"text {id - self.text_range[0]}" if id < self.vocab_size else f"padding {id}"

    # Codes to ids and back

    def video_to_ids(self, codes: ArrayLike) -> NDArray[np.int64]:
        """Video codes of any shape, integers in [0, video_codebook_size), to ids of that shape, int64."""
        return _shift(codes, 0, self.video_codebook_size, self.video_range[0], "video code")

    def video_from_ids(self, ids: ArrayLike) -> NDArray[np.int64]:
        """Ids of any shape in `video_range` to video codes of that shape, int64; inverse of `video_to_ids`."""
        low, high = self.video_range
        return _shift(ids, low, high, -low, "video id")

    def audio_to_ids(self, codes: ArrayLike, level: int) -> NDArray[np.int64]:
        """Audio codes of one level, any shape, integers in [0, audio_codebook_size), to ids of that shape, int64."""
        low, _ = self.audio_range(level)
        return _shift(codes, 0, self.audio_codebook_size, low, f"audio level {level} code")

    def audio_from_ids(self, ids: ArrayLike, level: int) -> NDArray[np.int64]:
        """Ids of any shape in `audio_range(level)` to audio codes, int64; inverse of `audio_to_ids`."""
        low, high = self.audio_range(level)
        return _shift(ids, low, high, -low, f"audio level {level} id")

    def text_to_ids(self, codes: ArrayLike) -> NDArray[np.int64]:
        """Text pieces of any shape, integers in [0, text_vocab_size), to ids of that shape, int64."""
        return _shift(codes, 0, self.text_vocab_size, self.text_range[0], "text piece")

    def text_from_ids(self, ids: ArrayLike) -> NDArray[np.int64]:
        """Ids of any shape in `text_range` to text pieces, int64; inverse of `text_to_ids`."""
        low, high = self.text_range
        return _shift(ids, low, high, -low, "text id")

    # Files and the fingerprint

    @cached_property
    def fingerprint(self) -> str:
        """sha256 in hex of the layout, the special names and the tokenizers' specs; the same in every process."""
        content = {**self.to_dict(), "special_names": SPECIAL_NAMES, "num_specials": NUM_SPECIALS}
        text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
        return hashlib.sha256(text.encode("ascii")).hexdigest()

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain JSON values; inverse of `from_dict`."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {
            **fields,
            "resolutions": [list(pair) for pair in self.resolutions],
            "tokenizers": {name: dict(spec) for name, spec in self.tokenizers.items()},
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Vocabulary:
        """The vocabulary of `to_dict`'s values.

        Raises:
            VocabularyError: a key is missing or unknown, or a value cannot be used.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        missing, unknown = sorted(known - set(values)), sorted(set(values) - known)
        if missing or unknown:
            raise VocabularyError(f"a vocabulary lacks the keys {missing} and has the unknown keys {unknown}.")
        if not isinstance(values["tokenizers"], Mapping) or not all(
            isinstance(spec, Mapping) for spec in values["tokenizers"].values()
        ):
            raise VocabularyError(f"tokenizers must map names to specs, got {values['tokenizers']!r}.")
        return cls(**values)

    def save(self, path: str | Path) -> None:
        """Write JSON; the fingerprint stands in it, so that an edited file is noticed."""
        content = {**self.to_dict(), "fingerprint": self.fingerprint}
        Path(path).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Vocabulary:
        """Read what `save` wrote.

        Raises:
            CheckpointError: the file is missing or damaged, or was edited so that its fingerprint no longer fits.
        """
        try:
            values = json.loads(Path(path).read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise CheckpointError(f"there is no vocabulary at {path}.") from error
        except (OSError, ValueError) as error:
            raise CheckpointError(f"the vocabulary {path} cannot be read: {error}.") from error
        if not isinstance(values, dict) or "fingerprint" not in values:
            raise CheckpointError(f"the vocabulary {path} must be a JSON object with the key 'fingerprint'.")
        stored = values.pop("fingerprint")
        try:
            vocabulary = cls.from_dict(values)
        except VocabularyError as error:
            raise CheckpointError(f"the vocabulary {path} cannot be used: {error}") from error
        if stored != vocabulary.fingerprint:
            raise CheckpointError(
                f"the vocabulary {path} says that its fingerprint is {str(stored)[:12]}, but its content hashes to "
                f"{vocabulary.fingerprint[:12]}. It was edited or written by another version; write it anew."
            )
        return vocabulary


def _integer(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{value!r} is not an integer")
    return value


def _shift(values: ArrayLike, low: int, high: int, offset: int, what: str) -> NDArray[np.int64]:
    """`values` + `offset` as a new int64 array, after a check that all of them are integers in [low, high)."""
    array = np.asarray(values)
    if array.size == 0:
        return np.zeros(array.shape, np.int64)
    if array.dtype.kind not in "iu":
        raise VocabularyError(f"every {what} must be an integer, got an array of {array.dtype}.")
    smallest, largest = int(array.min()), int(array.max())
    if smallest < low or largest >= high:
        value = smallest if smallest < low else largest
        raise VocabularyError(f"{what} {value} is outside [{low}, {high}). It belongs to another codebook or range.")
    return array.astype(np.int64) + offset
