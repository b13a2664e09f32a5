"""Bytes that lie inside another file, such as a member of a tar archive, read where they are. Knows no media format."""

import io
from dataclasses import dataclass
from pathlib import Path

__all__ = ["FilePart", "open_part"]


@dataclass(frozen=True)
class FilePart:
    """A run of bytes of a file, taken as a file of its own.

    Attributes:
        path: the file that holds it.
        name: what it is called in there.
        offset: of its first byte.
        size: in bytes.
    """

    path: Path
    name: str
    offset: int
    size: int

    def __str__(self) -> str:
        return f"{self.path}/{self.name}"


def open_part(part: FilePart) -> io.BufferedReader:
    """The part as a file opened for reading.

    Raises:
        OSError: the file that holds it cannot be opened.
    """
    return io.BufferedReader(_Part(part))


class _Part(io.RawIOBase):
    def __init__(self, part: FilePart) -> None:
        super().__init__()
        self._file = part.path.open("rb", buffering=0)
        self._begin, self._size, self._place = part.offset, part.size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._place

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self._size}[whence]
        if base + offset < 0:
            raise OSError("a place before the first byte")
        self._place = base + offset
        return self._place

    def readinto(self, buffer: object) -> int:
        view = memoryview(buffer).cast("B")  # type: ignore[arg-type]
        wanted = max(0, min(len(view), self._size - self._place))
        self._file.seek(self._begin + self._place)
        count = self._file.readinto(view[:wanted]) or 0
        self._place += count
        return count

    def close(self) -> None:
        self._file.close()
        super().close()
