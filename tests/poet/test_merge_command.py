"""`poet merge` of tuned tokenizers; what adapters become stands in test_lora_training.py."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from poet.bundle import Bundle
from poet.cli.main import main
from poet.media import Clip, write_clip
from poet.testing import tiny_bundle
from poet_tokenizers.loading import tokenizer_kind
from poet_tokenizers.magvit2.model import MagViT2


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return tiny_bundle(tmp_path_factory.mktemp("bundle") / "tiny")


def tuned(bundle: Bundle, part: str, directory: Path) -> Path:
    """The bundle's video tokenizer with other weights in one part of it."""
    model = MagViT2.load(bundle.path / "video_tokenizer")
    with torch.no_grad():
        for weight in getattr(model, part).parameters():
            weight.mul_(1.5)
    model.save(directory)
    return directory


def merge(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str]:
    code = main(["merge", *map(str, arguments), "--json"])
    out, err = capsys.readouterr()
    return code, out if code == 0 else " ".join(err.split())


def test_a_tuned_decoder_takes_the_place_of_the_bundles(
    bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = tuned(bundle, "decoder", tmp_path / "tuned")
    code, said = merge(capsys, tokenizer, "-o", tmp_path / "new", "--model", bundle.path)
    assert code == 0
    assert json.loads(said)["video tokenizer"] == str(tokenizer)
    new = Bundle.open(tmp_path / "new")
    assert new.fingerprint == bundle.fingerprint
    assert (new.path / "model.safetensors").read_bytes() == (bundle.path / "model.safetensors").read_bytes()
    codes = torch.zeros(1, 2, 2, 2, dtype=torch.int64)
    theirs = MagViT2.load(tokenizer).decode(codes)
    assert new.video_tokenizer.decode(codes).equal(theirs)
    assert not bundle.video_tokenizer.decode(codes).equal(theirs)
    for name in ("audio_tokenizer", "text_tokenizer"):
        assert _files(new.path / name) == _files(bundle.path / name)


def test_codes_that_mean_something_else_are_refused(
    bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tuned(bundle, "encoder", tmp_path / "other")
    code, said = merge(capsys, other, "-o", tmp_path / "new", "--model", bundle.path)
    assert code == 1
    assert "checksum" in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other"]


def test_what_is_neither_adapter_nor_tokenizer_is_refused(
    bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    for wrong in ("empty", "missing"):
        code, said = merge(capsys, tmp_path / wrong, "-o", tmp_path / "new", "--model", bundle.path)
        assert code == 1
        assert "must be a directory with an adapter" in said
    code, said = merge(capsys, bundle.path, "-o", tmp_path / "new", "--model", bundle.path)
    assert code == 1
    assert not (tmp_path / "new").exists()


def test_a_tokenizer_says_what_it_is_for(bundle: Bundle) -> None:
    for kind in ("video", "audio", "text"):
        assert tokenizer_kind(bundle.path / f"{kind}_tokenizer") == kind


def _files(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_the_recipe_tunes_a_decoder_on_a_folder_of_clips(
    bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    usual = bundle.generation_config
    for number in range(5):
        folder = tmp_path / ("held_out" if number == 4 else "clips")
        folder.mkdir(exist_ok=True)
        frames = np.random.default_rng(number).integers(256, size=(usual.num_frames, 40, 56, 3), dtype=np.uint8)
        clip = Clip(frames=frames, fps=usual.fps, samples=None, sample_rate=None)
        write_clip(clip, folder / f"{number}.mp4")
    settings = {
        "start_from": bundle.path / "video_tokenizer",
        "source": tmp_path / "clips",
        "validation_source": tmp_path / "held_out",
        "fps": usual.fps,
        "num_frames": usual.num_frames,
        "height": usual.height,
        "width": usual.width,
        "num_steps": 30,
        "batch_size": 2,
        "warmup_steps": 1,
        "ema_decay": 0.5,
        "precision": "fp32",
    }
    told = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    recipe = Path(__file__).parents[2] / "recipes/tokenizer_training/finetune.yaml"
    assert main(["train", str(recipe), *told, "-o", str(tmp_path / "run"), "--json"]) == 0
    capsys.readouterr()
    assert len(list((tmp_path / "run/frames").glob("*.kept"))) == 2  # decoded once, of either folder
    code, said = merge(capsys, tmp_path / "run/export", "-o", tmp_path / "new", "--model", bundle.path)
    assert code == 0
    assert Bundle.open(json.loads(said)["bundle"]).fingerprint == bundle.fingerprint
    learnt = tmp_path / "clips"
    told = ["evaluate", tmp_path / "new", "--what", "reconstruction", "--clips", learnt, "--against", bundle.path]
    assert main([*map(str, told), "-o", str(tmp_path / "report"), "--json"]) == 0
    assert json.loads((tmp_path / "report/report.json").read_text())["measures"]["psnr gained"] > 0.1
