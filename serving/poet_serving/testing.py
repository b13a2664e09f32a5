"""A server for tests: the application, the store and the worker as they are served, with the reference engine."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import socket
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import uvicorn
from fastapi import FastAPI
from numpy.typing import NDArray
from prometheus_client import CollectorRegistry

from poet.bundle import Bundle
from poet.generation.engine import GenerationRequest, TorchEngine
from poet.generation.pipeline import Pipeline
from poet.model.lora import Adapter
from poet_serving.api.application import create_application
from poet_serving.api.guard import ApiKeys, Limits
from poet_serving.api.metrics import Metrics
from poet_serving.api.service import Service
from poet_serving.api.worker import Worker
from poet_serving.jobs import JobStore
from poet_serving.media_reader import MediaReader
from poet_serving.phrases import Phrases

__all__ = ["RunningServer", "run_server"]


class _OneByOne(TorchEngine):
    """The reference engine as a worker wants it: awaited, one output after another."""

    is_running = True

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self._turn = threading.Lock()
        self.hold = threading.Event()
        """While it is not set, nothing is written."""
        self.hold.set()

    async def write(self, request: GenerationRequest, progress: Callable[[int], None] | None = None) -> list[int]:
        """Write one output."""

        def work() -> list[int]:
            with self._turn:
                return self.generate([request], None if progress is None else lambda done, _: progress(done))[0]

        while not self.hold.is_set():
            await asyncio.sleep(0.02)
        return await asyncio.to_thread(work)

    def upsample(self, *arguments: Any, **keywords: Any) -> list[NDArray[np.int64]]:
        """See `Engine.upsample`."""
        with self._turn:
            return super().upsample(*arguments, **keywords)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunningServer:
    """A server that answers.

    Attributes:
        url: without a slash at its end.
        application: what it serves.
        service: what the routes call.
        hold: while it is not set, no job gets on.
    """

    url: str
    application: FastAPI
    service: Service
    hold: threading.Event


@contextlib.contextmanager
def run_server(
    bundle: Bundle,
    directory: Path,
    *,
    keys: dict[str, str] | None = None,
    limits: Limits | None = None,
    adapters: Sequence[Adapter] = (),
    **application: Any,
) -> Iterator[RunningServer]:
    """Serve a bundle on a free port of this machine for as long as the context lasts.

    Args:
        bundle: the model.
        directory: of jobs and files; made if missing.
        keys: name to secret; None: everybody may ask.
        limits: of one key.
        adapters: of the model.
        **application: further arguments of `create_application`.
    """
    metrics = Metrics(CollectorRegistry())
    given = limits or Limits()
    app = create_application(None, keys=ApiKeys(keys or {}), limits=given, metrics=metrics, **application)
    engine = _OneByOne(bundle.path, adapters=adapters)
    ready = threading.Event()

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        pipeline = Pipeline(bundle, engine, adapters=adapters)
        store = JobStore(f"sqlite:///{directory / 'jobs.sqlite'}", directory / "content")
        worker = Worker(store, pipeline, engine, metrics, capacity=4)
        reader = MediaReader(bundle.path, directory / "scratch")
        app.state.service = Service(
            bundle=bundle,
            pipeline=pipeline,
            store=store,
            worker=worker,
            reader=reader,
            limits=given,
            metrics=metrics,
            phrases=None if bundle.phrases_file is None else Phrases.load(bundle.phrases_file),
            name=bundle.name,
        )
        app.state.service.start()
        ready.set()
        yield
        engine.hold.set()
        await app.state.service.stop()
        reader.close()
        store.close()

    app.router.lifespan_context = lifespan
    directory.mkdir(parents=True, exist_ok=True)
    listening = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", lifespan="on"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    try:
        if not ready.wait(60):
            raise RuntimeError("the server did not start")
        url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        yield RunningServer(url=url, application=app, service=app.state.service, hold=engine.hold)
    finally:
        server.should_exit = True
        thread.join(timeout=60)
        listening.close()
        engine.close()
