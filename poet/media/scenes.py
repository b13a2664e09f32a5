"""Several clips out of one file in a single pass: what `read_clip` would give for each, without starting anew.

Legend: N frames of each scene.
"""

import itertools
from collections.abc import Sequence
from fractions import Fraction

from av.audio.frame import AudioFrame
from av.video.frame import VideoFrame

from poet.errors import ConfigError, MediaError
from poet.media.clip import Clip, exact_fps
from poet.media.decoding import LEAD, decoded
from poet.media.opening import MediaPath, OpenMedia, open_media
from poet.media.picture import PictureFitter
from poet.media.reading import assemble
from poet.media.resampling import FrameSampler, SampleCollector

__all__ = ["read_scenes"]


def read_scenes(
    path: MediaPath,
    starts: Sequence[float],
    duration: float,
    *,
    fps: float,
    height: int,
    width: int,
    sample_rate: int,
) -> list[Clip]:
    """Read parts of a file that all last equally long, each with its picture and sound in step.

    The pictures of a scene are those of `read_clip`, whichever others are read with it. Its sound is resampled from a
    quarter of a second before it on; it lies where the packets' times say, which some formats round to milliseconds.

    Args:
        path: a local file, or a part of one.
        starts: seconds at which the scenes begin, ascending, at least one; all are kept in memory.
        duration: seconds that each lasts.
        fps: frames per second.
        height: rows.
        width: columns; the margins of a picture of another shape are cut off.
        sample_rate: of the sound.

    Returns:
        A Clip for each start; N is `duration * fps`, rounded.

    Raises:
        MediaError: the file cannot be read, is damaged, or ends within a scene.
        ConfigError: no starts, or they do not ascend from 0 or later.
    """
    if not starts or starts[0] < 0 or any(b <= a for a, b in itertools.pairwise(starts)):
        raise ConfigError(f"starts must be seconds that ascend from 0 or later, got {list(starts)}.")
    begins, rate = [Fraction(start) for start in starts], exact_fps(fps)
    with open_media(path) as media:
        scenes = [_Scene(media, begin, Fraction(duration), rate, height, width, sample_rate) for begin in begins]
        _decode(media, scenes)
        clips = [assemble(media, scene.sampler, scene.collector, scene.begin) for scene in scenes]
    wanted = scenes[0].num_frames
    for start, clip in zip(starts, clips, strict=True):
        if clip.frames is not None and len(clip.frames) != wanted:
            raise MediaError(
                f"{path} must have {wanted} frames at {fps:g} a second from {start:g} s on, got {len(clip.frames)}. "
                "Has the file changed? Encode into another directory."
            )
    return clips


class _Scene:
    """Where the frames and samples of one scene gather."""

    def __init__(
        self,
        media: OpenMedia,
        begin: Fraction,
        duration: Fraction,
        fps: Fraction,
        height: int,
        width: int,
        sample_rate: int,
    ) -> None:
        self.begin = begin
        self.sampler: FrameSampler | None = None
        self.collector: SampleCollector | None = None
        self.num_frames = max(1, round(duration * fps))
        if media.video is not None:
            aspect = media.video.sample_aspect_ratio
            fitter = PictureFitter(media.name, media.file, height, width, "crop", aspect)
            self.sampler = FrameSampler(media.name, fps, begin, duration, duration, fitter.fit)
            duration = self.sampler.covered(duration)
        self._end = begin + duration + LEAD
        if media.audio is not None:
            self.collector = SampleCollector(media.name, sample_rate, begin, duration, duration)

    def hear(self, frame: AudioFrame, time: Fraction, lasts: Fraction) -> None:
        """Take a piece of sound if it matters here."""
        if self.collector is None or self.collector.is_done:
            return
        if time >= self._end:
            self.collector.close()  # there is none between the scene and this
        elif time + lasts > self.begin - LEAD:
            self.collector.add(frame, time)


def _decode(media: OpenMedia, scenes: Sequence[_Scene]) -> None:
    samplers = [scene.sampler for scene in scenes if scene.sampler is not None]
    collectors = [scene.collector for scene in scenes if scene.collector is not None]
    sinks: dict[int, Sequence[FrameSampler | SampleCollector]] = {}
    if media.video is not None:
        sinks[media.video.index] = samplers
    if media.audio is not None:
        sinks[media.audio.index] = collectors
    # The scenes ascend, so whoever has the last has them all.
    shortest = 1 / samplers[0].fps if samplers else Fraction(0)
    heard = Fraction(0)
    place = scenes[0].begin - LEAD
    for frame, time, lasts in decoded(media, sinks, shortest, lambda index: sinks[index][-1].is_done, place):
        if isinstance(frame, VideoFrame):
            assert time is not None
            for sampler in samplers:
                if not sampler.is_done:
                    sampler.add(frame, time, lasts)
            continue
        time = heard if time is None else time
        heard = time + lasts
        for scene in scenes:
            scene.hear(frame, time, lasts)
