"""Hard clips: the draws of both codec trainers are those of the runs that made the shipped codecs."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from poet.training.audio_tokenizer import AudioTokenizerRecipe, AudioTokenizerTraining
from poet.training.hard_clips import HardClips
from poet.training.video_tokenizer import VideoTokenizerRecipe, VideoTokenizerTraining
from poet_tokenizers.audio import EncodecConfig
from poet_tokenizers.magvit2.config import MagViT2Config

# Written down by running the trainers of commit c44f579, where each had a choice of its own.
VIDEO_NUMBERS = [
    [0, 1, 2, 3, 4, 5],
    [2, 3, 2, 3, 4, 5],
    [1, 4, 4, 6, 0, 1],
    [0, 2, 6, 2, 3, 4],
    [6, 3, 0, 5, 6, 0],
    [1, 6, 6, 1, 2, 3],
    [3, 5, 2, 4, 5, 6],
    [5, 5, 3, 0, 1, 2],
]
AUDIO_NUMBERS = [
    [0, 1, 2, 3, 4, 5, 6],
    [4, 5, 6, 7, 2, 3, 4],
    [8, 9, 10, 11, 5, 1, 5],
    [12, 0, 1, 2, 4, 1, 7],
    [3, 4, 5, 6, 10, 11, 8],
    [7, 8, 9, 10, 9, 2, 11],
    [11, 12, 0, 1, 6, 4, 12],
    [2, 3, 4, 5, 12, 6, 11],
]
AUDIO_DRAWS_AFTERWARDS = [0.774204, 0.701458, 0.390672, 0.659134, 0.779695, 0.623462, 0.817284, 0.558002]


class Black:
    """Eleven clips of nothing."""

    def __len__(self) -> int:
        return 11

    def frames(self, index: int) -> NDArray[np.uint8]:
        return np.zeros((5, 16, 24, 3), np.uint8)


def video_training(hard_share: float = 0.5) -> VideoTokenizerTraining:
    codec = MagViT2Config(
        channels=4,
        channel_multipliers=(1, 2),
        temporal_downsampling=(True,),
        num_res_blocks=1,
        patch_size=(2, 4, 4),
        num_bits=6,
        entropy_group_bits=3,
    )
    recipe = VideoTokenizerRecipe(
        codec=codec,
        source_clips=7,
        validation_clips=1,
        batch_size=6,
        hard_share=hard_share,
        adversarial_weight=0.0,
        seed=3,
    )
    return VideoTokenizerTraining(recipe, [Black()], [Black()])


def audio_training(hard_share: float = 0.4) -> AudioTokenizerTraining:
    codec = EncodecConfig(
        sample_rate=1600,
        ratios=(2, 5, 5),
        num_filters=4,
        latent_size=7,
        num_lstm_layers=0,
        num_codebooks=1,
        codebook_size=13,
    )
    recipe = AudioTokenizerRecipe(
        codec=codec,
        source="any",
        validation_source="any",
        source_clips=13,
        batch_size=7,
        num_samples=550,
        hard_share=hard_share,
        level_shares=(1.0,),
        seed=5,
    )
    return AudioTokenizerTraining(recipe, lambda source, index: np.zeros(550, np.float32))


def wear(clips: HardClips, numbers: list[int], step: int) -> None:
    """Losses as if the clips had been seen; the same on every machine."""
    clips.remember(numbers, torch.tensor([(7 * number + 3 * step) % 11 / 11 + 0.01 for number in numbers]))


def test_the_video_trainer_draws_the_clips_that_it_always_drew() -> None:
    training = video_training()
    drawn = []
    for step in range(len(VIDEO_NUMBERS)):
        drawn.append(training._hard(step) + training.hard_clips.in_turn(step))
        wear(training.hard_clips, drawn[-1], step)
    assert drawn == VIDEO_NUMBERS


def test_the_audio_trainer_draws_the_clips_that_it_always_drew_and_what_comes_after_them() -> None:
    training = audio_training()
    drawn, afterwards = [], []
    for step in range(len(AUDIO_NUMBERS)):
        with training._draws(step) as rng:
            drawn.append(training._choose(step, rng))
            afterwards.append(round(float(rng.random()), 6))
        wear(training.hard_clips, drawn[-1], step)
    assert drawn == AUDIO_NUMBERS
    assert afterwards == AUDIO_DRAWS_AFTERWARDS


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_losses_of_an_older_video_checkpoint_are_taken_as_they_are(dtype: torch.dtype) -> None:
    """Before the class, the video trainer kept its losses in single precision."""
    old, new = video_training(), video_training()
    state = copy.deepcopy(old.state_dict())
    state["losses"] = torch.tensor([0.1, 0.0, 0.7, 0.3, 0.0, 0.2, 0.9], dtype=dtype)
    new.load_state_dict(state)
    assert torch.equal(new.hard_clips.losses, state["losses"].double())


def test_losses_stand_in_a_checkpoint_under_the_name_they_always_had_and_only_if_wanted() -> None:
    assert "losses" in video_training().state_dict()
    assert "errors" in audio_training().state_dict()
    assert "losses" not in video_training(hard_share=0).state_dict()
    assert "errors" not in audio_training(hard_share=0).state_dict()


def test_nothing_is_hard_before_anything_was_seen() -> None:
    clips = HardClips(11, 6, 0.5)
    assert clips.hard(0, np.random.default_rng(0)) == []
    assert clips.hard(1, np.random.default_rng(0)) == []
    assert (clips.in_turn(0), clips.in_turn(5)) == ([0, 1, 2, 3, 4, 5], [4, 5, 6])
