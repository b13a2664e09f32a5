"""The worker when its engine fails: which jobs wait again, and which end with a reason."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from poet.bundle import Bundle
from poet.errors import ConfigError
from poet.generation.engine import GenerationRequest, TorchEngine
from poet.generation.pipeline import Pipeline
from poet.testing import tiny_bundle
from poet_serving.api import worker as worker_module
from poet_serving.api.metrics import Metrics
from poet_serving.api.orders import Order
from poet_serving.api.worker import Worker
from poet_serving.asynchronous import EngineGoneError
from poet_serving.jobs import JobStatus, JobStore
from poet_serving.schema import VideoBody


class FailingEngine:
    """Fails every output with the same error, and is gone some seconds later."""

    def __init__(self, error: Exception, ends_after: float | None) -> None:
        self.error, self.ends_after, self.is_running = error, ends_after, True

    async def write(self, request: GenerationRequest, progress: Callable[[int], None] | None = None) -> list[int]:
        if self.ends_after is not None:
            asyncio.get_running_loop().call_later(self.ends_after, setattr, self, "is_running", False)
        raise self.error


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return tiny_bundle(tmp_path_factory.mktemp("made") / "tiny")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_module, "ENDING", 0.3)


@contextlib.asynccontextmanager
async def working(
    bundle: Bundle, folder: Path, engine: FailingEngine, **more: Any
) -> AsyncIterator[tuple[JobStore, Worker]]:
    store = JobStore(f"sqlite:///{folder / 'jobs.sqlite'}", folder / "content")
    with TorchEngine(bundle.path) as reference:
        worker = Worker(store, Pipeline(bundle, reference), engine, Metrics(CollectorRegistry()), capacity=2, **more)
        worker.start()
        try:
            yield store, worker
        finally:
            await worker.stop()
            store.close()


def run(
    bundle: Bundle, folder: Path, engine: FailingEngine, seconds: float, **more: Any
) -> list[tuple[JobStatus, str | None, int]]:
    """Status, code and attempts of three jobs, some time after they were accepted."""
    order = Order(body=VideoBody.parse({"prompt": "a red star", "seed": 1}), task="text_to_video_audio", model="tiny")

    async def work() -> list[tuple[JobStatus, str | None, int]]:
        async with working(bundle, folder, engine, **more) as (store, worker):
            ids = [store.submit("ada", order.to_dict())[0].id for _ in range(3)]
            worker.wake()
            await asyncio.sleep(seconds)
            jobs = [store.get(id) for id in ids]
            return [(job.status, (job.error or {}).get("code"), job.attempts) for job in jobs]

    return asyncio.run(work())


def test_an_error_of_an_engine_that_is_being_ended_gives_the_jobs_back(bundle: Bundle, tmp_path: Path) -> None:
    # vLLM's sockets are closed a moment before its client says that the engine is gone.
    ended = run(bundle, tmp_path, FailingEngine(RuntimeError("Socket operation on non-socket"), 0.1), 1.5)
    assert ended == [(JobStatus.QUEUED, None, 1), (JobStatus.QUEUED, None, 1), (JobStatus.QUEUED, None, 0)]


def test_an_engine_that_says_it_is_gone_is_given_no_more_jobs(bundle: Bundle, tmp_path: Path) -> None:
    told: list[str] = []
    engine = FailingEngine(EngineGoneError("vLLM's engine has ended."), None)
    ended = run(bundle, tmp_path, engine, 1.0, engine_gone=lambda: told.append("gone"))
    assert ended == [(JobStatus.QUEUED, None, 1), (JobStatus.QUEUED, None, 1), (JobStatus.QUEUED, None, 0)]
    assert told == ["gone"]  # once: the server ends


def test_being_told_to_end_is_no_attempt(bundle: Bundle, tmp_path: Path) -> None:
    engine = FailingEngine(EngineGoneError("vLLM gave the request up."), None)
    told: list[str] = []
    ended = run(bundle, tmp_path, engine, 1.0, is_told_to_end=lambda: True, engine_gone=lambda: told.append("gone"))
    assert ended == 3 * [(JobStatus.QUEUED, None, 0)]
    assert told == []


@pytest.mark.parametrize(
    ("error", "code"), [(RuntimeError("a defect"), "server_error"), (ConfigError("not so"), "generation_failed")]
)
def test_any_other_error_ends_the_job_with_its_reason(
    bundle: Bundle, tmp_path: Path, error: Exception, code: str
) -> None:
    ended = run(bundle, tmp_path, FailingEngine(error, None), 2.0)
    assert [(status, given) for status, given, _ in ended] == 3 * [(JobStatus.FAILED, code)]
