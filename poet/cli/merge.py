"""`poet merge`: a bundle with an adapter's change in its weights."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from poet.cli.options import Json
from poet.cli.output import show_result

__all__ = ["merge"]


def merge(
    adapter: Annotated[Path, typer.Argument(help="Directory of a LoRA adapter in PEFT's files, of any kind.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Directory of the new bundle; must not exist.")],
    model: Annotated[
        Path | None, typer.Option(help="The bundle it was trained on; the shipped one if left out.")
    ] = None,
    json: Json = False,
) -> None:
    """Write a bundle whose weights are another's with an adapter merged into them."""
    from poet.bundle import Bundle, default_bundle

    bundle = Bundle.open(default_bundle() if model is None else model)
    from poet.training.lora import write_merged  # PEFT takes seconds to import

    merged = write_merged(bundle, adapter, output)
    show_result(
        {
            "bundle": str(output),
            "adapter": str(adapter),
            "of": str(bundle.path),
            "weights_sha256": merged.weights_sha256,
        },
        json,
    )
