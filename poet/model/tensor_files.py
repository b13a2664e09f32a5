"""Weights in safetensors, in one file or in several with an index, one tensor at a time: read and written.

However large a model is, no more of it is in memory than the file that is being written, which the package copies once
while it writes. It knows names, shapes and
files; it does not know what a tensor is for.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from poet.errors import CheckpointError

__all__ = ["LARGEST_FILE", "TensorFacts", "TensorFiles", "write_tensors"]

WEIGHTS_FILE: Final = "model.safetensors"
LARGEST_FILE: Final = 2 * 2**30
"""Bytes of tensors in a file; a model that is larger is written in several."""

_DTYPES: Final = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}


@dataclass(frozen=True, kw_only=True)
class TensorFacts:
    """What a file's header says of a tensor.

    Attributes:
        file: that holds it.
        shape: of it.
        dtype: as it is stored.
    """

    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """Of the tensor as it is stored."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


class TensorFiles:
    """The tensors of a directory, of which headers alone have been read.

    Args:
        directory: with model.safetensors, or with model.safetensors.index.json and the files that it names.

    Attributes:
        facts: of each tensor by its name, in the order of the names.

    Raises:
        CheckpointError: there are no weights, a file is missing or damaged, the index and the files disagree, or
            tensors are of another type than floating-point numbers.
    """

    def __init__(self, directory: str | Path) -> None:
        directory = Path(directory)
        file, index = directory / WEIGHTS_FILE, directory / f"{WEIGHTS_FILE}.index.json"
        if file.is_file():
            found = _read_header(file)
        elif index.is_file():
            found = _read_headers(directory, index)
        else:
            raise CheckpointError(
                f"{directory} must hold its weights as {WEIGHTS_FILE}, or as several files with {index.name}; it has "
                "neither. Copy it whole; other formats must be saved as safetensors first."
            )
        self.facts: dict[str, TensorFacts] = dict(sorted(found.items()))

    def read(self, name: str) -> Tensor:
        """One tensor, on the CPU, as it is stored.

        Raises:
            CheckpointError: its file can no longer be read.
        """
        file = self.facts[name].file
        try:
            with safe_open(file, framework="pt") as opened:
                tensor: Tensor = opened.get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{file} cannot be read: {error}. Copy it again.") from error
        return tensor


def write_tensors(
    path: Path, sizes: Mapping[str, int], read: Callable[[str], Tensor], largest_file: int = LARGEST_FILE
) -> None:
    """Write tensors into one file, or into several with an index beside them where they are too large for one.

    A file takes its name when it is whole, and the index comes last.

    Args:
        path: of model.safetensors; of several, the index gets this name and .index.json, the files numbers.
        sizes: bytes of each tensor by its name, in the order in which they are read and put into files.
        read: a tensor from its name, of so many bytes; called once for each.
        largest_file: bytes of tensors in a file; a single larger tensor has a file of its own.

    Raises:
        OSError, SafetensorError: a file cannot be written.
    """
    groups = _group(sizes, largest_file)
    if len(groups) == 1:
        _write_file(path, groups[0], read)
        return
    weight_map: dict[str, str] = {}
    for number, names in enumerate(groups, 1):
        file = path.with_name(f"{path.stem}-{number:05d}-of-{len(groups):05d}{path.suffix}")
        _write_file(file, names, read)
        weight_map |= dict.fromkeys(names, file.name)
    content = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": dict(sorted(weight_map.items()))}
    text = json.dumps(content, indent=2) + "\n"
    path.with_name(f"{path.name}.index.json").write_text(text, encoding="utf-8")


def _write_file(file: Path, names: Iterable[str], read: Callable[[str], Tensor]) -> None:
    unfinished = file.with_name(f"{file.name}.unfinished")
    save_file({name: read(name).contiguous() for name in names}, unfinished, metadata={"format": "pt"})
    unfinished.rename(file)


def _group(sizes: Mapping[str, int], largest_file: int) -> list[list[str]]:
    """Names in their order, cut wherever one more would make a file too large."""
    groups: list[list[str]] = [[]]
    room = largest_file
    for name, size in sizes.items():
        if size > room and groups[-1]:
            groups.append([])
            room = largest_file
        groups[-1].append(name)
        room -= size
    return groups


def _read_headers(directory: Path, index: Path) -> dict[str, TensorFacts]:
    """The headers of the files that an index names, each of which must hold exactly what the index says."""
    try:
        weight_map: Any = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        parts = {str(name): str(file) for name, file in weight_map.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{index} must hold a weight_map, it cannot be read: {error!r}. Copy it again."
        ) from error
    files = sorted(set(parts.values()))
    missing = [file for file in files if not (directory / file).is_file()]
    if missing or not files:
        raise CheckpointError(
            f"{directory} lacks {', '.join(missing) or 'all weights'}, which {index.name} names. Copy it whole."
        )
    found: dict[str, TensorFacts] = {}
    for file in files:
        found |= _read_header(directory / file)
    wrong = sorted({name for name, file in parts.items() if name not in found or found[name].file.name != file})
    wrong += sorted(found.keys() - parts.keys())
    if wrong:
        raise CheckpointError(
            f"{index} must name the file of every tensor, it does not for {', '.join(wrong[:3])}"
            f"{f' and {len(wrong) - 3} more' if len(wrong) > 3 else ''}. Copy the directory whole."
        )
    return found


def _read_header(file: Path) -> dict[str, TensorFacts]:
    try:
        with safe_open(file, framework="pt") as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118, no mapping
            told = {name: (tuple(part.get_shape()), part.get_dtype()) for name, part in slices.items()}
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}. Copy it again.") from error
    strange = {name: kind for name, (_, kind) in told.items() if kind not in _DTYPES}
    if strange:
        name, kind = next(iter(strange.items()))
        raise CheckpointError(
            f"{file} must hold floating-point numbers of 16 or 32 bits, {name} is of type {kind}. Take weights that "
            "are not quantised."
        )
    return {name: TensorFacts(file=file, shape=shape, dtype=_DTYPES[kind]) for name, (shape, kind) in told.items()}
