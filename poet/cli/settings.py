"""What `poet generate` was asked for, and what a clip's metadata says was asked for when it was made."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from poet.cli.adapters import read_one
from poet.errors import ConfigError, MediaError

if TYPE_CHECKING:
    from poet.bundle import Bundle

__all__ = ["PARALLEL", "GenerateSettings", "settings_like"]

GIVEN = ("image", "video", "audio", "until")
PARALLEL = ("steps", "schedule", "order", "choice_temperature", "guidance_start", "guidance_stop")
FILM: Final = "film"
"""Stands in the metadata of films where clips have their task."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerateSettings:
    """What was asked for on the command line; None where nothing was said.

    The fields are the options of `poet generate`; `scenes` is a film's prompts, from whichever option they came.
    """

    prompt: str | None
    negative_prompt: str | None
    task: str | None
    image: Path | None
    video: Path | None
    audio: Path | None
    seed: int | None
    temperature: float | None
    top_k: int | None
    top_p: float | None
    guidance_scale: float | None
    repetition_penalty: float | None
    repetition_window: int | None
    decoding: str | None
    steps: int | None
    schedule: str | None
    order: str | None
    choice_temperature: float | None
    guidance_start: float | None
    guidance_stop: float | None
    upsample: bool | None
    upsample_steps: int | None
    upsample_temperature: float | None
    lora: Path | None
    engine: str | None
    scenes: tuple[str | None, ...] | None = None
    memory: int | None = None
    loop: bool | None = None
    until: Path | None = None

    def sources(self) -> dict[str, str]:
        """The files that were given, as they are known again anywhere: by name and content, not by path."""
        from poet.media import hash_file

        files = {kind: getattr(self, kind) for kind in GIVEN if getattr(self, kind) is not None}
        names = {f"given_{kind}": path.name for kind, path in files.items()}
        return names | {f"given_{kind}_sha256": hash_file(path) for kind, path in files.items()}


def settings_like(path: Path, asked: GenerateSettings, bundle: Bundle) -> tuple[GenerateSettings, str | None]:
    """The settings that a clip's metadata holds; whatever the command line says goes before them.

    Files that the clip was made from must be those files. An image may take the place of a video and the other way.

    Args:
        path: of the clip.
        asked: what the command line says.
        bundle: to make it with.

    Returns:
        The settings, and the hash that the ids must have again, or None where the command line changes something.

    Raises:
        ConfigError: the clip does not say what made it, or it was made by another bundle or from other files.
    """
    from poet.media import probe

    facts = probe(path).metadata
    if "task" not in facts or "seed" not in facts:
        raise ConfigError(f"{path} does not say what made it: Poet wrote no metadata into it, or it was removed since.")
    if asked.upsample is not False:
        _check_upsampler(path, facts, bundle)
    _check_bundle(path, facts, bundle)
    said = {name: value for name, value in vars(asked).items() if value is not None}
    is_film = facts["task"] == FILM
    if is_film and asked.prompt is not None and asked.scenes is None:
        raise ConfigError(
            f"{path} is a film, whose prompts are those of its scenes; got {asked.prompt!r} beside it. Give prompts by "
            "--scene, --scenes or --num-scenes, or leave it out."
        )
    # Either one takes the place of what the clip went on from.
    replaced = {"image", "video"} - said.keys() if "image" in said or "video" in said else set()
    try:
        made = GenerateSettings(
            prompt=facts.get("prompt"),
            negative_prompt=facts.get("negative_prompt"),
            task=None if is_film or asked.scenes is not None else facts["task"],
            image=None,
            video=None,
            audio=None,
            seed=int(facts["seed"]),
            temperature=float(facts["temperature"]),
            top_k=int(facts["top_k"]),
            top_p=float(facts["top_p"]),
            guidance_scale=float(facts.get("guidance_scale", 1)),  # not said before there was guidance
            repetition_penalty=None if "repetition_penalty" not in facts else float(facts["repetition_penalty"]),
            repetition_window=None if "repetition_window" not in facts else int(facts["repetition_window"]),
            decoding=facts.get("decoding"),  # said of parallel decoding alone
            steps=None if "steps" not in facts else int(facts["steps"]),
            schedule=facts.get("schedule"),
            order=facts.get("order"),
            choice_temperature=None if "choice_temperature" not in facts else float(facts["choice_temperature"]),
            guidance_start=float(facts.get("guidance_start", 0)) if "decoding" in facts else None,
            guidance_stop=float(facts.get("guidance_stop", 1)) if "decoding" in facts else None,
            upsample=True if "upsample_steps" in facts else None,
            upsample_steps=None if "upsample_steps" not in facts else int(facts["upsample_steps"]),
            upsample_temperature=None if "upsample_steps" not in facts else float(facts["upsample_temperature"]),
            lora=_adapter_of(path, facts, asked.lora, bundle),
            engine=facts["engine"],
            scenes=_scenes_of(facts["scenes"]) if is_film else None,
            memory=None if "memory" not in facts else int(facts["memory"]),
            loop=True if "loop" in facts else None,
        )
        given = {
            kind: (facts[f"given_{kind}"], facts[f"given_{kind}_sha256"])
            for kind in GIVEN
            if f"given_{kind}" in facts and kind not in replaced
        }
    except (KeyError, ValueError) as error:
        raise ConfigError(
            f"{path} does not say all that made it ({error}): its metadata was changed since, or is of an older Poet."
        ) from error
    found: dict[str, Any] = {kind: _find_given(path, kind, *known, said.get(kind)) for kind, known in given.items()}
    made = dataclasses.replace(made, **found)
    if said.get("upsample") is False:
        made = dataclasses.replace(made, upsample_steps=None, upsample_temperature=None)
    if said.get("decoding", made.decoding) != "parallel":
        made = dataclasses.replace(made, **dict.fromkeys(PARALLEL))
    settings = dataclasses.replace(made, **said)
    if settings.guidance_scale == 1 and "negative_prompt" not in said:
        settings = dataclasses.replace(settings, negative_prompt=None)
    return settings, facts.get("ids_sha256") if settings == made else None


def _scenes_of(text: str) -> tuple[str | None, ...]:
    """The prompts of a film's scenes.

    Raises:
        ValueError: it is no list of them.
    """
    scenes = json.loads(text)
    if not isinstance(scenes, list) or not all(scene is None or isinstance(scene, str) for scene in scenes):
        raise ValueError(f"scenes must be a list of prompts, they are {text[:80]!r}")
    return tuple(scenes)


def _find_given(clip: Path, kind: str, name: str, expected: str, named: Path | None) -> Path:
    """The file that a clip was made from: the one that is named now, or one of its old name beside the clip or here."""
    from poet.media import hash_file

    if named is not None:
        if (sha256 := hash_file(named)) != expected:
            raise ConfigError(
                f"--{kind} must be the file that {clip} was made from, {name!r} with the sha256 {expected[:12]!r}; "
                f"{named} has {sha256[:12]!r}. Name that file, or leave --like out."
            )
        return named
    others = []
    # A name that leads elsewhere was not written by Poet.
    for place in dict.fromkeys((clip.parent / name, Path(name))) if Path(name).name == name else ():
        try:
            if hash_file(place) == expected:
                return place
        except MediaError:
            continue
        others.append(f"{place} has another content")
    raise ConfigError(
        f"{clip} was made from the {kind} {name!r} with the sha256 {expected[:12]!r}, which is neither beside it nor "
        f"in the working directory{''.join(f'; {other}' for other in others)}. Give it with --{kind}."
    )


def _adapter_of(path: Path, facts: Mapping[str, str], named: Path | None, bundle: Bundle) -> Path | None:
    """The adapter that a clip was made with, which must be named: a clip does not say where it lies."""
    wanted = facts.get("adapter_sha256")
    if wanted is None:
        return None
    found = "none" if named is None else read_one(named, bundle)[0].sha256
    if found != wanted:
        raise ConfigError(
            f"{path} was made with the adapter {facts.get('adapter')!r}, {wanted[:12]} (sha256), got {found[:12]}. "
            "Name it with --lora."
        )
    return named


def _check_bundle(path: Path, facts: Mapping[str, str], bundle: Bundle) -> None:
    """Refuse a bundle of another vocabulary or with other weights: neither can write the clip again."""
    made_with = f"{path} was made with the bundle {facts.get('bundle', 'unknown')!r}"
    if facts.get("fingerprint") != bundle.fingerprint:
        raise ConfigError(
            f"{made_with} of the fingerprint {facts.get('fingerprint', '')[:12]!r}, {bundle.path} has the fingerprint "
            f"{bundle.fingerprint[:12]!r}. Name that bundle with --model."
        )
    if facts.get("weights_sha256", bundle.weights_sha256) != bundle.weights_sha256:
        raise ConfigError(
            f"{made_with} of the weights {facts['weights_sha256'][:12]!r}, {bundle.path} has the weights "
            f"{bundle.weights_sha256[:12]!r} (sha256) on the same tokenizers. Name that bundle with --model."
        )


def _check_upsampler(path: Path, facts: Mapping[str, str], bundle: Bundle) -> None:
    """Refuse another upsampler, or settings of one that the command line does not have."""
    if facts.get("upsampler_sha256", bundle.upsampler_sha256) != bundle.upsampler_sha256:
        raise ConfigError(
            f"{path} was made with the upsampler {facts['upsampler_sha256'][:12]!r}, {bundle.path} has "
            f"{bundle.upsampler_sha256[:12] or 'none'!r} (sha256). Name that bundle with --model, or say --no-upsample."
        )
    known = {"upsampler_sha256", "upsample_steps", "upsample_temperature"}
    if others := sorted(name for name in facts if name.startswith("upsample") and name not in known):
        raise ConfigError(
            f"{path} was upsampled with {', '.join(others)}, for which there are no options. Make it again from "
            "Python, or say --no-upsample."
        )
