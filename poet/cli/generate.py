"""`poet generate`: a prompt, an image or a clip to a file. Parses and reads; the pipeline does the work."""

from __future__ import annotations

import time
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from poet.cli.adapters import read_one
from poet.cli.films import check_film_options, film_requests, read_scenes
from poet.cli.options import (
    ChoiceTemperature,
    GuidanceStart,
    GuidanceStop,
    Json,
    Lora,
    Order,
    Schedule,
    Steps,
    UpsampleSteps,
    UpsampleTemperature,
)
from poet.cli.output import Advance, keep_what_is_read, note, progress, show_result
from poet.cli.settings import PARALLEL, GenerateSettings, settings_like
from poet.cli.streams import check_stream, stream_to_file
from poet.errors import ConfigError

if TYPE_CHECKING:
    from poet.bundle import Bundle
    from poet.generation.canvas import ParallelDecoding
    from poet.generation.film import FilmRequest, GeneratedFilm
    from poet.generation.pipeline import ClipRequest, GeneratedClip, Pipeline
    from poet.generation.streaming import Piece
    from poet.generation.upsample import Upsampling
    from poet.tasks import Task

__all__ = ["generate", "parallel_decoding", "upsampling"]

DEFAULT_ENGINE = "vllm"
SAMPLING = ("temperature", "top_k", "top_p", "guidance_scale")
REPETITION = ("repetition_penalty", "repetition_window")
DECODINGS = ("autoregressive", "parallel")
SUFFIXES = {"image": ".png", "audio": ".wav"}


def generate(
    prompt: Annotated[str | None, typer.Argument(help="What to show and let be heard.")] = None,
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", help="The file to write, clip.mp4 when left out; its suffix says how."),
    ] = None,
    task: Annotated[
        str | None, typer.Option(help="A task's name (see poet/tasks.py); found from what is given when left out.")
    ] = None,
    image: Annotated[Path | None, typer.Option(help="A picture to set in motion.")] = None,
    video: Annotated[Path | None, typer.Option(help="A clip to go on from.")] = None,
    audio: Annotated[Path | None, typer.Option(help="A sound.")] = None,
    model: Annotated[Path | None, typer.Option(help="A bundle; the shipped one when left out.")] = None,
    seed: Annotated[int | None, typer.Option(help="Same seed, same clip; drawn when left out.")] = None,
    temperature: Annotated[float | None, typer.Option(help="0 takes the likeliest id.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Draw from so many of the likeliest ids; 0 is all.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Draw from the likeliest ids of this total probability.")] = None,
    guidance_scale: Annotated[
        float | None, typer.Option(help="How closely to follow the prompt; 1 asks the model once an id, others twice.")
    ] = None,
    negative_prompt: Annotated[str | None, typer.Option(help="What guidance shall move the clip away from.")] = None,
    repetition_penalty: Annotated[
        float | None, typer.Option(help="Above 1 makes ids that were written lately less likely; 1 is off.")
    ] = None,
    repetition_window: Annotated[int | None, typer.Option(help="How many of the last ids count; 0 is all.")] = None,
    decoding: Annotated[
        str | None, typer.Option(help="autoregressive (the default), or parallel: many ids at once.")
    ] = None,
    steps: Steps = None,
    schedule: Schedule = None,
    order: Order = None,
    choice_temperature: ChoiceTemperature = None,
    guidance_start: GuidanceStart = None,
    guidance_stop: GuidanceStop = None,
    upsample: Annotated[bool | None, typer.Option(help="Write the picture in twice the size.")] = None,
    upsample_steps: UpsampleSteps = None,
    upsample_temperature: UpsampleTemperature = None,
    lora: Lora = None,
    engine: Annotated[str | None, typer.Option(help="vllm (the default), or torch (the reference).")] = None,
    scene: Annotated[
        list[str] | None, typer.Option(help="Of a film: the prompt of its next scene; repeatable.")
    ] = None,
    scenes: Annotated[
        Path | None,
        typer.Option(help="Of a film: a file with a prompt a line; - is a scene without one, # begins a remark."),
    ] = None,
    num_scenes: Annotated[int | None, typer.Option(min=1, help="Of a film: so many scenes of the one prompt.")] = None,
    memory: Annotated[
        int | None, typer.Option(min=0, help="Of a film: earlier scenes that a scene sees; all when left out.")
    ] = None,
    loop: Annotated[bool | None, typer.Option("--loop", help="Of a film: end where it began.")] = None,
    until: Annotated[Path | None, typer.Option(help="Of a film: a clip to arrive at; the film ends with it.")] = None,
    stream: Annotated[
        bool, typer.Option("--stream", help="Write an .mp4 that can be played while it is being written.")
    ] = False,
    num_samples: Annotated[int, typer.Option(min=1, help="Clips to write, with seeds counted up.")] = 1,
    like: Annotated[
        Path | None,
        typer.Option(help="Make this clip again, from its metadata; what it was made from must be there too."),
    ] = None,
    metadata: Annotated[bool, typer.Option(help="Write into the file what made it.")] = True,
    json: Json = False,
) -> None:
    """Write a clip from a text, an image, a clip, a sound, or nothing; or a film of several scenes."""
    started = time.monotonic()
    from poet.bundle import Bundle, default_bundle
    from poet.generation.given import GivenFiles
    from poet.media import write_clip
    from poet.tasks import get_task

    bundle = Bundle.open(default_bundle() if model is None else model)
    settings = GenerateSettings(
        prompt=prompt,
        negative_prompt=negative_prompt,
        task=task,
        image=image,
        video=video,
        audio=audio,
        seed=seed,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        guidance_scale=guidance_scale,
        repetition_penalty=repetition_penalty,
        repetition_window=repetition_window,
        decoding=decoding,
        steps=steps,
        schedule=schedule,
        order=order,
        choice_temperature=choice_temperature,
        guidance_start=guidance_start,
        guidance_stop=guidance_stop,
        upsample=upsample,
        upsample_steps=upsample_steps,
        upsample_temperature=upsample_temperature,
        lora=lora,
        engine=engine,
        scenes=read_scenes(prompt, scene, scenes, num_scenes),
        memory=memory,
        loop=loop,
        until=until,
    )
    expected_ids = None
    if like is not None:
        settings, expected_ids = settings_like(like, settings, bundle)
    defaults = bundle.generation_config
    adapters = read_one(settings.lora, bundle)
    check_film_options(settings)
    is_film = settings.scenes is not None
    files = GivenFiles(image=settings.image, video=settings.video, audio=settings.audio)
    has_text = settings.prompt is not None
    default = "text_to_video_audio" if is_film else defaults.task
    chosen = default if is_film else settings.task or files.guess_task(has_text=has_text, default=default)
    row = get_task(chosen)
    bundle.check_trained(chosen)
    targets = _targets(output, num_samples, row)
    if not row.writes_text:
        keep_what_is_read(targets, (settings.image, settings.video, settings.audio, settings.until, like))
    if stream:
        check_stream(targets)
    given = None if is_film else files.read(bundle, row, has_text=has_text)
    sources = settings.sources()
    # torch, which takes seconds: only once all that was asked is sound
    from poet.generation.engine import decodings_for, load_engine
    from poet.generation.pipeline import ClipRequest, Pipeline
    from poet.generation.sampling import SamplingConfig

    parallel = parallel_decoding(settings.decoding, bundle, **{name: getattr(settings, name) for name in PARALLEL})
    larger = upsampling(settings.upsample, steps=settings.upsample_steps, temperature=settings.upsample_temperature)
    said = {name: value for name in (*SAMPLING, *REPETITION) if (value := getattr(settings, name)) is not None}
    sampling: dict[str, Any] = defaults.sampling(parallel=parallel is not None) | said
    first_seed = settings.seed if settings.seed is not None else _new_seed()
    adapter = adapters[0].name if adapters else None
    options: dict[str, Any] = {"decodings": decodings_for(parallel=parallel is not None, upsampling=larger is not None)}
    films: list[FilmRequest] = []
    if is_film:
        from poet.generation.film import decodings_needed, scenes_needed

        films = film_requests(
            settings,
            bundle,
            num_samples,
            sampling=sampling,
            first_seed=first_seed,
            decoding=parallel,
            adapter=adapter,
        )
        options = {"decodings": decodings_needed(films), "num_scenes": scenes_needed(bundle, films)}
    requests = [
        ClipRequest(
            task=chosen,
            text=settings.prompt,
            clip=given,
            negative_text=settings.negative_prompt,
            sampling=SamplingConfig(**sampling, seed=first_seed + number),
            decoding=parallel,
            upsampling=larger,
            adapter=adapter,
        )
        for number in range(0 if is_film else num_samples)
    ]
    name = settings.engine or DEFAULT_ENGINE
    _ = bundle.weights_sha256  # of the files that the engine is about to read
    note(f"starting {name} on {bundle.path}")
    writer = load_engine(name, bundle.path, adapters=adapters, **options)
    timing: dict[str, float] = {}
    clips: Sequence[GeneratedClip | GeneratedFilm] = []
    results: list[dict[str, Any]] = []
    try:
        pipeline = Pipeline(bundle, writer, adapters=adapters)
        loaded = time.monotonic()
        if stream:
            pieces, count = _stream(pipeline, films, requests)
            streamed = stream_to_file(
                pieces,
                pipeline.geometry,
                targets[0],
                sources,
                has_sound=row.writes_audio or (given is not None and given.samples is not None),
                num_frames=count,
                keep_metadata=metadata,
            )
            timing["first_frame"] = streamed.pop("first_frame")
            results.append(streamed)
        else:
            with progress("writing scenes" if is_film else "writing ids") as advance:
                clips = _write(pipeline, films, requests, advance)
    finally:
        writer.close()
    timing = {"start": round(loaded - started, 2)} | timing | {"writing": round(time.monotonic() - loaded, 2)}
    for clip, target in zip(clips, targets, strict=not stream):
        facts = clip.metadata | sources
        if clip.clip is None:
            results.append({"text": clip.text, **facts})
            continue
        write_clip(clip.clip, target, metadata=facts if metadata else None)
        results.append({"file": str(target), "duration": round(clip.clip.duration, 3), **facts})
    result: dict[str, Any] = {**results[0]} if num_samples == 1 else {"clips": results}
    if expected_ids is not None:
        result["same_ids"] = results[0]["ids_sha256"] == expected_ids
        if not result["same_ids"]:
            note(f"the ids are not those of {like}: the weights, the machine or its packages are not the same")
    show_result({**result, "timing": timing}, json)


def _write(
    pipeline: Pipeline, films: Sequence[FilmRequest], requests: Sequence[ClipRequest], advance: Advance
) -> Sequence[GeneratedClip | GeneratedFilm]:
    from poet.generation.film import write_films

    if films:
        return write_films(pipeline, films, lambda done, total: advance(done, total, ""))
    return pipeline.generate(requests, lambda done, total: advance(done, total, ""))


def _stream(
    pipeline: Pipeline, films: Sequence[FilmRequest], requests: Sequence[ClipRequest]
) -> tuple[Generator[Piece, None, None], int]:
    """The pieces of the one that is asked for, and about how many frames they have."""
    from poet.generation.streaming import stream_clip, stream_film

    count = pipeline.geometry.num_frames
    if films:
        return stream_film(pipeline, films[0]), 1 + (count - 1) * len(films[0].scenes)
    return stream_clip(pipeline, requests[0]), count


def _targets(output: Path | None, num_samples: int, task: Task) -> list[Path]:
    """One file a sample: clip.mp4, or clip-1.mp4, clip-2.mp4 ...; what cannot be written is refused at once.

    A file must hold something of what the task writes; what is given does not count.
    """
    from poet.media import check_target

    if task.writes_text and output is not None:
        raise ConfigError(f"task {task.name} writes a text, which is printed: leave -o {output} out.")
    path = Path(f"clip{SUFFIXES.get(task.outputs, '.mp4')}") if output is None else output
    targets = [path]
    if num_samples > 1:
        targets = [path.with_name(f"{path.stem}-{number}{path.suffix}") for number in range(1, num_samples + 1)]
    if not task.writes_text:
        for target in targets:
            if target != output and target.exists():
                raise ConfigError(f"{target} is there already and would be written over. Name the file with -o.")
            check_target(target, has_video=task.writes_video, has_audio=task.writes_audio)
    return targets


def parallel_decoding(
    decoding: str | None,
    bundle: Bundle,
    *,
    steps: int | None,
    schedule: str | None,
    order: str | None,
    choice_temperature: float | None,
    guidance_start: float | None,
    guidance_stop: float | None,
) -> ParallelDecoding | None:
    """What the options of parallel decoding ask for, and the bundle where they are silent; None for autoregressive.

    Raises:
        ConfigError: an unknown decoding, a value that cannot be used, or an option of the other decoding.
    """
    options = {
        "num_steps": steps,
        "schedule": schedule,
        "order": order,
        "choice_temperature": choice_temperature,
        "guidance_start": guidance_start,
        "guidance_stop": guidance_stop,
    }
    said = {name: value for name, value in options.items() if value is not None}
    if (decoding or DECODINGS[0]) not in DECODINGS:
        raise ConfigError(f"--decoding must be one of {', '.join(DECODINGS)}, got {decoding!r}.")
    if decoding != "parallel":
        if said:
            raise ConfigError(
                f"--{next(iter(said)).removeprefix('num_').replace('_', '-')} is an option of parallel decoding: add "
                "--decoding parallel, or leave it out."
            )
        return None
    from poet.generation.canvas import choose_decoding

    return choose_decoding(bundle.generation_config.parallel, said)


def upsampling(upsample: bool | None, *, steps: int | None, temperature: float | None) -> Upsampling | None:
    """What the options of upsampling ask for; None for a picture as it was written.

    Raises:
        ConfigError: a value that cannot be used, or an option of upsampling without it.
    """
    said = {
        name: value for name, value in {"num_steps": steps, "temperature": temperature}.items() if value is not None
    }
    if not upsample:
        if said:
            raise ConfigError("--upsample-steps and --upsample-temperature are options of upsampling: add --upsample.")
        return None
    from poet.generation.upsample import Upsampling

    return Upsampling(**said)  # type: ignore[arg-type]


def _new_seed() -> int:
    import secrets

    return secrets.randbelow(2**31)
