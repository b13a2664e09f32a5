"""Uploads as strangers send them by mistake or on purpose, drawn from a seed. Tests have them as a fixture."""

import gzip
import io
import re
import struct
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import av
import numpy as np

from poet.media import Clip, write_clip

DATA = Path(__file__).parent.parent / "data"
Recipe = Callable[[dict[str, bytes], np.random.Generator], bytes]


def malformed_uploads(count: int, seed: int) -> Iterator[tuple[str, bytes]]:
    """Files that are damaged, lie about themselves, are several things at once, or grow when they are opened.

    All recipes are used in turn, so `len(RECIPES)` uploads are one of each; what is damaged, and where, is drawn. Some
    can be read after all. Nothing is larger than 4 MB; a few take seconds to decode.

    Args:
        count: how many.
        seed: the same seed gives the same files, with the same encoders.

    Returns:
        Names that say what was done, and contents.
    """
    rng, whole = np.random.default_rng(seed), whole_files()
    names = list(RECIPES)
    for number in range(count):
        name = names[number % len(names)]
        yield f"{number}-{name}", RECIPES[name](whole, rng)


def whole_files() -> dict[str, bytes]:
    """A small sound file of each format, by suffix."""
    rng = np.random.default_rng(7)
    frames = rng.integers(0, 256, (11, 34, 46, 3), dtype=np.uint8)
    samples = (np.sin(np.arange(23000) / 7) / 2).astype(np.float32)
    both = Clip(frames=frames, fps=8.0, samples=samples, sample_rate=16000)
    files = {"jpg": (DATA / "big_buck_bunny_353x199.jpg").read_bytes()}
    with tempfile.TemporaryDirectory() as folder:
        for suffix in ("mp4", "webm", "gif", "png", "wav"):
            path = Path(folder, f"a.{suffix}")
            write_clip(both if suffix in ("mp4", "webm", "wav") else Clip(frames, 8.0, None, 0), path)
            files[suffix] = path.read_bytes()
        # Tracks have random names, by which tags refer to them.
        files["webm"] = re.sub(rb"([\x63\x73]\xc5\x88).{8}", rb"\1aaaaaaaa", files["webm"], flags=re.DOTALL)
        path = Path(folder, "a.aac")
        with av.open(path, "w", format="adts") as container:
            stream: Any = container.add_stream("aac", rate=8000, layout="mono")
            sound = av.AudioFrame.from_ndarray(np.zeros((1, 8192), np.float32), format="fltp", layout="mono")
            sound.sample_rate, sound.pts = 8000, 0
            container.mux([*stream.encode(sound), *stream.encode(None)])
        files["aac"] = path.read_bytes()
    return files


def _some(whole: dict[str, bytes], rng: np.random.Generator) -> bytes:
    return whole[sorted(whole)[rng.integers(len(whole))]]


def _cut(whole: dict[str, bytes], rng: np.random.Generator) -> bytes:
    content = _some(whole, rng)
    return content[: rng.integers(1, len(content))]


def _headless(whole: dict[str, bytes], rng: np.random.Generator) -> bytes:
    content = _some(whole, rng)
    return content[rng.integers(1, len(content)) :]


def _flipped(whole: dict[str, bytes], rng: np.random.Generator) -> bytes:
    content = bytearray(_some(whole, rng))
    for place in rng.integers(0, len(content), rng.integers(1, 60)):
        content[place] ^= 1 << int(rng.integers(8))
    return bytes(content)


def _flipped_in_the_header(whole: dict[str, bytes], rng: np.random.Generator) -> bytes:
    content = bytearray(_some(whole, rng))
    for place in rng.integers(0, min(400, len(content)), 6):
        content[place] = int(rng.integers(256))
    return bytes(content)


def _zeroed(whole: dict[str, bytes], rng: np.random.Generator) -> bytes:
    content = bytearray(_some(whole, rng))
    place, length = int(rng.integers(len(content))), int(rng.integers(1, 2000))
    content[place : place + length] = bytes(len(content[place : place + length]))
    return bytes(content)


def _huge_numbers(whole: dict[str, bytes], rng: np.random.Generator) -> bytes:
    """Sizes and counts of MP4's index that no file has."""
    content = bytearray(whole["mp4"])
    first = content.index(b"moov")
    for place in rng.integers(first, len(content) - 4, 3):
        content[place : place + 4] = b"\xff\xff\xff\xff" if rng.integers(2) else b"\x7f\xff\xff\xff"
    return bytes(content)


def _spliced(whole: dict[str, bytes], rng: np.random.Generator) -> bytes:
    first, second = _some(whole, rng), _some(whole, rng)
    return first[: len(first) // 2] + second[len(second) // 2 :]


def _shuffled(whole: dict[str, bytes], rng: np.random.Generator) -> bytes:
    content = _some(whole, rng)
    parts = [content[place : place + 512] for place in range(0, len(content), 512)]
    return parts[0] + b"".join(parts[1 + place] for place in rng.permutation(len(parts) - 1))


def _noise(whole: dict[str, bytes], rng: np.random.Generator) -> bytes:
    head = _some(whole, rng)[: rng.integers(0, 40)]
    return head + rng.bytes(int(rng.integers(1, 50_000)))


def _text(whole: dict[str, bytes], rng: np.random.Generator) -> bytes:
    texts = (
        b"",
        b"\0",
        b"not a picture\n" * 50,
        b"<!doctype html><script>alert(1)</script>",
        b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>',
        b"#EXTM3U\n#EXT-X-TARGETDURATION:4\n#EXTINF:4,\nhttp://127.0.0.1:1/a.ts\n#EXT-X-ENDLIST\n",
        b"ffconcat version 1.0\nfile /etc/passwd\n",
        b"%PDF-1.7\n1 0 obj\n<<>>\nendobj\n",
        b"\x7fELF\x02\x01\x01" + bytes(200),
        b"RIFF" + struct.pack("<I", 4) + b"WEBP",
        b'{"image_url": "data:image/png;base64,AAAA"}',
    )
    return texts[rng.integers(len(texts))]


def _packed(whole: dict[str, bytes], rng: np.random.Generator) -> bytes:
    """A few kB that are many MB once unpacked, which nobody must do."""
    if rng.integers(2):
        return gzip.compress(bytes(9_000_000), mtime=0)
    memory = io.BytesIO()
    with zipfile.ZipFile(memory, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in "abc":
            archive.writestr(zipfile.ZipInfo(name), bytes(3_000_000), zipfile.ZIP_DEFLATED)
    return memory.getvalue()


def png(height: int, width: int, rows: bytes, *, bits: int = 8, colours: int = 2) -> bytes:
    """A PNG file that claims a size and holds these filtered rows."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colours, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def _large_png(whole: dict[str, bytes], rng: np.random.Generator) -> bytes:
    sizes = ((100_000, 100_000), (100_000, 1), (1, 100_000), (2**31 - 1, 2**31 - 1), (0, 0), (8192, 8192))
    height, width = sizes[rng.integers(len(sizes))]
    return png(height, width, bytes(10_000))


def _dense_png(whole: dict[str, bytes], rng: np.random.Generator) -> bytes:
    """Up to 64 million pixels in 10 kB."""
    side = int(rng.integers(3000, 8193))
    return png(side, side, bytes(side * (1 + -(-side // 8))), bits=1, colours=0)


def _chunky_png(whole: dict[str, bytes], rng: np.random.Generator) -> bytes:
    """A chunk that claims nearly all there is to claim."""
    content = bytearray(whole["png"])
    content[33:37] = struct.pack(">I", int(rng.integers(2**31, 2**32)))
    return bytes(content)


def gif(height: int, width: int, count: int) -> bytes:
    """A GIF file of `count` pictures of a pixel each, on a canvas of a size that costs nothing to claim."""
    dot = b"\x21\xf9\x04\x04\x01\x00\x00\x00\x2c" + struct.pack("<HHHHB", 0, 0, 1, 1, 0) + b"\x02\x02\x4c\x01\x00"
    return b"GIF89a" + struct.pack("<HHBBB", width, height, 0x80, 0, 0) + bytes(6) + dot * count + b"\x3b"


def _large_gif(whole: dict[str, bytes], rng: np.random.Generator) -> bytes:
    side = int(rng.integers(200, 65_536))
    return gif(side, side, 1)


def _many_pictures(whole: dict[str, bytes], rng: np.random.Generator) -> bytes:
    side = int(rng.integers(1, 4000))
    return gif(side, side, int(rng.integers(300, 30_000)))


def _two_in_one(whole: dict[str, bytes], rng: np.random.Generator) -> bytes:
    memory = io.BytesIO()
    with zipfile.ZipFile(memory, "w") as archive:
        archive.writestr(zipfile.ZipInfo("index.html"), b"<script>alert(1)</script>")
    html, content = b"<html><script>alert(1)</script></html>", _some(whole, rng)
    ways = (
        whole["png"] + memory.getvalue(),
        memory.getvalue() + whole["png"],
        whole["mp4"] + html,
        whole["jpg"] + b"<?php system($_GET['c']); ?>",
        whole["gif"].replace(b"GIF89a", b"GIF89a/*", 1) + b"*/=1;alert(1)//",
        html + content,
        whole["mp4"] + whole["mp4"],
        whole["wav"] + whole["png"],
    )
    return ways[rng.integers(len(ways))]


def wav(data: bytes, *, rate: int, stated: int, channels: int = 1) -> bytes:
    """A WAV file of 8 bits a sample, whose header states any length."""
    form = struct.pack("<HHIIHH", 1, channels, rate, rate * channels, channels, 8)
    head = b"WAVEfmt " + struct.pack("<I", len(form)) + form + b"data" + struct.pack("<I", stated)
    return b"RIFF" + struct.pack("<I", min(stated + 36, 2**32 - 1)) + head + data


def _endless_wav(whole: dict[str, bytes], rng: np.random.Generator) -> bytes:
    data = rng.bytes(int(rng.integers(1, 40_000)))
    stated = (2**32 - 1, 2**32 - 100, 2**31, 0)[rng.integers(4)]
    content = wav(data, rate=int(rng.integers(1, 48_000)), stated=stated, channels=int(rng.integers(1, 9)))
    # The length of the file as a whole may be open, and only that of its sound a lie.
    return content[:4] + b"\xff\xff\xff\xff" + content[8:] if rng.integers(2) else content


def _hours_of_wav(whole: dict[str, bytes], rng: np.random.Generator) -> bytes:
    rate, hours = int(rng.integers(20, 200)), int(rng.integers(1, 6))
    length = rate * 3600 * hours
    return wav(bytes([128]) * length, rate=rate, stated=length)


def _hours_of_aac(whole: dict[str, bytes], rng: np.random.Generator) -> bytes:
    """No header says how long it is."""
    return whole["aac"] * int(rng.integers(2000, 10_000))


def _odd_wav(whole: dict[str, bytes], rng: np.random.Generator) -> bytes:
    content = bytearray(whole["wav"])
    for place in rng.choice(np.arange(20, 36), 3):
        content[place] = int(rng.integers(256))
    return bytes(content)


def _nested(whole: dict[str, bytes], rng: np.random.Generator) -> bytes:
    """Boxes within boxes of an MP4 file, or elements of a WebM file."""
    depth = int(rng.integers(100, 20_000))
    if rng.integers(2):
        sizes = (8 * (depth - level) for level in range(depth))
        return whole["mp4"][:32] + b"".join(struct.pack(">I", size) + b"moov" for size in sizes)
    return whole["webm"][:40] + b"\x18\x53\x80\x67\x01\xff\xff\xff\xff\xff\xff\xff" * depth


def _not_numbers(whole: dict[str, bytes], rng: np.random.Generator) -> bytes:
    """Samples that are infinite or no number at all."""
    samples = np.full(4000, (np.nan, np.inf, 1e30)[rng.integers(3)], np.float32).tobytes()
    form = struct.pack("<HHIIHH", 3, 1, 8000, 32000, 4, 32)
    body = b"WAVEfmt " + struct.pack("<I", len(form)) + form + b"data" + struct.pack("<I", len(samples)) + samples
    return b"RIFF" + struct.pack("<I", len(body)) + body


RECIPES: dict[str, Recipe] = {
    "cut": _cut,
    "headless": _headless,
    "flipped": _flipped,
    "flipped-in-the-header": _flipped_in_the_header,
    "zeroed": _zeroed,
    "huge-numbers": _huge_numbers,
    "spliced": _spliced,
    "shuffled": _shuffled,
    "noise": _noise,
    "text": _text,
    "packed": _packed,
    "large-png": _large_png,
    "dense-png": _dense_png,
    "chunky-png": _chunky_png,
    "large-gif": _large_gif,
    "many-pictures": _many_pictures,
    "two-in-one": _two_in_one,
    "endless-wav": _endless_wav,
    "hours-of-wav": _hours_of_wav,
    "hours-of-aac": _hours_of_aac,
    "odd-wav": _odd_wav,
    "nested": _nested,
    "not-numbers": _not_numbers,
}
