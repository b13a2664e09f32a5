"""The upsampler through vLLM against the reference: the same codes, greedy and drawn, at mixed steps and guidance."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from poet.bundle import Bundle
from poet.errors import ConfigError
from poet.generation.engine import GenerationRequest, TorchEngine
from poet.generation.sampling import SamplingConfig
from poet.generation.upsample import Upsampling, UpsamplingRequest
from poet.grammar import Segment
from poet.testing import tiny_bundle, tiny_upsampler
from poet_serving.engine import VLLMEngine


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    made = tiny_bundle(tmp_path_factory.mktemp("made") / "bundle", config={"head_dim": 32})
    tiny_upsampler(made, made.path / "upsampler")
    return Bundle.open(made.path)


@pytest.fixture(scope="module")
def engine(bundle: Bundle) -> Iterator[VLLMEngine]:
    decodings = ["autoregressive", "upsampling"]
    with VLLMEngine(bundle.path, dtype="float32", max_num_seqs=3, decodings=decodings) as engine:
        yield engine


@pytest.fixture(scope="module")
def reference(bundle: Bundle) -> Iterator[TorchEngine]:
    with TorchEngine(bundle.path, max_batch_size=4) as engine:
        yield engine


def request(number: int, bundle: Bundle, **options: Any) -> UpsamplingRequest:
    """One of several lengths, texts, steps, schedules and kinds of guidance, all of which `number` decides."""
    rng = np.random.default_rng(number)
    frames, height, width = bundle.geometry().latent_shape
    low = rng.integers(0, bundle.vocabulary.video_codebook_size, (1 + number % frames, height, width))
    text = tuple(rng.integers(0, bundle.vocabulary.text_vocab_size, number % 5).tolist())
    settings: dict[str, Any] = {
        "num_steps": 2 + number % 4,
        "schedule": ("cosine", "linear", "square")[number % 3],
        "text_guidance": (1.0, 2.0)[number % 2],
        "low_guidance": (1.0, 1.0, 3.0)[number % 3],
        "noise_level": (0.0, 0.3)[number % 2],
        "seed": number,
    }
    return UpsamplingRequest(low=low, text=text, settings=Upsampling(**settings | options))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_codes_are_those_of_the_reference(
    engine: VLLMEngine, reference: TorchEngine, bundle: Bundle, temperature: float
) -> None:
    requests = [request(number, bundle, temperature=temperature) for number in range(12)]
    seen: list[tuple[int, int]] = []
    found = engine.upsample(requests, lambda done, total: seen.append((done, total)))
    for one, ours, theirs in zip(requests, found, reference.upsample(requests), strict=True):
        assert ours.shape == (len(one.low), 2 * one.low.shape[1], 2 * one.low.shape[2])
        np.testing.assert_array_equal(ours, theirs)
    assert seen == sorted(seen)
    assert seen[-1] == (4 * sum(one.low.size for one in requests),) * 2


def test_the_engine_stays_usable_after_an_interruption(engine: VLLMEngine, bundle: Bundle) -> None:
    requests = [request(number, bundle) for number in range(5)]
    whole = engine.upsample(requests)

    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        engine.upsample(requests, interrupt)
    for ours, theirs in zip(engine.upsample(requests), whole, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    ids = GenerationRequest(prefix_ids=(1, 17, 260), grammar=(Segment(5, 300, 310),), sampling=SamplingConfig(seed=1))
    assert len(engine.generate([ids])[0]) == 5


def test_what_the_upsampler_cannot_take_is_refused(engine: VLLMEngine, bundle: Bundle) -> None:
    assert engine.upsample([]) == []
    good = request(1, bundle)
    frames, height, width = bundle.geometry().latent_shape
    for low, words in (
        (good.low + 10_000, "every code must be in"),
        (np.zeros((frames + 1, height, width), np.int64), "Cut it into shorter clips"),
    ):
        with pytest.raises(ConfigError, match=words):
            engine.upsample([good, UpsamplingRequest(low=low)])


def test_an_engine_without_an_upsampler_says_so(bundle: Bundle, tmp_path: Path, engine: VLLMEngine) -> None:
    plain = tiny_bundle(tmp_path / "plain")
    with TorchEngine(plain.path) as torch_engine, pytest.raises(ConfigError, match="has no upsampler"):
        torch_engine.upsample([])
    engine.close()
    with pytest.raises(ConfigError, match="has no upsampler"):
        VLLMEngine(plain.path, decodings=["upsampling"])
    with VLLMEngine(bundle.path, dtype="float32") as other, pytest.raises(ConfigError, match="started with upsampling"):
        other.upsample([])
