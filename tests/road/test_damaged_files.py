"""In a folder with broken files the good are encoded and the bad are named, and a kill loses nothing."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from poet.cli.main import main
from poet.data.shards import open_shards
from poet.errors import MediaError
from poet.media import Clip, write_clip
from poet.testing import tiny_tokenizer_bundle

FPS, N, H, W, RATE = 8.0, 5, 24, 40, 8000
DISTINCT = 7
WAYS = (
    "truncated", "empty", "text", "no picture", "header", "garbage", "directory", "lost link", "caption", "short"
)  # fmt: skip
WORDS = {
    "truncated": "cut short|damaged|cannot be decoded|nothing at or after|not a video",
    "empty": "0 bytes",
    "text": "is not a video, sound or picture",
    "no picture": "no picture",
    "header": "is not a video, sound or picture",
    "garbage": "damaged",
    "directory": "is a directory",
    "lost link": "does not exist",
    "caption": "must be a caption in UTF-8|no caption",
    "short": "at least 5 frames|none of its 1 shots",
}
MODES = {
    "beginnings": ("--require", "picture,caption"),
    "scenes": ("--require", "picture,caption", "--split", "shots", "--drop", "black,frozen"),
}


def film(path: Path, seed: int, frames: int, picture: bool = True) -> bytes:
    rng = np.random.default_rng(seed)
    start, shift = rng.integers(0, 255, (H, W, 3)), rng.integers(5, 20)
    pixels = np.stack([(start // 3 + shift * number * 2 + 60) % 256 for number in range(frames)]).astype(np.uint8)
    samples = rng.uniform(-0.4, 0.4, round(frames / FPS * RATE)).astype(np.float32)
    write_clip(Clip(frames=pixels if picture else None, fps=FPS, samples=samples, sample_rate=RATE), path)
    content = path.read_bytes()
    path.unlink()
    return content


def spoil(path: Path, way: str, number: int, good: bytes, others: dict[str, bytes]) -> None:
    """Put a broken file there, with a caption beside it."""
    path.with_suffix(".txt").write_text("a broken film")
    rng = random.Random(number)
    if way == "truncated":
        path.write_bytes(good[: len(good) * rng.randint(30, 70) // 100])
    elif way == "empty":
        path.touch()
    elif way == "text":
        path.write_text("this is no film\n" * 50)
    elif way == "header":
        path.write_bytes(rng.randbytes(64) + good[64 : len(good) // 3])
    elif way == "garbage":
        # Behind the index, which stands at the front, and over some of the picture's packets.
        begin = good.index(b"mdat") + 4 + (len(good) - good.index(b"mdat")) // 3
        path.write_bytes(good[:begin] + rng.randbytes(600) + good[begin + 600 :])
    elif way == "directory":
        path.mkdir()
    elif way == "lost link":
        path.symlink_to(path.with_name("nowhere.mkv"))
    elif way == "caption":
        path.write_bytes(good)
        path.with_suffix(".txt").unlink()
        if number % 2:
            path.with_suffix(".txt").write_bytes(b"\xff\xfe\xff")
    else:
        path.write_bytes(others[way])


def fill(folder: Path, count: int, bad: int) -> tuple[list[str], dict[str, str]]:
    """Write `count` files, of which `bad` are broken; keys of the good, and key of each bad -> in which way."""
    folder.mkdir()
    good = [film(folder / "made.mp4", seed, N if seed % 3 else 2 * N) for seed in range(DISTINCT)]
    others = {"short": film(folder / "made.mp4", 99, 2), "no picture": film(folder / "made.mp4", 99, N, picture=False)}
    places = random.Random(0).sample(range(count), bad)
    broken = {place: WAYS[number % len(WAYS)] for number, place in enumerate(places)}
    for number in range(count):
        path = folder / f"{number % 10}" / f"{number:04d}.mp4"
        path.parent.mkdir(exist_ok=True)
        if number in broken:
            spoil(path, broken[number], number, good[1 + number % 2], others)
        else:
            path.write_bytes(good[number % DISTINCT])
            path.with_suffix(".txt").write_text(f"film {number}")
    keys = {number: f"{number % 10}/{number:04d}.mp4" for number in range(count)}
    return [keys[n] for n in range(count) if n not in broken], {keys[n]: way for n, way in broken.items()}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_tokenizer_bundle(tmp_path_factory.mktemp("bundle") / "tiny").path


def sizes(count: int) -> list[object]:
    slow = [pytest.mark.slow, pytest.mark.timeout(3600)]
    return [pytest.param((60, 10), id="60"), pytest.param((count, count // 10), id=str(count), marks=slow)]


@pytest.fixture(scope="module", params=sizes(1000))
def films(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Path, list[str], dict[str, str]]]:
    folder = tmp_path_factory.mktemp("films") / "in"
    yield folder, *fill(folder, *request.param)


def encode(folder: Path, output: Path, bundle: Path, mode: str, *more: str) -> list[str]:
    options = ["--model", str(bundle), "--shard-size", "7", "--json", *MODES[mode], *more]
    return ["encode", str(folder), "-o", str(output), *options]


def shards(directory: Path) -> dict[str, bytes]:
    """All that a later run could differ in, and the journal."""
    kinds = (".parquet", ".json", ".jsonl", ".md", ".png")
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.suffix in kinds}


def forbid_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: object) -> None:
        raise MediaError(f"{path} was opened")

    monkeypatch.setattr("poet.media.opening._open_file", refuse)


@pytest.mark.parametrize("mode", MODES)
def test_good_files_are_encoded_bad_ones_named_and_a_second_run_opens_none(
    films: tuple[Path, list[str], dict[str, str]],
    bundle: Path,
    tmp_path: Path,
    mode: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder, good, broken = films
    command = encode(folder, tmp_path / "out", bundle, mode, "--processes", "0")
    started = time.monotonic()
    assert main(command) == 0
    seconds = time.monotonic() - started
    said = capsys.readouterr()
    rows = list(open_shards(tmp_path / "out", None))
    assert {row.key.partition("#")[0] for row in rows} == set(good)
    assert all(row.text == f"film {int(row.key[2:6])}" for row in rows)
    assert all(row.video_codes is not None and row.audio_codes is not None for row in rows)
    named = dict(
        line.removeprefix("skipped ").split(": ", 1) for line in said.err.splitlines() if line.startswith("skipped ")
    )
    assert set(named) == set(broken)
    for key, way in broken.items():
        assert any(word in named[key] for word in WORDS[way].split("|")), (key, way, named[key])
    if mode == "scenes":
        told = json.loads((tmp_path / "out" / "report.json").read_text())
        assert {one["key"] for one in told["unusable"]} == set(broken)
        doubled = sum(1 for key in good if int(key[2:6]) % DISTINCT % 3 == 0)
        assert len(rows) == told["kept"] == len(good) + doubled
    before = shards(tmp_path / "out")
    forbid_reading(monkeypatch)
    started = time.monotonic()
    assert main(command) == 0
    again = json.loads(capsys.readouterr().out)
    print(f"{mode}: {len(good) + len(broken)} files in {seconds:.1f} s, again in {time.monotonic() - started:.1f} s")
    assert again["of_an_earlier_run"] == again["clips"] == len(rows)
    assert shards(tmp_path / "out") == before


@pytest.mark.parametrize("mode", MODES)
def test_killed_and_started_again_the_shards_are_the_same_to_the_last_byte(
    films: tuple[Path, list[str], dict[str, str]], bundle: Path, tmp_path: Path, mode: str
) -> None:
    folder, good, _ = films
    assert main(encode(folder, tmp_path / "whole", bundle, mode, "--processes", "0")) == 0
    killed = tmp_path / "killed"
    moments: list[Callable[[], bool]] = [lambda: (killed / "shard-000001.parquet").exists()]
    if mode == "scenes":

        def is_looked_through_in_part() -> bool:
            return any(found.read_bytes().count(b"\n") > len(good) // 4 for found in killed.glob("footage-*.jsonl"))

        moments.insert(0, is_looked_through_in_part)
    for is_time in moments:
        # As users start it: with processes that read.
        command = [sys.executable, "-m", "poet.cli.main", *encode(folder, killed, bundle, mode, "--processes", "1")]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        while process.poll() is None and not is_time():
            time.sleep(0.002)
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL
    assert shards(killed) != shards(tmp_path / "whole")
    assert main(encode(folder, killed, bundle, mode, "--processes", "0")) == 0
    assert shards(killed) == shards(tmp_path / "whole")
    open_shards(killed, None).verify()
