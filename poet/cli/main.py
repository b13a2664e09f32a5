"""The command line: parses, calls one function, prints one result. Commands of other packages attach as plugins."""

from __future__ import annotations

import os
import sys

# Spinning OpenMP threads cost a factor of ten on shared machines; it must be set before torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "0")
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

import functools
from collections.abc import Callable, Iterable
from importlib.metadata import EntryPoint, entry_points
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from poet import __version__
from poet.cli.data import encode, reconstruct
from poet.cli.evaluate import evaluate
from poet.cli.generate import generate
from poet.cli.info import info
from poet.cli.merge import merge
from poet.cli.output import note
from poet.cli.train import train
from poet.errors import ConfigError, PoetError

__all__ = ["build_app", "main"]

# What `poet --help` says of our own commands in other packages, which it does not load.
OWN_PLUGINS = {
    "poet_conversions.cli:convert": "Convert a bundle to a Megatron checkpoint or back, or start one from Qwen3.",
    "poet_serving.cli:batch": "Write a clip for every line of a file; what is answered already is not done again.",
    "poet_serving.serve_cli:serve": "Serve a bundle over HTTP: OpenAI's videos API, chat, and a page to chat with.",
}

EXIT_ERROR, EXIT_INTERRUPTED = 1, 130


def build_app() -> typer.Typer:
    """All commands, those of installed packages included (entry-point group `poet.commands`), which are not loaded."""
    own = (generate, reconstruct, encode, train, merge, evaluate, info)
    names = {command.__name__ for command in own}
    plugins = sorted(entry_points(group="poet.commands"), key=lambda entry: entry.name)
    ignored = [entry for entry in plugins if entry.name in names]
    app = typer.Typer(
        name="poet",
        cls=_group(ignored),
        help="Writes video with sound, from text, images, clips or nothing.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
    )
    app.callback()(_options)
    for command in own:
        namesakes = [entry for entry in ignored if entry.name == command.__name__]
        app.command(cls=_own(namesakes))(_with_messages(command))
    for entry in plugins:
        if entry.name not in names:
            about = OWN_PLUGINS.get(entry.value, f"Plugin {entry.value}.")
            app.command(name=entry.name, cls=_plugin(entry), help=about)(_nothing)
    return app


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns the exit code: 0 done, 1 an error of Poet, 2 wrong usage, 130 interrupted."""
    try:
        build_app()(arguments, prog_name="poet")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 0 if end.code is None else EXIT_ERROR
    return 0


def _group(ignored: Iterable[EntryPoint]) -> type[TyperGroup]:
    """All commands, whose help names the plugins that no command line reaches."""

    class Group(TyperGroup):
        def get_help(self, ctx: Any) -> str:
            _tell_ignored(ignored)
            return super().get_help(ctx)

    return Group


def _own(namesakes: Iterable[EntryPoint]) -> type[TyperCommand]:
    """One of Poet's commands, which names the plugins that would have been called in its place."""

    class Own(TyperCommand):
        def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> Any:
            _tell_ignored(namesakes)
            return super().make_context(info_name, args, parent, **extra)

    return Own


def _tell_ignored(entries: Iterable[EntryPoint]) -> None:
    for entry in entries:
        note(
            f"poet: the plugin {entry.value} is ignored: Poet has a command {entry.name!r} of its own. "
            "Remove the plugin's package, or ask its makers for another name."
        )


def _plugin(entry: EntryPoint) -> type[TyperCommand]:
    """A command that is loaded when it is called or asked for its help, so that it cannot break or slow others."""

    class Plugin(TyperCommand):
        def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> Any:
            return _with_messages(_load)(entry).make_context(info_name, args, parent, **extra)

    return Plugin


def _load(entry: EntryPoint) -> Any:
    try:
        command = entry.load()
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"the command {entry.name!r} is the plugin {entry.value}, which cannot be loaded: {error}. Install its "
            "package again with all that it needs, or remove it."
        ) from error
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
    app.command(name=entry.name)(_with_messages(command))
    return typer.main.get_command(app)


def _nothing() -> None:
    """In the place of a plugin that is not loaded."""


def _with_messages(command: Callable[..., Any]) -> Callable[..., Any]:
    """Turn errors of Poet and Ctrl-C into one line on standard error and an exit code; anything else is a defect."""

    @functools.wraps(command)
    def guarded(*arguments: Any, **options: Any) -> Any:
        try:
            return command(*arguments, **options)
        except PoetError as error:
            note(f"poet: {error}")
            raise typer.Exit(EXIT_ERROR) from error
        except KeyboardInterrupt as error:
            note("poet: interrupted")
            raise typer.Exit(EXIT_INTERRUPTED) from error

    return guarded


def _print_version(asked: bool) -> None:
    if asked:
        print(__version__)
        raise typer.Exit


def _options(
    version: bool = typer.Option(
        False, "--version", help="Print the version and stop.", is_eager=True, callback=_print_version
    ),
) -> None:
    """The options of `poet` itself."""


if __name__ == "__main__":
    sys.exit(main())
