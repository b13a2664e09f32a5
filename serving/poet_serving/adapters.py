"""LoRA adapters in vLLM: what it is told of them, and their share of a step straight on PyTorch's kernels.

vLLM reads adapters, keeps them in its layers' slots and says which request uses which. Its own kernels for CPUs gather
a copy of both matrices for every id of a step; here the ids of one adapter go through them together.

Legend: T ids of a step, R rank, I inputs and O outputs of a matrix.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, Final

from torch import Tensor

from poet.errors import ConfigError
from poet.model.lora import Adapter

__all__ = ["AdapterRows", "adapted_product", "adapter_arguments", "adapter_requests"]

RANKS: Final = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""That vLLM has room for."""


def adapter_arguments(adapters: Sequence[Adapter]) -> dict[str, Any]:
    """Engine arguments for adapters, all of which fit a step together, so that none waits for another.

    One slot more stays empty: vLLM's kernels for CPUs mark an id without an adapter by -1, and read that as the last.

    Raises:
        ConfigError: a rank above vLLM's largest.
    """
    if not adapters:
        return {}
    largest = max(adapters, key=lambda adapter: adapter.rank)
    rank = next((rank for rank in RANKS if rank >= largest.rank), None)
    if rank is None:
        raise ConfigError(
            f"an adapter's rank must be at most {RANKS[-1]}, {largest.path} has {largest.rank}. Train a smaller one."
        )
    return {
        "enable_lora": True,
        "max_loras": len(adapters) + 1,
        "max_cpu_loras": len(adapters) + 1,
        "max_lora_rank": rank,
    }


def adapter_requests(adapters: Sequence[Adapter]) -> dict[str | None, Any]:
    """What goes with a request of each adapter, by name, and of none."""
    from vllm.lora.request import LoRARequest

    requests: dict[str | None, Any] = {None: None}
    for number, adapter in enumerate(adapters, start=1):
        requests[adapter.name] = LoRARequest(adapter.name, number, str(adapter.path.resolve()))
    return requests


class AdapterRows:
    """Which ids of a step are whose adapter's.

    Attributes:
        runs: (first, behind the last, slot of the adapter); ids of none are in no run.
    """

    def __init__(self) -> None:
        self.runs: list[tuple[int, int, int]] = []

    def update(self, slots_T: Tensor) -> None:
        """Take over a step: (T,) slots, -1 where there is no adapter."""
        self.runs, start = [], 0
        for slot, group in itertools.groupby(slots_T.tolist()):
            stop = start + sum(1 for _ in group)
            if slot >= 0:
                self.runs.append((start, stop, slot))
            start = stop


def adapted_product(product: Callable[[Tensor], Tensor], layer: Any, rows: AdapterRows) -> Callable[[Tensor], Tensor]:
    """A projection and its adapters' changes.

    Args:
        product: (T, I) to a new (T, O).
        layer: vLLM's, which holds the adapters' matrices in slots, several where the projection is packed of several.
        rows: of the step that is being computed.
    """
    pairs = list(zip(layer.lora_a_stacked, layer.lora_b_stacked, strict=True))

    def adapted(x_TI: Tensor) -> Tensor:
        y_TO = product(x_TI)
        for start, stop, slot in rows.runs:
            x, column = x_TI[start:stop], 0
            for first, second in pairs:
                width = second.shape[2]
                y_TO[start:stop, column : column + width].addmm_(x @ first[slot, 0].T, second[slot, 0].T)
                column += width
        return y_TO

    return adapted
