"""Doubling the size of video codes: the upsampler's canvas filled many codes at once.

The schedule, the confidences and the draws are those of `poet.generation.maskgit`; a code of several factors draws each
of them, and is as sure as all of them together. It knows codes and the upsampler, and neither ids nor pixels.

Legend: B clips, T latent frames, h x w places of the smaller size, H x W of the larger, F factors, N places asked for.

Source: VideoPoet, arXiv:2312.14125, section 3.4.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from einops import rearrange
from numpy.typing import NDArray
from torch import Tensor

from poet.errors import ConfigError, ShapeError
from poet.generation.maskgit import Canvas, CanvasPlan, Schedule, Stage, check_steps, draw_places
from poet.generation.sampling import SamplingConfig
from poet.grammar import Segment
from poet.model.superresolution import UNKNOWN, Upsampler, merge_factors

__all__ = ["Upsampling", "draw_codes", "upsample_codes"]

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
        SamplingConfig(temperature=self.temperature, seed=self.seed)
        CanvasPlan(
            stages=(Stage(0, 1, self.num_steps),),
            mask_id=UNKNOWN,
            schedule=self.schedule,
            choice_temperature=self.choice_temperature,
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
    drawn, sure = draw_places(logits.flatten(0, 1), low, high, sampling, step)
    return drawn.reshape(count, factors), sure.reshape(count, factors).sum(1)


@torch.inference_mode()
def upsample_codes(
    model: Upsampler,
    low: Sequence[Codes],
    texts: Sequence[Sequence[int]],
    settings: Sequence[Upsampling],
    progress: Callable[[int, int], None] | None = None,
) -> list[Codes]:
    """Write the codes of the larger size for clips of one shape, all in one batch.

    Args:
        model: in evaluation mode.
        low: (T, h, w) codes of each clip.
        texts: pieces of each clip's text; () for none.
        settings: of each clip.
        progress: called after every step with the codes known and those that there are.

    Returns:
        (T, H, W) codes of each clip.

    Raises:
        ShapeError: the clips have several shapes, or not as many texts or settings as clips.
    """
    if len({codes.shape for codes in low}) > 1 or not len(low) == len(texts) == len(settings):
        raise ShapeError(
            f"clips must be of one shape, with a text and settings each, got {[codes.shape for codes in low]}, "
            f"{len(texts)} texts and {len(settings)} settings."
        )
    if not low:
        return []
    config = model.config
    frames, height, width = low[0].shape
    shape = frames, height * config.scale, width * config.scale
    count = math.prod(shape)
    canvases = [
        Canvas(
            (Segment(count, 0, config.codebook_size),),
            CanvasPlan(
                stages=(Stage(0, count, one.num_steps),),
                mask_id=UNKNOWN,
                schedule=one.schedule,
                choice_temperature=one.choice_temperature,
            ),
            SamplingConfig(temperature=one.temperature, seed=one.seed),
        )
        for one in settings
    ]
    given = torch.from_numpy(np.stack(low))
    while waiting := [row for row, canvas in enumerate(canvases) if not canvas.done]:
        rows = _rows(waiting, settings)
        hidden = _hidden(model, rows, canvases, shape, given, texts, settings)
        for row in waiting:
            asked = canvases[row].asked()
            states = {name: hidden[place] for place, (of, name) in enumerate(rows) if of == row}
            logits = _guided(model, states, torch.from_numpy(asked), settings[row])
            factors, sure = draw_codes(logits, canvases[row].sampling, canvases[row].step)
            canvases[row].settle(merge_factors(torch.from_numpy(factors), config).numpy(), sure)
        if progress is not None:
            progress(sum(canvas.num_known for canvas in canvases), count * len(canvases))
    return [canvas.ids.reshape(shape) for canvas in canvases]


def _rows(waiting: Sequence[int], settings: Sequence[Upsampling]) -> list[tuple[int, str]]:
    """What the model is asked for: each clip with all that it has, and what its guidance moves away from."""
    rows = []
    for row in waiting:
        rows.append((row, "all"))
        if settings[row].text_guidance != 1:
            rows.append((row, "no text"))
        if settings[row].low_guidance != 1:
            rows.append((row, "nothing"))
    return rows


def _hidden(
    model: Upsampler,
    rows: Sequence[tuple[int, str]],
    canvases: Sequence[Canvas],
    shape: tuple[int, int, int],
    low: Tensor,
    texts: Sequence[Sequence[int]],
    settings: Sequence[Upsampling],
) -> Tensor:
    """(rows, T * H * W, C) hidden states."""
    device = model.norm.weight.device
    high = torch.tensor([canvases[row].shown() for row, _ in rows]).view(-1, *shape)
    under = torch.stack([low[row] if name != "nothing" else torch.full_like(low[row], UNKNOWN) for row, name in rows])
    words = [texts[row] if name == "all" or _keeps_text(name, settings[row]) else () for row, name in rows]
    lengths = torch.tensor([len(one) for one in words])
    text = torch.tensor([[*one, *[0] * (int(lengths.max()) - len(one))] for one in words], dtype=torch.int64)
    # Where there are no smaller codes, none of them is wrong: so it was in training.
    level = torch.tensor([0.0 if name == "nothing" else settings[row].noise_level for row, name in rows])
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
