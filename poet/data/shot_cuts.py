"""Where a film cuts from one shot to the next, by PySceneDetect; the one file that imports it.

Its adaptive detector compares the change between two pictures with that of their neighbours, so that a fast pan is no
cut. Dissolves and fades are not found. Knows no files.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Final

import numpy as np
from numpy.typing import NDArray

from poet.errors import ConfigError

if TYPE_CHECKING:
    from scenedetect import AdaptiveDetector

__all__ = ["SHOT_THRESHOLD", "ShotCuts"]

SHOT_THRESHOLD: Final = 3.0
"""How many times as much as around it a picture must change to be a cut; PySceneDetect's own default."""

_COUNTED_RATE: Final = 25.0
"""Pictures are counted, not timed, so the rate that PySceneDetect wants to know decides nothing."""


class ShotCuts:
    """Takes a film's pictures one after the other; `times` is where shots begin, but for the first.

    Args:
        threshold: see `SHOT_THRESHOLD`.

    Raises:
        ConfigError: PySceneDetect is not installed, or the threshold is not above 0.
    """

    def __init__(self, threshold: float = SHOT_THRESHOLD) -> None:
        if not threshold > 0:
            raise ConfigError(
                f"the threshold of shot cuts must be above 0, got {threshold}. {SHOT_THRESHOLD} is usual."
            )
        self._detector = _build_detector(threshold)
        self._shown: list[float] = []
        self.times: list[float] = []

    def add(self, time: float, pixels: NDArray[np.uint8]) -> None:
        """Take the next picture: (H, W, 3) uint8 RGB, shown at `time` seconds."""
        from scenedetect import FrameTimecode

        count = FrameTimecode(len(self._shown), _COUNTED_RATE)
        self._shown.append(time)
        for cut in self._detector.process_frame(count, np.ascontiguousarray(pixels[:, :, ::-1])):
            self.times.append(self._shown[cut.frame_num])


def _build_detector(threshold: float) -> AdaptiveDetector:
    try:
        from scenedetect import AdaptiveDetector
    except ImportError as error:
        raise ConfigError(
            f"finding shot cuts needs PySceneDetect, which cannot be imported ({error}). Install openpoet[footage], or "
            "cut by length alone."
        ) from error
    logging.getLogger("pyscenedetect").setLevel(logging.ERROR)
    # Of two cuts close to each other none may be forgotten: a scene with a cut inside would be the result.
    return AdaptiveDetector(adaptive_threshold=threshold, min_scene_len=0)
