"""Frames and samples to codes and back, as clips need it: one clip at a time, pictures latent frame by latent frame.

That way a clip's pixels depend on its codes alone, not on what is decoded beside it, and are the same whether the codes
came all at once or one latent frame after another.

Legend: N video frames of H x W pixels, S audio samples, T latent frames of h x w places, K audio levels, A latents.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import torch
from numpy.typing import NDArray

from poet.bundle import Bundle

__all__ = ["ClipCodecs"]


class ClipCodecs:
    """A bundle's video and audio tokenizer.

    Args:
        bundle: that has them.
        device: to run them on.
    """

    def __init__(self, bundle: Bundle, device: str = "cpu") -> None:
        self._device, self._geometry = device, bundle.geometry()
        self._video = bundle.load_video_tokenizer(device)
        self._audio = bundle.load_audio_tokenizer(device)

    def encode_frames(self, frames: NDArray[np.uint8]) -> NDArray[np.int64]:
        """(N, H, W, 3) uint8, N = 1 + k * temporal_stride, to (T, h, w) codes."""
        pixels = torch.from_numpy(frames).permute(3, 0, 1, 2)[None].float() / 127.5 - 1
        codes: NDArray[np.int64] = self._video.encode(pixels.to(self._device))[0].cpu().numpy()
        return codes

    def encode_samples(self, samples: NDArray[np.float32]) -> NDArray[np.int64]:
        """(S,) float32 in [-1, 1] to (K, A) codes."""
        waveform = torch.from_numpy(samples)[None, None].to(self._device)
        codes: NDArray[np.int64] = self._audio.encode(waveform)[0].cpu().numpy()
        return codes

    def decode_latents(self, latents: Iterable[NDArray[np.int64]]) -> Iterator[NDArray[np.uint8]]:
        """Decode a clip while its codes arrive.

        Args:
            latents: (h, w) codes of one latent frame after another.

        Yields:
            (n, H, W, 3) uint8: one frame for the first, `temporal_stride` for each later one. A tokenizer that cannot
            decode in parts gives them all at the end.
        """
        chunks = (torch.from_numpy(np.ascontiguousarray(codes))[None, None].to(self._device) for codes in latents)
        in_parts = getattr(self._video, "decode_chunks", None)
        if in_parts is None:
            yield self._to_frames(self._video.decode(torch.cat(list(chunks), 1)))
            return
        for video in in_parts(chunks):
            yield self._to_frames(video)

    def decode_video(self, codes: NDArray[np.int64]) -> NDArray[np.uint8]:
        """(T, h, w) codes to (N, H, W, 3) uint8."""
        return np.concatenate(list(self.decode_latents(codes)))

    def decode_audio(self, codes: NDArray[np.int64]) -> NDArray[np.float32]:
        """(K, A) codes to (S,) float32 in [-1, 1]."""
        waveform = self._audio.decode(torch.from_numpy(codes)[None].to(self._device))[0, 0]
        samples: NDArray[np.float32] = waveform.float().clamp(-1, 1).cpu().numpy()
        return samples

    def _to_frames(self, video: torch.Tensor) -> NDArray[np.uint8]:
        # A tokenizer pads what its stride does not divide; an upsampled picture is as many times larger.
        height, width = self._geometry.resolution
        stride = self._geometry.spatial_stride
        scale = max(1, round(video.shape[-2] / (-(-height // stride) * stride)))
        cut = video[0, :, :, : scale * height, : scale * width]
        pixels: NDArray[np.uint8] = ((cut + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).cpu().numpy()
        return np.ascontiguousarray(pixels.transpose(1, 2, 3, 0))
