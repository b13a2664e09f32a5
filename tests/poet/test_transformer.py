"""The reference transformer: against transformers' Qwen3, cached against uncached, and what may depend on what."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from poet.errors import CheckpointError, ConfigError, ShapeError
from poet.model import attention
from poet.model.attention import SceneLayout
from poet.model.config import PoetConfig
from poet.model.transformer import KeyValueCache, PoetTransformer
from poet.model.weights import load_transformer, save_weights

CONFIG = PoetConfig(
    vocab_size=128,
    hidden_size=44,
    ffn_hidden_size=76,
    num_layers=3,
    num_heads=6,
    num_kv_heads=2,
    head_dim=10,
    scene_length=31,
    max_position_embeddings=93,
)


def build(seed: int = 0, **changes: Any) -> PoetTransformer:
    """A model with weights so large that every connection shows in its output."""
    torch.manual_seed(seed)
    model = PoetTransformer(dataclasses.replace(CONFIG, **changes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.normal_(std=parameter.shape[1] ** -0.5)
    return model


def draw_ids(rows: int, length: int) -> torch.Tensor:
    return torch.randint(0, CONFIG.vocab_size, (rows, length), generator=torch.Generator().manual_seed(1))


def rows_of(prefix_lengths: list[int], lengths: list[int], max_len: int, **options: Any) -> SceneLayout:
    return SceneLayout.from_prefix_lengths(torch.tensor(prefix_lengths), torch.tensor(lengths), max_len, **options)


@pytest.mark.parametrize("tied", [True, False])
def test_logits_equal_those_of_qwen3_in_transformers(tied: bool) -> None:
    model = build(tie_embeddings=tied, rope_theta=500.0, norm_eps=1e-3)
    content = model.config.to_huggingface_dict()
    del content["model_type"], content["architectures"]
    qwen = Qwen3ForCausalLM(Qwen3Config(**content, attn_implementation="eager")).eval()
    missing, unexpected = qwen.load_state_dict(model.state_dict(), strict=False)
    assert set(missing) <= ({"lm_head.weight"} if tied else set())
    assert not unexpected
    ids = draw_ids(3, 29)
    with torch.no_grad():
        found = model.logits(model(ids, rows_of([0, 0, 0], [29] * 3, 29)))
        # Two orders of float32 sums over logits of deviation 1.
        torch.testing.assert_close(found, qwen(ids).logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize("tied", [True, False])
def test_config_counts_the_parameters_of_the_built_model(tied: bool) -> None:
    model = build(tie_embeddings=tied)
    assert model.config.num_parameters == sum(parameter.numel() for parameter in model.parameters())


@torch.no_grad()
@pytest.mark.parametrize("left", [True, False])
def test_cached_equals_uncached_whatever_the_steps(left: bool) -> None:
    model = build()
    # With padding on the right, a row of no prefix at all may be cut anywhere too.
    layout = rows_of([7, 3, 5], [29, 23, 29], 29, left_padded=left)
    ids = draw_ids(3, 29)
    whole = model(ids, layout)
    cache = KeyValueCache(model.config, 3, 29)
    steps = [13, 1, 1, 5, 1, 8]
    parts = []
    for step in steps:
        parts.append(model(ids[:, cache.length : cache.length + step], layout, cache=cache))
    assert cache.length == 29
    inside = layout.document != attention.PADDING
    torch.testing.assert_close(torch.cat(parts, 1)[inside], whole[inside], atol=1e-5, rtol=0)


@torch.no_grad()
def test_cached_film_equals_uncached_film_scene_by_scene() -> None:
    model = build()
    layout = SceneLayout.from_films(torch.tensor([[3, 5, 2], [7, 0, 11]]), 13)
    ids = draw_ids(2, 39)
    cache = KeyValueCache(model.config, 2, 39)
    parts = [model(ids[:, start : start + 13], layout, cache=cache) for start in (0, 13, 26)]
    torch.testing.assert_close(torch.cat(parts, 1), model(ids, layout), atol=1e-5, rtol=0)


@torch.no_grad()
def changed_places(model: PoetTransformer, layout: SceneLayout, place: int) -> list[int]:
    """Places whose hidden state depends on the id at `place`."""
    ids = draw_ids(*layout.shape)
    other = ids.clone()
    other[0, place] = (other[0, place] + 1) % CONFIG.vocab_size
    difference = (model(ids, layout) - model(other, layout)).abs().amax(-1)[0]
    return difference.nonzero().flatten().tolist()


def test_prefix_sees_itself_both_ways_and_the_output_only_what_came_before() -> None:
    layout = rows_of([5], [11], 13)
    assert changed_places(build(), layout, 4) == list(range(11))
    assert changed_places(build(), layout, 5) == list(range(5, 11))
    assert changed_places(build(), layout, 9) == [9, 10]


def test_ids_do_not_depend_on_padding() -> None:
    assert changed_places(build(), rows_of([5], [11], 13), 12) == [12]
    assert changed_places(build(), rows_of([5], [11], 13, left_padded=True), 0) == [0, 1]


def test_parallel_scene_depends_on_all_of_itself() -> None:
    assert changed_places(build(), rows_of([5], [11], 13, parallel=torch.tensor([True])), 10) == list(range(11))


def test_packed_scenes_do_not_depend_on_each_other() -> None:
    layout = SceneLayout.from_packed(torch.tensor([[2, 3]]), torch.tensor([[7, 5]]), 13)
    assert changed_places(build(), layout, 1) == list(range(7))
    assert changed_places(build(), layout, 8) == list(range(7, 12))


def test_only_layer_0_carries_earlier_scenes_to_later_ones() -> None:
    layout = SceneLayout.from_films(torch.tensor([[2, 3]]), 7)
    model = build()
    assert changed_places(model, layout, 6) == list(range(6, 14))
    with torch.no_grad():
        model.model.layers[0].self_attn.o_proj.weight.zero_()
    assert changed_places(model, layout, 6) == [6]


@torch.no_grad()
def test_rows_shifted_by_left_padding_have_the_same_hidden_states() -> None:
    model = build()
    ids = draw_ids(1, 11)
    plain = model(ids, rows_of([5], [11], 11))
    shifted = torch.cat((draw_ids(1, 6), ids), 1)
    padded = model(shifted, rows_of([5], [11], 17, left_padded=True))
    torch.testing.assert_close(padded[:, 6:], plain, atol=1e-5, rtol=0)


def test_training_in_bfloat16_follows_float32() -> None:
    model, layout, ids = build(), rows_of([7, 3], [29, 23], 29), draw_ids(2, 29)
    gradients = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = torch.nn.functional.cross_entropy(
                model.logits(model(ids, layout)).flatten(0, 1).float(), ids.flatten()
            )
        found = torch.autograd.grad(loss, list(model.parameters()))
        assert all(gradient.dtype == torch.float32 for gradient in found)
        gradients.append(torch.cat([gradient.flatten() for gradient in found]))
    # bfloat16 keeps 8 bits: single gradients differ by per cents, their direction hardly.
    assert torch.nn.functional.cosine_similarity(*gradients, dim=0) > 0.999


def test_matrices_that_write_into_the_residual_stream_start_smaller() -> None:
    torch.manual_seed(0)
    layer = PoetTransformer(dataclasses.replace(CONFIG, num_layers=8)).model.layers[5]
    pairs = ((layer.self_attn.o_proj, layer.self_attn.q_proj), (layer.mlp.down_proj, layer.mlp.up_proj))
    for small, large in pairs:
        assert float(large.weight.detach().std()) == pytest.approx(0.02, rel=0.1)
        assert float(small.weight.detach().std()) == pytest.approx(0.02 / 4, rel=0.1)


def test_ids_that_do_not_fit_the_layout_or_cache_are_refused() -> None:
    model, layout = build(), rows_of([5], [11], 13)
    with pytest.raises(ShapeError, match=r"\(1, 13\)"):
        model(draw_ids(1, 11), layout)
    with pytest.raises(ShapeError, match=r"got \(2, 13\)"):
        model(draw_ids(2, 13), layout)
    with pytest.raises(ShapeError, match="room for 7"):
        model(draw_ids(1, 11), layout, cache=KeyValueCache(CONFIG, 1, 7))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 129}, "multiple of 128"),
        ({"num_kv_heads": 4}, "multiple of num_kv_heads"),
        ({"head_dim": 11}, "even"),
        ({"hidden_size": 0}, "hidden_size must be a positive"),
        ({"num_layers": 2.0}, "num_layers must be a positive whole"),
        ({"max_position_embeddings": 30}, "scene_length must be at most"),
        ({"norm_eps": 0.0}, "norm_eps must be a positive number"),
        ({"tie_embeddings": 1}, "tie_embeddings must be true or false"),
    ],
)
def test_configs_that_cannot_work_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(CONFIG, **changes)


def test_config_comes_back_from_its_hugging_face_form() -> None:
    config = dataclasses.replace(CONFIG, rope_theta=5e5, norm_eps=1e-5, tie_embeddings=False)
    content = json.loads(json.dumps(config.to_huggingface_dict(fingerprint="abc")))
    assert PoetConfig.from_huggingface_dict(content) == config
    assert content["poet_fingerprint"] == "abc"
    assert PoetConfig(**config.to_dict()) == config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_act": "gelu"}, "hidden_act must be 'silu'"),
        ({"attention_bias": True}, "attention_bias must be False"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1.0}}, "rope_type must be 'default'"),
        ({"rope_parameters": None}, "rope_theta"),
    ],
)
def test_config_of_another_model_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PoetConfig.from_huggingface_dict(CONFIG.to_huggingface_dict() | changes)


def test_config_without_scene_length_is_refused() -> None:
    content = CONFIG.to_huggingface_dict()
    del content["scene_length"]
    with pytest.raises(ConfigError, match="must hold scene_length"):
        PoetConfig.from_huggingface_dict(content)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    save_weights(build(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(CONFIG.to_huggingface_dict()))
    return tmp_path


def test_weights_come_back_as_they_were_saved(directory: Path) -> None:
    loaded = load_transformer(directory)
    expected = build().state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    assert all(torch.equal(loaded.state_dict()[name], tensor) for name, tensor in expected.items())
    assert load_transformer(directory, dtype=torch.bfloat16).model.norm.weight.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"num_layers": 4}, "model.layers.3.mlp.down_proj.weight"),
        ({"num_layers": 2}, "model.layers.2.mlp.down_proj.weight"),
        ({"ffn_hidden_size": 80}, "model.layers.0.mlp.up_proj.weight"),
        ({"tie_embeddings": False}, "lm_head.weight"),
    ],
)
def test_weights_that_are_not_those_of_the_config_are_refused_by_name(
    directory: Path, changes: dict[str, Any], name: str
) -> None:
    content = dataclasses.replace(CONFIG, **changes).to_huggingface_dict()
    (directory / "config.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=name):
        load_transformer(directory)


def test_damaged_or_missing_files_are_named(directory: Path) -> None:
    (directory / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(CheckpointError, match=r"model\.safetensors cannot be read"):
        load_transformer(directory)
    (directory / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config\.json cannot be read"):
        load_transformer(directory)
