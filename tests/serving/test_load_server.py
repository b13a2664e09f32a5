"""recipes/benchmarks/load_server.py: its arithmetic, what it takes for a broken promise, and its clients."""

import asyncio
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import httpx
import numpy as np
import pytest

from poet.bundle import Bundle
from poet.media import Clip, write_clip
from poet.testing import tiny_bundle
from poet_serving.api.guard import Limits
from poet_serving.testing import run_server

SCRIPT = Path(__file__).resolve().parents[2] / "recipes" / "benchmarks" / "load_server.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location(SCRIPT.stem, SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[SCRIPT.stem] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return tiny_bundle(tmp_path_factory.mktemp("made") / "tiny")


def test_a_rate_leaves_out_the_first_wave_and_the_last(script: ModuleType) -> None:
    times = [100.0, 101.0, 111.0, 113.0, 116.0, 150.0, 190.0]
    assert script.rate(times[::-1], 2) == pytest.approx(3 / 15)
    assert script.rate(times[:4], 2) is None


def test_memory_is_flat_where_the_last_third_is_within_a_tenth_of_the_first(script: ModuleType) -> None:
    def grown(last: float) -> dict[str, Any]:
        sizes = [9999.0, *[200.0] * 5, *[777.0] * 5, *[last] * 5, 9999.0]
        found: dict[str, Any] = script.growth(list(enumerate(sizes)), 1.0, 15.0)
        return found

    assert grown(219.0) == {"first_third_mib": 200, "last_third_mib": 219, "growth": 0.095, "is_flat": True}
    assert grown(221.0)["is_flat"] is False
    assert script.growth([], 1.0, 15.0)["is_flat"] is None


def test_impossible_counts_are_refused(script: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert script.parse([]).clients == 64
    assert script.parse(["--seconds", "20"]).warmup == 5.0
    for bad in (["--clients", "0"], ["--clients", "5000"], ["--kills", "-1"], ["--seconds", "0"]):
        with pytest.raises(SystemExit):
            script.parse(bad)
    assert "must be" in capsys.readouterr().err


@pytest.fixture
def server(tmp_path: Path) -> SimpleNamespace:
    """What a server left that wrote one clip, `video_a`."""
    clip = Clip(frames=np.zeros((5, 24, 40, 3), np.uint8), fps=8.0, samples=None, sample_rate=0)
    place = tmp_path / "data" / "content" / "video_a"
    place.mkdir(parents=True)
    write_clip(clip, place / "clip.mp4")
    (tmp_path / "tmp").mkdir()
    return SimpleNamespace(data=tmp_path / "data", scratch=tmp_path / "tmp")


def test_every_broken_promise_is_said_and_none_where_all_were_kept(script: ModuleType, server: SimpleNamespace) -> None:
    def asked(key: str, id: str | None, status: str | None) -> Any:
        return script.Asked(key=key, body={}, begun=0.0, id=id, status=status)

    good = [asked("1", "video_a", "completed"), asked("2", "video_b", "failed")]
    listed = [
        {"id": "video_a", "status": "completed"},
        {"id": "video_b", "status": "failed", "error": {"message": "x"}},
    ]
    assert script.broken_promises(good, listed, server) == []

    def only(sentence: str, asked: Any, listed: Any) -> None:
        assert any(sentence in said for said in script.broken_promises(asked, listed, server)), sentence

    only("lost, queued", [good[0], asked("2", "video_b", "queued")], listed)
    only("listed 2 times", good, [*listed, listed[0]])
    only("accepted, and not listed", good, listed[:1])
    only("one request became two jobs", good, [*listed, {"id": "video_c", "status": "completed"}])
    only("answered with one job", [*good, asked("3", "video_a", "completed")], listed)
    only("failed without a reason", good, [listed[0], {"id": "video_b", "status": "failed", "error": None}])
    only(
        "without a file",
        [*good, asked("3", "video_c", "completed")],
        [*listed, {"id": "video_c", "status": "completed"}],
    )
    half = server.data / "content" / ".unfinished-1"
    half.mkdir()
    only(".unfinished-1 holds", good, listed)
    half.rmdir()
    (server.scratch / "poet-x").mkdir()
    only("poet-x is left", good, listed)
    (server.scratch / "poet-x").rmdir()
    file = server.data / "content" / "video_a" / "clip.mp4"
    file.write_bytes(file.read_bytes()[:700])
    only("clip.mp4", good, listed)


def test_clients_carry_every_clip_through_and_send_again_what_was_refused(
    script: ModuleType, bundle: Bundle, tmp_path: Path
) -> None:
    with run_server(bundle, tmp_path / "data", limits=Limits(open_jobs=2)) as running:

        async def drive() -> tuple[Any, list[dict[str, Any]]]:
            load = script.Load(running.url, ["a red star", "a blue box"], bundle.geometry().duration, tmp_path, "k")
            load.up.set()
            async with httpx.AsyncClient(trust_env=False, timeout=60) as http:
                running.hold.clear()  # so that the third client finds two jobs at work
                clients = [asyncio.create_task(load.client(http)) for _ in range(3)]
                while not load.answers["429"]:
                    await asyncio.sleep(0.05)
                running.hold.set()
                while sum(one.status == "completed" for one in load.asked) < 3:
                    await asyncio.sleep(0.05)
                load.is_ending = True
                await asyncio.gather(*clients)
                return load, await script.list_all(http, load.url)

        load, listed = asyncio.run(drive())
    assert load.answers["429"] > 0
    assert set(load.answers) == {"200", "429"}
    assert (
        script.broken_promises(load.asked, listed, SimpleNamespace(data=tmp_path / "data", scratch=tmp_path / "x"))
        == []
    )
    assert len({one.id for one in load.asked}) == len(load.asked) == len(listed) >= 3
    assert all(one.latency for one in load.asked)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_no_job_is_lost_or_done_twice_though_the_server_is_killed(tmp_path: Path) -> None:
    # The shipped bundle: vLLM's attention on CPUs has no kernel for the tiny one's heads.
    command = [sys.executable, str(SCRIPT), "--clients", "5", "--seconds", "20", "--kills", "2"]
    command += ["--output", str(tmp_path / "report.json")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    load = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))["load"]
    assert load["completed"] >= 5
    assert len(load["start_seconds"]) == 3
