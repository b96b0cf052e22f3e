"""The Typer application: its commands, and how errors end."""

from __future__ import annotations

from importlib.metadata import EntryPoint, entry_points
from typing import Any

import typer
from typer.core import TyperGroup
from typing_extensions import override

import avp_agents
from avp_agents.cli.console import print_error
from avp_agents.cli.demo import demo
from avp_agents.cli.doctor import doctor
from avp_agents.cli.inspect import inspect
from avp_agents.cli.serve import add_token, serve
from avp_agents.cli.size import size
from avp_agents.errors import AvpError, ConfigurationError

COMMANDS = "avp_agents.commands"
"""The entry point group of commands that are not the core's own, a `typer.Typer` each."""


class _CommandGroup(TyperGroup):
    """Commands that end with one line and exit code 1 where avp-agents refuses something on purpose.

    A command of another package is imported when it is run or listed, so that the core's own do not wait for it.
    """

    @override
    def invoke(self, ctx: Any) -> Any:
        # an `AvpError` says what to do, so a traceback would only hide it
        try:
            return super().invoke(ctx)
        except AvpError as error:
            print_error(str(error))
            raise typer.Exit(code=1) from error

    @override
    def list_commands(self, ctx: Any) -> list[str]:
        return [*super().list_commands(ctx), *sorted({"bench", *_registered()})]

    @override
    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        own = super().get_command(ctx, cmd_name)
        return own if own is not None else _mounted(cmd_name)


def _registered() -> dict[str, EntryPoint]:
    return {entry.name: entry for entry in entry_points(group=COMMANDS)}


def _mounted(name: str) -> Any:
    """Another package's command; None where none is registered under that name."""
    entry = _registered().get(name)
    if entry is not None:
        return typer.main.get_command(entry.load())
    return typer.main.get_command(_NO_BENCHES) if name == "bench" else None


def make_app() -> typer.Typer:
    """The application with the core's own commands, and those that installed packages register."""
    app = typer.Typer(
        name="avp-agents",
        cls=_CommandGroup,
        help="LLM agents hand over their computation instead of text.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_show_locals=False,
    )
    app.callback()(_main)
    app.command()(demo)
    app.command()(doctor)
    app.command()(inspect)
    app.command()(serve)
    app.command("add-token")(add_token)
    app.command()(size)
    return app


_NO_BENCHES = typer.Typer(add_completion=False)


@_NO_BENCHES.command("bench", context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def _no_benches() -> None:
    """Measure on the machine at hand."""
    raise ConfigurationError('The benches are not installed. Install them with: pip install "avp-agents[evals]"')


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(avp_agents.__version__)
        raise typer.Exit


def _main(
    version: bool = typer.Option(
        False, "--version", callback=_print_version, is_eager=True, help="Print the version and exit."
    ),
) -> None:
    """LLM agents hand over their computation instead of text."""


app = make_app()
