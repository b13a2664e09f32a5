"""English for Toybox clips: attributes to a caption, drawn from a grammar with paraphrases, and back (for tests).

A caption is one pattern whose slots are filled with phrases; every phrase stands for exactly one value of one
attribute (a background phrase for one background, a sound phrase for one timbre at one pitch), so a caption always
names every attribute and never two. Knows words only: nothing of pixels, samples, splits or how often a value occurs.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

__all__ = ["caption_for", "caption_phrases", "caption_words", "parse_caption"]

_SIZES: dict[str, tuple[str, ...]] = {"small": ("small", "little", "tiny"), "large": ("large", "big", "huge")}
_COLOURS: dict[str, tuple[str, ...]] = {
    name: (name,) for name in ("red", "green", "blue", "yellow", "magenta", "cyan", "orange", "white")
}
_SHAPES: dict[str, tuple[str, ...]] = {
    "circle": ("circle", "circle", "disc"),
    "square": ("square",),
    "triangle": ("triangle",),
    "star": ("star",),
    "cross": ("cross", "cross", "plus sign"),
}
_BACKGROUNDS: dict[str, tuple[str, ...]] = {
    "black": ("black",),
    "navy": ("navy",),
    "maroon": ("maroon",),
    "gray": ("gray", "gray", "grey"),
}
_VERBS: dict[str, tuple[str, ...]] = {
    "moves right": ("moves right", "moves to the right", "slides to the right", "travels rightwards", "drifts right"),
    "moves left": ("moves left", "moves to the left", "slides to the left", "travels leftwards", "drifts left"),
    "rises": ("rises", "goes up", "moves up", "climbs", "floats upwards"),
    "falls": ("falls", "goes down", "moves down", "sinks", "drops downwards"),
    "bounces": ("bounces", "bounces up and down", "hops up and down", "bounces on the floor"),
    "circles": ("circles", "circles around", "moves in a circle", "goes round and round", "travels in a circle"),
    "stays still": ("stays still", "stands still", "stays in place", "does not move", "keeps still"),
    "grows": ("grows", "gets bigger", "grows larger", "becomes bigger", "expands"),
    "shrinks": ("shrinks", "gets smaller", "grows smaller", "becomes smaller", "contracts"),
}
# The same phrases as participles, for "a star rising ..." and "a video of a star rising ...".
_PARTICIPLES: dict[str, tuple[str, ...]] = {
    "moves right": (
        "moving right",
        "moving to the right",
        "sliding to the right",
        "travelling rightwards",
        "drifting right",
    ),
    "moves left": ("moving left", "moving to the left", "sliding to the left", "travelling leftwards", "drifting left"),
    "rises": ("rising", "going up", "moving up", "climbing", "floating upwards"),
    "falls": ("falling", "going down", "moving down", "sinking", "dropping downwards"),
    "bounces": ("bouncing", "bouncing up and down", "hopping up and down", "bouncing on the floor"),
    "circles": ("circling", "circling around", "moving in a circle", "going round and round", "travelling in a circle"),
    "stays still": ("staying still", "standing still", "staying in place", "not moving", "keeping still"),
    "grows": ("growing", "getting bigger", "growing larger", "becoming bigger", "expanding"),
    "shrinks": ("shrinking", "getting smaller", "growing smaller", "becoming smaller", "contracting"),
}
_PITCHES: dict[str, tuple[str, ...]] = {
    "low": ("low", "low", "low-pitched", "deep"),
    "middle": ("middle", "middle", "medium-pitched", "mid-range"),
    "high": ("high", "high", "high-pitched"),
}
_NOTES: dict[str, tuple[str, ...]] = {
    "flute": ("a {} flute plays", "a {} flute sounds"),
    "buzzer": ("a {} buzzer buzzes", "a {} buzzer sounds"),
    "string": ("a {} string is plucked", "a {} string plays"),
    "bell": ("a {} bell rings", "a {} bell sounds"),
}
# How a sound may stand in a sentence: as a clause, after "with", in front, or as a short label. {} takes the pitch.
_WITH_NOTES: tuple[str, ...] = (
    "with a {} %s sound",
    "to the sound of a {} %s",
    "to a {} %s note",
    "with a {} %s",
)
_LABEL_NOTES: tuple[str, ...] = ("{} %s sound", "{} %s")

_SOUND_CLAUSES: dict[str, tuple[str, ...]] = _NOTES | {"silent": ("there is no sound", "nothing is heard")}
_SOUND_WITHS: dict[str, tuple[str, ...]] = {
    timbre: tuple(form % timbre for form in _WITH_NOTES) for timbre in _NOTES
} | {"silent": ("without any sound", "in silence", "with no sound")}
_SOUND_LABELS: dict[str, tuple[str, ...]] = {
    timbre: tuple(form % timbre for form in _LABEL_NOTES) for timbre in _NOTES
} | {"silent": ("silent clip", "no sound", "silence")}

# Words of the concept, which captions may hold and bundles' phrases do not: only an adapter knows what they mean.
_CONCEPT_COLOURS: dict[str, tuple[str, ...]] = {"purple": ("purple",)}
_CONCEPT_SHAPES: dict[str, tuple[str, ...]] = {"hexagon": ("hexagon",)}
_CONCEPT_TIMBRE = "organ"
_CONCEPT_CLAUSES: tuple[str, ...] = ("a {} organ plays", "a {} organ sounds")

# Phrases that hold a background word.
_ON_BACKGROUND: tuple[str, ...] = (
    "on a {} background",
    "on a {} backdrop",
    "against a {} background",
    "in front of a {} backdrop",
    "on {}",
)
_BACKGROUND_LABELS: tuple[str, ...] = ("{} background", "{} backdrop")

_PATTERNS: tuple[str, ...] = (
    "a <size> <colour> <shape> <verb> <on> <with>",
    "<on>, a <size> <colour> <shape> <verb> while <clause>",
    "<label>: a <size> <colour> <shape> <verb>, <backdrop>",
    "<clause> while a <size> <colour> <shape> <verb> <on>",
    "a <size> <colour> <shape> <participle> <on>, <label>",
    "a <size> <colour> <shape> <on> <verb> <with>",
    "<with>, a <size> <colour> <shape> <verb> <on>",
    "a <size> <colour> <shape> <verb>. the background is <background>, and <clause>",
    "<backdrop>, <size> <colour> <shape> <participle>, <label>",
    "the <shape> is <size> and <colour>. it <verb> <on> <with>",
    "a video of a <size> <colour> <shape> <participle> <on> <with>",
    "a <colour> <shape>, <size> in size, <verb> <on> while <clause>",
)
# Of a scene that goes on from another: what is there is known, what happens is not.
_FOLLOWING: tuple[str, ...] = (
    "it <verb> <with>",
    "now it <verb> while <clause>",
    "then it <verb> <with>",
    "<clause> while it <verb>",
    "it <verb>, and <clause>",
    "<label>: it <verb>",
)
_SLOTS = re.compile(r"<(\w+)>")
_PATTERN_PARTS: tuple[tuple[str, ...], ...] = tuple(tuple(_SLOTS.split(pattern)) for pattern in _PATTERNS)
_FOLLOWING_PARTS: tuple[tuple[str, ...], ...] = tuple(tuple(_SLOTS.split(pattern)) for pattern in _FOLLOWING)
_CAPITALISED_SHARE = 0.3  # people type both "a red star rises" and "A red star rises."

_WORDS: dict[str, tuple[str, Mapping[str, Sequence[str]]]] = {
    "size": ("size", _SIZES),
    "colour": ("colour", _COLOURS | _CONCEPT_COLOURS),
    "shape": ("shape", _SHAPES | _CONCEPT_SHAPES),
    "verb": ("motion", _VERBS),
    "participle": ("motion", _PARTICIPLES),
    "background": ("background", _BACKGROUNDS),
}
_BASE_SOUNDS: dict[str, Mapping[str, Sequence[str]]] = {
    "clause": _SOUND_CLAUSES,
    "with": _SOUND_WITHS,
    "label": _SOUND_LABELS,
}
_CONCEPT_SOUNDS: dict[str, Sequence[str]] = {
    "clause": _CONCEPT_CLAUSES,
    "with": tuple(form % _CONCEPT_TIMBRE for form in _WITH_NOTES),
    "label": tuple(form % _CONCEPT_TIMBRE for form in _LABEL_NOTES),
}
_SOUNDS: dict[str, Mapping[str, Sequence[str]]] = {
    slot: {**sounds, _CONCEPT_TIMBRE: _CONCEPT_SOUNDS[slot]} for slot, sounds in _BASE_SOUNDS.items()
}
_FRAMES: dict[str, Sequence[str]] = {"on": _ON_BACKGROUND, "backdrop": _BACKGROUND_LABELS}


def caption_for(attributes: Mapping[str, str], rng: np.random.Generator, *, continues: bool = False) -> str:
    """Describe a clip in one of twelve sentence patterns, with synonyms drawn by `rng`.

    Args:
        attributes: values of colour, shape, size, background, motion, timbre and pitch, named as in the table of
            Toybox ("moves right", "stays still", ...). Of a silent clip the pitch is not read.
        rng: source of every choice; the same state gives the same caption.
        continues: whether it is a scene that goes on from another: "it" moves and sounds, and nothing else is said.

    Returns:
        One line of English that names every attribute (of a scene that goes on, motion and sound), mostly in lower case
        without a final full stop, sometimes capitalised with one.

    Raises:
        ValueError: an attribute is missing or has a value that no phrase stands for.
    """
    uniform = rng.random(2 + 3 * 7).tolist()  # one draw for all choices: a pattern has at most 7 slots

    def choose(options: Sequence[str]) -> str:
        return options[int(uniform.pop() * len(options))]

    patterns = _FOLLOWING_PARTS if continues else _PATTERN_PARTS
    parts = patterns[int(uniform.pop() * len(patterns))]
    capitalised = uniform.pop() < _CAPITALISED_SHARE
    try:
        words = list(parts)
        for place in range(1, len(parts), 2):
            slot = parts[place]
            if slot in _WORDS:
                attribute, phrases = _WORDS[slot]
                words[place] = choose(phrases[attributes[attribute]])
            elif slot in _SOUNDS:
                phrase = choose(_SOUNDS[slot][attributes["timbre"]])
                words[place] = phrase.format(choose(_PITCHES[attributes["pitch"]])) if "{" in phrase else phrase
            else:
                words[place] = choose(_FRAMES[slot]).format(choose(_BACKGROUNDS[attributes["background"]]))
    except KeyError as error:
        raise ValueError(
            f"attributes must give a known value for each of {sorted(_known_values())}, {error} is missing or unknown "
            f"in {dict(attributes)}. Use the values of the table in TOYBOX.md."
        ) from None
    caption = "".join(words).replace("a orange", "an orange")
    if capitalised:
        caption = ". ".join(sentence[0].upper() + sentence[1:] for sentence in caption.split(". ")) + "."
    return caption


def parse_caption(text: str) -> dict[str, str]:
    """Read the attributes back from a caption of this grammar. For tests only: it understands no other English.

    Args:
        text: a caption as `caption_for` writes it.

    Returns:
        The attributes it was written from; without "pitch" when the timbre is "silent", and of a scene that goes on
        from another motion and sound alone.

    Raises:
        ValueError: the text is no sentence of the grammar.
    """
    plain = text.lower().removesuffix(".").replace("an orange", "a orange")
    for expression in _expressions():
        match = expression.fullmatch(plain)
        if match:
            break
    else:
        raise ValueError(f"text must be a caption written by caption_for, got {text!r}.")
    attributes: dict[str, str] = {}
    for slot, phrase in match.groupdict().items():
        attributes.update(_meanings()[slot][phrase])
    return attributes


def caption_words() -> dict[str, dict[str, list[str]]]:
    """The words for each value of an attribute that words stand for: {"pitch": {"low": ["low", ...], ...}, ...}.

    The concept's are not among them.
    """
    tables = {"size": _SIZES, "colour": _COLOURS, "shape": _SHAPES, "background": _BACKGROUNDS, "pitch": _PITCHES}
    return {name: {value: _once(words) for value, words in table.items()} for name, table in tables.items()}


def caption_phrases() -> list[dict[str, Any]]:
    """The grammar's phrases as data.

    Returns:
        One {"means": {attribute: value}, "forms": {slot: phrase}} for each phrase but the concept's; "{pitch}" and
        "{background}" in a phrase stand for any of their `caption_words`. A motion's verb and its participle are one
        phrase in two forms.
    """
    phrases: list[dict[str, Any]] = [
        {"means": {name: value}, "forms": {name: word}}
        for name, values in caption_words().items()
        if name in _WORDS
        for value, words in values.items()
        for word in words
    ]
    for value, verbs in _VERBS.items():
        for verb, participle in zip(verbs, _PARTICIPLES[value], strict=True):
            phrases.append({"means": {"motion": value}, "forms": {"verb": verb, "participle": participle}})
    for slot, frames in _FRAMES.items():
        phrases += [{"means": {}, "forms": {slot: frame.format("{background}")}} for frame in frames]
    for slot, sounds in _BASE_SOUNDS.items():
        for timbre, forms in sounds.items():
            phrases += [{"means": {"timbre": timbre}, "forms": {slot: form.format("{pitch}")}} for form in forms]
    return phrases


def _once(words: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(words))


def _known_values() -> dict[str, set[str]]:
    words = {attribute: set(phrases) for attribute, phrases in _WORDS.values()}
    return words | {"timbre": set(_SOUND_LABELS), "pitch": set(_PITCHES)}


@functools.cache
def _meanings() -> dict[str, dict[str, dict[str, str]]]:
    """slot -> phrase -> the attributes it stands for."""
    meanings: dict[str, dict[str, dict[str, str]]] = {}
    for slot, (attribute, phrases) in _WORDS.items():
        meanings[slot] = {form: {attribute: value} for value, forms in phrases.items() for form in forms}
    for slot, sounds in _SOUNDS.items():
        meanings[slot] = {form: {"timbre": "silent"} for form in sounds["silent"]} | {
            form.format(word): {"timbre": timbre, "pitch": pitch}
            for timbre in (*_NOTES, _CONCEPT_TIMBRE)
            for form in sounds[timbre]
            for pitch, pitch_words in _PITCHES.items()
            for word in pitch_words
        }
    for slot, frames in _FRAMES.items():
        meanings[slot] = {
            frame.format(word): {"background": value}
            for frame in frames
            for value, background_words in _BACKGROUNDS.items()
            for word in background_words
        }
    return meanings


@functools.cache
def _expressions() -> tuple[re.Pattern[str], ...]:
    """One regular expression for each pattern; a slot's group takes any phrase of that slot."""
    expressions = []
    for parts in (*_PATTERN_PARTS, *_FOLLOWING_PARTS):
        pieces = [re.escape(part) for part in parts]
        for place in range(1, len(parts), 2):
            phrases = "|".join(re.escape(phrase) for phrase in _meanings()[parts[place]])
            pieces[place] = f"(?P<{parts[place]}>{phrases})"
        expressions.append(re.compile("".join(pieces)))
    return tuple(expressions)
