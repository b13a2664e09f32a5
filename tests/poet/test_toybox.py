"""Toybox draws what its specification says: pure, complete, held-out triples apart, sound following picture."""

import functools
import zlib
from collections.abc import Callable

import numpy as np
import pytest

from poet.data.toybox import (
    ATTRIBUTE_VALUES,
    BACKGROUNDS,
    COLOURS,
    FPS,
    NUM_FRAMES,
    NUM_SAMPLES,
    PITCHES,
    RESOLUTION,
    SAMPLE_RATE,
    SIZES,
    Attributes,
    ToyboxClip,
    ToyboxSource,
    Trajectory,
    draw,
    draw_frames,
    draw_sound,
    is_held_out,
)
from poet.data.toybox_captions import parse_caption
from poet.errors import ConfigError
from poet.evaluation.judge import judge

SPLITS = ("train", "seen", "unseen")


@functools.cache
def drawn() -> tuple[ToyboxClip, ...]:
    return tuple(draw(split, index) for split in SPLITS for index in range(101))


def having(**wanted: str) -> list[ToyboxClip]:
    clips = [
        clip
        for clip in drawn()
        if all(clip.attributes.as_dict()[name] in value.split("|") for name, value in wanted.items())
    ]
    assert clips, wanted
    return clips


def frames_of(clip: ToyboxClip) -> np.ndarray:
    assert clip.clip.frames is not None
    return clip.clip.frames


def samples_of(clip: ToyboxClip) -> np.ndarray:
    assert clip.clip.samples is not None
    return clip.clip.samples


def loudness(samples: np.ndarray, start: float, end: float) -> float:
    return float(np.sqrt(np.mean(samples[int(start * SAMPLE_RATE) : int(end * SAMPLE_RATE)] ** 2)))


def loudest_frequency(samples: np.ndarray, start: float, end: float) -> float:
    part = samples[int(start * SAMPLE_RATE) : int(end * SAMPLE_RATE)]
    spectrum = abs(np.fft.rfft(part * np.hanning(len(part)), 1 << 16))
    return float(spectrum.argmax() * SAMPLE_RATE / (1 << 16))


def test_a_clip_has_the_fixed_shape_rate_and_range() -> None:
    for clip in drawn()[::17]:
        assert frames_of(clip).shape == (NUM_FRAMES, RESOLUTION, RESOLUTION, 3) == (17, 64, 64, 3)
        assert frames_of(clip).dtype == np.uint8
        assert samples_of(clip).shape == (NUM_SAMPLES,) == (34_000,)
        assert samples_of(clip).dtype == np.float32
        assert (clip.clip.fps, clip.clip.sample_rate) == (8.0, 16_000)
    assert max(float(abs(samples_of(clip)).max()) for clip in drawn()) <= 1.0


def test_a_clip_is_a_pure_function_of_split_and_index() -> None:
    first, again = draw("seen", 23), draw("seen", 23)
    assert np.array_equal(frames_of(first), frames_of(again))
    assert np.array_equal(samples_of(first), samples_of(again))
    assert (first.caption, first.attributes, first.key) == (again.caption, again.attributes, again.key)
    others = [draw("seen", 24), draw("train", 23)]
    assert not any(np.array_equal(frames_of(first), frames_of(other)) for other in others)


def test_picture_and_sound_drawn_alone_equal_those_drawn_together() -> None:
    clip = draw("unseen", 7)
    assert np.array_equal(draw_frames("unseen", 7), frames_of(clip))
    assert np.array_equal(draw_sound("unseen", 7), samples_of(clip))


def test_held_out_triples_occur_in_the_unseen_split_alone() -> None:
    for clip in drawn():
        attributes = clip.attributes
        triple = f"{attributes.shape}|{attributes.colour}|{attributes.motion}"
        held_out = zlib.crc32(triple.encode()) % 10 == 0
        assert held_out == is_held_out(attributes.shape, attributes.colour, attributes.motion)
        assert held_out == clip.key.startswith("unseen"), clip.key


def test_about_one_triple_in_ten_is_held_out_and_no_value_is_lost_by_it() -> None:
    triples = [
        (shape, colour, motion)
        for shape in ATTRIBUTE_VALUES["shape"]
        for colour in ATTRIBUTE_VALUES["colour"]
        for motion in ATTRIBUTE_VALUES["motion"]
    ]
    held_out = [triple for triple in triples if is_held_out(*triple)]
    assert 0.07 < len(held_out) / len(triples) < 0.13
    for place in range(3):
        kept = {triple[place] for triple in triples if not is_held_out(*triple)}
        assert kept == {triple[place] for triple in triples}


@pytest.mark.parametrize("name", list(ATTRIBUTE_VALUES))
def test_every_value_occurs_in_every_split(name: str) -> None:
    for split in SPLITS:
        seen = {clip.attributes.as_dict()[name] for clip in drawn() if clip.key.startswith(split)}
        assert seen == set(ATTRIBUTE_VALUES[name])


def test_the_object_stays_inside_the_frame_on_a_plain_background() -> None:
    for clip in drawn():
        frames, background = frames_of(clip), BACKGROUNDS[clip.attributes.background]
        for edge in (frames[:, 0], frames[:, -1], frames[:, :, 0], frames[:, :, -1]):
            assert (edge == background).all(), clip.key


def test_the_object_has_its_colour_and_size() -> None:
    for clip in having(shape="circle|square|cross", motion="moves right|moves left|rises|falls|circles|stays still"):
        frame, track = frames_of(clip)[5], clip.trajectory
        centre = frame[int(track.y[5]), int(track.x[5])]
        assert tuple(int(value) for value in centre) == COLOURS[clip.attributes.colour]
        columns = np.flatnonzero((frame != BACKGROUNDS[clip.attributes.background]).any(axis=(0, 2)))
        half_width = (columns[-1] - columns[0] + 1) / 2
        assert abs(half_width - SIZES[clip.attributes.size]) <= 1.0, clip.key


def test_each_motion_moves_as_it_is_called() -> None:
    steps: dict[str, Callable[[Trajectory], bool]] = {
        "moves right": lambda t: bool((np.diff(t.x) > 0).all() and np.ptp(t.y) == 0),
        "moves left": lambda t: bool((np.diff(t.x) < 0).all() and np.ptp(t.y) == 0),
        "falls": lambda t: bool((np.diff(t.y) > 0).all() and np.ptp(t.x) == 0),
        "rises": lambda t: bool((np.diff(t.y) < 0).all() and np.ptp(t.x) == 0),
        "stays still": lambda t: bool(np.ptp(t.x) == np.ptp(t.y) == np.ptp(t.half_width) == 0),
        "grows": lambda t: bool((np.diff(t.half_width) > 0).all() and np.ptp(t.x) == np.ptp(t.y) == 0),
        "shrinks": lambda t: bool((np.diff(t.half_width) < 0).all() and np.ptp(t.x) == np.ptp(t.y) == 0),
        "circles": lambda t: bool(min(np.ptp(t.x), np.ptp(t.y)) > 10 and np.ptp(t.half_width) == 0),
        "bounces": lambda t: bool(len(t.contacts) >= 1 and np.ptp(t.x) == 0 and np.ptp(t.y) > 15),
    }
    assert set(steps) == set(ATTRIBUTE_VALUES["motion"])
    for clip in drawn():
        assert steps[clip.attributes.motion](clip.trajectory), clip.key


def test_a_silent_clip_is_silent_and_every_other_is_heard() -> None:
    for clip in drawn():
        silent = clip.attributes.timbre == "silent"
        assert (not samples_of(clip).any()) == silent
        assert silent or abs(samples_of(clip)).max() > 0.1


def test_a_steady_flute_sounds_at_its_pitch() -> None:
    for clip in having(timbre="flute", motion="moves right|moves left|circles|stays still"):
        assert abs(loudest_frequency(samples_of(clip), 0.5, 1.5) - PITCHES[clip.attributes.pitch]) < 2


def test_the_pitch_glides_an_octave_with_the_height() -> None:
    for clip in having(timbre="flute", motion="rises|falls"):
        early = loudest_frequency(samples_of(clip), 0.2, 0.3)
        late = loudest_frequency(samples_of(clip), 1.7, 1.8)
        octaves = np.log2(late / early) * (1 if clip.attributes.motion == "rises" else -1)
        assert octaves == pytest.approx(1.5 / 2, abs=0.05)


def test_the_loudness_follows_the_size() -> None:
    for clip in having(timbre="flute|buzzer", motion="grows|shrinks"):
        start, end = loudness(samples_of(clip), 0.01, 0.06), loudness(samples_of(clip), 1.99, 2.04)
        ratio = end / start if clip.attributes.motion == "grows" else start / end
        assert 4 < ratio < 7.5  # 1.0 / 0.15, less what the first and last hundredths of a second change


def test_a_bounce_is_heard_at_each_floor_contact_and_hardly_before() -> None:
    for clip in having(motion="bounces", timbre="flute|buzzer|string|bell"):
        for contact in clip.trajectory.contacts:
            before = loudness(samples_of(clip), contact - 0.03, contact - 0.005)
            after = loudness(samples_of(clip), contact + 0.005, contact + 0.03)
            assert after > 4 * before, (clip.key, contact)
            below = min(abs(contact - n / FPS) for n in range(NUM_FRAMES))
            assert below <= 0.5 / FPS


def test_struck_instruments_sound_again_every_half_second() -> None:
    for clip in having(timbre="string|bell", motion="moves right|moves left|circles|stays still"):
        for strike in (0.5, 1.0, 1.5):
            before = loudness(samples_of(clip), strike - 0.06, strike - 0.01)
            assert loudness(samples_of(clip), strike + 0.01, strike + 0.06) > 1.5 * before


def test_the_caption_says_what_is_drawn() -> None:
    for clip in drawn():
        said = parse_caption(clip.caption)
        assert said == {name: clip.attributes.as_dict()[name] for name in said}
        assert set(ATTRIBUTE_VALUES) - set(said) == ({"pitch"} if clip.attributes.timbre == "silent" else set())


def test_a_source_is_a_stretch_of_a_split() -> None:
    source = ToyboxSource("unseen", 3, start=5)
    assert len(source) == 3
    assert [source[i].key for i in range(3)] == [draw("unseen", i).key for i in (5, 6, 7)]
    assert np.array_equal(source.frames(2), draw_frames("unseen", 7))
    assert np.array_equal(source.sound(1), draw_sound("unseen", 6))
    with pytest.raises(IndexError):
        source[3]


def test_what_does_not_exist_is_refused() -> None:
    with pytest.raises(ConfigError, match="validation"):
        draw("validation", 0)
    with pytest.raises(ConfigError, match="negative"):
        draw("train", -1)
    with pytest.raises(ConfigError, match="count=0"):
        ToyboxSource("train", 0)
    values = draw("train", 0).attributes.as_dict()
    with pytest.raises(ConfigError, match="purple"):
        Attributes(**values | {"colour": "purple"})


@pytest.mark.parametrize("index", range(4))
def test_a_finer_clip_is_the_same_scene_with_finer_edges(index: int) -> None:
    coarse, fine = draw("unseen", index), draw("unseen", index, 128)
    assert fine.caption == coarse.caption
    assert fine.clip.frames is not None
    assert coarse.clip.frames is not None
    assert fine.clip.frames.shape == (17, 128, 128, 3)
    np.testing.assert_array_equal(fine.clip.samples, coarse.clip.samples)
    means = fine.clip.frames.reshape(17, 64, 2, 64, 2, 3).astype(float).mean((2, 4))
    difference = np.abs(means - coarse.clip.frames)
    # Both sample edges 4 x 4 times a pixel, the fine clip at other points: inside and outside they agree.
    assert difference.mean() < 0.3
    assert (difference.max(-1) < 2).mean() > 0.95
    np.testing.assert_array_equal(draw_frames("unseen", index, 128), fine.clip.frames)


def test_the_judge_reads_finer_clips_as_well() -> None:
    for index in range(12):
        clip = draw("seen", index, 128)
        assert clip.clip.frames is not None
        verdict = judge(clip.clip.frames, clip.clip.samples)
        for name in ("colour", "shape", "size", "motion", "background"):
            assert getattr(verdict, name) == getattr(clip.attributes, name), (index, name)


def test_a_resolution_that_is_no_multiple_of_64_is_refused() -> None:
    for resolution in (0, 32, 96):
        with pytest.raises(ConfigError, match="multiple of 64"):
            draw("seen", 0, resolution)
        with pytest.raises(ConfigError, match="multiple of 64"):
            ToyboxSource("seen", 3, resolution=resolution)
    assert ToyboxSource("seen", 3).name != ToyboxSource("seen", 3, resolution=128).name
