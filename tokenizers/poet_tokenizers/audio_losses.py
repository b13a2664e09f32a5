"""What trains the audio codec: spectral and adversarial losses, and the balancer that weighs them by their gradients.

Knows waveforms, never codes. Legend: B clips, S samples, F mel bands, T spectral frames.

Source: EnCodec, arXiv:2210.13438, sections 3.3 and 3.4.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence

import torch
from encodec.msstftd import MultiScaleSTFTDiscriminator
from torch import Tensor, nn
from torch.nn import functional as F

from poet_tokenizers.errors import ConfigError

__all__ = [
    "LossBalancer",
    "build_discriminator",
    "discriminator_loss",
    "feature_matching_loss",
    "generator_loss",
    "mel_distance",
    "mel_filter_bank",
    "mel_spectrogram",
    "multi_scale_mel_loss",
    "scale_invariant_snr",
]

_FLOOR = 1e-3  # of a mel magnitude (-60 dB of full scale); below it two sounds count as equally silent
# What is added to mel magnitudes before their logarithm is trained on. Less of it, and the steep logarithm of what is
# nearly silent has all of the gradient.
_SOFT_FLOOR = 2e-3


@functools.lru_cache(maxsize=64)
def mel_filter_bank(sample_rate: int, window: int, num_bands: int) -> Tensor:
    """Triangular filters, equally spaced in mel from 0 Hz to half the sample rate, each with a peak of 1.

    Args:
        sample_rate: samples a second.
        window: samples of the transform.
        num_bands: F.

    Returns:
        (F, window // 2 + 1) float32 in [0, 1]. A band narrower than a bin takes the bin nearest to its middle.

    Source: the mel scale of O'Shaughnessy, 2595 log10(1 + f / 700).
    """
    highest = 2595 * math.log10(1 + sample_rate / 2 / 700)
    edges = 700 * (10 ** (torch.linspace(0, highest, num_bands + 2, dtype=torch.float64) / 2595) - 1)
    bins = torch.linspace(0, sample_rate / 2, window // 2 + 1, dtype=torch.float64)
    low, middle, high = edges[:-2, None], edges[1:-1, None], edges[2:, None]
    filters = torch.minimum((bins - low) / (middle - low), (high - bins) / (high - middle)).clamp(min=0)
    empty = filters.sum(dim=1) == 0
    filters[empty, (middle[empty] - bins).abs().argmin(dim=1)] = 1.0
    return filters.float()


def mel_spectrogram(waveform: Tensor, sample_rate: int, window: int = 1024, num_bands: int = 64) -> Tensor:
    """Mel magnitudes with a Hann window and a hop of a quarter of it.

    Args:
        waveform: (B, 1, S) or (B, S) float32 in [-1, 1].
        sample_rate: samples a second.
        window: samples of the transform.
        num_bands: F.

    Returns:
        (B, F, T) float32; a full-scale sine has a value of 1 to 2 in its band.
    """
    hann = torch.hann_window(window, device=waveform.device)
    flat = waveform.reshape(-1, waveform.shape[-1])
    spectrum = torch.stft(flat, window, window // 4, window=hann, center=True, pad_mode="constant", return_complex=True)
    # The small offset keeps the gradient of the root finite where a sound is exactly silent.
    power = spectrum.real.square() + spectrum.imag.square()
    magnitude = (power + 1e-10).sqrt() * (4 / window)
    return mel_filter_bank(sample_rate, window, num_bands).to(waveform.device) @ magnitude


def multi_scale_mel_loss(
    estimate: Tensor,
    target: Tensor,
    sample_rate: int,
    windows: Sequence[int] = (128, 256, 512, 1024, 2048),
    num_bands: int = 64,
) -> Tensor:
    """Mean over the windows of the L1 distance of mel magnitudes plus the mean square distance of log-mels.

    Args:
        estimate: (B, 1, S) float32.
        target: (B, 1, S) float32 in [-1, 1].
        sample_rate: samples a second.
        windows: transform lengths in samples; short ones see onsets, long ones pitch.
        num_bands: bands of the longest windows; short windows have at most a quarter as many bands as samples.

    Returns:
        Scalar.

    Source: EnCodec, section 3.4, equation 2, with the L2 term on logarithms so that quiet parts count, and without its
    root, whose gradient would be as large for a frame that is nearly right as for one that is all wrong.
    """
    total = estimate.new_zeros(())
    for window in windows:
        bands = min(num_bands, window // 4)
        estimate_mel = mel_spectrogram(estimate, sample_rate, window, bands)
        with torch.no_grad():
            target_mel = mel_spectrogram(target, sample_rate, window, bands)
        linear = (estimate_mel - target_mel).abs().mean()
        ratio = (estimate_mel + _SOFT_FLOOR) / (target_mel + _SOFT_FLOOR)
        logarithmic = ratio.log().square().mean()
        total = total + linear + logarithmic
    return total / len(windows)


def mel_distance(estimate: Tensor, target: Tensor, sample_rate: int) -> Tensor:
    """Mean absolute difference of log-mels (80 bands, window 1,024) in nepers; one value a clip, (B,).

    A value of 0.1 is 0.87 dB. Silence is floored at -60 dB, so two silent sounds have a distance of 0.
    """
    logarithms = (mel_spectrogram(x, sample_rate, 1024, 80).clamp(min=_FLOOR).log() for x in (estimate, target))
    return torch.sub(*logarithms).abs().mean(dim=(1, 2))


def scale_invariant_snr(estimate: Tensor, target: Tensor) -> Tensor:
    """Ratio in dB of the part of the estimate that is a multiple of the target to the rest, one value a clip, (B,).

    Args:
        estimate: (B, 1, S) float32.
        target: (B, 1, S) float32, not silent.

    Source: Le Roux et al., "SDR - half-baked or well done?", arXiv:1811.02508.
    """
    estimate, target = (x.flatten(1) - x.flatten(1).mean(dim=1, keepdim=True) for x in (estimate, target))
    scale = (estimate * target).sum(dim=1, keepdim=True) / target.square().sum(dim=1, keepdim=True).clamp(min=1e-12)
    wanted = scale * target
    ratio = wanted.square().sum(dim=1) / (estimate - wanted).square().sum(dim=1).clamp(min=1e-12)
    return 10 * ratio.clamp(min=1e-12).log10()


def build_discriminator(num_filters: int, windows: Sequence[int] = (1024, 2048, 512)) -> nn.Module:
    """EnCodec's multi-scale STFT discriminator: (B, 1, S) to a list of logits and a list of lists of features."""
    return MultiScaleSTFTDiscriminator(
        filters=num_filters,
        n_ffts=list(windows),
        hop_lengths=[window // 4 for window in windows],
        win_lengths=list(windows),
    )


def discriminator_loss(real_logits: Sequence[Tensor], fake_logits: Sequence[Tensor]) -> Tensor:
    """Hinge loss that pushes real logits above 1 and fake ones below -1, mean over the scales."""
    losses = [
        F.relu(1 - real).mean() + F.relu(1 + fake).mean() for real, fake in zip(real_logits, fake_logits, strict=True)
    ]
    return torch.stack(losses).mean()


def generator_loss(fake_logits: Sequence[Tensor]) -> Tensor:
    """Hinge loss of the codec, which wants fake logits above 1; mean over the scales."""
    return torch.stack([F.relu(1 - fake).mean() for fake in fake_logits]).mean()


def feature_matching_loss(real: Sequence[Sequence[Tensor]], fake: Sequence[Sequence[Tensor]]) -> Tensor:
    """L1 distance of the discriminator's features over the size of the real ones, mean over scales and layers."""
    losses = [
        (a.detach() - b).abs().mean() / a.detach().abs().mean().clamp(min=1e-6)
        for real_scale, fake_scale in zip(real, fake, strict=True)
        for a, b in zip(real_scale, fake_scale, strict=True)
    ]
    return torch.stack(losses).mean()


class LossBalancer:
    """Gives every loss a fixed share of the gradient at the codec's output, whatever its natural scale.

    Each loss's gradient with respect to the output is divided by a moving average of its norm and multiplied by its
    weight's share. A weight is then the fraction of the gradient that comes from its loss.

    Args:
        weights: name to weight, each above zero; only their ratios count.
        decay: of the moving average of the norms.

    Raises:
        ConfigError: no weight, a weight that is not above zero, or a decay outside [0, 1).

    Source: EnCodec, section 3.4, equation 5, with a total norm of 1.
    """

    def __init__(self, weights: Mapping[str, float], decay: float = 0.99) -> None:
        if not weights or min(weights.values()) <= 0:
            raise ConfigError(f"every loss must have a weight above zero, got {dict(weights)}. Leave the loss out.")
        if not 0 <= decay < 1:
            raise ConfigError(f"decay must lie in [0, 1), got {decay}.")
        self.weights = dict(weights)
        self.decay = decay
        self._sums: dict[str, float] = {}
        self._counts: dict[str, float] = {}

    def gradient(self, losses: Mapping[str, Tensor], output: Tensor) -> Tensor:
        """The balanced gradient with respect to `output`, to be passed to `output.backward`.

        Args:
            losses: name to scalar; each name has a weight. Weights of absent losses do not count.
            output: (B, 1, S) that the losses were computed from.

        Returns:
            (B, 1, S), of a norm of about 1 a clip.

        Raises:
            ConfigError: a loss has no weight.
        """
        unknown = losses.keys() - self.weights.keys()
        if unknown:
            raise ConfigError(f"losses {sorted(unknown)} have no weight; weights are set for {sorted(self.weights)}.")
        total = sum(self.weights[name] for name in losses)
        balanced = torch.zeros_like(output)
        for name, loss in losses.items():
            (gradient,) = torch.autograd.grad(loss, output, retain_graph=True)
            norm = float(gradient.flatten(1).norm(dim=1).mean())
            self._sums[name] = self.decay * self._sums.get(name, 0.0) + norm
            self._counts[name] = self.decay * self._counts.get(name, 0.0) + 1.0
            average = self._sums[name] / self._counts[name]
            balanced += gradient * (self.weights[name] / total / max(average, 1e-12))
        return balanced

    def state_dict(self) -> dict[str, dict[str, float]]:
        """The moving averages."""
        return {"sums": dict(self._sums), "counts": dict(self._counts)}

    def load_state_dict(self, state: Mapping[str, Mapping[str, float]]) -> None:
        """The inverse of `state_dict`."""
        self._sums, self._counts = dict(state["sums"]), dict(state["counts"])
