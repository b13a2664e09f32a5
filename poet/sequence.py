"""The order of ids: codes to one scene of ids and back, and the grammar of what may be written next.

The only file that knows order (SPEC, section 3), and therefore a long one. It does not know offsets
(`poet.vocabulary`), tensors or codecs.

    <bos> <task> [<parallel>] [<res>] [<text> pieces </text>] [<source> <video_in> codes </video_in>]
    [<audio_in> codes </audio_in>] | <video_out> codes </video_out> <audio_out> codes </audio_out>
    <text_out> pieces </text_out> <eos>

Left of the bar stands the prefix, right of it the output; what is absent leaves no trace. <res> is there when any
video is given or written. <source> belongs to the given video: sound given alone has none. Video runs frame by frame,
row by row; audio level by level, coarse to fine. After <eos> a scene may be filled up with <pad>.

Legend: L ids of a scene, T latent frames of h x w places, K audio levels, A audio latents.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any, NamedTuple, NoReturn

import numpy as np
from numpy.typing import ArrayLike, NDArray

from poet.errors import ShapeError, VocabularyError
from poet.grammar import (
    Allowed,
    Grammar,
    GrammarState,
    Segment,
    allowed,
    check_output,
    grammar_from_json,
    grammar_to_json,
    max_output_length,
    place_ranges,
)
from poet.tasks import TASKS, ClipParts, Task, get_task
from poet.vocabulary import Vocabulary

__all__ = [
    "Allowed",
    "Grammar",
    "GrammarState",
    "OutputPlaces",
    "PackedScene",
    "Scene",
    "Segment",
    "allowed",
    "check_output",
    "grammar_from_json",
    "grammar_to_json",
    "max_output_length",
    "output_grammar",
    "output_places",
    "pack",
    "pack_prefix",
    "pad_scene",
    "place_ranges",
    "unpack",
    "unpack_prefix",
]

Ids = NDArray[np.int64]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Scene:
    """One scene as codes. Scenes are equal when they pack to the same ids.

    Attributes:
        task: name in `poet.tasks.TASKS`. Only its kind of output is written into the ids, so `unpack` names the first
            task of the table that fits, and equality compares kinds of output.
        text: pieces of the given text; () is an empty text, None no text at all.
        dropped_text: number of pieces of a text that was replaced by <null> one for one; `text` is None then. (An
            empty text that is dropped stays an empty text: nothing was there to replace.)
        video_in, video_out: (T, h, w) int64 codes, or None.
        audio_in, audio_out: (K, A) int64 codes, or None.
        text_out: pieces of the written text, or None.
        resolution: (height, width) in pixels; there exactly when video is given or written.
        parallel: whether the output is to be written many ids at once.

    Raises:
        ConfigError: an unknown task, or inputs that it does not take.
        ShapeError: codes of another number of dimensions, or a resolution without video.
    """

    task: str
    text: tuple[int, ...] | None = None
    dropped_text: int | None = None
    video_in: Ids | None = None
    audio_in: Ids | None = None
    video_out: Ids | None = None
    audio_out: Ids | None = None
    text_out: tuple[int, ...] | None = None
    resolution: tuple[int, int] | None = None
    parallel: bool = False

    def __post_init__(self) -> None:
        row = get_task(self.task)
        for name, axes in (("video_in", 3), ("video_out", 3), ("audio_in", 2), ("audio_out", 2)):
            codes = getattr(self, name)
            if codes is not None:
                codes = np.asarray(codes)
                if codes.ndim != axes or codes.size == 0:
                    form = "(T, h, w)" if axes == 3 else "(K, A)"
                    raise ShapeError(f"{name} must be {form} codes without an empty axis, got shape {codes.shape}.")
                object.__setattr__(self, name, codes)
        for name in ("text", "text_out"):
            pieces = getattr(self, name)
            if pieces is not None:
                object.__setattr__(self, name, tuple(int(piece) for piece in pieces))
        if self.dropped_text is not None and (self.text is not None or self.dropped_text < 1):
            raise ShapeError("dropped_text must be a positive number of pieces, and text must be None beside it.")
        row.check_inputs(self.inputs)
        has_video = self.video_in is not None or row.writes_video
        if (self.resolution is not None) != has_video:
            raise ShapeError(
                f"resolution must be {'(height, width)' if has_video else 'None'} in a scene of task {self.task} "
                f"{'with' if has_video else 'without'} video, got {self.resolution}."
            )
        if self.resolution is not None:
            height, width = self.resolution
            object.__setattr__(self, "resolution", (int(height), int(width)))

    @classmethod
    def from_parts(
        cls,
        task: str,
        parts: ClipParts,
        *,
        text: Iterable[int] | None,
        resolution: tuple[int, int] | None,
        parallel: bool = False,
    ) -> Scene:
        """The scene of a clip that `Task.split_clip` cut.

        Args:
            task: the task that cut it.
            parts: what is given and what is written.
            text: pieces of the clip's text: given, or written by captioning, or left out where the task has no use.
            resolution: (height, width) of the clip in pixels; left out where the scene has no video.
            parallel: whether the output is to be written many ids at once.

        Raises:
            ConfigError, ShapeError: see the class.
        """
        row = get_task(task)
        return cls(
            task=task,
            text=tuple(text) if text is not None and "text" in row.inputs | row.optional else None,
            text_out=tuple(text) if text is not None and row.writes_text else None,
            video_in=parts.video_in,
            audio_in=parts.audio_in,
            video_out=parts.video_out,
            audio_out=parts.audio_out,
            resolution=resolution if parts.video_in is not None or row.writes_video else None,
            parallel=parallel,
        )

    @property
    def outputs(self) -> str:
        """The kind of output: "image", "video", "audio", "video_audio" or "text"."""
        return get_task(self.task).outputs

    @property
    def inputs(self) -> frozenset[str]:
        """What is given: any of "text", "video", "audio"."""
        values = {"text": (self.text, self.dropped_text), "video": (self.video_in,), "audio": (self.audio_in,)}
        return frozenset(name for name, parts in values.items() if any(part is not None for part in parts))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Scene):
            return NotImplemented
        plain = ("outputs", "text", "dropped_text", "text_out", "resolution", "parallel")
        arrays = ("video_in", "audio_in", "video_out", "audio_out")
        return all(getattr(self, name) == getattr(other, name) for name in plain) and all(
            _same(getattr(self, name), getattr(other, name)) for name in arrays
        )


def _same(one: Ids | None, other: Ids | None) -> bool:
    return one is other if one is None or other is None else np.array_equal(one, other)


class PackedScene(NamedTuple):
    """A scene as ids.

    Attributes:
        ids: (L,) int64.
        prefix_len: ids[:prefix_len] is the prefix, which attends in both directions.
        loss_mask: (L,) bool, True where ids[i] is a target: on the output, <eos> included, nowhere else.
    """

    ids: Ids
    prefix_len: int
    loss_mask: NDArray[np.bool_]


# Codes to ids


def pack(scene: Scene, vocabulary: Vocabulary, *, drop_text: bool = False, parallel: bool = False) -> PackedScene:
    """Write a scene as ids; `unpack` is the exact inverse.

    Args:
        scene: with everything that its task writes.
        vocabulary: gives the ids.
        drop_text: replace the given text by <null>, one for one (for guidance and its training).
        parallel: mark the scene as one to be written many ids at once; as `scene.parallel`.

    Raises:
        ShapeError: something that the task writes is missing, or does not fit the resolution or number of levels.
        VocabularyError: a code out of its range, or an unknown resolution.
    """
    prefix = pack_prefix(scene, vocabulary, drop_text=drop_text, parallel=parallel)
    row = get_task(scene.task)
    parts: list[Ids] = []
    for name, is_written in (
        ("video_out", row.writes_video),
        ("audio_out", row.writes_audio),
        ("text_out", row.writes_text),
    ):
        if (getattr(scene, name) is not None) != is_written:
            raise ShapeError(f"a scene of task {scene.task} must {'have' if is_written else 'not have'} {name}.")
    if scene.video_out is not None:
        if row.outputs == "image" and len(scene.video_out) != 1:
            raise ShapeError(f"an image must be one latent frame, got {len(scene.video_out)}.")
        parts.append(_bracket(vocabulary, "video_out", _video_ids(scene.video_out, scene, vocabulary)))
    if scene.audio_out is not None:
        parts.append(_bracket(vocabulary, "audio_out", _audio_ids(scene.audio_out, vocabulary)))
    if scene.text_out is not None:
        parts.append(_bracket(vocabulary, "text_out", vocabulary.text_to_ids(scene.text_out)))
    ids = np.concatenate([prefix, *parts, [vocabulary.special("<eos>")]]).astype(np.int64)
    return PackedScene(ids, len(prefix), np.arange(len(ids)) >= len(prefix))


def pack_prefix(scene: Scene, vocabulary: Vocabulary, *, drop_text: bool = False, parallel: bool = False) -> Ids:
    """The prefix of a scene, whose output need not be there: what a model is given. (P,) int64.

    Raises:
        ShapeError, VocabularyError: as `pack`.
    """
    special = vocabulary.special
    head = [special("<bos>"), special(get_task(scene.task).special_name)]
    if parallel or scene.parallel:
        head.append(special("<parallel>"))
    if scene.resolution is not None:
        head.append(vocabulary.resolution_id(*scene.resolution))
    parts = [np.array(head, np.int64)]
    if scene.dropped_text is not None:
        parts.append(_bracket(vocabulary, "text", np.full(scene.dropped_text, special("<null>"))))
    if scene.text is not None:
        pieces = vocabulary.text_to_ids(scene.text)
        parts.append(_bracket(vocabulary, "text", np.full(len(pieces), special("<null>")) if drop_text else pieces))
    if scene.video_in is not None:
        parts.append(np.array([special("<source>")]))
        parts.append(_bracket(vocabulary, "video_in", _video_ids(scene.video_in, scene, vocabulary)))
    if scene.audio_in is not None:
        parts.append(_bracket(vocabulary, "audio_in", _audio_ids(scene.audio_in, vocabulary)))
    return np.concatenate(parts).astype(np.int64)


def pad_scene(packed: PackedScene, scene_length: int, vocabulary: Vocabulary) -> PackedScene:
    """Fill a scene up with <pad> to exactly `scene_length` ids, as the scenes of a film are; padding is no target.

    Raises:
        ShapeError: the scene is longer.
    """
    surplus = len(packed.ids) - scene_length
    if surplus > 0:
        raise ShapeError(f"a scene must have at most scene_length {scene_length} ids, got {len(packed.ids)}.")
    return PackedScene(
        np.pad(packed.ids, (0, -surplus), constant_values=vocabulary.special("<pad>")),
        packed.prefix_len,
        np.pad(packed.loss_mask, (0, -surplus)),
    )


def _bracket(vocabulary: Vocabulary, name: str, ids: Ids) -> Ids:
    return np.concatenate([[vocabulary.special(f"<{name}>")], ids, [vocabulary.special(f"</{name}>")]])


def _video_ids(codes: Ids, scene: Scene, vocabulary: Vocabulary) -> Ids:
    assert scene.resolution is not None  # A scene with video has a resolution: checked when it was made.
    size = vocabulary.latent_size(*scene.resolution)
    if codes.shape[1:] != size:
        raise ShapeError(f"video codes at {scene.resolution} must be (T, {size[0]}, {size[1]}), got {codes.shape}.")
    return vocabulary.video_to_ids(codes).reshape(-1)


def _audio_ids(codes: Ids, vocabulary: Vocabulary) -> Ids:
    if len(codes) != vocabulary.num_audio_codebooks:
        raise ShapeError(f"audio codes must be ({vocabulary.num_audio_codebooks}, A), got {codes.shape}.")
    return np.concatenate([vocabulary.audio_to_ids(codes_A, level) for level, codes_A in enumerate(codes)])


# Ids to codes


def unpack(ids: ArrayLike, vocabulary: Vocabulary) -> Scene:
    """Read one scene, with or without padding after it; the exact inverse of `pack`.

    Args:
        ids: (L,) integers.
        vocabulary: the one that the ids were written with.

    Raises:
        VocabularyError: ids in an order that no scene has; the message names the place and what stands there.
    """
    reader = _Reader(ids, vocabulary)
    row, fields = reader.prefix()
    size = vocabulary.latent_size(*fields["resolution"]) if fields["resolution"] else None
    if row.writes_video and size is not None:
        start = reader.place
        fields["video_out"] = reader.video("video_out", size)
        if row.outputs == "image" and len(fields["video_out"]) != 1:
            reader.fail(start, f"an image of {size[0] * size[1]} codes", f"{fields['video_out'].size} codes")
    if row.writes_audio:
        fields["audio_out"] = reader.audio("audio_out")
    if row.writes_text:
        fields["text_out"] = reader.text("text_out")
    reader.take("<eos>")
    reader.end(vocabulary.special("<pad>"))
    return Scene(**fields)


def unpack_prefix(ids: ArrayLike, vocabulary: Vocabulary) -> Scene:
    """Read a prefix alone; the exact inverse of `pack_prefix`. The scene's output is None.

    Raises:
        VocabularyError: as `unpack`.
    """
    reader = _Reader(ids, vocabulary)
    _, fields = reader.prefix()
    reader.end()
    return Scene(**fields)


class _Reader:
    """A cursor over ids that says what it expected where."""

    def __init__(self, ids: ArrayLike, vocabulary: Vocabulary) -> None:
        self.ids = np.asarray(ids)
        if self.ids.ndim != 1 or (self.ids.size and self.ids.dtype.kind not in "iu"):
            raise VocabularyError(
                f"a scene must be (L,) integer ids, got {self.ids.dtype} {self.ids.shape}. Unpack one scene at a time."
            )
        self.vocabulary = vocabulary
        self.place = 0

    def fail(self, place: int, expected: str, found: str | None = None) -> NoReturn:
        if found is None:
            at_end = place >= len(self.ids)
            found = "the end" if at_end else self.vocabulary.decode_id(int(self.ids[place]))
        raise VocabularyError(f"at place {place}: expected {expected}, found {found}.")

    def sees(self, name: str) -> bool:
        return self.place < len(self.ids) and int(self.ids[self.place]) == self.vocabulary.special(name)

    def take(self, name: str) -> None:
        if not self.sees(name):
            self.fail(self.place, name)
        self.place += 1

    def run(self, name: str, what: str, low: int, high: int) -> Ids:
        """Everything between <name> and </name>, all of it in [low, high)."""
        self.take(f"<{name}>")
        rest = self.ids[self.place :]
        outside = np.flatnonzero((rest < low) | (rest >= high))
        count = int(outside[0]) if outside.size else len(rest)
        self.place += count
        if not self.sees(f"</{name}>"):
            self.fail(self.place, f"{what} or </{name}>")
        self.place += 1
        return rest[:count]

    def video(self, name: str, size: tuple[int, int]) -> Ids:
        ids = self.run(name, "video code", *self.vocabulary.video_range)
        if not len(ids) or len(ids) % (size[0] * size[1]):
            self.fail(self.place - 1, f"whole frames of {size[0]} x {size[1]} codes", f"{len(ids)} codes in <{name}>")
        return self.vocabulary.video_from_ids(ids).reshape(-1, *size)

    def audio(self, name: str) -> Ids:
        levels = self.vocabulary.num_audio_codebooks
        low, high = self.vocabulary.audio_range(0)[0], self.vocabulary.audio_range(levels - 1)[1]
        ids = self.run(name, "audio code", low, high)
        if not len(ids) or len(ids) % levels:
            self.fail(self.place - 1, f"{levels} levels of equally many codes", f"{len(ids)} codes in <{name}>")
        ids = ids.reshape(levels, -1)
        for level, ids_A in enumerate(ids):
            low, high = self.vocabulary.audio_range(level)
            wrong = np.flatnonzero((ids_A < low) | (ids_A >= high))
            if wrong.size:
                start = self.place - 1 - ids.size
                self.fail(start + level * ids.shape[1] + int(wrong[0]), f"audio level {level} code")
        return np.stack([self.vocabulary.audio_from_ids(ids_A, level) for level, ids_A in enumerate(ids)])

    def text(self, name: str) -> tuple[int, ...]:
        ids = self.run(name, "text piece", *self.vocabulary.text_range)
        return tuple(self.vocabulary.text_from_ids(ids).tolist())

    def prefix(self) -> tuple[Task, dict[str, Any]]:
        """The first task that fits, and the fields of the scene that the prefix tells."""
        self.take("<bos>")
        kinds = {self.vocabulary.special(row.special_name): row.outputs for row in TASKS.values()}
        if self.place >= len(self.ids) or int(self.ids[self.place]) not in kinds:
            self.fail(self.place, "a task id")
        outputs = kinds[int(self.ids[self.place])]
        self.place += 1
        fields: dict[str, Any] = {"parallel": self.sees("<parallel>"), "resolution": None}
        self.place += fields["parallel"]
        if any(self.sees(f"<{height}x{width}>") for height, width in self.vocabulary.resolutions):
            fields["resolution"] = self.vocabulary.resolution(int(self.ids[self.place]))
            self.place += 1
        if self.sees("<text>"):
            following = self.ids[self.place + 1 : self.place + 2]
            null = self.vocabulary.special("<null>")
            if len(following) and int(following[0]) == null:
                fields["dropped_text"] = len(self.run("text", "<null>", null, null + 1))
            else:
                fields["text"] = self.text("text")
        if self.sees("<source>"):
            if fields["resolution"] is None:
                self.fail(self.place, "no given video in a scene without a resolution")
            self.place += 1
            fields["video_in"] = self.video("video_in", self.vocabulary.latent_size(*fields["resolution"]))
        if self.sees("<audio_in>"):
            fields["audio_in"] = self.audio("audio_in")
        return self._fitting_task(outputs, fields), fields

    def _fitting_task(self, outputs: str, fields: dict[str, Any]) -> Task:
        given = {"text": "text" in fields or "dropped_text" in fields}
        given |= {"video": "video_in" in fields, "audio": "audio_in" in fields}
        for row in TASKS.values():
            fits = row.outputs == outputs and row.accepts(name for name, is_there in given.items() if is_there)
            if fits and row.conditioning == "first_frame":
                fits = len(fields["video_in"]) == 1
            if fits:
                if (fields["resolution"] is not None) != (row.writes_video or given["video"]):
                    place = 3 if fields["parallel"] else 2
                    self.fail(place, "a resolution" if fields["resolution"] is None else "no resolution without video")
                fields["task"] = row.name
                return row
        inputs = [name for name, is_there in given.items() if is_there]
        raise VocabularyError(f"at place 1: no task writes {outputs} from {' and '.join(inputs) or 'nothing'}.")

    def end(self, padding: int | None = None) -> None:
        rest = self.ids[self.place :]
        wrong = np.flatnonzero(rest != padding) if padding is not None else np.arange(len(rest))
        if wrong.size:
            self.fail(self.place + int(wrong[0]), "nothing more" if padding is None else "nothing more but <pad>")


# What may be written next


def output_grammar(
    task: str | Task,
    vocabulary: Vocabulary,
    *,
    video_latent_shape: tuple[int, int, int] | None = None,
    num_audio_latents: int | None = None,
    max_text_pieces: int = 256,
) -> Grammar:
    """The grammar of the output of a task: every output that it lets through unpacks, and the other way round.

    Args:
        task: its kind of output counts.
        vocabulary: gives the ids.
        video_latent_shape: (T, h, w) of what is written, where video is written (`Task.output_shape` tells).
        num_audio_latents: A of what is written, where audio is written.
        max_text_pieces: the longest text that may be written, where text is.

    Raises:
        ShapeError: a shape that the task needs is missing, or not positive.
    """
    row = task if isinstance(task, Task) else get_task(task)
    one = {name: Segment(1, id, id + 1) for name, id in vocabulary.specials.items()}
    grammar: list[Segment] = []
    if row.writes_video:
        shape = video_latent_shape
        if shape is None or min(shape) < 1 or (row.outputs == "image" and shape[0] != 1):
            frames = "1" if row.outputs == "image" else "T"
            raise ShapeError(f"task {row.name} needs a positive video_latent_shape ({frames}, h, w), got {shape}.")
        codes = Segment(shape[0] * shape[1] * shape[2], *vocabulary.video_range)
        grammar += [one["<video_out>"], codes, one["</video_out>"]]
    if row.writes_audio:
        if num_audio_latents is None or num_audio_latents < 1:
            raise ShapeError(f"task {row.name} needs a positive num_audio_latents, got {num_audio_latents}.")
        levels = range(vocabulary.num_audio_codebooks)
        codes_by_level = [Segment(num_audio_latents, *vocabulary.audio_range(level)) for level in levels]
        grammar += [one["<audio_out>"], *codes_by_level, one["</audio_out>"]]
    if row.writes_text:
        if max_text_pieces < 1:
            raise ShapeError(f"max_text_pieces must be positive, got {max_text_pieces}.")
        pieces = Segment(max_text_pieces, *vocabulary.text_range, stop=vocabulary.special("</text_out>"))
        grammar += [one["<text_out>"], pieces]
    return (*grammar, one["<eos>"])


class OutputPlaces(NamedTuple):
    """Where the codes of an output stand, counted from the first id behind the prefix.

    Attributes:
        video: (T, h, w) int64 places of the video's codes, or None.
        audio: (K, A) int64 places of the sound's codes, or None.
    """

    video: Ids | None
    audio: Ids | None


def output_places(
    task: str | Task,
    vocabulary: Vocabulary,
    *,
    video_latent_shape: tuple[int, int, int] | None = None,
    num_audio_latents: int | None = None,
) -> OutputPlaces:
    """Where the codes of a task's output stand; arguments and errors as of `output_grammar`.

    Raises:
        VocabularyError: the task writes text, whose length is open.
    """
    row = task if isinstance(task, Task) else get_task(task)
    grammar = output_grammar(
        row, vocabulary, video_latent_shape=video_latent_shape, num_audio_latents=num_audio_latents
    )
    low, high = place_ranges(grammar)
    free = np.flatnonzero(high - low > 1)
    video = audio = None
    if row.writes_video:
        assert video_latent_shape is not None
        count = int(np.prod(video_latent_shape))
        video, free = free[:count].reshape(video_latent_shape), free[count:]
    if row.writes_audio:
        audio = free.reshape(vocabulary.num_audio_codebooks, -1)
    return OutputPlaces(video, audio)
