"""Draw what tuning on real footage gained, over the steps: PSNR of the codec, loss of the language model.

Both on minutes that were held out.

python recipes/lora/plot_footage.py runs/film/codec runs/film/adapter recipes/lora/footage.png
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure


def measured(run: Path, name: str) -> tuple[list[int], list[float]]:
    """Steps and values of one number that a run's metrics.jsonl holds."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    found = [(line["step"], line[name]) for line in lines if name in line]
    return [step for step, _ in found], [value for _, value in found]


def main() -> None:
    """Draw the plot that the command line asks for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("codec", type=Path, help="run of recipes/tokenizer_training/finetune.yaml")
    parser.add_argument("adapter", type=Path, help="run of recipes/lora/footage.yaml")
    parser.add_argument("plot", type=Path, help="a PNG file, overwritten")
    told = parser.parse_args()
    figure = Figure(figsize=(9, 3.2), dpi=90, layout="constrained")
    FigureCanvasAgg(figure)
    pictures, ids = figure.subplots(1, 2)
    for name, label in (("validation_psnr", "64 pixels"), ("validation_psnr_x2", "128 pixels")):
        pictures.plot(*measured(told.codec, name), "o-", markersize=3, label=label)
    pictures.set_ylabel("PSNR of held-out minutes, dB")
    pictures.legend()
    ids.plot(*measured(told.adapter, "validation_loss"), "o-", markersize=3)
    ids.set_ylabel("loss on held-out minutes, nats an id")
    for axes in (pictures, ids):
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
    figure.savefig(told.plot, format="png")


if __name__ == "__main__":
    main()
