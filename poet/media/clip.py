"""A clip in memory and a file's description. Knows no file format."""

import math
from dataclasses import dataclass, field
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from poet.errors import ConfigError, ShapeError

MAX_FPS = 1000
"""Beyond any camera; keeps a mistyped rate from asking for millions of frames."""


def exact_fps(fps: float | Fraction) -> Fraction:
    """The rational rate that a decimal one stands for: 29.97002997 is 30000/1001.

    Args:
        fps: frames per second, above 0 and at most 1000.

    Raises:
        ConfigError: fps is not a number in that range.
    """
    if not math.isfinite(fps) or not 0 < fps <= MAX_FPS:
        raise ConfigError(f"fps must be above 0 and at most {MAX_FPS}, got {fps}. Give frames per second, e.g. 24.")
    # Every broadcast rate is an integer over 1 or 1001; the limit also tidies up what a float cannot hold.
    return Fraction(fps).limit_denominator(1001) or Fraction(fps)


@dataclass(frozen=True, eq=False)
class Clip:
    """Pictures, sound, or both.

    Attributes:
        frames: (N, H, W, 3) uint8 RGB, or None for sound alone.
        fps: frames per second; kept but unused where frames is None.
        samples: (S,) float32 mono in [-1, 1], or None for silent pictures.
        sample_rate: samples per second; kept but unused where samples is None.

    Raises:
        ShapeError: an array of the wrong shape, type or range, or neither array is given.
        ConfigError: a rate that cannot be used.
    """

    frames: NDArray[np.uint8] | None
    fps: float
    samples: NDArray[np.float32] | None
    sample_rate: int

    def __post_init__(self) -> None:
        if self.frames is None and self.samples is None:
            raise ShapeError("a Clip must hold frames, samples or both, got neither. Give at least one array.")
        if self.frames is not None:
            frames = self.frames
            if frames.ndim != 4 or frames.shape[3] != 3 or 0 in frames.shape or frames.dtype != np.uint8:
                raise ShapeError(
                    f"frames must be (N, H, W, 3) uint8 with no empty axis, got {frames.shape} {frames.dtype}. "
                    "Scale pixels to 0..255, move the channels last and convert with astype(numpy.uint8)."
                )
            exact_fps(self.fps)
        if self.samples is not None:
            samples = self.samples
            if samples.ndim != 1 or not len(samples) or samples.dtype != np.float32:
                raise ShapeError(
                    f"samples must be (S,) float32 mono and not empty, got {samples.shape} {samples.dtype}. "
                    "Average the channels and convert with astype(numpy.float32)."
                )
            if self.sample_rate <= 0:
                raise ConfigError(f"sample_rate must be above 0, got {self.sample_rate}. Give samples per second.")
            peak = float(np.abs(samples).max(initial=0.0))
            if not peak <= 1.0:  # also true of NaN, which no comparison accepts
                raise ShapeError(
                    f"samples must lie in [-1, 1], got a peak of {peak}. Scale them, or clip with numpy.clip(x, -1, 1)."
                )

    @property
    def duration(self) -> float:
        """Seconds: the pictures' where there are any, the sound's otherwise."""
        if self.frames is not None:
            return len(self.frames) / self.fps
        assert self.samples is not None
        return len(self.samples) / self.sample_rate


@dataclass(frozen=True, kw_only=True)
class MediaInfo:
    """What a file's headers say; nothing is decoded to find out.

    Attributes:
        format: ffmpeg's name of the container.
        duration: seconds; 0.0 where the file does not say.
        fps: frames per second; 0.0 where there is no picture.
        height: rows as stored, before any rotation; 0 where there is no picture.
        width: columns as stored.
        video_codec: ffmpeg's name, or None where there is no picture.
        pixel_format: ffmpeg's name, or None.
        audio_codec: ffmpeg's name, or None where there is no sound.
        sample_rate: 0 where there is no sound.
        num_channels: 0 where there is no sound.
        metadata: what `write_clip` was given; {} for files that it did not write.
        tags: the container's own tags as they stand, names in lower case.
    """

    format: str
    duration: float
    fps: float
    height: int
    width: int
    video_codec: str | None
    pixel_format: str | None
    audio_codec: str | None
    sample_rate: int
    num_channels: int
    metadata: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)

    @property
    def has_video(self) -> bool:
        """Whether there is a moving or still picture (the cover of a song does not count)."""
        return self.video_codec is not None

    @property
    def has_audio(self) -> bool:
        """Whether there is sound."""
        return self.audio_codec is not None
