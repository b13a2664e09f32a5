"""Training LoRA adapters with PEFT: a bundle learns something new from a folder of clips, its own weights untouched.

What is learnt is a pair of thin matrices beside each matrix of attention and MLP, and on request the embedding's rows
of all that is not text, written in PEFT's own files. Some steps look at clips that the bundle knows already (the
*prior*), so that it forgets nothing meanwhile.

This file knows clips and steps; recipes are `poet.training.lora_recipe`'s business, what adapters look like in files is
`poet.model.lora`'s.

Legend: B scenes of a step, P places that are targets.

Source: Hu et al., arXiv:2106.09685; the prior after DreamBooth's prior preservation, arXiv:2208.12242, section 4.2.
"""

from __future__ import annotations

import copy
import functools
import resource
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from peft import (
    LoraConfig,
    PeftConfig,
    TrainableTokensConfig,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from peft.tuners.lora import LoraLayer
from peft.tuners.trainable_tokens import TrainableTokensLayer
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from poet.bundle import Bundle, default_bundle
from poet.bundle_writing import export_bundle
from poet.data.clips import open_source
from poet.data.encode import encode_source
from poet.data.loader import Batch, ClipRows, SceneLoader
from poet.data.manifest import MANIFEST_NAME
from poet.data.packing import MODALITIES, SceneSampler
from poet.data.shards import EncodedClip, open_shards
from poet.errors import CheckpointError, ConfigError
from poet.model.config import PoetConfig
from poet.model.lora import FINGERPRINT_KEY, adapter_metadata, write_adapter
from poet.model.tensor_files import TensorFiles, write_tensors
from poet.model.transformer import PoetTransformer
from poet.model.weights import load_transformer
from poet.training.language import rows_of, scene_losses
from poet.training.loop import cosine_schedule, writing
from poet.training.lora_recipe import LoraData, LoraRecipe, LoraShape
from poet.training.losses import backward_from_targets, modality_means, target_losses
from poet.training.replicas import Replicas

__all__ = ["LoraData", "LoraRecipe", "LoraShape", "LoraTraining", "load_adapted", "merged_weights", "write_merged"]

PREFIX: Final = "base_model.model."
"""Before the names of matrices in PEFT's files."""


class LoraTraining:
    """A `Trainable` for `poet.training.loop.fit`, whose export is an adapter in PEFT's files.

    Args:
        recipe: how to train.
        directory: of the run; clips are encoded into `shards/` there, once.
        device: where to train.
        say: told what is being done before the first step.

    Attributes:
        is_done: whether nothing has become better for as many validations as the recipe's patience.

    Raises:
        CheckpointError: the bundle is damaged.
        MediaError: no clip can be read.
        ConfigError: data or sizes that cannot be used.
    """

    def __init__(
        self,
        recipe: LoraRecipe,
        directory: Path,
        *,
        device: str | torch.device = "cpu",
        say: Callable[[str], None] | None = None,
    ) -> None:
        self.recipe, self.device = recipe, torch.device(device)
        self.bundle = Bundle.open(default_bundle() if recipe.bundle is None else recipe.bundle)
        self.config = self.bundle.model_config
        self.weights_sha256 = self.bundle.weights_sha256
        say = say or (lambda _: None)
        data, shards = recipe.data, directory / "shards"
        clips = self._encode(data.clips, data.start, data.count, shards / "clips", say)
        if data.validation is not None:
            measured = self._encode(data.validation, 0, None, shards / "validation", say)
            self.loader = self._loader(clips, recipe.text_dropout)
            self.validation = self._loader(measured, 0.0)
        elif len(clips) < 2:
            raise ConfigError(f"{data.clips} must have two clips or more, one of them to measure on, it has one.")
        else:
            every = max(2, round(1 / data.held_out))
            learnt = [row for row in range(len(clips)) if row % every]
            self.loader = self._loader(_Rows(clips, learnt), recipe.text_dropout)
            self.validation = self._loader(_Rows(clips, list(range(0, len(clips), every))), 0.0)
        self.prior = self.prior_validation = None
        if data.prior is not None:
            known = self._encode(data.prior, data.prior_start, data.prior_count, shards / "prior", say)
            self.prior = self._loader(_Rows(known, [row for row in range(len(known)) if row % 10]), recipe.text_dropout)
            self.prior_validation = self._loader(_Rows(known, list(range(0, len(known), 10))), 0.0)
        torch.manual_seed(recipe.seed)
        self.model = load_adapted(self.bundle, recipe.lora).to(self.device)
        self.weights = [weight for weight in self.model.parameters() if weight.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.weights, lr=recipe.learning_rate, betas=(0.9, 0.98), weight_decay=recipe.weight_decay
        )
        # Threads draw what is dropped from one generator, in an order that nobody knows.
        alone = self.device.type != "cpu" or recipe.lora.dropout > 0
        self.replicas = Replicas(self.model, 1 if alone else min(torch.get_num_threads(), recipe.batch_size))
        self._best: dict[str, Tensor] = {}
        self._best_loss, self._waited = float("inf"), 0
        say(self._describe())

    @property
    def is_done(self) -> bool:
        """Whether the run should end although there are steps left."""
        return 0 < self.recipe.patience <= self._waited

    def train_step(self, step: int) -> dict[str, float]:
        """One optimiser step; returns losses by modality and the gradient's norm."""
        recipe = self.recipe
        share = cosine_schedule(step, recipe.warmup_steps, recipe.num_steps, recipe.learning_rate_floor)
        for group in self.optimizer.param_groups:
            group["lr"] = recipe.learning_rate * share
        batch, kind = self._batch(step)
        self.model.train()
        self.optimizer.zero_grad(set_to_none=True)
        losses = self._backward(batch)
        norm = nn.utils.clip_grad_norm_(self.weights, recipe.gradient_clip)
        self.optimizer.step()
        loss_mask = batch["loss_mask"].to(self.device)
        means = modality_means(losses, batch["modality"].to(self.device), loss_mask, MODALITIES)
        measured = {f"{kind}{name}": value for name, value in {"loss": float(losses.mean()), **means}.items()}
        return {**measured, "gradient_norm": float(norm), "learning_rate": recipe.learning_rate * share}

    @torch.no_grad()
    def validate(self, step: int) -> dict[str, float]:
        """Losses of held-out clips, and of held-out clips of the prior; the best adapter so far is kept."""
        del step
        self.model.eval()
        measured = {"loss": self._mean_loss(self.validation)}
        if self.prior_validation is not None:
            measured["prior_loss"] = self._mean_loss(self.prior_validation)
        if measured["loss"] < self._best_loss:
            self._best_loss, self._waited = measured["loss"], 0
            self._best = {name: tensor.detach().clone() for name, tensor in self._adapter().items()}
        else:
            self._waited += 1
        return measured

    def state_dict(self) -> dict[str, Any]:
        """The adapter, the best one so far, the optimiser, and what decides the order of the data."""
        return {
            "adapter": self._adapter(),
            "best": self._best,
            "best_loss": self._best_loss,
            "waited": self._waited,
            "optimizer": self.optimizer.state_dict(),
            "weights_sha256": self.weights_sha256,
            "loaders": [loader.state_dict() for loader in (self.loader, self.prior) if loader is not None],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Inverse of `state_dict`.

        Raises:
            CheckpointError: the adapter was begun on other weights.
            ConfigError: the data or their order differ.
        """
        if state["weights_sha256"] != self.weights_sha256:
            raise CheckpointError(
                f"the adapter was begun on the weights {state['weights_sha256'][:12]}, {self.bundle.path} has "
                f"{self.weights_sha256[:12]}. Name the bundle it was begun on, or another directory."
            )
        for loader, before in zip([one for one in (self.loader, self.prior) if one], state["loaders"], strict=True):
            loader.load_state_dict(before)
        _load(self.model, state["adapter"])
        self._best, self._best_loss = dict(state["best"]), float(state["best_loss"])
        self._waited = int(state["waited"])
        self.optimizer.load_state_dict(state["optimizer"])

    def export(self, directory: Path) -> None:
        """Write the adapter with the lowest loss on held-out clips in PEFT's files."""
        config = peft_config(self.recipe.lora, self.bundle).to_dict()
        best = self._best or self._adapter()
        tensors = {PREFIX + name: tensor for name, tensor in best.items()}
        write_adapter(directory, config, tensors, self.bundle.fingerprint)

    def _adapter(self) -> dict[str, Tensor]:
        found: dict[str, Tensor] = get_peft_model_state_dict(self.model)
        return found

    def _batch(self, step: int) -> tuple[Batch, str]:
        if self.prior is not None:
            rng = np.random.default_rng([self.recipe.seed, 7, step])
            if rng.random() < self.recipe.prior_share:
                return self.prior.batch(step), "prior_"
        return self.loader.batch(step), ""

    def _backward(self, batch: Batch) -> Tensor:
        """(P,) losses of a batch's targets; the gradient of their mean has been added to the adapter's."""
        loss_mask = batch["loss_mask"]
        rows, count = len(loss_mask), min(len(loss_mask), len(self.replicas.models))
        borders = [rows * number // count for number in range(count + 1)]
        measure = functools.partial(backward_from_targets, total=int(loss_mask.sum()))

        def work(model: nn.Module, number: int) -> Tensor:
            if number >= count:
                return torch.zeros(0)
            assert isinstance(model, PoetTransformer)
            return self._losses(model, rows_of(batch, slice(borders[number], borders[number + 1])), measure)

        return torch.cat(self.replicas.backward(work))

    def _losses(self, model: PoetTransformer, batch: Batch, measure: Callable[..., Tensor]) -> Tensor:
        return scene_losses(model, batch, measure, device=self.device, bf16=self.recipe.precision == "bf16")

    def _mean_loss(self, loader: SceneLoader) -> float:
        """Of the first batches, at most eight, always the same ones."""
        total = count = 0.0
        for number in range(min(8, max(1, round(1 / max(loader.epoch_of(1), 1e-9))))):
            losses = self._losses(self.model, loader.batch(number), target_losses)
            total, count = total + float(losses.sum()), count + len(losses)
        return total / count

    def _encode(
        self, name: str, start: int, count: int | None, directory: Path, say: Callable[[str], None]
    ) -> ClipRows:
        if (Path(name) / MANIFEST_NAME).is_file():
            rows = open_shards(Path(name), self.bundle.fingerprint)
            found = range(len(rows))[start:][:count]
            say(f"{name}: {len(found)} clips, encoded already")
            return _Rows(rows, found)
        size = self.bundle.generation_config
        opened = functools.partial(
            open_source,
            name,
            start=start,
            fps=size.fps,
            height=size.height,
            width=size.width,
            num_frames=size.num_frames,
            sample_rate=self.bundle.vocabulary.sample_rate,
        )
        if count is not None and Path(name).exists():  # drawn clips never end, files do
            count = min(count, len(opened(count=None)))
        source = opened(count=count)
        report = encode_source(source, self.bundle, directory, device=str(self.device))
        say(f"{name}: {report.num_clips} clips, {len(report.skipped)} that cannot be read")
        if report.num_uncaptioned:
            say(f"{name}: {report.num_uncaptioned} clips have no caption and teach no text")
        return open_shards(directory, self.bundle.fingerprint)

    def _loader(self, clips: ClipRows, text_dropout: float) -> SceneLoader:
        recipe = self.recipe
        sampler = SceneSampler(
            self.bundle.vocabulary,
            self.bundle.text_tokenizer,
            recipe.tasks,
            text_dropout=text_dropout,
            optional_share=recipe.optional_share,
            parallel_share=recipe.parallel_share,
            masks=recipe.masks,
            seed=recipe.seed,
        )
        return SceneLoader(
            clips,
            sampler,
            micro_batch_size=min(recipe.batch_size, len(clips)),
            seed=recipe.seed,
            max_length=self.config.scene_length,
        )

    def _describe(self) -> str:
        """What the run needs, from one step's gradient that is thrown away."""
        batch = self.loader.batch(0)
        seconds = []
        for _ in range(2):
            begun = time.perf_counter()
            self._backward(batch)
            seconds.append(time.perf_counter() - begun)
        self.optimizer.zero_grad(set_to_none=True)
        count = sum(weight.numel() for weight in self.weights)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        minutes = min(seconds) * self.recipe.num_steps / 60
        return (
            f"{count:,} numbers to learn ({count * 4 / 2**20:.1f} MiB) beside {self.config.num_parameters:,}; "
            f"{peak:.1f} GiB of memory; {self.recipe.num_steps} steps take about {minutes:.0f} min"
        )


class _Rows:
    """Some rows of shards."""

    def __init__(self, clips: ClipRows, rows: Sequence[int]) -> None:
        self._clips, self._rows = clips, list(rows)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, row: int, /) -> EncodedClip:
        return self._clips[self._rows[row]]


def peft_config(shape: LoraShape, bundle: Bundle) -> PeftConfig:
    """PEFT's configuration of an adapter of a bundle's model."""
    rows = list(range(bundle.vocabulary.text_range[0])) if shape.new_rows else []
    matrices = ["embed_tokens"] if bundle.model_config.tie_embeddings else ["embed_tokens", "lm_head"]
    if not shape.target_modules:
        return TrainableTokensConfig(token_indices=rows, target_modules=matrices, task_type="CAUSAL_LM")
    return LoraConfig(
        r=shape.rank,
        lora_alpha=shape.alpha,
        lora_dropout=shape.dropout,
        target_modules=list(shape.target_modules),
        use_rslora=shape.use_rslora,
        use_dora=shape.use_dora,
        trainable_token_indices=dict.fromkeys(matrices, rows) if shape.new_rows else None,
        task_type="CAUSAL_LM",
    )


class _TrainedRows(TrainableTokensLayer):  # type: ignore[misc]
    """PEFT's layer of trained rows, whose `weight` holds them: the head is read as a matrix, not called."""

    @property
    def weight(self) -> Tensor:
        """(V, C): the frozen rows and the trained ones."""
        return self.get_merged_weights(self.active_adapters)


def load_adapted(bundle: Bundle, shape: LoraShape) -> PoetTransformer:
    """A bundle's model with a new adapter beside its weights, which are frozen; in float32."""
    model = load_transformer(bundle.path)
    inject_adapter_in_model(peft_config(shape, bundle), model)
    for module in model.modules():
        if type(module) is TrainableTokensLayer:
            module.__class__ = _TrainedRows
    return model


def merged_weights(bundle_dir: Path, config: PoetConfig, adapter_dir: Path) -> dict[str, Tensor]:
    """The weights of a bundle's model with an adapter of any kind that PEFT has merged into them, in float32.

    Args:
        bundle_dir: of the bundle.
        config: the model's.
        adapter_dir: of PEFT's files.

    Raises:
        CheckpointError: the adapter cannot be read, or belongs to another model.
    """
    model = load_transformer(bundle_dir)
    try:
        inject_adapter_in_model(PeftConfig.from_pretrained(str(adapter_dir)), model)
        tensors = load_file(adapter_dir / "adapter_model.safetensors")
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"{adapter_dir} cannot be read as an adapter: {error}. Copy it whole.") from error
    _load(model, {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items()})
    for module in model.modules():
        if isinstance(module, (LoraLayer, TrainableTokensLayer)):
            module.merge()
    with torch.device("meta"):
        names = list(PoetTransformer(config).state_dict())
    merged = {
        name.replace(".token_adapter.", ".").replace(".base_layer.", "."): tensor
        for name, tensor in model.state_dict().items()
    }
    return {name: merged[name].detach() for name in names}


def write_merged(
    bundle: Bundle, adapter_dir: Path | None, directory: Path, tokenizers: Mapping[str, Path] | None = None
) -> Bundle:
    """Write a bundle with what was trained on it: an adapter's change in its weights, tuned tokenizers, or both.

    Args:
        bundle: that they were trained on; everything else is taken from it, and weights are stored as they were.
        adapter_dir: of PEFT's files; None leaves the weights.
        directory: of the new bundle; must not exist.
        tokenizers: "video" or "audio" -> directory of a tokenizer whose decoder was tuned.

    Raises:
        CheckpointError: the adapter cannot be read or belongs to another model, a tokenizer's codes do not mean what
            the bundle's do, or the directory exists.
    """
    assert bundle.config is not None
    parts = [path.resolve() for path in (tokenizers or {}).values()]
    weights: dict[str, Tensor] | None = None
    if adapter_dir is not None:
        parts.append(adapter_dir.resolve())
        found = adapter_metadata(adapter_dir).get(FINGERPRINT_KEY, bundle.fingerprint)
        if found != bundle.fingerprint:
            raise CheckpointError(
                f"{adapter_dir} belongs to the vocabulary with the fingerprint {found[:12]}, {bundle.path} has "
                f"{bundle.fingerprint[:12]}. Take the bundle that the adapter was trained on."
            )
        weights = merged_weights(bundle.path, bundle.model_config, adapter_dir)
    stored = TensorFiles(bundle.path).facts

    def write(path: Path) -> None:
        if weights is None:
            for file in {bundle.weights, *(facts.file for facts in stored.values())}:
                shutil.copyfile(file, path.with_name(file.name))
        else:
            sizes = {name: facts.num_bytes for name, facts in stored.items()}
            write_tensors(path, sizes, lambda name: weights[name].to(stored[name].dtype))

    names = " and ".join(f"{path.parent.name}/{path.name}" for path in parts)
    card = f"The bundle {bundle.name} with {names} merged into it.\n"
    with writing(directory):
        return export_bundle(
            directory,
            bundle,
            bundle.config,
            write,
            card,
            tokenizers=tokenizers,
        )


def _load(model: nn.Module, adapter: Mapping[str, Tensor]) -> None:
    found = set_peft_model_state_dict(model, copy.copy(dict(adapter)))
    unknown = list(getattr(found, "unexpected_keys", []))
    if unknown:
        raise CheckpointError(f"an adapter must fit the model, these do not: {', '.join(sorted(unknown)[:3])}.")
