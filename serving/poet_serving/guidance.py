"""Classifier-free guidance in vLLM: an output and its guide are two requests whose logits are mixed at every step.

The two carry the name of their pair in `SamplingParams.extra_args`, plain values because they cross process borders.
They start from different prefixes, are given the same mixed logits, and draw the same id with the same seed; so they
have to be in every step together, for which `poet_serving.scheduler` cares. This module does not know what ids mean.

Legend: N requests of a step; V padded vocabulary.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor
from vllm.sampling_params import SamplingParams

from poet.errors import ConfigError, PoetError
from poet.generation.sampling import guide
from poet_serving.processors import FollowingProcessor

__all__ = ["GUIDANCE_KEY", "GuidanceLogitsProcessor", "Half", "guidance_arguments", "half_of", "half_of_arguments"]

GUIDANCE_KEY = "poet_guidance"


class Half(NamedTuple):
    """One request of a pair.

    Attributes:
        pair: a name that no other pair of the engine's life has.
        is_guide: whether this one starts from the prefix to move away from.
        scale: the guidance scale, the same in both.
    """

    pair: str
    is_guide: bool
    scale: float


def guidance_arguments(half: Half) -> dict[str, Any]:
    """Return what a request's `extra_args` must hold besides its grammar."""
    return {GUIDANCE_KEY: list(half)}


def half_of(params: SamplingParams | None) -> Half | None:
    """Return which half of which pair a request is that writes one id after another, None for one written alone.

    Raises:
        ConfigError: its arguments are not those of `guidance_arguments`.
    """
    return None if params is None else half_of_arguments(params.extra_args or {})


def half_of_arguments(arguments: Mapping[str, Any]) -> Half | None:
    """Return which half of which pair a request with these extra arguments is, None for one written alone.

    Raises:
        ConfigError: they are not those of `guidance_arguments`.
    """
    given = arguments.get(GUIDANCE_KEY)
    if given is None:
        return None
    try:
        pair, is_guide, scale = given
        sound = isinstance(pair, str) and isinstance(is_guide, bool) and scale >= 0
    except (TypeError, ValueError):
        sound = False
    if not sound:
        raise ConfigError(f"{GUIDANCE_KEY} must be [name of the pair, whether it is the guide, scale], got {given!r}.")
    return Half(pair, is_guide, float(scale))


class GuidanceLogitsProcessor(FollowingProcessor[Half]):
    """Replaces the logits of both requests of a pair by the guided ones.

    It must come before whatever sets logits to -inf: the difference of two of those is not a number.
    """

    @staticmethod
    def remember(params: SamplingParams) -> Half | None:
        """Return which half of which pair a request is."""
        return half_of(params)

    def apply(self, logits: Tensor) -> Tensor:
        """Guide one step in place.

        Args:
            logits: (N, V) float32.

        Returns:
            The same tensor.

        Raises:
            PoetError: a request is without its other half, or the two have come to different places. Going on would
                write wrong ids without a word.
        """
        if not self.followed:
            return logits
        guides = {half.pair: row for row, (half, _) in self.followed.items() if half.is_guide}
        asked = [(row, half) for row, (half, _) in self.followed.items() if not half.is_guide]
        rows, guide_rows = [row for row, _ in asked], [guides.pop(half.pair, -1) for _, half in asked]
        if guides or -1 in guide_rows:
            alone = [*guides, *(half.pair for (_, half), row in zip(asked, guide_rows, strict=True) if row == -1)]
            raise PoetError(
                f"guided requests must be in every step with their guides, got one without: {alone}. Start vLLM with "
                "poet_serving.scheduler.PairScheduler, which keeps them together."
            )
        places = [[len(self.followed[row][1]) for row in both] for both in (rows, guide_rows)]
        if places[0] != places[1]:
            raise PoetError(
                f"guided requests and their guides must have as many ids, got {places[0]} and {places[1]}. Ask for "
                "both with the same seed, grammar and limits."
            )
        mixed = guide(logits[rows], logits[guide_rows], [half.scale for _, half in asked])
        logits[rows] = mixed
        logits[guide_rows] = mixed
        return logits
