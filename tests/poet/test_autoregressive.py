"""The torch engine and its loop: cached, batched and padded, against one row at a time without a cache."""

import dataclasses
import sys
from collections.abc import Iterator, Sequence
from importlib.metadata import EntryPoint
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from poet.errors import CheckpointError, ConfigError, ShapeError
from poet.generation import engine as engine_module
from poet.generation.autoregressive import write_outputs
from poet.generation.engine import Engine, GenerationRequest, TorchEngine, load_engine
from poet.generation.sampling import SamplingConfig
from poet.grammar import GrammarState, Segment, check_output, max_output_length
from poet.model.attention import SceneLayout
from poet.model.transformer import PoetTransformer
from poet.sequence import output_grammar, pack_prefix
from poet.tasks import TASKS
from poet.testing import random_scene, save_model, sharp_model, tiny_config, tiny_geometry, tiny_vocabulary

VOCABULARY = tiny_vocabulary()
CONFIG = tiny_config(VOCABULARY)
GREEDY = SamplingConfig(temperature=0)


@pytest.fixture(scope="module")
def model() -> PoetTransformer:
    return sharp_model(CONFIG)


@pytest.fixture(scope="module")
def bundle(model: PoetTransformer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(model, tmp_path_factory.mktemp("bundle"))


@pytest.fixture
def engine(bundle: Path) -> TorchEngine:
    return TorchEngine(bundle, max_batch_size=5)


def requests_of_every_task(sampling: SamplingConfig | None = None) -> list[GenerationRequest]:
    """One request a task, with texts of all lengths; two latent frames keep them short."""
    rng = np.random.default_rng(7)
    requests = []
    for number, task in enumerate(TASKS):
        geometry = tiny_geometry(VOCABULARY, num_latent_frames=2 + number % 2)
        scene = random_scene(task, VOCABULARY, rng, geometry=geometry, num_text_pieces=2 + number)
        grammar = output_grammar(
            task,
            VOCABULARY,
            video_latent_shape=None if scene.video_out is None else scene.video_out.shape,
            num_audio_latents=None if scene.audio_out is None else scene.audio_out.shape[1],
            max_text_pieces=13,
        )
        prefix = tuple(pack_prefix(scene, VOCABULARY).tolist())
        settings = SamplingConfig(seed=number, top_k=30, top_p=0.95) if sampling is None else sampling
        requests.append(GenerationRequest(prefix_ids=prefix, grammar=grammar, sampling=settings))
    return requests


@torch.inference_mode()
def likeliest(model: PoetTransformer, request: GenerationRequest, output: Sequence[int]) -> list[int]:
    """The legal id of the largest logit at every place of the output: one pass, one row, no cache, no padding."""

    def logits_after(prefix: Sequence[int]) -> torch.Tensor:
        ids = torch.tensor([[*prefix, *output]])
        lengths = torch.tensor([len(prefix)]), torch.tensor([ids.shape[1]])
        logits = model.logits(model(ids, SceneLayout.from_prefix_lengths(*lengths, ids.shape[1])))
        return logits[0, len(prefix) - 1 :]

    logits = logits_after(request.prefix_ids)
    if request.guide_ids is not None:
        steered_from = logits_after(request.guide_ids)
        logits = steered_from + request.sampling.guidance_scale * (logits - steered_from)
    state, best = GrammarState(request.grammar), []
    for scores, id in zip(logits, output, strict=False):
        low, high, stop = state.allowed
        legal = [*range(low, high), *([] if stop is None else [stop])]
        best.append(legal[int(scores[legal].argmax())])
        state.advance(id)
    return best


def test_greedy_outputs_of_a_mixed_batch_are_the_likeliest_ids(model: PoetTransformer, engine: TorchEngine) -> None:
    requests = requests_of_every_task(GREEDY)
    outputs = engine.generate(requests)
    for request, output in zip(requests, outputs, strict=True):
        check_output(request.grammar, output)
        assert output == likeliest(model, request, output)
    assert len({len(request.prefix_ids) for request in requests}) > 5
    codes = [id for output in outputs for id in output if id >= 256]
    assert len(set(codes)) > 11


def test_outputs_do_not_depend_on_batch_mates(bundle: Path) -> None:
    requests = requests_of_every_task()
    together = TorchEngine(bundle, max_batch_size=len(requests)).generate(requests)
    in_threes = TorchEngine(bundle, max_batch_size=3).generate(requests[::-1])[::-1]
    assert together == in_threes
    for request, output in zip(requests, together, strict=True):
        check_output(request.grammar, output)


def guided(requests: Sequence[GenerationRequest], scale: float) -> list[GenerationRequest]:
    """The same requests, every other with a guide of another length."""
    sampling = [dataclasses.replace(request.sampling, guidance_scale=scale) for request in requests]
    return [
        dataclasses.replace(request, sampling=own, guide_ids=None if place % 2 else (1, 17, *range(300, 303 + place)))
        for place, (request, own) in enumerate(zip(requests, sampling, strict=True))
    ]


def test_guided_outputs_of_a_mixed_batch_are_the_likeliest_ids_under_the_guided_logits(
    model: PoetTransformer, engine: TorchEngine
) -> None:
    requests = guided(requests_of_every_task(GREEDY), 2.5)
    outputs = engine.generate(requests)
    for request, output in zip(requests, outputs, strict=True):
        check_output(request.grammar, output)
        assert output == likeliest(model, request, output)
    assert outputs != engine.generate([dataclasses.replace(request, guide_ids=None) for request in requests])


def test_guidance_of_scale_1_is_none(engine: TorchEngine) -> None:
    requests = requests_of_every_task()
    assert engine.generate(guided(requests, 1.0)) == engine.generate(requests)


def test_a_guided_output_ends_with_its_guide_while_others_go_on(model: PoetTransformer) -> None:
    grammar = (Segment(29, 256, 259, stop=16), Segment(1, 2, 3))
    configs = [SamplingConfig(seed=seed, temperature=5.0, guidance_scale=2.0) for seed in range(4)]
    prefixes, guides = [[1, 11], [1, 13, 17], [1, 19], [1, 31, 7, 5]], [[1, 9, 9, 9], None, [1], [1, 3]]
    outputs = write_outputs(model, prefixes, [grammar] * 4, configs, guides)
    assert len({len(output) for output in outputs}) > 2
    for row, output in enumerate(outputs):
        alone = write_outputs(model, [prefixes[row]], [grammar], [configs[row]], [guides[row]])
        assert alone == [output]


def test_seed_decides_what_is_drawn(engine: TorchEngine) -> None:
    prefix, grammar = (1, 17, 3), (Segment(23, 256, 284),)

    def drawn(seed: int | None) -> list[int]:
        sampling = SamplingConfig(seed=seed, temperature=3.0)
        return engine.generate([GenerationRequest(prefix_ids=prefix, grammar=grammar, sampling=sampling)])[0]

    assert drawn(5) == drawn(5)
    assert drawn(5) != drawn(6)
    assert drawn(None) != drawn(None)


def test_rows_end_early_and_their_mates_go_on(model: PoetTransformer) -> None:
    prefixes = [[1, 11], [1, 13, 17], [1, 19, 23, 29], [1, 31]]
    grammar = (Segment(1, 15, 16), Segment(29, 256, 259, stop=16), Segment(1, 2, 3))
    fixed = (Segment(11, 300, 307),)
    configs = [SamplingConfig(seed=seed, temperature=5.0) for seed in range(4)]
    outputs = write_outputs(model, prefixes, [grammar, grammar, grammar, fixed], configs)
    for output in outputs[:3]:
        check_output(grammar, output)
        assert output[-2:] == [16, 2]
    check_output(fixed, outputs[3])
    assert len({len(output) for output in outputs}) > 2
    for prefix, config, output in zip(prefixes[:3], configs, outputs, strict=False):
        assert write_outputs(model, [prefix], [grammar], [config]) == [output]


def test_forced_ids_cost_no_pass_of_the_model(model: PoetTransformer, monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = []
    forward = PoetTransformer.forward

    def counting(self: PoetTransformer, ids: torch.Tensor, *arguments: Any) -> torch.Tensor:
        lengths.append(ids.shape[1])
        return forward(self, ids, *arguments)

    monkeypatch.setattr(PoetTransformer, "forward", counting)
    grammar = (Segment(2, 9, 10), Segment(2, 256, 284), Segment(3, 10, 11), Segment(1, 256, 284), Segment(1, 2, 3))
    output = write_outputs(model, [[1, 17, 3]], [grammar], [GREEDY])[0]
    check_output(grammar, output)
    assert lengths == [5, 1, 4]


def test_progress_rises_to_the_total(engine: TorchEngine) -> None:
    requests = requests_of_every_task(GREEDY)[-3:]
    seen: list[tuple[int, int]] = []
    engine.generate(requests, lambda done, total: seen.append((done, total)))
    total = sum(max_output_length(request.grammar) for request in requests)
    assert {total for _, total in seen} == {total}
    done = [done for done, _ in seen]
    assert done == sorted(done)
    assert done[-1] == total
    assert len(set(done)) > 11


def test_no_requests_give_no_outputs(engine: TorchEngine) -> None:
    assert engine.generate([]) == []


@pytest.mark.parametrize(
    ("prefix", "grammar", "message"),
    [
        ((), (Segment(1, 2, 3),), "at least one id"),
        ((1, 384), (Segment(1, 2, 3),), r"given ids must be in \[0, 384\)"),
        ((1, -1), (Segment(1, 2, 3),), "given ids must be"),
        ((1,), (Segment(1, 256, 385),), "grammar's ids must be"),
        ((1,), (Segment(1, 2, 3, stop=384),), "grammar's ids must be"),
        ((1,) * 200, (Segment(57, 2, 5),), "at most 256 ids together, got 200 \\+ 57"),
    ],
)
def test_requests_that_the_model_cannot_take_are_refused_by_number(
    engine: TorchEngine, prefix: tuple[int, ...], grammar: tuple[Segment, ...], message: str
) -> None:
    good = GenerationRequest(prefix_ids=(1,), grammar=(Segment(1, 2, 3),), sampling=GREEDY)
    bad = GenerationRequest(prefix_ids=prefix, grammar=grammar, sampling=GREEDY)
    with pytest.raises(ConfigError, match=f"request 1: .*{message}"):
        engine.generate([good, bad])


def test_empty_prefixes_are_refused(model: PoetTransformer) -> None:
    with pytest.raises(ShapeError, match="one id or more"):
        write_outputs(model, [[1], []], [(Segment(1, 2, 3),)] * 2, [GREEDY] * 2)


def test_outputs_come_as_they_are_finished_while_requests_are_still_being_taken(bundle: Path) -> None:
    asked = [
        GenerationRequest(
            prefix_ids=(1, 17, 30 + number), grammar=(Segment(3 + number % 4, 300, 320),), sampling=GREEDY
        )
        for number in range(21)
    ]
    taken: list[int] = []

    def source() -> Iterator[GenerationRequest]:
        for number, request in enumerate(asked):
            taken.append(number)
            yield request

    with TorchEngine(bundle, max_batch_size=2) as engine:
        expected = engine.generate(asked)
        written: list[int] = []
        stream = engine.stream(source(), written.append)
        first = next(stream)
        assert len(taken) == 8  # four batches' worth
        found = dict([first, *stream])
        assert [found[number] for number in range(21)] == expected
        assert written == sorted(written)
        assert written[-1] == sum(3 + number % 4 for number in range(21))
        bad = dataclasses.replace(asked[0], prefix_ids=(10_000,))
        with pytest.raises(ConfigError, match="request 1: given ids"):
            list(engine.stream([asked[0], bad]))


def test_closed_engine_writes_nothing(bundle: Path) -> None:
    with load_engine("torch", bundle) as engine:
        assert isinstance(engine, Engine)
    engine.close()
    with pytest.raises(ConfigError, match="closed"):
        engine.generate([])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "toaster"}, "device must be"),
        ({"dtype": "float8"}, "dtype must be one of float32, bfloat16"),
        ({"max_batch_size": 0}, "max_batch_size must be at least 1"),
        ({"speed": 3}, "does not take these options"),
    ],
)
def test_options_that_cannot_be_used_are_refused(bundle: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_engine("torch", bundle, **options)


def test_unknown_engine_is_refused_with_the_known_ones(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = EntryPoint("fast", "fast_engine:Engine", "poet.engines")
    monkeypatch.setattr(engine_module, "entry_points", lambda group: [entry])
    with pytest.raises(ConfigError, match="one of torch, fast, got 'slow'"):
        load_engine("slow", bundle)


def test_engine_whose_package_is_missing_says_how_to_get_it(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = EntryPoint("vllm", "package_that_is_not_there:Engine", "poet.engines")
    monkeypatch.setattr(engine_module, "entry_points", lambda group: [entry])
    with pytest.raises(ConfigError, match=r"package_that_is_not_there.*openpoet\[serve\]"):
        load_engine("vllm", bundle)


def test_engine_of_another_package_gets_the_bundle_and_its_options(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class FastEngine(TorchEngine):
        name = "fast"

    package = ModuleType("fast_engine")
    package.FastEngine = FastEngine  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "fast_engine", package)
    entry = EntryPoint("fast", "fast_engine:FastEngine", "poet.engines")
    monkeypatch.setattr(engine_module, "entry_points", lambda group: [entry])
    engine = load_engine("fast", bundle, max_batch_size=3)
    assert isinstance(engine, FastEngine)
    assert engine.generate([]) == []


def test_directory_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json cannot be read"):
        load_engine("torch", tmp_path)


def test_a_strong_penalty_keeps_every_id_from_coming_again_inside_its_window(engine: TorchEngine) -> None:
    grammar = (Segment(60, *VOCABULARY.video_range),)
    sampling = dataclasses.replace(GREEDY, repetition_penalty=1e6, repetition_window=9)
    [plain] = engine.generate([GenerationRequest(prefix_ids=(1, 5), grammar=grammar, sampling=GREEDY)])
    [varied] = engine.generate([GenerationRequest(prefix_ids=(1, 5), grammar=grammar, sampling=sampling)])
    assert any(id in plain[max(0, place - 9) : place] for place, id in enumerate(plain))
    # An id whose logit is far below 0 before the penalty would be taken last of all.
    assert not any(id in varied[max(0, place - 9) : place] for place, id in enumerate(varied))
    check_output(grammar, varied)
