"""Losses of the video tokenizer by known values, and a discriminator that can tell clips apart."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from poet_tokenizers.errors import ConfigError, ShapeError
from poet_tokenizers.magvit2.discriminator import VideoDiscriminator
from poet_tokenizers.magvit2.losses import (
    LeCam,
    detail_weights,
    edge_weights,
    hinge_loss,
    psnr,
    reconstruction_loss,
)

B, N, H, W = 2, 3, 5, 7


def _scene() -> Tensor:
    """A flat background with one place in 35 that differs; (B, 3, N, H, W)."""
    video = torch.full((B, 3, N, H, W), -0.5)
    video[0, 1, :, 2, 3] = 0.5
    return video


@pytest.mark.parametrize("strength", [0.0, 1.0, 9.0])
def test_detail_weights_have_a_mean_of_one(strength: float) -> None:
    weights = detail_weights(_scene(), strength)
    assert tuple(weights.shape) == (B, 1, N, H, W)
    torch.testing.assert_close(weights.mean(dim=(1, 2, 3, 4)), torch.ones(B))


def test_detail_weighs_more_by_its_strength_and_nothing_else_does() -> None:
    weights = detail_weights(_scene(), strength=4.0)
    detail = torch.zeros(H, W, dtype=torch.bool)
    detail[2, 3] = True
    background, object_ = weights[0, 0, :, ~detail], weights[0, 0, :, detail]
    assert len(background.unique()) == 1
    torch.testing.assert_close(object_, torch.full_like(object_, 5 * float(background[0, 0])))
    assert torch.equal(weights[1], torch.ones_like(weights[1]))  # a clip without detail
    assert torch.equal(detail_weights(_scene(), strength=4.0, threshold=1.1), torch.ones(B, 1, N, H, W))


def test_edges_bear_their_share_however_few_they_are() -> None:
    video = torch.full((1, 3, 2, 9, 9), -0.5)
    video[0, 2, 1, 4, 4] = 0.5  # one place, in one frame: its eight neighbours and itself are edge
    before = detail_weights(video, strength=3.0)
    weights = edge_weights(video, before, share=0.4)
    edge = torch.zeros(2, 9, 9, dtype=torch.bool)
    edge[1, 3:6, 3:6] = True
    torch.testing.assert_close(weights[0, 0][~edge], 0.6 * before[0, 0][~edge])
    gained = (weights - 0.6 * before)[0, 0][edge]
    torch.testing.assert_close(gained, torch.full((9,), 0.4 * 2 * 81 / 9))
    torch.testing.assert_close(weights.mean(), torch.tensor(1.0))


def test_a_flat_clip_keeps_its_weights_and_no_share_changes_none() -> None:
    flat = torch.full((B, 3, N, H, W), 0.25)
    before = torch.rand(B, 1, N, H, W)
    assert torch.equal(edge_weights(flat, before, share=0.7), before)
    assert torch.equal(edge_weights(_scene(), before, share=0.0), before)


def test_reconstruction_loss_is_the_weighted_mix_of_squared_and_absolute_error() -> None:
    target = torch.zeros(B, 3, N, H, W)
    output = target.clone()
    output[0] = 0.5
    weights = torch.ones(B, 1, N, H, W)
    assert reconstruction_loss(output, target, weights, 0.0).tolist() == pytest.approx([0.25, 0])
    assert reconstruction_loss(output, target, weights, 1.0).tolist() == pytest.approx([0.5, 0])
    assert reconstruction_loss(output, target, weights, 0.2).tolist() == pytest.approx([0.8 * 0.25 + 0.2 * 0.5, 0])
    weights[0] = 3
    assert reconstruction_loss(output, target, weights, 0.0).tolist() == pytest.approx([0.75, 0])


def test_reconstruction_loss_does_not_broadcast() -> None:
    with pytest.raises(ShapeError, match="must have one shape"):
        reconstruction_loss(torch.zeros(B, 3, 1, H, W), torch.zeros(B, 3, N, H, W), torch.ones(1), 0.0)


@pytest.mark.parametrize(
    ("real", "fake", "loss"),
    [
        ([1.0, 2.0], [-1.0, -7.0], 0.0),
        ([0.0, 0.0], [0.0, 0.0], 2.0),
        ([-1.0, 3.0], [1.0, -3.0], 2.0),
        ([1.0], [4.0], 5.0),
    ],
)
def test_hinge_loss_has_its_known_values(real: list[float], fake: list[float], loss: float) -> None:
    assert float(hinge_loss(torch.tensor(real), torch.tensor(fake))) == loss


@pytest.mark.parametrize(("error", "decibels"), [(2.0, 0.0), (0.2, 20.0), (0.02, 40.0), (0.0, 106.0206)])
def test_psnr_has_its_known_values(error: float, decibels: float) -> None:
    target = torch.zeros(B, 3, N, H, W)
    values = psnr(torch.stack([target[0] + error, target[1] - error]), target)
    assert tuple(values.shape) == (B,)
    torch.testing.assert_close(values, torch.full((B,), decibels), atol=1e-3, rtol=0)


def test_lecam_averages_move_by_its_decay_and_come_back() -> None:
    lecam = LeCam(decay=0.75)
    real, fake = torch.tensor([3.0, 5.0]), torch.tensor([-1.0, -3.0])
    lecam(real, fake)
    assert lecam.state_dict() == {"real": 1.0, "fake": -0.5}
    lecam(real, fake)
    assert lecam.state_dict() == {"real": 1.75, "fake": -0.875}
    again = LeCam(decay=0.75)
    again.load_state_dict(lecam.state_dict())
    assert float(again(real, fake)) == float(lecam(real, fake))
    assert again.state_dict() == lecam.state_dict()


def test_lecam_pulls_scores_towards_the_other_sides_average() -> None:
    lecam = LeCam(decay=1.0)
    lecam.load_state_dict({"real": 2.0, "fake": -1.0})
    real, fake = torch.tensor([3.0], requires_grad=True), torch.tensor([-2.0], requires_grad=True)
    penalty = lecam(real, fake)
    assert float(penalty.detach()) == (3 + 1) ** 2 + (2 + 2) ** 2
    penalty.backward()
    assert real.grad is not None and fake.grad is not None
    assert float(real.grad) > 0 > float(fake.grad)  # a step against it lowers real scores and raises those of fakes
    assert float(lecam(torch.tensor([-1.5]), torch.tensor([2.5]))) == 0


def _discriminator() -> VideoDiscriminator:
    torch.manual_seed(0)
    return VideoDiscriminator(channels=4, channel_multipliers=(1, 2, 3))


@pytest.mark.parametrize("shape", [(1, 8, 8), (1, 1, 1), (2, 5, 7), (5, 16, 24), (17, 11, 13)])
def test_discriminator_gives_one_score_a_clip_of_any_size(shape: tuple[int, int, int]) -> None:
    discriminator, video = _discriminator(), torch.rand(B, 3, *shape) * 2 - 1
    scores = discriminator(video)
    assert tuple(scores.shape) == (B,)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(discriminator(video[1:]), scores[1:])  # clips do not mix


def test_discriminator_works_in_bf16_autocast() -> None:
    video = torch.rand(B, 3, N, H, W) * 2 - 1
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores = _discriminator()(video)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, _discriminator()(video), atol=0.05, rtol=0)


@pytest.mark.parametrize("num_frames", [1, 2, 3, 5])
def test_gradients_in_bf16_are_those_in_fp32_whatever_memory_held_before(num_frames: int) -> None:
    """A block that saw two frames had weights' gradients made of leftover memory, some of them 1e30."""

    def discriminator() -> VideoDiscriminator:
        torch.manual_seed(0)
        return VideoDiscriminator(channels=16, channel_multipliers=(1, 1, 1))

    exact, video = discriminator(), torch.rand(B, 3, num_frames, 16, 24) * 2 - 1
    exact(video).sum().backward()
    for leftover in (0.0, 1e4, -1e30):
        half = discriminator()
        held = [torch.full((2**size,), leftover) for size in range(10, 19) for _ in range(3)]
        del held
        with torch.autocast("cpu", dtype=torch.bfloat16):
            scores = half(video)
        scores.sum().backward()
        for (name, weight), expected in zip(half.named_parameters(), exact.parameters(), strict=True):
            assert weight.grad is not None and expected.grad is not None
            assert float((weight.grad - expected.grad).abs().max() / expected.grad.abs().max()) < 0.2, name


def test_gradients_reach_the_clip_and_every_weight_of_the_discriminator() -> None:
    discriminator, video = _discriminator(), torch.rand(B, 3, N, H, W, requires_grad=True)
    discriminator(video).square().sum().backward()
    assert video.grad is not None
    assert bool((video.grad.flatten(2).abs().amax(dim=2) > 0).all())
    for name, weight in discriminator.named_parameters():
        assert weight.grad is not None and float(weight.grad.abs().max()) > 0, name


@pytest.mark.parametrize("num_frames", [1, 5])
def test_discriminator_learns_to_tell_two_kinds_of_clips_apart(num_frames: int) -> None:
    discriminator = _discriminator()
    optimizer = torch.optim.AdamW(discriminator.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(1)

    def clips() -> tuple[Tensor, Tensor]:
        """Noise, and the same noise in blocks of four pixels."""
        noise = torch.rand(5, 3, num_frames, 12, 16, generator=generator) * 2 - 1
        return noise, noise[..., ::4, ::4].repeat_interleave(4, dim=3).repeat_interleave(4, dim=4)

    for _ in range(40):
        real, fake = clips()
        loss = hinge_loss(discriminator(real), discriminator(fake))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    real, fake = clips()
    discriminator.requires_grad_(False)
    assert float(discriminator(real).min()) > float(discriminator(fake).max())
    assert float(hinge_loss(discriminator(real), discriminator(fake))) < 1 < 2  # 2 is what equal scores give


def test_discriminator_refuses_what_is_not_a_clip() -> None:
    with pytest.raises(ShapeError, match=r"\(B, 3, N, H, W\)"):
        _discriminator()(torch.zeros(B, N + 1, 3, H, W))
    with pytest.raises(ConfigError, match="positive and not empty"):
        VideoDiscriminator(channels=0)
    with pytest.raises(ConfigError, match="positive and not empty"):
        VideoDiscriminator(channel_multipliers=())
