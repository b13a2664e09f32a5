"""Tiny configurations, random scenes and a whole tiny bundle, for every test folder. Nothing else in Poet imports this.

Sizes are primes where they may be, and every axis has its own, so that a swapped axis cannot pass. Torch and the
tokenizers are imported only by the functions that build them.
"""

from __future__ import annotations

import dataclasses
import faulthandler
import importlib.util
import inspect
import json
import multiprocessing
import pickle
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from poet.bundle import Bundle, GenerationDefaults
from poet.bundle_writing import create_tokenizer_bundle, export_bundle
from poet.model.config import PoetConfig
from poet.sequence import Scene, output_grammar, pack, pack_prefix, pad_scene
from poet.tasks import ClipGeometry, ClipParts, Task, get_task
from poet.vocabulary import Vocabulary
from poet_tokenizers.base import AudioSpec, TextSpec, VideoSpec

if TYPE_CHECKING:
    from poet.generation.engine import GenerationRequest
    from poet.generation.sampling import SamplingConfig
    from poet.model.transformer import PoetTransformer

__all__ = [
    "film_request",
    "in_processes",
    "random_parts",
    "random_scene",
    "save_adapter",
    "save_model",
    "save_tiny_tokenizers",
    "sharp_model",
    "tiny_bundle",
    "tiny_config",
    "tiny_defaults",
    "tiny_geometry",
    "tiny_recipe",
    "tiny_shards",
    "tiny_specs",
    "tiny_tokenizer_bundle",
    "tiny_upsampler",
    "tiny_vocabulary",
]

_STUCK: Final = 200.0
"""Seconds after which a process of `in_processes` writes down where it stands; a test is given 300."""

RESOLUTIONS: Final = ((24, 40), (56, 88))
"""(height, width) in pixels; at a spatial stride of 8 that is (3, 5) and (7, 11) latent places."""


def tiny_specs(**changes: dict[str, Any]) -> tuple[VideoSpec, AudioSpec, TextSpec]:
    """Specs of tokenizers that do not exist: 31 video codes, 3 levels of 13 audio codes, 43 text pieces.

    Args:
        **changes: under "video", "audio" and "text", the fields that differ.
    """
    video = VideoSpec(kind="tiny", codebook_size=31, temporal_stride=4, spatial_stride=8, checksum="a" * 64)
    audio = AudioSpec(
        kind="tiny", sample_rate=1600, hop_length=50, num_codebooks=3, codebook_size=13, checksum="b" * 64
    )
    text = TextSpec(kind="tiny", num_pieces=43, checksum="c" * 64)
    return (
        dataclasses.replace(video, **changes.get("video", {})),
        dataclasses.replace(audio, **changes.get("audio", {})),
        dataclasses.replace(text, **changes.get("text", {})),
    )


def tiny_vocabulary(resolutions: tuple[tuple[int, int], ...] = RESOLUTIONS, **changes: dict[str, Any]) -> Vocabulary:
    """The vocabulary of `tiny_specs`: 369 ids, 384 padded."""
    return Vocabulary.from_specs(*tiny_specs(**changes), resolutions)


def tiny_geometry(
    vocabulary: Vocabulary, *, num_latent_frames: int = 5, fps: float = 8.0, resolution: tuple[int, int] | None = None
) -> ClipGeometry:
    """Clips of that many latent frames, at the vocabulary's first resolution unless another is named."""
    height, width = vocabulary.resolutions[0] if resolution is None else resolution
    num_frames = 1 + (num_latent_frames - 1) * vocabulary.temporal_stride
    return ClipGeometry.from_vocabulary(vocabulary, num_frames=num_frames, fps=fps, height=height, width=width)


def random_parts(
    task: str | Task, vocabulary: Vocabulary, geometry: ClipGeometry, rng: np.random.Generator
) -> ClipParts:
    """Random codes of one clip, cut as the task says. Optional inputs are there."""
    row = task if isinstance(task, Task) else get_task(task)
    shape = geometry.latent_shape
    video = rng.integers(0, vocabulary.video_codebook_size, shape)
    edited = rng.integers(0, vocabulary.video_codebook_size, shape) if row.edit else None
    audio_shape = vocabulary.num_audio_codebooks, geometry.num_audio_latents(geometry.num_frames)
    audio = rng.integers(0, vocabulary.audio_codebook_size, audio_shape)
    return row.split_clip(video, audio, geometry, row.split(shape[0], rng), edited)


def random_scene(
    task: str | Task,
    vocabulary: Vocabulary,
    rng: np.random.Generator,
    *,
    geometry: ClipGeometry | None = None,
    num_text_pieces: int | None = 7,
    parallel: bool = False,
) -> Scene:
    """A random scene of a task, complete with its output.

    Args:
        task: name or row of the table.
        vocabulary: gives the ranges.
        rng: source of randomness.
        geometry: of the clip; None: `tiny_geometry`.
        num_text_pieces: length of the text; None leaves an optional text out.
        parallel: whether the output is to be written many ids at once.
    """
    row = task if isinstance(task, Task) else get_task(task)
    geometry = tiny_geometry(vocabulary) if geometry is None else geometry
    text = None
    if num_text_pieces is not None or "text" in row.needs:
        text = rng.integers(0, vocabulary.text_vocab_size, num_text_pieces or 0).tolist()
    parts = random_parts(row, vocabulary, geometry, rng)
    return Scene.from_parts(row.name, parts, text=text, resolution=geometry.resolution, parallel=parallel)


def save_tiny_tokenizers(directory: Path, *, seed: int = 0) -> tuple[Path, Path, Path]:
    """Write three untrained tokenizers and return their directories: video, audio, text.

    Video: 32 codes, strides 4 and 8. Audio: 1,600 samples/s, hop 50, 3 levels of 13 codes. Text: some 300 pieces,
    most of them bytes.
    """
    import torch

    from poet_tokenizers.audio import EncodecConfig, EncodecTokenizer
    from poet_tokenizers.magvit2.config import MagViT2Config
    from poet_tokenizers.magvit2.model import MagViT2
    from poet_tokenizers.text import SentencePieceTokenizer

    names = ("video", "audio", "text")
    video_directory, audio_directory, text_directory = (directory / name for name in names)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        video = MagViT2(
            MagViT2Config(
                channels=8,
                channel_multipliers=(1, 2),
                temporal_downsampling=(True,),
                num_res_blocks=1,
                patch_size=(2, 4, 4),
                num_bits=5,
                entropy_group_bits=5,
            )
        )
        audio = EncodecTokenizer(
            EncodecConfig(
                sample_rate=1600,
                ratios=(2, 5, 5),
                num_filters=2,
                latent_size=7,
                num_lstm_layers=0,
                num_codebooks=3,
                codebook_size=13,
            )
        )
        with torch.no_grad():
            # Untrained codebooks are all zeros; drawn ones make different codes sound different.
            for name, tensor in audio.state_dict().items():
                if name.endswith((".embed", ".embed_avg")):
                    tensor.normal_()
    video.eval().save(video_directory)
    audio.eval().save(audio_directory)
    lines = [f"a {size} red {shape} rises" for size in ("small", "large") for shape in ("star", "circle", "square")]
    SentencePieceTokenizer.train(lines, num_pieces=311).save(text_directory)
    return video_directory, audio_directory, text_directory


def tiny_defaults(**changes: Any) -> GenerationDefaults:
    """5 video frames of 24 x 40 pixels at 8 frames/s, which is 2 x 3 x 5 video codes and 3 x 20 audio codes."""
    return dataclasses.replace(GenerationDefaults(fps=8.0, num_frames=5, height=24, width=40), **changes)


def tiny_tokenizer_bundle(directory: Path, *, seed: int = 0, **defaults: Any) -> Bundle:
    """Write and open a bundle that holds untrained tokenizers and no model."""
    with tempfile.TemporaryDirectory() as scratch:
        tokenizers = save_tiny_tokenizers(Path(scratch), seed=seed)
        return create_tokenizer_bundle(directory, *tokenizers, RESOLUTIONS, tiny_defaults(**defaults))


def tiny_config(vocabulary: Vocabulary, **changes: Any) -> PoetConfig:
    """A transformer of two layers over a vocabulary; scenes of up to 256 ids, films of up to 1,024."""
    config = PoetConfig(
        vocab_size=vocabulary.padded_vocab_size,
        hidden_size=48,
        ffn_hidden_size=80,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        scene_length=256,
        max_position_embeddings=1024,
    )
    return dataclasses.replace(config, **changes)


def film_request(
    vocabulary: Vocabulary,
    config: PoetConfig,
    seed: int,
    num_earlier: int,
    *,
    guided: bool = False,
    parallel: bool = False,
    sampling: SamplingConfig | None = None,
    num_text_pieces: int | None = None,
) -> GenerationRequest:
    """A scene of two latent frames with sound, behind so many earlier ones of its film; greedy if nothing is said.

    Args:
        vocabulary: a small one.
        config: of the model.
        seed: of everything in it.
        num_earlier: scenes before it.
        guided: whether with guidance, of scale 2.
        parallel: whether to be written many ids at once.
        sampling: how ids are drawn.
        num_text_pieces: of its text; None: 3 to 10, as the seed says.
    """
    from poet.generation.canvas import ParallelDecoding, plan_canvas
    from poet.generation.engine import GenerationRequest
    from poet.generation.sampling import SamplingConfig

    task, geometry = get_task("text_to_video_audio"), tiny_geometry(vocabulary, num_latent_frames=2)
    rng = np.random.default_rng(seed)
    earlier = [
        random_scene(task.name, vocabulary, rng, geometry=geometry, num_text_pieces=2 + number)
        for number in range(num_earlier)
    ]
    padded = [pad_scene(pack(scene, vocabulary), config.scene_length, vocabulary).ids for scene in earlier]
    scene = random_scene(
        task.name,
        vocabulary,
        rng,
        geometry=geometry,
        num_text_pieces=num_text_pieces or 3 + seed % 8,
        parallel=parallel,
    )
    shapes: dict[str, Any] = {
        "video_latent_shape": geometry.latent_shape,
        "num_audio_latents": geometry.num_audio_latents(geometry.num_frames),
    }
    decoding = ParallelDecoding(num_steps=2 + seed % 8)
    chosen = SamplingConfig(temperature=0) if sampling is None else sampling
    return GenerationRequest(
        prefix_ids=tuple(pack_prefix(scene, vocabulary).tolist()),
        guide_ids=tuple(pack_prefix(scene, vocabulary, drop_text=True).tolist()) if guided else None,
        grammar=output_grammar(task, vocabulary, **shapes),
        sampling=dataclasses.replace(chosen, guidance_scale=2.0 if guided else 1.0),
        canvas=plan_canvas(decoding, task, vocabulary, **shapes) if parallel else None,
        context_ids=tuple(id for ids in padded for id in ids.tolist()),
    )


def sharp_model(config: PoetConfig, *, seed: int = 0, gains: bool = False) -> PoetTransformer:
    """A random transformer whose likeliest ids are clear.

    Weights as they are drawn for training give logits that are all alike and that no prompt changes.

    Args:
        config: sizes.
        seed: of every weight.
        gains: whether the gains are drawn too, about 1.
    """
    import torch

    from poet.model.transformer import PoetTransformer

    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = PoetTransformer(config).eval()
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.normal_(std=2 * weight.shape[1] ** -0.5)
            elif gains:
                weight.normal_(mean=1.0, std=0.2)
    return model


def save_model(model: PoetTransformer, directory: Path, **content: Any) -> Path:
    """Write what an engine reads of a bundle, config.json and weights, and return the directory.

    Args:
        model: to be written.
        directory: made if missing.
        **content: keys of config.json besides the model's own.
    """
    from poet.model.weights import save_weights

    directory.mkdir(exist_ok=True)
    save_weights(model, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(model.config.to_huggingface_dict() | content))
    return directory


def save_adapter(
    config: PoetConfig,
    directory: Path,
    *,
    seed: int = 0,
    rank: int = 4,
    strength: float = 1.0,
    fingerprint: str | None = None,
    **content: Any,
) -> Path:
    """Write a random LoRA adapter of a model in PEFT's files, and return the directory.

    Args:
        config: the model's.
        directory: made if missing.
        seed: of both matrices of each pair.
        rank: of every pair.
        strength: of the change, beside a matrix of `sharp_model`.
        fingerprint: written into the weights' file, if any.
        **content: keys of adapter_config.json that differ.
    """
    import torch
    from safetensors.torch import save_file

    from poet.model.lora import FINGERPRINT_KEY
    from poet.model.transformer import PoetTransformer

    with torch.device("meta"):
        shapes = {name: weight.shape for name, weight in PoetTransformer(config).named_parameters()}
    rng, tensors = torch.Generator().manual_seed(seed), {}
    for name, shape in shapes.items():
        if name.endswith("_proj.weight"):
            stem = f"base_model.model.{name.removesuffix('.weight')}"
            first = torch.randn(rank, shape[1], generator=rng) * shape[1] ** -0.5
            tensors[f"{stem}.lora_A.weight"] = first
            tensors[f"{stem}.lora_B.weight"] = torch.randn(shape[0], rank, generator=rng) * strength * rank**-0.5
    directory.mkdir(parents=True, exist_ok=True)
    metadata = {"format": "pt"} | ({} if fingerprint is None else {FINGERPRINT_KEY: fingerprint})
    save_file(tensors, directory / "adapter_model.safetensors", metadata=metadata)
    about = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": rank,
        "target_modules": sorted({name.split(".")[-2] for name in shapes if name.endswith("_proj.weight")}),
        "bias": "none",
    }
    (directory / "adapter_config.json").write_text(json.dumps(about | content))
    return directory


def tiny_bundle(directory: Path, *, seed: int = 0, config: dict[str, Any] | None = None, **defaults: Any) -> Bundle:
    """Write and open a complete bundle with random weights: real tokenizers, real model, all tiny.

    Args:
        directory: where it will be; must not exist.
        seed: of every weight.
        config: fields of `tiny_config` that differ.
        **defaults: fields of `tiny_defaults` that differ.
    """
    from safetensors.torch import save_file

    with tempfile.TemporaryDirectory() as scratch:
        source = tiny_tokenizer_bundle(Path(scratch) / "tokenizers", seed=seed, **defaults)
        shape = tiny_config(source.vocabulary, **(config or {}))
        model = sharp_model(shape, seed=seed)
        weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
        return export_bundle(
            directory,
            source,
            shape.to_huggingface_dict(fingerprint=source.fingerprint),
            lambda path: save_file(weights, path, metadata={"format": "pt"}),
            "A tiny bundle with random weights, for tests.\n",
        )


def tiny_shards(
    bundle: Bundle,
    directory: Path,
    *,
    count: int = 23,
    seed: int = 0,
    num_latent_frames: int | None = None,
    film_scenes: int | None = None,
) -> Path:
    """Write token shards of random clips with captions of many lengths, with picture and sound.

    Args:
        bundle: gives the vocabulary.
        directory: made if missing.
        count: clips.
        seed: of codes and captions.
        num_latent_frames: of every clip; None: 2 to 4.
        film_scenes: so many clips one after another are a film; None: clips are on their own.
    """
    from poet.data.shards import EncodedClip, ShardWriter

    vocabulary, rng = bundle.vocabulary, np.random.default_rng(seed)
    clips = []
    for number in range(count):
        geometry = tiny_geometry(vocabulary, num_latent_frames=num_latent_frames or 2 + number % 3)
        parts = random_parts("text_to_video_audio", vocabulary, geometry, rng)
        assert parts.video_out is not None
        assert parts.audio_out is not None
        clips.append(
            EncodedClip(
                key=f"clip-{number}" if film_scenes is None else "film-{}.{}".format(*divmod(number, film_scenes)),
                text="a red star " + "rises " * (number % 5),
                video_codes=parts.video_out.astype(np.int32),
                audio_codes=parts.audio_out.astype(np.int32),
                fps=geometry.fps,
                resolution=geometry.resolution,
            )
        )
    name = f"tiny?seed={seed}"
    with ShardWriter(directory, fingerprint=vocabulary.fingerprint, source=name, source_length=count) as writer:
        writer.write(clips, count)
    return directory


def tiny_recipe(directory: Path, **values: Any) -> Path:
    """Write a tiny bundle, its shards and a language recipe over them; return the recipe.

    Args:
        directory: must exist.
        **values: keys of the recipe besides data, sizes and precision.
    """
    import yaml

    bundle = tiny_bundle(directory / "bundle")
    shards = str(tiny_shards(bundle, directory / "shards"))
    assert bundle.model_config is not None
    names = ("hidden_size", "ffn_hidden_size", "num_layers", "num_heads", "num_kv_heads", "head_dim", "scene_length")
    recipe = {
        "train": "language",
        "bundle": str(directory / "bundle"),
        "shards": shards,
        "validation_shards": shards,
        "precision": "fp32",
        "model": {name: getattr(bundle.model_config, name) for name in names},
    }
    (directory / "recipe.yaml").write_text(yaml.safe_dump(recipe | values))
    return directory / "recipe.yaml"


def tiny_upsampler(bundle: Bundle, directory: Path, *, seed: int = 0) -> Path:
    """Write an untrained upsampler for the bundle's video codes, usually into its upsampler/."""
    import torch

    from poet.model.superresolution import Upsampler, UpsamplerConfig
    from poet.model.weights import save_upsampler

    torch.manual_seed(seed)
    config = UpsamplerConfig(
        codebook_size=bundle.vocabulary.video_codebook_size,
        num_text_pieces=bundle.vocabulary.text_vocab_size,
        hidden_size=32,
        ffn_hidden_size=48,
        num_layers=2,
        num_heads=2,
    )
    checksum = str(bundle.vocabulary.tokenizers["video"]["checksum"])
    save_upsampler(Upsampler(config), directory, checksum, torch.float32)
    return directory


def in_processes(count: int, work: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Call a function in several processes at once that talk to each other over gloo.

    The processes are forks of a server that has imported what they need and has done nothing else: quick to start, and
    without the threads and locks of this process.

    Args:
        count: processes.
        work: a function at the top of its file, called with `arguments` in each, inside an initialised
            `torch.distributed`.
        *arguments: handed on; they are pickled.

    Returns:
        What each returned (anything that `torch.save` takes), by rank.

    Raises:
        torch.multiprocessing.ProcessRaisedException: one failed; the others are ended.
        torch.multiprocessing.ProcessExitedException: one was killed; the others are ended.
    """
    import torch
    from torch.multiprocessing.spawn import start_processes

    multiprocessing.set_forkserver_preload(["poet.testing", "poet.training.megatron_trainer"])
    with tempfile.TemporaryDirectory() as folder:
        file, name = inspect.getfile(work), work.__module__
        Path(folder, "work.pickle").write_bytes(pickle.dumps((work, arguments)))
        arguments_of_each = (count, folder, name, file)
        context = start_processes(_in_process, arguments_of_each, nprocs=count, join=False, start_method="forkserver")
        try:
            while not context.join():
                pass
        except BaseException:  # also that pytest's patience is at its end
            for process in context.processes:
                process.kill()
            for stack in sorted(Path(folder).glob("*.stack")):
                sys.stderr.write(stack.read_text())
            raise
        return [torch.load(Path(folder, f"{rank}.pt"), weights_only=False) for rank in range(count)]


def _in_process(rank: int, count: int, folder: str, name: str, file: str) -> None:
    import torch
    from torch import distributed

    torch.set_num_threads(1)
    stack = Path(folder, f"{rank}.stack").open("w")  # noqa: SIM115, open as long as the process lives
    faulthandler.dump_traceback_later(_STUCK, file=stack)
    if name not in sys.modules:  # a test's file is no module that could be imported by its name
        spec = importlib.util.spec_from_file_location(name, file)
        assert spec is not None
        assert spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    work, arguments = pickle.loads(Path(folder, "work.pickle").read_bytes())
    if "poet.training.megatron_checkpoints" in sys.modules:  # before there are threads, as in training
        sys.modules["poet.training.megatron_checkpoints"].share_results_with_a_fork()
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=count)
    torch.save(work(*arguments), Path(folder, f"{rank}.pt"))
    faulthandler.cancel_dump_traceback_later()
    distributed.barrier()
    distributed.destroy_process_group()
