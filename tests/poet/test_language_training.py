"""Training the language model: it learns, can be killed, and never takes codes of another vocabulary."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from safetensors.torch import load_file
from torch import Tensor, nn

from poet.bundle import Bundle
from poet.data.clips import SourceClip
from poet.data.encode import encode_source
from poet.data.films import layout_of
from poet.errors import CheckpointError, ConfigError, ShapeError
from poet.media import Clip
from poet.model.attention import SceneLayout
from poet.model.weights import load_transformer
from poet.testing import tiny_shards, tiny_tokenizer_bundle
from poet.training.config import to_plain
from poet.training.language import LanguageRecipe, LanguageTraining, ModelSize, TaskPhase
from poet.training.loop import LoopConfig, fit
from poet.training.losses import modality_means, target_losses
from poet.training.recipes import train

CLIPS, BATCH = 7, 3
SIZES = ModelSize(
    hidden_size=48,
    ffn_hidden_size=80,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    scene_length=256,
    max_position_embeddings=1024,
)
LOOP = LoopConfig(num_steps=8, log_every=3, validate_every=4, checkpoint_seconds=0)


class Waves:
    """Clip i is a colour and a tone that i decides: 5 frames of 24 x 40 pixels and 1,000 samples."""

    name = "waves"

    def __len__(self) -> int:
        return CLIPS

    def __getitem__(self, index: int) -> SourceClip:
        rng = np.random.default_rng(index)
        frames = np.broadcast_to(rng.integers(0, 256, (1, 3, 5, 3)), (5, 3, 5, 3)).astype(np.uint8)
        frames = frames.repeat(8, axis=1).repeat(8, axis=2)
        samples = 0.5 * np.sin(np.arange(1000) * (0.1 + 0.05 * index)).astype(np.float32)
        return SourceClip(f"clip-{index}", Clip(frames, 8.0, samples, 1600), f"a red star {'rises' * index}")


@dataclasses.dataclass(frozen=True)
class Ground:
    """What every test stands on."""

    bundle: Path
    shards: Path
    foreign_bundle: Path
    foreign_shards: Path

    def recipe(self, **changes: Any) -> LanguageRecipe:
        values: dict[str, Any] = {
            "bundle": self.bundle,
            "shards": self.shards,
            "validation_shards": self.shards,
            "model": SIZES,
            "tasks": {"text_to_video_audio": 2.0, "captioning": 1.0},
            "num_steps": 8,
            "batch_size": BATCH,
            "warmup_steps": 3,
            "validation_batches": 2,
        }
        return LanguageRecipe(**values | changes)

    def training(self, **changes: Any) -> LanguageTraining:
        return LanguageTraining(self.recipe(**changes))


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Ground:
    directory = tmp_path_factory.mktemp("ground")
    for name, seed in (("own", 0), ("foreign", 1)):
        bundle = tiny_tokenizer_bundle(directory / name, seed=seed)
        encode_source(Waves(), bundle, directory / f"{name}_shards")
    return Ground(directory / "own", directory / "own_shards", directory / "foreign", directory / "foreign_shards")


def _weights(training: LanguageTraining) -> dict[str, Tensor]:
    parts = {"model": training.model, "average": training.average.module}
    return {
        f"{part}.{name}": weight.detach().clone()
        for part, module in parts.items()
        for name, weight in module.named_parameters()
    }


def _same(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> bool:
    assert left.keys() == right.keys()
    return all(torch.equal(left[name], right[name]) for name in left)


def test_target_losses_are_cross_entropies_read_one_place_before() -> None:
    B, L, C, V = 2, 7, 5, 11
    torch.manual_seed(0)
    hidden, ids, head = torch.randn(B, L, C), torch.randint(V, (B, L)), nn.Linear(C, V)
    mask = torch.zeros(B, L, dtype=torch.bool)
    mask[0, 3:6], mask[1, 1], mask[1, 6] = True, True, True
    expected = [
        -F.log_softmax(head(hidden[b, i - 1]), dim=0)[ids[b, i]] for b in range(B) for i in range(L) if mask[b, i]
    ]
    for chunk in (1, 2, 5, 4096):
        losses = target_losses(hidden, ids, mask, head, chunk=chunk)
        torch.testing.assert_close(losses, torch.stack(expected))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda hidden, ids, mask: (hidden[:, 1:], ids, mask), r"\(B, L, C\), \(B, L\), \(B, L\)"),
        (lambda hidden, ids, mask: (hidden, ids, mask[:1]), r"\(B, L, C\), \(B, L\), \(B, L\)"),
        (lambda hidden, ids, mask: (hidden, ids, mask & False), "at least one target"),
        (lambda hidden, ids, mask: (hidden, ids, mask | True), "none at place 0"),
    ],
)
def test_targets_that_cannot_be_predicted_are_refused(change: Any, message: str) -> None:
    mask = torch.ones(2, 7, dtype=torch.bool)
    mask[:, 0] = False
    hidden, ids, mask = change(torch.zeros(2, 7, 5), torch.zeros(2, 7, dtype=torch.int64), mask)
    with pytest.raises(ShapeError, match=message):
        target_losses(hidden, ids, mask, nn.Linear(5, 11))


def test_modality_means_are_over_the_targets_of_each_kind() -> None:
    modality = torch.tensor([[0, 2, 2, 3], [1, 2, 3, 3]])
    mask = torch.tensor([[False, True, True, True], [False, False, True, True]])
    losses = torch.tensor([1.0, 2.0, 4.0, 5.0, 9.0])  # of kinds 2, 2, 3, 3, 3
    means = modality_means(losses, modality, mask, ("special", "text", "video", "audio"))
    assert means == {"video_loss": 1.5, "audio_loss": 6.0}


def test_losses_fall_and_come_by_modality(ground: Ground) -> None:
    training = ground.training(num_steps=40, batch_size=CLIPS, learning_rate=1e-2, text_dropout=0.0, ema_decay=0.5)
    first = training.train_step(0)
    assert {"loss", "special_loss", "text_loss", "video_loss", "audio_loss", "ids", "padding_share"} <= first.keys()
    # Untrained, the whole padded vocabulary is about equally likely; tied embeddings favour the id that stands before.
    assert first["loss"] == pytest.approx(np.log(training.config.vocab_size), rel=0.1)
    before = training.validate(0)
    for step in range(1, 40):
        last = training.train_step(step)
    after = training.validate(40)
    assert last["loss"] < 0.6 * first["loss"]
    for name in ("loss", "text_loss", "video_loss", "audio_loss"):
        assert after[name] < 0.8 * before[name], name
    assert last["epoch"] == 39


def test_a_run_that_learns_both_ways_reports_both_and_fills_canvases_better_than_chance(ground: Ground) -> None:
    training = LanguageTraining(ground.recipe(parallel_share=0.6, num_steps=60, ema_decay=0.5, validation_batches=6))
    before = training.validate(0)
    assert {"video_loss", "audio_loss", "masked_video_loss", "masked_audio_loss"} <= before.keys()
    for step in range(60):
        training.train_step(step)
    after = training.validate(60)
    assert all(after[name] < 0.9 * before[name] for name in before if name.startswith("masked")), (before, after)


def test_a_step_without_a_number_for_a_loss_changes_nothing_and_is_told(
    ground: Ground, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = ground.training()
    training.train_step(0)
    before, backward = _weights(training), training._backward
    monkeypatch.setattr(training, "_backward", lambda *arguments: backward(*arguments) * torch.nan)
    metrics = training.train_step(1)
    assert metrics["skipped"] == 1.0
    assert not {"loss", "video_loss", "gradient_norm"} & metrics.keys()
    assert _same(before, _weights(training))
    monkeypatch.undo()
    assert training.train_step(2)["skipped"] == 0.0
    assert not _same(before, _weights(training))


def test_the_loss_is_the_mean_of_its_modalities_weighted_by_their_targets(ground: Ground) -> None:
    training = ground.training(precision="fp32")
    batch = training.loader.batch(0)
    metrics = training.train_step(0)
    kinds = batch["modality"][batch["loss_mask"]]
    names = ("special", "text", "video", "audio")
    expected = sum(
        metrics[f"{name}_loss"] * float((kinds == place).float().mean())
        for place, name in enumerate(names)
        if f"{name}_loss" in metrics
    )
    assert metrics["loss"] == pytest.approx(expected, rel=1e-5)
    assert metrics["ids"] == float(batch["lengths"].sum())
    assert 0 <= metrics["padding_share"] < 1


@pytest.mark.parametrize(("precision", "optimizer"), [("fp32", "adamw"), ("bf16", "adamw"), ("bf16", "muon")])
def test_a_killed_run_goes_on_to_the_last_digit(precision: str, optimizer: str, ground: Ground, tmp_path: Path) -> None:
    whole = ground.training(precision=precision, optimizer=optimizer)
    fit(whole, LOOP, tmp_path / "whole")

    def killed() -> None:
        training = ground.training(precision=precision, optimizer=optimizer)
        step = training.train_step
        training.train_step = lambda n: os.kill(os.getpid(), signal.SIGKILL) or {} if n == 5 else step(n)  # type: ignore[method-assign]
        fit(training, LOOP, tmp_path / "killed")

    process = multiprocessing.get_context("fork").Process(target=killed)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    resumed = ground.training(precision=precision, optimizer=optimizer)
    with torch.no_grad():
        resumed.model.model.embed_tokens.weight.zero_()  # its own first weights must not matter
    assert fit(resumed, LOOP, tmp_path / "killed").finished
    files = [(tmp_path / run / "metrics.jsonl").read_bytes() for run in ("whole", "killed")]
    assert files[0] == files[1]
    assert _same(_weights(whole), _weights(resumed))


def test_three_threads_get_the_gradients_of_one(ground: Ground) -> None:
    found = []
    before = torch.get_num_threads()
    for threads in (1, 3):
        torch.set_num_threads(threads)
        try:
            training = ground.training(precision="fp32", batch_size=5, gradient_clip=1e9)
        finally:
            torch.set_num_threads(before)
        assert len(training.replicas.models) == threads
        metrics = training.train_step(0)
        found.append((metrics, {name: weight.grad for name, weight in training.model.named_parameters()}))
    (one, gradients), (three, summed) = found
    assert one["loss"] == pytest.approx(three["loss"], rel=1e-5)
    assert one["gradient_norm"] == pytest.approx(three["gradient_norm"], rel=1e-4)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, summed[name], rtol=1e-3, atol=1e-6)


def test_validation_does_not_disturb_training(ground: Ground) -> None:
    plain, measured = ground.training(), ground.training()
    for step in range(4):
        plain.train_step(step)
        measured.train_step(step)
        assert measured.validate(step) == measured.validate(step)
    assert _same(_weights(plain), _weights(measured))


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_every_weight_is_stepped_by_one_optimiser_and_gains_are_not_decayed(optimizer: str, ground: Ground) -> None:
    training = ground.training(optimizer=optimizer)
    groups = [
        (name, group, weight)
        for name, each in training.optimizers.by_name.items()
        for group in each.param_groups
        for weight in group["params"]
    ]
    found = {id(weight): (name, group["weight_decay"]) for name, group, weight in groups}
    assert len(found) == len(groups)
    for name, weight in training.model.named_parameters():
        matrix_of_a_layer = "layers" in name and "norm" not in name
        assert found[id(weight)] == (
            "muon" if optimizer == "muon" and matrix_of_a_layer else "adamw",
            0 if "norm" in name else training.recipe.weight_decay,
        ), name


def test_muon_moves_a_matrix_evenly_in_every_direction(ground: Ground) -> None:
    training = ground.training(optimizer="muon", warmup_steps=0, weight_decay=0.0, muon_learning_rate=0.01)
    weight = training.model.model.layers[0].mlp.gate_proj.weight
    before = weight.detach().clone()
    training.train_step(0)
    assert weight.grad is not None
    update, gradient = (torch.linalg.svdvals(each) for each in (weight.detach() - before, weight.grad))
    # The rate is that of the matrix's largest singular value, which five iterations bring to between 0.5 and 1.5 of it.
    assert float(update.max()) == pytest.approx(0.01 * 0.2 * max(weight.shape) ** 0.5, rel=0.5)
    stable_ranks = [float(each.square().sum() / each.max().square()) for each in (update, gradient)]
    assert stable_ranks[0] > 5 * stable_ranks[1]


@pytest.mark.parametrize("tied", [True, False])
def test_the_export_is_a_bundle_with_the_averaged_weights(tied: bool, ground: Ground, tmp_path: Path) -> None:
    training = ground.training(model=dataclasses.replace(SIZES, tie_embeddings=tied))
    for step in range(3):
        training.train_step(step)
    training.export(tmp_path / "bundle")
    training.export(tmp_path / "bundle")  # as a finished run that is started again does
    bundle = Bundle.open(tmp_path / "bundle")
    assert bundle.fingerprint == training.bundle.fingerprint
    assert bundle.model_config == training.config
    assert bundle.trained_tasks == ("captioning", "text_to_video_audio")
    tensors = load_file(bundle.weights)
    averages = dict(training.average.module.named_parameters())
    assert tensors.keys() == averages.keys()
    for name, tensor in tensors.items():
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(tensor, averages[name].bfloat16()), name
    model = load_transformer(bundle.path, dtype=torch.float32)
    assert torch.equal(model.model.norm.weight, averages["model.norm.weight"].bfloat16().float())


def test_a_run_can_start_from_a_bundles_weights(ground: Ground, tmp_path: Path) -> None:
    first = ground.training(export_dtype="float32")
    for step in range(2):
        first.train_step(step)
    first.export(tmp_path / "bundle")
    second = ground.training(start_from=tmp_path / "bundle", seed=5)
    for name, weight in second.model.named_parameters():
        assert torch.equal(weight, first.average.module.get_parameter(name)), name
    assert _same(second.model.state_dict(), second.average.module.state_dict())
    longer = ground.training(start_from=tmp_path / "bundle", model=dataclasses.replace(SIZES, scene_length=384))
    assert longer.config.scene_length == 384
    with pytest.raises(ConfigError, match=r"start_from .* has the sizes .*num_layers=2.* asks for .*num_layers=3"):
        ground.training(start_from=tmp_path / "bundle", model=dataclasses.replace(SIZES, num_layers=3))
    foreign = dataclasses.replace(ground, bundle=ground.foreign_bundle, shards=ground.foreign_shards)
    with pytest.raises(CheckpointError, match="their ids mean different things"):
        foreign.training(start_from=tmp_path / "bundle")


def test_masked_scenes_learn_what_guidance_foresees(ground: Ground, tmp_path: Path) -> None:
    first = ground.training(export_dtype="float32", parallel_share=0.7)
    for step in range(4):
        first.train_step(step)
    first.export(tmp_path / "bundle")
    taught = {"start_from": tmp_path / "bundle", "parallel_share": 0.7, "precision": "fp32"}

    def begun(**changes: Any) -> LanguageTraining:
        return ground.training(**taught | {"text_dropout": 0.3, "num_steps": 40} | changes)

    training = begun(distilled_guidance=2.5)
    batch = training.loader.batch(0)
    while not 1 < int(batch["parallel"].sum()) < BATCH:
        batch = training.loader.batch(training.loader.next_batch)
        training.loader.next_batch += 1
    layout = SceneLayout.from_prefix_lengths(
        batch["prefix_len"], batch["lengths"], batch["ids"].shape[1], parallel=batch["parallel"]
    )
    assert training.teacher is not None
    targets = training.teacher.targets(batch["inputs"], layout)
    low, high = training.bundle.vocabulary.text_range
    null = training.bundle.vocabulary.special("<null>")
    has_text = ((batch["inputs"] >= low) & (batch["inputs"] < high)).any(1)
    assert targets.taught.any(1).tolist() == (batch["parallel"] & has_text).tolist()
    assert bool(targets.taught.any())
    row, column = (batch["loss_mask"] & targets.taught).nonzero(as_tuple=True)
    model = load_transformer(tmp_path / "bundle")
    with torch.no_grad():
        dropped = batch["inputs"].masked_fill((batch["inputs"] >= low) & (batch["inputs"] < high), null)
        given, without = (model.logits(model(ids, layout)[row, column - 1]) for ids in (batch["inputs"], dropped))
    expected = (without + 2.5 * (given - without)).softmax(-1)
    torch.testing.assert_close(targets.probabilities(row, column), expected, rtol=1e-4, atol=1e-6)

    # The teacher is the beginning, so at a scale of nearly 1 there is nothing to learn of its scenes.
    def gradient(scale: float) -> float:
        training = begun(distilled_guidance=scale, parallel_share=1.0, text_dropout=0.0, tasks={"text_to_video": 1.0})
        return training.train_step(0)["gradient_norm"]

    assert gradient(1.0 + 1e-6) < 1e-3 * gradient(1.0)
    assert gradient(3.0) > 1e-2


def test_the_teacher_may_be_another_bundle_and_needs_no_guidance(ground: Ground, tmp_path: Path) -> None:
    for name, seed in (("start", 0), ("teacher", 1)):
        ground.training(export_dtype="float32", parallel_share=0.5, seed=seed).export(tmp_path / name)
    recipe = {"start_from": tmp_path / "start", "parallel_share": 1.0, "text_dropout": 0.0, "precision": "fp32"}
    recipe |= {"tasks": {"text_to_video": 1.0}}
    training = ground.training(**recipe, distilled_from=tmp_path / "teacher")
    assert training.teacher is not None
    batch = training.loader.batch(0)
    layout, _ = layout_of(batch)
    targets = training.teacher.targets(batch["inputs"], layout)
    row, column = (batch["loss_mask"] & targets.taught).nonzero(as_tuple=True)
    assert len(row) > 0
    model = load_transformer(tmp_path / "teacher")
    with torch.no_grad():
        expected = model.logits(model(batch["inputs"], layout)[row, column - 1]).softmax(-1)
    torch.testing.assert_close(targets.probabilities(row, column), expected, rtol=1e-4, atol=1e-6)
    # From the weights that one begins with there is nothing to learn.
    own = ground.training(**recipe, distilled_from=tmp_path / "start").train_step(0)["gradient_norm"]
    assert own < 1e-3 * training.train_step(0)["gradient_norm"]
    with pytest.raises(ConfigError, match=r"distilled_from .* has the sizes"):
        other = dataclasses.replace(ground.recipe().model, num_layers=1)
        ground.training(**recipe | {"start_from": None, "model": other}, distilled_from=tmp_path / "teacher")


def test_a_taught_run_goes_on_with_its_teacher_alone(ground: Ground, tmp_path: Path) -> None:
    for name, seed in (("one", 0), ("other", 1)):
        ground.training(parallel_share=0.5, seed=seed).export(tmp_path / name)
    recipe = {"parallel_share": 0.5, "distilled_guidance": 2.0, "start_from": tmp_path / "one"}
    whole = ground.training(**recipe)
    fit(whole, LOOP, tmp_path / "whole")
    for steps in (4, 8):
        part = ground.training(**recipe)
        fit(part, dataclasses.replace(LOOP, num_steps=steps), tmp_path / "part")
    assert _same(_weights(whole), _weights(part))
    with pytest.raises(ConfigError, match="as they teach it"):
        fit(ground.training(**recipe | {"start_from": tmp_path / "other"}), LOOP, tmp_path / "part")
    for change in ({"start_from": None}, {"parallel_share": 0.0}):
        with pytest.raises(ConfigError, match="set parallel_share and one of these"):
            ground.recipe(**recipe | change)
    with pytest.raises(ConfigError, match="film_noise is of films"):
        ground.recipe(film_noise=0.1)
    with pytest.raises(ConfigError, match="at least 1, which is off"):
        ground.recipe(distilled_guidance=0.5)


def test_a_run_with_films_goes_on_to_the_last_digit(ground: Ground, tmp_path: Path) -> None:
    shards = tiny_shards(
        Bundle.open(ground.bundle, require_model=False),
        tmp_path / "shards",
        count=9,
        film_scenes=3,
        num_latent_frames=2,
    )
    recipe = {"films": shards, "film_share": 0.6, "film_scenes": (2, 3), "film_noise": 0.1, "parallel_share": 0.5}
    whole = ground.training(**recipe)
    fit(whole, LOOP, tmp_path / "whole")
    for steps in (3, 8):
        part = ground.training(**recipe)
        fit(part, dataclasses.replace(LOOP, num_steps=steps), tmp_path / "part")
    assert _same(_weights(whole), _weights(part))
    kinds = ["offset" in whole.batch(step) for step in range(200)]
    assert 90 < sum(kinds) < 150
    metrics = [whole.train_step(step) for step in range(8)]
    assert [("film_loss" in one, "loss" in one) for one in metrics] == [(film, not film) for film in kinds[:8]]
    with pytest.raises(ConfigError, match=r"films were .*, are None"):
        fit(ground.training(parallel_share=0.5), LOOP, tmp_path / "part")
    for change in ({"film_share": 0.5}, {"films": shards}, {"films": shards, "film_share": 1.5}):
        with pytest.raises(ConfigError, match="films and film_share go together"):
            ground.recipe(**change)
    with pytest.raises(ConfigError, match="no film of the shards has 5 scenes"):
        ground.training(**recipe | {"film_scenes": (2, 5), "model": dataclasses.replace(SIZES, scene_length=128)})
    with pytest.raises(ConfigError, match="5 scenes of 256 ids need 1280 positions, the model has 1024"):
        ground.training(**recipe | {"film_scenes": (2, 5)})


def test_shards_of_another_vocabulary_are_refused(ground: Ground) -> None:
    for name in ("shards", "validation_shards"):
        with pytest.raises(CheckpointError, match="must hold codes of the vocabulary"):
            ground.training(**{name: ground.foreign_shards})


def test_a_checkpoint_of_another_vocabulary_or_order_is_refused(ground: Ground, tmp_path: Path) -> None:
    fit(ground.training(num_steps=1), LoopConfig(num_steps=1), tmp_path)
    foreign = dataclasses.replace(ground, bundle=ground.foreign_bundle, shards=ground.foreign_shards)
    with pytest.raises(CheckpointError, match="Name the bundle it was begun with"):
        fit(foreign.training(), LOOP, tmp_path)
    with pytest.raises(ConfigError, match="micro_batch_size was 3, is 2"):
        fit(ground.training(batch_size=2), LOOP, tmp_path)
    with pytest.raises(CheckpointError, match="does not fit what is being trained"):
        fit(ground.training(model=dataclasses.replace(SIZES, hidden_size=64)), LOOP, tmp_path)


def test_a_scene_longer_than_the_model_is_refused(ground: Ground) -> None:
    training = ground.training(model=dataclasses.replace(SIZES, scene_length=50))
    with pytest.raises(ShapeError, match="at most 50 ids"):
        training.train_step(0)


@pytest.mark.parametrize(
    "change", [{"num_steps": 0}, {"batch_size": 0}, {"validation_batches": 0}, {"learning_rate": -1.0}]
)
def test_a_recipe_that_cannot_be_trained_is_refused(change: dict[str, Any], ground: Ground) -> None:
    with pytest.raises(ConfigError, match="must be positive"):
        ground.recipe(**change)


def test_a_run_that_was_begun_before_a_key_was_there_goes_on_with_its_default(ground: Ground, tmp_path: Path) -> None:
    values = to_plain(ground.recipe())
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({"train": "language", **values, "num_steps": 4}))
    train(tmp_path / "recipe.yaml", [], tmp_path / "run")
    kept, state = tmp_path / "run" / "recipe.yaml", torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    older = {name: value for name, value in yaml.safe_load(kept.read_text()).items() if name != "spike_ratio"}
    kept.write_text(yaml.safe_dump(older))
    del state["trainable"]["guard"]
    torch.save(state, tmp_path / "run" / "checkpoint.pt")
    assert train(tmp_path / "recipe.yaml", [], tmp_path / "run").finished
    with pytest.raises(ConfigError, match=r"spike_ratio was 4\.0, is 9\.0"):
        train(tmp_path / "recipe.yaml", ["spike_ratio=9.0"], tmp_path / "run")


def test_a_recipe_file_trains_and_a_run_keeps_its_recipe(ground: Ground, tmp_path: Path) -> None:
    sizes = ", ".join(f"{name}: {str(value).lower()}" for name, value in dataclasses.asdict(SIZES).items())
    file, run = tmp_path / "recipe.yaml", tmp_path / "run"
    file.write_text(
        f"train: language\nbundle: {ground.bundle}\nshards: {ground.shards}\nvalidation_shards: {ground.shards}\n"
        f"model: {{{sizes}}}\ntasks: {{text_to_audio: 1}}\nnum_steps: 2\nbatch_size: {BATCH}\nlearning_rate: 1e-3\n"
    )
    result = train(file, ["validation_batches=1"], run)
    assert (result.step, result.finished) == (2, True)
    assert {"loss", "audio_loss", "validation_loss"} <= result.metrics.keys()
    assert "video_loss" not in result.metrics
    assert Bundle.open(run / "export").model_config.hidden_size == 48
    with pytest.raises(ConfigError, match="another recipe: num_steps was 2, is 3; validation_batches was 1, is 8"):
        train(file, ["num_steps=3"], run)


def test_a_run_sees_the_tasks_of_its_phase(ground: Ground) -> None:
    images = TaskPhase(until=0.25, tasks={"text_to_image": 9.0, "text_to_audio": 1.0})
    training = ground.training(num_steps=256, phases=(images,), tasks={"captioning": 1.0}, text_dropout=0.0)
    special = training.bundle.vocabulary.special

    def kinds(batches: range) -> set[int]:
        return {int(id) for number in batches for id in training.loader.batch(number)["ids"][:, 1]}

    assert kinds(range(64)) == {special("<to_image>"), special("<to_audio>")}
    assert kinds(range(64, 128)) == {special("<to_text>")}
    validated = training.validation.batch(0)["ids"][:, 1]
    assert set(validated.tolist()) == {special("<to_text>")}
    assert training.trained_tasks == {"text_to_image", "text_to_audio", "captioning"}


@pytest.mark.parametrize("ends", [(0.0,), (1.0,), (0.5, 0.2), (0.5, 0.5)])
def test_phases_that_do_not_follow_each_other_are_refused(ground: Ground, ends: tuple[float, ...]) -> None:
    with pytest.raises(ConfigError, match="phases must end at ascending shares"):
        ground.recipe(phases=tuple(TaskPhase(until=end, tasks={"captioning": 1.0}) for end in ends))
