"""Losses of MAGVIT-v2: reconstruction, adversarial with LeCAM, entropy. Knows tensors, not schedules or optimisers.

Legend: B clips, N frames of H x W pixels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from poet_tokenizers.errors import ShapeError

__all__ = ["LeCam", "detail_weights", "edge_weights", "hinge_loss", "psnr", "reconstruction_loss"]


def detail_weights(video: Tensor, strength: float, threshold: float = 0.1) -> Tensor:
    """Weights that keep a flat background from outvoting what stands before it.

    A place counts as detail where any colour differs from the clip's median colour by more than `threshold`; it weighs
    1 + strength. The mean weight of a clip is 1.

    Args:
        video: (B, 3, N, H, W) in [-1, 1].
        strength: 0 weighs every place alike.
        threshold: in units of the pixel range [-1, 1].

    Returns:
        (B, 1, N, H, W) float32.
    """
    if strength == 0:
        return video.new_ones(video.shape[0], 1, *video.shape[2:])
    median = video.flatten(2).median(dim=2).values[:, :, None, None, None]
    detail = ((video - median).abs().amax(dim=1, keepdim=True) > threshold).float()
    weights = 1 + strength * detail
    return weights / weights.mean(dim=(1, 2, 3, 4), keepdim=True)


def edge_weights(video: Tensor, weights: Tensor, share: float, threshold: float = 0.1) -> Tensor:
    """Give `share` of a clip's weight to its edges alone, so that the outline of a small thing counts as a large one's.

    A place lies on an edge where colours within one pixel of it, in its frame, differ by more than `threshold`. A clip
    without any keeps its weights.

    Args:
        video: (B, 3, N, H, W) in [-1, 1].
        weights: (B, 1, N, H, W) of mean 1 a clip, from `detail_weights`.
        share: in [0, 1]; 0 changes nothing.
        threshold: in units of the pixel range [-1, 1].

    Returns:
        (B, 1, N, H, W) float32 of mean 1 a clip.
    """
    if share == 0:
        return weights
    frames = video.transpose(1, 2).flatten(0, 1)
    low, high = (sign * F.max_pool2d(sign * frames, 3, stride=1, padding=1) for sign in (-1, 1))
    edges = ((high - low).amax(dim=1) > threshold).float().unflatten(0, (video.shape[0], video.shape[2]))[:, None]
    mean = edges.mean(dim=(1, 2, 3, 4), keepdim=True)
    return torch.where(mean > 0, (1 - share) * weights + share * edges / mean.clamp_min(1e-9), weights)


def reconstruction_loss(output: Tensor, target: Tensor, weights: Tensor, l1_share: float) -> Tensor:
    """Weighted mean of squared error and, for a share of it, absolute error.

    Args:
        output: (B, 3, N, H, W).
        target: (B, 3, N, H, W).
        weights: (B, 1, N, H, W) from `detail_weights`.
        l1_share: 0 is squared error only, 1 is absolute error only.

    Returns:
        (B,): one loss a clip.

    Raises:
        ShapeError: output and target differ in shape.
    """
    if output.shape != target.shape:
        raise ShapeError(f"output and target must have one shape, got {tuple(output.shape)}, {tuple(target.shape)}.")
    difference = output.float() - target
    error = difference.square()
    if l1_share > 0:
        error = (1 - l1_share) * error + l1_share * difference.abs()
    return (weights * error).flatten(1).mean(dim=1)


def hinge_loss(real: Tensor, fake: Tensor) -> Tensor:
    """The discriminator's loss: real scores should exceed 1, those of reconstructions stay under -1."""
    return F.relu(1 - real).mean() + F.relu(1 + fake).mean()


class LeCam:
    """Keeps the discriminator's scores near the moving average of the other side's.

    Source: Tseng et al., "Regularizing generative adversarial networks under limited data", arXiv:2104.03310.
    """

    def __init__(self, decay: float = 0.99) -> None:
        self.decay, self.real, self.fake = decay, 0.0, 0.0

    def __call__(self, real: Tensor, fake: Tensor) -> Tensor:
        """Penalty for (B,) scores of real clips and of reconstructions; updates the averages."""
        self.real = self.decay * self.real + (1 - self.decay) * float(real.detach().mean())
        self.fake = self.decay * self.fake + (1 - self.decay) * float(fake.detach().mean())
        return F.relu(real - self.fake).square().mean() + F.relu(self.real - fake).square().mean()

    def state_dict(self) -> dict[str, float]:
        """The two averages."""
        return {"real": self.real, "fake": self.fake}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Inverse of `state_dict`."""
        self.real, self.fake = float(state["real"]), float(state["fake"])


def psnr(output: Tensor, target: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each clip in dB: (B, ...) pairs in [-1, 1] to (B,). Peak to peak is 2."""
    error = (output.float() - target).flatten(1).square().mean(dim=1).clamp_min(1e-10)
    return 10 * torch.log10(4 / error)
