"""The audio codec: shapes, causality, files, levels that can be cut, and the official weights."""

from __future__ import annotations

import copy
import dataclasses
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from encodec import EncodecModel
from torch import Tensor

from poet_tokenizers import audio_codebooks
from poet_tokenizers.audio import EncodecConfig, EncodecTokenizer, load_official_24khz
from poet_tokenizers.base import AudioTokenizer
from poet_tokenizers.errors import CheckpointError, ConfigError, ShapeError

HOP = 50
SMALL = EncodecConfig(
    sample_rate=1600, ratios=(2, 5, 5), num_filters=3, latent_size=7, num_codebooks=3, codebook_size=13
)


def _tokenizer(**changes: Any) -> EncodecTokenizer:
    torch.manual_seed(0)
    tokenizer = EncodecTokenizer(dataclasses.replace(SMALL, **changes))
    tokenizer.initialise_codebooks(_waveform(batch=5, length=40 * HOP))
    return tokenizer.eval()


def _waveform(batch: int = 2, length: int = 11 * HOP) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(batch, 1, length, generator=generator) * 1.6 - 0.8


@pytest.fixture(scope="module")
def tokenizer() -> EncodecTokenizer:
    return _tokenizer()


def test_codec_satisfies_the_protocol_and_names_its_spec(tokenizer: EncodecTokenizer) -> None:
    assert isinstance(tokenizer, AudioTokenizer)
    spec = tokenizer.spec
    assert (spec.kind, spec.sample_rate, spec.hop_length) == ("encodec", 1600, HOP)
    assert (spec.num_codebooks, spec.codebook_size, spec.checksum) == (3, 13, "")


@pytest.mark.parametrize(("length", "latents"), [(1, 1), (HOP, 1), (HOP + 1, 2), (11 * HOP - 1, 11), (11 * HOP, 11)])
def test_samples_round_up_to_whole_hops(tokenizer: EncodecTokenizer, length: int, latents: int) -> None:
    codes = tokenizer.encode(_waveform(length=length))
    assert codes.shape == (2, 3, latents)
    assert codes.dtype == torch.int64
    assert tokenizer.decode(codes).shape == (2, 1, latents * HOP)


def test_a_sound_is_padded_with_silence(tokenizer: EncodecTokenizer) -> None:
    waveform = _waveform(length=11 * HOP - 7)
    padded = torch.nn.functional.pad(waveform, (0, 7))
    assert torch.equal(tokenizer.encode(waveform), tokenizer.encode(padded))


def test_codes_use_every_level_and_stay_in_range(tokenizer: EncodecTokenizer) -> None:
    codes = tokenizer.encode(_waveform(length=101 * HOP))
    assert codes.min() >= 0
    assert codes.max() < 13
    assert all(len(level.unique()) > 3 for level in codes.unbind(dim=1))


def test_codes_do_not_depend_on_later_samples(tokenizer: EncodecTokenizer) -> None:
    waveform = _waveform()
    changed = waveform.clone()
    changed[..., 7 * HOP :] *= -0.5
    before, after = tokenizer.encode(waveform), tokenizer.encode(changed)
    assert torch.equal(before[..., :7], after[..., :7])
    assert not torch.equal(before[..., 7:], after[..., 7:])


def test_sound_does_not_depend_on_later_codes(tokenizer: EncodecTokenizer) -> None:
    codes = tokenizer.encode(_waveform())
    changed = codes.clone()
    changed[..., 7:] = (changed[..., 7:] + 1) % 13
    before, after = tokenizer.decode(codes), tokenizer.decode(changed)
    # One hop is exact up to the order of sums, which may differ where the convolution is cut differently.
    torch.testing.assert_close(before[..., : 7 * HOP], after[..., : 7 * HOP], atol=1e-6, rtol=0)
    assert (before[..., 7 * HOP :] - after[..., 7 * HOP :]).abs().max() > 1e-5


def test_decoding_a_prefix_gives_the_prefix_of_the_sound(tokenizer: EncodecTokenizer) -> None:
    codes = tokenizer.encode(_waveform())
    whole, prefix = tokenizer.decode(codes), tokenizer.decode(codes[..., :5])
    torch.testing.assert_close(whole[..., : 5 * HOP], prefix, atol=1e-6, rtol=0)


@pytest.mark.parametrize(("lead_in", "settled"), [(0, False), (2, True)])
def test_a_steady_sound_is_steady_from_its_first_hop_only_after_a_lead_in(lead_in: int, settled: bool) -> None:
    codec = _tokenizer(lead_in=lead_in, num_lstm_layers=0)
    hops = codec.decode(torch.full((1, 3, 7), 5)).reshape(7, HOP)
    torch.testing.assert_close(hops[3], hops[6])
    assert (float((hops[0] - hops[6]).abs().max()) < 1e-6) is settled


def test_sound_is_clamped_to_full_scale() -> None:
    loud = _tokenizer()
    with torch.no_grad():
        loud.decoder.model[-1].conv.conv.bias.fill_(3.0)
    assert loud.decode(torch.zeros(2, 3, 5, dtype=torch.int64)).max() == 1.0


def test_encoding_is_the_same_in_inference_mode_and_under_autocast(tokenizer: EncodecTokenizer) -> None:
    waveform = _waveform()
    plain = tokenizer.encode(waveform)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        codes = tokenizer.encode(waveform)
        assert tokenizer.decode(codes).dtype == torch.float32
    assert torch.equal(plain, codes)


@pytest.mark.parametrize(
    ("waveform", "complaint"),
    [
        (torch.zeros(2, 550), r"\(B, 1, S\)"),
        (torch.zeros(2, 2, 550), r"\(B, 1, S\)"),
        (torch.zeros(2, 1, 0), "at least one sample"),
        (torch.zeros(2, 1, 550, dtype=torch.int16), "floating point"),
        (torch.full((2, 1, 550), 12_000.0), "full scale"),
        (torch.full((2, 1, 550), float("nan")), "finite"),
    ],
)
def test_a_wrong_waveform_is_refused(tokenizer: EncodecTokenizer, waveform: Tensor, complaint: str) -> None:
    with pytest.raises(ShapeError, match=complaint):
        tokenizer.encode(waveform)


@pytest.mark.parametrize(
    ("codes", "complaint"),
    [
        (torch.zeros(3, 11, dtype=torch.int64), r"\(B, 3, T\)"),
        (torch.zeros(2, 2, 11, dtype=torch.int64), r"\(B, 3, T\)"),
        (torch.zeros(2, 3, 0, dtype=torch.int64), "at least one latent frame"),
        (torch.zeros(2, 3, 11), "int64"),
        (torch.full((2, 3, 11), 13), r"\[0, 13\)"),
        (torch.full((2, 3, 11), -1), r"\[0, 13\)"),
    ],
)
def test_wrong_codes_are_refused(tokenizer: EncodecTokenizer, codes: Tensor, complaint: str) -> None:
    with pytest.raises(ShapeError, match=complaint):
        tokenizer.decode(codes)


@pytest.mark.parametrize(
    "wrong",
    [
        {"ratios": ()},
        {"ratios": (5, 1)},
        {"num_filters": 0},
        {"num_codebooks": True},
        {"sample_rate": 16_000.5},
        {"pad_mode": "zeros"},
        {"decoder_num_filters": 0},
        {"decoder_lstm_layers": -1},
    ],
)
def test_a_wrong_configuration_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        EncodecConfig(**wrong)


def test_a_decoder_may_have_a_shape_of_its_own_and_changes_no_code(tokenizer: EncodecTokenizer, tmp_path: Path) -> None:
    config = dataclasses.replace(SMALL, decoder_num_filters=5, decoder_residual_layers=2, decoder_lstm_layers=0)
    renewed = tokenizer.with_new_decoder(config).eval()
    waveform = _waveform()
    codes = tokenizer.encode(waveform)
    assert torch.equal(renewed.encode(waveform), codes)
    assert renewed.decode(codes).shape == tokenizer.decode(codes).shape
    assert not torch.equal(renewed.decode(codes), tokenizer.decode(codes))
    renewed.save(tmp_path)
    loaded = EncodecTokenizer.load(tmp_path)
    assert loaded.config == config
    assert torch.equal(loaded.decode(codes), renewed.decode(codes))
    with pytest.raises(ConfigError, match="only the decoder may be new"):
        tokenizer.with_new_decoder(dataclasses.replace(config, latent_size=SMALL.latent_size + 1))


def test_a_decoder_may_be_stored_in_half_the_bytes_and_the_codes_stay(
    tokenizer: EncodecTokenizer, tmp_path: Path
) -> None:
    whole, half = copy.deepcopy(tokenizer), copy.deepcopy(tokenizer)
    whole.save(tmp_path / "whole")
    half.save(tmp_path / "half", torch.float16)
    loaded = EncodecTokenizer.load(tmp_path / "half")
    assert loaded.spec == whole.spec
    waveform = _waveform()
    codes = whole.encode(waveform)
    assert torch.equal(loaded.encode(waveform), codes)
    assert torch.equal(loaded.decode(codes), half.decode(codes))
    assert not torch.equal(loaded.decode(codes), whole.decode(codes))
    torch.testing.assert_close(loaded.decode(codes), whole.decode(codes), atol=1e-2, rtol=1e-2)
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("half", "whole")]
    assert sizes[0] < 0.85 * sizes[1]


def test_a_configuration_from_before_decoders_had_keys_of_their_own_is_read() -> None:
    values = dataclasses.asdict(SMALL)
    for name in ("decoder_num_filters", "decoder_residual_layers", "decoder_lstm_layers"):
        del values[name]
    assert EncodecConfig.from_dict(values) == SMALL
    with pytest.raises(ConfigError, match="latent_size"):
        EncodecConfig.from_dict({name: value for name, value in values.items() if name != "latent_size"})


def test_a_saved_codec_comes_back_the_same(tokenizer: EncodecTokenizer, tmp_path: Path) -> None:
    saved = copy.deepcopy(tokenizer)
    saved.save(tmp_path)
    loaded = EncodecTokenizer.load(tmp_path)
    waveform = _waveform()
    codes = saved.encode(waveform)
    assert torch.equal(loaded.encode(waveform), codes)
    assert torch.equal(loaded.decode(codes), saved.decode(codes))
    assert loaded.spec == saved.spec
    assert len(loaded.spec.checksum) == 64
    assert not loaded.training


def test_the_checksum_stays_while_the_weights_do(tokenizer: EncodecTokenizer, tmp_path: Path) -> None:
    first, second = copy.deepcopy(tokenizer), copy.deepcopy(tokenizer)
    first.save(tmp_path / "first")
    EncodecTokenizer.load(tmp_path / "first").save(tmp_path / "again")
    assert EncodecTokenizer.load(tmp_path / "again").spec == first.spec
    with torch.no_grad():
        second.quantizer.vq.layers[2]._codebook.embed[5, 3] += 1e-6
    second.save(tmp_path / "second")
    assert second.spec.checksum != first.spec.checksum


def test_another_decoder_leaves_the_spec_and_another_encoder_does_not(
    tokenizer: EncodecTokenizer, tmp_path: Path
) -> None:
    tokenizer.save(tmp_path / "first")
    for part in ("decoder", "encoder"):
        changed = copy.deepcopy(tokenizer)
        with torch.no_grad():
            next(changed.get_submodule(part).parameters()).mul_(1.5)
        changed.save(tmp_path / part)
        assert (EncodecTokenizer.load(tmp_path / part).spec == tokenizer.spec) == (part == "decoder")


def test_training_forgets_the_checksum(tokenizer: EncodecTokenizer, tmp_path: Path) -> None:
    saved = copy.deepcopy(tokenizer)
    saved.save(tmp_path)
    assert saved.eval().spec.checksum
    assert saved.train().spec.checksum == ""


def test_fewer_levels_give_the_same_first_codes_and_another_checksum(tmp_path: Path) -> None:
    whole = _tokenizer()
    whole.save(tmp_path)
    cut = whole.with_num_codebooks(2)
    waveform = _waveform()
    assert torch.equal(cut.encode(waveform), whole.encode(waveform)[:, :2])
    assert cut.spec.num_codebooks == 2
    assert len(cut.spec.checksum) == 64
    assert cut.spec.checksum != whole.spec.checksum
    assert whole.with_num_codebooks(3).spec == whole.spec
    assert _tokenizer().with_num_codebooks(2).spec.checksum == ""


@pytest.mark.parametrize("levels", [0, 4])
def test_levels_that_do_not_exist_cannot_be_kept(tokenizer: EncodecTokenizer, levels: int) -> None:
    with pytest.raises(ConfigError, match=r"1\.\.3"):
        tokenizer.with_num_codebooks(levels)


def test_gradients_reach_the_encoder_through_the_quantizer() -> None:
    codec = _tokenizer().train()
    result = codec(_waveform(), 2)
    assert result.codes is not None
    assert result.codes.shape == (2, 2, 11)
    (result.waveform.square().mean() + result.commitment).backward()
    gradient = codec.encoder.model[0].conv.conv.weight_v.grad
    assert gradient is not None
    assert gradient.abs().max() > 0


def test_a_forward_pass_without_quantisation_beats_one_level() -> None:
    codec = _tokenizer()
    latents = codec._latents(_waveform())
    errors = []
    for levels in (1, 2, 3):
        quantized, _, _ = codec.quantizer.vq(latents.reshape(2, 11, 7).transpose(1, 2), n_q=levels)
        errors.append(float((quantized.transpose(1, 2).reshape(22, 7) - latents).square().mean()))
    assert errors[0] > errors[1] > errors[2] > 0
    assert codec(_waveform(), 0).codes is None


def test_dead_codes_move_to_latents_that_are_badly_served() -> None:
    codec = _tokenizer()
    book = codec.quantizer.vq.layers[1]._codebook
    book.embed[:5] = 1e3
    book.embed_avg[:5] = 1e3 * 1e-9
    book.cluster_size[:5] = 1e-9
    assert audio_codebooks.revive(codec.quantizer, codec._latents(_waveform()), threshold=0.05) == 5
    assert book.embed.abs().max() < 100
    # The moving average of the next step must not carry the codes back.
    codec.train()(_waveform(), 3)
    assert book.embed.abs().max() < 100


def test_official_weights_give_the_codes_of_the_official_model(tmp_path: Path) -> None:
    torch.manual_seed(0)
    official = EncodecModel.encodec_model_24khz(pretrained=False)
    for level in official.quantizer.vq.layers:
        level._codebook.embed.normal_(std=0.1)
        level._codebook.inited.fill_(1.0)
    torch.save(official.state_dict(), tmp_path / "official.th")
    ours = load_official_24khz(tmp_path / "official.th", num_codebooks=4)
    assert (ours.spec.hop_length, ours.spec.sample_rate, ours.spec.frame_rate) == (320, 24_000, 75)
    waveform = _waveform(length=24_000 // 4)
    official.set_target_bandwidth(3.0)
    with torch.no_grad():
        frames = official.encode(torch.nn.functional.pad(waveform, (0, -waveform.shape[-1] % 320)))
        expected = official.decode(frames).clamp(-1, 1)
    assert torch.equal(ours.encode(waveform), frames[0][0])
    torch.testing.assert_close(ours.decode(frames[0][0]), expected)


def test_a_missing_or_foreign_official_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such file"):
        load_official_24khz(tmp_path / "nowhere.th")
    garbage = tmp_path / "garbage.th"
    garbage.write_bytes(b"<html>not found</html>")
    with pytest.raises(CheckpointError, match=r"garbage\.th must be a plain PyTorch state dict"):
        load_official_24khz(garbage)
    torch.save([1, 2, 3], tmp_path / "list.th")
    with pytest.raises(CheckpointError, match="state dict of tensors"):
        load_official_24khz(tmp_path / "list.th")
    torch.save(_tokenizer().state_dict(), tmp_path / "other.th")
    with pytest.raises(CheckpointError, match=r"missing: .* unexpected: "):
        load_official_24khz(tmp_path / "other.th")


class Harmful:
    """Pickled, it makes a directory when it is opened."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def test_a_pickle_that_would_run_code_is_not_opened(tmp_path: Path) -> None:
    torch.save({"weights": Harmful(tmp_path / "harm")}, tmp_path / "pickle.th")
    with pytest.raises(CheckpointError, match="plain PyTorch state dict"):
        load_official_24khz(tmp_path / "pickle.th")
    assert not (tmp_path / "harm").exists()
