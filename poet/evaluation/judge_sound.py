"""What can be heard in a Toybox clip: timbre, pitch, the course of pitch and loudness, and when notes begin.

Reads samples only. The method: each short frame of sound is explained by one fundamental whose harmonics hold the power
and between whose harmonics there is little; timbre is read off how that power is spread over the harmonics and over the
inharmonic partials of a bell; an organ is told by its tremolo. What no fundamental explains is noise, and "unclear".

Legend: S samples, F analysis frames (one each `HOP` samples, frame n centred on sample n * HOP), P candidate pitches,
K harmonics.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Final

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import uniform_filter1d
from scipy.stats import theilslopes

__all__ = ["CONCEPT_TIMBRE", "PITCHES", "SAMPLE_RATE", "TIMBRES", "Hearing", "hear"]

Floats = NDArray[np.floating]

UNCLEAR: Final = "unclear"
SAMPLE_RATE: Final = 16_000
PITCHES: Final[dict[str, float]] = {"low": 220.0, "middle": 440.0, "high": 880.0}
TIMBRES: Final = ("flute", "buzzer", "string", "bell", "silent")
CONCEPT_TIMBRE: Final = "organ"
HOP: Final = 1000

_WINDOW = 2048
_TRANSFORM = 4096
_BIN = SAMPLE_RATE / _TRANSFORM
_HIGHEST = 7000.0  # Hz; codecs lose what lies above
_BELL_PARTIALS = (2.76, 5.40)
_NUM_HARMONICS = 8
_SILENCE = 0.02  # largest root mean square of any 25 ms that still counts as silence
_AUDIBLE = 0.1  # of the loudest frame's amplitude; quieter frames are not asked for a pitch
_TONALITY = 0.7  # least share of the power around the low harmonics that one fundamental explains
_PITCH_SCATTER = 0.1  # octaves, median distance from a steady or gliding pitch
_BELL_SHARE = 0.05
_FLUTE_OVERTONES = 0.03  # power of the third harmonic and above in all
_FLUTE_SECOND = 0.16  # power of the second harmonic relative to the first
_SAW_DISTANCE = 0.11  # mean over harmonics of the difference in amplitude
_ENVELOPE_HOP = 80  # 5 ms
_ENVELOPE_WINDOW = 320
_ONSET_STEP = 5  # envelope hops between "before" and "after"
_ONSET_RISE = math.log(1.6)
_ONSET_FLOOR = 0.04  # of the loudest moment: below it no note begins
_NOISE_LIMIT = 0.25  # of the loudest moment
_ONSET_DISTANCE = 24  # envelope hops, 0.12 s
_REEDS = ("buzzer", "string")  # an organ without its tremolo would be taken for one of them
_TREMOLO = 16 / 3  # Hz
_TREMOLO_DEPTH = 0.18  # least swing of the logarithm of the loudness
_TREMOLO_SHARE = 0.25  # of what the loudness does besides growing and decaying, that the tremolo explains at least
_NOTE_DISTANCE = 0.4  # seconds; what rises sooner after an organ's note is its tremolo
_NOTE_QUIET = 0.25  # of an organ's new note, the loudness before it at most
_NOTE_AUDIBLE = 0.06  # of a note's loudest moment; softer ones do not tell a tremolo


@dataclasses.dataclass(frozen=True, kw_only=True)
class Hearing:
    """What was heard.

    Attributes:
        timbre: one of TIMBRES, "organ" or "unclear".
        pitch: "low", "middle", "high" or "unclear"; of a glide, the pitch halfway.
        pitch_times: (F,) float64, seconds.
        pitch_track: (F,) float64 in Hz, NaN where no tone was found.
        onsets: seconds at which a note begins.
        loudness_times: (E,) float64, seconds.
        loudness: (E,) float64, root mean square amplitude around those times.
    """

    timbre: str
    pitch: str
    pitch_times: Floats
    pitch_track: Floats
    onsets: tuple[float, ...]
    loudness_times: Floats
    loudness: Floats


def hear(samples: NDArray[np.floating], *, concept: bool = False) -> Hearing:
    """Measure the sound.

    Args:
        samples: (S,) float in [-1, 1] at 16 kHz.
        concept: whether it may be an organ; without it, there is none.

    Returns:
        What was heard; timbre "silent" if there is no sound, "unclear" if there is no tone.
    """
    signal = np.nan_to_num(samples.astype(np.float64))
    loudness = _envelope(signal)
    loudness_times = np.arange(len(loudness)) * (_ENVELOPE_HOP / SAMPLE_RATE)
    spectrum = _spectrum(signal)
    pitch_times = np.arange(len(spectrum)) * (HOP / SAMPLE_RATE)
    track = np.full(len(spectrum), np.nan)
    timbre, pitch = "silent", UNCLEAR
    onsets: tuple[float, ...] = ()
    if loudness.max() > _SILENCE:
        onsets = _onsets(loudness)
        timbre, pitch, track = _tone(spectrum, pitch_times)
        if concept and timbre in _REEDS and _has_tremolo(loudness, onsets):
            timbre, onsets = CONCEPT_TIMBRE, _after_quiet(onsets, loudness)
    return Hearing(
        timbre=timbre,
        pitch=pitch,
        pitch_times=pitch_times,
        pitch_track=track,
        onsets=onsets,
        loudness_times=loudness_times,
        loudness=loudness,
    )


# -------------------------------------------------------------------------------------------------- loudness, onsets


def _envelope(signal: Floats) -> Floats:
    """Root mean square amplitude of 20 ms around every fifth millisecond."""
    power = uniform_filter1d(signal * signal, _ENVELOPE_WINDOW, mode="constant")[::_ENVELOPE_HOP]
    return np.sqrt(np.maximum(power, 0.0))


def _onsets(loudness: Floats) -> tuple[float, ...]:
    """Where the loudness jumps by more than a note's own course explains."""
    loudest, quietest = float(loudness.max()), float(np.percentile(loudness, 10))
    # Notes with pauses show the level of the noise between them; a sustained sound does not and starts from silence.
    noise = quietest if quietest < _NOISE_LIMIT * loudest else 0.0
    level = np.log(np.concatenate([np.full(2 * _ONSET_STEP, noise), loudness]) + noise + _ONSET_FLOOR * loudest)
    rise = level[_ONSET_STEP:] - level[:-_ONSET_STEP]
    # rise[i] spans the loudness from i - 2 steps to i - 1 step, so its middle lies 1.5 steps before i.
    onsets: list[float] = []
    order = [int(i) for i in np.argsort(-rise, kind="stable") if rise[i] > _ONSET_RISE]
    taken: list[int] = []
    for i in order:
        if all(abs(i - j) >= _ONSET_DISTANCE for j in taken):
            taken.append(i)
            onsets.append(max(0.0, (i - 1.5 * _ONSET_STEP) * _ENVELOPE_HOP / SAMPLE_RATE))
    return tuple(sorted(onsets))


def _after_quiet(onsets: tuple[float, ...], loudness: Floats) -> tuple[float, ...]:
    """The onsets of notes, without those that are a tremolo's: it was as loud one swing before."""
    rate = SAMPLE_RATE / _ENVELOPE_HOP
    notes = []
    for onset in onsets:
        place = round(onset * rate)
        before = loudness[max(0, place - round(rate / _TREMOLO)) : max(0, place - 2)]
        after = loudness[place : place + round(0.08 * rate)]
        if len(before) < 10 or float(np.median(before)) < _NOTE_QUIET * float(after.max(initial=0.0)):
            notes.append(onset)
    return tuple(notes)


def _has_tremolo(loudness: Floats, onsets: tuple[float, ...]) -> bool:
    """Whether the loudness from one note to the next, but for growth and decay, swings as an organ's does."""
    rate = SAMPLE_RATE / _ENVELOPE_HOP
    depth = explained = total = weight = 0.0
    starts: list[float] = []
    for onset in onsets:
        if not starts or onset - starts[-1] >= _NOTE_DISTANCE:
            starts.append(onset)
    starts = starts or [0.0]
    for start, end in zip(starts, (*starts[1:], len(loudness) / rate), strict=True):
        places = np.arange(round((start + 0.02) * rate), round((end - 0.03) * rate))
        if not len(places):
            continue
        places = places[loudness[places] > _NOTE_AUDIBLE * loudness[places].max()]
        if len(places) < 1.2 * rate / _TREMOLO:
            continue
        time = places / rate - start
        level = np.log(loudness[places])
        course = np.stack([np.ones_like(time), time, time * time], axis=1)
        angle = 2 * np.pi * _TREMOLO * time
        swing = np.stack([np.cos(angle), np.sin(angle)], axis=1)
        plain = level - course @ np.linalg.lstsq(course, level, rcond=None)[0]
        both = np.concatenate([course, swing], axis=1)
        fit = np.linalg.lstsq(both, level, rcond=None)[0]
        rest = level - both @ fit
        depth += float(np.hypot(fit[3], fit[4])) * len(places)
        total, explained = total + float(plain @ plain), explained + float(plain @ plain - rest @ rest)
        weight += len(places)
    return weight > 0 and depth / weight > _TREMOLO_DEPTH and explained > _TREMOLO_SHARE * total


# -------------------------------------------------------------------------------------------------------------- tone


def _spectrum(signal: Floats) -> Floats:
    """(F, _TRANSFORM / 2 + 1) magnitudes, F = 1 + S // HOP, in windows of 128 ms."""
    padded = np.concatenate([np.zeros(_WINDOW // 2), signal, np.zeros(_WINDOW)])
    count = 1 + len(signal) // HOP
    frames = np.lib.stride_tricks.sliding_window_view(padded, _WINDOW)[::HOP][:count]
    return np.abs(np.fft.rfft(frames * np.hanning(_WINDOW), _TRANSFORM))


@dataclasses.dataclass(frozen=True)
class _Comb:
    """Where the harmonics of each candidate pitch lie in a spectrum."""

    pitches: Floats  # (P,) Hz
    on: NDArray[np.intp]  # (P, K) bins of the harmonics
    between: NDArray[np.intp]  # (P, K) bins half a harmonic below them
    weights: Floats  # (P, K)


@functools.cache
def _comb() -> _Comb:
    pitches = np.geomspace(140.0, 1350.0, 118)
    harmonics = np.arange(1, 11)
    on = pitches[:, None] * harmonics
    weights = 0.84 ** (harmonics - 1.0) * (on < _HIGHEST)
    last = _TRANSFORM // 2
    return _Comb(
        pitches=pitches,
        on=np.minimum(np.rint(on / _BIN).astype(np.intp), last),
        between=np.minimum(np.rint((on - pitches[:, None] / 2) / _BIN).astype(np.intp), last),
        weights=weights,
    )


def _tone(spectrum: Floats, times: Floats) -> tuple[str, str, Floats]:
    """Timbre, pitch and the (F,) track of pitch in Hz."""
    amplitude = np.sqrt((spectrum * spectrum).sum(axis=1))
    audible = amplitude > _AUDIBLE * amplitude.max()
    fundamental = _fundamentals(spectrum)
    power = _Power(spectrum)
    around = power.between(0.5 * fundamental, 4.5 * fundamental)
    low = [power.near(ratio * fundamental) for ratio in (1.0, 2.0, 3.0, 4.0, _BELL_PARTIALS[0])]
    explained = np.sum(low, axis=0) / np.maximum(around, 1e-12)
    tonal = audible & (explained > _TONALITY)
    track = np.where(tonal, fundamental, np.nan)
    weight = amplitude * amplitude
    if tonal.sum() < 2 or weight[tonal].sum() < 0.5 * weight[audible].sum():
        return UNCLEAR, UNCLEAR, np.full(len(track), np.nan)
    return _timbre(power, fundamental, tonal), _pitch(np.log2(fundamental[tonal]), times[tonal], times[-1]), track


def _fundamentals(spectrum: Floats) -> Floats:
    """(F,) the pitch in Hz at which the harmonics hold most and the places between them least."""
    comb = _comb()
    height = np.sqrt(spectrum / np.maximum(spectrum.max(axis=1, keepdims=True), 1e-9))
    score = ((height[:, comb.on] - 0.6 * height[:, comb.between]) * comb.weights).sum(axis=2)
    coarse = comb.pitches[score.argmax(axis=1)]
    # The strongest of the first three harmonics, found to a fraction of a bin, says the pitch more finely.
    rows = np.arange(len(spectrum))
    best, fine = np.zeros(len(spectrum)), coarse.copy()
    for harmonic in (1, 2, 3):
        centre = np.rint(harmonic * coarse / _BIN).astype(np.intp)
        reach = np.arange(-6, 7) * harmonic // 2
        bins = np.clip(centre[:, None] + reach, 1, spectrum.shape[1] - 2)
        peak = bins[rows, spectrum[rows[:, None], bins].argmax(axis=1)]
        below, here, above = (np.log(spectrum[rows, peak + o] + 1e-12) for o in (-1, 0, 1))
        curve = below - 2 * here + above
        shift = np.where(curve < -1e-9, 0.5 * (below - above) / np.where(curve < -1e-9, curve, -1.0), 0.0)
        better = spectrum[rows, peak] > 1.5 * best
        best = np.where(better, spectrum[rows, peak], best)
        fine = np.where(better, (peak + np.clip(shift, -0.5, 0.5)) * _BIN / harmonic, fine)
    return fine


class _Power:
    """Sums of power over bands of frequency, a different band in every frame."""

    def __init__(self, spectrum: Floats) -> None:
        power = spectrum * spectrum
        self._sums = np.concatenate([np.zeros((len(spectrum), 1)), np.cumsum(power, axis=1)], axis=1)
        self._rows = np.arange(len(spectrum))
        # Most bins of a tone lie between its partials; white noise has its mean at 1 / log 2 of its median.
        self._noise = np.median(power[:, ::4], axis=1) / math.log(2)

    def between(self, low: Floats, high: Floats, *, less_noise: bool = False) -> Floats:
        """(F,) power from `low` to `high` Hz, less that of the noise between the partials if asked for."""
        last = self._sums.shape[1] - 1
        first = np.clip(np.rint(low / _BIN), 0, last).astype(np.intp)
        end = np.clip(np.rint(high / _BIN) + 1, 0, last).astype(np.intp)
        end = np.maximum(first, end)
        power = self._sums[self._rows, end] - self._sums[self._rows, first]
        return np.maximum(power - self._noise * (end - first), 0.0) if less_noise else power

    def near(self, frequency: Floats, *, less_noise: bool = False) -> Floats:
        """(F,) power of the partial at `frequency` Hz, with the width that the window and a glide give it."""
        width = 5 * _BIN + 0.025 * frequency
        power = self.between(frequency - width, frequency + width, less_noise=less_noise)
        return np.where(frequency < _HIGHEST, power, 0.0)


def _timbre(power: _Power, fundamental: Floats, tonal: NDArray[np.bool_]) -> str:
    """The instrument, from the power of harmonics and of a bell's partials."""
    orders = range(1, _NUM_HARMONICS + 1)
    harmonics = np.array([power.near(k * fundamental, less_noise=True)[tonal] for k in orders])  # (K, F)
    partials = np.array([power.near(ratio * fundamental, less_noise=True)[tonal] for ratio in _BELL_PARTIALS])
    total = harmonics.sum(axis=1)
    everything = max(float(total.sum() + partials.sum()), 1e-12)
    if partials.sum() / everything > _BELL_SHARE and partials[0].sum() > total[1] and partials[0].sum() > total[2]:
        return "bell"
    if total[2:].sum() / total.sum() < _FLUTE_OVERTONES and total[1] < _FLUTE_SECOND * total[0]:
        return "flute"
    # A saw's harmonics fall as 1 / k from beginning to end; a string starts brighter and ends nearly pure.
    first = np.arange(1, 6)[:, None]
    saw = np.where(first * fundamental[tonal] < _HIGHEST, 1.0 / first**2, 0.0)
    heights = np.sqrt(harmonics[:5] / np.maximum(harmonics[:5].sum(axis=0), 1e-12))
    distance = np.abs(heights - np.sqrt(saw / saw.sum(axis=0))).mean(axis=0)
    loudness = np.sqrt(harmonics.sum(axis=0))
    return "buzzer" if float(np.average(distance, weights=loudness)) < _SAW_DISTANCE else "string"


def _pitch(octaves: Floats, times: Floats, end: float) -> str:
    """The named pitch nearest to the middle of a steady or gliding tone; `octaves` is its track, log2 of Hz."""
    slope = float(theilslopes(octaves, times)[0]) if len(times) > 2 else 0.0
    levelled = octaves - slope * (times - end / 2)
    middle = float(np.median(levelled))
    if float(np.median(np.abs(levelled - middle))) > _PITCH_SCATTER:
        return UNCLEAR
    distances = {name: abs(middle - math.log2(hertz)) for name, hertz in PITCHES.items()}
    pitch = min(distances, key=distances.__getitem__)
    return pitch if distances[pitch] <= 0.5 else UNCLEAR
