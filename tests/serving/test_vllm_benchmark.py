"""recipes/benchmarks/vllm_versus_transformers.py: its command line and the arithmetic of the comparison."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "recipes" / "benchmarks" / "vllm_versus_transformers.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location(SCRIPT.stem, SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[SCRIPT.stem] = module
    spec.loader.exec_module(module)
    return module


def test_options_have_defaults_and_impossible_counts_are_refused(
    script: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    options = script.parse([])
    assert (options.batch_sizes, options.dtypes) == ([1, 16], ["float32", "bfloat16"])
    with pytest.raises(SystemExit):
        script.parse(["--num-ids", "1"])
    assert "--num-ids at least 2" in capsys.readouterr().err


def test_the_ratio_is_the_median_of_the_rounds_ratios(script: ModuleType) -> None:
    def answers(*seconds: float) -> list[dict[str, float]]:
        return [{"cpu": value, "wall": 11 * value} for value in seconds]

    job = script.Job(batch_size=3, prefix_len=5, num_ids=7)
    found = script.compare({"vllm": answers(1, 2, 3), "transformers": answers(7, 6, 15)}, job)
    assert found["cpu"]["ratio"] == found["wall"]["ratio"] == 5
    assert (found["cpu"]["lowest_ratio"], found["cpu"]["highest_ratio"]) == (3, 7)
    assert found["cpu"]["ids_per_second"] == {"vllm": 10.5, "transformers": 3.0}


def test_random_weights_have_the_shape_of_the_nano_recipe(script: ModuleType) -> None:
    shape = script.nano_shape()
    assert 8e6 < shape.num_parameters < 14e6
    assert shape.scene_length >= 512


def test_prefixes_differ_from_row_to_row_and_hold_no_special_id(script: ModuleType) -> None:
    prefixes = script.Job(batch_size=16, prefix_len=24, num_ids=2).prefixes()
    assert len(set(map(tuple, prefixes))) == 16
    assert min(map(min, prefixes)) >= 256
