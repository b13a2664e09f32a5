"""Checkpoints of a run of many processes: Megatron's distributed ones, written behind the training.

A checkpoint is written under another name and renamed when every process has written its part; a run that is killed
meanwhile goes on from the one before. What is in it is `poet.training.megatron_trainer`'s business.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import shutil
import signal
from collections.abc import Iterator, Mapping
from multiprocessing.managers import SyncManager
from pathlib import Path
from typing import Any, Final, Protocol, cast

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue
from torch import distributed
from torch.distributed.checkpoint.api import CheckpointException

from poet.errors import CheckpointError, ConfigError, PoetError
from poet.training.loop import ONE_FILE, Trainable
from poet.training.processes import end_with_parent

__all__ = [
    "FOLDER",
    "DistributedCheckpoints",
    "ShardedTrainable",
    "share_results_with_a_fork",
    "stop_sharing_results",
]

FOLDER: Final = "checkpoints"
KEPT: Final = 2
_MANAGERS: Final[list[SyncManager]] = []  # one at most; it ends when nobody holds it any more


class ShardedTrainable(Trainable, Protocol):
    """A `Trainable` whose tensors are spread over the processes."""

    def sharded_state_dict(self, *, is_loading: bool = False) -> dict[str, Any]:
        """Tensors that the next step depends on, as Megatron's sharded ones."""

    def load_sharded(self, state: Mapping[str, Any]) -> None:
        """Take over what was loaded into a `sharded_state_dict`."""

    def about(self) -> dict[str, Any]:
        """What the checkpoint shall say of itself to whoever converts it."""


class DistributedCheckpoints:
    """`poet.training.loop.Checkpoints` of a run of several processes: one directory each, named by the step.

    Args:
        run: directory of the run, on a file system that all processes see.
    """

    def __init__(self, run: Path) -> None:
        self.run, self.directory = run, run / FOLDER
        self.leads = distributed.get_rank() == 0
        share_results_with_a_fork()
        self._queue = AsyncCallsQueue()
        self._written: list[Path] = []

    def agree(self, *flags: bool) -> tuple[bool, ...]:
        """Of each flag, whether any process raises it. Also finishes checkpoints that have been written meanwhile."""
        votes = torch.tensor(flags, dtype=torch.int, device=torch.cuda.current_device())
        distributed.all_reduce(votes, op=distributed.ReduceOp.MAX)
        self._finish(blocking=False)
        return tuple(bool(vote) for vote in votes.cpu())

    def save(self, trainable: Trainable, state: dict[str, Any]) -> None:
        """Begin to write a checkpoint; waits for the one before it.

        Raises:
            CheckpointError: the one before it, or the beginning of this one, could not be written.
        """
        sharded = cast(ShardedTrainable, trainable)
        self._finish(blocking=True)
        target = self.directory / f"step-{state['step']:08d}"
        beside = target.with_suffix(".writing")
        with _telling(f"the checkpoint {target} cannot be written", "The one before it is kept; free some space."):
            if self.leads and not target.exists():
                shutil.rmtree(beside, ignore_errors=True)
                beside.mkdir(parents=True)
            # What the leading process counts, and whether it is there already: processes must not differ.
            shared = self._from_leader(
                {"loop": {**state, "trainable": trainable.state_dict()}, "there": target.exists()}
            )
            if shared["there"]:
                return
            content = {**sharded.sharded_state_dict(), "loop": shared["loop"], "poet": sharded.about()}
            self._queue.schedule_async_request(dist_checkpointing.save(content, str(beside), async_sharded_save=True))
        self._written.append(beside)

    def load(self, trainable: Trainable) -> dict[str, Any] | None:
        """Load the newest whole checkpoint, of whatever cut.

        Raises:
            CheckpointError: it cannot be read, or belongs to another run.
            ConfigError: the run was begun in one process.
        """
        if self.leads:
            for half in self.directory.glob("step-*.writing"):
                shutil.rmtree(half, ignore_errors=True)
        newest: Path | None = self._from_leader(max(self.directory.glob("step-????????"), default=None))
        if newest is None:
            if self._from_leader((self.run / ONE_FILE).exists()):
                raise ConfigError(
                    f"{self.run} holds a run of one process, which goes on without --nproc. Name another directory "
                    "with -o, and its export as start_from."
                )
            return None
        sharded = cast(ShardedTrainable, trainable)
        advice = "Name another directory, or delete it to go on from the one before."
        with _telling(f"the checkpoint {newest} does not fit what is being trained, or cannot be read", advice):
            common = dist_checkpointing.load_common_state_dict(str(newest))
            trainable.load_state_dict(common["loop"]["trainable"])
            sharded.load_sharded(dist_checkpointing.load(sharded.sharded_state_dict(is_loading=True), str(newest)))
            return {name: value for name, value in common["loop"].items() if name != "trainable"}

    def close(self) -> None:
        """Wait until all that was saved is on disk.

        Raises:
            CheckpointError: it could not be written.
        """
        self._finish(blocking=True)

    def abandon(self) -> None:
        """Let go of what is being written, without a word to the other processes, which may not be listening."""
        self._queue.close(abort=True)
        for call in self._queue.async_calls:
            call.async_caller.close(abort=True)

    def _from_leader(self, value: Any) -> Any:
        shared = [value]
        distributed.broadcast_object_list(shared, src=0)
        return shared[0]

    def _finish(self, *, blocking: bool) -> None:
        """Rename what has been written, and delete what is too old."""
        with _telling("a checkpoint cannot be written", "The one before it is kept; free some space."):
            for _ in self._queue.maybe_finalize_async_calls(blocking=blocking):
                beside = self._written.pop(0)
                if self.leads:
                    beside.rename(beside.with_suffix(""))
                    for old in sorted(self.directory.glob("step-????????"))[:-KEPT]:
                        shutil.rmtree(old, ignore_errors=True)
                distributed.barrier()


def share_results_with_a_fork() -> SyncManager | None:
    """Give Megatron the queue through which its writers report, from a process that is forked and ends with this one.

    To be called before this process has threads, of which those of process groups are some.

    Returns:
        That process's manager, or None if there is one already. `stop_sharing_results` ends it.

    Megatron would spawn that process: it imports everything again, four seconds of a core for every process of a run,
    and stays for ever when this one is killed.
    """
    if filesystem_async._results_queue is not None:
        return None
    manager = SyncManager(ctx=multiprocessing.get_context("fork"))
    manager.start(_end_with_parent, (os.getpid(),))
    filesystem_async._results_queue = manager.Queue()
    _MANAGERS.append(manager)
    return manager


def stop_sharing_results(manager: SyncManager | None) -> None:
    """Undo what `share_results_with_a_fork` did, if it did something."""
    if manager is not None:
        filesystem_async._results_queue = None
        _MANAGERS.remove(manager)
        manager.shutdown()


def _end_with_parent(parent: int) -> None:
    """Ask Linux to end this process when its parent ends, however that comes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent goes on until its step is saved
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    end_with_parent(parent, signal.SIGKILL)


@contextlib.contextmanager
def _telling(what: str, advice: str) -> Iterator[None]:
    """Turn what Megatron, PyTorch and the disk raise into an error that says what to do."""
    try:
        yield
    except PoetError:
        raise
    # PyTorch's CheckpointException is no Exception. A lost process is no matter of checkpoints: see heartbeats.
    except (CheckpointException, CheckpointingException, LookupError, TypeError, ValueError, OSError) as error:
        raise CheckpointError(f"{what}: {error!r}. {advice}") from error
    except RuntimeError as error:
        if "state_dict" not in str(error) and "size mismatch" not in str(error):
            raise
        raise CheckpointError(f"{what}: {error!r}. {advice}") from error
