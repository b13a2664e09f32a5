"""Doubling the size of video codes: the upsampler's canvas filled many codes at once.

The schedule, the confidences and the draws are those of `poet.generation.maskgit`; a code of several factors draws each
of them, and is as sure as all of them together. Other engines share `UpsamplingCanvas` and `draw_step`, so that they
differ in where the model runs and in nothing else. It knows codes and the upsampler, and neither ids nor pixels.

Legend: B clips, T latent frames, h x w places of the smaller size, H x W of the larger, F factors, N places asked for.

Source: VideoPoet, arXiv:2312.14125, section 3.4.
"""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict
from collections.abc import Callable, Sequence

import numpy as np
import torch
from einops import rearrange
from numpy.typing import NDArray
from torch import Tensor

from poet.errors import ConfigError
from poet.generation.maskgit import Canvas, CanvasPlan, Schedule, Stage, check_steps, draw_places
from poet.generation.sampling import SamplingConfig
from poet.grammar import Segment
from poet.model.superresolution import UNKNOWN, Upsampler, UpsamplerConfig, merge_factors

__all__ = [
    "Upsampling",
    "UpsamplingCanvas",
    "UpsamplingRequest",
    "UpsamplingStep",
    "check_upsampling",
    "draw_codes",
    "draw_step",
    "upsample_codes",
]

Codes = NDArray[np.int64]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Upsampling:
    """How codes of the larger size are drawn.

    Attributes:
        num_steps: forward passes, each of them up to three under guidance.
        schedule: see `poet.generation.maskgit.CanvasPlan`.
        temperature: of the draws; 0 takes the likeliest code.
        choice_temperature: of the noise on confidences.
        text_guidance: how far to move away from no text; 1 is off.
        low_guidance: how far to move away from no smaller codes; 1 is off.
        noise_level: share of the smaller codes that the model is told may be wrong; 0 trusts them.
        seed: of the draws.

    Raises:
        ConfigError: a value that cannot be used.
    """

    num_steps: int = 24
    schedule: Schedule = "cosine"
    temperature: float = 1.0
    choice_temperature: float = 1.0
    text_guidance: float = 1.0
    low_guidance: float = 1.0
    noise_level: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        check_steps(self.num_steps)
        for name in ("text_guidance", "low_guidance"):
            value = getattr(self, name)
            if not math.isfinite(value) or value < 0:
                raise ConfigError(f"{name} must be a number of at least 0 (1 is off), got {value!r}.")
        if not 0 <= self.noise_level <= 1:
            raise ConfigError(f"noise_level must lie in [0, 1], got {self.noise_level!r}.")
        _ = self.sampling  # checks what it is made of
        CanvasPlan(
            stages=(Stage(0, 1, self.num_steps),),
            mask_id=UNKNOWN,
            schedule=self.schedule,
            choice_temperature=self.choice_temperature,
        )

    @property
    def sampling(self) -> SamplingConfig:
        """How each factor of a code is drawn."""
        return SamplingConfig(temperature=self.temperature, seed=self.seed)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class UpsamplingRequest:
    """A picture's codes that are to be written in a larger size.

    Attributes:
        low: (T, h, w) codes of the smaller size.
        text: pieces of what the clip says; () for none.
        settings: how to draw.
    """

    low: Codes
    text: tuple[int, ...] = ()
    settings: Upsampling = dataclasses.field(default_factory=Upsampling)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class UpsamplingStep:
    """What one step of a canvas asks of the model: a code for every place that is not known.

    Attributes:
        request: what is being made larger.
        high: (T, H, W) codes, `UNKNOWN` where none is known.
        number: of the step.
    """

    request: UpsamplingRequest
    high: Codes
    number: int


class UpsamplingCanvas:
    """The codes of the larger size of one clip, as they become known.

    Args:
        request: a checked one.
        config: the upsampler's.
    """

    def __init__(self, request: UpsamplingRequest, config: UpsamplerConfig) -> None:
        frames, height, width = request.low.shape
        settings = request.settings
        self.request = request
        self.shape = frames, height * config.scale, width * config.scale
        self.num_places = math.prod(self.shape)
        self._canvas = Canvas(
            (Segment(self.num_places, 0, config.codebook_size),),
            CanvasPlan(
                stages=(Stage(0, self.num_places, settings.num_steps),),
                mask_id=UNKNOWN,
                schedule=settings.schedule,
                choice_temperature=settings.choice_temperature,
            ),
            settings.sampling,
        )

    @property
    def done(self) -> bool:
        """Whether every code is known."""
        return self._canvas.done

    @property
    def num_known(self) -> int:
        """Codes that are known."""
        return self._canvas.num_known

    @property
    def codes(self) -> Codes:
        """(T, H, W), `UNKNOWN` where none is known; changes with the canvas."""
        return self._canvas.ids.reshape(self.shape)

    def step(self) -> UpsamplingStep:
        """What is to be asked next."""
        return UpsamplingStep(request=self.request, high=self.codes, number=self._canvas.step)

    def settle(self, codes: Codes, sure: NDArray[np.float32]) -> None:
        """Take over what `draw_step` returned for `step()`."""
        self._canvas.settle(codes, sure)


def check_upsampling(request: UpsamplingRequest, config: UpsamplerConfig, *, index: int = 0) -> None:
    """Raise unless the upsampler can take the request.

    Args:
        request: to be checked.
        config: the upsampler's.
        index: of the request among those of one call, for the message.

    Raises:
        ConfigError: codes or pieces that there are not, or codes that are no grid.
    """
    low, text = request.low, request.text
    if low.ndim != 3 or not low.size or not np.issubdtype(low.dtype, np.integer):
        raise ConfigError(
            f"request {index}: the smaller codes must be whole numbers of shape (T, h, w), got {low.dtype} of shape "
            f"{low.shape}."
        )
    for name, values, count in (("code", low, config.codebook_size), ("text piece", text, config.num_text_pieces)):
        if len(values) and not 0 <= np.min(values) <= np.max(values) < count:
            raise ConfigError(
                f"request {index}: every {name} must be in [0, {count}), got {np.min(values)} to {np.max(values)}."
            )


def draw_codes(logits: Tensor, sampling: SamplingConfig, step: int) -> tuple[Codes, NDArray[np.float32]]:
    """Draw a code for every place that a step asks for.

    Args:
        logits: (N, F, V) of any floating dtype, guidance already in them.
        sampling: temperature, top-k, top-p and seed.
        step: of all steps of the canvas.

    Returns:
        (N, F) int64 factors, and (N,) float32 log-probabilities of the codes at temperature 1.
    """
    count, factors, values = logits.shape
    low, high = np.zeros(count * factors, np.int64), np.full(count * factors, values)
    flat = logits.flatten(0, 1)
    drawn, sure = draw_places(lambda places, codes: flat[places, codes], low, high, sampling, step)
    return drawn.reshape(count, factors), sure.reshape(count, factors).sum(1)


@torch.inference_mode()
def draw_step(model: Upsampler, steps: Sequence[UpsamplingStep]) -> list[tuple[Codes, NDArray[np.float32]]]:
    """Draw the codes that one step of each of several canvases asks for; canvases of one shape go through together.

    Args:
        model: in evaluation mode.
        steps: of any shapes.

    Returns:
        For each step (N,) int64 codes of its N unknown places, in their order, and (N,) float32 log-probabilities.
    """
    answers: list[tuple[Codes, NDArray[np.float32]] | None] = [None] * len(steps)
    groups: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for place, step in enumerate(steps):
        groups[step.high.shape].append(place)
    for group in groups.values():
        rows = [(place, name) for place in group for name in _conditions(steps[place].request.settings)]
        hidden = _hidden(model, [(steps[place], name) for place, name in rows])
        for place in group:
            states = {name: hidden[row] for row, (of, name) in enumerate(rows) if of == place}
            step = steps[place]
            asked = torch.from_numpy(np.flatnonzero(step.high.ravel() == UNKNOWN))
            logits = _guided(model, states, asked, step.request.settings)
            factors, sure = draw_codes(logits, step.request.settings.sampling, step.number)
            answers[place] = merge_factors(torch.from_numpy(factors), model.config).numpy(), sure
    return [answer for answer in answers if answer is not None]


def upsample_codes(
    model: Upsampler,
    requests: Sequence[UpsamplingRequest],
    progress: Callable[[int, int], None] | None = None,
    max_batch_size: int = 8,
) -> list[Codes]:
    """Write the codes of the larger size for clips of any shapes.

    Args:
        model: in evaluation mode.
        requests: checked ones.
        progress: called after every step with the codes known and those that there are.
        max_batch_size: clips at once.

    Returns:
        (T, H, W) codes of each clip.
    """
    canvases = [UpsamplingCanvas(request, model.config) for request in requests]
    total = sum(canvas.num_places for canvas in canvases)
    for start in range(0, len(canvases), max_batch_size):
        batch = canvases[start : start + max_batch_size]
        while waiting := [canvas for canvas in batch if not canvas.done]:
            answers = draw_step(model, [canvas.step() for canvas in waiting])
            for canvas, (codes, sure) in zip(waiting, answers, strict=True):
                canvas.settle(codes, sure)
            if progress is not None:
                progress(sum(canvas.num_known for canvas in canvases), total)
    return [canvas.codes for canvas in canvases]


def _conditions(settings: Upsampling) -> list[str]:
    """What the model is asked with: all that there is, and what guidance moves away from."""
    names = ["all"]
    if settings.text_guidance != 1:
        names.append("no text")
    if settings.low_guidance != 1:
        names.append("nothing")
    return names


def _hidden(model: Upsampler, rows: Sequence[tuple[UpsamplingStep, str]]) -> Tensor:
    """(rows, T * H * W, C) hidden states of steps of one shape, each under a condition."""
    device = model.norm.weight.device
    high = torch.from_numpy(np.stack([step.high for step, _ in rows]))
    under = torch.from_numpy(
        np.stack([np.where(name == "nothing", UNKNOWN, step.request.low.astype(np.int64)) for step, name in rows])
    )
    words = [
        step.request.text if name == "all" or _keeps_text(name, step.request.settings) else () for step, name in rows
    ]
    lengths = torch.tensor([len(one) for one in words])
    text = torch.tensor([[*one, *[0] * (int(lengths.max()) - len(one))] for one in words], dtype=torch.int64)
    # Where there are no smaller codes, none of them is wrong: so it was in training.
    level = torch.tensor([0.0 if name == "nothing" else step.request.settings.noise_level for step, name in rows])
    hidden = model(*(part.to(device) for part in (high, under, text.view(len(rows), -1), lengths, level)))
    flat: Tensor = rearrange(hidden, "b t h w c -> b (t h w) c")
    return flat


def _keeps_text(name: str, settings: Upsampling) -> bool:
    """Whether the row without smaller codes keeps its text: where the text is not guided besides."""
    return name == "nothing" and settings.text_guidance == 1


def _guided(model: Upsampler, states: dict[str, Tensor], asked: Tensor, settings: Upsampling) -> Tensor:
    """(N, F, V): from nothing towards the smaller codes, and from those on towards the text."""
    logits = {name: model.logits(state[asked.to(state.device)]).float() for name, state in states.items()}
    whole = logits["all"]
    without_text = logits.get("no text", whole)
    guided = without_text + settings.text_guidance * (whole - without_text)
    if "nothing" in logits:
        guided = guided + (settings.low_guidance - 1) * (without_text - logits["nothing"])
    return guided
