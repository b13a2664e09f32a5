"""The training loop: one process on a CPU or one GPU. Knows steps, checkpoints and logs, not what is being trained.

A `Trainable` does one optimiser step at a time; every random draw in it is a pure function of the step or part of its
state. So a run that was killed and resumed writes the same metrics, to the last digit, as one that was not.
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
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from torch import nn

from poet.errors import CheckpointError, ConfigError, PoetError

__all__ = [
    "ExponentialMovingAverage",
    "FitResult",
    "LoopConfig",
    "Progress",
    "Trainable",
    "cosine_schedule",
    "fit",
    "writing",
]

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


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """How a run is cut into logs and checkpoints. Nothing here changes what is learnt.

    Attributes:
        num_steps: optimiser steps in all.
        log_every: steps between two lines of `metrics.jsonl`; losses are averaged in between.
        validate_every: steps between two validations.
        checkpoint_seconds: least time between two checkpoints; one is also written at the end and on a signal.
    """

    num_steps: int
    log_every: int = 20
    validate_every: int = 500
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
        decay = min(self.decay, (1 + self.num_updates) / (10 + self.num_updates))
        self.num_updates += 1
        averages = [weight.detach() for weight in self.module.parameters()]
        torch._foreach_lerp_(averages, [weight.detach() for weight in module.parameters()], 1 - decay)
        for buffer, new in zip(self.module.buffers(), module.buffers(), strict=True):
            buffer.copy_(new)

    def state_dict(self) -> dict[str, Any]:
        """The averaged weights and the number of updates."""
        return {"num_updates": self.num_updates, "module": self.module.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Inverse of `state_dict`."""
        self.num_updates = int(state["num_updates"])
        self.module.load_state_dict(state["module"])


def fit(trainable: Trainable, config: LoopConfig, directory: Path, *, progress: Progress | None = None) -> FitResult:
    """Train to the last step, from the newest checkpoint in `directory` if there is one.

    Writes `checkpoint.pt`, `metrics.jsonl` and `loss.png` there, and the finished thing under `export/`. SIGINT and
    SIGTERM end the run after the present step, with a checkpoint.

    Args:
        trainable: freshly built; a checkpoint in `directory` is loaded into it.
        config: how often to log, validate and save.
        directory: of the run; made if missing.
        progress: called after every step.

    Raises:
        CheckpointError: the checkpoint cannot be read or belongs to another run, the disk is full, or a metric is not
            finite. The last checkpoint is kept.
    """
    started = time.monotonic()
    with writing(directory):
        directory.mkdir(parents=True, exist_ok=True)
        step, pending = _resume(trainable, directory)
        log = _MetricsLog(directory / "metrics.jsonl", pending)
    saved_at, newest = time.monotonic(), log.read_newest()
    with closing(log), _stop_on_signal() as stopped:
        while step < config.num_steps and not stopped():
            metrics = trainable.train_step(step)
            step += 1
            _check_finite(metrics, step)
            log.add(metrics)
            if step % config.log_every == 0 or step == config.num_steps:
                newest |= log.write(step)
            if step % config.validate_every == 0 or step == config.num_steps:
                newest |= log.write_validation(step, trainable.validate(step))
                _plot(directory / "metrics.jsonl", directory / "loss.png")
            if progress is not None:
                progress(step, config.num_steps, newest)
            if time.monotonic() - saved_at >= config.checkpoint_seconds:
                _save(trainable, step, log, directory)
                saved_at = time.monotonic()
        _save(trainable, step, log, directory)
    finished = step >= config.num_steps
    if finished:
        with writing(directory / "export"):
            trainable.export(directory / "export")
    return FitResult(step=step, finished=finished, seconds=time.monotonic() - started, metrics=newest)


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


def _save(trainable: Trainable, step: int, log: _MetricsLog, directory: Path) -> None:
    """Write the checkpoint beside the old one, then rename it: a kill leaves one of the two whole."""
    state = {
        "step": step,
        "trainable": trainable.state_dict(),
        "pending": log.pending,
        "random": torch.get_rng_state(),
        "metrics_bytes": log.flush(),
    }
    target, beside = directory / "checkpoint.pt", directory / "checkpoint.pt.tmp"
    try:
        with beside.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(target)
    except (OSError, RuntimeError) as error:  # torch.save says RuntimeError when the file cannot take any more
        beside.unlink(missing_ok=True)
        raise CheckpointError(
            f"the checkpoint {target} cannot be written: {error}. The one before it is kept; free some space."
        ) from error


def _resume(trainable: Trainable, directory: Path) -> tuple[int, dict[str, list[float]]]:
    """Load the checkpoint, drop metrics that came after it, and return its step and the metrics not yet averaged."""
    file, metrics = directory / "checkpoint.pt", directory / "metrics.jsonl"
    (directory / "checkpoint.pt.tmp").unlink(missing_ok=True)
    if not file.exists():
        metrics.unlink(missing_ok=True)
        return 0, {}
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        raise CheckpointError(f"the checkpoint {file} cannot be read: {error}. Delete it to start anew.") from error
    try:
        trainable.load_state_dict(state["trainable"])
        torch.set_rng_state(state["random"])
        step, pending, metrics_bytes = int(state["step"]), dict(state["pending"]), int(state["metrics_bytes"])
    except PoetError:
        raise
    except (KeyError, RuntimeError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"the checkpoint {file} does not fit what is being trained: {error}. Name another directory."
        ) from error
    with metrics.open("a+b") as lines:
        if lines.tell() > metrics_bytes:  # truncating a shorter file would fill it up with zeros
            lines.truncate(metrics_bytes)
    return step, pending


class _MetricsLog:
    """`metrics.jsonl`: a line of averages every few steps, and a line for every validation."""

    def __init__(self, path: Path, pending: Mapping[str, list[float]]) -> None:
        self.path, self.pending = path, {name: list(values) for name, values in pending.items()}
        # Unbuffered, so that a line that does not fit on the disk is not written by a later close.
        self.file = path.open("ab", buffering=0)

    def close(self) -> None:
        self.file.close()

    def read_newest(self) -> dict[str, float]:
        """The newest value of every metric that the log holds."""
        newest: dict[str, float] = {}
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
        with writing(self.path):
            os.fsync(self.file.fileno())
            return os.fstat(self.file.fileno()).st_size

    def _write(self, step: int, metrics: dict[str, float]) -> dict[str, float]:
        line = (json.dumps({"step": step, **metrics}) + "\n").encode()
        with writing(self.path):
            if self.file.write(line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return metrics


@contextmanager
def _stop_on_signal() -> Iterator[Callable[[], bool]]:
    """Remember SIGINT and SIGTERM instead of dying of them; a second SIGINT is the usual KeyboardInterrupt."""
    seen: list[int] = []

    def remember(number: int, _frame: object) -> None:
        seen.append(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
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
