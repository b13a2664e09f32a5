"""The losses of the audio codec: what they are zero for, what they grow with, and how the balancer weighs them."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from poet_tokenizers import audio_losses
from poet_tokenizers.errors import ConfigError

RATE = 16_000


def _sine(frequency: float, amplitude: float = 1.0, length: int = 8_009) -> Tensor:
    time = torch.arange(length, dtype=torch.float64) / RATE
    return (amplitude * torch.sin(2 * math.pi * frequency * time)).float().reshape(1, 1, -1)


@pytest.mark.parametrize(("window", "bands"), [(2048, 64), (1024, 80), (128, 32), (64, 16)])
def test_every_mel_band_hears_something_and_bands_rise(window: int, bands: int) -> None:
    filters = audio_losses.mel_filter_bank(RATE, window, bands)
    assert filters.shape == (bands, window // 2 + 1)
    assert filters.min() >= 0
    assert filters.max() <= 1
    assert (filters.sum(dim=1) > 0).all()
    middles = (filters * torch.arange(window // 2 + 1)).sum(dim=1) / filters.sum(dim=1)
    assert (middles.diff() >= 0).all()


@pytest.mark.parametrize("amplitude", [1.0, 0.5])
def test_a_sine_shows_in_its_band_with_its_amplitude(amplitude: float) -> None:
    mel = audio_losses.mel_spectrogram(_sine(1_000.0, amplitude), RATE)
    middle = mel[0, :, mel.shape[2] // 2]
    filters = audio_losses.mel_filter_bank(RATE, 1024, 64)
    assert int(middle.argmax()) == int(filters[:, 64].argmax())  # bin 64 of 1,024 is 1,000 Hz
    # The window spreads a sine over three bins, half its height to either side, which its band sums up.
    assert float(middle.max()) == pytest.approx(amplitude, rel=0.7)
    assert float(middle.max()) > amplitude


def test_silence_has_a_finite_gradient_and_no_distance_from_what_is_nearly_silent() -> None:
    silence = torch.zeros(2, 1, 4_001, requires_grad=True)
    loss = audio_losses.multi_scale_mel_loss(silence, _sine(440.0, length=4_001).expand(2, -1, -1), RATE)
    loss.backward()
    assert silence.grad is not None
    assert silence.grad.isfinite().all()
    assert audio_losses.mel_distance(silence.detach(), torch.full((2, 1, 4_001), 1e-5), RATE).tolist() == [0.0, 0.0]


def test_mel_loss_is_least_for_the_sound_itself_and_grows_with_the_difference() -> None:
    target = _sine(440.0)
    losses = [float(audio_losses.multi_scale_mel_loss(_sine(f), target, RATE)) for f in (440.0, 466.0, 880.0)]
    assert losses[0] < 1e-3 < losses[1] < losses[2]


def test_ten_times_the_amplitude_is_a_mel_distance_of_its_logarithm() -> None:
    noise = torch.rand(2, 1, 9_001, generator=torch.Generator().manual_seed(0)) - 0.5
    distance = audio_losses.mel_distance(0.1 * noise, noise, RATE)
    assert distance.shape == (2,)
    assert distance.tolist() == pytest.approx([math.log(10)] * 2, rel=0.02)


def test_si_snr_ignores_loudness_and_measures_noise() -> None:
    target = torch.cat([_sine(440.0), _sine(311.0)])
    noise = torch.randn(target.shape, generator=torch.Generator().manual_seed(0))
    noise *= 0.1 * target.flatten(1).norm(dim=1)[:, None, None] / noise.flatten(1).norm(dim=1)[:, None, None]
    assert audio_losses.scale_invariant_snr(target + noise, target).tolist() == pytest.approx([20.0, 20.0], abs=0.2)
    louder = audio_losses.scale_invariant_snr(3 * (target + noise), target)
    torch.testing.assert_close(louder, audio_losses.scale_invariant_snr(target + noise, target))


def test_balancer_gives_each_loss_its_share_whatever_its_scale() -> None:
    output = torch.randn(3, 1, 101, generator=torch.Generator().manual_seed(0)).requires_grad_()
    left, right = torch.zeros_like(output), torch.zeros_like(output)
    left[..., :50], right[..., 50:] = 1.0, 1.0
    balancer = audio_losses.LossBalancer({"quiet": 1.0, "loud": 3.0, "absent": 9.0})
    gradient = balancer.gradient(
        {"quiet": 1e-5 * (output * left).square().sum(), "loud": 1e4 * (output * right).square().sum()}, output
    )
    assert float(gradient[..., :50].flatten(1).norm(dim=1).mean()) == pytest.approx(0.25, rel=1e-4)
    assert float(gradient[..., 50:].flatten(1).norm(dim=1).mean()) == pytest.approx(0.75, rel=1e-4)


def test_balancer_divides_by_the_moving_average_of_past_norms() -> None:
    output = torch.ones(1, 1, 4, requires_grad=True)
    balancer = audio_losses.LossBalancer({"loss": 1.0}, decay=0.5)
    balancer.gradient({"loss": output.sum()}, output)  # a gradient of norm 2
    gradient = balancer.gradient({"loss": 4 * output.sum()}, output)  # of norm 8; the average is (0.5 * 2 + 8) / 1.5
    assert float(gradient.norm()) == pytest.approx(8 / 6)
    again = audio_losses.LossBalancer({"loss": 1.0}, decay=0.5)
    again.load_state_dict(balancer.state_dict())
    torch.testing.assert_close(
        again.gradient({"loss": output.sum()}, output), balancer.gradient({"loss": output.sum()}, output)
    )


@pytest.mark.parametrize(("weights", "decay"), [({}, 0.5), ({"a": 0.0}, 0.5), ({"a": -1.0}, 0.5), ({"a": 1.0}, 1.0)])
def test_a_balancer_that_cannot_balance_is_refused(weights: dict[str, float], decay: float) -> None:
    with pytest.raises(ConfigError):
        audio_losses.LossBalancer(weights, decay)


def test_a_loss_without_a_weight_is_refused() -> None:
    output = torch.ones(1, 1, 4, requires_grad=True)
    with pytest.raises(ConfigError, match="unweighted"):
        audio_losses.LossBalancer({"a": 1.0}).gradient({"unweighted": output.sum()}, output)


def test_hinge_losses_stop_at_a_margin_of_one() -> None:
    real, fake = [torch.tensor([1.0, 7.0])], [torch.tensor([-1.0, -7.0])]
    assert float(audio_losses.discriminator_loss(real, fake)) == 0
    assert float(audio_losses.discriminator_loss(fake, real)) == pytest.approx(2 * (2 + 8) / 2)
    assert float(audio_losses.generator_loss(real)) == 0
    assert float(audio_losses.generator_loss(fake)) == pytest.approx((2 + 8) / 2)


def test_discriminator_features_tell_sounds_apart_and_carry_gradients_to_the_sound() -> None:
    torch.manual_seed(0)
    discriminator = audio_losses.build_discriminator(2, windows=(256, 128))
    target, output = _sine(440.0), _sine(660.0).requires_grad_()
    logits, real = discriminator(target)
    _, fake = discriminator(output)
    assert len(logits) == len(real) == 2
    assert float(audio_losses.feature_matching_loss(real, real).detach()) == 0
    audio_losses.feature_matching_loss(real, fake).backward()
    assert output.grad is not None
    assert output.grad.abs().max() > 0
