import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from poet.errors import ConfigError, ShapeError
from poet.tasks import DEFAULT_TASK, TASKS, ClipGeometry, ClipParts, get_task
from poet.testing import random_parts, tiny_geometry, tiny_vocabulary

VOCABULARY = tiny_vocabulary()
NANO = ClipGeometry(
    num_frames=17, fps=8, height=64, width=64, temporal_stride=4, spatial_stride=8, sample_rate=16_000, hop_length=500
)
NAMES = [
    "text_to_video_audio",
    "text_to_video",
    "text_to_image",
    "text_to_audio",
    "unconditional",
    "image_to_video",
    "video_continuation",
    "inpainting",
    "outpainting",
    "stylisation",
    "video_to_audio",
    "audio_to_video",
    "audio_video_continuation",
    "captioning",
]


def test_the_table_holds_the_fourteen_tasks_and_their_task_ids_exist():
    assert list(TASKS) == NAMES and DEFAULT_TASK in TASKS
    for task in TASKS.values():
        assert VOCABULARY.special(task.special_name) < 64
        assert not task.inputs & task.optional
        assert (task.conditioning != "nothing") == ("video" in task.inputs)


def test_the_kind_of_output_alone_decides_the_task_id():
    by_output = {}
    for task in TASKS.values():
        by_output.setdefault(task.outputs, set()).add(task.special_name)
    assert by_output == {
        "image": {"<to_image>"},
        "video": {"<to_video>"},
        "audio": {"<to_audio>"},
        "video_audio": {"<to_video_audio>"},
        "text": {"<to_text>"},
    }


def test_a_nano_clip_has_four_audio_latents_a_video_frame():
    assert NANO.latent_shape == (5, 8, 8)
    assert NANO.num_audio_latents(17) == 68 and NANO.num_audio_latents(1) == 4
    assert NANO.num_samples(17) == 34_000
    assert NANO.duration == 2.125
    assert [NANO.num_video_frames(count) for count in (0, 1, 2, 5)] == [0, 1, 5, 17]


def test_audio_latents_round_where_the_rates_do_not_divide():
    film = dataclasses.replace(NANO, fps=24.0, num_frames=25, sample_rate=24_000, hop_length=320)  # 3.125 a frame
    assert [film.num_audio_latents(frames) for frames in (1, 4, 8, 25)] == [3, 13, 25, 78]


@pytest.mark.parametrize(
    ("task", "condition", "video", "audio"),
    [
        ("text_to_video_audio", None, (5, 8, 8), 68),
        ("text_to_image", None, (1, 8, 8), None),
        ("text_to_audio", None, None, 68),
        ("image_to_video", None, (4, 8, 8), 68),
        ("video_continuation", 2, (3, 8, 8), 48),
        ("audio_video_continuation", 4, (1, 8, 8), 16),
        ("inpainting", None, (5, 8, 8), None),
        ("video_to_audio", 5, None, 68),
        ("audio_to_video", None, (5, 8, 8), None),
        ("captioning", None, None, None),
    ],
)
def test_output_shapes_of_the_nano_clip(task, condition, video, audio):
    shape = get_task(task).output_shape(NANO, condition)
    assert (shape.video, shape.audio) == (video, audio)


@given(
    task=st.sampled_from(NAMES),
    num_latent_frames=st.sampled_from([2, 3, 5, 7]),
    fps=st.sampled_from([5.0, 8.0, 24.0]),
    seed=st.integers(0, 2**31),
)
def test_joining_what_was_split_gives_the_clip_back(task, num_latent_frames, fps, seed):
    row, rng = get_task(task), np.random.default_rng(seed)
    geometry = tiny_geometry(VOCABULARY, num_latent_frames=num_latent_frames, fps=fps)
    video = rng.integers(0, 31, geometry.latent_shape)
    audio = rng.integers(0, 13, (3, geometry.num_audio_latents(geometry.num_frames)))
    given_frames = row.split(num_latent_frames, rng)
    edited = rng.integers(0, 31, video.shape) if row.edit else None
    parts = row.split_clip(video, audio, geometry, given_frames, edited)

    shape = row.output_shape(geometry, given_frames)
    assert (None if parts.video_out is None else parts.video_out.shape) == shape.video
    assert (None if parts.audio_out is None else parts.audio_out.shape[1]) == shape.audio
    assert (parts.video_in is not None) == ("video" in row.inputs)
    assert (parts.audio_in is not None) == ("audio" in row.inputs | row.optional)

    if task == "video_continuation":
        parts = dataclasses.replace(parts, audio_in=audio[:, : audio.shape[1] - parts.audio_out.shape[1]])
    joined_video, joined_audio = row.join_clip(parts)
    if joined_video is not None:
        np.testing.assert_array_equal(joined_video, video[:1] if row.outputs == "image" else video)
    if joined_audio is not None:
        np.testing.assert_array_equal(joined_audio, audio)
    assert (joined_audio is not None) == ("audio" in row.inputs | row.optional or row.writes_audio)


def test_an_edited_clip_is_given_and_the_clip_itself_written():
    video = np.arange(5 * 3 * 7).reshape(5, 3, 7)
    parts = get_task("inpainting").split_clip(video, None, NANO, 5, video + 1)
    np.testing.assert_array_equal(parts.video_in, video + 1)
    np.testing.assert_array_equal(parts.video_out, video)
    with pytest.raises(ShapeError, match="task inpainting must come with an edited clip"):
        get_task("inpainting").split_clip(video, None, NANO, 5)


def test_split_draws_every_length_of_a_continuation_and_nothing_else():
    rng = np.random.default_rng(3)
    assert {get_task("video_continuation").split(5, rng) for _ in range(97)} == {1, 2, 3, 4}
    assert {get_task("image_to_video").split(5, rng) for _ in range(11)} == {1}
    assert {get_task("captioning").split(5, rng) for _ in range(11)} == {5}
    assert {get_task("audio_to_video").split(5, rng) for _ in range(11)} == {0}


def test_what_cannot_be_cut_is_refused():
    with pytest.raises(ShapeError, match="at least 2 latent frames, got 1"):
        get_task("video_continuation").split(1, np.random.default_rng(0))
    with pytest.raises(ShapeError, match="must be given 1 to 4 of 5 latent frames, got 5"):
        get_task("video_continuation").output_shape(NANO, 5)
    with pytest.raises(ShapeError, match="needs clips with audio and video"):
        get_task("video_to_audio").split_clip(np.zeros((5, 3, 7), int), None, NANO, 5)
    with pytest.raises(ShapeError, match="16 audio latents end before the 20 of the given frames"):
        get_task("audio_video_continuation").split_clip(np.zeros((5, 3, 7), int), np.zeros((3, 16), int), NANO, 2)
    with pytest.raises(ShapeError, match=r"1 \+ k \* 4, got 19. Take 17 or 21"):
        dataclasses.replace(NANO, num_frames=19)
    with pytest.raises(ShapeError, match="fps must be positive, got nan"):
        dataclasses.replace(NANO, fps=float("nan"))


def test_a_training_clip_must_have_what_the_task_reads_and_writes():
    assert get_task("text_to_video").needs == {"text", "video"}
    assert get_task("captioning").needs == {"text", "video"}
    assert get_task("unconditional").needs == {"video", "audio"}
    assert get_task("video_continuation").needs == {"video", "audio"}
    assert get_task("audio_to_video").needs == {"video", "audio"}


def test_inputs_that_are_missing_or_of_no_use_are_named():
    with pytest.raises(ConfigError, match=r"task image_to_video needs video, got \['text'\]"):
        get_task("image_to_video").check_inputs({"text"})
    with pytest.raises(ConfigError, match="task text_to_audio takes no video"):
        get_task("text_to_audio").check_inputs({"text", "video"})
    get_task("captioning").check_inputs({"video", "audio"})
    with pytest.raises(ConfigError, match=r"got 'inpaint'. Did you mean inpainting\?"):
        get_task("inpaint")


def test_random_parts_of_a_silent_task_hold_no_sound():
    parts = random_parts("text_to_video", VOCABULARY, tiny_geometry(VOCABULARY), np.random.default_rng(0))
    assert isinstance(parts, ClipParts)
    assert parts.audio_in is None and parts.audio_out is None and parts.video_out.shape == (5, 3, 5)
