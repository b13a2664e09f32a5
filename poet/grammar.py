"""The grammar of an output: which ids may be written at the next place. Mechanics only.

`poet.sequence.output_grammar` makes grammars, since it alone knows order; the loops that write ids follow them with
`GrammarState`. Standard library and numpy only, so that an engine's hot loop can import it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from poet.errors import VocabularyError

__all__ = [
    "Allowed",
    "Grammar",
    "GrammarState",
    "Segment",
    "allowed",
    "check_output",
    "grammar_from_json",
    "grammar_to_json",
    "max_output_length",
    "pin",
    "place_ranges",
]


@dataclasses.dataclass(frozen=True, slots=True)
class Segment:
    """A run of ids in [low, high): exactly `count` of them, or with a `stop` id up to `count` and then `stop`.

    Raises:
        VocabularyError: an empty run or range, or a stop id inside the range.
    """

    count: int
    low: int
    high: int
    stop: int | None = None

    def __post_init__(self) -> None:
        in_range = self.stop is not None and self.low <= self.stop < self.high
        if self.count < 1 or not 0 <= self.low < self.high or in_range:
            raise VocabularyError(
                f"a segment must have count >= 1, 0 <= low < high and no stop between them, got {self}."
            )


Grammar = tuple[Segment, ...]


class Allowed(NamedTuple):
    """The ids that may come next: those in [low, high), and `stop` if it is not None."""

    low: int
    high: int
    stop: int | None = None


def max_output_length(grammar: Grammar) -> int:
    """The most ids that an output of this grammar can have; every output has exactly so many if nothing is open."""
    return sum(segment.count + (segment.stop is not None) for segment in grammar)


def place_ranges(grammar: Grammar) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(low, high), each (L,) int64: the range of ids at every place of the output, for writing a whole canvas.

    Raises:
        VocabularyError: the output's length is open, so it has no canvas.
    """
    if any(segment.stop is not None for segment in grammar):
        raise VocabularyError("an output of open length has no canvas; write it one id at a time.")
    counts = [segment.count for segment in grammar]
    low, high = np.array([(segment.low, segment.high) for segment in grammar], np.int64).reshape(-1, 2).T
    return np.repeat(low, counts), np.repeat(high, counts)


def pin(grammar: Grammar, known: Mapping[int, int]) -> Grammar:
    """The grammar of those outputs that hold the known ids at their places.

    Args:
        grammar: of outputs of one length.
        known: place to id.

    Raises:
        VocabularyError: the length is open, or an id that may not stand at its place.
    """
    low, high = place_ranges(grammar)
    for place, id in known.items():
        if not 0 <= place < len(low) or not low[place] <= id < high[place]:
            raise VocabularyError(
                f"a pinned id must fit its place of {len(low)}, got {id} at {place}. Take ids of the same vocabulary "
                "and places of the same output."
            )
    segments: list[Segment] = []
    place = 0
    for segment in grammar:
        end = place + segment.count
        for at in sorted(at for at in known if place <= at < end):
            segments += [Segment(at - place, segment.low, segment.high)] if at > place else []
            segments.append(Segment(1, known[at], known[at] + 1))
            place = at + 1
        segments += [Segment(end - place, segment.low, segment.high)] if end > place else []
        place = end
    return tuple(segments)


def allowed(grammar: Grammar, output_ids: Iterable[int]) -> Allowed:
    """The ids that may follow `output_ids`. `GrammarState` tells the same in constant time per id.

    Raises:
        VocabularyError: `output_ids` break the grammar, or are complete already.
    """
    return GrammarState(grammar, output_ids).allowed


def check_output(grammar: Grammar, output_ids: Iterable[int]) -> None:
    """Raise unless `output_ids` are a complete output of this grammar.

    Raises:
        VocabularyError: the message names the place, what was due there and the id that stands there.
    """
    state = GrammarState(grammar, output_ids)
    if not state.done:
        raise VocabularyError(f"the output ends at place {state.place}, where {state.expected} was due.")


class GrammarState:
    """Where an output stands in its grammar; follows it one id at a time.

    Attributes:
        grammar: the grammar that is followed.
        place: number of output ids so far.
    """

    __slots__ = ("_segment", "_within", "grammar", "place")

    def __init__(self, grammar: Grammar, output_ids: Iterable[int] = ()) -> None:
        self.grammar = grammar
        self.place = 0
        self._segment = 0
        self._within = 0
        for id in output_ids:
            self.advance(id)

    @property
    def done(self) -> bool:
        """Whether the output is complete."""
        return self._segment == len(self.grammar)

    @property
    def allowed(self) -> Allowed:
        """The ids that may come next.

        Raises:
            VocabularyError: the output is complete.
        """
        if self.done:
            raise VocabularyError(f"the output is complete at place {self.place}; nothing may follow.")
        segment = self.grammar[self._segment]
        if segment.stop is not None and self._within == segment.count:
            return Allowed(segment.stop, segment.stop + 1)
        return Allowed(segment.low, segment.high, segment.stop)

    @property
    def low(self) -> int:
        """The lowest id of the range that may come next."""
        return self.allowed.low

    @property
    def high(self) -> int:
        """One above the highest id of the range that may come next."""
        return self.allowed.high

    @property
    def stop(self) -> int | None:
        """The id outside [low, high) that may come next too, or None."""
        return self.allowed.stop

    @property
    def expected(self) -> str:
        """What may come next, in words for messages."""
        low, high, stop = self.allowed
        ids = f"id {low}" if high == low + 1 else f"an id in [{low}, {high})"
        return ids if stop is None else f"{ids} or id {stop}"

    def advance(self, id: int) -> None:
        """Take the next id of the output.

        Raises:
            VocabularyError: it may not stand there.
        """
        low, high, stop = self.allowed
        if not low <= id < high and id != stop:
            raise VocabularyError(f"at place {self.place} of the output: expected {self.expected}, found id {id}.")
        self.place += 1
        segment = self.grammar[self._segment]
        self._within += 1
        if id == segment.stop or (segment.stop is None and self._within == segment.count):
            self._segment += 1
            self._within = 0


def grammar_to_json(grammar: Grammar) -> list[list[int]]:
    """Lists of integers, [count, low, high] or [count, low, high, stop], as vLLM's requests carry them."""
    rows = [[segment.count, segment.low, segment.high] for segment in grammar]
    return [row if segment.stop is None else [*row, segment.stop] for row, segment in zip(rows, grammar, strict=True)]


def grammar_from_json(values: object) -> Grammar:
    """The inverse of `grammar_to_json`.

    Raises:
        VocabularyError: not such lists, or an empty range.
    """
    form = "a grammar must be lists [count, low, high] or [count, low, high, stop] of integers"
    if not isinstance(values, (list, tuple)):
        raise VocabularyError(f"{form}, got {values!r}.")
    segments = []
    for row in values:
        if not isinstance(row, (list, tuple)) or len(row) not in (3, 4) or any(type(value) is not int for value in row):
            raise VocabularyError(f"{form}, got {row!r}.")
        segments.append(Segment(*row))
    return tuple(segments)
