"""Poet's transformer in vLLM: vLLM's own Qwen3 layers under Poet's rule of who sees whom.

Weights carry Hugging Face's Qwen3 names, so vLLM's loader takes a bundle's `model.safetensors` as it is. This module
knows layers only; prompts, grammars and sampling belong to others.
"""

from typing import Any

from torch import nn
from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig
from vllm.distributed import get_pp_group, get_tensor_model_parallel_world_size
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import QKVParallelLinear, RowParallelLinear
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.rotary_embedding import get_rope
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.models.qwen2 import Qwen2MLP, Qwen2Model
from vllm.model_executor.models.qwen3 import Qwen3Attention, Qwen3DecoderLayer, Qwen3ForCausalLM
from vllm.model_executor.models.utils import PPMissingLayer, maybe_prefix

from poet.errors import ConfigError
from poet_serving.attention import PROMPT_LENGTHS_KEY, PrefixAttention

__all__ = ["PoetAttention", "PoetDecoderLayer", "PoetForCausalLM", "PoetModel"]


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
        self.attn = PrefixAttention(
            self.num_heads,
            self.head_dim,
            self.scaling,
            num_kv_heads=self.num_kv_heads,
            cache_config=cache_config,
            quant_config=quant_config,
            prefix=f"{prefix}.attn",
        )
        self.q_norm = RMSNorm(self.head_dim, eps=config.rms_norm_eps)
        self.k_norm = RMSNorm(self.head_dim, eps=config.rms_norm_eps)


class PoetDecoderLayer(Qwen3DecoderLayer):  # type: ignore[misc]
    """Qwen3's layer with `PoetAttention`; arguments as there."""

    def __init__(
        self, config: Any, cache_config: Any | None = None, quant_config: Any | None = None, prefix: str = ""
    ) -> None:
        nn.Module.__init__(self)
        self.hidden_size = config.hidden_size
        self.self_attn = PoetAttention(config, cache_config, quant_config, f"{prefix}.self_attn")
        self.mlp = Qwen2MLP(
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            hidden_act=config.hidden_act,
            quant_config=quant_config,
            prefix=f"{prefix}.mlp",
        )
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)


@support_torch_compile(
    dynamic_arg_dims={"input_ids": 0, "positions": -1, "intermediate_tensors": 0, "inputs_embeds": 0}
)
class PoetModel(Qwen2Model):  # type: ignore[misc]
    """Embedding, `PoetDecoderLayer`s and the last norm."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix, decoder_layer_type=PoetDecoderLayer)


class PoetForCausalLM(Qwen3ForCausalLM):  # type: ignore[misc]
    """The class behind `architectures: ["PoetForCausalLM"]` of a bundle's `config.json`.

    Raises:
        ConfigError: vLLM would not tell attention how long prompts are.
    """

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        nn.Module.__init__(self)
        config = vllm_config.model_config.hf_config
        if getattr(config, PROMPT_LENGTHS_KEY, None) is None:
            raise ConfigError(
                f"Poet's model must be told how long prompts are, but the configuration key {PROMPT_LENGTHS_KEY!r} is "
                f"not set. Start vLLM with hf_overrides={{{PROMPT_LENGTHS_KEY!r}: 1}}."
            )
        self.config = config
        self.vllm_config = vllm_config
        self.quant_config = vllm_config.quant_config
        self.model = PoetModel(vllm_config=vllm_config, prefix=maybe_prefix(prefix, "model"))
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
