"""What a chat means: who said what, what is asked for, and answers that OpenAI's client reads and sends back."""

import base64
import json
import time
from typing import Any, get_type_hints

import httpx
import openai
import pytest
from openai.types.chat import ChatCompletion
from openai.types.chat.completion_create_params import CompletionCreateParamsBase

from poet.bundle import default_bundle
from poet_serving.conversation import Answer, ChatBody, Intent, chat_answer, understand, video_body
from poet_serving.phrases import Phrases
from poet_serving.schema import RequestError, VideoBody

PICTURE = "data:image/png;base64,AAAA"
CLIP = "data:video/mp4;base64,BBBB"
PROMPT = "a large red star bounces on a navy background with a high bell sound"
RISING = "a large red star rises on a navy background with a high bell sound"
SEEN = ["video", "audio"]


@pytest.fixture(scope="module")
def phrases() -> Phrases:
    return Phrases.load(default_bundle() / "phrases.json")


def body(*messages: Any, **fields: Any) -> ChatBody:
    said = [message if isinstance(message, dict) else user(message) for message in messages]
    return ChatBody.parse({"messages": said, "modalities": SEEN, **fields})


def user(*parts: Any) -> dict[str, Any]:
    if len(parts) == 1 and isinstance(parts[0], str):
        return {"role": "user", "content": parts[0]}
    return {
        "role": "user",
        "content": [{"type": "text", "text": part} if isinstance(part, str) else part for part in parts],
    }


def picture(url: str = PICTURE) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url, "detail": "auto"}}


def clip(url: str = CLIP) -> dict[str, Any]:
    return {"type": "video_url", "video_url": {"url": url}}


def sound(data: str = "CCCC") -> dict[str, Any]:
    return {"type": "input_audio", "input_audio": {"data": data, "format": "wav"}}


def assistant(text: str | None, clip_id: str | None = None, **fields: Any) -> dict[str, Any]:
    video = {} if clip_id is None else {"video": {"id": clip_id, "url": f"/v1/videos/{clip_id}/content"}}
    return {"role": "assistant", "content": text, **video, **fields}


def refusal(value: Any) -> RequestError:
    with pytest.raises(RequestError) as caught:
        understand(ChatBody.parse(value))
    return caught.value


def test_a_text_asks_for_a_clip_of_itself() -> None:
    assert understand(body(PROMPT)) == Intent(kind="clip", prompt=PROMPT, task="text_to_video_audio")
    assert understand(body(user("a star", "falls"))).prompt == "a star\nfalls"


@pytest.mark.parametrize(
    ("modalities", "task"),
    [
        (["video", "audio"], "text_to_video_audio"),
        (["video"], "text_to_video"),
        (["audio"], "text_to_audio"),
        (["text", "audio"], "text_to_audio"),  # what OpenAI's clients must say for sound
        (["text", "video", "audio"], "text_to_video_audio"),
    ],
)
def test_text_beside_other_modalities_adds_nothing(modalities: list[str], task: str) -> None:
    assert understand(body(PROMPT, modalities=modalities)) == Intent(kind="clip", prompt=PROMPT, task=task)


@pytest.mark.parametrize(
    ("part", "modalities", "task", "given"),
    [
        (picture(), SEEN, "image_to_video", "image"),
        (picture(), ["video"], "image_to_video", "image"),
        (clip(), SEEN, "video_continuation", "video"),
        (clip(), ["audio"], "video_to_audio", "video"),
        (sound(), ["video"], "audio_to_video", "audio"),
        ({"type": "file", "file": {"file_id": "file-1"}}, SEEN, None, None),
        ({"type": "file", "file": {"file_id": "file-1"}}, ["audio"], "video_to_audio", None),
        ({"type": "file", "file": {"file_data": CLIP, "filename": "a.mp4"}}, SEEN, "video_continuation", "video"),
        ({"type": "image_url", "image_url": {"file_id": "file-1"}}, SEEN, "image_to_video", "image"),
        ({"type": "video_url", "video_url": {"url": PICTURE}}, SEEN, "image_to_video", "image"),
    ],
)
def test_what_is_sent_says_what_is_written_from_it(
    part: dict[str, Any], modalities: list[str], task: str | None, given: str | None
) -> None:
    intent = understand(body(user("a star", part), modalities=modalities))
    assert (intent.prompt, intent.task, intent.given) == ("a star", task, given)
    assert intent.reference is not None


def test_references_are_data_urls_or_uploaded_files() -> None:
    reference = understand(body(user(sound("UklG")))).reference
    assert reference is not None
    assert (reference.image_url, reference.file_id) == ("data:audio/wav;base64,UklG", None)
    reference = understand(body(user({"type": "file", "file": {"file_id": "file-1"}}))).reference
    assert reference is not None
    assert (reference.image_url, reference.file_id) == (None, "file-1")


def test_a_named_task_is_taken_as_it_is() -> None:
    assert understand(body(user("a star", clip()), task="inpainting")).task == "inpainting"


def test_text_alone_is_answered_about_a_picture_or_clip_only() -> None:
    asked = understand(body(user("what is this?", picture()), modalities=["text"]))
    assert (asked.kind, asked.prompt, asked.task, asked.given) == ("caption", None, "captioning", "image")
    unsaid = ChatBody.parse({"messages": [user("what is this?", clip())]})
    assert understand(unsaid).kind == "caption"
    for said in ([user("a red star falls")], [user("what do you hear?", sound())]):
        error = refusal({"messages": said})
        assert (error.code, error.param, error.status) == ("modality_unsupported", "modalities", 400)
        assert '["video", "audio"]' in str(error)


def test_a_caption_is_of_what_was_seen_last() -> None:
    answered = [user("go on", picture()), assistant(PROMPT, "video_7")]
    asked = understand(body(*answered, "what do you see?", modalities=["text"]))
    assert asked == Intent(kind="caption", task="captioning", previous_video="video_7")
    later = understand(body(*answered, user("and here?", clip()), modalities=["text"]))
    assert (later.given, later.previous_video) == ("video", "video_7")


def test_a_caption_can_be_changed_into_a_clip(phrases: Phrases) -> None:
    said = [user("what is this?", picture()), assistant(PROMPT), user("make it rise")]
    intent = understand(body(*said), phrases)
    assert (intent.prompt, intent.given, intent.task) == (RISING, "image", "image_to_video")


def test_a_turn_changes_the_prompt_of_the_last_clip(phrases: Phrases) -> None:
    said = [user("a star"), assistant(PROMPT, "video_7"), user("now make it rise")]
    assert understand(body(*said), phrases) == Intent(
        kind="clip", prompt=RISING, task="text_to_video_audio", previous_video="video_7"
    )
    assert understand(body(*said)).prompt == f"{PROMPT}, now make it rise"
    # What was answered counts, not what was asked for.
    said = [user("a star"), assistant("a blue disc", "video_7"), user("red"), assistant(None, "video_8"), user("big")]
    assert understand(body(*said), phrases).prompt == "a big red disc"


@pytest.mark.parametrize("kept", ["whole", "audio only", "text only", "nothing"])
def test_a_chat_goes_on_whatever_a_client_keeps_of_an_answer(phrases: Phrases, kept: str) -> None:
    answered = {
        "whole": assistant(PROMPT, "video_7", audio={"id": "audio_7", "data": "AA=="}, refusal=None, tool_calls=None),
        "audio only": {"role": "assistant", "audio": {"id": "audio_7"}},
        "text only": assistant(PROMPT),
        "nothing": assistant(None, audio=None, video=None),
    }[kept]
    intent = understand(body(PROMPT, answered, "make it rise"), phrases)
    assert intent.prompt == RISING
    assert intent.previous_video == ("video_7" if kept in ("whole", "audio only") else None)


def test_a_greeting_is_no_prompt(phrases: Phrases) -> None:
    said = [{"role": "system", "content": "Be kind."}, assistant("Hello! A star falls."), user("make a dog")]
    assert understand(body(*said), phrases).prompt == "make a dog"


def test_a_picture_is_meant_until_another_comes_or_a_prompt_of_its_own(phrases: Phrases) -> None:
    said = [user(PROMPT, picture()), assistant(PROMPT, "video_7")]
    assert understand(body(*said, "make it rise"), phrases).given == "image"
    fresh = understand(body(*said, "a small blue disc falls on gray"), phrases)
    assert (fresh.reference, fresh.task, fresh.prompt) == (
        None,
        "text_to_video_audio",
        "a small blue disc falls on gray",
    )
    anew = understand(body(*said, user(clip())), phrases)
    assert (anew.prompt, anew.given) == (None, "video")
    assert understand(body(*said, user("make it rise", clip())), phrases).prompt == "make it rise"


@pytest.mark.parametrize(
    ("value", "code", "param"),
    [
        ({}, "invalid_value", "messages"),
        ([], "invalid_value", None),
        ({"messages": []}, "invalid_value", "messages"),
        ({"messages": [user("x")] * 129}, "invalid_value", "messages"),
        ({"messages": [user(*["x " * 16_000] * 2)]}, "invalid_value", "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "invalid_value", "messages.0"),
        ({"messages": [assistant("x")]}, "invalid_value", "messages"),
        ({"messages": [user(" ")]}, "invalid_value", "messages"),
        ({"messages": [user({"type": "smell"})]}, "invalid_value", "messages.0.content.0"),
        ({"messages": [user(picture("https://a.b/c.png"))]}, "invalid_value", "messages.0.content.0.image_url"),
        ({"messages": [user({"type": "file", "file": {}})]}, "invalid_value", "messages.0.content.0.file"),
        ({"messages": [user(picture(), clip())]}, "invalid_input_reference", "messages.0.content"),
        ({"messages": [user(picture())], "modalities": ["audio"]}, "modality_unsupported", "modalities"),
        ({"messages": [user(sound())], "modalities": ["audio"]}, "modality_unsupported", "modalities"),
        ({"messages": [user(clip())], "task": "inpainting"}, "invalid_value", "task"),
        ({"messages": [user("x")], "modalities": []}, "invalid_value", "modalities"),
        ({"messages": [user("x")], "modalities": ["smell"]}, "invalid_value", "modalities.0"),
        ({"messages": [user("x")], "stream": True}, "stream_unsupported", "stream"),
        ({"messages": [user("x")], "n": 9}, "invalid_value", "n"),
        ({"messages": [user("x")], "colour": "red"}, "unknown_parameter", "colour"),
        ({"messages": [user("x")], "tools": [{"type": "function"}]}, "unsupported_parameter", "tools"),
        ({"messages": [user("x")], "response_format": {"type": "json_object"}}, "unsupported_parameter", None),
        ({"messages": [user("x")], "presence_penalty": 0.5}, "unsupported_parameter", "presence_penalty"),
        ({"messages": [user("x")], "audio": {"voice": "alloy", "format": "mp3"}}, "invalid_value", "audio.format"),
    ],
)
def test_what_cannot_be_answered_is_refused_by_name(value: Any, code: str, param: str | None) -> None:
    error = refusal(value)
    assert error.code == code
    assert error.param == (param or ("response_format" if code == "unsupported_parameter" else None))
    assert str(error)


def test_every_field_that_openai_knows_may_be_sent_with_the_value_that_asks_for_nothing() -> None:
    neutral = {
        "messages": [user(PROMPT)], "model": "nano", "modalities": ["text", "audio"], "stream": False, "n": 1,
        "audio": {"voice": "alloy", "format": "wav"}, "logit_bias": {}, "logprobs": False, "frequency_penalty": 0,
        "presence_penalty": 0.0, "functions": [], "tools": [], "tool_choice": "none", "function_call": "none",
        "response_format": {"type": "text"}, "max_tokens": 3, "max_completion_tokens": 5, "metadata": {"a": "b"},
        "parallel_tool_calls": True, "prompt_cache_key": "k", "prompt_cache_options": {"mode": "implicit"},
        "prompt_cache_retention": "24h", "reasoning_effort": "low", "safety_identifier": "s", "seed": 7,
        "service_tier": "auto", "stop": ["a"], "store": True, "stream_options": {"include_usage": True},
        "temperature": 0.5, "top_logprobs": 0, "top_p": 0.5, "user": "u", "verbosity": "low",
    }  # fmt: skip
    known = set(get_type_hints(CompletionCreateParamsBase)) | {"stream"}
    read = ChatBody.parse(neutral | dict.fromkeys(known - neutral.keys()))
    assert (read.temperature, read.metadata, read.seed) == (0.5, {"a": "b"}, 7)
    assert known <= neutral.keys() | {"moderation", "prediction", "web_search_options"}


def test_a_chat_has_every_option_of_a_clip() -> None:
    left = VideoBody.model_fields.keys() - ChatBody.model_fields.keys()
    assert left == {"prompt", "input_reference"}
    for name in VideoBody.model_fields.keys() - left:
        mine, theirs = (model.model_json_schema()["properties"][name] for model in (ChatBody, VideoBody))
        assert mine == theirs, name


def test_each_answer_has_a_seed_of_its_own() -> None:
    chat = body(user("a star", picture()), seed=2**63 - 1, top_k=5, decoding="parallel", steps=7, model="nano", n=2)
    first, second = (video_body(chat, understand(chat), choice) for choice in (0, 1))
    assert (first.seed, second.seed) == (2**63 - 1, 0)
    assert (first.top_k, first.decoding, first.steps, first.model) == (5, "parallel", 7, "nano")
    assert (first.prompt, first.task) == ("a star", "image_to_video")
    assert first.input_reference is not None
    assert first.input_reference.image_url == PICTURE
    unseeded = body("a star")
    assert video_body(unseeded, understand(unseeded)) == VideoBody(prompt="a star", task="text_to_video_audio")
    wrong = body("a star", task="dancing")
    with pytest.raises(RequestError, match=r"task: .*must be one of"):
        video_body(wrong, understand(wrong))


def test_a_prompt_that_grew_too_long_is_refused() -> None:
    with pytest.raises(RequestError, match="prompt of at most 32768 characters, it has 64") as caught:
        understand(body("a " * 16_000, assistant(None), "b " * 16_000))
    assert (caught.value.code, caught.value.param) == ("invalid_value", "messages")


@pytest.mark.usefixtures("no_collections")
def test_a_prompt_that_grows_is_not_edited_any_further_once_it_is_too_long(phrases: Phrases) -> None:
    long = body(*["b " * 16_000] * 128)
    start = time.thread_time()
    with pytest.raises(RequestError, match="prompt of at most"):
        understand(long, phrases)
    assert time.thread_time() - start < 2


def test_openais_client_reads_an_answer_and_sends_it_back(phrases: Phrases) -> None:
    answers = [
        Answer(text=PROMPT, completion_tokens=461, clip_id=f"video_{name}", video={"size": "64x64"}, sound=b"RIFF")
        for name in ("7", "8")
    ]
    made = chat_answer("nano", answers, prompt_tokens=23, created=5, metadata={"a": "b"})
    read = ChatCompletion.model_validate_json(json.dumps(made), strict=True)
    assert (read.object, read.model, read.created, read.metadata) == ("chat.completion", "nano", 5, {"a": "b"})
    assert [choice.index for choice in read.choices] == [0, 1]
    assert {choice.finish_reason for choice in read.choices} == {"stop"}
    assert read.usage is not None
    assert (read.usage.prompt_tokens, read.usage.completion_tokens, read.usage.total_tokens) == (23, 922, 945)
    message = read.choices[1].message
    assert message.content == PROMPT
    assert message.audio is not None
    assert (message.audio.id, base64.b64decode(message.audio.data)) == ("audio_8", b"RIFF")
    assert message.model_extra == {"video": {"id": "video_8", "url": "/v1/videos/video_8/content", "size": "64x64"}}
    for sent in (message.to_dict(), message.model_dump(), {"role": "assistant", "audio": {"id": message.audio.id}}):
        intent = understand(body(PROMPT, sent, "make it rise"), phrases)
        assert (intent.prompt, intent.previous_video) == (RISING, "video_8")


def test_an_answer_holds_what_was_asked_for() -> None:
    def message(**fields: Any) -> dict[str, Any]:
        made = chat_answer("nano", [Answer(text="a star", completion_tokens=3, **fields)], prompt_tokens=2)
        ChatCompletion.model_validate_json(json.dumps(made), strict=True)
        found: dict[str, Any] = made["choices"][0]["message"]
        return found

    assert message() == {"role": "assistant", "content": "a star", "refusal": None}
    assert message(clip_id="video_7", sound=b"x").keys() == {"role", "content", "refusal", "audio"}
    assert message(clip_id="video_7", video={}).keys() == {"role", "content", "refusal", "video"}


def test_what_the_client_really_sends_is_taken() -> None:
    """The body that OpenAI's client puts on the wire, caught before it leaves."""
    sent: list[Any] = []

    def answer(request: httpx.Request) -> httpx.Response:
        sent.append(json.loads(request.content))
        written = Answer(text=PROMPT, completion_tokens=3, clip_id="video_7", video={}, sound=b"x")
        return httpx.Response(200, json=chat_answer("nano", [written], prompt_tokens=2))

    transport = httpx.Client(transport=httpx.MockTransport(answer))
    client = openai.OpenAI(api_key="none", base_url="http://poet.invalid/v1", http_client=transport)
    options: Any = {"model": "nano", "modalities": SEEN, "extra_body": {"guidance_scale": 2.0}}
    messages: list[Any] = [user(PROMPT)]
    messages.append(client.chat.completions.create(messages=messages, **options).choices[0].message)
    messages.append(user("make it rise"))
    client.chat.completions.create(messages=messages, **options)
    read = [ChatBody.parse(body) for body in sent]
    assert [one.guidance_scale for one in read] == [2.0, 2.0]
    assert understand(read[1]).previous_video == "video_7"
