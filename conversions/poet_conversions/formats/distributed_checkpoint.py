"""Megatron's distributed checkpoints, read and written by one process whatever cut they were trained in.

A checkpoint says what it is in its common part under `ABOUT_KEY`: the model's sizes, the vocabulary's fingerprint, the
tasks and the dtype of the bundle it came from. Layers of one kind lie stacked in one tensor; here they are taken apart
and put together. What the names mean is `poet.training.megatron_keymap`'s business.
"""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Literal

import torch
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region
from torch import Tensor, distributed
from torch.distributed.checkpoint.api import CheckpointException

from poet.errors import CheckpointError, PoetError
from poet.model.attention import SceneLayout
from poet.model.config import PoetConfig
from poet.training.loop import writing
from poet.training.megatron_checkpoints import share_results_with_a_fork, stop_sharing_results
from poet.training.megatron_cpu import cpu_for_cuda
from poet.training.megatron_keymap import from_megatron
from poet.training.megatron_model import PoetGPTModel, load_weights, to_transformer_config
from poet.training.parallelism import Parallelism

__all__ = ["ABOUT_KEY", "About", "compute_logits", "is_checkpoint", "read_about", "read_weights", "write_weights"]

ABOUT_KEY = "poet"
Which = Literal["averaged", "latest"]
_AVERAGE, _OPTIMIZER = "average.", "optimizer."


@dataclasses.dataclass(frozen=True, kw_only=True)
class About:
    """What a checkpoint says of itself.

    Attributes:
        config: sizes of the model.
        fingerprint: of its vocabulary.
        trained_tasks: task names, or none if nobody knows.
        dtype: in which a bundle holds its weights.
        trained_parallel: whether the model has learnt to write many ids at once.
        trained_films: scenes of the longest films that it has learnt; None: it has learnt none.
    """

    config: PoetConfig
    fingerprint: str
    trained_tasks: tuple[str, ...] | None
    dtype: str
    trained_parallel: bool = False
    trained_films: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values; inverse of `from_dict`."""
        tasks = None if self.trained_tasks is None else list(self.trained_tasks)
        return {
            "config": self.config.to_dict(),
            "fingerprint": self.fingerprint,
            "trained_tasks": tasks,
            "dtype": self.dtype,
            "trained_parallel": self.trained_parallel,
            "trained_films": self.trained_films,
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> About:
        """Inverse of `to_dict`."""
        tasks = values["trained_tasks"]
        return cls(
            config=PoetConfig(**values["config"]),
            fingerprint=str(values["fingerprint"]),
            trained_tasks=None if tasks is None else tuple(tasks),
            dtype=str(values["dtype"]),
            trained_parallel=bool(values.get("trained_parallel", False)),  # not said before there was such a way
            trained_films=values.get("trained_films"),
        )


def is_checkpoint(path: Path) -> bool:
    """Whether a directory is a distributed checkpoint of Megatron."""
    return bool(dist_checkpointing.check_is_distributed_checkpoint(str(path)))


def read_about(path: Path) -> About:
    """What a checkpoint says of itself.

    Raises:
        CheckpointError: it cannot be read, or Poet did not write it.
    """
    with _reading(path):
        common = dist_checkpointing.load_common_state_dict(str(path))
        if ABOUT_KEY not in common:
            raise CheckpointError(f"{path} must say what model it holds, it does not: Poet did not write it.")
        return About.from_dict(common[ABOUT_KEY])


def read_weights(path: Path, which: Which = "averaged") -> dict[str, Tensor]:
    """All weights of a checkpoint under their canonical names, float32.

    Args:
        path: of the checkpoint.
        which: the averaged weights of a training run, where it has some, or those that are being trained.

    Raises:
        CheckpointError: a weight is missing or unknown, or the checkpoint cannot be read.
    """
    config = read_about(path).config
    with _alone(), _reading(path):
        there = dist_checkpointing.load_tensors_metadata(str(path))
        averaged = {name for name in there if name.startswith(_AVERAGE)}
        prefix = _AVERAGE if averaged and which == "averaged" else ""
        wanted = averaged if prefix else {name for name in there if not name.startswith((_AVERAGE, _OPTIMIZER))}
        loaded = dist_checkpointing.load(
            {name: there[name] for name in wanted}, str(path), validate_access_integrity=False
        )
        stacked = {name.removeprefix(prefix): loaded[name] for name in wanted}
    return from_megatron({name: weight.float() for name, weight in _unstack(stacked, config).items()}, config)


def write_weights(path: Path, weights: Mapping[str, Tensor], about: About) -> None:
    """Write a checkpoint of the weights alone, whole or not at all, that Megatron-Core reads in any cut.

    Poet's own runs start from bundles (`start_from`); this is for Megatron-LM and tools that read its checkpoints.

    Args:
        path: of the checkpoint; must not exist.
        weights: canonical name to tensor, exactly those of the model.
        about: what it shall say of itself.

    Raises:
        CheckpointError: a weight is missing or unknown, `path` exists, or cannot be written.
    """
    if path.exists():
        raise CheckpointError(f"{path} is there already and would be written over. Name another directory.")
    beside = path.with_name(f"{path.name}.writing")
    with _alone(), writing(beside):
        model = PoetGPTModel(about.config, to_transformer_config(about.config, Parallelism()), flex=False)
        load_weights(model, {name: weight.float() for name, weight in weights.items()})
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir(parents=True)
        manager = share_results_with_a_fork()
        try:
            dist_checkpointing.save({**model.sharded_state_dict(), ABOUT_KEY: about.to_dict()}, str(beside))
        finally:
            stop_sharing_results(manager)
        beside.rename(path)


@torch.inference_mode()
def compute_logits(path: Path, ids: Tensor, layout: SceneLayout, which: Which = "averaged") -> Tensor:
    """(B, L, V) float32 logits of a checkpoint, computed by Megatron's model from Megatron's own reading of it.

    Args:
        path: of the checkpoint.
        ids: (B, L) int64.
        layout: of these places.
        which: as for `read_weights`.
    """
    about = read_about(path)
    with _alone(), _reading(path):
        model = PoetGPTModel(about.config, to_transformer_config(about.config, Parallelism()), flex=False)
        state = model.sharded_state_dict()
        averaged = any(name.startswith(_AVERAGE) for name in dist_checkpointing.load_tensors_metadata(str(path)))
        if averaged and which == "averaged":
            state = {
                name: dataclasses.replace(part, key=_AVERAGE + part.key)
                for name, part in state.items()
                if isinstance(getattr(part, "data", None), Tensor)
            }
        loaded = dist_checkpointing.load(state, str(path))
        missing, unknown = model.load_state_dict(
            {name: value for name, value in loaded.items() if name in model.state_dict()}, strict=False
        )
        if unknown or any(not name.endswith("_extra_state") for name in missing):
            raise CheckpointError(f"{path} must hold every weight of the model, it lacks {', '.join(missing)}.")
        page = model.book.add(layout, torch.float32)
        logits: Tensor = gather_from_tensor_model_parallel_region(model(ids, page, output="logits"))
        return logits.clone()


def _unstack(stacked: Mapping[str, Tensor], config: PoetConfig) -> dict[str, Tensor]:
    """Layers that lie in one tensor under "decoder.layers.", each under its own name."""
    single: dict[str, Tensor] = {}
    for name, tensor in stacked.items():
        head, layers, tail = name.partition("decoder.layers.")
        if not layers:
            single[name] = tensor
        elif tensor.shape[0] != config.num_layers:
            raise CheckpointError(f"{name} must hold {config.num_layers} layers, got {tensor.shape[0]}.")
        else:
            single |= {f"{head}{layers}{layer}.{tail}": part for layer, part in enumerate(tensor)}
    return single


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """Megatron's process groups with this process in all of them."""
    if distributed.is_initialized():
        raise CheckpointError("a checkpoint must be converted by one process alone, this one is one of several.")
    with tempfile.TemporaryDirectory() as folder, cpu_for_cuda(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Please use DTensor instead")
        distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=0, world_size=1)
        try:
            parallel_state.initialize_model_parallel()
            yield
        finally:
            parallel_state.destroy_model_parallel()
            distributed.destroy_process_group()


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turn what a damaged checkpoint raises into an error that names it."""
    try:
        yield
    except PoetError:
        raise
    # PyTorch's CheckpointException is no Exception; the others are what truncated pickles and archives end in.
    except (CheckpointException, CheckpointingException, OSError, LookupError, RuntimeError, ValueError) as error:
        raise CheckpointError(f"the Megatron checkpoint {path} cannot be read: {error!r}.") from error
    except (EOFError, TypeError, UnpicklingError) as error:
        raise CheckpointError(f"the Megatron checkpoint {path} cannot be read: {error!r}.") from error
