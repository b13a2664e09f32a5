"""Files and batches over HTTP, with OpenAI's client unmodified."""

import contextlib
import json
import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from sqlalchemy import text

from poet.bundle import Bundle
from poet.errors import MediaError, PoetError
from poet.media import Clip, write_clip
from poet.testing import tiny_bundle
from poet_serving.api.batch_runner import MAX_TRIES
from poet_serving.api.guard import Limits
from poet_serving.file_store import FileStore
from poet_serving.jobs import JobError, JobStore
from poet_serving.media_reader import MediaReader
from poet_serving.schema import RequestError
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


def until(is_so: Callable[[], bool]) -> None:
    ends = time.monotonic() + 120
    while not is_so():
        assert time.monotonic() < ends
        time.sleep(0.02)


def upload_picture(ada: openai.OpenAI, folder: Path) -> str:
    frames = np.random.default_rng(0).integers(0, 255, (1, 24, 40, 3), np.uint8)
    write_clip(Clip(frames=frames, fps=8, samples=None, sample_rate=16_000), folder / "x.png")
    return ada.files.create(file=folder / "x.png", purpose="vision").id


def line(name: str, **body: Any) -> dict[str, Any]:
    return {"custom_id": name, "method": "POST", "url": "/v1/videos", "body": {"prompt": PROMPT} | body}


def begin(ada: openai.OpenAI, *lines: Any) -> Any:
    content = "\n".join(given if isinstance(given, str) else json.dumps(given) for given in lines).encode()
    file = ada.files.create(file=("jobs.jsonl", content), purpose="batch")
    # The client's type for endpoint lists OpenAI's own.
    return ada.batches.create(input_file_id=file.id, endpoint="/v1/videos", completion_window="24h")


def ended(ada: openai.OpenAI, id: str) -> Any:
    until(lambda: ada.batches.retrieve(id).status not in ("in_progress", "cancelling"))
    return ada.batches.retrieve(id)


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
        until(lambda: ada.batches.retrieve(batch.id).request_counts.completed >= 2)
        first.hold.clear()
    with run_server(bundle, tmp_path / "data", keys=KEYS) as second:
        ada = client(second)
        done = ended(ada, batch.id)
        assert (done.status, done.request_counts.completed) == ("completed", 12)
        assert len(results(ada, done.output_file_id)) == 12
        assert len(list(ada.videos.list())) == 12


@contextlib.contextmanager
def kept(directory: Path) -> Iterator[JobStore]:
    """What a server that has ended left."""
    store = JobStore(f"sqlite:///{directory / 'jobs.sqlite'}", directory / "content")
    try:
        yield store
    finally:
        store.close()


@pytest.mark.parametrize("is_written_down", [True, False])
def test_a_restart_opens_no_upload_of_a_line_that_ended_again(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_written_down: bool
) -> None:
    with run_server(bundle, tmp_path / "data", keys=KEYS, limits=Limits(open_jobs=1)) as first:
        ada = client(first)
        name = upload_picture(ada, tmp_path)
        picture = line("picture", input_reference={"file_id": name})
        batch = begin(ada, picture, *(line(f"clip {number}") for number in range(5)))
        until(lambda: ada.batches.retrieve(batch.id).request_counts.completed >= 1)
        first.hold.clear()
        ada.files.delete(name)
    if not is_written_down:  # it was killed just before
        with kept(tmp_path / "data") as store, store.session(writes=True) as session:
            session.execute(text("DELETE FROM batch_lines"))
    read: list[Any] = []
    monkeypatch.setattr(MediaReader, "read", lambda *arguments, **keywords: read.append(arguments))
    with run_server(bundle, tmp_path / "data", keys=KEYS) as second:
        ada = client(second)
        done = ended(ada, batch.id)
        assert (done.status, done.error_file_id) == ("completed", None)
        assert (done.request_counts.completed, len(results(ada, done.output_file_id))) == (6, 6)
    assert read == []


def test_a_batch_goes_on_after_a_restart_though_its_file_was_deleted(bundle: Bundle, tmp_path: Path) -> None:
    with run_server(bundle, tmp_path / "data", keys=KEYS, limits=Limits(open_jobs=1)) as first:
        ada = client(first)
        first.hold.clear()
        batch = begin(ada, *(line(f"clip {number}") for number in range(4)))
        ada.files.delete(batch.input_file_id)
        folder = first.service.store.content / batch.input_file_id
        assert folder.exists()  # the lines are still to be read
    with run_server(bundle, tmp_path / "data", keys=KEYS) as second:
        ada = client(second)
        done = ended(ada, batch.id)
        assert (done.status, done.request_counts.completed) == ("completed", 4)
        assert not folder.exists()
        with pytest.raises(openai.NotFoundError):
            ada.files.retrieve(batch.input_file_id)


def test_a_restart_does_no_line_again_whose_job_was_deleted(bundle: Bundle, tmp_path: Path) -> None:
    with run_server(bundle, tmp_path / "data", keys=KEYS, limits=Limits(open_jobs=2)) as first:
        ada = client(first)
        batch = begin(ada, *(line(f"clip {number}") for number in range(8)))
        until(lambda: ada.batches.retrieve(batch.id).request_counts.completed >= 2)
        first.hold.clear()
        with first.service.store.session() as session:
            rows = session.scalars(text("SELECT result FROM batch_lines")).all()
        gone = [json.loads(row)["response"]["body"]["id"] for row in rows]
        for id in gone:
            ada.videos.delete(id)
    with run_server(bundle, tmp_path / "data", keys=KEYS) as second:
        ada = client(second)
        done = ended(ada, batch.id)
        assert (done.status, done.request_counts.completed, done.error_file_id) == ("completed", 8, None)
        outputs = results(ada, done.output_file_id)
        assert list(outputs) == [f"clip {number}" for number in range(8)]  # in the order of the lines
        assert set(gone) < {result["response"]["body"]["id"] for result in outputs.values()}
        assert len(list(ada.videos.list())) == 8 - len(gone)


@pytest.mark.parametrize("is_written_down", [True, False])
def test_a_batch_that_was_being_cancelled_at_a_restart_keeps_what_ended_and_drops_what_waits(
    bundle: Bundle, tmp_path: Path, is_written_down: bool
) -> None:
    with run_server(bundle, tmp_path / "data", keys=KEYS, limits=Limits(open_jobs=4)) as first:
        ada = client(first)
        batch = begin(ada, *(line(f"clip {number}") for number in range(12)))
        until(lambda: ada.batches.retrieve(batch.id).request_counts.completed >= 2)
        first.hold.clear()
    with kept(tmp_path / "data") as store:
        FileStore(store).note(batch.id, status="cancelling")
        if not is_written_down:
            with store.session(writes=True) as session:
                session.execute(text("DELETE FROM batch_lines"))
    with run_server(bundle, tmp_path / "data", keys=KEYS) as second:
        ada = client(second)
        done = ended(ada, batch.id)
        videos = list(ada.videos.list())
        assert done.status == "cancelled"
        assert 2 <= done.request_counts.completed < 12
        assert len(results(ada, done.output_file_id)) == done.request_counts.completed == len(videos)
        assert {video.status for video in videos} == {"completed"}


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("poet_serving.api.batch_runner._AGAIN", 0.01)


class Trouble:
    """Fails some times, or at some call, instead of what it stands for; counts the calls."""

    def __init__(self, does: Any, error: Exception, *, times: float = 1, at: int = 0) -> None:
        self._does, self._error, self._times, self._at = does, error, times, at
        self.calls = 0

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        self.calls += 1
        if self._at < self.calls <= self._at + self._times:
            raise self._error
        return self._does(*arguments, **keywords)


@pytest.mark.usefixtures("hurried")
@pytest.mark.parametrize("error", [PoetError("no process."), MediaError("no room."), OSError("just deleted")])
def test_a_line_is_tried_again_where_the_reader_has_passing_trouble(
    server: RunningServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    ada = client(server)
    read = Trouble(server.service.reader.read, error, times=2)
    monkeypatch.setattr(server.service.reader, "read", read)
    picture = line("picture", input_reference={"file_id": upload_picture(ada, tmp_path)})
    done = ended(ada, begin(ada, picture, line("clip")).id)
    assert (done.status, done.request_counts.completed, done.request_counts.failed) == ("completed", 2, 0)
    assert read.calls == 3


@pytest.mark.usefixtures("hurried")
@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("store.submit", JobError("locked.", "store_unavailable")),
        ("store.count", JobError("locked.", "store_unavailable")),
        ("files.end_line", JobError("locked.", "store_unavailable")),
        ("files.put", JobError("full.", "store_unavailable")),
        ("wait", RequestError("locked.", code="store_unavailable", status=503)),
    ],
)
def test_passing_trouble_of_the_store_is_not_the_end_of_a_line(
    server: RunningServer, monkeypatch: pytest.MonkeyPatch, name: str, error: Exception
) -> None:
    ada, service = client(server), server.service
    *owners, method = name.split(".")
    owner = getattr(service, owners[0]) if owners else service
    file = ada.files.create(file=("jobs.jsonl", json.dumps(line("clip")).encode()), purpose="batch")
    monkeypatch.setattr(owner, method, Trouble(getattr(owner, method), error, times=2))
    batch = ada.batches.create(input_file_id=file.id, endpoint="/v1/videos", completion_window="24h")
    done = ended(ada, batch.id)
    assert (done.status, done.request_counts.completed, done.request_counts.failed) == ("completed", 1, 0)


@pytest.mark.usefixtures("hurried")
def test_a_line_that_the_server_fails_at_again_and_again_is_answered_with_that(
    server: RunningServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ada = client(server)
    read = Trouble(None, PoetError("no process."), times=float("inf"))
    monkeypatch.setattr(server.service.reader, "read", read)
    picture = line("picture", input_reference={"file_id": upload_picture(ada, tmp_path)})
    done = ended(ada, begin(ada, picture, line("clip")).id)
    assert (done.status, done.request_counts.completed, done.request_counts.failed) == ("completed", 1, 1)
    answer = results(ada, done.error_file_id)["picture"]["response"]
    assert (answer["status_code"], answer["body"]["error"]["code"]) == (500, "server_error")
    assert read.calls == MAX_TRIES


def test_a_batch_that_fails_says_why_keeps_what_is_done_and_drops_what_waits(
    server: RunningServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    ada = client(server)
    server.hold.clear()
    try:
        submit = Trouble(server.service.submit, ZeroDivisionError("unforeseen"), at=1)
        monkeypatch.setattr(server.service, "submit", submit)
        with caplog.at_level(logging.ERROR, "poet_serving.api.batch_runner"):
            done = ended(ada, begin(ada, line("bad", colour="red"), line("one"), line("two"), line("three")).id)
        assert all(video.status not in ("queued", "in_progress") for video in ada.videos.list())
    finally:
        server.hold.set()
    assert (done.status, done.request_counts.completed, done.request_counts.failed) == ("failed", 0, 1)
    assert done.failed_at is not None
    assert list(results(ada, done.error_file_id)) == ["bad"]
    assert done.errors is not None and done.errors.object == "list"
    (reason,) = done.errors.data
    assert (reason.code, reason.line, reason.param) == ("server_error", None, None)
    assert "log" in reason.message
    assert "ZeroDivisionError: unforeseen" in caplog.text


def test_a_batch_whose_files_cannot_be_written_fails(server: RunningServer, monkeypatch: pytest.MonkeyPatch) -> None:
    ada = client(server)
    file = ada.files.create(file=("jobs.jsonl", json.dumps(line("clip")).encode()), purpose="batch")
    monkeypatch.setattr(server.service.files, "results", Trouble(None, ZeroDivisionError("unforeseen")))
    batch = ada.batches.create(input_file_id=file.id, endpoint="/v1/videos", completion_window="24h")
    assert ended(ada, batch.id).status == "failed"


def test_a_key_has_so_many_open_batches_and_no_more(server: RunningServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("poet_serving.api.batches.MAX_OPEN_BATCHES", 2)
    ada, bob = client(server), client(server, "bob")
    server.hold.clear()
    try:
        batches = [begin(ada, line("clip")) for _ in range(2)]
        with pytest.raises(openai.RateLimitError) as full:
            begin(ada, line("clip"))
        assert full.value.code == "too_many_batches"
        assert int(full.value.response.headers["retry-after"]) >= 1
        batches_of_bob = [begin(bob, line("clip"))]
    finally:
        server.hold.set()
    assert [ended(ada, batch.id).status for batch in batches] == ["completed"] * 2
    assert [ended(bob, batch.id).status for batch in batches_of_bob] == ["completed"]
    assert ended(ada, begin(ada, line("clip")).id).status == "completed"


def test_a_batch_that_is_sent_again_is_answered_with_the_first(server: RunningServer) -> None:
    ada, bob = client(server), client(server, "bob")

    def create(who: openai.OpenAI, key: str, **more: Any) -> Any:
        headers = {"Idempotency-Key": key}
        given = {"input_file_id": file.id, "endpoint": "/v1/videos", "completion_window": "24h"} | more
        return who.batches.create(**given, extra_headers=headers)

    file = ada.files.create(file=("jobs.jsonl", json.dumps(line("clip")).encode()), purpose="batch")
    batch = create(ada, "mine", metadata={"a": "b"})
    assert create(ada, "mine", metadata={"a": "b"}).id == batch.id
    with pytest.raises(openai.ConflictError) as conflict:
        create(ada, "mine", metadata={"a": "c"})
    assert conflict.value.code == "idempotency_conflict"
    other = create(ada, "other", metadata={"a": "b"})
    assert other.id != batch.id
    with pytest.raises(openai.NotFoundError):  # another's key is none of his, nor is her file
        create(bob, "mine", metadata={"a": "b"})
    assert [ended(ada, each.id).status for each in (batch, other)] == ["completed"] * 2
    ada.files.delete(file.id)
    assert create(ada, "mine", metadata={"a": "b"}).id == batch.id


def test_a_line_that_waits_for_room_costs_nothing(server: RunningServer, monkeypatch: pytest.MonkeyPatch) -> None:
    ada, service = client(server), server.service
    submit = Trouble(service.submit, AssertionError(), times=0)
    monkeypatch.setattr(service, "submit", submit)
    server.hold.clear()
    try:
        batch = begin(ada, *(line(f"clip {number}") for number in range(5)))
        until(lambda: submit.calls == 3)
        time.sleep(2.5)  # twice the time after which it looks again
        assert submit.calls == 3  # as many as a key may have open
        other = begin(ada, line("other"))  # none of whose own wait
        time.sleep(2.5)
        assert submit.calls == 3
    finally:
        server.hold.set()
    assert ended(ada, batch.id).request_counts.completed == 5
    assert ended(ada, other.id).request_counts.completed == 1
    assert submit.calls <= 6 + 2  # two may find the same place


def test_half_a_surrogate_pair_is_an_error_of_its_line_alone(server: RunningServer) -> None:
    ada = client(server)
    half = json.dumps(line("half", input_reference={"file_id": "\ud800"}))
    done = ended(ada, begin(ada, half, line("whole")).id)
    assert (done.status, done.request_counts.completed, done.request_counts.failed) == ("completed", 1, 1)
    answer = results(ada, done.error_file_id)["half"]["response"]
    assert (answer["status_code"], answer["body"]["error"]["code"]) == (400, "invalid_value")


def test_files_are_kept_listed_and_deleted(server: RunningServer) -> None:
    ada, bob = client(server), client(server, "bob")
    made = [ada.files.create(file=(f"{number}.txt", b"x" * (number + 1)), purpose="user_data") for number in range(3)]
    assert [file.bytes for file in made] == [1, 2, 3]
    assert ada.files.retrieve(made[0].id).filename == "0.txt"
    assert ada.files.content(made[2].id).read() == b"xxx"
    assert [file.id for file in ada.files.list(purpose="user_data", limit=2)] == [file.id for file in made[::-1]]
    assert not {file.id for file in made} & {file.id for file in ada.files.list(purpose="vision")}
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
    name = upload_picture(ada, tmp_path)
    body = {"prompt": PROMPT, "input_reference": {"file_id": name}}
    made = httpx.post(f"{server.url}/v1/videos", json=body, headers={"authorization": f"Bearer {KEYS['ada']}"}).json()
    video = ada.videos.poll(made["id"])
    assert video.model_extra is not None
    assert video.model_extra["metadata"]["task"] == "image_to_video"
    stolen = httpx.post(f"{server.url}/v1/videos", json=body, headers={"authorization": f"Bearer {KEYS['bob']}"})
    assert stolen.status_code == 404
    assert name in {file.id for file in ada.files.list()}
    assert name not in {file.id for file in bob.files.list()}


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
    assert batch.id not in {other.id for other in bob.batches.list()}
    for call in (bob.batches.retrieve, bob.batches.cancel):
        with pytest.raises(openai.NotFoundError):
            call(batch.id)
