"""``avp-agents size``: what contexts of a model take in a store and on a link, computed from its configuration."""

from __future__ import annotations

import contextlib
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from avp_agents.cli.console import print_json, progress_console, result_console
from avp_agents.errors import ConfigurationError

if TYPE_CHECKING:
    from avp_agents.sizing import ContextSize

LENGTHS = (300, 1_000, 4_000, 16_000, 64_000)
GB = 10**9


def size(
    model: Annotated[str | None, typer.Option(help="Name or folder. Default: SmolLM2-135M-Instruct.")] = None,
    tokens: Annotated[list[int] | None, typer.Option(min=1, help="Tokens of a context; repeat it for several.")] = None,
    steps: Annotated[int, typer.Option(min=0, help="Latent steps of a context.")] = 20,
    link: Annotated[
        list[float] | None, typer.Option(min=0.001, help="A link's speed in Gbit/s; repeat it for several.")
    ] = None,
    prefill: Annotated[float | None, typer.Option(min=1, help="Prefill speed of the receiver, in tokens/s.")] = None,
    measure: Annotated[
        bool, typer.Option("--measure", help="Load the model, and measure the prefill speed of this machine.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")] = False,
) -> None:
    """Bytes per context by length, contexts per GB, and from which link speed on moving the KV-cache beats replay."""
    if measure and prefill is not None:
        raise ConfigurationError("Give --prefill or --measure, not both.")
    with contextlib.redirect_stdout(sys.stderr), progress_console().status("Reading the model's configuration"):
        from avp_agents.sizing import ContextSize, ModelSizes

        sizes = ModelSizes.of(model)
        contexts = [ContextSize.of(sizes, count, steps) for count in sorted(set(tokens or LENGTHS))]
        speed = _measured(model) if measure else prefill
    links = sorted(set(link or ()))
    if as_json:
        rows = [_row(context, speed, links) for context in contexts]
        print_json({"model": asdict(sizes), "prefill_tokens_per_second": speed, "contexts": rows})
        return
    console = result_console()
    kind = f"{sizes.layers} layers, {sizes.kv_heads} KV heads, hidden {sizes.hidden}"
    console.print(f"[bold]{sizes.name}[/]: {kind}; KV-cache {sizes.kv_bytes(1):,} bytes per position (bfloat16)")
    console.print(_sizes_table(contexts, speed))
    if links:
        console.print(_links_table(contexts, speed, links))
    if speed is None:
        console.print("With --prefill TOKENS_PER_SECOND or --measure: from which link speed on kv beats replay.")


def _measured(model: str | None) -> float:
    from transformers.utils import logging

    from avp_agents.engine.latent_engine import LatentEngine
    from avp_agents.sizing import measure_prefill
    from avp_agents.store import MemoryStore

    logging.disable_progress_bar()
    with LatentEngine.from_pretrained(model, store=MemoryStore()) as engine:
        return measure_prefill(engine, tokens=400)


def _row(context: ContextSize, speed: float | None, links: list[float]) -> dict[str, Any]:
    row: dict[str, Any] = asdict(context) | {
        "contexts_per_gb": {
            "kv": GB / context.kv_bytes,
            "kv int8": GB / context.kv_int8_bytes,
            "lineage": GB / context.lineage_bytes,
        },
        "seconds_by_link": {f"{link:g} Gbit/s": context.seconds(link * 1e9, speed) for link in links},
    }
    if speed is not None:
        row["kv_beats_replay_from_bits_per_second"] = {
            "kv": context.break_even(speed),
            "kv int8": context.break_even(speed, int8=True),
        }
    return row


def _sizes_table(contexts: list[ContextSize], speed: float | None) -> Table:
    """Bytes and contexts per GB; and, where the prefill's speed is known, the link speed at which both ways tie."""
    table = Table("tokens", "steps", title="Per context, and contexts per GB (10^9 bytes)")
    columns = ["KV bf16", "KV int8", "lineage", "KV bf16/GB", "KV int8/GB", "lineages/GB"]
    if speed is not None:
        table.caption = f"The receiver prefills {speed:,.0f} tokens/s. On slower links than those, replay is faster."
        columns += ["kv bf16 from", "kv int8 from"]
    for column in columns:
        table.add_column(column, justify="right")
    for context in contexts:
        taken = (context.kv_bytes, context.kv_int8_bytes, context.lineage_bytes)
        cells = [*map(_bytes, taken), *(_count(GB / each) for each in taken)]
        if speed is not None:
            cells += [_bits(context.break_even(speed)), _bits(context.break_even(speed, int8=True))]
        table.add_row(f"{context.tokens:,}", str(context.steps), *cells)
    return table


def _links_table(contexts: list[ContextSize], speed: float | None, links: list[float]) -> Table:
    """How long a handover takes on each link, the fastest way in bold."""
    table = Table("tokens", title="Handover between machines: link time, and prefill where it is replay")
    for link in links:
        table.add_column(f"{link:g} Gbit/s", justify="right")
    for context in contexts:
        cells = []
        for link in links:
            times = context.seconds(link * 1e9, speed)
            shown = {mode: f"{mode} {1e3 * taken:,.1f} ms" for mode, taken in times.items()}
            fastest = min(times, key=times.__getitem__)
            cells.append("\n".join(f"[bold]{text}[/]" if mode == fastest else text for mode, text in shown.items()))
        table.add_row(f"{context.tokens:,}", *cells, end_section=True)
    return table


def _count(contexts: float) -> str:
    return f"{contexts:,.0f}" if contexts >= 10 else f"{contexts:.1f}"


def _bytes(count: float) -> str:
    return _scaled(count, ("B", "kB", "MB", "GB"))


def _bits(per_second: float) -> str:
    return _scaled(per_second, ("bit/s", "kbit/s", "Mbit/s", "Gbit/s"))


def _scaled(value: float, units: tuple[str, ...]) -> str:
    """A number in the unit that leaves it below 1000, if one does; three digits at least."""
    for unit in units[:-1]:
        if value < 999.5:
            return f"{value:.{max(0, 2 - len(str(int(value))) + 1)}f} {unit}"
        value /= 1000
    return f"{value:.{max(0, 2 - len(str(int(value))) + 1)}f} {units[-1]}"
