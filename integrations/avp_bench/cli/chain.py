"""``avp-agents bench chain``: what chains of agents compute when they hand on contexts, and when they hand on text."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from avp_agents.cli.console import print_json, result_console
from avp_bench.cli.options import AsJson, Device, Model, figures_table, measuring, open_engine

if TYPE_CHECKING:
    from avp_bench.chain import ChainCost


def bench_chain(
    model: Model = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16. Default: the model's.")] = None,
    device: Device = None,
    agents: Annotated[int, typer.Option(min=2, max=8, help="Longest chain.")] = 8,
    steps: Annotated[int, typer.Option(min=1, help="Latent steps of each agent.")] = 20,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of each text.")] = 64,
    plot: Annotated[Path | None, typer.Option(help="Draw the curves into this .svg or .png file.")] = None,
    as_json: AsJson = False,
) -> None:
    """Count the positions that chains of 2 to N agents compute, with contexts and with text handed on."""
    with measuring() as report:
        from avp_bench import chain

        with open_engine(model, dtype, device) as engine:
            costs = chain.run(engine, agents, steps=steps, tokens=tokens, report=report)
        if plot is not None:
            chain.save_plot(costs, plot)
    if as_json:
        print_json({"steps": steps, "tokens": tokens, "chains": [asdict(cost) for cost in costs]})
    else:
        _show(costs)


def _show(costs: list[ChainCost]) -> None:
    columns = ("computed, latent", "computed, text", "decoded, latent", "decoded, text", "text / latent")
    table = figures_table("agents", *columns)
    for cost in costs:
        figures = (cost.latent, cost.text, cost.latent_decoded, cost.text_decoded)
        table.add_row(str(cost.agents), *map(str, figures), f"{cost.text / cost.latent:.1f}")
    result_console().print(table)
