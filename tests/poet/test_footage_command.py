"""`poet encode` on footage: what is asked wrongly is one line, what is asked rightly ends in shards and a report."""

import json
import os
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from poet.data.shards import open_shards
from poet.media import Clip, write_clip
from poet.testing import tiny_tokenizer_bundle

FPS, N, H, W, RATE = 8.0, 5, 24, 40, 8000
Call = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_tokenizer_bundle(tmp_path_factory.mktemp("bundle") / "tiny").path


def film(path: Path, seconds: float = 2.5, shade: int = 60, size: tuple[int, int] = (H, W)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    count = round(seconds * FPS)
    frames = np.zeros((count, *size, 3), np.uint8)
    frames[:] = (shade + (np.abs(90 - np.arange(count) * 7 % 180) if shade > 30 else np.zeros(count))).reshape(
        -1, 1, 1, 1
    )
    samples = (0.3 * np.sin(np.arange(round(seconds * RATE)) / 5)).astype(np.float32)
    write_clip(Clip(frames=frames, fps=FPS, samples=samples, sample_rate=RATE), path)
    return path


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--drop", "dull"], "black, frozen, silent, duplicate"),
        (["--drop", "all,blakc"], "got blakc"),
        (["--ray", "local", "--processes", "2"], "--processes 2"),
        (["--split", "acts"], "shots or length"),
        (["--black-level", "9"], "--drop black"),
        (["--drop", "black", "--frozen-level", "1"], "--drop frozen"),
        (["--shot-threshold", "2", "--split", "length"], "--split shots"),
        (["--require", "smell"], "picture, sound, caption"),
        (["--require", "smell", "--split", "shots"], "picture, sound, caption"),
        (["--split", "shots", "--shot-threshold", "-1"], "above 0"),
        (["--drop", "black", "--black-level", "300"], "0 to 255"),
    ],
)
def test_options_that_cannot_be_used_are_told_in_one_line(
    call: Call, bundle: Path, tmp_path: Path, options: list[str], words: str
) -> None:
    film(tmp_path / "in" / "a.mp4")
    code, out, err = call("encode", "in", "--model", bundle, "-o", "out", *options)
    assert (code, out) == (1, "")
    assert words in err
    assert len(err.strip().splitlines()) == 1
    assert not (tmp_path / "out" / "manifest.json").exists()


@pytest.mark.parametrize("options", [["--split", "shots"], ["--drop", "all"], ["--caption", "x"]])
def test_toybox_needs_none_of_this(call: Call, bundle: Path, options: list[str]) -> None:
    code, _, err = call("encode", "toybox:seen", "--count", 1, "--model", bundle, "-o", "out", *options)
    assert code == 1
    assert "toybox:seen" in err
    assert "files" in err


def test_a_film_becomes_captioned_scenes_and_a_report(call: Call, bundle: Path, tmp_path: Path) -> None:
    film(tmp_path / "in" / "a.mp4")
    film(tmp_path / "in" / "b.mp4", shade=5)
    (tmp_path / "in" / "b.txt").write_text("night")
    options = ("--split", "shots", "--drop", "all", "--caption", "waves", "--processes", 0)
    code, out, err = call("encode", "in", "--model", bundle, "-o", "out", *options, "--json")
    assert code == 0, err
    told = json.loads(out)
    assert (told["files"], told["unusable_files"], told["scenes"], told["clips"]) == (2, 0, 8, 4)
    assert told["dropped"] == {"black": 4, "frozen": 0, "silent": 0, "duplicate": 0}
    assert {row.text for row in open_shards(tmp_path / "out", None)} == {"waves"}
    assert (tmp_path / "out" / "report.md").read_text().count("![scenes dropped") == 1
    assert told["files_of_an_earlier_run"] == 0
    again = json.loads(call("encode", "in", "--model", bundle, "-o", "out", *options, "--json")[1])
    assert (again["of_an_earlier_run"], again["files_of_an_earlier_run"]) == (4, 2)
    code, _, err = call("encode", "in", "--model", bundle, "-o", "out", "--split", "length")
    assert (code, "same settings" in err) == (1, True)


def test_where_no_scene_is_left_the_report_says_why(call: Call, bundle: Path, tmp_path: Path) -> None:
    film(tmp_path / "in" / "a.mp4", shade=5)
    code, out, err = call("encode", "in", "--model", bundle, "-o", "out", "--split", "length", "--drop", "black")
    assert (code, out) == (1, "")
    assert "at least one scene to keep, got none" in err
    assert "black" in (tmp_path / "out" / "report.md").read_text()
    # The journal is kept, so other levels need no new look at the files.
    options = ("--drop", "black", "--black-level", 1, "--json")
    code, out, _ = call("encode", "in", "--model", bundle, "-o", "out", "--split", "length", *options)
    assert (code, json.loads(out)["clips"]) == (0, 4)


def test_a_part_of_the_scenes_is_encoded_with_start_and_count(call: Call, bundle: Path, tmp_path: Path) -> None:
    film(tmp_path / "in" / "a.mp4")
    options = ("--split", "length", "--start", 1, "--count", 2, "--json")
    code, out, _ = call("encode", "in", "--model", bundle, "-o", "out", *options)
    assert (code, json.loads(out)["clips"]) == (0, 2)
    assert [row.key for row in open_shards(tmp_path / "out", None)] == ["a.mp4#t=0.625,1.250", "a.mp4#t=1.250,1.875"]
    listed = [json.loads(line) for line in (tmp_path / "out" / "scenes.jsonl").read_text().splitlines()]
    assert [one["start"] for one in listed] == [0.625, 1.25]


@pytest.mark.parametrize(
    "more",
    [("--drop", "black"), ("--drop", "black", "--black-level", 250), ("--caption", "x"), ("--count", 1)],
    ids=["other scenes", "none", "other words", "fewer"],
)
def test_a_refused_command_leaves_the_report_of_the_shards_that_are_there(
    call: Call, bundle: Path, tmp_path: Path, more: tuple[object, ...]
) -> None:
    film(tmp_path / "in" / "a.mp4")
    film(tmp_path / "in" / "b.mp4", shade=5)
    command = ("encode", "in", "--model", bundle, "-o", "out", "--split", "length", "--processes", 0)
    assert call(*command)[0] == 0

    def contents() -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}

    before = contents()
    assert {"report.json", "report.md", "scenes.jsonl", "manifest.json"} <= set(before)
    code, out, err = call(*command, *more)
    assert (code, out) == (1, "")
    assert "was begun with" in err or "at least one scene" in err
    assert contents() == before


def test_a_list_of_scenes_that_was_lost_or_changed_is_written_again(call: Call, bundle: Path, tmp_path: Path) -> None:
    film(tmp_path / "in" / "a.mp4")
    command = ("encode", "in", "--model", bundle, "-o", "out", "--split", "length", "--processes", 0)
    assert call(*command)[0] == 0
    for name in ("scenes.jsonl", "report.md", "report.json"):
        path = tmp_path / "out" / name
        before = path.read_bytes()
        path.write_text("something else")
        assert call(*command)[0] == 0
        assert path.read_bytes() == before
    # The same files at another place are the same clips, which lie there.
    (tmp_path / "moved").mkdir()
    (tmp_path / "in").rename(tmp_path / "moved" / "in")
    assert call(command[0], "moved/in", *command[2:])[0] == 0
    lines = (tmp_path / "out" / "scenes.jsonl").read_text().splitlines()
    assert {json.loads(line)["path"] for line in lines} == {str(tmp_path / "moved" / "in" / "a.mp4")}


@pytest.mark.parametrize("options", [(), ("--split", "length")])
def test_a_file_whose_name_is_no_text_is_skipped_with_a_reason(
    call: Call, bundle: Path, tmp_path: Path, options: tuple[object, ...]
) -> None:
    film(tmp_path / "in" / "a.mp4")
    odd = os.fsencode(tmp_path / "in") + b"/caf\xe9.mp4"
    os.rename(film(tmp_path / "in" / "b.mp4"), odd)  # noqa: PTH104 (a name in bytes)
    code, out, err = call("encode", "in", "--model", bundle, "-o", "out", "--processes", 0, *options, "--json")
    assert code == 0, err
    assert "caf\ufffd.mp4: its name must be text in UTF-8" in err
    assert json.loads(out)["clips"] == (4 if options else 1)


@pytest.mark.parametrize("options", [(), ("--split", "shots", "--processes", 1)])
def test_archives_are_encoded_like_the_files_in_them(
    call: Call, bundle: Path, tmp_path: Path, options: tuple[object, ...]
) -> None:
    for name in ("a", "b"):
        film(tmp_path / "in" / f"{name}.mp4", shade=50 if name == "a" else 90)
        (tmp_path / "in" / f"{name}.txt").write_text(f"film {name}")
    (tmp_path / "tars").mkdir()
    with tarfile.open(tmp_path / "tars" / "00.tar", "w") as archive:
        for path in sorted((tmp_path / "in").iterdir()):
            archive.add(path, path.name)
    for name in ("in", "tars"):
        code, _, err = call("encode", name, "--model", bundle, "-o", f"out-{name}", *options)
        assert code == 0, err
    plain, packed = (list(open_shards(tmp_path / f"out-{name}", None)) for name in ("in", "tars"))
    assert [row.key for row in packed] == [f"00.tar/{row.key}" for row in plain]
    assert [row.text for row in packed] == [row.text for row in plain]
    for one, other in zip(plain, packed, strict=True):
        np.testing.assert_array_equal(one.video_codes, other.video_codes)  # type: ignore[arg-type]
        np.testing.assert_array_equal(one.audio_codes, other.audio_codes)  # type: ignore[arg-type]


@pytest.mark.slow
def test_a_long_film_is_cut_and_read_in_little_memory(tmp_path: Path) -> None:
    """360 s of 320 x 180 pixels are 500 MB; what is needed besides the imports is a tenth of that."""
    path = film(tmp_path / "in" / "film.mp4", seconds=360, size=(180, 320))
    code = f"""
import resource
from pathlib import Path
from poet.data.footage import FootageSource, survey_footage
from poet.data.scene_choice import DropSettings
from poet.data.scene_measuring import SurveySettings
from poet.data.shot_cuts import ShotCuts
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
ShotCuts()
before = peak()
settings = SurveySettings(split="shots", num_frames=17, fps=8.0, sample_rate=16000)
footage = survey_footage(Path({str(path.parent)!r}), Path({str(tmp_path / "out")!r}), settings, DropSettings())
source = FootageSource(footage, height=64, width=64)
for start in range(0, len(source) - 8, 8):
    source.read_run(range(start, start + 8))
print(len(source), before, peak())
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    scenes, before, after = map(int, result.stdout.split())
    assert scenes >= 100
    assert after - before < 50
