"""The chat page in a real Chromium, where there is one."""

import base64
import contextlib
import itertools
import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from poet.bundle import Bundle, default_bundle
from poet.testing import tiny_bundle
from poet_serving.api.guard import Limits
from poet_serving.testing import RunningServer, run_server

pytest.importorskip("gradio", reason="the page needs gradio")

KEYS = {"ada": "ada-secret-0123456789"}
PROMPT = "a red star"
RICH_PROMPT = "a large red star rises on a navy background with a low flute sound"
LIMITS = Limits(body_bytes=2**20)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return tiny_bundle(tmp_path_factory.mktemp("made") / "tiny")


@pytest.fixture(scope="module")
def server(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    with run_server(bundle, tmp_path_factory.mktemp("data"), limits=LIMITS, page=True) as running:
        yield running


@pytest.fixture(scope="module")
def keyed(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    with run_server(bundle, tmp_path_factory.mktemp("keyed"), keys=KEYS, limits=LIMITS, page=True) as running:
        yield running


class Tab:
    """A page in Chromium, over its DevTools protocol."""

    def __init__(self, wire: Any) -> None:
        self._wire, self._numbers = wire, itertools.count(1)
        self.requests: list[str] = []
        self.errors: list[str] = []
        for domain in ("Page", "Runtime", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        number = next(self._numbers)
        self._wire.send(json.dumps({"id": number, "method": method, "params": params}))
        while True:
            message = json.loads(self._wire.recv(timeout=60))
            if message.get("id") == number:
                if "error" in message:  # as while another page is being opened
                    raise ConnectionError(message["error"]["message"])
                result: dict[str, Any] = message["result"]
                return result
            if message.get("method") == "Network.requestWillBeSent":
                self.requests.append(message["params"]["request"]["url"])
            if message.get("method") == "Runtime.exceptionThrown":
                self.errors.append(json.dumps(message["params"]))

    def open(self, url: str, width: int, height: int) -> None:
        self.size(width, height)
        self.call("Page.navigate", url=url)

    def size(self, width: int, height: int) -> None:
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 500
        )

    def evaluate(self, code: str) -> Any:
        answer = self.call("Runtime.evaluate", expression=code, awaitPromise=True, returnByValue=True, userGesture=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def until(self, code: str, seconds: float = 90) -> None:
        ends = time.monotonic() + seconds
        while True:
            with contextlib.suppress(ConnectionError):
                if self.evaluate(f"Boolean({code})"):
                    return
            assert time.monotonic() < ends, code
            time.sleep(0.1)

    def say(self, text: str) -> None:
        self.evaluate("document.querySelector('#said textarea').focus()")
        self.call("Input.insertText", text=text)
        for kind, typed in (("keyDown", "\r"), ("keyUp", "")):
            self.call(
                "Input.dispatchKeyEvent", type=kind, key="Enter", code="Enter", windowsVirtualKeyCode=13, text=typed
            )

    def choose(self, file: Path) -> None:
        root = self.call("DOM.getDocument")["root"]["nodeId"]
        field = self.call("DOM.querySelector", nodeId=root, selector="#attach input")["nodeId"]
        self.call("DOM.setFileInputFiles", nodeId=field, files=[str(file)])

    def picture(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))

    @property
    def hosts(self) -> set[str]:
        return {url.split("/")[2] for url in self.requests if not url.startswith(("data:", "blob:"))}


@contextlib.contextmanager
def chromium(directory: Path) -> Iterator[Tab]:
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    program = next((found for name in names if (found := shutil.which(name))), None)
    if program is None:
        pytest.skip(f"no browser: none of {', '.join(names)} is installed")
    connect: Callable[..., Any] = pytest.importorskip("websockets.sync.client").connect
    process = subprocess.Popen(
        [
            program,
            "--headless=new",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--disable-background-networking",
            "--no-first-run",
            "--remote-debugging-port=0",
            f"--user-data-dir={directory}",
            *(["--no-sandbox"] if os.geteuid() == 0 else []),
            "about:blank",
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        port, ends = directory / "DevToolsActivePort", time.monotonic() + 60
        while not (port.exists() and len(port.read_text().split()) == 2):
            assert process.poll() is None, "the browser ended"
            assert time.monotonic() < ends, "the browser did not start"
            time.sleep(0.1)
        tabs = httpx.get(f"http://127.0.0.1:{port.read_text().split()[0]}/json", timeout=30).json()
        address = next(tab["webSocketDebuggerUrl"] for tab in tabs if tab["type"] == "page")
        with connect(address, max_size=None) as wire:
            yield Tab(wire)
    finally:
        process.terminate()
        process.wait(timeout=30)


@pytest.fixture(scope="module")
def shipped(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """The shipped model, so that there is something to see and hear."""
    with run_server(Bundle.open(default_bundle()), tmp_path_factory.mktemp("shipped"), page=True) as running:
        yield running


CLIPS = "[...document.querySelectorAll('video')]"


def test_in_a_browser_a_prompt_becomes_a_clip_that_plays_with_sound(shipped: RunningServer, tmp_path: Path) -> None:
    with chromium(tmp_path / "browser") as tab:
        tab.open(shipped.url, 1280, 900)
        tab.until("document.querySelectorAll('.chips button').length > 2")
        shipped.hold.clear()
        tab.say(RICH_PROMPT)
        tab.until("document.querySelector('.tile') && document.querySelector('#stop')")
        shipped.hold.set()
        tab.until("/Writing, \\d+ %/.test(document.querySelector('.answer').textContent)")
        tab.until(f"{CLIPS}.length == 1 && {CLIPS}[0].readyState >= 3")
        tab.until(f"{CLIPS}[0].currentTime > 0.5 || {CLIPS}[0].ended")  # a new clip plays by itself
        duration, heard, width = tab.evaluate(
            f"(v => [v.duration, v.webkitAudioDecodedByteCount, v.videoWidth])({CLIPS}[0])"
        )
        assert duration == pytest.approx(2.125, abs=0.1)
        assert heard > 0
        assert width == 64
        tab.evaluate(f"(v => {{ v.loop = true; v.dataset.mine = 1; return v.play(); }})({CLIPS}[0])")
        tab.until("!document.querySelector('#stop')")
        tab.evaluate("[...document.querySelectorAll('.edits button')].find(b => /bounce/.test(b.textContent)).click()")
        tab.until("document.querySelector('.prompt') && document.querySelector('.tile')")
        assert tab.evaluate("document.querySelector('.prompt').textContent") == RICH_PROMPT.replace("rises", "bounces")
        # The first clip is left alone while the second is written.
        assert tab.evaluate(f"{CLIPS}[0].dataset.mine == 1 && !{CLIPS}[0].paused")
        tab.until(f"{CLIPS}.length == 2 && {CLIPS}[1].currentTime > 0.2")
        assert tab.evaluate(f"{CLIPS}[0].paused")  # one at a time is heard
        for width, height in ((1280, 900), (390, 844)):
            tab.size(width, height)
            tab.until(f"innerWidth == {width} && document.documentElement.scrollWidth <= {width}")
            composer = "document.querySelector('#composer').getBoundingClientRect()"
            tab.until(f"{composer}.bottom <= {height} && {composer}.top > {height} / 2")
        tab.call("Page.reload")
        tab.until(f"{CLIPS}.length == 2")  # the browser kept the conversation
        assert tab.errors == []
        assert tab.hosts == {shipped.url.removeprefix("http://")}


def test_in_a_browser_a_file_is_attached_and_errors_are_sentences(
    server: RunningServer, picture: bytes, tmp_path: Path
) -> None:
    (tmp_path / "good.png").write_bytes(picture)
    (tmp_path / "bad.png").write_bytes(b"nothing")
    (tmp_path / "large.png").write_bytes(bytes(LIMITS.body_bytes + 1))
    label = "document.querySelector('.attached span').textContent"
    with chromium(tmp_path / "browser") as tab:
        tab.open(server.url, 390, 844)
        tab.until("document.querySelector('.welcome') && document.querySelector('#attach input')")
        tab.choose(tmp_path / "large.png")
        tab.until(f"{label} == 'The file must have at most 1.0 MB.'")
        tab.choose(tmp_path / "bad.png")
        tab.until(f"{label} == 'bad.png'")
        tab.say(PROMPT)
        tab.until("document.querySelector('.answer [role=alert]')")
        assert tab.evaluate("document.querySelector('#said textarea').value") == PROMPT
        tab.choose(tmp_path / "good.png")
        tab.until(f"{label} == 'good.png'")
        tab.say("")
        tab.until(f"{CLIPS}.length == 1 && document.querySelector('.said img').naturalWidth == 40")
        assert tab.evaluate("document.querySelector('.attached').hidden")
        assert tab.evaluate("document.documentElement.scrollWidth") <= 390
        tab.evaluate("document.querySelector('[data-new]').click()")
        tab.until("document.querySelector('.welcome') && !document.querySelector('video')")
        assert tab.errors == []
        assert tab.hosts == {server.url.removeprefix("http://")}


def test_in_a_browser_a_name_and_a_key_open_the_page(keyed: RunningServer, tmp_path: Path) -> None:
    def log_in(key: str) -> None:
        tab.evaluate(
            f"document.querySelector('[name=username]').value = 'ada';"
            f"document.querySelector('[name=password]').value = '{key}'; document.querySelector('button').click()"
        )

    with chromium(tmp_path / "browser") as tab:
        tab.open(keyed.url, 390, 844)
        tab.until("document.querySelector('[name=password]')")
        log_in("wrong")
        tab.until("document.querySelector('[role=alert]')")
        log_in(KEYS["ada"])
        tab.until("document.querySelector('nav a') && document.querySelector('nav a').textContent == 'Log out ada'")
        tab.say(PROMPT)
        tab.until(f"{CLIPS}.length == 1 && {CLIPS}[0].readyState >= 2")  # fetched with the cookie
        tab.evaluate("document.querySelector('nav a').click()")
        tab.until("document.querySelector('[name=password]')")
        assert tab.errors == []
        assert tab.hosts == {keyed.url.removeprefix("http://")}


@pytest.mark.slow
def test_an_open_page_does_not_keep_the_server_from_ending(bundle: Bundle, tmp_path: Path) -> None:
    with chromium(tmp_path / "browser") as tab:
        with run_server(bundle, tmp_path / "data", page=True) as running:
            tab.open(running.url, 1280, 900)
            tab.until("document.querySelector('.welcome')")
            running.hold.clear()
            tab.say(PROMPT)
            tab.until("document.querySelector('.tile')")
            begun = time.monotonic()
        assert time.monotonic() - begun < 30
