"""The discriminator of MAGVIT-v2's adversarial loss: 3D residual convolutions with blur pooling, one number a clip.

Knows pixels, neither codes nor the tokenizer.

Legend: B clips, C channels, N frames of H x W pixels.
"""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from poet_tokenizers.errors import ConfigError, ShapeError

__all__ = ["VideoDiscriminator"]


class _BlurPool(nn.Module):
    """Halve a clip after a binomial blur, so that a shift of one pixel changes little.

    Source: Zhang, "Making convolutional networks shift-invariant again", arXiv:1904.11486.
    """

    kernel: Tensor

    def __init__(self) -> None:
        super().__init__()
        line = torch.tensor([1.0, 2.0, 1.0]) / 4
        self.register_buffer(
            "kernel", line[:, None, None] * line[None, :, None] * line[None, None, :], persistent=False
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, N, H, W) to half of N (if N > 1), H and W, rounded up."""
        channels = x.shape[1]
        if x.shape[2] == 1:
            kernel, stride, pad = self.kernel.sum(0, keepdim=True), (1, 2, 2), (1, 1, 1, 1, 0, 0)
        else:
            kernel, stride, pad = self.kernel, (2, 2, 2), (1, 1, 1, 1, 1, 1)
        weight = kernel.to(x.dtype).expand(channels, 1, *kernel.shape)
        return F.conv3d(F.pad(x, pad, mode="replicate"), weight, stride=stride, groups=channels)


class _Conv3d(nn.Conv3d):
    """A 3 x 3 x 3 convolution that keeps the clip's size.

    Zeros go around in time by hand: where oneDNN pads a clip of exactly two frames itself, its gradient for weights in
    bf16 is read from memory that nobody wrote (seen with torch 2.13 on AVX512-BF16).
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 3, padding=(0, 1, 1))

    def forward(self, input: Tensor) -> Tensor:
        """(B, C, N, H, W) to (B, C', N, H, W)."""
        return super().forward(F.pad(input, (0, 0, 0, 0, 1, 1)))


class _Block(nn.Module):
    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv1 = _Conv3d(in_channels, in_channels)
        self.conv2 = _Conv3d(in_channels, out_channels)
        self.shortcut = nn.Conv3d(in_channels, out_channels, 1)
        self.pool = _BlurPool()

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv2(F.leaky_relu(self.conv1(F.leaky_relu(x, 0.2)), 0.2))
        out: Tensor = (self.pool(h) + self.shortcut(self.pool(x))) / 2**0.5
        return out


class VideoDiscriminator(nn.Module):
    """Scores how real a clip looks.

    Args:
        channels: width of the first block.
        channel_multipliers: width of each block's output in units of `channels`; every block halves the clip.

    Source: MAGVIT-v2, arXiv:2310.05737, section 3.2 and appendix A (blur pooling in the discriminator only).
    """

    def __init__(self, channels: int = 64, channel_multipliers: tuple[int, ...] = (2, 4, 4, 4)) -> None:
        super().__init__()
        if channels < 1 or not channel_multipliers:
            raise ConfigError("channels and channel_multipliers must be positive and not empty.")
        widths = [channels, *(channels * multiplier for multiplier in channel_multipliers)]
        self.input = _Conv3d(3, channels)
        self.blocks = nn.ModuleList(_Block(a, b) for a, b in itertools.pairwise(widths))
        self.output = nn.Linear(widths[-1], 1)

    def forward(self, video: Tensor) -> Tensor:
        """(B, 3, N, H, W) in [-1, 1] to (B,) scores; higher means more real.

        Raises:
            ShapeError: video is not (B, 3, N, H, W).
        """
        if video.ndim != 5 or video.shape[1] != 3:
            raise ShapeError(f"video must be (B, 3, N, H, W), got {tuple(video.shape)}.")
        x = self.input(video)
        for block in self.blocks:
            x = block(x)
        scores: Tensor = self.output(F.leaky_relu(x, 0.2).mean(dim=(2, 3, 4)))
        return scores[:, 0].float()
