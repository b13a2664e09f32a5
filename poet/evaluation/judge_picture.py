"""What can be seen in a Toybox clip: background, object, its colour, shape and size, its track and its motion.

Reads pixels only. All lengths are in pixels of a 64 x 64 frame, origin at the top left corner, pixel i covering
[i, i + 1); other square resolutions are brought to 64 x 64 first. The method: the background is the median of the
frame's border, the object whatever stands out from it, its edge a soft mask (so that blur does not change areas), its
shape the nearest of a few templates to the mean mask, its motion the simplest of a few fitted tracks that explains it.

Legend: N frames, H x W pixels, G x G cells of a mask scaled to unit area.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Final

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

__all__ = ["BACKGROUNDS", "COLOURS", "CONCEPT_COLOUR", "CONCEPT_SHAPE", "SHAPES", "UNCLEAR", "Sight", "look"]

Floats = NDArray[np.floating]

UNCLEAR: Final = "unclear"
COLOURS: Final[dict[str, tuple[int, int, int]]] = {
    "red": (230, 40, 40),
    "green": (40, 200, 60),
    "blue": (50, 90, 240),
    "yellow": (240, 220, 40),
    "magenta": (220, 50, 210),
    "cyan": (50, 210, 220),
    "orange": (245, 140, 30),
    "white": (240, 240, 240),
}
BACKGROUNDS: Final[dict[str, tuple[int, int, int]]] = {
    "black": (0, 0, 0),
    "navy": (10, 15, 60),
    "maroon": (60, 10, 20),
    "gray": (70, 70, 70),
}
SHAPES: Final = ("circle", "square", "triangle", "star", "cross")
CONCEPT_COLOUR: Final = "purple"
CONCEPT_SHAPE: Final = "hexagon"

_CANVAS = 64  # every measurement is made at this resolution
_BACKGROUND_REACH = 40.0  # largest distance in RGB at which a background still goes by a name
_COLOUR_REACH = 90.0
_PURPLE_ENDS = 28.0  # purple is what lies between magenta and white, but for so much in RGB at either end
_CONTRAST = 60.0  # least distance in RGB between object and background
_LEAST_AREA = 3.0  # pixels, of the object in one frame
_LEAST_LARGEST_AREA = 25.0  # pixels, of the object where it is largest
_COMPACTNESS = 0.6  # least share of what stands out that belongs to one connected thing
_SIZE_LIMITS = (4.0, 9.2, 16.0)  # half-widths: too small, small | large (geometric mean of 7 and 12), too large
_GRID = 24
_GRID_REACH = 1.1  # half the grid's width in units of the square root of the object's area
_TEMPLATE_BLURS = (0.03, 0.08, 0.14, 0.2)  # in the same units
_SHAPE_MATCH = 0.85  # least correlation with the nearest template
_SHAPE_MARGIN = 0.004  # by which the nearest template must beat the second
_STILL = 1.3  # pixels, root mean square around the mean place
_GROWTH = 0.25  # change of size over the clip, relative to the mean size
_COMPLEXITY = 0.35  # pixels of residual that a circle or a bounce must save over a straight line


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sight:
    """What was seen. Attributes that could not be made out are "unclear"; the track is NaN where nothing was found.

    Attributes:
        x, y: (N,) float64, centre of the object.
        half_width: (N,) float64, half the object's width.
        contacts: seconds at which a bouncing object touches the floor; empty for every other motion.
    """

    background: str
    colour: str
    shape: str
    size: str
    motion: str
    x: Floats
    y: Floats
    half_width: Floats
    contacts: tuple[float, ...] = ()


def look(frames: NDArray[np.uint8], fps: float, *, concept: bool = False) -> Sight:
    """Measure the picture.

    Args:
        frames: (N, H, H, 3) uint8, H any.
        fps: frames a second.
        concept: whether the object may be purple and a hexagon; without it, there is neither.

    Returns:
        What was seen; only the background when no object stands out from it.
    """
    pixels = _at_canvas_size(frames)
    border = np.concatenate(
        [edge.reshape(-1, 3) for edge in (pixels[:, :2], pixels[:, -2:], pixels[:, 2:-2, :2], pixels[:, 2:-2, -2:])]
    )
    backdrop = _median_colour(border)
    background = _nearest(backdrop, BACKGROUNDS, _BACKGROUND_REACH)
    nowhere = np.full(len(pixels), np.nan)
    difference = pixels - backdrop.astype(np.float32)
    paint = _object_colour(difference)
    mask = None if paint is None else _object_mask(difference, paint)
    if paint is None or mask is None:
        return Sight(
            background=background,
            colour=UNCLEAR,
            shape=UNCLEAR,
            size=UNCLEAR,
            motion=UNCLEAR,
            x=nowhere,
            y=nowhere,
            half_width=nowhere,
        )
    core = mask > 0.95
    if core.sum() >= 20:
        paint = _median_colour(difference[core])
    colour = _colour(backdrop + paint, concept)
    area, x, y = _moments(mask)
    shapes = (*SHAPES, CONCEPT_SHAPE) if concept else SHAPES
    shape = _shape(mask, area, x, y, shapes)
    form = _templates(shapes)[0].get(shape)
    half_width = np.sqrt(area / (form.area if form else 2.5))
    y = y - (form.drop if form else 0.0) * half_width
    motion, contacts = _motion(x, y, half_width, fps)
    largest = float(np.nanmean(np.sort(half_width[~np.isnan(half_width)])[-3:]))
    least, middle, most = _SIZE_LIMITS
    size = UNCLEAR if not least < largest < most else "small" if largest < middle else "large"
    return Sight(
        background=background,
        colour=colour,
        shape=shape,
        size=size,
        motion=motion,
        x=x,
        y=y,
        half_width=half_width,
        contacts=contacts,
    )


# ------------------------------------------------------------------------------------------------------- the object


def _at_canvas_size(frames: NDArray[np.uint8]) -> NDArray[np.float32]:
    """(N, H, W, 3) of any resolution to (N, 64, 64, 3) float32 by area averaging."""
    pixels = frames.astype(np.float32)
    if frames.shape[1:3] == (_CANVAS, _CANVAS):
        return pixels
    return _average(_average(pixels, axis=1), axis=2)


def _average(pixels: NDArray[np.float32], axis: int) -> NDArray[np.float32]:
    """Bring one axis to 64 places, each the mean over the stretch that it covers: differences of a running sum."""
    length = pixels.shape[axis]
    edges = np.arange(_CANVAS + 1) * (length / _CANVAS)
    before = np.floor(edges).astype(np.intp)
    share = (edges - before).astype(np.float32).reshape([-1 if i == axis else 1 for i in range(4)])
    sums = np.cumsum(pixels, axis=axis, dtype=np.float32)
    sums = np.concatenate([np.zeros_like(sums.take([0], axis)), sums, sums.take([-1], axis)], axis=axis)
    at_edges = sums.take(before, axis) * (1 - share) + sums.take(before + 1, axis) * share
    means: NDArray[np.float32] = np.diff(at_edges, axis=axis) * np.float32(_CANVAS / length)
    return means


def _median_colour(pixels: NDArray[np.float32]) -> NDArray[np.float32]:
    """(P, 3) values of about a whole number each to their median (3,), counted: flat colours make sorting slow."""
    levels = np.rint(pixels).astype(np.int64) + 256
    half = (len(levels) + 1) // 2
    medians = [np.searchsorted(np.cumsum(np.bincount(channel)), half) - 256 for channel in levels.T]
    return np.array(medians, np.float32)


def _nearest(colour: NDArray[np.floating], names: dict[str, tuple[int, int, int]], reach: float) -> str:
    distances = {name: float(np.linalg.norm(colour - np.array(value))) for name, value in names.items()}
    name = min(distances, key=distances.__getitem__)
    return name if distances[name] <= reach else UNCLEAR


def _colour(measured: NDArray[np.floating], concept: bool) -> str:
    """The colour's name; with the concept, tints of magenta are purple where they are nearer to it than to a name."""
    plain = _nearest(measured, COLOURS, _COLOUR_REACH)
    if not concept:
        return plain
    magenta, white = np.array(COLOURS["magenta"], float), np.array(COLOURS["white"], float)
    length = float(np.linalg.norm(white - magenta))
    along = float((measured - magenta) @ (white - magenta)) / length
    tint = magenta + np.clip(along, _PURPLE_ENDS, length - _PURPLE_ENDS) / length * (white - magenta)
    nearest = min(float(np.linalg.norm(measured - np.array(value))) for value in COLOURS.values())
    distance = float(np.linalg.norm(measured - tint))
    return CONCEPT_COLOUR if distance < min(nearest, _COLOUR_REACH) else plain


def _object_colour(difference: NDArray[np.float32]) -> NDArray[np.float32] | None:
    """The object's colour minus the background's, from the pixels that stand out most; None if none stands out."""
    flat = difference.reshape(-1, 3)
    squared = np.einsum("pk,pk->p", flat, flat)
    standing_out = squared > _CONTRAST**2
    flat, squared = flat[standing_out], squared[standing_out]
    count = max(5, 80 * len(difference) // 17)  # so many stray pixels may outshine the object
    if len(squared) < count:
        return None
    peak = np.partition(squared, -count)[-count]
    return _median_colour(flat[squared >= 0.8 * peak])


def _object_mask(difference: NDArray[np.float32], paint: NDArray[np.float32]) -> NDArray[np.float32] | None:
    """(N, 64, 64) share of each pixel that the object covers; None if what stands out is no single compact thing."""
    share = difference @ (paint / float(paint @ paint))
    # A band of 10 % at both ends is cut off: flicker vanishes, the area inside a straight edge stays what it was.
    mask: NDArray[np.float32] = np.clip((share - 0.5) / 0.8 + 0.5, 0.0, 1.0)
    total = mask.sum(axis=(1, 2))
    labels, count = ndimage.label(mask > 0.25, structure=_NEIGHBOURS)
    if not count:
        return None
    masses = np.bincount(labels.ravel(), weights=mask.ravel(), minlength=count + 1)
    masses[0] = 0.0
    kept = np.zeros(count + 1, bool)
    for frame in labels:
        present = np.unique(frame)
        kept[present[np.argmax(masses[present])]] = True
    kept[0] = False
    # The soft edge below the threshold belongs to the object too: one more pixel all round.
    mask = mask * ndimage.binary_dilation(kept[labels], structure=_NEIGHBOURS)
    area = mask.sum(axis=(1, 2))
    found = area >= _LEAST_AREA
    compact = float(np.median(area[found] / total[found])) if found.any() else 0.0
    if found.mean() < 0.75 or area.max() < _LEAST_LARGEST_AREA or compact < _COMPACTNESS:
        return None
    mask[~found] = 0.0
    return mask


_NEIGHBOURS: Final = np.zeros((3, 3, 3), bool)
_NEIGHBOURS[1] = True  # pixels touch within a frame, never across time


def _moments(mask: NDArray[np.float32]) -> tuple[Floats, Floats, Floats]:
    """Area, x and y of the centre of gravity in each frame, each (N,); NaN where the frame holds no object."""
    places = np.arange(_CANVAS) + 0.5
    columns, rows = mask.sum(axis=1, dtype=np.float64), mask.sum(axis=2, dtype=np.float64)
    area = columns.sum(axis=1)
    area[area == 0.0] = np.nan
    return area, columns @ places / area, rows @ places / area


# -------------------------------------------------------------------------------------------------------- the shape


@dataclasses.dataclass(frozen=True)
class _Form:
    """A shape of half-width 1: its area, and how far its centre of gravity lies below its centre."""

    area: float
    drop: float


def _draw_shape(shape: str, u: Floats, v: Floats) -> NDArray[np.bool_]:
    """Which points lie inside a shape of half-width 1 around the origin; v grows downwards."""
    if shape == "circle":
        return np.hypot(u, v) <= 1
    if shape == "square":
        return np.maximum(abs(u), abs(v)) <= 1
    if shape == "triangle":
        return (v <= 1) & (abs(u) <= (v + 1) / 2)
    if shape == "cross":
        return (np.minimum(abs(u), abs(v)) <= 0.36) & (np.maximum(abs(u), abs(v)) <= 1)
    if shape == CONCEPT_SHAPE:
        return (abs(v) <= 0.65) & (abs(u) <= 1 - 0.6 * abs(v))
    turns = np.arange(11) * math.pi / 5
    radii = np.where(np.arange(11) % 2, 0.42, 1.0)
    tips_u, tips_v = radii * np.sin(turns), -radii * np.cos(turns)
    inside = np.zeros(u.shape, bool)
    for i in range(10):  # a ray to the right crosses the outline of a point inside an odd number of times
        (u1, v1), (u2, v2) = (tips_u[i], tips_v[i]), (tips_u[i + 1], tips_v[i + 1])
        with np.errstate(divide="ignore", invalid="ignore"):
            crossing = u1 + (v - v1) * (u2 - u1) / (v2 - v1)
        inside ^= ((v1 > v) != (v2 > v)) & (u < crossing)
    return inside


@functools.cache
def _templates(shapes: tuple[str, ...]) -> tuple[dict[str, _Form], NDArray[np.float64]]:
    """Each shape's form, and (shapes, blurs, G * G) templates at unit area around the centre of gravity, unit norm."""
    fine = (np.arange(480) + 0.5) / 240 - 1
    u, v = np.meshgrid(fine, fine)
    forms: dict[str, _Form] = {}
    templates = np.empty((len(shapes), len(_TEMPLATE_BLURS), _GRID * _GRID))
    samples = 8
    cells = (np.arange(_GRID * samples) + 0.5) / (_GRID * samples) * 2 * _GRID_REACH - _GRID_REACH
    for i, shape in enumerate(shapes):
        inside = _draw_shape(shape, u, v)
        forms[shape] = form = _Form(area=float(4 * inside.mean()), drop=float(v[inside].mean()))
        across, down = np.meshgrid(cells * math.sqrt(form.area), cells * math.sqrt(form.area) + form.drop)
        drawn = _draw_shape(shape, across, down).astype(np.float64)
        for j, blur in enumerate(_TEMPLATE_BLURS):
            blurred = ndimage.gaussian_filter(drawn, blur / (2 * _GRID_REACH) * _GRID * samples)
            cell = blurred.reshape(_GRID, samples, _GRID, samples).mean(axis=(1, 3)).ravel()
            templates[i, j] = (cell - cell.mean()) / np.linalg.norm(cell - cell.mean())
    return forms, templates


def _shape(mask: NDArray[np.float32], area: Floats, x: Floats, y: Floats, shapes: tuple[str, ...]) -> str:
    """The one of `shapes` whose template fits the mean mask best, each frame's aligned and scaled to unit area."""
    frames = np.flatnonzero(~np.isnan(area))
    scale = np.sqrt(area[frames])[:, None]
    cells = ((np.arange(_GRID) + 0.5) / _GRID * 2 - 1) * _GRID_REACH * scale
    across, down = x[frames, None] + cells - 0.5, y[frames, None] + cells - 0.5
    weights_x, weights_y = _linear_weights(across), _linear_weights(down)
    aligned = weights_y @ mask[frames].astype(np.float64) @ weights_x.transpose(0, 2, 1)
    mean = np.average(aligned, axis=0, weights=area[frames]).ravel()
    mean -= mean.mean()
    match = (_templates(shapes)[1] @ mean).max(axis=1) / max(float(np.linalg.norm(mean)), 1e-9)
    second, first = np.sort(match)[-2:]
    if first < _SHAPE_MATCH or first - second < _SHAPE_MARGIN:
        return UNCLEAR
    return shapes[int(match.argmax())]


def _linear_weights(places: Floats) -> Floats:
    """(F, G) places in pixels to (F, G, 64) weights of linear interpolation."""
    return np.clip(1 - abs(places[:, :, None] - np.arange(_CANVAS)), 0, None)


# ------------------------------------------------------------------------------------------------------- the motion


def _motion(x: Floats, y: Floats, half_width: Floats, fps: float) -> tuple[str, tuple[float, ...]]:
    """The simplest motion that explains the track, and the floor contacts if it is a bounce."""
    found = ~np.isnan(x)
    if found.sum() < 8:
        return UNCLEAR, ()
    time = np.flatnonzero(found) / fps
    x, y, half_width = x[found], y[found], half_width[found]
    spread = _residual(x - x.mean(), y - y.mean())
    duration = (len(found) - 1) / fps
    growth = float(np.polyfit(time, half_width, 1)[0]) * duration / float(half_width.mean())
    if abs(growth) > _GROWTH and spread < 2 * _STILL:
        return ("grows" if growth > 0 else "shrinks"), ()
    if abs(growth) > 2 * _GROWTH:
        return UNCLEAR, ()
    if spread < _STILL:
        return "stays still", ()
    line_x, line_y = np.polyfit(time, x, 1), np.polyfit(time, y, 1)
    off_x, off_y = x - np.polyval(line_x, time), y - np.polyval(line_y, time)
    height, contacts = _fit_bounce(time, y, duration)
    residuals = {
        "moves right" if line_x[0] > 0 else "moves left": _residual(off_x, y - y.mean()),
        "falls" if line_y[0] > 0 else "rises": _residual(x - x.mean(), off_y),
        "circles": _COMPLEXITY + _residual(*_off_circle(time, x, y, duration)),
    }
    if contacts:
        residuals["bounces"] = _COMPLEXITY + _residual(x - x.mean(), y - height)
    motion = min(residuals, key=residuals.__getitem__)
    if residuals[motion] > max(_STILL, 0.35 * spread):
        return UNCLEAR, ()
    return motion, contacts if motion == "bounces" else ()


def _residual(off_x: Floats, off_y: Floats) -> float:
    """Root mean square distance, the worst eighth of the frames left out."""
    squared = np.sort(off_x * off_x + off_y * off_y)
    return math.sqrt(float(squared[: len(squared) - len(squared) // 8].mean()))


def _off_circle(time: Floats, x: Floats, y: Floats, duration: float) -> tuple[Floats, Floats]:
    """What the best circle at constant speed, 0.4 to 1.7 turns a clip either way, leaves unexplained."""
    turns = np.linspace(0.4, 1.7, 53)
    wave = np.exp(2j * np.pi * np.concatenate([turns, -turns])[:, None] * time / duration)
    wave -= wave.mean(axis=1, keepdims=True)
    place = x + 1j * y
    place = place - place.mean()
    radius = (wave.conj() @ place) / np.einsum("ct,ct->c", wave.conj(), wave)
    off = place - radius[:, None] * wave
    best = off[int(np.argmin((abs(off) ** 2).sum(axis=1)))]
    return best.real, best.imag


def _fit_bounce(time: Floats, y: Floats, duration: float) -> tuple[Floats, tuple[float, ...]]:
    """The best train of equal parabolas standing on a floor: its heights at `time`, and its contacts in seconds."""
    low, high, phase_width = 0.45, 1.6, 0.5
    period, phase = 1.0, 0.5
    steps = (60, 60)
    fitted = y
    rise = 0.0
    period_width = 0.0
    for _ in range(4):  # the grid closes in on the best fit
        periods = np.linspace(low, high, steps[0])
        phases = np.linspace(phase - phase_width, phase + phase_width, steps[1])
        cycle = (time / periods[:, None, None] + phases[None, :, None]) % 1.0
        arc = cycle * (1 - cycle)
        mean = arc.mean(axis=2, keepdims=True)
        centred = arc - mean
        norm = np.einsum("pft,pft->pf", centred, centred)
        slope = centred @ (y - y.mean()) / np.maximum(norm, 1e-9)
        gain = np.where(slope < 0, slope * slope * norm, 0.0)  # y grows downwards, arcs stand up: the slope is negative
        p, f = np.unravel_index(int(gain.argmax()), gain.shape)
        period, phase, rise = float(periods[p]), float(phases[f]), float(-slope[p, f] / 4)
        fitted = y.mean() + slope[p, f] * centred[p, f]
        period_width = 2 * (high - low) / (steps[0] - 1)
        phase_width = 4 * phase_width / (steps[1] - 1)
        low, high, steps = period - period_width, period + period_width, (15, 15)
    if rise < 8.0:
        return fitted, ()
    first = math.ceil(phase)
    times = ((k - phase) * period for k in range(first, first + 8))
    # A contact before the first or after the last frame is not seen, and one within 30 ms of them hardly.
    return fitted, tuple(moment for moment in times if 0.03 <= moment <= duration - 0.03)
