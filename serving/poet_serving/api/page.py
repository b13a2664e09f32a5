"""The chat page at `/`, for people without a program: a conversation in which clips play in place, drawn by gradio.

gradio draws and carries values; it never sees a file. A page sends uploads to a route of ours, which keeps their bytes
unopened for `service.reader`, and clips are played from another. Of gradio's routes only those that the page needs can
be reached. Where the server has keys, a name and its key are asked for first, and a cookie stands for them from then
on, also where a <video> element asks. This module knows HTTP and gradio; what is said belongs to `page_talk`.
"""

from __future__ import annotations

import asyncio
import dataclasses
import re
import secrets
import time
from collections.abc import AsyncIterator, Callable
from typing import Any, Final
from urllib.parse import parse_qs

import gradio as gr
import numpy as np
from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, RedirectResponse, Response
from starlette.routing import Route, Router
from starlette.types import ASGIApp, Receive, Scope, Send

from poet_serving.api import page_talk, page_view
from poet_serving.api.finishing import encode_clip
from poet_serving.api.forms import FileAnswer
from poet_serving.api.guard import ApiKeys, Limits, error_response
from poet_serving.api.page_talk import KINDS, Asked, Talk, parse_talk
from poet_serving.api.service import Service
from poet_serving.schema import RequestError

__all__ = ["Page", "Uploads"]

MAX_SAMPLES: Final = 4
MAX_LOGIN: Final = 8192  # bytes of a name and its key
SESSION_SECONDS: Final = 7 * 24 * 3600.0
UPLOAD_SECONDS: Final = 15 * 60.0
UPLOADS_KEPT: Final = 4  # of the largest size
WATCH_SECONDS: Final = 15.0
"""How long one answer goes on: a page that is left open must not keep the server from ending."""
POLL_SECONDS: Final = 0.4
COOKIE: Final = "poet_page"
TAKES_FILES: Final = frozenset(
    (
        "image_to_video",
        "video_continuation",
        "audio_video_continuation",
        "audio_to_video",
        "video_to_audio",
        "captioning",
    )
)
# What the page needs of gradio. Its other routes write files, fetch addresses, or show what nobody asked for.
_KEPT: Final = re.compile(
    r"/(|config/?|theme\.css|favicon\.ico|manifest\.json|robots\.txt|(assets|static|svelte)/.*"
    r"|gradio_api/(info/?|queue/(join|data)/?|cancel/?|reset/?))"
)
_PRIVATE: Final = {"cache-control": "no-store", "x-frame-options": "DENY", "referrer-policy": "no-referrer"}


class Page:
    """An ASGI application: the page and what belongs to it. Built at the first request, when there is a service.

    Args:
        service: gives the service, once there is one.
        keys: who may log in; without any, everybody is one owner.
        limits: `body_bytes` is that of uploads, which the guard watches.
    """

    def __init__(self, service: Callable[[], Service], *, keys: ApiKeys, limits: Limits) -> None:
        self._service, self._keys = service, keys
        self._sessions = _Sessions()
        self.uploads = Uploads(UPLOADS_KEPT * limits.body_bytes)
        self._gradio: ASGIApp | None = None
        self._starting = asyncio.Lock()
        self._living: asyncio.Task[None] | None = None
        self._router = Router(
            routes=[
                Route("/login", self._login, methods=["GET", "POST"]),
                Route("/logout", self._logout),
                Route("/page/uploads", self._upload, methods=["POST"]),
                Route("/page/clips/{id}/{variant}", self._clip),
            ],
            default=self._hand_on,
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, on behalf of whoever its cookie stands for.

        Raises:
            HTTPException: there is nothing there.
            RequestError: there is no such clip, an upload is empty, or a login is none.
        """
        if scope["type"] != "http":  # gradio needs none of the others
            raise HTTPException(404)
        request = Request(scope)
        owner = self._sessions.owner(request.cookies.get(COOKIE)) if self._keys else ""
        if owner is None and request.url.path.rstrip("/") != "/login":
            await _ask(request)(scope, receive, send)
            return
        scope.setdefault("state", {})["owner"] = owner
        await self._router(scope, receive, send)

    async def _login(self, request: Request) -> Response:
        if request.method != "POST" or not self._keys:
            return RedirectResponse("./", status_code=303)
        name, key = await _read_login(request)
        is_browser = "text/html" in request.headers.get("accept", "")
        if not name or self._keys.owner(key) != name:
            await asyncio.sleep(0.5)  # whoever guesses has to wait
            said = "This name and this key do not belong together."
            if not is_browser:
                return error_response(RequestError(said, code="invalid_api_key", status=401))
            return HTMLResponse(page_view.login_page(said), status_code=401, headers=_PRIVATE)
        response = RedirectResponse("./", status_code=303) if is_browser else JSONResponse({"success": True})
        response.set_cookie(
            COOKIE,
            self._sessions.begin(name),
            max_age=int(SESSION_SECONDS),
            httponly=True,
            samesite="strict",
            secure=request.url.scheme == "https",
        )
        return response

    async def _logout(self, request: Request) -> Response:
        self._sessions.end(request.cookies.get(COOKIE))
        response = RedirectResponse("./", status_code=303)
        response.delete_cookie(COOKIE)
        return response

    async def _upload(self, request: Request) -> Response:
        """Keep what was sent, unopened, for the message that it goes with."""
        content = await request.body()
        if not content:
            raise RequestError("the file must hold something, it is empty.", code="invalid_input_reference")
        return JSONResponse({"token": self.uploads.put(request.state.owner, content)})

    async def _clip(self, request: Request) -> Response:
        """A clip (or sound), or the first picture of what was given for it."""
        owner, id, variant = request.state.owner, request.path_params["id"], request.path_params["variant"]
        headers = {"cache-control": "private, max-age=3600", "x-content-type-options": "nosniff"}
        if variant == "given":
            _, clip = await page_talk.given_clip(self._service(), owner, id)
            if clip.frames is None:
                raise HTTPException(404)
            picture = dataclasses.replace(clip, frames=np.ascontiguousarray(clip.frames[:1]), samples=None)
            content = await asyncio.to_thread(encode_clip, picture, ".png")
            return Response(content, media_type="image/png", headers=headers)
        if variant != "video":
            raise HTTPException(404)
        found, media_type = await self._service().file(owner, id, variant)
        if isinstance(found, bytes):
            return Response(found, media_type=media_type, headers=headers)
        return FileAnswer(found, media_type=media_type, headers=headers)

    async def _hand_on(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let gradio answer."""
        if not _KEPT.fullmatch(Request(scope).url.path):
            raise HTTPException(404)
        async with self._starting:
            if self._gradio is None:
                self._gradio = await self._start()
        await self._gradio(scope, receive, send)

    async def _start(self) -> ASGIApp:
        """Build the page, and begin what gradio does besides answering; that ends with the event loop.

        The lifespan is entered here because nobody else does it: an application that is mounted in vLLM's has none.
        """
        application = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
        size = self._service().models()[0].sizes[0]
        gr.mount_gradio_app(
            application,
            _build(self._service(), self.uploads),
            "/",
            auth_dependency=_owner_of if self._keys else None,
            footer_links=[],
            run_history=False,
            ssr_mode=False,
            enable_monitoring=False,
            pwa=False,
            mcp_server=False,
            theme=gr.themes.Base(
                primary_hue="indigo",
                neutral_hue="slate",
                radius_size="lg",
                font=["system-ui", "sans-serif"],  # gradio's own are fetched from another host
                font_mono=["ui-monospace", "monospace"],
            ).set(body_text_color_subdued="*neutral_500", body_text_color_subdued_dark="*neutral_400"),
            css=f"{page_view.CSS}:root {{ --ratio: {size.replace('x', ' / ')}; }}",
        )
        entered = asyncio.Event()

        async def live() -> None:
            async with application.router.lifespan_context(application):
                entered.set()
                await asyncio.Event().wait()

        self._living = asyncio.create_task(live())
        await asyncio.wait(
            (self._living, waiting := asyncio.ensure_future(entered.wait())), return_when="FIRST_COMPLETED"
        )
        waiting.cancel()
        if self._living.done():
            self._living.result()  # raises what was wrong
        return application


def _ask(request: Request) -> Response:
    """The answer to somebody who is not known: the form, or to a program that it has to log in."""
    if request.url.path == "/" and request.method in ("GET", "HEAD"):
        return HTMLResponse(page_view.login_page(None), status_code=401, headers=_PRIVATE)
    return error_response(
        RequestError("a name and its key must be given at / first.", code="not_logged_in", status=401)
    )


async def _read_login(request: Request) -> tuple[str, str]:
    """The name and the key of a login, of which no more is read than they may have.

    Raises:
        RequestError: it is too large, or no form.
    """
    content = b""
    async for chunk in request.stream():
        content += chunk
        if len(content) > MAX_LOGIN:
            message = f"a login must have at most {MAX_LOGIN} bytes, this one has more. Send a name and its key alone."
            raise RequestError(message, code="request_too_large", status=413)
    try:
        given = parse_qs(content.decode("utf-8", "replace"), max_num_fields=8)
    except ValueError as error:
        raise RequestError("a login must have a username and a password alone.", code="invalid_value") from error
    name, key = (given.get(field, [""])[0] for field in ("username", "password"))
    return name, key


def _owner_of(request: Request) -> str | None:
    """Whom gradio's request is of; set by `Page`."""
    owner: str | None = request.state.owner
    return owner


class _Sessions:
    """Who is logged in, for as long as the server runs."""

    def __init__(self) -> None:
        self._known: dict[str, tuple[str, float]] = {}

    def begin(self, owner: str) -> str:
        """A new secret that stands for an owner."""
        now = time.monotonic()
        self._known = {secret: known for secret, known in self._known.items() if known[1] > now}
        secret = secrets.token_urlsafe(32)
        self._known[secret] = owner, now + SESSION_SECONDS
        return secret

    def owner(self, secret: str | None) -> str | None:
        """Whom a secret stands for; None for nobody."""
        owner, ends = self._known.get(secret or "", (None, 0.0))
        return owner if ends > time.monotonic() else None

    def end(self, secret: str | None) -> None:
        """Forget a secret."""
        self._known.pop(secret or "", None)


class Uploads:
    """Files between their upload and the message that they go with: bytes in memory, the oldest go first.

    Args:
        max_bytes: of all together.
        max_count: of them.
        clock: seconds, of any beginning.
    """

    def __init__(self, max_bytes: int, max_count: int = 64, clock: Callable[[], float] = time.monotonic) -> None:
        self._max_bytes, self._max_count, self._clock = max_bytes, max_count, clock
        self._kept: dict[str, tuple[str, bytes, float]] = {}

    def put(self, owner: str, content: bytes) -> str:
        """Keep a file; its name is the answer."""
        token, now = secrets.token_urlsafe(16), self._clock()
        self._kept = {name: kept for name, kept in self._kept.items() if kept[2] > now}
        self._kept[token] = owner, content, now + UPLOAD_SECONDS
        total = sum(len(kept[1]) for kept in self._kept.values())
        while total > self._max_bytes or len(self._kept) > self._max_count:
            total -= len(self._kept.pop(next(iter(self._kept)))[1])
        return token

    def get(self, owner: str, token: str) -> bytes | None:
        """A file of an owner; None where it is gone, or another's."""
        whose, content, ends = self._kept.get(token, ("", b"", 0.0))
        return content if whose == owner and ends > self._clock() else None

    def drop(self, token: str) -> None:
        """Forget a file."""
        self._kept.pop(token, None)


class _Callbacks:
    """What happens on the page. The answers stand in the order of the outputs in `_build`.

    Args:
        service: whom to ask.
        uploads: what was sent with messages.
    """

    def __init__(self, service: Service, uploads: Uploads) -> None:
        self._service, self._uploads = service, uploads

    async def send(self, request: gr.Request, said: str, talk: Any, file: Any, *settings: Any) -> tuple[Any, ...]:
        """Take a message, with what stands in the settings."""
        owner = request.username or ""
        current = parse_talk(talk, owner)
        said = (said or "").strip()
        if current.is_open or not (said or file):
            return (gr.skip(),) * 6
        asked = Asked(**dict(zip((field.name for field in dataclasses.fields(Asked)), settings, strict=True)))
        name, token = (str(file.get("name")), str(file.get("token"))) if isinstance(file, dict) else (None, "")
        upload = self._uploads.get(owner, token)
        if name is not None and upload is None:
            page_talk.refuse(current, said, name, "The file is no longer here. Attach it again.")
            return *await self._shown(current), gr.skip(), None
        if not await page_talk.answer(self._service, current, asked, said, name, upload):
            return *await self._shown(current), gr.skip(), gr.skip()  # to be mended and sent again
        self._uploads.drop(token)
        return *await self._shown(current), "", None

    async def say(
        self, request: gr.Request, event: gr.EventData, talk: Any, file: Any, *settings: Any
    ) -> tuple[Any, ...]:
        """Take what stands on a chip that was clicked on."""
        return await self.send(request, str(event.text), talk, file, *settings)

    async def watch(self, request: gr.Request, talk: Any) -> AsyncIterator[tuple[Any, ...]]:
        """Show how far the samples are, for a while; the page comes again."""
        current, ends = parse_talk(talk, request.username or ""), time.monotonic() + WATCH_SECONDS
        while current.is_open and time.monotonic() < ends:
            if await page_talk.follow(self._service, current):
                yield await self._shown(current)
            if current.is_open:
                await asyncio.sleep(POLL_SECONDS)

    async def stop(self, request: gr.Request, talk: Any) -> tuple[Any, ...]:
        """Stop what is being written."""
        current = parse_talk(talk, request.username or "")
        await page_talk.stop(self._service, current)
        return await self._shown(current)

    async def fresh(self, request: gr.Request, talk: Any) -> tuple[Any, ...]:
        """Begin anew."""
        await self.stop(request, talk)
        return await self._shown(Talk(owner=request.username or ""))

    async def show(self, request: gr.Request, talk: Any) -> tuple[Any, ...]:
        """What a page shows that is opened: the conversation that the browser kept."""
        owner = request.username or ""
        model = self._service.models()[0]
        header = page_view.header_view(model.id, model.sizes[0], model.seconds, owner)
        return *await self._shown(parse_talk(talk, owner)), header

    async def _shown(self, talk: Talk) -> tuple[Any, ...]:
        """The conversation, for the browser to keep and to show; the button that stops; the clock that watches."""
        edits = await asyncio.to_thread(page_talk.edits, self._service, talk)
        parts = page_view.view(talk, page_talk.examples(self._service), edits)
        return talk.model_dump(), parts, gr.update(visible=talk.is_open), gr.update(active=talk.is_open)


def _build(service: Service, uploads: Uploads) -> Any:
    """The page as gradio's blocks."""
    on, tasks = _Callbacks(service, uploads), service.models()[0].tasks
    with gr.Blocks(title="Poet", analytics_enabled=False, fill_width=True) as blocks:
        talk = gr.BrowserState(Talk().model_dump(), storage_key="poet-talk", secret="poet")
        header = _html("header", "${value}", page_view.HEADER_SCRIPT)
        shown = _html("conversation", "", page_view.SCRIPT)
        with gr.Column(elem_id="composer"):
            with gr.Row(elem_id="line"):
                file = _html(
                    "attach",
                    page_view.ATTACH,
                    page_view.ATTACH_SCRIPT,
                    visible=tasks is None or not TAKES_FILES.isdisjoint(tasks),
                    limit=service.limits.body_bytes,
                )
                said = gr.Textbox(
                    elem_id="said",
                    placeholder="Describe a clip",
                    show_label=False,
                    container=False,
                    max_lines=6,
                    autofocus=True,
                    submit_btn=True,
                )
                stop = gr.Button("Stop", elem_id="stop", visible=False)
            with gr.Accordion("Settings", open=False, elem_id="settings"):
                settings = _controls(service)
        timer = gr.Timer(POLL_SECONDS, active=False)
        state = [talk, shown, stop, timer]
        quiet = {"show_progress": "hidden", "api_visibility": "undocumented"}
        said.submit(on.send, [said, talk, file, *settings], [*state, said, file], **quiet)
        shown.say(on.say, [talk, file, *settings], [*state, said, file], **quiet)
        timer.tick(on.watch, talk, state, **quiet)
        stop.click(on.stop, talk, state, **quiet)
        header.fresh(on.fresh, talk, state, **quiet)
        blocks.load(on.show, talk, [*state, header], **quiet)
    blocks.queue(default_concurrency_limit=None, api_open=False)  # nothing is computed here
    return blocks


def _html(name: str, template: str, script: str, **props: Any) -> Any:
    return gr.HTML(elem_id=name, html_template=template, js_on_load=script, apply_default_css=False, **props)


def _controls(service: Service) -> list[Any]:
    """The settings, in the order of the fields of `Asked`; what the bundle cannot do is not shown."""
    models, defaults = service.models(), service.bundle.generation_config
    model, parallel = models[0], defaults.parallel
    scales = (defaults.guidance_scale, parallel.guidance_scale)
    kinds = [name for name, kind in KINDS.items() if model.tasks is None or kind.task in model.tasks]
    is_parallel, has_sizes = "parallel" in model.decodings, len(model.sizes) > 1
    with gr.Row():
        choices = [(KINDS[name].label, name) for name in kinds]
        kind = gr.Radio(
            choices, value=kinds[0] if kinds else "clip", label="Answer with", visible=len(kinds) > 1, scale=3
        )
        samples = gr.Slider(1, MAX_SAMPLES, 1, step=1, label="Samples side by side", scale=2)
    with gr.Row():
        guidance = gr.Slider(
            min(1, *scales),
            max(8, *scales),
            scales[0],
            step=0.1,
            label="Guidance",
            info="How closely it keeps to the prompt",
        )
        temperature = gr.Slider(
            0, 2, defaults.temperature, step=0.05, label="Temperature", info="How much is left to chance"
        )
        # A number's field would turn the empty text, a new seed each time, into 0.
        seed = gr.Textbox(label="Seed", info="The same seed gives the same clip", placeholder="a new one each time")
    with gr.Row(visible=is_parallel or has_sizes or len(models) > 1):
        decoding = gr.Radio(
            [("One after another", "autoregressive"), ("In parallel", "parallel")],
            value="autoregressive",
            label="Decoding",
            visible=is_parallel,
        )
        steps = gr.Slider(1, max(64, parallel.num_steps), parallel.num_steps, step=1, label="Steps", visible=False)
        size = gr.Radio(model.sizes, value=model.sizes[0], label="Size", visible=has_sizes)
        names = [one.id for one in models]
        chosen_model = gr.Dropdown(names, value=names[0], label="Model", visible=len(names) > 1)

    def usual(chosen: str) -> tuple[Any, Any]:
        """Either decoding has a guidance of its own, which takes the place of what was set; only one has steps."""
        in_parallel = chosen == "parallel"
        scale = parallel.guidance_scale if in_parallel else defaults.guidance_scale
        return gr.update(visible=in_parallel), gr.update(value=scale)

    decoding.change(usual, decoding, [steps, guidance], api_visibility="private")
    return [kind, samples, guidance, temperature, seed, decoding, steps, size, chosen_model]
