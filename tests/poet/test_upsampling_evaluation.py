"""The measures of upsampling, with an engine and a tokenizer whose right answers are known."""

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from torch import Tensor

from poet.evaluation.superresolution import UpsamplingExample, evaluate_upsampling
from poet.generation.upsample import Upsampling, UpsamplingRequest

N, H, W = 3, 4, 6


class Lossless:
    """A tokenizer whose codes are the pixels' own grey values, one a pixel."""

    def encode(self, video: Tensor) -> Tensor:
        """(B, 3, N, H, W) to (B, N, H, W)."""
        return ((video[:, 0] + 1) * 127.5).round().long()

    def decode(self, codes: Tensor) -> Tensor:
        """The inverse, for grey pictures."""
        return (codes.float() / 127.5 - 1)[:, None].expand(-1, 3, -1, -1, -1)


class Enlarger:
    """Repeats every code; remembers texts and seeds."""

    name = "enlarger"

    def __init__(self, shift: int = 0) -> None:
        self.shift = shift
        self.asked: list[tuple[tuple[int, ...], int]] = []

    def upsample(
        self, requests: Sequence[UpsamplingRequest], progress: Callable[[int, int], None] | None = None
    ) -> list[NDArray[np.int64]]:
        self.asked += [(one.text, one.settings.seed) for one in requests]
        return [one.low.repeat(2, 1).repeat(2, 2) + self.shift for one in requests]


def clips(count: int) -> list[UpsamplingExample]:
    """Small pictures of noise, and large ones that are the small ones with every pixel twice in height and width."""
    found = []
    for number in range(count):
        grey = np.random.default_rng(number).integers(5, 250, (N, H, W, 1), dtype=np.uint8)
        small = grey.repeat(3, 3)
        found.append(UpsamplingExample(small=small, large=small.repeat(2, 1).repeat(2, 2), caption="ab"[: number % 3]))
    return found


def measure(engine: Any, count: int = 5, **options: Any) -> Any:
    text = SimpleNamespace(encode=lambda words: [ord(letter) for letter in words])
    return evaluate_upsampling(
        clips(count),
        engine,
        Lossless(),
        text,
        Upsampling(seed=7),
        batch_size=2,
        **options,  # type: ignore[arg-type]
    )


def test_an_upsampler_that_is_right_everywhere_is_as_good_as_the_tokenizer_and_better_than_bicubic() -> None:
    engine, done, kept = Enlarger(), list[int](), list[tuple[Any, Any]]()
    report = measure(engine, keep=lambda before, after: kept.append((before, after)), progress=done.append)
    assert report.psnr == report.psnr_tokenizer == pytest.approx(106, abs=0.1)  # nothing is lost: the floor of an error
    assert report.psnr_bicubic < 30
    assert report.gain == report.psnr - report.psnr_bicubic
    assert report.code_accuracy == 1
    assert done == [2, 4, 5]
    assert engine.asked == [((), 7), ((97,), 8), ((97, 98), 9), ((), 10), ((97,), 11)]
    for (before, after), clip in zip(kept, clips(5), strict=True):
        np.testing.assert_array_equal(before, clip.small)
        np.testing.assert_array_equal(after, clip.large)


def test_the_error_is_that_of_the_pixels_and_wrong_codes_are_counted() -> None:
    report = measure(Enlarger(shift=5))
    assert report.psnr == pytest.approx(20 * np.log10(255 / 5), abs=0.01)
    assert report.code_accuracy == 0
    assert report.as_dict()["psnr above bicubic"] == report.psnr - report.psnr_bicubic
