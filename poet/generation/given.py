"""The files that a clip is made from: which task they mean, and what the model reads of them.

Knows files, bundles and tasks; it does not know models or how a clip is written. Importing it imports no torch.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from poet.bundle import Bundle
from poet.errors import ConfigError
from poet.media import Clip, read_audio, read_clip, read_image
from poet.tasks import Task

__all__ = ["GivenFiles"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class GivenFiles:
    """What was handed in beside the text.

    Attributes:
        image: a picture to set in motion.
        video: a clip to go on from, or to change.
        audio: a sound.

    Raises:
        ConfigError: both a picture and a clip.
    """

    image: Path | None = None
    video: Path | None = None
    audio: Path | None = None

    def __post_init__(self) -> None:
        if self.image is not None and self.video is not None:
            raise ConfigError("give an image or a video, not both: either one is what the clip goes on from.")

    def guess_task(self, *, has_text: bool, default: str) -> str:
        """The name of the task that is meant where none is named.

        Args:
            has_text: whether a text was handed in too.
            default: the task of a text alone.
        """
        if self.image is not None:
            return "image_to_video"
        if self.video is not None:
            return "video_continuation" if self.audio is None else "audio_video_continuation"
        if self.audio is not None:
            return "audio_to_video"
        return default if has_text else "unconditional"

    def read(self, bundle: Bundle, task: Task, *, has_text: bool) -> Clip | None:
        """Read the files at the bundle's size and rate, and check that they are what the task reads.

        Args:
            bundle: gives sizes and rates.
            task: says how much of a clip is read.
            has_text: whether a text was handed in too.

        Returns:
            The conditioning clip, or None.

        Raises:
            MediaError: a file cannot be read.
            ConfigError: the task needs something else, or does not read what there is.
        """
        size, rate = bundle.generation_config, bundle.vocabulary.sample_rate
        clip = None
        if self.image is not None:
            picture = read_image(self.image, height=size.height, width=size.width)
            clip = Clip(frames=picture[None], fps=size.fps, samples=None, sample_rate=rate)
        elif self.video is not None:
            whole = size.num_frames / size.fps if task.conditioning == "whole" else None
            clip = read_clip(
                self.video,
                fps=size.fps,
                height=size.height,
                width=size.width,
                sample_rate=rate,
                duration=whole,
                want_video=True,
            )
        if self.audio is not None:
            sound = read_audio(self.audio, sample_rate=rate)
            clip = Clip(frames=None if clip is None else clip.frames, fps=size.fps, samples=sound, sample_rate=rate)
        sound_of_video = clip is not None and clip.samples is not None and "audio" in task.inputs
        there = {
            "text": has_text,
            "video": self.image is not None or self.video is not None,
            "audio": self.audio is not None or sound_of_video,
        }
        task.check_inputs([kind for kind, given in there.items() if given])
        return clip
