import dataclasses
import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

from poet.bundle import (
    Bundle,
    GenerationDefaults,
    check_fingerprint,
    default_bundle,
)
from poet.bundle_writing import create_tokenizer_bundle, export_bundle
from poet.errors import CheckpointError, ConfigError, ShapeError, VocabularyError
from poet.testing import save_tiny_tokenizers, tiny_bundle, tiny_config, tiny_defaults, tiny_tokenizer_bundle
from poet.vocabulary import Vocabulary


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory) -> tuple[Path, Path, Path]:
    return save_tiny_tokenizers(tmp_path_factory.mktemp("tokenizers"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Bundle:
    return tiny_bundle(tmp_path_factory.mktemp("bundles") / "whole", temperature=0.7)


@pytest.fixture
def copy(whole, tmp_path) -> Path:
    """A bundle to damage."""
    return Path(shutil.copytree(whole.path, tmp_path / "copy"))


def edit(file: Path, **changes: object) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def test_a_bundle_opens_with_everything_that_was_put_into_it(whole):
    assert sorted(path.name for path in whole.path.iterdir()) == [
        *("README.md", "audio_tokenizer", "config.json", "generation_config.json", "model.safetensors"),
        *("text_tokenizer", "video_tokenizer", "vocabulary.json"),
    ]
    again = Bundle.open(str(whole.path))
    assert again.vocabulary == whole.vocabulary
    assert again.generation_config == tiny_defaults(temperature=0.7)
    assert again.model_config == tiny_config(whole.vocabulary)
    assert again.config["poet_fingerprint"] == again.fingerprint == whole.vocabulary.fingerprint
    assert again.upsampler is None
    with safe_open(again.weights, "pt") as weights:
        embedding = weights.get_tensor("model.embed_tokens.weight")
    assert embedding.shape == (whole.vocabulary.padded_vocab_size, 48)


def test_the_tokenizers_of_a_bundle_load_once_and_are_those_of_its_vocabulary(whole):
    assert whole.video_tokenizer is whole.video_tokenizer
    for kind in ("video", "audio", "text"):
        spec = getattr(whole, f"{kind}_tokenizer").spec
        assert dataclasses.asdict(spec) == whole.vocabulary.tokenizers[kind]
    geometry = whole.geometry()
    video = torch.rand(1, 3, geometry.num_frames, geometry.height, geometry.width) * 2 - 1
    assert tuple(whole.video_tokenizer.encode(video).shape[1:]) == geometry.latent_shape
    waveform = torch.rand(1, 1, geometry.num_samples(geometry.num_frames)) * 2 - 1
    assert whole.audio_tokenizer.encode(waveform).shape[1:] == (3, geometry.num_audio_latents(geometry.num_frames))
    assert whole.text_tokenizer.decode(whole.text_tokenizer.encode("a small red star")) == "a small red star"


def test_two_tiny_bundles_of_one_seed_are_equal_and_of_two_are_not(tmp_path, whole):
    same, other = tiny_tokenizer_bundle(tmp_path / "same"), tiny_tokenizer_bundle(tmp_path / "other", seed=1)
    assert same.fingerprint == whole.fingerprint != other.fingerprint


def test_a_tokenizer_bundle_opens_only_where_no_model_is_needed(tokenizers, tmp_path):
    made = create_tokenizer_bundle(tmp_path / "b", *tokenizers, [(24, 40)], tiny_defaults())
    assert made.config is None and made.vocabulary.resolutions == ((24, 40),)
    assert Bundle.open(tmp_path / "b", require_model=False).fingerprint == made.fingerprint
    with pytest.raises(CheckpointError, match=r"b lacks config\.json, model\.safetensors\."):
        Bundle.open(tmp_path / "b")
    with pytest.raises(CheckpointError, match="holds no model, only tokenizers"):
        _ = made.weights
    with pytest.raises(CheckpointError, match="holds no model, only tokenizers"):
        _ = made.model_config
    with pytest.raises(CheckpointError, match="holds no model, only tokenizers"):
        _ = made.weights_sha256
    assert made.trained_tasks is None


def _weights_sha256(bundle: Path, content: bytes) -> str:
    codecs = (json.loads((bundle / f"{kind}_tokenizer" / "config.json").read_text()) for kind in ("video", "audio"))
    return hashlib.sha256(content + "".join(codec["weights"] for codec in codecs).encode()).hexdigest()


def test_the_weights_checksum_is_of_model_and_codecs_and_read_once(copy):
    bundle = Bundle.open(copy)
    assert "weights_sha256" not in vars(bundle)
    expected = _weights_sha256(copy, (copy / "model.safetensors").read_bytes())
    assert bundle.weights_sha256 == expected
    (copy / "model.safetensors").write_bytes(b"others")
    assert bundle.weights_sha256 == expected
    assert Bundle.open(copy).weights_sha256 == _weights_sha256(copy, b"others")


@pytest.mark.parametrize("kind", ["video", "audio"])
def test_another_decoder_is_the_same_vocabulary_and_another_checksum_of_weights(kind, copy):
    before = Bundle.open(copy)
    first = before.weights_sha256
    tokenizer = getattr(before, f"{kind}_tokenizer")
    with torch.no_grad():
        next(tokenizer.decoder.parameters()).mul_(1.5)
    tokenizer.save(copy / f"{kind}_tokenizer")
    after = Bundle.open(copy)
    assert after.fingerprint == before.fingerprint
    assert after.weights_sha256 != first


def test_the_checksum_of_weights_in_several_files_covers_all_of_them(copy):
    (copy / "model.safetensors").unlink()
    weight_map = {"a": "model-2.safetensors", "b": "model-1.safetensors", "c": "model-2.safetensors"}
    (copy / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (copy / "model-1.safetensors").write_bytes(b"one")
    with pytest.raises(CheckpointError, match=r"model-2\.safetensors cannot be read"):
        _ = Bundle.open(copy).weights_sha256
    (copy / "model-2.safetensors").write_bytes(b"two")
    assert Bundle.open(copy).weights_sha256 == _weights_sha256(copy, b"onetwo")


def test_geometry_takes_what_is_given_and_defaults_for_the_rest(whole):
    assert whole.geometry().latent_shape == (2, 3, 5)
    assert whole.geometry(num_frames=13, height=56, width=88).latent_shape == (4, 7, 11)
    assert whole.geometry(fps=4.0).num_audio_latents(5) == 40
    with pytest.raises(ShapeError, match="Take 5 or 9"):
        whole.geometry(num_frames=7)
    with pytest.raises(VocabularyError, match="got 24 x 88"):
        whole.geometry(width=88)


@pytest.mark.parametrize(
    "name", ["config.json", "generation_config.json", "model.safetensors", "text_tokenizer", "vocabulary.json"]
)
def test_a_missing_part_is_named(copy, name):
    part = copy / name
    shutil.rmtree(part) if part.is_dir() else part.unlink()
    for require_model in (True, False):
        with pytest.raises(CheckpointError, match=f"copy lacks {name}"):
            Bundle.open(copy, require_model=require_model)


def test_a_directory_that_is_not_there_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"there is no bundle at .*nowhere"):
        Bundle.open(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"lacks vocabulary\.json, generation_config\.json, video_tokenizer/"):
        Bundle.open(tmp_path)


def test_a_model_of_another_vocabulary_is_refused_with_both_fingerprints(copy, whole):
    edit(copy / "config.json", poet_fingerprint="f" * 64)
    with pytest.raises(CheckpointError) as caught:
        Bundle.open(copy)
    message = str(caught.value)
    assert "f" * 12 in message and whole.fingerprint[:12] in message and "f" * 13 not in message
    assert "tokenizers that it was trained with" in message


def test_a_tokenizer_of_another_vocabulary_is_refused_when_the_bundle_opens(copy, tmp_path):
    other = save_tiny_tokenizers(tmp_path / "other", seed=1)
    for kind, directory in zip(("video", "audio"), other, strict=False):
        kept = shutil.move(copy / f"{kind}_tokenizer", tmp_path / "kept")
        shutil.copytree(directory, copy / f"{kind}_tokenizer")
        with pytest.raises(CheckpointError, match=f"{kind}_tokenizer is not the tokenizer .* its checksum is"):
            Bundle.open(copy)
        shutil.rmtree(copy / f"{kind}_tokenizer")
        shutil.move(kept, copy / f"{kind}_tokenizer")
    Bundle.open(copy)


def test_a_tokenizer_that_was_changed_after_opening_is_refused_when_it_loads(copy, tmp_path):
    bundle = Bundle.open(copy)
    other = save_tiny_tokenizers(tmp_path / "other", seed=1)
    shutil.rmtree(copy / "audio_tokenizer")
    shutil.copytree(other[1], copy / "audio_tokenizer")
    with pytest.raises(CheckpointError, match="audio_tokenizer is not the tokenizer"):
        _ = bundle.audio_tokenizer


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ("config.json", {"vocab_size": 768}, "must have the vocab_size 640 of the vocabulary beside it, it has 768"),
        ("config.json", {"hidden_act": "gelu"}, "hidden_act must be 'silu'"),
        ("config.json", {"trained_tasks": "captioning"}, "trained_tasks must be a list .*, got 'captioning'"),
        ("config.json", {"trained_tasks": [7]}, r"trained_tasks must be a list .*, got \[7\]"),
        ("config.json", {"trained_tasks": []}, r"trained_tasks must be a list .*, got \[\]"),
        ("generation_config.json", {"height": 32}, "does not fit vocabulary.json beside it"),
        ("generation_config.json", {"num_frames": 6}, "num_frames must be 1"),
        ("generation_config.json", {"flavour": 1}, r"unknown keys \['flavour'\]"),
        ("generation_config.json", {"task": "captoning"}, "Did you mean captioning"),
        ("vocabulary.json", {"fingerprint": "0"}, "says that its fingerprint is 0"),
        ("video_tokenizer/config.json", {"kind": "other"}, "its kind is other, but it must be magvit2"),
    ],
)
def test_an_edited_file_is_refused_and_the_edit_named(copy, file, changes, message):
    edit(copy / file, **changes)
    with pytest.raises(CheckpointError, match=message):
        Bundle.open(copy)


def test_a_task_that_the_model_was_not_trained_on_is_refused_with_those_that_it_was(copy, whole):
    assert whole.trained_tasks is None
    whole.check_trained("inpainting")
    edit(copy / "config.json", trained_tasks=["text_to_audio", "captioning"])
    bundle = Bundle.open(copy)
    assert bundle.trained_tasks == ("text_to_audio", "captioning")
    assert bundle.fingerprint == whole.fingerprint
    assert bundle.model_config == whole.model_config
    bundle.check_trained("captioning")
    with pytest.raises(ConfigError, match="copy was trained on: text_to_audio, captioning; got 'inpainting'"):
        bundle.check_trained("inpainting")


def test_a_broken_file_is_named(copy):
    (copy / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json cannot be read as JSON"):
        Bundle.open(copy)
    (copy / "config.json").write_text("[]")
    with pytest.raises(CheckpointError, match=r"config\.json must hold a JSON object, it holds a list"):
        Bundle.open(copy)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fps": 0}, "fps must be positive"),
        ({"temperature": -0.1}, "temperature"),
        ({"top_p": 0.0}, r"top_p in \(0, 1\]"),
        ({"top_k": -1}, "top_k must be an integer of at least 0, got -1"),
        ({"num_frames": 5.0}, "num_frames must be an integer"),
        ({"guidance_scale": float("inf")}, "guidance_scale must be a finite number"),
        ({"parallel": {"num_steps": 0}}, "num_steps must be an integer of at least 1"),
        ({"parallel": {"guidance_scale": -1}}, "guidance_scale must not be negative"),
        ({"parallel": {"guidance_start": 0.5, "guidance_stop": 0.4}}, "0 <= guidance_start <= guidance_stop"),
        ({"parallel": {"guidance_stop": "1"}}, "guidance_stop must be a finite number"),
        ({"parallel": {"steps": 4}}, r"unknown keys \['parallel.steps'\]"),
        ({"parallel": 4}, "parallel must be an object"),
    ],
)
def test_defaults_out_of_range_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        GenerationDefaults.from_dict(dataclasses.asdict(tiny_defaults()) | changes)


def test_defaults_come_back_from_a_dictionary_and_keys_are_checked():
    values = dataclasses.asdict(tiny_defaults(top_k=17))
    assert GenerationDefaults.from_dict(values) == tiny_defaults(top_k=17)
    del values["parallel"]  # a bundle of before there was any
    assert GenerationDefaults.from_dict(values) == tiny_defaults(top_k=17)
    before = GenerationDefaults.from_dict(values | {"guidance_scale": 3.0})
    assert before.sampling(parallel=True) == before.sampling(parallel=False)
    del values["fps"]
    with pytest.raises(ConfigError, match=r"lack the keys \['fps'\]"):
        GenerationDefaults.from_dict(values)


def export(
    source: Bundle, directory: Path, config=None, write=lambda path: path.write_bytes(b"w"), **options
) -> Bundle:
    config = tiny_config(source.vocabulary).to_huggingface_dict() if config is None else config
    return export_bundle(directory, source, config, write, **options)


def test_export_adds_the_fingerprint_and_refuses_another(whole, tmp_path):
    made = export(whole, tmp_path / "made")
    assert made.config["poet_fingerprint"] == whole.fingerprint
    assert not (made.path / "README.md").exists()
    with pytest.raises(CheckpointError, match="eeeeeeeeeeee, but it must be " + whole.fingerprint[:12]):
        export(whole, tmp_path / "other", {**made.config, "poet_fingerprint": "e" * 64})
    assert [path.name for path in tmp_path.iterdir()] == ["made"]


def test_an_upsampler_goes_along(copy, tmp_path):
    (copy / "upsampler").mkdir()
    (copy / "upsampler" / "config.json").write_text("{}")
    made = export(Bundle.open(copy), tmp_path / "made")
    assert (made.upsampler / "config.json").read_text() == "{}"


def test_phrases_go_along_and_change_no_fingerprint(copy, tmp_path):
    before = Bundle.open(copy)
    assert before.phrases_file is None
    assert export(before, tmp_path / "without").phrases_file is None
    (copy / "phrases.json").write_text('{"phrases": []}')
    made = export(Bundle.open(copy), tmp_path / "made")
    assert made.phrases_file == tmp_path / "made" / "phrases.json"
    assert made.phrases_file.read_text() == '{"phrases": []}'
    assert (made.fingerprint, before.weights_sha256) == (before.fingerprint, Bundle.open(copy).weights_sha256)


def test_a_failure_while_the_weights_are_written_leaves_nothing_behind(whole, tmp_path):
    def interrupted(path: Path) -> None:
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export(whole, tmp_path / "made", write=interrupted)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(CheckpointError, match=r"lacks model\.safetensors"):
        export(whole, tmp_path / "made", write=lambda path: None)
    assert list(tmp_path.iterdir()) == []


def test_nothing_appears_under_the_name_of_the_bundle_before_it_is_whole(whole, tmp_path):
    def looking(path: Path) -> None:
        assert not (tmp_path / "made").exists()
        path.write_bytes(b"w")

    export(whole, tmp_path / "made", write=looking)
    assert [path.name for path in tmp_path.iterdir()] == ["made"]


def test_a_bundle_is_replaced_only_when_asked_and_kept_when_that_fails(whole, tmp_path):
    export(whole, tmp_path / "made", model_card="first")
    with pytest.raises(CheckpointError, match="made exists already"):
        export(whole, tmp_path / "made", model_card="second")
    with pytest.raises(CheckpointError, match="lacks"):
        export(whole, tmp_path / "made", model_card="second", write=lambda path: None, overwrite=True)
    assert (tmp_path / "made" / "README.md").read_text() == "first"
    export(whole, tmp_path / "made", model_card="second", overwrite=True)
    assert (tmp_path / "made" / "README.md").read_text() == "second"
    assert [path.name for path in tmp_path.iterdir()] == ["made"]


def test_defaults_that_the_vocabulary_lacks_make_no_bundle(tokenizers, tmp_path):
    with pytest.raises(CheckpointError, match="got 24 x 40"):
        create_tokenizer_bundle(tmp_path / "b", *tokenizers, [(56, 88)], tiny_defaults())
    assert list(tmp_path.iterdir()) == []


def test_check_fingerprint_lets_equal_ones_pass_and_names_a_missing_one():
    check_fingerprint("a" * 64, "a" * 64, "the shards", "Encode them again.")
    with pytest.raises(CheckpointError, match=r"the shards belongs to .* fingerprint none, .* Encode them again"):
        check_fingerprint("", "a" * 64, "the shards", "Encode them again.")


def test_the_default_bundle_lies_inside_the_package():
    import poet

    assert default_bundle() == Path(poet.__file__).parent / "bundles" / "nano"


def test_codes_of_the_tiny_tokenizers_pack_into_scenes_of_its_model(whole):
    from poet.sequence import pack
    from poet.testing import random_scene

    scene = random_scene(
        "audio_video_continuation", whole.vocabulary, np.random.default_rng(0), geometry=whole.geometry()
    )
    packed = pack(scene, whole.vocabulary)
    assert isinstance(whole.vocabulary, Vocabulary)
    assert packed.ids.max() < whole.model_config.vocab_size and len(packed.ids) <= whole.model_config.scene_length
