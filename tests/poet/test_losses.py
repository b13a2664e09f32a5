"""The language model's loss: what counts, and that the cheap way to its gradient is the plain one."""

import pytest
import torch
import torch.nn.functional as F

from poet.errors import ShapeError
from poet.training.losses import backward_from_targets, modality_means, target_losses

B, L, C, V = 2, 11, 5, 13


def make() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.nn.Linear]:
    torch.manual_seed(0)
    loss_mask = torch.rand(B, L) < 0.5
    loss_mask[:, 0] = False
    return torch.randn(B, L, C), torch.randint(V, (B, L)), loss_mask, torch.nn.Linear(C, V, bias=False)


@pytest.mark.parametrize("chunk", [1, 3, 1000])
def test_losses_are_the_cross_entropy_of_targets_read_one_place_before(chunk: int) -> None:
    hidden, ids, loss_mask, head = make()
    expected = [
        F.cross_entropy(head(hidden[row, place - 1]), ids[row, place])
        for row in range(B)
        for place in range(L)
        if loss_mask[row, place]
    ]
    torch.testing.assert_close(target_losses(hidden, ids, loss_mask, head, chunk), torch.stack(expected))


@pytest.mark.parametrize("chunk", [1, 3, 1000])
def test_chunked_backward_gives_the_losses_and_gradients_of_the_plain_mean(chunk: int) -> None:
    hidden, ids, loss_mask, head = make()
    body = torch.nn.Linear(C, C)
    target_losses(body(hidden), ids, loss_mask, head).mean().backward()
    wanted = [parameter.grad for parameter in (*body.parameters(), *head.parameters())]
    plain = target_losses(body(hidden), ids, loss_mask, head)
    body.zero_grad(), head.zero_grad()
    losses = backward_from_targets(body(hidden), ids, loss_mask, head, chunk)
    torch.testing.assert_close(losses, plain.detach())
    for parameter, expected in zip((*body.parameters(), *head.parameters()), wanted, strict=True):
        assert expected is not None
        torch.testing.assert_close(parameter.grad, expected)


def test_places_outside_the_mask_do_not_change_the_gradient_of_others() -> None:
    hidden, ids, loss_mask, head = make()
    leaf = hidden.clone().requires_grad_()
    backward_from_targets(leaf * 1.0, ids, loss_mask, head)
    assert leaf.grad is not None
    predicts = torch.zeros(B, L, dtype=torch.bool)
    predicts[:, :-1] = loss_mask[:, 1:]
    assert (leaf.grad[~predicts] == 0).all()
    assert (leaf.grad[predicts].abs().sum(-1) > 0).all()


def test_modality_means_split_the_losses_by_what_the_target_is() -> None:
    losses = torch.tensor([1.0, 2.0, 6.0])
    loss_mask = torch.tensor([[False, True, True], [False, False, True]])
    modality = torch.tensor([[0, 2, 2], [0, 1, 3]])
    means = modality_means(losses, modality, loss_mask, ("special", "text", "video", "audio"))
    assert means == {"video_loss": 1.5, "audio_loss": 6.0}


def test_wrong_masks_and_shapes_are_refused() -> None:
    hidden, ids, loss_mask, head = make()
    with pytest.raises(ShapeError, match="place 0"):
        target_losses(hidden, ids, torch.ones_like(loss_mask), head)
    with pytest.raises(ShapeError, match="at least one"):
        target_losses(hidden, ids, torch.zeros_like(loss_mask), head)
    with pytest.raises(ShapeError, match=r"\(B, L, C\)"):
        target_losses(hidden[:, 1:], ids, loss_mask, head)
