"""Megatron's trainer against the reference: the same recipe, the same curve, whatever the cut; and what a kill leaves.

Float32, from the same weights. The tolerance of 1e-3 relative allows for sums in another order, over 50 steps.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import distributed
from torch.multiprocessing.spawn import ProcessExitedException, ProcessRaisedException

from poet.bundle import Bundle
from poet.errors import ConfigError
from poet.model.weights import load_transformer
from poet.testing import in_processes, tiny_bundle, tiny_shards
from poet.training.language import LanguageRecipe, LanguageTraining, ModelSize
from poet.training.loop import LoopConfig, fit
from poet.training.megatron_trainer import MegatronTraining, process_groups, train_with_megatron
from poet.training.parallelism import Parallelism

STEPS = 50
SIZES = {
    "hidden_size": 48,
    "ffn_hidden_size": 80,
    "num_layers": 3,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 16,
    "scene_length": 256,
    "max_position_embeddings": 1024,
}
CUTS = {
    "one process": (1, {}),
    "tensor 2": (2, {"tensor_parallel_size": 2}),
    "pipeline 2": (2, {"pipeline_parallel_size": 2, "first_stage_layers": 1, "micro_batch_size": 2}),
    "data 2": (2, {}),
    "data 2 with a shared optimizer": (2, {"distributed_optimizer": True, "micro_batch_size": 2}),
    "tensor 2, shared optimizer": (2, {"tensor_parallel_size": 2, "distributed_optimizer": True}),
    "tensor 2 with sequence parallel": (2, {"tensor_parallel_size": 2, "sequence_parallel": True}),
    "tensor 2, pipeline 2, recomputed": (
        4,
        {
            "tensor_parallel_size": 2,
            "pipeline_parallel_size": 2,
            "first_stage_layers": 2,
            "sequence_parallel": True,
            "recompute": "selective",
            "micro_batch_size": 4,
        },
    ),
    "pipeline 2, data 2, everything": (
        4,
        {
            "pipeline_parallel_size": 2,
            "last_stage_layers": 1,
            "distributed_optimizer": True,
            "recompute": "full",
            "micro_batch_size": 2,
        },
    ),
}


@dataclasses.dataclass(frozen=True)
class Ground:
    """What every test stands on."""

    bundle: Path
    shards: Path

    def recipe(self, **changes: Any) -> LanguageRecipe:
        values: dict[str, Any] = {
            "bundle": self.bundle,
            "start_from": self.bundle,
            "shards": self.shards,
            "validation_shards": self.shards,
            "model": ModelSize(**SIZES),
            "tasks": {"text_to_video_audio": 2.0, "text_to_audio": 1.0, "captioning": 1.0},
            "parallel_share": 0.4,
            "num_steps": STEPS,
            "batch_size": 8,
            "learning_rate": 3e-3,
            "warmup_steps": 5,
            "validation_batches": 2,
            "precision": "fp32",
            "export_dtype": "float32",
        }
        return LanguageRecipe(**values | changes)


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Ground:
    directory = tmp_path_factory.mktemp("ground")
    bundle = tiny_bundle(directory / "bundle", config=SIZES)
    return Ground(directory / "bundle", tiny_shards(bundle, directory / "shards"))


def loop(num_steps: int = STEPS) -> LoopConfig:
    return LoopConfig(num_steps=num_steps, log_every=1, validate_every=14, checkpoint_seconds=1e9)


def train(recipe: LanguageRecipe, config: LoopConfig, directory: Path) -> bool:
    """Runs in every process."""
    return train_with_megatron(recipe, config, directory, device="cpu").finished


def rows(directory: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def curve(directory: Path, name: str = "loss") -> list[float]:
    return [row[name] for row in rows(directory) if name in row]


@pytest.fixture(scope="module")
def reference(ground: Ground, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("reference")
    fit(LanguageTraining(ground.recipe()), loop(), directory)
    return directory


def assert_same_curves(one: Path, other: Path, names: Sequence[str]) -> None:
    for name in names:
        expected = torch.tensor(curve(one, name))
        torch.testing.assert_close(
            torch.tensor(curve(other, name)), expected, rtol=1e-3, atol=0, msg=lambda said, name=name: f"{name}: {said}"
        )


METRICS = (
    "loss",
    "video_loss",
    "audio_loss",
    "text_loss",
    "validation_loss",
    "learning_rate",
    "ids",
    "padding_share",
    "epoch",
)


@pytest.mark.parametrize(
    "cut", [pytest.param(cut, marks=[pytest.mark.slow] if CUTS[cut][0] > 2 else []) for cut in CUTS]
)
def test_every_cut_has_the_references_curve_and_weights(
    ground: Ground, reference: Path, tmp_path: Path, cut: str
) -> None:
    processes, parallel = CUTS[cut]
    assert (
        in_processes(processes, train, ground.recipe(parallel=Parallelism(**parallel)), loop(), tmp_path)
        == [True] * processes
    )
    assert len(curve(tmp_path)) == STEPS
    assert curve(reference)[-1] < 0.8 * curve(reference)[0]
    assert_same_curves(reference, tmp_path, METRICS)
    # Gradients of many sums; the optimizer divides by their size, so small differences stay small.
    torch.testing.assert_close(
        torch.tensor(curve(tmp_path, "gradient_norm")),
        torch.tensor(curve(reference, "gradient_norm")),
        rtol=1e-2,
        atol=0,
    )
    expected = load_transformer(reference / "export").state_dict()
    found = load_transformer(tmp_path / "export").state_dict()
    for name, weight in expected.items():
        assert (found[name] - weight).abs().max() < 1e-2 * weight.abs().max(), name
    assert Bundle.open(tmp_path / "export").fingerprint == Bundle.open(reference / "export").fingerprint


@pytest.mark.parametrize(
    "cut",
    [
        "data 2",
        *(
            pytest.param(cut, marks=pytest.mark.slow)
            for cut in ("one process", "tensor 2 with sequence parallel", "pipeline 2, data 2, everything")
        ),
    ],
)
def test_films_are_learnt_alike(ground: Ground, tmp_path: Path, cut: str) -> None:
    shards = tiny_shards(Bundle.open(ground.bundle), tmp_path / "films", count=24, film_scenes=4, num_latent_frames=3)
    films = {"films": shards, "film_share": 0.7, "films_per_batch": 4, "film_scenes": (2, 3), "film_noise": 0.1}
    fit(LanguageTraining(ground.recipe(**films)), loop(20), tmp_path / "reference")
    processes, parallel = CUTS[cut]
    changes = {**films, "parallel": Parallelism(**parallel)}
    in_processes(processes, train, ground.recipe(**changes), loop(20), tmp_path / "megatron")
    assert len(curve(tmp_path / "reference", "film_loss")) > 9
    assert len(curve(tmp_path / "reference", "loss")) > 2
    names = ["loss", "film_loss", "film_video_loss", "film_masked_video_loss", "validation_loss", "ids"]
    assert_same_curves(tmp_path / "reference", tmp_path / "megatron", names)
    if cut == "data 2":
        with pytest.raises(ProcessRaisedException, match="multiple of the 2 data-parallel processes, got 3"):
            in_processes(2, train, ground.recipe(**changes | {"films_per_batch": 3}), loop(1), tmp_path / "odd")


def test_the_same_steps_are_left_out(ground: Ground, tmp_path: Path) -> None:
    changes = {"spike_ratio": 1.002, "max_skipped_steps": 50, "learning_rate": 1e-4}
    fit(LanguageTraining(ground.recipe(**changes)), loop(30), tmp_path / "reference")
    changes["parallel"] = Parallelism(tensor_parallel_size=2)
    in_processes(2, train, ground.recipe(**changes), loop(30), tmp_path / "megatron")
    skipped = [curve(tmp_path / name, "skipped") for name in ("reference", "megatron")]
    assert skipped[0] == skipped[1]
    assert 0 < sum(skipped[0]) < 14  # of the 14 steps after the first 16
    assert_same_curves(tmp_path / "reference", tmp_path / "megatron", ["loss", "validation_loss"])


@pytest.mark.parametrize(
    "cuts",
    [
        ("tensor 2", "pipeline 2", "data 2", "one process"),
        pytest.param(
            ("data 2 with a shared optimizer", "pipeline 2, data 2, everything", "data 2 with a shared optimizer"),
            marks=pytest.mark.slow,
        ),
        ("data 2 with a shared optimizer", "tensor 2, shared optimizer"),
    ],
)
def test_a_run_goes_on_in_another_cut(ground: Ground, reference: Path, tmp_path: Path, cuts: tuple[str, ...]) -> None:
    for number, cut in enumerate(cuts, start=1):
        processes, parallel = CUTS[cut]
        in_processes(processes, train, ground.recipe(parallel=Parallelism(**parallel)), loop(7 * number), tmp_path)
    steps = 7 * len(cuts)
    assert [row["step"] for row in rows(tmp_path) if "loss" in row] == list(range(1, steps + 1))
    expected = torch.tensor(curve(reference)[:steps])
    # Validation measures the averaged weights, which are part of a checkpoint too.
    validated = [
        {row["step"]: row["validation_loss"] for row in rows(path) if "validation_loss" in row}
        for path in (reference, tmp_path)
    ]
    for step in validated[0].keys() & validated[1].keys():
        assert validated[1][step] == pytest.approx(validated[0][step], rel=1e-3)
    torch.testing.assert_close(torch.tensor(curve(tmp_path)), expected, rtol=1e-3, atol=0)


def test_a_run_goes_on_with_the_kind_of_optimizer_that_it_was_begun_with(ground: Ground, tmp_path: Path) -> None:
    in_processes(1, train, ground.recipe(), loop(2), tmp_path)
    shared = ground.recipe(parallel=Parallelism(distributed_optimizer=True))
    with pytest.raises(ProcessRaisedException, match="distributed_optimizer must be False"):
        in_processes(1, train, shared, loop(4), tmp_path)


def train_until_killed(recipe: LanguageRecipe, config: LoopConfig, directory: Path, step: int, rank: int) -> bool:
    """Kill this process at the start of a step, while the checkpoint of the step before is being written."""
    go_on = MegatronTraining.train_step

    def train_step(self: MegatronTraining, number: int) -> dict[str, float]:
        if number == step and distributed.get_rank() == rank:
            os.kill(os.getpid(), signal.SIGKILL)
        return go_on(self, number)

    MegatronTraining.train_step = train_step  # type: ignore[method-assign]  # of this fork alone
    return train(recipe, config, directory)


@pytest.mark.parametrize("kills", [1, pytest.param(5, marks=pytest.mark.slow)])
def test_runs_that_are_killed_at_any_step_repeat_and_skip_nothing(ground: Ground, tmp_path: Path, kills: int) -> None:
    recipe = ground.recipe(parallel=Parallelism(tensor_parallel_size=2))
    config = dataclasses.replace(loop(8 + 2 * kills), checkpoint_seconds=0)
    in_processes(2, train, recipe, config, tmp_path / "whole")
    random = np.random.default_rng(int(torch.initial_seed() % 2**32))
    for step in sorted(random.choice(np.arange(1, 8 + 2 * kills), kills, replace=False).tolist()):
        rank = int(random.integers(2))
        print(f"rank {rank} is killed at step {step}")
        # The survivor may notice first, and end with an error of its own.
        with pytest.raises((ProcessExitedException, ProcessRaisedException), match=r"SIGKILL|rank|Connection"):
            in_processes(2, train_until_killed, recipe, config, tmp_path / "killed", step, rank)
    in_processes(2, train, recipe, config, tmp_path / "killed")
    whole, killed = ((tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in ("whole", "killed"))
    assert [json.loads(line)["step"] for line in killed] == [json.loads(line)["step"] for line in whole]
    assert killed == whole  # to the last digit


def test_a_checkpoint_that_is_half_written_is_never_loaded(ground: Ground, tmp_path: Path) -> None:
    recipe = ground.recipe()
    in_processes(1, train, recipe, loop(3), tmp_path)
    checkpoints = tmp_path / "checkpoints"
    (checkpoints / "step-00000003").rename(checkpoints / "step-00000009.writing")
    in_processes(1, train, recipe, loop(2), tmp_path)
    assert [path.name for path in checkpoints.iterdir()] == ["step-00000002"]
    assert curve(tmp_path, "step")[-1] == 2


def test_a_signal_saves_and_stops_every_process(ground: Ground, tmp_path: Path) -> None:
    results = in_processes(2, train_until_told, ground.recipe(), loop(), tmp_path)
    assert results == [False, False]
    [kept] = (tmp_path / "checkpoints").iterdir()
    assert kept.name == "step-00000006"
    assert curve(tmp_path, "step")[-1] == 6


def train_until_told(recipe: LanguageRecipe, config: LoopConfig, directory: Path) -> bool:
    """One process of several gets a SIGTERM in its sixth step."""
    go_on = MegatronTraining.train_step

    def train_step(self: MegatronTraining, number: int) -> dict[str, float]:
        if number == 5 and distributed.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return go_on(self, number)

    MegatronTraining.train_step = train_step  # type: ignore[method-assign]  # of this fork alone
    return train(recipe, config, directory)


@pytest.mark.parametrize("cut", ["one process", "pipeline 2", "tensor 2"])
def test_random_weights_are_the_references_in_every_cut(ground: Ground, tmp_path: Path, cut: str) -> None:
    processes, parallel = CUTS[cut]
    recipe = ground.recipe(start_from=None, parallel=Parallelism(**parallel))
    in_processes(processes, train, recipe, loop(2), tmp_path / cut)
    fit(LanguageTraining(ground.recipe(start_from=None)), loop(2), tmp_path / "reference")
    assert_same_curves(tmp_path / "reference", tmp_path / cut, ["loss"])


def state_in_bfloat16(recipe: LanguageRecipe) -> set[tuple[str, str]]:
    """Part and dtype of everything that a run in bfloat16 would save, which on a CPU is built but not trained."""
    with process_groups(recipe.parallel, "cpu"):
        training = MegatronTraining(recipe)
        training.model.bfloat16()
        state = training.sharded_state_dict()
        parts = {
            "weights": {name: part for name, part in state.items() if name.startswith("d")},
            "averages": state["average"],
        }
        return {
            (kind, str(part.data.dtype))
            for kind, found in parts.items()
            for part in found.values()
            if part.data is not None
        }


def test_averages_of_a_run_in_bfloat16_are_saved_in_float32(ground: Ground) -> None:
    [found] = in_processes(1, state_in_bfloat16, ground.recipe())
    assert found == {("weights", "torch.bfloat16"), ("averages", "torch.float32")}


def test_a_run_of_one_process_and_one_of_several_do_not_take_each_others_place(ground: Ground, tmp_path: Path) -> None:
    fit(LanguageTraining(ground.recipe()), loop(2), tmp_path / "one")
    with pytest.raises(ProcessRaisedException, match="goes on without --nproc"):
        in_processes(2, train, ground.recipe(), loop(3), tmp_path / "one")
    assert len(curve(tmp_path / "one")) == 2
    in_processes(1, train, ground.recipe(), loop(2), tmp_path / "several")
    with pytest.raises(ConfigError, match="goes on with --nproc"):
        fit(LanguageTraining(ground.recipe()), loop(3), tmp_path / "several")
    assert len(curve(tmp_path / "several")) == 2


@pytest.mark.parametrize(
    ("processes", "changes", "message"),
    [
        (1, {"optimizer": "muon"}, "optimizer must be 'adamw' with Megatron"),
        (
            1,
            {"distilled_guidance": 2.0, "start_from": Path("x"), "parallel_share": 0.5},
            "distilled_guidance must be 1 with Megatron",
        ),
        (
            2,
            {"parallel": Parallelism(tensor_parallel_size=4)},
            "the number of processes must be a multiple of .* = 4, got 2",
        ),
        (2, {"batch_size": 7}, "batch_size must be a multiple of the 2 data-parallel processes"),
        (2, {"parallel": Parallelism(pipeline_parallel_size=2)}, "the 3 layers must be shared evenly"),
    ],
)
def test_what_cannot_be_trained_so_is_said(
    ground: Ground, tmp_path: Path, processes: int, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ProcessRaisedException, match=f"ConfigError: {message}"):
        in_processes(processes, train, ground.recipe(**changes), loop(), tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tensor_parallel_size": 0}, "at least 1"),
        ({"context_parallel_size": 2}, "a scene is never cut"),
        ({"sequence_parallel": True}, "tensor_parallel_size above 1"),
        ({"first_stage_layers": 2}, "pipeline_parallel_size above 1"),
        ({"micro_batch_size": 0}, "at least 1 or null"),
    ],
)
def test_a_cut_that_makes_no_sense_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Parallelism(**changes)
