"""Recipes of adapters: what is learnt from, what the adapter is, how it is trained. Knows no PEFT and no torch.

The terms are PEFT's. A recipe's key `train: lora` names this one.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Final, Literal

from poet.data.packing import DEFAULT_MASKS
from poet.errors import ConfigError

__all__ = ["TARGETS", "LoraData", "LoraRecipe", "LoraShape"]

TARGETS: Final = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraData:
    """What is learnt from.

    Attributes:
        clips: a source as `poet encode` takes it: a folder of clips with captions beside them, a manifest, or one that
            is drawn; or token shards that it has written.
        count: clips to take at most; null: all.
        start: number of the first.
        held_out: share of the clips that is not learnt from, to measure on; every n-th.
        validation: a source of other clips to measure on, in which case all of `clips` are learnt from; or null.
        prior: likewise, of clips that the bundle knows, or null.
        prior_count: clips to take of it at most.
        prior_start: number of the first.
    """

    clips: str
    count: int | None = None
    start: int = 0
    held_out: float = 0.1
    validation: str | None = None
    prior: str | None = None
    prior_count: int = 240
    prior_start: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.held_out < 1:
            raise ConfigError(f"held_out must be a share of the clips between 0 and 1, got {self.held_out!r}.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraShape:
    """What the adapter is, in PEFT's terms.

    Attributes:
        rank: of the pairs of matrices.
        alpha: their product is multiplied by alpha / rank, or alpha / sqrt(rank) with `use_rslora`.
        dropout: share of what goes into the first matrix that is dropped while training.
        target_modules: which matrices, of `TARGETS`; none only with `new_rows`.
        new_rows: whether the embedding's rows of everything but text are trained as well, and the head's where it is a
            matrix of its own (PEFT's trainable_token_indices): the first thing that a bundle made of a language model
            has to learn. Text keeps its rows. Such an adapter can be merged, but not served beside others.
        use_rslora: arXiv:2312.03732.
        use_dora: arXiv:2402.09353; such an adapter can be merged, but not served beside others.
    """

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    target_modules: tuple[str, ...] = TARGETS
    use_rslora: bool = False
    use_dora: bool = False
    new_rows: bool = False

    def __post_init__(self) -> None:
        if self.rank < 1 or not self.alpha > 0 or not 0 <= self.dropout < 1:
            raise ConfigError(
                "lora must have rank >= 1, alpha > 0 and dropout in [0, 1), got "
                f"{self.rank!r}, {self.alpha!r}, {self.dropout!r}."
            )
        unknown = sorted(set(self.target_modules) - set(TARGETS))
        if unknown or not (self.target_modules or self.new_rows):
            raise ConfigError(
                f"lora.target_modules must be of {', '.join(TARGETS)}, got {unknown or 'none'}. None at all goes with "
                "new_rows alone."
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraRecipe:
    """How to train an adapter.

    Attributes:
        data: what is learnt from.
        bundle: whose model learns; null: the shipped one.
        lora: what the adapter is.
        prior_share: share of the steps that look at the prior.
        tasks: task name to weight.
        text_dropout: share of scenes whose text is replaced by <null>.
        optional_share: share of scenes in which an input that the task may do without is given.
        parallel_share: share of scenes learnt as ones that are written many ids at once.
        masks: weights of the ways to hide, kinds of `poet.data.masking.MASK_KINDS`.
        num_steps: optimiser steps at most.
        batch_size: scenes a step.
        learning_rate: highest; a linear warm-up, then a cosine down to `learning_rate_floor` of it.
        warmup_steps: of the linear rise.
        learning_rate_floor: share that is left at the end.
        weight_decay: of the adapter's matrices.
        gradient_clip: largest norm of the gradient.
        patience: validations without a better one after which the run ends; 0 goes on to the last step.
        precision: "bf16" (autocast) or "fp32".
        seed: of the adapter's beginning and of the order.
    """

    data: LoraData
    bundle: Path | None = None
    lora: LoraShape = dataclasses.field(default_factory=LoraShape)
    prior_share: float = 0.3
    tasks: dict[str, float] = dataclasses.field(default_factory=lambda: {"text_to_video_audio": 1.0})
    text_dropout: float = 0.1
    optional_share: float = 0.5
    parallel_share: float = 0.3
    masks: dict[str, float] = dataclasses.field(default_factory=lambda: dict(DEFAULT_MASKS))
    num_steps: int = 300
    batch_size: int = 12
    learning_rate: float = 2e-3
    warmup_steps: int = 20
    learning_rate_floor: float = 0.05
    weight_decay: float = 0.0
    gradient_clip: float = 1.0
    patience: int = 0
    precision: Literal["bf16", "fp32"] = "bf16"
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("num_steps", "batch_size", "learning_rate"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} must be positive, got {getattr(self, name)!r}.")
        if self.patience < 0 or not 0 <= self.prior_share < 1:
            raise ConfigError(
                "patience must not be negative and prior_share in [0, 1), got "
                f"{self.patience!r} and {self.prior_share!r}."
            )
        if self.prior_share > 0 and self.data.prior is None:
            raise ConfigError("prior_share needs data.prior, clips that the bundle knows: name them, or set it to 0.")
