"""Writing outputs many ids at once: MaskGIT's decoding with the reference transformer.

An output is a canvas. Every step asks the model for all unknown places at once, draws an id for each, keeps those that
it is surest of and hides the others again, fewer and fewer by a schedule. A canvas may be filled in stages, each a run
of places with steps of its own: frame by frame, say, with the earlier frames fixed. Places that are pinned, or that the
grammar leaves no choice about, are known from the start and never change.

It knows ids, places and grammars; it does not know codes, tasks, bundles or other engines. Other engines share `Canvas`
and `draw_places`, so that they differ in where the logits come from and in nothing else.

Legend: B rows, L ids of an output, N places that are asked for, V vocabulary.

Source: MaskGIT, arXiv:2202.04200, section 3.2; the noise on confidences after its section 3.2 and MAGVIT,
arXiv:2212.05199, section 3.3.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import secrets
from collections.abc import Callable, Iterator, Sequence
from typing import Final, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from poet.errors import CheckpointError, ConfigError, ShapeError
from poet.generation.context import build_cache
from poet.generation.sampling import SamplingConfig, fold_seed, guide, keep_likeliest
from poet.grammar import Grammar, place_ranges
from poet.model.attention import SceneLayout
from poet.model.transformer import PoetTransformer

__all__ = [
    "SCHEDULES",
    "Canvas",
    "CanvasPlan",
    "Logits",
    "Schedule",
    "Stage",
    "check_steps",
    "draw_places",
    "fill_canvases",
    "guided_logits",
    "step_generator",
    "unknown_after",
]

Schedule = Literal["cosine", "linear", "square"]
SCHEDULES: Final[tuple[str, ...]] = get_args(Schedule)
UNKNOWN: Final = -1
_RUN: Final = 64  # ids that are summed together when one is drawn


def check_steps(num_steps: int) -> None:
    """Raise unless a canvas can be filled in so many steps.

    Raises:
        ConfigError: it is no whole number of at least 1.
    """
    if not isinstance(num_steps, int) or isinstance(num_steps, bool) or num_steps < 1:
        raise ConfigError(f"the number of steps must be a whole number of at least 1, got {num_steps!r}.")


@dataclasses.dataclass(frozen=True, slots=True)
class Stage:
    """A run of places of the output, from `start` to before `stop`, that is filled in `num_steps` steps.

    Raises:
        ConfigError: an empty run, or no step.
    """

    start: int
    stop: int
    num_steps: int

    def __post_init__(self) -> None:
        check_steps(self.num_steps)
        if not 0 <= self.start < self.stop:
            raise ConfigError(f"a stage must have 0 <= start < stop, got {self.start} and {self.stop}.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CanvasPlan:
    """How an output is filled.

    Attributes:
        stages: one after another; together they hold every place that has to be filled. A stage whose places are all
            known is passed over, and one with fewer unknown places than steps takes as many steps as places.
        schedule: share of a stage's places that is unknown after a share r of its steps: cosine, cos(pi / 2 * r);
            linear, 1 - r; square, 1 - r^2.
        choice_temperature: of the Gumbel noise on confidences, which falls to 0 with a stage's last step. 0 keeps the
            surest places; more brings variety. Greedy outputs have none.
        guidance_start, guidance_stop: shares of the output's steps between which guidance is in force, where there is
            any; the steps outside cost half as much.
        pinned: (place, id) pairs that are known from the start.
        mask_id: the id that unknown places show.

    Raises:
        ConfigError: no stage, stages that overlap or run backwards, an unknown schedule, a negative temperature, or
            shares of steps that are none.

    Source: of guidance in a part of the steps, arXiv:2404.07724, there for diffusion.
    """

    stages: tuple[Stage, ...]
    mask_id: int
    schedule: Schedule = "cosine"
    choice_temperature: float = 1.0
    guidance_start: float = 0.0
    guidance_stop: float = 1.0
    pinned: tuple[tuple[int, int], ...] = ()

    def __post_init__(self) -> None:
        ends = [0, *(stage.stop for stage in self.stages)]
        if not self.stages or any(stage.start < end for stage, end in zip(self.stages, ends[:-1], strict=True)):
            raise ConfigError(
                f"stages must be one or more, ascending and apart, got {self.stages}. Make them with "
                "poet.generation.canvas.plan_canvas()."
            )
        if self.schedule not in SCHEDULES:
            raise ConfigError(f"schedule must be one of {', '.join(SCHEDULES)}, got {self.schedule!r}.")
        if not 0 <= self.choice_temperature < math.inf:
            raise ConfigError(
                f"choice_temperature must be a number of at least 0 (0 adds no noise), got {self.choice_temperature!r}."
            )
        if not 0 <= self.guidance_start <= self.guidance_stop <= 1:
            raise ConfigError(
                "guidance must have 0 <= guidance_start <= guidance_stop <= 1, shares of the steps, got "
                f"{self.guidance_start!r} and {self.guidance_stop!r}."
            )
        if len({place for place, _ in self.pinned}) != len(self.pinned):
            raise ConfigError("a place must be pinned once at most, got one that is pinned twice. Leave one pin out.")

    @property
    def num_steps(self) -> int:
        """Steps of all stages, where none has fewer unknown places than steps."""
        return sum(stage.num_steps for stage in self.stages)

    def guided_steps(self, num_steps: int) -> range:
        """Which steps guidance is in force in, of so many in all: at least one, if the shares differ."""
        if self.guidance_start == self.guidance_stop:
            return range(0)
        first = min(round(self.guidance_start * num_steps), num_steps - 1)
        return range(first, max(round(self.guidance_stop * num_steps), first + 1))


def unknown_after(num_places: int, num_steps: int, schedule: Schedule) -> list[int]:
    """How many places are unknown after each step: falling with every step, and 0 after the last.

    Args:
        num_places: that are unknown at first, at least one.
        num_steps: at least one; of more steps than places the surplus is left out.
        schedule: as in `CanvasPlan`.

    Returns:
        One number a step.
    """
    num_steps = min(num_steps, num_places)
    counts, left = [], num_places
    for step in range(1, num_steps + 1):
        done = step / num_steps
        share = {"cosine": math.cos(math.pi / 2 * done), "linear": 1 - done, "square": 1 - done**2}[schedule]
        # At least one place a step, now and in the steps to come; the last share is 0 up to rounding.
        left = max(min(math.floor(num_places * share), left - 1), num_steps - step)
        counts.append(left)
    return counts


class Canvas:
    """One output while it is being filled.

    Args:
        grammar: of the output, which must be of one length.
        plan: how to fill it.
        sampling: how ids are drawn; without a seed a new one is taken.

    Attributes:
        ids: (L,) int64, -1 where unknown.
        low, high: (L,) int64, the range of ids of every place.
        sampling: with a seed.
        step: steps taken so far, over all stages.

    Raises:
        ConfigError: a place lies outside every stage and is not known, or an id is pinned outside its place's range.
        VocabularyError: the output's length is open.
    """

    def __init__(self, grammar: Grammar, plan: CanvasPlan, sampling: SamplingConfig) -> None:
        self.plan = plan
        self.low, self.high = place_ranges(grammar)
        self.sampling = dataclasses.replace(sampling, seed=secrets.randbits(31)) if sampling.seed is None else sampling
        self.ids: NDArray[np.int64] = np.where(self.high - self.low == 1, self.low, UNKNOWN)
        for place, id in plan.pinned:
            if not 0 <= place < len(self.ids) or not self.low[place] <= id < self.high[place]:
                raise ConfigError(
                    f"a pinned id must fit its place of an output of {len(self.ids)} ids, got {id} at {place}. "
                    "Pack it with the bundle's own vocabulary."
                )
            self.ids[place] = id
        within = np.zeros(len(self.ids), np.bool_)
        for stage in plan.stages:
            within[stage.start : stage.stop] = True
        outside = np.flatnonzero(~within & (self.ids == UNKNOWN))
        if len(outside) or plan.stages[-1].stop > len(self.ids):
            raise ConfigError(
                f"the stages must hold every unknown place of the {len(self.ids)} of an output and no other, got "
                f"{plan.stages}. Plan the canvas for the shapes of its grammar."
            )
        self.step = 0
        # For every step to come: its stage, which step of the stage it is, and the places left unknown after it.
        self._due: list[tuple[Stage, float, int]] = []
        for stage in plan.stages:
            unknown = int((self.ids[stage.start : stage.stop] == UNKNOWN).sum())
            counts = unknown_after(unknown, stage.num_steps, plan.schedule) if unknown else []
            self._due += [(stage, (number + 1) / len(counts), left) for number, left in enumerate(counts)]

    @property
    def num_steps(self) -> int:
        """Steps in all."""
        return len(self._due)

    @property
    def done(self) -> bool:
        """Whether every place is known."""
        return self.step == len(self._due)

    @property
    def takes_guidance(self) -> bool:
        """Whether this step is one of those that guidance is for."""
        return self.step in self.plan.guided_steps(self.num_steps)

    @property
    def num_known(self) -> int:
        """Places that are known."""
        return int((self.ids != UNKNOWN).sum())

    def asked(self) -> NDArray[np.int64]:
        """The places that this step draws ids for, ascending: the unknown ones of its stage, (N,) int64."""
        stage = self._due[self.step][0]
        return stage.start + np.flatnonzero(self.ids[stage.start : stage.stop] == UNKNOWN)

    def shown(self) -> list[int]:
        """What the model is shown: L ids."""
        shown: list[int] = np.where(self.ids == UNKNOWN, self.plan.mask_id, self.ids).tolist()
        return shown

    def settle(self, drawn: NDArray[np.int64], log_probabilities: NDArray[np.float32]) -> None:
        """Keep the surest of the ids that were drawn for the places `asked()`, and go on to the next step.

        Args:
            drawn: (N,) ids.
            log_probabilities: (N,) of them.

        Raises:
            CheckpointError: one of them is not finite.
        """
        asked = self.asked()
        _, done, left = self._due[self.step]
        if not np.isfinite(log_probabilities).all():
            raise CheckpointError("logits must be finite, got NaN or infinity. The model's weights are damaged.")
        confidence = log_probabilities.astype(np.float64)
        heat = 0.0 if self.sampling.greedy else self.plan.choice_temperature * (1 - done)
        if heat > 0:
            noise = torch.empty(len(asked), dtype=torch.float64)
            noise.exponential_(generator=step_generator(self.sampling, self.step, stream=1))
            confidence -= heat * noise.log().numpy()  # -log of exponential noise is Gumbel noise
        # Of places that are as sure as each other the first stay.
        kept = np.argsort(-confidence, kind="stable")[: len(asked) - left]
        self.ids[asked[kept]] = drawn[kept]
        self.step += 1


def step_generator(sampling: SamplingConfig, step: int, *, stream: int) -> torch.Generator:
    """The source of randomness of one step, on the CPU: a pure function of its arguments, so no state has to travel.

    Args:
        sampling: with a seed.
        step: of all steps of the output.
        stream: 0 for ids, 1 for confidences.
    """
    assert sampling.seed is not None
    state = np.random.SeedSequence([fold_seed(sampling.seed), step, stream]).generate_state(1, np.uint32)
    return torch.Generator().manual_seed(int(state[0]))


Logits = Callable[[slice, slice], Tensor]
"""The logits of some of the places that a step asks for, and of some ids: (places, ids) of any floating dtype."""


def draw_places(
    logits: Logits, low: NDArray[np.int64], high: NDArray[np.int64], sampling: SamplingConfig, step: int
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Draw an id for every place that a step asks for, each within its range.

    Only the logits of legal ids are asked for: most of a vocabulary is legal nowhere on a canvas's place.

    Args:
        logits: of the N places and V ids, guidance already in them.
        low: (N,) int64.
        high: (N,) int64.
        sampling: temperature, top-k, top-p and seed.
        step: of all steps of the output.

    Returns:
        (N,) int64 ids, and (N,) float32 their log-probabilities among the legal ids at temperature 1.
    """
    ids, sure = np.empty(len(low), np.int64), np.empty(len(low), np.float32)
    generator = None if sampling.greedy else step_generator(sampling, step, stream=0)
    for start, stop in _runs(low, high):
        floor = int(low[start])
        scores = logits(slice(start, stop), slice(floor, int(high[start]))).float().log_softmax(-1)
        if generator is None:
            chosen = scores.argmax(-1)
        else:
            chosen = _draw(keep_likeliest(scores / sampling.temperature, [sampling] * len(scores)), generator)
        ids[start:stop] = (chosen + floor).cpu().numpy()
        sure[start:stop] = scores.gather(1, chosen[:, None])[:, 0].cpu().numpy()
    return ids, sure


def _draw(scores: Tensor, generator: torch.Generator) -> Tensor:
    """(N, W) logits to (N,) places of them, each drawn with one random number: where it falls among the shares.

    Runs of ids are summed first, and the number then looked for in one of them: a sum over all of W that goes on in
    double precision takes longer than all the rest.
    """
    shares = (scores - scores.amax(-1, keepdim=True)).exp_()
    runs = functional.pad(shares, (0, -shares.shape[-1] % _RUN)).unflatten(-1, (-1, _RUN))
    sums = runs.sum(-1).double().cumsum(-1)
    level = torch.rand(len(scores), 1, dtype=torch.float64, generator=generator).to(scores.device) * sums[:, -1:]
    run = _behind(sums, level)  # of NaN the first: what is not finite is found by whoever settles the canvas
    before = torch.where(run > 0, sums.gather(1, (run - 1).clamp_min(0)), 0.0)
    within = runs[torch.arange(len(scores), device=scores.device), run[:, 0]].double().cumsum(-1)
    return (run * _RUN + _behind(within, (level - before).clamp_min(0)))[:, 0]


def _behind(sums: Tensor, level: Tensor) -> Tensor:
    """(N, M) running sums and (N, 1) levels to the (N, 1) first places whose sum is above the level.

    Rounding must not lead behind the last place with a share of its own, which is the first to reach the whole sum.
    """
    place = torch.searchsorted(sums, level, right=True).minimum(torch.searchsorted(sums, sums[:, -1:].contiguous()))
    return torch.where(place < sums.shape[-1], place, 0)


def _runs(low: NDArray[np.int64], high: NDArray[np.int64]) -> Iterator[tuple[int, int]]:
    """Borders of the runs of places with the same range."""
    changes = np.flatnonzero((np.diff(low) != 0) | (np.diff(high) != 0)) + 1
    borders = [0, *changes.tolist(), len(low)] if len(low) else []
    yield from itertools.pairwise(borders)


@torch.inference_mode()
def fill_canvases(
    model: PoetTransformer,
    prefixes: Sequence[Sequence[int]],
    canvases: Sequence[Canvas],
    guides: Sequence[Sequence[int] | None] | None = None,
    progress: Callable[[int], None] | None = None,
    contexts: Sequence[Sequence[int]] | None = None,
) -> list[list[int]]:
    """Fill all canvases, all in one batch; those that are done leave it.

    Args:
        model: in evaluation mode.
        prefixes: at least one id each, in [0, vocab_size).
        canvases: of these prefixes' outputs, as they are; filled in place.
        guides: of each output the prefix that guidance moves it away from, or None; None guides none.
        progress: called after every step with the number of known ids in all outputs.
        contexts: of each output the ids of its film's earlier scenes, () where there is none; None: of no output.

    Returns:
        The output ids of each prefix, complete in its grammar.

    Raises:
        ShapeError: there are not as many contexts as prefixes.
    """
    guides = [None] * len(prefixes) if guides is None else guides
    pasts = [()] * len(prefixes) if contexts is None else contexts
    if len(pasts) != len(prefixes):
        raise ShapeError(f"there must be a past, or (), for each of the {len(prefixes)} canvases, got {len(pasts)}.")
    while waiting := [row for row, canvas in enumerate(canvases) if not canvas.done]:
        rows = [(prefixes[row], canvases[row]) for row in waiting]
        guided = [row for row in waiting if guides[row] is not None and canvases[row].takes_guidance]
        rows += [(ids, canvases[row]) for row in guided if (ids := guides[row]) is not None]
        before = [pasts[row] for row in (*waiting, *guided)]
        hidden = _hidden(model, [[*prefix, *canvas.shown()] for prefix, canvas in rows], before)
        for place, row in enumerate(waiting):
            canvas = canvases[row]
            asked = canvas.asked()
            logits = _logits_before(model, hidden[place], len(prefixes[row]) + asked)
            if row in guided:
                number = len(waiting) + guided.index(row)
                steered_from = _logits_before(model, hidden[number], len(rows[number][0]) + asked)
                logits = guided_logits(logits, steered_from, canvas.sampling.guidance_scale)
            canvas.settle(*draw_places(logits, canvas.low[asked], canvas.high[asked], canvas.sampling, canvas.step))
        if progress is not None:
            progress(sum(canvas.num_known for canvas in canvases))
    return [canvas.ids.tolist() for canvas in canvases]


def _hidden(model: PoetTransformer, rows: Sequence[Sequence[int]], contexts: Sequence[Sequence[int]]) -> Tensor:
    """(B, longest, C) hidden states of whole scenes, each of which sees all of itself."""
    device = model.model.norm.weight.device
    lengths = torch.tensor([len(row) for row in rows])
    longest = int(lengths.max())
    ids = torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows])
    layout = SceneLayout.from_prefix_lengths(
        torch.zeros_like(lengths), lengths, longest, parallel=torch.ones(len(rows), dtype=torch.bool)
    )
    if not any(contexts):
        hidden: Tensor = model(ids.to(device), layout.to(device))
        return hidden
    cache, layout, positions = build_cache(model, contexts, layout)
    behind: Tensor = model(ids.to(device), layout, positions[:, cache.context :], cache)
    return behind


def _logits_before(model: PoetTransformer, hidden: Tensor, places: NDArray[np.int64]) -> Logits:
    """The prediction for a place is read one place before it."""
    states = hidden[torch.from_numpy(places - 1).to(hidden.device)]
    return lambda places, ids: model.logits(states[places], ids)


def guided_logits(logits: Logits, steered_from: Logits, scale: float) -> Logits:
    """Both together under guidance, see `poet.generation.sampling.guide`."""

    def mixed(places: slice, ids: slice) -> Tensor:
        first = logits(places, ids)
        return guide(first, steered_from(places, ids), [scale] * len(first))

    return mixed
