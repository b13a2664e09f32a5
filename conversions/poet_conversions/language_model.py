"""A bundle that starts from a language model: its transformer and text tokenizer, with rows for video and audio codes.

The layers are taken byte for byte; embedding and head get rows for Poet's ids before and behind their own, which become
the text range. So on text alone, read causally, the bundle computes what the language model does. Weights are read and
written one tensor at a time, so a model of any size needs the memory of some two files of `tensor_files.LARGEST_FILE`.

Legend: V rows of the shared vocabulary (padded), R rows of the language model, C hidden size.
"""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import torch
from safetensors import SafetensorError
from torch import Tensor

from poet.bundle import Bundle
from poet.bundle_writing import create_tokenizer_bundle, export_bundle
from poet.errors import CheckpointError, ConfigError
from poet.model.attention import SceneLayout
from poet.model.config import PoetConfig
from poet.model.tensor_files import LARGEST_FILE, write_tensors
from poet.model.transformer import PoetTransformer
from poet.model.weights import load_transformer
from poet.vocabulary import Vocabulary
from poet_conversions.agreement import Agreement
from poet_conversions.formats.qwen3 import EMBEDDING, HEAD, Qwen3Checkpoint

__all__ = ["NOISE", "can_compare", "compare_text", "convert_language_model", "extend_rows"]

NOISE: Final = 0.1
"""Deviation of new rows from the mean of the text's rows, in units of the text rows' own, channel by channel."""

_SEEDS: Final = {EMBEDDING: 0, HEAD: 1}
_CHUNK: Final = 4096  # rows at a time

_CARD: Final = """# Started from a language model, not trained

Transformer and text tokenizer are those of a {kind} checkpoint of {parameters:.1f} M parameters, whose licence holds
for them. The rows for Poet's special ids and for the codes of video and sound are new: the mean of the text's rows and
noise. On text the model computes what it did; video and sound must be learnt first (recipes/language_model).
"""


def convert_language_model(
    source: Path,
    target: Path,
    *,
    bundle: Path,
    scene_length: int | None = None,
    largest_file: int = LARGEST_FILE,
) -> Bundle:
    """Write a bundle that starts from a dense Qwen3 checkpoint. It appears whole or not at all.

    Args:
        source: the checkpoint's directory, in Hugging Face's files.
        target: of the new bundle; must not exist.
        bundle: whose video and audio tokenizers, resolutions and defaults it gets.
        scene_length: ids of the longest scene; None takes that of `bundle`'s model.
        largest_file: bytes of weights in a file; larger models are written in several.

    Returns:
        The new bundle, opened. It does not say what it was trained on.

    Raises:
        CheckpointError: the checkpoint or the bundle is incomplete or damaged, or the target exists.
        ConfigError: the checkpoint has what Poet's transformer has not, or no scene_length is known.
    """
    if target.exists():
        raise CheckpointError(f"{target} is there already and would be written over. Name another directory.")
    tokenizers = Bundle.open(bundle, require_model=False)
    checkpoint = Qwen3Checkpoint.open(source)
    length = _scene_length(tokenizers) if scene_length is None else scene_length
    with _making(target), tempfile.TemporaryDirectory() as scratch:
        text = Path(scratch) / "text"
        checkpoint.tokenizer.save(text)
        extended = create_tokenizer_bundle(
            Path(scratch) / "bundle",
            bundle / "video_tokenizer",
            bundle / "audio_tokenizer",
            text,
            tokenizers.vocabulary.resolutions,
            tokenizers.generation_config,
        )
        vocabulary = extended.vocabulary
        config = dataclasses.replace(checkpoint.config, vocab_size=vocabulary.padded_vocab_size, scene_length=length)
        with torch.device("meta"):
            shapes = {name: part.shape for name, part in PoetTransformer(config).state_dict().items()}
        sizes = {name: shape.numel() * checkpoint.files.facts[name].dtype.itemsize for name, shape in shapes.items()}

        def read(name: str) -> Tensor:
            tensor = checkpoint.read(name)
            if not bool(torch.isfinite(tensor).all()):
                file = checkpoint.files.facts[name].file
                raise CheckpointError(f"{file} must hold finite numbers, {name} has others. Copy it again.")
            if name not in _SEEDS:
                return tensor
            return extend_rows(tensor, vocabulary, num_known=checkpoint.tokenizer.num_known, seed=_SEEDS[name])

        return export_bundle(
            target,
            extended,
            config.to_huggingface_dict(
                fingerprint=vocabulary.fingerprint, dtype=str(checkpoint.dtype).removeprefix("torch.")
            ),
            lambda path: write_tensors(path, sizes, read, largest_file),
            _CARD.format(kind="Qwen3", parameters=_own_parameters(checkpoint) / 1e6),
        )


@contextlib.contextmanager
def _making(target: Path) -> Iterator[None]:
    """Turn what a full or read-only disk raises into a CheckpointError that says what to do."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{target} could not be made: {error}. Nothing was left there; see to what is missing, and start again."
        ) from error


def extend_rows(rows: Tensor, vocabulary: Vocabulary, *, num_known: int, seed: int) -> Tensor:
    """Put the rows of a language model's embedding or head into a matrix of the shared vocabulary.

    Every other row is the mean of the text's rows plus normal noise of a tenth of their deviation, channel by channel:
    no id is likelier than another at first, nor than a text piece, and no two are the same.

    Args:
        rows: (R, C) floating-point; R = vocabulary.text_vocab_size.
        vocabulary: says where they belong.
        num_known: the first rows, which stand for pieces; mean and deviation are theirs.
        seed: of the noise.

    Returns:
        (V, C) of the same dtype.

    Source: Hewitt, "Initializing New Word Embeddings for Pretrained Language Models", 2021, for the mean.
    """
    low, high = vocabulary.text_range
    known = rows[:num_known]
    mean = sum((part.double().sum(0) for part in known.split(_CHUNK)), start=torch.zeros(())) / num_known
    squares = sum(((part.double() - mean).square().sum(0) for part in known.split(_CHUNK)), start=torch.zeros(()))
    deviation = (squares / num_known).sqrt()
    extended = torch.empty(vocabulary.padded_vocab_size, rows.shape[1], dtype=rows.dtype)
    extended[low:high] = rows
    generator = torch.Generator().manual_seed(seed)
    for part in _parts(extended[:low], extended[high:]):
        noise = torch.randn(part.shape, generator=generator, dtype=torch.float64)
        part.copy_(mean + NOISE * deviation * noise)
    return extended


def can_compare(config: PoetConfig) -> bool:
    """Whether there is memory for `compare_text` with a model of these sizes."""
    needed = 6 * config.num_parameters  # float32 beside the file's two bytes, one model at a time
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:  # not Linux, which does not say
        return True
    for line in lines:
        if line.startswith("MemAvailable:"):
            return needed < 1024 * int(line.split()[1])
    return False


@torch.inference_mode()
def compare_text(source: Path, target: Path, *, rows: int = 2, length: int = 48, seed: int = 0) -> Agreement:
    """Compute logits of random text with transformers' Qwen3 and with the bundle's model, one after the other.

    Args:
        source: the checkpoint.
        target: the bundle that was made of it.
        rows: of text.
        length: pieces of a row.
        seed: of the pieces.

    Raises:
        CheckpointError: one of them cannot be read.
    """
    from transformers import Qwen3ForCausalLM  # which takes seconds to import
    from transformers.utils import logging

    checkpoint = Qwen3Checkpoint.open(source)
    generator = torch.Generator().manual_seed(seed)
    text = torch.randint(0, checkpoint.tokenizer.num_known, (rows, length), generator=generator)
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    original = Qwen3ForCausalLM.from_pretrained(source, dtype=torch.float32, local_files_only=True)
    first: Tensor = original(input_ids=text, use_cache=False).logits
    del original
    model = load_transformer(target)
    low, high = Bundle.open(target).vocabulary.text_range
    nothing = torch.zeros(rows, dtype=torch.int64)
    layout = SceneLayout.from_prefix_lengths(nothing, nothing + length, length)  # no prefix: causal throughout
    second = model.logits(model(text + low, layout), slice(low, high))
    return Agreement.of(first, second)


def _scene_length(tokenizers: Bundle) -> int:
    if tokenizers.config is None:
        raise ConfigError(
            f"{tokenizers.path} holds tokenizers alone and does not say how long a scene may be. Say it with "
            "--scene-length, or name a bundle with a model."
        )
    return tokenizers.model_config.scene_length


def _own_parameters(checkpoint: Qwen3Checkpoint) -> int:
    facts = checkpoint.files.facts
    return sum(
        torch.Size(fact.shape).numel()
        for name, fact in facts.items()
        if not (checkpoint.config.tie_embeddings and name == HEAD)
    )


def _parts(*ranges: Tensor) -> Iterator[Tensor]:
    """Some thousand rows at a time."""
    for rows in ranges:
        yield from rows.split(_CHUNK)
