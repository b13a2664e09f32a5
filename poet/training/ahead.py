"""Draws what the next step needs while this one is computed. Knows steps, not what is drawn."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

__all__ = ["DrawnAhead"]

T = TypeVar("T")


class DrawnAhead(Generic[T]):
    """A function of the step number, computed one step ahead in one thread.

    Args:
        draw: from a step to what it needs. Whatever it raises is raised by `take` of that step.
    """

    def __init__(self, draw: Callable[[int], T]) -> None:
        self._draw = draw
        self._thread = ThreadPoolExecutor(1)
        self._drawn: dict[int, Future[T]] = {}

    def take(self, step: int) -> T:
        """What `step` needs; the next step's begins to be drawn. A step that is skipped is forgotten."""
        for number in (step, step + 1):
            if number not in self._drawn:
                self._drawn[number] = self._thread.submit(self._draw, number)
        drawn = self._drawn.pop(step).result()
        self._drawn = {number: future for number, future in self._drawn.items() if number > step}
        return drawn

    def close(self) -> None:
        """Wait until the thread has nothing left to do, and end it."""
        self._thread.shutdown()
