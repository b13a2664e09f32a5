"""`poet evaluate`: how well a bundle does what it was told, measured."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from poet.cli.adapters import read_one
from poet.cli.generate import parallel_decoding, upsampling
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
from poet.cli.output import progress, show_lines, show_result
from poet.errors import ConfigError

if TYPE_CHECKING:
    from poet.evaluation.measure import Measured

__all__ = ["evaluate"]

DEFAULT_TASK = "text_to_video_audio"

KINDS = ("generation", "films", "reconstruction", "upsampling")


def evaluate(
    model: Annotated[Path | None, typer.Argument(help="A bundle; the shipped one when left out.")] = None,
    output: Annotated[Path, typer.Option("-o", "--output", help="Directory of the report.")] = Path("evaluation"),
    what: Annotated[
        str, typer.Option(help="generation, films, reconstruction (the tokenizers alone) or upsampling.")
    ] = "generation",
    split: Annotated[list[str], typer.Option(help="A split of clips; repeatable.")] = ["seen", "unseen"],  # noqa: B006
    count: Annotated[
        int | None, typer.Option(min=1, help="Clips, or films, a split: 200 when left out; of --clips, all.")
    ] = None,
    start: Annotated[int, typer.Option(min=0, help="Number of the first clip of each split.")] = 0,
    clips: Annotated[
        str | None, typer.Option(help="Of reconstruction: your own clips, a folder or manifest, in place of splits.")
    ] = None,
    against: Annotated[
        Path | None, typer.Option(help="Of reconstruction with --clips: another bundle, shown and measured beside.")
    ] = None,
    height: Annotated[int | None, typer.Option(help="Of --clips, in pixels; the bundle's own when left out.")] = None,
    width: Annotated[int | None, typer.Option(help="Of --clips, in pixels; the bundle's own when left out.")] = None,
    num_scenes: Annotated[int | None, typer.Option(min=1, help="Of films: scenes of each, 8 when left out.")] = None,
    task: Annotated[str, typer.Option(help="The task to evaluate.")] = DEFAULT_TASK,
    seed: Annotated[int, typer.Option(help="Of the first clip; counted up.")] = 0,
    temperature: Annotated[float | None, typer.Option(help="The bundle's own when left out.")] = None,
    top_k: Annotated[int | None, typer.Option(help="The bundle's own when left out.")] = None,
    top_p: Annotated[float | None, typer.Option(help="The bundle's own when left out.")] = None,
    guidance_scale: Annotated[float | None, typer.Option(help="The bundle's own when left out; 1 is off.")] = None,
    decoding: Annotated[str, typer.Option(help="autoregressive, or parallel: many ids at once.")] = "autoregressive",
    steps: Steps = None,
    schedule: Schedule = None,
    order: Order = None,
    choice_temperature: ChoiceTemperature = None,
    guidance_start: GuidanceStart = None,
    guidance_stop: GuidanceStop = None,
    upsample: Annotated[bool, typer.Option(help="Judge pictures of twice the size.")] = False,
    upsample_steps: UpsampleSteps = None,
    upsample_temperature: UpsampleTemperature = None,
    lora: Lora = None,
    engine: Annotated[str, typer.Option(help="vllm, or torch (the reference).")] = "vllm",
    json: Json = False,
) -> None:
    """Generate clips for captions of drawn clips and judge them; or send drawn clips through a part of the bundle."""
    if what not in KINDS:
        raise ConfigError(f"--what must be {', '.join(KINDS[:-1])} or {KINDS[-1]}, got {what!r}.")
    if num_scenes is not None and what != "films":
        raise ConfigError("--num-scenes is an option of --what films: leave it out.")
    if clips is not None and what != "reconstruction":
        raise ConfigError("--clips is an option of --what reconstruction: nobody knows what such clips should show.")
    if clips is None and (against, height, width) != (None, None, None):
        raise ConfigError("--against, --height and --width go with --clips: name your clips, or leave them out.")
    from poet.bundle import Bundle, default_bundle
    from poet.evaluation import films, footage, measure

    bundle = Bundle.open(default_bundle() if model is None else model, require_model=what != "reconstruction")
    drawn = 200 if count is None else count
    if clips is not None:
        with progress("reconstructing clips") as advance:
            measured = footage.reconstruct_footage(
                bundle,
                clips,
                count,
                start,
                output,
                against=None if against is None else Bundle.open(against, require_model=False),
                height=height,
                width=width,
                progress=advance,
            )
    elif what == "reconstruction":
        with progress("reconstructing clips") as advance:
            measured = measure.reconstruction(bundle, split, drawn, start, output, progress=advance)
    elif what == "upsampling":
        settings = upsampling(True, steps=upsample_steps, temperature=upsample_temperature)
        assert settings is not None
        with progress("upsampling") as advance:
            measured = measure.upsampling(
                bundle, split, drawn, start, output, seed=seed, engine=engine, settings=settings, progress=advance
            )
    else:
        sampling = {
            "temperature": temperature,
            "top_k": top_k,
            "top_p": top_p,
            "guidance_scale": guidance_scale,
        }
        parallel = parallel_decoding(
            decoding,
            bundle,
            steps=steps,
            schedule=schedule,
            order=order,
            choice_temperature=choice_temperature,
            guidance_start=guidance_start,
            guidance_stop=guidance_stop,
        )
        larger = upsampling(upsample, steps=upsample_steps, temperature=upsample_temperature)
        adapters = read_one(lora, bundle)
        adapter = adapters[0] if adapters else None
        if what == "films":
            if larger is not None or task != DEFAULT_TASK:
                raise ConfigError("--what films takes neither --upsample nor --task: leave them out.")
            with progress("evaluating films") as advance:
                measured = films.evaluate_films(
                    bundle,
                    split,
                    drawn,
                    start,
                    output,
                    num_scenes=num_scenes or 8,
                    seed=seed,
                    engine=engine,
                    sampling=sampling,
                    decoding=parallel,
                    adapter=adapter,
                    progress=advance,
                )
        else:
            with progress("evaluating") as advance:
                measured = measure.generation(
                    bundle,
                    split,
                    drawn,
                    start,
                    output,
                    task=task,
                    seed=seed,
                    engine=engine,
                    sampling=sampling,
                    decoding=parallel,
                    upsampling=larger,
                    adapter=adapter,
                    progress=advance,
                )
    _show(measured, json)


def _show(measured: Measured, json: bool) -> None:
    if json:
        show_result(measured.facts, json)
    else:
        show_lines(measured.tables)
        show_result({"report": measured.facts["report"]}, json)
