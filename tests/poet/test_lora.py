"""Adapters as PEFT writes them: read, checked and merged."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from poet.cli.adapters import read_named, read_one
from poet.errors import CheckpointError, ConfigError
from poet.model.attention import SceneLayout
from poet.model.lora import merge_adapter, read_adapter
from poet.model.transformer import PoetTransformer
from poet.testing import save_adapter, save_model, sharp_model, tiny_bundle, tiny_config, tiny_vocabulary

CONFIG = tiny_config(tiny_vocabulary())
FINGERPRINT = "f" * 64
FIRST = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


def logits(model: PoetTransformer, ids: torch.Tensor) -> torch.Tensor:
    layout = SceneLayout.from_prefix_lengths(torch.tensor([4]), torch.tensor([ids.shape[1]]), ids.shape[1])
    with torch.inference_mode():
        return model.logits(model(ids, layout))


@pytest.mark.parametrize("rslora", [False, True])
def test_an_adapter_of_pefts_own_merges_to_what_peft_merges(tmp_path: Path, rslora: bool) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from poet.model.huggingface import PoetForCausalLM

    save_model(sharp_model(CONFIG, seed=3), tmp_path / "bundle")
    shell = AutoModelForCausalLM.from_pretrained(tmp_path / "bundle", dtype=torch.float32)
    assert isinstance(shell, PoetForCausalLM)
    settings = LoraConfig(r=5, lora_alpha=7, target_modules=["q_proj", "o_proj", "down_proj"], use_rslora=rslora)
    adapted = get_peft_model(shell, settings)
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_" in name:
                weight.normal_(generator=torch.Generator().manual_seed(len(name)))
    adapted.save_pretrained(tmp_path / "style")
    adapter = read_adapter(tmp_path / "style", CONFIG, FINGERPRINT)
    assert (adapter.name, adapter.rank) == ("style", 5)
    assert adapter.scale == pytest.approx(7 / (5**0.5 if rslora else 5))
    model = sharp_model(CONFIG, seed=3)
    plain = logits(model, torch.arange(9)[None])
    merge_adapter(model, adapter)
    merged = adapted.merge_and_unload().state_dict()
    for name, weight in model.state_dict().items():
        torch.testing.assert_close(weight, merged[name])
    assert not torch.allclose(logits(model, torch.arange(9)[None]), plain)


def test_an_adapter_is_known_by_its_files(tmp_path: Path) -> None:
    paths = [save_adapter(CONFIG, tmp_path / str(number), seed=number % 2) for number in range(3)]
    first, other, again = (read_adapter(path, CONFIG, FINGERPRINT) for path in paths)
    assert first.sha256 == again.sha256 != other.sha256
    save_adapter(CONFIG, tmp_path / "2", lora_alpha=9)
    assert read_adapter(tmp_path / "2", CONFIG, FINGERPRINT).sha256 != first.sha256


def edit_config(**changes: Any) -> Callable[[Path], None]:
    def edit(path: Path) -> None:
        file = path / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return edit


def edit_tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def edit(path: Path) -> None:
        tensors = load_file(path / "adapter_model.safetensors")
        change(tensors)
        save_file(tensors, path / "adapter_model.safetensors")

    return edit


@pytest.mark.parametrize(
    ("damage", "error", "words"),
    [
        (lambda path: (path / "adapter_config.json").unlink(), CheckpointError, "adapter_config.json cannot be read"),
        (lambda path: (path / "adapter_config.json").write_text("{"), CheckpointError, "cannot be read"),
        (lambda path: (path / "adapter_model.safetensors").unlink(), CheckpointError, "copy it whole"),
        (lambda path: (path / "adapter_model.safetensors").write_bytes(b"x" * 99), CheckpointError, "cannot be read"),
        (edit_config(peft_type="IA3"), ConfigError, "LoRA adapter"),
        (edit_config(use_dora=True), ConfigError, "use_dora True"),
        (edit_config(bias="all"), ConfigError, "bias 'all'"),
        (edit_config(bias=None), ConfigError, "bias None"),
        (edit_config(init_lora_weights="pissa_niter_16"), ConfigError, "init_lora_weights 'pissa_niter_16'"),
        (edit_config(use_qalora=True), ConfigError, "use_qalora"),
        (edit_config(alora_invocation_tokens=[3]), ConfigError, "alora_invocation_tokens"),
        (edit_config(target_modules=None), ConfigError, "target_modules"),
        (edit_config(modules_to_save=["lm_head"]), ConfigError, "modules_to_save"),
        (edit_config(r=0), ConfigError, "rank r of at least 1, got 0"),
        (edit_config(r=5), CheckpointError, r"matrices of \(5, "),
        (edit_config(lora_alpha="8"), ConfigError, "number lora_alpha"),
        (edit_tensors(lambda tensors: tensors.pop(FIRST)), CheckpointError, "one is missing of .*q_proj"),
        (edit_tensors(lambda tensors: tensors.clear()), CheckpointError, "it holds none"),
        (edit_tensors(lambda tensors: tensors[FIRST].fill_(float("nan"))), CheckpointError, "finite"),
        (
            edit_tensors(
                lambda tensors: tensors.update({FIRST.replace("layers.0", "layers.77"): tensors[FIRST].clone()})
            ),
            CheckpointError,
            "one is missing of",
        ),
        (
            edit_tensors(lambda tensors: tensors.update({FIRST.replace("q_proj", "q_norm"): torch.zeros(4, 4)})),
            ConfigError,
            "attention and MLP alone",
        ),
    ],
)
def test_what_is_no_adapter_of_the_model_is_refused_with_its_reason(
    tmp_path: Path, damage: Callable[[Path], None], error: type[Exception], words: str
) -> None:
    path = save_adapter(CONFIG, tmp_path / "style")
    read_adapter(path, CONFIG, FINGERPRINT)
    damage(path)
    with pytest.raises(error, match=words):
        read_adapter(path, CONFIG, FINGERPRINT)


def test_an_adapter_of_another_model_or_vocabulary_is_refused(tmp_path: Path) -> None:
    path = save_adapter(CONFIG, tmp_path / "style", fingerprint="e" * 64)
    assert read_adapter(path, CONFIG, "e" * 64).name == "style"
    with pytest.raises(CheckpointError, match="fingerprint eeeeeeeeeeee, but it must be ffffffffffff"):
        read_adapter(path, CONFIG, FINGERPRINT)
    deeper = save_adapter(tiny_config(tiny_vocabulary(), num_layers=CONFIG.num_layers + 1), tmp_path / "deeper")
    with pytest.raises(CheckpointError, match="Take the bundle"):
        read_adapter(deeper, CONFIG, FINGERPRINT)


@pytest.mark.parametrize("name", ["", "a b", "../up", "a/b", ".hidden", "x" * 65])
def test_names_are_plain(tmp_path: Path, name: str) -> None:
    path = save_adapter(CONFIG, tmp_path / "style")
    with pytest.raises(ConfigError, match="name must be"):
        read_adapter(path, CONFIG, FINGERPRINT, name=name)


def test_what_was_changed_since_it_was_checked_is_not_merged(tmp_path: Path) -> None:
    adapter = read_adapter(save_adapter(CONFIG, tmp_path / "style"), CONFIG, FINGERPRINT)
    save_adapter(CONFIG, tmp_path / "style", seed=1)
    model = sharp_model(CONFIG)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    with pytest.raises(CheckpointError, match="changed since it was checked"):
        merge_adapter(model, adapter)
    (tmp_path / "style" / "adapter_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="cannot be read"):
        merge_adapter(model, adapter)
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


def test_the_command_line_names_adapters(tmp_path: Path) -> None:
    bundle = tiny_bundle(tmp_path / "tiny")
    ink, odd = (save_adapter(bundle.model_config, tmp_path / name) for name in ("ink", "lr=1e-4"))
    assert [one.name for one in read_named([str(ink), f"clay={odd}"], bundle)] == ["ink", "clay"]
    assert read_one(None, bundle) == read_named([], bundle) == ()
    for values, words in (
        ([str(ink), f"ink={odd}"], "'ink' was given before"),
        ([f"tiny={ink}"], "'tiny' is that of the bundle"),
        (["ink="], "must be NAME=DIR, got 'ink='"),
        ([str(odd)], "got 'lr=1e-4'. Rename its directory"),  # its name is its directory's
    ):
        with pytest.raises(ConfigError, match=re.escape(words)):
            read_named(values, bundle)
