"""What must be in the environment before the first test imports torch; every spawned process inherits it."""

import os
import sys
from collections.abc import Iterator

import pytest

for name, value in {
    "OMP_NUM_THREADS": "1",  # tiny tensors: one thread is faster, and sums come out in one order
    "OMP_WAIT_POLICY": "PASSIVE",
    "GOMP_SPINCOUNT": "0",
    "HF_HUB_OFFLINE": "1",
    "MPLBACKEND": "Agg",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_USE_V2_MODEL_RUNNER": "0",  # the second runner needs Triton, which has no CPU build here
}.items():
    os.environ.setdefault(name, value)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """What a test did to PyTorch's threads ends with it: a process forked later would wait for threads it has not."""
    yield
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(1)
