"""MAGVIT-v2: a causal 3D convolutional video tokenizer with lookup-free quantisation.

Pixels in [-1, 1] become codes and codes become pixels; the shared vocabulary is unknown here. Frames never look ahead:
the first latent frame is the first video frame alone, and a clip can be encoded and decoded chunk by chunk with the
same result.

Legend: B clips, N frames of H x W pixels, T latent frames of h x w places, K bits.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from poet_tokenizers.base import VideoSpec
from poet_tokenizers.checkpoint import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    check_spec,
    check_weights,
    codes_checksum,
    load_strictly,
    read_description,
    read_tensors,
    weights_checksum,
    with_stored_decoder,
    write_description,
    write_tensors,
)
from poet_tokenizers.errors import CheckpointError, ConfigError, ShapeError
from poet_tokenizers.magvit2.config import MagViT2Config
from poet_tokenizers.magvit2.layers import (
    AdaptiveNorm,
    CausalConv3d,
    Downsample,
    Memory,
    PlaceNorm,
    ResidualBlock,
    Upsample,
    depth_to_space,
    space_to_depth,
)
from poet_tokenizers.magvit2.quantizer import LookupFreeQuantizer, Quantized

__all__ = ["KIND", "Decoder", "Encoder", "MagViT2"]

KIND: Final = "magvit2"


class Encoder(nn.Module):
    """Pixels to the latent before quantisation."""

    def __init__(self, config: MagViT2Config) -> None:
        super().__init__()
        self.patch_size = config.patch_size
        widths = config.level_channels
        kernel = (3, 3, 3) if config.patch_size == (1, 1, 1) else (1, 1, 1)
        self.input = CausalConv3d(config.patch_channels, widths[0], kernel)
        self.levels = nn.ModuleList()
        for level, width in enumerate(widths):
            blocks = nn.ModuleList()
            if level:
                temporal = config.temporal_downsampling[level - 1]
                blocks.append(Downsample(widths[level - 1], width, temporal=temporal))
            for _ in range(config.num_res_blocks):
                blocks.append(ResidualBlock(width, factorised=config.factorised))
            self.levels.append(blocks)
        self.norm = PlaceNorm(widths[-1])
        self.output = nn.Conv3d(widths[-1], config.num_bits, 1)

    def forward(self, video: Tensor, memory: Memory | None = None) -> Tensor:
        """(B, 3, N, H, W) in [-1, 1], H and W divisible by the stride, to (B, K, T, h, w)."""
        first = memory is None or memory.first_chunk
        x = self.input(space_to_depth(video, self.patch_size, first_chunk=first), memory)
        x = x.contiguous(memory_format=torch.channels_last_3d)
        for blocks in self.levels:
            assert isinstance(blocks, nn.ModuleList)
            for block in blocks:
                x = block(x, memory=memory)
        out: Tensor = self.output(F.silu(self.norm(x)))
        return out


class Decoder(nn.Module):
    """The quantised latent to pixels."""

    def __init__(self, config: MagViT2Config) -> None:
        super().__init__()
        self.patch_size = config.patch_size
        widths = config.level_channels[::-1]
        temporal = config.temporal_downsampling[::-1]
        self.input = CausalConv3d(config.num_bits, widths[0], (3, 3, 3))
        self.levels = nn.ModuleList()
        for level, width in enumerate(widths):
            blocks = nn.ModuleList([AdaptiveNorm(width, config.num_bits)])
            for _ in range(config.num_res_blocks):
                blocks.append(ResidualBlock(width, factorised=config.factorised))
            if level < len(widths) - 1:
                blocks.append(Upsample(width, widths[level + 1], temporal=temporal[level]))
            self.levels.append(blocks)
        self.norm = AdaptiveNorm(widths[-1], config.num_bits)
        kernel = (3, 3, 3) if config.patch_size == (1, 1, 1) else (1, 1, 1)
        self.output = CausalConv3d(widths[-1], config.patch_channels, kernel)

    def forward(self, latent: Tensor, memory: Memory | None = None) -> Tensor:
        """(B, K, T, h, w) of -1 and 1 to (B, 3, 1 + (T - 1) * temporal_stride, H, W), not clamped."""
        first = memory is None or memory.first_chunk
        x = self.input(latent, memory).contiguous(memory_format=torch.channels_last_3d)
        for blocks in self.levels:
            assert isinstance(blocks, nn.ModuleList)
            for block in blocks:
                x = block(x, latent, memory) if isinstance(block, AdaptiveNorm) else block(x, memory)
        x = self.output(F.silu(self.norm(x, latent, memory)), memory)
        return depth_to_space(x, self.patch_size, first_chunk=first)


class MagViT2(nn.Module):
    """The tokenizer: `encode`, `decode`, and both in chunks."""

    def __init__(self, config: MagViT2Config) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.quantizer = LookupFreeQuantizer(config.num_bits, config.entropy_group_bits)
        self.decoder = Decoder(config)
        self._checksum = ""
        self.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]

    @property
    def spec(self) -> VideoSpec:
        """What the shared vocabulary has to know; the checksum is empty until the model is saved or loaded."""
        return VideoSpec(
            kind=KIND,
            codebook_size=self.config.codebook_size,
            temporal_stride=self.config.temporal_stride,
            spatial_stride=self.config.spatial_stride,
            checksum=self._checksum,
        )

    def forward(self, video: Tensor) -> tuple[Tensor, Quantized]:
        """One training pass: (B, 3, N, H, W) in [-1, 1] to its reconstruction of the same shape and the codes."""
        quantized = self.quantizer(self.encoder(video))
        return self.decoder(quantized.latent), quantized

    @torch.inference_mode()
    def encode(self, video: Tensor) -> Tensor:
        """Turn pixels into codes.

        Args:
            video: (B, 3, N, H, W) float in [-1, 1], N = 1 + k * temporal_stride. H and W of any size are padded to
                the stride with their last row and column.

        Returns:
            (B, T, h, w) int64 in [0, codebook_size).

        Raises:
            ShapeError: wrong shape, frame count or range.

        Source: MAGVIT-v2, arXiv:2310.05737, section 3.2.
        """
        self._check_video(video)
        self.spec.latent_shape(video.shape[2], video.shape[3], video.shape[4])
        return self.quantizer.encode(self.encoder(self._pad(video)))

    @torch.inference_mode()
    def decode(self, codes: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """Reconstruct pixels from codes.

        Args:
            codes: (B, T, h, w) int64 in [0, codebook_size).
            size: (height, width) to crop to, as given to `encode`; the whole grid when left out.

        Returns:
            (B, 3, 1 + (T - 1) * temporal_stride, H, W) float32 in [-1, 1].

        Raises:
            ShapeError: codes is not 4-dimensional or empty, a code is out of range, or size exceeds the grid.
        """
        self._check_codes(codes)
        video = self.decoder(self._latent(codes)).float().clamp(-1, 1)
        if size is None:
            return video
        height, width = video.shape[-2:]
        if not (0 < size[0] <= height and 0 < size[1] <= width):
            raise ShapeError(f"size must lie within the {height} x {width} pixels of the codes, got {size}.")
        return video[..., : size[0], : size[1]]

    @torch.inference_mode()
    def encode_chunks(self, chunks: Iterable[Tensor]) -> Iterator[Tensor]:
        """Codes of a long clip, chunk by chunk; joined along time they equal `encode` of the whole clip.

        Args:
            chunks: (B, 3, n, H, W) each; the first has 1 + k * temporal_stride frames, later ones k * temporal_stride.

        Yields:
            (B, t, h, w) int64 for every chunk.

        Raises:
            ShapeError: a chunk of the wrong shape, frame count or range, or of another size than the first.
        """
        memory, whole = Memory(), None
        for chunk in chunks:
            self._check_video(chunk)
            whole = _check_same_size(chunk.shape, whole)
            frames = chunk.shape[2] - (1 if memory.first_chunk else 0)
            if frames % self.config.temporal_stride or (frames == 0 and not memory.first_chunk):
                raise ShapeError(
                    f"the first chunk must have 1 + k * {self.config.temporal_stride} frames and later ones "
                    f"k * {self.config.temporal_stride}, got {chunk.shape[2]}."
                )
            codes = self.quantizer.encode(self.encoder(self._pad(chunk), memory))
            memory.first_chunk = False
            yield codes

    @torch.inference_mode()
    def decode_chunks(self, chunks: Iterable[Tensor]) -> Iterator[Tensor]:
        """Pixels of a long clip while its codes arrive; joined along time they equal `decode` of all codes.

        Args:
            chunks: (B, t, h, w) int64 each, t latent frames at a time.

        Yields:
            (B, 3, n, H, W) float32 in [-1, 1]; n = 1 + (t - 1) * temporal_stride for the first, t * temporal_stride
            for later ones.

        Raises:
            ShapeError: a chunk that `decode` would not take, or of another size than the first.
        """
        memory, whole = Memory(), None
        for chunk in chunks:
            self._check_codes(chunk)
            whole = _check_same_size(chunk.shape, whole)
            video = self.decoder(self._latent(chunk), memory).float().clamp(-1, 1)
            memory.first_chunk = False
            yield video

    def save(self, directory: Path, decoder_dtype: torch.dtype = torch.float32) -> None:
        """Write `config.json` and `model.safetensors`; the checksum of what decides the codes goes into the spec.

        Args:
            directory: made if missing.
            decoder_dtype: in which the decoder's weights are stored. They are rounded to it here too, so that what is
                saved is what is in memory; the encoder stays as it is.
        """
        stored = with_stored_decoder(self.state_dict(), decoder_dtype)
        write_tensors(directory, stored)
        self.load_state_dict(stored)
        weights = self.state_dict()
        self._checksum = codes_checksum(weights)
        spec = dataclasses.asdict(self.spec)
        write_description(directory, KIND, self.config.to_dict(), spec, weights_checksum(weights))

    @classmethod
    def load(cls, directory: Path, device: str | torch.device = "cpu") -> MagViT2:
        """Read what `save` wrote, in evaluation mode.

        Raises:
            CheckpointError: a file is missing or damaged, or the weights are not those that the spec names.
        """
        description = read_description(directory, KIND)
        try:
            model = cls(MagViT2Config.from_dict(description["config"]))
        except (ConfigError, TypeError) as error:
            raise CheckpointError(f"{directory / CONFIG_FILE}: {error}") from error
        load_strictly(model, read_tensors(directory), model.state_dict(), directory / WEIGHTS_FILE)
        weights = model.state_dict()  # a decoder that is stored in half is whole in memory
        model._checksum = codes_checksum(weights)
        check_spec(directory, description["spec"], dataclasses.asdict(model.spec))
        check_weights(directory, description, weights)
        return model.to(device).eval()

    def _pad(self, video: Tensor) -> Tensor:
        video, stride = video.to(self.encoder.output.weight.dtype), self.config.spatial_stride
        height, width = video.shape[-2:]
        down, right = -height % stride, -width % stride
        return F.pad(video, (0, right, 0, down, 0, 0), mode="replicate") if down or right else video

    def _latent(self, codes: Tensor) -> Tensor:
        return self.quantizer.decode(codes).to(self.decoder.input.weight.dtype)

    @staticmethod
    def _check_video(video: Tensor) -> None:
        if video.ndim != 5 or video.shape[1] != 3 or not video.is_floating_point():
            raise ShapeError(f"video must be float (B, 3, N, H, W), got {video.dtype} {tuple(video.shape)}.")
        # Put so that NaN fails as well.
        if video.numel() and not (float(video.min()) >= -1.01 and float(video.max()) <= 1.01):
            raise ShapeError(
                f"pixels must lie in [-1, 1], got {float(video.min()):.3g} to {float(video.max()):.3g}. "
                "Divide bytes by 127.5 and subtract 1."
            )

    @staticmethod
    def _check_codes(codes: Tensor) -> None:
        if codes.ndim != 4 or codes.is_floating_point() or 0 in codes.shape:
            raise ShapeError(
                f"codes must be (B, T, H, W) integers, got {codes.dtype} {tuple(codes.shape)}. "
                "Flattened codes belong to poet.sequence; call unpack() first."
            )


def _check_same_size(shape: torch.Size, whole: torch.Size | None) -> torch.Size:
    """Compare a chunk with the first one in everything but the time, axis -3."""
    if whole is not None and (shape[:-3], shape[-2:]) != (whole[:-3], whole[-2:]):
        raise ShapeError(
            f"the chunks of a clip must be alike but for their length, got {tuple(shape)} after {tuple(whole)}."
        )
    return shape
