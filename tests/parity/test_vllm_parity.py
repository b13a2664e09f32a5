"""vLLM against the reference transformer: the same weights, greedy, id for id.

The reference is asked once for every output: given the prefix and all ids that vLLM wrote, which legal id is likeliest
at each place? If that is the written id everywhere, writing id by id would have given the same output.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from poet.generation.engine import GenerationRequest, TorchEngine
from poet.generation.sampling import SamplingConfig
from poet.grammar import GrammarState, check_output, max_output_length
from poet.model.attention import SceneLayout
from poet.model.transformer import PoetTransformer
from poet.sequence import output_grammar, pack_prefix
from poet.tasks import TASKS
from poet.testing import random_scene, save_model, sharp_model, tiny_config, tiny_geometry, tiny_vocabulary
from poet_serving.engine import VLLMEngine
from poet_serving.settings import BLOCK_SIZE

VOCABULARY = tiny_vocabulary()
CONFIG = tiny_config(
    VOCABULARY, hidden_size=96, ffn_hidden_size=176, num_layers=3, num_heads=6, head_dim=32, scene_length=512
)
GREEDY = SamplingConfig(temperature=0.0, seed=0)


@pytest.fixture(scope="module")
def model() -> PoetTransformer:
    return sharp_model(CONFIG, seed=11, gains=True)


@pytest.fixture(scope="module")
def bundle(model: PoetTransformer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(model, tmp_path_factory.mktemp("bundle"))


def requests_of_every_task() -> list[GenerationRequest]:
    """One request a task, and three more of the default one: 17 of 14 lengths."""
    rng = np.random.default_rng(5)
    requests = []
    for number, task in enumerate([*TASKS, *3 * ["text_to_video_audio"]]):
        geometry = tiny_geometry(VOCABULARY, num_latent_frames=3 + number % 3)
        scene = random_scene(task, VOCABULARY, rng, geometry=geometry, num_text_pieces=2 + 3 * number)
        grammar = output_grammar(
            task,
            VOCABULARY,
            video_latent_shape=None if scene.video_out is None else scene.video_out.shape,
            num_audio_latents=None if scene.audio_out is None else scene.audio_out.shape[1],
            max_text_pieces=37,
        )
        prefix = tuple(pack_prefix(scene, VOCABULARY).tolist())
        requests.append(GenerationRequest(prefix_ids=prefix, grammar=grammar, sampling=GREEDY))
    return requests


def guided(request: GenerationRequest, number: int) -> GenerationRequest:
    """The same with a guide: its text replaced by <null>, or, every third, another prefix of another length."""
    low, high = VOCABULARY.text_range
    null = VOCABULARY.special("<null>")
    guide = [null if low <= id < high else id for id in request.prefix_ids]
    if number % 3 == 0 or guide == list(request.prefix_ids):
        guide = [*guide[:1], *(low + (7 * place + number) % (high - low) for place in range(5 + number)), *guide[1:]]
    scale = (1.5, 2.0, 3.0, 0.0)[number % 4]
    sampling = dataclasses.replace(request.sampling, guidance_scale=scale)
    return dataclasses.replace(request, guide_ids=tuple(guide), sampling=sampling)


REQUESTS = requests_of_every_task()
GUIDED = [guided(request, number) for number, request in enumerate(REQUESTS)]
MIXED = [*GUIDED, *REQUESTS[:3]]


def logits_of(model: PoetTransformer, prefix: Sequence[int], output: Sequence[int], prefix_len: int) -> torch.Tensor:
    """(places of the output, vocabulary) from one pass over prefix and output."""
    ids = torch.tensor([[*prefix, *output]])
    layout = SceneLayout.from_prefix_lengths(torch.tensor([prefix_len]), torch.tensor([ids.shape[1]]), ids.shape[1])
    return model.logits(model(ids, layout))[0, len(prefix) - 1 : -1]


@torch.inference_mode()
def likeliest(
    model: PoetTransformer, request: GenerationRequest, output: Sequence[int], prefix_len: int
) -> tuple[list[int], float]:
    """The legal id with the largest logit at every place of the output, and the smallest lead over the second."""
    logits = logits_of(model, request.prefix_ids, output, prefix_len)
    if request.guide_ids is not None:
        steered_from = logits_of(model, request.guide_ids, output, len(request.guide_ids))
        logits = steered_from + request.sampling.guidance_scale * (logits - steered_from)
    legal = torch.zeros_like(logits, dtype=torch.bool)
    state = GrammarState(request.grammar)
    for place, written in enumerate(output):
        low, high, stop = state.allowed
        legal[place, low:high] = True
        if stop is not None:
            legal[place, stop] = True
        state.advance(written)
    best = logits.masked_fill(~legal, -torch.inf).topk(2, dim=-1)
    return best.indices[:, 0].tolist(), float((best.values[:, 0] - best.values[:, 1]).min())


@pytest.fixture(scope="module")
def opened(bundle: Path) -> tuple[list[list[int]], list[list[int]]]:
    """All requests in one batch, none ever preempted: by the kernels one after another, and by vLLM's layers."""
    with VLLMEngine(bundle, dtype="float32", max_num_seqs=len(REQUESTS)) as engine:
        outputs = engine.generate(REQUESTS)
        network = engine._vllm.model_executor.driver_worker.worker.model_runner.model.model
        assert network.takes_direct_layers
        network.takes_direct_layers = False
        return outputs, engine.generate(REQUESTS)


@pytest.fixture(scope="module")
def outputs(opened: tuple[list[list[int]], list[list[int]]]) -> list[list[int]]:
    return opened[0]


@pytest.fixture(scope="module")
def preempted(bundle: Path) -> tuple[list[list[int]], list[str]]:
    """Seven requests at a time in a cache for two of the longest; also the names of those that were preempted."""
    blocks = 1 + 2 * (CONFIG.scene_length // BLOCK_SIZE)
    with VLLMEngine(bundle, dtype="float32", max_num_seqs=7, num_cache_blocks=blocks) as engine:
        names = count_preemptions(engine)
        return engine.generate(REQUESTS), names


def count_preemptions(engine: VLLMEngine) -> list[str]:
    """A list that will hold the name of every request that is preempted after it has begun to write."""
    scheduler = engine._vllm.engine_core.engine_core.scheduler
    preempt, names = scheduler._preempt_request, []

    def counted(request: Any, *arguments: Any, **keywords: Any) -> Any:
        if request.num_output_tokens:
            names.append(request.request_id)
        return preempt(request, *arguments, **keywords)

    scheduler._preempt_request = counted
    return names


@pytest.fixture(scope="module")
def guided_outputs(bundle: Path) -> tuple[list[list[int]], list[list[int]]]:
    """Guided requests and three others: 34 halves at once, and in 7 slots, of which no pair can take the last alone."""
    with VLLMEngine(bundle, dtype="float32", max_num_seqs=2 * len(GUIDED)) as engine:
        together = engine.generate(MIXED)
    with VLLMEngine(bundle, dtype="float32", max_num_seqs=7) as engine:
        return together, engine.generate(MIXED)


@pytest.fixture(scope="module")
def guided_preempted(bundle: Path) -> tuple[list[list[int]], list[str]]:
    """Seven slots in a cache for one pair of the longest; also the names of the requests that were preempted."""
    blocks = 1 + 2 * (CONFIG.scene_length // BLOCK_SIZE)
    with VLLMEngine(bundle, dtype="float32", max_num_seqs=7, num_cache_blocks=blocks) as engine:
        names = count_preemptions(engine)
        return engine.generate(MIXED), names


def test_requests_differ_in_task_and_length() -> None:
    assert len(REQUESTS) >= 16
    assert len({len(request.prefix_ids) for request in REQUESTS}) >= 13
    assert len({max_output_length(request.grammar) for request in REQUESTS}) >= 5


@pytest.mark.parametrize("index", range(len(REQUESTS)))
def test_greedy_ids_equal_those_of_the_reference(model: PoetTransformer, outputs: list[list[int]], index: int) -> None:
    request, output = REQUESTS[index], outputs[index]
    check_output(request.grammar, output)
    assert likeliest(model, request, output, len(request.prefix_ids))[0] == output


def test_no_two_likeliest_ids_lie_close_enough_for_rounding_to_choose(
    model: PoetTransformer, outputs: list[list[int]]
) -> None:
    leads = [
        likeliest(model, request, output, len(request.prefix_ids))[1]
        for request, output in zip(REQUESTS, outputs, strict=True)
    ]
    print(f"smallest lead of the likeliest id over the second: {min(leads):.2e}")
    # Logits have a deviation of about 2 here; float32 sums of this length agree to about 1e-5.
    assert min(leads) > 1e-4


def test_a_prefix_read_causally_would_give_other_ids(model: PoetTransformer, outputs: list[list[int]]) -> None:
    same = [
        likeliest(model, request, output, prefix_len=0)[0] == output
        for request, output in zip(REQUESTS, outputs, strict=True)
    ]
    assert not any(same)


def test_outputs_vary(outputs: list[list[int]]) -> None:
    longest = max(outputs, key=len)
    assert len(set(longest)) > 20


def test_vllms_own_layers_write_the_same_ids(opened: tuple[list[list[int]], list[list[int]]]) -> None:
    assert opened[0] == opened[1]


def test_preempted_requests_write_the_same_ids(
    outputs: list[list[int]], preempted: tuple[list[list[int]], list[str]]
) -> None:
    again, names = preempted
    assert len(set(names)) >= 3, "the cache was too large to force preemption"
    assert again == outputs


@pytest.mark.parametrize("index", range(len(MIXED)))
def test_guided_ids_equal_those_of_the_reference(
    model: PoetTransformer, guided_outputs: tuple[list[list[int]], list[list[int]]], index: int
) -> None:
    request, output = MIXED[index], guided_outputs[0][index]
    check_output(request.grammar, output)
    ids, lead = likeliest(model, request, output, len(request.prefix_ids))
    assert ids == output
    assert lead > 1e-5


def test_guidance_changes_what_is_written(
    outputs: list[list[int]], guided_outputs: tuple[list[list[int]], list[list[int]]]
) -> None:
    assert not any(one == other for one, other in zip(outputs, guided_outputs[0], strict=False))


def test_unguided_requests_write_the_same_ids_beside_guided_ones(
    outputs: list[list[int]], guided_outputs: tuple[list[list[int]], list[list[int]]]
) -> None:
    assert guided_outputs[0][len(GUIDED) :] == outputs[:3]


def test_pairs_in_an_odd_number_of_slots_write_the_same_ids(
    guided_outputs: tuple[list[list[int]], list[list[int]]],
) -> None:
    together, in_seven_slots = guided_outputs
    assert in_seven_slots == together


def test_preempted_pairs_write_the_same_ids(
    guided_outputs: tuple[list[list[int]], list[list[int]]], guided_preempted: tuple[list[list[int]], list[str]]
) -> None:
    again, names = guided_preempted
    assert sum("guide" in name for name in names) >= 3, "the cache was too large to force preemption"
    assert again == guided_outputs[0]


def test_a_scale_of_1_writes_what_no_guidance_does(outputs: list[list[int]], bundle: Path) -> None:
    unguided = [
        dataclasses.replace(request, sampling=dataclasses.replace(request.sampling, guidance_scale=1.0))
        for request in GUIDED
    ]
    with VLLMEngine(bundle, dtype="float32", max_num_seqs=len(REQUESTS)) as engine:
        assert engine.generate(unguided) == outputs
    with TorchEngine(bundle) as torch_engine:
        assert torch_engine.generate(unguided[:3]) == torch_engine.generate(REQUESTS[:3])


def test_the_torch_engine_writes_the_same_guided_ids(
    bundle: Path, guided_outputs: tuple[list[list[int]], list[list[int]]]
) -> None:
    with TorchEngine(bundle) as engine:
        assert engine.generate(MIXED) == guided_outputs[0]
