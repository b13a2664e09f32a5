"""Weights in one file or several: whole, in their order, one at a time, and never half an index."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from poet.errors import CheckpointError
from poet.model.tensor_files import TensorFiles, write_tensors

TENSORS = {
    "c": torch.arange(35, dtype=torch.float32).view(5, 7),
    "a": torch.arange(6, dtype=torch.bfloat16).view(2, 3),
    "d": torch.arange(11, dtype=torch.float16),
    "b": torch.arange(13, dtype=torch.float32),
}
SIZES = {name: tensor.numel() * tensor.element_size() for name, tensor in TENSORS.items()}
INDEX = "model.safetensors.index.json"


def write(directory: Path, largest_file: int, read: Callable[[str], Tensor] = TENSORS.__getitem__) -> Path:
    directory.mkdir()
    write_tensors(directory / "model.safetensors", SIZES, read, largest_file)
    return directory


@pytest.mark.parametrize(("largest_file", "files"), [(1, 4), (60, 3), (152, 2), (10**6, 1)])
def test_what_is_written_is_read(tmp_path: Path, largest_file: int, files: int) -> None:
    directory = write(tmp_path / "x", largest_file)
    assert len(list(directory.glob("*.safetensors"))) == files
    assert (directory / INDEX).exists() == (files > 1)
    found = TensorFiles(directory)
    assert list(found.facts) == sorted(TENSORS)
    for name, tensor in TENSORS.items():
        facts = found.facts[name]
        assert (facts.shape, facts.dtype, facts.num_bytes) == (tuple(tensor.shape), tensor.dtype, SIZES[name])
        assert torch.equal(found.read(name), tensor)


def test_no_file_is_larger_than_said_but_that_of_one_large_tensor(tmp_path: Path) -> None:
    for file in write(tmp_path / "x", 80).glob("*.safetensors"):
        tensors = load_file(file)
        assert len(tensors) == 1 or sum(SIZES[name] for name in tensors) <= 80


def test_what_is_stopped_has_no_index_and_no_weights(tmp_path: Path) -> None:
    def stop(name: str) -> Tensor:
        if name == "b":
            raise KeyboardInterrupt
        return TENSORS[name]

    for largest_file in (60, 10**6):
        with pytest.raises(KeyboardInterrupt):
            write(tmp_path / str(largest_file), largest_file, stop)
        with pytest.raises(CheckpointError, match="has neither"):
            TensorFiles(tmp_path / str(largest_file))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    directory = write(tmp_path / "x", 60)
    (directory / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"lacks model-00002-of-00003\.safetensors"):
        TensorFiles(directory)


def test_a_shortened_file_is_named(tmp_path: Path) -> None:
    directory = write(tmp_path / "x", 60)
    file = directory / "model-00002-of-00003.safetensors"
    file.write_bytes(file.read_bytes()[:-3])
    with pytest.raises(CheckpointError, match=r"model-00002-of-00003\.safetensors cannot be read"):
        TensorFiles(directory)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {}}'])
def test_a_damaged_index_is_named(tmp_path: Path, content: str) -> None:
    directory = write(tmp_path / "x", 60)
    (directory / INDEX).write_text(content)
    with pytest.raises(CheckpointError, match=r"must hold a weight_map|lacks all weights"):
        TensorFiles(directory)


@pytest.mark.parametrize("edit", ["drop", "move", "add"])
def test_an_index_that_disagrees_with_its_files_is_refused(tmp_path: Path, edit: str) -> None:
    directory = write(tmp_path / "x", 60)
    weight_map = json.loads((directory / INDEX).read_text())["weight_map"]
    if edit == "drop":
        del weight_map["a"]
    elif edit == "move":
        weight_map["a"] = weight_map["c"]
    else:
        weight_map["new"] = weight_map["a"]
    (directory / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CheckpointError, match=f"does not for {'new' if edit == 'add' else 'a'}"):
        TensorFiles(directory)


def test_whole_numbers_are_refused(tmp_path: Path) -> None:
    save_file({"packed": torch.zeros(3, dtype=torch.int8)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="packed is of type I8"):
        TensorFiles(tmp_path)
