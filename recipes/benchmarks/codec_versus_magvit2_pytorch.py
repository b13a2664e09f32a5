"""Measure the nano video codec against the small LFQ model of magvit2-pytorch: speed and quality, by the same rules.

    python recipes/benchmarks/codec_versus_magvit2_pytorch.py --make-environment    once: builds the peer's environment
    python recipes/benchmarks/codec_versus_magvit2_pytorch.py                       measures

Each side is a worker: this file again, in the side's own interpreter, told over its standard input what to do next. The
workers take turns and never run at the same time.

Rules, the same for both sides:

- One thread. Time is the worker's CPU time, user and system, so that a busy machine changes it little.
- Speed: clips of 17 frames, one at a time, pixels to codes and codes to pixels, weights untrained. Rounds alternate
  which side comes first; a figure is the median over the rounds, a ratio is the median of the rounds' ratios.
- Quality: the same clips in the same order and batches, once through, in fp32; AdamW, a linear warm-up over a tenth of
  the steps and a cosine down to 2 %, gradients clipped to norm 1, weights averaged along the way. PSNR is that of
  clips that neither side has seen, through codes and back, over the better of the last and the averaged weights.
- The nano codec learns with its recipe's learning rate and losses. The peer learns with its package's losses and
  optimiser, at each of `--peer-learning-rates`; its best PSNR counts.

Where the sides differ is in the output as well: the peer spends 16 bits on a code and the nano codec 12, at the same
number of codes a clip.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import functools
import importlib
import importlib.metadata
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
from machine import ROOT, commit, hardware
from numpy.typing import NDArray

RECIPE: Final = ROOT / "recipes" / "nano" / "video_tokenizer.yaml"
PEER: Final = "magvit2-pytorch"
PEER_REQUIREMENTS: Final = ("magvit2-pytorch==0.5.1", "vector-quantize-pytorch==1.32.0", "torch==2.13.0")
PEER_LAYERS: Final = ("residual", *("compress_space", "residual") * 3, *("compress_time", "residual") * 2)
TRAINING_SIZE: Final = 64
WARMUP_SHARE, FLOOR, EMA_DECAY, GRADIENT_CLIP = 0.1, 0.02, 0.998, 1.0

Clips = NDArray[np.uint8]
"""(clips, N, H, W, 3)."""
say = functools.partial(print, file=sys.stderr, flush=True)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingPlan:
    """What both sides are told about training."""

    batch_size: int
    learning_rate: float | None  # None is the recipe's
    seed: int

    def schedule(self, num_clips: int) -> tuple[int, int]:
        """Steps in all and steps of the warm-up."""
        num_steps = num_clips // self.batch_size
        return num_steps, max(1, round(WARMUP_SHARE * num_steps))


class Codec(NamedTuple):
    """A model of either side with its two ways. Videos are (B, 3, N, H, W) float32 in [-1, 1]."""

    model: Any
    encode: Callable[[Any], Any]
    decode: Callable[[Any], Any]


class _PoetSide:
    """The nano codec, trained by Poet's own trainer with the nano recipe."""

    packages: tuple[str, ...] = ("torch", "openpoet")

    def __init__(self) -> None:
        from poet.training.config import build, read_recipe
        from poet.training.video_tokenizer import VideoTokenizerRecipe

        values = read_recipe(RECIPE)
        self.recipe = build(VideoTokenizerRecipe, {key: values[key] for key in values.keys() - {"train", "loop"}})
        self.bits_per_code = self.recipe.codec.num_bits

    def build(self, size: int) -> Codec:
        """An untrained codec for `size` x `size` pixels, ready to be timed."""
        from poet_tokenizers.magvit2.model import MagViT2

        return self._codec(MagViT2(self.recipe.codec))

    def train(self, clips: Clips, plan: TrainingPlan) -> dict[str, Codec]:
        """Train once through `clips`: the codec with the "last" and with the "averaged" weights."""
        from poet.training.video_tokenizer import VideoTokenizerTraining

        num_steps, warmup_steps = plan.schedule(len(clips))
        schedule = {"num_steps": num_steps, "warmup_steps": warmup_steps, "learning_rate_floor": FLOOR}
        rules = {"ema_decay": EMA_DECAY, "gradient_clip": GRADIENT_CLIP, "precision": "fp32", "validation_clips": 1}
        chosen: dict[str, Any] = {**schedule, **rules, "batch_size": plan.batch_size, "seed": plan.seed}
        source = _StoredClips(clips)
        training = VideoTokenizerTraining(dataclasses.replace(self.recipe, **chosen), [source], [source])
        for step in range(num_steps):
            training.train_step(step)
        return {"last": self._codec(training.model), "averaged": self._codec(training.average.module)}

    @staticmethod
    def _codec(model: Any) -> Codec:
        return Codec(model.eval(), model.encode, model.decode)


class _PeerSide:
    """magvit2-pytorch's VideoTokenizer: three halvings of space, two of time, no discriminator, no perceptual loss.

    It learns with the package's own losses and optimiser, weight decay and all. Its trainer averages weights as well.
    """

    packages: tuple[str, ...] = ("torch", PEER, "vector-quantize-pytorch")
    bits_per_code = 16

    def __init__(self) -> None:
        import torch

        if torch.version.cuda is None:
            # torchvision on PyPI is linked against CUDA and its operators do not load beside a CPU torch. The package
            # imports it for a perceptual loss that is off here; that import only asks that these two names exist.
            for name in ("nms", "qnms"):
                torch.library.define(f"torchvision::{name}", "(Tensor boxes, Tensor scores, float threshold) -> Tensor")
        self.package = importlib.import_module("magvit2_pytorch")
        self.optimizers = importlib.import_module("magvit2_pytorch.optimizer")

    def build(self, size: int) -> Codec:
        sizes = {"image_size": size, "init_dim": 32, "max_dim": 128, "codebook_size": 2**self.bits_per_code}
        losses = {"use_gan": False, "perceptual_loss_weight": 0.0}
        return self._codec(self.package.VideoTokenizer(**sizes, **losses, layers=PEER_LAYERS))

    def train(self, clips: Clips, plan: TrainingPlan) -> dict[str, Codec]:
        import torch

        from poet.training.loop import ExponentialMovingAverage, cosine_schedule

        rate = plan.learning_rate
        assert rate is not None
        torch.manual_seed(plan.seed)
        model = self.build(clips.shape[2]).model.train()
        average = ExponentialMovingAverage(model, EMA_DECAY)
        optimizer = self.optimizers.get_optimizer(model.parameters(), lr=rate)
        num_steps, warmup_steps = plan.schedule(len(clips))
        for step in range(num_steps):
            for group in optimizer.param_groups:
                group["lr"] = rate * cosine_schedule(step, warmup_steps, num_steps, FLOOR)
            batch = clips[step * plan.batch_size : (step + 1) * plan.batch_size]
            loss, _ = model((to_video(batch) + 1) / 2, return_loss=True)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), GRADIENT_CLIP)
            optimizer.step()
            average.update(model)
        return {"last": self._codec(model), "averaged": self._codec(average.module)}

    @staticmethod
    def _codec(model: Any) -> Codec:
        """The package's pixels lie in [0, 1]."""
        decode = model.eval().decode_from_code_indices
        return Codec(model, lambda video: model.tokenize((video + 1) / 2), lambda codes: decode(codes) * 2 - 1)


Side = _PoetSide | _PeerSide
SIDES: Final[dict[str, type[Side]]] = {"poet": _PoetSide, "peer": _PeerSide}


class _StoredClips:
    """Clips that were drawn before, as Poet's trainer asks for them."""

    def __init__(self, clips: Clips) -> None:
        self.clips = clips

    def __len__(self) -> int:
        return len(self.clips)

    def frames(self, index: int) -> NDArray[np.uint8]:
        return self.clips[index]


def to_video(clips: Clips) -> Any:
    """(B, N, H, W, 3) uint8 to (B, 3, N, H, W) float32 in [-1, 1]."""
    import torch

    return torch.from_numpy(clips).permute(0, 4, 1, 2, 3).float().contiguous() / 127.5 - 1


def describe(side: Side) -> dict[str, Any]:
    """What is measured: parameters, bits a code, shape of a clip's codes and versions."""
    import torch

    codec = side.build(TRAINING_SIZE)
    codes = codec.encode(torch.zeros(1, 3, 17, TRAINING_SIZE, TRAINING_SIZE))
    return {
        "parameters": sum(weight.numel() for weight in codec.model.parameters()),
        "bits_per_code": side.bits_per_code,
        "codes_of_a_clip": list(codes.shape[1:]),
        "versions": {name: importlib.metadata.version(name) for name in side.packages},
    }


def time_codec(codec: Codec, clips: Clips, precision: str) -> dict[str, float]:
    """CPU seconds of encoding and of decoding every clip once, one at a time."""
    import torch

    seconds = {"frames": float(clips.shape[0] * clips.shape[1]), "encode": 0.0, "decode": 0.0}
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        for video in [to_video(clip[None]) for clip in clips]:
            begun = time.process_time()
            codes = codec.encode(video)
            between = time.process_time()
            codec.decode(codes)
            seconds["encode"] += between - begun
            seconds["decode"] += time.process_time() - between
    return seconds


def train_and_score(side: Side, clips: Clips, held_out: Clips, plan: TrainingPlan) -> dict[str, Any]:
    """CPU seconds of training, and the mean PSNR in dB of `held_out` by the last and by the averaged weights."""
    import torch

    from poet_tokenizers.magvit2.losses import psnr

    begun = time.process_time()
    codecs = side.train(clips, plan)
    seconds = time.process_time() - begun
    scores: dict[str, list[float]] = {name: [] for name in codecs}
    with torch.inference_mode():
        for video in (to_video(clip[None]) for clip in held_out):
            for name, codec in codecs.items():
                scores[name].append(float(psnr(codec.decode(codec.encode(video)).clamp(-1, 1), video)))
    means = {name: statistics.fmean(values) for name, values in scores.items()}
    # A side that diverged has no PSNR; nothing is worse than 0 dB here.
    best = max((mean for mean in means.values() if math.isfinite(mean)), default=0.0)
    return {"cpu_seconds": round(seconds, 1), "psnr": round(best, 3), "psnr_by_weights": means}


def serve(name: str) -> None:
    """Be a worker: answer one JSON line with another until standard input ends."""
    with os.fdopen(os.dup(1), "w", buffering=1) as replies:
        os.dup2(2, 1)  # whatever a library prints must not look like an answer
        import torch

        torch.set_num_threads(1)
        torch.manual_seed(0)
        side = SIDES[name]()
        build = functools.cache(side.build)
        for line in sys.stdin:
            order = json.loads(line)
            if order["do"] == "describe":
                answer = describe(side)
            elif order["do"] == "time":
                answer = time_codec(build(order["size"]), np.load(order["clips"]), order["precision"])
            else:
                plan = TrainingPlan(**order["plan"])
                answer = train_and_score(side, np.load(order["clips"]), np.load(order["held_out"]), plan)
            replies.write(json.dumps(answer) + "\n")


class Worker:
    """A side in its own process, run by the Python `interpreter`."""

    def __init__(self, name: str, interpreter: Path) -> None:
        self.name = name
        threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
        paths = os.pathsep.join([str(ROOT), str(ROOT / "tokenizers")])
        self.process = subprocess.Popen(
            [str(interpreter), "-W", "ignore", str(Path(__file__).resolve()), "--worker", name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **threads, "PYTHONPATH": paths},
        )

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        """Give an order and wait for its answer.

        Raises:
            SystemExit: the worker ended; what it said is on standard error.
        """
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
            self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            sys.exit(
                f"the worker {self.name!r} ended with status {self.process.wait()} at {do!r}; its words are above."
            )
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        """Let the worker end."""
        with self.process:  # closes its pipes, then waits
            pass


def draw_clips(split: str, count: int, size: int) -> Clips:
    """Toybox clips; beyond 64 pixels each pixel is repeated, which is all that a measurement of speed needs."""
    from poet.data.toybox import ToyboxSource

    source = ToyboxSource(split, count)
    clips = np.stack([source.frames(index) for index in range(count)])
    factor, rest = divmod(size, clips.shape[2])
    if factor < 1 or rest:
        sys.exit(f"--sizes must be multiples of {clips.shape[2]}, got {size}.")
    return clips.repeat(factor, axis=2).repeat(factor, axis=3)


def measure_speed(workers: Sequence[Worker], options: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """Every size and precision, in rounds that alternate which side comes first; one round before them is dropped."""
    cases = []
    for size in options.sizes:
        file = folder / f"speed_{size}.npy"
        np.save(file, draw_clips("seen", options.timing_clips, size))
        for precision in ("fp32", "bf16"):
            rounds: dict[str, list[dict[str, Any]]] = {worker.name: [] for worker in workers}
            for number in range(options.rounds + 1):
                for worker in workers if number % 2 else reversed(workers):
                    answer = worker.ask("time", size=size, precision=precision, clips=str(file))
                    if number:
                        rounds[worker.name].append(answer)
            cases.append({"size": size, "precision": precision, **compare_speed(rounds)})
            say(f"speed at {size} px, {precision}: done")
    return cases


def compare_speed(rounds: Mapping[str, Sequence[Mapping[str, float]]]) -> dict[str, Any]:
    """For encoding, decoding and both: frames a CPU-second of each side, and the ratio of poet's to the peer's."""
    found: dict[str, Any] = {}
    for name, parts in (("both", ("encode", "decode")), ("encode", ("encode",)), ("decode", ("decode",))):
        speeds = {
            side: [answer["frames"] / sum(answer[part] for part in parts) for answer in answers]
            for side, answers in rounds.items()
        }
        ratios = [poet / peer for poet, peer in zip(speeds["poet"], speeds["peer"], strict=True)]
        found[name] = {
            "ratio": round(statistics.median(ratios), 2),
            "lowest_ratio": round(min(ratios), 2),
            "highest_ratio": round(max(ratios), 2),
            "frames_per_cpu_second": {side: round(statistics.median(of), 2) for side, of in speeds.items()},
        }
    return found


def measure_quality(workers: Sequence[Worker], options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Train both sides on the same clips and score them on others."""
    files = {"clips": folder / "train.npy", "held_out": folder / "held_out.npy"}
    np.save(files["clips"], draw_clips("train", options.training_clips, TRAINING_SIZE))
    np.save(files["held_out"], draw_clips("seen", options.held_out_clips, TRAINING_SIZE))
    paths = {name: str(file) for name, file in files.items()}
    runs: dict[str, list[dict[str, Any]]] = {}
    for worker in workers:
        for rate in options.peer_learning_rates if worker.name == "peer" else [None]:
            plan = TrainingPlan(batch_size=options.batch_size, learning_rate=rate, seed=options.seed)
            answer = {"learning_rate": rate, **worker.ask("train", plan=dataclasses.asdict(plan), **paths)}
            runs.setdefault(worker.name, []).append(answer)
            say(f"trained: {worker.name}, {answer}")
    best = {name: max(of, key=lambda run: float(run["psnr"])) for name, of in runs.items()}
    return {
        "psnr_difference": round(best["poet"]["psnr"] - best["peer"]["psnr"], 2),
        "training_speed_ratio": round(best["peer"]["cpu_seconds"] / best["poet"]["cpu_seconds"], 2),
        "best": best,
        "runs": runs,
    }


def table(report: Mapping[str, Any]) -> str:
    """The report as text, ratios first."""
    row = "{:46}{:>10}  {:15}{:>9}{:>9}".format
    lines = [row(f"poet against {PEER}", "ratio", "lowest..highest", "poet", "peer")]
    for case in report["speed"]:
        for name, phase in (("both", "encode + decode"), ("encode", "encode"), ("decode", "decode")):
            found = case[name]
            spread = f"{found['lowest_ratio']:.2f}..{found['highest_ratio']:.2f}"
            speeds = [f"{found['frames_per_cpu_second'][side]:.1f}" for side in SIDES]
            what = f"{phase}, {case['size']} px, {case['precision']}, frames/CPU-s"
            lines.append(row(what, f"{found['ratio']:.2f}x", spread, *speeds))
    quality, count = report["quality"], report["settings"]["training_clips"]
    scores = [f"{quality['best'][side]['psnr']:.2f}" for side in SIDES]
    speeds = [f"{count / quality['best'][side]['cpu_seconds']:.2f}" for side in SIDES]
    lines.append(row(f"PSNR after {count} training clips, dB", f"{quality['psnr_difference']:+.2f}", "", *scores))
    lines.append(row("training, clips/CPU-s", f"{quality['training_speed_ratio']:.2f}x", "", *speeds))
    for name, about in report["sides"].items():
        codes = " x ".join(map(str, about["codes_of_a_clip"]))
        size = f"{about['parameters'] / 1e6:.1f} M parameters"
        lines.append(f"{name}: {size}, {codes} codes of {about['bits_per_code']} bits a clip, {about['versions']}")
    lines.append(f"{report['hardware']}, {report['date']}, commit {report['commit']}")
    return "\n".join(lines)


def make_environment(folder: Path) -> None:
    """A virtual environment with the peer in it; nothing is done where it is already."""
    if (folder / "ready").exists():
        return
    say(f"building the peer's environment in {folder}: some minutes")
    subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
    subprocess.run([str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet", *PEER_REQUIREMENTS], check=True)
    (folder / "ready").touch()


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    about = (__doc__ or "").partition("\n")[0]
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--peer-environment", type=Path, default=ROOT / "runs" / "peers" / PEER, help="folder of the peer's packages")
    add("--make-environment", action="store_true", help="only build the peer's environment")
    add("--sizes", type=int, nargs="+", default=[64, 128], help="height and width in pixels to time")
    add("--timing-clips", type=int, default=3, help="clips a round")
    add("--rounds", type=int, default=5, help="rounds a size and precision")
    add("--training-clips", type=int, default=128, help="clips to learn from, once through")
    add("--held-out-clips", type=int, default=64, help="clips to score")
    add("--batch-size", type=int, default=2, help="clips a step")
    add("--peer-learning-rates", type=float, nargs="+", default=[1e-3, 3e-4], help="tried in turn, the best counts")
    add("--seed", type=int, default=0, help="of the weights")
    add("--output", type=Path, default=ROOT / "runs" / "benchmarks" / f"{Path(__file__).stem}.json", help="JSON report")
    add("--worker", choices=tuple(SIDES), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if min(options.timing_clips, options.rounds, options.held_out_clips, options.batch_size) < 1:
        parser.error("counts must be at least 1")
    if options.training_clips < options.batch_size:
        parser.error(f"--training-clips must be at least one batch of {options.batch_size}")
    return options


def main() -> None:
    """Measure both sides, print the table, write the report."""
    options = parse()
    if options.worker:
        serve(options.worker)
        return
    if options.make_environment:
        make_environment(options.peer_environment)
        return
    interpreter = options.peer_environment / "bin" / "python"
    if not interpreter.exists():
        sys.exit(f"{PEER} must be installed in {options.peer_environment}; run this script with --make-environment.")
    training = [f"poet/training/{name}.py" for name in ("config", "loop", "video_tokenizer")]
    measured = ("recipes/benchmarks/*.py", str(RECIPE), *training, "tokenizers/poet_tokenizers/magvit2")
    begun = {"commit": commit(*measured), "hardware": hardware(threads=1)}
    workers = [Worker("poet", Path(sys.executable)), Worker("peer", interpreter)]
    with tempfile.TemporaryDirectory() as folder:
        sides = {worker.name: worker.ask("describe") for worker in workers}
        speed = measure_speed(workers, options, Path(folder))
        quality = measure_quality(workers, options, Path(folder))
    for worker in workers:
        worker.close()
    kept = ("sizes", "timing_clips", "rounds", "training_clips", "held_out_clips", "batch_size", "seed")
    report = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        **begun,
        "settings": {name: getattr(options, name) for name in kept},
        "sides": sides,
        "speed": speed,
        "quality": quality,
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(table(report))
    print(f"written to {options.output}")


if __name__ == "__main__":
    main()
