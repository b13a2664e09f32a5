"""Output ids from vLLM: the `vllm` engine of `poet generate`, running inside the calling process.

A request that vLLM cannot serve is refused here, before it reaches vLLM: an id beyond the vocabulary would kill vLLM's
engine for everybody, and a prompt that does not fit one step would wait for ever.

vLLM usually spawns a process for its engine and one for its worker, each of which imports everything again. For one
small model on a CPU both are loss: here they run in this process (serving/README.md, decision 1), so nothing is left
behind at Ctrl-C. This module knows ids and grammars, and hands codes to the upsampler; clips and files belong to
`poet.generation.pipeline`.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import random
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError

from poet.bundle import Bundle
from poet.errors import CheckpointError, ConfigError, PoetError
from poet.generation.engine import GenerationRequest, StreamingEngine, Watch, check_request
from poet.generation.upsample import UpsamplingRequest, check_upsampling
from poet.model.lora import Adapter
from poet_serving.adapters import all_requests, check_unchanged
from poet_serving.settings import EngineSettings, set_environment

if TYPE_CHECKING:
    from poet_serving.writing import Writer

__all__ = ["VLLMEngine", "check_servable", "check_settings"]

DECODINGS = ("autoregressive", "parallel", "upsampling")

# What vLLM reads from the environment, besides the defaults of `poet_serving.settings`.
_REQUIRED_ENVIRONMENT = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_USE_V2_MODEL_RUNNER": "0"}


class VLLMEngine(StreamingEngine):
    """Generates output ids with vLLM on the CPU; one per process at a time.

    Args:
        bundle_dir: Directory with `config.json` and `model.safetensors`.
        dtype: "float32" (greedy ids are the torch engine's, one for one), "bfloat16" (twice as fast where the processor
            multiplies in it; ids may differ where two are nearly as likely), or "auto": bfloat16 on such processors.
        max_num_seqs: Requests that are written at once, guided ones counted twice; the others wait for their turn.
        num_cache_blocks: Pages of `BLOCK_SIZE` ids in the cache; None: enough that `max_num_seqs` requests of full
            length fit and none is ever preempted.
        num_threads: Threads of a step; None: one where a model of less than `SMALL_MODEL` parameters writes one id
            after another, else as many as PyTorch has. They are the caller's again between calls.
        decodings: one or more of "autoregressive" (one id after another), "parallel" (many ids at once,
            `poet_serving.maskgit`), each of which holds the weights once, and "upsampling" (pictures in a larger size,
            `poet_serving.superresolution`), which needs a whole bundle.
        adapters: LoRA adapters of the bundle's model, any mix of which, and none, may be in one batch.
        num_scenes: Scenes of the longest film; 1 (scenes that stand alone) takes somewhat less time an id.
        full_attention: Whether every layer sees all scenes of a film, to compare what that costs.

    Raises:
        CheckpointError: The directory holds no model.
        ConfigError: An option that cannot be used, vLLM is not installed, or this process runs another engine.
    """

    name = "vllm"
    _running = False

    def __init__(
        self,
        bundle_dir: str | Path,
        *,
        dtype: str = "auto",
        max_num_seqs: int = 16,
        num_cache_blocks: int | None = None,
        num_threads: int | None = None,
        decodings: Sequence[str] = ("autoregressive",),
        adapters: Sequence[Adapter] = (),
        num_scenes: int = 1,
        full_attention: bool = False,
    ) -> None:
        self._vllm: Any = None
        self._canvases: Any = None
        self._upsampler: Any = None
        self._is_writing = False
        if not decodings or set(decodings) - set(DECODINGS):
            raise ConfigError(f"decodings must be one or more of {', '.join(DECODINGS)}, got {list(decodings)}.")
        self._settings = EngineSettings.of_bundle(
            Path(bundle_dir),
            dtype=dtype,
            max_num_seqs=max_num_seqs,
            num_cache_blocks=num_cache_blocks,
            num_threads=num_threads,
            adapters=tuple(adapters),
            num_scenes=num_scenes,
            full_attention=full_attention,
        )
        if VLLMEngine._running:
            raise ConfigError("a process must run one vLLM engine at a time. Close the other one first.")
        try:
            if "autoregressive" in decodings:
                self._vllm = _start(self._settings.causal())
            if "parallel" in decodings:
                self._canvases = _start(self._settings.canvases())
            self._load_adapters()
            if "upsampling" in decodings:
                bundle = Bundle.open(bundle_dir)
                # Loaded once by the reference's own code, which checks more than vLLM does.
                self._upsampler_config = bundle.load_upsampler().config
                self._upsampler = _start(self._settings.upsampler(bundle, self._upsampler_config.scale))
        except BaseException as error:
            self.close()
            damaged = (ValueError, KeyError, RuntimeError, OSError, SafetensorError)
            if isinstance(error, PoetError) or not isinstance(error, damaged):
                raise
            raise CheckpointError(f"vLLM cannot load the model of {bundle_dir}: {error}") from error
        VLLMEngine._running = True
        try:
            if self._vllm is not None:
                check_settings(self._vllm.vllm_config)
        except ConfigError:
            self.close()
            raise

    def _load_adapters(self) -> None:
        """Now: a file that is damaged when its first request comes would end the engine for everybody."""
        for adapter, request in zip(self._settings.adapters, all_requests(self._settings.adapters), strict=True):
            for engine in (self._vllm, self._canvases):
                if engine is not None:
                    engine.add_lora(request)
            check_unchanged(adapter)

    def stream(
        self,
        requests: Iterable[GenerationRequest],
        progress: Callable[[int], None] | None = None,
        watch: Watch | None = None,
    ) -> Iterator[tuple[int, list[int]]]:
        """Write outputs while requests are still being taken from where they come; see `Engine.stream`.

        Twice as many requests are taken as fit a step: the next ones are at hand when the first are done.
        """
        writers, settings = self._writers(watch), self._settings
        if self._is_writing:
            raise ConfigError("the engine must write one stream at a time. End the other one, or close it, first.")
        source = enumerate(requests)
        exhausted = False
        self._is_writing = True
        try:
            while True:
                while not exhausted and sum(writer.num_open for writer in writers.values()) < 2 * settings.max_num_seqs:
                    index, request = next(source, (0, None))
                    if request is None:
                        exhausted = True
                        break
                    self.check(request, index=index)
                    writers["autoregressive" if request.canvas is None else "parallel"].add(index, request)
                busy = [name for name, writer in writers.items() if writer.num_open]
                if not busy:
                    return
                finished = []
                for name in busy:
                    with _threads(settings.num_threads_in_turn if name == "autoregressive" else settings.num_threads):
                        finished += writers[name].step()
                if progress is not None:
                    progress(sum(writer.num_known for writer in writers.values()))
                yield from finished
        finally:
            self._is_writing = False
            for writer in writers.values():  # Ctrl-C, progress() raised, or nobody wants the rest
                writer.abort()

    def _writers(self, watch: Watch | None) -> dict[str, Writer]:
        """What writes, by decoding."""
        self._check_open()
        from poet_serving.maskgit import CanvasFiller
        from poet_serving.writing import OutputWriter

        writers: dict[str, Writer] = {}
        if self._vllm is not None:
            writers["autoregressive"] = OutputWriter(self._vllm, self._settings.adapters, watch)
        if self._canvases is not None:
            writers["parallel"] = CanvasFiller(self._canvases, self._settings.max_num_seqs, self._settings.adapters)
        return writers

    def upsample(
        self, requests: Sequence[UpsamplingRequest], progress: Callable[[int, int], None] | None = None
    ) -> list[NDArray[np.int64]]:
        """Write the codes of pictures again in a larger size, as many at once as `max_num_seqs` allows.

        Args:
            requests: Codes of the smaller size with their texts and settings.
            progress: Called after every step with the codes known and those that there are, over all requests.

        Returns:
            (T, H, W) codes of every request, in order.

        Raises:
            ConfigError: The engine was started without upsampling, or a request that the upsampler cannot take; no
                request has been started then.
        """
        if self._upsampler is None:
            raise ConfigError(
                "the engine must be open and have been started with upsampling to upsample. Name it in the engine's "
                "decodings."
            )
        longest = self._upsampler.vllm_config.model_config.max_model_len
        for index, request in enumerate(requests):
            check_upsampling(request, self._upsampler_config, index=index)
            places = request.low.size * self._upsampler_config.scale**2
            if places > longest:
                raise ConfigError(
                    f"request {index}: the larger picture must have at most {longest} codes, as many as the bundle's "
                    f"clips, got {places}. Cut it into shorter clips."
                )
        from poet_serving.superresolution import upsample_codes

        with _threads(self._settings.num_threads):
            return upsample_codes(
                self._upsampler, requests, self._upsampler_config, self._settings.max_num_seqs, progress
            )

    def check(self, request: GenerationRequest, *, index: int = 0) -> None:
        """Raise unless the engine can take a request; see `Engine.check`."""
        self._check_open()
        engine = self._vllm if request.canvas is None else self._canvases
        check_servable(request, self._settings, started=engine is not None, index=index)

    def _check_open(self) -> None:
        if self._vllm is None and self._canvases is None and self._upsampler is None:
            raise ConfigError("the engine must be open to generate; it was closed.")

    def close(self) -> None:
        """Release the model and the cache; closing twice does no harm."""
        engines = [engine for engine in (self._vllm, self._canvases, self._upsampler) if engine is not None]
        self._vllm = self._canvases = self._upsampler = None
        for engine in engines:
            engine.engine_core.shutdown()
        if engines:
            VLLMEngine._running = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def check_servable(request: GenerationRequest, settings: EngineSettings, *, started: bool, index: int = 0) -> None:
    """Raise unless vLLM can write a request.

    Args:
        request: to be checked.
        settings: what vLLM was started with.
        started: whether the request's way of decoding was.
        index: of the request among others, for the message.

    Raises:
        ConfigError: it cannot.
    """
    check_request(request, settings.config, adapters=settings.adapters, index=index)
    if (scenes := 1 + len(request.context_ids) // settings.config.scene_length) > settings.num_scenes:
        raise ConfigError(
            f"request {index}: the engine was started for films of at most {settings.num_scenes} scenes, got one of "
            f"{scenes}. Start it with num_scenes={scenes}."
        )
    if not started:
        kind = "autoregressive" if request.canvas is None else "parallel"
        raise ConfigError(
            f"request {index}: the engine was started without {kind} decoding. Name it in the engine's decodings."
        )
    takes_pairs = settings.takes_pairs if request.canvas is None else settings.max_num_seqs > 1
    if request.guided and not takes_pairs:
        raise ConfigError(
            f"request {index}: guidance writes two requests at once, for which max_num_seqs must be at least 2 and "
            f"num_cache_blocks at least {settings.pair_blocks}. Start the engine with more, or set guidance_scale 1."
        )


def check_settings(settings: Any) -> None:
    """Raise unless vLLM holds the settings without which it hangs or writes wrong ids, silently.

    Args:
        settings: a running engine's `VllmConfig`.

    Raises:
        ConfigError: a prompt could be read in several steps, or its cache be shared with another prompt.
    """
    scheduler = settings.scheduler_config
    longest, budget = settings.model_config.max_model_len, scheduler.max_num_batched_tokens
    if budget < longest or scheduler.enable_chunked_prefill:
        raise ConfigError(
            "vLLM must read every prompt in one step, so max_num_batched_tokens must be at least max_model_len and "
            f"enable_chunked_prefill False, got {budget}, {longest} and {scheduler.enable_chunked_prefill}."
        )
    if settings.cache_config.enable_prefix_caching:
        raise ConfigError(
            "enable_prefix_caching must be False, got True: the first ids of a prompt see its last, so two prompts "
            "that begin alike share nothing."
        )


@contextlib.contextmanager
def _threads(count: int | None) -> Iterator[None]:
    """Give what is within so many threads (None: as many as there are), and the caller its own again."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _start(arguments: dict[str, Any]) -> Any:
    """Import vLLM and build its engine with one of Poet's models."""
    os.environ.update(_REQUIRED_ENVIRONMENT)
    set_environment()
    with _quick_start(), _own_process_state(), _quiet():
        # Only now: vLLM reads part of the environment at import, and takes seconds to import.
        try:
            from vllm.distributed import cleanup_dist_env_and_memory
            from vllm.engine.arg_utils import EngineArgs
            from vllm.v1.engine.llm_engine import LLMEngine
        except ImportError as error:
            raise ConfigError(
                f"the vllm engine needs vLLM, which cannot be imported ({error}). Install openpoet[serve], or use the "
                "torch engine."
            ) from error
        from poet_serving.grammar import GrammarLogitsProcessor
        from poet_serving.guidance import GuidanceLogitsProcessor
        from poet_serving.plugin import register_classes
        from poet_serving.repetition import RepetitionLogitsProcessor
        from poet_serving.scheduler import PairScheduler

        register_classes()
        if arguments.get("runner") != "pooling":
            arguments["logits_processors"] = [
                GuidanceLogitsProcessor,
                RepetitionLogitsProcessor,
                GrammarLogitsProcessor,
            ]  # in this order
        engine_arguments = EngineArgs(
            **arguments,
            scheduler_cls=PairScheduler,
            disable_log_stats=True,
            use_tqdm_on_load=False,
        )
        try:
            return LLMEngine.from_engine_args(engine_arguments)
        except BaseException:
            cleanup_dist_env_and_memory()  # so that this process can start another
            raise


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hold back what is said during a start that nobody can act on."""
    # vLLM sets up its logging only after its first warnings (here: that there is no Triton for CPUs).
    logging.getLogger("vllm").setLevel(os.environ["VLLM_LOGGING_LEVEL"])
    # vLLM opens generation_config.json even when told not to use it, and transformers comments on Poet's keys.
    comments = logging.getLogger("transformers.generation.configuration_utils")
    level = comments.level
    comments.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        comments.setLevel(level)


@contextlib.contextmanager
def _quick_start() -> Iterator[None]:
    """Keep the garbage collector from searching the modules that are being imported again and again."""
    was_enabled = gc.isenabled()
    gc.disable()
    gc.freeze()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@contextlib.contextmanager
def _own_process_state() -> Iterator[None]:
    """Give back what vLLM's worker takes over because it counts on a process of its own."""
    # numpy's global generator is the one that vLLM seeds.
    generators = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    set_num_threads = torch.set_num_threads
    try:
        yield
    finally:
        random.setstate(generators[0])
        np.random.set_state(generators[1])  # noqa: NPY002
        torch.set_rng_state(generators[2])
        torch.set_num_threads = set_num_threads
