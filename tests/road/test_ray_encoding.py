"""A Ray cluster looks through and encodes what one machine would, to the last byte."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

# Before Ray is imported: it writes no reports, and nodes of this machine find each other by 127.0.0.1.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")

from poet.cli.main import main
from poet.data import ray_cluster
from poet.data.ray_tasks import RayTasks
from poet.data.shards import open_shards
from poet.errors import ConfigError
from poet.media import Clip, write_clip
from poet.testing import tiny_tokenizer_bundle

FPS, H, W, RATE = 8.0, 24, 40, 8000
FOOTAGE = ("--split", "shots", "--drop", "black,duplicate")


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """Two nodes of a core each on this machine, to which this process is connected; the address of the first."""
    ray = pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    # Not under tmp_path: the paths of unix sockets end at 107 bytes, of which Ray takes 65.
    directory = Path(tempfile.mkdtemp(prefix="ray-"))
    (directory / "ray").mkdir()
    changed = dict.fromkeys(("RAY_TMPDIR", "TMPDIR"), str(directory)) | {"RAY_enable_worker_prestart": "0"}
    before = {name: os.environ.get(name) for name in changed}
    os.environ |= changed
    made: Any = None
    try:
        common = {"node_ip_address": "127.0.0.1", "include_log_monitor": False}
        head = {"num_cpus": 1, "include_dashboard": False, "no_monitor": True}
        made = Cluster(initialize_head=True, head_node_args=head | common)
        made.add_node(num_cpus=1, **common)
        ray.init(made.address, log_to_driver=False, logging_level="ERROR")
        yield made.address
    finally:
        ray.shutdown()
        if made is not None:
            made.shutdown()
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.__setitem__(name, value)
        shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_tokenizer_bundle(tmp_path_factory.mktemp("bundle") / "tiny").path


@pytest.fixture(scope="module")
def films(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("films")
    for number in range(11):
        rng = np.random.default_rng(number % 9)  # the last two are duplicates
        shots = [rng.integers(30, 250, (1, H, W, 3)) + np.zeros((9, 1, 1, 1), np.int64) for _ in range(3)]
        frames = np.minimum(np.concatenate(shots) + np.arange(27).reshape(-1, 1, 1, 1) * 2, 255).astype(np.uint8)
        samples = rng.uniform(-0.4, 0.4, round(27 / FPS * RATE)).astype(np.float32)
        write_clip(Clip(frames=frames, fps=FPS, samples=samples, sample_rate=RATE), folder / f"{number:02d}.mp4")
    (folder / "05.mp4").write_bytes(b"not a film")
    (folder / "00.txt").write_text("noise")
    return folder


def encode(films: Path, output: Path, bundle: Path, *more: object) -> list[str]:
    options = ["--model", bundle, "--shard-size", 3, "--json", *more]
    return [str(part) for part in ("encode", films, "-o", output, *options)]


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("options", [FOOTAGE, ()], ids=["scenes", "beginnings"])
def test_a_cluster_writes_the_shards_that_one_machine_writes(
    cluster: str, films: Path, bundle: Path, tmp_path: Path, options: tuple[str, ...]
) -> None:
    assert main(encode(films, tmp_path / "one", bundle, *options)) == 0
    assert main(encode(films, tmp_path / "many", bundle, *options, "--ray", cluster)) == 0
    one, many = contents(tmp_path / "one"), contents(tmp_path / "many")
    assert len([name for name in one if name.endswith(".parquet")]) > 3
    assert many == one
    # What is finished needs no cluster.
    assert main(encode(films, tmp_path / "many", bundle, *options, "--ray", "127.0.0.1:1")) == 0
    assert contents(tmp_path / "many") == one


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_killed_driver_goes_on_with_or_without_the_cluster(
    cluster: str, films: Path, bundle: Path, tmp_path: Path
) -> None:
    assert main(encode(films, tmp_path / "one", bundle, *FOOTAGE)) == 0
    command = [sys.executable, "-m", "poet.cli.main"]
    command += encode(films, tmp_path / "many", bundle, *FOOTAGE, "--ray", cluster)
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and not (tmp_path / "many" / "shard-000001.parquet").exists():
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert process.returncode == -signal.SIGKILL
    # The second file may have been there before the manifest named it.
    assert len(open_shards(tmp_path / "many", None, allow_incomplete=True)) >= 3
    assert main(encode(films, tmp_path / "many", bundle, *FOOTAGE)) == 0
    assert contents(tmp_path / "many") == contents(tmp_path / "one")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_another_bundle_on_a_machine_and_too_few_cores_are_said(
    cluster: str, films: Path, bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(encode(films, tmp_path / "many", bundle, *FOOTAGE, "--ray", cluster, "--ray-cpus", 5)) == 1
    assert "5 cores" in capsys.readouterr().err
    from poet.data.clips import FolderSource

    source = FolderSource(films, fps=FPS, height=H, width=W, num_frames=5, sample_rate=RATE)
    encoding = RayTasks(address=cluster).encoding(bundle, "another")
    with pytest.raises(ConfigError, match="another one"):
        next(encoding(source, [range(2)], 2))


def test_a_cluster_that_is_not_there_is_told_in_one_line(
    films: Path,
    bundle: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ray = pytest.importorskip("ray")
    monkeypatch.setattr(ray, "is_initialized", lambda: False)  # whatever other tests left connected
    monkeypatch.setattr(ray_cluster, "SECONDS_TO_CONNECT", 3)
    assert main(encode(films, tmp_path / "many", bundle, "--ray", "127.0.0.1:1")) == 1
    err = capsys.readouterr().err
    assert "cannot be reached" in err
    assert "Traceback" not in err
    assert main(encode(films, tmp_path / "many", bundle, "--ray", "local", "--device", "cuda")) == 1
    assert "--ray encodes on CPUs" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r"openpoet\[distributed\]"):
        RayTasks(address="local")
    with pytest.raises(ConfigError, match="at least one core"):
        RayTasks(address="local", num_cpus=0)
