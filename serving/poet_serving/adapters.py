"""LoRA adapters in vLLM: what it is told of them, and their share of a step straight on PyTorch's kernels.

vLLM reads adapters, keeps them in its layers' slots and says which request uses which. Its own kernels for CPUs gather
a copy of both matrices for every id of a step; here the ids of one adapter go through them together.

Legend: T ids of a step, R rank, I inputs and O outputs of a matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

import torch
from torch import Tensor

from poet.errors import CheckpointError, ConfigError
from poet.model.lora import Adapter, hash_adapter

__all__ = [
    "AdapterRows",
    "adapted_product",
    "adapter_arguments",
    "adapter_requests",
    "all_requests",
    "check_unchanged",
]

RANKS: Final = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""That vLLM has room for."""


def adapter_arguments(adapters: Sequence[Adapter]) -> dict[str, Any]:
    """Engine arguments for adapters, all of which fit a step together, so that none waits for another.

    Every slot has room for the largest rank, and a smaller adapter is multiplied as if it had it.

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


def all_requests(adapters: Sequence[Adapter]) -> list[Any]:
    """What goes with a request of each adapter; vLLM knows them by their places, from 1 on."""
    from vllm.lora.request import LoRARequest

    return [
        LoRARequest(adapter.name, number, str(adapter.path.resolve()))
        for number, adapter in enumerate(adapters, start=1)
    ]


def adapter_requests(adapters: Sequence[Adapter]) -> dict[str | None, Any]:
    """What goes with a request of each adapter, by name, and of none."""
    return {None: None, **dict(zip((adapter.name for adapter in adapters), all_requests(adapters), strict=True))}


def check_unchanged(adapter: Adapter) -> None:
    """Raise if an adapter's files are not what they were when it was checked; to be called once vLLM has read them.

    Raises:
        CheckpointError: they are not.
    """
    if hash_adapter(adapter.path) != adapter.sha256:
        raise CheckpointError(f"{adapter.path} was changed since it was checked. Start again with it as it is now.")


class AdapterRows:
    """Which ids of a step are whose adapter's.

    Attributes:
        groups: of each adapter in the step its slot and its ids' places, a slice where they stand together.
    """

    def __init__(self) -> None:
        self.groups: list[tuple[int, slice | Tensor]] = []
        self._slots_T: Tensor | None = None

    def update(self, slots_T: Tensor) -> None:
        """Take over a step: (T,) int64 slots, -1 where there is no adapter."""
        self._slots_T = slots_T
        places: dict[int, list[int]] = {}
        for place, slot in enumerate(slots_T.tolist()):
            places.setdefault(slot, []).append(place)
        places.pop(-1, None)
        self.groups = [(slot, _together(own)) for slot, own in places.items()]

    def keep(self, kept: Tensor) -> None:
        """Go on with some of the step's ids: (K,) places."""
        if self._slots_T is not None:
            self.update(self._slots_T[kept])


def _together(places: list[int]) -> slice | Tensor:
    """Ascending places, as a slice if there is no gap between them."""
    if places[-1] - places[0] + 1 == len(places):
        return slice(places[0], places[-1] + 1)
    return torch.tensor(places)


def adapted_product(product: Callable[[Tensor], Tensor], layer: Any, rows: AdapterRows) -> Callable[[Tensor], Tensor]:
    """A projection and its adapters' changes.

    A projection that is packed of several has a pair of matrices for each. They become parts of one pair, the second
    with zeros beside its blocks, so that an adapter is two products; vLLM goes on writing into its slots, which are
    views of them then.

    Args:
        product: (T, I) to a new (T, O), of the model's dtype.
        layer: vLLM's, which holds the adapters' matrices in slots.
        rows: of the step that is being computed.
    """
    firsts, seconds = list(layer.lora_a_stacked), list(layer.lora_b_stacked)
    ranks, widths = [one.shape[2] for one in firsts], [one.shape[2] for one in seconds]
    first = firsts[0].new_zeros(len(firsts[0]), sum(ranks), firsts[0].shape[3])
    second = seconds[0].new_zeros(len(seconds[0]), sum(widths), sum(ranks))
    rank = width = 0
    for number, (one, other) in enumerate(zip(firsts, seconds, strict=True)):
        firsts[number] = first[:, None, rank : rank + ranks[number]].copy_(one)
        seconds[number] = second[:, None, width : width + widths[number], rank : rank + ranks[number]].copy_(other)
        rank, width = rank + ranks[number], width + widths[number]
    layer.lora_a_stacked, layer.lora_b_stacked = tuple(firsts), tuple(seconds)

    def adapted(x_TI: Tensor) -> Tensor:
        y_TO = product(x_TI)
        for slot, places in rows.groups:
            change = x_TI[places] @ first[slot].T
            if isinstance(places, slice):
                y_TO[places].addmm_(change, second[slot].T)
            else:
                y_TO.index_add_(0, places, change @ second[slot].T)
        return y_TO

    return adapted
