"""Layers of a film's model in vLLM that see one scene alone, and keep no pages of the scenes before it.

A request is one scene of a film behind all earlier ones. Layer 0 keeps keys and values of all of them, the layers
above those of the last scene: `ceil(T / page) + (L - 1) * ceil(scene / page)` pages instead of `L * ceil(T / page)`.
vLLM's own local attention frees pages only once they have been filled; here those of earlier scenes are never taken,
because no layer above the first computes anything for them. This module knows pages and layers; ids and prompts belong
to others.
"""

import functools
import itertools
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from vllm.config import VllmConfig
from vllm.model_executor.layers.attention import EncoderOnlyAttention
from vllm.v1.attention.backend import subclass_attention_backend
from vllm.v1.core.single_type_kv_cache_manager import ChunkedLocalAttentionManager
from vllm.v1.kv_cache_interface import ChunkedLocalAttentionSpec, KVCacheSpec, get_kv_quant_mode
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

from poet_serving.attention import PrefixAttention

__all__ = [
    "CanvasAttention",
    "SceneAttention",
    "ScenePages",
    "SceneSpec",
    "Stretch",
    "attend_to_all_scenes",
    "register_pages",
]


@dataclass(frozen=True, kw_only=True)
class SceneSpec(ChunkedLocalAttentionSpec):  # type: ignore[misc]
    """The cache of a layer that sees a request's last scene alone; `attention_chunk_size` is the scene's length."""

    def max_admission_blocks_per_request(self, max_in_flight_tokens: int, max_model_len: int) -> int:
        """Pages that one request ever holds."""
        del max_in_flight_tokens, max_model_len
        return -(-self.attention_chunk_size // self.block_size)


class ScenePages(ChunkedLocalAttentionManager):  # type: ignore[misc]
    """Gives pages to a request's last scene; the null page stands for those of earlier scenes."""

    def pages_before(self, num_tokens: int) -> int:
        """Return how many pages of a request with so many ids belong to scenes before its last."""
        scene: int = self.attention_chunk_size
        return int(max(num_tokens - 1, 0) // scene * scene // self.block_size)

    def get_num_blocks_to_allocate(self, request_id: str, num_tokens: int, *arguments: Any, **keywords: Any) -> int:
        """Return how many pages a request lacks for so many ids."""
        del arguments, keywords
        held = max(len(self.req_to_blocks.get(request_id, ())), self.pages_before(num_tokens))
        return int(max(-(-num_tokens // self.block_size) - held, 0))

    def allocate_new_blocks(self, request_id: str, num_tokens: int, num_tokens_main_model: int) -> list[Any]:
        """Give a request the pages that it lacks for so many ids; return the new ones, null pages among them."""
        pages = self.req_to_blocks[request_id]
        skipped = [self._null_block] * (self.pages_before(num_tokens) - len(pages))
        pages.extend(skipped)
        return skipped + list(super().allocate_new_blocks(request_id, num_tokens, num_tokens_main_model))


class SceneAttention(PrefixAttention):
    """`PrefixAttention` within the last scene of each request; arguments as there, with a `scene_length`."""

    within_scene = True

    def __init__(self, num_heads: int, head_size: int, scale: float, *, scene_length: int, **keywords: Any) -> None:
        super().__init__(num_heads, head_size, scale, scene_length=scene_length, **keywords)
        self.scene_length = scene_length

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> KVCacheSpec | None:
        """Return the layer's cache layout."""
        return SceneSpec(
            block_size=vllm_config.cache_config.block_size,
            num_kv_heads=self.num_kv_heads,
            head_size=self.head_size,
            dtype=self.kv_cache_torch_dtype,
            kv_quant_mode=get_kv_quant_mode(self.kv_cache_dtype),
            attention_chunk_size=self.scene_length,
        )


class Stretch(NamedTuple):
    """A request of a step of canvases.

    Attributes:
        queries: places of its last scene among the ids that are kept.
        keys: places of all its scenes in the step's flat list of ids.
    """

    queries: slice
    keys: slice


@functools.cache
def _canvas_backend(backend: type[Any], scene_length: int) -> type[Any]:
    """Derive from vLLM's backend for attention both ways one whose steps are the last scene of every request.

    What its builder makes has two attributes more: `kept`, the places of those ids (None: all), and `stretches`, with
    which layer 0 looks at all scenes.
    """

    class CanvasMetadataBuilder(backend.get_builder_cls()):  # type: ignore[misc]
        """Leaves earlier scenes out of a step before the backend describes it to its kernel."""

        def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> Any:
            step = common_attn_metadata
            starts = step.query_start_loc_cpu.tolist()
            keys = [slice(*pair) for pair in itertools.pairwise(starts)]
            lengths = [part.stop - part.start for part in keys]
            earlier = [max(length - 1, 0) // scene_length * scene_length for length in lengths]
            if not any(earlier):
                metadata = super().build(common_prefix_len, step, fast_build)
                metadata.kept, metadata.stretches = None, ()
                return metadata
            own = [length - before for length, before in zip(lengths, earlier, strict=True)]
            ends = torch.tensor([0, *own], dtype=torch.int32).cumsum(0, dtype=torch.int32)
            sizes = torch.tensor(own, dtype=torch.int32)
            last = replace(
                step,
                query_start_loc=ends,
                query_start_loc_cpu=ends,
                seq_lens=sizes,
                seq_lens_cpu_upper_bound=sizes,
                num_actual_tokens=int(ends[-1]),
                max_query_len=max(own),
                max_seq_len=max(own),
                positions=torch.cat([torch.arange(size) for size in own]),
                slot_mapping=step.slot_mapping.new_zeros(int(ends[-1])),
            )
            metadata = super().build(common_prefix_len, last, fast_build)
            metadata.kept = torch.cat(
                [torch.arange(part.stop - size, part.stop) for part, size in zip(keys, own, strict=True)]
            )
            queries = [slice(*pair) for pair in itertools.pairwise(ends.tolist())]
            metadata.stretches = tuple(map(Stretch, queries, keys))
            return metadata

    derived: type[Any] = subclass_attention_backend("Canvas", backend, CanvasMetadataBuilder)
    return derived


class CanvasAttention(EncoderOnlyAttention):  # type: ignore[misc]
    """Attention both ways over the last scene of each request, without a cache.

    Args:
        arguments: vLLM's.
        scene_length: Ids of every scene of a film.
        keywords: vLLM's.
    """

    def __init__(self, *arguments: Any, scene_length: int, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self.attn_backend: Any = _canvas_backend(self.get_attn_backend(), scene_length)


def attend_to_all_scenes(query: Tensor, key: Tensor, value: Tensor, stretches: tuple[Stretch, ...]) -> Tensor:
    """Let the last scene of each request look at all of its scenes, both ways: layer 0 of a film's canvases.

    Args:
        query: (K, H, D) of the last scenes.
        key: (T, G, D) of all scenes; G divides H.
        value: (T, G, D).
        stretches: what belongs to which request.

    Returns:
        (K, H, D).
    """
    seen = torch.empty_like(query)
    for queries, keys in stretches:
        own, all_keys, all_values = (part.transpose(0, 1)[None] for part in (query[queries], key[keys], value[keys]))
        seen[queries] = scaled_dot_product_attention(own, all_keys, all_values, enable_gqa=True)[0].transpose(0, 1)
    return seen


def register_pages() -> None:
    """Make `ScenePages` known to vLLM; twice does no harm."""
    KVCacheSpecRegistry._ensure_registered()
    KVCacheSpecRegistry.register(SceneSpec, ScenePages, uniform_type_base_spec=ChunkedLocalAttentionSpec)
