"""Files of strangers become clips, read by processes that can be killed (`poet_serving.media_child`).

`MediaReader` belongs to one event loop. It knows workers, time and errors for a program; it opens no media itself, and
what a worker's fork answers is checked before it is believed.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import math
import os
import signal
import socket
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, Final, get_args

import numpy as np

from poet.bundle import Bundle
from poet.errors import ConfigError, MediaError, PoetError
from poet.media import Clip
from poet.tasks import TASKS, get_task
from poet_serving.media_child import (
    END,
    LENGTH,
    MAX_HEADER,
    MAX_MESSAGE,
    Found,
    Kind,
    Order,
    ReadingLimits,
    Refused,
    unpack_header,
)
from poet_serving.schema import RequestError

__all__ = ["MediaReader", "ReadReference", "ReadingLimits"]

_START_SECONDS: Final = 60.0  # imports, on a busy machine
_END_SECONDS: Final = 5.0  # a template only ever waits for the kernel
_STATUS: Final = {"input_reference_too_large": 413}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReadReference:
    """A file that was read.

    Attributes:
        kind: what its content is.
        task: the one that was named, or that such a file means.
        clip: what the task is given, at the bundle's size and rates.
    """

    kind: Kind
    task: str
    clip: Clip


class MediaReader:
    """Reads pictures, clips and sounds that strangers sent, each in a process of its own.

    Args:
        bundle_dir: the bundle whose sizes and rates they are read at.
        scratch: directory in which an upload in memory becomes a file without a name; made if missing, never left
            with anything in it.
        limits: what one read may take.
        num_workers: reads at once; more of them wait for their turn, which does not count as their time.

    Raises:
        CheckpointError: there is no such bundle.
        ConfigError: num_workers is below 1.
        MediaError: the directory cannot be made.
        PoetError: a process cannot be started.
    """

    def __init__(
        self,
        bundle_dir: Path,
        scratch: Path,
        limits: ReadingLimits = ReadingLimits(),  # noqa: B008 - frozen
        num_workers: int = 1,
    ) -> None:
        if num_workers < 1:
            raise ConfigError(f"num_workers must be at least 1, got {num_workers}.")
        bundle = Bundle.open(bundle_dir, require_model=False)
        try:
            scratch.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise MediaError(f"{scratch} cannot hold uploads: {error.strerror}. Name another directory.") from error
        self._scratch, self._limits = scratch, limits
        self._workers = [_Worker(bundle, limits) for _ in range(num_workers)]
        self._idle: asyncio.LifoQueue[_Worker] = asyncio.LifoQueue()
        self._is_closed = False
        try:
            for worker in self._workers:
                worker.start()
                self._idle.put_nowait(worker)
        except PoetError:
            self.close()
            raise

    async def read(
        self, content: bytes | Path, *, task: str | None, has_text: bool, kind: str | None = None
    ) -> ReadReference:
        """Read a file as `GivenFiles.read` does, in another process.

        Args:
            content: the upload, or a file that holds it.
            task: a name in `poet.tasks.TASKS`; None: what such a file means.
            has_text: whether a text was sent too.
            kind: "image", "video" or "audio" where the file must be that; None takes each. What a file is, only its
                content says.

        Raises:
            RequestError: the file cannot be read, is of another kind ("invalid_input_reference"), takes too long
                ("input_reference_too_slow"), or is beyond another limit ("input_reference_too_large"); or the task does
                not go with it ("invalid_value").
            PoetError: no process can be started, or the reader is closed.
            MediaError: the directory or the path cannot be used.
        """
        order = _order(task, has_text, kind)
        if isinstance(content, bytes):
            self._check_size(len(content))
        worker = await self._idle.get()
        try:
            if self._is_closed:
                raise PoetError("the reader of uploads is closed. Open another.")
            file = await asyncio.to_thread(self._open, content)
            with file:
                found = await worker.read(order, file)
        finally:
            if self._is_closed:
                worker.stop()
            self._idle.put_nowait(worker)
        return found

    def close(self) -> None:
        """End the processes. Reads that are under way or wait fail with a PoetError or a RequestError."""
        self._is_closed = True
        for worker in self._workers:
            worker.kill()
        idle = [self._idle.get_nowait() for _ in range(self._idle.qsize())]
        for worker in idle:
            worker.stop()
            self._idle.put_nowait(worker)

    def _open(self, content: bytes | Path) -> BinaryIO:
        """The content as an open file; that of bytes has no name and ends with its last user."""
        try:
            if isinstance(content, bytes):
                file: Any = tempfile.TemporaryFile(dir=self._scratch)  # noqa: SIM115 - whoever called closes it
                try:
                    file.write(content)
                    file.flush()
                except OSError:
                    file.close()
                    raise
                return file
            # Without O_NONBLOCK a pipe would wait here for whoever writes into it.
            file = os.fdopen(os.open(content, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb")
        except OSError as error:
            where = content if isinstance(content, Path) else self._scratch
            raise MediaError(f"{where} cannot be used: {error.strerror}. See that it is there and has room.") from error
        try:
            self._check_size(os.fstat(file.fileno()).st_size)
        except RequestError:
            file.close()
            raise
        return file

    def _check_size(self, size: int) -> None:
        if size > self._limits.max_file_bytes:
            raise _bad(
                f"input_reference: has {size} bytes, at most {self._limits.max_file_bytes} are read. Shrink or cut it.",
                "input_reference_too_large",
            )


class _Worker:
    """A template, the wire to it, and the fork that reads just now; one read at a time.

    The template answers each message `END`, and says when it is ready. What it has not answered yet is owed, and
    collected before it is asked for anything else, so a read that was cancelled leaves at once.
    """

    def __init__(self, bundle: Bundle, limits: ReadingLimits) -> None:
        self._bundle, self._limits = bundle, limits
        self._process: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None
        self._owed = 0
        self._is_new = True

    def start(self) -> None:
        """Start the template, and do not wait until it is ready.

        Raises:
            PoetError: it cannot be started.
        """
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        limits = json.dumps(dataclasses.asdict(self._limits))
        arguments = [theirs.fileno(), os.getpid(), self._bundle.path.resolve(), limits]
        # Nothing of the server's environment, which may hold keys, but what Python needs to find the same modules.
        environment = {name: value for name in ("LD_LIBRARY_PATH", "LANG") if (value := os.environ.get(name))}
        environment |= {
            "PYTHONPATH": os.pathsep.join(str(Path(entry).absolute()) for entry in sys.path if entry),
            "OPENBLAS_NUM_THREADS": "1",  # a template that forks has no other threads
            "OMP_NUM_THREADS": "1",
        }
        with theirs:
            try:
                self._process = subprocess.Popen(
                    [sys.executable, "-P", "-m", "poet_serving.media_child", *map(str, arguments)],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    pass_fds=(theirs.fileno(),),
                    env=environment,
                    cwd="/",
                    start_new_session=True,  # Ctrl-C is for the server
                )
            except OSError as error:
                ours.close()
                raise PoetError(f"no process that reads uploads can be started: {error}.") from error
        self._control, self._owed, self._is_new = ours, 1, True

    def kill(self) -> None:
        """Kill the template and its fork; whoever waits for them sees the wires' ends."""
        if self._process is not None and self._process.poll() is None:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)

    def stop(self) -> None:
        """Kill them and forget them."""
        self.kill()
        if self._process is not None:
            with suppress(subprocess.TimeoutExpired):  # the kernel has it; it is waited for some time later
                self._process.wait(timeout=1.0)
        if self._control is not None:
            self._control.close()
        self._process = self._control = None

    async def read(self, order: Order, file: BinaryIO) -> ReadReference:
        """Have a fork read a file.

        Raises:
            RequestError: see `MediaReader.read`.
            PoetError: likewise.
        """
        control = await self._ready()
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        with ours:
            with theirs:
                try:
                    socket.send_fds(control, [order.pack()], [file.fileno(), theirs.fileno()])
                except OSError as error:
                    self.stop()
                    raise PoetError(f"the process that reads uploads ended: {error}. Try again.") from error
            why: RequestError | None = None
            try:
                async with asyncio.timeout(self._limits.seconds):
                    return await self._receive(ours, order)
            except RequestError:  # which is a ValueError too
                raise
            except TimeoutError:
                why = self._too_slow()
            except ValueError:  # no fork of ours says such things
                why = _bad("input_reference: is a file that takes over its reader. Send another.")
            except (EOFError, ConnectionError):
                pass
            finally:
                self._end()
        ended = await self._settle()
        if why is not None:
            raise why
        if ended is None:
            raise PoetError("the process that reads uploads ended, or could not start another. Try again.")
        if ended == -signal.SIGXCPU:
            raise self._too_slow()
        raise _bad("input_reference: ends the process that reads it; it is damaged, or made to do so. Make it again.")

    async def _ready(self) -> socket.socket:
        """The wire to a template that waits for an order, which is started if need be."""
        if self._process is not None:
            await self._settle()
        if self._control is None:
            self.start()
            await self._settle()
        if self._control is None:
            raise PoetError(
                "no process that reads uploads can be started; what it wrote to standard error says why. Mend that, "
                "and send the request again."
            )
        return self._control

    async def _settle(self) -> int | None:
        """Collect what the template owes; one that does not answer is stopped.

        Returns:
            How the last fork ended; None if that is not known.
        """
        ended: int | None = None
        try:
            if self._process is not None and self._process.poll() is not None:
                raise EOFError
            async with asyncio.timeout(_START_SECONDS if self._is_new else _END_SECONDS):
                while self._owed and self._control is not None:
                    message = await asyncio.get_running_loop().sock_recv(self._control, MAX_MESSAGE)
                    if not message:
                        raise EOFError
                    ended = json.loads(message)
                    self._owed -= 1
                    self._is_new = False
        except (TimeoutError, EOFError, ConnectionError):
            self.stop()
            return None
        return ended

    def _end(self) -> None:
        """Have the template kill its fork, whether or not it has ended. Does not wait: a read may be cancelled."""
        if self._control is not None:
            try:
                self._control.send(END)
                self._owed += 1
            except OSError:
                self.stop()

    async def _receive(self, wire: socket.socket, order: Order) -> ReadReference:
        """A fork's answer.

        Raises:
            RequestError: it is a refusal.
            EOFError: it ends too early.
            ValueError: it is no answer to this order.
        """
        (length,) = LENGTH.unpack(await _receive_bytes(wire, LENGTH.size))
        if length > MAX_HEADER:
            raise ValueError(f"a header must have at most {MAX_HEADER} bytes, got {length}.")
        header = unpack_header(bytes(await _receive_bytes(wire, length)))
        if isinstance(header, Refused):
            param = None if header.code == "invalid_value" else "input_reference"
            raise RequestError(header.message, code=header.code, param=param, status=_STATUS.get(header.code, 400))
        self._check(header, order)
        size = self._bundle.generation_config
        frames = samples = None
        if header.num_frames:
            shape = header.num_frames, size.height, size.width, 3
            frames = np.frombuffer(await _receive_bytes(wire, math.prod(shape)), np.uint8).reshape(shape)
        if header.num_samples:
            samples = np.frombuffer(await _receive_bytes(wire, 4 * header.num_samples), np.float32)
        clip = Clip(frames=frames, fps=header.fps, samples=samples, sample_rate=header.sample_rate)
        return ReadReference(kind=header.kind, task=header.task, clip=clip)

    def _check(self, found: Found, order: Order) -> None:
        """Refuse what no file can become under the limits, before there is memory for it.

        Raises:
            ValueError: it is so.
        """
        size, rate = self._bundle.generation_config, self._bundle.vocabulary.sample_rate
        seconds = max(self._limits.max_duration, size.num_frames / size.fps) + 1
        if (
            found.task not in TASKS
            or order.task not in (None, found.task)
            or order.kind not in (None, found.kind)
            or abs(found.fps - size.fps) > 0.01
            or found.sample_rate not in (0, rate)
            or found.num_frames > seconds * size.fps + 1
            or found.num_samples > seconds * rate + 1
        ):
            raise ValueError("an answer must be one to its order and within the limits.")

    def _too_slow(self) -> RequestError:
        return _bad(
            f"input_reference: takes longer than {self._limits.seconds:g} s to be read. Shrink or cut it.",
            "input_reference_too_slow",
        )


async def _receive_bytes(wire: socket.socket, count: int) -> bytearray:
    """Exactly so many bytes.

    Raises:
        EOFError: there are fewer.
    """
    loop, content, received = asyncio.get_running_loop(), bytearray(count), 0
    while received < count:
        more = await loop.sock_recv_into(wire, memoryview(content)[received:])
        if not more:
            raise EOFError
        received += more
    return content


def _order(task: str | None, has_text: bool, kind: str | None) -> Order:
    if kind is not None and kind not in get_args(Kind):
        raise RequestError(
            f"an input_reference must be one of {', '.join(get_args(Kind))}, got {kind!r}.",
            code="invalid_input_reference",
            param="input_reference",
        )
    try:
        named = None if task is None else get_task(task).name
    except ConfigError as error:
        raise RequestError(str(error), code="invalid_value", param="task") from error
    return Order(task=named, has_text=has_text, kind=kind)  # type: ignore[arg-type]


def _bad(message: str, code: str = "invalid_input_reference") -> RequestError:
    return RequestError(message, code=code, param="input_reference", status=_STATUS.get(code, 400))
