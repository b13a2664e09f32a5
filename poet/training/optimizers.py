"""The optimisers of a run: AdamW, and Muon for matrices between hidden states. Knows parameters, not models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Optimizers"]


class Optimizers:
    """Optimisers that step every parameter once between them.

    Muon orthogonalises the update of a matrix, which suits those between hidden states and not the tables of ids.

    Args:
        model: whose parameters to step.
        orthogonalised: those of its matrices that Muon has; none: AdamW has all.
        learning_rate: AdamW's highest.
        muon_learning_rate: Muon's highest, at the scale of AdamW's updates.
        beta2: AdamW's.
        weight_decay: of matrices; gains and single vectors have none.

    Attributes:
        by_name: the optimisers by name, "adamw" and, where it has matrices, "muon".

    Source: Jordan et al., "Muon", 2024; its scale after Liu et al., "Muon is scalable for LLM training",
    arXiv:2502.16982, section 2.2.
    """

    def __init__(
        self,
        model: nn.Module,
        orthogonalised: Sequence[Tensor],
        *,
        learning_rate: float,
        muon_learning_rate: float,
        beta2: float,
        weight_decay: float,
    ) -> None:
        taken = {id(weight) for weight in orthogonalised}
        rest = [weight for weight in model.parameters() if id(weight) not in taken]
        groups = [
            {"params": [weight for weight in rest if weight.ndim > 1], "weight_decay": weight_decay},
            {"params": [weight for weight in rest if weight.ndim == 1], "weight_decay": 0.0},
        ]
        self.by_name: dict[str, torch.optim.Optimizer] = {
            "adamw": torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, beta2), fused=True)
        }
        self._highest = {"adamw": learning_rate}
        if orthogonalised:
            self.by_name["muon"] = torch.optim.Muon(
                orthogonalised, lr=muon_learning_rate, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"
            )
            self._highest["muon"] = muon_learning_rate

    def set_learning_rate_share(self, share: float) -> None:
        """Give every optimiser that share of its highest learning rate."""
        for name, optimizer in self.by_name.items():
            for group in optimizer.param_groups:
                group["lr"] = self._highest[name] * share

    def step(self) -> None:
        """Step every parameter that has a gradient."""
        for optimizer in self.by_name.values():
            optimizer.step()

    def state_dict(self) -> dict[str, Any]:
        """The optimisers' states by name."""
        return {name: optimizer.state_dict() for name, optimizer in self.by_name.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Inverse of `state_dict`."""
        for name, optimizer in self.by_name.items():
            optimizer.load_state_dict(state[name])
