"""What tokenizers keep of somebody's own clips, and how much more than another bundle's.

Reads files, sends them through, reports. Nothing is judged: what real clips show, nobody knows but who made them.

Legend: N frames of H x W pixels.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from poet.bundle import Bundle
from poet.data.clips import ClipSource, open_source
from poet.errors import ConfigError
from poet.evaluation.measure import Advance, Measured, about_run, make_directory
from poet.evaluation.reconstruction import ReconstructionReport, evaluate_reconstruction
from poet.evaluation.report import Results, tables, write_report
from poet.media import Clip

__all__ = ["comparison_sheet", "reconstruct_footage"]

_SHOWN = 12  # clips of the sheet
_STRIP_WIDTH, _STRIP_HEIGHT, _DOTS_PER_INCH = 4.8, 1.75, 100  # inches


def reconstruct_footage(
    bundle: Bundle,
    clips: str | Path,
    count: int | None,
    start: int,
    output: Path,
    *,
    against: Bundle | None = None,
    height: int | None = None,
    width: int | None = None,
    progress: Advance,
) -> Measured:
    """Send clips through the tokenizers and back, and measure what is kept.

    Args:
        bundle: whose tokenizers to measure; it needs no model.
        clips: a folder of files or a manifest, see `poet.data.clips.open_source`.
        count: how many; None takes all.
        start: number of the first clip.
        output: directory of `report.json`, `report.md` and a contact sheet.
        against: another bundle, measured on the same clips and shown beside.
        height: pixels; None takes the bundle's own.
        width: pixels; None takes the bundle's own.
        progress: called with (done, in all, what is done).

    Returns:
        Where the report is and what it says.

    Raises:
        ConfigError: there are no such clips.
        MediaError: a clip cannot be read, or `output` cannot be a directory.
    """
    usual = bundle.generation_config
    source = open_source(
        clips,
        count=count,
        start=start,
        fps=usual.fps,
        height=usual.height if height is None else height,
        width=usual.width if width is None else width,
        num_frames=usual.num_frames,
        sample_rate=bundle.vocabulary.sample_rate,
    )
    make_directory(output)
    about = about_run(bundle)  # before the long work: while it lasts, the working tree may change
    measured = {str(bundle.path.name): bundle} | ({} if against is None else {_other_name(bundle, against): against})
    chosen = [int(place) for place in np.linspace(0, len(source) - 1, min(_SHOWN, len(source)))]
    order = chosen + sorted(set(range(len(source))) - set(chosen))  # only the first are kept for looking at
    shown: list[list[tuple[str, Clip]]] = []
    reports: dict[str, ReconstructionReport] = {}
    for name, one in reversed(measured.items()):  # what it is compared with stands before it

        def kept(done: int, name: str = name) -> None:
            progress(done, len(source), name)

        report = evaluate_reconstruction(
            _read(source, order), one.video_tokenizer, one.audio_tokenizer, num_examples=len(chosen), progress=kept
        )
        reports[name] = report
        shown = shown or [[("as it is", before)] for before, _ in report.examples]
        for row, (_, after) in zip(shown, report.examples, strict=True):
            row.append((name, after))
    measures = {f"{key}, {name}": value for name, report in reports.items() for key, value in _numbers(report).items()}
    if against is not None:
        ours, theirs = reports[next(iter(measured))], reports[next(reversed(measured))]
        measures["psnr gained"] = ours.psnr - theirs.psnr
    results = Results(
        title=f"{len(source)} clips of {source.name} through the tokenizers", about=about, measures=measures
    )
    write_report(output, results)
    comparison_sheet(shown, output / "clips.png")
    facts: dict[str, Any] = {"report": str(output), **{name: report.as_dict() for name, report in reports.items()}}
    return Measured(facts=facts, tables=[f"{results.title}:", "", *tables(results)])


def comparison_sheet(rows: Sequence[Sequence[tuple[str, Clip]]], path: Path) -> None:
    """Draw clips side by side: a row a clip, a column a version of it, of each the first, middle and last frame.

    Args:
        rows: of each clip its versions with their names; all rows have as many. The first is what the others are
            compared with: above each stands the PSNR of all of its frames.
        path: a PNG file, overwritten.

    Raises:
        ConfigError: there is nothing to draw, or the rows differ in length.
    """
    if not rows or len({len(row) for row in rows}) != 1:
        raise ConfigError(
            f"a sheet must have rows of as many versions each, got {[len(row) for row in rows]}. Give every clip with "
            "all of its versions."
        )
    columns = len(rows[0])
    size = (_STRIP_WIDTH * columns, _STRIP_HEIGHT * len(rows))
    figure = Figure(figsize=size, dpi=_DOTS_PER_INCH, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (name, clip, first) in zip(
        figure.subplots(len(rows), columns, squeeze=False).flat,
        ((name, clip, row[0][1]) for row in rows for name, clip in row),
        strict=True,
    ):
        axes.set_axis_off()
        if clip.frames is None or first.frames is None:
            axes.set_title(f"{name}: no picture", fontsize=8)
            continue
        score = "" if clip is first else f", {_psnr(first, clip):.1f} dB"
        axes.set_title(f"{name}{score}", fontsize=8)
        axes.imshow(np.concatenate(list(clip.frames[[0, len(clip.frames) // 2, -1]]), axis=1), interpolation="nearest")
    part = path.with_name(path.name + ".part")
    figure.savefig(part, format="png", dpi=_DOTS_PER_INCH)
    part.replace(path)


def _read(source: ClipSource, order: Sequence[int]) -> Iterator[tuple[Clip, Mapping[str, str]]]:
    for index in order:
        yield source[index].clip, {}


def _other_name(bundle: Bundle, other: Bundle) -> str:
    return other.path.name if other.path.name != bundle.path.name else f"{other.path.parent.name}/{other.path.name}"


def _numbers(report: ReconstructionReport) -> dict[str, float | int]:
    found: dict[str, float | int] = {"psnr": report.psnr, "psnr pooled": report.psnr_pooled, "ssim": report.ssim}
    found |= {"mel distance": report.mel_distance, "si-snr": report.si_snr}
    if report.video_codes is not None:
        found |= {"video codes used": report.video_codes.used, "video perplexity": report.video_codes.perplexity}
    return found


def _psnr(first: Clip, clip: Clip) -> float:
    assert first.frames is not None
    assert clip.frames is not None
    error = np.mean((first.frames.astype(np.float32) - clip.frames.astype(np.float32)) ** 2)
    return float(10 * np.log10(255**2 / max(float(error), 1e-6)))
