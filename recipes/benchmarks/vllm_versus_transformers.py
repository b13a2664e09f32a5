"""Measure how fast Poet's vLLM engine writes ids, against `generate()` of transformers, by the same rules.

    python recipes/benchmarks/vllm_versus_transformers.py                  the shipped bundle, else random nano weights
    python recipes/benchmarks/vllm_versus_transformers.py --bundle DIR --dtypes bfloat16 --rounds 7

Rules, the same for both sides:

- One process, one thread, the same weights in the same type, prefixes and outputs of the same length, temperature 1.
- Time is CPU time, user and system, so that a busy machine changes it less; wall time stands beside it in the report.
- Rounds alternate which side comes first; a figure is the median over the rounds, a ratio the median of their ratios.
- transformers runs its own Qwen3 (the architecture is the same, its code is tuned) in evaluation and inference mode,
  with the KV cache that was the faster one in a trial, a growing or a static one. It follows no grammar and reads the
  prefix causally, which saves it some work. vLLM masks illegal ids and reads the prefix both ways.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import functools
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Protocol

from machine import ROOT, commit, hardware, version_of

if TYPE_CHECKING:
    from poet.model.config import PoetConfig

RECIPE: Final = ROOT / "recipes" / "nano" / "language.yaml"
NANO_VOCABULARY: Final = 5760
say = functools.partial(print, file=sys.stderr, flush=True)


class Job(NamedTuple):
    """What both sides are asked to do: `batch_size` outputs of `num_ids` ids after prefixes of `prefix_len` ids."""

    batch_size: int
    prefix_len: int
    num_ids: int

    def prefixes(self) -> list[list[int]]:
        """Ids that differ from row to row, all above the special ones."""
        return [
            [256 + (7 * place + 31 * row) % 251 for place in range(self.prefix_len)] for row in range(self.batch_size)
        ]


class Side(Protocol):
    """One of the two engines."""

    def write(self, job: Job) -> None:
        """Write all outputs of the job."""

    def close(self) -> None:
        """Release the weights."""


class VLLMSide:
    """Poet's vLLM engine as `poet generate` uses it."""

    def __init__(self, bundle: Path, dtype: str, max_batch_size: int) -> None:
        from poet_serving.engine import VLLMEngine

        self.vocab_size = json.loads((bundle / "config.json").read_text(encoding="utf-8"))["vocab_size"]
        self.engine = VLLMEngine(bundle, dtype=dtype, max_num_seqs=max_batch_size)

    def write(self, job: Job) -> None:
        """Two ranges, as in a clip: the first half of the output is video, the second sound."""
        from poet.generation.engine import GenerationRequest
        from poet.generation.sampling import SamplingConfig
        from poet.grammar import Segment

        border = 256 + 2 * (self.vocab_size - 256) // 3
        grammar = (
            Segment(job.num_ids // 2, 256, border),
            Segment(job.num_ids - job.num_ids // 2, border, self.vocab_size),
        )
        requests = [
            GenerationRequest(prefix_ids=tuple(prefix), grammar=grammar, sampling=SamplingConfig(seed=row))
            for row, prefix in enumerate(job.prefixes())
        ]
        outputs = self.engine.generate(requests)
        assert [len(output) for output in outputs] == [job.num_ids] * job.batch_size

    def close(self) -> None:
        """End vLLM."""
        self.engine.close()


class TransformersSide:
    """transformers' Qwen3ForCausalLM with Poet's weights."""

    def __init__(self, bundle: Path, dtype: str, trial: Job) -> None:
        import torch
        import transformers

        from poet.model.weights import load_transformer

        source = load_transformer(bundle)
        values = source.config.to_huggingface_dict()
        for name in ("architectures", "model_type", "dtype", "scene_length"):
            values.pop(name)
        build: Any = transformers.Qwen3ForCausalLM
        self.model = build(transformers.Qwen3Config(**values, eos_token_id=None, pad_token_id=0))
        missing, unexpected = self.model.load_state_dict(source.state_dict(), strict=False)
        assert set(missing) <= {"lm_head.weight"} and not unexpected, (missing, unexpected)
        self.model.tie_weights()
        self.model.eval().to(getattr(torch, dtype))
        self.cache = "dynamic"
        seconds = {cache: self._trial(cache, trial) for cache in ("dynamic", "static")}
        self.cache = min(seconds, key=lambda cache: seconds[cache])

    def _trial(self, cache: str, job: Job) -> float:
        self.cache = cache
        self.write(job)
        begun = time.process_time()
        self.write(job)
        return time.process_time() - begun

    def write(self, job: Job) -> None:
        """Sample with `generate()`; nothing ends an output early."""
        import torch

        ids = torch.tensor(job.prefixes())
        with torch.inference_mode():
            output = self.model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=job.num_ids,
                do_sample=True,
                temperature=1.0,
                top_k=0,
                use_cache=True,
                cache_implementation=self.cache,
            )
        assert output.shape == (job.batch_size, job.prefix_len + job.num_ids)

    def close(self) -> None:
        """Drop the weights."""
        del self.model


def time_of(side: Side, job: Job) -> dict[str, float]:
    """Seconds of one job."""
    cpu, wall = time.process_time(), time.perf_counter()
    side.write(job)
    return {"cpu": time.process_time() - cpu, "wall": time.perf_counter() - wall}


def measure(sides: Mapping[str, Side], job: Job, rounds: int) -> dict[str, Any]:
    """Every side in rounds that alternate which comes first; one round before them is dropped."""
    found: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
    for number in range(rounds + 1):
        for name in list(sides) if number % 2 else reversed(list(sides)):
            answer = time_of(sides[name], job)
            if number:
                found[name].append(answer)
    return compare(found, job)


def compare(found: Mapping[str, Sequence[Mapping[str, float]]], job: Job) -> dict[str, Any]:
    """Ids a second of each side, and the ratio of vLLM's to transformers', by CPU time and by wall time."""
    num_ids = job.batch_size * job.num_ids
    result: dict[str, Any] = {}
    for clock in ("cpu", "wall"):
        speeds = {name: [num_ids / answer[clock] for answer in answers] for name, answers in found.items()}
        ratios = [ours / theirs for ours, theirs in zip(speeds["vllm"], speeds["transformers"], strict=True)]
        result[clock] = {
            "ratio": round(statistics.median(ratios), 2),
            "lowest_ratio": round(min(ratios), 2),
            "highest_ratio": round(max(ratios), 2),
            "ids_per_second": {name: round(statistics.median(of), 1) for name, of in speeds.items()},
        }
    return result


@contextlib.contextmanager
def bundle_of(options: argparse.Namespace) -> Iterator[tuple[Path, str]]:
    """The bundle to measure and what to call it; random weights of the nano recipe's shape where none is there."""
    from poet.bundle import default_bundle

    bundle = options.bundle or default_bundle()
    if (bundle / "config.json").exists():
        yield bundle, bundle.name
    elif options.bundle:
        sys.exit(f"--bundle must be a directory with config.json, got {bundle}.")
    else:
        with tempfile.TemporaryDirectory() as folder:
            write_random_bundle(Path(folder), nano_shape())
            yield Path(folder), "random weights of nano's shape"


def nano_shape() -> PoetConfig:
    """The shape in the nano recipe."""
    import yaml

    from poet.model.config import PoetConfig

    return PoetConfig(vocab_size=NANO_VOCABULARY, **yaml.safe_load(RECIPE.read_text(encoding="utf-8"))["model"])


def write_random_bundle(directory: Path, config: PoetConfig) -> None:
    """What an engine needs of a bundle: config.json and model.safetensors."""
    import torch

    from poet.model.transformer import PoetTransformer
    from poet.model.weights import save_weights

    torch.manual_seed(0)
    (directory / "config.json").write_text(json.dumps(config.to_huggingface_dict()), encoding="utf-8")
    save_weights(PoetTransformer(config), directory / "model.safetensors")


def table(report: Mapping[str, Any]) -> str:
    """The report as text, ratios first."""
    row = "{:34}{:>8}  {:15}{:>9}{:>14}".format
    lines = [row("ids/CPU-s, one thread", "ratio", "lowest..highest", "vllm", "transformers")]
    for case in report["cases"]:
        found = case["cpu"]
        spread = f"{found['lowest_ratio']:.2f}..{found['highest_ratio']:.2f}"
        speeds = [f"{found['ids_per_second'][side]:.0f}" for side in ("vllm", "transformers")]
        lines.append(row(f"{case['dtype']}, batch {case['batch_size']}", f"{found['ratio']:.2f}x", spread, *speeds))
    settings = report["settings"]
    lines.append(
        f"{report['bundle']}, {report['parameters'] / 1e6:.1f} M parameters, {settings['num_ids']} ids after "
        f"{settings['prefix_len']}, {report['versions']}, transformers' caches: {report['transformers_caches']}"
    )
    lines.append(f"{report['hardware']}, {report['date']}, commit {report['commit']}")
    return "\n".join(lines)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    about = (__doc__ or "").partition("\n")[0]
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--bundle", type=Path, help="directory with config.json and model.safetensors; none: the shipped one")
    add("--dtypes", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16"])
    add("--batch-sizes", type=int, nargs="+", default=[1, 16], help="outputs at once")
    add("--prefix-len", type=int, default=24, help="ids of a prefix")
    add("--num-ids", type=int, default=512, help="ids of an output")
    add("--rounds", type=int, default=5, help="rounds a case")
    add("--output", type=Path, default=ROOT / "runs" / "benchmarks" / f"{Path(__file__).stem}.json", help="JSON report")
    options = parser.parse_args(arguments)
    if min(*options.batch_sizes, options.prefix_len, options.rounds, options.num_ids - 1) < 1:
        parser.error("counts must be at least 1, and --num-ids at least 2")
    return options


def main() -> None:
    """Measure both sides, print the table, write the report."""
    options = parse()
    # Before torch and vLLM are imported: the rule of one thread, and quiet logs.
    os.environ.update({"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"})
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    about = hardware(threads=1)
    from poet.model.config import PoetConfig

    cases, caches = [], {}
    with bundle_of(options) as (bundle, name):
        shape = PoetConfig.from_huggingface_dict(json.loads((bundle / "config.json").read_text(encoding="utf-8")))
        for dtype in options.dtypes:
            trial = Job(max(options.batch_sizes), options.prefix_len, min(64, options.num_ids))
            transformers = TransformersSide(bundle, dtype, trial)
            caches[dtype] = transformers.cache
            vllm = VLLMSide(bundle, dtype, max(options.batch_sizes))
            for batch_size in options.batch_sizes:
                job = Job(batch_size, options.prefix_len, options.num_ids)
                result = measure({"vllm": vllm, "transformers": transformers}, job, options.rounds)
                cases.append({"dtype": dtype, "batch_size": batch_size, **result})
                say(f"{dtype}, batch {batch_size}: {result['cpu']}")
            vllm.close()
            transformers.close()
    report = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "commit": commit("recipes/benchmarks/*.py", "serving", "poet/model", "poet/generation"),
        "hardware": about,
        "bundle": name,
        "parameters": shape.num_parameters,
        "versions": {package: version_of(package) for package in ("torch", "vllm", "transformers")},
        "settings": {key: getattr(options, key) for key in ("batch_sizes", "prefix_len", "num_ids", "rounds")},
        "transformers_caches": caches,
        "cases": cases,
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(table(report))
    print(f"written to {options.output}")


if __name__ == "__main__":
    main()
