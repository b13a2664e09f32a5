"""The tasks, in one table: what each is given, what it writes, and how a training clip is cut into the two.

Everything else reads this table (SPEC, section 4). It knows codes and their shapes; it does not know ids
(`poet.vocabulary`), their order (`poet.sequence`), or pixels.

Legend: T latent frames of h x w places, N video frames, K audio levels, A audio latents.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Iterable
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray

from poet.errors import ConfigError, ShapeError
from poet.vocabulary import Vocabulary

__all__ = ["DEFAULT_TASK", "TASKS", "ClipGeometry", "ClipParts", "OutputShape", "Task", "get_task"]

Kind = Literal["text", "video", "audio"]
OutputKind = Literal["image", "video", "audio", "video_audio", "text"]
Conditioning = Literal["nothing", "first_frame", "first_frames", "whole"]
Edit = Literal["blank_box", "blank_border", "outline"]
Codes = NDArray[np.int64]

DEFAULT_TASK: Final = "text_to_video_audio"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClipGeometry:
    """The size of a clip in pixels, frames and seconds, and with it the size of its codes.

    Attributes:
        num_frames: N, video frames; 1 + a multiple of temporal_stride.
        fps: video frames per second.
        height: pixels.
        width: pixels.
        temporal_stride: video frames per latent frame.
        spatial_stride: pixels per latent place.
        sample_rate: audio samples per second.
        hop_length: audio samples per audio latent.

    Raises:
        ShapeError: a value that is not positive, or num_frames that the stride does not divide.
    """

    num_frames: int
    fps: float
    height: int
    width: int
    temporal_stride: int
    spatial_stride: int
    sample_rate: int
    hop_length: int

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if not (math.isfinite(value) and value > 0):
                raise ShapeError(f"{field.name} must be positive, got {value}.")
        if (self.num_frames - 1) % self.temporal_stride:
            below = self.num_frames - (self.num_frames - 1) % self.temporal_stride
            raise ShapeError(
                f"num_frames must be 1 + k * {self.temporal_stride}, got {self.num_frames}. "
                f"Take {below} or {below + self.temporal_stride}."
            )

    @classmethod
    def from_vocabulary(
        cls, vocabulary: Vocabulary, *, num_frames: int, fps: float, height: int, width: int
    ) -> ClipGeometry:
        """The geometry of clips in a vocabulary, whose tokenizers give the strides.

        Raises:
            ShapeError: see the class.
            VocabularyError: the vocabulary has no such resolution.
        """
        vocabulary.resolution_id(height, width)
        return cls(
            num_frames=num_frames,
            fps=fps,
            height=height,
            width=width,
            temporal_stride=vocabulary.temporal_stride,
            spatial_stride=vocabulary.spatial_stride,
            sample_rate=vocabulary.sample_rate,
            hop_length=vocabulary.hop_length,
        )

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(T, h, w) of the whole clip."""
        stride = self.spatial_stride
        return 1 + (self.num_frames - 1) // self.temporal_stride, -(-self.height // stride), -(-self.width // stride)

    @property
    def resolution(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        return self.height, self.width

    @property
    def duration(self) -> float:
        """Seconds."""
        return self.num_frames / self.fps

    def num_video_frames(self, num_latent_frames: int) -> int:
        """Video frames that the first `num_latent_frames` latent frames of a clip stand for."""
        return 0 if num_latent_frames == 0 else 1 + (num_latent_frames - 1) * self.temporal_stride

    def num_audio_latents(self, num_frames: int) -> int:
        """Audio latents of `num_frames` video frames: round(num_frames / fps * latents per second), halves up."""
        return math.floor(num_frames * self.sample_rate / (self.hop_length * self.fps) + 0.5)

    def num_samples(self, num_frames: int) -> int:
        """Audio samples to encode for `num_frames` video frames, so that they give `num_audio_latents` latents."""
        return self.num_audio_latents(num_frames) * self.hop_length


@dataclasses.dataclass(frozen=True)
class OutputShape:
    """What a scene writes. `video`: (T, h, w) or None; `audio`: number of audio latents A or None."""

    video: tuple[int, int, int] | None
    audio: int | None


@dataclasses.dataclass(frozen=True, eq=False)
class ClipParts:
    """A clip cut into what the model is given and what it writes: video (T, h, w), audio (K, A), int64, or None."""

    video_in: Codes | None = None
    audio_in: Codes | None = None
    video_out: Codes | None = None
    audio_out: Codes | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """One row of the table.

    Attributes:
        name: as on the command line.
        description: one line for help pages.
        inputs: what must be given: any of "text", "video", "audio". A still image counts as a video.
        optional: what may be given besides.
        outputs: the kind of output; it alone decides the task id.
        conditioning: what part of a clip the model is given: nothing; the first latent frame, the first latent frames
            (the output is the rest; `whole`-clip sound after a first frame, the new frames' sound otherwise); or all.
        edit: how the given clip's pixels differ from the written clip's: a blanked box to fill, a blanked border to
            extend, or an outline to paint. None: they are the same clip.
    """

    name: str
    description: str
    inputs: frozenset[Kind]
    optional: frozenset[Kind]
    outputs: OutputKind
    conditioning: Conditioning = "nothing"
    edit: Edit | None = None

    @property
    def special_name(self) -> str:
        """The name of the task id, e.g. "<to_video_audio>"."""
        return f"<to_{self.outputs}>"

    @property
    def writes_video(self) -> bool:
        """Whether the output holds video codes (an image is a video of one latent frame)."""
        return self.outputs in ("image", "video", "video_audio")

    @property
    def writes_audio(self) -> bool:
        """Whether the output holds audio codes."""
        return self.outputs in ("audio", "video_audio")

    @property
    def writes_text(self) -> bool:
        """Whether the output holds text pieces."""
        return self.outputs == "text"

    @property
    def extends_video(self) -> bool:
        """Whether the finished video is the given latent frames followed by the written ones."""
        return self.conditioning in ("first_frame", "first_frames")

    @property
    def needs(self) -> frozenset[Kind]:
        """What a training clip must have for this task."""
        written: set[Kind] = set()
        if self.writes_video:
            written.add("video")
        if self.writes_audio:
            written.add("audio")
        if self.writes_text:
            written.add("text")
        return self.inputs | written

    def accepts(self, given: Iterable[str]) -> bool:
        """Whether exactly these inputs can be given."""
        kinds = frozenset(given)
        return self.inputs <= kinds <= self.inputs | self.optional

    def check_inputs(self, given: Iterable[str]) -> None:
        """Raise unless exactly these inputs can be given.

        Raises:
            ConfigError: an input is missing, or one is given that the task does not read; the message names it.
        """
        kinds = frozenset(given)
        missing = sorted(self.inputs - kinds)
        surplus = sorted(kinds - self.inputs - self.optional)
        if missing:
            raise ConfigError(f"task {self.name} needs {' and '.join(missing)}, got {sorted(kinds) or 'nothing'}.")
        if surplus:
            raise ConfigError(
                f"task {self.name} takes no {' or '.join(surplus)}; it reads "
                f"{sorted(self.inputs | self.optional) or 'nothing'}. Leave it out or choose another task."
            )

    def split(self, num_latent_frames: int, rng: np.random.Generator) -> int:
        """Draw how many latent frames of a training clip are given to the model.

        Args:
            num_latent_frames: T of the clip.
            rng: source of randomness; drawn from only where there is a choice.

        Returns:
            0 (nothing is given), 1 (the first frame), T (all of it), or for continuations uniformly 1 to T - 1.

        Raises:
            ShapeError: the clip is too short to be continued.
        """
        if self.conditioning == "first_frames":
            self.check_condition(1, num_latent_frames)
            return int(rng.integers(1, num_latent_frames))
        return self.default_condition(num_latent_frames)

    def default_condition(self, num_latent_frames: int) -> int:
        """Latent frames that are given when a request does not say; continuations are given the first half."""
        given = {"nothing": 0, "first_frame": 1, "first_frames": max(1, num_latent_frames // 2)}
        count = given.get(self.conditioning, num_latent_frames)
        self.check_condition(count, num_latent_frames)
        return count

    def check_condition(self, num_condition_frames: int, num_latent_frames: int) -> None:
        """Raise unless the model can be given the first `num_condition_frames` of `num_latent_frames` latent frames.

        Raises:
            ShapeError: the message names the counts that can be.
        """
        low, high = {
            "nothing": (0, 0),
            "first_frame": (1, 1),
            "first_frames": (1, num_latent_frames - 1),
            "whole": (num_latent_frames, num_latent_frames),
        }[self.conditioning]
        if self.extends_video and num_latent_frames < 2:
            raise ShapeError(f"task {self.name} needs a clip of at least 2 latent frames, got {num_latent_frames}.")
        if not low <= num_condition_frames <= high:
            raise ShapeError(
                f"task {self.name} must be given {low} to {high} of {num_latent_frames} latent frames, "
                f"got {num_condition_frames}."
            )

    def output_shape(self, geometry: ClipGeometry, num_condition_frames: int | None = None) -> OutputShape:
        """The shape of what is written for a clip of this geometry.

        Args:
            geometry: of the finished clip (of an image, only its resolution counts).
            num_condition_frames: latent frames that are given; None: `default_condition`.

        Raises:
            ShapeError: that many latent frames cannot be given.
        """
        num_latent_frames, height, width = geometry.latent_shape
        if self.outputs == "image":
            return OutputShape((1, height, width), None)
        given = self.default_condition(num_latent_frames) if num_condition_frames is None else num_condition_frames
        self.check_condition(given, num_latent_frames)
        written = num_latent_frames - given if self.extends_video else num_latent_frames
        audio = geometry.num_audio_latents(geometry.num_frames)
        if self.conditioning == "first_frames":
            # A difference of totals, so that given and new sound always join to exactly the whole.
            audio -= geometry.num_audio_latents(geometry.num_video_frames(given))
        return OutputShape(
            (written, height, width) if self.writes_video else None, audio if self.writes_audio else None
        )

    def split_clip(
        self,
        video: Codes | None,
        audio: Codes | None,
        geometry: ClipGeometry,
        num_condition_frames: int,
        edited_video: Codes | None = None,
    ) -> ClipParts:
        """Cut a training clip's codes into what is given and what is written. `join_clip` is the inverse.

        Args:
            video: (T, h, w) int64, or None where the task neither reads nor writes video.
            audio: (K, A) int64, or None likewise.
            geometry: gives frame rates only; the sizes come from the codes.
            num_condition_frames: as drawn by `split`.
            edited_video: (T, h, w) codes of the clip after the task's `edit`; needed exactly where there is one.

        Raises:
            ShapeError: codes that the task needs are missing, or cannot be cut so.
        """
        if ("video" in self.needs and video is None) or ("audio" in self.needs and audio is None):
            raise ShapeError(f"task {self.name} needs clips with {' and '.join(sorted(self.needs))}.")
        if (edited_video is not None) != (self.edit is not None):
            raise ShapeError(f"task {self.name} must come {'with' if self.edit else 'without'} an edited clip.")
        reads = self.inputs | self.optional
        if video is None:
            return ClipParts(audio_out=audio if self.writes_audio else None)
        if self.outputs == "image":
            return ClipParts(video_out=video[:1])
        given = num_condition_frames
        self.check_condition(given, len(video))
        source = video if edited_video is None else edited_video
        cut = 0
        if self.conditioning == "first_frames":
            cut = geometry.num_audio_latents(geometry.num_video_frames(given))
            if audio is not None and cut >= audio.shape[1]:
                raise ShapeError(f"{audio.shape[1]} audio latents end before the {cut} of the given frames.")
        audio_in = None
        if "audio" in reads and audio is not None:
            audio_in = audio[:, :cut] if cut else audio
        return ClipParts(
            video_in=source[:given] if "video" in reads else None,
            audio_in=audio_in,
            video_out=(video[given:] if self.extends_video else video) if self.writes_video else None,
            audio_out=audio[:, cut:] if self.writes_audio and audio is not None else None,
        )

    def join_clip(self, parts: ClipParts) -> tuple[Codes | None, Codes | None]:
        """The finished clip: (video codes (T, h, w) or None, audio codes (K, A) or None). Inverse of `split_clip`.

        What is written takes the place of what was given, except where it extends it. `video_continuation` is not
        given the sound of its source; put that into `parts.audio_in` beforehand to have it in front of the new sound.
        """
        video = parts.video_in if parts.video_out is None else parts.video_out
        if self.extends_video and parts.video_in is not None and parts.video_out is not None:
            video = np.concatenate([parts.video_in, parts.video_out])
        audio = parts.audio_in if parts.audio_out is None else parts.audio_out
        if self.conditioning == "first_frames" and parts.audio_in is not None and parts.audio_out is not None:
            audio = np.concatenate([parts.audio_in, parts.audio_out], axis=1)
        return video, audio


def _task(
    name: str,
    description: str,
    inputs: tuple[Kind, ...],
    optional: tuple[Kind, ...],
    outputs: OutputKind,
    conditioning: Conditioning = "nothing",
    edit: Edit | None = None,
) -> Task:
    return Task(
        name=name,
        description=description,
        inputs=frozenset(inputs),
        optional=frozenset(optional),
        outputs=outputs,
        conditioning=conditioning,
        edit=edit,
    )


TASKS: Final[dict[str, Task]] = {
    task.name: task
    for task in (
        _task("text_to_video_audio", "a video with sound from a text", ("text",), (), "video_audio"),
        _task("text_to_video", "a silent video from a text", ("text",), (), "video"),
        _task("text_to_image", "a still image from a text", ("text",), (), "image"),
        _task("text_to_audio", "sound from a text", ("text",), (), "audio"),
        _task("unconditional", "a video with sound from nothing", (), (), "video_audio"),
        _task(
            "image_to_video", "an image set in motion, with sound", ("video",), ("text",), "video_audio", "first_frame"
        ),
        _task(
            "video_continuation",
            "what follows a clip, with sound",
            ("video",),
            ("text",),
            "video_audio",
            "first_frames",
        ),
        _task("inpainting", "a clip with a blank box filled", ("video",), ("text",), "video", "whole", "blank_box"),
        _task("outpainting", "a clip with its border drawn", ("video",), ("text",), "video", "whole", "blank_border"),
        _task("stylisation", "a clip painted anew as a text says", ("video", "text"), (), "video", "whole", "outline"),
        _task("video_to_audio", "the sound of a silent clip", ("video",), ("text",), "audio", "whole"),
        _task("audio_to_video", "a video that fits a sound", ("audio",), ("text",), "video"),
        _task(
            "audio_video_continuation",
            "what follows a clip and its sound",
            ("video", "audio"),
            ("text",),
            "video_audio",
            "first_frames",
        ),
        _task("captioning", "a text that describes a clip", ("video",), ("audio",), "text", "whole"),
    )
}
"""Every task by name, the plainest first: `poet.sequence.unpack` names the first that fits."""


def get_task(name: str) -> Task:
    """The task of that name.

    Raises:
        ConfigError: there is none; the message names the nearest.
    """
    if name not in TASKS:
        near = difflib.get_close_matches(name, TASKS, n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise ConfigError(f"the task must be one of {', '.join(TASKS)}; got {name!r}.{hint}")
    return TASKS[name]
