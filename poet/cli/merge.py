"""`poet merge`: a bundle with what was trained on it: adapters, tuned tokenizers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from poet.cli.options import Json
from poet.cli.output import show_result
from poet.errors import ConfigError

__all__ = ["merge"]


def merge(
    parts: Annotated[
        list[Path],
        typer.Argument(help="Directories of a LoRA adapter in PEFT's files, of any kind, or of a tuned tokenizer."),
    ],
    output: Annotated[Path, typer.Option("-o", "--output", help="Directory of the new bundle; must not exist.")],
    model: Annotated[
        Path | None, typer.Option(help="The bundle they were trained on; the shipped one if left out.")
    ] = None,
    json: Json = False,
) -> None:
    """Write a bundle that is another with an adapter, a tuned tokenizer, or both, merged into it."""
    from poet.bundle import Bundle, default_bundle

    bundle = Bundle.open(default_bundle() if model is None else model)
    from poet.training.lora import write_merged  # PEFT takes seconds to import
    from poet_tokenizers.loading import tokenizer_kind

    adapters = [part for part in parts if (part / "adapter_config.json").is_file()]
    tokenizers = {
        tokenizer_kind(part): part for part in parts if part not in adapters and (part / "config.json").is_file()
    }
    unknown = [str(part) for part in parts if part not in adapters and part not in tokenizers.values()]
    if unknown:
        raise ConfigError(
            f"{unknown[0]} must be a directory with an adapter (adapter_config.json) or a tokenizer (config.json), "
            "each of its kind once. Name what a training exported."
        )
    if len(adapters) > 1:
        raise ConfigError(f"one adapter can be merged at a time, got {len(adapters)}. Merge the next into the result.")
    merged = write_merged(bundle, adapters[0] if adapters else None, output, tokenizers)
    show_result(
        {
            "bundle": str(output),
            **({"adapter": str(adapters[0])} if adapters else {}),
            **{f"{kind} tokenizer": str(part) for kind, part in tokenizers.items()},
            "of": str(bundle.path),
            "weights_sha256": merged.weights_sha256,
        },
        json,
    )
