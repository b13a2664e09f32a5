"""The directory form of a tokenizer: `config.json` beside plain tensors or a model file, and the checksum between them.

`config.json` holds "kind" (which class reads the directory), "config" (that class's settings), "spec" (what the shared
vocabulary relies on: its checksum covers what decides which code something gets) and, beside tensors, "weights" (the
checksum of all of them). So a codec may get a better decoder and keep its spec: codes that were written before mean
the same. No pickle is ever read. Knows files, never what a tokenizer computes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from poet_tokenizers.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch import dtype as torch_dtype

__all__ = [
    "CONFIG_FILE",
    "WEIGHTS_FILE",
    "check_spec",
    "check_weights",
    "codes_checksum",
    "load_strictly",
    "read_description",
    "read_tensors",
    "weights_checksum",
    "with_stored_decoder",
    "write_description",
    "write_tensors",
]

CONFIG_FILE: Final = "config.json"
WEIGHTS_FILE: Final = "model.safetensors"


def weights_checksum(tensors: Mapping[str, Tensor]) -> str:
    """sha256 in hex over names, dtypes, shapes and bytes of the tensors, in the order of their names.

    The bytes are those of the contiguous tensor on the CPU, so neither the device, the memory layout nor the order in
    which a file lists its tensors changes the sum; any changed weight does.
    """
    import torch

    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().to("cpu").contiguous()
        header = json.dumps([name, str(tensor.dtype).removeprefix("torch."), list(tensor.shape)])
        digest.update(header.encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def codes_checksum(tensors: Mapping[str, Tensor]) -> str:
    """`weights_checksum` of what decides the codes: all tensors but those of the module `decoder`."""
    return weights_checksum({name: tensor for name, tensor in tensors.items() if not name.startswith("decoder.")})


def write_description(
    directory: Path, kind: str, config: Mapping[str, Any], spec: Mapping[str, Any], weights: str | None = None
) -> None:
    """Write `config.json`; makes the directory if need be. `weights` is the checksum of all tensors beside it."""
    directory.mkdir(parents=True, exist_ok=True)
    description: dict[str, Any] = {"kind": kind, "config": dict(config), "spec": dict(spec)}
    if weights is not None:
        description["weights"] = weights
    (directory / CONFIG_FILE).write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")


def read_description(directory: Path, kind: str | None = None) -> dict[str, Any]:
    """Read `config.json` and check its three parts.

    Args:
        directory: a directory that a tokenizer's `save` wrote.
        kind: the kind that the caller can read; None for any.

    Raises:
        CheckpointError: the file is missing, is not such a description, or describes another kind.
    """
    file = directory / CONFIG_FILE
    try:
        description = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(
            f"{file} must describe a tokenizer, but there is no such file. "
            "Name a directory into which a tokenizer was saved."
        ) from None
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{file} must be readable JSON: {error}. Copy the tokenizer's directory again."
        ) from error
    if not isinstance(description, dict) or not isinstance(description.get("kind"), str):
        raise CheckpointError(f'{file} must be a JSON object with a "kind". It is not a tokenizer\'s description.')
    for part in ("config", "spec"):
        if not isinstance(description.get(part), dict):
            raise CheckpointError(f'{file} must hold an object "{part}". Save or copy the tokenizer again.')
    if kind is not None and description["kind"] != kind:
        raise CheckpointError(
            f'{file} must be of kind "{kind}", it is of kind "{description["kind"]}". '
            f"Load it with poet_tokenizers.loading, which picks the class by kind."
        )
    return description


def write_tensors(directory: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write `model.safetensors`; makes the directory if need be."""
    from safetensors.torch import save_file

    directory.mkdir(parents=True, exist_ok=True)
    save_file(
        {name: tensor.detach().to("cpu").clone().contiguous() for name, tensor in tensors.items()},
        directory / WEIGHTS_FILE,
    )


def with_stored_decoder(tensors: Mapping[str, Tensor], dtype: torch_dtype) -> dict[str, Tensor]:
    """The tensors as they are stored: those of the module `decoder` in another dtype, all others as they are.

    Encoder and codebooks decide codes and are never rounded; a decoder's weights may be.
    """
    return {name: tensor.to(dtype) if name.startswith("decoder.") else tensor for name, tensor in tensors.items()}


def read_tensors(directory: Path) -> dict[str, Tensor]:
    """Read `model.safetensors`, on the CPU.

    Raises:
        CheckpointError: the file is missing or damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    file = directory / WEIGHTS_FILE
    if not file.is_file():
        raise CheckpointError(f"{file} must hold the tokenizer's weights, but there is no such file. Copy it again.")
    try:
        return load_file(file)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} must be a whole safetensors file: {error}. Copy it again.") from error


def load_strictly(module: nn.Module, tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor], file: Path) -> None:
    """Copy `tensors` into the parameters and buffers of `module` named in `expected`, one for one.

    Raises:
        CheckpointError: a tensor is missing, unexpected or of another shape.
    """
    missing, unexpected = sorted(expected.keys() - tensors.keys()), sorted(tensors.keys() - expected.keys())
    if missing or unexpected:
        raise CheckpointError(
            f"{file} must hold exactly the {len(expected)} tensors of {type(module).__name__}; missing: "
            f"{_some(missing)}; unexpected: {_some(unexpected)}. It belongs to another configuration or class."
        )
    for name, tensor in expected.items():
        if tensors[name].shape != tensor.shape:
            raise CheckpointError(
                f"{file}: {name} must be of shape {tuple(tensor.shape)}, it is {tuple(tensors[name].shape)}. "
                f"The weights belong to another configuration."
            )
    module.load_state_dict(dict(tensors), strict=False)


def check_spec(directory: Path, written: Mapping[str, Any], computed: Mapping[str, Any]) -> None:
    """Compare the spec in `config.json` with the one that configuration and weights really have.

    Raises:
        CheckpointError: they differ; a differing checksum means that the weights are not those that were saved.
    """
    differing = [key for key in {**computed, **written} if written.get(key) != computed.get(key)]
    if differing:
        found = ", ".join(f"{key} {written.get(key)!r} instead of {computed.get(key)!r}" for key in differing)
        raise CheckpointError(
            f"{directory}: {CONFIG_FILE} must describe the weights beside it; its spec says {found}. "
            f"One of the two files was changed or damaged: copy the directory again or save the tokenizer again."
        )


def check_weights(directory: Path, description: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Compare the checksum of all weights in `config.json` with the one that they really have.

    Raises:
        CheckpointError: they differ.
    """
    written, computed = description.get("weights"), weights_checksum(tensors)
    if written != computed:
        raise CheckpointError(
            f"{directory}: {CONFIG_FILE} must describe the weights beside it; it says that their checksum is "
            f"{written!r} instead of {computed!r}. One of the two files was changed or damaged: copy the directory "
            "again or save the tokenizer again."
        )


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "") if names else "none"


def read_text_model(directory: Path, name: str, what: str, description: dict[str, Any]) -> bytes:
    """Read the one file of a text tokenizer, and hold it against the checksum in its description.

    The checksum comes first: what was cut short should be called so, not misread.

    Args:
        directory: that the tokenizer's `save` wrote.
        name: of the file.
        what: it holds, for messages.
        description: what `read_description` said.

    Raises:
        CheckpointError: the file is missing, or not the one that was saved.
    """
    file = directory / name
    try:
        model = file.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{file} must hold {what}: {error}. Copy it again.") from error
    found = hashlib.sha256(model).hexdigest()
    check_spec(directory, {"checksum": description["spec"].get("checksum")}, {"checksum": found})
    return model
