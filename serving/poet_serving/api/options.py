"""How `poet serve` runs. Plain values; imports no vLLM."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from poet.errors import ConfigError
from poet.model.lora import Adapter
from poet_serving.api.guard import Limits

__all__ = ["ServeOptions"]

_LOOPBACK = ("127.0.0.1", "::1", "localhost")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServeOptions:
    """Everything that a server is started with.

    Attributes:
        bundle_dir: the model.
        data: directory of the jobs' database and files.
        database: SQLAlchemy's URL; None: an SQLite file in `data`.
        host, port: where to listen.
        keys: file of the keys; None: everybody may ask, which is for this machine alone.
        open_to_all: whether to listen beyond this machine without keys.
        origins: pages of other hosts that browsers may call it from.
        limits: of one key.
        adapters: of the model.
        dtype: of the model.
        max_num_seqs: outputs that are written at once.
        lasts: seconds that a job's files are kept for; None: for ever.
        max_bytes: of all files together; None: no limit.
        page: whether the chat page is there.

    Raises:
        ConfigError: it would listen beyond this machine without keys.
    """

    bundle_dir: Path
    data: Path
    database: str | None = None
    host: str = "127.0.0.1"
    port: int = 8000
    keys: Path | None = None
    open_to_all: bool = False
    origins: tuple[str, ...] = ()
    limits: Limits = dataclasses.field(default_factory=Limits)
    adapters: tuple[Adapter, ...] = ()
    dtype: str = "auto"
    max_num_seqs: int = 16
    lasts: float | None = None
    max_bytes: int | None = None
    page: bool = True

    def __post_init__(self) -> None:
        if self.keys is None and self.host not in _LOOPBACK and not self.open_to_all:
            raise ConfigError(
                f"a server that listens on {self.host} must have keys (--api-keys FILE). Without them everybody who "
                "reaches it may use it; say --open-to-all if that is meant."
            )

    @property
    def database_url(self) -> str:
        """SQLAlchemy's URL of the jobs' database."""
        return self.database or f"sqlite:///{(self.data / 'jobs.sqlite').resolve()}"

    @property
    def name(self) -> str:
        """By which requests call the bundle."""
        return self.bundle_dir.resolve().name
