"""Scenes of films as they are found: sound that ends early or pauses, clocks that begin anew, and AVI."""

import time
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from poet.data.clips import FolderSource
from poet.data.footage import FootageSource, survey_footage
from poet.data.readahead import Unreadable
from poet.data.scene_choice import DropSettings
from poet.data.scene_measuring import SurveySettings
from poet.errors import MediaError
from poet.media import Clip, read_clip, read_scenes, scan_media

FPS, N, H, W, RATE = 8.0, 5, 24, 40, 8000
SECONDS = N / FPS
SIZE: dict[str, Any] = {"fps": FPS, "height": H, "width": W, "sample_rate": RATE}
CODECS = {".mp4": ("libx264", "aac"), ".mkv": ("libx264", "aac"), ".avi": ("mpeg4", "mp3"), ".ts": ("mpeg4", "mp2")}


def film(
    path: Path, seconds: float, sound: Sequence[tuple[float, float]], fps: int = 24, size: tuple[int, int] = (48, 64)
) -> Path:
    """A picture whose gray is its number, and a tone that is heard from one second to another, several times."""
    path.parent.mkdir(parents=True, exist_ok=True)
    picture_codec, sound_codec = CODECS[path.suffix]
    rows = np.arange(size[0] * size[1] * 3, dtype=np.uint8).reshape(*size, 3) // 8
    with av.open(path, "w") as container:
        picture: Any = container.add_stream(picture_codec, rate=fps)
        picture.height, picture.width, picture.pix_fmt = *size, "yuv420p"
        picture.gop_size = fps
        heard: Any = container.add_stream(sound_codec, rate=16000, layout="mono")
        pieces = [(begin + k / 10, min(0.1, end - begin - k / 10)) for begin, end in sound for k in range(1000)]
        pieces = [(begin, lasts) for begin, lasts in pieces if lasts > 1e-6]
        for number in range(round(seconds * fps)):
            while pieces and pieces[0][0] <= number / fps:
                begin, lasts = pieces.pop(0)
                count, first = round(lasts * 16000), round(begin * 16000)
                samples = 0.3 * np.sin(2 * np.pi * 500 / 16000 * (first + np.arange(count)))
                piece = av.AudioFrame.from_ndarray(samples[None].astype(np.float32), format="fltp", layout="mono")
                piece.sample_rate, piece.pts, piece.time_base = 16000, first, Fraction(1, 16000)
                container.mux(heard.encode(piece))
            frame = av.VideoFrame.from_ndarray(rows + np.uint8(number % 200))
            frame.pts, frame.time_base = number, Fraction(1, fps)
            container.mux(picture.encode(frame))
        container.mux([*picture.encode(None), *heard.encode(None)])
    return path


def scenes_of(folder: Path) -> FootageSource:
    settings = SurveySettings(split="length", num_frames=N, fps=FPS, sample_rate=RATE)
    footage = survey_footage(folder, folder.parent / "out", settings, DropSettings())
    assert not footage.choice.unusable
    return FootageSource(footage, height=H, width=W)


def loudness(clip: Clip) -> float:
    assert clip.samples is not None
    return float(np.abs(clip.samples).mean())


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".avi"])
def test_scenes_behind_the_end_of_the_sound_are_silent_and_whole(tmp_path: Path, suffix: str) -> None:
    film(tmp_path / "in" / f"a{suffix}", 6.0, [(0.0, 2.0)])
    scenes = scenes_of(tmp_path / "in")
    assert len(scenes) == 9
    found = [*scenes.read_run(range(8)), *scenes.read_run(range(8, 9)), *scenes.read_run(range(6, 8))]
    clips = [one.clip for one in found if not isinstance(one, Unreadable)]
    assert len(clips) == 11
    assert all(clip.frames is not None and len(clip.frames) == N for clip in clips)
    assert all(clip.samples is not None and len(clip.samples) == round(SECONDS * RATE) for clip in clips)
    assert [loudness(clip) > 0.1 for clip in clips[:3]] == [True] * 3
    assert all(loudness(clip) < 0.001 for clip in clips[4:])


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".avi"])
@pytest.mark.parametrize("start", [1.5, 3.0, 4.5])
def test_a_clip_that_begins_around_the_end_of_the_sound_can_be_read(tmp_path: Path, suffix: str, start: float) -> None:
    path = film(tmp_path / f"a{suffix}", 6.0, [(0.0, 2.0)])
    clip = read_clip(path, start=start, duration=SECONDS, **SIZE)
    assert clip.frames is not None
    assert len(clip.frames) == N
    assert (loudness(clip) > 0.1) == (start < 2.0)
    usual = FolderSource(tmp_path, num_frames=N, **SIZE)
    assert usual[0].clip.frames is not None


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_a_pause_of_the_sound_is_silence_and_ends_no_scene(tmp_path: Path, suffix: str) -> None:
    film(tmp_path / "in" / f"a{suffix}", 7.0, [(0.0, 1.0), (5.0, 7.0)])
    scenes = scenes_of(tmp_path / "in")
    loud = [loudness(one.clip) for one in scenes.read_run(range(len(scenes))) if not isinstance(one, Unreadable)]
    assert len(loud) == len(scenes) == 11
    assert max(loud[2:7]) < 0.001
    assert min(loud[0], loud[9], loud[10]) > 0.1
    # A run that ends in the pause need not look for sound until the end of the film.
    [alone] = scenes.read_run(range(4, 5))
    assert not isinstance(alone, Unreadable)
    assert loudness(alone.clip) < 0.001


def test_a_file_that_was_cut_is_still_refused_where_its_sound_ended_before(tmp_path: Path) -> None:
    path = film(tmp_path / "a.mkv", 20.0, [(0.0, 2.0)])
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * 6 // 10])
    with pytest.raises(MediaError, match="cut short"):
        read_scenes(path, [15.0], SECONDS, **SIZE)


def test_a_film_whose_clock_begins_anew_is_named(tmp_path: Path) -> None:
    one = film(tmp_path / "one.ts", 3.0, [(0.0, 3.0)]).read_bytes()
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.mp4").write_bytes(one + one)
    film(tmp_path / "in" / "b.mp4", 2.0, [(0.0, 2.0)])
    with pytest.raises(MediaError, match="clock steps back"):
        list(scan_media(tmp_path / "in" / "a.mp4", height=8, width=8, sample_rate=RATE))
    settings = SurveySettings(split="shots", num_frames=N, fps=FPS, sample_rate=RATE)
    footage = survey_footage(tmp_path / "in", tmp_path / "out", settings, DropSettings())
    assert "clock steps back" in footage.choice.unusable[0]
    assert len(FootageSource(footage, height=H, width=W)) == 3


def test_late_scenes_of_an_avi_are_those_read_from_its_beginning_and_cost_no_more(tmp_path: Path) -> None:
    path = film(tmp_path / "a.avi", 60.0, [(0.0, 60.0)], size=(240, 320))
    whole = read_clip(path, **SIZE)
    assert whole.frames is not None
    seconds = {}
    for begin in (3.0, 55.0):
        taken = []
        for _ in range(3):
            before = time.process_time()
            [clip] = read_scenes(path, [begin], SECONDS, **SIZE)
            taken.append(time.process_time() - before)
        seconds[begin] = min(taken)
        assert clip.frames is not None
        np.testing.assert_array_equal(clip.frames, whole.frames[round(begin * FPS) : round(begin * FPS) + N])
        assert loudness(clip) > 0.1
    # Without an index it is read from the beginning.
    data = path.read_bytes()
    assert data.count(b"idx1") == 1
    path.write_bytes(data.replace(b"idx1", b"JUNK"))
    [clip] = read_scenes(path, [55.0], SECONDS, **SIZE)
    assert clip.frames is not None
    np.testing.assert_array_equal(clip.frames, whole.frames[round(55.0 * FPS) : round(55.0 * FPS) + N])
    # From the beginning on, the late one would take some fifteen times as long.
    assert seconds[55.0] < 4 * seconds[3.0]
