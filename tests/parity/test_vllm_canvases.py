"""Canvases through vLLM against the reference: the same ids, greedy and with seeded noise, of all lengths and steps."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from poet.errors import ConfigError, PoetError
from poet.generation.canvas import ORDERS, ParallelDecoding, plan_canvas
from poet.generation.engine import GenerationRequest, TorchEngine
from poet.generation.maskgit import SCHEDULES
from poet.generation.sampling import SamplingConfig
from poet.grammar import check_output, max_output_length
from poet.sequence import output_grammar, output_places, pack_prefix
from poet.tasks import TASKS
from poet.testing import random_scene, save_model, sharp_model, tiny_config, tiny_geometry, tiny_vocabulary
from poet_serving.engine import VLLMEngine

VOCABULARY = tiny_vocabulary()
CONFIG = tiny_config(
    VOCABULARY, hidden_size=96, ffn_hidden_size=176, num_layers=3, num_heads=6, head_dim=32, scene_length=512
)
GREEDY = SamplingConfig(temperature=0.0, seed=0)
PARALLEL_TASKS = [task for task in TASKS.values() if not task.writes_text]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(sharp_model(CONFIG, seed=11, gains=True), tmp_path_factory.mktemp("bundle"))


@pytest.fixture(scope="module")
def engine(bundle: Path) -> Iterator[VLLMEngine]:
    """Seven slots: an odd number, so that pairs leave one empty."""
    with VLLMEngine(bundle, dtype="float32", max_num_seqs=7, decodings=["autoregressive", "parallel"]) as engine:
        yield engine


@pytest.fixture(scope="module")
def reference(bundle: Path) -> Iterator[TorchEngine]:
    with TorchEngine(bundle, max_batch_size=5) as engine:
        yield engine


def request(number: int, sampling: SamplingConfig = GREEDY, *, pinned: bool = False) -> GenerationRequest:
    """One of many tasks, lengths, orders, schedules and numbers of steps, all of which `number` decides."""
    rng = np.random.default_rng([5, number])
    task = PARALLEL_TASKS[number % len(PARALLEL_TASKS)]
    geometry = tiny_geometry(VOCABULARY, num_latent_frames=3 + number % 3)
    scene = random_scene(task, VOCABULARY, rng, geometry=geometry, num_text_pieces=2 + 3 * number, parallel=True)
    shapes: dict[str, Any] = {
        "video_latent_shape": None if scene.video_out is None else scene.video_out.shape,
        "num_audio_latents": None if scene.audio_out is None else scene.audio_out.shape[1],
    }
    decoding = ParallelDecoding(
        num_steps=9 + 2 * (number % 4),
        order=ORDERS[number % 3],  # type: ignore[arg-type]
        schedule=SCHEDULES[number // 3 % 3],  # type: ignore[arg-type]
        guidance_start=(0.0, 0.5, 0.0)[number % 3],
        guidance_stop=(0.375, 1.0, 1.0)[number % 3],
    )
    pins: list[tuple[int, int]] = []
    if pinned:
        places = output_places(task, VOCABULARY, **shapes)
        if places.video is not None:
            pins = [(int(place), VOCABULARY.video_range[0] + 3) for place in places.video[0].ravel()]
    return GenerationRequest(
        prefix_ids=tuple(pack_prefix(scene, VOCABULARY).tolist()),
        grammar=output_grammar(task, VOCABULARY, **shapes),
        sampling=sampling,
        canvas=plan_canvas(decoding, task, VOCABULARY, pinned=tuple(pins), **shapes),
    )


def guided(number: int, sampling: SamplingConfig = GREEDY) -> GenerationRequest:
    """The same with a guide of another length."""
    plain = request(number, dataclasses.replace(sampling, guidance_scale=(1.5, 2.0, 3.0, 0.0)[number % 4]))
    low, high = VOCABULARY.text_range
    text = (low + (7 * place + number) % (high - low) for place in range(5 + number % 4))
    return dataclasses.replace(plain, guide_ids=(*plain.prefix_ids[:1], *text, *plain.prefix_ids[1:]))


def assert_same(engine: VLLMEngine, reference: TorchEngine, requests: list[GenerationRequest]) -> None:
    """Allow for no other id: weights are drawn so that no two ids are nearly as likely."""
    ours, theirs = engine.generate(requests), reference.generate(requests)
    for number, (one, other, asked) in enumerate(zip(ours, theirs, requests, strict=True)):
        check_output(asked.grammar, one)
        assert one == other, f"request {number}: {sum(a != b for a, b in zip(one, other, strict=True))} ids differ"


def test_greedy_canvases_are_the_references(engine: VLLMEngine, reference: TorchEngine) -> None:
    assert_same(engine, reference, [request(number, pinned=number % 2 == 0) for number in range(18)])


def test_canvases_with_seeded_noise_are_the_references(engine: VLLMEngine, reference: TorchEngine) -> None:
    samplings = [
        SamplingConfig(temperature=1.0, seed=3),
        SamplingConfig(temperature=0.7, seed=4, top_k=9),
        SamplingConfig(temperature=1.3, seed=5, top_p=0.8),
    ]
    assert_same(engine, reference, [request(number, samplings[number % 3]) for number in range(12)])


def test_guided_canvases_are_the_references_beside_plain_ones(engine: VLLMEngine, reference: TorchEngine) -> None:
    noisy = SamplingConfig(temperature=1.0, seed=8)
    pairs = [guided(number, GREEDY if number % 2 else noisy) for number in range(16)]
    assert_same(engine, reference, [*pairs, *(request(number) for number in range(3))])


def test_both_ways_of_writing_in_one_call(engine: VLLMEngine, reference: TorchEngine) -> None:
    requests = [request(0), dataclasses.replace(request(3), canvas=None), guided(1), request(2)]
    assert_same(engine, reference, requests)


def test_penalised_repetition_writes_the_references_ids(engine: VLLMEngine, reference: TorchEngine) -> None:
    """One id after another, alone and in guided pairs."""
    requests = []
    for number in range(6):
        plain = dataclasses.replace(guided(number) if number % 2 else request(number), canvas=None)
        sampling = dataclasses.replace(plain.sampling, repetition_penalty=1.9, repetition_window=(0, 7, 64)[number % 3])
        requests.append(dataclasses.replace(plain, sampling=sampling))
    assert_same(engine, reference, requests)
    off = {"repetition_penalty": 1.0}
    without = [dataclasses.replace(one, sampling=dataclasses.replace(one.sampling, **off)) for one in requests]
    changed = [one != other for one, other in zip(engine.generate(requests), engine.generate(without), strict=True)]
    assert all(changed)
    with pytest.raises(ConfigError, match="one after another"):
        engine.generate([dataclasses.replace(request(0), sampling=requests[0].sampling)])


def test_what_is_written_does_not_depend_on_what_else_is(engine: VLLMEngine) -> None:
    requests = [guided(1), request(2), request(5, SamplingConfig(seed=2))]
    assert [engine.generate([one])[0] for one in requests] == engine.generate(requests)


def test_progress_reaches_the_end_and_an_interrupted_engine_goes_on(engine: VLLMEngine) -> None:
    requests = [request(0), guided(1)]
    seen: list[tuple[int, int]] = []
    expected = engine.generate(requests, lambda done, total: seen.append((done, total)))
    total = sum(max_output_length(one.grammar) for one in requests)
    assert seen[-1] == (total, total)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)

    def stop(done: int, _: int) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        engine.generate(requests, stop)
    assert engine.generate(requests) == expected


def test_what_the_engine_cannot_write_is_refused_before_anything_is_started(bundle: Path, engine: VLLMEngine) -> None:
    good = request(0)
    assert good.canvas is not None
    low = VOCABULARY.video_range[0]
    for bad, words in (
        (dataclasses.replace(good, canvas=dataclasses.replace(good.canvas, mask_id=10**6)), "mask_id"),
        (dataclasses.replace(good, canvas=dataclasses.replace(good.canvas, pinned=((0, low),))), "pinned"),
        (dataclasses.replace(good, prefix_ids=(10**6,)), "given ids"),
    ):
        with pytest.raises(ConfigError, match=words):
            engine.generate([good, bad])
    with pytest.raises(ConfigError, match="one vLLM engine at a time"):
        VLLMEngine(bundle)
    with pytest.raises(ConfigError, match="decodings"):
        VLLMEngine(bundle, decodings=["backwards"])


def test_vllms_own_requests_which_ask_for_nothing_are_answered() -> None:
    from vllm import PoolingParams
    from vllm.v1.pool.metadata import PoolingMetadata

    from poet_serving.maskgit import CanvasPooler

    metadata = PoolingMetadata(
        prompt_lens=torch.tensor([3, 4]),
        prompt_token_ids=None,
        prompt_token_ids_cpu=None,
        pooling_params=[PoolingParams(task="token_classify"), PoolingParams(task="token_classify")],
        pooling_states=[],
    )
    metadata.build_pooling_cursor(np.array([3, 4]), torch.tensor([3, 4]), torch.device("cpu"))
    pooler = CanvasPooler(lambda hidden, ids: hidden.new_zeros(len(hidden), CONFIG.vocab_size)[:, ids])
    assert [tuple(answer.shape) for answer in pooler.forward(torch.zeros(7, 4), metadata)] == [(0, 2), (0, 2)]


def test_outputs_come_as_they_are_finished_while_requests_are_still_being_taken(engine: VLLMEngine) -> None:
    """Canvases and outputs that are written in turn, guided and not, in one stream; what is given up leaves nothing."""
    asked = []
    for number in range(24):
        one = guided(number) if number % 3 == 0 else request(number)
        asked.append(dataclasses.replace(one, canvas=None) if number % 4 == 1 else one)
    expected = engine.generate(asked)
    taken: list[int] = []

    def source() -> Iterator[GenerationRequest]:
        for number, one in enumerate(asked):
            taken.append(number)
            yield one

    stream = engine.stream(source())
    first = next(stream)
    assert len(taken) <= 2 * 7
    found = dict([first, *stream])
    assert [found[number] for number in range(24)] == expected
    given_up = engine.stream(asked)
    next(given_up)
    with pytest.raises(ConfigError, match="one stream at a time"):
        engine.generate(asked[:1])
    given_up.close()
    for vllm in (engine._vllm, engine._canvases):
        assert not vllm.has_unfinished_requests()
    assert engine.generate(asked[:5]) == expected[:5]


def test_a_request_that_is_parted_from_its_guide_stops_the_engine_rather_than_writing_wrong_ids() -> None:
    from vllm import PoolingParams
    from vllm.v1.pool.metadata import PoolingMetadata

    from poet.generation.maskgit import Canvas
    from poet_serving.guidance import Half, guidance_arguments
    from poet_serving.maskgit import CanvasPooler, canvas_arguments

    asked = guided(1)
    assert asked.canvas is not None
    canvas = Canvas(asked.grammar, asked.canvas, asked.sampling)
    length = len(asked.prefix_ids) + len(canvas.ids)
    pooler = CanvasPooler(lambda hidden, ids: hidden.new_zeros(len(hidden), CONFIG.vocab_size)[:, ids])
    for is_guide in (False, True):
        arguments = canvas_arguments(len(asked.prefix_ids), canvas) | guidance_arguments(Half("a", is_guide, 2.0))
        params = PoolingParams(task="token_classify", extra_kwargs=arguments)
        metadata = PoolingMetadata(
            prompt_lens=torch.tensor([length]),
            prompt_token_ids=None,
            prompt_token_ids_cpu=None,
            pooling_params=[params],
            pooling_states=[],
        )
        metadata.build_pooling_cursor(np.array([length]), torch.tensor([length]), torch.device("cpu"))
        with pytest.raises(PoetError, match="with their guides"):
            pooler.forward(torch.zeros(length, 4), metadata)
