"""How commands talk: progress and logs on standard error, one result on standard output. Knows no models."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

__all__ = ["Advance", "note", "progress", "show_result"]

Advance = Callable[[int, int, str], None]
"""Called with (done, in all, what to say besides)."""

PLAIN_SECONDS = 10.0  # between two lines where no terminal shows a bar


def note(message: str) -> None:
    """A line for the person who waits, on standard error."""
    print(message, file=sys.stderr, flush=True)


def show_result(result: Mapping[str, Any], as_json: bool) -> None:
    """Print the result last: one JSON object, or one `name: value` a line."""
    if as_json:
        print(json.dumps(result, ensure_ascii=False), flush=True)
        return
    for name, value in result.items():
        if isinstance(value, Mapping):
            print(f"{name}:")
            for key, item in value.items():
                print(f"  {key}: {item}")
        elif isinstance(value, list):
            print(f"{name}:")
            for item in value:
                print(f"  {item}")
        else:
            print(f"{name}: {value}")
    sys.stdout.flush()


@contextmanager
def progress(title: str) -> Iterator[Advance]:
    """A bar on a terminal, a plain line every ten seconds elsewhere."""
    if not sys.stderr.isatty():
        yield _plain(title)
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn(title),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[said]}"),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(title, total=None, said="")

        def advance(done: int, total: int, said: str = "") -> None:
            bar.update(task, completed=done, total=total, said=said)

        yield advance


def _plain(title: str) -> Advance:
    begun = last = time.monotonic()

    def advance(done: int, total: int, said: str = "") -> None:
        nonlocal last
        now = time.monotonic()
        if now - last < PLAIN_SECONDS:
            return
        last = now
        left = (now - begun) * (total - done) / max(1, done)
        note(f"{title}: {done}/{total}, about {left:.0f} s left{', ' + said if said else ''}")

    return advance
