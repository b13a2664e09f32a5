"""Batches of films: scenes in a row, each padded to the same length, in the order in which they were encoded.

A film is what clips with keys NAME.0, NAME.1, ... make, one after another in the shards. A batch holds as many scenes
of each of its films, from the first on; its rows begin at positions of their own, so that a model meets positions of
longer films than it is shown. What a batch holds is a pure function of (seed, number).

Legend: B films of a batch, N scenes of each, S ids of a scene, L = N S.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from poet.data.loader import Batch, ClipRows, collate
from poet.data.noise import check_flips, flip_bits
from poet.data.packing import SceneSampler
from poet.errors import ConfigError, ShapeError
from poet.model.attention import SceneLayout

__all__ = ["FilmLoader", "layout_of"]


class FilmLoader:
    """Batches of films by number.

    Args:
        clips: the shards.
        sampler: makes scenes of clips, none of them with hidden places: what is written later must see them whole.
        last: makes the last scene of each film, which may have hidden places.
        batch_size: B.
        num_scenes: fewest and most of N, which each batch draws.
        scene_length: S.
        num_positions: positions of the model; the largest that a batch reaches is below.
        noise: share of the bits of video codes that are flipped in what the model is shown, at most; see
            `poet.data.noise`.
        seed: of everything that is drawn.

    Raises:
        ConfigError: no film has so many scenes, or a number that cannot be used.
    """

    def __init__(
        self,
        clips: ClipRows,
        sampler: SceneSampler,
        last: SceneSampler,
        *,
        batch_size: int,
        num_scenes: tuple[int, int],
        scene_length: int,
        num_positions: int,
        noise: float = 0.0,
        seed: int = 0,
    ) -> None:
        check_flips(noise, sampler.vocabulary)
        fewest, most = num_scenes
        if batch_size < 1 or not 1 <= fewest <= most:
            raise ConfigError(
                f"films must come at least one a batch, with ascending numbers of scenes from 1 on, got {batch_size} "
                f"and {num_scenes}."
            )
        if most * scene_length > num_positions:
            raise ConfigError(
                f"films of {most} scenes of {scene_length} ids need {most * scene_length} positions, the model has "
                f"{num_positions}. Take fewer scenes, or raise max_position_embeddings."
            )
        self._clips, self._sampler, self._last = clips, sampler, last
        self._batch_size, self._num_scenes = batch_size, (fewest, most)
        self._scene_length, self._num_positions, self._noise, self._seed = scene_length, num_positions, noise, seed
        self._films = [film for film in find_films([clips[row].key for row in range(len(clips))]) if len(film) >= most]
        if not self._films:
            raise ConfigError(
                f"no film of the shards has {most} scenes: clips with keys NAME.0, NAME.1, ... one after another. "
                "Encode toybox-films:SPLIT, or take fewer scenes."
            )

    @property
    def settings(self) -> dict[str, Any]:
        """Everything that decides the batches, as JSON values."""
        return {
            "num_clips": len(self._clips),
            "batch_size": self._batch_size,
            "num_scenes": list(self._num_scenes),
            "scene_length": self._scene_length,
            "num_positions": self._num_positions,
            **({"noise": self._noise} if self._noise > 0 else {}),
            "seed": self._seed,
            "sampler": self._sampler.settings,
            "last": self._last.settings,
        }

    def batch(self, number: int) -> Batch:
        """Batch `number`, with `prefix_len`, `lengths`, `parallel` and `rows` of (B, N), and `offset`.

        Raises:
            ShapeError: a scene is longer than `scene_length`.
        """
        rng = np.random.default_rng([self._seed, 5, number])
        count = int(rng.integers(self._num_scenes[0], self._num_scenes[1] + 1))
        films = [self._films[place] for place in rng.integers(len(self._films), size=self._batch_size)]
        scenes = []
        for film in films:
            for place, row in enumerate(film[:count]):
                sampler = self._last if place == count - 1 else self._sampler
                scenes.append((row, sampler.scene(self._clips[row], number, row)))
        longest = max(scenes, key=lambda scene: len(scene[1].ids))
        if len(longest[1].ids) > self._scene_length:
            raise ShapeError(
                f"scenes must have at most {self._scene_length} ids, got {len(longest[1].ids)} of clip "
                f"{self._clips[longest[0]].key}. Raise scene_length or encode shorter clips."
            )
        flat = collate(scenes, self._sampler.vocabulary, self._scene_length)
        if self._noise > 0:
            self._add_noise(flat, np.random.default_rng([self._seed, 7, number]))
        shapes = {name: tensor.shape for name, tensor in _items(flat)}
        parts = {
            name: tensor.reshape(len(films), -1 if len(shapes[name]) == 2 else count) for name, tensor in _items(flat)
        }
        last = self._num_positions - count * self._scene_length
        parts["offset"] = torch.from_numpy(rng.integers(last + 1, size=len(films)))
        return Batch(**parts)  # type: ignore[typeddict-item]

    def _add_noise(self, batch: Batch, rng: np.random.Generator) -> None:
        """Show the model wrong codes where it may have written such."""
        for place, (row, inputs) in enumerate(zip(batch["rows"].tolist(), batch["inputs"].numpy(), strict=True)):
            codes = self._clips[row].video_codes
            if codes is not None:
                noisy = flip_bits(inputs, codes[0].size, self._noise, self._sampler.vocabulary, rng)
                batch["inputs"][place] = torch.from_numpy(noisy)


def find_films(keys: Sequence[str]) -> list[list[int]]:
    """The rows of each film: keys that end in .0, .1, ... one after another under one name."""
    films: list[list[int]] = []
    before = ""
    for row, key in enumerate(keys):
        name, dot, number = key.rpartition(".")
        if dot and number == "0":
            films.append([row])
        elif dot and films and name == before and number == str(len(films[-1])) and films[-1][-1] == row - 1:
            films[-1].append(row)
        before = name
    return films


def layout_of(batch: Batch, width: int | None = None) -> tuple[SceneLayout, Tensor | None]:
    """Who sees whom in a batch of scenes or of films, and its rotary positions.

    Args:
        batch: of either kind.
        width: places of a row; None: those of the batch. Scenes may be padded to more.

    Returns:
        The layout, and (B, L) int64 positions, or None where the layout's own are meant.
    """
    prefix_len = batch["prefix_len"]
    if prefix_len.dim() == 1:
        layout = SceneLayout.from_prefix_lengths(
            prefix_len, batch["lengths"], width or batch["ids"].shape[1], parallel=batch["parallel"]
        )
        return layout, None
    layout = SceneLayout.from_films(
        prefix_len, batch["ids"].shape[1] // prefix_len.shape[1], parallel=batch["parallel"]
    )
    return layout, layout.positions() + batch["offset"][:, None]


def _items(batch: Batch) -> list[tuple[str, Tensor]]:
    return list(batch.items())  # type: ignore[arg-type]
