"""The loss of the language model: cross-entropy on output ids, by modality. Knows tensors, not where they come from.

Legend: B scenes, L places, C hidden size, V vocabulary, P places that are targets.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from poet.errors import ShapeError
from poet.training.distillation import GuidedTargets

__all__ = ["backward_from_targets", "modality_means", "target_losses"]


def target_losses(
    hidden: Tensor, ids: Tensor, loss_mask: Tensor, logits: Callable[[Tensor], Tensor], chunk: int = 4096
) -> Tensor:
    """Cross-entropy of every target, read off the hidden state one place before it.

    Logits are made for targets only, some thousands at a time, so that they never exist for a whole batch.

    Args:
        hidden: (B, L, C).
        ids: (B, L) int64.
        loss_mask: (B, L) bool, True where ids[b, i] is a target; never at place 0.
        logits: (P, C) to (P, V).
        chunk: targets at a time.

    Returns:
        (P,) float32, in the order of the mask.

    Raises:
        ShapeError: shapes differ, or there is nothing to predict, or a target at place 0.
    """
    if hidden.shape[:2] != ids.shape or ids.shape != loss_mask.shape:
        raise ShapeError(
            f"hidden, ids and loss_mask must be (B, L, C), (B, L), (B, L); "
            f"got {tuple(hidden.shape)}, {tuple(ids.shape)}, {tuple(loss_mask.shape)}."
        )
    if not bool(loss_mask.any()) or bool(loss_mask[:, 0].any()):
        raise ShapeError("loss_mask must mark at least one target, and none at place 0: nothing stands before it.")
    places, targets = hidden[:, :-1][loss_mask[:, 1:]], ids[:, 1:][loss_mask[:, 1:]]
    parts = [
        F.cross_entropy(logits(places[start : start + chunk]).float(), targets[start : start + chunk], reduction="none")
        for start in range(0, len(targets), chunk)
    ]
    return torch.cat(parts)


def backward_from_targets(
    hidden: Tensor,
    ids: Tensor,
    loss_mask: Tensor,
    logits: Callable[[Tensor], Tensor],
    chunk: int = 1024,
    total: int | None = None,
    guided: GuidedTargets | None = None,
) -> Tensor:
    """`target_losses` and the gradient of their mean in one go, chunk by chunk.

    The logits of one chunk are gone before those of the next are made, in the backward pass as well. On a CPU that
    takes half the time of one large cross-entropy.

    Args:
        hidden: (B, L, C), the end of the graph that is to be differentiated.
        ids: (B, L) int64.
        loss_mask: (B, L) bool.
        logits: (P, C) to (P, V).
        chunk: targets at a time.
        total: targets to take the mean over, where these are a part of a batch; None takes these.
        guided: what some scenes shall learn in place of their ids; the loss there is cross-entropy with that.

    Returns:
        (P,) float32 losses, detached; gradients have been added to everything that they depend on.
    """
    count = int(loss_mask.sum())
    rows, columns = loss_mask.nonzero(as_tuple=True)
    gradient, parts = torch.zeros_like(hidden), []
    for start in range(0, count, chunk):
        row, column = rows[start : start + chunk], columns[start : start + chunk]
        piece = hidden.detach()[row, column - 1].requires_grad_()
        scores = logits(piece).float()
        losses = F.cross_entropy(scores, ids[row, column], reduction="none")
        if guided is not None and bool((soft := guided.taught[row, column]).any()):
            learnt = F.cross_entropy(scores[soft], guided.probabilities(row[soft], column[soft]), reduction="none")
            losses = losses.masked_scatter(soft, learnt)
        (losses.sum() / (count if total is None else total)).backward()
        assert piece.grad is not None
        gradient[row, column - 1] = piece.grad.to(gradient.dtype)
        parts.append(losses.detach())
    hidden.backward(gradient)
    return torch.cat(parts)


def modality_means(losses: Tensor, modality: Tensor, loss_mask: Tensor, names: tuple[str, ...]) -> dict[str, float]:
    """Mean loss of each modality that occurs among the targets.

    Args:
        losses: (P,) from `target_losses`.
        modality: (B, L) integers, places in `names`.
        loss_mask: (B, L) bool.
        names: of the modalities.
    """
    kinds = modality[loss_mask]
    means = {}
    for place, name in enumerate(names):
        chosen = losses.detach()[kinds == place]
        if len(chosen):
            means[f"{name}_loss"] = float(chosen.mean())
    return means
