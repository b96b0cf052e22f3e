"""``avp-agents doctor``: versions, device, memory, model and store, and what to do about what does not work."""

from __future__ import annotations

import contextlib
import sys
from dataclasses import asdict
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from avp_agents.cli import checks
from avp_agents.cli.console import print_json, result_console

_MARKS = {"ok": "[green]✓[/]", "note": "[yellow]![/]", "problem": "[bold red]✗[/]"}


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")] = False,
) -> None:
    """Say what works here, and what to do about what does not. Exit code 0 if the demo can run, else 1."""
    with contextlib.redirect_stdout(sys.stderr):
        findings = checks.run_checks()
    demo_can_run = all(finding.verdict != "problem" for finding in findings)
    if as_json:
        print_json({"demo_can_run": demo_can_run, "findings": [asdict(finding) for finding in findings]})
    else:
        _show(findings, demo_can_run)
    if not demo_can_run:
        raise typer.Exit(code=1)


def _show(findings: list[checks.Finding], demo_can_run: bool) -> None:
    table = Table(box=None, show_header=False, pad_edge=False)
    for finding in findings:
        advice = f"\n[bold]→ {escape(finding.advice)}[/]" if finding.advice else ""
        table.add_row(_MARKS[finding.verdict], finding.subject, escape(finding.detail) + advice)
    console = result_console()
    console.print(table)
    console.print(
        "\n[green]The demo can run: avp-agents demo[/]" if demo_can_run else "\n[red]The demo cannot run yet.[/]"
    )
