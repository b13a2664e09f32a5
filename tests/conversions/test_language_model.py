"""Bundles that start from a language model: its text untouched, rows for what it never saw, whole or not there."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

from poet.bundle import Bundle
from poet.cli.main import main
from poet.errors import CheckpointError, ConfigError, PoetError
from poet.generation.engine import TorchEngine
from poet.generation.pipeline import ClipRequest, Pipeline
from poet.generation.sampling import SamplingConfig
from poet.model.attention import SceneLayout
from poet.model.tensor_files import TensorFiles
from poet.model.weights import load_transformer
from poet.testing import tiny_bundle, tiny_tokenizer_bundle
from poet_conversions.convert import compare, convert
from poet_conversions.formats import qwen3 as qwen3_files
from poet_conversions.language_model import NOISE, can_compare, compare_text, convert_language_model
from poet_serving.engine import VLLMEngine

LENGTH = 256
LARGEST_FILE = 80_000
CAPTIONS = ("a small red star rises slowly", "a large circle, caf\u00e9 \u732b 12!", "<|endoftext|><think> 42")


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_tokenizer_bundle(tmp_path_factory.mktemp("tokenizers") / "bundle").path


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def source(
    request: pytest.FixtureRequest, qwen3: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    return qwen3(tmp_path_factory.mktemp("source") / "qwen3", tied=request.param)


@pytest.fixture(scope="module")
def bundle(source: Path, tokenizers: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    target = tmp_path_factory.mktemp("converted") / "bundle"
    return convert_language_model(source, target, bundle=tokenizers, scene_length=LENGTH, largest_file=LARGEST_FILE)


def copied(source: Path, target: Path, **changes: Any) -> Path:
    """A copy of a checkpoint with other keys in its config.json; None takes a key out."""
    shutil.copytree(source, target)
    file = target / "config.json"
    content = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))
    return target


def hashes(directory: Path) -> dict[str, str]:
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def weights(directory: Path) -> dict[str, Tensor]:
    files = TensorFiles(directory)
    return {name: files.read(name) for name in files.facts}


@torch.inference_mode()
def test_logits_of_text_are_those_of_transformers(source: Path, bundle: Bundle) -> None:
    original = Qwen3ForCausalLM.from_pretrained(source, dtype=torch.float32)
    reader = PreTrainedTokenizerFast(tokenizer_file=str(source / "tokenizer.json"))
    model, (low, high) = load_transformer(bundle.path), bundle.vocabulary.text_range
    for caption in CAPTIONS[:2]:
        pieces = bundle.text_tokenizer.encode(caption)
        assert pieces == reader.encode(caption, add_special_tokens=False)
        text = torch.tensor([pieces])
        ids = torch.from_numpy(bundle.vocabulary.text_to_ids(text.numpy()))
        length = torch.tensor([len(pieces)])
        layout = SceneLayout.from_prefix_lengths(torch.zeros_like(length), length, len(pieces))
        found = model.logits(model(ids, layout))[..., low:high]
        expected = original(input_ids=text).logits
        assert expected.shape == found.shape
        assert expected.abs().max() > 2
        assert (found - expected).abs().max() < 1e-5


def test_the_comparison_sees_what_is_wrong(source: Path, bundle: Bundle, tmp_path: Path) -> None:
    assert can_compare(bundle.model_config)
    agreement = compare_text(source, bundle.path)
    assert (agreement.greedy, agreement.largest_difference < 1e-5) == (1.0, True)
    other = copied(source, tmp_path / "other", rms_norm_eps=1e-2)
    assert compare_text(other, bundle.path).largest_difference > 1e-3


def test_sizes_are_those_of_the_checkpoint(source: Path, bundle: Bundle) -> None:
    content, config = json.loads((source / "config.json").read_text()), bundle.model_config
    assert (config.hidden_size, config.ffn_hidden_size, config.num_layers) == (48, 88, 3)
    assert (config.num_heads, config.num_kv_heads, config.head_dim) == (6, 2, 32)
    assert (config.rope_theta, config.norm_eps) == (1e6, 1e-5)
    assert config.tie_embeddings == content["tie_word_embeddings"]
    assert (config.scene_length, config.max_position_embeddings) == (LENGTH, 640)
    assert bundle.vocabulary.text_vocab_size == content["vocab_size"]


def test_weights_are_taken_byte_for_byte_and_rows_are_added(source: Path, bundle: Bundle) -> None:
    before, after = weights(source), weights(bundle.path)
    assert before.keys() == after.keys()
    low, high = bundle.vocabulary.text_range
    known = bundle.text_tokenizer.num_known  # type: ignore[attr-defined]
    for name, tensor in before.items():
        if name not in ("model.embed_tokens.weight", "lm_head.weight"):
            assert torch.equal(tensor, after[name])
            continue
        assert torch.equal(tensor, after[name][low:high])
        new = torch.cat((after[name][:low], after[name][high:]))
        assert len(new) == bundle.vocabulary.padded_vocab_size - 347
        assert len(new.unique(dim=0)) == len(new)
        mean, deviation = tensor[:known].mean(0), tensor[:known].std(0)
        # Each of 48 channels is a sample of some 500 rows: the mean within 4.5 of its standard errors.
        assert ((new.mean(0) - mean).abs() < 4.5 * NOISE * deviation / len(new) ** 0.5).all()
        assert torch.allclose(new.std(0), NOISE * deviation, rtol=0.2)


def test_head_and_embedding_have_noise_of_their_own(
    qwen3: Callable[..., Path], tokenizers: Path, tmp_path: Path
) -> None:
    source = qwen3(tmp_path / "source", tied=False)
    files = TensorFiles(source)
    name = "lm_head.weight"
    same = load_file(files.facts[name].file) | {name: files.read("model.embed_tokens.weight")}
    save_file(same, files.facts[name].file, metadata={"format": "pt"})
    found = weights(convert_language_model(source, tmp_path / "b", bundle=tokenizers, scene_length=LENGTH).path)
    assert not torch.equal(found[name][:256], found["model.embed_tokens.weight"][:256])


def test_the_bundle_is_written_in_several_files_where_one_would_be_too_large(bundle: Bundle) -> None:
    assert len(list(bundle.path.glob("model-*.safetensors"))) > 3
    assert bundle.weights.name == "model.safetensors.index.json"


def test_converting_twice_gives_the_same_bytes(source: Path, bundle: Bundle, tokenizers: Path, tmp_path: Path) -> None:
    again = convert_language_model(
        source, tmp_path / "again", bundle=tokenizers, scene_length=LENGTH, largest_file=LARGEST_FILE
    )
    assert hashes(again.path) == hashes(bundle.path)


def test_the_older_form_of_config_json_says_the_same(
    source: Path, bundle: Bundle, tokenizers: Path, tmp_path: Path
) -> None:
    """As the published checkpoints have it: rope_theta at the top, rope_scaling null, torch_dtype."""
    older = copied(source, tmp_path / "older", rope_parameters=None, layer_types=None, dtype=None, rope_theta=1_000_000)
    content = json.loads((older / "config.json").read_text()) | {"rope_scaling": None, "torch_dtype": "float32"}
    (older / "config.json").write_text(json.dumps(content))
    made = convert_language_model(
        older, tmp_path / "made", bundle=tokenizers, scene_length=LENGTH, largest_file=LARGEST_FILE
    )
    assert hashes(made.path) == hashes(bundle.path)


def test_half_precision_stays_half(qwen3: Callable[..., Path], tokenizers: Path, tmp_path: Path) -> None:
    source = qwen3(tmp_path / "source", tied=True, dtype="bfloat16", shard="1GB")
    found = convert_language_model(source, tmp_path / "bundle", bundle=tokenizers, scene_length=LENGTH)
    assert {tensor.dtype for tensor in weights(found.path).values()} == {torch.bfloat16}
    assert found.config is not None
    assert found.config["dtype"] == "bfloat16"
    assert compare_text(source, found.path).largest_difference < 1e-5


def test_no_more_than_a_file_and_a_tensor_are_in_memory(
    source: Path, tokenizers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alive: list[weakref.ref[Tensor]] = []
    most = 0
    read = qwen3_files.Qwen3Checkpoint.read

    def counted(self: Any, name: str) -> Tensor:
        nonlocal most
        tensor = read(self, name)
        alive.append(weakref.ref(tensor))
        there = [found for reference in alive if (found := reference()) is not None]
        most = max(most, sum(found.numel() * found.element_size() for found in there))
        return tensor

    monkeypatch.setattr(qwen3_files.Qwen3Checkpoint, "read", counted)
    convert_language_model(source, tmp_path / "b", bundle=tokenizers, scene_length=LENGTH, largest_file=LARGEST_FILE)
    sizes = [facts.num_bytes for facts in TensorFiles(source).facts.values()]
    assert len(alive) == len(sizes)
    assert most <= LARGEST_FILE + max(sizes) < sum(sizes) / 3


def test_both_engines_write_the_same_clips(bundle: Bundle) -> None:
    """In float32, greedy: with random weights a caption decides everything."""
    greedy = SamplingConfig(temperature=0, seed=0)
    requests = [
        ClipRequest(task="text_to_video_audio", text=caption, sampling=greedy) for caption in (*CAPTIONS, "", "a" * 30)
    ]
    written = []
    for engine in (TorchEngine(bundle.path), VLLMEngine(bundle.path, dtype="float32")):
        with engine:
            written.append([clip.ids for clip in Pipeline(bundle, engine).generate(requests)])
    assert written[0] == written[1]
    assert len(set(written[0])) > 1


def test_megatron_computes_the_same(bundle: Bundle, tmp_path: Path) -> None:
    assert convert(bundle.path, tmp_path / "megatron") == "megatron"
    agreement = compare(bundle.path, tmp_path / "megatron")
    assert agreement.largest_difference < 1e-5 * agreement.largest_logit
    assert agreement.greedy == 1.0


def test_the_command_converts_compares_and_the_bundle_tells_about_itself_and_generates(
    qwen3: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, model = qwen3(tmp_path / "qwen3", tied=True), tmp_path / "bundle"
    rest = tiny_bundle(tmp_path / "rest").path
    assert main(["convert", "--from", "qwen3", str(source), str(model), "--bundle", str(rest), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["text_pieces"], result["greedy_agreement"]) == (347, 1.0)
    assert result["largest_logit_difference"] < 1e-5
    assert Bundle.open(model).model_config.scene_length == Bundle.open(rest).model_config.scene_length
    assert main(["info", str(model), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["text_pieces"] == 347
    clip = tmp_path / "clip.mp4"
    assert main(["generate", "a red star", "-o", str(clip), "--model", str(model), "--engine", "torch"]) == 0
    assert clip.stat().st_size > 0


def test_a_conversion_that_came_out_wrong_is_not_passed(
    source: Path, tokenizers: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    read = qwen3_files.Qwen3Checkpoint.read
    doubled = {name for name in TensorFiles(source).facts if "up_proj" in name}
    monkeypatch.setattr(
        qwen3_files.Qwen3Checkpoint, "read", lambda self, name: read(self, name) * (2 if name in doubled else 1)
    )
    asked = ["convert", "--from", "qwen3", str(source), str(tmp_path / "b"), "--bundle", str(tokenizers)]
    assert main([*asked, "--scene-length", "256"]) == 1
    assert "does not compute what" in capsys.readouterr().err


def refuses(source: Path, tokenizers: Path, folder: Path, error: type[PoetError], message: str) -> None:
    """That a checkpoint is refused, and that nothing is left of the attempt."""
    folder.mkdir(exist_ok=True)
    with pytest.raises(error, match=message):
        convert_language_model(source, folder / "bundle", bundle=tokenizers, scene_length=LENGTH)
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"]}, "Qwen3MoeForCausalLM"),
        ({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}, "'llama'"),
        ({"model_type": None}, "it is None"),
        ({"head_dim": None, "rms_norm_eps": None}, "must hold head_dim, rms_norm_eps"),
        ({"tie_word_embeddings": None}, "tie_word_embeddings"),
        ({"rope_parameters": None}, "rope_theta"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope_scaling is .*yarn"),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e6, "factor": 2.0}}, "rope_parameters is .*linear"),
        ({"rope_parameters": {"rope_theta": 1e6, "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"rope_scaling": [1]}, "rope_scaling must be an object"),
        ({"use_sliding_window": True, "sliding_window": 128}, "sliding windows"),
        ({"layer_types": ["full_attention", "sliding_attention", "full_attention"]}, "sliding windows"),
        ({"attention_bias": True}, "attention_bias must be False"),
        ({"hidden_act": "gelu"}, "hidden_act must be 'silu'"),
        ({"quantization_config": {"quant_method": "fp8"}}, "must not be quantised"),
        ({"num_key_value_heads": 4}, "num_heads must be a multiple"),
        ({"vocab_size": "many"}, "vocab_size must be"),
        ({"hidden_size": 64}, "must be of shape"),
        ({"vocab_size": 400}, r"must be of shape \(400, 48\)"),
        ({"vocab_size": 270}, "at most 270 pieces"),
        ({"num_hidden_layers": 4}, r"missing: model\.layers\.3\."),
        ({"num_hidden_layers": 2}, r"unknown: model\.layers\.2\."),
    ],
)
def test_what_poets_transformer_has_not_is_named(
    source: Path, tokenizers: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    other = copied(source, tmp_path / "other", **changes)
    refuses(other, tokenizers, tmp_path / "folder", PoetError, message)


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("config.json", "config.json is missing"),
        ("tokenizer.json", "tokenizer.json is missing"),
        ("model.safetensors.index.json", "has neither"),
        ("model-00002-of-*.safetensors", r"lacks model-00002-of-000\d\d\.safetensors"),
    ],
)
@pytest.mark.parametrize("damage", ["missing", "short"])
def test_a_file_that_is_missing_or_damaged_is_named(
    source: Path, tokenizers: Path, tmp_path: Path, file: str, message: str, damage: str
) -> None:
    other = copied(source, tmp_path / "other")
    (found,) = other.glob(file)
    if damage == "missing":
        found.unlink()
    else:
        found.write_bytes(found.read_bytes()[:-20])
        message = found.name
    refuses(other, tokenizers, tmp_path / "folder", CheckpointError, message)


def test_a_tensor_that_is_missing_or_not_finite_is_named(source: Path, tokenizers: Path, tmp_path: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    file = TensorFiles(source).facts[name].file.name
    broken = copied(source, tmp_path / "broken")
    tensors = load_file(broken / file)
    tensors[name][3, 5] = torch.nan
    save_file(tensors, broken / file, metadata={"format": "pt"})
    refuses(broken, tokenizers, tmp_path / "folder", CheckpointError, f"{name} has others")
    del tensors[name]
    save_file(tensors, broken / file, metadata={"format": "pt"})
    refuses(broken, tokenizers, tmp_path / "folder", CheckpointError, name)


def test_a_tied_checkpoint_may_hold_its_head_if_it_is_the_embedding(
    qwen3: Callable[..., Path], tokenizers: Path, tmp_path: Path
) -> None:
    source = qwen3(tmp_path / "source", tied=True, shard="1GB")
    tensors = load_file(source / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    made = convert_language_model(source, tmp_path / "bundle", bundle=tokenizers, scene_length=LENGTH)
    assert "lm_head.weight" not in TensorFiles(made.path).facts
    tensors["lm_head.weight"][0, 0] += 1
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    refuses(source, tokenizers, tmp_path / "folder", CheckpointError, "tie_word_embeddings")


def test_what_cannot_be_asked_for_is_refused(source: Path, bundle: Bundle, tokenizers: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is there already"):
        convert_language_model(source, bundle.path, bundle=tokenizers)
    with pytest.raises(ConfigError, match="--scene-length"):
        convert_language_model(source, tmp_path / "b", bundle=tokenizers)
    with pytest.raises(ConfigError, match="scene_length must be at most"):
        convert_language_model(source, tmp_path / "b", bundle=tokenizers, scene_length=641)
    with pytest.raises(CheckpointError, match="no directory"):
        convert_language_model(tmp_path / "nowhere", tmp_path / "b", bundle=tokenizers)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"), [(["--from", "gpt2"], "must be qwen3"), (["--scene-length", "99"], "goes with --from")]
)
def test_the_command_refuses_what_it_does_not_know(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main(["convert", str(source), str(tmp_path / "b"), *arguments]) == 1
    assert message in capsys.readouterr().err


KILLED = """
import sys, time
from pathlib import Path
from poet_conversions import language_model
from poet_conversions.formats.qwen3 import Qwen3Checkpoint
read, count = Qwen3Checkpoint.read, 0
def slow(self, name):
    global count
    count += 1
    if count == int(sys.argv[4]):
        print("there", flush=True)
        time.sleep(600)
    return read(self, name)
Qwen3Checkpoint.read = slow
source, target, bundle = map(Path, sys.argv[1:4])
language_model.convert_language_model(source, target, bundle=bundle, scene_length=256, largest_file=int(sys.argv[5]))
"""


@pytest.mark.parametrize(("place", "largest_file"), [(1, LARGEST_FILE), (17, LARGEST_FILE), (17, 10**9)])
def test_a_killed_conversion_leaves_nothing_that_opens(
    source: Path, tokenizers: Path, tmp_path: Path, place: int, largest_file: int
) -> None:
    target = tmp_path / "out" / "bundle"
    arguments = [*map(str, (source, target, tokenizers)), str(place), str(largest_file)]
    with subprocess.Popen(
        [sys.executable, "-c", KILLED, *arguments], stdout=subprocess.PIPE, text=True, env=os.environ.copy()
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "there\n"
        time.sleep(0.05)
        process.kill()
    assert not target.exists()
    left = list(target.parent.iterdir())
    assert left
    for directory in left:
        with pytest.raises(CheckpointError, match=r"lacks model\.safetensors"):
            Bundle.open(directory)
        with pytest.raises(CheckpointError):
            Bundle.open(directory, require_model=False)
