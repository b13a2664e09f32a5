"""Opening a file safely: the limits, what may be opened at all, and one place that turns ffmpeg's errors into ours."""

import hashlib
import json
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any, BinaryIO, Never

import av
from av.audio.stream import AudioStream
from av.container import InputContainer
from av.stream import Disposition
from av.video.stream import VideoStream

from poet.errors import MediaError, PoetError
from poet.media import chunks
from poet.media.clip import MediaInfo
from poet.media.parts import FilePart, open_part

MediaPath = str | Path | FilePart
"""Where media may lie: in a local file, or in a part of one."""

DEFAULT_MAX_DURATION = 600.0
"""Seconds. Ten minutes at 64 x 64 and 24 frames/s are 177 MB; longer reads are almost always a mistake."""

MAX_FRAME_PIXELS = 8192 * 8192
"""Of one decoded frame. The largest that cameras make; a small file can claim far more and fill the memory."""

MAX_CLIP_BYTES = 4 << 30
"""Of one clip's frames, uncompressed: what a machine that runs the small model can hold."""

MAX_DECODED_FRAMES = 500_000
"""In one read. Ten minutes at 240 frames/s are 144,000; this bounds the time a crafted file can take."""

MAX_FILE_BYTES = 64 << 30
"""Frames are streamed, so this only stops disk images and the like; a film in 4K has about 20 GB."""

MAX_IMAGE_BYTES = 256 << 20
"""A still picture is read as one piece, so its compressed size counts against memory."""

MAX_STREAMS = 64
"""Of one file. Real files have a handful; every one costs memory before anything is decoded."""

# Containers that hold their own data. Left out on purpose: playlists and lists of files (hls, dash, concat, imf,
# image2), text that ffmpeg would draw (tty, subtitles), devices, networks, and raw samples, which any file could be.
FORMATS = (
    "3dostr,aac,ac3,aiff,amr,ape,apng,asf,au,av1,avi,bmp_pipe,caf,dts,dv,eac3,exr_pipe,f4v,flac,flv,gif,gif_pipe,gxf,"
    "h264,hdr_pipe,hevc,ico,ivf,j2k_pipe,jpeg_pipe,jpegls_pipe,jpegxl_pipe,jpegxl_anim,loas,m4v,matroska,webm,mjpeg,"
    "mov,mp4,m4a,3gp,3g2,mj2,mp3,mpc,mpc8,mpeg,mpegts,mpegvideo,mxf,nut,obu,ogg,pam_pipe,pbm_pipe,pcx_pipe,pgm_pipe,"
    "png_pipe,ppm_pipe,psd_pipe,qoi_pipe,rm,sgi_pipe,sunrast_pipe,swf,tak,tga_pipe,tiff_pipe,truehd,tta,vc1,voc,w64,"
    "wav,webp_pipe,wtv,wv,xwma,yuv4mpegpipe"
)

_PIXEL_LIMIT = {"max_pixels": str(MAX_FRAME_PIXELS)}


@dataclass(frozen=True, kw_only=True)
class OpenMedia:
    """An opened file: its container, the streams worth reading, and the bytes themselves."""

    name: str
    container: InputContainer
    file: BinaryIO
    size: int
    video: VideoStream | None
    audio: AudioStream | None

    @property
    def is_image(self) -> bool:
        """Whether this is a still picture."""
        name = self.container.format.name
        return name.endswith("_pipe") and name != "yuv4mpegpipe" and name != "gif_pipe"

    def has_format(self, *names: str) -> bool:
        """Whether ffmpeg calls the container by one of these names."""
        return not set(names).isdisjoint(self.container.format.name.split(","))


class _Nameless:
    """A file's bytes without its name: ffmpeg would choose a format by the suffix, and a format that lists files."""

    def __init__(self, file: BinaryIO) -> None:
        self.read = file.read
        self.seek = file.seek
        self.tell = file.tell


def _refuse_reference(url: str, flags: int, options: dict[str, Any]) -> Never:
    raise MediaError(f"the file refers to {url!r}, which is not followed. Give the file that holds the media itself.")


@contextmanager
def open_media(path: MediaPath) -> Iterator[OpenMedia]:
    """A local file opened for decoding; every failure inside the block leaves it as a MediaError that names the file.

    Raises:
        MediaError: missing, unreadable, empty, not media, cut short, too large, or damaged.
    """
    name = str(path)
    file, size = _open_file(path)
    with file:
        try:
            with _open_container(name, file, size) as container:
                media = OpenMedia(
                    name=name,
                    container=container,
                    file=file,
                    size=size,
                    video=_best_video(container),
                    audio=_best_audio(container),
                )
                _check(media)
                yield media
        except PoetError:
            raise
        except (av.FFmpegError, OSError, EOFError, UnicodeError) as error:
            raise MediaError(
                f"{name}: cannot be decoded ({_reason(error)}). The file is damaged, cut short or encrypted; "
                "make or download it again."
            ) from error


def _open_file(path: MediaPath) -> tuple[BufferedReader, int]:
    if "://" in str(path):
        raise MediaError(f"{path}: must be a local file, got an address. Download it and give the file's path.")
    holder = path.path if isinstance(path, FilePart) else Path(path)
    try:
        status = holder.stat()
        # Opening a pipe or a device could wait for ever, so the kind of file is looked at first.
        if stat.S_ISDIR(status.st_mode):
            raise MediaError(f"{path}: must be a media file, is a directory. Name a file in it.")
        if not stat.S_ISREG(status.st_mode):
            raise MediaError(f"{path}: must be a regular file, is a device, pipe or socket. Copy it to a file first.")
        size = path.size if isinstance(path, FilePart) else status.st_size
        if size == 0:
            raise MediaError(f"{path}: is empty (0 bytes). Make or download the file again.")
        if size > MAX_FILE_BYTES:
            raise MediaError(f"{path}: has {size} bytes, more than {MAX_FILE_BYTES}. Cut it into parts.")
        return (open_part(path) if isinstance(path, FilePart) else holder.open("rb")), size
    except MediaError:
        raise
    except FileNotFoundError as error:
        raise MediaError(f"{path}: does not exist. Check the path.") from error
    except PermissionError as error:
        raise MediaError(f"{path}: permission denied. Allow reading (chmod +r) or copy the file.") from error
    except (OSError, ValueError) as error:  # ValueError: a NUL character in the path
        raise MediaError(f"{path}: cannot be opened ({error}). Check the path.") from error


def _open_container(name: str, file: BinaryIO, size: int) -> InputContainer:
    if chunks.is_cut_short(file, size):
        raise MediaError(f"{name}: is cut short, its end is missing. Make or download the file again.")
    _check_pixels(name, chunks.stated_size(file))
    file.seek(0)
    try:
        # A Python file and a refusing io_open leave ffmpeg no way to open anything else by itself.
        return av.open(
            _Nameless(file),
            "r",
            options=dict(_PIXEL_LIMIT),
            container_options={"format_whitelist": FORMATS, "protocol_whitelist": "none"},
            metadata_errors="replace",
            io_open=_refuse_reference,
        )
    except MediaError:
        raise
    except (av.FFmpegError, OSError, ValueError) as error:
        raise MediaError(
            f"{name}: is not a video, sound or picture that can be read ({_reason(error)}). It may be damaged, cut "
            "short, encrypted, a playlist, or another kind of file with a wrong name. Give a media file, e.g. MP4."
        ) from error


def _check(media: OpenMedia) -> None:
    count = len(media.container.streams)
    if count > MAX_STREAMS:
        raise MediaError(f"{media.name}: has {count} streams, more than {MAX_STREAMS}. Keep the ones that are needed.")
    if media.video is not None:
        _check_pixels(media.name, (media.video.height, media.video.width))
        media.video.codec_context.options = dict(_PIXEL_LIMIT)
        # Threads that each hold a frame multiply memory; whoever reads many files reads them in several processes.
        media.video.codec_context.thread_count = 1
        if media.is_image and media.size > MAX_IMAGE_BYTES:
            raise MediaError(f"{media.name}: has {media.size} bytes, a picture at most {MAX_IMAGE_BYTES}. Shrink it.")


def _check_pixels(name: str, size: tuple[int, int] | None) -> None:
    if size is not None and size[0] * size[1] > MAX_FRAME_PIXELS:
        raise MediaError(
            f"{name}: is {size[1]} x {size[0]} pixels, more than {MAX_FRAME_PIXELS} in all. Scale it down first."
        )


def _best_video(container: InputContainer) -> VideoStream | None:
    moving = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
    best = container.streams.best("video")
    chosen = next((s for s in moving if best is not None and s.index == best.index), moving[0] if moving else None)
    return chosen if chosen is not None and _has_decoder(chosen) else None


def _best_audio(container: InputContainer) -> AudioStream | None:
    best = container.streams.best("audio")
    chosen = next((s for s in container.streams.audio if best is not None and s.index == best.index), None)
    return chosen if chosen is not None and _has_decoder(chosen) else None


def _has_decoder(stream: VideoStream | AudioStream) -> bool:
    # PyAV leaves this empty for codecs that nobody can decode, whatever its type says.
    context: object = stream.codec_context
    return context is not None


def _reason(error: Exception) -> str:
    text = getattr(error, "strerror", None) or str(error)
    return str(text).split(": '")[0]


def hash_file(path: str | Path) -> str:
    """The sha256 of a local file's content in hex, by which a file is known again under any name.

    Raises:
        MediaError: the file cannot be opened or read, or breaks a limit of this module.
    """
    file, _ = _open_file(path)
    with file:
        try:
            return hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise MediaError(f"{path}: cannot be read ({error}). Copy or download it again.") from error


def pack_metadata(metadata: dict[str, str]) -> str:
    """One ASCII line for a container's comment: the only tag that every format keeps, also through other tools."""
    return json.dumps(metadata, ensure_ascii=True, sort_keys=True)


def unpack_metadata(comment: str | None) -> dict[str, str]:
    """The inverse of `pack_metadata`; {} for a comment that is anything else."""
    try:
        values = json.loads(comment or "{}")
    except (ValueError, RecursionError):
        return {}
    if not isinstance(values, dict) or not all(isinstance(v, str) for v in values.values()):
        return {}
    return values


def probe(path: MediaPath) -> MediaInfo:
    """Describe a media file from its headers.

    Raises:
        MediaError: the file cannot be opened, is not media, or breaks a limit of this module.
    """
    with open_media(path) as media:
        video, audio, container = media.video, media.audio, media.container
        if video is None and audio is None:
            raise MediaError(f"{path}: holds neither pictures nor sound that can be decoded. Convert it to MP4 first.")
        tags = {key.lower(): value for key, value in container.metadata.items()}
        if (comment := chunks.png_comment(media.file, media.size)) is not None:
            tags["comment"] = comment
        rate = video.average_rate or video.guessed_rate if video is not None else None
        return MediaInfo(
            format=container.format.name,
            duration=0.0 if media.is_image else (container.duration or 0) / av.time_base,
            fps=float(rate or 0),
            height=video.height if video is not None else 0,
            width=video.width if video is not None else 0,
            video_codec=video.codec_context.name if video is not None else None,
            pixel_format=video.pix_fmt if video is not None else None,
            audio_codec=audio.codec_context.name if audio is not None else None,
            sample_rate=audio.sample_rate if audio is not None else 0,
            num_channels=audio.channels if audio is not None else 0,
            metadata=unpack_metadata(tags.get("comment")),
            tags=tags,
        )
