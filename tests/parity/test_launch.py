"""`poet train --nproc`: what cannot be trained is refused before a process starts; signals save; none is left alone."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from poet.cli.main import main
from poet.errors import ConfigError
from poet.testing import tiny_recipe
from poet.training.processes import alone_in

STEPS = 20_000


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    loop = {"log_every": 1, "validate_every": STEPS, "checkpoint_seconds": 1}
    return tiny_recipe(tmp_path_factory.mktemp("recipe"), num_steps=STEPS, batch_size=4, loop=loop)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--device", "tpu"), "device must be cpu, cuda"),
        (("--nproc", "3"), "batch_size must be a multiple of the 3 data-parallel processes"),
        (("--set", "parallel.tensor_parallel_size=4"), "multiple of tensor_parallel_size * pipeline_parallel_size = 4"),
        (("--set", "parallel.pipeline_parallel_size=2", "--set", "model.num_layers=3"), "layers must be shared evenly"),
        (("--set", "optimizer=muon"), "optimizer must be 'adamw' with Megatron"),
        (("--set", "shards=nowhere"), "nowhere"),
        (("--set", "bundle=nowhere"), "there is no bundle at nowhere"),
        (("--set", "train=text_tokenizer"), "recipe of 'language' only"),
        (("--set", "loop.log_evry=2"), "log_evry"),
    ],
)
def test_what_cannot_be_trained_is_refused_in_one_line_before_anything_starts(
    recipe: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    options: tuple[str, ...],
    words: str,
) -> None:
    def refuse(*_: object) -> int:
        raise AssertionError("processes were started")

    monkeypatch.setattr("poet.training.launch.launch", refuse)
    nproc = () if "--nproc" in options else ("--nproc", "2")
    assert main(["train", str(recipe), "-o", str(tmp_path / "run"), *nproc, *options]) == 1
    said = capsys.readouterr().err
    assert words in said
    assert len(said.strip().splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_what_every_process_is_asked_is_what_the_command_was(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    monkeypatch.setattr("poet.training.launch.launch", lambda *arguments: asked.append(arguments) or 0)
    run = str(tmp_path / "run")
    assert main(["train", str(recipe), "-o", run, "--nproc", "2", "--set", "seed=4", "--set", "batch_size=8"]) == 0
    [(module, arguments, processes)] = asked
    assert (module, processes) == ("poet.cli.main", 2)
    assert arguments == [
        "train", str(recipe), "--device", "cpu", "-o", run, "--set", "seed=4", "--set", "batch_size=8"
    ]  # fmt: skip


def test_a_run_that_is_refused_has_changed_nothing(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert main(["train", str(recipe), "-o", str(run), "--set", "num_steps=1"]) == 0
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    capsys.readouterr()
    with alone_in(run):
        assert main(["train", str(recipe), "-o", str(run), "--set", "num_steps=9"]) == 1
    assert "in use by another process" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_a_directory_has_one_run_at_a_time(tmp_path: Path) -> None:
    refused = pytest.raises(ConfigError, match="in use by another process")
    with alone_in(tmp_path), refused, alone_in(tmp_path):
        raise AssertionError("two runs in one directory")
    with alone_in(tmp_path):
        pass


def test_a_fork_does_not_keep_the_lock_of_a_run_that_is_gone(tmp_path: Path) -> None:
    (told, tell), (waiting, go_on) = os.pipe(), os.pipe()
    with alone_in(tmp_path):
        child = os.fork()
        if child == 0:
            os.close(go_on)
            os.write(tell, b"here")
            os.read(waiting, 1)  # until the parent closes its end
            os._exit(0)
        assert os.read(told, 4) == b"here"
    try:
        with alone_in(tmp_path):
            pass
    finally:
        for end in (told, tell, waiting, go_on):
            os.close(end)
        os.waitpid(child, 0)


def start(recipe: Path, run: Path) -> subprocess.Popen[str]:
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    command = [sys.executable, "-m", "poet.cli.main", "train", str(recipe), "-o", str(run), "--nproc", "2"]
    return subprocess.Popen(command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def steps(run: Path) -> list[int]:
    file = run / "metrics.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    return [json.loads(line)["step"] for line in lines if '"loss"' in line]


def wait_for(condition: Callable[[], bool], seconds: float, launcher: subprocess.Popen[str] | None = None) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert launcher is None or launcher.poll() is None, launcher.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.1)


def children_of(process: int) -> list[int]:
    found = Path(f"/proc/{process}/task/{process}/children")
    return [int(child) for child in found.read_text().split()] if found.exists() else []


def is_there(process: int) -> bool:
    stat = Path(f"/proc/{process}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_signal_saves_and_a_killed_launcher_takes_its_processes_along(recipe: Path, tmp_path: Path) -> None:
    launcher = start(recipe, tmp_path)
    workers: list[int] = []
    try:
        wait_for(lambda: len(steps(tmp_path)) > 0, 180, launcher)
        recipe_of_the_run = (tmp_path / "recipe.yaml").read_text()
        for other in ((), ("--set", "num_steps=3"), ("--set", "num_steps=3", "--nproc", "2")):
            assert main(["train", str(recipe), "-o", str(tmp_path), *other]) != 0  # it is being trained in
        assert (tmp_path / "recipe.yaml").read_text() == recipe_of_the_run
        launcher.send_signal(signal.SIGTERM)
        _, said = launcher.communicate(timeout=120)
        assert launcher.returncode == 128 + signal.SIGTERM
        assert "stopped by a signal; the same command goes on" in said
        assert "Traceback" not in said
        reached = steps(tmp_path)[-1]
        assert (tmp_path / "checkpoints" / f"step-{reached:08d}").is_dir()

        launcher = start(recipe, tmp_path)
        wait_for(lambda: steps(tmp_path)[-1] > reached, 180, launcher)
        workers = children_of(launcher.pid)
        assert len(workers) >= 2
        launcher.kill()
        _, said = launcher.communicate()
        wait_for(lambda: not any(map(is_there, workers)), 60)
    finally:
        launcher.kill()
        for worker in workers:
            if is_there(worker):
                os.kill(worker, signal.SIGKILL)
    # What they saved when they were told that they were alone is where the run goes on.
    last = steps(tmp_path)[-1]
    assert (tmp_path / "checkpoints" / f"step-{last:08d}").is_dir(), said
    assert steps(tmp_path) == list(range(1, last + 1))
