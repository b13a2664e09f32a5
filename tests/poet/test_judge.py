"""The judge is right about what Toybox draws, can be wrong, and says so when there is nothing to judge."""

import functools
from collections.abc import Sequence

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from poet.data import toybox
from poet.errors import ShapeError
from poet.evaluation import judge_picture, judge_sound
from poet.evaluation.judge import ATTRIBUTES, UNCLEAR, Verdict, judge, score

SYNCED = ("rises", "falls", "grows", "shrinks", "bounces")


@functools.cache
def drawn(count: int) -> tuple[toybox.ToyboxClip, ...]:
    """Half of them from either test split."""
    return tuple(toybox.draw(split, index) for split in ("seen", "unseen") for index in range(count // 2))


def media(clip: toybox.ToyboxClip) -> tuple[np.ndarray, np.ndarray]:
    assert clip.clip.frames is not None
    assert clip.clip.samples is not None
    return clip.clip.frames, clip.clip.samples


def shares_right(clips: Sequence[toybox.ToyboxClip], verdicts: Sequence[Verdict]) -> dict[str, float]:
    """Attribute -> share of clips on which it is right; "sync" -> share of clips with sync on which it is kept."""
    scores = [score(verdict, clip.attributes.as_dict()) for clip, verdict in zip(clips, verdicts, strict=True)]
    shares = {name: float(np.mean([one[name] for one in scores if name in one])) for name in ATTRIBUTES}
    shares["all"] = float(np.mean([all(one.values()) for one in scores]))
    synced = [
        verdict.sync_ok is True
        for clip, verdict in zip(clips, verdicts, strict=True)
        if clip.attributes.motion in SYNCED and clip.attributes.timbre != "silent"
    ]
    return shares | {"sync": float(np.mean(synced))}


def first(**wanted: str) -> toybox.ToyboxClip:
    return next(
        clip
        for clip in drawn(160)
        if all(clip.attributes.as_dict()[name] in value.split("|") for name, value in wanted.items())
    )


def assert_right(clips: Sequence[toybox.ToyboxClip], *, least: float) -> None:
    shares = shares_right(clips, [judge(*media(clip)) for clip in clips])
    assert min(shares.values()) >= least, shares


def test_the_judge_is_right_about_400_clips_of_both_test_splits() -> None:
    assert_right(drawn(400), least=0.995)


@pytest.mark.slow
@pytest.mark.timeout(1800)  # a minute alone on a core
def test_the_judge_is_right_about_2000_clips_of_both_test_splits() -> None:
    clips = [toybox.draw(split, 10_000 + index) for split in ("seen", "unseen") for index in range(1000)]
    for name, values in toybox.ATTRIBUTE_VALUES.items():
        assert {clip.attributes.as_dict()[name] for clip in clips} == set(values)
    shares = shares_right(clips, [judge(*media(clip)) for clip in clips])
    print(shares)
    assert min(shares.values()) >= 0.995, shares


def test_the_judge_has_its_own_copy_of_the_table_and_it_is_that_of_toybox() -> None:
    assert judge_picture.COLOURS == toybox.COLOURS
    assert judge_picture.BACKGROUNDS == toybox.BACKGROUNDS
    assert judge_picture.SHAPES == toybox.SHAPES
    assert judge_sound.PITCHES == toybox.PITCHES
    assert judge_sound.TIMBRES == toybox.TIMBRES
    assert tuple(toybox.ATTRIBUTE_VALUES) == ATTRIBUTES


def test_the_track_is_where_the_object_was_drawn() -> None:
    for clip in drawn(400)[::23]:
        verdict, track = judge(*media(clip)), clip.trajectory
        np.testing.assert_allclose(verdict.x, track.x, atol=0.3)
        np.testing.assert_allclose(verdict.y, track.y, atol=0.3)
        np.testing.assert_allclose(verdict.half_width, track.half_width, atol=0.3)


def test_contacts_and_notes_of_a_bounce_are_found_to_the_hundredth_of_a_second() -> None:
    bounces = [clip for clip in drawn(400) if clip.attributes.motion == "bounces"]
    assert len(bounces) > 20
    for clip in bounces:
        verdict = judge(*media(clip))
        np.testing.assert_allclose(verdict.contacts, clip.trajectory.contacts, atol=0.01)
        if clip.attributes.timbre != "silent":
            np.testing.assert_allclose(verdict.onsets, clip.trajectory.contacts, atol=0.015)


def test_strings_and_bells_are_heard_every_half_second() -> None:
    clip = first(timbre="string|bell", motion="stays still|circles|moves left|moves right")
    np.testing.assert_allclose(judge(*media(clip)).onsets, (0.0, 0.5, 1.0, 1.5, 2.0), atol=0.015)


def test_the_pitch_track_is_in_hertz() -> None:
    clip = first(timbre="buzzer", motion="moves left|moves right|stays still|circles")
    track = judge(*media(clip)).pitch_track
    assert np.nanmedian(track) == pytest.approx(toybox.PITCHES[clip.attributes.pitch], rel=0.01)


@pytest.mark.parametrize("size", [32, 96, 128])
def test_a_clip_of_another_resolution_is_judged_the_same(size: int) -> None:
    for clip in drawn(400)[::37]:
        frames, samples = media(clip)
        places = (np.arange(size) + 0.5) * 64 / size
        if size < 64:
            resized = frames.reshape(17, size, 64 // size, size, 64 // size, 3).mean(axis=(2, 4)).astype(np.uint8)
        else:
            resized = frames[:, places.astype(int)][:, :, places.astype(int)]
        assert resized.shape[1:3] == (size, size)
        verdict, original = judge(resized, samples), judge(frames, samples)
        if size == 32 and clip.attributes.size == "small":  # a star 7 pixels wide has no points
            assert verdict.motion == original.motion
            continue
        assert verdict.attributes() == original.attributes()
        np.testing.assert_allclose(verdict.x, original.x, atol=0.6)


def test_another_clips_sound_fails_timbre_pitch_and_sync() -> None:
    clips = drawn(400)[::3]
    others = clips[1:] + clips[:1]
    swapped = [judge(media(clip)[0], media(other)[1]) for clip, other in zip(clips, others, strict=True)]
    shares = shares_right(clips, swapped)
    assert shares["timbre"] < 0.35
    assert shares["pitch"] < 0.45
    assert shares["sync"] < 0.3
    assert shares["motion"] >= 0.995


def test_a_late_note_is_out_of_sync() -> None:
    clip = first(motion="bounces", timbre="bell|string")
    frames, samples = media(clip)
    verdict = judge(frames, np.roll(samples, 16_000 * 3 // 10))
    assert verdict.sync is not None
    assert verdict.sync > 0.2
    assert verdict.sync_ok is False
    slightly = judge(frames, np.roll(samples, 16_000 // 20))
    assert slightly.sync == pytest.approx(0.05, abs=0.015)
    assert slightly.sync_ok is True


def test_a_missing_note_is_out_of_sync() -> None:
    clip = next(clip for clip in drawn(400) if len(clip.trajectory.contacts) > 1 and clip.attributes.timbre != "silent")
    frames, samples = media(clip)
    halved = samples.copy()
    halved[int(16_000 * (clip.trajectory.contacts[1] - 0.05)) :] = 0
    assert judge(frames, halved).sync_ok is False


def test_a_constant_tone_does_not_follow_what_rises_or_grows() -> None:
    tone = (0.5 * np.sin(2 * np.pi * 440 * np.arange(34_000) / 16_000)).astype(np.float32)
    for motion in ("rises", "falls", "grows", "shrinks"):
        verdict = judge(media(first(motion=motion))[0], tone)
        assert (verdict.motion, verdict.timbre, verdict.pitch) == (motion, "flute", "middle")
        assert (verdict.sync, verdict.sync_ok) == (0.0, False)


def test_a_sound_played_backwards_runs_against_the_picture() -> None:
    for motion in ("rises", "falls", "grows", "shrinks"):
        frames, samples = media(first(motion=motion, timbre="flute|buzzer"))
        verdict = judge(frames, samples[::-1])
        assert verdict.sync is not None
        assert verdict.sync < -0.9


def test_a_black_clip_with_silence_shows_no_object_and_is_silent() -> None:
    verdict = judge(np.zeros((17, 64, 64, 3), np.uint8), np.zeros(34_000, np.float32))
    assert verdict.attributes() == {
        "colour": UNCLEAR,
        "shape": UNCLEAR,
        "size": UNCLEAR,
        "background": "black",
        "motion": UNCLEAR,
        "timbre": "silent",
        "pitch": UNCLEAR,
    }
    assert (verdict.sync, verdict.sync_ok, verdict.onsets, verdict.contacts) == (None, None, (), ())
    assert np.isnan(verdict.x).all()
    assert np.isnan(verdict.pitch_track).all()


def test_noise_is_unclear_in_every_attribute() -> None:
    for seed in range(5):
        rng = np.random.default_rng(seed)
        frames = rng.integers(0, 256, (17, 64, 64, 3)).astype(np.uint8)
        smooth = gaussian_filter(rng.normal(0, 900, frames.shape), (1, 4, 4, 0)).clip(-127, 127)
        hiss = rng.normal(0, 0.1 + 0.05 * seed, 34_000).clip(-1, 1)
        for picture in (frames, (128 + smooth).astype(np.uint8)):
            verdict = judge(picture, hiss)
            assert {verdict.shape, verdict.motion, verdict.timbre, verdict.pitch} == {UNCLEAR}
            assert verdict.sync is None


def test_an_object_that_jumps_to_and_fro_has_no_motion_of_toybox() -> None:
    frames, samples = media(first(motion="stays still", size="small"))
    jumping = frames.copy()
    jumping[::2] = np.roll(jumping[::2], 20, axis=1)
    assert judge(jumping, samples).motion == UNCLEAR


def test_blur_flicker_and_noise_of_a_codec_hardly_matter() -> None:
    clips = drawn(400)[::5]
    rng = np.random.default_rng(3)
    verdicts = []
    for clip in clips:
        frames, samples = media(clip)
        soft = gaussian_filter(frames.astype(np.float32), (0, 1.0, 1.0, 0))
        soft = soft * rng.normal(1, 0.03, (17, 1, 1, 1)) + rng.normal(0, 5, (17, 1, 1, 3)) + rng.normal(0, 6, (3,))
        soft += rng.normal(0, 5, soft.shape)
        hiss = rng.normal(0, max(0.1 * float(np.sqrt((samples**2).mean())), 0.002), len(samples))
        verdicts.append(judge(np.clip(soft, 0, 255).astype(np.uint8), samples + hiss))
    shares = shares_right(clips, verdicts)
    assert min(shares.values()) >= 0.95, shares


def test_picture_or_sound_alone_is_judged_by_itself() -> None:
    clip = first(motion="bounces", timbre="bell")
    frames, samples = media(clip)
    seen, heard = judge(frames, None), judge(None, samples)
    assert (seen.motion, seen.timbre, seen.sync) == ("bounces", UNCLEAR, None)
    assert (heard.timbre, heard.motion, heard.sync) == ("bell", UNCLEAR, None)


def test_a_single_picture_has_no_motion_but_all_else() -> None:
    clip = first(motion="stays still")
    verdict = judge(media(clip)[0][:1], None)
    wrong = [name for name, right in score(verdict, clip.attributes.as_dict()).items() if not right]
    assert set(wrong) <= {"motion", "timbre", "pitch"}
    assert verdict.motion == UNCLEAR


def test_the_pitch_of_a_silent_clip_does_not_count() -> None:
    clip = first(timbre="silent")
    marks = score(judge(*media(clip)), clip.attributes.as_dict())
    assert "pitch" not in marks
    assert all(marks.values())
    loud = score(judge(*media(first(timbre="bell"))), clip.attributes.as_dict())
    assert loud["timbre"] is False


def test_a_hum_without_notes_does_not_go_with_a_bounce() -> None:
    hum = (0.3 * np.sin(2 * np.pi * 220 * np.arange(34_000) / 16_000)).astype(np.float32)
    verdict = judge(media(first(motion="bounces"))[0], hum)
    assert verdict.sync is not None
    assert verdict.sync > 0.125
    assert verdict.sync_ok is False


def test_what_is_no_clip_is_refused() -> None:
    with pytest.raises(ShapeError, match="Crop or resize"):
        judge(np.zeros((17, 64, 48, 3), np.uint8), None)
    with pytest.raises(ShapeError, match="uint8"):
        judge(np.zeros((17, 64, 64, 3), np.float32), None)
    with pytest.raises(ShapeError, match="mono"):
        judge(None, np.zeros((1, 34_000), np.float32))
