"""`poet info`: what a bundle, token shards or a folder of clips hold, or what made a clip."""

from __future__ import annotations

import json as json_format
import math
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from poet.cli.options import Json
from poet.cli.output import note, progress, show_result
from poet.errors import ConfigError

__all__ = ["info"]

NUMBERS: Final = frozenset(
    {"seed", "temperature", "top_k", "top_p", "guidance_scale", "repetition_penalty", "repetition_window", "steps"}
    | {
        "choice_temperature",
        "guidance_start",
        "guidance_stop",
        "upsample_steps",
        "upsample_temperature",
        "fps",
        "duration",
    }
)
"""What is a number in a clip's metadata, where a file can only keep it as text."""


def info(
    path: Annotated[
        Path | None,
        typer.Argument(
            help="A bundle, a directory of token shards, a folder of clips or a media file; the shipped bundle when "
            "left out."
        ),
    ] = None,
    json: Json = False,
) -> None:
    """Say what a bundle, token shards or a folder of clips hold, or what is in a media file and what made it."""
    from poet.bundle import default_bundle

    target = default_bundle() if path is None else path
    result, numbers = _of_directory(target) if target.is_dir() else _of_media(target)
    show_result(result | numbers if json else result, json)


Told = tuple[dict[str, Any], dict[str, Any]]
"""What everybody is told, and what JSON holds besides or in its place: the numbers that stand there in words."""


def _of_directory(path: Path) -> Told:
    from poet.bundle import CONFIG_FILE, GENERATION_FILE, VOCABULARY_FILE
    from poet.data.manifest import MANIFEST_NAME

    if (path / MANIFEST_NAME).is_file():
        return _of_shards(path)
    # A bundle that lacks a file is told so; what has none of them is none.
    if any((path / name).is_file() for name in (VOCABULARY_FILE, GENERATION_FILE, CONFIG_FILE)):
        return _of_bundle(path)
    try:
        return _of_folder(path)
    except ConfigError as error:
        raise ConfigError(
            f"{path} must be a bundle (with {VOCABULARY_FILE}), token shards (with {MANIFEST_NAME}) or a folder of "
            f"clips, and is none of them. As a folder: {error}"
        ) from error


def _of_bundle(path: Path) -> Told:
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
        "megabytes": _megabytes(sum(file.stat().st_size for file in path.rglob("*") if file.is_file())),
    }
    numbers = {name: getattr(defaults, name) for name in ("num_frames", "height", "width", "fps")}
    numbers["sample_rate"] = vocabulary.sample_rate
    if bundle.config is not None:
        model = bundle.model_config
        result["weights_sha256"] = bundle.weights_sha256
        result["model"] = (
            f"{model.num_parameters / 1e6:.1f} M parameters, {model.num_layers} layers of {model.hidden_size}, "
            f"scenes of up to {model.scene_length} ids"
        )
        result["trained_tasks"] = "it does not say" if bundle.trained_tasks is None else list(bundle.trained_tasks)
        numbers |= {
            name: getattr(model, name) for name in ("num_parameters", "num_layers", "hidden_size", "scene_length")
        }
    return result, numbers


def _of_shards(path: Path) -> Told:
    from poet.data.manifest import Manifest
    from poet.data.shards import count_uncaptioned

    manifest = Manifest.load(path)
    uncaptioned = count_uncaptioned(path, manifest)  # first: it tells a file that is missing by its name
    return {
        "shards": str(path),
        "clips": manifest.count,
        "without_caption": uncaptioned,
        "skipped": len(manifest.skipped),
        "source": manifest.source,
        "source_clips": manifest.source_length,
        "complete": manifest.complete,
        "fingerprint": manifest.fingerprint,
        "files": len(manifest.shards),
        "settings": dict(manifest.settings),
        "megabytes": _megabytes(sum((path / shard.file).stat().st_size for shard in manifest.shards)),
    }, {}


def _of_folder(path: Path) -> Told:
    from poet.data.clips import survey_folder

    with progress("looking at clips") as advance:
        survey = survey_folder(path, lambda done, total: advance(done, total, ""))
    for key, reason in survey.unreadable:
        note(f"unreadable {key}: {reason}")
    kinds = {
        kind: {"with_caption": captioned, "without_caption": uncaptioned}
        for kind, (captioned, uncaptioned) in survey.kinds.items()
    }
    return {
        "folder": str(path),
        "clips": sum(sum(counts) for counts in survey.kinds.values()),
        **kinds,
        "unreadable": len(survey.unreadable),
        "megabytes": _megabytes(survey.num_bytes),
    }, {}


def _of_media(path: Path) -> Told:
    from poet.media import probe

    facts = probe(path)
    result: dict[str, Any] = {"file": str(path), "format": facts.format, "duration": round(facts.duration, 3)}
    numbers: dict[str, Any] = {}
    if facts.has_video:
        result["picture"] = f"{facts.width} x {facts.height}, {facts.fps:g} frames/s, {facts.video_codec}"
        numbers |= {"width": facts.width, "height": facts.height, "fps": facts.fps}
    if facts.has_audio:
        result["sound"] = f"{facts.sample_rate} Hz, {facts.num_channels} channel(s), {facts.audio_codec}"
        numbers |= {"sample_rate": facts.sample_rate, "num_channels": facts.num_channels}
    result["made_by_poet"] = "yes" if facts.metadata.get("machine_made") == "yes" else "it does not say so"
    numbers["metadata"] = {name: _number(value) if name in NUMBERS else value for name, value in facts.metadata.items()}
    return result | {"metadata": facts.metadata}, numbers


def _number(text: str) -> float | int | str:
    """The finite number that a text is; anything else, which a changed file may hold, stays a text."""
    try:
        value = json_format.loads(text)
    except (ValueError, RecursionError):
        return text
    return value if type(value) is int or (type(value) is float and math.isfinite(value)) else text


def _megabytes(num_bytes: int) -> float:
    return round(num_bytes / 1e6, 1 if num_bytes >= 1e6 else 3)
