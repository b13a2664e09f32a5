"""`poet batch`. Parses, calls, prints."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from poet.cli.output import note, progress, show_result

__all__ = ["batch"]


def batch(
    jobs: Annotated[Path, typer.Argument(help="Requests, a line each, in the form of OpenAI's batches.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Directory of results.jsonl and media.")] = Path(
        "batch"
    ),
    model: Annotated[Path | None, typer.Option(help="A bundle; the shipped one when left out.")] = None,
    engine: Annotated[str, typer.Option(help="vllm, or torch (the reference).")] = "vllm",
    batch_size: Annotated[int, typer.Option(min=1, help="Clips that are written at once.")] = 16,
    json: Annotated[bool, typer.Option("--json", help="Print the result as one JSON object.")] = False,
) -> None:
    """Write a clip for every line of a file; what is answered already is not done again."""
    from poet.bundle import Bundle, default_bundle
    from poet.generation.engine import load_engine
    from poet.generation.pipeline import Pipeline
    from poet.training.processes import alone_in
    from poet_serving.batch import read_lines, run_batch, scan

    bundle = Bundle.open(default_bundle() if model is None else model)
    found = scan(jobs, bundle)
    sizes = {"max_num_seqs": batch_size} if engine == "vllm" else {"max_batch_size": batch_size}
    note(f"{found.num_lines} lines; starting {engine} on {bundle.path}")
    _ = bundle.weights_sha256  # of the files that the engine is about to read
    output.mkdir(parents=True, exist_ok=True)
    with alone_in(output):
        writer = load_engine(engine, bundle.path, decodings=found.decodings, **sizes)
        try:
            pipeline = Pipeline(bundle, writer)
            begun = time.monotonic()
            with progress("writing clips") as advance:
                summary = run_batch(
                    read_lines(jobs),
                    pipeline,
                    output,
                    base=jobs.parent,
                    progress=lambda done, now: advance(
                        done, found.num_lines, f"{now / max(1e-9, time.monotonic() - begun):.2f} a second"
                    ),
                )
        finally:
            writer.close()
    answered = summary.completed + summary.failed - summary.before
    facts = {
        "results": str(output / "results.jsonl"),
        "completed": summary.completed,
        "failed": summary.failed,
        "answered_before": summary.before,
        "seconds": summary.seconds,
        "clips_per_second": round(answered / max(1e-9, summary.seconds), 3),
    }
    show_result(facts, json)
