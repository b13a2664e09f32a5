"""Who sees whom: one rule, the masks made from it, and attention under a mask.

The rule (`may_attend`): a query sees a key if both lie in the same packed document, and the key is not later or both
lie in the prefix of the same scene (in parallel mode: anywhere in the same scene), and the layer is 0 or the scene is
the same. So layer 0 alone looks across the scenes of a film: its earlier scenes are Perceiver AR's context, the current
scene's places are its latents (arXiv:2202.07765; the two-way prefix is VideoPoet's, arXiv:2312.14125).

This file knows places, documents and scenes. It does not know ids, modalities or the transformer's weights.

Legend: B rows, N scenes of a row, L places of a row, Q query places, K key places, H query heads, G key and value
heads, D width of a head.
"""

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from torch.nn.functional import scaled_dot_product_attention

from poet.errors import ShapeError

__all__ = ["AttentionMask", "MaskTile", "Places", "SceneLayout", "attend", "may_attend", "visible"]

PADDING = -1
"""The document of places that hold no id of any scene. They see one another only, and no one sees them."""

TILE = 192
"""Query places in one tile of attention on a CPU: best of 64 to 480 for L = 480, D = 64 in bfloat16."""


class Places(NamedTuple):
    """What the rule needs to know of a place. The tensors broadcast: a scalar each, or whole axes."""

    place: Tensor
    document: Tensor
    scene: Tensor
    prefix: Tensor
    parallel: Tensor


def may_attend(layer: int, query: Places, key: Places) -> Tensor:
    """Say whether `query` sees `key` in `layer`: the one rule, from which every mask is made.

    Returns:
        bool, of the shape that the two places broadcast to.
    """
    same_document = query.document == key.document
    same_scene = same_document & (query.scene == key.scene)
    both_ways = same_scene & ((query.prefix & key.prefix) | (query.parallel & key.parallel))
    seen = (key.place <= query.place) | both_ways
    return seen & (same_document if layer == 0 else same_scene)


@dataclass(frozen=True)
class SceneLayout:
    """Where the documents, scenes and prefixes of a batch lie.

    Attributes:
        document: (B, L) int64; what was packed into one row does not see each other. -1 marks padding.
        scene: (B, L) int64; number of the scene inside its document.
        prefix: (B, L) bool; True where the place belongs to its scene's prefix.
        parallel: (B, L) bool; True throughout a scene that is written in parallel (MaskGIT).
        films: whether any document holds more than one scene. If not, all layers share one mask.
    """

    document: Tensor
    scene: Tensor
    prefix: Tensor
    parallel: Tensor
    films: bool

    def __post_init__(self) -> None:
        shapes = [tuple(t.shape) for t in (self.document, self.scene, self.prefix, self.parallel)]
        if len(set(shapes)) != 1 or len(shapes[0]) != 2:
            raise ShapeError(f"document, scene, prefix and parallel must all be (B, L), got {shapes}.")

    @property
    def shape(self) -> tuple[int, int]:
        """(B, L)."""
        return self.document.shape[0], self.document.shape[1]

    @classmethod
    def from_prefix_lengths(
        cls,
        prefix_lengths: Tensor,
        lengths: Tensor,
        max_len: int,
        *,
        parallel: Tensor | None = None,
        left_padded: bool = False,
    ) -> "SceneLayout":
        """One scene a row: the common case.

        Args:
            prefix_lengths: (B,) int64 in [0, lengths].
            lengths: (B,) int64 in [0, max_len]; ids of each row without padding.
            max_len: L.
            parallel: (B,) bool; rows that are written in parallel. None: none.
            left_padded: whether the padding stands left of the ids rather than right.

        Raises:
            ShapeError: the lengths are not (B,), or do not fit into each other.
        """
        _check_lengths(prefix_lengths, lengths, max_len)
        place = torch.arange(max_len, device=lengths.device)
        first = (max_len - lengths if left_padded else torch.zeros_like(lengths))[:, None]
        inside = (place >= first) & (place < first + lengths[:, None])
        scene = torch.zeros_like(inside, dtype=torch.int64)
        whole = torch.zeros_like(inside) if parallel is None else inside & parallel[:, None]
        prefix = inside & (place < first + prefix_lengths[:, None])
        return cls(torch.where(inside, 0, PADDING), scene, prefix, whole, films=False)

    @classmethod
    def from_packed(
        cls,
        prefix_lengths: Tensor,
        lengths: Tensor,
        max_len: int,
        *,
        parallel: Tensor | None = None,
        films: bool = False,
    ) -> "SceneLayout":
        """Several scenes in a row, one after another without gaps.

        Args:
            prefix_lengths: (B, N) int64 in [0, lengths].
            lengths: (B, N) int64; ids of each scene; 0 for a scene that is not there. Each row sums to at most max_len.
            max_len: L; what the scenes leave free at the right is padding.
            parallel: (B, N) bool; scenes that are written in parallel. None: none.
            films: True if the scenes of a row are one film, False if they have nothing to do with each other.

        Raises:
            ShapeError: the lengths are not (B, N), or do not fit into each other.
        """
        _check_lengths(prefix_lengths, lengths, max_len)
        ends = lengths.cumsum(1)
        place = torch.arange(max_len, device=lengths.device).expand(lengths.shape[0], -1).contiguous()
        number = torch.searchsorted(ends, place, right=True)
        inside = number < lengths.shape[1]
        number = number.clamp(max=lengths.shape[1] - 1)
        prefix = inside & (place < (ends - lengths + prefix_lengths).gather(1, number))
        whole = torch.zeros_like(inside) if parallel is None else inside & parallel.gather(1, number)
        document = torch.where(inside, torch.zeros_like(number) if films else number, PADDING)
        return cls(document, number if films else torch.zeros_like(number), prefix, whole, films=films)

    @classmethod
    def from_films(cls, prefix_lengths: Tensor, scene_length: int, *, parallel: Tensor | None = None) -> "SceneLayout":
        """Films of N scenes, each padded to exactly `scene_length` ids: L = N * scene_length.

        The padding between scenes counts as ids of its film: later scenes see it in layer 0, as they do in every engine
        that keeps a plain cache.

        Args:
            prefix_lengths: (B, N) int64 in [0, scene_length].
            scene_length: ids of every scene.
            parallel: (B, N) bool; scenes that are written in parallel. None: none.
        """
        lengths = torch.full_like(prefix_lengths, scene_length)
        max_len = scene_length * prefix_lengths.shape[-1]
        return cls.from_packed(prefix_lengths, lengths, max_len, parallel=parallel, films=True)

    def to(self, device: torch.device | str) -> "SceneLayout":
        """Return the layout on another device."""
        parts = {name: getattr(self, name).to(device) for name in ("document", "scene", "prefix", "parallel")}
        return replace(self, **parts)

    def select(self, rows: Tensor) -> "SceneLayout":
        """Return the layout of some rows: (B,) bool, or (R,) int64."""
        parts = {name: getattr(self, name)[rows] for name in ("document", "scene", "prefix", "parallel")}
        return replace(self, **parts)

    def positions(self) -> Tensor:
        """Count the places of each document from 0: the rotary positions, which run on through a film.

        Returns:
            (B, L) int64.
        """
        place = torch.arange(self.document.shape[1], device=self.document.device).expand_as(self.document)
        starts = torch.ones_like(self.prefix)
        starts[:, 1:] = self.document[:, 1:] != self.document[:, :-1]
        return place - torch.where(starts, place, 0).cummax(1).values

    def places(self, start: int, stop: int) -> Places:
        """Return places start to stop; `place` is (L,), the other tensors are (B, L)."""
        index = torch.arange(start, stop, device=self.document.device)
        parts = (self.document, self.scene, self.prefix, self.parallel)
        return Places(index, *(part[:, start:stop] for part in parts))

    def dense_mask(self, layer: int, start: int = 0, stop: int | None = None) -> Tensor:
        """Apply the rule to queries start to stop and all keys before stop.

        Returns:
            (B, Q, K) bool with Q = stop - start and K = stop; True where the query sees the key.
        """
        stop = self.document.shape[1] if stop is None else stop
        query, key = self.places(start, stop), self.places(0, stop)
        down = Places(query.place[:, None], *(part[:, :, None] for part in query[1:]))
        across = Places(key.place, *(part[:, None, :] for part in key[1:]))
        return may_attend(layer, down, across)

    def block_mask(self, layer: int, block_size: int = 128) -> BlockMask:
        """Apply the rule as a FlexAttention block mask, (B, 1, L, L); the same for every head."""

        def at(row: Tensor, place: Tensor) -> Places:
            parts = (self.document, self.scene, self.prefix, self.parallel)
            return Places(place, *(part[row, place] for part in parts))

        def rule(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return may_attend(layer, at(row, query), at(row, key))

        rows, length = self.shape
        device = str(self.document.device)
        return create_block_mask(rule, rows, None, length, length, device=device, BLOCK_SIZE=block_size)

    def masks(
        self, dtype: torch.dtype, start: int = 0, stop: int | None = None, *, context: int = 0
    ) -> tuple["AttentionMask", "AttentionMask"]:
        """Make the two masks of a forward pass: that of layer 0 and that of all other layers (one, without films).

        Args:
            dtype: of the queries and keys to come.
            start: first query.
            stop: one past the last; None takes all.
            context: keys at the beginning that only layer 0 has.
        """
        first = visible(self.dense_mask(0, start, stop), dtype)
        if not self.films and not context:
            return first, first
        return first, visible(self.dense_mask(1, start, stop)[:, :, context:], dtype)

    def after(self, context_lengths: Tensor, max_context: int) -> "SceneLayout":
        """The layout of the same scenes, one a row, behind the earlier scenes of their films.

        Args:
            context_lengths: (B,) int64 in [0, max_context]; ids of the earlier scenes, which stand at the right of the
                context.
            max_context: places of the context.

        Returns:
            The layout of max_context + L places. The earlier scenes count as one: nobody asks for them again.
        """
        place = torch.arange(max_context, device=self.document.device)
        inside = place >= max_context - context_lengths.to(place.device)[:, None]
        no = torch.zeros_like(inside)
        return SceneLayout(
            torch.cat((torch.where(inside, 0, PADDING), self.document), 1),
            torch.cat((torch.full_like(inside, -1, dtype=torch.int64), self.scene), 1),
            torch.cat((no, self.prefix), 1),
            torch.cat((no, self.parallel), 1),
            films=True,
        )


class MaskTile(NamedTuple):
    """A run of queries with the run of keys that any of them sees."""

    queries: slice
    keys: slice
    bias: Tensor | None
    """(B, 1, 1, Q, K), 0 where seen and -inf where not; None if every query sees every key."""


AttentionMask = Tensor | tuple[MaskTile, ...]
"""(B, 1, Q, K) bool on an accelerator; tiles on a CPU."""


def visible(mask: Tensor, dtype: torch.dtype) -> AttentionMask:
    """Bring a dense mask into the form that `attend` reads fastest on its device.

    Args:
        mask: (B, Q, K) bool, True where seen. No row may be all False.
        dtype: of the queries and keys to come.
    """
    if mask.device.type != "cpu":
        return mask[:, None]
    tiles = []
    for start in range(0, mask.shape[1], TILE):
        part = mask[:, start : start + TILE]
        seen = part.flatten(0, 1).any(0).nonzero()
        keys = slice(int(seen[0]), int(seen[-1]) + 1)
        part = part[:, :, keys]
        bias = None if bool(part.all()) else torch.zeros(part.shape, dtype=dtype).masked_fill_(~part, float("-inf"))
        queries = slice(start, start + part.shape[1])
        tiles.append(MaskTile(queries, keys, None if bias is None else bias[:, None, None]))
    return tuple(tiles)


def attend(query: Tensor, key: Tensor, value: Tensor, mask: AttentionMask) -> Tensor:
    """Compute grouped-query attention, softmax(q k^T / sqrt(D)) v, under a mask from `visible`.

    On a CPU the queries go tile by tile, against only the keys that the tile sees, in plain matrix products: trained in
    bfloat16 that takes 0.4 times as long as the fused kernel, which neither skips unseen keys under a mask nor reaches
    the speed of the products. Elsewhere the fused kernel does it.

    Args:
        query: (B, H, Q, D).
        key: (B, G, K, D), same dtype; G divides H.
        value: (B, G, K, D), same dtype.
        mask: for Q queries and K keys, of the same dtype where it holds a bias.

    Returns:
        (B, H, Q, D), the queries' dtype.
    """
    if isinstance(mask, Tensor):
        return scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True)
    rows, heads, _, width = query.shape
    groups = key.shape[1]
    stack = heads // groups
    query = (query * width**-0.5).view(rows, groups, stack, -1, width)
    outputs = []
    for tile in mask:
        part = query[:, :, :, tile.queries]
        # The heads of a group share their keys, so their queries are stacked into one taller matrix.
        scores = part.flatten(2, 3) @ key[:, :, tile.keys].transpose(-1, -2)
        scores = scores.view(rows, groups, stack, part.shape[3], -1)
        if tile.bias is not None:
            scores = scores + tile.bias
        seen = scores.softmax(-1).flatten(2, 3) @ value[:, :, tile.keys]
        outputs.append(seen.view(rows, groups, stack, -1, width))
    return torch.cat(outputs, 3).flatten(1, 2)


def _check_lengths(prefix_lengths: Tensor, lengths: Tensor, max_len: int) -> None:
    """Both of one shape, prefix within scene, scenes within the row. Read on the CPU only: elsewhere it would wait."""
    if prefix_lengths.shape != lengths.shape:
        raise ShapeError(
            "prefix_lengths and lengths must have one shape, "
            f"got {tuple(prefix_lengths.shape)} and {tuple(lengths.shape)}."
        )
    if lengths.device.type != "cpu":
        return
    if bool(((prefix_lengths < 0) | (prefix_lengths > lengths)).any()):
        raise ShapeError(
            f"every prefix length must be in [0, length], got {prefix_lengths.tolist()} for lengths {lengths.tolist()}."
        )
    total = lengths if lengths.dim() == 1 else lengths.sum(1)
    if bool((total > max_len).any()):
        raise ShapeError(f"every row must have at most max_len = {max_len} ids, got {total.tolist()}.")
