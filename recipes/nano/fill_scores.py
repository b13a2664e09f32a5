"""Write what `poet evaluate` measured into every page that shows it: the README, this folder's and the model card.

    poet evaluate -o runs/nano/evaluation
    poet evaluate --what reconstruction -o runs/nano/reconstruction
    poet evaluate --what films --count 40 -o runs/nano/films
    python recipes/nano/fill_scores.py runs/nano/evaluation runs/nano/reconstruction --films runs/nano/films

What stands between `<!-- scores -->`, `<!-- tokenizers -->` or `<!-- films -->` and the next `<!-- end -->` of a page
is replaced. No figure on these pages is typed by hand.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

ROOT: Final = Path(__file__).resolve().parents[2]
PAGES: Final = ("README.md", "recipes/nano/README.md", "poet/bundles/nano/README.md")
SPLITS: Final = ("seen", "unseen")
LABELS: Final = {"sync": "picture and sound in step", "everything": "clips with every attribute right"}


def scores(report: dict[str, Any], commit: str) -> str:
    """What the model writes, from the report.json of `poet evaluate`."""
    about, summary = report["about"], report["summary"]
    count = max(found["count"] for found in summary["seen"].values())
    sampling = f"temperature {about['temperature']}, top-p {about['top_p']}, top-k {about['top_k'] or 'off'}, "
    sampling += f"guidance {about['guidance_scale']}"
    lines = [
        f"Share of {count} generated clips a split in which the judge sees and hears what the caption says",
        f"(`poet evaluate`, commit {commit}, {about['date']}, {about['engine']}, {sampling}). *Seen* are new clips of",
        "combinations that training held, *unseen* combinations of shape, colour and motion that it never did.",
        "",
        "| | seen | unseen |",
        "|---|---|---|",
    ]
    whole = [f"**{report['measures'][f'attributes right, {split}']:.1%}**" for split in SPLITS]
    lines.append(f"| **all attributes** | {' | '.join(whole)} |")
    for name in summary["seen"]:
        shares = [f"{summary[split][name]['share']:.1%}" if name in summary[split] else "" for split in SPLITS]
        lines.append(f"| {LABELS.get(name, name)} | {' | '.join(shares)} |")
    return "\n".join(lines).replace("%", " %")


def tokenizers(reports: dict[str, dict[str, Any]]) -> str:
    """What the tokenizers keep, from the report.json of each split of `poet evaluate --what reconstruction`."""
    measures = {split: reports[split]["measures"] for split in SPLITS}
    formats = {
        "psnr": ("PSNR, mean over clips", "{:.1f} dB"),
        "psnr pooled": ("PSNR of the pooled error", "{:.1f} dB"),
        "ssim": ("SSIM", "{:.3f}"),
        "mel distance": ("log-mel distance", "{:.2f}"),
        "si-snr": ("SI-SNR", "{:.1f} dB"),
        "attributes kept": ("**attributes still right**", "**{:.1%}**"),
    }
    lines = [f"{reports['seen']['title'].split()[0]} clips a split (`poet evaluate --what reconstruction`):", ""]
    lines += ["| | seen | unseen |", "|---|---|---|"]
    for name in measures["seen"]:
        label, form = formats.get(name, (name.replace(" kept", " still right"), "{:.1%}"))
        if " codes used" in name:
            form = "{:,}"
        elif name.endswith("perplexity"):
            form = "{:.0f}"
        shown = [form.format(measures[split][name]) if name in measures[split] else "" for split in SPLITS]
        lines.append(f"| {label} | {' | '.join(shown)} |")
    return "\n".join(lines).replace("%", " %")


FILM_MEASURES: Final = {
    "attributes right": "**all attributes, all scenes**",
    "last scene minus first, points": "last scene less the first",
    "films with the object asked for in all scenes": "films whose object has its colour, shape and size in all scenes",
    "scenes with the object asked for": "scenes whose object has them",
    "borders with a jump under 4 pixels": "borders at which it stays where it was, within 4 pixels",
    "borders with a click ratio under 2": "borders without a click",
    "borders with a click ratio under 2, as drawn": "borders without one in the drawn films",
}


def films(report: dict[str, Any], commit: str) -> str:
    """How films fare, from the report.json of `poet evaluate --what films`."""
    about, measures = report["about"], report["measures"]
    title = str(report["title"]).removesuffix(" a split")
    lines = [
        f"{title} a split (`poet evaluate --what films`, commit {commit}, {about['date']}, temperature "
        f"{about['temperature']}):",
        "",
        "| | seen | unseen |",
        "|---|---|---|",
    ]
    for name, label in FILM_MEASURES.items():
        form = "{:+.1f} points" if name.endswith("points") else "{:.1%}"
        shown = [form.format(measures[f"{name}, {split}"]) for split in SPLITS]
        lines.append(f"| {label} | {' | '.join(shown)} |")
    return "\n".join(lines).replace("%", " %")


def measured_at(report: dict[str, Any]) -> str:
    """The commit that a report names; the present one for a report that names none."""
    named = report["about"].get("commit")
    if named is not None:
        return str(named)
    return subprocess.check_output(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, text=True).strip()


def filled(page: str, blocks: dict[str, str]) -> str:
    """The page with every marked block replaced; a marker without an end is an error."""
    for name, text in blocks.items():
        marker = f"<!-- {name} -->"
        for after in page.split(marker)[1:]:
            following = re.search(r"<!-- (\w+) -->", after)
            if following is None or following[1] != "end":
                raise SystemExit(f"{marker} must be followed by <!-- end -->.")
        page = re.sub(
            f"{marker}.*?<!-- end -->", lambda _, t=text, m=marker: f"{m}\n{t}\n<!-- end -->", page, flags=re.DOTALL
        )
    return page


def main(arguments: Sequence[str] | None = None) -> None:
    """Fill all pages."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("evaluation", type=Path, help="what `poet evaluate -o` wrote")
    parser.add_argument(
        "reconstruction",
        type=Path,
        nargs="?",
        help="what `poet evaluate --what reconstruction -o` wrote; left out where the tokenizers are as they were",
    )
    parser.add_argument("--films", type=Path, help="what `poet evaluate --what films -o` wrote")
    options = parser.parse_args(arguments)
    report = json.loads((options.evaluation / "report.json").read_text(encoding="utf-8"))
    blocks = {"scores": scores(report, measured_at(report))}
    if options.reconstruction is not None:
        kept = {split: json.loads((options.reconstruction / split / "report.json").read_text()) for split in SPLITS}
        blocks["tokenizers"] = tokenizers(kept)
    if options.films is not None:
        of_films = json.loads((options.films / "report.json").read_text(encoding="utf-8"))
        blocks["films"] = films(of_films, measured_at(of_films))
    for page in PAGES:
        file = ROOT / page
        file.write_text(filled(file.read_text(encoding="utf-8"), blocks), encoding="utf-8")
        print(f"{page}: filled")


if __name__ == "__main__":
    main()
