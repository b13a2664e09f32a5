"""The table between a bundle's names and Megatron's: exact both ways, and strict."""

import dataclasses

import pytest
import torch

from poet.errors import CheckpointError, ConfigError
from poet.model.config import PoetConfig
from poet.model.transformer import PoetTransformer
from poet.testing import tiny_config, tiny_vocabulary
from poet.training.megatron_keymap import from_megatron, megatron_names, renumber, shard, to_megatron, unshard

CONFIG = dataclasses.replace(tiny_config(tiny_vocabulary()), num_heads=12, num_kv_heads=4, ffn_hidden_size=88)


def weights_of(config: PoetConfig) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {name: torch.randn_like(weight) for name, weight in PoetTransformer(config).state_dict().items()}


@pytest.mark.parametrize("tied", [True, False])
def test_a_round_trip_changes_no_bit(tied: bool) -> None:
    config = dataclasses.replace(CONFIG, tie_embeddings=tied)
    weights = weights_of(config)
    theirs = to_megatron(weights, config)
    assert sorted(theirs) == sorted(megatron_names(config))
    back = from_megatron(theirs, config)
    assert back.keys() == weights.keys()
    assert all(torch.equal(back[name], weights[name]) for name in weights)
    assert sum(weight.numel() for weight in theirs.values()) == config.num_parameters


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_what_the_ranks_hold_is_the_whole_again(ranks: int) -> None:
    theirs = to_megatron(weights_of(CONFIG), CONFIG)
    for name, whole in theirs.items():
        parts = [shard(name, whole, CONFIG, rank, ranks) for rank in range(ranks)]
        assert len({tuple(part.shape) for part in parts}) == 1
        assert torch.equal(unshard(name, parts), whole)
    if ranks > 1:
        kept = sum(shard(name, whole, CONFIG, 0, ranks).numel() for name, whole in theirs.items())
        assert kept < 1.05 * CONFIG.num_parameters / ranks


def test_a_rank_holds_whole_groups_of_heads() -> None:
    weights = weights_of(CONFIG)
    name = "decoder.layers.1.self_attention.linear_qkv.weight"
    second = shard(name, to_megatron(weights, CONFIG)[name], CONFIG, 1, 4)
    queries, keys, values = second.split([3 * 16, 16, 16])
    assert torch.equal(queries, weights["model.layers.1.self_attn.q_proj.weight"][48:96])
    assert torch.equal(keys, weights["model.layers.1.self_attn.k_proj.weight"][16:32])
    assert torch.equal(values, weights["model.layers.1.self_attn.v_proj.weight"][16:32])


def test_a_missing_and_an_unknown_weight_are_named() -> None:
    weights = weights_of(CONFIG)
    weights["model.layers.0.mlp.gate.weight"] = weights.pop("model.layers.0.mlp.gate_proj.weight")
    with pytest.raises(CheckpointError, match=r"missing: model.layers.0.mlp.gate_proj.weight; unknown: .*0.mlp.gate.w"):
        to_megatron(weights, CONFIG)
    theirs = to_megatron(weights_of(CONFIG), CONFIG)
    del theirs["decoder.final_layernorm.weight"]
    with pytest.raises(CheckpointError, match=r"missing: decoder\.final_layernorm\.weight; unknown: none"):
        from_megatron(theirs, CONFIG)
    with pytest.raises(CheckpointError, match=r"decoder\.layers\.0\.mlp\.router\.weight"):
        shard("decoder.layers.0.mlp.router.weight", torch.zeros(2, 2), CONFIG, 0, 2)


def test_a_head_beside_a_tied_embedding_is_an_error() -> None:
    weights = weights_of(CONFIG) | {"lm_head.weight": torch.zeros(CONFIG.vocab_size, CONFIG.hidden_size)}
    with pytest.raises(CheckpointError, match=r"unknown: lm_head.weight"):
        to_megatron(weights, CONFIG)


def test_a_wrong_shape_is_named() -> None:
    weights = weights_of(CONFIG)
    weights["model.layers.1.self_attn.k_proj.weight"] = torch.zeros(16, CONFIG.hidden_size)
    with pytest.raises(CheckpointError, match=r"layers.1.self_attn.k_proj.weight must be \(64, 48\), got \(16, 48\)"):
        to_megatron(weights, CONFIG)


def test_ranks_that_differ_in_what_all_hold_are_an_error() -> None:
    with pytest.raises(CheckpointError, match="the same on every"):
        unshard("decoder.layers.0.input_layernorm.weight", [torch.zeros(3), torch.ones(3)])


def test_a_number_of_ranks_that_does_not_divide_is_refused() -> None:
    name = "decoder.layers.0.mlp.linear_fc2.weight"
    with pytest.raises(ConfigError, match="must divide num_heads, got 8 and 12"):
        shard(name, to_megatron(weights_of(CONFIG), CONFIG)[name], CONFIG, 0, 8)


def test_layers_of_a_stage_are_numbered_in_the_whole_model() -> None:
    rename = renumber(7)
    assert rename("decoder.layers.3.mlp.linear_fc2.weight") == "decoder.layers.10.mlp.linear_fc2.weight"
    assert rename("decoder.final_layernorm.weight") == "decoder.final_layernorm.weight"
