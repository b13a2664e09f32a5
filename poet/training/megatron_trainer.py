"""Trains the language model in many processes with Megatron-Core: the same recipes, batches, losses and metrics as the
reference (`poet.training.language`), with another model and another step.

Batch `s` of the loader belongs to step `s` whatever the cut: every data-parallel rank takes its rows of the same batch.
So a run can be resumed in another layout and repeats and skips nothing. Checkpoints are Megatron's distributed ones,
written behind the training and renamed when they are whole.

Legend: B rows of a step, L places, P targets, W processes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final, cast

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.module import Float16Module
from torch import Tensor, distributed

from poet.data.films import layout_of
from poet.data.loader import Batch
from poet.data.packing import MODALITIES
from poet.errors import ConfigError
from poet.model.transformer import PoetTransformer
from poet.training import megatron_keymap
from poet.training.ahead import DrawnAhead
from poet.training.heartbeats import Heartbeats
from poet.training.language import LanguageRecipe, LanguageRun, check_trainable
from poet.training.loop import FitResult, LoopConfig, Progress, fit, lerp_averages
from poet.training.megatron_checkpoints import DistributedCheckpoints, share_results_with_a_fork
from poet.training.megatron_cpu import cpu_for_cuda
from poet.training.megatron_model import FLEX_BLOCK, PoetGPTModel, load_weights, to_transformer_config
from poet.training.parallelism import Parallelism

__all__ = ["MegatronTraining", "process_groups", "train_with_megatron"]

_RESHARDABLE: Final = {"distrib_optim_sharding_type": "fully_reshardable"}


def train_with_megatron(
    recipe: LanguageRecipe, loop: LoopConfig, directory: Path, *, device: str, progress: Progress | None = None
) -> FitResult:
    """Train in this process as one of those that a launcher such as `torchrun` has started.

    Args:
        recipe: how to train; its `parallel` group says how the model is cut.
        loop: how often to log, validate and save.
        directory: of the run, on a file system that all processes see.
        device: "cpu" or "cuda".
        progress: called after every step, in the leading process.

    Raises:
        ConfigError: the recipe cannot be trained with so many processes.
        CheckpointError: as `poet.training.loop.fit`.
    """
    # First of all: a process that is forked while gloo's threads or the heartbeats run may inherit a lock that nobody
    # frees, and waits for ever.
    share_results_with_a_fork()
    with process_groups(recipe.parallel, device):
        rank, world_size = distributed.get_rank(), distributed.get_world_size()
        heartbeats = Heartbeats(
            directory / "heartbeats", rank, world_size, meet=lambda: distributed.all_reduce(torch.zeros(1))
        )
        with heartbeats.beating():
            return _fit(recipe, loop, directory, device=device, progress=progress)


def _fit(
    recipe: LanguageRecipe, loop: LoopConfig, directory: Path, *, device: str, progress: Progress | None
) -> FitResult:
    training = MegatronTraining(recipe, device=device)
    checkpoints = DistributedCheckpoints(directory)
    return fit(
        training,
        loop,
        directory,
        checkpoints=checkpoints,
        speed=training.speed(directory, distributed.get_world_size()),
        progress=progress if checkpoints.leads else None,
    )


@contextlib.contextmanager
def process_groups(parallelism: Parallelism, device: str) -> Iterator[None]:
    """Join the other processes, as a launcher's environment says, and divide them into groups.

    Args:
        parallelism: how the model is cut.
        device: "cpu", where Megatron's calls to a GPU are answered by the CPU as long as this lasts, or "cuda".

    Raises:
        ConfigError: the model cannot be cut among so many processes, or a process has no GPU of its own.
    """
    on_cpu = torch.device(device).type == "cpu"
    with warnings.catch_warnings(), cpu_for_cuda() if on_cpu else contextlib.nullcontext():
        # Nobody can act on these: Megatron looks at the gradients of slices of weights, and saves with ShardedTensor.
        warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf")
        warnings.filterwarnings("ignore", message="Please use DTensor instead")
        begun = not distributed.is_initialized()
        if begun:
            if not on_cpu:
                torch.cuda.set_device(_own_gpu(device))
            distributed.init_process_group("gloo" if on_cpu else "cpu:gloo,cuda:nccl")
        parallelism.rows_each(0, distributed.get_world_size())
        parallel_state.initialize_model_parallel(parallelism.tensor_parallel_size, parallelism.pipeline_parallel_size)
        try:
            yield
        finally:
            parallel_state.destroy_model_parallel()
            if begun:
                distributed.destroy_process_group()


def _own_gpu(device: str) -> torch.device:
    """The GPU of this process: the launcher's number of it on this machine."""
    number = int(os.environ["LOCAL_RANK"])
    if torch.device(device).index is not None or number >= torch.cuda.device_count():
        raise ConfigError(
            f"device must be cuda, and every process on a machine must have a GPU, got {device!r} and process {number} "
            f"of a machine with {torch.cuda.device_count()} GPUs. Start fewer processes."
        )
    return torch.device("cuda", number)


class MegatronTraining(LanguageRun):
    """A `Trainable` for `poet.training.loop.fit`, of which every process has one.

    Args:
        recipe: how to train.
        device: where to train.

    Raises:
        CheckpointError, ConfigError: as the reference's; also sizes that the processes do not divide, and muon.
    """

    def __init__(self, recipe: LanguageRecipe, *, device: str | torch.device = "cpu") -> None:
        super().__init__(recipe, device)
        check_trainable(recipe)
        cut = recipe.parallel
        self.dp_rank = parallel_state.get_data_parallel_rank()
        self.dp_size = parallel_state.get_data_parallel_world_size()
        self.rows = cut.rows_each(recipe.batch_size, distributed.get_world_size())
        self.copies = recipe.batch_size // self.rows
        if self.films is not None and recipe.films_per_batch % self.copies:
            raise ConfigError(
                f"films_per_batch must be a multiple of the {self.copies} data-parallel processes, got "
                f"{recipe.films_per_batch}."
            )
        self.micro_batch_size = cut.micro_batch_size or self.rows
        bf16 = recipe.precision == "bf16" and self.device.type == "cuda"
        self.transformer_config = to_transformer_config(self.config, cut, bf16=bf16)
        self.model = PoetGPTModel(self.config, self.transformer_config)
        weights = self.starting_weights()
        if (
            weights is None
        ):  # the reference's, drawn whole: the same for every cut, where stages would repeat each other
            torch.manual_seed(recipe.seed)
            weights = PoetTransformer(self.config).state_dict()
        load_weights(self.model, weights)
        self.model.to(self.device)
        self.parameters: list[Tensor] = list(self.model.parameters())
        self.averages = [weight.detach().float().clone() for weight in self.parameters]
        self.num_updates = 0
        self.parallel_model = DistributedDataParallel(
            self.transformer_config,
            DistributedDataParallelConfig(
                use_distributed_optimizer=cut.distributed_optimizer, grad_reduce_in_fp32=True
            ),
            Float16Module(self.transformer_config, self.model) if bf16 else self.model,
        )
        self.optimizer = get_megatron_optimizer(
            OptimizerConfig(
                optimizer="adam",
                lr=recipe.learning_rate,
                weight_decay=recipe.weight_decay,
                adam_beta1=0.9,
                adam_beta2=recipe.beta2,
                clip_grad=recipe.gradient_clip,
                bf16=bf16,
                params_dtype=self.transformer_config.params_dtype,
                use_distributed_optimizer=cut.distributed_optimizer,
            ),
            [self.parallel_model],
        )
        self.transformer_config.finalize_model_grads_func = finalize_model_grads
        self.transformer_config.grad_scale_func = self.optimizer.scale_loss
        self.schedule: Callable[..., list[dict[str, Tensor]]] = get_forward_backward_func()
        self.ahead = DrawnAhead(self.batch)

    # ------------------------------------------------------------------------------------------------------- steps

    def train_step(self, step: int) -> dict[str, float]:
        """One optimiser step; the metrics are the reference's, the same in every process."""
        batch = self.ahead.take(step)
        share = self.learning_rate_share(step)
        for group in self.optimizer.param_groups:
            group["lr"] = self.recipe.learning_rate * share
            group["weight_decay"] = self.recipe.weight_decay * group["wd_mult"]
        self.parallel_model.zero_grad_buffer()
        self.optimizer.zero_grad()
        losses = self._compute(batch, forward_only=False)
        self.optimizer.prepare_grads()
        norm = float(self.optimizer.get_grad_norm())
        admitted = self.guard.admits(step, losses["loss"], norm)
        if admitted:
            # Megatron's own step, which would not ask before it changes weights, prepares the gradients again.
            self.optimizer.step()
            weights = [weight.float() for weight in self.parameters]
            lerp_averages(self.averages, weights, self.recipe.ema_decay, self.num_updates)
            self.num_updates += 1
        return self.step_metrics(step, batch, losses, norm, admitted=admitted)

    @torch.no_grad()
    def validate(self, step: int) -> dict[str, float]:
        """Losses of the averaged weights on the first validation batches, always the same ones."""
        sums: dict[str, list[float]] = {}
        with self._averaged():
            for number in range(self.recipe.validation_batches):
                for name, value in self._compute(self.validation.batch(number), forward_only=True).items():
                    sums.setdefault(name, []).append(value)
        return {name: sum(values) / len(values) for name, values in sums.items()}

    def _compute(self, batch: Batch, *, forward_only: bool) -> dict[str, float]:
        """Losses by modality of a whole batch, and, unless `forward_only`, gradients of their mean over its targets."""
        tensors = cast(dict[str, Tensor], batch)
        multiple = self.recipe.parallel.tensor_parallel_size if self.recipe.parallel.sequence_parallel else 1
        if self.device.type == "cuda":
            multiple = math.lcm(multiple, FLEX_BLOCK)  # few widths, so that attention is compiled few times
        missing = -tensors["ids"].shape[1] % multiple
        width = tensors["ids"].shape[1] + missing
        # Films are fewer rows than single scenes, and longer ones.
        rows = len(tensors["ids"]) // self.copies
        size = math.gcd(rows, self.micro_batch_size)
        own = slice(self.dp_rank * rows, (self.dp_rank + 1) * rows)
        parts = [
            {name: tensor[own][start : start + size] for name, tensor in tensors.items()}
            for start in range(0, rows, size)
        ]
        results = self.schedule(
            forward_step_func=functools.partial(self._forward, width=width),
            data_iterator=iter(parts),
            model=[self.parallel_model],
            num_microbatches=len(parts),
            seq_length=width,
            micro_batch_size=size,
            forward_only=forward_only,
        )
        sums = torch.zeros(2, len(MODALITIES), dtype=torch.float64)
        speaks = parallel_state.get_tensor_model_parallel_rank() == 0 and parallel_state.is_pipeline_last_stage()
        if speaks:
            for result in results:
                sums += result["sums"].cpu()
        sums = sums.to(self.device)
        distributed.all_reduce(sums)
        totals, counts = sums.cpu()
        means = {
            f"{name}_loss": float(totals[place] / counts[place])
            for place, name in enumerate(MODALITIES)
            if counts[place] > 0
        }
        return {"loss": float(totals.sum() / counts.sum()), **means}

    def _forward(self, batches: Iterator[dict[str, Tensor]], model: torch.nn.Module, *, width: int) -> Any:
        batch = {name: tensor.to(self.device) for name, tensor in next(batches).items()}
        missing = width - batch["ids"].shape[1]
        ids, inputs, loss_mask, modality = (
            torch.nn.functional.pad(batch[name], (0, missing)) for name in ("ids", "inputs", "loss_mask", "modality")
        )
        layout, positions = layout_of(cast(Batch, batch), width)
        page = self.model.book.add(layout, self.transformer_config.params_dtype, positions)

        def reduce(losses: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
            kinds = modality[loss_mask].long()
            sums = torch.zeros(2, len(MODALITIES), dtype=torch.float64, device=losses.device)
            sums[0].index_add_(0, kinds, losses.detach().double())
            sums[1] = torch.bincount(kinds, minlength=len(MODALITIES))
            return losses.sum(), torch.tensor(len(losses), dtype=torch.int, device=losses.device), {"sums": sums}

        return model(inputs, page, loss_mask, ids), reduce

    @contextlib.contextmanager
    def _averaged(self) -> Iterator[None]:
        """Let the model have its averaged weights."""
        kept = [weight.data for weight in self.parameters]
        for weight, average in zip(self.parameters, self.averages, strict=True):
            weight.data = average.to(weight.dtype)
        try:
            yield
        finally:
            for weight, data in zip(self.parameters, kept, strict=True):
                weight.data = data

    # ------------------------------------------------------------------------------------------------- checkpoints

    def sharded_state_dict(self, *, is_loading: bool = False) -> dict[str, Any]:
        """Everything that the next step depends on, as Megatron's sharded tensors, whatever the cut."""
        if is_loading:
            self._make_optimizer_state()
        model = self.model.sharded_state_dict()
        averages = {id(weight): average for weight, average in zip(self.parameters, self.averages, strict=True)}
        return {
            **model,
            "average": {
                name: _average_of(part, averages[id(part.data)])
                for name, part in model.items()
                if id(getattr(part, "data", None)) in averages
            },
            "optimizer": self.optimizer.sharded_state_dict(model, is_loading=is_loading, metadata=_RESHARDABLE),
        }

    def _make_optimizer_state(self) -> None:
        """Give the optimizers of PyTorch their state, which they otherwise make at the first step.

        The distributed optimizer asks for it before it loads one. It also wants to copy every entry of the state, but
        is given none for the number of steps, which it has set by then.
        """
        for part in self.optimizer.chained_optimizers:
            inner = part.optimizer
            if hasattr(part, "_set_main_param_and_optimizer_states"):
                part._set_main_param_and_optimizer_states = functools.partial(
                    _set_with_step, part._set_main_param_and_optimizer_states, inner
                )
            for weight in [] if inner.state else [weight for group in inner.param_groups for weight in group["params"]]:
                inner.state[weight] = {
                    "step": torch.tensor(0.0),
                    "exp_avg": torch.zeros_like(weight),
                    "exp_avg_sq": torch.zeros_like(weight),
                }

    def _inner_optimizers(self) -> list[torch.optim.Optimizer]:
        return [part.optimizer for part in self.optimizer.chained_optimizers]

    def load_sharded(self, state: Mapping[str, Any]) -> None:
        """Take over what was loaded into a `sharded_state_dict`."""
        self.averages = [state["average"][name].float() for name, _ in self.model.named_parameters()]
        names = self.model.state_dict().keys()
        self.model.load_state_dict({name: value for name, value in state.items() if name in names})
        self.optimizer.load_state_dict(state["optimizer"])
        for inner in self._inner_optimizers():
            for kept in inner.state.values():
                # Megatron hands one number of steps to all weights, which PyTorch would then count up once for each.
                kept["step"] = kept["step"].clone()

    def about(self) -> dict[str, Any]:
        """What a checkpoint says of itself to whoever converts it: `poet_conversions.formats.megatron.About`."""
        return {
            "config": self.config.to_dict(),
            "fingerprint": self.bundle.fingerprint,
            "trained_tasks": sorted(self.trained_tasks),
            "trained_parallel": self.recipe.parallel_share > 0,
            "trained_films": None if self.films is None else self.recipe.film_scenes[1],
            "dtype": self.recipe.export_dtype,
        }

    def state_dict(self) -> dict[str, Any]:
        """What is the same in all processes, as plain values; the rest is in `sharded_state_dict`."""
        return {
            "num_updates": self.num_updates,
            "guard": self.guard.state_dict(),
            "fingerprint": self.bundle.fingerprint,
            "loader": self.loader_state(),
            "distributed_optimizer": self.recipe.parallel.distributed_optimizer,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Inverse of `state_dict`.

        Raises:
            CheckpointError: the checkpoint belongs to another vocabulary.
            ConfigError: the data or its order differ.
        """
        self.check_vocabulary(state["fingerprint"])
        if state["distributed_optimizer"] != self.recipe.parallel.distributed_optimizer:
            raise ConfigError(
                f"distributed_optimizer must be {state['distributed_optimizer']}, as it was when the run was begun: "
                "Megatron saves the two kinds of optimizer differently. Everything else of the cut may change."
            )
        self.load_loader_state(state["loader"])
        self.num_updates = int(state["num_updates"])
        if "guard" in state:
            self.guard.load_state_dict(state["guard"])

    def export(self, directory: Path) -> None:
        """Write the bundle with the averaged weights; the leading process does, all must call."""
        weights = self.gather_weights()
        if weights is not None:
            self.export_weights(directory, weights)
        distributed.barrier()

    def gather_weights(self) -> dict[str, Tensor] | None:
        """The averaged weights under their canonical names, in the leading process; None in the others."""
        rename = megatron_keymap.renumber(self.model.layer_offset)
        own = {
            rename(name): average.cpu()
            for (name, _), average in zip(self.model.named_parameters(), self.averages, strict=True)
        }
        tensor_rank = parallel_state.get_tensor_model_parallel_rank()
        stage = parallel_state.get_pipeline_model_parallel_rank()
        found: list[Any] | None = [None] * distributed.get_world_size() if distributed.get_rank() == 0 else None
        distributed.gather_object((stage, tensor_rank, own) if self.dp_rank == 0 else None, found)
        if found is None:
            return None
        parts: dict[str, dict[int, Tensor]] = {}
        for _, rank, weights in sorted((each for each in found if each is not None), key=lambda each: each[:2]):
            for name, tensor in weights.items():
                if name == "output_layer.weight" and self.config.tie_embeddings:
                    continue  # the last stage's copy of the embedding
                parts.setdefault(name, {})[rank] = tensor
        whole = {name: megatron_keymap.unshard(name, list(shards.values())) for name, shards in parts.items()}
        return megatron_keymap.from_megatron(whole, self.config)


def _average_of(part: Any, average: Tensor) -> Any:
    """What a weight's sharded tensor, or the factory of several, is for its average, which may be of another dtype."""
    changes: dict[str, Any] = {"key": f"average.{part.key}", "data": average}
    if isinstance(part, ShardedTensor):
        changes["dtype"] = average.dtype
    return dataclasses.replace(part, **changes)


def _set_with_step(
    set_states: Callable[..., None], inner: torch.optim.Optimizer, weight: Tensor, tensors: dict[str, Tensor]
) -> None:
    step = next(iter(inner.state.values()))["step"]  # the same of all weights
    set_states(weight, {"step": step, **tensors})
