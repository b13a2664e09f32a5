"""Sources read folders and manifests alike, name the file that is broken, and keep their name only with their clips."""

import csv
import json
import pickle
from pathlib import Path

import numpy as np
import pytest

from poet.data.clips import FolderSource, open_source
from poet.errors import ConfigError, MediaError
from poet.media import Clip, write_clip

FPS, N, H, W, RATE = 5.0, 7, 22, 34, 8000
S = int(N / FPS * RATE)
SIZE = {"fps": FPS, "height": H, "width": W, "num_frames": N, "sample_rate": RATE}


def write(path: Path, shade: int, frames: int = N) -> None:
    """A clip of one gray, which survives compression, with a quiet hum."""
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = np.full((frames, H, W, 3), shade, np.uint8)
    sound = (0.25 * np.sin(np.arange(int(frames / FPS * RATE)) / 9)).astype(np.float32)
    write_clip(Clip(frames=None if path.suffix == ".wav" else picture, fps=FPS, samples=sound, sample_rate=RATE), path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "films"
    write(root / "b.mp4", 200)
    write(root / "a" / "deep.mp4", 50)
    write(root / "c.wav", 0)
    (root / "a" / "deep.txt").write_text("  a deep film, naïve\n", encoding="utf-8")
    (root / "c.txt").write_text("\n")
    (root / "notes.md").write_text("not a clip")
    return root


def source(path: Path, **changes: object) -> FolderSource:
    return FolderSource(path, **(SIZE | changes))  # type: ignore[arg-type]


def test_a_folder_is_read_in_the_order_of_its_names(folder: Path) -> None:
    clips = source(folder)
    assert len(clips) == 3
    assert [clips[i].key for i in range(3)] == ["a/deep.mp4", "b.mp4", "c.wav"]
    assert [clips[i].caption for i in range(3)] == ["a deep film, naïve", None, None]
    for index, shade in ((0, 50), (1, 200)):
        clip = clips[index].clip
        assert clip.frames is not None
        assert clip.samples is not None
        assert clip.frames.shape == (N, H, W, 3)
        assert clip.samples.shape == (S,)
        assert abs(float(clip.frames.mean()) - shade) < 6
        assert (clip.fps, clip.sample_rate) == (FPS, RATE)
    assert clips[2].clip.frames is None
    with pytest.raises(IndexError):
        clips[3]


def test_other_sizes_and_rates_are_brought_to_the_wanted_ones(folder: Path) -> None:
    clip = source(folder, fps=10.0, height=12, width=10, num_frames=5, sample_rate=4000)[1].clip
    assert clip.frames is not None
    assert clip.samples is not None
    assert clip.frames.shape == (5, 12, 10, 3)
    assert clip.samples.shape == (2000,)


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_a_manifest_gives_paths_and_captions(folder: Path, kind: str) -> None:
    manifest = folder / f"list.{kind}"
    entries = [
        {"path": "b.mp4", "caption": 'a bright film, "loud"', "licence": "CC0"},
        {"path": "a/deep.mp4", "caption": "", "licence": "CC0"},
    ]
    with manifest.open("w", newline="", encoding="utf-8") as file:
        if kind == "jsonl":
            file.write("\n".join(json.dumps(entry) for entry in entries) + "\n\n")
        else:
            table = csv.DictWriter(file, ["licence", "path", "caption"])
            table.writeheader()
            table.writerows(entries)
    clips = source(manifest)
    assert [clips[i].key for i in range(len(clips))] == ["b.mp4", "a/deep.mp4"]
    assert [clips[i].caption for i in range(2)] == ['a bright film, "loud"', "a deep film, naïve"]


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_a_manifest_says_where_in_a_file_a_clip_begins(folder: Path, kind: str) -> None:
    usual = source(folder, num_frames=2)
    fps = 8.0
    line = {"jsonl": '{{"path": "b.mp4", "start": {}}}\n', "csv": "b.mp4,{}\n"}[kind]
    manifest = folder / f"list.{kind}"
    manifest.write_text(("path,start\n" if kind == "csv" else "") + line.format(0) + line.format(3 / fps))
    clips = source(manifest, fps=fps, num_frames=2)
    whole = source(folder, fps=fps, num_frames=5)[[usual[i].key for i in range(len(usual))].index("b.mp4")].clip
    assert [clips[i].key for i in range(2)] == ["b.mp4", "b.mp4#t=0.375"]
    for place, first in ((0, 0), (1, 3)):
        found = clips[place].clip.frames
        assert found is not None
        assert whole.frames is not None
        assert np.array_equal(found, whole.frames[first : first + 2])
    name = clips.name
    manifest.write_text(manifest.read_text().replace("0.375", "0.25"))
    assert source(manifest, fps=fps, num_frames=2).name != name


def test_hidden_files_are_left_alone(folder: Path) -> None:
    name, count = source(folder).name, len(source(folder))
    (folder / "._b.mp4").write_bytes(b"what another system keeps beside a file")
    assert (source(folder).name, len(source(folder))) == (name, count)


def test_the_name_changes_with_the_files_the_captions_and_the_sizes_only(folder: Path) -> None:
    name = source(folder).name
    moved = folder.parent / "elsewhere" / folder.name
    moved.parent.mkdir()
    folder.rename(moved)
    assert source(moved).name == name
    assert str(moved.parent) not in name
    assert source(moved, fps=6.0).name != name
    assert source(moved, num_frames=5).name != name
    write(moved / "d.mp4", 9)
    assert source(moved).name != name
    lists = [moved / "one" / "list.jsonl", moved / "two" / "list.jsonl"]
    for path, caption in zip(lists, ("red", "blue"), strict=True):
        path.parent.mkdir()
        path.write_text(json.dumps({"path": "../b.mp4", "caption": caption}))
    assert source(lists[0]).name != source(lists[1]).name


@pytest.mark.parametrize("damage", ["garbage", "missing", "short", "bad caption"])
def test_a_file_that_cannot_be_read_is_named(folder: Path, damage: str) -> None:
    (folder / "list.jsonl").write_text('{"path": "b.mp4"}\n{"path": "bad.mp4"}\n')
    clips = source(folder / "list.jsonl")
    if damage == "garbage":
        (folder / "bad.mp4").write_bytes(b"not a film" * 99)
    elif damage == "short":
        write(folder / "bad.mp4", 9, frames=N - 2)
    elif damage == "bad caption":
        write(folder / "bad.mp4", 9)
        (folder / "bad.txt").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(MediaError, match="bad") as raised:
        clips[1]
    assert raised.value.filename == "bad.mp4"
    assert clips[0].key == "b.mp4"


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("l.jsonl", '{"path": "b.mp4"}\nnonsense\n', "line 2"),
        ("l.jsonl", '["b.mp4"]\n', "line 1"),
        ("l.jsonl", '{"caption": "b"}\n', "entry 1"),
        ("l.jsonl", '{"path": "b.mp4", "caption": 7}\n', "entry 1"),
        ("l.jsonl", "\n", "at least one clip"),
        ("l.csv", "file,caption\nb.mp4,x\n", "entry 1"),
        ("l.csv", b"\xff\xfe", "UTF-8"),
        ("l.csv", "path,start\nb.mp4,soon\n", "start of entry 1"),
        ("l.jsonl", '{"path": "b.mp4", "start": -1}\n', "start of entry 1"),
        ("l.jsonl", '{"path": "b.mp4", "start": [1]}\n', "start of entry 1"),
        ("l.jsonl", f'{{"path": "b.mp4", "start": {"9" * 400}}}\n', "start of entry 1"),
        ("l.jsonl", '{"path": "b.mp4", "caption": "\\ud800"}\n', "caption of entry 1"),
        ("l.txt", "b.mp4", "manifest"),
    ],
)
def test_a_manifest_that_cannot_be_used_is_refused(folder: Path, name: str, content: str | bytes, words: str) -> None:
    (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(ConfigError, match=words):
        source(folder / name)


def test_what_does_not_exist_or_is_empty_is_refused(tmp_path: Path) -> None:
    for path, words in ((tmp_path / "nowhere", "does not exist"), (tmp_path / "no.csv", "cannot be read")):
        with pytest.raises(ConfigError, match=words):
            source(path)
    with pytest.raises(ConfigError, match="at least one clip"):
        source(tmp_path)


def test_toybox_is_opened_by_its_name() -> None:
    clips = open_source("toybox:seen", count=3, start=11)
    assert len(clips) == 3
    assert clips[2].caption
    again = open_source("toybox:seen", count=1, start=13)
    np.testing.assert_array_equal(clips[2].clip.frames, again[0].clip.frames)
    assert clips.name != again.name
    with pytest.raises(ConfigError, match="count"):
        open_source("toybox:seen")
    with pytest.raises(ConfigError, match="nowhere"):
        open_source("toybox:nowhere", count=1)


def test_a_part_of_a_folder_can_be_opened(folder: Path) -> None:
    part = open_source(folder, start=1, count=2, **SIZE)  # type: ignore[arg-type]
    assert [part[i].key for i in range(len(part))] == ["b.mp4", "c.wav"]
    rest = open_source(folder, start=2, **SIZE)  # type: ignore[arg-type]
    assert [rest[i].key for i in range(len(rest))] == ["c.wav"]
    assert len({part.name, rest.name, open_source(folder, **SIZE).name}) == 3  # type: ignore[arg-type]
    with pytest.raises(IndexError):
        part[2]
    with pytest.raises(ConfigError, match="3 clips"):
        open_source(folder, start=2, count=2, **SIZE)  # type: ignore[arg-type]


def test_sources_travel_to_worker_processes(folder: Path) -> None:
    for clips in (source(folder), open_source(folder, start=1, **SIZE), open_source("toybox:seen", count=2)):  # type: ignore[arg-type]
        copy = pickle.loads(pickle.dumps(clips))
        assert copy.name == clips.name
        assert copy[1].key == clips[1].key
