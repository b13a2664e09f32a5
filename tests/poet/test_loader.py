"""The order of batches can be entered anywhere, ranks share it without overlap, and grouping saves padding."""

import itertools
import json
import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from poet.data.loader import Batch, SceneLoader
from poet.data.packing import MODALITIES, SceneSampler
from poet.data.shards import EncodedClip
from poet.errors import ConfigError, ShapeError
from poet.sequence import unpack
from poet.testing import tiny_geometry, tiny_vocabulary
from poet_tokenizers.base import TextSpec

VOCABULARY = tiny_vocabulary()
WEIGHTS = {"text_to_video_audio": 3.0, "text_to_image": 1.0, "video_continuation": 2.0, "text_to_audio": 1.0}


class WordTokenizer:
    """One piece a word."""

    spec = TextSpec(kind="words", num_pieces=43)

    def encode(self, text: str) -> list[int]:
        return [sum(map(ord, word)) % 43 for word in text.split()]

    def decode(self, codes: list[int]) -> str:
        raise AssertionError("loading never decodes")


def make_clips(count: int) -> list[EncodedClip]:
    clips = []
    for index in range(count):
        rng = np.random.default_rng(index)
        geometry = tiny_geometry(VOCABULARY, num_latent_frames=2 + index % 4)
        latents = geometry.num_audio_latents(geometry.num_frames)
        clips.append(
            EncodedClip(
                key=f"clip-{index}",
                text="word " * (1 + index % 23),
                video_codes=rng.integers(0, 31, geometry.latent_shape, dtype=np.int32),
                audio_codes=rng.integers(0, 13, (3, latents), dtype=np.int32),
                fps=8.0,
                resolution=geometry.resolution,
            )
        )
    return clips


CLIPS = make_clips(101)


def loader(clips: list[EncodedClip] = CLIPS, weights: dict[str, float] = WEIGHTS, **options: object) -> SceneLoader:
    sampler = SceneSampler(VOCABULARY, WordTokenizer(), weights, seed=3)
    return SceneLoader(clips, sampler, **({"micro_batch_size": 5, "window_batches": 4} | options))  # type: ignore[arg-type]


def rows(batches: Iterator[Batch], count: int | None = None) -> list[list[int]]:
    return [batch["rows"].tolist() for batch in itertools.islice(batches, count)]


def assert_same(one: Batch, other: Batch) -> None:
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name  # type: ignore[literal-required]


def test_a_batch_holds_whole_scenes_and_says_what_every_id_is() -> None:
    for batch in itertools.islice(loader(), 20):
        B, L = batch["ids"].shape
        assert batch["loss_mask"].shape == batch["modality"].shape == (B, L)
        assert int(batch["lengths"].max()) == L
        for b in range(B):
            length, prefix = int(batch["lengths"][b]), int(batch["prefix_len"][b])
            unpack(batch["ids"][b, :length].numpy(), VOCABULARY)
            assert (batch["ids"][b, length:] == VOCABULARY.special("<pad>")).all()
            assert batch["loss_mask"][b].tolist() == [prefix <= i < length for i in range(L)]
        assert ((batch["ids"] < 256) == (batch["modality"] == 0)).all()
        assert {batch[name].dtype for name in ("ids", "prefix_len", "lengths", "rows")} == {torch.int64}
        assert not batch["parallel"].any()


def test_parallel_scenes_are_marked() -> None:
    sampler = SceneSampler(VOCABULARY, WordTokenizer(), WEIGHTS, parallel_share=0.5)
    found = torch.cat([SceneLoader(CLIPS, sampler, micro_batch_size=7).batch(n)["parallel"] for n in range(20)])
    assert 40 < int(found.sum()) < 100


def test_the_model_is_shown_masks_at_the_targets_of_parallel_scenes_alone() -> None:
    sampler = SceneSampler(VOCABULARY, WordTokenizer(), WEIGHTS, parallel_share=0.5)
    names = set()
    for number in range(6):
        batch = SceneLoader(CLIPS, sampler, micro_batch_size=7).batch(number)
        hidden = batch["parallel"][:, None] & batch["loss_mask"]
        assert (batch["inputs"][hidden] == VOCABULARY.special("<mask>")).all()
        assert torch.equal(batch["inputs"][~hidden], batch["ids"][~hidden])
        assert (batch["ids"] != VOCABULARY.special("<mask>")).all()
        names |= {(MODALITIES[kind], True) for kind in batch["modality"][hidden].tolist()}
        names |= {(MODALITIES[kind], False) for kind in batch["modality"][~hidden].tolist()}
    assert {name for name, is_hidden in names if is_hidden} == {"masked_video", "masked_audio"}
    assert not {name for name, is_hidden in names if not is_hidden} & {"masked_video", "masked_audio"}


@pytest.mark.parametrize("length_grouped", [True, False])
def test_every_row_comes_once_an_epoch(length_grouped: bool) -> None:
    made = loader(num_epochs=3, length_grouped=length_grouped)
    seen = [row for batch in rows(iter(made)) for row in batch]
    assert sorted(seen) == sorted(list(range(101)) * 3)
    assert len(rows(iter(loader(num_epochs=3, length_grouped=length_grouped)))) == made.num_batches


def test_epochs_differ_in_order_and_tasks() -> None:
    batches = list(loader(window_batches=1, micro_batch_size=101, num_epochs=2))
    assert sorted(batches[0]["rows"].tolist()) == sorted(batches[1]["rows"].tolist()) == list(range(101))
    assert batches[0]["rows"].tolist() != batches[1]["rows"].tolist()
    lengths = [dict(zip(b["rows"].tolist(), b["lengths"].tolist(), strict=True)) for b in batches]
    assert lengths[0] != lengths[1]


@given(
    world_size=st.integers(1, 5),
    micro_batch_size=st.integers(1, 7),
    window_batches=st.integers(1, 6),
    num_epochs=st.integers(1, 2),
    length_grouped=st.booleans(),
)
@settings(max_examples=12, deadline=None)
def test_ranks_are_disjoint_and_complete(
    world_size: int, micro_batch_size: int, window_batches: int, num_epochs: int, length_grouped: bool
) -> None:
    made = [
        loader(
            CLIPS[:37],
            rank=rank,
            world_size=world_size,
            micro_batch_size=micro_batch_size,
            window_batches=window_batches,
            num_epochs=num_epochs,
            length_grouped=length_grouped,
        )
        for rank in range(world_size)
    ]
    by_rank = [rows(iter(one)) for one in made]
    assert [len(batches) for batches in by_rank] == [one.num_batches for one in made]
    assert max(map(len, by_rank)) - min(map(len, by_rank)) <= 1
    seen = [row for batches in by_rank for batch in batches for row in batch]
    assert sorted(seen) == sorted(list(range(37)) * num_epochs)


@given(stop=st.integers(0, 60), prefetch=st.integers(0, 3), length_grouped=st.booleans())
@settings(max_examples=15, deadline=None)
def test_after_a_resume_the_same_batches_follow(stop: int, prefetch: int, length_grouped: bool) -> None:
    whole = loader(length_grouped=length_grouped)
    expected = list(itertools.islice(whole, stop + 9))
    first = loader(length_grouped=length_grouped, prefetch=prefetch)
    before = list(itertools.islice(first, stop))
    state = json.loads(json.dumps(first.state_dict()))
    second = loader(length_grouped=length_grouped, prefetch=3 - prefetch)
    second.load_state_dict(state)
    for one, other in zip(before + list(itertools.islice(second, 9)), expected, strict=True):
        assert_same(one, other)


def test_the_state_counts_batches_handed_out_not_those_made_ahead() -> None:
    made = loader(prefetch=8)
    iterator = iter(made)
    for count in range(1, 6):
        next(iterator)
        assert made.state_dict()["next_batch"] == count
    iterator.close()  # type: ignore[attr-defined]
    assert made.next_batch == 5


def test_prefetching_changes_nothing_and_leaves_no_thread() -> None:
    before = threading.active_count()
    for one, other in zip(loader(prefetch=5, num_epochs=2), loader(num_epochs=2), strict=True):
        assert_same(one, other)
    iterator = iter(loader(prefetch=5))
    next(iterator)
    iterator.close()  # type: ignore[attr-defined]
    assert threading.active_count() == before


def test_an_error_in_the_prefetching_thread_reaches_the_caller() -> None:
    silent = [EncodedClip(key="mute", text="word")]
    with pytest.raises(ConfigError, match="mute"):
        next(iter(loader(silent, prefetch=2)))


def test_a_far_batch_is_made_without_those_before_it() -> None:
    made = loader(window_batches=32)
    started = time.process_time()
    far = made.batch(10**7)
    seconds = time.process_time() - started
    print(f"batch 10,000,000 after {seconds * 1e3:.1f} ms")
    assert seconds < 1
    other = loader(window_batches=32)
    other.next_batch = 10**7
    assert_same(next(iter(other)), far)


def test_batches_may_be_asked_for_in_any_order() -> None:
    straight, jumping = loader(), loader()
    wanted = {number: straight.batch(number) for number in range(12)}
    for number in (11, 0, 5, 4, 5, 10, 3):
        assert_same(jumping.batch(number), wanted[number])


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 1},
        {"micro_batch_size": 3},
        {"world_size": 2},
        {"window_batches": 3},
        {"length_grouped": False},
        {"clips": CLIPS[:100]},
        {"weights": {"text_to_image": 1.0}},
    ],
)
def test_a_resume_in_another_order_is_refused(change: dict[str, object]) -> None:
    name = {"clips": "num_clips", "weights": "sampler"}.get(*change, *change)
    with pytest.raises(ConfigError, match=name):
        loader(**change).load_state_dict(loader().state_dict())  # type: ignore[arg-type]


def test_the_state_of_one_rank_serves_all() -> None:
    first = loader(rank=0, world_size=2)
    rows(iter(first), 7)
    second = loader(rank=1, world_size=2)
    second.load_state_dict(first.state_dict())
    assert rows(iter(second), 3) == rows(iter(loader(rank=1, world_size=2)), 10)[7:]


def padding_share(made: SceneLoader, count: int) -> float:
    batches = [made.batch(number) for number in range(count)]
    ids = sum(int(batch["lengths"].sum()) for batch in batches)
    return 1 - ids / sum(batch["ids"].numel() for batch in batches)


def test_grouping_by_length_saves_padding_and_stays_random() -> None:
    plain = padding_share(loader(micro_batch_size=8, length_grouped=False), 80)
    grouped = padding_share(loader(micro_batch_size=8, window_batches=32), 80)
    print(f"padding: {plain:.1%} of the places in random batches, {grouped:.1%} in grouped ones")
    assert grouped < 0.25 * plain
    made = loader(micro_batch_size=8, window_batches=32)
    lengths = [float(made.batch(number)["lengths"].float().mean()) for number in range(32)]
    assert abs(np.corrcoef(lengths[:-1], lengths[1:])[0, 1]) < 0.5, "batches must not run from long to short"


def test_ranks_work_on_scenes_of_about_the_same_length_at_the_same_time() -> None:
    made = [loader(rank=rank, world_size=3, window_batches=32) for rank in range(3)]
    widths = np.array([[one.batch(n)["ids"].shape[1] for n in range(32)] for one in made])
    assert np.abs(widths - widths.mean(0)).mean() < 0.25 * widths.std(1).mean()


def test_lengths_are_rounded_up_on_request() -> None:
    for batch in itertools.islice(loader(length_multiple=64), 10):
        assert batch["ids"].shape[1] % 64 == 0
        assert batch["ids"].shape[1] - int(batch["lengths"].max()) < 64
    with pytest.raises(ShapeError, match="clip-"):
        rows(iter(loader(max_length=100)), 20)


@pytest.mark.parametrize(
    "options",
    [
        {"micro_batch_size": 0},
        {"rank": 1},
        {"rank": -1},
        {"world_size": 0},
        {"num_epochs": 0},
        {"window_batches": 0},
        {"prefetch": -1},
        {"clips": []},
    ],
)
def test_settings_that_cannot_be_used_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        loader(**options)  # type: ignore[arg-type]


def test_a_finite_stream_ends() -> None:
    made = loader(num_epochs=1)
    assert made.num_batches == 21
    assert made.epoch_of(21) == pytest.approx(105 / 101)
    with pytest.raises(IndexError):
        made.batch(21)
    rows(iter(made))
    assert rows(iter(made)) == []
