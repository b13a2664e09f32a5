"""Writing clips: MP4, WebM, GIF, WAV and PNG, each written beside its place and moved there when it is whole."""

import math
import os
import secrets
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.audio.codeccontext import AudioCodecContext
from av.audio.frame import AudioFrame
from av.audio.resampler import AudioResampler
from av.audio.stream import AudioStream
from av.container import OutputContainer
from av.filter import Graph
from av.video.codeccontext import VideoCodecContext
from av.video.format import VideoFormat
from av.video.frame import VideoFrame
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc, VideoReformatter
from av.video.stream import VideoStream
from numpy.typing import NDArray

from poet.errors import ConfigError, MediaError, PoetError
from poet.media import chunks
from poet.media.clip import Clip, exact_fps
from poet.media.opening import MAX_FRAME_PIXELS, pack_metadata
from poet.media.picture import ENLARGE
from poet.media.resampling import round_half_up

BT709 = 1
"""ffmpeg's number for the matrix of high-definition video. Untagged files get their colours guessed by players."""

_MAX_GIF_FPS = 50
"""GIF counts hundredths of a second, and browsers slow delays below two of them down."""

_SMALL_PICTURE = 512 * 512


@dataclass(frozen=True, kw_only=True)
class Film:
    """How one container is filled."""

    format: str
    options: dict[str, str]
    video_codec: str
    video_options: dict[str, str]
    audio_codec: str
    sample_format: str
    sample_rates: tuple[int, ...]

    def rate_for(self, sample_rate: int) -> int:
        """The sample rate to encode at: the next one that the codec knows, its highest for still higher ones."""
        return next((rate for rate in self.sample_rates if rate >= sample_rate), self.sample_rates[-1])


FILMS = {
    ".mp4": Film(
        format="mp4",
        options={"movflags": "+faststart"},  # the index first, so that a browser starts before all is loaded
        video_codec="libx264",
        # Small pictures encoded with mbtree come out otherwise every few hundred times: it reads memory never written.
        video_options={"crf": "17", "preset": "medium", "x264-params": "mbtree=0"},
        audio_codec="aac",
        sample_format="fltp",
        sample_rates=(7350, 8000, 11025, 12000, 16000, 22050, 24000, 32000, 44100, 48000, 64000, 88200, 96000),
    ),
    ".webm": Film(
        format="webm",
        options={},
        video_codec="libvpx-vp9",
        video_options={"crf": "22", "b": "0", "deadline": "good", "cpu-used": "3"},
        audio_codec="libopus",
        sample_format="flt",
        sample_rates=(48000,),
    ),
}


def check_target(path: str | Path, *, has_video: bool = True, has_audio: bool = True) -> None:
    """Raise unless `write_clip` could write there; for work that takes long before there is a clip.

    Args:
        path: where the clip shall go.
        has_video: whether the clip will hold pictures.
        has_audio: whether it will hold sound.

    Raises:
        MediaError: unknown suffix, a format that holds nothing of such a clip, no such directory, or a directory in
            its place.
    """
    target = Path(path)
    if target.suffix.lower() not in _WRITERS:
        known = ", ".join(WRITABLE_SUFFIXES)
        raise MediaError(f"{path}: the suffix must be one of {known}, got {target.suffix!r}. Change the file's name.")
    name = target.suffix[1:].upper()
    if target.suffix.lower() in _PICTURES_ALONE and not has_video:
        raise MediaError(f"{path}: a {name} file holds pictures, and none are to be written. Write .wav or .mp4.")
    if target.suffix.lower() in _SOUND_ALONE and not has_audio:
        raise MediaError(f"{path}: a {name} file holds sound, and none is to be written. Write .mp4, .gif or .png.")
    if not target.parent.is_dir():
        raise MediaError(f"{path}: the directory {target.parent} does not exist. Make it first.")
    if target.is_dir():
        raise MediaError(f"{path}: is a directory. Give the name of a file.")


def write_clip(clip: Clip, path: str | Path, metadata: dict[str, str] | None = None) -> None:
    """Write a clip in the format that the suffix names. The file appears whole or not at all.

    - `.mp4`: H.264 yuv420p and AAC, index first; plays in browsers. `.webm`: VP9 and Opus. Both hold pictures, sound
      or both; a picture with an odd height or width gains one row or column, a copy of its last, as their chroma
      needs even sizes; a sample rate that the codec does not know is raised to the next one that it does.
    - `.gif`: the pictures with one palette of 256 colours, at most 50 frames/s; no sound.
    - `.png`: one frame, or all of them in a grid, row by row, as near to square as can be; no sound.
    - `.wav`: the sound, 16 bits; no pictures.

    Args:
        clip: what to write.
        path: where to, replacing what is there; the directory must exist.
        metadata: kept in the container's comment, one JSON object in ASCII; `probe(path).metadata` returns it.

    Raises:
        MediaError: unknown suffix, the clip lacks what the format holds, or writing fails (no such directory, no
            permission, disk full). What was at the path before is untouched then, and nothing is left beside it.
        ConfigError: metadata is not a dict of strings.
    """
    target = Path(path)
    check_target(target, has_video=clip.frames is not None, has_audio=clip.samples is not None)
    suffix = target.suffix.lower()
    comment = comment_of(metadata)
    part = part_beside(target)
    try:
        _WRITERS[suffix](clip, part, comment)
        settle(part)
        part.replace(target)
    except MediaError as error:
        raise MediaError(f"{path}: {error}") from error
    except PoetError:
        raise
    except (av.FFmpegError, OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise MediaError(
            f"{path}: cannot be written ({reason}). Check that the disk has room and the directory may be written to; "
            "what was there before is unchanged."
        ) from error
    finally:
        part.unlink(missing_ok=True)


def comment_of(metadata: dict[str, str] | None) -> str | None:
    """What a container's comment must be to keep this metadata; None for None.

    Raises:
        ConfigError: metadata is not a dict of strings.
    """
    if metadata is None:
        return None
    if not all(isinstance(x, str) for pair in metadata.items() for x in pair):
        raise ConfigError(f"metadata must map strings to strings, got {metadata!r}. Convert the values with str().")
    return pack_metadata(metadata)


def part_beside(target: Path) -> Path:
    """A new name in the target's directory for what is not yet whole."""
    # Beside the target, so that moving it there is one step on one disk; absolute, so that no name reads as an address.
    return target.parent.resolve() / f".poet-{secrets.token_hex(8)}{target.suffix.lower()}"


def settle(part: Path) -> None:
    """Wait until the bytes lie on the disk: a crash after the move must not leave an empty file."""
    with part.open("rb") as file:
        os.fsync(file.fileno())


def _write_film(clip: Clip, part: Path, comment: str | None) -> None:
    film = FILMS[part.suffix]
    with av.open(part, "w", format=film.format, container_options=film.options) as container:
        if comment is not None:
            container.metadata["comment"] = comment
        video = _add_video(container, film, clip) if clip.frames is not None else None
        audio = _add_audio(container, film, clip) if clip.samples is not None else None
        fps = exact_fps(clip.fps) if video is not None else Fraction(1)
        # Turn by turn: written one after the other, the muxer would hold all of one stream in memory.
        sounds = _encoded_audio(clip, audio, film, fps) if audio is not None else iter(())
        if video is not None and clip.frames is not None:
            reformatter = VideoReformatter()
            for index, pixels in enumerate(clip.frames):
                encode_frame(container, video, to_yuv420(reformatter, pixels), index, fps)
                container.mux(next(sounds, []))
            mux_video(container, video.encode(None), fps)
        for packets in sounds:
            container.mux(packets)


def _add_video(container: OutputContainer, film: Film, clip: Clip) -> VideoStream:
    assert clip.frames is not None
    stream = container.add_stream(film.video_codec, rate=exact_fps(clip.fps), options=dict(film.video_options))
    assert isinstance(stream, VideoStream)
    set_up_video(stream.codec_context, *clip.frames.shape[1:3])
    return stream


def _add_audio(container: OutputContainer, film: Film, clip: Clip) -> AudioStream:
    stream = container.add_stream(film.audio_codec, rate=film.rate_for(clip.sample_rate), layout="mono")
    assert isinstance(stream, AudioStream)
    set_up_audio(stream.codec_context)
    return stream


def set_up_video(encoder: VideoCodecContext, height: int, width: int) -> None:
    """Prepare an encoder for what `to_yuv420` makes of frames of height x width."""
    encoder.height, encoder.width, encoder.pix_fmt = height + height % 2, width + width % 2, "yuv420p"
    encoder.colorspace = encoder.color_primaries = encoder.color_trc = BT709
    encoder.color_range = int(ColorRange.MPEG)
    if height * width <= _SMALL_PICTURE:
        encoder.thread_count = 1  # starting threads costs more than encoding a small picture


def set_up_audio(encoder: AudioCodecContext) -> None:
    """Choose the quality of a mono encoder whose sample rate is set."""
    encoder.bit_rate = min(128_000, 6 * encoder.sample_rate)  # 6 bits per sample is the most that AAC allows


def to_yuv420(reformatter: VideoReformatter, pixels: NDArray[np.uint8]) -> VideoFrame:
    """The frame that an encoder takes for (H, W, 3) uint8 RGB; odd sizes gain a copy of their last row or column."""
    height, width, _ = pixels.shape
    if height % 2 or width % 2:
        pixels = np.pad(pixels, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
    return reformatter.reformat(
        VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24"),
        format="yuv420p",
        dst_colorspace=Colorspace.ITU709,
        dst_color_range=ColorRange.MPEG,
        dst_color_primaries=ColorPrimaries.BT709,
        dst_color_trc=ColorTrc.BT709,
        interpolation=ENLARGE,
        threads=1,
    )


def to_sound(samples: NDArray[np.float32], sample_rate: int, place: int) -> AudioFrame:
    """The frame that a resampler takes for (S,) float32 samples, the first of which is heard at place / sample_rate."""
    frame = AudioFrame.from_ndarray(np.ascontiguousarray(samples[None]), format="flt", layout="mono")
    frame.sample_rate, frame.pts, frame.time_base = sample_rate, place, Fraction(1, sample_rate)
    return frame


def encode_frame(container: OutputContainer, stream: VideoStream, frame: VideoFrame, index: int, fps: Fraction) -> None:
    """Encode frame number `index` and put what comes out into the container."""
    frame.pts, frame.time_base = index, 1 / fps
    mux_video(container, stream.encode(frame), fps)


def mux_video(container: OutputContainer, packets: list[Any], fps: Fraction) -> None:
    """Put coded pictures into the container."""
    for packet in packets:
        if not packet.duration and packet.time_base:
            # Encoders leave it out; without it the last frame, or the only one, would last no time at all.
            packet.duration = round_half_up(1 / fps / packet.time_base)
        container.mux(packet)


def _encoded_audio(clip: Clip, stream: AudioStream, film: Film, fps: Fraction) -> Iterator[list[Any]]:
    """Packets of the sound under each frame in turn, then of the rest; each turn is as long as one frame."""
    assert clip.samples is not None
    rate = stream.rate
    resampler = AudioResampler(format=film.sample_format, layout="mono", rate=rate)
    length, place, turn = len(clip.samples), 0, 0
    while place < length:
        turn += 1
        end = min(length, max(place + 1, round_half_up(turn * clip.sample_rate / fps)))
        frame = to_sound(clip.samples[place:end], clip.sample_rate, place)
        yield [packet for part in resampler.resample(frame) for packet in stream.encode(part)]
        place = end
    rest = [packet for part in resampler.resample(None) for packet in stream.encode(part)]
    yield rest + list(stream.encode(None))


def _write_gif(clip: Clip, part: Path, comment: str | None) -> None:
    assert clip.frames is not None
    frames = clip.frames
    fps = exact_fps(clip.fps)
    if fps > _MAX_GIF_FPS:
        raise MediaError(f"a GIF shows at most {_MAX_GIF_FPS} frames/s, got {float(fps):g}. Write .mp4 instead.")
    with av.open(part, "w", format="gif", container_options={"loop": "0"}) as container:
        stream: Any = container.add_stream("gif", rate=fps)
        _, stream.height, stream.width, _ = frames.shape
        stream.pix_fmt = "pal8"
        palette = _palette(frames, fps)
        for index, frame in enumerate(_paletted(frames, palette, fps)):
            encode_frame(container, stream, frame, index, fps)
        mux_video(container, stream.encode(None), fps)
    if comment is not None:
        part.write_bytes(chunks.with_gif_comment(part.read_bytes(), comment))


def _rgb_source(graph: Graph, frames: NDArray[np.uint8], fps: Fraction) -> Any:
    _, height, width, _ = frames.shape
    return graph.add_buffer(width=width, height=height, format=VideoFormat("rgb24"), time_base=1 / fps)


def _palette(frames: NDArray[np.uint8], fps: Fraction) -> VideoFrame:
    """The 256 colours that serve all frames best, as ffmpeg's 16 x 16 palette picture."""
    graph = Graph()
    source, choose, sink = _rgb_source(graph, frames, fps), graph.add("palettegen"), graph.add("buffersink")
    source.link_to(choose)
    choose.link_to(sink)
    graph.configure()
    for frame in _numbered(frames, fps):
        source.push(frame)
    source.push(None)
    palette = sink.pull()
    assert isinstance(palette, VideoFrame)
    return palette


def _paletted(frames: NDArray[np.uint8], palette: VideoFrame, fps: Fraction) -> Iterator[VideoFrame]:
    graph = Graph()
    source = _rgb_source(graph, frames, fps)
    colours = graph.add_buffer(width=16, height=16, format=palette.format, time_base=1 / fps)
    # Ordered dither: error diffusion flickers where nothing moves and compresses badly.
    use, sink = graph.add("paletteuse", "dither=bayer:bayer_scale=4"), graph.add("buffersink")
    source.link_to(use, 0, 0)
    colours.link_to(use, 0, 1)
    use.link_to(sink)
    graph.configure()
    palette.pts, palette.time_base = 0, 1 / fps
    colours.push(palette)
    colours.push(None)
    for frame in [*_numbered(frames, fps), None]:
        source.push(frame)
        while True:
            try:
                made = sink.pull()
            except (av.BlockingIOError, av.EOFError):
                break
            assert isinstance(made, VideoFrame)
            yield made


def _numbered(frames: NDArray[np.uint8], fps: Fraction) -> Iterator[VideoFrame]:
    for index, pixels in enumerate(frames):
        frame = VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
        frame.pts, frame.time_base = index, 1 / fps
        yield frame


def _write_png(clip: Clip, part: Path, comment: str | None) -> None:
    assert clip.frames is not None
    frames = clip.frames
    count, height, width, _ = frames.shape
    columns = math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    if rows * height * columns * width > MAX_FRAME_PIXELS:
        raise MediaError(
            f"{count} frames of {width} x {height} make a picture of more than {MAX_FRAME_PIXELS} pixels. "
            "Write fewer or smaller frames, or .mp4."
        )
    sheet = np.zeros((rows, columns, height, width, 3), np.uint8)
    sheet.reshape(-1, height, width, 3)[:count] = frames
    pixels = np.ascontiguousarray(sheet.transpose(0, 2, 1, 3, 4)).reshape(rows * height, columns * width, 3)
    encoder: Any = av.CodecContext.create("png", "w")
    encoder.height, encoder.width, encoder.pix_fmt = pixels.shape[0], pixels.shape[1], "rgb24"
    encoder.time_base = Fraction(1, 25)
    packets = encoder.encode(VideoFrame.from_ndarray(pixels, format="rgb24")) + encoder.encode(None)
    data = b"".join(bytes(packet) for packet in packets)
    part.write_bytes(chunks.with_png_comment(data, comment) if comment is not None else data)


def _write_wav(clip: Clip, part: Path, comment: str | None) -> None:
    assert clip.samples is not None
    with av.open(part, "w", format="wav") as container:
        if comment is not None:
            container.metadata["comment"] = comment
        stream = container.add_stream("pcm_s16le", rate=clip.sample_rate, layout="mono")
        assert isinstance(stream, AudioStream)
        values = np.rint(clip.samples * 32767.0).astype(np.int16)
        frame = AudioFrame.from_ndarray(values[None], format="s16", layout="mono")
        frame.sample_rate, frame.pts, frame.time_base = clip.sample_rate, 0, Fraction(1, clip.sample_rate)
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


_WRITERS: dict[str, Callable[[Clip, Path, str | None], None]] = {
    ".mp4": _write_film,
    ".webm": _write_film,
    ".gif": _write_gif,
    ".png": _write_png,
    ".wav": _write_wav,
}

_PICTURES_ALONE, _SOUND_ALONE = (".gif", ".png"), (".wav",)

WRITABLE_SUFFIXES = tuple(_WRITERS)
"""What `write_clip` can write, with the dot."""
