"""What `poet train --plan` says, held against built models and against the tensors of real training steps."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import parallel_state
from torch import Tensor

from poet.cli.main import main
from poet.errors import ConfigError
from poet.model.attention import SceneLayout
from poet.model.config import PoetConfig
from poet.model.transformer import PoetTransformer
from poet.testing import in_processes, tiny_bundle, tiny_shards
from poet.training.config import build, read_recipe
from poet.training.language import LanguageRecipe, ModelSize
from poet.training.megatron_cpu import cpu_for_cuda
from poet.training.megatron_model import PoetGPTModel, to_transformer_config
from poet.training.megatron_trainer import MegatronTraining, process_groups
from poet.training.parallelism import Parallelism
from poet.training.plan import activation_bytes_per_id, make_plan

RECIPES = sorted((Path(__file__).parents[2] / "recipes" / "pretraining").glob("*.yaml"))
ROWS, LENGTH = 3, 128
SIZES: dict[str, Any] = {
    "hidden_size": 96,
    "ffn_hidden_size": 256,
    "num_heads": 8,
    "num_kv_heads": 2,
    "head_dim": 16,
    "scene_length": 256,
    "max_position_embeddings": 1024,
}


def config_of(layers: int, vocab_size: int = 384) -> PoetConfig:
    return PoetConfig(vocab_size=vocab_size, num_layers=layers, **SIZES)


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
def test_the_parameter_count_is_the_built_models(file: Path) -> None:
    values = read_recipe(file)
    recipe = build(LanguageRecipe, {name: value for name, value in values.items() if name not in ("train", "loop")})
    config = recipe.model.to_config(7040)
    with torch.device("meta"):
        built = sum(weight.numel() for weight in PoetTransformer(config).parameters())
    gpus = 8 if recipe.parallel.model_parallel_size <= 8 else recipe.parallel.model_parallel_size
    plan = make_plan(
        config, recipe.parallel, gpu="h200", gpus=gpus, batch_size=recipe.batch_size, row_length=2048, ids=1e9
    )
    assert plan.parameters == built
    assert plan.fits


def kept_bytes(cut: Parallelism, layers: int, bf16: bool) -> float:
    """Bytes that a forward pass keeps for its backward pass, for each id, weights left out."""
    with cpu_for_cuda():
        parallel_state.initialize_model_parallel(cut.tensor_parallel_size)
        config = config_of(layers)
        model = PoetGPTModel(config, to_transformer_config(config, cut, bf16=bf16))
        weights = {weight.untyped_storage()._cdata for weight in model.parameters()}
        kept: dict[int, tuple[int, object]] = {}  # the storage itself too, so that its place is not used again

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in weights:
                kept[storage._cdata] = storage.nbytes(), storage
            return tensor

        layout = SceneLayout.from_prefix_lengths(torch.tensor([5, 9, 0]), torch.full((ROWS,), LENGTH), LENGTH)
        page = model.book.add(layout, torch.bfloat16 if bf16 else torch.float32)
        loss_mask = torch.ones(ROWS, LENGTH, dtype=torch.bool)
        loss_mask[:, 0] = False
        ids = torch.randint(0, config.vocab_size, (ROWS, LENGTH))
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(ids, page, loss_mask)
        return sum(size for size, _ in kept.values()) / (ROWS * LENGTH)


@pytest.mark.parametrize("bf16", [True, False])
@pytest.mark.parametrize(
    "cut",
    [
        Parallelism(recompute="selective"),
        Parallelism(tensor_parallel_size=2, recompute="selective"),
        Parallelism(tensor_parallel_size=2, sequence_parallel=True, recompute="selective"),
        Parallelism(recompute="full"),
    ],
    ids=["whole", "tensor 2", "sequence parallel", "recomputed"],
)
def test_the_activations_of_a_layer_are_those_of_a_real_pass(cut: Parallelism, bf16: bool) -> None:
    """The CPU's attention keeps other tensors than a GPU's, so it is recomputed here; what it adds is three lines."""
    few, many = (in_processes(cut.tensor_parallel_size, kept_bytes, cut, layers, bf16)[0] for layers in (1, 3))
    expected = activation_bytes_per_id(config_of(3), cut, value_bytes=2 if bf16 else 4)
    assert (many - few) / 2 == pytest.approx(expected, rel=0.15)


def held_bytes(recipe: LanguageRecipe) -> dict[str, float]:
    """Bytes of what a trainer holds after a step."""
    with process_groups(recipe.parallel, "cpu"):
        training = MegatronTraining(recipe)
        training.train_step(0)
        states = [state for part in training.optimizer.chained_optimizers for state in part.optimizer.state.values()]
        gradients = [weight.main_grad for weight in training.parameters]  # type: ignore[attr-defined]

        def size(tensors: list[Tensor]) -> float:
            return float(sum(tensor.nbytes for tensor in tensors))

        return {
            "weights": size(training.parameters),
            "gradients": size(gradients),
            "optimizer": size([value for state in states for value in state.values() if value.dim() > 0]),
            "averages": size(training.averages),
        }


@pytest.mark.parametrize(
    ("processes", "cut"),
    [
        (2, Parallelism(tensor_parallel_size=2)),
        (2, Parallelism(pipeline_parallel_size=2)),
        (2, Parallelism(distributed_optimizer=True)),
    ],
    ids=["tensor 2", "pipeline 2", "shared optimizer"],
)
def test_weights_gradients_optimizer_and_averages_are_those_of_a_real_step(
    tmp_path: Path, processes: int, cut: Parallelism
) -> None:
    bundle = tiny_bundle(tmp_path / "bundle")
    shards = tiny_shards(bundle, tmp_path / "shards")
    recipe = LanguageRecipe(
        bundle=tmp_path / "bundle",
        shards=shards,
        validation_shards=shards,
        model=ModelSize(num_layers=4, **SIZES),
        batch_size=4,
        precision="fp32",
        parallel=cut,
    )
    held = in_processes(processes, held_bytes, recipe)
    config = config_of(4, bundle.vocabulary.padded_vocab_size)
    plan = make_plan(
        config, cut, gpu="h100", gpus=processes, batch_size=4, row_length=LENGTH, ids=1e6, bf16=False
    ).memory
    fullest = max(held, key=lambda parts: sum(parts.values()))
    for part, measured in fullest.items():
        assert measured == pytest.approx(getattr(plan, part), rel=0.15), part


def test_the_command_says_what_a_run_needs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_bundle(tmp_path / "bundle")
    command = ["train", str(RECIPES[-1]), "--plan", "--json", "--gpu", "h200", "--ids", "2e9"]
    assert main([*command, "--set", f"bundle={tmp_path / 'bundle'}"]) == 0
    half = json.loads(capsys.readouterr().out)
    assert main([*command, "--set", f"bundle={tmp_path / 'bundle'}", "--mfu", "0.2"]) == 0
    assert json.loads(capsys.readouterr().out)["gpu_hours"] == pytest.approx(2 * half["gpu_hours"], rel=0.05)
    assert set(half["memory_gb"]) == {"weights", "gradients", "optimizer", "averages", "activations", "logits", "total"}
    assert half["ids"] == 2e9


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gpu": "a100"}, "gpu must be one of h100, h200, got 'a100'"),
        ({"gpus": 3}, "gpus must be a multiple of .* = 2, got 3"),
        ({"batch_size": 7}, "batch_size must be a multiple of the 2 data-parallel GPUs"),
    ],
)
def test_a_plan_that_cannot_be_is_refused(changes: dict[str, Any], message: str) -> None:
    values: dict[str, Any] = {"gpu": "h100", "gpus": 4, "batch_size": 8, "row_length": 256, "ids": 1e9}
    with pytest.raises(ConfigError, match=message):
        make_plan(config_of(4), Parallelism(tensor_parallel_size=2), **values | changes)


def test_a_model_too_large_for_its_gpu_is_seen() -> None:
    config = PoetConfig(**{**SIZES, "hidden_size": 4096, "ffn_hidden_size": 12288}, vocab_size=384, num_layers=36)
    plan = make_plan(config, Parallelism(), gpu="h100", gpus=1, batch_size=8, row_length=2048, ids=1e9)
    assert not plan.fits
    assert plan.memory.total > 80e9
