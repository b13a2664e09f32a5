"""The API against a server that runs: OpenAI's client unmodified, and what it does with everything else."""

import asyncio
import base64
import errno
import json
import socket
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NoReturn

import httpx
import numpy as np
import openai
import pytest
from prometheus_client import CollectorRegistry
from starlette.responses import Response

from poet.bundle import Bundle
from poet.errors import ConfigError, MediaError
from poet.media import Clip, read_clip, write_clip
from poet.testing import tiny_bundle
from poet_serving.api import launch
from poet_serving.api.guard import ApiKeys, Guard, Limits
from poet_serving.api.metrics import Metrics
from poet_serving.jobs import JobStore
from poet_serving.testing import RunningServer, run_server

warnings.filterwarnings("ignore", message="The Sora API", category=DeprecationWarning)
KEYS = {"ada": "ada-secret-0123456789", "bob": "bob-secret-0123456789"}
PROMPT = "a red star"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return tiny_bundle(tmp_path_factory.mktemp("made") / "tiny")


@pytest.fixture(scope="module")
def server(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    limits = Limits(body_bytes=2 * 2**20, body_seconds=3.0, open_jobs=8)
    with run_server(bundle, tmp_path_factory.mktemp("data"), keys=KEYS, limits=limits) as running:
        yield running


@pytest.fixture
def ada(server: RunningServer) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEYS["ada"], max_retries=0)


@pytest.fixture
def bob(server: RunningServer) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEYS["bob"], max_retries=0)


@pytest.fixture
def plain(server: RunningServer) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, headers={"authorization": f"Bearer {KEYS['ada']}"}, timeout=30) as client:
        yield client


@pytest.fixture(scope="module")
def picture(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("picture") / "x.png"
    frames = np.random.default_rng(0).integers(0, 255, (1, 24, 40, 3), np.uint8)
    write_clip(Clip(frames=frames, fps=8, samples=None, sample_rate=16_000), path)
    return path.read_bytes()


def saved(tmp_path: Path, content: bytes, name: str = "clip.mp4") -> Clip:
    path = tmp_path / name
    path.write_bytes(content)
    return read_clip(path)


def error_of(response: httpx.Response) -> tuple[int, str]:
    body = response.json()["error"]
    assert set(body) == {"message", "type", "param", "code"}
    assert body["message"]
    return response.status_code, body["code"]


def test_a_prompt_becomes_a_clip_with_sound(ada: openai.OpenAI, bundle: Bundle, tmp_path: Path) -> None:
    video = ada.videos.create_and_poll(prompt=PROMPT, extra_body={"seed": 7})
    assert (video.status, video.progress, video.prompt, video.model) == ("completed", 100, PROMPT, "tiny")
    clip = saved(tmp_path, ada.videos.download_content(video.id).read())
    assert clip.frames is not None
    assert clip.frames.shape == (5, 24, 40, 3)
    assert clip.samples is not None
    assert video.size == "40x24"
    assert float(video.seconds) == bundle.geometry().duration
    assert json.loads(json.dumps(video.model_extra))["metadata"]["seed"] == "7"


def test_the_same_seed_gives_the_same_clip(ada: openai.OpenAI) -> None:
    hashes = []
    for seed in (11, 11, 12):
        video = ada.videos.create_and_poll(prompt=PROMPT, extra_body={"seed": seed})
        assert video.model_extra is not None
        hashes.append(video.model_extra["metadata"]["ids_sha256"])
    assert hashes[0] == hashes[1] != hashes[2]


def test_variants_are_pictures_and_sound_of_the_clip(ada: openai.OpenAI, tmp_path: Path) -> None:
    video = ada.videos.create_and_poll(prompt=PROMPT)
    thumbnail = saved(tmp_path, ada.videos.download_content(video.id, variant="thumbnail").read(), "a.png")
    sheet = saved(tmp_path, ada.videos.download_content(video.id, variant="spritesheet").read(), "b.png")
    sound = saved(tmp_path, ada.videos.download_content(video.id, variant="audio").read(), "c.wav")  # type: ignore[arg-type]
    assert thumbnail.frames is not None
    assert thumbnail.frames.shape[1:3] == (24, 40)
    assert sheet.frames is not None
    assert sheet.frames.shape[1] > 24
    assert sound.frames is None
    assert sound.samples is not None
    assert abs(len(sound.samples) / sound.sample_rate - float(video.seconds)) < 0.01


def test_pages_of_a_list_hold_every_video_once(ada: openai.OpenAI) -> None:
    made = [ada.videos.create_and_poll(prompt=f"{PROMPT} {number}").id for number in range(3)]
    newest = [video.id for video in ada.videos.list(limit=2)][:3]
    assert newest == made[::-1]
    oldest = [video.id for video in ada.videos.list(limit=2, order="asc")]
    assert oldest[-3:] == made
    assert len(set(oldest)) == len(oldest)
    assert ada.videos.list(limit=0).data == []


def test_a_deleted_video_is_gone(ada: openai.OpenAI, server: RunningServer) -> None:
    video = ada.videos.create_and_poll(prompt=PROMPT)
    assert ada.videos.delete(video.id).object == "video.deleted"
    with pytest.raises(openai.NotFoundError):
        ada.videos.retrieve(video.id)
    assert not (server.service.store.content / video.id).exists()


def test_deleting_a_job_in_work_ends_it(ada: openai.OpenAI, server: RunningServer) -> None:
    server.hold.clear()
    try:
        video = ada.videos.create(prompt=PROMPT)
        until(lambda: ada.videos.retrieve(video.id).status == "in_progress")
        ada.videos.delete(video.id)
        assert server.service.worker.progress(video.id) is None
    finally:
        server.hold.set()
    assert ada.videos.create_and_poll(prompt=PROMPT).status == "completed"


def test_a_remix_edits_the_prompt_and_keeps_the_seed(ada: openai.OpenAI) -> None:
    video = ada.videos.create_and_poll(prompt=PROMPT, extra_body={"seed": 5, "temperature": 0.5})
    remix = ada.videos.poll(ada.videos.remix(video.id, prompt="but blue").id)
    assert remix.remixed_from_video_id == video.id
    assert remix.prompt == "a red star, but blue"  # a bundle without phrases adds what is said
    assert remix.model_extra is not None
    assert (remix.model_extra["metadata"]["seed"], remix.model_extra["metadata"]["temperature"]) == ("5", "0.5")


def test_an_extension_begins_with_the_clip_and_has_the_length_asked_for(ada: openai.OpenAI, tmp_path: Path) -> None:
    video = ada.videos.create_and_poll(prompt=PROMPT)
    content = ada.videos.download_content(video.id).read()
    # The client's type for seconds lists OpenAI's own lengths.
    longer = ada.videos.poll(ada.videos.extend(prompt=PROMPT, seconds="1", video=("a.mp4", content)).id)  # type: ignore[arg-type]
    assert longer.error is None
    assert float(longer.seconds) == float(video.seconds) + 1
    before, after = saved(tmp_path, content), saved(tmp_path, ada.videos.download_content(longer.id).read(), "b.mp4")
    assert before.frames is not None
    assert after.frames is not None
    assert len(after.frames) == len(before.frames) + 8
    error = np.abs(after.frames[: len(before.frames)].astype(int) - before.frames).mean()
    assert error < 12  # coded twice


def test_an_extension_and_an_edit_take_the_id_of_a_video(ada: openai.OpenAI, plain: httpx.Client) -> None:
    video = ada.videos.create_and_poll(prompt=PROMPT)
    body = {"prompt": PROMPT, "video": {"id": video.id}}
    longer = plain.post("/v1/videos/extensions", json=body | {"seconds": 0.5}).json()
    assert ada.videos.poll(longer["id"]).status == "completed"
    assert longer["remixed_from_video_id"] == video.id
    edited = plain.post("/v1/videos/edits", json=body | {"prompt": "blue"}).json()
    assert edited["prompt"] == "a red star, blue"


def test_an_edit_of_an_upload_begins_with_its_picture(ada: openai.OpenAI, picture: bytes) -> None:
    edited = ada.videos.poll(ada.videos.edit(prompt=PROMPT, video=("x.png", picture)).id)
    assert edited.status == "completed"
    assert edited.model_extra is not None
    assert edited.model_extra["metadata"]["task"] == "image_to_video"


def test_a_reference_comes_as_a_file_or_a_data_url(ada: openai.OpenAI, plain: httpx.Client, picture: bytes) -> None:
    url = "data:image/png;base64," + base64.b64encode(picture).decode()
    # OpenAI's client 3.51 takes files only, in spite of its types.
    made = plain.post("/v1/videos", json={"prompt": PROMPT, "input_reference": {"image_url": url}}).json()
    sent = ada.videos.create(prompt=PROMPT, input_reference=("x.txt", picture, "text/plain"))
    for id in (made["id"], sent.id):
        video = ada.videos.poll(id)
        assert video.model_extra is not None
        assert video.model_extra["metadata"]["task"] == "image_to_video"


def test_an_idempotency_key_gives_the_same_job(plain: httpx.Client) -> None:
    ask = {"json": {"prompt": PROMPT}, "headers": {"idempotency-key": "once"}}
    first, second = (plain.post("/v1/videos", **ask).json()["id"] for _ in range(2))  # type: ignore[arg-type]
    assert first == second
    other = plain.post("/v1/videos", json={"prompt": "another"}, headers={"idempotency-key": "once"})
    assert error_of(other) == (409, "idempotency_conflict")


def test_another_key_sees_nothing_of_a_job(ada: openai.OpenAI, bob: openai.OpenAI) -> None:
    video = ada.videos.create_and_poll(prompt=PROMPT)
    calls: list[Any] = [
        lambda: bob.videos.retrieve(video.id),
        lambda: bob.videos.download_content(video.id),
        lambda: bob.videos.delete(video.id),
        lambda: bob.videos.remix(video.id, prompt=PROMPT),
        lambda: bob.videos.list(after=video.id),
        lambda: bob.post("/videos/edits", cast_to=object, body={"prompt": PROMPT, "video": {"id": video.id}}),
        lambda: bob.post("/videos/extensions", cast_to=object, body={"prompt": PROMPT, "video": {"id": video.id}}),
        lambda: bob.get(f"/videos/{video.id}/stream", cast_to=object),
    ]
    for call in calls:
        with pytest.raises(openai.NotFoundError) as unseen:
            call()
        assert unseen.value.code == "not_found"
        assert video.id in str(unseen.value)  # what it asked for, as with an id that there never was
    assert video.id not in [other.id for other in bob.videos.list()]
    assert ada.videos.retrieve(video.id).status == "completed"


@pytest.mark.parametrize("key", [None, "ada", "wrong-0123456789", KEYS["ada"][:-1], KEYS["ada"] + "x", "\xe9" * 20])
def test_a_wrong_key_is_refused_everywhere(server: RunningServer, key: str | None) -> None:
    headers = {} if key is None else {"authorization": f"Bearer {key}".encode("latin-1")}
    for method, path in (("GET", "/v1/videos"), ("POST", "/v1/videos"), ("GET", "/v1/models"), ("GET", "/v1/x")):
        response = httpx.request(method, server.url + path, headers=headers)  # type: ignore[arg-type]
        assert error_of(response) == (401, "invalid_api_key")


@pytest.mark.parametrize(
    ("body", "status", "code", "param"),
    [
        ({"prompt": 3}, 400, "invalid_value", "prompt"),
        ({"prompt": PROMPT, "model": "sora-2"}, 404, "model_not_found", "model"),
        ({"prompt": PROMPT, "seconds": "8"}, 400, "unsupported_seconds", "seconds"),
        ({"prompt": PROMPT, "size": "1280x720"}, 400, "unsupported_size", "size"),
        ({"prompt": PROMPT, "colour": "red"}, 400, "unknown_parameter", "colour"),
        ({"prompt": PROMPT, "temperature": -1}, 400, "invalid_value", "temperature"),
        ({"prompt": PROMPT, "decoding": "parallel"}, 400, "invalid_value", None),
        ({"prompt": PROMPT, "task": "make_coffee"}, 400, "invalid_value", "task"),
        ({"prompt": PROMPT, "input_reference": {"path": "/etc/passwd"}}, 400, "invalid_input_reference", None),
        ({"prompt": PROMPT, "input_reference": {"image_url": "http://127.0.0.1/x.png"}}, 400, None, None),
        ({"prompt": PROMPT, "input_reference": {"image_url": "file:///etc/passwd"}}, 400, None, None),
        ({"prompt": PROMPT, "input_reference": {"image_url": "data:image/png;base64,AAAA"}}, 400, None, None),
        ({"prompt": "x" * 40_000}, 400, "invalid_value", "prompt"),
    ],
)
def test_what_cannot_be_carried_out_is_refused(
    plain: httpx.Client, body: dict[str, Any], status: int, code: str | None, param: str | None
) -> None:
    response = plain.post("/v1/videos", json=body)
    found = error_of(response)
    assert found[0] == status
    assert code is None or found[1] == code
    assert param is None or response.json()["error"]["param"] == param


def test_without_a_prompt_the_model_writes_what_it_likes(ada: openai.OpenAI, plain: httpx.Client) -> None:
    made = plain.post("/v1/videos", json={})
    assert made.status_code == 200
    video = ada.videos.poll(made.json()["id"])
    assert (video.status, video.prompt) == ("completed", None)
    assert video.model_extra is not None
    assert video.model_extra["metadata"]["task"] == "unconditional"


@pytest.mark.parametrize(
    ("path", "field"), [("/v1/videos/{id}/remix", "video"), ("/v1/chat/completions", "x"), ("/v1/files", "other")]
)
def test_an_upload_that_nobody_reads_is_refused(
    ada: openai.OpenAI, plain: httpx.Client, picture: bytes, path: str, field: str
) -> None:
    id = ada.videos.create_and_poll(prompt=PROMPT).id
    sent = {"prompt": PROMPT} if "files" not in path else {"purpose": "vision"}
    response = plain.post(path.format(id=id), data=sent, files={field: ("x.png", picture)})
    assert error_of(response) == (400, "unknown_parameter")
    assert response.json()["error"]["param"] == field


def test_a_file_takes_no_field_that_would_not_be_obeyed(ada: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        ada.files.create(file=b"x", purpose="batch", expires_after={"anchor": "created_at", "seconds": 3600})
    assert (refused.value.code, refused.value.param) == ("unknown_parameter", "expires_after")
    ada.files.delete(ada.files.create(file=b"x", purpose="batch").id)


@pytest.mark.parametrize(
    ("content", "kind", "status", "code"),
    [
        (b"{", "application/json", 400, "invalid_json"),
        (b"[]", "application/json", 400, "invalid_json"),
        (b"[" * 100_000, "application/json", 400, "invalid_json"),
        (b'{"prompt": NaN}', "application/json", 400, "invalid_json"),
        (b"\xff\xfe", "application/json", 400, "invalid_json"),
        (b"prompt=x", "application/x-www-form-urlencoded", 415, "unsupported_media_type"),
        (b"x", "multipart/form-data", 400, "invalid_multipart"),
        (b"x", "multipart/form-data; boundary=abc", 400, "invalid_multipart"),
        (b"x" * 3_000_000, "application/json", 413, "request_too_large"),
    ],
)
def test_a_body_that_is_none_is_refused(plain: httpx.Client, content: bytes, kind: str, status: int, code: str) -> None:
    for path in ("/v1/videos", "/v1/videos/edits", "/v1/chat/completions"):
        assert error_of(plain.post(path, content=content, headers={"content-type": kind})) == (status, code)


def test_a_body_without_a_length_is_counted_while_it_is_read(plain: httpx.Client) -> None:
    sent = 0

    def endless() -> Iterator[bytes]:
        nonlocal sent
        while True:
            sent += 1
            yield b"x" * 65_536

    try:
        response = plain.post("/v1/videos", content=endless(), headers={"content-type": "application/json"})
        assert error_of(response) == (413, "request_too_large")
    except (httpx.WriteError, httpx.RemoteProtocolError):  # the server hung up while we were still sending
        pass
    assert sent < 1_000
    assert plain.get("/v1/models").status_code == 200


def test_a_body_that_never_ends_is_given_up(plain: httpx.Client) -> None:
    def slow() -> Iterator[bytes]:
        yield b'{"prompt":'
        time.sleep(5)
        yield b'"x"}'

    begun = time.monotonic()
    response = plain.post("/v1/videos", content=slow(), headers={"content-type": "application/json"})
    assert error_of(response) == (408, "request_timeout")
    assert time.monotonic() - begun < 20


def test_what_is_not_there_is_said_in_the_same_shape(plain: httpx.Client) -> None:
    assert error_of(plain.get("/v1/nothing")) == (404, "not_found")
    assert error_of(plain.put("/v1/videos")) == (404, "not_found")
    assert error_of(plain.get("/v1/videos?limit=x")) == (400, "invalid_value")
    assert error_of(plain.get("/v1/videos?order=up")) == (400, "invalid_value")
    assert error_of(plain.get("/v1/videos?after=video_0")) == (404, "not_found")


@pytest.mark.parametrize(
    "name", ["..", "../jobs.sqlite", "%2e%2e%2fjobs.sqlite", "video_0", "x" * 5_000, "a\x00b", "é"]
)
def test_no_name_reaches_a_file(plain: httpx.Client, name: str) -> None:
    for path in (f"/v1/videos/{name}", f"/v1/videos/{name}/content", f"/v1/videos/{name}/content?variant={name}"):
        try:
            response = plain.get(path)
        except httpx.InvalidURL:
            continue
        if response.request.url.path.startswith("/v1/videos/"):
            assert error_of(response)[0] in (400, 404)


def test_a_name_with_a_null_character_is_nobodys_on_postgresql_either(
    server: RunningServer,
    plain: httpx.Client,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:
    pytest.importorskip("psycopg")
    store = JobStore(request.getfixturevalue("postgresql")(), tmp_path / "content")
    try:
        monkeypatch.setattr(server.service, "store", store)
        monkeypatch.setattr(server.service, "files", type(server.service.files)(store))
        for name in ("a%00b", "%00"):
            for path in (f"videos/{name}", f"videos/{name}/content", f"videos?after={name}", f"batches/{name}"):
                assert error_of(plain.get(f"/v1/{path}")) == (404, "not_found")
            for path in (f"files/{name}", f"files/{name}/content", f"files?after={name}", f"files?purpose={name}"):
                assert error_of(plain.get(f"/v1/{path}")) == (404, "not_found")
            for path in (f"videos/{name}", f"files/{name}"):
                assert error_of(plain.delete(f"/v1/{path}")) == (404, "not_found")
        edit = {"prompt": PROMPT, "video": {"id": "a\0b"}}
        assert error_of(plain.post("/v1/videos/edits", json=edit)) == (404, "not_found")
        parts = (b'name="purpose"\r\n\r\nbatch', b'name="file"; filename="a\0b"\r\n\r\nx')
        content = b"".join(b"--abc\r\ncontent-disposition: form-data; %b\r\n" % part for part in parts)
        kind = {"content-type": "multipart/form-data; boundary=abc"}
        assert error_of(plain.post("/v1/files", content=content + b"--abc--\r\n", headers=kind))[0] == 400
    finally:
        store.close()


@pytest.mark.parametrize("slow", ["chat.understand", "service.edit_prompt"])
def test_words_that_take_long_to_understand_hold_nobody_up(
    ada: openai.OpenAI, plain: httpx.Client, monkeypatch: pytest.MonkeyPatch, slow: str
) -> None:
    begun, go_on = threading.Event(), threading.Event()

    def wait(*_: Any) -> NoReturn:
        begun.set()
        go_on.wait(60)
        raise ConfigError("it took long.")

    id = ada.videos.create_and_poll(prompt=PROMPT).id
    monkeypatch.setattr(f"poet_serving.api.{slow}", wait)
    path, body = f"/v1/videos/{id}/remix", {"prompt": "blue"}
    if slow == "chat.understand":
        path, body = "/v1/chat/completions", {"messages": [{"role": "user", "content": PROMPT}]}  # type: ignore[dict-item]
    with ThreadPoolExecutor() as pool:
        asked = pool.submit(plain.post, path, json=body)
        try:
            assert begun.wait(30)
            assert plain.get("/v1/models", timeout=15).status_code == 200
        finally:
            go_on.set()
        assert error_of(asked.result()) == (400, "invalid_value")


def test_streams_are_said_not_to_be_there(ada: openai.OpenAI, plain: httpx.Client) -> None:
    video = ada.videos.create_and_poll(prompt=PROMPT)
    assert error_of(plain.get(f"/v1/videos/{video.id}/stream")) == (501, "not_implemented")


def test_a_video_that_is_not_done_has_no_content(ada: openai.OpenAI, server: RunningServer) -> None:
    server.hold.clear()
    try:
        video = ada.videos.create(prompt=PROMPT)
        for call in (lambda: ada.videos.download_content(video.id), lambda: ada.videos.remix(video.id, prompt="x")):
            with pytest.raises(openai.ConflictError) as early:
                call()
            assert early.value.code == "video_not_completed"
    finally:
        server.hold.set()
    assert ada.videos.poll(video.id).status == "completed"


def test_a_key_has_so_many_jobs_at_a_time(ada: openai.OpenAI, bob: openai.OpenAI, server: RunningServer) -> None:
    server.hold.clear()
    try:
        videos = [ada.videos.create(prompt=PROMPT) for _ in range(8)]
        with pytest.raises(openai.RateLimitError) as full:
            ada.videos.create(prompt=PROMPT)
        assert full.value.code == "too_many_jobs"
        assert float(full.value.response.headers["retry-after"]) >= 1
        videos.append(bob.videos.create(prompt=PROMPT))  # another key is not held up
    finally:
        server.hold.set()
    for video in videos[:-1]:
        assert ada.videos.poll(video.id).status == "completed"


def test_a_chat_answers_with_a_clip_and_the_next_turn_changes_it(ada: openai.OpenAI) -> None:
    messages: list[Any] = [{"role": "user", "content": PROMPT}]
    ask: dict[str, Any] = {"model": "tiny", "extra_body": {"modalities": ["video", "audio"], "seed": 3}}
    first = ada.chat.completions.create(messages=messages, **ask).choices[0].message
    assert first.content == PROMPT
    assert first.model_extra is not None
    assert first.model_extra["video"]["id"].startswith("video_")
    assert first.audio is not None
    assert base64.b64decode(first.audio.data)[:4] == b"RIFF"
    assert ada.videos.retrieve(first.model_extra["video"]["id"]).status == "completed"
    messages += [first.model_dump(exclude_none=True), {"role": "user", "content": "but blue"}]
    second = ada.chat.completions.create(messages=messages, **ask).choices[0].message
    assert second.content == "a red star, but blue"


def test_a_chat_describes_a_clip(ada: openai.OpenAI) -> None:
    video = ada.videos.create_and_poll(prompt=PROMPT)
    content = ada.videos.download_content(video.id).read()
    url = "data:video/mp4;base64," + base64.b64encode(content).decode()
    parts: list[Any] = [{"type": "text", "text": "what is this?"}, {"type": "video_url", "video_url": {"url": url}}]
    answer = ada.chat.completions.create(model="tiny", messages=[{"role": "user", "content": parts}])  # type: ignore[list-item]
    assert isinstance(answer.choices[0].message.content, str)
    assert answer.usage is not None
    assert answer.usage.completion_tokens > 0


def test_a_chat_describes_the_beginning_of_a_clip_that_is_longer_than_the_models_own(
    ada: openai.OpenAI, plain: httpx.Client
) -> None:
    video = ada.videos.create_and_poll(prompt=PROMPT)
    body = {"prompt": PROMPT, "video": {"id": video.id}, "seconds": 0.5}
    longer = ada.videos.poll(plain.post("/v1/videos/extensions", json=body).json()["id"])
    assert float(longer.seconds) > float(video.seconds)
    messages: list[Any] = [
        {"role": "user", "content": PROMPT},
        {"role": "assistant", "content": PROMPT, "video": {"id": longer.id}},
        {"role": "user", "content": "what is this?"},
    ]
    answer = ada.chat.completions.create(model="tiny", messages=messages)
    assert isinstance(answer.choices[0].message.content, str)


def test_a_chat_makes_the_sound_for_an_uploaded_clip(ada: openai.OpenAI) -> None:
    content = ada.videos.download_content(ada.videos.create_and_poll(prompt=PROMPT).id).read()
    file = ada.files.create(file=("a.mp4", content), purpose="vision")
    parts: list[Any] = [{"type": "file", "file": {"file_id": file.id}}]
    answer = ada.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": parts}], modalities=["text", "audio"]
    )
    sound = answer.choices[0].message.audio
    assert sound is not None
    video = ada.videos.retrieve("video_" + sound.id.removeprefix("audio_"))
    assert video.model_extra is not None
    assert video.model_extra["metadata"]["task"] == "video_to_audio"
    ada.files.delete(file.id)


def test_a_chat_in_text_alone_is_refused_and_says_what_to_send(ada: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        ada.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "hello"}])
    assert refused.value.code == "modality_unsupported"


def test_a_chat_whose_client_goes_away_leaves_no_job(ada: openai.OpenAI, server: RunningServer) -> None:
    server.hold.clear()
    try:
        before = {video.id for video in ada.videos.list()}

        def ask() -> None:
            with pytest.raises(openai.APITimeoutError):
                ada.with_options(timeout=1.5).chat.completions.create(
                    model="tiny",
                    messages=[{"role": "user", "content": PROMPT}],
                    extra_body={"modalities": ["video"]},
                )

        thread = threading.Thread(target=ask)
        thread.start()
        until(lambda: {video.id for video in ada.videos.list()} != before)
        thread.join()
        until(lambda: {video.id for video in ada.videos.list()} == before)
    finally:
        server.hold.set()


def test_models_say_what_they_do(ada: openai.OpenAI) -> None:
    (model,) = ada.models.list().data
    assert model.id == "tiny"
    assert model.model_extra is not None
    assert model.model_extra["sizes"] == ["40x24"]


def test_a_restart_goes_on_with_what_was_accepted(bundle: Bundle, tmp_path: Path) -> None:
    with run_server(bundle, tmp_path / "data") as first:
        first.hold.clear()
        client = openai.OpenAI(base_url=f"{first.url}/v1", api_key="x")
        videos = [client.videos.create(prompt=f"{PROMPT} {number}") for number in range(6)]
        until(lambda: client.videos.retrieve(videos[0].id).status == "in_progress")
        first.service.worker._capacity = 0  # as if it were killed now: nothing else is begun
    with run_server(bundle, tmp_path / "data") as second:
        client = openai.OpenAI(base_url=f"{second.url}/v1", api_key="x")
        for video in videos:
            done = client.videos.poll(video.id)
            assert (done.status, done.prompt) == ("completed", video.prompt)
        assert len(list(client.videos.list())) == 6


def test_the_openapi_document_is_whole(plain: httpx.Client) -> None:
    document = plain.get("/openapi.json").json()
    paths = {path for path in document["paths"] if path.startswith("/v1/")}
    wanted = {"/v1/videos", "/v1/videos/{video_id}", "/v1/videos/{video_id}/content", "/v1/videos/{video_id}/remix"}
    assert wanted <= paths
    assert {"/v1/videos/edits", "/v1/videos/extensions", "/v1/chat/completions", "/v1/models"} <= paths
    for path in paths:
        for operation in document["paths"][path].values():
            assert operation["responses"]["401"]["content"]["application/json"]["schema"]
            assert "422" not in operation["responses"]  # FastAPI's own, which is never sent
    assert not {"ValidationError", "HTTPValidationError"} & document["components"]["schemas"].keys()
    schema = document["paths"]["/v1/videos"]["post"]["requestBody"]["content"]
    assert set(schema) == {"application/json", "multipart/form-data"}
    assert "path" not in json.dumps(schema["application/json"]["schema"]["properties"]["input_reference"])


@pytest.mark.parametrize(
    ("lines", "wrong"),
    [
        ("", "at least one line"),
        ("ada", "at least 16 characters; the key has 0"),
        ("a/b 0123456789abcdef", "a name of 1 to 64 letters"),
        ("ada\t0123456789abcdef", "a name of 1 to 64 letters"),
        ("ada 0123456789", "at least 16 characters; the key has 10"),
        ("ada 0123456789abcdef more", "ASCII characters without spaces"),
        ("ada schlüssel-0123456789", "ASCII characters without spaces"),
        ("ada 0123456789abcdef\nada fedcba9876543210", "line 3 .* the name ada stands above"),
        ("ada 0123456789abcdef\nbob 0123456789abcdef", "line 3 .* the key is that of ada"),
    ],
)
def test_keys_that_would_not_say_who_asks_are_refused(tmp_path: Path, lines: str, wrong: str) -> None:
    (tmp_path / "keys.txt").write_text(f"# who may ask\n{lines}\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=wrong) as refused:
        ApiKeys.read(tmp_path / "keys.txt")
    assert "0123456789" not in str(refused.value)
    (tmp_path / "keys.txt").write_text("# who may ask\nada 0123456789abcdef\n")
    assert ApiKeys.read(tmp_path / "keys.txt").owner("0123456789abcdef") == "ada"


def test_too_many_requests_are_told_how_many_there_may_be_and_when_to_come_again() -> None:
    async def answer(scope: Any, receive: Any, send: Any) -> None:
        await Response("yes")(scope, receive, send)

    async def ask(count: int) -> list[httpx.Response]:
        limits, metrics = Limits(requests_per_minute=3), Metrics(CollectorRegistry())
        guard = Guard(answer, keys=ApiKeys({}), limits=limits, metrics=metrics, clock=lambda: 7.0)
        async with httpx.AsyncClient(transport=httpx.ASGITransport(guard), base_url="http://x") as http:
            return [await http.get("/v1/models") for _ in range(count)]

    *taken, refused = asyncio.run(ask(4))
    assert [response.status_code for response in taken] == [200] * 3
    assert error_of(refused) == (429, "rate_limit_exceeded")
    assert "at most 3 requests a minute" in refused.json()["error"]["message"]
    assert refused.headers["retry-after"] == "20"


@pytest.mark.parametrize(
    ("make", "is_of_address"),
    [
        (lambda: OSError(errno.EADDRINUSE, "Address already in use"), True),
        (lambda: OSError(errno.EADDRNOTAVAIL, "Cannot assign requested address"), True),
        (lambda: PermissionError(errno.EACCES, "Permission denied"), True),
        (lambda: socket.gaierror(socket.EAI_NONAME, "Name or service not known"), True),
        (lambda: PermissionError(errno.EACCES, "Permission denied", "/srv/poet"), False),
        (lambda: OSError(errno.ENOSPC, "No space left on device"), False),
        (lambda: MediaError("the scratch directory cannot hold uploads."), False),
    ],
)
def test_only_an_address_is_said_not_to_be_listened_on(make: Callable[[], OSError], is_of_address: bool) -> None:
    assert launch._is_of_address(make()) == is_of_address


def until(holds: Any, seconds: float = 30) -> None:
    ends = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < ends
        time.sleep(0.05)
