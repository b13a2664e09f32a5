"""Clips that are decoded once."""

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from poet.errors import MediaError
from poet.training import kept_frames
from poet.training.kept_frames import KeptFrames

SHAPE = (5, 8, 16, 3)


class Counting:
    """Clips that say how often they were decoded."""

    def __init__(self, count: int = 4) -> None:
        self.asked = [0] * count

    def __len__(self) -> int:
        return len(self.asked)

    def frames(self, index: int) -> NDArray[np.uint8]:
        self.asked[index] += 1
        if index == 3:
            raise MediaError("clip 3 is damaged")
        return np.random.default_rng(index).integers(256, size=SHAPE, dtype=np.uint8)


def test_a_clip_is_decoded_once_for_all_runs(tmp_path: Path) -> None:
    source, plain = Counting(), Counting()
    kept = KeptFrames(source, "clips", tmp_path)
    assert len(kept) == 4
    for _ in range(3):
        for index in (2, 0, 1):
            assert np.array_equal(kept.frames(index), plain.frames(index))
    before = list(source.asked)
    assert max(before) <= 2  # the first is decoded once more, for its shape
    again = Counting()
    other = KeptFrames(again, "clips", tmp_path)
    assert np.array_equal(other.frames(1), plain.frames(1))
    assert again.asked == [1, 0, 0, 0]
    handed = other.frames(1)
    handed[:] = 0
    assert np.array_equal(other.frames(1), plain.frames(1))


def test_other_clips_are_kept_apart(tmp_path: Path) -> None:
    KeptFrames(Counting(), "clips", tmp_path).frames(1)
    for name, count in (("others", 4), ("clips", 6)):
        source = Counting(count)
        KeptFrames(source, name, tmp_path).frames(1)
        assert source.asked[1] == 1


def test_a_damaged_clip_is_no_clip_and_is_asked_for_again(tmp_path: Path) -> None:
    kept = KeptFrames(Counting(), "clips", tmp_path)
    for _ in range(2):
        with pytest.raises(MediaError, match="damaged"):
            kept.frames(3)


def test_what_a_kill_left_half_written_is_written_again(tmp_path: Path) -> None:
    KeptFrames(Counting(), "clips", tmp_path).frames(2)
    (marks,) = tmp_path.glob("*.kept")
    content = bytearray(marks.read_bytes())
    assert content == b"\0\0\1\0"
    content[2] = 0  # the kill came before the mark
    marks.write_bytes(content)
    (frames,) = tmp_path.glob("*.frames")
    half = bytearray(frames.read_bytes())
    half[-len(half) // 2 :] = bytes(len(half) // 2)
    frames.write_bytes(half)
    assert np.array_equal(KeptFrames(Counting(), "clips", tmp_path).frames(2), Counting().frames(2))


def test_more_than_there_is_room_for_is_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(kept_frames, "LARGEST", 100)
    source = Counting()
    kept = KeptFrames(source, "clips", tmp_path / "none")
    for _ in range(2):
        kept.frames(1)
    assert source.asked[1] == 2
    assert not (tmp_path / "none").exists()
    assert "are not kept" in caplog.text
