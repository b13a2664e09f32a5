"""Which steps may change the weights, and when a run is given up."""

import math

import pytest

from poet.errors import CheckpointError
from poet.training.guard import StepGuard


def warmed(**changes: int) -> StepGuard:
    guard = StepGuard(spike_ratio=3.0, max_skipped_steps=changes.get("max_skipped_steps", 2))
    assert all(guard.admits(step, 2.0, 1.0) for step in range(20))
    return guard


@pytest.mark.parametrize(
    ("loss", "norm"), [(math.nan, 1.0), (math.inf, 1.0), (2.0, math.nan), (2.0, math.inf), (6.1, 1.0)]
)
def test_what_is_no_number_or_a_spike_is_left_out(loss: float, norm: float) -> None:
    guard = warmed()
    assert not guard.admits(20, loss, norm)
    assert guard.admits(21, 5.9, 1.0)


def test_the_first_steps_of_a_run_may_differ_much() -> None:
    guard = StepGuard(spike_ratio=2.0, max_skipped_steps=0)
    assert all(guard.admits(step, loss, 1.0) for step, loss in enumerate([10.0, 1.0, 50.0, 2.0]))


def test_a_spike_does_not_become_what_the_next_is_compared_with() -> None:
    guard = warmed(max_skipped_steps=100)
    assert not any(guard.admits(step, 7.0, 1.0) for step in range(70))


def test_too_many_steps_left_out_end_the_run() -> None:
    guard = warmed()
    assert not guard.admits(20, math.nan, 1.0)
    assert not guard.admits(21, 9.0, 1.0)
    with pytest.raises(CheckpointError, match=r"at most 2 steps may be left out .* up to step 22 3 were: loss nan"):
        guard.admits(22, math.nan, 1.0)


def test_only_steps_one_after_another_count() -> None:
    guard = warmed()
    for step in range(20, 40, 2):
        assert not guard.admits(step, math.nan, 1.0)
        assert guard.admits(step + 1, 2.0, 1.0)


def test_a_restored_guard_answers_alike() -> None:
    guard, other = warmed(), StepGuard(spike_ratio=3.0, max_skipped_steps=2)
    guard.admits(20, math.nan, 1.0)
    other.load_state_dict(guard.state_dict())
    for one in (guard, other):
        assert not one.admits(21, 6.1, 1.0)
        with pytest.raises(CheckpointError):
            one.admits(22, 6.1, 1.0)
