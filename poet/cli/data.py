"""`poet encode` (clips to token shards) and `poet reconstruct` (a file through the tokenizers and back)."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from poet.cli.footage import (
    BlackLevel,
    Caption,
    Drop,
    DuplicateDecibels,
    DuplicateLevel,
    FootageOptions,
    FrozenLevel,
    Require,
    ShotThreshold,
    SilentLevel,
    Split,
    names_of,
    open_footage,
)
from poet.cli.options import Json
from poet.cli.output import keep_what_is_read, note, progress, show_result
from poet.errors import ConfigError

__all__ = ["encode", "reconstruct"]


def encode(
    source: Annotated[
        str,
        typer.Argument(
            help="toybox:SPLIT, a folder of clips with captions in .txt files beside them, a .jsonl or .csv with "
            "path and caption, or WebDataset's .tar archives, one or a folder of them."
        ),
    ],
    output: Annotated[Path, typer.Option("-o", "--output", help="Directory of the shards; a begun one is finished.")],
    model: Annotated[Path | None, typer.Option(help="A bundle, or tokenizers and vocabulary alone.")] = None,
    count: Annotated[int | None, typer.Option(min=1, help="Clips to encode; all when left out.")] = None,
    start: Annotated[int, typer.Option(min=0, help="Number of the first clip.")] = 0,
    height: Annotated[int | None, typer.Option(help="Pixels; the bundle's own when left out.")] = None,
    width: Annotated[int | None, typer.Option(help="Pixels; the bundle's own when left out.")] = None,
    shard_size: Annotated[int, typer.Option(min=1, help="Clips a file.")] = 1000,
    caption: Caption = None,
    require: Require = "",
    split: Split = None,
    shot_threshold: ShotThreshold = None,
    drop: Drop = "",
    black_level: BlackLevel = None,
    frozen_level: FrozenLevel = None,
    silent_level: SilentLevel = None,
    duplicate_level: DuplicateLevel = None,
    duplicate_decibels: DuplicateDecibels = None,
    processes: Annotated[
        int | None,
        typer.Option(min=0, help="That read files; as many as cores less one when left out. Not with --ray."),
    ] = None,
    ray: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS",
            help="Look through and encode on the machines of a Ray cluster: auto, HOST:PORT, or local. They need Poet, "
            "the bundle and the files at the same paths.",
        ),
    ] = None,
    ray_cpus: Annotated[int, typer.Option(min=1, help="Cores that a task of --ray takes.")] = 1,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    json: Json = False,
) -> None:
    """Turn clips into token shards for training. The same command goes on where an earlier one was stopped.

    Clips shall be as long as the bundle's. Long films are cut into such scenes with --split; --drop leaves out what
    teaches nothing. What became of every file then stands in report.md beside the shards.
    """
    from poet.bundle import Bundle, default_bundle
    from poet.data.clips import ClipSource, open_source
    from poet.data.encode import encode_source
    from poet.model.device import parse_device

    if ray is not None and device != "cpu":
        raise ConfigError(f"--ray encodes on CPUs, got --device {device}. Leave one of them out.")
    if ray is not None and processes is not None:
        raise ConfigError(f"--ray reads files in its own tasks, got --processes {processes}. Leave one of them out.")
    parse_device(device)
    bundle = Bundle.open(default_bundle() if model is None else model, require_model=False)
    size = bundle.generation_config
    height, width = size.height if height is None else height, size.width if width is None else width
    num_processes = max(0, (os.cpu_count() or 1) - 1) if processes is None else processes
    options = FootageOptions(
        split=split,
        shot_threshold=shot_threshold,
        drop=drop,
        levels={
            "black_level": black_level,
            "frozen_level": frozen_level,
            "silent_level": silent_level,
            "duplicate_level": duplicate_level,
            "duplicate_decibels": duplicate_decibels,
        },
        require=require,
        caption=caption,
    )
    tasks = None
    if ray is not None:
        from poet.data.ray_tasks import RayTasks

        tasks = RayTasks(address=ray, num_cpus=ray_cpus)
    told: dict[str, Any] = {}
    clips: ClipSource
    write_report: Callable[[], object] | None = None
    if options.asks_for_a_survey:
        clips, told, write_report = open_footage(
            source,
            output,
            bundle,
            options,
            (height, width),
            start=start,
            count=count,
            num_processes=num_processes,
            survey=None if tasks is None else tasks.survey,
        )
    else:
        clips = open_source(
            source,
            count=count,
            start=start,
            fps=size.fps,
            height=height,
            width=width,
            num_frames=size.num_frames,
            sample_rate=bundle.vocabulary.sample_rate,
            caption=caption,
            required=names_of(require),
        )
    with progress("encoding") as advance:
        report = encode_source(
            clips,
            bundle,
            output,
            shard_size=shard_size,
            device=device,
            num_processes=num_processes,
            progress=lambda done, total: advance(done, total, ""),
            elsewhere=None if tasks is None else tasks.encoding(bundle.path, bundle.fingerprint),
            accepted=write_report,
        )
    for key, reason in report.skipped:
        note(f"skipped {key}: {reason}")
    if report.num_uncaptioned:
        note(f"{report.num_uncaptioned} of {report.num_clips} clips have no caption: no task with a text can use them")
    show_result(
        {
            "directory": str(output),
            "clips": report.num_clips,
            "of_an_earlier_run": report.num_resumed,
            "shards": report.num_shards,
            "skipped": len(report.skipped),
            "without_caption": report.num_uncaptioned,
            **told,
            "seconds": round(report.seconds, 1),
        },
        json,
    )


def reconstruct(
    source: Annotated[Path, typer.Argument(help="A video, picture or sound file.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="The file to write.")],
    model: Annotated[Path | None, typer.Option(help="A bundle; the shipped one when left out.")] = None,
    fps: Annotated[float | None, typer.Option(help="Frames per second; the file's own when left out.")] = None,
    height: Annotated[int | None, typer.Option(help="Pixels; the file's own when left out.")] = None,
    width: Annotated[int | None, typer.Option(help="Pixels; the file's own when left out.")] = None,
    start: Annotated[float, typer.Option(help="Seconds of the file to skip.")] = 0.0,
    duration: Annotated[float | None, typer.Option(help="Seconds to read; the rest of the file when left out.")] = None,
    max_duration: Annotated[float, typer.Option(help="Longer files, in seconds, are refused.")] = 60.0,
    metadata: Annotated[bool, typer.Option(help="Write into the file what made it.")] = True,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    json: Json = False,
) -> None:
    """Send a file through the tokenizers and back, to see and hear what they keep."""
    started = time.monotonic()
    from poet import __version__
    from poet.bundle import Bundle, default_bundle
    from poet.evaluation.roundtrip import reconstruct_clip
    from poet.media import check_target, read_clip, write_clip
    from poet.model.device import parse_device

    check_target(output)
    keep_what_is_read([output], [source])
    parse_device(device)
    bundle = Bundle.open(default_bundle() if model is None else model, require_model=False)
    rate = bundle.vocabulary.sample_rate
    clip = read_clip(
        source,
        fps=fps,
        height=height,
        width=width,
        sample_rate=rate,
        start=start,
        duration=duration,
        max_duration=max_duration,
    )
    check_target(output, has_video=clip.frames is not None, has_audio=clip.samples is not None)
    video = bundle.load_video_tokenizer(device) if clip.frames is not None else None
    audio = bundle.load_audio_tokenizer(device) if clip.samples is not None else None
    with progress("reconstructing frames") as advance:
        result = reconstruct_clip(
            clip, video, audio, progress=lambda done, total: advance(done, total, ""), device=device
        )
    facts = {
        "generator": f"Poet {__version__}",
        "machine_made": "yes",
        "reconstruction_of": source.name,
        "bundle": bundle.path.name,
        "fingerprint": bundle.fingerprint,
    }
    write_clip(result.clip, output, metadata=facts if metadata else None)
    shown: dict[str, Any] = {"file": str(output), "duration": round(result.clip.duration, 3), **result.measures}
    show_result({**shown, "seconds": round(time.monotonic() - started, 1)}, json)
