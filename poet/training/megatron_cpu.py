"""Megatron-Core on a machine without a GPU: what it calls "cuda" is the CPU, over gloo.

Megatron-Core names the device in its schedules, optimizers and checkpoints. Inside `cpu_for_cuda` those names mean the
CPU, so that the parallel trainer runs, and is tested, anywhere. On a GPU none of this is entered.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from megatron.core.tensor_parallel import random as megatron_random
from torch.overrides import TorchFunctionMode

__all__ = ["cpu_for_cuda"]


@contextlib.contextmanager
def cpu_for_cuda() -> Iterator[None]:
    """Let Megatron-Core run on the CPU while the context is open.

    Megatron's generators for dropout on a GPU are left out: Poet's model has no dropout, and draws its weights on the
    CPU.
    """
    replaced: list[tuple[Any, str, Any]] = [
        (torch.cuda, "current_device", lambda: torch.device("cpu")),
        (torch.cuda, "synchronize", lambda *_: None),
        (megatron_random, "_get_cuda_rng_state", lambda *_, **__: torch.get_rng_state()),
        (megatron_random, "_set_cuda_rng_state", lambda *_, **__: None),
        (megatron_random.CudaRNGStatesTracker, "fork", lambda *_, **__: contextlib.nullcontext()),
    ]
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in replaced]
    for owner, name, value in replaced:
        setattr(owner, name, value)
    try:
        with _CpuForCuda():
            yield
    finally:
        for owner, name, value in before:
            setattr(owner, name, value)


class _CpuForCuda(TorchFunctionMode):
    """Turns what is asked of "cuda" into what the CPU does."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if _is_cuda(kwargs.get("device")):
            kwargs = {**kwargs, "device": "cpu"}
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.to and len(args) > 1 and _is_cuda(args[1]):
            args = (args[0], "cpu", *args[2:])
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            # The optimizers look for torch.cuda.FloatTensor and its like.
            return func(*args).replace("torch.", "torch.cuda.", 1)
        return func(*args, **kwargs)


def _is_cuda(device: object) -> bool:
    if isinstance(device, torch.device):
        return device.type == "cuda"
    return isinstance(device, str) and device.startswith("cuda")
