"""Tokenizers from directories: the right class by kind, and a message that names file and cure for everything else."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from poet_tokenizers import checkpoint
from poet_tokenizers.audio import EncodecConfig, EncodecTokenizer
from poet_tokenizers.errors import CheckpointError
from poet_tokenizers.loading import load_audio_tokenizer, load_text_tokenizer, load_video_tokenizer
from poet_tokenizers.text import SentencePieceTokenizer

LOADERS: dict[str, Callable[[Path], Any]] = {
    "video": load_video_tokenizer,
    "audio": load_audio_tokenizer,
    "text": load_text_tokenizer,
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with an audio and a text tokenizer in it."""
    directory = tmp_path_factory.mktemp("tokenizers")
    torch.manual_seed(0)
    EncodecTokenizer(EncodecConfig(ratios=(2, 5), num_filters=2, latent_size=7, codebook_size=13)).eval().save(
        directory / "audio"
    )
    SentencePieceTokenizer.train(["a red star falls", "a blue star rises"] * 9, 300).save(directory / "text")
    return directory


@pytest.fixture
def audio(saved: Path, tmp_path: Path) -> Path:
    """A copy of the audio tokenizer that a test may damage."""
    return Path(shutil.copytree(saved / "audio", tmp_path / "audio"))


def _edit(directory: Path, change: Callable[[dict[str, Any]], object]) -> None:
    file = directory / "config.json"
    description = json.loads(file.read_text())
    change(description)
    file.write_text(json.dumps(description))


def test_kind_picks_the_class(saved: Path) -> None:
    audio, text = load_audio_tokenizer(saved / "audio"), load_text_tokenizer(saved / "text")
    assert isinstance(audio, EncodecTokenizer)
    assert audio.spec.checksum == json.loads((saved / "audio" / "config.json").read_text())["spec"]["checksum"]
    assert isinstance(text, SentencePieceTokenizer)
    assert text.decode(text.encode("a star")) == "a star"


@pytest.mark.parametrize("name", LOADERS)
def test_a_missing_directory_is_named(name: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"nowhere/config\.json must describe a tokenizer, but there is no"):
        LOADERS[name](tmp_path / "nowhere")


@pytest.mark.parametrize(("name", "other"), [("video", "audio"), ("audio", "text"), ("text", "audio")])
def test_a_tokenizer_of_another_sort_is_refused(name: str, other: str, saved: Path) -> None:
    kind = "encodec" if other == "audio" else "sentencepiece"
    with pytest.raises(CheckpointError, match=rf'a {name} tokenizer must be of kind .*, this one is of kind "{kind}"'):
        LOADERS[name](saved / other)


def test_an_unknown_kind_is_refused(audio: Path) -> None:
    _edit(audio, lambda description: description.update(kind="mp3"))
    with pytest.raises(CheckpointError, match='of kind "mp3"'):
        load_audio_tokenizer(audio)
    with pytest.raises(CheckpointError, match='must be of kind "encodec", it is of kind "mp3"'):
        EncodecTokenizer.load(audio)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"kind": 3}', '{"kind": "encodec", "config": {}}', b"\xff"])
def test_a_damaged_description_is_refused(content: str | bytes, audio: Path) -> None:
    (audio / "config.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(CheckpointError, match=r"config\.json"):
        load_audio_tokenizer(audio)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda description: description["config"].pop("ratios"), "must have the keys"),
        (lambda description: description["config"].update(colour="red"), "must have the keys"),
        (lambda description: description["config"].update(latent_size=0), "latent_size must be an integer"),
        (lambda description: description["config"].update(latent_size=11), "must be of shape"),
        (lambda description: description["config"].update(num_codebooks=3), "unexpected: quantizer"),
        (lambda description: description["config"].update(sample_rate=8000), "sample_rate 16000 instead of 8000"),
        (lambda description: description["spec"].update(hop_length=99), "hop_length 99 instead of 10"),
        (lambda description: description["spec"].update(checksum="0" * 64), "checksum '0000"),
        (lambda description: description["spec"].pop("checksum"), "checksum None instead of"),
        (lambda description: description["spec"].update(mood="good"), "mood 'good' instead of None"),
    ],
)
def test_a_description_that_does_not_fit_the_weights_is_refused(
    change: Callable[[dict[str, Any]], object], complaint: str, audio: Path
) -> None:
    _edit(audio, change)
    with pytest.raises(CheckpointError, match=complaint):
        load_audio_tokenizer(audio)


def test_missing_weights_are_named(audio: Path) -> None:
    (audio / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors must hold the tokenizer's weights"):
        load_audio_tokenizer(audio)


def test_truncated_weights_are_refused(audio: Path) -> None:
    file = audio / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-13])
    with pytest.raises(CheckpointError, match="whole safetensors file"):
        load_audio_tokenizer(audio)


def test_one_changed_weight_is_noticed(audio: Path) -> None:
    tensors = load_file(audio / "model.safetensors")
    next(iter(tensors.values())).view(-1)[0] += 1e-3
    save_file(tensors, audio / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"checksum .* instead of"):
        load_audio_tokenizer(audio)


@pytest.mark.parametrize("damage", ["missing", "unexpected"])
def test_tensors_must_match_one_for_one(damage: str, audio: Path) -> None:
    tensors = load_file(audio / "model.safetensors")
    if damage == "missing":
        del tensors["decoder.model.0.conv.conv.bias"]
    else:
        tensors["decoder.model.0.conv.conv.extra"] = torch.zeros(7)
    save_file(tensors, audio / "model.safetensors")
    with pytest.raises(CheckpointError, match=rf"{damage}: decoder\.model\.0\.conv\.conv\.(bias|extra)"):
        load_audio_tokenizer(audio)


def test_a_missing_text_model_is_named(saved: Path, tmp_path: Path) -> None:
    text = Path(shutil.copytree(saved / "text", tmp_path / "text"))
    (text / "model.model").unlink()
    with pytest.raises(CheckpointError, match=r"model\.model must hold the sentencepiece model"):
        load_text_tokenizer(text)


def test_checksum_knows_names_types_and_shapes_but_not_order_or_layout() -> None:
    a, b = torch.arange(6.0).reshape(2, 3), torch.ones(5)
    checksum = checkpoint.weights_checksum({"a": a, "b": b})
    assert checkpoint.weights_checksum({"b": b, "a": a.T.contiguous().T}) == checksum
    changed = [
        {"a": a, "c": b},
        {"a": a.reshape(3, 2), "b": b},
        {"a": a, "b": b.to(torch.int32)},
        {"a": a, "b": b, "c": b},
        {"a": a},
    ]
    assert len({checksum, *map(checkpoint.weights_checksum, changed)}) == 6
    assert checkpoint.weights_checksum({"scalar": torch.tensor(3.0), "none": torch.zeros(0)})
