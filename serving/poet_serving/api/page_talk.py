"""A conversation of the chat page: what was said in it, what that asks of the service, and how far it has got.

What a turn means is found out by the functions that `/v1/chat/completions` uses. This module knows conversations and
the service; it does not know gradio, HTTP or HTML.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from poet.errors import MediaError, PoetError
from poet.media import Clip
from poet_serving.api.orders import REFERENCE, Order, unpack_clip
from poet_serving.api.service import Service, store_error
from poet_serving.conversation import ChatBody, Intent, understand, video_body
from poet_serving.jobs import JobError, JobStatus
from poet_serving.phrases import edit_prompt, is_whole_prompt
from poet_serving.schema import MAX_PROMPT, RequestError

__all__ = [
    "KINDS",
    "Asked",
    "Sample",
    "Talk",
    "Turn",
    "answer",
    "edits",
    "examples",
    "follow",
    "given_clip",
    "parse_talk",
    "refuse",
    "stop",
]

_log = logging.getLogger(__name__)

MAX_TURNS: Final = 50
# Shown where the bundle's phrases understand them.
_EXAMPLES: Final = (
    "a large red star rises on a navy background with a low flute sound",
    "a small yellow circle bounces on a black background with a high bell sound",
    "a green triangle moves right on a maroon background with a low organ sound",
    "a big cyan square falls on a grey background with a deep bell sound",
)
_EDITS: Final = ("now make it bounce", "make the background maroon", "make it green and small")

_Short = Annotated[str, Field(max_length=200)]
_Long = Annotated[str, Field(max_length=2 * MAX_PROMPT)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kind:
    """Something to ask for.

    Attributes:
        label: for a person.
        modalities: of a chat that asks for it.
        task: that writes it from a prompt, or from a clip where it is a description.
    """

    label: str
    modalities: tuple[str, ...]
    task: str


KINDS: Final = {
    "clip": Kind(label="Video with sound", modalities=("video", "audio"), task="text_to_video_audio"),
    "silent": Kind(label="Video", modalities=("video",), task="text_to_video"),
    "sound": Kind(label="Sound", modalities=("audio",), task="text_to_audio"),
    "description": Kind(label="Description", modalities=("text",), task="captioning"),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Asked:
    """The settings beside a message; None takes the bundle's own.

    Attributes:
        kind: a name in `KINDS`.
        samples: answers.
        guidance_scale, temperature, seed, decoding, size: as in a chat's body; a seed may be a text, also an empty one.
        steps: of parallel decoding; passed over by the other.
        model: the bundle, or an adapter of it.
    """

    kind: str = "clip"
    samples: int = 1
    guidance_scale: float | None = None
    temperature: float | None = None
    seed: str | int | None = None
    decoding: str | None = None
    steps: int | None = None
    size: str | None = None
    model: str | None = None

    def to_fields(self) -> dict[str, Any]:
        """Fields of a chat's body.

        Raises:
            RequestError: there is no such kind, or the seed is no number.
        """
        if self.kind not in KINDS:
            raise RequestError(f"the answer must be one of {', '.join(KINDS)}.", code="invalid_value")
        fields = dataclasses.asdict(self)
        kind, samples = fields.pop("kind"), fields.pop("samples")
        if self.decoding != "parallel":
            fields["steps"] = None
        if isinstance(self.seed, str):
            said = self.seed.strip()
            if said and not (said.isascii() and said.isdigit() and len(said) < 20):
                raise RequestError("the seed must be a whole number, or empty.", code="invalid_value", param="seed")
            fields["seed"] = int(said) if said else None
        return fields | {"modalities": list(KINDS[kind].modalities), "n": samples}


class _Kept(BaseModel):
    """What a browser keeps and sends back; believed as little as any other request."""

    model_config = ConfigDict(extra="forbid")


class Sample(_Kept):
    """One of the answers of a turn.

    Attributes:
        id: of its job.
        status: where it stands; "gone": stopped, or no longer kept.
        place: in the queue while it waits, at most; 1 is next.
        percent: while it is written.
        seed, size, seconds: of a finished clip; a sound has no size.
        text: what was written, of a description.
        error: why it failed, as a sentence.
    """

    id: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")]
    status: Literal["queued", "in_progress", "completed", "failed", "gone"] = "queued"
    place: Annotated[int, Field(ge=1)] | None = None
    percent: Annotated[int, Field(ge=0, le=100)] = 0
    seed: _Short | None = None
    size: _Short | None = None
    seconds: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    text: _Long | None = None
    error: _Long | None = None

    @property
    def is_open(self) -> bool:
        """Whether it is still being waited for."""
        return self.status in ("queued", "in_progress")


class Turn(_Kept):
    """What was said, and what was answered.

    Attributes:
        said: by the person.
        file: name of what was sent along.
        kind: what was asked for, a name in `KINDS`.
        prompt: that is carried out; None of a description, and of a file alone.
        samples: side by side.
        error: why nothing is carried out, as a sentence.
    """

    said: _Long
    file: _Short | None = None
    kind: _Short = "clip"
    prompt: _Long | None = None
    samples: Annotated[list[Sample], Field(max_length=8)] = []
    error: _Long | None = None

    @property
    def is_open(self) -> bool:
        """Whether something of it is still being waited for."""
        return any(sample.is_open for sample in self.samples)

    @property
    def answered(self) -> Sample | None:
        """The sample that the next turn speaks of: the first that was finished."""
        return next((sample for sample in self.samples if sample.status == "completed"), None)


class Talk(_Kept):
    """A conversation.

    Attributes:
        owner: whose; a conversation of another is not shown.
        turns: oldest first.
    """

    owner: _Short = ""
    turns: Annotated[list[Turn], Field(max_length=MAX_TURNS)] = []

    @property
    def is_open(self) -> bool:
        """Whether something is still being waited for."""
        return any(turn.is_open for turn in self.turns)


def parse_talk(value: Any, owner: str) -> Talk:
    """What a browser kept; an empty conversation where that is another owner's, or none."""
    try:
        talk = Talk.model_validate(value)
    except ValidationError:  # of an earlier version of the page, or made up
        return Talk(owner=owner)
    return talk if talk.owner == owner else Talk(owner=owner)


def examples(service: Service) -> tuple[str, ...]:
    """Prompts to click on: those that the bundle's phrases understand."""
    return tuple(prompt for prompt in _EXAMPLES if is_whole_prompt(prompt, service.phrases))


def edits(service: Service, talk: Talk) -> tuple[str, ...]:
    """What may be said about the last clip, likewise, and would change it."""
    prompt = next((turn.prompt for turn in reversed(talk.turns) if turn.answered is not None), None)
    if prompt is None or service.phrases is None:
        return ()
    found = ((said, edit_prompt(prompt, said, service.phrases)) for said in _EDITS)
    return tuple(said for said, edited in found if edited != prompt and not edited.endswith(said))


async def answer(service: Service, talk: Talk, asked: Asked, said: str, file: str | None, upload: bytes | None) -> bool:
    """Take a message: find out what is meant and accept its jobs. The conversation becomes one turn longer.

    Args:
        service: that carries it out.
        talk: until now; nothing in it is being waited for.
        asked: the settings.
        said: the message.
        file: name of what was sent along, or None.
        upload: its content, not opened.

    Returns:
        Whether it was taken; if not, the turn says why.
    """
    turn = _begin(talk, said, file, asked.kind)
    try:
        if len(said) > MAX_PROMPT:
            raise RequestError(f"a message must have at most {MAX_PROMPT} characters.", code="invalid_value")
        await _accept(service, talk, asked, turn, upload)
    except PoetError as error:
        turn.error = _sentence(str(store_error(error) if isinstance(error, MediaError) else error))
    except Exception as error:  # noqa: BLE001 - whoever asked must be told, whatever it is
        _log.exception("the page could not take a message", exc_info=error)
        turn.error = "The server failed; its log says why."
    return turn.error is None


def refuse(talk: Talk, said: str, file: str | None, error: str) -> None:
    """Answer a message with a sentence that says what is wrong with it."""
    _begin(talk, said, file, "clip").error = error


def _begin(talk: Talk, said: str, file: str | None, kind: str) -> Turn:
    turn = Turn(said=said[:MAX_PROMPT], file=None if file is None else file[:200], kind=kind)
    talk.turns = [*talk.turns, turn][-MAX_TURNS:]
    return turn


async def _accept(service: Service, talk: Talk, asked: Asked, turn: Turn, upload: bytes | None) -> None:
    messages = [message for earlier in talk.turns[:-1] for message in _messages(earlier)]
    messages.append(_message(turn.said, None if upload is None else "upload"))
    body = ChatBody.parse(asked.to_fields() | {"messages": messages})
    intent = await asyncio.to_thread(understand, body, service.phrases)
    turn.prompt = intent.prompt
    clip: Clip | None = None
    reference = None if intent.reference is None else intent.reference.file_id
    task = intent.task
    if reference is not None and upload is None:
        task, clip = await _given_again(service, talk.owner, reference, intent)
    elif reference is None and intent.kind == "caption" and intent.previous_video is not None:
        clip = await service.clip_to_describe(talk.owner, intent.previous_video)
    bare = dataclasses.replace(intent, reference=None, task=task)
    try:
        for choice in range(body.n):
            if choice > 0 and upload is not None:  # it was read for the first one
                task, clip = await given_clip(service, talk.owner, turn.samples[0].id)
                upload, bare = None, dataclasses.replace(bare, task=task)
            video = await service.submit(talk.owner, video_body(body, bare, choice), reference=upload, clip=clip)
            place = max(1, await _waiting(service))
            turn.samples.append(Sample(id=video.id, place=place))
    except BaseException:  # all or nothing
        await _delete(service, talk.owner, turn)
        turn.samples = []
        raise


def _messages(turn: Turn) -> list[dict[str, Any]]:
    """A turn as a chat sends it back. What was not carried out was not said."""
    done = turn.answered
    if done is None:
        return []
    answered: dict[str, Any] = {"role": "assistant", "content": done.text or turn.prompt or ""}
    if done.text is None:
        answered["video"] = {"id": done.id}
    # What was uploaded stands in the job that was made from it.
    return [_message(turn.said, None if turn.file is None else done.id), answered]


def _message(said: str, file_id: str | None) -> dict[str, Any]:
    parts: list[dict[str, Any]] = [{"type": "text", "text": said}] if said else []
    if file_id is not None:
        parts.append({"type": "file", "file": {"file_id": file_id}})
    return {"role": "user", "content": parts}


async def _given_again(service: Service, owner: str, id: str, intent: Intent) -> tuple[str, Clip]:
    """What an earlier turn was made from, for another of the same task.

    Raises:
        RequestError: it is gone, or was read for something else.
    """
    read_for, clip = await given_clip(service, owner, id)
    if intent.task not in (None, read_for) or (intent.kind == "clip" and read_for == "captioning"):
        raise RequestError("the file was read for another kind of answer. Attach it again.", code="invalid_value")
    return read_for, clip


async def given_clip(service: Service, owner: str, id: str) -> tuple[str, Clip]:
    """The task of a job, and what was given for it, which was decoded when it was accepted.

    Raises:
        RequestError: there is no such job, or nothing was given for it.
    """

    def read() -> tuple[str, Clip]:
        job = service.store.get(id, owner)
        path = service.store.file(id, REFERENCE)
        return Order.from_dict(job.body).task, unpack_clip(path.read_bytes())

    try:
        return await asyncio.to_thread(read)
    except (JobError, OSError) as error:
        raise RequestError(
            "the file of the earlier message is no longer here. Attach it again.", code="not_found", status=404
        ) from error


async def follow(service: Service, talk: Talk) -> bool:
    """Find out how far the samples have got that are being waited for.

    Returns:
        Whether anything has changed.
    """
    before = talk.model_dump()
    looked = [(sample, turn.kind) for turn in talk.turns for sample in turn.samples if sample.is_open]
    for sample, kind in looked:
        await _look(service, talk.owner, sample, kind)
    queued = [sample for sample, _ in looked if sample.status == "queued"]
    waiting = await _waiting(service) if queued else 0
    for behind, sample in enumerate(reversed(queued)):
        # Nobody gets in before it, so it never falls back; how many others came after it is not known.
        sample.place = max(1, min(sample.place or waiting, waiting - behind))
    return talk.model_dump() != before


async def _look(service: Service, owner: str, sample: Sample, kind: str) -> None:
    try:
        video = await service.get(owner, sample.id)
    except RequestError as error:
        if error.status != 404:
            return  # the store is busy; the next look may find out
        sample.status = "gone"
        return
    sample.status, sample.percent = video.status, video.progress
    if video.status == "failed":
        sample.error = _sentence("it could not be written." if video.error is None else video.error.message)
    if video.status == "completed":
        sample.text = video.text
        sample.size, sample.seconds = (None if kind == "sound" else video.size), float(video.seconds)
        sample.seed = (video.metadata or {}).get("seed")


async def stop(service: Service, talk: Talk) -> None:
    """Stop what is being waited for."""
    for turn in talk.turns:
        await _delete(service, talk.owner, turn)
    await follow(service, talk)


async def _delete(service: Service, owner: str, turn: Turn) -> None:
    for sample in turn.samples:
        if sample.is_open:
            try:
                await asyncio.shield(service.delete(owner, sample.id))
            except RequestError:  # it is gone already
                continue


async def _waiting(service: Service) -> int:
    """Jobs of all owners that wait."""
    count: int = await service.with_store(service.store.count, JobStatus.QUEUED)
    return count


def _sentence(message: str) -> str:
    """An error as a page shows it; where it begins with a field's name, without that."""
    said = message.removeprefix("input_reference: ").removeprefix("the file ")
    said = f"The file {said}" if said != message else said
    return said[:1].upper() + said[1:]
