"""Prompts that are edited in words: the parser of Toybox captions reads exactly what was asked for."""

import itertools
import json
import time
from pathlib import Path

import numpy as np
import pytest

from poet.bundle import default_bundle
from poet.data.toybox_captions import caption_for, caption_words, parse_caption
from poet.data.toybox_phrases import toybox_phrases, write_toybox_phrases
from poet.errors import CheckpointError
from poet_serving.phrases import Phrases, edit_prompt, is_whole_prompt

STAR = "a large red star bounces on a navy background with a high bell sound"
SILENT = "silent clip: a small white cross grows, black backdrop"

VALUES = {
    "colour": ("red", "green", "blue", "yellow", "magenta", "cyan", "orange", "white"),
    "shape": ("circle", "square", "triangle", "star", "cross"),
    "size": ("small", "large"),
    "background": ("black", "navy", "maroon", "gray"),
    "motion": ("moves right", "moves left", "rises", "falls", "bounces", "circles", "stays still", "grows", "shrinks"),
    "timbre": ("flute", "buzzer", "string", "bell", "silent"),
    "pitch": ("low", "middle", "high"),
}
ORDERS = {
    "moves right": ("move right", "slide to the right", "go right", "travel rightwards"),
    "moves left": ("move left", "drift to the left", "go left", "travel leftwards"),
    "rises": ("rise", "go up", "climb", "fly up", "float upwards"),
    "falls": ("fall", "go down", "sink", "drop", "drop downwards"),
    "bounces": ("bounce", "jump up and down", "hop", "bounce on the floor"),
    "circles": ("circle", "circle around", "go round and round", "move in a circle"),
    "stays still": ("stay still", "stand still", "not move", "keep still", "stay in place"),
    "grows": ("grow", "get bigger", "become bigger", "expand", "grow larger"),
    "shrinks": ("shrink", "get smaller", "grow smaller", "become smaller", "contract"),
}
COMPARATIVES = {
    "small": ("a bit smaller", "make it smaller", "tiny"),
    "large": ("bigger", "much larger please", "huge"),
}


@pytest.fixture(scope="module")
def phrases() -> Phrases:
    return Phrases.from_json(json.dumps(toybox_phrases()))


def read(caption: str) -> dict[str, str]:
    return parse_caption(caption)


def instructions(name: str, value: str, before: str) -> list[str]:
    """Ways to ask for one value of one attribute, of a clip that has the value `before`."""
    if name == "motion":
        orders = [f"{opening} {order}" for order in ORDERS[value] for opening in ("now make it", "let it")]
        return [*orders, f"it should {ORDERS[value][0]}", f"{value}", f"make it {ORDERS[value][0]} instead."]
    if name == "background":
        return [
            *(f"make the background {value}", f"on a {value} background", f"Change the backdrop to {value}!"),
            *(f"on {value} please", f"the background should be {value}", f"{value} background"),
            *(f"instead of {before}, {value}", f"swap the {before} background for {value}", f"{value}, not {before}"),
            f"change the background from {before} to {value}",
        ]
    if name == "timbre":
        if value == "silent":
            return ["make it silent", "mute it", "no sound", "in silence", "Without any sound.", "turn off the sound"]
        return [f"with a {value}", f"make it a {value}", f"a {value} instead", f"now let a {value} play"]
    if name == "pitch":
        more = {"low": ("lower", "low-pitched"), "middle": ("mid-range",), "high": ("make the sound a little higher",)}
        return [f"a {value} sound", f"make it a {value} note", *more[value]]
    if name == "size":
        return [f"make it {value}", f"{value} instead of {before}", f"not {before} but {value}", *COMPARATIVES[value]]
    article = "an" if value[0] in "aeiou" else "a"
    usual = [f"make it {article} {value} one", f"instead of {before}, {value}", f"{value} rather than {before}"]
    usual += [f"from {before} to {value}", f"no longer {before}, but {value}", f"{value}, please"]
    return [*usual, f"Turn the {before} one into {article} {value} one"]


def expected(before: dict[str, str], name: str, value: str) -> dict[str, str]:
    after = {**before, name: value}
    if after["timbre"] == "silent":
        if name == "pitch":
            after["timbre"] = "flute"
        else:
            after.pop("pitch", None)
    return after if after["timbre"] == "silent" else {"pitch": "middle", **after}


def test_every_single_change_to_a_caption_of_every_pattern_is_read_back_as_exactly_that_change(
    phrases: Phrases,
) -> None:
    rng = np.random.default_rng(11)
    seen: set[tuple[str, str]] = set()
    count = 0
    for index in range(150):
        drawn = {name: str(rng.choice(values)) for name, values in VALUES.items()}
        caption = caption_for(drawn, rng)
        before = read(caption)
        for name, values in VALUES.items():
            value = str(rng.choice(values))
            told = before.get(name, "silent")
            ways = instructions(name, value, told)
            if value == told:
                ways = [way for way in ways if told not in way]
            for way in ways:
                edited = edit_prompt(caption, way, phrases)
                try:
                    found = read(edited)
                except ValueError:
                    found = {}
                assert found == expected(before, name, value), (index, caption, way, edited)
                count += 1
        seen |= set(before.items())
    assert len(seen) == sum(len(values) for values in VALUES.values())
    assert count > 4_000


def test_every_phrase_of_the_grammar_changes_every_caption_to_its_own_meaning(phrases: Phrases) -> None:
    rng = np.random.default_rng(5)
    words = caption_words()
    for attribute in ("colour", "shape", "size"):
        for value, forms in words[attribute].items():
            for form in forms:
                caption = caption_for({name: str(rng.choice(found)) for name, found in VALUES.items()}, rng)
                assert read(edit_prompt(caption, f"make it a {form} one", phrases)) == {
                    **read(caption),
                    attribute: value,
                }
    for _ in range(400):
        target, start = ({name: str(rng.choice(found)) for name, found in VALUES.items()} for _ in range(2))
        whole = caption_for(target, rng)
        caption = caption_for(start, rng)
        assert edit_prompt(caption, whole, phrases) == whole
        # "make it ..." names everything too, and so everything changes.
        if whole.startswith(("a large", "a small")):
            assert read(edit_prompt(caption, f"make it {whole}", phrases)) == read(whole)


@pytest.mark.parametrize(
    ("previous", "instruction", "edited"),
    [
        (STAR, "now make it rise", "a large red star rises on a navy background with a high bell sound"),
        (STAR, "make it go up", "a large red star goes up on a navy background with a high bell sound"),
        ("A red star bouncing on navy, low flute.", "make it sink", "A red star sinking on navy, low flute."),
        (STAR, "make it orange", "a large orange star bounces on a navy background with a high bell sound"),
        ("a red star rises", "orange", "an orange star rises"),
        ("An orange star rises.", "blue", "A blue star rises."),
        (STAR, "make the background maroon", "a large red star bounces on a maroon background with a high bell sound"),
        (STAR, "stop bouncing", "a large red star stays still on a navy background with a high bell sound"),
        (STAR, "rise, and stop bouncing", "a large red star rises on a navy background with a high bell sound"),
        (STAR, "remove the bell", "a large red star bounces on a navy background with no sound"),
        (STAR, "let the star circle", "a large red star circles on a navy background with a high bell sound"),
        (STAR, "turn the star into a circle", "a large red circle bounces on a navy background with a high bell sound"),
        (STAR, "don’t move", "a large red star stays still on a navy background with a high bell sound"),
        (STAR, "green and on black", "a large green star bounces on black with a high bell sound"),
        (SILENT, "with a bell", "middle bell sound: a small white cross grows, black backdrop"),
        (SILENT, "a low sound", "low flute sound: a small white cross grows, black backdrop"),
        ("a star bounces", "make it blue and big, on navy", "a big blue star bounces on navy"),
        ("a star bounces.", "with a low bell", "a star bounces with a low bell."),
        (STAR, "a blue square falls", "a blue square falls"),
        (STAR, "Now please, a blue square falling", "a blue square falling"),
        ("a star.", "blue and falling", "a star, blue and falling"),
        (STAR, "the square falls", "a large red square falls on a navy background with a high bell sound"),
    ],
)  # fmt: skip
def test_a_change_in_words_is_made_in_the_form_that_stands_there(
    phrases: Phrases, previous: str, instruction: str, edited: str
) -> None:
    assert edit_prompt(previous, instruction, phrases) == edited


@pytest.mark.parametrize("instruction", ["louder", "make the background blue", "make it navy", "in the middle", "no!"])
def test_what_is_not_understood_is_put_behind_the_prompt(phrases: Phrases, instruction: str) -> None:
    assert edit_prompt(STAR, instruction, phrases) == f"{STAR}, {instruction}"
    assert edit_prompt(f"{STAR}.", f" {instruction} ", phrases) == f"{STAR}, {instruction}"


def test_what_the_prompt_has_no_place_for_is_put_behind_it(phrases: Phrases) -> None:
    assert edit_prompt("a dog runs", "make it a blue cat", phrases) == "a dog runs, make it a blue cat"
    assert edit_prompt("a dog runs", "on navy", phrases) == "a dog runs on navy"


def test_without_phrases_instructions_add_up() -> None:
    assert edit_prompt("a dog runs.", "make it blue", None) == "a dog runs, make it blue"
    assert edit_prompt("", "a cat", None) == "a cat"
    assert edit_prompt("a cat", " ", None) == "a cat"
    assert not is_whole_prompt(STAR, None)


def test_a_prompt_of_its_own_is_told_from_something_said_about_another(phrases: Phrases) -> None:
    for whole in (STAR, SILENT, "a star falls", "now a disc rising", "on gray, a small red star rises in silence"):
        assert is_whole_prompt(whole, phrases), whole
    for said in (
        f"make it {STAR}",
        "make it fall",
        "make the star fall",
        "the star falls",
        "a blue star",
        "it falls like a star",
        "",
        "?",
    ):
        assert not is_whole_prompt(said, phrases), said


def test_a_word_of_two_classes_is_of_the_one_that_is_named_beside_it() -> None:
    two = Phrases.from_json(
        json.dumps(
            {
                "words": {"background": {"black": ["black"], "red": ["red"]}},
                "phrases": [
                    *({"means": {"colour": word}, "forms": {"colour": word}} for word in ("black", "red", "blue")),
                    *({"means": {"background": word}, "forms": {"background": word}} for word in ("black", "red")),
                    {"forms": {"on": "on a {background} background"}},
                ],
                "cues": {"background": ["background"]},
            }
        )
    )
    previous = "a red ball on a black background"
    assert edit_prompt(previous, "make it black", two) == "a black ball on a black background"
    assert edit_prompt(previous, "make the background red", two) == "a red ball on a red background"
    assert edit_prompt(previous, "make the background red and it blue", two) == "a blue ball on a red background"
    assert edit_prompt("a red ball, the background is black", "black", two) == "a black ball, the background is black"


def test_the_shipped_phrases_are_those_of_the_grammar(tmp_path: Path) -> None:
    write_toybox_phrases(tmp_path / "phrases.json")
    assert json.loads((tmp_path / "phrases.json").read_text()) == json.loads(json.dumps(toybox_phrases()))
    shipped = default_bundle() / "phrases.json"
    assert shipped.read_text() == (tmp_path / "phrases.json").read_text(), (
        "call poet.data.toybox_phrases.write_toybox_phrases with the file in poet/bundles/nano"
    )
    assert Phrases.load(shipped).attributes == set(VALUES)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "Invalid JSON"),
        ('{"phrases": [], "colour": 3}', "colour: Extra inputs"),
        ('{"phrases": [{"means": {}, "forms": {"on": "on {sky}"}}]}', "placeholder 'sky'"),
        ('{"phrases": [{"forms": {"on": ""}}]}', "at least 1 character"),
        ('{"phrases": [], "append": ["on"]}', "got 'on'"),
    ],
)
def test_a_damaged_file_of_phrases_is_named(tmp_path: Path, content: str, message: str) -> None:
    file = tmp_path / "phrases.json"
    file.write_text(content)
    with pytest.raises(CheckpointError, match=rf"phrases\.json cannot be used: .*{message}"):
        Phrases.load(file)
    with pytest.raises(CheckpointError, match="cannot be used"):
        Phrases.load(tmp_path / "missing.json")


@pytest.mark.usefixtures("no_collections")
def test_the_longest_texts_are_edited_in_seconds(phrases: Phrases) -> None:
    start = time.thread_time()
    edited = edit_prompt("a red star " * 2900, "instead of red, blue " * 1500, phrases)
    assert edited == ("a blue star " * 2900).strip()
    edit_prompt("red, " * 6000, "from a red " * 2900, phrases)
    assert time.thread_time() - start < 2


@pytest.mark.usefixtures("no_collections")
@pytest.mark.parametrize(
    ("previous", "instruction"),
    [
        ("a red star", "not red and "),
        ("a red star", "not red "),
        ("a red star", "red "),
        ("star ", "cross "),
        ("a red star ", "instead of red, blue "),
        ("red, ", "from a red "),
        ("background ", "blue not "),
    ],
)
def test_time_grows_with_the_length_of_a_text_and_not_with_its_square(
    phrases: Phrases, previous: str, instruction: str
) -> None:
    def seconds(length: int) -> float:
        text, told = previous * (length // len(previous)), "not " + instruction * (length // len(instruction))
        found = []
        for _ in range(3):
            start = time.thread_time()
            edit_prompt(text, told, phrases)
            found.append(time.thread_time() - start)
        return min(found)

    assert seconds(32_768) < 10 * seconds(8_192)  # four times as much where it grows as the length, else sixteen


def test_edits_of_edits_stay_captions(phrases: Phrases) -> None:
    rng = np.random.default_rng(2)
    for _ in range(20):
        caption = caption_for({name: str(rng.choice(values)) for name, values in VALUES.items()}, rng)
        for name, values in itertools.islice(itertools.cycle(VALUES.items()), 20):
            value = str(rng.choice(values))
            before = read(caption)
            caption = edit_prompt(caption, instructions(name, value, before.get(name, "silent"))[0], phrases)
            assert read(caption) == expected(before, name, value), caption
