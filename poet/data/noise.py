"""Video codes as a model gets them wrong, for training: what is written later has to put right what came before.

A model that writes reads its own mistakes, one that learns reads none. So some of the bits of what it is shown are
flipped, while what it shall write stays as it was. Knows ids and bits; which scenes are shown so is the loader's
choice.

Source: Han et al., arXiv:2412.04431, section 3.4 (bitwise self-correction), there for images that are written from
coarse to fine.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from poet.errors import ConfigError
from poet.vocabulary import Vocabulary

__all__ = ["check_flips", "flip_bits"]

_LEFT_ALONE = 0.5  # share of the parts of a scene that are shown as they are


def check_flips(share: float, vocabulary: Vocabulary) -> None:
    """Raise unless bits of a vocabulary's video codes can be flipped.

    Args:
        share: of the bits, the most.
        vocabulary: of the codes.

    Raises:
        ConfigError: a share outside [0, 0.5], or codes that are not bits.
    """
    if not 0 <= share <= 0.5:
        raise ConfigError(f"bits must be flipped in a share from 0 to 0.5, at which nothing is left, got {share!r}.")
    size = vocabulary.video_codebook_size
    if share > 0 and size & (size - 1):
        raise ConfigError(f"bits can be flipped in codebooks of 2^k codes, got {size} codes. Leave the noise out.")


def flip_bits(
    ids: NDArray[np.int64], latent_size: int, share: float, vocabulary: Vocabulary, rng: np.random.Generator
) -> NDArray[np.int64]:
    """Flip bits of a scene's video codes.

    The first latent frame, which a film's scene has from the one before, and the others each have a share of their own:
    none in half of the cases, else one drawn between 0 and `share`.

    Args:
        ids: (L,), of one scene; what is no video code stays.
        latent_size: ids of a latent frame.
        share: of the bits, the most that are flipped.
        vocabulary: gives the range, of 2^k codes.
        rng: of everything that is drawn.

    Returns:
        (L,) int64.
    """
    low, high = vocabulary.video_range
    places = np.flatnonzero((ids >= low) & (ids < high))
    shares = rng.uniform(0.0, share, 2) * (rng.random(2) >= _LEFT_ALONE)
    own = shares[(np.arange(len(places)) >= latent_size).astype(np.int64)]
    num_bits = (high - low).bit_length() - 1
    flipped = rng.random((len(places), num_bits)) < own[:, None]
    noisy = ids.copy()
    noisy[places] = low + ((ids[places] - low) ^ (flipped @ (1 << np.arange(num_bits))))
    return noisy
