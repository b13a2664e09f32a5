"""A rehearsal of two machines: two launchers' worth of environment, two addresses, and one of them is switched off."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from poet.testing import tiny_recipe

SECONDS = 30  # in which the other host must have ended; it notices within three beats of two seconds


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_recipe(
        tmp_path_factory.mktemp("recipe"),
        num_steps=400,
        batch_size=4,
        parallel={"tensor_parallel_size": 2},
        loop={"log_every": 1, "validate_every": 400, "checkpoint_seconds": 0.5},
    )


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def start(recipe: Path, run: Path, rank: int, port: int, *overrides: str) -> subprocess.Popen[str]:
    """What a launcher does on host `rank`: its own address, one process, the first host's address to meet at."""
    environment = os.environ | {
        "RANK": str(rank),
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "GLOO_SOCKET_IFNAME": "lo",
        "HOSTNAME": f"host-{rank}",
    }
    command = [sys.executable, "-m", "poet.cli.main", "train", str(recipe), "-o", str(run), *overrides]
    return subprocess.Popen(command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def steps(run: Path) -> list[int]:
    file = run / "metrics.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    return [json.loads(line)["step"] for line in lines if '"loss"' in line]


@pytest.mark.parametrize("killed", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_when_one_host_is_lost_the_other_ends_and_names_it_and_a_restart_goes_on(
    recipe: Path, tmp_path: Path, killed: int
) -> None:
    port = free_port()
    hosts = [start(recipe, tmp_path, rank, port) for rank in range(2)]
    try:
        deadline = time.monotonic() + 120
        while not list(tmp_path.glob("checkpoints/step-????????")) and time.monotonic() < deadline:
            assert all(host.poll() is None for host in hosts), hosts[0].communicate()[1] + hosts[1].communicate()[1]
            time.sleep(0.1)
        hosts[killed].send_signal(signal.SIGKILL)
        lost_at = time.monotonic()
        _, said = hosts[1 - killed].communicate(timeout=SECONDS)
    finally:
        for host in hosts:
            host.kill()
    print(f"the other host ended {time.monotonic() - lost_at:.1f} s later")
    assert hosts[1 - killed].returncode == 1
    assert f"rank {killed} (process {hosts[killed].pid} on " in said
    assert "Start the same command again on all machines" in said

    reached = steps(tmp_path)[-1]
    port = free_port()
    again = [start(recipe, tmp_path, rank, port, "--set", f"num_steps={400}") for rank in range(2)]
    try:
        deadline = time.monotonic() + 120
        while steps(tmp_path)[-1] <= reached and time.monotonic() < deadline:
            assert all(host.poll() is None for host in again), again[0].communicate()[1]
            time.sleep(0.1)
        for host in again:
            host.send_signal(signal.SIGTERM)
        assert [host.wait(timeout=60) for host in again] == [0, 0]
    finally:
        for host in again:
            host.kill()
            host.communicate()
    assert steps(tmp_path) == list(range(1, steps(tmp_path)[-1] + 1))
