"""What an evaluation leaves behind: a sheet of clips to look at, shares with intervals, a table in Markdown and JSON.

Generic over what is judged: a mark is a name with right or wrong, a clip has any number of them. Knows no judge and no
dataset.

Legend: N frames of H x W pixels, S samples.
"""

from __future__ import annotations

import dataclasses
import json
import math
import textwrap
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Final

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray

from poet.errors import ConfigError
from poet.media import Clip

__all__ = ["Results", "SheetEntry", "contact_sheet", "summarise", "tables", "wilson_interval", "write_report"]

Marks = Mapping[str, bool]

_FRAMES_SHOWN: Final = 8
_RIGHT, _WRONG, _UNMARKED, _INK = "#1a7f37", "#c5221f", "#6b6b6b", "#222222"
_SHEET_WIDTH = 13.0  # inches
_ENTRY_HEIGHT = 1.56
_DOTS_PER_INCH = 100
_STRIP_SHARE = 0.66  # of the sheet's width; the rest is text
_GAP = 2  # pixels of 64 between two frames


@dataclasses.dataclass(frozen=True, kw_only=True)
class SheetEntry:
    """One clip of a contact sheet.

    Attributes:
        clip: picture, sound or both.
        caption: what it was meant to show.
        said: name -> what the judge says, in the order in which it is shown.
        marks: name -> right or wrong, for some or all of those names.
    """

    clip: Clip
    caption: str
    said: Mapping[str, str] = dataclasses.field(default_factory=dict)
    marks: Marks = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Results:
    """What a report is written from.

    Attributes:
        title: its heading.
        about: what was measured and how, shown as a list: model, fingerprint, sampling, date, hardware.
        scores: group of clips (a split) -> the marks of each clip.
        measures: name -> number, of the whole run.
        apart: names whose marks are counted but do not decide whether a clip is right in everything.
    """

    title: str
    about: Mapping[str, object] = dataclasses.field(default_factory=dict)
    scores: Mapping[str, Sequence[Marks]] = dataclasses.field(default_factory=dict)
    measures: Mapping[str, float | int | None] = dataclasses.field(default_factory=dict)
    apart: Collection[str] = ("sync",)


# ---------------------------------------------------------------------------------------------------- what was counted


def wilson_interval(right: int, count: int) -> tuple[float, float]:
    """The 95 % interval of a share of `right` in `count`, in [0, 1].

    Raises:
        ConfigError: count is not positive or right does not lie in 0..count.

    Source: Wilson, "Probable inference, the law of succession, and statistical inference", JASA 22 (1927).
    """
    if count < 1 or not 0 <= right <= count:
        raise ConfigError(f"a share needs 0 <= right <= count and count >= 1, got right={right}, count={count}.")
    z = 1.959964
    share, scale = right / count, 1 + z * z / count
    middle = (share + z * z / (2 * count)) / scale
    reach = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count)) / scale
    # At the ends the formula is exact but rounding is not.
    return (0.0 if right == 0 else middle - reach), (1.0 if right == count else middle + reach)


def summarise(scores: Sequence[Marks], apart: Collection[str] = ("sync",)) -> dict[str, dict[str, float | int]]:
    """Count marks over clips.

    Args:
        scores: the marks of each clip; a clip may lack names that do not apply to it.
        apart: names that do not decide whether a clip is right in everything.

    Returns:
        name -> {"right", "count", "share", "low", "high"}, low and high being the 95 % interval of the share. After
        the names in order of first appearance, those `apart` last, comes "everything": clips with no wrong mark.

    Raises:
        ConfigError: there are no scores.
    """
    if not scores:
        raise ConfigError("a summary needs the marks of at least one clip, got none.")
    names = list(dict.fromkeys(name for marks in scores for name in marks))
    names.sort(key=lambda name: name in apart)
    summary = {}
    for name in names:
        marks = [bool(one[name]) for one in scores if name in one]
        summary[name] = _counted(sum(marks), len(marks))
    whole = [all(right for name, right in marks.items() if name not in apart) for marks in scores]
    return summary | {"everything": _counted(sum(whole), len(whole))}


def _counted(right: int, count: int) -> dict[str, float | int]:
    low, high = wilson_interval(right, count)
    return {
        "right": right,
        "count": count,
        "share": round(right / count, 6),
        "low": round(low, 6),
        "high": round(high, 6),
    }


def write_report(directory: Path, results: Results) -> dict[str, object]:
    """Write `report.json` and `report.md` into a directory, made if need be.

    Args:
        directory: where to.
        results: what was measured.

    Returns:
        What `report.json` holds: title, about, summary (group -> name -> counts, as `summarise`), measures. Numbers
        that are not finite become null.
    """
    directory.mkdir(parents=True, exist_ok=True)
    report: dict[str, object] = {
        "title": results.title,
        "about": dict(results.about),
        "summary": {group: summarise(scores, results.apart) for group, scores in results.scores.items()},
        "measures": {
            name: None if value is None or not math.isfinite(value) else value
            for name, value in results.measures.items()
        },
    }
    _write(directory / "report.json", json.dumps(report, indent=2, default=str, allow_nan=False) + "\n")
    _write(directory / "report.md", _markdown(results))
    return report


def _write(path: Path, text: str) -> None:
    """All or nothing: a reader never finds half a file."""
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)


def _markdown(results: Results) -> str:
    lines = [f"# {results.title}", ""]
    lines += [f"- {name}: {value}" for name, value in results.about.items()]
    if results.about:
        lines.append("")
    return "\n".join([*lines, *tables(results)])


def tables(results: Results) -> list[str]:
    """The lines of `report.md` below what it is about: scores by name and group, then the measures."""
    lines: list[str] = []
    if results.scores:
        summaries = {group: summarise(scores, results.apart) for group, scores in results.scores.items()}
        names = list(dict.fromkeys(name for summary in summaries.values() for name in summary))
        names.sort(key=lambda name: (name == "everything", name in results.apart))
        lines += [f"| | {' | '.join(summaries)} |", "|---|" + "---|" * len(summaries)]
        for name in names:
            cells = [_cell(summary[name]) if name in summary else "" for summary in summaries.values()]
            lines.append(f"| {name} | {' | '.join(cells)} |")
        lines += ["", "Share of clips that are right (right of all; 95 % interval after Wilson).", ""]
    if results.measures:
        lines += ["| measure | value |", "|---|---|"]
        lines += [
            f"| {name} | {'' if value is None or not math.isfinite(value) else format(value, '.5g')} |"
            for name, value in results.measures.items()
        ]
        lines.append("")
    return lines


def _cell(counted: Mapping[str, float | int]) -> str:
    interval = f"{100 * counted['low']:.1f} to {100 * counted['high']:.1f}"
    return f"{100 * counted['share']:.1f} % ({counted['right']} of {counted['count']}; {interval})"


# ------------------------------------------------------------------------------------------------------------ to look


def contact_sheet(entries: Sequence[SheetEntry], path: Path) -> None:
    """Draw clips one below the other: eight frames over the waveform at the same moments, caption and verdict beside.

    Args:
        entries: at least one.
        path: a PNG file, overwritten.

    Raises:
        ConfigError: no entries, or more than fit into one picture (300).
    """
    if not 1 <= len(entries) <= 300:
        raise ConfigError(f"a contact sheet holds 1 to 300 clips, got {len(entries)}. Split them over several sheets.")
    figure = Figure(figsize=(_SHEET_WIDTH, _ENTRY_HEIGHT * len(entries)), dpi=_DOTS_PER_INCH, facecolor="white")
    FigureCanvasAgg(figure)
    for row, entry in enumerate(entries):
        bottom, height = 1 - (row + 1) / len(entries), 1 / len(entries)
        left, width = 0.008, _STRIP_SHARE - 0.016
        strip = figure.add_axes((left, bottom + 0.3 * height, width, 0.66 * height))
        wave = figure.add_axes((left, bottom + 0.05 * height, width, 0.22 * height))
        words = figure.add_axes((_STRIP_SHARE, bottom, 1 - _STRIP_SHARE, height))
        _draw_strip(strip, entry.clip)
        _draw_wave(wave, entry.clip)
        _draw_words(words, entry)
    part = path.with_name(path.name + ".part")
    figure.savefig(part, format="png", dpi=_DOTS_PER_INCH)
    part.replace(path)


def _chosen_frames(num_frames: int) -> NDArray[np.intp]:
    """Indices of at most eight frames, evenly spread from the first to the last."""
    return np.unique(np.rint(np.linspace(0, num_frames - 1, min(_FRAMES_SHOWN, num_frames))).astype(np.intp))


def _draw_strip(axes: Axes, clip: Clip) -> None:
    axes.set_axis_off()
    if clip.frames is None:
        axes.text(0.5, 0.5, "no picture", color=_UNMARKED, ha="center", va="center", transform=axes.transAxes)
        return
    frames = clip.frames[_chosen_frames(len(clip.frames))]
    height, width = frames.shape[1:3]
    gap = max(1, round(_GAP * width / 64))
    canvas = np.full((height, _FRAMES_SHOWN * (width + gap), 3), 255, np.uint8)
    for i, frame in enumerate(frames):
        start = i * (width + gap) + gap // 2
        canvas[:, start : start + width] = frame
    axes.imshow(canvas, interpolation="nearest", aspect="equal")


def _draw_wave(axes: Axes, clip: Clip) -> None:
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_ylim(-1, 1)
    for spine in axes.spines.values():
        spine.set_color("#cccccc")
    # Half a step before the first and after the last shown frame: each frame stands above its moment.
    last = 0.0 if clip.frames is None else (len(clip.frames) - 1) / clip.fps
    step = last / (_FRAMES_SHOWN - 1)
    low, high = (-step / 2, last + step / 2) if last else (0.0, clip.duration)
    axes.set_xlim(low, high)
    for moment in np.arange(0, high, 0.5):
        axes.axvline(float(moment), color="#e4e4e4", linewidth=0.8, zorder=0)
    if clip.samples is None or not clip.samples.any():
        text = "no sound" if clip.samples is None else "silence"
        axes.text(0.5, 0.5, text, color=_UNMARKED, fontsize=8, ha="center", va="center", transform=axes.transAxes)
        return
    size = max(1, len(clip.samples) // 1500)
    bins = clip.samples[: len(clip.samples) // size * size].reshape(-1, size)
    seconds = (np.arange(len(bins)) + 0.5) * size / clip.sample_rate
    axes.fill_between(seconds, bins.min(axis=1), bins.max(axis=1), color="#3367d6", linewidth=0.4)


def _draw_words(axes: Axes, entry: SheetEntry) -> None:
    axes.set_axis_off()
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1)
    caption = textwrap.wrap(entry.caption, 56, max_lines=3, placeholder=" ...")
    axes.text(0.01, 0.94, "\n".join(caption), color=_INK, fontsize=9.5, va="top", linespacing=1.25)
    names = list(entry.said)
    rows = max(4, -(-len(names) // 2))
    for i, name in enumerate(names):
        right = entry.marks.get(name)
        sign = "·" if right is None else "✓" if right else "✗"
        colour = _UNMARKED if right is None else _RIGHT if right else _WRONG
        x, y = 0.01 + 0.5 * (i // rows), 0.06 + 0.48 * (1 - (i % rows + 1) / rows)
        value = textwrap.shorten(entry.said[name], 24, placeholder="...")
        weight = "bold" if right is False else "normal"
        axes.text(x, y, f"{sign} {name}: {value}", color=colour, fontsize=8.5, va="bottom", weight=weight)
