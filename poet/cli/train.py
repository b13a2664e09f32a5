"""`poet train`: a recipe to a finished tokenizer or bundle."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from poet.cli.options import Json
from poet.cli.output import note, progress, show_result

__all__ = ["train"]


def train(
    recipe: Annotated[Path, typer.Argument(help="A YAML file; recipes/ holds ours.")],
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="key=value in place of the recipe's; repeatable.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="The run's directory; runs/NAME when left out.")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    nproc: Annotated[
        int | None,
        typer.Option(
            min=1, help="Train with Megatron-Core in so many processes on this machine; see recipes/pretraining."
        ),
    ] = None,
    plan: Annotated[
        bool, typer.Option("--plan", help="Only say what a language model's run needs: memory by part, GPU-hours.")
    ] = False,
    gpu: Annotated[str, typer.Option(help="For --plan: h100 or h200.")] = "h100",
    gpus: Annotated[
        int | None, typer.Option(min=1, help="For --plan: how many; one copy of the model if left out.")
    ] = None,
    row_length: Annotated[
        int | None, typer.Option(min=1, help="For --plan: ids of a row; the recipe's longest scene when left out.")
    ] = None,
    ids: Annotated[
        float | None, typer.Option(min=1, help="For --plan: ids of the run; the recipe's own when left out.")
    ] = None,
    mfu: Annotated[
        float, typer.Option(min=0.01, max=1.0, help="For --plan: share of the GPU's peak to count on.")
    ] = 0.4,
    json: Json = False,
) -> None:
    """Train a tokenizer or a language model. The same command goes on where an earlier one was stopped."""
    if plan:
        from poet.training.recipes import plan as make_plan

        show_result(make_plan(recipe, set_ or [], gpu=gpu, gpus=gpus, row_length=row_length, ids=ids, mfu=mfu), json)
        return
    if nproc is not None and "WORLD_SIZE" not in os.environ:
        from poet.training.recipes import check_parallel

        check_parallel(recipe, set_ or [], device=device, processes=nproc)
        own = [str(recipe), "--device", device, *(["--json"] if json else [])]
        own += [] if output is None else ["-o", str(output)]
        _in_processes(nproc, [*own, *(part for value in set_ or [] for part in ("--set", value))])
    from poet.training.recipes import train as train_recipe

    directory = Path("runs") / recipe.stem if output is None else output
    with progress("training") as advance:

        def report(step: int, steps: int, metrics: Mapping[str, float]) -> None:
            advance(step, steps, ", ".join(f"{name} {metrics[name]:.4g}" for name in _shown(metrics)))

        result = train_recipe(recipe, set_ or [], directory, device=device, progress=report, say=note)
    if os.environ.get("RANK", "0") != "0":
        return
    if not result.finished:
        note(f"stopped at step {result.step}; the same command goes on from there")
    facts: dict[str, Any] = {
        "directory": str(directory),
        "step": result.step,
        "finished": result.finished,
        "seconds": round(result.seconds, 1),
        "metrics": {name: round(value, 5) for name, value in result.metrics.items()},
    }
    if result.finished:
        facts["export"] = str(directory / "export")
    show_result(facts, json)


def _in_processes(nproc: int, arguments: Sequence[str]) -> NoReturn:
    """Start this command again in every process, and end as they end."""
    from poet.training.launch import launch

    status = launch("poet.cli.main", ["train", *arguments], nproc)
    if status:
        note("stopped by a signal; the same command goes on from the last checkpoint")
    raise typer.Exit(status)


def _shown(metrics: Mapping[str, float]) -> list[str]:
    return [name for name in metrics if name in ("loss", "psnr", "mel_loss", "validation_loss", "validation_psnr")]
