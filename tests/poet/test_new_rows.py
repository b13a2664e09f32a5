"""Training only the rows of what is not text, with or without adapters: text keeps every byte, PEFT reads the files."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor

import poet.model.huggingface
from poet.bundle import Bundle
from poet.cli.main import main
from poet.errors import ConfigError
from poet.model.attention import SceneLayout
from poet.model.lora import read_adapter
from poet.model.tensor_files import TensorFiles, write_tensors
from poet.model.weights import load_transformer
from poet.testing import tiny_bundle, tiny_shards
from poet.training.config import build
from poet.training.loop import LoopConfig, fit
from poet.training.lora import LoraRecipe, LoraTraining, merged_weights, write_merged

HEADS = {"model.embed_tokens.weight", "lm_head.weight"}
ROWS_ALONE: dict[str, Any] = {"new_rows": True, "target_modules": []}
ROWS_AND_PAIRS: dict[str, Any] = {"new_rows": True, "rank": 3, "alpha": 6}


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    directory = tmp_path_factory.mktemp("bundle") / "tiny"
    return tiny_bundle(directory, config={"tie_embeddings": request.param, "norm_eps": 1e-5})


@pytest.fixture(scope="module")
def shards(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_shards(bundle, tmp_path_factory.mktemp("shards") / "clips")


def recipe(bundle: Bundle, shards: Path, lora: dict[str, Any], **changes: Any) -> LoraRecipe:
    values: dict[str, Any] = {
        "bundle": str(bundle.path),
        "data": {"clips": str(shards)},
        "lora": lora,
        "prior_share": 0.0,
        "num_steps": 12,
        "batch_size": 5,
        "warmup_steps": 1,
        "learning_rate": 0.02,
        "precision": "fp32",
    }
    return build(LoraRecipe, values | changes)


def trained(asked: LoraRecipe, directory: Path) -> tuple[LoraTraining, list[float]]:
    """A finished run, and its losses on held-out clips."""
    training = LoraTraining(asked, directory)
    fit(training, LoopConfig(num_steps=asked.num_steps, validate_every=4, checkpoint_seconds=0.0), directory)
    log = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return training, [line["validation_loss"] for line in log if "validation_loss" in line]


def stored(directory: Path) -> dict[str, Tensor]:
    files = TensorFiles(directory)
    return {name: files.read(name) for name in files.facts}


@torch.inference_mode()
def text_logits(bundle: Bundle) -> Tensor:
    """Of a text without a prefix, over the text's pieces."""
    low, high = bundle.vocabulary.text_range
    ids = low + torch.randint(0, high - low, (2, 29), generator=torch.Generator().manual_seed(3))
    lengths = torch.tensor([29, 29])
    layout = SceneLayout.from_prefix_lengths(torch.zeros_like(lengths), lengths, 29)
    model = load_transformer(bundle.path)
    return model.logits(model(ids, layout), slice(low, high))


def test_rows_alone_learn_and_text_keeps_every_bit(bundle: Bundle, shards: Path, tmp_path: Path) -> None:
    before = stored(bundle.path)
    _, losses = trained(recipe(bundle, shards, ROWS_ALONE), tmp_path / "run")
    assert losses[-1] < losses[0] - 0.05
    merged = write_merged(bundle, tmp_path / "run" / "export", tmp_path / "merged")
    low, _ = bundle.vocabulary.text_range
    after = stored(merged.path)
    assert after.keys() == before.keys()
    for name, tensor in before.items():
        if name in HEADS:
            assert torch.equal(after[name][low:], tensor[low:])
            assert not torch.equal(after[name][:low], tensor[:low])
        else:
            assert torch.equal(after[name], tensor)
    assert torch.equal(text_logits(merged), text_logits(bundle))


@pytest.mark.parametrize("lora", [ROWS_ALONE, ROWS_AND_PAIRS], ids=["rows", "rows and pairs"])
def test_what_is_trained_computes_what_is_merged(
    bundle: Bundle, shards: Path, tmp_path: Path, lora: dict[str, Any]
) -> None:
    training = LoraTraining(recipe(bundle, shards, lora), tmp_path)
    for step in range(3):
        training.train_step(step)
    training.export(tmp_path / "export")
    merged = load_transformer(write_merged(bundle, tmp_path / "export", tmp_path / "merged").path)
    ids = torch.arange(3 * 61).view(3, 61) * 7 % bundle.model_config.vocab_size
    layout = SceneLayout.from_prefix_lengths(torch.tensor([0, 7, 11]), torch.tensor([61, 53, 61]), 61)
    models = (training.model.eval(), merged, load_transformer(bundle.path))
    with torch.inference_mode():
        found, expected, before = (model.logits(model(ids, layout)) for model in models)
    # Rows alone leave the arithmetic as it is; a pair beside a matrix sums in another order than one merged into it.
    tolerance = 1e-6 if lora is ROWS_ALONE else 1e-4
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)
    assert (before - expected).abs().max() > 0.1


def test_beside_adapters_the_base_weights_stay_as_they_are_while_training(
    bundle: Bundle, shards: Path, tmp_path: Path
) -> None:
    before = stored(bundle.path)
    training, losses = trained(recipe(bundle, shards, ROWS_AND_PAIRS), tmp_path / "run")
    assert losses[-1] < losses[0] - 0.05
    found = {
        name.replace(".token_adapter.", ".").replace(".base_layer.", "."): tensor
        for name, tensor in training.model.state_dict().items()
    }
    for name, tensor in before.items():
        assert torch.equal(found[name], tensor)
    learnt = {name for name, weight in training.model.named_parameters() if weight.requires_grad}
    rows = {name for name in learnt if name.endswith("trainable_tokens_delta.default")}
    assert len(rows) == (1 if bundle.model_config.tie_embeddings else 2)
    assert all(".lora_" in name for name in learnt - rows)
    assert sum(weight.numel() for weight in training.weights) < 0.7 * bundle.model_config.num_parameters
    merged = write_merged(bundle, tmp_path / "run" / "export", tmp_path / "merged")
    low, _ = bundle.vocabulary.text_range
    for name, tensor in stored(merged.path).items():
        assert torch.equal(tensor[low:], before[name][low:]) if name in HEADS else tensor.shape == before[name].shape
        assert torch.equal(tensor, before[name]) == (tensor.dim() == 1)


@pytest.mark.parametrize("lora", [ROWS_ALONE, ROWS_AND_PAIRS], ids=["rows", "rows and pairs"])
def test_peft_reads_the_files_and_merges_what_we_merge(
    bundle: Bundle, shards: Path, tmp_path: Path, lora: dict[str, Any]
) -> None:
    trained(recipe(bundle, shards, lora), tmp_path / "run")
    export = tmp_path / "run" / "export"
    shell = poet.model.huggingface.PoetForCausalLM.from_pretrained(bundle.path)
    theirs = PeftModel.from_pretrained(shell, str(export)).merge_and_unload().state_dict()
    ours = merged_weights(bundle.path, bundle.model_config, export)
    assert ours.keys() <= theirs.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], atol=1e-5, rtol=1e-5)


def test_a_run_in_two_parts_gives_the_same_adapter(bundle: Bundle, shards: Path, tmp_path: Path) -> None:
    asked = recipe(bundle, shards, ROWS_AND_PAIRS)
    trained(asked, tmp_path / "whole")
    fit(LoraTraining(asked, tmp_path / "parts"), LoopConfig(num_steps=5, validate_every=4), tmp_path / "parts")
    trained(asked, tmp_path / "parts")
    file = Path("export") / "adapter_model.safetensors"
    assert (tmp_path / "whole" / file).read_bytes() == (tmp_path / "parts" / file).read_bytes()


def test_two_threads_learn_what_one_learns(
    bundle: Bundle, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gradients = []
    for threads in (1, 2):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        training = LoraTraining(recipe(bundle, shards, ROWS_AND_PAIRS), tmp_path / str(threads))
        assert len(training.replicas.models) == threads
        training._backward(training.loader.batch(0))
        gradients.append([weight.grad for weight in training.weights])
    for first, second in zip(*gradients, strict=True):
        torch.testing.assert_close(first, second, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("lora", "message"), [(ROWS_ALONE, "TRAINABLE_TOKENS"), (ROWS_AND_PAIRS, "trainable_token_indices")]
)
def test_an_adapter_with_rows_is_to_be_merged_not_served(
    bundle: Bundle, shards: Path, tmp_path: Path, lora: dict[str, Any], message: str
) -> None:
    LoraTraining(recipe(bundle, shards, lora), tmp_path).export(tmp_path / "export")
    with pytest.raises(ConfigError, match=f"{message}.*poet merge") as caught:
        read_adapter(tmp_path / "export", bundle.model_config, bundle.fingerprint)
    assert len(str(caught.value)) < 400


def test_no_matrices_go_with_new_rows_alone(bundle: Bundle, shards: Path) -> None:
    with pytest.raises(ConfigError, match="new_rows"):
        recipe(bundle, shards, {"target_modules": []})


def test_a_bundle_in_several_files_is_merged_and_copied(
    bundle: Bundle, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parts = tmp_path / "parts"
    shutil.copytree(bundle.path, parts)
    files = TensorFiles(bundle.path)
    (parts / "model.safetensors").unlink()
    sizes = {name: facts.num_bytes for name, facts in files.facts.items()}
    write_tensors(parts / "model.safetensors", sizes, files.read, 40_000)
    opened = Bundle.open(parts)
    trained(recipe(opened, shards, ROWS_ALONE, num_steps=2), tmp_path / "run")
    merged, expected = tmp_path / "merged", tmp_path / "expected"
    export = tmp_path / "run" / "export"
    assert main(["merge", str(export), "-o", str(merged), "--model", str(parts)]) == 0, capsys.readouterr().err
    write_merged(bundle, export, expected)
    for name, tensor in stored(expected).items():
        assert torch.equal(tensor, stored(merged)[name])
    video = {"video": parts / "video_tokenizer"}
    copy = write_merged(opened, None, tmp_path / "copy", video)
    assert copy.weights_sha256 == opened.weights_sha256
    assert len(list(copy.path.glob("model-*.safetensors"))) == len(list(parts.glob("model-*.safetensors"))) > 2
