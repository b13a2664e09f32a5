"""The transformer's weights in a bundle's directory: read and written as safetensors, strictly.

It knows file names and parameter names; it does not know tokenizers or vocabularies (`poet.bundle`).
"""

import json
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from poet.errors import CheckpointError, ConfigError
from poet.model.config import PoetConfig
from poet.model.transformer import PoetTransformer

__all__ = ["load_transformer", "save_weights"]

WEIGHTS_FILE = "model.safetensors"


def save_weights(model: PoetTransformer, path: str | Path) -> None:
    """Write the model's parameters under their Hugging Face names.

    Args:
        model: on any device.
        path: of the file, usually model.safetensors in a bundle.
    """
    tensors = {name: tensor.detach().contiguous() for name, tensor in model.state_dict().items()}
    save_file(tensors, path, metadata={"format": "pt"})


def load_transformer(
    directory: str | Path, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> PoetTransformer:
    """Build the transformer of a bundle from config.json and model.safetensors (in one file or several).

    Args:
        directory: the bundle.
        device: where the weights shall lie.
        dtype: what they shall be, whatever they are stored as.

    Returns:
        The model in evaluation mode.

    Raises:
        CheckpointError: a file is missing or damaged, or the parameters are not exactly those that the config names.
    """
    directory = Path(directory)
    try:
        config = PoetConfig.from_huggingface_dict(_read_json(directory / "config.json"))
    except ConfigError as error:
        raise CheckpointError(f"{directory / 'config.json'} cannot be used: {error}") from error
    tensors = _read_tensors(directory)
    with torch.device("meta"):
        model = PoetTransformer(config)
    expected = {name: tuple(parameter.shape) for name, parameter in model.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if found != expected:
        wrong = sorted(set(found.items()) ^ set(expected.items()))
        raise CheckpointError(
            f"{directory / WEIGHTS_FILE} must hold exactly the parameters that config.json asks for; "
            f"missing, superfluous or of another shape: {', '.join(dict.fromkeys(name for name, _ in wrong))}. "
            "Export the model again."
        )
    weights = {name: tensor.to(device=device, dtype=dtype) for name, tensor in tensors.items()}
    model.load_state_dict(weights, assign=True)
    return model.eval()


def _read_tensors(directory: Path) -> dict[str, Tensor]:
    index = directory / f"{WEIGHTS_FILE}.index.json"
    names = [WEIGHTS_FILE]
    if index.is_file():
        parts = _read_json(index).get("weight_map")
        if not isinstance(parts, dict):
            raise CheckpointError(f"{index} must hold a weight_map. Export the model again.")
        names = sorted(set(parts.values()))
    tensors: dict[str, Tensor] = {}
    for name in names:
        try:
            tensors |= load_file(directory / name)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{directory / name} cannot be read: {error}. Copy the bundle whole.") from error
    return tensors


def _read_json(path: Path) -> dict[str, object]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}. Copy the bundle whole, or export it again.") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} must hold a JSON object, it holds a {type(content).__name__}.")
    return content
