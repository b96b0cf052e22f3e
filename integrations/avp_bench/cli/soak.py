"""``avp-agents bench soak``: does a server leak under clients that come and go?"""

from __future__ import annotations

import contextlib
import sys
from typing import Annotated

import typer
from rich.table import Table

from avp_agents.cli.console import print_error, print_json, progress_console, result_console


def bench_soak(
    model: Annotated[str | None, typer.Option(help="Name or folder. Default: SmolLM2-135M-Instruct.")] = None,
    requests: Annotated[int, typer.Option(min=16, help="How many requests are made.")] = 2000,
    concurrency: Annotated[int, typer.Option(min=1, help="Requests at a time.")] = 16,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "bfloat16",
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ... Default: an accelerator if there is one.")] = None,
    seed: Annotated[int, typer.Option(help="Of who leaves, and when.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")] = False,
) -> None:
    """Serve a model to clients half of which leave early, and see whether it leaks; exit code 1 where it does."""
    with contextlib.redirect_stdout(sys.stderr), progress_console().status("Starting the server") as status:
        from avp_agents.models import resolve_model
        from avp_bench.served_model import served_model
        from avp_bench.soak import SERVER_OPTIONS, Soak

        options = [*SERVER_OPTIONS, "--dtype", dtype, *(["--device", device] if device is not None else [])]
        with served_model(resolve_model(model), *options) as server:
            result = Soak(server, concurrency, seed, status.update).run(requests)
    if as_json:
        print_json(result.to_json())
    else:
        table = Table("requests", title=f"{requests} requests, {concurrency} at a time, {result.seconds:,.0f} s")
        for column in ("contexts made", "left", "memory", "files"):
            table.add_column(column, justify="right")
        for one in result.rounds:
            table.add_row(str(one.requests), str(one.made), str(one.kept), f"{one.memory_mib:,.0f} MiB", str(one.files))
        console = result_console()
        console.print(table)
        console.print(", ".join(f"{count} {outcome}" for outcome, count in sorted(result.outcomes.items())) + ".")
        console.print(f"Memory after the warm-up: {result.growth_mib:+.1f} MiB.")
    if result.leaks:
        print_error("; ".join(result.leaks))
        raise typer.Exit(code=1)
