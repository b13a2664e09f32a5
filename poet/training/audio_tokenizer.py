"""Trains the audio codec: a recipe, and one optimiser step as a pure function of the state and the step number.

The codec first learns to pass sound through without quantisation; then k-means places the codebooks on its latents, and
it learns with a drawn number of levels, so that levels can be cut afterwards. Knows sounds and codes, never ids; where
the sounds come from is the caller's business.

Legend: B clips, S samples, K codebooks, T latent frames.

Source: EnCodec, arXiv:2210.13438, sections 3.2 to 3.4. The unquantised start and the revival of dead codes are ours.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from poet.errors import ConfigError, ShapeError
from poet.training.hard_clips import HardClips
from poet.training.loop import ExponentialMovingAverage, cosine_schedule
from poet.training.start import begin
from poet_tokenizers import audio_losses
from poet_tokenizers.audio import EncodecConfig, EncodecTokenizer

__all__ = ["AudioTokenizerRecipe", "AudioTokenizerTraining", "SoundSource", "measure_reconstruction"]

SoundSource = Callable[[str, int], NDArray[np.float32]]
"""(name of a source, index) to the (S,) float32 sound of that clip; a pure function, so that nothing need be stored."""

_SILENT = 1e-4  # full scale; a clip whose samples all stay below it counts as silent


@dataclasses.dataclass(frozen=True, kw_only=True)
class AudioTokenizerRecipe:
    """How to train the codec. The YAML recipe has the same keys.

    Attributes:
        codec: the codec's shape.
        source: name of the sounds to learn from, for whoever hands in the `SoundSource`.
        validation_source: name of the sounds to measure on.
        source_clips: distinct clips to learn from, drawn once, kept in memory and gone through in turn.
        start_from: directory of a tokenizer, codebooks included, to begin with; null starts from random weights.
        decoder_only: leave encoder and codebooks as `start_from` has them, so that codes keep their meaning. The codec
            may then have a decoder of another shape, which starts from random weights.
        num_steps: optimiser steps in all.
        batch_size: B, clips a step.
        num_samples: S, samples of each clip that a step sees; a stretch, on a hop's border, of longer clips.
        hard_share: of a batch, how many clips are drawn in proportion to the error that they had when last seen; the
            others are gone through in turn.
        hard_measure: what error that is: "waveform" (its power relative to the sound's) or "mel" (mean difference of
            log-mels), which a partial of the right loudness and the wrong phase does not raise.
        start_share: of the stretches, how many are the start of their clip; the others lie anywhere in it.
        learning_rate: highest; reached after `warmup_steps`, then a cosine down to `learning_rate_floor` of it.
        warmup_steps: steps of the linear rise.
        learning_rate_floor: share of `learning_rate` that is left at the end.
        ema_decay: of the moving average of the weights, which is what is measured and exported.
        quantizer_start: the step at which the codebooks are placed and quantisation begins.
        quantizer_start_clips: clips that k-means sees.
        level_shares: for every level, in how many of ten or any other unit steps quantisation ends with that level.
        dead_code_threshold: share of its level's mean use below which a code is moved; 0 never.
        revival_end: share of `num_steps` after which codes are left where they are.
        time_weight: share of the gradient that the mean square distance of samples has.
        mel_weight: share of the multi-scale mel loss.
        mel_windows: its transform lengths in samples.
        mel_bands: its bands; with many, a tone differs from noise at high frequencies too.
        adversarial_weight: share of the discriminator's hinge loss; 0 trains without a discriminator.
        feature_weight: share of the discriminator's feature matching.
        adversarial_start: the step at which the discriminator joins.
        discriminator_filters: its width.
        commitment_weight: of the distance between latents and codes.
        exported_levels: levels that the finished tokenizer keeps; 0 for all.
        precision: "fp32" or "bf16" (autocast of the codec's layers; losses stay in fp32).
        decoder_dtype: in which the finished tokenizer stores its decoder: "float32" or "float16".
        validation_clips: whole clips to measure on.
        seed: of everything drawn.
    """

    codec: EncodecConfig = dataclasses.field(default_factory=EncodecConfig)
    source: str
    validation_source: str
    source_clips: int = 4_096
    start_from: Path | None = None
    decoder_only: bool = False
    num_steps: int = 4_000
    batch_size: int = 8
    num_samples: int = 34_000
    hard_share: float = 0.0
    hard_measure: str = "waveform"
    start_share: float = 0.25
    learning_rate: float = 1e-3
    warmup_steps: int = 100
    learning_rate_floor: float = 0.02
    ema_decay: float = 0.99
    quantizer_start: int = 500
    quantizer_start_clips: int = 256
    level_shares: tuple[float, ...] = (1.0, 4.0, 2.0, 3.0)
    dead_code_threshold: float = 0.05
    revival_end: float = 0.7
    time_weight: float = 1.0
    mel_weight: float = 1.0
    mel_windows: tuple[int, ...] = (128, 512, 2048)
    mel_bands: int = 64
    adversarial_weight: float = 0.0
    feature_weight: float = 1.0
    adversarial_start: int = 0
    discriminator_filters: int = 8
    commitment_weight: float = 1.0
    exported_levels: int = 0
    precision: str = "fp32"
    decoder_dtype: Literal["float32", "float16"] = "float32"
    validation_clips: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "mel_windows", tuple(self.mel_windows))
        object.__setattr__(self, "level_shares", tuple(float(share) for share in self.level_shares))
        for name in ("source_clips", "num_steps", "batch_size", "num_samples", "validation_clips"):
            self._require(name, getattr(self, name) >= 1, "be at least 1")
        for name in ("warmup_steps", "quantizer_start", "adversarial_start", "dead_code_threshold"):
            self._require(name, getattr(self, name) >= 0, "not be negative")
        for name in ("commitment_weight", "adversarial_weight"):
            self._require(name, getattr(self, name) >= 0, "not be negative")
        for name in (
            "learning_rate",
            "time_weight",
            "mel_weight",
            "feature_weight",
            "mel_bands",
            "discriminator_filters",
        ):
            self._require(name, getattr(self, name) > 0, "be above zero")
        for name in ("hard_share", "start_share", "revival_end", "learning_rate_floor"):
            self._require(name, 0 <= getattr(self, name) <= 1, "lie in [0, 1]")
        hard = round(self.hard_share * self.batch_size)
        self._require("hard_share", hard < self.batch_size, "leave room for clips in turn")
        hop, levels = self.codec.hop_length, self.codec.num_codebooks
        self._require("ema_decay", 0 <= self.ema_decay < 1, "lie in [0, 1)")
        self._require("num_samples", self.num_samples % hop == 0, f"be a multiple of the hop {hop}")
        self._require("quantizer_start_clips", self.quantizer_start_clips >= 1, "be at least 1")
        self._require("mel_windows", min(self.mel_windows, default=0) >= 16, "hold windows of at least 16 samples")
        shares = self.level_shares
        fits = len(shares) == levels and min(shares) >= 0 and sum(shares) > 0
        self._require("level_shares", fits, f"hold {levels} shares, one a level and not all zero")
        self._require("exported_levels", 0 <= self.exported_levels <= levels, f"lie in 0..{levels}")
        self._require("decoder_only", not self.decoder_only or self.start_from is not None, "come with start_from")
        self._require("hard_measure", self.hard_measure in ("waveform", "mel"), 'be "waveform" or "mel"')
        self._require("precision", self.precision in ("fp32", "bf16"), 'be "fp32" or "bf16"')

    def _require(self, name: str, fits: bool, demand: str) -> None:
        if not fits:
            raise ConfigError(f"{name} must {demand}, got {getattr(self, name)!r}.")


class AudioTokenizerTraining:
    """A `Trainable` for `poet.training.loop.fit`.

    The clips of a step that come in turn are counted round `source_clips`; the hard ones follow from errors that are
    part of the state; and every random draw of a step comes from a generator seeded with (seed, step). So an
    interrupted run goes on exactly as it would have.

    Args:
        recipe: how to train.
        sounds: where the sounds come from.
        device: where to train.
    """

    def __init__(self, recipe: AudioTokenizerRecipe, sounds: SoundSource, device: str | torch.device = "cpu") -> None:
        self.recipe = recipe
        self.sounds = sounds
        self.device = torch.device(device)
        self.hard_clips = HardClips(recipe.source_clips, recipe.batch_size, recipe.hard_share)
        self._drawn: dict[int, NDArray[np.float32]] = {}
        weights = {"time": recipe.time_weight, "mel": recipe.mel_weight}
        with self._draws(-1):
            self.model = _begin(recipe).to(self.device).train()
            self.discriminator: nn.Module | None = None
            if recipe.adversarial_weight > 0:
                weights |= {"adversarial": recipe.adversarial_weight, "features": recipe.feature_weight}
                self.discriminator = audio_losses.build_discriminator(recipe.discriminator_filters).to(self.device)
        self.model.encoder.requires_grad_(not recipe.decoder_only)
        self.average = ExponentialMovingAverage(self.model, recipe.ema_decay)
        self.balancer = audio_losses.LossBalancer(weights)
        self.optimizer = torch.optim.Adam(
            [weight for weight in self.model.parameters() if weight.requires_grad],
            lr=recipe.learning_rate,
            betas=(0.8, 0.99),
        )
        self.discriminator_optimizer = (
            torch.optim.Adam(self.discriminator.parameters(), lr=recipe.learning_rate, betas=(0.5, 0.9))
            if self.discriminator is not None
            else None
        )

    def train_step(self, step: int) -> dict[str, float]:
        """One optimiser step; returns the losses, the number of levels used and the codes moved."""
        with self._draws(step) as rng:
            return self._train_step(step, rng)

    def _train_step(self, step: int, rng: np.random.Generator) -> dict[str, float]:
        recipe = self.recipe
        self.model.train()
        self.model.quantizer.train(not recipe.decoder_only)  # in training its codebooks follow the latents
        indices = self._choose(step, rng)
        target = self._training_batch(indices, rng)
        if step == recipe.quantizer_start and recipe.start_from is None:
            self.model.initialise_codebooks(self._training_batch(range(recipe.quantizer_start_clips), rng))
        shares = np.array(recipe.level_shares) / sum(recipe.level_shares)
        levels = int(rng.choice(len(shares), p=shares)) + 1 if step >= recipe.quantizer_start else 0
        moved = 0
        reviving = recipe.quantizer_start < step < recipe.revival_end * recipe.num_steps
        if reviving and not recipe.decoder_only and recipe.dead_code_threshold > 0 and step % 10 == 0:
            moved = self.model.revive_codebooks(target, recipe.dead_code_threshold)

        with torch.autocast(self.device.type, torch.bfloat16, enabled=recipe.precision == "bf16"):
            reconstruction = self.model(target, levels)
        output = reconstruction.waveform.float()
        losses = {
            # The square, not EnCodec's L1: its gradient leaves the clips that are right already and goes to the others.
            "time": (output - target).square().mean(),
            "mel": audio_losses.multi_scale_mel_loss(
                output, target, recipe.codec.sample_rate, recipe.mel_windows, recipe.mel_bands
            ),
        }
        self._remember_errors(indices, output, target)
        metrics = {"levels": float(levels), "codes_moved": float(moved)}
        if self.discriminator is not None and step >= recipe.adversarial_start:
            metrics |= self._adversarial(target, output, losses, rng)
        multiplier = cosine_schedule(step, recipe.warmup_steps, recipe.num_steps, recipe.learning_rate_floor)
        for group in self.optimizer.param_groups:
            group["lr"] = recipe.learning_rate * multiplier
        self.optimizer.zero_grad(set_to_none=True)
        gradient = self.balancer.gradient(losses, output)
        commitment = recipe.commitment_weight * reconstruction.commitment
        if commitment.requires_grad:
            torch.autograd.backward([output, commitment], [gradient, torch.ones_like(commitment)])
        else:
            output.backward(gradient)
        self.optimizer.step()
        self.average.update(self.model)
        metrics |= {f"{name}_loss": float(loss.detach()) for name, loss in losses.items()}
        return metrics | {"commitment_loss": float(commitment.detach()), "learning_rate": group["lr"]}

    def validate(self, step: int) -> dict[str, float]:
        """Measure the averaged weights on whole clips of the validation source, with every number of levels."""
        codec, recipe = self.average.module, self.recipe
        assert isinstance(codec, EncodecTokenizer)
        sounds = [self.sounds(recipe.validation_source, index) for index in range(recipe.validation_clips)]
        target = self._stack(sounds, max(len(sound) for sound in sounds), np.random.default_rng(0))
        if step <= recipe.quantizer_start:
            with torch.no_grad():
                output = torch.cat([codec(part, 0).waveform for part in target.split(16)])
            distance = audio_losses.mel_distance(output, target, recipe.codec.sample_rate)
            return {"unquantised_mel_distance": float(distance.mean())}
        metrics: dict[str, float] = {}
        for levels in range(1, recipe.codec.num_codebooks + 1):
            measured = measure_reconstruction(codec.with_num_codebooks(levels), target)
            metrics |= {f"{name}_{levels}": value for name, value in measured.items()}
        return metrics

    def state_dict(self) -> dict[str, Any]:
        """Everything that a later step depends on."""
        state: dict[str, Any] = {
            "model": self.model.state_dict(),
            "average": self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "balancer": self.balancer.state_dict(),
        }
        if self.recipe.hard_share > 0:
            state["errors"] = self.hard_clips.losses
        if self.discriminator is not None and self.discriminator_optimizer is not None:
            state["discriminator"] = self.discriminator.state_dict()
            state["discriminator_optimizer"] = self.discriminator_optimizer.state_dict()
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state_dict`."""
        self.model.load_state_dict(state["model"])
        self.average.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.balancer.load_state_dict(state["balancer"])
        if self.recipe.hard_share > 0:
            self.hard_clips.losses.copy_(state["errors"])
        if self.discriminator is not None and self.discriminator_optimizer is not None:
            self.discriminator.load_state_dict(state["discriminator"])
            self.discriminator_optimizer.load_state_dict(state["discriminator_optimizer"])

    def export(self, directory: Path) -> None:
        """Write the codec with averaged weights and the levels that the recipe keeps."""
        codec = self.average.module
        assert isinstance(codec, EncodecTokenizer)
        kept = codec.with_num_codebooks(self.recipe.exported_levels or self.recipe.codec.num_codebooks)
        kept.save(directory, getattr(torch, self.recipe.decoder_dtype))

    def _adversarial(
        self, target: Tensor, output: Tensor, losses: dict[str, Tensor], rng: np.random.Generator
    ) -> dict[str, float]:
        """Train the discriminator in two of three steps, as EnCodec does, and add its two losses to `losses`."""
        assert self.discriminator is not None and self.discriminator_optimizer is not None
        metrics = {}
        if rng.random() < 2 / 3:
            real, _ = self.discriminator(target)
            fake, _ = self.discriminator(output.detach())
            loss = audio_losses.discriminator_loss(real, fake)
            self.discriminator_optimizer.zero_grad(set_to_none=True)
            loss.backward()
            self.discriminator_optimizer.step()
            metrics["discriminator_loss"] = float(loss.detach())
        with torch.no_grad():
            _, real_features = self.discriminator(target)
        self.discriminator.requires_grad_(False)
        fake, fake_features = self.discriminator(output)
        self.discriminator.requires_grad_(True)
        losses["adversarial"] = audio_losses.generator_loss(fake)
        losses["features"] = audio_losses.feature_matching_loss(real_features, fake_features)
        return metrics

    def _choose(self, step: int, rng: np.random.Generator) -> list[int]:
        """The numbers of a step's clips."""
        return self.hard_clips.in_turn(step) + self.hard_clips.hard(step, rng)

    @torch.no_grad()
    def _remember_errors(self, indices: Sequence[int], output: Tensor, target: Tensor) -> None:
        """Keep the error that `hard_measure` names of each clip, at most 1."""
        if self.recipe.hard_measure == "mel":
            errors = audio_losses.mel_distance(output, target, self.recipe.codec.sample_rate)
        else:
            power = target.square().mean(dim=(1, 2)) + _SILENT**2
            errors = (output - target).square().mean(dim=(1, 2)) / power
        self.hard_clips.remember(indices, errors.clamp(1e-6, 1.0))

    def _training_batch(self, indices: Sequence[int], rng: np.random.Generator) -> Tensor:
        """Clips `indices` of the source, counted round `source_clips`, as (B, 1, S) float32; each is drawn once."""
        for index in sorted({index % self.recipe.source_clips for index in indices} - self._drawn.keys()):
            self._drawn[index] = self.sounds(self.recipe.source, index)
        sounds = [self._drawn[index % self.recipe.source_clips] for index in indices]
        return self._stack(sounds, self.recipe.num_samples, rng)

    def _stack(self, sounds: Sequence[NDArray[np.float32]], length: int, rng: np.random.Generator) -> Tensor:
        """A stretch of `length` samples, rounded up to hops, of each sound, padded with zeros: (B, 1, S) float32."""
        hop = self.recipe.codec.hop_length
        length += -length % hop
        stretches = []
        for sound in sounds:
            if sound.ndim != 1 or not len(sound):
                raise ShapeError(f"a sound must be (S,) with at least one sample, got {sound.shape}. Mix it to mono.")
            sound = np.pad(sound, (0, max(0, length - len(sound))))
            offset = (
                hop * int(rng.integers((len(sound) - length) // hop + 1)) * (rng.random() >= self.recipe.start_share)
            )
            stretches.append(sound[offset : offset + length])
        return torch.from_numpy(np.stack(stretches).astype(np.float32))[:, None].to(self.device)

    @contextmanager
    def _draws(self, step: int) -> Iterator[np.random.Generator]:
        """Seed every random source of one step (of the start: -1), and leave the global one as it was."""
        sequence = np.random.SeedSequence([self.recipe.seed, step + 1])
        with torch.random.fork_rng():
            torch.manual_seed(int(sequence.generate_state(1, np.uint64)[0] >> 1))
            yield np.random.default_rng(sequence)


def _begin(recipe: AudioTokenizerRecipe) -> EncodecTokenizer:
    """The codec that training starts with; `begin` tells of its errors."""
    if recipe.decoder_only and recipe.start_from is not None:
        codec = EncodecTokenizer.load(recipe.start_from)
        if codec.config != recipe.codec and codec.config.has_codes_of(recipe.codec):
            return codec.with_new_decoder(recipe.codec)
    return begin(EncodecTokenizer, recipe.codec, recipe.start_from)


def measure_reconstruction(codec: EncodecTokenizer, target: Tensor) -> dict[str, float]:
    """Send sounds through a codec and measure what comes back.

    Args:
        codec: in evaluation mode.
        target: (B, 1, S) float32 in [-1, 1].

    Returns:
        mel_distance (nepers, mean over clips); si_snr (dB, mean over clips with sound); silence_peak (dBFS, the highest
        sample of any silent clip; absent without one); codes_used (mean over levels, of `codebook_size`) and
        perplexity (two to the power of the mean level's entropy in bits).
    """
    codes = torch.cat([codec.encode(part) for part in target.split(16)])
    output = torch.cat([codec.decode(part) for part in codes.split(16)])[..., : target.shape[-1]]
    silent = target.abs().amax(dim=(1, 2)) < _SILENT
    metrics = {"mel_distance": float(audio_losses.mel_distance(output, target, codec.config.sample_rate).mean())}
    if not silent.all():
        metrics["si_snr"] = float(audio_losses.scale_invariant_snr(output[~silent], target[~silent]).mean())
    if silent.any():
        metrics["silence_peak"] = 20 * math.log10(max(float(output[silent].abs().max()), 1e-9))
    used, bits = 0.0, 0.0
    for level in codes.unbind(dim=1):
        shares = torch.bincount(level.reshape(-1), minlength=codec.config.codebook_size) / level.numel()
        used += float((shares > 0).sum()) / codes.shape[1]
        bits += float(-(shares * shares.clamp(min=1e-12).log2()).sum()) / codes.shape[1]
    return metrics | {"codes_used": used, "perplexity": 2**bits}
