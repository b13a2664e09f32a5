"""What became of footage, for people and programs: report.json, report.md, and a sheet of pictures for each reason.

Legend: H x W pixels of a sheet.
"""

from __future__ import annotations

import collections
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from poet.data.footage import Footage, scene_key
from poet.data.scene_choice import DROPS, ChosenScene, DroppedScene
from poet.errors import CheckpointError, MediaError
from poet.media import Clip, FilePart, read_clip, write_clip

__all__ = ["REPORT_NAME", "SCENES_NAME", "summarise", "write_report"]

REPORT_NAME: Final = "report.json"
SCENES_NAME: Final = "scenes.jsonl"

_SHOWN: Final = 12  # pictures on a sheet
_LINES: Final = 20  # of each list in report.md; report.json has all
_COLUMNS: Final = 6
_HEIGHT, _WIDTH, _GAP = 72, 96, 4
_MEANS: Final = {
    "black": "no part of the picture brighter than {level:g} of 255",
    "frozen": "no part of the picture changes by more than {level:g} of 255",
    "silent": "nothing louder than {level:g} dB of full scale",
    "duplicate": "pictures that differ from an earlier scene's by no more than {level:g} of 255",
}


def summarise(footage: Footage) -> dict[str, Any]:
    """What became of the files and their scenes, for JSON; every dropped scene and unusable file by name."""
    settings, choice, facts = footage.settings, footage.choice, footage.facts
    counts = collections.Counter(scene.reason for scene in choice.dropped)
    used = [one for number, one in enumerate(facts) if number not in choice.unusable]
    return {
        "source": footage.path.name,
        "split": settings.split,
        "shot_threshold": settings.shot_threshold if settings.split == "shots" else None,
        "scene_seconds": settings.scene_seconds,
        "levels": footage.drops.levels,
        "duplicate_decibels": footage.drops.duplicate_decibels if "duplicate" in footage.drops.levels else None,
        "required": sorted(footage.drops.required),
        "files": len(facts),
        "unusable_files": len(choice.unusable),
        "seconds": round(sum(one.duration for one in used), 3),
        "shot_cuts": sum(one.num_cuts for one in used),
        "scenes": len(choice.chosen) + len(choice.dropped),
        "kept": len(choice.chosen),
        "dropped": {name: counts[name] for name in DROPS if name in footage.drops.levels},
        "left_over_seconds": round(sum(one.left_over for one in used), 3),
        "unusable": [
            {"key": facts[number].key, "reason": reason} for number, reason in sorted(choice.unusable.items())
        ],
        "dropped_scenes": [_describe(footage, scene) for scene in choice.dropped],
    }


def _describe(footage: Footage, scene: DroppedScene) -> dict[str, Any]:
    told: dict[str, Any] = {"key": _key(footage, scene), "reason": scene.reason, "measure": round(scene.measure, 2)}
    if scene.original is not None:
        told["like"] = _key(footage, scene.original)
    return told


def _key(footage: Footage, scene: ChosenScene | DroppedScene) -> str:
    settings = footage.settings
    return scene_key(footage.listed[scene.file].key, scene.start, settings.scene_seconds, settings.split is None)


def write_report(
    footage: Footage, directory: str | Path, scenes: Sequence[ChosenScene] | None = None
) -> dict[str, Any]:
    """Write report.json, report.md, the sheets and scenes.jsonl, a manifest of what is kept, into a directory.

    What is there already is left alone.

    Args:
        footage: what became of the files.
        directory: of the shards.
        scenes: those that scenes.jsonl lists; all that are kept when left out.

    Returns:
        What `summarise` says.

    Raises:
        CheckpointError: the directory cannot be written.
    """
    directory, summary = Path(directory), summarise(footage)
    text = json.dumps(summary, indent=1, ensure_ascii=False) + "\n"
    try:
        is_another = _read(directory / REPORT_NAME) != text
        for reason in DROPS:
            shown = [scene for scene in footage.choice.dropped if scene.reason == reason][:_SHOWN]
            sheet = directory / f"dropped-{reason}.png"
            if not shown:
                sheet.unlink(missing_ok=True)
            elif is_another or not sheet.exists():
                _write_sheet(footage, shown, sheet)
        _write(directory / "report.md", "\n".join(_lines(summary)) + "\n")
        _write(directory / SCENES_NAME, _scene_lines(footage, footage.choice.chosen if scenes is None else scenes))
        # Last, as it says that the sheets are there.
        _write(directory / REPORT_NAME, text)
    except OSError as error:
        raise CheckpointError(f"the report in {directory} cannot be written: {error}. Make room.") from error
    return summary


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except (FileNotFoundError, UnicodeDecodeError):
        return None


def _write(path: Path, text: str | None) -> None:
    """Write a file unless it holds that already; None takes it away."""
    if text is None:
        path.unlink(missing_ok=True)
    elif _read(path) != text:
        path.write_text(text, encoding="utf-8")


def _scene_lines(footage: Footage, scenes: Sequence[ChosenScene]) -> str | None:
    """Scenes as a manifest, for whoever needs their pictures; none of archives, whose files have no path."""
    lines = []
    for scene in scenes:
        place = footage.listed[scene.file].path
        if isinstance(place, FilePart):
            return None
        said = {"path": str(Path(place).resolve()), "start": scene.start, "caption": scene.caption}
        lines.append(json.dumps(said, ensure_ascii=False) + "\n")
    return "".join(lines)


def _lines(summary: dict[str, Any]) -> list[str]:
    split = {"shots": "at shot cuts, then by length", "length": "by length", None: "the beginning of each file"}
    lines = [
        f"# What became of {summary['source']}",
        "",
        f"{summary['files']} files, {summary['unusable_files']} of them unusable; {summary['seconds']:.1f} s of "
        f"footage, {summary['shot_cuts']} shot cuts.",
        f"Scenes of {summary['scene_seconds']:g} s, {split[summary['split']]}: {summary['scenes']}, of which "
        f"{summary['kept']} are kept.",
        f"{summary['left_over_seconds']:.1f} s are left over behind the last whole scene of a shot.",
        "",
    ]
    if summary["levels"]:
        lines += ["| dropped as | scenes | which means |", "|---|---|---|"]
        for name, level in summary["levels"].items():
            lines.append(f"| {name} | {summary['dropped'][name]} | {_MEANS[name].format(level=level)} |")
        lines.append("")
    for name, count in summary["dropped"].items():
        if not count:
            continue
        lines += [f"## {name}", "", f"![scenes dropped as {name}](dropped-{name}.png)", ""]
        if name == "duplicate":
            lines += ["On the sheet each stands behind the scene that it is like.", ""]
        of_this = [scene for scene in summary["dropped_scenes"] if scene["reason"] == name]
        lines += _listed([_line_of(scene) for scene in of_this])
    if summary["unusable"]:
        lines += ["## Unusable files", ""]
        lines += _listed([f"- `{one['key']}`: {one['reason']}" for one in summary["unusable"]])
    return lines


def _line_of(scene: dict[str, Any]) -> str:
    like = f", like `{scene['like']}`" if "like" in scene else ""
    return f"- `{scene['key']}` ({scene['measure']:g}{like})"


def _listed(lines: Sequence[str]) -> list[str]:
    more = [f"- and {len(lines) - _LINES} more: see {REPORT_NAME}"] if len(lines) > _LINES else []
    return [*lines[:_LINES], *more, ""]


def _write_sheet(footage: Footage, scenes: Sequence[DroppedScene], path: Path) -> None:
    shown: list[ChosenScene | DroppedScene] = []
    for scene in scenes:
        shown += [scene] if scene.original is None else [scene.original, scene]
    pictures = [_picture_of(footage, scene) for scene in shown]
    rows = -(-len(pictures) // _COLUMNS)
    columns = min(len(pictures), _COLUMNS)
    sheet = np.full((rows * (_HEIGHT + _GAP) + _GAP, columns * (_WIDTH + _GAP) + _GAP, 3), 255, np.uint8)
    for place, picture in enumerate(pictures):
        top, left = (
            _GAP + size * n for size, n in zip((_HEIGHT + _GAP, _WIDTH + _GAP), divmod(place, _COLUMNS), strict=True)
        )
        sheet[top : top + _HEIGHT, left : left + _WIDTH] = picture
    write_clip(Clip(frames=sheet[None], fps=1.0, samples=None, sample_rate=0), path)


def _picture_of(footage: Footage, scene: ChosenScene | DroppedScene) -> NDArray[np.uint8]:
    """The middle of a scene; gray where it has no picture or cannot be read."""
    settings = footage.settings
    gray = np.full((_HEIGHT, _WIDTH, 3), 128, np.uint8)
    if not footage.facts[scene.file].has_picture:
        return gray
    try:
        clip = read_clip(
            footage.listed[scene.file].path,
            fps=settings.fps,
            height=_HEIGHT,
            width=_WIDTH,
            start=scene.start + settings.scene_seconds / 2,
            duration=1 / settings.fps,
            want_audio=False,
        )
    except MediaError:
        return gray
    return gray if clip.frames is None else clip.frames[0]
