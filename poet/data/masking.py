"""Which places of a scene are hidden when it is learnt as one that is written many ids at once.

Five ways to hide, so that one model can fill a canvas in any order that decoding may ask of it: places anywhere, by two
schedules; the places of a block, as when a part of a clip is painted anew; all that comes after some latent frame, as
when frames are written one after another; all that is finer than some level of sound. Each hides a share of its places
that is drawn too: a canvas is met at every stage from empty to nearly full.

Knows places, not ids. Legend: T latent frames of h x w places, K audio levels, A audio latents, L places of an output.

Source: MaskGIT, arXiv:2202.04200, section 3.2 (the cosine schedule); MAGVIT, arXiv:2212.05199, section 3.2 (blocks and
frames as conditions); SoundStorm, arXiv:2305.09636, section 3.2 (levels).
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Mapping
from typing import Final

import numpy as np
from numpy.typing import NDArray

from poet.errors import ConfigError

__all__ = ["MASK_KINDS", "MaskSampler"]

MASK_KINDS: Final = ("cosine", "uniform", "block", "frame", "level")
"""cosine, uniform: any places, by that law of their share; block, frame, level: as the file's head says."""

Places = NDArray[np.int64]


class MaskSampler:
    """Draw what is hidden.

    Args:
        weights: kind to weight, those of `MASK_KINDS`.

    Raises:
        ConfigError: no kind, an unknown one, or a weight that is not positive.
    """

    def __init__(self, weights: Mapping[str, float]) -> None:
        unknown = sorted(weights.keys() - set(MASK_KINDS))
        if not weights or unknown or not all(0 < weight < math.inf for weight in weights.values()):
            raise ConfigError(
                f"masks must map kinds of {', '.join(MASK_KINDS)} to positive weights, got {dict(weights)}."
            )
        self.weights = {kind: float(weights[kind]) for kind in MASK_KINDS if kind in weights}
        total, self._bounds = sum(self.weights.values()), list[float]()
        for weight in self.weights.values():
            self._bounds.append((self._bounds[-1] if self._bounds else 0.0) + weight / total)

    def draw(self, video: Places | None, audio: Places | None, rng: np.random.Generator) -> Places:
        """Draw the hidden places of one output.

        Args:
            video: (T, h, w) its places of video, or None.
            audio: (K, A) its places of sound, or None. One of the two is there.
            rng: source of randomness.

        Returns:
            (N,) of those places, at least one, without repetition.
        """
        kinds = list(self.weights)
        kind = kinds[min(bisect.bisect_right(self._bounds, rng.random()), len(kinds) - 1)]
        if kind == "frame" and video is None:
            kind = "level"
        if kind == "level" and audio is None:
            kind = "frame"
        if kind == "block":
            return _some(np.concatenate([part.ravel() for part in _block(video, audio, rng)]), _cosine(rng), rng)
        if kind == "frame":
            assert video is not None
            return _after_frame(video, audio, rng)
        if kind == "level":
            assert audio is not None
            return _after_level(video, audio, rng)
        everywhere = np.concatenate([part.ravel() for part in (video, audio) if part is not None])
        return _some(everywhere, _cosine(rng) if kind == "cosine" else rng.random(), rng)


def _cosine(rng: np.random.Generator) -> float:
    """The share that is hidden at a random moment of decoding by the cosine schedule."""
    return math.cos(math.pi / 2 * rng.random())


def _some(places: Places, share: float, rng: np.random.Generator) -> Places:
    """That share of the places, rounded up."""
    count = min(len(places), max(1, math.ceil(share * len(places))))
    return rng.permutation(places)[:count]


def _block(video: Places | None, audio: Places | None, rng: np.random.Generator) -> list[Places]:
    """A box of the video and the same stretch of time of the sound; sometimes one of the two alone."""
    start, stop = _stretch(rng)
    alone = rng.random()
    parts = []
    if video is not None and (audio is None or alone > 0.25):
        rows, columns = (slice(*_whole(*_stretch(rng), size)) for size in video.shape[1:])
        parts.append(video[slice(*_whole(start, stop, len(video))), rows, columns])
    if audio is not None and (video is None or alone < 0.75):
        parts.append(audio[:, slice(*_whole(start, stop, audio.shape[1]))])
    return parts


def _stretch(rng: np.random.Generator) -> tuple[float, float]:
    """A stretch of [0, 1) that is a quarter of it or longer."""
    size = rng.uniform(0.25, 1.0)
    start = rng.uniform(0.0, 1.0 - size)
    return start, start + size


def _whole(start: float, stop: float, size: int) -> tuple[int, int]:
    """The places of an axis of `size` that a stretch of [0, 1) touches."""
    first = min(size - 1, math.floor(start * size))
    return first, max(first + 1, math.ceil(stop * size))


def _after_frame(video: Places, audio: Places | None, rng: np.random.Generator) -> Places:
    """Frames before a drawn one are known, a part of that one too, and nothing after it; sound comes after all frames.

    Where the drawn one lies behind the last, the video is known and a part of the sound.
    """
    frame = int(rng.integers(len(video) + (audio is not None)))
    if frame == len(video):
        assert audio is not None
        return _some(audio.ravel(), _cosine(rng), rng)
    parts = [_some(video[frame].ravel(), _cosine(rng), rng), video[frame + 1 :].ravel()]
    return np.concatenate(parts if audio is None else [*parts, audio.ravel()])


def _after_level(video: Places | None, audio: Places, rng: np.random.Generator) -> Places:
    """Levels before a drawn one are known, a part of that one too, and nothing finer; the video is known, or a part."""
    level = int(rng.integers(len(audio)))
    parts = [_some(audio[level].ravel(), _cosine(rng), rng), audio[level + 1 :].ravel()]
    if video is not None and rng.random() < 0.5:
        parts.append(_some(video.ravel(), _cosine(rng), rng))
    return np.concatenate(parts)
