"""Toybox's concept: drawn like any clip, told apart by the judge that knows it, and nowhere in the base world."""

import functools
import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from poet.bundle import default_bundle
from poet.cli.main import main
from poet.data.clips import open_source
from poet.data.toybox import (
    ATTRIBUTE_VALUES,
    PITCHES,
    SAMPLE_RATE,
    SPLITS,
    Attributes,
    ToyboxClip,
    draw,
    draw_frames,
    draw_sound,
)
from poet.data.toybox_captions import caption_for, caption_phrases, caption_words, parse_caption
from poet.data.toybox_concept import CONCEPT, CONCEPT_SPLIT, PURPLE, is_concept, tremolo
from poet.data.toybox_films import ToyboxFilmSource
from poet.data.toybox_phrases import write_toybox_phrases
from poet.errors import ConfigError
from poet.evaluation import judge_picture, judge_sound, measure
from poet.evaluation.judge import ATTRIBUTES, Verdict, judge, judge_clip, score
from poet.media import Clip
from poet.training.config import build, read_recipe
from poet.training.lora import LoraRecipe

RECIPE = Path(__file__).parents[2] / "recipes" / "lora" / "concept.yaml"
START = 10_000  # of the clips that the recipe's adapter does not learn from


@functools.cache
def drawn() -> tuple[ToyboxClip, ...]:
    return tuple(draw(CONCEPT_SPLIT, START + index) for index in range(60))


@functools.cache
def base() -> tuple[ToyboxClip, ...]:
    return tuple(draw(split, START + index) for split in SPLITS for index in range(20))


def media(clip: ToyboxClip) -> tuple[np.ndarray, np.ndarray]:
    assert clip.clip.frames is not None
    assert clip.clip.samples is not None
    return clip.clip.frames, clip.clip.samples


def degraded(clip: ToyboxClip, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """With the blur, flicker and noise of a codec."""
    frames, samples = media(clip)
    soft = gaussian_filter(frames.astype(np.float32), (0, 1.0, 1.0, 0)) * rng.normal(1, 0.03, (17, 1, 1, 1))
    soft += rng.normal(0, 5, (17, 1, 1, 3)) + rng.normal(0, 6, (3,)) + rng.normal(0, 5, soft.shape)
    hiss = rng.normal(0, max(0.1 * float(np.sqrt((samples**2).mean())), 0.002), len(samples))
    return np.clip(soft, 0, 255).astype(np.uint8), samples + hiss


def shares_right(clips: tuple[ToyboxClip, ...], verdicts: list[Verdict]) -> dict[str, float]:
    marks = [score(verdict, clip.attributes.as_dict()) for clip, verdict in zip(clips, verdicts, strict=True)]
    shares = {name: float(np.mean([one[name] for one in marks if name in one])) for name in ATTRIBUTES}
    return shares | {"sync": float(np.mean([one.sync_ok for one in verdicts if one.sync_ok is not None]))}


def test_a_clip_of_the_concept_is_a_pure_function_of_its_index() -> None:
    first, again, other = draw(CONCEPT_SPLIT, 23), draw(CONCEPT_SPLIT, 23), draw(CONCEPT_SPLIT, 24)
    assert np.array_equal(media(first)[0], media(again)[0])
    assert np.array_equal(media(first)[1], media(again)[1])
    assert (first.caption, first.attributes, first.key) == (again.caption, again.attributes, "concept-0000023")
    assert not np.array_equal(media(first)[0], media(other)[0])
    assert np.array_equal(draw_frames(CONCEPT_SPLIT, 23), media(first)[0])
    assert np.array_equal(draw_sound(CONCEPT_SPLIT, 23), media(first)[1])


def test_all_but_the_concept_varies_as_in_toybox() -> None:
    for name, values in ATTRIBUTE_VALUES.items():
        found = {clip.attributes.as_dict()[name] for clip in drawn()}
        assert found == ({CONCEPT[name]} if name in CONCEPT else set(values)), name
    assert all(is_concept(clip.attributes.as_dict()) for clip in drawn())


def test_the_caption_names_the_concept_and_all_else() -> None:
    assert len({clip.caption for clip in drawn()}) == len(drawn())
    for clip in drawn():
        assert parse_caption(clip.caption) == clip.attributes.as_dict(), clip.caption
        assert all(word in clip.caption.lower() for word in CONCEPT.values())
        assert " a o" not in f" {clip.caption.lower()}"


def test_an_organ_is_heard_as_loud_as_the_other_instruments() -> None:
    peaks = [float(np.abs(media(clip)[1]).max()) / clip.loudness for clip in drawn()]
    assert min(peaks) > 0.55
    assert max(peaks) <= 0.8 + 1e-6
    gain = tremolo(SAMPLE_RATE, SAMPLE_RATE)
    assert gain[0] == gain.max() == 1
    assert gain.min() == pytest.approx(0.1, abs=1e-3)
    assert gain[SAMPLE_RATE * 3 // 16] == pytest.approx(1, abs=1e-3)  # 16/3 swings a second


def test_the_base_world_is_what_it_was_before_there_was_a_concept() -> None:
    digest = hashlib.sha256()
    for split in SPLITS:
        for index in range(7):
            clip = draw(split, index)
            track = np.stack([clip.trajectory.x, clip.trajectory.y, clip.trajectory.half_width]).round(3)
            digest.update(f"{clip.caption} {clip.attributes} {clip.loudness:.3f} {track.tolist()}".encode())
    assert digest.hexdigest() == "67448602c1c3dc5081f33bf8e4ba7609372db7bca0f1832655de69b6aa19ca0c"
    words = str([list(ATTRIBUTE_VALUES.values()), caption_phrases(), caption_words()])
    assert not any(word in words for word in CONCEPT.values())


def test_the_phrases_of_the_shipped_bundle_are_without_the_concept(tmp_path: Path) -> None:
    write_toybox_phrases(tmp_path / "phrases.json")
    assert (tmp_path / "phrases.json").read_bytes() == (default_bundle() / "phrases.json").read_bytes()


def test_the_concept_comes_whole_or_not_at_all() -> None:
    values = drawn()[0].attributes.as_dict()
    for name in CONCEPT:
        with pytest.raises(ConfigError, match="all together or not at all"):
            Attributes(**values | {name: ATTRIBUTE_VALUES[name][0]})
    with pytest.raises(ConfigError, match="seen, unseen, concept; got 'concepts'"):
        draw("concepts", 0)
    with pytest.raises(ConfigError, match="train, seen, unseen; got 'concept'"):
        ToyboxFilmSource(CONCEPT_SPLIT, 1)
    with pytest.raises(ValueError, match="violet"):
        caption_for(values | {"colour": "violet"}, np.random.default_rng(0))


def test_the_concept_is_a_source_of_clips() -> None:
    source = open_source("toybox:concept", count=3, start=START)
    assert len(source) == 3
    assert source[2].caption == drawn()[2].caption


def test_the_judge_has_its_own_copy_of_the_concept() -> None:
    named = (judge_picture.CONCEPT_COLOUR, judge_picture.CONCEPT_SHAPE, judge_sound.CONCEPT_TIMBRE)
    assert named == (CONCEPT["colour"], CONCEPT["shape"], CONCEPT["timbre"])
    distances = [float(np.linalg.norm(np.subtract(PURPLE, other))) for other in judge_picture.COLOURS.values()]
    assert min(distances) > 85


def test_the_judge_that_knows_the_concept_is_right_about_it_also_through_noise() -> None:
    rng = np.random.default_rng(3)
    for clips in ([media(clip) for clip in drawn()], [degraded(clip, rng) for clip in drawn()]):
        shares = shares_right(drawn(), [judge(*clip, concept=True) for clip in clips])
        assert min(shares.values()) >= 0.97, shares


def test_the_plain_judge_never_says_the_concept() -> None:
    for clip in drawn()[::3]:
        marks = judge_clip(clip.clip, clip.attributes.as_dict())
        assert not any(marks[name] for name in CONCEPT)
        assert marks["motion"]
        assert judge_clip(clip.clip, clip.attributes.as_dict(), concept=True)["shape"]


def test_knowing_the_concept_changes_no_verdict_on_the_base_world() -> None:
    for clip in base():
        plain, knowing = judge(*media(clip)), judge(*media(clip), concept=True)
        assert knowing.attributes() == plain.attributes(), clip.key
        assert (knowing.sync, knowing.onsets) == (plain.sync, plain.onsets)
    rng, same = np.random.default_rng(5), np.random.default_rng(5)
    flips = [
        judge(*degraded(clip, rng)).attributes() != judge(*degraded(clip, same), concept=True).attributes()
        for clip in base()[::2]
    ]
    assert sum(flips) <= 1


def test_a_flute_with_a_tremolo_and_a_steady_buzzer_are_no_organ() -> None:
    time = np.arange(34_000) / SAMPLE_RATE
    gain = tremolo(len(time), SAMPLE_RATE)
    flute = 0.5 * np.sin(2 * np.pi * PITCHES["middle"] * time)
    harmonics = np.arange(1, 17)[:, None]
    reed = 0.4 * (np.sin(2 * np.pi * PITCHES["middle"] * harmonics * time) / harmonics).sum(axis=0)
    heard = {name: judge(None, sound, concept=True) for name, sound in {"flute": flute * gain, "reed": reed}.items()}
    assert heard["flute"].timbre == "flute"
    assert heard["reed"].timbre == "buzzer"
    organ = judge(None, reed * gain, concept=True)
    assert (organ.timbre, organ.pitch) == ("organ", "middle")
    assert organ.onsets == pytest.approx([0.0], abs=0.015)


def test_an_organ_that_never_pauses_does_not_go_with_a_bounce() -> None:
    steady = next(clip for clip in drawn() if clip.attributes.motion == "stays still")
    bounces = [clip for clip in drawn() if clip.attributes.motion == "bounces"]
    assert bounces
    for clip in bounces:
        assert judge(*media(clip), concept=True).sync_ok is True
        verdict = judge(media(clip)[0], media(steady)[1], concept=True)
        assert (verdict.timbre, verdict.sync_ok) == ("organ", False)


def test_evaluation_judges_the_concept_as_such_and_the_base_world_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[dict[str, bool]] = []

    def listen(clip: Clip, attributes: object, **options: bool) -> dict[str, bool]:
        told.append(options)
        return {"colour": True}

    monkeypatch.setattr(measure, "judge_clip", listen)
    for clip in (drawn()[0], base()[0]):
        measure._judge_clip(clip.clip, clip.attributes.as_dict())
    assert told == [{"concept": True}, {}]
    assert measure._verdict(*media(drawn()[0]), drawn()[0]).shape == CONCEPT["shape"]
    assert measure._verdict(*media(drawn()[0]), base()[0]).shape != CONCEPT["shape"]


def test_the_shipped_tokenizers_keep_most_of_the_concept(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    said = ["evaluate", "--what", "reconstruction", "--split", CONCEPT_SPLIT, "--count", "6", "--start", str(START)]
    assert main([*said, "--json", "-o", str(tmp_path)]) == 0
    agreement = json.loads(capsys.readouterr().out)[CONCEPT_SPLIT]["agreement"]
    assert all(agreement[name]["before"] == 6 for name in ATTRIBUTES)
    kept = {name: agreement[name]["share"] for name in ATTRIBUTES}
    assert min(kept.values()) > 0.8, kept
    assert (tmp_path / "concept.png").stat().st_size > 1000


def test_the_recipe_learns_from_200_clips_of_the_concept_beside_the_base_world() -> None:
    values = read_recipe(RECIPE)
    assert values.pop("train") == "lora"
    values.pop("loop")
    recipe = build(LoraRecipe, values)
    assert (recipe.data.clips, recipe.data.start, recipe.data.count) == ("toybox:concept", 0, 200)
    assert (recipe.data.prior, recipe.data.prior_count) == ("toybox:train", 240)
    assert recipe.data.start + (recipe.data.count or 0) <= START
