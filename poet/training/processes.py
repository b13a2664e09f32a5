"""What keeps processes of a run apart and together: one run in a directory, and none without its parent.

Knows processes and files, not what runs.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from poet.errors import ConfigError

__all__ = ["alone_in", "end_with_parent", "follow_parent"]

_SET_PARENT_DEATH_SIGNAL: Final = 1  # prctl's PR_SET_PDEATHSIG
_LOCKS: Final[set[int]] = set()


@contextmanager
def alone_in(directory: Path) -> Iterator[None]:
    """Keep other runs out of a directory for as long as this process lives, however it ends.

    A file system without locks keeps nobody out.

    Raises:
        ConfigError: another run is in it.
    """
    lock = os.open(directory, os.O_RDONLY)
    _LOCKS.add(lock)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EACCES):
                raise ConfigError(
                    f"{directory} is in use by another process. Wait for it or stop it, or name another "
                    "directory with -o."
                ) from error
        yield
    finally:
        if lock in _LOCKS:  # not in a fork, which has closed it already
            _LOCKS.remove(lock)
            os.close(lock)


def _forget_locks() -> None:
    """In a fork: whoever writes a checkpoint behind the training must not hold the lock of a run that was killed."""
    for lock in _LOCKS:
        os.close(lock)
    _LOCKS.clear()


os.register_at_fork(after_in_child=_forget_locks)


def end_with_parent(parent: int, number: signal.Signals) -> None:
    """Ask for a signal to this process when its parent is gone, however that ended. Linux alone; elsewhere nothing.

    The signal may come several times; take one that ends the process.

    Args:
        parent: its process id; if it is gone already, the signal comes at once.
        number: the signal.
    """
    if not sys.platform.startswith("linux"):
        return
    ctypes.CDLL(None).prctl(_SET_PARENT_DEATH_SIGNAL, number)
    if os.getppid() != parent:
        os.kill(os.getpid(), number)


def follow_parent(parent: int, number: signal.Signals, interval: float = 0.5) -> None:
    """Send this process a signal, once, when its parent is gone, however that ended.

    A thread looks. A signal that has been caught and is caught no longer is not sent: the run that caught it has ended,
    perhaps because another of its processes was told first, and is on its way out.

    Args:
        parent: its process id.
        number: the signal.
        interval: seconds between two looks.
    """

    def watch() -> None:
        was_caught = False
        while os.getppid() == parent:
            was_caught |= signal.getsignal(number) is not signal.SIG_DFL
            time.sleep(interval)
        if not was_caught or signal.getsignal(number) is not signal.SIG_DFL:
            os.kill(os.getpid(), number)

    threading.Thread(target=watch, name="parent", daemon=True).start()
