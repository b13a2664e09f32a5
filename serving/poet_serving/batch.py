"""`poet batch`: a file of requests in OpenAI's batch form, carried out with one engine, and again after a kill.

A result is one line of `results.jsonl`, written after its media file has its name, so whatever a line names is whole.
A line that was answered is never carried out again; a line that cannot be carried out is answered with its error and
stops nothing. Results come in the order in which they are finished. This module knows files and lines; what a body
means is `poet_serving.schema`'s business, and how lines are spread over machines that of `poet_serving.ray_batch`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import itertools
import json
import os
import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from poet.bundle import Bundle
from poet.errors import ConfigError, MediaError, PoetError
from poet.generation.pipeline import GeneratedClip, Pipeline, PreparedClip
from poet.media import write_clip
from poet.model.lora import Adapter
from poet.tasks import get_task
from poet_serving.references import reference_files
from poet_serving.schema import RequestError, VideoBody, to_clip_request

__all__ = [
    "MAX_LINE",
    "BatchLine",
    "BatchSummary",
    "Book",
    "look_through",
    "prepare",
    "read_lines",
    "request_error",
    "result_body",
    "run_batch",
]

RESULTS: Final = "results.jsonl"
MEDIA: Final = "media"
URL: Final = "/v1/videos"
MAX_LINE: Final = 64 * 2**20  # bytes; a data URL of a clip is a few MB
SUFFIXES: Final = {"image": ".png", "audio": ".wav"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class BatchLine:
    """One request of a file.

    Attributes:
        number: of the line, from 1.
        custom_id: the caller's own name for it; None where the line has none.
        body: of the request, as it was read; {} where the line is no request.
        error: why the line is no request, or None.
    """

    number: int
    custom_id: str | None
    body: Mapping[str, Any]
    error: RequestError | None = None

    @property
    def key(self) -> str:
        """By which its result is found again."""
        return f"line {self.number}" if self.custom_id is None else f"id {self.custom_id}"

    @property
    def digest(self) -> str:
        """sha256 in hex of what was asked for, by which its files are named too."""
        asked = json.dumps([self.key, self.body], sort_keys=True)
        return hashlib.sha256(asked.encode()).hexdigest()


@dataclasses.dataclass(frozen=True, kw_only=True)
class BatchSummary:
    """What a run did.

    Attributes:
        completed: lines that became clips, of this run and earlier ones.
        failed: lines that were answered with an error, likewise.
        before: lines that earlier runs had answered.
        seconds: that this run took.
    """

    completed: int
    failed: int
    before: int
    seconds: float


def read_lines(path: Path) -> Iterator[BatchLine]:
    """Read a file of requests; lines of white space are passed over.

    Args:
        path: lines {"custom_id", "method": "POST", "url": "/v1/videos", "body"}.

    Raises:
        MediaError: it cannot be read.
    """
    try:
        with path.open("rb") as file:
            number = 0
            while line := file.readline(MAX_LINE + 1):
                number += 1
                if len(line) > MAX_LINE:
                    while not line.endswith(b"\n") and (line := file.readline(MAX_LINE)):
                        pass
                    error = RequestError(f"a line must have at most {MAX_LINE} bytes.", code="line_too_long")
                    yield BatchLine(number=number, custom_id=None, body={}, error=error)
                elif line.strip():
                    yield _parse(number, line)
    except OSError as error:
        raise MediaError(f"{path} cannot be read: {error.strerror}.") from error


def run_batch(
    jobs: Path,
    bundle: Bundle,
    output: Path,
    start: Callable[[Sequence[str]], contextlib.AbstractContextManager[Pipeline]],
    progress: Callable[[int, int, int], None] | None = None,
    adapters: Sequence[Adapter] = (),
) -> BatchSummary:
    """Carry out what has not been answered yet.

    Args:
        jobs: a file of requests; paths of input references start from its directory.
        bundle: the model.
        output: directory of the results; made if missing.
        start: starts an engine for some decodings; called if there is anything to do, and closed at the end.
        progress: called with the lines answered, in all, of how many, and in this run.
        adapters: LoRA adapters that lines may name as their model.

    Returns:
        What was done.

    Raises:
        ConfigError: there is no line, or the directory holds results of other requests or of another model.
        MediaError: the file cannot be read or the directory not be written.
    """
    begun = time.monotonic()
    book = Book(output, bundle, adapters)
    decodings, count, known = look_through(jobs, bundle, book)
    before = len(book.answered)

    def tell() -> None:
        if progress is not None:
            now = len(book.answered) - before
            progress(known + now, count, now)

    def prepared(pipeline: Pipeline, waiting: dict[int, BatchLine]) -> Iterator[PreparedClip]:
        taken = itertools.count()
        for line in read_lines(jobs):
            if not book.is_new(line):
                tell()
                continue
            try:
                clip = prepare(line, pipeline, jobs.parent)
            except (ConfigError, MediaError, RequestError) as error:
                book.fail(line, error)
                tell()
                continue
            waiting[next(taken)] = line
            yield clip

    if decodings:
        waiting: dict[int, BatchLine] = {}
        with start(decodings) as pipeline:
            for place, made in pipeline.stream(prepared(pipeline, waiting)):
                book.complete(waiting.pop(place), made)
                tell()
    seconds = round(time.monotonic() - begun, 3)
    return BatchSummary(completed=book.completed, failed=book.failed, before=before, seconds=seconds)


def look_through(jobs: Path, bundle: Bundle, book: Book) -> tuple[Sequence[str], int, int]:
    """See what there is to do.

    Args:
        jobs: a file of requests.
        bundle: the model.
        book: what is answered.

    Returns:
        What an engine must be started with for the lines that are not answered (nothing: there are none), how many
        lines there are, and how many are answered.

    Raises:
        ConfigError: there is no line, or the answers are to other requests.
        MediaError: the file cannot be read.
    """
    count, known, wanted = 0, 0, set[str]()
    own = f"{bundle.generation_config.width}x{bundle.generation_config.height}"
    names: set[str] = set()
    for line in read_lines(jobs):
        count += 1
        if line.key in names:  # a second of its name is an error
            line = dataclasses.replace(line, custom_id=None)
            known += line.key in book.answered
            wanted |= set() if line.key in book.answered else {"autoregressive"}
            continue
        names.add(line.key)
        if book.knows(line):
            known += 1
            continue
        wanted.add("parallel" if line.body.get("decoding") == "parallel" else "autoregressive")
        if bundle.upsampler is not None and line.body.get("size", own) != own:
            wanted.add("upsampling")
    if not count:
        raise ConfigError(f"{jobs} must hold a request a line, it holds none.")
    return sorted(wanted), count, known


def _parse(number: int, line: bytes) -> BatchLine:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        return _bad(number, None, f"line {number} must be JSON: {error}", "invalid_json", None)
    if not isinstance(value, dict):
        return _bad(number, None, f"line {number} must be a JSON object, it is not.", "invalid_json", None)
    name = value.get("custom_id")
    if not isinstance(name, str) or not name or len(name) > 512:
        return _bad(number, None, "custom_id must be a text of 1 to 512 characters.", "invalid_value", "custom_id")
    if unknown := sorted(value.keys() - {"custom_id", "method", "url", "body"}):
        return _bad(number, name, f"unknown key {unknown[0]!r}.", "unknown_parameter", unknown[0])
    for key, wanted in (("method", "POST"), ("url", URL)):
        if value.get(key, wanted) != wanted:
            return _bad(number, name, f"{key} must be {wanted!r}, got {value[key]!r}.", "invalid_value", key)
    if not isinstance(value.get("body"), dict):
        return _bad(number, name, "body must be an object.", "invalid_value", "body")
    return BatchLine(number=number, custom_id=name, body=value["body"])


def _bad(number: int, custom_id: str | None, message: str, code: str, param: str | None) -> BatchLine:
    error = RequestError(message, code=code, param=param)
    return BatchLine(number=number, custom_id=custom_id, body={}, error=error)


def prepare(line: BatchLine, pipeline: Pipeline, base: Path) -> PreparedClip:
    """What a line asks a pipeline for.

    Args:
        line: of a file.
        pipeline: that is going to write the clip.
        base: directory that the path of an input reference starts from.

    Raises:
        RequestError: the line is no request, or one that the bundle does not carry out.
        ConfigError: likewise, found by the pipeline.
        MediaError: the input reference cannot be read.
    """
    if line.error is not None:
        raise line.error
    body = VideoBody.parse(line.body)
    with reference_files(body, base) as files:
        return pipeline.prepare(to_clip_request(body, pipeline.bundle, files, pipeline.adapters), line.number)


def request_error(error: PoetError) -> RequestError:
    """An error as a program reads it."""
    return error if isinstance(error, RequestError) else RequestError(str(error), code="invalid_value")


def result_body(digest: str, made: GeneratedClip, model: str) -> dict[str, Any]:
    """The body of a result, an OpenAI video with Poet's metadata.

    Args:
        digest: of the line.
        made: what it became.
        model: name of the bundle or adapter.

    Returns:
        "file" names the media file, from the directory of the results; it is missing where a text was written.
    """
    now = int(time.time())
    body: dict[str, Any] = {
        "id": f"video_{digest[:24]}",
        "object": "video",
        "model": model,
        "status": "completed",
        "progress": 100,
        "created_at": now,
        "completed_at": now,
        "prompt": made.request.text,
        "metadata": made.metadata,
    }
    if made.text is not None:
        body["text"] = made.text
    if made.clip is not None:
        suffix = SUFFIXES.get(get_task(made.request.task).outputs, ".mp4")
        body |= {"file": f"{MEDIA}/{digest[:24]}{suffix}", "seconds": f"{made.clip.duration:g}"}
        if made.clip.frames is not None:
            body["size"] = f"{made.clip.frames.shape[2]}x{made.clip.frames.shape[1]}"
    return body


class Book:
    """The results of a directory: which lines are answered, and new answers.

    Args:
        directory: made if missing.
        bundle: whose results they are.
        adapters: likewise.

    Raises:
        ConfigError: a line of it is no result, or one of another model or adapter.
        MediaError: it cannot be read or written.
    """

    def __init__(self, directory: Path, bundle: Bundle, adapters: Sequence[Adapter] = ()) -> None:
        self.directory, self.model, self.weights = directory, bundle.name, bundle.weights_sha256
        self._adapters = {adapter.name: adapter.sha256 for adapter in adapters}
        self.answered: dict[str, str] = {}
        self.seen: set[str] = set()
        self.completed = self.failed = 0
        try:
            (directory / MEDIA).mkdir(parents=True, exist_ok=True)
            for part in (directory / MEDIA).glob(".*"):  # of a run that was killed while it wrote one
                part.unlink()
            self._drop_half_a_line()
            self._read()
        except OSError as error:
            raise MediaError(f"{directory} cannot hold results: {error.strerror}. Name another with -o.") from error

    def knows(self, line: BatchLine) -> bool:
        """Whether a line is answered.

        Raises:
            ConfigError: what is answered is something else under its name.
        """
        known = self.answered.get(line.key)
        if known is not None and known != line.digest:
            raise ConfigError(
                f"{self.directory} holds an answer to {line.key}, which asked for something else than line "
                f"{line.number} does now. Name another directory with -o."
            )
        return known is not None

    def is_new(self, line: BatchLine) -> bool:
        """Whether a line is to be carried out; a second one of the same name is answered with an error."""
        if line.key not in self.seen:
            self.seen.add(line.key)
            return not self.knows(line)
        again = dataclasses.replace(line, custom_id=None)
        if again.key not in self.answered:
            message = f"custom_id must be the line's own, {line.custom_id!r} was named before."
            self.fail(again, RequestError(message, code="duplicate_custom_id", param="custom_id"), line.custom_id)
        return False

    def complete(self, line: BatchLine, made: GeneratedClip) -> None:
        """Keep a clip: the media file first, then the line that names it."""
        body = result_body(line.digest, made, made.request.adapter or self.model)
        if made.clip is not None:
            write_clip(made.clip, self.directory / body["file"], metadata=made.metadata)
        self._append(line, line.custom_id, 200, body)

    def fail(self, line: BatchLine, error: PoetError, custom_id: str | None = None) -> None:
        """Keep why a line was not carried out."""
        known = request_error(error)
        self._append(line, custom_id or line.custom_id, known.status, known.body)

    def keep(self, line: BatchLine, status: int, body: Mapping[str, Any], media: bytes | None, node: str) -> None:
        """Keep what another process made of a line.

        Args:
            line: that was carried out.
            status: of HTTP.
            body: `result_body`, or an error's.
            media: the media file, where the body names one.
            node: who made it.
        """
        if media is not None:
            part = self.directory / MEDIA / f".poet-{secrets.token_hex(8)}"
            try:
                with part.open("wb") as file:
                    file.write(media)
                    file.flush()
                    os.fsync(file.fileno())
                part.replace(self.directory / body["file"])
            except OSError as error:
                raise MediaError(f"{self.directory / body['file']} cannot be written: {error.strerror}.") from error
            finally:
                part.unlink(missing_ok=True)
        self._append(line, line.custom_id, status, body, node=node)

    def _append(
        self, line: BatchLine, custom_id: str | None, status: int, body: Mapping[str, Any], **more: str
    ) -> None:
        result = {
            "id": f"batch_req_{line.digest[:24]}",
            "custom_id": custom_id,
            "response": {"status_code": status, "request_id": f"req_{line.digest[24:48]}", "body": body},
            "error": None,
            "poet": {
                "line": line.number,
                "key": line.key,
                "request_sha256": line.digest,
                "weights_sha256": self.weights,
                **more,
            },
        }
        try:
            with (self.directory / RESULTS).open("ab") as file:
                file.write(json.dumps(result).encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise MediaError(f"{self.directory / RESULTS} cannot be written: {error.strerror}.") from error
        self._count(result)

    def _read(self) -> None:
        file = self.directory / RESULTS
        for number, line in enumerate(file.read_bytes().splitlines() if file.exists() else [], 1):
            try:
                self._count(json.loads(line))
            except (json.JSONDecodeError, KeyError, TypeError) as error:
                raise ConfigError(
                    f"line {number} of {file} is no result of a batch. Name another directory."
                ) from error

    def _count(self, result: Mapping[str, Any]) -> None:
        told = result["poet"]
        if told["weights_sha256"] != self.weights:
            raise ConfigError(
                f"{self.directory} holds clips of other weights, {told['weights_sha256'][:12]} (sha256), than those of "
                f"{self.model}, {self.weights[:12]}. Name another directory with -o."
            )
        about = result["response"]["body"].get("metadata", {})
        name, sha256 = about.get("adapter"), about.get("adapter_sha256")
        if name is not None and sha256 != self._adapters.get(name):
            given = self._adapters.get(name, "none")
            raise ConfigError(
                f"{self.directory} holds clips of the adapter {name!r}, {sha256[:12]} (sha256), which must be given "
                f"again with --lora; got {given[:12]}. Name it, or another directory with -o."
            )
        self.answered[told["key"]] = told["request_sha256"]
        done = result["response"]["status_code"] == 200
        self.completed, self.failed = self.completed + done, self.failed + (not done)

    def _drop_half_a_line(self) -> None:
        """Cut off what a kill left behind the last whole line."""
        file = self.directory / RESULTS
        if not file.exists():
            return
        content = file.read_bytes()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            os.truncate(file, whole)
