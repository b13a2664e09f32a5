"""Reading clips, pictures and sound. One pass over the file, frame by frame, and no further than is needed."""

import math
from fractions import Fraction

import av
import numpy as np
from av.video.frame import VideoFrame
from numpy.typing import NDArray

from poet.errors import ConfigError, MediaError
from poet.media.clip import Clip, exact_fps
from poet.media.decoding import LEAD, decoded, origin_of
from poet.media.opening import DEFAULT_MAX_DURATION, MediaPath, OpenMedia, open_media
from poet.media.picture import Fit, PictureFitter, check_size
from poet.media.resampling import FrameSampler, SampleCollector, round_half_up, too_long

_MAX_SAMPLE_RATE = 384_000


def read_clip(
    path: MediaPath,
    *,
    fps: float | Fraction | None = None,
    height: int | None = None,
    width: int | None = None,
    sample_rate: int | None = None,
    max_duration: float = DEFAULT_MAX_DURATION,
    fit: Fit = "crop",
    start: float = 0.0,
    duration: float | None = None,
    want_video: bool | None = None,
    want_audio: bool | None = None,
) -> Clip:
    """Read pictures and sound in step with each other.

    Frame i is the one whose presentation time is nearest to `start + i / fps`, so any source rate, also a variable
    one, keeps its duration and its sync. Time 0 is where the earlier of the two streams begins: a picture that begins
    later holds its first frame, sound that begins later is preceded by silence. With pictures the sound is cut or
    filled with silence to exactly their length. Rotation and the shape of the pixels are applied, transparency stands
    over black, channels are averaged to mono. High dynamic range is not tone-mapped and fields are not deinterlaced.

    Args:
        path: a local file, or a part of one.
        fps: frames per second; None keeps the file's average rate.
        height: rows; None keeps the file's, or follows from width.
        width: columns; None keeps the file's, or follows from height.
        sample_rate: samples per second; None keeps the file's.
        max_duration: seconds that may be read at most.
        fit: `crop` fills height x width and loses margins; `pad` keeps everything and adds black bars.
        start: seconds to leave out at the beginning.
        duration: seconds to read; fewer come back where the file ends earlier. None reads to the end.
        want_video: True demands pictures, False leaves them out, None takes them where the file has them.
        want_audio: likewise for sound.

    Returns:
        A Clip with frames (N, height, width, 3), samples (S,), or both.

    Raises:
        MediaError: the file cannot be read, is damaged or too long, or holds none of what is wanted.
        ConfigError: an argument out of range.
    """
    check_size(height, width, fit)
    rate = None if fps is None else exact_fps(fps)
    _check_times(start, duration, max_duration)
    if sample_rate is not None and not 0 < sample_rate <= _MAX_SAMPLE_RATE:
        raise ConfigError(f"sample_rate must be in 1..{_MAX_SAMPLE_RATE}, got {sample_rate}. A common one is 16000.")
    if want_video is False and want_audio is False:
        raise ConfigError("want_video and want_audio must not both be False. Ask for one at least.")
    begin, limit = Fraction(start), Fraction(max_duration)
    length = None if duration is None else Fraction(duration)

    with open_media(path) as media:
        sampler, collector = None, None
        _check_streams(media, want_video, want_audio)
        if media.video is not None and want_video is not False:
            fitter = PictureFitter(media.name, media.file, height, width, fit, media.video.sample_aspect_ratio)
            sampler = FrameSampler(media.name, rate or _own_rate(media), begin, length, limit, fitter.fit)
            length = length if length is None else sampler.covered(length)
        if media.audio is not None and want_audio is not False:
            own = sample_rate or media.audio.sample_rate
            if own <= 0:
                raise MediaError(f"{path}: its sound has no sample rate. Convert the file to WAV first.")
            collector = SampleCollector(media.name, own, begin, length, limit)
        if length is None and (media.container.duration or 0) / av.time_base - start > max_duration + 0.5:
            raise too_long(media.name, limit)
        _decode(media, sampler, collector, begin)
        return assemble(media, sampler, collector, begin)


def read_image(
    path: MediaPath, height: int | None = None, width: int | None = None, fit: Fit = "crop"
) -> NDArray[np.uint8]:
    """Read a picture, or the first frame of a video.

    Args:
        path: a local file, or a part of one.
        height: rows; None keeps the file's, or follows from width.
        width: columns; None keeps the file's, or follows from height.
        fit: as for `read_clip`.

    Returns:
        (height, width, 3) uint8 RGB, upright; transparency stands over black.

    Raises:
        MediaError: the file cannot be read or holds no picture.
        ConfigError: an argument out of range.
    """
    check_size(height, width, fit)
    with open_media(path) as media:
        if media.video is None:
            raise MediaError(f"{path}: has no picture that can be decoded. Give a PNG, JPEG or video file.")
        fitter = PictureFitter(media.name, media.file, height, width, fit, media.video.sample_aspect_ratio)
        for packet in media.container.demux(media.video):
            for frame in packet.decode():
                return fitter.fit(frame)
        raise MediaError(f"{path}: its picture cannot be decoded. Make or download the file again.")


def read_audio(path: MediaPath, sample_rate: int, max_duration: float = DEFAULT_MAX_DURATION) -> NDArray[np.float32]:
    """Read the sound of a sound or video file.

    Args:
        path: a local file, or a part of one.
        sample_rate: samples per second of the result.
        max_duration: seconds that may be read at most.

    Returns:
        (S,) float32 mono in [-1, 1].

    Raises:
        MediaError: the file cannot be read, is too long, or holds no sound.
        ConfigError: an argument out of range.
    """
    clip = read_clip(path, sample_rate=sample_rate, max_duration=max_duration, want_video=False, want_audio=True)
    assert clip.samples is not None
    return clip.samples


def _check_streams(media: OpenMedia, want_video: bool | None, want_audio: bool | None) -> None:
    if media.video is None and (want_video or (media.audio is None and want_audio is None)):
        raise MediaError(f"{media.name}: has no pictures that can be decoded. Give a video file or another codec.")
    if media.audio is None and (want_audio or (media.video is None and want_video is None)):
        raise MediaError(f"{media.name}: has no sound that can be decoded. Give a file with sound.")
    if (media.video is None or want_video is False) and (media.audio is None or want_audio is False):
        raise MediaError(f"{media.name}: holds nothing of what is wanted. Give another file, or ask for what it has.")


def _check_times(start: float, duration: float | None, max_duration: float) -> None:
    if not math.isfinite(start) or start < 0:
        raise ConfigError(f"start must be at least 0 seconds, got {start}. Leave it out to begin at the beginning.")
    if not math.isfinite(max_duration) or max_duration <= 0:
        raise ConfigError(f"max_duration must be above 0 seconds, got {max_duration}. Give a finite length.")
    if duration is not None and not 0 < duration <= max_duration:
        raise ConfigError(
            f"duration must be above 0 and at most max_duration ({max_duration:g} s), got {duration}. "
            "Give a larger max_duration to read more."
        )


def _own_rate(media: OpenMedia) -> Fraction:
    assert media.video is not None
    for rate in (media.video.average_rate, media.video.guessed_rate):
        if rate is not None and 0 < rate <= 1000:
            return rate
    raise MediaError(f"{media.name}: does not say how many frames it has per second. Say how many with fps.")


def _decode(media: OpenMedia, sampler: FrameSampler | None, collector: SampleCollector | None, begin: Fraction) -> None:
    """Feed both sinks until they have enough or the file ends."""
    place = begin - LEAD if sampler is not None else Fraction(0)
    sinks: dict[int, FrameSampler | SampleCollector] = {}
    if sampler is not None and media.video is not None:
        sinks[media.video.index] = sampler
    if collector is not None and media.audio is not None:
        sinks[media.audio.index] = collector
    shortest = 1 / sampler.fps if sampler is not None else Fraction(0)
    for frame, time, lasts in decoded(media, sinks, shortest, lambda index: sinks[index].is_done, place):
        if isinstance(frame, VideoFrame):
            assert sampler is not None and time is not None
            sampler.add(frame, time, lasts)
        else:
            assert collector is not None
            collector.add(frame, time)


def assemble(
    media: OpenMedia, sampler: FrameSampler | None, collector: SampleCollector | None, begin: Fraction
) -> Clip:
    """What was gathered, as a clip; see `read_clip`.

    Raises:
        MediaError: nothing was.
    """
    frames = sampler.finish() if sampler is not None else None
    count, end = None, None
    if collector is not None:
        if frames is not None and sampler is not None:
            count = round_half_up(len(frames) / sampler.fps * collector.sample_rate)
        stream = media.audio
        if media.has_format("mov") and stream is not None and stream.duration and stream.time_base:
            end = ((stream.start_time or 0) + stream.duration) * stream.time_base - origin_of(media)
    samples = collector.finish(count, end) if collector is not None else None
    if frames is not None and samples is None and collector is not None and count is not None:
        samples = np.zeros(count, np.float32)
    if (sampler is not None and frames is None) or (frames is None and samples is None):
        raise MediaError(f"{media.name}: holds nothing at or after {float(begin):g} s. Give an earlier start.")
    return Clip(
        frames=frames,
        fps=float(sampler.fps) if sampler is not None else 0.0,
        samples=samples,
        sample_rate=collector.sample_rate if collector is not None else 0,
    )
