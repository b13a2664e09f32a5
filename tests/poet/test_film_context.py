"""Scenes behind earlier scenes: the reference's cache of layer 0 alone, against whole films under dense masks."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from poet.errors import ConfigError, ShapeError
from poet.generation.context import build_cache
from poet.generation.engine import GenerationRequest, TorchEngine
from poet.generation.maskgit import Canvas, draw_places
from poet.grammar import GrammarState, check_output
from poet.model.attention import SceneLayout
from poet.model.transformer import KeyValueCache, PoetTransformer
from poet.testing import film_request, save_model, sharp_model, tiny_config, tiny_vocabulary

VOCABULARY = tiny_vocabulary()
CONFIG = tiny_config(VOCABULARY, num_layers=3, max_position_embeddings=1280)


@pytest.fixture(scope="module")
def model() -> PoetTransformer:
    return sharp_model(CONFIG)


@pytest.fixture(scope="module")
def bundle(model: PoetTransformer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(model, tmp_path_factory.mktemp("bundle"))


@pytest.fixture
def engine(bundle: Path) -> TorchEngine:
    return TorchEngine(bundle)


def request(seed: int, num_earlier: int, **options: Any) -> GenerationRequest:
    return film_request(VOCABULARY, CONFIG, seed, num_earlier, **options)


@torch.inference_mode()
def film_logits(
    model: PoetTransformer, context: Sequence[int], prefix: Sequence[int], output: Sequence[int], *, parallel: bool
) -> torch.Tensor:
    """Logits at every place from the prefix's last on: the whole film in one pass under dense masks, no cache."""
    earlier = len(context) // CONFIG.scene_length
    lengths = [CONFIG.scene_length] * earlier + [len(prefix) + len(output)]
    prefixes = [0] * earlier + [len(prefix)]  # what earlier scenes see inside themselves changes nothing for later ones
    layout = SceneLayout.from_packed(
        torch.tensor([prefixes]),
        torch.tensor([lengths]),
        sum(lengths),
        parallel=torch.tensor([[False] * earlier + [parallel]]),
        films=True,
    )
    logits = model.logits(model(torch.tensor([[*context, *prefix, *output]]), layout))
    return logits[0, len(context) + len(prefix) - 1 :]


def both_logits(model: PoetTransformer, asked: GenerationRequest, output: Sequence[int]) -> torch.Tensor:
    parallel = asked.canvas is not None
    logits = film_logits(model, asked.context_ids, asked.prefix_ids, output, parallel=parallel)
    if asked.guide_ids is None:
        return logits
    steered_from = film_logits(model, asked.context_ids, asked.guide_ids, output, parallel=parallel)
    return steered_from + asked.sampling.guidance_scale * (logits - steered_from)


def test_scenes_of_films_of_five_are_the_likeliest_under_dense_masks(
    model: PoetTransformer, engine: TorchEngine
) -> None:
    requests = [request(number, number, guided=bool(number % 2)) for number in range(5)]
    outputs = engine.generate(requests)
    for asked, output in zip(requests, outputs, strict=True):
        check_output(asked.grammar, output)
        logits, state = both_logits(model, asked, output), GrammarState(asked.grammar)
        for scores, id in zip(logits, output, strict=False):
            assert id == state.low + int(scores[state.low : state.high].argmax())
            state.advance(id)
    alone = [dataclasses.replace(asked, context_ids=()) for asked in requests]
    assert engine.generate(alone) != outputs


def test_canvases_of_films_are_filled_as_under_dense_masks(model: PoetTransformer, engine: TorchEngine) -> None:
    requests = [request(number, number, guided=bool(number % 2), parallel=True) for number in range(5)]
    outputs = engine.generate(requests)
    for asked, output in zip(requests, outputs, strict=True):
        assert asked.canvas is not None
        canvas = Canvas(asked.grammar, asked.canvas, asked.sampling)
        while not canvas.done:
            logits, asked_for = both_logits(model, asked, canvas.shown()), canvas.asked()
            own = logits[torch.from_numpy(asked_for)]
            drawn = draw_places(
                lambda places, ids, own=own: own[places, ids],
                canvas.low[asked_for],
                canvas.high[asked_for],
                canvas.sampling,
                canvas.step,
            )
            canvas.settle(*drawn)
        assert output == canvas.ids.tolist()


@torch.inference_mode()
def test_only_layer_0_keeps_earlier_scenes(model: PoetTransformer) -> None:
    context = request(3, 4).context_ids
    layout = SceneLayout.from_prefix_lengths(torch.tensor([5]), torch.tensor([20]), 20)
    cache, _, positions = build_cache(model, [context], layout)
    rooms = [layer.keys.shape[2] for layer in cache.layers]
    assert rooms == [len(context) + 20] + [20] * (CONFIG.num_layers - 1)
    assert [layer.length for layer in cache.layers] == [len(context)] + [0] * (CONFIG.num_layers - 1)
    assert positions[0].tolist() == list(range(len(context) + 20))


def test_a_past_must_fit(model: PoetTransformer, engine: TorchEngine) -> None:
    asked = request(0, 1)
    with pytest.raises(ConfigError, match="must be padded"):
        engine.check(dataclasses.replace(asked, context_ids=asked.context_ids[1:]))
    with pytest.raises(ConfigError, match="given ids must be in"):
        engine.check(dataclasses.replace(asked, context_ids=(*asked.context_ids[:-1], CONFIG.vocab_size)))
    scenes = CONFIG.max_position_embeddings // CONFIG.scene_length
    with pytest.raises(ConfigError, match="a film must have at most"):
        engine.check(dataclasses.replace(asked, context_ids=asked.context_ids * scenes))
    layout = SceneLayout.from_prefix_lengths(torch.tensor([5]), torch.tensor([20]), 20)
    with pytest.raises(ShapeError, match="for each of the 1 rows"):
        build_cache(model, [(), ()], layout)
    cache = KeyValueCache(CONFIG, 1, 20, context=7)
    with pytest.raises(ShapeError, match=r"must be \(B, 7\)"):
        model.remember(torch.zeros(1, 6, dtype=torch.int64), torch.zeros(1, 6, dtype=torch.int64), cache)
