"""The routes of `/v1/batches`: files of requests, carried out as jobs. Parses, calls, answers."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any, Final, Literal

from fastapi import APIRouter, Query, Request
from pydantic import BaseModel

from poet_serving.api.forms import Form, check_fields, read_form
from poet_serving.api.videos import ERRORS, IdempotencyKey, owner_of, service_of
from poet_serving.batch import read_lines
from poet_serving.file_store import ENDED, Batch
from poet_serving.schema import RequestError

__all__ = ["router"]

router = APIRouter(prefix="/v1", tags=["batches"])

ENDPOINT: Final = "/v1/videos"
MAX_LINES: Final = 50_000
MAX_OPEN_BATCHES: Final = 16  # of a key
MAX_TOLD: Final = (16, 64, 512)  # metadata: pairs, characters of a key and of a value


class RequestCounts(BaseModel):
    """Lines of a batch.

    Attributes:
        total: all of them.
        completed: that became clips.
        failed: that were answered with an error.
    """

    total: int
    completed: int
    failed: int


class BatchFailure(BaseModel):
    """Why a batch failed as a whole.

    Attributes:
        code: for a program.
        message: for a person.
        line: of the file, or null.
        param: the field that is wrong, or null.
    """

    code: str
    message: str
    line: int | None = None
    param: str | None = None


class BatchFailures(BaseModel):
    """All of them.

    Attributes:
        object: always "list".
        data: the reasons.
    """

    object: Literal["list"] = "list"
    data: list[BatchFailure]


class BatchObject(BaseModel):
    """A batch as it stands.

    Attributes:
        id: by which it is asked for.
        object: always "batch".
        endpoint: where its lines would be posted.
        input_file_id: of its lines.
        completion_window: as it was sent; lines are begun as there is room for them.
        status: where it stands.
        errors: why it failed as a whole; what is wrong with a line is in the file of errors.
        output_file_id, error_file_id: of its results, once it has ended.
        created_at, in_progress_at, completed_at, cancelled_at, failed_at: Unix seconds.
        request_counts: lines.
        metadata: the caller's.
    """

    id: str
    object: Literal["batch"] = "batch"
    endpoint: str
    input_file_id: str
    completion_window: str
    status: Literal["in_progress", "cancelling", "completed", "failed", "cancelled"]
    errors: BatchFailures | None = None
    output_file_id: str | None = None
    error_file_id: str | None = None
    created_at: int
    in_progress_at: int
    completed_at: int | None = None
    cancelled_at: int | None = None
    failed_at: int | None = None
    request_counts: RequestCounts
    metadata: dict[str, str] | None = None


class BatchList(BaseModel):
    """A page of batches.

    Attributes:
        object: always "list".
        data: the batches.
        first_id, last_id: of the page; null where it is empty.
        has_more: whether there are more after the last.
    """

    object: Literal["list"] = "list"
    data: list[BatchObject]
    first_id: str | None = None
    last_id: str | None = None
    has_more: bool


@router.post(
    "/batches",
    response_model=BatchObject,
    responses=ERRORS,
    summary="Carry out a file of requests",
    openapi_extra={
        "requestBody": {
            "required": True,
            "content": {
                "application/json": {
                    "schema": {
                        "type": "object",
                        "properties": {
                            "input_file_id": {"type": "string"},
                            "endpoint": {"type": "string", "enum": [ENDPOINT]},
                            "completion_window": {"type": "string", "enum": ["24h"]},
                            "metadata": {"type": ["object", "null"], "additionalProperties": {"type": "string"}},
                        },
                        "required": ["input_file_id", "endpoint", "completion_window"],
                        "additionalProperties": False,
                    },
                    "example": {"input_file_id": "file_...", "endpoint": ENDPOINT, "completion_window": "24h"},
                }
            },
        }
    },
)
async def create_batch(request: Request, idempotency_key: IdempotencyKey = None) -> BatchObject:
    """Begin a batch: every line of the file is a request to `/v1/videos`, in OpenAI's form."""
    service, owner = service_of(request), owner_of(request)
    form = await read_form(request)
    check_fields(form, {"input_file_id", "endpoint", "completion_window", "metadata"})
    if form.field("endpoint", str, required=True) != ENDPOINT:
        raise _must_be("endpoint", ENDPOINT, form)
    if form.field("completion_window", str, required=True) != "24h":
        raise _must_be("completion_window", "24h", form)
    told = _check_told(form.field("metadata", dict))
    name = form.field("input_file_id", str, required=True)
    asked = owner, name, ENDPOINT, "24h", told
    if idempotency_key is not None:  # a known key is answered also where the file is gone
        known = await service.with_store(service.files.batch_of_key, *asked, idempotency_key=idempotency_key)
        if known is not None:
            return _batch(known)
    path = await service.with_store(service.files.path, name, owner)
    total = await asyncio.to_thread(lambda: sum(1 for _ in read_lines(path)))
    if not 0 < total <= MAX_LINES:
        raise RequestError(
            f"the file must hold 1 to {MAX_LINES} requests, one a line; it holds {total}.",
            code="invalid_batch_file",
            param="input_file_id",
        )
    batch, is_new = await service.with_store(
        service.files.begin, *asked, total=total, idempotency_key=idempotency_key, max_open=MAX_OPEN_BATCHES
    )
    if is_new:
        service.batches.start(batch)
    return _batch(batch)


@router.get("/batches", response_model=BatchList, responses=ERRORS, summary="List your batches")
async def list_batches(
    request: Request,
    after: Annotated[str | None, Query(max_length=128)] = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
) -> BatchList:
    """The batches of your key, newest first."""
    service = service_of(request)
    found, more = await service.with_store(service.files.batches, owner_of(request), after=after, limit=limit)
    data = [_batch(batch) for batch in found]
    return BatchList(
        data=data, first_id=data[0].id if data else None, last_id=data[-1].id if data else None, has_more=more
    )


@router.get("/batches/{batch_id}", response_model=BatchObject, responses=ERRORS, summary="Look a batch up")
async def retrieve_batch(request: Request, batch_id: str) -> BatchObject:
    """A batch as it stands."""
    service = service_of(request)
    return _batch(await service.with_store(service.files.batch, batch_id, owner_of(request)))


@router.post("/batches/{batch_id}/cancel", response_model=BatchObject, responses=ERRORS, summary="Cancel a batch")
async def cancel_batch(request: Request, batch_id: str) -> BatchObject:
    """End a batch: what is done stays, what waits is dropped."""
    service, owner = service_of(request), owner_of(request)
    batch = await service.with_store(service.files.batch, batch_id, owner)
    if batch.status in ENDED:
        raise RequestError(f"the batch has ended: it is {batch.status}.", code="batch_ended", status=409)
    await service.with_store(service.files.note, batch_id, status="cancelling")
    service.batches.cancel(batch_id)
    return _batch(await service.with_store(service.files.batch, batch_id, owner))


def _must_be(name: str, value: str, form: Form) -> RequestError:
    got = form.field(name, str) or ""
    return RequestError(f"{name} must be {value}, got {got[:100]!r}.", code="invalid_value", param=name)


def _check_told(told: Any) -> dict[str, str] | None:
    """The caller's metadata, within OpenAI's limits."""
    if told is None:
        return None
    pairs, longest_key, longest_value = MAX_TOLD
    fits = len(told) <= pairs and all(
        isinstance(value, str) and len(key) <= longest_key and len(value) <= longest_value
        for key, value in told.items()
    )
    if not fits:
        raise RequestError(
            f"metadata must have at most {pairs} texts of at most {longest_value} characters, under names of at most "
            f"{longest_key}.",
            code="invalid_value",
            param="metadata",
        )
    return dict(told)


def _batch(batch: Batch) -> BatchObject:
    ended = None if batch.ended_at is None else int(batch.ended_at)
    return BatchObject.model_validate(
        {
            "id": batch.id,
            "endpoint": batch.endpoint,
            "input_file_id": batch.input_file,
            "completion_window": batch.window,
            "status": batch.status,
            "errors": None if batch.errors is None else {"data": [dict(error) for error in batch.errors]},
            "output_file_id": batch.output_file,
            "error_file_id": batch.error_file,
            "created_at": int(batch.created_at),
            "in_progress_at": int(batch.created_at),
            "completed_at": ended if batch.status == "completed" else None,
            "cancelled_at": ended if batch.status == "cancelled" else None,
            "failed_at": ended if batch.status == "failed" else None,
            "request_counts": {"total": batch.total, "completed": batch.completed, "failed": batch.failed},
            "metadata": None if batch.told is None else dict(batch.told),
        }
    )
