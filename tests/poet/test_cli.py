"""The command line, in one process: exit codes, messages, results, and what bad input does."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from poet.bundle import Bundle
from poet.cli.main import main
from poet.media import probe, read_clip
from poet.testing import save_adapter, tiny_bundle, tiny_upsampler

DATA = Path(__file__).parents[1] / "data"
RECIPES = Path(__file__).parents[2] / "recipes"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("bundle") / "tiny"
    tiny_bundle(directory)
    return directory


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    code = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def generate(capsys: pytest.CaptureFixture[str], bundle: Path, *arguments: object) -> dict[str, object]:
    code, out, err = run(capsys, "generate", "--model", bundle, "--engine", "torch", "--json", *arguments)
    assert code == 0, err
    result = json.loads(out)
    assert isinstance(result, dict)
    return result


def test_a_text_becomes_a_video_with_sound_that_says_what_made_it(
    capsys: pytest.CaptureFixture[str], bundle: Path, tmp_path: Path
) -> None:
    target = tmp_path / "clip.mp4"
    result = generate(capsys, bundle, "a red star", "-o", target, "--seed", 5)
    facts = probe(target)
    assert facts.has_video
    assert facts.has_audio
    defaults = Bundle.open(bundle).generation_config
    assert facts.duration == pytest.approx(defaults.num_frames / defaults.fps, abs=0.1)
    assert facts.metadata["prompt"] == "a red star"
    assert facts.metadata["machine_made"] == "yes"
    assert facts.metadata["ids_sha256"] == result["ids_sha256"]


def test_the_same_seed_gives_the_same_ids_and_another_seed_others(
    capsys: pytest.CaptureFixture[str], bundle: Path, tmp_path: Path
) -> None:
    hashes = [
        generate(capsys, bundle, "a red star", "-o", tmp_path / "clip.mp4", "--seed", seed)["ids_sha256"]
        for seed in (7, 7, 8)
    ]
    assert hashes[0] == hashes[1] != hashes[2]


def test_like_makes_a_clip_again(capsys: pytest.CaptureFixture[str], bundle: Path, tmp_path: Path) -> None:
    first = generate(
        capsys, bundle, "a red star", "-o", tmp_path / "one.mp4", "--temperature", 0.7, "--top-k", 9, "--top-p", 0.8,
        "--guidance-scale", 2.5, "--negative-prompt", "a blue star",
        "--repetition-penalty", 1.4, "--repetition-window", 16,
    )  # fmt: skip
    again = generate(capsys, bundle, "--like", tmp_path / "one.mp4", "-o", tmp_path / "two.mp4")
    assert again["ids_sha256"] == first["ids_sha256"]
    assert (again["repetition_penalty"], again["repetition_window"]) == ("1.4", "16")
    assert read_clip(tmp_path / "one.mp4").frames is not None
    np.testing.assert_array_equal(read_clip(tmp_path / "one.mp4").frames, read_clip(tmp_path / "two.mp4").frames)


def test_guidance_and_a_negative_prompt_change_the_clip(
    capsys: pytest.CaptureFixture[str], bundle: Path, tmp_path: Path
) -> None:
    def ids(*options: object) -> str:
        made = generate(capsys, bundle, "a red star", "-o", tmp_path / "clip.mp4", "--seed", 5, *options)
        return str(made["ids_sha256"])

    plain = ids()
    assert ids("--guidance-scale", 1) == plain
    guided = ids("--guidance-scale", 3)
    assert len({plain, guided, ids("--guidance-scale", 3, "--negative-prompt", "a blue cross")}) == 3
    code, _, err = run(
        capsys, "generate", "a star", "--model", bundle, "--negative-prompt", "a", "-o", tmp_path / "a.mp4"
    )
    assert code == 1
    assert "guidance_scale other than 1" in err


def test_parallel_decoding_is_asked_for_recorded_and_done_again(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    tiny_bundle(tmp_path / "tiny")
    file = tmp_path / "tiny" / "config.json"
    code, _, err = run(capsys, "generate", "a star", "--model", tmp_path / "tiny", "--engine", "torch",
                       "--decoding", "parallel", "-o", tmp_path / "no.mp4")  # fmt: skip
    assert code == 1
    assert "has not learnt to write many ids at once" in err
    file.write_text(json.dumps(json.loads(file.read_text()) | {"trained_parallel": True}))

    def made(name: str, *options: object) -> dict[str, object]:
        return generate(capsys, tmp_path / "tiny", *options, "-o", tmp_path / name)

    said = ("--decoding", "parallel", "--steps", 9, "--schedule", "linear", "--order", "frames",
            "--choice-temperature", 0.5, "--guidance-scale", 2, "--guidance-stop", 0.5)  # fmt: skip
    first = made("first.mp4", "a star", "--seed", 5, *said)
    assert (first["decoding"], first["steps"], first["schedule"], first["order"]) == (
        "parallel",
        "9",
        "linear",
        "frames",
    )
    again = made("again.mp4", "--like", tmp_path / "first.mp4")
    assert again["same_ids"] is True
    other = made("other.mp4", "--like", tmp_path / "first.mp4", "--order", "whole")
    assert other["ids_sha256"] != first["ids_sha256"]
    assert other["steps"] == "9"
    plain = made("plain.mp4", "--like", tmp_path / "first.mp4", "--decoding", "autoregressive")
    assert "steps" not in plain
    assert plain["ids_sha256"] == made("other-plain.mp4", "a star", "--seed", 5, "--guidance-scale", 2)["ids_sha256"]
    usual = made("usual.mp4", "a star", "--decoding", "parallel")
    assert (usual["steps"], usual["guidance_scale"], usual["guidance_stop"]) == ("16", "1.0", "1.0")
    file = tmp_path / "tiny" / "generation_config.json"
    parallel = {"num_steps": 9, "guidance_scale": 2.0, "guidance_stop": 0.5}
    file.write_text(json.dumps(json.loads(file.read_text()) | {"parallel": parallel}))
    own = made("own.mp4", "a star", "--decoding", "parallel", "--seed", 5)
    assert (own["steps"], own["guidance_scale"], own["guidance_stop"]) == ("9", "2.0", "0.5")
    assert made("alone.mp4", "a star")["guidance_scale"] == "1.0"
    assert made("again.mp4", "--like", tmp_path / "usual.mp4")["same_ids"] is True
    for options, words in (
        (("--steps", 5), "--steps is an option of parallel decoding"),
        (("--decoding", "all"), "autoregressive, parallel"),
        (("--decoding", "parallel", "--steps", 0), "at least 1"),
        (("--decoding", "parallel", "--order", "rows"), "whole, parts, frames"),
        (("--decoding", "parallel", "--schedule", "sine"), "cosine, linear, square"),
        (("--decoding", "parallel", "--steps", 2, "--order", "frames"), "got 2 steps"),
        (("--decoding", "parallel", "--guidance-start", 0.5, "--guidance-stop", 0.4), "shares of the steps"),
    ):
        code, _, err = run(capsys, "generate", "a star", "--model", tmp_path / "tiny", "--engine", "torch",
                           "-o", tmp_path / "no.mp4", *options)  # fmt: skip
        assert code == 1
        assert words in err
    assert not (tmp_path / "no.mp4").exists()


def test_an_adapter_changes_the_clip_and_is_wanted_again(
    capsys: pytest.CaptureFixture[str], bundle: Path, tmp_path: Path
) -> None:
    opened = Bundle.open(bundle)
    style = save_adapter(opened.model_config, tmp_path / "style", fingerprint=opened.fingerprint)
    plain = generate(capsys, bundle, "a star", "--seed", 5, "-o", tmp_path / "plain.mp4")
    made = generate(capsys, bundle, "a star", "--seed", 5, "--lora", style, "-o", tmp_path / "made.mp4")
    assert made["ids_sha256"] != plain["ids_sha256"]
    assert "adapter" not in plain
    assert made["adapter"] == "style"
    again = generate(capsys, bundle, "--like", tmp_path / "made.mp4", "--lora", style, "-o", tmp_path / "again.mp4")
    assert again["same_ids"] is True
    other = save_adapter(opened.model_config, tmp_path / "other", seed=1)
    for options, words in (
        (("--like", tmp_path / "made.mp4"), "was made with the adapter 'style'"),
        (("--like", tmp_path / "made.mp4", "--lora", other), "Name it with --lora"),
        (("a star", "--lora", tmp_path / "nowhere"), "adapter_config.json cannot be read"),
    ):
        code, _, err = run(
            capsys, "generate", "--model", bundle, "--engine", "torch", "-o", tmp_path / "no.mp4", *options
        )
        assert code == 1
        assert words in err


def test_upsampling_is_asked_for_recorded_and_done_again(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    made = tiny_bundle(tmp_path / "tiny")
    tiny_upsampler(made, made.path / "upsampler")
    first, again, small = (tmp_path / f"{name}.mp4" for name in ("first", "again", "small"))
    said = generate(
        capsys, made.path, "a star", "--seed", 5, "--upsample", "--upsample-steps", 4,
        "--upsample-temperature", 0.5, "-o", first,
    )  # fmt: skip
    assert (said["upsample_steps"], said["upsample_temperature"]) == ("4", "0.5")
    generate(capsys, made.path, "--like", first, "-o", again)
    one, other = read_clip(first).frames, read_clip(again).frames
    assert one is not None
    assert other is not None
    np.testing.assert_array_equal(one, other)
    plain = generate(capsys, made.path, "--like", first, "--no-upsample", "-o", small)
    assert "upsample_steps" not in plain
    assert plain["ids_sha256"] == said["ids_sha256"]
    smaller = read_clip(small).frames
    assert smaller is not None
    assert one.shape[1:3] == (2 * smaller.shape[1], 2 * smaller.shape[2])
    tiny_upsampler(made, made.path / "upsampler", seed=1)
    for options, words in (
        (("--like", first), "was made with the upsampler"),
        (("a star", "--upsample-steps", 3), "add --upsample"),
        (("a star", "--upsample", "--upsample-steps", 0), "step"),
    ):
        code, _, err = run(capsys, "generate", "--model", made.path, "--engine", "torch", "-o", again, *options)
        assert code == 1
        assert words in err
    assert (
        generate(capsys, made.path, "--like", first, "--no-upsample", "-o", small)["ids_sha256"] == said["ids_sha256"]
    )


def test_no_metadata_leaves_it_out_and_like_then_says_so(
    capsys: pytest.CaptureFixture[str], bundle: Path, tmp_path: Path
) -> None:
    generate(capsys, bundle, "a red star", "-o", tmp_path / "bare.mp4", "--no-metadata")
    assert probe(tmp_path / "bare.mp4").metadata == {}
    code, _, err = run(capsys, "generate", "--model", bundle, "--like", tmp_path / "bare.mp4")
    assert code == 1
    assert "does not say what made it" in err


@pytest.mark.parametrize("prompt", ["一只红色的星星在跳跃", "🔴⭐ bounces 🎺", "a\nb\tc", "‮ right to left", ""])
def test_any_text_is_a_prompt(capsys: pytest.CaptureFixture[str], bundle: Path, tmp_path: Path, prompt: str) -> None:
    generate(capsys, bundle, prompt, "-o", tmp_path / "clip.mp4")
    assert probe(tmp_path / "clip.mp4").metadata["prompt"] == prompt


def test_a_prompt_of_ten_thousand_characters_is_refused_with_its_length(
    capsys: pytest.CaptureFixture[str], bundle: Path, tmp_path: Path
) -> None:
    code, out, err = run(
        capsys, "generate", "x" * 10_000, "--model", bundle, "--engine", "torch", "-o", tmp_path / "clip.mp4"
    )
    assert code == 1
    assert out == ""
    assert "10,000 characters" in err
    assert list(tmp_path.iterdir()) == []


def test_several_samples_become_several_files(capsys: pytest.CaptureFixture[str], bundle: Path, tmp_path: Path) -> None:
    result = generate(capsys, bundle, "a red star", "-o", tmp_path / "clip.mp4", "--num-samples", 3)
    clips = result["clips"]
    assert isinstance(clips, list)
    assert [Path(clip["file"]).name for clip in clips] == ["clip-1.mp4", "clip-2.mp4", "clip-3.mp4"]
    assert len({clip["ids_sha256"] for clip in clips}) == 3


@pytest.mark.parametrize(
    ("task", "suffix", "picture", "sound"),
    [
        ("text_to_video", ".mp4", True, False),
        ("text_to_image", ".png", True, False),
        ("text_to_audio", ".wav", False, True),
    ],
)
def test_each_kind_of_output_has_its_file(
    capsys: pytest.CaptureFixture[str], bundle: Path, tmp_path: Path, task: str, suffix: str, picture: bool, sound: bool
) -> None:
    target = tmp_path / f"out{suffix}"
    generate(capsys, bundle, "a red star", "--task", task, "-o", target)
    facts = probe(target)
    assert (facts.has_video, facts.has_audio) == (picture, sound)


def test_a_real_photograph_is_set_in_motion(capsys: pytest.CaptureFixture[str], bundle: Path, tmp_path: Path) -> None:
    photo = next(DATA.glob("*.jpg"))
    result = generate(capsys, bundle, "--image", photo, "-o", tmp_path / "clip.mp4")
    assert result["task"] == "image_to_video"
    assert probe(tmp_path / "clip.mp4").has_audio


def test_a_real_clip_is_continued_and_kept_in_front(
    capsys: pytest.CaptureFixture[str], bundle: Path, tmp_path: Path
) -> None:
    source = next(DATA.glob("*.mp4"))
    result = generate(capsys, bundle, "--video", source, "-o", tmp_path / "clip.mp4")
    assert result["task"] == "video_continuation"
    facts, given = probe(tmp_path / "clip.mp4"), probe(source)
    assert facts.duration > given.duration + 0.3
    defaults = Bundle.open(bundle).generation_config
    size = {"fps": defaults.fps, "height": defaults.height, "width": defaults.width}
    before, after = read_clip(source, **size).frames, read_clip(tmp_path / "clip.mp4", **size).frames
    assert before is not None
    assert after is not None
    assert abs(before.astype(int) - after[: len(before)]).mean() < 12  # H.264 of small noisy frames


def test_real_footage_through_the_tokenizers_keeps_size_and_duration(
    capsys: pytest.CaptureFixture[str], bundle: Path, tmp_path: Path
) -> None:
    source = next(DATA.glob("*.mp4"))
    code, out, err = run(
        capsys, "reconstruct", source, "--model", bundle, "-o", tmp_path / "back.mp4", "--json", "--max-duration", 60
    )
    assert code == 0, err
    facts, given = probe(tmp_path / "back.mp4"), probe(source)
    assert (facts.height, facts.width) == (given.height, given.width)
    assert facts.fps == pytest.approx(given.fps)
    assert facts.duration == pytest.approx(given.duration, abs=0.06)
    assert json.loads(out)["codes"] > 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["generate", "x", "--video", "missing.mp4"], "missing.mp4"),
        (["generate", "x", "--image", "missing.png"], "missing.png"),
        (["generate", "x", "-o", "clip.xyz"], ".xyz"),
        (["generate", "x", "-o", "no_such_folder/clip.mp4"], "no_such_folder"),
        (["generate", "x", "--task", "text_to_vidio"], "text_to_video"),
        (["generate", "x", "--engine", "tensorflow"], "tensorflow"),
        (["generate", "x", "--temperature", "-1"], "temperature"),
        (["generate", "x", "--image", "a.png", "--video", "b.mp4"], "not both"),
        (["reconstruct", "missing.mp4", "-o", "out.mp4"], "missing.mp4"),
        (["info", "missing.mp4"], "missing.mp4"),
        (["evaluate", "--what", "nothing"], "nothing"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_one(
    capsys: pytest.CaptureFixture[str],
    bundle: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    said: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    model = [str(bundle)] if arguments[0] == "evaluate" else [] if arguments[0] == "info" else ["--model", str(bundle)]
    code, out, err = run(capsys, *arguments, *model)
    assert code == 1
    assert out == ""
    assert said in err
    assert "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


def test_wrong_usage_has_exit_code_two(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "generate", "--no-such-option")[0] == 2
    assert run(capsys, "no-such-command")[0] == 2


def test_a_tokenizer_of_another_bundle_is_refused(
    capsys: pytest.CaptureFixture[str], bundle: Path, tmp_path: Path
) -> None:
    mixed = tmp_path / "mixed"
    shutil.copytree(bundle, mixed)
    description = mixed / "video_tokenizer" / "config.json"
    content = json.loads(description.read_text())
    content["spec"]["checksum"] = "0" * 64
    description.write_text(json.dumps(content))
    code, _, err = run(capsys, "generate", "x", "--model", mixed, "--engine", "torch", "-o", tmp_path / "clip.mp4")
    assert code == 1
    assert "video_tokenizer" in err


def test_an_unknown_recipe_key_names_the_nearest(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, _, err = run(
        capsys, "train", RECIPES / "nano" / "video_tokenizer.yaml", "-o", tmp_path, "--set", "learning_rat=1"
    )
    assert code == 1
    assert "'learning_rate'" in err


def test_a_missing_recipe_is_named(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, _, err = run(capsys, "train", tmp_path / "none.yaml")
    assert code == 1
    assert "none.yaml" in err


def test_a_full_disk_leaves_no_clip_and_says_so(bundle: Path, tmp_path: Path) -> None:
    """The limit on file size stands for a full disk: both make writing fail in the middle."""

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))

    command = [sys.executable, "-m", "poet.cli.main", "generate", "x", "--model", str(bundle), "--engine", "torch"]
    done = subprocess.run(
        [*command, "-o", str(tmp_path / "clip.mp4")], preexec_fn=limit, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1, done.stderr
    assert "clip.mp4" in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_during_training_ends_cleanly_and_the_run_goes_on(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "train: video_tokenizer\nsource: toybox:train\nsource_clips: 8\nvalidation_source: toybox:seen\n"
        "validation_clips: 1\nnum_steps: 100000\nbatch_size: 1\nadversarial_weight: 0.0\nloop: {log_every: 1}\n"
        "codec: {patch_size: [4, 8, 8], channels: 8, channel_multipliers: [1], temporal_downsampling: [],"
        " num_res_blocks: 1, num_bits: 4, entropy_group_bits: 4}\n"
    )
    command = [sys.executable, "-m", "poet.cli.main", "train", str(recipe), "-o", str(tmp_path / "run"), "--json"]
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    metrics = tmp_path / "run" / "metrics.jsonl"
    while not (metrics.exists() and metrics.read_text().count("\n") >= 3):
        assert process.poll() is None, process.communicate()[1]
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    result = json.loads(out)
    assert result["finished"] is False
    assert result["step"] >= 3
    assert "goes on from there" in err
    code = main(["train", str(recipe), "-o", str(tmp_path / "run"), "--set", "num_steps=1"])
    assert code == 1  # another recipe in the same directory is refused rather than mixed
