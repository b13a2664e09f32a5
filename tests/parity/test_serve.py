"""`poet serve` as it is, vLLM's engine in a process of its own: started, used, killed, started again."""

import contextlib
import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from poet.bundle import Bundle
from poet.generation.canvas import ParallelDecoding
from poet.generation.engine import TorchEngine
from poet.generation.pipeline import ClipRequest, Pipeline
from poet.generation.sampling import SamplingConfig
from poet.model.lora import read_adapter
from poet.testing import save_adapter, tiny_bundle, tiny_upsampler
from poet_serving.jobs import JobStatus, JobStore

PROMPT = "a red star"
CONFIG = {"head_dim": 32}  # what vLLM takes


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    made = tiny_bundle(tmp_path_factory.mktemp("made") / "tiny", config=CONFIG)
    file = made.path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"trained_parallel": True}))
    tiny_upsampler(made, made.path / "upsampler")
    return Bundle.open(made.path)


@contextlib.contextmanager
def serving(bundle: Bundle, data: Path, *options: str) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """`poet serve` on a free port, in a session of its own."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "poet.cli.main", "serve", "--model", str(bundle.path), "--data", str(data)]
    log = data.with_suffix(".log")
    with log.open("ab") as file:
        process = subprocess.Popen(
            [*command, "--port", str(port), "--no-page", *options], stdout=file, stderr=file, start_new_session=True
        )
    url = f"http://127.0.0.1:{port}"
    try:
        ends = time.monotonic() + 400
        while True:
            assert process.poll() is None, log.read_text()[-4000:]
            assert time.monotonic() < ends, log.read_text()[-4000:]
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"{url}/health", timeout=5).status_code == 200:
                    break
            time.sleep(0.2)
        yield process, url
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                raise
        until(lambda: not members(process.pid), 20)


def members(session: int) -> list[int]:
    """The processes of a session."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = path.read_text().rpartition(")")[2].split()
            if int(fields[3]) == session and fields[0] != "Z":
                found.append(int(path.parent.name))
    return found


def until(holds: Any, seconds: float) -> None:
    ends = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < ends
        time.sleep(0.1)


def ids_of(video: Any) -> str:
    assert video.status == "completed", video.error
    return str(video.model_extra["metadata"]["ids_sha256"])


@pytest.mark.timeout(900)  # a start of a server with three engines, also on a busy machine
def test_a_server_writes_what_the_reference_writes(bundle: Bundle, tmp_path: Path) -> None:
    greedy = {"temperature": 0.0, "seed": 1}
    requests = [
        ClipRequest(
            task="text_to_video_audio", text=f"{PROMPT} {number}", sampling=SamplingConfig(temperature=0, seed=1)
        )
        for number in range(3)
    ]
    guided = ClipRequest(
        task="text_to_video_audio", text=PROMPT, sampling=SamplingConfig(temperature=0, seed=1, guidance_scale=3.0)
    )
    parallel = dataclasses.replace(guided, decoding=ParallelDecoding(num_steps=4))
    adapter = read_adapter(
        save_adapter(bundle.model_config, tmp_path / "style", fingerprint=bundle.fingerprint),
        bundle.model_config,
        bundle.fingerprint,
    )
    styled = [dataclasses.replace(one, adapter="style") for one in (requests[0], guided, parallel)]
    with TorchEngine(bundle.path, adapters=[adapter]) as engine:
        made = Pipeline(bundle, engine, adapters=[adapter]).generate([*requests, guided, parallel, *styled])
        wanted = [clip.metadata["ids_sha256"] for clip in made]
    data = tmp_path / "data"
    with serving(bundle, data, "--dtype", "float32", "--lora", f"style={adapter.path}") as (_, url):
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0)
        jobs = [client.videos.create(prompt=f"{PROMPT} {number}", extra_body=greedy) for number in range(3)]
        for more in ({}, {"decoding": "parallel", "steps": 4}):
            jobs.append(client.videos.create(prompt=PROMPT, extra_body=greedy | {"guidance_scale": 3.0} | more))
        assert [model.id for model in client.models.list()] == ["tiny", "style"]
        for prompt, more in ((f"{PROMPT} 0", {}), (PROMPT, {"guidance_scale": 3.0})):
            jobs.append(client.videos.create(prompt=prompt, model="style", extra_body=greedy | more))
        more = {"guidance_scale": 3.0, "decoding": "parallel", "steps": 4}
        jobs.append(client.videos.create(prompt=PROMPT, model="style", extra_body=greedy | more))
        assert len(set(wanted)) == len(wanted)
        assert [ids_of(client.videos.poll(job.id)) for job in jobs] == wanted
        larger = client.videos.create(prompt=PROMPT, extra_body=greedy | {"size": "80x48"})
        assert client.videos.poll(larger.id).size == "80x48"
        figures = httpx.get(f"{url}/metrics").text
        for name in ("poet_jobs_queued", "poet_ids_written_total", "poet_clip_seconds_count", "vllm:"):
            assert name in figures
        # vLLM's own routes take ids of anybody, and one beyond the vocabulary would end the engine for everybody.
        for path in ("/v1/completions", "/tokenize", "/inference/v1/generate", "/v1/load_lora_adapter", "/invocations"):
            assert httpx.post(url + path, json={"prompt": [10**9]}).status_code in (404, 405)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_server_that_is_killed_goes_on_and_one_that_is_told_to_end_gives_back(bundle: Bundle, tmp_path: Path) -> None:
    greedy = {"temperature": 0.0, "seed": 1}
    with TorchEngine(bundle.path) as engine:
        sampling = SamplingConfig(temperature=0, seed=1)
        asked = [ClipRequest(task="text_to_video_audio", text=f"{PROMPT} {n}", sampling=sampling) for n in range(3)]
        wanted = [clip.metadata["ids_sha256"] for clip in Pipeline(bundle, engine).generate(asked)]
    data = tmp_path / "data"
    with serving(bundle, data, "--dtype", "float32") as (process, url):
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0)
        accepted = [client.videos.create(prompt=f"{PROMPT} {number}", extra_body=greedy).id for number in range(24)]
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        until(lambda: not members(process.pid), 20)  # no engine is left behind
    with serving(bundle, data, "--dtype", "float32") as (process, url):
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0)
        videos = [client.videos.poll(id) for id in accepted]
        assert [ids_of(video) for video in videos[:3]] == wanted
        assert all(video.status == "completed" for video in videos)
        assert len(list(client.videos.list(limit=100))) == len(accepted)
        more = [client.videos.create(prompt=f"{PROMPT} {number}").id for number in range(40)]
        until(lambda: client.videos.retrieve(more[0]).status != "queued", 30)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) in (0, -signal.SIGTERM)
    store = JobStore(f"sqlite:///{data / 'jobs.sqlite'}", data / "content")
    left = [store.get(id) for id in more]
    store.close()
    # Told to end, it gives back what it has begun, and fails nothing.
    assert not [job.error for job in left if job.error is not None], data.with_suffix(".log").read_text()[-4000:]
    assert any(job.status is not JobStatus.COMPLETED for job in left)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_server_ends_with_an_engine_of_its_own_and_goes_on_after_a_start(bundle: Bundle, tmp_path: Path) -> None:
    data = tmp_path / "data"
    with serving(bundle, data) as (process, url):
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0)
        engines = [pid for pid in members(process.pid) if "EngineCore" in Path(f"/proc/{pid}/cmdline").read_text()]
        assert len(engines) == 3  # of ids, of canvases, of larger pictures
        os.kill(max(engines), signal.SIGKILL)  # the last to start, which vLLM's server knows nothing of
        larger = client.videos.create(prompt=PROMPT, extra_body={"size": "80x48"}).id
        assert process.wait(60) == 1
        assert "an engine ended by itself" in data.with_suffix(".log").read_text()
    with serving(bundle, data) as (_, url):
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0)
        assert client.videos.poll(larger).status == "completed"
