"""Films of Toybox: one object, scenes that go on from each other, captions that say what happens."""

import functools
import itertools

import numpy as np
import pytest

from poet.data.clips import open_source
from poet.data.toybox import NUM_FRAMES, NUM_SAMPLES, RESOLUTION, SIZES, ToyboxClip, is_held_out
from poet.data.toybox_captions import parse_caption
from poet.data.toybox_films import FILM_SCENES, ToyboxFilmSource, draw_film
from poet.errors import ConfigError
from poet.evaluation.judge import judge

OBJECT = ("colour", "shape", "size", "background")


@functools.cache
def films() -> tuple[tuple[ToyboxClip, ...], ...]:
    return tuple(draw_film(split, index) for split in ("train", "seen", "unseen") for index in range(25))


def borders() -> list[tuple[ToyboxClip, ToyboxClip]]:
    return [pair for film in films() for pair in itertools.pairwise(film)]


def test_a_film_keeps_its_object_and_changes_motion_or_sound_at_every_border() -> None:
    for film in films():
        assert len(film) == FILM_SCENES
        assert len({tuple(getattr(scene.attributes, name) for name in OBJECT) for scene in film}) == 1
        assert len({scene.loudness for scene in film}) == 1
    kept = {"motion": 0, "sound": 0}
    for one, other in borders():
        assert one.attributes != other.attributes
        kept["motion"] += one.attributes.motion == other.attributes.motion
        kept["sound"] += (one.attributes.timbre, one.attributes.pitch) == (
            other.attributes.timbre,
            other.attributes.pitch,
        )
    assert min(kept.values()) > len(borders()) / 10


def test_a_scene_begins_in_the_picture_that_the_one_before_ended_with() -> None:
    for one, other in borders():
        for part in ("x", "y", "half_width"):
            before, after = getattr(one.trajectory, part)[-1], getattr(other.trajectory, part)[0]
            assert after == pytest.approx(before, abs=1e-6), (one.key, part)
        assert one.clip.frames is not None
        assert other.clip.frames is not None
        assert np.abs(one.clip.frames[-1].astype(int) - other.clip.frames[0].astype(int)).max() <= 1


def test_the_object_stays_inside_the_frame_and_moves_as_it_is_called() -> None:
    for film in films():
        radius = SIZES[film[0].attributes.size]
        for scene in film:
            x, y, width = scene.trajectory.x, scene.trajectory.y, scene.trajectory.half_width
            assert len(x) == len(y) == len(width) == NUM_FRAMES
            assert min(x.min(), y.min()) >= radius
            assert max(x.max(), y.max()) <= RESOLUTION - radius
            motion = scene.attributes.motion
            assert (np.ptp(width) > 1) == (motion in ("grows", "shrinks"))
            assert (len(scene.trajectory.contacts) > 0) == (motion == "bounces")
            if motion in ("moves right", "moves left", "falls", "rises"):
                moved = np.diff(x if motion.startswith("moves") else y)
                assert ((moved if motion in ("moves right", "falls") else -moved) > 0.5).all()
            if motion == "grows":
                assert width[-1] == pytest.approx(radius)


def test_what_has_shrunk_grows_and_nothing_else_does() -> None:
    follows = {(one.attributes.motion == "shrinks", other.attributes.motion == "grows") for one, other in borders()}
    assert follows == {(True, True), (False, False)}
    assert not any(film[0].attributes.motion == "grows" for film in films())


def test_the_splits_keep_their_combinations_apart() -> None:
    for film in films():
        held_out = {
            is_held_out(scene.attributes.shape, scene.attributes.colour, scene.attributes.motion) for scene in film
        }
        assert held_out == {film[0].key.startswith("film-unseen")}


def test_captions_name_all_or_speak_of_it() -> None:
    short = 0
    for film in films():
        for number, scene in enumerate(film):
            said, truth = parse_caption(scene.caption), scene.attributes.as_dict()
            assert said.items() <= truth.items()
            assert {"motion", "timbre"} <= said.keys()
            if number == 0:
                assert set(OBJECT) <= said.keys()
            short += not set(OBJECT) & said.keys()
    assert 0.35 < short / len(borders()) < 0.65


def test_the_judge_sees_and_hears_every_scene_as_it_is() -> None:
    right = []
    for film in films()[::5]:
        for scene in film:
            assert scene.clip.samples is not None
            assert len(scene.clip.samples) == NUM_SAMPLES
            verdict = judge(scene.clip.frames, scene.clip.samples)
            truth = scene.attributes.as_dict()
            right += [getattr(verdict, name) == truth[name] for name in (*OBJECT, "motion", "timbre")]
    assert np.mean(right) > 0.97


def test_a_film_is_a_pure_function_and_a_shorter_one_its_beginning() -> None:
    whole, beginning = draw_film("seen", 3), draw_film("seen", 3, 2)
    assert [scene.caption for scene in beginning] == [scene.caption for scene in whole[:2]]
    np.testing.assert_array_equal(beginning[1].clip.frames, whole[1].clip.frames)
    assert [scene.caption for scene in draw_film("seen", 4)] != [scene.caption for scene in whole]


def test_a_source_goes_through_films_scene_by_scene() -> None:
    source = open_source("toybox-films:seen", count=2, start=3)
    assert isinstance(source, ToyboxFilmSource)
    assert (len(source), source.name) == (2 * FILM_SCENES, "toybox-films:seen?start=3")
    scene = draw_film("seen", 4)[5]
    assert (source[FILM_SCENES + 5].key, source[FILM_SCENES + 5].caption) == (scene.key, scene.caption)
    np.testing.assert_array_equal(source[FILM_SCENES + 5].clip.samples, scene.clip.samples)
    with pytest.raises(IndexError):
        source[2 * FILM_SCENES]


def test_what_does_not_exist_is_refused() -> None:
    with pytest.raises(ConfigError, match="train, seen, unseen"):
        draw_film("test", 0)
    with pytest.raises(ConfigError, match="negative"):
        draw_film("seen", -1)
    with pytest.raises(ConfigError, match="at least one scene"):
        draw_film("seen", 0, 0)
    with pytest.raises(ConfigError, match="multiple of 64"):
        draw_film("seen", 0, 1, 100)
    with pytest.raises(ConfigError, match="count >= 1"):
        open_source("toybox-films:seen", count=0)
    with pytest.raises(ConfigError, match="has no end"):
        open_source("toybox-films:seen")
