"""Options that several commands have, with one wording each."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

__all__ = [
    "ChoiceTemperature",
    "GuidanceStart",
    "GuidanceStop",
    "Json",
    "Lora",
    "Order",
    "Schedule",
    "Steps",
    "UpsampleSteps",
    "UpsampleTemperature",
]

Steps = Annotated[int | None, typer.Option(help="Of parallel decoding: forward passes in all.")]
Schedule = Annotated[str | None, typer.Option(help="Of parallel decoding: cosine, linear or square.")]
Order = Annotated[str | None, typer.Option(help="Of parallel decoding: whole, parts (picture, then sound), or frames.")]
ChoiceTemperature = Annotated[
    float | None, typer.Option(help="Of parallel decoding: noise on which places are kept; 0 keeps the surest.")
]
GuidanceStart = Annotated[
    float | None, typer.Option(help="Of parallel decoding: share of the steps after which guidance sets in.")
]
GuidanceStop = Annotated[
    float | None, typer.Option(help="Of parallel decoding: share of the steps after which guidance ends.")
]
UpsampleSteps = Annotated[int | None, typer.Option(help="Of upsampling: forward passes.")]
UpsampleTemperature = Annotated[float | None, typer.Option(help="Of upsampling: 0 takes the likeliest.")]
Lora = Annotated[Path | None, typer.Option(help="Directory of a LoRA adapter of the bundle's model.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as one JSON object.")]
