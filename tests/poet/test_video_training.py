"""Training the video tokenizer: it overfits one clip, can be killed, and sees the clips that it should."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from poet.cli.main import main
from poet.errors import ConfigError
from poet.media import Clip, write_clip
from poet.training.loop import LoopConfig, fit
from poet.training.recipes import train
from poet.training.video_tokenizer import VideoTokenizerRecipe, VideoTokenizerTraining, code_use, to_video
from poet_tokenizers.loading import load_video_tokenizer
from poet_tokenizers.magvit2.config import MagViT2Config
from poet_tokenizers.magvit2.losses import psnr
from poet_tokenizers.magvit2.model import MagViT2

N, H, W = 5, 16, 24
TINY = MagViT2Config(
    channels=4,
    channel_multipliers=(1, 2),
    temporal_downsampling=(True,),
    num_res_blocks=1,
    patch_size=(2, 4, 4),
    factorised=True,
    num_bits=6,
    entropy_group_bits=3,
)
RECIPE = VideoTokenizerRecipe(
    codec=TINY,
    source_clips=7,
    validation_clips=3,
    num_steps=8,
    batch_size=2,
    warmup_steps=3,
    adversarial_weight=0.1,
    adversarial_start=2,
    discriminator_channels=3,
    entropy_boost_steps=5,
)
LOOP = LoopConfig(num_steps=8, log_every=3, validate_every=4, checkpoint_seconds=0)


class Noise:
    """Clip i is noise of seed i. Remembers what was asked for."""

    def __init__(self, count: int = 11, shape: tuple[int, int, int] = (N, H, W)) -> None:
        self.count, self.shape = count, shape
        self.asked: list[int] = []

    def __len__(self) -> int:
        return self.count

    def frames(self, index: int) -> NDArray[np.uint8]:
        self.asked.append(index)
        return np.random.default_rng(index).integers(0, 256, (*self.shape, 3), dtype=np.uint8)


def _training(**changes: Any) -> VideoTokenizerTraining:
    return VideoTokenizerTraining(dataclasses.replace(RECIPE, **changes), [Noise()], [Noise()])


def _weights(training: VideoTokenizerTraining) -> dict[str, Tensor]:
    parts = {"model": training.model, "average": training.average.module, "discriminator": training.discriminator}
    return {
        f"{part}.{name}": weight.detach().clone()
        for part, module in parts.items()
        if module is not None
        for name, weight in module.named_parameters()
    }


def _same(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> bool:
    assert left.keys() == right.keys()
    return all(torch.equal(left[name], right[name]) for name in left)


class MovingDisc:
    """A red disc that crosses a blue field: one clip of 9 x 24 x 40."""

    def __len__(self) -> int:
        return 1

    def frames(self, index: int) -> NDArray[np.uint8]:
        frames = np.full((9, 24, 40, 3), (30, 20, 90), np.uint8)
        y, x = np.mgrid[:24, :40]
        for frame in range(9):
            frames[frame, (y - 12) ** 2 + (x - 8 - 3 * frame) ** 2 < 36] = (230, 60, 40)
        return frames


def test_a_tiny_codec_overfits_one_clip_through_its_codes() -> None:
    """16.4 dB is what the best single colour reaches, and untrained weights miss even that by 8 dB."""
    codec = dataclasses.replace(
        TINY,
        channels=32,
        patch_size=(4, 4, 4),
        temporal_downsampling=(False,),
        num_bits=12,
        entropy_group_bits=6,
    )
    recipe = VideoTokenizerRecipe(
        codec=codec,
        validation_clips=1,
        num_steps=320,
        batch_size=1,
        learning_rate=5e-3,
        warmup_steps=20,
        ema_decay=0.9,
        commitment_weight=0.02,
        sample_entropy_weight=0.0,
        entropy_boost=1.0,
        adversarial_weight=0.0,
        precision="fp32",
    )
    training = VideoTokenizerTraining(recipe, [MovingDisc()], [MovingDisc()])
    video = to_video(MovingDisc().frames(0)[None])
    one_colour = float(psnr(video.mean(dim=(2, 3, 4), keepdim=True).expand_as(video), video))
    assert training.validate(0)["psnr"] < 10 < one_colour < 17
    for step in range(recipe.num_steps):
        training.train_step(step)
    measured = training.validate(recipe.num_steps)
    assert measured["psnr"] > 26
    assert measured["codes_used"] > 20


def test_an_adversarial_run_trains_both_sides_and_stays_finite() -> None:
    training = _training()
    before = _weights(training)
    losses: list[float] = []
    for step in range(RECIPE.num_steps):
        metrics = training.train_step(step)
        assert ("discriminator_loss" in metrics) == (step >= RECIPE.adversarial_start)
        if "discriminator_loss" in metrics:
            losses.append(metrics["discriminator_loss"])
        elif step == RECIPE.adversarial_start - 1:
            assert _discriminator_moved(before, _weights(training)) == set()
    after = _weights(training)
    assert all(bool(weight.isfinite().all()) for weight in after.values())
    assert losses[-1] < losses[0]
    assert len(_discriminator_moved(before, after)) == len([name for name in after if "discriminator" in name])
    assert training.lecam.real != 0
    assert training.lecam.fake != 0


def _discriminator_moved(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> set[str]:
    return {name for name in before if "discriminator" in name and not torch.equal(before[name], after[name])}


def test_the_discriminator_reaches_the_codec_with_its_weight() -> None:
    runs = []
    for weight in (0.1, 1.0):
        training = _training(adversarial_weight=weight, adversarial_start=0)
        for step in range(2):
            training.train_step(step)
        runs.append({name: weight for name, weight in _weights(training).items() if name.startswith("model")})
    assert not _same(*runs)


def test_a_run_without_adversary_has_no_discriminator() -> None:
    training = _training(adversarial_weight=0.0)
    assert training.discriminator is None
    assert "discriminator_loss" not in training.train_step(5)
    assert "discriminator" not in training.state_dict()


@pytest.mark.parametrize(
    "changes", [{"precision": "bf16"}, {"precision": "fp32"}, {"hard_share": 0.5, "edge_share": 0.5}]
)
def test_a_killed_run_goes_on_to_the_last_digit(changes: dict[str, Any], tmp_path: Path) -> None:
    whole = _training(**changes)
    fit(whole, LOOP, tmp_path / "whole")

    def killed() -> None:
        training = _training(**changes)
        step = training.train_step
        training.train_step = lambda n: os.kill(os.getpid(), signal.SIGKILL) or {} if n == 5 else step(n)  # type: ignore[method-assign]
        fit(training, LOOP, tmp_path / "killed")

    process = multiprocessing.get_context("fork").Process(target=killed)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    resumed = _training(**changes)
    with torch.no_grad():
        resumed.model.encoder.output.weight.zero_()  # its own first weights must not matter
    result = fit(resumed, LOOP, tmp_path / "killed")
    assert result.finished
    assert isinstance(resumed.sources[1], Noise)
    if "hard_share" not in changes:
        assert resumed.sources[1].asked[:2] == [3, 4]  # step 5 begins with clip 10 of 7
    files = [(tmp_path / run / "metrics.jsonl").read_bytes() for run in ("whole", "killed")]
    assert files[0] == files[1]
    assert _same(_weights(whole), _weights(resumed))
    assert whole.lecam.state_dict() == resumed.lecam.state_dict()


def test_validation_does_not_disturb_training() -> None:
    plain, measured = _training(), _training()
    for step in range(4):
        plain.train_step(step)
        measured.train_step(step)
        assert measured.validate(step) == measured.validate(step)
    assert _same(_weights(plain), _weights(measured))
    assert plain.model.training
    assert measured.model.training


def test_clips_are_gone_through_in_turn_and_the_next_batch_is_drawn_ahead() -> None:
    training = _training()
    for step in range(4):
        training.train_step(step)
    training.ahead.close()
    source = training.sources[1]
    assert isinstance(source, Noise)
    assert source.asked == [0, 1, 2, 3, 4, 5, 6, 0, 1, 2]  # 7 of 11 clips, two a step, and one step ahead


def test_hard_clips_are_those_with_the_highest_losses_so_far() -> None:
    training = _training(hard_share=0.5, batch_size=4)
    seen = [index for step in range(3) for index in training.hard_clips.in_turn(step)]
    assert seen == [0, 1, 2, 3, 2, 3, 4, 5]  # nothing is known to be hard at step 0
    for step in range(2):
        training.train_step(step)
    assert (training.hard_clips.losses > 0).tolist() == [True] * 4 + [False] * 3
    training.hard_clips.losses[2] = 1e6
    indices, video = training._batch(2)
    assert indices == [2, 2, 4, 5]
    torch.testing.assert_close(video, to_video(np.stack([Noise().frames(index) for index in indices])))


def test_the_loss_is_made_of_its_parts_and_the_entropies_are_boosted_at_first() -> None:
    training = _training(adversarial_weight=0.0)
    for step, boost in ((0, 3.0), (2, 1 + 2 * 0.6), (5, 1.0), (7, 1.0)):
        metrics = training.train_step(step)
        entropy = 0.1 * metrics["sample_entropy"] - 0.1 * metrics["codebook_entropy"]
        expected = metrics["reconstruction_loss"] + 0.25 * metrics["commitment"] + boost * entropy
        assert metrics["loss"] == pytest.approx(expected, abs=1e-6)
    assert metrics["learning_rate"] < RECIPE.learning_rate


def test_the_export_is_the_averaged_tokenizer(tmp_path: Path) -> None:
    training = _training()
    for step in range(3):
        training.train_step(step)
    training.export(tmp_path)
    tokenizer = load_video_tokenizer(tmp_path)
    assert isinstance(tokenizer, MagViT2)
    for name, weight in tokenizer.named_parameters():
        assert torch.equal(weight, training.average.module.get_parameter(name)), name
    assert not torch.equal(tokenizer.encoder.output.weight, training.model.encoder.output.weight)
    assert len(tokenizer.spec.checksum) == 64


def test_a_decoder_that_trains_alone_leaves_the_codes_what_they_mean(tmp_path: Path) -> None:
    MagViT2(TINY).save(tmp_path / "start")
    training = _training(start_from=tmp_path / "start", decoder_only=True, weight_decay=0.1)
    for step in range(3):
        training.train_step(step)
    training.export(tmp_path / "export")
    before, after = MagViT2.load(tmp_path / "start"), MagViT2.load(tmp_path / "export")
    assert before.spec == after.spec
    assert not _same(dict(before.decoder.named_parameters()), dict(after.decoder.named_parameters()))
    with pytest.raises(ConfigError, match="decoder_only needs start_from"):
        _training(decoder_only=True)


@pytest.mark.parametrize("shape", [(N + 1, H, W), (N, H + 4, W), (N, H, W - 1)], ids=str)
def test_clips_that_the_strides_do_not_divide_are_refused(shape: tuple[int, int, int]) -> None:
    with pytest.raises(ConfigError, match=r"\(1 \+ k \* 4, height, width, 3\) with height and width divisible by 8"):
        VideoTokenizerTraining(RECIPE, [Noise(shape=shape)], [Noise(shape=shape)])


def test_clips_of_another_size_than_those_of_validation_are_refused() -> None:
    training = VideoTokenizerTraining(RECIPE, [Noise(shape=(N + 4, H, W))], [Noise()])
    with pytest.raises(ConfigError, match=r"like the first of the validation clips, \(5, 16, 24, 3\); got \(9, 16, 24"):
        training.train_step(0)


def test_steps_take_turns_between_sizes_and_each_is_measured_and_a_run_goes_on_exactly() -> None:
    def training() -> VideoTokenizerTraining:
        recipe = dataclasses.replace(
            RECIPE, batch_size=4, source_clips=40, scales=(1, 2), hard_share=0.5, adversarial_weight=0.0
        )
        sources = [Noise(count=40), Noise(count=40, shape=(N, 2 * H, 2 * W))]
        return VideoTokenizerTraining(recipe, sources, [Noise(), Noise(shape=(N, 2 * H, 2 * W))])

    whole = training()
    seen = []
    for step in range(4):
        indices, video = whole._batch(step)
        seen.append((len(indices), tuple(video.shape)))
        whole.train_step(step)
    assert seen[0] == seen[2] == (4, (4, 3, N, H, W))
    assert seen[1] == seen[3] == (2, (2, 3, N, 2 * H, 2 * W))
    measured = whole.validate(4)
    assert {"psnr", "psnr_worst_tenth", "psnr_x2", "psnr_worst_tenth_x2"} <= measured.keys()
    resumed, state = training(), training()
    for step in range(2):
        state.train_step(step)
    resumed.load_state_dict(state.state_dict())
    for step in (2, 3):
        resumed.train_step(step)
    assert _same(_weights(resumed), _weights(whole))


def test_every_clip_is_seen_in_every_size() -> None:
    """Also where the clips go evenly into the steps, so that every round meets the same steps."""
    recipe = dataclasses.replace(
        RECIPE, batch_size=4, source_clips=16, scales=(1, 2), hard_share=0.5, adversarial_weight=0.0
    )
    sources = [Noise(count=16), Noise(count=16, shape=(N, 2 * H, 2 * W))]
    training = VideoTokenizerTraining(recipe, sources, [Noise(), Noise(shape=(N, 2 * H, 2 * W))])
    seen: dict[int, set[int]] = {1: set(), 2: set()}
    for step in range(200):
        seen[training._scale(step)] |= set(training._in_turn(step))
    assert seen == {1: set(range(16)), 2: set(range(16))}


@pytest.mark.parametrize("scales", [(), (2,), (1, 1), (1, 0), (2, 1)], ids=str)
def test_scales_that_cannot_be_used_are_refused(scales: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match="scales must be different whole numbers"):
        dataclasses.replace(RECIPE, scales=scales)


def test_code_use_counts_codes_and_the_size_of_an_even_codebook() -> None:
    assert code_use(torch.tensor([[1, 1], [4, 4]]), 7) == pytest.approx({"codes_used": 2, "code_perplexity": 2})
    assert code_use(torch.arange(7), 7) == pytest.approx({"codes_used": 7, "code_perplexity": 7})
    uneven = code_use(torch.tensor([0, 0, 0, 1]), 7)
    assert uneven["code_perplexity"] == pytest.approx(np.exp(0.75 * np.log(4 / 3) + 0.25 * np.log(4)))


@pytest.mark.parametrize(
    "change",
    [
        {"batch_size": 0},
        {"num_steps": 0},
        {"l1_share": 1.1},
        {"hard_share": -0.1},
        {"hard_share": 0.9},
        {"learning_rate": 0.0},
        {"validation_clips": 0},
    ],
)
def test_a_recipe_that_cannot_be_trained_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="must"):
        dataclasses.replace(RECIPE, **change)


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    """A recipe over a folder of three drawn clips."""
    clips = tmp_path / "clips"
    clips.mkdir()
    rng = np.random.default_rng(0)
    for number in range(3):
        frames = rng.integers(0, 256, (17, 8, 8, 3), dtype=np.uint8).repeat(8, axis=1).repeat(8, axis=2)
        write_clip(Clip(frames, 8.0, None, 16_000), clips / f"{number}.mp4")
    file = tmp_path / "recipe.yaml"
    file.write_text(
        f"train: video_tokenizer\nsource: {clips}\nvalidation_source: {clips}\nnum_steps: 4\nbatch_size: 2\n"
        "learning_rate: 1e-3\nadversarial_weight: 0\nloop: {checkpoint_seconds: 0}\n"
        "codec: {channels: 4, channel_multipliers: [1, 2], temporal_downsampling: [false], num_res_blocks: 1,"
        " patch_size: [4, 8, 8], factorised: true, num_bits: 6, entropy_group_bits: 3}\n"
    )
    return file


def test_a_recipe_trains_on_a_folder_and_a_run_keeps_its_recipe(recipe_file: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    result = train(recipe_file, ["validation_clips=2"], run)
    assert (result.step, result.finished) == (4, True)
    assert load_video_tokenizer(run / "export").spec.temporal_stride == 4
    assert "validation_clips: 2" in (run / "recipe.yaml").read_text()
    with pytest.raises(ConfigError, match=r"another recipe: batch_size was 2, is 3; codec was .* is .*Name another"):
        train(recipe_file, ["validation_clips=2", "batch_size=3", "codec.channels=5"], run)
    assert "batch_size: 2" in (run / "recipe.yaml").read_text()
    assert train(recipe_file, ["validation_clips=2", "loop.log_every=3"], run).finished  # how it is logged may change


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train=nothing"], "'train' must be one of video_tokenizer, audio_tokenizer"),
        (["codec.depth=3"], r"unknown recipe key 'codec\.depth'"),
        (["loop.log=3"], r"'loop\.log'\. Did you mean 'log_every'"),
        (["source=nowhere"], "nowhere, which does not exist"),
    ],
)
def test_a_recipe_that_names_what_is_not_there_is_refused(
    recipe_file: Path, tmp_path: Path, overrides: list[str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        train(recipe_file, overrides, tmp_path / "run")


def test_an_interrupted_command_says_how_to_go_on(
    recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run, step = tmp_path / "run", VideoTokenizerTraining.train_step
    command = ["train", str(recipe_file), "-o", str(run), "--json"]

    def interrupted(self: VideoTokenizerTraining, number: int) -> dict[str, float]:
        if number == 1:
            os.kill(os.getpid(), signal.SIGINT)
        return step(self, number)

    with monkeypatch.context() as patch:
        patch.setattr(VideoTokenizerTraining, "train_step", interrupted)
        assert main(command) == 0
    said = capsys.readouterr()
    assert "stopped at step 2; the same command goes on from there" in said.err
    assert not json.loads(said.out)["finished"]
    assert main(command) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["step"], result["finished"]) == (4, True)
    assert main([*command, "--set", "learning_rate=2e-3"]) == 1
    assert "learning_rate was 0.001, is 0.002" in capsys.readouterr().err
