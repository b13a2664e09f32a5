"""What programs ask for in a chat: the body of `POST /v1/chat/completions`.

The fields that OpenAI's clients know keep their names and forms; `video_url` has that of `image_url`, as with vLLM, and
the options of a clip are those of `VideoBody`. This module knows forms; `poet_serving.conversation` what they mean.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from poet.generation.canvas import Order
from poet.generation.maskgit import Schedule
from poet_serving.schema import MAX_PROMPT, Amount, Fraction01, Loc, RequestError, Share, first_error

__all__ = [
    "AssistantMessage",
    "AudioPart",
    "ChatBody",
    "FilePart",
    "ImagePart",
    "SystemMessage",
    "TextPart",
    "UserMessage",
    "VideoPart",
]

MAX_CHOICES: Final = 8
MAX_MESSAGES: Final = 128
AUDIO_ID: Final = "audio_"
VIDEO_ID: Final = "video_"
_MEDIA_URL: Final = re.compile(r"data:(image|video|audio)/")

Modality = Literal["text", "video", "audio"]

# What OpenAI's clients may send and no answer depends on.
_WITHOUT_EFFECT: Final = (
    *("parallel_tool_calls", "prompt_cache_key", "prompt_cache_options", "prompt_cache_retention", "reasoning_effort"),
    *("safety_identifier", "service_tier", "store", "stream_options", "top_logprobs", "user", "verbosity"),
)
# What an answer would have to obey, with the values that ask for nothing.
_UNSUPPORTED: Final[dict[str, tuple[Any, ...]]] = {
    "frequency_penalty": (0,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "logit_bias": ({},),
    "logprobs": (False,),
    "moderation": (),
    "prediction": (),
    "presence_penalty": (0,),
    "response_format": ({"type": "text"},),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "web_search_options": (),
}


class _Lenient(BaseModel):
    """Clients send messages back with whatever they add to them."""

    model_config = ConfigDict(extra="ignore", frozen=True)


class _Media(_Lenient):
    url: str | None = None
    file_id: str | None = None

    def model_post_init(self, context: Any, /) -> None:
        """Exactly one way to name it."""
        _check_named("url", self.url, self.file_id)


class _Sound(_Lenient):
    data: str
    format: Literal["wav", "mp3"]


class _File(_Lenient):
    file_id: str | None = None
    file_data: str | None = None

    def model_post_init(self, context: Any, /) -> None:
        """Exactly one way to name it."""
        _check_named("file_data", self.file_data, self.file_id)


class TextPart(_Lenient):
    """Something said."""

    type: Literal["text"]
    text: Annotated[str, Field(max_length=MAX_PROMPT)]


class _RefusalPart(_Lenient):
    type: Literal["refusal"]


class ImagePart(_Lenient):
    """A picture: {"url": a data URL} or {"file_id": of an uploaded file}."""

    type: Literal["image_url"]
    image_url: _Media


class VideoPart(_Lenient):
    """A clip, in the form of a picture."""

    type: Literal["video_url"]
    video_url: _Media


class AudioPart(_Lenient):
    """A sound: {"data": base64, "format": wav or mp3}."""

    type: Literal["input_audio"]
    input_audio: _Sound


class FilePart(_Lenient):
    """A file of any of these kinds: {"file_data": a data URL} or {"file_id": of an uploaded file}."""

    type: Literal["file"]
    file: _File


def _check_named(field: str, url: str | None, file_id: str | None) -> None:
    if (url is None) == (file_id is None):
        raise ValueError(f"must have exactly one of {field} (a data URL) and file_id")
    if url is not None and not _MEDIA_URL.match(url):
        raise ValueError(f"{field} must be a data URL of an image, a video or a sound: no other address is fetched")


def _as_parts(value: Any) -> Any:
    return [{"type": "text", "text": value}] if isinstance(value, str) else value


_UserPart = Annotated[TextPart | ImagePart | VideoPart | AudioPart | FilePart, Field(discriminator="type")]
_AssistantPart = Annotated[TextPart | _RefusalPart, Field(discriminator="type")]


class SystemMessage(_Lenient):
    """What a program says about the chat."""

    role: Literal["system", "developer"]
    content: Annotated[list[TextPart], BeforeValidator(_as_parts)]


class UserMessage(_Lenient):
    """What a person says and sends."""

    role: Literal["user"]
    content: Annotated[list[_UserPart], BeforeValidator(_as_parts)]


class _Written(_Lenient):
    id: str | None = None


class AssistantMessage(_Lenient):
    """What was answered: the prompt that was carried out, or a caption; `video` and `audio` name the clip."""

    role: Literal["assistant"]
    content: Annotated[list[_AssistantPart] | None, BeforeValidator(_as_parts)] = None
    video: _Written | None = None
    audio: _Written | None = None

    @property
    def clip_id(self) -> str | None:
        """Of the clip that this message answered with; its sound's id tells it too."""
        if self.video is not None and self.video.id:
            return self.video.id
        if self.audio is not None and self.audio.id and self.audio.id.startswith(AUDIO_ID):
            return VIDEO_ID + self.audio.id.removeprefix(AUDIO_ID)
        return None


class _SoundOptions(_Lenient):
    format: Literal["wav"] = "wav"


class ChatBody(BaseModel):
    """The body of a chat.

    Attributes:
        messages: what was said, 1 to 128 of them. System and developer messages change nothing: the model follows
            prompts only. Assistant messages are those that `chat_answer` made, as far as the client kept them.
        model: the bundle's name; None takes the bundle.
        modalities: what to answer with. ["text"], which is also meant where nothing is said, asks for a description of
            a clip or picture. "video", "audio" or both ask for a clip; "text" beside them adds nothing, since every
            clip is answered with its prompt as text. (OpenAI's clients must say "text" wherever they say "audio".)
        audio: OpenAI's options of sound: the format, which must be wav; voices are not known here.
        n: answers, 1 to 8.
        max_tokens, max_completion_tokens: taken, and of no effect on clips, which have one length.
        stop: taken, and of no effect on clips.
        metadata: of whoever asks; handed back.
        seed, size, temperature, ...: as in `VideoBody`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    messages: Annotated[
        list[Annotated[SystemMessage | UserMessage | AssistantMessage, Field(discriminator="role")]],
        Field(min_length=1, max_length=MAX_MESSAGES),
    ]
    modalities: Annotated[list[Modality], Field(min_length=1)] = ["text"]
    audio: _SoundOptions | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] = 1
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    stop: str | list[str] | None = None
    metadata: Annotated[dict[str, str], Field(max_length=16)] | None = None

    model: str | None = None
    seconds: str | float | None = None
    size: str | None = None
    task: str | None = None
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    temperature: Amount | None = None
    top_k: Annotated[int, Field(ge=0)] | None = None
    top_p: Fraction01 | None = None
    guidance_scale: Amount | None = None
    negative_prompt: Annotated[str, Field(max_length=MAX_PROMPT)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    repetition_window: Annotated[int, Field(ge=0)] | None = None
    decoding: Literal["autoregressive", "parallel"] = "autoregressive"
    steps: Annotated[int, Field(ge=1, le=4096)] | None = None
    schedule: Schedule | None = None
    order: Order | None = None
    choice_temperature: Amount | None = None
    guidance_start: Share | None = None
    guidance_stop: Share | None = None
    upsample_steps: Annotated[int, Field(ge=1, le=4096)] | None = None
    upsample_temperature: Amount | None = None

    @classmethod
    def parse(cls, value: Any) -> ChatBody:
        """Check what came over the wire. A field that is null is one that was not sent.

        Raises:
            RequestError: it is not such a body, or asks for what no answer could obey; the message names the field.
        """
        if isinstance(value, Mapping):
            value = _without_openai_fields(value)
        try:
            return cls.model_validate(value)
        except ValidationError as error:
            raise first_error(error, _without_tried_models) from None

    @property
    def wants_text(self) -> bool:
        """Whether text alone is asked for."""
        return set(self.modalities) == {"text"}


def _without_tried_models(loc: Loc) -> Loc:
    """After a list's index pydantic names the model that it tried, which is in no body."""
    before = (None, *loc)
    return tuple(
        part for last, part in zip(before, loc, strict=False) if isinstance(part, int) or not isinstance(last, int)
    )


def _without_openai_fields(value: Mapping[str, Any]) -> dict[str, Any]:
    """What is left to check when OpenAI's fields are gone that Poet knows and does not obey."""
    sent = {name: field for name, field in value.items() if field is not None and name not in _WITHOUT_EFFECT}
    if sent.pop("stream", False) is not False:
        raise RequestError(
            "stream must be false or left out: a clip is answered when it is finished.",
            code="stream_unsupported",
            param="stream",
        )
    for name, neutral in _UNSUPPORTED.items():
        if name in sent and sent.pop(name) not in neutral:
            raise RequestError(
                f"{name} must be left out: this model writes clips and captions, and cannot obey it.",
                code="unsupported_parameter",
                param=name,
            )
    return sent
