"""Which clips of a source a step learns from: some in turn, the others the more likely the worse they came out last.

Knows numbers of clips and their losses, not what a clip is. What a step takes in turn follows from the step alone and
can be drawn ahead; the hard ones follow from the losses so far, which are state, and from the caller's generator.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

__all__ = ["HardClips"]


class HardClips:
    """The numbers of a step's clips.

    Args:
        count: clips of the source; they are gone through in turn, round and round.
        batch_size: clips a step.
        share: of a batch, how many are drawn in proportion to the loss that they had when last seen; none at step 0.

    Attributes:
        count: clips of the source.
        losses: (count,) float64, the loss of each clip when it was last seen, 0 for one that never was; part of a
            checkpoint. Empty where `share` is 0.
    """

    def __init__(self, count: int, batch_size: int, share: float) -> None:
        self.count, self._batch_size, self._num_hard = count, batch_size, round(share * batch_size)
        self.losses = torch.zeros(count if share > 0 else 0, dtype=torch.float64)

    def in_turn(self, step: int) -> list[int]:
        """Numbers of the clips of `step` that do not depend on what came before."""
        taken = self._taken(step)
        return [index % self.count for index in range(step * taken, (step + 1) * taken)]

    def round(self, step: int) -> int:
        """How many times all clips have been gone through in turn before a step."""
        return step * self._taken(step) // self.count

    def _taken(self, step: int) -> int:
        return self._batch_size - (self._num_hard if step > 0 else 0)

    def hard(self, step: int, rng: np.random.Generator) -> list[int]:
        """Numbers drawn in proportion to the losses so far; a clip that was never seen is not among them."""
        if step == 0 or not self._num_hard or not float(self.losses.sum()) > 0:
            return []
        odds = (self.losses / self.losses.sum()).numpy()
        chosen: list[int] = rng.choice(len(odds), size=self._num_hard, p=odds).tolist()
        return chosen

    def remember(self, indices: Sequence[int], losses: Tensor) -> None:
        """Keep the losses, (B,) and not negative, of the clips `indices`."""
        if len(self.losses):
            self.losses[torch.as_tensor(indices)] = losses.detach().double().cpu()
