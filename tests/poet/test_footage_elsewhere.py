"""Machines of a cluster see the driver's files, or say that they do not; a cluster is played by a folder."""

import os
import pickle
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from poet.data.clips import open_source
from poet.data.footage import FootageSource, survey_footage
from poet.data.ray_tasks import RayTasks
from poet.data.scene_choice import DropSettings
from poet.data.scene_measuring import SurveySettings
from poet.data.stamps import check_stamps, file_stamp, stamps_of
from poet.errors import ConfigError
from poet.media import Clip, FilePart, write_clip

FPS, N, H, W, RATE = 8.0, 5, 24, 40, 8000
SETTINGS = SurveySettings(split="length", num_frames=N, fps=FPS, sample_rate=RATE)
SIZE: dict[str, Any] = {"fps": FPS, "height": H, "width": W, "num_frames": N, "sample_rate": RATE}
Damage = Callable[[Path], object]


@pytest.fixture
def films(tmp_path: Path) -> Path:
    folder = tmp_path / "films"
    folder.mkdir()
    for number in range(3):
        frames = np.full((12, H, W, 3), 40 * number, np.uint8)
        write_clip(Clip(frames=frames, fps=FPS, samples=None, sample_rate=RATE), folder / f"{number}.mp4")
        (folder / f"{number}.txt").write_text(f"film {number}")
    return folder


class Elsewhere:
    """In place of a cluster: one process in another folder, before whose work something happens to a file."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        folder.mkdir()
        self.before: Callable[[], object] = lambda: None

        def work(_: RayTasks, function: Callable[..., Any], tasks: Iterator[Any], job: object) -> Iterator[Any]:
            for task in tasks:
                self.before()
                sent = pickle.loads(pickle.dumps(task))
                here = Path.cwd()
                os.chdir(folder)
                try:
                    yield function(*([] if job is None else [[job]]), *sent)
                finally:
                    os.chdir(here)

        pytest.importorskip("ray")
        monkeypatch.setattr(RayTasks, "_map", work)
        self.tasks = RayTasks(address="local")


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Elsewhere:
    return Elsewhere(tmp_path / "another folder", monkeypatch)


@pytest.mark.parametrize("kind", ["folder", "manifest"])
def test_files_of_a_relative_path_are_found_from_another_folder(
    films: Path, tmp_path: Path, elsewhere: Elsewhere, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    (tmp_path / "list.jsonl").write_text("".join(f'{{"path": "films/{n}.mp4"}}\n' for n in range(3)))
    monkeypatch.chdir(tmp_path)
    source = Path("films" if kind == "folder" else "list.jsonl")
    footage = survey_footage(source, "out", SETTINGS, DropSettings(), survey=elsewhere.tasks.survey)
    assert not footage.choice.unusable
    scenes, clips = FootageSource(footage, height=H, width=W), open_source(source, **SIZE)
    monkeypatch.chdir(tmp_path / "another folder")
    for source_of in (scenes, clips):
        assert [source_of[index].caption for index in range(2)] == [
            "film 0",
            "film 0" if source_of is scenes else "film 1",
        ]


def change(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"more")


@pytest.mark.parametrize("damage", [Path.unlink, change], ids=["missing", "another"])
def test_a_machine_with_other_files_ends_the_survey_and_is_named(
    films: Path, tmp_path: Path, elsewhere: Elsewhere, damage: Damage
) -> None:
    elsewhere.before = lambda: damage(films / "0.mp4")
    with pytest.raises(ConfigError, match=socket.gethostname()) as raised:
        survey_footage(films, tmp_path / "out", SETTINGS, DropSettings(), survey=elsewhere.tasks.survey)
    assert str(films / "0.mp4") in str(raised.value)


@pytest.mark.parametrize("damage", [Path.unlink, change], ids=["missing", "another"])
@pytest.mark.parametrize(
    ("kind", "name"), [("scenes", "1.mp4"), ("clips", "1.mp4"), ("clips", "1.txt"), ("part", "1.mp4")]
)
def test_a_machine_with_other_files_ends_the_encoding_and_is_named(
    films: Path, tmp_path: Path, elsewhere: Elsewhere, damage: Damage, kind: str, name: str
) -> None:
    source: Any = open_source(films, **SIZE, **({"start": 1} if kind == "part" else {}))
    if kind == "scenes":
        source = FootageSource(survey_footage(films, tmp_path / "out", SETTINGS, DropSettings()), height=H, width=W)
    elsewhere.before = lambda: damage(films / name)
    encoded = elsewhere.tasks.encoding(tmp_path / "bundle", "fingerprint")(source, [range(len(source))], 2)
    with pytest.raises(ConfigError, match=socket.gethostname()) as raised:
        next(encoded)
    assert str(films / name) in str(raised.value)


def test_a_file_that_is_nowhere_and_a_copy_are_no_difference(films: Path, tmp_path: Path) -> None:
    places = [films / "0.mp4", tmp_path / "nowhere.mp4", FilePart(films / "1.mp4", "x", 3, 9)]
    stamps = stamps_of(places)
    check_stamps(stamps)
    # Copies keep the seconds of a time, not always what is below.
    _, changed = file_stamp(films / "0.mp4")
    os.utime(films / "0.mp4", ns=(changed, changed - changed % 10**9))
    check_stamps(stamps)
    os.utime(films / "0.mp4", ns=(changed, changed - 10**10))
    with pytest.raises(ConfigError, match="rsync"):
        check_stamps(stamps)
