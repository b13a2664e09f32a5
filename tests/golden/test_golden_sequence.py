"""Ids as they are stored in shards. After a change that is meant: python tests/golden/regenerate.py."""

import json
import runpy
from pathlib import Path

import pytest

from poet.sequence import check_output, grammar_from_json, pack, unpack
from poet.tasks import TASKS
from poet.testing import tiny_vocabulary

HERE = Path(__file__).parent
GOLDEN = runpy.run_path(str(HERE / "regenerate.py"))["GOLDEN"]
HINT = "If the change is meant, run: python tests/golden/regenerate.py"


@pytest.fixture(scope="module")
def stored() -> dict[str, dict]:
    return json.loads((HERE / "packed_scenes.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def made() -> dict[str, dict]:
    return json.loads(GOLDEN["packed_scenes.json"]())


def test_the_layout_of_the_vocabulary_is_the_golden_one():
    assert json.loads(GOLDEN["vocabulary_layout.json"]()) == json.loads(
        (HERE / "vocabulary_layout.json").read_text(encoding="utf-8")
    ), HINT


def test_there_is_a_golden_scene_of_every_task(stored):
    assert list(stored) == list(TASKS), HINT


@pytest.mark.parametrize("task", TASKS)
def test_a_scene_packs_to_the_golden_ids(task, stored, made):
    assert made[task] == stored[task], HINT


@pytest.mark.parametrize("task", TASKS)
def test_the_golden_ids_unpack_and_are_legal(task, stored):
    ids, prefix_len = stored[task]["ids"], stored[task]["prefix_len"]
    scene = unpack(ids, tiny_vocabulary())
    assert scene.outputs == TASKS[task].outputs
    assert pack(scene, tiny_vocabulary()).ids.tolist() == ids
    check_output(grammar_from_json(stored[task]["grammar"]), ids[prefix_len:])
