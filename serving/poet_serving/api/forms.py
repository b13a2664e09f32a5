"""Bodies as OpenAI's clients send them, JSON or multipart with files, and files as they are sent to them.

Knows HTTP; not what the fields mean.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Collection, Mapping
from typing import Any, Final

from starlette.datastructures import Headers, UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import FileResponse
from starlette.types import Message, Receive, Scope, Send

from poet_serving.api.guard import BadRange
from poet_serving.schema import RequestError

__all__ = ["FileAnswer", "Form", "check_fields", "read_form"]

MAX_FIELDS: Final = 64
MAX_FILES: Final = 2
MAX_FIELD: Final = 2**20  # bytes of a field that is no file
_NESTED: Final = re.compile(r"(\w+)\[(\w*)\]")
_SURROGATE: Final = re.compile(r"\\u[dD][89a-fA-F]")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Form:
    """A body that was read.

    Attributes:
        fields: plain values; of a multipart body texts, nested where a name says so (`video[id]`).
        files: contents by field.
        names: the client's own names for them, by field.
    """

    fields: Mapping[str, Any]
    files: Mapping[str, bytes] = dataclasses.field(default_factory=dict)
    names: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def field(self, name: str, kind: type, *, required: bool = False) -> Any:
        """A field's value, or None where it is not there.

        Raises:
            RequestError: it is missing, or of another kind.
        """
        value = self.fields.get(name)
        if value is None and not required:
            return None
        if kind is float and isinstance(value, int | str) and not isinstance(value, bool):
            try:
                value = float(value)
            except (ValueError, OverflowError):  # the latter: an integer beyond all floats
                value = None
        if not isinstance(value, kind) or (kind is float and value != value):
            known = {str: "a text", float: "a number", dict: "an object"}[kind]
            raise RequestError(f"{name} must be {known}.", code="invalid_value", param=name)
        return value


class FileAnswer(FileResponse):
    """A file, or the parts of it that a header `Range` asks for.

    Raises:
        RequestError: when it is sent: that header is none, or asks for what the file does not have.
    """

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it."""

        async def sent(message: Message) -> None:
            if message["type"] == "http.response.start" and message["status"] >= 400:  # of plain text, or of nothing
                asked = Headers(scope=scope)["range"][:100]
                if message["status"] == 416:
                    size = Headers(raw=message["headers"])["content-range"]
                    raise BadRange(
                        f"Range must ask for bytes that the file has, got {asked!r}. It has {size.partition('/')[2]}.",
                        size,
                    )
                raise RequestError(f"Range must be bytes=FIRST-LAST, got {asked!r}.", code="invalid_range")
            await send(message)

        await super().__call__(scope, receive, sent)


def check_fields(form: Form, fields: Collection[str], files: Collection[str] = ()) -> None:
    """Raise unless all that a body holds is known.

    Args:
        form: the body.
        fields: names of plain values.
        files: names of uploads.

    Raises:
        RequestError: it holds something else.
    """
    for kind, sent, known in (("field", form.fields, fields), ("file", form.files, files)):
        if unknown := sorted(sent.keys() - set(known)):
            name, there = unknown[0][:100], ", ".join(sorted(known)) or "none"
            message = f"the body must have no {kind} but these: {there}; it has {name!r}. Leave that out."
            raise RequestError(message, code="unknown_parameter", param=name)


async def read_form(request: Request) -> Form:
    """Read a request's body.

    Raises:
        RequestError: it is neither JSON nor multipart, or not well formed.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "multipart/form-data":
        return await _read_multipart(request)
    if kind in ("application/json", ""):
        try:
            body = (await request.body()).decode()
            value = json.loads(body or "null", parse_constant=_no_constant)
            if _SURROGATE.search(body):
                _check_unicode(json.dumps(value, ensure_ascii=False))
        except (ValueError, RecursionError) as error:
            raise RequestError(f"the body must be JSON: {error}", code="invalid_json") from error
        if not isinstance(value, dict):
            raise RequestError("the body must be a JSON object.", code="invalid_json")
        return Form(fields=value)
    raise RequestError(
        f"the body must be application/json or multipart/form-data, got {kind[:100]!r}.",
        code="unsupported_media_type",
        status=415,
    )


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")


def _check_unicode(text: str) -> None:
    """Refuse half a surrogate pair, which nothing can store or send: some encodings have it, and JSON's escapes.

    Raises:
        RequestError: there is one.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RequestError("a text must not hold half a surrogate pair.", code="invalid_value") from error


async def _read_multipart(request: Request) -> Form:
    try:
        form = await request.form(max_files=MAX_FILES, max_fields=MAX_FIELDS, max_part_size=MAX_FIELD)
    except (HTTPException, KeyError, ValueError) as error:  # the last two: a boundary that is none
        message = getattr(error, "detail", str(error))
        raise RequestError(f"the body must be multipart/form-data: {message}", code="invalid_multipart") from error
    try:
        fields: dict[str, Any] = {}
        files: dict[str, bytes] = {}
        names: dict[str, str] = {}
        for name, value in form.multi_items():
            _check_unicode(name + (value if isinstance(value, str) else value.filename or ""))
            if isinstance(value, UploadFile) and "\0" in (value.filename or ""):
                raise RequestError("a file's name must not hold a null character.", code="invalid_value")
            if name in fields or name in files:
                raise RequestError(f"{name[:100]} must be there once.", code="invalid_value", param=name[:100])
            if isinstance(value, UploadFile):
                files[name], names[name] = await value.read(), value.filename or ""
                continue
            nested = _NESTED.fullmatch(name)
            if nested is None:
                fields[name] = value
            else:
                inner = fields.setdefault(nested[1], {})
                if not isinstance(inner, dict):
                    raise RequestError(f"{nested[1]} must be one value or an object.", code="invalid_value")
                inner[nested[2]] = value
    finally:
        await form.close()
    return Form(fields=fields, files=files, names=names)
