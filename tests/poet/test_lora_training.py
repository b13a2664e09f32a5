"""Training adapters: PEFT's own files, the bundle untouched, the same run twice, and merging."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

import poet.model.huggingface
from poet.bundle import Bundle
from poet.cli.main import main
from poet.errors import CheckpointError, ConfigError, MediaError
from poet.media import Clip, write_clip
from poet.model.attention import SceneLayout
from poet.model.lora import merge_adapter, read_adapter
from poet.model.weights import load_transformer
from poet.testing import tiny_bundle
from poet.training.config import build
from poet.training.loop import LoopConfig, fit
from poet.training.lora import LoraRecipe, LoraTraining, merged_weights

RECIPES = Path(__file__).parents[2] / "recipes"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return tiny_bundle(tmp_path_factory.mktemp("bundle") / "tiny")


@pytest.fixture(scope="module")
def clips(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of eleven clips with captions, and one damaged file."""
    folder = tmp_path_factory.mktemp("clips")
    size, rng = bundle.generation_config, np.random.default_rng(0)
    rate = bundle.vocabulary.sample_rate
    for number in range(11):
        shape = (size.num_frames, size.height, size.width, 3)
        samples = rng.uniform(-0.3, 0.3, round(size.num_frames / size.fps * rate)).astype(np.float32)
        clip = Clip(np.full(shape, 20 * number, np.uint8), size.fps, samples, rate)
        write_clip(clip, folder / f"{number:02}.mp4")
        (folder / f"{number:02}.txt").write_text(f"a grey {number}")
    (folder / "99.mp4").write_bytes(b"nothing")
    return folder


def recipe(bundle: Bundle, clips: Path, **changes: Any) -> LoraRecipe:
    values: dict[str, Any] = {
        "bundle": str(bundle.path),
        "data": {"clips": str(clips), "prior": str(clips), "prior_count": 11},
        "lora": {"rank": 3, "alpha": 6},
        "num_steps": 7,
        "batch_size": 4,
        "warmup_steps": 1,
        "learning_rate": 0.02,
        "precision": "fp32",
        "parallel_share": 0.0,
    }
    return build(LoraRecipe, values | changes)


def trained(asked: LoraRecipe, directory: Path, **loop: Any) -> Path:
    said: list[str] = []
    training = LoraTraining(asked, directory, say=said.append)
    config = LoopConfig(num_steps=asked.num_steps, **{"validate_every": 3, "checkpoint_seconds": 0.0} | loop)
    result = fit(training, config, directory)
    assert result.finished
    assert any("11 clips, 1 that cannot be read" in line for line in said)
    assert "numbers to learn" in said[-1]
    return directory / "export"


def test_an_adapter_learns_the_clips_and_the_bundle_stays_as_it_is(bundle: Bundle, clips: Path, tmp_path: Path) -> None:
    before = bundle.weights_sha256
    asked = recipe(bundle, clips, num_steps=40, prior_share=0.25)
    export = trained(asked, tmp_path / "run")
    assert Bundle.open(bundle.path).weights_sha256 == before
    log = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    held_out = [line["validation_loss"] for line in log if "validation_loss" in line]
    assert min(held_out) < held_out[0] - 0.05
    assert all("validation_prior_loss" in line for line in log if "validation_loss" in line)
    adapter = read_adapter(export, bundle.model_config, bundle.fingerprint)
    assert (adapter.rank, adapter.scale) == (3, 2.0)


def test_peft_reads_the_files_and_merges_what_we_merge(bundle: Bundle, clips: Path, tmp_path: Path) -> None:
    export = trained(recipe(bundle, clips), tmp_path / "run")
    shell = poet.model.huggingface.PoetForCausalLM.from_pretrained(bundle.path)
    theirs = PeftModel.from_pretrained(shell, str(export)).merge_and_unload().state_dict()
    ours = merged_weights(bundle.path, bundle.model_config, export)
    model = load_transformer(bundle.path)
    merge_adapter(model, read_adapter(export, bundle.model_config, bundle.fingerprint))
    changed = 0
    plain = load_transformer(bundle.path).state_dict()
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, theirs[name], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(tensor, ours[name], atol=1e-5, rtol=1e-5)
        changed += not torch.equal(tensor, plain[name])
    assert changed == 7 * bundle.model_config.num_layers


@pytest.mark.parametrize("changes", [{}, {"lora": {"rank": 3, "dropout": 0.2, "use_rslora": True}}])
def test_the_same_run_twice_or_in_two_parts_gives_the_same_adapter(
    bundle: Bundle, clips: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    asked = recipe(bundle, clips, **changes)
    first, second = (trained(asked, tmp_path / name) for name in ("first", "second"))
    files = [path / "adapter_model.safetensors" for path in (first, second)]
    assert files[0].read_bytes() == files[1].read_bytes()
    if "lora" not in changes:  # what is dropped is drawn from a generator that a checkpoint holds, tested in the loop's
        fit(LoraTraining(asked, tmp_path / "parts"), LoopConfig(num_steps=3, validate_every=3), tmp_path / "parts")
        trained(asked, tmp_path / "parts")
        assert (tmp_path / "parts" / "export" / "adapter_model.safetensors").read_bytes() == files[0].read_bytes()


def test_dora_is_trained_and_merged_though_it_cannot_be_served(bundle: Bundle, clips: Path, tmp_path: Path) -> None:
    export = trained(recipe(bundle, clips, lora={"rank": 3, "use_dora": True}), tmp_path / "run")
    assert any("magnitude" in name for name in load_file(export / "adapter_model.safetensors"))
    with pytest.raises(ConfigError, match="use_dora"):
        read_adapter(export, bundle.model_config, bundle.fingerprint)
    shell = poet.model.huggingface.PoetForCausalLM.from_pretrained(bundle.path)
    theirs = PeftModel.from_pretrained(shell, str(export)).merge_and_unload().state_dict()
    for name, tensor in merged_weights(bundle.path, bundle.model_config, export).items():
        torch.testing.assert_close(tensor, theirs[name], atol=1e-5, rtol=1e-5)


def test_a_run_ends_when_nothing_becomes_better_and_keeps_the_best(bundle: Bundle, clips: Path, tmp_path: Path) -> None:
    asked = recipe(bundle, clips, num_steps=60, learning_rate=1.0, patience=2)
    directory = tmp_path / "run"
    training = LoraTraining(asked, directory)
    result = fit(training, LoopConfig(num_steps=60, validate_every=2), directory)
    assert result.finished
    assert result.step < 60
    log = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    held_out = [line["validation_loss"] for line in log if "validation_loss" in line]
    assert held_out[-1] > min(held_out)
    model = load_transformer(bundle.path)
    merge_adapter(model, read_adapter(directory / "export", bundle.model_config, bundle.fingerprint))
    assert training._best_loss == min(held_out)


def test_the_command_trains_the_recipe_and_merge_makes_a_bundle_of_it(
    bundle: Bundle, clips: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    said = [
        "train", str(RECIPES / "lora" / "style.yaml"), "-o", str(run), "--json",
        "--set", f"data.clips={clips}", "--set", f"bundle={bundle.path}", "--set", f"data.prior={clips}",
        "--set", "num_steps=2", "--set", "batch_size=4", "--set", "lora.rank=2", "--set", "parallel_share=0",
    ]  # fmt: skip
    assert main(said) == 0, capsys.readouterr().err
    captured = capsys.readouterr()
    assert json.loads(captured.out)["finished"] is True
    assert "numbers to learn" in captured.err
    merged = tmp_path / "merged"
    assert main(["merge", str(run / "export"), "-o", str(merged), "--model", str(bundle.path), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    opened = Bundle.open(merged)
    assert result["weights_sha256"] == opened.weights_sha256 != bundle.weights_sha256
    assert opened.fingerprint == bundle.fingerprint
    model = load_transformer(bundle.path)
    merge_adapter(model, read_adapter(run / "export", bundle.model_config, bundle.fingerprint))
    ids = torch.arange(1, 30)[None]
    layout = SceneLayout.from_prefix_lengths(torch.tensor([7]), torch.tensor([29]), 29)
    torch.testing.assert_close(model(ids, layout), load_transformer(merged)(ids, layout), atol=1e-2, rtol=1e-2)
    assert main(["merge", str(run / "export"), "-o", str(merged), "--model", str(bundle.path)]) == 1
    assert "exists already" in capsys.readouterr().err


def test_what_cannot_be_trained_is_refused(bundle: Bundle, clips: Path, tmp_path: Path) -> None:
    for changes, words in (
        ({"lora": {"rank": 0}}, "rank >= 1"),
        ({"lora": {"target_modules": ["embed_tokens"]}}, "target_modules"),
        ({"prior_share": 1.0}, "prior_share in"),
        ({"data": {"clips": str(clips)}}, "prior_share needs data.prior"),
        ({"data": {"clips": str(clips), "held_out": 1.0}}, "held_out"),
        ({"learning_rate": 0}, "learning_rate must be positive"),
    ):
        with pytest.raises(ConfigError, match=words):
            recipe(bundle, clips, **changes)
    asked = recipe(bundle, clips)
    nowhere = dataclasses.replace(asked.data, clips=str(tmp_path / "no"))
    with pytest.raises((MediaError, ConfigError)):
        LoraTraining(dataclasses.replace(asked, data=nowhere), tmp_path)
    training = LoraTraining(asked, tmp_path / "run")
    state = training.state_dict() | {"weights_sha256": "0" * 64}
    with pytest.raises(CheckpointError, match="begun on the weights"):
        training.load_state_dict(state)


def test_other_clips_can_be_measured_on(bundle: Bundle, clips: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    for name in ("03.mp4", "03.txt", "05.mp4", "05.txt"):
        shutil.copyfile(clips / name, other / name)
    data = {"clips": str(clips), "validation": str(other)}
    asked = recipe(bundle, clips, data=data, prior_share=0.0, num_steps=6)
    export = trained(asked, tmp_path / "run", validate_first=True)
    log = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    measured = {line["step"]: line["validation_loss"] for line in log if "validation_loss" in line}
    assert sorted(measured) == [0, 3, 6]
    # Before the first step the adapter changes nothing.
    training = LoraTraining(asked, tmp_path / "again")
    assert len(training.loader._clips) == 11
    assert measured[0] == pytest.approx(training.validate(0)["loss"])
    assert measured[6] < measured[0]
    assert (export / "adapter_model.safetensors").is_file()
