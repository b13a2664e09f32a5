"""Films are cut where they cut, every scene keeps its own sound, and what teaches nothing is named and left out."""

import dataclasses
import json
import pickle
import time
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from numpy.typing import NDArray

from poet.data import readahead
from poet.data.clips import open_source
from poet.data.footage import FileSurveys, Footage, FootageSource, survey_footage
from poet.data.footage_journal import journal_name
from poet.data.footage_report import write_report
from poet.data.readahead import Unreadable, runs_of
from poet.data.scene_choice import DROPS, DropSettings
from poet.data.scene_facts import FileFacts
from poet.data.scene_measuring import SurveySettings
from poet.errors import ConfigError, MediaError
from poet.media import Clip, read_clip, read_scenes, scan_media, write_clip

FPS, N, H, W, RATE = 8.0, 5, 24, 40, 8000
SECONDS = N / FPS
SIZE = {"height": H, "width": W}
KINDS = ("red", "blue", "dark", "still", "green")


def settings(split: str | None = "shots", **changes: object) -> SurveySettings:
    return SurveySettings(**({"split": split, "num_frames": N, "fps": FPS, "sample_rate": RATE} | changes))  # type: ignore[arg-type]


def shot(kind: str, frames: int, seed: int = 0) -> NDArray[np.uint8]:
    """A moving pattern in one colour; `dark` is nearly black, `still` does not move."""
    colour = {"red": (250, 60, 60), "blue": (50, 70, 240), "green": (60, 230, 80), "still": (240, 230, 30)}
    rows, columns = np.mgrid[:48, :80]
    made = np.zeros((frames, 48, 80, 3), np.uint8)
    for number in range(frames):
        wave = 0.5 + 0.5 * np.sin((columns + 3 * number + 31 * seed) / 7 + (rows - number) / (9 + seed))
        if kind == "still":  # and smooth, so that compression does not move it either
            wave = (rows + columns) / 128
        made[number] = wave[..., None] * np.array(colour.get(kind, (14, 14, 14)))
    return made


def tone(hertz: float, seconds: float, loudness: float = 0.3) -> NDArray[np.float32]:
    return (loudness * np.sin(2 * np.pi * hertz * np.arange(round(seconds * RATE)) / RATE)).astype(np.float32)


def film(path: Path, *shots: tuple[str, float, float], fps: float = 24.0, seed: int = 0) -> Path:
    """Shots one after the other: kind, seconds, and the pitch of the tone that is heard during it (0: none)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    frames = np.concatenate([shot(kind, round(seconds * fps), seed) for kind, seconds, _ in shots])
    samples = np.concatenate([tone(hertz, seconds, 0.3 if hertz else 0.0) for _, seconds, hertz in shots])
    write_clip(Clip(frames=frames, fps=fps, samples=samples, sample_rate=RATE), path)
    return path


def look(path: Path, directory: Path, *drops: str, split: str | None = "shots", **levels: object) -> Footage:
    return survey_footage(path, directory, settings(split), DropSettings(drops=drops, **levels))  # type: ignore[arg-type]


def starts(footage: Footage) -> list[float]:
    return [round(scene.start, 3) for scene in footage.choice.chosen]


def pitch(samples: NDArray[np.float32]) -> float:
    spectrum = np.abs(np.fft.rfft(samples * np.hanning(len(samples))))
    return float(np.fft.rfftfreq(len(samples), 1 / RATE)[spectrum.argmax()])


def test_a_film_is_cut_at_its_cuts_and_each_scene_keeps_its_own_sound(tmp_path: Path) -> None:
    film(tmp_path / "in" / "film.mp4", ("red", 1.5, 500), ("blue", 0.5, 900), ("green", 2.0, 1400))
    footage = look(tmp_path / "in", tmp_path / "out")
    assert starts(footage) == [0.0, 0.625, 2.0, 2.625, 3.25]
    [facts] = footage.facts
    assert facts.num_cuts == 2
    assert facts.left_over == pytest.approx(4.0 - 5 * SECONDS, abs=0.06)
    clips = FootageSource(footage, **SIZE)
    for index, (channel, hertz) in enumerate([(0, 500), (0, 500), (1, 1400), (1, 1400), (1, 1400)]):
        clip = clips[index].clip
        assert clip.frames is not None
        assert clip.samples is not None
        assert clip.frames.shape == (N, H, W, 3)
        assert len(clip.samples) == round(SECONDS * RATE)
        # No frame of another shot, however near its border.
        assert (clip.frames.mean((1, 2)).argmax(1) == channel).all()
        assert abs(pitch(clip.samples) - hertz) < 20
        assert abs(pitch(clip.samples[-800:]) - hertz) < 40
    assert clips[2].key == "film.mp4#t=2.000,2.625"


def test_sound_stays_in_step_with_the_picture_of_every_scene(tmp_path: Path) -> None:
    """A flash and a click at the same moment, 0.3 s into each second, are found at the same moment of each scene."""
    fps, seconds = 24.0, 12
    frames = np.full((round(seconds * fps), 48, 80, 3), 40, np.uint8)
    samples = np.zeros(seconds * RATE, np.float32)
    for second in range(seconds):
        at = second + 0.3 + second * 0.01
        frames[round(at * fps) : round((at + 0.25) * fps)] = 230
        begin = round(round(at * fps) / fps * RATE)
        samples[begin : begin + RATE // 4] = tone(700, 0.25, 0.8)
    (tmp_path / "in").mkdir()
    write_clip(Clip(frames=frames, fps=fps, samples=samples, sample_rate=RATE), tmp_path / "in" / "film.mp4")
    footage = look(tmp_path / "in", tmp_path / "out", split="length")
    assert len(footage.choice.chosen) == 19
    compared = 0
    for clip in FootageSource(footage, **SIZE).read_run(range(19)):
        assert not isinstance(clip, Unreadable)
        assert clip.clip.frames is not None
        assert clip.clip.samples is not None
        bright = clip.clip.frames.mean((1, 2, 3)) > 130
        loud = np.abs(clip.clip.samples).reshape(N, -1).max(1) > 0.3
        inside = np.flatnonzero(bright[1:] & ~bright[:-1])
        for place in inside:
            # A flash that shows at this tick began at most a tick before.
            onset = np.flatnonzero(np.abs(clip.clip.samples[place * RATE // 8 :]) > 0.2)[0] / RATE
            assert onset <= 0.125 + 1 / 48
            compared += 1
        assert abs(int(bright.sum()) - int(loud.sum())) <= 2
    assert compared >= 6


@pytest.mark.parametrize("suffix", [".mp4", ".webm"])
def test_scenes_read_together_are_those_read_alone(tmp_path: Path, suffix: str) -> None:
    path = film(tmp_path / f"film{suffix}", ("red", 3.0, 500), ("blue", 3.5, 900), seed=2)
    begins = [0.0, 0.625, 2.25, 3.0, 5.5]
    size = {"fps": FPS, "height": H, "width": W, "sample_rate": RATE}
    together = read_scenes(path, begins, SECONDS, **size)  # type: ignore[arg-type]
    for begin, clip in zip(begins, together, strict=True):
        for other in (
            read_clip(path, start=begin, duration=SECONDS, **size),  # type: ignore[arg-type]
            read_scenes(path, [begin], SECONDS, **size)[0],  # type: ignore[arg-type]
        ):
            assert clip.frames is not None
            assert other.frames is not None
            np.testing.assert_array_equal(clip.frames, other.frames)
            assert clip.samples is not None
            assert other.samples is not None
            assert clip.samples.shape == other.samples.shape
            # WebM rounds the times of its packets to milliseconds, and sound is laid where its first packet says.
            inner = clip.samples[8:-8]
            apart = [np.abs(inner - other.samples[k : k + len(inner)]).mean() for k in range(17)]
            assert min(apart[7:10] if suffix == ".mp4" else apart) < 0.02
    with pytest.raises(MediaError, match=r"from 6 s on|nothing at or after"):
        read_scenes(path, [1.0, 6.0], SECONDS, **size)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="ascend"):
        read_scenes(path, [1.0, 0.5], SECONDS, **size)  # type: ignore[arg-type]


def test_a_whole_file_is_seen_and_heard_from_beginning_to_end(tmp_path: Path) -> None:
    path = film(tmp_path / "film.mp4", ("red", 1.0, 500), ("blue", 1.5, 900))
    pictures, sounds = [], []
    for one in scan_media(path, height=12, width=16, sample_rate=RATE):
        (pictures if hasattr(one, "pixels") else sounds).append(one)
    assert len(pictures) == 60
    assert pictures[0].pixels.shape == (12, 16, 3)  # type: ignore[union-attr]
    assert float(pictures[-1].end) == pytest.approx(2.5, abs=0.01)
    heard = np.concatenate([one.samples for one in sounds])  # type: ignore[union-attr]
    assert len(heard) == pytest.approx(2.5 * RATE, abs=2500)
    assert abs(pitch(heard[:6000]) - 500) < 10


def test_black_frozen_silent_and_repeated_scenes_are_dropped_each_for_its_reason(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    film(folder / "a.mp4", ("red", SECONDS, 500))
    film(folder / "b.mp4", ("dark", SECONDS, 500))
    still = np.kron(shot("still", 15), np.ones((1, 4, 4, 1), np.uint8))  # compression moves tiny pictures a little
    write_clip(Clip(frames=still, fps=24.0, samples=tone(500, SECONDS), sample_rate=RATE), folder / "c.mp4")
    film(folder / "d.mp4", ("blue", SECONDS, 0))
    film(folder / "e.mp4", ("red", SECONDS, 1400))  # the picture of a.mp4 with another sound
    again = read_clip(folder / "a.mp4", height=36, width=60)  # another size, compressed twice
    write_clip(again, folder / "f.mp4")
    write_clip(Clip(frames=shot("green", 20), fps=24.0, samples=None, sample_rate=RATE), folder / "g.mp4")
    footage = look(folder, tmp_path / "out", *DROPS, split=None)
    assert [footage.facts[scene.file].key for scene in footage.choice.chosen] == ["a.mp4", "e.mp4"]
    dropped = {footage.facts[scene.file].key: scene for scene in footage.choice.dropped}
    reasons = {key: scene.reason for key, scene in dropped.items()}
    assert reasons == {
        "b.mp4": "black", "c.mp4": "frozen", "d.mp4": "silent", "f.mp4": "duplicate", "g.mp4": "silent"
    }  # fmt: skip
    original = dropped["f.mp4"].original
    assert original is not None
    assert footage.facts[original.file].key == "a.mp4"
    # Each test can be left out, or its level be changed.
    for name, key in (("black", "b.mp4"), ("frozen", "c.mp4"), ("silent", "d.mp4"), ("duplicate", "f.mp4")):
        others = [drop for drop in DROPS if drop != name]
        kept = look(folder, tmp_path / "out", *others, split=None).choice.chosen
        assert key in {footage.facts[scene.file].key for scene in kept}, name
    levels = {"black_level": 1.0, "frozen_level": 0.0, "silent_level": -100.0}
    kept = look(folder, tmp_path / "out", "black", "frozen", split=None, **levels).choice.chosen
    assert {"b.mp4"} <= {footage.facts[scene.file].key for scene in kept}
    strict = look(folder, tmp_path / "out", "silent", split=None, silent_level=0.0)
    assert strict.choice.chosen == ()


def test_the_report_counts_and_shows_what_was_dropped(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    film(folder / "a.mp4", ("red", 1.3, 500), ("dark", 1.3, 500))
    (folder / "b.mp4").write_bytes(b"not a film")
    footage = look(folder, tmp_path / "out", "black", "duplicate", duplicate_level=255.0, duplicate_decibels=100.0)
    summary = write_report(footage, tmp_path / "out")
    assert (summary["files"], summary["unusable_files"], summary["scenes"]) == (2, 1, 4)
    assert summary["dropped"] == {"black": 2, "duplicate": 1}
    assert summary["kept"] == 1
    assert json.loads((tmp_path / "out" / "report.json").read_text()) == summary
    page = (tmp_path / "out" / "report.md").read_text()
    assert "b.mp4" in page
    for name in ("black", "duplicate"):
        assert f"dropped-{name}.png" in page
        sheet = read_clip(tmp_path / "out" / f"dropped-{name}.png").frames
        assert sheet is not None
        assert sheet.shape == (1, 80, 204, 3)
        assert (float(sheet[0, 4:76, 4:100].mean()) > 30) == (name == "duplicate")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    write_report(footage, tmp_path / "out")
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == before


def test_kept_scenes_can_be_read_as_clips_by_whoever_needs_their_pictures(tmp_path: Path) -> None:
    film(tmp_path / "in" / "a.mp4", ("red", 1.5, 500), ("blue", 0.5, 900), ("dark", 0.8, 500), ("green", 1.4, 300))
    (tmp_path / "in" / "a.txt").write_text("a film")
    footage = look(tmp_path / "in", tmp_path / "out", "black")
    write_report(footage, tmp_path / "out")
    scenes = FootageSource(footage, **SIZE)
    manifest = tmp_path / "out" / "scenes.jsonl"
    clips = open_source(manifest, fps=FPS, num_frames=N, sample_rate=RATE, **SIZE)
    assert len(clips) == len(scenes) > 2
    for index in range(len(scenes)):
        one, other = scenes[index], clips[index]
        assert one.caption == other.caption == "a film"
        assert one.clip.frames is not None
        assert other.clip.frames is not None
        assert np.array_equal(one.clip.frames, other.clip.frames)
        assert one.clip.samples is not None
        assert other.clip.samples is not None
        assert np.allclose(one.clip.samples, other.clip.samples, atol=1e-6)
    with pytest.raises(ConfigError, match="cut already"):
        look(manifest, tmp_path / "again")


def test_files_are_looked_through_once_and_those_that_changed_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "in"
    for number, kind in enumerate(("red", "blue", "green")):
        film(folder / f"{number}.mp4", (kind, 1.3, 500))
    (folder / "0.txt").write_text("red waves")
    first = look(folder, tmp_path / "out")
    looked: list[str] = []
    monkeypatch.setattr(
        "poet.data.footage.look_through",
        lambda listed, how, stamp: looked.append(listed.key) or FileFacts(key=listed.key, stamp=stamp, problem="new"),
    )
    again = look(folder, tmp_path / "out")
    assert (looked, again.num_resumed) == ([], 3)
    assert FootageSource(again, **SIZE).name == FootageSource(first, **SIZE).name
    assert FootageSource(again, **SIZE)[0].caption == "red waves"
    # A journal whose last line was torn by a kill loses that line alone.
    journal = tmp_path / "out" / journal_name(settings())
    journal.write_bytes(journal.read_bytes()[:-40])
    look(folder, tmp_path / "out")
    assert looked == ["2.mp4"]
    assert look(folder, tmp_path / "out").num_resumed == 3
    (folder / "0.txt").write_text("other words")
    (folder / "1.mp4").write_bytes(b"x" * 77)
    changed = look(folder, tmp_path / "out")
    assert looked == ["2.mp4", "1.mp4"]
    # Other words need no look at the film, but make another source.
    scenes = FootageSource(changed, **SIZE)
    assert {scenes[index].caption for index in range(len(scenes))} == {"other words"}
    (folder / "0.txt").write_text("red waves")
    assert FootageSource(look(folder, tmp_path / "out"), **SIZE).name != scenes.name
    (folder / "0.txt").write_bytes(b"\xff\xfe\xff")
    assert "must be a caption" in look(folder, tmp_path / "out").choice.unusable[0]
    assert looked == ["2.mp4", "1.mp4"]


def test_other_settings_are_refused_once_there_are_shards_and_kept_beside_each_other_before(tmp_path: Path) -> None:
    film(tmp_path / "in" / "a.mp4", ("red", 1.3, 500))
    first = look(tmp_path / "in", tmp_path / "out")
    other = look(tmp_path / "in", tmp_path / "out", split=None)
    assert (starts(other), other.num_resumed) == ([0.0], 0)
    again = look(tmp_path / "in", tmp_path / "out")
    assert (starts(again), again.num_resumed) == (starts(first), 1)
    (tmp_path / "out" / "manifest.json").write_text("{}")
    with pytest.raises(ConfigError, match="same settings"):
        look(tmp_path / "in", tmp_path / "out", split="length")


def test_rows_of_one_film_keep_the_words_of_their_own(tmp_path: Path) -> None:
    film(tmp_path / "a.mp4", ("red", 0.7, 500))
    (tmp_path / "a.txt").write_text("of the file")
    rows = [{"path": "a.mp4", "caption": "one"}, {"path": "a.mp4"}, {"path": "a.mp4", "caption": "two"}]
    names = []
    for words in ("two", "three"):
        rows[2]["caption"] = words
        (tmp_path / "list.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        footage = look(tmp_path / "list.jsonl", tmp_path / "out")
        scenes = FootageSource(footage, **SIZE)
        assert [scenes[index].caption for index in range(3)] == ["one", "of the file", words]
        names.append(scenes.name)
    assert footage.num_resumed == 3
    assert names[0] != names[1]
    assert (tmp_path / "out" / journal_name(settings())).read_text().count("\n") == 2


def test_a_torn_journal_is_cut_where_its_last_line_is_whole(tmp_path: Path) -> None:
    for number in range(3):
        film(tmp_path / "in" / f"{number}.mp4", ("red", 0.7, 500), seed=number)
    look(tmp_path / "in", tmp_path / "out")
    journal = tmp_path / "out" / journal_name(settings())
    whole = journal.read_bytes()
    for torn, known in ((whole[:-9], 2), (whole[:20], 0), (b"", 0), (b"other words\n" + whole, 0)):
        journal.write_bytes(torn)
        assert look(tmp_path / "in", tmp_path / "out").num_resumed == known
        assert journal.read_bytes() == whole


def test_a_scene_begins_with_the_picture_that_is_held_there(tmp_path: Path) -> None:
    """A slideshow whose pictures change within the second and fourth of its scenes, long after these began."""
    (tmp_path / "in").mkdir()
    with av.open(tmp_path / "in" / "a.mkv", "w") as container:
        stream: Any = container.add_stream("libx264", rate=1000)
        stream.height, stream.width, stream.pix_fmt = 48, 64, "yuv420p"
        for shade, milliseconds in ((0, 0), (0, 500), (255, 900), (255, 1600), (0, 2300), (0, 2600)):
            frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), shade, np.uint8))
            frame.pts, frame.time_base = milliseconds, Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    scenes = FootageSource(look(tmp_path / "in", tmp_path / "out", split="length"), **SIZE)
    changes = []
    for found in scenes.read_run(range(len(scenes))):
        assert not isinstance(found, Unreadable)
        assert found.clip.frames is not None
        shades = found.clip.frames.mean((1, 2, 3))
        changes.append(shades.max() - shades.min() > 200)
    assert changes == [False, True, False, True]
    assert starts(look(tmp_path / "in", tmp_path / "out", "frozen", split="length")) == [0.625, 1.875]


def test_processes_find_what_one_finds(tmp_path: Path) -> None:
    for number, kind in enumerate(("red", "blue", "green")):
        film(tmp_path / "in" / f"{number}.mp4", (kind, 1.3, 500 + 300 * number))
    (tmp_path / "in" / "9.mp4").write_bytes(b"not a film")
    alone = look(tmp_path / "in", tmp_path / "one")
    other = survey_footage(tmp_path / "in", tmp_path / "two", settings(), DropSettings(), num_processes=2)
    assert [one.to_json() for one in other.facts] == [one.to_json() for one in alone.facts]
    one, two = (tmp_path / name / journal_name(settings()) for name in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()
    assert alone.facts[3].problem is not None
    source = FootageSource(other, **SIZE)
    assert pickle.loads(pickle.dumps(source)).name == source.name


def test_sound_alone_is_cut_by_length(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for name, seconds in (("long", 2.0), ("short", 0.4)):
        clip = Clip(frames=None, fps=0.0, samples=tone(500, seconds), sample_rate=RATE)
        write_clip(clip, tmp_path / "in" / f"{name}.wav")
    footage = look(tmp_path / "in", tmp_path / "out", *DROPS[:3])
    assert [footage.facts[scene.file].key for scene in footage.choice.chosen] == ["long.wav"] * 3 + ["short.wav"]
    clips = FootageSource(footage, **SIZE)
    assert [len(clips[i].clip.samples) for i in range(4)] == [5000, 5000, 5000, 3200]  # type: ignore[arg-type]


def test_files_too_short_for_a_scene_say_so(tmp_path: Path) -> None:
    film(tmp_path / "in" / "a.mp4", ("red", 0.5, 500), ("blue", 0.5, 500))
    footage = look(tmp_path / "in", tmp_path / "out")
    assert "none of its 2 shots lasts the 0.625 s" in footage.choice.unusable[0]
    assert "at least 5 frames" not in footage.choice.unusable[0]
    film(tmp_path / "in" / "a.mp4", ("red", 0.4, 500))
    assert "at least 5 frames" in look(tmp_path / "in", tmp_path / "out", split=None).choice.unusable[0]
    with pytest.raises(MediaError, match="at least one scene"):
        FootageSource(footage, **SIZE)


@pytest.mark.parametrize(
    "levels",
    [{"drops": ["dull"]}, {"black_level": 256.0}, {"silent_level": 3.0}, {"required": ["smell"]}, {"frozen_level": -1}],
)
def test_levels_that_cannot_be_used_are_refused(levels: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        DropSettings(**levels)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="shots or length"):
        settings("scenes")
    with pytest.raises(ConfigError, match="above 0"):
        settings("shots", shot_threshold=0.0)


def test_a_part_of_the_scenes_can_be_taken(tmp_path: Path) -> None:
    film(tmp_path / "in" / "a.mp4", ("red", 3.2, 500))
    footage = look(tmp_path / "in", tmp_path / "out")
    whole, part = FootageSource(footage, **SIZE), FootageSource(footage, **SIZE, start=2, count=2)
    assert (len(whole), len(part)) == (5, 2)
    assert part[0].key == whole[2].key
    assert part.name != whole.name
    with pytest.raises(ConfigError, match="5 scenes"):
        FootageSource(footage, **SIZE, start=4, count=2)


def test_runs_end_at_multiples_of_the_stride() -> None:
    assert list(runs_of(range(23), 8, 10)) == [
        range(8), range(8, 10), range(10, 18), range(18, 20), range(20, 23)
    ]  # fmt: skip
    assert list(runs_of(range(10, 23), 8, 10)) == [range(10, 18), range(18, 20), range(20, 23)]
    assert [len(run) for run in runs_of(range(5), 1, None)] == [1] * 5


@dataclasses.dataclass
class Counted:
    """A source in runs, which counts how many of its things were asked for."""

    run_length: int
    asked: int = 0
    name: str = "numbers"

    def __len__(self) -> int:
        return 400

    def __getitem__(self, index: int) -> int:
        return index

    def read_run(self, indices: range) -> list[int]:
        self.asked = max(self.asked, indices.stop)
        return list(indices)


@pytest.mark.parametrize(
    ("run_length", "processes", "most"), [(8, 15, 16 * 8), (8, 0, 32 + 8), (1, 15, 33), (8, 2, 32 + 8)]
)
def test_what_waits_in_memory_is_bounded_in_clips(
    monkeypatch: pytest.MonkeyPatch, run_length: int, processes: int, most: int
) -> None:
    """Every process has a run to read, and one is handed out; not two runs wait for each."""
    source = Counted(run_length)
    monkeypatch.setattr(readahead, "ProcessPoolExecutor", lambda count, *_, **__: ThreadPoolExecutor(count))
    monkeypatch.setattr(readahead, "_read_in_worker", source.read_run)
    items = readahead.read_ahead(source, 0, 32, processes)
    taken = [next(items)]
    time.sleep(0.2)
    assert source.asked <= most
    assert [*taken, *items] == list(range(400))


def test_facts_come_back_from_their_line(tmp_path: Path) -> None:
    film(tmp_path / "in" / "a.mp4", ("red", 1.3, 500))
    [facts] = FileSurveys(look(tmp_path / "in", tmp_path / "out").listed, [(7, 8)], settings())
    back = FileFacts.from_json(facts.to_json())
    assert back.to_json() == facts.to_json()
    assert back.scenes[0].picture is not None
    assert facts.scenes[0].picture is not None
    np.testing.assert_array_equal(back.scenes[0].picture, facts.scenes[0].picture)
    assert back.stamp == facts.stamp == (7, 8)
