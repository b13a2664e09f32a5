"""The video tokenizer: nothing looks ahead, chunks equal the whole, any size goes in, files come back as they were."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from poet_tokenizers.base import VideoTokenizer
from poet_tokenizers.errors import CheckpointError, ConfigError, ShapeError
from poet_tokenizers.loading import load_video_tokenizer
from poet_tokenizers.magvit2.config import MagViT2Config
from poet_tokenizers.magvit2.layers import depth_to_space, space_to_depth
from poet_tokenizers.magvit2.model import MagViT2
from poet_tokenizers.magvit2.quantizer import LookupFreeQuantizer

# As the nano tokenizer: a patch in front, factorised convolutions; besides, a strided convolution halves the time.
PATCHED = MagViT2Config(
    channels=8,
    channel_multipliers=(1, 2),
    temporal_downsampling=(True,),
    num_res_blocks=1,
    patch_size=(2, 4, 4),
    factorised=True,
    num_bits=6,
    entropy_group_bits=3,
)
# As the paper's: no patch, full 3D convolutions, two levels that halve the time.
PAPER = MagViT2Config(
    channels=6,
    channel_multipliers=(1, 2, 3),
    temporal_downsampling=(True, True),
    num_res_blocks=1,
    num_bits=10,
    entropy_group_bits=5,
)
# Unlike both: time is halved by the first of two levels only.
UNEVEN = dataclasses.replace(PAPER, temporal_downsampling=(True, False), factorised=True)
CONFIGS = {"patched": PATCHED, "paper": PAPER, "uneven": UNEVEN}
B, T = 2, 7
CHUNKINGS = [(1,) * T, (3, 4), (2, 3, 2), (1, 5, 1), (4, 1, 2)]


@pytest.fixture(scope="module", params=CONFIGS)
def model(request: pytest.FixtureRequest) -> MagViT2:
    torch.manual_seed(0)
    model = MagViT2(CONFIGS[request.param]).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "modulation.weight" in name:
                weight.mul_(20)  # untrained, the latent hardly matters; a wrong one has to be seen
    return model


def _video(model: MagViT2, num_latent_frames: int = T, *, seed: int = 1) -> Tensor:
    """(B, 3, N, 3 s, 5 s) noise with some structure."""
    stride = model.spec.spatial_stride
    generator = torch.Generator().manual_seed(seed)
    shape = (B, 3, model.spec.num_frames(num_latent_frames), 3 * stride, 5 * stride)
    return torch.rand(shape, generator=generator) * 2 - 1


def _codes(model: MagViT2, num_latent_frames: int = T, *, seed: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(model.config.codebook_size, (B, num_latent_frames, 3, 5), generator=generator)


def test_tokenizer_satisfies_the_protocol_and_its_spec_gives_the_shapes(model: MagViT2) -> None:
    assert isinstance(model, VideoTokenizer)
    assert model.spec.checksum == ""
    video = _video(model)
    codes = model.encode(video)
    assert tuple(codes.shape) == (B, *model.spec.latent_shape(*video.shape[2:])) == (B, T, 3, 5)
    assert codes.dtype == torch.int64
    assert 0 <= int(codes.min()) <= int(codes.max()) < model.spec.codebook_size == 2**model.config.num_bits
    decoded = model.decode(codes)
    assert decoded.shape == video.shape
    assert decoded.dtype == torch.float32
    assert float(decoded.abs().max()) <= 1
    assert len(codes.unique()) > 10  # else the comparisons below would compare constants


@pytest.mark.parametrize("frame", range(1, T))
def test_codes_do_not_depend_on_later_frames(model: MagViT2, frame: int) -> None:
    video = _video(model)
    changed = video.clone()
    changed[:, :, model.spec.num_frames(frame) :] *= -0.7
    before, after = model.encode(video), model.encode(changed)
    assert torch.equal(before[:, :frame], after[:, :frame])
    assert not torch.equal(before[:, frame], after[:, frame])


def test_first_frame_codes_are_those_of_the_frame_alone_as_an_image(model: MagViT2) -> None:
    video = _video(model)
    image = model.encode(video[:, :, :1])
    assert tuple(image.shape) == (B, 1, 3, 5)
    assert torch.equal(model.encode(video)[:, :1], image)
    torch.testing.assert_close(model.decode(image), model.decode(model.encode(video))[:, :, :1], atol=1e-5, rtol=0)


@pytest.mark.parametrize("frame", range(1, T))
def test_pixels_do_not_depend_on_later_codes(model: MagViT2, frame: int) -> None:
    codes = _codes(model)
    changed = codes.clone()
    changed[:, frame:] = (codes[:, frame:] + 13) % model.config.codebook_size
    before, after = model.decode(codes), model.decode(changed)
    end = model.spec.num_frames(frame)
    assert torch.equal(before[:, :, :end], after[:, :, :end])
    assert not torch.equal(before[:, :, end], after[:, :, end])


@pytest.mark.parametrize("length", range(1, T + 1))
def test_a_prefix_of_the_codes_decodes_to_a_prefix_of_the_clip(model: MagViT2, length: int) -> None:
    codes = _codes(model)
    whole, part = model.decode(codes), model.decode(codes[:, :length])
    assert part.shape[2] == model.spec.num_frames(length)
    torch.testing.assert_close(part, whole[:, :, : part.shape[2]], atol=1e-5, rtol=0)  # sums in another order


@pytest.mark.parametrize("chunking", CHUNKINGS, ids=str)
def test_chunked_encoding_equals_the_whole(model: MagViT2, chunking: tuple[int, ...]) -> None:
    video, stride = _video(model), model.spec.temporal_stride
    sizes = [chunk * stride for chunk in chunking]
    sizes[0] -= stride - 1
    chunks = list(model.encode_chunks(video.split(sizes, dim=2)))
    assert [chunk.shape[1] for chunk in chunks] == list(chunking)
    assert torch.equal(torch.cat(chunks, dim=1), model.encode(video))


@pytest.mark.parametrize("chunking", CHUNKINGS, ids=str)
def test_chunked_decoding_equals_the_whole(model: MagViT2, chunking: tuple[int, ...]) -> None:
    codes, stride = _codes(model), model.spec.temporal_stride
    chunks = list(model.decode_chunks(codes.split(list(chunking), dim=1)))
    assert [chunk.shape[2] for chunk in chunks] == [
        chunk * stride - (0 if place else stride - 1) for place, chunk in enumerate(chunking)
    ]
    torch.testing.assert_close(torch.cat(chunks, dim=2), model.decode(codes), atol=1e-5, rtol=0)


def test_chunks_come_out_before_later_ones_go_in(model: MagViT2) -> None:
    codes = iter(_codes(model).split(1, dim=1))
    decoded = model.decode_chunks(codes)
    next(decoded)
    assert len(list(codes)) == T - 1


@pytest.mark.parametrize("num_latent_frames", [1, 2, 3, 5])
@pytest.mark.parametrize(("height", "width"), [(1, 2), (7, 13), (16, 17), (23, 8)])
def test_any_size_is_padded_to_the_stride_and_cropped_back(
    model: MagViT2, num_latent_frames: int, height: int, width: int
) -> None:
    generator = torch.Generator().manual_seed(3)
    shape = (B, 3, model.spec.num_frames(num_latent_frames), height, width)
    video = torch.rand(shape, generator=generator) * 2 - 1
    codes = model.encode(video)
    assert tuple(codes.shape[1:]) == model.spec.latent_shape(*shape[2:])
    stride = model.spec.spatial_stride
    padded = F.pad(video, (0, -width % stride, 0, -height % stride, 0, 0), mode="replicate")
    assert torch.equal(codes, model.encode(padded))
    decoded = model.decode(codes, size=(height, width))
    assert decoded.shape == video.shape
    assert torch.equal(decoded, model.decode(codes)[..., :height, :width])


@pytest.mark.parametrize("size", [(0, 5), (5, -1), (1000, 5), (5, 1000)])
def test_a_size_that_the_codes_cannot_fill_is_refused(model: MagViT2, size: tuple[int, int]) -> None:
    with pytest.raises(ShapeError, match="size must lie within"):
        model.decode(_codes(model, 1), size=size)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_any_floating_type_is_taken(model: MagViT2, dtype: torch.dtype) -> None:
    video = _video(model, 1).to(dtype)
    assert torch.equal(model.encode(video), model.encode(video.float()))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda video: video[0], r"float \(B, 3, N, H, W\)"),
        (lambda video: video[:, :2], r"float \(B, 3, N, H, W\)"),
        (lambda video: video.transpose(1, 2), r"float \(B, 3, N, H, W\)"),
        (lambda video: (video * 100).byte(), r"got torch.uint8"),
        (lambda video: (video + 1) * 127.5, r"Divide bytes by 127.5"),
        (lambda video: video - 0.5, r"pixels must lie in \[-1, 1\]"),
        (lambda video: torch.full_like(video, float("nan")), r"pixels must lie in \[-1, 1\]"),
        (lambda video: video[:, :, 1:], r"1 \+ k \*"),
        (lambda video: video[:, :, :0], r"1 \+ k \*"),
        (lambda video: video[..., :0], r"must be positive"),
    ],
)
def test_a_video_of_the_wrong_shape_type_or_range_is_refused(model: MagViT2, change: Any, message: str) -> None:
    video = change(_video(model, 3))
    with pytest.raises(ShapeError, match=message):
        model.encode(video)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda codes: codes.flatten(1), r"call unpack\(\) first"),
        (lambda codes: codes.float(), r"integers"),
        (lambda codes: codes[:, :0], r"integers, got torch.int64 \(2, 0, 3, 5\)"),
        (lambda codes: codes - 2**20, r"Ids of the shared vocabulary"),
        (lambda codes: codes + 2**20, r"Ids of the shared vocabulary"),
    ],
)
def test_codes_of_the_wrong_shape_type_or_range_are_refused(model: MagViT2, change: Any, message: str) -> None:
    codes = change(_codes(model))
    with pytest.raises(ShapeError, match=message):
        model.decode(codes)
    with pytest.raises(ShapeError, match=message):
        list(model.decode_chunks([codes]))


def test_chunks_that_do_not_fit_together_are_refused(model: MagViT2) -> None:
    video, first = _video(model, 3), model.spec.num_frames(2)
    with pytest.raises(ShapeError, match="the first chunk must have"):
        list(model.encode_chunks([video[:, :, :first], video[:, :, first:-1]]))
    with pytest.raises(ShapeError, match="the first chunk must have"):
        list(model.encode_chunks([video[:, :, : first - 1]]))
    with pytest.raises(ShapeError, match="alike but for their length"):
        list(model.encode_chunks([video[:, :, :first], video[:, :, first:, :-1]]))
    codes = _codes(model)
    with pytest.raises(ShapeError, match="alike but for their length"):
        list(model.decode_chunks([codes[:, :2], codes[:1, 2:]]))


def test_every_code_is_the_inverse_of_its_bits() -> None:
    quantizer = LookupFreeQuantizer(num_bits=7, group_bits=7)
    codes = torch.arange(128).reshape(1, 2, 4, 16)
    latent = quantizer.decode(codes)
    assert tuple(latent.shape) == (1, 7, 2, 4, 16)
    assert set(latent.unique().tolist()) == {-1.0, 1.0}
    assert torch.equal(quantizer.encode(latent), codes)
    assert torch.equal(quantizer.encode(latent * 0.01), codes)
    flat = latent.flatten(2)[0].T  # (128, 7)
    assert len({tuple(row) for row in flat.tolist()}) == 128


@pytest.mark.parametrize("patch", [(1, 1, 1), (2, 3, 5), (4, 4, 4)], ids=str)
@pytest.mark.parametrize("first_chunk", [True, False])
def test_depth_to_space_is_the_inverse_of_space_to_depth(patch: tuple[int, int, int], first_chunk: bool) -> None:
    time, height, width = patch
    num_frames = 1 + 2 * time if first_chunk else 3 * time
    video = torch.randn(2, 3, num_frames, 7 * height, 11 * width)
    depth = space_to_depth(video, patch, first_chunk=first_chunk)
    assert tuple(depth.shape) == (2, 3 * time * height * width, 3, 7, 11)
    assert torch.equal(depth_to_space(depth, patch, first_chunk=first_chunk), video)


def test_first_patch_holds_the_first_frame_alone() -> None:
    video = torch.randn(1, 3, 9, 4, 4)
    changed = video.clone()
    changed[:, :, 1:] = 0
    assert torch.equal(space_to_depth(video, (4, 2, 2))[:, :, :1], space_to_depth(changed, (4, 2, 2))[:, :, :1])


def test_a_saved_tokenizer_comes_back_the_same(model: MagViT2, tmp_path: Path) -> None:
    video = _video(model)
    model.save(tmp_path)
    loaded = MagViT2.load(tmp_path)
    assert not loaded.training
    assert loaded.config == model.config
    assert len(loaded.spec.checksum) == 64
    assert loaded.spec == model.spec
    codes = loaded.encode(video)
    assert torch.equal(codes, model.encode(video))
    assert torch.equal(loaded.decode(codes), model.decode(codes))
    again = load_video_tokenizer(tmp_path)
    assert again.spec == loaded.spec


def test_a_decoder_may_be_stored_in_half_and_the_codes_stay(tmp_path: Path) -> None:
    torch.manual_seed(0)
    whole = MagViT2(PATCHED).eval()
    whole.save(tmp_path / "whole")
    half = MagViT2.load(tmp_path / "whole")
    half.save(tmp_path / "half", torch.float16)
    loaded = MagViT2.load(tmp_path / "half")
    assert loaded.spec == whole.spec
    video = torch.rand(1, 3, 5, 16, 16) * 2 - 1
    codes = whole.encode(video)
    assert torch.equal(loaded.encode(video), codes)
    assert torch.equal(loaded.decode(codes), half.decode(codes))
    torch.testing.assert_close(loaded.decode(codes), whole.decode(codes), atol=1e-2, rtol=1e-2)
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("half", "whole")]
    assert sizes[0] < 0.85 * sizes[1]


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    MagViT2(PATCHED).save(tmp_path)
    return tmp_path


@pytest.mark.parametrize("part", ["decoder", "encoder"])
def test_another_decoder_leaves_the_spec_and_another_encoder_does_not(part: str, saved: Path, tmp_path: Path) -> None:
    first, changed = MagViT2.load(saved), MagViT2.load(saved)
    with torch.no_grad():
        next(changed.get_submodule(part).parameters()).mul_(1.5)
    changed.save(tmp_path / "changed")
    assert (MagViT2.load(tmp_path / "changed").spec == first.spec) == (part == "decoder")


@pytest.mark.parametrize("part", ["decoder", "encoder"])
def test_a_changed_weight_is_noticed(part: str, saved: Path) -> None:
    weights = load_file(saved / "model.safetensors")
    next(weight for name, weight in weights.items() if name.startswith(part)).view(-1)[0] += 1e-3
    save_file(weights, saved / "model.safetensors")
    with pytest.raises(CheckpointError, match="checksum"):
        MagViT2.load(saved)


def test_missing_and_unknown_tensors_are_named(saved: Path) -> None:
    weights = load_file(saved / "model.safetensors")
    weights["encoder.extra"] = weights.pop("encoder.norm.weight")
    save_file(weights, saved / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"missing: encoder\.norm\.weight; unexpected: encoder\.extra"):
        MagViT2.load(saved)


def test_tensors_of_another_size_are_refused(saved: Path) -> None:
    _edit_config(saved, channels=16)
    with pytest.raises(CheckpointError, match="must be of shape"):
        MagViT2.load(saved)


@pytest.mark.parametrize("change", [{"depth": 3}, {"num_bits": 99}, {"channels": "8"}])
def test_a_damaged_description_is_a_checkpoint_error_that_names_the_file(saved: Path, change: dict[str, Any]) -> None:
    _edit_config(saved, **change)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        MagViT2.load(saved)


def test_missing_files_are_refused(saved: Path) -> None:
    (saved / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        MagViT2.load(saved)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        MagViT2.load(saved / "nowhere")


def _edit_config(directory: Path, **changes: Any) -> None:
    file = directory / "config.json"
    description = json.loads(file.read_text())
    description["config"] |= changes
    file.write_text(json.dumps(description))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"channels": 0}, "at least 1"),
        ({"channel_multipliers": ()}, "at least 1"),
        ({"channel_multipliers": (1, 0)}, "at least 1"),
        ({"num_res_blocks": 0}, "at least 1"),
        ({"temporal_downsampling": (True, True)}, "one entry for each level"),
        ({"patch_size": (2, 4, 8)}, "patch_size"),
        ({"patch_size": (2, 4)}, "patch_size"),
        ({"patch_size": (0, 4, 4)}, "patch_size"),
        ({"num_bits": 0}, "num_bits"),
        ({"num_bits": 25}, "num_bits"),
        ({"entropy_group_bits": 4}, "must divide"),
        ({"entropy_group_bits": 0}, "lie in 1..12"),
        ({"num_bits": 24, "entropy_group_bits": 24}, "lie in 1..12"),
    ],
)
def test_a_config_that_cannot_be_built_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(PATCHED, **change)


def test_a_config_survives_json_and_names_missing_and_unknown_keys() -> None:
    assert MagViT2Config.from_dict(json.loads(json.dumps(PATCHED.to_dict()))) == PATCHED
    values = PATCHED.to_dict() | {"depth": 3}
    del values["channels"]
    with pytest.raises(ConfigError, match=r"missing: \['channels'\], unknown: \['depth'\]"):
        MagViT2Config.from_dict(values)


def test_strides_of_the_papers_model_are_4_and_8() -> None:
    config = MagViT2Config()
    assert (config.temporal_stride, config.spatial_stride, config.codebook_size) == (4, 8, 2**18)
    assert (PATCHED.temporal_stride, PATCHED.spatial_stride) == (4, 8)
    assert (UNEVEN.temporal_stride, UNEVEN.spatial_stride) == (2, 4)


def test_latent_shape_and_num_frames_are_inverse(model: MagViT2) -> None:
    for num_latent_frames in range(1, 12):
        num_frames = model.spec.num_frames(num_latent_frames)
        assert model.spec.latent_shape(num_frames, 40, 17)[0] == num_latent_frames
    with pytest.raises(ShapeError, match="Crop or pad it in time"):
        model.spec.latent_shape(4, 8, 8)
