"""How a model is cut among processes: the `parallel` group of a recipe. It knows sizes; it imports no engine."""

from __future__ import annotations

import dataclasses
from typing import Final, Literal

from poet.errors import ConfigError
from poet.model.config import PoetConfig

__all__ = ["TARGETS_AT_ONCE", "Parallelism"]

TARGETS_AT_ONCE: Final = 4096
"""Targets whose logits exist at a time; those of a chunk are made again in the backward pass."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Parallelism:
    """How a model is cut among processes; what is left of them is data parallel.

    Attributes:
        tensor_parallel_size: processes that share every matrix.
        pipeline_parallel_size: stages that share the layers.
        context_parallel_size: 1; Poet does not cut scenes among processes.
        sequence_parallel: whether tensor-parallel processes share norms and the residual stream by places.
        first_stage_layers: layers of the first stage; null shares evenly. It also holds the embedding.
        last_stage_layers: of the last, which also holds the head.
        distributed_optimizer: whether data-parallel processes share the optimizer's state.
        micro_batch_size: rows of a forward pass; null takes all rows of a process at once.
        recompute: what is computed again in the backward pass: "none", "selective" (attention), or "full" (layers).

    Raises:
        ConfigError: a value that cannot be used.
    """

    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    context_parallel_size: int = 1
    sequence_parallel: bool = False
    first_stage_layers: int | None = None
    last_stage_layers: int | None = None
    distributed_optimizer: bool = False
    micro_batch_size: int | None = None
    recompute: Literal["none", "selective", "full"] = "none"

    def __post_init__(self) -> None:
        for name in ("tensor_parallel_size", "pipeline_parallel_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}.")
        for name in ("first_stage_layers", "last_stage_layers", "micro_batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be at least 1 or null, got {value}.")
        if self.context_parallel_size != 1:
            raise ConfigError(
                f"context_parallel_size must be 1, got {self.context_parallel_size}: a scene is never cut among "
                "processes. Scenes are short; use tensor_parallel_size with sequence_parallel for long films."
            )
        if self.sequence_parallel and self.tensor_parallel_size == 1:
            raise ConfigError("sequence_parallel must come with a tensor_parallel_size above 1, got 1.")
        uneven = self.first_stage_layers is not None or self.last_stage_layers is not None
        if uneven and self.pipeline_parallel_size == 1:
            raise ConfigError(
                "first_stage_layers and last_stage_layers must come with a pipeline_parallel_size above 1."
            )

    @property
    def model_parallel_size(self) -> int:
        """Processes that hold one copy of the model."""
        return self.tensor_parallel_size * self.pipeline_parallel_size

    def rows_each(self, batch_size: int, processes: int) -> int:
        """Rows of a step that each data-parallel process takes.

        Args:
            batch_size: rows of a step.
            processes: that share the work.

        Raises:
            ConfigError: processes or rows that do not divide.
        """
        if processes < 1 or processes % self.model_parallel_size:
            raise ConfigError(
                f"the number of processes must be a multiple of tensor_parallel_size * pipeline_parallel_size = "
                f"{self.model_parallel_size}, got {processes}."
            )
        copies, micro = processes // self.model_parallel_size, self.micro_batch_size or 1
        if batch_size % (copies * micro):
            raise ConfigError(
                f"batch_size must be a multiple of the {copies} data-parallel processes times micro_batch_size "
                f"{micro}, got {batch_size}."
            )
        return batch_size // copies

    def check_fits(self, config: PoetConfig) -> None:
        """Raise unless the model can be cut so.

        Raises:
            ConfigError: a size that does not divide, or stages without layers.
        """
        for name in ("num_heads", "num_kv_heads", "ffn_hidden_size", "vocab_size"):
            if getattr(config, name) % self.tensor_parallel_size:
                raise ConfigError(
                    f"tensor_parallel_size must divide {name}, got {self.tensor_parallel_size} and "
                    f"{getattr(config, name)}."
                )
        layers, stages = config.num_layers, self.pipeline_parallel_size
        for given in (self.first_stage_layers, self.last_stage_layers):
            if given is not None:
                layers, stages = layers - given, stages - 1
        fits = layers == 0 if stages == 0 else layers >= stages and layers % stages == 0
        if not fits:
            raise ConfigError(
                f"the {config.num_layers} layers must be shared evenly by the stages whose layers are not given; "
                f"{stages} such stages are left with {layers} layers. Set first_stage_layers or last_stage_layers."
            )
