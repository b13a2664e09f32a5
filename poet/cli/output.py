"""How commands talk: progress and logs on standard error, one result on standard output. Knows no models."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from poet.errors import ConfigError

__all__ = ["Advance", "keep_what_is_read", "note", "progress", "show_lines", "show_result"]

Advance = Callable[[int, int, str], None]
"""Called with (done, in all, what to say besides)."""

PLAIN_SECONDS = 10.0  # between two lines where no terminal shows a bar


def note(message: str) -> None:
    """A line for the person who waits, on standard error."""
    print(message, file=sys.stderr, flush=True)


def keep_what_is_read(targets: Sequence[Path], sources: Sequence[Path | None]) -> None:
    """Refuse to write over a file that was given: it would be lost, and the result could not be made again.

    Raises:
        ConfigError: one of the targets is one of the sources.
    """
    for target in targets:
        for source in sources:
            if source is not None and target.exists() and source.exists() and target.samefile(source):
                raise ConfigError(f"{target} is given and would be written over. Name another file with -o.")


def show_result(result: Mapping[str, Any], as_json: bool) -> None:
    """Print the result last: one JSON object in ASCII (numbers that are not finite become null), or lines."""
    if as_json:
        print(json.dumps(_finite(result), allow_nan=False), flush=True)
        return
    for line in _lines(result):
        print(line)
    sys.stdout.flush()


def show_lines(lines: Iterable[str]) -> None:
    """Print what is read line by line, such as a table, above the result."""
    for line in lines:
        print(_visible(line))


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _lines(value: Any) -> Iterator[str]:
    """`name: value` a line; what is nested stands under its name, two spaces further in."""
    if isinstance(value, Mapping):
        for name, item in value.items():
            if isinstance(item, (Mapping, list)):
                yield f"{_visible(name)}:"
                yield from (f"  {line}" for line in _lines(item))
            else:
                yield f"{_visible(name)}: {_visible(item)}"
    elif isinstance(value, list):
        for item in value:
            yield from (("- " if place == 0 else "  ") + line for place, line in enumerate(_lines(item)))
    else:
        yield _visible(value)


def _visible(value: Any) -> str:
    """A value on one line: what a file's metadata holds must neither steer a terminal nor break its encoding."""
    text = "".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in str(value))
    encoding = sys.stdout.encoding or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


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
        before = -1

        def advance(done: int, total: int, said: str = "") -> None:
            nonlocal before
            if before < 0 or done < before:  # what an earlier run did must not count as done in no time
                bar.reset(task, completed=done, total=total, said=said)
            else:
                bar.update(task, completed=done, total=total, said=said)
            before = done

        yield advance


def _plain(title: str) -> Advance:
    begun = last = time.monotonic()
    first, before = -1, -1

    def advance(done: int, total: int, said: str = "") -> None:
        nonlocal begun, last, first, before
        now = time.monotonic()
        if before < 0 or done < before:  # what an earlier run did must not count as done in no time
            begun, first = now, done
        before = done
        if now - last < PLAIN_SECONDS:
            return
        last = now
        parts = [f"{title}: {done}/{total}"]
        if done > first:
            parts.append(f"about {(now - begun) * (total - done) / (done - first):.0f} s left")
        note(", ".join([*parts, said] if said else parts))

    return advance
