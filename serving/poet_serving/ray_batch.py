"""`poet batch --ray`: the same batch over Ray Data, on many machines, each of which writes with an engine of its own.

The driver, which is this process, reads the lines and what they refer to, and alone writes results and media; machines
see requests and bytes. A machine answers a block of lines one by one and in their order, so that a block that is
written again elsewhere, because its machine was lost, goes on where it stood. Whatever Ray gives up on, the driver
finds unanswered and asks for again, in smaller blocks. What a line, a result and a directory of them are is
`poet_serving.batch`'s business.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import socket
import tempfile
import time
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from poet.bundle import Bundle, default_bundle
from poet.data.ray_cluster import connected, import_ray, listening, reason_behind
from poet.errors import CheckpointError, ConfigError, MediaError, PoetError
from poet.generation.engine import load_engine
from poet.generation.pipeline import GeneratedClip, Pipeline, PreparedClip
from poet.media import probe, write_clip
from poet.model.lora import Adapter, read_adapter
from poet_serving.batch import (
    MAX_LINE,
    BatchLine,
    BatchSummary,
    Book,
    look_through,
    prepare,
    read_lines,
    request_error,
    result_body,
)
from poet_serving.schema import RequestError, VideoBody

__all__ = ["BlockWriter", "EngineStart", "run_ray_batch"]

WINDOW_BYTES: Final = 256 * 2**20
"""Of requests and references that are handed to Ray at a time: they lie in its memory until they are answered."""

ATTEMPTS: Final = 3
"""Times that a line is asked for which is never answered: in a full block, in a small one, and alone."""

RETRIES: Final = 2
"""Times that Ray itself begins a block again whose machine or process was lost."""

# What a machine's processes are started with (poet.cli.main sets it for others). Ray itself sets OMP_NUM_THREADS to the
# cores that an engine takes, unless the cluster was started with another.
_ENVIRONMENT: Final = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0", "TORCH_CPP_LOG_LEVEL": "ERROR"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineStart:
    """What every machine starts.

    Attributes:
        engine: "vllm", "torch", ...
        bundle_dir: of the model, the same on every machine; None: the one that ships with Poet.
        weights_sha256: that the bundle there must have.
        upsampler_sha256: likewise.
        decodings: that the engine is started with.
        batch_size: clips that an engine writes at once.
        adapters: LoRA adapters, which every machine must have at the same paths.
    """

    engine: str
    bundle_dir: str | None
    weights_sha256: str
    upsampler_sha256: str
    decodings: tuple[str, ...]
    batch_size: int
    adapters: tuple[Adapter, ...] = ()

    def start(self) -> Pipeline:
        """Open the bundle of this machine and start the engine on it.

        Raises:
            CheckpointError: there is no such bundle here, or one of other weights.
            ConfigError: the engine cannot be started.
        """
        path = default_bundle() if self.bundle_dir is None else Path(self.bundle_dir)
        try:
            bundle = Bundle.open(path)
        except CheckpointError as error:
            raise CheckpointError(f"{error} Every machine must have the batch's bundle at the same path.") from error
        wanted = (self.weights_sha256, self.upsampler_sha256)
        found = (bundle.weights_sha256, bundle.upsampler_sha256)
        if found != wanted:
            told, here = (" and ".join(one[:12] or "none" for one in pair) for pair in (wanted, found))
            raise CheckpointError(
                f"the bundle {path} must have the batch's weights, {told} (sha256 of the model and the upsampler), it "
                f"has {here}. Copy the bundle to every machine, or install the same Poet there."
            )
        size_option = "max_num_seqs" if self.engine == "vllm" else "max_batch_size"
        options = {size_option: self.batch_size, "adapters": self._adapters_here(bundle)}
        engine = load_engine(self.engine, path, decodings=self.decodings, **options)
        return Pipeline(bundle, engine, adapters=self.adapters)

    def _adapters_here(self, bundle: Bundle) -> tuple[Adapter, ...]:
        """Those of this machine, once they are found to be the batch's."""
        for adapter in self.adapters:
            here = read_adapter(adapter.path, bundle.model_config, bundle.fingerprint, name=adapter.name)
            if here != adapter:
                raise CheckpointError(
                    f"the adapter {adapter.path} must be the batch's, {adapter.sha256[:12]} (sha256), it is "
                    f"{here.sha256[:12]}. Copy it to every machine."
                )
        return self.adapters


class BlockWriter:
    """One machine's engine, which Ray Data hands block after block of lines.

    Args:
        settings: what to start. An error is kept for the first block: an actor that fails to start, Ray starts again.
    """

    def __init__(self, settings: EngineStart) -> None:
        self._error: PoetError | None = None
        try:
            self._pipeline = settings.start()
        except PoetError as error:
            self._error = error

    def __call__(self, block: Any) -> Iterator[Any]:
        """Answer the lines of a block, in their order.

        Args:
            block: an Arrow table with the columns of `_Task.row`.

        Yields:
            An Arrow table of one row for every line, with the columns of `_Order.answer`. A row that has `fatal` is the
            last: nothing can be written here.
        """
        orders = [_Order(row) for row in block.to_pylist()]
        done: dict[int, Any] = {}
        place = 0
        try:
            if self._error is not None:
                raise self._error
            for finished, answer in self._as_finished(orders):
                done[finished] = answer
                while place in done:
                    yield done.pop(place)
                    place += 1
        except PoetError as error:
            yield orders[place].answer(500, {}, fatal=f"on the machine {socket.gethostname()}: {error}")

    def _as_finished(self, orders: Sequence[_Order]) -> Iterator[tuple[int, Any]]:
        """Answers and the places of their lines, many of which are written at once."""
        refused: list[tuple[int, Any]] = []
        places: list[int] = []

        def prepared() -> Iterator[PreparedClip]:
            for place, order in enumerate(orders):
                try:
                    clip = order.prepare(self._pipeline)
                except (ConfigError, MediaError, RequestError) as error:
                    known = request_error(error)
                    refused.append((place, order.answer(known.status, known.body)))
                    continue
                places.append(place)
                yield clip

        for index, made in self._pipeline.stream(prepared()):
            while refused:
                yield refused.pop()
            yield places[index], self._answer(orders[places[index]], made)
        yield from refused

    def _answer(self, order: _Order, made: GeneratedClip) -> Any:
        name = made.request.adapter or self._pipeline.bundle.name
        body, media = result_body(order.digest, made, name), None
        if made.clip is not None:
            with tempfile.TemporaryDirectory(prefix="poet-") as directory:
                file = Path(directory) / Path(body["file"]).name
                write_clip(made.clip, file, metadata=made.metadata)
                media = file.read_bytes()
        return order.answer(200, body, media)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Task:
    """A line as the driver knows it.

    Attributes:
        line: of the file.
        reference: content of the file that its input reference names by path.
    """

    line: BatchLine
    reference: bytes | None = None

    @classmethod
    def of(cls, line: BatchLine, base: Path) -> _Task:
        """Check what can be checked without a model, and read what only the driver sees.

        Raises:
            RequestError: the line is no request, or refers to too large a file.
            MediaError: the file that it refers to cannot be read.
        """
        if line.error is not None:
            raise line.error
        reference = VideoBody.parse(line.body).input_reference
        if reference is None or reference.path is None:
            return cls(line=line)
        path = base / reference.path
        probe(path)
        try:
            content = path.read_bytes() if path.stat().st_size <= MAX_LINE else None
        except OSError as error:
            raise MediaError(f"{path} cannot be read: {error.strerror}.") from error
        if content is None:
            raise RequestError(
                f"a file that is sent to another machine must have at most {MAX_LINE} bytes, {reference.path} has "
                "more. Cut it, or run the batch without --ray.",
                code="invalid_input_reference",
                param="input_reference",
            )
        return cls(line=line, reference=content)

    def row(self) -> dict[str, Any]:
        """What is sent. The request is JSON, as it may hold anything; a file goes by its bare name."""
        body = dict(self.line.body)
        if self.reference is not None:
            body["input_reference"] = {"path": Path(body["input_reference"]["path"]).name}
        request = {"number": self.line.number, "custom_id": self.line.custom_id, "body": body}
        return {"request": json.dumps([request, self.line.digest]), "reference": self.reference}


class _Order:
    """A line as a machine gets it.

    Args:
        row: from `_Task.row`.
    """

    def __init__(self, row: Mapping[str, Any]) -> None:
        request, self.digest = json.loads(row["request"])
        self.line, self.reference = BatchLine(**request), row["reference"]

    def prepare(self, pipeline: Pipeline) -> PreparedClip:
        """See `poet_serving.batch.prepare`."""
        if self.reference is None:
            return prepare(self.line, pipeline, Path())
        with tempfile.TemporaryDirectory(prefix="poet-") as directory:
            (Path(directory) / self.line.body["input_reference"]["path"]).write_bytes(self.reference)
            try:
                return prepare(self.line, pipeline, Path(directory))
            except MediaError as error:
                raise MediaError(str(error).replace(f"{directory}/", "")) from error

    def answer(self, status: int, body: Mapping[str, Any], media: bytes | None = None, fatal: str = "") -> Any:
        """An Arrow table of one row: in lists, numpy would cut the zeros off the end of a file."""
        import pyarrow

        row = {
            "number": self.line.number,
            "status": status,
            "body": json.dumps(body),
            "media": media,
            "node": _node(),
            "fatal": fatal,
        }
        kinds = (pyarrow.int64(), pyarrow.int64(), *[pyarrow.string(), pyarrow.large_binary()], *2 * [pyarrow.string()])
        return pyarrow.Table.from_pylist([row], pyarrow.schema(list(zip(row, kinds, strict=True))))


def run_ray_batch(
    jobs: Path,
    bundle: Bundle,
    output: Path,
    *,
    address: str,
    engine: str = "vllm",
    batch_size: int = 16,
    num_cpus: int | None = None,
    progress: Callable[[int, int, int], None] | None = None,
    adapters: Sequence[Adapter] = (),
) -> BatchSummary:
    """Carry out what has not been answered yet, on the machines of a Ray cluster.

    Args:
        jobs: a file of requests; paths of input references start from its directory, and are read here.
        bundle: the model; every machine must have it at the same path, or be the shipped one.
        output: directory of the results; made if missing.
        address: what `ray.init` takes: "auto", "local", "HOST:PORT". A connection that the caller has made is used as
            it is, and left open.
        engine: that every machine starts.
        batch_size: clips that an engine writes at once.
        num_cpus: cores that an engine takes; None: as many as the smallest machine has.
        progress: called with the lines answered, in all, of how many, and in this run.
        adapters: LoRA adapters that lines may name; every machine must have them at the same paths.

    Returns:
        What was done.

    Raises:
        ConfigError: there is no line, the directory holds results of other requests or of another model, Ray is not
            installed, its cluster cannot be reached, or a machine cannot start the engine.
        MediaError: the file cannot be read or the directory not be written.
        PoetError: lines were given up, since whoever wrote them was lost each time; all others are answered.
    """
    ray = import_ray()
    begun = time.monotonic()
    book = Book(output, bundle, adapters)
    decodings, count, known = look_through(jobs, bundle, book)
    before = len(book.answered)

    def tell() -> None:
        if progress is not None:
            now = len(book.answered) - before
            progress(known + now, count, now)

    lost: list[_Task] = []
    reason = ""
    with contextlib.ExitStack() as stack:
        settings = None
        for window in _windows(jobs, book, tell) if decodings else ():
            if settings is None:
                shipped = bundle.path.resolve() == default_bundle().resolve()
                settings = EngineStart(
                    engine=engine,
                    bundle_dir=None if shipped else str(bundle.path.absolute()),
                    weights_sha256=bundle.weights_sha256,
                    upsampler_sha256=bundle.upsampler_sha256,
                    decodings=tuple(decodings),
                    batch_size=batch_size,
                    adapters=tuple(dataclasses.replace(adapter, path=adapter.path.absolute()) for adapter in adapters),
                )
                stack.enter_context(connected(ray, address))
            reason = _carry_out(ray, window, settings, num_cpus, book, tell) or reason
            lost += window.values()
    if lost:
        raise PoetError(
            f"{len(lost)} lines were not answered, the first of them line {lost[0].line.number}: what wrote them was "
            f"lost {ATTEMPTS} times ({reason or 'Ray did not say why'}). The others are. Run the same command again."
        )
    seconds = round(time.monotonic() - begun, 3)
    return BatchSummary(completed=book.completed, failed=book.failed, before=before, seconds=seconds)


def _windows(jobs: Path, book: Book, tell: Callable[[], None]) -> Iterator[dict[int, _Task]]:
    """What is to be carried out, by line number, in parts; what cannot be is answered on the way."""
    window: dict[int, _Task] = {}
    size = 0
    for line in read_lines(jobs):
        if book.is_new(line):
            try:
                task = _Task.of(line, jobs.parent)
            except (ConfigError, MediaError, RequestError) as error:
                book.fail(line, error)
            else:
                window[line.number] = task
                size += 1024 + len(json.dumps(line.body)) + len(task.reference or b"")
        tell()
        if size > WINDOW_BYTES:
            yield window
            window, size = {}, 0
    if window:
        yield window


def _carry_out(
    ray: Any,
    window: dict[int, _Task],
    settings: EngineStart,
    num_cpus: int | None,
    book: Book,
    tell: Callable[[], None],
) -> str:
    """Ask for lines until they are answered, and take those from the window; returns why some are left."""
    reason = ""
    attempt = 0
    while window and attempt < ATTEMPTS:
        before = len(window)
        # Twice what is written at once: what ends early makes room for others, and little is lost with a machine.
        most = (2 * settings.batch_size, settings.batch_size, 1)[attempt]
        with listening() as failures:
            try:
                for row in _answered(ray, window.values(), settings, num_cpus, most):
                    if row["fatal"]:
                        raise ConfigError(row["fatal"])
                    task = window.pop(row["number"], None)
                    if task is not None:
                        book.keep(task.line, row["status"], json.loads(row["body"]), row["media"], row["node"])
                        tell()
            except (ray.exceptions.RayError, ray.data.exceptions.ExecutionTimeoutError) as error:
                failures.append(reason_behind(error))
                attempt -= len(window) < before  # what ended the whole is not the fault of the lines that are left
        attempt += 1
        reason = failures[-1] if failures else reason
    return reason


def _answered(
    ray: Any, tasks: Collection[_Task], settings: EngineStart, num_cpus: int | None, most: int
) -> Iterator[dict[str, Any]]:
    """Rows from the machines, as they come; `most` lines at most are handed to one of them at a time."""
    cores = sorted(int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"])
    cores = [count for count in cores if count > 0]
    needed = num_cpus or (cores[0] if cores else 1)
    engines = sum(count // needed for count in cores)
    if not engines:
        raise ConfigError(
            f"a machine of the cluster must have the {needed} cores that an engine takes, the largest offers "
            f"{cores[-1] if cores else 0}. Ask for fewer with --ray-cpus, or start its machines with more."
        )
    num_blocks = math.ceil(len(tasks) / min(most, math.ceil(len(tasks) / engines)))
    dataset = ray.data.from_items([task.row() for task in tasks], override_num_blocks=num_blocks)
    context = dataset.context
    context.target_max_block_size = 1  # a row is handed on when it is made, not with the rest of its block
    context.max_errored_blocks = -1  # what Ray gives up, this module asks for again
    context.enable_progress_bars = context.print_on_execution_start = False
    with warnings.catch_warnings():
        # Ray 2.60 announces that it will drop such arguments, and has none yet in place of the last two.
        warnings.simplefilter("ignore", DeprecationWarning)
        answers = dataset.map_batches(
            BlockWriter,
            fn_constructor_args=(settings,),
            batch_size=None,
            batch_format="pyarrow",
            # A second block would only wait, and be lost with the first.
            compute=ray.data.ActorPoolStrategy(size=min(engines, num_blocks), max_tasks_in_flight_per_actor=1),
            num_cpus=needed,
            runtime_env={"env_vars": _ENVIRONMENT},
            max_restarts=-1,
            max_task_retries=RETRIES,
        )
    yield from answers.iter_rows()


def _node() -> str:
    """Which machine of the cluster this is."""
    import ray

    return str(ray.get_runtime_context().get_node_id())
