"""What `poet evaluate` does: draw clips, generate or reconstruct, judge, report. Joins parts; measures nothing itself.

Toybox is the only world whose clips can be judged, so splits here are Toybox's; other judges would join beside it.
Clips of the split "concept" are judged by the judge that knows the concept, all others by the plain one.
"""

from __future__ import annotations

import dataclasses
import datetime
import platform
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from poet import __version__
from poet.bundle import Bundle
from poet.data.toybox import RESOLUTION, ToyboxClip, draw, draw_frames
from poet.data.toybox_concept import is_concept
from poet.errors import ConfigError, MediaError
from poet.evaluation.judge import SYNCED_MOTIONS, Verdict, judge, judge_clip
from poet.evaluation.reconstruction import ReconstructionReport, evaluate_reconstruction
from poet.evaluation.report import Results, SheetEntry, contact_sheet, tables, write_report
from poet.evaluation.superresolution import Frames, UpsamplingExample, evaluate_upsampling
from poet.generation.canvas import ParallelDecoding
from poet.generation.engine import decodings_for, load_engine
from poet.generation.pipeline import ClipRequest, Pipeline
from poet.generation.provenance import describe_adapter
from poet.generation.sampling import SamplingConfig
from poet.generation.upsample import Upsampling
from poet.media import Clip
from poet.model.lora import Adapter
from poet.tasks import Task, get_task

__all__ = [
    "Measured",
    "about_run",
    "commit_of",
    "generation",
    "make_directory",
    "reconstruction",
    "upsampling",
]

Advance = Callable[[int, int, str], None]

SIGHT = ("colour", "shape", "size", "background", "motion")
SOUND = ("timbre", "pitch")
SYNC = ("sync",)
SHOWN = 12  # clips of a split on the contact sheet
CODE = ("poet/*.py", "tokenizers/*.py", "serving/*.py")  # what a score depends on, beside the bundle


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measured:
    """What came of it.

    Attributes:
        facts: where the report is (`report`) and what it says in short.
        tables: the lines of the report's tables.
    """

    facts: Mapping[str, Any]
    tables: Sequence[str]


def generation(
    bundle: Bundle,
    splits: Sequence[str],
    count: int,
    start: int,
    output: Path,
    *,
    task: str,
    seed: int,
    engine: str,
    sampling: Mapping[str, float | int | None],
    decoding: ParallelDecoding | None = None,
    upsampling: Upsampling | None = None,
    adapter: Adapter | None = None,
    progress: Advance,
) -> Measured:
    """Generate a clip for the caption of each drawn clip and judge whether it is what the caption says.

    Args:
        bundle: to evaluate.
        splits: of Toybox.
        count: clips a split.
        start: number of the first clip of each split.
        output: directory of `report.json`, `report.md` and a contact sheet for each split.
        task: its name; tasks that go on from a clip are given the drawn one.
        seed: of the first clip; counted up.
        engine: its name.
        sampling: temperature, top_k, top_p and guidance_scale; None takes the bundle's own.
        decoding: how to write many ids at once; None writes one after another.
        upsampling: how to make the pictures larger; None leaves them as they are.
        adapter: LoRA adapter that changes the weights.
        progress: called with (done, in all, what is done).

    Returns:
        Where the report is and what it says.

    Raises:
        ConfigError: there is no such task or split, the model was not trained on the task, or the judge cannot tell
            what it should have written.
        MediaError: `output` cannot be a directory.
    """
    row = get_task(task)
    if row.writes_text or row.edit is not None or not row.inputs:
        raise ConfigError(
            f"task {task} cannot be evaluated: the judge compares pictures and sounds with the caption of a clip "
            "that the task was told or shown whole. Choose another --task."
        )
    bundle.check_trained(task)
    splits = _check_splits(splits, start)
    make_directory(output)
    about = about_run(bundle)  # before the long work: while it lasts, the working tree may change
    said = {name: value for name, value in sampling.items() if value is not None}
    settings: dict[str, Any] = bundle.generation_config.sampling(parallel=decoding is not None) | said
    scores: dict[str, list[dict[str, bool]]] = {}
    ids, seconds = 0, 0.0
    weights = bundle.weights_sha256  # of the files that the engine is about to read
    adapters = () if adapter is None else (adapter,)
    writer = load_engine(
        engine,
        bundle.path,
        decodings=decodings_for(parallel=decoding is not None, upsampling=upsampling is not None),
        adapters=adapters,
    )
    try:
        pipeline = Pipeline(bundle, writer, adapters=adapters)
        for split in splits:
            drawn = [draw(split, start + number) for number in range(count)]
            requests = [
                ClipRequest(
                    task=task,
                    text=clip.caption if "text" in row.inputs | row.optional else None,
                    clip=_given(row, clip, pipeline),
                    sampling=SamplingConfig(**settings, seed=seed + number),
                    decoding=decoding,
                    upsampling=upsampling,
                    adapter=None if adapter is None else adapter.name,
                )
                for number, clip in enumerate(drawn)
            ]
            begun = time.monotonic()
            made = pipeline.generate(requests, lambda done, total, split=split: progress(done, total, split))  # type: ignore[misc]
            seconds += time.monotonic() - begun
            ids += sum(len(clip.ids) for clip in made)
            clips = [clip.clip for clip in made if clip.clip is not None]
            scores[split] = [_marks(row, clip, truth) for clip, truth in zip(clips, drawn, strict=True)]
            verdicts = [
                _verdict(clip.frames, clip.samples, truth) for clip, truth in zip(clips[:SHOWN], drawn, strict=False)
            ]
            _sheet(output / f"{split}.png", clips[:SHOWN], drawn, verdicts, scores[split])
    finally:
        writer.close()
    overall = {split: _overall(marks) for split, marks in scores.items()}
    about |= {"weights": weights[:12], "task": task, "engine": engine, **settings, "first seed": seed}
    if decoding is not None:
        about |= {"decoding": "parallel", **dataclasses.asdict(decoding)}
    about |= describe_adapter(adapter)
    if upsampling is not None:
        about |= {
            f"upsampling {name}": value for name, value in dataclasses.asdict(upsampling).items() if name != "seed"
        }
    results = Results(
        title=f"Clips generated for {count} captions a split",
        about=about,
        scores=scores,
        measures={f"attributes right, {split}": value for split, value in overall.items()}
        | {"ids per second": ids / seconds, "seconds per clip": seconds / (count * len(splits))},
    )
    report = write_report(output, results)
    facts = {"report": str(output / "report.md"), "attributes_right": overall, "summary": report["summary"]}
    return Measured(facts=facts, tables=tables(results))


def reconstruction(
    bundle: Bundle, splits: Sequence[str], count: int, start: int, output: Path, *, progress: Advance
) -> Measured:
    """Send drawn clips through the tokenizers and back, and measure what is kept.

    Args:
        bundle: whose tokenizers to measure; it needs no model.
        splits: of Toybox.
        count: clips a split.
        start: number of the first clip of each split.
        output: directory of the reports, one for each split.
        progress: called with (done, in all, what is done).

    Returns:
        Where the reports are and what they say.

    Raises:
        ConfigError: there is no such split.
        MediaError: `output` cannot be a directory.
    """
    found: dict[str, Any] = {}
    shown: list[str] = []
    splits = _check_splits(splits, start)
    make_directory(output)
    about = about_run(bundle)  # before the long work: while it lasts, the working tree may change
    for split in splits:
        drawn = [draw(split, start + number) for number in range(count)]
        report = evaluate_reconstruction(
            ((clip.clip, clip.attributes.as_dict()) for clip in drawn),
            bundle.video_tokenizer,
            bundle.audio_tokenizer,
            _judge_clip,
            num_examples=SHOWN,
            progress=lambda done, split=split: progress(done, count, split),  # type: ignore[misc]
        )
        kept = _kept(report)
        found[split] = {**report.as_dict(), "attributes_kept": kept}
        measures = {"psnr": report.psnr, "psnr pooled": report.psnr_pooled, "ssim": report.ssim}
        measures |= {"mel distance": report.mel_distance, "si-snr": report.si_snr, "attributes kept": kept}
        measures |= {f"{name} kept": agreement.share for name, agreement in report.agreement.items()}
        if report.video_codes is not None:
            measures |= {"video codes used": report.video_codes.used, "video perplexity": report.video_codes.perplexity}
        for level, use in enumerate(report.audio_codes):
            measures |= {f"audio codes used, level {level}": use.used}
        results = Results(title=f"{count} clips of {split} through the tokenizers", about=about, measures=measures)
        write_report(output / split, results)
        shown += [f"{results.title}:", "", *tables(results)]
        after = [clip for _, clip in report.examples]
        verdicts = [_verdict(clip.frames, clip.samples, truth) for clip, truth in zip(after, drawn, strict=False)]
        marks = [_judge_clip(clip, truth.attributes.as_dict()) for clip, truth in zip(after, drawn, strict=False)]
        _sheet(output / f"{split}.png", after, drawn, verdicts, marks)
    return Measured(facts={"report": str(output), **found}, tables=shown)


def upsampling(
    bundle: Bundle,
    splits: Sequence[str],
    count: int,
    start: int,
    output: Path,
    *,
    seed: int,
    engine: str,
    settings: Upsampling,
    progress: Advance,
) -> Measured:
    """Make the true codes of drawn clips larger, and measure the picture against the clip drawn in that size.

    Args:
        bundle: whose upsampler to measure.
        splits: of Toybox.
        count: clips a split.
        start: number of the first clip of each split.
        output: directory of `report.json`, `report.md` and a contact sheet for each split.
        seed: of the first clip; counted up.
        engine: its name.
        settings: how to upsample.
        progress: called with (done, in all, what is done).

    Returns:
        Where the report is and what it says: PSNR, and what the judge sees before and after.

    Raises:
        ConfigError: there is no such split, or no upsampler.
        MediaError: `output` cannot be a directory.
    """
    bundle.check_upsampler()
    splits = _check_splits(splits, start)
    make_directory(output)
    about = about_run(bundle)  # before the long work: while it lasts, the working tree may change
    text_to_video = get_task("text_to_video")
    measures: dict[str, float] = {}
    scores: dict[str, list[dict[str, bool]]] = {}
    writer = load_engine(engine, bundle.path, decodings=["upsampling"])
    try:
        large = RESOLUTION * bundle.upsampler_scale
        for split in splits:
            drawn = [draw(split, start + number) for number in range(count)]
            pictures: list[tuple[Clip, Clip]] = []

            def keep(before: Frames, after: Frames, into: list[tuple[Clip, Clip]] = pictures) -> None:
                into.append((_silent(before, bundle), _silent(after, bundle)))

            examples = (
                UpsamplingExample(
                    small=one.clip.frames, large=draw_frames(split, start + number, large), caption=one.caption
                )
                for number, one in enumerate(drawn)
                if one.clip.frames is not None
            )
            report = evaluate_upsampling(
                examples,
                writer,
                bundle.video_tokenizer,
                bundle.text_tokenizer,
                dataclasses.replace(settings, seed=seed),
                keep=keep,
                progress=lambda done, split=split: progress(done, count, split),  # type: ignore[misc]
            )
            measures |= {f"{name}, {split}": value for name, value in report.as_dict().items()}
            for place, size in enumerate((RESOLUTION, large)):
                group = f"{split}, {size} pixels"
                clips = [pair[place] for pair in pictures]
                scores[group] = [_marks(text_to_video, clip, truth) for clip, truth in zip(clips, drawn, strict=True)]
                measures[f"attributes right, {group}"] = _overall(scores[group])
            shown = [after for _, after in pictures[:SHOWN]]
            silent = np.zeros(1, np.float32)
            verdicts = [_verdict(clip.frames, silent, truth) for clip, truth in zip(shown, drawn, strict=False)]
            _sheet(output / f"{split}.png", shown, drawn, verdicts, scores[group])
    finally:
        writer.close()
    about |= {"upsampler": bundle.upsampler_sha256[:12], "engine": engine, "first seed": seed}
    about |= {name: value for name, value in dataclasses.asdict(settings).items() if name != "seed"}
    results = Results(
        title=f"True codes of {count} clips a split, upsampled",
        about=about,
        scores=scores,
        measures=measures,
    )
    report_of = write_report(output, results)
    facts = {"report": str(output / "report.md"), "measures": measures, "summary": report_of["summary"]}
    return Measured(facts=facts, tables=tables(results))


def _silent(frames: Frames, bundle: Bundle) -> Clip:
    return Clip(frames=frames, fps=bundle.geometry().fps, samples=None, sample_rate=bundle.geometry().sample_rate)


def _given(task: Task, drawn: ToyboxClip, pipeline: Pipeline) -> Clip | None:
    """What a task is given of a drawn clip."""
    reads = task.inputs | task.optional
    frames, samples = drawn.clip.frames, drawn.clip.samples
    if "video" not in reads and "audio" not in reads:
        return None
    assert frames is not None
    if task.conditioning == "first_frame":
        frames = frames[:1]
    elif task.conditioning == "first_frames":
        geometry = pipeline.geometry
        frames = frames[: geometry.num_video_frames(task.default_condition(geometry.latent_shape[0]))]
    return Clip(
        frames=frames if "video" in reads else None,
        fps=drawn.clip.fps,
        samples=samples if "audio" in task.inputs else None,
        sample_rate=drawn.clip.sample_rate,
    )


def _marks(task: Task, clip: Clip, truth: ToyboxClip) -> dict[str, bool]:
    """Marks of what the task writes. Where a sound was to follow a motion that is not seen, sync is wrong."""
    wanted = (SIGHT if task.writes_video else ()) + (SOUND if task.writes_audio else ())
    if task.outputs == "image":
        wanted = tuple(name for name in wanted if name != "motion")
    marks = {
        name: right for name, right in _judge_clip(clip, truth.attributes.as_dict()).items() if name in wanted + SYNC
    }
    asked = truth.attributes.motion in SYNCED_MOTIONS and truth.attributes.timbre != "silent"
    if not (task.writes_video and task.writes_audio):
        marks.pop("sync", None)
    elif asked:
        marks.setdefault("sync", False)
    return marks


def _verdict(frames: Frames | None, samples: NDArray[np.float32] | None, truth: ToyboxClip) -> Verdict:
    """What the judge says of a clip; of one that should show the concept, the judge that knows it."""
    return judge(frames, samples, **_knowing(truth.attributes.as_dict()))


def _judge_clip(clip: Clip, attributes: Mapping[str, str]) -> dict[str, bool]:
    """As `judge_clip`, by the same judge as `_verdict`."""
    return judge_clip(clip, attributes, **_knowing(attributes))


def _knowing(attributes: Mapping[str, str]) -> dict[str, bool]:
    return {"concept": True} if is_concept(attributes) else {}


def _overall(scores: Sequence[Mapping[str, bool]]) -> float:
    """Share of right marks over all attributes of all clips; sync is counted apart."""
    marks = [right for one in scores for name, right in one.items() if name not in SYNC]
    return round(sum(marks) / len(marks), 4)


def _kept(report: ReconstructionReport) -> float:
    """Of the attributes that were right before, the share that still is."""
    counted = [agreement for name, agreement in report.agreement.items() if name not in SYNC]
    return round(sum(one.after for one in counted) / max(1, sum(one.before for one in counted)), 4)


def _sheet(
    path: Path,
    clips: Sequence[Clip],
    drawn: Sequence[ToyboxClip],
    verdicts: Sequence[Verdict],
    marks: Sequence[Mapping[str, bool]],
) -> None:
    entries = [
        SheetEntry(clip=clip, caption=truth.caption, said=verdict.as_text(), marks=right)
        for clip, truth, verdict, right in zip(clips, drawn, verdicts, marks, strict=False)
    ]
    contact_sheet(entries, path)


def _check_splits(splits: Sequence[str], start: int) -> list[str]:
    """Each split once, after drawing a clip of it: a wrong name is told before the long work."""
    for split in splits:
        draw(split, start)
    return list(dict.fromkeys(splits))


def make_directory(path: Path) -> None:
    """Make the directory of a report, before the long work, so that a name that cannot be used is told at once.

    Raises:
        MediaError: it cannot be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise MediaError(f"{path} cannot hold a report: {error.strerror}. Name another directory with -o.") from error


def commit_of(checkout: Path) -> str | None:
    """The commit of a git working tree in short, "with changes" if its code differs from it.

    Args:
        checkout: the tree's root.

    Returns:
        None where there is no working tree, or no git to ask.
    """
    if not (checkout / ".git").exists():  # an installed package may lie somewhere inside another project's tree
        return None
    ask = ["git", "--no-optional-locks", "-C", str(checkout)]
    try:
        commit = subprocess.run(
            [*ask, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True, timeout=20
        ).stdout.strip()
        changed = subprocess.run(
            [*ask, "status", "--porcelain", "--", *CODE], capture_output=True, text=True, check=True, timeout=20
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
    return f"{commit} with changes" if changed else commit


def about_run(bundle: Bundle) -> dict[str, object]:
    """What a report says of where its figures come from: bundle, version, commit, date, machine."""
    commit = commit_of(Path(__file__).parents[2])
    return {
        "bundle": bundle.path.name,
        "fingerprint": bundle.fingerprint[:12],
        "version": __version__,
        **({} if commit is None else {"commit": commit}),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "hardware": f"{platform.machine()}, {platform.system()}",
    }
