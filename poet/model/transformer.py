"""The transformer, read top to bottom: the reference that Megatron-Core and vLLM are held against.

Qwen3-shaped: RMSNorm computed in float32, rotary positions, grouped-query attention with RMSNorm on queries and keys,
SwiGLU, no biases, tied or untied head. Parameter names are those of Hugging Face's Qwen3ForCausalLM. It knows ids and a
layout of scenes; it does not know what an id means, losses, sampling, or Hugging Face.

Legend: B rows, L places computed now, K places so far (cache and now), H query heads, G key and value heads, D width of
a head, C hidden size, V vocabulary.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from poet.errors import ShapeError
from poet.model.attention import AttentionMask, SceneLayout, attend
from poet.model.config import PoetConfig

__all__ = [
    "INITIAL_DEVIATION",
    "Backbone",
    "FeedForward",
    "KeyValueCache",
    "LayerCache",
    "PoetTransformer",
    "RMSNorm",
    "attention_dtype",
    "initialise",
    "rotary_angles",
    "rotate",
]

INITIAL_DEVIATION = 0.02
ALL_IDS = slice(None)


class LayerCache:
    """Keys and values of one layer: (B, G, max_len, D) each, of which the first `length` places are filled."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self.keys, self.values = keys, values
        self.length = 0

    def extend(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Write (B, G, L, D) behind what is there; return all (B, G, K, D)."""
        start, self.length = self.length, self.length + key.shape[2]
        self.keys[:, :, start : self.length] = key
        self.values[:, :, start : self.length] = value
        return self.keys[:, :, : self.length], self.values[:, :, : self.length]


class KeyValueCache:
    """The caches of all layers, in room taken at the start.

    Layer 0 alone looks at a film's earlier scenes (`poet.model.attention`), so it alone has room for them, the
    *context*.

    Args:
        config: of the model.
        rows: B.
        max_len: places that there is room for, the context's among them.
        device: of the model.
        dtype: of its keys and values.
        context: the first places of a row, which belong to earlier scenes; they come in by
            `PoetTransformer.remember`, and only layer 0 holds them.
    """

    def __init__(
        self,
        config: PoetConfig,
        rows: int,
        max_len: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        context: int = 0,
    ) -> None:
        self.max_len, self.context = max_len, context

        def room(length: int) -> Tensor:
            return torch.zeros(rows, config.num_kv_heads, length, config.head_dim, device=device, dtype=dtype)

        lengths = [max_len, *[max_len - context] * (config.num_layers - 1)]
        self.layers = tuple(LayerCache(room(length), room(length)) for length in lengths)

    @property
    def length(self) -> int:
        """Places filled so far, K."""
        return self.layers[0].length


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last axis; computed in float32, returned to x's dtype before the weight."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Norm (..., size); the weight's dtype comes out where it is wider than x's."""
        x32 = x.float()
        normed = x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * normed.to(x.dtype)


def rotary_angles(positions: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the rotary positions.

    Args:
        positions: (B, L) int64.
        head_dim: D.
        theta: base of the frequencies.

    Returns:
        Two (B, 1, L, D / 2) float32.

    Source: RoFormer, arXiv:2104.09864, section 3.2.2.
    """
    # From whole positions every time, in float32: a buffer would follow the model into bfloat16.
    exponents = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32) / head_dim
    angles = positions[:, None, :, None].float() / theta**exponents
    return angles.cos(), angles.sin()


def rotate(x: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
    """Turn channel i of the first half with channel i of the second by the place's angle, as Qwen3 pairs them."""
    cos, sin = (part.to(x.dtype) for part in angles)
    left, right = x.chunk(2, -1)
    return torch.cat((left * cos - right * sin, right * cos + left * sin), -1)


class Attention(nn.Module):
    """Grouped-query attention with RMSNorm on queries and keys."""

    def __init__(self, config: PoetConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        query, key_value = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, query, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, key_value, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, key_value, bias=False)
        self.o_proj = nn.Linear(query, config.hidden_size, bias=False)
        self.q_norm = RMSNorm(config.head_dim, config.norm_eps)
        self.k_norm = RMSNorm(config.head_dim, config.norm_eps)

    def forward(
        self, x: Tensor, angles: tuple[Tensor, Tensor], mask: AttentionMask, cache: LayerCache | None
    ) -> Tensor:
        key, value = self.keys_and_values(x, angles)
        query = self.q_norm(self.q_proj(x).view(*x.shape[:2], -1, self.head_dim)).transpose(1, 2)
        # Under autocast the norms widen queries and keys; attention runs in the dtype of the projections.
        query = rotate(query, angles).to(value.dtype)
        if cache is not None:
            key, value = cache.extend(key, value)
        mixed: Tensor = self.o_proj(attend(query, key, value, mask).transpose(1, 2).flatten(2))
        return mixed

    def keys_and_values(self, x: Tensor, angles: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """What later places look at: (B, L, C) to two (B, G, L, D) of one dtype."""
        per_head = (*x.shape[:2], -1, self.head_dim)
        key = self.k_norm(self.k_proj(x).view(per_head)).transpose(1, 2)
        value = self.v_proj(x).view(per_head).transpose(1, 2)
        return rotate(key, angles).to(value.dtype), value


class FeedForward(nn.Module):
    """SwiGLU, arXiv:2002.05202."""

    def __init__(self, hidden_size: int, ffn_hidden_size: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, ffn_hidden_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, ffn_hidden_size, bias=False)
        self.down_proj = nn.Linear(ffn_hidden_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) to the same."""
        out: Tensor = self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class Layer(nn.Module):
    """Attention and feed-forward, each on the normed stream and added to it."""

    def __init__(self, config: PoetConfig) -> None:
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = FeedForward(config.hidden_size, config.ffn_hidden_size)
        self.input_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.norm_eps)

    def forward(
        self, x: Tensor, angles: tuple[Tensor, Tensor], mask: AttentionMask, cache: LayerCache | None
    ) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), angles, mask, cache)
        out: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return out


class Backbone(nn.Module):
    """Embedding, layers and final norm: everything under the prefix `model.` of the parameter names."""

    def __init__(self, config: PoetConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)

    def forward(
        self, ids: Tensor, layout: SceneLayout, positions: Tensor | None = None, cache: KeyValueCache | None = None
    ) -> Tensor:
        """Compute the hidden states of `ids`; arguments and result as in `PoetTransformer.forward`."""
        start = cache.length if cache is not None else 0
        stop = start + ids.shape[-1]
        rows, length = layout.shape
        if ids.dim() != 2 or ids.shape[0] != rows or length < stop or (cache is None and length > stop):
            raise ShapeError(
                f"ids must be (B, L) = ({rows}, {length - start}) for this layout after {start} cached places, "
                f"got {tuple(ids.shape)}."
            )
        if cache is not None and stop > cache.max_len:
            raise ShapeError(
                f"the cache has room for {cache.max_len} places, got {stop}. Build it with a larger max_len."
            )
        if positions is None:
            positions = layout.positions()[:, start:stop]
        angles = rotary_angles(positions, self.config.head_dim, self.config.rope_theta)
        x = self.embed_tokens(ids)
        across, within = layout.masks(attention_dtype(x), start, stop, context=0 if cache is None else cache.context)
        for layer, block in enumerate(self.layers):
            x = block(x, angles, across if layer == 0 else within, None if cache is None else cache.layers[layer])
        hidden: Tensor = self.norm(x)
        return hidden

    def remember(self, ids: Tensor, positions: Tensor, cache: KeyValueCache) -> None:
        """See `PoetTransformer.remember`."""
        if ids.dim() != 2 or ids.shape != positions.shape or ids.shape[1] != cache.context or cache.length:
            raise ShapeError(
                f"ids and positions must be (B, {cache.context}), the context of an empty cache, got "
                f"{tuple(ids.shape)} and {tuple(positions.shape)} after {cache.length} places."
            )
        first: Layer = self.layers[0]  # type: ignore[assignment]
        angles = rotary_angles(positions, self.config.head_dim, self.config.rope_theta)
        x = first.input_layernorm(self.embed_tokens(ids))
        cache.layers[0].extend(*first.self_attn.keys_and_values(x, angles))


class PoetTransformer(nn.Module):
    """The language model: hidden states of a batch of scenes, and logits for those places that need them."""

    def __init__(self, config: PoetConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Backbone(config)
        self.lm_head = None if config.tie_embeddings else nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        initialise(self, config)

    def forward(
        self, ids: Tensor, layout: SceneLayout, positions: Tensor | None = None, cache: KeyValueCache | None = None
    ) -> Tensor:
        """Compute the hidden states.

        Args:
            ids: (B, L) int64 in [0, vocab_size).
            layout: of these L places; with a cache, of all places from the first cached one on (it may reach further).
            positions: (B, L) int64 rotary positions; None takes the layout's.
            cache: keys and values of earlier places, extended by these; None computes every place anew.

        Returns:
            (B, L, C) after the final norm. The hidden state at place i predicts the id at place i + 1.

        Raises:
            ShapeError: ids, layout and cache do not fit each other.
        """
        hidden: Tensor = self.model(ids, layout, positions, cache)
        return hidden

    def remember(self, ids: Tensor, positions: Tensor, cache: KeyValueCache) -> None:
        """Take earlier scenes into a cache: keys and values of layer 0, which come from embeddings alone.

        No other layer sees earlier scenes, so this is all that a film's past costs when a new scene is written.

        Args:
            ids: (B, context) int64; rows with less of a past are filled up anyhow, and the layout hides what is not
                theirs.
            positions: (B, context) int64 rotary positions.
            cache: a new one.

        Raises:
            ShapeError: the ids do not fit the cache's context, or it is not new.

        Source: Perceiver AR, arXiv:2202.07765, whose context this is; SPEC, section 5.
        """
        self.model.remember(ids, positions, cache)

    def logits(self, hidden: Tensor, ids: slice = ALL_IDS) -> Tensor:
        """Score the vocabulary, or a run of its ids; (..., C) to (..., V). Hand in only the places that are needed."""
        head = self.model.embed_tokens if self.lm_head is None else self.lm_head
        return functional.linear(hidden, head.weight[ids])


def initialise(model: nn.Module, config: PoetConfig) -> None:
    """Draw all matrices from a normal distribution; those that write into the residual stream are scaled down."""
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            nn.init.ones_(parameter)
        else:
            writes_residual = name.endswith(("o_proj.weight", "down_proj.weight"))
            nn.init.normal_(parameter, std=residual_deviation(config) if writes_residual else INITIAL_DEVIATION)


def residual_deviation(config: PoetConfig) -> float:
    """Deviation of the matrices that write into the residual stream.

    The scale 1 / sqrt(2 * num_layers) keeps the stream's variance independent of depth (GPT-2's rule).
    """
    return INITIAL_DEVIATION / math.sqrt(2 * config.num_layers)


def attention_dtype(x: Tensor) -> torch.dtype:
    """The dtype that the projections of `x` will have: autocast's, where it is on."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
