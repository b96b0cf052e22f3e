"""``avp-agents bench soak``: does a server leak under clients that come and go?"""

from __future__ import annotations

from typing import Annotated

import typer

from avp_agents.cli.console import print_error, print_json, result_console
from avp_bench.cli.options import AsJson, Device, Dtype, Model, figures_table, measuring, server_options


def bench_soak(
    model: Model = None,
    requests: Annotated[int, typer.Option(min=16, help="How many requests are made.")] = 2000,
    concurrency: Annotated[int, typer.Option(min=1, help="Requests at a time.")] = 16,
    dtype: Dtype = "bfloat16",
    device: Device = None,
    seed: Annotated[int, typer.Option(help="Of who leaves, and when.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Serve a model to clients half of which leave early, and see whether it leaks; exit code 1 where it does."""
    with measuring("Starting the server") as report:
        from avp_agents.models import resolve_model
        from avp_bench.served_model import served_model
        from avp_bench.soak import SERVER_OPTIONS, Soak

        options = [*SERVER_OPTIONS, *server_options(dtype, device)]
        with served_model(resolve_model(model), *options) as server:
            result = Soak(server, concurrency, seed, report).run(requests)
    if as_json:
        print_json(result.to_json())
    else:
        title = f"{requests} requests, {concurrency} at a time, {result.seconds:,.0f} s"
        table = figures_table("requests", "contexts made", "left", "memory", "files", title=title)
        for one in result.rounds:
            table.add_row(str(one.requests), str(one.made), str(one.kept), f"{one.memory_mib:,.0f} MiB", str(one.files))
        console = result_console()
        console.print(table)
        console.print(", ".join(f"{count} {outcome}" for outcome, count in sorted(result.outcomes.items())) + ".")
        console.print(f"Memory after the warm-up: {result.growth_mib:+.1f} MiB.")
    if result.leaks:
        print_error("; ".join(result.leaks))
        raise typer.Exit(code=1)
