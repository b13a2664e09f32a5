"""The training loop. Knows steps, checkpoints and logs, not what is being trained nor by how many processes.

A `Trainable` does one optimiser step at a time; every random draw in it is a pure function of the step or part of its
state. So a run that was killed and resumed writes the same metrics, to the last digit, as one that was not. Where
several processes train together, each runs this loop; `Checkpoints` keeps them in step, and the leading one writes.
"""

from __future__ import annotations

import copy
import dataclasses
import errno
import json
import math
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, Final, Protocol, runtime_checkable

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from poet.errors import CheckpointError, ConfigError, PoetError

__all__ = [
    "Checkpoints",
    "ExponentialMovingAverage",
    "FitResult",
    "LoopConfig",
    "Progress",
    "Speed",
    "StopsEarly",
    "Trainable",
    "cosine_schedule",
    "fit",
    "lerp_averages",
    "writing",
]

ONE_FILE: Final = "checkpoint.pt"

Progress = Callable[[int, int, Mapping[str, float]], None]
"""Called with (steps done, steps in all, the newest metrics)."""


class Trainable(Protocol):
    """What the loop drives."""

    def train_step(self, step: int) -> dict[str, float]:
        """One optimiser step; returns its metrics."""

    def validate(self, step: int) -> dict[str, float]:
        """Measure the present state on held-out data; must not change what later training steps do."""

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next step depends on, as tensors and plain values."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Inverse of `state_dict`."""

    def export(self, directory: Path) -> None:
        """Write the finished thing."""


@runtime_checkable
class StopsEarly(Protocol):
    """What may be done before the last step, such as after validations that become no better."""

    @property
    def is_done(self) -> bool:
        """Whether it is."""


class Speed(Protocol):
    """Measures how fast a run is; see `poet.training.speed`."""

    def start(self) -> None:
        """Begin to measure."""

    def add(self, metrics: Mapping[str, float]) -> None:
        """Count a step with these metrics."""

    def write(self, step: int) -> dict[str, float]:
        """Write what was measured since the last time."""


class Checkpoints(Protocol):
    """Where a run is saved, and what its processes agree about. All methods are called by all processes in turn.

    Attributes:
        leads: whether this process writes the log and the plot.
    """

    leads: bool

    def agree(self, *flags: bool) -> tuple[bool, ...]:
        """Of each flag, whether any process raises it."""

    def save(self, trainable: Trainable, state: dict[str, Any]) -> None:
        """Save the trainable and the loop's own state (plain values; the leading process's count).

        Until the new checkpoint is whole, the one before it stays. Writing may go on behind the next steps.
        """

    def load(self, trainable: Trainable) -> dict[str, Any] | None:
        """Load the newest whole checkpoint into the trainable and return the loop's state; None if there is none.

        Raises:
            CheckpointError: it cannot be read or belongs to another run.
        """

    def close(self) -> None:
        """Wait until all that was saved is on disk."""

    def abandon(self) -> None:
        """Let go of what is being written, after an error, without asking another process for anything."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """How a run is cut into logs and checkpoints. Nothing here changes what is learnt.

    Attributes:
        num_steps: optimiser steps in all.
        log_every: steps between two lines of `metrics.jsonl`; losses are averaged in between.
        validate_every: steps between two validations.
        validate_first: whether to validate before the first step too, to see what training gained.
        checkpoint_seconds: least time between two checkpoints; one is also written at the end and on a signal.
    """

    num_steps: int
    log_every: int = 20
    validate_every: int = 500
    validate_first: bool = False
    checkpoint_seconds: float = 120.0

    def __post_init__(self) -> None:
        if min(self.num_steps, self.log_every, self.validate_every) < 1 or self.checkpoint_seconds < 0:
            raise ConfigError(
                "num_steps, log_every and validate_every must be at least 1 and checkpoint_seconds not negative, "
                f"got {self}."
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class FitResult:
    """How a run ended. `finished` is False when a signal asked it to stop; the same command goes on from there."""

    step: int
    finished: bool
    seconds: float
    metrics: dict[str, float]


def cosine_schedule(step: int, warmup_steps: int, num_steps: int, floor: float = 0.0) -> float:
    """Multiplier of the learning rate: linear up over the warm-up, then half a cosine down to `floor`."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    share = min(1.0, (step - warmup_steps) / max(1, num_steps - warmup_steps))
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * share))


class ExponentialMovingAverage:
    """A copy of a module whose weights follow it slowly. Buffers are copied as they are.

    The decay grows with the number of updates, min(decay, (1 + n) / (10 + n)), so that the start is soon forgotten.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        if not 0 <= decay < 1:
            raise ConfigError(f"the decay of the moving average must lie in [0, 1), got {decay}.")
        self.decay, self.num_updates = decay, 0
        self.module = copy.deepcopy(module).requires_grad_(False).eval()

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """Move towards the present weights of `module`."""
        lerp_averages(list(self.module.parameters()), list(module.parameters()), self.decay, self.num_updates)
        self.num_updates += 1
        for buffer, new in zip(self.module.buffers(), module.buffers(), strict=True):
            buffer.copy_(new)

    def state_dict(self) -> dict[str, Any]:
        """The averaged weights and the number of updates."""
        return {"num_updates": self.num_updates, "module": self.module.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Inverse of `state_dict`."""
        self.num_updates = int(state["num_updates"])
        self.module.load_state_dict(state["module"])


@torch.no_grad()
def lerp_averages(averages: list[Tensor], weights: list[Tensor], decay: float, num_updates: int) -> None:
    """Move averages towards weights, in place, by min(decay, (1 + n) / (10 + n)) after n updates."""
    share = min(decay, (1 + num_updates) / (10 + num_updates))
    torch._foreach_lerp_([tensor.detach() for tensor in averages], [tensor.detach() for tensor in weights], 1 - share)


def fit(
    trainable: Trainable,
    config: LoopConfig,
    directory: Path,
    *,
    checkpoints: Checkpoints | None = None,
    speed: Speed | None = None,
    progress: Progress | None = None,
) -> FitResult:
    """Train to the last step, from the newest checkpoint in `directory` if there is one.

    Writes a checkpoint, `metrics.jsonl` and `loss.png` there, and the finished thing under `export/`. SIGINT,
    SIGTERM and SIGHUP end the run after the present step, with a checkpoint.

    Args:
        trainable: freshly built; a checkpoint is loaded into it.
        config: how often to log, validate and save.
        directory: of the run; made if missing.
        checkpoints: of a run of several processes; None: one process, and `checkpoint.pt` in `directory`.
        speed: told of every step, and asked for a line as often as metrics are logged.
        progress: called after every step.

    Raises:
        CheckpointError: the checkpoint cannot be read or belongs to another run, the disk is full, or a metric is not
            finite. The last checkpoint is kept.
    """
    started = time.monotonic()
    checkpoints = _OneFile(directory) if checkpoints is None else checkpoints
    with writing(directory):
        directory.mkdir(parents=True, exist_ok=True)
        step, pending, metrics_bytes = _resume(trainable, checkpoints)
        log = _MetricsLog(directory / "metrics.jsonl", pending, metrics_bytes, writes=checkpoints.leads)
    saved_at, newest = time.monotonic(), log.read_newest()
    with closing(log), _closing(checkpoints), _stop_on_signal() as stopped:
        stop = checkpoints.agree(stopped())[0]
        if step == 0 and config.validate_first and not stop:
            newest |= log.write_validation(step, trainable.validate(step))
        if speed is not None:
            speed.start()
        while step < config.num_steps and not stop and not _is_done(trainable):
            metrics = trainable.train_step(step)
            step += 1
            _check_finite(metrics, step)
            log.add(metrics)
            if speed is not None:
                speed.add(metrics)
            if step % config.log_every == 0 or step == config.num_steps:
                newest |= log.write(step)
                if speed is not None and checkpoints.leads:
                    with writing(directory):
                        speed.write(step)
            if step % config.validate_every == 0 or step == config.num_steps:
                newest |= log.write_validation(step, trainable.validate(step))
                if checkpoints.leads:
                    _plot(directory / "metrics.jsonl", directory / "loss.png")
            if progress is not None:
                progress(step, config.num_steps, newest)
            due = checkpoints.leads and time.monotonic() - saved_at >= config.checkpoint_seconds
            stop, due = checkpoints.agree(stopped(), due)
            if due:
                _save(trainable, step, log, checkpoints)
                saved_at = time.monotonic()
        _save(trainable, step, log, checkpoints)
    finished = step >= config.num_steps or _is_done(trainable)
    if finished:
        with writing(directory / "export"):
            trainable.export(directory / "export")
    return FitResult(step=step, finished=finished, seconds=time.monotonic() - started, metrics=newest)


def _is_done(trainable: Trainable) -> bool:
    return isinstance(trainable, StopsEarly) and trainable.is_done


@contextmanager
def _closing(checkpoints: Checkpoints) -> Iterator[None]:
    """Wait for what is being written; after an error do not, since the other processes are elsewhere."""
    try:
        yield
    except BaseException:
        checkpoints.abandon()
        raise
    checkpoints.close()


def _check_finite(metrics: Mapping[str, float], step: int) -> None:
    bad = {name: value for name, value in metrics.items() if not math.isfinite(value)}
    if bad:
        raise CheckpointError(
            f"training produced {bad} at step {step} and was stopped; the last checkpoint is kept. "
            "Begin anew in another directory with a lower learning rate."
        )


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn what a full or read-only disk raises into a CheckpointError that says what to do."""
    try:
        yield
    except PoetError:
        raise
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{path} cannot be written: {error}. The last checkpoint is kept; free some space and start the same "
            "command again."
        ) from error


def _save(trainable: Trainable, step: int, log: _MetricsLog, checkpoints: Checkpoints) -> None:
    state = {
        "step": step,
        "pending": log.pending,
        "random": torch.get_rng_state(),
        "metrics_bytes": log.flush(),
    }
    checkpoints.save(trainable, state)


def _resume(trainable: Trainable, checkpoints: Checkpoints) -> tuple[int, dict[str, list[float]], int]:
    """Load the checkpoint; its step, the metrics not yet averaged, and the length of the log that belongs to it."""
    state = checkpoints.load(trainable)
    if state is None:
        return 0, {}, 0
    try:
        torch.set_rng_state(state["random"])
        return int(state["step"]), dict(state["pending"]), int(state["metrics_bytes"])
    except (KeyError, RuntimeError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"the checkpoint does not fit what is being trained: {error!r}. Name another directory."
        ) from error


class _OneFile:
    """`checkpoint.pt`, the checkpoint of a run of one process."""

    leads = True

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.file, self.beside = directory / ONE_FILE, directory / f"{ONE_FILE}.tmp"

    def agree(self, *flags: bool) -> tuple[bool, ...]:
        return flags

    def save(self, trainable: Trainable, state: dict[str, Any]) -> None:
        """Write beside the old checkpoint, then rename: a kill leaves one of the two whole."""
        try:
            with self.beside.open("wb") as file:
                torch.save({**state, "trainable": trainable.state_dict()}, file)
                file.flush()
                os.fsync(file.fileno())
            self.beside.replace(self.file)
        except (OSError, RuntimeError) as error:  # torch.save says RuntimeError when the file cannot take any more
            self.beside.unlink(missing_ok=True)
            raise CheckpointError(
                f"the checkpoint {self.file} cannot be written: {error}. The one before it is kept; free some space."
            ) from error

    def load(self, trainable: Trainable) -> dict[str, Any] | None:
        self.beside.unlink(missing_ok=True)
        if not self.file.exists():
            if any(self.directory.glob("checkpoints/step-*")):
                raise ConfigError(
                    f"{self.directory} holds a run of several processes, which goes on with --nproc or its launcher. "
                    "Name another directory with -o."
                )
            return None
        try:
            state: dict[str, Any] = torch.load(self.file, map_location="cpu", weights_only=True)
        except Exception as error:
            raise CheckpointError(
                f"the checkpoint {self.file} cannot be read: {error}. Delete it to start anew."
            ) from error
        try:
            trainable.load_state_dict(state.pop("trainable"))
        except PoetError:
            raise
        except (KeyError, RuntimeError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"the checkpoint {self.file} does not fit what is being trained: {error}. Name another directory."
            ) from error
        return state

    def close(self) -> None:
        """Nothing is written behind."""

    def abandon(self) -> None:
        """Nothing is being written."""


class _MetricsLog:
    """`metrics.jsonl`: a line of averages every few steps, and a line for every validation.

    Args:
        path: of the file; what it holds beyond `kept_bytes` came after the checkpoint and is dropped.
        pending: values not yet averaged, of the checkpoint.
        kept_bytes: see `path`.
        writes: whether this process writes the file; others average without a word.
    """

    def __init__(self, path: Path, pending: Mapping[str, list[float]], kept_bytes: int, *, writes: bool) -> None:
        self.path, self.pending = path, {name: list(values) for name, values in pending.items()}
        # Unbuffered, so that a line that does not fit on the disk is not written by a later close.
        self.file = path.open("ab", buffering=0) if writes else None
        if self.file is not None and self.file.tell() > kept_bytes:  # truncating a shorter file would add zeros
            self.file.truncate(kept_bytes)

    def close(self) -> None:
        if self.file is not None:
            self.file.close()

    def read_newest(self) -> dict[str, float]:
        """The newest value of every metric that the log holds."""
        newest: dict[str, float] = {}
        if self.file is None:
            return newest
        for line in self.path.read_text(encoding="utf-8").splitlines():
            newest |= json.loads(line)
        newest.pop("step", None)
        return newest

    def add(self, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self.pending.setdefault(name, []).append(float(value))

    def write(self, step: int) -> dict[str, float]:
        means = {name: sum(values) / len(values) for name, values in self.pending.items()}
        self.pending.clear()
        return self._write(step, means)

    def write_validation(self, step: int, metrics: Mapping[str, float]) -> dict[str, float]:
        return self._write(step, {f"validation_{name}": float(value) for name, value in metrics.items()})

    def flush(self) -> int:
        """Bytes that are safely on disk."""
        if self.file is None:
            return 0
        with writing(self.path):
            os.fsync(self.file.fileno())
            return os.fstat(self.file.fileno()).st_size

    def _write(self, step: int, metrics: dict[str, float]) -> dict[str, float]:
        line = (json.dumps({"step": step, **metrics}) + "\n").encode()
        if self.file is None:
            return metrics
        with writing(self.path):
            if self.file.write(line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return metrics


@contextmanager
def _stop_on_signal() -> Iterator[Callable[[], bool]]:
    """Remember SIGINT, SIGTERM and SIGHUP instead of dying of them; a second SIGINT is the usual KeyboardInterrupt."""
    seen: list[int] = []

    def remember(number: int, _frame: object) -> None:
        seen.append(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        for number in previous:
            signal.signal(number, remember)
    except ValueError:  # not the main thread: signals are somebody else's
        yield lambda: False
        return
    try:
        yield lambda: bool(seen)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _plot(metrics: Path, target: Path) -> None:
    """Draw every loss of the log over the steps, on a logarithmic scale where all are positive."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    names = sorted({name for row in rows for name in row if "loss" in name})
    figure, axes = pyplot.subplots(figsize=(8, 4.5))
    for name in names:
        points = [(row["step"], row[name]) for row in rows if name in row]
        style = "o-" if name.startswith("validation_") else "-"
        axes.plot(*zip(*points, strict=True), style, label=name, markersize=3, linewidth=1)
    if names and all(row[name] > 0 for row in rows for name in names if name in row):
        axes.set_yscale("log")
    axes.set_xlabel("step")
    axes.grid(alpha=0.3)
    if names:
        axes.legend(fontsize="small")
    figure.tight_layout()
    try:
        with writing(target):
            figure.savefig(target, dpi=100)
    finally:
        pyplot.close(figure)
