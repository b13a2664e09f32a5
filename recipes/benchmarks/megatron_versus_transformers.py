"""Measure Poet's Megatron trainer, and its share of the card's peak, against a plain loop of transformers.

    python recipes/benchmarks/megatron_versus_transformers.py                   one GPU: 300m and 1b, rows of 2,048 ids
    python recipes/benchmarks/megatron_versus_transformers.py --sizes nano      what a machine without a GPU does anyway

Rules, the same for both sides:

- One process, the same card, the same rows of ids: scenes of random codes, each nearly as long as a row.
- Operations are counted for an id as `poet.training.speed.flops_per_id` says: six times the weights of all matrices,
  the output head included, and attention as if every id saw half of its row. What is recomputed or spent on padding
  does not count. MFU is that over seconds and over the card's dense bfloat16 peak.
- A figure is the median over rounds of some steps each, which alternate between the sides; what comes before (loading,
  compiling) is dropped. Optimiser, clipping and logging are part of a step.
- Batches are drawn before the clock starts, for both sides. Both models lie on the card at the same time.
- Poet's side is the trainer as `poet train` runs it: bfloat16 weights with float32 ones in the optimiser, averaged
  weights, losses by modality, logits for targets only. Poet's prefix is read both ways.
- transformers' side is its Qwen3 of the same sizes with its SDPA attention, float32 weights under bfloat16 autocast,
  fused AdamW and clipping; it computes all logits, as its own loss does, and keeps no average.

Without a GPU both sides run on the CPU, in float32 there, and the report says that the GPU's figure is missing.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import functools
import json
import os
import socket
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol

from machine import ROOT, commit, processor, version_of

if TYPE_CHECKING:
    from poet.training.language import LanguageRecipe
    from poet.training.megatron_trainer import MegatronTraining

RECIPES: Final = ROOT / "recipes" / "pretraining"
AIM: Final = 0.45
say = functools.partial(print, file=sys.stderr, flush=True)


class Side(Protocol):
    """One of the two trainers."""

    def draw(self, numbers: Sequence[int]) -> None:
        """Have the rows of these numbers at hand."""

    def step(self, number: int) -> float:
        """One optimiser step on the rows of that number; returns the loss, so the device has finished."""


class TransformersSide:
    """transformers' Qwen3ForCausalLM and AdamW, without anything between them.

    Args:
        poet: gives sizes, rows and device.
        compiled: whether the model goes through `torch.compile`.
    """

    def __init__(self, poet: MegatronTraining, *, compiled: bool) -> None:
        import torch
        import transformers

        values = poet.config.to_huggingface_dict()
        for name in ("architectures", "model_type", "dtype", "scene_length"):
            values.pop(name)
        self.loader, self.device = poet.loader, poet.device
        build: Any = transformers.Qwen3ForCausalLM
        config = transformers.Qwen3Config(
            **values, eos_token_id=None, pad_token_id=0, use_cache=False, attn_implementation="sdpa"
        )
        torch.manual_seed(0)
        self.model = build(config).to(self.device).train()
        recipe = poet.recipe
        self.clip = recipe.gradient_clip
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(),
            lr=recipe.learning_rate,
            betas=(0.9, recipe.beta2),
            weight_decay=recipe.weight_decay,
            fused=True,
        )
        self.forward = torch.compile(self.model) if compiled else self.model
        self.drawn: dict[int, Any] = {}

    def draw(self, numbers: Sequence[int]) -> None:
        """Have the rows of these numbers at hand."""
        self.drawn = {number: self.loader.batch(number) for number in numbers}

    def step(self, number: int) -> float:
        """One step of the plainest loop."""
        import torch

        batch = self.drawn[number] if number in self.drawn else self.loader.batch(number)
        ids = batch["ids"].to(self.device)
        labels = torch.where(batch["loss_mask"].to(self.device), ids, -100)
        autocast = torch.autocast("cuda", torch.bfloat16, enabled=self.device.type == "cuda")
        with autocast:
            loss = self.forward(input_ids=ids, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())


class PoetSide:
    """Poet's trainer."""

    def __init__(self, training: MegatronTraining) -> None:
        self.training = training
        self.drawn: dict[int, Any] = {}
        take = training.ahead.take
        training.ahead.take = lambda number: self.drawn[number] if number in self.drawn else take(number)  # type: ignore[method-assign]

    def draw(self, numbers: Sequence[int]) -> None:
        """Have the rows of these numbers at hand."""
        self.drawn = {number: self.training.loader.batch(number) for number in numbers}

    def step(self, number: int) -> float:
        """One step as `poet train` does it."""
        return self.training.train_step(number)["loss"]


def measure(sides: Mapping[str, Side], *, rounds: int, steps: int, warmup: int) -> dict[str, list[float]]:
    """Seconds a step of every side in every round; the sides take turns and see the same rows."""
    for side in sides.values():
        for number in range(warmup):
            side.step(number)
    found: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(rounds):
        first = warmup + turn * steps
        for side in sides.values():
            side.draw(range(first, first + steps))
        for name in list(sides) if turn % 2 else reversed(list(sides)):
            begun = time.perf_counter()
            for number in range(first, first + steps):
                sides[name].step(number)
            found[name].append((time.perf_counter() - begun) / steps)
    return found


def compare(seconds: Mapping[str, Sequence[float]], *, ids: float, flops: float, peak: float | None) -> dict[str, Any]:
    """Speeds of both sides and their ratio, from seconds a step by round.

    Args:
        seconds: of "poet" and "transformers", a step, by round.
        ids: of a step, without padding.
        flops: of a step.
        peak: operations a second that the device can do; None where nobody has looked it up.
    """
    ratios = [theirs / ours for ours, theirs in zip(seconds["poet"], seconds["transformers"], strict=True)]
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        "ratio": round(statistics.median(ratios), 2),
        "lowest_ratio": round(min(ratios), 2),
        "highest_ratio": round(max(ratios), 2),
        "seconds_per_step": {name: round(value, 4) for name, value in medians.items()},
        "ids_per_second": {name: round(ids / value, 1) for name, value in medians.items()},
        "tflops": {name: round(flops / value / 1e12, 3) for name, value in medians.items()},
        "mfu": None if peak is None else {name: round(flops / value / peak, 3) for name, value in medians.items()},
    }


def recipe_of(size: str, bundle: Path, shards: Path, options: argparse.Namespace) -> LanguageRecipe:
    """The recipe of a size with the rows of this benchmark."""
    from poet.training.config import build, read_recipe
    from poet.training.language import LanguageRecipe

    values = read_recipe(RECIPES / f"{size}.yaml")
    for name in ("train", "loop", "phases"):
        values.pop(name, None)
    values |= {
        "bundle": str(bundle),
        "shards": str(shards),
        "validation_shards": str(shards),
        "batch_size": options.rows,
        "tasks": {"text_to_video_audio": 1.0},
        "text_dropout": 0.0,
        "precision": "bf16" if options.device == "cuda" else "fp32",
        "parallel": {"micro_batch_size": options.micro_batch_size},
    }
    values["model"] |= {"scene_length": options.length, "max_position_embeddings": options.length}
    return build(LanguageRecipe, values)


def longest_clip(bundle: Path, length: int) -> int:
    """Latent frames of the longest clip whose scene has at most `length` ids, with room for a caption."""
    import numpy as np

    from poet.bundle import Bundle
    from poet.sequence import pack
    from poet.testing import random_scene, tiny_geometry

    vocabulary, rng, latents = Bundle.open(bundle, require_model=False).vocabulary, np.random.default_rng(0), 1
    while True:
        geometry = tiny_geometry(vocabulary, num_latent_frames=latents + 1)
        scene = random_scene("text_to_video_audio", vocabulary, rng, geometry=geometry, num_text_pieces=16)
        if len(pack(scene, vocabulary).ids) > length:
            return latents
        latents += 1


def run_case(size: str, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Both sides at one size."""
    import torch

    from poet.bundle import Bundle, default_bundle
    from poet.testing import tiny_shards
    from poet.training.megatron_trainer import MegatronTraining, process_groups
    from poet.training.speed import flops_per_id, peak_flops

    bundle, shards = default_bundle(), folder / "shards"
    if not shards.exists():
        opened = Bundle.open(bundle, require_model=False)
        tiny_shards(opened, shards, count=64, num_latent_frames=longest_clip(bundle, options.length))
    recipe = recipe_of(size, bundle, shards, options)
    with process_groups(recipe.parallel, options.device):
        training = MegatronTraining(recipe, device=options.device)
        sides = {
            "poet": PoetSide(training),
            "transformers": TransformersSide(training, compiled=options.compile_transformers),
        }
        seconds = measure(sides, rounds=options.rounds, steps=options.steps, warmup=options.warmup)
        measured = range(options.warmup, options.warmup + options.rounds * options.steps)
        lengths = torch.cat([training.loader.batch(number)["lengths"] for number in measured]).float()
        ids = float(lengths.sum()) / len(measured)
        flops = ids * flops_per_id(training.config, float(lengths.mean()))
        found = compare(seconds, ids=ids, flops=flops, peak=peak_flops(torch.device(options.device)))
    case = {"size": size, "parameters": training.config.num_parameters, "ids_per_row": float(lengths.mean()), **found}
    del training, sides
    if options.device == "cuda":
        case["peak_memory_of_both_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 1)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    return case


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """The environment that a launcher would give to a single process."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    given = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    kept = {name: os.environ.get(name) for name in given}
    os.environ.update(given)
    try:
        yield
    finally:
        for name, value in kept.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def hardware(device: str) -> str:
    """The GPU's name, or the processor's."""
    import torch

    if device == "cuda":
        return torch.cuda.get_device_name()
    return f"{processor()}, {torch.get_num_threads()} threads"


def table(report: Mapping[str, Any]) -> str:
    """The report as text, ratios first."""
    row = "{:8}{:>8}  {:14}{:>12}{:>14}{:>8}{:>8}".format
    lines = [row("", "ratio", "lowest..highest", "ids/s poet", "transformers", "MFU", "MFU")]
    for case in report["cases"]:
        spread = f"{case['lowest_ratio']:.2f}..{case['highest_ratio']:.2f}"
        names = ("poet", "transformers")
        speeds = [f"{case['ids_per_second'][side]:.0f}" for side in names]
        shares = ["-" if case["mfu"] is None else f"{case['mfu'][side]:.1%}" for side in names]
        lines.append(row(case["size"], f"{case['ratio']:.2f}x", spread, *speeds, *shares))
    lines.append(f"{report['settings']}, {report['versions']}")
    lines.append(f"{report['hardware']}, {report['date']}, commit {report['commit']}")
    return "\n".join([*lines, verdict(report)])


def verdict(report: Mapping[str, Any]) -> str:
    """Whether the aim is reached; that it is not known where there was no GPU."""
    cases = [case for case in report["cases"] if case["mfu"] is not None]
    if not cases:
        return f"The GPU's figure is missing: an MFU of at least {AIM:.0%} can only be shown on one."
    short = [case["size"] for case in cases if case["mfu"]["poet"] < AIM]
    return f"MFU is below {AIM:.0%} at {', '.join(short)}." if short else f"MFU is at least {AIM:.0%} at every size."


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    about = (__doc__ or "").partition("\n")[0]
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--device", choices=["auto", "cuda", "cpu"], default="auto", help="auto: a GPU where there is one")
    add("--sizes", nargs="+", help="recipes of recipes/pretraining; 300m and 1b on a GPU, nano without one")
    add("--length", type=int, help="ids of a row; 2,048 on a GPU, 768 without one")
    add("--rows", type=int, help="rows of a step; 32 on a GPU, 4 without one")
    add("--micro-batch-size", type=int, help="rows of a forward pass; 8 on a GPU, all of them without one")
    add("--steps", type=int, default=5, help="steps of a round")
    add("--rounds", type=int, default=5, help="rounds of either side")
    add("--warmup", type=int, default=4, help="steps of either side that are dropped")
    add("--compile-transformers", action="store_true", help="let torch.compile have transformers' model")
    add("--output", type=Path, default=ROOT / "runs" / "benchmarks" / f"{Path(__file__).stem}.json", help="JSON report")
    options = parser.parse_args(arguments)
    given = [options.length, options.rows, options.micro_batch_size]
    if min(options.steps, options.rounds, options.warmup, *(value for value in given if value is not None)) < 1:
        parser.error("counts must be at least 1")
    return options


def settle(options: argparse.Namespace) -> argparse.Namespace:
    """Fill in what depends on the device."""
    import torch

    if options.device == "auto":
        options.device = "cuda" if torch.cuda.is_available() else "cpu"
    on_gpu = options.device == "cuda"
    options.sizes = options.sizes or (["300m", "1b"] if on_gpu else ["nano"])
    options.length = options.length or (2048 if on_gpu else 768)
    options.rows = options.rows or (32 if on_gpu else 4)
    options.micro_batch_size = options.micro_batch_size or (8 if on_gpu else options.rows)
    return options


def main() -> None:
    """Measure both sides at every size, print the table, write the report."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    warnings.filterwarnings("ignore", message="(Transformer Engine|Apex|full scope is deprecated)")
    options = settle(parse())
    cases = []
    with alone(), tempfile.TemporaryDirectory() as folder:
        for size in options.sizes:
            cases.append(run_case(size, options, Path(folder)))
            say(f"{size}: {cases[-1]}")
    versions = {name: version_of(name) for name in ("torch", "megatron-core", "transformers")}
    names = ("length", "rows", "micro_batch_size", "steps", "rounds", "compile_transformers")
    report = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "commit": commit("recipes/benchmarks/*.py", "poet/model", "poet/training", "poet/data"),
        "device": options.device,
        "hardware": hardware(options.device),
        "precision": "bfloat16" if options.device == "cuda" else "float32",
        "versions": versions,
        "settings": {name: getattr(options, name) for name in names},
        "cases": cases,
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(table(report))
    print(f"written to {options.output}")


if __name__ == "__main__":
    main()
