"""The Hugging Face shell against the reference, through the interface that transformers' users know."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from poet.errors import ConfigError, ShapeError
from poet.generation.autoregressive import write_outputs
from poet.generation.sampling import SamplingConfig
from poet.grammar import Segment
from poet.model.attention import SceneLayout
from poet.model.config import PoetConfig
from poet.model.huggingface import PoetForCausalLM, PoetHuggingFaceConfig
from poet.model.transformer import PoetTransformer
from poet.model.weights import load_transformer
from poet.testing import save_model, sharp_model

CONFIG = PoetConfig(
    vocab_size=128,
    hidden_size=44,
    ffn_hidden_size=76,
    num_layers=3,
    num_heads=6,
    num_kv_heads=2,
    head_dim=10,
    scene_length=64,
    max_position_embeddings=128,
)
TRAINED = ["captioning", "text_to_audio"]
PROMPTS = [[5, 17, 29, 41, 53, 67, 71], [7, 19, 31], [11, 23, 37, 43, 59]]


def build(tied: bool) -> PoetTransformer:
    return sharp_model(dataclasses.replace(CONFIG, tie_embeddings=tied), seed=3)


def save(model: PoetTransformer, directory: Path) -> Path:
    return save_model(model, directory, poet_fingerprint="ab" * 32, trained_tasks=TRAINED)


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def reference(request: pytest.FixtureRequest) -> PoetTransformer:
    return build(request.param)


@pytest.fixture(scope="module")
def bundle(reference: PoetTransformer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(reference, tmp_path_factory.mktemp("bundle"))


@pytest.fixture(scope="module")
def model(bundle: Path) -> PoetForCausalLM:
    loaded = AutoModelForCausalLM.from_pretrained(bundle)
    assert isinstance(loaded, PoetForCausalLM)
    return loaded.eval()


def left_padded(prompts: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
    return ids, (ids != 0).long()


def test_config_reads_as_poets(bundle: Path, reference: PoetTransformer) -> None:
    config = AutoConfig.from_pretrained(bundle)
    assert isinstance(config, PoetHuggingFaceConfig)
    assert config.poet == reference.config
    assert config.poet_fingerprint == "ab" * 32
    assert config.trained_tasks == TRAINED
    assert (config.pad_token_id, config.bos_token_id, config.eos_token_id) == (0, 1, 2)


@torch.no_grad()
def test_logits_equal_those_of_the_reference(model: PoetForCausalLM, reference: PoetTransformer) -> None:
    ids = torch.tensor([PROMPTS[0], PROMPTS[0][::-1]])
    layout = SceneLayout.from_prefix_lengths(torch.tensor([7, 7]), torch.tensor([7, 7]), 7)
    assert torch.equal(model(ids).logits, reference.logits(reference(ids, layout)))
    assert torch.equal(model(ids, logits_to_keep=2).logits, model(ids).logits[:, -2:])
    layout = SceneLayout.from_prefix_lengths(torch.tensor([3, 5]), torch.tensor([7, 7]), 7)
    found = model(ids, prefix_lengths=torch.tensor([3, 5])).logits
    assert torch.equal(found, reference.logits(reference(ids, layout)))


@torch.no_grad()
def test_padding_on_either_side_leaves_the_logits_alone(model: PoetForCausalLM) -> None:
    ids = torch.tensor([PROMPTS[1]])
    alone = model(ids).logits
    ones, zeros = torch.ones(1, 3, dtype=torch.int64), torch.zeros(1, 5, dtype=torch.int64)
    left = model(torch.cat((zeros, ids), 1), attention_mask=torch.cat((zeros, ones), 1)).logits[:, 5:]
    right = model(torch.cat((ids, zeros), 1), attention_mask=torch.cat((ones, zeros), 1)).logits[:, :3]
    torch.testing.assert_close(left, alone, atol=1e-5, rtol=0)
    torch.testing.assert_close(right, alone, atol=1e-5, rtol=0)


@torch.no_grad()
def test_cached_equals_uncached(model: PoetForCausalLM) -> None:
    ids = torch.randint(3, 128, (2, 17), generator=torch.Generator().manual_seed(0))
    prefix_lengths = torch.tensor([5, 3])
    whole = model(ids, prefix_lengths=prefix_lengths, use_cache=False)
    assert whole.past_key_values is None
    step = model(ids[:, :5], prefix_lengths=prefix_lengths)
    parts = [step.logits]
    for start, stop in ((5, 6), (6, 9), (9, 17)):
        step = model(ids[:, start:stop], prefix_lengths=prefix_lengths, past_key_values=step.past_key_values)
        parts.append(step.logits)
    torch.testing.assert_close(torch.cat(parts, 1), whole.logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize("use_cache", [True, False])
def test_greedy_generate_equals_our_loop_in_a_left_padded_batch(
    model: PoetForCausalLM, reference: PoetTransformer, use_cache: bool
) -> None:
    ids, mask = left_padded(PROMPTS)
    options: dict[str, Any] = {"max_new_tokens": 19, "do_sample": False, "use_cache": use_cache}
    # Our loop follows a grammar, which allows every id here; transformers must not stop at <eos> either.
    found = model.generate(ids, attention_mask=mask, eos_token_id=None, **options)[:, ids.shape[1] :]
    grammar = (Segment(19, 0, 128),)
    expected = write_outputs(reference, PROMPTS, [grammar] * 3, [SamplingConfig(temperature=0)] * 3)
    assert found.tolist() == expected
    assert len({tuple(output) for output in expected}) == 3
    assert model.generate(ids, eos_token_id=None, **options).tolist()[0][ids.shape[1] :] == expected[0]


def test_generate_stops_at_the_end_id(model: PoetForCausalLM) -> None:
    options: dict[str, Any] = {"max_new_tokens": 11, "do_sample": False}
    ids = torch.tensor([PROMPTS[0]])
    free = model.generate(ids, eos_token_id=None, **options)[0, 7:].tolist()
    stopped = model.generate(ids, eos_token_id=free[3], **options)[0, 7:].tolist()
    assert stopped == free[: free.index(free[3]) + 1]


def test_beam_search_runs_on_the_cache(model: PoetForCausalLM) -> None:
    ids, mask = left_padded(PROMPTS)
    options: dict[str, Any] = {"max_new_tokens": 7, "num_beams": 3, "do_sample": False, "attention_mask": mask}
    assert torch.equal(model.generate(ids, **options), model.generate(ids, use_cache=False, **options))


def test_loss_counts_labelled_places_and_takes_the_rest_as_prefix(
    model: PoetForCausalLM, reference: PoetTransformer
) -> None:
    ids = torch.tensor([PROMPTS[0], PROMPTS[0][::-1]])
    labels = ids.clone()
    labels[0, :3] = -100
    labels[1, :5] = -100
    layout = SceneLayout.from_prefix_lengths(torch.tensor([3, 5]), torch.tensor([7, 7]), 7)
    scores = reference.logits(reference(ids, layout)).log_softmax(-1)
    targets = [(0, place) for place in range(3, 7)] + [(1, place) for place in range(5, 7)]
    expected = -sum(scores[row, place - 1, ids[row, place]] for row, place in targets) / len(targets)
    output = model(ids, labels=labels)
    torch.testing.assert_close(output.loss, expected)
    assert output.logits.shape == (2, 7, 128)
    torch.testing.assert_close(model(ids, labels=labels, return_dict=False)[0], expected)
    output.loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    model.zero_grad()


def test_save_pretrained_writes_what_the_reference_loads(
    model: PoetForCausalLM, reference: PoetTransformer, tmp_path: Path
) -> None:
    model.save_pretrained(tmp_path)
    loaded = load_transformer(tmp_path)
    assert loaded.config == reference.config
    assert loaded.state_dict().keys() == reference.state_dict().keys()
    for name, tensor in reference.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)
    written = json.loads((tmp_path / "config.json").read_text())
    assert (written["poet_fingerprint"], written["trained_tasks"]) == ("ab" * 32, TRAINED)


def test_new_model_starts_with_the_references_deviations() -> None:
    config = PoetHuggingFaceConfig(**dataclasses.replace(CONFIG, num_layers=8).to_huggingface_dict())
    torch.manual_seed(0)
    model = PoetForCausalLM(config)
    layer = model.model.layers[5]
    deviations = [
        float(part.weight.detach().std())
        for part in (layer.mlp.up_proj, layer.mlp.down_proj, layer.self_attn.o_proj, model.model.embed_tokens)
    ]
    assert deviations == pytest.approx([0.02, 0.005, 0.005, 0.02], rel=0.1)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert (layer.input_layernorm.weight == 1).all()


def test_prefix_in_two_pieces_is_refused(model: PoetForCausalLM) -> None:
    ids = torch.tensor([PROMPTS[0]])
    start = model(ids[:, :3])
    with pytest.raises(ShapeError, match="in one piece"):
        model(ids[:, 3:], past_key_values=start.past_key_values)


def test_masks_and_labels_of_another_shape_are_refused(model: PoetForCausalLM) -> None:
    ids = torch.tensor([PROMPTS[0]])
    with pytest.raises(ShapeError, match="attention_mask"):
        model(ids, attention_mask=torch.ones(1, 5, dtype=torch.int64))
    with pytest.raises(ShapeError, match="labels"):
        model(ids, labels=ids[:, :5])


def test_config_without_scene_length_builds_no_model() -> None:
    content = CONFIG.to_huggingface_dict()
    del content["scene_length"]
    with pytest.raises(ConfigError, match="scene_length"):
        PoetForCausalLM(PoetHuggingFaceConfig(**content))
