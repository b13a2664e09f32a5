"""One table between the names of a bundle's weights and Megatron's, with what is done to the numbers on the way.

Hugging Face's names are canonical. Megatron fuses query, key and value of a layer into one matrix, group by group, and
gate and up into another, and cuts matrices among tensor-parallel ranks; a pipeline stage holds some of the layers.
Every function here is exact in both directions, and every name must be used once: one that is missing, unknown or there
twice is an error that names it. This file knows names and shapes; it imports no Megatron.

Legend: C hidden size, F feed-forward size, H query heads, G key and value heads, D width of a head, V vocabulary,
R tensor-parallel ranks.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Final, Literal

import torch
from torch import Tensor

from poet.errors import CheckpointError, ConfigError
from poet.model.config import PoetConfig

__all__ = ["KEYMAP", "Entry", "from_megatron", "megatron_names", "renumber", "shard", "to_megatron", "unshard"]

Split = Literal["rows", "columns", "halves", "groups", "none"]


@dataclass(frozen=True)
class Entry:
    """One row of the table.

    Attributes:
        ours: canonical names, in the order in which their rows are fused; "{}" stands for the layer.
        theirs: Megatron's name.
        split: how tensor parallelism cuts the fused matrix: by rows, columns, rows of each of its two halves, whole
            groups of heads, or not at all.
    """

    ours: tuple[str, ...]
    theirs: str
    split: Split


KEYMAP: Final = (
    Entry(("model.embed_tokens.weight",), "embedding.word_embeddings.weight", "rows"),
    Entry(("model.layers.{}.input_layernorm.weight",), "decoder.layers.{}.input_layernorm.weight", "none"),
    Entry(
        tuple(f"model.layers.{{}}.self_attn.{part}_proj.weight" for part in "qkv"),
        "decoder.layers.{}.self_attention.linear_qkv.weight",
        "groups",
    ),
    Entry(("model.layers.{}.self_attn.q_norm.weight",), "decoder.layers.{}.self_attention.q_layernorm.weight", "none"),
    Entry(("model.layers.{}.self_attn.k_norm.weight",), "decoder.layers.{}.self_attention.k_layernorm.weight", "none"),
    Entry(
        ("model.layers.{}.self_attn.o_proj.weight",), "decoder.layers.{}.self_attention.linear_proj.weight", "columns"
    ),
    Entry(("model.layers.{}.post_attention_layernorm.weight",), "decoder.layers.{}.pre_mlp_layernorm.weight", "none"),
    Entry(
        ("model.layers.{}.mlp.gate_proj.weight", "model.layers.{}.mlp.up_proj.weight"),
        "decoder.layers.{}.mlp.linear_fc1.weight",
        "halves",
    ),
    Entry(("model.layers.{}.mlp.down_proj.weight",), "decoder.layers.{}.mlp.linear_fc2.weight", "columns"),
    Entry(("model.norm.weight",), "decoder.final_layernorm.weight", "none"),
    Entry(("lm_head.weight",), "output_layer.weight", "rows"),
)

_LAYER: Final = re.compile(r"(?<=\.layers\.)\d+(?=\.)")
_BY_THEIRS: Final = {entry.theirs: entry for entry in KEYMAP}


def to_megatron(weights: Mapping[str, Tensor], config: PoetConfig) -> dict[str, Tensor]:
    """All of a bundle's weights under Megatron's names, uncut.

    Args:
        weights: canonical name to tensor, exactly those of the model.
        config: of the model.

    Raises:
        CheckpointError: a name is missing, unknown, or has a tensor of another shape; the message names it.
    """
    _check_names(weights, _canonical_names(config), "the bundle")
    result = {}
    for name, entry, layer in _rows(config):
        parts = [weights[own.format(layer)] for own in entry.ours]
        for own, part in zip(entry.ours, parts, strict=True):
            _check_shape(own.format(layer), part, _canonical_shape(own, config))
        result[name] = _fuse(parts, entry, config)
    return result


def from_megatron(weights: Mapping[str, Tensor], config: PoetConfig) -> dict[str, Tensor]:
    """Inverse of `to_megatron`.

    Raises:
        CheckpointError: as `to_megatron`.
    """
    _check_names(weights, megatron_names(config), "the Megatron checkpoint")
    result: dict[str, Tensor] = {}
    for name, entry, layer in _rows(config):
        fused = weights[name]
        shapes = [_canonical_shape(own, config) for own in entry.ours]
        _check_shape(name, fused, (sum(shape[0] for shape in shapes), *shapes[0][1:]))
        for own, part in zip(entry.ours, _unfuse(fused, entry, config), strict=True):
            result[own.format(layer)] = part
    return result


def megatron_names(config: PoetConfig, layers: Iterable[int] | None = None) -> list[str]:
    """Megatron's names of a whole model, or of those weights of it that belong to `layers`."""
    kept = None if layers is None else set(layers)
    return [name for name, _, layer in _rows(config) if kept is None or layer in kept]


def shard(name: str, weight: Tensor, config: PoetConfig, rank: int, world_size: int) -> Tensor:
    """What one tensor-parallel rank holds of a weight.

    Args:
        name: Megatron's, with any layer's number.
        weight: uncut.
        config: of the model.
        rank: in [0, world_size).
        world_size: R.

    Raises:
        CheckpointError: the table has no such name.
        ConfigError: R does not divide what is cut.
    """
    split = _entry_of(name).split
    if split == "none" or world_size == 1:
        return weight
    _check_divides(config, world_size)
    if split == "columns":
        return weight.chunk(world_size, 1)[rank].contiguous()
    if split == "halves":
        return torch.cat([half.chunk(world_size, 0)[rank] for half in weight.chunk(2, 0)])
    return weight.chunk(world_size, 0)[rank].contiguous()  # groups of heads follow each other, so rows will do


def unshard(name: str, parts: list[Tensor]) -> Tensor:
    """Inverse of `shard` over all ranks, in order.

    Raises:
        CheckpointError: the table has no such name, or what every rank holds whole differs between them.
    """
    split = _entry_of(name).split
    if split == "none":
        if not all(torch.equal(part, parts[0]) for part in parts):
            raise CheckpointError(f"{name} must be the same on every tensor-parallel rank, it is not.")
        return parts[0]
    if split == "columns":
        return torch.cat(parts, 1)
    if split == "halves":
        halves = [part.chunk(2, 0) for part in parts]
        return torch.cat([half[place] for place in range(2) for half in halves])
    return torch.cat(parts)


# ------------------------------------------------------------------------------------------------------------- fusing


def _fuse(parts: list[Tensor], entry: Entry, config: PoetConfig) -> Tensor:
    if entry.split != "groups":
        return parts[0] if len(parts) == 1 else torch.cat(parts)
    by_group = [part.view(config.num_kv_heads, -1, part.shape[1]) for part in parts]
    return torch.cat(by_group, 1).flatten(0, 1)


def _unfuse(fused: Tensor, entry: Entry, config: PoetConfig) -> list[Tensor]:
    if entry.split != "groups":
        return [part.contiguous() for part in fused.chunk(len(entry.ours))]
    queries = config.num_heads // config.num_kv_heads * config.head_dim
    by_group = fused.view(config.num_kv_heads, -1, fused.shape[1])
    parts = by_group.split([queries, config.head_dim, config.head_dim], 1)
    return [part.flatten(0, 1).contiguous() for part in parts]


# -------------------------------------------------------------------------------------------------- names and shapes


def _rows(config: PoetConfig) -> list[tuple[str, Entry, int | None]]:
    """(Megatron's name, entry, layer or None) of every weight of a model."""
    rows: list[tuple[str, Entry, int | None]] = []
    for entry in KEYMAP:
        if entry.theirs == "output_layer.weight" and config.tie_embeddings:
            continue
        layers: list[int | None] = [*range(config.num_layers)] if "{}" in entry.theirs else [None]
        rows += [(entry.theirs.format(layer), entry, layer) for layer in layers]
    return rows


def _canonical_names(config: PoetConfig) -> list[str]:
    return [own.format(layer) for _, entry, layer in _rows(config) for own in entry.ours]


def _canonical_shape(name: str, config: PoetConfig) -> tuple[int, ...]:
    hidden, inner = config.hidden_size, config.ffn_hidden_size
    query, key_value = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    shapes: dict[str, tuple[int, ...]] = {
        "embed_tokens": (config.vocab_size, hidden),
        "lm_head": (config.vocab_size, hidden),
        "q_proj": (query, hidden),
        "k_proj": (key_value, hidden),
        "v_proj": (key_value, hidden),
        "o_proj": (hidden, query),
        "gate_proj": (inner, hidden),
        "up_proj": (inner, hidden),
        "down_proj": (hidden, inner),
        "q_norm": (config.head_dim,),
        "k_norm": (config.head_dim,),
    }
    return shapes.get(name.split(".")[-2], (hidden,))


def _entry_of(name: str) -> Entry:
    entry = _BY_THEIRS.get(_LAYER.sub("{}", name))
    if entry is None:
        raise CheckpointError(f"{name!r} must be a weight of Poet's Megatron model, it is not one.")
    return entry


def _check_names(found: Iterable[str], expected: list[str], what: str) -> None:
    there = list(found)
    twice = sorted({name for name in there if there.count(name) > 1}) if len(set(there)) < len(there) else []
    missing, unknown = sorted(set(expected) - set(there)), sorted(set(there) - set(expected))
    if missing or unknown or twice:
        raise CheckpointError(
            f"{what} must hold exactly the weights of the model; missing: {', '.join(missing) or 'none'}; unknown: "
            f"{', '.join(unknown) or 'none'}; twice: {', '.join(twice) or 'none'}."
        )


def _check_shape(name: str, weight: Tensor, expected: tuple[int, ...]) -> None:
    if tuple(weight.shape) != expected:
        raise CheckpointError(f"{name} must be {expected}, got {tuple(weight.shape)}.")


def _check_divides(config: PoetConfig, world_size: int) -> None:
    for name in ("num_heads", "num_kv_heads", "ffn_hidden_size", "vocab_size"):
        if getattr(config, name) % world_size:
            raise ConfigError(f"tensor_parallel_size must divide {name}, got {world_size} and {getattr(config, name)}.")


Rename = Callable[[str], str]


def renumber(offset: int) -> Rename:
    """A function from the names of a pipeline stage, whose layers count from 0, to those of the whole model."""
    return lambda name: _LAYER.sub(lambda found: str(int(found.group()) + offset), name)
