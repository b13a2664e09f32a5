"""Poet's transformer built from Megatron-Core's parts: the same weights and the same function, cut among processes.

`to_transformer_config` derives Megatron's configuration from `PoetConfig`; `PoetGPTModel` is a GPTModel whose attention
follows `poet.model.attention`'s rule, whose rotary positions are the layout's, and whose loss is made for targets only.
Names of weights are `poet.training.megatron_keymap`'s. It knows ids and layouts of scenes, never recipes or files.

A step's masks do not fit through Megatron's interface, which passes one tensor to all layers. They are kept in
`LayoutBook`, and the tensor is the number of a page: so recomputed layers find the masks of their own micro batch.

Legend: B rows, L places of a row, C hidden size, H query heads, G key and value heads, D width of a head, P targets,
V vocabulary, R tensor-parallel ranks.
"""

from __future__ import annotations

import dataclasses
import functools
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from einops import rearrange
from megatron.core import parallel_state, tensor_parallel
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    linear_with_grad_accumulation_and_async_allreduce,
)
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import (
    TransformerLayer,
    TransformerLayerSubmodules,
    get_transformer_layer_offset,
)
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.utils.checkpoint import checkpoint

from poet.errors import CheckpointError, ConfigError
from poet.model.attention import AttentionMask, SceneLayout, attend
from poet.model.config import PoetConfig
from poet.model.transformer import INITIAL_DEVIATION, RMSNorm, residual_deviation, rotary_angles, rotate
from poet.training import megatron_keymap
from poet.training.parallelism import TARGETS_AT_ONCE, Parallelism

__all__ = ["FLEX_BLOCK", "LayoutBook", "PoetGPTModel", "load_weights", "to_transformer_config"]

FLEX_BLOCK = 128
"""Places of one tile of FlexAttention's masks."""


def to_transformer_config(config: PoetConfig, parallelism: Parallelism, *, bf16: bool = False) -> TransformerConfig:
    """Derive Megatron's configuration.

    Args:
        config: of the model.
        parallelism: of this run; Megatron's process groups must have the same sizes.
        bf16: whether weights and activations are bfloat16, with float32 copies in the optimizer.

    Raises:
        ConfigError: the model cannot be cut so.
    """
    parallelism.check_fits(config)
    again: dict[str, dict[str, Any]] = {
        "none": {},
        "selective": {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]},
        "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
    }
    dtype = torch.bfloat16 if bf16 else torch.float32
    return TransformerConfig(
        num_layers=config.num_layers,
        hidden_size=config.hidden_size,
        ffn_hidden_size=config.ffn_hidden_size,
        num_attention_heads=config.num_heads,
        num_query_groups=config.num_kv_heads,
        kv_channels=config.head_dim,
        normalization="RMSNorm",
        layernorm_epsilon=config.norm_eps,
        qk_layernorm=True,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        init_method=functools.partial(torch.nn.init.normal_, std=INITIAL_DEVIATION),
        output_layer_init_method=functools.partial(torch.nn.init.normal_, std=residual_deviation(config)),
        tensor_model_parallel_size=parallelism.tensor_parallel_size,
        pipeline_model_parallel_size=parallelism.pipeline_parallel_size,
        sequence_parallel=parallelism.sequence_parallel,
        num_layers_in_first_pipeline_stage=parallelism.first_stage_layers,
        num_layers_in_last_pipeline_stage=parallelism.last_stage_layers,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=bf16,
        calculate_per_token_loss=True,
        use_cpu_initialization=True,  # the same weights for every cut
        gradient_accumulation_fusion=False,  # these fusions need kernels of apex or Transformer Engine
        masked_softmax_fusion=False,
        bias_dropout_fusion=False,
        bias_activation_fusion=False,
        **again[parallelism.recompute],
    )


# -------------------------------------------------------------------------------------------------------- layouts


@dataclasses.dataclass(frozen=True)
class _Page:
    """What attention needs to know of one micro batch. Layer 0 has the first mask, the others the second."""

    angles: tuple[Tensor, Tensor]
    masks: tuple[AttentionMask, AttentionMask] | tuple[BlockMask, BlockMask]


class LayoutBook:
    """The masks and angles of the micro batches that are under way.

    Args:
        config: of the model.
        pages: micro batches that can be between their forward and their backward pass; the oldest goes when more come.
        flex: whether to use FlexAttention's block masks rather than dense ones; None: on a GPU.
    """

    def __init__(self, config: PoetConfig, pages: int, flex: bool | None = None) -> None:
        self._config, self._room, self._flex = config, pages, flex
        self._pages: OrderedDict[int, _Page] = OrderedDict()
        self._next = 0

    def add(self, layout: SceneLayout, dtype: torch.dtype, positions: Tensor | None = None) -> Tensor:
        """Write a page and return its number, which is passed to the model as its attention mask.

        Args:
            layout: of the micro batch.
            dtype: in which attention computes.
            positions: (B, L) int64 rotary positions; None takes the layout's.
        """
        device = layout.document.device
        angles = rotary_angles(
            layout.positions() if positions is None else positions, self._config.head_dim, self._config.rope_theta
        )
        if device.type != "cpu" if self._flex is None else self._flex:
            first = layout.block_mask(0, FLEX_BLOCK)
            blocks = first, layout.block_mask(1, FLEX_BLOCK) if layout.films else first
            page = _Page(angles, blocks)
        else:
            page = _Page(angles, layout.masks(dtype))
        self._pages[self._next] = page
        while len(self._pages) > self._room:
            self._pages.popitem(last=False)
        self._next += 1
        return torch.tensor(self._next - 1)  # on the CPU: reading it costs no wait

    def page(self, number: Tensor) -> _Page:
        """Read a page.

        Raises:
            ConfigError: it is gone, because the book has too few pages.
        """
        found = self._pages.get(int(number))
        if found is None:
            raise ConfigError(
                f"the layout of micro batch {int(number)} must still be there, but only {self._room} are kept."
            )
        return found


# ---------------------------------------------------------------------------------------------------------- modules


class _Norm(RMSNorm):
    """The reference's RMSNorm under Megatron's constructor."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float, **_: Any) -> None:
        super().__init__(hidden_size, eps)
        self.to(config.params_dtype)
        # Under sequence parallelism each process sees some of the places; Megatron then sums these gradients.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


class _SceneAttention(MegatronModule):  # type: ignore[misc]
    """Rotates queries and keys and attends under the rule, by the book that its model keeps."""

    def __init__(self, config: TransformerConfig, layer_number: int, book: LayoutBook, **_: Any) -> None:
        super().__init__(config=config)
        self.is_first, self.book = layer_number == 1, book

    def forward(self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor, /, **_: Any) -> Tensor:
        """(L, B, H / R, D), (L, B, G / R, D) twice and the number of a page to (L, B, H * D / R)."""
        page = self.book.page(attention_mask)
        query, key, value = (rearrange(part, "l b h d -> b h l d") for part in (query, key, value))
        query, key = rotate(query, page.angles), rotate(key, page.angles)
        mask = page.masks[0 if self.is_first else 1]
        if isinstance(mask, BlockMask):
            mixed = _flex()(query, key, value.contiguous(), block_mask=mask, enable_gqa=True)
        else:
            mixed = attend(query, key, value, mask)
        return rearrange(mixed, "b h l d -> l b (h d)").contiguous()


@functools.cache
def _flex() -> Any:
    """FlexAttention: compiled where there is a GPU, else its reference, which is exact and slow."""
    return torch.compile(flex_attention, dynamic=True) if torch.cuda.is_available() else flex_attention


def _block_spec(config: TransformerConfig, book: LayoutBook) -> TransformerBlockSubmodules:
    attention = ModuleSpec(
        module=SelfAttention,
        params={"attn_mask_type": AttnMaskType.arbitrary},
        submodules=SelfAttentionSubmodules(
            linear_qkv=ColumnParallelLinear,
            core_attention=functools.partial(_SceneAttention, book=book),
            linear_proj=RowParallelLinear,
            q_layernorm=_Norm,
            k_layernorm=_Norm,
        ),
    )
    layer = ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=_Norm,
            self_attention=attention,
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=_Norm,
            mlp=ModuleSpec(
                module=MLP, submodules=MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
            ),
            mlp_bda=get_bias_dropout_add,
        ),
    )
    return TransformerBlockSubmodules(layer_specs=[layer] * get_num_layers_to_build(config), layer_norm=_Norm)


class PoetGPTModel(GPTModel):  # type: ignore[misc]
    """This process's part of the transformer.

    Args:
        config: Poet's.
        transformer_config: Megatron's, from `to_transformer_config`.
        flex: see `LayoutBook`.
    """

    def __init__(self, config: PoetConfig, transformer_config: TransformerConfig, *, flex: bool | None = None) -> None:
        book = LayoutBook(config, transformer_config.pipeline_model_parallel_size + 1, flex)
        super().__init__(
            config=transformer_config,
            transformer_layer_spec=_block_spec(transformer_config, book),
            vocab_size=config.vocab_size,
            max_sequence_length=config.max_position_embeddings,
            pre_process=parallel_state.is_pipeline_first_stage(),
            post_process=parallel_state.is_pipeline_last_stage(),
            parallel_output=True,
            share_embeddings_and_output_weights=config.tie_embeddings,
            position_embedding_type="none",  # attention rotates by the layout's positions
        )
        self.poet_config, self.book = config, book
        self.layer_offset: int = get_transformer_layer_offset(transformer_config)

    def forward(
        self,
        ids: Tensor,
        page: Tensor,
        loss_mask: Tensor | None = None,
        targets: Tensor | None = None,
        *,
        output: str = "losses",
    ) -> Tensor:
        """Compute this stage.

        Args:
            ids: (B, L) int64; L a multiple of R under sequence parallelism.
            page: number of the layout's page in `book`.
            loss_mask: (B, L) bool, True where targets[b, i] is a target; for losses.
            targets: (B, L) int64; None takes `ids`, of which nothing is hidden then.
            output: of the last stage: "losses", or "logits".

        Returns:
            (L, B, C) from a stage that is not the last, (P,) float32 losses in the order of the mask, or (B, L, V / R)
            float32 logits.
        """
        embedded = self.embedding(input_ids=ids, position_ids=None) if self.pre_process else None
        hidden = self.decoder(hidden_states=embedded, attention_mask=page)
        if not self.post_process:
            return hidden
        if self.config.sequence_parallel:
            hidden = tensor_parallel.gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=False)
        hidden = hidden.transpose(0, 1)
        if output == "logits":
            return self._logits(hidden.flatten(0, 1)).view(*ids.shape, -1)
        if loss_mask is None:
            raise ConfigError("loss_mask must be given for losses, got none.")
        targets = ids if targets is None else targets
        places, wanted = hidden[:, :-1][loss_mask[:, 1:]], targets[:, 1:][loss_mask[:, 1:]]
        parts = [
            checkpoint(self._cross_entropy, *chunk, use_reentrant=False)
            for chunk in zip(places.split(TARGETS_AT_ONCE), wanted.split(TARGETS_AT_ONCE), strict=True)
        ]
        return torch.cat(parts)

    def _logits(self, hidden: Tensor) -> Tensor:
        """(P, C), the same on all R ranks, to this rank's (P, V / R) float32."""
        tied = self.share_embeddings_and_output_weights
        weight = self.shared_embedding_or_output_weight() if tied else self.output_layer.weight
        logits: Tensor = linear_with_grad_accumulation_and_async_allreduce(
            input=hidden,
            weight=weight,
            bias=None,
            gradient_accumulation_fusion=False,
            allreduce_dgrad=parallel_state.get_tensor_model_parallel_world_size() > 1,
            sequence_parallel=False,  # it has been gathered
        )
        return logits.float()

    def _cross_entropy(self, hidden: Tensor, targets: Tensor) -> Tensor:
        losses: Tensor = tensor_parallel.vocab_parallel_cross_entropy(self._logits(hidden), targets)
        return losses


def load_weights(model: PoetGPTModel, weights: Mapping[str, Tensor]) -> None:
    """Give this process its part of a bundle's weights.

    Args:
        model: freshly built, in any cut.
        weights: canonical name to tensor, all of them, on every process.

    Raises:
        CheckpointError: a weight is missing, unknown or of another shape.
    """
    config = model.poet_config
    whole = megatron_keymap.to_megatron(weights, config)
    rank = parallel_state.get_tensor_model_parallel_rank()
    size = parallel_state.get_tensor_model_parallel_world_size()
    own = dict(_own_parameters(model))
    for name, parameter in own.items():
        source = "embedding.word_embeddings.weight" if name == "output_layer.weight" and config.tie_embeddings else name
        if source not in whole:
            raise CheckpointError(f"Megatron's weight {name} must be in the table of poet.training.megatron_keymap.")
        with torch.no_grad():
            parameter.copy_(megatron_keymap.shard(source, whole[source], config, rank, size))


def _own_parameters(model: PoetGPTModel) -> Iterator[tuple[str, Tensor]]:
    """The weights of this process under their names in the whole model."""
    rename = megatron_keymap.renumber(model.layer_offset)
    for name, parameter in model.named_parameters():
        yield rename(name), parameter
