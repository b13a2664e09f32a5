"""Canvases: what is known never changes, what is drawn is legal, and the unknown places fall as the schedule says."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from poet.errors import CheckpointError, ConfigError, VocabularyError
from poet.generation import maskgit
from poet.generation.canvas import ORDERS, ParallelDecoding, plan_canvas
from poet.generation.maskgit import (
    SCHEDULES,
    UNKNOWN,
    Canvas,
    CanvasPlan,
    Logits,
    Stage,
    draw_places,
    fill_canvases,
    unknown_after,
)
from poet.generation.sampling import SamplingConfig
from poet.grammar import Segment, check_output, place_ranges
from poet.model.attention import SceneLayout
from poet.model.transformer import PoetTransformer
from poet.sequence import output_grammar, output_places, pack, pack_prefix, unpack
from poet.tasks import get_task
from poet.testing import random_scene, sharp_model, tiny_config, tiny_geometry, tiny_vocabulary

VOCABULARY = tiny_vocabulary()
CONFIG = tiny_config(VOCABULARY)
MASK = VOCABULARY.special("<mask>")
GREEDY = SamplingConfig(temperature=0)
TASK = get_task("text_to_video_audio")
GEOMETRY = tiny_geometry(VOCABULARY, num_latent_frames=2)
SHAPES: dict[str, Any] = {
    "video_latent_shape": GEOMETRY.latent_shape,
    "num_audio_latents": GEOMETRY.num_audio_latents(GEOMETRY.num_frames),
}
GRAMMAR = output_grammar(TASK, VOCABULARY, **SHAPES)
PLACES = output_places(TASK, VOCABULARY, **SHAPES)


def of(logits: torch.Tensor) -> Logits:
    """All logits at hand, as `draw_places` asks for them."""
    return lambda places, ids: logits[places, ids]


@pytest.fixture(scope="module")
def model() -> PoetTransformer:
    return sharp_model(CONFIG)


def prefix(seed: int = 0, *, pieces: int = 7, drop_text: bool = False) -> list[int]:
    scene = random_scene(
        TASK.name, VOCABULARY, np.random.default_rng(seed), geometry=GEOMETRY, num_text_pieces=pieces, parallel=True
    )
    ids: list[int] = pack_prefix(scene, VOCABULARY, drop_text=drop_text).tolist()
    return ids


def plan(num_steps: int = 6, pinned: Sequence[tuple[int, int]] = (), **options: Any) -> CanvasPlan:
    return plan_canvas(
        ParallelDecoding(num_steps=num_steps, **options), TASK, VOCABULARY, pinned=tuple(pinned), **SHAPES
    )


def fill(model: PoetTransformer, chosen: CanvasPlan, sampling: SamplingConfig = GREEDY, seed: int = 0) -> list[int]:
    [ids] = fill_canvases(model, [prefix(seed)], [Canvas(GRAMMAR, chosen, sampling)])
    return ids


@given(places=st.integers(1, 700), steps=st.integers(1, 750), schedule=st.sampled_from(SCHEDULES))
def test_unknown_places_fall_with_every_step_and_end_at_zero(places: int, steps: int, schedule: Any) -> None:
    counts = unknown_after(places, steps, schedule)
    assert len(counts) == min(steps, places)
    assert all(later < earlier for earlier, later in zip([places, *counts], counts, strict=False))
    assert counts[-1] == 0
    # Where at least one place a step leaves room for it, the count is the schedule's, rounded down.
    for step, count in enumerate(counts[:-1], 1):
        done = step / len(counts)
        shares = {"cosine": math.cos(math.pi / 2 * done), "linear": 1 - done, "square": 1 - done**2}
        wanted = math.floor(places * shares[schedule])
        before = [places, *counts][step - 1]
        assert count == max(min(wanted, before - 1), len(counts) - step)


def test_schedules_begin_slowly_or_evenly() -> None:
    assert unknown_after(100, 4, "linear") == [75, 50, 25, 0]
    assert unknown_after(100, 4, "cosine") == [92, 70, 38, 0]
    assert unknown_after(100, 4, "square") == [93, 75, 43, 0]


@given(
    order=st.sampled_from(ORDERS),
    schedule=st.sampled_from(SCHEDULES),
    steps=st.integers(5, 40),
    temperature=st.sampled_from([0.0, 1.0]),
    data=st.data(),
)
@settings(max_examples=30, deadline=None)
def test_pins_hold_ids_are_legal_and_counts_fall_at_every_step(
    order: Any, schedule: Any, steps: int, temperature: float, data: st.DataObject
) -> None:
    low, high = place_ranges(GRAMMAR)
    free = np.flatnonzero(high - low > 1).tolist()
    chosen = data.draw(st.lists(st.sampled_from(free), unique=True, max_size=len(free)))
    pinned = [(place, int(high[place]) - 1) for place in chosen]
    sampling = SamplingConfig(temperature=temperature, seed=data.draw(st.integers(0, 99)))
    canvas = Canvas(GRAMMAR, plan(steps, pinned, order=order, schedule=schedule), sampling)
    rng, before = np.random.default_rng(0), canvas.num_known
    assert before == len(low) - len(free) + len(pinned)
    assert canvas.num_steps <= steps
    while not canvas.done:
        asked, known = canvas.asked(), canvas.ids.copy()
        assert (known[asked] == UNKNOWN).all()
        assert all((id == MASK) == (known[place] == UNKNOWN) for place, id in enumerate(canvas.shown()))
        logits = torch.from_numpy(rng.normal(size=(len(asked), VOCABULARY.vocab_size))).float()
        canvas.settle(*draw_places(of(logits), low[asked], high[asked], canvas.sampling, canvas.step))
        assert canvas.num_known > before
        before = canvas.num_known
        was_known = known != UNKNOWN
        assert (canvas.ids[was_known] == known[was_known]).all()
        there = canvas.ids != UNKNOWN
        assert ((canvas.ids >= low) & (canvas.ids < high))[there].all()
    check_output(GRAMMAR, canvas.ids.tolist())
    assert all(canvas.ids[place] == id for place, id in pinned)


def test_the_surest_places_are_kept_first_and_the_others_drawn_again() -> None:
    grammar = (Segment(4, 10, 14),)
    canvas = Canvas(grammar, CanvasPlan(stages=(Stage(0, 4, 2),), mask_id=1, schedule="linear"), GREEDY)
    logits = torch.full((4, 20), -9.0)
    for place, (id, height) in enumerate(((11, 1.0), (12, 8.0), (13, 5.0), (10, 2.0))):
        logits[place, id] = height
    low, high = np.full(4, 10), np.full(4, 14)
    ids, sure = draw_places(of(logits), low, high, canvas.sampling, 0)
    assert ids.tolist() == [11, 12, 13, 10]
    assert sure[1] == pytest.approx(logits[1, 10:14].log_softmax(-1)[2])
    canvas.settle(ids, sure)
    assert canvas.ids.tolist() == [UNKNOWN, 12, 13, UNKNOWN]
    assert canvas.shown() == [1, 12, 13, 1]
    assert canvas.asked().tolist() == [0, 3]


def test_an_id_outside_the_range_is_never_drawn_however_likely() -> None:
    logits = torch.zeros(200, 20)
    logits[:, [0, 9, 14, 19]] = 50.0
    low, high = np.repeat([10, 2], 100), np.repeat([14, 5], 100)
    for sampling in (
        GREEDY,
        SamplingConfig(seed=1),
        SamplingConfig(seed=1, top_k=2),
        SamplingConfig(seed=1, top_p=0.6),
    ):
        ids, sure = draw_places(of(logits), low, high, sampling, 3)
        assert ((ids >= low) & (ids < high)).all()
        assert np.isfinite(sure).all()


def test_draws_follow_the_logits_and_their_confidence_is_of_temperature_one() -> None:
    logits = torch.tensor([0.0, 1.0, 2.0]).repeat(20_000, 1)
    ids, sure = draw_places(of(logits), np.zeros(20_000, np.int64), np.full(20_000, 3), SamplingConfig(seed=5), 0)
    shares = np.bincount(ids, minlength=3) / 20_000
    expected = logits[0].softmax(-1).numpy()
    np.testing.assert_allclose(shares, expected, atol=4 * np.sqrt(expected * (1 - expected) / 20_000).max())
    np.testing.assert_allclose(sure, np.log(expected)[ids], rtol=1e-5)
    cold, _ = draw_places(
        of(logits), np.zeros(20_000, np.int64), np.full(20_000, 3), SamplingConfig(seed=5, temperature=0.25), 0
    )
    assert (cold == 2).mean() > shares[2] + 0.2


def test_a_step_that_asks_for_nothing_draws_nothing() -> None:
    nothing = np.zeros(0, np.int64)
    ids, sure = draw_places(of(torch.zeros(0, 9)), nothing, nothing, SamplingConfig(seed=1), 0)
    assert ids.shape == sure.shape == (0,)


def test_the_same_seed_fills_the_same_canvas_and_another_one_another(model: PoetTransformer) -> None:
    one = fill(model, plan(), SamplingConfig(seed=1))
    assert fill(model, plan(), SamplingConfig(seed=1)) == one
    assert fill(model, plan(), SamplingConfig(seed=2)) != one


def test_noise_on_confidences_changes_what_is_kept_and_greedy_outputs_have_none(model: PoetTransformer) -> None:
    sampling = SamplingConfig(seed=1, temperature=0.01)
    assert fill(model, plan(choice_temperature=50.0), sampling) != fill(model, plan(choice_temperature=0.0), sampling)
    assert fill(model, plan(choice_temperature=50.0)) == fill(model, plan(choice_temperature=0.0))


@pytest.mark.parametrize("order", ORDERS)
def test_a_batch_of_mixed_lengths_and_steps_is_filled_as_each_row_alone(model: PoetTransformer, order: Any) -> None:
    rows = [(prefix(seed, pieces=3 * seed + 1), plan(steps, order=order)) for seed, steps in enumerate((5, 9, 23))]
    rows.append((prefix(7), plan(6, [(int(place), VOCABULARY.video_range[0]) for place in PLACES.video[0].ravel()])))
    alone = [fill_canvases(model, [ids], [Canvas(GRAMMAR, chosen, GREEDY)])[0] for ids, chosen in rows]
    together = fill_canvases(model, [ids for ids, _ in rows], [Canvas(GRAMMAR, chosen, GREEDY) for _, chosen in rows])
    assert together == alone
    assert len({tuple(ids) for ids in alone}) == len(rows)


def test_every_id_is_the_one_that_the_model_would_draw_for_its_place(model: PoetTransformer) -> None:
    """One step draws everything from an empty canvas: the reference's own argmax, place by place."""
    given_ids = prefix()
    canvas = Canvas(GRAMMAR, plan(1), GREEDY)
    scene = torch.tensor([[*given_ids, *canvas.shown()]])
    layout = SceneLayout.from_prefix_lengths(
        torch.tensor([len(given_ids)]), torch.tensor([scene.shape[1]]), scene.shape[1], parallel=torch.tensor([True])
    )
    with torch.inference_mode():
        logits = model.logits(model(scene, layout))[0]
    low, high = place_ranges(GRAMMAR)
    expected = [
        int(logits[len(given_ids) + place - 1, low[place] : high[place]].argmax()) + int(low[place])
        for place in range(len(low))
    ]
    assert fill(model, plan(1)) == expected


def test_guidance_at_one_is_none_and_at_two_another_output(model: PoetTransformer) -> None:
    given_ids, guide_ids = prefix(3), prefix(3, drop_text=True)

    def written(scale: float, *, guided: bool) -> list[int]:
        canvas = Canvas(GRAMMAR, plan(), SamplingConfig(seed=4, guidance_scale=scale))
        [ids] = fill_canvases(model, [given_ids], [canvas], [guide_ids if guided else None])
        return ids

    plain = written(1.0, guided=False)
    assert written(1.0, guided=True) == plain
    assert written(3.0, guided=True) != plain
    # Guided and unguided rows in one batch do not touch each other.
    canvases = [Canvas(GRAMMAR, plan(), SamplingConfig(seed=4, guidance_scale=scale)) for scale in (3.0, 1.0)]
    both = fill_canvases(model, [given_ids, given_ids], canvases, [guide_ids, None])
    assert both == [written(3.0, guided=True), plain]


def test_guidance_in_some_steps_asks_for_the_guide_in_these_alone(
    model: PoetTransformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows: list[int] = []
    hidden = maskgit._hidden
    monkeypatch.setattr(
        maskgit, "_hidden", lambda model, asked, contexts: rows.append(len(asked)) or hidden(model, asked, contexts)
    )

    def written(**shares: float) -> list[int]:
        canvas = Canvas(GRAMMAR, plan(8, **shares), SamplingConfig(seed=4, guidance_scale=3.0))
        rows.clear()
        [ids] = fill_canvases(model, [prefix(3)], [canvas], [prefix(3, drop_text=True)])
        return ids

    whole = written()
    assert rows == [2] * 8
    first = written(guidance_stop=0.375)
    assert rows == [2] * 3 + [1] * 5
    last = written(guidance_start=0.75)
    assert rows == [1] * 6 + [2] * 2
    none = written(guidance_stop=0)
    assert rows == [1] * 8
    assert len({tuple(ids) for ids in (whole, first, last, none)}) == 4
    [plain] = fill_canvases(model, [prefix(3)], [Canvas(GRAMMAR, plan(8), SamplingConfig(seed=4))])
    assert none == plain


@pytest.mark.parametrize(
    ("num_steps", "start", "stop", "guided"),
    [
        (8, 0, 0.375, [0, 1, 2]),
        (1, 0, 0.375, [0]),
        (4, 0.4, 0.6, [2]),
        (5, 0.95, 1, [4]),
        (6, 0.5, 0.5, []),
        (3, 0, 1, [0, 1, 2]),
    ],
)
def test_guidance_is_in_force_in_one_step_at_least(
    num_steps: int, start: float, stop: float, guided: list[int]
) -> None:
    assert list(plan(8, guidance_start=start, guidance_stop=stop).guided_steps(num_steps)) == guided


@pytest.mark.parametrize("width", [5, 64, 300])
def test_one_number_draws_by_the_shares(width: int) -> None:
    scores = 3 * torch.randn(1, width, generator=torch.Generator().manual_seed(width))
    scores[0, 1::3] = -math.inf
    drawn = maskgit._draw(scores.expand(20_000, -1), torch.Generator().manual_seed(0))
    found = torch.bincount(drawn, minlength=width) / len(drawn)
    torch.testing.assert_close(found, scores[0].softmax(-1), rtol=0, atol=0.015)
    assert (found[1::3] == 0).all()


@pytest.mark.parametrize("shares", [(-0.1, 1), (0.6, 0.5), (0, 1.1), (float("nan"), 1)])
def test_guidance_wants_shares_of_the_steps(shares: tuple[float, float]) -> None:
    with pytest.raises(ConfigError, match="shares of the steps"):
        ParallelDecoding(guidance_start=shares[0], guidance_stop=shares[1])


def test_progress_counts_known_ids_up_to_all(model: PoetTransformer) -> None:
    seen: list[int] = []
    fill_canvases(model, [prefix()], [Canvas(GRAMMAR, plan(7), GREEDY)], progress=seen.append)
    assert len(seen) == 7
    assert seen == sorted(set(seen))
    assert seen[-1] == len(place_ranges(GRAMMAR)[0])


def test_stages_of_an_order_come_one_after_another() -> None:
    frames, levels = len(PLACES.video), len(PLACES.audio)
    assert len(plan(order="whole").stages) == 1
    parts = plan(20, order="parts")
    assert len(parts.stages) == 1 + levels
    assert parts.num_steps == 20
    by_frame = plan(20, order="frames")
    assert len(by_frame.stages) == frames + levels
    assert by_frame.num_steps == 20
    canvas = Canvas(GRAMMAR, by_frame, GREEDY)
    assert set(canvas.asked().tolist()) == set(PLACES.video[0].ravel().tolist())
    # Steps go by size: a frame's share of them is about its share of places.
    total = PLACES.video.size + PLACES.audio.size
    assert by_frame.stages[0].num_steps == pytest.approx(1 + 15 * PLACES.video[0].size / total, abs=1)
    with pytest.raises(ConfigError, match="in a step at least; got 2 steps"):
        plan(2, order="frames")


def test_a_stage_that_is_all_pinned_is_passed_over() -> None:
    pinned = [(int(place), VOCABULARY.video_range[0]) for place in PLACES.video[0].ravel()]
    canvas = Canvas(GRAMMAR, plan(12, pinned, order="frames"), GREEDY)
    assert set(canvas.asked().tolist()) == set(PLACES.video[1].ravel().tolist())
    everything = Canvas((Segment(1, 3, 4),), CanvasPlan(stages=(Stage(0, 1, 5),), mask_id=1), GREEDY)
    assert everything.done


def test_places_of_an_output_are_those_of_its_codes() -> None:
    rng = np.random.default_rng(0)
    scene = random_scene(TASK.name, VOCABULARY, rng, geometry=GEOMETRY)
    packed = pack(scene, VOCABULARY)
    output = packed.ids[packed.prefix_len :]
    low = VOCABULARY.video_range[0]
    assert scene.video_out is not None
    assert scene.audio_out is not None
    np.testing.assert_array_equal(output[PLACES.video] - low, scene.video_out)
    for level, codes in enumerate(scene.audio_out):
        np.testing.assert_array_equal(output[PLACES.audio[level]] - VOCABULARY.audio_range(level)[0], codes)


def test_a_filled_canvas_unpacks(model: PoetTransformer) -> None:
    scene = unpack(np.array([*prefix(), *fill(model, plan())]), VOCABULARY)
    assert scene.parallel
    assert scene.video_out is not None
    assert scene.video_out.shape == GEOMETRY.latent_shape


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Stage(3, 3, 1), "start < stop"),
        (lambda: Stage(0, 3, 0), "at least 1, got 0"),
        (lambda: CanvasPlan(stages=(), mask_id=1), "one or more"),
        (lambda: CanvasPlan(stages=(Stage(0, 4, 1), Stage(3, 6, 1)), mask_id=1), "apart"),
        (lambda: CanvasPlan(stages=(Stage(0, 4, 1),), mask_id=1, schedule="sine"), "cosine, linear, square"),  # type: ignore[arg-type]
        (lambda: plan(choice_temperature=-1.0), "choice_temperature"),
        (lambda: plan(choice_temperature=math.nan), "choice_temperature"),
        (lambda: plan(0), "at least 1"),
        (lambda: plan(order="rows"), "whole, parts, frames"),
        (lambda: plan(pinned=[(5, 300), (5, 301)]), "pinned twice"),
        (lambda: Canvas(GRAMMAR, plan(pinned=[(5, 3)]), GREEDY), "got 3 at 5"),
        (lambda: Canvas(GRAMMAR, plan(pinned=[(10_000, 3)]), GREEDY), "got 3 at 10000"),
        (lambda: Canvas(GRAMMAR, CanvasPlan(stages=(Stage(0, 9, 1),), mask_id=1), GREEDY), "every unknown place"),
        (lambda: Canvas(GRAMMAR, CanvasPlan(stages=(Stage(0, 9999, 1),), mask_id=1), GREEDY), "every unknown place"),
        (lambda: plan_canvas(ParallelDecoding(), get_task("captioning"), VOCABULARY), "writes a text"),
    ],
)
def test_what_cannot_be_filled_is_refused(make: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        make()


def test_an_output_of_open_length_has_no_canvas() -> None:
    with pytest.raises(VocabularyError, match="no canvas"):
        Canvas((Segment(5, 3, 9, stop=1),), CanvasPlan(stages=(Stage(0, 5, 1),), mask_id=1), GREEDY)


def test_damaged_weights_are_told(model: PoetTransformer) -> None:
    damaged = PoetTransformer(CONFIG).eval()
    damaged.load_state_dict({name: tensor * math.nan for name, tensor in model.state_dict().items()})
    for sampling in (GREEDY, SamplingConfig(seed=0)):
        with pytest.raises(CheckpointError, match="NaN or infinity"):
            fill(damaged, plan(), sampling)


def test_a_missing_seed_is_drawn_once(model: PoetTransformer) -> None:
    canvas = Canvas(GRAMMAR, plan(), SamplingConfig())
    assert canvas.sampling.seed is not None
    [first] = fill_canvases(model, [prefix()], [canvas])
    again = Canvas(GRAMMAR, plan(), dataclasses.replace(canvas.sampling))
    assert fill_canvases(model, [prefix()], [again]) == [first]
