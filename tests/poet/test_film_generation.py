"""Films of a tiny bundle: what scenes share, what they see, how they are joined, and the same piece by piece."""

import contextlib
import dataclasses
import json
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from poet.bundle import Bundle
from poet.errors import ConfigError, VocabularyError
from poet.generation.canvas import ParallelDecoding
from poet.generation.engine import GenerationRequest, TorchEngine
from poet.generation.film import FilmRequest, FilmScenes, GeneratedFilm, scenes_needed, write_films
from poet.generation.joining import SeamlessJoin
from poet.generation.pipeline import ClipRequest, Pipeline
from poet.generation.sampling import SamplingConfig
from poet.generation.streaming import stream_clip, stream_film
from poet.grammar import Segment, max_output_length, pin, place_ranges
from poet.media import Clip
from poet.sequence import unpack
from poet.testing import tiny_bundle

PROMPTS = ("a b", "b a a", None, "a")
SEEDED = SamplingConfig(seed=3, temperature=0.8)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    directory = tmp_path_factory.mktemp("bundle") / "tiny"
    tiny_bundle(directory, config={"max_position_embeddings": 6 * 256})
    file = directory / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"trained_parallel": True}))
    return Bundle.open(directory)


@pytest.fixture(scope="module")
def pipeline(bundle: Bundle) -> Iterator[Pipeline]:
    with TorchEngine(bundle.path) as engine:
        yield Pipeline(bundle, engine)


@pytest.fixture
def asked(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> list[GenerationRequest]:
    """What the engine is asked for."""
    seen: list[GenerationRequest] = []
    generate = pipeline.engine.generate
    monkeypatch.setattr(pipeline.engine, "generate", lambda requests: seen.extend(requests) or generate(requests))
    return seen


def film(pipeline: Pipeline, **options: Any) -> GeneratedFilm:
    [made] = write_films(pipeline, [FilmRequest(**{"scenes": PROMPTS, "sampling": SEEDED} | options)])
    return made


def given(pipeline: Pipeline, num_frames: int, *, sound: bool = True) -> Clip:
    geometry, rng = pipeline.geometry, np.random.default_rng(num_frames)
    samples = round(num_frames * geometry.sample_rate / geometry.fps)
    return Clip(
        frames=rng.integers(0, 255, (num_frames, geometry.height, geometry.width, 3), np.uint8),
        fps=geometry.fps,
        samples=rng.uniform(-0.5, 0.5, samples).astype(np.float32) if sound else None,
        sample_rate=geometry.sample_rate,
    )


def arrays(clip: Clip) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    assert clip.frames is not None
    assert clip.samples is not None
    return clip.frames, clip.samples


def test_scenes_overlap_by_a_frame_and_the_sound_under_it(pipeline: Pipeline) -> None:
    made = film(pipeline)
    frames, samples = arrays(made.clip)
    step = pipeline.geometry.num_frames - 1
    assert len(frames) == 1 + len(PROMPTS) * step
    assert len(samples) == round(len(frames) * pipeline.geometry.sample_rate / pipeline.geometry.fps)
    overlap = round(pipeline.geometry.sample_rate / pipeline.geometry.fps)
    for number, scene in enumerate(made.scenes):
        own, sound = arrays(scene)
        np.testing.assert_array_equal(frames[number * step + 1 : (number + 1) * step], own[1:-1])
        begin = round(number * step * pipeline.geometry.sample_rate / pipeline.geometry.fps)
        inner = slice(begin + overlap, begin + len(sound) - overlap)
        np.testing.assert_array_equal(samples[inner], sound[overlap : len(sound) - overlap])
    for number, (before, after) in enumerate(zip(made.scenes, made.scenes[1:], strict=False), start=1):
        shared = frames[number * step].astype(int)
        both = np.stack([arrays(before)[0][-1], arrays(after)[0][0]]).astype(int)
        assert (both.min(0) <= shared).all()
        assert (shared <= both.max(0)).all()


def test_a_scene_begins_in_the_codes_of_the_last_frame_before_it(
    pipeline: Pipeline, asked: list[GenerationRequest]
) -> None:
    made = film(pipeline)
    vocabulary = pipeline.bundle.vocabulary
    for number, (request, ids) in enumerate(zip(asked, made.ids, strict=True)):
        scene = unpack(np.concatenate([request.prefix_ids, ids]), vocabulary)
        assert scene.video_out is not None
        if number:
            last = arrays(made.scenes[number - 1])[0][-1:]
            np.testing.assert_array_equal(scene.video_out[:1], pipeline.codecs.encode_frames(last))
            low, high = place_ranges(request.grammar)
            assert (high - low == 1).sum() > scene.video_out[0].size


def test_a_scene_is_written_behind_the_ids_of_all_earlier_ones(
    pipeline: Pipeline, asked: list[GenerationRequest]
) -> None:
    made = film(pipeline)
    length = pipeline.bundle.model_config.scene_length
    assert [len(request.context_ids) // length for request in asked] == [0, 1, 2, 3]
    for number, ids in enumerate(made.ids):
        scene = (*asked[number].prefix_ids, *ids)
        if number + 1 < len(asked):
            assert asked[-1].context_ids[number * length : number * length + len(scene)] == scene
    assert [request.sampling.seed for request in asked] == [3, 4, 5, 6]
    asked.clear()
    film(pipeline, memory=1)
    assert [len(request.context_ids) // length for request in asked] == [0, 1, 1, 1]
    asked.clear()
    film(pipeline, memory=0)
    assert not any(request.context_ids for request in asked)


def test_scenes_written_in_parallel_are_seen_as_if_they_were_not(
    pipeline: Pipeline, asked: list[GenerationRequest]
) -> None:
    film(pipeline, decoding=ParallelDecoding(num_steps=3))
    mark = pipeline.bundle.vocabulary.special("<parallel>")
    assert all(mark in request.prefix_ids for request in asked)
    assert not any(mark in request.context_ids for request in asked)


def test_films_of_one_call_do_not_change_each_other(pipeline: Pipeline) -> None:
    requests = [FilmRequest(scenes=PROMPTS[:count], sampling=SEEDED) for count in (3, 1, 2)]
    seen: list[tuple[int, int]] = []
    together = write_films(pipeline, requests, lambda done, total: seen.append((done, total)))
    assert seen == [(3, 6), (5, 6), (6, 6)]
    for request, made in zip(requests, together, strict=True):
        [alone] = write_films(pipeline, [request])
        assert made.ids == alone.ids
        np.testing.assert_array_equal(arrays(made.clip)[0], arrays(alone.clip)[0])
        assert made.metadata == alone.metadata
    assert json.loads(together[0].metadata["scenes"]) == list(PROMPTS[:3])


def test_a_film_of_one_scene_is_the_clip_of_its_prompt(pipeline: Pipeline) -> None:
    made = film(pipeline, scenes=("a b",))
    [clip] = pipeline.generate([ClipRequest(task="text_to_video_audio", text="a b", sampling=SEEDED)])
    assert clip.clip is not None
    assert made.ids == (clip.ids,)
    np.testing.assert_array_equal(arrays(made.clip)[0], arrays(clip.clip)[0])
    np.testing.assert_array_equal(arrays(made.clip)[1], arrays(clip.clip)[1])


@pytest.mark.parametrize("sound", [True, False])
@pytest.mark.parametrize("extra", [-1, 3])
def test_a_film_goes_on_from_a_clip_of_any_length(
    pipeline: Pipeline, asked: list[GenerationRequest], extra: int, *, sound: bool
) -> None:
    step = pipeline.geometry.num_frames - 1
    start = given(pipeline, 2 * step + 1 + extra, sound=sound)
    made = film(pipeline, scenes=("a", "b"), start=start)
    assert start.frames is not None
    frames, samples = arrays(made.clip)
    np.testing.assert_array_equal(frames[: len(start.frames) - 1], start.frames[:-1])
    assert len(frames) == len(start.frames) + 2 * step
    assert len(samples) == round(len(frames) * pipeline.geometry.sample_rate / pipeline.geometry.fps)
    length = pipeline.bundle.model_config.scene_length
    whole = 1 if extra < 0 else 2
    assert [len(request.context_ids) // length for request in asked] == [whole, whole + 1]
    last = unpack(asked[0].context_ids[-length:], pipeline.bundle.vocabulary)
    expected = pipeline.codecs.encode_frames(start.frames[-pipeline.geometry.num_frames :])
    np.testing.assert_array_equal(last.video_out, expected)
    assert (last.audio_out is not None) == sound
    assert scenes_needed(pipeline.bundle, [made.request]) == whole + 2


def test_a_film_arrives_at_a_clip(pipeline: Pipeline, asked: list[GenerationRequest]) -> None:
    end = given(pipeline, 11)
    made = film(pipeline, scenes=("a", "b"), end=end)
    frames, samples = arrays(made.clip)
    stride, step = pipeline.geometry.temporal_stride, pipeline.geometry.num_frames - 1
    assert len(frames) == 1 + 2 * step + 11 - stride
    np.testing.assert_array_equal(frames[-(11 - stride) :], arrays(end)[0][stride:])
    assert len(samples) == round(len(frames) * pipeline.geometry.sample_rate / pipeline.geometry.fps)
    assert [request.canvas is not None for request in asked] == [False, True]
    low, high = place_ranges(asked[-1].grammar)
    assert (high - low == 1).sum() > 2 * np.prod(pipeline.geometry.latent_shape[1:])


def test_a_loop_arrives_where_it_began(pipeline: Pipeline, asked: list[GenerationRequest]) -> None:
    made = film(pipeline, scenes=("a", "b"), loop=True)
    frames, samples = arrays(made.clip)
    stride, step = pipeline.geometry.temporal_stride, pipeline.geometry.num_frames - 1
    assert len(frames) == 1 + 2 * step - stride
    assert len(samples) == round(len(frames) * pipeline.geometry.sample_rate / pipeline.geometry.fps)
    assert samples[0] == samples[-1] == 0
    vocabulary = pipeline.bundle.vocabulary
    last = unpack(np.concatenate([asked[-1].prefix_ids, made.ids[-1]]), vocabulary)
    goal = frames[:stride]
    still = np.repeat(goal[:1], pipeline.geometry.num_frames - stride, 0)
    expected = pipeline.codecs.encode_frames(np.concatenate([still, goal]))[-1]
    assert last.video_out is not None
    np.testing.assert_array_equal(last.video_out[-1], expected)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"decoding": ParallelDecoding(num_steps=3)},
        {"loop": True},
        {"start": True},
        {"end": True, "scenes": ("a",)},
    ],
)
def test_pieces_are_the_whole(pipeline: Pipeline, options: dict[str, Any]) -> None:
    clips = {name: given(pipeline, 20) for name in ("start", "end") if name in options}
    whole = film(pipeline, **options | clips)
    request = dataclasses.replace(whole.request)
    pieces = list(stream_film(pipeline, request))
    frames = [piece.frames for piece in pieces if piece.frames is not None]
    samples = [piece.samples for piece in pieces if piece.samples is not None]
    np.testing.assert_array_equal(np.concatenate(frames), arrays(whole.clip)[0])
    np.testing.assert_array_equal(np.concatenate(samples), arrays(whole.clip)[1])
    assert pieces[-1].is_last
    assert pieces[-1].metadata == whole.metadata
    assert pieces[0].metadata == {key: value for key, value in whole.metadata.items() if key != "ids_sha256"}
    assert len(frames) >= len(whole.scenes)


@pytest.mark.parametrize("task", ["text_to_video_audio", "text_to_video", "image_to_video"])
def test_pieces_of_a_clip_are_the_whole(pipeline: Pipeline, task: str) -> None:
    image = given(pipeline, 1, sound=False) if task == "image_to_video" else None
    request = ClipRequest(task=task, text="a b", clip=image, sampling=SEEDED)
    [whole] = pipeline.generate([request])
    pieces = list(stream_clip(pipeline, request))
    assert whole.clip is not None
    frames = [piece.frames for piece in pieces if piece.frames is not None]
    np.testing.assert_array_equal(np.concatenate(frames), whole.clip.frames)
    assert len(frames) == pipeline.geometry.latent_shape[0]
    samples = [piece.samples for piece in pieces if piece.samples is not None]
    assert bool(samples) == (whole.clip.samples is not None)
    if samples:
        np.testing.assert_array_equal(np.concatenate(samples), whole.clip.samples)
    assert pieces[-1].metadata == whole.metadata


def test_frames_come_while_later_ones_are_not_written_yet(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """The writer is held after the first latent frame: only then can its frame have come before the rest."""
    request = ClipRequest(task="text_to_video_audio", text="a", sampling=SEEDED)
    written: list[int] = []
    frame_seen = threading.Event()
    stream = pipeline.engine.stream
    first_frame = 1 + int(np.prod(pipeline.geometry.latent_shape[1:]))

    def held(requests: Any, progress: Any = None, watch: Any = None) -> Any:
        def told(index: int, ids: Any) -> None:
            written.append(len(ids))
            watch(index, ids)
            if len(ids) == first_frame + 1:
                assert frame_seen.wait(60)

        return stream(requests, progress, told)

    monkeypatch.setattr(pipeline.engine, "stream", held)
    pieces = stream_clip(pipeline, request)
    assert next(pieces).metadata
    frames = next(pieces).frames
    assert frames is not None
    assert len(frames) == 1
    frame_seen.set()
    pieces.close()  # the writer ends at its next id
    assert threading.active_count() == 1 or not any(t.name.startswith("poet-writer") for t in threading.enumerate())
    assert max(written) < max_output_length(pipeline.prepare(request).generation.grammar)


@pytest.mark.parametrize("decoding", [None, ParallelDecoding(num_steps=9)])
def test_a_stream_that_is_given_up_has_stopped_its_writer(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch, decoding: ParallelDecoding | None
) -> None:
    """Even where the error that ends it is somewhere else, and keeps what has been written alive."""
    steps: list[int] = []
    stream = pipeline.engine.stream

    def counted(requests: Any, progress: Any = None, watch: Any = None) -> Any:
        def told(done: int) -> None:
            steps.append(done)
            time.sleep(0.01)
            progress(done)

        return stream(requests, told, watch)

    monkeypatch.setattr(pipeline.engine, "stream", counted)
    request = FilmRequest(scenes=("a", "b"), sampling=SEEDED, decoding=decoding)
    pieces = stream_film(pipeline, request)
    with pytest.raises(ZeroDivisionError), contextlib.closing(pieces):
        next(pieces)
        next(pieces)
        raise ZeroDivisionError
    assert not any(thread.name.startswith("poet-writer") for thread in threading.enumerate())
    count = len(steps)
    time.sleep(0.1)
    assert len(steps) == count


def test_an_engines_error_reaches_whoever_takes_pieces(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise ConfigError("no room")
        yield

    monkeypatch.setattr(pipeline.engine, "stream", broken)
    with pytest.raises(ConfigError, match="no room"):
        list(stream_film(pipeline, FilmRequest(scenes=("a",))))


def test_films_that_cannot_be_are_refused(pipeline: Pipeline) -> None:
    for options, words in (
        ({"scenes": ()}, "at least one scene"),
        ({"memory": -1}, "memory must be at least 0"),
        ({"loop": True, "end": given(pipeline, 3)}, "not both"),
        ({"start": Clip(frames=None, fps=8, samples=np.zeros(9, np.float32), sample_rate=16000)}, "has none"),
        ({"start": Clip(frames=np.zeros((2, 8, 8, 3), np.uint8), fps=8, samples=None, sample_rate=1)}, "film's start"),
        ({"end": Clip(frames=np.zeros((2, 8, 8, 3), np.uint8), fps=8, samples=None, sample_rate=1)}, "film's end"),
        ({"start": dataclasses.replace(given(pipeline, 3), fps=30.0)}, "film's start must have"),
        ({"end": dataclasses.replace(given(pipeline, 3), sample_rate=48000)}, "film's end must have"),
        ({"scenes": ("a",), "loop": True}, "two scenes or more"),
        ({"scenes": ("a", "b" * 100_001)}, "at most 100,000 characters"),
    ):
        with pytest.raises(ConfigError, match=words):
            film(pipeline, **options)
    with pytest.raises(ConfigError, match="cannot be streamed"):
        next(stream_clip(pipeline, ClipRequest(task="text_to_audio", text="a")))


def test_a_model_that_has_not_learnt_films_is_not_asked_for_them(bundle: Bundle) -> None:
    content = dict(bundle.config or {}) | {"trained_tasks": ["text_to_video_audio", "unconditional"]}
    with TorchEngine(bundle.path) as engine:
        ignorant = Pipeline(dataclasses.replace(bundle, config=content), engine)
        with pytest.raises(ConfigError, match="has not learnt scenes behind earlier scenes"):
            film(ignorant)
        assert len(film(ignorant, memory=0, scenes=("a", "b")).scenes) == 2
        assert len(film(ignorant, scenes=("a",)).scenes) == 1
        one_frame = given(ignorant, 1)
        assert len(film(ignorant, scenes=("a",), start=one_frame).scenes) == 1  # it sees no scene before it
        taught = dataclasses.replace(bundle, config=content | {"trained_films": 3})
        assert len(film(Pipeline(taught, engine), scenes=("a", "b")).scenes) == 2
        assert scenes_needed(taught, [FilmRequest(scenes=("a",) * 5)]) == 3  # as many as it has met
        assert scenes_needed(taught, [FilmRequest(scenes=("a",) * 5, memory=3)]) == 4


def test_nothing_is_written_of_a_film_whose_last_scene_cannot_be(
    pipeline: Pipeline, asked: list[GenerationRequest], monkeypatch: pytest.MonkeyPatch
) -> None:
    check = pipeline.engine.check

    def refusing(request: GenerationRequest, *, index: int = 0) -> None:
        if len(request.context_ids) > 2 * pipeline.bundle.model_config.scene_length:
            raise ConfigError("too long for this engine")
        check(request, index=index)

    monkeypatch.setattr(pipeline.engine, "check", refusing)
    with pytest.raises(ConfigError, match="too long for this engine"):
        film(pipeline)
    assert not asked
    monkeypatch.undo()
    penalised = dataclasses.replace(SEEDED, repetition_penalty=1.2)
    assert len(film(pipeline, scenes=("a", "b"), loop=True, sampling=penalised).scenes) == 2


def test_a_negative_prompt_is_recorded_though_the_last_scene_has_none(pipeline: Pipeline) -> None:
    guided = dataclasses.replace(SEEDED, guidance_scale=2.0)
    made = film(pipeline, scenes=("a", None), negative_text="b", sampling=guided)
    assert made.metadata["negative_prompt"] == "b"


@pytest.mark.parametrize(("fps", "rate"), [(7.0, 1600), (24.0, 16000), (8.0, 16000)])
def test_sound_stands_where_its_frames_do_however_many_scenes(fps: float, rate: int) -> None:
    join, frames, samples = SeamlessJoin(fps=fps, sample_rate=rate), 0, []
    for number in range(12):
        frames += len(join.add_frames(np.zeros((17, 2, 2, 3), np.uint8), starts=True, ends=True))
        samples.append(join.add_samples(np.full(round(17 * rate / fps) - number % 2, 0.1, np.float32)))
        assert abs(sum(map(len, samples)) - frames * rate / fps) < 1
    rest = join.close()
    frames += len(rest[0])
    assert frames == 1 + 12 * 16
    assert sum(map(len, samples)) + len(rest[1]) == round(frames * rate / fps)


def test_the_first_scenes_are_forgotten_where_positions_end(pipeline: Pipeline, asked: list[GenerationRequest]) -> None:
    film(pipeline, scenes=("a",) * 8)
    length = pipeline.bundle.model_config.scene_length
    assert [len(request.context_ids) // length for request in asked] == [0, 1, 2, 3, 4, 5, 5, 5]
    assert scenes_needed(pipeline.bundle, [FilmRequest(scenes=("a",) * 8)]) == 6


def test_seeds_are_drawn_once_and_kept(pipeline: Pipeline) -> None:
    made = film(pipeline, scenes=("a", "b"), sampling=SamplingConfig())
    assert made.request.sampling.seed is not None
    [again] = write_films(pipeline, [made.request])
    assert again.ids == made.ids
    assert FilmScenes(pipeline, made.request).request == made.request


def test_a_fade_keeps_the_power_of_sounds_that_have_nothing_to_do_with_each_other() -> None:
    rng = np.random.default_rng(0)
    join, parts = SeamlessJoin(fps=8, sample_rate=16000), []
    for _ in range(3):
        join.add_frames(np.zeros((17, 4, 4, 3), np.uint8), starts=True, ends=True)
        parts.append(join.add_samples(rng.normal(0, 0.1, 34000).astype(np.float32)))
    sound = np.concatenate([*parts, join.close()[1]])
    assert len(sound) == 34000 + 2 * 32000
    for border in (32000, 64000):
        assert np.std(sound[border : border + 2000]) == pytest.approx(0.1, rel=0.05)


def test_pinned_places_are_ranges_of_one_id() -> None:
    grammar = (Segment(1, 2, 3), Segment(5, 10, 20), Segment(2, 30, 40))
    pinned = pin(grammar, {1: 12, 2: 13, 5: 19, 7: 31})
    low, high = place_ranges(pinned)
    assert low.tolist() == [2, 12, 13, 10, 10, 19, 30, 31]
    assert high.tolist() == [3, 13, 14, 20, 20, 20, 40, 32]
    assert place_ranges(pin(grammar, {}))[0].tolist() == place_ranges(grammar)[0].tolist()
    with pytest.raises(VocabularyError, match="must fit its place"):
        pin(grammar, {1: 20})
    with pytest.raises(VocabularyError, match="must fit its place"):
        pin(grammar, {8: 30})
