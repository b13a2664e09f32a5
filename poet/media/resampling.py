"""Frames and samples onto the clip's own clock, one decoded frame at a time.

Nothing full-sized is kept: pictures are fitted as they pass, and at most one frame waits for its successor.
"""

import math
from collections.abc import Callable
from fractions import Fraction

import numpy as np
from av.audio.frame import AudioFrame
from av.audio.resampler import AudioResampler
from av.video.frame import VideoFrame
from numpy.typing import NDArray

from poet.errors import MediaError
from poet.media.opening import MAX_CLIP_BYTES, MAX_DECODED_FRAMES

GAP = Fraction(1, 10)
"""Seconds by which a sound's time stamps may drift before it is set anew; rounded stamps alone stay far below."""


def round_half_up(value: Fraction) -> int:
    """The nearest integer, halves upwards, so that lengths do not depend on whether they are even."""
    return math.floor(value + Fraction(1, 2))


class FrameSampler:
    """Picks, for each tick `start + i / fps`, the frame whose presentation time is nearest.

    Args:
        name: the file's, for messages.
        fps: ticks per second.
        start: seconds from the file's beginning to tick 0.
        duration: seconds to cover at most; None takes everything.
        max_duration: seconds beyond which a file of open length is refused.
        fit: turns a decoded frame into (H, W, 3) uint8.
    """

    def __init__(
        self,
        name: str,
        fps: Fraction,
        start: Fraction,
        duration: Fraction | None,
        max_duration: Fraction,
        fit: Callable[[VideoFrame], NDArray[np.uint8]],
    ) -> None:
        self.fps = fps
        self.end: Fraction | None = None
        self._name = name
        self._start = start
        self._limit = None if duration is None else round_half_up(self.covered(duration) * fps)
        self._max_duration = max_duration
        self._fit = fit
        self._waiting: tuple[VideoFrame, Fraction] | None = None
        self._fitted: bytes | None = None
        self._shape: tuple[int, ...] = ()
        self._pixels = bytearray()
        self._count = 0
        self._seen = 0

    def covered(self, duration: Fraction) -> Fraction:
        """The length in whole ticks, at least one, that stands for a duration in seconds."""
        return max(1, round_half_up(duration * self.fps)) / self.fps

    @property
    def is_done(self) -> bool:
        """Whether every tick that was asked for has its frame."""
        return self._limit is not None and self._count >= self._limit

    def add(self, frame: VideoFrame, time: Fraction, duration: Fraction) -> None:
        """Take the next decoded frame, shown at `time` for `duration` seconds; one that steps back is dropped."""
        self._seen += 1
        if self._seen > MAX_DECODED_FRAMES:
            raise MediaError(f"{self._name}: needs more than {MAX_DECODED_FRAMES} frames decoded. Cut it into parts.")
        if self._waiting is not None:
            _, before = self._waiting
            if time <= before:
                return
            self._emit_until((before + time) / 2)
        self._check_length(time)
        self._waiting, self._fitted = (frame, time), None
        self.end = time + duration

    def finish(self) -> NDArray[np.uint8] | None:
        """(N, H, W, 3) uint8, N the covered length in ticks, at least 1; None if no frame came at or after start.

        Raises:
            MediaError: the pictures are longer than allowed or do not fit in memory.
        """
        if self._waiting is None or self.end is None or (self.end <= self._start and not self._count):
            return None
        self._check_length(self.end)
        if self.is_done:  # decoding stopped as soon as the last tick had its frame, before the time it stands for
            total = self._count
        else:
            total = max(1, round_half_up((self.end - self._start) * self.fps))
            total = total if self._limit is None else min(total, self._limit)
        while self._count < total:
            self._emit()
        frames = np.frombuffer(self._pixels, np.uint8).reshape(self._count, *self._shape)
        return frames[:total]

    def _check_length(self, time: Fraction) -> None:
        # Half a tick of grace: a stream's last frame may end that much later than the file says.
        if self._limit is None and time - self._start > self._max_duration + 1 / (2 * self.fps):
            raise too_long(self._name, self._max_duration)

    def _emit_until(self, time: Fraction) -> None:
        while not self.is_done and self._start + self._count / self.fps <= time:
            self._emit()

    def _emit(self) -> None:
        if self._fitted is None:
            assert self._waiting is not None
            pixels = self._fit(self._waiting[0])
            self._shape, self._fitted = pixels.shape, pixels.tobytes()
        if len(self._pixels) + len(self._fitted) > MAX_CLIP_BYTES:
            raise MediaError(
                f"{self._name}: the clip's frames need more than {MAX_CLIP_BYTES >> 30} GiB of memory. "
                "Ask for a smaller height and width, fewer frames per second or a shorter duration."
            )
        self._pixels += self._fitted
        self._count += 1


class MonoMixer:
    """Mixes sound down to one channel at one rate.

    Args:
        sample_rate: of the result.
    """

    def __init__(self, sample_rate: int) -> None:
        self._rate = sample_rate
        self._resampler: AudioResampler | None = None
        self._source: tuple[int, str, str] | None = None

    def goes_on(self, frame: AudioFrame) -> bool:
        """Whether a frame is of the kind of those before it."""
        return self._source == _kind_of(frame)

    def begin(self, frame: AudioFrame) -> NDArray[np.float32]:
        """Make ready for frames like this one. Returns the rest of those before it, (S,) float32."""
        rest = self._resample(None)
        # By default swresample adds channels up beyond full scale; this makes the sum of the weights 1.
        self._resampler = AudioResampler(
            format="flt", layout="mono", rate=self._rate, options={"rematrix_maxval": "1.0"}
        )
        self._source = _kind_of(frame)
        return rest

    def add(self, frame: AudioFrame) -> NDArray[np.float32]:
        """What is ready with this frame, (S,) float32; the rest follows with the next ones."""
        frame.pts = None
        return self._resample(frame)

    def finish(self) -> NDArray[np.float32]:
        """The rest, (S,) float32."""
        return self._resample(None)

    def _resample(self, frame: AudioFrame | None) -> NDArray[np.float32]:
        made = [] if self._resampler is None else self._resampler.resample(frame)
        pieces = [np.asarray(one.to_ndarray(), np.float32).reshape(-1) for one in made]
        return np.concatenate(pieces) if pieces else np.zeros(0, np.float32)


def _kind_of(frame: AudioFrame) -> tuple[int, str, str]:
    return frame.sample_rate, frame.layout.name, frame.format.name


class SampleCollector:
    """Lays sound, mixed down to one channel at one rate, where its time stamps say.

    Args:
        name: the file's, for messages.
        sample_rate: of the result.
        start: seconds from the file's beginning to sample 0.
        duration: seconds to cover at most; None takes everything.
        max_duration: seconds beyond which a file of open length is refused.
    """

    def __init__(
        self, name: str, sample_rate: int, start: Fraction, duration: Fraction | None, max_duration: Fraction
    ) -> None:
        self.sample_rate = sample_rate
        self.end: Fraction | None = None
        self._name = name
        self._start = start
        self._duration = duration
        self._max_duration = max_duration
        self._pieces: list[tuple[int, list[NDArray[np.float32]]]] = []
        self._mixer = MonoMixer(sample_rate)
        self._is_closed = False

    @property
    def is_done(self) -> bool:
        """Whether the whole duration that was asked for has its samples, as far as there are any."""
        if self._is_closed:
            return True
        # A little more than asked for, so that the resampler's last taps rest on real samples.
        return self.end is not None and self._duration is not None and self.end >= self._start + self._duration + GAP

    def close(self) -> None:
        """Say that no more sound of what was asked for will come."""
        self._is_closed = True

    def add(self, frame: AudioFrame, time: Fraction | None) -> None:
        """Take the next decoded frame, heard at `time` (None: right after the one before)."""
        if time is None:
            time = self._start if self.end is None else self.end
        if self.end is None or not self._mixer.goes_on(frame) or abs(time - self.end) > GAP:
            rest = self._mixer.begin(frame)
            if self._pieces:
                self._keep(rest)
            self._pieces.append((round_half_up((time - self._start) * self.sample_rate), []))
            self.end = time
        self.end += Fraction(frame.samples, frame.sample_rate)
        if self._duration is None and self.end - self._start > self._max_duration + GAP:
            raise too_long(self._name, self._max_duration)
        self._keep(self._mixer.add(frame))

    def finish(self, num_samples: int | None, end: Fraction | None) -> NDArray[np.float32] | None:
        """(S,) float32 in [-1, 1]; silence where the file has none; None if nothing was heard at or after start.

        Args:
            num_samples: S; None takes what there is, at most the duration that was asked for.
            end: seconds at which the file says that its sound ends, where what is decoded beyond is only padding.
        """
        if self._pieces:
            self._keep(self._mixer.finish())
        placed = [(first, np.concatenate(parts)) for first, parts in self._pieces if parts]
        last = max((first + len(samples) for first, samples in placed), default=0)
        if end is not None:
            last = min(last, round_half_up((end - self._start) * self.sample_rate))
        if self._duration is not None:
            last = min(last, round_half_up(self._duration * self.sample_rate))
        if last <= 0:
            return None
        result = np.zeros(last if num_samples is None else num_samples, np.float32)
        for first, samples in placed:
            inside = samples[max(0, -first) : max(0, min(last, len(result)) - first)]
            result[max(0, first) : max(0, first) + len(inside)] = inside
        if not np.isfinite(result).all():
            raise MediaError(f"{self._name}: its sound holds values that are not numbers. Make the file again.")
        return np.clip(result, -1.0, 1.0)  # lossy codecs overshoot

    def _keep(self, samples: NDArray[np.float32]) -> None:
        first, parts = self._pieces[-1]
        if not parts and first + len(samples) <= 0:
            # Wholly before the start: move the piece's beginning instead of keeping what will be cut off.
            self._pieces[-1] = (first + len(samples), parts)
        else:
            parts.append(samples)


def too_long(name: str, max_duration: Fraction) -> MediaError:
    """The error for a file of more than max_duration seconds."""
    return MediaError(
        f"{name}: lasts longer than {float(max_duration):g} s. Cut it, read a part of it with start and "
        "duration, or allow more with a larger max_duration."
    )
