"""Steps that would do harm are left out: a loss or gradient that is no number, or a loss far above those before it.

Both trainers of the language model ask the guard between the gradient and the optimizer. It knows numbers, not models.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Mapping
from typing import Any, Final

from poet.errors import CheckpointError

__all__ = ["StepGuard"]

_REMEMBERED: Final = 64
_NEEDED: Final = 16  # losses to compare with; a run begins with losses that fall quickly


class StepGuard:
    """Says of each step whether it may change the weights.

    Args:
        spike_ratio: a loss more than so many times the median of the last 64 is a spike.
        max_skipped_steps: so many steps left out one after another are one too many.
    """

    def __init__(self, spike_ratio: float, max_skipped_steps: int) -> None:
        self.spike_ratio, self.max_skipped_steps = spike_ratio, max_skipped_steps
        self._losses: deque[float] = deque(maxlen=_REMEMBERED)
        self._skipped = 0

    def admits(self, step: int, loss: float, gradient_norm: float) -> bool:
        """Whether the step may change the weights.

        Args:
            step: its number.
            loss: of the whole batch.
            gradient_norm: before clipping.

        Raises:
            CheckpointError: too many steps were left out one after another.
        """
        finite = math.isfinite(loss) and math.isfinite(gradient_norm)
        known = len(self._losses) >= _NEEDED
        if finite and not (known and loss > self.spike_ratio * statistics.median(self._losses)):
            self._losses.append(loss)
            self._skipped = 0
            return True
        self._skipped += 1
        if self._skipped > self.max_skipped_steps:
            raise CheckpointError(
                f"at most {self.max_skipped_steps} steps may be left out one after another, but up to step {step} "
                f"{self._skipped} were: loss {loss}, gradient norm {gradient_norm}, median loss before "
                f"{statistics.median(self._losses) if self._losses else 'unknown'}. The last checkpoint is kept; begin "
                "anew from it in another directory (start_from) with a lower learning rate."
            )
        return False

    def state_dict(self) -> dict[str, Any]:
        """What the next answer depends on, as plain values."""
        return {"losses": list(self._losses), "skipped": self._skipped}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Inverse of `state_dict`."""
        self._losses = deque(state["losses"], maxlen=_REMEMBERED)
        self._skipped = int(state["skipped"])
