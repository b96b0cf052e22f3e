"""``avp-agents bench handoff``: every way from one process to another in one table."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from avp_agents.cli.console import print_json, result_console
from avp_bench.cli.options import Device, Dtype, Model, figures_table, measuring, open_engine, server_options


def bench_handoff(
    model: Model = None,
    dtype: Dtype = "bfloat16",
    device: Device = None,
    questions: Annotated[int | None, typer.Option(min=1, help="How many, from the first. Default: all.")] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Handovers per mode and speed of the link.")] = 3,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")] = False,
) -> None:
    """Hand over between two processes in every mode, on links of several speeds; what does the handshake choose?"""
    with measuring() as report:
        from avp_agents.models import resolve_model
        from avp_bench.handoff import HandoffBench, read_questions
        from avp_bench.served_model import served_model

        items, folder = read_questions(questions), resolve_model(model)
        report("Starting the server")
        with (
            served_model(folder, *server_options(dtype, device)) as server,
            open_engine(folder, dtype, device) as solver,
        ):
            result = HandoffBench(solver, server, items, report).run(repeats)
    if as_json:
        print_json(result)
    else:
        _show(result)


def _show(result: dict[str, Any]) -> None:
    console, count = result_console(), result["questions"]
    console.print("  ".join(f"[bold]{key}[/] {value}" for key, value in result["machine"].items()))
    title = f"{count} prompts of {result['prompt_tokens']:.0f} tokens, {result['steps']} latent steps"
    columns = ("bytes", "moved after", "first token after", "right", "as in one process")
    table = figures_table("mode", *columns, title=title)
    for row in result["modes"]:
        table.add_row(
            row["mode"], f"{row['bytes']:,.0f}", f"{row['moved_ms']:,.0f} ms", f"{row['ready_ms']:,.0f} ms",
            f"{row['right']}/{count}", f"{row['same']}/{count}",
        )  # fmt: skip
    console.print(table)
    console.print(f"In one process {result['right_in_one_process']}/{count} answers are right.")
    console.print(f"replay moves {result['replay_bytes_of_kv']:.2%} of the bytes that kv moves.")
    for choice in result["choices"]:
        done = choice["done"]
        console.print(
            f"{choice['link']} (measured: {1e-6 * choice['bits_per_second']:,.1f} Mbit/s): the handshake chooses "
            f"{done['mode']}; {done['bytes']:,} bytes, first token after {done['ready_ms']:,.0f} ms."
        )
    console.print(_crossover(result["crossover"]))


def _crossover(found: dict[str, Any] | None) -> str:
    if found is None:
        return "One of kv and replay is quicker, or chosen, on every link that was tried: there is no crossover."
    return (
        f"kv and replay take equally long at {found['measured_mbit']:,.0f} Mbit/s; the handshake switches at "
        f"{found['switch_mbit']:,.0f} Mbit/s ({found['ratio'] - 1:+.0%})."
    )
