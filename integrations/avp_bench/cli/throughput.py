"""``avp-agents bench throughput``: pipelines per minute on the machine at hand, on both engines."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from avp_agents.cli.console import print_json, result_console
from avp_agents.errors import ConfigurationError
from avp_bench.cli.options import AsJson, Dtype, Model, figures_table, measuring

if TYPE_CHECKING:
    from avp_bench.throughput import Throughput


def bench_throughput(
    model: Model = None,
    dtype: Dtype = "bfloat16",
    concurrency: Annotated[str, typer.Option(help="Pipelines at once, comma-separated.")] = "1,4,16",
    pipelines: Annotated[int, typer.Option(min=1, help="Pipelines timed at each.")] = 16,
    steps: Annotated[int, typer.Option(min=1, help="Latent steps of a researcher that thinks.")] = 20,
    notes: Annotated[int, typer.Option(min=1, help="Tokens of a researcher that writes.")] = 128,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of each answer.")] = 64,
    eager: Annotated[bool, typer.Option(help="Run vLLM without compiling, as is best on a CPU.")] = False,
    as_json: AsJson = False,
) -> None:
    """Time researcher-solver pipelines: contexts on either engine, and text on vLLM. Needs the extra vllm."""
    levels = _levels(concurrency)
    with measuring("Importing torch and vLLM") as report:
        from avp_bench.throughput import PipelineWork, arms, measure

        work = PipelineWork(steps, notes, tokens)
        found = [
            each
            for arm in arms(model, dtype, work, max(levels), eager=eager)
            for each in measure(arm, levels, pipelines, report)
        ]
    if as_json:
        print_json({"work": asdict(work), "throughput": [asdict(each) for each in found]})
    else:
        _show(found, levels)


def _levels(concurrency: str) -> list[int]:
    try:
        levels = [int(level) for level in concurrency.split(",")]
    except ValueError:
        levels = []
    if not levels or min(levels) < 1:
        raise ConfigurationError(f"--concurrency takes positive numbers like 1,4,16, not {concurrency!r}.")
    return levels


def _show(found: list[Throughput], levels: list[int]) -> None:
    table = figures_table("pipelines per minute (median seconds)", *(f"{level} at once" for level in levels))
    for arm in dict.fromkeys(each.arm for each in found):
        cells = [f"{each.per_minute:.1f} ({each.median_seconds:.2f})" for each in found if each.arm == arm]
        table.add_row(arm, *cells)
    result_console().print(table)
