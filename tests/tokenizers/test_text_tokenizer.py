"""The text tokenizer: any text comes back, and captions become few pieces."""

from __future__ import annotations

import random
import statistics
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from poet.data.toybox_captions import caption_for
from poet.training.text_tokenizer import TextTokenizerRecipe, train_text_tokenizer
from poet_tokenizers.base import TextTokenizer
from poet_tokenizers.errors import CheckpointError, ConfigError, ShapeError
from poet_tokenizers.text import MODEL_FILE, SentencePieceTokenizer, normalise

WORDS = ("red", "blue", "star", "circle", "rises", "bounces", "while", "softly", "a", "bell", "rings", "far", "away")


def _lines(count: int = 300) -> list[str]:
    rng = random.Random(0)
    return [" ".join(rng.choices(WORDS, k=rng.randint(3, 9))) for _ in range(count)]


TOKENIZER = SentencePieceTokenizer.train(_lines(), num_pieces=331)


def test_tokenizer_satisfies_the_protocol_and_names_its_spec() -> None:
    assert isinstance(TOKENIZER, TextTokenizer)
    assert TOKENIZER.spec.kind == "sentencepiece"
    assert 257 < TOKENIZER.spec.num_pieces <= 331
    assert len(TOKENIZER.spec.checksum) == 64


@settings(deadline=None, max_examples=300)
@given(st.text(alphabet=st.characters(), max_size=60))
@example("")
@example("  two leading spaces, and  two  inside ")
@example("first\nsecond\r\n\tthird\x00")
@example("猫が跳ねる 🐈‍⬛ \u0301e\u0301")
@example("</s><unk><0x41>")
@example("\ufeff\u200b\u00a0")
@example("\u2581 \ud800")
def test_any_text_comes_back(text: str) -> None:
    codes = TOKENIZER.encode(text)
    assert TOKENIZER.decode(codes) == normalise(text)
    assert all(0 <= code < TOKENIZER.spec.num_pieces for code in codes)


def test_only_lone_surrogates_and_the_space_mark_are_normalised() -> None:
    kept = "A b\u00e9 \u212b ﬁ\t\n ％ Ａ"
    assert normalise(kept) == kept
    assert normalise("x\ud83dy\u2581z") == "x\ufffdy z"


def test_empty_text_has_no_pieces() -> None:
    assert TOKENIZER.encode("") == []
    assert TOKENIZER.decode([]) == ""


def test_ten_thousand_characters_come_back() -> None:
    text = " ".join(_lines(400))[:10_000]
    assert len(text) == 10_000
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == text


def test_frequent_words_are_one_piece() -> None:
    assert len(TOKENIZER.encode("circle bounces while star rises")) == 5


def test_bytes_that_are_no_text_become_replacement_characters() -> None:
    start_of_a_character = TOKENIZER.encode("猫")[:-1]
    assert "\ufffd" in TOKENIZER.decode(start_of_a_character)


@pytest.mark.parametrize("code", [-1, 331, 10**9])
def test_codes_out_of_range_are_refused(code: int) -> None:
    with pytest.raises(ShapeError, match=str(code)):
        TOKENIZER.decode([7, code])


def test_the_same_lines_give_the_same_model() -> None:
    assert SentencePieceTokenizer.train(_lines(), num_pieces=331).spec == TOKENIZER.spec
    assert SentencePieceTokenizer.train(_lines(299), num_pieces=331).spec != TOKENIZER.spec


@pytest.mark.parametrize(
    ("lines", "num_pieces", "complaint"),
    [
        (["a b"], 256, "at least 289"),
        ([], 331, "at least one line"),
        (["", " \n"], 331, "at least one line"),
        (["".join(map(chr, range(0x4E00, 0x4F00)))], 331, "331 pieces failed"),
    ],
)
def test_training_that_cannot_work_is_refused(lines: list[str], num_pieces: int, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        SentencePieceTokenizer.train(lines, num_pieces)


def test_a_saved_tokenizer_comes_back_the_same(tmp_path: Path) -> None:
    TOKENIZER.save(tmp_path)
    loaded = SentencePieceTokenizer.load(tmp_path)
    assert loaded.spec == TOKENIZER.spec
    assert loaded.encode("a far bell") == TOKENIZER.encode("a far bell")
    assert b"/" not in (tmp_path / MODEL_FILE).read_bytes()


@pytest.mark.parametrize("damage", [lambda model: model[:-9], lambda model: model + b"x", lambda model: b""])
def test_a_damaged_model_is_refused(tmp_path: Path, damage: object) -> None:
    assert callable(damage)
    TOKENIZER.save(tmp_path)
    file = tmp_path / MODEL_FILE
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(CheckpointError, match="checksum"):
        SentencePieceTokenizer.load(tmp_path)


def test_something_else_than_a_model_is_refused() -> None:
    with pytest.raises(CheckpointError, match="sentencepiece model"):
        SentencePieceTokenizer(b"not a model")


def test_a_recipe_reads_its_captions_in_order() -> None:
    asked: list[tuple[str, int]] = []

    def caption(split: str, index: int) -> str:
        asked.append((split, index))
        return _lines()[index]

    recipe = TextTokenizerRecipe(source="somewhere", num_captions=299, num_pieces=331)
    assert train_text_tokenizer(recipe, caption).spec == SentencePieceTokenizer.train(_lines(299), 331).spec
    assert asked == [("somewhere", index) for index in range(299)]
    with pytest.raises(ConfigError, match="num_captions"):
        TextTokenizerRecipe(source="somewhere", num_captions=0)


def test_captions_become_few_pieces() -> None:
    import numpy as np

    from poet.data.toybox import ATTRIBUTE_VALUES

    def caption(index: int) -> str:
        rng = np.random.default_rng(index)
        return caption_for({name: str(rng.choice(values)) for name, values in ATTRIBUTE_VALUES.items()}, rng)

    tokenizer = SentencePieceTokenizer.train([caption(index) for index in range(1_500)])
    unseen = [caption(index) for index in range(10_000, 10_300)]
    assert all(tokenizer.decode(tokenizer.encode(text)) == text for text in unseen)
    assert statistics.median(len(tokenizer.encode(text)) for text in unseen) <= 18
