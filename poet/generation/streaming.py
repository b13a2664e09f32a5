"""Clips and films while they are being written: frames as their latent frames are complete, sound as a scene ends.

An engine writes in a thread of its own; here its ids are turned into pictures meanwhile. What comes out piece by piece
is, joined, what `Pipeline.generate` and `write_films` give at once: the same codes, decoded in the same parts.

Legend: N frames of H x W pixels, S samples, T latent frames of h x w places.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import queue
import threading
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from poet.errors import ConfigError
from poet.generation.engine import Engine, GenerationRequest
from poet.generation.film import FilmRequest, FilmScenes
from poet.generation.joining import Frames, Samples
from poet.generation.pipeline import ClipRequest, Pipeline
from poet.sequence import output_places

__all__ = ["Piece", "stream_clip", "stream_film"]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Piece:
    """The next part of a clip, or what is known of it once it is whole.

    Attributes:
        frames: (N, H, W, 3) uint8, the next ones; or None.
        samples: (S,) float32, the next ones; or None.
        metadata: what makes the clip, in its first piece, and with the hash of its ids in its last one.
        is_last: whether nothing comes after it.
    """

    frames: Frames | None = None
    samples: Samples | None = None
    metadata: dict[str, str] | None = None
    is_last: bool = False


class _Ended(Exception):
    """Nobody wants the rest."""


def stream_clip(pipeline: Pipeline, request: ClipRequest) -> Generator[Piece, None, None]:
    """Write one clip and give its pictures while they are written.

    Args:
        pipeline: with an engine for the request's way of decoding.
        request: of a task that writes video and is not a continuation, whose frames come after those that are given;
            a canvas, of which no part is done early, comes whole.

    Yields:
        What makes it, its frames, its sound if it has one, and what made it.

    Raises:
        ConfigError: a request that cannot be carried out, or not piece by piece.
    """
    prepared = pipeline.prepare(request)
    task = prepared.task
    if not task.writes_video or task.conditioning == "first_frames" or request.upsampling is not None:
        raise ConfigError(
            f"task {task.name} cannot be streamed{' and upsampled' if request.upsampling is not None else ''}: pieces "
            "are for pictures that are written from their beginning on. Leave --stream out."
        )
    given = [] if prepared.parts.video_in is None or not task.extends_video else list(prepared.parts.video_in)
    shape = task.output_shape(pipeline.geometry, len(given) or None)
    places = output_places(
        task, pipeline.bundle.vocabulary, video_latent_shape=shape.video, num_audio_latents=shape.audio
    ).video
    assert places is not None
    facts = pipeline.describe(prepared.request, ())
    del facts["ids_sha256"]
    yield Piece(metadata=facts)
    ids: list[int] = []
    whole: list[Frames] = []
    with contextlib.closing(_latents(pipeline, prepared.generation, places, ids)) as latents:
        for frames in pipeline.codecs.decode_latents(itertools.chain(given, latents)):
            whole.append(frames)
            yield Piece(frames=frames)
    clip = pipeline.finish_one(prepared, ids, np.concatenate(whole))
    assert clip.clip is not None
    if clip.clip.samples is not None:
        yield Piece(samples=clip.clip.samples)
    yield Piece(metadata=clip.metadata, is_last=True)


def stream_film(pipeline: Pipeline, request: FilmRequest) -> Generator[Piece, None, None]:
    """Write a film and give its pictures while they are written.

    Args:
        pipeline: as in `poet.generation.film.write_films`.
        request: a film.

    Yields:
        What makes it, frames and sound in turn, and what made it. A scene's last frame comes with the next one's first.

    Raises:
        ConfigError: a request that cannot be carried out.
    """
    film = FilmScenes(pipeline, request)
    join = film.new_join()
    yield Piece(metadata=film.describe())
    yield from _pieces(*join.begin(request.start))
    while not film.done:
        generation = film.ask()
        count = pipeline.geometry.num_frames
        scene: list[Frames] = []
        ids: list[int] = []
        with contextlib.closing(_latents(pipeline, generation, film.places(), ids)) as latents:
            for frames in pipeline.codecs.decode_latents(latents):
                starts, scene = not scene, [*scene, frames]
                yield from _pieces(join.add_frames(frames, starts=starts, ends=sum(map(len, scene)) == count), None)
        clip = film.finish(ids, np.concatenate(scene))
        assert clip.samples is not None
        yield from _pieces(None, join.add_samples(clip.samples))
    yield from _pieces(*join.close(request.end))
    yield Piece(metadata=film.describe(), is_last=True)


def _pieces(frames: Frames | None, samples: Samples | None) -> Iterator[Piece]:
    if frames is not None and len(frames):
        yield Piece(frames=frames)
    if samples is not None and len(samples):
        yield Piece(samples=samples)


def _latents(pipeline: Pipeline, request: GenerationRequest, places: Any, ids: list[int]) -> Generator[Any, None, None]:
    """The (h, w) codes of each latent frame as soon as they are written; `ids` holds the whole output at the end.

    Args:
        pipeline: gives engine and vocabulary.
        request: to be written.
        places: (T, h, w) places of the codes in the output.
        ids: empty; filled.
    """
    done = 0
    with contextlib.closing(_growing(pipeline.engine, request)) as outputs:
        for output in outputs:
            while done < len(places) and places[done].max() < len(output):
                yield pipeline.bundle.vocabulary.video_from_ids(np.asarray(output)[places[done]])
                done += 1
            ids[:] = output


def _growing(engine: Engine, request: GenerationRequest) -> Generator[list[int], None, None]:
    """An output again and again while it grows, and at last whole.

    Whoever gives it up early waits until the engine has stopped, which it does at its next id or step.
    """
    news: queue.SimpleQueue[list[int] | None] = queue.SimpleQueue()
    given_up = threading.Event()

    def go_on(*_: object) -> None:
        if given_up.is_set():
            raise _Ended

    def grown(_: int, ids: Sequence[int]) -> None:
        go_on()
        news.put(list(ids))

    def write() -> None:
        for _, output in engine.stream([request], go_on, grown):
            news.put(output)

    with ThreadPoolExecutor(1, thread_name_prefix="poet-writer") as pool:
        writing = pool.submit(write)
        writing.add_done_callback(lambda _: news.put(None))
        try:
            while (found := news.get()) is not None:
                yield found
            writing.result()
        finally:
            given_up.set()
