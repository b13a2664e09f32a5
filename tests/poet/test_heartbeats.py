"""A process that is lost is noticed, named, and not waited for."""

import os
import time
from pathlib import Path

import pytest

from poet.errors import CheckpointError
from poet.training.heartbeats import Heartbeats


def heart(directory: Path, rank: int, said: list[str] | None = None) -> Heartbeats:
    messages = [] if said is None else said
    return Heartbeats(directory, rank, 3, interval=0.05, patience=0.6, give_up=messages.append)


def test_a_process_that_waits_is_told_of_one_that_fell_silent(tmp_path: Path) -> None:
    said: list[str] = []
    with heart(tmp_path, 0, said).beating(), heart(tmp_path, 2).beating():
        (tmp_path / "rank-00001").write_text("elsewhere 4321")
        deadline = time.monotonic() + 10
        while not said and time.monotonic() < deadline:
            time.sleep(0.02)
    assert "rank 1 (process 4321 on elsewhere) was lost. Rank 0 ends too" in said[0]
    assert "rank 2" not in said[0]


def test_a_failed_exchange_names_who_is_gone(tmp_path: Path) -> None:
    with (
        heart(tmp_path, 2).beating(),
        pytest.raises(CheckpointError, match=r"rank 1 .* was lost"),
        heart(tmp_path, 0).beating(),
    ):
        (tmp_path / "rank-00001").write_text("elsewhere 4321")
        raise RuntimeError("Connection closed by peer [127.0.0.1]:1234")


def test_a_process_that_beat_once_before_this_one_began_is_missed_as_well(tmp_path: Path) -> None:
    """It was quicker to begin, and gone before its second beat; they had met in between."""
    other = tmp_path / "rank-00001"

    def meet() -> None:
        other.write_text("elsewhere 4321")
        os.utime(other, (time.time() - 0.3, time.time() - 0.3))

    met = Heartbeats(tmp_path, 0, 3, interval=0.05, patience=60, meet=meet)
    with pytest.raises(CheckpointError, match=r"rank 1 .* was lost"), met.beating():
        raise RuntimeError("Connection closed by peer [127.0.0.1]:1234")
    strangers = heart(tmp_path, 0)  # who have not met take it for an earlier run's
    with pytest.raises(RuntimeError, match="closed by peer"), strangers.beating():
        raise RuntimeError("Connection closed by peer [127.0.0.1]:1234")


def test_so_does_an_exchange_that_failed_while_saving(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"rank 1 .* was lost"), heart(tmp_path, 0).beating():
        (tmp_path / "rank-00001").write_text("elsewhere 4321")
        raise CheckpointError("a checkpoint cannot be written: Connection reset by peer")


def test_other_errors_are_left_as_they_are(tmp_path: Path) -> None:
    with heart(tmp_path, 1).beating():
        with pytest.raises(RuntimeError, match="a defect"), heart(tmp_path, 0).beating():
            raise RuntimeError("a defect")
        with pytest.raises(KeyError), heart(tmp_path, 2).beating():
            raise KeyError("x")


def test_a_process_that_ended_well_leaves_no_file_and_is_not_missed(tmp_path: Path) -> None:
    said: list[str] = []
    with heart(tmp_path, 0, said).beating():
        with heart(tmp_path, 1).beating():
            time.sleep(0.2)
        time.sleep(1.0)
    assert said == []
    assert list(tmp_path.iterdir()) == []


def test_clocks_need_not_agree(tmp_path: Path) -> None:
    """Only times that the file system gave are compared, so an old clock of this machine changes nothing."""
    said: list[str] = []
    with heart(tmp_path, 0, said).beating():
        for _ in range(20):
            (tmp_path / "rank-00001").write_text("elsewhere 4321")
            ahead = (tmp_path / "rank-00000").stat().st_mtime + 0.3
            os.utime(tmp_path / "rank-00001", (ahead, ahead))
            time.sleep(0.05)
    assert said == []


def test_what_a_run_that_was_killed_left_behind_is_not_missed(tmp_path: Path) -> None:
    (tmp_path / "rank-00001").write_text("elsewhere 4321")
    os.utime(tmp_path / "rank-00001", (1e9, 1e9))
    said: list[str] = []
    with heart(tmp_path, 0, said).beating():
        time.sleep(1.0)
    assert said == []
