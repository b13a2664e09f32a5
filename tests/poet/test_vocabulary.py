import json
import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from poet.errors import CheckpointError, VocabularyError
from poet.testing import tiny_specs, tiny_vocabulary
from poet.vocabulary import NUM_SPECIALS, SPECIAL_NAMES, Vocabulary


@pytest.fixture(scope="module")
def vocabulary() -> Vocabulary:
    return tiny_vocabulary()


def ranges(vocabulary: Vocabulary) -> list[tuple[int, int]]:
    levels = [vocabulary.audio_range(level) for level in range(vocabulary.num_audio_codebooks)]
    return [(0, NUM_SPECIALS), vocabulary.video_range, *levels, vocabulary.text_range]


@given(st.tuples(*[st.integers(1, 97)] * 4))
def test_ranges_are_disjoint_and_cover_every_id(sizes):
    video, levels, audio, text = sizes
    vocabulary = tiny_vocabulary(
        video={"codebook_size": video},
        audio={"num_codebooks": levels, "codebook_size": audio},
        text={"num_pieces": text},
    )
    found = ranges(vocabulary)
    assert [high - low for low, high in found] == [NUM_SPECIALS, video, *[audio] * levels, text]
    assert [low for low, _ in found[1:]] == [high for _, high in found[:-1]]
    assert found[-1][1] == vocabulary.vocab_size <= vocabulary.padded_vocab_size < vocabulary.vocab_size + 128
    assert vocabulary.padded_vocab_size % 128 == 0


def test_special_ids_are_those_that_the_interface_fixes(vocabulary):
    fixed = ["<pad>", "<bos>", "<eos>", "<mask>", "<null>", "<source>", "<parallel>"]
    assert [vocabulary.special(name) for name in fixed] == list(range(7))
    assert len(set(SPECIAL_NAMES)) == len(SPECIAL_NAMES) < 64
    assert vocabulary.special("<24x40>") == vocabulary.resolution_id(24, 40) == 64
    assert vocabulary.resolution_id(56, 88) == 65
    assert vocabulary.resolution(65) == (56, 88)


def test_codes_become_ids_and_come_back(vocabulary):
    video = np.arange(30).reshape(2, 3, 5)
    np.testing.assert_array_equal(vocabulary.video_from_ids(vocabulary.video_to_ids(video)), video)
    assert vocabulary.video_to_ids(video).dtype == np.int64
    for level in range(3):
        codes = np.arange(13)
        ids = vocabulary.audio_to_ids(codes, level)
        assert ids[0] == vocabulary.audio_range(level)[0] and ids[-1] == vocabulary.audio_range(level)[1] - 1
        np.testing.assert_array_equal(vocabulary.audio_from_ids(ids, level), codes)
    text = list(range(43))
    assert vocabulary.text_from_ids(vocabulary.text_to_ids(text)).tolist() == text
    assert vocabulary.text_to_ids([]).tolist() == []


@pytest.mark.parametrize(
    ("convert", "message"),
    [
        (lambda v: v.video_to_ids([3, 31]), r"video code 31 is outside \[0, 31\)"),
        (lambda v: v.video_to_ids([-1]), r"video code -1 is outside \[0, 31\)"),
        (lambda v: v.video_from_ids([287]), r"video id 287 is outside \[256, 287\)"),
        (lambda v: v.audio_to_ids([13], 1), r"audio level 1 code 13 is outside \[0, 13\)"),
        (lambda v: v.audio_from_ids([287], 1), r"audio level 1 id 287 is outside \[300, 313\)"),
        (lambda v: v.audio_range(3), r"audio level 3 is outside \[0, 3\)"),
        (lambda v: v.text_to_ids([43]), r"text piece 43 is outside \[0, 43\)"),
        (lambda v: v.text_from_ids([5]), r"text id 5 is outside \[326, 369\)"),
        (lambda v: v.video_to_ids([0.5]), "must be an integer, got an array of float64"),
        (lambda v: v.special("<boss>"), r"no special id called '<boss>'. Did you mean <bos>\?"),
        (lambda v: v.resolution_id(40, 24), "must be one of 24 x 40, 56 x 88 .* got 40 x 24"),
        (lambda v: v.resolution(66), "reserved special 66 is not a resolution"),
    ],
)
def test_a_value_out_of_range_is_named_with_the_range(vocabulary, convert, message):
    with pytest.raises(VocabularyError, match=message):
        convert(vocabulary)


def test_every_id_has_a_name_of_its_own(vocabulary):
    names = [vocabulary.decode_id(id) for id in range(-1, vocabulary.padded_vocab_size + 1)]
    assert len(set(names)) == len(names)
    examples = {1: "<bos>", 30: "reserved special 30", 65: "<56x88>", 256 + 17: "video 17"}
    examples |= {287 + 13 + 3: "audio level 1 code 3", 326: "text 0", 369: "padding 369"}
    assert {id: vocabulary.decode_id(id) for id in examples} == examples


def test_fingerprint_is_the_same_in_another_process_and_another_order_of_keys(vocabulary):
    program = "from poet.testing import tiny_vocabulary; print(tiny_vocabulary().fingerprint)"
    environment = {**os.environ, "PYTHONHASHSEED": "7", "PYTHONPATH": os.pathsep.join(sys.path)}
    printed = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    ).stdout
    assert printed.strip() == vocabulary.fingerprint
    values = vocabulary.to_dict()
    values["tokenizers"] = {name: dict(reversed(spec.items())) for name, spec in values["tokenizers"].items()}
    backwards = Vocabulary.from_dict({name: values[name] for name in reversed(values)})
    assert backwards.fingerprint == vocabulary.fingerprint


@pytest.mark.parametrize(
    "changes",
    [
        {"video": {"checksum": "d" * 64}},
        {"audio": {"checksum": "d" * 64}},
        {"text": {"checksum": "d" * 64}},
        {"video": {"codebook_size": 37}},
        {"audio": {"codebook_size": 17}},
        {"audio": {"hop_length": 53}},
        {"text": {"num_pieces": 47}},
        {"resolutions": ((24, 40), (56, 96))},
        {"resolutions": ((56, 88), (24, 40))},
    ],
)
def test_fingerprint_changes_with_whatever_changes_the_meaning_of_ids(vocabulary, changes):
    assert tiny_vocabulary(**changes).fingerprint != vocabulary.fingerprint


def test_json_comes_back_equal(vocabulary, tmp_path):
    vocabulary.save(tmp_path / "vocabulary.json")
    loaded = Vocabulary.load(tmp_path / "vocabulary.json")
    assert loaded == vocabulary
    assert loaded.fingerprint == vocabulary.fingerprint
    assert hash(loaded) == hash(vocabulary)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda values: values.pop("hop_length"), r"lacks the keys \['hop_length'\]"),
        (lambda values: values.update(flavour=3), r"unknown keys \['flavour'\]"),
        (lambda values: values.pop("fingerprint"), "with the key 'fingerprint'"),
        (lambda values: values["resolutions"].append([8, 8]), "says that its fingerprint is"),
        (
            lambda values: values.update(text_vocab_size=47),
            "text_vocab_size is 47, but the text tokenizer's num_pieces",
        ),
        (lambda values: values["tokenizers"]["audio"].pop("checksum"), "audio tokenizer's spec must have the keys"),
        (lambda values: values["tokenizers"].pop("text"), r"specs of \['audio', 'text', 'video'\]"),
        (lambda values: values.update(resolutions=[[24, 40], [24, 40]]), "every resolution must stand once"),
        (lambda values: values.update(resolutions=[24]), r"pairs \(height, width\)"),
        (lambda values: values.update(resolutions=[]), "1 to 192 resolutions, got 0"),
    ],
)
def test_an_edited_file_is_refused_and_the_edit_named(vocabulary, tmp_path, edit, message):
    path = tmp_path / "vocabulary.json"
    vocabulary.save(path)
    values = json.loads(path.read_text())
    edit(values)
    path.write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match=message):
        Vocabulary.load(path)


def test_a_missing_or_broken_file_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"there is no vocabulary at .*absent\.json"):
        Vocabulary.load(tmp_path / "absent.json")
    (tmp_path / "half.json").write_text('{"a":')
    with pytest.raises(CheckpointError, match=r"half\.json cannot be read"):
        Vocabulary.load(tmp_path / "half.json")


def test_specs_that_cannot_be_used_are_refused():
    video, audio, text = tiny_specs()
    with pytest.raises(VocabularyError, match="video tokenizer's spec must have the keys"):
        Vocabulary.from_specs(audio, video, text, [(24, 40)])
    with pytest.raises(VocabularyError, match="text_vocab_size must be a positive integer, got 0"):
        tiny_vocabulary(text={"num_pieces": 0})


def test_importing_the_vocabulary_imports_no_torch():
    program = "import sys, poet.sequence, poet.bundle; print('torch' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    printed = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    ).stdout
    assert printed.strip() == "False"
