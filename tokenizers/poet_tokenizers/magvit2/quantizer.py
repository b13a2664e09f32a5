"""Lookup-free quantisation: a code is the signs of its dimensions, read as a binary number.

Legend: B clips, K bits, T x H x W latent places, G groups of bits.
"""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from poet_tokenizers.errors import ShapeError

__all__ = ["LookupFreeQuantizer", "Quantized"]


@dataclasses.dataclass(frozen=True)
class Quantized:
    """What the quantiser gives in training.

    Attributes:
        latent: (B, K, T, H, W) of -1 and 1, with the gradient passed straight through.
        codes: (B, T, H, W) int64 in [0, 2 ** K).
        sample_entropy: mean over places of the entropy of the soft code, in nats a bit; small means sure.
        codebook_entropy: entropy of the mean soft code, in nats a bit; large means that all codes are used.
        commitment: mean squared distance between latent and its quantised value.
    """

    latent: Tensor
    codes: Tensor
    sample_entropy: Tensor
    codebook_entropy: Tensor
    commitment: Tensor


class LookupFreeQuantizer(nn.Module):
    """LFQ with a normalisation in front and an entropy term whose cost does not grow with the codebook.

    The soft code has independent bits, so the entropy of one place is the exact sum over bits. The entropy of the mean
    over places is taken group by group: 2 ** group_bits terms instead of 2 ** num_bits.

    Source: MAGVIT-v2, arXiv:2310.05737, section 3.1. Their entropy penalty is sample_entropy - codebook_entropy.
    """

    powers: Tensor
    group_signs: Tensor

    def __init__(self, num_bits: int, group_bits: int, temperature: float = 1.0) -> None:
        super().__init__()
        self.num_bits, self.group_bits, self.temperature = num_bits, group_bits, temperature
        self.register_buffer("powers", 2 ** torch.arange(num_bits), persistent=False)
        grid = torch.arange(2**group_bits)[:, None] >> torch.arange(group_bits) & 1
        self.register_buffer("group_signs", grid.float(), persistent=False)

    def forward(self, x: Tensor) -> Quantized:
        """Quantise (B, K, T, H, W) for training, in float32 whatever the autocast."""
        with torch.autocast(x.device.type, enabled=False):
            x = _normalise(x.float())
            signs = torch.where(x > 0, 1.0, -1.0)
            latent = x + (signs - x).detach()
            # P(bit = 1) of a softmax over squared distances to -1 and 1
            logits = 4 * x / self.temperature
            probability = torch.sigmoid(logits)
            sample_entropy = F.binary_cross_entropy_with_logits(logits, probability, reduction="mean")
            grouped = rearrange(logits, "b (g k) t h w -> g (b t h w) k", k=self.group_bits)
            yes, no = F.logsigmoid(grouped), F.logsigmoid(-grouped)
            log_codes = yes @ self.group_signs.T + no @ (1 - self.group_signs.T)  # (G, places, 2 ** group_bits)
            mean = log_codes.exp().mean(dim=1)
            codebook_entropy = -(mean * (mean + 1e-9).log()).sum(dim=1).mean() / self.group_bits
            commitment = F.mse_loss(x, signs)
        return Quantized(latent, self._to_codes(signs), sample_entropy, codebook_entropy, commitment)

    def encode(self, x: Tensor) -> Tensor:
        """(B, K, T, H, W) to codes (B, T, H, W) int64."""
        return self._to_codes(x)

    def decode(self, codes: Tensor) -> Tensor:
        """Codes (B, T, H, W) int64 in [0, 2 ** K) to the latent (B, K, T, H, W) of -1 and 1.

        Raises:
            ShapeError: a code is out of range.
        """
        if codes.numel() and (int(codes.min()) < 0 or int(codes.max()) >= 2**self.num_bits):
            raise ShapeError(
                f"video codes must lie in [0, {2**self.num_bits}), got {int(codes.min())} to {int(codes.max())}. "
                "Ids of the shared vocabulary must be turned into codes first."
            )
        bits = (rearrange(codes, "b t h w -> b 1 t h w") & self.powers.view(1, -1, 1, 1, 1)) > 0
        return bits.float() * 2 - 1

    def _to_codes(self, x: Tensor) -> Tensor:
        return ((x > 0) * self.powers.view(1, -1, 1, 1, 1)).sum(dim=1)


def _normalise(x: Tensor) -> Tensor:
    """Scale the K values of each place to a root mean square of 1, so that every place is equally far from its code."""
    return x * torch.rsqrt(x.square().mean(dim=1, keepdim=True) + 1e-6)
