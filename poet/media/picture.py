"""From a decoded frame to pixels of a wanted size: pixel shape, rotation, transparency, scaling, then crop or pad."""

import struct
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, BinaryIO, Literal

import numpy as np
from av.video.frame import VideoFrame
from av.video.reformatter import ColorRange, Interpolation, VideoReformatter
from numpy.typing import NDArray

from poet.errors import ConfigError, MediaError
from poet.media import chunks
from poet.media.opening import MAX_FRAME_PIXELS

Fit = Literal["crop", "pad"]
"""How a picture of another shape is fitted: `crop` fills the size and loses the margins; `pad` adds black bars."""

# Without the exact flags swscale rounds chroma coarsely: 43 dB instead of 52 dB on a smooth picture there and back.
_EXACT = Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT | Interpolation.FULL_CHR_H_INP
SHRINK = int(Interpolation.AREA | _EXACT)
"""Averages the source pixels: no aliasing, no ringing."""
ENLARGE = int(Interpolation.BICUBIC | _EXACT)

_FLATTEN_ROWS = 256


@dataclass(frozen=True)
class Orientation:
    """How stored pixels become upright: first transpose, then reverse the rows, then reverse the columns."""

    transpose: bool = False
    flip_rows: bool = False
    flip_columns: bool = False

    def apply(self, pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """(H, W, 3) as stored to (H, W, 3) upright, or (W, H, 3) where the axes change places."""
        if self.transpose:
            pixels = pixels.transpose(1, 0, 2)
        return pixels[:: -1 if self.flip_rows else 1, :: -1 if self.flip_columns else 1]


_BY_EXIF = {
    1: Orientation(),
    2: Orientation(flip_columns=True),
    3: Orientation(flip_rows=True, flip_columns=True),
    4: Orientation(flip_rows=True),
    5: Orientation(transpose=True),
    6: Orientation(transpose=True, flip_columns=True),
    7: Orientation(transpose=True, flip_rows=True, flip_columns=True),
    8: Orientation(transpose=True, flip_rows=True),
}
_BY_ROTATION = {0: _BY_EXIF[1], 90: _BY_EXIF[8], 180: _BY_EXIF[3], -180: _BY_EXIF[3], -90: _BY_EXIF[6]}


def orientation_of(frame: VideoFrame, file: BinaryIO) -> Orientation:
    """The orientation that a frame's display matrix or its file's Exif data ask for; turns by odd angles are ignored.

    Args:
        frame: as decoded.
        file: the file it came from; its place is restored.
    """
    rotation = frame.rotation
    try:
        side_data: Any = frame.side_data  # iterates over its values, whatever its stub says
        matrix = next((bytes(data) for data in side_data if data.type.name == "DISPLAYMATRIX"), b"")
    except ValueError:
        # PyAV 18 cannot list side data when one kind is newer than itself, as Exif data is.
        place = file.tell()
        exif = chunks.exif_orientation(file)
        file.seek(place)
        return _BY_EXIF[exif] if exif != 1 else _BY_ROTATION.get(rotation, Orientation())
    if len(matrix) != 36:
        return Orientation()
    # Fixed point 16.16; a stored point (x, y) is shown at (a x + c y, b x + d y), y counted downwards.
    a, b, _, c, d = (round(v / 65536) for v in struct.unpack("=9i", matrix)[:5])
    if (abs(a), abs(b), abs(c), abs(d)) == (1, 0, 0, 1):
        return Orientation(False, d < 0, a < 0)
    if (abs(a), abs(b), abs(c), abs(d)) == (0, 1, 1, 0):
        return Orientation(True, b < 0, c < 0)
    return Orientation()


def check_size(height: int | None, width: int | None, fit: str) -> None:
    """Raise ConfigError unless each side is None or positive, both are within the limit, and fit is known."""
    for name, value in (("height", height), ("width", width)):
        if value is not None and value < 1:
            raise ConfigError(f"{name} must be at least 1, got {value}. Leave it out to keep the file's own.")
    if (height or 1) * (width or 1) > MAX_FRAME_PIXELS:
        raise ConfigError(f"height x width must be at most {MAX_FRAME_PIXELS}, got {height} x {width}. Ask for less.")
    if fit not in ("crop", "pad"):
        raise ConfigError(f"fit must be 'crop' or 'pad', got {fit!r}. Choose one of them.")


class PictureFitter:
    """Turns the frames of one stream into (H, W, 3) uint8 RGB of one size.

    Args:
        name: the file's, for messages.
        file: the opened file, for Exif data.
        height: rows wanted; None takes the file's, or follows from width by the aspect ratio.
        width: columns wanted, likewise.
        fit: see `Fit`.
        pixel_aspect: width of one stored pixel over its height.
    """

    def __init__(
        self,
        name: str,
        file: BinaryIO,
        height: int | None,
        width: int | None,
        fit: Fit,
        pixel_aspect: Fraction | None,
    ) -> None:
        check_size(height, width, fit)
        self._name = name
        self._file = file
        self._height = height
        self._width = width
        self._fit = fit
        self._pixel_aspect = pixel_aspect or Fraction(1)
        self._size: tuple[int, int] | None = None
        self._orientation: Orientation | None = None
        self._reformatter = VideoReformatter()

    def fit(self, frame: VideoFrame) -> NDArray[np.uint8]:
        """(H, W, 3) uint8 RGB, C-contiguous; the size is settled by the first frame and kept for the others.

        Raises:
            MediaError: the frame is so narrow that filling the wanted size would break the pixel limit.
        """
        if self._orientation is None:
            self._orientation = orientation_of(frame, self._file)
        shown_height, shown_width = frame.height, max(1, round(frame.width * self._pixel_aspect))
        if self._orientation.transpose:
            shown_height, shown_width = shown_width, shown_height
        if self._size is None:
            self._size = self._settle(shown_height, shown_width)
        height, width = self._size
        ratios = (Fraction(height, shown_height), Fraction(width, shown_width))
        if self._fit == "crop":
            scaled = (max(height, round(shown_height * max(ratios))), max(width, round(shown_width * max(ratios))))
        else:
            scaled = (
                min(height, max(1, round(shown_height * min(ratios)))),
                min(width, max(1, round(shown_width * min(ratios)))),
            )
        if scaled[0] * scaled[1] > MAX_FRAME_PIXELS:
            raise MediaError(
                f"{self._name}: is too narrow ({shown_width} x {shown_height}) to fill {width} x {height}. "
                "Cut the picture first; in Python, fit='pad' adds black bars instead."
            )
        stored = scaled[::-1] if self._orientation.transpose else scaled
        pixels = self._orientation.apply(self._scale(frame, *stored))
        return _centre(pixels, height, width)

    def _settle(self, shown_height: int, shown_width: int) -> tuple[int, int]:
        height, width = self._height, self._width
        if height is None and width is None:
            height, width = shown_height, shown_width
        elif height is None and width is not None:
            height = max(1, round(Fraction(shown_height * width, shown_width)))
        elif width is None and height is not None:
            width = max(1, round(Fraction(shown_width * height, shown_height)))
        assert height is not None and width is not None
        if height * width > MAX_FRAME_PIXELS:
            raise MediaError(
                f"{self._name}: would become {width} x {height} pixels, more than {MAX_FRAME_PIXELS}. "
                "Ask for a smaller height and width."
            )
        return height, width

    def _scale(self, frame: VideoFrame, height: int, width: int) -> NDArray[np.uint8]:
        if frame.format.has_palette or any(component.is_alpha for component in frame.format.components):
            frame = _flatten(frame)
        shrinks = height * width <= frame.height * frame.width
        scaled = self._reformatter.reformat(
            frame,
            width=width,
            height=height,
            format="rgb24",
            interpolation=SHRINK if shrinks else ENLARGE,
            dst_color_range=ColorRange.JPEG,
            threads=1,
        )
        return np.asarray(scaled.to_ndarray(), dtype=np.uint8)


def _flatten(frame: VideoFrame) -> VideoFrame:
    """The frame over black, before scaling: otherwise colours hidden under transparency bleed into the edges."""
    rgba = np.asarray(VideoReformatter().reformat(frame, format="rgba", threads=1).to_ndarray(), dtype=np.uint8)
    rgb = np.ascontiguousarray(rgba[:, :, :3])
    if rgba[:, :, 3].min() < 255:
        for top in range(0, len(rgb), _FLATTEN_ROWS):  # in strips, as the products need twice the memory
            rows = slice(top, top + _FLATTEN_ROWS)
            rgb[rows] = (rgb[rows].astype(np.uint16) * rgba[rows, :, 3:] + 127) // 255
    return VideoFrame.from_ndarray(rgb, format="rgb24")


def _centre(pixels: NDArray[np.uint8], height: int, width: int) -> NDArray[np.uint8]:
    """Cut margins off or add black ones, the same on both sides to within one pixel."""
    top, left = max(0, len(pixels) - height) // 2, max(0, pixels.shape[1] - width) // 2
    cut = pixels[top : top + height, left : left + width]
    if cut.shape[:2] == (height, width):
        return np.ascontiguousarray(cut)
    framed = np.zeros((height, width, 3), np.uint8)
    top, left = (height - cut.shape[0]) // 2, (width - cut.shape[1]) // 2
    framed[top : top + cut.shape[0], left : left + cut.shape[1]] = cut
    return framed
