"""The penalty on repeated ids in vLLM: a logits processor that follows what each request has written.

vLLM has a penalty of its own, which counts the prompt and knows no window; Poet's counts the last ids of the output
alone, the same as the reference's. This module does not know what ids mean.

Legend: N requests of a step, V padded vocabulary.
"""

from typing import Any, Final

import torch
from torch import Tensor
from vllm.sampling_params import SamplingParams
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor
from vllm.v1.sample.logits_processor.builtin import process_dict_updates

from poet.errors import ConfigError
from poet.generation.sampling import SamplingConfig, penalise

__all__ = ["REPETITION_KEY", "RepetitionLogitsProcessor", "repetition_arguments"]

REPETITION_KEY: Final = "poet_repetition"


def repetition_arguments(sampling: SamplingConfig) -> dict[str, Any]:
    """Return what a request's `extra_args` must hold besides its grammar; nothing where there is no penalty."""
    if sampling.repetition_penalty == 1:
        return {}
    return {REPETITION_KEY: [float(sampling.repetition_penalty), sampling.repetition_window]}


class RepetitionLogitsProcessor(LogitsProcessor):  # type: ignore[misc]
    """Penalises the last ids of every request that asks for it.

    It comes after guidance, whose logits it changes, and before whatever sets logits to -inf.
    """

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        """Refuse malformed arguments.

        Raises:
            ValueError: vLLM answers the request with its message.
        """
        _of_request(sampling_params)

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
        self._followed: dict[int, tuple[SamplingConfig, list[int]]] = {}

    def is_argmax_invariant(self) -> bool:
        """Return False: the likeliest id may be a repeated one."""
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Take over the requests that joined, left or moved since the last step."""
        process_dict_updates(self._followed, batch_update, self._follow)

    @staticmethod
    def _follow(
        params: SamplingParams, prompt_ids: list[int] | None, output_ids: list[int]
    ) -> tuple[SamplingConfig, list[int]] | None:
        config = _of_request(params)
        return None if config is None else (config, output_ids)

    def apply(self, logits: Tensor) -> Tensor:
        """Penalise one step in place.

        Args:
            logits: (N, V) float32.

        Returns:
            The same tensor.
        """
        for row, (config, output_ids) in self._followed.items():
            penalise(logits[row], output_ids, config)
        return logits


def _of_request(params: SamplingParams) -> SamplingConfig | None:
    given = (params.extra_args or {}).get(REPETITION_KEY)
    if given is None:
        return None
    try:
        penalty, window = given
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{REPETITION_KEY} must be [penalty, window], got {given!r}.") from error
    return SamplingConfig(repetition_penalty=penalty, repetition_window=window)
