"""Films are judged: drawn ones are right, and what is wrong with a film is found in the scene where it is wrong."""

import dataclasses
import functools
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace

import matplotlib.image
import numpy as np
import pytest
from numpy.typing import NDArray

from poet.bundle import Bundle
from poet.data.toybox import NUM_FRAMES, SIZES, Attributes, ToyboxClip, Trajectory, draw_scene
from poet.data.toybox_films import FILM_SCENES, draw_film
from poet.errors import ConfigError, ShapeError
from poet.evaluation import films
from poet.evaluation.films import FilmVerdict, click_ratio, judge_film, measure_films, scene_table, tell_scenes
from poet.generation.film import FilmRequest, GeneratedFilm
from poet.generation.joining import SeamlessJoin
from poet.media import Clip
from poet.testing import tiny_bundle

SHORT = 3


@functools.cache
def drawn(index: int, num_scenes: int = SHORT) -> tuple[ToyboxClip, ...]:
    return draw_film("seen", index, num_scenes)


def clips(scenes: Sequence[ToyboxClip]) -> list[Clip]:
    return [scene.clip for scene in scenes]


def frames_of(clip: Clip) -> NDArray[np.uint8]:
    assert clip.frames is not None
    return clip.frames


def with_frames(clip: Clip, frames: NDArray[np.uint8]) -> Clip:
    return dataclasses.replace(clip, frames=frames)


def object_told(scene: ToyboxClip) -> tuple[str, ...]:
    return scene.attributes.colour, scene.attributes.shape, scene.attributes.size


def own_scene(
    x: float, y: float, *, shape: str = "triangle", motion: str = "stays still", to: float = 0.0
) -> ToyboxClip:
    """A large red thing at x, y that stays there, or goes `to` so many pixels to the right."""
    attributes = Attributes(
        colour="red", shape=shape, size="large", background="navy", motion=motion, timbre="flute", pitch="low"
    )
    track = Trajectory(
        x=np.linspace(x, x + to, NUM_FRAMES), y=np.full(NUM_FRAMES, y), half_width=np.full(NUM_FRAMES, SIZES["large"])
    )
    clip = draw_scene(attributes, track, 1.0)
    return ToyboxClip(key="own", attributes=attributes, trajectory=track, loudness=1.0, caption="", clip=clip)


# -------------------------------------------------------------------------------------------------------------- judge


@pytest.mark.parametrize("split", ["seen", "unseen"])
def test_drawn_films_are_right_and_their_object_neither_changes_nor_jumps(split: str) -> None:
    verdicts = [judge_film(scenes, clips(scenes)) for scenes in (draw_film(split, index) for index in range(5))]
    for verdict in verdicts:
        assert [len(part) for part in (verdict.scenes, verdict.jumps, verdict.steps)] == [FILM_SCENES, 7, 7]
        assert verdict.kept
        assert verdict.kept_as_begun
        assert all(jump is not None and jump < 1 for jump in verdict.jumps)
        np.testing.assert_allclose(verdict.steps, verdict.drawn_steps, atol=0.5)
    measures = measure_films(verdicts)
    right = measures["attributes right"]
    assert right is not None
    assert right >= 0.97
    assert measures["films with the object asked for in all scenes"] == 1.0
    assert measures["borders with a jump under 4 pixels"] == 1.0
    assert sum(possible is True for verdict in verdicts for possible in verdict.possible) >= 38  # of 40
    assert {name for verdict in verdicts for marks in verdict.scenes for name in marks} == {*films.ATTRIBUTES, "sync"}


def test_a_scene_of_another_film_is_wrong_in_its_place_and_jumps() -> None:
    told, other = drawn(0, 4), drawn(2, 4)
    assert all(one != another for one, another in zip(object_told(told[2]), object_told(other[2]), strict=True))
    verdict = judge_film(told, [told[0].clip, told[1].clip, other[2].clip, told[3].clip])
    assert verdict.kept_scenes == (True, True, False, True)
    assert not verdict.kept
    assert not verdict.kept_as_begun
    expected = math.dist(*(_place(scene, at) for scene, at in ((told[1], -1), (other[2], 0))))
    assert expected > films.LEAST_JUMP
    assert verdict.jumps == (pytest.approx(0, abs=0.1), pytest.approx(expected, abs=1), verdict.jumps[2])
    assert verdict.jumps[2] is not None
    assert verdict.jumps[2] > films.LEAST_JUMP


def _place(scene: ToyboxClip, at: int) -> tuple[float, float]:
    """Its centre of gravity; that of a triangle lies a third of the half-width below the centre."""
    track = scene.trajectory
    drop = track.half_width[at] / 3 if scene.attributes.shape == "triangle" else 0.0
    return float(track.x[at]), float(track.y[at] + drop)


def test_a_film_that_keeps_another_object_keeps_what_it_began_with() -> None:
    verdict = judge_film(drawn(0), clips(drawn(1)))
    assert not verdict.kept
    assert verdict.kept_as_begun
    measures = measure_films([verdict, judge_film(drawn(0), clips(drawn(0)))])
    assert measures["films with the object asked for in all scenes"] == 0.5
    assert measures["films with the object of scene 1 in all scenes"] == 1.0


def test_a_shifted_scene_jumps_by_its_shift_at_both_ends() -> None:
    told = [own_scene(30, 30), own_scene(30, 30), own_scene(30, 30), own_scene(30, 30)]
    shown = clips(told)
    shown[1] = with_frames(shown[1], np.roll(frames_of(shown[1]), (3, -4), axis=(1, 2)))
    verdict = judge_film(told, shown)
    np.testing.assert_allclose(verdict.jumps, (5, 5, 0), atol=0.05)
    np.testing.assert_allclose(verdict.steps, (5, 5, 0), atol=0.05)
    np.testing.assert_allclose(verdict.drawn_steps, 0, atol=1e-9)
    measures = measure_films([verdict])
    assert measures["borders with a jump under 4 pixels"] == pytest.approx(1 / 3, abs=1e-3)
    assert measures["jump at a border, pixels, median"] == pytest.approx(5, abs=0.05)


def test_a_shape_that_changes_in_its_place_does_not_jump() -> None:
    triangle, circle = own_scene(30, 30), own_scene(30, 34, shape="circle")  # both with their weight at 30, 34
    melted = np.concatenate([frames_of(triangle.clip)[:1], frames_of(circle.clip)[1:]])
    verdict = judge_film([triangle, triangle], [triangle.clip, with_frames(triangle.clip, melted)])
    assert verdict.verdicts[1].shape == "circle"
    assert verdict.kept_scenes == (True, False)
    assert verdict.jumps == (pytest.approx(0, abs=0.2),)


def test_where_nothing_is_seen_there_is_no_distance_and_it_counts_as_a_jump() -> None:
    told, shown = drawn(0), clips(drawn(0))
    shown[1] = with_frames(shown[1], np.zeros_like(frames_of(shown[1])))
    verdict = judge_film(told, shown)
    assert verdict.jumps == (None, None)
    assert verdict.steps == (None, None)
    assert verdict.possible == (True, True, None)
    measures = measure_films([verdict])
    assert measures["borders with a jump under 4 pixels"] == 0.0
    assert measures["borders with no object"] == 1.0
    assert measures["jump at a border, pixels, median"] is None


def test_sound_alone_has_no_object_and_is_judged_all_the_same() -> None:
    told = drawn(0, 2)
    verdict = judge_film(told, [dataclasses.replace(clip, frames=None) for clip in clips(told)])
    assert verdict.jumps == (None,)
    assert [marks["timbre"] for marks in verdict.scenes] == [True, True]
    assert not verdict.kept_as_begun


def test_a_film_of_one_scene_has_no_borders() -> None:
    verdict = judge_film(drawn(0, 1), clips(drawn(0, 1)))
    assert verdict.jumps == verdict.steps == verdict.drawn_steps == ()
    measures = measure_films([verdict])
    assert measures["borders with a jump under 4 pixels"] is None
    assert measures["last scene minus first, points"] is None
    assert measures["attributes right"] == 1.0


def test_a_motion_that_is_not_there_has_no_sync() -> None:
    still = own_scene(30, 40)
    rises = dataclasses.replace(still, attributes=dataclasses.replace(still.attributes, motion="rises"))
    silent = dataclasses.replace(still, attributes=dataclasses.replace(rises.attributes, timbre="silent"))
    marks = judge_film([rises, silent], clips([still, still])).scenes
    assert marks[0]["sync"] is False
    assert "sync" not in marks[1]


def test_whether_a_motion_is_possible_depends_on_where_the_scene_before_was_seen_to_end() -> None:
    at_the_edge = own_scene(25, 30, motion="moves right", to=25)
    again = own_scene(20, 30, motion="moves right", to=25)
    back = own_scene(50, 30, motion="moves left", to=-25)
    grows = dataclasses.replace(back, attributes=dataclasses.replace(back.attributes, motion="grows"))
    possible = [
        judge_film([at_the_edge, after], clips([at_the_edge, after])).possible for after in (again, back, grows)
    ]
    assert possible == [(True, False), (True, True), (True, False)]  # nothing has shrunk that could grow
    wrong = judge_film([at_the_edge, again], clips([at_the_edge, own_scene(50, 30)]))
    assert wrong.scenes[1]["motion"] is False
    assert measure_films([wrong])["scenes with the motion asked for, where there was room"] == 1.0


def test_a_film_needs_a_scene_for_each_that_was_drawn() -> None:
    with pytest.raises(ShapeError, match="got 2 for 3"):
        judge_film(drawn(0), clips(drawn(0))[:2])
    with pytest.raises(ShapeError, match="at least one"):
        judge_film([], [])
    with pytest.raises(ConfigError, match="at least one"):
        measure_films([])


# -------------------------------------------------------------------------------------------------------------- sound


def _tone(hertz: float = 200.0) -> NDArray[np.float32]:
    return (0.5 * np.sin(2 * np.pi * hertz * np.arange(32_000) / 16_000)).astype(np.float32)


def test_a_click_at_the_border_is_found_and_one_elsewhere_is_not() -> None:
    sound = _tone()
    assert click_ratio(sound, 16_000, 1.0) == pytest.approx(1, abs=0.01)
    sound[16_100:] *= -1.0  # 6 ms behind the border, near the tone's peak
    step = 2 * abs(float(sound[16_100]))
    assert click_ratio(sound, 16_000, 1.0) == pytest.approx(step / (0.5 * 2 * np.pi * 200 / 16_000), rel=0.1)
    assert click_ratio(sound, 16_000, 1.0) > 5
    assert click_ratio(sound, 16_000, 0.9) < 0.2
    assert click_ratio(sound, 16_000, 0.5) == pytest.approx(1, abs=0.01)


def test_silence_does_not_click_but_what_breaks_it_does() -> None:
    silence = np.zeros(32_000, np.float32)
    assert click_ratio(silence, 16_000, 1.0) == 1.0
    silence[15_999] = 1e-4
    assert click_ratio(silence, 16_000, 1.0) == 1.0  # nobody hears it
    silence[15_999] = 0.25
    assert click_ratio(silence, 16_000, 1.0) == pytest.approx(250)


def test_a_border_needs_sound_on_both_sides() -> None:
    for border in (0.0, 0.01, 1.99, 2.0, 7.0):
        with pytest.raises(ConfigError, match="both sides"):
            click_ratio(_tone(), 16_000, border)
    assert click_ratio(_tone(), 16_000, 0.03) == pytest.approx(1, abs=0.01)
    with pytest.raises(ShapeError, match="Mix down"):
        click_ratio(np.zeros((2, 16_000), np.float32), 16_000, 0.5)


# ----------------------------------------------------------------------------------------------------------- evaluate


def test_more_scenes_than_were_drawn_begin_anew() -> None:
    told = tell_scenes("seen", 3, 2 * FILM_SCENES + 3)
    assert [scene.key for scene in told] == [f"film-seen-0000003.{n % FILM_SCENES}" for n in range(19)]
    assert [scene.key for scene in tell_scenes("seen", 3, 2)] == ["film-seen-0000003.0", "film-seen-0000003.1"]
    verdict = judge_film(told, clips(told))
    followed = [step is not None for step in verdict.drawn_steps]
    assert [n for n, does in enumerate(followed) if not does] == [7, 15]


def test_the_table_has_a_row_for_each_scene() -> None:
    def verdict(*marks: dict[str, bool]) -> FilmVerdict:
        return FilmVerdict(scenes=marks, verdicts=(), jumps=(), steps=(), drawn_steps=(), possible=())

    one = {"colour": True, "shape": True, "motion": False, "sync": False}
    other = {"colour": True, "shape": False}
    assert scene_table([verdict(one, one), verdict(one, other), verdict(one, other)]) == [
        "| scene | colour | shape | size | background | motion | timbre | pitch | sync | overall |",
        "|---|---|---|---|---|---|---|---|---|---|",
        "| 1 | 100.0 | 100.0 |  |  | 0.0 |  |  | 0.0 | 66.7 |",
        "| 2 | 100.0 | 33.3 |  |  | 0.0 |  |  | 0.0 | 57.1 |",
    ]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return tiny_bundle(tmp_path_factory.mktemp("bundle") / "tiny")


class Studio:
    """In place of an engine and of what writes films: gives back drawn ones, or what `change` makes of them."""

    def __init__(self) -> None:
        self.requests: list[list[FilmRequest]] = []
        self.options: dict[str, object] = {}
        self.closed = 0
        self.change: Callable[[int, list[Clip]], list[Clip]] = lambda number, scenes: scenes

    def load_engine(self, name: str, path: Path, **options: object) -> SimpleNamespace:
        self.options = {"name": name, "path": path, **options}
        return SimpleNamespace(close=self._close)

    def _close(self) -> None:
        self.closed += 1

    def write_films(
        self, pipeline: object, requests: Sequence[FilmRequest], progress: Callable[[int, int], None]
    ) -> list[GeneratedFilm]:
        made = []
        for number, request in enumerate(requests, start=sum(map(len, self.requests))):
            split, index = ("seen", 2 + number) if number < 3 else ("unseen", number - 1)
            scenes = clips(tell_scenes(split, index, len(request.scenes)))
            scenes = self.change(number, scenes)
            ids = tuple((5, 7, 11) for _ in scenes)
            made.append(
                GeneratedFilm(request=request, clip=_joined(scenes), scenes=tuple(scenes), ids=ids, metadata={})
            )
        self.requests.append(list(requests))
        total = sum(len(request.scenes) for request in requests)
        progress(total, total)
        return made


def _joined(scenes: Sequence[Clip]) -> Clip:
    join = SeamlessJoin(fps=8.0, sample_rate=16_000)
    frames, samples = [], []
    for scene in scenes:
        assert scene.samples is not None
        frames.append(join.add_frames(frames_of(scene), starts=True, ends=True))
        samples.append(join.add_samples(scene.samples))
    last = join.close()
    whole = np.concatenate([*samples, last[1]])
    return Clip(frames=np.concatenate([*frames, last[0]]), fps=8.0, samples=whole, sample_rate=16_000)


@pytest.fixture
def studio(monkeypatch: pytest.MonkeyPatch) -> Studio:
    studio = Studio()
    monkeypatch.setattr(films, "load_engine", studio.load_engine)
    monkeypatch.setattr(films, "write_films", studio.write_films)
    monkeypatch.setattr(films, "Pipeline", lambda bundle, engine, adapters: None)
    return studio


def test_an_evaluation_asks_for_films_in_batches_and_writes_what_came_of_them(
    bundle: Bundle, studio: Studio, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, int, str]] = []

    def spoil(number: int, scenes: list[Clip]) -> list[Clip]:
        return [scenes[0], drawn(0)[1].clip] if number == 2 else scenes  # the last film of seen

    studio.change = spoil
    monkeypatch.setattr(films, "_BATCH", 2)
    measured = films.evaluate_films(
        bundle,
        ["seen", "unseen", "seen"],
        3,
        2,
        tmp_path / "report",
        num_scenes=2,
        seed=100,
        engine="torch",
        sampling={"temperature": 0.5, "top_k": None},
        progress=lambda done, total, split: seen.append((done, total, split)),
    )
    assert [len(batch) for batch in studio.requests] == [2, 1, 2, 1]
    third = studio.requests[1][0]
    assert third.scenes == tuple(scene.caption for scene in draw_film("seen", 4, 2))
    assert (third.sampling.seed, third.sampling.temperature) == (104, 0.5)  # a scene takes a seed
    assert third.decoding is None
    assert studio.options["num_scenes"] == 2
    assert studio.options["decodings"] == ["autoregressive"]
    assert studio.closed == 1
    assert seen == [(4, 6, "seen"), (6, 6, "seen"), (4, 6, "unseen"), (6, 6, "unseen")]

    report = json.loads((tmp_path / "report" / "report.json").read_text())
    measures, scenes = report["measures"], report["scenes"]
    assert measures["films with the object asked for in all scenes, seen"] == pytest.approx(2 / 3, abs=1e-3)
    assert measures["films with the object asked for in all scenes, unseen"] == 1.0
    assert measures["attributes right, unseen"] >= 0.97
    assert measures["last scene minus first, points, seen"] < -5
    name = "borders with a click ratio under 2"
    assert measures[f"{name}, unseen"] == measures[f"{name}, as drawn, unseen"] > 0
    assert [scene["colour"]["right"] for scene in scenes["seen"]] == [3, 2]
    assert report["summary"]["seen"]["colour"]["count"] == 6
    assert "scenes repeat" not in report["about"]
    text = (tmp_path / "report" / "report.md").read_text()
    assert text.count("| scene | colour |") == 2
    assert "\n| 2 | 66.7 | " in text
    assert measured.facts["attributes_right"]["unseen"] == measures["attributes right, unseen"]
    assert set(measured.tables) <= set(text.split("\n"))
    assert not list((tmp_path / "report").glob("*.part"))
    assert matplotlib.image.imread(tmp_path / "report" / "unseen.png").shape == (3 * 120, 1600, 4)


def test_films_longer_than_drawn_ones_say_so_and_fill_several_lines(
    bundle: Bundle, studio: Studio, tmp_path: Path
) -> None:
    films.evaluate_films(bundle, ["seen"], 1, 2, tmp_path, num_scenes=10, engine="torch", progress=lambda *told: None)
    about = json.loads((tmp_path / "report.json").read_text())["about"]
    assert "drawn scene (k - 1) % 8 + 1" in about["scenes repeat"]
    assert studio.options["num_scenes"] == 4  # the tiny model has positions for no more
    assert studio.requests[0][0].scenes[8:] == studio.requests[0][0].scenes[:2]
    assert matplotlib.image.imread(tmp_path / "seen.png").shape[0] == 2 * 120


def test_what_cannot_be_evaluated_is_told_before_an_engine_starts(
    bundle: Bundle, studio: Studio, tmp_path: Path
) -> None:
    evaluate = functools.partial(films.evaluate_films, bundle, output=tmp_path, progress=lambda *told: None)
    for splits, count, num_scenes in ((["sean"], 1, 2), (["seen"], 0, 2), (["seen"], 1, 0)):
        with pytest.raises(ConfigError):
            evaluate(splits, count, 0, num_scenes=num_scenes)
    assert not studio.options


def test_the_engine_is_closed_when_films_cannot_be_written(bundle: Bundle, studio: Studio, tmp_path: Path) -> None:
    def fail(number: int, scenes: list[Clip]) -> list[Clip]:
        raise ConfigError("no")

    studio.change = fail
    with pytest.raises(ConfigError, match="no"):
        films.evaluate_films(bundle, ["seen"], 1, 0, tmp_path, num_scenes=2, progress=lambda *told: None)
    assert studio.closed == 1
