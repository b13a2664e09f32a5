"""Care for the codebooks of a residual vector quantiser while it is trained: where codes start, and where dead ones go.

The `encodec` package has both, but its k-means sees a single batch, and the codes it replaces are overwritten by the
moving average that follows in the same step. Knows latents, never sounds.

Legend: N latents, D latent size, C codes a codebook.
"""

from __future__ import annotations

import torch
from encodec.quantization import ResidualVectorQuantizer
from torch import Tensor

__all__ = ["initialise", "reset_statistics", "revive"]


@torch.no_grad()
def initialise(quantizer: ResidualVectorQuantizer, latents: Tensor, num_iterations: int = 12) -> None:
    """Fit every level's codebook by k-means, coarse to fine, each to what the levels before it leave over.

    Args:
        quantizer: whose codebooks are set.
        latents: (N, D) float32; best some ten a code or more. Draws from torch's global generator.
        num_iterations: k-means passes a level.
    """
    residual = latents
    for level in quantizer.vq.layers:
        size = level.codebook_size
        vectors = residual[torch.randint(len(residual), (size,), device=residual.device)]
        for _ in range(num_iterations):
            nearest = _nearest(residual, vectors)
            counts = torch.bincount(nearest, minlength=size)
            sums = torch.zeros_like(vectors).index_add_(0, nearest, residual)
            # A code that nothing is near to moves onto a latent drawn at random.
            strays = residual[torch.randint(len(residual), (size,), device=residual.device)]
            vectors = torch.where(counts[:, None] > 0, sums / counts.clamp(min=1)[:, None], strays)
        level._codebook.embed.copy_(vectors)
        residual = residual - vectors[_nearest(residual, vectors)]
    reset_statistics(quantizer)


@torch.no_grad()
def revive(quantizer: ResidualVectorQuantizer, latents: Tensor, threshold: float) -> int:
    """Move codes that have fallen out of use onto latents that are badly served.

    Args:
        quantizer: whose codebooks are changed.
        latents: (N, D) float32 of the present batch. Draws from torch's global generator.
        threshold: a code is dead when the moving average of its uses is below this share of its level's mean.

    Returns:
        How many codes moved.
    """
    residual, moved = latents, 0
    for level in quantizer.vq.layers:
        book = level._codebook
        error = residual - book.embed[_nearest(residual, book.embed)]
        dead = (book.cluster_size < threshold * book.cluster_size.mean()).nonzero()[:, 0]
        if len(dead):
            badness = error.square().sum(dim=1) + 1e-12
            chosen = residual[torch.multinomial(badness, len(dead), replacement=len(dead) > len(badness))]
            uses = book.cluster_size.mean()
            book.embed[dead] = chosen
            book.embed_avg[dead] = chosen * uses
            book.cluster_size[dead] = uses
            moved += len(dead)
        residual = error
    return moved


@torch.no_grad()
def reset_statistics(quantizer: ResidualVectorQuantizer) -> None:
    """Let training go on from the codebooks as they are, every code as if it were used once a step."""
    for level in quantizer.vq.layers:
        book = level._codebook
        book.embed_avg.copy_(book.embed)
        book.cluster_size.fill_(1.0)
        book.inited.fill_(1.0)


def _nearest(points: Tensor, vectors: Tensor) -> Tensor:
    """For each of (N, D) points the index of the nearest of (C, D) vectors: (N,) int64."""
    distances = vectors.square().sum(dim=1) - 2 * points @ vectors.T
    return distances.argmin(dim=1)
