"""How much of a clip survives the tokenizers: pixels, sound, what a judge sees and hears, and how the codes are used.

Knows clips and codes, never ids, and nothing of any one dataset: what counts as right is up to the judge it is given.

Legend: B clips, N frames of H x W pixels, S samples, T latent frames, h x w latent places, K audio levels.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from poet.errors import ConfigError
from poet.media import Clip
from poet_tokenizers.audio_losses import mel_distance, scale_invariant_snr
from poet_tokenizers.base import AudioTokenizer, VideoTokenizer

__all__ = ["Agreement", "ClipJudge", "CodeUse", "ReconstructionReport", "evaluate_reconstruction"]

ClipJudge = Callable[[Clip, Mapping[str, str]], Mapping[str, bool]]
"""From a clip and what it should show to name -> right or wrong."""

_HIGHEST_PSNR = 100.0  # dB, of clips that come back unchanged
_AUDIBLE = 0.01  # peak below which a clip counts as silent and has no signal-to-noise ratio


@dataclasses.dataclass(frozen=True, kw_only=True)
class Agreement:
    """Of `before` clips that the judge found right before the round trip, `after` still are."""

    before: int
    after: int

    @property
    def share(self) -> float:
        """In [0, 1]; NaN where nothing was right before."""
        return self.after / self.before if self.before else math.nan


@dataclasses.dataclass(frozen=True, kw_only=True)
class CodeUse:
    """How one codebook is used.

    Attributes:
        codebook_size: codes that there are.
        used: codes that occurred.
        perplexity: exp of the entropy of the codes that occurred; codebook_size if all were equally frequent.
        total: codes counted.
    """

    codebook_size: int
    used: int
    perplexity: float
    total: int

    @property
    def share(self) -> float:
        """Share of the codebook that occurred."""
        return self.used / self.codebook_size


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReconstructionReport:
    """What the round trip kept. Measures of a missing picture or sound are NaN, their code use empty.

    Attributes:
        num_clips: clips that were measured.
        psnr: dB, mean over clips of each clip's PSNR (its squared error pooled over its pixels; 100 if unchanged).
        psnr_pooled: dB, PSNR of the squared error pooled over all pixels of all clips; bad clips weigh more.
        ssim: mean over frames, window 11, in [-1, 1].
        mel_distance: mean absolute difference of log-mel magnitudes in nepers, over all clips.
        si_snr: dB, scale-invariant signal-to-noise ratio, mean over the clips that are not silent.
        agreement: name of what is judged -> how often it stayed right.
        video_codes: use of the video codebook, or None.
        audio_codes: use of each audio level, coarse to fine.
        examples: the first clips before and after.
    """

    num_clips: int
    psnr: float
    psnr_pooled: float
    ssim: float
    mel_distance: float
    si_snr: float
    agreement: dict[str, Agreement]
    video_codes: CodeUse | None
    audio_codes: tuple[CodeUse, ...]
    examples: tuple[tuple[Clip, Clip], ...] = ()

    def as_dict(self) -> dict[str, object]:
        """Everything but the examples as plain numbers, for JSON; None where there is no number."""

        def plain(use: CodeUse) -> dict[str, object]:
            return dataclasses.asdict(use) | {"perplexity": round(use.perplexity, 1), "share": round(use.share, 4)}

        measures = {name: getattr(self, name) for name in ("psnr", "psnr_pooled", "ssim", "mel_distance", "si_snr")}
        return {
            "num_clips": self.num_clips,
            **{name: None if math.isnan(value) else round(value, 4) for name, value in measures.items()},
            "agreement": {
                name: {
                    "before": kept.before,
                    "after": kept.after,
                    "share": round(kept.share, 4) if kept.before else None,
                }
                for name, kept in self.agreement.items()
            },
            "video_codes": plain(self.video_codes) if self.video_codes else None,
            "audio_codes": [plain(use) for use in self.audio_codes],
        }


def evaluate_reconstruction(
    clips: Iterable[tuple[Clip, Mapping[str, str]]],
    video_tokenizer: VideoTokenizer | None,
    audio_tokenizer: AudioTokenizer | None,
    judge: ClipJudge | None = None,
    *,
    batch_size: int = 8,
    num_examples: int = 0,
    device: str = "cpu",
    progress: Callable[[int], None] | None = None,
) -> ReconstructionReport:
    """Send clips through the tokenizers and back and measure what they lost.

    Args:
        clips: clips, with what each should show (may be empty without a judge). Frames must number
            1 + k * temporal_stride.
        video_tokenizer: None keeps the pictures as they are and leaves them unmeasured.
        audio_tokenizer: likewise for sound; its sample rate must be the clips'.
        judge: asked before and after the round trip; None leaves the agreement empty.
        batch_size: clips that go through the tokenizers at once.
        num_examples: how many pairs to keep for looking at.
        device: where the tokenizers are.
        progress: called with the number of clips done after each batch.

    Raises:
        ConfigError: no clips, or sound of another rate than the audio tokenizer's.
        ShapeError: frames that do not fit the video tokenizer.
    """
    meter = _Meter(video_tokenizer, audio_tokenizer)
    kept: dict[str, list[int]] = {}
    examples: list[tuple[Clip, Clip]] = []
    done = 0
    for batch in _batches(clips, batch_size):
        before = [clip for clip, _ in batch]
        after = _round_trip(before, video_tokenizer, audio_tokenizer, device, meter)
        examples += list(zip(before, after, strict=True))[: num_examples - len(examples)]
        for (clip, truth), result in zip(batch, after, strict=True):
            if judge is None:
                break
            marks = judge(result, truth)
            for name, right in judge(clip, truth).items():
                counts = kept.setdefault(name, [0, 0])
                counts[0] += right
                counts[1] += right and marks.get(name, False)
        done += len(batch)
        if progress is not None:
            progress(done)
    if not done:
        raise ConfigError("a reconstruction must be measured on at least one clip, got none.")
    agreement = {name: Agreement(before=before, after=after) for name, (before, after) in kept.items()}
    return meter.report(done, agreement, tuple(examples))


def _batches(
    clips: Iterable[tuple[Clip, Mapping[str, str]]], size: int
) -> Iterator[list[tuple[Clip, Mapping[str, str]]]]:
    """Clips of one shape that follow each other, `size` at most."""
    batch: list[tuple[Clip, Mapping[str, str]]] = []
    for clip in clips:
        if batch and (len(batch) == size or _shapes(clip[0]) != _shapes(batch[0][0])):
            yield batch
            batch = []
        batch.append(clip)
    if batch:
        yield batch


def _shapes(clip: Clip) -> tuple[object, object]:
    return tuple(None if part is None else part.shape for part in (clip.frames, clip.samples))  # type: ignore[return-value]


@torch.inference_mode()
def _round_trip(
    clips: Sequence[Clip],
    video_tokenizer: VideoTokenizer | None,
    audio_tokenizer: AudioTokenizer | None,
    device: str,
    meter: _Meter,
) -> list[Clip]:
    """The clips after encoding and decoding; what they lost goes into the meter."""
    frames: list[NDArray[np.uint8] | None] = [clip.frames for clip in clips]
    samples: list[NDArray[np.float32] | None] = [clip.samples for clip in clips]
    with_picture = [i for i, one in enumerate(frames) if one is not None]
    with_sound = [i for i, one in enumerate(samples) if one is not None]
    if video_tokenizer is not None and with_picture:
        pixels = torch.from_numpy(np.stack([one for one in frames if one is not None]))  # (B, N, H, W, 3)
        video = pixels.permute(0, 4, 1, 2, 3).float() / 127.5 - 1
        codes = video_tokenizer.encode(video.to(device))
        decoded = video_tokenizer.decode(codes).float().cpu()[..., : video.shape[3], : video.shape[4]]
        rebuilt = ((decoded + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 4, 1)
        meter.add_video(codes.cpu(), pixels, rebuilt)
        for i, one in zip(with_picture, rebuilt.numpy(), strict=True):
            frames[i] = one
    if audio_tokenizer is not None and with_sound:
        rates = {clips[i].sample_rate for i in with_sound}
        if rates != {audio_tokenizer.spec.sample_rate}:
            raise ConfigError(
                f"sound must have the audio tokenizer's {audio_tokenizer.spec.sample_rate} Hz, got {sorted(rates)}. "
                "Resample the clips first."
            )
        waveform = torch.from_numpy(np.stack([one for one in samples if one is not None]))[:, None]  # (B, 1, S)
        levels = audio_tokenizer.encode(waveform.to(device))
        heard = audio_tokenizer.decode(levels).float().cpu()[..., : waveform.shape[2]].clamp(-1, 1)
        meter.add_audio(levels.cpu(), waveform, heard)
        for i, sound in zip(with_sound, heard[:, 0].numpy(), strict=True):
            samples[i] = sound
    return [
        Clip(frames=picture, fps=clip.fps, samples=sound, sample_rate=clip.sample_rate)
        for clip, picture, sound in zip(clips, frames, samples, strict=True)
    ]


class _Meter:
    """Adds up what batches of clips lost."""

    def __init__(self, video_tokenizer: VideoTokenizer | None, audio_tokenizer: AudioTokenizer | None) -> None:
        self._squared_errors: list[Tensor] = []  # one value a clip, of pixels in [0, 1]
        self._ssims: list[Tensor] = []
        self._mel_distances: list[Tensor] = []
        self._si_snrs: list[Tensor] = []
        self._video_counts = None if video_tokenizer is None else _no_counts(video_tokenizer.spec.codebook_size)
        self._audio_counts: list[Tensor] = []
        if audio_tokenizer is not None:
            spec = audio_tokenizer.spec
            self._audio_counts = [_no_counts(spec.codebook_size) for _ in range(spec.num_codebooks)]
            self._sample_rate = spec.sample_rate

    def add_video(self, codes: Tensor, before: Tensor, after: Tensor) -> None:
        """Codes (B, T, h, w) int64; before and after (B, N, H, W, 3) uint8."""
        from torchmetrics.functional.image import structural_similarity_index_measure  # seconds, for this alone

        assert self._video_counts is not None
        self._video_counts += torch.bincount(codes.flatten(), minlength=len(self._video_counts))
        one, other = before.float() / 255, after.float() / 255
        self._squared_errors.append((one - other).square().flatten(1).double().mean(dim=1))
        ssim = structural_similarity_index_measure(
            other.flatten(0, 1).permute(0, 3, 1, 2),
            one.flatten(0, 1).permute(0, 3, 1, 2),
            data_range=1.0,
            reduction="none",
        )
        assert isinstance(ssim, Tensor)
        self._ssims.append(ssim.reshape(len(one), -1).mean(dim=1))

    def add_audio(self, codes: Tensor, before: Tensor, after: Tensor) -> None:
        """Codes (B, K, T) int64; before and after (B, 1, S) float32."""
        for level, counts in enumerate(self._audio_counts):
            counts += torch.bincount(codes[:, level].flatten(), minlength=len(counts))
        self._mel_distances.append(mel_distance(after, before, self._sample_rate))
        audible = before.abs().amax(dim=(1, 2)) > _AUDIBLE
        if audible.any():
            self._si_snrs.append(scale_invariant_snr(after[audible], before[audible]).reshape(-1))

    def report(
        self, num_clips: int, agreement: dict[str, Agreement], examples: tuple[tuple[Clip, Clip], ...]
    ) -> ReconstructionReport:
        """The means over all that was added."""
        squared_error = torch.cat(self._squared_errors) if self._squared_errors else torch.tensor([math.nan])
        return ReconstructionReport(
            num_clips=num_clips,
            psnr=float(_psnr(squared_error).mean()),
            psnr_pooled=float(_psnr(squared_error.mean())),
            ssim=_mean(self._ssims),
            mel_distance=_mean(self._mel_distances),
            si_snr=_mean(self._si_snrs),
            agreement=agreement,
            video_codes=None if self._video_counts is None else _code_use(self._video_counts),
            audio_codes=tuple(_code_use(counts) for counts in self._audio_counts),
            examples=examples,
        )


def _no_counts(codebook_size: int) -> Tensor:
    return torch.zeros(codebook_size, dtype=torch.int64)


def _psnr(squared_error: Tensor) -> Tensor:
    """dB of squared errors of pixels in [0, 1]."""
    return -10 * squared_error.clamp(min=10 ** (-_HIGHEST_PSNR / 10)).log10()


def _mean(values: list[Tensor]) -> float:
    return float(torch.cat(values).mean()) if values else math.nan


def _code_use(counts: Tensor) -> CodeUse:
    total = int(counts.sum())
    shares = counts[counts > 0].double() / max(total, 1)
    perplexity = float((-(shares * shares.log()).sum()).exp()) if total else 0.0
    return CodeUse(codebook_size=len(counts), used=len(shares), perplexity=perplexity, total=total)
