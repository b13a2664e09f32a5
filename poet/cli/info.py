"""`poet info`: what a bundle holds, or what made a clip."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from poet.cli.output import show_result

__all__ = ["info"]


def info(
    path: Annotated[
        Path | None, typer.Argument(help="A bundle or a media file; the shipped bundle when left out.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the result as one JSON object.")] = False,
) -> None:
    """Say what a bundle holds, or what is in a media file and what made it."""
    from poet.bundle import default_bundle

    target = default_bundle() if path is None else path
    show_result(_of_bundle(target) if target.is_dir() else _of_media(target), json)


def _of_bundle(path: Path) -> dict[str, Any]:
    from poet.bundle import Bundle

    bundle = Bundle.open(path, require_model=False)
    vocabulary, defaults = bundle.vocabulary, bundle.generation_config
    latent_shape = " x ".join(map(str, bundle.geometry().latent_shape))
    result: dict[str, Any] = {
        "bundle": str(path),
        "fingerprint": bundle.fingerprint,
        "ids": vocabulary.vocab_size,
        "clip": f"{defaults.num_frames} frames of {defaults.width} x {defaults.height} at {defaults.fps:g} frames/s, "
        f"sound at {vocabulary.sample_rate} Hz",
        "video_codes": f"{vocabulary.video_codebook_size} codes, {latent_shape} a clip",
        "audio_codes": f"{vocabulary.num_audio_codebooks} levels of {vocabulary.audio_codebook_size} codes, "
        f"{vocabulary.frame_rate:g} a second",
        "text_pieces": vocabulary.text_vocab_size,
        "megabytes": round(sum(file.stat().st_size for file in path.rglob("*") if file.is_file()) / 1e6, 1),
    }
    if bundle.config is not None:
        model = bundle.model_config
        result["weights_sha256"] = bundle.weights_sha256
        result["model"] = (
            f"{model.num_parameters / 1e6:.1f} M parameters, {model.num_layers} layers of {model.hidden_size}, "
            f"scenes of up to {model.scene_length} ids"
        )
        result["trained_tasks"] = "it does not say" if bundle.trained_tasks is None else list(bundle.trained_tasks)
    return result


def _of_media(path: Path) -> dict[str, Any]:
    from poet.media import probe

    facts = probe(path)
    result: dict[str, Any] = {"file": str(path), "format": facts.format, "duration": round(facts.duration, 3)}
    if facts.has_video:
        result["picture"] = f"{facts.width} x {facts.height}, {facts.fps:g} frames/s, {facts.video_codec}"
    if facts.has_audio:
        result["sound"] = f"{facts.sample_rate} Hz, {facts.num_channels} channel(s), {facts.audio_codec}"
    result["made_by_poet"] = "yes" if facts.metadata.get("machine_made") == "yes" else "it does not say so"
    return result | {"metadata": facts.metadata}
