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
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save_file
from torch import Tensor

from poet.errors import CheckpointError, ConfigError
from poet.model.config import PoetConfig
from poet.model.transformer import PoetTransformer

__all__ = [
    "FINGERPRINT_KEY",
    "Adapter",
    "adapter_metadata",
    "hash_adapter",
    "merge_adapter",
    "read_adapter",
    "write_adapter",
]

CONFIG_FILE: Final = "adapter_config.json"
WEIGHTS_FILE: Final = "adapter_model.safetensors"
FINGERPRINT_KEY: Final = "poet_fingerprint"
"""Key of the safetensors metadata under which the vocabulary's fingerprint may stand."""

_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_TENSOR: Final = re.compile(r"base_model\.model\.(?P<matrix>.+)\.lora_(?P<half>[AB])\.weight")
_ADAPTED: Final = re.compile(r"model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)")
_PLAIN: Final[dict[str, tuple[Any, ...]]] = {
    "use_dora": (False, None),
    "use_qalora": (False, None),
    "use_bdlora": (None, False),
    "alora_invocation_tokens": (None, []),
    "bias": ("none",),
    "lora_bias": (False, None),
    "modules_to_save": (None, []),
    "trainable_token_indices": (None, []),
    "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None),
    "layer_replication": (None, []),
    "fan_in_fan_out": (False, None),
}
"""Keys of PEFT's configuration with which an adapter is more than a product of two matrices, and what switches them
off."""

_PLAIN_BEGINNINGS: Final = (True, False, None, "gaussian", "eva", "orthogonal")
"""Of `init_lora_weights`: from others (PiSSA, OLoRA, ...) PEFT begins with other weights of the model."""


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
            f"an adapter's name must be 1 to 64 letters, digits, dots, dashes and underscores, got {name!r}. Rename "
            "its directory, or write NAME=DIR where names can be given."
        )
    raw = _read(path)
    content = _parse(path / CONFIG_FILE, raw[0])
    rank, scale = _rank_and_scale(path / CONFIG_FILE, content)
    file = path / WEIGHTS_FILE
    found = _metadata(file, raw[1]).get(FINGERPRINT_KEY, fingerprint)
    if found != fingerprint:
        raise CheckpointError(
            f"{path} belongs to the vocabulary with the fingerprint {found[:12]}, but it must be {fingerprint[:12]}. "
            "Take the bundle that the adapter was trained on."
        )
    adapter = Adapter(name=name, path=path, rank=rank, scale=scale, sha256=_hash(raw))
    with torch.device("meta"):
        shapes = {key: tuple(tensor.shape) for key, tensor in PoetTransformer(config).state_dict().items()}
    for matrix, (first, second) in _pairs(file, raw[1]).items():
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
        CheckpointError: its files are not what they were when it was checked.
    """
    raw = _read(adapter.path)
    if _hash(raw) != adapter.sha256:
        raise CheckpointError(f"{adapter.path} was changed since it was checked. Start again with it as it is now.")
    weights = model.state_dict()
    for matrix, (first, second) in _pairs(adapter.path / WEIGHTS_FILE, raw[1]).items():
        weight = weights[f"{matrix}.weight"]
        change = adapter.scale * (second.float() @ first.float())
        weight.copy_(weight.float() + change.to(weight.device))


def write_adapter(directory: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor], fingerprint: str) -> None:
    """Write an adapter in PEFT's files.

    Args:
        directory: made if missing.
        config: PEFT's description, plain values.
        tensors: by PEFT's names.
        fingerprint: of the vocabulary of the bundle that it belongs to.
    """
    directory.mkdir(parents=True, exist_ok=True)
    plain = {name: sorted(value) if isinstance(value, set) else value for name, value in config.items()}
    stored = {name: tensor.detach().to("cpu", torch.float32).contiguous() for name, tensor in tensors.items()}
    # One key alone: of two, safetensors writes now one and now the other first, and no two files would be alike.
    save_file(stored, directory / WEIGHTS_FILE, metadata={FINGERPRINT_KEY: fingerprint})
    text = json.dumps(plain, indent=1, sort_keys=True, default=str)
    (directory / CONFIG_FILE).write_text(text + "\n", encoding="utf-8")


def adapter_metadata(path: Path) -> dict[str, str]:
    """What an adapter's weights file says of itself, such as the fingerprint of its bundle's vocabulary.

    Raises:
        CheckpointError: it cannot be read.
    """
    return _metadata(path / WEIGHTS_FILE, _read(path)[1])


def hash_adapter(path: Path) -> str:
    """sha256 in hex of an adapter's two files as they are now.

    Raises:
        CheckpointError: one of them cannot be read.
    """
    return _hash(_read(path))


Raw = tuple[bytes, bytes]
"""What the two files hold: what is checked and hashed is what is used, whatever becomes of the files meanwhile."""


def _read(path: Path) -> Raw:
    try:
        return (path / CONFIG_FILE).read_bytes(), (path / WEIGHTS_FILE).read_bytes()
    except OSError as error:
        raise CheckpointError(
            f"{error.filename} cannot be read: {error.strerror}. An adapter is a directory with {CONFIG_FILE} and "
            f"{WEIGHTS_FILE}; copy it whole."
        ) from error


def _hash(raw: Raw) -> str:
    digest = hashlib.sha256(raw[0])
    digest.update(raw[1])
    return digest.hexdigest()


def _metadata(file: Path, content: bytes) -> dict[str, str]:
    """Of a safetensors file: eight bytes say how long its header is, which is JSON."""
    try:
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        return dict(header.get("__metadata__", {}))
    except (ValueError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}. Copy the adapter whole.") from error


def _pairs(file: Path, content: bytes) -> dict[str, tuple[Tensor, Tensor]]:
    """By the name of the matrix that is changed: (R, I) and (O, R)."""
    halves: dict[str, dict[str, Tensor]] = {}
    try:
        tensors = load(content)
    except SafetensorError as error:
        raise CheckpointError(f"{file} cannot be read: {error}. Copy the adapter whole.") from error
    for key, tensor in tensors.items():
        match = _TENSOR.fullmatch(key)
        if match is None or not _ADAPTED.fullmatch(match["matrix"]):
            raise ConfigError(
                f"{file} must hold changes of the matrices of attention and MLP alone, it has {key}. Train with the "
                "target modules q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj and down_proj."
            )
        halves.setdefault(match["matrix"], {})[match["half"]] = tensor
    single = [matrix for matrix, both in halves.items() if len(both) < 2]
    if single or not halves:
        raise CheckpointError(
            f"{file} must hold lora_A and lora_B of one matrix or more, "
            f"{'it holds none' if not halves else 'one is missing of ' + ', '.join(single)}. Copy the adapter whole."
        )
    return {matrix: (both["A"], both["B"]) for matrix, both in halves.items()}


def _parse(file: Path, raw: bytes) -> dict[str, Any]:
    try:
        content = json.loads(raw)
    except ValueError as error:
        raise CheckpointError(f"{file} cannot be read: {error}. Copy the adapter whole.") from error
    if not isinstance(content, dict) or content.get("peft_type") != "LORA":
        kind = content.get("peft_type") if isinstance(content, dict) else None
        raise ConfigError(
            f"{file} must be PEFT's description of a LoRA adapter (peft_type LORA), it is of {kind!r}. An adapter of "
            "another kind can be made into a bundle with poet merge."
        )
    return content


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:40]}..."


def _rank_and_scale(file: Path, content: Mapping[str, Any]) -> tuple[int, float]:
    for key, off in {**_PLAIN, "init_lora_weights": _PLAIN_BEGINNINGS}.items():
        if content.get(key, off[0]) not in off:
            raise ConfigError(
                f"{file} must describe plain LoRA or rsLoRA, it has {key} {_short(content[key])}: vLLM cannot add such "
                "a change to a batch. Train without it, or make a bundle of it with poet merge."
            )
    if not content.get("target_modules"):
        raise ConfigError(f"{file} must name its target_modules, it does not. Save the adapter with PEFT again.")
    rank, alpha = content.get("r"), content.get("lora_alpha")
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise ConfigError(f"{file} must have a rank r of at least 1, got {rank!r}.")
    if not isinstance(alpha, (int, float)) or isinstance(alpha, bool) or not math.isfinite(alpha):
        raise ConfigError(f"{file} must have a number lora_alpha, got {alpha!r}.")
    return rank, alpha / (math.sqrt(rank) if content.get("use_rslora") else rank)
