"""Trains the video tokenizer: a recipe, and one optimiser step as a pure function of the state and the step number.

Knows frames and codes, never ids. Which clips it sees is decided by a `FrameSource`: clip `i` of step `s` is number
`s * batch_size + i`, so a resumed run sees what an uninterrupted one would have seen.

Legend: B clips, N frames of H x W pixels, K bits.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from poet.errors import ConfigError
from poet.training.ahead import DrawnAhead
from poet.training.hard_clips import HardClips
from poet.training.loop import ExponentialMovingAverage, cosine_schedule
from poet.training.start import begin
from poet_tokenizers.magvit2.config import MagViT2Config
from poet_tokenizers.magvit2.discriminator import VideoDiscriminator
from poet_tokenizers.magvit2.losses import (
    LeCam,
    detail_weights,
    edge_weights,
    hinge_loss,
    psnr,
    reconstruction_loss,
)
from poet_tokenizers.magvit2.model import MagViT2
from poet_tokenizers.magvit2.quantizer import Quantized

__all__ = ["FrameSource", "VideoTokenizerRecipe", "VideoTokenizerTraining", "code_use"]


class FrameSource(Protocol):
    """Frames by number. `frames` is called from two threads."""

    def __len__(self) -> int: ...

    def frames(self, index: int) -> NDArray[np.uint8]:
        """(N, H, W, 3) uint8 of clip `index` in [0, len); always the same N, H and W."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class VideoTokenizerRecipe:
    """How to train the tokenizer. The YAML recipe has the same keys.

    Attributes:
        codec: the tokenizer's shape.
        source: where training clips come from: "toybox:train" or a folder of clips.
        source_clips: how many of them to use; they are gone through in turn.
        validation_source: where validation clips come from.
        validation_clips: how many.
        fps: frames a second that files are read at; drawn clips have their own rate and size.
        num_frames: of a clip, 1 + a multiple of the temporal stride.
        height: pixels.
        width: pixels.
        scales: multiples of height and width that steps take in turn, of which 1 is the first; a step of multiple k has
            one in k^2 of its hard clips and of the others.
        start_from: directory of a tokenizer whose weights to begin with; null starts from random weights.
        decoder_only: leave the encoder as `start_from` has it, so that codes keep their meaning.
        num_steps: optimiser steps in all.
        batch_size: B.
        hard_share: of a batch, how many clips are drawn in proportion to the loss that they had when last seen; the
            others are gone through in turn.
        learning_rate: highest; a linear warm-up, then a cosine down to `learning_rate_floor` of it.
        warmup_steps: steps of the linear rise.
        learning_rate_floor: share of `learning_rate` that is left at the end.
        weight_decay: of every weight.
        ema_decay: of the averaged weights, which are what is measured and exported.
        l1_share: share of absolute error in the reconstruction loss; the rest is squared error.
        detail_strength: extra weight of places that differ from a clip's median colour.
        edge_share: share of a clip's reconstruction loss that falls on edges alone.
        commitment_weight: of the distance between latents and codes.
        sample_entropy_weight: rewards sure codes.
        codebook_entropy_weight: rewards that all codes are used.
        entropy_boost: both entropy weights start at this multiple and fall to 1 over `entropy_boost_steps`.
        adversarial_weight: of the generator's share of the adversarial loss; 0 trains without a discriminator.
        adversarial_start: the step at which the discriminator joins.
        lecam_weight: of the discriminator's regulariser.
        discriminator_channels: its width.
        gradient_clip: largest norm of the gradient.
        precision: "bf16" (autocast) or "fp32".
        decoder_dtype: in which the finished tokenizer stores its decoder: "float32" or "float16".
        compile: whether to compile encoder and decoder.
        seed: of the weights.
    """

    codec: MagViT2Config = dataclasses.field(default_factory=MagViT2Config)
    source: str = "toybox:train"
    source_clips: int = 1_000_000
    validation_source: str = "toybox:seen"
    validation_clips: int = 64
    fps: float = 8.0
    num_frames: int = 17
    height: int = 64
    width: int = 64
    scales: tuple[int, ...] = (1,)
    start_from: Path | None = None
    decoder_only: bool = False
    num_steps: int = 10_000
    batch_size: int = 8
    hard_share: float = 0.0
    learning_rate: float = 1e-3
    warmup_steps: int = 100
    learning_rate_floor: float = 0.02
    weight_decay: float = 1e-4
    ema_decay: float = 0.999
    l1_share: float = 0.0
    detail_strength: float = 0.0
    edge_share: float = 0.0
    commitment_weight: float = 0.25
    sample_entropy_weight: float = 0.1
    codebook_entropy_weight: float = 0.1
    entropy_boost: float = 3.0
    entropy_boost_steps: int = 2_000
    adversarial_weight: float = 0.1
    adversarial_start: int = 0
    lecam_weight: float = 0.001
    discriminator_channels: int = 64
    gradient_clip: float = 1.0
    precision: Literal["bf16", "fp32"] = "bf16"
    decoder_dtype: Literal["float32", "float16"] = "float32"
    compile: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.source_clips, self.validation_clips, self.num_steps, self.batch_size) < 1:
            raise ConfigError("source_clips, validation_clips, num_steps and batch_size must be at least 1.")
        scales = tuple(self.scales)
        object.__setattr__(self, "scales", scales)
        if scales[:1] != (1,) or min(scales) < 1 or len(set(scales)) < len(scales):
            raise ConfigError(f"scales must be different whole numbers of which the first is 1, got {list(scales)}.")
        for name in ("hard_share", "l1_share", "edge_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name} must lie in [0, 1], got {getattr(self, name)!r}.")
        if round(self.hard_share * self.batch_size) == self.batch_size:
            raise ConfigError(f"hard_share must leave room for clips in turn, got {self.hard_share!r}.")
        if self.decoder_only and self.start_from is None:
            raise ConfigError(
                "decoder_only needs start_from: a decoder cannot learn the codes of an untrained encoder."
            )
        if self.learning_rate <= 0:
            raise ConfigError(f"learning_rate must be positive, got {self.learning_rate!r}.")


class VideoTokenizerTraining:
    """A `Trainable` for `poet.training.loop.fit`.

    Args:
        recipe: how to train.
        sources: clips to learn from, for each of the recipe's scales.
        validations: clips to measure on, of the same shapes.
        device: where to train.

    Raises:
        ConfigError: clips whose size or length is not one that the codec's strides divide.
    """

    def __init__(
        self,
        recipe: VideoTokenizerRecipe,
        sources: Sequence[FrameSource],
        validations: Sequence[FrameSource],
        *,
        device: str | torch.device = "cpu",
    ) -> None:
        self.recipe, self.device = recipe, torch.device(device)
        self.sources = dict(zip(recipe.scales, sources, strict=True))
        torch.manual_seed(recipe.seed)
        self.model = begin(MagViT2, recipe.codec, recipe.start_from).to(self.device).train()
        self.model.encoder.requires_grad_(not recipe.decoder_only)
        self.average = ExponentialMovingAverage(self.model, recipe.ema_decay)
        self.optimizer = _adam(self.model, recipe)
        self.discriminator: VideoDiscriminator | None = None
        if recipe.adversarial_weight > 0:
            self.discriminator = VideoDiscriminator(recipe.discriminator_channels).to(self.device)
            self.discriminator_optimizer = _adam(self.discriminator, recipe)
            self.lecam = LeCam()
        self.validation: dict[int, NDArray[np.uint8]] = {}
        for scale, validation in zip(recipe.scales, validations, strict=True):
            count = min(recipe.validation_clips, len(validation))
            self.validation[scale] = np.stack([validation.frames(index) for index in range(count)])
            self._check_frames(self.validation[scale][0], scale)
        if recipe.compile:
            self.model.encoder.compile()
            self.model.decoder.compile()
        num_clips = min(recipe.source_clips, *map(len, sources))
        self.hard_clips = HardClips(num_clips, recipe.batch_size, recipe.hard_share)
        self.ahead = DrawnAhead(lambda step: self._draw(self._in_turn(step), self._scale(step)))

    def train_step(self, step: int) -> dict[str, float]:
        """One optimiser step; returns losses, the batch's PSNR, entropies in nats a bit and the gradient's norm."""
        recipe = self.recipe
        indices, video = self._batch(step)
        rate = recipe.learning_rate * cosine_schedule(
            step, recipe.warmup_steps, recipe.num_steps, recipe.learning_rate_floor
        )
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        with self._autocast():
            output, quantized = self.model(video)
        output = output.float()
        weights = edge_weights(video, detail_weights(video, recipe.detail_strength), recipe.edge_share)
        losses = reconstruction_loss(output, video, weights, recipe.l1_share)
        if self._scale(step) == 1:  # of losses at different sizes one is not harder than the other
            self.hard_clips.remember(indices, losses)
        loss = losses.mean()
        metrics = {"reconstruction_loss": float(loss.detach()), "psnr": float(psnr(output.detach(), video).mean())}
        loss = loss + self._quantizer_loss(quantized, step)
        adversarial = self.discriminator is not None and step >= recipe.adversarial_start
        if adversarial:
            assert self.discriminator is not None
            with self._autocast():
                generator_loss = -self.discriminator(output).mean()
            loss = loss + recipe.adversarial_weight * generator_loss
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), recipe.gradient_clip)
        self.optimizer.step()
        self.average.update(self.model)
        if adversarial:
            metrics |= self._train_discriminator(video, output.detach(), rate)
        return metrics | {
            "loss": float(loss.detach()),
            "sample_entropy": float(quantized.sample_entropy.detach()),
            "codebook_entropy": float(quantized.codebook_entropy.detach()),
            "commitment": float(quantized.commitment.detach()),
            "gradient_norm": float(norm),
            "learning_rate": rate,
        }

    def validate(self, step: int) -> dict[str, float]:
        """PSNR and code use of the averaged weights on the validation clips.

        Returns:
            psnr: mean over clips, in dB; psnr_of_mean_error: of the squared error averaged over all clips;
            psnr_worst_tenth: which a tenth of the clips do not reach; and what `code_use` gives. Those of a scale k
            other than 1 end in _xk.
        """
        found: dict[str, float] = {}
        for scale, clips in self.validation.items():
            ending = "" if scale == 1 else f"_x{scale}"
            found |= {f"{name}{ending}": value for name, value in self._measure(clips, 16 // scale**2 or 1).items()}
        return found

    def _measure(self, clips: NDArray[np.uint8], batch_size: int) -> dict[str, float]:
        scores: list[Tensor] = []
        codes: list[Tensor] = []
        tokenizer = self.average.module
        assert isinstance(tokenizer, MagViT2)
        for start in range(0, len(clips), batch_size):
            video = to_video(clips[start : start + batch_size]).to(self.device)
            batch_codes = tokenizer.encode(video)
            output = tokenizer.decode(batch_codes, (video.shape[-2], video.shape[-1]))
            scores.append(psnr(output, video))
            codes.append(batch_codes.cpu())
        all_scores = torch.cat(scores)
        error = torch.pow(10, -all_scores / 10).mean()
        return {
            "psnr": float(all_scores.mean()),
            "psnr_of_mean_error": float(-10 * torch.log10(error)),
            "psnr_worst_tenth": float(torch.quantile(all_scores, 0.1)),
            **code_use(torch.cat(codes), self.recipe.codec.codebook_size),
        }

    def state_dict(self) -> dict[str, Any]:
        """Weights, averages and optimisers."""
        state: dict[str, Any] = {
            "model": self.model.state_dict(),
            "average": self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }
        if self.recipe.hard_share > 0:
            state["losses"] = self.hard_clips.losses
        if self.discriminator is not None:
            state["discriminator"] = self.discriminator.state_dict()
            state["discriminator_optimizer"] = self.discriminator_optimizer.state_dict()
            state["lecam"] = self.lecam.state_dict()
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Inverse of `state_dict`."""
        self.model.load_state_dict(state["model"])
        self.average.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.recipe.hard_share > 0:
            self.hard_clips.losses.copy_(state["losses"])
        if self.discriminator is not None:
            self.discriminator.load_state_dict(state["discriminator"])
            self.discriminator_optimizer.load_state_dict(state["discriminator_optimizer"])
            self.lecam.load_state_dict(state["lecam"])

    def export(self, directory: Path) -> None:
        """Write the tokenizer with the averaged weights."""
        assert isinstance(self.average.module, MagViT2)
        self.average.module.save(directory, getattr(torch, self.recipe.decoder_dtype))

    def _quantizer_loss(self, quantized: Quantized, step: int) -> Tensor:
        recipe = self.recipe
        left = max(0.0, 1 - step / recipe.entropy_boost_steps) if recipe.entropy_boost_steps else 0.0
        boost = 1 + (recipe.entropy_boost - 1) * left
        return (
            recipe.commitment_weight * quantized.commitment
            + boost * recipe.sample_entropy_weight * quantized.sample_entropy
            - boost * recipe.codebook_entropy_weight * quantized.codebook_entropy
        )

    def _train_discriminator(self, video: Tensor, output: Tensor, rate: float) -> dict[str, float]:
        assert self.discriminator is not None
        for group in self.discriminator_optimizer.param_groups:
            group["lr"] = rate
        with self._autocast():
            real, fake = self.discriminator(video), self.discriminator(output)
        hinge = hinge_loss(real, fake)
        loss = hinge + self.recipe.lecam_weight * self.lecam(real, fake)
        self.discriminator_optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.discriminator_optimizer.step()
        return {"discriminator_loss": float(hinge.detach())}

    def _batch(self, step: int) -> tuple[list[int], Tensor]:
        """Numbers and frames of the step's clips."""
        hard, scale = self._hard(step), self._scale(step)
        clips = self._draw(hard, scale) + self.ahead.take(step)
        return hard + self._in_turn(step), to_video(np.stack(clips)).to(self.device)

    def _scale(self, step: int) -> int:
        """The multiple of height and width that a step has: in turn, and every time round another for a clip."""
        scales = self.recipe.scales
        return scales[(step + self.hard_clips.round(step)) % len(scales)]

    def _in_turn(self, step: int) -> list[int]:
        return self._fewer(self.hard_clips.in_turn(step), step)

    def _hard(self, step: int) -> list[int]:
        return self._fewer(self.hard_clips.hard(step, np.random.default_rng([self.recipe.seed, step])), step)

    def _fewer(self, indices: list[int], step: int) -> list[int]:
        """As many of a step's clips as its size leaves room for, every time round others."""
        area = self._scale(step) ** 2
        first = self.hard_clips.round(step) // len(self.recipe.scales) % min(area, max(1, len(indices)))
        return indices[first::area]

    def _draw(self, indices: Sequence[int], scale: int) -> list[NDArray[np.uint8]]:
        clips = [self.sources[scale].frames(index) for index in indices]
        for clip in clips:
            self._check_frames(clip, scale)
        return clips

    def _check_frames(self, clip: NDArray[np.uint8], scale: int) -> None:
        """Training neither pads nor crops, so that every pixel of the loss is one of the clip."""
        codec, shape = self.recipe.codec, self.validation[scale].shape[1:]
        fits = clip.ndim == 4 and (clip.shape[0] - 1) % codec.temporal_stride == 0 and clip.shape == shape
        if not fits or clip.shape[1] % codec.spatial_stride or clip.shape[2] % codec.spatial_stride:
            raise ConfigError(
                f"clips to train on must all be (1 + k * {codec.temporal_stride}, height, width, 3) with height and "
                f"width divisible by {codec.spatial_stride}, like the first of the validation clips, {shape}; got "
                f"{clip.shape}. Bring them to one size and length first."
            )

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.recipe.precision == "bf16")


def to_video(frames: NDArray[np.uint8]) -> Tensor:
    """(B, N, H, W, 3) uint8 to (B, 3, N, H, W) float32 in [-1, 1]."""
    return torch.from_numpy(frames).permute(0, 4, 1, 2, 3).float() / 127.5 - 1


def code_use(codes: Tensor, codebook_size: int) -> dict[str, float]:
    """How many codes occur, and their perplexity: the size of an evenly used codebook of the same entropy.

    Args:
        codes: integers of any shape in [0, codebook_size).
        codebook_size: number of codes that there are.
    """
    share = torch.bincount(codes.flatten(), minlength=codebook_size).double()
    share = share / share.sum()
    used = share[share > 0]
    return {"codes_used": float(len(used)), "code_perplexity": float(torch.exp(-(used * used.log()).sum()))}


def _adam(module: nn.Module, recipe: VideoTokenizerRecipe) -> torch.optim.AdamW:
    return torch.optim.AdamW(
        [weight for weight in module.parameters() if weight.requires_grad],
        lr=recipe.learning_rate,
        betas=(0.9, 0.99),
        weight_decay=recipe.weight_decay,
        fused=True,
    )
