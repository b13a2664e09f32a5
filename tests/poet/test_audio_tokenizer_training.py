"""The training of the audio codec: it can learn, goes on exactly where it stopped, and each of its parts has a say."""

from __future__ import annotations

import copy
import dataclasses
import io
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from poet.errors import ConfigError, ShapeError
from poet.training.audio_tokenizer import AudioTokenizerRecipe, AudioTokenizerTraining, measure_reconstruction
from poet.training.config import build
from poet_tokenizers.audio import EncodecConfig, EncodecTokenizer
from poet_tokenizers.loading import load_audio_tokenizer

RATE, HOP = 1600, 50
TINY = EncodecConfig(
    sample_rate=RATE, ratios=(2, 5, 5), num_filters=4, latent_size=7, num_lstm_layers=0, num_codebooks=3,
    codebook_size=13,
)  # fmt: skip


def _sounds(source: str, index: int) -> NDArray[np.float32]:
    """A decaying tone of its own pitch for every index; every fifth is silent."""
    assert source in ("training", "validation")
    time = np.arange(17 * HOP + 3) / RATE
    tone = np.exp(-3 * time) * np.sin(2 * np.pi * (50 + 11 * (index % 7)) * time)
    return (0.0 if index % 5 == 4 else 0.8) * tone.astype(np.float32)


def _recipe(**changes: Any) -> AudioTokenizerRecipe:
    values: dict[str, Any] = {
        "codec": TINY,
        "source": "training",
        "validation_source": "validation",
        "source_clips": 11,
        "num_steps": 6,
        "batch_size": 2,
        "num_samples": 11 * HOP,
        "quantizer_start": 2,
        "quantizer_start_clips": 5,
        "level_shares": (1, 2, 3),
        "mel_windows": (64, 256),
        "validation_clips": 6,
    }
    return AudioTokenizerRecipe(**values | changes)


def test_one_clip_can_be_learnt_by_heart() -> None:
    """An untrained codec gives some -60 dB here, this training some 40; anything broken stays below zero."""
    codec = EncodecConfig(num_filters=8, latent_size=16, num_lstm_layers=0, num_codebooks=2, codebook_size=32)
    time = np.arange(8_000) / codec.sample_rate
    sound = (0.7 * np.sin(2 * np.pi * 330 * time) * (time % 0.25 < 0.2)).astype(np.float32)
    target = torch.from_numpy(sound)[None, None]
    recipe = _recipe(
        codec=codec, num_steps=150, batch_size=1, num_samples=8_000, quantizer_start=50, quantizer_start_clips=16,
        level_shares=(1, 1), mel_windows=(128, 512), learning_rate=4e-3, warmup_steps=20, time_weight=3.0,
    )  # fmt: skip
    training = AudioTokenizerTraining(recipe, lambda source, index: sound)
    training.model.eval()
    before = measure_reconstruction(training.model, target)
    for step in range(recipe.num_steps):
        training.train_step(step)
    average = training.average.module
    assert isinstance(average, EncodecTokenizer)
    after = measure_reconstruction(average, target)
    assert before["si_snr"] < -10
    assert after["si_snr"] > 20
    assert after["mel_distance"] < 0.5 * before["mel_distance"]


def test_a_resumed_run_is_the_uninterrupted_run() -> None:
    whole = AudioTokenizerTraining(_recipe(), _sounds)
    expected = [whole.train_step(step) for step in range(6)]
    first = AudioTokenizerTraining(_recipe(), _sounds)
    for step in range(4):
        assert first.train_step(step) == expected[step]
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second = AudioTokenizerTraining(_recipe(), _sounds)
    second.load_state_dict(torch.load(file, weights_only=True))
    torch.manual_seed(12345)  # the global generator has no say
    assert [second.train_step(step) for step in (4, 5)] == expected[4:]
    assert second.validate(6) == whole.validate(6)


def test_validation_changes_nothing_of_the_training() -> None:
    plain, measured = (AudioTokenizerTraining(_recipe(), _sounds) for _ in range(2))
    for step in range(4):
        measured.validate(step)
        assert plain.train_step(step) == measured.train_step(step)


def test_batches_count_through_the_clips_and_begin_again() -> None:
    asked: list[int] = []

    def sounds(source: str, index: int) -> NDArray[np.float32]:
        asked.append(index)
        return _sounds(source, index)

    training = AudioTokenizerTraining(_recipe(source_clips=5, quantizer_start=9), sounds)
    for step in (0, 1, 2, 3):
        training.train_step(step)
    assert sorted(asked) == [0, 1, 2, 3, 4]  # each is drawn once and kept


def test_hard_clips_come_again_more_often_than_easy_ones() -> None:
    training = AudioTokenizerTraining(_recipe(hard_share=0.5, batch_size=8, source_clips=50), _sounds)
    rng = np.random.default_rng(0)
    assert training._choose(0, rng) == list(range(8))  # nothing has been seen yet
    training.hard_clips.losses[:] = 1e-6
    training.hard_clips.losses[41] = 1.0
    assert training._choose(3, rng) == [12, 13, 14, 15, 41, 41, 41, 41]


def test_errors_are_remembered_by_clip_and_survive_a_checkpoint() -> None:
    training = AudioTokenizerTraining(_recipe(hard_share=0.5, batch_size=2), _sounds)
    training.train_step(0)
    assert (training.hard_clips.losses[:2] > 0).all()
    assert (training.hard_clips.losses[2:] == 0).all()
    other = AudioTokenizerTraining(_recipe(hard_share=0.5, batch_size=2), _sounds)
    other.load_state_dict(copy.deepcopy(training.state_dict()))
    assert other.train_step(1) == training.train_step(1)


def test_a_second_stage_starts_from_the_codec_it_names(tmp_path: Path) -> None:
    first = AudioTokenizerTraining(_recipe(), _sounds)
    for step in range(4):
        first.train_step(step)
    first.export(tmp_path)
    recipe = _recipe(start_from=tmp_path, quantizer_start=0)
    second = AudioTokenizerTraining(recipe, _sounds)
    for name, tensor in EncodecTokenizer.load(tmp_path).final_tensors().items():
        assert torch.equal(second.model.state_dict()[name], tensor), name
    assert second.train_step(0)["levels"] > 0
    with pytest.raises(ConfigError, match="start_from"):
        AudioTokenizerTraining(_recipe(start_from=tmp_path, codec=EncodecConfig(), num_samples=16_000,
                                       level_shares=(1, 1, 1, 1)), _sounds)  # fmt: skip


def test_a_decoder_that_trains_alone_leaves_the_codes_what_they_mean(tmp_path: Path) -> None:
    first = AudioTokenizerTraining(_recipe(), _sounds)
    for step in range(4):
        first.train_step(step)
    first.export(tmp_path / "start")
    recipe = _recipe(start_from=tmp_path / "start", quantizer_start=0, decoder_only=True, dead_code_threshold=0.9)
    training = AudioTokenizerTraining(recipe, _sounds)
    for step in range(11):  # revival of dead codes would come at step 10
        training.train_step(step)
    training.export(tmp_path / "export")
    before, after = (EncodecTokenizer.load(tmp_path / name) for name in ("start", "export"))
    assert before.spec == after.spec
    waveform = torch.from_numpy(_sounds("training", 0))[None, None]
    assert not torch.equal(before.decode(before.encode(waveform)), after.decode(after.encode(waveform)))
    with pytest.raises(ConfigError, match="decoder_only must come with start_from"):
        _recipe(decoder_only=True)


def test_a_decoder_of_another_shape_learns_the_codes_of_a_finished_codec(tmp_path: Path) -> None:
    first = AudioTokenizerTraining(_recipe(), _sounds)
    for step in range(4):
        first.train_step(step)
    first.export(tmp_path / "start")
    codec = dataclasses.replace(first.recipe.codec, decoder_num_filters=7, decoder_residual_layers=1)
    recipe = _recipe(
        start_from=tmp_path / "start", quantizer_start=0, decoder_only=True, codec=codec, num_steps=40,
        hard_share=0.25, hard_measure="mel",
    )  # fmt: skip
    training = AudioTokenizerTraining(recipe, _sounds)
    losses = [training.train_step(step)["mel_loss"] for step in range(40)]
    assert np.mean(losses[-8:]) < 0.8 * np.mean(losses[:8])
    training.export(tmp_path / "export")
    before, after = (EncodecTokenizer.load(tmp_path / name) for name in ("start", "export"))
    assert before.spec == after.spec
    assert after.config == codec
    waveform = torch.from_numpy(_sounds("training", 0))[None, None]
    assert torch.equal(before.encode(waveform), after.encode(waveform))
    other = dataclasses.replace(codec, latent_size=3)
    with pytest.raises(ConfigError, match="start_from"):
        AudioTokenizerTraining(dataclasses.replace(recipe, codec=other), _sounds)
    with pytest.raises(ConfigError, match="hard_measure"):
        _recipe(hard_measure="ear")


def test_quantisation_begins_at_its_step_with_levels_in_their_shares() -> None:
    training = AudioTokenizerTraining(_recipe(level_shares=(0, 1, 1)), _sounds)
    levels = [training.train_step(step)["levels"] for step in range(6)]
    assert levels[:2] == [0, 0]
    assert set(levels[2:]) <= {2.0, 3.0}
    assert training.validate(2).keys() == {"unquantised_mel_distance"}
    metrics = training.validate(6)
    assert {"mel_distance_1", "si_snr_2", "silence_peak_3", "codes_used_3", "perplexity_1"} <= metrics.keys()
    assert all(math.isfinite(value) for value in metrics.values())


def test_the_discriminator_joins_at_its_step() -> None:
    recipe = _recipe(adversarial_weight=0.5, adversarial_start=1, num_samples=48 * HOP, discriminator_filters=2)
    training = AudioTokenizerTraining(recipe, _sounds)
    assert training.discriminator is not None
    before = [weight.clone() for weight in training.discriminator.parameters()]
    metrics = [training.train_step(step) for step in range(4)]
    assert "adversarial_loss" not in metrics[0]
    assert all(math.isfinite(row["adversarial_loss"]) and row["features_loss"] > 0 for row in metrics[1:])
    assert any("discriminator_loss" in row for row in metrics)
    after = list(training.discriminator.parameters())
    assert any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))
    other = AudioTokenizerTraining(recipe, _sounds)
    other.load_state_dict(copy.deepcopy(training.state_dict()))  # an optimiser would share what it is given
    assert other.train_step(4) == training.train_step(4)


@pytest.mark.parametrize(("kept", "levels"), [(0, 3), (2, 2)])
def test_export_writes_the_averaged_codec_with_the_levels_that_are_kept(kept: int, levels: int, tmp_path: Path) -> None:
    training = AudioTokenizerTraining(_recipe(exported_levels=kept), _sounds)
    for step in range(3):
        training.train_step(step)
    training.export(tmp_path)
    exported = load_audio_tokenizer(tmp_path)
    average = training.average.module
    assert isinstance(average, EncodecTokenizer)
    waveform = torch.from_numpy(_sounds("training", 0))[None, None]
    assert exported.spec.num_codebooks == levels
    assert torch.equal(exported.encode(waveform), average.encode(waveform)[:, :levels])
    assert not average.training


def test_bf16_learns_too() -> None:
    metrics = AudioTokenizerTraining(_recipe(precision="bf16"), _sounds).train_step(0)
    assert math.isfinite(metrics["mel_loss"])


def test_a_sound_must_be_a_row_of_samples() -> None:
    training = AudioTokenizerTraining(_recipe(), lambda source, index: np.zeros((2, 850), np.float32))
    with pytest.raises(ShapeError, match=r"\(S,\)"):
        training.train_step(0)


def test_measuring_tells_silence_from_sound() -> None:
    torch.manual_seed(0)
    codec = EncodecTokenizer(TINY).eval()
    tone = torch.from_numpy(_sounds("training", 0)[: 17 * HOP])[None, None]
    assert "silence_peak" not in measure_reconstruction(codec, tone)
    measured = measure_reconstruction(codec, torch.zeros_like(tone))
    assert "si_snr" not in measured
    assert measured["silence_peak"] > -60
    assert 1 <= measured["codes_used"] <= 13
    assert 1 <= measured["perplexity"] <= 13.001


@pytest.mark.parametrize(
    "wrong",
    [
        {"num_steps": 0},
        {"num_samples": 11 * HOP + 1},
        {"level_shares": (1, 1)},
        {"level_shares": (0, 0, 0)},
        {"learning_rate": 0.0},
        {"start_share": 1.5},
        {"hard_share": -0.1},
        {"mel_bands": 0},
        {"quantizer_start": -1},
        {"mel_windows": ()},
        {"adversarial_weight": -1.0},
        {"exported_levels": 4},
        {"ema_decay": 1.0},
        {"precision": "fp16"},
    ],
)
def test_a_wrong_recipe_is_refused_by_the_name_of_its_key(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        _recipe(**wrong)


def test_the_shipped_recipe_can_be_read() -> None:
    from poet.training.config import read_recipe

    values = read_recipe(Path(__file__).parents[2] / "recipes" / "nano" / "audio_tokenizer.yaml")
    assert values.pop("train") == "audio_tokenizer"
    values.pop("loop", None)
    recipe = build(AudioTokenizerRecipe, values)
    assert recipe.codec.hop_length == 500
    assert recipe.exported_levels == 2
