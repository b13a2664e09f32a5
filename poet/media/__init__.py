"""Video, sound and pictures in files: all reading and writing of media, through PyAV alone.

What it does not know: codes, ids, models, or what a clip is for. Everything that enters or leaves is a `Clip` of
plain numpy arrays. Dimension letters: N frames, H height, W width, S samples.

A path is opened as a local file and nothing else: what a file refers to (playlists, other files, addresses) is never
followed. Limits and their reasons stand in `poet.media.opening`.
"""

from poet.media.clip import Clip, MediaInfo, exact_fps
from poet.media.opening import (
    DEFAULT_MAX_DURATION,
    MAX_CLIP_BYTES,
    MAX_DECODED_FRAMES,
    MAX_FILE_BYTES,
    MAX_FRAME_PIXELS,
    MAX_IMAGE_BYTES,
    MAX_STREAMS,
    MediaPath,
    hash_file,
    probe,
)
from poet.media.parts import FilePart
from poet.media.picture import Fit
from poet.media.reading import read_audio, read_clip, read_image
from poet.media.scanning import HeardSound, SeenPicture, scan_media
from poet.media.scenes import read_scenes
from poet.media.streaming import ClipStream
from poet.media.writing import WRITABLE_SUFFIXES, check_target, write_clip

__all__ = [
    "DEFAULT_MAX_DURATION",
    "MAX_CLIP_BYTES",
    "MAX_DECODED_FRAMES",
    "MAX_FILE_BYTES",
    "MAX_FRAME_PIXELS",
    "MAX_IMAGE_BYTES",
    "MAX_STREAMS",
    "WRITABLE_SUFFIXES",
    "Clip",
    "ClipStream",
    "FilePart",
    "Fit",
    "HeardSound",
    "MediaInfo",
    "MediaPath",
    "SeenPicture",
    "check_target",
    "exact_fps",
    "hash_file",
    "probe",
    "read_audio",
    "read_clip",
    "read_image",
    "read_scenes",
    "scan_media",
    "write_clip",
]
