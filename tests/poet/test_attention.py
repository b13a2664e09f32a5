"""The attention rule against an oracle of plain loops, and every form of the mask against the rule."""

import itertools

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_mask
from torch.nn.functional import scaled_dot_product_attention

from poet.errors import ShapeError
from poet.model import attention
from poet.model.attention import SceneLayout, attend, visible


def packed() -> SceneLayout:
    """3 rows of up to 2 unrelated scenes in 13 places, some padding, one scene written in parallel."""
    lengths = torch.tensor([[5, 7], [11, 0], [4, 9]])
    prefix_lengths = torch.tensor([[2, 3], [5, 0], [0, 4]])
    parallel = torch.tensor([[False, True], [False, False], [False, False]])
    return SceneLayout.from_packed(prefix_lengths, lengths, 13, parallel=parallel)


def film() -> SceneLayout:
    """2 films of 3 scenes of 5 ids."""
    parallel = torch.tensor([[False, False, True], [False, False, False]])
    return SceneLayout.from_films(torch.tensor([[2, 3, 1], [0, 5, 2]]), 5, parallel=parallel)


def single() -> SceneLayout:
    """3 rows of one scene, padded on the right."""
    return SceneLayout.from_prefix_lengths(torch.tensor([3, 0, 7]), torch.tensor([11, 5, 7]), 11)


def left_padded() -> SceneLayout:
    """The same on the left."""
    return SceneLayout.from_prefix_lengths(torch.tensor([3, 0, 7]), torch.tensor([11, 5, 7]), 11, left_padded=True)


LAYOUTS = [packed, film, single, left_padded]


def oracle(layout: SceneLayout, layer: int) -> Tensor:
    """The rule in words, place by place."""
    rows, length = layout.shape
    mask = torch.zeros(rows, length, length, dtype=torch.bool)
    for row, query, key in itertools.product(range(rows), range(length), range(length)):

        def same(part: Tensor, row: int = row, query: int = query, key: int = key) -> bool:
            return bool(part[row, query] == part[row, key])

        if not same(layout.document) or (layer > 0 and not same(layout.scene)):
            continue
        both_prefix = bool(layout.prefix[row, query] and layout.prefix[row, key])
        inside = same(layout.scene) and (both_prefix or bool(layout.parallel[row, query]))
        mask[row, query, key] = key <= query or inside
    return mask


@pytest.mark.parametrize("layer", [0, 1, 5])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_dense_mask_follows_the_rule_in_words(layout, layer: int) -> None:
    assert torch.equal(layout().dense_mask(layer), oracle(layout(), layer))


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_block_mask_equals_dense_mask(layout, layer: int) -> None:
    layout = layout()
    rows, length = layout.shape
    block_mask = layout.block_mask(layer, block_size=4)
    dense = layout.dense_mask(layer)
    assert torch.equal(create_mask(block_mask.mask_mod, rows, 1, length, length, device="cpu")[:, 0], dense)
    blocks = -(-length // 4)
    padded = torch.nn.functional.pad(dense, (0, 4 * blocks - length, 0, 4 * blocks - length))
    seen = padded.view(rows, blocks, 4, blocks, 4).any(4).any(2)
    assert torch.equal(block_mask.to_dense()[:, 0].bool(), seen)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("tile", [3, 64])
def test_attention_by_tiles_equals_the_fused_kernel_forward_and_backward(
    layout, tile: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "TILE", tile)
    layout = layout()
    rows, length = layout.shape
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(rows, 6, length, 4, generator=generator, requires_grad=True)
    key, value = (torch.randn(rows, 2, length, 4, generator=generator, requires_grad=True) for _ in range(2))
    weight = torch.randn(rows, 6, length, 4, generator=generator)
    for layer in (0, 1):
        dense = layout.dense_mask(layer)
        found = attend(query, key, value, visible(dense, torch.float32))
        expected = scaled_dot_product_attention(query, key, value, attn_mask=dense[:, None], enable_gqa=True)
        torch.testing.assert_close(found, expected)
        of = (query, key, value)
        gradients = torch.autograd.grad((found * weight).sum(), of)
        torch.testing.assert_close(gradients, torch.autograd.grad((expected * weight).sum(), of))


def test_tiles_leave_out_keys_that_no_query_sees(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "TILE", 5)
    tiles = visible(film().dense_mask(1), torch.float32)
    assert [(tile.keys.start, tile.keys.stop) for tile in tiles] == [(0, 5), (5, 10), (10, 15)]


def test_a_tile_without_unseen_keys_carries_no_bias() -> None:
    (tile,) = visible(torch.ones(2, 3, 5, dtype=torch.bool), torch.float32)
    assert tile.bias is None


@pytest.mark.parametrize("layout", LAYOUTS)
def test_dense_mask_of_some_queries_is_a_window_of_the_whole(layout) -> None:
    layout = layout()
    for layer in (0, 1):
        assert torch.equal(layout.dense_mask(layer, 3, 10), layout.dense_mask(layer)[:, 3:10, :10])


def test_layers_share_one_mask_unless_there_are_films() -> None:
    first, rest = single().masks(torch.float32)
    assert first is rest
    first, rest = film().masks(torch.float32)
    assert first is not rest


def test_padding_is_seen_by_no_id_and_sees_none() -> None:
    for layout in (packed(), single(), left_padded()):
        padding = layout.document == attention.PADDING
        assert padding.any()
        differs = padding[:, :, None] != padding[:, None, :]
        assert not layout.dense_mask(0)[differs].any()


def test_positions_count_from_each_document_and_run_on_through_a_film() -> None:
    assert film().positions()[0].tolist() == list(range(15))
    assert packed().positions()[0].tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5, 6, 0]
    assert left_padded().positions()[1, 6:].tolist() == [0, 1, 2, 3, 4]


def test_packed_rows_of_one_scene_equal_rows_by_prefix_length() -> None:
    lengths, prefix_lengths = torch.tensor([11, 5, 7]), torch.tensor([3, 0, 7])
    other = SceneLayout.from_packed(prefix_lengths[:, None], lengths[:, None], 11)
    for name in ("document", "scene", "prefix", "parallel"):
        assert torch.equal(getattr(other, name), getattr(single(), name))


def test_parallel_rows_see_their_whole_scene_and_no_padding() -> None:
    layout = SceneLayout.from_prefix_lengths(
        torch.tensor([2, 2]), torch.tensor([5, 5]), 7, parallel=torch.tensor([True, False])
    )
    assert layout.dense_mask(1)[0, :5, :5].all()
    assert not layout.dense_mask(1)[0, :5, 5:].any()
    assert not layout.dense_mask(1)[1, 0, 2:].any()


@pytest.mark.parametrize(
    ("prefix_lengths", "lengths", "message"),
    [([3], [2], "prefix length"), ([-1], [2], "prefix length"), ([1], [8], "at most max_len"), ([1, 1], [2], "shape")],
)
def test_lengths_that_do_not_fit_are_refused(prefix_lengths: list[int], lengths: list[int], message: str) -> None:
    with pytest.raises(ShapeError, match=message):
        SceneLayout.from_prefix_lengths(torch.tensor(prefix_lengths), torch.tensor(lengths), 7)


def test_parts_of_different_shape_are_refused() -> None:
    flags = torch.zeros(2, 5, dtype=torch.bool)
    with pytest.raises(ShapeError, match=r"\(B, L\)"):
        SceneLayout(flags.long(), flags.long(), flags[:, :3], flags, films=False)
