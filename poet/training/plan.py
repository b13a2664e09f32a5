"""What a training run will need, before it is begun: parameters, operations, memory of a GPU by part, GPU-hours.

Memory is counted tensor by tensor as `poet.training.megatron_model` keeps it between its forward and backward pass; a
test holds the count against a real pass. What allocators, kernels and communication need besides is not in it: leave a
tenth free. Knows sizes; it imports no engine and builds nothing.

Legend: C hidden size, F feed-forward size, Q and K channels of all query heads and of all key heads, V vocabulary, R
tensor-parallel ranks.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Final

from poet.errors import ConfigError
from poet.model.config import PoetConfig
from poet.training.parallelism import TARGETS_AT_ONCE, Parallelism
from poet.training.speed import PEAK_FLOPS, flops_per_id

__all__ = ["GPUS", "Memory", "Plan", "activation_bytes_per_id", "make_plan"]

GPUS: Final = {"h100": (80e9, PEAK_FLOPS["H100"]), "h200": (141e9, PEAK_FLOPS["H200"])}
"""Bytes of memory, from NVIDIA's data sheets (SXM), and dense bfloat16 operations a second."""

LOGIT_BYTES: Final = 12
"""A logit of the chunk at hand: float32 itself, its softmax, and its gradient."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes of one GPU of the fullest pipeline stage, by part."""

    weights: float
    gradients: float
    optimizer: float
    averages: float
    activations: float
    logits: float

    @property
    def total(self) -> float:
        """All parts."""
        return sum(getattr(self, field.name) for field in dataclasses.fields(self))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What `make_plan` found.

    Attributes:
        parameters: of the model, and those of them that are not the embedding or the head.
        flops_per_id: of a forward and backward pass; see `poet.training.speed.flops_per_id`.
        gpus: that share the work, and of them `data_parallel` with a copy of the model each.
        memory: of one GPU.
        gpu_memory: that it has.
        row_length: ids of a row.
        ids: of the whole run.
        gpu_hours: at the share of the peak that was assumed.
    """

    parameters: int
    layer_parameters: int
    flops_per_id: float
    gpus: int
    data_parallel: int
    memory: Memory
    gpu_memory: float
    row_length: int
    ids: float
    gpu_hours: float

    @property
    def fits(self) -> bool:
        """Whether nine tenths of a GPU's memory are enough."""
        return self.memory.total <= 0.9 * self.gpu_memory

    def to_dict(self) -> dict[str, Any]:
        """Plain values, bytes in GB."""
        parts = {field.name: getattr(self.memory, field.name) for field in dataclasses.fields(self.memory)}
        return {
            "parameters": self.parameters,
            "layer_parameters": self.layer_parameters,
            "gflops_per_id": round(self.flops_per_id / 1e9, 3),
            "gpus": self.gpus,
            "data_parallel": self.data_parallel,
            "memory_gb": {name: round(value / 1e9, 3) for name, value in {**parts, "total": self.memory.total}.items()},
            "gpu_memory_gb": round(self.gpu_memory / 1e9, 1),
            "fits": self.fits,
            "row_length": self.row_length,
            "ids": self.ids,
            "gpu_hours": round(self.gpu_hours, 1),
            "hours": round(self.gpu_hours / self.gpus, 1),
        }


def make_plan(
    config: PoetConfig,
    parallelism: Parallelism,
    *,
    gpu: str,
    gpus: int,
    batch_size: int,
    row_length: int,
    ids: float,
    bf16: bool = True,
    mfu: float = 0.4,
    target_share: float = 0.8,
) -> Plan:
    """Work out what a run needs.

    Args:
        config: of the model.
        parallelism: how it is cut.
        gpu: a name in `GPUS`.
        gpus: that share the work.
        batch_size: rows of a step.
        row_length: ids of a row.
        ids: of the whole run.
        bf16: whether weights and activations are bfloat16, beside which the optimizer keeps float32 ones.
        mfu: share of the peak that is assumed for the GPU-hours.
        target_share: of the ids, how many are targets.

    Raises:
        ConfigError: an unknown GPU, or a model or batch that cannot be cut so.
    """
    if gpu not in GPUS:
        raise ConfigError(f"gpu must be one of {', '.join(GPUS)}, got {gpu!r}.")
    parallelism.check_fits(config)
    if gpus < 1 or gpus % parallelism.model_parallel_size:
        raise ConfigError(
            f"gpus must be a multiple of tensor_parallel_size * pipeline_parallel_size = "
            f"{parallelism.model_parallel_size}, got {gpus}."
        )
    data_parallel = gpus // parallelism.model_parallel_size
    micro = parallelism.micro_batch_size or batch_size // data_parallel
    if micro < 1 or batch_size % (data_parallel * micro):
        raise ConfigError(
            f"batch_size must be a multiple of the {data_parallel} data-parallel GPUs times micro_batch_size "
            f"{max(micro, 1)}, got {batch_size}."
        )
    flops = flops_per_id(config, row_length)
    gpu_memory, peak = GPUS[gpu]
    stages = range(parallelism.pipeline_parallel_size)
    memories = [
        _stage_memory(config, parallelism, stage, data_parallel, micro * row_length, target_share, bf16=bf16)
        for stage in stages
    ]
    tables = config.vocab_size * config.hidden_size * (1 if config.tie_embeddings else 2)
    return Plan(
        parameters=config.num_parameters,
        layer_parameters=config.num_parameters - tables,
        flops_per_id=flops,
        gpus=gpus,
        data_parallel=data_parallel,
        memory=max(memories, key=lambda memory: memory.total),
        gpu_memory=gpu_memory,
        row_length=row_length,
        ids=ids,
        gpu_hours=ids * flops / (peak * mfu) / 3600,
    )


def _stage_memory(
    config: PoetConfig, cut: Parallelism, stage: int, data_parallel: int, ids: int, target_share: float, *, bf16: bool
) -> Memory:
    """One GPU of a pipeline stage; `ids` are those of a micro batch."""
    ranks, stages = cut.tensor_parallel_size, cut.pipeline_parallel_size
    layers = _layers_of(config, cut, stage)
    first, last = stage == 0, stage == stages - 1
    weights = layers * _layer_parameters(config, ranks)
    table = config.vocab_size * config.hidden_size / ranks
    if first or (last and (stages > 1 or not config.tie_embeddings)):
        weights += table
    if first and last and not config.tie_embeddings:
        weights += table
    shared = data_parallel if cut.distributed_optimizer else 1
    under_way = stages - stage  # micro batches between their forward and backward pass, one forward one backward
    size = 2 if bf16 else 4
    activations = under_way * ids * layers * activation_bytes_per_id(config, cut, value_bytes=size)
    if cut.recompute == "full":  # one layer at a time is made again
        made_again = dataclasses.replace(cut, recompute="none")
        activations += ids * activation_bytes_per_id(config, made_again, value_bytes=size)
    if last:  # the last norm, and its output where there is a target
        activations += ids * config.hidden_size * (4 + size + size * target_share)
    targets = min(TARGETS_AT_ONCE, math.ceil(ids * target_share))
    return Memory(
        weights=size * weights,
        gradients=4 * weights,
        optimizer=(12 if bf16 else 8) * weights / shared,
        averages=4 * weights,
        activations=activations,
        logits=LOGIT_BYTES * targets * config.vocab_size / ranks if last else 0.0,
    )


def activation_bytes_per_id(config: PoetConfig, cut: Parallelism, *, value_bytes: int) -> float:
    """Bytes that one layer keeps of one id from its forward to its backward pass.

    Norms keep their input in float32, what they made of it, and that times their gains, which is the next matrix's
    input; queries and keys likewise after the fused projection. The gated feed-forward keeps gate and up as they come
    out of one matrix, the gate by itself, its SiLU, and the product. Attention that is not recomputed keeps the rotated
    queries and keys, and its row sums.

    Args:
        config: of the model.
        cut: how it is cut, and what is recomputed.
        value_bytes: of an activation: 2 in bfloat16, 4 in float32, in which a copy in float32 is no copy.
    """
    ranks = cut.tensor_parallel_size
    hidden = config.hidden_size / (ranks if cut.sequence_parallel else 1)
    if cut.recompute == "full":
        return hidden * value_bytes
    query = config.num_heads * config.head_dim / ranks
    key = config.num_kv_heads * config.head_dim / ranks
    norm = 4 + 2 * value_bytes  # input, normed, scaled
    kept = 2 * hidden * norm + query * norm + key * (2 * value_bytes + (4 if value_bytes < 4 else 0))
    kept += (query + 2 * key) * value_bytes  # the fused projection, of which values and keys are views
    kept += query * value_bytes  # what attention gives to its output projection
    kept += 5 * config.ffn_hidden_size / ranks * value_bytes
    if cut.recompute == "none":
        kept += (query + key) * value_bytes + 4 * config.num_heads / ranks
    return kept


def _layer_parameters(config: PoetConfig, ranks: int) -> float:
    query, key_value = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    matrices = config.hidden_size * (2 * query + 2 * key_value) + 3 * config.hidden_size * config.ffn_hidden_size
    return matrices / ranks + 2 * config.hidden_size + 2 * config.head_dim


def _layers_of(config: PoetConfig, cut: Parallelism, stage: int) -> int:
    """Layers of a stage."""
    stages = cut.pipeline_parallel_size
    given = {0: cut.first_stage_layers, stages - 1: cut.last_stage_layers} if stages > 1 else {}
    own = given.get(stage)
    if own is not None:
        return own
    rest = [number for number in range(stages) if given.get(number) is None]
    return (config.num_layers - sum(layers for layers in given.values() if layers is not None)) // len(rest)
