"""The Typer application: its commands, and how errors end."""

from __future__ import annotations

from typing import Any

import typer
from typer.core import TyperGroup

import avp_agents
from avp_agents.cli.bench import bench
from avp_agents.cli.chain import bench_chain
from avp_agents.cli.console import print_error
from avp_agents.cli.demo import demo
from avp_agents.cli.doctor import doctor
from avp_agents.cli.handoff import bench_handoff
from avp_agents.cli.inspect import inspect
from avp_agents.cli.quality import bench_quality, report
from avp_agents.cli.reference import bench_reference
from avp_agents.cli.serve import add_token, serve
from avp_agents.cli.size import size
from avp_agents.cli.soak import bench_soak
from avp_agents.cli.throughput import bench_throughput
from avp_agents.errors import AvpError


class _CommandGroup(TyperGroup):
    """Commands that end with one line and exit code 1 where avp-agents refuses something on purpose."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command; an `AvpError` says what to do, so a traceback would only hide it."""
        try:
            return super().invoke(ctx)
        except AvpError as error:
            print_error(str(error))
            raise typer.Exit(code=1) from error


app = typer.Typer(
    name="avp-agents",
    cls=_CommandGroup,
    help="LLM agents hand over their computation instead of text.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
)
app.command()(demo)
app.command()(doctor)
app.command()(inspect)
app.command()(serve)
app.command("add-token")(add_token)
app.command()(report)
app.command()(size)
bench.command("chain")(bench_chain)
bench.command("handoff")(bench_handoff)
bench.command("quality")(bench_quality)
bench.command("reference")(bench_reference)
bench.command("soak")(bench_soak)
bench.command("throughput")(bench_throughput)
app.add_typer(bench, name="bench")


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(avp_agents.__version__)
        raise typer.Exit


@app.callback()
def _main(
    version: bool = typer.Option(
        False, "--version", callback=_print_version, is_eager=True, help="Print the version and exit."
    ),
) -> None:
    """LLM agents hand over their computation instead of text."""
