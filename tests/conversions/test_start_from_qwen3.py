"""From a language model to clips by the shipped recipes: rows first, text to the last digit, then everything."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from poet.bundle import Bundle
from poet.cli.main import main
from poet.model.tensor_files import TensorFiles
from poet.testing import tiny_shards, tiny_tokenizer_bundle
from poet_conversions.language_model import compare_text, convert_language_model

RECIPES = Path(__file__).parents[2] / "recipes" / "language_model"
FAST = ("num_steps=6", "batch_size=4", "warmup_steps=1", "precision=fp32", "loop.validate_every=3")


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def source(
    request: pytest.FixtureRequest, qwen3: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    return qwen3(tmp_path_factory.mktemp("source") / "qwen3", tied=request.param)


def test_the_recipes_lead_from_a_language_model_to_clips(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def call(*arguments: object) -> None:
        assert main([str(argument) for argument in arguments]) == 0, capsys.readouterr().err

    rest = tiny_tokenizer_bundle(tmp_path / "rest").path
    start, with_rows = tmp_path / "start", tmp_path / "with_rows"
    # The default resolution alone is shown, so scenes of 256 ids suffice.
    convert_language_model(source, start, bundle=rest, scene_length=256, largest_file=80_000)
    shards = tiny_shards(Bundle.open(start), tmp_path / "shards", count=11)
    changes = (*FAST, f"bundle={start}", f"data.clips={shards}", "lora.target_modules=[]", "data.held_out=0.2")
    sets = [part for change in changes for part in ("--set", change)]
    call("train", RECIPES / "rows.yaml", "-o", tmp_path / "rows", *sets)
    call("merge", tmp_path / "rows" / "export", "-o", with_rows, "--model", start)
    # transformers' own model still says the same of text.
    assert compare_text(source, with_rows).largest_difference < 1e-5
    before, after = TensorFiles(start), TensorFiles(with_rows)
    changed = [name for name in before.facts if not torch.equal(before.read(name), after.read(name))]
    assert changed == sorted({"model.embed_tokens.weight", "lm_head.weight"} & before.facts.keys())

    changes = (*FAST, f"bundle={with_rows}", f"start_from={with_rows}", f"shards={shards}")
    changes += (f"validation_shards={shards}", "validation_batches=1", "learning_rate=2e-3")
    sets = [part for change in changes for part in ("--set", change)]
    call("train", RECIPES / "whole.yaml", "-o", tmp_path / "whole", *sets)
    made = Bundle.open(tmp_path / "whole" / "export")
    assert made.model_config == Bundle.open(start).model_config
    assert compare_text(source, made.path).largest_difference > 1e-3
    log = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["validation_loss"] for line in log if "validation_loss" in line]
    assert losses[-1] < losses[0]
    clip = tmp_path / "clip.mp4"
    call("generate", "a red star rises", "-o", clip, "--model", made.path, "--engine", "torch")
    assert clip.stat().st_size > 0
