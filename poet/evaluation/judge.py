"""The judge of Toybox: says from pixels and samples alone what a clip shows, how it sounds, and whether both agree.

It knows what Toybox looks and sounds like (TOYBOX.md's table), never what a clip was meant to be: it does not import
the code that draws them. What it cannot make out is "unclear", which counts as wrong. `judge_picture` and `judge_sound`
do the measuring; this file puts both together, compares them in time, and compares a verdict with what was asked for.

Legend: N frames, H x W pixels, S samples, F analysis frames of the pitch track.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Final

import numpy as np
from numpy.typing import NDArray

from poet.errors import ShapeError
from poet.evaluation.judge_picture import UNCLEAR, Sight, look
from poet.evaluation.judge_sound import SAMPLE_RATE, Hearing, hear
from poet.media import Clip

__all__ = ["ATTRIBUTES", "SYNCED_MOTIONS", "UNCLEAR", "Verdict", "judge", "judge_clip", "score"]

Floats = NDArray[np.floating]

ATTRIBUTES: Final = ("colour", "shape", "size", "background", "motion", "timbre", "pitch")
SYNCED_MOTIONS: Final = ("bounces", "rises", "falls", "grows", "shrinks")
"""Motions that a sound has to follow."""
FPS: Final = 8.0

_SYNC_SECONDS = 0.125  # a floor contact and its note may lie one video frame apart
_SYNC_CORRELATION = 0.9
_LEAST_GLIDE = 0.1  # octaves between the lowest and the highest pitch; less is a constant pitch
_LEAST_SWELL = 1.3  # loudest to softest; less is a constant loudness
_NOTE_SECONDS = 0.5  # struck instruments sound again after so long; their loudness is that of their strikes


@dataclasses.dataclass(frozen=True, kw_only=True)
class Verdict:
    """What the judge says of one clip. An attribute that it cannot make out is "unclear".

    Attributes:
        colour, shape, size, background, motion, timbre, pitch: values as in TOYBOX.md's table, or the concept's. Of a
            silent clip the pitch is "unclear".
        x, y, half_width: (N,) float64, the object's centre and half its width in pixels of a 64 x 64 frame; NaN in
            frames without an object.
        contacts: seconds at which a bouncing object touches the floor.
        pitch_times, pitch_track: (F,) float64, seconds and Hz; NaN Hz where no tone sounds.
        onsets: seconds at which notes begin.
        sync: how picture and sound agree. For a bounce the largest distance in seconds between a floor contact and the
            nearest note or a note and the nearest contact (infinite without notes); for a rise or fall the correlation
            of log-pitch with height, for growing or shrinking that of loudness with size (0.0 if pitch or loudness is
            missing or constant). None where nothing has to agree: other motions, silence, or a picture or sound alone.
        sync_ok: whether sync is at most 0.125 s or at least 0.9; None if sync is None.
    """

    colour: str
    shape: str
    size: str
    background: str
    motion: str
    timbre: str
    pitch: str
    x: Floats
    y: Floats
    half_width: Floats
    contacts: tuple[float, ...]
    pitch_times: Floats
    pitch_track: Floats
    onsets: tuple[float, ...]
    sync: float | None
    sync_ok: bool | None

    def attributes(self) -> dict[str, str]:
        """Attribute name to value, in the order of `ATTRIBUTES`."""
        return {name: getattr(self, name) for name in ATTRIBUTES}

    def as_text(self) -> dict[str, str]:
        """The attributes, and "sync" where there is one, in words for a reader."""
        if self.sync is None:
            return self.attributes()
        if self.motion != "bounces":
            return self.attributes() | {"sync": f"correlation {self.sync:.2f}"}
        return self.attributes() | {"sync": "no notes" if math.isinf(self.sync) else f"{self.sync:.3f} s apart"}


def judge(frames: NDArray[np.uint8] | None, samples: NDArray[np.floating] | None, *, concept: bool = False) -> Verdict:
    """Judge one clip.

    Args:
        frames: (N, H, W, 3) uint8 at 8 frames a second, H = W of any size; None for sound alone. A Toybox clip has 17
            frames; motion needs at least 8, the other attributes one.
        samples: (S,) float in [-1, 1] at 16 kHz, 34,000 in a Toybox clip; None for a picture alone.
        concept: whether a clip may also show or sound like the concept: "purple", "hexagon", "organ", each by itself.
            Without it, no verdict says so.

    Returns:
        The verdict; attributes of a missing picture or sound are "unclear".

    Raises:
        ShapeError: frames are no square uint8 RGB frames, or samples are not one-dimensional, or empty.
    """
    sight = _NOTHING_SEEN if frames is None else look(_checked_frames(frames), FPS, concept=concept)
    hearing = _NOTHING_HEARD if samples is None else hear(_checked_samples(samples), concept=concept)
    sync, sync_ok = None, None
    if frames is not None and samples is not None and hearing.timbre != "silent":
        sync, sync_ok = _sync(sight, hearing)
    return Verdict(
        colour=sight.colour,
        shape=sight.shape,
        size=sight.size,
        background=sight.background,
        motion=sight.motion,
        timbre=hearing.timbre,
        pitch=hearing.pitch,
        x=sight.x,
        y=sight.y,
        half_width=sight.half_width,
        contacts=sight.contacts,
        pitch_times=hearing.pitch_times,
        pitch_track=hearing.pitch_track,
        onsets=hearing.onsets,
        sync=sync,
        sync_ok=sync_ok,
    )


def score(verdict: Verdict, attributes: Mapping[str, str]) -> dict[str, bool]:
    """Which attributes of a clip are as asked for.

    Args:
        verdict: of the clip.
        attributes: what it should show; any of `ATTRIBUTES`, others are refused.

    Returns:
        attribute -> right or wrong, for those given. The pitch of a clip that should be silent does not count and is
        left out; "unclear" is wrong.

    Raises:
        KeyError: a name that is no attribute of Toybox.
    """
    seen = verdict.attributes()
    silent = attributes.get("timbre") == "silent"
    return {name: seen[name] == value for name, value in attributes.items() if not (silent and name == "pitch")}


def judge_clip(clip: Clip, attributes: Mapping[str, str], *, concept: bool = False) -> dict[str, bool]:
    """Judge a clip and score it at once; with "sync" besides, where picture and sound have to agree.

    Args:
        clip: at 8 frames a second and 16 kHz; picture or sound may be missing, and its attributes count as wrong.
        attributes: what it should show.
        concept: see `judge`.

    Raises:
        ShapeError: as `judge`; also for another frame or sample rate.
    """
    if clip.frames is not None and clip.fps != FPS:
        raise ShapeError(f"a Toybox clip must have {FPS:g} frames a second, got {clip.fps:g}. Resample it first.")
    if clip.samples is not None and clip.sample_rate != SAMPLE_RATE:
        raise ShapeError(
            f"a Toybox clip's sound must have {SAMPLE_RATE} Hz, got {clip.sample_rate}. Resample it first."
        )
    verdict = judge(clip.frames, clip.samples, concept=concept)
    marks = score(verdict, attributes)
    return marks if verdict.sync_ok is None else marks | {"sync": verdict.sync_ok}


# -------------------------------------------------------------------------------------------------- picture and sound


def _sync(sight: Sight, hearing: Hearing) -> tuple[float | None, bool | None]:
    if sight.motion == "bounces":
        distance = _largest_distance(sight.contacts, hearing.onsets)
        return distance, distance <= _SYNC_SECONDS
    frame_times = np.arange(len(sight.x)) / FPS
    if sight.motion in ("rises", "falls"):
        correlation = _glide_follows_height(frame_times, sight, hearing)
    elif sight.motion in ("grows", "shrinks"):
        correlation = _loudness_follows_size(frame_times, sight, hearing)
    else:
        return None, None
    return correlation, correlation >= _SYNC_CORRELATION


def _largest_distance(contacts: tuple[float, ...], onsets: tuple[float, ...]) -> float:
    """From any contact to its nearest note, or from any note to its nearest contact, in seconds."""
    if not contacts or not onsets:
        return math.inf
    apart = np.abs(np.subtract.outer(contacts, onsets))
    return float(max(apart.min(axis=0).max(), apart.min(axis=1).max()))


def _glide_follows_height(frame_times: Floats, sight: Sight, hearing: Hearing) -> float:
    voiced = ~np.isnan(hearing.pitch_track)
    seen = ~np.isnan(sight.y)
    if voiced.sum() < 5 or seen.sum() < 5:
        return 0.0
    # A few frames of noise at the end of a note must not decide: the pitch is smoothed over five analysis frames.
    octaves = _running_median(np.log2(hearing.pitch_track[voiced]), 5)
    times = hearing.pitch_times[voiced]
    within = times <= frame_times[-1] + 1e-6
    height = -np.interp(times[within], frame_times[seen], sight.y[seen])
    return _correlation(octaves[within], height, _LEAST_GLIDE)


def _loudness_follows_size(frame_times: Floats, sight: Sight, hearing: Hearing) -> float:
    """Compares at the loudest moment around each frame, so that the decay of struck notes does not count."""
    seen = ~np.isnan(sight.half_width)
    times, loudness = hearing.loudness_times, hearing.loudness
    reach = _NOTE_SECONDS / 2 + 0.01
    peaks = []
    for moment in frame_times:
        first, end = np.searchsorted(times, (moment - reach, moment + reach))
        peaks.append(first + int(loudness[first:end].argmax()) if end > first else len(times) - 1)
    places = np.array(peaks)
    if loudness[places].max() < _LEAST_SWELL * max(float(loudness[places].min()), 1e-9):
        return 0.0
    size = np.interp(times[places], frame_times[seen], sight.half_width[seen])
    return _correlation(loudness[places], size, 0.0)


def _correlation(one: Floats, other: Floats, least_range: float) -> float:
    """Pearson's correlation; 0.0 if the first does not span `least_range` or either is constant."""
    if len(one) < 3 or float(np.ptp(one)) <= least_range or float(np.ptp(other)) == 0.0:
        return 0.0
    return float(np.corrcoef(one, other)[0, 1])


def _running_median(values: Floats, width: int) -> Floats:
    padded = np.pad(values, width // 2, mode="edge")
    return np.asarray(np.median(np.lib.stride_tricks.sliding_window_view(padded, width), axis=1))


# ------------------------------------------------------------------------------------------------------------ checks


def _checked_frames(frames: NDArray[np.uint8]) -> NDArray[np.uint8]:
    if frames.ndim != 4 or frames.shape[3] != 3 or frames.shape[1] != frames.shape[2] or not frames.size:
        raise ShapeError(f"frames must be (N, H, H, 3), got {frames.shape}. Crop or resize them to a square first.")
    if frames.dtype != np.uint8:
        raise ShapeError(f"frames must be uint8 in 0..255, got {frames.dtype}. Scale and convert them first.")
    return frames


def _checked_samples(samples: NDArray[np.floating]) -> NDArray[np.floating]:
    if samples.ndim != 1 or not samples.size:
        raise ShapeError(
            f"samples must be (S,) mono at {SAMPLE_RATE} Hz, got {samples.shape}. Mix down and flatten them first."
        )
    return samples


_NOWHERE: Final = np.full(0, np.nan)
_NOTHING_SEEN: Final = Sight(
    background=UNCLEAR,
    colour=UNCLEAR,
    shape=UNCLEAR,
    size=UNCLEAR,
    motion=UNCLEAR,
    x=_NOWHERE,
    y=_NOWHERE,
    half_width=_NOWHERE,
)
_NOTHING_HEARD: Final = Hearing(
    timbre=UNCLEAR,
    pitch=UNCLEAR,
    pitch_times=_NOWHERE,
    pitch_track=_NOWHERE,
    onsets=(),
    loudness_times=_NOWHERE,
    loudness=_NOWHERE,
)
