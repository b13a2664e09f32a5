"""From a recipe file to a finished thing: the one place that knows which trainer a recipe's `train` key names."""

from __future__ import annotations

import dataclasses
import functools
import os
import signal
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from numpy.typing import NDArray

from poet.bundle import Bundle, GenerationDefaults
from poet.bundle_writing import create_tokenizer_bundle
from poet.data.clips import ClipSource, open_source
from poet.data.listing import list_clips
from poet.data.scene_measuring import stamp_of
from poet.errors import CheckpointError, ConfigError, PoetError
from poet.model.device import parse_device
from poet.training.audio_tokenizer import AudioTokenizerRecipe, AudioTokenizerTraining
from poet.training.config import build, read_recipe, to_plain, write_recipe
from poet.training.kept_frames import KeptFrames
from poet.training.language import LanguageRecipe, LanguageRun, LanguageTraining, ModelSize, check_trainable
from poet.training.launch import LAUNCHER
from poet.training.loop import ONE_FILE, FitResult, LoopConfig, Progress, Trainable, fit, writing
from poet.training.plan import make_plan
from poet.training.processes import alone_in, follow_parent
from poet.training.start import shape_of
from poet.training.text_tokenizer import TextTokenizerRecipe, train_text_tokenizer
from poet.training.upsampler import UpsamplerRecipe, UpsamplerTraining
from poet.training.video_tokenizer import FrameSource, VideoTokenizerRecipe, VideoTokenizerTraining

__all__ = ["KINDS", "LoopOptions", "check_parallel", "plan", "train"]

KINDS = ("video_tokenizer", "audio_tokenizer", "text_tokenizer", "tokenizer_bundle", "language", "upsampler", "lora")
LAYOUT_KEYS = frozenset({"parallel"})  # what a run may go on without: it changes nothing that is learnt
RECIPE_FILE = "recipe.yaml"
ENDLESS = 10**9  # clips of a source that is drawn


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoopOptions:
    """A recipe's `loop` group: how the run is logged and saved, see `LoopConfig`."""

    log_every: int = 20
    validate_every: int = 500
    validate_first: bool = False
    checkpoint_seconds: float = 120.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenizerBundleRecipe:
    """Three trained tokenizers that become one vocabulary.

    Attributes:
        video_tokenizer: directory that its training exported; likewise the next two.
        resolutions: (height, width) in pixels of all clips that the vocabulary shall have an id for.
        defaults: what a command does when it is not told otherwise.
    """

    video_tokenizer: Path
    audio_tokenizer: Path
    text_tokenizer: Path
    resolutions: tuple[tuple[int, int], ...]
    defaults: GenerationDefaults


def train(
    recipe: Path,
    overrides: Sequence[str],
    directory: Path,
    *,
    device: str = "cpu",
    progress: Progress | None = None,
    say: Callable[[str], None] | None = None,
) -> FitResult:
    """Train what a recipe names, or go on where an earlier run in `directory` stopped.

    In a process that a launcher such as `torchrun` has started, a language model is trained with Megatron-Core,
    together with the launcher's other processes.

    Args:
        recipe: a YAML file.
        overrides: "key=value" each.
        directory: of the run: checkpoint, metrics, plot, the resolved recipe, and `export/` at the end.
        device: "cpu" or "cuda".
        progress: called after every step.
        say: told what is being prepared, and what the run needs where that is known.

    Raises:
        ConfigError: the recipe cannot be used, `directory` holds a run of another recipe, or another process is
            training in it.
        CheckpointError: a checkpoint, bundle or shard that does not fit.
    """
    values = read_recipe(recipe, overrides)
    kind = values.pop("train", None)
    if kind not in KINDS:
        raise ConfigError(f"a recipe's key 'train' must be one of {', '.join(KINDS)}, got {kind!r}.")
    options = build(LoopOptions, values.pop("loop", {}), "loop")
    parse_device(device)
    was_there = directory.exists()
    with writing(directory):
        directory.mkdir(parents=True, exist_ok=True)
    try:
        # Around all that is written: a run that is refused must not have changed the recipe of the one that goes on.
        with alone_in(directory) if os.environ.get("RANK", "0") == "0" else nullcontext():
            return _train(kind, values, options, directory, device, progress, say)
    except PoetError:
        if not was_there:
            with suppress(OSError):  # something has been written
                directory.rmdir()
        raise


def _train(
    kind: str,
    values: Mapping[str, Any],
    options: LoopOptions,
    directory: Path,
    device: str,
    progress: Progress | None,
    say: Callable[[str], None] | None,
) -> FitResult:
    if kind == "text_tokenizer":
        return _train_text(build(TextTokenizerRecipe, values), directory)
    if kind == "tokenizer_bundle":
        return _assemble(build(TokenizerBundleRecipe, values), directory)
    launched = "WORLD_SIZE" in os.environ
    if launched and kind != "language":
        raise ConfigError(f"several processes can train a recipe of 'language' only, got {kind!r}. Leave --nproc out.")
    if launched:
        if launcher := os.environ.get(LAUNCHER):
            follow_parent(int(launcher), signal.SIGTERM)  # which saves and ends; nobody else is left to stop it
        language = _build_language(values)
        if os.environ.get("RANK", "0") == "0":
            _keep_recipe(kind, language, directory)
        loop = LoopConfig(num_steps=language.num_steps, **dataclasses.asdict(options))
        # Only here: Megatron takes seconds to import, and whoever trains alone need not have it.
        with warnings.catch_warnings():
            # Nobody can act on these: what Megatron would do with packages that Poet does without.
            warnings.filterwarnings("ignore", message="(Transformer Engine|Apex|full scope is deprecated)")
            from poet.training.megatron_trainer import train_with_megatron

        return train_with_megatron(language, loop, directory, device=device, progress=progress)
    if kind == "lora":
        return _train_adapter(values, options, directory, device, progress, say)
    settings, trainable = _build(kind, values, device, directory)
    _keep_recipe(kind, settings, directory)
    loop = LoopConfig(num_steps=settings.num_steps, **dataclasses.asdict(options))
    speed = trainable.speed(directory) if isinstance(trainable, LanguageTraining) else None
    return fit(trainable, loop, directory, speed=speed, progress=progress)


def check_parallel(recipe: Path, overrides: Sequence[str], *, device: str, processes: int) -> None:
    """Raise what training in several processes would, before any is started.

    Args:
        recipe: a YAML file.
        overrides: "key=value" each.
        device: "cpu" or "cuda".
        processes: on this machine.

    Raises:
        ConfigError: the recipe cannot be trained so, or there are not so many GPUs.
        CheckpointError: its bundle or shards are missing, damaged or of another vocabulary.
    """
    values = read_recipe(recipe, overrides)
    if (kind := values.pop("train", None)) != "language":
        raise ConfigError(f"several processes can train a recipe of 'language' only, got {kind!r}. Leave --nproc out.")
    build(LoopOptions, values.pop("loop", {}), "loop")
    language = _build_language(values)
    if parse_device(device).type == "cuda" and torch.cuda.device_count() < processes:
        raise ConfigError(
            f"every process must have a GPU, got {processes} processes and {torch.cuda.device_count()} GPUs. Start "
            "fewer processes."
        )
    check_trainable(language)
    language.parallel.rows_each(language.batch_size, processes)
    language.parallel.check_fits(LanguageRun(language, "cpu").config)


def plan(
    recipe: Path,
    overrides: Sequence[str],
    *,
    gpu: str,
    gpus: int | None,
    row_length: int | None,
    ids: float | None,
    mfu: float,
) -> dict[str, Any]:
    """Say what a recipe of a language model needs, without training.

    Args:
        recipe: a YAML file.
        overrides: "key=value" each.
        gpu: a name in `poet.training.plan.GPUS`.
        gpus: that share the work; None takes one copy of the model.
        row_length: ids of a row; None takes the longest that the recipe's scenes may have.
        ids: of the whole run; None takes the recipe's steps with full rows.
        mfu: share of the GPU's peak that is counted on.

    Raises:
        ConfigError: the recipe is of another kind, or cannot be cut so.
        CheckpointError: its bundle, which decides the vocabulary, is missing.
    """
    values = read_recipe(recipe, overrides)
    if (kind := values.pop("train", None)) != "language":
        raise ConfigError(f"a plan can be made for recipes of 'language' only, got {kind!r}.")
    values.pop("loop", None)
    language = _build_language(values)
    vocabulary = Bundle.open(language.bundle, require_model=False).vocabulary
    length = language.model.scene_length if row_length is None else row_length
    if length > language.model.max_position_embeddings:
        raise ConfigError(
            f"a row must have at most max_position_embeddings, {language.model.max_position_embeddings} ids, "
            f"got {length}."
        )
    return make_plan(
        language.model.to_config(vocabulary.padded_vocab_size),
        language.parallel,
        gpu=gpu.lower(),
        gpus=language.parallel.model_parallel_size if gpus is None else gpus,
        batch_size=language.batch_size,
        row_length=length,
        ids=float(language.num_steps * language.batch_size * length) if ids is None else ids,
        bf16=language.precision == "bf16",
        mfu=mfu,
    ).to_dict()


def _build(kind: str, values: Mapping[str, Any], device: str, directory: Path) -> tuple[Any, Trainable]:
    if kind in ("video_tokenizer", "audio_tokenizer") and "codec" not in values and values.get("start_from"):
        values = {**values, "codec": shape_of(Path(values["start_from"]))}
    if kind == "video_tokenizer":
        video = build(VideoTokenizerRecipe, values)

        def frames(name: str) -> list[FrameSource]:
            sizes = [(scale * video.height, scale * video.width) for scale in video.scales]
            opened = [_open(name, video.fps, video.num_frames, *size) for size in sizes]
            if not Path(name).exists():  # drawn, which is as fast as reading
                return [_Frames(source) for source in opened]
            stamps = [stamp_of(one) for one in list_clips(name)]  # a file that was replaced is decoded again
            with writing(directory):
                kept = directory / "frames"
                return [KeptFrames(_Frames(source), f"{source.name} {stamps}", kept) for source in opened]

        return video, VideoTokenizerTraining(
            video, frames(video.source), frames(video.validation_source), device=device
        )
    if kind == "audio_tokenizer":
        audio = build(AudioTokenizerRecipe, values)
        rate = audio.codec.sample_rate
        for name in (audio.source, audio.validation_source):
            found = _open(name, sample_rate=rate)[0].clip
            if found.samples is not None and found.sample_rate != rate:
                raise ConfigError(f"{name} has {found.sample_rate} samples a second, codec.sample_rate is {rate}.")
        return audio, AudioTokenizerTraining(audio, functools.partial(_sound, sample_rate=rate), device)
    if kind == "upsampler":
        upsampler = build(UpsamplerRecipe, values)
        return upsampler, UpsamplerTraining(upsampler, device=device)
    language = _build_language(values)
    return language, LanguageTraining(language, device=device)


def _build_language(values: Mapping[str, Any]) -> LanguageRecipe:
    """The recipe of a language model. Sizes that it does not name are those of the bundle that it starts from."""
    named, start = values.get("model", {}), values.get("start_from")
    if start is not None and isinstance(named, Mapping):
        sizes = ModelSize.of(Bundle.open(str(start)).model_config)
        values = {**values, "model": {**to_plain(sizes), **named}}
    return build(LanguageRecipe, values)


class _Frames:
    """The pictures of a source, by its fast path where it has one."""

    def __init__(self, source: ClipSource) -> None:
        self.source = source

    def __len__(self) -> int:
        return len(self.source)

    def frames(self, index: int) -> NDArray[np.uint8]:
        fast = getattr(self.source, "frames", None)
        frames: NDArray[np.uint8] | None = self.source[index].clip.frames if fast is None else fast(index)
        if frames is None:
            raise ConfigError(f"clip {index} of {self.source.name} has no picture; leave sounds out of this source.")
        return frames


@functools.lru_cache(maxsize=8)
def _open(
    name: str, fps: float = 8.0, num_frames: int = 17, height: int = 64, width: int = 64, sample_rate: int = 16_000
) -> ClipSource:
    """All clips of a source, which for one that is drawn is more than anybody can use."""
    count = None if Path(name).exists() else ENDLESS
    return open_source(
        name, count=count, fps=fps, height=height, width=width, num_frames=num_frames, sample_rate=sample_rate
    )


def _sound(name: str, index: int, *, sample_rate: int) -> NDArray[np.float32]:
    """The sound of clip `index` of a source, gone through in turn."""
    source = _open(name, sample_rate=sample_rate)
    fast, place = getattr(source, "sound", None), index % len(source)
    samples: NDArray[np.float32] | None = source[place].clip.samples if fast is None else fast(place)
    if samples is None:
        raise ConfigError(f"clip {place} of {name} has no sound; leave silent files out of this source.")
    return samples


def _caption(name: str, index: int) -> str:
    """The caption of clip `index` of a source, gone through in turn."""
    source = _open(name)
    fast, place = getattr(source, "caption", None), index % len(source)
    caption: str | None = source[place].caption if fast is None else fast(place)
    if caption is None:
        raise ConfigError(f"clip {place} of {name} has no caption; write one beside it.")
    return caption


def _train_text(recipe: TextTokenizerRecipe, directory: Path) -> FitResult:
    """Text pieces are counted in one go: there is nothing to resume."""
    started = time.monotonic()
    _keep_recipe("text_tokenizer", recipe, directory)
    tokenizer = train_text_tokenizer(recipe, _caption)
    with writing(directory / "export"):
        tokenizer.save(directory / "export")
    seconds = time.monotonic() - started
    return FitResult(step=1, finished=True, seconds=seconds, metrics={"pieces": float(tokenizer.spec.num_pieces)})


def _train_adapter(
    values: Mapping[str, Any],
    options: LoopOptions,
    directory: Path,
    device: str,
    progress: Progress | None,
    say: Callable[[str], None] | None,
) -> FitResult:
    """Clips are encoded first, under the recipe that the run will go on with."""
    from poet.training.lora import LoraRecipe, LoraTraining  # PEFT takes seconds to import

    recipe = build(LoraRecipe, values)
    _keep_recipe("lora", recipe, directory)
    with writing(directory / "shards"):
        training = LoraTraining(recipe, directory, device=device, say=say)
    loop = LoopConfig(num_steps=recipe.num_steps, **dataclasses.asdict(options))
    return fit(training, loop, directory, progress=progress)


def _assemble(recipe: TokenizerBundleRecipe, directory: Path) -> FitResult:
    """Lay the tokenizers side by side under one vocabulary."""
    started = time.monotonic()
    _keep_recipe("tokenizer_bundle", recipe, directory)
    with writing(directory / "export"):
        bundle = create_tokenizer_bundle(
            directory / "export",
            recipe.video_tokenizer,
            recipe.audio_tokenizer,
            recipe.text_tokenizer,
            recipe.resolutions,
            recipe.defaults,
            overwrite=True,
        )
    metrics = {"ids": float(bundle.vocabulary.vocab_size)}
    return FitResult(step=1, finished=True, seconds=time.monotonic() - started, metrics=metrics)


def _keep_recipe(kind: str, settings: Any, directory: Path) -> None:
    """Save the resolved recipe beside the run; a run goes on with the recipe that it was begun with, or not at all.

    Keys that there were not yet when it was begun have their defaults.
    """
    resolved = {"train": kind, **to_plain(settings)}
    with writing(directory):
        directory.mkdir(parents=True, exist_ok=True)
    file = directory / RECIPE_FILE
    if any((directory / name).exists() for name in (ONE_FILE, "checkpoints")) and file.exists():
        begun = _with_defaults(settings, _read_begun(file))
        keys = {**begun, **resolved}.keys() - LAYOUT_KEYS
        differing = sorted(key for key in keys if begun.get(key) != resolved.get(key))
        if differing:
            said = "; ".join(f"{key} was {begun.get(key)!r}, is {resolved.get(key)!r}" for key in differing)
            raise ConfigError(f"{directory} holds a run of another recipe: {said}. Name another directory with -o.")
    with writing(file):
        write_recipe(file, resolved)


def _with_defaults(settings: Any, begun: Mapping[str, Any]) -> dict[str, Any]:
    """Plain values with the defaults of those keys that they lack, in groups of keys too."""
    values = {**_defaults(settings), **begun}
    for field in dataclasses.fields(settings):
        group = getattr(settings, field.name)
        if dataclasses.is_dataclass(group) and isinstance(values.get(field.name), Mapping):
            values[field.name] = _with_defaults(group, values[field.name])
    return values


def _defaults(settings: Any) -> dict[str, Any]:
    """The defaults of a recipe's keys, as plain values."""
    values = {}
    for field in dataclasses.fields(settings):
        if field.default is not dataclasses.MISSING:
            values[field.name] = to_plain(field.default)
        elif field.default_factory is not dataclasses.MISSING:
            values[field.name] = to_plain(field.default_factory())
    return values


def _read_begun(file: Path) -> dict[str, Any]:
    try:
        begun = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}. Delete it if the run is to go on.") from error
    if not isinstance(begun, dict):
        raise CheckpointError(f"{file} must hold the recipe of the run, it holds {begun!r}. Delete it to go on.")
    return begun
