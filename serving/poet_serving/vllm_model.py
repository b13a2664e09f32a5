"""Poet's transformer in vLLM: vLLM's own Qwen3 layers under Poet's rule of who sees whom.

Weights carry Hugging Face's Qwen3 names, so vLLM's loader takes a bundle's `model.safetensors` as it is. This module
knows layers only; prompts, grammars and sampling belong to others.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig, get_current_vllm_config
from vllm.distributed import get_pp_group, get_tensor_model_parallel_world_size
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.attention import EncoderOnlyAttention
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import QKVParallelLinear, RowParallelLinear
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.rotary_embedding import get_rope
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.models.qwen2 import Qwen2MLP, Qwen2Model
from vllm.model_executor.models.qwen3 import Qwen3Attention, Qwen3DecoderLayer, Qwen3ForCausalLM
from vllm.model_executor.models.utils import PPMissingLayer, extract_layer_index, maybe_prefix

from poet.errors import ConfigError
from poet_serving.adapters import AdapterRows, adapted_product
from poet_serving.attention import PrefixAttention, is_compiled
from poet_serving.scenes import CanvasAttention, SceneAttention, attend_to_all_scenes, register_pages
from poet_serving.settings import FULL_ATTENTION_KEY, PROMPT_LENGTHS_KEY

__all__ = [
    "BidirectionalDecoderLayer",
    "DirectLayer",
    "PoetAttention",
    "PoetDecoderLayer",
    "PoetForCausalLM",
    "PoetModel",
    "takes_films",
]


class PoetAttention(Qwen3Attention):  # type: ignore[misc]
    """Qwen3's attention (grouped queries, RMS norm on q and k, rotary positions) with `PrefixAttention` inside.

    Built here instead of by the parent, which leaves no choice of the inner layer; the parent's `forward` is used.

    Args:
        config: The bundle's Hugging Face configuration.
        cache_config: vLLM's.
        quant_config: vLLM's, None for plain weights.
        prefix: The layer's name in the model.
    """

    def __init__(self, config: Any, cache_config: Any, quant_config: Any, prefix: str) -> None:
        nn.Module.__init__(self)
        ranks = get_tensor_model_parallel_world_size()
        self.hidden_size = config.hidden_size
        self.total_num_heads = config.num_attention_heads
        self.total_num_kv_heads = config.num_key_value_heads
        self.num_heads = self.total_num_heads // ranks
        self.num_kv_heads = max(1, self.total_num_kv_heads // ranks)
        self.head_dim = config.head_dim
        self.q_size = self.num_heads * self.head_dim
        self.kv_size = self.num_kv_heads * self.head_dim
        self.scaling = self.head_dim**-0.5
        self.qkv_proj = QKVParallelLinear(
            self.hidden_size,
            self.head_dim,
            self.total_num_heads,
            self.total_num_kv_heads,
            bias=False,
            quant_config=quant_config,
            prefix=f"{prefix}.qkv_proj",
        )
        self.o_proj = RowParallelLinear(
            self.total_num_heads * self.head_dim,
            self.hidden_size,
            bias=False,
            quant_config=quant_config,
            prefix=f"{prefix}.o_proj",
        )
        self.rotary_emb = get_rope(
            self.head_dim,
            max_position=config.max_position_embeddings,
            rope_parameters=config.rope_parameters,
        )
        inner, options = self.choose_inner(config, prefix)
        self.attn = inner(
            self.num_heads,
            self.head_dim,
            self.scaling,
            num_kv_heads=self.num_kv_heads,
            cache_config=cache_config,
            quant_config=quant_config,
            prefix=f"{prefix}.attn",
            **options,
        )
        self.q_norm = RMSNorm(self.head_dim, eps=config.rms_norm_eps)
        self.k_norm = RMSNorm(self.head_dim, eps=config.rms_norm_eps)

    @staticmethod
    def choose_inner(config: Any, prefix: str) -> tuple[type[Any], dict[str, Any]]:
        """Return the inner layer and its options: for films, layer 0 sees all scenes and the others the last one."""
        if not takes_films(get_current_vllm_config()):
            return PrefixAttention, {}
        inner = PrefixAttention if extract_layer_index(prefix) == 0 else SceneAttention
        return inner, {"scene_length": config.scene_length}


class BidirectionalAttention(PoetAttention):
    """The same over a whole request both ways, without a cache; arguments as there."""

    @staticmethod
    def choose_inner(config: Any, prefix: str) -> tuple[type[Any], dict[str, Any]]:
        """Return the inner layer and its options."""
        if not takes_films(get_current_vllm_config()):
            return EncoderOnlyAttention, {}
        return CanvasAttention, {"scene_length": config.scene_length}


class PoetDecoderLayer(Qwen3DecoderLayer):  # type: ignore[misc]
    """Qwen3's layer with `PoetAttention`; arguments as there."""

    attention_type: type[PoetAttention] = PoetAttention

    def __init__(
        self, config: Any, cache_config: Any | None = None, quant_config: Any | None = None, prefix: str = ""
    ) -> None:
        nn.Module.__init__(self)
        self.hidden_size = config.hidden_size
        self.self_attn = self.attention_type(config, cache_config, quant_config, f"{prefix}.self_attn")
        self.mlp = Qwen2MLP(
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            hidden_act=config.hidden_act,
            quant_config=quant_config,
            prefix=f"{prefix}.mlp",
        )
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)


class BidirectionalDecoderLayer(PoetDecoderLayer):
    """The layer of canvases."""

    attention_type = BidirectionalAttention


class DirectLayer:
    """One layer of a step, straight on vLLM's CPU kernels.

    vLLM counts on its compiler to fuse norms and to skip the layers of modules and dispatch around each kernel.
    Compiling takes longer than most calls of `poet generate`; uncompiled, more than half of a small model's step goes
    into those. The same kernels called one after another make the step about a third shorter.

    Args:
        layer: with its weights loaded and its cache allocated.
        adapters: which ids of a step are whose adapter's.
    """

    __slots__ = (
        "adapters",
        "attention",
        "down",
        "ffn_size",
        "gate_up",
        "heads",
        "input_norm",
        "key_norm",
        "name",
        "output",
        "output_norm",
        "queries_keys_values",
        "query_norm",
        "rotary",
        "sizes",
    )

    def __init__(self, layer: PoetDecoderLayer, adapters: AdapterRows) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self.adapters = adapters
        self.attention = attention.attn
        self.name = attention.attn.layer_name
        self.heads = attention.num_heads, attention.num_kv_heads, attention.head_dim
        self.sizes = attention.q_size, attention.kv_size, attention.kv_size
        self.rotary = attention.rotary_emb.cos_sin_cache, attention.rotary_emb.is_neox_style
        self.queries_keys_values = _linear(attention.qkv_proj, adapters)
        self.output = _linear(attention.o_proj, adapters)
        self.gate_up = _linear(mlp.gate_up_proj, adapters)
        self.down = _linear(mlp.down_proj, adapters)
        self.ffn_size = getattr(mlp.down_proj, "base_layer", mlp.down_proj).input_size
        self.input_norm = _weight_and_epsilon(layer.input_layernorm)
        self.output_norm = _weight_and_epsilon(layer.post_attention_layernorm)
        self.query_norm = _weight_and_epsilon(attention.q_norm)
        self.key_norm = _weight_and_epsilon(attention.k_norm)

    def __call__(
        self,
        change_TC: Tensor,
        stream_TC: Tensor,
        positions: Tensor,
        metadata: Any,
        slots: Tensor | None,
        kept: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Add the change that the layer below made to the residual stream, and compute this layer's.

        Args:
            change_TC: overwritten.
            stream_TC: the residual stream; changed in place.
            positions: (T,) int64.
            metadata: of the step, from the attention backend's builder.
            slots: (T,) where each id's key and value go in the cache; None where there is none.
            kept: (K,) places of the ids that go on from here; of the others only keys and values are wanted. None: all.

        Returns:
            (K, C) this layer's change, of which the stream holds the attention's part already, and the (K, C) stream.
        """
        kernels = torch.ops._C
        num_heads, num_kv_heads, head_dim = self.heads
        kernels.fused_add_rms_norm(change_TC, stream_TC, *self.input_norm)
        query, key, value = self.queries_keys_values(change_TC).split(self.sizes, dim=-1)
        query = _normed(query.reshape(-1, head_dim), self.query_norm)
        key = _normed(key.reshape(-1, head_dim), self.key_norm)
        kernels.rotary_embedding(
            positions, query.view(-1, self.sizes[0]), key.view(-1, self.sizes[1]), head_dim, *self.rotary
        )
        attention = self.attention
        query, key = query.view(-1, num_heads, head_dim), key.view(-1, num_kv_heads, head_dim)
        value = value.view(-1, num_kv_heads, head_dim)
        if slots is not None:
            attention.impl.do_kv_cache_update(attention, key, value, attention.kv_cache, slots)
        if kept is not None:
            query, stream_TC = query[kept], stream_TC[kept]
            self.adapters.keep(kept)  # now: this layer's other products are of these ids already
        if kept is not None and (stretches := getattr(metadata, "stretches", ())):
            seen = attend_to_all_scenes(query, key, value, stretches)
        else:
            seen = torch.empty_like(query)
            attention.impl.forward(attention, query, key, value, attention.kv_cache, metadata, seen)
        change_TC = self.output(seen.view(-1, self.sizes[0]))
        kernels.fused_add_rms_norm(change_TC, stream_TC, *self.output_norm)
        gate, up = self.gate_up(change_TC).split(self.ffn_size, dim=-1)
        return self.down(functional.silu(gate).mul_(up)), stream_TC


def _linear(projection: Any, adapters: AdapterRows) -> Callable[[Tensor], Tensor]:
    """The product with a projection's weight, by the kernel that vLLM has packed it for, and with its adapters'."""
    base = getattr(projection, "base_layer", projection)
    product = functools.partial(base.cpu_linear, weight=base.weight, bias=None)
    return product if base is projection else adapted_product(product, projection, adapters)


def _weight_and_epsilon(norm: RMSNorm) -> tuple[Tensor, float]:
    return norm.weight.data, norm.variance_epsilon


def _normed(x: Tensor, weight_and_epsilon: tuple[Tensor, float]) -> Tensor:
    normed = torch.empty_like(x)
    torch.ops._C.rms_norm(normed, x, *weight_and_epsilon)
    return normed


def takes_films(config: VllmConfig) -> bool:
    """Whether requests may be longer than a scene, and the layers above the first see the last scene alone."""
    model = config.model_config
    return bool(
        model.max_model_len > model.hf_config.scene_length and not getattr(model.hf_config, FULL_ATTENTION_KEY, False)
    )


def _takes_direct_layers(config: VllmConfig) -> bool:
    """Whether nothing stands between the kernels: no compiler, quantisation or other ranks."""
    alone = get_tensor_model_parallel_world_size() == 1 and get_pp_group().world_size == 1
    return alone and not is_compiled() and config.quant_config is None


@support_torch_compile(
    dynamic_arg_dims={"input_ids": 0, "positions": -1, "intermediate_tensors": 0, "inputs_embeds": 0}
)
class PoetModel(Qwen2Model):  # type: ignore[misc]
    """Embedding, `PoetDecoderLayer`s and the last norm."""

    def __init__(
        self, *, vllm_config: VllmConfig, prefix: str = "", layer_type: type[PoetDecoderLayer] = PoetDecoderLayer
    ) -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix, decoder_layer_type=layer_type)
        self.takes_direct_layers = _takes_direct_layers(vllm_config)
        if takes_films(vllm_config) and not self.takes_direct_layers:
            raise ConfigError(
                "films need layers that are neither compiled, quantised nor spread over ranks: earlier scenes pass the "
                "first one alone. Start vLLM with enforce_eager and one rank."
            )
        self.direct_layers: list[DirectLayer] = []
        self.adapter_rows = AdapterRows()

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: Any | None = None,
        inputs_embeds: Tensor | None = None,
    ) -> Any:
        """Compute the hidden states of one step.

        Args:
            input_ids: (T,) ids of all requests, one after another.
            positions: (T,) int64.
            intermediate_tensors: from the rank before this one, where layers are spread over ranks.
            inputs_embeds: (T, C) in place of ids.

        Returns:
            (T, C) after the last norm.
        """
        context = get_forward_context()
        if not self.takes_direct_layers or context.attn_metadata is None or input_ids is None:
            return super().forward(input_ids, positions, intermediate_tensors, inputs_embeds)
        if not self.direct_layers:  # now, when weights are packed and caches allocated
            self.direct_layers = [DirectLayer(layer, self.adapter_rows) for layer in self.layers]
        # vLLM keeps in every adapted layer the one table of which id is whose.
        table = getattr(self.layers[0].self_attn.qkv_proj, "punica_wrapper", None)
        if table is not None:
            self.adapter_rows.update(table.token_lora_indices)
        change_TC = self.embed_tokens(input_ids)
        stream_TC = torch.zeros_like(change_TC)
        first, *others = self.direct_layers
        metadata = context.attn_metadata[first.name]
        kept = getattr(metadata, "kept", None)
        slots = context.slot_mapping.get(first.name)
        change_TC, stream_TC = first(change_TC, stream_TC, positions, metadata, slots, kept)
        if kept is not None:  # earlier scenes end here
            positions = positions[kept]
        for layer in others:
            slots = context.slot_mapping.get(layer.name)
            if kept is not None and slots is not None:
                slots = slots[kept]
            change_TC, stream_TC = layer(change_TC, stream_TC, positions, context.attn_metadata[layer.name], slots)
        torch.ops._C.fused_add_rms_norm(change_TC, stream_TC, *_weight_and_epsilon(self.norm))
        if kept is None:
            return change_TC
        # vLLM looks for the last id of each request where it was.
        return change_TC.new_zeros(len(input_ids), change_TC.shape[1]).index_copy_(0, kept, change_TC)


class PoetForCausalLM(Qwen3ForCausalLM):  # type: ignore[misc]
    """The class behind `architectures: ["PoetForCausalLM"]` of a bundle's `config.json`.

    Raises:
        ConfigError: vLLM would not tell attention how long prompts are.
    """

    layer_type: type[PoetDecoderLayer] = PoetDecoderLayer
    embedding_modules: dict[str, str] = {}  # adapters change the layers' matrices alone  # noqa: RUF012

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        nn.Module.__init__(self)
        config = vllm_config.model_config.hf_config
        if getattr(config, PROMPT_LENGTHS_KEY, None) is None:
            raise ConfigError(
                f"Poet's model must be told how long prompts are, but the configuration key {PROMPT_LENGTHS_KEY!r} is "
                f"not set. Start vLLM with hf_overrides={{{PROMPT_LENGTHS_KEY!r}: 1}}."
            )
        register_pages()
        self.config = config
        self.vllm_config = vllm_config
        self.quant_config = vllm_config.quant_config
        self.model = PoetModel(
            vllm_config=vllm_config, prefix=maybe_prefix(prefix, "model"), layer_type=self.layer_type
        )
        if get_pp_group().is_last_rank:
            self.lm_head = ParallelLMHead(
                config.vocab_size,
                config.hidden_size,
                quant_config=self.quant_config,
                prefix=maybe_prefix(prefix, "lm_head"),
            )
            if config.tie_word_embeddings:
                self.lm_head = self.lm_head.tie_weights(self.model.embed_tokens)
        else:
            self.lm_head = PPMissingLayer()
        self.logits_processor = LogitsProcessor(config.vocab_size)
        self.make_empty_intermediate_tensors = self.model.make_empty_intermediate_tensors
