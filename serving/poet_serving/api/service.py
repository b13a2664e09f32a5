"""What the service does for a request, whoever asks over whatever: accept, look up, delete, hand out files.

Knows orders, jobs and media; it does not know HTTP.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import secrets
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np

from poet.bundle import Bundle
from poet.errors import ConfigError, MediaError
from poet.generation.pipeline import Pipeline
from poet.media import Clip, read_clip
from poet_serving.api.batch_runner import BatchRunner
from poet_serving.api.finishing import encode_clip
from poet_serving.api.guard import Limits, TooMany
from poet_serving.api.metrics import Metrics
from poet_serving.api.objects import ModelObject, VideoObject, to_video
from poet_serving.api.orders import REFERENCE, Order, pack_clip, unpack_clip
from poet_serving.api.worker import Worker
from poet_serving.file_store import FileStore
from poet_serving.jobs import Job, JobError, JobStatus, JobStore
from poet_serving.media_reader import MediaReader
from poet_serving.phrases import Phrases, edit_prompt
from poet_serving.references import data_url_content
from poet_serving.schema import InputReference, RequestError, VideoBody, check_model

__all__ = ["MAX_EXTENSION", "Service", "store_error"]

_log = logging.getLogger(__name__)

MAX_EXTENSION: Final = 20.0  # seconds
_BUSY: Final = 5.0  # seconds after which to come again where the queue is full
_LOOK_AGAIN: Final = 30.0  # seconds; a job that ends says so
_STORE_CODES: Final = {"not_found": 404, "idempotency_conflict": 409}


class Service:
    """Everything that a route may ask for. To be made in the event loop that serves.

    Args:
        bundle: the model.
        pipeline: checks requests.
        store: keeps jobs.
        worker: carries them out.
        reader: opens what strangers send.
        limits: of one key.
        metrics: is told what happens.
        phrases: by which prompts are edited; None: what is said is added to them.
        name: by which requests may call the bundle besides its own name.
    """

    def __init__(
        self,
        *,
        bundle: Bundle,
        pipeline: Pipeline,
        store: JobStore,
        worker: Worker,
        reader: MediaReader,
        limits: Limits,
        metrics: Metrics,
        phrases: Phrases | None,
        name: str,
    ) -> None:
        self.bundle, self.pipeline, self.store, self.worker = bundle, pipeline, store, worker
        self.reader, self.limits, self.metrics, self.phrases = reader, limits, metrics, phrases
        self.files, self.batches = FileStore(store), BatchRunner(self)
        self.name = name
        self._started = int(time.time())
        defaults = bundle.generation_config
        self._size, self._seconds = f"{defaults.width}x{defaults.height}", bundle.geometry().duration

    def models(self) -> Sequence[ModelObject]:
        """The bundle, and then its adapters."""
        defaults = self.bundle.generation_config
        sizes = [self._size]
        if self.bundle.upsampler is not None:
            scale = self.bundle.upsampler_scale
            sizes.append(f"{scale * defaults.width}x{scale * defaults.height}")
        tasks = self.bundle.trained_tasks
        own = ModelObject(
            id=self.name,
            created=self._started,
            tasks=None if tasks is None else list(tasks),
            decodings=["autoregressive", *(["parallel"] if self._writes_parallel() else [])],
            sizes=sizes,
            seconds=self._seconds,
        )
        return [own, *(own.model_copy(update={"id": name, "parent": self.name}) for name in self.pipeline.adapters)]

    def _writes_parallel(self) -> bool:
        try:
            self.bundle.check_parallel()
        except ConfigError:
            return False
        return True

    async def submit(
        self,
        owner: str,
        body: VideoBody,
        *,
        reference: bytes | None = None,
        clip: Clip | None = None,
        idempotency_key: str | None = None,
        remixed_from: str | None = None,
        extend_by: float | None = None,
    ) -> VideoObject:
        """Accept a job; when this returns it is stored.

        Args:
            owner: on whose behalf.
            body: a checked one.
            reference: what was uploaded with it, not yet opened.
            clip: a clip of our own in its place.
            idempotency_key: the caller's own name for the request.
            remixed_from: id of the video that it is made from.
            extend_by: seconds to go on for behind the clip.

        Raises:
            RequestError: it cannot be carried out, or there is no room for it.
        """
        check_model(body, (self.name, *self.pipeline.adapters))
        if idempotency_key is None:  # a known key is answered also where there is no room
            await self.check_room(owner)
        if reference is None and body.input_reference is not None:
            reference = await self._content(owner, body.input_reference)
        task = body.task
        if reference is not None:
            read = await self.reader.read(reference, task=task, has_text=body.prompt is not None)
            task, clip = read.task, read.clip
        if task is None:
            task = self.bundle.generation_config.task if body.prompt is not None else "unconditional"
        asked = {
            "body": body.model_dump(mode="json", exclude_none=True),
            "remixed_from": remixed_from,
            "extend_by": extend_by,
        }
        if body.seed is None:  # now: begun again after a kill, the job becomes the same clip
            body = body.model_copy(update={"seed": secrets.randbelow(2**31)})
        adapter = None if body.model is None else self.pipeline.adapters.get(body.model)
        order = Order(
            body=body,
            task=task,
            model=body.model or self.name,
            adapter=None if adapter is None else adapter.name,
            adapter_sha256=None if adapter is None else adapter.sha256,
            remixed_from=remixed_from,
            extend_by=extend_by,
        )
        await asyncio.to_thread(self._check, order, clip)
        files = {} if clip is None else {REFERENCE: pack_clip(clip)}
        job, is_new = await self.with_store(
            self.store.submit,
            owner,
            order.to_dict(),
            files=files,
            idempotency_key=idempotency_key,
            asked=asked,
            max_open=self.limits.open_jobs,
            max_queued=self.limits.queue,
        )
        if is_new:
            self.worker.wake()
        return self.show(job)

    async def _content(self, owner: str, reference: InputReference) -> bytes:
        """What a reference names: an uploaded file or a data URL."""
        if reference.file_id is None:
            return data_url_content(reference)
        path = await self.with_store(self.files.path, reference.file_id, owner)
        return await asyncio.to_thread(path.read_bytes)

    async def check_room(self, owner: str) -> None:
        """Refuse what there is no room for before it is opened; the store counts again when it takes it.

        Raises:
            TooMany: the owner has as many open jobs as a key may have, or the queue of all is full.
            RequestError: the store cannot be read.
        """
        open_jobs = 0
        for status in (JobStatus.QUEUED, JobStatus.IN_PROGRESS):
            open_jobs += await self.with_store(self.store.count, status, owner)
        if open_jobs >= self.limits.open_jobs:
            message = f"a key must have at most {self.limits.open_jobs} jobs at a time. Wait for some to end."
            raise TooMany(message, "too_many_jobs", _BUSY)
        if await self.with_store(self.store.count, JobStatus.QUEUED) >= self.limits.queue:
            raise TooMany("the queue is full.", "queue_full", _BUSY)

    def _check(self, order: Order, clip: Clip | None) -> None:
        """Find out now whether it can be carried out."""
        try:
            self.pipeline.prepare(order.to_request(self.bundle, clip))
        except (ConfigError, MediaError) as error:
            raise RequestError(str(error), code="invalid_value") from error

    def start(self) -> None:
        """Begin to carry out jobs and batches, with what an earlier server left."""
        self.worker.start()
        self.batches.resume()

    async def stop(self) -> None:
        """End: what is open goes on after the next start."""
        await self.batches.stop()
        await self.worker.stop()

    async def remix(self, owner: str, id: str, prompt: str, idempotency_key: str | None = None) -> VideoObject:
        """A video again, as its prompt says once it is edited: the same settings and seed.

        Raises:
            RequestError: there is no such video, or it is not done.
        """
        VideoBody.parse({"prompt": prompt})  # is it one at all?
        job = await self._completed(owner, id)
        order = Order.from_dict(job.body)
        self._adapter_of(job)
        previous = (job.result or {}).get("prompt") or ""
        edited = await asyncio.to_thread(edit_prompt, previous, prompt, self.phrases) if previous else prompt
        values = order.body.model_dump(mode="json", exclude_none=True) | {"prompt": edited, "task": order.task}
        clip = await asyncio.to_thread(self._given, id)
        return await self.submit(
            owner,
            VideoBody.parse(values),
            clip=clip,
            idempotency_key=idempotency_key,
            remixed_from=id,
            extend_by=order.extend_by,
        )

    async def edit(
        self, owner: str, prompt: str, *, id: str | None, upload: bytes | None, idempotency_key: str | None = None
    ) -> VideoObject:
        """A clip again, changed as a prompt says. One of ours is remixed, one that is uploaded gives its first picture.

        Raises:
            RequestError: there is no such video, it is not done, or it cannot be read.
        """
        if id is not None:
            return await self.remix(owner, id, prompt, idempotency_key)
        read = await self.reader.read(upload or b"", task="image_to_video", has_text=True)
        body = VideoBody.parse({"prompt": prompt, "task": "image_to_video"})
        return await self.submit(owner, body, clip=read.clip, idempotency_key=idempotency_key)

    async def extend(
        self,
        owner: str,
        prompt: str | None,
        seconds: float | None,
        *,
        id: str | None,
        upload: bytes | None,
        idempotency_key: str | None = None,
    ) -> VideoObject:
        """A clip and how it goes on, in one.

        Raises:
            RequestError: there is no such video, it is not done, or it cannot be read or go on for so long.
        """
        if seconds is not None and not 0 < seconds <= MAX_EXTENSION:
            raise RequestError(
                f"seconds must be above 0 and at most {MAX_EXTENSION:g}, got {seconds:g}.",
                code="unsupported_seconds",
                param="seconds",
            )
        model = None
        if id is not None:
            clip = await self.finished_clip(owner, id)
            model = self._adapter_of(await self._job(owner, id))  # it goes on as it began
        else:
            task = "video_continuation"
            clip = (await self.reader.read(upload or b"", task=task, has_text=prompt is not None)).clip
        has_sound = clip.samples is not None and self._is_trained("audio_video_continuation")
        task = "audio_video_continuation" if has_sound else "video_continuation"
        body = VideoBody.parse({"prompt": prompt, "task": task, "model": model})
        return await self.submit(
            owner, body, clip=clip, idempotency_key=idempotency_key, remixed_from=id, extend_by=seconds
        )

    def _adapter_of(self, job: Job) -> str | None:
        """Name of the adapter that a video was made with; raises if there is no longer that one."""
        order = Order.from_dict(job.body)
        order.check_adapter(self.pipeline.adapters)
        return order.adapter

    def _is_trained(self, task: str) -> bool:
        trained = self.bundle.trained_tasks
        return trained is None or task in trained

    async def get(self, owner: str, id: str) -> VideoObject:
        """A job as it stands.

        Raises:
            RequestError: there is none, or it is somebody else's.
        """
        return self.show(await self._job(owner, id))

    async def list(
        self, owner: str, *, after: str | None, limit: int, order: Literal["asc", "desc"]
    ) -> tuple[Sequence[VideoObject], bool]:
        """A page of an owner's jobs, and whether there are more.

        Raises:
            RequestError: there is no job `after`.
        """
        jobs, more = await self.with_store(self.store.list, owner, after=after, limit=limit, order=order)
        return [self.show(job) for job in jobs], more

    async def delete(self, owner: str, id: str) -> None:
        """Remove a job, also one that is being carried out.

        Raises:
            RequestError: there is none, or it is somebody else's.
        """
        await self.with_store(self.store.delete, id, owner)
        await self.worker.cancel(id)

    async def wait(self, owner: str, id: str) -> Job:
        """A job once it has ended.

        Raises:
            RequestError: there is none, or it was deleted meanwhile.
        """
        while True:
            async with self.worker.watched(id) as ended:
                job = await self._job(owner, id)
                if job.status not in (JobStatus.QUEUED, JobStatus.IN_PROGRESS):
                    return job
                await asyncio.wait([ended], timeout=_LOOK_AGAIN)

    async def file(self, owner: str, id: str, variant: str) -> tuple[Path | bytes, str]:
        """A finished video as a file, or a picture or the sound of it, and its media type.

        Raises:
            RequestError: there is no such video or variant, or it is not done.
        """
        job = await self._completed(owner, id)
        result = dict(job.result or {})
        if "file" not in result:
            raise RequestError("the job wrote a text, which has no content.", code="no_content", status=404)
        path = self.store.file(id, result["file"])
        is_sound = path.suffix == ".wav"
        if variant == "video" or (is_sound and variant == "audio"):
            return path, "audio/wav" if is_sound else "video/mp4"
        clip = await asyncio.to_thread(self._finished_clip, id, result["file"])
        if variant == "audio":
            if clip.samples is None:
                raise RequestError("the video has no sound.", code="no_content", param="variant", status=404)
            sound = dataclasses.replace(clip, frames=None)
            return await self.with_store(self._encode, sound, ".wav", result.get("metadata")), "audio/wav"
        if clip.frames is None:
            raise RequestError("the job wrote a sound, which has no picture.", code="no_content", status=404)
        frames = clip.frames if variant == "spritesheet" else clip.frames[len(clip.frames) // 2][None]
        picture = dataclasses.replace(clip, frames=np.ascontiguousarray(frames), samples=None)
        return await self.with_store(self._encode, picture, ".png"), "image/png"

    def _encode(self, clip: Clip, suffix: str, metadata: dict[str, str] | None = None) -> bytes:
        with self.store.workspace() as folder:
            return encode_clip(clip, suffix, metadata, folder)

    async def finished_clip(self, owner: str, id: str) -> Clip:
        """The clip of a job, at the bundle's size and rates.

        Raises:
            RequestError: there is no such video, it is not done, or it is a text.
        """
        job = await self._completed(owner, id)
        name = (job.result or {}).get("file")
        if name is None:
            raise RequestError("the job wrote a text, which has no content.", code="no_content", status=404)
        return await asyncio.to_thread(self._finished_clip, id, name)

    async def clip_to_describe(self, owner: str, id: str) -> Clip:
        """The beginning of a job's clip, as long as the bundle's own clips: so much does a description read.

        Raises:
            RequestError: as `finished_clip`.
        """
        clip, geometry = await self.finished_clip(owner, id), self.bundle.geometry()
        return dataclasses.replace(
            clip,
            frames=None if clip.frames is None else clip.frames[: geometry.num_frames],
            samples=None if clip.samples is None else clip.samples[: geometry.num_samples(geometry.num_frames)],
        )

    def show(self, job: Job) -> VideoObject:
        """A job as clients read it."""
        return to_video(job, size=self._size, seconds=self._seconds, progress=self.worker.progress(job.id))

    async def _job(self, owner: str, id: str) -> Job:
        job: Job = await self.with_store(self.store.get, id, owner)
        return job

    async def _completed(self, owner: str, id: str) -> Job:
        job = await self._job(owner, id)
        if job.status is not JobStatus.COMPLETED:
            raise RequestError(
                f"the video must be completed, it is {job.status.value}.", code="video_not_completed", status=409
            )
        return job

    def _given(self, id: str) -> Clip | None:
        path = self.store.file(id, REFERENCE)
        return unpack_clip(path.read_bytes()) if path.exists() else None

    def _finished_clip(self, id: str, name: str) -> Clip:
        """A clip that we wrote, so it needs no process of its own to be read in."""
        defaults, path = self.bundle.generation_config, self.store.file(id, name)
        try:
            if path.suffix == ".wav":
                return read_clip(path, sample_rate=self.bundle.vocabulary.sample_rate)
            return read_clip(
                path,
                fps=defaults.fps,
                height=defaults.height,
                width=defaults.width,
                sample_rate=self.bundle.vocabulary.sample_rate,
            )
        except MediaError as error:  # swept meanwhile
            raise RequestError("the video's file is gone.", code="not_found", status=404) from error

    async def with_store(self, method: Any, *arguments: Any, **keywords: Any) -> Any:
        """Call a store's method beside the event loop.

        Raises:
            RequestError: what the store says is wrong.
        """
        if any(isinstance(value, str) and "\0" in value for value in (*arguments, *keywords.values())):
            raise RequestError("no name holds a null character.", code="not_found", status=404)  # PostgreSQL takes none
        try:
            return await asyncio.to_thread(method, *arguments, **keywords)
        except JobError as error:
            raise store_error(error) from error


def store_error(error: JobError | MediaError) -> RequestError:
    """The store's errors, as a program reads them; what its files and database say is for the log alone."""
    if isinstance(error, MediaError) or error.code == "store_unavailable":
        _log.error("%s", error)
        message = "the server cannot keep or read its files at the moment; its log says why. Try again later."
        return RequestError(message, code="store_unavailable", status=503)
    if error.code in ("too_many_jobs", "queue_full", "too_many_batches"):
        return TooMany(str(error), error.code, _BUSY)
    return RequestError(str(error), code=error.code, status=_STORE_CODES.get(error.code, 500))
