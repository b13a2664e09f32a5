"""Uploads are read in processes that may be killed at any moment, and that nobody has to trust."""

import asyncio
import contextlib
import dataclasses
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from poet.bundle import Bundle, default_bundle
from poet.errors import CheckpointError, ConfigError, MediaError, PoetError
from poet.generation.given import GivenFiles
from poet.media import Clip, write_clip
from poet.tasks import get_task
from poet_serving.media_child import LENGTH, MAX_HEADER, Found, Refused, pack_header, unpack_header
from poet_serving.media_reader import MediaReader, ReadingLimits, ReadReference
from poet_serving.schema import RequestError

DATA = Path(__file__).parent.parent / "data"
PHOTO = DATA / "big_buck_bunny_353x199.jpg"
FOOTAGE = DATA / "big_buck_bunny_4s.mp4"
BUNDLE = default_bundle()
Malformed = Callable[[int, int], Iterator[tuple[str, bytes]]]


@pytest.fixture(scope="module")
def runner() -> Iterator[asyncio.Runner]:
    with asyncio.Runner() as runner:
        yield runner


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("scratch")


@pytest.fixture(scope="module")
def shared(runner: asyncio.Runner, scratch: Path) -> Iterator[MediaReader]:
    reader = MediaReader(BUNDLE, scratch)
    yield reader
    reader.close()


@pytest.fixture
def read(
    runner: asyncio.Runner, scratch: Path, shared: MediaReader
) -> Iterator[Callable[[bytes | Path], ReadReference]]:
    """A read by the shared reader, which has a good one to do after each test, and leaves nothing behind."""

    def read(content: bytes | Path, reader: MediaReader = shared, **options: Any) -> ReadReference:
        return runner.run(reader.read(content, **{"task": None, "has_text": True} | options))

    yield read
    assert read(PHOTO).kind == "image"
    assert list(scratch.iterdir()) == []


@pytest.fixture
def own(runner: asyncio.Runner, scratch: Path) -> Iterator[Callable[..., MediaReader]]:
    """Readers of a test's own, with limits."""
    made: list[MediaReader] = []

    def own(num_workers: int = 1, **limits: Any) -> MediaReader:
        made.append(MediaReader(BUNDLE, scratch, ReadingLimits(**limits), num_workers))
        return made[-1]

    yield own
    for reader in made:
        reader.close()
    assert list(scratch.iterdir()) == []


def children(pid: int) -> list[int]:
    """Processes whose parent this is, without those that have ended."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, parent = stat.read_text().rpartition(")")[2].split()[:2]
            if int(parent) == pid and state != "Z":
                found.append(int(stat.parent.name))
    return found


def template_of(reader: MediaReader) -> int:
    process = reader._workers[0]._process
    assert process is not None
    return process.pid


def is_idle(reader: MediaReader) -> bool:
    """Whether the template waits for an order, and has done all that it was told."""
    process = reader._workers[0]._process
    if process is None or children(process.pid):
        return process is None
    return state_of(process.pid) == "S"


async def fork_of(reader: MediaReader) -> int:
    """The process that reads next, as soon as there is one."""
    for _ in range(2000):
        worker = reader._workers[0]
        if worker._process is not None and (found := children(worker._process.pid)):
            return found[0]
        await asyncio.sleep(0.002)
    raise AssertionError("no process was seen that reads")


def state_of(pid: int) -> str:
    """As in ps: S waits, T is stopped, Z has ended; "" for none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""


def is_gone(pid: int) -> bool:
    return state_of(pid) in ("", "Z")


def stopped_child(pid: int) -> int:
    """A child of a process that starts one after the other, caught and stopped."""
    until = time.monotonic() + 60
    while time.monotonic() < until:
        for child in children(pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGSTOP)
                wait_until(lambda: state_of(child) in ("T", "", "Z"))  # noqa: B023 - called at once
            if state_of(child) == "T":
                return child
        time.sleep(0.001)
    raise AssertionError("it never had a child that could be stopped")


def wait_until(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "it never came true"
        time.sleep(0.01)


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sound that takes a good part of a second to read: 100 MB of silence, which take no room on the disk."""
    path = tmp_path_factory.mktemp("slow") / "silence.wav"
    form = b"\x01\x00\x02\x00" + (192_000).to_bytes(4, "little") + (768_000).to_bytes(4, "little") + b"\x04\x00\x10\x00"
    size = 118 * 768_000
    head = b"WAVEfmt " + (16).to_bytes(4, "little") + form + b"data" + size.to_bytes(4, "little")
    path.write_bytes(b"RIFF" + (size + 36).to_bytes(4, "little") + head)
    os.truncate(path, 44 + size)
    return path


def written(folder: Path, name: str) -> Path:
    rng = np.random.default_rng(3)
    frames = rng.integers(0, 256, (1 if name.startswith("still") else 13, 34, 46, 3), dtype=np.uint8)
    samples = (np.sin(np.arange(23_000) / 7) / 2).astype(np.float32)
    sounds = name.endswith((".wav", ".mp4")) and "silent" not in name
    clip = Clip(None if name.endswith(".wav") else frames, 8.0, samples if sounds else None, 16000)
    write_clip(clip, folder / name)
    return folder / name


def same(found: Clip, expected: Clip | None) -> bool:
    assert expected is not None
    return all(
        np.array_equal(getattr(found, name), getattr(expected, name))
        if isinstance(getattr(expected, name), np.ndarray)
        else getattr(found, name) == getattr(expected, name)
        for name in ("frames", "fps", "samples", "sample_rate")
    )


@pytest.mark.parametrize(
    ("name", "kind", "task"),
    [
        ("still.png", "image", "image_to_video"),
        ("still.gif", "image", "image_to_video"),
        ("moving.gif", "video", "video_continuation"),
        ("silent.mp4", "video", "video_continuation"),
        ("clip.mp4", "video", "video_continuation"),
        ("sound.wav", "audio", "audio_to_video"),
    ],
)
def test_a_file_is_what_its_content_says_and_becomes_what_the_server_itself_would_read(
    read: Callable[..., ReadReference], tmp_path: Path, name: str, kind: str, task: str
) -> None:
    bundle, path = Bundle.open(BUNDLE), written(tmp_path, name)
    misnamed = path.rename(tmp_path / "upload.jpg.exe")
    expected = GivenFiles(**{kind: misnamed}).read(bundle, get_task(task), has_text=False)
    for content in (misnamed, misnamed.read_bytes()):
        found = read(content, has_text=False)
        assert (found.kind, found.task) == (kind, task)
        assert same(found.clip, expected)
    assert same(read(misnamed, kind=kind).clip, expected)


@pytest.mark.parametrize("task", ["captioning", "inpainting", "audio_video_continuation", "video_to_audio"])
def test_a_named_task_decides_how_much_is_read(read: Callable[..., ReadReference], task: str) -> None:
    found = read(FOOTAGE.read_bytes(), task=task, has_text=task != "captioning")
    expected = GivenFiles(video=FOOTAGE).read(Bundle.open(BUNDLE), get_task(task), has_text=task != "captioning")
    assert found.task == task
    assert same(found.clip, expected)


def test_a_file_of_another_kind_or_for_another_task_is_refused(
    read: Callable[..., ReadReference], tmp_path: Path
) -> None:
    for path, kind, words in (
        (PHOTO, "video", "must be a clip, its content is a still picture"),
        (FOOTAGE, "image", "must be a still picture, its content is a clip"),
        (FOOTAGE, "audio", "must be sound alone, its content is a clip"),
        (written(tmp_path, "sound.wav"), "video", "must be a clip, its content is sound alone"),
        (PHOTO, "hologram", "one of image, video, audio"),
    ):
        with pytest.raises(RequestError, match=words) as caught:
            read(path, kind=kind)
        assert (caught.value.code, caught.value.param) == ("invalid_input_reference", "input_reference")
        assert caught.value.status == 400
        assert "/proc" not in str(caught.value)
    for options, words in (
        ({"task": "text_to_image"}, "takes no video"),
        ({"task": "stylisation", "has_text": False}, "needs text"),
        ({"task": "image_to_vidoe"}, "image_to_video"),
    ):
        with pytest.raises(RequestError, match=words) as caught:
            read(PHOTO, **options)
        assert caught.value.code == "invalid_value"


def test_a_file_that_is_not_there_is_the_servers_own_trouble(
    read: Callable[..., ReadReference], tmp_path: Path
) -> None:
    with pytest.raises(MediaError, match=r"gone\.png"):
        read(tmp_path / "gone.png")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(RequestError, match="pipe"):
        read(tmp_path / "pipe")


def test_malformed_uploads_are_read_or_refused_in_time_and_leave_nothing(
    read: Callable[..., ReadReference], own: Callable[..., MediaReader], scratch: Path, malformed_uploads: Malformed
) -> None:
    seconds, outcomes = 1.0, set[str]()
    reader = own(seconds=seconds)
    read(PHOTO, reader)
    template = template_of(reader)
    for name, content in malformed_uploads(184, 11):
        begun = time.monotonic()
        try:
            found = read(content, reader)
            outcomes.add(found.kind)
            assert found.clip.duration < 122, name
        except RequestError as error:
            outcomes.add(error.code)
            assert error.param == "input_reference", name
            assert "/proc" not in str(error), name
            assert str(scratch) not in str(error), name
        assert time.monotonic() - begun < seconds + 3, name
        assert list(scratch.iterdir()) == [], name
    assert outcomes >= {"image", "video", "audio", "invalid_input_reference", "input_reference_too_large"}
    assert template_of(reader) == template  # no file ended it
    wait_until(lambda: children(template) == [])


def test_malformed_uploads_are_the_same_for_the_same_seed(malformed_uploads: Malformed) -> None:
    first, second, other = (dict(malformed_uploads(13, seed)) for seed in (5, 5, 6))
    assert first == second
    assert first != other


def test_files_beyond_a_limit_say_so(
    read: Callable[..., ReadReference], own: Callable[..., MediaReader], tmp_path: Path
) -> None:
    write_clip(Clip(np.zeros((1, 4000, 4000, 3), np.uint8), 1.0, None, 0), tmp_path / "large.png")
    large = (tmp_path / "large.png").read_bytes()
    for name in ("long.wav", "long.webm"):
        write_clip(Clip(None, 0.0, np.zeros(64_000, np.float32), 16000), tmp_path / name)
    long = (tmp_path / "long.wav").read_bytes()
    duration = b"\x44\x89\x88"  # the element that says how long it is
    silent_about_it = (tmp_path / "long.webm").read_bytes()
    assert duration in silent_about_it
    silent_about_it = silent_about_it.replace(duration, b"\xec\x89\x00")
    narrow, brief, tiny = own(memory_bytes=40 << 20), own(max_duration=1.2), own(max_file_bytes=20_000)
    for reader, content, words in (
        (narrow, large, "40 MiB of memory"),
        (brief, long, "longer than 1.2 s"),
        (brief, silent_about_it, "longer than 1.2 s"),
        (tiny, FOOTAGE, "at most 20000 are read"),
        (tiny, FOOTAGE.read_bytes(), "at most 20000 are read"),
    ):
        with pytest.raises(RequestError, match=words) as caught:
            read(content, reader)
        assert (caught.value.code, caught.value.status) == ("input_reference_too_large", 413)
    assert read(large).kind == "image"
    assert read(long).kind == "audio"
    assert read(silent_about_it).clip.duration == pytest.approx(4.0, abs=0.1)
    # What is not read does not count.
    assert read(FOOTAGE, brief, task="inpainting").kind == "video"
    assert read(PHOTO, narrow).kind == "image"


def test_limits_out_of_range_are_refused(tmp_path: Path) -> None:
    for values in ({"seconds": 0}, {"memory_bytes": -1}, {"max_duration": float("nan")}, {"max_duration": 601}):
        with pytest.raises(ConfigError, match=next(iter(values))):
            ReadingLimits(**values)
    with pytest.raises(ConfigError, match="num_workers"):
        MediaReader(BUNDLE, tmp_path, num_workers=0)
    with pytest.raises(CheckpointError):
        MediaReader(tmp_path / "none", tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(MediaError, match="cannot hold uploads"):
        MediaReader(BUNDLE, tmp_path / "file")


async def during(
    reader: MediaReader, path: Path, what: Callable[[int, asyncio.Task[ReadReference]], None]
) -> ReadReference:
    """A read during which something happens to the process that reads."""
    wait_until(lambda: is_idle(reader))  # the process of the read before may not have ended yet
    task = asyncio.create_task(reader.read(path, task=None, has_text=True))
    what(await fork_of(reader), task)
    return await task


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGSEGV, signal.SIGABRT])
def test_a_reader_that_dies_is_an_error_of_its_file_alone(
    read: Callable[..., ReadReference], runner: asyncio.Runner, shared: MediaReader, slow: Path, end: signal.Signals
) -> None:
    template = template_of(shared)
    with pytest.raises(RequestError, match="ends the process that reads it") as caught:
        runner.run(during(shared, slow, lambda pid, _: os.kill(pid, end)))
    assert caught.value.code == "invalid_input_reference"
    assert read(PHOTO).kind == "image"
    assert template_of(shared) == template


def test_a_reader_that_hangs_is_killed_when_its_time_is_over(
    read: Callable[..., ReadReference], runner: asyncio.Runner, own: Callable[..., MediaReader], slow: Path
) -> None:
    reader, forks = own(seconds=1.3), list[int]()

    def hang(pid: int, _: Any) -> None:
        os.kill(pid, signal.SIGSTOP)
        forks.append(pid)

    read(PHOTO, reader)
    template, begun = template_of(reader), time.monotonic()
    with pytest.raises(RequestError, match=r"longer than 1\.3 s") as caught:
        runner.run(during(reader, slow, hang))
    assert (caught.value.code, caught.value.status) == ("input_reference_too_slow", 400)
    assert 1.2 < time.monotonic() - begun < 5
    assert is_gone(forks[0])
    assert read(PHOTO, reader).kind == "image"
    assert template_of(reader) == template


def test_what_hangs_or_dies_beyond_a_file_is_started_anew(
    read: Callable[..., ReadReference],
    runner: asyncio.Runner,
    own: Callable[..., MediaReader],
    slow: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("poet_serving.media_reader._END_SECONDS", 0.5)
    reader = own(seconds=2.0)
    read(PHOTO, reader)
    first = template_of(reader)
    wait_until(lambda: is_idle(reader))
    os.kill(first, signal.SIGSTOP)
    with pytest.raises(RequestError, match="longer than 2 s"):
        read(PHOTO, reader)
    assert is_gone(first)
    assert read(PHOTO, reader).kind == "image"
    with pytest.raises(PoetError, match="Try again"):
        runner.run(during(reader, slow, lambda pid, _: os.kill(template_of(reader), signal.SIGKILL)))
    assert read(PHOTO, reader).kind == "image"
    os.kill(first := template_of(reader), signal.SIGKILL)  # while nobody reads
    wait_until(lambda: is_gone(first))
    assert read(PHOTO, reader).kind == "image"


def test_a_cancelled_read_ends_at_once_and_the_next_one_works(
    read: Callable[..., ReadReference], runner: asyncio.Runner, shared: MediaReader, slow: Path
) -> None:
    template, forks = template_of(shared), list[int]()

    def cancel(pid: int, task: asyncio.Task[ReadReference]) -> None:
        os.kill(pid, signal.SIGSTOP)
        forks.append(pid)
        task.cancel()

    with pytest.raises(asyncio.CancelledError):
        runner.run(during(shared, slow, cancel))
    wait_until(lambda: is_gone(forks[0]), 3)
    assert read(PHOTO).kind == "image"
    assert template_of(shared) == template

    async def cancel_one_that_waits() -> ReadReference:
        first = asyncio.create_task(shared.read(FOOTAGE, task=None, has_text=True))
        second = asyncio.create_task(shared.read(PHOTO, task=None, has_text=True))
        await asyncio.sleep(0)
        second.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await second
        return await first

    assert runner.run(cancel_one_that_waits()).kind == "video"


def test_reads_that_come_together_wait_for_a_worker_and_are_not_mixed_up(
    read: Callable[..., ReadReference], runner: asyncio.Runner, own: Callable[..., MediaReader], tmp_path: Path
) -> None:
    files = [PHOTO, FOOTAGE, written(tmp_path, "sound.wav"), written(tmp_path, "moving.gif")] * 3
    alone = [read(path) for path in files[:4]] * 3
    reader, most = own(num_workers=2), 0

    async def count() -> None:
        nonlocal most
        while True:
            forks = [len(children(w._process.pid)) for w in reader._workers if w._process is not None]
            most = max(most, *forks)
            await asyncio.sleep(0.01)

    async def together() -> list[ReadReference]:
        counting = asyncio.create_task(count())
        waiting: list[Awaitable[ReadReference]] = [reader.read(f, task=None, has_text=True) for f in files]
        found = await asyncio.gather(*waiting)
        counting.cancel()
        return found

    for found, expected in zip(runner.run(together()), alone, strict=True):
        assert found.kind == expected.kind
        assert same(found.clip, expected.clip)
    assert most == 1  # in each worker


def test_a_closed_reader_ends_what_it_does_and_reads_no_more(
    runner: asyncio.Runner, own: Callable[..., MediaReader], slow: Path
) -> None:
    reader = own()
    template = template_of(reader)

    async def close_in_the_middle() -> list[Any]:
        waits = asyncio.create_task(reader.read(PHOTO, task=None, has_text=True))
        reads = asyncio.create_task(during(reader, slow, lambda *_: reader.close()))
        waits.cancel()
        also = asyncio.create_task(reader.read(PHOTO, task=None, has_text=True))
        return await asyncio.wait_for(asyncio.gather(reads, also, return_exceptions=True), 10)

    failures = runner.run(close_in_the_middle())
    assert all(isinstance(failure, PoetError) for failure in failures)
    wait_until(lambda: is_gone(template))
    with pytest.raises(PoetError, match="closed"):
        runner.run(reader.read(PHOTO, task=None, has_text=True))
    reader.close()


def test_the_processes_hold_little_and_may_do_little(
    read: Callable[..., ReadReference],
    runner: asyncio.Runner,
    own: Callable[..., MediaReader],
    slow: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("POET_SECRET", "s3cret")
    reader = own(memory_bytes=700 << 20, seconds=17)
    seen: dict[str, str] = {}

    def look(pid: int, task: asyncio.Task[ReadReference]) -> None:
        wait_until(lambda: "700" not in (text := Path(f"/proc/{pid}/limits").read_text()) and " 32 " in text)
        seen.update({name: Path(f"/proc/{pid}/{name}").read_text() for name in ("limits", "maps", "environ")})
        os.kill(pid, signal.SIGSTOP)
        wait_until(lambda: state_of(pid) == "T")
        seen["open"] = " ".join(str(file.readlink()) for file in Path(f"/proc/{pid}/fd").iterdir())
        task.cancel()

    read(PHOTO, reader)
    with pytest.raises(asyncio.CancelledError):
        runner.run(during(reader, slow, look))
    assert "libavcodec" in seen["maps"]
    assert not [name for name in ("libtorch", "vllm", "transformers") if name in seen["maps"]]
    assert "PYTHONPATH" in seen["environ"]
    assert "s3cret" not in seen["environ"]
    limits = {line[:26].strip(): line[26:].split()[:2] for line in seen["limits"].splitlines()}
    assert limits["Max cpu time"] == ["17", "18"]
    assert limits["Max file size"] == ["0", "0"]
    assert limits["Max core file size"] == ["0", "0"]
    assert limits["Max open files"] == ["32", "32"]
    assert 700 << 20 < int(limits["Max address space"][1]) < 1500 << 20
    assert seen["open"].count("socket:") == 1  # where the answer goes; not that of the template


def test_the_processes_import_neither_torch_nor_vllm() -> None:
    code = "import sys, poet_serving.media_child; print(*{'torch', 'vllm', 'transformers', 'av'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["av"]


PARENT = """
import asyncio, sys, types
from pathlib import Path
# Nothing here is refused, and what it would import, torch among it, takes longer than all else.
sys.modules["poet_serving.schema"] = types.SimpleNamespace(RequestError=ValueError)
from poet_serving.media_reader import MediaReader
reader = MediaReader(Path(sys.argv[1]), Path(sys.argv[2]))
async def main():
    await reader.read(Path(sys.argv[3]), task=None, has_text=True)
    print("ready", flush=True)
    content = Path(sys.argv[4]).read_bytes()
    while True:
        await reader.read(content, task=None, has_text=True)
asyncio.run(main())
"""


@pytest.mark.parametrize("all_hang", [False, True])
def test_no_process_outlives_a_server_that_was_killed(tmp_path: Path, slow: Path, all_hang: bool) -> None:
    arguments = [BUNDLE, tmp_path / "scratch", PHOTO, slow]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}  # the same modules as here
    command = [sys.executable, "-c", PARENT, *map(str, arguments)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == b"ready\n"
        try:
            (template,) = children(parent.pid)
            fork = stopped_child(template)
            if all_hang:
                os.kill(template, signal.SIGSTOP)  # it can notice nothing by itself
            assert not is_gone(template)
        finally:
            parent.kill()
            parent.wait()
    wait_until(lambda: is_gone(template) and is_gone(fork), 5)
    assert list((tmp_path / "scratch").iterdir()) == []


def test_a_template_that_cannot_start_is_the_servers_own_trouble(
    runner: asyncio.Runner, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(sys, "executable", "/nowhere/python")
        with pytest.raises(PoetError, match="can be started"):
            MediaReader(BUNDLE, scratch)
        patch.setattr(sys, "executable", "/bin/false")
        reader = MediaReader(BUNDLE, scratch)
        with pytest.raises(PoetError, match="standard error"):
            runner.run(reader.read(PHOTO, task=None, has_text=True))
    reader.close()


# A fork in a stranger's hands


FOUND = Found(kind="image", task="image_to_video", fps=8.0, num_frames=1, sample_rate=16000, num_samples=0)

TAKEN_OVER = """
import sys, time
from poet_serving import media_child
def send(wire, header, clip):
    wire.sendall(answer)
    time.sleep(60)
def answer_what_was_sent(order, file, bundle, limits):
    global answer
    answer = open(f"/proc/self/fd/{file}", "rb").read()
    return None, None
media_child._send, media_child._answer = send, answer_what_was_sent
media_child.main(sys.argv[5:])
"""


@pytest.fixture(scope="module")
def taken_over(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MediaReader]:
    """A reader whose forks answer just what they are sent to read."""
    folder = tmp_path_factory.mktemp("taken")
    (folder / "child.py").write_text(TAKEN_OVER)
    (folder / "python").write_text(f'#!/bin/sh\nexec {sys.executable} {folder / "child.py"} . "$@"\n')
    (folder / "python").chmod(0o755)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "executable", str(folder / "python"))
        reader = MediaReader(BUNDLE, folder / "scratch", ReadingLimits(seconds=2.5))
    yield reader
    reader.close()


def test_what_a_stranger_would_answer_is_not_believed(
    read: Callable[..., ReadReference], taken_over: MediaReader, tmp_path: Path
) -> None:
    size = Bundle.open(BUNDLE).generation_config
    pixels = bytes(range(256)) * (size.height * size.width * 3 // 256)
    found = dataclasses.replace(FOUND, fps=float(size.fps))
    good = pack_header(found) + pixels
    assert read(good, taken_over).clip.frames.tobytes() == pixels  # type: ignore[union-attr]
    refused = pack_header(Refused(code="input_reference_too_large", message="a\x1b[31m\nb" + "c" * 5000))
    with pytest.raises(RequestError, match=r"^a \[31m bc+$") as caught:
        read(refused, taken_over)
    assert (caught.value.status, len(str(caught.value))) == (413, 1000)

    class Bomb:
        def __reduce__(self) -> Any:
            return Path.touch, (tmp_path / "owned",)

    bomb, nan = pickle.dumps(Bomb()), np.full(7, np.nan, np.float32).tobytes()
    sound = {"kind": "audio", "task": "audio_to_video", "num_frames": 0, "sample_rate": 16000, "num_samples": 7}
    for nonsense in (
        bomb,
        LENGTH.pack(len(bomb)) + bomb,
        LENGTH.pack(MAX_HEADER + 1) + bytes(MAX_HEADER + 1),
        LENGTH.pack(0),
        LENGTH.pack(MAX_HEADER) + b"[" * MAX_HEADER,
        pack_header(dataclasses.replace(found, num_frames=10**12)),
        pack_header(dataclasses.replace(found, num_samples=10**12)),
        pack_header(dataclasses.replace(found, task="no_such")) + pixels,
        pack_header(dataclasses.replace(found, fps=1e-9)) + pixels,
        pack_header(dataclasses.replace(found, num_frames=0)),
        pack_header(dataclasses.replace(found, **sound)) + nan,
    ):
        with pytest.raises(RequestError, match="takes over its reader") as caught:
            read(nonsense, taken_over)
        assert caught.value.code == "invalid_input_reference"
    for option in ({"task": "captioning"}, {"kind": "video"}):
        with pytest.raises(RequestError, match="takes over its reader"):
            read(good, taken_over, **option)
    with pytest.raises(RequestError, match="takes longer"):  # and never sends the rest
        read(good[:-1], taken_over)
    assert not (tmp_path / "owned").exists()
    assert read(good + b"more than was asked for", taken_over).kind == "image"
    assert read(good, taken_over).clip.frames.tobytes() == pixels  # type: ignore[union-attr]


@pytest.mark.parametrize("header", [FOUND, Refused(code="invalid_value", message="because")], ids=["found", "refused"])
def test_headers_come_back_as_they_were_and_no_other_is_taken(header: Found | Refused) -> None:
    content = pack_header(header)[LENGTH.size :]
    assert unpack_header(content) == header
    for name in (field.name for field in dataclasses.fields(header)):
        for wrong in (None, -1, True, [], {}, "x" if name != "task" and name != "message" else 3, float("nan")):
            changed = dataclasses.replace(header, **{name: wrong})
            with pytest.raises(ValueError, match="header"):
                unpack_header(pack_header(changed)[LENGTH.size :])
    for nonsense in (
        b"",
        b"[]",
        b"7",
        b"null",
        b"{}",
        b'{"code": "invalid_value"}',
        b"\xff",
        content[:-1] + b', "a": 1}',
    ):
        with pytest.raises(ValueError, match=r"."):
            unpack_header(nonsense)
