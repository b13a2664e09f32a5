"""What several tests of the server share."""

import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def malformed_uploads() -> Callable[[int, int], Iterator[tuple[str, bytes]]]:
    """The function of that name in malformed.py beside; test folders are no packages that could be imported from."""
    spec = importlib.util.spec_from_file_location("malformed", Path(__file__).parent / "malformed.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    made: Callable[[int, int], Iterator[tuple[str, bytes]]] = module.malformed_uploads
    return made
