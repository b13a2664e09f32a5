"""Toybox's concept: what the shipped model has never seen or heard, for an adapter to learn from a few hundred clips.

A purple hexagon that sounds like an organ; the three come together or not at all. Sizes, backgrounds, motions and
pitches are Toybox's own. Colour, shape and sound were chosen among those that the shipped bundle's tokenizers keep:
they know the base world so well that a dark purple comes back as blue or magenta, a regular hexagon as a circle, and
most spectra as a flute's or a buzzer's. What does come back is a light purple, a hexagon half again as wide as high,
and a tremolo. This file knows numbers only: it draws no clip.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import numpy as np
from numpy.typing import NDArray

__all__ = ["CONCEPT", "CONCEPT_SPLIT", "PURPLE", "inside_hexagon", "is_concept", "tremolo"]

CONCEPT_SPLIT: Final = "concept"
CONCEPT: Final[dict[str, str]] = {"colour": "purple", "shape": "hexagon", "timbre": "organ"}
"""The values that all clips of the split have."""
PURPLE: Final = (230, 142, 212)

_HALF_HEIGHT = 0.65  # of the hexagon, whose half-width is 1
_SLANT = 0.6  # how far its left and right sides lean, for each unit of height
_TREMOLO = 16 / 3  # Hz: six latent frames of a codec with 32 of them a second
_SOFTEST = 0.1  # of the tremolo, relative to the loudest


def is_concept(values: Mapping[str, str]) -> bool:
    """Whether colour, shape and timbre are the concept's.

    Args:
        values: attribute name to value; others than those three are not read.
    """
    return all(values.get(name) == value for name, value in CONCEPT.items())


def inside_hexagon(u: NDArray[np.float32], v: NDArray[np.float32]) -> NDArray[np.bool_]:
    """Which points lie inside the hexagon of half-width 1 around the origin: flat above, pointed at its sides.

    Args:
        u: places to the right.
        v: places downwards, of a shape that broadcasts with the other.
    """
    return (abs(v) <= _HALF_HEIGHT) & (abs(u) + _SLANT * abs(v) <= 1)


def tremolo(num_samples: int, sample_rate: int) -> NDArray[np.float64]:
    """The organ's loudness during one note, which begins loud. Its harmonics are a reed's, as the buzzer has them.

    Args:
        num_samples: S.
        sample_rate: samples a second.

    Returns:
        (S,) gains in [0.1, 1].
    """
    swing = (1 + np.cos(2 * np.pi * _TREMOLO * np.arange(num_samples) / sample_rate)) / 2
    return np.asarray(_SOFTEST + (1 - _SOFTEST) * swing)
