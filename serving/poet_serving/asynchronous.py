"""Outputs from vLLM's asynchronous engines, which run in processes of their own: the engine behind `poet serve`.

Requests are written side by side, each awaited by whoever asked. A guided request is two of vLLM's, kept together by
`poet_serving.scheduler`; a canvas is a row of requests to a pooling model, one a step. Whoever stops waiting
(`asyncio.Task.cancel`) frees the engine of the request. This module knows ids and codes; jobs and clips belong to
`poet_serving.api`.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import dataclasses
import functools
import itertools
import queue
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from poet.errors import ConfigError, PoetError
from poet.generation.engine import GenerationRequest, StreamingEngine, Watch
from poet.generation.maskgit import Canvas
from poet.generation.upsample import UpsamplingCanvas, UpsamplingRequest, check_upsampling
from poet.model.superresolution import UpsamplerConfig
from poet_serving.adapters import adapter_requests, check_unchanged
from poet_serving.engine import check_servable
from poet_serving.settings import EngineSettings
from poet_serving.writing import halves_of, sampling_parameters

__all__ = ["AsyncEngine", "AsyncUpsampler", "EngineGoneError"]

_POOLING_TASK: Final = "token_classify"  # of vLLM's tasks the one that answers for every id


class EngineGoneError(PoetError, RuntimeError):
    """vLLM's process has ended, or is being ended: no fault of the request, which may be made again elsewhere."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class AsyncUpsampler:
    """The engine of the bundle's upsampler.

    Attributes:
        client: vLLM's, of `poet_serving.superresolution.PoetUpsampler`.
        config: the upsampler's.
        longest: codes of the largest picture.
    """

    client: Any
    config: UpsamplerConfig
    longest: int


class AsyncEngine(StreamingEngine):
    """Writes outputs with vLLM's asynchronous engines. To be made, and awaited, in one event loop.

    The methods of `Engine` are for other threads: they hand the work to the loop and wait for it.

    Args:
        settings: what the engines were started with.
        causal: vLLM's client of the model that writes one id after another.
        canvases: of the one that fills canvases; None: there is none.
        upsampler: of the one that makes pictures larger; None: there is none.
    """

    name = "vllm"

    def __init__(
        self,
        settings: EngineSettings,
        causal: Any,
        *,
        canvases: Any = None,
        upsampler: AsyncUpsampler | None = None,
    ) -> None:
        self._settings = settings
        self._causal, self._canvases, self._upsampler = causal, canvases, upsampler
        self._adapters = adapter_requests(settings.adapters)
        self._loop = asyncio.get_running_loop()
        self._numbers = itertools.count()
        # As many canvases as fit a step, each to its end, so that the first are done early; a guided one counts twice.
        self._canvas_slots = asyncio.Semaphore(max(1, settings.max_num_seqs // 2))
        self._picture_slots = asyncio.Semaphore(settings.max_num_seqs)

    @property
    def is_running(self) -> bool:
        """Whether all of vLLM's processes are there."""
        clients = [self._causal, self._canvases, None if self._upsampler is None else self._upsampler.client]
        return not any(client is not None and client.errored for client in clients)

    async def load_adapters(self) -> None:
        """Let vLLM read the adapters: a file that is damaged when its first request comes would end its engine.

        Raises:
            CheckpointError: an adapter's files were changed since it was checked.
        """
        for adapter in self._settings.adapters:
            for client in (self._causal, self._canvases):
                if client is not None:
                    await client.add_lora(self._adapters[adapter.name])
            check_unchanged(adapter)

    def check(self, request: GenerationRequest, *, index: int = 0) -> None:
        """See `Engine.check`."""
        started = request.canvas is None or self._canvases is not None
        check_servable(request, self._settings, started=started, index=index)

    async def write(
        self,
        request: GenerationRequest,
        progress: Callable[[int], None] | None = None,
        watch: Callable[[Sequence[int]], None] | None = None,
    ) -> list[int]:
        """Write one output.

        Args:
            request: a checked one.
            progress: called again and again with how many ids are written so far.
            watch: called with the ids so far of an output that is written one id after another.

        Returns:
            Its output ids, complete in its grammar.

        Raises:
            PoetError: vLLM could not write it.
        """
        tell = progress or (lambda count: None)
        if request.canvas is not None:
            return await self._fill(request, tell)
        name, parameters = f"poet-{next(self._numbers)}", sampling_parameters(request)
        halves = list(halves_of(request))
        async with _together() as group:
            tasks = []
            for place, (suffix, given, half) in enumerate(halves):
                own = copy.copy(parameters)
                own.extra_args = parameters.extra_args | half
                adapter = self._adapters[request.adapter]
                grown = functools.partial(_tell, tell, watch) if place == 0 else None
                writing = self._write_half(name + suffix, given, own, grown, adapter)
                tasks.append(group.create_task(writing))
        outputs = [task.result() for task in tasks]
        if any(output != outputs[0] for output in outputs):
            raise PoetError("a request and its guide must write the same ids, they did not. This is a defect.")
        return outputs[0]

    async def _write_half(
        self,
        name: str,
        given: Sequence[int],
        parameters: Any,
        grown: Callable[[Sequence[int]], None] | None,
        adapter: Any,
    ) -> list[int]:
        ids: list[int] = []
        prompt = {"prompt_token_ids": list(given)}
        with _gone():
            async for change in self._causal.generate(prompt, parameters, name, lora_request=adapter):
                if change.outputs[0].finish_reason == "abort":  # not by us: we would not be waiting
                    raise EngineGoneError("vLLM gave the request up.")
                ids += change.outputs[0].token_ids
                if grown is not None:
                    grown(ids)
        return ids

    async def _fill(self, request: GenerationRequest, tell: Callable[[int], None]) -> list[int]:
        """Fill a canvas step by step."""
        from poet_serving.maskgit import canvas_arguments

        assert request.canvas is not None
        canvas = Canvas(request.grammar, request.canvas, request.sampling)
        name = f"poet-{next(self._numbers)}"
        async with self._canvas_slots:
            while not canvas.done:
                async with _together() as group:
                    tasks = []
                    for suffix, given, half in halves_of(request, guided=canvas.takes_guidance):
                        arguments = canvas_arguments(len(given), canvas) | half
                        ids = [*given, *canvas.shown()]
                        adapter, step = self._adapters[request.adapter], f"{name}.{canvas.step}{suffix}"
                        asking = _pool(self._canvases, step, ids, arguments, adapter)
                        tasks.append(group.create_task(asking))
                drawn, sure = tasks[0].result().T
                canvas.settle(drawn.astype(np.int64), sure)
                tell(canvas.num_known)
        filled: list[int] = canvas.ids.tolist()
        return filled

    async def enlarge(self, request: UpsamplingRequest) -> NDArray[np.int64]:
        """Write the codes of a picture again in the larger size; returns (T, H, W).

        Raises:
            ConfigError: there is no upsampler, or it cannot take the request.
        """
        from poet_serving.superresolution import step_arguments, step_prompt

        upsampler = self._check_picture(request)
        canvas = UpsamplingCanvas(request, upsampler.config)
        name = f"poet-{next(self._numbers)}"
        async with self._picture_slots:
            while not canvas.done:
                step = canvas.step()
                answer = await _pool(upsampler.client, f"{name}.{step.number}", step_prompt(step), step_arguments(step))
                drawn, sure = answer.T
                canvas.settle(drawn.astype(np.int64), sure.astype(np.float32))
        return canvas.codes

    def _check_picture(self, request: UpsamplingRequest, index: int = 0) -> AsyncUpsampler:
        if self._upsampler is None:
            raise ConfigError("the server's bundle must have an upsampler to write a larger size, it has none.")
        check_upsampling(request, self._upsampler.config, index=index)
        places = request.low.size * self._upsampler.config.scale**2
        if places > self._upsampler.longest:
            raise ConfigError(
                f"request {index}: the larger picture must have at most {self._upsampler.longest} codes, as many as "
                f"the bundle's clips, got {places}. Cut it into shorter clips."
            )
        return self._upsampler

    def upsample(
        self, requests: Sequence[UpsamplingRequest], progress: Callable[[int, int], None] | None = None
    ) -> list[NDArray[np.int64]]:
        """See `Engine.upsample`; from another thread than the loop's."""
        for index, request in enumerate(requests):
            self._check_picture(request, index)
        if not requests and self._upsampler is None:
            raise ConfigError("the server's bundle must have an upsampler to write a larger size, it has none.")

        async def enlarge_all() -> list[NDArray[np.int64]]:
            return await asyncio.gather(*map(self.enlarge, requests))

        return asyncio.run_coroutine_threadsafe(enlarge_all(), self._loop).result()

    def stream(
        self,
        requests: Iterable[GenerationRequest],
        progress: Callable[[int], None] | None = None,
        watch: Watch | None = None,
    ) -> Iterator[tuple[int, list[int]]]:
        """See `Engine.stream`; from another thread than the loop's, in which `watch` is called."""
        written: queue.SimpleQueue[tuple[int, asyncio.Future[list[int]] | Any]] = queue.SimpleQueue()
        open_requests: dict[int, Any] = {}
        known: dict[int, int] = {}
        source = enumerate(requests)
        exhausted = False
        try:
            while True:
                while not exhausted and len(open_requests) < 2 * self._settings.max_num_seqs:
                    index, request = next(source, (0, None))
                    if request is None:
                        exhausted = True
                        break
                    self.check(request, index=index)
                    future = asyncio.run_coroutine_threadsafe(
                        self.write(
                            request,
                            lambda count, index=index: known.update({index: count}),  # type: ignore[misc]
                            None if watch is None else functools.partial(watch, index),
                        ),
                        self._loop,
                    )
                    open_requests[index] = future
                    future.add_done_callback(lambda done, index=index: written.put((index, done)))  # type: ignore[misc]
                if not open_requests:
                    return
                index, done = written.get()
                del open_requests[index]
                output = done.result()
                known[index] = len(output)
                if progress is not None:
                    progress(sum(known.values()))
                yield index, output
        finally:
            for future in open_requests.values():
                future.cancel()

    def close(self) -> None:
        """Nothing to release: whoever started vLLM's engines ends them."""


def _tell(tell: Callable[[int], None], watch: Callable[[Sequence[int]], None] | None, ids: Sequence[int]) -> None:
    tell(len(ids))
    if watch is not None:
        watch(ids)


async def _pool(
    client: Any, name: str, ids: Sequence[int], arguments: Mapping[str, Any], adapter: Any = None
) -> NDArray[Any]:
    """Ask a pooling model for a step; returns (N, 2) ids and log-probabilities."""
    from vllm import PoolingParams

    params = PoolingParams(task=_POOLING_TASK, extra_kwargs=dict(arguments), skip_reading_prefix_cache=True)
    answer = None
    with _gone():
        async for output in client.encode({"prompt_token_ids": list(ids)}, params, name, lora_request=adapter):
            answer = output
    if answer is None or not answer.finished:
        raise EngineGoneError("vLLM gave a step of a canvas up.")
    drawn: NDArray[Any] = answer.outputs.data.numpy()
    return drawn


@contextlib.contextmanager
def _gone() -> Iterator[None]:
    """Say of vLLM's own error that the engine is gone."""
    from vllm.v1.engine.exceptions import EngineDeadError

    try:
        yield
    except EngineDeadError as error:
        raise EngineGoneError("vLLM's engine has ended.") from error


@contextlib.asynccontextmanager
async def _together() -> Any:
    """A task group that raises the first error as it is, not in a group of them."""
    try:
        async with asyncio.TaskGroup() as group:
            yield group
    except ExceptionGroup as errors:
        raise errors.exceptions[0] from errors
