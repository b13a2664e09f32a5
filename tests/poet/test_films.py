"""Batches of films: whole, padded, pure, and with hidden places in the last scene alone."""

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

from poet.data.films import FilmLoader, find_films, layout_of
from poet.data.noise import check_flips, flip_bits
from poet.data.packing import SceneSampler
from poet.data.shards import EncodedClip
from poet.errors import ConfigError, ShapeError
from poet.sequence import unpack
from poet.testing import random_parts, tiny_geometry, tiny_vocabulary
from poet.vocabulary import Vocabulary

VOCABULARY = tiny_vocabulary()
BITS = dataclasses.replace(
    VOCABULARY,
    video_codebook_size=32,
    tokenizers={**VOCABULARY.tokenizers, "video": {**VOCABULARY.tokenizers["video"], "codebook_size": 32}},
)
SCENE, POSITIONS, FILMS, SCENES = 256, 2048, 7, 4


class Words:
    """A text tokenizer that gives each word a piece."""

    def encode(self, text: str) -> list[int]:
        return [len(word) for word in text.split()]


def clips() -> list[EncodedClip]:
    rng, made = np.random.default_rng(0), []
    for number in range(FILMS * SCENES):
        geometry = tiny_geometry(VOCABULARY, num_latent_frames=2 + number % 3)
        parts = random_parts("text_to_video_audio", VOCABULARY, geometry, rng)
        assert parts.video_out is not None
        assert parts.audio_out is not None
        made.append(
            EncodedClip(
                key="film-{}.{}".format(*divmod(number, SCENES)),
                text="it " + "rises " * (number % 5),
                video_codes=parts.video_out.astype(np.int32),
                audio_codes=parts.audio_out.astype(np.int32),
                fps=geometry.fps,
                resolution=geometry.resolution,
            )
        )
    return made


CLIPS = clips()


def sampler(parallel_share: float = 0.0, vocabulary: Vocabulary = VOCABULARY) -> SceneSampler:
    return SceneSampler(vocabulary, Words(), {"text_to_video_audio": 1.0}, parallel_share=parallel_share)  # type: ignore[arg-type]


def loader(parallel_share: float = 0.0, vocabulary: Vocabulary = VOCABULARY, **options: Any) -> FilmLoader:
    usual = {
        "batch_size": 3,
        "num_scenes": (2, SCENES),
        "scene_length": SCENE,
        "num_positions": POSITIONS,
        "seed": 5,
    }
    samplers = sampler(0.0, vocabulary), sampler(parallel_share, vocabulary)
    return FilmLoader(CLIPS, *samplers, **usual | options)


def test_films_are_runs_of_numbered_clips() -> None:
    assert find_films(["a.0", "a.1", "a.2", "b.0", "c.1", "c.0", "c.1", "c.3", "d", "d.0", "e.1"]) == [
        [0, 1, 2],
        [3],
        [5, 6],
        [9],
    ]
    assert find_films(["clip-0", "clip-1"]) == []


def test_a_batch_holds_whole_scenes_of_films_one_after_another() -> None:
    counts = set()
    for number in range(20):
        batch = loader().batch(number)
        films, length = batch["ids"].shape
        count = length // SCENE
        counts.add(count)
        assert films == 3
        assert batch["rows"].shape == batch["prefix_len"].shape == batch["lengths"].shape == (films, count)
        assert (batch["rows"] % SCENES == torch.arange(count)).all()
        assert (batch["rows"] // SCENES == batch["rows"][:, :1] // SCENES).all()
        assert ((batch["offset"] >= 0) & (batch["offset"] + length <= POSITIONS)).all()
        for film in range(films):
            for scene in range(count):
                ids = batch["ids"][film, scene * SCENE : (scene + 1) * SCENE]
                size = int(batch["lengths"][film, scene])
                found = unpack(ids[:size].numpy(), VOCABULARY)
                np.testing.assert_array_equal(found.video_out, CLIPS[int(batch["rows"][film, scene])].video_codes)
                assert (ids[size:] == VOCABULARY.special("<pad>")).all()
    assert counts == {2, 3, 4}


def test_a_batch_is_a_pure_function_of_its_number() -> None:
    one, other = loader(0.5).batch(7), loader(0.5).batch(7)
    assert all(torch.equal(one[name], other[name]) for name in one)  # type: ignore[literal-required]
    assert not torch.equal(one["rows"], loader(0.5).batch(8)["rows"])


def test_only_the_last_scene_has_hidden_places() -> None:
    hidden = 0
    for number in range(12):
        batch = loader(0.6).batch(number)
        assert not batch["parallel"][:, :-1].any()
        hidden += int(batch["parallel"][:, -1].sum())
        shown = batch["inputs"] != batch["ids"]
        assert not shown[:, :-SCENE].any()
        assert torch.equal(shown, shown & batch["loss_mask"])
    assert 12 < hidden < 30


def test_layer_0_sees_the_scenes_before_and_positions_run_on_from_the_offset() -> None:
    batch = loader(0.5, num_scenes=(3, 3)).batch(1)
    layout, positions = layout_of(batch)
    assert positions is not None
    assert layout.films
    assert torch.equal(positions, torch.arange(3 * SCENE) + batch["offset"][:, None])
    query = 2 * SCENE + int(batch["prefix_len"][0, 2]) + 3
    for layer, first in ((0, 0), (1, 2 * SCENE)):
        seen = layout.dense_mask(layer, query, query + 1)[0, 0]
        assert seen.nonzero().min() == first
    assert seen[2 * SCENE : query + 1].all()


def test_what_cannot_be_loaded_is_refused() -> None:
    with pytest.raises(ConfigError, match="no film of the shards has 5 scenes"):
        loader(num_scenes=(2, 5))
    with pytest.raises(ConfigError, match="9 scenes of 256 ids need 2304 positions"):
        loader(num_scenes=(2, 9))
    with pytest.raises(ConfigError, match="ascending numbers"):
        loader(num_scenes=(3, 2))
    with pytest.raises(ShapeError, match=r"at most 64 ids, got .* of clip film-"):
        loader(scene_length=64).batch(0)


def test_noise_flips_bits_of_what_is_shown_and_of_nothing_else() -> None:
    low, high = BITS.video_range
    places = flipped = clean_scenes = other_first = 0
    for number in range(40):
        plain, noisy = loader(0.5, BITS).batch(number), loader(0.5, BITS, noise=0.2).batch(number)
        assert loader(0.5, BITS, noise=0.2).batch(number)["inputs"].equal(noisy["inputs"])
        for name, tensor in plain.items():
            assert name == "inputs" or tensor.equal(noisy[name])  # type: ignore[literal-required]
        video = (plain["inputs"] >= low) & (plain["inputs"] < high)
        assert noisy["inputs"][~video].equal(plain["inputs"][~video])
        changed = noisy["inputs"] ^ plain["inputs"]
        assert bool(((noisy["inputs"] >= low) & (noisy["inputs"] < high))[video].all())
        for film, rows in enumerate(plain["rows"].tolist()):
            for scene, row in enumerate(rows):
                part = slice(scene * SCENE, (scene + 1) * SCENE)
                codes = (noisy["inputs"] - plain["inputs"])[film, part][video[film, part]]
                latent = CLIPS[row].video_codes[0].size  # type: ignore[index]
                first, rest = bool(codes[:latent].any()), bool(codes[latent:].any())
                clean_scenes += not first and not rest
                other_first += first != rest
        bits = changed[video]
        places += len(bits)
        flipped += int((bits != 0).sum())
    assert 0 < flipped < 0.5 * places
    assert clean_scenes > 50
    assert other_first > 50


def test_noise_needs_bits() -> None:
    for share in (-0.1, 0.6):
        with pytest.raises(ConfigError, match=r"in a share from 0 to 0\.5"):
            loader(0.0, BITS, noise=share)
    with pytest.raises(ConfigError, match="codebooks of 2"):
        check_flips(0.1, VOCABULARY)
    check_flips(0.0, VOCABULARY)


def test_each_bit_is_flipped_as_often_as_is_asked() -> None:
    low, high = BITS.video_range
    ids = np.full(4000, low, np.int64)
    kinds = {(False, False): 0, (False, True): 0, (True, False): 0, (True, True): 0}
    for seed in range(200):
        noisy = flip_bits(ids, 2000, 0.3, BITS, np.random.default_rng(seed)) - low
        bits = (noisy[:, None] >> np.arange((high - low).bit_length() - 1)) & 1
        shares = bits[:2000].mean(0), bits[2000:].mean(0)
        assert all(np.ptp(share) < 0.08 and share.max() < 0.36 for share in shares)
        kinds[bool(shares[0].any()), bool(shares[1].any())] += 1
    assert min(kinds.values()) > 25
