"""`poet info`: of bundles, token shards, folders and clips; in words and in JSON."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from poet.bundle import Bundle
from poet.data.manifest import Manifest
from poet.media import Clip, probe, write_clip
from poet.testing import tiny_bundle


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("bundle") / "tiny"
    tiny_bundle(directory)
    return directory


def film(
    path: Path, *, frames: int = 9, sound: bool = True, metadata: dict[str, str] | None = None, seed: int = 0
) -> None:
    rng = np.random.default_rng(seed)
    clip = Clip(
        frames=rng.integers(0, 255, (frames, 24, 40, 3), np.uint8) if frames else None,
        fps=8.0,
        samples=rng.uniform(-0.5, 0.5, 1800).astype(np.float32) if sound else None,
        sample_rate=1600,
    )
    write_clip(clip, path, metadata=metadata)


def test_numbers_are_numbers_in_the_json_of_info_and_text_in_the_file(
    call: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    written = {
        "prompt": "7", "seed": "7", "temperature": "0.5", "top_k": "NaN", "top_p": "1e999", "guidance_scale": "true",
        "fps": "9" * 400, "duration": "9" * 5000,
    }  # fmt: skip
    film(tmp_path / "clip.mp4", metadata=written)
    found = json.loads(call("info", "clip.mp4", "--json")[1])
    assert found["metadata"] == written | {"seed": 7, "temperature": 0.5, "fps": int("9" * 400)}
    assert (found["fps"], found["width"], found["height"], found["num_channels"]) == (8.0, 40, 24, 1)
    assert found["duration"] == pytest.approx(1.125, abs=0.1)
    assert probe(tmp_path / "clip.mp4").metadata == written
    lines = call("info", "clip.mp4")[1].splitlines()
    assert "  seed: 7" in lines
    assert not any(line.startswith("fps") for line in lines)  # the line of the picture says it


def test_info_of_a_bundle_has_its_numbers_in_json(call: Callable[..., tuple[int, str, str]], bundle: Path) -> None:
    found = json.loads(call("info", bundle, "--json")[1])
    opened = Bundle.open(bundle)
    assert found["fps"] == opened.generation_config.fps
    assert found["num_parameters"] == opened.model_config.num_parameters


def test_info_of_shards_tells_what_the_manifest_holds_and_whether_it_is_complete(
    call: Callable[..., tuple[int, str, str]], bundle: Path, tmp_path: Path
) -> None:
    (tmp_path / "clips").mkdir()
    for number in range(3):
        film(tmp_path / "clips" / f"{number}.mp4", seed=number)
    (tmp_path / "clips" / "1.txt").write_text("a red star")
    (tmp_path / "clips" / "3.wav").write_bytes(b"not media")
    assert call("encode", "clips", "--model", bundle, "-o", "shards", "--shard-size", 2)[0] == 0
    found = json.loads(call("info", "shards", "--json")[1])
    manifest = Manifest.load(tmp_path / "shards")
    size = sum(file.stat().st_size for file in (tmp_path / "shards").glob("*.parquet"))
    assert found == {
        "shards": "shards",
        "clips": 3,
        "without_caption": 2,
        "skipped": 1,
        "source": manifest.source,
        "source_clips": 4,
        "complete": True,
        "fingerprint": Bundle.open(bundle).fingerprint,
        "files": 2,
        "settings": manifest.settings,
        "megabytes": round(size / 1e6, 3),
    }
    stopped = dataclasses.replace(manifest, shards=manifest.shards[:1], skipped=())
    (tmp_path / "shards" / "manifest.json").write_text(stopped.to_json())
    out = call("info", "shards")[1]
    assert "\ncomplete: False\n" in out
    assert "\nclips: 2\n" in out
    (tmp_path / "shards" / manifest.shards[0].file).unlink()
    code, out, err = call("info", "shards")
    assert (code, out) == (1, "")
    assert manifest.shards[0].file in err


def test_info_of_a_folder_counts_its_clips_by_kind_and_caption(
    call: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    (tmp_path / "clips" / "more").mkdir(parents=True)
    film(tmp_path / "clips" / "both.mp4")
    film(tmp_path / "clips" / "more" / "both.mp4")
    film(tmp_path / "clips" / "silent.webm", sound=False)
    film(tmp_path / "clips" / "sound.wav", frames=0)
    film(tmp_path / "clips" / "spoilt.wav", frames=0)
    (tmp_path / "clips" / "bad.mp4").write_bytes(b"not media")
    (tmp_path / "clips" / "notes.md").write_text("no clip")
    (tmp_path / "clips" / "more" / "both.txt").write_text("a red star")
    (tmp_path / "clips" / "sound.txt").write_text("a bell")
    (tmp_path / "clips" / "silent.txt").write_text(" \n")
    (tmp_path / "clips" / "spoilt.txt").write_bytes(b"\xff")
    code, out, err = call("info", "clips", "--json")
    assert code == 0
    found = json.loads(out)
    assert (found["folder"], found["clips"], found["unreadable"]) == ("clips", 4, 2)
    assert found["picture_and_sound"] == {"with_caption": 1, "without_caption": 1}
    assert found["picture_alone"] == {"with_caption": 0, "without_caption": 1}
    assert found["sound_alone"] == {"with_caption": 1, "without_caption": 0}
    assert found["megabytes"] >= 0
    assert [line.split(":")[0] for line in err.splitlines()] == ["unreadable bad.mp4", "unreadable spoilt.wav"]


def test_info_of_a_directory_that_is_nothing_of_ours_says_what_it_could_be(
    call: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    code, out, err = call("info", "empty")
    assert (code, out, err.count("\n")) == (1, "", 1)
    for word in ("vocabulary.json", "manifest.json", ".mp4"):
        assert word in err


def test_info_of_a_bundle_that_lost_a_file_names_the_file(
    call: Callable[..., tuple[int, str, str]], bundle: Path, tmp_path: Path
) -> None:
    shutil.copytree(bundle, tmp_path / "torn")
    (tmp_path / "torn" / "vocabulary.json").unlink()
    code, _, err = call("info", "torn")
    assert code == 1
    assert "torn lacks vocabulary.json" in err
