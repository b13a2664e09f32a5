"""Batches of scenes, in an order that can be entered anywhere. Knows rows, epochs and ranks; tasks are the sampler's.

Epochs follow each other in one endless stream of rows, each epoch a permutation that (seed, epoch) decides. The stream
is cut into windows; each of R ranks takes every R-th row of a window, sorts its scenes by length, cuts them into
batches and shuffles the batches. So batch n needs its window alone: going on after a stop takes as long as making one
window, and nothing is repeated or left out. The shuffle of a window is the same on every rank, so that all ranks work
on scenes of about the same length at the same time.

Legend: B scenes of a micro batch, L ids of its longest scene.
"""

from __future__ import annotations

import functools
import threading
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NotRequired, Protocol, TypedDict

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from poet.data.packing import MODALITIES, SceneSampler, modalities
from poet.data.shards import EncodedClip
from poet.errors import ConfigError, ShapeError
from poet.sequence import PackedScene
from poet.vocabulary import Vocabulary

__all__ = ["Batch", "ClipRows", "SceneLoader", "collate"]

_FROM_SEEN_TO_MASKED = MODALITIES.index("masked_video") - MODALITIES.index("video")


class ClipRows(Protocol):
    """Clips by row: a `poet.data.shards.ShardReader`, or a list in tests."""

    def __len__(self) -> int: ...

    def __getitem__(self, row: int, /) -> EncodedClip: ...


class Batch(TypedDict):
    """One micro batch.

    Of films (`poet.data.films`) what is (B,) here is (B, N), for the N scenes of a row, and there is one thing more.

    Attributes:
        ids: (B, L) int64, filled up with <pad> on the right.
        inputs: (B, L) int64, what the model is shown: `ids`, with <mask> at the targets of scenes that are parallel.
        prefix_len: (B,) int64.
        lengths: (B,) int64, ids of each scene without padding.
        loss_mask: (B, L) bool, True where ids[b, i] is a target.
        modality: (B, L) uint8, places in `poet.data.packing.MODALITIES`.
        parallel: (B,) bool, scenes marked to be written many ids at once.
        rows: (B,) int64, which clip each scene was made of.
        offset: of films, (B,) int64, the rotary position of each row's first id.
    """

    ids: Tensor
    inputs: Tensor
    prefix_len: Tensor
    lengths: Tensor
    loss_mask: Tensor
    modality: Tensor
    parallel: Tensor
    rows: Tensor
    offset: NotRequired[Tensor]


class SceneLoader:
    """Micro batches of one rank. Iterating goes on from the batch that `state_dict` names.

    Args:
        clips: the shards.
        sampler: makes scenes of clips.
        phases: (batch, sampler) pairs, ascending: from the window of that batch on, scenes are made by that sampler in
            place of the one before. So a run can see other tasks in its first quarter than later.
        micro_batch_size: B.
        rank: of this process among those that share the data.
        world_size: how many those are.
        seed: of the order.
        length_grouped: put scenes of similar length together, which saves padding.
        window_batches: batches of a rank that are sorted together; more save more padding and take longer to enter.
        num_epochs: where the stream ends; None: never. At its end batches may be short, and one rank may have one
            batch more than another.
        max_length: refuse longer scenes; None: any.
        length_multiple: L is rounded up to a multiple of it, so that compiled models see fewer shapes.
        prefetch: batches that a thread makes ahead of time. Their order does not change.

    Raises:
        ConfigError: a number that cannot be used, or no clips.
    """

    def __init__(
        self,
        clips: ClipRows,
        sampler: SceneSampler,
        *,
        micro_batch_size: int,
        phases: Sequence[tuple[int, SceneSampler]] = (),
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        length_grouped: bool = True,
        window_batches: int = 32,
        num_epochs: int | None = None,
        max_length: int | None = None,
        length_multiple: int = 1,
        prefetch: int = 0,
    ) -> None:
        positive = {
            "micro_batch_size": micro_batch_size,
            "world_size": world_size,
            "window_batches": window_batches,
            "num_epochs": 1 if num_epochs is None else num_epochs,
            "length_multiple": length_multiple,
        }
        for name, value in positive.items():
            if value < 1:
                raise ConfigError(f"{name} must be at least 1, got {value}.")
        if not 0 <= rank < world_size:
            raise ConfigError(f"rank must lie in [0, {world_size}), got {rank}.")
        if seed < 0 or prefetch < 0:
            raise ConfigError(f"seed and prefetch must not be negative, got {seed} and {prefetch}.")
        if len(clips) == 0:
            raise ConfigError("there must be at least one clip to train on, got empty shards. Encode clips first.")
        self.next_batch = 0
        self._clips = clips
        borders = [batch for batch, _ in phases]
        if borders != sorted(set(borders)) or any(batch < 1 for batch in borders):
            raise ConfigError(f"phases must begin at ascending batches from 1 on, got {borders}.")
        self._sampler = sampler
        self._phases = tuple(phases)
        self._batch_size, self._rank, self._world_size = micro_batch_size, rank, world_size
        self._seed = seed
        self._grouped = length_grouped
        self._window_batches = window_batches if length_grouped else 1
        self._num_epochs = num_epochs
        self._max_length = max_length
        self._length_multiple = length_multiple
        self._prefetch = prefetch
        self._window_rows = self._window_batches * micro_batch_size * world_size
        self._permutation = functools.lru_cache(maxsize=2)(self._permute)
        self._window = functools.lru_cache(maxsize=1)(self._make_window)
        self._lock = threading.Lock()  # the caches belong to one thread at a time

    @property
    def num_batches(self) -> int | None:
        """Batches of this rank in the whole stream; None if it never ends."""
        if self._num_epochs is None:
            return None
        windows, rest = divmod(self._num_epochs * len(self._clips), self._window_rows)
        own = len(range(self._rank, rest, self._world_size))
        return windows * self._window_batches + -(-own // self._batch_size)

    def epoch_of(self, batch: int) -> float:
        """How many epochs the batches before this one make."""
        return batch * self._batch_size * self._world_size / len(self._clips)

    def batch(self, number: int) -> Batch:
        """Batch `number`, counted from 0: a pure function of the arguments of the loader.

        Raises:
            IndexError: the stream ends before it.
            ShapeError: a scene is longer than `max_length`.
        """
        window, place = divmod(number, self._window_batches)
        if number < 0 or (self.num_batches is not None and number >= self.num_batches):
            raise IndexError(f"a batch must lie in [0, {self.num_batches}), got {number}.")
        with self._lock:
            chosen = self._window(window)[place]
        return self._collate(chosen)

    def __iter__(self) -> Iterator[Batch]:
        """Batches from `next_batch` on. A batch counts as used when it has been handed out."""
        if self._prefetch == 0:
            while self.num_batches is None or self.next_batch < self.num_batches:
                batch = self.batch(self.next_batch)
                self.next_batch += 1
                yield batch
            return
        executor = ThreadPoolExecutor(1, thread_name_prefix="scenes")
        pending: deque[Future[Batch]] = deque()
        ahead = self.next_batch
        try:
            while self.num_batches is None or self.next_batch < self.num_batches:
                while len(pending) < self._prefetch and (self.num_batches is None or ahead < self.num_batches):
                    pending.append(executor.submit(self.batch, ahead))
                    ahead += 1
                batch = pending.popleft().result()
                self.next_batch += 1
                yield batch
        finally:
            executor.shutdown(cancel_futures=True)

    def state_dict(self) -> dict[str, Any]:
        """Where the stream stands and what decides it, as JSON values. The same on every rank."""
        return {"next_batch": self.next_batch, "settings": self._settings()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where another loader stopped. Takes effect for iterators made afterwards.

        Raises:
            ConfigError: that loader read other clips, or in another order; the message names what differs.
        """
        theirs, ours = dict(state["settings"]), self._settings()
        differences = [
            f"{name} was {theirs.get(name)!r}, is {ours.get(name)!r}"
            for name in sorted(theirs.keys() | ours.keys())
            if theirs.get(name) != ours.get(name)
        ]
        if differences:
            raise ConfigError(
                f"data can only be resumed in the order it was begun in: {'; '.join(differences)}. Restore these "
                "settings, or start a new run from the weights."
            )
        self.next_batch = int(state["next_batch"])

    def _settings(self) -> dict[str, Any]:
        return {
            "num_clips": len(self._clips),
            "micro_batch_size": self._batch_size,
            "world_size": self._world_size,
            "seed": self._seed,
            "length_grouped": self._grouped,
            "window_batches": self._window_batches,
            "num_epochs": self._num_epochs,
            "sampler": self._sampler.settings,
            **({"phases": [[batch, sampler.settings] for batch, sampler in self._phases]} if self._phases else {}),
        }

    def _sampler_of(self, window: int) -> SceneSampler:
        begun = [sampler for batch, sampler in self._phases if batch <= window * self._window_batches]
        return begun[-1] if begun else self._sampler

    def _permute(self, epoch: int) -> NDArray[np.int64]:
        return np.random.default_rng([self._seed, 0, epoch]).permutation(len(self._clips))

    def _make_window(self, window: int) -> list[list[tuple[int, PackedScene]]]:
        """The batches of one window as (row, scene), in the order in which they are due."""
        stop = (window + 1) * self._window_rows
        if self._num_epochs is not None:
            stop = min(stop, self._num_epochs * len(self._clips))
        sampler, scenes = self._sampler_of(window), []
        for position in range(window * self._window_rows + self._rank, stop, self._world_size):
            epoch, place = divmod(position, len(self._clips))
            row = int(self._permutation(epoch)[place])
            scenes.append((row, sampler.scene(self._clips[row], epoch, row)))
        if self._grouped:
            scenes.sort(key=lambda scene: -len(scene[1].ids))
        batches = [scenes[i : i + self._batch_size] for i in range(0, len(scenes), self._batch_size)]
        order = np.random.default_rng([self._seed, 1, window]).permutation(len(batches))
        return [batches[i] for i in order]

    def _collate(self, chosen: list[tuple[int, PackedScene]]) -> Batch:
        lengths = [len(scene.ids) for _, scene in chosen]
        longest = max(lengths)
        if self._max_length is not None and longest > self._max_length:
            row = chosen[lengths.index(longest)][0]
            raise ShapeError(
                f"scenes must have at most {self._max_length} ids, got {longest} of clip {self._clips[row].key}. Raise "
                "scene_length or encode shorter clips."
            )
        width = -(-longest // self._length_multiple) * self._length_multiple
        return collate(chosen, self._sampler.vocabulary, width)


def collate(chosen: Sequence[tuple[int, PackedScene]], vocabulary: Vocabulary, width: int) -> Batch:
    """Lay scenes into the rows of a batch.

    Args:
        chosen: (row, scene) pairs, at most `width` ids each.
        vocabulary: of their ids.
        width: L.
    """
    lengths = [len(scene.ids) for _, scene in chosen]
    ids = np.full((len(chosen), width), vocabulary.special("<pad>"), np.int64)
    loss_mask = np.zeros(ids.shape, np.bool_)
    for place, (_, scene) in enumerate(chosen):
        ids[place, : len(scene.ids)] = scene.ids
        loss_mask[place, : len(scene.ids)] = scene.loss_mask
    # <parallel> can stand in the third place alone.
    parallel = ids[:, 2] == vocabulary.special("<parallel>")
    hidden = parallel[:, None] & loss_mask
    kinds = modalities(ids, vocabulary)
    kinds[hidden] += _FROM_SEEN_TO_MASKED
    return Batch(
        ids=torch.from_numpy(ids),
        inputs=torch.from_numpy(np.where(hidden, vocabulary.special("<mask>"), ids)),
        prefix_len=torch.tensor([scene.prefix_len for _, scene in chosen]),
        lengths=torch.tensor(lengths),
        loss_mask=torch.from_numpy(loss_mask),
        modality=torch.from_numpy(kinds),
        parallel=torch.from_numpy(parallel),
        rows=torch.tensor([row for row, _ in chosen]),
    )
