"""A bundle: the directory with everything needed to generate (SPEC, section 8). It is written by `poet.bundle_writing`.

    config.json  model.safetensors  generation_config.json  vocabulary.json
    video_tokenizer/  audio_tokenizer/  text_tokenizer/  [upsampler/]  [phrases.json]  [README.md]

A bundle without config.json and model.safetensors is a tokenizer bundle: enough to encode clips and to train a model.
This file checks that the parts belong together; it does not know what is inside the tokenizers or the weights, and
imports no torch until a tokenizer is asked for.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from poet.errors import CheckpointError, ConfigError, PoetError
from poet.model.config import PoetConfig
from poet.tasks import DEFAULT_TASK, ClipGeometry, get_task
from poet.vocabulary import Vocabulary

if TYPE_CHECKING:
    from poet.model.superresolution import Upsampler
    from poet_tokenizers.base import AudioTokenizer, TextTokenizer, VideoTokenizer

__all__ = [
    "TRAINED_FILMS_KEY",
    "TRAINED_PARALLEL_KEY",
    "TRAINED_TASKS_KEY",
    "Bundle",
    "GenerationDefaults",
    "ParallelDefaults",
    "check_fingerprint",
    "default_bundle",
]

CONFIG_FILE: Final = "config.json"
WEIGHTS_FILE: Final = "model.safetensors"
GENERATION_FILE: Final = "generation_config.json"
VOCABULARY_FILE: Final = "vocabulary.json"
MODEL_CARD_FILE: Final = "README.md"
PHRASES_FILE: Final = "phrases.json"
UPSAMPLER_DIRECTORY: Final = "upsampler"
FINGERPRINT_KEY: Final = "poet_fingerprint"
TRAINED_TASKS_KEY: Final = "trained_tasks"
TRAINED_FILMS_KEY: Final = "trained_films"
TRAINED_PARALLEL_KEY: Final = "trained_parallel"
TOKENIZER_KINDS: Final = ("video", "audio", "text")


def default_bundle() -> Path:
    """The bundle that ships inside the package, the default of every command."""
    return Path(__file__).parent / "bundles" / "nano"


def check_fingerprint(found: str, expected: str, what: str, advice: str) -> None:
    """Raise unless two fingerprints are the same.

    Args:
        found: the fingerprint that `what` carries.
        expected: the vocabulary's.
        what: named in the message, e.g. a path.
        advice: what to do about it.

    Raises:
        CheckpointError: they differ; the first 12 hex digits of both are in the message.
    """
    if found != expected:
        raise CheckpointError(
            f"{what} belongs to the vocabulary with the fingerprint {found[:12] or 'none'}, "
            f"but it must be {expected[:12]}. {advice}"
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ParallelDefaults:
    """What parallel decoding does when it is not told otherwise.

    Attributes:
        num_steps: of a clip.
        guidance_scale: in place of the one of autoregressive decoding.
        guidance_start, guidance_stop: shares of the steps between which guidance is in force.

    Raises:
        ConfigError: a value out of its range.
    """

    num_steps: int = 16
    guidance_scale: float = 1.0
    guidance_start: float = 0.0
    guidance_stop: float = 1.0

    def __post_init__(self) -> None:
        if not isinstance(self.num_steps, int) or isinstance(self.num_steps, bool) or self.num_steps < 1:
            raise ConfigError(f"num_steps must be an integer of at least 1, got {self.num_steps!r}.")
        for name in ("guidance_scale", "guidance_start", "guidance_stop"):
            _check_finite(name, getattr(self, name))
        if self.guidance_scale < 0 or not 0 <= self.guidance_start <= self.guidance_stop <= 1:
            raise ConfigError(
                "guidance_scale must not be negative, and 0 <= guidance_start <= guidance_stop <= 1; got "
                f"{self.guidance_scale}, {self.guidance_start}, {self.guidance_stop}."
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerationDefaults:
    """What a command does when it is not told otherwise: the content of generation_config.json.

    Attributes:
        fps: video frames per second.
        num_frames: video frames of a clip, 1 + a multiple of the temporal stride.
        height: pixels; with `width` one of the vocabulary's resolutions.
        width: pixels.
        task: a name in `poet.tasks.TASKS`.
        temperature: 0 takes the likeliest id.
        top_k: only so many of the likeliest ids are drawn from; 0 is all.
        top_p: only the likeliest ids that together have this probability are drawn from; in (0, 1].
        guidance_scale: 1 is off.
        parallel: of parallel decoding.

    Raises:
        ConfigError: a value out of its range.
    """

    fps: float
    num_frames: int
    height: int
    width: int
    task: str = DEFAULT_TASK
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    guidance_scale: float = 1.0
    parallel: ParallelDefaults = dataclasses.field(default_factory=ParallelDefaults)

    def __post_init__(self) -> None:
        get_task(self.task)
        for name in ("num_frames", "height", "width", "top_k"):
            value = getattr(self, name)
            low = 0 if name == "top_k" else 1
            if not isinstance(value, int) or isinstance(value, bool) or value < low:
                raise ConfigError(f"{name} must be an integer of at least {low}, got {value!r}.")
        for name in ("fps", "temperature", "top_p", "guidance_scale"):
            _check_finite(name, getattr(self, name))
        if self.fps <= 0 or self.temperature < 0 or self.guidance_scale < 0 or not 0 < self.top_p <= 1:
            raise ConfigError(
                "fps must be positive, temperature and guidance_scale not negative, top_p in (0, 1]; got "
                f"{self.fps}, {self.temperature}, {self.guidance_scale}, {self.top_p}."
            )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> GenerationDefaults:
        """The defaults that `dataclasses.asdict` wrote.

        Raises:
            ConfigError: a key is missing or unknown, or a value cannot be used.
        """
        # Before parallel decoding had settings of its own, it took the others.
        parallel = values.get("parallel", {"guidance_scale": values.get("guidance_scale", 1.0)})
        if not isinstance(parallel, Mapping):
            raise ConfigError(f"parallel must be an object, got {parallel!r}.")
        known = {field.name for field in dataclasses.fields(cls)}
        of_parallel = {field.name for field in dataclasses.fields(ParallelDefaults)}
        missing = sorted(known - set(values) - {"parallel"})
        unknown = sorted(set(values) - known) + sorted(f"parallel.{name}" for name in set(parallel) - of_parallel)
        if missing or unknown:
            raise ConfigError(f"generation defaults lack the keys {missing} and have the unknown keys {unknown}.")
        return cls(**{**values, "parallel": ParallelDefaults(**parallel)})

    def sampling(self, *, parallel: bool) -> dict[str, float | int]:
        """How ids are drawn.

        Args:
            parallel: for parallel decoding, which has a guidance_scale of its own.

        Returns:
            temperature, top_k, top_p and guidance_scale.
        """
        drawn = {name: getattr(self, name) for name in ("temperature", "top_k", "top_p", "guidance_scale")}
        return drawn | ({"guidance_scale": self.parallel.guidance_scale} if parallel else {})


def _check_finite(name: str, value: object) -> None:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not math.isfinite(value):
        raise ConfigError(f"{name} must be a finite number, got {value!r}.")


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Bundle:
    """An open bundle. Make one with `Bundle.open`.

    Attributes:
        path: its directory.
        vocabulary: the ids' layout, which carries the fingerprint.
        generation_config: the defaults of every command.
        config: the content of config.json, or None in a tokenizer bundle.
    """

    path: Path
    vocabulary: Vocabulary
    generation_config: GenerationDefaults
    config: dict[str, Any] | None

    @classmethod
    def open(cls, path: str | Path, *, require_model: bool = True) -> Bundle:
        """Open a bundle and check that its parts belong together. Loads no weights.

        Args:
            path: the directory.
            require_model: False also takes a tokenizer bundle.

        Raises:
            CheckpointError: a file is missing (the message names all of them) or damaged, or a part belongs to
                another vocabulary.
        """
        path = Path(path)
        if not path.is_dir():
            raise CheckpointError(f"there is no bundle at {path}. Name a directory that holds {VOCABULARY_FILE}.")
        has_model = (path / CONFIG_FILE).is_file() or _weights_of(path) is not None
        missing = [name for name in (VOCABULARY_FILE, GENERATION_FILE) if not (path / name).is_file()]
        missing += [f"{kind}_tokenizer/" for kind in TOKENIZER_KINDS if not (path / f"{kind}_tokenizer").is_dir()]
        if require_model or has_model:
            missing += [CONFIG_FILE] if not (path / CONFIG_FILE).is_file() else []
            missing += [WEIGHTS_FILE] if _weights_of(path) is None else []
        if missing:
            raise CheckpointError(f"the bundle {path} lacks {', '.join(missing)}. Copy it whole, or export it again.")
        vocabulary = Vocabulary.load(path / VOCABULARY_FILE)
        try:
            defaults = GenerationDefaults.from_dict(_read_object(path / GENERATION_FILE))
        except ConfigError as error:
            raise CheckpointError(f"{path / GENERATION_FILE} cannot be used: {error}") from error
        config = _read_object(path / CONFIG_FILE) if has_model else None
        bundle = cls(path=path, vocabulary=vocabulary, generation_config=defaults, config=config)
        bundle._check()
        return bundle

    def _check(self) -> None:
        for kind in TOKENIZER_KINDS:
            self._check_described_tokenizer(kind)
        try:
            self.geometry()
        except PoetError as error:
            raise CheckpointError(
                f"{self.path / GENERATION_FILE} does not fit {VOCABULARY_FILE} beside it: {error}"
            ) from error
        if self.config is None:
            return
        file = self.path / CONFIG_FILE
        check_fingerprint(
            str(self.config.get(FINGERPRINT_KEY, "")),
            self.fingerprint,
            f"the model of {file}",
            f"Put the {VOCABULARY_FILE} and the tokenizers that it was trained with beside it, or export it again.",
        )
        if self.model_config.vocab_size != self.vocabulary.padded_vocab_size:
            raise CheckpointError(
                f"{file} must have the vocab_size {self.vocabulary.padded_vocab_size} of the vocabulary beside it, "
                f"it has {self.model_config.vocab_size}. Export the model again."
            )
        named = self.config.get(TRAINED_TASKS_KEY)
        if named is not None and not (isinstance(named, list) and named and all(isinstance(x, str) for x in named)):
            raise CheckpointError(
                f"{file}: {TRAINED_TASKS_KEY} must be a list of the names of tasks, got {named!r}. Take it out, or "
                "export the model again."
            )

    def _check_described_tokenizer(self, kind: str) -> None:
        """Compare what a tokenizer's config.json says of itself; its weights are compared when they are loaded."""
        directory = self.path / f"{kind}_tokenizer"
        described = _read_object(directory / CONFIG_FILE)
        expected = self.vocabulary.tokenizers[kind]
        for told in (described, described.get("spec")):
            for key in ("kind", "checksum"):
                if isinstance(told, dict) and key in told and told[key] != expected[key]:
                    raise _foreign_tokenizer(directory, key, told[key], expected[key])

    @property
    def name(self) -> str:
        """By which requests ask for it: that of its directory, once links are followed."""
        return self.path.resolve().name

    @property
    def fingerprint(self) -> str:
        """The vocabulary's fingerprint, 64 hex digits."""
        return self.vocabulary.fingerprint

    @property
    def weights(self) -> Path:
        """model.safetensors, or the index of its parts.

        Raises:
            CheckpointError: this is a tokenizer bundle.
        """
        found = _weights_of(self.path)
        if found is None:
            raise CheckpointError(f"the bundle {self.path} holds no model, only tokenizers. Train one first.")
        return found

    @cached_property
    def weights_sha256(self) -> str:
        """A sha256 in hex that tells bundles of one vocabulary apart, by model or by decoder. Read once, when needed.

        It covers the bytes of model.safetensors (of its parts, in the order of their names), then the checksums that
        the video and the audio tokenizer's config.json give of their weights; the fingerprint leaves decoders out.

        Raises:
            CheckpointError: this is a tokenizer bundle, or a file cannot be read.
        """
        files = [self.weights]
        if self.weights.name != WEIGHTS_FILE:
            parts = _read_object(self.weights).get("weight_map")
            if not isinstance(parts, dict) or not parts:
                raise CheckpointError(f"{self.weights} must hold a weight_map. Export the model again.")
            files = [self.path / name for name in sorted({str(part) for part in parts.values()})]
        digest = hashlib.sha256()
        for file in files:
            try:
                with file.open("rb") as opened:
                    while block := opened.read(1 << 20):
                        digest.update(block)
            except OSError as error:
                raise CheckpointError(
                    f"{file} cannot be read: {error.strerror}. Copy the bundle whole, or export it again."
                ) from error
        for kind in ("video", "audio"):
            described = _read_object(self.path / f"{kind}_tokenizer" / CONFIG_FILE).get("weights", "")
            digest.update(str(described).encode())
        return digest.hexdigest()

    @property
    def trained_tasks(self) -> tuple[str, ...] | None:
        """Names of the tasks that the model was trained on; None where the bundle does not say."""
        named = None if self.config is None else self.config.get(TRAINED_TASKS_KEY)
        return None if named is None else tuple(named)

    def check_trained(self, task: str) -> None:
        """Raise if the bundle says that its model was not trained on a task, of which it would write nonsense.

        Raises:
            ConfigError: it was not; the message names the tasks that it was trained on.
        """
        trained = self.trained_tasks
        if trained is not None and task not in trained:
            raise ConfigError(
                f"the task must be one that the model of {self.path} was trained on: {', '.join(trained)}; got "
                f"{task!r}. Choose one of them, or a bundle that was trained on it."
            )

    @property
    def writes_parallel(self) -> bool:
        """Whether the bundle says that its model has learnt to write many ids at once."""
        return self.config is not None and self.config.get(TRAINED_PARALLEL_KEY) is True

    def check_parallel(self) -> None:
        """Raise unless the bundle says that its model has learnt to write many ids at once.

        Raises:
            ConfigError: it does not say so.
        """
        if not self.writes_parallel:
            raise ConfigError(
                f"the model {self.path.name} has not learnt to write many ids at once (its config.json does not say "
                f"{TRAINED_PARALLEL_KEY}). Write one id after another, or choose a bundle that was trained with a "
                "parallel_share."
            )

    @property
    def trained_films(self) -> int | None:
        """Scenes of the longest films that the bundle says its model has learnt; None where it says nothing of them."""
        found = None if self.config is None else self.config.get(TRAINED_FILMS_KEY)
        return found if isinstance(found, int) and not isinstance(found, bool) and found > 0 else None

    def check_films(self) -> None:
        """Raise if the bundle says what its model has learnt, and films are not among it: it would write nonsense.

        Raises:
            ConfigError: they are not.
        """
        if self.trained_tasks is not None and self.trained_films is None:
            raise ConfigError(
                f"the model {self.path.name} has not learnt scenes behind earlier scenes (its config.json does not say "
                f"{TRAINED_FILMS_KEY}). Write single clips, let scenes see none before them (--memory 0), or choose a "
                "bundle that was trained with films."
            )

    @cached_property
    def model_config(self) -> PoetConfig:
        """The transformer's shape.

        Raises:
            CheckpointError: this is a tokenizer bundle, or its config.json is not that of a Poet model.
        """
        if self.config is None:
            raise CheckpointError(f"the bundle {self.path} holds no model, only tokenizers. Train one first.")
        try:
            return PoetConfig.from_huggingface_dict(self.config)
        except ConfigError as error:
            raise CheckpointError(f"{self.path / CONFIG_FILE} cannot be used: {error}") from error

    @property
    def phrases_file(self) -> Path | None:
        """The file of phrases that chats edit prompts with, if the bundle has one. The fingerprint leaves it out."""
        file = self.path / PHRASES_FILE
        return file if file.is_file() else None

    @property
    def upsampler(self) -> Path | None:
        """The directory of the super-resolution model, if the bundle has one."""
        directory = self.path / UPSAMPLER_DIRECTORY
        return directory if directory.is_dir() else None

    def load_upsampler(self, device: str = "cpu", dtype: str = "float32") -> Upsampler:
        """Load the super-resolution model.

        Args:
            device: where its weights shall lie.
            dtype: what they shall be: "float32" or "bfloat16".

        Raises:
            ConfigError: the bundle has none.
            CheckpointError: it is damaged, or belongs to another video tokenizer.
        """
        directory = self.check_upsampler()
        import torch  # which most users of a bundle need not load

        from poet.model.weights import load_upsampler

        checksum = str(self.vocabulary.tokenizers["video"]["checksum"])
        return load_upsampler(directory, checksum, device=device, dtype=getattr(torch, dtype))

    def check_upsampler(self) -> Path:
        """The directory of the super-resolution model.

        Raises:
            ConfigError: the bundle has none.
        """
        if self.upsampler is None:
            raise ConfigError(
                f"the bundle {self.path} has no upsampler: it cannot write larger pictures. Train one (train: "
                f"upsampler) and put its export there as {UPSAMPLER_DIRECTORY}/, or leave upsampling out."
            )
        return self.upsampler

    @cached_property
    def upsampler_scale(self) -> int:
        """How many times as high and wide the upsampler makes a picture.

        Raises:
            ConfigError: the bundle has none.
            CheckpointError: its config.json is damaged.
        """
        file = self.check_upsampler() / CONFIG_FILE
        try:
            return int(json.loads(file.read_text(encoding="utf-8"))["upsampler"]["scale"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{file} does not describe an upsampler. Copy the bundle whole.") from error

    @cached_property
    def upsampler_sha256(self) -> str:
        """sha256 in hex of the upsampler's weights; "" without one."""
        if self.upsampler is None:
            return ""
        file = self.upsampler / WEIGHTS_FILE
        try:
            return hashlib.sha256(file.read_bytes()).hexdigest()
        except OSError as error:
            raise CheckpointError(f"{file} cannot be read: {error.strerror}. Copy the bundle whole.") from error

    def geometry(
        self,
        *,
        num_frames: int | None = None,
        fps: float | None = None,
        height: int | None = None,
        width: int | None = None,
    ) -> ClipGeometry:
        """The geometry of a clip; what is not given is the bundle's default.

        Raises:
            ShapeError: frames that the temporal stride does not divide.
            VocabularyError: a resolution that the vocabulary does not have.
        """
        defaults = self.generation_config
        return ClipGeometry.from_vocabulary(
            self.vocabulary,
            num_frames=defaults.num_frames if num_frames is None else num_frames,
            fps=defaults.fps if fps is None else fps,
            height=defaults.height if height is None else height,
            width=defaults.width if width is None else width,
        )

    @cached_property
    def video_tokenizer(self) -> VideoTokenizer:
        """The video tokenizer on the CPU, loaded once. Raises CheckpointError if it is not the vocabulary's."""
        return self.load_video_tokenizer()

    @cached_property
    def audio_tokenizer(self) -> AudioTokenizer:
        """The audio tokenizer on the CPU, loaded once. Raises CheckpointError if it is not the vocabulary's."""
        return self.load_audio_tokenizer()

    @cached_property
    def text_tokenizer(self) -> TextTokenizer:
        """The text tokenizer, loaded once. Raises CheckpointError if it is not the vocabulary's."""
        from poet_tokenizers.loading import load_text_tokenizer

        tokenizer = load_text_tokenizer(self.path / "text_tokenizer")
        self._check_loaded_tokenizer("text", dataclasses.asdict(tokenizer.spec))
        return tokenizer

    def load_video_tokenizer(self, device: str = "cpu") -> VideoTokenizer:
        """Load the video tokenizer onto a device.

        Raises:
            CheckpointError: its files are damaged, or its spec is not the vocabulary's.
        """
        from poet_tokenizers.loading import load_video_tokenizer

        tokenizer = load_video_tokenizer(self.path / "video_tokenizer", device=device)
        self._check_loaded_tokenizer("video", dataclasses.asdict(tokenizer.spec))
        return tokenizer

    def load_audio_tokenizer(self, device: str = "cpu") -> AudioTokenizer:
        """Load the audio tokenizer onto a device.

        Raises:
            CheckpointError: its files are damaged, or its spec is not the vocabulary's.
        """
        from poet_tokenizers.loading import load_audio_tokenizer

        tokenizer = load_audio_tokenizer(self.path / "audio_tokenizer", device=device)
        self._check_loaded_tokenizer("audio", dataclasses.asdict(tokenizer.spec))
        return tokenizer

    def _check_loaded_tokenizer(self, kind: str, spec: Mapping[str, Any]) -> None:
        for key, expected in self.vocabulary.tokenizers[kind].items():
            if spec[key] != expected:
                raise _foreign_tokenizer(self.path / f"{kind}_tokenizer", key, spec[key], expected)


def _weights_of(path: Path) -> Path | None:
    """The weights' file, or the index that Hugging Face writes beside weights in several files."""
    candidates = (path / WEIGHTS_FILE, path / f"{WEIGHTS_FILE}.index.json")
    return next((file for file in candidates if file.is_file()), None)


def _read_object(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{file} is missing. Copy the bundle whole, or export it again.") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read as JSON: {error}. Copy it again.") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file} must hold a JSON object, it holds a {type(content).__name__}.")
    return content


def _foreign_tokenizer(directory: Path, key: str, found: object, expected: object) -> CheckpointError:
    found_text, expected_text = (f"{value}"[:12] or "none" for value in (found, expected))
    return CheckpointError(
        f"{directory} is not the tokenizer that the vocabulary beside it was made with: its {key} is {found_text}, "
        f"but it must be {expected_text}. Put the right tokenizer back, or make a new bundle and train on its codes."
    )
