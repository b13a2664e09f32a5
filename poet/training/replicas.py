"""Several threads of one process that share a model's weights: data parallelism for the cores of one machine.

Two threads with half a batch each take about four fifths of the time that one batch takes whose every kernel is spread
over two threads: a small model's kernels are too short to be worth dividing. Knows modules and gradients, not losses.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import nn

__all__ = ["Replicas"]

M = TypeVar("M", bound=nn.Module)
R = TypeVar("R")


class Replicas:
    """A model and copies of it that share its weights and have gradients of their own, each with a thread.

    The sum of the gradients is taken in the order of the copies, so a run on the same number of threads repeats itself
    to the last digit.

    Args:
        model: on the CPU; its weights may be changed in place, not replaced.
        count: models in all. One alone computes in the calling thread, and its kernels take as many threads as PyTorch
            has; of several, each has a thread of its own and no other.
    """

    def __init__(self, model: nn.Module, count: int) -> None:
        self.models = [model] + [_sharing(model) for _ in range(count - 1)]
        self._threads: ThreadPoolExecutor | None = None
        if count > 1:
            before = torch.get_num_threads()
            self._threads = ThreadPoolExecutor(count)
            together = threading.Barrier(count)
            for started in [self._threads.submit(_take_one_thread, together) for _ in range(count)]:
                started.result()
            torch.set_num_threads(before)  # what the threads set for themselves held for the whole process

    def backward(self, work: Callable[[nn.Module, int], R]) -> list[R]:
        """Let every model add to its gradients, and gather them in those of the first.

        Args:
            work: from a model and its number to whatever it returns, having called `backward`.

        Returns:
            What `work` returned, in the order of the models.
        """
        if self._threads is None:
            return [work(self.models[0], 0)]
        for replica in self.models[1:]:
            replica.zero_grad(set_to_none=True)
        results = list(self._threads.map(work, self.models, range(len(self.models))))
        for replica in self.models[1:]:
            _add_gradients(list(self.models[0].parameters()), list(replica.parameters()))
        return results


def _take_one_thread(together: threading.Barrier) -> None:
    """Run kernels of this thread in this thread alone; waits, so that every thread of a pool comes by once."""
    torch.get_num_threads()  # PyTorch sets a thread's number when it first asks for it
    torch.set_num_threads(1)
    together.wait()


def _sharing(model: M) -> M:
    replica = copy.deepcopy(model)
    for own, shared in zip(replica.parameters(), model.parameters(), strict=True):
        own.data = shared.data
    return replica


def _add_gradients(to: Sequence[nn.Parameter], of: Sequence[nn.Parameter]) -> None:
    for target, source in zip(to, of, strict=True):
        if source.grad is None:
            continue
        if target.grad is None:
            target.grad = source.grad
        else:
            target.grad += source.grad
