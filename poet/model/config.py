"""The shape of the transformer. It knows numbers only: no torch, no codes, no order of ids.

`PoetConfig` is the one source; the Hugging Face, Megatron and vLLM configurations are derived from it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from poet.errors import ConfigError

__all__ = ["ARCHITECTURE", "MODEL_TYPE", "PoetConfig"]

ARCHITECTURE = "PoetForCausalLM"
MODEL_TYPE = "poet"

_POSITIVE = (
    "vocab_size",
    "hidden_size",
    "ffn_hidden_size",
    "num_layers",
    "num_heads",
    "num_kv_heads",
    "head_dim",
    "scene_length",
    "max_position_embeddings",
)

# PoetConfig's names to those of Hugging Face's Qwen3Config. rope_theta is not here: it has moved between versions.
_HUGGING_FACE_NAMES = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "ffn_hidden_size": "intermediate_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "norm_eps": "rms_norm_eps",
    "scene_length": "scene_length",
    "max_position_embeddings": "max_position_embeddings",
    "tie_embeddings": "tie_word_embeddings",
}

# What Poet's transformer always is. A config.json that says otherwise belongs to another model.
_FIXED = {
    "hidden_act": "silu",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "use_sliding_window": False,
}


@dataclass(frozen=True, kw_only=True)
class PoetConfig:
    """Sizes of one transformer.

    Attributes:
        vocab_size: ids of the shared vocabulary, padded to a multiple of 128.
        hidden_size: width of the residual stream.
        ffn_hidden_size: inner width of the SwiGLU feed-forward.
        num_layers: layers; layer 0 alone looks across scenes.
        num_heads: query heads.
        num_kv_heads: key and value heads; divides num_heads.
        head_dim: width of one head, even. num_heads * head_dim need not equal hidden_size.
        rope_theta: base of the rotary frequencies.
        norm_eps: epsilon of every RMSNorm.
        scene_length: ids of the longest scene; the scenes of a film are padded to it.
        max_position_embeddings: ids of the longest film; at least scene_length.
        tie_embeddings: whether the output head is the embedding matrix.
    """

    vocab_size: int
    hidden_size: int
    ffn_hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    scene_length: int
    max_position_embeddings: int
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-6
    tie_embeddings: bool = True

    def __post_init__(self) -> None:
        for name in _POSITIVE:
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"{name} must be a positive whole number, got {value!r}.")
        for name in ("rope_theta", "norm_eps"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
                raise ConfigError(f"{name} must be a positive number, got {value!r}.")
        if not isinstance(self.tie_embeddings, bool):
            raise ConfigError(f"tie_embeddings must be true or false, got {self.tie_embeddings!r}.")
        if self.vocab_size % 128:
            raise ConfigError(
                f"vocab_size must be a multiple of 128, got {self.vocab_size}. Use Vocabulary.padded_vocab_size."
            )
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(
                f"num_heads must be a multiple of num_kv_heads, got {self.num_heads} and {self.num_kv_heads}."
            )
        if self.head_dim % 2:
            raise ConfigError(f"head_dim must be even, got {self.head_dim}: rotary positions turn pairs of channels.")
        if self.scene_length > self.max_position_embeddings:
            raise ConfigError(
                f"scene_length must be at most max_position_embeddings, got {self.scene_length} and "
                f"{self.max_position_embeddings}. Raise max_position_embeddings."
            )

    @property
    def num_parameters(self) -> int:
        """Trainable numbers of the built model; a tied head counts once."""
        query, key_value = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        attention = self.hidden_size * (2 * query + 2 * key_value) + 2 * self.head_dim
        feed_forward = 3 * self.hidden_size * self.ffn_hidden_size
        layer = attention + feed_forward + 2 * self.hidden_size
        matrices = 1 if self.tie_embeddings else 2
        return matrices * self.vocab_size * self.hidden_size + self.num_layers * layer + self.hidden_size

    def to_huggingface_dict(self, *, fingerprint: str = "", dtype: str = "float32") -> dict[str, Any]:
        """Build the content of a bundle's config.json; the exact inverse of `from_huggingface_dict`.

        Args:
            fingerprint: the vocabulary's, stored as `poet_fingerprint`; left out when empty.
            dtype: the type that the weights are stored in.

        Returns:
            Qwen3Config's key names, with `scene_length` and `poet_fingerprint` besides.
        """
        content: dict[str, Any] = {"architectures": [ARCHITECTURE], "model_type": MODEL_TYPE, "dtype": dtype}
        content |= {theirs: getattr(self, ours) for ours, theirs in _HUGGING_FACE_NAMES.items()}
        content |= {"rope_parameters": {"rope_type": "default", "rope_theta": self.rope_theta}, **_FIXED}
        if fingerprint:
            content["poet_fingerprint"] = fingerprint
        return content

    @classmethod
    def from_huggingface_dict(cls, content: Mapping[str, Any]) -> "PoetConfig":
        """Read the content of a config.json.

        Keys that do not concern the transformer's shape (Hugging Face writes dozens) are passed over; a missing one,
        or one that asks for something that this transformer does not do, is an error.

        Args:
            content: as from `to_huggingface_dict`, or a Qwen3Config's dict with `scene_length` added.

        Raises:
            ConfigError: a key is missing, or its value is not one that Poet's transformer can take.
        """
        missing = [name for name in _HUGGING_FACE_NAMES.values() if name not in content]
        if missing:
            raise ConfigError(
                f"config.json must hold {', '.join(missing)}, which it does not. "
                "Export the bundle again; in Python, PoetConfig.to_huggingface_dict() gives the content."
            )
        for name, expected in _FIXED.items():
            if content.get(name, expected) != expected:
                raise ConfigError(f"config.json: {name} must be {expected!r} for a Poet model, got {content[name]!r}.")
        rope = content.get("rope_parameters") or content.get("rope_scaling") or {}
        rope_type = rope.get("rope_type", "default")
        if rope_type != "default":
            raise ConfigError(f"config.json: rope_type must be 'default' for a Poet model, got {rope_type!r}.")
        theta = rope.get("rope_theta", content.get("rope_theta"))
        if theta is None:
            raise ConfigError("config.json must hold rope_parameters with a rope_theta, which it does not.")
        values = {ours: content[theirs] for ours, theirs in _HUGGING_FACE_NAMES.items()}
        return cls(rope_theta=float(theta), **values)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields under Poet's own names, as a recipe holds them."""
        return {field.name: getattr(self, field.name) for field in fields(self)}
