"""The routes of `/v1/files`: lines of batches, results, and what requests name by an id. Parses, calls, answers."""

from __future__ import annotations

from typing import Annotated, Final, Literal

from fastapi import APIRouter, Query, Request
from fastapi.responses import FileResponse, Response
from pydantic import BaseModel

from poet_serving.api.forms import FileAnswer, check_fields, read_form
from poet_serving.api.objects import DeletedObject
from poet_serving.api.videos import ERRORS, NO_SUCH_PART, owner_of, service_of
from poet_serving.file_store import StoredFile
from poet_serving.schema import RequestError

__all__ = ["router"]

router = APIRouter(prefix="/v1", tags=["files"])

PURPOSES: Final = ("batch", "vision", "user_data")


class FileObject(BaseModel):
    """An uploaded file, or the results of a batch.

    Attributes:
        id: by which requests name it.
        object: always "file".
        bytes: its size.
        created_at: Unix seconds.
        filename: the name that came with it.
        purpose: what it was uploaded for.
        status: always "processed".
    """

    id: str
    object: Literal["file"] = "file"
    bytes: int
    created_at: int
    filename: str
    purpose: str
    status: Literal["processed"] = "processed"


class FileList(BaseModel):
    """A page of files.

    Attributes:
        object: always "list".
        data: the files.
        first_id, last_id: of the page; null where it is empty.
        has_more: whether there are more after the last.
    """

    object: Literal["list"] = "list"
    data: list[FileObject]
    first_id: str | None = None
    last_id: str | None = None
    has_more: bool


@router.post(
    "/files",
    response_model=FileObject,
    responses=ERRORS,
    summary="Upload a file",
    openapi_extra={
        "requestBody": {
            "required": True,
            "content": {
                "multipart/form-data": {
                    "schema": {
                        "type": "object",
                        "properties": {
                            "file": {"type": "string", "format": "binary"},
                            "purpose": {"type": "string", "enum": list(PURPOSES)},
                        },
                        "required": ["file", "purpose"],
                        "additionalProperties": False,
                    }
                }
            },
        }
    },
)
async def upload(request: Request) -> FileObject:
    """Keep a file: the lines of a batch, or a picture, clip or sound that requests name by its id."""
    service = service_of(request)
    form = await read_form(request)
    check_fields(form, {"file", "purpose"}, {"file"})
    purpose = form.field("purpose", str, required=True)
    if purpose not in PURPOSES:
        raise RequestError(f"purpose must be one of {', '.join(PURPOSES)}.", code="invalid_value", param="purpose")
    content = form.files.get("file")
    if not content:
        raise RequestError("file must be an upload that is not empty.", code="invalid_value", param="file")
    owner = owner_of(request)
    if await service.with_store(service.files.used_bytes, owner) + len(content) > service.limits.file_bytes:
        raise RequestError(
            f"the files of a key must have at most {service.limits.file_bytes} bytes together. Delete some first.",
            code="too_many_files",
            param="file",
            status=413,
        )
    name = form.names.get("file") or "file"
    return _file(await service.with_store(service.files.put, owner, purpose, name, content))


@router.get("/files", response_model=FileList, responses=ERRORS, summary="List your files")
async def list_files(
    request: Request,
    purpose: Annotated[str | None, Query(max_length=32)] = None,
    after: Annotated[str | None, Query(max_length=128)] = None,
    limit: Annotated[int, Query(ge=1, le=10_000)] = 100,
    order: Annotated[Literal["asc", "desc"], Query()] = "desc",
) -> FileList:
    """The files of your key."""
    service = service_of(request)
    found, more = await service.with_store(
        service.files.list, owner_of(request), purpose=purpose, after=after, limit=limit, order=order
    )
    data = [_file(file) for file in found]
    return FileList(
        data=data, first_id=data[0].id if data else None, last_id=data[-1].id if data else None, has_more=more
    )


@router.get("/files/{file_id}", response_model=FileObject, responses=ERRORS, summary="Look a file up")
async def retrieve_file(request: Request, file_id: str) -> FileObject:
    """What is known of a file."""
    service = service_of(request)
    return _file(await service.with_store(service.files.get, file_id, owner_of(request)))


@router.get(
    "/files/{file_id}/content",
    responses=ERRORS | NO_SUCH_PART | {200: {"content": {"application/octet-stream": {}}}},
    response_class=FileResponse,
    summary="Download a file",
)
async def file_content(request: Request, file_id: str) -> Response:
    """A file's bytes, as they came."""
    service = service_of(request)
    path = await service.with_store(service.files.path, file_id, owner_of(request))
    # Never as a page: what a stranger uploaded is not shown by a browser.
    headers = {"x-content-type-options": "nosniff", "content-disposition": f'attachment; filename="{file_id}"'}
    return FileAnswer(path, media_type="application/octet-stream", headers=headers)


@router.delete("/files/{file_id}", response_model=DeletedObject, responses=ERRORS, summary="Delete a file")
async def delete_file(request: Request, file_id: str) -> DeletedObject:
    """Remove a file. A batch of its lines that is open goes on."""
    service = service_of(request)
    await service.with_store(service.files.delete, file_id, owner_of(request))
    return DeletedObject(id=file_id, object="file")


def _file(file: StoredFile) -> FileObject:
    return FileObject(
        id=file.id,
        bytes=file.size_bytes,
        created_at=int(file.created_at),
        filename=file.filename,
        purpose=file.purpose,
    )
