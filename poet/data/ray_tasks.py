"""Footage looked through and clips encoded by the machines of a Ray cluster, with the results of one machine.

A task is a file to look through, or a range of clips to encode, which becomes one file of shards. The machines need
Poet, the bundle and the footage at the paths they have here; a machine that has other files, or none, ends the work.
Results come back in order, so journal, shards and manifest are written by this process alone; what is lost with a
machine is done again by another.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Protocol, runtime_checkable

from poet.data.clips import ClipSource
from poet.data.encode import EncodedRange, RangeEncoder
from poet.data.footage import FileSurveys
from poet.data.listing import Listing
from poet.data.ray_cluster import connected, import_ray, reason_behind
from poet.data.readahead import read_ahead
from poet.data.scene_facts import FileFacts
from poet.data.scene_measuring import SurveySettings, look_through
from poet.data.stamps import Stamp, check_stamps, stamps_of
from poet.errors import ConfigError, MediaError, PoetError
from poet.media import MediaPath

__all__ = ["RayTasks"]

RETRIES: Final = 3
"""Times that a task is begun again when its process or machine is lost."""

_ENVIRONMENT: Final = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0", "TORCH_CPP_LOG_LEVEL": "ERROR"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class RayTasks:
    """What a cluster does for `survey_footage` and `encode_source`.

    Attributes:
        address: what `ray.init` takes: "auto", "local", "HOST:PORT".
        num_cpus: cores that a task takes.

    Raises:
        ConfigError: Ray is not installed; where it is used, also: the cluster cannot be reached.
    """

    address: str
    num_cpus: int = 1

    def __post_init__(self) -> None:
        if self.num_cpus < 1:
            raise ConfigError(f"a task must take at least one core, got {self.num_cpus}.")
        import_ray()

    def survey(self, surveys: FileSurveys) -> Generator[FileFacts, None, None]:
        """Look files through, each in a task of its own; a `poet.data.footage.SurveyMap`."""
        files = zip(surveys.listed, surveys.stamps, strict=True)
        yield from self._map(_look_through, ((listed, surveys.settings, stamp) for listed, stamp in files), None)

    def encoding(
        self, bundle: Path, fingerprint: str
    ) -> Callable[[ClipSource, Sequence[range], int], Generator[EncodedRange, None, None]]:
        """Encode ranges of clips; a `poet.data.encode.RangeMap`.

        Args:
            bundle: directory with the tokenizers, on every machine.
            fingerprint: that it must have there.
        """

        def encode(source: ClipSource, ranges: Sequence[range], batch_size: int) -> Generator[EncodedRange, None, None]:
            job = _EncodingJob(source, bundle.resolve(), fingerprint, batch_size)
            files = (source.places(one) if isinstance(source, _OfFiles) else () for one in ranges)
            tasks = ((one, stamps_of(places)) for one, places in zip(ranges, files, strict=True))
            yield from self._map(_encode, tasks, job)

        return encode

    def _map(
        self, function: Callable[..., Any], arguments: Iterator[tuple[Any, ...]], job: object
    ) -> Generator[Any, None, None]:
        """The function's results in order; a `job` is sent to each machine once and goes before the arguments."""
        ray = import_ray()
        with connected(ray, self.address):
            cores = [int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]]
            at_once = sum(count // self.num_cpus for count in cores)
            if not at_once:
                raise ConfigError(
                    f"a machine of the cluster must have the {self.num_cpus} cores that a task takes, the largest has "
                    f"{max(cores, default=0)}. Ask for fewer with --ray-cpus."
                )
            task = ray.remote(num_cpus=self.num_cpus, max_retries=RETRIES, runtime_env={"env_vars": _ENVIRONMENT})(
                function
            )
            sent = () if job is None else ([ray.put(job)],)  # in a list, a reference travels and not what it stands for
            pending: deque[Any] = deque()
            try:
                for argument in arguments:
                    # Twice as many as work at once, so that none waits for this process.
                    if len(pending) == 2 * at_once:
                        yield _result(ray, pending.popleft())
                    pending.append(task.remote(*sent, *argument))
                while pending:
                    yield _result(ray, pending.popleft())
            finally:
                for reference in pending:
                    ray.cancel(reference, force=True)


def _result(ray: Any, reference: Any) -> Any:
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, PoetError):
            raise error.cause from error
        raise
    except ray.exceptions.RayError as error:
        raise MediaError(
            f"the cluster lost a task {RETRIES + 1} times ({reason_behind(error)}). Start the same command again; it "
            "goes on after the last finished file."
        ) from error


@runtime_checkable
class _OfFiles(Protocol):
    """A source whose clips lie in files that a machine may lack."""

    def places(self, indices: range) -> Sequence[MediaPath]:
        """The files that the clips of some numbers are read from."""


def _look_through(listed: Listing, settings: SurveySettings, stamp: Stamp) -> FileFacts:
    """In a process of the cluster: look a file through."""
    check_stamps({listed.path: stamp})
    return look_through(listed, settings, stamp)


@dataclasses.dataclass(frozen=True)
class _EncodingJob:
    source: ClipSource
    bundle: Path
    fingerprint: str
    batch_size: int


_opened: dict[Any, tuple[_EncodingJob, RangeEncoder]] = {}
"""The job that this process works on, once it has been fetched, and its tokenizers."""


def _encode(job: list[Any], indices: range, stamps: Mapping[MediaPath, Stamp]) -> EncodedRange:
    """In a process of the cluster: read and encode a range."""
    check_stamps(stamps)
    import ray

    [reference] = job
    if reference not in _opened:
        _opened.clear()
        fetched = ray.get(reference)
        _opened[reference] = fetched, _open(fetched)
    todo, encoder = _opened[reference]
    # As in one process: whatever is read together begins at the range's own beginning.
    items = read_ahead(todo.source, indices.start, 4 * todo.batch_size, 0, stop=indices.stop)
    with contextlib.closing(items):
        return encoder.encode(indices, items)


def _open(job: _EncodingJob) -> RangeEncoder:
    from poet.bundle import Bundle

    bundle = Bundle.open(job.bundle, require_model=False)
    if bundle.fingerprint != job.fingerprint:
        raise ConfigError(
            f"the bundle {job.bundle} of a machine of the cluster is another one: its fingerprint is "
            f"{bundle.fingerprint} instead of {job.fingerprint}. Copy the bundle there."
        )
    return RangeEncoder(bundle, "cpu", job.batch_size)
