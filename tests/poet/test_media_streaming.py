"""Clips written piece by piece: what has come can be seen while more is coming, and in the end it is a whole clip."""

import resource
import signal
import subprocess
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from numpy.typing import NDArray

from poet.errors import ConfigError, MediaError, ShapeError
from poet.media import Clip, ClipStream, probe, read_audio, read_clip, write_clip

AAC_FRAME = 1024
BEHIND = 2
"""Pictures by which ffmpeg's muxer stays behind."""

FPS, RATE, HEIGHT, WIDTH = 8.0, 16000, 46, 58
METADATA = {"prompt": 'a "red" star — étoile\n', "seed": "7"}


def smooth_frames(count: int, height: int = HEIGHT, width: int = WIDTH) -> NDArray[np.uint8]:
    y, x = np.mgrid[:height, :width]
    i = np.arange(count)[:, None, None]
    waves = [np.sin((x + 3 * i) / 17), np.cos((y - 2 * i) / 13), np.sin((x + y + 3 * i) / 23)]
    return (128 + 100 * np.stack(waves, axis=-1)).astype(np.uint8)


def chirp(count: int, rate: int = RATE) -> NDArray[np.float32]:
    """A rising tone: unlike a steady one it matches itself at one shift only."""
    t = np.arange(count) / rate
    return (0.4 * np.sin(2 * np.pi * (200 * t + 300 * t * t))).astype(np.float32)


def opened(path: Path, **changes: Any) -> ClipStream:
    settings: dict[str, Any] = {"fps": FPS, "height": HEIGHT, "width": WIDTH, "sample_rate": RATE}
    return ClipStream(path, **(settings | changes))


def psnr(a: NDArray[np.uint8], b: NDArray[np.uint8]) -> float:
    return float(10 * np.log10(255**2 / np.mean((a.astype(float) - b) ** 2)))


def lag(found: NDArray[np.float32], wanted: NDArray[np.float32]) -> int:
    """Samples by which `found` comes later than `wanted`, by cross-correlation."""
    size = 1 << (len(found) + len(wanted)).bit_length()
    place = int(np.argmax(np.fft.irfft(np.fft.rfft(found, size) * np.conj(np.fft.rfft(wanted, size)), size)))
    return place if place < size // 2 else place - size


def num_pictures(path: Path) -> int:
    """Pictures that somebody who opens the file now can decode."""
    with av.open(path) as container:
        return sum(1 for _ in container.decode(video=0))


def test_pictures_can_be_seen_after_each_write_though_their_sound_is_late(tmp_path: Path) -> None:
    frames, samples, path = smooth_frames(34), chirp(68000), tmp_path / "a.mp4"
    with opened(path) as stream:
        for scene in range(2):
            for start, end in ((0, 1), (1, 5), (5, 9), (9, 13), (13, 17)):
                stream.write(frames=frames[17 * scene + start : 17 * scene + end])
                if 17 * scene + end > BEHIND:
                    assert 17 * scene + end - BEHIND <= num_pictures(path) <= 17 * scene + end
            stream.write(samples=samples[34000 * scene : 34000 * (scene + 1)])
    assert num_pictures(path) == 34
    assert [file.name for file in tmp_path.iterdir()] == ["a.mp4"]


def test_who_began_to_watch_sees_the_same_pictures_to_the_end(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    with opened(path, sample_rate=None) as stream:
        stream.write(frames=smooth_frames(9))
        early = read_clip(path).frames
        watcher = path.open("rb")
        stream.write(frames=smooth_frames(5))
    late = read_clip(path).frames
    assert early is not None
    assert late is not None
    assert len(early) >= 9 - BEHIND
    np.testing.assert_array_equal(late[: len(early)], early)
    with watcher, av.open(watcher) as container:
        assert sum(1 for _ in container.decode(video=0)) == 14


@pytest.mark.parametrize(("fps", "rate"), [(8.0, 16000), (30000 / 1001, 44100), (Fraction(24), 17000)])
def test_a_finished_stream_is_the_clip_that_write_clip_writes(tmp_path: Path, fps: float | Fraction, rate: int) -> None:
    frames, length = smooth_frames(29), round(29 / fps * rate)
    samples = chirp(length, rate)
    write_clip(Clip(frames, float(fps), samples, rate), tmp_path / "whole.mp4", METADATA)
    with opened(tmp_path / "pieces.mp4", fps=fps, sample_rate=rate) as stream:
        for start, end in ((0, 13), (13, 29)):
            stream.write(frames=frames[start:end])
            stream.write(samples=samples[length * start // 29 : length * end // 29])
        stream.metadata = METADATA
    of_whole, of_pieces = probe(tmp_path / "whole.mp4"), probe(tmp_path / "pieces.mp4")
    for name in ("fps", "height", "width", "video_codec", "pixel_format", "audio_codec", "sample_rate", "metadata"):
        assert getattr(of_pieces, name) == getattr(of_whole, name), name
    assert abs(of_pieces.duration - of_whole.duration) < (AAC_FRAME + 1) / of_pieces.sample_rate + 0.001
    whole, pieces = (read_clip(tmp_path / f"{name}.mp4", sample_rate=rate) for name in ("whole", "pieces"))
    assert whole.frames is not None
    assert pieces.frames is not None
    assert whole.samples is not None
    assert pieces.samples is not None
    assert pieces.frames.shape == frames.shape
    # 42 dB measured for both; colours of the wrong matrix or range fall below 30.
    assert psnr(pieces.frames, frames) > 38
    assert len(pieces.samples) == len(whole.samples)
    assert lag(pieces.samples, samples) == 0
    end = len(samples) - rate // 500  # the length in the header of the whole is rounded to milliseconds
    np.testing.assert_allclose(pieces.samples[:end], whole.samples[:end], atol=1e-3)
    data = (tmp_path / "pieces.mp4").read_bytes()
    assert b"moof" not in data
    assert data.index(b"moov") < data.index(b"mdat")  # the index first, as in any other clip


@pytest.mark.parametrize("order", ["sound first", "in turns", "one picture"])
def test_sound_is_in_time_in_whatever_order_it_comes(tmp_path: Path, order: str) -> None:
    frames, samples = smooth_frames(1 if order == "one picture" else 9), chirp(18000)
    with opened(tmp_path / "a.mp4") as stream:
        if order == "in turns":
            for place in range(9):
                stream.write(samples=samples[2000 * place : 2000 * (place + 1)])
                stream.write(frames=frames[place : place + 1])
        else:
            stream.write(samples=samples)
            stream.write(frames=frames)
    back = read_audio(tmp_path / "a.mp4", RATE)
    assert 0 <= len(back) - 18000 < AAC_FRAME
    assert lag(back, samples) == 0


def test_a_growing_file_says_already_what_makes_it(tmp_path: Path) -> None:
    with opened(tmp_path / "a.mp4", sample_rate=None) as stream:
        stream.metadata = {"prompt": "a star"}
        stream.write(frames=smooth_frames(4))
        assert probe(tmp_path / "a.mp4").metadata == {"prompt": "a star"}
        stream.metadata = METADATA
    assert probe(tmp_path / "a.mp4").metadata == METADATA


def test_a_link_is_replaced_and_what_it_leads_to_stays(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    real, link = tmp_path / "real" / "x.mp4", tmp_path / "link.mp4"
    real.write_bytes(b"somebody's")
    link.symlink_to(real)
    with opened(link, sample_rate=None) as stream:
        stream.write(frames=smooth_frames(4))
    assert real.read_bytes() == b"somebody's"
    assert not link.is_symlink()
    assert num_pictures(link) == 4


def test_a_first_piece_that_cannot_be_written_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    path.write_bytes(b"the old one")
    with pytest.raises(MediaError, match="cannot be written"), opened(path, height=2, width=20_000) as stream:
        stream.write(frames=np.zeros((1, 2, 20_000, 3), np.uint8))
    assert path.read_bytes() == b"the old one"
    assert list(tmp_path.iterdir()) == [path]


def test_pictures_alone_of_odd_size(tmp_path: Path) -> None:
    frames = smooth_frames(3, 31, 43)
    with opened(tmp_path / "a.mp4", height=31, width=43, sample_rate=None) as stream:
        stream.write(frames=frames)
    about, back = probe(tmp_path / "a.mp4"), read_clip(tmp_path / "a.mp4").frames
    assert (about.has_video, about.has_audio, about.duration) == (True, False, 0.375)
    assert back is not None
    assert back.shape == (3, 32, 44, 3)
    assert psnr(back[:, :31, :43], frames) > 35


WRITE_UNTIL_KILLED = """
import sys, time
import numpy as np
from poet.media import ClipStream
with ClipStream(sys.argv[1], fps=8.0, height=46, width=58, sample_rate=16000) as stream:
    for i in range(3):
        stream.write(frames=np.full((5, 46, 58, 3), 50 * i, np.uint8))
        stream.write(samples=np.zeros(10000, np.float32))
    stream.write(frames=np.full((4, 46, 58, 3), 200, np.uint8))
    print("written", flush=True)
    time.sleep(60)
"""


def test_a_killed_process_leaves_a_file_that_plays(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    command = [sys.executable, "-c", WRITE_UNTIL_KILLED, str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"written\n"
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert 19 - BEHIND <= num_pictures(path) <= 19
    back = read_clip(path)
    assert back.frames is not None
    assert [round(float(frame.mean()), -1) for frame in back.frames[[0, 7, 12, 16]]] == [0, 50, 100, 200]


def test_a_full_disk_keeps_what_was_there_and_closes_the_file(tmp_path: Path) -> None:
    path, noise = tmp_path / "a.mp4", np.random.default_rng(0).integers(0, 255, (17, HEIGHT, WIDTH, 3), np.uint8)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    words = r"disk has room.*what was written so far is still there"
    try:
        with pytest.raises(MediaError, match=words), opened(path) as stream:
            stream.write(frames=smooth_frames(9), samples=chirp(18000))
            seen = num_pictures(path)
            # The nearest thing to a full disk that needs no rights: the kernel refuses to let a file grow.
            resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 3000, hard))
            stream.write(frames=noise)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert num_pictures(path) >= seen
    assert [file.name for file in tmp_path.iterdir()] == ["a.mp4"]


def test_an_exception_in_the_block_goes_on_and_the_pieces_stay(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    with pytest.raises(ZeroDivisionError), opened(path) as stream:
        stream.write(frames=smooth_frames(9), samples=chirp(18000))
        raise ZeroDivisionError
    assert num_pictures(path) >= 9 - BEHIND
    with pytest.raises(ZeroDivisionError), opened(tmp_path / "none.mp4") as stream:
        raise ZeroDivisionError
    assert not (tmp_path / "none.mp4").exists()
    with pytest.raises(MediaError, match="is closed"):
        stream.write(frames=smooth_frames(3))


def test_the_old_file_gives_way_only_to_the_first_piece(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    path.write_bytes(b"the old one")
    with opened(path, sample_rate=None) as stream:
        assert path.read_bytes() == b"the old one"
        with path.open("rb") as reader:
            stream.write(frames=smooth_frames(4))
            assert reader.read() == b"the old one"  # who has it open keeps it
    assert num_pictures(path) == 4


def test_a_wrong_array_is_refused_and_the_stream_goes_on(tmp_path: Path) -> None:
    frames, samples = smooth_frames(3), chirp(6000)
    wrong: list[tuple[Any, Any, str]] = [
        (None, None, "neither"),
        (frames[0], None, "frames must be"),
        (frames[:0], None, "frames must be"),
        (frames.astype(np.float32), None, "frames must be"),
        (frames[:, :-1], None, rf"frames must be \({HEIGHT}, {WIDTH}\).*got \({HEIGHT - 1}, {WIDTH}\)"),
        (frames, samples[None], "samples must be"),
        (frames, samples * 9, "samples must lie"),
    ]
    with opened(tmp_path / "a.mp4") as stream:
        for given, heard, reason in wrong:
            with pytest.raises(ShapeError, match=reason):
                stream.write(frames=given, samples=heard)
            assert not (tmp_path / "a.mp4").exists()
        stream.write(frames=frames, samples=samples)
    assert num_pictures(tmp_path / "a.mp4") == 3
    with opened(tmp_path / "a.mp4", sample_rate=None) as stream:
        with pytest.raises(ShapeError, match="without a sample_rate"):
            stream.write(frames=frames, samples=samples)
        stream.write(frames=frames)


def test_what_cannot_be_streamed_is_refused(tmp_path: Path) -> None:
    (tmp_path / "folder.mp4").mkdir()
    for name, reason in [
        ("a.webm", r"must be an \.mp4, got '\.webm'"),
        ("no/a.mp4", "does not exist"),
        ("folder.mp4", "is a directory"),
    ]:
        with pytest.raises(MediaError, match=reason):
            opened(tmp_path / name)
    for changes, reason in (({"fps": 0}, "fps must be"), ({"sample_rate": 0}, "sample_rate must be")):
        with pytest.raises(ConfigError, match=reason):
            opened(tmp_path / "a.mp4", **changes)
    with pytest.raises(MediaError, match="nothing was written"), opened(tmp_path / "none.mp4"):
        pass
    stream = opened(tmp_path / "a.mp4", sample_rate=None)
    stream.write(frames=smooth_frames(3))
    stream.metadata = {"seed": 7}  # type: ignore[dict-item]
    with pytest.raises(ConfigError, match="metadata must map"):
        stream.close()
    stream.metadata = {"seed": "7"}
    stream.close()
    stream.close()
    assert probe(tmp_path / "a.mp4").metadata == {"seed": "7"}
    with pytest.raises(MediaError, match="is closed"):
        stream.write(frames=smooth_frames(3))
