"""Writing a clip piece by piece: an MP4 that stands at its final path and plays while it grows.

While it grows it is a fragmented MP4, each picture a fragment of its own, behind which ffmpeg's muxer stays by two
pictures; its sound is 64 ms late at 16 kHz, the silence that AAC begins with. When it is whole, the same coded pictures
and sounds are put into a plain MP4 like those of `write_clip`, which takes its place: in time, with an index, and with
metadata that is known at the end alone. Whoever is reading the growing file goes on reading it.

What it does not know: scenes, codes, who watches. Dimension letters as in `poet.media`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self, cast

import av
import numpy as np
from av.audio.resampler import AudioResampler
from av.audio.stream import AudioStream
from av.container import InputContainer, OutputContainer
from av.video.reformatter import VideoReformatter
from av.video.stream import VideoStream
from numpy.typing import NDArray

from poet.errors import ConfigError, MediaError, ShapeError
from poet.media.clip import Clip, exact_fps
from poet.media.writing import (
    FILMS,
    check_target,
    comment_of,
    encode_frame,
    mux_video,
    part_beside,
    set_up_audio,
    set_up_video,
    settle,
    to_sound,
    to_yuv420,
)

__all__ = ["ClipStream"]

_FILM: Final = FILMS[".mp4"]
# A fragment begins at a picture that decodes by itself, so all are such; nothing is kept back to be compressed better,
# and no picture waits for the sound of its time, which comes a whole scene later.
_FRAGMENTED: Final = {"movflags": "+frag_keyframe+empty_moov+default_base_moof"}
_AT_ONCE: Final = {"max_interleave_delta": "1", "flush_packets": "1", "avioflags": "direct"}
_EVERY_PICTURE: Final = {"tune": "zerolatency", "g": "1"}


class ClipStream:
    """A clip in a file that grows. To be used in a with statement.

    Args:
        path: of an .mp4; what is there is replaced when the first piece comes.
        fps: frames per second.
        height: pixels.
        width: pixels.
        sample_rate: samples per second; None: there will be no sound.

    Attributes:
        metadata: to be kept in the container's comment, see `write_clip`. What is set before the first piece stands in
            the growing file, what is set at the end in the whole one.

    If the with statement is left by an error, what was written so far stays at the path as far as it came, playable.

    Raises:
        MediaError: the path cannot be written, or is no .mp4.
        ConfigError: a rate that cannot be used.
    """

    def __init__(
        self, path: str | Path, *, fps: float | Fraction, height: int, width: int, sample_rate: int | None = None
    ) -> None:
        self._path = Path(path)
        if self._path.suffix.lower() != ".mp4":
            raise MediaError(f"{path}: a clip that grows must be an .mp4, got {self._path.suffix!r}. Change the name.")
        check_target(self._path, has_audio=sample_rate is not None)
        # Absolute, so that no name reads as an address; a link in this place is replaced, not followed.
        self._file = self._path.parent.resolve() / self._path.name
        if sample_rate is not None and sample_rate <= 0:
            raise ConfigError(f"sample_rate must be above 0, got {sample_rate}. Give samples per second.")
        self._fps, self._size, self._sample_rate = exact_fps(fps), (height, width), sample_rate
        self._container: OutputContainer | None = None
        self._beside: Path | None = None
        self._reformatter = VideoReformatter()
        self._frames = self._samples = 0
        self._sound_times: list[Fraction] = []  # seconds at which each packet of sound begins, the first below 0
        self._closed = False
        self.metadata: dict[str, str] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
        else:
            with contextlib.suppress(av.FFmpegError, OSError):  # the error that is on its way says more
                self._end()

    def write(self, *, frames: NDArray[np.uint8] | None = None, samples: NDArray[np.float32] | None = None) -> None:
        """Add the next pictures, the next sound, or both.

        Args:
            frames: (N, H, W, 3) uint8.
            samples: (S,) float32 in [-1, 1].

        Raises:
            ShapeError: arrays of another kind or size, or neither.
            MediaError: writing fails, or the clip is closed.
        """
        piece = Clip(frames=frames, fps=float(self._fps), samples=samples, sample_rate=self._sample_rate or 1)
        if piece.frames is not None and piece.frames.shape[1:3] != self._size:
            raise ShapeError(f"frames must be {self._size} pixels (height, width), got {piece.frames.shape[1:3]}.")
        if piece.samples is not None and self._sample_rate is None:
            raise ShapeError("there must be no samples in a clip without a sample_rate, got some.")
        if self._closed:
            raise MediaError(f"{self._path}: the clip is closed. Write all pieces before.")
        try:
            self._open()
            self._write(piece)
            self._take_place()
        except (av.FFmpegError, OSError, ValueError) as error:
            with contextlib.suppress(av.FFmpegError, OSError):
                self._end()
            raise self._failed(error) from error

    def close(self) -> None:
        """Make the file whole; closing twice does no harm.

        Raises:
            MediaError: nothing was written, or writing fails; what was written so far stays.
            ConfigError: metadata is not a dict of strings.
        """
        if self._closed:
            return
        comment = comment_of(self.metadata)
        if self._container is None:
            raise MediaError(
                f"{self._path}: a clip must have pictures or sound, nothing was written. Write a piece before closing."
            )
        part = part_beside(self._path)
        try:
            self._flush()
            self._take_place()
            self._end()
            _copy(self._file, part, comment, self._sound_times)
            settle(part)
            part.replace(self._file)
        except (av.FFmpegError, OSError, ValueError) as error:
            with contextlib.suppress(av.FFmpegError, OSError):
                self._end()
            raise self._failed(error) from error
        finally:
            part.unlink(missing_ok=True)

    def _open(self) -> None:
        """Begin a new file beside, which takes its place with the first piece: readers of the old one keep it."""
        if self._container is not None:
            return
        self._beside = part_beside(self._path)
        container = av.open(
            self._beside, "w", format=_FILM.format, options=dict(_AT_ONCE), container_options=dict(_FRAGMENTED)
        )
        self._container = container
        if (comment := comment_of(self.metadata)) is not None:
            container.metadata["comment"] = comment
        video = container.add_stream(_FILM.video_codec, rate=self._fps, options=_FILM.video_options | _EVERY_PICTURE)
        self._video = cast("VideoStream", video)
        set_up_video(self._video.codec_context, *self._size)
        if self._sample_rate is not None:
            rate = _FILM.rate_for(self._sample_rate)
            self._audio = cast("AudioStream", container.add_stream(_FILM.audio_codec, rate=rate, layout="mono"))
            set_up_audio(self._audio.codec_context)
            self._resampler = AudioResampler(format=_FILM.sample_format, layout="mono", rate=rate)

    def _take_place(self) -> None:
        """Put the new file where it belongs as soon as ffmpeg has begun it."""
        if self._beside is not None and self._beside.exists():
            self._beside.replace(self._file)
            self._beside = None

    def _write(self, piece: Clip) -> None:
        assert self._container is not None
        for pixels in () if piece.frames is None else piece.frames:
            encode_frame(self._container, self._video, to_yuv420(self._reformatter, pixels), self._frames, self._fps)
            self._frames += 1
        if piece.samples is not None:
            assert self._sample_rate is not None
            frame = to_sound(piece.samples, self._sample_rate, self._samples)
            self._samples += len(piece.samples)
            self._mux_sound([packet for part in self._resampler.resample(frame) for packet in self._audio.encode(part)])

    def _mux_sound(self, packets: list[Any]) -> None:
        assert self._container is not None
        for packet in packets:
            self._sound_times.append(packet.pts * packet.time_base)
            self._container.mux(packet)

    def _flush(self) -> None:
        assert self._container is not None
        if self._samples:
            rest = [packet for part in self._resampler.resample(None) for packet in self._audio.encode(part)]
            self._mux_sound(rest + list(self._audio.encode(None)))
        mux_video(self._container, self._video.encode(None), self._fps)

    def _end(self) -> None:
        self._closed = True
        try:
            if self._container is not None:
                self._container.close()
        finally:
            if self._beside is not None:
                self._beside.unlink(missing_ok=True)  # of a first piece that could not be written

    def _failed(self, error: Exception) -> MediaError:
        reason = getattr(error, "strerror", None) or str(error)
        return MediaError(
            f"{self._path}: cannot be written ({reason}). Check that the disk has room and the directory may be "
            "written to; what was written so far is still there."
        )


def _copy(source: Path, target: Path, comment: str | None, sound_times: Sequence[Fraction]) -> None:
    """Put the packets of a fragmented file into a plain one, in the order of their time.

    Fragments have no times below 0, and what stands before is moved; so sound goes where it was encoded to be.
    """
    with (
        av.open(source) as given,
        av.open(target, "w", format=_FILM.format, container_options=_FILM.options) as container,
    ):
        assert isinstance(given, InputContainer)
        if comment is not None:
            container.metadata["comment"] = comment
        streams = {stream.index: container.add_stream_from_template(stream) for stream in given.streams}
        packets = [packet for packet in given.demux() if packet.dts is not None]
        sound = [packet for packet in packets if packet.stream.type == "audio"]
        for packet, begin in zip(sound, sound_times, strict=True):
            assert packet.time_base is not None
            packet.pts = packet.dts = round(begin / packet.time_base)
        for packet in sorted(packets, key=lambda packet: packet.dts * packet.time_base):  # type: ignore[operator]
            packet.stream = streams[packet.stream.index]
            container.mux(packet)
