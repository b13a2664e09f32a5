"""What a step costs, counted against PyTorch's own counter, and what the log says of it."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from poet.model.attention import SceneLayout
from poet.model.config import PoetConfig
from poet.model.transformer import PoetTransformer
from poet.training import speed
from poet.training.speed import SpeedLog, flops_per_id

CONFIG = PoetConfig(
    vocab_size=384,
    hidden_size=48,
    ffn_hidden_size=80,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    scene_length=128,
    max_position_embeddings=256,
)


@pytest.mark.parametrize("tied", [True, False])
def test_the_count_is_pytorchs_but_for_the_keys_that_are_not_seen(tied: bool) -> None:
    config, length = dataclasses.replace(CONFIG, tie_embeddings=tied), 96
    model = PoetTransformer(config)
    ids = torch.randint(0, config.vocab_size, (1, length))
    everything = SceneLayout.from_prefix_lengths(torch.tensor([length]), torch.tensor([length]), length)
    with FlopCounterMode(display=False) as counter:
        model.logits(model(ids, everything)).sum().backward()
    # All places see all here, so attention costs twice what is counted for places that see what is before them.
    unseen = 12 * config.num_layers * config.num_heads * config.head_dim * length / 2
    assert counter.get_total_flops() / length == pytest.approx(flops_per_id(config, length) + unseen, rel=1e-6)


def test_a_line_says_what_was_done_since_the_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(speed.time, "monotonic", lambda: now[0])
    log = SpeedLog(tmp_path / "speed.jsonl", CONFIG, torch.device("cpu"), rows=2, processes=5)
    for _ in range(3):
        log.add({"ids": 70.0})
    now[0] += 7.0
    log.write(3)
    log.add({"ids": 10.0})
    now[0] += 2.0
    log.write(4)
    first, second = (json.loads(line) for line in (tmp_path / "speed.jsonl").read_text().splitlines())
    assert first["step"] == 3
    assert first["seconds_per_step"] == pytest.approx(7 / 3)
    assert first["ids_per_second"] == pytest.approx(30.0)
    assert first["tflops_per_process"] == pytest.approx(30 * flops_per_id(CONFIG, 35) / 5 / 1e12)
    assert 0.05 < first["peak_memory_gb"] < 100
    assert "mfu" not in first
    assert second["ids_per_second"] == pytest.approx(5.0)
