"""`poet batch`. Parses, calls, prints."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from poet.cli.output import note, progress, show_result
from poet.errors import ConfigError, MediaError

if TYPE_CHECKING:
    from poet.generation.pipeline import Pipeline

__all__ = ["batch"]


def batch(
    jobs: Annotated[Path, typer.Argument(help="Requests, a line each, in the form of OpenAI's batches.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Directory of the results.")] = Path("batch"),
    model: Annotated[Path | None, typer.Option(help="A bundle; the shipped one when left out.")] = None,
    lora: Annotated[
        list[str] | None, typer.Option(metavar="NAME=DIR", help="An adapter that lines may name as their model.")
    ] = None,
    engine: Annotated[str, typer.Option(help="vllm, or torch (the reference).")] = "vllm",
    batch_size: Annotated[int, typer.Option(min=1, help="Clips that are written at once, by each engine.")] = 16,
    ray: Annotated[
        str | None, typer.Option(metavar="ADDRESS", help="Write on a Ray cluster: auto, local or HOST:PORT.")
    ] = None,
    ray_cpus: Annotated[
        int | None, typer.Option(min=1, help="Cores that an engine takes; those of the smallest machine when left out.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the result as one JSON object.")] = False,
) -> None:
    """Write a clip for every line of a file; what is answered already is not done again."""
    from poet.bundle import Bundle, default_bundle
    from poet.cli.adapters import read_named
    from poet.generation.engine import load_engine
    from poet.generation.pipeline import Pipeline
    from poet.training.processes import alone_in

    try:
        from poet_serving.batch import run_batch
        from poet_serving.ray_batch import run_ray_batch
    except ModuleNotFoundError as error:
        raise ConfigError(f"poet batch needs the package {error.name!r}. Install openpoet[serve].") from error
    if ray_cpus is not None and ray is None:
        raise ConfigError("--ray-cpus is for --ray. Leave it out, or name a cluster.")
    bundle = Bundle.open(default_bundle() if model is None else model)
    adapters = read_named(lora or (), bundle)
    sizes = {"max_num_seqs": batch_size} if engine == "vllm" else {"max_batch_size": batch_size}

    @contextlib.contextmanager
    def start(decodings: Sequence[str]) -> Iterator[Pipeline]:
        note(f"starting {engine} on {bundle.path}")
        writer = load_engine(engine, bundle.path, decodings=decodings, adapters=adapters, **sizes)
        try:
            yield Pipeline(bundle, writer, adapters=adapters)
        finally:
            writer.close()

    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise MediaError(f"{output} cannot hold results: {error.strerror}. Name another directory with -o.") from error
    begun = time.monotonic()
    with alone_in(output), progress("writing clips") as advance:

        def tell(done: int, count: int, now: int) -> None:
            advance(done, count, f"{now / max(1e-9, time.monotonic() - begun):.2f} a second")

        if ray is None:
            summary = run_batch(jobs, bundle, output, start, tell, adapters)
        else:
            note(f"connecting to Ray ({ray})")
            summary = run_ray_batch(
                jobs,
                bundle,
                output,
                address=ray,
                engine=engine,
                batch_size=batch_size,
                num_cpus=ray_cpus,
                adapters=adapters,
                progress=tell,
            )
    answered = summary.completed + summary.failed - summary.before
    facts = {
        "results": str(output / "results.jsonl"),
        "completed": summary.completed,
        "failed": summary.failed,
        "answered_before": summary.before,
        "seconds": summary.seconds,
        "lines_per_second": round(answered / max(1e-9, summary.seconds), 3),
    }
    show_result(facts, json)
