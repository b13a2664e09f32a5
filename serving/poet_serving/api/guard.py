"""Who may ask, how often, and how much at once: what every request passes before a route sees it.

Keys are compared in constant time, bodies are counted while they are read. This module knows HTTP's headers and bytes;
it does not know what a request asks for.
"""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import hmac
import re
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from poet.errors import ConfigError
from poet_serving.api.metrics import Metrics
from poet_serving.schema import RequestError

__all__ = ["ApiKeys", "BadRange", "Guard", "Limits", "TooMany", "error_response"]

MIN_KEY: Final = 16  # characters
_NAME: Final = re.compile(r"[A-Za-z0-9_.-]{1,64}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """What one key may do.

    Attributes:
        requests_per_minute: of every kind.
        open_jobs: that wait or are being carried out.
        queue: jobs of all keys that wait.
        body_bytes: of one request.
        file_bytes: of all files of a key.
        body_seconds: in which a body must have been sent.
    """

    requests_per_minute: int = 6000
    open_jobs: int = 256
    queue: int = 4096
    body_bytes: int = 64 * 2**20
    file_bytes: int = 2**30
    body_seconds: float = 60.0


class ApiKeys:
    """Who may ask.

    Args:
        keys: name to secret; none at all: everybody may, and is one owner.
    """

    def __init__(self, keys: Mapping[str, str]) -> None:
        self._digests = {name: _digest(key) for name, key in keys.items()}

    @classmethod
    def read(cls, path: Path | None) -> ApiKeys:
        """Read keys from a file, one `NAME KEY` a line; lines that begin with # are passed over.

        Raises:
            ConfigError: it cannot be read, holds no key, one that is too short or that no header can hold, or a name
                or a key twice.
        """
        if path is None:
            return cls({})
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"the keys cannot be read from {path}: {error}") from error
        keys: dict[str, str] = {}
        for number, line in enumerate(lines, 1):
            if not line.strip() or line.startswith("#"):
                continue
            name, _, key = line.strip().partition(" ")
            key = key.strip()
            if (wrong := _wrong_line(name, key, keys)) is not None:
                raise ConfigError(
                    f"line {number} of {path} must be NAME KEY, {wrong}. `openssl rand -hex 24` makes one."
                )
            keys[name] = key
        if not keys:
            raise ConfigError(f"{path} must hold at least one line NAME KEY, it holds none.")
        return cls(keys)

    def __bool__(self) -> bool:
        return bool(self._digests)

    def owner(self, key: str | None) -> str | None:
        """Name of the owner of a key; None where there is none. The time it takes does not depend on the key."""
        if not self._digests:
            return ""
        given = _digest(key or "")
        found = None
        for name, digest in self._digests.items():
            if hmac.compare_digest(given, digest):
                found = name
        return found


def _wrong_line(name: str, key: str, known: Mapping[str, str]) -> str | None:
    """What a line of keys must be and is not, if anything; the key itself is never told."""
    if not _NAME.fullmatch(name):
        return "a name of 1 to 64 letters, digits or _.-, a space and a key; its name is none"
    if name in known:
        return f"a name of its own and a key; the name {name} stands above already"
    if len(key) < MIN_KEY:
        return f"a name and a key of at least {MIN_KEY} characters; the key has {len(key)}"
    if not key.isascii() or not key.isprintable() or " " in key:
        return "a name and a key of ASCII characters without spaces; the key has others, which no header can hold"
    if key in known.values():
        same = next(other for other, its in known.items() if its == key)
        return f"a name and a key of its own; the key is that of {same}, and nobody could tell the two apart"
    return None


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


class _Rate:
    """How many requests of a minute an owner has left: a bucket that fills evenly."""

    def __init__(self, per_minute: int, clock: Callable[[], float]) -> None:
        self._per_second, self._full, self._clock = per_minute / 60, float(per_minute), clock
        self._buckets: dict[str, tuple[float, float]] = {}

    def wait(self, owner: str) -> float:
        """Take one; seconds until there is one where there is none, else 0."""
        now = self._clock()
        left, then = self._buckets.get(owner, (self._full, now))
        left = min(self._full, left + (now - then) * self._per_second)
        taken = left >= 1
        self._buckets[owner] = left - taken, now
        return 0.0 if taken else (1 - left) / self._per_second


class _BodyTooLarge(Exception):
    pass


class Guard:
    """ASGI middleware. Paths below /v1/ need a key; everything is limited in size.

    Args:
        app: what is guarded.
        keys: who may ask.
        limits: how often and how much.
        metrics: is told of every answer.
        clock: seconds, of any beginning.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        keys: ApiKeys,
        limits: Limits,
        metrics: Metrics,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._app, self._keys, self._limits, self._metrics = app, keys, limits, metrics
        self._rate = _Rate(limits.requests_per_minute, clock)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, or hand on, a request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            if scope["path"].startswith("/v1/"):
                self._admit(scope)
            self._check_length(scope)
        except RequestError as error:
            await self._refuse(error, scope, receive, send)
            return
        await self._hand_on(scope, receive, send)

    def _admit(self, scope: Scope) -> None:
        """Find whose request it is, and count it."""
        owner = self._keys.owner(_bearer(scope["headers"]))
        if owner is None:
            raise RequestError(
                "a key must be sent as 'Authorization: Bearer KEY', one that this server knows.",
                code="invalid_api_key",
                status=401,
            )
        wait = self._rate.wait(owner)
        if wait > 0:
            raise TooMany(
                f"a key must make at most {self._limits.requests_per_minute} requests a minute, this one made more. "
                "Wait as long as Retry-After says.",
                "rate_limit_exceeded",
                wait,
            )
        scope.setdefault("state", {})["owner"] = owner

    def _check_length(self, scope: Scope) -> None:
        """Refuse a body that says itself that it is too large, before any of it is read."""
        said = dict(scope["headers"]).get(b"content-length", b"")
        if said.isdigit() and int(said) > self._limits.body_bytes:
            raise self._too_large()

    def _too_large(self) -> RequestError:
        return RequestError(
            f"a request must have at most {self._limits.body_bytes} bytes.", code="request_too_large", status=413
        )

    async def _hand_on(self, scope: Scope, receive: Receive, send: Send) -> None:
        count, ends, started = 0, time.monotonic() + self._limits.body_seconds, False
        trouble: RequestError | None = None
        whole = False

        async def limited() -> Message:
            nonlocal count, trouble, whole
            if whole:  # what comes now is that the client has gone
                return await receive()
            try:
                message = await asyncio.wait_for(receive(), max(0.0, ends - time.monotonic()))
            except TimeoutError:
                trouble = RequestError("the request was not sent in time.", code="request_timeout", status=408)
                raise _BodyTooLarge from None
            count += len(message.get("body", b""))
            whole = not message.get("more_body", False)
            if count > self._limits.body_bytes:
                trouble = self._too_large()
                raise _BodyTooLarge
            return message

        async def noted(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                if trouble is not None:  # whoever was reading has made an error of its own of it
                    raise _BodyTooLarge
                started = True
                self._metrics.requests.labels(str(message["status"])).inc()
            await send(message)

        try:
            await self._app(scope, limited, noted)
        except BaseException as error:
            if trouble is None or started:
                if isinstance(error, Exception) and not started:  # it is answered further out, where nobody counts
                    self._metrics.requests.labels("500").inc()
                raise
            await self._refuse(trouble, scope, receive, send)

    async def _refuse(self, error: RequestError, scope: Scope, receive: Receive, send: Send) -> None:
        self._metrics.errors.labels(error.code).inc()
        self._metrics.requests.labels(str(error.status)).inc()
        response = error_response(error)
        response.headers["connection"] = "close"  # what is left of the body is not read
        await response(scope, receive, send)


class TooMany(RequestError):
    """Later, please.

    Args:
        message: for a person.
        code: for a program.
        wait: seconds after which to come again.
    """

    def __init__(self, message: str, code: str, wait: float) -> None:
        super().__init__(message, code=code, status=429)
        self.wait = wait


class BadRange(RequestError):
    """A part of a file that there is not.

    Args:
        message: for a person.
        content_range: how large the file is, in the words of the header `Content-Range`.
    """

    def __init__(self, message: str, content_range: str) -> None:
        super().__init__(message, code="invalid_range", status=416)
        self.content_range = content_range


def error_response(error: RequestError) -> JSONResponse:
    """An error in OpenAI's shape."""
    headers = {}
    if isinstance(error, BadRange):
        headers["content-range"] = error.content_range
    if isinstance(error, TooMany):
        headers = {
            "retry-after": str(max(1, round(error.wait))),
            "retry-after-ms": str(max(1, round(1000 * error.wait))),
        }
    if error.status == 401:
        headers["www-authenticate"] = "Bearer"
    return JSONResponse(error.body, status_code=error.status, headers=headers)


def _bearer(headers: Sequence[tuple[bytes, bytes]]) -> str | None:
    for name, value in headers:
        if name == b"authorization" and value[:7].lower() == b"bearer ":
            return value[7:].decode("latin-1").strip()
    return None
