"""The upsampler in vLLM: every step of a canvas is a request to a pooling model, which draws codes on the worker.

A request's prompt is the canvas as it stands, one id a place; what belongs to it (the smaller codes, the text, how to
draw) comes with its pooling parameters. The model hands the ids on as they are: the upsampler's attention goes through
windows of a grid, of which vLLM's layers know nothing, so the pooler, which knows where each request begins, runs it,
for all requests of a step at once. Guidance is a matter of one request. What is kept of the draws is decided outside,
by the same `UpsamplingCanvas` as in the reference.

Legend: S ids of a step over all requests, N unknown places of a request.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from vllm import PoolingParams
from vllm.config import VllmConfig
from vllm.model_executor.layers.pooler.abstract import Pooler
from vllm.model_executor.models.interfaces import IsAttentionFree
from vllm.model_executor.models.interfaces_base import attn_type, default_pooling_type
from vllm.v1.pool.metadata import PoolingMetadata

from poet.generation.upsample import Upsampling, UpsamplingCanvas, UpsamplingRequest, UpsamplingStep, draw_step
from poet.model.superresolution import UNKNOWN, Upsampler, UpsamplerConfig

__all__ = ["PoetUpsampler", "UpsamplingPooler", "upsample_codes"]

UPSAMPLING_KEY: Final = "poet_upsampling"
_TASK: Final = "token_classify"  # of vLLM's tasks the one that answers for every id
_FIRST: Final = 1  # the id of code 0; 0 stands where no code is known


def step_arguments(step: UpsamplingStep) -> dict[str, Any]:
    """What a request's `extra_kwargs` must hold besides its prompt."""
    request = step.request
    return {
        UPSAMPLING_KEY: {
            "low": request.low.tolist(),
            "text": list(request.text),
            "settings": dataclasses.asdict(request.settings),
            "number": step.number,
        }
    }


def step_prompt(step: UpsamplingStep) -> list[int]:
    """The canvas as ids."""
    ids: list[int] = np.where(step.high == UNKNOWN, 0, step.high + _FIRST).ravel().tolist()
    return ids


def _step_of(arguments: Mapping[str, Any], ids: Tensor, scale: int) -> UpsamplingStep:
    """The inverse of `step_arguments` and `step_prompt`."""
    low = np.array(arguments["low"], np.int64)
    frames, height, width = low.shape
    settings = Upsampling(**arguments["settings"])
    high = ids.round().long().cpu().numpy().reshape(frames, height * scale, width * scale) - _FIRST
    high[high < 0] = UNKNOWN
    request = UpsamplingRequest(low=low, text=tuple(arguments["text"]), settings=settings)
    return UpsamplingStep(request=request, high=high, number=arguments["number"])


class UpsamplingPooler(Pooler):  # type: ignore[misc]
    """Draws the codes that each request of a step asks for.

    Args:
        model: in evaluation mode.
    """

    def __init__(self, model: Upsampler) -> None:
        super().__init__()
        self._model = model

    def get_supported_tasks(self) -> set[str]:
        """The one of vLLM's tasks that canvases are asked for with."""
        return {_TASK}

    def forward(self, hidden_states: Tensor, pooling_metadata: PoolingMetadata) -> list[Tensor]:
        """Answer every request of a step.

        Args:
            hidden_states: (S, 1) ids of all requests, one after another.
            pooling_metadata: says where each request's lie, and what it asks for.

        Returns:
            For each request (N, 2) float64, code and log-probability; (0, 2) for one that asks for nothing.
        """
        lengths = pooling_metadata.get_pooling_cursor().num_scheduled_tokens_cpu.tolist()
        # vLLM measures its memory with requests of its own, which ask for nothing.
        asked = [(params.extra_kwargs or {}).get(UPSAMPLING_KEY) for params in pooling_metadata.pooling_params]
        parts = hidden_states[:, 0].split(lengths)
        scale = self._model.config.scale
        steps = {
            row: _step_of(arguments, parts[row], scale) for row, arguments in enumerate(asked) if arguments is not None
        }
        answers = [torch.zeros(0, 2, dtype=torch.float64) for _ in asked]
        for row, (codes, sure) in zip(steps, draw_step(self._model, list(steps.values())), strict=True):
            answers[row] = torch.from_numpy(np.stack([codes.astype(np.float64), sure.astype(np.float64)], axis=1))
        return answers


@attn_type("attention_free")
@default_pooling_type(tok_pooling_type="ALL")
class PoetUpsampler(nn.Module, IsAttentionFree):  # type: ignore[misc]
    """The class behind the architecture of a bundle's upsampler/."""

    is_pooling_model = True

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        self.upsampler = Upsampler(UpsamplerConfig.from_dict(vllm_config.model_config.hf_config.upsampler)).eval()
        self.pooler = UpsamplingPooler(self.upsampler)

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        """(S,) to (S, 1): the ids themselves, exact in float32."""
        return input_ids[:, None].float()

    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor,
        intermediate_tensors: Any | None = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor:
        """(S,) ids to (S, 1) for the pooler."""
        return self.embed_input_ids(input_ids)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Take over the weights of model.safetensors, all of them and no others.

        Raises:
            RuntimeError: they are not those of the config.
        """
        tensors = dict(weights)
        self.upsampler.load_state_dict(tensors)
        return {f"upsampler.{name}" for name in tensors}


def upsample_codes(
    vllm: Any,
    requests: Sequence[UpsamplingRequest],
    config: UpsamplerConfig,
    max_num_seqs: int,
    progress: Callable[[int, int], None] | None = None,
) -> list[NDArray[np.int64]]:
    """Write the codes of the larger size of all requests.

    Args:
        vllm: an `LLMEngine` that runs `PoetUpsampler`.
        requests: checked ones.
        config: the upsampler's.
        max_num_seqs: clips of a step.
        progress: called after every step with the codes known and those that there are.

    Returns:
        (T, H, W) codes of each clip.
    """
    canvases = [UpsamplingCanvas(request, config) for request in requests]
    waiting = deque(range(len(canvases)))
    running: set[int] = set()
    started: list[str] = []
    total = sum(canvas.num_places for canvas in canvases)

    def ask(row: int) -> None:
        step = canvases[row].step()
        params = PoolingParams(task=_TASK, extra_kwargs=step_arguments(step), skip_reading_prefix_cache=True)
        started.append(vllm.add_request(f"{row}.{step.number}", {"prompt_token_ids": step_prompt(step)}, params))

    try:
        while waiting or running:
            # As many clips as fit a step, each to its end, so that the first are done early.
            while waiting and len(running) < max_num_seqs:
                running.add(waiting[0])
                ask(waiting.popleft())
            for answer in vllm.step():
                if not answer.finished:
                    continue
                row = int(answer.request_id.partition(".")[0])
                drawn, sure = answer.outputs.data.numpy().T
                canvases[row].settle(drawn.astype(np.int64), sure.astype(np.float32))
                if canvases[row].done:
                    running.remove(row)
                else:
                    ask(row)
            if progress is not None:
                progress(sum(canvas.num_known for canvas in canvases), total)
    finally:
        if vllm.has_unfinished_requests():  # Ctrl-C, or progress() raised: the engine stays usable
            vllm.abort_request(started, internal=True)
    return [canvas.codes for canvas in canvases]
