"""Measure what a scene of a film costs the later it stands, beside the same model with full attention in every layer.

    python recipes/benchmarks/films_versus_full_attention.py                    the shipped bundle, up to scene 28
    python recipes/benchmarks/films_versus_full_attention.py --scenes 1 4 --rounds 3

Rules, the same for both sides:

- vLLM, the same weights in the engine's own type, one film, one id after another, the same earlier scenes and seeds.
- Both engines run at the same time, each in a process of its own, and are asked in turn; rounds alternate which comes
  first. A figure is the median over rounds (of full attention, whose long films take minutes, of one unless
  --full-rounds says more), a ratio the median of the rounds' ratios. A first scene before that is dropped.
- A scene's time is the wall time from a request, earlier scenes and all, to its last id; its prefill is the time to its
  first id. Tokenizers are left out, except from the time to the first frame, which is that of `poet generate --stream`.
- Pages are those that the engine holds at most while the scene is written: of one layer and 128 ids each.
- Full attention is what films cost without Poet's rule: every layer reads and keeps all scenes. No model is trained so;
  only its cost is compared.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import json
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from machine import ROOT, commit, hardware, version_of

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

    from poet.bundle import Bundle
    from poet.generation.engine import GenerationRequest

SIDES: Final = ("scenes", "full")
say = functools.partial(print, file=sys.stderr, flush=True)


def request_of(bundle: Bundle, number: int, seed: int) -> GenerationRequest:
    """Scene `number`, from 1 on, of a film whose earlier scenes hold codes by chance: their number is what costs."""
    import numpy as np

    from poet.generation.engine import GenerationRequest
    from poet.generation.sampling import SamplingConfig
    from poet.sequence import Scene, output_grammar, pack, pack_prefix, pad_scene
    from poet.tasks import get_task

    task, vocabulary, geometry = get_task("text_to_video_audio"), bundle.vocabulary, bundle.geometry()
    shape, rng = task.output_shape(geometry), np.random.default_rng(seed)
    text = tuple(bundle.text_tokenizer.encode("A small red ball on a navy background moves up with a low flute."))
    assert shape.audio is not None
    assert shape.video is not None
    context: list[int] = []
    for _ in range(number - 1):
        scene = Scene(
            task=task.name,
            text=text,
            resolution=geometry.resolution,
            video_out=rng.integers(0, vocabulary.video_codebook_size, shape.video),
            audio_out=rng.integers(0, vocabulary.audio_codebook_size, (vocabulary.num_audio_codebooks, shape.audio)),
        )
        context += pad_scene(pack(scene, vocabulary), bundle.model_config.scene_length, vocabulary).ids.tolist()
    scene = Scene(task=task.name, text=text, resolution=geometry.resolution)
    return GenerationRequest(
        prefix_ids=tuple(pack_prefix(scene, vocabulary).tolist()),
        grammar=output_grammar(task, vocabulary, video_latent_shape=shape.video, num_audio_latents=shape.audio),
        sampling=SamplingConfig(temperature=bundle.generation_config.temperature, seed=seed),
        context_ids=tuple(context),
    )


class Watch:
    """What one scene costs, told by the engine while it writes."""

    def __init__(self, pool: Any) -> None:
        self._pool, self._free = pool, pool.get_num_free_blocks()
        self._begun = time.perf_counter()
        self.prefill = 0.0
        self.pages = 0

    def __call__(self, _: int, ids: Sequence[int]) -> None:
        """Note when the first id comes, and how many pages are held."""
        if len(ids) == 1:
            self.prefill = time.perf_counter() - self._begun
        self.pages = max(self.pages, self._free - self._pool.get_num_free_blocks())

    @property
    def seconds(self) -> float:
        """Since the request."""
        return time.perf_counter() - self._begun


def serve(side: str, path: Path, num_scenes: int, connection: Connection) -> None:
    """Hold one engine and answer (scene, seed) with what it cost, until told to end."""
    from poet.bundle import Bundle
    from poet_serving.engine import VLLMEngine

    bundle = Bundle.open(path)
    with VLLMEngine(path, max_num_seqs=1, num_scenes=num_scenes, full_attention=side == "full") as engine:
        pool = engine._vllm.engine_core.engine_core.scheduler.kv_cache_manager.block_pool
        # A page holds all layers, except where layers above the first see one scene of several.
        layers = bundle.model_config.num_layers if side == "full" or num_scenes == 1 else 1
        connection.send("ready")
        while (asked := connection.recv()) is not None:
            request = request_of(bundle, *asked)
            watch = Watch(pool)
            list(engine.stream([request], watch=watch))
            connection.send({"seconds": watch.seconds, "prefill": watch.prefill, "pages": watch.pages * layers})


def measure_first_frame(path: Path, rounds: int) -> dict[str, float]:
    """Seconds to the first frame of one clip that is streamed, and to the whole of it."""
    from poet.bundle import Bundle
    from poet.generation.engine import load_engine
    from poet.generation.pipeline import ClipRequest, Pipeline
    from poet.generation.sampling import SamplingConfig
    from poet.generation.streaming import stream_clip

    bundle = Bundle.open(path)
    found: list[tuple[float, float]] = []
    engine = load_engine("vllm", path)
    try:
        pipeline = Pipeline(bundle, engine)
        for turn in range(rounds + 1):
            sampling = SamplingConfig(temperature=bundle.generation_config.temperature, seed=turn)
            request = ClipRequest(task="text_to_video_audio", text="A red ball moves up.", sampling=sampling)
            begun = time.perf_counter()
            pieces = stream_clip(pipeline, request)
            while next(pieces).frames is None:
                pass
            first = time.perf_counter() - begun
            list(pieces)
            found += [(first, time.perf_counter() - begun)] if turn else []
    finally:
        engine.close()
    shares = [first / whole for first, whole in found]
    return {
        "first_frame": round(statistics.median(first for first, _ in found), 3),
        "whole_clip": round(statistics.median(whole for _, whole in found), 3),
        "share": round(statistics.median(shares), 3),
        "highest_share": round(max(shares), 3),
    }


def compare(found: Mapping[str, Mapping[int, Sequence[Mapping[str, float]]]], page_bytes: int) -> dict[str, Any]:
    """Medians of each scene, its time over that of scene 1, and how many times as much full attention costs.

    Args:
        found: of each side and number of scene what each round measured.
        page_bytes: of one page.
    """
    rows: dict[str, Any] = {}
    for number in found["scenes"]:
        row: dict[str, Any] = {}
        for side in found:
            rounds = found[side][number]
            pairs = zip(rounds, found[side][min(found[side])], strict=False)
            row[side] = {
                "seconds": round(statistics.median(one["seconds"] for one in rounds), 3),
                "prefill": round(statistics.median(one["prefill"] for one in rounds), 3),
                "pages": int(max(one["pages"] for one in rounds)),
                "cache_bytes": int(max(one["pages"] for one in rounds)) * page_bytes,
                "times_first": round(statistics.median(one["seconds"] / first["seconds"] for one, first in pairs), 3),
            }
        if "full" in found:
            both = list(zip(found["full"][number], found["scenes"][number], strict=False))
            for name in ("seconds", "prefill"):
                row[f"full_over_scenes_{name}"] = round(statistics.median(a[name] / b[name] for a, b in both), 2)
        rows[str(number)] = row
    return rows


def most_pages(config: Any, number: int, longest: int, page: int) -> int:
    """Pages that a scene may hold: `ceil(T / page) + (L - 1) * ceil(scene_length / page)`.

    Args:
        config: the model's.
        number: of the scene, from 1 on.
        longest: ids of the scene itself.
        page: ids of a page.
    """
    total = (number - 1) * config.scene_length + longest
    return -(-total // page) + (config.num_layers - 1) * -(-config.scene_length // page)


def table(report: Mapping[str, Any]) -> str:
    """The report as tables of Markdown."""
    lines = [
        "| scene | seconds | over scene 1 | prefill | pages (at most) | cache | full attention: seconds | prefill "
        "| pages |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for number, row in report["scenes"].items():
        own, full = row["scenes"], row.get("full")
        cells = [
            number,
            f"{own['seconds']:.2f}",
            f"{own['times_first']:.2f}",
            f"{own['prefill']:.3f}",
            f"{own['pages']} ({report['most_pages'][number]})",
            f"{own['cache_bytes'] / 1e6:.1f} MB",
        ]
        cells += (
            ["", "", ""]
            if full is None
            else [
                f"{full['seconds']:.2f} ({row['full_over_scenes_seconds']:.1f} times)",
                f"{full['prefill']:.3f} ({row['full_over_scenes_prefill']:.0f} times)",
                str(full["pages"]),
            ]
        )
        lines.append(f"| {' | '.join(cells)} |")
    early = report["first_frame"]
    lines += [
        "",
        f"First frame of a streamed clip after {early['first_frame']:.2f} s of {early['whole_clip']:.2f} s: "
        f"{100 * early['share']:.0f} % (at most {100 * early['highest_share']:.0f} %).",
    ]
    return "\n".join(lines)


def plot(report: Mapping[str, Any], path: Path) -> None:
    """Seconds, prefill and cache over scenes, of both sides."""
    import matplotlib.pyplot as plt

    numbers = [int(number) for number in report["scenes"]]
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.3), layout="constrained")
    kinds = (
        ("seconds", "seconds a scene", 1.0),
        ("prefill", "seconds to its first id", 1.0),
        ("cache_bytes", "cache, MB", 1e-6),
    )
    for side, colour, name in (("scenes", "tab:blue", "scene-local layers"), ("full", "tab:red", "full attention")):
        rows = [row[side] for row in report["scenes"].values() if side in row]
        for axis, (key, title, scale) in zip(axes, kinds, strict=True):
            axis.plot(numbers[: len(rows)], [row[key] * scale for row in rows], "o-", color=colour, label=name)
            axis.set(xlabel="scene", title=title, ylim=(0, None))
    axes[0].legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    about = (__doc__ or "").partition("\n")[0]
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--bundle", type=Path, help="none: the shipped one")
    add("--scenes", type=int, nargs="+", default=[1, 4, 8, 16, 28], help="which scenes of a film are measured")
    add("--rounds", type=int, default=5, help="that count")
    add("--full-rounds", type=int, default=1, help="of full attention, whose long films take minutes; 0 leaves it out")
    add("--output", type=Path, default=ROOT / "runs" / "benchmarks" / f"{Path(__file__).stem}.json", help="JSON report")
    options = parser.parse_args(arguments)
    if min(*options.scenes, options.rounds, options.full_rounds + 1) < 1:
        parser.error("scenes and rounds must be at least 1, and --full-rounds not negative")
    options.scenes = sorted(set(options.scenes))
    return options


def main() -> None:
    """Measure both sides, print the table, write report and plot."""
    options = parse()
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    os.environ.setdefault("MPLBACKEND", "Agg")
    import torch

    from poet.bundle import Bundle, default_bundle
    from poet.grammar import max_output_length
    from poet_serving.settings import BLOCK_SIZE, EngineSettings

    about = hardware(torch.get_num_threads())
    bundle = Bundle.open(options.bundle or default_bundle())
    first_frame = measure_first_frame(bundle.path, options.rounds)
    say(f"first frame: {first_frame}")
    context = multiprocessing.get_context("spawn")
    sides = SIDES if options.full_rounds else SIDES[:1]
    connections, workers = {}, []
    for side in sides:
        connections[side], theirs = context.Pipe()
        worker = context.Process(target=serve, args=(side, bundle.path, options.scenes[-1], theirs), daemon=True)
        worker.start()
        theirs.close()
        workers.append(worker)
        connections[side].recv()
    found: dict[str, dict[int, list[dict[str, float]]]] = {side: {} for side in sides}
    for turn in range(max(options.rounds, options.full_rounds) + 1):
        for side in sides if turn % 2 else reversed(sides):
            for number in options.scenes:
                if turn > (options.rounds if side == "scenes" else options.full_rounds):
                    continue
                if not turn and number > options.scenes[0]:
                    continue  # one scene is enough to warm up
                connections[side].send((number, turn))
                answer = connections[side].recv()
                if turn:
                    found[side].setdefault(number, []).append(answer)
                    say(f"{side}, scene {number}: {answer}")
    for connection, worker in zip(connections.values(), workers, strict=True):
        connection.send(None)
        worker.join()
    settings = EngineSettings.of_bundle(bundle.path, max_num_seqs=1, num_scenes=options.scenes[-1])
    one = request_of(bundle, 1, 0)
    longest = len(one.prefix_ids) + max_output_length(one.grammar)
    report = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "commit": commit("recipes/benchmarks/*.py", "serving", "poet"),
        "hardware": about,
        "bundle": bundle.path.name,
        "weights": bundle.weights_sha256[:12],
        "versions": {package: version_of(package) for package in ("torch", "vllm")},
        "settings": {"rounds": options.rounds, "full_rounds": options.full_rounds, "dtype": settings.dtype},
        "first_frame": first_frame,
        "most_pages": {
            str(number): most_pages(bundle.model_config, number, longest, BLOCK_SIZE) for number in options.scenes
        },
        "scenes": compare(found, settings.page_bytes),
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    plot(report, options.output.with_suffix(".png"))
    print(table(report))
    print(f"written to {options.output}")


if __name__ == "__main__":
    main()
