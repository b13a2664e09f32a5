import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from poet.errors import ConfigError, ShapeError, VocabularyError
from poet.sequence import (
    Allowed,
    GrammarState,
    Scene,
    Segment,
    allowed,
    check_output,
    grammar_from_json,
    grammar_to_json,
    max_output_length,
    output_grammar,
    pack,
    pack_prefix,
    pad_scene,
    place_ranges,
    unpack,
    unpack_prefix,
)
from poet.tasks import TASKS, get_task
from poet.testing import random_scene, tiny_geometry, tiny_vocabulary
from poet.vocabulary import Vocabulary

VOCABULARY = tiny_vocabulary()


@st.composite
def scenes(draw, tasks=tuple(TASKS)) -> Scene:
    """A scene of any task, size, resolution and length of text, with or without what is optional."""
    row = get_task(draw(st.sampled_from(tasks)))
    geometry = tiny_geometry(
        VOCABULARY,
        num_latent_frames=draw(st.sampled_from([2, 3, 5])),
        fps=draw(st.sampled_from([7.0, 8.0, 11.0])),
        resolution=draw(st.sampled_from(VOCABULARY.resolutions)),
    )
    rng = np.random.default_rng(draw(st.integers(0, 2**31)))
    pieces = draw(st.sampled_from([None, 0, 1, 13]))
    scene = random_scene(row, VOCABULARY, rng, geometry=geometry, num_text_pieces=pieces, parallel=draw(st.booleans()))
    if "audio" in row.optional and draw(st.booleans()):
        scene = dataclasses.replace(scene, audio_in=None)
    return scene


def grammar_of(scene: Scene):
    return output_grammar(
        scene.task,
        VOCABULARY,
        video_latent_shape=None if scene.video_out is None else scene.video_out.shape,
        num_audio_latents=None if scene.audio_out is None else scene.audio_out.shape[1],
        max_text_pieces=17,
    )


# Packing and unpacking


@settings(deadline=None, max_examples=40)
@given(scene=scenes())
def test_unpack_is_the_inverse_of_pack(scene):
    packed = pack(scene, VOCABULARY)
    assert unpack(packed.ids, VOCABULARY) == scene
    np.testing.assert_array_equal(pack(unpack(packed.ids, VOCABULARY), VOCABULARY).ids, packed.ids)


@settings(deadline=None, max_examples=40)
@given(scene=scenes())
def test_the_prefix_ends_where_the_output_and_its_loss_begin(scene):
    ids, prefix_len, loss_mask = pack(scene, VOCABULARY)
    assert ids.dtype == np.int64 and loss_mask.dtype == bool and ids.shape == loss_mask.shape
    np.testing.assert_array_equal(np.flatnonzero(loss_mask), np.arange(prefix_len, len(ids)))
    np.testing.assert_array_equal(ids[:prefix_len], pack_prefix(scene, VOCABULARY))
    starts = [VOCABULARY.special(name) for name in ("<video_out>", "<audio_out>", "<text_out>")]
    assert int(ids[prefix_len]) in starts and not np.isin(ids[:prefix_len], starts).any()


@settings(deadline=None, max_examples=40)
@given(scene=scenes())
def test_a_prefix_comes_back_without_its_output(scene):
    bare = dataclasses.replace(scene, video_out=None, audio_out=None, text_out=None)
    prefix = pack_prefix(scene, VOCABULARY)
    assert unpack_prefix(prefix, VOCABULARY) == bare
    np.testing.assert_array_equal(pack_prefix(bare, VOCABULARY), prefix)


@settings(deadline=None, max_examples=40)
@given(scene=scenes())
def test_dropping_the_text_changes_pieces_to_null_and_nothing_else(scene):
    kept, dropped = pack(scene, VOCABULARY).ids, pack(scene, VOCABULARY, drop_text=True).ids
    low, high = VOCABULARY.text_range
    is_given_text = (kept >= low) & (kept < high) & (np.arange(len(kept)) < pack(scene, VOCABULARY).prefix_len)
    np.testing.assert_array_equal(dropped, np.where(is_given_text, VOCABULARY.special("<null>"), kept))
    read = unpack(dropped, VOCABULARY)
    assert (read.text, read.dropped_text) == ((None, len(scene.text)) if scene.text else (scene.text, None))
    np.testing.assert_array_equal(pack(read, VOCABULARY).ids, dropped)


def test_an_absent_text_leaves_no_trace_and_an_empty_one_does():
    rng = np.random.default_rng(0)
    absent = random_scene("image_to_video", VOCABULARY, rng, num_text_pieces=None)
    empty = dataclasses.replace(absent, text=())
    assert absent != empty
    assert len(pack(empty, VOCABULARY).ids) == len(pack(absent, VOCABULARY).ids) + 2
    assert unpack(pack(empty, VOCABULARY).ids, VOCABULARY).text == ()
    assert unpack(pack(absent, VOCABULARY).ids, VOCABULARY).text is None


def test_the_order_of_ids_is_that_of_the_specification():
    video_in = np.arange(30).reshape(2, 3, 5) % 31
    video_out, audio_in, audio_out = video_in[:1] + 1, np.arange(6).reshape(3, 2), np.arange(3).reshape(3, 1) + 7
    scene = Scene(
        task="audio_video_continuation",
        text=(3, 5),
        video_in=video_in,
        audio_in=audio_in,
        video_out=video_out,
        audio_out=audio_out,
        resolution=(24, 40),
    )
    ids, prefix_len, _ = pack(scene, VOCABULARY, parallel=True)
    words = [VOCABULARY.decode_id(id) for id in ids.tolist()]
    assert words[:10] == [
        *("<bos>", "<to_video_audio>", "<parallel>", "<24x40>", "<text>", "text 3", "text 5", "</text>"),
        *("<source>", "<video_in>"),
    ]
    assert words[10:40] == [f"video {code}" for code in range(30)]  # frame by frame, row by row
    assert words[40:50] == [
        *("</video_in>", "<audio_in>", "audio level 0 code 0", "audio level 0 code 1", "audio level 1 code 2"),
        *("audio level 1 code 3", "audio level 2 code 4", "audio level 2 code 5", "</audio_in>", "<video_out>"),
    ]
    assert prefix_len == 49
    assert words[50:65] == [f"video {code + 1}" for code in range(15)]
    assert words[65:] == [
        *("</video_out>", "<audio_out>", "audio level 0 code 7", "audio level 1 code 8", "audio level 2 code 9"),
        *("</audio_out>", "<eos>"),
    ]


def test_sound_given_alone_has_no_source_mark():
    scene = random_scene("audio_to_video", VOCABULARY, np.random.default_rng(0))
    assert VOCABULARY.special("<source>") not in pack(scene, VOCABULARY).ids


def test_the_parallel_mark_follows_the_task_id_and_can_come_from_either_side():
    scene = random_scene("text_to_image", VOCABULARY, np.random.default_rng(0))
    marked = dataclasses.replace(scene, parallel=True)
    ids = pack(scene, VOCABULARY, parallel=True).ids
    assert VOCABULARY.decode_id(int(ids[2])) == "<parallel>"
    np.testing.assert_array_equal(ids, pack(marked, VOCABULARY).ids)
    assert unpack(ids, VOCABULARY) == marked != scene


def test_unpack_names_the_first_task_that_fits():
    found = {}
    for name in TASKS:
        scene = random_scene(name, VOCABULARY, np.random.default_rng(2), geometry=tiny_geometry(VOCABULARY))
        found[name] = unpack(pack(scene, VOCABULARY).ids, VOCABULARY).task
    ambiguous = {"outpainting": "inpainting", "stylisation": "inpainting"}
    assert found == {name: ambiguous.get(name, name) for name in TASKS}


def test_padding_fills_a_scene_up_and_unpacks_alike():
    scene = random_scene("text_to_audio", VOCABULARY, np.random.default_rng(0))
    packed = pack(scene, VOCABULARY)
    padded = pad_scene(packed, 223, VOCABULARY)
    assert padded.ids.shape == padded.loss_mask.shape == (223,) and padded.prefix_len == packed.prefix_len
    assert not padded.loss_mask[len(packed.ids) :].any() and not padded.ids[len(packed.ids) :].any()
    assert unpack(padded.ids, VOCABULARY) == scene
    assert len(pad_scene(packed, len(packed.ids), VOCABULARY).ids) == len(packed.ids)
    with pytest.raises(ShapeError, match=f"at most scene_length 11 ids, got {len(packed.ids)}"):
        pad_scene(packed, 11, VOCABULARY)


# What is refused


def small_scene() -> Scene:
    return Scene(
        task="text_to_video_audio",
        text=(2, 3),
        video_out=np.zeros((1, 3, 5), int),
        audio_out=np.zeros((3, 1), int),
        resolution=(24, 40),
    )


def test_small_scene_stands_where_the_table_of_malformed_ids_takes_it_to_be():
    words = [VOCABULARY.decode_id(id) for id in pack(small_scene(), VOCABULARY).ids.tolist()]
    assert (words[7], words[8], words[23], words[24], words[25], words[28], words[29]) == (
        *("<video_out>", "video 0", "</video_out>", "<audio_out>", "audio level 0 code 0", "</audio_out>", "<eos>"),
    )


@pytest.mark.parametrize(
    ("place", "id", "message"),
    [
        (0, 2, "at place 0: expected <bos>, found <eos>"),
        (1, 5, "at place 1: expected a task id, found <source>"),
        (2, 7, "at place 3: expected text piece or </text>, found <text>"),
        (4, 4, "at place 5: expected <null> or </text>, found text 3"),
        (5, 4, "at place 5: expected text piece or </text>, found <null>"),
        (7, 259, "at place 7: expected <video_out>, found video 3"),
        (8, 1, "at place 8: expected video code or </video_out>, found <bos>"),
        (23, 256, "at place 24: expected video code or </video_out>, found <audio_out>"),
        (22, 14, "at place 22: expected whole frames of 3 x 5 codes, found 14 codes in <video_out>"),
        (26, 287, "at place 26: expected audio level 1 code, found audio level 0 code 0"),
        (27, 16, "at place 27: expected 3 levels of equally many codes, found 2 codes in <audio_out>"),
        (29, 0, "at place 29: expected <eos>, found <pad>"),
        (29, 999, r"at place 29: expected <eos>, found id 999 \(outside \[0, 384\)\)"),
    ],
)
def test_malformed_ids_are_named_with_their_place(place, id, message):
    ids = pack(small_scene(), VOCABULARY).ids
    ids[place] = id
    with pytest.raises(VocabularyError, match=message):
        unpack(ids, VOCABULARY)


def test_ids_that_end_early_or_go_on_are_named():
    ids = pack(small_scene(), VOCABULARY).ids
    for length in range(len(ids)):
        with pytest.raises(VocabularyError, match="found the end"):
            unpack(ids[:length], VOCABULARY)
    with pytest.raises(VocabularyError, match="at place 29: expected <eos>, found the end"):
        unpack(ids[:29], VOCABULARY)
    with pytest.raises(VocabularyError, match="at place 30: expected nothing more but <pad>, found video 1"):
        unpack([*ids, 257], VOCABULARY)
    with pytest.raises(VocabularyError, match="at place 7: expected nothing more, found <video_out>"):
        unpack_prefix(ids, VOCABULARY)
    with pytest.raises(VocabularyError, match=r"must be \(L,\) integer ids, got int64 \(1, 30\)"):
        unpack(ids[None], VOCABULARY)


def test_a_resolution_without_video_and_inputs_of_no_task_are_refused():
    special = VOCABULARY.special
    sound = pack(random_scene("text_to_audio", VOCABULARY, np.random.default_rng(0)), VOCABULARY).ids
    with pytest.raises(VocabularyError, match="at place 2: expected no resolution without video, found <24x40>"):
        unpack([*sound[:2], special("<24x40>"), *sound[2:]], VOCABULARY)
    with pytest.raises(VocabularyError, match="at place 1: no task writes image from nothing"):
        unpack_prefix([special("<bos>"), special("<to_image>"), special("<24x40>")], VOCABULARY)
    with pytest.raises(VocabularyError, match="at place 2: expected no given video in a scene without a resolution"):
        unpack_prefix([special("<bos>"), special("<to_audio>"), special("<source>")], VOCABULARY)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"audio_out": None}, ShapeError, "must have audio_out"),
        ({"text_out": (1,)}, ShapeError, "must not have text_out"),
        ({"resolution": None}, ShapeError, r"must be \(height, width\)"),
        ({"resolution": (56, 88)}, ShapeError, r"must be \(T, 7, 11\), got \(1, 3, 5\)"),
        ({"resolution": (24, 41)}, VocabularyError, "got 24 x 41"),
        ({"video_out": np.zeros((3, 5), int)}, ShapeError, r"video_out must be \(T, h, w\)"),
        ({"video_out": np.zeros((0, 3, 5), int)}, ShapeError, "without an empty axis"),
        ({"audio_out": np.zeros((2, 1), int)}, ShapeError, r"must be \(3, A\), got \(2, 1\)"),
        ({"video_out": np.full((1, 3, 5), 31)}, VocabularyError, "video code 31 is outside"),
        ({"text": None}, ConfigError, "task text_to_video_audio needs text"),
        ({"audio_in": np.zeros((3, 1), int)}, ConfigError, "takes no audio"),
        ({"dropped_text": 2}, ShapeError, "text must be None beside it"),
        ({"task": "text_to_video_adio"}, ConfigError, "Did you mean text_to_video_audio"),
    ],
)
def test_scenes_that_cannot_be_packed_are_refused(changes, error, message):
    with pytest.raises(error, match=message):
        pack(dataclasses.replace(small_scene(), **changes), VOCABULARY)


def test_an_image_is_one_latent_frame():
    image = random_scene("text_to_image", VOCABULARY, np.random.default_rng(0))
    assert image.video_out.shape == (1, 3, 5)
    film = dataclasses.replace(image, video_out=np.zeros((2, 3, 5), int))
    with pytest.raises(ShapeError, match="an image must be one latent frame, got 2"):
        pack(film, VOCABULARY)
    ids = pack(dataclasses.replace(film, task="text_to_video"), VOCABULARY).ids
    ids[1] = VOCABULARY.special("<to_image>")
    with pytest.raises(VocabularyError, match="expected an image of 15 codes, found 30 codes"):
        unpack(ids, VOCABULARY)


# The grammar


@settings(deadline=None, max_examples=40)
@given(scene=scenes())
def test_every_output_is_legal_under_its_grammar_at_every_place(scene):
    packed, grammar = pack(scene, VOCABULARY), grammar_of(scene)
    output = packed.ids[packed.prefix_len :].tolist()
    check_output(grammar, output)
    assert len(output) <= max_output_length(grammar)
    if not get_task(scene.task).writes_text:
        low, high = place_ranges(grammar)
        assert len(output) == max_output_length(grammar) == len(low)
        assert (low <= output).all() and (output < high).all()


@settings(deadline=None, max_examples=40)
@given(scene=scenes(), seed=st.integers(0, 2**31))
def test_every_output_that_the_grammar_lets_through_unpacks(scene, seed):
    rng, state, output = np.random.default_rng(seed), GrammarState(grammar_of(scene)), []
    while not state.done:
        low, high, stop = state.allowed
        id = stop if stop is not None and rng.random() < 0.2 else int(rng.integers(low, high))
        output.append(id)
        state.advance(id)
    prefix = pack_prefix(scene, VOCABULARY)
    read = unpack([*prefix, *output], VOCABULARY)
    assert unpack_prefix(prefix, VOCABULARY).inputs == read.inputs
    np.testing.assert_array_equal(pack(read, VOCABULARY).ids, [*prefix, *output])
    for name in ("video_out", "audio_out"):
        written, wanted = getattr(read, name), getattr(scene, name)
        assert (written is None) == (wanted is None) and (written is None or written.shape == wanted.shape)


@settings(deadline=None, max_examples=7)  # quadratic in the length of the output
@given(scene=scenes(tasks=("captioning", "text_to_image")))
def test_allowed_tells_the_same_as_a_state_that_advances(scene):
    packed, grammar = pack(scene, VOCABULARY), grammar_of(scene)
    output, state = packed.ids[packed.prefix_len :].tolist(), GrammarState(grammar)
    for place, id in enumerate(output):
        assert allowed(grammar, output[:place]) == state.allowed == (state.low, state.high, state.stop)
        assert state.place == place and not state.done
        state.advance(id)
    assert state.done


def test_a_text_may_stop_anywhere_and_must_stop_at_its_longest():
    grammar = output_grammar("captioning", VOCABULARY, max_text_pieces=2)
    start, end, eos = (VOCABULARY.special(name) for name in ("<text_out>", "</text_out>", "<eos>"))
    low, high = VOCABULARY.text_range
    assert allowed(grammar, []) == Allowed(start, start + 1)
    assert allowed(grammar, [start]) == allowed(grammar, [start, low]) == Allowed(low, high, end)
    assert allowed(grammar, [start, low, low]) == Allowed(end, end + 1)
    assert allowed(grammar, [start, end]) == Allowed(eos, eos + 1)
    check_output(grammar, [start, end, eos])
    assert max_output_length(grammar) == 5
    with pytest.raises(VocabularyError, match="open length has no canvas"):
        place_ranges(grammar)


def test_ids_outside_the_grammar_are_named_with_their_place():
    grammar = (Segment(2, 10, 13), Segment(1, 20, 23, stop=5), Segment(1, 2, 3))
    check_output(grammar, [10, 12, 22, 5, 2])
    for ids, message in [
        ([10, 13], r"at place 1 of the output: expected an id in \[10, 13\), found id 13"),
        ([10, 12, 10], r"at place 2 of the output: expected an id in \[20, 23\) or id 5, found id 10"),
        ([10, 12, 21, 21], "at place 3 of the output: expected id 5, found id 21"),
        ([10, 12, 5], "the output ends at place 3, where id 2 was due"),
        ([10, 12, 5, 2, 2], "the output is complete at place 4"),
    ]:
        with pytest.raises(VocabularyError, match=message):
            check_output(grammar, ids)


@settings(deadline=None, max_examples=40)
@given(scene=scenes())
def test_grammars_survive_json(scene):
    grammar = grammar_of(scene)
    assert grammar_from_json(grammar_to_json(grammar)) == grammar


@pytest.mark.parametrize(
    "values", [None, [[1, 2]], [[1, 2, 3.0]], [[1, True, 3]], [[1, 3, 3]], [[0, 2, 3]], [[1, 2, 5, 4]]]
)
def test_json_that_is_no_grammar_is_refused(values):
    with pytest.raises(VocabularyError, match=r"a grammar must be|a segment must have"):
        grammar_from_json(values)


def test_a_grammar_without_its_shapes_is_refused():
    for task, shapes, message in [
        ("text_to_video", {}, r"video_latent_shape \(T, h, w\), got None"),
        ("text_to_image", {"video_latent_shape": (2, 3, 5)}, r"\(1, h, w\), got \(2, 3, 5\)"),
        ("text_to_audio", {"num_audio_latents": 0}, "positive num_audio_latents, got 0"),
        ("captioning", {"max_text_pieces": 0}, "max_text_pieces must be positive, got 0"),
    ]:
        with pytest.raises(ShapeError, match=message):
            output_grammar(task, VOCABULARY, **shapes)


def test_nano_output_has_as_many_ids_as_its_codes_and_marks():
    nano: Vocabulary = tiny_vocabulary(
        video={"codebook_size": 4096},
        audio={"codebook_size": 1024, "num_codebooks": 4, "sample_rate": 16_000, "hop_length": 500},
        resolutions=((64, 64),),
    )
    shape = get_task("text_to_video_audio").output_shape(tiny_geometry(nano))
    grammar = output_grammar("text_to_video_audio", nano, video_latent_shape=shape.video, num_audio_latents=shape.audio)
    assert max_output_length(grammar) == 5 * 8 * 8 + 4 * 68 + 5
