"""Where the command line writes: results to stdout, progress and errors to stderr."""

from __future__ import annotations

import json
import sys
from typing import Any

import typer
from rich.console import Console
from rich.markup import escape


def result_console() -> Console:
    """The console for results that people read."""
    return Console(file=sys.stdout)


def progress_console() -> Console:
    """The console for progress and errors."""
    return Console(file=sys.stderr)


def print_json(value: dict[str, Any]) -> None:
    """One JSON object, for machines, as all there is on stdout."""
    typer.echo(json.dumps(value, ensure_ascii=False, indent=2))


def print_error(message: str) -> None:
    """One red line on stderr."""
    line = " ".join(message.split())
    progress_console().print(f"[bold red]Error:[/] [red]{escape(line)}[/]", soft_wrap=True, highlight=False)
