"""Files and batches over HTTP, with OpenAI's client unmodified."""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest

from poet.bundle import Bundle
from poet.media import Clip, write_clip
from poet.testing import tiny_bundle
from poet_serving.api.guard import Limits
from poet_serving.testing import RunningServer, run_server

KEYS = {"ada": "ada-secret-0123456789", "bob": "bob-secret-0123456789"}
PROMPT = "a red star"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return tiny_bundle(tmp_path_factory.mktemp("made") / "tiny")


@pytest.fixture(scope="module")
def server(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    limits = Limits(open_jobs=3, file_bytes=200_000)
    with run_server(bundle, tmp_path_factory.mktemp("data"), keys=KEYS, limits=limits) as running:
        yield running


def client(server: RunningServer, name: str = "ada") -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEYS[name], max_retries=0)


def line(name: str, **body: Any) -> dict[str, Any]:
    return {"custom_id": name, "method": "POST", "url": "/v1/videos", "body": {"prompt": PROMPT} | body}


def begin(ada: openai.OpenAI, *lines: Any) -> Any:
    content = "\n".join(given if isinstance(given, str) else json.dumps(given) for given in lines).encode()
    file = ada.files.create(file=("jobs.jsonl", content), purpose="batch")
    # The client's type for endpoint lists OpenAI's own.
    return ada.batches.create(input_file_id=file.id, endpoint="/v1/videos", completion_window="24h")


def ended(ada: openai.OpenAI, id: str) -> Any:
    ends = time.monotonic() + 60
    while (batch := ada.batches.retrieve(id)).status in ("in_progress", "cancelling"):
        assert time.monotonic() < ends
        time.sleep(0.05)
    return batch


def results(ada: openai.OpenAI, id: str | None) -> dict[str, Any]:
    if id is None:
        return {}
    return {result["custom_id"]: result for result in map(json.loads, ada.files.content(id).text.splitlines())}


def test_a_batch_answers_every_line(server: RunningServer) -> None:
    ada = client(server)
    good = [line(f"clip {number}", seed=number) for number in range(7)]  # more than a key may have at a time
    batch = begin(ada, *good, line("bad", colour="red"), "{", line("clip 3"))
    assert (batch.status, batch.request_counts.total) == ("in_progress", 10)
    done = ended(ada, batch.id)
    counts = done.request_counts
    assert (done.status, counts.completed, counts.failed) == ("completed", 7, 3)
    outputs = results(ada, done.output_file_id)
    assert sorted(outputs) == [f"clip {number}" for number in range(7)]
    for name, result in outputs.items():
        body = result["response"]["body"]
        assert (result["response"]["status_code"], body["status"]) == (200, "completed")
        assert body["metadata"]["seed"] == name.split()[1]
        assert ada.videos.download_content(body["id"]).read()[4:8] == b"ftyp"
    assert done.error_file_id is not None
    codes = [
        json.loads(text)["response"]["body"]["error"]["code"]
        for text in ada.files.content(done.error_file_id).text.splitlines()
    ]
    assert codes == ["unknown_parameter", "invalid_json", "duplicate_custom_id"]


def test_a_batch_that_is_cancelled_ends_and_keeps_what_is_done(server: RunningServer) -> None:
    ada = client(server)
    first = ended(ada, begin(ada, line("one")).id)
    assert first.status == "completed"
    server.hold.clear()
    try:
        batch = begin(ada, *(line(f"clip {number}") for number in range(9)))
        assert ada.batches.cancel(batch.id).status in ("cancelling", "cancelled")
        done = ended(ada, batch.id)
    finally:
        server.hold.set()
    assert done.status == "cancelled"
    assert done.request_counts.completed == 0
    with pytest.raises(openai.ConflictError):
        ada.batches.cancel(batch.id)
    assert all(video.status not in ("queued", "in_progress") for video in ada.videos.list())


def test_a_batch_goes_on_after_a_restart_without_doing_a_line_twice(bundle: Bundle, tmp_path: Path) -> None:
    with run_server(bundle, tmp_path / "data", keys=KEYS) as first:
        ada = client(first)
        batch = begin(ada, *(line(f"clip {number}") for number in range(12)))
        ends = time.monotonic() + 60
        while ada.batches.retrieve(batch.id).request_counts.completed < 2:
            assert time.monotonic() < ends
            time.sleep(0.01)
        first.hold.clear()
    with run_server(bundle, tmp_path / "data", keys=KEYS) as second:
        ada = client(second)
        done = ended(ada, batch.id)
        assert (done.status, done.request_counts.completed) == ("completed", 12)
        assert len(results(ada, done.output_file_id)) == 12
        assert len(list(ada.videos.list())) == 12


def test_files_are_kept_listed_and_deleted(server: RunningServer) -> None:
    ada, bob = client(server), client(server, "bob")
    made = [ada.files.create(file=(f"{number}.txt", b"x" * (number + 1)), purpose="user_data") for number in range(3)]
    assert [file.bytes for file in made] == [1, 2, 3]
    assert ada.files.retrieve(made[0].id).filename == "0.txt"
    assert ada.files.content(made[2].id).read() == b"xxx"
    assert [file.id for file in ada.files.list(purpose="user_data", limit=2)] == [file.id for file in made[::-1]]
    assert ada.files.list(purpose="vision").data == []
    for call in (bob.files.retrieve, bob.files.content, bob.files.delete):
        with pytest.raises(openai.NotFoundError):
            call(made[0].id)
    assert ada.files.delete(made[0].id).deleted
    with pytest.raises(openai.NotFoundError):
        ada.files.retrieve(made[0].id)


def test_the_name_of_a_file_is_no_path(server: RunningServer) -> None:
    ada = client(server)
    file = ada.files.create(file=("../../evil.txt", b"x"), purpose="user_data")
    folders = [path.name for path in (server.service.store.content / file.id).iterdir()]
    assert folders == ["content"]
    assert not list(server.service.store.content.rglob("evil*"))


def test_files_of_a_key_have_a_limit_together(server: RunningServer) -> None:
    bob = client(server, "bob")
    bob.files.create(file=("a", b"x" * 150_000), purpose="user_data")
    with pytest.raises(openai.APIStatusError) as full:
        bob.files.create(file=("b", b"x" * 60_000), purpose="user_data")
    assert (full.value.status_code, full.value.code) == (413, "too_many_files")


def test_a_request_names_an_uploaded_picture(server: RunningServer, tmp_path: Path) -> None:
    ada, bob = client(server), client(server, "bob")
    frames = np.random.default_rng(0).integers(0, 255, (1, 24, 40, 3), np.uint8)
    write_clip(Clip(frames=frames, fps=8, samples=None, sample_rate=16_000), tmp_path / "x.png")
    file = ada.files.create(file=tmp_path / "x.png", purpose="vision")
    body = {"prompt": PROMPT, "input_reference": {"file_id": file.id}}
    made = httpx.post(f"{server.url}/v1/videos", json=body, headers={"authorization": f"Bearer {KEYS['ada']}"}).json()
    video = ada.videos.poll(made["id"])
    assert video.model_extra is not None
    assert video.model_extra["metadata"]["task"] == "image_to_video"
    stolen = httpx.post(f"{server.url}/v1/videos", json=body, headers={"authorization": f"Bearer {KEYS['bob']}"})
    assert stolen.status_code == 404
    assert bob.files.list().data is not None


@pytest.mark.parametrize(
    ("body", "code"),
    [
        ({"input_file_id": "file_0"}, "invalid_value"),
        ({"input_file_id": "file_0", "endpoint": "/v1/videos", "completion_window": "24h"}, "not_found"),
        ({"input_file_id": "file_0", "endpoint": "/v1/x", "completion_window": "24h"}, "invalid_value"),
        ({"input_file_id": "file_0", "endpoint": "/v1/videos", "completion_window": "1h"}, "invalid_value"),
        ({"input_file_id": 3, "endpoint": "/v1/videos", "completion_window": "24h"}, "invalid_value"),
        ({"colour": "red"}, "unknown_parameter"),
    ],
)
def test_a_batch_that_is_none_is_refused(server: RunningServer, body: dict[str, Any], code: str) -> None:
    headers = {"authorization": f"Bearer {KEYS['ada']}"}
    response = httpx.post(f"{server.url}/v1/batches", json=body, headers=headers)
    assert response.status_code in (400, 404)
    assert response.json()["error"]["code"] == code


def test_batches_are_listed_for_their_owner_alone(server: RunningServer) -> None:
    ada, bob = client(server), client(server, "bob")
    batch = begin(ada, line("one"))
    assert ended(ada, batch.id).status == "completed"
    assert next(iter(ada.batches.list(limit=1))).id == batch.id
    assert bob.batches.list().data == []
    for call in (bob.batches.retrieve, bob.batches.cancel):
        with pytest.raises(openai.NotFoundError):
            call(batch.id)
