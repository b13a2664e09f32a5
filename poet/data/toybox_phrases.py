"""What people say when they change a Toybox clip in words: the phrases of the captions, and others beside them.

`phrases.json` of a bundle that was trained on Toybox holds it, for chats about its clips. The captions' own phrases
come from their grammar; here stand only the words that captions do not hold ("make it bigger").
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

from poet.data.toybox_captions import caption_phrases, caption_words

__all__ = ["toybox_phrases", "write_toybox_phrases"]

# What is said, by attribute and value. "circle" alone is the shape: of the motion only longer phrases are taken.
_SAID: Final[dict[str, dict[str, tuple[str, ...]]]] = {
    "size": {
        "small": ("smaller", "a little smaller", "tinier"),
        "large": ("larger", "bigger", "a little larger", "a little bigger", "giant", "enormous"),
    },
    "colour": {},
    "shape": {
        "circle": ("round", "dot"),
        "square": ("box",),
    },
    "motion": {
        "moves right": (
            *("to the right", "rightwards", "rightward", "go right", "goes right", "going right", "slide right"),
            *("fly right", "from left to right", "right instead of left"),
        ),
        "moves left": (
            *("to the left", "leftwards", "leftward", "go left", "goes left", "going left", "slide left"),
            *("fly left", "from right to left", "left instead of right"),
        ),
        "rises": (
            *("upwards", "upward", "float up", "floats up", "floating up", "fly up", "flies up", "go higher"),
            *("move higher", "ascend", "ascends", "ascending"),
        ),
        "falls": (
            *("downwards", "downward", "it drop", "drops", "dropping", "drop down", "drops down", "fall down"),
            *("falls down", "falling down", "descend", "descends", "descending", "go lower", "move lower"),
        ),
        "bounces": (
            *("jump", "jumps", "jumping", "hop", "hops", "hopping", "jump up and down", "jumps up and down"),
            *("jumping up and down", "jump high", "jump higher", "bounce high", "bounce higher"),
        ),
        "circles": (
            *("it circle", "should circle", "it to circle", "in circles", "in a circle", "round and round"),
            *("go round", "goes round", "circle round", "orbit", "orbits", "orbiting"),
        ),
        "stays still": (
            *("hold still", "be still", "make it still", "keep it still", "remain still", "motionless", "freeze"),
            *("stop moving", "don't move", "do not move"),
        ),
        "grows": (
            *("get larger", "become larger", "grow bigger", "getting larger", "bigger and bigger"),
            *("larger and larger",),
        ),
        "shrinks": ("smaller and smaller",),
    },
    "timbre": {
        "flute": ("flute", "flutes"),
        "buzzer": ("buzzer", "buzz", "buzzing"),
        "string": ("string", "strings", "plucked string"),
        "bell": ("bell", "bells", "ringing"),
        "silent": (
            *("silent", "silently", "mute", "muted", "soundless", "noiseless", "without sound", "no audio"),
            *("without audio", "turn off the sound", "turn the sound off", "remove the sound", "take the sound away"),
        ),
    },
    "pitch": {
        "low": ("lower", "deeper", "a little lower"),
        "middle": ("medium",),
        "high": ("higher", "a little higher"),
    },
}
_SILENT: Final = "silent"
_BARE: Final = ("low", "high", "deep")  # "in the middle" is no pitch
_THIRD_PERSON: Final = {"goes": "go", "does": ""}


def toybox_phrases() -> dict[str, Any]:
    """The content of phrases.json, as `poet_serving.phrases.Phrases` reads it."""
    phrases = caption_phrases()
    taken = {form for phrase in phrases for form in phrase["forms"].values()}
    taken |= {word for values in _SAID.values() for words in values.values() for word in words}
    for phrase in phrases:
        if "verb" in phrase["forms"]:
            said = _infinitive(phrase["forms"]["verb"])
            phrase["said"] = [] if said in taken else [said]
    words = caption_words()
    for name, values in _SAID.items():
        phrases += [{"means": {name: value}, "said": list(said)} for value, said in values.items()]
    phrases += [
        {"means": {"motion": "circles"}, "said": ["{shape} circle"]},
        {"means": {}, "said": [f"{{pitch}} {noun}" for noun in ("sound", "note", "tone", "pitch")]},
        *(
            {"means": {"pitch": value}, "said": [word]}
            for value, said in words["pitch"].items()
            for word in said
            if word in _BARE or "-" in word
        ),
    ]
    return {
        "words": {name: words[name] for name in ("shape", "background", "pitch")},
        "phrases": phrases,
        "cues": {"background": ["background", "backdrop"]},
        "defaults": {"timbre": "flute", "pitch": "middle"},
        "without": {"motion": "stays still", "timbre": _SILENT},
        "append": ["on", "with"],
        "prepend": {"colour": ["shape"], "size": ["colour", "shape"]},
        "whole": ["shape", "motion"],
    }


def write_toybox_phrases(file: Path) -> None:
    """Write phrases.json, one phrase on a line.

    Args:
        file: as a rule `phrases.json` in a bundle.
    """
    content = toybox_phrases()
    lines = []
    for name, value in content.items():
        if name == "phrases":
            rows = ",\n".join(f"    {json.dumps(phrase)}" for phrase in value)
            lines.append(f'  "phrases": [\n{rows}\n  ]')
        else:
            lines.append(f"  {json.dumps(name)}: {json.dumps(value)}")
    file.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


def _infinitive(verb: str) -> str:
    """The grammar's verbs as they stand after "make it": "goes up" -> "go up", "does not move" -> "not move"."""
    first, _, rest = verb.partition(" ")
    return f"{_THIRD_PERSON.get(first, first.removesuffix('s'))} {rest}".strip()
