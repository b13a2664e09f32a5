"""Notices when another process of a run is lost, and says which one.

A process that dies lets the others fail with the name of a socket, or wait for ever in an exchange that will not come.
Here every process touches a file of its own every few seconds, on the file system that they share anyway, and looks at
the others'. Times are compared as that file system gives them, so clocks may differ. Knows ranks and files only.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from poet.errors import CheckpointError

__all__ = ["Heartbeats"]


class Heartbeats:
    """Beats for one process and listens to the others.

    Args:
        directory: of the files, seen by all processes; those of an earlier run in it do no harm.
        rank: of this process.
        world_size: processes in all.
        interval: seconds between two beats.
        patience: seconds after which a process that was heard of and is silent counts as lost.
        give_up: called with the message when a process is lost while this one waits; ends the process at once, since
            the thread that waits cannot be woken.
        meet: called after the first beat; returns when every process has had its own. From then on every file is of
            this run. None: a file that is older than this process's first beat counts as an earlier run's.
    """

    def __init__(
        self,
        directory: Path,
        rank: int,
        world_size: int,
        *,
        interval: float = 2.0,
        patience: float = 30.0,
        give_up: Callable[[str], None] | None = None,
        meet: Callable[[], object] | None = None,
    ) -> None:
        self.directory, self.rank, self.world_size = directory, rank, world_size
        self.interval, self.patience = interval, patience
        self._give_up = _end if give_up is None else give_up
        self._meet = meet
        self._all_have_beaten = False
        self._begun = 0.0
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="heartbeats", daemon=True)

    @contextlib.contextmanager
    def beating(self) -> Iterator[None]:
        """Beat while the context is open; turn a failed exchange with a lost process into an error that names it.

        Raises:
            CheckpointError: an exchange failed because another process is gone.
        """
        self.directory.mkdir(parents=True, exist_ok=True)
        self._touch()
        self._begun = self._file(self.rank).stat().st_mtime
        if self._meet is not None:
            self._meet()
            self._all_have_beaten = True
        self._thread.start()
        try:
            yield
        # What gloo and NCCL raise, PyTorch's DistBackendError included; and what became of it while saving.
        except (RuntimeError, CheckpointError) as error:
            lost = self.wait_for_lost() if self.world_size > 1 else []
            if not lost:
                raise
            raise CheckpointError(self._describe(lost)) from error
        finally:
            self._stopped.set()
            self._thread.join()
            self._file(self.rank).unlink(missing_ok=True)

    def wait_for_lost(self) -> list[int]:
        """Ranks that fall silent within some beats from now: those that died a moment ago."""
        silence = 3 * self.interval
        deadline = time.monotonic() + 2 * silence
        while time.monotonic() < deadline:
            lost = self._silent_for(silence)
            if lost:
                return lost
            time.sleep(self.interval / 4)
        return []

    def _beat(self) -> None:
        while not self._stopped.wait(self.interval):
            with contextlib.suppress(OSError):  # a full disk must not end the run here: saving will say so
                self._touch()
                lost = self._silent_for(self.patience)
                if lost and not self._stopped.is_set():
                    self._give_up(self._describe(lost))

    def _touch(self) -> None:
        self._file(self.rank).write_text(f"{socket.gethostname()} {os.getpid()}", encoding="utf-8")

    def _silent_for(self, seconds: float) -> list[int]:
        """Ranks whose last beat is that much older than this process's own; those not heard of yet do not count."""
        own = self._file(self.rank).stat().st_mtime
        lost = []
        for rank in range(self.world_size):
            with contextlib.suppress(FileNotFoundError):
                last = self._file(rank).stat().st_mtime
                # What an earlier run left behind is older than this one's beginning, but so is the first beat of a
                # process that was quicker to begin than this one.
                if rank != self.rank and (self._all_have_beaten or last >= self._begun) and own - last > seconds:
                    lost.append(rank)
        return lost

    def _describe(self, lost: list[int]) -> str:
        names = []
        for rank in lost:
            with contextlib.suppress(OSError):
                host, process = self._file(rank).read_text(encoding="utf-8").split()
                names.append(f"rank {rank} (process {process} on {host})")
                continue
            names.append(f"rank {rank}")
        return (
            f"all {self.world_size} processes must stay until the end, but {', '.join(names)} was lost. "
            f"Rank {self.rank} ends too; the last whole checkpoint is kept. Start the same command again on all "
            "machines to go on."
        )

    def _file(self, rank: int) -> Path:
        return self.directory / f"rank-{rank:05d}"


def _end(message: str) -> None:
    sys.stderr.write(f"poet: {message}\n")
    sys.stderr.flush()
    os._exit(1)
