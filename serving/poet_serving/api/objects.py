"""What the service answers with, in the forms of OpenAI's clients. Knows jobs and their files' names; not HTTP."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, Field

from poet_serving.api.orders import Order
from poet_serving.jobs import Job, JobStatus

__all__ = ["DeletedObject", "ErrorBody", "ModelList", "ModelObject", "VideoList", "VideoObject", "to_video"]


class ErrorObject(BaseModel):
    """Why a request was refused.

    Attributes:
        message: for a person.
        type: of the error, in OpenAI's words.
        param: the field that is wrong, or null.
        code: for a program; stable.
    """

    message: str
    type: str
    param: str | None = None
    code: str


class ErrorBody(BaseModel):
    """The body of every answer of 400 and above.

    Attributes:
        error: why.
    """

    error: ErrorObject


class JobFailure(BaseModel):
    """Why a job failed.

    Attributes:
        code: for a program.
        message: for a person.
    """

    code: str
    message: str


class VideoObject(BaseModel):
    """A job and what became of it.

    Attributes:
        id: unguessable.
        object: always "video".
        model: what it was asked of.
        status: where it stands.
        progress: percent.
        created_at, completed_at, expires_at: Unix seconds.
        prompt: what was to be shown.
        size: WIDTHxHEIGHT.
        seconds: duration.
        remixed_from_video_id: what it was made from.
        error: why it failed.
        text: what was written, of a caption.
        metadata: what made it, once it is done: seed, settings, hashes.
    """

    id: str
    object: Literal["video"] = "video"
    model: str
    status: Literal["queued", "in_progress", "completed", "failed"]
    progress: int = Field(ge=0, le=100)
    created_at: int
    completed_at: int | None = None
    expires_at: int | None = None
    prompt: str | None = None
    size: str
    seconds: str
    remixed_from_video_id: str | None = None
    error: JobFailure | None = None
    text: str | None = None
    metadata: dict[str, str] | None = None


class VideoList(BaseModel):
    """A page of videos.

    Attributes:
        object: always "list".
        data: the videos.
        first_id, last_id: of the page; null where it is empty.
        has_more: whether there are more after the last.
    """

    object: Literal["list"] = "list"
    data: list[VideoObject]
    first_id: str | None = None
    last_id: str | None = None
    has_more: bool


class DeletedObject(BaseModel):
    """Something that is no more.

    Attributes:
        id: its name.
        object: what it was.
        deleted: always true.
    """

    id: str
    object: str
    deleted: Literal[True] = True


class ModelObject(BaseModel):
    """A bundle, or a LoRA adapter of it.

    Attributes:
        id: by which a request names it.
        object: always "model".
        created: Unix seconds.
        owned_by: who keeps it.
        parent: of an adapter, the bundle.
        tasks: what it was trained on, or null where that is not known.
        decodings: how it writes.
        sizes: of its pictures.
        seconds: of its clips.
    """

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "poet"
    parent: str | None = None
    tasks: list[str] | None = None
    decodings: list[str]
    sizes: list[str]
    seconds: float


class ModelList(BaseModel):
    """All models.

    Attributes:
        object: always "list".
        data: the models.
    """

    object: Literal["list"] = "list"
    data: list[ModelObject]


def to_video(job: Job, *, size: str, seconds: float, progress: int | None = None) -> VideoObject:
    """A job as OpenAI's clients read it.

    Args:
        job: as it stands in the store.
        size: of a clip whose body names none and that is not done yet.
        seconds: likewise.
        progress: of a job that is being carried out, where it is known better than the store knows it.
    """
    order = Order.from_dict(job.body)
    result: dict[str, Any] = dict(job.result or {})
    running = job.status is JobStatus.IN_PROGRESS
    lasts = seconds if order.extend_by is None else order.extend_by
    return VideoObject(
        id=job.id,
        model=order.model,
        status=job.status.value,
        progress=progress if running and progress is not None else job.progress,
        created_at=int(job.created_at),
        completed_at=None if job.completed_at is None else int(job.completed_at),
        expires_at=None if job.expires_at is None else int(job.expires_at),
        prompt=result.get("prompt", order.body.prompt),
        size=result.get("size") or order.body.size or size,
        seconds=f"{result.get('seconds', lasts):g}",
        remixed_from_video_id=order.remixed_from,
        error=None if job.error is None else JobFailure(**job.error),
        text=result.get("text"),
        metadata=result.get("metadata"),
    )
