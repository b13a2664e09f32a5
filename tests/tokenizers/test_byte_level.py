"""The text tokenizer of a language model: any text comes back, and nothing in a text is special."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from poet_tokenizers.base import TextTokenizer
from poet_tokenizers.byte_level import ByteLevelTokenizer
from poet_tokenizers.errors import CheckpointError, ShapeError
from poet_tokenizers.loading import load_text_tokenizer

END, THINK = "<|endoftext|>", "<think>"


def trained(*, prefix_space: bool = False, alphabet: int = 256) -> Tokenizer:
    """Byte pairs with NFC, a special piece that a template adds, one that is not special, and a short limit."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space)
    tokenizer.decoder = decoders.ByteLevel()
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())[:alphabet]
    trainer = trainers.BpeTrainer(vocab_size=331, initial_alphabet=letters, show_progress=False)
    tokenizer.train_from_iterator(["a red star rises", "two blue circles fall"] * 3, trainer)
    tokenizer.add_special_tokens([AddedToken(END)])
    tokenizer.add_tokens([AddedToken(THINK, normalized=False)])
    number = tokenizer.token_to_id(END)
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{END} $A {END}", special_tokens=[(END, number)])
    tokenizer.enable_truncation(5)
    tokenizer.enable_padding(length=40)
    return tokenizer


MODEL = trained()
KNOWN = MODEL.get_vocab_size(with_added_tokens=True)
TOKENIZER = ByteLevelTokenizer(MODEL.to_str().encode(), KNOWN + 7)


def test_it_satisfies_the_protocol_and_has_as_many_pieces_as_the_model_has_rows() -> None:
    assert isinstance(TOKENIZER, TextTokenizer)
    assert (TOKENIZER.spec.kind, TOKENIZER.spec.num_pieces) == ("byte_level_bpe", KNOWN + 7)
    assert TOKENIZER.num_known == KNOWN
    assert ByteLevelTokenizer(MODEL.to_str().encode()).spec.num_pieces == KNOWN


@settings(deadline=None, max_examples=300)
@given(st.text(alphabet=st.characters(), max_size=60))
@example("")
@example("  two leading spaces, and  two  inside ")
@example("first\nsecond\r\n\tthird\x00")
@example("猫が跳ねる 🐈‍⬛ \u0301e\u0301")
@example(f"{END}a{THINK}</s>")
@example("\ufeff\u200b\u00a0")
@example("\u2581 \ud800")
def test_any_text_comes_back(text: str) -> None:
    codes = TOKENIZER.encode(text)
    assert TOKENIZER.decode(codes) == TOKENIZER.normalise(text)
    assert all(0 <= code < KNOWN for code in codes)


def test_only_lone_surrogates_and_accents_are_normalised() -> None:
    text = "A b\u00e9 e\u0301 ﬁ\t\n ％ Ａ x\ud83dy"
    assert TOKENIZER.normalise(text) == unicodedata.normalize("NFC", text.replace("\ud83d", "\ufffd"))


def test_pieces_are_the_language_models_without_added_ones_and_without_a_limit() -> None:
    plain = Tokenizer.from_str(MODEL.to_str())
    plain.no_truncation()
    plain.no_padding()
    text = "a red star rises and two blue circles fall, a red star rises"
    assert TOKENIZER.encode(text) == plain.encode(text, add_special_tokens=False).ids
    assert len(TOKENIZER.encode(text)) > 5
    assert TOKENIZER.encode("") == []


def test_what_looks_special_in_a_text_is_text() -> None:
    special = MODEL.token_to_id(END)
    assert special not in TOKENIZER.encode(f"a red star{END}")
    assert MODEL.encode(f"a red star{END}").ids.count(special) > 0


def test_special_pieces_and_rows_without_a_piece_stand_for_no_text() -> None:
    codes = TOKENIZER.encode("a star")
    assert TOKENIZER.decode([*codes, MODEL.token_to_id(END), KNOWN, KNOWN + 6]) == "a star"
    assert TOKENIZER.decode([MODEL.token_to_id(THINK)]) == THINK


@pytest.mark.parametrize("code", [-1, KNOWN + 7, 10**9])
def test_codes_out_of_range_are_refused(code: int) -> None:
    with pytest.raises(ShapeError, match=str(code)):
        TOKENIZER.decode([code])


def test_a_saved_tokenizer_is_the_same_file_and_the_same_tokenizer(tmp_path: Path) -> None:
    TOKENIZER.save(tmp_path / "text")
    assert (tmp_path / "text" / "tokenizer.json").read_text() == MODEL.to_str()
    loaded = load_text_tokenizer(tmp_path / "text")
    assert loaded.spec == TOKENIZER.spec
    assert loaded.encode("a red star") == TOKENIZER.encode("a red star")


def test_a_changed_a_missing_and_a_shortened_file_are_refused(tmp_path: Path) -> None:
    TOKENIZER.save(tmp_path)
    file = tmp_path / "tokenizer.json"
    content = file.read_text()
    for changed in (content.replace("NFC", "NFD"), content[:-9], ""):
        file.write_text(changed)
        with pytest.raises(CheckpointError, match="checksum"):
            load_text_tokenizer(tmp_path)
    file.unlink()
    with pytest.raises(CheckpointError, match="must hold the text tokenizer"):
        load_text_tokenizer(tmp_path)


@pytest.mark.parametrize("num_pieces", [KNOWN - 1, 0, None, "x"])
def test_a_wrong_number_of_pieces_is_refused(tmp_path: Path, num_pieces: object) -> None:
    TOKENIZER.save(tmp_path)
    description = json.loads((tmp_path / "config.json").read_text())
    description["spec"]["num_pieces"] = num_pieces
    (tmp_path / "config.json").write_text(json.dumps(description))
    with pytest.raises(CheckpointError, match=r"num_pieces must be|at most"):
        load_text_tokenizer(tmp_path)


def without_byte_level() -> bytes:
    content = json.loads(MODEL.to_str())
    content["decoder"] = None
    return json.dumps(content).encode()


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (b"{", "must be a tokenizer's JSON"),
        (b"[]", "byte-level byte pairs"),
        (b'{"model": {"type": "Unigram"}}', "'Unigram'"),
        (without_byte_level(), "byte-level byte pairs"),
        (b'{"model": {"type": "BPE"}, "decoder": {"type": "ByteLevel"}}', "cannot be read as a tokenizer"),
        (trained(alphabet=200).to_str().encode(), "256 bytes"),
        (trained(prefix_space=True).to_str().encode(), "give back the text"),
    ],
)
def test_another_kind_of_tokenizer_is_refused(model: bytes, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        ByteLevelTokenizer(model)
