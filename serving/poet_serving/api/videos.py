"""The routes of `/v1/videos`, in the forms of OpenAI's client. Parses, calls the service, answers."""

from __future__ import annotations

import time
from typing import Annotated, Any, Final, Literal

from fastapi import APIRouter, Header, Query, Request
from fastapi.responses import FileResponse, Response

from poet_serving.api.forms import FileAnswer, Form, check_fields, read_form
from poet_serving.api.objects import DeletedObject, ErrorBody, VideoList, VideoObject
from poet_serving.api.service import Service
from poet_serving.schema import RequestError, VideoBody

__all__ = ["ERRORS", "NO_SUCH_PART", "IdempotencyKey", "owner_of", "router", "service_of"]

router = APIRouter(prefix="/v1/videos", tags=["videos"])

ERRORS: Final[dict[int | str, dict[str, Any]]] = {
    400: {"model": ErrorBody, "description": "The request cannot be carried out; `code` and `param` say why."},
    401: {"model": ErrorBody, "description": "No key, or one that the server does not know."},
    404: {"model": ErrorBody, "description": "There is no such video, or it is another key's."},
    408: {"model": ErrorBody, "description": "The request was not sent in time."},
    409: {
        "model": ErrorBody,
        "description": "The video is not done, or the Idempotency-Key is another body's.",
    },
    413: {"model": ErrorBody, "description": "The request is too large."},
    415: {"model": ErrorBody, "description": "Neither JSON nor multipart."},
    429: {"model": ErrorBody, "description": "Too many requests or jobs; `Retry-After` says when to come again."},
    503: {"model": ErrorBody, "description": "Jobs or files cannot be kept or read at the moment."},
}
NO_SUCH_PART: Final[dict[int | str, dict[str, Any]]] = {
    416: {"model": ErrorBody, "description": "The file has not the bytes that `Range` asks for."}
}
POLL_SHARE: Final = 0.1  # of its age a job is waited for before it is asked for again
POLL_SECONDS: Final = (0.25, 5.0)  # at least and at most

IdempotencyKey = Annotated[
    str | None,
    Header(
        alias="Idempotency-Key",
        max_length=256,
        description="Your own name for the request: sent again, it is answered with the job of the first.",
    ),
]
_VIDEO_SOURCE: Final = {
    "oneOf": [
        {"type": "object", "properties": {"id": {"type": "string"}}, "required": ["id"], "additionalProperties": False},
        {"type": "string", "format": "binary"},
    ],
    "description": "A completed video of this server, or an upload (multipart).",
}
_EXAMPLE: Final = {"prompt": "a large red star rises on a navy background with a low flute sound", "seed": 7}


def _body(schema: dict[str, Any], example: dict[str, Any], *, upload: str | None) -> dict[str, Any]:
    """What OpenAPI says of a body that is read by hand."""
    content: dict[str, Any] = {"application/json": {"schema": schema, "example": example}}
    if upload is not None:
        properties = dict(schema["properties"]) | {upload: {"type": "string", "format": "binary"}}
        content["multipart/form-data"] = {"schema": {**schema, "properties": properties}}
    return {"requestBody": {"required": True, "content": content}}


def _edit_schema(*, seconds: bool) -> dict[str, Any]:
    properties: dict[str, Any] = {"prompt": {"type": "string", "maxLength": 32_768}, "video": _VIDEO_SOURCE}
    if seconds:
        properties["seconds"] = {"type": ["string", "number"], "description": "How long to go on for; at most 20."}
    return {
        "type": "object",
        "properties": properties,
        "required": ["prompt", "video"],
        "additionalProperties": False,
    }


def _create_schema() -> dict[str, Any]:
    """The schema of `VideoBody`, without references to definitions, which OpenAPI keeps elsewhere."""
    schema = VideoBody.model_json_schema()
    definitions = schema.pop("$defs", {})
    reference = definitions.get("InputReference", {})
    reference["properties"].pop("path", None)  # of batches on this machine
    reference["description"] = "A data URL, or an uploaded file."
    schema["properties"]["input_reference"] = {"anyOf": [reference, {"type": "null"}]}
    return schema


def service_of(request: Request) -> Service:
    """The service that the application runs."""
    service: Service = request.app.state.service
    return service


def owner_of(request: Request) -> str:
    """On whose behalf a request is; set by the guard."""
    owner: str = request.state.owner
    return owner


@router.post(
    "",
    response_model=VideoObject,
    responses=ERRORS,
    summary="Write a video",
    openapi_extra=_body(_create_schema(), _EXAMPLE, upload="input_reference"),
)
async def create(request: Request, response: Response, idempotency_key: IdempotencyKey = None) -> VideoObject:
    """Accept a request for a clip. It is stored when this answers; ask for it again until it is completed."""
    form = await read_form(request)
    check_fields(form, VideoBody.model_fields, {"input_reference"})
    body = VideoBody.parse(dict(form.fields))
    upload = form.files.get("input_reference")
    if upload is not None and body.input_reference is not None:
        raise RequestError("input_reference must be there once.", code="invalid_value", param="input_reference")
    service = service_of(request)
    video = await service.submit(owner_of(request), body, reference=upload, idempotency_key=idempotency_key)
    return _with_hint(response, video)


@router.get("", response_model=VideoList, responses=ERRORS, summary="List your videos")
async def list_videos(
    request: Request,
    after: Annotated[str | None, Query(max_length=128, description="Go on after this video.")] = None,
    limit: Annotated[int, Query(ge=0, le=100, description="Videos a page.")] = 20,
    order: Annotated[Literal["asc", "desc"], Query(description="Oldest first, or newest.")] = "desc",
) -> VideoList:
    """The videos of your key, newest first unless said otherwise."""
    data, more = await service_of(request).list(owner_of(request), after=after, limit=limit, order=order)
    return VideoList(
        data=list(data), first_id=data[0].id if data else None, last_id=data[-1].id if data else None, has_more=more
    )


@router.post(
    "/edits",
    response_model=VideoObject,
    responses=ERRORS,
    summary="Change a video",
    openapi_extra=_body(
        _edit_schema(seconds=False), {"prompt": "make it blue", "video": {"id": "video_..."}}, upload="video"
    ),
)
async def edit(request: Request, response: Response, idempotency_key: IdempotencyKey = None) -> VideoObject:
    """A video again, changed as the prompt says. Of an upload only its first picture is kept."""
    form = await read_form(request)
    id, upload = _source(form, {"prompt", "video"})
    video = await service_of(request).edit(
        owner_of(request),
        form.field("prompt", str, required=True),
        id=id,
        upload=upload,
        idempotency_key=idempotency_key,
    )
    return _with_hint(response, video)


@router.post(
    "/extensions",
    response_model=VideoObject,
    responses=ERRORS,
    summary="Let a video go on",
    openapi_extra=_body(
        _edit_schema(seconds=True),
        {"prompt": "a large red star rises", "seconds": "2", "video": {"id": "video_..."}},
        upload="video",
    ),
)
async def extend(request: Request, response: Response, idempotency_key: IdempotencyKey = None) -> VideoObject:
    """A video and what comes after it, stitched."""
    form = await read_form(request)
    id, upload = _source(form, {"prompt", "video", "seconds"})
    video = await service_of(request).extend(
        owner_of(request),
        form.field("prompt", str),
        form.field("seconds", float),
        id=id,
        upload=upload,
        idempotency_key=idempotency_key,
    )
    return _with_hint(response, video)


@router.get("/{video_id}", response_model=VideoObject, responses=ERRORS, summary="Look a video up")
async def retrieve(request: Request, response: Response, video_id: str) -> VideoObject:
    """A video as it stands, with its progress."""
    return _with_hint(response, await service_of(request).get(owner_of(request), video_id))


@router.delete("/{video_id}", response_model=DeletedObject, responses=ERRORS, summary="Delete a video")
async def delete(request: Request, video_id: str) -> DeletedObject:
    """Remove a video and its files; one that is being written is cancelled."""
    await service_of(request).delete(owner_of(request), video_id)
    return DeletedObject(id=video_id, object="video.deleted")


@router.get(
    "/{video_id}/content",
    responses=ERRORS | NO_SUCH_PART | {200: {"content": {"video/mp4": {}, "image/png": {}, "audio/wav": {}}}},
    response_class=FileResponse,
    summary="Download a video",
)
async def content(
    request: Request,
    video_id: str,
    variant: Annotated[
        Literal["video", "thumbnail", "spritesheet", "audio"],
        Query(description="The clip; a picture of its middle; all its pictures in a grid; its sound."),
    ] = "video",
) -> Response:
    """The clip itself (MP4; range requests work), a picture of it (PNG), or its sound (WAV)."""
    found, media_type = await service_of(request).file(owner_of(request), video_id, variant)
    headers = {"cache-control": "private, max-age=3600", "x-content-type-options": "nosniff"}
    if isinstance(found, bytes):
        return Response(found, media_type=media_type, headers=headers)
    name = f"{video_id}{found.suffix}"
    return FileAnswer(found, media_type=media_type, filename=name, content_disposition_type="inline", headers=headers)


@router.get("/{video_id}/stream", responses=ERRORS | {501: {"model": ErrorBody}}, summary="Watch while it is written")
async def stream(request: Request, video_id: str) -> Response:
    """Not there yet: the engine hands a clip on when it is whole."""
    await service_of(request).get(owner_of(request), video_id)
    raise RequestError(
        "clips are not streamed yet; ask for /content once the video is completed.", code="not_implemented", status=501
    )


@router.post(
    "/{video_id}/remix",
    response_model=VideoObject,
    responses=ERRORS,
    summary="Write a video again with another prompt",
    openapi_extra=_body(
        {
            "type": "object",
            "properties": {"prompt": {"type": "string", "maxLength": 32_768}},
            "required": ["prompt"],
            "additionalProperties": False,
        },
        {"prompt": "now make it bounce"},
        upload=None,
    ),
)
async def remix(
    request: Request, response: Response, video_id: str, idempotency_key: IdempotencyKey = None
) -> VideoObject:
    """The same seed and settings; a prompt that says what to change edits the video's own, a whole one replaces it."""
    form = await read_form(request)
    check_fields(form, {"prompt"})
    prompt = form.field("prompt", str, required=True)
    return _with_hint(response, await service_of(request).remix(owner_of(request), video_id, prompt, idempotency_key))


def _with_hint(response: Response, video: VideoObject) -> VideoObject:
    """Say when to ask for a video again: later the longer it takes, so that many who wait leave the server its time."""
    least, most = POLL_SECONDS
    seconds = min(most, max(least, POLL_SHARE * (time.time() - video.created_at)))
    response.headers["openai-poll-after-ms"] = str(round(1000 * seconds))
    return video


def _source(form: Form, known: set[str]) -> tuple[str | None, bytes | None]:
    """What an edit or extension starts from: a video's id, or an upload."""
    check_fields(form, known, {"video"})
    given = form.field("video", dict)
    upload = form.files.get("video")
    if (given is None) == (upload is None):
        raise RequestError('video must be {"id": ...} or an upload.', code="invalid_value", param="video")
    if given is None:
        return None, upload
    if set(given) != {"id"} or not isinstance(given["id"], str):
        raise RequestError('video must be {"id": ...}.', code="invalid_value", param="video")
    return given["id"], None
