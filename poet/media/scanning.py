"""A whole file looked through in bounded memory: every picture, made small, and the sound, piece by piece.

For files that are longer than a clip may be. Legend: H x W pixels, S samples.
"""

from collections.abc import Generator
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from av.video.frame import VideoFrame
from av.video.reformatter import Interpolation, VideoReformatter
from numpy.typing import NDArray

from poet.errors import MediaError
from poet.media.decoding import decoded
from poet.media.opening import MediaPath, open_media
from poet.media.resampling import GAP, MonoMixer

__all__ = ["HeardSound", "SeenPicture", "scan_media"]

_STEP_BACK = Fraction(1, 2)
"""Seconds by which time stamps may step back, as a few muxers' do; by more, and the file's clock began anew."""


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
        MediaError: the file cannot be opened, is damaged within these seconds, holds nothing, or its clock begins anew
            on the way.
    """
    with open_media(path) as media:
        streams = {stream.index for stream in (media.video, media.audio) if stream is not None}
        if not streams:
            raise MediaError(f"{path}: holds neither pictures nor sound that can be decoded. Convert it to MP4 first.")
        scaler, sound = VideoReformatter(), MonoMixer(sample_rate)
        ends: dict[int, Fraction | None] = dict.fromkeys(streams)

        def is_done(index: int) -> bool:
            end = ends[index]
            return duration is not None and end is not None and end >= duration

        shown: Fraction | None = None
        for frame, time, lasts in decoded(media, streams, Fraction(1, 25), is_done):
            if isinstance(frame, VideoFrame):
                assert media.video is not None and time is not None
                before = ends[media.video.index]
                if shown is not None and time <= shown:
                    _refuse_new_clock(path, shown, time)
                    continue  # as in reading: a picture that steps back is dropped
                shown = time
                ends[media.video.index] = time + lasts if before is None else max(before, time + lasts)
                small = scaler.reformat(
                    frame, width=width, height=height, format="rgb24", interpolation=int(Interpolation.AREA), threads=1
                )
                yield SeenPicture(time, time + lasts, np.asarray(small.to_ndarray(), np.uint8))
            else:
                assert media.audio is not None
                known = ends[media.audio.index] or Fraction(0)
                begun = known if time is None or abs(time - known) <= GAP else time
                _refuse_new_clock(path, known, begun)
                ends[media.audio.index] = begun + lasts
                if begun != known or not sound.goes_on(frame):
                    sound.begin(frame)  # what little was waiting of the sound before is not missed
                yield HeardSound(begun, begun + lasts, sound.add(frame))
        if all(end is None for end in ends.values()):
            raise MediaError(f"{path}: holds nothing that can be decoded. Make or download the file again.")


def _refuse_new_clock(path: MediaPath, before: Fraction, time: Fraction) -> None:
    if time < before - _STEP_BACK:
        raise MediaError(
            f"{path}: its clock steps back from {float(before):.2f} s to {float(time):.2f} s, as in recordings "
            "that were joined end to end. Give the parts, or join them with new time stamps."
        )
