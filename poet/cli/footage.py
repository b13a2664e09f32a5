"""Options of `poet encode` for footage: what is cut, what is left out, and the report on it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from poet.cli.output import note, progress
from poet.errors import ConfigError, MediaError

if TYPE_CHECKING:
    from poet.bundle import Bundle
    from poet.data.footage import FootageSource, SurveyMap
    from poet.data.scene_choice import DropSettings

__all__ = [
    "BlackLevel",
    "Caption",
    "Drop",
    "DuplicateDecibels",
    "DuplicateLevel",
    "FootageOptions",
    "FrozenLevel",
    "Require",
    "ShotThreshold",
    "SilentLevel",
    "Split",
    "names_of",
    "open_footage",
]

Caption = Annotated[str | None, typer.Option(help="Of files that have no caption of their own.")]
Require = Annotated[
    str, typer.Option(help="Leave out files without one of these: picture, sound, caption (separated by commas).")
]
Split = Annotated[
    str | None,
    typer.Option(
        help="Cut files into scenes of the bundle's length: shots (at shot cuts, then by length) or length. The "
        "beginning of each file when left out."
    ),
]
ShotThreshold = Annotated[
    float | None,
    typer.Option(help="How many times as much as around it a picture changes at a cut (3); less finds more cuts."),
]
Drop = Annotated[
    str, typer.Option(help="Leave out scenes that are black, frozen, silent, duplicate (separated by commas), or all.")
]
BlackLevel = Annotated[
    float | None, typer.Option(help="Black: no part of the picture is brighter than this, of 255 (24).")
]
FrozenLevel = Annotated[
    float | None, typer.Option(help="Frozen: no part of the picture changes by more than this, of 255 (2).")
]
SilentLevel = Annotated[
    float | None, typer.Option(help="Silent: nothing is louder than this, in dB of full scale (-60).")
]
DuplicateLevel = Annotated[
    float | None, typer.Option(help="Duplicate: the picture differs from an earlier scene's by no more, of 255 (4),")
]
DuplicateDecibels = Annotated[float | None, typer.Option(help="and the sound by no more than this, in dB (6).")]


def names_of(text: str) -> tuple[str, ...]:
    """The names in a text that separates them by commas."""
    return tuple(name for part in text.split(",") if (name := part.strip()))


@dataclasses.dataclass(frozen=True, kw_only=True)
class FootageOptions:
    """What the command line says of footage.

    Attributes:
        split: shots, length, or None.
        shot_threshold: None takes the usual one.
        drop: names of tests, or "all".
        levels: option of `poet.data.scene_choice.DropSettings` -> its value, or None for the usual one.
        require: names of what files must have.
        caption: of files that have none of their own.
    """

    split: str | None
    shot_threshold: float | None
    drop: str
    levels: Mapping[str, float | None]
    require: str
    caption: str | None

    @property
    def asks_for_a_survey(self) -> bool:
        """Whether files must be looked through before they are encoded.

        Raises:
            ConfigError: a level is given, but nothing that it is for.
        """
        given = [name for name, level in self.levels.items() if level is not None]
        drops = names_of(self.drop)
        for name in given:
            if name.partition("_")[0] not in drops and "all" not in drops:
                raise ConfigError(f"--{name.replace('_', '-')} is for --drop {name.partition('_')[0]}. Add that.")
        if self.shot_threshold is not None and self.split != "shots":
            raise ConfigError("--shot-threshold is for --split shots. Add that.")
        return self.split is not None or bool(drops)

    def drop_settings(self, has_sound: bool) -> DropSettings:
        """What to leave out.

        Args:
            has_sound: whether sound is wanted; without it no scene is silent.
        """
        from poet.data.scene_choice import DROPS, DropSettings

        drops = names_of(self.drop)
        DropSettings(drops=[name for name in drops if name != "all"])  # refuses unknown names, also beside "all"
        if "all" in drops:
            drops = tuple(name for name in DROPS if has_sound or name != "silent")
        elif "silent" in drops and not has_sound:
            raise ConfigError("the bundle has no sound, so no scene can be dropped for being silent. Leave that out.")
        levels = {name: level for name, level in self.levels.items() if level is not None}
        return DropSettings(drops=drops, required=names_of(self.require), caption=self.caption, **levels)


def open_footage(
    source: str,
    output: Path,
    bundle: Bundle,
    options: FootageOptions,
    size: tuple[int, int],
    *,
    start: int,
    count: int | None,
    num_processes: int,
    survey: SurveyMap | None = None,
) -> tuple[FootageSource, dict[str, Any], Callable[[], object]]:
    """Look files through and open the scenes that are kept.

    Args:
        source: a folder, a manifest or archives.
        output: directory of the shards.
        bundle: whose clips' length and rates are taken.
        options: what is cut and left out.
        size: (height, width) in pixels.
        start: number of the first scene.
        count: of scenes; None takes all.
        num_processes: that look files through.
        survey: looks them through elsewhere.

    Returns:
        The scenes, what the command shall print about them, and what writes the report. That is for the moment when
        the directory has taken the scenes: the report on shards of other scenes must stay.

    Raises:
        ConfigError: options that cannot be used, or no files.
        MediaError: no scene is kept; the report says why, unless there are shards, whose report it then is.
    """
    from poet.data.footage import FootageSource, survey_footage
    from poet.data.footage_report import summarise, write_report
    from poet.data.manifest import MANIFEST_NAME
    from poet.data.scene_measuring import SurveySettings

    if source.startswith(("toybox:", "toybox-films:")):
        raise ConfigError(f"{source} is drawn in whole scenes: --split and --drop are for files. Leave them out.")
    defaults = bundle.generation_config
    threshold = {} if options.shot_threshold is None else {"shot_threshold": options.shot_threshold}
    settings = SurveySettings(
        split=options.split,
        num_frames=defaults.num_frames,
        fps=defaults.fps,
        sample_rate=bundle.vocabulary.sample_rate,
        **threshold,
    )
    with progress("looking through files") as advance:
        footage = survey_footage(
            source,
            output,
            settings,
            options.drop_settings(bundle.audio_tokenizer is not None),
            num_processes=num_processes,
            survey=survey,
            progress=lambda done, total: advance(done, total, ""),
        )
    summary = summarise(footage)
    for one in summary["unusable"]:
        note(f"skipped {one['key']}: {one['reason']}")
    told = {name: summary[name] for name in ("files", "unusable_files", "scenes", "dropped")}
    told |= {"files_of_an_earlier_run": footage.num_resumed, "report": str(output / "report.md")}
    try:
        clips = FootageSource(footage, height=size[0], width=size[1], start=start, count=count)
    except MediaError:
        if not (output / MANIFEST_NAME).exists():
            write_report(footage, output)
        raise
    return clips, told, lambda: write_report(footage, output, clips.scenes)
