"""The application: routes, errors in one shape, the guard around them. It needs a service, and no vLLM."""

from __future__ import annotations

import logging
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse
from starlette.types import ASGIApp

from poet import __version__
from poet.errors import ConfigError, MediaError, PoetError
from poet_serving.api import batches, chat, files, videos
from poet_serving.api.guard import ApiKeys, Guard, Limits, error_response
from poet_serving.api.metrics import Metrics
from poet_serving.api.objects import ErrorBody, ModelList
from poet_serving.api.service import Service, store_error
from poet_serving.schema import RequestError

__all__ = ["create_application"]

_log = logging.getLogger(__name__)

_CODES = {404: "not_found", 405: "method_not_allowed"}


def create_application(
    service: Service | None,
    *,
    keys: ApiKeys,
    limits: Limits,
    metrics: Metrics,
    origins: tuple[str, ...] = (),
    page: bool = False,
) -> FastAPI:
    """Make the application.

    Args:
        service: what the routes call; None: it is set as `state.service` before the first request.
        keys: who may ask.
        limits: how often and how much.
        metrics: is told of every answer.
        origins: pages of other hosts that browsers may call it from; none by default.
        page: whether the chat page is at /; it needs gradio, and is left out where that is not installed.
    """
    application = FastAPI(
        title="Poet",
        version=__version__,
        summary="Writes video with sound.",
        description="An API in the forms of OpenAI's clients. Every error has the shape of `ErrorBody`.",
    )
    application.state.service = service
    for router in (videos.router, chat.router, files.router, batches.router):
        application.include_router(router)

    @application.get("/v1/models", response_model=ModelList, responses=_errors(401, 429), tags=["models"])
    async def models(request: Request) -> ModelList:
        """The bundle, and its LoRA adapters, any of which a request may name as its `model`."""
        return ModelList(data=list(videos.service_of(request).models()))

    @application.api_route(
        "/v1/{rest:path}", methods=["GET", "POST", "PUT", "DELETE", "PATCH"], include_in_schema=False
    )
    async def nothing(rest: str) -> None:
        raise HTTPException(404)

    if page:
        _mount_page(application, keys, limits)
    _add_handlers(application)
    application.add_middleware(_GuardedBy, keys=keys, limits=limits, metrics=metrics)
    if origins:
        application.add_middleware(
            CORSMiddleware, allow_origins=list(origins), allow_methods=["*"], allow_headers=["*"]
        )
    _amend_document(application, has_keys=bool(keys))
    return application


def _errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {status: videos.ERRORS.get(status, {"model": ErrorBody}) for status in statuses}


def _mount_page(application: FastAPI, keys: ApiKeys, limits: Limits) -> None:
    """Put the page behind all routes, where there is gradio."""
    try:
        from poet_serving.api.page import Page
    except ModuleNotFoundError as error:
        if error.name != "gradio":
            raise
        _log.warning("there is no page at /: it needs gradio. Install openpoet[ui], or say --no-page.")
        return
    application.mount("/", Page(lambda: application.state.service, keys=keys, limits=limits))


class _GuardedBy(Guard):
    """`Guard`, as Starlette makes middleware."""

    def __init__(self, app: ASGIApp, keys: ApiKeys, limits: Limits, metrics: Metrics) -> None:
        super().__init__(app, keys=keys, limits=limits, metrics=metrics)


def _add_handlers(application: FastAPI) -> None:
    """Every error in one shape."""

    @application.exception_handler(RequestError)
    async def refused(request: Request, error: RequestError) -> JSONResponse:
        videos.service_of(request).metrics.errors.labels(error.code).inc()
        return error_response(error)

    @application.exception_handler(PoetError)
    async def poet_error(request: Request, error: PoetError) -> JSONResponse:
        if isinstance(error, ConfigError):
            return await refused(request, RequestError(str(error), code="invalid_value"))
        if isinstance(error, MediaError):  # of the server's own files: what is wrong with a client's is a RequestError
            return await refused(request, store_error(error))
        _log.error("%s", error)
        return await refused(request, RequestError(str(error), code="server_error", status=500))

    @application.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        param = str(first["loc"][-1]) if first["loc"] else None
        message = f"{param or 'the request'}: {first['msg']}"
        return await refused(request, RequestError(message, code="invalid_value", param=param))

    @application.exception_handler(HTTPException)
    async def plain(request: Request, error: HTTPException) -> JSONResponse:
        status = error.status_code
        message = {404: "there is nothing here.", 405: "the method is not for this path."}.get(status, error.detail)
        code = _CODES.get(status, "invalid_value" if status < 500 else "server_error")
        response = await refused(request, RequestError(message, code=code, status=status))
        response.headers.update(error.headers or {})
        return response

    @application.exception_handler(ClientDisconnect)
    async def gone(request: Request, error: ClientDisconnect) -> JSONResponse:
        return await refused(request, RequestError("the client has gone.", code="client_gone", status=499))

    @application.exception_handler(Exception)
    async def unforeseen(request: Request, error: Exception) -> JSONResponse:
        _log.exception("%s %s failed", request.method, request.url.path, exc_info=error)
        return await refused(
            request, RequestError("the server failed; its log says why.", code="server_error", status=500)
        )


def _amend_document(application: FastAPI, *, has_keys: bool) -> None:
    """Say in OpenAPI that a key is needed, and nothing of FastAPI's own error 422, which is never sent."""
    make = application.openapi

    def openapi() -> dict[str, Any]:
        document = make()
        parts = document.setdefault("components", {})
        for operations in document["paths"].values():
            for operation in operations.values():
                operation["responses"].pop("422", None)
        for name in ("HTTPValidationError", "ValidationError"):
            parts.get("schemas", {}).pop(name, None)
        if has_keys:
            parts["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
            document["security"] = [{"key": []}]
        return document

    application.openapi = openapi  # type: ignore[method-assign]
