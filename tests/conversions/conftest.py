"""Small Qwen3 checkpoints with random weights, as transformers writes them, for the tests beside."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import Qwen3Config, Qwen3ForCausalLM

SIZES: dict[str, Any] = {
    "vocab_size": 347,  # neither a multiple of 128 nor the number of pieces
    "hidden_size": 48,
    "intermediate_size": 88,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 32,  # vLLM's CPU kernels want 32; 6 x 32 is not the hidden size
    "max_position_embeddings": 640,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0},
}


def byte_level_tokenizer() -> Tokenizer:
    """A byte-level BPE made like Qwen3's: NFC, digits alone, special pieces behind the learnt ones."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    lines = [f"a {size} red {shape} rises slowly" for size in ("small", "large") for shape in ("star", "circle")]
    tokenizer.train_from_iterator(lines, trainer)
    tokenizer.add_special_tokens([AddedToken("<|endoftext|>"), AddedToken("<|im_start|>")])
    tokenizer.add_tokens([AddedToken("<think>", normalized=False)])
    return tokenizer


def write_qwen3(directory: Path, *, tied: bool, shard: str = "60KB", dtype: str = "float32", **changes: Any) -> Path:
    """Write a checkpoint of several files; sharp, so that no two logits are alike."""
    config = Qwen3Config(**{**SIZES, "tie_word_embeddings": tied, **changes})
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(7 + tied)
        model = Qwen3ForCausalLM(config).eval()
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.normal_(std=weight.shape[1] ** -0.5)
            else:
                weight.normal_(mean=1.0, std=0.2)
    model.to(getattr(torch, dtype)).save_pretrained(directory, max_shard_size=shard)
    byte_level_tokenizer().save(str(directory / "tokenizer.json"))
    return directory


def edit_config(directory: Path, **changes: Any) -> None:
    """Change keys of config.json; None takes them out."""
    file = directory / "config.json"
    content = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


@pytest.fixture(scope="session")
def qwen3() -> Callable[..., Path]:
    """`write_qwen3`: test folders are no packages that could be imported from."""
    return write_qwen3
