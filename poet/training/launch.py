"""Starts the processes of a run on this machine with PyTorch's launcher, and says in a line how it ended.

Knows processes, not what they train.
"""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Sequence
from typing import Final

from poet.errors import PoetError

__all__ = ["LAUNCHER", "launch"]

LAUNCHER: Final = "POET_LAUNCHER"
"""An environment variable of the processes: the id of the one that started them, with which they end."""

_DEFAULTS: Final = {
    "OMP_NUM_THREADS": "1",
    "CUDA_DEVICE_MAX_CONNECTIONS": "1",
    "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "600",
    "TORCHELASTIC_SIGNALS_TO_HANDLE": "SIGTERM,SIGINT,SIGHUP",  # those after which a run saves
}


def launch(module: str, arguments: Sequence[str], processes: int) -> int:
    """Run a module in several processes, with `torchrun`'s environment, until all have ended.

    Args:
        module: as `python -m` takes it.
        arguments: for each process.
        processes: how many.

    Returns:
        The exit status: 0, or 128 and the number of the signal that ended the run. SIGINT, SIGTERM and SIGHUP are
        handed on, and the processes have TORCH_ELASTIC_SHUTDOWN_TIMEOUT seconds (600 unless it says otherwise) to save.

    Raises:
        PoetError: a process failed; it has said why.
    """
    before = dict(os.environ)
    os.environ.update(_DEFAULTS | before | {LAUNCHER: str(os.getpid())})
    try:
        return _run([f"--nproc-per-node={processes}", "-m", "--", module, *arguments], processes)
    finally:
        for name in os.environ.keys() - before.keys():
            del os.environ[name]
        os.environ.update(before)


def _run(options: Sequence[str], processes: int) -> int:
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    for name in list(logging.root.manager.loggerDict):
        if name.startswith("torch.distributed.elastic"):  # it would log signals and tracebacks of its own
            logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        # The bars among the options keep the launcher from taking ours for its own.
        run.run(run.parse_args(["--standalone", *options]))
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        how = f"signal {-failure.exitcode}" if failure.exitcode < 0 else f"status {failure.exitcode}"
        raise PoetError(
            f"process {rank} of {processes} ended with {how}; what it said stands above. The same command goes on "
            "from the last checkpoint."
        ) from error
    except SignalException as error:
        return 128 + int(signal.Signals(error.sigval))
    return 0
