"""`poet convert`: between bundles and Megatron checkpoints, and from language models. Parses, calls, prints."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from poet.cli.output import note, show_result

__all__ = ["convert"]


def convert(
    source: Annotated[
        Path,
        typer.Argument(
            help="A bundle, a Megatron checkpoint, or a training run of several processes; with --from, another model."
        ),
    ],
    target: Annotated[Path, typer.Argument(help="What to write: a checkpoint from a bundle, else a bundle.")],
    bundle: Annotated[
        Path | None,
        typer.Option(
            help="Where a new bundle's tokenizers come from; when left out the run's own, with --from the shipped ones."
        ),
    ] = None,
    from_kind: Annotated[
        str | None,
        typer.Option("--from", help="qwen3: start a bundle from a dense Qwen3 checkpoint in Hugging Face's files."),
    ] = None,
    scene_length: Annotated[
        int | None,
        typer.Option(help="With --from: ids of the longest scene; when left out, as in --bundle's model.", min=1),
    ] = None,
    weights: Annotated[str, typer.Option(help="Of a training run: averaged, or latest.")] = "averaged",
    verify: Annotated[bool, typer.Option(help="Compute logits with both afterwards and compare them.")] = True,
    json: Annotated[bool, typer.Option("--json", help="Print the result as one JSON object.")] = False,
) -> None:
    """Convert a bundle to a Megatron checkpoint, or the other way, whatever cut; or start one from a language model."""
    from poet.errors import CheckpointError, ConfigError

    if from_kind is not None:
        if weights != "averaged":
            raise ConfigError("--weights is for training runs; a language model has one set. Leave it out.")
        _start(source, target, bundle, from_kind, scene_length, verify=verify, json=json)
        return
    if scene_length is not None:
        raise ConfigError("--scene-length goes with --from; a checkpoint and a bundle have theirs.")
    from poet_conversions.convert import compare, find_checkpoint  # Megatron takes seconds to import
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


def _start(
    source: Path,
    target: Path,
    bundle: Path | None,
    kind: str,
    scene_length: int | None,
    *,
    verify: bool,
    json: bool,
) -> None:
    """Start a bundle from a language model, and compare what both say of text."""
    from poet.bundle import default_bundle
    from poet.errors import CheckpointError, ConfigError
    from poet_conversions.language_model import can_compare, compare_text, convert_language_model

    if kind != "qwen3":
        raise ConfigError(f"--from must be qwen3, got {kind!r}. Poet's transformer is Qwen3's; others do not fit.")
    made = convert_language_model(source, target, bundle=bundle or default_bundle(), scene_length=scene_length)
    low, high = made.vocabulary.text_range
    facts: dict[str, object] = {
        "written": str(target),
        "kind": "bundle",
        "parameters": made.model_config.num_parameters,
        "new_rows": made.vocabulary.padded_vocab_size - (high - low),
        "text_pieces": high - low,
    }
    if verify and not can_compare(made.model_config):
        note("logits were not compared: both models in float32 need more memory than there is")
    elif verify:
        note("comparing logits on text")
        agreement = compare_text(source, target)
        facts |= {
            "largest_logit_difference": agreement.largest_difference,
            "largest_logit": agreement.largest_logit,
            "greedy_agreement": agreement.greedy,
        }
        # Both compute in float32 from the same numbers; large models sum more of them.
        if not agreement.largest_difference <= 1e-3 * agreement.largest_logit:
            raise CheckpointError(
                f"{target} was written but does not compute what {source} does on text: logits differ by up to "
                f"{agreement.largest_difference:.3g} of {agreement.largest_logit:.3g}. Delete it; if {source} is "
                "sound, this is a defect of Poet."
            )
    show_result(facts, json)
