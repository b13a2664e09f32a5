"""The optimisers of a run: AdamW, and Muon for matrices between hidden states. Knows parameters, not models."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

__all__ = ["build_optimizers"]


def build_optimizers(
    model: nn.Module,
    orthogonalised: Sequence[Tensor],
    *,
    learning_rate: float,
    muon_learning_rate: float,
    beta2: float,
    weight_decay: float,
) -> dict[str, tuple[torch.optim.Optimizer, float]]:
    """Build optimisers that step every parameter once between them.

    Muon orthogonalises the update of a matrix, which suits those between hidden states and not the tables of ids.

    Args:
        model: whose parameters to step.
        orthogonalised: those of its matrices that Muon has; none: AdamW has all.
        learning_rate: AdamW's highest.
        muon_learning_rate: Muon's highest, at the scale of AdamW's updates.
        beta2: AdamW's.
        weight_decay: of matrices; gains and single vectors have none.

    Returns:
        Name to optimiser and its highest learning rate.

    Source: Jordan et al., "Muon", 2024; its scale after Liu et al., "Muon is scalable for LLM training",
    arXiv:2502.16982, section 2.2.
    """
    taken = {id(weight) for weight in orthogonalised}
    rest = [weight for weight in model.parameters() if id(weight) not in taken]
    groups = [
        {"params": [weight for weight in rest if weight.ndim > 1], "weight_decay": weight_decay},
        {"params": [weight for weight in rest if weight.ndim == 1], "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, beta2), fused=True)
    optimizers: dict[str, tuple[torch.optim.Optimizer, float]] = {"adamw": (adamw, learning_rate)}
    if orthogonalised:
        muon = torch.optim.Muon(
            orthogonalised, lr=muon_learning_rate, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"
        )
        optimizers["muon"] = (muon, muon_learning_rate)
    return optimizers
