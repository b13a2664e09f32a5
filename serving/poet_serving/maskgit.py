"""Canvases in vLLM: every step of an output is a request to a pooling model, which draws ids on the worker.

The model is Poet's transformer with attention both ways over a whole request. A request is a prefix and its canvas as
it stands; its pooler reads the logits of the places that are asked for, draws an id for each and returns ids and
log-probabilities. What is kept of them is decided outside, by the same `Canvas` as in the reference. Requests of many
outputs, at different steps, make up one batch. A guided output has a second request in the same batch, whose logits
move it away (`poet_serving.scheduler` keeps the two together).

This module knows ids and logits; prefixes, tasks and codes belong to others.

Legend: T ids of a step over all requests, C hidden size, N places that a request asks for.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from vllm import PoolingParams
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.model_executor.layers.pooler.abstract import Pooler
from vllm.model_executor.models.interfaces_base import attn_type, default_pooling_type
from vllm.v1.pool.metadata import PoolingMetadata

from poet.errors import PoetError
from poet.generation.engine import GenerationRequest
from poet.generation.maskgit import Canvas, Logits, draw_places, guided_logits
from poet.generation.sampling import SamplingConfig
from poet.model.lora import Adapter
from poet_serving.adapters import adapter_requests
from poet_serving.guidance import Half, half_of_arguments
from poet_serving.vllm_model import BidirectionalDecoderLayer, PoetForCausalLM
from poet_serving.writing import halves_of

__all__ = ["CanvasFiller", "CanvasPooler", "PoetForCanvas"]

CANVAS_KEY: Final = "poet_canvas"
_TASK: Final = "token_classify"  # of vLLM's tasks the one that answers for every id


def canvas_arguments(prefix_len: int, canvas: Canvas) -> dict[str, Any]:
    """What a request's `extra_kwargs` must hold: the places that this step asks for and how to draw their ids."""
    asked = canvas.asked()
    sampling = canvas.sampling
    return {
        CANVAS_KEY: {
            "places": (prefix_len + asked).tolist(),
            "low": canvas.low[asked].tolist(),
            "high": canvas.high[asked].tolist(),
            "step": canvas.step,
            "temperature": sampling.temperature,
            "top_k": sampling.top_k,
            "top_p": sampling.top_p,
            "seed": sampling.seed,
        }
    }


class CanvasPooler(Pooler):  # type: ignore[misc]
    """Draws the ids that each request of a step asks for.

    Args:
        logits: (N, C) hidden states and a run of ids to the logits of those.
    """

    def __init__(self, logits: Callable[[Tensor, slice], Tensor]) -> None:
        super().__init__()
        self._logits = logits

    def get_supported_tasks(self) -> set[str]:
        """The one of vLLM's tasks that canvases are asked for with."""
        return {_TASK}

    def forward(self, hidden_states: Tensor, pooling_metadata: PoolingMetadata) -> list[Tensor]:
        """Answer every request of a step.

        Args:
            hidden_states: (T, C) of all requests, one after another.
            pooling_metadata: says where each request's lie, and what it asks for.

        Returns:
            For each request (N, 2) float32, id and log-probability; (0, 2) for a guide and for one that asks for
            nothing.

        Raises:
            PoetError: a request is without its guide in this step, or a guide without its request.
        """
        lengths = pooling_metadata.get_pooling_cursor().num_scheduled_tokens_cpu.tolist()
        asked = [self._of_request(params) for params in pooling_metadata.pooling_params]
        starts = np.cumsum([0, *lengths])
        guides = {half.pair: row for row, (_, half) in enumerate(asked) if half is not None and half.is_guide}
        answers = []
        for row, (canvas, half) in enumerate(asked):
            if not canvas["places"] or (half is not None and half.is_guide):
                answers.append(torch.zeros(0, 2))
                continue
            logits = self._before(hidden_states, int(starts[row]), canvas)
            if half is not None:
                other = guides.pop(half.pair, None)
                if other is None:
                    raise _apart(half.pair)
                steered_from = self._before(hidden_states, int(starts[other]), asked[other][0])
                logits = guided_logits(logits, steered_from, half.scale)
            sampling = SamplingConfig(**{name: canvas[name] for name in ("temperature", "top_k", "top_p", "seed")})
            low, high = np.array(canvas["low"]), np.array(canvas["high"])
            ids, sure = draw_places(logits, low, high, sampling, canvas["step"])
            answers.append(torch.from_numpy(np.stack([ids.astype(np.float32), sure], axis=1)))
        if guides:
            raise _apart(next(iter(guides)))
        return answers

    def _before(self, hidden_states: Tensor, start: int, canvas: Mapping[str, Any]) -> Logits:
        """The prediction for a place is read one place before it."""
        places = torch.tensor(canvas["places"], dtype=torch.int64, device=hidden_states.device) + (start - 1)
        states = hidden_states[places]
        return lambda places, ids: self._logits(states[places], ids)

    @staticmethod
    def _of_request(params: PoolingParams) -> tuple[Mapping[str, Any], Half | None]:
        arguments = params.extra_kwargs or {}
        # vLLM measures its memory with requests of its own, which ask for nothing.
        return arguments.get(CANVAS_KEY, {"places": []}), half_of_arguments(arguments)


def _apart(pair: str) -> PoetError:
    return PoetError(
        f"guided canvases must be in every step with their guides, pair {pair} was not. Start vLLM with "
        "poet_serving.scheduler.PairScheduler, which keeps them together."
    )


@attn_type("encoder_only")
@default_pooling_type(tok_pooling_type="ALL")
class PoetForCanvas(PoetForCausalLM):
    """The class behind the architecture of canvases: a bundle's weights, read both ways, with `CanvasPooler`."""

    is_pooling_model = True
    layer_type = BidirectionalDecoderLayer

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self.pooler = CanvasPooler(self._score)

    def _score(self, hidden_states: Tensor, ids: slice) -> Tensor:
        """(N, C) to the logits of a run of ids."""
        if get_tensor_model_parallel_world_size() > 1:  # each rank holds a part of the vocabulary
            scores: Tensor = self.compute_logits(hidden_states)[:, ids]
            return scores
        return functional.linear(hidden_states, self.lm_head.weight[ids])


class CanvasFiller:
    """A `poet_serving.writing.Writer` of canvases: as many as fit a step, each to its end, so the first are done early.

    Args:
        vllm: an `LLMEngine` that runs `PoetForCanvas`.
        max_num_seqs: requests of a step; a guided output counts twice.
        adapters: that it was started with.
    """

    def __init__(self, vllm: Any, max_num_seqs: int, adapters: Sequence[Adapter] = ()) -> None:
        self._vllm, self._adapters = vllm, adapter_requests(adapters)
        self._slots = max_num_seqs
        self.num_open = self.num_known = 0
        self._waiting: deque[tuple[int, GenerationRequest, Canvas]] = deque()
        self._running: dict[int, tuple[GenerationRequest, Canvas]] = {}
        self._started: dict[int, list[str]] = {}

    def add(self, index: int, request: GenerationRequest) -> None:
        """See `Writer.add`."""
        assert request.canvas is not None
        canvas = Canvas(request.grammar, request.canvas, request.sampling)
        self.num_known += canvas.num_known
        self.num_open += 1
        self._waiting.append((index, request, canvas))

    def step(self) -> list[tuple[int, list[int]]]:
        """See `Writer.step`."""
        finished = self._start()
        for answer in self._vllm.step() if self._running else []:
            index, is_guide = _index_of(answer.request_id)
            if is_guide or not answer.finished:
                continue
            request, canvas = self._running[index]
            drawn, sure = answer.outputs.data.numpy().T
            before = canvas.num_known
            canvas.settle(drawn.astype(np.int64), sure)
            self.num_known += canvas.num_known - before
            if canvas.done:
                del self._running[index], self._started[index]
                self._slots += 1 + request.guided
                finished.append(self._close(index, canvas))
            else:
                self._ask(index)
        return finished

    def abort(self) -> None:
        """See `Writer.abort`."""
        if self._vllm.has_unfinished_requests():
            self._vllm.abort_request([name for names in self._started.values() for name in names], internal=True)

    def _start(self) -> list[tuple[int, list[int]]]:
        """Fill the free slots; returns canvases that had nothing to fill."""
        finished = []
        while self._waiting and self._slots >= 1 + self._waiting[0][1].guided:
            index, request, canvas = self._waiting.popleft()
            if canvas.done:
                finished.append(self._close(index, canvas))
                continue
            self._slots -= 1 + request.guided
            self._running[index] = request, canvas
            self._ask(index)
        return finished

    def _ask(self, index: int) -> None:
        """Ask for the next step of a canvas."""
        request, canvas = self._running[index]
        self._started[index] = []
        for suffix, given, half in halves_of(request, guided=canvas.takes_guidance):
            arguments = canvas_arguments(len(given), canvas) | half
            params = PoolingParams(task=_TASK, extra_kwargs=arguments, skip_reading_prefix_cache=True)
            prompt = {"prompt_token_ids": [*given, *canvas.shown()]}
            name, adapter = f"{index}.{canvas.step}{suffix}", self._adapters[request.adapter]
            self._started[index].append(self._vllm.add_request(name, prompt, params, lora_request=adapter))

    def _close(self, index: int, canvas: Canvas) -> tuple[int, list[int]]:
        self.num_open -= 1
        ids: list[int] = canvas.ids.tolist()
        return index, ids


def _index_of(name: str) -> tuple[int, bool]:
    return int(name.partition(".")[0]), name.endswith("-guide")
