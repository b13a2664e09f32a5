"""Recipes of language models that start from a bundle: its sizes need not be repeated, and old runs go on."""

from pathlib import Path

import pytest
import yaml

from poet.bundle import Bundle
from poet.errors import ConfigError
from poet.testing import tiny_bundle, tiny_shards
from poet.training.language import ModelSize
from poet.training.recipes import train

CONFIG = {"tie_embeddings": False, "norm_eps": 1e-5, "rope_theta": 1e6, "num_layers": 1}


def written(directory: Path, **values: object) -> Path:
    """A recipe that starts from a bundle whose sizes are not the defaults."""
    bundle = tiny_bundle(directory / "bundle", config=CONFIG)
    shards = str(tiny_shards(bundle, directory / "shards", count=7))
    recipe = {
        "train": "language",
        "bundle": str(bundle.path),
        "start_from": str(bundle.path),
        "shards": shards,
        "validation_shards": shards,
        "precision": "fp32",
        "num_steps": 1,
        "batch_size": 3,
        "validation_batches": 1,
    }
    (directory / "recipe.yaml").write_text(yaml.safe_dump(recipe | values))
    return directory / "recipe.yaml"


def test_sizes_that_are_not_named_are_those_of_the_beginning(tmp_path: Path) -> None:
    recipe = written(tmp_path, model={"scene_length": 240})
    assert train(recipe, [], tmp_path / "run").finished
    before = Bundle.open(tmp_path / "bundle").model_config
    after = Bundle.open(tmp_path / "run" / "export").model_config
    assert (after.norm_eps, after.rope_theta, after.tie_embeddings) == (1e-5, 1e6, False)
    assert ModelSize.of(after).to_config(before.vocab_size) == after
    assert (before.scene_length, after.scene_length) == (256, 240)
    kept = yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())
    assert kept["model"] == {**kept["model"], "norm_eps": 1e-5, "hidden_size": 48, "scene_length": 240}


def test_other_sizes_than_those_of_the_beginning_are_refused(tmp_path: Path) -> None:
    recipe = written(tmp_path, model={"norm_eps": 1e-6})
    with pytest.raises(ConfigError, match="norm_eps=1e-05"):
        train(recipe, [], tmp_path / "run")
    with pytest.raises(ConfigError, match=r"unknown recipe key .model\.norm_epsilon"):
        train(recipe, ["model.norm_epsilon=1e-5"], tmp_path / "run")


def test_a_run_of_before_a_group_had_a_key_goes_on(tmp_path: Path) -> None:
    recipe = written(tmp_path)
    bundle = tiny_bundle(tmp_path / "plain")
    asked = [f"start_from={bundle.path}", f"bundle={bundle.path}"]
    shards = tiny_shards(bundle, tmp_path / "more", count=7)
    asked += [f"shards={shards}", f"validation_shards={shards}"]
    train(recipe, asked, tmp_path / "run")
    file = tmp_path / "run" / "recipe.yaml"
    kept = yaml.safe_load(file.read_text())
    del kept["model"]["norm_eps"]
    file.write_text(yaml.safe_dump(kept))
    assert train(recipe, asked, tmp_path / "run").finished
    kept["model"]["num_layers"] = 5
    file.write_text(yaml.safe_dump(kept))
    with pytest.raises(ConfigError, match="run of another recipe: model was"):
        train(recipe, asked, tmp_path / "run")
