"""The upsampler: windows, factors, conditions, and canvases of codes; held against attention without windows."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from poet.errors import CheckpointError, ConfigError, ShapeError
from poet.generation.sampling import SamplingConfig
from poet.generation.upsample import Upsampling, UpsamplingRequest, check_upsampling, draw_codes, upsample_codes
from poet.model.superresolution import UNKNOWN, Upsampler, UpsamplerConfig, _Windows, merge_factors, split_factors
from poet.model.weights import load_upsampler, save_upsampler

PIECES = 23
CONFIG = UpsamplerConfig(
    codebook_size=32, num_text_pieces=PIECES, hidden_size=32, ffn_hidden_size=48, num_layers=3, num_heads=2,
    windows=((1, 2, 8), (1, 8, 2), (3, 2, 2)),
)  # fmt: skip
T, H, W = 3, 6, 8


def build(config: UpsamplerConfig = CONFIG, seed: int = 0) -> Upsampler:
    """Weights so large that every condition shows."""
    torch.manual_seed(seed)
    model = Upsampler(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=1.5 * parameter.shape[-1] ** -0.5)
            elif parameter.shape[0] == config.hidden_size and not bool((parameter == 1).all()):
                parameter.normal_()
    return model


def example(rows: int = 2, seed: int = 0, config: UpsamplerConfig = CONFIG) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    high = torch.randint(0, config.codebook_size, (rows, T, H, W), generator=generator)
    high[torch.rand(high.shape, generator=generator) < 0.6] = UNKNOWN
    return {
        "high": high,
        "low": torch.randint(0, config.codebook_size, (rows, T, H // 2, W // 2), generator=generator),
        "text": torch.randint(0, PIECES, (rows, 5), generator=generator),
        "text_lengths": torch.tensor([5, 3, 0, 1][:rows]),
    }


@given(
    grid=st.tuples(st.integers(1, 5), st.integers(1, 9), st.integers(1, 9)),
    window=st.tuples(st.integers(1, 6), st.integers(1, 10), st.integers(1, 10)),
)
@settings(max_examples=60, deadline=None)
def test_windows_are_joined_as_they_were_cut_and_hold_every_place_once(
    grid: tuple[int, int, int], window: tuple[int, int, int]
) -> None:
    view = _Windows(grid, window, torch.ones(2, 4, dtype=torch.bool), CONFIG, torch.float32)
    x = torch.arange(2 * math.prod(grid)).view(2, *grid, 1) + 1
    windows = view.cut(x)
    assert torch.equal(view.join(windows), x)
    kept = windows[windows > 0]
    assert kept.unique().numel() == kept.numel() == x.numel()


@torch.inference_mode()
def test_windows_as_large_as_the_grid_are_attention_to_everything() -> None:
    whole = dataclasses.replace(CONFIG, windows=((T, H, W),))
    larger = dataclasses.replace(CONFIG, windows=((50, 50, 50), (T, H + 1, W)))
    model, other = build(whole), build(larger)
    other.load_state_dict(model.state_dict())
    given = example()
    torch.testing.assert_close(model(**given), other(**given))
    # A code in a far corner is seen everywhere.
    given["high"][0, 0, 0, 0] = 1
    one = model(**given)
    given["high"][0, 0, 0, 0] = 2
    assert (one[0] != model(**given)[0]).any(-1).all()


@torch.inference_mode()
@pytest.mark.parametrize("window", [(1, 4, 3), (2, 5, 8), (3, 4, 4)])
def test_a_window_sees_its_own_places_and_no_padding(window: tuple[int, int, int]) -> None:
    """One layer, window by window, cut out by hand: the grid is no multiple of the window."""
    config = dataclasses.replace(CONFIG, windows=(window,), num_layers=1)
    model, given = build(config), example()
    found = model(**given)
    for t in range(0, T, window[0]):
        for y in range(0, H, window[1]):
            for x in range(0, W, window[2]):
                part = slice(t, t + window[0]), slice(y, y + window[1]), slice(x, x + window[2])
                # Below the layer a place depends on itself alone, so all else may be anything.
                other = {name: value.clone() for name, value in example(seed=9).items()}
                other["text"], other["text_lengths"] = given["text"], given["text_lengths"]
                rows = (slice(None), *part)
                other["high"][rows] = given["high"][rows]
                low = (
                    slice(None),
                    part[0],
                    slice(y // 2, -(-(y + window[1]) // 2)),
                    slice(x // 2, -(-(x + window[2]) // 2)),
                )
                other["low"][low] = given["low"][low]
                torch.testing.assert_close(model(**other)[rows], found[rows])


@torch.inference_mode()
def test_text_counts_up_to_its_length_and_no_text_is_a_text_of_none() -> None:
    model, given = build(), example()
    found = model(**given)
    changed = given | {"text": given["text"].clone()}
    changed["text"][1, 3:] = (changed["text"][1, 3:] + 1) % PIECES
    torch.testing.assert_close(model(**changed), found)
    changed["text"][1, 2] = (changed["text"][1, 2] + 1) % PIECES
    assert (model(**changed)[1] != found[1]).any(-1).all()
    without = given | {"text_lengths": torch.tensor([5, 0])}
    empty = given | {"text": torch.zeros(2, 0, dtype=torch.int64), "text_lengths": torch.tensor([0, 0])}
    torch.testing.assert_close(model(**without)[1], model(**empty)[1])
    assert not torch.allclose(model(**without)[1], found[1])


@torch.inference_mode()
def test_smaller_codes_lie_under_their_four_places() -> None:
    """With a window of one place nothing but the place itself is seen."""
    config = dataclasses.replace(CONFIG, windows=((1, 1, 1),))
    model, given = build(config), example(1)
    found = model(**given)
    given["low"][0, 1, 2, 3] = (given["low"][0, 1, 2, 3] + 1) % 32
    moved = (model(**given) != found).any(-1)[0]
    expected = torch.zeros(T, H, W, dtype=torch.bool)
    expected[1, 4:6, 6:8] = True
    assert torch.equal(moved, expected)
    # The four places know which of the four they are.
    given["high"][:] = UNKNOWN
    square = model(**given)[0, 1, 4:6, 6:8].reshape(4, -1)
    assert len(square.unique(dim=0)) == 4


@torch.inference_mode()
def test_the_level_of_noise_is_told() -> None:
    model, given = build(), example()
    clean = model(**given)
    torch.testing.assert_close(model(**given, noise_level=torch.zeros(2)), clean)
    noisy = model(**given, noise_level=torch.tensor([0.0, 0.5]))
    torch.testing.assert_close(noisy[0], clean[0])
    assert not torch.allclose(noisy[1], clean[1])


@pytest.mark.parametrize(
    ("codebook_size", "factors", "values"), [(4096, 1, 4096), (2**14, 2, 2**7), (2**18, 2, 2**9), (2**26, 13, 4)]
)
def test_large_codebooks_are_cut_into_factors(codebook_size: int, factors: int, values: int) -> None:
    config = dataclasses.replace(
        CONFIG, codebook_size=codebook_size, num_factors=None if factors == 2 or factors == 1 else 13
    )
    assert (config.factors, config.factor_size) == (factors, values)
    codes = torch.randint(0, codebook_size, (7, 5))
    parts = split_factors(codes, config)
    assert parts.shape == (7, 5, factors)
    assert 0 <= int(parts.min()) <= int(parts.max()) < values
    assert torch.equal(merge_factors(parts, config), codes)


@torch.inference_mode()
def test_every_factor_of_a_code_is_embedded_and_scored() -> None:
    config = dataclasses.replace(CONFIG, codebook_size=2**14, num_factors=None)
    model, given = build(config), example(config=config)
    found = model(**given)
    logits = model.logits(found.flatten(0, 3))
    assert logits.shape == (2 * T * H * W, 2, 2**7)
    for bit in (1, 2**13):
        changed = given | {"low": given["low"] ^ bit}
        assert (model(**changed) != found).any(-1).all()


def codes(seed: int, config: UpsamplerConfig = CONFIG) -> np.ndarray[Any, np.dtype[np.int64]]:
    return np.random.default_rng(seed).integers(0, config.codebook_size, (T, H // 2, W // 2))


def request(low: np.ndarray[Any, np.dtype[np.int64]], text: tuple[int, ...] = (), **settings: Any) -> UpsamplingRequest:
    return UpsamplingRequest(low=low, text=text, settings=Upsampling(**settings))


@pytest.mark.parametrize("codebook_size", [32, 2**14])
def test_canvases_are_filled_with_codes_alike_alone_and_among_others(codebook_size: int) -> None:
    config = dataclasses.replace(CONFIG, codebook_size=codebook_size, num_factors=None)
    model = build(config)
    low = [codes(seed, config) for seed in range(4)]
    texts = [(1, 2, 3), (), (4,), (5, 6, 7, 8)]
    chosen = [
        Upsampling(num_steps=6, temperature=0.0),
        Upsampling(num_steps=4, seed=1, text_guidance=2.0),
        Upsampling(num_steps=9, seed=2, low_guidance=3.0, noise_level=0.2),
        Upsampling(num_steps=5, seed=3, text_guidance=1.5, low_guidance=2.0, schedule="linear"),
    ]
    seen: list[tuple[int, int]] = []
    requests = [
        UpsamplingRequest(low=given, text=text, settings=settings)
        for given, text, settings in zip(low, texts, chosen, strict=True)
    ]
    together = upsample_codes(model, requests, lambda done, total: seen.append((done, total)))
    for number, found in enumerate(together):
        assert found.shape == (T, H, W)
        assert 0 <= found.min() <= found.max() < codebook_size
        [alone] = upsample_codes(model, [requests[number]])
        np.testing.assert_array_equal(alone, found)
    assert len(seen) == 9
    assert seen[-1] == (4 * T * H * W, 4 * T * H * W)
    assert upsample_codes(model, []) == []


def test_clips_of_several_shapes_and_more_than_a_batch_are_written_as_if_each_were_alone() -> None:
    model = build()
    requests = [
        request(codes(number)[: 1 + number % 2], (number,), num_steps=2 + number, seed=number) for number in range(5)
    ]
    together = upsample_codes(model, requests, max_batch_size=3)
    for one, found in zip(requests, together, strict=True):
        np.testing.assert_array_equal(upsample_codes(model, [one])[0], found)


def test_one_step_takes_the_likeliest_code_of_every_place() -> None:
    model = build()
    low = codes(0)
    [found] = upsample_codes(model, [request(low, (3, 4), num_steps=1, temperature=0.0)])
    with torch.inference_mode():
        states = model(
            torch.full((1, T, H, W), UNKNOWN), torch.from_numpy(low)[None], torch.tensor([[3, 4]]), torch.tensor([2])
        )
        likeliest = model.logits(states[0].flatten(0, 2))[:, 0].argmax(-1)
    np.testing.assert_array_equal(found, likeliest.view(T, H, W).numpy())


def test_guidance_moves_away_from_what_it_leaves_out() -> None:
    model, low = build(), codes(0)

    def made(**options: Any) -> np.ndarray[Any, np.dtype[np.int64]]:
        return upsample_codes(model, [request(low, (1, 2), num_steps=4, seed=1, **options)])[0]

    plain = made()
    np.testing.assert_array_equal(made(text_guidance=1.0, low_guidance=1.0), plain)
    others = [made(text_guidance=3.0), made(low_guidance=3.0), made(text_guidance=3.0, low_guidance=3.0)]
    assert len({tuple(found.ravel()) for found in (plain, *others)}) == 4


@torch.inference_mode()
@pytest.mark.parametrize(("text", "low", "noise"), [(2.5, 1.0, 0.0), (1.0, 3.0, 0.4), (1.5, 2.0, 0.4)])
def test_guided_logits_are_those_of_the_formula(text: float, low: float, noise: float) -> None:
    """l(nothing) + s_low (l(low) - l(nothing)) + s_text (l(low, text) - l(low)); an unguided text is in all."""
    model, given = build(), torch.from_numpy(codes(0))[None]
    empty, words = torch.full((1, T, H, W), UNKNOWN), torch.tensor([[1, 2]])

    def logits(*, with_low: bool, with_text: bool) -> torch.Tensor:
        under = given if with_low else torch.full_like(given, UNKNOWN)
        level = torch.tensor([noise if with_low else 0.0])  # nothing is not noisy
        states = model(empty, under, words, torch.tensor([2 if with_text else 0]), level)
        return model.logits(states.flatten(0, 3))[:, 0]

    keeps = text == 1
    whole = logits(with_low=True, with_text=True)
    no_text = logits(with_low=True, with_text=keeps)
    nothing = logits(with_low=False, with_text=keeps)
    expected = nothing + low * (no_text - nothing) + text * (whole - no_text)
    options = {"text_guidance": text, "low_guidance": low, "noise_level": noise}
    [found] = upsample_codes(model, [request(codes(0), (1, 2), num_steps=1, temperature=0.0, **options)])
    np.testing.assert_array_equal(found.ravel(), expected.argmax(-1).numpy())


def test_a_code_is_as_sure_as_its_factors_together() -> None:
    logits = torch.randn(50, 2, 8)
    factors, sure = draw_codes(logits, SamplingConfig(seed=1), 0)
    scores = logits.log_softmax(-1).gather(2, torch.from_numpy(factors)[..., None])[..., 0].sum(1)
    np.testing.assert_allclose(sure, scores.numpy(), rtol=1e-5)


def test_an_upsampler_is_saved_and_loaded_and_belongs_to_one_tokenizer(tmp_path: Path) -> None:
    model, given = build(), example()
    save_upsampler(model, tmp_path, "ab" * 32, torch.float32)
    loaded = load_upsampler(tmp_path, "ab" * 32)
    assert loaded.config == CONFIG
    assert not loaded.training
    torch.testing.assert_close(loaded(**given), model(**given), rtol=0, atol=0)
    with pytest.raises(CheckpointError, match=r"belongs to the video tokenizer abababababab, the one in use is cdcdcd"):
        load_upsampler(tmp_path, "cd" * 32)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="must describe an upsampler"):
        load_upsampler(tmp_path, "ab" * 32)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"codebook_size": 48}, "power of two"),
        ({"hidden_size": 30}, "hidden_size"),
        ({"num_heads": 0}, "num_heads"),
        ({"windows": ()}, "windows"),
        ({"windows": ((1, 0, 2),)}, "windows"),
        ({"scale": 1}, "scale"),
        ({"num_factors": 3}, "divide the 5 bits"),
    ],
)
def test_a_shape_that_cannot_be_built_is_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        dataclasses.replace(CONFIG, **changes)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_steps": 0}, "number of steps must be a whole number"),
        ({"num_steps": 2.5}, "got 2.5"),
        ({"num_steps": True}, "got True"),
        ({"noise_level": 1.5}, "noise_level"),
        ({"text_guidance": -1.0}, "text_guidance"),
        ({"low_guidance": math.nan}, "low_guidance"),
        ({"temperature": -1.0}, "temperature"),
        ({"schedule": "sine"}, "schedule"),
    ],
)
def test_settings_that_cannot_be_used_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Upsampling(**options)


def test_what_does_not_fit_together_is_refused() -> None:
    model, given = build(), example()
    with pytest.raises(ShapeError, match="low must be"):
        model(**(given | {"low": given["low"][:, :, :2]}))
    with pytest.raises(ShapeError, match="text_lengths"):
        model(**(given | {"text_lengths": torch.tensor([1])}))
    for bad, words in (
        (request(codes(0)[0]), r"shape \(T, h, w\)"),
        (request(codes(0).astype(np.float32)), "got float32"),
        (request(codes(0) - 1), r"every code must be in \[0, 32\), got -1"),
        (request(codes(0), (1, 10_000)), "every text piece"),
    ):
        with pytest.raises(ConfigError, match=words):
            check_upsampling(bad, CONFIG, index=3)
    with pytest.raises(ConfigError, match="must have the keys"):
        UpsamplerConfig.from_dict({"codebook_size": 4})
    assert UpsamplerConfig.from_dict(CONFIG.to_dict()) == CONFIG
