"""Encoded clips to training scenes, and several scenes to one row. Knows codes and tasks; order is `poet.sequence`'s.

What is drawn for a clip (task, cut, dropped text) is a pure function of (seed, epoch, row), so any scene of any epoch
can be made again without making those before it.

Legend: L ids of a scene or row, N scenes of a row, T latent frames, K audio levels.
"""

from __future__ import annotations

import bisect
import functools
from collections.abc import Mapping, Sequence
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from poet.data.masking import MaskSampler
from poet.data.shards import EncodedClip
from poet.errors import ConfigError, ShapeError
from poet.sequence import PackedScene, Scene, output_places, pack
from poet.tasks import ClipGeometry, ClipParts, Task, get_task
from poet.vocabulary import Vocabulary
from poet_tokenizers.base import TextTokenizer

__all__ = ["MODALITIES", "PackedRow", "SceneSampler", "join_scenes", "modalities", "pack_rows"]

MODALITIES: Final = ("special", "text", "video", "audio", "masked_video", "masked_audio")
"""What an id can be; `modalities` gives places in this tuple. The last two are targets of scenes that are written many
ids at once: their losses say something else."""

DEFAULT_MASKS: Final = {"cosine": 0.5, "uniform": 0.1, "block": 0.1, "frame": 0.15, "level": 0.15}
"""Weights of the ways to hide places, `poet.data.masking`."""


class SceneSampler:
    """Draw a task for a clip and cut the clip into that task's scene.

    Args:
        vocabulary: gives the ids and the strides.
        text_tokenizer: turns captions into pieces.
        task_weights: task name to weight; a clip that lacks what a task needs is given one of the other tasks, in the
            proportion of their weights.
        text_dropout: share of scenes with a text whose pieces are all replaced by <null>, for guidance.
        optional_share: share of scenes in which an input that the task may do without is given. A model that shall
            animate an image with and without a prompt has to see both.
        parallel_share: share of scenes learnt as ones that are written many ids at once: marked so, with a part of
            their places hidden, which are their targets. Tasks that write text are never among them.
        masks: weights of the ways to hide, kinds of `poet.data.masking.MASK_KINDS`.
        seed: of everything that is drawn.

    Raises:
        ConfigError: a weight or share that cannot be used, an unknown task, or one that token shards cannot serve.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        text_tokenizer: TextTokenizer,
        task_weights: Mapping[str, float],
        *,
        text_dropout: float = 0.1,
        optional_share: float = 0.5,
        parallel_share: float = 0.0,
        masks: Mapping[str, float] = DEFAULT_MASKS,
        seed: int = 0,
    ) -> None:
        shares = {"text_dropout": text_dropout, "optional_share": optional_share, "parallel_share": parallel_share}
        for name, share in shares.items():
            if not 0 <= share <= 1:
                raise ConfigError(f"{name} must be a share from 0 to 1, got {share}.")
        if seed < 0:
            raise ConfigError(f"seed must not be negative, got {seed}.")
        if not task_weights or not all(0 < weight < float("inf") for weight in task_weights.values()):
            raise ConfigError(f"task_weights must map tasks to positive weights, got {dict(task_weights)}.")
        # In the order of their names, so that the order in a recipe changes nothing.
        self._weights = {get_task(name): float(task_weights[name]) for name in sorted(task_weights)}
        edits = [task.name for task in self._weights if task.edit is not None]
        if edits:
            raise ConfigError(
                f"tasks {', '.join(edits)} need an edited clip beside every clip, and token shards hold none. Leave "
                "them out of task_weights."
            )
        self.vocabulary = vocabulary
        self._text_tokenizer = text_tokenizer
        self._text_dropout = text_dropout
        self._optional_share = optional_share
        self._parallel_share = parallel_share
        self._masks = MaskSampler(masks)
        self._seed = seed
        self._choices = functools.lru_cache(maxsize=None)(self._find_choices)

    @property
    def settings(self) -> dict[str, object]:
        """Everything that decides the scenes, as JSON values; a run that goes on must have the same."""
        return {
            "fingerprint": self.vocabulary.fingerprint,
            "task_weights": {task.name: weight for task, weight in self._weights.items()},
            "text_dropout": self._text_dropout,
            "optional_share": self._optional_share,
            "parallel_share": self._parallel_share,
            **({"masks": self._masks.weights} if self._parallel_share > 0 else {}),
            "seed": self._seed,
        }

    def scene(self, clip: EncodedClip, epoch: int, index: int) -> PackedScene:
        """The scene of one clip in one epoch.

        Args:
            clip: as read from the shards.
            epoch: counted from 0.
            index: the clip's row; drawn values depend on (seed, epoch, index) and on what the clip has.

        Raises:
            ConfigError: the clip fits none of the tasks.
            ShapeError, VocabularyError: the codes do not fit the vocabulary.
        """
        rng = np.random.default_rng([self._seed, 2, epoch, index])
        # One draw for each decision, made whether needed or not: the decisions stay independent of each other.
        task_draw, text_draw, audio_draw, drop_draw, parallel_draw = rng.random(5)
        task = self._draw_task(clip, float(task_draw))
        gives_text = clip.text is not None and (
            "text" in task.inputs or ("text" in task.optional and text_draw < self._optional_share)
        )
        gives_audio = "audio" in task.inputs or ("audio" in task.optional and audio_draw < self._optional_share)
        parts = self._cut(clip, task, gives_audio, rng)
        pieces = tuple(self._text_tokenizer.encode(clip.text)) if clip.text is not None else None
        scene = Scene(
            task=task.name,
            text=pieces if gives_text else None,
            video_in=parts.video_in,
            audio_in=parts.audio_in,
            video_out=parts.video_out,
            audio_out=parts.audio_out,
            text_out=pieces if task.writes_text else None,
            resolution=None if parts.video_in is None and parts.video_out is None else clip.resolution,
        )
        drop_text = gives_text and bool(drop_draw < self._text_dropout)
        parallel = not task.writes_text and bool(parallel_draw < self._parallel_share)
        packed = pack(scene, self.vocabulary, drop_text=drop_text, parallel=parallel)
        return self._hide(packed, scene, task, rng) if parallel else packed

    def _hide(self, packed: PackedScene, scene: Scene, task: Task, rng: np.random.Generator) -> PackedScene:
        """The scene with hidden places as its only targets."""
        video, audio = output_places(
            task,
            self.vocabulary,
            video_latent_shape=None if scene.video_out is None else scene.video_out.shape,
            num_audio_latents=None if scene.audio_out is None else scene.audio_out.shape[1],
        )
        loss_mask = np.zeros_like(packed.loss_mask)
        loss_mask[packed.prefix_len + self._masks.draw(video, audio, rng)] = True
        return packed._replace(loss_mask=loss_mask)

    def _draw_task(self, clip: EncodedClip, draw: float) -> Task:
        num_latent_frames = 0 if clip.video_codes is None else len(clip.video_codes)
        tasks, bounds = self._choices(
            clip.text is not None, num_latent_frames > 0, num_latent_frames > 1, clip.audio_codes is not None
        )
        if not tasks:
            sound, caption = ("no" if part is None else "a" for part in (clip.audio_codes, clip.text))
            names = ", ".join(task.name for task in self._weights)
            raise ConfigError(
                f"clip {clip.key} ({num_latent_frames} latent frames, {sound} sound, {caption} caption) fits none of "
                f"the tasks {names}. Add a task for it or leave it out of the shards."
            )
        return tasks[min(bisect.bisect_right(bounds, draw), len(tasks) - 1)]

    def _find_choices(self, text: bool, video: bool, moving: bool, audio: bool) -> tuple[list[Task], list[float]]:
        """The tasks for a clip that has these, and the upper bounds of their shares of [0, 1)."""
        has = {kind for kind, is_there in (("text", text), ("video", video), ("audio", audio)) if is_there}
        tasks = [task for task in self._weights if task.needs <= has and (moving or not task.extends_video)]
        weights = np.array([self._weights[task] for task in tasks])
        bounds: list[float] = (weights.cumsum() / weights.sum()).tolist() if tasks else []
        return tasks, bounds

    def _cut(self, clip: EncodedClip, task: Task, gives_audio: bool, rng: np.random.Generator) -> ClipParts:
        audio = None if clip.audio_codes is None else clip.audio_codes.astype(np.int64)
        if "video" not in task.needs or clip.video_codes is None or clip.resolution is None or clip.fps is None:
            return ClipParts(audio_out=audio if task.writes_audio else None)
        if not gives_audio and not task.writes_audio:
            audio = None
        video = clip.video_codes.astype(np.int64)
        geometry = _geometry(self.vocabulary, len(video), clip.fps, clip.resolution)
        return task.split_clip(video, audio, geometry, task.split(len(video), rng))


@functools.lru_cache(maxsize=256)
def _geometry(vocabulary: Vocabulary, num_latent_frames: int, fps: float, resolution: tuple[int, int]) -> ClipGeometry:
    num_frames = 1 + (num_latent_frames - 1) * vocabulary.temporal_stride
    height, width = resolution
    return ClipGeometry.from_vocabulary(vocabulary, num_frames=num_frames, fps=fps, height=height, width=width)


def modalities(ids: NDArray[np.int64], vocabulary: Vocabulary) -> NDArray[np.uint8]:
    """What each id is.

    Args:
        ids: any shape.
        vocabulary: gives the ranges.

    Returns:
        uint8 of the same shape: places in `MODALITIES`.
    """
    found = np.zeros(ids.shape, np.uint8)
    audio = vocabulary.audio_range(0)[0], vocabulary.audio_range(vocabulary.num_audio_codebooks - 1)[1]
    for place, (low, high) in enumerate((vocabulary.text_range, vocabulary.video_range, audio), start=1):
        found[(ids >= low) & (ids < high)] = place
    return found


class PackedRow(NamedTuple):
    """Several scenes, one after another without gaps, filled up with <pad>.

    `SceneLayout.from_packed(prefix_lengths, lengths, max_len)` of `poet.model.attention` makes documents, prefixes and
    positions of it.

    Attributes:
        ids: (L,) int64.
        loss_mask: (L,) bool, True where ids[i] is a target.
        prefix_lengths: (N,) int64.
        lengths: (N,) int64.
    """

    ids: NDArray[np.int64]
    loss_mask: NDArray[np.bool_]
    prefix_lengths: NDArray[np.int64]
    lengths: NDArray[np.int64]


def pack_rows(lengths: Sequence[int], row_length: int) -> list[list[int]]:
    """Share scenes out among rows of a fixed length: best fit, the longest first. Scenes are never cut.

    Args:
        lengths: ids of each scene.
        row_length: ids of a row.

    Returns:
        For every row the places in `lengths` of its scenes, ascending; rows ascend by their first scene.

    Raises:
        ShapeError: a scene is empty or longer than a row.

    Source: Johnson, "Near-optimal bin packing algorithms", 1973; best-fit decreasing uses at most 11/9 of the rows that
    the best packing does, plus a constant.
    """
    outside = [length for length in lengths if not 0 < length <= row_length]
    if outside:
        raise ShapeError(
            f"scenes must have 1 to {row_length} ids, got {outside[0]}. Make the rows longer or shorten the clips."
        )
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (free ids, row), ascending
    for scene in sorted(range(len(lengths)), key=lambda scene: (-lengths[scene], scene)):
        place = bisect.bisect_left(room, (lengths[scene], -1))
        if place == len(room):
            free, row = row_length, len(rows)
            rows.append([])
        else:
            free, row = room.pop(place)
        rows[row].append(scene)
        if free > lengths[scene]:
            bisect.insort(room, (free - lengths[scene], row))
    return sorted(sorted(row) for row in rows)


def join_scenes(scenes: Sequence[PackedScene], row_length: int, pad_id: int) -> PackedRow:
    """Lay scenes one after another into one row.

    Raises:
        ShapeError: they are longer than the row together.
    """
    lengths = np.array([len(scene.ids) for scene in scenes], np.int64)
    total = int(lengths.sum())
    if not scenes or total > row_length:
        raise ShapeError(
            f"a row of {row_length} ids must hold at least one scene and no more than fit, got {len(scenes)} scenes of "
            f"{total} ids. Choose them with pack_rows()."
        )
    ids = np.full(row_length, pad_id, np.int64)
    loss_mask = np.zeros(row_length, np.bool_)
    ids[:total] = np.concatenate([scene.ids for scene in scenes])
    loss_mask[:total] = np.concatenate([scene.loss_mask for scene in scenes])
    return PackedRow(ids, loss_mask, np.array([scene.prefix_len for scene in scenes], np.int64), lengths)
