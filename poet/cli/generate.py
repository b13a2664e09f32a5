"""`poet generate`: a prompt, an image or a clip to a file. Parses and reads; the pipeline does the work."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from poet.cli.adapters import read_one
from poet.cli.output import keep_what_is_read, note, progress, show_result
from poet.errors import ConfigError, MediaError

if TYPE_CHECKING:
    from poet.bundle import Bundle
    from poet.generation.canvas import ParallelDecoding
    from poet.generation.upsample import Upsampling
    from poet.tasks import Task

__all__ = ["generate", "parallel_decoding", "upsampling"]

DEFAULT_ENGINE = "vllm"
GIVEN = ("image", "video", "audio")
SAMPLING = ("temperature", "top_k", "top_p", "guidance_scale")
REPETITION = ("repetition_penalty", "repetition_window")
PARALLEL = ("steps", "schedule", "order", "choice_temperature", "guidance_start", "guidance_stop")
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
    steps: Annotated[int | None, typer.Option(help="Of parallel decoding: forward passes in all.")] = None,
    schedule: Annotated[str | None, typer.Option(help="Of parallel decoding: cosine, linear or square.")] = None,
    order: Annotated[
        str | None, typer.Option(help="Of parallel decoding: whole, parts (picture, then sound), or frames.")
    ] = None,
    choice_temperature: Annotated[
        float | None, typer.Option(help="Of parallel decoding: noise on which places are kept; 0 keeps the surest.")
    ] = None,
    guidance_start: Annotated[
        float | None, typer.Option(help="Of parallel decoding: share of the steps after which guidance sets in.")
    ] = None,
    guidance_stop: Annotated[
        float | None, typer.Option(help="Of parallel decoding: share of the steps after which guidance ends.")
    ] = None,
    upsample: Annotated[bool | None, typer.Option(help="Write the picture in twice the size.")] = None,
    upsample_steps: Annotated[int | None, typer.Option(help="Of upsampling: forward passes.")] = None,
    upsample_temperature: Annotated[float | None, typer.Option(help="Of upsampling: 0 takes the likeliest.")] = None,
    lora: Annotated[Path | None, typer.Option(help="Directory of a LoRA adapter of the bundle's model.")] = None,
    engine: Annotated[str | None, typer.Option(help="vllm (the default), or torch (the reference).")] = None,
    num_samples: Annotated[int, typer.Option(min=1, help="Clips to write, with seeds counted up.")] = 1,
    like: Annotated[
        Path | None,
        typer.Option(help="Make this clip again, from its metadata; what it was made from must be there too."),
    ] = None,
    metadata: Annotated[bool, typer.Option(help="Write into the file what made it.")] = True,
    json: Annotated[bool, typer.Option("--json", help="Print the result as one JSON object.")] = False,
) -> None:
    """Write a clip from a text, an image, a clip, a sound, or nothing."""
    started = time.monotonic()
    from poet.bundle import Bundle, default_bundle
    from poet.generation.given import GivenFiles
    from poet.media import write_clip
    from poet.tasks import get_task

    bundle = Bundle.open(default_bundle() if model is None else model)
    settings = _Settings(
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
    )
    expected_ids = None
    if like is not None:
        settings, expected_ids = _settings_like(like, settings, bundle)
    defaults = bundle.generation_config
    adapters = read_one(settings.lora, bundle)
    files = GivenFiles(image=settings.image, video=settings.video, audio=settings.audio)
    has_text = settings.prompt is not None
    chosen = settings.task or files.guess_task(has_text=has_text, default=defaults.task)
    row = get_task(chosen)
    bundle.check_trained(chosen)
    targets = _targets(output, num_samples, row)
    if not row.writes_text:
        keep_what_is_read(targets, (settings.image, settings.video, settings.audio, like))
    given = files.read(bundle, row, has_text=has_text)
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
    requests = [
        ClipRequest(
            task=chosen,
            text=settings.prompt,
            clip=given,
            negative_text=settings.negative_prompt,
            sampling=SamplingConfig(**sampling, seed=first_seed + number),
            decoding=parallel,
            upsampling=larger,
            adapter=adapters[0].name if adapters else None,
        )
        for number in range(num_samples)
    ]
    name = settings.engine or DEFAULT_ENGINE
    _ = bundle.weights_sha256  # of the files that the engine is about to read
    note(f"starting {name} on {bundle.path}")
    writer = load_engine(
        name,
        bundle.path,
        decodings=decodings_for(parallel=parallel is not None, upsampling=larger is not None),
        adapters=adapters,
    )
    try:
        pipeline = Pipeline(bundle, writer, adapters=adapters)
        loaded = time.monotonic()
        with progress("writing ids") as advance:
            clips = pipeline.generate(requests, lambda done, total: advance(done, total, ""))
    finally:
        writer.close()
    written = time.monotonic()
    results: list[dict[str, Any]] = []
    for clip, target in zip(clips, targets, strict=True):
        facts = clip.metadata | sources
        if clip.clip is None:
            results.append({"text": clip.text, **facts})
            continue
        write_clip(clip.clip, target, metadata=facts if metadata else None)
        results.append({"file": str(target), "duration": round(clip.clip.duration, 3), **facts})
    timing = {"start": round(loaded - started, 2), "writing": round(written - loaded, 2)}
    result: dict[str, Any] = {**results[0]} if num_samples == 1 else {"clips": results}
    if expected_ids is not None:
        result["same_ids"] = clips[0].metadata["ids_sha256"] == expected_ids
        if not result["same_ids"]:
            note(f"the ids are not those of {like}: the weights, the machine or its packages are not the same")
    show_result({**result, "timing": timing}, json)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Settings:
    prompt: str | None
    negative_prompt: str | None
    task: str | None
    image: Path | None
    video: Path | None
    audio: Path | None
    seed: int | None
    temperature: float | None
    top_k: int | None
    top_p: float | None
    guidance_scale: float | None
    repetition_penalty: float | None
    repetition_window: int | None
    decoding: str | None
    steps: int | None
    schedule: str | None
    order: str | None
    choice_temperature: float | None
    guidance_start: float | None
    guidance_stop: float | None
    upsample: bool | None
    upsample_steps: int | None
    upsample_temperature: float | None
    lora: Path | None
    engine: str | None

    def sources(self) -> dict[str, str]:
        """The files that were given, as they are known again anywhere: by name and content, not by path."""
        from poet.media import hash_file

        files = {kind: getattr(self, kind) for kind in GIVEN if getattr(self, kind) is not None}
        names = {f"given_{kind}": path.name for kind, path in files.items()}
        return names | {f"given_{kind}_sha256": hash_file(path) for kind, path in files.items()}


def _settings_like(path: Path, asked: _Settings, bundle: Bundle) -> tuple[_Settings, str | None]:
    """The settings that a clip's metadata holds; whatever the command line says goes before them.

    Files that the clip was made from must be those files. An image may take the place of a video and the other way.
    Also the hash that the ids must have again, or None where the command line changes something.
    """
    from poet.media import probe

    facts = probe(path).metadata
    if "task" not in facts or "seed" not in facts:
        raise ConfigError(f"{path} does not say what made it: Poet wrote no metadata into it, or it was removed since.")
    if asked.upsample is not False:
        _check_upsampler(path, facts, bundle)
    _check_bundle(path, facts, bundle)
    said = {name: value for name, value in vars(asked).items() if value is not None}
    # Either one takes the place of what the clip went on from.
    replaced = {"image", "video"} - said.keys() if "image" in said or "video" in said else set()
    try:
        made = _Settings(
            prompt=facts.get("prompt"),
            negative_prompt=facts.get("negative_prompt"),
            task=facts["task"],
            image=None,
            video=None,
            audio=None,
            seed=int(facts["seed"]),
            temperature=float(facts["temperature"]),
            top_k=int(facts["top_k"]),
            top_p=float(facts["top_p"]),
            guidance_scale=float(facts.get("guidance_scale", 1)),  # not said before there was guidance
            repetition_penalty=None if "repetition_penalty" not in facts else float(facts["repetition_penalty"]),
            repetition_window=None if "repetition_window" not in facts else int(facts["repetition_window"]),
            decoding=facts.get("decoding"),  # said of parallel decoding alone
            steps=None if "steps" not in facts else int(facts["steps"]),
            schedule=facts.get("schedule"),
            order=facts.get("order"),
            choice_temperature=None if "choice_temperature" not in facts else float(facts["choice_temperature"]),
            guidance_start=float(facts.get("guidance_start", 0)) if "decoding" in facts else None,
            guidance_stop=float(facts.get("guidance_stop", 1)) if "decoding" in facts else None,
            upsample=True if "upsample_steps" in facts else None,
            upsample_steps=None if "upsample_steps" not in facts else int(facts["upsample_steps"]),
            upsample_temperature=None if "upsample_steps" not in facts else float(facts["upsample_temperature"]),
            lora=_adapter_of(path, facts, asked.lora, bundle),
            engine=facts["engine"],
        )
        given = {
            kind: (facts[f"given_{kind}"], facts[f"given_{kind}_sha256"])
            for kind in GIVEN
            if f"given_{kind}" in facts and kind not in replaced
        }
    except (KeyError, ValueError) as error:
        raise ConfigError(
            f"{path} does not say all that made it ({error}): its metadata was changed since, or is of an older Poet."
        ) from error
    found: dict[str, Any] = {kind: _find_given(path, kind, *known, said.get(kind)) for kind, known in given.items()}
    made = dataclasses.replace(made, **found)
    if said.get("upsample") is False:
        made = dataclasses.replace(made, upsample_steps=None, upsample_temperature=None)
    if said.get("decoding", made.decoding) != "parallel":
        made = dataclasses.replace(made, **dict.fromkeys(PARALLEL))
    settings = dataclasses.replace(made, **said)
    if settings.guidance_scale == 1 and "negative_prompt" not in said:
        settings = dataclasses.replace(settings, negative_prompt=None)
    return settings, facts.get("ids_sha256") if settings == made else None


def _find_given(clip: Path, kind: str, name: str, expected: str, named: Path | None) -> Path:
    """The file that a clip was made from: the one that is named now, or one of its old name beside the clip or here."""
    from poet.media import hash_file

    if named is not None:
        if (sha256 := hash_file(named)) != expected:
            raise ConfigError(
                f"--{kind} must be the file that {clip} was made from, {name!r} with the sha256 {expected[:12]!r}; "
                f"{named} has {sha256[:12]!r}. Name that file, or leave --like out."
            )
        return named
    others = []
    # A name that leads elsewhere was not written by Poet.
    for place in dict.fromkeys((clip.parent / name, Path(name))) if Path(name).name == name else ():
        try:
            if hash_file(place) == expected:
                return place
        except MediaError:
            continue
        others.append(f"{place} has another content")
    raise ConfigError(
        f"{clip} was made from the {kind} {name!r} with the sha256 {expected[:12]!r}, which is neither beside it nor "
        f"in the working directory{''.join(f'; {other}' for other in others)}. Give it with --{kind}."
    )


def _adapter_of(path: Path, facts: Mapping[str, str], named: Path | None, bundle: Bundle) -> Path | None:
    """The adapter that a clip was made with, which must be named: a clip does not say where it lies."""
    wanted = facts.get("adapter_sha256")
    if wanted is None:
        return None
    found = "none" if named is None else read_one(named, bundle)[0].sha256
    if found != wanted:
        raise ConfigError(
            f"{path} was made with the adapter {facts.get('adapter')!r}, {wanted[:12]} (sha256), got {found[:12]}. "
            "Name it with --lora."
        )
    return named


def _check_bundle(path: Path, facts: Mapping[str, str], bundle: Bundle) -> None:
    """Refuse a bundle of another vocabulary or with other weights: neither can write the clip again."""
    made_with = f"{path} was made with the bundle {facts.get('bundle', 'unknown')!r}"
    if facts.get("fingerprint") != bundle.fingerprint:
        raise ConfigError(
            f"{made_with} of the fingerprint {facts.get('fingerprint', '')[:12]!r}, {bundle.path} has the fingerprint "
            f"{bundle.fingerprint[:12]!r}. Name that bundle with --model."
        )
    if facts.get("weights_sha256", bundle.weights_sha256) != bundle.weights_sha256:
        raise ConfigError(
            f"{made_with} of the weights {facts['weights_sha256'][:12]!r}, {bundle.path} has the weights "
            f"{bundle.weights_sha256[:12]!r} (sha256) on the same tokenizers. Name that bundle with --model."
        )


def _check_upsampler(path: Path, facts: Mapping[str, str], bundle: Bundle) -> None:
    """Refuse another upsampler, or settings of one that the command line does not have."""
    if facts.get("upsampler_sha256", bundle.upsampler_sha256) != bundle.upsampler_sha256:
        raise ConfigError(
            f"{path} was made with the upsampler {facts['upsampler_sha256'][:12]!r}, {bundle.path} has "
            f"{bundle.upsampler_sha256[:12] or 'none'!r} (sha256). Name that bundle with --model, or say --no-upsample."
        )
    known = {"upsampler_sha256", "upsample_steps", "upsample_temperature"}
    if others := sorted(name for name in facts if name.startswith("upsample") and name not in known):
        raise ConfigError(
            f"{path} was upsampled with {', '.join(others)}, for which there are no options. Make it again from "
            "Python, or say --no-upsample."
        )


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
