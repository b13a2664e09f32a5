"""Trains the upsampler: pairs of shards, of the smaller and of the larger size, and one optimiser step.

A step hides a part of the larger codes, replaces a part of the smaller ones at random, sometimes leaves out the text or
the smaller codes altogether, and asks for what is hidden. Knows codes, never pixels.

Legend: B clips, T latent frames, h x w and H x W places of the smaller and the larger size, F factors, N hidden places.

Source: VideoPoet, arXiv:2312.14125, section 3.4; MaskGIT, arXiv:2202.04200, section 3.1.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from poet.bundle import Bundle
from poet.data.masking import MaskSampler
from poet.data.shards import EncodedClip, ShardReader, open_shards
from poet.errors import CheckpointError, ConfigError
from poet.model.superresolution import UNKNOWN, Upsampler, UpsamplerConfig, split_factors
from poet.model.weights import save_upsampler
from poet.training.ahead import DrawnAhead
from poet.training.loop import ExponentialMovingAverage, cosine_schedule
from poet.training.optimizers import Optimizers

__all__ = ["UpsamplerRecipe", "UpsamplerSize", "UpsamplerTraining"]

_CHUNK = 1024  # hidden places whose logits exist at a time


@dataclasses.dataclass(frozen=True, kw_only=True)
class UpsamplerSize:
    """The sizes that a recipe decides; the tokenizers decide the rest of `UpsamplerConfig`."""

    hidden_size: int = 192
    ffn_hidden_size: int = 512
    num_layers: int = 9
    num_heads: int = 4
    windows: tuple[tuple[int, int, int], ...] = ((1, 8, 16), (1, 16, 8), (5, 4, 4))
    num_factors: int | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class UpsamplerRecipe:
    """How to train the upsampler. The YAML recipe has the same keys.

    Attributes:
        bundle: its tokenizers, whose codes the shards hold.
        low_shards: the clips in the smaller size.
        high_shards: the same clips, in the same order, in the larger size.
        validation_low_shards: held-out ones.
        validation_high_shards: held-out ones.
        model: sizes.
        num_steps: optimiser steps in all.
        batch_size: B.
        optimizer: "adamw", or "muon" for the matrices of the layers.
        learning_rate: AdamW's highest; reached after `warmup_steps`, then a cosine down to `learning_rate_floor` of it.
        muon_learning_rate: Muon's highest.
        warmup_steps: steps of the linear rise.
        learning_rate_floor: share that is left at the end.
        beta2: AdamW's.
        weight_decay: of matrices.
        ema_decay: of the moving average of the weights, which is what is measured and exported.
        gradient_clip: largest norm of a step's gradient.
        text_dropout: share of clips without their text, for guidance.
        low_dropout: share of clips without their smaller codes, for guidance.
        noise: the largest share of smaller codes that are replaced at random; each clip draws its own up to it.
        masks: weights of the ways to hide, kinds of `poet.data.masking.MASK_KINDS` but "level".
        validation_clips: clips to measure on.
        precision: "bf16" (autocast) or "fp32".
        export_dtype: of the weights that are written.
        seed: of everything drawn.

    Raises:
        ConfigError: a value that cannot be used.
    """

    bundle: Path
    low_shards: Path
    high_shards: Path
    validation_low_shards: Path
    validation_high_shards: Path
    model: UpsamplerSize = dataclasses.field(default_factory=UpsamplerSize)
    num_steps: int = 4_000
    batch_size: int = 8
    optimizer: Literal["adamw", "muon"] = "adamw"
    learning_rate: float = 1.5e-3
    muon_learning_rate: float = 4e-3
    warmup_steps: int = 100
    learning_rate_floor: float = 0.02
    beta2: float = 0.98
    weight_decay: float = 0.05
    ema_decay: float = 0.995
    gradient_clip: float = 1.0
    text_dropout: float = 0.1
    low_dropout: float = 0.1
    noise: float = 0.3
    masks: dict[str, float] = dataclasses.field(default_factory=lambda: {"cosine": 0.8, "uniform": 0.1, "block": 0.1})
    validation_clips: int = 32
    precision: Literal["bf16", "fp32"] = "bf16"
    export_dtype: Literal["float32", "bfloat16"] = "bfloat16"
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("num_steps", "batch_size", "validation_clips", "learning_rate", "muon_learning_rate"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} must be positive, got {getattr(self, name)!r}.")
        for name in ("text_dropout", "low_dropout", "noise"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name} must be a share from 0 to 1, got {getattr(self, name)!r}.")
        if "level" in self.masks:
            raise ConfigError("masks must not hold 'level', which hides sound: the upsampler writes none.")
        MaskSampler(self.masks)


@dataclasses.dataclass(frozen=True)
class _Example:
    """What a step is made of: (B, T, H, W) larger codes and which of them are hidden, and what the model is given."""

    high: Tensor
    hidden: Tensor
    low: Tensor
    text: Tensor
    text_lengths: Tensor
    noise_level: Tensor


class UpsamplerTraining:
    """A `Trainable` for `poet.training.loop.fit`.

    Clips are gone through in an order that (seed, epoch) decides, and what is drawn for a clip is a pure function of
    (seed, step), so a run that was stopped goes on exactly as it would have.

    Args:
        recipe: how to train.
        device: where to train.

    Raises:
        CheckpointError: bundle or shards are missing, damaged or of another vocabulary.
        ConfigError: shards that do not hold the same clips in two sizes.
    """

    def __init__(self, recipe: UpsamplerRecipe, *, device: str | torch.device = "cpu") -> None:
        self.recipe, self.device = recipe, torch.device(device)
        self.bundle = Bundle.open(recipe.bundle, require_model=False)
        self.pairs = _Pairs(self.bundle, recipe.low_shards, recipe.high_shards)
        self.validation = _Pairs(self.bundle, recipe.validation_low_shards, recipe.validation_high_shards)
        vocabulary = self.bundle.vocabulary
        self.config = UpsamplerConfig(
            codebook_size=vocabulary.video_codebook_size,
            num_text_pieces=vocabulary.text_vocab_size,
            scale=self.pairs.scale,
            **dataclasses.asdict(recipe.model),
        )
        torch.manual_seed(recipe.seed)
        self.model = Upsampler(self.config).to(self.device)
        self.average = ExponentialMovingAverage(self.model, recipe.ema_decay)
        self.masks = MaskSampler(recipe.masks)
        matrices = [weight for weight in self.model.layers.parameters() if weight.ndim > 1]
        self.optimizers = Optimizers(
            self.model,
            matrices if recipe.optimizer == "muon" else [],
            learning_rate=recipe.learning_rate,
            muon_learning_rate=recipe.muon_learning_rate,
            beta2=recipe.beta2,
            weight_decay=recipe.weight_decay,
        )
        self._order = functools.lru_cache(maxsize=2)(self._permute)
        self.ahead = DrawnAhead(self._draw)

    def train_step(self, step: int) -> dict[str, float]:
        """One optimiser step; returns the loss, the share of hidden codes that were right, and the gradient's norm."""
        recipe = self.recipe
        share = cosine_schedule(step, recipe.warmup_steps, recipe.num_steps, recipe.learning_rate_floor)
        self.optimizers.set_learning_rate_share(share)
        self.model.zero_grad(set_to_none=True)
        example = self.ahead.take(step)
        losses, right = self._losses(self.model, example, backward=True)
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), recipe.gradient_clip)
        self.optimizers.step()
        self.average.update(self.model)
        return {
            "loss": float(losses.mean()),
            "accuracy": float(right.mean()),
            "gradient_norm": float(norm),
            "learning_rate": recipe.learning_rate * share,
            "epoch": step * recipe.batch_size / len(self.pairs),
        }

    @torch.no_grad()
    def validate(self, step: int) -> dict[str, float]:
        """Loss and accuracy of the averaged weights on the first validation clips, always hidden in the same way."""
        model = self.average.module
        assert isinstance(model, Upsampler)
        losses, right = [], []
        rows = range(min(self.recipe.validation_clips, len(self.validation)))
        for start in range(0, len(rows), self.recipe.batch_size):
            chosen = rows[start : start + self.recipe.batch_size]
            rng = np.random.default_rng([self.recipe.seed, 3, start])
            found = self._losses(model, self._example(self.validation, chosen, rng), backward=False)
            losses.append(found[0])
            right.append(found[1])
        return {"loss": float(torch.cat(losses).mean()), "accuracy": float(torch.cat(right).mean())}

    def state_dict(self) -> dict[str, Any]:
        """Weights, average and optimisers, and the vocabulary that they belong to."""
        return {
            "model": self.model.state_dict(),
            "average": self.average.state_dict(),
            "optimizers": self.optimizers.state_dict(),
            "fingerprint": self.bundle.fingerprint,
            "num_clips": len(self.pairs),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Inverse of `state_dict`.

        Raises:
            CheckpointError: the checkpoint belongs to another vocabulary.
            ConfigError: there are more or fewer clips than it was begun with.
        """
        if state["fingerprint"] != self.bundle.fingerprint:
            raise CheckpointError(
                f"the checkpoint was trained with the vocabulary {state['fingerprint'][:12]}, the bundle "
                f"{self.bundle.path} has {self.bundle.fingerprint[:12]}. Name the bundle it was begun with."
            )
        if state["num_clips"] != len(self.pairs):
            raise ConfigError(
                f"the run was begun with {state['num_clips']} clips, the shards hold {len(self.pairs)}. Restore them, "
                "or start anew in another directory."
            )
        self.model.load_state_dict(state["model"])
        self.average.load_state_dict(state["average"])
        self.optimizers.load_state_dict(state["optimizers"])

    def export(self, directory: Path) -> None:
        """Write the averaged weights as a bundle's upsampler/."""
        model = self.average.module
        assert isinstance(model, Upsampler)
        dtype = getattr(torch, self.recipe.export_dtype)
        checksum = str(self.bundle.vocabulary.tokenizers["video"]["checksum"])
        save_upsampler(model, directory, checksum, dtype)

    def _draw(self, step: int) -> _Example:
        """What `step` is made of."""
        size, count = self.recipe.batch_size, len(self.pairs)
        rows = []
        for position in range(step * size, (step + 1) * size):
            epoch, place = divmod(position, count)
            rows.append(int(self._order(epoch)[place]))
        return self._example(self.pairs, rows, np.random.default_rng([self.recipe.seed, 1, step]))

    def _permute(self, epoch: int) -> NDArray[np.int64]:
        return np.random.default_rng([self.recipe.seed, 0, epoch]).permutation(len(self.pairs))

    def _example(self, pairs: _Pairs, rows: Any, rng: np.random.Generator) -> _Example:
        low, high, texts = zip(*(pairs[row] for row in rows), strict=True)
        small, large = torch.from_numpy(np.stack(low)), torch.from_numpy(np.stack(high))
        hidden = torch.zeros(large.shape, dtype=torch.bool)
        places = np.arange(large[0].numel()).reshape(large.shape[1:])
        levels = np.zeros(len(rows))
        for row in range(len(rows)):
            hidden[row].view(-1)[torch.from_numpy(self.masks.draw(places, None, rng))] = True
            level, is_noisy, has_low, has_text = rng.random(4)
            if is_noisy < 0.5:
                levels[row] = level * self.recipe.noise
                wrong = torch.from_numpy(rng.random(small[row].shape) < levels[row])
                drawn = torch.from_numpy(rng.integers(0, self.config.codebook_size, small[row].shape))
                small[row] = torch.where(wrong, drawn, small[row])
            if has_low < self.recipe.low_dropout:
                small[row] = UNKNOWN
                levels[row] = 0
            if has_text < self.recipe.text_dropout:
                texts = (*texts[:row], (), *texts[row + 1 :])
        lengths = torch.tensor([len(text) for text in texts])
        width = int(lengths.max())
        text = torch.tensor([[*one, *[0] * (width - len(one))] for one in texts], dtype=torch.int64).view(
            len(rows), width
        )
        parts = (large, hidden, small, text, lengths, torch.from_numpy(levels).float())
        return _Example(*(part.to(self.device) for part in parts))

    def _losses(self, model: Upsampler, example: _Example, *, backward: bool) -> tuple[Tensor, Tensor]:
        """(N,) losses of the hidden codes, summed over factors, and (N,) whether each was guessed, as 0 or 1.

        With `backward` the gradient of the mean loss has been added to the weights'; logits exist for some places at a
        time only.
        """
        shown = torch.where(example.hidden, UNKNOWN, example.high)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.recipe.precision == "bf16"):
            states = model(shown, example.low, example.text, example.text_lengths, example.noise_level)
            asked = states[example.hidden]
            targets = split_factors(example.high[example.hidden], self.config)
            gradient, losses, right = torch.zeros_like(asked), [], []
            for start in range(0, len(asked), _CHUNK):
                piece = asked.detach()[start : start + _CHUNK].requires_grad_(backward)
                wanted = targets[start : start + _CHUNK]
                logits = model.logits(piece).float()
                loss = F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), reduction="none").view_as(wanted).sum(1)
                if backward:
                    (loss.sum() / len(asked)).backward()
                    assert piece.grad is not None
                    gradient[start : start + _CHUNK] = piece.grad.to(gradient.dtype)
                losses.append(loss.detach())
                right.append((logits.argmax(-1) == wanted).all(1).float())
        if backward:
            asked.backward(gradient)
        return torch.cat(losses), torch.cat(right)


class _Pairs:
    """The same clips in two sizes.

    Raises:
        CheckpointError: shards are missing, damaged or of another vocabulary.
        ConfigError: they do not hold the same clips, or not in sizes of which one is a multiple of the other.
    """

    def __init__(self, bundle: Bundle, low: Path, high: Path) -> None:
        self.text_tokenizer = bundle.text_tokenizer
        self.low: ShardReader = open_shards(low, bundle.fingerprint)
        self.high: ShardReader = open_shards(high, bundle.fingerprint)
        if len(self.low) != len(self.high) or not len(self.low):
            raise ConfigError(
                f"{low} and {high} must hold the same clips in two sizes, got {len(self.low)} and {len(self.high)}."
            )
        small, large = self.low[0].video_codes, self.high[0].video_codes
        if small is None or large is None:
            raise ConfigError(f"{low} and {high} must hold video codes, got clips without a picture.")
        self.shapes = small.shape, large.shape
        self.scale, rest = divmod(large.shape[1], small.shape[1])
        if rest or self.scale < 2 or large.shape != (small.shape[0], *(self.scale * size for size in small.shape[1:])):
            raise ConfigError(
                f"clips of {high} must be a whole multiple of those of {low} in height and width, got codes of "
                f"{large.shape} and {small.shape}."
            )

    def __len__(self) -> int:
        return len(self.low)

    def __getitem__(self, row: int) -> tuple[Any, Any, tuple[int, ...]]:
        """(T, h, w) and (T, H, W) codes, and the pieces of the caption, () without one."""
        small, large = self.low[row], self.high[row]
        if small.key != large.key:
            raise ConfigError(
                f"row {row} is clip {small.key} in one size and {large.key} in the other. Encode the same source twice."
            )
        if small.video_codes is None or large.video_codes is None:
            raise ConfigError(f"clip {small.key} has no picture. Leave sounds out of the shards.")
        shapes = small.video_codes.shape, large.video_codes.shape
        if shapes != self.shapes:
            raise ConfigError(
                f"all clips must be of one shape, got {shapes[0]} and {shapes[1]} codes of {small.key} after "
                f"{self.shapes[0]} and {self.shapes[1]}. Encode clips of one length and size."
            )
        return small.video_codes.astype(np.int64), large.video_codes.astype(np.int64), self._pieces(small)

    def _pieces(self, clip: EncodedClip) -> tuple[int, ...]:
        return () if clip.text is None else tuple(self.text_tokenizer.encode(clip.text))
