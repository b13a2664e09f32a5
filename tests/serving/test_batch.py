"""`poet batch`: lines become clips or errors, once each, whatever happens in between."""

import base64
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from poet.bundle import Bundle
from poet.cli.main import main
from poet.errors import ConfigError
from poet.generation.engine import TorchEngine
from poet.generation.pipeline import Pipeline
from poet.media import Clip, read_clip, write_clip
from poet.model.lora import Adapter, read_adapter
from poet.testing import save_adapter, tiny_bundle, tiny_upsampler
from poet_serving.batch import MAX_LINE, BatchSummary, run_batch


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    made = tiny_bundle(tmp_path_factory.mktemp("made") / "tiny")
    tiny_upsampler(made, made.path / "upsampler")
    file = made.path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"trained_parallel": True}))
    return Bundle.open(made.path)


@pytest.fixture(scope="module")
def pipeline(bundle: Bundle) -> Any:
    with TorchEngine(bundle.path, max_batch_size=3) as engine:
        yield Pipeline(bundle, engine)


@pytest.fixture
def run(pipeline: Pipeline, tmp_path: Path) -> Callable[..., BatchSummary]:
    """A run over the lines that are given, into tmp_path / "out"."""

    def run(*lines: Any, progress: Any = None, start: Any = None) -> BatchSummary:
        def usual(decodings: Sequence[str]) -> Any:
            started.append(tuple(decodings))
            return contextlib.nullcontext(pipeline)

        jobs = write(tmp_path, *lines)
        return run_batch(jobs, pipeline.bundle, tmp_path / "out", start or usual, progress)

    started: list[tuple[str, ...]] = []
    run.started = started  # type: ignore[attr-defined]

    return run


def write(directory: Path, *lines: Any) -> Path:
    file = directory / "jobs.jsonl"
    text = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
    file.write_bytes(b"\n".join(text) + b"\n")
    return file


def job(name: str, **body: Any) -> dict[str, Any]:
    return {"custom_id": name, "method": "POST", "url": "/v1/videos", "body": {"prompt": "a red star", **body}}


def results(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / "out" / "results.jsonl").read_text().splitlines()]


def by_id(directory: Path) -> dict[str | None, dict[str, Any]]:
    return {result["custom_id"]: result["response"] for result in results(directory)}


def picture(directory: Path) -> Path:
    frames = np.random.default_rng(0).integers(0, 255, (1, 30, 50, 3), dtype=np.uint8)
    write_clip(Clip(frames=frames, fps=8.0, samples=None, sample_rate=1600), directory / "photo.png")
    return directory / "photo.png"


def test_every_line_becomes_a_file_that_its_result_names(run: Callable[..., BatchSummary], tmp_path: Path) -> None:
    url = "data:image/png;base64," + base64.b64encode(picture(tmp_path).read_bytes()).decode()
    summary = run(
        job("plain", seed=3),
        job("larger", seed=3, size="80x48", upsample_steps=2),
        job("moving", input_reference={"path": "photo.png"}),
        job("url", input_reference={"image_url": url}, prompt=None),
        job("parallel", decoding="parallel", steps=4, seconds="1"),
        job("sound", task="text_to_audio"),
        job("still", task="text_to_image"),
        b"   ",
        job("same seed", seed=3),
    )
    assert (summary.completed, summary.failed, summary.before) == (8, 0, 0)
    found = by_id(tmp_path)
    for name, suffix, size in (
        ("plain", ".mp4", "40x24"), ("larger", ".mp4", "80x48"), ("moving", ".mp4", "40x24"),
        ("url", ".mp4", "40x24"), ("still", ".png", "40x24"),
    ):  # fmt: skip
        body = found[name]["body"]
        assert (found[name]["status_code"], body["status"], body["object"]) == (200, "completed", "video")
        assert body["file"].endswith(suffix)
        assert body["size"] == size
        frames = read_clip(tmp_path / "out" / body["file"]).frames
        assert frames is not None
        assert f"{frames.shape[2]}x{frames.shape[1]}" == size
    assert found["sound"]["body"]["file"].endswith(".wav")
    assert found["moving"]["body"]["metadata"]["task"] == "image_to_video"
    assert found["parallel"]["body"]["metadata"]["decoding"] == "parallel"
    same = [found[name]["body"]["metadata"]["ids_sha256"] for name in ("plain", "same seed", "larger")]
    assert len(set(same)) == 1
    assert len({result["id"] for result in results(tmp_path)}) == 8
    assert sorted(path.name for path in (tmp_path / "out" / "media").iterdir()) == sorted(
        Path(one["body"]["file"]).name for one in found.values()
    )


def test_bad_lines_are_answered_and_stop_nothing(run: Callable[..., BatchSummary], tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(50))
    cases: dict[str, tuple[Any, str, str | None]] = {
        "unknown": (job("unknown", colour="red"), "unknown_parameter", "colour"),
        "task": (job("task", task="telepathy"), "invalid_value", "task"),
        "cold": (job("cold", temperature=-1), "invalid_value", "temperature"),
        "pulled": (job("pulled", guidance_scale=1e38), "invalid_value", None),
        "repeats": (job("repeats", repetition_penalty=1e-300), "invalid_value", None),
        "not a number": (job("not a number", top_p="much"), "invalid_value", "top_p"),
        "model": (job("model", model="sora-2"), "model_not_found", "model"),
        "size": (job("size", size="1280x720"), "unsupported_size", "size"),
        "seconds": (job("seconds", seconds="12"), "unsupported_seconds", "seconds"),
        "seconds too": (job("seconds too", seconds="long"), "unsupported_seconds", "seconds"),
        "steps": (job("steps", steps=4), "invalid_value", "steps"),
        "missing": (job("missing", input_reference={"path": "nowhere.png"}), "invalid_value", None),
        "damaged": (job("damaged", input_reference={"path": "broken.png"}), "invalid_value", None),
        "two": (job("two", input_reference={"path": "a", "file_id": "b"}), "invalid_value", "input_reference"),
        "remote": (
            job("remote", input_reference={"image_url": "http://127.0.0.1/a.png"}),
            "invalid_input_reference",
            "input_reference",
        ),
        "not base64": (
            job("not base64", input_reference={"image_url": "data:image/png;base64,?"}),
            "invalid_input_reference",
            "input_reference",
        ),
        "long": (job("long", prompt="star " * 6000), "invalid_value", None),
        "wrong inputs": (job("wrong inputs", task="audio_to_video"), "invalid_value", None),
        "url": ({**job("url"), "url": "/v1/chat/completions"}, "invalid_value", "url"),
        "key": ({**job("key"), "extra": 1}, "unknown_parameter", "extra"),
        "body": ({"custom_id": "body"}, "invalid_value", "body"),
    }
    nameless = [
        b"{",
        b"[" * 200_000,
        b"[]",
        b'"x"',
        b"\xff\xfe",
        json.dumps({"body": {}}).encode(),
        b'{"custom_id": 7, "body": {}}',
    ]
    lines = [line for line, _, _ in cases.values()]
    summary = run(job("first"), *lines, *nameless, job("first"), b"x" * (MAX_LINE + 10), job("last"))
    assert (summary.completed, summary.failed) == (2, len(cases) + len(nameless) + 2)
    found = by_id(tmp_path)
    for name, (_, code, param) in cases.items():
        error = found[name]["body"]["error"]
        assert (error["code"], error["param"]) == (code, param), (name, error)
        assert found[name]["status_code"] == (404 if code == "model_not_found" else 400)
        assert error["type"] == "invalid_request_error"
        assert error["message"]
    codes = [one["response"]["body"].get("error", {}).get("code") for one in results(tmp_path)]
    assert (codes.count("invalid_json"), codes.count("duplicate_custom_id"), codes.count("line_too_long")) == (5, 1, 1)
    assert found["last"]["status_code"] == 200


def test_what_is_answered_is_not_done_again_and_half_a_line_is_forgotten(
    run: Callable[..., BatchSummary], tmp_path: Path
) -> None:
    lines = [job("a"), b"{", job("b", task="telepathy"), job("a"), job("c")]
    first = run(*lines)
    assert (first.completed, first.failed) == (2, 3)
    kept = (tmp_path / "out" / "results.jsonl").read_bytes()
    again = run(*lines)
    assert (again.completed, again.failed, again.before) == (2, 3, 5)
    assert (tmp_path / "out" / "results.jsonl").read_bytes() == kept
    assert len(run.started) == 1  # type: ignore[attr-defined]
    (tmp_path / "out" / "results.jsonl").write_bytes(kept + b'{"id": "batch_req_')
    (tmp_path / "out" / "media" / ".poet-abc.mp4").write_bytes(b"half")
    seen: list[tuple[int, int, int]] = []
    more = run(job("d"), *lines, progress=lambda *told: seen.append(told))
    assert (more.completed, more.failed, more.before) == (3, 5, 5)  # two lines are others by their numbers
    assert seen[-1] == (6, 6, 3)
    kept = (tmp_path / "out" / "results.jsonl").read_bytes()
    files = [one["response"]["body"].get("file") for one in results(tmp_path)]
    named = [Path(file).name for file in files if file]
    assert sorted(path.name for path in (tmp_path / "out" / "media").iterdir()) == sorted(set(named))
    assert len(set(named)) == 3
    with pytest.raises(ConfigError, match="holds an answer to id a, which asked for something else"):
        run(job("e"), job("a", seed=1))
    assert (tmp_path / "out" / "results.jsonl").read_bytes() == kept
    changed = kept.replace(b'"weights_sha256": "', b'"weights_sha256": "0')
    (tmp_path / "out" / "results.jsonl").write_bytes(changed)
    with pytest.raises(ConfigError, match="holds clips of other weights"):
        run(*lines)
    (tmp_path / "out" / "results.jsonl").write_text("{}\n")
    with pytest.raises(ConfigError, match="is no result of a batch"):
        run(*lines)


def test_a_run_that_is_killed_again_and_again_answers_every_line_once(bundle: Bundle, tmp_path: Path) -> None:
    names = [f"job {number}" for number in range(24)]
    jobs = write(tmp_path, *(job(name, seed=number) for number, name in enumerate(names)))
    command = [sys.executable, "-m", "poet.cli.main", "batch", str(jobs), "-o", str(tmp_path / "out")]
    command += ["--model", str(bundle.path), "--engine", "torch", "--batch-size", "2"]
    file, kills = tmp_path / "out" / "results.jsonl", 0
    for wanted in (4, 12):
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        while process.poll() is None and (not file.exists() or file.read_bytes().count(b"\n") < wanted):
            time.sleep(0.01)
        if process.poll() is None:
            os.kill(process.pid, signal.SIGKILL)
            kills += 1
        process.wait()
    assert kills
    subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
    found = results(tmp_path)
    assert sorted(one["custom_id"] for one in found) == sorted(names)
    for one in found:
        assert read_clip(tmp_path / "out" / one["response"]["body"]["file"]).frames is not None


def test_the_command_says_what_was_done(bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    jobs = write(tmp_path, job("a"), job("b", colour=1))
    told = ["batch", jobs, "-o", tmp_path / "out", "--model", bundle.path, "--engine", "torch", "--json"]
    assert main([str(argument) for argument in told]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["completed"], said["failed"], said["answered_before"]) == (1, 1, 0)
    assert said["results"] == str(tmp_path / "out" / "results.jsonl")
    for bad, words in ((tmp_path / "nowhere.jsonl", "cannot be read"), (write(tmp_path, b""), "it holds none")):
        assert main(["batch", str(bad), "--model", str(bundle.path)]) == 1
        assert words in capsys.readouterr().err


def test_an_engine_is_started_for_what_is_asked_for(run: Callable[..., BatchSummary], tmp_path: Path) -> None:
    run(job("a"), b"{")
    run(job("a"), job("b", decoding="parallel", steps=2), job("c", size="80x48", upsample_steps=1))
    assert run.started == [("autoregressive",), ("autoregressive", "parallel", "upsampling")]  # type: ignore[attr-defined]


def test_lines_name_adapters_as_their_model(bundle: Bundle, tmp_path: Path) -> None:
    config, folder = bundle.model_config, tmp_path / "adapters"
    paths = {name: save_adapter(config, folder / name, seed=seed) for seed, name in enumerate(("ink", "clay"))}

    def read() -> tuple[Adapter, ...]:
        return tuple(read_adapter(path, config, bundle.fingerprint) for path in paths.values())

    adapters = read()
    lines = [job(str(name), seed=3, **({} if name is None else {"model": name})) for name in (None, *paths, "chalk")]
    jobs, started = write(tmp_path, *lines), 0

    @contextlib.contextmanager
    def start(decodings: Sequence[str]) -> Any:
        nonlocal started
        started += 1
        with TorchEngine(bundle.path, max_batch_size=3, decodings=decodings, adapters=adapters) as engine:
            yield Pipeline(bundle, engine, adapters=adapters)

    summary = run_batch(jobs, bundle, tmp_path / "out", start, adapters=adapters)
    assert (summary.completed, summary.failed) == (3, 1)
    found = by_id(tmp_path)
    assert found["chalk"]["body"]["error"]["code"] == "model_not_found"
    bodies = [found[str(name)]["body"] for name in (None, *paths)]
    assert [body["model"] for body in bodies] == ["tiny", "ink", "clay"]
    assert len({body["metadata"]["ids_sha256"] for body in bodies}) == 3
    assert [body["metadata"].get("adapter_sha256") for body in bodies] == [None, *(one.sha256 for one in adapters)]
    run_batch(jobs, bundle, tmp_path / "out", start, adapters=adapters)
    assert started == 1
    # The same name with other weights is another model.
    save_adapter(config, folder / "ink", seed=5)
    for given in (read(), ()):
        with pytest.raises(ConfigError, match=r"of the adapter .* given again with --lora"):
            run_batch(jobs, bundle, tmp_path / "out", start, adapters=given)
