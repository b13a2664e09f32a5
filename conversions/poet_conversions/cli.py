"""`poet convert`: between bundles and Megatron checkpoints. Parses, calls, prints."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from poet.cli.output import note, show_result

__all__ = ["convert"]


def convert(
    source: Annotated[
        Path, typer.Argument(help="A bundle, a Megatron checkpoint, or a training run of several processes.")
    ],
    target: Annotated[Path, typer.Argument(help="What to write: a checkpoint from a bundle, else a bundle.")],
    bundle: Annotated[
        Path | None, typer.Option(help="Where a new bundle's tokenizers come from; the run's own when left out.")
    ] = None,
    weights: Annotated[str, typer.Option(help="Of a training run: averaged, or latest.")] = "averaged",
    verify: Annotated[bool, typer.Option(help="Compute logits with both afterwards and compare them.")] = True,
    json: Annotated[bool, typer.Option("--json", help="Print the result as one JSON object.")] = False,
) -> None:
    """Convert a bundle to a Megatron checkpoint, or the other way, whatever cut it was trained in."""
    from poet.errors import CheckpointError, ConfigError
    from poet_conversions.convert import compare, find_checkpoint
    from poet_conversions.convert import convert as convert_files

    if weights not in ("averaged", "latest"):
        raise ConfigError(f"--weights must be averaged or latest, got {weights!r}.")
    which: Literal["averaged", "latest"] = "averaged" if weights == "averaged" else "latest"
    checkpoint = find_checkpoint(source)  # once: a run may write another one meanwhile
    kind = convert_files(source, target, bundle=bundle, which=which)
    facts: dict[str, object] = {"written": str(target), "kind": kind}
    if verify:
        note("comparing logits")
        agreement = compare(checkpoint or source, target, which=which)
        facts |= {
            "largest_logit_difference": agreement.largest_difference,
            "largest_logit": agreement.largest_logit,
            "greedy_agreement": agreement.greedy,
        }
        # A bundle in bfloat16 holds fewer digits than a training run; float32 sums differ in their last.
        close = agreement.largest_difference <= 0.05 * agreement.largest_logit  # False where either is no number
        if not (close and agreement.greedy >= 0.9):
            raise CheckpointError(
                f"{target} was written but does not compute what {source} does: logits differ by up to "
                f"{agreement.largest_difference:.3g} of {agreement.largest_logit:.3g}, the likeliest id is the same at "
                f"{agreement.greedy:.0%} of places. Delete it; if {source} is sound, this is a defect of Poet."
            )
    show_result(facts, json)
