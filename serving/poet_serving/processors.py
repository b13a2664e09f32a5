"""What Poet's logits processors share: each follows the requests of a batch that ask for it. Knows no ids.

Legend: N requests of a step, V padded vocabulary.
"""

import abc
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from vllm.sampling_params import SamplingParams
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor
from vllm.v1.sample.logits_processor.builtin import process_dict_updates

__all__ = ["FollowingProcessor"]

T = TypeVar("T")


class FollowingProcessor(LogitsProcessor, Generic[T]):  # type: ignore[misc]
    """A logits processor for some requests of a batch, that says what it must remember of one.

    Attributes:
        followed: row to what is remembered of its request, and the ids that the request has written: a list to which
            vLLM appends in place, and which a request that was preempted brings back.
    """

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
        self.followed: dict[int, tuple[T, list[int]]] = {}

    @staticmethod
    @abc.abstractmethod
    def remember(params: SamplingParams) -> Any:
        """Return what to remember of a request, or None where it asks for nothing.

        Raises:
            ConfigError: its arguments are malformed.
        """

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        """Refuse malformed arguments.

        Raises:
            ValueError: vLLM answers the request with its message.
        """
        cls.remember(sampling_params)

    def is_argmax_invariant(self) -> bool:
        """Return False: another id may become the likeliest."""
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Take over the requests that joined, left or moved since the last step."""
        process_dict_updates(self.followed, batch_update, self._follow)

    def _follow(
        self, params: SamplingParams, prompt_ids: list[int] | None, output_ids: list[int]
    ) -> tuple[T, list[int]] | None:
        state = self.remember(params)
        return None if state is None else (state, output_ids)

    @abc.abstractmethod
    def apply(self, logits: Tensor) -> Tensor:
        """Change one step's logits, (N, V) float32, in place and return them."""
