"""From an opened file to decoded frames with their times, in one pass. Knows no sizes and rates that are wanted."""

import logging
from collections.abc import Callable, Collection, Iterator, Mapping
from fractions import Fraction
from typing import Final

import av
from av.audio.frame import AudioFrame
from av.video.frame import VideoFrame

from poet.errors import MediaError
from poet.media.opening import OpenMedia

_log = logging.getLogger(__name__)

_SEEK_BEYOND = 2.0
"""Seconds; a nearer start is reached faster by decoding than by seeking."""

_LEADING_DAMAGE = 64
"""Packets that may fail before the first good frame of a broadcast or song: such recordings begin anywhere."""

_SHORT_BY = Fraction(1, 2)
"""Seconds that may be missing at the end before a file counts as cut short; headers round and pad."""

Decoded = tuple[VideoFrame | AudioFrame, Fraction | None, Fraction]
"""A frame, when it is shown or heard (None: right after the one before; sound alone), and for how many seconds."""


def origin_of(media: OpenMedia) -> Fraction:
    """Seconds, on the file's clock, at which the earlier of its two streams begins."""
    starts = [
        stream.start_time * stream.time_base
        for stream in (media.video, media.audio)
        if stream is not None and stream.start_time is not None and stream.time_base is not None
    ]
    return min(starts, default=Fraction(0))


LEAD: Final = Fraction(1, 4)
"""Seconds of sound decoded before a scene: decoders and resamplers need some to settle."""


def _seek_before(media: OpenMedia, begin: Fraction) -> Fraction:
    """Go to a key picture at or before a time, where that is possible and worth it. Returns the time, or 0."""
    # Only these carry an index that makes a seek land on a key frame before the place asked for.
    if begin <= _SEEK_BEYOND or not media.has_format("mov", "matroska", "avi"):
        return Fraction(0)
    try:
        media.container.seek(int((origin_of(media) + begin) * av.time_base))
    except av.FFmpegError:  # an AVI whose index was never written
        return Fraction(0)
    return begin


def decoded(
    media: OpenMedia,
    wanted: Collection[int],
    shortest: Fraction,
    is_done: Callable[[int], bool],
    begin: Fraction = Fraction(0),
) -> Iterator[Decoded]:
    """The frames of some streams, in the order in which the file holds them.

    Args:
        media: an opened file, of which nothing has been decoded.
        wanted: numbers of the streams: those of the picture, the sound, or both.
        shortest: seconds that a picture lasts where the file does not say.
        is_done: whether a stream is needed no further; when none is, the decoding ends.
        begin: seconds before which nothing is needed; earlier frames may come nevertheless.

    Raises:
        MediaError: a packet is damaged, beyond what recordings may begin with, or the file ends before it should.
    """
    origin = origin_of(media)
    place = _seek_before(media, begin)
    ends: dict[int, Fraction] = {}
    is_recording = not media.is_image and not media.has_format("mov", "matroska", "gif", "wav", "avi")
    last: dict[int, Fraction] = {}
    damage: dict[int, int] = {}
    streams = [stream for stream in (media.video, media.audio) if stream is not None and stream.index in wanted]
    for packet in media.container.demux(*streams):
        index = packet.stream.index
        if all(is_done(one) for one in wanted):
            return
        if is_done(index):
            # Not decoded, but where it ends says whether the file is whole.
            if packet.pts is not None and packet.time_base is not None:
                end = (packet.pts + (packet.duration or 0)) * packet.time_base - origin
                ends[index] = max(end, ends.get(index, end))
            continue
        try:
            frames = packet.decode()
        except av.FFmpegError as error:
            damage[index] = damage.get(index, 0) + 1
            if not is_recording or index in last or damage[index] > _LEADING_DAMAGE:
                raise _damaged(media.name, last.get(index)) from error
            continue
        if frames and index in damage and index not in last:
            _log.warning("%s: skipped %d packets before the first good one", media.name, damage[index])
        for frame in frames:
            if not isinstance(frame, VideoFrame | AudioFrame):
                continue
            time = None if frame.pts is None or frame.time_base is None else frame.pts * frame.time_base - origin
            if isinstance(frame, VideoFrame):
                time = time if time is not None else last.get(index, Fraction(0))
                lasts = frame.duration * frame.time_base if frame.duration and frame.time_base else shortest
            else:
                lasts = Fraction(frame.samples, frame.sample_rate)
            last[index] = (time if time is not None else last.get(index, Fraction(0))) + lasts
            ends[index] = max(last[index], ends.get(index, last[index]))
            yield frame, time, lasts
    if any(index not in last for index in damage):
        raise _damaged(media.name, None)
    if not all(is_done(one) for one in wanted):
        # A stream that held nothing behind the place where the decoding began may have ended before it.
        _check_whole(media, {index: ends.get(index, place) for index in wanted})


def _check_whole(media: OpenMedia, ends: Mapping[int, Fraction]) -> None:
    """Refuse a file that ended earlier than its header promised, where headers of that format can be trusted.

    Args:
        media: the file, read to its end.
        ends: number of each stream that was read -> seconds that it reached.

    Raises:
        MediaError: the file is cut short.
    """
    if media.has_format("mov"):
        origin = origin_of(media)
        for stream in (media.video, media.audio):
            if stream is None or stream.index not in ends:
                continue
            if stream.duration and stream.time_base and stream.start_time is not None:
                stated = (stream.start_time + stream.duration) * stream.time_base - origin
                _refuse_short(media.name, ends[stream.index], stated)
        return
    # The container's length covers all streams, so it binds only where all of them were read to their ends.
    is_trusted = media.has_format("matroska") or (media.has_format("mp3") and _has_length_tag(media))
    if is_trusted and media.container.duration and len(ends) == len(media.container.streams):
        stated = Fraction(media.container.duration, av.time_base)
        _refuse_short(media.name, max(ends.values()), stated)


def _damaged(name: str, place: Fraction | None) -> MediaError:
    if place is None:
        return MediaError(f"{name}: nothing in it can be decoded, it is damaged or encrypted. Make it again.")
    return MediaError(
        f"{name}: is damaged or cut short at {float(place):.2f} s. "
        "Make or download it again, or stop before that place with a duration."
    )


def _refuse_short(name: str, reached: Fraction, stated: Fraction) -> None:
    if reached < stated - max(_SHORT_BY, stated / 50):
        raise MediaError(
            f"{name}: is cut short, it ends at {float(reached):.2f} s instead of {float(stated):.2f} s. "
            "Make or download it again, or read a part of it with a duration."
        )


def _has_length_tag(media: OpenMedia) -> bool:
    """Whether an MP3 file carries the tag that states its length; otherwise ffmpeg only guesses it."""
    media.file.seek(0)
    head = media.file.read(1 << 16)
    return b"Xing" in head or b"Info" in head
