"""`poet evaluate`: what it prints, and which code the report says was measured."""

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from poet.bundle import Bundle
from poet.cli.main import main
from poet.evaluation import measure
from poet.evaluation.judge import Verdict
from poet.media import Clip, write_clip
from poet.testing import tiny_bundle, tiny_upsampler


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("bundle") / "tiny"
    tiny_bundle(directory)
    return directory


@pytest.fixture
def evaluate(
    capsys: pytest.CaptureFixture[str], bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., str]:
    """The command on the tiny bundle, with a judge for pictures that are no Toybox; returns standard output."""

    class Unmoved:
        def as_text(self) -> dict[str, str]:
            return {"colour": "red", "motion": "still"}

    def judge(frames: object, samples: object) -> Verdict:
        return Unmoved()  # type: ignore[return-value]

    monkeypatch.setattr(measure, "judge", judge)
    monkeypatch.setattr(measure, "judge_clip", lambda clip, truth: {"colour": True, "motion": False})
    monkeypatch.chdir(tmp_path)

    def evaluate(*options: object) -> str:
        told = ["evaluate", bundle, "--engine", "torch", "--task", "text_to_video", "--count", 2, *options]
        assert main([str(argument) for argument in told]) == 0
        return capsys.readouterr().out

    return evaluate


def test_it_ends_with_the_tables_of_the_report_and_then_its_path(evaluate: Callable[..., str]) -> None:
    out = evaluate()
    report = Path("evaluation/report.md").read_text()
    assert out == report[report.index("| | seen | unseen |") :].rstrip("\n") + "\n\nreport: evaluation/report.md\n"
    assert "| colour | 100.0 % (2 of 2; 34.2 to 100.0) | 100.0 % (2 of 2; 34.2 to 100.0) |" in out
    assert "| motion | 0.0 % (0 of 2; 0.0 to 65.8) |" in out


def test_json_holds_the_scores_and_no_table(evaluate: Callable[..., str]) -> None:
    result = json.loads(evaluate("--json"))
    assert result["attributes_right"] == {"seen": 0.5, "unseen": 0.5}
    assert result["summary"]["seen"]["colour"]["right"] == 2
    assert result["report"] == "evaluation/report.md"


def test_a_reconstruction_ends_with_a_table_for_each_split(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    command = ["evaluate", "--what", "reconstruction", "--split", "seen", "--count", "1", "-o", str(tmp_path)]
    assert main(command) == 0
    out = capsys.readouterr().out
    assert out.startswith("1 clips of seen through the tokenizers:\n\n| measure | value |\n")
    assert "| attributes kept | " in out
    assert out.endswith(f"\nreport: {tmp_path}\n")


def test_upsampling_is_measured_against_bicubic_and_the_tokenizer(
    evaluate: Callable[..., str], bundle: Path, tmp_path: Path
) -> None:
    with pytest.raises(AssertionError):  # exit code 1: the bundle has none
        evaluate("--what", "upsampling")
    own = tmp_path / "own"
    shutil.copytree(bundle, own)
    tiny_upsampler(Bundle.open(own), own / "upsampler")
    told = ["evaluate", own, "--what", "upsampling", "--engine", "torch", "--split", "seen", "--count", 2]
    told += ["--upsample-steps", 3, "--json", "-o", tmp_path / "report"]
    assert main([str(argument) for argument in told]) == 0
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    found = report["measures"]
    assert found["psnr above bicubic, seen"] == found["psnr, upsampled, seen"] - found["psnr, bicubic, seen"]
    assert 0 < found["psnr, tokenizer at that size, seen"] < 40
    assert 0 <= found["codes as in the true picture, seen"] < 0.5
    assert report["about"]["num_steps"] == 3
    assert report["summary"].keys() == {"seen, 64 pixels", "seen, 128 pixels"}
    assert (tmp_path / "report" / "seen.png").stat().st_size > 1000


@pytest.mark.parametrize("commit", ["abc1234", None])
def test_the_report_names_the_commit_that_it_was_measured_at_where_there_is_one(
    evaluate: Callable[..., str], monkeypatch: pytest.MonkeyPatch, commit: str | None
) -> None:
    asked = []

    def commit_of(checkout: Path) -> str | None:
        asked.append(checkout)
        return commit

    monkeypatch.setattr(measure, "commit_of", commit_of)
    evaluate()
    about = json.loads(Path("evaluation/report.json").read_text())["about"]
    assert about.get("commit") == commit
    assert ("commit" in about) is (commit is not None)
    assert ("- commit: abc1234\n" in Path("evaluation/report.md").read_text()) is (commit is not None)
    assert asked == [Path(measure.__file__).parents[2]]


def test_a_commit_is_that_of_the_tree_itself_and_changed_code_is_told(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    (tree / "poet" / "cli").mkdir(parents=True)
    (tree / "poet" / "cli" / "main.py").write_text("1\n")
    (tree / "README.md").write_text("one\n")
    assert measure.commit_of(tree) is None
    who = ["-c", "user.name=nobody", "-c", "user.email=nobody@example.org", "-c", "commit.gpgsign=false"]
    for command in (["init", "-q"], ["add", "."], [*who, "commit", "-qm", "first"]):
        subprocess.run(["git", "-C", str(tree), *command], check=True, capture_output=True)
    head = subprocess.check_output(["git", "-C", str(tree), "rev-parse", "HEAD"], text=True).strip()
    commit = measure.commit_of(tree)
    assert commit is not None
    assert head.startswith(commit)
    (tree / "README.md").write_text("two\n")
    assert measure.commit_of(tree) == commit
    (tree / "poet" / "cli" / "main.py").write_text("2\n")
    assert measure.commit_of(tree) == f"{commit} with changes"
    assert measure.commit_of(tree / "poet") is None  # as a package installed inside another project's tree


def test_a_tree_without_git_to_ask_has_no_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / ".git").mkdir()
    assert measure.commit_of(tmp_path) is None  # git finds no repository there
    monkeypatch.setenv("PATH", "/nowhere")
    assert measure.commit_of(tmp_path) is None


def test_options_of_films_and_of_clips_do_not_go_together(
    bundle: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for said, words in (
        (("--num-scenes", "3"), "--num-scenes is an option of --what films"),
        (("--what", "films", "--upsample"), "takes neither --upsample nor --task"),
        (("--what", "films", "--task", "text_to_video"), "takes neither --upsample nor --task"),
        (("--what", "movies"), "--what must be generation, films, reconstruction or upsampling"),
    ):
        assert main(["evaluate", str(bundle), "--engine", "torch", "-o", str(tmp_path / "out"), *said]) == 1
        assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_own_clips_are_measured_beside_another_bundle(
    capsys: pytest.CaptureFixture[str], bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    other, clips = tmp_path / "other", tmp_path / "clips"
    tiny_bundle(other, seed=1)
    clips.mkdir()
    usual = Bundle.open(bundle).generation_config
    for number in range(3):
        frames = np.random.default_rng(number).integers(256, size=(usual.num_frames, 48, 64, 3), dtype=np.uint8)
        write_clip(Clip(frames=frames, fps=usual.fps, samples=None, sample_rate=None), clips / f"{number}.mp4")

    def run(*options: object) -> int:
        told = ["evaluate", bundle, "--what", "reconstruction", *options]
        return main([str(argument) for argument in told])

    assert run("--clips", clips, "--against", other, "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    report = json.loads(Path("evaluation/report.json").read_text())
    assert facts[bundle.name]["num_clips"] == facts["other"]["num_clips"] == 3
    measures = report["measures"]
    assert measures["psnr gained"] == pytest.approx(
        measures[f"psnr, {bundle.name}"] - measures["psnr, other"], abs=1e-4
    )
    assert measures["psnr gained"] != 0
    assert Path("evaluation/clips.png").stat().st_size > 1000
    # Of twice the size, one clip, without another bundle; the same bundle gains nothing.
    assert run("--clips", clips, "--count", 1, "--start", 2, "--height", 32, "--width", 32) == 0
    assert "psnr gained" not in capsys.readouterr().out
    assert run("--clips", clips, "--against", bundle) == 0
    assert "| psnr gained | 0 |" in capsys.readouterr().out
    for wrong, words in (
        (("--clips", clips, "--what", "generation"), "nobody knows"),
        (("--height", 32), "go with --clips"),
        (("--clips", tmp_path / "none"), "does not exist"),
    ):
        assert run(*wrong) == 1
        assert words in " ".join(capsys.readouterr().err.split())


def test_own_sounds_of_any_length_are_measured(
    capsys: pytest.CaptureFixture[str], bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    rate = Bundle.open(bundle).vocabulary.sample_rate
    (tmp_path / "sounds").mkdir()
    for number, length in enumerate((800, 500, 500, 700)):
        samples = np.random.default_rng(number).uniform(-0.5, 0.5, length).astype(np.float32)
        write_clip(Clip(frames=None, fps=0.0, samples=samples, sample_rate=rate), tmp_path / f"sounds/{number}.wav")
    told = ["evaluate", bundle, "--what", "reconstruction", "--clips", tmp_path / "sounds", "--json"]
    assert main([str(argument) for argument in told]) == 0
    found = json.loads(capsys.readouterr().out)[bundle.name]
    assert found["num_clips"] == 4
    assert found["psnr"] is None
    assert found["mel_distance"] > 0
