"""Training the upsampler: it learns, can be stopped, and takes no shards of other clips or another vocabulary."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from poet.bundle import Bundle
from poet.data.shards import EncodedClip, ShardWriter
from poet.errors import CheckpointError, ConfigError
from poet.model.superresolution import UNKNOWN
from poet.model.weights import load_upsampler
from poet.testing import tiny_bundle, tiny_geometry
from poet.training.loop import LoopConfig, fit
from poet.training.recipes import train
from poet.training.upsampler import UpsamplerRecipe, UpsamplerSize, UpsamplerTraining

CLIPS = 9
SIZES = UpsamplerSize(hidden_size=32, ffn_hidden_size=48, num_layers=3, num_heads=2, windows=((1, 4, 10), (3, 2, 2)))


@dataclasses.dataclass(frozen=True)
class Ground:
    """What every test stands on: larger codes that follow from the smaller ones."""

    bundle: Path
    low: Path
    high: Path

    def recipe(self, **changes: Any) -> UpsamplerRecipe:
        values: dict[str, Any] = {
            "bundle": self.bundle,
            "low_shards": self.low,
            "high_shards": self.high,
            "validation_low_shards": self.low,
            "validation_high_shards": self.high,
            "model": SIZES,
            "num_steps": 60,
            "batch_size": 4,
            "learning_rate": 1e-2,
            "warmup_steps": 5,
            "ema_decay": 0.5,
            "validation_clips": 6,
            "precision": "fp32",
            "export_dtype": "float32",
        }
        return UpsamplerRecipe(**values | changes)


def write(
    bundle: Bundle, directory: Path, scale: int, *, prefix: str = "clip", count: int = CLIPS, growing: bool = False
) -> Path:
    clips = []
    for number in range(count):
        geometry = tiny_geometry(bundle.vocabulary, num_latent_frames=2 + growing * number)
        low = np.random.default_rng(number).integers(0, bundle.vocabulary.video_codebook_size, geometry.latent_shape)
        codes = low.repeat(scale, 1).repeat(scale, 2).astype(np.int32)
        height, width = geometry.resolution
        clips.append(
            EncodedClip(
                key=f"{prefix}-{number}",
                text="a red star " + "rises " * (number % 3) if number % 4 else None,
                video_codes=codes,
                audio_codes=None,
                fps=geometry.fps,
                resolution=(scale * height, scale * width),
            )
        )
    fingerprint = bundle.vocabulary.fingerprint
    with ShardWriter(directory, fingerprint=fingerprint, source=directory.name, source_length=count) as writer:
        writer.write(clips, count)
    return directory


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Ground:
    directory = tmp_path_factory.mktemp("ground")
    bundle = tiny_bundle(directory / "bundle")
    return Ground(directory / "bundle", write(bundle, directory / "low", 1), write(bundle, directory / "high", 2))


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_it_learns_what_the_smaller_codes_say(ground: Ground, optimizer: str) -> None:
    training = UpsamplerTraining(ground.recipe(optimizer=optimizer, noise=0.0, low_dropout=0.0))
    before = training.validate(0)
    for step in range(60):
        metrics = training.train_step(step)
    after = training.validate(60)
    assert after["loss"] < 0.5 * before["loss"]
    assert after["accuracy"] > 0.5 > before["accuracy"]
    assert metrics["epoch"] == pytest.approx(59 * 4 / CLIPS)


def test_conditions_are_left_out_and_spoilt_in_their_shares(ground: Ground) -> None:
    training = UpsamplerTraining(ground.recipe(text_dropout=0.3, low_dropout=0.2, noise=0.5))
    rows, without_low, with_text, wrong = 0, 0, 0, []
    for step in range(100):
        example = training._draw(step)
        assert bool(example.hidden.flatten(1).any(1).all())
        for row in range(4):
            low, level = example.low[row], float(example.noise_level[row])
            if bool((low == UNKNOWN).all()):
                without_low += 1
                assert level == 0
                continue
            assert not bool((low == UNKNOWN).any())
            truth = example.high[row][:, ::2, ::2]
            wrong.append((float((low != truth).float().mean()), level))
        with_text += int((example.text_lengths > 0).sum())
        rows += 4
    assert without_low / rows == pytest.approx(0.2, abs=0.07)
    # Two clips of three have a caption to begin with.
    assert with_text / rows == pytest.approx(0.7 * 2 / 3, abs=0.08)
    shares, levels = np.array(wrong).T
    assert (levels == 0).mean() == pytest.approx(0.5, abs=0.1)
    assert (shares[levels == 0] == 0).all()
    assert 0 < levels.max() <= 0.5
    assert np.corrcoef(shares, levels)[0, 1] > 0.9


def test_a_run_that_was_stopped_goes_on_to_the_last_digit(ground: Ground, tmp_path: Path) -> None:
    def run(directory: Path, *stops: int) -> Path:
        for stop in stops:
            training = UpsamplerTraining(ground.recipe(num_steps=8))
            loop = LoopConfig(num_steps=8, log_every=1, validate_every=4, checkpoint_seconds=0)

            def interrupt(progress: Any, *_: Any, stop: int = stop) -> None:
                if stop < 8 and getattr(progress, "step", progress) >= stop:
                    raise KeyboardInterrupt

            try:
                fit(training, loop, directory, progress=interrupt)
            except KeyboardInterrupt:
                continue
        return directory

    whole, broken = run(tmp_path / "whole", 8), run(tmp_path / "broken", 3, 6, 8)
    assert (whole / "metrics.jsonl").read_text() == (broken / "metrics.jsonl").read_text()
    checksum = str(Bundle.open(ground.bundle).vocabulary.tokenizers["video"]["checksum"])
    one, other = (load_upsampler(path / "export", checksum).state_dict() for path in (whole, broken))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_recipe_file_trains_it(ground: Ground, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"train: upsampler\nbundle: {ground.bundle}\nlow_shards: {ground.low}\nhigh_shards: {ground.high}\n"
        f"validation_low_shards: {ground.low}\nvalidation_high_shards: {ground.high}\nnum_steps: 2\nbatch_size: 2\n"
        "model: {hidden_size: 16, ffn_hidden_size: 16, num_layers: 1, num_heads: 2, windows: [[2, 9, 9]]}\n"
    )
    result = train(recipe, [], tmp_path / "run")
    assert result.finished
    assert (tmp_path / "run" / "export" / "model.safetensors").is_file()


def test_shards_that_do_not_belong_together_are_refused(ground: Ground, tmp_path: Path) -> None:
    bundle = Bundle.open(ground.bundle)
    with pytest.raises(ConfigError, match="must be a whole multiple"):
        UpsamplerTraining(ground.recipe(high_shards=ground.low))
    fewer = write(bundle, tmp_path / "fewer", 2, count=3)
    with pytest.raises(ConfigError, match="same clips in two sizes, got 9 and 3"):
        UpsamplerTraining(ground.recipe(high_shards=fewer))
    others = write(bundle, tmp_path / "others", 2, prefix="film")
    training = UpsamplerTraining(ground.recipe(high_shards=others))
    with pytest.raises(ConfigError, match=r"is clip clip-\d in one size and film-\d in the other"):
        training.train_step(0)
    growing = [write(bundle, tmp_path / f"growing-{scale}", scale, growing=True) for scale in (1, 2)]
    training = UpsamplerTraining(ground.recipe(low_shards=growing[0], high_shards=growing[1]))
    with pytest.raises(ConfigError, match="all clips must be of one shape"):
        training.train_step(0)
    foreign = tiny_bundle(tmp_path / "foreign", seed=5)
    with pytest.raises(CheckpointError, match="vocabulary"):
        UpsamplerTraining(ground.recipe(bundle=foreign.path))


def test_recipes_that_cannot_be_trained_are_refused(ground: Ground) -> None:
    for changes, words in (
        ({"noise": 1.5}, "noise"),
        ({"num_steps": 0}, "num_steps"),
        ({"masks": {"level": 1.0}}, "level"),
        ({"masks": {}}, "masks"),
    ):
        with pytest.raises(ConfigError, match=words):
            ground.recipe(**changes)
