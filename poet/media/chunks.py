"""Bytes that ffmpeg leaves alone: is a PNG, GIF, JPEG or RIFF file whole, how large, which way up, and its comment.

ffmpeg shows the part of a picture that has arrived and says nothing; it refuses a picture that is too large without
naming its size; PyAV 18 cannot read the display matrix of a picture with Exif data; and neither writes comments into
GIF and PNG files. Each function here reads headers only, never pixels, and trusts no length that it finds.

Sources: PNG (ISO/IEC 15948) section 5; GIF89a; JPEG (ITU-T T.81) annex B; Exif 2.32, tag 0x0112.
"""

import io
import struct
import zlib
from collections.abc import Iterator
from typing import BinaryIO

_PNG = b"\x89PNG\r\n\x1a\n"
_RIFF_SLACK = 64
"""Bytes that may be missing: some writers count the header or the last padding byte in, others do not."""

_COMMENT_LIMIT = 1 << 20


def is_cut_short(file: BinaryIO, size: int) -> bool:
    """Whether a PNG, GIF, JPEG, WAV, AVI or WebP file ends before it says it does; False for every other format.

    Args:
        file: opened for reading; left at an arbitrary place.
        size: the file's length in bytes.
    """
    file.seek(0)
    head = file.read(12)
    if head.startswith(_PNG):
        return all(kind != b"IEND" for kind, _, _ in _png_chunks(file, size))
    if head.startswith((b"GIF87a", b"GIF89a")):
        return not _gif_ends(file)
    if head.startswith(b"\xff\xd8\xff"):
        return not _jpeg_ends(file)
    if head.startswith(b"RIFF") and len(head) == 12:
        (stated,) = struct.unpack("<I", head[4:8])
        # 0 and 0xFFFFFFFF stand for "not known yet" in files that were written to a pipe.
        return stated not in (0, 0xFFFFFFFF) and int(stated) + 8 > size + _RIFF_SLACK
    return False


def stated_size(file: BinaryIO) -> tuple[int, int] | None:
    """(height, width) in the header of a PNG, GIF or JPEG file, None for other formats."""
    file.seek(0)
    head = file.read(24)
    if head.startswith(_PNG) and len(head) == 24:
        width, height = struct.unpack(">II", head[16:24])
        return int(height), int(width)
    if head.startswith((b"GIF87a", b"GIF89a")) and len(head) >= 10:
        width, height = struct.unpack("<HH", head[6:10])
        return int(height), int(width)
    return _jpeg_size(file) if head.startswith(b"\xff\xd8\xff") else None


def png_comment(file: BinaryIO, size: int) -> str | None:
    """The text chunk named Comment of a PNG file, None where there is none."""
    file.seek(0)
    if file.read(8) != _PNG:
        return None
    for kind, offset, length in _png_chunks(file, size):
        if kind == b"tEXt" and length <= _COMMENT_LIMIT:
            file.seek(offset)
            name, _, text = file.read(length).partition(b"\0")
            if name.lower() == b"comment":
                return text.decode("latin-1")
    return None


def with_png_comment(data: bytes, comment: str) -> bytes:
    """A PNG file's bytes with an ASCII comment behind its header chunk."""
    body = b"tEXt" + b"Comment\0" + comment.encode("ascii")
    chunk = struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))
    end = 8 + 25  # signature and IHDR, both of fixed length
    return data[:end] + chunk + data[end:]


def with_gif_comment(data: bytes, comment: str) -> bytes:
    """A GIF file's bytes with an ASCII comment extension behind its global palette."""
    text = comment.encode("ascii")
    blocks = b"".join(bytes([len(text[i : i + 255])]) + text[i : i + 255] for i in range(0, len(text), 255))
    end = 13 + _palette_bytes(data[10])
    return b"GIF89a" + data[6:end] + b"\x21\xfe" + blocks + b"\0" + data[end:]


def exif_orientation(file: BinaryIO) -> int:
    """The Exif orientation of a picture, 1 (upright) to 8; 1 where there is none or it makes no sense."""
    file.seek(0)
    head = file.read(1 << 18)
    place = head.find(b"Exif\0\0")
    start = place + 6
    if place < 0:
        place = head.find(b"eXIf")
        start = place + 4
    if place < 0:
        return 1
    tiff = head[start : start + (1 << 16)]
    order = {b"II": "<", b"MM": ">"}.get(tiff[:2])
    if order is None:
        return 1
    try:
        (directory,) = struct.unpack_from(order + "I", tiff, 4)
        (count,) = struct.unpack_from(order + "H", tiff, directory)
        for entry in range(count):
            tag, kind, _, value = struct.unpack_from(order + "HHIH", tiff, directory + 2 + 12 * entry)
            if tag == 0x0112 and kind == 3 and 1 <= value <= 8:
                return int(value)
    except struct.error:
        return 1
    return 1


def _png_chunks(file: BinaryIO, size: int) -> Iterator[tuple[bytes, int, int]]:
    """Kind, offset and length of each chunk that lies wholly inside the file."""
    place = 8
    while place + 12 <= size:
        file.seek(place)
        length, kind = struct.unpack(">I4s", file.read(8))
        if place + 12 + length > size:
            return
        yield kind, place + 8, length
        place += 12 + length


def _palette_bytes(flags: int) -> int:
    return 3 << ((flags & 7) + 1) if flags & 0x80 else 0


def _gif_ends(file: BinaryIO) -> bool:
    """Whether a GIF's blocks lead to its trailer."""
    file.seek(10)
    flags = file.read(1)
    if not flags:
        return False
    file.seek(13 + _palette_bytes(flags[0]))
    while True:
        kind = file.read(1)
        if kind == b"\x3b":
            return True
        if kind == b"\x21":
            file.seek(1, io.SEEK_CUR)
        elif kind == b"\x2c":
            descriptor = file.read(9)
            if len(descriptor) < 9:
                return False
            file.seek(_palette_bytes(descriptor[8]) + 1, io.SEEK_CUR)
        else:
            return False
        while True:
            length = file.read(1)
            if not length:
                return False
            if length == b"\0":
                break
            file.seek(length[0], io.SEEK_CUR)


def _jpeg_segments(file: BinaryIO) -> Iterator[tuple[int, int]]:
    """Marker and offset of each segment up to the start of the picture's data; stops early where one is broken."""
    file.seek(2)
    while True:
        marker = file.read(2)
        if len(marker) < 2 or marker[0] != 0xFF:
            return
        if marker[1] == 0xFF:  # padding: the second byte may start the next marker
            file.seek(-1, io.SEEK_CUR)
            continue
        offset = file.tell()
        length = int.from_bytes(file.read(2), "big")
        if length < 2:
            return
        yield marker[1], offset
        if marker[1] == 0xDA:
            return
        file.seek(offset + length)


def _jpeg_size(file: BinaryIO) -> tuple[int, int] | None:
    for marker, offset in _jpeg_segments(file):
        # Frame headers are C0 to CF, but for three that hold tables.
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            file.seek(offset + 3)
            sides = file.read(4)
            return (int.from_bytes(sides[:2], "big"), int.from_bytes(sides[2:], "big")) if len(sides) == 4 else None
    return None


def _jpeg_ends(file: BinaryIO) -> bool:
    """Whether an end marker follows the picture's data; one inside a thumbnail before it does not count."""
    start = next((offset for marker, offset in _jpeg_segments(file) if marker == 0xDA), None)
    if start is None:
        return False
    file.seek(start)
    last = b""
    while block := file.read(1 << 16):
        if b"\xff\xd9" in last + block:
            return True
        last = block[-1:]
    return False
