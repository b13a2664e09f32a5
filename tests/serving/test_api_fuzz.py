"""The API against what nobody foresaw: bodies drawn from its own document, damaged uploads, names that are paths.

A server runs in this process. Whatever is sent, it must answer as its document says, in time, and leave nothing behind.
"""

import base64
import errno
import json
import logging
import os
import socket
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import quote

import httpx
import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from prometheus_client import Counter as Counted

from poet.bundle import Bundle
from poet.errors import MediaError
from poet.media import Clip, write_clip
from poet.testing import tiny_bundle
from poet_serving.api.guard import Limits
from poet_serving.media_child import ReadingLimits
from poet_serving.testing import RunningServer, run_server

Uploads = Callable[[int, int], Iterator[tuple[str, bytes]]]
PROMPT = "a red star"
SLACK = 20.0  # seconds beside those that reading a file may take: other work on the machine


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return tiny_bundle(tmp_path_factory.mktemp("made") / "tiny")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="module")
def temporary(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where temporary files go for as long as the server runs; nobody else's are there."""
    before, place = tempfile.tempdir, tmp_path_factory.mktemp("temporary")
    tempfile.tempdir = str(place)
    yield place
    tempfile.tempdir = before


@pytest.fixture(scope="module")
def server(bundle: Bundle, data: Path, temporary: Path) -> Iterator[RunningServer]:
    limits = Limits(body_bytes=8 * 2**20, requests_per_minute=10**6, open_jobs=64)
    with run_server(bundle, data, limits=limits) as running:
        yield running


@pytest.fixture
def client(server: RunningServer) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=120, trust_env=False) as made:
        yield made


@pytest.fixture(scope="module")
def video_id(server: RunningServer) -> str:
    """A video that is there, and done; no test deletes it."""
    made: str = httpx.post(f"{server.url}/v1/videos", json={"prompt": PROMPT, "seed": 1}).json()["id"]
    until(lambda: httpx.get(f"{server.url}/v1/videos/{made}").json()["status"] == "completed")
    return made


def check_error(status: int, content: bytes) -> None:
    """An answer of 400 and above has OpenAI's shape, and is no failure of the server's."""
    assert 400 <= status < 500 or status == 501, content
    [(name, error)] = json.loads(content).items()
    assert name == "error"
    assert set(error) == {"message", "type", "param", "code"}
    assert all(isinstance(error[key], str) and error[key] for key in ("message", "type", "code"))
    assert error["param"] is None or isinstance(error["param"], str)


def drop(client: httpx.Client, content: bytes, kept: str = "") -> None:
    """Delete the job or file that an answer speaks of, so that there is always room for the next."""
    try:
        answer = json.loads(content)
    except ValueError:  # media
        return
    choices = answer.get("choices", ())
    for name in (answer.get("id"), *((choice["message"].get("video") or {}).get("id") for choice in choices)):
        if isinstance(name, str) and name != kept:
            kind = {"video": "videos", "file": "files"}.get(name.partition("_")[0])
            if kind is not None:
                client.delete(f"/v1/{kind}/{name}")


def until(holds: Callable[[], bool], seconds: float = 60) -> None:
    ends = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < ends
        time.sleep(0.05)


# What the document allows, and what it forbids


def fuzz(server: RunningServer, client: httpx.Client, video_id: str, count: int) -> Counter[int]:
    """Send `count` right and `count` wrong requests of every operation; returns how many had which status."""
    import schemathesis

    found: Counter[int] = Counter()
    schema = schemathesis.openapi.from_dict(server.application.openapi())
    for result in schema.get_all_operations():
        operation = result.ok()
        for mode in schemathesis.GenerationMode:
            if mode.is_positive or operation.body or operation.query:  # any text is a right name
                found += fuzz_operation(client, operation, mode, video_id, count)
    assert client.get("/v1/models").status_code == 200
    return found


def fuzz_operation(client: httpx.Client, operation: Any, mode: Any, video_id: str, count: int) -> Counter[int]:
    from schemathesis.checks import CHECKS

    found: Counter[int] = Counter()
    checks = [CHECKS.get_one("response_schema_conformance"), CHECKS.get_one("content_type_conformance")]

    @settings(
        max_examples=count,
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy(generation_mode=mode), is_there=st.booleans(), prompt=st.text())
    def send(case: Any, is_there: bool, prompt: str) -> None:
        if mode.is_positive and is_there:
            aim(case, video_id, prompt)
        answer = case.call(base_url=str(client.base_url), timeout=120)
        found[answer.status_code] += 1
        said = case.as_curl_command()[:2000], answer.content[:2000]
        assert str(answer.status_code) in operation.definition.raw["responses"], said
        if answer.status_code == 200:
            case.validate_response(answer, checks=checks)
            drop(client, answer.content, video_id)
        else:
            check_error(answer.status_code, answer.content)
            assert answer.status_code < 500 or case.path.endswith("/stream"), said

    send()
    return found


def aim(case: Any, video_id: str, prompt: str) -> None:
    """Let a drawn request be about something that there is: what is drawn at random never is."""
    if "video_id" in (case.path_parameters or {}) and case.method != "DELETE":
        case.path_parameters["video_id"] = video_id
    if isinstance(case.body, dict) and case.media_type == "application/json":
        known = {"prompt": prompt, "video": {"id": video_id}, "model": "tiny"}
        case.body |= {name: value for name, value in known.items() if name in case.body}
        if "messages" in case.body:
            case.body["messages"] = [{"role": "user", "content": prompt}]
            case.body["modalities"], case.body["n"] = ["video"], 1
        elif "video" in case.body and "seconds" in case.body:
            case.body["seconds"] = 0.5


def test_every_answer_is_one_that_the_document_names(
    server: RunningServer, client: httpx.Client, video_id: str
) -> None:
    found = fuzz(server, client, video_id, 5)
    assert found[200] > 20
    assert found[400] > 20
    assert found[404] > 20


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_every_answer_to_thousands_of_requests_is_one_that_the_document_names(
    server: RunningServer, client: httpx.Client, video_id: str
) -> None:
    found = fuzz(server, client, video_id, int(os.environ.get("POET_FUZZ_REQUESTS", "200")))
    print(dict(found))


# What no drawing finds


HUGE = 10**400  # an integer that JSON may hold and no float can


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/videos", {"prompt": "\ud800"}),
        ("/v1/videos", {"prompt": "\0"}),
        ("/v1/videos", {"prompt": PROMPT, "seconds": HUGE}),
        ("/v1/videos", {"prompt": PROMPT, "seconds": "1" * 400}),
        ("/v1/videos", {"prompt": PROMPT, "seed": HUGE}),
        ("/v1/videos", {"prompt": PROMPT, "temperature": HUGE}),
        ("/v1/videos", {"prompt": PROMPT, "model": "\ud800"}),
        ("/v1/videos", {"prompt": PROMPT, "size": "\ud800x\0"}),
        ("/v1/videos", {"prompt": PROMPT, "\ud800": 1}),
        ("/v1/videos", {"prompt": PROMPT, "input_reference": {"file_id": "\ud800"}}),
        ("/v1/videos/edits", {"prompt": PROMPT, "video": {"id": "\ud800"}}),
        ("/v1/videos/edits", {"prompt": "\ud800", "video": {"id": "{video_id}"}}),
        ("/v1/videos/edits", {"prompt": "x" * 40_000, "video": {"id": "{video_id}"}}),
        ("/v1/videos/extensions", {"prompt": "x" * 40_000, "video": {"id": "{video_id}"}, "seconds": 1}),
        ("/v1/videos/extensions", {"prompt": PROMPT, "video": {"id": "{video_id}"}, "seconds": HUGE}),
        ("/v1/videos/extensions", {"prompt": PROMPT, "video": {"id": "{video_id}"}, "seconds": 1e-300}),
        ("/v1/videos/{video_id}/remix", {"prompt": "\ud800"}),
        ("/v1/videos/{video_id}/remix", {"prompt": "x" * 40_000}),
        ("/v1/videos/{video_id}/remix", {"prompt": "but " + "x" * 32_700}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "\ud800"}], "modalities": ["video"]}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": PROMPT}], "n": HUGE}),
        ("/v1/batches", {"input_file_id": "\ud800", "endpoint": "/v1/videos", "completion_window": "24h"}),
    ],
)
def test_values_that_no_field_can_hold_are_refused_and_nothing_of_them_is_kept(
    client: httpx.Client, video_id: str, path: str, body: dict[str, Any]
) -> None:
    content = json.dumps(body).replace("{video_id}", video_id).encode()
    answer = client.post(
        path.replace("{video_id}", video_id), content=content, headers={"content-type": "application/json"}
    )
    if answer.status_code != 200:
        check_error(answer.status_code, answer.content)
    drop(client, answer.content, video_id)
    assert client.get("/v1/videos").status_code == 200  # every job can still be shown


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16", "utf-32"])
def test_no_encoding_of_json_brings_in_what_cannot_be_kept(client: httpx.Client, encoding: str) -> None:
    content = '{"prompt": "x", "video": {"id": "\ud800"}}'.encode(encoding, "surrogatepass")
    answer = client.post("/v1/videos/edits", content=content, headers={"content-type": "application/json"})
    check_error(answer.status_code, answer.content)
    assert answer.json()["error"]["code"] == "invalid_json"


@pytest.mark.parametrize("charset", ["utf-7", "unicode_escape", "idna", "undefined", "zlib"])
@pytest.mark.parametrize("text", [b"+2AA-", rb"\ud800"])
def test_no_encoding_brings_in_what_cannot_be_kept(client: httpx.Client, charset: str, text: bytes) -> None:
    parts = (b'name="purpose"\r\n\r\nbatch', b'name="file"; filename="%b"\r\n\r\nx' % text)
    content = b"".join(b"--abc\r\ncontent-disposition: form-data; %b\r\n" % part for part in parts) + b"--abc--\r\n"
    kind = f"multipart/form-data; boundary=abc; charset={charset}"
    answer = client.post("/v1/files", content=content, headers={"content-type": kind})
    if answer.status_code != 200:
        check_error(answer.status_code, answer.content)
    drop(client, answer.content)
    assert client.get("/v1/files").status_code == 200


@pytest.mark.parametrize("path", ["edits", "extensions"])
def test_a_prompt_that_is_too_long_is_refused_with_an_upload_too(
    client: httpx.Client, path: str, png: bytes, mp4: bytes
) -> None:
    upload = {"video": ("x", png if path == "edits" else mp4)}
    answer = client.post(f"/v1/videos/{path}", data={"prompt": "x" * 40_000}, files=upload)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "prompt")


@pytest.fixture(scope="module")
def mp4(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("clip") / "x.mp4"
    frames = np.random.default_rng(0).integers(0, 255, (7, 24, 40, 3), np.uint8)
    write_clip(Clip(frames=frames, fps=8, samples=None, sample_rate=16_000), path)
    return path.read_bytes()


@pytest.fixture(scope="module")
def png(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("picture") / "x.png"
    frames = np.random.default_rng(0).integers(0, 255, (1, 24, 40, 3), np.uint8)
    write_clip(Clip(frames=frames, fps=8, samples=None, sample_rate=16_000), path)
    return path.read_bytes()


# Damaged uploads


def post_uploads(
    client: httpx.Client, data: Path, temporary: Path, uploads: Iterator[tuple[str, bytes]]
) -> tuple[Counter[int], float]:
    """Post every file; returns how many had which status, and the longest wait in seconds."""
    found: Counter[int] = Counter()
    longest = 0.0
    ways = (("", "input_reference"), ("", "input_reference"), ("/edits", "video"), ("/extensions", "video"))
    for number, (name, content) in enumerate(uploads):
        path, field = ways[number % len(ways)]
        begun = time.monotonic()
        if path == "" and number % 3 == 0 and len(content) < 4 * 2**20:
            url = "data:image/png;base64," + base64.b64encode(content).decode()
            answer = client.post("/v1/videos", json={"prompt": PROMPT, "input_reference": {"image_url": url}})
        else:
            upload = {field: ("a.mp4", content)}
            answer = client.post(f"/v1/videos{path}", data={"prompt": PROMPT}, files=upload)
        wait = time.monotonic() - begun
        found[answer.status_code] += 1
        longest = max(longest, wait)
        assert wait < ReadingLimits().seconds + SLACK, name
        if answer.status_code == 200:
            drop(client, answer.content)
        else:
            assert answer.status_code < 500, (name, answer.text)
            check_error(answer.status_code, answer.content)
    assert client.get("/v1/models").status_code == 200
    until(lambda: not list(temporary.glob("poet-*")))  # also what was being written when it was deleted
    assert list((data / "scratch").iterdir()) == []
    known = {video["id"] for video in client.get("/v1/videos?limit=100").json()["data"]}
    until(lambda: {path.name for path in (data / "content").iterdir()} <= known)
    return found, longest


def test_damaged_uploads_are_refused_in_time_and_leave_nothing(
    client: httpx.Client, data: Path, temporary: Path, malformed_uploads: Uploads
) -> None:
    found, _ = post_uploads(client, data, temporary, malformed_uploads(69, 3))
    assert found[400] > 30


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_two_thousand_damaged_uploads_are_refused_in_time_and_leave_nothing(
    client: httpx.Client, data: Path, temporary: Path, malformed_uploads: Uploads
) -> None:
    begun = time.monotonic()
    found, longest = post_uploads(client, data, temporary, malformed_uploads(2000, 5))
    print(f"{dict(found)} in {time.monotonic() - begun:.0f} s, the longest took {longest:.1f} s")
    assert found[400] > 1000


# Disks, parts and clients that are not as they should be


def code_of(answer: httpx.Response) -> tuple[int, str]:
    """Status and code of an error in OpenAI's shape."""
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return answer.status_code, error["code"]


def counted(counter: Counted, label: str) -> float:
    """How much was counted under a label."""
    samples = [sample for metric in counter.collect() for sample in metric.samples if sample.name.endswith("_total")]
    return sum(sample.value for sample in samples if label in sample.labels.values())


def test_a_disk_that_takes_no_upload_is_the_servers_trouble_and_only_its_log_says_which(
    server: RunningServer,
    client: httpx.Client,
    png: bytes,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def full(**_: Any) -> NoReturn:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("poet_serving.media_reader.tempfile.TemporaryFile", full)
    url = "data:image/png;base64," + base64.b64encode(png).decode()
    response = client.post("/v1/videos", json={"prompt": PROMPT, "input_reference": {"image_url": url}})
    check_trouble(response, server, caplog)


def test_a_disk_that_takes_no_picture_of_a_clip_is_the_servers_trouble_and_only_its_log_says_which(
    server: RunningServer,
    client: httpx.Client,
    video_id: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def full(clip: Clip, path: Path, **_: Any) -> NoReturn:
        raise MediaError(f"{path}: cannot be written (No space left on device).")

    monkeypatch.setattr("poet_serving.api.finishing.write_clip", full)
    check_trouble(client.get(f"/v1/videos/{video_id}/content?variant=thumbnail"), server, caplog)


def check_trouble(response: httpx.Response, server: RunningServer, caplog: pytest.LogCaptureFixture) -> None:
    place = str(server.service.store.content.parent)
    assert code_of(response) == (503, "store_unavailable")
    assert response.json()["error"]["type"] == "server_error"
    assert place not in response.text
    assert [record for record in caplog.records if place in record.getMessage() and "No space" in record.getMessage()]


@pytest.mark.parametrize(
    ("asked", "status"),
    [("bytes=abc", 400), ("lines=1-2", 400), ("bytes=3-1", 400), ("x", 400), ("bytes=99999999-", 416)],
)
def test_a_part_that_there_is_not_is_refused_in_the_same_shape(
    client: httpx.Client, video_id: str, asked: str, status: int
) -> None:
    file = client.post("/v1/files", data={"purpose": "batch"}, files={"file": b"12345"}).json()["id"]
    for path in (f"/v1/videos/{video_id}/content", f"/v1/files/{file}/content"):
        response = client.get(path, headers={"range": asked})
        assert code_of(response) == (status, "invalid_range")
        size = len(client.get(path).content)
        assert response.headers.get("content-range") == (f"bytes */{size}" if status == 416 else None)
        part = client.get(path, headers={"range": "bytes=1-3"})
        assert (part.status_code, len(part.content)) == (206, 3)
    client.delete(f"/v1/files/{file}")


def test_a_client_that_goes_away_while_it_sends_is_no_error_of_the_servers(
    server: RunningServer, caplog: pytest.LogCaptureFixture
) -> None:
    metrics = server.service.metrics
    gone, failed = counted(metrics.errors, "client_gone"), counted(metrics.errors, "server_error")
    address = server.url.removeprefix("http://").split(":")
    for kind in ("application/json", "multipart/form-data; boundary=abc"):
        with socket.create_connection((address[0], int(address[1]))) as wire:
            head = f"host: x\r\ncontent-type: {kind}\r\ncontent-length: 1000\r\n"
            wire.sendall(f"POST /v1/videos HTTP/1.1\r\n{head}\r\n--abc".encode())
            time.sleep(0.3)  # until the body is waited for
    until(lambda: counted(metrics.errors, "client_gone") == gone + 2)
    assert counted(metrics.requests, "499") >= 2
    assert counted(metrics.errors, "server_error") == failed
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


def test_an_answer_that_the_server_fails_at_is_counted(
    server: RunningServer, client: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> NoReturn:
        raise RuntimeError("/a/path")

    requests = server.service.metrics.requests
    before, others = counted(requests, "500"), counted(requests, "200")
    monkeypatch.setattr(server.service, "models", fail)
    response = client.get("/v1/models")
    assert code_of(response) == (500, "server_error")
    assert "/a/path" not in response.text
    assert (counted(requests, "500"), counted(requests, "200")) == (before + 1, others)


# Names that are paths


class Watch:
    """What this process opens, makes, moves and removes while it is looked at. An audit hook cannot be taken back."""

    READS = ("os.listdir", "os.scandir")
    WRITES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink")

    def __init__(self) -> None:
        self.is_on = False
        self.read: list[str] = []
        self.written: list[str] = []
        sys.addaudithook(self._see)

    def _see(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.is_on or event not in ("open", *self.READS, *self.WRITES):
            return
        if event in self.WRITES and arguments[-1] not in (-1, None):
            return  # below a directory that was opened, and seen then
        names = [os.fsdecode(name) for name in arguments[:2] if isinstance(name, str | bytes | os.PathLike)]
        writes = event in self.WRITES
        if event == "open":
            path, mode, flags = arguments
            names = [] if isinstance(path, int) else [os.fsdecode(path)]
            writes = bool(set(mode or "") & set("wax+") or (flags or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
        (self.written if writes else self.read).extend(names)


@pytest.fixture(scope="module")
def watch() -> Watch:
    return Watch()


def filled(schema: dict[str, Any], text: str, document: dict[str, Any]) -> Iterator[Any]:
    """Values of a schema in which one text, another in each, is `text`, and the rest is as little as may be."""
    schema = resolved(schema, document)
    for choice in (*schema.get("anyOf", ()), *schema.get("oneOf", ())):
        yield from filled(choice, text, document)
    kind = schema.get("type")
    if "string" in (kind if isinstance(kind, list) else [kind]):
        yield text
    for name, inner in schema.get("properties", {}).items():
        rest = least(schema, document)
        for value in filled(inner, text, document):
            yield rest | {name: value}
    if "items" in schema:
        yield from ([value] for value in filled(schema["items"], text, document))


def least(schema: dict[str, Any], document: dict[str, Any]) -> Any:
    """The smallest value of a schema."""
    schema = resolved(schema, document)
    if "const" in schema or "enum" in schema:
        return schema.get("const", schema.get("enum", [None])[0])
    for choice in (*schema.get("anyOf", ()), *schema.get("oneOf", ())):
        return least(choice, document)
    known = schema.get("properties", {})
    values: dict[str, Any] = {
        "object": {name: least(known[name], document) for name in schema.get("required", ())},
        "array": [least(schema["items"], document)] if schema.get("minItems") else [],
        "string": PROMPT,
        "integer": 1,
        "number": 1,
        "boolean": False,
    }
    return values.get(schema.get("type", ""))


def resolved(schema: dict[str, Any], document: dict[str, Any]) -> dict[str, Any]:
    name = schema.get("$ref")
    return schema if name is None else document["components"]["schemas"][name.rpartition("/")[2]]


def requests_with(text: str, document: dict[str, Any], video_id: str) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Every operation with `text` in one of its texts: in its address, its query, a header, its body, a file's name."""
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            own = path.replace("{video_id}", video_id)
            content = operation.get("requestBody", {}).get("content", {})
            schema = content.get("application/json", {}).get("schema")
            usual = {} if schema is None else {"json": least(schema, document)}
            for parameter in operation.get("parameters", ()):
                name = parameter["name"]
                if parameter["in"] == "path":
                    for value in (quote(text, safe=""), quote(text, safe="/"), text.replace("\0", "%00")):
                        yield method, path.replace(f"{{{name}}}", value), usual
                elif parameter["in"] == "query":
                    yield method, own, {"params": {name: text}}
                elif text.isprintable() and text.isascii():
                    yield method, own, usual | {"headers": {name: text}}
            for value in [] if schema is None else filled(schema, text, document):
                yield method, own, {"json": value}
            if "multipart/form-data" in content:
                for name, inner in content["multipart/form-data"]["schema"]["properties"].items():
                    if inner.get("format") == "binary":
                        yield method, own, {"data": {"prompt": PROMPT}, "files": {name: (text, b"x")}}
                    else:
                        yield method, own, {"data": {name: text}, "files": {"file": ("x", b"x")}}
                yield method, own, {"files": {text: (text, b"x")}}


def test_no_text_of_a_request_is_used_as_a_path(
    client: httpx.Client,
    server: RunningServer,
    data: Path,
    temporary: Path,
    video_id: str,
    watch: Watch,
    tmp_path: Path,
    png: bytes,
) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret.png").write_bytes(png)
    before = {path: path.stat().st_mtime_ns for path in (outside, *outside.iterdir(), data, data.parent)}
    database = os.path.relpath(data / "jobs.sqlite", data / "content" / video_id)
    texts = [
        str(outside / "secret.png"),
        os.path.relpath(outside / "secret.png", data / "content" / video_id),
        f"file://{outside / 'secret.png'}",
        f"{video_id}/../{video_id}/clip.mp4",
        database,
        "..\\..\\secret.png",
        "../../../../../../../../etc/passwd",
        f"{outside / 'secret.png'}\0.png",
        "~/secret.png",
    ]
    document = server.application.openapi()
    found: Counter[int] = Counter()
    watch.is_on = True
    try:
        for text in texts:
            for method, path, more in requests_with(text, document, video_id):
                if method == "delete" and video_id in path:
                    continue
                answer = client.request(method, path, **more)
                found[answer.status_code] += 1
                assert b"SQLite format" not in answer.content
                assert b"root:" not in answer.content
                assert png not in answer.content
                if answer.status_code != 200:
                    check_error(answer.status_code, answer.content)
                drop(client, answer.content, video_id)
        until(lambda: not list(temporary.glob("poet-*")))
    finally:
        watch.is_on = False
    print(dict(found))
    assert {path: path.stat().st_mtime_ns for path in before if path != data} == {
        k: v for k, v in before.items() if k != data
    }
    assert not [name for name in watch.read + watch.written if "secret" in name or "passwd" in name]
    ours = tuple(str(place.resolve()) for place in (data, temporary))
    stray = {name for name in watch.written if not os.path.realpath(name).startswith((*ours, "/dev/"))}
    assert stray == set()
    # What a kill leaves among temporary files stays there; a start clears the store's own directory.
    assert not [name for name in watch.written if Path(name).is_relative_to(temporary) and "poet-" in name]
    assert found[200] > 20
    assert found[400] > 20
    assert client.get(f"/v1/videos/{video_id}").json()["status"] == "completed"
