"""Editing a prompt in words: "now make it rise" changes the one phrase of the prompt that it is about.

`Phrases` is a bundle's English as data (its phrases.json): which phrases mean what, and in what form each stands where.
This module knows words; it does not know chats, models, or any attribute by name.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Final

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from poet.errors import CheckpointError

__all__ = ["Phrase", "Phrases", "edit_prompt", "is_whole_prompt"]

_WORD: Final = re.compile(r"\w+(?:[-'’]\w+)*|[^\w\s]")
_PLACEHOLDER: Final = re.compile(r"\{(\w+)\}")
_ARTICLE: Final = re.compile(r"\b(an?)(\s+)$", re.IGNORECASE)


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# What may stand between "background" and its colour, and between "instead of" and what is not meant.
_LINKS: Final = _words(
    "is are be to into for with by of now in as from should must will can become becomes turn turns not but instead "
    "rather than no longer colour color :"
)
_LIGHT: Final = _words("a an the it its be being so any that very too")
_NEGATIONS: Final = (
    ("instead", "of"),
    ("rather", "than"),
    ("no", "longer"),
    ("take", "away"),
    *((word,) for word in ("not", "don't", "dont", "doesn't", "no", "never", "stop", "without", "remove")),
)
# After the words of _POLITE, what begins with an order speaks of the clip that is there; with one of _OPEN it may.
_ORDERS: Final = _words(
    "make let have change turn set give keep replace swap use put add take remove stop do don't just"
)
_OPEN: Final = _words("the it its this that these instead and but with without on in against to as same only not no")
_POLITE: Final = _words("now then please ok okay next can could would you , . !")


@dataclasses.dataclass(frozen=True, eq=False)
class Phrase:
    """Words that mean one thing.

    Attributes:
        means: attribute -> value, e.g. {"motion": "rises"}; a sound phrase may mean two at once.
        forms: slot -> its words there, e.g. {"verb": "climbs", "participle": "climbing"}. Prompts hold these.
        said: other words for it, which people say but prompts do not hold, e.g. "climb".
    """

    means: Mapping[str, str]
    forms: Mapping[str, str]
    said: tuple[str, ...] = ()


_Text = Annotated[str, Field(min_length=1)]


class _PhraseModel(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    means: dict[str, str] = {}
    forms: dict[str, _Text] = {}
    said: tuple[_Text, ...] = ()


class _PhrasesModel(BaseModel):
    """The content of phrases.json; see `Phrases`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    words: dict[str, dict[str, tuple[_Text, ...]]] = {}
    phrases: tuple[_PhraseModel, ...]
    cues: dict[str, tuple[str, ...]] = {}
    defaults: dict[str, str] = {}
    without: dict[str, str] = {}
    append: tuple[str, ...] = ()
    prepend: dict[str, tuple[str, ...]] = {}
    whole: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Phrases:
    """A bundle's English. Two values of one attribute exclude each other.

    Attributes:
        phrases: all of them, of two that fit equally well the earlier is taken.
        cues: attribute -> words that name it, e.g. "background". A word in a slot of that name is of the attribute only
            beside a cue, and a word beside a cue is of that attribute or of none: "navy" alone says nothing, "make the
            background blue" says nothing of the thing in front of it.
        defaults: what is taken where neither the prompt nor the instruction says it: the pitch of a sound that is
            added to a silent clip.
        without: what an attribute becomes when it is taken away: "stop bouncing".
        append: slots whose phrases may be put at the end of a prompt that lacks them.
        prepend: slot -> slots before which its phrases may be put: {"colour": ("shape",)}.
        whole: attributes that a text must name to be a prompt of its own.
    """

    phrases: tuple[Phrase, ...]
    cues: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    defaults: Mapping[str, str] = dataclasses.field(default_factory=dict)
    without: Mapping[str, str] = dataclasses.field(default_factory=dict)
    append: tuple[str, ...] = ()
    prepend: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    whole: tuple[str, ...] = ()

    @classmethod
    def load(cls, file: Path) -> Phrases:
        """Read phrases.json.

        Raises:
            CheckpointError: the file cannot be read, or is not such a file.
        """
        try:
            return cls.from_json(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{file} cannot be used: {error} Copy the bundle whole, or take it out.") from error

    @classmethod
    def from_json(cls, text: str) -> Phrases:
        """Read the content of phrases.json.

        Its `words` are {"pitch": {"low": ["low", "deep"], ...}}: a phrase with {pitch} in it stands for one phrase for
        each of these words, which means that pitch too unless it says otherwise.

        Raises:
            ValueError: it is not such a content; the message names the field.
        """
        try:
            read = _PhrasesModel.model_validate_json(text)
        except ValidationError as error:
            first = error.errors(include_url=False, include_context=False)[0]
            raise ValueError(f"{'.'.join(str(part) for part in first['loc'])}: {first['msg']}.") from None
        fields: dict[str, Any] = {name: getattr(read, name) for name in _PhrasesModel.model_fields}
        words = fields.pop("words")
        fields["phrases"] = tuple(whole for phrase in read.phrases for whole in _filled(phrase, words))
        made = cls(**fields)
        slots = (*made.append, *made.prepend)
        if unknown := [slot for slot in slots if slot not in made.by_slot]:
            raise ValueError(f"append and prepend must name slots that phrases have forms for, got {unknown[0]!r}.")
        return made

    @cached_property
    def attributes(self) -> frozenset[str]:
        """Every attribute that a phrase means."""
        return frozenset(name for phrase in self.phrases for name in phrase.means)

    @cached_property
    def by_slot(self) -> Mapping[str, tuple[Phrase, ...]]:
        """slot -> the phrases that have a form there."""
        slots = {slot: None for phrase in self.phrases for slot in phrase.forms}
        return {slot: tuple(phrase for phrase in self.phrases if slot in phrase.forms) for slot in slots}

    @cached_property
    def of_slot(self) -> Mapping[str, frozenset[str]]:
        """slot -> attributes that its phrases mean."""
        return {slot: frozenset(name for one in found for name in one.means) for slot, found in self.by_slot.items()}

    @cached_property
    def readings(self) -> Mapping[tuple[str, ...], tuple[tuple[str, Phrase], ...]]:
        """Words -> the slots and phrases that they may be; the slot of what is only said is ""."""
        found: dict[tuple[str, ...], list[tuple[str, Phrase]]] = {}
        for phrase in self.phrases:
            for slot, text in (*phrase.forms.items(), *(("", text) for text in phrase.said)):
                found.setdefault(tuple(_WORD.findall(text.lower())), []).append((slot, phrase))
        return {words: tuple(readings) for words, readings in found.items()}

    @cached_property
    def longest(self) -> Mapping[str, int]:
        """First word -> how many words the longest phrase has that begins with it."""
        found: dict[str, int] = {}
        for words in self.readings:
            found[words[0]] = max(found.get(words[0], 0), len(words))
        return found


@dataclasses.dataclass(frozen=True)
class _Span:
    """Tokens `first` to `last` - 1, which may be read as phrases."""

    first: int
    last: int
    readings: tuple[tuple[str, Phrase], ...]
    negated: bool


@dataclasses.dataclass(frozen=True)
class _Found:
    """A phrase in a text: characters `start` to `end` - 1."""

    start: int
    end: int
    slot: str
    phrase: Phrase
    negated: bool


def edit_prompt(previous: str, instruction: str, phrases: Phrases | None) -> str:
    """The prompt of the next clip, from that of the last one and what is said about it.

    Every phrase that the instruction names takes the place of the prompt's phrase for the same attribute, in the form
    that stands there, and with the prompt's own wording where it can: "on a red background" after "make it rise" has
    no reason to change. What is named several times is what is named last ("from red to blue"); what stands after
    "instead of" or "not" is not meant. Comparatives mean the value, not a step: "a bit smaller" is small.

    Args:
        previous: the last prompt.
        instruction: what is said, e.g. "make the background maroon".
        phrases: the bundle's; None where it has none.

    Returns:
        The instruction itself, without "now" or "please" before it, where that is a whole prompt. Where it names what
        the prompt has no place for, or is not understood, all of it is put behind the prompt with a comma.
    """
    previous, instruction = previous.strip(), instruction.strip()
    if not previous or not instruction:
        return instruction or previous
    if is_whole_prompt(instruction, phrases):
        return instruction[_opening(instruction) :]
    if phrases is not None:
        found = list(_find(instruction, phrases, said=True))
        asked, named = _asked(found, phrases), frozenset(one.phrase for one in found)
        edited, placed = _replace(previous, asked, named, phrases)
        edited, placed = _supply(edited, asked, named, phrases, placed)
        if asked and asked.keys() <= placed:
            return edited
    return f"{previous.rstrip(' .')}, {instruction}"


def is_whole_prompt(text: str, phrases: Phrases | None) -> bool:
    """Whether a text is a prompt of its own rather than something said about another.

    It is where it names the attributes of `Phrases.whole` in the forms that prompts have ("a star rises", not "the star
    should rise"), and is no order ("make ..."). One that begins with "the", "it", "with" and the like must also name
    more than half of all attributes.
    """
    if phrases is None or not phrases.whole:
        return False
    named = {name for one in _find(text, phrases) for name in one.phrase.means}
    if not named.issuperset(phrases.whole):
        return False
    found = _WORD.match(text, _opening(text))
    opening = "" if found is None else found[0].lower()
    if opening in _ORDERS:
        return False
    return opening not in _OPEN or 2 * len(named) > len(phrases.attributes)


def _opening(text: str) -> int:
    """Where a text begins that begins politely."""
    return next((found.start() for found in _WORD.finditer(text) if found[0].lower() not in _POLITE), 0)


def _asked(found: Sequence[_Found], phrases: Phrases) -> dict[str, str]:
    """attribute -> the value that is asked for; what was named last stands last."""
    asked: dict[str, str] = {}
    for one in found:
        if not one.negated:
            for name, value in one.phrase.means.items():
                asked.pop(name, None)
                asked[name] = value
    for one in found:
        if one.negated and not asked.keys() & one.phrase.means.keys():
            asked |= {name: value for name, value in phrases.without.items() if name in one.phrase.means}
    return asked


def _replace(
    text: str, asked: Mapping[str, str], named: Collection[Phrase], phrases: Phrases
) -> tuple[str, frozenset[str]]:
    """The text with its phrases changed, and the attributes that it now says as asked."""
    placed: set[str] = set()
    pieces: list[str] = []
    end = 0
    for one in _find(text, phrases):
        wanted = {name: value for name, value in asked.items() if name in phrases.of_slot[one.slot]}
        chosen = _choose(one.slot, wanted, phrases, named, one.phrase) if wanted else None
        if chosen is None:
            continue
        placed |= wanted.keys()
        if chosen is one.phrase:
            continue
        new, old = chosen.forms[one.slot], text[one.start : one.end]
        pieces.append(_with_article(text[end : one.start], new))
        pieces.append(new[0].upper() + new[1:] if old[0].isupper() else new)
        end = one.end
    return "".join([*pieces, text[end:]]), frozenset(placed)


def _supply(
    text: str, asked: Mapping[str, str], named: Collection[Phrase], phrases: Phrases, placed: frozenset[str]
) -> tuple[str, frozenset[str]]:
    """The text with phrases for what it does not say, where they may be put."""
    done = set(placed)
    for slot in (*phrases.append, *phrases.prepend):
        wanted = {name: value for name, value in asked.items() if name in phrases.of_slot[slot] - done}
        chosen = _choose(slot, wanted, phrases, named) if wanted else None
        if chosen is None:
            continue
        new = chosen.forms[slot]
        if slot in phrases.append:
            stop = "." if text.endswith(".") else ""
            text = f"{text.removesuffix('.')} {new}{stop}"
        else:
            place = next((one.start for one in _find(text, phrases) if one.slot in phrases.prepend[slot]), None)
            if place is None:
                continue
            text = f"{_with_article(text[:place], new)}{new} {text[place:]}"
        done |= wanted.keys()
    return text, frozenset(done)


def _choose(
    slot: str,
    wanted: Mapping[str, str],
    phrases: Phrases,
    named: Collection[Phrase],
    old: Phrase | None = None,
) -> Phrase | None:
    """The phrase of a slot that means what is wanted: one that was named, or the least different from the old one.

    Where no phrase means all of it (silence, and a pitch), what was wanted first gives way. None: there is none.
    """
    if old is not None and wanted.items() <= old.means.items():
        return old
    kept: Mapping[str, str] = {} if old is None else old.means
    words = set() if old is None else set(old.forms[slot].split())

    def likeness(phrase: Phrase) -> tuple[bool, int, int, int]:
        return (
            phrase in named,
            len(phrase.means.items() & kept.items()),
            len(phrase.means.items() & phrases.defaults.items()),
            len(words.intersection(phrase.forms[slot].split())),
        )

    for begin in range(len(wanted)):
        must = dict(list(wanted.items())[begin:]).items()
        fitting = [phrase for phrase in phrases.by_slot[slot] if must <= phrase.means.items()]
        if fitting:
            return max(fitting, key=likeness)
    return None


def _find(text: str, phrases: Phrases, *, said: bool = False) -> Iterator[_Found]:
    """The phrases in a text, from left to right and the longest first, without what is merely a word.

    Args:
        text: a prompt, or what is said about one.
        phrases: all there are.
        said: whether words count that people say but prompts do not hold; then those are marked that are not meant.
    """
    words = [(found[0].lower().replace("’", "'"), found.span()) for found in _WORD.finditer(text)]
    tokens = [word for word, _ in words]
    spans: list[_Span] = []
    first = 0
    while first < len(tokens):
        for last in range(min(first + phrases.longest.get(tokens[first], 0), len(tokens)), first, -1):
            readings = phrases.readings.get(tuple(tokens[first:last]), ())
            readings = readings if said else tuple(reading for reading in readings if reading[0])
            if readings:
                along = bool(spans) and spans[-1].last == first and spans[-1].negated
                spans.append(_Span(first, last, readings, said and (along or _is_negated(tokens, first))))
                first = last
                break
        else:
            first += 1
    of_word = {word: name for name, found in phrases.cues.items() for word in found}
    spoken = {name for span in spans if span.negated for _, phrase in span.readings for name in phrase.means}
    spoken |= {of_word[word] for span in spans for word in tokens[span.first : span.last] if word in of_word}
    taken = {place: span.negated for span in spans for place in range(span.first, span.last)}
    named = _named_before(tokens, taken, of_word)
    for span in spans:
        cued = named[span.first]
        if span.last < len(tokens) and span.last not in taken:
            cued = of_word.get(tokens[span.last], cued)
        if cued is not None:
            readings = tuple(reading for reading in span.readings if cued in reading[1].means)
        else:
            certain = tuple(reading for reading in span.readings if reading[0] not in phrases.cues)
            readings = certain or tuple(reading for reading in span.readings if reading[0] in spoken)
        if readings:
            (start, _), (_, end) = words[span.first][1], words[span.last - 1][1]
            yield _Found(start, end, *readings[0], span.negated)


def _is_negated(tokens: Sequence[str], first: int) -> bool:
    """Whether what begins at a token is what is not meant: "instead of a ...", "from a ... to"."""
    while first > 0 and tokens[first - 1] in _LIGHT:
        first -= 1
    before = tuple(tokens[max(0, first - 2) : first])
    if before[-1:] in _NEGATIONS or before in _NEGATIONS:
        return True
    # Looked for nearby only: a sentence is no longer, and a text of nothing else would take its square in time.
    return before[-1:] == ("from",) and not {"to", "into"}.isdisjoint(tokens[first : first + 20])


def _named_before(tokens: Sequence[str], taken: Mapping[int, bool], of_word: Mapping[str, str]) -> Sequence[str | None]:
    """For each place in a text, the attribute that is named before it, behind nothing but words that link the two.

    Args:
        tokens: of the whole text.
        taken: places of tokens that belong to phrases -> whether those are negated; only these are passed over.
        of_word: cue -> attribute.
    """
    named: list[str | None] = [None]
    for place, token in enumerate(tokens):
        is_passed = taken.get(place, token in _LINKS)
        named.append(named[-1] if is_passed else None if place in taken else of_word.get(token))
    return named


def _with_article(before: str, new: str) -> str:
    """What stands before a new word, its article made to fit: "an orange"."""

    def fit(found: re.Match[str]) -> str:
        return found[1][0] + ("n" if new[0].lower() in "aeiou" else "") + found[2]

    return _ARTICLE.sub(fit, before)


def _filled(phrase: _PhraseModel, words: Mapping[str, Mapping[str, tuple[str, ...]]]) -> Iterator[Phrase]:
    """A phrase with its placeholders filled in all ways; its forms and what is said share what they are filled with."""
    texts = (*phrase.forms.values(), *phrase.said)
    names = list(dict.fromkeys(name for text in texts for name in _PLACEHOLDER.findall(text)))
    unknown = [name for name in names if name not in words]
    if unknown:
        raise ValueError(f"phrases: {texts[0]!r} has the placeholder {unknown[0]!r}, of which there are no words.")
    choices = [[(value, word) for value, found in words[name].items() for word in found] for name in names]
    for chosen in itertools.product(*choices):
        filling = {name: word for name, (_, word) in zip(names, chosen, strict=True)}
        meant = {name: value for name, (value, _) in zip(names, chosen, strict=True)}
        yield Phrase(
            meant | phrase.means,
            {slot: _fill(form, filling) for slot, form in phrase.forms.items()},
            tuple(_fill(text, filling) for text in phrase.said),
        )


def _fill(text: str, filling: Mapping[str, str]) -> str:
    return _PLACEHOLDER.sub(lambda found: filling[found[1]], text)
