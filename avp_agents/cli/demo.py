"""``avp-agents demo``: a researcher and a solver, handing over a latent context and handing over text."""

from __future__ import annotations

import contextlib
import sys
from typing import Annotated

import typer
from rich import box
from rich.markup import escape
from rich.table import Table

from avp_agents.cli.console import print_json, progress_console, result_console
from avp_agents.demo import AgentRun, Comparison, Demo, DemoRequest, GraphRun, find_demo
from avp_agents.models import resolve_model

QUESTION = (
    "A baker makes 24 muffins in the morning and half as many in the afternoon. "
    "At the end of the day 6 muffins are left. He sold the others for 3 dollars each. How many dollars did he take?"
)


def demo(
    model: Annotated[
        str | None, typer.Option(help="Name or folder of a Hugging Face model. Default: SmolLM2-135M-Instruct.")
    ] = None,
    question: Annotated[str, typer.Option(help="What the agents work on.")] = QUESTION,
    steps: Annotated[int, typer.Option(min=1, help="Latent steps of the researcher.")] = 20,
    max_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of the solver's answer.")] = 128,
    researcher_tokens: Annotated[
        int, typer.Option(min=1, help="Most tokens of the researcher that writes text.")
    ] = 256,
    framework: Annotated[str, typer.Option(help="Whose graph or crew to run: langgraph or crewai.")] = "langgraph",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")] = False,
) -> None:
    """Run a researcher and a solver twice: handing over a latent context, and handing over text."""
    if not question.strip():
        raise typer.BadParameter("The question is empty.", param_hint="--question")
    request = DemoRequest(question, latent_steps=steps, researcher_tokens=researcher_tokens, max_tokens=max_tokens)
    with contextlib.redirect_stdout(sys.stderr):
        comparison = _run(find_demo(framework), model, request)
    if as_json:
        print_json(comparison.to_json())
    else:
        _show(request, comparison)


def _run(run: Demo, model: str | None, request: DemoRequest) -> Comparison:
    """Load the model, run both graphs, and tell on stderr what is going on."""
    name = resolve_model(model)
    with progress_console().status("Importing torch and transformers") as status:
        from transformers.utils import logging

        from avp_agents.engine.latent_engine import LatentEngine
        from avp_agents.store import MemoryStore

        logging.disable_progress_bar()
        status.update("Loading the model")
        with LatentEngine.from_pretrained(name, store=MemoryStore()) as engine:
            return run(engine, request, report=status.update)


def _show(request: DemoRequest, comparison: Comparison) -> None:
    """The graph, what each agent did, the answers and the ratio."""
    console = result_console()
    latent, text = comparison.latent, comparison.text
    console.print(f"\n[bold]Question[/]  {escape(request.question)}\n")
    for name, run in (("latent", latent), ("text", text)):
        console.print(f"[bold]{name:<6}[/]    START → {_drawing(run.agents)} → END")
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("graph")
    for heading in ("seconds", "latent\nsteps", "tokens\ndecoded", "positions\nreused", "bytes\nhanded over"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("handoff")
    for name, run in (("latent", latent), ("text", text)):
        table.add_row(name, *_figures(run), style="bold")
        for agent in run.agents:
            table.add_row(f"  {agent.agent}", *_figures(agent), end_section=agent is run.agents[-1])
    console.print()
    console.print(table)
    console.print(f"\n[bold]Answer, latent[/]  {escape(latent.answer)}")
    console.print(f"\n[bold]Answer, text[/]    {escape(text.answer)}")
    console.print(
        f"\n[bold]text / latent = {comparison.ratio:.2f}[/]  "
        f"({text.seconds:.2f} s / {latent.seconds:.2f} s; model warmed up before both; "
        f"the answers have {text.agents[-1].tokens_decoded} and {latent.agents[-1].tokens_decoded} tokens)\n"
    )


def _figures(run: GraphRun | AgentRun) -> tuple[str, ...]:
    """The cells of a row, for a graph or for one of its agents."""
    counts = (run.latent_steps, run.tokens_decoded, run.positions_reused, run.bytes_handed_over)
    return (f"{run.seconds:.2f}", *map(str, counts), run.mode)


def _drawing(agents: tuple[AgentRun, ...]) -> str:
    """The agents in a row, with what passes between them on the arrows."""
    first, *others = agents
    return f"[cyan]{first.agent}[/]" + "".join(f" ──{a.mode}──▶ [cyan]{a.agent}[/]" for a in others)
