"""The whole road from a request to a clip; the page to read first.

    request -> codes (tokenizers) -> ids (sequence) -> ids written by an engine -> codes -> clip

Every step is somebody else's; this file only walks the road. It knows no model, no offsets, no file formats.

Legend: N video frames of H x W pixels, S audio samples, T latent frames, K audio levels, A audio latents.
"""

from __future__ import annotations

import dataclasses
import itertools
import secrets
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from poet import __version__
from poet.bundle import Bundle
from poet.errors import ConfigError
from poet.generation.canvas import ParallelDecoding, plan_canvas
from poet.generation.clip_codecs import ClipCodecs
from poet.generation.engine import Engine, GenerationRequest
from poet.generation.provenance import (
    describe_adapter,
    describe_decoding,
    describe_repetition,
    describe_upsampling,
    hash_ids,
)
from poet.generation.sampling import SamplingConfig
from poet.generation.upsample import Upsampling, UpsamplingRequest
from poet.media import Clip
from poet.model.lora import Adapter
from poet.sequence import Scene, output_grammar, pack_prefix, unpack
from poet.tasks import ClipParts, Task, get_task

__all__ = ["ClipRequest", "GeneratedClip", "Pipeline", "PreparedClip"]

MAX_TEXT_CHARACTERS = 100_000  # longer texts are refused before they are tokenised
MAX_WRITTEN_PIECES = 256  # of a text that is written; fewer where the scene has no room for them
_TEXT_MARKERS = 3  # <text_out>, </text_out> and <eos> around a text that is written


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClipRequest:
    """One clip to write.

    Attributes:
        task: name in `poet.tasks.TASKS`.
        text: the prompt, where the task reads one; None gives none.
        clip: the conditioning clip, at the bundle's frame rate, size and sample rate: a single frame for an image, the
            frames to go on from for a continuation, samples for a sound. None gives none.
        negative_text: what the clip shall not be like, in place of no text at all in guidance; a prompt must be there.
        sampling: how ids are drawn; without a seed a new one is drawn and recorded. Its guidance moves away from the
            same request without its text, so it does nothing where there is no text.
        decoding: how to write many ids at once; None writes one after another.
        upsampling: how to write the picture's codes again in a larger size, with the bundle's upsampler; None leaves
            them as they are. Its seed is the request's.
        adapter: name of one of the pipeline's LoRA adapters; None: the bundle's own weights.
    """

    task: str
    text: str | None = None
    clip: Clip | None = None
    negative_text: str | None = None
    sampling: SamplingConfig = dataclasses.field(default_factory=SamplingConfig)
    decoding: ParallelDecoding | None = None
    upsampling: Upsampling | None = None
    adapter: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class GeneratedClip:
    """What a request became.

    Attributes:
        request: as carried out, with its seed.
        clip: picture, sound or both; None for a text.
        text: what was written, for tasks that write text.
        ids: output ids, as the engine wrote them.
        metadata: what made it, for the container of the file.
    """

    request: ClipRequest
    clip: Clip | None
    text: str | None
    ids: tuple[int, ...]
    metadata: dict[str, str]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PreparedClip:
    """A request that can be carried out.

    Attributes:
        request: with its seed.
        task: its task.
        parts: codes of what is given.
        num_given: latent frames that are given.
        generation: what an engine is asked for.
    """

    request: ClipRequest
    task: Task
    parts: ClipParts
    num_given: int
    generation: GenerationRequest


class Pipeline:
    """Requests to clips, with one bundle and one engine.

    Args:
        bundle: vocabulary, tokenizers and defaults.
        engine: writes the ids; it must have been started on the same bundle.
        device: of the tokenizers.
        adapters: LoRA adapters that the engine was started with.

    Attributes:
        adapters: by name.
    """

    def __init__(
        self, bundle: Bundle, engine: Engine, *, device: str = "cpu", adapters: Sequence[Adapter] = ()
    ) -> None:
        self.bundle, self.engine = bundle, engine
        self.adapters = {adapter.name: adapter for adapter in adapters}
        self.weights_sha256 = bundle.weights_sha256  # at once: a later training may replace the file
        self.geometry = bundle.geometry()
        self.text_tokenizer = bundle.text_tokenizer
        self.codecs = ClipCodecs(bundle, device)

    def generate(
        self, requests: Sequence[ClipRequest], progress: Callable[[int, int], None] | None = None
    ) -> list[GeneratedClip]:
        """Write a clip for every request, all in one batch.

        Args:
            requests: any number, of any tasks.
            progress: called with (ids written, ids in all).

        Returns:
            One clip a request, in order.

        Raises:
            ConfigError: a request that cannot be carried out, or of a task that the bundle's model was not trained on;
                nothing has been written then.
        """
        prepared = [self.prepare(request, index) for index, request in enumerate(requests)]
        outputs = self.engine.generate([item.generation for item in prepared], progress)
        return self.finish_all(prepared, outputs)

    def stream(
        self,
        prepared: Iterable[PreparedClip],
        progress: Callable[[int], None] | None = None,
        batch_size: int = 8,
    ) -> Iterator[tuple[int, GeneratedClip]]:
        """Write clips while others are still being prepared.

        Args:
            prepared: from `prepare`, any number; taken when the engine has room for them.
            progress: called with the ids written so far.
            batch_size: outputs that are turned into clips together.

        Yields:
            Place of a request among all, and its clip, in the order in which they are finished.
        """
        items: dict[int, PreparedClip] = {}

        def requests() -> Iterator[GenerationRequest]:
            for index, item in enumerate(prepared):
                items[index] = item
                yield item.generation

        outputs = self.engine.stream(requests(), progress)
        while finished := list(itertools.islice(outputs, batch_size)):
            chosen = [items.pop(index) for index, _ in finished]
            clips = self.finish_all(chosen, [ids for _, ids in finished])
            yield from zip((index for index, _ in finished), clips, strict=True)

    def finish_all(self, prepared: Sequence[PreparedClip], outputs: Sequence[list[int]]) -> list[GeneratedClip]:
        """Turn what an engine wrote into clips, all of them together.

        Args:
            prepared: from `prepare`.
            outputs: the output ids of each.

        Returns:
            One clip a request, in order.
        """
        parts = [self._parts(item, ids) for item, ids in zip(prepared, outputs, strict=True)]
        joined = [item.task.join_clip(own)[0] for item, own in zip(prepared, parts, strict=True)]
        pictures = self._upsample(prepared, joined)
        frames = [None if codes is None else self.codecs.decode_video(codes) for codes in pictures]
        return [
            self._finished(item, ids, own, picture)
            for item, ids, own, picture in zip(prepared, outputs, parts, frames, strict=True)
        ]

    def finish_one(self, prepared: PreparedClip, ids: Sequence[int], frames: NDArray[np.uint8]) -> GeneratedClip:
        """`finish_all` of one clip, for someone who has decoded its (N, H, W, 3) frames already."""
        return self._finished(prepared, ids, self._parts(prepared, ids), frames)

    def _parts(self, item: PreparedClip, ids: Sequence[int]) -> ClipParts:
        """What was given and what was written."""
        scene = unpack(np.concatenate([item.generation.prefix_ids, ids]), self.bundle.vocabulary)
        return dataclasses.replace(item.parts, video_out=scene.video_out, audio_out=scene.audio_out)

    def _finished(
        self, item: PreparedClip, ids: Sequence[int], parts: ClipParts, frames: NDArray[np.uint8] | None
    ) -> GeneratedClip:
        scene = unpack(np.concatenate([item.generation.prefix_ids, ids]), self.bundle.vocabulary)
        _, audio = item.task.join_clip(parts)
        samples = None if audio is None else self.codecs.decode_audio(audio)
        return GeneratedClip(
            request=item.request,
            clip=None if item.task.writes_text else self._finish(item, frames, samples),
            text=None if scene.text_out is None else self.text_tokenizer.decode(list(scene.text_out)),
            ids=tuple(ids),
            metadata=self.describe(item.request, ids),
        )

    def prepare(self, request: ClipRequest, index: int = 0) -> PreparedClip:
        """Encode what is given, pack the prefix and say what may be written.

        Args:
            request: a clip to write; without a seed it is given one.
            index: of the request among others, for the message.

        Returns:
            What `stream` takes.

        Raises:
            ConfigError: a request that cannot be carried out, or of a task that the bundle's model was not trained on.
        """
        task = get_task(request.task)
        self.bundle.check_trained(task.name)
        if request.adapter is not None and request.adapter not in self.adapters:
            raise ConfigError(
                f"request {index}: adapter must be one of those that the pipeline was started with, "
                f"{', '.join(self.adapters) or 'which are none'}; got {request.adapter!r}."
            )
        if request.decoding is not None:
            self.bundle.check_parallel()
        if request.upsampling is not None:
            self._check_upsampling(task)
        clip = request.clip
        task.check_inputs(_given_kinds(task, request))
        if request.sampling.seed is None:
            seeded = dataclasses.replace(request.sampling, seed=secrets.randbelow(2**31))
            request = dataclasses.replace(request, sampling=seeded)
        pieces = None if request.text is None else self._encode_text(request.text)
        video_in = self._encode_given_video(task, clip)
        num_given = 0 if video_in is None else len(video_in)
        shape = task.output_shape(self.geometry, num_given if task.conditioning != "nothing" and num_given else None)
        audio_in = self._encode_given_audio(task, clip, num_given)
        parts = ClipParts(video_in=video_in, audio_in=audio_in)
        sees_video = video_in is not None or shape.video is not None
        scene = Scene(
            task=task.name,
            text=pieces,
            video_in=parts.video_in,
            audio_in=parts.audio_in,
            resolution=self.geometry.resolution if sees_video else None,
            parallel=request.decoding is not None,
        )
        prefix = pack_prefix(scene, self.bundle.vocabulary)
        guide = self._guide(request, scene)
        room = self.bundle.model_config.scene_length - len(prefix) - _TEXT_MARKERS
        grammar = output_grammar(
            task,
            self.bundle.vocabulary,
            video_latent_shape=shape.video,
            num_audio_latents=shape.audio,
            max_text_pieces=max(1, min(MAX_WRITTEN_PIECES, room)),
        )
        canvas = None
        if request.decoding is not None:
            canvas = plan_canvas(
                request.decoding,
                task,
                self.bundle.vocabulary,
                video_latent_shape=shape.video,
                num_audio_latents=shape.audio,
            )
        generation = GenerationRequest(
            prefix_ids=tuple(prefix.tolist()),
            grammar=grammar,
            sampling=request.sampling,
            guide_ids=guide,
            canvas=canvas,
            adapter=request.adapter,
        )
        self.engine.check(generation, index=index)
        return PreparedClip(request=request, task=task, parts=parts, num_given=num_given, generation=generation)

    def _guide(self, request: ClipRequest, scene: Scene) -> tuple[int, ...] | None:
        """The prefix that guidance moves away from: without the text, or with the negative one; None without a text."""
        if request.negative_text is not None:
            if scene.text is None:
                raise ConfigError("a negative prompt must come with a prompt, got none: it takes the place of no text.")
            if request.sampling.guidance_scale == 1:
                raise ConfigError(
                    "a negative prompt must come with a guidance_scale other than 1, which is off; 2 or 3 is usual."
                )
            scene = dataclasses.replace(scene, text=self._encode_text(request.negative_text))
            return tuple(pack_prefix(scene, self.bundle.vocabulary).tolist())
        if not scene.text:
            return None
        return tuple(pack_prefix(scene, self.bundle.vocabulary, drop_text=True).tolist())

    def _encode_text(self, text: str) -> tuple[int, ...]:
        if len(text) > MAX_TEXT_CHARACTERS:
            raise ConfigError(
                f"the prompt must have at most {MAX_TEXT_CHARACTERS:,} characters, it has {len(text):,}. Shorten it."
            )
        pieces = tuple(self.text_tokenizer.encode(text))
        longest = self.bundle.model_config.scene_length - self._output_length() - 16
        if len(pieces) > longest:
            raise ConfigError(
                f"the prompt must have at most {longest} text pieces beside a clip, it has {len(pieces)} "
                f"({len(text):,} characters). Shorten it."
            )
        return pieces

    def _output_length(self) -> int:
        """Ids of a whole clip's picture and sound."""
        audio = self.geometry.num_audio_latents(self.geometry.num_frames) * self.bundle.vocabulary.num_audio_codebooks
        return int(np.prod(self.geometry.latent_shape)) + audio

    def _encode_given_video(self, task: Task, clip: Clip | None) -> NDArray[np.int64] | None:
        if clip is None or clip.frames is None or "video" not in task.inputs | task.optional:
            return None
        frames = self._check_frames(clip.frames)
        if task.conditioning == "first_frame":
            frames = frames[:1]
        elif task.conditioning == "first_frames":
            wanted = self.geometry.num_video_frames(task.default_condition(self.geometry.latent_shape[0]))
            frames = frames[-self._whole_latents(min(wanted, len(frames))) :]
        elif len(frames) != self.geometry.num_frames:
            raise ConfigError(
                f"task {task.name} must be given a clip of {self.geometry.num_frames} frames, got {len(frames)}."
            )
        return self.codecs.encode_frames(frames)

    def _encode_given_audio(self, task: Task, clip: Clip | None, num_given: int) -> NDArray[np.int64] | None:
        if clip is None or clip.samples is None or "audio" not in task.inputs | task.optional:
            return None
        frames = self.geometry.num_video_frames(num_given) if task.conditioning == "first_frames" else None
        wanted = self.geometry.num_samples(self.geometry.num_frames if frames is None else frames)
        samples = clip.samples[-wanted:] if frames is not None else clip.samples[:wanted]
        samples = np.pad(samples, (wanted - len(samples), 0) if frames is not None else (0, wanted - len(samples)))
        return self.codecs.encode_samples(samples)

    def _check_frames(self, frames: NDArray[np.uint8]) -> NDArray[np.uint8]:
        if frames.shape[1:3] != self.geometry.resolution:
            raise ConfigError(
                f"the given picture must be {self.geometry.height} x {self.geometry.width} pixels, "
                f"got {frames.shape[1]} x {frames.shape[2]}. Read it with poet.media at that size."
            )
        return frames

    def _whole_latents(self, num_frames: int) -> int:
        """The largest 1 + k * temporal_stride that is at most `num_frames`."""
        stride = self.geometry.temporal_stride
        return 1 + (num_frames - 1) // stride * stride

    def _check_upsampling(self, task: Task) -> None:
        if not task.writes_video or task.conditioning == "first_frames":
            raise ConfigError(
                f"task {task.name} cannot be upsampled: upsampling is for tasks that write the whole picture. Leave it "
                "out."
            )
        self.bundle.check_upsampler()
        self.engine.upsample([])  # raises where the engine cannot: now, and not after the long work

    def _upsample(
        self, prepared: Sequence[PreparedClip], codes: Sequence[NDArray[np.int64] | None]
    ) -> list[NDArray[np.int64] | None]:
        """The codes of the larger size for those clips that ask for it."""
        results = list(codes)
        wanted: dict[int, UpsamplingRequest] = {}
        for place, (item, low) in enumerate(zip(prepared, codes, strict=True)):
            asked = item.request
            if asked.upsampling is not None and low is not None:
                text = () if asked.text is None else tuple(self._encode_text(asked.text))
                settings = dataclasses.replace(asked.upsampling, seed=asked.sampling.seed or 0)
                wanted[place] = UpsamplingRequest(low=low, text=text, settings=settings)
        if wanted:
            for place, high in zip(wanted, self.engine.upsample(list(wanted.values())), strict=True):
                results[place] = high
        return results

    def _finish(
        self, item: PreparedClip, frames: NDArray[np.uint8] | None, samples: NDArray[np.float32] | None
    ) -> Clip:
        """Put what was given in front of what a continuation wrote, and make picture and sound equally long."""
        geometry, given = self.geometry, item.request.clip
        if item.task.conditioning == "first_frames" and frames is not None:
            assert given is not None
            assert given.frames is not None
            start = geometry.num_video_frames(item.num_given)
            source = given.frames
            new_samples = None if samples is None else samples[-self._new_samples(item) :]
            if new_samples is not None:
                before = round(len(source) * geometry.sample_rate / geometry.fps)
                sound = np.zeros(before, np.float32) if given.samples is None else given.samples[:before]
                sound = np.pad(sound, (0, before - len(sound)))
                samples = np.concatenate([sound, new_samples])
            frames = np.concatenate([source, frames[start:]])
        if item.task.outputs == "audio" and given is not None and given.frames is not None:
            frames = given.frames
        if item.task.outputs == "video" and given is not None and given.samples is not None:
            samples = given.samples
        if frames is not None and samples is not None:
            length = round(len(frames) * geometry.sample_rate / geometry.fps)
            samples = np.pad(samples[:length], (0, max(0, length - len(samples))))
        return Clip(frames=frames, fps=geometry.fps, samples=samples, sample_rate=geometry.sample_rate)

    def _new_samples(self, item: PreparedClip) -> int:
        shape = item.task.output_shape(self.geometry, item.num_given)
        return (shape.audio or 0) * self.geometry.hop_length

    def describe(self, request: ClipRequest, ids: Sequence[int]) -> dict[str, str]:
        """What made the clip, for its container's metadata."""
        sampling = request.sampling
        # No text is not the same as an empty one: made again, they give other ids.
        prompt = {} if request.text is None else {"prompt": request.text}
        if request.negative_text is not None:
            prompt["negative_prompt"] = request.negative_text
        return {
            "generator": f"Poet {__version__}",
            "machine_made": "yes",
            "bundle": self.bundle.name,
            "fingerprint": self.bundle.fingerprint,
            "weights_sha256": self.weights_sha256,
            "engine": self.engine.name,
            "task": request.task,
            **prompt,
            "seed": str(sampling.seed),
            "temperature": repr(sampling.temperature),
            "top_k": str(sampling.top_k),
            "top_p": repr(sampling.top_p),
            "guidance_scale": repr(float(sampling.guidance_scale)),
            **describe_repetition(sampling),
            **describe_decoding(request.decoding),
            **describe_upsampling(request.upsampling, self.bundle),
            **describe_adapter(None if request.adapter is None else self.adapters[request.adapter]),
            "ids_sha256": hash_ids(ids),
        }


def _given_kinds(task: Task, request: ClipRequest) -> list[str]:
    """What a request gives. A clip may hold more than the task reads, as long as the task reads one half of it."""
    frames, samples = (None, None) if request.clip is None else (request.clip.frames, request.clip.samples)
    reads = task.inputs | task.optional
    there = {"text": request.text is not None, "video": frames is not None, "audio": samples is not None}
    for kind, other in (("video", "audio"), ("audio", "video")):
        there[kind] &= kind in reads or not (there[other] and other in reads)
    return [kind for kind, given in there.items() if given]
