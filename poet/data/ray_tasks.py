"""Footage looked through and clips encoded by the machines of a Ray cluster, with the results of one machine.

A task is a file to look through, or a range of clips to encode, which becomes one file of shards. The machines need
Poet, the bundle and the footage at the paths they have here. Results come back in order, so journal, shards and
manifest are written by this process alone; what is lost with a machine is done again by another.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

from poet.data.clips import ClipSource
from poet.data.encode import EncodedRange, RangeEncoder
from poet.data.footage import FileSurveys
from poet.data.ray_cluster import connected, import_ray, reason_behind
from poet.data.readahead import read_ahead
from poet.data.scene_facts import FileFacts
from poet.data.scene_measuring import look_through
from poet.errors import ConfigError, MediaError, PoetError

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
        yield from self._map(look_through, ((listed, surveys.settings) for listed in surveys.listed), None)

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
            yield from self._map(_encode, ((indices,) for indices in ranges), job)

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


@dataclasses.dataclass(frozen=True)
class _EncodingJob:
    source: ClipSource
    bundle: Path
    fingerprint: str
    batch_size: int


_opened: dict[Any, tuple[_EncodingJob, RangeEncoder]] = {}
"""The job that this process works on, once it has been fetched, and its tokenizers."""


def _encode(job: list[Any], indices: range) -> EncodedRange:
    """In a process of the cluster: read and encode a range."""
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
