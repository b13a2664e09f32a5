"""Replicas: the same gradients as one model, the same digits every time, and threads that leave others alone."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from poet.training.replicas import Replicas

ROWS, WIDTH = 7, 5


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def _model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(WIDTH, 3), nn.Tanh(), nn.Linear(3, 1))


def _rows() -> Tensor:
    return torch.arange(ROWS * WIDTH, dtype=torch.float32).view(ROWS, WIDTH).sin()


def _gradients(count: int) -> list[Tensor]:
    replicas = Replicas(_model(), count)
    parts = _rows().tensor_split(count)

    def work(model: nn.Module, number: int) -> int:
        model(parts[number]).square().sum().backward()
        return number

    assert replicas.backward(work) == list(range(count))
    return [weight.grad.clone() for weight in replicas.models[0].parameters() if weight.grad is not None]


def test_gradients_are_those_of_one_model_and_repeat_to_the_last_digit() -> None:
    whole, parts, again = _gradients(1), _gradients(3), _gradients(3)
    assert len(whole) == 4
    for one, three, repeated in zip(whole, parts, again, strict=True):
        torch.testing.assert_close(one, three)
        assert torch.equal(three, repeated)


def test_gradients_of_earlier_steps_are_not_counted_twice() -> None:
    replicas = Replicas(_model(), 2)

    def work(model: nn.Module, number: int) -> None:
        model(_rows()).sum().backward()

    found = []
    for _ in range(2):
        replicas.models[0].zero_grad(set_to_none=True)
        replicas.backward(work)
        found.append([weight.grad.clone() for weight in replicas.models[0].parameters() if weight.grad is not None])
    for first, second in zip(*found, strict=True):
        assert torch.equal(first, second)


def test_a_step_of_the_first_model_is_a_step_of_all() -> None:
    replicas = Replicas(_model(), 3)
    with torch.no_grad():
        for weight in replicas.models[0].parameters():
            weight.mul_(2)
    state = replicas.models[0].state_dict()
    assert all(
        torch.equal(tensor, state[name]) for tensors in replicas.models for name, tensor in tensors.state_dict().items()
    )


def test_each_takes_one_thread_and_the_process_keeps_its_own() -> None:
    replicas = Replicas(_model(), 2)
    assert replicas.backward(lambda model, number: torch.get_num_threads()) == [1, 1]
    assert torch.get_num_threads() == 2


def test_an_error_in_one_reaches_the_caller() -> None:
    def work(model: nn.Module, number: int) -> None:
        if number == 1:
            raise ValueError("this one cannot")

    with pytest.raises(ValueError, match="this one cannot"):
        Replicas(_model(), 2).backward(work)
