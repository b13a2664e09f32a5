"""Clips become scenes of drawn tasks; scenes become rows of one length. Shares are held to binomial bounds."""

import collections
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from poet.data.packing import MODALITIES, SceneSampler, join_scenes, modalities, pack_rows
from poet.data.shards import EncodedClip
from poet.errors import ConfigError, ShapeError
from poet.model.attention import SceneLayout
from poet.sequence import Scene, unpack
from poet.tasks import TASKS
from poet.testing import tiny_geometry, tiny_vocabulary
from poet_tokenizers.base import TextSpec

VOCABULARY = tiny_vocabulary()
T, A = 5, 68
TRAINABLE = sorted(task.name for task in TASKS.values() if task.edit is None)


class WordTokenizer:
    """One piece a word."""

    spec = TextSpec(kind="words", num_pieces=43)

    def encode(self, text: str) -> list[int]:
        return [sum(map(ord, word)) % 43 for word in text.split()]

    def decode(self, codes: list[int]) -> str:
        raise AssertionError("packing never decodes")


def clip_of(
    index: int = 0, *, text: str | None = "a red star", video: bool = True, audio: bool = True, frames: int = T
) -> EncodedClip:
    rng = np.random.default_rng(index)
    geometry = tiny_geometry(VOCABULARY, num_latent_frames=frames)
    latents = geometry.num_audio_latents(geometry.num_frames)
    return EncodedClip(
        key=f"clip-{index}",
        text=text,
        video_codes=rng.integers(0, 31, geometry.latent_shape, dtype=np.int32) if video else None,
        audio_codes=rng.integers(0, 13, (3, latents), dtype=np.int32) if audio else None,
        fps=8.0 if video else None,
        resolution=geometry.resolution if video else None,
    )


def sampler(*tasks: str, **options: float) -> SceneSampler:
    return SceneSampler(VOCABULARY, WordTokenizer(), dict.fromkeys(tasks, 1.0), **options)  # type: ignore[arg-type]


def scenes(made: SceneSampler, clip: EncodedClip, count: int) -> list[Scene]:
    return [unpack(made.scene(clip, 0, index).ids, VOCABULARY) for index in range(count)]


def assert_share(found: int, of: int, share: float) -> None:
    """Within five standard deviations: a false alarm about once in a million runs."""
    assert abs(found - of * share) <= 5 * math.sqrt(of * share * (1 - share)), (found, of, share)


@pytest.mark.parametrize("task", TRAINABLE)
def test_every_task_gives_a_scene_whose_parts_are_the_clips(task: str) -> None:
    clip = clip_of(3)
    row = TASKS[task]
    for scene in scenes(sampler(task, text_dropout=0), clip, 20):
        assert scene.outputs == row.outputs
        assert row.accepts(scene.inputs)
        parts = [codes for codes in (scene.video_in, scene.video_out) if codes is not None]
        if row.extends_video:
            np.testing.assert_array_equal(np.concatenate(parts), clip.video_codes)
        elif row.outputs == "image":
            np.testing.assert_array_equal(parts[0], clip.video_codes[:1])  # type: ignore[index]
        else:
            for codes in parts:
                np.testing.assert_array_equal(codes, clip.video_codes)
        if scene.text_out is not None:
            assert list(scene.text_out) == WordTokenizer().encode("a red star")
        if scene.text is not None:
            assert list(scene.text) == WordTokenizer().encode("a red star")
        if row.writes_video:
            assert scene.resolution == clip.resolution


def test_a_continuation_writes_only_the_sound_of_its_new_frames() -> None:
    clip = clip_of(5)
    geometry = tiny_geometry(VOCABULARY)
    assert clip.audio_codes is not None
    given_frames = set()
    for scene in scenes(sampler("video_continuation"), clip, 60):
        assert scene.video_in is not None
        assert scene.audio_out is not None
        given_frames.add(len(scene.video_in))
        old = geometry.num_audio_latents(geometry.num_video_frames(len(scene.video_in)))
        np.testing.assert_array_equal(scene.audio_out, clip.audio_codes[:, old:])
    assert given_frames == set(range(1, T))


def test_an_image_in_motion_keeps_the_sound_of_the_whole_clip() -> None:
    clip = clip_of(7)
    for scene in scenes(sampler("image_to_video"), clip, 5):
        np.testing.assert_array_equal(scene.video_in, clip.video_codes[:1])  # type: ignore[index]
        np.testing.assert_array_equal(scene.audio_out, clip.audio_codes)


def test_a_scene_is_a_function_of_seed_epoch_and_row_alone() -> None:
    one, other = sampler(*TRAINABLE, seed=5), sampler(*reversed(TRAINABLE), seed=5)
    clip = clip_of(2)
    places = [(epoch, row) for epoch in range(3) for row in range(17)]
    forwards = [one.scene(clip, *place).ids.tolist() for place in places]
    backwards = [other.scene(clip, *place).ids.tolist() for place in reversed(places)]
    assert forwards == backwards[::-1]
    assert len({tuple(ids) for ids in forwards}) > len(TRAINABLE)
    assert forwards != [sampler(*TRAINABLE, seed=6).scene(clip, *place).ids.tolist() for place in places]


def test_tasks_come_in_the_shares_of_their_weights() -> None:
    weights = {"text_to_video_audio": 5.0, "text_to_image": 2.0, "captioning": 3.0}
    made = SceneSampler(VOCABULARY, WordTokenizer(), weights)
    clip, count = clip_of(), 1500
    found = collections.Counter(scene.task for scene in scenes(made, clip, count))
    assert set(found) == set(weights)
    for task, weight in weights.items():
        assert_share(found[task], count, weight / 10)


def test_a_clip_without_some_parts_is_given_the_other_tasks_in_proportion() -> None:
    weights = {"text_to_video_audio": 50.0, "text_to_video": 3.0, "video_to_audio": 40.0, "text_to_image": 1.0}
    made = SceneSampler(VOCABULARY, WordTokenizer(), weights)
    found = collections.Counter(scene.task for scene in scenes(made, clip_of(audio=False), 1000))
    assert set(found) == {"text_to_video", "text_to_image"}
    assert_share(found["text_to_video"], 1000, 0.75)


def test_an_audio_only_clip_can_be_sound_from_a_text() -> None:
    clip = clip_of(video=False)
    for scene in scenes(sampler("text_to_audio", "text_to_video_audio"), clip, 7):
        assert scene.task == "text_to_audio"
        assert scene.resolution is None
        np.testing.assert_array_equal(scene.audio_out, clip.audio_codes)


def test_a_single_frame_is_never_continued() -> None:
    made = sampler("image_to_video", "video_continuation", "text_to_image")
    assert {scene.task for scene in scenes(made, clip_of(frames=1), 50)} == {"text_to_image"}


def test_a_clip_that_fits_no_task_is_named() -> None:
    with pytest.raises(ConfigError, match="clip-0") as raised:
        sampler("text_to_video", "captioning").scene(clip_of(text=None), 0, 0)
    assert "captioning" in str(raised.value)


def test_text_is_dropped_in_its_share_and_keeps_the_length() -> None:
    made = sampler("text_to_image", text_dropout=0.1)
    count = 2000
    packed = [made.scene(clip_of(), 0, index) for index in range(count)]
    null = VOCABULARY.special("<null>")
    assert_share(sum(null in scene.ids for scene in packed), count, 0.1)
    assert len({len(scene.ids) for scene in packed}) == 1


def test_a_caption_to_be_written_is_never_dropped() -> None:
    for scene in scenes(sampler("captioning", text_dropout=1.0), clip_of(), 20):
        assert scene.text_out is not None
        assert list(scene.text_out) == WordTokenizer().encode("a red star")


def test_optional_inputs_are_given_in_their_share_independently() -> None:
    made = sampler("audio_video_continuation", "captioning", optional_share=0.3)
    found = scenes(made, clip_of(), 1500)
    continued = [scene for scene in found if scene.task == "audio_video_continuation"]
    assert_share(sum("text" in scene.inputs for scene in continued), len(continued), 0.3)
    assert all("audio" in scene.inputs for scene in continued)
    captioned = [scene for scene in found if scene.task == "captioning"]
    assert_share(sum("audio" in scene.inputs for scene in captioned), len(captioned), 0.3)


def test_the_share_of_parallel_scenes_is_marked() -> None:
    found = scenes(sampler("text_to_image", parallel_share=0.4), clip_of(), 1000)
    assert_share(sum(scene.parallel for scene in found), len(found), 0.4)


def test_targets_of_a_parallel_scene_are_some_of_its_codes() -> None:
    made = sampler("text_to_video_audio", parallel_share=1.0)
    shares = []
    for index in range(200):
        packed = made.scene(clip_of(index), 0, index)
        kinds = modalities(packed.ids, VOCABULARY)
        output = np.arange(len(packed.ids)) >= packed.prefix_len
        assert set(kinds[packed.loss_mask].tolist()) <= {2, 3}  # no mark is ever hidden: it is known beforehand
        assert not packed.loss_mask[~output].any()
        shares.append(packed.loss_mask.sum() / (output & (kinds >= 2)).sum())
    assert 0.4 < np.mean(shares) < 0.8
    assert np.min(shares) < 0.1
    assert np.max(shares) == 1.0


def test_texts_are_never_written_in_parallel() -> None:
    assert not any(scene.parallel for scene in scenes(sampler("captioning", parallel_share=1.0), clip_of(), 20))


def test_causal_scenes_are_the_same_beside_parallel_ones() -> None:
    alone, mixed = (sampler("text_to_video", "text_to_audio", parallel_share=share) for share in (0.0, 0.5))
    kept = 0
    for index in range(60):
        one, other = (made.scene(clip_of(index), 0, index) for made in (alone, mixed))
        if not unpack(other.ids, VOCABULARY).parallel:
            kept += 1
            assert all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))
    assert 15 < kept < 45
    assert "masks" not in alone.settings
    assert "masks" in mixed.settings


@pytest.mark.parametrize(
    ("weights", "options", "words"),
    [
        ({}, {}, "task_weights"),
        ({"text_to_video": 0.0}, {}, "positive"),
        ({"text_to_video": float("nan")}, {}, "positive"),
        ({"text_to_vidoe": 1.0}, {}, "text_to_video"),
        ({"inpainting": 1.0, "text_to_video": 1.0}, {}, "edited clip"),
        ({"text_to_video": 1.0}, {"text_dropout": 1.5}, "text_dropout"),
        ({"text_to_video": 1.0}, {"optional_share": -0.1}, "optional_share"),
        ({"text_to_video": 1.0}, {"masks": {"frames": 1.0}}, "masks"),
        ({"text_to_video": 1.0}, {"seed": -1}, "seed"),
    ],
)
def test_settings_that_cannot_be_used_are_refused(
    weights: dict[str, float], options: dict[str, float], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        SceneSampler(VOCABULARY, WordTokenizer(), weights, **options)  # type: ignore[arg-type]


def test_every_id_has_its_modality() -> None:
    levels = [VOCABULARY.audio_range(level) for level in range(3)]
    named = {
        "special": (0, 1, 255),
        "text": (VOCABULARY.text_range[0], VOCABULARY.text_range[1] - 1),
        "video": (VOCABULARY.video_range[0], VOCABULARY.video_range[1] - 1),
        "audio": (levels[0][0], levels[1][0], levels[2][1] - 1),
    }
    for name, ids in named.items():
        found = modalities(np.array([ids], np.int64), VOCABULARY)
        assert found.shape == (1, len(ids))
        assert {MODALITIES[place] for place in found.ravel()} == {name}
    assert modalities(np.array([VOCABULARY.vocab_size]), VOCABULARY).tolist() == [0]


@given(st.lists(st.integers(1, 37), max_size=60))
def test_rows_hold_every_scene_once_and_never_too_much(lengths: list[int]) -> None:
    rows = pack_rows(lengths, 37)
    assert sorted(scene for row in rows for scene in row) == list(range(len(lengths)))
    assert all(sum(lengths[scene] for scene in row) <= 37 for row in rows)
    # No two rows would fit into one, and best-fit decreasing stays near the least number of rows there can be.
    fill = sorted(sum(lengths[scene] for scene in row) for row in rows)
    assert len(fill) < 2 or fill[0] + fill[1] > 37
    assert len(rows) <= 11 / 9 * max(-(-sum(lengths) // 37), sum(2 * length > 37 for length in lengths)) * 1.5 + 1


def test_rows_are_nearly_full() -> None:
    lengths = np.random.default_rng(0).integers(20, 480, 5000).tolist()
    rows = pack_rows(lengths, 1024)
    filled = sum(lengths) / (len(rows) * 1024)
    print(f"{filled:.2%} of the rows' places hold ids")
    assert filled > 0.98


@pytest.mark.parametrize("length", [0, 38])
def test_scenes_that_fit_no_row_are_refused(length: int) -> None:
    with pytest.raises(ShapeError, match=str(length)):
        pack_rows([5, length], 37)


def test_a_row_comes_apart_into_its_scenes_and_makes_a_layout() -> None:
    made = sampler(*TRAINABLE)
    packed = [made.scene(clip_of(index), 0, index) for index in range(3)]
    total = sum(len(scene.ids) for scene in packed)
    row = join_scenes(packed, total + 11, VOCABULARY.special("<pad>"))
    start = 0
    for scene, length, prefix in zip(packed, row.lengths, row.prefix_lengths, strict=True):
        np.testing.assert_array_equal(row.ids[start : start + length], scene.ids)
        np.testing.assert_array_equal(row.loss_mask[start : start + length], scene.loss_mask)
        assert prefix == scene.prefix_len
        start += int(length)
    assert (row.ids[total:] == VOCABULARY.special("<pad>")).all()
    assert not row.loss_mask[total:].any()
    layout = SceneLayout.from_packed(
        torch.from_numpy(row.prefix_lengths)[None], torch.from_numpy(row.lengths)[None], len(row.ids)
    )
    assert int(layout.prefix.sum()) == sum(scene.prefix_len for scene in packed)
    assert sorted(set(layout.document[0].tolist())) == [-1, 0, 1, 2]
    with pytest.raises(ShapeError, match="pack_rows"):
        join_scenes(packed, total - 1, 0)
