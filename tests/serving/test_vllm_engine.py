"""The vLLM engine as callers see it: one engine for the whole module, a tiny random model."""

import dataclasses
import multiprocessing
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from poet.errors import CheckpointError, ConfigError
from poet.generation.engine import Engine, GenerationRequest
from poet.generation.maskgit import CanvasPlan, Stage
from poet.generation.sampling import SamplingConfig
from poet.grammar import Segment, check_output, max_output_length
from poet.model.transformer import PoetTransformer
from poet.sequence import output_grammar
from poet.testing import save_model, tiny_config, tiny_vocabulary
from poet_serving.engine import VLLMEngine, check_settings

VOCABULARY = tiny_vocabulary()
CONFIG = tiny_config(VOCABULARY, hidden_size=64, ffn_hidden_size=112, head_dim=32, max_position_embeddings=512)
VIDEO_AUDIO = output_grammar("text_to_video_audio", VOCABULARY, video_latent_shape=(2, 3, 5), num_audio_latents=7)
CAPTION = output_grammar("captioning", VOCABULARY, max_text_pieces=37)


def request_of(
    seed: int | None, grammar: tuple[Segment, ...] = VIDEO_AUDIO, prefix_ids: tuple[int, ...] = (1, 17, 260, 301)
) -> GenerationRequest:
    sampling = SamplingConfig(temperature=1.0, seed=seed)
    return GenerationRequest(prefix_ids=prefix_ids, grammar=grammar, sampling=sampling)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(3)
    tasks = ["captioning", "text_to_video_audio"]
    return save_model(PoetTransformer(CONFIG), tmp_path_factory.mktemp("bundle"), trained_tasks=tasks)


@pytest.fixture(scope="module")
def engine(bundle: Path) -> Iterator[VLLMEngine]:
    with VLLMEngine(bundle, dtype="float32", max_num_seqs=5) as engine:
        yield engine


def test_it_is_an_engine(engine: VLLMEngine) -> None:
    assert isinstance(engine, Engine)
    assert engine.name == "vllm"


def test_it_serves_a_bundle_that_names_its_trained_tasks(engine: VLLMEngine) -> None:
    assert engine._vllm.vllm_config.model_config.hf_config.trained_tasks == ["captioning", "text_to_video_audio"]
    [output] = engine.generate([request_of(3)])
    check_output(VIDEO_AUDIO, output)


def test_every_id_drawn_at_temperature_1_is_legal(engine: VLLMEngine) -> None:
    requests = [request_of(seed, grammar) for seed in range(8) for grammar in (VIDEO_AUDIO, CAPTION)]
    for request, output in zip(requests, engine.generate(requests), strict=True):
        check_output(request.grammar, output)


def test_text_of_open_length_ends_where_the_model_ends_it(engine: VLLMEngine) -> None:
    outputs = engine.generate([request_of(seed, CAPTION) for seed in range(8)])
    assert min(map(len, outputs)) < max_output_length(CAPTION)
    assert len(set(map(len, outputs))) > 2
    for output in outputs:
        assert output[-2:] == [VOCABULARY.special("</text_out>"), VOCABULARY.special("<eos>")]


def test_a_seed_draws_the_same_ids_again_alone_or_among_others(engine: VLLMEngine) -> None:
    together = engine.generate([request_of(seed) for seed in (5, 6, 7)])
    assert engine.generate([request_of(seed) for seed in (5, 6, 7)]) == together
    assert engine.generate([request_of(6)]) == together[1:2]


def test_seeds_draw_different_ids(engine: VLLMEngine) -> None:
    outputs = engine.generate([request_of(seed) for seed in (0, 1, 2**31, 2**62)])
    assert len(set(map(tuple, outputs))) == 4


def test_requests_without_a_seed_differ(engine: VLLMEngine) -> None:
    assert engine.generate([request_of(None)]) != engine.generate([request_of(None)])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prefix_ids": (1, CONFIG.vocab_size)}, r"must be in \[0, 384\), got 1 to 384"),
        ({"prefix_ids": (-1, 3)}, r"must be in \[0, 384\), got -1 to 3"),
        ({"prefix_ids": ()}, "at least one id"),
        ({"prefix_ids": 211 * (7,)}, "at most 256 ids together, got 211"),
        ({"grammar": (Segment(1, 380, 385),)}, r"must be in \[0, 384\)"),
        ({"grammar": ()}, "at least one segment"),
        (
            {"grammar": (Segment(9, 7, 20),), "canvas": CanvasPlan(stages=(Stage(0, 9, 2),), mask_id=3)},
            "without parallel decoding",
        ),
        ({"grammar": (Segment(7, 11, 23, stop=5), Segment(2, 30, 31))}, "must end in one id"),
    ],
)
def test_a_request_that_cannot_be_served_is_refused_and_the_engine_lives_on(
    engine: VLLMEngine, changes: dict[str, object], message: str
) -> None:
    bad = dataclasses.replace(request_of(1), **changes)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=message):
        engine.generate([request_of(0), bad])
    (output,) = engine.generate([request_of(0)])
    check_output(VIDEO_AUDIO, output)


def test_the_longest_request_that_fits_is_written(engine: VLLMEngine) -> None:
    longest = request_of(0, prefix_ids=(CONFIG.scene_length - max_output_length(VIDEO_AUDIO)) * (7,))
    check_output(VIDEO_AUDIO, engine.generate([longest])[0])


def test_progress_counts_up_to_all_ids(engine: VLLMEngine) -> None:
    counts: list[tuple[int, int]] = []
    requests = [request_of(seed, grammar) for seed in range(4) for grammar in (VIDEO_AUDIO, CAPTION)]
    engine.generate(requests, lambda done, total: counts.append((done, total)))
    total = 4 * (max_output_length(VIDEO_AUDIO) + max_output_length(CAPTION))
    assert [done for done, _ in counts] == sorted({done for done, _ in counts})
    assert {counted for _, counted in counts} == {total}
    assert counts[-1] == (total, total)


def test_an_interrupted_call_leaves_the_engine_usable(engine: VLLMEngine) -> None:
    expected = engine.generate([request_of(4)])

    def interrupt(done: int, total: int) -> None:
        if done > 20:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        engine.generate([request_of(seed) for seed in range(9)], interrupt)
    assert engine.generate([request_of(4)]) == expected


def test_it_starts_no_process(engine: VLLMEngine) -> None:
    assert multiprocessing.active_children() == []
    children = " ".join(file.read_text() for file in Path("/proc/self/task").glob("*/children")).split()
    commands = [Path("/proc", child, "cmdline").read_bytes() for child in children]
    assert not [command for command in commands if b"vllm" in command.lower() or b"spawn_main" in command]


def test_it_leaves_the_callers_threads_and_random_numbers_alone(
    engine: VLLMEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(before + 1)
    within: list[int] = []
    between: list[int] = []
    step = engine._vllm.step

    def counting() -> object:
        within.append(torch.get_num_threads())
        return step()

    monkeypatch.setattr(engine._vllm, "step", counting)
    engine.generate([request_of(0)], lambda done, total: between.append(torch.get_num_threads()))
    assert set(within) == {1}  # a small model
    assert set(between) == {before + 1}
    assert torch.get_num_threads() == before + 1
    torch.set_num_threads(before)


def test_a_second_engine_in_one_process_is_refused(engine: VLLMEngine, bundle: Path) -> None:
    with pytest.raises(ConfigError, match="one vLLM engine at a time"):
        VLLMEngine(bundle)
    check_output(VIDEO_AUDIO, engine.generate([request_of(0)])[0])


def settings_of(budget: int, longest: int, chunked: bool, cached: bool) -> SimpleNamespace:
    return SimpleNamespace(
        model_config=SimpleNamespace(max_model_len=longest),
        scheduler_config=SimpleNamespace(max_num_batched_tokens=budget, enable_chunked_prefill=chunked),
        cache_config=SimpleNamespace(enable_prefix_caching=cached),
    )


def test_settings_under_which_a_long_prompt_would_hang_are_refused(engine: VLLMEngine) -> None:
    check_settings(engine._vllm.vllm_config)
    check_settings(settings_of(256, 256, chunked=False, cached=False))
    with pytest.raises(ConfigError, match="got 255, 256 and False"):
        check_settings(settings_of(255, 256, chunked=False, cached=False))
    with pytest.raises(ConfigError, match="in one step"):
        check_settings(settings_of(512, 256, chunked=True, cached=False))
    with pytest.raises(ConfigError, match="enable_prefix_caching"):
        check_settings(settings_of(256, 256, chunked=False, cached=True))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "float16"}, "must be 'auto', 'float32' or 'bfloat16'"),
        ({"max_num_seqs": 0}, "max_num_seqs must be at least 1"),
        ({"num_threads": 0}, "num_threads must be at least 1"),
        ({"num_cache_blocks": 2}, "at least 3"),
    ],
)
def test_bad_options_are_refused(bundle: Path, options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        VLLMEngine(bundle, **options)  # type: ignore[arg-type]


def test_a_directory_without_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="bundle with a model"):
        VLLMEngine(tmp_path)
