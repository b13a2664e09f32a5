"""The pipeline with an engine that needs no model: what is given, what is asked for, and how a clip is put together."""

import dataclasses
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from poet.bundle import Bundle
from poet.errors import ConfigError
from poet.generation.canvas import ParallelDecoding
from poet.generation.engine import GenerationRequest, StreamingEngine, Watch
from poet.generation.pipeline import ClipRequest, Pipeline, PreparedClip
from poet.generation.sampling import SamplingConfig
from poet.generation.upsample import Upsampling, UpsamplingRequest
from poet.media import Clip
from poet.sequence import GrammarState, unpack, unpack_prefix
from poet.tasks import TASKS
from poet.testing import tiny_bundle, tiny_upsampler


class DiceEngine(StreamingEngine):
    """Draws any legal id; remembers what it was asked."""

    name = "dice"

    def __init__(self) -> None:
        self.requests: list[GenerationRequest] = []

    def check(self, request: GenerationRequest, *, index: int = 0) -> None:
        """It can take any."""

    def stream(
        self,
        requests: Iterable[GenerationRequest],
        progress: Callable[[int], None] | None = None,
        watch: Watch | None = None,
    ) -> Iterator[tuple[int, list[int]]]:
        for index, request in enumerate(requests):
            self.requests.append(request)
            rng = np.random.default_rng(request.sampling.seed)
            state, ids = GrammarState(request.grammar), []
            while not state.done:
                ids.append(int(rng.integers(state.low, state.high)))
                state.advance(ids[-1])
                if watch is not None:
                    watch(index, ids)
            yield index, ids

    def upsample(
        self, requests: Sequence[UpsamplingRequest], progress: Callable[[int, int], None] | None = None
    ) -> list[NDArray[np.int64]]:
        """Any code for every place, in twice the size."""
        shapes = [(len(one.low), 2 * one.low.shape[1], 2 * one.low.shape[2]) for one in requests]
        seeds = [one.settings.seed for one in requests]
        return [np.random.default_rng(seed).integers(0, 31, shape) for seed, shape in zip(seeds, shapes, strict=True)]

    def close(self) -> None:
        """Nothing to release."""


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    directory = tmp_path_factory.mktemp("bundle") / "tiny"
    tiny_bundle(directory)
    return Bundle.open(directory)


def make(bundle: Bundle) -> tuple[Pipeline, DiceEngine]:
    engine = DiceEngine()
    return Pipeline(bundle, engine), engine


def given(pipeline: Pipeline, num_frames: int, *, sound: bool = False, seed: int = 0) -> Clip:
    geometry, rng = pipeline.geometry, np.random.default_rng(seed)
    samples = round(num_frames * geometry.sample_rate / geometry.fps)
    return Clip(
        frames=rng.integers(0, 255, (num_frames, geometry.height, geometry.width, 3), np.uint8),
        fps=geometry.fps,
        samples=rng.uniform(-0.5, 0.5, samples).astype(np.float32) if sound else None,
        sample_rate=geometry.sample_rate,
    )


@pytest.mark.parametrize("name", [name for name, task in TASKS.items() if task.edit is None and not task.writes_text])
def test_every_task_gives_a_clip_of_the_kind_it_promises(bundle: Bundle, name: str) -> None:
    pipeline, _ = make(bundle)
    task, geometry = TASKS[name], pipeline.geometry
    frames = {"first_frame": 1, "first_frames": geometry.num_frames}.get(task.conditioning, geometry.num_frames)
    clip = given(pipeline, frames, sound="audio" in task.inputs) if task.inputs & {"video", "audio"} else None
    if clip is not None and "video" not in task.inputs:
        clip = Clip(frames=None, fps=clip.fps, samples=clip.samples, sample_rate=clip.sample_rate)
    [made] = pipeline.generate([ClipRequest(task=name, text="hi" if "text" in task.inputs else None, clip=clip)])
    assert made.clip is not None
    assert (made.clip.samples is not None) >= task.writes_audio
    if task.outputs == "image":
        assert made.clip.frames is not None
        assert len(made.clip.frames) == 1
    elif task.writes_video:
        assert made.clip.frames is not None
        new = geometry.num_frames - geometry.num_video_frames(task.default_condition(geometry.latent_shape[0]))
        expected = geometry.num_frames + new if task.conditioning == "first_frames" else geometry.num_frames
        assert len(made.clip.frames) == expected
    if made.clip.frames is not None and made.clip.samples is not None and task.outputs != "image":
        assert len(made.clip.samples) == round(len(made.clip.frames) * geometry.sample_rate / geometry.fps)


def test_a_continuation_keeps_the_given_frames_and_sound_untouched(bundle: Bundle) -> None:
    pipeline, _ = make(bundle)
    clip = given(pipeline, pipeline.geometry.num_frames + 3, sound=True)
    [made] = pipeline.generate([ClipRequest(task="video_continuation", clip=clip)])
    assert made.clip is not None
    assert clip.frames is not None
    assert clip.samples is not None
    np.testing.assert_array_equal(made.clip.frames[: len(clip.frames)], clip.frames)  # type: ignore[index]
    np.testing.assert_array_equal(made.clip.samples[: len(clip.samples)], clip.samples)  # type: ignore[index]


def test_the_last_frames_of_a_long_clip_are_what_is_continued(bundle: Bundle) -> None:
    pipeline, engine = make(bundle)
    long = given(pipeline, pipeline.geometry.num_frames + 7)
    assert long.frames is not None
    task = TASKS["video_continuation"]
    context = pipeline.geometry.num_video_frames(task.default_condition(pipeline.geometry.latent_shape[0]))
    short = Clip(frames=long.frames[-context:], fps=long.fps, samples=None, sample_rate=long.sample_rate)
    pipeline.generate([ClipRequest(task="video_continuation", clip=clip) for clip in (long, short)])
    assert engine.requests[0].prefix_ids == engine.requests[1].prefix_ids


def test_requests_of_one_batch_do_not_change_each_other(bundle: Bundle) -> None:
    pipeline, _ = make(bundle)
    requests = [
        ClipRequest(task=task, text="a b", sampling=SamplingConfig(seed=seed))
        for seed, task in enumerate(("text_to_video_audio", "text_to_audio", "text_to_image", "text_to_video_audio"))
    ]
    together = pipeline.generate(requests)
    for request, made in zip(requests, together, strict=True):
        [alone] = pipeline.generate([request])
        assert alone.ids == made.ids
        assert alone.clip is not None
        assert made.clip is not None
        if alone.clip.frames is not None:
            assert made.clip.frames is not None
            assert abs(alone.clip.frames.astype(int) - made.clip.frames.astype(int)).max() <= 1  # rounding of a batch


def test_the_text_of_the_request_is_in_the_prefix(bundle: Bundle) -> None:
    pipeline, engine = make(bundle)
    pipeline.generate([ClipRequest(task="text_to_audio", text="Käse 奶酪")])
    scene = unpack_prefix(np.array(engine.requests[0].prefix_ids), bundle.vocabulary)
    assert scene.text is not None
    assert bundle.text_tokenizer.decode(list(scene.text)) == "Käse 奶酪"


def test_a_missing_seed_is_drawn_and_recorded(bundle: Bundle) -> None:
    pipeline, _ = make(bundle)
    [made] = pipeline.generate([ClipRequest(task="unconditional")])
    assert made.request.sampling.seed is not None
    [again] = pipeline.generate([made.request])
    assert again.metadata == made.metadata
    assert made.metadata["seed"] == str(made.request.sampling.seed)


def test_inputs_that_do_not_fit_the_task_are_refused_before_anything_is_written(bundle: Bundle) -> None:
    pipeline, engine = make(bundle)
    good = ClipRequest(task="unconditional")
    for bad, said in (
        (ClipRequest(task="text_to_video"), "needs text"),
        (ClipRequest(task="unconditional", text="x"), "takes no text"),
        (ClipRequest(task="image_to_video"), "needs video"),
        (ClipRequest(task="text_to_audio", text="x" * 200_000), "100,000 characters"),
        (ClipRequest(task="text_to_audio", text="x" * 5_000), "text pieces"),
        (ClipRequest(task="video_to_audio", clip=given(pipeline, 3)), "frames"),
    ):
        with pytest.raises(ConfigError, match=said):
            pipeline.generate([good, bad])
    assert engine.requests == []


def test_a_task_that_nobody_trained_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    made = tiny_bundle(tmp_path / "tiny")
    file = made.path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"trained_tasks": ["text_to_audio", "unconditional"]}))
    pipeline, engine = make(Bundle.open(made.path))
    good = ClipRequest(task="unconditional")
    with pytest.raises(ConfigError, match="trained on: text_to_audio, unconditional; got 'image_to_video'"):
        pipeline.generate([good, ClipRequest(task="image_to_video", clip=given(pipeline, 1))])
    assert engine.requests == []
    assert len(pipeline.generate([good])) == 1


def test_parallel_decoding_writes_a_clip_of_every_task_that_writes_no_text(tmp_path: Path) -> None:
    made = tiny_bundle(tmp_path / "tiny")
    file = made.path / "config.json"
    decoding = ParallelDecoding(num_steps=8, order="frames")
    pipeline, engine = make(Bundle.open(made.path))
    with pytest.raises(ConfigError, match="has not learnt to write many ids at once"):
        pipeline.generate([ClipRequest(task="unconditional", decoding=decoding)])
    assert engine.requests == []
    file.write_text(json.dumps(json.loads(file.read_text()) | {"trained_parallel": True}))
    pipeline, engine = make(Bundle.open(made.path))
    requests = [
        ClipRequest(task="text_to_video_audio", text="a star", decoding=decoding),
        ClipRequest(task="image_to_video", clip=given(pipeline, 1), decoding=decoding),
        ClipRequest(task="text_to_audio", text="a bell", decoding=ParallelDecoding(num_steps=3)),
        ClipRequest(task="text_to_video_audio", text="a star"),
    ]
    clips = pipeline.generate(requests)
    for clip, request, asked in zip(clips, requests, engine.requests, strict=True):
        scene = unpack(np.array([*asked.prefix_ids, *clip.ids]), made.vocabulary)
        assert scene.parallel == (request.decoding is not None)
        assert (asked.canvas is None) == (request.decoding is None)
    assert clips[0].metadata["decoding"] == "parallel"
    assert (clips[0].metadata["steps"], clips[0].metadata["order"]) == ("8", "frames")
    assert "decoding" not in clips[3].metadata
    engine.requests.clear()
    with pytest.raises(ConfigError, match="writes a text"):
        pipeline.generate([requests[0], ClipRequest(task="captioning", clip=clips[0].clip, decoding=decoding)])
    assert engine.requests == []


def test_upsampling_writes_the_same_clip_in_twice_the_size(tmp_path: Path) -> None:
    made = tiny_bundle(tmp_path / "tiny")
    pipeline, engine = make(made)
    larger = Upsampling(num_steps=3)
    asked = ClipRequest(task="text_to_video_audio", text="a star", sampling=SamplingConfig(seed=3), upsampling=larger)
    with pytest.raises(ConfigError, match="has no upsampler"):
        pipeline.generate([asked])
    assert engine.requests == []
    tiny_upsampler(made, made.path / "upsampler")
    pipeline, engine = make(Bundle.open(made.path))
    height, width = pipeline.geometry.resolution
    requests = [
        asked,
        dataclasses.replace(asked, upsampling=None),
        ClipRequest(task="image_to_video", clip=given(pipeline, 1), upsampling=larger),
        dataclasses.replace(asked, task="text_to_image", upsampling=larger),
    ]
    clips = pipeline.generate(requests)
    for clip, request in zip(clips, requests, strict=True):
        assert clip.clip is not None
        assert clip.clip.frames is not None
        scale = 1 if request.upsampling is None else 2
        assert clip.clip.frames.shape[1:3] == (scale * height, scale * width)
    assert clips[0].ids == clips[1].ids
    assert clips[0].metadata["upsample_steps"] == "3"
    assert len(clips[0].metadata["upsampler_sha256"]) == 64
    assert "upsample_steps" not in clips[1].metadata
    [again] = pipeline.generate([asked])
    assert again.clip is not None
    assert clips[0].clip is not None
    assert again.clip.frames is not None
    assert clips[0].clip.frames is not None
    assert abs(again.clip.frames.astype(int) - clips[0].clip.frames).max() <= 1  # rounding of a batch
    engine.requests.clear()
    continued = ClipRequest(task="video_continuation", clip=given(pipeline, 5), upsampling=larger)
    for bad in (continued, ClipRequest(task="text_to_audio", text="a", upsampling=larger)):
        with pytest.raises(ConfigError, match="cannot be upsampled"):
            pipeline.generate([asked, bad])
    assert engine.requests == []


def test_a_clip_with_picture_and_sound_is_not_left_out_silently(bundle: Bundle) -> None:
    pipeline, engine = make(bundle)
    clip = given(pipeline, pipeline.geometry.num_frames, sound=True)
    with pytest.raises(ConfigError, match="takes no audio or video"):
        pipeline.generate([ClipRequest(task="text_to_video", text="x", clip=clip)])
    assert engine.requests == []
    pipeline.generate([ClipRequest(task="audio_to_video", clip=clip), ClipRequest(task="video_to_audio", clip=clip)])


def test_no_text_is_not_recorded_as_an_empty_one(bundle: Bundle) -> None:
    pipeline, _ = make(bundle)
    first, second = pipeline.generate([ClipRequest(task="unconditional"), ClipRequest(task="text_to_audio", text="")])
    assert "prompt" not in first.metadata
    assert second.metadata["prompt"] == ""


def test_a_clip_names_the_weights_that_the_engine_was_started_with(tmp_path: Path) -> None:
    bundle = tiny_bundle(tmp_path / "tiny")
    expected = Bundle.open(bundle.path).weights_sha256
    pipeline, _ = make(bundle)
    bundle.weights.write_bytes(b"of a later training")
    [made] = pipeline.generate([ClipRequest(task="unconditional")])
    assert made.metadata["weights_sha256"] == expected


def test_a_picture_of_another_size_is_refused(bundle: Bundle) -> None:
    pipeline, _ = make(bundle)
    clip = Clip(frames=np.zeros((1, 7, 11, 3), np.uint8), fps=8.0, samples=None, sample_rate=16_000)
    with pytest.raises(ConfigError, match="pixels"):
        pipeline.generate([ClipRequest(task="image_to_video", clip=clip)])


def test_guidance_moves_away_from_the_request_without_its_text(bundle: Bundle) -> None:
    pipeline, engine = make(bundle)
    sampling = SamplingConfig(seed=1, guidance_scale=2.0)
    clip = given(pipeline, 1)
    [made, _, _] = pipeline.generate(
        [
            ClipRequest(task="text_to_video_audio", text="a red b", sampling=sampling),
            ClipRequest(task="image_to_video", text="a red b", clip=clip, sampling=sampling),
            ClipRequest(task="image_to_video", clip=clip, sampling=sampling),
        ]
    )
    text, image, without = engine.requests
    low, high = bundle.vocabulary.text_range
    null = bundle.vocabulary.special("<null>")
    for request in (text, image):
        assert request.guided
        assert request.guide_ids == tuple(null if low <= id < high else id for id in request.prefix_ids)
        assert request.guide_ids != request.prefix_ids
    assert not without.guided
    assert made.metadata["guidance_scale"] == "2.0"
    assert "negative_prompt" not in made.metadata


def test_a_negative_prompt_takes_the_place_of_no_text(bundle: Bundle) -> None:
    pipeline, engine = make(bundle)
    sampling = SamplingConfig(seed=1, guidance_scale=2.0)
    wanted = ClipRequest(task="text_to_video_audio", text="a red b", negative_text="c", sampling=sampling)
    [made] = pipeline.generate([wanted])
    assert engine.requests[0].guide_ids is not None
    scene = unpack_prefix(np.array(engine.requests[0].guide_ids), bundle.vocabulary)
    assert scene.text is not None
    assert pipeline.text_tokenizer.decode(list(scene.text)) == "c"
    assert made.metadata["negative_prompt"] == "c"


def test_a_negative_prompt_that_could_do_nothing_is_refused(bundle: Bundle) -> None:
    pipeline, _ = make(bundle)
    guided = SamplingConfig(guidance_scale=2.0)
    with pytest.raises(ConfigError, match="must come with a prompt"):
        pipeline.generate([ClipRequest(task="unconditional", negative_text="c", sampling=guided)])
    with pytest.raises(ConfigError, match="guidance_scale other than 1"):
        pipeline.generate([ClipRequest(task="text_to_video_audio", text="a", negative_text="c")])


def test_clips_are_written_while_others_are_being_prepared_and_are_the_same_as_all_at_once(bundle: Bundle) -> None:
    pipeline, engine = make(bundle)
    asked = [
        ClipRequest(task="text_to_video_audio", text="a star", sampling=SamplingConfig(seed=3)),
        ClipRequest(task="image_to_video", clip=given(pipeline, 1), sampling=SamplingConfig(seed=4)),
        ClipRequest(task="captioning", clip=given(pipeline, 5), sampling=SamplingConfig(seed=5)),
        ClipRequest(task="text_to_audio", text="a bell", sampling=SamplingConfig(seed=6)),
        ClipRequest(task="text_to_image", text="a ring", sampling=SamplingConfig(seed=7)),
    ]
    expected = pipeline.generate(asked)
    engine.requests.clear()
    taken: list[int] = []

    def prepared() -> Iterator[PreparedClip]:
        for number, request in enumerate(asked):
            taken.append(number)
            yield pipeline.prepare(request)

    stream = pipeline.stream(prepared(), batch_size=2)
    assert taken == []
    first = [next(stream), next(stream)]
    assert taken == [0, 1]
    found = dict([*first, *stream])
    assert sorted(found) == [0, 1, 2, 3, 4]
    for number, clip in enumerate(expected):
        assert found[number].ids == clip.ids
        assert found[number].text == clip.text
        assert found[number].metadata == clip.metadata
        assert (found[number].clip is None) == (clip.clip is None)
