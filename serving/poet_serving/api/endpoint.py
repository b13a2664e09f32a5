"""Poet on vLLM's server: an endpoint plugin, which vLLM finds by its entry point and calls twice.

First `attach_router`, before there is an engine: of vLLM's routes only those of health and figures stay, because the
others take ids of anybody, and an id beyond the vocabulary ends the engine for everybody. Poet's application is mounted
behind them. Then `init_state`, with the client of vLLM's engine: the service is put together and the worker begins.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import os
import signal
import sys
import threading
from argparse import Namespace
from collections.abc import Iterator
from typing import Any, Final

import torch
from fastapi import FastAPI
from starlette.datastructures import State

from poet.bundle import Bundle
from poet.errors import CheckpointError
from poet.generation.pipeline import Pipeline
from poet_serving.api.application import create_application
from poet_serving.api.guard import ApiKeys
from poet_serving.api.metrics import Metrics
from poet_serving.api.options import ServeOptions
from poet_serving.api.service import Service
from poet_serving.api.worker import Worker
from poet_serving.asynchronous import AsyncEngine, AsyncUpsampler
from poet_serving.engine import check_settings
from poet_serving.jobs import JobStore
from poet_serving.media_reader import MediaReader
from poet_serving.phrases import Phrases
from poet_serving.settings import EngineSettings

__all__ = ["PoetEndpoint"]

KEPT: Final = ("/health", "/ping", "/metrics", "/version")


class PoetEndpoint:
    """See the module. What vLLM's command line knows nothing of comes as `args.poet`, a `ServeOptions`."""

    name = "poet_api"
    required_tasks = ("generate",)

    def __init__(self) -> None:
        self._application: FastAPI | None = None
        self._metrics = Metrics()

    def attach_router(self, app: FastAPI) -> None:
        """Leave of vLLM's routes those that are harmless, and mount Poet's."""
        options: ServeOptions = app.state.args.poet
        keys = ApiKeys.read(options.keys)
        self._application = create_application(
            None,
            keys=keys,
            limits=options.limits,
            metrics=self._metrics,
            origins=options.origins,
            page=options.page,
        )
        app.router.routes[:] = [route for route in app.router.routes if getattr(route, "path", "") in KEPT]
        app.mount("", self._application)

    async def init_state(self, engine_client: Any, state: State, args: Namespace) -> None:
        """Put the service together and begin.

        Raises:
            PoetError: the bundle, the store or the directory cannot be used.
        """
        options: ServeOptions = args.poet
        assert self._application is not None
        bundle = Bundle.open(options.bundle_dir)
        settings: EngineSettings = args.poet_settings
        check_settings(engine_client.vllm_config)
        # Between the engines and the tokenizers of this process: one core each where there are two.
        torch.set_num_threads(max(1, (os.cpu_count() or 2) // 2))
        engine = AsyncEngine(
            settings,
            engine_client,
            canvases=await _start_canvases(bundle, settings),
            upsampler=await _start_upsampler(bundle, settings),
        )
        await engine.load_adapters()
        told_to_end = _note_shutdown(engine_client)

        def engine_gone() -> None:
            # vLLM looks at its own engine alone; one that is beside it would leave a server that does nothing.
            args.poet_engine_gone = True
            os.kill(os.getpid(), signal.SIGTERM)

        pipeline = await asyncio.to_thread(Pipeline, bundle, engine, adapters=options.adapters)
        store = JobStore(options.database_url, options.data / "content")
        atexit.register(store.close)
        worker = Worker(
            store,
            pipeline,
            engine,
            self._metrics,
            capacity=options.max_num_seqs + max(2, options.max_num_seqs // 4),
            lasts=options.lasts,
            max_bytes=options.max_bytes,
            engine_gone=engine_gone,
            is_told_to_end=told_to_end.is_set,
        )
        reader = MediaReader(options.bundle_dir, options.data / "scratch")
        atexit.register(reader.close)
        service = Service(
            bundle=bundle,
            pipeline=pipeline,
            store=store,
            worker=worker,
            reader=reader,
            limits=options.limits,
            metrics=self._metrics,
            phrases=None if bundle.phrases_file is None else Phrases.load(bundle.phrases_file),
            name=options.name,
        )
        self._application.state.service = service
        service.start()
        sys.stderr.write(f"serving at http://{options.host}:{options.port}\n")


def _note_shutdown(engine_client: Any) -> threading.Event:
    """An event that is set when vLLM begins to end its engine, which it does before it ends the server."""
    told, shutdown = threading.Event(), engine_client.shutdown

    def noted(*arguments: Any, **keywords: Any) -> Any:
        told.set()
        return shutdown(*arguments, **keywords)

    engine_client.shutdown = noted
    return told


async def _start_canvases(bundle: Bundle, settings: EngineSettings) -> Any:
    """vLLM's engine of canvases, where the bundle has learnt them."""
    if not bundle.writes_parallel:
        return None
    return await _start(settings.canvases())


async def _start_upsampler(bundle: Bundle, settings: EngineSettings) -> AsyncUpsampler | None:
    """vLLM's engine of the bundle's upsampler, where it has one."""
    if bundle.upsampler is None:
        return None
    config = (await asyncio.to_thread(bundle.load_upsampler)).config
    arguments = settings.upsampler(bundle, config.scale)
    client = await _start(arguments)
    return AsyncUpsampler(client=client, config=config, longest=arguments["max_model_len"])


async def _start(arguments: dict[str, Any]) -> Any:
    """Another of vLLM's engines, in a process of its own."""
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    from poet_serving.api.launch import ENGINE_CLASSES

    with _all_threads():
        try:
            client = AsyncLLM.from_engine_args(
                AsyncEngineArgs(**arguments | ENGINE_CLASSES, disable_log_stats=True, use_tqdm_on_load=False)
            )
        except (ValueError, KeyError, RuntimeError, OSError) as error:
            raise CheckpointError(f"vLLM cannot load {arguments['model']}: {error}") from error
    atexit.register(client.shutdown)
    return client


@contextlib.contextmanager
def _all_threads() -> Iterator[None]:
    """Let a process that is started within have as many threads as there are cores."""
    before = os.environ.pop("OMP_NUM_THREADS", None)
    try:
        yield
    finally:
        if before is not None:
            os.environ["OMP_NUM_THREADS"] = before
