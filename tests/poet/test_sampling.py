"""Draws from known distributions: what may be drawn, how often, and that rows do not disturb each other."""

import dataclasses
import math
from typing import Any

import pytest
import torch

from poet.errors import CheckpointError, ConfigError
from poet.generation.sampling import SamplingConfig, build_generator, guide, penalise, sample
from poet.grammar import Allowed

ALL = Allowed(0, 7)


def draw(logits: list[float] | torch.Tensor, config: SamplingConfig, count: int, allowed: Allowed = ALL) -> list[int]:
    """`count` draws from one row of logits."""
    generator = build_generator(config)
    row = torch.as_tensor(logits)[None]
    return [int(sample(row, [allowed], [config], [generator])) for _ in range(count)]


PROBABILITIES = [0.02, 0.4, 0.03, 0.25, 0.1, 0.05, 0.15]
LOGITS = [math.log(probability) for probability in PROBABILITIES]


def test_frequencies_follow_the_probabilities() -> None:
    count = 1500
    drawn = draw(LOGITS, SamplingConfig(seed=5), count)
    for id, probability in enumerate(PROBABILITIES):
        deviation = math.sqrt(probability * (1 - probability) / count)
        assert abs(drawn.count(id) / count - probability) < 4 * deviation


def test_temperature_sharpens() -> None:
    powers = [probability**2 for probability in PROBABILITIES]
    count = 1000
    drawn = draw(LOGITS, SamplingConfig(seed=5, temperature=0.5), count)
    expected = powers[1] / sum(powers)
    assert abs(drawn.count(1) / count - expected) < 4 * math.sqrt(expected * (1 - expected) / count)


def test_temperature_0_takes_the_likeliest_and_draws_nothing() -> None:
    config = SamplingConfig(temperature=0, seed=5)
    generator = build_generator(config)
    before = generator.get_state()
    assert int(sample(torch.tensor([LOGITS]), [ALL], [config], [generator])) == 1
    assert torch.equal(generator.get_state(), before)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"top_k": 3}, {1, 3, 6}),
        ({"top_k": 100}, set(range(7))),
        ({"top_p": 0.6}, {1, 3}),
        ({"top_p": 0.7}, {1, 3, 6}),
        ({"top_p": 1e-6}, {1}),
        # Of the three that top-k leaves, 0.4 / 0.8 reaches 0.45 alone.
        ({"top_k": 3, "top_p": 0.45}, {1}),
        ({}, set(range(7))),
    ],
)
def test_top_k_and_top_p_keep_exactly_the_likeliest(settings: dict[str, Any], expected: set[int]) -> None:
    assert set(draw(LOGITS, SamplingConfig(seed=5, **settings), 400)) == expected


@pytest.mark.parametrize("settings", [{}, {"top_k": 2}, {"top_p": 0.9}, {"temperature": 0.0}, {"temperature": 1e3}])
def test_only_allowed_ids_are_drawn_however_likely_the_others(settings: dict[str, Any]) -> None:
    logits = [9.0, 1.0, 9.0, 0.5, 0.9, 9.0, 1.2]
    config = SamplingConfig(**{"seed": 5, **settings})
    assert set(draw(logits, config, 100, Allowed(3, 5))) <= {3, 4}
    assert set(draw(logits, config, 100, Allowed(3, 5, stop=1))) <= {1, 3, 4}
    assert set(draw(logits, config, 100, Allowed(3, 5, stop=6))) <= {3, 4, 6}


def test_stop_id_is_drawn_as_often_as_it_is_likely() -> None:
    drawn = draw([0.0] * 7, SamplingConfig(seed=5), 1000, Allowed(4, 7, stop=1))
    assert abs(drawn.count(1) / 1000 - 0.25) < 4 * math.sqrt(0.25 * 0.75 / 1000)


def test_row_draws_the_same_alone_and_among_others() -> None:
    logits = torch.randn(5, 53, generator=torch.Generator().manual_seed(0))
    allowed = [Allowed(0, 53), Allowed(3, 17), Allowed(11, 41, stop=2), Allowed(29, 30), Allowed(3, 17, stop=51)]
    configs = [
        SamplingConfig(seed=1),
        SamplingConfig(seed=2, top_k=5),
        SamplingConfig(seed=3, top_p=0.8, temperature=1.7),
        SamplingConfig(seed=4),
        SamplingConfig(temperature=0),
    ]
    together = [build_generator(config) for config in configs]
    drawn = torch.stack([sample(logits, allowed, configs, together) for _ in range(11)], 1).tolist()
    for row, config in enumerate(configs):
        alone = build_generator(config)
        own = [int(sample(logits[row : row + 1], [allowed[row]], [config], [alone])) for _ in range(11)]
        assert own == drawn[row]
    assert len(set(drawn[0])) > 1


def test_seeds_repeat_and_differ() -> None:
    logits = torch.zeros(101)
    assert draw(logits, SamplingConfig(seed=5), 11) == draw(logits, SamplingConfig(seed=5), 11)
    assert draw(logits, SamplingConfig(seed=5), 11) != draw(logits, SamplingConfig(seed=6), 11)
    assert draw(logits, SamplingConfig(), 11) != draw(logits, SamplingConfig(), 11)


def test_logits_in_bfloat16_are_taken() -> None:
    assert draw(torch.tensor(LOGITS, dtype=torch.bfloat16), SamplingConfig(temperature=0), 1) == [1]


@pytest.mark.parametrize("damage", [math.nan, math.inf])
def test_damaged_logits_are_refused(damage: float) -> None:
    with pytest.raises(CheckpointError, match="finite"):
        draw([0.0, damage, 0.0], SamplingConfig(seed=5), 1, Allowed(0, 3))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -0.1}, "temperature must be"),
        ({"temperature": math.nan}, "temperature must be"),
        ({"temperature": "1"}, "temperature must be"),
        ({"top_k": -1}, "top_k must be"),
        ({"top_k": 1.0}, "top_k must be"),
        ({"top_p": 0.0}, "top_p must be"),
        ({"top_p": 1.1}, "top_p must be"),
        ({"guidance_scale": -0.5}, "guidance_scale must be"),
        ({"guidance_scale": math.inf}, "guidance_scale must be"),
        ({"seed": -1}, "seed must be"),
        ({"seed": 2**63}, "seed must be"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SamplingConfig(**settings)


def test_seeds_that_differ_in_their_upper_bits_alone_draw_differently():
    draws = [
        torch.rand(5, generator=build_generator(SamplingConfig(seed=seed))).tolist() for seed in (0, 2**62, 2**32, 7)
    ]
    assert len({tuple(draw) for draw in draws}) == 4
    plain = torch.rand(5, generator=torch.Generator().manual_seed(7)).tolist()
    assert draws[3] == plain  # small seeds stay as they are


def test_guidance_moves_logits_away_from_those_of_the_guide() -> None:
    wanted, unwanted = (
        torch.tensor([[3.0, 1.0], [5.0, 5.0]], dtype=torch.bfloat16),
        torch.tensor([[1.0, 2.0], [7.0, 0.0]]),
    )
    moved = guide(wanted, unwanted, [2.0, 0.0])
    assert moved.dtype == torch.float32
    assert moved.tolist() == [[5.0, 0.0], [7.0, 0.0]]
    assert guide(wanted, unwanted, [1.0, 1.0]).tolist() == wanted.tolist()


def test_ids_written_lately_are_penalised_whatever_the_sign_of_their_logits() -> None:
    logits = torch.tensor([4.0, -4.0, 2.0, -2.0, 0.5])
    config = SamplingConfig(repetition_penalty=2.0, repetition_window=3)
    penalise(logits, [4, 0, 1, 0], config)  # the first 4 is longer ago than the window
    assert logits.tolist() == [2.0, -8.0, 2.0, -2.0, 0.5]
    penalise(logits, [4, 3, 3, 3], dataclasses.replace(config, repetition_window=0))
    assert logits.tolist() == [2.0, -8.0, 2.0, -4.0, 0.25]
    before = logits.clone()
    penalise(logits, [], config)
    penalise(logits, [0, 1], SamplingConfig())
    assert torch.equal(logits, before)


@pytest.mark.parametrize(
    "wrong",
    [
        {"repetition_penalty": 0.0},
        {"repetition_penalty": math.nan},
        {"repetition_window": -1},
        {"repetition_window": 2.0},
    ],
)
def test_a_penalty_that_cannot_be_used_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        SamplingConfig(**wrong)  # type: ignore[arg-type]
