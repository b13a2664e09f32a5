"""Clips of WebDataset's archives are found with their captions and read where they lie; what is broken is named."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest

from poet.data.clips import FolderSource, open_source, survey_folder
from poet.data.listing import list_clips
from poet.errors import ConfigError, MediaError
from poet.media import Clip, FilePart, probe, read_clip, write_clip

FPS, N, H, W, RATE = 5.0, 7, 22, 34, 8000
SIZE = {"fps": FPS, "height": H, "width": W, "num_frames": N, "sample_rate": RATE}


def film(path: Path, shade: int, sound: bool = True) -> bytes:
    samples = (0.25 * np.sin(np.arange(int(N / FPS * RATE)) / 9)).astype(np.float32) if sound else None
    frames = np.full((N, H, W, 3), shade, np.uint8)
    write_clip(Clip(frames=frames, fps=FPS, samples=samples, sample_rate=RATE), path)
    return path.read_bytes()


def pack(path: Path, *members: tuple[str, bytes]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, content in members:
            header = tarfile.TarInfo(name)
            header.size = len(content)
            archive.addfile(header, io.BytesIO(content))
    return path


@pytest.fixture
def films(tmp_path: Path) -> dict[int, bytes]:
    return {shade: film(tmp_path / f"{shade}.mp4", shade) for shade in (50, 120, 200)}


@pytest.fixture
def archive(tmp_path: Path, films: dict[int, bytes]) -> Path:
    (tmp_path / "set").mkdir()
    return pack(
        tmp_path / "set" / "00.tar",
        ("a.mp4", films[50]),
        ("a.json", json.dumps({"caption": "of json", "width": 3}).encode()),
        ("a.txt", b" of text\n"),
        ("part/b.low.mp4", films[120]),
        ("part/b.json", b'{"caption": "na\xc3\xafve"}'),
        ("b.txt", b"of another sample"),
        ("c.mp4", films[200]),
        ("readme.md", b"not a clip"),
    )


def source(path: Path, **changes: object) -> FolderSource:
    return FolderSource(path, **(SIZE | changes))  # type: ignore[arg-type]


def test_samples_of_an_archive_come_in_its_order_with_the_captions_beside_them(archive: Path) -> None:
    clips = source(archive)
    assert [clips[i].key for i in range(len(clips))] == ["00.tar/a.mp4", "00.tar/part/b.low.mp4", "00.tar/c.mp4"]
    assert [clips[i].caption for i in range(3)] == ["of text", "naïve", None]
    for index, shade in enumerate((50, 120, 200)):
        frames = clips[index].clip.frames
        assert frames is not None
        assert abs(float(frames.mean()) - shade) < 6
    assert source(archive, caption="a film")[2].caption == "a film"
    assert source(archive, caption="a film")[0].caption == "of text"


def test_a_folder_of_archives_is_read_where_it_holds_no_other_clips(archive: Path, films: dict[int, bytes]) -> None:
    pack(archive.parent / "01.tar", ("z.mp4", films[50]))
    assert [one.key for one in list_clips(archive.parent)][-1] == "01.tar/z.mp4"
    assert len(list_clips(archive.parent)) == 4
    (archive.parent / "own.mp4").write_bytes(films[50])
    assert [one.key for one in list_clips(archive.parent)] == ["own.mp4"]


def test_what_other_systems_hide_in_an_archive_is_left_alone(tmp_path: Path, films: dict[int, bytes]) -> None:
    hidden = [("._a.mp4", b"what macOS keeps"), ("part/._b.mp4", b"beside files"), ("._a.txt", b"\xff")]
    pack(tmp_path / "x.tar", ("a.mp4", films[50]), *hidden, ("part/b.mp4", films[120]), (".part/c.mp4", films[200]))
    assert [one.key for one in list_clips(tmp_path / "x.tar")] == [
        "x.tar/a.mp4", "x.tar/part/b.mp4", "x.tar/.part/c.mp4"
    ]  # fmt: skip


def test_a_member_is_read_like_the_file_that_was_packed(archive: Path, tmp_path: Path) -> None:
    part = list_clips(archive)[0].path
    assert isinstance(part, FilePart)
    alone, packed = read_clip(tmp_path / "50.mp4"), read_clip(part)
    assert alone.frames is not None
    assert packed.frames is not None
    np.testing.assert_array_equal(packed.frames, alone.frames)
    assert packed.samples is not None
    np.testing.assert_array_equal(packed.samples, alone.samples)
    assert probe(part).duration == probe(tmp_path / "50.mp4").duration


@pytest.mark.parametrize("damage", ["cut", "compressed", "text", "caption", "json", "empty"])
def test_broken_archives_and_members_are_named_and_the_rest_is_read(
    tmp_path: Path, films: dict[int, bytes], damage: str
) -> None:
    path = tmp_path / "x.tar"
    bad = {"caption": [("b.txt", b"\xff\xfe\xff")], "json": [("b.json", b'{"caption": 7}')]}.get(damage, [])
    middle = b"" if damage == "empty" else films[120]
    pack(path, ("a.mp4", films[50]), ("b.mp4", middle), *bad, ("c.mp4", films[200]))
    if damage == "cut":
        whole = path.read_bytes()
        path.write_bytes(whole[: whole.index(films[200]) + 100])
    elif damage == "compressed":
        with tarfile.open(path, "w:gz") as archive:
            archive.add(tmp_path / "50.mp4", "a.mp4")
    elif damage == "text":
        path.write_text("not an archive" * 99)
    clips = source(path)
    broken = {}
    for index in range(len(clips)):
        try:
            clips[index]
        except MediaError as error:
            broken[error.filename] = str(error)
    if damage in ("compressed", "text"):
        assert set(broken) == {"x.tar"}
        assert "without compression" in broken["x.tar"]
    elif damage == "cut":
        assert set(broken) == {"x.tar/c.mp4", "x.tar"}
        assert len(clips) == 4
    else:
        assert set(broken) == {"x.tar/b.mp4"}
        assert {"empty": "0 bytes"}.get(damage, "must be a caption") in broken["x.tar/b.mp4"]
        assert len(clips) == 3


def test_links_that_lead_nowhere_and_empty_folders_are_listed_but_folders_of_clips_are_not(
    tmp_path: Path, films: dict[int, bytes]
) -> None:
    root = tmp_path / "films"
    (root / "folder.mp4").mkdir(parents=True)
    (root / "real.mp4").mkdir()
    (root / "real.mp4" / "inside.mp4").write_bytes(films[50])
    (root / "lost.mp4").symlink_to(tmp_path / "nowhere.mp4")
    clips = source(root)
    assert [one.key for one in list_clips(root)] == ["folder.mp4", "lost.mp4", "real.mp4/inside.mp4"]
    for index, words in ((0, "directory"), (1, "does not exist")):
        with pytest.raises(MediaError, match=words):
            clips[index]
    assert clips[2].clip.frames is not None
    assert [key for key, _ in survey_folder(root).unreadable] == ["folder.mp4", "lost.mp4"]


@pytest.mark.parametrize(("required", "words"), [("sound", "no sound"), ("caption", "no caption")])
def test_what_is_required_and_not_there_is_said(tmp_path: Path, required: str, words: str) -> None:
    film(tmp_path / "still.mp4", 90, sound=False)
    assert source(tmp_path)[0].caption is None
    with pytest.raises(MediaError, match=words) as raised:
        source(tmp_path, required=[required])[0]
    assert raised.value.filename == "still.mp4"
    assert source(tmp_path, required=["picture"])[0].clip.frames is not None


def test_sound_alone_is_refused_where_a_picture_is_required(tmp_path: Path) -> None:
    write_clip(Clip(frames=None, fps=0.0, samples=np.zeros(900, np.float32), sample_rate=RATE), tmp_path / "hum.wav")
    with pytest.raises(MediaError, match="no picture"):
        source(tmp_path, required=["picture"])[0]
    with pytest.raises(ConfigError, match="smell"):
        source(tmp_path, required=["smell"])


def test_names_of_sources_without_the_new_options_are_those_of_old(archive: Path, tmp_path: Path) -> None:
    """Shards that were begun before captions could be given must still be gone on with."""
    old = tmp_path / "old"
    old.mkdir()
    film(old / "b.mp4", 9)
    assert source(old).name == "files:old#9947f276ea4914ee"
    names = {source(old).name, source(old, caption="x").name, source(old, required=["sound"]).name}
    assert len(names) == 3
    with pytest.raises(ConfigError, match="files"):
        open_source("toybox:seen", count=1, caption="x")
