"""Films through vLLM against the reference: the same ids, whatever stands before a scene and beside it in a batch."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from poet.errors import ConfigError
from poet.generation.engine import Engine, GenerationRequest, TorchEngine
from poet.generation.sampling import SamplingConfig
from poet.grammar import check_output
from poet.model.lora import read_adapter
from poet.testing import film_request, save_adapter, save_model, sharp_model, tiny_config, tiny_vocabulary
from poet_serving.engine import VLLMEngine
from poet_serving.settings import BLOCK_SIZE

VOCABULARY = tiny_vocabulary()
CONFIG = tiny_config(
    VOCABULARY,
    hidden_size=96,
    ffn_hidden_size=176,
    num_layers=4,
    num_heads=6,
    head_dim=32,
    scene_length=256,
    max_position_embeddings=1536,
)
NUM_SCENES = 6
PAD = VOCABULARY.special("<pad>")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(sharp_model(CONFIG, seed=11, gains=True), tmp_path_factory.mktemp("bundle"))


@pytest.fixture(scope="module")
def reference(bundle: Path) -> Iterator[TorchEngine]:
    with TorchEngine(bundle, max_batch_size=5) as engine:
        yield engine


@pytest.fixture
def engine(bundle: Path) -> Iterator[VLLMEngine]:
    """Seven slots: an odd number, so that pairs leave one empty."""
    decodings = ["autoregressive", "parallel"]
    with VLLMEngine(bundle, dtype="float32", max_num_seqs=7, decodings=decodings, num_scenes=NUM_SCENES) as engine:
        yield engine


def request(seed: int, num_earlier: int, **options: Any) -> GenerationRequest:
    return film_request(VOCABULARY, CONFIG, seed, num_earlier, **options)


def assert_same(engine: VLLMEngine, reference: TorchEngine, requests: list[GenerationRequest]) -> None:
    """Allow for no other id: weights are drawn so that no two ids are nearly as likely."""
    ours, theirs = engine.generate(requests), reference.generate(requests)
    for number, (one, other, asked) in enumerate(zip(ours, theirs, requests, strict=True)):
        check_output(asked.grammar, one)
        assert one == other, f"request {number}: {sum(a != b for a, b in zip(one, other, strict=True))} ids differ"


def film(engine: Engine, num_scenes: int, *, parallel: bool, guided: bool) -> list[list[int]]:
    """A film of which each scene is written behind the ones before it."""
    context: tuple[int, ...] = ()
    outputs = []
    for number in range(num_scenes):
        asked = request(number, 0, parallel=parallel, guided=guided)
        [output] = engine.generate([dataclasses.replace(asked, context_ids=context)])
        outputs.append(output)
        scene = (*request(number, 0).prefix_ids, *output)
        context += (*scene, *[PAD] * (CONFIG.scene_length - len(scene)))
    return outputs


@pytest.mark.parametrize("parallel", [False, True])
@pytest.mark.parametrize("guided", [False, True])
def test_films_of_five_scenes(engine: VLLMEngine, reference: TorchEngine, *, parallel: bool, guided: bool) -> None:
    options = {"parallel": parallel, "guided": guided}
    assert film(engine, 5, **options) == film(reference, 5, **options)


def test_scenes_of_all_places_in_one_batch(engine: VLLMEngine, reference: TorchEngine) -> None:
    kinds = [(guided, parallel) for guided in (False, True) for parallel in (False, True)]
    requests = [
        request(number, number % NUM_SCENES, guided=guided, parallel=parallel)
        for number, (guided, parallel) in enumerate(3 * kinds)
    ]
    assert_same(engine, reference, requests)
    noisy = SamplingConfig(temperature=1.0, seed=3)
    assert_same(engine, reference, [request(number, number, parallel=True, sampling=noisy) for number in range(5)])
    alone = [engine.generate([asked])[0] for asked in requests[:4]]
    assert alone == engine.generate(requests)[:4]


def test_preempted_scenes_are_read_again_behind_their_films(bundle: Path, reference: TorchEngine) -> None:
    """Three films share the pages of two."""
    requests = [request(number, 3, guided=number == 1, num_text_pieces=41) for number in range(6)]
    pages = 4 * CONFIG.scene_length // BLOCK_SIZE + 3 * CONFIG.scene_length // BLOCK_SIZE
    with VLLMEngine(bundle, dtype="float32", max_num_seqs=6, num_cache_blocks=2 * pages + 3, num_scenes=4) as engine:
        scheduler = engine._vllm.engine_core.engine_core.scheduler
        preempted: list[str] = []
        preempt = scheduler._preempt_request
        scheduler._preempt_request = lambda one, *rest, **more: (
            preempted.append(one.request_id) or preempt(one, *rest, **more)
        )
        assert_same(engine, reference, requests)
    assert preempted


def test_a_request_holds_pages_of_its_last_scene_above_layer_0(bundle: Path) -> None:
    asked = request(1, 4)
    with VLLMEngine(bundle, dtype="float32", max_num_seqs=2, num_scenes=5) as engine:
        pool = engine._vllm.engine_core.engine_core.scheduler.kv_cache_manager.block_pool
        free = pool.get_num_free_blocks()
        used: list[int] = []
        list(engine.stream([asked], lambda _: used.append(free - pool.get_num_free_blocks())))
        assert pool.get_num_free_blocks() == free
    total = len(asked.context_ids) + len(asked.prefix_ids) + 95
    most = -(-total // BLOCK_SIZE) + (CONFIG.num_layers - 1) * -(-CONFIG.scene_length // BLOCK_SIZE)
    assert max(used) <= most
    assert max(used) > -(-total // BLOCK_SIZE)
    assert max(used) < CONFIG.num_layers * -(-total // BLOCK_SIZE) // 2


def test_adapters_and_films_in_one_batch(bundle: Path, tmp_path: Path) -> None:
    """Earlier scenes leave a step after layer 0, whose other products must be those of the ids that are left."""
    for seed, name in enumerate(("one", "two")):
        save_adapter(CONFIG, tmp_path / name, seed=seed, rank=3 + seed)
    adapters = tuple(read_adapter(tmp_path / name, CONFIG, "f" * 64) for name in ("one", "two"))
    requests = [
        dataclasses.replace(request(number, number % 4, guided=number % 3 == 2, parallel=number > 5), adapter=name)
        for number, name in enumerate(("one", None, "two", "one", "one", None, None, "one", "two", "two", None))
    ]
    with TorchEngine(bundle, adapters=adapters) as reference:
        expected = reference.generate(requests)
    decodings = ["autoregressive", "parallel"]
    with VLLMEngine(
        bundle, dtype="float32", max_num_seqs=8, decodings=decodings, num_scenes=4, adapters=adapters
    ) as engine:
        assert engine.generate(requests) == expected


def test_outputs_are_told_while_they_grow(engine: VLLMEngine) -> None:
    requests = [request(0, 0), request(1, 2, guided=True), request(2, 1, parallel=True)]
    seen: dict[int, list[list[int]]] = {}
    found = dict(engine.stream(requests, watch=lambda index, ids: seen.setdefault(index, []).append(list(ids))))
    assert seen.keys() == {0, 1}  # canvases are told by progress alone
    for index, grown in seen.items():
        assert [len(ids) for ids in grown] == list(range(1, len(found[index]) + 1))
        assert all(found[index][: len(ids)] == ids for ids in grown)


def test_films_beyond_what_the_engine_was_started_for_are_refused(bundle: Path) -> None:
    with VLLMEngine(bundle, dtype="float32", max_num_seqs=1, num_scenes=2) as engine:
        engine.check(request(0, 1))
        with pytest.raises(ConfigError, match="at most 2 scenes, got one of 3"):
            engine.generate([request(0, 2)])
    with pytest.raises(ConfigError, match="num_scenes must be at most 6"):
        VLLMEngine(bundle, num_scenes=7)
    with pytest.raises(ConfigError, match="num_scenes must be at least 1"):
        VLLMEngine(bundle, num_scenes=0)
