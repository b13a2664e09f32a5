"""Drawing one id a row from logits. It knows ranges of ids and probabilities; it does not know grammars or models.

Legend: B rows, V vocabulary, W ids between the lowest and the highest that any row allows.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from poet.errors import CheckpointError, ConfigError
from poet.grammar import Allowed

__all__ = ["SamplingConfig", "build_generator", "fold_seed", "guide", "keep_likeliest", "penalise", "sample"]


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How ids are drawn.

    Attributes:
        temperature: divides the logits; 0 takes the likeliest id and draws nothing.
        top_k: draw only from so many of the likeliest ids (ties with the last of them stay); 0 is all.
        top_p: draw only from the likeliest ids whose probabilities first reach this sum; 1 is all.
        seed: of this row's draws; None takes a new one every time.
        guidance_scale: how far the logits are moved away from those of a second prefix, mostly the same one without its
            text: second + scale * (first - second). 1 is off.
        repetition_penalty: the logits of ids that were written lately are divided by it where they are above 0 and
            multiplied by it where they are below; 1 is off. For video that has collapsed into one code.
        repetition_window: how many of the last ids count as lately; 0 counts all of the output.

    Raises:
        ConfigError: a value out of its range.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None
    guidance_scale: float = 1.0
    repetition_penalty: float = 1.0
    repetition_window: int = 64

    def __post_init__(self) -> None:
        # Beyond these bounds float32 logits become infinite, or no numbers at all.
        if not _is_number(self.temperature) or not (self.temperature == 0 or 1e-3 <= self.temperature <= 1e3):
            raise ConfigError(
                f"temperature must be a number of at least 0 (0 is greedy), 0 or from 0.001 to 1000, got "
                f"{self.temperature!r}."
            )
        if not _is_whole(self.top_k) or self.top_k < 0:
            raise ConfigError(f"top_k must be a whole number of at least 0 (0 is all), got {self.top_k!r}.")
        if not _is_number(self.top_p) or not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p must be a number in (0, 1] (1 is all), got {self.top_p!r}.")
        if self.seed is not None and (not _is_whole(self.seed) or not 0 <= self.seed < 2**63):
            raise ConfigError(f"seed must be a whole number in [0, 2^63), or none for a new one, got {self.seed!r}.")
        if not _is_number(self.guidance_scale) or not 0 <= self.guidance_scale <= 1e3:
            raise ConfigError(
                "guidance_scale must be a number of at least 0 (1 is off) and at most 1000, got "
                f"{self.guidance_scale!r}."
            )
        if not _is_number(self.repetition_penalty) or not 1e-6 <= self.repetition_penalty <= 1e6:
            raise ConfigError(
                f"repetition_penalty must be a number above 0 (1 is off), from 1e-6 to 1e6, got "
                f"{self.repetition_penalty!r}."
            )
        if not _is_whole(self.repetition_window) or self.repetition_window < 0:
            raise ConfigError(
                f"repetition_window must be a whole number of at least 0 (0 is all), got {self.repetition_window!r}."
            )

    @property
    def greedy(self) -> bool:
        """Whether the likeliest id is taken and nothing is drawn."""
        return self.temperature == 0


def build_generator(config: SamplingConfig) -> torch.Generator:
    """Make a row's own source of randomness. It lives on the CPU, so a seed draws the same noise on every device."""
    generator = torch.Generator()
    if config.seed is None:
        generator.seed()
    else:
        generator.manual_seed(fold_seed(config.seed))
    return generator


def fold_seed(seed: int) -> int:
    """Bring a seed of 63 bits into 32: PyTorch's CPU generator ignores the rest. Small seeds stay as they are."""
    return (seed ^ (seed >> 32) * 0x9E3779B1) & 0xFFFFFFFF


def guide(logits: Tensor, steered_from: Tensor, scales: Sequence[float]) -> Tensor:
    """Classifier-free guidance: move logits away from those of another prefix.

    Args:
        logits: (B, V) of any floating dtype, for the prefix that is asked for.
        steered_from: (B, V), for the prefix to move away from.
        scales: of each row; 1 leaves `logits` as they are, up to rounding.

    Returns:
        (B, V) float32.

    Source: Ho and Salimans, arXiv:2207.12598, section 3.2, there on scores and with w = scale - 1; VideoPoet,
    arXiv:2312.14125, on logits.
    """
    first, second = logits.float(), steered_from.float()
    scale = torch.tensor(scales, dtype=torch.float32, device=logits.device)[:, None]
    return second + scale * (first - second)


def penalise(logits: Tensor, written: Sequence[int], config: SamplingConfig) -> None:
    """Make ids that were written lately less likely, in place.

    Args:
        logits: (V,) of any floating dtype, finite.
        written: the output so far.
        config: says how much, and how far back.

    Source: Keskar et al., "CTRL", arXiv:1909.05858, section 4.1, for ids of either sign as transformers has it; with a
    window, since the background of a picture may well come again.
    """
    if config.repetition_penalty == 1 or not written:
        return
    lately = written[-config.repetition_window :] if config.repetition_window else written
    ids = torch.tensor(sorted(set(lately)), device=logits.device)
    scores = logits[ids]
    logits[ids] = torch.where(scores > 0, scores / config.repetition_penalty, scores * config.repetition_penalty)


def sample(
    logits: Tensor,
    allowed: Sequence[Allowed],
    configs: Sequence[SamplingConfig],
    generators: Sequence[torch.Generator],
) -> Tensor:
    """Draw one id a row among those that the row allows.

    What a row draws depends on its own logits, settings and generator alone: the generator advances by one number for
    every id that the row allows, and by none in a greedy row.

    Args:
        logits: (B, V) of any floating dtype.
        allowed: of each row, (low, high, stop): ids in [low, high), and `stop` if it is not None.
        configs: of each row.
        generators: of each row, from `build_generator`.

    Returns:
        (B,) int64 on the logits' device.

    Raises:
        CheckpointError: a logit of an allowed id is not finite.
    """
    bounds = [(_lowest(row), _highest(row)) for row in allowed]
    floor, ceiling = min(low for low, _ in bounds), max(high for _, high in bounds)
    scores = logits[:, floor : ceiling + 1].float()
    # Rows of one batch mostly stand at the same place of the same grammar, where the whole window is allowed.
    if any(row.stop is not None or bound != (floor, ceiling) for row, bound in zip(allowed, bounds, strict=True)):
        scores = scores.masked_fill(~_legal(allowed, floor, ceiling + 1, logits.device), -math.inf)
    best = scores.max(-1)
    if not bool(torch.isfinite(best.values).all()):
        raise CheckpointError("logits must be finite, got NaN or infinity. The model's weights are damaged.")
    ids = best.indices
    rows = [row for row, config in enumerate(configs) if not config.greedy]
    if rows:
        drawn = [configs[row] for row in rows]
        temperature = torch.tensor([[config.temperature] for config in drawn], device=logits.device)
        kept = keep_likeliest((scores[rows] - best.values[rows, None]) / temperature, drawn)
        noise = torch.stack([_noise(allowed[row], floor, ceiling + 1, generators[row]) for row in rows])
        # argmax(log p + Gumbel noise) is a draw from p, and -log of exponential noise is Gumbel noise.
        ids = ids.clone()
        ids[rows] = (kept - noise.to(logits.device).log()).argmax(-1)
    return ids + floor


def keep_likeliest(scores: Tensor, configs: Sequence[SamplingConfig]) -> Tensor:
    """Set to -inf what top-k, and then top-p among the rest, leave out.

    Args:
        scores: (B, W) float32, logits over the temperature.
        configs: of each row.

    Returns:
        (B, W) float32.
    """
    if all(config.top_k == 0 and config.top_p == 1 for config in configs):
        return scores
    width = scores.shape[1]
    ordered, order = scores.sort(stable=True, dim=-1, descending=True)
    last = torch.tensor([[min(config.top_k or width, width) - 1] for config in configs], device=scores.device)
    ordered = ordered.masked_fill(ordered < ordered.gather(1, last), -math.inf)
    top_p = torch.tensor([[config.top_p] for config in configs], device=scores.device)
    probabilities = ordered.softmax(-1)
    before = probabilities.cumsum(-1) - probabilities
    # At top_p = 1 nothing may go, although the sum of what comes before can round to 1.
    ordered = ordered.masked_fill((before >= top_p) & (top_p < 1), -math.inf)
    return torch.empty_like(scores).scatter_(1, order, ordered)


def _noise(allowed: Allowed, floor: int, ceiling: int, generator: torch.Generator) -> Tensor:
    """(W,) exponential noise at the allowed ids, 1 elsewhere."""
    noise = torch.ones(ceiling - floor)
    drawn = torch.empty(allowed.high - allowed.low + (allowed.stop is not None)).exponential_(generator=generator)
    drawn.clamp_(min=torch.finfo(drawn.dtype).tiny)
    noise[allowed.low - floor : allowed.high - floor] = drawn[: allowed.high - allowed.low]
    if allowed.stop is not None:
        noise[allowed.stop - floor] = drawn[-1]
    return noise


def _legal(allowed: Sequence[Allowed], floor: int, ceiling: int, device: torch.device) -> Tensor:
    """(B, W) bool, True at the allowed ids."""
    legal = torch.zeros(len(allowed), ceiling - floor, dtype=torch.bool)
    for row, (low, high, stop) in zip(legal, allowed, strict=True):
        row[low - floor : high - floor] = True
        if stop is not None:
            row[stop - floor] = True
    return legal.to(device)


def _lowest(allowed: Allowed) -> int:
    return allowed.low if allowed.stop is None else min(allowed.low, allowed.stop)


def _highest(allowed: Allowed) -> int:
    return allowed.high - 1 if allowed.stop is None else max(allowed.high - 1, allowed.stop)


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
