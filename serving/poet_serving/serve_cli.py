"""`poet serve`. Parses, calls, says what is wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from poet.cli.output import note
from poet.errors import ConfigError

__all__ = ["serve"]

HOUR = 3600.0
GIGABYTE = 2**30


def serve(
    model: Annotated[Path | None, typer.Option(help="A bundle; the shipped one when left out.")] = None,
    lora: Annotated[
        list[str] | None, typer.Option(metavar="NAME=DIR", help="An adapter that requests may name as their model.")
    ] = None,
    host: Annotated[
        str, typer.Option(help="Address to listen on; beyond this machine with --api-keys, or --open-to-all.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 8000,
    data: Annotated[Path, typer.Option(help="Directory of the jobs: their database and files.")] = Path("poet-data"),
    database: Annotated[str | None, typer.Option(help="SQLAlchemy URL of the jobs' database.")] = None,
    api_keys: Annotated[Path | None, typer.Option(help="File of keys, one NAME KEY a line.")] = None,
    open_to_all: Annotated[
        bool, typer.Option("--open-to-all", help="Listen beyond this machine without keys.")
    ] = False,
    allow_origin: Annotated[list[str] | None, typer.Option(help="A page of another host that may call.")] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, or auto: what this machine is fastest in.")] = "auto",
    batch_size: Annotated[int, typer.Option(min=1, help="Clips that are written at once.")] = 16,
    keep_hours: Annotated[
        float | None, typer.Option(min=0.01, help="How long videos are kept; for ever by default.")
    ] = None,
    keep_gigabytes: Annotated[float | None, typer.Option(min=0.001, help="Beyond which the oldest go.")] = None,
    requests_per_minute: Annotated[int, typer.Option(min=1, help="Of one key.")] = 6000,
    jobs_per_key: Annotated[int, typer.Option(min=1, help="That wait or are being carried out.")] = 256,
    queue: Annotated[int, typer.Option(min=1, help="Jobs of all keys that wait.")] = 4096,
    max_upload: Annotated[float, typer.Option(min=0.01, help="Megabytes of one request.")] = 64.0,
    page: Annotated[bool, typer.Option("--page/--no-page", help="The chat page at /.")] = True,
) -> None:
    """Serve a bundle over HTTP: OpenAI's videos API, chat, and a page to chat with."""
    from poet.bundle import Bundle, default_bundle
    from poet.cli.adapters import read_named

    try:
        from poet_serving.api.guard import Limits
        from poet_serving.api.launch import serve as run
        from poet_serving.api.options import ServeOptions
    except ModuleNotFoundError as error:
        raise ConfigError(f"poet serve needs the package {error.name!r}. Install openpoet[serve].") from error
    bundle_dir = default_bundle() if model is None else model
    options = ServeOptions(
        bundle_dir=bundle_dir,
        adapters=read_named(lora, Bundle.open(bundle_dir)) if lora else (),
        data=data,
        database=database,
        host=host,
        port=port,
        keys=api_keys,
        open_to_all=open_to_all,
        origins=tuple(allow_origin or ()),
        limits=Limits(
            requests_per_minute=requests_per_minute,
            open_jobs=jobs_per_key,
            queue=queue,
            body_bytes=int(max_upload * 2**20),
        ),
        dtype=dtype,
        max_num_seqs=batch_size,
        lasts=None if keep_hours is None else keep_hours * HOUR,
        max_bytes=None if keep_gigabytes is None else int(keep_gigabytes * GIGABYTE),
        page=page,
    )
    note(f"starting the engines of {options.bundle_dir}; this takes half a minute or more")
    run(options)
