"""What a job is asked for, as it stands in the store: a checked body with its seed, and the clip that goes with it.

A clip that was uploaded has been decoded before it is accepted and is kept as plain arrays, so nothing that a stranger
sent is opened a second time. This module knows bodies and arrays; it does not know HTTP, the store or engines.
"""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Mapping
from typing import Any, Final, Self

import numpy as np

from poet.bundle import Bundle
from poet.errors import CheckpointError
from poet.generation.pipeline import ClipRequest
from poet.media import Clip
from poet.model.lora import Adapter
from poet_serving.schema import RequestError, VideoBody, build_request

__all__ = ["REFERENCE", "Order", "pack_clip", "unpack_clip"]

REFERENCE: Final = "reference.npz"
"""Name of the file that holds the clip of an order."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Order:
    """One clip, or text, to write.

    Attributes:
        body: of the request, with its seed.
        task: its task's name.
        model: the bundle or adapter that it was asked of, by name.
        adapter: the LoRA adapter's name; None: the bundle's own weights.
        adapter_sha256: of its files.
        remixed_from: id of the video that it was made from, or None.
        extend_by: seconds to go on for behind the given clip; None: as far as the model goes at once.
    """

    body: VideoBody
    task: str
    model: str
    adapter: str | None = None
    adapter_sha256: str | None = None
    remixed_from: str | None = None
    extend_by: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for the store."""
        return {
            "body": self.body.model_dump(mode="json", exclude_none=True, exclude={"input_reference"}),
            "task": self.task,
            "model": self.model,
            "adapter": self.adapter,
            "adapter_sha256": self.adapter_sha256,
            "remixed_from": self.remixed_from,
            "extend_by": self.extend_by,
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Inverse of `to_dict`.

        Raises:
            RequestError: the body is of another version of the server.
        """
        return cls(**dict(values) | {"body": VideoBody.parse(values["body"])})

    def check_adapter(self, adapters: Mapping[str, Adapter]) -> None:
        """Raise unless there is the adapter that it was asked of.

        Args:
            adapters: of the server, by name.

        Raises:
            RequestError: there is none of its name, or another one.
        """
        if self.adapter is None:
            return
        found = adapters.get(self.adapter)
        if found is None or found.sha256 != self.adapter_sha256:
            known = "is not served any more" if found is None else "is another one by now"
            raise RequestError(
                f"the adapter {self.adapter!r} that the video was asked of {known}.",
                code="model_not_found",
                param="model",
                status=404,
            )

    def to_request(self, bundle: Bundle, clip: Clip | None) -> ClipRequest:
        """What it means to the pipeline.

        Raises:
            RequestError: the bundle cannot do it.
        """
        return build_request(self.body, bundle, self.task, clip, self.adapter)


def pack_clip(clip: Clip) -> bytes:
    """A clip's arrays as bytes."""
    parts = {"rates": np.array([float(clip.fps), float(clip.sample_rate)])}
    if clip.frames is not None:
        parts["frames"] = clip.frames
    if clip.samples is not None:
        parts["samples"] = clip.samples
    file = io.BytesIO()
    np.savez(file, allow_pickle=False, **parts)
    return file.getvalue()


def unpack_clip(content: bytes) -> Clip:
    """Inverse of `pack_clip`.

    Raises:
        CheckpointError: the bytes are damaged.
    """
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as parts:
            fps, sample_rate = parts["rates"].tolist()
            frames = parts.get("frames")
            samples = parts.get("samples")
    except (ValueError, KeyError, OSError, EOFError) as error:
        raise CheckpointError(f"the stored clip is damaged: {error}") from error
    return Clip(frames=frames, fps=fps, samples=samples, sample_rate=int(sample_rate))
