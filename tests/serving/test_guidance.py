"""Guided pairs in vLLM: the logits processor on its own, and the scheduler under aborts with a tiny model."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm import SamplingParams
from vllm.v1.sample.logits_processor import BatchUpdate, MoveDirectionality

from poet.errors import ConfigError, PoetError
from poet.generation.engine import GenerationRequest
from poet.generation.sampling import SamplingConfig
from poet.grammar import check_output
from poet.model.transformer import PoetTransformer
from poet.sequence import output_grammar
from poet.testing import save_model, tiny_config, tiny_vocabulary
from poet_serving.engine import VLLMEngine
from poet_serving.guidance import GUIDANCE_KEY, GuidanceLogitsProcessor, Half, guidance_arguments

VOCABULARY = tiny_vocabulary()
CONFIG = dataclasses.replace(tiny_config(VOCABULARY), head_dim=32)
GRAMMAR = output_grammar("text_to_video_audio", VOCABULARY, video_latent_shape=(2, 3, 5), num_audio_latents=7)
NUM_IDS = 53


def processor_of(*rows: tuple[Half | None, list[int]]) -> GuidanceLogitsProcessor:
    processor = GuidanceLogitsProcessor(None, torch.device("cpu"), False)
    added = [
        (row, SamplingParams(extra_args=None if half is None else guidance_arguments(half)), None, output)
        for row, (half, output) in enumerate(rows)
    ]
    processor.update_state(BatchUpdate(batch_size=len(rows), removed=[], added=added, moved=[]))
    return processor


ASKED, GUIDE = Half("a", False, 3.0), Half("a", True, 3.0)


def test_both_halves_of_a_pair_get_the_guided_logits_and_others_keep_theirs() -> None:
    other = Half("b", False, 0.5), Half("b", True, 0.5)
    processor = processor_of((GUIDE, []), (other[0], [7]), (None, [1, 2]), (ASKED, []), (other[1], [7]))
    logits = torch.randn(5, NUM_IDS)
    mixed = processor.apply(logits.clone())
    torch.testing.assert_close(mixed[3], logits[0] + 3 * (logits[3] - logits[0]))
    torch.testing.assert_close(mixed[1], (logits[1] + logits[4]) / 2)
    assert torch.equal(mixed[0], mixed[3])
    assert torch.equal(mixed[1], mixed[4])
    assert torch.equal(mixed[2], logits[2])


def test_pairs_are_found_again_when_rows_move() -> None:
    processor = processor_of((None, []), (ASKED, []), (GUIDE, []))
    moved = [(2, 0, MoveDirectionality.UNIDIRECTIONAL)]
    processor.update_state(BatchUpdate(batch_size=2, removed=[0], added=[], moved=moved))
    logits = torch.randn(2, NUM_IDS)
    torch.testing.assert_close(processor.apply(logits.clone())[1], logits[0] + 3 * (logits[1] - logits[0]))


@pytest.mark.parametrize("rows", [[(ASKED, [])], [(GUIDE, [])], [(ASKED, []), (Half("b", True, 3.0), [])]])
def test_a_half_alone_stops_the_engine(rows: list[tuple[Half, list[int]]]) -> None:
    with pytest.raises(PoetError, match="with their guides"):
        processor_of(*rows).apply(torch.zeros(len(rows), NUM_IDS))


def test_halves_at_different_places_stop_the_engine() -> None:
    with pytest.raises(PoetError, match="as many ids"):
        processor_of((ASKED, [3]), (GUIDE, [])).apply(torch.zeros(2, NUM_IDS))


@pytest.mark.parametrize(
    "given", ["a", ["a", True], ["a", 1, 2.0], [1, True, 2.0], ["a", True, -1.0], ["a", True, "x"]]
)
def test_malformed_arguments_are_refused(given: Any) -> None:
    with pytest.raises(ValueError, match="name of the pair"):
        GuidanceLogitsProcessor.validate_params(SamplingParams(extra_args={GUIDANCE_KEY: given}))


# ---------------------------------------------------------------------------------------------------- with an engine


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(3)
    return save_model(PoetTransformer(CONFIG), tmp_path_factory.mktemp("bundle"))


@pytest.fixture(scope="module")
def engine(bundle: Path) -> Iterator[VLLMEngine]:
    with VLLMEngine(bundle, dtype="float32", max_num_seqs=5) as engine:
        yield engine


def request_of(seed: int, *, scale: float = 2.0, text: int = 4) -> GenerationRequest:
    prefix = tuple(300 + (seed + place) % 50 for place in range(text))
    return GenerationRequest(
        prefix_ids=(1, 17, *prefix),
        grammar=GRAMMAR,
        sampling=SamplingConfig(seed=seed, guidance_scale=scale),
        guide_ids=(1, 17, *[11] * text),
    )


def test_what_a_seed_draws_does_not_depend_on_who_else_is_written(engine: VLLMEngine) -> None:
    requests = [request_of(seed, scale=(2.0, 1.0, 3.5)[seed % 3]) for seed in range(9)]
    together = engine.generate(requests)
    for request, output in zip(requests, together, strict=True):
        check_output(GRAMMAR, output)
        assert engine.generate([request]) == [output]


def test_an_interrupted_call_leaves_no_half_behind(engine: VLLMEngine) -> None:
    expected = engine.generate([request_of(4)])

    def interrupt(done: int, total: int) -> None:
        if done > 20:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        engine.generate([request_of(seed) for seed in range(7)], interrupt)
    scheduler = engine._vllm.engine_core.engine_core.scheduler
    assert scheduler.get_request_counts() == (0, 0)
    assert not scheduler._partners
    assert engine.generate([request_of(4)]) == expected


def submit(engine: VLLMEngine, request: GenerationRequest, name: str, halves: tuple[int, ...] = (0, 1)) -> list[str]:
    """Hand halves of a request to vLLM."""
    from poet_serving.writing import halves_of, sampling_parameters

    names = []
    for place, (suffix, prefix, half) in enumerate(halves_of(request)):
        if place in halves:
            parameters = sampling_parameters(request)
            parameters.extra_args |= half
            prompt = {"prompt_token_ids": list(prefix)}
            names.append(engine._vllm.add_request(name + suffix, prompt, parameters))
    return names


def finish(engine: VLLMEngine) -> dict[str, list[int]]:
    outputs: dict[str, list[int]] = {}
    for _ in range(500):
        if not engine._vllm.has_unfinished_requests():
            return outputs
        for change in engine._vllm.step():
            outputs.setdefault(change.request_id, []).extend(change.outputs[0].token_ids)
    raise AssertionError(f"still unfinished: {engine._vllm.engine_core.engine_core.scheduler.get_request_counts()}")


@pytest.mark.parametrize("steps", [0, 3])
@pytest.mark.parametrize("ended", [0, 1])
def test_ending_one_half_ends_the_other_and_nothing_else(engine: VLLMEngine, steps: int, ended: int) -> None:
    expected = engine.generate([request_of(8)])[0]
    names = submit(engine, request_of(6), "given up")
    submit(engine, request_of(8), "kept")
    for _ in range(steps):
        engine._vllm.step()
    scheduler = engine._vllm.engine_core.engine_core.scheduler
    engine._vllm.engine_core.abort_requests([names[ended]])
    assert not any(name in scheduler.requests for name in names)
    engine._vllm.abort_request(names, internal=True)  # what the caller of both halves does
    outputs = finish(engine)
    assert outputs["kept"] == outputs["kept-guide"] == expected[steps:]
    assert not scheduler._partners


def test_a_first_half_waits_for_the_second_while_others_are_written(engine: VLLMEngine) -> None:
    expected = engine.generate([request_of(5), request_of(7, scale=1.0)])
    submit(engine, request_of(5), "late", halves=(0,))
    submit(engine, request_of(7, scale=1.0), "alone")
    outputs: dict[str, list[int]] = {}
    while len(outputs.get("alone", [])) < len(expected[1]):
        for change in engine._vllm.step():
            outputs.setdefault(change.request_id, []).extend(change.outputs[0].token_ids)
    assert outputs == {"alone": expected[1]}
    engine._vllm.abort_request(["late"])
    scheduler = engine._vllm.engine_core.engine_core.scheduler
    assert not scheduler._single
    assert finish(engine) == {}


def test_an_engine_without_room_for_a_pair_refuses_guidance(bundle: Path, engine: VLLMEngine) -> None:
    room = engine._settings
    engine._settings = dataclasses.replace(room, num_cache_blocks=room.pair_blocks - 1)
    try:
        with pytest.raises(ConfigError, match="max_num_seqs must be at least 2"):
            engine.generate([request_of(1)])
        check_output(GRAMMAR, engine.generate([request_of(1, scale=1.0)])[0])
    finally:
        engine._settings = room


def test_a_guide_that_cannot_be_served_is_refused(engine: VLLMEngine) -> None:
    request = request_of(1)
    for guide, message in (
        ((), "at least one id"),
        ((1, CONFIG.vocab_size), "given ids must be in"),
        (CONFIG.scene_length * (7,), "ids together"),
    ):
        with pytest.raises(ConfigError, match=message):
            engine.generate([dataclasses.replace(request, guide_ids=guide)])
