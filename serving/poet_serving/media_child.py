"""The processes in which a stranger's file is opened: a template, which never sees one, and a fork of it for each file.

The template has imported what reading needs, so a fork begins at once; it has limits of its own, ends with its file,
and can be killed. What it answers are a short header and bare bytes of arrays: whoever takes over a fork by a crafted
file sends nothing that the server would execute. A fork runs as the server's user: this is a fence against files that
crash, hang or fill the memory, not against programs, for which a container is needed.

It knows files, limits and the wire; it does not know requests or asyncio (`poet_serving.media_reader`). Importing it
imports no torch. Dimension letters: N frames, H height, W width, S samples.
"""

from __future__ import annotations

import ctypes
import dataclasses
import gc
import itertools
import json
import math
import os
import resource
import signal
import socket
import struct
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Final, Literal, TypeAlias, get_args

import numpy as np

from poet.bundle import Bundle
from poet.errors import ConfigError, MediaError
from poet.generation.given import GivenFiles
from poet.media import DEFAULT_MAX_DURATION, Clip, probe
from poet.media.opening import open_media
from poet.tasks import get_task

__all__ = ["Found", "Kind", "Order", "ReadingLimits", "Refused", "pack_header", "read_reference", "unpack_header"]

Kind: TypeAlias = Literal["image", "video", "audio"]
Code: TypeAlias = Literal["invalid_input_reference", "input_reference_too_large", "invalid_value"]

END: Final = b"end"
"""What ends a fork; answered by how it ended, a signal as a negative number. The template says 0 once it is ready."""

MAX_MESSAGE: Final = 4096  # bytes between the server and the template
MAX_HEADER: Final = 16384  # bytes
LENGTH: Final = struct.Struct(">I")  # of a header, before it
_MAX_TEXT: Final = 1000
_MAX_OPEN_FILES: Final = 32
_SET_PDEATHSIG: Final = 1  # of prctl
_DURATION_SLACK: Final = 0.5  # seconds by which headers round and pad


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReadingLimits:
    """What one read may take.

    Attributes:
        seconds: from its beginning to its answer; as much of the processor too.
        memory_bytes: of address space, beyond what the imported code takes.
        max_duration: seconds of what is read; of a picture, or where a task reads no more than a clip's length, it does
            not matter how long the file is.
        max_file_bytes: of the file.

    Raises:
        ConfigError: a value out of its range.
    """

    seconds: float = 20.0
    memory_bytes: int = 2 << 30
    max_duration: float = 120.0
    max_file_bytes: int = 256 << 20

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if not (math.isfinite(value) and value > 0):
                raise ConfigError(f"{field.name} must be above 0, got {value}.")
        if self.max_duration > DEFAULT_MAX_DURATION:
            raise ConfigError(
                f"max_duration must be at most {DEFAULT_MAX_DURATION:g} seconds, more is never read; "
                f"got {self.max_duration:g}."
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Order:
    """What the template is asked for; the file and the wire for the answer go with it.

    Attributes:
        task: a name in `poet.tasks.TASKS`; None: found from the file's kind.
        has_text: whether there is a text too.
        kind: what the file must be; None takes every kind.
    """

    task: str | None
    has_text: bool
    kind: Kind | None

    def pack(self) -> bytes:
        """At most `MAX_MESSAGE` bytes, and never `END`."""
        return json.dumps(dataclasses.asdict(self)).encode()

    @classmethod
    def unpack(cls, message: bytes) -> Order:
        """The inverse of `pack`. The server writes orders, so they are not looked at closely."""
        return cls(**json.loads(message))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Found:
    """What a file became. Its bytes follow: (N, H, W, 3) uint8, then (S,) float32; H and W are the bundle's.

    Attributes:
        kind: what the file is.
        task: the one that it was read for.
        fps: frames per second.
        num_frames: N; 0 for sound alone.
        sample_rate: samples per second; 0 where a file with pictures has no sound.
        num_samples: S; 0 for silent pictures.
    """

    kind: Kind
    task: str
    fps: float
    num_frames: int
    sample_rate: int
    num_samples: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Refused:
    """Why a file was not read.

    Attributes:
        code: for a program.
        message: for a person.
    """

    code: Code
    message: str


class _TooLargeError(MediaError):
    """A file beyond a limit."""


def pack_header(header: Found | Refused) -> bytes:
    """A header's length and JSON."""
    content = json.dumps(dataclasses.asdict(header)).encode()
    return LENGTH.pack(len(content)) + content


def unpack_header(content: bytes) -> Found | Refused:
    """The inverse of `pack_header`, behind the length. Trusts nothing.

    Args:
        content: at most `MAX_HEADER` bytes from a fork that may be in a stranger's hands.

    Raises:
        ValueError: it is no header; types, names and signs are checked, sizes are not.
    """
    try:
        values = json.loads(content)
    except RecursionError as error:
        raise ValueError("the header is nested too deeply.") from error
    kinds = Refused if isinstance(values, dict) and "code" in values else Found
    fields = {field.name for field in dataclasses.fields(kinds)}
    if not isinstance(values, dict) or values.keys() != fields:
        raise ValueError("the header must have the keys of a header.")
    texts: dict[str, tuple[str, ...]] = {"kind": get_args(Kind), "code": get_args(Code), "task": (), "message": ()}
    for name, value in values.items():
        if name in texts:
            if not isinstance(value, str) or (texts[name] and value not in texts[name]):
                raise ValueError(f"the header's {name} must be one that there is.")
        elif name == "fps":
            if not isinstance(value, float) or not math.isfinite(value):
                raise ValueError("the header's fps must be a finite number.")
        elif not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise ValueError(f"the header's {name} must be a whole number of at least 0.")
    if kinds is Refused:
        message = "".join(letter if letter.isprintable() else " " for letter in values["message"][:_MAX_TEXT])
        return Refused(code=values["code"], message=message)
    return Found(**values)


def read_reference(path: Path, bundle: Bundle, limits: ReadingLimits, order: Order) -> tuple[Found, Clip]:
    """Find out what a file is and read it as `GivenFiles.read` does.

    Args:
        path: a local file.
        bundle: gives size and rates.
        limits: of which the duration counts here.
        order: what it is read for.

    Raises:
        MediaError: it cannot be read, is too long, or is of another kind than was asked for.
        ConfigError: the task does not read such a file, or needs something else.
    """
    kind = _kind_of(path)
    if order.kind is not None and order.kind != kind:
        raise MediaError(f"{path}: must be {_named(order.kind)}, its content is {_named(kind)}. Send another file.")
    files = GivenFiles(**{kind: path})
    name = order.task or files.guess_task(has_text=order.has_text, default=bundle.generation_config.task)
    task = get_task(name)
    reads_all = kind == "audio" or (kind == "video" and task.conditioning != "whole")
    if reads_all and probe(path).duration > limits.max_duration + _DURATION_SLACK:
        raise _too_long(path, limits)
    clip = files.read(bundle, task, has_text=order.has_text)
    assert clip is not None
    if reads_all and clip.duration > limits.max_duration + _DURATION_SLACK:  # no header said so
        raise _too_long(path, limits)
    found = Found(
        kind=kind,
        task=name,
        fps=float(clip.fps),
        num_frames=0 if clip.frames is None else len(clip.frames),
        sample_rate=clip.sample_rate,
        num_samples=0 if clip.samples is None else len(clip.samples),
    )
    return found, clip


def _too_long(path: Path, limits: ReadingLimits) -> MediaError:
    return _TooLargeError(f"{path}: lasts longer than {limits.max_duration:g} s. Cut it and send a part of it.")


def _named(kind: Kind) -> str:
    return {"image": "a still picture", "video": "a clip", "audio": "sound alone"}[kind]


def _kind_of(path: Path) -> Kind:
    """What a file is by its content: one silent picture is a still one, whatever format holds it."""
    with open_media(path) as media:
        if media.video is None:
            if media.audio is None:
                raise MediaError(f"{path}: holds neither pictures nor sound that can be decoded. Send a PNG or MP4.")
            return "audio"
        if media.is_image:
            return "image"
        if media.audio is not None:
            return "video"
        packets = (packet for packet in media.container.demux(media.video) if packet.size)
        return "video" if len(list(itertools.islice(packets, 2))) == 2 else "image"


def _answer(order: Order, file: int, bundle: Bundle, limits: ReadingLimits) -> tuple[Found | Refused, Clip | None]:
    path = Path(f"/proc/self/fd/{file}")
    try:
        return read_reference(path, bundle, limits, order)
    except ConfigError as error:
        return Refused(code="invalid_value", message=str(error)), None
    except (MediaError, MemoryError) as error:
        if isinstance(error, MemoryError) or isinstance(error.__cause__, MemoryError):
            message = f"input_reference: needs more than {limits.memory_bytes >> 20} MiB of memory. Shrink or cut it."
            return Refused(code="input_reference_too_large", message=message), None
        code: Code = "invalid_input_reference"
        if isinstance(error, _TooLargeError):
            code = "input_reference_too_large"
        return Refused(code=code, message=str(error).replace(str(path), "input_reference")), None


def _send(wire: socket.socket, header: Found | Refused, clip: Clip | None) -> None:
    with wire, suppress(BrokenPipeError, ConnectionResetError):  # nobody waits for it any more
        wire.sendall(pack_header(header))
        for array in () if clip is None else (clip.frames, clip.samples):
            if array is not None:
                wire.sendall(np.ascontiguousarray(array).data.cast("B"))


def _fork_for_each(control: socket.socket) -> tuple[Order, int, socket.socket] | None:
    """Read the server's messages until it ends, and fork for each order.

    Returns:
        In a fork: its order, the file, and where the answer goes. In the template, at the end of the wire: None.
    """
    child: int | None = None
    control.send(b"0")
    while True:
        message, received, _, _ = socket.recv_fds(control, MAX_MESSAGE, 2)
        status: int | None = None
        if child is not None:  # it has had its time; until it is waited for, its id is its own
            os.kill(child, signal.SIGKILL)
            status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            child = None
        if not message:
            return None
        if message == END:
            control.send(json.dumps(status).encode())
            continue
        file, wire = received
        template = os.getpid()
        with suppress(OSError):  # no more processes: the server sees the wire closed, and that there was no child
            child = os.fork()
        if child == 0:
            control.close()
            _end_with(template)
            return Order.unpack(message), file, socket.socket(fileno=wire)
        os.close(file)
        os.close(wire)


def _end_with(parent: int) -> None:
    """Have the kernel kill this process when its parent ends."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it had ended before
        os._exit(1)


def _limit(limits: ReadingLimits) -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    with suppress(OSError):  # of all processes, the kernel shall end this one first
        Path("/proc/self/oom_score_adj").write_text("1000")
    for kind, value in (
        (resource.RLIMIT_AS, pages * resource.getpagesize() + int(limits.memory_bytes)),
        (resource.RLIMIT_CPU, math.ceil(limits.seconds) + 1),  # a second before it, a signal says why
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NOFILE, _MAX_OPEN_FILES),
    ):
        _, hard = resource.getrlimit(kind)
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (value - 1 if kind == resource.RLIMIT_CPU else value, value))


def main(arguments: Sequence[str]) -> None:
    """Be the template, and in its forks a reader.

    Args:
        arguments: the number of the open socket to the server, the server's process id, the bundle's directory, and
            `ReadingLimits` as JSON.
    """
    control, parent, directory, values = arguments
    _end_with(int(parent))
    limits: dict[str, Any] = json.loads(values)
    bundle = Bundle.open(directory, require_model=False)
    gc.freeze()  # so that a fork's collections do not copy the template's pages
    forked = _fork_for_each(socket.socket(fileno=int(control)))
    if forked is not None:
        order, file, wire = forked
        _limit(ReadingLimits(**limits))
        _send(wire, *_answer(order, file, bundle, ReadingLimits(**limits)))


if __name__ == "__main__":
    main(sys.argv[1:])
