"""A dense Qwen3 checkpoint in Hugging Face's files, checked whole before anything is written.

Poet's transformer is Qwen3's, name for name, so a checkpoint is taken as it is or not at all: whatever it has that
Poet's has not, is an error here. Knows files, names and shapes; what becomes of them is `language_model`'s business.

Source: Qwen3 Technical Report, arXiv:2505.09388; the names are those of transformers' Qwen3ForCausalLM.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from poet.errors import CheckpointError, ConfigError
from poet.model.config import PoetConfig
from poet.model.tensor_files import TensorFiles
from poet.model.transformer import PoetTransformer
from poet.vocabulary import PADDING_MULTIPLE
from poet_tokenizers.byte_level import ByteLevelTokenizer

__all__ = ["EMBEDDING", "HEAD", "Qwen3Checkpoint"]

CONFIG_FILE: Final = "config.json"
TOKENIZER_FILE: Final = "tokenizer.json"
MODEL_TYPE: Final = "qwen3"
EMBEDDING: Final = "model.embed_tokens.weight"
HEAD: Final = "lm_head.weight"

_NEEDED: Final = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "rms_norm_eps", "max_position_embeddings", "tie_word_embeddings"),
)
_ROPE_KEYS: Final = {"rope_type", "type", "rope_theta"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Qwen3Checkpoint:
    """A checked checkpoint. Make one with `Qwen3Checkpoint.open`.

    Attributes:
        path: its directory.
        config: its sizes as Poet's; vocab_size is rounded up, and scene_length the longest that its positions allow.
        num_rows: of its embedding, and of its head.
        tokenizer: its own, over `num_rows` codes.
        files: its tensors.
    """

    path: Path
    config: PoetConfig
    num_rows: int
    tokenizer: ByteLevelTokenizer
    files: TensorFiles

    @classmethod
    def open(cls, path: Path) -> Qwen3Checkpoint:
        """Check a directory, of whose weights headers alone are read.

        Args:
            path: with config.json, tokenizer.json and safetensors.

        Raises:
            CheckpointError: a file or tensor is missing, damaged or of another shape.
            ConfigError: it is of another architecture, or has what Poet's transformer has not.
        """
        if not path.is_dir():
            raise CheckpointError(f"there is no directory {path}. Name one with a Qwen3 checkpoint.")
        content = _read_config(path / CONFIG_FILE)
        config, num_rows = _to_poet(path / CONFIG_FILE, content)
        tokenizer = _read_tokenizer(path / TOKENIZER_FILE, num_rows)
        files = TensorFiles(path)
        checkpoint = cls(path=path, config=config, num_rows=num_rows, tokenizer=tokenizer, files=files)
        checkpoint._check_tensors()
        return checkpoint

    @property
    def dtype(self) -> torch.dtype:
        """In which its matrices are stored."""
        return self.files.facts[EMBEDDING].dtype

    def read(self, name: str) -> Tensor:
        """A tensor by its name, as it is stored. Raises CheckpointError if it cannot be read."""
        return self.files.read(name)

    def _check_tensors(self) -> None:
        with torch.device("meta"):
            shapes = {name: tuple(part.shape) for name, part in PoetTransformer(self.config).state_dict().items()}
        for name in (EMBEDDING, HEAD) if HEAD in shapes else (EMBEDDING,):
            shapes[name] = (self.num_rows, self.config.hidden_size)
        found = {name: facts.shape for name, facts in self.files.facts.items()}
        if self.config.tie_embeddings and HEAD in found:  # some write it although it is the embedding
            if EMBEDDING in found and not self._head_is_embedding():
                raise CheckpointError(
                    f"{self.path / CONFIG_FILE} says that the head is the embedding (tie_word_embeddings), but {HEAD} "
                    f"differs from {EMBEDDING}. Set tie_word_embeddings to false if the head is a matrix of its own."
                )
            del found[HEAD]
        missing, unknown = sorted(shapes.keys() - found.keys()), sorted(found.keys() - shapes.keys())
        if missing or unknown:
            raise CheckpointError(
                f"{self.path} must hold exactly the tensors that its {CONFIG_FILE} asks for; missing: "
                f"{_some(missing)}; unknown: {_some(unknown)}. Copy it whole, or take another checkpoint."
            )
        for name, shape in shapes.items():
            if found[name] != shape:
                raise CheckpointError(
                    f"{self.files.facts[name].file}: {name} must be of shape {shape} by {CONFIG_FILE}, it is "
                    f"{found[name]}. The files belong to different checkpoints; copy them again."
                )

    def _head_is_embedding(self) -> bool:
        one, other = (self.files.facts[name] for name in (EMBEDDING, HEAD))
        return (one.shape, one.dtype) == (other.shape, other.dtype) and torch.equal(
            self.read(EMBEDDING), self.read(HEAD)
        )


def _read_config(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{file} is missing: it says what the model is. Copy the checkpoint whole.") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read as JSON: {error}. Copy it again.") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file} must hold a JSON object, it holds a {type(content).__name__}. Copy it again.")
    return content


def _to_poet(file: Path, content: Mapping[str, Any]) -> tuple[PoetConfig, int]:
    """Sizes, and rows of the embedding."""
    if content.get("model_type") != MODEL_TYPE:
        raise ConfigError(
            f"{file} must be of model_type {MODEL_TYPE!r}, a dense Qwen3, it is {content.get('model_type')!r} "
            f"({', '.join(map(str, content.get('architectures') or ['no architecture']))}). Take a dense Qwen3."
        )
    missing = [name for name in _NEEDED if name not in content]
    if missing:
        raise ConfigError(f"{file} must hold {', '.join(missing)}, which it does not. Copy it again.")
    for name in ("quantization_config", "compression_config"):
        if content.get(name) is not None:
            raise ConfigError(f"{file}: weights must not be quantised, it has a {name}. Take the original checkpoint.")
    sliding = [kind for kind in content.get("layer_types") or [] if kind != "full_attention"]
    if content.get("use_sliding_window") or sliding:
        raise ConfigError(
            f"{file}: every layer must see the whole text, it has sliding windows (use_sliding_window, layer_types). "
            "Poet's transformer has none; take a checkpoint without them."
        )
    for name in ("rope_scaling", "rope_parameters"):
        rope = content.get(name) or {}
        if not isinstance(rope, dict):
            raise ConfigError(f"{file}: {name} must be an object, got {rope!r}.")
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind != "default" or rope.keys() - _ROPE_KEYS:
            raise ConfigError(
                f"{file}: positions must not be scaled, {name} is {rope}. Poet's transformer has plain rotary "
                f"positions: set {name} to null, which is how Qwen3 was trained, and max_position_embeddings to the "
                "original length."
            )
    num_rows, length = content["vocab_size"], content["max_position_embeddings"]
    if not isinstance(num_rows, int) or isinstance(num_rows, bool) or num_rows < 1:
        raise ConfigError(f"{file}: vocab_size must be a positive whole number, got {num_rows!r}.")
    padded = -(-num_rows // PADDING_MULTIPLE) * PADDING_MULTIPLE
    try:
        return PoetConfig.from_huggingface_dict({**content, "vocab_size": padded, "scene_length": length}), num_rows
    except (ConfigError, TypeError, ValueError) as error:
        raise ConfigError(f"{file} cannot be used: {error}") from error


def _read_tokenizer(file: Path, num_rows: int) -> ByteLevelTokenizer:
    try:
        model = file.read_bytes()
    except FileNotFoundError:
        raise CheckpointError(
            f"{file} is missing: it is the model's text tokenizer. Copy the checkpoint whole; where it has vocab.json "
            "and merges.txt alone, save the tokenizer anew with transformers (use_fast=True)."
        ) from None
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror}. Copy it again.") from error
    return ByteLevelTokenizer(model, num_rows, source=file)


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "") if names else "none"
