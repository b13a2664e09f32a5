"""How much two models say the same. Knows numbers, not models."""

from __future__ import annotations

import dataclasses

from torch import Tensor

__all__ = ["Agreement"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Agreement:
    """How much two models say the same.

    Attributes:
        largest_difference: between two logits of one id at one place.
        largest_logit: of all, by size, to compare the difference with.
        greedy: share of places at which both find the same id likeliest.
    """

    largest_difference: float
    largest_logit: float
    greedy: float

    @classmethod
    def of(cls, first: Tensor, second: Tensor) -> Agreement:
        """The agreement of two models' logits of the same places, (..., V) floating-point."""
        return cls(
            largest_difference=float((first - second).abs().max()),
            largest_logit=float(first.abs().max()),
            greedy=float((first.argmax(-1) == second.argmax(-1)).float().mean()),
        )
