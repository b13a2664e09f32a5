"""Clips to token shards, offline. Reads clips while the tokenizers work, and can be stopped at any moment.

A shard covers a fixed range of the source, and the batches that are encoded together are decided inside that range. So
a run that was killed and started again hands the tokenizers the same batches as one that was not, and the files come
out byte for byte the same (on the same machine: a tokenizer's sums may differ elsewhere).

Legend: B clips, N frames, H x W pixels, S samples, T latent frames, K audio levels.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from poet.data.clips import CaptionedClip, ClipSource
from poet.data.readahead import Unreadable, read_ahead
from poet.data.shards import EncodedClip, ShardWriter, count_uncaptioned
from poet.errors import ConfigError, MediaError, ShapeError
from poet.media import Clip
from poet.model.device import parse_device
from poet.tasks import ClipGeometry
from poet_tokenizers.base import AudioTokenizer, VideoTokenizer

__all__ = [
    "EncodeReport",
    "EncodedRange",
    "RangeEncoder",
    "RangeMap",
    "TokenizerSet",
    "Tokenizers",
    "encode_source",
]


class Tokenizers(Protocol):
    """What encoding needs; a `poet.bundle.Bundle` is one."""

    @property
    def video_tokenizer(self) -> VideoTokenizer | None:
        """None leaves pictures out."""

    @property
    def audio_tokenizer(self) -> AudioTokenizer | None:
        """None leaves sound out."""

    @property
    def fingerprint(self) -> str:
        """Of the vocabulary that the codes belong to."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class TokenizerSet:
    """Tokenizers without a bundle."""

    fingerprint: str
    video_tokenizer: VideoTokenizer | None = None
    audio_tokenizer: AudioTokenizer | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncodeReport:
    """What came of it.

    Attributes:
        num_clips: clips in the shards now.
        num_resumed: those of them that an earlier run had written.
        num_shards: files.
        num_uncaptioned: clips in the shards that have no caption.
        skipped: (key, reason) of every clip that could not be read, by this run or an earlier one.
        seconds: that this run took.
    """

    num_clips: int
    num_resumed: int
    num_shards: int
    num_uncaptioned: int
    skipped: tuple[tuple[str, str], ...]
    seconds: float


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class EncodedRange:
    """What one file will hold.

    Attributes:
        clips: in the source's order.
        skipped: (key, reason) of the clips of the range that could not be read.
    """

    clips: tuple[EncodedClip, ...]
    skipped: tuple[tuple[str, str], ...]


RangeMap = Callable[[ClipSource, Sequence[range], int], Generator[EncodedRange, None, None]]
"""Encodes ranges of a source in batches of a size; the results come in the order of the ranges."""


def encode_source(
    source: ClipSource,
    tokenizers: Tokenizers,
    output_dir: str | Path,
    *,
    shard_size: int = 1000,
    batch_size: int = 8,
    progress: Callable[[int, int], None] | None = None,
    device: str | torch.device = "cpu",
    num_processes: int = 0,
    elsewhere: RangeMap | None = None,
    accepted: Callable[[], object] | None = None,
) -> EncodeReport:
    """Encode a source into a directory of token shards, or finish a directory that was begun.

    Args:
        source: the clips.
        tokenizers: they are moved to `device` if they are torch modules.
        output_dir: made if missing.
        shard_size: clips of the source that one file covers; what a stop loses at most.
        batch_size: clips of equal shape that are encoded together.
        progress: called with the clips done and the clips in all, after every batch.
        device: where the tokenizers work.
        num_processes: that read clips; 0 reads in one thread of this process, which is enough while encoding a clip
            takes as long as reading it.
        elsewhere: reads and encodes whole ranges in other places; this process only writes them down.
        accepted: called when the directory has taken the source, before anything is encoded.

    Raises:
        MediaError: not one clip of the source can be read; nothing is left behind then.
        CheckpointError: the directory belongs to another vocabulary or source, or cannot be written (a full disk).
        ConfigError: a number or device that cannot be used, other settings than those the directory was begun with,
            or clips at another sample rate than the tokenizer's.
    """
    started = time.monotonic()
    if shard_size < 1 or batch_size < 1 or num_processes < 0:
        raise ConfigError(
            "shard_size and batch_size must be at least 1 and num_processes at least 0, got "
            f"{shard_size}, {batch_size} and {num_processes}."
        )
    encoder = RangeEncoder(tokenizers, device, batch_size)
    settings = {"shard_size": shard_size, "batch_size": batch_size}
    settings |= {"video": int(encoder.video is not None), "audio": int(encoder.audio is not None)}
    total = len(source)
    with (
        ShardWriter(
            output_dir,
            fingerprint=tokenizers.fingerprint,
            source=source.name,
            source_length=total,
            settings=settings,
        ) as writer,
        contextlib.ExitStack() as stack,
    ):
        if accepted is not None:
            accepted()
        num_resumed, begun = writer.manifest.count, writer.next_index
        ranges = [range(start, min(start + shard_size, total)) for start in range(begun, total, shard_size)]

        def tell(done: int) -> None:
            if progress is not None:
                progress(done, total)

        if elsewhere is not None and ranges:
            encoded = stack.enter_context(contextlib.closing(elsewhere(source, ranges, batch_size)))
        else:
            items = read_ahead(source, begun, 4 * batch_size, num_processes, shard_size)
            stack.enter_context(contextlib.closing(items))
            encoded = (encoder.encode(one, items, tell) for one in ranges)
        for indices, made in zip(ranges, encoded, strict=True):
            writer.write(made.clips, indices.stop, made.skipped)
            tell(indices.stop)
        manifest = writer.manifest
        if not manifest.count:
            writer.discard()
            raise MediaError(
                f"at least one of the {total} clips of {source.name} must be readable, none is; {output_dir} was not "
                f"written. {_reasons(manifest.skipped)}"
            )
        num_uncaptioned = count_uncaptioned(output_dir, manifest)
    return EncodeReport(
        num_clips=manifest.count,
        num_resumed=num_resumed,
        num_shards=len(manifest.shards),
        num_uncaptioned=num_uncaptioned,
        skipped=manifest.skipped,
        seconds=time.monotonic() - started,
    )


def _reasons(skipped: Sequence[tuple[str, str]]) -> str:
    """Why the first three clips could not be read."""
    more = [f"and {len(skipped) - 3} more"] if len(skipped) > 3 else []
    return "; ".join([*(f"{key}: {reason}" for key, reason in skipped[:3]), *more])


class RangeEncoder:
    """Collects clips of equal shape and encodes them in batches.

    Args:
        tokenizers: they are moved to `device` if they are torch modules.
        device: where they work.
        batch_size: clips of equal shape that are encoded together.

    Raises:
        ConfigError: there is no tokenizer, or no such device.
    """

    def __init__(self, tokenizers: Tokenizers, device: str | torch.device, batch_size: int) -> None:
        device = parse_device(device)
        self.video, self.audio = tokenizers.video_tokenizer, tokenizers.audio_tokenizer
        if self.video is None and self.audio is None:
            raise ConfigError("there must be a video or an audio tokenizer to encode with, got neither.")
        parts: tuple[object, ...] = (self.video, self.audio)
        for part in parts:
            if isinstance(part, torch.nn.Module):
                part.to(device).eval()
        self._device = device
        self._batch_size = batch_size
        self._waiting: dict[object, list[tuple[int, CaptionedClip, Clip]]] = {}

    def encode(
        self, indices: range, items: Iterator[CaptionedClip | Unreadable], tell: Callable[[int], None] | None = None
    ) -> EncodedRange:
        """Encode the clips of a range.

        Args:
            indices: the range.
            items: its clips are taken from here, in order; no more.
            tell: called with the number that is done, from the source's beginning.

        Raises:
            ConfigError: clips at another sample rate than the tokenizer's.
        """
        clips: dict[int, EncodedClip] = {}
        skipped: dict[int, tuple[str, str]] = {}
        for index in indices:
            item = next(items)
            reason = item if isinstance(item, Unreadable) else self._add(index, item, clips)
            if reason is not None:
                skipped[index] = (reason.key, reason.reason)
            if tell is not None:
                tell(indices.start + len(clips) + len(skipped))
        self._flush(clips)
        return EncodedRange(
            clips=tuple(clips[i] for i in sorted(clips)), skipped=tuple(skipped[i] for i in sorted(skipped))
        )

    def _add(self, index: int, item: CaptionedClip, done: dict[int, EncodedClip]) -> Unreadable | None:
        """Take a clip in; encode its batch into `done` when it is full. Returns why not, if it does not fit."""
        try:
            clip = self._fit(item.clip)
        except ShapeError as error:
            return Unreadable(item.key, str(error))
        shape = tuple(None if part is None else part.shape for part in (clip.frames, clip.samples))
        batch = self._waiting.setdefault(shape, [])
        batch.append((index, item, clip))
        if len(batch) == self._batch_size:
            done.update(self._encode(self._waiting.pop(shape)))
        return None

    def _flush(self, done: dict[int, EncodedClip]) -> None:
        """Encode what is left."""
        for batch in self._waiting.values():
            done.update(self._encode(batch))
        self._waiting.clear()

    def _fit(self, clip: Clip) -> Clip:
        """The clip without what no tokenizer takes, cut to whole latent frames, its sound as long as its picture."""
        frames = clip.frames if self.video is not None else None
        samples = clip.samples if self.audio is not None else None
        if frames is None and samples is None:
            raise ShapeError("the clip has neither a picture nor a sound that a tokenizer takes.")
        if self.video is not None and frames is not None:
            frames = frames[: len(frames) - (len(frames) - 1) % self.video.spec.temporal_stride]
        if self.audio is not None and samples is not None:
            spec = self.audio.spec
            if clip.sample_rate != spec.sample_rate:
                raise ConfigError(
                    f"clips must have {spec.sample_rate} samples a second, got {clip.sample_rate}. Open the source "
                    "with the tokenizer's sample rate."
                )
            if self.video is not None and frames is not None:
                geometry = ClipGeometry(
                    num_frames=frames.shape[0],
                    fps=clip.fps,
                    height=frames.shape[1],
                    width=frames.shape[2],
                    temporal_stride=self.video.spec.temporal_stride,
                    spatial_stride=self.video.spec.spatial_stride,
                    sample_rate=spec.sample_rate,
                    hop_length=spec.hop_length,
                )
                samples = _fit_samples(samples, geometry.num_samples(frames.shape[0]), spec.hop_length)
        return dataclasses.replace(clip, frames=frames, samples=samples)

    @torch.inference_mode()
    def _encode(self, batch: Sequence[tuple[int, CaptionedClip, Clip]]) -> Iterator[tuple[int, EncodedClip]]:
        video = [clip.frames for _, _, clip in batch if clip.frames is not None]
        audio = [clip.samples for _, _, clip in batch if clip.samples is not None]
        video_codes = audio_codes = None
        if self.video is not None and video:
            video_codes = _to_numpy(self.video.encode(self._to_pixels(video)), len(batch), 4)
        if self.audio is not None and audio:
            waveform = torch.from_numpy(np.stack(audio)[:, None]).to(self._device, torch.float32)
            audio_codes = _to_numpy(self.audio.encode(waveform), len(batch), 3)
        encoded = []
        for place, (index, item, clip) in enumerate(batch):
            seen = None if video_codes is None else video_codes[place]
            height_width = None if clip.frames is None else (clip.frames.shape[1], clip.frames.shape[2])
            row = EncodedClip(
                key=item.key,
                text=item.caption,
                video_codes=seen,
                audio_codes=None if audio_codes is None else audio_codes[place],
                fps=None if seen is None else float(clip.fps),
                resolution=height_width,
            )
            encoded.append((index, row))
        return iter(encoded)

    def _to_pixels(self, frames: list[NDArray[np.uint8]]) -> Tensor:
        """B times (N, H, W, 3) uint8 to (B, 3, N, H, W) float32 in [-1, 1], converted on the device."""
        pixels = torch.from_numpy(np.stack(frames)).to(self._device)
        return pixels.permute(0, 4, 1, 2, 3).to(torch.float32).div_(127.5).sub_(1.0).contiguous()


def _fit_samples(samples: NDArray[np.float32], wanted: int, hop_length: int) -> NDArray[np.float32]:
    missing = wanted - len(samples)
    if missing > hop_length:
        raise ShapeError(
            f"the sound must last as long as the picture, {wanted} samples, got {len(samples)}. Cut the clip shorter."
        )
    return np.pad(samples, (0, missing)) if missing > 0 else samples[:wanted]


def _to_numpy(codes: Tensor, num_clips: int, axes: int) -> NDArray[np.int32]:
    if codes.ndim != axes or len(codes) != num_clips:
        form = "(B, T, H, W)" if axes == 4 else "(B, K, T)"
        raise ShapeError(f"a tokenizer must return codes {form} for B = {num_clips} clips, got {tuple(codes.shape)}.")
    return codes.to("cpu", torch.int32).numpy()
