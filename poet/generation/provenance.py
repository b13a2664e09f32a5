"""What a clip's metadata says of the settings that made it, and the hash by which two clips are told to be the same."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from poet.bundle import Bundle
from poet.generation.canvas import ParallelDecoding
from poet.generation.sampling import SamplingConfig
from poet.generation.upsample import Upsampling
from poet.model.lora import Adapter

__all__ = ["describe_adapter", "describe_decoding", "describe_repetition", "describe_upsampling", "hash_ids"]


def describe_repetition(sampling: SamplingConfig) -> dict[str, str]:
    """The penalty on repeated ids; nothing where there is none."""
    if sampling.repetition_penalty == 1:
        return {}
    return {
        "repetition_penalty": repr(float(sampling.repetition_penalty)),
        "repetition_window": str(sampling.repetition_window),
    }


def describe_decoding(decoding: ParallelDecoding | None) -> dict[str, str]:
    """What says how ids were written; nothing where they were written one after another."""
    if decoding is None:
        return {}
    return {
        "decoding": "parallel",
        "steps": str(decoding.num_steps),
        "schedule": decoding.schedule,
        "order": decoding.order,
        "choice_temperature": repr(float(decoding.choice_temperature)),
        "guidance_start": repr(float(decoding.guidance_start)),
        "guidance_stop": repr(float(decoding.guidance_stop)),
    }


def describe_upsampling(upsampling: Upsampling | None, bundle: Bundle) -> dict[str, str]:
    """What says how the picture was made larger; nothing where it was not."""
    if upsampling is None:
        return {}
    usual = Upsampling()
    others = ("schedule", "choice_temperature", "text_guidance", "low_guidance", "noise_level")
    unusual = [name for name in others if getattr(upsampling, name) != getattr(usual, name)]
    return {
        "upsampler_sha256": bundle.upsampler_sha256,
        "upsample_steps": str(upsampling.num_steps),
        "upsample_temperature": repr(float(upsampling.temperature)),
        **{f"upsample_{name}": str(getattr(upsampling, name)) for name in unusual},
    }


def describe_adapter(adapter: Adapter | None) -> dict[str, str]:
    """What says which LoRA adapter changed the weights; nothing where none did."""
    return {} if adapter is None else {"adapter": adapter.name, "adapter_sha256": adapter.sha256}


def hash_ids(ids: Sequence[int]) -> str:
    """sha256 in hex of output ids, by which two clips can be told to be the same."""
    return hashlib.sha256(np.asarray(ids, np.int64).tobytes()).hexdigest()
