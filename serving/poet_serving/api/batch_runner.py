"""Carries out batches: their lines become jobs, and the jobs' results two files.

A line's job has a key made of the batch's id and the line's number, so a server that was killed goes on where it was
without doing a line twice. The files, of lines that were completed and of lines that were not, are written when the
last job has ended.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from poet.errors import PoetError
from poet_serving.api.guard import TooMany
from poet_serving.batch import BatchLine, read_lines
from poet_serving.file_store import Batch
from poet_serving.jobs import Job, JobStatus
from poet_serving.schema import RequestError, VideoBody

if TYPE_CHECKING:
    from poet_serving.api.service import Service

__all__ = ["BatchRunner"]

_log = logging.getLogger(__name__)
_AGAIN: Final = 1.0  # seconds after which a line is tried again where there is no room


class BatchRunner:
    """Carries out the batches of a service. To be made in its event loop.

    Args:
        service: keeps jobs and files.
    """

    def __init__(self, service: Service) -> None:
        self._service = service
        self._running: dict[str, _Running] = {}

    def resume(self) -> None:
        """Go on with what an earlier server left."""
        for batch in self._service.files.open_batches():
            self.start(batch)

    def start(self, batch: Batch) -> None:
        """Begin a batch, or go on with it."""
        running = _Running(self._service, batch)
        self._running[batch.id] = running
        running.task.add_done_callback(lambda _: self._running.pop(batch.id, None))

    def cancel(self, id: str) -> None:
        """A batch is to end now."""
        if id in self._running:
            self._running[id].cancelled.set()

    async def stop(self) -> None:
        """End; what is open goes on after the next start."""
        ending = [running.task for running in self._running.values()]
        for task in ending:
            task.cancel()
        await asyncio.gather(*ending, return_exceptions=True)


class _Running:
    """One batch that is being carried out."""

    def __init__(self, service: Service, batch: Batch) -> None:
        self._service, self._batch = service, batch
        self._answers: dict[int, Job | RequestError] = {}
        self._waiting: dict[int, asyncio.Task[Job]] = {}
        self._ids: dict[int, str] = {}
        self._told = (batch.completed, batch.failed)
        self.cancelled = asyncio.Event()
        if batch.status == "cancelling":
            self.cancelled.set()
        self.task = asyncio.create_task(self._carry_out())

    async def _carry_out(self) -> None:
        service, batch = self._service, self._batch
        try:
            path = await service.with_store(service.files.path, batch.input_file, batch.owner)
            lines = await asyncio.to_thread(lambda: list(read_lines(path)))
            await self._begin_lines(lines)
            await self._wait()
            await self._finish(lines)
        except PoetError as error:
            _log.error("batch %s failed: %s", batch.id, error)
            errors = [{"code": getattr(error, "code", "server_error"), "message": str(error)}]
            await service.with_store(service.files.note, batch.id, status="failed", errors=errors)
        finally:
            for task in self._waiting.values():
                task.cancel()

    async def _begin_lines(self, lines: Sequence[BatchLine]) -> None:
        """Hand in every line as soon as there is room for it."""
        seen: set[str] = set()
        for line in lines:
            if self.cancelled.is_set():
                return
            if line.error is None and line.key in seen:
                message = f"custom_id must be the line's own, {line.custom_id!r} was named before."
                error = RequestError(message, code="duplicate_custom_id", param="custom_id")
                self._answers[line.number] = error
                continue
            seen.add(line.key)
            try:
                await self._begin(line)
            except RequestError as error:
                self._answers[line.number] = error
            await self._collect()

    async def _begin(self, line: BatchLine) -> None:
        """Hand in a line.

        Raises:
            RequestError: it cannot be carried out.
        """
        if line.error is not None:
            raise line.error
        body, key = VideoBody.parse(line.body), f"{self._batch.id}/{line.number}"
        while not self.cancelled.is_set():
            try:
                video = await self._service.submit(self._batch.owner, body, idempotency_key=key)
            except TooMany:
                await self._collect()
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self.cancelled.wait(), _AGAIN)
                continue
            self._ids[line.number] = video.id
            self._waiting[line.number] = asyncio.create_task(self._service.wait(self._batch.owner, video.id))
            return

    async def _wait(self) -> None:
        """Until all jobs have ended, or the batch is cancelled: then those that have not are dropped."""
        cancelled = asyncio.create_task(self.cancelled.wait())
        try:
            while self._waiting and not self.cancelled.is_set():
                await asyncio.wait([*self._waiting.values(), cancelled], return_when=asyncio.FIRST_COMPLETED)
                await self._collect()
        finally:
            cancelled.cancel()
        for number in self._waiting:
            with contextlib.suppress(RequestError):  # gone already
                await self._service.delete(self._batch.owner, self._ids[number])

    async def _collect(self) -> None:
        """Take the jobs that have ended, and write down how many there are."""
        for number, task in list(self._waiting.items()):
            if not task.done():
                continue
            del self._waiting[number]
            error = task.exception()
            if error is not None and not isinstance(error, RequestError):
                raise error
            self._answers[number] = task.result() if error is None else error  # an error: it was deleted meanwhile
        completed = sum(isinstance(answer, Job) and _is_done(answer) for answer in self._answers.values())
        told = completed, len(self._answers) - completed
        if told != self._told:
            self._told = told
            files = self._service.files
            await self._service.with_store(files.note, self._batch.id, completed=told[0], failed=told[1])

    async def _finish(self, lines: Sequence[BatchLine]) -> None:
        """Write the files of results, then say that the batch has ended."""
        service, batch = self._service, self._batch
        outputs: list[dict[str, Any]] = []
        errors: list[dict[str, Any]] = []
        for line in lines:
            answer = self._answers.get(line.number)
            if isinstance(answer, Job):
                result = _result(batch, line, 200, service.show(answer).model_dump(mode="json"))
                (outputs if _is_done(answer) else errors).append(result)
            elif answer is not None:
                errors.append(_result(batch, line, answer.status, answer.body))
        values: dict[str, Any] = {"completed": len(outputs), "failed": len(errors)}
        for name, results in (("output_file", outputs), ("error_file", errors)):
            if results:
                content = "".join(json.dumps(result) + "\n" for result in results).encode()
                arguments = batch.owner, "batch_output", f"{batch.id}_{name}.jsonl", content
                values[name] = (await service.with_store(service.files.put, *arguments)).id
        status = "cancelled" if self.cancelled.is_set() else "completed"
        await service.with_store(service.files.note, batch.id, status=status, **values)


def _is_done(job: Job) -> bool:
    return job.status is JobStatus.COMPLETED


def _result(batch: Batch, line: BatchLine, status: int, body: Mapping[str, Any]) -> dict[str, Any]:
    digest = line.digest
    return {
        "id": f"batch_req_{digest[:24]}",
        "custom_id": line.custom_id,
        "response": {"status_code": status, "request_id": f"req_{digest[24:48]}", "body": body},
        "error": None,
        "poet": {"line": line.number, "batch": batch.id},
    }
