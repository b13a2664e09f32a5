"""Sound to codes and back: EnCodec's SEANet autoencoder with residual vector quantisation.

The layers come from the `encodec` package; this file gives them a configuration, checks, a file format without pickle
and a start for the codebooks that survives short training. Everything is causal: the codes of a hop depend on samples
up to the end of that hop, and the samples of a hop on codes up to that hop, so a sound can be decoded while its later
codes are still being written. Knows codes, never the shared vocabulary's ids.

Legend: B clips, S samples, T latent frames, K codebooks, D latent size, C codes a codebook.

Source: Defossez et al., "High Fidelity Neural Audio Compression", arXiv:2210.13438, sections 3.1 and 3.2.
"""

from __future__ import annotations

import dataclasses
import math
import pickle
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Self

import torch
from einops import rearrange
from encodec.modules import SEANetDecoder, SEANetEncoder
from encodec.quantization import ResidualVectorQuantizer
from torch import Tensor, nn
from torch.nn import functional as F

from poet_tokenizers import audio_codebooks, checkpoint
from poet_tokenizers.base import AudioSpec
from poet_tokenizers.errors import CheckpointError, ConfigError, ShapeError

__all__ = ["AudioReconstruction", "EncodecConfig", "EncodecTokenizer", "load_official_24khz"]

KIND: Final = "encodec"

# Lossy formats overshoot full scale a little when they are decoded; 16-bit integers overshoot it a lot.
_LARGEST_SAMPLE = 2.0
# Statistics that only training reads; they are rebuilt from the codebook when a tokenizer is loaded.
_TRAINING_ONLY = ("cluster_size", "embed_avg", "inited")
_DECODER_KEYS: Final = frozenset({"decoder_num_filters", "decoder_residual_layers", "decoder_lstm_layers"})


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncodecConfig:
    """The shape of the codec.

    Attributes:
        sample_rate: samples a second.
        ratios: strides of the decoder from coarse to fine; the encoder takes them backwards. Their product is the hop.
        num_filters: channels at the full sample rate; they double with every stride.
        latent_size: D, the size of a code's vector.
        num_residual_layers: residual blocks at each rate.
        num_lstm_layers: LSTM layers at the latent rate, in encoder and decoder each.
        num_codebooks: K, levels of the residual quantiser.
        codebook_size: C, codes a level.
        pad_mode: what stands before the first sample: "replicate" (it goes on as it starts, so that silence begins
            without a click), "constant" (zeros) or "reflect" (as in the official weights, not strictly causal).
        lead_in: copies of the first latent that are decoded ahead and dropped, so that a sound starts with the decoder
            settled; without any, silence starts with a click.
        decoder_num_filters: as `num_filters`, for the decoder alone; None for the encoder's. A larger decoder makes
            more of the same codes.
        decoder_residual_layers: as `num_residual_layers`, for the decoder alone; None for the encoder's.
        decoder_lstm_layers: as `num_lstm_layers`, for the decoder alone; None for the encoder's.
    """

    sample_rate: int = 16_000
    ratios: tuple[int, ...] = (2, 5, 5, 10)
    num_filters: int = 16
    latent_size: int = 64
    num_residual_layers: int = 0
    num_lstm_layers: int = 1
    num_codebooks: int = 4
    codebook_size: int = 1024
    pad_mode: str = "replicate"
    lead_in: int = 2
    decoder_num_filters: int | None = None
    decoder_residual_layers: int | None = None
    decoder_lstm_layers: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "ratios", tuple(self.ratios))
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if not str(field.type).startswith("int") or (value is None and field.name.startswith("decoder_")):
                continue
            low = 0 if field.name.endswith(("residual_layers", "lstm_layers", "lead_in")) else 1
            if not isinstance(value, int) or isinstance(value, bool) or value < low:
                raise ConfigError(f"{field.name} must be an integer of at least {low}, got {value!r}.")
        if not self.ratios or any(not isinstance(ratio, int) or ratio < 2 for ratio in self.ratios):
            raise ConfigError(f"ratios must be one or more integers of at least 2, got {self.ratios}.")
        if self.pad_mode not in ("replicate", "constant", "reflect"):
            raise ConfigError(f'pad_mode must be "replicate", "constant" or "reflect", got {self.pad_mode!r}.')

    @property
    def hop_length(self) -> int:
        """Samples a latent frame."""
        return math.prod(self.ratios)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The inverse of `dataclasses.asdict`; the keys of the decoder alone may be left out.

        Raises:
            ConfigError: an unknown or missing key, or a value out of range.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        demanded = known - _DECODER_KEYS
        if not demanded <= values.keys() <= known:
            raise ConfigError(f"an EnCodec configuration must have the keys {sorted(demanded)}, got {sorted(values)}.")
        return cls(**values)

    def has_codes_of(self, other: EncodecConfig) -> bool:
        """Whether the two differ in their decoders at most, so that one's decoder can read the other's codes."""
        names = [field.name for field in dataclasses.fields(self) if field.name not in _DECODER_KEYS]
        return all(getattr(self, name) == getattr(other, name) for name in names)


@dataclasses.dataclass(frozen=True)
class AudioReconstruction:
    """What `EncodecTokenizer.forward` returns: (B, 1, S) sound, (B, K, T) codes or None, scalar commitment loss."""

    waveform: Tensor
    codes: Tensor | None
    commitment: Tensor


class EncodecTokenizer(nn.Module):
    """SEANet encoder, residual vector quantiser, SEANet decoder. Parameters are named as in EnCodec's own weights.

    Args:
        config: the shape of the codec.
        checksum: of what decides the codes, when it is known to be final; "" while training.
    """

    def __init__(self, config: EncodecConfig, checksum: str = "") -> None:
        super().__init__()
        self.config = config
        self.checksum = checksum
        layers = {
            "channels": 1,
            "dimension": config.latent_size,
            "n_filters": config.num_filters,
            "n_residual_layers": config.num_residual_layers,
            "ratios": list(config.ratios),
            "lstm": config.num_lstm_layers,
            "norm": "weight_norm",
            "causal": True,
            "pad_mode": config.pad_mode,
        }
        own = {
            "n_filters": config.decoder_num_filters,
            "n_residual_layers": config.decoder_residual_layers,
            "lstm": config.decoder_lstm_layers,
        }
        decoder_layers = layers | {name: value for name, value in own.items() if value is not None}
        with warnings.catch_warnings():  # torch renamed weight_norm; the old one keeps the official weights' names
            warnings.filterwarnings("ignore", message=".*weight_norm.*", category=FutureWarning)
            self.encoder = SEANetEncoder(**layers)
            self.decoder = SEANetDecoder(**decoder_layers)
        # The package's own k-means start and dead-code replacement are off; `audio_codebooks` says why.
        self.quantizer = ResidualVectorQuantizer(
            dimension=config.latent_size,
            n_q=config.num_codebooks,
            bins=config.codebook_size,
            kmeans_init=False,
            threshold_ema_dead_code=0,
        )
        audio_codebooks.reset_statistics(self.quantizer)

    @property
    def spec(self) -> AudioSpec:
        """What the shared vocabulary has to know; the checksum is "" until the tokenizer was saved or loaded."""
        return AudioSpec(
            kind=KIND,
            sample_rate=self.config.sample_rate,
            hop_length=self.config.hop_length,
            num_codebooks=self.config.num_codebooks,
            codebook_size=self.config.codebook_size,
            checksum=self.checksum,
        )

    def train(self, mode: bool = True) -> Self:
        """Switch to training, which forgets the checksum because the weights are about to change."""
        if mode:
            self.checksum = ""
        return super().train(mode)

    def __deepcopy__(self, memo: dict[int, object]) -> EncodecTokenizer:
        """A copy with weights of its own; torch cannot copy weight_norm's derived tensors by itself."""
        twin = EncodecTokenizer(self.config).to(next(self.parameters()).device)
        twin.load_state_dict(self.state_dict())
        twin.train(self.training)
        twin.checksum = self.checksum
        memo[id(self)] = twin
        return twin

    @torch.no_grad()
    def encode(self, waveform: Tensor) -> Tensor:
        """Find the codes of a sound.

        Args:
            waveform: (B, 1, S) floating point in [-1, 1] at `sample_rate`; padded with zeros to whole hops.

        Returns:
            (B, K, T) int64 in [0, codebook_size), T = S / hop_length rounded up. Level 0 is the coarsest.

        Raises:
            ShapeError: waveform is not (B, 1, S) with S >= 1, not floating point, not finite, or out of range.
        """
        self._check_waveform(waveform)
        with torch.autocast(waveform.device.type, enabled=False):
            latents = self.encoder(self._whole_hops(waveform.float()))
            return rearrange(self.quantizer.vq.encode(latents), "k b t -> b k t")

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """Make the sound of codes; the inverse of `encode` up to what the codec loses.

        Args:
            codes: (B, K, T) int64 in [0, codebook_size), K = num_codebooks.

        Returns:
            (B, 1, T * hop_length) float32 in [-1, 1].

        Raises:
            ShapeError: codes has another shape, another dtype, or codes out of range.
        """
        self._check_codes(codes)
        with torch.autocast(codes.device.type, enabled=False):
            latents = self.quantizer.vq.decode(rearrange(codes, "b k t -> k b t"))
            return self._decode_latents(latents).clamp(-1.0, 1.0)

    def forward(self, waveform: Tensor, num_codebooks: int | None = None) -> AudioReconstruction:
        """Encode, quantise with a straight-through gradient, and decode; in training mode the codebooks follow.

        Args:
            waveform: (B, 1, S) float32, S a multiple of the hop.
            num_codebooks: levels to quantise with, coarse to fine; None for all, 0 for no quantisation.

        Returns:
            The reconstruction, unclamped, with codes of `num_codebooks` levels.

        Raises:
            ShapeError: S is not a multiple of the hop.
        """
        if waveform.shape[-1] % self.config.hop_length:
            raise ShapeError(
                f"a training sound must have whole hops of {self.config.hop_length} samples, got {waveform.shape[-1]}. "
                f"Crop or pad it first."
            )
        latents = self.encoder(waveform)
        if num_codebooks == 0:
            return AudioReconstruction(self._decode_latents(latents), None, latents.new_zeros(()))
        quantized, codes, commitment = self.quantizer.vq(latents, n_q=num_codebooks)
        waveform = self._decode_latents(quantized)
        return AudioReconstruction(waveform, rearrange(codes, "k b t -> b k t"), commitment.mean())

    def initialise_codebooks(self, waveforms: Tensor) -> None:
        """Place the codebooks on the latents of these sounds, (B, 1, S) of whole hops: see `audio_codebooks`."""
        audio_codebooks.initialise(self.quantizer, self._latents(waveforms))

    def revive_codebooks(self, waveforms: Tensor, threshold: float) -> int:
        """Move codes out of use onto latents of these sounds, (B, 1, S) of whole hops: see `audio_codebooks`."""
        return audio_codebooks.revive(self.quantizer, self._latents(waveforms), threshold)

    def with_num_codebooks(self, num_codebooks: int) -> EncodecTokenizer:
        """A copy that keeps the first levels only; sound made of fewer codes, and a checksum of its own.

        Raises:
            ConfigError: num_codebooks is not in 1..K.
        """
        if not 1 <= num_codebooks <= self.config.num_codebooks:
            raise ConfigError(f"num_codebooks must lie in 1..{self.config.num_codebooks}, got {num_codebooks}.")
        config = dataclasses.replace(self.config, num_codebooks=num_codebooks)
        cut = EncodecTokenizer(config).to(next(self.parameters()).device)
        kept = cut.state_dict().keys()
        cut.load_state_dict({name: tensor for name, tensor in self.state_dict().items() if name in kept})
        cut.eval()
        cut.checksum = checkpoint.codes_checksum(cut.final_tensors()) if self.checksum else ""
        return cut

    def with_new_decoder(self, config: EncodecConfig) -> EncodecTokenizer:
        """A copy with the same encoder and codebooks, and a decoder of another shape that has to be trained.

        Args:
            config: differs from this one's in the keys of the decoder at most.

        Raises:
            ConfigError: config asks for another encoder or other codebooks.
        """
        if not config.has_codes_of(self.config):
            raise ConfigError(f"only the decoder may be new: the codec has the shape {self.config}, asked: {config}.")
        renewed = EncodecTokenizer(config).to(next(self.parameters()).device)
        drawn = {name: tensor for name, tensor in renewed.state_dict().items() if name.startswith("decoder.")}
        kept = {name: tensor for name, tensor in self.state_dict().items() if not name.startswith("decoder.")}
        renewed.load_state_dict(kept | drawn)
        return renewed

    def final_tensors(self) -> dict[str, Tensor]:
        """The tensors that decide `encode` and `decode`: all parameters and codebooks, no training statistics."""
        return {
            name: tensor for name, tensor in self.state_dict().items() if name.rsplit(".", 1)[-1] not in _TRAINING_ONLY
        }

    def save(self, directory: str | Path, decoder_dtype: torch.dtype = torch.float32) -> None:
        """Write `config.json` and `model.safetensors`; the tokenizer has a checksum from then on.

        Args:
            directory: made if missing.
            decoder_dtype: in which the decoder's weights are stored. They are rounded to it here too, so that what is
                saved is what is in memory; encoder and codebooks stay as they are.
        """
        directory = Path(directory)
        stored = checkpoint.with_stored_decoder(self.final_tensors(), decoder_dtype)
        checkpoint.write_tensors(directory, stored)
        self.load_state_dict(stored, strict=False)
        tensors = self.final_tensors()
        self.checksum = checkpoint.codes_checksum(tensors)
        config = dataclasses.asdict(self.config) | {"ratios": list(self.config.ratios)}
        spec = dataclasses.asdict(self.spec)
        checkpoint.write_description(directory, KIND, config, spec, checkpoint.weights_checksum(tensors))

    @classmethod
    def load(cls, directory: str | Path, device: str | torch.device = "cpu") -> Self:
        """Read what `save` wrote, in evaluation mode.

        Raises:
            CheckpointError: a file is missing or damaged, the tensors are not those of the configuration, or the
                checksum is not theirs.
        """
        directory = Path(directory)
        description = checkpoint.read_description(directory, KIND)
        try:
            model = cls(EncodecConfig.from_dict(description["config"]))
        except ConfigError as error:
            raise CheckpointError(f"{directory / checkpoint.CONFIG_FILE}: {error}") from error
        tensors, file = checkpoint.read_tensors(directory), directory / checkpoint.WEIGHTS_FILE
        checkpoint.load_strictly(model, tensors, model.final_tensors(), file)
        audio_codebooks.reset_statistics(model.quantizer)
        model.eval()
        model.checksum = checkpoint.codes_checksum(model.final_tensors())
        checkpoint.check_spec(directory, description["spec"], dataclasses.asdict(model.spec))
        checkpoint.check_weights(directory, description, model.final_tensors())
        return model.to(device)

    @torch.no_grad()
    def _latents(self, waveforms: Tensor) -> Tensor:
        """(N, D) latents of (B, 1, S) sounds of whole hops, N = B * T."""
        return rearrange(torch.cat([self.encoder(part) for part in waveforms.split(16)]), "b d t -> (b t) d")

    def _decode_latents(self, latents: Tensor) -> Tensor:
        """(B, D, T) to (B, 1, T * hop_length), unclamped."""
        ahead = self.config.lead_in
        waveform: Tensor = self.decoder(torch.cat([latents[..., :1]] * ahead + [latents], dim=-1))
        return waveform[..., ahead * self.config.hop_length :]

    def _whole_hops(self, waveform: Tensor) -> Tensor:
        return F.pad(waveform, (0, -waveform.shape[-1] % self.config.hop_length))

    def _check_waveform(self, waveform: Tensor) -> None:
        if waveform.dim() != 3 or waveform.shape[1] != 1 or waveform.shape[2] < 1:
            raise ShapeError(
                f"waveform must be (B, 1, S) with at least one sample, got {tuple(waveform.shape)}. "
                f"Mix down to mono and add the batch and channel dimensions first."
            )
        if not waveform.is_floating_point():
            raise ShapeError(f"waveform must be floating point in [-1, 1], got {waveform.dtype}. Divide by full scale.")
        largest = float(waveform.abs().max()) if waveform.numel() else 0.0
        if not largest <= _LARGEST_SAMPLE:
            raise ShapeError(
                f"waveform must be finite and in [-1, 1], got a sample of {largest}. Divide by full scale."
            )

    def _check_codes(self, codes: Tensor) -> None:
        config = self.config
        if codes.dim() != 3 or codes.shape[1] != config.num_codebooks or codes.shape[2] < 1:
            raise ShapeError(
                f"codes must be (B, {config.num_codebooks}, T) with at least one latent frame, got "
                f"{tuple(codes.shape)}. Ids of the shared vocabulary belong to poet.sequence; unpack them first."
            )
        if codes.dtype != torch.int64:
            raise ShapeError(f"codes must be int64, got {codes.dtype}.")
        if codes.numel() and (int(codes.min()) < 0 or int(codes.max()) >= config.codebook_size):
            raise ShapeError(
                f"codes must lie in [0, {config.codebook_size}), got {int(codes.min())} to {int(codes.max())}. "
                f"Subtract the vocabulary's offsets first."
            )


def load_official_24khz(path: str | Path, num_codebooks: int = 8) -> EncodecTokenizer:
    """EnCodec's official 24 kHz codec from a file that the user has: hop 320, 75 latent frames a second.

    Args:
        path: `encodec_24khz-d7cc33bc.th` or any state dict of that shape.
        num_codebooks: levels to keep: 2 for 1.5 kbit/s, 4 for 3, 8 for 6, 16 for 12, 32 for 24.

    Raises:
        CheckpointError: the file is missing, is not a plain state dict, or belongs to another model.
        ConfigError: num_codebooks is not in 1..32.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(
            f"{path} must be EnCodec's 24 kHz weights, but there is no such file. "
            f"Fetch encodec_24khz-d7cc33bc.th as the encodec package's README says and name it here."
        )
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"{path} must be a plain PyTorch state dict; reading it failed: {str(error).splitlines()[0]} "
            f"Fetch encodec_24khz-d7cc33bc.th again."
        ) from error
    if not isinstance(tensors, dict) or not all(isinstance(value, Tensor) for value in tensors.values()):
        raise CheckpointError(f"{path} must be a plain state dict of tensors, it is not. Name EnCodec's own file.")
    config = EncodecConfig(
        sample_rate=24_000,
        ratios=(8, 5, 4, 2),
        num_filters=32,
        latent_size=128,
        num_residual_layers=1,
        num_lstm_layers=2,
        num_codebooks=32,
        pad_mode="reflect",
        lead_in=0,
    )
    model = EncodecTokenizer(config)
    checkpoint.load_strictly(model, tensors, model.state_dict(), path)
    model.eval()
    model.checksum = checkpoint.codes_checksum(model.final_tensors())
    return model.with_num_codebooks(num_codebooks)
