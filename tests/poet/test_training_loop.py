"""The loop: whatever stops a run, the same call goes on and ends with the same bytes."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import multiprocessing
import os
import random
import resource
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from poet.errors import CheckpointError, ConfigError
from poet.training import loop
from poet.training.loop import ExponentialMovingAverage, FitResult, LoopConfig, cosine_schedule, fit

STEPS = 23
LOOP = LoopConfig(num_steps=STEPS, log_every=5, validate_every=7, checkpoint_seconds=3)
Hook = Callable[[str, int], None]


class Tiny:
    """Fits a line, with noise from the global generator. `hook` is told where it is, and may kill."""

    def __init__(self, hook: Hook | None = None) -> None:
        self.hook = hook or (lambda where, step: None)
        torch.manual_seed(0)
        self.model = nn.Linear(3, 2)
        self.average = ExponentialMovingAverage(self.model, 0.9)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.05)
        self.steps: list[int] = []

    def train_step(self, step: int) -> dict[str, float]:
        self.hook("before", step)
        self.steps.append(step)
        x = torch.randn(5, 3)
        loss = (self.model(x) - x[:, :2] * step).square().mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.average.update(self.model)
        self.hook("after", step)
        metrics = {"loss": float(loss.detach()), "weight": float(self.model.weight.detach().sum())}
        return metrics | ({"odd_loss": metrics["loss"]} if step % 2 else {})

    def validate(self, step: int) -> dict[str, float]:
        self.hook("validate", step)
        return {"weight": float(self.average.module.state_dict()["weight"].sum())}

    def state_dict(self) -> dict[str, Any]:
        self.hook("state_dict", self.steps[-1] if self.steps else 0)
        parts = {"model": self.model, "average": self.average, "optimizer": self.optimizer}
        return {name: part.state_dict() for name, part in parts.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.average.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])

    def export(self, directory: Path) -> None:
        directory.mkdir(exist_ok=True)
        weights = [*self.model.parameters(), *self.average.module.parameters()]
        (directory / "weights").write_bytes(b"".join(weight.detach().numpy().tobytes() for weight in weights))


@pytest.fixture(autouse=True)
def _a_checkpoint_every_third_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that moves on by a second whenever it is read."""
    seconds = iter(range(10**9))
    monkeypatch.setattr(loop, "time", SimpleNamespace(monotonic=lambda: next(seconds)))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("undisturbed")
    assert fit(Tiny(), LOOP, directory).finished
    return directory


def _assert_same(directory: Path, undisturbed: Path) -> None:
    for name in ("metrics.jsonl", "export/weights"):
        assert (directory / name).read_bytes() == (undisturbed / name).read_bytes(), name


def _in_a_child(work: Callable[[], object]) -> int | None:
    """Exit code of `work` in a forked process; minus the signal's number where one ended it."""
    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    process.join()
    return process.exitcode


def _kill_at(place: str, at: int) -> Hook:
    """SIGKILL the first time that the run is at that place in that step or a later one."""

    def hook(where: str, step: int) -> None:
        if where == place and step >= at:
            os.kill(os.getpid(), signal.SIGKILL)

    return hook


def _saved_step(directory: Path) -> int:
    return int(torch.load(directory / "checkpoint.pt", weights_only=True)["step"])


def test_a_run_writes_metrics_plot_checkpoint_and_export(undisturbed: Path) -> None:
    rows = [json.loads(line) for line in (undisturbed / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == [5, 10, 15, 20, 23]
    assert [row["step"] for row in rows if "validation_weight" in row] == [7, 14, 21, 23]
    assert (undisturbed / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert _saved_step(undisturbed) == STEPS
    assert sorted(path.name for path in undisturbed.iterdir()) == [
        "checkpoint.pt",
        "export",
        "loss.png",
        "metrics.jsonl",
    ]


def test_logged_losses_are_means_over_the_steps_between(tmp_path: Path) -> None:
    seen: list[float] = []
    tiny = Tiny()
    step = tiny.train_step

    def recording(number: int) -> dict[str, float]:
        metrics = step(number)
        seen.append(metrics["loss"])
        return metrics

    tiny.train_step = recording  # type: ignore[method-assign]
    result = fit(tiny, LOOP, tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    logged = [row["loss"] for row in rows if "loss" in row]
    assert logged == [sum(seen[i : i + 5]) / len(seen[i : i + 5]) for i in range(0, STEPS, 5)]
    assert result.metrics["loss"] == logged[-1]


@pytest.mark.parametrize("place", ["before", "after", "validate", "state_dict"])
def test_a_run_killed_anywhere_again_and_again_ends_with_the_same_bytes(
    place: str, tmp_path: Path, undisturbed: Path
) -> None:
    kills = 0
    for at in sorted(random.Random(place).sample(range(STEPS), 4)):
        kills += _in_a_child(lambda at=at: fit(Tiny(_kill_at(place, at)), LOOP, tmp_path)) == -signal.SIGKILL
    assert kills > 2
    fit(Tiny(), LOOP, tmp_path)
    _assert_same(tmp_path, undisturbed)


def test_a_resumed_run_goes_on_from_the_newest_checkpoint(tmp_path: Path) -> None:
    assert _in_a_child(lambda: fit(Tiny(_kill_at("before", 11)), LOOP, tmp_path)) == -signal.SIGKILL
    saved = _saved_step(tmp_path)
    assert 11 - 4 < saved <= 11
    tiny = Tiny()
    fit(tiny, LOOP, tmp_path)
    assert tiny.steps == list(range(saved, STEPS))


def test_a_checkpoint_that_was_being_written_is_never_loaded(
    tmp_path: Path, undisturbed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, writes = torch.save, 0

    def half(state: Any, file: Any) -> None:
        nonlocal writes
        writes += 1
        whole(state, file)
        if writes == 3:
            file.flush()
            os.truncate(file.name, file.tell() // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", half)
        assert _in_a_child(lambda: fit(Tiny(), LOOP, tmp_path)) == -signal.SIGKILL
    assert (tmp_path / "checkpoint.pt.tmp").exists()
    saved, tiny = _saved_step(tmp_path), Tiny()
    fit(tiny, LOOP, tmp_path)
    assert tiny.steps[0] == saved > 0
    assert not (tmp_path / "checkpoint.pt.tmp").exists()
    _assert_same(tmp_path, undisturbed)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_run_after_the_step_with_a_checkpoint(
    number: signal.Signals, tmp_path: Path, undisturbed: Path
) -> None:
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)

    def interrupt(where: str, step: int) -> None:
        if (where, step) == ("before", 12):
            os.kill(os.getpid(), number)

    result = fit(Tiny(interrupt), LOOP, tmp_path)
    assert (result.step, result.finished) == (13, False)
    assert _saved_step(tmp_path) == 13
    assert not (tmp_path / "export").exists()
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers
    tiny = Tiny()
    assert fit(tiny, LOOP, tmp_path).finished
    assert tiny.steps[0] == 13
    _assert_same(tmp_path, undisturbed)


def test_a_second_interrupt_is_a_keyboard_interrupt(tmp_path: Path) -> None:
    def interrupt(where: str, step: int) -> None:
        if (where, step) in (("before", 12), ("after", 12)):
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        fit(Tiny(interrupt), LOOP, tmp_path)
    assert 8 < _saved_step(tmp_path) <= 12


@pytest.mark.parametrize("spare", [400, -1], ids=["checkpoint", "metrics"])
def test_a_full_disk_is_said_and_the_last_checkpoint_kept(spare: int, tmp_path: Path, undisturbed: Path) -> None:
    """From step 12 on, no file may grow beyond a limit: too small for a checkpoint, or for one more line of metrics."""

    def fill(where: str, step: int) -> None:
        if (where, step) == ("before", 12):
            limit = (tmp_path / "metrics.jsonl").stat().st_size + spare
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    def work() -> None:
        with pytest.raises(CheckpointError, match=r"cannot be written: .*free some space"):
            fit(Tiny(fill), LOOP, tmp_path)

    assert _in_a_child(work) == 0
    assert 8 < _saved_step(tmp_path) <= 13
    assert not (tmp_path / "checkpoint.pt.tmp").exists()
    fit(Tiny(), LOOP, tmp_path)
    _assert_same(tmp_path, undisturbed)


def test_a_place_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a directory")
    with pytest.raises(CheckpointError, match="cannot be written"):
        fit(Tiny(), LOOP, tmp_path / "file" / "run")


def test_an_export_that_cannot_be_written_can_be_had_later(tmp_path: Path, undisturbed: Path) -> None:
    (tmp_path / "export").write_text("in the way")
    with pytest.raises(CheckpointError, match="cannot be written"):
        fit(Tiny(), LOOP, tmp_path)
    (tmp_path / "export").unlink()
    tiny = Tiny()
    assert fit(tiny, LOOP, tmp_path).finished
    assert tiny.steps == []
    _assert_same(tmp_path, undisturbed)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_checkpoint(value: float, tmp_path: Path) -> None:
    tiny = Tiny()
    step = tiny.train_step
    tiny.train_step = lambda n: step(n) | ({"loss": value} if n == 12 else {})  # type: ignore[method-assign]
    with pytest.raises(CheckpointError, match=r"produced \{'loss': (nan|inf)\} at step 13.*lower learning rate"):
        fit(tiny, LOOP, tmp_path)
    assert 8 < _saved_step(tmp_path) <= 12
    weights = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["trainable"]["model"]["weight"]
    assert bool(weights.isfinite().all())
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()


def test_a_damaged_checkpoint_is_refused_and_left_alone(tmp_path: Path, undisturbed: Path) -> None:
    content = (undisturbed / "checkpoint.pt").read_bytes()[:-500]
    (tmp_path / "checkpoint.pt").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"checkpoint\.pt cannot be read: .*Delete it to start anew"):
        fit(Tiny(), LOOP, tmp_path)
    assert (tmp_path / "checkpoint.pt").read_bytes() == content


def test_a_checkpoint_of_something_else_is_refused(tmp_path: Path, undisturbed: Path) -> None:
    (tmp_path / "checkpoint.pt").write_bytes((undisturbed / "checkpoint.pt").read_bytes())
    tiny = Tiny()
    tiny.model = nn.Linear(3, 5)
    with pytest.raises(CheckpointError, match="does not fit what is being trained"):
        fit(tiny, LOOP, tmp_path)
    torch.save({"weights": 3}, tmp_path / "checkpoint.pt")
    with pytest.raises(CheckpointError, match="does not fit what is being trained"):
        fit(Tiny(), LOOP, tmp_path)


def test_a_finished_run_started_again_trains_nothing_and_knows_its_metrics(tmp_path: Path) -> None:
    first = fit(Tiny(), LOOP, tmp_path)
    files = {path: path.read_bytes() for path in (tmp_path / "metrics.jsonl", tmp_path / "export" / "weights")}
    tiny = Tiny()
    again: FitResult = fit(tiny, LOOP, tmp_path)
    assert tiny.steps == []
    assert (again.step, again.finished, again.metrics) == (STEPS, True, first.metrics)
    assert {path: path.read_bytes() for path in files} == files


def test_a_run_whose_metrics_were_deleted_goes_on_with_new_ones(tmp_path: Path) -> None:
    assert _in_a_child(lambda: fit(Tiny(_kill_at("before", 16)), LOOP, tmp_path)) == -signal.SIGKILL
    (tmp_path / "metrics.jsonl").unlink()
    fit(Tiny(), LOOP, tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == [20, 23]


def test_progress_is_told_of_every_step(tmp_path: Path) -> None:
    calls: list[tuple[int, int, dict[str, float]]] = []
    fit(Tiny(), LOOP, tmp_path, progress=lambda step, steps, metrics: calls.append((step, steps, dict(metrics))))
    assert [call[:2] for call in calls] == [(step, STEPS) for step in range(1, STEPS + 1)]
    assert "loss" not in calls[3][2]
    assert "loss" in calls[4][2]
    assert "validation_weight" in calls[-1][2]


@pytest.mark.parametrize(
    "values", [{"num_steps": 0}, {"log_every": 0}, {"validate_every": 0}, {"checkpoint_seconds": -1.0}]
)
def test_a_loop_that_cannot_be_is_refused(values: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="must be at least 1 and checkpoint_seconds not negative"):
        LoopConfig(**{"num_steps": 1, **values})


def test_schedule_rises_in_a_line_and_falls_as_a_cosine() -> None:
    rates = [cosine_schedule(step, 10, 110, floor=0.2) for step in range(111)]
    assert rates[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert rates[10] == 1
    assert rates[60] == pytest.approx(0.6)  # half way: the mean of 1 and the floor
    assert rates[110] == pytest.approx(0.2)
    assert all(a > b for a, b in itertools.pairwise(rates[10:]))
    assert cosine_schedule(500, 10, 110, floor=0.2) == pytest.approx(0.2)
    assert cosine_schedule(0, 0, 10) == 1
    assert cosine_schedule(9, 10, 10) == 1  # a warm-up as long as the run


class _Counted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))


def test_average_follows_the_weights_at_its_decay() -> None:
    module = _Counted()
    average = ExponentialMovingAverage(module, decay=0.15)
    module.weight.data.fill_(1.0)
    module.get_buffer("count").fill_(7)
    average.update(module)
    assert average.module.get_parameter("weight").tolist() == pytest.approx([0.9] * 3)  # 1 / 10 of the old at first
    average.update(module)
    expected = 0.9 + 0.1 * 0.85  # (1 + 1) / (10 + 1) is beyond the decay
    assert average.module.get_parameter("weight").tolist() == pytest.approx([expected] * 3)
    assert int(average.module.get_buffer("count")) == 7
    assert float(module.weight.detach().sum()) == 3
    assert not average.module.training
    assert not any(weight.requires_grad for weight in average.module.parameters())


def test_average_comes_back_with_its_age() -> None:
    module = nn.Linear(3, 2)
    average, again = ExponentialMovingAverage(module, 0.9), ExponentialMovingAverage(nn.Linear(3, 2), 0.9)
    for _ in range(4):
        average.update(module)
    again.load_state_dict(average.state_dict())
    module.weight.data.add_(1)
    average.update(module)
    again.update(module)
    assert torch.equal(again.module.state_dict()["weight"], average.module.state_dict()["weight"])


@pytest.mark.parametrize("decay", [-0.1, 1.0])
def test_a_decay_outside_its_range_is_refused(decay: float) -> None:
    with pytest.raises(ConfigError, match=r"must lie in \[0, 1\)"):
        ExponentialMovingAverage(nn.Linear(1, 1), decay)


@pytest.mark.parametrize("place", ["validate", "before", "after"])
def test_what_was_there_before_is_measured_once(tmp_path: Path, place: str) -> None:
    config = dataclasses.replace(LOOP, validate_first=True)
    assert fit(Tiny(), config, tmp_path / "whole").finished
    lines = [json.loads(line) for line in (tmp_path / "whole/metrics.jsonl").read_text().splitlines()]
    assert lines[0]["step"] == 0
    assert lines[0]["validation_weight"] == Tiny().validate(0)["weight"]
    assert [line["step"] for line in lines if "validation_weight" in line] == [0, 7, 14, 21, STEPS]
    for at in (0, 8):
        assert _in_a_child(lambda at=at: fit(Tiny(_kill_at(place, at)), config, tmp_path / f"{at}")) == -signal.SIGKILL
        assert fit(Tiny(), config, tmp_path / f"{at}").finished
        _assert_same(tmp_path / f"{at}", tmp_path / "whole")
