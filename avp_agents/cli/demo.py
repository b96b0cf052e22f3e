"""``avp-agents demo``: a researcher and a solver, handing over a latent context and handing over text."""

from __future__ import annotations

import contextlib
import sys
from importlib.metadata import entry_points
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from avp_agents.cli.console import print_json, progress_console, result_console
from avp_agents.demo import ENTRY_POINT_GROUP, AgentRun, Comparison, Demo, DemoRequest
from avp_agents.errors import ConfigurationError

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
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")] = False,
) -> None:
    """Run a researcher and a solver twice: handing over a latent context, and handing over text."""
    if not question.strip():
        raise typer.BadParameter("The question is empty.", param_hint="--question")
    request = DemoRequest(question, latent_steps=steps, researcher_tokens=researcher_tokens, max_tokens=max_tokens)
    run = _find_demo("langgraph")
    with contextlib.redirect_stdout(sys.stderr):
        comparison = _run(run, model, request)
    if as_json:
        print_json(comparison.to_json())
    else:
        _show(request, comparison)


def _find_demo(framework: str) -> Demo:
    """The demo that a framework's integration registered.

    Raises:
        ConfigurationError: It is not registered, or the framework is not installed.
    """
    found = tuple(entry_points(group=ENTRY_POINT_GROUP, name=framework))
    if not found:
        raise ConfigurationError(
            f"No demo named {framework!r} is registered. Install avp-agents with pip; a bare source folder is not enough."
        )
    try:
        return found[0].load()
    except ModuleNotFoundError as error:
        raise ConfigurationError(
            f"The demo needs {error.name!r}, which is not installed: pip install 'avp-agents[{framework}]'"
        ) from error


def _run(run: Demo, model: str | None, request: DemoRequest) -> Comparison:
    """Load the model, run both graphs, and tell on stderr what is going on."""
    console = progress_console()
    with console.status("Importing torch and transformers") as status:
        from avp_agents.engine.latent_engine import LatentEngine
        from avp_agents.store import MemoryStore

        status.update("Loading the model")
        with LatentEngine.from_pretrained(model, store=MemoryStore()) as engine:
            return run(engine, request, report=status.update)


def _show(request: DemoRequest, comparison: Comparison) -> None:
    """The graph, what each agent did, the answers and the ratio."""
    console = result_console()
    latent, text = comparison.latent, comparison.text
    console.print(f"\n[bold]Question[/]  {escape(request.question)}\n")
    for name, run in (("latent", latent), ("text", text)):
        console.print(f"[bold]{name:<6}[/]    START → {_drawing(run.agents)} → END")
    table = Table(title="What each agent did", title_justify="left")
    table.add_column("graph")
    table.add_column("agent")
    for heading in ("seconds", "latent steps", "tokens decoded", "positions reused", "bytes handed over"):
        table.add_column(heading, justify="right")
    table.add_column("handoff")
    for name, run in (("latent", latent), ("text", text)):
        for agent in run.agents:
            table.add_row(
                name, agent.agent, f"{agent.seconds:.2f}", str(agent.latent_steps), str(agent.tokens_decoded),
                str(agent.positions_reused), str(agent.bytes_handed_over), agent.mode,
            )  # fmt: skip
        table.add_row(
            f"[bold]{name}[/]", "[bold]both[/]", f"[bold]{run.seconds:.2f}[/]",
            str(sum(agent.latent_steps for agent in run.agents)), str(run.tokens_decoded), str(run.positions_reused),
            str(run.bytes_handed_over), f"[bold]{run.mode}[/]", end_section=True,
        )  # fmt: skip
    console.print()
    console.print(table)
    console.print(f"\n[bold]Answer, latent[/]  {escape(latent.answer)}")
    console.print(f"\n[bold]Answer, text[/]    {escape(text.answer)}")
    console.print(
        f"\n[bold]text / latent = {comparison.ratio:.2f}[/]  "
        f"({text.seconds:.2f} s / {latent.seconds:.2f} s, model warmed up before both)\n"
    )


def _drawing(agents: tuple[AgentRun, ...]) -> str:
    """The agents in a row, with what passes between them on the arrows."""
    first, *others = agents
    return f"[cyan]{first.agent}[/]" + "".join(f" ──{a.mode}──▶ [cyan]{a.agent}[/]" for a in others)
