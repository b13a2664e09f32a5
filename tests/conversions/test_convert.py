"""Bundles to Megatron checkpoints and back: no bit lost, no name lost, the same logits from both implementations."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from megatron.core import dist_checkpointing
from safetensors.torch import load_file

from poet.bundle import Bundle
from poet.cli.main import main
from poet.errors import CheckpointError, ConfigError
from poet.generation.engine import TorchEngine
from poet.generation.pipeline import ClipRequest, Pipeline
from poet.generation.sampling import SamplingConfig
from poet.testing import in_processes, tiny_bundle, tiny_shards
from poet.training.language import LanguageRecipe, ModelSize
from poet.training.loop import LoopConfig
from poet.training.megatron_trainer import train_with_megatron
from poet.training.parallelism import Parallelism
from poet_conversions.convert import compare, convert
from poet_conversions.formats import distributed_checkpoint as files
from poet_serving.engine import VLLMEngine

SIZES = {"num_layers": 3, "ffn_hidden_size": 88, "num_kv_heads": 2, "head_dim": 32}  # vLLM's CPU kernels want 32


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("bundle") / "tiny"
    tiny_bundle(directory, config=SIZES)
    return directory


@pytest.fixture(scope="module")
def checkpoint(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint") / "megatron"
    assert convert(bundle, path) == "megatron"
    return path


def train(recipe: LanguageRecipe, directory: Path) -> None:
    loop = LoopConfig(num_steps=3, log_every=1, validate_every=3, checkpoint_seconds=1e9)
    train_with_megatron(recipe, loop, directory, device="cpu")


@pytest.fixture(scope="module")
def run(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training run of two processes that share every matrix."""
    directory = tmp_path_factory.mktemp("run")
    opened = Bundle.open(bundle)
    size = {name: getattr(opened.model_config, name) for name in ("hidden_size", "num_heads", *SIZES)}
    recipe = LanguageRecipe(
        bundle=bundle,
        start_from=bundle,
        shards=tiny_shards(opened, directory / "shards"),
        validation_shards=directory / "shards",
        model=ModelSize(**size, scene_length=256, max_position_embeddings=1024),
        num_steps=3,
        batch_size=4,
        precision="fp32",
        export_dtype="float32",
        learning_rate=1e-2,
        warmup_steps=1,
        parallel=Parallelism(tensor_parallel_size=2),
    )
    in_processes(2, train, recipe, directory)
    return directory


def test_a_round_trip_changes_no_bit_and_nothing_else(bundle: Path, checkpoint: Path, tmp_path: Path) -> None:
    assert convert(checkpoint, tmp_path / "back", bundle=bundle) == "bundle"
    before, after = load_file(bundle / "model.safetensors"), load_file(tmp_path / "back" / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    configs = [json.loads((path / "config.json").read_text()) for path in (bundle, tmp_path / "back")]
    assert configs[0] == configs[1]
    assert Bundle.open(tmp_path / "back").fingerprint == Bundle.open(bundle).fingerprint


def test_both_implementations_compute_the_same(bundle: Path, checkpoint: Path) -> None:
    agreement = compare(bundle, checkpoint)
    assert agreement.largest_difference < 1e-4 * agreement.largest_logit
    assert agreement.greedy == 1.0
    assert agreement.largest_logit > 1.0


def test_a_training_run_of_two_processes_becomes_the_bundle_that_it_exported(
    run: Path, tmp_path: Path, bundle: Path
) -> None:
    convert(run, tmp_path / "averaged", bundle=bundle)
    exported, found = (
        load_file(run / "export" / "model.safetensors"),
        load_file(tmp_path / "averaged" / "model.safetensors"),
    )
    assert all(torch.equal(exported[name], found[name]) for name in exported)
    convert(run, tmp_path / "latest", bundle=bundle, which="latest")
    latest = load_file(tmp_path / "latest" / "model.safetensors")
    assert not any(torch.equal(latest[name], found[name]) for name in latest if latest[name].dim() > 1)
    assert compare(run, tmp_path / "latest", which="latest").greedy == 1.0
    assert compare(run, tmp_path / "averaged").greedy == 1.0


def test_a_converted_run_writes_the_same_greedy_ids_through_vllm_and_the_reference(
    run: Path, bundle: Path, tmp_path: Path
) -> None:
    """In float32: `poet generate` lets vLLM compute in bfloat16 where the processor can, and ids may then differ."""
    target = tmp_path / "out"
    convert(run, target, bundle=bundle)
    greedy = SamplingConfig(temperature=0, seed=0)
    requests = [
        ClipRequest(task="text_to_video_audio", text="a red star " + "rises " * words, sampling=greedy)
        for words in range(5)
    ]
    written = []
    for engine in (TorchEngine(target), VLLMEngine(target, dtype="float32")):
        with engine:
            written.append([clip.ids for clip in Pipeline(Bundle.open(target), engine).generate(requests)])
    assert written[0] == written[1]
    assert len(set(written[0])) > 1


def test_other_weights_are_seen_to_be_others(run: Path, bundle: Path) -> None:
    agreement = compare(run, bundle)
    assert agreement.largest_difference > 0.01


def damaged(checkpoint: Path, target: Path, drop: str, add: str | None) -> Path:
    """A checkpoint without one weight, or with another name for it."""
    tensors = files.read_weights(checkpoint)
    about = files.read_about(checkpoint)
    with files._alone():
        model = files.PoetGPTModel(about.config, files.to_transformer_config(about.config, Parallelism()), flex=False)
        files.load_weights(model, tensors)
        state = model.sharded_state_dict()
        part = state.pop(drop)
        if add is not None:
            part.key = add
            state[add] = part
        target.mkdir()
        manager = files.share_results_with_a_fork()
        dist_checkpointing.save({**state, files.ABOUT_KEY: about.to_dict()}, str(target))
        files.stop_sharing_results(manager)
    return target


def test_a_missing_and_an_unknown_weight_are_named(checkpoint: Path, bundle: Path, tmp_path: Path) -> None:
    name = "decoder.final_layernorm.weight"
    missing = damaged(checkpoint, tmp_path / "missing", name, None)
    with pytest.raises(CheckpointError, match=f"missing: {name}; unknown: none"):
        convert(missing, tmp_path / "a", bundle=bundle)
    renamed = damaged(checkpoint, tmp_path / "renamed", name, "decoder.last_layernorm.weight")
    with pytest.raises(CheckpointError, match=f"missing: {name}; unknown: decoder.last_layernorm.weight"):
        convert(renamed, tmp_path / "b", bundle=bundle)
    assert not (tmp_path / "a").exists()
    assert not (tmp_path / "b").exists()


def test_nothing_is_written_over(bundle: Path, checkpoint: Path) -> None:
    with pytest.raises(CheckpointError, match="there already"):
        convert(bundle, checkpoint)


def test_what_is_neither_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError):
        convert(tmp_path, tmp_path / "out")


def test_a_checkpoint_without_a_bundle_for_its_tokenizers_says_so(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--bundle"):
        convert(checkpoint, tmp_path / "out")


def test_tokenizers_of_another_vocabulary_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    tiny_bundle(tmp_path / "other", seed=1, config=SIZES)
    with pytest.raises(CheckpointError, match="another vocabulary"):
        convert(checkpoint, tmp_path / "out", bundle=tmp_path / "other")


def test_a_damaged_file_is_named(checkpoint: Path, bundle: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(checkpoint, broken)
    for file in broken.glob("*.distcp"):
        file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(CheckpointError, match="broken cannot be read"):
        convert(broken, tmp_path / "out", bundle=bundle)


def test_a_conversion_that_came_out_wrong_is_not_passed(
    bundle: Path, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    read = files.read_weights
    for number, damage in enumerate((0.0, torch.nan)):
        changed = {name: weight * damage if "mlp" in name else weight for name, weight in read(checkpoint).items()}
        monkeypatch.setattr(files, "read_weights", lambda *_, changed=changed: changed)
        target = tmp_path / str(number)
        assert main(["convert", str(checkpoint), str(target), "--bundle", str(bundle)]) == 1
        assert "does not compute what" in capsys.readouterr().err


def test_the_command_converts_and_compares(
    bundle: Path, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["convert", str(checkpoint), str(tmp_path / "back"), "--bundle", str(bundle), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["kind"] == "bundle"
    assert result["greedy_agreement"] == 1.0
    assert result["largest_logit_difference"] < 1e-3
