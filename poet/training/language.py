"""Trains the language model in one process: the reference that the parallel trainer is held against.

Knows batches of scenes and the transformer; what an id means is the vocabulary's business, where scenes come from the
loader's. Batch `s` of the loader belongs to step `s`, so a resumed run repeats and skips nothing. `LanguageRun` is what
both trainers share: everything but the model and the step.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from poet.bundle import TRAINED_FILMS_KEY, TRAINED_PARALLEL_KEY, TRAINED_TASKS_KEY, Bundle
from poet.bundle_writing import export_bundle
from poet.data.films import FilmLoader, layout_of
from poet.data.loader import Batch, SceneLoader
from poet.data.packing import DEFAULT_MASKS, MODALITIES, SceneSampler
from poet.data.shards import open_shards
from poet.errors import CheckpointError, ConfigError
from poet.model.config import PoetConfig
from poet.model.transformer import PoetTransformer
from poet.model.weights import load_transformer
from poet.training.ahead import DrawnAhead
from poet.training.distillation import GuidedTeacher
from poet.training.guard import StepGuard
from poet.training.loop import ExponentialMovingAverage, cosine_schedule
from poet.training.losses import backward_from_targets, modality_means, target_losses
from poet.training.optimizers import Optimizers
from poet.training.parallelism import Parallelism
from poet.training.replicas import Replicas
from poet.training.speed import SpeedLog

__all__ = [
    "LanguageRecipe",
    "LanguageRun",
    "LanguageTraining",
    "ModelSize",
    "TaskPhase",
    "check_trainable",
    "rows_of",
    "scene_losses",
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelSize:
    """The sizes that a recipe decides; the vocabulary decides the rest of `PoetConfig`."""

    hidden_size: int = 256
    ffn_hidden_size: int = 768
    num_layers: int = 10
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 64
    scene_length: int = 768
    max_position_embeddings: int = 24_576
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-6
    tie_embeddings: bool = True

    @classmethod
    def of(cls, config: PoetConfig) -> ModelSize:
        """The sizes of a model."""
        return cls(**{field.name: getattr(config, field.name) for field in dataclasses.fields(cls)})

    def to_config(self, vocab_size: int) -> PoetConfig:
        """The transformer's config for a vocabulary of `vocab_size` ids (padded)."""
        return PoetConfig(vocab_size=vocab_size, **dataclasses.asdict(self))


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskPhase:
    """Tasks of the beginning of a run.

    Attributes:
        until: share of the steps at whose end, or at the next 32nd step, the next phase begins.
        tasks: task name to weight.
    """

    until: float
    tasks: dict[str, float]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LanguageRecipe:
    """How to train the language model. The YAML recipe has the same keys.

    Attributes:
        bundle: the tokenizer bundle: vocabulary and tokenizers.
        shards: token shards to learn from.
        validation_shards: token shards to measure on.
        start_from: a bundle whose weights to begin with; null starts from random weights.
        model: sizes; those that a recipe file does not name are those of `start_from`, if there is one.
        tasks: task name to weight.
        phases: other tasks for the beginning, such as mostly images for the first quarter (VideoPoet, section 4); after
            the last of them come `tasks`.
        text_dropout: share of scenes whose text is replaced by <null>.
        optional_share: share of scenes in which an input that the task may do without is given.
        parallel_share: share of scenes learnt as ones that are written many ids at once, from what is not hidden.
        masks: weights of the ways to hide, kinds of `poet.data.masking.MASK_KINDS`.
        films: token shards of films (`poet.data.films`), or none.
        film_share: share of the steps that learn from films.
        films_per_batch: of such a step.
        film_scenes: fewest and most scenes of a film; each step draws a number.
        film_tasks: task name to weight, of the scenes of films.
        film_noise: share of the bits of video codes that are flipped in what the model is shown of films, at most, so
            that it learns to put right what it wrote wrong (`poet.data.noise`).
        distilled_from: a bundle from which masked scenes with a text learn what they hold, in place of their ids; of
            films only where it has learnt films. Null is `start_from` where there is guidance to learn, else none.
        distilled_guidance: the scale of the guidance under which that bundle is asked; above 1, writing many ids at
            once needs none.
        num_steps: optimiser steps in all.
        batch_size: scenes a step.
        optimizer: "adamw", or "muon" for the layers' matrices with AdamW for the embedding, head and gains.
        learning_rate: highest, of AdamW; a linear warm-up, then a cosine down to `learning_rate_floor` of it.
        muon_learning_rate: highest, of Muon, in the scale in which an update has AdamW's usual size.
        warmup_steps: steps of the linear rise.
        learning_rate_floor: share of both rates that is left at the end.
        beta2: of AdamW.
        weight_decay: of matrices; gains are not decayed.
        ema_decay: of the averaged weights, which are what is measured and exported.
        gradient_clip: largest norm of the gradient.
        spike_ratio: a step whose loss is more than so many times the median of the last 64 is left out, like one whose
            loss or gradient is no number.
        max_skipped_steps: so many left out one after another end the run.
        validation_batches: batches to measure on.
        precision: "bf16" (autocast) or "fp32".
        export_dtype: of the exported weights.
        compile: whether to compile the transformer.
        seed: of weights, order and tasks.
        parallel: how Megatron's trainer cuts the model among processes; the reference does not read it.
    """

    bundle: Path
    shards: Path
    validation_shards: Path
    start_from: Path | None = None
    model: ModelSize = dataclasses.field(default_factory=ModelSize)
    tasks: dict[str, float] = dataclasses.field(default_factory=lambda: {"text_to_video_audio": 1.0})
    phases: tuple[TaskPhase, ...] = ()
    text_dropout: float = 0.1
    optional_share: float = 0.5
    parallel_share: float = 0.0
    masks: dict[str, float] = dataclasses.field(default_factory=lambda: dict(DEFAULT_MASKS))
    films: Path | None = None
    film_share: float = 0.0
    films_per_batch: int = 2
    film_scenes: tuple[int, int] = (2, 8)
    film_tasks: dict[str, float] = dataclasses.field(default_factory=lambda: {"text_to_video_audio": 1.0})
    film_noise: float = 0.0
    distilled_from: Path | None = None
    distilled_guidance: float = 1.0
    num_steps: int = 2_000
    batch_size: int = 24
    optimizer: Literal["adamw", "muon"] = "adamw"
    learning_rate: float = 1.5e-3
    muon_learning_rate: float = 4e-3
    warmup_steps: int = 100
    learning_rate_floor: float = 0.05
    beta2: float = 0.98
    weight_decay: float = 0.05
    ema_decay: float = 0.995
    gradient_clip: float = 1.0
    spike_ratio: float = 4.0
    max_skipped_steps: int = 20
    validation_batches: int = 8
    precision: Literal["bf16", "fp32"] = "bf16"
    export_dtype: Literal["float32", "bfloat16"] = "bfloat16"
    compile: bool = False
    seed: int = 0
    parallel: Parallelism = dataclasses.field(default_factory=Parallelism)

    def __post_init__(self) -> None:
        for name in ("num_steps", "batch_size", "validation_batches", "learning_rate", "muon_learning_rate"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} must be positive, got {getattr(self, name)!r}.")
        ends = [phase.until for phase in self.phases]
        if ends != sorted(set(ends)) or any(not 0 < end < 1 for end in ends):
            raise ConfigError(f"phases must end at ascending shares of the steps between 0 and 1, got {ends}.")
        if not 0 <= self.film_share <= 1 or (self.film_share > 0) != (self.films is not None):
            raise ConfigError(
                f"films and film_share go together: got {self.films} and {self.film_share!r}. Name shards of films and "
                "a share of the steps from 0 to 1, or leave out both."
            )
        if self.film_noise > 0 and self.films is None:
            raise ConfigError(f"film_noise is of films, got {self.film_noise!r} and none. Name shards of films.")
        if not 1 <= self.distilled_guidance < math.inf:
            raise ConfigError(f"distilled_guidance must be at least 1, which is off, got {self.distilled_guidance!r}.")
        asked = self.distilled_from is not None or self.distilled_guidance > 1
        if asked and (self.teacher is None or self.parallel_share == 0):
            raise ConfigError(
                "distilled_guidance is learnt by masked scenes from the weights of distilled_from or start_from: set "
                "parallel_share and one of these, or leave it at 1."
            )
        if self.spike_ratio <= 1 or self.max_skipped_steps < 0:
            raise ConfigError(
                "spike_ratio must be above 1 and max_skipped_steps not negative, got "
                f"{self.spike_ratio!r} and {self.max_skipped_steps!r}."
            )

    @property
    def teacher(self) -> Path | None:
        """The bundle that masked scenes learn from, or None."""
        return self.distilled_from or (self.start_from if self.distilled_guidance > 1 else None)


def check_trainable(recipe: LanguageRecipe) -> None:
    """Raise unless Megatron's trainer can train a recipe.

    Raises:
        ConfigError: it asks for what only the reference has.
    """
    if recipe.optimizer != "adamw":
        raise ConfigError(
            f"optimizer must be 'adamw' with Megatron, got {recipe.optimizer!r}: orthogonalising a matrix that is "
            "cut among processes is not here yet. Train with the reference, or set optimizer to adamw."
        )
    if recipe.teacher is not None:
        raise ConfigError(
            f"distilled_guidance must be 1 with Megatron, got {recipe.distilled_guidance!r}, and distilled_from null: "
            "a second model beside one that is cut among processes is not here yet. Train with the reference."
        )
    if recipe.compile:
        raise ConfigError("compile must be false with Megatron, got true. Leave it out.")


class LanguageRun:
    """Data, sizes and export of a run: what does not depend on how the model is computed.

    Args:
        recipe: how to train.
        device: where to train.

    Raises:
        CheckpointError: bundle or shards are missing, damaged or of another vocabulary.
        ConfigError: sizes or tasks that cannot be used.
    """

    def __init__(self, recipe: LanguageRecipe, device: str | torch.device) -> None:
        self.recipe, self.device = recipe, torch.device(device)
        self.bundle = Bundle.open(recipe.bundle, require_model=False)
        self.config = recipe.model.to_config(self.bundle.vocabulary.padded_vocab_size)
        self.guard = StepGuard(recipe.spike_ratio, recipe.max_skipped_steps)
        self.loader = self._open(recipe.shards, recipe.text_dropout, recipe.phases)
        self.validation = self._open(recipe.validation_shards, 0.0, ())
        self.films = None if recipe.films is None else self._open_films(recipe.films)

    def batch(self, step: int) -> Batch:
        """What a step learns from: single scenes or films, a pure function of the step."""
        if self.films is not None:
            rng = np.random.default_rng([self.recipe.seed, 6, step])
            if rng.random() < self.recipe.film_share:
                return self.films.batch(step)
        return self.loader.batch(step)

    def loader_state(self) -> dict[str, Any]:
        """What decides the order of the data."""
        films = {} if self.films is None else {"films": self.films.settings}
        return {**self.loader.state_dict(), **films}

    def load_loader_state(self, state: Mapping[str, Any]) -> None:
        """Raise unless the data are those of a checkpoint.

        Raises:
            ConfigError: they, or their order, differ.
        """
        self.loader.load_state_dict(state)
        ours = None if self.films is None else self.films.settings
        if state.get("films") != ours:
            raise ConfigError(
                f"data can only be resumed in the order it was begun in: films were {state.get('films')}, are {ours}. "
                "Restore these settings, or start a new run from the weights."
            )

    def step_metrics(
        self, step: int, batch: Batch, losses: Mapping[str, float], gradient_norm: float, *, admitted: bool
    ) -> dict[str, float]:
        """What a step reports. Losses and norm of a step that was left out are left out: they would spoil the means."""
        ids = float(batch["lengths"].sum())
        if "offset" in batch:
            losses = {f"film_{name}": value for name, value in losses.items()}
        measured = {**losses, "gradient_norm": gradient_norm} if admitted else {}
        return {
            **measured,
            "skipped": float(not admitted),
            "learning_rate": self.recipe.learning_rate * self.learning_rate_share(step),
            "ids": ids,
            "padding_share": 1 - ids / batch["ids"].numel(),
            "epoch": self.loader.epoch_of(step),
        }

    def speed(self, directory: Path, processes: int = 1) -> SpeedLog:
        """What measures how fast a run in `directory` is."""
        return SpeedLog(directory / "speed.jsonl", self.config, self.device, self.recipe.batch_size, processes)

    def learning_rate_share(self, step: int) -> float:
        """Share of the highest learning rate that a step has."""
        recipe = self.recipe
        return cosine_schedule(step, recipe.warmup_steps, recipe.num_steps, recipe.learning_rate_floor)

    def starting_weights(self) -> dict[str, Tensor] | None:
        """The weights of `start_from` under their canonical names, or None.

        Raises:
            CheckpointError: they are missing, damaged, or of another vocabulary.
            ConfigError: they are of other sizes.
        """
        path = self.recipe.start_from
        return None if path is None else self.weights_of(path, "start_from")

    def weights_of(self, path: Path, name: str) -> dict[str, Tensor]:
        """The weights of a bundle of the same vocabulary and sizes.

        Args:
            path: of the bundle.
            name: the recipe's word for it.

        Raises:
            CheckpointError, ConfigError: as `starting_weights`.
        """
        start = Bundle.open(path)
        if start.fingerprint != self.bundle.fingerprint:
            raise CheckpointError(
                f"{name} {path} has the vocabulary {start.fingerprint[:12]}, the bundle {self.bundle.path} has "
                f"{self.bundle.fingerprint[:12]}; their ids mean different things."
            )
        # Neither is a size of any weight.
        lengths = {name: getattr(self.config, name) for name in ("scene_length", "max_position_embeddings")}
        if dataclasses.replace(start.model_config, **lengths) != self.config:
            raise ConfigError(f"{name} {path} has the sizes {start.model_config}, the recipe asks for {self.config}.")
        return load_transformer(path).state_dict()

    def check_vocabulary(self, fingerprint: str) -> None:
        """Raise unless a checkpoint's vocabulary is the bundle's.

        Raises:
            CheckpointError: they differ.
        """
        if fingerprint != self.bundle.fingerprint:
            raise CheckpointError(
                f"the checkpoint was trained with the vocabulary {fingerprint[:12]}, the bundle "
                f"{self.bundle.path} has {self.bundle.fingerprint[:12]}. Name the bundle it was begun with."
            )

    @property
    def trained_tasks(self) -> set[str]:
        """Names of all tasks that the run shows."""
        films = {} if self.films is None else self.recipe.film_tasks
        shown = (self.recipe.tasks, films, *(phase.tasks for phase in self.recipe.phases))
        return {name for tasks in shown for name in tasks}

    def export_weights(self, directory: Path, state: Mapping[str, Tensor]) -> None:
        """Write the bundle with these weights, all of them under their canonical names."""
        dtype = getattr(torch, self.recipe.export_dtype)
        weights = {name: tensor.to("cpu", dtype).contiguous() for name, tensor in state.items()}
        config = self.config.to_huggingface_dict(fingerprint=self.bundle.fingerprint, dtype=self.recipe.export_dtype)
        export_bundle(
            directory,
            self.bundle,
            config
            | {TRAINED_TASKS_KEY: sorted(self.trained_tasks)}
            | ({TRAINED_PARALLEL_KEY: True} if self.recipe.parallel_share > 0 else {})
            | ({TRAINED_FILMS_KEY: self.recipe.film_scenes[1]} if self.films is not None else {}),
            lambda path: save_file(weights, path, metadata={"format": "pt"}),
            overwrite=True,
        )

    def _sampler(self, tasks: Mapping[str, float], text_dropout: float, parallel_share: float) -> SceneSampler:
        return SceneSampler(
            self.bundle.vocabulary,
            self.bundle.text_tokenizer,
            tasks,
            text_dropout=text_dropout,
            optional_share=self.recipe.optional_share,
            parallel_share=parallel_share,
            masks=self.recipe.masks,
            seed=self.recipe.seed,
        )

    def _open_films(self, shards: Path) -> FilmLoader:
        recipe = self.recipe
        return FilmLoader(
            open_shards(shards, self.bundle.fingerprint),
            self._sampler(recipe.film_tasks, recipe.text_dropout, 0.0),
            self._sampler(recipe.film_tasks, recipe.text_dropout, recipe.parallel_share),
            batch_size=recipe.films_per_batch,
            num_scenes=recipe.film_scenes,
            scene_length=self.config.scene_length,
            num_positions=self.config.max_position_embeddings,
            noise=recipe.film_noise,
            seed=recipe.seed,
        )

    def _open(self, shards: Path, text_dropout: float, phases: Sequence[TaskPhase]) -> SceneLoader:
        recipe = self.recipe
        first, *later = [
            self._sampler(tasks, text_dropout, recipe.parallel_share)
            for tasks in (*(phase.tasks for phase in phases), recipe.tasks)
        ]
        borders = [math.ceil(phase.until * recipe.num_steps) for phase in phases]
        return SceneLoader(
            open_shards(shards, self.bundle.fingerprint),
            first,
            phases=list(zip(borders, later, strict=True)),
            micro_batch_size=recipe.batch_size,
            seed=recipe.seed,
            max_length=self.config.scene_length,
        )


class LanguageTraining(LanguageRun):
    """A `Trainable` for `poet.training.loop.fit`.

    Args:
        recipe: how to train.
        device: where to train.

    Raises:
        CheckpointError: bundle, shards or `start_from` are missing, damaged or of another vocabulary.
        ConfigError: sizes or tasks that cannot be used, or other sizes than those of `start_from`.
    """

    def __init__(self, recipe: LanguageRecipe, *, device: str | torch.device = "cpu") -> None:
        super().__init__(recipe, device)
        torch.manual_seed(recipe.seed)
        self.model = PoetTransformer(self.config)
        weights = self.starting_weights()
        if weights is not None:
            self.model.load_state_dict(weights)
        self.model.to(self.device)
        self.teacher, self._taught_by, self._teaches_films = None, "", False
        if recipe.teacher is not None:
            teacher = Bundle.open(recipe.teacher)
            self._taught_by = f"{teacher.weights_sha256} at {recipe.distilled_guidance:g}"
            self._teaches_films = teacher.trained_films is not None
            frozen = copy.deepcopy(self.model).eval()
            frozen.load_state_dict(self.weights_of(recipe.teacher, "distilled_from"))
            self.teacher = GuidedTeacher(frozen, self.bundle.vocabulary, recipe.distilled_guidance)
        self.average = ExponentialMovingAverage(self.model, recipe.ema_decay)
        matrices = [weight for weight in self.model.model.layers.parameters() if weight.ndim > 1]
        self.optimizers = Optimizers(
            self.model,
            matrices if recipe.optimizer == "muon" else [],
            learning_rate=recipe.learning_rate,
            muon_learning_rate=recipe.muon_learning_rate,
            beta2=recipe.beta2,
            weight_decay=recipe.weight_decay,
        )
        alone = recipe.compile or self.device.type != "cpu"
        self.replicas = Replicas(self.model, 1 if alone else min(torch.get_num_threads(), recipe.batch_size))
        if recipe.compile:
            self.model.compile(dynamic=True)
        self.ahead = DrawnAhead(self.batch)

    def train_step(self, step: int) -> dict[str, float]:
        """One optimiser step; returns losses by modality, ids and the gradient's norm."""
        recipe = self.recipe
        batch = self.ahead.take(step)
        self.optimizers.set_learning_rate_share(self.learning_rate_share(step))
        loss_mask = batch["loss_mask"].to(self.device)
        self.model.zero_grad(set_to_none=True)
        losses = self._backward(batch, loss_mask)
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), recipe.gradient_clip)
        loss = float(losses.mean())
        admitted = self.guard.admits(step, loss, float(norm))
        if admitted:
            self.optimizers.step()
            self.average.update(self.model)
        means = modality_means(losses, batch["modality"].to(self.device), loss_mask, MODALITIES)
        return self.step_metrics(step, batch, {"loss": loss, **means}, float(norm), admitted=admitted)

    @torch.no_grad()
    def validate(self, step: int) -> dict[str, float]:
        """Losses of the averaged weights on the first validation batches, always the same ones."""
        sums: dict[str, list[float]] = {}
        for number in range(self.recipe.validation_batches):
            batch = self.validation.batch(number)
            loss_mask = batch["loss_mask"].to(self.device)
            losses = self._losses(self.average.module, batch, target_losses)
            means = modality_means(losses, batch["modality"].to(self.device), loss_mask, MODALITIES)
            for name, value in {"loss": float(losses.mean()), **means}.items():
                sums.setdefault(name, []).append(value)
        return {name: sum(values) / len(values) for name, values in sums.items()}

    def state_dict(self) -> dict[str, Any]:
        """Weights, average, optimiser, and what decides the order of the data."""
        return {
            "model": self.model.state_dict(),
            "average": self.average.state_dict(),
            "optimizers": self.optimizers.state_dict(),
            "fingerprint": self.bundle.fingerprint,
            "loader": self.loader_state(),
            "guard": self.guard.state_dict(),
            "taught_by": self._taught_by,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Inverse of `state_dict`.

        Raises:
            CheckpointError: the checkpoint belongs to another vocabulary.
            ConfigError: the data or its order differ, or the weights that teach.
        """
        if (before := state.get("taught_by", "")) != self._taught_by:
            raise ConfigError(
                "start_from, distilled_from and distilled_guidance must be those that the run was begun with, as they "
                f"teach it: {before or 'none'}; got {self._taught_by or 'none'}. Put them back, or begin another run."
            )
        self.check_vocabulary(state["fingerprint"])
        self.load_loader_state(state["loader"])
        if "guard" in state:  # not in checkpoints of before there was one
            self.guard.load_state_dict(state["guard"])
        self.model.load_state_dict(state["model"])
        self.average.load_state_dict(state["average"])
        self.optimizers.load_state_dict(state["optimizers"])

    def export(self, directory: Path) -> None:
        """Write the bundle with the averaged weights."""
        self.export_weights(directory, self.average.module.state_dict())

    def _backward(self, batch: Batch, loss_mask: Tensor) -> Tensor:
        """(P,) losses of a batch's targets; the gradient of their mean has been added to the weights'."""
        rows, count = len(loss_mask), len(self.replicas.models)
        borders = [rows * number // count for number in range(count + 1)]
        total = int(loss_mask.sum())
        teacher = self.teacher if self._teaches_films or "offset" not in batch else None

        def work(model: nn.Module, number: int) -> Tensor:
            measure = functools.partial(backward_from_targets, total=total)
            return self._losses(model, rows_of(batch, slice(borders[number], borders[number + 1])), measure, teacher)

        return torch.cat(self.replicas.backward(work))

    def _losses(
        self,
        model: nn.Module,
        batch: Batch,
        measure: Callable[..., Tensor],
        teacher: GuidedTeacher | None = None,
    ) -> Tensor:
        """(P,) losses of a batch's targets by `target_losses` or `backward_from_targets`."""
        assert isinstance(model, PoetTransformer)
        bf16 = self.recipe.precision == "bf16"
        return scene_losses(model, batch, measure, device=self.device, bf16=bf16, teacher=teacher)


def rows_of(batch: Batch, rows: slice) -> Batch:
    """Some rows of a batch."""
    return cast(Batch, {name: tensor[rows] for name, tensor in cast(dict[str, Tensor], batch).items()})


def scene_losses(
    model: PoetTransformer,
    batch: Batch,
    measure: Callable[..., Tensor],
    *,
    device: torch.device,
    bf16: bool,
    teacher: GuidedTeacher | None = None,
) -> Tensor:
    """The losses of a batch's targets.

    Args:
        model: on `device`.
        batch: of scenes or films.
        measure: `target_losses` or `backward_from_targets`.
        device: to compute on.
        bf16: whether under autocast.
        teacher: of what masked scenes learn in place of their ids.

    Returns:
        (P,) float32.
    """
    ids, inputs, loss_mask = (batch[name].to(device) for name in ("ids", "inputs", "loss_mask"))
    layout, positions = layout_of(batch)
    layout = layout.to(device)
    positions = None if positions is None else positions.to(device)
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=bf16):
        hidden = model(inputs, layout, positions)
        if teacher is not None:
            measure = functools.partial(measure, guided=teacher.targets(inputs, layout, positions))
        return measure(hidden, ids, loss_mask, model.logits)
