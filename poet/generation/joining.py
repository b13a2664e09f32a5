"""Scenes joined to a film without a seam, piece by piece. Knows frames and samples alone.

Legend: N, M frames of H x W pixels; S samples.
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
    end of the film what fades into that at which it arrives. Sound always stands where its frames do, rounded to the
    next sample.

    Args:
        fps: frames per second.
        sample_rate: samples per second.
        fade_frames: at the film's end, that show what it arrives at.
        loop: whether the film arrives at its own beginning.
    """

    def __init__(self, *, fps: float, sample_rate: int, fade_frames: int = 0, loop: bool = False) -> None:
        self._fps, self._sample_rate = fps, sample_rate
        self._fade_frames, self._loop = fade_frames, loop
        self._held_frames: Frames | None = None
        self._held_samples = np.zeros(0, np.float32)
        self._num_frames = self._scene_begin = self._num_samples = 0

    def begin(self, start: Clip | None) -> tuple[Frames | None, Samples | None]:
        """Put a clip in front, silent where it has no sound; returns what is final of it."""
        if start is None or start.frames is None:
            return None, None
        frames = self.add_frames(start.frames, starts=True, ends=True)
        return frames, self.add_samples(_sound_of(start))

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
        if starts:
            self._scene_begin = self._num_frames - (held is not None)
        self._num_frames += len(frames) - (starts and held is not None)
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
        """Add the sound of the scene whose frames were added last, (S,); returns the (M,) samples that are final.

        It is cut, or filled up with silence, to the length of its frames.
        """
        begin = self._place(self._scene_begin)
        samples = _fitted(samples, self._place(self._num_frames) - begin)
        if self._num_samples or len(self._held_samples):
            samples = self._fade_in(samples, begin)
        elif self._loop:
            samples = samples * _ramp(self._loop_fade, len(samples))
        final = self._place(self._num_frames - max(1, self._fade_frames)) - (self._loop_fade if self._loop else 0)
        return self._give(samples, final)

    def close(self, end: Clip | None = None) -> tuple[Frames, Samples]:
        """Give out what is left, and the clip at which the film arrives; a loop's last frames are its first ones."""
        frames, samples = self._held_frames, self._held_samples
        assert frames is not None
        if self._loop:
            size = self._place(self._num_frames - self._fade_frames) - self._num_samples
            return frames[:0], samples[:size] * _ramp(size, size)[::-1]
        if end is None or end.frames is None:
            return frames, samples
        count = min(len(frames), len(end.frames))
        weight = (np.arange(1, count + 1, dtype=np.float32) / (count + 1))[:, None, None, None]
        shared = (1 - weight) * frames[len(frames) - count :] + weight * end.frames[:count]
        joined = np.concatenate([frames[: len(frames) - count], np.rint(shared).astype(np.uint8), end.frames[count:]])
        begin = self._place(self._num_frames - count)
        last = self._place(self._num_frames - count + len(end.frames))
        return joined, self._fade_in(_fitted(_sound_of(end), last - begin), begin)

    @property
    def _loop_fade(self) -> int:
        return round(_LOOP_FADE * self._sample_rate)

    def _place(self, frame: int) -> int:
        """The sample at which a frame begins."""
        return round(frame * self._sample_rate / self._fps)

    def _fade_in(self, samples: Samples, begin: int) -> Samples:
        """What is held back, and sound that begins at sample `begin`, faded into each other with equal power."""
        held = self._held_samples
        overlap = min(self._num_samples + len(held) - begin, len(held), len(samples))
        angle = np.linspace(0, np.pi / 2, overlap, dtype=np.float32)
        shared = held[len(held) - overlap :] * np.cos(angle) + samples[:overlap] * np.sin(angle)
        return np.concatenate([held[: len(held) - overlap], shared.clip(-1, 1), samples[overlap:]])

    def _give(self, samples: Samples, final: int) -> Samples:
        """Give out what comes before sample `final` of the film, and hold back the rest."""
        cut = min(max(0, final - self._num_samples), len(samples))
        self._held_samples = samples[cut:]
        self._num_samples += cut
        return samples[:cut]


def _sound_of(clip: Clip) -> Samples:
    return np.zeros(0, np.float32) if clip.samples is None else clip.samples


def _fitted(samples: Samples, length: int) -> Samples:
    return np.pad(samples[:length], (0, max(0, length - len(samples))))


def _ramp(size: int, length: int) -> Samples:
    """(length,) ones with a rise from 0 over the first `size`."""
    ramp = np.ones(length, np.float32)
    ramp[: min(size, length)] = np.linspace(0, 1, size, dtype=np.float32)[:length]
    return ramp
