"""The penalty on repeated ids in vLLM: a logits processor that follows what each request has written.

vLLM has a penalty of its own, which counts the prompt and knows no window; Poet's counts the last ids of the output
alone, the same as the reference's. This module does not know what ids mean.

Legend: N requests of a step, V padded vocabulary.
"""

from typing import Any, Final

from torch import Tensor
from vllm.sampling_params import SamplingParams

from poet.errors import ConfigError
from poet.generation.sampling import SamplingConfig, penalise
from poet_serving.processors import FollowingProcessor

__all__ = ["REPETITION_KEY", "RepetitionLogitsProcessor", "repetition_arguments"]

REPETITION_KEY: Final = "poet_repetition"


def repetition_arguments(sampling: SamplingConfig) -> dict[str, Any]:
    """Return what a request's `extra_args` must hold besides its grammar; nothing where there is no penalty."""
    if sampling.repetition_penalty == 1:
        return {}
    return {REPETITION_KEY: [float(sampling.repetition_penalty), sampling.repetition_window]}


class RepetitionLogitsProcessor(FollowingProcessor[SamplingConfig]):
    """Penalises the last ids of every request that asks for it.

    It comes after guidance, whose logits it changes, and before whatever sets logits to -inf.
    """

    @staticmethod
    def remember(params: SamplingParams) -> SamplingConfig | None:
        """Return the penalty that a request asks for."""
        given = (params.extra_args or {}).get(REPETITION_KEY)
        if given is None:
            return None
        try:
            penalty, window = given
        except (TypeError, ValueError) as error:
            raise ConfigError(f"{REPETITION_KEY} must be [penalty, window], got {given!r}.") from error
        return SamplingConfig(repetition_penalty=penalty, repetition_window=window)

    def apply(self, logits: Tensor) -> Tensor:
        """Penalise one step in place.

        Args:
            logits: (N, V) float32.

        Returns:
            The same tensor.
        """
        for row, (config, output_ids) in self.followed.items():
            penalise(logits[row], output_ids, config)
        return logits
