"""A whole file looked through in bounded memory: every picture, made small, and the sound, piece by piece.

For files that are longer than a clip may be. Legend: H x W pixels, S samples.
"""

from collections.abc import Generator
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from av.audio.frame import AudioFrame
from av.audio.resampler import AudioResampler
from av.video.frame import VideoFrame
from av.video.reformatter import Interpolation, VideoReformatter
from numpy.typing import NDArray

from poet.errors import MediaError
from poet.media.decoding import check_whole, decoded
from poet.media.opening import MediaPath, open_media

__all__ = ["HeardSound", "SeenPicture", "scan_media"]

_GAP = Fraction(1, 10)
"""Seconds by which time stamps of sound may drift before it counts as interrupted."""


@dataclass(frozen=True, eq=False)
class SeenPicture:
    """A picture of a file.

    Attributes:
        time: seconds at which it is shown; 0 is where the earlier of picture and sound begins.
        end: seconds at which it goes.
        pixels: (H, W, 3) uint8 RGB, the whole stored picture squeezed into that size.
    """

    time: Fraction
    end: Fraction
    pixels: NDArray[np.uint8]


@dataclass(frozen=True, eq=False)
class HeardSound:
    """A piece of a file's sound.

    Attributes:
        time: seconds at which it begins.
        end: seconds at which it ends.
        samples: (S,) float32 mono; a lossy codec may overshoot [-1, 1]. Resampled pieces follow each other without
            a break, so S varies by a few.
    """

    time: Fraction
    end: Fraction
    samples: NDArray[np.float32]


def scan_media(
    path: MediaPath, *, height: int, width: int, sample_rate: int, duration: Fraction | None = None
) -> Generator[SeenPicture | HeardSound, None, None]:
    """Go through a file once. Close the iterator to stop before the end.

    Args:
        path: a local file, or a part of one.
        height: of the small pictures, in pixels.
        width: of the small pictures, in pixels.
        sample_rate: of the sound, per second.
        duration: seconds from the beginning after which nothing more is needed; None takes all.

    Yields:
        Pictures and pieces of sound, each kind in the order of time, the two mixed as the file holds them.

    Raises:
        MediaError: the file cannot be opened, is damaged within these seconds, or holds nothing.
    """
    with open_media(path) as media:
        streams = {stream.index for stream in (media.video, media.audio) if stream is not None}
        if not streams:
            raise MediaError(f"{path}: holds neither pictures nor sound that can be decoded. Convert it to MP4 first.")
        scaler, sound = VideoReformatter(), _Mono(sample_rate)
        ends: dict[int, Fraction | None] = dict.fromkeys(streams)

        def is_done(index: int) -> bool:
            end = ends[index]
            return duration is not None and end is not None and end >= duration

        for frame, time, lasts in decoded(media, streams, Fraction(1, 25), is_done):
            if isinstance(frame, VideoFrame):
                assert media.video is not None and time is not None
                before = ends[media.video.index]
                ends[media.video.index] = time + lasts if before is None else max(before, time + lasts)
                small = scaler.reformat(
                    frame, width=width, height=height, format="rgb24", interpolation=int(Interpolation.AREA), threads=1
                )
                yield SeenPicture(time, time + lasts, np.asarray(small.to_ndarray(), np.uint8))
            else:
                assert media.audio is not None
                known = ends[media.audio.index] or Fraction(0)
                begun = known if time is None or abs(time - known) <= _GAP else time
                ends[media.audio.index] = begun + lasts
                frame.pts = None
                yield HeardSound(begun, begun + lasts, sound.resample(frame, restart=begun != known))
        if not all(is_done(index) for index in streams):
            check_whole(media, ends)
        if all(end is None for end in ends.values()):
            raise MediaError(f"{path}: holds nothing that can be decoded. Make or download the file again.")


class _Mono:
    """Mixes sound down to one channel at one rate."""

    def __init__(self, sample_rate: int) -> None:
        self._rate = sample_rate
        self._resampler: AudioResampler | None = None
        self._source: tuple[int, str, str] | None = None

    def resample(self, frame: AudioFrame, restart: bool) -> NDArray[np.float32]:
        source = (frame.sample_rate, frame.layout.name, frame.format.name)
        if self._resampler is None or restart or source != self._source:
            self._resampler = AudioResampler(
                format="flt", layout="mono", rate=self._rate, options={"rematrix_maxval": "1.0"}
            )
            self._source = source
        pieces = [np.asarray(one.to_ndarray(), np.float32).reshape(-1) for one in self._resampler.resample(frame)]
        return np.concatenate(pieces) if pieces else np.zeros(0, np.float32)
