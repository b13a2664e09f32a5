"""Films to look at: a contact sheet of their scenes, with what was asked for and what was judged."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from poet.data.toybox import ToyboxClip
from poet.errors import ConfigError
from poet.media import Clip

if TYPE_CHECKING:
    from poet.evaluation.films import FilmVerdict

__all__ = ["LEAST_JUMP", "LONGEST_SHEET", "SCENES_PER_LINE", "film_sheet"]

LEAST_JUMP: Final = 4.0
"""Pixels of a 64 x 64 frame from which on an object that begins a scene elsewhere counts as having jumped."""
LONGEST_SHEET: Final = 200
"""Lines of one picture."""
SCENES_PER_LINE: Final = 8

_SHEET_WIDTH, _LINE_HEIGHT, _DOTS_PER_INCH = 16.0, 1.2, 100  # inches
_LINES_OF_WORDS = 5  # below a scene
_INK, _RIGHT, _WRONG = "#222222", "#1a7f37", "#c5221f"


def film_sheet(films: Sequence[tuple[Sequence[Clip], Sequence[ToyboxClip], FilmVerdict]], path: Path) -> None:
    """Draw films one below the other: first, middle and last frame of each scene, below what was asked for.

    Eight scenes stand in a line; what the judge found otherwise is red.

    Args:
        films: at least one: its scenes, what each was to show, and what was judged.
        path: a PNG file, overwritten.

    Raises:
        ConfigError: no films, or more lines than `LONGEST_SHEET`.
    """
    rows = [
        (film, range(first, min(first + SCENES_PER_LINE, len(film[0]))))
        for film in films
        for first in range(0, len(film[0]), SCENES_PER_LINE)
    ]
    if not 1 <= len(rows) <= LONGEST_SHEET:
        raise ConfigError(
            f"a sheet of films holds 1 to {LONGEST_SHEET} lines of {SCENES_PER_LINE} scenes, got {len(rows)}. Split "
            "the films over several sheets."
        )
    figure = Figure(figsize=(_SHEET_WIDTH, _LINE_HEIGHT * len(rows)), dpi=_DOTS_PER_INCH, facecolor="white")
    FigureCanvasAgg(figure)
    width, height = 1 / SCENES_PER_LINE, 1 / len(rows)
    for row, ((scenes, drawn, verdict), numbers) in enumerate(rows):
        bottom = 1 - (row + 1) * height
        for place, number in enumerate(numbers):
            left = place * width
            picture = figure.add_axes((left + 0.04 * width, bottom + 0.45 * height, 0.92 * width, 0.5 * height))
            words = figure.add_axes((left + 0.04 * width, bottom, 0.92 * width, 0.43 * height))
            _draw_scene(picture, scenes[number])
            _write_scene(words, number, drawn[number], verdict)
    part = path.with_name(path.name + ".part")
    figure.savefig(part, format="png", dpi=_DOTS_PER_INCH)
    part.replace(path)


def _draw_scene(axes: Axes, clip: Clip) -> None:
    axes.set_axis_off()
    if clip.frames is None:
        axes.text(0.5, 0.5, "no picture", color=_INK, ha="center", va="center", transform=axes.transAxes)
        return
    frames = clip.frames[[0, len(clip.frames) // 2, -1]]
    gap = np.full((frames.shape[1], max(1, frames.shape[2] // 32), 3), 255, np.uint8)
    axes.imshow(np.concatenate([frames[0], gap, frames[1], gap, frames[2]], axis=1), interpolation="nearest")


def _write_scene(axes: Axes, number: int, truth: ToyboxClip, verdict: FilmVerdict) -> None:
    """What was asked for in black, what was found instead in red, with a jump at the scene's beginning."""
    axes.set_axis_off()
    told, seen, marks = truth.attributes, verdict.verdicts[number], verdict.scenes[number]
    object_told = f"{told.size} {told.colour} {told.shape}, {told.background}; " if number == 0 else ""
    sound = "silent" if told.timbre == "silent" else f"{told.pitch} {told.timbre}"
    lines = [(line, _INK) for line in textwrap.wrap(f"{number + 1}: {object_told}{told.motion}, {sound}", 34)]
    wrong = [f"{name}: {value}" for name, value in seen.as_text().items() if marks.get(name) is False]
    if marks.get("sync") is False and "sync" not in seen.as_text():
        wrong.append("sync: none")
    jump = verdict.jumps[number - 1] if number else 0.0
    if jump is None or jump >= LEAST_JUMP:
        wrong.append("no object to follow" if jump is None else f"jump of {jump:.1f}")
    lines += [(line, _WRONG) for line in textwrap.wrap(", ".join(wrong), 34)] if wrong else [("all right", _RIGHT)]
    for place, (line, colour) in enumerate(lines[:_LINES_OF_WORDS]):
        axes.text(0, 1 - place / _LINES_OF_WORDS, line, color=colour, fontsize=6.5, va="top", transform=axes.transAxes)
