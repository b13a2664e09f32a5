"""`POST /v1/chat/completions`: a conversation about clips. What it means is `poet_serving.conversation`'s business."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any, Final

from fastapi import APIRouter, Request

from poet_serving.api.forms import check_fields, read_form
from poet_serving.api.service import Service
from poet_serving.api.videos import ERRORS, owner_of, service_of
from poet_serving.conversation import Answer, ChatBody, Intent, chat_answer, understand, video_body
from poet_serving.jobs import Job, JobStatus
from poet_serving.schema import RequestError

__all__ = ["router"]

router = APIRouter(prefix="/v1", tags=["chat"])

_EXAMPLE: Final = {
    "model": "nano",
    "modalities": ["video", "audio"],
    "messages": [{"role": "user", "content": "a large red star rises on a navy background with a low flute sound"}],
}


def _schema() -> dict[str, Any]:
    """The schema of `ChatBody` with its definitions in place, which OpenAPI keeps elsewhere."""
    schema = ChatBody.model_json_schema()
    definitions = schema.pop("$defs", {})

    def fill(value: Any) -> Any:
        if isinstance(value, dict):
            reference = value.get("$ref")
            if isinstance(reference, str):
                return fill(definitions[reference.rpartition("/")[2]])
            return {key: fill(inner) for key, inner in value.items() if key != "discriminator"}
        return [fill(inner) for inner in value] if isinstance(value, list) else value

    filled: dict[str, Any] = fill(schema)
    return filled


@router.post(
    "/chat/completions",
    responses=ERRORS,
    summary="Chat about clips",
    openapi_extra={
        "requestBody": {
            "required": True,
            "content": {"application/json": {"schema": _schema(), "example": _EXAMPLE}},
        }
    },
)
async def complete(request: Request) -> dict[str, Any]:
    """Answer with a caption, or, where `modalities` holds video or audio, with a clip.

    A clip's message holds the prompt that was carried out as `content`, its sound as `audio` and its address as
    `video`. Sent back in the next turn, it is what "now make it bounce" speaks of.
    """
    service, owner = service_of(request), owner_of(request)
    form = await read_form(request)
    check_fields(form, form.fields)  # `ChatBody` knows which there are; uploads there are none
    body = ChatBody.parse(dict(form.fields))
    intent = await asyncio.to_thread(understand, body, service.phrases)
    clip = None
    if intent.kind == "caption" and intent.reference is None and intent.previous_video is not None:
        clip = await service.clip_to_describe(owner, intent.previous_video)
    started: list[str] = []
    try:
        for choice in range(body.n):
            video = await service.submit(owner, video_body(body, intent, choice), clip=clip)
            started.append(video.id)
        jobs = await _wait(request, service, owner, started)
    except BaseException:  # also that the client has gone: nobody will ask for what is not done
        await _drop(service, owner, started)
        raise
    answers = [await _answer(service, owner, body, intent, job) for job in jobs]
    pieces = await asyncio.to_thread(service.pipeline.text_tokenizer.encode, intent.prompt or "")
    return chat_answer(body.model or service.name, answers, prompt_tokens=len(pieces), metadata=body.metadata)


async def _wait(request: Request, service: Service, owner: str, ids: Sequence[str]) -> list[Job]:
    """The jobs once they have ended.

    Raises:
        RequestError: one of them failed, or the client has gone.
    """

    async def until_gone() -> None:
        while not await request.is_disconnected():
            await asyncio.sleep(1.0)

    async def until_ended() -> list[Job]:
        return list(await asyncio.gather(*(service.wait(owner, id) for id in ids)))

    gone, ended = asyncio.create_task(until_gone()), asyncio.create_task(until_ended())
    try:
        await asyncio.wait((gone, ended), return_when=asyncio.FIRST_COMPLETED)
        if not ended.done():
            raise RequestError("the client has gone.", code="client_gone", status=499)
        jobs = ended.result()
    finally:
        gone.cancel()
        ended.cancel()
    for job in jobs:
        if job.status is JobStatus.FAILED:
            error = dict(job.error or {})
            raise RequestError(str(error.get("message")), code=str(error.get("code")), status=500)
    return jobs


async def _drop(service: Service, owner: str, ids: Sequence[str]) -> None:
    for id in ids:
        try:
            await asyncio.shield(service.delete(owner, id))
        except RequestError:  # it is gone already
            continue


async def _answer(service: Service, owner: str, body: ChatBody, intent: Intent, job: Job) -> Answer:
    result = dict(job.result or {})
    count = int(result.get("num_ids", 0))
    if intent.kind == "caption":
        text = str(result.get("text", ""))
        await service.delete(owner, job.id)  # a caption has nothing to fetch
        return Answer(text=text, completion_tokens=count)
    video = sound = None
    if "video" in body.modalities and "size" in result:
        video = {
            "id": job.id,
            "url": f"/v1/videos/{job.id}/content",
            "mime_type": "video/mp4",
            "size": result["size"],
            "seconds": result.get("seconds"),
        }
    if "audio" in body.modalities and result.get("has_sound"):
        content, _ = await service.file(owner, job.id, "audio")
        sound = content if isinstance(content, bytes) else await asyncio.to_thread(content.read_bytes)
    return Answer(
        text=str(result.get("prompt") or ""),
        completion_tokens=count,
        clip_id=job.id,
        video=video,
        sound=sound,
        expires_at=0 if job.expires_at is None else int(job.expires_at),
    )
