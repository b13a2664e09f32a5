"""Building blocks of MAGVIT-v2: convolutions that never look ahead in time, and what stands between them.

Every layer that sees several frames can run over a clip in chunks: it is given a `Memory` that keeps the few frames the
next chunk needs, and the chunks' outputs joined are the whole clip's output. Normalisation is over channels at each
place, so that neither later frames, nor the size of the picture, nor the chunk changes a result.

Legend: B clips, C channels, T frames (latent frames after striding), H x W places.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

__all__ = [
    "AdaptiveNorm",
    "CausalConv3d",
    "Downsample",
    "Memory",
    "PlaceNorm",
    "ResidualBlock",
    "Upsample",
    "depth_to_space",
    "space_to_depth",
]


class Memory:
    """What a chunked pass carries from one chunk to the next: the last frames that each convolution saw."""

    def __init__(self) -> None:
        self.frames: dict[int, Tensor] = {}
        self.first_chunk = True


class CausalConv3d(nn.Conv3d):
    """A 3D convolution whose output at frame t sees frames up to t. Zero frames stand before the first.

    With a time stride s, output i sees inputs up to s * i, so the first output sees the first frame only.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: tuple[int, int, int] = (3, 3, 3),
        stride: tuple[int, int, int] = (1, 1, 1),
    ) -> None:
        super().__init__(in_channels, out_channels, kernel, stride=stride, padding=(0, kernel[1] // 2, kernel[2] // 2))

    def forward(self, input: Tensor, memory: Memory | None = None) -> Tensor:
        """(B, C, T, H, W) to (B, C', 1 + (T - 1) // s, H', W'); in a later chunk T // s frames come out."""
        kernel, stride = self.kernel_size[0], self.stride[0]
        if kernel == 1 and stride == 1:
            return super().forward(input)
        first = memory is None or memory.first_chunk
        if first:
            input = F.pad(input, (0, 0, 0, 0, kernel - 1, 0))
        if memory is not None:
            if not first:
                input = torch.cat([memory.frames[id(self)], input], dim=2)
            # A copy: a view would keep the whole chunk in memory until the next one.
            memory.frames[id(self)] = input[:, :, input.shape[2] - (kernel - stride) :].clone()
        return super().forward(input)


class PlaceNorm(nn.Module):
    """Normalisation over the channels of each place, with a learnt gain."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, T, H, W) to the same."""
        last = x.permute(0, 2, 3, 4, 1)
        return F.layer_norm(last, (last.shape[-1],), self.weight.to(last.dtype)).permute(0, 4, 1, 2, 3)


class AdaptiveNorm(nn.Module):
    """Normalisation whose gain and shift are read off the quantised latent at the same place.

    Source: MAGVIT-v2, arXiv:2310.05737, section 3.2 (adaptive group normalisation in the decoder).
    """

    def __init__(self, channels: int, latent_channels: int) -> None:
        super().__init__()
        self.norm = PlaceNorm(channels)
        self.modulation = nn.Conv3d(latent_channels, 2 * channels, 1)
        nn.init.normal_(self.modulation.weight, std=0.02)
        nn.init.zeros_(self.modulation.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor, latent: Tensor, memory: Memory | None = None) -> Tensor:
        """(B, C, T, H, W) with latent (B, L, t, h, w), repeated up to x's grid, to (B, C, T, H, W)."""
        first = memory is None or memory.first_chunk
        gain, shift = self.modulation(latent).chunk(2, dim=1)
        return self.norm(x) * (1 + _repeat_to(gain, x, first)) + _repeat_to(shift, x, first)


def _repeat_to(latent: Tensor, x: Tensor, first_chunk: bool) -> Tensor:
    """Repeat a latent grid along time and space until it has x's size. The first latent frame is a frame of its own.

    A grid of t latent frames stands for 1 + (t - 1) * s frames of x at the start of a clip and t * s in a later chunk.
    """
    if latent.shape[2:] == x.shape[2:]:
        return latent
    frames, size = latent.shape[2], x.shape[3] // latent.shape[3]
    time = (x.shape[2] - 1) // max(1, frames - 1) if first_chunk else x.shape[2] // frames
    latent = latent.repeat_interleave(size, dim=3).repeat_interleave(size, dim=4)
    if not first_chunk:
        return latent.repeat_interleave(time, dim=2)
    return torch.cat([latent[:, :, :1], latent[:, :, 1:].repeat_interleave(time, dim=2)], dim=2)


class ResidualBlock(nn.Module):
    """Norm, SiLU, convolution, twice, beside a shortcut."""

    def __init__(self, channels: int, *, factorised: bool) -> None:
        super().__init__()
        first, second = ((1, 3, 3), (3, 1, 1)) if factorised else ((3, 3, 3), (3, 3, 3))
        self.norm1 = PlaceNorm(channels)
        self.conv1 = CausalConv3d(channels, channels, first)
        self.norm2 = PlaceNorm(channels)
        self.conv2 = CausalConv3d(channels, channels, second)

    def forward(self, x: Tensor, memory: Memory | None = None) -> Tensor:
        """(B, C, T, H, W) to the same."""
        h = self.conv1(F.silu(self.norm1(x)), memory)
        h = self.conv2(F.silu(self.norm2(h)), memory)
        return x + h


class Downsample(nn.Module):
    """A strided convolution: half the height and width, and half the time where asked."""

    def __init__(self, in_channels: int, out_channels: int, *, temporal: bool) -> None:
        super().__init__()
        kernel, stride = ((3, 3, 3), (2, 2, 2)) if temporal else ((1, 3, 3), (1, 2, 2))
        self.conv = CausalConv3d(in_channels, out_channels, kernel, stride)

    def forward(self, x: Tensor, memory: Memory | None = None) -> Tensor:
        """(B, C, T, H, W) to (B, C', 1 + (T - 1) // 2 or T, H / 2, W / 2)."""
        out: Tensor = self.conv(x, memory)
        return out


class Upsample(nn.Module):
    """Depth to space: twice the height and width, and twice the time where asked, less the frames before the first."""

    def __init__(self, in_channels: int, out_channels: int, *, temporal: bool) -> None:
        super().__init__()
        self.factor = (2 if temporal else 1, 2, 2)
        self.conv = CausalConv3d(
            in_channels, out_channels * (8 if temporal else 4), (3, 3, 3) if temporal else (1, 3, 3)
        )

    def forward(self, x: Tensor, memory: Memory | None = None) -> Tensor:
        """(B, C, T, H, W) to (B, C', 2 * T - 1 or T, 2 * H, 2 * W); a later chunk keeps all 2 * T frames."""
        first = memory is None or memory.first_chunk
        return depth_to_space(self.conv(x, memory), self.factor, first_chunk=first)


def space_to_depth(video: Tensor, patch: tuple[int, int, int], *, first_chunk: bool = True) -> Tensor:
    """(B, C, N, H, W) to (B, C * p * q * r, T, H / q, W / r).

    At the start of a clip the first frame is repeated p - 1 times in front, so N = 1 + (T - 1) * p and the first
    latent frame holds that frame alone; in a later chunk N = T * p.
    """
    time, height, width = patch
    if first_chunk and time > 1:
        video = torch.cat([video[:, :, :1].expand(-1, -1, time - 1, -1, -1), video], dim=2)
    return rearrange(video, "b c (t p) (h q) (w r) -> b (c p q r) t h w", p=time, q=height, r=width)


def depth_to_space(x: Tensor, patch: tuple[int, int, int], *, first_chunk: bool = True) -> Tensor:
    """Inverse of `space_to_depth`: the p - 1 frames before the first are dropped at the start of a clip."""
    time, height, width = patch
    video = rearrange(x, "b (c p q r) t h w -> b c (t p) (h q) (w r)", p=time, q=height, r=width)
    return video[:, :, time - 1 :] if first_chunk else video
