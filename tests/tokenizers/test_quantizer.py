"""Lookup-free quantisation: its cheap entropies against sums over the whole codebook, and where its gradients go."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from poet_tokenizers.errors import ShapeError
from poet_tokenizers.magvit2.quantizer import LookupFreeQuantizer, Quantized

B, K, T, H, W = 2, 6, 3, 5, 7
SHAPE = (B, K, T, H, W)


def _latent(scale: float = 1.0, seed: int = 0) -> Tensor:
    """Unquantised values whose places are not equally sure; (B, K, T, H, W)."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(SHAPE, generator=generator) * scale
    return x + torch.randn(1, K, 1, 1, 1, generator=generator)


def _soft_codes(x: Tensor, quantizer: LookupFreeQuantizer) -> Tensor:
    """Softmax over minus the squared distance to every code of the codebook: (places, 2 ** K), in float64."""
    x = x.double()
    x = x / (x.square().mean(dim=1, keepdim=True) + 1e-6).sqrt()
    places = x.movedim(1, -1).reshape(-1, K)
    codebook = quantizer.decode(torch.arange(2**K).reshape(1, 1, 1, -1))[0, :, 0, 0].T.double()
    distances = (places[:, None] - codebook).square().sum(dim=2)
    return F.softmax(-distances / quantizer.temperature, dim=1)


def _entropy(probability: Tensor) -> Tensor:
    return -(probability * probability.clamp_min(1e-30).log()).sum(dim=-1)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("group_bits", [1, 2, 6])
def test_sample_entropy_is_that_over_the_whole_codebook(group_bits: int, temperature: float) -> None:
    quantizer, x = LookupFreeQuantizer(K, group_bits, temperature), _latent()
    expected = _entropy(_soft_codes(x, quantizer)).mean() / K
    assert float(expected) > 0.01
    assert float(quantizer(x).sample_entropy) == pytest.approx(float(expected), rel=1e-4)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_codebook_entropy_is_that_over_the_whole_codebook_when_one_group_holds_all_bits(temperature: float) -> None:
    quantizer, x = LookupFreeQuantizer(K, K, temperature), _latent()
    expected = _entropy(_soft_codes(x, quantizer).mean(dim=0)) / K
    assert float(quantizer(x).codebook_entropy) == pytest.approx(float(expected), rel=1e-4)


def test_codebook_entropy_of_groups_is_that_of_their_marginal_codes() -> None:
    quantizer, x = LookupFreeQuantizer(K, 2), _latent()
    mean = _soft_codes(x, quantizer).mean(dim=0).reshape(4, 4, 4)  # bits 5 and 4, 3 and 2, 1 and 0
    marginals = [mean.sum(dim=(1, 2)), mean.sum(dim=(0, 2)), mean.sum(dim=(0, 1))]
    expected = sum(float(_entropy(marginal)) for marginal in marginals) / K
    assert float(quantizer(x).codebook_entropy) == pytest.approx(expected, rel=1e-4)


def test_gradient_of_the_entropies_is_that_over_the_whole_codebook() -> None:
    quantizer = LookupFreeQuantizer(K, K)
    x = _latent().requires_grad_()
    quantized: Quantized = quantizer(x)
    (cheap,) = torch.autograd.grad(quantized.sample_entropy - quantized.codebook_entropy, x)
    soft = _soft_codes(x, quantizer)
    (whole,) = torch.autograd.grad((_entropy(soft).mean() - _entropy(soft.mean(dim=0))) / K, x)
    torch.testing.assert_close(cheap, whole, rtol=1e-3, atol=1e-6)
    assert float(whole.abs().max()) > 1e-4


def test_gradient_passes_straight_through_the_signs() -> None:
    quantizer, target = LookupFreeQuantizer(K, 3), torch.randn(SHAPE)
    x = _latent()
    x = (x / x.square().mean(dim=1, keepdim=True).sqrt()).requires_grad_()
    quantized: Quantized = quantizer(x)
    assert torch.equal(quantized.latent, torch.where(x > 0, 1.0, -1.0))
    (given,) = torch.autograd.grad((quantized.latent * target).sum(), x)
    # As if the signs were the normalised values themselves.
    normalised = x * torch.rsqrt(x.square().mean(dim=1, keepdim=True) + 1e-6)
    (expected,) = torch.autograd.grad((normalised * target).sum(), x)
    torch.testing.assert_close(given, expected)
    assert float(given.abs().max()) > 0.1


def test_codes_of_training_and_of_encoding_are_the_same() -> None:
    quantizer, x = LookupFreeQuantizer(K, 3), _latent()
    codes = quantizer(x).codes
    assert tuple(codes.shape) == (B, T, H, W)
    assert codes.dtype == torch.int64
    assert torch.equal(codes, quantizer.encode(x))
    assert torch.equal(quantizer.decode(codes), quantizer(x).latent)


def test_sample_entropy_falls_as_latents_become_sure() -> None:
    quantizer = LookupFreeQuantizer(K, 3)
    sure = torch.where(_latent() > 0, 1.0, -1.0)
    unsure = sure * torch.tensor([1.0, 0.1]).repeat(K // 2).view(1, K, 1, 1, 1)  # half of the bits near the border
    entropies = [float(quantizer(x).sample_entropy) for x in (sure, sure * 0.5 + unsure * 0.5, unsure)]
    assert entropies == sorted(entropies)
    assert entropies[0] < 0.1 < entropies[2]


def test_codebook_entropy_is_greatest_when_all_codes_are_used_alike() -> None:
    quantizer = LookupFreeQuantizer(K, K, temperature=0.05)
    codes = torch.arange(2**K).reshape(1, 1, 8, 8)
    uniform = float(quantizer(quantizer.decode(codes)).codebook_entropy)
    assert uniform == pytest.approx(math.log(2), rel=1e-3)
    half = float(quantizer(quantizer.decode(codes % 32)).codebook_entropy)
    assert half == pytest.approx(math.log(2) * 5 / 6, rel=1e-3)
    assert float(quantizer(quantizer.decode(codes * 0)).codebook_entropy) == pytest.approx(0, abs=1e-3)


def test_commitment_is_zero_at_the_codes_and_grows_with_the_distance() -> None:
    quantizer = LookupFreeQuantizer(K, 3)
    latent = quantizer.decode(torch.randint(2**K, (B, T, H, W)))
    assert float(quantizer(latent * 7).commitment) == pytest.approx(0, abs=1e-6)  # the length does not count
    assert float(quantizer(_latent()).commitment) > 0.1


def test_half_precision_does_not_touch_the_entropies() -> None:
    quantizer, x = LookupFreeQuantizer(K, 3), _latent(scale=9.0).bfloat16()
    expected = quantizer(x.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        quantized: Quantized = quantizer(x)
    for name in ("sample_entropy", "codebook_entropy", "commitment", "latent"):
        value = getattr(quantized, name)
        assert value.dtype == torch.float32
        assert torch.equal(value, getattr(expected, name))


def test_a_latent_of_zeros_gives_finite_losses_and_gradients() -> None:
    x = torch.zeros(SHAPE, requires_grad=True)
    quantized: Quantized = LookupFreeQuantizer(K, 3)(x)
    loss = quantized.sample_entropy + quantized.codebook_entropy + quantized.commitment
    loss.backward()
    assert math.isfinite(float(loss.detach()))
    assert x.grad is not None
    assert bool(x.grad.isfinite().all())


@pytest.mark.parametrize("code", [-1, 2**K])
def test_a_code_outside_the_codebook_is_refused(code: int) -> None:
    with pytest.raises(ShapeError, match=r"must lie in \[0, 64\)"):
        LookupFreeQuantizer(K, 3).decode(torch.full((1, 1, 1, 1), code))
