"""Reading and writing of media: what goes in comes out, in step, in shape and upright."""

import os
import struct
import subprocess
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from numpy.typing import NDArray

from poet.errors import ConfigError, ShapeError
from poet.media import (
    WRITABLE_SUFFIXES,
    Clip,
    exact_fps,
    probe,
    read_audio,
    read_clip,
    read_image,
    write_clip,
)

DATA = Path(__file__).parent.parent / "data"
FOOTAGE = DATA / "big_buck_bunny_4s.mp4"
PHOTO = DATA / "big_buck_bunny_353x199.jpg"

AAC_FRAME = 1024
METADATA = {"prompt": 'a "red" star — étoile\n', "seed": "7", "note": "x" * 3000}


def chirp(num_samples: int, sample_rate: int) -> NDArray[np.float32]:
    """A rising tone: unlike a steady one it matches itself at one shift only."""
    t = np.arange(num_samples) / sample_rate
    return (0.4 * np.sin(2 * np.pi * (200 * t + 300 * t * t))).astype(np.float32)


def smooth_clip(num_frames: int = 17, height: int = 58, width: int = 74, fps: float = 8.0, rate: int = 16000) -> Clip:
    y, x = np.mgrid[:height, :width]
    frames = [
        np.stack(
            [
                128 + 100 * np.sin((x + 3 * i) / 17),
                128 + 100 * np.cos((y - 2 * i) / 13),
                128 + 90 * np.sin((x + y + 3 * i) / 23),
            ],
            axis=-1,
        )
        for i in range(num_frames)
    ]
    return Clip(np.stack(frames).astype(np.uint8), fps, chirp(round(num_frames / fps * rate), rate), rate)


def psnr(a: NDArray[np.uint8], b: NDArray[np.uint8]) -> float:
    return float(10 * np.log10(255**2 / np.mean((a.astype(float) - b) ** 2)))


def lag(found: NDArray[np.float32], wanted: NDArray[np.float32]) -> int:
    """Samples by which `found` comes later than `wanted`, by cross-correlation."""
    size = 1 << (len(found) + len(wanted)).bit_length()
    product = np.fft.rfft(found, size) * np.conj(np.fft.rfft(wanted, size))
    place = int(np.argmax(np.fft.irfft(product, size)))
    return place if place < size // 2 else place - size


def gray_at(frames: NDArray[np.uint8]) -> NDArray[np.float64]:
    result: NDArray[np.float64] = frames.reshape(len(frames), -1).mean(axis=1)
    return result


def write_gray(path: Path, times: list[Fraction], rate: Fraction, options: dict[str, Any] | None = None) -> None:
    """Frames whose gray is 20 + 75 per second of their own presentation time, so that a frame tells its time."""
    with av.open(path, "w") as container:
        stream: Any = container.add_stream("libx264", rate=rate, options={"crf": "5"})
        stream.height, stream.width, stream.pix_fmt = 34, 46, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 30000)
        for name, value in (options or {}).items():
            setattr(stream, name, value)
        for time in times:
            gray = np.full((34, 46, 3), round(20 + 75 * time), np.uint8)
            frame = av.VideoFrame.from_ndarray(gray).reformat(format="yuv420p")
            frame.pts, frame.time_base = round(time * 30000), Fraction(1, 30000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


# Round trips


def test_mp4_keeps_pictures_sound_and_their_sync(tmp_path: Path) -> None:
    clip = smooth_clip()
    assert clip.frames is not None and clip.samples is not None
    write_clip(clip, tmp_path / "a.mp4")
    back = read_clip(tmp_path / "a.mp4")
    assert back.frames is not None and back.samples is not None
    assert back.frames.shape == clip.frames.shape
    assert (back.fps, back.sample_rate) == (8.0, 16000)
    # Halved chroma and crf 17 measure 42 dB on this picture; colours of the wrong matrix or range fall below 30.
    assert psnr(back.frames, clip.frames) > 38
    assert len(back.samples) == len(clip.samples)
    assert lag(back.samples, clip.samples) == 0
    error = back.samples - clip.samples
    # 42 dB measured at 96 kbit/s; a shift by a single sample would leave 20 dB.
    assert 10 * np.log10(np.mean(clip.samples**2) / np.mean(error**2)) > 30


def test_sound_of_an_mp4_is_as_long_as_its_pictures_to_within_one_aac_frame(tmp_path: Path) -> None:
    clip = smooth_clip(num_frames=23, fps=30000 / 1001, rate=44100)
    assert clip.samples is not None
    write_clip(clip, tmp_path / "a.mp4")
    sound = read_audio(tmp_path / "a.mp4", 44100)
    assert abs(len(sound) - clip.duration * 44100) <= AAC_FRAME
    assert lag(sound, clip.samples) == 0


@pytest.mark.parametrize("rate", [11025, 17000, 48000])
def test_mp4_and_webm_keep_sync_at_any_sample_rate(tmp_path: Path, rate: int) -> None:
    clip = Clip(None, 0.0, chirp(rate * 2, rate), rate)
    assert clip.samples is not None
    for name in ("a.mp4", "a.webm"):
        write_clip(clip, tmp_path / name)
        # Two resamplings may round to a neighbouring sample, no more.
        assert abs(lag(read_audio(tmp_path / name, rate), clip.samples)) <= 1, name


@pytest.mark.parametrize("suffix", WRITABLE_SUFFIXES)
def test_metadata_comes_back_from_every_format(tmp_path: Path, suffix: str) -> None:
    clip = smooth_clip(num_frames=3)
    write_clip(clip, tmp_path / f"a{suffix}", METADATA)
    assert probe(tmp_path / f"a{suffix}").metadata == METADATA
    write_clip(clip, tmp_path / f"b{suffix}")
    assert probe(tmp_path / f"b{suffix}").metadata == {}


def test_mp4_is_made_for_browsers(tmp_path: Path) -> None:
    write_clip(smooth_clip(), tmp_path / "a.mp4")
    data = (tmp_path / "a.mp4").read_bytes()
    assert 0 < data.index(b"moov") < data.index(b"mdat")
    info = probe(tmp_path / "a.mp4")
    assert (info.video_codec, info.pixel_format, info.audio_codec) == ("h264", "yuv420p", "aac")
    assert info.duration == pytest.approx(2.125, abs=0.001)


def test_odd_sizes_gain_a_copy_of_their_last_row_and_column(tmp_path: Path) -> None:
    clip = smooth_clip(num_frames=3, height=31, width=43)
    write_clip(clip, tmp_path / "a.mp4")
    back = read_clip(tmp_path / "a.mp4").frames
    assert back is not None and clip.frames is not None
    assert back.shape == (3, 32, 44, 3)
    assert psnr(back[:, :31, :43], clip.frames) > 35
    assert psnr(back[:, 31:, :43], clip.frames[:, 30:]) > 30


def test_one_frame_makes_a_video_that_lasts(tmp_path: Path) -> None:
    clip = smooth_clip(num_frames=1, fps=4.0)
    write_clip(Clip(clip.frames, 4.0, None, 0), tmp_path / "a.mp4")
    assert read_clip(tmp_path / "a.mp4", fps=4).duration == 0.25
    assert probe(tmp_path / "a.mp4").duration == pytest.approx(0.25, abs=0.001)


def test_gif_keeps_duration_and_nearly_the_colours(tmp_path: Path) -> None:
    clip = smooth_clip()
    assert clip.frames is not None
    write_clip(clip, tmp_path / "a.gif")
    back = read_clip(tmp_path / "a.gif", fps=8.0)
    assert back.frames is not None and back.samples is None
    assert back.frames.shape == clip.frames.shape
    assert psnr(back.frames, clip.frames) > 27  # one palette of 256 dithered colours for 17 colourful frames


def test_png_holds_one_frame_exactly_and_several_in_a_grid(tmp_path: Path) -> None:
    clip = smooth_clip(num_frames=5, height=7, width=11)
    assert clip.frames is not None
    write_clip(Clip(clip.frames[:1], 1.0, None, 0), tmp_path / "one.png", {"seed": "3"})
    np.testing.assert_array_equal(read_image(tmp_path / "one.png"), clip.frames[0])
    write_clip(clip, tmp_path / "five.png")
    sheet = read_image(tmp_path / "five.png")
    assert sheet.shape == (2 * 7, 3 * 11, 3)
    np.testing.assert_array_equal(sheet[7:, 11:22], clip.frames[4])
    assert not sheet[7:, 22:].any()


def test_wav_keeps_sixteen_bits(tmp_path: Path) -> None:
    samples = np.array([-1.0, -0.5, 0.0, 0.25, 1.0] * 77, np.float32)
    write_clip(Clip(None, 0.0, samples, 16000), tmp_path / "a.wav")
    back = read_clip(tmp_path / "a.wav")
    assert back.frames is None and back.samples is not None
    np.testing.assert_allclose(back.samples, samples, atol=1 / 32000)


# Time


@pytest.mark.parametrize("rate", [Fraction(24), Fraction(25), Fraction(30000, 1001), Fraction(30)], ids=str)
def test_every_source_rate_keeps_its_duration_and_timing(tmp_path: Path, rate: Fraction) -> None:
    count = round(rate * 3)
    write_gray(tmp_path / "a.mp4", [i / rate for i in range(count)], rate)
    native = read_clip(tmp_path / "a.mp4")
    assert native.frames is not None and len(native.frames) == count
    assert exact_fps(native.fps) == rate
    slow = read_clip(tmp_path / "a.mp4", fps=8)
    assert slow.frames is not None and len(slow.frames) == 24
    # Half a source frame is at most 1.6 gray levels; coding and rounding add about one.
    np.testing.assert_allclose(gray_at(slow.frames), 20 + 75 * np.arange(24) / 8, atol=3)
    fast = read_clip(tmp_path / "a.mp4", fps=60)
    assert fast.frames is not None and abs(len(fast.frames) - 180) <= 1


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_variable_frame_rate_keeps_its_duration_and_timing(tmp_path: Path, suffix: str) -> None:
    gaps = [Fraction(1, n) for n in (30, 10, 5, 15, 30, 6)] * 4
    times = [sum(gaps[:i], Fraction(0)) for i in range(len(gaps))]
    write_gray(tmp_path / f"a.{suffix}", times, Fraction(30))
    clip = read_clip(tmp_path / f"a.{suffix}", fps=12)
    assert clip.frames is not None
    assert abs(clip.duration - float(times[-1])) <= 0.2
    ticks = np.arange(len(clip.frames)) / 12
    shown = (gray_at(clip.frames) - 20) / 75
    nearest = np.abs(np.array([float(t) for t in times])[:, None] - ticks).min(axis=0)
    # Compared by distance, as two frames may be equally near; one gray level is 0.013 s.
    np.testing.assert_allclose(np.abs(shown - ticks), nearest, atol=0.025)


@pytest.mark.parametrize("suffix", ["mkv", "mp4", "ts"])
def test_a_picture_that_begins_after_the_sound_stays_in_sync(tmp_path: Path, suffix: str) -> None:
    rate, late = 16000, Fraction(3, 4)
    sound = np.zeros(rate * 3, np.float32)
    flash = 1.75  # seconds: the picture turns white and the click is heard
    sound[int(flash * rate) : int(flash * rate) + 400] = 0.9
    with av.open(tmp_path / f"a.{suffix}", "w") as container:
        video: Any = container.add_stream("libx264", rate=8, options={"crf": "5", "bf": "0"})
        video.height, video.width, video.pix_fmt = 34, 46, "yuv420p"
        audio: Any = container.add_stream("aac", rate=rate, layout="mono")
        for i in range(18):
            value = 255 if late + Fraction(i, 8) >= flash else 0
            frame = av.VideoFrame.from_ndarray(np.full((34, 46, 3), value, np.uint8)).reformat(format="yuv420p")
            frame.pts, frame.time_base = i + int(late * 8), Fraction(1, 8)
            container.mux(video.encode(frame))
        heard = av.AudioFrame.from_ndarray(sound[None], format="fltp", layout="mono")
        heard.sample_rate, heard.pts, heard.time_base = rate, 0, Fraction(1, rate)
        container.mux([*audio.encode(heard), *audio.encode(None), *video.encode(None)])
    clip = read_clip(tmp_path / f"a.{suffix}", fps=8)
    assert clip.frames is not None and clip.samples is not None
    seen = int(np.argmax(gray_at(clip.frames) > 128)) / 8
    click = int(np.argmax(np.abs(clip.samples) > 0.3)) / rate
    # MPEG-TS has no way to say that an encoder's first 1,024 samples are padding: they are there as a delay.
    assert seen - click == pytest.approx(0, abs=0.07 if suffix == "ts" else 0.005)
    if suffix != "ts":
        assert seen == flash


def test_sound_is_cut_or_filled_to_the_length_of_the_pictures(tmp_path: Path) -> None:
    clip = smooth_clip()
    assert clip.samples is not None
    for factor in (0.5, 1.5):
        samples = chirp(round(len(clip.samples) * factor), 16000)
        write_clip(Clip(clip.frames, 8.0, samples, 16000), tmp_path / "a.mp4")
        back = read_clip(tmp_path / "a.mp4")
        assert back.samples is not None and len(back.samples) == 34000
    # Alone it keeps its own length, which the file states in milliseconds.
    assert abs(len(read_audio(tmp_path / "a.mp4", 16000)) - 51000) <= 16


@pytest.mark.parametrize("start", [0.5, 4.25])
def test_a_part_is_the_same_as_that_part_of_the_whole(tmp_path: Path, start: float) -> None:
    write_clip(smooth_clip(num_frames=53), tmp_path / "a.mp4")
    whole, part = read_clip(tmp_path / "a.mp4"), read_clip(tmp_path / "a.mp4", start=start, duration=1.375)
    assert whole.frames is not None and whole.samples is not None
    assert part.frames is not None and part.samples is not None
    first = int(start * 8)
    np.testing.assert_array_equal(part.frames, whole.frames[first : first + 11])
    expected = whole.samples[int(start * 16000) :][: len(part.samples)]
    assert len(part.samples) == 22000
    np.testing.assert_allclose(part.samples, expected, atol=1e-3)


def test_a_duration_beyond_the_end_gives_what_there_is() -> None:
    clip = read_clip(FOOTAGE, fps=8, height=16, width=16, start=3.0, duration=50.0, sample_rate=8000)
    assert clip.frames is not None and clip.samples is not None
    assert len(clip.frames) == 8 and len(clip.samples) == 8000


# Size and shape


def test_crop_fills_the_size_and_pad_keeps_everything(tmp_path: Path) -> None:
    wide = np.zeros((40, 120, 3), np.uint8)
    wide[:, :40], wide[:, 40:80], wide[:, 80:] = (255, 0, 0), (0, 255, 0), (0, 0, 255)
    write_clip(Clip(wide[None], 1.0, None, 0), tmp_path / "a.png")
    cropped = read_image(tmp_path / "a.png", 30, 30, "crop")
    assert cropped.shape == (30, 30, 3) and (cropped == (0, 255, 0)).all()
    padded = read_image(tmp_path / "a.png", 30, 30, "pad")
    assert padded.shape == (30, 30, 3)
    assert not padded[:10].any() and not padded[20:].any()
    assert (padded[15, 3] == (255, 0, 0)).all() and (padded[15, 26] == (0, 0, 255)).all()


def test_one_side_alone_keeps_the_aspect_ratio() -> None:
    assert read_image(PHOTO, height=97).shape == (97, 172, 3)
    assert read_image(PHOTO, width=53).shape == (30, 53, 3)
    assert read_image(PHOTO).shape == (199, 353, 3)


def upright_arrow() -> NDArray[np.uint8]:
    """Different in all four corners: red, green, blue, white."""
    picture = np.zeros((32, 48, 3), np.uint8)
    picture[:16, :24], picture[:16, 24:] = (255, 0, 0), (0, 255, 0)
    picture[16:, :24], picture[16:, 24:] = (0, 0, 255), (255, 255, 255)
    return picture


def stored_for(orientation: int) -> NDArray[np.uint8]:
    """The pixels that a camera stores so that this Exif orientation shows `upright_arrow`."""
    p = upright_arrow()
    turned = {
        1: p,
        2: p[:, ::-1],
        3: p[::-1, ::-1],
        4: p[::-1],
        5: p.transpose(1, 0, 2),
        6: np.rot90(p, 1),
        7: np.rot90(p, 2).transpose(1, 0, 2),
        8: np.rot90(p, -1),
    }
    return np.ascontiguousarray(turned[orientation])


@pytest.mark.parametrize("orientation", range(1, 9))
def test_photographs_are_turned_upright(tmp_path: Path, orientation: int) -> None:
    pixels = stored_for(orientation)
    encoder: Any = av.CodecContext.create("mjpeg", "w")
    encoder.height, encoder.width, _ = pixels.shape
    encoder.pix_fmt, encoder.time_base = "yuvj420p", Fraction(1, 25)
    frame = av.VideoFrame.from_ndarray(pixels).reformat(format="yuvj420p")
    jpeg = b"".join(bytes(packet) for packet in encoder.encode(frame) + encoder.encode(None))
    tiff = b"MM\0*" + struct.pack(">IHHHIHHI", 8, 1, 0x0112, 3, 1, orientation, 0, 0)
    exif = b"Exif\0\0" + tiff
    photo = jpeg[:2] + b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif + jpeg[2:]
    (tmp_path / "a.jpg").write_bytes(photo)
    found = read_image(tmp_path / "a.jpg")
    assert found.shape == (32, 48, 3)
    assert psnr(found, upright_arrow()) > 20  # edges blur; a wrong turn leaves 5 dB


@pytest.mark.parametrize(("degrees", "turns"), [(0, 0), (90, 1), (180, 2), (-90, -1)])
def test_video_from_a_turned_telephone_is_turned_upright(tmp_path: Path, degrees: int, turns: int) -> None:
    with av.open(tmp_path / "a.mp4", "w") as container:
        stream: Any = container.add_stream("libx264", rate=8, options={"crf": "5"})
        pixels = np.ascontiguousarray(np.rot90(upright_arrow(), -turns))
        stream.height, stream.width, _ = pixels.shape
        stream.pix_fmt = "yuv420p"
        stream.set_display_rotation(degrees)
        frame = av.VideoFrame.from_ndarray(pixels).reformat(format="yuv420p")
        container.mux([*stream.encode(frame), *stream.encode(None)])
    found = read_clip(tmp_path / "a.mp4", height=32, width=48).frames
    assert found is not None and psnr(found[0], upright_arrow()) > 20


def test_pixels_that_are_not_square_are_stretched(tmp_path: Path) -> None:
    write_gray(tmp_path / "a.mp4", [Fraction(0), Fraction(1, 8)], Fraction(8), {"sample_aspect_ratio": Fraction(3, 2)})
    frames = read_clip(tmp_path / "a.mp4").frames
    assert frames is not None and frames.shape[1:3] == (34, 69)


def test_transparency_stands_over_black_and_hides_its_colour(tmp_path: Path) -> None:
    rgba = np.full((29, 37, 4), 255, np.uint8)
    rgba[:, 19:, 3] = 0
    rgba[7, 5] = (200, 100, 50, 51)
    encoder: Any = av.CodecContext.create("png", "w")
    encoder.height, encoder.width, encoder.pix_fmt, encoder.time_base = 29, 37, "rgba", Fraction(1, 25)
    packets = encoder.encode(av.VideoFrame.from_ndarray(rgba, format="rgba")) + encoder.encode(None)
    (tmp_path / "a.png").write_bytes(b"".join(bytes(packet) for packet in packets))
    found = read_image(tmp_path / "a.png")
    assert (found[:, :4] == 255).all() and not found[:, 19:].any()
    assert found[7, 5].tolist() == [40, 20, 10]


# Sound


def test_channels_are_averaged_without_overload(tmp_path: Path) -> None:
    left = chirp(44100, 44100) * 2.4
    with av.open(tmp_path / "a.wav", "w") as container:
        stream: Any = container.add_stream("pcm_s16le", rate=44100, layout="stereo")
        both = np.stack([left, left * 0.5], axis=1).reshape(1, -1) * 32767
        frame = av.AudioFrame.from_ndarray(both.astype(np.int16), format="s16", layout="stereo")
        frame.sample_rate = 44100
        container.mux([*stream.encode(frame), *stream.encode(None)])
    mono = read_audio(tmp_path / "a.wav", 44100)
    np.testing.assert_allclose(mono, left * 0.75, atol=1e-3)
    down = read_audio(tmp_path / "a.wav", 16000)
    assert len(down) == 16000 and lag(down, (chirp(16000, 16000) * 1.8).astype(np.float32)) == 0


# The real thing


def test_real_footage_reads_at_any_size_and_rate() -> None:
    info = probe(FOOTAGE)
    assert (info.height, info.width, info.fps, info.sample_rate, info.num_channels) == (182, 322, 24.0, 44100, 2)
    assert info.has_video and info.has_audio and info.duration == pytest.approx(4.0, abs=0.01)
    clip = read_clip(FOOTAGE, fps=8, height=64, width=64, sample_rate=16000)
    assert clip.frames is not None and clip.samples is not None
    assert clip.frames.shape == (32, 64, 64, 3) and clip.samples.shape == (64000,)
    assert clip.frames.std() > 20 and 0.005 < float(np.sqrt(np.mean(clip.samples**2))) < 0.5
    assert np.abs(np.diff(clip.frames.astype(int), axis=0)).mean() > 1


def test_real_footage_survives_being_written_again(tmp_path: Path) -> None:
    clip = read_clip(FOOTAGE, duration=0.5)
    write_clip(clip, tmp_path / "again.mp4")
    back = read_clip(tmp_path / "again.mp4")
    assert clip.frames is not None and clip.samples is not None
    assert back.frames is not None and back.samples is not None
    assert back.frames.shape == clip.frames.shape == (12, 182, 322, 3)
    assert psnr(back.frames, clip.frames) > 35
    assert lag(back.samples, clip.samples) == 0


def test_want_flags_choose_what_is_read() -> None:
    assert read_clip(FOOTAGE, duration=0.5, want_audio=False).samples is None
    assert read_clip(FOOTAGE, duration=0.5, want_video=False).frames is None


# Values


@pytest.mark.parametrize(
    ("given", "meant"),
    [(29.97002997002997, Fraction(30000, 1001)), (24, Fraction(24)), (12.5, Fraction(25, 2)), (0.0004, None)],
)
def test_decimal_rates_become_exact(given: float, meant: Fraction | None) -> None:
    assert exact_fps(given) == (meant or Fraction(given))


@pytest.mark.parametrize("bad", [0, -1, float("nan"), float("inf"), 1e6])
def test_rates_out_of_range_are_refused(bad: float) -> None:
    with pytest.raises(ConfigError, match="fps must be"):
        exact_fps(bad)


FRAMES = np.zeros((2, 3, 5, 3), np.uint8)
SAMPLES = np.zeros(7, np.float32)


@pytest.mark.parametrize(
    ("frames", "samples"),
    [
        (None, None),
        (FRAMES[0], None),
        (FRAMES.astype(np.float32), None),
        (FRAMES[:0], None),
        (FRAMES[..., :2], None),
        (None, SAMPLES[None]),
        (None, SAMPLES.astype(np.float64)),
        (None, SAMPLES[:0]),
        (None, SAMPLES + np.float32(1.5)),
        (None, SAMPLES * np.float32("nan")),
    ],
)
def test_clips_of_the_wrong_shape_type_or_range_are_refused(frames: Any, samples: Any) -> None:
    with pytest.raises(ShapeError):
        Clip(frames, 8.0, samples, 16000)


def test_duration_is_the_pictures_and_else_the_sounds() -> None:
    assert Clip(FRAMES, 8.0, SAMPLES, 16000).duration == 0.25
    assert Clip(None, 8.0, np.zeros(4000, np.float32), 16000).duration == 0.25


WRITE_NOISE = """
import sys
import numpy as np
from poet.media import Clip, write_clip
rng = np.random.default_rng(0)
frames = rng.integers(0, 255, (5, 64, 64, 3), dtype=np.uint8)
sound = (rng.normal(size=10_000) / 10).astype(np.float32)
write_clip(Clip(frames=frames, fps=8.0, samples=sound, sample_rate=16_000), sys.argv[1])
"""


@pytest.mark.parametrize("suffix", [".mp4", ".webm"])
def test_the_same_clip_is_the_same_film_whatever_lay_in_memory_before(suffix: str, tmp_path: Path) -> None:
    """glibc fills new memory with a pattern of its own; an encoder that reads what it never wrote shows it."""
    films = []
    for pattern in (0, 1, 85):
        path = tmp_path / f"{pattern}{suffix}"
        environment = os.environ | {"MALLOC_PERTURB_": str(pattern)}
        subprocess.run([sys.executable, "-c", WRITE_NOISE, str(path)], env=environment, check=True)
        films.append((path.stat().st_size, read_clip(path).frames))
    for size, frames in films[1:]:
        assert size == films[0][0]
        np.testing.assert_array_equal(frames, films[0][1])
