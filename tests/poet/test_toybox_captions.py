"""The caption grammar of Toybox: complete, invertible, varied, grammatical, cheap."""

import itertools
import re
import time
from collections.abc import Iterator

import numpy as np
import pytest

from poet.data.toybox_captions import caption_for, parse_caption

VALUES = {
    "colour": ("red", "green", "blue", "yellow", "magenta", "cyan", "orange", "white"),
    "shape": ("circle", "square", "triangle", "star", "cross"),
    "size": ("small", "large"),
    "background": ("black", "navy", "maroon", "gray"),
    "motion": (
        "moves right",
        "moves left",
        "rises",
        "falls",
        "bounces",
        "circles",
        "stays still",
        "grows",
        "shrinks",
    ),
    "timbre": ("flute", "buzzer", "string", "bell", "silent"),
    "pitch": ("low", "middle", "high"),
}
STAR = {
    "colour": "red",
    "shape": "star",
    "size": "large",
    "background": "navy",
    "motion": "bounces",
    "timbre": "bell",
    "pitch": "high",
}


def captions(attributes: dict[str, str], count: int) -> list[str]:
    rng = np.random.default_rng(3)
    return [caption_for(attributes, rng) for _ in range(count)]


def random_attributes(count: int) -> Iterator[dict[str, str]]:
    rng = np.random.default_rng(7)
    for _ in range(count):
        yield {name: values[rng.integers(len(values))] for name, values in VALUES.items()}


def expected(attributes: dict[str, str]) -> dict[str, str]:
    return {name: value for name, value in attributes.items() if name != "pitch" or attributes["timbre"] != "silent"}


def test_every_combination_of_values_is_read_back_from_its_caption() -> None:
    rng = np.random.default_rng(5)
    for values in itertools.product(*VALUES.values()):
        attributes = dict(zip(VALUES, values, strict=True))
        caption = caption_for(attributes, rng)
        assert parse_caption(caption) == expected(attributes), caption


def test_every_paraphrase_of_one_clip_means_the_same() -> None:
    written = set(captions(STAR, 3000))
    assert len(written) > 1500
    assert all(parse_caption(caption) == STAR for caption in written)


def test_captions_come_in_at_least_six_sentence_patterns() -> None:
    openings = {" ".join(caption.lower().split()[:2]) for caption in captions(STAR, 1000)}
    assert len(openings) > 6
    assert len({caption.lower().index("star") > caption.lower().index("navy") for caption in captions(STAR, 100)}) == 2


@pytest.mark.parametrize(
    ("example", "attributes"),
    [
        ("a large red star bounces on a navy background with a high bell sound", STAR),
        (
            "on gray, a small cyan circle moves left while a low flute plays",
            {
                "colour": "cyan",
                "shape": "circle",
                "size": "small",
                "background": "gray",
                "motion": "moves left",
                "timbre": "flute",
                "pitch": "low",
            },
        ),
        (
            "silent clip: a small white cross grows, black backdrop",
            {
                "colour": "white",
                "shape": "cross",
                "size": "small",
                "background": "black",
                "motion": "grows",
                "timbre": "silent",
            },
        ),
    ],
)
def test_the_examples_of_the_specification_are_of_the_grammar(example: str, attributes: dict[str, str]) -> None:
    assert parse_caption(example) == attributes


def test_a_silent_clip_names_no_pitch() -> None:
    pitch_words = re.compile(r"\b(low|deep|middle|medium|mid|high|pitched|low-pitched)\b")
    for caption in captions(STAR | {"timbre": "silent"}, 500):
        assert not pitch_words.search(caption), caption
        assert "pitch" not in parse_caption(caption)


def test_articles_agree_and_punctuation_is_clean() -> None:
    rng = np.random.default_rng(13)
    for attributes in random_attributes(5000):
        caption = caption_for(attributes, rng)
        assert not re.search(r"\ba [aeiou]", caption.lower()), caption
        assert not re.search(r"\ban [^aeiou]", caption.lower()), caption
        assert not any(junk in caption for junk in ("  ", "{", "<", " ,")), caption
        assert caption[0].isupper() == caption.endswith("."), caption


def test_the_same_state_gives_the_same_caption_and_another_state_another() -> None:
    assert caption_for(STAR, np.random.default_rng(11)) == caption_for(STAR, np.random.default_rng(11))
    assert len(set(captions(STAR, 20))) > 10


def test_unknown_values_and_foreign_sentences_are_refused() -> None:
    with pytest.raises(ValueError, match="violet"):
        caption_for(STAR | {"colour": "violet"}, np.random.default_rng(0))
    with pytest.raises(ValueError, match="must be a caption"):
        parse_caption("a dog runs along the beach")


def test_a_caption_costs_far_less_than_a_clip() -> None:
    rng = np.random.default_rng(0)
    caption_for(STAR, rng)
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        for _ in range(200):
            caption_for(STAR, rng)
        seconds.append((time.perf_counter() - start) / 200)
    assert min(seconds) < 50e-6
