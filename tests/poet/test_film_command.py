"""`poet generate` of films and streams: prompts from everywhere, what is recorded, made again, and refused."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from poet.bundle import Bundle
from poet.cli.main import main
from poet.media import Clip, probe, read_clip, write_clip
from poet.testing import tiny_bundle


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("bundle") / "tiny"
    tiny_bundle(directory)
    file = directory / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"trained_parallel": True}))
    return directory


def run(capsys: pytest.CaptureFixture[str], bundle: Path, *arguments: object) -> tuple[int, str, str]:
    said = ("generate", "--model", bundle, "--engine", "torch", "--json", *arguments)
    code = main([str(argument) for argument in said])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def made(capsys: pytest.CaptureFixture[str], bundle: Path, *arguments: object) -> dict[str, object]:
    code, out, err = run(capsys, bundle, *arguments)
    assert code == 0, err
    result = json.loads(out)
    assert isinstance(result, dict)
    return result


def a_clip(bundle: Path, path: Path, num_frames: int) -> Path:
    size = Bundle.open(bundle).generation_config
    frames = np.random.default_rng(0).integers(0, 255, (num_frames, size.height, size.width, 3), np.uint8)
    write_clip(Clip(frames, size.fps, None, 16000), path)
    return path


def test_scenes_come_from_the_command_line_or_a_file(
    capsys: pytest.CaptureFixture[str], bundle: Path, tmp_path: Path
) -> None:
    story = tmp_path / "story.txt"
    story.write_text("# a film\na star\n\n  it moves up  \n-\n", encoding="utf-8")
    from_file = made(capsys, bundle, "--scenes", story, "-o", tmp_path / "a.mp4", "--seed", 5)
    said = ("--scene", "a star", "--scene", "it moves up", "--scene", "-")
    from_line = made(capsys, bundle, *said, "-o", tmp_path / "b.mp4", "--seed", 5)
    assert from_file["ids_sha256"] == from_line["ids_sha256"]
    assert json.loads(str(from_file["scenes"])) == ["a star", "it moves up", None]
    assert probe(tmp_path / "a.mp4").metadata["task"] == "film"
    size = Bundle.open(bundle).generation_config
    assert from_file["duration"] == round((1 + 3 * (size.num_frames - 1)) / size.fps, 3)
    same = made(capsys, bundle, "a star", "--num-scenes", 2, "-o", tmp_path / "c.mp4")
    assert json.loads(str(same["scenes"])) == ["a star", "a star"]


def test_several_films_have_seeds_of_their_own(
    capsys: pytest.CaptureFixture[str], bundle: Path, tmp_path: Path
) -> None:
    result = made(capsys, bundle, "a", "--num-scenes", 2, "--num-samples", 2, "-o", tmp_path / "a.mp4", "--seed", 5)
    films = result["clips"]
    assert isinstance(films, list)
    assert [film["seed"] for film in films] == ["5", "7"]
    assert films[0]["ids_sha256"] != films[1]["ids_sha256"]
    assert (tmp_path / "a-2.mp4").exists()


@pytest.mark.parametrize("film", [True, False])
def test_a_stream_is_what_would_have_been_written_at_once(
    capsys: pytest.CaptureFixture[str], bundle: Path, tmp_path: Path, *, film: bool
) -> None:
    said = ("--scene", "a star", "--scene", "it moves") if film else ("a star",)
    whole = made(capsys, bundle, *said, "-o", tmp_path / "whole.mp4", "--seed", 5)
    streamed = made(capsys, bundle, *said, "-o", tmp_path / "streamed.mp4", "--seed", 5, "--stream")
    assert streamed["ids_sha256"] == whole["ids_sha256"]
    timing = streamed["timing"]
    assert isinstance(timing, dict)
    assert 0 < timing["first_frame"] <= timing["writing"]
    one, other = read_clip(tmp_path / "whole.mp4"), read_clip(tmp_path / "streamed.mp4")
    assert one.frames is not None
    assert other.frames is not None
    assert one.frames.shape == other.frames.shape
    assert np.abs(one.frames.astype(int) - other.frames).mean() < 6  # both are compressed, each in its own way
    assert one.samples is not None
    assert other.samples is not None
    assert len(one.samples) == len(other.samples)
    np.testing.assert_allclose(one.samples[:-64], other.samples[:-64], atol=0.02)
    assert probe(tmp_path / "whole.mp4").metadata == probe(tmp_path / "streamed.mp4").metadata
    bare = made(capsys, bundle, *said, "-o", tmp_path / "bare.mp4", "--stream", "--no-metadata")
    assert probe(tmp_path / "bare.mp4").metadata == {}
    assert bare["ids_sha256"]


def test_like_makes_a_film_again(capsys: pytest.CaptureFixture[str], bundle: Path, tmp_path: Path) -> None:
    start, end = a_clip(bundle, tmp_path / "start.mp4", 9), a_clip(bundle, tmp_path / "end.mp4", 6)
    first = made(
        capsys, bundle, "--scene", "a star", "--scene", "-", "--video", start, "--until", end, "--memory", 1,
        "-o", tmp_path / "one.mp4",
    )  # fmt: skip
    assert (first["given_video"], first["given_until"], first["memory"]) == ("start.mp4", "end.mp4", "1")
    again = made(capsys, bundle, "--like", tmp_path / "one.mp4", "-o", tmp_path / "two.mp4", "--stream")
    assert again["same_ids"] is True
    loop = made(capsys, bundle, "--scene", "a", "--scene", "b", "--loop", "-o", tmp_path / "loop.mp4")
    assert made(capsys, bundle, "--like", tmp_path / "loop.mp4", "-o", tmp_path / "loop2.mp4")["same_ids"] is True
    assert loop["loop"] == "yes"
    guided = ("--scene", "a star", "--scene", "-", "--negative-prompt", "b", "--guidance-scale", 2)
    made(capsys, bundle, *guided, "-o", tmp_path / "guided.mp4")
    assert made(capsys, bundle, "--like", tmp_path / "guided.mp4", "-o", tmp_path / "g2.mp4")["same_ids"] is True
    made(capsys, bundle, "a star", "-o", tmp_path / "single.mp4")
    scenes = ("--scene", "a", "--scene", "b")
    longer = made(capsys, bundle, "--like", tmp_path / "single.mp4", *scenes, "-o", tmp_path / "l.mp4")
    assert longer["task"] == "film"
    picture = tmp_path / "picture.png"
    a_clip(bundle, picture, 1)
    moving = made(capsys, bundle, "a", "--num-scenes", 2, "--image", picture, "-o", tmp_path / "m.mp4")
    size = Bundle.open(bundle).generation_config
    assert moving["duration"] == round((1 + 2 * (size.num_frames - 1)) / size.fps, 3)


def test_what_does_not_go_together_is_refused_in_words(
    capsys: pytest.CaptureFixture[str], bundle: Path, tmp_path: Path
) -> None:
    empty, binary = tmp_path / "empty.txt", tmp_path / "binary.txt"
    empty.write_text("# nothing\n")
    binary.write_bytes(b"\xff\xfe\x00")
    clip = a_clip(bundle, tmp_path / "clip.mp4", 5)
    made(capsys, bundle, "a", "--num-scenes", 2, "-o", tmp_path / "film.mp4")
    facts = probe(tmp_path / "film.mp4").metadata
    for number, scenes in enumerate(("5", "null", "[1]", '"ab"')):
        picture = Clip(np.zeros((1, 8, 8, 3), np.uint8), 8.0, None, 16000)
        write_clip(picture, tmp_path / f"damaged{number}.mp4", facts | {"scenes": scenes})
        code, _, err = run(capsys, bundle, "--like", tmp_path / f"damaged{number}.mp4", "-o", tmp_path / "out.mp4")
        assert code == 1
        assert "scenes must be a list of prompts" in err
    for said, words in (
        (("--scene", "a", "--num-scenes", "2"), "must be given once, got --scene and --num-scenes"),
        (("a star", "--scene", "a"), "'a star' beside them"),
        (("--scenes", empty), "must have a prompt a line"),
        (("--scenes", binary), "it is not UTF-8"),
        (("--scenes", tmp_path / "none.txt"), "No such file"),
        (("a", "--loop"), "--loop is an option of films"),
        (("a", "--memory", "1"), "--memory is an option of films"),
        (("a", "--until", clip), "--until is an option of films"),
        (("--scene", "a", "--task", "text_to_video"), "--task is an option of single clips"),
        (("--scene", "a", "--upsample"), "--upsample is an option of single clips"),
        (("--scene", "a", "--loop"), "two scenes or more"),
        (("a blue thing", "--like", tmp_path / "film.mp4"), "whose prompts are those of its scenes"),
        (("--scene", "a", "--loop", "--until", clip), "not both"),
        (("a", "--stream", "--num-samples", "2"), "--stream writes one clip"),
        (("a", "--stream", "-o", tmp_path / "a.gif"), "--stream writes .mp4"),
        (("a", "--stream", "--task", "text_to_audio"), "cannot be streamed"),
    ):
        target = () if "-o" in said else ("-o", tmp_path / "out.mp4")
        code, _, err = run(capsys, bundle, *said, *target)
        assert code == 1, said
        assert words in err, (said, err)
    assert not (tmp_path / "out.mp4").exists()


def test_a_film_longer_than_the_model_has_learnt_is_told(
    capsys: pytest.CaptureFixture[str], bundle: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "learnt"
    shutil.copytree(bundle, copy)
    file = copy / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"trained_films": 2}))
    for count, told in ((2, False), (3, True)):
        code, _, err = run(capsys, copy, "a star", "--num-scenes", count, "-o", tmp_path / f"{count}.mp4")
        assert code == 0
        assert ("has learnt films of up to 2" in " ".join(err.split())) == told
