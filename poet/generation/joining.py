"""Scenes joined to a film without a seam, piece by piece. Knows frames and samples alone.

Legend: N, M frames of H x W pixels; S, M samples.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from poet.media import Clip

__all__ = ["Frames", "Samples", "SeamlessJoin"]

Frames = NDArray[np.uint8]
Samples = NDArray[np.float32]

_LOOP_FADE = 0.01  # seconds at both ends of the sound of a film that is shown again and again


class SeamlessJoin:
    """Joins scenes piece by piece: the frame that two scenes share is their mean, their sounds fade into each other.

    What it gives out is final. It holds back no more than the last frame of a scene and the sound under it, and at the
    end of the film what fades into that at which it arrives.

    Args:
        fps: frames per second.
        sample_rate: samples per second.
        fade_frames: at the film's end, that show what it arrives at.
        loop: whether the film arrives at its own beginning.
    """

    def __init__(self, *, fps: float, sample_rate: int, fade_frames: int = 0, loop: bool = False) -> None:
        self._fps, self._sample_rate = fps, sample_rate
        self._overlap = round(sample_rate / fps)
        self._fade_frames, self._loop = fade_frames, loop
        self._held_frames: Frames | None = None
        self._held_samples: Samples | None = None

    def begin(self, start: Clip | None) -> tuple[Frames | None, Samples | None]:
        """Put a clip in front, silent where it has no sound; returns what is final of it."""
        if start is None or start.frames is None:
            return None, None
        length = round(len(start.frames) * self._sample_rate / self._fps)
        sound = np.zeros(0, np.float32) if start.samples is None else start.samples[:length]
        samples = np.pad(sound, (0, length - len(sound)))
        return self.add_frames(start.frames, starts=True, ends=True), self.add_samples(samples)

    def add_frames(self, frames: Frames, *, starts: bool, ends: bool) -> Frames:
        """Add frames of a scene.

        Args:
            frames: (N, H, W, 3), one or more.
            starts: whether the first of them is the scene's first.
            ends: whether the last of them is the scene's last.

        Returns:
            (M, H, W, 3) frames that are final.
        """
        held = self._held_frames
        if starts and held is not None:
            shared = ((held[-1:].astype(np.uint16) + frames[:1] + 1) // 2).astype(np.uint8)
            frames = np.concatenate([held[:-1], shared, frames[1:]])
        elif held is not None:
            frames = np.concatenate([held, frames])
        keep = max(1, self._fade_frames) if ends else self._fade_frames
        cut = max(0, len(frames) - keep)
        self._held_frames = frames[cut:] if cut < len(frames) else None
        return frames[:cut]

    def add_samples(self, samples: Samples) -> Samples:
        """Add the sound of a whole scene, (S,); returns the (M,) samples that are final."""
        held = self._held_samples
        if held is not None:
            samples = _faded(held, samples, self._overlap)
        elif self._loop:
            samples = samples * _ramp(round(_LOOP_FADE * self._sample_rate), len(samples))
        keep = max(self._overlap, round(self._fade_frames * self._sample_rate / self._fps))
        keep += round(_LOOP_FADE * self._sample_rate) if self._loop else 0
        cut = max(0, len(samples) - keep)
        self._held_samples = samples[cut:]
        return samples[:cut]

    def close(self, end: Clip | None = None) -> tuple[Frames, Samples]:
        """Give out what is left, and the clip at which the film arrives; a loop's last frames are its first ones."""
        frames, samples = self._held_frames, self._held_samples
        assert frames is not None
        assert samples is not None
        if self._loop:
            size = len(samples) - round(self._fade_frames * self._sample_rate / self._fps)
            return frames[:0], samples[:size] * _ramp(size, size)[::-1]
        if end is None or end.frames is None:
            return frames, samples
        length = round(len(end.frames) * self._sample_rate / self._fps)
        sound = np.zeros(0, np.float32) if end.samples is None else end.samples[:length]
        count = min(len(frames), len(end.frames))
        weight = (np.arange(1, count + 1, dtype=np.float32) / (count + 1))[:, None, None, None]
        shared = (1 - weight) * frames[len(frames) - count :] + weight * end.frames[:count]
        joined = np.concatenate([frames[: len(frames) - count], np.rint(shared).astype(np.uint8), end.frames[count:]])
        return joined, _faded(samples, np.pad(sound, (0, length - len(sound))), len(samples))


def _faded(before: Samples, after: Samples, overlap: int) -> Samples:
    """The end of one sound faded into the beginning of another with equal power; (S,) and (M,) to the whole."""
    overlap = min(overlap, len(before), len(after))
    angle = np.linspace(0, np.pi / 2, overlap, dtype=np.float32)
    shared = before[len(before) - overlap :] * np.cos(angle) + after[:overlap] * np.sin(angle)
    return np.concatenate([before[: len(before) - overlap], shared.clip(-1, 1), after[overlap:]])


def _ramp(size: int, length: int) -> Samples:
    """(length,) ones with a rise from 0 over the first `size`."""
    ramp = np.ones(length, np.float32)
    ramp[: min(size, length)] = np.linspace(0, 1, size, dtype=np.float32)[:length]
    return ramp
