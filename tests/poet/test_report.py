"""Summaries count what they say, reports hold it, sheets can be looked at."""

import json
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest

from poet.errors import ConfigError
from poet.evaluation.report import Results, SheetEntry, contact_sheet, summarise, wilson_interval, write_report
from poet.media import Clip

MARKS = [
    {"colour": True, "pitch": True, "sync": False},
    {"colour": True, "pitch": False},
    {"colour": True},
    {"colour": False, "pitch": False, "sync": True},
    {"colour": True, "pitch": True},
]


def clip(*, num_frames: int = 17, size: int = 64, sound: bool = True) -> Clip:
    rng = np.random.default_rng(5)
    frames = rng.integers(0, 256, (num_frames, size, size, 3)).astype(np.uint8) if num_frames else None
    samples = rng.uniform(-0.7, 0.7, 34_000).astype(np.float32) if sound else None
    return Clip(frames=frames, fps=8.0, samples=samples, sample_rate=16_000)


def test_a_summary_counts_each_name_over_the_clips_that_have_it() -> None:
    summary = summarise(MARKS)
    assert {name: (counted["right"], counted["count"]) for name, counted in summary.items()} == {
        "colour": (4, 5),
        "pitch": (2, 4),
        "sync": (1, 2),
        "everything": (3, 5),
    }
    assert summary["colour"]["share"] == 0.8


def test_names_that_stand_apart_do_not_decide_over_everything() -> None:
    assert summarise(MARKS, apart=())["everything"]["right"] == 2
    assert summarise(MARKS, apart=("sync", "pitch"))["everything"]["right"] == 4
    assert list(summarise([{"sync": True, "colour": True}]))[-2:] == ["sync", "everything"]


def test_the_interval_is_wilsons() -> None:
    low, high = wilson_interval(8, 10)  # the value of Wilson's formula, worked by hand
    assert low == pytest.approx(0.4902, abs=1e-4)
    assert high == pytest.approx(0.9433, abs=1e-4)
    assert wilson_interval(0, 7)[0] == 0.0
    assert wilson_interval(7, 7)[1] == 1.0
    widths = [np.subtract(*wilson_interval(9 * n, 10 * n)[::-1]) for n in (1, 10, 100)]
    assert widths[0] > widths[1] > widths[2]
    with pytest.raises(ConfigError, match="right=3"):
        wilson_interval(3, 2)


def test_a_report_is_written_as_json_and_as_a_table(tmp_path: Path) -> None:
    results = Results(
        title="Five clips",
        about={"model": "tiny", "seed": 3},
        scores={"seen": MARKS, "unseen": MARKS[:2]},
        measures={"psnr": 23.456, "si_snr": float("nan")},
    )
    report = write_report(tmp_path / "new" / "folder", results)
    text = (tmp_path / "new" / "folder" / "report.json").read_text()
    assert json.loads(text) == json.loads(json.dumps(report))
    assert json.loads(text)["summary"]["unseen"]["pitch"]["count"] == 2
    assert json.loads(text)["measures"] == {"psnr": 23.456, "si_snr": None}
    table = (tmp_path / "new" / "folder" / "report.md").read_text()
    assert "| colour | 80.0 % (4 of 5; 37.6 to 96.4) | 100.0 % (2 of 2; 34.2 to 100.0) |" in table
    assert table.index("| sync |") < table.index("| everything |")
    assert "- seed: 3" in table
    assert not list((tmp_path / "new" / "folder").glob("*.part"))


def test_a_summary_of_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match="at least one clip"):
        summarise([])


def test_a_sheet_grows_with_its_clips_and_shows_frames_of_any_number_and_size(tmp_path: Path) -> None:
    said = {"colour": "red", "pitch": "unclear"}
    entries = [
        SheetEntry(clip=clip(), caption="a red star " * 30, said=said, marks={"colour": True, "pitch": False}),
        SheetEntry(clip=clip(num_frames=0), caption="sound alone"),
        SheetEntry(clip=clip(num_frames=1, size=31, sound=False), caption="a picture", said=said),
    ]
    contact_sheet(entries[:1], tmp_path / "one.png")
    contact_sheet(entries, tmp_path / "three.png")
    one, three = (matplotlib.image.imread(tmp_path / name) for name in ("one.png", "three.png"))
    assert three.shape[1] == one.shape[1]
    assert three.shape[0] == 3 * one.shape[0]
    assert np.ptp(one) > 0.5


def test_right_is_green_and_wrong_is_red(tmp_path: Path) -> None:
    def colours(right: bool) -> tuple[int, int]:
        black = Clip(np.zeros((17, 64, 64, 3), np.uint8), 8.0, np.zeros(34_000, np.float32), 16_000)
        contact_sheet(
            [SheetEntry(clip=black, caption="-", said={"shape": "star"}, marks={"shape": right})], tmp_path / "s.png"
        )
        pixels = matplotlib.image.imread(tmp_path / "s.png")[..., :3]
        red, green = pixels[..., 0] - pixels[..., 1], pixels[..., 1] - pixels[..., 0]
        return int((red > 0.4).sum()), int((green > 0.25).sum())

    (red_if_right, green_if_right), (red_if_wrong, green_if_wrong) = colours(True), colours(False)
    assert green_if_right > 20
    assert red_if_wrong > 20
    assert red_if_right == green_if_wrong == 0


def test_a_sheet_of_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="1 to 300"):
        contact_sheet([], tmp_path / "none.png")
