"""Starting vLLM's server with Poet's engine and endpoint. Knows vLLM's command line; not what the routes do."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
from typing import Any, Final

from poet.bundle import Bundle
from poet.errors import ConfigError, PoetError
from poet_serving.api.guard import ApiKeys
from poet_serving.api.options import ServeOptions
from poet_serving.plugin import END_WITH_PARENT, register_classes
from poet_serving.settings import EngineSettings, set_environment

__all__ = ["ENGINE_CLASSES", "serve"]

ENGINE_CLASSES: Final[dict[str, Any]] = {
    "scheduler_cls": "poet_serving.scheduler.PairScheduler",
    # By its full name, because vLLM takes a plain "uni" for "mp" on CPUs, so that it can set OpenMP's environment for a
    # process of its own; we set that before, and save the process.
    "distributed_executor_backend": "vllm.v1.executor.uniproc_executor.UniProcExecutor",
}
"""Of every engine, by name: another process imports them."""

PROCESSORS: Final = [  # in this order
    "poet_serving.guidance:GuidanceLogitsProcessor",
    "poet_serving.repetition:RepetitionLogitsProcessor",
    "poet_serving.grammar:GrammarLogitsProcessor",
]


def serve(options: ServeOptions) -> None:
    """Serve until the process is told to end.

    Args:
        options: how.

    Raises:
        CheckpointError: the bundle cannot be used.
        ConfigError: the keys cannot be read, the address cannot be listened on, or vLLM is not installed.
        PoetError: an engine ended by itself.
        JobError: the store of jobs cannot be used.
    """
    ApiKeys.read(options.keys)  # what is wrong is said now, not half a minute later
    Bundle.open(options.bundle_dir)
    settings = EngineSettings.of_bundle(
        options.bundle_dir, dtype=options.dtype, max_num_seqs=options.max_num_seqs, adapters=options.adapters
    )
    options.data.mkdir(parents=True, exist_ok=True)
    set_environment()
    os.environ["VLLM_PLUGINS"] = "poet,poet_api"
    os.environ[END_WITH_PARENT] = "1"
    # Longer than clients are told to wait until they ask again, and than proxies keep connections: whoever closes first
    # takes the other's next request with it.
    os.environ.setdefault("VLLM_HTTP_TIMEOUT_KEEP_ALIVE", "75")
    os.environ.setdefault("VLLM_USE_V2_MODEL_RUNNER", "0")
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    if settings.num_threads_in_turn is not None:
        os.environ["OMP_NUM_THREADS"] = str(settings.num_threads_in_turn)
    try:
        import uvloop
        from vllm.entrypoints.launchers.api_server.entry import run_server
        from vllm.entrypoints.launchers.cli_args import make_arg_parser
        from vllm.utils.argparse_utils import FlexibleArgumentParser
    except ImportError as error:
        raise ConfigError(f"poet serve needs vLLM ({error}). Install openpoet[serve].") from error
    register_classes()
    arguments = make_arg_parser(FlexibleArgumentParser()).parse_args([])
    vars(arguments).update(
        settings.causal()
        | ENGINE_CLASSES
        | {
            "logits_processors": PROCESSORS,
            "served_model_name": [options.name],
            "host": options.host,
            "port": options.port,
            "allowed_origins": [],
            "disable_fastapi_docs": True,  # Poet's own application has its own
            "disable_uvicorn_access_log": True,
            "uvicorn_log_level": "warning",
            "use_tqdm_on_load": False,
            "poet": options,
            "poet_settings": settings,
            "poet_engine_gone": False,
        }
    )
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(run_server(arguments))
    except OSError as error:
        if not _is_of_address(error):
            raise
        raise ConfigError(
            f"--host and --port must be an address that is free, cannot listen on {options.host}:{options.port}: "
            f"{error.strerror}. Name another."
        ) from error
    if arguments.poet_engine_gone:
        raise PoetError("an engine ended by itself, so the server ended too; jobs go on after the next start.")


def _is_of_address(error: OSError) -> bool:
    """Whether an error is that of an address rather than of a file."""
    taken = (errno.EADDRINUSE, errno.EADDRNOTAVAIL, errno.EACCES)
    return isinstance(error, socket.gaierror) or (error.errno in taken and error.filename is None)
