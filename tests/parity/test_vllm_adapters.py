"""LoRA adapters through vLLM: base and adapters in one batch against models with the adapter merged, id for id."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from poet.errors import ConfigError
from poet.generation.canvas import ParallelDecoding, plan_canvas
from poet.generation.engine import GenerationRequest, TorchEngine
from poet.generation.sampling import SamplingConfig
from poet.grammar import check_output
from poet.model.lora import Adapter, merge_adapter, read_adapter
from poet.model.transformer import PoetTransformer
from poet.sequence import output_grammar, pack_prefix
from poet.tasks import get_task
from poet.testing import (
    random_scene,
    save_adapter,
    save_model,
    sharp_model,
    tiny_config,
    tiny_geometry,
    tiny_vocabulary,
)
from poet_serving.adapters import AdapterRows, adapted_product, adapter_arguments
from poet_serving.engine import VLLMEngine

VOCABULARY = tiny_vocabulary()
CONFIG = tiny_config(
    VOCABULARY, hidden_size=96, ffn_hidden_size=176, num_layers=3, num_heads=6, head_dim=32, scene_length=512
)
TASK = get_task("text_to_video_audio")
NAMES = (None, "one", "two")


def model() -> PoetTransformer:
    return sharp_model(CONFIG, seed=11, gains=True)


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> tuple[Adapter, ...]:
    """Two of different ranks and scales, the second of rsLoRA."""
    folder = tmp_path_factory.mktemp("adapters")
    save_adapter(CONFIG, folder / "one", seed=1, rank=4)
    save_adapter(CONFIG, folder / "two", seed=2, rank=9, lora_alpha=6, use_rslora=True)
    return tuple(read_adapter(folder / name, CONFIG, "f" * 64) for name in ("one", "two"))


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(model(), tmp_path_factory.mktemp("bundle"))


@pytest.fixture(scope="module")
def engine(bundle: Path, adapters: tuple[Adapter, ...]) -> Iterator[VLLMEngine]:
    """Seven slots: an odd number, so that pairs leave one empty."""
    ways = ["autoregressive", "parallel"]
    with VLLMEngine(bundle, dtype="float32", max_num_seqs=7, decodings=ways, adapters=adapters) as engine:
        yield engine


@pytest.fixture(scope="module")
def separate(
    adapters: tuple[Adapter, ...], bundle: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str | None, Path]:
    """Three models on disk, which know nothing of adapters."""
    merged: dict[str | None, Path] = {None: bundle}
    for adapter in adapters:
        changed = model()
        merge_adapter(changed, adapter)
        merged[adapter.name] = save_model(changed, tmp_path_factory.mktemp(adapter.name))
    return merged


def request(number: int, *, parallel: bool = False, guided: bool = False, seed: int | None = None) -> GenerationRequest:
    """One whose text, length, adapter and settings `number` decides."""
    rng = np.random.default_rng([7, number])
    geometry = tiny_geometry(VOCABULARY, num_latent_frames=2 + number % 3)
    scene = random_scene(
        TASK.name, VOCABULARY, rng, geometry=geometry, num_text_pieces=2 + 3 * number, parallel=parallel
    )
    assert scene.video_out is not None
    assert scene.audio_out is not None
    shapes: dict[str, Any] = {
        "video_latent_shape": scene.video_out.shape,
        "num_audio_latents": scene.audio_out.shape[1],
    }
    sampling = SamplingConfig(
        temperature=0.0 if seed is None else 1.0, seed=seed or 0, guidance_scale=2.0 if guided else 1.0
    )
    decoding = ParallelDecoding(num_steps=6 + number % 4, guidance_stop=0.5)
    guide = tuple(pack_prefix(scene, VOCABULARY, drop_text=True).tolist())
    return GenerationRequest(
        prefix_ids=tuple(pack_prefix(scene, VOCABULARY).tolist()),
        grammar=output_grammar(TASK, VOCABULARY, **shapes),
        sampling=sampling,
        guide_ids=guide if guided else None,
        canvas=plan_canvas(decoding, TASK, VOCABULARY, **shapes) if parallel else None,
        adapter=NAMES[number % 3],
    )


REQUESTS = [
    *(request(number) for number in range(9)),
    *(request(number, guided=True) for number in range(6)),
    *(request(number, parallel=True) for number in range(6)),
    *(request(number, parallel=True, guided=True, seed=number + 1) for number in range(6)),
]


@pytest.fixture(scope="module")
def expected(separate: dict[str | None, Path]) -> list[list[int]]:
    """From the three models, one after another."""
    outputs: dict[int, list[int]] = {}
    for name, directory in separate.items():
        own = [place for place, one in enumerate(REQUESTS) if one.adapter == name]
        asked = [dataclasses.replace(REQUESTS[place], adapter=None) for place in own]
        with TorchEngine(directory) as reference:
            outputs |= zip(own, reference.generate(asked), strict=True)
    return [outputs[place] for place in range(len(REQUESTS))]


def compare(ours: list[list[int]], expected: list[list[int]]) -> None:
    for number, (one, other, asked) in enumerate(zip(ours, expected, REQUESTS, strict=True)):
        check_output(asked.grammar, one)
        assert one == other, f"request {number}: {sum(a != b for a, b in zip(one, other, strict=True))} ids differ"


def test_base_and_two_adapters_in_one_batch_are_three_merged_models(
    engine: VLLMEngine, expected: list[list[int]]
) -> None:
    compare(engine.generate(REQUESTS), expected)


def test_vllms_own_layers_give_the_same(engine: VLLMEngine, expected: list[list[int]]) -> None:
    runners = [one.model_executor.driver_worker.worker.model_runner for one in (engine._vllm, engine._canvases)]
    networks = [runner.model.model for runner in runners]
    assert all(network.takes_direct_layers for network in networks)
    for network in networks:
        network.takes_direct_layers = False
    try:
        compare(engine.generate(REQUESTS), expected)
    finally:
        for network in networks:
            network.takes_direct_layers = True


def test_the_reference_engine_takes_adapters_too(
    bundle: Path, adapters: tuple[Adapter, ...], expected: list[list[int]]
) -> None:
    with TorchEngine(bundle, adapters=adapters, max_batch_size=5) as reference:
        compare(reference.generate(REQUESTS), expected)


def test_adapters_change_what_is_written(expected: list[list[int]], separate: dict[str | None, Path]) -> None:
    with TorchEngine(separate[None]) as base:
        plain = base.generate([dataclasses.replace(one, adapter=None) for one in REQUESTS])
    changed = [one.adapter for one, ids, other in zip(REQUESTS, plain, expected, strict=True) if ids != other]
    assert changed == [one.adapter for one in REQUESTS if one.adapter is not None]


def test_the_ids_of_one_adapter_go_through_its_products_together() -> None:
    """Slots that vLLM fills later are seen, and packed parts that an adapter leaves out stay as they are."""
    torch.manual_seed(0)
    weight = torch.randn(12, 5)
    layer = SimpleNamespace(
        lora_a_stacked=tuple(torch.zeros(3, 1, 2, 5) for _ in range(3)),
        lora_b_stacked=tuple(torch.zeros(3, 1, size, 2) for size in (6, 3, 3)),
    )
    rows = AdapterRows()
    with torch.inference_mode():
        product = adapted_product(lambda x: x @ weight.T, layer, rows)
        for slot in (0, 1):
            for part in (0, 2):
                layer.lora_a_stacked[part][slot, 0].copy_(torch.randn(2, 5))
                layer.lora_b_stacked[part][slot, 0].copy_(torch.randn(layer.lora_b_stacked[part].shape[2], 2))
    x = torch.randn(7, 5)
    for slots in ([-1] * 7, [1] * 7, [-1, -1, 0, 0, 1, 1, 1], [0, 1, -1, 0, 1, 1, 0]):
        rows.update(torch.tensor(slots))
        expected = x @ weight.T
        for place, slot in enumerate(slots):
            if slot >= 0:
                pairs = zip(layer.lora_a_stacked, layer.lora_b_stacked, strict=True)
                expected[place] += torch.cat([b[slot, 0] @ (a[slot, 0] @ x[place]) for a, b in pairs])
        torch.testing.assert_close(product(x), expected)
    rows.update(torch.tensor([1, 1, 0, -1]))
    assert rows.groups == [(1, slice(0, 2)), (0, slice(2, 3))]


def test_vllm_is_given_one_slot_more_than_there_are_adapters(adapters: tuple[Adapter, ...]) -> None:
    found = adapter_arguments(adapters)
    assert (found["max_loras"], found["max_lora_rank"]) == (3, 16)
    assert adapter_arguments(()) == {}
    with pytest.raises(ConfigError, match="at most 512"):
        adapter_arguments([dataclasses.replace(adapters[0], rank=513)])


def test_an_adapter_that_the_engine_was_not_started_with_is_refused(engine: VLLMEngine) -> None:
    asked = dataclasses.replace(REQUESTS[0], adapter="three")
    with pytest.raises(ConfigError, match=r"request 0: adapter must be one of .*one, two; got 'three'"):
        engine.generate([asked])
