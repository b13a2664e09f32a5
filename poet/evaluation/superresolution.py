"""What the upsampler keeps of a larger picture: drawn clips in both sizes, and the larger one made from the smaller.

The yardsticks are the smaller picture enlarged by bicubic interpolation, which invents nothing, and the true larger
picture through the tokenizer, which no choice of codes can be expected to surpass by much. Knows clips and engines; it
does not know Toybox.

Legend: N frames of H x W pixels, s times as large as h x w.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from poet.generation.engine import Engine
from poet.generation.upsample import Upsampling, UpsamplingRequest
from poet_tokenizers.base import TextTokenizer, VideoTokenizer
from poet_tokenizers.magvit2.losses import psnr

__all__ = ["UpsamplingExample", "UpsamplingReport", "evaluate_upsampling"]

Frames = NDArray[np.uint8]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class UpsamplingExample:
    """The same clip in two sizes.

    Attributes:
        small: (N, h, w, 3) uint8.
        large: (N, H, W, 3) uint8.
        caption: what it says, or None.
    """

    small: Frames
    large: Frames
    caption: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class UpsamplingReport:
    """What came of it; PSNR in dB against the true larger pictures, mean over clips of each clip's.

    Attributes:
        psnr: of the upsampler, given the codes of the true smaller pictures.
        psnr_bicubic: of the smaller pictures, decoded from the same codes and enlarged by bicubic interpolation.
        psnr_tokenizer: of the true larger pictures through the tokenizer and back.
        code_accuracy: share of the upsampler's codes that are those of the true larger picture.
        seconds: that the upsampler took for a clip, in batches.
    """

    psnr: float
    psnr_bicubic: float
    psnr_tokenizer: float
    code_accuracy: float
    seconds: float

    @property
    def gain(self) -> float:
        """dB above bicubic."""
        return self.psnr - self.psnr_bicubic

    def as_dict(self) -> dict[str, float]:
        """By the names that a report shows."""
        return {
            "psnr, upsampled": self.psnr,
            "psnr, bicubic": self.psnr_bicubic,
            "psnr above bicubic": self.gain,
            "psnr, tokenizer at that size": self.psnr_tokenizer,
            "codes as in the true picture": self.code_accuracy,
            "seconds per clip": self.seconds,
        }


def evaluate_upsampling(
    examples: Iterable[UpsamplingExample],
    engine: Engine,
    video_tokenizer: VideoTokenizer,
    text_tokenizer: TextTokenizer,
    settings: Upsampling,
    *,
    batch_size: int = 8,
    keep: Callable[[Frames, Frames], None] | None = None,
    progress: Callable[[int], None] | None = None,
) -> UpsamplingReport:
    """Measure an engine's upsampling of true smaller codes.

    Args:
        examples: clips of one shape in both sizes; both are such as the tokenizer's strides divide.
        engine: started with upsampling.
        video_tokenizer: of the codes.
        text_tokenizer: of the captions.
        settings: how to draw; the seed is counted up.
        batch_size: clips at once.
        keep: called for every clip with the decoded smaller and the upsampled frames, (N, h, w, 3) and (N, H, W, 3).
        progress: called with the clips done.

    Raises:
        ConfigError: the engine cannot upsample.
    """
    engine.upsample([])
    scores: dict[str, list[Tensor]] = {"upsampled": [], "bicubic": [], "tokenizer": []}
    right: list[float] = []
    done, seconds = 0, 0.0
    for batch in _batches(examples, batch_size):
        low = video_tokenizer.encode(_pixels([one.small for one in batch])).numpy()
        truth = _pixels([one.large for one in batch])
        best = video_tokenizer.encode(truth)
        requests = [
            UpsamplingRequest(
                low=codes,
                text=() if one.caption is None else tuple(text_tokenizer.encode(one.caption)),
                settings=dataclasses.replace(settings, seed=settings.seed + done + place),
            )
            for place, (codes, one) in enumerate(zip(low, batch, strict=True))
        ]
        begun = time.perf_counter()
        high = torch.from_numpy(np.stack(engine.upsample(requests)))
        seconds += time.perf_counter() - begun
        right += (high == best).flatten(1).double().mean(1).tolist()
        small = video_tokenizer.decode(torch.from_numpy(low))
        size = truth.shape[-2:]
        bicubic = functional.interpolate(small.transpose(1, 2).flatten(0, 1), size=size, mode="bicubic")
        made = {
            "upsampled": video_tokenizer.decode(high),
            "bicubic": bicubic.unflatten(0, (len(batch), -1)).transpose(1, 2),
            "tokenizer": video_tokenizer.decode(best),
        }
        for name, video in made.items():
            scores[name].append(psnr(_rounded(video), truth))
        if keep is not None:
            for before, after in zip(_frames(small), _frames(made["upsampled"]), strict=True):
                keep(before, after)
        done += len(batch)
        if progress is not None:
            progress(done)
    means: Mapping[str, float] = {name: float(torch.cat(values).mean()) for name, values in scores.items()}
    return UpsamplingReport(
        psnr=means["upsampled"],
        psnr_bicubic=means["bicubic"],
        psnr_tokenizer=means["tokenizer"],
        code_accuracy=float(np.mean(right)),
        seconds=seconds / max(1, done),
    )


def _batches(examples: Iterable[UpsamplingExample], size: int) -> Iterator[list[UpsamplingExample]]:
    """Lists of `size` clips, the last of what is left."""
    rest = iter(examples)
    while batch := list(islice(rest, size)):
        yield batch


def _pixels(clips: Sequence[Frames]) -> Tensor:
    """(N, H, W, 3) uint8 of each clip to (B, 3, N, H, W) float32 in [-1, 1]."""
    return torch.from_numpy(np.stack(clips)).permute(0, 4, 1, 2, 3).float() / 127.5 - 1


def _rounded(video: Tensor) -> Tensor:
    """What is left of it in whole steps of 8 bits, as a file holds it."""
    return ((video + 1) * 127.5).round().clamp(0, 255) / 127.5 - 1


def _frames(video: Tensor) -> list[Frames]:
    """The inverse of `_pixels`."""
    pixels = ((video + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return list(pixels.permute(0, 2, 3, 4, 1).numpy())
