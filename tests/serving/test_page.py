"""The chat page over HTTP, with gradio's client."""

import asyncio
import errno
import json
import logging
import os
import re
import shutil
import socket
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NoReturn, Self

import httpx
import numpy as np
import pytest
from fastapi import FastAPI
from prometheus_client import CollectorRegistry

from poet.bundle import Bundle
from poet.media import Clip, read_clip, write_clip
from poet.model.lora import read_adapter
from poet.testing import save_adapter, tiny_bundle
from poet_serving.api.application import create_application
from poet_serving.api.guard import ApiKeys, Limits
from poet_serving.api.metrics import Metrics
from poet_serving.testing import RunningServer, run_server

pytest.importorskip("gradio", reason="the page needs gradio")
from gradio_client import Client

from poet_serving.api import page_talk
from poet_serving.api.page import MAX_LOGIN, UPLOAD_SECONDS, Uploads
from poet_serving.api.page_talk import Asked, Sample, Talk, Turn, parse_talk
from poet_serving.api.page_view import view

KEYS = {"ada": "ada-secret-0123456789", "bob": "bob-secret-0123456789"}
PROMPT = "a red star"
SETTINGS: dict[str, Any] = {
    "kind": "clip",
    "samples": 1,
    "guidance_scale": 1,
    "temperature": 0.9,
    "seed": "",
    "decoding": "autoregressive",
    "steps": 12,
    "size": "40x24",
    "model": "tiny",
}
LIMITS = Limits(body_bytes=2**20)


@pytest.fixture(scope="module")
def looked_up() -> Iterator[set[Any]]:
    """Names of hosts that this process, which the server is in, asks for."""
    hosts: set[Any] = set()
    real = socket.getaddrinfo

    def note(host: Any, *arguments: Any, **keywords: Any) -> Any:
        hosts.add(host)
        return real(host, *arguments, **keywords)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket, "getaddrinfo", note)
        yield hosts


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return tiny_bundle(tmp_path_factory.mktemp("made") / "tiny")


@pytest.fixture(scope="module")
def server(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory, looked_up: set[Any]) -> Iterator[RunningServer]:
    with run_server(bundle, tmp_path_factory.mktemp("data"), limits=LIMITS, page=True) as running:
        yield running


@pytest.fixture(scope="module")
def keyed(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    with run_server(bundle, tmp_path_factory.mktemp("keyed"), keys=KEYS, limits=LIMITS, page=True) as running:
        yield running


class Visitor:
    """The page without a browser: it keeps what a browser would, and sends it back."""

    def __init__(self, url: str, login: tuple[str, str] | None = None) -> None:
        self.http = httpx.Client(base_url=url, timeout=60)
        if login is not None:
            answer = self.http.post("/login", data={"username": login[0], "password": login[1]})
            assert answer.status_code == 200
        self.gradio = Client(url, auth=login, verbose=False, analytics_enabled=False, httpx_kwargs={"timeout": 60})
        self.talk: Any = None
        self.parts: list[Any] = []
        self.box: Any = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.http.close()
        self.gradio.close()

    def call(self, name: str, *arguments: Any) -> tuple[Any, ...]:
        """gradio's client leaves the clock out of what is answered."""
        answer: tuple[Any, ...] = self.gradio.predict(*arguments, api_name=name)
        if "__type__" not in answer[0]:  # as it is
            self.talk, self.parts = answer[0], answer[1]
        return answer

    def send(self, said: str, file: Any = None, **settings: Any) -> dict[str, Any]:
        self.box = self.call("/send", said, self.talk, file, *(SETTINGS | settings).values())[3]
        return self.last

    def say(self, said: str, file: Any = None, **settings: Any) -> dict[str, Any]:
        """Send, and wait for the answer."""
        assert self.send(said, file, **settings)["error"] is None
        self.wait()
        return self.last

    def wait(self) -> None:
        ends = time.monotonic() + 60
        while Talk.model_validate(self.talk).is_open:
            assert time.monotonic() < ends
            self.call("/watch", self.talk)

    def upload(self, content: bytes) -> dict[str, str]:
        return {"token": self.http.post("/page/uploads", content=content).json()["token"], "name": "x.png"}

    @property
    def last(self) -> dict[str, Any]:
        turn: dict[str, Any] = self.talk["turns"][-1]
        return turn


@pytest.fixture
def visitor(server: RunningServer) -> Iterator[Visitor]:
    with Visitor(server.url) as made:
        yield made


def shown(parts: Any) -> str:
    return "".join(shown(part["parts"]) if "parts" in part else part["html"] for part in parts)


def error_of(response: httpx.Response) -> tuple[int, str]:
    body = response.json()["error"]
    assert set(body) == {"message", "type", "param", "code"}
    return response.status_code, body["code"]


def test_a_message_is_answered_with_a_clip_that_can_be_played_in_parts(visitor: Visitor, tmp_path: Path) -> None:
    turn = visitor.say(PROMPT, seed="7")
    (sample,) = turn["samples"]
    assert (turn["prompt"], sample["status"], sample["seed"], sample["size"]) == (PROMPT, "completed", "7", "40x24")
    (source,) = re.findall("<video src='([^']+)'", shown(visitor.parts))
    assert f"href='{source}' download=" in shown(visitor.parts)
    whole = visitor.http.get(source)
    assert whole.headers["content-type"] == "video/mp4"
    (tmp_path / "clip.mp4").write_bytes(whole.content)
    clip = read_clip(tmp_path / "clip.mp4")
    assert clip.samples is not None
    part = visitor.http.get(source, headers={"range": "bytes=5-16"})
    assert (part.status_code, part.content) == (206, whole.content[5:17])
    assert error_of(visitor.http.get(source, headers={"range": "bytes=x"})) == (400, "invalid_range")


def test_an_adapter_is_a_model_to_choose_and_settings_follow_the_bundle(bundle: Bundle, tmp_path: Path) -> None:
    shutil.copytree(bundle.path, tmp_path / "tiny")
    file = tmp_path / "tiny" / "generation_config.json"
    parallel = {"num_steps": 80, "guidance_scale": 9.0}
    file.write_text(json.dumps(json.loads(file.read_text()) | {"parallel": parallel}))
    own = Bundle.open(tmp_path / "tiny")
    adapter = read_adapter(save_adapter(own.model_config, tmp_path / "ink"), own.model_config, own.fingerprint)
    with (
        run_server(own, tmp_path / "data", limits=LIMITS, page=True, adapters=[adapter]) as running,
        Visitor(running.url) as visitor,
    ):
        for name in ("ink", "tiny"):
            # Settings that are not shown are sent as well, and must be within their bounds.
            turn = visitor.say(PROMPT, seed="7", model=name, steps=80, guidance_scale=9.0)
            video = visitor.http.get(f"/v1/videos/{turn['samples'][0]['id']}").json()
            assert video["model"] == name
            assert video["metadata"].get("adapter_sha256") == (adapter.sha256 if name == "ink" else None)
        page = visitor.http.get("/config").json()
        (choice,) = [part["props"] for part in page["components"] if part["props"].get("label") == "Model"]
        assert ([value for _, value in choice["choices"]], choice["visible"]) == (["tiny", "ink"], True)


def test_the_next_turn_changes_the_clip(visitor: Visitor) -> None:
    visitor.say(PROMPT)
    assert visitor.say("but blue")["prompt"] == "a red star, but blue"
    assert "<p>a red star, but blue</p>" in shown(visitor.parts)


def test_samples_stand_side_by_side_with_seeds_of_their_own(visitor: Visitor) -> None:
    turn = visitor.say(PROMPT, samples=3, seed=" 11 ")
    assert [sample["seed"] for sample in turn["samples"]] == ["11", "12", "13"]
    assert shown(visitor.parts).count("<video") == 3


def test_a_picture_begins_the_clip_and_the_one_after_it(
    visitor: Visitor, picture: bytes, server: RunningServer
) -> None:
    first = visitor.say(PROMPT, visitor.upload(picture), samples=2)
    second = visitor.say("but blue")
    for sample in (*first["samples"], *second["samples"]):
        video = visitor.http.get(f"/v1/videos/{sample['id']}").json()
        assert video["metadata"]["task"] == "image_to_video"
        given = visitor.http.get(f"/page/clips/{sample['id']}/given")
        assert given.headers["content-type"] == "image/png"
    assert second["prompt"] == "a red star, but blue"
    assert f"src='page/clips/{first['samples'][0]['id']}/given'" in shown(visitor.parts)


def test_the_sound_for_a_clip_that_is_sent_is_made(visitor: Visitor, tmp_path: Path) -> None:
    frames = np.random.default_rng(0).integers(0, 255, (7, 24, 40, 3), np.uint8)
    write_clip(Clip(frames=frames, fps=8, samples=None, sample_rate=16_000), tmp_path / "x.mp4")
    turn = visitor.say("", visitor.upload((tmp_path / "x.mp4").read_bytes()), kind="sound")
    video = visitor.http.get(f"/v1/videos/{turn['samples'][0]['id']}").json()
    assert video["metadata"]["task"] == "video_to_audio"


def test_a_disk_that_is_full_is_said_in_a_sentence_without_its_place(
    visitor: Visitor, picture: bytes, server: RunningServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(**_: Any) -> NoReturn:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    file = visitor.upload(picture)
    monkeypatch.setattr("poet_serving.media_reader.tempfile.TemporaryFile", full)
    error = visitor.send(PROMPT, file)["error"]
    assert error == "The server cannot keep or read its files at the moment; its log says why. Try again later."


@pytest.mark.parametrize("slow", ["understand", "edits"])
def test_words_that_take_long_to_understand_hold_nobody_up(
    visitor: Visitor, monkeypatch: pytest.MonkeyPatch, slow: str
) -> None:
    begun, go_on, real = threading.Event(), threading.Event(), getattr(page_talk, slow)

    def wait(*arguments: Any) -> Any:
        begun.set()
        go_on.wait(60)
        return real(*arguments)

    visitor.say(PROMPT)
    monkeypatch.setattr(page_talk, slow, wait)
    with ThreadPoolExecutor() as pool:
        sent = pool.submit(visitor.send, "but blue")
        try:
            assert begun.wait(30)
            assert visitor.http.get("/v1/models", timeout=15).status_code == 200
        finally:
            go_on.set()
        assert sent.result()["prompt"] == "a red star, but blue"
    visitor.wait()


def test_a_file_that_is_none_is_refused_in_a_sentence_and_can_be_sent_again(visitor: Visitor) -> None:
    file = visitor.upload(b"GIF89a, or so it says")
    for _ in range(2):
        turn = visitor.send(PROMPT, file)
        assert turn["samples"] == []
        assert turn["error"].startswith("The file ")
        assert turn["error"] in shown(visitor.parts).replace("&#x27;", "'")
        assert not isinstance(visitor.box, str)  # what was typed stays in its field
    assert visitor.send(PROMPT, {"token": "x", "name": "y"})["error"].endswith("Attach it again.")
    assert visitor.say("a blue star")["prompt"] == "a blue star"  # what was refused was not said


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"seed": "seven"}, "The seed must be a whole number, or empty."),
        ({"seed": "-7"}, "The seed must be a whole number, or empty."),
        ({"decoding": "parallel"}, ""),  # the bundle has not learnt it
        ({"size": "1280x720"}, None),  # gradio itself takes none but the choices
        ({"kind": "poem"}, None),
        ({"kind": "description"}, "This model cannot chat in text"),
    ],
)
def test_what_cannot_be_done_is_said_in_a_sentence(
    visitor: Visitor, settings: dict[str, Any], sentence: str | None
) -> None:
    if sentence is None:
        with pytest.raises(Exception, match="choices"):
            visitor.send(PROMPT, **settings)
        return
    error = visitor.send(PROMPT, **settings)["error"]
    assert error.startswith(sentence)
    assert error[0].isupper()
    assert error.endswith(".")


def test_a_clip_is_described(visitor: Visitor) -> None:
    visitor.say(PROMPT)
    turn = visitor.say("what is this?", kind="description")
    assert isinstance(turn["samples"][0]["text"], str)
    assert shown(visitor.parts).count("<video") == 1


def test_a_sound_has_a_player_of_its_own(visitor: Visitor) -> None:
    visitor.say(PROMPT, kind="sound")
    (source,) = re.findall("<audio src='([^']+)'", shown(visitor.parts))
    assert visitor.http.get(source).headers["content-type"] == "audio/wav"


def test_the_queue_is_shown_and_what_waits_can_be_stopped(visitor: Visitor, server: RunningServer) -> None:
    server.hold.clear()
    try:
        for _ in range(4):  # as many as are carried out at once
            visitor.http.post("/v1/videos", json={"prompt": PROMPT})
        turn = visitor.send(PROMPT, samples=3)
        places = [sample["place"] for sample in turn["samples"]]
        assert places == sorted(places)
        assert places[2] >= 3
        assert "in line" in shown(visitor.parts)
        before = visitor.talk
        assert visitor.send("another")["said"] == PROMPT  # one message at a time
        assert visitor.talk == before
        visitor.call("/stop", visitor.talk)
        assert {sample["status"] for sample in visitor.last["samples"]} == {"gone"}
        for sample in turn["samples"]:
            assert visitor.http.get(f"/v1/videos/{sample['id']}").status_code == 404
    finally:
        server.hold.set()
    assert visitor.say(PROMPT)["samples"][0]["status"] == "completed"


def test_progress_is_shown_while_a_clip_is_written(visitor: Visitor, server: RunningServer) -> None:
    server.hold.clear()
    try:
        visitor.send(PROMPT)
        job = visitor.gradio.submit(visitor.talk, api_name="/watch")
        ends = time.monotonic() + 60
        while not any("Writing" in shown(answer[1]) for answer in job.outputs()):
            assert time.monotonic() < ends
            time.sleep(0.05)
    finally:
        server.hold.set()
    ends = time.monotonic() + 60
    while not job.done():
        assert time.monotonic() < ends
        time.sleep(0.05)
    visitor.talk, visitor.parts = job.outputs()[-1][:2]
    visitor.wait()  # one answer goes on for a while only
    assert "<video" in shown(visitor.parts)


def test_a_page_that_is_opened_again_shows_what_the_browser_kept(visitor: Visitor, server: RunningServer) -> None:
    visitor.say(PROMPT)
    with Visitor(server.url) as again:
        header = again.call("/show", visitor.talk)[3]
        assert shown(again.parts) == shown(visitor.parts)
        assert "tiny" in header
        assert "What should happen" in shown(again.call("/fresh", again.talk)[1])
        assert again.talk == {"owner": "", "turns": []}


def test_what_a_person_wrote_is_text_and_nothing_else() -> None:
    evil = "<img src=x onerror=alert(1)>'\""
    sample = Sample(id="video_1", status="failed", error=evil)
    text = Sample(id="video_2", status="completed", text=evil, seed=evil, size=evil)
    clip = Sample(id="video_3", status="completed", seed=evil, size=evil)
    turns = [Turn(said=evil, file=evil, prompt=evil + evil, samples=[sample, text, clip]), Turn(said="", error=evil)]
    page = shown(view(Talk(turns=turns), [], [evil]))
    assert "<img src=x" not in page
    assert "'\"" not in page
    assert page.count("&lt;img src=x") == 10
    with pytest.raises(ValueError, match="id"):
        Sample(id="../../etc/passwd")


@pytest.mark.parametrize("kept", [None, 3, "x", {"turns": 3}, {"owner": "eve"}, {"turns": [{"said": "x", "more": 1}]}])
def test_what_a_browser_kept_is_not_believed(kept: Any) -> None:
    assert parse_talk(kept, "ada") == Talk(owner="ada")


def test_uploads_are_kept_for_their_owner_for_a_while_and_not_without_end() -> None:
    now = 0.0
    uploads = Uploads(10, max_count=3, clock=lambda: now)
    first = uploads.put("ada", b"12345")
    assert uploads.get("ada", first) == b"12345"
    assert uploads.get("bob", first) is None
    second = uploads.put("ada", b"67890")
    third = uploads.put("ada", b"x")
    assert [uploads.get("ada", token) for token in (first, second, third)] == [None, b"67890", b"x"]
    now = UPLOAD_SECONDS + 1
    assert uploads.get("ada", third) is None
    tokens = [uploads.put("ada", b"y") for _ in range(5)]
    assert [uploads.get("ada", token) for token in tokens] == [None, None, b"y", b"y", b"y"]
    uploads.drop(tokens[4])
    assert uploads.get("ada", tokens[4]) is None


def test_an_upload_is_limited_in_size(visitor: Visitor) -> None:
    assert error_of(visitor.http.post("/page/uploads", content=b"x" * (LIMITS.body_bytes + 1))) == (
        413,
        "request_too_large",
    )
    assert error_of(visitor.http.post("/page/uploads", content=b"")) == (400, "invalid_input_reference")


def test_the_api_keeps_its_routes_and_its_errors(visitor: Visitor) -> None:
    assert "/v1/videos" in visitor.http.get("/openapi.json").json()["paths"]
    assert "swagger" in visitor.http.get("/docs").text
    assert visitor.http.get("/v1/models").json()["data"][0]["id"] == "tiny"
    for path in ("/v1/nothing", "/v1/videos/x/content", "/nothing", "/page/clips/x/video", "/page/clips/x/given"):
        assert error_of(visitor.http.get(path)) == (404, "not_found")


@pytest.mark.parametrize(
    "path",
    [
        "/gradio_api/upload",
        "/gradio_api/file=/etc/passwd",
        "/gradio_api/file/etc/passwd",
        "/file=/etc/passwd",
        "/gradio_api/proxy=http://127.0.0.1/",
        "/gradio_api/deep_link?session_hash=x",
        "/gradio_api/heartbeat/x",
        "/gradio_api/runs",
        "/gradio_api/run-history/buckets",
        "/gradio_api/custom_component/1/client/component/x",
        "/gradio_api/stream/x/0/0/playlist.m3u8",
        "/gradio_api/call/send",
        "/gradio_api/component_server",
        "/monitoring/x",
    ],
)
def test_of_gradio_only_what_the_page_needs_can_be_reached(visitor: Visitor, path: str) -> None:
    for method in ("GET", "POST"):
        assert error_of(visitor.http.request(method, path)) == (404, "not_found")


def test_what_the_bundle_cannot_do_is_not_shown(visitor: Visitor) -> None:
    controls = {part["props"].get("label"): part["props"] for part in visitor.http.get("/config").json()["components"]}
    assert not controls["Decoding"]["visible"]
    assert not controls["Steps"]["visible"]
    assert not controls["Size"]["visible"]
    assert controls["Samples side by side"]["visible"]
    assert len(Asked().to_fields()["modalities"]) == 2


def test_without_keys_there_is_nothing_to_log_in_to(visitor: Visitor) -> None:
    assert visitor.http.get("/login").headers["location"] == "./"


def test_strangers_see_the_form_and_nothing_else(keyed: RunningServer) -> None:
    with httpx.Client(base_url=keyed.url) as http:
        page = http.get("/")
        assert page.status_code == 401
        assert "name='password'" in page.text
        assert "<script" not in page.text
        for path in ("/config", "/theme.css", "/page/clips/x/video", "/gradio_api/info", "/assets/x"):
            assert error_of(http.get(path)) == (401, "not_logged_in")
        for path in ("/page/uploads", "/gradio_api/queue/join"):
            assert error_of(http.post(path, content=b"x")) == (401, "not_logged_in")
        assert error_of(http.get("/v1/models")) == (401, "invalid_api_key")
        for name, key in (("ada", KEYS["bob"]), ("ada", "x"), ("", KEYS["ada"]), ("", "")):
            answer = http.post("/login", data={"username": name, "password": key}, headers={"accept": "text/html"})
            assert answer.status_code == 401
            assert "do not belong together" in answer.text
        assert not http.cookies


def test_of_a_login_no_more_is_read_than_a_name_and_a_key_may_have(keyed: RunningServer) -> None:
    said = f"username=ada&password={KEYS['ada']}&more=".encode()

    def in_parts() -> Iterator[bytes]:
        yield said
        for _ in range(9):
            yield b"x" * (MAX_LOGIN // 8)

    with httpx.Client(base_url=keyed.url, timeout=60) as http:
        for content in (said + b"x" * MAX_LOGIN, in_parts()):
            assert error_of(http.post("/login", content=content)) == (413, "request_too_large")
        assert error_of(http.post("/login", content=b"x=y&" * 9)) == (400, "invalid_value")
        assert http.post("/login", data={"username": "ada", "password": KEYS["ada"]}).status_code == 200


def test_a_person_sees_only_what_is_made_with_his_key(keyed: RunningServer, picture: bytes) -> None:
    logins = [(name, KEYS[name]) for name in ("ada", "bob")]
    with Visitor(keyed.url, logins[0]) as ada, Visitor(keyed.url, logins[1]) as bob:
        turn = ada.say(PROMPT, ada.upload(picture))
        id = turn["samples"][0]["id"]
        assert ada.talk["owner"] == "ada"
        assert ada.http.get(f"/page/clips/{id}/video").status_code == 200
        key = {"authorization": f"Bearer {KEYS['ada']}"}
        assert ada.http.get(f"/v1/videos/{id}", headers=key).json()["prompt"] == PROMPT
        for variant in ("video", "given"):
            assert error_of(bob.http.get(f"/page/clips/{id}/{variant}")) == (404, "not_found")
        assert "What should happen" in shown(bob.call("/show", ada.talk)[1])
        bob.talk = ada.talk | {"owner": "bob"}  # made up
        bob.call("/watch", bob.talk | {"turns": [turn | {"samples": [{"id": id}]}]})
        assert bob.last["samples"][0]["status"] == "gone"
        bob.talk = {"owner": "bob", "turns": [turn]}
        assert bob.send("but blue")["error"].endswith("Attach it again.")
        assert bob.send(PROMPT, ada.upload(picture))["error"] == "The file is no longer here. Attach it again."


def test_who_logs_out_is_out(keyed: RunningServer) -> None:
    with Visitor(keyed.url, ("ada", KEYS["ada"])) as ada:
        assert "Log out ada" in ada.call("/show", None)[3]
        cookie = ada.http.cookies["poet_page"]
        answer = httpx.post(f"{keyed.url}/login", data={"username": "ada", "password": KEYS["ada"]})
        assert {"httponly", "samesite=strict"} <= set(answer.headers["set-cookie"].lower().split("; "))
        ada.http.get("/logout")
        assert ada.http.get("/").status_code == 401
        assert httpx.get(keyed.url + "/config", cookies={"poet_page": cookie}).status_code == 401


def test_without_gradio_the_server_serves_and_says_so_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delitem(sys.modules, "poet_serving.api.page")
    monkeypatch.setitem(sys.modules, "gradio", None)
    metrics = Metrics(CollectorRegistry())
    with caplog.at_level(logging.WARNING):
        application = create_application(None, keys=ApiKeys({}), limits=Limits(), metrics=metrics, page=True)
    assert [record.message for record in caplog.records if "openpoet[ui]" in record.message] == [
        "there is no page at /: it needs gradio. Install openpoet[ui], or say --no-page."
    ]
    paths = {getattr(route, "path", None) for route in application.routes}
    assert "/v1/models" in paths
    assert "" not in paths


def test_the_page_needs_no_lifespan_where_its_application_is_mounted_in_another(server: RunningServer) -> None:
    metrics = Metrics(CollectorRegistry())
    inner = create_application(None, keys=ApiKeys({}), limits=LIMITS, metrics=metrics, page=True)
    outer = FastAPI()
    outer.mount("", inner)
    inner.state.service = server.service  # later than the application

    async def ask() -> list[int]:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(outer), base_url="http://x") as http:
            paths = ("/", "/config", "/theme.css", "/v1/models", "/nothing", "/v1/nothing")
            return [(await http.get(path)).status_code for path in paths]

    assert asyncio.run(ask()) == [200, 200, 200, 200, 404, 404]


def test_nobody_else_is_asked_for_anything(visitor: Visitor, looked_up: set[Any]) -> None:
    visitor.say(PROMPT)
    assert looked_up <= {"127.0.0.1", b"127.0.0.1", "localhost", None}
