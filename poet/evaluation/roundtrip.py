"""One clip of any length and size through the tokenizers and back. Knows pixels, samples and codes, never ids.

The picture goes through in chunks, so that only its bytes, never its activations, grow with the length of the clip.

Legend: N frames of H x W pixels, S samples, T latent frames, K audio levels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from poet.errors import ConfigError
from poet.media import Clip
from poet_tokenizers.base import AudioTokenizer, VideoTokenizer
from poet_tokenizers.magvit2.model import MagViT2

__all__ = ["RoundTrip", "reconstruct_clip"]

CHUNK_LATENT_FRAMES = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class RoundTrip:
    """A clip after the round trip, and how near it is to what went in.

    Attributes:
        clip: as long and as large as the given one.
        measures: `psnr` in dB over all pixels; `sound_snr` in dB over all samples; `codes` in all.
    """

    clip: Clip
    measures: dict[str, float]


def reconstruct_clip(
    clip: Clip,
    video_tokenizer: VideoTokenizer | None,
    audio_tokenizer: AudioTokenizer | None,
    progress: Callable[[int, int], None] | None = None,
    *,
    device: str | torch.device = "cpu",
) -> RoundTrip:
    """Encode and decode a clip.

    Frames are repeated at the end to fill the last latent frame, and cut off again; likewise sizes and samples.

    Args:
        clip: pictures of any size and number, sound at the audio tokenizer's rate.
        video_tokenizer: may be None where the clip has no picture.
        audio_tokenizer: may be None where it has no sound.
        progress: called with (frames done, frames in all).
        device: of the tokenizers.

    Raises:
        ConfigError: a tokenizer is missing, or the sound has another rate.
    """
    frames, samples, measures = clip.frames, clip.samples, dict[str, float]()
    codes = 0
    if frames is not None:
        if video_tokenizer is None:
            raise ConfigError("a clip with a picture needs a video tokenizer.")
        rebuilt, count = _through_video(frames, video_tokenizer, progress, device)
        # Frame by frame: the difference of a whole clip would take four times the clip's memory.
        error = sum(float(np.square(a.astype(np.float32) - b).mean()) for a, b in zip(frames, rebuilt, strict=True))
        measures["psnr"] = round(float(10 * np.log10(255**2 / max(error / len(frames), 1e-6))), 2)
        frames, codes = rebuilt, codes + count
    if samples is not None:
        if audio_tokenizer is None or clip.sample_rate != audio_tokenizer.spec.sample_rate:
            wanted = "an audio tokenizer" if audio_tokenizer is None else f"{audio_tokenizer.spec.sample_rate} Hz"
            raise ConfigError(f"a clip with sound at {clip.sample_rate} Hz needs {wanted}. Read it at that rate.")
        waveform = torch.from_numpy(samples)[None, None].to(device)
        sound_codes = audio_tokenizer.encode(waveform)
        decoded = audio_tokenizer.decode(sound_codes)[0, 0, : len(samples)].float().clamp(-1, 1).cpu().numpy()
        power = float(np.square(samples).mean())
        noise = float(np.square(samples - decoded).mean())
        measures["sound_snr"] = round(float(10 * np.log10(max(power, 1e-10) / max(noise, 1e-10))), 2)
        samples, codes = decoded, codes + sound_codes.numel()
    result = Clip(frames=frames, fps=clip.fps, samples=samples, sample_rate=clip.sample_rate)
    return RoundTrip(clip=result, measures=measures | {"codes": float(codes)})


def _through_video(
    frames: NDArray[np.uint8],
    tokenizer: VideoTokenizer,
    progress: Callable[[int, int], None] | None,
    device: str | torch.device,
) -> tuple[NDArray[np.uint8], int]:
    """(N, H, W, 3) uint8 to the same after the round trip, and the number of codes."""
    height, width = frames.shape[1:3]
    codes = 0
    pieces: list[NDArray[np.uint8]] = []
    # Only a tokenizer that remembers what went before can be given a clip in parts.
    in_parts = tokenizer if isinstance(tokenizer, MagViT2) else None
    latent_frames = CHUNK_LATENT_FRAMES if in_parts is not None else len(frames)
    chunks = (chunk.to(device) for chunk in _chunks(frames, tokenizer.spec.temporal_stride, latent_frames))

    def counted() -> Iterator[Tensor]:
        nonlocal codes
        for part in in_parts.encode_chunks(chunks) if in_parts is not None else map(tokenizer.encode, chunks):
            codes += part.numel()
            yield part

    for video in in_parts.decode_chunks(counted()) if in_parts is not None else map(tokenizer.decode, counted()):
        pixels = ((video[0, ..., :height, :width] + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
        pieces.append(pixels.permute(1, 2, 3, 0).cpu().numpy())
        if progress is not None:
            progress(min(len(frames), sum(len(piece) for piece in pieces)), len(frames))
    return np.concatenate(pieces)[: len(frames)], codes


def _chunks(frames: NDArray[np.uint8], stride: int, latent_frames: int) -> Iterator[Tensor]:
    """The clip as (1, 3, n, H, W) in [-1, 1]: first 1 + k * stride frames, then k * stride, the last frame repeated."""
    missing = -(len(frames) - 1) % stride
    place = 0
    while place < len(frames):
        count = latent_frames * stride + (1 if place == 0 else 0)
        chunk = frames[place : place + count]
        place += count
        if place >= len(frames):
            chunk = np.concatenate([chunk, np.repeat(chunk[-1:], missing, axis=0)])
        yield torch.from_numpy(chunk).permute(3, 0, 1, 2)[None].float() / 127.5 - 1
