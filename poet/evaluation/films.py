"""What films are worth: every scene is judged, and whether the object stays the same from each scene to the next.

Draws Toybox films, asks for them with their captions, judges, reports. Joins parts: what a scene shows and how it
sounds is the judge's word, how films are written `poet.generation.film`'s. Splits are Toybox's.

Legend: N video frames, S audio samples; a film of n scenes has n - 1 borders, each a frame that both scenes show.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from poet.bundle import Bundle
from poet.data.toybox import SIZES, ToyboxClip, Trajectory, go_on
from poet.data.toybox_films import FILM_SCENES, draw_film
from poet.errors import ConfigError, ShapeError
from poet.evaluation.film_sheet import LEAST_JUMP, LONGEST_SHEET, SCENES_PER_LINE, film_sheet
from poet.evaluation.judge import ATTRIBUTES, SYNCED_MOTIONS, UNCLEAR, Verdict, judge, judge_clip
from poet.evaluation.measure import SHOWN, SYNC, Advance, Measured, about_run, make_directory
from poet.evaluation.report import Results, summarise, tables, write_report
from poet.generation.canvas import ParallelDecoding
from poet.generation.engine import decodings_for, load_engine
from poet.generation.film import FilmRequest, scenes_needed, write_films
from poet.generation.joining import SeamlessJoin
from poet.generation.pipeline import Pipeline
from poet.generation.provenance import describe_adapter
from poet.generation.sampling import SamplingConfig
from poet.media import Clip
from poet.model.lora import Adapter

__all__ = [
    "FilmVerdict",
    "click_ratio",
    "evaluate_films",
    "judge_film",
    "measure_films",
    "scene_table",
    "tell_scenes",
]

IDENTITY: Final = ("colour", "shape", "size")
"""What an object keeps through a film."""
LEAST_CLICK: Final = 2.0
"""Ratio from which on a border counts as one that clicks."""

_BATCH = 8  # films that are written together
_NEAR_BORDER = 0.02  # seconds on either side in which a click is looked for
_AROUND_BORDER = 0.25  # seconds on either side whose jumps it is compared with
_LEAST_STEP = 1e-3  # of full scale, from one sample to the next: less counts as this much, for it is not heard
_SHRUNK = 0.85  # of its full width; an object that is smaller than this has shrunk
_MEETING = 0.01  # pixels; drawn scenes whose tracks end and begin so near to each other are one film's


@dataclasses.dataclass(frozen=True, kw_only=True)
class FilmVerdict:
    """What is to be said of one film.

    Attributes:
        scenes: of each scene attribute -> right or wrong, with "sync" where picture and sound have to agree; as
            `poet evaluate` marks a clip.
        verdicts: of each scene, what the judge saw and heard.
        jumps: at each border, the distance in pixels of a 64 x 64 frame between the object's places in the last frame
            of one scene and in the first of the next; None where it is not found in one of them.
        steps: at each border, the distance between its places in the frames before and after the one that is shared.
        drawn_steps: the same in the drawn film; None where the drawn scenes are none that follow each other.
        possible: of each scene, whether the motion that was asked for can be had from where the scene before really
            ended (there is room, and only what has shrunk grows); None where that is not known.
    """

    scenes: tuple[Mapping[str, bool], ...]
    verdicts: tuple[Verdict, ...]
    jumps: tuple[float | None, ...]
    steps: tuple[float | None, ...]
    drawn_steps: tuple[float | None, ...]
    possible: tuple[bool | None, ...]

    @property
    def kept_scenes(self) -> tuple[bool, ...]:
        """Of each scene, whether the object has the colour, shape and size that were asked for."""
        return tuple(all(marks[name] for name in IDENTITY) for marks in self.scenes)

    @property
    def kept(self) -> bool:
        """Whether it has them in every scene."""
        return all(self.kept_scenes)

    @property
    def kept_as_begun(self) -> bool:
        """Whether every scene shows the object that scene 1 shows, right or wrong; "unclear" is no object."""
        seen = {tuple(getattr(verdict, name) for name in IDENTITY) for verdict in self.verdicts}
        return len(seen) == 1 and UNCLEAR not in next(iter(seen))


# -------------------------------------------------------------------------------------------------------------- judge


def judge_film(drawn: Sequence[ToyboxClip], scenes: Sequence[Clip]) -> FilmVerdict:
    """Judge a film scene by scene and from each scene to the next.

    Args:
        drawn: what each scene should show.
        scenes: each as it stands by itself, at 8 frames a second and 16 kHz; the first frame of a scene is the last
            one of the scene before. Picture or sound may be missing, and its attributes count as wrong.

    Raises:
        ShapeError: not as many scenes as were drawn, none, or one that is no Toybox clip (see `judge_clip`).
    """
    if not scenes or len(scenes) != len(drawn):
        raise ShapeError(
            f"a film must have as many scenes as were drawn, at least one; got {len(scenes)} for {len(drawn)}. "
            "Give each scene by itself, not the film that they are joined to."
        )
    marks = [_marks(clip, truth) for clip, truth in zip(scenes, drawn, strict=True)]
    verdicts = [judge(clip.frames, clip.samples) for clip in scenes]
    places = [_places(verdict) for verdict in verdicts]
    ways = [np.stack([truth.trajectory.x, truth.trajectory.y], axis=1) for truth in drawn]
    return FilmVerdict(
        scenes=tuple(marks),
        verdicts=tuple(verdicts),
        jumps=tuple(_distance(one, -1, other, 0) for one, other in itertools.pairwise(places)),
        steps=tuple(_distance(one, -2, other, 1) for one, other in itertools.pairwise(places)),
        drawn_steps=tuple(
            _distance(one, -2, other, 1) if math.dist(one[-1], other[0]) < _MEETING else None
            for one, other in itertools.pairwise(ways)
        ),
        possible=(True, *map(_is_possible, verdicts[:-1], drawn[1:])),
    )


def click_ratio(samples: NDArray[np.floating], sample_rate: int, border: float) -> float:
    """How much harder a sound jumps at a border than around it.

    A click is a jump; so is the attack of a note that begins there, which is why some drawn films have ratios above 2.

    Args:
        samples: (S,) float in [-1, 1].
        sample_rate: samples a second.
        border: seconds from the beginning.

    Returns:
        The largest |x[n + 1] - x[n]| within 20 ms of the border, divided by the largest in the rest of the half second
        around it, both at least 0.001: near or below 1 where nothing clicks, 1 in silence.

    Raises:
        ShapeError: samples are not one-dimensional.
        ConfigError: there are no samples on both sides of the border.
    """
    if samples.ndim != 1:
        raise ShapeError(f"samples must be (S,) mono, got {samples.shape}. Mix down and flatten them first.")
    reach, near = round(_AROUND_BORDER * sample_rate), round(_NEAR_BORDER * sample_rate)
    middle = round(border * sample_rate)
    if not near < middle < len(samples) - near - 1:
        raise ConfigError(
            f"a border must have sound on both sides, {_NEAR_BORDER:g} s and more, got {border:g} s of "
            f"{len(samples) / sample_rate:g} s. Leave out the film's beginning and end."
        )
    start = max(0, middle - reach)
    jumps = np.abs(np.diff(samples[start : middle + reach].astype(np.float64)))
    first, end = middle - near - start, middle + near - start
    rest = float(np.concatenate([jumps[:first], jumps[end:]]).max())
    return max(float(jumps[first:end].max()), _LEAST_STEP) / max(rest, _LEAST_STEP)


def _marks(clip: Clip, truth: ToyboxClip) -> dict[str, bool]:
    """As `judge_clip`. Where a sound was to follow a motion that is not seen, sync is wrong."""
    marks = judge_clip(clip, truth.attributes.as_dict())
    if truth.attributes.motion in SYNCED_MOTIONS and truth.attributes.timbre != "silent":
        marks.setdefault("sync", False)
    return marks


def _places(verdict: Verdict) -> NDArray[np.float64]:
    """(N, 2) x and y of the object's centre of gravity in each frame, NaN where there is none.

    The judge names the centre, which lies a third of the half-width above a triangle's centre of gravity. Of a triangle
    that is mistaken for something else in one scene the centre would jump, although nothing moved.
    """
    drop = verdict.half_width / 3 if verdict.shape == "triangle" else 0.0
    return np.stack([verdict.x, verdict.y + drop], axis=1)


def _distance(one: NDArray[np.float64], index: int, other: NDArray[np.float64], following: int) -> float | None:
    """Between a place of one track and a place of another; None where either is missing."""
    if len(one) < 2 or len(other) < 2:
        return None
    distance = math.dist(one[index], other[following])
    return None if math.isnan(distance) else distance


def _is_possible(before: Verdict, truth: ToyboxClip) -> bool | None:
    """Whether Toybox knows a way for the motion asked for, from where the scene before was seen to end."""
    if not len(before.x) or math.isnan(before.x[-1]):
        return None
    size = truth.attributes.size
    radius, width = SIZES[size], float(before.half_width[-1])
    if width >= _SHRUNK * radius:  # what is measured is never exactly the full width
        width = radius
    x, y = np.array([before.x[-1]], np.float64), np.array([before.y[-1]], np.float64)
    end = Trajectory(x=x, y=y, half_width=np.array([width]))
    return go_on(truth.attributes.motion, size, end, np.random.default_rng(0)) is not None


# ------------------------------------------------------------------------------------------------------------ numbers


def measure_films(films: Sequence[FilmVerdict]) -> dict[str, float | None]:
    """Sum up films.

    Args:
        films: at least one, all of as many scenes.

    Returns:
        name -> share in [0, 1], pixels or points; None where there is nothing to count. A border at which the object is
        not found counts as one where it jumps.

    Raises:
        ConfigError: there are no films.
    """
    if not films:
        raise ConfigError("films can only be summed up where there is at least one, got none.")
    jumps = [jump for film in films for jump in film.jumps]
    found = [jump for jump in jumps if jump is not None]
    marks = [marks for film in films for marks in film.scenes]
    first, last = (_overall([film.scenes[place] for film in films]) for place in (0, -1))
    motions = [
        bool(marks["motion"])
        for film in films
        for marks, possible in zip(film.scenes, film.possible, strict=True)
        if possible
    ]
    return {
        "attributes right": _overall(marks),
        "last scene minus first, points": 100 * (last - first) if len(films[0].scenes) > 1 else None,
        "films with the object asked for in all scenes": _share([film.kept for film in films]),
        "films with the object of scene 1 in all scenes": _share([film.kept_as_begun for film in films]),
        "scenes with the object asked for": _share([kept for film in films for kept in film.kept_scenes]),
        "scenes with the motion asked for, where there was room": _share(motions),
        f"borders with a jump under {LEAST_JUMP:g} pixels": _share(
            [jump is not None and jump < LEAST_JUMP for jump in jumps]
        ),
        "borders with no object": _share([jump is None for jump in jumps]),
        "jump at a border, pixels, median": statistics.median(found) if found else None,
        "step over a border, pixels, median": _median([step for film in films for step in film.steps]),
        "step over a border as drawn, pixels, median": _median([step for film in films for step in film.drawn_steps]),
    }


def scene_table(films: Sequence[FilmVerdict]) -> list[str]:
    """Lines of a Markdown table: a row a scene, a column an attribute, shares of films that are right in %.

    Args:
        films: at least one, all of as many scenes. "overall" is the share of right attributes, sync apart.
    """
    names = (*ATTRIBUTES, *SYNC)
    lines = [f"| scene | {' | '.join(names)} | overall |", "|---|" + "---|" * (len(names) + 1)]
    for number in range(len(films[0].scenes)):
        marks = [film.scenes[number] for film in films]
        shares = [_share([one[name] for one in marks if name in one]) for name in names]
        cells = ["" if share is None else f"{100 * share:.1f}" for share in [*shares, _overall(marks)]]
        lines.append(f"| {number + 1} | {' | '.join(cells)} |")
    return lines


def _share(marks: Sequence[bool]) -> float | None:
    return round(sum(marks) / len(marks), 4) if marks else None


def _overall(scores: Sequence[Mapping[str, bool]]) -> float:
    """Share of right marks over all attributes of all scenes; sync is counted apart."""
    marks = [right for one in scores for name, right in one.items() if name not in SYNC]
    return round(sum(marks) / len(marks), 4)


def _median(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


# ----------------------------------------------------------------------------------------------------------- evaluate


def tell_scenes(split: str, index: int, num_scenes: int) -> tuple[ToyboxClip, ...]:
    """The drawn scenes that a film is told, one after another and, where there are more than 8, again from the first.

    From the ninth on a scene begins elsewhere than it was drawn: its motion's kind can still be compared, its track
    cannot, and the motion may find no room (see `FilmVerdict.possible`).

    Args:
        split: of Toybox.
        index: of the drawn film.
        num_scenes: any number.

    Raises:
        ConfigError: as `draw_film`.
    """
    drawn = draw_film(split, index, min(num_scenes, FILM_SCENES))
    return tuple(drawn[number % FILM_SCENES] for number in range(num_scenes))


def evaluate_films(
    bundle: Bundle,
    splits: Sequence[str],
    count: int,
    start: int,
    output: Path,
    *,
    num_scenes: int = FILM_SCENES,
    seed: int = 0,
    engine: str = "vllm",
    sampling: Mapping[str, float | int | None] | None = None,
    decoding: ParallelDecoding | None = None,
    adapter: Adapter | None = None,
    progress: Advance,
) -> Measured:
    """Write a film for the captions of each drawn film, and judge whether it shows what they say, scene by scene.

    Args:
        bundle: to evaluate.
        splits: of Toybox.
        count: films a split.
        start: number of the first film of each split.
        output: directory of `report.json`, `report.md` and a contact sheet for each split.
        num_scenes: of each film; more than were drawn repeat the drawn ones, see `tell_scenes`.
        seed: of the first scene of the first film; counted up through all scenes of all films of a split.
        engine: its name.
        sampling: temperature, top_k, top_p and guidance_scale; what is None or missing is the bundle's own.
        decoding: how to write many ids at once; None writes one after another.
        adapter: LoRA adapter that changes the weights.
        progress: called with (scenes written, in all, the split).

    Returns:
        Where the report is and what it says.

    Raises:
        ConfigError: there is no such split, no film or scene, or the model cannot write such films.
        MediaError: `output` cannot be a directory.
    """
    if count < 1:
        raise ConfigError(f"an evaluation must have at least one film, got count={count}.")
    splits = list(dict.fromkeys(splits))
    for split in splits:  # a wrong name or number is told before the long work
        draw_film(split, start, min(num_scenes, 1))
    make_directory(output)
    about = about_run(bundle)  # before the long work: while it lasts, the working tree may change
    said = {name: value for name, value in (sampling or {}).items() if value is not None}
    settings: dict[str, Any] = bundle.generation_config.sampling(parallel=decoding is not None) | said
    weights = bundle.weights_sha256  # of the files that the engine is about to read
    adapters = () if adapter is None else (adapter,)
    verdicts: dict[str, list[FilmVerdict]] = {}
    looks: dict[str, list[tuple[Sequence[Clip], Sequence[ToyboxClip], FilmVerdict]]] = {}
    measures: dict[str, float | None] = {}
    seconds, ids = 0.0, 0
    writer = load_engine(
        engine,
        bundle.path,
        decodings=decodings_for(parallel=decoding is not None, upsampling=False),
        adapters=adapters,
        num_scenes=scenes_needed(bundle, [FilmRequest(scenes=(None,) * num_scenes)]),
    )
    try:
        pipeline = Pipeline(bundle, writer, adapters=adapters)
        for split in splits:
            films: list[FilmVerdict] = []
            clicks: list[float] = []
            drawn_clicks: list[float] = []
            shown: list[tuple[Sequence[Clip], Sequence[ToyboxClip], FilmVerdict]] = []
            room = max(1, LONGEST_SHEET * SCENES_PER_LINE // num_scenes)  # films of a sheet
            for first in range(0, count, _BATCH):
                numbers = range(first, min(first + _BATCH, count))
                told = [tell_scenes(split, start + number, num_scenes) for number in numbers]
                requests = [
                    FilmRequest(
                        scenes=tuple(scene.caption for scene in drawn),
                        sampling=SamplingConfig(**settings, seed=seed + number * num_scenes),
                        decoding=decoding,
                        adapter=None if adapter is None else adapter.name,
                    )
                    for number, drawn in zip(numbers, told, strict=True)
                ]
                begun = time.monotonic()
                made = write_films(pipeline, requests, _advance(progress, split, first, count, num_scenes))
                seconds += time.monotonic() - begun
                ids += sum(len(scene) for film in made for scene in film.ids)
                judged = [judge_film(drawn, film.scenes) for drawn, film in zip(told, made, strict=True)]
                clicks += [ratio for film in made for ratio in _border_clicks(film.clip, film.scenes)]
                drawn_clicks += [ratio for drawn in told for ratio in _drawn_clicks(drawn)]
                scenes = [film.scenes for film in made]
                shown += list(zip(scenes, told, judged, strict=True))[: min(SHOWN, room) - len(shown)]
                films += judged
            verdicts[split] = films
            found = measure_films(films) | _measure_clicks(clicks, drawn_clicks)
            measures |= {f"{name}, {split}": value for name, value in found.items()}
            looks[split] = shown
    finally:
        writer.close()
    about |= {"weights": weights[:12], "engine": engine, **settings, "first seed": seed, "scenes": num_scenes}
    if decoding is not None:
        about |= {"decoding": "parallel", **dataclasses.asdict(decoding)}
    about |= describe_adapter(adapter)
    if num_scenes > FILM_SCENES:
        about["scenes repeat"] = (
            f"a drawn film has {FILM_SCENES}; scene k is told what drawn scene (k - 1) % {FILM_SCENES} + 1 says. From "
            f"scene {FILM_SCENES + 1} on the object stands elsewhere than it was drawn: a motion is judged by its "
            "kind and may find no room, and an object that ended small may never be asked to grow again"
        )
    results = Results(
        title=f"Films of {num_scenes} scenes, {count} a split",
        about=about,
        scores={split: [marks for film in films for marks in film.scenes] for split, films in verdicts.items()},
        measures=measures | {"ids per second": ids / seconds, "seconds per film": seconds / (count * len(splits))},
    )
    lines = [line for split, films in verdicts.items() for line in _titled_table(split, films)]
    report = write_report(output, results)
    _add_scenes(output, report, verdicts, lines)
    for split, films_shown in looks.items():  # last: the report is there whatever becomes of them
        film_sheet(films_shown, output / f"{split}.png")
    facts = {
        "report": str(output / "report.md"),
        "attributes_right": {split: measures[f"attributes right, {split}"] for split in splits},
        "measures": report["measures"],
        "summary": report["summary"],
    }
    return Measured(facts=facts, tables=[*lines, *tables(results)])


def _advance(progress: Advance, split: str, first: int, count: int, num_scenes: int) -> Callable[[int, int], None]:
    """What a batch that begins with film `first` reports of itself, told of all films of the split."""
    return lambda done, _: progress(first * num_scenes + done, count * num_scenes, split)


def _border_clicks(film: Clip, scenes: Sequence[Clip]) -> list[float]:
    """The click ratio at each border of a joined film, where the later scene begins; none without sound."""
    if film.samples is None:
        return []
    lengths = [0 if scene.frames is None else len(scene.frames) - 1 for scene in scenes[:-1]]
    borders = np.cumsum(lengths) / film.fps
    return [click_ratio(film.samples, film.sample_rate, float(border)) for border in borders]


def _drawn_clicks(drawn: Sequence[ToyboxClip]) -> list[float]:
    """The same of the drawn scenes, joined in the same way."""
    clips = [scene.clip for scene in drawn]
    join = SeamlessJoin(fps=clips[0].fps, sample_rate=clips[0].sample_rate)
    samples = []
    for clip in clips:
        assert clip.frames is not None
        assert clip.samples is not None
        join.add_frames(clip.frames, starts=True, ends=True)
        samples.append(join.add_samples(clip.samples))
    samples.append(join.close()[1])
    film = Clip(frames=None, fps=clips[0].fps, samples=np.concatenate(samples), sample_rate=clips[0].sample_rate)
    return _border_clicks(film, clips)


def _measure_clicks(clicks: Sequence[float], drawn: Sequence[float]) -> dict[str, float | None]:
    under = f"borders with a click ratio under {LEAST_CLICK:g}"
    return {
        under: _share([ratio < LEAST_CLICK for ratio in clicks]),
        f"{under}, as drawn": _share([ratio < LEAST_CLICK for ratio in drawn]),
        "click ratio, median": _median(clicks),
    }


def _titled_table(split: str, films: Sequence[FilmVerdict]) -> list[str]:
    title = f"Films of {split} that are right, in % by scene (sync: of those whose sound has to follow the picture):"
    return [title, "", *scene_table(films), ""]


def _add_scenes(
    output: Path, report: dict[str, object], verdicts: Mapping[str, Sequence[FilmVerdict]], lines: Sequence[str]
) -> None:
    """Put what was counted scene by scene into a report: "scenes" in `report.json`, tables below in `report.md`."""
    report["scenes"] = {
        split: [summarise([film.scenes[number] for film in films]) for number in range(len(films[0].scenes))]
        for split, films in verdicts.items()
    }
    text = (output / "report.md").read_text(encoding="utf-8")
    for name, content in (
        ("report.json", json.dumps(report, indent=2, default=str, allow_nan=False) + "\n"),
        ("report.md", "\n".join([text, *lines])),
    ):
        part = output / f"{name}.part"
        part.write_text(content, encoding="utf-8")
        part.replace(output / name)
