"""Films: a prompt a scene, each scene written behind all earlier ones and joined to them without a seam.

    prompts -> scenes (pipeline), each behind the ids of all earlier ones -> frames and samples, joined

A scene begins in the picture that the one before ended with: that frame is encoded anew, and its codes are pinned as
the scene's first latent frame, so the thing stays the same and where it was. The sounds of two scenes overlap for the
length of that frame and are faded into each other (`poet.generation.joining`). The end of a film can be pinned the same
way: to the beginning of another clip, or of the film itself.

This file knows scenes and how they hang together; prompts, codecs and what an engine is asked for one scene are the
pipeline's.

Legend: N frames of H x W pixels, S samples, T latent frames of h x w places.
"""

from __future__ import annotations

import dataclasses
import json
import secrets
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from poet.bundle import Bundle
from poet.errors import ConfigError
from poet.generation.canvas import ParallelDecoding, choose_decoding
from poet.generation.engine import GenerationRequest
from poet.generation.joining import Frames, Samples, SeamlessJoin
from poet.generation.pipeline import ClipRequest, Pipeline, PreparedClip
from poet.generation.sampling import SamplingConfig
from poet.grammar import pin
from poet.media import Clip
from poet.sequence import PackedScene, Scene, output_places, pack, pad_scene, unpack

__all__ = [
    "FilmRequest",
    "FilmScenes",
    "GeneratedFilm",
    "check_film",
    "decodings_needed",
    "scenes_needed",
    "write_films",
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class FilmRequest:
    """A film to write.

    Attributes:
        scenes: a prompt for each scene; None for a scene without one.
        negative_text: what the film shall not be like, see `ClipRequest`.
        sampling: how ids are drawn. Its seed is the first scene's and counted up.
        decoding: how to write many ids at once; None writes one after another.
        adapter: name of one of the pipeline's LoRA adapters.
        memory: how many earlier scenes a scene sees; None: as many as the model has met in training, or has positions
            for where the bundle does not say.
        start: a clip to go on from, of any length, at the bundle's size and rates; the film begins with it.
        end: a clip to arrive at; the film ends with it. The last scene is written in parallel then, since what is
            written one id after another cannot know where it has to end.
        loop: whether the film shall arrive where it began.

    Raises:
        ConfigError: no scene, a memory below 0, both a loop and an end, a loop of one scene, or a clip without
            pictures.
    """

    scenes: tuple[str | None, ...]
    negative_text: str | None = None
    sampling: SamplingConfig = dataclasses.field(default_factory=SamplingConfig)
    decoding: ParallelDecoding | None = None
    adapter: str | None = None
    memory: int | None = None
    start: Clip | None = None
    end: Clip | None = None
    loop: bool = False

    def __post_init__(self) -> None:
        if not self.scenes:
            raise ConfigError("a film must have at least one scene, got none. Give a prompt for each.")
        if self.memory is not None and self.memory < 0:
            raise ConfigError(f"memory must be at least 0 earlier scenes, got {self.memory}. 0 sees none.")
        if self.loop and self.end is not None:
            raise ConfigError("a film must end where it began or with a clip, not both. Leave one out.")
        if any(clip is not None and clip.frames is None for clip in (self.start, self.end)):
            raise ConfigError("a film must begin and end with pictures, got a clip that has none. Give it frames.")
        if self.loop and self.start is None and len(self.scenes) < 2:
            raise ConfigError(
                "a film that arrives where it began must have two scenes or more, or a clip to start from, got "
                f"{len(self.scenes)} scene. Add one."
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class GeneratedFilm:
    """What a request became.

    Attributes:
        request: as carried out, with its seed.
        clip: the film.
        scenes: each scene by itself; the first frame of one shows what the last of the one before does.
        ids: output ids of each scene.
        metadata: what made it, for the container of the file.
    """

    request: FilmRequest
    clip: Clip
    scenes: tuple[Clip, ...]
    ids: tuple[tuple[int, ...], ...]
    metadata: dict[str, str]


def write_films(
    pipeline: Pipeline, requests: Sequence[FilmRequest], progress: Callable[[int, int], None] | None = None
) -> list[GeneratedFilm]:
    """Write films, scene by scene, the scenes of all films that are at the same place in one batch.

    Args:
        pipeline: whose engine was started for films of so many scenes (`scenes_needed`).
        requests: any number.
        progress: called with (scenes written, in all).

    Returns:
        One film a request, in order.

    Raises:
        ConfigError: a request that cannot be carried out; nothing has been written then.
    """
    films = [FilmScenes(pipeline, request) for request in requests]
    joins = [film.new_join() for film in films]
    frames: list[list[Frames]] = [[] for _ in films]
    samples: list[list[Samples]] = [[] for _ in films]
    scenes: list[list[Clip]] = [[] for _ in films]
    for place, (film, join) in enumerate(zip(films, joins, strict=True)):
        _extend(frames[place], samples[place], join.begin(film.request.start))
    done, total = 0, sum(len(request.scenes) for request in requests)
    while due := [place for place, film in enumerate(films) if not film.done]:
        outputs = pipeline.engine.generate([films[place].ask() for place in due])
        for place, ids in zip(due, outputs, strict=True):
            clip = films[place].take(ids)
            scenes[place].append(clip)
            assert clip.frames is not None
            assert clip.samples is not None
            pictures = joins[place].add_frames(clip.frames, starts=True, ends=True)
            _extend(frames[place], samples[place], (pictures, joins[place].add_samples(clip.samples)))
        done += len(due)
        if progress is not None:
            progress(done, total)
    results = []
    for place, (film, join) in enumerate(zip(films, joins, strict=True)):
        _extend(frames[place], samples[place], join.close(film.request.end))
        results.append(
            GeneratedFilm(
                request=film.request,
                clip=film.as_clip(np.concatenate(frames[place]), np.concatenate(samples[place])),
                scenes=tuple(scenes[place]),
                ids=tuple(film.ids),
                metadata=film.describe(),
            )
        )
    return results


def check_film(bundle: Bundle, request: FilmRequest) -> None:
    """Raise unless the bundle's model can write such a film; before an engine is started for it.

    Raises:
        ConfigError: it has not learnt films, or not to write in parallel, or a clip is of another size or rate.
    """
    if request.loop or request.end is not None:
        bundle.check_parallel()
    if scenes_needed(bundle, [request]) > 1:
        bundle.check_films()
    size = bundle.geometry()
    for name, clip in (("start", request.start), ("end", request.end)):
        if clip is None or clip.frames is None:
            continue
        found = (*clip.frames.shape[1:3], clip.fps, size.sample_rate if clip.samples is None else clip.sample_rate)
        wanted = (size.height, size.width, size.fps, size.sample_rate)
        if found != wanted:
            raise ConfigError(
                f"the clip at the film's {name} must have {wanted[0]} x {wanted[1]} pixels, {wanted[2]:g} frames and "
                f"{wanted[3]} samples a second, got {found[0]} x {found[1]}, {found[2]:g} and {found[3]}. Read it with "
                "poet.media at these."
            )


def scenes_needed(bundle: Bundle, requests: Sequence[FilmRequest]) -> int:
    """Scenes of the longest request of these films, the one that is written included: what engines are started for.

    Args:
        bundle: gives the length of a scene, and how many the model sees.
        requests: the films.
    """
    step, longest = bundle.generation_config.num_frames - 1, 1
    for request in requests:
        earlier = _given_scenes(request, step) + len(request.scenes) - 1
        longest = max(longest, 1 + min(earlier, _memory_of(bundle, request)))
    return longest


def decodings_needed(requests: Sequence[FilmRequest]) -> list[str]:
    """What engines are started with: a film that arrives somewhere has its last scene written in parallel."""
    ways = ["autoregressive" if request.decoding is None else "parallel" for request in requests]
    arrives = any(request.loop or request.end is not None for request in requests)
    return list(dict.fromkeys([*ways, *(["parallel"] if arrives else [])]))


def _memory_of(bundle: Bundle, request: FilmRequest) -> int:
    """Earlier scenes that a scene sees at most."""
    most = bundle.model_config.max_position_embeddings // bundle.model_config.scene_length - 1
    if request.memory is not None:
        return min(most, request.memory)
    return most if bundle.trained_films is None else min(most, bundle.trained_films - 1)


def _given_scenes(request: FilmRequest, step: int) -> int:
    """Whole scenes of the clip that a film goes on from."""
    return 0 if request.start is None or request.start.frames is None else (len(request.start.frames) - 1) // step


class FilmScenes:
    """One film while its scenes are written: what the next scene is asked for, and what the written ones show.

    Args:
        pipeline: prepares scenes, and turns codes into frames and samples.
        request: the film.

    Attributes:
        request: with a seed.
        ids: output ids of the scenes so far.

    Raises:
        ConfigError: a request that cannot be carried out.
    """

    def __init__(self, pipeline: Pipeline, request: FilmRequest) -> None:
        check_film(pipeline.bundle, request)
        self._pipeline, self._geometry = pipeline, pipeline.geometry
        self._scene_length = pipeline.bundle.model_config.scene_length
        self._memory = _memory_of(pipeline.bundle, request)
        if request.sampling.seed is None:
            seeded = dataclasses.replace(request.sampling, seed=secrets.randbelow(2**31))
            request = dataclasses.replace(request, sampling=seeded)
        self.request = request
        self._prepared: PreparedClip | None = None
        self._past: list[tuple[int, ...]] = []
        self._last_frame: Frames | None = None
        self._beginning: Frames | None = None  # the first latent frame's worth of the film, where a loop arrives
        self.ids: list[tuple[int, ...]] = []
        self._check_scenes()
        if request.start is not None:
            self._go_on_from(request.start)

    @property
    def done(self) -> bool:
        """Whether all scenes are written."""
        return len(self.ids) == len(self.request.scenes)

    @property
    def fade_frames(self) -> int:
        """Frames at the end of the film that show what it arrives at; 0 where it arrives at nothing."""
        return self._geometry.temporal_stride if self.request.loop or self.request.end is not None else 0

    def new_join(self) -> SeamlessJoin:
        """What joins the film's scenes."""
        return SeamlessJoin(
            fps=self._geometry.fps,
            sample_rate=self._geometry.sample_rate,
            fade_frames=self.fade_frames,
            loop=self.request.loop,
        )

    def ask(self) -> GenerationRequest:
        """What an engine is asked for the next scene."""
        number = len(self.ids)
        self._prepared = self._pipeline.prepare(self._clip_request(number), number)
        context = self._past[-self._memory :] if self._memory else []
        return dataclasses.replace(
            self._prepared.generation,
            grammar=pin(self._prepared.generation.grammar, self._pins(arrives=self._arrives(number))),
            context_ids=tuple(id for scene in context for id in scene),
        )

    def places(self) -> NDArray[np.int64]:
        """Where the codes of the scene that was asked for last stand in its output: (T, h, w) int64."""
        assert self._prepared is not None
        task, vocabulary = self._prepared.task, self._pipeline.bundle.vocabulary
        shape = task.output_shape(self._geometry)
        places = output_places(task, vocabulary, video_latent_shape=shape.video, num_audio_latents=shape.audio).video
        assert places is not None
        return places

    def take(self, ids: Sequence[int]) -> Clip:
        """Add the scene that was asked for last.

        Args:
            ids: its output.

        Returns:
            Its frames and samples.
        """
        scene = self.unpack(ids)
        assert scene.video_out is not None
        return self.finish(ids, self._pipeline.codecs.decode_video(scene.video_out))

    def unpack(self, ids: Sequence[int]) -> Scene:
        """Read the codes of the scene that was asked for last."""
        assert self._prepared is not None
        return unpack(np.concatenate([self._prepared.generation.prefix_ids, ids]), self._pipeline.bundle.vocabulary)

    def finish(self, ids: Sequence[int], frames: Frames) -> Clip:
        """`take`, for someone who has its (N, H, W, 3) frames already."""
        scene = self.unpack(ids)
        assert scene.audio_out is not None
        self._remember(pack(dataclasses.replace(scene, parallel=False), self._pipeline.bundle.vocabulary))
        self.ids.append(tuple(ids))
        self._last_frame = frames[-1]
        if self._beginning is None:
            self._beginning = frames[: self._geometry.temporal_stride]
        return self.as_clip(frames, self._pipeline.codecs.decode_audio(scene.audio_out))

    def as_clip(self, frames: Frames, samples: Samples) -> Clip:
        """Frames (N, H, W, 3) and samples (S,), cut or padded to their length, as a clip."""
        length = round(len(frames) * self._geometry.sample_rate / self._geometry.fps)
        samples = np.pad(samples[:length], (0, max(0, length - len(samples))))
        return Clip(frames=frames, fps=self._geometry.fps, samples=samples, sample_rate=self._geometry.sample_rate)

    def describe(self) -> dict[str, str]:
        """What makes the film, for its container's metadata; with the hash of its ids once all scenes are written."""
        ids = [id for scene in self.ids for id in scene]
        request = dataclasses.replace(
            self._clip_request(0), text=None, negative_text=self.request.negative_text, decoding=self.request.decoding
        )
        facts = self._pipeline.describe(dataclasses.replace(request, sampling=self.request.sampling), ids)
        if not self.done:
            del facts["ids_sha256"]
        facts |= {"task": "film", "scenes": json.dumps(self.request.scenes)}
        if self.request.memory is not None:
            facts["memory"] = str(self.request.memory)
        if self.request.loop:
            facts["loop"] = "yes"
        return facts

    def _arrives(self, number: int) -> bool:
        return self.fade_frames > 0 and number == len(self.request.scenes) - 1

    def _clip_request(self, number: int) -> ClipRequest:
        film = self.request
        text, sampling, decoding = film.scenes[number], film.sampling, film.decoding
        assert sampling.seed is not None
        sampling = dataclasses.replace(sampling, seed=sampling.seed + number)
        if self._arrives(number) and decoding is None:
            decoding = choose_decoding(self._pipeline.bundle.generation_config.parallel, {})
            sampling = dataclasses.replace(sampling, repetition_penalty=1.0)  # which is for one id after another
        return ClipRequest(
            task="unconditional" if text is None else "text_to_video_audio",
            text=text,
            negative_text=None if text is None else film.negative_text,
            sampling=sampling,
            decoding=decoding,
            adapter=film.adapter,
        )

    def _check_scenes(self) -> None:
        """Look at every scene as it will be asked for, so that a long film does not end at its last prompt."""
        given = _given_scenes(self.request, self._geometry.num_frames - 1)
        filler = self._pipeline.bundle.vocabulary.special("<pad>")
        for number in range(len(self.request.scenes)):
            generation = self._pipeline.prepare(self._clip_request(number), number).generation
            length = min(self._memory, given + number) * self._scene_length
            self._pipeline.engine.check(dataclasses.replace(generation, context_ids=(filler,) * length), index=number)

    def _pins(self, *, arrives: bool) -> dict[int, int]:
        """Place to id of what a scene has in common with what stands before and after it."""
        vocabulary, places = self._pipeline.bundle.vocabulary, self.places()
        known: list[tuple[NDArray[np.int64], NDArray[np.int64]]] = []
        if self._last_frame is not None:
            known.append((places[0], self._pipeline.codecs.encode_frames(self._last_frame[None])[0]))
        if arrives:
            end = self.request.end
            goal = self._beginning if end is None else end.frames
            assert goal is not None
            # What comes before the last latent frame is not written yet: its first frame stands there still.
            stride = self._geometry.temporal_stride
            goal = np.concatenate([goal[:stride], np.repeat(goal[-1:], max(0, stride - len(goal)), 0)])
            still = np.repeat(goal[:1], self._geometry.num_frames - stride, 0)
            known.append((places[-1], self._pipeline.codecs.encode_frames(np.concatenate([still, goal]))[-1]))
        pins: dict[int, int] = {}
        for own, codes in known:
            pins |= dict(zip(own.ravel().tolist(), vocabulary.video_to_ids(codes).ravel().tolist(), strict=True))
        return pins

    def _go_on_from(self, clip: Clip) -> None:
        """Take the whole scenes of a clip, counted from its end, as the film's past."""
        frames, geometry = clip.frames, self._geometry
        assert frames is not None
        step = geometry.num_frames - 1
        count = min(_given_scenes(self.request, step), self._memory)
        for number in range(count, 0, -1):
            first = len(frames) - 1 - number * step
            self._remember(self._pack_given(clip, first))
        self._last_frame, self._beginning = frames[-1], frames[: geometry.temporal_stride]

    def _pack_given(self, clip: Clip, first: int) -> PackedScene:
        """A scene of a given clip, from frame `first` on."""
        geometry, codecs = self._geometry, self._pipeline.codecs
        assert clip.frames is not None
        audio = None
        if clip.samples is not None:
            begin = round(first * geometry.sample_rate / geometry.fps)
            wanted = geometry.num_samples(geometry.num_frames)
            samples = clip.samples[begin : begin + wanted]
            audio = codecs.encode_samples(np.pad(samples, (0, wanted - len(samples))))
        scene = Scene(
            task="text_to_video" if audio is None else "unconditional",
            text=() if audio is None else None,
            video_out=codecs.encode_frames(clip.frames[first : first + geometry.num_frames]),
            audio_out=audio,
            resolution=geometry.resolution,
        )
        return pack(scene, self._pipeline.bundle.vocabulary)

    def _remember(self, packed: PackedScene) -> None:
        padded = pad_scene(packed, self._scene_length, self._pipeline.bundle.vocabulary)
        self._past.append(tuple(padded.ids.tolist()))


def _extend(frames: list[Frames], samples: list[Samples], parts: tuple[Frames | None, Samples | None]) -> None:
    if parts[0] is not None:
        frames.append(parts[0])
    if parts[1] is not None:
        samples.append(parts[1])
