"""Earlier scenes of films before the scenes that the reference writes: who sees them, where, and in what cache.

Legend: B rows, M ids of the longest past, L places of the scenes, guides' rows included.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from poet.errors import ShapeError
from poet.model.attention import SceneLayout
from poet.model.transformer import KeyValueCache, PoetTransformer

__all__ = ["build_cache"]

FILLER = 0
"""Stands left of a past that is shorter than the longest. No place that counts ever sees it."""


def build_cache(
    model: PoetTransformer, contexts: Sequence[Sequence[int]], layout: SceneLayout
) -> tuple[KeyValueCache, SceneLayout, Tensor]:
    """Make a cache that holds the earlier scenes of every row and has room for the scene to come.

    Args:
        model: in evaluation mode.
        contexts: of each row the ids of its film's earlier scenes, each scene padded; () where there is none.
        layout: of the B scenes to come, one a row.

    Returns:
        The cache, with M places filled; the layout of all M + L places; and their (B, M + L) int64 rotary positions.

    Raises:
        ShapeError: there are not as many pasts as scenes.
    """
    device, dtype = model.model.norm.weight.device, model.model.norm.weight.dtype
    rows, length = layout.shape
    if len(contexts) != rows:
        raise ShapeError(f"there must be a past, or (), for each of the {rows} rows, got {len(contexts)}.")
    lengths = torch.tensor([len(ids) for ids in contexts])
    longest = int(lengths.max())
    cache = KeyValueCache(model.config, rows, longest + length, device, dtype, context=longest)
    positions = layout.positions()
    if not longest:
        return cache, layout.to(device), positions.to(device)
    ids = torch.tensor([[*[FILLER] * (longest - len(row)), *row] for row in contexts])
    before = (torch.arange(longest) - (longest - lengths)[:, None]).clamp_min(0)
    positions = torch.cat((before, positions.cpu() + lengths[:, None]), 1).to(device)
    model.remember(ids.to(device), positions[:, :longest], cache)
    return cache, layout.to("cpu").after(lengths, longest).to(device), positions
