"""LoRA adapters in PEFT's files: read, checked against a model, and merged into its weights.

An adapter adds to some of a model's matrices a product of two thin ones. This module knows their names and shapes; how
adapters are trained and served is others' business.

Legend: O outputs and I inputs of a matrix, R rank.

Source: Hu et al., arXiv:2106.09685; Kalajdzievski, arXiv:2312.03732, for the scale of rsLoRA.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from poet.errors import CheckpointError, ConfigError
from poet.model.config import PoetConfig
from poet.model.transformer import PoetTransformer

__all__ = ["FINGERPRINT_KEY", "Adapter", "merge_adapter", "read_adapter", "read_adapters"]

CONFIG_FILE: Final = "adapter_config.json"
WEIGHTS_FILE: Final = "adapter_model.safetensors"
FINGERPRINT_KEY: Final = "poet_fingerprint"
"""Key of the safetensors metadata under which the vocabulary's fingerprint may stand."""

_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_TENSOR: Final = re.compile(r"base_model\.model\.(?P<matrix>.+)\.lora_(?P<half>[AB])\.weight")
_ADAPTED: Final = re.compile(r"model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)")
_PLAIN: Final[dict[str, tuple[Any, ...]]] = {
    "use_dora": (False, None),
    "bias": ("none", None),
    "lora_bias": (False, None),
    "modules_to_save": (None, []),
    "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None),
    "layer_replication": (None, []),
    "fan_in_fan_out": (False, None),
}
"""Keys of PEFT's configuration with which an adapter is more than a product of two matrices, and what switches them
off."""


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """A checked adapter, by which it is asked for and known again.

    Attributes:
        name: by which requests ask for it.
        path: directory of its two files.
        rank: R, the same for all matrices.
        scale: factor on the product.
        sha256: in hex, of both files.
    """

    name: str
    path: Path
    rank: int
    scale: float
    sha256: str


def read_adapters(
    directories: Mapping[str, str | Path], config: PoetConfig, fingerprint: str, *, taken: Sequence[str] = ()
) -> tuple[Adapter, ...]:
    """Check several adapters of one model.

    Args:
        directories: of each by its name.
        config: the model's.
        fingerprint: of the bundle's vocabulary.
        taken: names that none may have.

    Raises:
        ConfigError: a name that is taken.
        CheckpointError, ConfigError: as `read_adapter`.
    """
    for name in directories:
        if name in taken:
            raise ConfigError(f"an adapter must have a name of its own, {name!r} is that of the bundle.")
    return tuple(read_adapter(path, config, fingerprint, name=name) for name, path in directories.items())


def read_adapter(path: str | Path, config: PoetConfig, fingerprint: str, *, name: str | None = None) -> Adapter:
    """Check an adapter against the model that it shall change; its weights are read and let go again.

    Args:
        path: directory with adapter_config.json and adapter_model.safetensors.
        config: the model's.
        fingerprint: of the bundle's vocabulary; an adapter that says its own must say this one.
        name: by which requests will ask for it; None takes the directory's.

    Returns:
        What is known of it.

    Raises:
        CheckpointError: a file is missing or damaged, or the adapter belongs to another model.
        ConfigError: a name that cannot be used, or a kind of adapter other than plain LoRA and rsLoRA.
    """
    path = Path(path)
    name = path.resolve().name if name is None else name
    if not _NAME.fullmatch(name):
        raise ConfigError(
            f"an adapter's name must be 1 to 64 letters, digits, dots, dashes and underscores, got {name!r}."
        )
    content, digest = _read_config(path / CONFIG_FILE)
    rank, scale = _rank_and_scale(path / CONFIG_FILE, content)
    file = path / WEIGHTS_FILE
    try:
        digest.update(file.read_bytes())
        with safe_open(file, framework="pt") as opened:
            found = (opened.metadata() or {}).get(FINGERPRINT_KEY, fingerprint)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}. Copy the adapter whole.") from error
    if found != fingerprint:
        raise CheckpointError(
            f"{path} belongs to the vocabulary with the fingerprint {found[:12]}, but it must be {fingerprint[:12]}. "
            "Take the bundle that the adapter was trained on."
        )
    adapter = Adapter(name=name, path=path, rank=rank, scale=scale, sha256=digest.hexdigest())
    with torch.device("meta"):
        shapes = {key: tuple(tensor.shape) for key, tensor in PoetTransformer(config).state_dict().items()}
    for matrix, (first, second) in _pairs(adapter).items():
        outputs, inputs = shapes.get(f"{matrix}.weight", (0, 0))
        if (tuple(first.shape), tuple(second.shape)) != ((rank, inputs), (outputs, rank)):
            raise CheckpointError(
                f"{file} must hold for {matrix} matrices of ({rank}, {inputs}) and ({outputs}, {rank}), it has "
                f"{tuple(first.shape)} and {tuple(second.shape)}. Take the bundle that the adapter was trained on."
            )
        if not bool(torch.isfinite(first).all() and torch.isfinite(second).all()):
            raise CheckpointError(f"{file} must hold finite numbers, {matrix} has others. Train the adapter again.")
    return adapter


@torch.no_grad()
def merge_adapter(model: PoetTransformer, adapter: Adapter) -> None:
    """Add an adapter to a model's weights, in place; computed in float32 whatever they are.

    Args:
        model: whose configuration the adapter was checked against.
        adapter: to be merged.

    Raises:
        CheckpointError: its file is no longer there, or no longer whole.
    """
    weights = model.state_dict()
    for matrix, (first, second) in _pairs(adapter).items():
        weight = weights[f"{matrix}.weight"]
        change = adapter.scale * (second.float() @ first.float())
        weight.copy_(weight.float() + change.to(weight.device))


def _pairs(adapter: Adapter) -> dict[str, tuple[Tensor, Tensor]]:
    """By the name of the matrix that is changed: (R, I) and (O, R)."""
    file = adapter.path / WEIGHTS_FILE
    halves: dict[str, dict[str, Tensor]] = {}
    try:
        with safe_open(file, framework="pt") as opened:
            for key in opened.keys():  # noqa: SIM118, it is no mapping
                match = _TENSOR.fullmatch(key)
                if match is None or not _ADAPTED.fullmatch(match["matrix"]):
                    raise ConfigError(
                        f"{file} must hold changes of the matrices of attention and MLP alone, it has {key}. Train "
                        "with the target modules q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj and down_proj."
                    )
                halves.setdefault(match["matrix"], {})[match["half"]] = opened.get_tensor(key)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}. Copy the adapter whole.") from error
    single = [matrix for matrix, both in halves.items() if len(both) < 2]
    if single or not halves:
        raise CheckpointError(
            f"{file} must hold lora_A and lora_B of one matrix or more, "
            f"{'it holds none' if not halves else 'one is missing of ' + ', '.join(single)}. Copy the adapter whole."
        )
    return {matrix: (both["A"], both["B"]) for matrix, both in halves.items()}


def _read_config(file: Path) -> tuple[dict[str, Any], Any]:
    try:
        raw = file.read_bytes()
        content = json.loads(raw)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{file} cannot be read: {error}. An adapter is a directory with {CONFIG_FILE} and {WEIGHTS_FILE}."
        ) from error
    if not isinstance(content, dict) or content.get("peft_type") != "LORA":
        raise ConfigError(f"{file} must be PEFT's description of a LoRA adapter (peft_type LORA), it is not.")
    return content, hashlib.sha256(raw)


def _rank_and_scale(file: Path, content: Mapping[str, Any]) -> tuple[int, float]:
    for key, off in _PLAIN.items():
        if content.get(key) not in off:
            raise ConfigError(
                f"{file} must describe plain LoRA or rsLoRA, it has {key} {content[key]!r}: vLLM cannot add such a "
                "change to a batch. Train without it."
            )
    rank, alpha = content.get("r"), content.get("lora_alpha")
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise ConfigError(f"{file} must have a rank r of at least 1, got {rank!r}.")
    if not isinstance(alpha, (int, float)) or isinstance(alpha, bool) or not math.isfinite(alpha):
        raise ConfigError(f"{file} must have a number lora_alpha, got {alpha!r}.")
    return rank, alpha / (math.sqrt(rank) if content.get("use_rslora") else rank)
