"""What must not be read or half-written: every failure is a MediaError that names the file and the reason."""

import errno
import os
import resource
import socket
import struct
import zlib
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from poet.errors import ConfigError, MediaError
from poet.media import Clip, hash_file, opening, probe, read_audio, read_clip, read_image, write_clip, writing

DATA = Path(__file__).parent.parent / "data"
FOOTAGE = DATA / "big_buck_bunny_4s.mp4"
PHOTO = DATA / "big_buck_bunny_353x199.jpg"


def small_clip() -> Clip:
    frames = np.random.default_rng(3).integers(0, 256, (5, 34, 46, 3), dtype=np.uint8)
    samples = (np.sin(np.arange(10000) / 7) / 2).astype(np.float32)
    return Clip(frames, 8.0, samples, 16000)


def written(path: Path) -> bytes:
    write_clip(small_clip(), path)
    return path.read_bytes()


def long_webm(folder: Path) -> bytes:
    frames = np.random.default_rng(5).integers(0, 256, (24, 34, 46, 3), dtype=np.uint8)
    write_clip(Clip(frames, 8.0, None, 0), folder / "long.webm")
    return (folder / "long.webm").read_bytes()


def png_header(height: int, width: int) -> bytes:
    """A PNG that claims a size and holds a few bytes of it."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(10000))) + chunk(b"IEND", b"")


def gif_header(height: int, width: int) -> bytes:
    image = b"\x2c" + struct.pack("<HHHHB", 0, 0, width, height, 0) + b"\x02\x02\x4c\x01\x00"
    return b"GIF89a" + struct.pack("<HHBBB", width, height, 0x80, 0, 0) + bytes(6) + image + b"\x3b"


def jpeg_bytes(height: int, width: int) -> bytes:
    """The real photograph, its header claiming another size."""
    data = PHOTO.read_bytes()
    place = data.index(b"\xff\xc0") + 5
    return data[:place] + struct.pack(">HH", height, width) + data[place + 4 :]


PLAYLIST = "#EXTM3U\n#EXT-X-TARGETDURATION:4\n#EXTINF:4,\nreal.mp4\n#EXT-X-ENDLIST\n"

FILES: dict[str, tuple[Callable[[Path], bytes], str]] = {
    "text.mp4": (lambda _: b"This is not a video.\n" * 40, "not a video"),
    "text.png": (lambda _: b"Neither is this.\n" * 40, "not a video"),
    "empty.mp4": (lambda _: b"", "is empty"),
    "noise.mp4": (lambda _: np.random.default_rng(0).bytes(100_000), "not a video"),
    "zeros.wav": (lambda _: bytes(5000), "not a video"),
    "headless.mp4": (lambda _: FOOTAGE.read_bytes()[-60_000:], "not a video"),
    "cut.mp4": (lambda _: FOOTAGE.read_bytes()[:100_000], "cut short"),
    "cut_in_the_index.mp4": (lambda _: FOOTAGE.read_bytes()[:2_000], "not a video|cut short"),
    "cut.webm": (lambda d: long_webm(d)[:-9000], "cut short|damaged"),
    "cut.wav": (lambda d: written(d / "x.wav")[:9000], "cut short"),
    "cut.gif": (lambda d: written(d / "x.gif")[:4000], "cut short"),
    "cut.png": (lambda d: written(d / "x.png")[:9000], "cut short"),
    "cut.jpg": (lambda _: PHOTO.read_bytes()[:-2000], "cut short"),
    "stub.gif": (lambda _: b"GIF89a", "cut short"),
    "stub.jpg": (lambda _: b"\xff\xd8\xff", "cut short"),
    "bomb.png": (lambda _: png_header(50_000, 50_000), "50000 x 50000 pixels, more than"),
    "bomb.gif": (lambda _: gif_header(65_535, 65_535), "65535 x 65535 pixels, more than"),
    "bomb.jpg": (lambda _: jpeg_bytes(60_000, 50_000), "50000 x 60000 pixels, more than"),
    "lying.png": (lambda _: png_header(300, 300), "cannot be decoded|can be decoded"),
    "list.m3u8": (lambda _: PLAYLIST.encode(), "playlist"),
    "list.mp4": (lambda _: PLAYLIST.encode(), "playlist"),
    "list.ffconcat": (lambda _: b"ffconcat version 1.0\nfile real.mp4\n", "playlist"),
    "list.mpd": (lambda _: b'<?xml version="1.0"?><MPD><Period><BaseURL>real.mp4</BaseURL></Period></MPD>', "playlist"),
    "captions.srt": (lambda _: b"1\n00:00:00,000 --> 00:00:01,000\nhello\n", "not a video"),
}


@pytest.mark.parametrize("name", FILES)
def test_what_cannot_be_read_is_named_with_a_reason(tmp_path: Path, name: str) -> None:
    make, reason = FILES[name]
    (tmp_path / "real.mp4").write_bytes(FOOTAGE.read_bytes())
    (tmp_path / name).write_bytes(make(tmp_path))
    with pytest.raises(MediaError, match=reason) as caught:
        read_clip(tmp_path / name)
    assert str(tmp_path / name) in str(caught.value)
    assert not isinstance(caught.value, av.FFmpegError)


@pytest.mark.parametrize("cut", [37, 500, 1500, 4000, 20_000, 60_000, 150_000, 190_000])
@pytest.mark.parametrize("damage", ["cut", "zeroed", "flipped"])
def test_damage_anywhere_never_raises_anything_but_a_media_error(tmp_path: Path, cut: int, damage: str) -> None:
    data = bytearray(FOOTAGE.read_bytes())
    if damage == "cut":
        data = data[:cut]
    else:
        data[cut : cut + 97] = bytes(97) if damage == "zeroed" else bytes(b ^ 0x55 for b in data[cut : cut + 97])
    (tmp_path / "a.mp4").write_bytes(data)
    for read in (lambda p: read_clip(p, fps=6, height=16, width=16), probe, read_image, lambda p: read_audio(p, 8000)):
        try:
            read(tmp_path / "a.mp4")
        except MediaError as error:
            assert "a.mp4" in str(error)


def test_missing_files_directories_addresses_and_odd_names_are_refused(tmp_path: Path) -> None:
    cases: list[tuple[str | Path, str]] = [
        (tmp_path / "no.mp4", "does not exist"),
        (tmp_path, "is a directory"),
        ("http://127.0.0.1:1/a.mp4", "local file"),
        (f"file://{FOOTAGE}", "local file"),
        (f"concat:{FOOTAGE}|{FOOTAGE}", "does not exist"),
        (f"subfile,,start,0,end,100,,:{FOOTAGE}", "does not exist"),
        ("a\0b.mp4", "cannot be opened"),
        ("x" * 5000, "cannot be opened"),
        (FOOTAGE / "inside.mp4", "cannot be opened"),
        ("/dev/zero", "device, pipe or socket"),
    ]
    for path, reason in cases:
        for read in (read_clip, read_image, probe):
            with pytest.raises(MediaError, match=reason):
                read(path)


def test_pipes_are_refused_at_once_instead_of_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.mp4")
    with pytest.raises(MediaError, match="pipe"):
        read_clip(tmp_path / "pipe.mp4")
    with pytest.raises(MediaError, match="pipe"):
        hash_file(tmp_path / "pipe.mp4")


def test_permission_denied_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Tests may run as root, whom no file refuses.
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(MediaError, match="permission denied"):
        read_clip(FOOTAGE)


def test_a_playlist_causes_no_connection(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.2)
        address = f"http://127.0.0.1:{server.getsockname()[1]}/a.ts"
        (tmp_path / "a.m3u8").write_text(PLAYLIST.replace("real.mp4", address))
        with pytest.raises(MediaError):
            read_clip(tmp_path / "a.m3u8")
        with pytest.raises(TimeoutError):
            server.accept()


def test_references_that_a_format_might_follow_are_refused() -> None:
    with pytest.raises(MediaError, match="not followed"):
        opening._refuse_reference("other.mp4", 0, {})


def test_files_without_what_is_wanted_are_refused(tmp_path: Path) -> None:
    clip = small_clip()
    write_clip(Clip(None, 0.0, clip.samples, 16000), tmp_path / "sound.mp4")
    write_clip(Clip(clip.frames, 8.0, None, 0), tmp_path / "silent.mp4")
    with pytest.raises(MediaError, match="no pictures"):
        read_clip(tmp_path / "sound.mp4", want_video=True)
    with pytest.raises(MediaError, match="no picture"):
        read_image(tmp_path / "sound.mp4")
    with pytest.raises(MediaError, match="no sound"):
        read_clip(tmp_path / "silent.mp4", want_audio=True)
    with pytest.raises(MediaError, match="no sound"):
        read_audio(tmp_path / "silent.mp4", 16000)
    with pytest.raises(MediaError, match="nothing of what is wanted"):
        read_clip(tmp_path / "silent.mp4", want_video=False)
    assert read_clip(tmp_path / "sound.mp4").frames is None
    assert read_clip(tmp_path / "silent.mp4").samples is None


def test_the_cover_of_a_song_is_not_a_video(tmp_path: Path) -> None:
    with av.open(tmp_path / "song.mp4", "w") as container:
        audio: Any = container.add_stream("aac", rate=16000, layout="mono")
        cover: Any = container.add_stream("png", rate=1)
        cover.height, cover.width, cover.pix_fmt = 16, 16, "rgb24"
        cover.disposition = av.stream.Disposition.attached_pic
        frame = av.VideoFrame.from_ndarray(np.full((16, 16, 3), 200, np.uint8))
        frame.pts, frame.time_base = 0, Fraction(1)
        container.mux([*cover.encode(frame), *cover.encode(None)])
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.float32), format="fltp", layout="mono")
        sound.sample_rate, sound.pts, sound.time_base = 16000, 0, Fraction(1, 16000)
        container.mux([*audio.encode(sound), *audio.encode(None)])
    assert not probe(tmp_path / "song.mp4").has_video
    assert read_clip(tmp_path / "song.mp4").frames is None


# Limits


def test_long_files_are_refused_unless_a_part_or_a_larger_limit_is_asked_for() -> None:
    small = {"fps": 4.0, "height": 16, "width": 16}
    with pytest.raises(MediaError, match=r"longer than 3 s.*with start and duration"):
        read_clip(FOOTAGE, max_duration=3.0, **small)  # type: ignore[arg-type]
    with pytest.raises(MediaError, match="longer than 2 s"):
        read_audio(FOOTAGE, 8000, max_duration=2.0)
    assert read_clip(FOOTAGE, max_duration=3.0, duration=2.0, **small).duration == 2.0  # type: ignore[arg-type]
    with pytest.raises(MediaError, match="nothing at or after 9 s"):
        read_clip(FOOTAGE, start=9.0, **small)  # type: ignore[arg-type]


def test_a_header_that_hides_the_length_does_not_lift_the_limit(tmp_path: Path) -> None:
    # MPEG-TS states no length; the limit must hold while decoding.
    with av.open(tmp_path / "a.ts", "w") as container:
        audio: Any = container.add_stream("mp2", rate=16000, layout="mono")
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 80000), np.int16), format="s16", layout="mono")
        sound.sample_rate, sound.pts, sound.time_base = 16000, 0, Fraction(1, 16000)
        container.mux([*audio.encode(sound), *audio.encode(None)])
    with pytest.raises(MediaError, match=r"longer than 1\.5 s"):
        read_clip(tmp_path / "a.ts", max_duration=1.5)


def test_limits_on_frames_memory_streams_and_bytes_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    for module, name, value, reason in [
        ("resampling", "MAX_DECODED_FRAMES", 11, "more than 11 frames decoded"),
        ("resampling", "MAX_CLIP_BYTES", 99_999, "memory"),
        ("opening", "MAX_STREAMS", 1, "2 streams"),
        ("opening", "MAX_FILE_BYTES", 1000, "more than 1000"),
        ("opening", "MAX_FRAME_PIXELS", 1000, "322 x 182 pixels, more than 1000"),
    ]:
        with monkeypatch.context() as patch:
            patch.setattr(f"poet.media.{module}.{name}", value)
            with pytest.raises(MediaError, match=reason):
                read_clip(FOOTAGE)
    monkeypatch.setattr("poet.media.opening.MAX_IMAGE_BYTES", 1000)
    with pytest.raises(MediaError, match="a picture at most"):
        read_image(PHOTO)


def test_a_thin_picture_cannot_be_blown_up_without_bound(tmp_path: Path) -> None:
    write_clip(Clip(np.zeros((1, 1, 9000, 3), np.uint8), 1.0, None, 0), tmp_path / "thin.png")
    with pytest.raises(MediaError, match="too narrow"):
        read_image(tmp_path / "thin.png", 512, 512, "crop")
    with pytest.raises(MediaError, match="would become"):
        read_image(tmp_path / "thin.png", height=512)
    assert read_image(tmp_path / "thin.png", 512, 512, "pad").shape == (512, 512, 3)


@pytest.mark.parametrize(
    "arguments",
    [
        {"fps": 0},
        {"height": 0},
        {"width": -5},
        {"height": 100_000, "width": 100_000},
        {"fit": "stretch"},
        {"start": -1.0},
        {"start": float("nan")},
        {"duration": 0.0},
        {"duration": 1000.0},
        {"max_duration": float("inf")},
        {"sample_rate": 0},
        {"sample_rate": 10**9},
        {"want_video": False, "want_audio": False},
    ],
    ids=str,
)
def test_arguments_out_of_range_are_refused(arguments: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        read_clip(FOOTAGE, **arguments)


# Writing


def test_formats_that_cannot_hold_the_clip_are_refused(tmp_path: Path) -> None:
    clip = small_clip()
    silent, sound = Clip(clip.frames, 60.0, None, 0), Clip(None, 0.0, clip.samples, 16000)
    for what, name, reason in [
        (clip, "a.avi", "suffix must be one of .mp4"),
        (clip, "a", "suffix must be one of"),
        (silent, "a.wav", "holds sound"),
        (sound, "a.gif", "holds pictures"),
        (sound, "a.png", "holds pictures"),
        (silent, "a.gif", "at most 50"),
        (clip, "no/a.mp4", "does not exist"),
    ]:
        with pytest.raises(MediaError, match=reason) as caught:
            write_clip(what, tmp_path / name)
        assert name in str(caught.value)
    with pytest.raises(ConfigError, match="metadata"):
        write_clip(clip, tmp_path / "a.mp4", {"seed": 7})  # type: ignore[dict-item]
    (tmp_path / "folder.mp4").mkdir()
    with pytest.raises(MediaError, match="directory"):
        write_clip(clip, tmp_path / "folder.mp4")
    assert [p.name for p in tmp_path.iterdir()] == ["folder.mp4"]


@pytest.mark.parametrize("suffix", writing.WRITABLE_SUFFIXES)
@pytest.mark.parametrize(("has_video", "has_audio"), [(True, True), (True, False), (False, True)])
def test_a_target_that_passes_its_check_takes_the_clip_and_no_other_does(
    tmp_path: Path, suffix: str, has_video: bool, has_audio: bool
) -> None:
    both = small_clip()
    clip = Clip(both.frames if has_video else None, 8.0, both.samples if has_audio else None, 16000)
    target = tmp_path / f"a{suffix.upper()}"
    if (suffix in (".gif", ".png") and not has_video) or (suffix == ".wav" and not has_audio):
        with pytest.raises(MediaError, match="to be written"):
            writing.check_target(target, has_video=has_video, has_audio=has_audio)
        with pytest.raises(MediaError, match="to be written"):
            write_clip(clip, target)
        assert not target.exists()
    else:
        writing.check_target(target, has_video=has_video, has_audio=has_audio)
        write_clip(clip, target)
        assert target.stat().st_size > 0


@pytest.mark.parametrize("suffix", writing.WRITABLE_SUFFIXES)
def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path: Path, suffix: str) -> None:
    target = tmp_path / f"a{suffix}"
    target.write_bytes(b"the old one")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    # The nearest thing to a full disk that needs no rights: the kernel refuses to let a file grow.
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, hard))
    try:
        with pytest.raises(MediaError, match="disk has room") as caught:
            write_clip(small_clip(), target)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert str(target) in str(caught.value)
    assert target.read_bytes() == b"the old one"
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), KeyboardInterrupt()], ids=repr)
def test_an_interruption_in_the_middle_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    write_clip(small_clip(), tmp_path / "a.mp4")
    before = (tmp_path / "a.mp4").read_bytes()
    real, calls = writing.encode_frame, []

    def fail_at_the_third(*arguments: Any) -> None:
        calls.append(arguments)
        if len(calls) == 3:
            raise error
        real(*arguments)

    monkeypatch.setattr(writing, "encode_frame", fail_at_the_third)
    expected = MediaError if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(expected, match="No space left" if isinstance(error, OSError) else None):
        write_clip(small_clip(), tmp_path / "a.mp4")
    assert len(calls) == 3
    assert (tmp_path / "a.mp4").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["a.mp4"]


def test_names_that_look_like_addresses_or_patterns_are_plain_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("http:a.mp4", "100%d.png", "-y.wav", "été 🐇.gif", "x" * 250 + ".mp4"):
        write_clip(small_clip(), name)
        assert probe(name).duration >= 0
        assert read_clip(name).duration > 0
    assert len(list(tmp_path.iterdir())) == 5


def test_no_file_is_left_open(tmp_path: Path) -> None:
    (tmp_path / "bad.mp4").write_bytes(FOOTAGE.read_bytes()[:100_000])
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(7):
        with pytest.raises(MediaError):
            read_clip(tmp_path / "bad.mp4", fps=2, height=8, width=8)
        write_clip(small_clip(), tmp_path / "a.png")
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_advice_speaks_of_start_and_duration_and_not_in_the_syntax_of_python(tmp_path: Path) -> None:
    (tmp_path / "cut.mp4").write_bytes(FOOTAGE.read_bytes()[:100_000])
    for path, options in (
        (FOOTAGE, {"max_duration": 3.0}),
        (FOOTAGE, {"duration": 1000.0}),
        (tmp_path / "cut.mp4", {}),
    ):
        with pytest.raises((MediaError, ConfigError)) as caught:
            read_clip(path, fps=2, height=8, width=8, **options)
        assert "=" not in str(caught.value).replace(str(tmp_path), "")
        assert "want_" not in str(caught.value)
