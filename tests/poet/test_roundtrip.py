"""One clip through the tokenizers and back: with a tokenizer that takes parts, and with one that takes whole clips."""

from pathlib import Path

import numpy as np
import pytest
from torch import Tensor

from poet.evaluation.roundtrip import reconstruct_clip
from poet.media import Clip
from poet.testing import tiny_tokenizer_bundle
from poet_tokenizers.base import VideoSpec, VideoTokenizer


class WholeClips:
    """A tokenizer of another kind, which remembers nothing between two calls."""

    def __init__(self, inner: VideoTokenizer) -> None:
        self.inner = inner

    @property
    def spec(self) -> VideoSpec:
        return self.inner.spec

    def encode(self, video: Tensor) -> Tensor:
        return self.inner.encode(video)

    def decode(self, codes: Tensor) -> Tensor:
        return self.inner.decode(codes)


@pytest.mark.parametrize("num_frames", [1, 2, 17, 35])
def test_parts_and_whole_clips_give_the_same_pictures_of_any_size_and_length(tmp_path: Path, num_frames: int) -> None:
    tokenizer = tiny_tokenizer_bundle(tmp_path / "bundle").video_tokenizer
    frames = np.random.default_rng(0).integers(0, 255, (num_frames, 23, 37, 3), np.uint8)
    clip = Clip(frames=frames, fps=8.0, samples=None, sample_rate=1600)
    in_parts = reconstruct_clip(clip, tokenizer, None)
    whole = reconstruct_clip(clip, WholeClips(tokenizer), None)
    assert in_parts.clip.frames is not None
    assert whole.clip.frames is not None
    assert in_parts.clip.frames.shape == frames.shape
    # A sum may round differently in parts, and a pixel by one with it.
    assert abs(in_parts.clip.frames.astype(int) - whole.clip.frames.astype(int)).max() <= 1
    assert in_parts.measures["codes"] == whole.measures["codes"]
    error = np.square(frames.astype(float) - in_parts.clip.frames).mean()
    assert in_parts.measures["psnr"] == pytest.approx(10 * np.log10(255**2 / error), abs=0.006)
