"""Options that several benches take, and how each of them runs and prints."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Annotated

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from avp_agents.cli.console import progress_console

if TYPE_CHECKING:
    from avp_agents.engine.latent_engine import LatentEngine

Model = Annotated[str | None, typer.Option(help="Name or folder. Default: SmolLM2-135M-Instruct.")]
Dtype = Annotated[str, typer.Option(help="float32, bfloat16 or float16.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, ... Default: an accelerator if there is one.")]
Problems = Annotated[int | None, typer.Option(min=1, help="How many problems, from the first.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")]


@contextlib.contextmanager
def measuring(doing: str = "Importing torch and transformers") -> Iterator[Callable[[str], None]]:
    """Keep stdout for the result, and tell on stderr what is going on; yields what changes that line."""
    with contextlib.redirect_stdout(sys.stderr), progress_console().status(doing) as status:
        yield status.update


@contextlib.contextmanager
def counting(what: str) -> Iterator[Callable[[int, int], None]]:
    """Show on stderr how much is done; yields what is told how many of how many."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=progress_console()) as progress:
        bar = progress.add_task(what)
        yield lambda done, of: progress.update(bar, completed=done, total=of)


def open_engine(model: str | None, dtype: str | None, device: str | None = None) -> LatentEngine:
    """An engine whose contexts stay in memory."""
    from avp_agents.engine.latent_engine import LatentEngine
    from avp_agents.store import MemoryStore

    return LatentEngine.from_pretrained(model, dtype=dtype, device=device, store=MemoryStore())


def server_options(dtype: str, device: str | None) -> list[str]:
    """The same choices as options of ``avp-agents serve``."""
    return ["--dtype", dtype, *(["--device", device] if device is not None else [])]


def figures_table(first: str, *figures: str, title: str | None = None) -> Table:
    """A table whose columns, but for the first, are figures."""
    table = Table(first, title=title)
    for column in figures:
        table.add_column(column, justify="right")
    return table
