"""The transformer's weights in a bundle's directory: read and written as safetensors, strictly.

It knows file names and parameter names; it does not know tokenizers or vocabularies (`poet.bundle`).
"""

import json
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from poet.errors import CheckpointError, ConfigError
from poet.model.config import PoetConfig
from poet.model.superresolution import UPSAMPLER_ARCHITECTURE, UPSAMPLER_TYPE, Upsampler, UpsamplerConfig
from poet.model.transformer import PoetTransformer

__all__ = ["load_transformer", "load_upsampler", "save_upsampler", "save_weights"]

WEIGHTS_FILE = "model.safetensors"

M = TypeVar("M", bound=nn.Module)


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
    with torch.device("meta"):
        model = PoetTransformer(config)
    return _load_strictly(model, directory, device, dtype)


def save_upsampler(model: Upsampler, directory: str | Path, video_checksum: str, dtype: torch.dtype) -> None:
    """Write an upsampler: config.json, which names the tokenizer of its codes, and model.safetensors.

    Args:
        model: on any device.
        directory: made if missing.
        video_checksum: of the video tokenizer whose codes it was trained on.
        dtype: in which the weights are stored.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    content = {
        "architectures": [UPSAMPLER_ARCHITECTURE],
        "model_type": UPSAMPLER_TYPE,
        "dtype": str(dtype).removeprefix("torch."),
        "upsampler": model.config.to_dict(),
        "video_tokenizer": video_checksum,
    }
    (directory / "config.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    tensors = {name: tensor.detach().to("cpu", dtype).contiguous() for name, tensor in model.state_dict().items()}
    save_file(tensors, directory / WEIGHTS_FILE, metadata={"format": "pt"})


def load_upsampler(
    directory: str | Path,
    video_checksum: str,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Upsampler:
    """Build the upsampler that `save_upsampler` wrote, in evaluation mode.

    Args:
        directory: usually upsampler/ of a bundle.
        video_checksum: of the video tokenizer in use; another one's codes mean something else.
        device: where the weights shall lie.
        dtype: what they shall be, whatever they are stored as.

    Raises:
        CheckpointError: a file is missing or damaged, the parameters are not those of the config, or the upsampler
            belongs to another video tokenizer.
    """
    directory = Path(directory)
    content = _read_json(directory / "config.json")
    config = content.get("upsampler")
    if content.get("model_type") != UPSAMPLER_TYPE or not isinstance(config, dict):
        raise CheckpointError(f"{directory / 'config.json'} must describe an upsampler, it does not. Export it again.")
    if content.get("video_tokenizer") != video_checksum:
        raise CheckpointError(
            f"the upsampler {directory} belongs to the video tokenizer {str(content.get('video_tokenizer'))[:12]}, "
            f"the one in use is {video_checksum[:12]}. Put the upsampler beside the tokenizer it was trained with."
        )
    try:
        settings = UpsamplerConfig.from_dict(config)
    except (ConfigError, TypeError, ValueError) as error:
        raise CheckpointError(f"{directory / 'config.json'} cannot be used: {error}") from error
    with torch.device("meta"):
        model = Upsampler(settings)
    return _load_strictly(model, directory, device, dtype)


def _load_strictly(model: M, directory: Path, device: torch.device | str, dtype: torch.dtype) -> M:
    """Give a model on no device the weights of a directory, all of them and no others."""
    tensors = _read_tensors(directory)
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
