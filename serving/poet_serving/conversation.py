"""What a chat means: what its last turn asks for, and the form of its answer.

It knows what was said; it does not know HTTP, jobs, files or models. `poet_serving.phrases` edits prompts in words.
"""

from __future__ import annotations

import base64
import dataclasses
import time
import uuid
from collections.abc import Mapping, Sequence
from typing import Any, Final, Literal

from poet_serving.chat_schema import (
    AUDIO_ID,
    VIDEO_ID,
    AssistantMessage,
    AudioPart,
    ChatBody,
    FilePart,
    ImagePart,
    SystemMessage,
    TextPart,
    UserMessage,
    VideoPart,
)
from poet_serving.phrases import Phrases, edit_prompt, is_whole_prompt
from poet_serving.schema import MAX_PROMPT, InputReference, RequestError, VideoBody

__all__ = ["Answer", "ChatBody", "Intent", "chat_answer", "understand", "video_body"]

Kind = Literal["image", "video", "audio"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Intent:
    """What the last turn asks for.

    Attributes:
        kind: a clip, or a caption: a description of a clip or picture.
        prompt: of the clip; None where only media were sent. A caption has none: the model reads no questions.
        task: a name in `poet.tasks.TASKS`; None where a file must be looked at first to know it.
        reference: the picture, clip or sound that is meant, of this turn or of an earlier one.
        given: what `reference` is; None where there is none, or an uploaded file must be looked at first to know it.
        previous_video: id of the clip that was answered last. It is what a caption without a reference describes.
    """

    kind: Literal["clip", "caption"]
    prompt: str | None = None
    task: str | None = None
    reference: InputReference | None = None
    given: Kind | None = None
    previous_video: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Answer:
    """One finished answer.

    Attributes:
        text: the prompt that was carried out, or the caption.
        completion_tokens: ids written.
        clip_id: "video_..."; None of a caption.
        video: more about the clip, for `message.video`; None where no picture was asked for.
        sound: of the clip, a WAV file; None where no sound was asked for, or there is none.
        expires_at: Unix seconds until which the clip is kept.
    """

    text: str
    completion_tokens: int
    clip_id: str | None = None
    video: Mapping[str, Any] | None = None
    sound: bytes | None = None
    expires_at: int = 0


def understand(body: ChatBody, phrases: Phrases | None = None) -> Intent:
    """Find out what the last turn asks for. Seconds of work where a chat is as long as may be: not for an event loop.

    A turn of text changes the prompt of the clip before it (see `edit_prompt`), and goes on from the same picture, clip
    or sound, unless it is a whole prompt. A turn with a picture, clip or sound begins anew: its text is the prompt.
    A caption is of whatever was seen last, sent or answered.

    Args:
        body: a checked one.
        phrases: the bundle's; None where it has none.

    Raises:
        RequestError: the last message is not the user's or is empty, has several media, or asks for what no task
            writes: text from text ("modality_unsupported"), sound from a picture or from a sound; or the turns add up
            to a prompt of more than `MAX_PROMPT` characters.
    """
    last = body.messages[-1]
    if not isinstance(last, UserMessage):
        raise RequestError(
            f"messages must end with a user message, got one of the role {last.role!r}.",
            code="invalid_value",
            param="messages",
        )
    prompt: str | None = None
    given: _Given | None = None
    seen: _Given | str | None = None
    previous: str | None = None
    asked = False  # what is said before any request answers none, such as a greeting
    for place, message in enumerate(body.messages):
        if isinstance(message, UserMessage):
            asked = True
            text, media = _text(message), _media(message, place)
            if media is not None:
                prompt, given = text or None, media
                seen = seen if media.kind == "audio" else media
            elif text:
                given = None if is_whole_prompt(text, phrases) else given
                prompt = text if prompt is None else _checked(edit_prompt(prompt, text, phrases))
        elif isinstance(message, AssistantMessage) and asked:
            prompt = _text(message) or prompt
            if message.clip_id is not None:
                previous = seen = message.clip_id
    if not _text(last) and _media(last, len(body.messages) - 1) is None:
        raise RequestError(
            "the last message must hold text, a picture, a clip or a sound; it is empty.",
            code="invalid_value",
            param="messages",
        )
    if body.wants_text:
        return _caption(body, seen, previous)
    return Intent(
        kind="clip",
        prompt=prompt,
        task=body.task or _task(body, given),
        reference=None if given is None else given.reference,
        given=None if given is None else given.kind,
        previous_video=previous,
    )


def video_body(body: ChatBody, intent: Intent, choice: int = 0) -> VideoBody:
    """What one of the answers is to be written from.

    Args:
        body: a checked one.
        intent: what `understand` made of it.
        choice: number of the answer, from 0; each has a seed of its own, counted on from the one that was sent.

    Raises:
        RequestError: there is no such task, or the edited prompt became too long.
    """
    taken = VideoBody.model_fields.keys() & ChatBody.model_fields.keys()
    said = body.model_dump(include=set(taken), exclude_none=True)
    if body.seed is not None:
        said["seed"] = (body.seed + choice) % 2**63
    return VideoBody.parse(said | {"prompt": intent.prompt, "input_reference": intent.reference, "task": intent.task})


def chat_answer(
    model: str,
    answers: Sequence[Answer],
    *,
    prompt_tokens: int,
    created: int | None = None,
    metadata: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """The object that answers a chat, one choice for each answer.

    A clip's message holds its prompt as `content`; where picture was asked for, `video`: {"id", "url", ...}, and where
    sound was, `audio`: {"id", "data" (base64 of a WAV file), "expires_at", "transcript" (empty: nobody speaks)}. Sent
    back, either of them tells `understand` which clip it was.

    Args:
        model: name of the bundle or adapter that answered.
        answers: at least one.
        prompt_tokens: ids that the model was given.
        created: Unix seconds; None is now.
        metadata: the body's.
    """
    written = sum(answer.completion_tokens for answer in answers)
    return {
        "id": f"chatcmpl-{uuid.uuid4().hex}",
        "object": "chat.completion",
        "created": int(time.time()) if created is None else created,
        "model": model,
        "choices": [
            {"index": index, "message": _message(answer), "finish_reason": "stop", "logprobs": None}
            for index, answer in enumerate(answers)
        ],
        "usage": {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": written,
            "total_tokens": prompt_tokens + written,
        },
    } | ({} if metadata is None else {"metadata": dict(metadata)})


@dataclasses.dataclass(frozen=True)
class _Given:
    reference: InputReference
    kind: Kind | None


def _text(message: SystemMessage | UserMessage | AssistantMessage) -> str:
    parts = message.content or []
    return _checked("\n".join(part.text.strip() for part in parts if isinstance(part, TextPart)).strip())


def _checked(prompt: str) -> str:
    """A prompt that is not too long; a longer one is refused before more of the chat is put behind it."""
    if len(prompt) > MAX_PROMPT:
        raise RequestError(
            f"messages must add up to a prompt of at most {MAX_PROMPT} characters, it has {len(prompt)}. Send the "
            "prompt whole, in a chat of its own.",
            code="invalid_value",
            param="messages",
        )
    return prompt


def _media(message: UserMessage, place: int) -> _Given | None:
    """The picture, clip or sound of a message."""
    found = [given for part in message.content if (given := _given(part)) is not None]
    if len(found) > 1:
        raise RequestError(
            f"a message must hold at most one picture, clip or sound, this one holds {len(found)}.",
            code="invalid_input_reference",
            param=f"messages.{place}.content",
        )
    return found[0] if found else None


def _given(part: TextPart | ImagePart | VideoPart | AudioPart | FilePart) -> _Given | None:
    kind: Kind | None = None
    if isinstance(part, TextPart):
        return None
    if isinstance(part, AudioPart):
        sound = part.input_audio
        return _Given(InputReference(image_url=f"data:audio/{sound.format};base64,{sound.data}"), "audio")
    if isinstance(part, FilePart):
        url, file_id = part.file.file_data, part.file.file_id
    else:
        media, kind = (part.image_url, "image") if isinstance(part, ImagePart) else (part.video_url, "video")
        url, file_id = media.url, media.file_id
    if url is None:
        return _Given(InputReference(file_id=file_id), kind)
    return _Given(InputReference(image_url=url), _KINDS[url.split("/")[0]])


_KINDS: Final[dict[str, Kind]] = {"data:image": "image", "data:video": "video", "data:audio": "audio"}


def _caption(body: ChatBody, seen: _Given | str | None, previous: str | None) -> Intent:
    if seen is None:
        raise RequestError(
            'this model cannot chat in text: it writes clips. Send modalities ["video", "audio"] for a clip from your '
            'text, or a clip with modalities ["text"] for a description of it.',
            code="modality_unsupported",
            param="modalities",
        )
    if body.task not in (None, "captioning"):
        raise RequestError(
            f'task must be captioning or left out with modalities ["text"], got {body.task!r}. For a clip send '
            'modalities ["video", "audio"].',
            code="invalid_value",
            param="task",
        )
    given = None if isinstance(seen, str) else seen
    return Intent(
        kind="caption",
        task="captioning",
        reference=None if given is None else given.reference,
        given=None if given is None else given.kind,
        previous_video=previous,
    )


def _task(body: ChatBody, given: _Given | None) -> str | None:
    """What writes the modalities that are asked for, from what is given."""
    only_sound = "video" not in body.modalities
    if given is None:
        silent = "audio" not in body.modalities
        return "text_to_audio" if only_sound else "text_to_video" if silent else "text_to_video_audio"
    if given.kind is None:  # of a file, sound is made for a clip only; whether it is one is found out when it is read
        return "video_to_audio" if only_sound else None
    if only_sound and given.kind != "video":
        raise RequestError(
            f'modalities ["audio"] must come with text or with a clip to make the sound for, not with an {given.kind}. '
            'Send modalities ["video", "audio"].',
            code="modality_unsupported",
            param="modalities",
        )
    if only_sound:
        return "video_to_audio"
    return {"image": "image_to_video", "video": "video_continuation", "audio": "audio_to_video"}[given.kind]


def _message(answer: Answer) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": answer.text, "refusal": None}
    if answer.clip_id is None:
        return message
    if answer.video is not None:
        message["video"] = {"id": answer.clip_id, "url": f"/v1/videos/{answer.clip_id}/content", **answer.video}
    if answer.sound is not None:
        message["audio"] = {
            "id": AUDIO_ID + answer.clip_id.removeprefix(VIDEO_ID),
            "data": base64.b64encode(answer.sound).decode("ascii"),
            "expires_at": answer.expires_at,
            "transcript": "",
        }
    return message
