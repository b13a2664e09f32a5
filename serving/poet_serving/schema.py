"""What programs ask for: the body of `POST /v1/videos` and of a batch's lines, and what it means to the pipeline.

The fields that OpenAI's clients know keep their names and forms; the others are Poet's. This module knows bundles and
requests; it does not know HTTP, jobs, or files but those that a reference has become.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from poet.bundle import Bundle
from poet.errors import ConfigError, PoetError
from poet.generation.canvas import Order, ParallelDecoding, choose_decoding
from poet.generation.given import GivenFiles
from poet.generation.maskgit import Schedule
from poet.generation.pipeline import ClipRequest
from poet.generation.sampling import SamplingConfig
from poet.generation.upsample import Upsampling
from poet.media import Clip
from poet.tasks import TASKS, get_task

__all__ = [
    "InputReference",
    "Loc",
    "RequestError",
    "VideoBody",
    "build_request",
    "check_model",
    "error_body",
    "first_error",
    "to_clip_request",
]

MAX_PROMPT = 32_768
_SECONDS_SLACK = 0.5  # a clip of 2.125 seconds answers to "2"

Fraction01 = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)]
Loc = tuple[int | str, ...]
Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Amount = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class RequestError(PoetError, ValueError):
    """A request that cannot be carried out, as a program reads it.

    Args:
        message: for a person.
        code: for a program; stable.
        param: the field that is wrong, or None.
        status: of HTTP.
    """

    def __init__(self, message: str, *, code: str, param: str | None = None, status: int = 400) -> None:
        super().__init__(message)
        self.code, self.param, self.status = code, param, status

    @property
    def body(self) -> dict[str, Any]:
        """OpenAI's error object."""
        return error_body(str(self), code=self.code, param=self.param, status=self.status)


def first_error(error: ValidationError, place: Callable[[Loc], Loc] = tuple) -> RequestError:
    """The first of what is wrong with a body, as a program reads it.

    Args:
        error: of pydantic.
        place: from where pydantic found it to the names and indices in the body.
    """
    first = error.errors(include_url=False, include_context=False)[0]
    param = ".".join(map(str, place(first["loc"]))) or None
    code = "unknown_parameter" if first["type"] == "extra_forbidden" else "invalid_value"
    return RequestError(f"{param or 'the body'}: {first['msg']}", code=code, param=param)


def error_body(message: str, *, code: str, param: str | None = None, status: int = 400) -> dict[str, Any]:
    """OpenAI's error object, `{"error": {"message", "type", "param", "code"}}`."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


class InputReference(BaseModel):
    """A picture, clip or sound that goes with a request.

    Attributes:
        image_url: a data URL ("data:image/png;base64,..."); of a clip or a sound too.
        file_id: of an uploaded file.
        path: a file on the machine of a batch; a server takes none.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    image_url: str | None = None
    file_id: str | None = None
    path: str | None = None

    def model_post_init(self, context: Any, /) -> None:
        """Exactly one way to name it."""
        if sum(value is not None for value in (self.image_url, self.file_id, self.path)) != 1:
            raise ValueError("input_reference must have exactly one of image_url, file_id and path")


class VideoBody(BaseModel):
    """The body of a request for a clip.

    Attributes:
        prompt: what to show and let be heard.
        model: the bundle's name, or that of one of its LoRA adapters; None takes the bundle.
        seconds: OpenAI's clip length; a bundle writes clips of one length, which this may name.
        size: "WIDTHxHEIGHT": the bundle's own, or that of its upsampler.
        input_reference: what the clip goes on from.
        task: a name in `poet.tasks.TASKS`; None: found from what is given.
        seed: the same seed gives the same clip; None draws one.
        temperature, top_k, top_p, guidance_scale: of the draws; None takes the bundle's own.
        negative_prompt: what guidance moves away from.
        repetition_penalty, repetition_window: on ids that were written lately.
        decoding: autoregressive, or parallel.
        steps, schedule, order, choice_temperature, guidance_start, guidance_stop: of parallel decoding; None takes the
            bundle's own.
        upsample_steps, upsample_temperature: of upsampling.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    prompt: Annotated[str, Field(max_length=MAX_PROMPT)] | None = None
    model: str | None = None
    seconds: str | float | None = None
    size: str | None = None
    input_reference: InputReference | None = None
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

    @field_validator("task")
    @classmethod
    def _known_task(cls, value: str | None) -> str | None:
        if value is not None and value not in TASKS:
            raise ValueError(f"must be one of {', '.join(TASKS)}")
        return value

    @classmethod
    def parse(cls, value: Any) -> VideoBody:
        """Check what came over the wire.

        Raises:
            RequestError: it is not such a body; the message names the field.
        """
        try:
            return cls.model_validate(value)
        except ValidationError as error:
            raise first_error(error) from None


def to_clip_request(body: VideoBody, bundle: Bundle, files: GivenFiles, adapters: Collection[str] = ()) -> ClipRequest:
    """What a body means.

    Args:
        body: a checked one.
        bundle: gives defaults and what it was trained on.
        files: what its input_reference became.
        adapters: names of LoRA adapters that `model` may ask for in place of the bundle.

    Raises:
        RequestError: the model, task, size or length is another than the bundle has, or options do not go together.
        MediaError: a file cannot be read.
    """
    check_model(body, (bundle.name, *adapters))
    has_text = body.prompt is not None
    name = body.task or files.guess_task(has_text=has_text, default=bundle.generation_config.task)
    try:
        clip = files.read(bundle, get_task(name), has_text=has_text)
    except ConfigError as error:
        raise RequestError(str(error), code="invalid_value") from error
    return build_request(body, bundle, name, clip, body.model if body.model in adapters else None)


def check_model(body: VideoBody, known: Sequence[str]) -> None:
    """Raise unless a body asks for one of the models that there are.

    Raises:
        RequestError: it asks for another.
    """
    if body.model is not None and body.model not in known:
        raise RequestError(
            f"model must be one of {', '.join(known)}, got {body.model!r}.",
            code="model_not_found",
            param="model",
            status=404,
        )


def build_request(
    body: VideoBody, bundle: Bundle, task: str, clip: Clip | None, adapter: str | None = None
) -> ClipRequest:
    """What a body means whose reference has been read.

    Args:
        body: a checked one.
        bundle: gives defaults and what it was trained on.
        task: name of its task.
        clip: what its input_reference holds, at the bundle's size and rate.
        adapter: name of the LoRA adapter that it asks for.

    Raises:
        RequestError: the task, size or length is another than the bundle has, or options do not go together.
    """
    _check_seconds(body, bundle)
    upsampling = _upsampling(body, bundle)
    usual: dict[str, Any] = bundle.generation_config.sampling(parallel=body.decoding == "parallel")
    sampling = {key: value for key in _SAMPLING if (value := getattr(body, key)) is not None}
    try:
        bundle.check_trained(task)
        if body.decoding == "parallel":
            bundle.check_parallel()
        return ClipRequest(
            task=task,
            text=body.prompt,
            clip=clip,
            negative_text=body.negative_prompt,
            sampling=SamplingConfig(**usual | sampling, seed=body.seed),
            decoding=_parallel(body, bundle),
            upsampling=upsampling,
            adapter=adapter,
        )
    except ConfigError as error:
        raise RequestError(str(error), code="invalid_value") from error


_SAMPLING = ("temperature", "top_k", "top_p", "guidance_scale", "repetition_penalty", "repetition_window")
_PARALLEL = {
    "steps": "num_steps",
    **{name: name for name in ("schedule", "order", "choice_temperature", "guidance_start", "guidance_stop")},
}


def _parallel(body: VideoBody, bundle: Bundle) -> ParallelDecoding | None:
    said: dict[str, Any] = {
        theirs: value for ours, theirs in _PARALLEL.items() if (value := getattr(body, ours)) is not None
    }
    if body.decoding == "parallel":
        return choose_decoding(bundle.generation_config.parallel, said)
    for ours in _PARALLEL:
        if getattr(body, ours) is not None:
            raise RequestError(f"{ours} is for decoding 'parallel'.", code="invalid_value", param=ours)
    return None


def _check_seconds(body: VideoBody, bundle: Bundle) -> None:
    if body.seconds is None:
        return
    duration = bundle.geometry().duration
    try:
        right = abs(float(body.seconds) - duration) <= _SECONDS_SLACK
    except ValueError:
        right = False
    if not right:
        raise RequestError(
            f"seconds must be {duration:g} or left out: the model writes clips of that length; got {body.seconds!r}.",
            code="unsupported_seconds",
            param="seconds",
        )


def _upsampling(body: VideoBody, bundle: Bundle) -> Upsampling | None:
    """What a size asks for: None for the bundle's own."""
    said = {
        theirs: value
        for ours, theirs in (("upsample_steps", "num_steps"), ("upsample_temperature", "temperature"))
        if (value := getattr(body, ours)) is not None
    }
    width, height = bundle.generation_config.width, bundle.generation_config.height
    own = f"{width}x{height}"
    larger = None if bundle.upsampler is None else f"{width * bundle.upsampler_scale}x{height * bundle.upsampler_scale}"
    if body.size is not None and body.size not in (own, larger):
        sizes = own if larger is None else f"{own} or {larger}"
        raise RequestError(f"size must be {sizes}, got {body.size!r}.", code="unsupported_size", param="size")
    if body.size is None or body.size == own:
        if said:
            raise RequestError(
                "upsample_steps and upsample_temperature are for the larger size.", code="invalid_value", param="size"
            )
        return None
    return Upsampling(**said)
