"""Between a bundle and a Megatron checkpoint, whichever is given, and the comparison of both afterwards.

Joins the parts: reading and writing are `formats`', names are `poet.training.megatron_keymap`'s.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor

from poet.bundle import TRAINED_FILMS_KEY, TRAINED_PARALLEL_KEY, TRAINED_TASKS_KEY, Bundle, check_fingerprint
from poet.bundle_writing import export_bundle
from poet.errors import CheckpointError, ConfigError
from poet.model.attention import SceneLayout
from poet.model.config import PoetConfig
from poet.model.weights import load_transformer
from poet_conversions.agreement import Agreement
from poet_conversions.formats import distributed_checkpoint as files

__all__ = ["compare", "convert", "find_checkpoint"]

Kind = Literal["bundle", "megatron"]


def find_checkpoint(path: Path) -> Path | None:
    """The Megatron checkpoint that `path` is, or the newest of the training run that it is; None if it is neither."""
    if files.is_checkpoint(path):
        return path
    return max((found for found in path.glob("checkpoints/step-????????") if files.is_checkpoint(found)), default=None)


def convert(source: Path, target: Path, *, bundle: Path | None = None, which: files.Which = "averaged") -> Kind:
    """Convert a bundle to a Megatron checkpoint, or a Megatron checkpoint or training run to a bundle.

    A run that is still being trained deletes old checkpoints: stop it first, or name one of its checkpoints that stays.

    Args:
        source: what there is.
        target: what shall be; must not exist.
        bundle: for a checkpoint, the bundle whose vocabulary and tokenizers the new one gets; None takes that of the
            training run's recipe.
        which: weights of a training run, averaged or those that are being trained.

    Returns:
        What `target` is.

    Raises:
        CheckpointError: `source` is neither, is damaged or of another vocabulary than `bundle`, or `target` exists.
        ConfigError: there is no bundle to take the tokenizers from.
    """
    if target.exists():
        raise CheckpointError(f"{target} is there already and would be written over. Name another directory.")
    checkpoint = find_checkpoint(source)
    if checkpoint is None and not (source / "vocabulary.json").is_file():
        raise CheckpointError(
            f"{source} must be a bundle, a Megatron checkpoint or a training run of several processes, and is none of "
            "them."
        )
    if checkpoint is None:
        found = Bundle.open(source)
        files.write_weights(target, load_transformer(source).state_dict(), _about(found))
        return "megatron"
    rest = _bundle_of(source) if bundle is None else bundle
    tokenizers = Bundle.open(rest, require_model=False)
    about = files.read_about(checkpoint)
    check_fingerprint(about.fingerprint, tokenizers.fingerprint, str(checkpoint), f"{rest} is of another vocabulary.")
    weights = files.read_weights(checkpoint, which)
    _write_bundle(target, tokenizers, weights, about)
    return "bundle"


def compare(one: Path, other: Path, *, which: files.Which = "averaged", rows: int = 3, seed: int = 0) -> Agreement:
    """Compute both models' logits on random scenes and compare them; each is computed by its own implementation.

    Args:
        one: a bundle, a Megatron checkpoint, or a training run.
        other: likewise, of the same sizes.
        which: weights of a training run.
        rows: scenes, with prefixes of different lengths.
        seed: of the ids.

    Raises:
        ConfigError: the models have other sizes.
        CheckpointError: one is damaged.
    """
    config = _config_of(one)
    if config != _config_of(other):
        raise ConfigError(f"{one} and {other} must have the same sizes to be compared, they have not.")
    length = min(config.scene_length, 256)
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, config.vocab_size, (rows, length), generator=generator)
    prefixes = torch.arange(rows) * length // (2 * rows)
    layout = SceneLayout.from_prefix_lengths(prefixes, torch.full_like(prefixes, length), length)
    first, second = (_logits(path, ids, layout, which) for path in (one, other))
    return Agreement.of(first, second)


@torch.inference_mode()
def _logits(path: Path, ids: Tensor, layout: SceneLayout, which: files.Which) -> Tensor:
    checkpoint = find_checkpoint(path)
    if checkpoint is not None:
        return files.compute_logits(checkpoint, ids, layout, which)
    model = load_transformer(path)
    return model.logits(model(ids, layout))


def _config_of(path: Path) -> PoetConfig:
    checkpoint = find_checkpoint(path)
    return Bundle.open(path).model_config if checkpoint is None else files.read_about(checkpoint).config


def _about(bundle: Bundle) -> files.About:
    content: dict[str, Any] = json.loads((bundle.path / "config.json").read_text(encoding="utf-8"))
    tasks = content.get(TRAINED_TASKS_KEY)
    return files.About(
        config=bundle.model_config,
        fingerprint=bundle.fingerprint,
        trained_tasks=None if tasks is None else tuple(tasks),
        dtype=str(content.get("dtype", "float32")),
        trained_parallel=content.get(TRAINED_PARALLEL_KEY) is True,
        trained_films=content.get(TRAINED_FILMS_KEY),
    )


def _bundle_of(run: Path) -> Path:
    """The bundle that a training run's recipe names."""
    recipe = run / "recipe.yaml"
    if not recipe.is_file():
        raise ConfigError(
            f"{run} is no training run that names its bundle: name the one whose tokenizers belong to it with --bundle."
        )
    try:
        return Path(yaml.safe_load(recipe.read_text(encoding="utf-8"))["bundle"])
    except (OSError, UnicodeDecodeError, yaml.YAMLError, KeyError, TypeError) as error:
        raise CheckpointError(f"{recipe} cannot be read: {error!r}. Name the bundle with --bundle.") from error


def _write_bundle(target: Path, tokenizers: Bundle, weights: dict[str, Tensor], about: files.About) -> None:
    dtype = getattr(torch, about.dtype)
    stored = {name: weight.to(dtype).contiguous() for name, weight in weights.items()}
    config = about.config.to_huggingface_dict(fingerprint=about.fingerprint, dtype=about.dtype)
    if about.trained_tasks is not None:
        config[TRAINED_TASKS_KEY] = list(about.trained_tasks)
    if about.trained_parallel:
        config[TRAINED_PARALLEL_KEY] = True
    if about.trained_films:
        config[TRAINED_FILMS_KEY] = about.trained_films
    export_bundle(target, tokenizers, config, lambda path: save_file(stored, path, metadata={"format": "pt"}))
