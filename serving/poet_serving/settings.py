"""What vLLM is told when it is started on a bundle, in this process or in one of its own.

Knows a bundle's sizes and vLLM's engine arguments, imports neither vLLM nor a model. Everything here is plain values,
so that a command line can be made of it.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from pathlib import Path
from typing import Any, Final

import torch

from poet.bundle import Bundle
from poet.errors import CheckpointError, ConfigError
from poet.model.config import PoetConfig
from poet.model.lora import Adapter
from poet_serving.adapters import adapter_arguments

__all__ = ["BLOCK_SIZE", "FULL_ATTENTION_KEY", "PROMPT_LENGTHS_KEY", "EngineSettings", "set_environment"]

BLOCK_SIZE: Final = 128
"""Ids in one page of the cache; the CPU kernels want a multiple of 32."""

PROMPT_LENGTHS_KEY: Final = "rswa_window"
"""The configuration key (any value but None) that makes vLLM 0.32 tell attention how long each prompt is.

It belongs to reference sliding-window attention, which the CPU backend does not implement, so nothing else listens.
"""

FULL_ATTENTION_KEY: Final = "films_with_full_attention"
"""The configuration key that makes every layer see all scenes of a film."""

SMALL_MODEL: Final = 50_000_000
"""Parameters. Below, a step's kernels are so short that waking threads for each costs more than they save, and on a
busy machine, where every kernel waits for the thread that was put off, many times more."""

NO_CACHE: Final = {"runner": "pooling", "kv_cache_memory_bytes": 2**20}
"""What vLLM is told of a model without a cache. Left to itself it wants most of the machine's memory to be free."""

# What vLLM reads from the environment: defaults that a user may set otherwise.
_ENVIRONMENT: Final = {
    "OMP_WAIT_POLICY": "PASSIVE",  # threads that wait by spinning cost a factor of ten on a busy machine
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_LOGGING_STREAM": "ext://sys.stderr",  # standard output belongs to the command's result
    "VLLM_NO_USAGE_STATS": "1",
}


def set_environment() -> None:
    """Set what vLLM reads from the environment, where the user has not; to be called before vLLM is imported."""
    for key, value in _ENVIRONMENT.items():
        os.environ.setdefault(key, value)


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineSettings:
    """How vLLM runs a bundle's models.

    Attributes:
        bundle_dir: directory with `config.json` and `model.safetensors`.
        config: the model's.
        dtype: "float32" or "bfloat16".
        max_num_seqs: requests that are written at once, guided ones counted twice.
        num_cache_blocks: pages of `BLOCK_SIZE` ids in the cache; None: enough that `max_num_seqs` requests of full
            length fit and none is ever preempted.
        num_threads: threads of a step; None: one where a model of less than `SMALL_MODEL` parameters writes one id
            after another, else as many as PyTorch has.
        adapters: LoRA adapters that requests may name.
        num_scenes: scenes of the longest film; 1: scenes stand alone.
        full_attention: whether every layer sees all scenes of a film, to compare what that costs: no model is trained
            so.
    """

    bundle_dir: Path
    config: PoetConfig
    dtype: str
    max_num_seqs: int
    num_cache_blocks: int | None = None
    num_threads: int | None = None
    adapters: tuple[Adapter, ...] = ()
    num_scenes: int = 1
    full_attention: bool = False

    def __post_init__(self) -> None:
        options = ("max_num_seqs", "num_threads", "num_scenes")
        for option, value in ((name, getattr(self, name)) for name in options):
            if value is not None and value < 1:
                raise ConfigError(f"{option} must be at least 1, got {value}.")
        if self.longest > self.config.max_position_embeddings:
            raise ConfigError(
                f"num_scenes must be at most {self.config.max_position_embeddings // self.config.scene_length}, for "
                f"which the model has positions, got {self.num_scenes}."
            )
        if self.num_scenes > 1 and self.config.scene_length % BLOCK_SIZE:
            raise ConfigError(
                f"films need a scene_length that is a multiple of {BLOCK_SIZE}, this model's is "
                f"{self.config.scene_length}. Use the torch engine."
            )
        if self.blocks <= self._blocks_each:
            raise ConfigError(
                f"num_cache_blocks must be at least {self._blocks_each + 1}, so that the longest request fits, "
                f"got {self.blocks}."
            )

    @classmethod
    def of_bundle(cls, bundle_dir: Path, *, dtype: str = "auto", **sizes: Any) -> EngineSettings:
        """Read a bundle's sizes.

        Args:
            bundle_dir: directory of the bundle.
            dtype: "auto" is bfloat16 on processors that multiply in it.
            **sizes: the other attributes.

        Raises:
            CheckpointError: the directory holds no model.
            ConfigError: an option that cannot be used.
        """
        if dtype not in ("auto", "float32", "bfloat16"):
            raise ConfigError(f"dtype must be 'auto', 'float32' or 'bfloat16', got {dtype!r}.")
        config = _read_config(bundle_dir)
        return cls(bundle_dir=bundle_dir, config=config, dtype=_fastest_dtype() if dtype == "auto" else dtype, **sizes)

    @property
    def longest(self) -> int:
        """Ids of the longest request: a film's earlier scenes and the one that is written."""
        return self.num_scenes * self.config.scene_length

    @property
    def blocks(self) -> int:
        """Pages of the cache; one page of any pool is vLLM's own."""
        return 1 + self.max_num_seqs * self._blocks_each if self.num_cache_blocks is None else self.num_cache_blocks

    @property
    def pair_blocks(self) -> int:
        """Pages without which no guided request fits."""
        return 1 + 2 * self._blocks_each

    @property
    def takes_pairs(self) -> bool:
        """Whether guided requests fit."""
        return self.max_num_seqs > 1 and self.blocks >= self.pair_blocks

    @property
    def num_threads_in_turn(self) -> int | None:
        """Threads of a step that writes one id after another; None: PyTorch's own number."""
        small = self.config.num_parameters < SMALL_MODEL
        return 1 if self.num_threads is None and small else self.num_threads

    def causal(self) -> dict[str, Any]:
        """Engine arguments of the model that writes one id after another."""
        return (
            self._common()
            | adapter_arguments(self.adapters)
            | {
                "max_num_batched_tokens": max(
                    2 * self.longest, 2048
                ),  # a guided request is read together with its guide
                "block_size": BLOCK_SIZE,
                "num_gpu_blocks_override": self.blocks,
                "kv_cache_memory_bytes": self.blocks * self._block_bytes,
            }
        )

    def canvases(self) -> dict[str, Any]:
        """Engine arguments of the model that fills canvases."""
        from poet_serving.plugin import CANVAS_ARCHITECTURE

        return (
            self._common()
            | NO_CACHE
            | adapter_arguments(self.adapters)
            | {
                "max_num_batched_tokens": max(2, self.max_num_seqs) * self.longest,
                "hf_overrides": {PROMPT_LENGTHS_KEY: 1, "architectures": [CANVAS_ARCHITECTURE]},
            }
        )

    def upsampler(self, bundle: Bundle, scale: int) -> dict[str, Any]:
        """Engine arguments of the bundle's upsampler, for clips of the bundle's length and size."""
        places = math.prod(bundle.geometry().latent_shape) * scale**2
        own = {
            "model": str(bundle.check_upsampler()),
            "max_model_len": places,
            "max_num_batched_tokens": self.max_num_seqs * places,
        }
        return self._common() | NO_CACHE | own

    def _common(self) -> dict[str, Any]:
        return {
            "model": str(self.bundle_dir),
            "dtype": self.dtype,
            "max_num_seqs": self.max_num_seqs,
            "max_model_len": self.longest,
            "enforce_eager": True,
            "hf_overrides": {PROMPT_LENGTHS_KEY: 1} | ({FULL_ATTENTION_KEY: True} if self.full_attention else {}),
            "enable_prefix_caching": False,
            "enable_chunked_prefill": False,
            "async_scheduling": False,
            "skip_tokenizer_init": True,
            "generation_config": "vllm",  # a bundle's generation_config.json holds Poet's defaults, not Hugging Face's
        }

    @property
    def _blocks_each(self) -> int:
        scene = -(-self.config.scene_length // BLOCK_SIZE)
        if not self._pages_by_layer:
            return scene * self.num_scenes  # a page holds all layers
        return -(-self.longest // BLOCK_SIZE) + (self.config.num_layers - 1) * scene  # each one of its own

    @property
    def page_bytes(self) -> int:
        """Of the keys and values of one layer, `BLOCK_SIZE` ids of them."""
        numbers = 2 * self.config.num_kv_heads * self.config.head_dim * BLOCK_SIZE
        return numbers * (4 if self.dtype == "float32" else 2)

    @property
    def _pages_by_layer(self) -> bool:
        return self.num_scenes > 1 and not self.full_attention

    @property
    def _block_bytes(self) -> int:
        return self.page_bytes * (1 if self._pages_by_layer else self.config.num_layers)


def _read_config(bundle_dir: Path) -> PoetConfig:
    try:
        content = json.loads((bundle_dir / "config.json").read_text(encoding="utf-8"))
        return PoetConfig.from_huggingface_dict(content)
    except (OSError, json.JSONDecodeError, ConfigError) as error:
        raise CheckpointError(f"{bundle_dir} must be a bundle with a model: {error}") from error


def _fastest_dtype() -> str:
    capabilities = torch.cpu.get_capabilities()
    multiplies = capabilities.get("avx512_bf16") or capabilities.get("amx_bf16")
    return "bfloat16" if multiplies else "float32"
