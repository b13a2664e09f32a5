"""A Ray cluster as a driver sees it: reached in bounded time or not at all, its errors in one line.

It does not know what is carried out there.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import subprocess
import sys
import urllib.parse
from collections.abc import Iterator
from typing import Any, Final

from poet.errors import ConfigError

__all__ = ["connected", "import_ray", "listening", "reason_behind"]

SECONDS_TO_CONNECT: Final = 60

_DRIVER_ENVIRONMENT: Final = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_BACKEND_LOG_LEVEL": "fatal"}
_PROBE: Final = "import sys, ray; ray.init(address=sys.argv[1], log_to_driver=False, logging_level='ERROR')"


def import_ray() -> Any:
    """Ray, with Ray Data.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        import ray
        import ray.data
        import ray.data.exceptions
    except ImportError as error:
        raise ConfigError(
            f"work on many machines needs Ray, which cannot be imported ({error}). Install openpoet[distributed], "
            "here and on every machine."
        ) from error
    return ray


@contextlib.contextmanager
def connected(ray: Any, address: str) -> Iterator[None]:
    """Be this cluster's driver; a connection that is there is used, and left.

    Args:
        ray: the package.
        address: what `ray.init` takes: "auto", "local", "HOST:PORT".

    Raises:
        ConfigError: the cluster cannot be reached.
    """
    if ray.is_initialized():
        yield
        return
    for name, value in _DRIVER_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if address != "local":
        _check_reachable(address)
    options = {"include_dashboard": False} if address == "local" else {}
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, **options)
    except (OSError, RuntimeError, ValueError) as error:
        raise _unreachable(address, reason_behind(error)) from error
    try:
        yield
    finally:
        ray.shutdown()


def _check_reachable(address: str) -> None:
    """Connect in a process of its own first: towards a wrong address Ray waits for minutes, or ends its process."""
    if address == "auto":
        address = os.environ.get("RAY_ADDRESS") or address
    if address.startswith("ray://"):
        raise ConfigError(
            f"the Ray cluster must be named by HOST:PORT or auto, got {address}: Poet's work does not run through "
            "Ray Client. Run the command on a machine of the cluster, with --ray auto."
        )
    if address != "auto":
        parts = urllib.parse.urlsplit(f"//{address}")
        try:
            host, port = parts.hostname, parts.port
        except ValueError:
            host, port = None, None
        if not host or not port:
            raise ConfigError(f"the Ray cluster must be named by auto, local or HOST:PORT, got {address!r}.")
        try:
            socket.create_connection((host, port), timeout=10).close()
        except OSError as error:
            raise _unreachable(address, str(error)) from error
    try:
        subprocess.run(
            [sys.executable, "-c", _PROBE, address],
            check=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            timeout=SECONDS_TO_CONNECT,
        )
    except subprocess.TimeoutExpired as error:
        raise _unreachable(address, f"no answer within {SECONDS_TO_CONNECT} s") from error
    except subprocess.CalledProcessError as error:
        said = error.stderr.decode(errors="replace").strip().splitlines()
        raise _unreachable(address, said[-1].rstrip(".") if said else "Ray did not say why") from error


def _unreachable(address: str, reason: str) -> ConfigError:
    return ConfigError(
        f"the Ray cluster at {address!r} cannot be reached: {reason}. Start one with `ray start --head`, name its "
        "address with --ray HOST:PORT, or take --ray local for this machine alone."
    )


def reason_behind(error: BaseException) -> str:
    """The first line of the error behind an error; Ray's own hold whole tracebacks."""
    # Ray Data raises errors from one that says nothing.
    while isinstance(inner := getattr(error, "cause", None) or error.__cause__, BaseException) and str(inner):
        error = inner
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0].rstrip('.')[:500]}" if lines else type(error).__name__


class _Failures(logging.Handler):
    """Keeps the reasons for which Ray Data gave blocks up; it only logs them."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.reasons: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep what is behind an error."""
        error = record.exc_info[1] if record.exc_info else None
        if error is not None:
            self.reasons.append(reason_behind(error))


@contextlib.contextmanager
def listening() -> Iterator[list[str]]:
    """Keep Ray Data's log off this process's output.

    Yields:
        Reasons for which blocks are given up meanwhile, the last one last.
    """
    log, failures = logging.getLogger("ray.data"), _Failures()
    shown = [(handler, handler.level) for handler in log.handlers if isinstance(handler, logging.StreamHandler)]
    for handler, _ in shown:
        handler.setLevel(logging.CRITICAL)
    log.addHandler(failures)
    try:
        yield failures.reasons
    finally:
        log.removeHandler(failures)
        for handler, level in shown:
            handler.setLevel(level)
