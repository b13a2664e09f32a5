"""What every tokenizer offers: a frozen spec and `encode`/`decode`. Knows codes, never the shared vocabulary's ids.

Legend: B clips, N frames, H x W pixels, T latent frames, h x w latent places a frame, K codebooks, S samples.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from poet_tokenizers.errors import ShapeError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["AudioSpec", "AudioTokenizer", "TextSpec", "TextTokenizer", "VideoSpec", "VideoTokenizer"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class VideoSpec:
    """What the shared vocabulary has to know of a video tokenizer.

    Attributes:
        kind: name of the tokenizer's family, e.g. "magvit2".
        codebook_size: codes lie in [0, codebook_size).
        temporal_stride: video frames per latent frame; the first frame is a latent frame of its own.
        spatial_stride: pixels per latent place along height and width.
        checksum: sha256 in hex of the weights that decide the codes, which are all but the decoder's; empty for a
            model that is still being trained.
    """

    kind: str
    codebook_size: int
    temporal_stride: int
    spatial_stride: int
    checksum: str = ""

    def latent_shape(self, num_frames: int, height: int, width: int) -> tuple[int, int, int]:
        """(T, h, w) of a clip of `num_frames` frames of `height` x `width` pixels; sizes round up to the stride.

        Raises:
            ShapeError: num_frames is not 1 + k * temporal_stride, or a size is not positive.
        """
        if num_frames < 1 or (num_frames - 1) % self.temporal_stride:
            raise ShapeError(
                f"a clip must have 1 + k * {self.temporal_stride} frames, got {num_frames}. Crop or pad it in time."
            )
        if height < 1 or width < 1:
            raise ShapeError(f"height and width must be positive, got {height} x {width}.")
        stride = self.spatial_stride
        return 1 + (num_frames - 1) // self.temporal_stride, -(-height // stride), -(-width // stride)

    def num_frames(self, num_latent_frames: int) -> int:
        """Video frames that `num_latent_frames` latent frames decode to; inverse of `latent_shape` in time."""
        return 1 + (num_latent_frames - 1) * self.temporal_stride


@dataclasses.dataclass(frozen=True, kw_only=True)
class AudioSpec:
    """What the shared vocabulary has to know of an audio tokenizer.

    Attributes:
        kind: name of the tokenizer's family, e.g. "encodec".
        sample_rate: samples per second.
        hop_length: samples per latent frame.
        num_codebooks: levels of the residual quantiser, coarse to fine.
        codebook_size: codes of every level lie in [0, codebook_size).
        checksum: sha256 in hex of the weights that decide the codes, which are all but the decoder's; empty for a
            model that is still being trained.
    """

    kind: str
    sample_rate: int
    hop_length: int
    num_codebooks: int
    codebook_size: int
    checksum: str = ""

    @property
    def frame_rate(self) -> float:
        """Latent frames per second."""
        return self.sample_rate / self.hop_length

    def num_latents(self, num_samples: int) -> int:
        """Latent frames of `num_samples` samples, rounded up to whole hops."""
        return -(-num_samples // self.hop_length)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextSpec:
    """What the shared vocabulary has to know of a text tokenizer.

    Attributes:
        kind: name of the tokenizer's family, e.g. "sentencepiece".
        num_pieces: codes lie in [0, num_pieces).
        checksum: sha256 of the model file in hex.
    """

    kind: str
    num_pieces: int
    checksum: str = ""


@runtime_checkable
class VideoTokenizer(Protocol):
    """Pixels to codes and back."""

    @property
    def spec(self) -> VideoSpec: ...

    def encode(self, video: Tensor) -> Tensor:
        """(B, 3, N, H, W) float in [-1, 1], N = 1 + k * temporal_stride, to codes (B, T, h, w) int64."""

    def decode(self, codes: Tensor) -> Tensor:
        """Codes (B, T, h, w) int64 to (B, 3, 1 + (T - 1) * temporal_stride, h * s, w * s) float32 in [-1, 1]."""


@runtime_checkable
class AudioTokenizer(Protocol):
    """Waveforms to codes and back."""

    @property
    def spec(self) -> AudioSpec: ...

    def encode(self, waveform: Tensor) -> Tensor:
        """(B, 1, S) float in [-1, 1] at `sample_rate` to codes (B, K, T) int64."""

    def decode(self, codes: Tensor) -> Tensor:
        """Codes (B, K, T) int64 to (B, 1, T * hop_length) float32 in [-1, 1]."""


@runtime_checkable
class TextTokenizer(Protocol):
    """Text to pieces and back."""

    @property
    def spec(self) -> TextSpec: ...

    def encode(self, text: str) -> list[int]:
        """Any text to codes in [0, num_pieces)."""

    def decode(self, codes: list[int]) -> str:
        """Codes back to text."""
