"""The shape of a MAGVIT-v2 video tokenizer. Knows sizes, no tensors."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from poet_tokenizers.errors import ConfigError

__all__ = ["MagViT2Config"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class MagViT2Config:
    """Sizes of encoder, quantiser and decoder. The defaults are the paper's video model.

    Attributes:
        channels: width of the first level.
        channel_multipliers: width of each level in units of `channels`; every level after the first halves height
            and width.
        temporal_downsampling: for every level after the first, whether it also halves the time.
        num_res_blocks: residual blocks a level, in the encoder and in the decoder.
        patch_size: (time, height, width) of the space-to-depth front; (1, 1, 1) is none, as in the paper. A patch in
            front moves most of the arithmetic to a small grid, which is what makes a codec fast on a CPU.
        factorised: each residual block holds one 1 x 3 x 3 and one 3 x 1 x 1 convolution instead of two 3 x 3 x 3.
        num_bits: bits of a code; the codebook holds 2 ** num_bits codes.
        entropy_group_bits: the entropy of the mean code is taken over groups of this many bits.

    Source: MAGVIT-v2, arXiv:2310.05737, section 3.2 and appendix A.
    """

    channels: int = 128
    channel_multipliers: tuple[int, ...] = (1, 2, 2, 4)
    temporal_downsampling: tuple[bool, ...] = (False, True, True)
    num_res_blocks: int = 4
    patch_size: tuple[int, int, int] = (1, 1, 1)
    factorised: bool = False
    num_bits: int = 18
    entropy_group_bits: int = 9

    def __post_init__(self) -> None:
        if min(self.channels, self.num_res_blocks, *self.channel_multipliers, 1) < 1 or not self.channel_multipliers:
            raise ConfigError(
                "channels, num_res_blocks and every one of channel_multipliers must be at least 1, got "
                f"{self.channels}, {self.num_res_blocks} and {self.channel_multipliers}."
            )
        if len(self.temporal_downsampling) != len(self.channel_multipliers) - 1:
            raise ConfigError(
                f"temporal_downsampling must have one entry for each level after the first: "
                f"{len(self.channel_multipliers) - 1}, got {len(self.temporal_downsampling)}."
            )
        if len(self.patch_size) != 3 or min(self.patch_size) < 1 or self.patch_size[1] != self.patch_size[2]:
            raise ConfigError(f"patch_size must be (time, size, size), all at least 1, got {self.patch_size}.")
        if not 1 <= self.num_bits <= 24:
            raise ConfigError(f"num_bits must lie in 1..24, got {self.num_bits}.")
        if not 1 <= self.entropy_group_bits <= 12 or self.num_bits % self.entropy_group_bits:
            raise ConfigError(
                f"entropy_group_bits must divide num_bits ({self.num_bits}) and lie in 1..12, "
                f"got {self.entropy_group_bits}."
            )

    @property
    def codebook_size(self) -> int:
        """Number of codes."""
        return 2**self.num_bits

    @property
    def level_channels(self) -> tuple[int, ...]:
        """Width of each level."""
        return tuple(self.channels * multiplier for multiplier in self.channel_multipliers)

    @property
    def spatial_stride(self) -> int:
        """Pixels a latent place along height and width."""
        return self.patch_size[1] * 2 ** (len(self.channel_multipliers) - 1)

    @property
    def temporal_stride(self) -> int:
        """Video frames a latent frame, after the first."""
        return self.patch_size[0] * 2 ** sum(self.temporal_downsampling)

    @property
    def patch_channels(self) -> int:
        """Colour values in one patch."""
        return 3 * math.prod(self.patch_size)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; inverse of `from_dict`."""
        values = dataclasses.asdict(self)
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> MagViT2Config:
        """The config that `to_dict` wrote.

        Raises:
            ConfigError: a key is missing or unknown.
        """
        names = {field.name for field in dataclasses.fields(cls)}
        if set(values) != names:
            raise ConfigError(
                f"a MAGVIT-v2 config must have exactly the keys {', '.join(sorted(names))}; "
                f"missing: {sorted(names - set(values))}, unknown: {sorted(set(values) - names)}."
            )
        plain: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in values.items()
        }
        return cls(**plain)
