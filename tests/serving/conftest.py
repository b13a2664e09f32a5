"""What several tests of the server share."""

import gc
import importlib.util
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from poet.media import Clip, write_clip


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


@pytest.fixture(scope="session")
def picture(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A PNG file of noise."""
    path = tmp_path_factory.mktemp("picture") / "x.png"
    frames = np.random.default_rng(0).integers(0, 255, (1, 24, 40, 3), np.uint8)
    write_clip(Clip(frames=frames, fps=8, samples=None, sample_rate=16_000), path)
    return path.read_bytes()


@pytest.fixture
def no_collections() -> Iterator[None]:
    """No garbage is collected: in a process with much in it that takes longer than what a test measures."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@pytest.fixture(scope="session")
def postgresql() -> Iterator[Callable[[], str]]:
    """A PostgreSQL server of our own, reached by a socket: each call makes a new database and returns its URL."""
    programs = [*Path("/usr/lib/postgresql").glob("*/bin"), *map(Path, os.environ["PATH"].split(os.pathsep))]
    found = next(
        (folder for folder in programs if (folder / "initdb").exists() and (folder / "postgres").exists()), None
    )
    if found is None:
        pytest.skip("needs PostgreSQL's initdb and postgres")
    folder = Path(tempfile.mkdtemp(prefix="poet-postgresql-"))
    user = {"user": "nobody", "group": "nogroup", "extra_groups": []} if os.geteuid() == 0 else {}  # it refuses root
    if user:
        shutil.chown(folder, "nobody", "nogroup")
    options: dict[str, Any] = {"cwd": folder, "check": True, "capture_output": True, **user}
    command = ["-D", str(folder / "data"), "-U", "poet"]
    subprocess.run([found / "initdb", *command, "-A", "trust", "-E", "UTF8", "--no-locale", "--no-sync"], **options)
    settings = ["-k", str(folder), "-c", "listen_addresses=", "-c", "fsync=off"]
    with subprocess.Popen(
        [found / "postgres", *command[:2], *settings], cwd=folder, stderr=subprocess.PIPE, text=True, **user
    ) as server:
        try:
            assert server.stderr is not None
            while "ready to accept connections" not in (line := server.stderr.readline()):
                assert line, "PostgreSQL did not start"
            number = iter(range(1_000_000))

            def create() -> str:
                name = f"jobs{next(number)}"
                subprocess.run([found / "createdb", "-h", folder, "-U", "poet", name], **options)
                return f"postgresql://poet@/{name}?host={folder}"

            yield create
        finally:
            server.terminate()
            server.wait(30)
            shutil.rmtree(folder, ignore_errors=True)
