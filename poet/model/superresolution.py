"""Super-resolution: a bidirectional transformer that writes the video codes of a doubled size from those of the first.

The canvas has a place for every code of the larger size. What is known of it, the code of the smaller size that lies
under the place, and where in that code's square the place lies are added up into the place's embedding; layers of
attention in windows along rows, columns and time take turns, and every window also sees the text. Codebooks above
2^12 are cut into factors of a few bits each, with an embedding and a head of their own. It knows codes; it does not
know ids, how canvases are filled, or pixels.

Legend: B clips, T latent frames, h x w places of the smaller size, H x W of the larger, P text pieces, C hidden size,
F factors of a code, V values of a factor, N places.

Source: VideoPoet, arXiv:2312.14125, section 3.4 (windows, factors, noise on the smaller codes, guidance on both
conditions); factors after MAGVIT-v2, arXiv:2310.05737, section 3.2.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Final, Self

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional

from poet.errors import ConfigError, ShapeError
from poet.model.attention import AttentionMask, attend, visible
from poet.model.transformer import INITIAL_DEVIATION, FeedForward, RMSNorm, attention_dtype, rotate

__all__ = [
    "UNKNOWN",
    "UPSAMPLER_ARCHITECTURE",
    "UPSAMPLER_TYPE",
    "Upsampler",
    "UpsamplerConfig",
    "merge_factors",
    "split_factors",
]

UNKNOWN: Final = -1
"""Stands in a canvas where no code is known."""

UPSAMPLER_ARCHITECTURE: Final = "PoetUpsampler"
UPSAMPLER_TYPE: Final = "poet_upsampler"
"""What a config.json calls the upsampler: Hugging Face's `architectures` and `model_type`."""

LARGEST_FACTOR: Final = 2**12
"""Values of a factor at most: above it a softmax over whole codes would be most of the model."""

NOISE_LEVELS: Final = 11
"""Levels of noise on the smaller codes that the model tells apart: 0, 0.1, ... 1."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class UpsamplerConfig:
    """The shape of the upsampler.

    Attributes:
        codebook_size: of the video tokenizer, a power of two.
        num_text_pieces: of the text tokenizer.
        hidden_size: C.
        ffn_hidden_size: of the SwiGLU.
        num_layers: layers; they take the windows in turn.
        num_heads: attention heads; head_dim is hidden_size / num_heads, even and at least 8.
        windows: (frames, rows, columns) of the windows of the layers, in turn. A grid that fits a window is seen whole.
        scale: places of the larger size for one of the smaller, in height and in width.
        num_factors: F; None takes the fewest whose values are at most 2^12.

    Raises:
        ConfigError: a size that cannot be used.
    """

    codebook_size: int
    num_text_pieces: int
    hidden_size: int = 192
    ffn_hidden_size: int = 512
    num_layers: int = 9
    num_heads: int = 4
    windows: tuple[tuple[int, int, int], ...] = ((1, 8, 16), (1, 16, 8), (5, 4, 4))
    scale: int = 2
    num_factors: int | None = None
    rope_theta: float = 100.0
    norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        windows = tuple(tuple(int(size) for size in window) for window in self.windows)
        object.__setattr__(self, "windows", windows)
        counts = (
            "codebook_size",
            "num_text_pieces",
            "hidden_size",
            "ffn_hidden_size",
            "num_layers",
            "num_heads",
            "scale",
        )
        for name in counts:
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigError(f"{name} must be a positive whole number, got {value!r}.")
        if self.codebook_size < 2 or self.codebook_size & (self.codebook_size - 1):
            raise ConfigError(f"codebook_size must be a power of two, got {self.codebook_size}.")
        if self.hidden_size % self.num_heads or self.head_dim % 2 or self.head_dim < 8:
            raise ConfigError(
                f"hidden_size must be num_heads times an even number of at least 8, got {self.hidden_size} and "
                f"{self.num_heads}."
            )
        if not windows or any(len(window) != 3 or min(window) < 1 for window in windows):
            raise ConfigError(f"windows must be (frames, rows, columns) of at least 1 each, got {self.windows}.")
        if self.scale < 2:
            raise ConfigError(f"scale must be at least 2, got {self.scale}.")
        if self.num_factors is None:
            fewest = next(
                count
                for count in range(1, self.bits + 1)
                if not self.bits % count and 2 ** (self.bits // count) <= LARGEST_FACTOR
            )
            object.__setattr__(self, "num_factors", fewest)
        if not isinstance(self.num_factors, int) or self.num_factors < 1 or self.bits % self.num_factors:
            raise ConfigError(f"num_factors must divide the {self.bits} bits of a code, got {self.num_factors}.")

    @property
    def bits(self) -> int:
        """Of a code."""
        return self.codebook_size.bit_length() - 1

    @property
    def factors(self) -> int:
        """F."""
        assert self.num_factors is not None  # it was filled in when the config was made
        return self.num_factors

    @property
    def factor_size(self) -> int:
        """V."""
        return int(2 ** (self.bits // self.factors))

    @property
    def head_dim(self) -> int:
        """Channels of a head."""
        return self.hidden_size // self.num_heads

    def to_dict(self) -> dict[str, Any]:
        """Plain values; inverse of `from_dict`."""
        return dataclasses.asdict(self) | {"windows": [list(window) for window in self.windows]}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The inverse of `to_dict`.

        Raises:
            ConfigError: an unknown or missing key, or a value that cannot be used.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        if values.keys() != known:
            raise ConfigError(f"an upsampler's configuration must have the keys {sorted(known)}, got {sorted(values)}.")
        return cls(**values)


def split_factors(codes: Tensor, config: UpsamplerConfig) -> Tensor:
    """Cut codes into factors of a few bits each, the highest bits first: (...) int64 to (..., F) in [0, V)."""
    width = config.bits // config.factors
    shifts = torch.arange(config.factors - 1, -1, -1, device=codes.device) * width
    return (codes[..., None] >> shifts) & (config.factor_size - 1)


def merge_factors(factors: Tensor, config: UpsamplerConfig) -> Tensor:
    """The inverse of `split_factors`: (..., F) to (...)."""
    width = config.bits // config.factors
    shifts = torch.arange(config.factors - 1, -1, -1, device=factors.device) * width
    return (factors << shifts).sum(-1)


class _CodeEmbedding(nn.Module):
    """The sum of the embeddings of a code's factors, with one more vector where there is no code."""

    def __init__(self, config: UpsamplerConfig) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.factors, config.factor_size, config.hidden_size))
        self.missing = nn.Parameter(torch.empty(config.hidden_size))

    def forward(self, codes: Tensor) -> Tensor:
        """(...) int64, `UNKNOWN` where there is none, to (..., C)."""
        factors = split_factors(codes.clamp(min=0), self.config)
        embedded = functional.embedding(factors[..., 0], self.weight[0])
        for number in range(1, self.config.factors):
            embedded = embedded + functional.embedding(factors[..., number], self.weight[number])
        return torch.where((codes == UNKNOWN)[..., None], self.missing.to(embedded.dtype), embedded)


class _WindowAttention(nn.Module):
    """Attention of a window's places to one another and to the text."""

    def __init__(self, config: UpsamplerConfig) -> None:
        super().__init__()
        self.num_heads, size = config.num_heads, config.hidden_size
        self.q_proj = nn.Linear(size, size, bias=False)
        self.k_proj = nn.Linear(size, size, bias=False)
        self.v_proj = nn.Linear(size, size, bias=False)
        self.o_proj = nn.Linear(size, size, bias=False)
        self.q_norm = RMSNorm(config.head_dim, config.norm_eps)
        self.k_norm = RMSNorm(config.head_dim, config.norm_eps)

    def forward(self, x: Tensor, text: Tensor, angles: tuple[Tensor, Tensor], mask: AttentionMask) -> Tensor:
        """(R, N, C) of R windows with (R, P, C) of their texts to (R, N, C)."""
        query, key, value = (self._heads(layer(x)) for layer in (self.q_proj, self.k_proj, self.v_proj))
        text_key, text_value = self._heads(self.k_proj(text)), self._heads(self.v_proj(text))
        query = rotate(self.q_norm(query), angles).to(value.dtype)
        key = rotate(self.k_norm(key), angles).to(value.dtype)
        keys = torch.cat((key, self.k_norm(text_key).to(value.dtype)), 2)
        mixed = attend(query, keys, torch.cat((value, text_value), 2), mask)
        out: Tensor = self.o_proj(rearrange(mixed, "r a n d -> r n (a d)"))
        return out

    def _heads(self, x: Tensor) -> Tensor:
        return rearrange(x, "r n (a d) -> r a n d", a=self.num_heads)


class _Layer(nn.Module):
    """Attention and feed-forward, each on the normed stream and added to it."""

    def __init__(self, config: UpsamplerConfig) -> None:
        super().__init__()
        self.self_attn = _WindowAttention(config)
        self.mlp = FeedForward(config.hidden_size, config.ffn_hidden_size)
        self.input_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.norm_eps)

    def forward(self, x: Tensor, text: Tensor, view: _Windows) -> Tensor:
        """(B, T, H, W, C) to the same."""
        windows = view.cut(self.input_layernorm(x))
        texts = self.input_layernorm(text).repeat_interleave(len(windows) // len(text), 0)
        x = x + view.join(self.self_attn(windows, texts, view.angles, view.mask))
        out: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return out


class _Windows:
    """A grid cut into windows of one size: what the layers of that size share in a forward pass.

    Args:
        grid: (T, H, W).
        window: (frames, rows, columns), cut down to the grid.
        seen_text: (B, P) bool.
        config: the upsampler's.
        dtype: of queries and keys to come.
    """

    def __init__(
        self,
        grid: tuple[int, int, int],
        window: tuple[int, int, int],
        seen_text: Tensor,
        config: UpsamplerConfig,
        dtype: torch.dtype,
    ) -> None:
        self.grid = grid
        self.window = tuple(min(size, axis) for size, axis in zip(window, grid, strict=True))
        self.counts = tuple(-(-axis // size) for size, axis in zip(self.window, grid, strict=True))
        device = seen_text.device
        axes = [torch.arange(size * count, device=device) for size, count in zip(self.window, self.counts, strict=True)]
        places = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1)
        inside = (places < torch.tensor(grid, device=device)).all(-1)
        rows = len(seen_text)
        own = self._in_windows(inside[None, ..., None].expand(rows, -1, -1, -1, -1))[..., 0]
        keys = torch.cat((own, seen_text.repeat_interleave(len(own) // rows, 0)), 1)
        self.mask = visible(keys[:, None, :].expand(-1, own.shape[1], -1), dtype)
        # All windows are alike up to where they lie, which attention by differences of places does not see.
        first = self._in_windows(places[None])[0]
        self.angles = _angles(first, config.head_dim, config.rope_theta)

    def cut(self, x: Tensor) -> Tensor:
        """(B, T, H, W, C) to (R, N, C); windows that reach beyond the grid are filled up with zeros."""
        missing = [size * count - axis for size, count, axis in zip(self.window, self.counts, self.grid, strict=True)]
        if any(missing):
            x = functional.pad(x, (0, 0, 0, missing[2], 0, missing[1], 0, missing[0]))
        return self._in_windows(x)

    def join(self, windows: Tensor) -> Tensor:
        """The inverse of `cut`."""
        (t, h, w), (nt, nh, nw) = self.window, self.counts
        x = rearrange(windows, "(b nt nh nw) (t h w) c -> b (nt t) (nh h) (nw w) c", nt=nt, nh=nh, nw=nw, t=t, h=h, w=w)
        frames, rows, columns = self.grid
        return x[:, :frames, :rows, :columns]

    def _in_windows(self, x: Tensor) -> Tensor:
        t, h, w = self.window
        return rearrange(x, "b (nt t) (nh h) (nw w) c -> (b nt nh nw) (t h w) c", t=t, h=h, w=w)


class Upsampler(nn.Module):
    """Hidden states of a canvas, and logits for those of its places that need them."""

    def __init__(self, config: UpsamplerConfig) -> None:
        super().__init__()
        self.config = config
        size = config.hidden_size
        self.high = _CodeEmbedding(config)
        self.low = _CodeEmbedding(config)
        self.corner = nn.Parameter(torch.empty(config.scale, config.scale, size))
        self.noise = nn.Parameter(torch.empty(NOISE_LEVELS, size))
        self.text = nn.Parameter(torch.empty(config.num_text_pieces, size))
        self.no_text = nn.Parameter(torch.empty(size))
        self.layers = nn.ModuleList(_Layer(config) for _ in range(config.num_layers))
        self.norm = RMSNorm(size, config.norm_eps)
        self._initialise()

    def forward(
        self, high: Tensor, low: Tensor, text: Tensor, text_lengths: Tensor, noise_level: Tensor | None = None
    ) -> Tensor:
        """Compute the hidden states of a canvas.

        Args:
            high: (B, T, H, W) int64 codes, `UNKNOWN` where none is known.
            low: (B, T, h, w) int64 codes, H = scale * h; `UNKNOWN` throughout a clip that is made without them.
            text: (B, P) int64 pieces, filled up with anything on the right; P may be 0.
            text_lengths: (B,) int64 pieces of each; 0 for none.
            noise_level: (B,) float, the share of `low` that is wrong at random, in [0, 1]; None: nothing is.

        Returns:
            (B, T, H, W, C); the state of a place says the code of that very place.

        Raises:
            ShapeError: the arguments do not fit each other.
        """
        config = self.config
        rows, frames, height, width = high.shape
        if low.shape != (rows, frames, height // config.scale, width // config.scale) or (
            height % config.scale or width % config.scale
        ):
            raise ShapeError(
                f"low must be (B, T, H / {config.scale}, W / {config.scale}) for high {tuple(high.shape)}, got "
                f"{tuple(low.shape)}."
            )
        if text.dim() != 2 or len(text) != rows or text_lengths.shape != (rows,):
            raise ShapeError(
                f"text and text_lengths must be (B, P) and (B,) for {rows} clips, got {tuple(text.shape)} and "
                f"{tuple(text_lengths.shape)}."
            )
        under = self.low(low)[:, :, :, None, :, None] + self.corner[:, None]
        x = self.high(high) + rearrange(under, "b t h y w x c -> b t (h y) (w x) c")
        level = high.new_zeros(rows) if noise_level is None else (noise_level * (NOISE_LEVELS - 1)).round().long()
        x = x + self.noise[level][:, None, None, None]
        # The first of the text's places is always there, so that a window never sees no text at all.
        words = torch.cat((self.no_text.expand(rows, 1, -1), functional.embedding(text, self.text)), 1)
        seen = torch.arange(words.shape[1], device=text.device) <= text_lengths[:, None]
        dtype = attention_dtype(x)
        grid = frames, height, width
        views = [_Windows(grid, window, seen, config, dtype) for window in config.windows]
        for number, layer in enumerate(self.layers):
            x = layer(x, words, views[number % len(views)])
        hidden: Tensor = self.norm(x)
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """(N, C) to (N, F, V)."""
        weight = rearrange(self.high.weight, "f v c -> (f v) c")
        return rearrange(functional.linear(hidden, weight), "n (f v) -> n f v", f=self.config.factors)

    def _initialise(self) -> None:
        """Draw all weights from a normal distribution; those that write into the residual stream are scaled down."""
        deviation = INITIAL_DEVIATION / math.sqrt(2 * self.config.num_layers)
        for name, parameter in self.named_parameters():
            if name.endswith("norm.weight"):
                nn.init.ones_(parameter)
            else:
                writes = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(parameter, std=deviation if writes else INITIAL_DEVIATION)


def _angles(places: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines of rotary positions in three axes: (N, 3) to two (N, D / 2) float32.

    Time has the first quarter of the pairs of channels, rows and columns share the others.
    """
    pairs = head_dim // 2
    in_time = max(1, pairs // 4)
    in_rows = (pairs - in_time) // 2
    counts = (in_time, in_rows, pairs - in_time - in_rows)
    parts = []
    for axis, count in enumerate(counts):
        frequencies = theta ** -(torch.arange(count, device=places.device, dtype=torch.float32) / count)
        parts.append(places[:, axis, None].float() * frequencies)
    angles = torch.cat(parts, -1)
    return angles.cos(), angles.sin()
