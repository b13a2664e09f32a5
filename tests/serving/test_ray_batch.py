"""`poet batch --ray`: what one machine would write, from many; a machine that goes takes nothing with it.

The tests that start a cluster are marked slow: a node is some ten processes, and each imports for seconds.
"""

import contextlib
import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

# Before Ray is imported: it writes no reports, and nodes of this machine find each other by 127.0.0.1.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")

from poet.bundle import Bundle
from poet.cli.main import main
from poet.data import ray_cluster
from poet.errors import CheckpointError, ConfigError, PoetError
from poet.generation.engine import TorchEngine
from poet.generation.pipeline import Pipeline
from poet.media import Clip, read_clip, write_clip
from poet.model.lora import read_adapter
from poet.testing import save_adapter, tiny_bundle
from poet_serving import ray_batch
from poet_serving.batch import BatchSummary, run_batch
from poet_serving.ray_batch import BlockWriter, EngineStart, run_ray_batch


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return tiny_bundle(tmp_path_factory.mktemp("made") / "tiny", config={"head_dim": 32})  # which vLLM takes


def write(directory: Path, *lines: Any) -> Path:
    file = directory / "jobs.jsonl"
    file.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return file


def job(name: str, **body: Any) -> dict[str, Any]:
    return {"custom_id": name, "method": "POST", "url": "/v1/videos", "body": {"prompt": "a red star", **body}}


def mixed_lines(directory: Path) -> list[Any]:
    """Requests of many kinds, whose answers are the same in every run, and lines that are none."""
    frames = np.random.default_rng(0).integers(0, 255, (1, 30, 50, 3), dtype=np.uint8)
    write_clip(Clip(frames=frames, fps=8.0, samples=None, sample_rate=1600), directory / "photo.png")
    (directory / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(50))
    return [
        *(job(f"job {number}", seed=number) for number in range(7)),
        job("moving", seed=1, input_reference={"path": "photo.png"}),
        job("sound", seed=2, task="text_to_audio"),
        job("still", seed=3, task="text_to_image"),
        "{",
        job("unknown", colour="red"),
        job("damaged", input_reference={"path": "broken.png"}),
        job("missing", input_reference={"path": "nowhere.png"}),
        job("wrong inputs", task="audio_to_video"),
        job("job 1"),
    ]


def results(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "results.jsonl").read_text().splitlines()]


def contents(output: Path) -> dict[str, Any]:
    """What was answered to each line, without when and by whom."""
    found = {}
    for result in results(output):
        body = result["response"]["body"]
        file = hashlib.sha256((output / body["file"]).read_bytes()).hexdigest() if "file" in body else None
        left_out = {"created_at", "completed_at"}
        kept = {name: value for name, value in body.items() if name not in left_out}
        if "error" in body:
            kept = {name: body["error"][name] for name in ("code", "param", "type")}
        found[result["poet"]["key"]] = (result["response"]["status_code"], result["id"], kept, file)
    assert len(found) == len(results(output))
    return found


def expected(jobs: Path, bundle: Bundle, output: Path) -> dict[str, Any]:
    """The answers of one engine in this process."""
    with TorchEngine(bundle.path, max_batch_size=2) as engine:
        run_batch(jobs, bundle, output, lambda decodings: contextlib.nullcontext(Pipeline(bundle, engine)))
    return contents(output)


class Machines:
    """In Ray's place: blocks written in this process, some of which are lost."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.sizes: list[int] = []
        self.connected = 0
        self.lost: Callable[[dict[str, Any]], bool] = lambda row: False
        monkeypatch.setattr(ray_batch, "_node", lambda: "here")
        monkeypatch.setattr(ray_batch, "connected", self._connect)
        monkeypatch.setattr(ray_batch, "_answered", self._answered)

    def _connect(self, ray: Any, address: str) -> Any:
        self.connected += 1
        return contextlib.nullcontext()

    def _answered(self, ray: Any, tasks: Collection[Any], settings: EngineStart, cpus: Any, most: int) -> Any:
        import pyarrow

        rows = [task.row() for task in tasks]
        self.sizes.append(most)
        writer = BlockWriter(settings)
        for start in range(0, len(rows), most):
            block = rows[start : start + most]
            if any(self.lost(json.loads(row["request"])[0]) for row in block):
                continue
            for table in writer(pyarrow.Table.from_pylist(block)):
                yield from table.to_pylist()


@pytest.fixture
def machines(monkeypatch: pytest.MonkeyPatch) -> Machines:
    return Machines(monkeypatch)


def run(jobs: Path, bundle: Bundle, output: Path, **options: Any) -> BatchSummary:
    return run_ray_batch(jobs, bundle, output, **{"address": "auto", "engine": "torch", "batch_size": 2} | options)


def test_blocks_give_what_one_process_gives(machines: Machines, bundle: Bundle, tmp_path: Path) -> None:
    jobs = write(tmp_path, *mixed_lines(tmp_path))
    seen: list[tuple[int, int, int]] = []
    summary = run(jobs, bundle, tmp_path / "out", progress=lambda *told: seen.append(told))
    assert (summary.completed, summary.failed, summary.before) == (10, 6, 0)
    assert contents(tmp_path / "out") == expected(jobs, bundle, tmp_path / "alone")
    assert seen[-1] == (16, 16, 16)
    assert {one["poet"].get("node") for one in results(tmp_path / "out")} == {"here", None}  # None: seen by the driver
    again = run(jobs, bundle, tmp_path / "out")
    assert (again.completed, again.failed, again.before, machines.connected) == (10, 6, 16, 1)
    names = sorted(path.name for path in (tmp_path / "out" / "media").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "alone" / "media").iterdir())


def test_an_answer_comes_in_the_order_of_its_block(
    machines: Machines, bundle: Bundle, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    stream = Pipeline.stream
    monkeypatch.setattr(Pipeline, "stream", lambda self, prepared: reversed(list(stream(self, prepared))))
    run(write(tmp_path, *mixed_lines(tmp_path)), bundle, tmp_path / "out", batch_size=8)
    numbers = [one["poet"]["line"] for one in results(tmp_path / "out") if "node" in one["poet"]]
    assert numbers == sorted(numbers)
    assert len(numbers) == 11


def test_what_is_lost_is_asked_for_again_and_in_the_end_alone(
    machines: Machines, bundle: Bundle, tmp_path: Path
) -> None:
    jobs = write(tmp_path, *(job(f"job {number}", seed=number) for number in range(9)))
    machines.lost = lambda request: request["number"] == 4
    with pytest.raises(PoetError, match="1 lines were not answered, the first of them line 4"):
        run(jobs, bundle, tmp_path / "out")
    assert machines.sizes == [4, 2, 1]
    assert sorted(one["poet"]["line"] for one in results(tmp_path / "out")) == [1, 2, 3, 5, 6, 7, 8, 9]
    machines.lost = lambda request: False
    summary = run(jobs, bundle, tmp_path / "out")
    assert (summary.completed, summary.before) == (9, 8)


def test_many_requests_go_out_in_parts(
    machines: Machines, bundle: Bundle, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(ray_batch, "WINDOW_BYTES", 2500)
    jobs = write(tmp_path, *(job(f"job {number}", seed=number) for number in range(7)))
    assert run(jobs, bundle, tmp_path / "out").completed == 7
    assert (len(machines.sizes), machines.connected) == (3, 1)


def test_a_machine_without_the_bundle_or_with_another_says_so(
    machines: Machines, bundle: Bundle, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    jobs = write(tmp_path, job("a"))
    right: dict[str, Any] = {
        "engine": "torch",
        "bundle_dir": str(bundle.path),
        "weights_sha256": bundle.weights_sha256,
        "upsampler_sha256": "",
        "decodings": ("autoregressive",),
        "batch_size": 2,
    }
    with pytest.raises(CheckpointError, match="must have the batch's weights"):
        EngineStart(**{**right, "weights_sha256": "0" * 64}).start()
    with pytest.raises(CheckpointError, match="Every machine must have the batch's bundle at the same path"):
        EngineStart(**{**right, "bundle_dir": str(tmp_path / "nowhere")}).start()
    path = save_adapter(bundle.model_config, tmp_path / "ink")
    adapter = read_adapter(path, bundle.model_config, bundle.fingerprint)
    pipeline = EngineStart(**right, adapters=(adapter,)).start()
    assert list(pipeline.adapters) == ["ink"]
    pipeline.engine.close()
    save_adapter(bundle.model_config, tmp_path / "ink", seed=5)
    with pytest.raises(CheckpointError, match="Copy it to every machine"):
        EngineStart(**right, adapters=(adapter,)).start()
    monkeypatch.setattr(ray_batch, "EngineStart", lambda **told: EngineStart(**{**told, "weights_sha256": "1"}))
    with pytest.raises(ConfigError, match=r"on the machine .*: the bundle .* must have the batch's weights"):
        run(jobs, bundle, tmp_path / "out")
    assert not (tmp_path / "out" / "results.jsonl").exists()


def test_a_cluster_that_is_not_there_is_an_error_in_one_line(
    bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["batch", str(write(tmp_path, job("a"))), "-o", str(tmp_path / "out"), "--model", str(bundle.path)]
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and does not listen
        closed = f"127.0.0.1:{taken.getsockname()[1]}"
        for address, words in (
            (closed, "cannot be reached"),
            ("nonsense", "auto, local or HOST:PORT"),
            ("127.0.0.1:port", "auto, local or HOST:PORT"),
            ("ray://127.0.0.1:10001", "--ray auto"),
        ):
            begun = time.monotonic()
            assert main([*command, "--ray", address]) == 1
            said = capsys.readouterr().err
            assert words in said
            assert "Traceback" not in said
            assert time.monotonic() - begun < 60
    monkeypatch.setenv("RAY_ADDRESS", "ray://127.0.0.1:10001")
    assert main([*command, "--ray", "auto"]) == 1
    assert "does not run through Ray Client" in capsys.readouterr().err
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        monkeypatch.setattr(ray_cluster, "SECONDS_TO_CONNECT", 3)
        assert main([*command, "--ray", f"127.0.0.1:{silent.getsockname()[1]}"]) == 1
        assert "no answer within 3 s" in capsys.readouterr().err
    assert main([*command, "--ray-cpus", "2"]) == 1
    assert "--ray-cpus is for --ray" in capsys.readouterr().err


def test_without_ray_the_extra_is_named(bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r"Install openpoet\[distributed\]"):
        run(write(tmp_path, job("a")), bundle, tmp_path / "out")


class Nodes:
    """A cluster on this machine: a head that this process is connected to, and others, of one core each."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster

        head = {"num_cpus": 1, "include_dashboard": False, "no_monitor": True}
        common = {"node_ip_address": "127.0.0.1", "include_log_monitor": False}
        self.common = common
        self.cluster = Cluster(initialize_head=True, head_node_args=head | common)
        self.others: list[Any] = []
        self.add()

    def add(self) -> None:
        self.others.append(self.cluster.add_node(num_cpus=1, **self.common))

    def kill(self) -> None:
        self.cluster.remove_node(self.others.pop(), allow_graceful=False)


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    import ray

    # Not under tmp_path: the paths of unix sockets end at 107 bytes, of which Ray takes 65.
    directory = Path(tempfile.mkdtemp(prefix="ray-"))
    (directory / "ray").mkdir()
    # TMPDIR: processes that are killed leave their own files there.
    changed = dict.fromkeys(("RAY_TMPDIR", "TMPDIR"), str(directory))
    changed |= {"RAY_enable_worker_prestart": "0"}
    before = {name: os.environ.get(name) for name in changed}
    os.environ |= changed
    made = None
    try:
        made = Nodes()
        ray.init(made.cluster.address, log_to_driver=False, logging_level="ERROR")
        yield made
    finally:
        ray.shutdown()
        if made is not None:
            made.cluster.shutdown()
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.__setitem__(name, value)
        shutil.rmtree(directory)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_nodes_write_what_one_process_writes(nodes: Nodes, bundle: Bundle, tmp_path: Path) -> None:
    lines = mixed_lines(tmp_path) + [job(f"more {number}", seed=number) for number in range(40)]
    jobs = write(tmp_path, *lines)
    summary = run(jobs, bundle, tmp_path / "out", batch_size=1)
    assert (summary.completed, summary.failed) == (50, 6)
    assert contents(tmp_path / "out") == expected(jobs, bundle, tmp_path / "alone")
    assert len({one["poet"]["node"] for one in results(tmp_path / "out") if "node" in one["poet"]}) == 2
    kept = (tmp_path / "out" / "results.jsonl").read_bytes()
    assert run(jobs, bundle, tmp_path / "out").before == 56
    assert (tmp_path / "out" / "results.jsonl").read_bytes() == kept
    with pytest.raises(ConfigError, match=r"on the machine .*: engine must be one of"):
        run(jobs, bundle, tmp_path / "other", engine="steam")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_driver_that_is_killed_goes_on_where_it_stood(nodes: Nodes, bundle: Bundle, tmp_path: Path) -> None:
    names = [f"job {number}" for number in range(60)]
    jobs = write(tmp_path, *(job(name, seed=number) for number, name in enumerate(names)))
    command = [sys.executable, "-m", "poet.cli.main", "batch", str(jobs), "-o", str(tmp_path / "out"), "--engine"]
    command += ["torch", "--batch-size", "2", "--model", str(bundle.path), "--ray", nodes.cluster.address, "--json"]
    file = tmp_path / "out" / "results.jsonl"
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and (not file.exists() or file.read_bytes().count(b"\n") < 5):
        time.sleep(0.01)
    assert process.poll() is None
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    done = [line for line in file.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]
    assert 5 <= len(done) < 60
    said = subprocess.run(command, check=True, capture_output=True)
    assert json.loads(said.stdout)["answered_before"] == len(done)
    assert f"connecting to Ray ({nodes.cluster.address})" in said.stderr.decode()
    assert b"Traceback" not in said.stderr
    assert file.read_bytes().startswith(b"".join(done))
    assert sorted(one["custom_id"] for one in results(tmp_path / "out")) == sorted(names)
    for one in results(tmp_path / "out"):
        assert read_clip(tmp_path / "out" / one["response"]["body"]["file"]).frames is not None


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_node_that_goes_takes_nothing_with_it(nodes: Nodes, bundle: Bundle, tmp_path: Path) -> None:
    names = [f"job {number}" for number in range(80)]
    jobs = write(tmp_path, *(job(name, seed=number) for number, name in enumerate(names)))
    killed_at = []

    def watch(done: int, count: int, now: int) -> None:
        found = results(tmp_path / "out") if done else []
        if not killed_at and len({one["poet"]["node"] for one in found}) == 2:
            nodes.kill()
            killed_at.append(done)

    try:
        summary = run(jobs, bundle, tmp_path / "out", batch_size=2, progress=watch)
    finally:
        if killed_at:
            nodes.add()
    assert killed_at
    assert killed_at[0] < 70
    assert (summary.completed, summary.failed) == (80, 0)
    assert sorted(one["custom_id"] for one in results(tmp_path / "out")) == sorted(names)
    assert contents(tmp_path / "out") == expected(jobs, bundle, tmp_path / "alone")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_vllm_writes_on_a_node(nodes: Nodes, bundle: Bundle, tmp_path: Path) -> None:
    jobs = write(tmp_path, job("a", seed=1), job("b", seed=2), job("again", seed=1))
    assert run(jobs, bundle, tmp_path / "out", engine="vllm").completed == 3
    ids = {one["custom_id"]: one["response"]["body"]["metadata"]["ids_sha256"] for one in results(tmp_path / "out")}
    assert ids["a"] == ids["again"] != ids["b"]
