"""Outputs that vLLM writes one id after another, while more are asked for: the loop around its engine.

Knows ids, grammars and vLLM's requests; which engine is asked with what is `poet_serving.engine`'s business.
"""

from __future__ import annotations

import copy
import secrets
import uuid
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

from vllm import SamplingParams
from vllm.sampling_params import RequestOutputKind

from poet.errors import PoetError
from poet.generation.engine import GenerationRequest, Watch
from poet.generation.sampling import fold_seed
from poet.grammar import max_output_length
from poet.model.lora import Adapter
from poet_serving.adapters import adapter_requests
from poet_serving.grammar import grammar_arguments
from poet_serving.guidance import Half, guidance_arguments
from poet_serving.repetition import repetition_arguments

__all__ = ["OutputWriter", "Writer", "halves_of", "sampling_parameters"]


class Writer(Protocol):
    """What writes outputs step by step. Requests may be added between steps."""

    num_open: int
    """Requests that have been added and are not finished."""
    num_known: int
    """Ids of all requests so far; a text that ended early counts as written in full."""

    def add(self, index: int, request: GenerationRequest) -> None:
        """Take over a checked request, which the caller knows as `index`."""

    def step(self) -> list[tuple[int, list[int]]]:
        """Go one step on; returns index and output ids of the requests that it finished."""

    def abort(self) -> None:
        """Give up what is not finished: the engine stays usable."""


class OutputWriter:
    """A `Writer` of one id after another; guided requests are pairs.

    Args:
        vllm: an `LLMEngine` with Poet's causal model.
        adapters: that it was started with.
        watch: called after every step with each output that has grown.
    """

    def __init__(self, vllm: Any, adapters: Sequence[Adapter] = (), watch: Watch | None = None) -> None:
        self._vllm, self._adapters, self._watch = vllm, adapter_requests(adapters), watch
        self.num_open = self.num_known = 0
        self._indices: dict[str, int] = {}
        self._outputs: dict[str, list[int]] = {}
        self._longest: dict[str, int] = {}
        self._unfinished: dict[str, set[str]] = {}
        self._started: dict[str, str] = {}  # our name to vLLM's

    def add(self, index: int, request: GenerationRequest) -> None:
        """See `Writer.add`."""
        name, parameters = str(index), sampling_parameters(request)
        self._indices[name], self._longest[name] = index, max_output_length(request.grammar)
        self._unfinished[name] = set()
        self.num_open += 1
        for suffix, given, half in halves_of(request):
            own = copy.copy(parameters)
            own.extra_args = parameters.extra_args | half
            self._outputs[name + suffix] = []
            self._unfinished[name].add(name + suffix)
            self._started[name + suffix] = self._vllm.add_request(
                name + suffix,
                {"prompt_token_ids": list(given)},
                own,
                lora_request=self._adapters[request.adapter],
            )

    def step(self) -> list[tuple[int, list[int]]]:
        """See `Writer.step`.

        Raises:
            PoetError: a request and its guide did not write the same ids.
        """
        finished = []
        for change in self._vllm.step():
            half, new = change.request_id, change.outputs[0].token_ids
            name = half.removesuffix("-guide")
            self._outputs[half] += new
            if half == name:
                left = self._longest[name] - len(self._outputs[name]) if change.finished else 0
                self.num_known += len(new) + left
                if self._watch is not None and new:
                    self._watch(self._indices[name], self._outputs[name])
            if change.finished:
                del self._started[half]
                self._unfinished[name].remove(half)
                if not self._unfinished[name]:
                    finished.append((self._indices[name], self._close(name)))
        return finished

    def abort(self) -> None:
        """See `Writer.abort`."""
        if self._vllm.has_unfinished_requests():
            self._vllm.abort_request(list(self._started.values()), internal=True)

    def _close(self, name: str) -> list[int]:
        """The output of a request that is finished; nothing is kept of it."""
        output, guide = self._outputs.pop(name), self._outputs.pop(f"{name}-guide", None)
        for kept in (self._indices, self._longest, self._unfinished):
            del kept[name]
        self.num_open -= 1
        if guide is not None and guide != output:
            raise PoetError(
                f"request {name} and its guide must write the same ids, they did not. This is a defect; the torch "
                "engine writes such requests without pairs."
            )
        return output


def halves_of(
    request: GenerationRequest, *, guided: bool = True
) -> Iterator[tuple[str, Sequence[int], dict[str, Any]]]:
    """What vLLM is asked for a request: the end of its name, what it is given, and what marks it as half of a pair.

    It is given the earlier scenes of a film and the prefix.

    A request without guidance is asked for once, without any mark.

    Args:
        request: a checked one.
        guided: False asks for it without the guidance that it has: for a step that takes none.
    """
    if not guided or not request.guided or request.guide_ids is None:
        yield "", (*request.context_ids, *request.prefix_ids), {}
        return
    pair = uuid.uuid4().hex
    for suffix, prefix in (("", request.prefix_ids), ("-guide", request.guide_ids)):
        half = Half(pair, is_guide=bool(suffix), scale=float(request.sampling.guidance_scale))
        yield suffix, (*request.context_ids, *prefix), guidance_arguments(half)


def sampling_parameters(request: GenerationRequest) -> SamplingParams:
    """What vLLM is asked for a request with, besides its ids."""
    sampling = request.sampling
    arguments = grammar_arguments(request.grammar)
    arguments["extra_args"] |= repetition_arguments(sampling)
    return SamplingParams(
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        # Without one, vLLM would draw the same clip in every new process.
        seed=fold_seed(secrets.randbits(63) if sampling.seed is None else sampling.seed),
        ignore_eos=True,
        detokenize=False,
        output_kind=RequestOutputKind.DELTA,
        **arguments,
    )
