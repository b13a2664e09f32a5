"""What is hidden of a scene that is learnt as one written many ids at once, by every kind of mask."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from poet.data import masking
from poet.data.masking import MASK_KINDS, MaskSampler
from poet.errors import ConfigError

T, H, W, K, A = 5, 4, 3, 2, 17
VIDEO = 1 + np.arange(T * H * W).reshape(T, H, W)
AUDIO = VIDEO.size + 3 + np.arange(K * A).reshape(K, A)
DRAWS = 400


def draws(kind: str, *, video: bool = True, audio: bool = True) -> list[NDArray[np.int64]]:
    rng, sampler = np.random.default_rng(0), MaskSampler({kind: 2.0})
    return [sampler.draw(VIDEO if video else None, AUDIO if audio else None, rng) for _ in range(DRAWS)]


@given(
    kind=st.sampled_from(MASK_KINDS),
    video=st.none() | st.tuples(st.integers(1, 6), st.integers(1, 5), st.integers(1, 5)),
    audio=st.none() | st.tuples(st.integers(1, 4), st.integers(1, 20)),
    seed=st.integers(0, 2**31),
)
def test_at_least_one_place_of_a_code_is_hidden_and_none_twice(
    kind: str, video: tuple[int, ...] | None, audio: tuple[int, ...] | None, seed: int
) -> None:
    if video is None and audio is None:
        video = (1, 1, 1)
    video_places = None if video is None else np.arange(math.prod(video)).reshape(video)
    audio_places = None if audio is None else 1000 + np.arange(math.prod(audio)).reshape(audio)
    there = {int(place) for part in (video_places, audio_places) if part is not None for place in part.ravel()}
    found = MaskSampler({kind: 1.0}).draw(video_places, audio_places, np.random.default_rng(seed)).tolist()
    assert len(found) == len(set(found)) >= 1
    assert set(found) <= there


def test_the_cosine_law_hides_two_thirds_on_average_and_the_uniform_law_half() -> None:
    shares = {kind: np.array([len(found) for found in draws(kind)]) / 94 for kind in ("cosine", "uniform")}
    # The mean of cos(pi / 2 * u) is 2 / pi; standard errors are 0.015.
    assert shares["cosine"].mean() == pytest.approx(2 / math.pi + 0.005, abs=0.05)
    assert shares["uniform"].mean() == pytest.approx(0.505, abs=0.05)
    # Under the cosine law a canvas is met with more than half of it hidden in two cases of three.
    assert (shares["cosine"] > 0.5).mean() == pytest.approx(2 / 3, abs=0.07)


def test_a_block_is_a_box_of_the_picture_and_its_stretch_of_the_sound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(masking, "_cosine", lambda _: 1.0)  # all of the block
    sampler, rng = MaskSampler({"block": 1.0}), np.random.default_rng(1)
    together = 0
    for _ in range(DRAWS):
        found = sampler.draw(VIDEO, AUDIO, rng)
        box, times = np.argwhere(np.isin(VIDEO, found)), np.argwhere(np.isin(AUDIO, found))
        for part in (box, times):
            if len(part):
                sizes = part.max(0) - part.min(0) + 1
                assert len(part) == sizes.prod()  # nothing inside it is left out
        if len(times):
            assert set(times[:, 0].tolist()) == set(range(K))
        if len(box) and len(times):
            together += 1
            first, last = box[:, 0].min() / T, (box[:, 0].max() + 1) / T
            assert times[:, 1].min() / A == pytest.approx(first, abs=1 / T)
            assert (times[:, 1].max() + 1) / A == pytest.approx(last, abs=1 / T)
    assert 0.35 * DRAWS < together < 0.65 * DRAWS


def test_frames_come_one_after_another_and_sound_after_all_of_them() -> None:
    current = set()
    for found in draws("frame"):
        hidden = np.isin(VIDEO, found).reshape(T, -1).sum(1)
        sound = np.isin(AUDIO, found).sum()
        if not hidden.any():
            assert 1 <= sound <= AUDIO.size
            current.add(T)
            continue
        frame = int(np.flatnonzero(hidden)[0])
        current.add(frame)
        assert (hidden[frame + 1 :] == H * W).all()
        assert sound == AUDIO.size
    assert current == set(range(T + 1))


def test_levels_come_from_coarse_to_fine() -> None:
    with_video = 0
    for found in draws("level"):
        hidden = np.isin(AUDIO, found).sum(1)
        level = int(np.flatnonzero(hidden)[0])
        assert (hidden[level + 1 :] == A).all()
        with_video += bool(np.isin(VIDEO, found).any())
    assert 0.4 * DRAWS < with_video < 0.6 * DRAWS


def test_kinds_that_an_output_has_no_room_for_give_way_to_one_that_it_has() -> None:
    assert all(np.isin(found, AUDIO).all() for found in draws("frame", video=False))
    assert all(np.isin(found, VIDEO).all() for found in draws("level", audio=False))


def test_kinds_come_in_the_proportion_of_their_weights() -> None:
    sampler, rng = MaskSampler({"frame": 3.0, "level": 1.0}), np.random.default_rng(0)
    # Sound is hidden in part only by "level", but for the sixth of "frame" that has come to the end of the picture.
    whole = sum(np.isin(AUDIO, sampler.draw(VIDEO, AUDIO, rng)).all() for _ in range(1000))
    assert 550 < whole < 720


@pytest.mark.parametrize("weights", [{}, {"frames": 1.0}, {"cosine": 0.0}, {"cosine": math.inf}])
def test_weights_that_cannot_be_used_are_refused(weights: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="cosine, uniform, block, frame, level"):
        MaskSampler(weights)
