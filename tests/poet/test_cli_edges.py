"""The command line at its edges: files given twice or gone, metadata that cannot be trusted, devices, resumed runs."""

import hashlib
import io
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from poet import __version__
from poet.bundle import Bundle
from poet.cli import output
from poet.cli.main import main
from poet.media import Clip, probe, write_clip
from poet.testing import tiny_bundle

RECIPES = Path(__file__).parents[2] / "recipes"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("bundle") / "tiny"
    tiny_bundle(directory)
    return directory


@pytest.fixture
def generate(call: Callable[..., tuple[int, str, str]], bundle: Path) -> Callable[..., tuple[int, str, str]]:
    return lambda *arguments: call("generate", "--model", bundle, "--engine", "torch", "--json", *arguments)


def film(
    path: Path, *, frames: int = 9, sound: bool = True, metadata: dict[str, str] | None = None, seed: int = 0
) -> Path:
    rng = np.random.default_rng(seed)
    clip = Clip(
        frames=rng.integers(0, 255, (frames, 24, 40, 3), np.uint8) if frames else None,
        fps=8.0,
        samples=rng.uniform(-0.5, 0.5, 1800).astype(np.float32) if sound else None,
        sample_rate=1600,
    )
    write_clip(clip, path, metadata=metadata)
    return path


# ------------------------------------------------------------------------------------------------------------- --like


def test_a_clip_of_an_empty_prompt_is_made_again(generate: Callable[..., tuple[int, str, str]]) -> None:
    _, first, _ = generate("", "-o", "one.mp4")
    code, again, err = generate("--like", "one.mp4", "-o", "two.mp4")
    assert code == 0, err
    assert json.loads(again)["ids_sha256"] == json.loads(first)["ids_sha256"]
    assert json.loads(again)["same_ids"] is True


def test_no_prompt_is_not_recorded_as_an_empty_one(
    generate: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    generate("--image", film(tmp_path / "given.png", frames=1, sound=False), "-o", "one.mp4")
    assert "prompt" not in probe("one.mp4").metadata
    code, again, _ = generate("--like", "one.mp4", "-o", "two.mp4")
    assert code == 0
    assert json.loads(again)["same_ids"] is True


def test_like_refuses_other_weights_on_the_same_tokenizers(
    generate: Callable[..., tuple[int, str, str]], bundle: Path, tmp_path: Path
) -> None:
    generate("a red star", "-o", "one.mp4")
    other = tmp_path / "other"
    shutil.copytree(bundle, other)
    weights = load_file(other / "model.safetensors")
    weights["model.norm.weight"] *= 1.5
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    code, out, err = generate("--like", "one.mp4", "--model", other, "-o", "two.mp4")
    assert (code, out) == (1, "")
    for weights_sha256 in (Bundle.open(bundle).weights_sha256, Bundle.open(other).weights_sha256):
        assert weights_sha256[:12] in err
    assert "--model" in err
    assert "starting" not in err


def test_like_says_when_the_ids_are_others(generate: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    generate("a red star", "-o", "one.mp4")
    facts = probe("one.mp4").metadata | {"ids_sha256": "0" * 64}
    del facts["weights_sha256"]  # as in clips that were made before it was written
    film(tmp_path / "changed.mp4", metadata=facts)
    code, out, err = generate("--like", "changed.mp4", "-o", "two.mp4")
    assert code == 0
    assert json.loads(out)["same_ids"] is False
    assert "not those of changed.mp4" in err


def test_given_files_are_recorded_by_name_and_content_without_their_folder(
    generate: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    (tmp_path / "private").mkdir()
    clip = film(tmp_path / "private" / "given.mp4", sound=False)
    sound = film(tmp_path / "private" / "given.wav", frames=0)
    code, out, err = generate("--video", clip, "--audio", sound, "-o", "one.mp4")
    assert code == 0, err
    facts = probe("one.mp4").metadata
    for kind, file in (("video", clip), ("audio", sound)):
        assert facts[f"given_{kind}"] == json.loads(out)[f"given_{kind}"] == file.name
        assert facts[f"given_{kind}_sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
    assert "private" not in json.dumps(facts)


def test_like_finds_a_given_file_beside_the_clip_or_in_the_working_directory(
    generate: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    (tmp_path / "folder").mkdir()
    given = film(tmp_path / "folder" / "given.mp4")
    generate("--video", given, "-o", "folder/one.mp4")
    code, out, err = generate("--like", "folder/one.mp4", "-o", "two.mp4")
    assert code == 0, err
    assert json.loads(out)["same_ids"] is True
    given.rename("given.mp4")
    film(given, seed=1)  # another file of that name, beside the clip
    code, out, err = generate("--like", "folder/one.mp4", "-o", "two.mp4")
    assert code == 0, err
    assert json.loads(out)["same_ids"] is True


def test_like_takes_a_given_file_under_any_name_but_no_other_content(
    generate: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    given = film(tmp_path / "given.mp4")
    generate("--video", given, "-o", "one.mp4")
    renamed = given.rename("renamed.mp4")
    code, out, err = generate("--like", "one.mp4", "--video", renamed, "-o", "two.mp4")
    assert code == 0, err
    assert json.loads(out)["same_ids"] is True
    assert json.loads(out)["given_video"] == "renamed.mp4"
    other = film(tmp_path / "other.mp4", seed=1)
    code, out, err = generate("--like", "one.mp4", "--video", other, "-o", "three.mp4")
    assert (code, out) == (1, "")
    for file in (renamed, other):
        assert hashlib.sha256(file.read_bytes()).hexdigest()[:12] in err
    assert "starting" not in err
    code, _, err = generate("--like", "one.mp4", "--video", "missing.mp4", "-o", "three.mp4")
    assert code == 1
    assert "missing.mp4: does not exist" in err


def test_like_with_a_given_file_that_is_gone_names_it_and_its_option(
    generate: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    given = film(tmp_path / "given.mp4")
    generate("--video", given, "-o", "one.mp4")
    given.unlink()
    code, _, err = generate("--like", "one.mp4", "-o", "two.mp4")
    assert code == 1
    assert "'given.mp4'" in err
    assert "Give it with --video" in err
    assert "another content" not in err
    film(given, seed=1)
    code, _, err = generate("--like", "one.mp4", "-o", "two.mp4")
    assert code == 1
    assert "given.mp4 has another content" in err
    assert "Give it with --video" in err


@pytest.mark.parametrize("name", ["../given.mp4", "..", "", "x" * 300, "\0", "http://given.mp4"])
def test_like_follows_no_name_that_leads_elsewhere(
    generate: Callable[..., tuple[int, str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    generate("--video", film(tmp_path / "given.mp4"), "-o", "one.mp4")
    (tmp_path / "folder").mkdir()
    film(tmp_path / "folder" / "evil.mp4", metadata=probe("one.mp4").metadata | {"given_video": name})
    monkeypatch.chdir("folder")
    code, _, err = generate("--like", "evil.mp4", "-o", "two.mp4")
    assert code == 1
    assert "Give it with --video" in err
    assert generate("--like", "evil.mp4", "--video", tmp_path / "given.mp4", "-o", "two.mp4")[0] == 0


def test_an_image_takes_the_place_of_the_video_that_a_clip_was_made_from(
    generate: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    generate("--video", film(tmp_path / "given.mp4"), "-o", "one.mp4")
    picture = film(tmp_path / "given.png", frames=1, sound=False)
    code, out, err = generate("--like", "one.mp4", "--image", picture, "-o", "two.mp4")
    assert code == 0, err
    assert "given_video" not in json.loads(out)


@pytest.mark.parametrize(
    "change", [{"seed": "soon"}, {"top_p": "x"}, {"temperature": None}, {"engine": None}, {"given_video": "a.mp4"}]
)
def test_like_refuses_metadata_that_was_changed(
    generate: Callable[..., tuple[int, str, str]], bundle: Path, tmp_path: Path, change: dict[str, str | None]
) -> None:
    facts = {"task": "text_to_video", "prompt": "x", "seed": "1", "temperature": "1.0", "top_k": "0", "top_p": "1.0"}
    facts |= {"engine": "torch", "fingerprint": Bundle.open(bundle).fingerprint}
    kept = {name: value for name, value in {**facts, **change}.items() if value is not None}
    code, _, err = generate("--like", film(tmp_path / "evil.mp4", metadata=kept), "-o", "two.mp4")
    assert code == 1
    assert "metadata was changed" in err


# ------------------------------------------------------------------------------------------------ what is given, and -o


def test_a_file_that_nobody_named_is_not_written_over(
    generate: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    (tmp_path / "clip.mp4").write_text("precious")
    code, _, err = generate("a red star")
    assert code == 1
    assert "clip.mp4 is there already" in err
    assert (tmp_path / "clip.mp4").read_text() == "precious"


def test_a_reconstruction_does_not_replace_its_source(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = film(tmp_path / "film.mp4")
    before = source.read_bytes()
    assert main(["reconstruct", str(source), "-o", str(source), "--model", str(bundle)]) == 1
    assert "would be written over" in capsys.readouterr().err
    assert source.read_bytes() == before


def test_a_part_of_a_file_can_be_reconstructed(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = film(tmp_path / "film.mp4", frames=17)
    target = tmp_path / "part.mp4"
    options = ["--start", "0.5", "--duration", "0.625", "--max-duration", "1"]
    assert main(["reconstruct", str(source), "-o", str(target), "--model", str(bundle), *options]) == 0
    capsys.readouterr()
    assert probe(target).duration == pytest.approx(0.625, abs=0.07)


def test_a_clip_of_the_default_name_can_be_captioned(
    generate: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    film(tmp_path / "clip.mp4")
    code, out, _ = generate("--video", "clip.mp4", "--task", "captioning")
    assert code == 0
    assert "text" in json.loads(out)


@pytest.mark.parametrize("option", ["--video", "--like"])
def test_a_file_that_is_given_is_not_written_over(
    generate: Callable[..., tuple[int, str, str]], option: str, tmp_path: Path
) -> None:
    generate("a red star", "-o", "clip.mp4")
    before = (tmp_path / "clip.mp4").read_bytes()
    code, _, err = generate(option, "clip.mp4", "-o", "clip.mp4")
    assert code == 1
    assert "clip.mp4 is given and would be written over" in err
    assert (tmp_path / "clip.mp4").read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["x", "--task", "text_to_video", "--video", "given.mp4"], "takes no video"),
        (["x", "--image", "given.png", "--audio", "given.wav"], "takes no audio"),
        (["--task", "inpainting"], "needs video"),
        (["--task", "captioning", "--video", "given.mp4", "-o", "said.txt"], "printed"),
    ],
)
def test_what_a_task_does_not_take_is_refused_before_an_engine_is_started(
    generate: Callable[..., tuple[int, str, str]], tmp_path: Path, arguments: list[str], said: str
) -> None:
    film(tmp_path / "given.mp4")
    film(tmp_path / "given.png", frames=1, sound=False)
    film(tmp_path / "given.wav", frames=0)
    code, out, err = generate(*arguments)
    assert code == 1
    assert out == ""
    assert said in err
    assert "starting" not in err


@pytest.mark.parametrize(
    ("task", "suffix", "said"),
    [
        ("text_to_video", ".wav", "holds sound, and none is to be written"),
        ("text_to_image", ".WAV", "holds sound, and none is to be written"),
        ("audio_to_video", ".wav", "holds sound, and none is to be written"),
        ("text_to_audio", ".png", "holds pictures, and none are to be written"),
        ("video_to_audio", ".gif", "holds pictures, and none are to be written"),
    ],
)
@pytest.mark.parametrize("count", [1, 2])
def test_a_file_that_cannot_hold_what_a_task_writes_is_refused_before_anything_is_read(
    generate: Callable[..., tuple[int, str, str]], tmp_path: Path, task: str, suffix: str, said: str, count: int
) -> None:
    code, out, err = generate(
        "x", "--task", task, "--video", "missing.mp4", "-o", f"out{suffix}", "--num-samples", count
    )
    assert (code, out) == (1, "")
    assert said in err
    assert "missing.mp4" not in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "arguments", [["generate", "x", "--model"], ["evaluate", "--task", "text_to_video_audio", "-o", "report"]]
)
def test_a_task_that_nobody_trained_is_refused_before_an_engine_is_started(
    call: Callable[..., tuple[int, str, str]],
    bundle: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
) -> None:
    taught = Path(shutil.copytree(bundle, tmp_path / "taught"))
    config = json.loads((taught / "config.json").read_text())
    (taught / "config.json").write_text(json.dumps(config | {"trained_tasks": ["captioning", "text_to_audio"]}))
    for module in ("poet.generation.engine", "poet.evaluation.measure"):
        monkeypatch.setattr(f"{module}.load_engine", lambda *_: pytest.fail("an engine was started"))
    code, out, err = call(*arguments, taught)
    assert (code, out) == (1, "")
    assert "captioning, text_to_audio; got 'text_to_video_audio'" in err
    assert [path.name for path in tmp_path.iterdir()] == ["taught"]
    assert json.loads(call("info", taught, "--json")[1])["trained_tasks"] == ["captioning", "text_to_audio"]


def test_a_refusal_does_not_wait_for_torch(bundle: Path, tmp_path: Path) -> None:
    arguments = ["generate", "x", "--model", str(bundle), "--task", "text_to_video", "-o", "x.wav"]
    code = f"import sys; from poet.cli.main import main; print(main({arguments}), 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout == "1 False\n", done.stderr


def test_a_sound_is_not_reconstructed_into_a_picture(
    call: Callable[..., tuple[int, str, str]], bundle: Path, tmp_path: Path
) -> None:
    code, out, err = call("reconstruct", film(tmp_path / "a.wav", frames=0), "--model", bundle, "-o", "b.png")
    assert (code, out) == (1, "")
    assert "none are to be written" in err


def test_a_video_and_a_sound_are_continued_together(
    generate: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    sound = film(tmp_path / "given.wav", frames=0)
    _, out, _ = generate("--video", film(tmp_path / "given.mp4", sound=False), "--audio", sound, "-o", "one.mp4")
    assert json.loads(out)["task"] == "audio_video_continuation"


def test_a_caption_has_the_room_that_the_scene_leaves(
    generate: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    code, out, err = generate("--task", "captioning", "--video", film(tmp_path / "given.mp4"))
    assert code == 0, err
    assert isinstance(json.loads(out)["text"], str)


def test_reconstruct_refuses_a_bad_target_before_it_reads(
    call: Callable[..., tuple[int, str, str]], bundle: Path
) -> None:
    code, _, err = call("reconstruct", "missing.mp4", "--model", bundle, "-o", "out.xyz")
    assert code == 1
    assert ".xyz" in err


@pytest.mark.parametrize("metadata", [True, False])
def test_a_reconstruction_says_what_made_it_unless_asked_not_to(
    call: Callable[..., tuple[int, str, str]], bundle: Path, tmp_path: Path, metadata: bool
) -> None:
    source = film(tmp_path / "given.mp4")
    code, _, err = call(
        "reconstruct", source, "--model", bundle, "-o", "back.mp4", "--metadata" if metadata else "--no-metadata"
    )
    assert code == 0, err
    facts = probe("back.mp4").metadata
    assert facts.get("generator") == (f"Poet {__version__}" if metadata else None)


def test_a_folder_without_one_readable_clip_makes_no_shards(
    call: Callable[..., tuple[int, str, str]], bundle: Path, tmp_path: Path
) -> None:
    (tmp_path / "clips").mkdir()
    for name in ("one.mp4", "two.wav"):
        (tmp_path / "clips" / name).write_bytes(b"not media")
    code, out, err = call("encode", "clips", "--model", bundle, "-o", "shards")
    assert (code, out) == (1, "")
    assert "one.mp4" in err
    assert "two.wav" in err
    assert not (tmp_path / "shards").exists()
    film(tmp_path / "clips" / "three.mp4")
    code, out, _ = call("encode", "clips", "--model", bundle, "-o", "shards", "--json")
    assert code == 0
    assert (json.loads(out)["clips"], json.loads(out)["skipped"]) == (1, 2)


def test_encode_counts_the_clips_without_a_caption_also_those_of_an_earlier_run(
    call: Callable[..., tuple[int, str, str]], bundle: Path, tmp_path: Path
) -> None:
    (tmp_path / "clips").mkdir()
    for number in range(3):
        film(tmp_path / "clips" / f"{number}.mp4", seed=number)
    (tmp_path / "clips" / "1.txt").write_text("a red star\n")
    encode = ("encode", "clips", "--model", bundle, "-o", "shards", "--shard-size", 2)
    code, out, err = call(*encode)
    assert code == 0
    assert "\nwithout_caption: 2\n" in out
    assert "2 of 3 clips have no caption" in err
    again = json.loads(call(*encode, "--json")[1])
    assert (again["of_an_earlier_run"], again["without_caption"]) == (3, 2)


def test_encode_says_nothing_of_captions_where_every_clip_has_one(
    call: Callable[..., tuple[int, str, str]], bundle: Path, tmp_path: Path
) -> None:
    (tmp_path / "clips").mkdir()
    film(tmp_path / "clips" / "one.mp4")
    (tmp_path / "clips" / "one.txt").write_text("a red star")
    code, out, err = call("encode", "clips", "--model", bundle, "-o", "shards", "--json")
    assert (code, json.loads(out)["without_caption"]) == (0, 0)
    assert "caption" not in err


# ------------------------------------------------------------------------------------------------ devices and recipes


@pytest.mark.parametrize("device", ["toaster", "meta", "cuda:99"])
@pytest.mark.parametrize("command", ["reconstruct", "encode", "train"])
def test_a_device_that_is_not_there_is_told_in_one_line(
    call: Callable[..., tuple[int, str, str]], bundle: Path, tmp_path: Path, command: str, device: str
) -> None:
    film(tmp_path / "clips.mp4")
    arguments = {
        "reconstruct": ["clips.mp4", "--model", bundle, "-o", "out.mp4"],
        "encode": ["toybox:train", "--count", 1, "--model", bundle, "-o", "shards"],
        "train": [RECIPES / "nano" / "video_tokenizer.yaml", "-o", "run"],
    }[command]
    code, _, err = call(command, *arguments, "--device", device)
    assert code == 1
    assert "device must be" in err


def test_a_run_directory_that_is_a_file_is_told_in_one_line(
    call: Callable[..., tuple[int, str, str]], bundle: Path, tmp_path: Path
) -> None:
    (tmp_path / "taken").write_text("x")
    code, _, err = call("train", RECIPES / "nano" / "text_tokenizer.yaml", "-o", "taken")
    assert code == 1
    assert "taken" in err
    code, _, err = call("evaluate", bundle, "--what", "reconstruction", "-o", "taken", "--count", 1)
    assert code == 1
    assert "taken" in err


def test_tokenizers_are_put_together_again_by_the_same_command(
    call: Callable[..., tuple[int, str, str]], bundle: Path
) -> None:
    sets = [f"{kind}_tokenizer={bundle}/{kind}_tokenizer" for kind in ("video", "audio", "text")]
    sets += ["resolutions=[[24, 40]]", "defaults.height=24", "defaults.width=40", "defaults.num_frames=5"]
    command = ["train", RECIPES / "nano" / "tokenizers.yaml", "-o", "run", *(x for s in sets for x in ("--set", s))]
    assert [call(*command)[0], call(*command)[0]] == [0, 0]


def test_an_audio_codec_does_not_learn_from_sound_of_another_rate(call: Callable[..., tuple[int, str, str]]) -> None:
    code, _, err = call(
        "train", RECIPES / "nano" / "audio_tokenizer.yaml", "-o", "run", "--set", "codec.sample_rate=24000"
    )
    assert code == 1
    assert "24000" in err


@pytest.mark.parametrize("task", ["captioning", "inpainting", "unconditional"])
def test_a_task_that_the_judge_cannot_judge_is_refused(
    call: Callable[..., tuple[int, str, str]], bundle: Path, task: str
) -> None:
    code, _, err = call("evaluate", bundle, "--engine", "torch", "--task", task)
    assert code == 1
    assert "cannot be evaluated" in err


# ------------------------------------------------------------------------------------------------------ what is printed


def test_the_version_is_printed(call: Callable[..., tuple[int, str, str]]) -> None:
    assert call("--version") == (0, f"{__version__}\n", "")


def test_info_of_a_bundle_tells_its_weights(call: Callable[..., tuple[int, str, str]], bundle: Path) -> None:
    code, out, _ = call("info", bundle, "--json")
    assert code == 0
    assert json.loads(out)["weights_sha256"] == Bundle.open(bundle).weights_sha256


def test_metadata_cannot_steer_the_terminal(call: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    film(tmp_path / "evil.mp4", metadata={"prompt": "a\x1b[2J\nfile: trusted.mp4\u202e"})
    code, out, _ = call("info", "evil.mp4")
    assert code == 0
    assert "\x1b" not in out
    assert "\u202e" not in out
    assert "\nfile: trusted" not in out
    assert json.loads(call("info", "evil.mp4", "--json")[1])["metadata"]["prompt"].startswith("a\x1b[2J\n")


def test_a_terminal_without_unicode_shows_what_it_can(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    output.show_result({"prompt": "星 \udcff", "clips": [{"file": "a"}, {"file": "b"}]}, False)
    assert raw.getvalue().decode() == "prompt: \\u661f \\udcff\nclips:\n  - file: a\n  - file: b\n"


def test_numbers_that_are_not_finite_are_null_in_json(capsys: pytest.CaptureFixture[str]) -> None:
    output.show_result({"a": [float("nan"), {"b": float("inf")}], "c": 1.5}, True)
    assert json.loads(capsys.readouterr().out) == {"a": [None, {"b": None}], "c": 1.5}


def test_a_resumed_run_does_not_count_the_steps_of_the_earlier_one(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    with output.progress("training") as advance:
        advance(5001, 6001, "")
        now = 10.0
        advance(5011, 6001, "loss 1")
    assert capsys.readouterr().err == "training: 5011/6001, about 990 s left, loss 1\n"
