"""A `poet serve` of one's own for the benchmark scripts beside this file: started, watched, killed and started again.

Knows processes, their memory and what is left of them; it does not know what a server is asked.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import psutil

__all__ = ["ServerProcess", "free_port"]

MIB: Final = 2**20
END_SECONDS: Final = 15.0  # in which all processes of a server that was killed must be gone


def free_port() -> int:
    """A port of this machine that nobody listens on just now."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port: int = listening.getsockname()[1]
    return port


class ServerProcess:
    """One server on one directory, which may be started again after its end.

    A thread looks at the server and all its descendants once a second.

    Args:
        folder: of what the server keeps ("data"), its temporary files ("tmp") and its log ("server.log").
        arguments: of `poet serve`, besides the directory, address and port.

    Attributes:
        memory: (Unix seconds, MiB of all processes together) for each second that it ran; shared pages are divided
            among those that share them (PSS).
        cpu_seconds: that all processes have used, of every start.
    """

    def __init__(self, folder: Path, arguments: Sequence[str]) -> None:
        self.folder, self.data, self.scratch = folder, folder / "data", folder / "tmp"
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.memory: list[tuple[float, float]] = []
        self._arguments = list(arguments)
        self._process: subprocess.Popen[bytes] | None = None
        self._family: dict[tuple[int, float], float] = {}  # CPU seconds by process id and time of birth
        self._done = threading.Event()
        self._watcher = threading.Thread(target=self._watch, daemon=True)

    @property
    def cpu_seconds(self) -> float:
        """See the class."""
        return sum(self._family.values())

    def start(self, seconds: float) -> float:
        """Start the server and wait until it answers.

        Args:
            seconds: to wait at most.

        Returns:
            Seconds that it took.

        Raises:
            SystemExit: it ended, or did not answer in time.
        """
        self.scratch.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "poet.cli.main", "serve", "--data", str(self.data), "--port", str(self.port)]
        begun = time.monotonic()
        with (self.folder / "server.log").open("ab") as log:
            self._process = subprocess.Popen(
                [*command, *self._arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=os.environ | {"TMPDIR": str(self.scratch)},
                start_new_session=True,  # Ctrl-C is for the script, which ends the server itself
            )
        if not self._watcher.is_alive():
            self._watcher.start()
        while not self._answers():
            self.check()
            if time.monotonic() - begun > seconds:
                sys.exit(f"the server did not answer within {seconds:g} seconds. {self._log_tail()}")
            time.sleep(0.2)
        return time.monotonic() - begun

    def check(self) -> None:
        """See that the server runs.

        Raises:
            SystemExit: it has ended.
        """
        assert self._process is not None
        if self._process.poll() is not None:
            sys.exit(f"the server ended by itself with status {self._process.returncode}. {self._log_tail()}")

    def _log_tail(self) -> str:
        log = (self.folder / "server.log").read_text(encoding="utf-8", errors="replace")
        return f"Its log ends:\n{log[-3000:]}"

    def kill(self) -> list[str]:
        """End the main process as `kill -9` does, and wait for the others to end by themselves.

        Returns:
            Command lines of those that did not; they are killed then.
        """
        assert self._process is not None
        self._look()
        self._process.kill()
        self._process.wait()
        return self._left()

    def stop(self) -> tuple[int | None, list[str]]:
        """Ask the server to end.

        Returns:
            Its exit status (None: it had to be killed), and command lines of processes that it left.
        """
        assert self._process is not None
        self._done.set()
        self._watcher.join()
        if self._process.poll() is None:
            self._look()
            self._process.terminate()
        try:
            status: int | None = self._process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            status = None
            self._process.kill()
            self._process.wait()
        return status, self._left()

    def _answers(self) -> bool:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=5)  # which knows no proxies
        try:
            connection.request("GET", "/health")
            return connection.getresponse().status == 200
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()

    def _watch(self) -> None:
        while not self._done.wait(1.0):
            self._look()

    def _look(self) -> None:
        """Measure every process of the server that runs just now."""
        if self._process is None or self._process.poll() is not None:
            return
        total = 0.0
        with contextlib.suppress(psutil.NoSuchProcess):
            main = psutil.Process(self._process.pid)
            for process in [main, *main.children(recursive=True)]:
                with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                    times = process.cpu_times()
                    self._family[process.pid, process.create_time()] = times.user + times.system
                    total += process.memory_full_info().pss / MIB
        self.memory.append((time.time(), total))

    def _left(self) -> list[str]:
        """Processes of the server that are still there after a while; they are killed."""
        ends = time.monotonic() + END_SECONDS
        while (left := self._alive()) and time.monotonic() < ends:
            time.sleep(0.2)
        names = []
        for process in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                names.append(" ".join(process.cmdline())[:200])
                process.send_signal(signal.SIGKILL)
        return names

    def _alive(self) -> list[psutil.Process]:
        found = []
        for pid, born in self._family:
            with contextlib.suppress(psutil.NoSuchProcess):
                process = psutil.Process(pid)
                if process.create_time() == born and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found
