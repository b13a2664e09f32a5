"""Adapters over HTTP: models beside the bundle, kept through remixes and extensions, missed after a restart."""

import dataclasses
import re
import warnings
from pathlib import Path

import httpx
import openai
import pytest

from poet.bundle import Bundle
from poet.model.lora import Adapter, read_adapter
from poet.testing import save_adapter, tiny_bundle
from poet_serving.testing import run_server

warnings.filterwarnings("ignore", message="The Sora API", category=DeprecationWarning)
PROMPT = "a red star"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return tiny_bundle(tmp_path_factory.mktemp("made") / "tiny")


@pytest.fixture(scope="module")
def adapters(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> tuple[Adapter, ...]:
    folder, config = tmp_path_factory.mktemp("adapters"), bundle.model_config
    paths = {name: save_adapter(config, folder / name, seed=seed) for seed, name in enumerate(("ink", "clay"))}
    return tuple(read_adapter(path, config, bundle.fingerprint) for path in paths.values())


def test_adapters_are_models_beside_the_bundle(bundle: Bundle, adapters: tuple[Adapter, ...], tmp_path: Path) -> None:
    with run_server(bundle, tmp_path / "data", adapters=adapters) as running:
        client = openai.OpenAI(base_url=f"{running.url}/v1", api_key="x", max_retries=0)
        models = list(client.models.list())
        assert [(one.id, (one.model_extra or {})["parent"]) for one in models] == [
            ("tiny", None),
            ("ink", "tiny"),
            ("clay", "tiny"),
        ]
        made = {
            name: client.videos.create_and_poll(prompt=PROMPT, model=name, extra_body={"seed": 3})
            for name in ("tiny", "ink", "clay")
        }
        told = {name: (video.model_extra or {})["metadata"] for name, video in made.items()}
        assert len({about["ids_sha256"] for about in told.values()}) == 3
        assert [about.get("adapter_sha256") for about in told.values()] == [
            None,
            *(adapter.sha256 for adapter in adapters),
        ]
        assert [video.model for video in made.values()] == list(made)
        # What is made from a video of an adapter is made with it.
        remixed = client.videos.poll(client.videos.remix(made["ink"].id, prompt="a blue star").id)
        assert (remixed.status, remixed.model) == ("completed", "ink")
        body = {"video": {"id": made["clay"].id}, "prompt": PROMPT, "seconds": "1"}
        longer = client.videos.poll(httpx.post(f"{running.url}/v1/videos/extensions", json=body).json()["id"])
        assert (longer.model, (longer.model_extra or {})["metadata"]["adapter"]) == ("clay", "clay")
        answer = client.chat.completions.create(
            model="ink",
            messages=[{"role": "user", "content": PROMPT}],
            modalities=["audio"],
            audio={"format": "wav", "voice": "alloy"},
        )
        assert answer.model == "ink"
        with pytest.raises(openai.NotFoundError, match="tiny, ink, clay"):
            client.videos.create(prompt=PROMPT, model="chalk")
        running.hold.clear()
        waiting = [client.videos.create(prompt=PROMPT, model=name) for name in ("clay", "ink")]
    other = dataclasses.replace(adapters[0], sha256="0" * 64)
    with run_server(bundle, tmp_path / "data", adapters=[other]) as running:  # clay is gone, ink is another
        client = openai.OpenAI(base_url=f"{running.url}/v1", api_key="x", max_retries=0)
        for video, words in zip(waiting, ("'clay' .* is not served", "'ink' .* is another one"), strict=True):
            ended = client.videos.poll(video.id)
            assert ended.status == "failed"
            assert ended.error is not None
            assert re.search(words, ended.error.message)
        for ask in (
            lambda: client.videos.remix(made["ink"].id, prompt="a blue star"),
            lambda: client.post("/videos/extensions", cast_to=object, body={"video": {"id": made["clay"].id}}),
        ):
            with pytest.raises(openai.NotFoundError, match="that the video was asked of"):
                ask()
