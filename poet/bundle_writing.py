"""Writing bundles: each appears whole or not at all. Knows the files of a bundle; not what is in them."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from poet.bundle import (
    CONFIG_FILE,
    FINGERPRINT_KEY,
    GENERATION_FILE,
    MODEL_CARD_FILE,
    PHRASES_FILE,
    TOKENIZER_KINDS,
    UPSAMPLER_DIRECTORY,
    VOCABULARY_FILE,
    WEIGHTS_FILE,
    Bundle,
    GenerationDefaults,
    check_fingerprint,
)
from poet.errors import CheckpointError
from poet.vocabulary import Vocabulary

__all__ = ["create_tokenizer_bundle", "export_bundle"]


def create_tokenizer_bundle(
    directory: str | Path,
    video_directory: str | Path,
    audio_directory: str | Path,
    text_directory: str | Path,
    resolutions: Iterable[tuple[int, int]],
    defaults: GenerationDefaults,
    *,
    overwrite: bool = False,
) -> Bundle:
    """Make a tokenizer bundle from three tokenizers: they are copied, and the vocabulary is made from their specs.

    Args:
        directory: where the bundle will be.
        video_directory: as the video tokenizer's `save` wrote it.
        audio_directory: as the audio tokenizer's `save` wrote it.
        text_directory: as the text tokenizer's `save` wrote it.
        resolutions: (height, width) in pixels; the default one must be among them.
        defaults: for generation_config.json.
        overwrite: replace a bundle that is there already.

    Raises:
        CheckpointError: a tokenizer cannot be loaded, the defaults do not fit, or the directory exists.
        VocabularyError: the resolutions cannot be used.
    """
    from poet_tokenizers.loading import load_audio_tokenizer, load_text_tokenizer, load_video_tokenizer

    sources = {"video": Path(video_directory), "audio": Path(audio_directory), "text": Path(text_directory)}
    vocabulary = Vocabulary.from_specs(
        load_video_tokenizer(sources["video"]).spec,
        load_audio_tokenizer(sources["audio"]).spec,
        load_text_tokenizer(sources["text"]).spec,
        resolutions,
    )
    with _appearing_whole(Path(directory), overwrite) as unfinished:
        for kind, source in sources.items():
            shutil.copytree(source, unfinished / f"{kind}_tokenizer")
        vocabulary.save(unfinished / VOCABULARY_FILE)
        _write_object(unfinished / GENERATION_FILE, dataclasses.asdict(defaults))
        Bundle.open(unfinished, require_model=False)
    return Bundle.open(directory, require_model=False)


def export_bundle(
    directory: str | Path,
    source: Bundle,
    config: Mapping[str, Any],
    write_weights: Callable[[Path], None],
    model_card: str | None = None,
    *,
    tokenizers: Mapping[str, Path] | None = None,
    overwrite: bool = False,
) -> Bundle:
    """Assemble a complete bundle: a model together with the vocabulary, defaults and tokenizers of another bundle.

    The other bundle's upsampler and phrases go along, where it has them.

    It is assembled in a hidden directory beside and then renamed, so that whatever stops it never leaves half of one.

    Args:
        directory: where the bundle will be.
        source: the bundle that the model was trained with, usually a tokenizer bundle.
        config: for config.json; `poet_fingerprint` is added, or compared where it is there.
        write_weights: called with the path of the model.safetensors that it has to write.
        model_card: for README.md.
        tokenizers: "video", "audio" or "text" -> directory of a tokenizer that takes the place of the bundle's; its
            codes must mean the same.
        overwrite: replace a bundle that is there already.

    Raises:
        CheckpointError: the config or a tokenizer belongs to another vocabulary, the weights were not written, or the
            directory exists.
    """
    tokenizers = tokenizers or {}
    content = {FINGERPRINT_KEY: source.fingerprint, **config}
    check_fingerprint(
        str(content[FINGERPRINT_KEY]),
        source.fingerprint,
        "the model to export",
        f"Export it with the bundle that it was trained with, not with {source.path}.",
    )
    with _appearing_whole(Path(directory), overwrite) as unfinished:
        for kind in TOKENIZER_KINDS:
            part = f"{kind}_tokenizer"
            shutil.copytree(tokenizers.get(kind, source.path / part), unfinished / part)
        if source.upsampler is not None:
            shutil.copytree(source.upsampler, unfinished / UPSAMPLER_DIRECTORY)
        if source.phrases_file is not None:
            shutil.copyfile(source.phrases_file, unfinished / PHRASES_FILE)
        source.vocabulary.save(unfinished / VOCABULARY_FILE)
        _write_object(unfinished / GENERATION_FILE, dataclasses.asdict(source.generation_config))
        _write_object(unfinished / CONFIG_FILE, content)
        if model_card is not None:
            (unfinished / MODEL_CARD_FILE).write_text(model_card, encoding="utf-8")
        write_weights(unfinished / WEIGHTS_FILE)
        written = Bundle.open(unfinished)
        for kind in tokenizers:
            getattr(written, f"{kind}_tokenizer")  # says what is wrong with it
    return Bundle.open(directory)


@contextlib.contextmanager
def _appearing_whole(directory: Path, overwrite: bool) -> Iterator[Path]:
    """An empty directory beside `directory` that takes its place at the end, or vanishes after an error."""
    if directory.exists() and not overwrite:
        raise CheckpointError(f"{directory} exists already. Name another directory, or ask to overwrite it.")
    mark = uuid.uuid4().hex[:8]
    unfinished = directory.parent / f".{directory.name}.{mark}.unfinished"
    replaced = directory.parent / f".{directory.name}.{mark}.replaced"
    unfinished.mkdir(parents=True)
    try:
        yield unfinished
        if directory.exists():
            directory.rename(replaced)
        unfinished.rename(directory)
    finally:
        if replaced.exists() and not directory.exists():
            replaced.rename(directory)
        shutil.rmtree(unfinished, ignore_errors=True)
        shutil.rmtree(replaced, ignore_errors=True)


def _write_object(file: Path, content: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(dict(content), indent=2) + "\n", encoding="utf-8")
