"""How fast a run is: ids a second, floating-point operations and the share of the device's peak that they are, memory.

These numbers differ from run to run, so they have a file of their own, `speed.jsonl`, beside the metrics, which a
resumed run repeats to the last digit. Knows sizes and clocks, not what is trained.
"""

from __future__ import annotations

import json
import resource
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import torch

from poet.model.config import PoetConfig

__all__ = ["PEAK_FLOPS", "SpeedLog", "flops_per_id", "peak_flops"]

PEAK_FLOPS: Final = {"H100": 989e12, "H200": 989e12, "A100": 312e12}
"""Dense bfloat16 operations a second by a part of the device's name, from NVIDIA's data sheets (SXM)."""


def flops_per_id(config: PoetConfig, length: float) -> float:
    """Floating-point operations of one forward and backward pass for one id.

    Two for every multiply-add: six times the weights of all matrices, the output head included and the embedding, which
    is looked up, left out; and attention as if every id saw half of its row. Recomputed activations do not count.

    Args:
        config: of the model.
        length: ids of a row.

    Source: the count of PaLM, arXiv:2204.02311, appendix B, with half its keys, since most places see what is before
    them only.
    """
    gains = config.num_layers * (2 * config.hidden_size + 2 * config.head_dim) + config.hidden_size
    looked_up = 0 if config.tie_embeddings else config.vocab_size * config.hidden_size
    matrices = config.num_parameters - gains - looked_up
    attention = 12 * config.num_layers * config.num_heads * config.head_dim * length / 2
    return 6 * matrices + attention


def peak_flops(device: torch.device) -> float | None:
    """Operations a second that a device can do at most in bfloat16; None where nobody has looked it up."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAK_FLOPS.items() if part in name), None)


class SpeedLog:
    """Adds up ids and operations between two lines of `speed.jsonl`.

    Validation and saving are part of the time between two lines.

    Args:
        path: of the file; lines are added to what is there.
        config: of the model.
        device: of this process.
        rows: of a step, in which its ids lie.
        processes: that share the work.
    """

    def __init__(self, path: Path, config: PoetConfig, device: torch.device, rows: int, processes: int = 1) -> None:
        self.path, self.config, self.device = path, config, device
        self.rows, self.processes = rows, processes
        self._begin()

    def _begin(self) -> None:
        self._steps, self._ids, self._flops, self._started = 0, 0.0, 0.0, time.monotonic()

    def start(self) -> None:
        """Begin to measure: what came before (loading, compiling) does not count."""
        self._begin()

    def add(self, metrics: Mapping[str, float]) -> None:
        """Count a step; `metrics["ids"]` are those of all its rows, without padding."""
        ids = metrics["ids"]
        self._steps += 1
        self._ids += ids
        self._flops += ids * flops_per_id(self.config, ids / self.rows)

    def write(self, step: int) -> dict[str, float]:
        """Write a line for the steps since the last one; returns it."""
        seconds = max(time.monotonic() - self._started, 1e-9)
        line = {
            "step": step,
            "seconds_per_step": seconds / max(1, self._steps),
            "ids_per_second": self._ids / seconds,
            "tflops_per_process": self._flops / seconds / self.processes / 1e12,
            "peak_memory_gb": self._memory() / 1e9,
        }
        peak = peak_flops(self.device)
        if peak is not None:
            line["mfu"] = self._flops / seconds / self.processes / peak
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        self._begin()
        return line

    def _memory(self) -> float:
        """Bytes: the most that this process has had on its GPU, or without one in the machine's memory."""
        if self.device.type == "cuda":
            return float(torch.cuda.max_memory_allocated(self.device))
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0
