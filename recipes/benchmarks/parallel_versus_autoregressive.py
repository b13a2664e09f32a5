"""Measure parallel decoding against autoregressive decoding: accuracy by the judge, and the latency of one clip.

    python recipes/benchmarks/parallel_versus_autoregressive.py                    the shipped bundle, 200 clips a split
    python recipes/benchmarks/parallel_versus_autoregressive.py --count 0          latency alone

Rules, the same for both sides:

- vLLM, the same weights in the engine's own type, the same captions and seeds, the bundle's own temperature.
- Accuracy is the share of attributes that the judge sees and hears, as `poet evaluate` counts it.
- Latency is the wall time from a request to its ids, one clip at a time, each side with the engine's own number of
  threads. Rounds alternate which side comes first; a figure is the median over rounds, a ratio the median of the
  rounds' ratios. Tokenizers are left out: they are the same for both.
- A forward pass of the autoregressive side writes one id; of the parallel side it sees the whole clip. A step in which
  guidance is in force is two passes, whose rows are in one batch. The autoregressive side is not guided.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import json
import os
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from machine import ROOT, commit, hardware, version_of

if TYPE_CHECKING:
    from poet.bundle import Bundle
    from poet.generation.canvas import ParallelDecoding
    from poet.generation.engine import Engine, GenerationRequest

SPLITS: Final = ("seen", "unseen")
TASK: Final = "text_to_video_audio"
say = functools.partial(print, file=sys.stderr, flush=True)


def request_of(
    bundle: Bundle, seed: int, decoding: ParallelDecoding | None, guidance_scale: float = 1.0
) -> GenerationRequest:
    """What the pipeline would ask an engine for, for the caption of one drawn clip."""
    from poet.data.toybox import draw
    from poet.generation.canvas import plan_canvas
    from poet.generation.engine import GenerationRequest
    from poet.generation.sampling import SamplingConfig
    from poet.sequence import Scene, output_grammar, pack_prefix
    from poet.tasks import get_task

    geometry, vocabulary, task = bundle.geometry(), bundle.vocabulary, get_task(TASK)
    shape = task.output_shape(geometry, 0)
    shapes: dict[str, Any] = {"video_latent_shape": shape.video, "num_audio_latents": shape.audio}
    text = tuple(bundle.text_tokenizer.encode(draw("seen", seed).caption))
    scene = Scene(task=TASK, text=text, resolution=geometry.resolution)
    is_parallel = decoding is not None
    scale = guidance_scale if is_parallel else 1.0
    return GenerationRequest(
        prefix_ids=tuple(pack_prefix(scene, vocabulary, parallel=is_parallel).tolist()),
        guide_ids=tuple(pack_prefix(scene, vocabulary, parallel=is_parallel, drop_text=True).tolist()),
        grammar=output_grammar(task, vocabulary, **shapes),
        sampling=SamplingConfig(temperature=bundle.generation_config.temperature, seed=seed, guidance_scale=scale),
        canvas=None if decoding is None else plan_canvas(decoding, task, vocabulary, **shapes),
    )


def measure_latency(
    engine: Engine, bundle: Bundle, decodings: Sequence[ParallelDecoding], guidance_scale: float, rounds: int
) -> dict[str, Any]:
    """Seconds of one clip by every way to decode; one round before those that count is dropped."""
    sides: list[ParallelDecoding | None] = [None, *decodings]
    found: dict[str, list[float]] = {name_of(side): [] for side in sides}
    length = 0
    for turn in range(rounds + 1):
        for side in sides if turn % 2 else reversed(sides):
            request = request_of(bundle, turn, side, guidance_scale)
            begun = time.perf_counter()
            [ids] = engine.generate([request])
            seconds = time.perf_counter() - begun
            length = len(ids)
            if turn:
                found[name_of(side)].append(seconds)
    passes = {name_of(side): passes_of(side, guidance_scale) for side in decodings}
    return compare(found, {"autoregressive": length, **passes}, length)


def passes_of(decoding: ParallelDecoding, guidance_scale: float) -> int:
    """Forward passes of an output: one a step, and a second one where guidance is in force."""
    from poet.generation.maskgit import Stage

    steps = decoding.num_steps
    guided = 0 if guidance_scale == 1 else len(decoding.plan((Stage(0, 1, 1),), 0).guided_steps(steps))
    return steps + guided


def compare(seconds: Mapping[str, Sequence[float]], passes: Mapping[str, int], length: int) -> dict[str, Any]:
    """Medians, and how many times faster than autoregressive decoding each side is.

    Args:
        seconds: of each side in every round; "autoregressive" is one of them, the others are numbers of steps.
        passes: of each side, forward passes of an output.
        length: ids of an output.
    """
    slow = seconds["autoregressive"]
    result: dict[str, Any] = {}
    for name, values in seconds.items():
        ratios = [theirs / ours for ours, theirs in zip(values, slow, strict=True)]
        result[name] = {
            "seconds": round(statistics.median(values), 3),
            "ratio": round(statistics.median(ratios), 2),
            "lowest_ratio": round(min(ratios), 2),
            "highest_ratio": round(max(ratios), 2),
            "forward_passes": passes[name],
            "share_of_passes": round(passes[name] / length, 4),
        }
    return result


def measure_accuracy(
    bundle: Bundle, decoding: ParallelDecoding | None, guidance_scale: float, count: int, folder: Path
) -> dict[str, float]:
    """Share of right attributes of each split."""
    from poet.evaluation.measure import generation

    measured = generation(
        bundle,
        SPLITS,
        count,
        0,
        folder / name_of(decoding),
        task=TASK,
        seed=0,
        engine="vllm",
        sampling={
            "temperature": None,
            "top_k": None,
            "top_p": None,
            "guidance_scale": 1.0 if decoding is None else guidance_scale,
        },
        decoding=decoding,
        progress=lambda *_: None,
    )
    return dict(measured.facts["attributes_right"])


def name_of(decoding: ParallelDecoding | None) -> str:
    """Of a side: the number of steps, or "autoregressive"."""
    return "autoregressive" if decoding is None else str(decoding.num_steps)


def table(report: Mapping[str, Any]) -> str:
    """The report as a table of Markdown."""
    lines = ["| | forward passes | seconds a clip | times as fast | seen | unseen |", "|---|---|---|---|---|---|"]
    for name, latency in report["latency"].items():
        right = report["accuracy"].get(name, {})
        shares = [f"{100 * right[split]:.1f} %" if split in right else "" for split in SPLITS]
        ratio = f"{latency['ratio']:.2f} ({latency['lowest_ratio']:.2f} to {latency['highest_ratio']:.2f})"
        title = name if name == "autoregressive" else f"parallel, {name} steps"
        cells = [title, str(latency["forward_passes"]), f"{latency['seconds']:.2f}", ratio, *shares]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(report: Mapping[str, Any], path: Path) -> None:
    """Accuracy and seconds over steps, with autoregressive decoding as dashed lines."""
    import matplotlib.pyplot as plt

    names = [name for name in report["latency"] if name != "autoregressive"]
    steps = [int(name) for name in names]
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for split, colour in zip(SPLITS, ("tab:blue", "tab:orange"), strict=True):
        if not all(split in report["accuracy"].get(name, {}) for name in (*names, "autoregressive")):
            continue
        left.plot(steps, [100 * report["accuracy"][name][split] for name in names], "o-", color=colour, label=split)
        left.axhline(100 * report["accuracy"]["autoregressive"][split], color=colour, linestyle="--")
    left.set(xlabel="steps", ylabel="attributes right, %", title="accuracy by the judge")
    if left.get_legend_handles_labels()[0]:
        left.legend()
    right.plot(steps, [report["latency"][name]["seconds"] for name in names], "o-", color="black")
    right.axhline(report["latency"]["autoregressive"]["seconds"], color="black", linestyle="--")
    right.set(xlabel="steps", ylabel="seconds a clip", title="latency of one clip", ylim=(0, None))
    figure.savefig(path, dpi=110)
    plt.close(figure)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    about = (__doc__ or "").partition("\n")[0]
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--bundle", type=Path, help="a bundle that has learnt parallel decoding; none: the shipped one")
    add("--steps", type=int, nargs="+", default=[4, 8, 12, 16, 24], help="forward passes of parallel decoding")
    add("--order", default=None, help="whole, parts or frames; none: the default of poet generate")
    add("--schedule", default=None, help="none: the default of poet generate")
    add("--choice-temperature", type=float, default=None, help="none: the default of poet generate")
    add("--guidance-scale", type=float, default=None, help="of parallel decoding; 1 is off; none: the bundle's own")
    add("--guidance-start", type=float, default=None, help="none: the bundle's own")
    add("--guidance-stop", type=float, default=None, help="none: the bundle's own")
    add("--count", type=int, default=200, help="clips a split whose accuracy is measured; 0 measures latency alone")
    add("--rounds", type=int, default=7, help="rounds of latency")
    add("--output", type=Path, default=ROOT / "runs" / "benchmarks" / f"{Path(__file__).stem}.json", help="JSON report")
    options = parser.parse_args(arguments)
    if min(*options.steps, options.rounds, options.count + 1) < 1:
        parser.error("steps and rounds must be at least 1, and --count not negative")
    if len(set(options.steps)) < len(options.steps):
        parser.error("--steps must differ from each other")
    return options


def main() -> None:
    """Measure both ways, print the table, write report and plot."""
    options = parse()
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    os.environ.setdefault("MPLBACKEND", "Agg")
    import torch

    from poet.bundle import Bundle, default_bundle
    from poet.errors import ConfigError
    from poet.generation.canvas import choose_decoding
    from poet.generation.engine import load_engine

    about = hardware(torch.get_num_threads())
    bundle = Bundle.open(options.bundle or default_bundle())
    try:
        bundle.check_parallel()
    except ConfigError as error:
        sys.exit(str(error))
    usual_scale = bundle.generation_config.parallel.guidance_scale
    scale = usual_scale if options.guidance_scale is None else options.guidance_scale
    names = ("order", "schedule", "choice_temperature", "guidance_start", "guidance_stop")
    chosen = {name: value for name in names if (value := getattr(options, name)) is not None}
    usual_decoding = bundle.generation_config.parallel
    decodings = [choose_decoding(usual_decoding, {**chosen, "num_steps": steps}) for steps in options.steps]
    engine = load_engine("vllm", bundle.path, decodings=["autoregressive", "parallel"])
    try:
        latency = measure_latency(engine, bundle, decodings, scale, options.rounds)
    finally:
        engine.close()
    accuracy = {}
    folder = options.output.parent / options.output.stem
    for decoding in [None, *decodings] if options.count else []:
        accuracy[name_of(decoding)] = measure_accuracy(bundle, decoding, scale, options.count, folder)
        say(f"{name_of(decoding)}: {accuracy[name_of(decoding)]}")
    usual = decodings[0]
    report = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "commit": commit("recipes/benchmarks/*.py", "serving", "poet"),
        "hardware": about,
        "bundle": bundle.path.name,
        "weights": bundle.weights_sha256[:12],
        "versions": {package: version_of(package) for package in ("torch", "vllm")},
        "settings": {
            "count": options.count,
            "rounds": options.rounds,
            "order": usual.order,
            "schedule": usual.schedule,
            "choice_temperature": usual.choice_temperature,
            "guidance_scale": scale,
            "guidance_start": usual.guidance_start,
            "guidance_stop": usual.guidance_stop,
            "temperature": bundle.generation_config.temperature,
        },
        "latency": latency,
        "accuracy": accuracy,
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    plot(report, options.output.with_suffix(".png"))
    print(table(report))
    print(f"written to {options.output}")


if __name__ == "__main__":
    main()
