"""Who writes the ids: the request that every engine takes, the door to all engines, and the engine in plain PyTorch.

An engine knows ids and grammars, and hands codes to the upsampler. It does not know clips or files
(`poet.generation.pipeline`).
"""

import abc
import copy
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray

from poet.bundle import Bundle
from poet.errors import ConfigError, VocabularyError
from poet.generation.autoregressive import write_outputs
from poet.generation.maskgit import Canvas, CanvasPlan, fill_canvases
from poet.generation.sampling import SamplingConfig
from poet.generation.upsample import UpsamplingRequest, check_upsampling, upsample_codes
from poet.grammar import Grammar, max_output_length
from poet.model.config import PoetConfig
from poet.model.device import parse_device
from poet.model.lora import Adapter, merge_adapter
from poet.model.superresolution import Upsampler
from poet.model.transformer import PoetTransformer
from poet.model.weights import load_transformer

__all__ = [
    "ENTRY_POINT_GROUP",
    "Engine",
    "GenerationRequest",
    "StreamingEngine",
    "TorchEngine",
    "Watch",
    "check_request",
    "decodings_for",
    "load_engine",
]

ENTRY_POINT_GROUP = "poet.engines"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

Watch = Callable[[int, Sequence[int]], None]
"""Is told the index of a request and its output ids so far."""


@dataclass(frozen=True, kw_only=True)
class GenerationRequest:
    """One output to write.

    Attributes:
        prefix_ids: what the model is given, from <bos> on.
        grammar: what the output may be.
        sampling: how its ids are drawn.
        guide_ids: the prefix that guidance moves the output away from: the same without its text, or with the text of
            what is not wanted. None: there is nothing to move away from, and no guidance.
        canvas: how to write many ids at once; None writes one after another. The prefix must be marked accordingly.
        adapter: name of one of the LoRA adapters that the engine was started with; None: the bundle's own weights.
        context_ids: the earlier scenes of its film, each padded to exactly `scene_length` ids; the prefix's positions
            go on behind them. () for a scene that stands alone.
    """

    prefix_ids: tuple[int, ...]
    grammar: Grammar
    sampling: SamplingConfig
    guide_ids: tuple[int, ...] | None = None
    canvas: CanvasPlan | None = None
    adapter: str | None = None
    context_ids: tuple[int, ...] = ()

    @property
    def guided(self) -> bool:
        """Whether the model is asked twice for every id; at a scale of 1 it is not."""
        return self.guide_ids is not None and self.sampling.guidance_scale != 1


@runtime_checkable
class Engine(Protocol):
    """What writes outputs. Engines give the same ids for greedy requests, whatever else is written at the time."""

    name: str

    def check(self, request: GenerationRequest, *, index: int = 0) -> None:
        """Raise unless the engine can take a request.

        Args:
            request: to be checked.
            index: of the request among others, for the message.

        Raises:
            ConfigError: it cannot, now or ever.
        """
        ...

    def stream(
        self,
        requests: Iterable[GenerationRequest],
        progress: Callable[[int], None] | None = None,
        watch: Watch | None = None,
    ) -> Iterator[tuple[int, list[int]]]:
        """Write outputs while requests are still being taken from where they come, a few ahead of what is written.

        Args:
            requests: any number, taken when there is room for them.
            progress: called again and again with the ids written so far.
            watch: called whenever an output that is written one id after another has grown.

        Yields:
            Index of a request and its output ids, complete in its grammar, in the order in which they are finished.

        Raises:
            ConfigError: a request that the model cannot take; those before it are given up.
        """
        ...

    def generate(
        self, requests: Sequence[GenerationRequest], progress: Callable[[int, int], None] | None = None
    ) -> list[list[int]]:
        """Write the outputs of all requests.

        Args:
            requests: any number.
            progress: called again and again with the ids written and the most that there can be, over all requests.

        Returns:
            The output ids of each request, in order; each is complete in its grammar.

        Raises:
            ConfigError: a request that the model cannot take; none has been started then.
        """
        ...

    def upsample(
        self, requests: Sequence[UpsamplingRequest], progress: Callable[[int, int], None] | None = None
    ) -> list[NDArray[np.int64]]:
        """Write the codes of pictures again in a larger size, with the bundle's upsampler.

        Args:
            requests: any number; none at all asks only whether the engine could.
            progress: called again and again with the codes known and those that there are, over all requests.

        Returns:
            (T, H, W) codes of each request, in order.

        Raises:
            ConfigError: the bundle has no upsampler, the engine was started without it, or a request that it cannot
                take; none has been started then.
        """
        ...

    def close(self) -> None:
        """Release what the engine holds; closing twice does no harm."""
        ...


class StreamingEngine(abc.ABC):
    """What engines have in common: `generate` by their `check` and `stream`."""

    @abc.abstractmethod
    def check(self, request: GenerationRequest, *, index: int = 0) -> None:
        """See `Engine.check`."""

    @abc.abstractmethod
    def stream(
        self,
        requests: Iterable[GenerationRequest],
        progress: Callable[[int], None] | None = None,
        watch: Watch | None = None,
    ) -> Iterator[tuple[int, list[int]]]:
        """See `Engine.stream`."""

    def generate(
        self, requests: Sequence[GenerationRequest], progress: Callable[[int, int], None] | None = None
    ) -> list[list[int]]:
        """See `Engine.generate`."""
        for index, request in enumerate(requests):
            self.check(request, index=index)
        total = sum(max_output_length(request.grammar) for request in requests)
        advance = None if progress is None else lambda done: progress(done, total)
        written = dict(self.stream(requests, advance))
        return [written[index] for index in range(len(requests))]


def check_request(
    request: GenerationRequest, config: PoetConfig, *, adapters: Sequence[Adapter] = (), index: int = 0
) -> None:
    """Raise unless the model can take the request.

    Args:
        request: to be checked.
        config: the model's.
        adapters: that the engine was started with.
        index: of the request among those of one call, for the message.

    Raises:
        ConfigError: an id outside the vocabulary, more ids than a scene holds, a canvas that does not fit, or an
            adapter that there is not.
    """
    names = [adapter.name for adapter in adapters]
    if request.adapter is not None and request.adapter not in names:
        raise ConfigError(
            f"request {index}: adapter must be one of those that the engine was started with, "
            f"{', '.join(names) or 'which are none'}; got {request.adapter!r}."
        )
    if request.canvas is not None:
        if request.sampling.repetition_penalty != 1:
            raise ConfigError(
                f"request {index}: repetition_penalty is for ids that are written one after another; leave it out of "
                "parallel decoding."
            )
        try:
            Canvas(request.grammar, request.canvas, request.sampling)
        except (ConfigError, VocabularyError) as error:
            raise ConfigError(f"request {index}: {error}") from error
        if not 0 <= (mask_id := request.canvas.mask_id) < config.vocab_size:
            raise ConfigError(f"request {index}: mask_id must be in [0, {config.vocab_size}), got {mask_id}.")
    if len(request.context_ids) % config.scene_length:
        raise ConfigError(
            f"request {index}: the earlier scenes of a film must be padded to {config.scene_length} ids each, got "
            f"{len(request.context_ids)} in all. Pad them with poet.sequence.pad_scene."
        )
    if (positions := len(request.context_ids) + config.scene_length) > config.max_position_embeddings:
        raise ConfigError(
            f"request {index}: a film must have at most {config.max_position_embeddings} positions, got {positions}. "
            "Write fewer scenes."
        )
    for prefix in _given(request):
        if not prefix:
            raise ConfigError(f"request {index}: the prefix must have at least one id, got none.")
        if min(prefix) < 0 or max(prefix) >= config.vocab_size:
            raise ConfigError(
                f"request {index}: given ids must be in [0, {config.vocab_size}), got {min(prefix)} to {max(prefix)}. "
                "Pack the prefix with the bundle's own vocabulary."
            )
    for segment in request.grammar:
        if max(segment.high - 1, segment.low if segment.stop is None else segment.stop) >= config.vocab_size:
            raise ConfigError(
                f"request {index}: the grammar's ids must be in [0, {config.vocab_size}), got {segment}. "
                "Make the grammar with the bundle's own vocabulary."
            )
    longest, given = max_output_length(request.grammar), max(map(len, _prefixes(request)))
    if given + longest > config.scene_length:
        raise ConfigError(
            f"request {index}: prefix and output must be at most {config.scene_length} ids together, got "
            f"{given} + {longest}. Ask for a shorter clip or a shorter text."
        )


def _prefixes(request: GenerationRequest) -> list[tuple[int, ...]]:
    """What the model is asked with: one prefix, or two under guidance."""
    return [request.prefix_ids] if request.guide_ids is None else [request.prefix_ids, request.guide_ids]


def _given(request: GenerationRequest) -> list[tuple[int, ...]]:
    """All ids that the model is given."""
    return [*_prefixes(request), *([request.context_ids] if request.context_ids else [])]


class TorchEngine(StreamingEngine):
    """Writes ids with the reference transformer: on a CPU or a GPU, without any server.

    Args:
        bundle_dir: directory with config.json and model.safetensors.
        device: "cpu", "cuda", "cuda:1", ...
        dtype: "float32" or "bfloat16".
        max_batch_size: requests that are written at once, guided ones counted once; those of like length go together.
        decodings: taken for the sake of other engines; this one writes in every way that there is.
        adapters: of the bundle's model; each that is used becomes a copy of the weights with the adapter merged.
        num_scenes: taken for the sake of other engines; this one writes films of any length that the model has.

    Raises:
        CheckpointError: the directory holds no sound model.
        ConfigError: an option that cannot be used.
    """

    name = "torch"

    def __init__(
        self,
        bundle_dir: str | Path,
        *,
        device: str = "cpu",
        dtype: str = "float32",
        max_batch_size: int = 16,
        decodings: Sequence[str] = ("autoregressive", "parallel", "upsampling"),
        adapters: Sequence[Adapter] = (),
        num_scenes: int = 1,
    ) -> None:
        del decodings, num_scenes
        if dtype not in DTYPES:
            raise ConfigError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}.")
        if max_batch_size < 1:
            raise ConfigError(f"max_batch_size must be at least 1, got {max_batch_size}.")
        self._model = load_transformer(bundle_dir, device=parse_device(device), dtype=DTYPES[dtype])
        self._bundle_dir, self._device, self._dtype = Path(bundle_dir), device, dtype
        self._adapters, self._adapted = tuple(adapters), dict[str, PoetTransformer]()
        self._upsampler: Upsampler | None = None
        self._max_batch_size = max_batch_size
        self._closed = False

    def check(self, request: GenerationRequest, *, index: int = 0) -> None:
        """Raise unless the model can take a request; see `Engine.check`."""
        self._check_open()
        check_request(request, self._model.config, adapters=self._adapters, index=index)

    def stream(
        self,
        requests: Iterable[GenerationRequest],
        progress: Callable[[int], None] | None = None,
        watch: Watch | None = None,
    ) -> Iterator[tuple[int, list[int]]]:
        """Write outputs while requests are still being taken from where they come; see `Engine.stream`.

        Some batches' worth of requests are taken at a time, so that those of like length go together.
        """
        self._check_open()
        source = enumerate(requests)
        before = 0
        while window := list(islice(source, 4 * self._max_batch_size)):
            for index, request in window:
                self.check(request, index=index)
            for batch in self._batches(window):
                chosen = [request for _, request in batch]
                advance = None if progress is None else functools.partial(_count_from, before, progress)
                indices = [index for index, _ in batch]
                written = self._write(
                    chosen, advance, None if watch is None else functools.partial(_as, indices, watch)
                )
                # A text that ended early counts as written in full.
                before += sum(max_output_length(request.grammar) for request in chosen)
                if progress is not None:
                    progress(before)
                yield from zip(indices, written, strict=True)

    def _batches(self, window: list[tuple[int, GenerationRequest]]) -> Iterator[list[tuple[int, GenerationRequest]]]:
        """Requests of one way to write, of one adapter and of like length together."""
        window.sort(key=lambda one: (max_output_length(one[1].grammar), len(one[1].prefix_ids)))
        kinds = dict.fromkeys((one.canvas is not None, one.adapter) for _, one in window)
        for kind in sorted(kinds, key=lambda kind: (kind[0], kind[1] or "")):
            group = [one for one in window if (one[1].canvas is not None, one[1].adapter) == kind]
            for start in range(0, len(group), self._max_batch_size):
                yield group[start : start + self._max_batch_size]

    def _write(
        self, requests: Sequence[GenerationRequest], progress: Callable[[int], None] | None, watch: Watch | None
    ) -> list[list[int]]:
        """The outputs of one batch, all of them written in the same way."""
        model = self._model_with(requests[0].adapter)
        prefixes = [request.prefix_ids for request in requests]
        guides = [request.guide_ids if request.guided else None for request in requests]
        contexts = [request.context_ids for request in requests]
        if requests[0].canvas is not None:
            canvases = [Canvas(one.grammar, one.canvas, one.sampling) for one in requests if one.canvas is not None]
            return fill_canvases(model, prefixes, canvases, guides, progress, contexts)
        grammars, configs = [one.grammar for one in requests], [one.sampling for one in requests]
        return write_outputs(model, prefixes, grammars, configs, guides, progress, contexts, watch)

    def _model_with(self, name: str | None) -> PoetTransformer:
        if name is None:
            return self._model
        if name not in self._adapted:
            model = copy.deepcopy(self._model)
            merge_adapter(model, next(adapter for adapter in self._adapters if adapter.name == name))
            self._adapted[name] = model
        return self._adapted[name]

    def upsample(
        self, requests: Sequence[UpsamplingRequest], progress: Callable[[int, int], None] | None = None
    ) -> list[NDArray[np.int64]]:
        """Write the codes of pictures again in a larger size; see `Engine.upsample`."""
        self._check_open()
        if self._upsampler is None:
            self._upsampler = Bundle.open(self._bundle_dir).load_upsampler(self._device, self._dtype)
        for index, request in enumerate(requests):
            check_upsampling(request, self._upsampler.config, index=index)
        return upsample_codes(self._upsampler, requests, progress, self._max_batch_size)

    def _check_open(self) -> None:
        if self._closed:
            raise ConfigError("the engine must be open to generate; it was closed.")

    def close(self) -> None:
        """Release the weights; closing twice does no harm."""
        if not self._closed:
            self._closed = True
            self._upsampler = None
            self._adapted.clear()
            del self._model

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def load_engine(name: str, bundle_dir: str | Path, **options: Any) -> Engine:
    """Start an engine on a bundle.

    Args:
        name: "torch", or one that an installed package names in the entry-point group `poet.engines` ("vllm").
        bundle_dir: directory with config.json and model.safetensors.
        **options: the engine's own, such as `device`.

    Raises:
        ConfigError: there is no such engine, a package that it needs is not installed, or it does not take an option.
        CheckpointError: the directory holds no sound model.
    """
    installed = {entry.name: entry for entry in entry_points(group=ENTRY_POINT_GROUP)}
    factory: Any = TorchEngine if name == TorchEngine.name else _factory(name, installed)
    try:
        engine: Engine = factory(bundle_dir, **options)
    except ModuleNotFoundError as error:
        raise _not_installed(name, error) from error
    except TypeError as error:
        # Only a call that does not fit the signature ends in this frame; anything deeper is a defect of the engine.
        if error.__traceback__ is not None and error.__traceback__.tb_next is None:
            raise ConfigError(f"the engine {name!r} does not take these options: {error}.") from error
        raise
    return engine


def decodings_for(*, parallel: bool, upsampling: bool) -> list[str]:
    """What an engine must be started with for clips that are written in parallel or not, and made larger or not."""
    return ["parallel" if parallel else "autoregressive", *(["upsampling"] if upsampling else [])]


def _factory(name: str, installed: dict[str, EntryPoint]) -> Any:
    if name not in installed:
        known = ", ".join([TorchEngine.name, *sorted(installed)])
        raise ConfigError(f"engine must be one of {known}, got {name!r}.")
    try:
        return installed[name].load()
    except ModuleNotFoundError as error:
        raise _not_installed(name, error) from error


def _not_installed(name: str, error: ModuleNotFoundError) -> ConfigError:
    return ConfigError(
        f"the engine {name!r} needs the package {error.name!r}, which is not installed. For vllm, install "
        "Poet with its extra 'serve' (pip install 'openpoet[serve]'); or take 'torch', which is always there."
    )


def _as(indices: Sequence[int], watch: Watch, row: int, ids: Sequence[int]) -> None:
    watch(indices[row], ids)


def _count_from(before: int, progress: Callable[[int], None], written: int) -> None:
    progress(before + written)
