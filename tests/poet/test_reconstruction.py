"""What a round trip through tokenizers keeps: all of it through a lossless one, little through a broken one."""

import functools
import math
from collections.abc import Mapping

import numpy as np
import pytest
import torch
from torch import Tensor

from poet.data.toybox import ToyboxSource
from poet.errors import ConfigError
from poet.evaluation.judge import judge_clip
from poet.evaluation.reconstruction import ReconstructionReport, evaluate_reconstruction
from poet.media import Clip
from poet_tokenizers.base import AudioSpec, VideoSpec


class LosslessVideo:
    """Every byte of every pixel is a code."""

    spec = VideoSpec(kind="fake", codebook_size=256, temporal_stride=1, spatial_stride=1)

    def encode(self, video: Tensor) -> Tensor:
        return ((video.transpose(1, 2).flatten(3) + 1) * 127.5).round().long()  # (B, N, 3, H * W)

    def decode(self, codes: Tensor) -> Tensor:
        batch, frames, _, places = codes.shape
        side = math.isqrt(places)
        return codes.reshape(batch, frames, 3, side, side).transpose(1, 2).float() / 127.5 - 1


class MirroredVideo(LosslessVideo):
    """Right becomes left, and red becomes blue."""

    def decode(self, codes: Tensor) -> Tensor:
        return super().decode(codes).flip(-1).flip(1)


class RoundingAudio:
    """Two levels of 256 codes: 16 bits a sample."""

    spec = AudioSpec(kind="fake", sample_rate=16_000, hop_length=1, num_codebooks=2, codebook_size=256)

    def encode(self, waveform: Tensor) -> Tensor:
        whole = ((waveform[:, 0] + 1) * 32767.5).round().long()
        return torch.stack([whole // 256, whole % 256], dim=1)

    def decode(self, codes: Tensor) -> Tensor:
        return ((codes[:, :1] * 256 + codes[:, 1:]).float() / 32767.5 - 1).clamp(-1, 1)


class NoisyAudio(RoundingAudio):
    """Adds hiss as loud as the sound."""

    def decode(self, codes: Tensor) -> Tensor:
        sound = super().decode(codes)
        return sound + 0.3 * torch.randn(sound.shape, generator=torch.Generator().manual_seed(3))


@functools.cache
def clips() -> tuple[tuple[Clip, Mapping[str, str]], ...]:
    source = ToyboxSource("seen", 13)
    return tuple((source[i].clip, source[i].attributes.as_dict()) for i in range(13))


def right(report: ReconstructionReport, name: str) -> float:
    return report.agreement[name].share


@functools.cache
def lossless() -> ReconstructionReport:
    return evaluate_reconstruction(clips(), LosslessVideo(), RoundingAudio(), judge_clip, batch_size=5, num_examples=2)


def test_a_lossless_round_trip_loses_nothing() -> None:
    report = lossless()
    assert report.num_clips == 13
    assert report.psnr == report.psnr_pooled == pytest.approx(100.0)
    assert report.ssim == pytest.approx(1.0, abs=1e-4)
    assert report.mel_distance < 0.01
    assert report.si_snr > 60
    for name, kept in report.agreement.items():
        assert kept.before == kept.after > 0, name
    assert report.agreement["colour"].before == 13


def test_a_broken_video_tokenizer_loses_colour_and_direction_but_not_the_background_or_sound() -> None:
    report = evaluate_reconstruction(clips(), MirroredVideo(), RoundingAudio(), judge_clip)
    assert report.psnr < 25
    assert report.ssim < lossless().ssim - 0.05
    assert right(report, "colour") < 0.8
    assert right(report, "timbre") == 1.0
    assert right(report, "shape") == 1.0


def test_a_broken_audio_tokenizer_loses_timbre_but_not_the_picture() -> None:
    report = evaluate_reconstruction(clips(), LosslessVideo(), NoisyAudio(), judge_clip)
    assert report.si_snr < 10
    assert report.mel_distance > 1
    assert right(report, "timbre") < 0.7
    assert right(report, "motion") == 1.0


def test_psnr_is_that_of_the_definition_and_pooling_weighs_bad_clips_more() -> None:
    class Dimmed(LosslessVideo):
        def decode(self, codes: Tensor) -> Tensor:
            lowered = codes.clone()
            lowered[0] = (lowered[0] - 51).clamp(min=0)  # the first clip of the batch alone, by a fifth
            return super().decode(lowered)

    gray = np.full((5, 64, 64, 3), 102, np.uint8)
    pair: list[tuple[Clip, Mapping[str, str]]] = [
        (Clip(gray, 8.0, None, 16_000), {}),
        (Clip(gray, 8.0, None, 16_000), {}),
    ]
    report = evaluate_reconstruction(pair, Dimmed(), None)
    bad = -10 * math.log10(0.2**2)
    assert report.psnr == pytest.approx((bad + 100) / 2, abs=0.01)
    assert report.psnr_pooled == pytest.approx(-10 * math.log10(0.2**2 / 2), abs=0.01)


def test_code_use_counts_distinct_codes_of_every_level() -> None:
    frames = np.zeros((5, 16, 16, 3), np.uint8)
    frames[..., 1] = 7
    frames[..., 2] = 200
    samples = np.where(np.arange(3200) % 2, 0.25, -0.25).astype(np.float32)
    report = evaluate_reconstruction([(Clip(frames, 8.0, samples, 16_000), {})], LosslessVideo(), RoundingAudio())
    assert report.video_codes is not None
    assert (report.video_codes.used, report.video_codes.codebook_size) == (3, 256)
    assert report.video_codes.perplexity == pytest.approx(3.0)
    assert report.video_codes.total == frames.size
    assert [use.used for use in report.audio_codes] == [2, 2]
    assert report.audio_codes[0].perplexity == pytest.approx(2.0)
    assert report.agreement == {}


def test_examples_are_the_first_clips_before_and_after() -> None:
    examples = lossless().examples
    assert len(examples) == 2
    before, after = examples[1]
    assert before is clips()[1][0]
    assert np.array_equal(np.asarray(before.frames), np.asarray(after.frames))


def test_the_report_becomes_plain_numbers() -> None:
    plain = lossless().as_dict()
    assert plain["psnr"] == 100.0
    assert isinstance(plain["agreement"], dict)
    assert plain["agreement"]["shape"] == {"before": 13, "after": 13, "share": 1.0}
    alone = evaluate_reconstruction(clips()[:2], LosslessVideo(), None).as_dict()
    assert alone["si_snr"] is None
    assert alone["audio_codes"] == []


def test_progress_counts_clips() -> None:
    seen: list[int] = []
    evaluate_reconstruction(clips()[:7], LosslessVideo(), None, batch_size=3, progress=seen.append)
    assert seen == [3, 6, 7]


def test_what_cannot_be_measured_is_refused() -> None:
    with pytest.raises(ConfigError, match="at least one clip"):
        evaluate_reconstruction([], LosslessVideo(), None)
    slow = Clip(frames=None, fps=8.0, samples=np.zeros(800, np.float32), sample_rate=8000)
    with pytest.raises(ConfigError, match="16000 Hz"):
        evaluate_reconstruction([(slow, {})], None, RoundingAudio())
