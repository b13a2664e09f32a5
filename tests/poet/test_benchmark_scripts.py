"""recipes: the benchmarks' command lines, their arithmetic, our own side on two clips; and the pages' tables of scores.

The peers live in environments of their own, so their sides are not run here.
"""

import importlib.util
import json
import math
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from poet.bundle import Bundle, default_bundle
from poet.generation.canvas import ParallelDecoding

ROOT = Path(__file__).resolve().parents[2]
BENCHMARKS = ROOT / "recipes" / "benchmarks"


def _load(file: Path) -> ModuleType:
    name = file.stem
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def codec() -> ModuleType:
    return _load(BENCHMARKS / "codec_versus_magvit2_pytorch.py")


def test_options_have_defaults_and_fewer_clips_than_one_batch_are_refused(
    codec: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    options = codec.parse([])
    assert options.sizes == [64, 128]
    assert len(options.peer_learning_rates) >= 2
    assert codec.parse(["--sizes", "64", "--rounds", "3"]).rounds == 3
    with pytest.raises(SystemExit):
        codec.parse(["--training-clips", "3", "--batch-size", "5"])
    assert "at least one batch of 5" in capsys.readouterr().err


def test_the_ratio_is_the_median_of_the_rounds_ratios(codec: ModuleType) -> None:
    def answer(encode: float, decode: float) -> dict[str, float]:
        return {"frames": 34.0, "encode": encode, "decode": decode}

    rounds = {"poet": [answer(1, 1), answer(2, 3), answer(1, 2)], "peer": [answer(7, 7), answer(7, 3), answer(11, 10)]}
    found = codec.compare_speed(rounds)
    assert found["both"]["ratio"] == 7
    assert (found["both"]["lowest_ratio"], found["both"]["highest_ratio"]) == (2, 7)
    assert found["both"]["frames_per_cpu_second"]["poet"] == pytest.approx(34 / 3, abs=0.01)
    assert found["encode"]["ratio"] == 7
    assert found["decode"]["ratio"] == 5


def test_our_worker_learns_from_two_clips_and_is_timed(codec: ModuleType, tmp_path: Path) -> None:
    clips = codec.draw_clips("train", 2, 64)
    assert clips.shape == (2, 17, 64, 64, 3)
    np.save(tmp_path / "clips.npy", clips)
    file = str(tmp_path / "clips.npy")
    worker = codec.Worker("poet", Path(sys.executable))
    try:
        about = worker.ask("describe")
        speed = worker.ask("time", size=64, precision="fp32", clips=file)
        plan = {"batch_size": 1, "learning_rate": None, "seed": 0}
        trained = worker.ask("train", plan=plan, clips=file, held_out=file)
    finally:
        worker.close()
    assert about["codes_of_a_clip"] == [5, 8, 8]
    assert about["bits_per_code"] == 12
    assert speed["frames"] == 34
    assert min(speed["encode"], speed["decode"], trained["cpu_seconds"]) > 0
    assert set(trained["psnr_by_weights"]) == {"last", "averaged"}
    assert trained["psnr"] == pytest.approx(max(trained["psnr_by_weights"].values()), abs=0.001)
    assert math.isfinite(trained["psnr"])


def test_clips_of_a_larger_size_are_the_same_pictures(codec: ModuleType) -> None:
    small, large = codec.draw_clips("seen", 1, 64), codec.draw_clips("seen", 1, 192)
    assert large.shape == (1, 17, 192, 192, 3)
    np.testing.assert_array_equal(large[:, :, 1::3, 2::3], small)
    with pytest.raises(SystemExit, match="multiples of 64"):
        codec.draw_clips("seen", 1, 96)


@pytest.fixture(scope="module")
def trainer() -> ModuleType:
    return _load(BENCHMARKS / "megatron_versus_transformers.py")


def test_speeds_of_two_trainers_are_medians_and_their_shares_of_the_peak(trainer: ModuleType) -> None:
    seconds = {"poet": [1.0, 2.0, 4.0], "transformers": [3.0, 3.0, 3.0]}
    found = trainer.compare(seconds, ids=1000, flops=6e14, peak=1e15)
    assert (found["ratio"], found["lowest_ratio"], found["highest_ratio"]) == (1.5, 0.75, 3.0)
    assert found["ids_per_second"] == {"poet": 500.0, "transformers": pytest.approx(333.3, abs=0.05)}
    assert found["mfu"] == {"poet": 0.3, "transformers": 0.2}
    assert trainer.compare(seconds, ids=1000, flops=6e14, peak=None)["mfu"] is None


def test_the_verdict_on_mfu_tells_a_missing_figure_from_a_low_one(trainer: ModuleType) -> None:
    def verdict(*shares: float | None) -> str:
        cases = [{"size": f"size {i}", "mfu": share and {"poet": share}} for i, share in enumerate(shares)]
        return str(trainer.verdict({"cases": cases}))

    assert "missing" in verdict(None)
    assert "at least 45% at every size" in verdict(0.45, 0.6)
    assert verdict(0.6, 0.44) == "MFU is below 45% at size 1."


def test_the_longest_clip_fills_a_row_and_no_more(trainer: ModuleType) -> None:
    bundle = ROOT / "poet" / "bundles" / "nano"
    latents = trainer.longest_clip(bundle, 768)
    # A latent frame of 64 video ids brings 32 of sound, the first one 8.
    assert 768 - 96 < 64 * latents + 32 * (latents - 1) + 8 + 32 <= 768
    assert trainer.longest_clip(bundle, 2048) > 2.5 * latents


@pytest.mark.slow
def test_both_trainers_step_on_the_same_rows_without_a_gpu(tmp_path: Path) -> None:
    script = BENCHMARKS / "megatron_versus_transformers.py"
    command = [sys.executable, str(script), "--device", "cpu", "--rows", "2", "--output", str(tmp_path / "report.json")]
    command += ["--rounds", "1", "--steps", "1", "--warmup", "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "The GPU's figure is missing" in done.stdout
    [case] = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))["cases"]
    assert case["mfu"] is None
    assert case["ratio"] > 0


def test_a_missing_peer_is_named_with_what_to_do(tmp_path: Path) -> None:
    script = BENCHMARKS / "codec_versus_magvit2_pytorch.py"
    command = [sys.executable, str(script), "--peer-environment", str(tmp_path / "nowhere")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "--make-environment" in done.stderr


def test_benchmarks_can_be_skipped_by_name() -> None:
    names = ("SKIP_CODEC", "SKIP_VLLM", "SKIP_PARALLEL", "SKIP_FILMS", "SKIP_MEGATRON")
    environment = dict.fromkeys(names, "1") | {"PATH": "/usr/bin:/bin"}
    command = ["bash", str(BENCHMARKS / "run.sh")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    assert all(name in done.stdout for name in names)


def test_scores_go_where_the_pages_have_room_for_them_and_nowhere_else() -> None:
    script = _load(ROOT / "recipes" / "nano" / "fill_scores.py")
    page = "before\n<!-- scores -->\nold \\1\n<!-- end -->\nafter\n"
    once = script.filled(page, {"scores": "new \\2", "tokenizers": "none"})
    assert once == "before\n<!-- scores -->\nnew \\2\n<!-- end -->\nafter\n"
    assert script.filled(once, {"scores": "new \\2"}) == once
    with pytest.raises(SystemExit, match="must be followed by"):
        script.filled("<!-- scores -->\n", {"scores": "new"})
    for name in script.PAGES:
        assert "<!-- scores -->" in (ROOT / name).read_text(encoding="utf-8"), name


def test_shares_are_read_from_the_report_by_split() -> None:
    script = _load(ROOT / "recipes" / "nano" / "fill_scores.py")
    found = {"right": 3, "count": 4, "share": 0.75}
    report = {
        "about": {
            "date": "2026-11-20",
            "engine": "torch",
            "temperature": 0.9,
            "top_p": 1.0,
            "top_k": 0,
            "guidance_scale": 2.0,
        },
        "summary": {"seen": {"colour": found, "sync": found}, "unseen": {"colour": {**found, "share": 0.5}}},
        "measures": {"attributes right, seen": 0.751, "attributes right, unseen": 0.5},
    }
    lines = script.scores(report, "abc1234").splitlines()
    assert "| **all attributes** | **75.1 %** | **50.0 %** |" in lines
    assert "| colour | 75.0 % | 50.0 % |" in lines
    assert "| picture and sound in step | 75.0 % |  |" in lines
    assert "4 generated clips" in lines[0]
    assert "abc1234, 2026-11-20, torch, temperature 0.9, top-p 1.0, top-k off, guidance 2.0" in lines[1]


def test_figures_of_films_are_read_from_their_report() -> None:
    script = _load(ROOT / "recipes" / "nano" / "fill_scores.py")
    measures = {f"{name}, {split}": 0.911 for name in script.FILM_MEASURES for split in ("seen", "unseen")}
    measures["last scene minus first, points, seen"] = -4.64
    report = {
        "title": "Films of 8 scenes, 40 a split",
        "about": {"date": "2026-11-22", "temperature": 0.9},
        "measures": measures,
    }
    lines = script.films(report, "abc1234").splitlines()
    assert lines[0].startswith(
        "Films of 8 scenes, 40 a split (`poet evaluate --what films`, commit abc1234, 2026-11-22"
    )
    assert "| **all attributes, all scenes** | 91.1 % | 91.1 % |" in lines
    assert "| last scene less the first | -4.6 points | +0.9 points |" in lines


@pytest.fixture(scope="module")
def long_films() -> ModuleType:
    return _load(BENCHMARKS / "films_versus_full_attention.py")


def test_scenes_of_films_are_compared_with_the_first_and_with_full_attention(
    long_films: ModuleType, tmp_path: Path
) -> None:
    def cost(seconds: float, prefill: float, pages: int) -> dict[str, float]:
        return {"seconds": seconds, "prefill": prefill, "pages": pages}

    found = {
        "scenes": {1: [cost(2, 0.1, 50), cost(4, 0.1, 50)], 28: [cost(3, 0.2, 185), cost(5, 0.4, 185)]},
        "full": {1: [cost(2, 0.1, 50)], 28: [cost(30, 10, 1400)]},
    }
    rows = long_films.compare(found, 1000)
    assert rows["28"]["scenes"] == {
        "seconds": 4.0, "prefill": 0.3, "pages": 185, "cache_bytes": 185_000, "times_first": 1.375,
    }  # fmt: skip
    assert (rows["28"]["full_over_scenes_seconds"], rows["28"]["full_over_scenes_prefill"]) == (10, 50)
    assert rows["1"]["scenes"]["times_first"] == 1
    report = {
        "scenes": rows,
        "most_pages": {"1": 54, "28": 185},
        "first_frame": {"first_frame": 0.29, "whole_clip": 2.1, "share": 0.138, "highest_share": 0.15},
    }
    table = long_films.table(report)
    assert "| 28 | 4.00 | 1.38 | 0.300 | 185 (185) | 0.2 MB | 30.00 (10.0 times) | 10.000 (50 times) | 1400 |" in table
    assert "14 % (at most 15 %)" in table
    long_films.plot(report, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000
    alone = long_films.compare({"scenes": found["scenes"]}, 1000)
    assert "full" not in alone["28"]
    assert "| 28 | 4.00 | 1.38 | 0.300 | 185 (185) | 0.2 MB |  |  |  |" in long_films.table(report | {"scenes": alone})


def test_pages_of_a_film_are_those_of_one_layer_and_of_one_scene_in_the_others(
    long_films: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    config = Bundle.open(default_bundle()).model_config
    scene, layers = config.scene_length, config.num_layers
    assert (
        long_films.most_pages(config, 28, 500, 128) == math.ceil((27 * scene + 500) / 128) + (layers - 1) * scene // 128
    )
    assert long_films.parse(["--scenes", "8", "1", "8"]).scenes == [1, 8]
    with pytest.raises(SystemExit):
        long_films.parse(["--rounds", "0"])
    assert "at least 1" in capsys.readouterr().err


def test_a_request_stands_behind_as_many_scenes_as_it_is_asked_for(long_films: ModuleType) -> None:
    bundle = Bundle.open(default_bundle())
    asked = long_films.request_of(bundle, 3, 7)
    assert len(asked.context_ids) == 2 * bundle.model_config.scene_length
    assert not long_films.request_of(bundle, 1, 7).context_ids


def test_scores_carry_the_commit_that_the_report_names_and_the_present_one_only_for_a_report_without(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    script = _load(ROOT / "recipes" / "nano" / "fill_scores.py")
    monkeypatch.setattr(script.subprocess, "check_output", lambda *_, **__: "0000000\n")
    assert script.measured_at({"about": {"commit": "abc1234"}}) == "abc1234"
    assert script.measured_at({"about": {}}) == "0000000"


@pytest.fixture(scope="module")
def parallel() -> ModuleType:
    return _load(BENCHMARKS / "parallel_versus_autoregressive.py")


def test_parallel_decoding_is_compared_round_by_round(parallel: ModuleType, tmp_path: Path) -> None:
    seconds = {"autoregressive": [6.0, 7.0, 8.0], "4": [1.0, 2.0, 4.0], "24": [3.0, 3.5, 16.0]}
    latency = parallel.compare(seconds, {"autoregressive": 480, "4": 6, "24": 24}, 480)
    assert latency["autoregressive"] == {
        "seconds": 7.0, "ratio": 1.0, "lowest_ratio": 1.0, "highest_ratio": 1.0,
        "forward_passes": 480, "share_of_passes": 1.0,
    }  # fmt: skip
    assert (latency["4"]["ratio"], latency["4"]["lowest_ratio"], latency["4"]["highest_ratio"]) == (3.5, 2.0, 6.0)
    assert (latency["24"]["forward_passes"], latency["24"]["share_of_passes"]) == (24, 0.05)
    accuracy = {name: {"seen": 0.93, "unseen": 0.9} for name in seconds}
    rows = parallel.table({"latency": latency, "accuracy": accuracy}).splitlines()
    assert rows[3] == "| parallel, 4 steps | 6 | 2.00 | 3.50 (2.00 to 6.00) | 93.0 % | 90.0 % |"
    alone = parallel.table({"latency": latency, "accuracy": {}}).splitlines()
    assert alone[2] == "| autoregressive | 480 | 7.00 | 1.00 (1.00 to 1.00) |  |  |"
    for number, found in enumerate((accuracy, {})):
        parallel.plot({"latency": latency, "accuracy": found}, tmp_path / f"{number}.png")
        assert (tmp_path / f"{number}.png").stat().st_size > 5000


def test_the_parallel_benchmark_asks_as_the_pipeline_does_and_refuses_impossible_counts(
    parallel: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    assert parallel.parse([]).steps == [4, 8, 12, 16, 24]
    for bad in (["--steps", "4", "4"], ["--steps", "0"], ["--rounds", "0"], ["--count", "-1"]):
        with pytest.raises(SystemExit):
            parallel.parse(bad)
    assert "at least 1" in capsys.readouterr().err
    bundle = Bundle.open(default_bundle())
    plain, canvas = (parallel.request_of(bundle, 3, one) for one in (None, ParallelDecoding(num_steps=6)))
    assert plain.canvas is None
    assert canvas.canvas.num_steps == 6
    some = ParallelDecoding(num_steps=8, guidance_stop=0.375)
    assert [parallel.passes_of(some, scale) for scale in (1.0, 2.0)] == [8, 11]
    assert canvas.grammar == plain.grammar
    assert set(canvas.prefix_ids) - set(plain.prefix_ids) == {bundle.vocabulary.special("<parallel>")}
