"""Input references as files: a data URL or a path becomes what `GivenFiles` reads.

It knows names of kinds and bytes, and opens nothing: `poet.media` finds out what a file really is.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from poet.generation.given import GivenFiles
from poet_serving.schema import InputReference, RequestError, VideoBody

__all__ = ["data_url_content", "reference_files"]

_DATA_URL: Final = re.compile(r"data:(image|video|audio)/[\w.+-]{1,80};base64,(.*)", re.DOTALL)
_SUFFIXES: Final = {
    **dict.fromkeys((".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif"), "image"),
    **dict.fromkeys((".wav", ".mp3", ".flac", ".ogg", ".m4a", ".opus"), "audio"),
}


@contextlib.contextmanager
def reference_files(body: VideoBody, base: Path | None = None) -> Iterator[GivenFiles]:
    """The files of a body's reference, for as long as the context lasts.

    Args:
        body: a checked one.
        base: directory that a path starts from; None takes no paths.

    Raises:
        RequestError: the reference cannot be used.
    """
    reference = body.input_reference
    if reference is None:
        yield GivenFiles()
        return
    if reference.path is not None:
        if base is None:
            raise _bad("a path is for files of a batch on this machine; send a data URL or upload the file.")
        path = base / reference.path
        kind = _SUFFIXES.get(path.suffix.lower(), "video")
        yield GivenFiles(**{kind: path})
        return
    found, content = _decode(reference)
    with tempfile.NamedTemporaryFile(prefix="poet-") as file:
        file.write(content)
        file.flush()
        yield GivenFiles(**{found: Path(file.name)})


def data_url_content(reference: InputReference) -> bytes:
    """What a data URL holds.

    Args:
        reference: of a request that came over a network, so a path is refused.

    Raises:
        RequestError: it is no data URL, or holds no base64.
    """
    if reference.path is not None:
        raise _bad("a path is for files of a batch on this machine; send a data URL or upload the file.")
    return _decode(reference)[1]


def _decode(reference: InputReference) -> tuple[str, bytes]:
    """The kind that a data URL claims to be, and its bytes."""
    if reference.file_id is not None:
        raise _bad("file_id names an uploaded file, of which there are none here.")
    found = _DATA_URL.fullmatch(reference.image_url or "")
    if found is None:
        raise _bad('image_url must be a data URL such as "data:image/png;base64,...": no other address is fetched.')
    try:
        return found[1], base64.b64decode(found[2], validate=True)
    except (binascii.Error, ValueError) as error:
        raise _bad("image_url must hold base64, it does not.") from error


def _bad(message: str) -> RequestError:
    return RequestError(message, code="invalid_input_reference", param="input_reference")
