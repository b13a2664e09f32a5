"""What a user chooses of parallel decoding, and the plan of a task's canvas that follows from it.

Knows tasks and where their codes stand (`poet.sequence`); it does not know models, or how ids are drawn.

Legend: T latent frames, K audio levels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Final, Literal, get_args

from poet.bundle import ParallelDefaults
from poet.errors import ConfigError
from poet.generation.maskgit import CanvasPlan, Schedule, Stage, check_steps
from poet.sequence import output_places
from poet.tasks import Task
from poet.vocabulary import Vocabulary

__all__ = ["ORDERS", "Order", "ParallelDecoding", "choose_decoding", "plan_canvas"]

Order = Literal["whole", "parts", "frames"]
ORDERS: Final[tuple[str, ...]] = get_args(Order)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ParallelDecoding:
    """How to write many ids at once.

    Attributes:
        num_steps: forward passes in all; 1 draws everything at once, and there are never more than places.
        schedule: how fast the unknown places of a stage become fewer: cosine, linear or square.
        order: whole, picture and sound on one canvas; parts, the picture and then each level of the sound, coarse to
            fine; frames, each latent frame with the earlier ones fixed, and then each level. Steps are shared out by
            the number of places.
        choice_temperature: of the noise on confidences. So high that the order is nearly random by default: the surest
            places of a picture are its background, and a canvas that is filled surest first has no room left for what
            should stand before it.
        guidance_start, guidance_stop: shares of the steps between which guidance is in force, where there is any. A
            step without it costs half as much.

    Raises:
        ConfigError: a value that cannot be used.
    """

    num_steps: int = 16
    schedule: Schedule = "cosine"
    order: Order = "whole"
    choice_temperature: float = 100.0
    guidance_start: float = 0.0
    guidance_stop: float = 1.0

    def __post_init__(self) -> None:
        check_steps(self.num_steps)
        if self.order not in ORDERS:
            raise ConfigError(f"order must be one of {', '.join(ORDERS)}, got {self.order!r}.")
        # The rest is checked where it is used; a plan of one place finds what is wrong at once.
        self.plan((Stage(0, 1, 1),), mask_id=0)

    def plan(self, stages: tuple[Stage, ...], mask_id: int, pinned: tuple[tuple[int, int], ...] = ()) -> CanvasPlan:
        """The plan of a canvas with these stages; arguments as in `CanvasPlan`."""
        return CanvasPlan(
            stages=stages,
            mask_id=mask_id,
            schedule=self.schedule,
            choice_temperature=self.choice_temperature,
            guidance_start=self.guidance_start,
            guidance_stop=self.guidance_stop,
            pinned=pinned,
        )


def choose_decoding(usual: ParallelDefaults, said: Mapping[str, Any]) -> ParallelDecoding:
    """What was asked for, and the bundle's own settings where nothing was said.

    Args:
        usual: of the bundle.
        said: fields of `ParallelDecoding`. If one end of the guided steps is among them, the other is the canvas's.

    Raises:
        ConfigError: a value that cannot be used.
    """
    own: dict[str, Any] = {"num_steps": usual.num_steps}
    if not {"guidance_start", "guidance_stop"} & said.keys():
        own |= {"guidance_start": usual.guidance_start, "guidance_stop": usual.guidance_stop}
    return ParallelDecoding(**own | dict(said))


def plan_canvas(
    decoding: ParallelDecoding,
    task: Task,
    vocabulary: Vocabulary,
    *,
    video_latent_shape: tuple[int, int, int] | None = None,
    num_audio_latents: int | None = None,
    pinned: tuple[tuple[int, int], ...] = (),
) -> CanvasPlan:
    """The plan of a task's output.

    Args:
        decoding: what was chosen.
        task: writes picture, sound or both.
        vocabulary: gives the ids.
        video_latent_shape: (T, h, w) of what is written, where video is written.
        num_audio_latents: of what is written, where audio is written.
        pinned: (place, id) pairs of the output that are known from the start.

    Raises:
        ConfigError: the task writes text, or there are fewer steps than stages.
        ShapeError: as `poet.sequence.output_grammar`.
    """
    if task.writes_text:
        raise ConfigError(f"task {task.name} writes a text, one id after another: leave parallel decoding out.")
    video, audio = output_places(
        task, vocabulary, video_latent_shape=video_latent_shape, num_audio_latents=num_audio_latents
    )
    pictures = [] if video is None else [frame.ravel() for frame in video]
    levels = [] if audio is None else list(audio)
    if decoding.order == "frames":
        runs = [(int(part[0]), int(part[-1]) + 1) for part in (*pictures, *levels)]
    else:
        runs = [(int(part[0]), int(part[-1]) + 1) for part in levels]
        if pictures:
            runs.insert(0, (int(pictures[0][0]), int(pictures[-1][-1]) + 1))
        if decoding.order == "whole":
            runs = [(runs[0][0], runs[-1][1])]
    stages = [
        Stage(start, stop, steps)
        for (start, stop), steps in zip(
            runs, _share_out(decoding.num_steps, [stop - start for start, stop in runs]), strict=True
        )
    ]
    return decoding.plan(tuple(stages), vocabulary.special("<mask>"), pinned)


def _share_out(num_steps: int, sizes: list[int]) -> list[int]:
    """Steps of each stage: one for each, and the others in proportion to their sizes, the largest rests first."""
    left = num_steps - len(sizes)
    if left < 0:
        raise ConfigError(
            f"this order fills {len(sizes)} stages one after another, each in a step at least; got {num_steps} steps."
        )
    exact = [left * size / sum(sizes) for size in sizes]
    steps = [1 + int(share) for share in exact]
    by_rest = sorted(range(len(sizes)), key=lambda place: (int(exact[place]) - exact[place], place))
    for place in by_rest[: num_steps - sum(steps)]:
        steps[place] += 1
    return steps
