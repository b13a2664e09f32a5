"""The options of films: prompts from the command line or a file, and the clips that a film begins and ends with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from poet.cli.output import note
from poet.errors import ConfigError

if TYPE_CHECKING:
    from poet.bundle import Bundle
    from poet.cli.settings import GenerateSettings
    from poet.generation.canvas import ParallelDecoding
    from poet.generation.film import FilmRequest
    from poet.media import Clip

__all__ = ["check_film_options", "film_requests", "read_scenes"]

MAX_STORY_BYTES: Final = 10_000_000
NO_PROMPT: Final = "-"


def read_scenes(
    prompt: str | None, scene: Sequence[str] | None, scenes: Path | None, num_scenes: int | None
) -> tuple[str | None, ...] | None:
    """The prompts of a film, from whichever option they come; None where no film is asked for.

    Args:
        prompt: the argument, which is every scene's with `num_scenes`.
        scene: of --scene.
        scenes: of --scenes, a file with a prompt a line; "-" is a scene without one, "#" begins a remark.
        num_scenes: of --num-scenes.

    Raises:
        ConfigError: several of them, a prompt beside prompts of scenes, or a file that cannot be read.
    """
    said = [name for name, value in (("--scene", scene), ("--scenes", scenes), ("--num-scenes", num_scenes)) if value]
    if not said:
        return None
    if len(said) > 1:
        raise ConfigError(f"a film's scenes must be given once, got {' and '.join(said)}. Choose one of them.")
    if num_scenes is not None:
        return (prompt,) * num_scenes
    if prompt is not None:
        raise ConfigError(f"a film's prompts are those of {said[0]}, got {prompt!r} beside them. Make it a scene.")
    if scene:
        return tuple(None if one.strip() == NO_PROMPT else one for one in scene)
    assert scenes is not None
    return _read_story(scenes)


def _read_story(path: Path) -> tuple[str | None, ...]:
    try:
        if path.stat().st_size > MAX_STORY_BYTES:
            raise ConfigError(f"{path} must have at most {MAX_STORY_BYTES:,} bytes, it has {path.stat().st_size:,}.")
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise ConfigError(
            f"{path} cannot be read ({reason}). --scenes takes a text file with a prompt a line."
        ) from error
    lines = [line.strip() for line in text.splitlines()]
    prompts = [line for line in lines if line and not line.startswith("#")]
    if not prompts:
        raise ConfigError(f"{path} must have a prompt a line, it has none.")
    return tuple(None if line == NO_PROMPT else line for line in prompts)


def check_film_options(settings: GenerateSettings) -> None:
    """Raise unless the options go with what is asked for, a film or a clip.

    Raises:
        ConfigError: an option of films without scenes, or one that films do not take.
    """
    if settings.scenes is None:
        for name in ("memory", "loop", "until"):
            if getattr(settings, name) is not None:
                raise ConfigError(
                    f"--{name} is an option of films: give their prompts with --scene, --scenes or --num-scenes."
                )
        return
    for name in ("task", "audio", "upsample"):
        if getattr(settings, name):
            raise ConfigError(
                f"--{name} is an option of single clips: leave it out, or --scene, --scenes and --num-scenes."
            )
    if settings.image is not None and settings.video is not None:
        raise ConfigError(
            f"a film must go on from an image or a video, got {settings.image} and {settings.video}. Leave one out."
        )


def film_requests(
    settings: GenerateSettings,
    bundle: Bundle,
    count: int,
    *,
    sampling: Mapping[str, Any],
    first_seed: int,
    decoding: ParallelDecoding | None,
    adapter: str | None,
) -> list[FilmRequest]:
    """The films that are asked for.

    Args:
        settings: with scenes.
        bundle: gives sizes and rates.
        count: films; each has seeds of its own.
        sampling: how ids are drawn.
        first_seed: of the first scene of the first film.
        decoding: how to write many ids at once.
        adapter: name of a LoRA adapter.

    Raises:
        MediaError: a clip to begin or end with cannot be read.
        ConfigError: a film that cannot be.
    """
    from poet.generation.film import FilmRequest, check_film
    from poet.generation.sampling import SamplingConfig

    assert settings.scenes is not None
    start = _read(settings.image or settings.video, bundle, still=settings.image is not None)
    end = _read(settings.until, bundle, still=False)
    films = [
        FilmRequest(
            scenes=settings.scenes,
            negative_text=settings.negative_prompt,
            sampling=SamplingConfig(**sampling, seed=first_seed + number * len(settings.scenes)),
            decoding=decoding,
            adapter=adapter,
            memory=settings.memory,
            start=start,
            end=end,
            loop=bool(settings.loop),
        )
        for number in range(count)
    ]
    check_film(bundle, films[0])
    learnt, size = bundle.trained_films, bundle.generation_config
    if learnt is not None and len(settings.scenes) > learnt:
        seconds = len(settings.scenes) * (size.num_frames - 1) / size.fps
        note(
            f"{len(settings.scenes)} scenes are {seconds:.0f} s; {bundle.name} has learnt films of up to {learnt}, and "
            "further back no scene sees. --stream keeps what is written, should it be stopped"
        )
    return films


def _read(path: Path | None, bundle: Bundle, *, still: bool) -> Clip | None:
    from poet.media import Clip, read_clip, read_image

    if path is None:
        return None
    size, rate = bundle.generation_config, bundle.vocabulary.sample_rate
    if still:
        picture = read_image(path, height=size.height, width=size.width)
        return Clip(frames=picture[None], fps=size.fps, samples=None, sample_rate=rate)
    return read_clip(path, fps=size.fps, height=size.height, width=size.width, sample_rate=rate, want_video=True)
