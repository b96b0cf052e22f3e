"""``avp-agents bench quality`` and ``avp-agents report``: are answers on a handed-over context as good?"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from avp_agents.cli.console import print_json, progress_console, result_console
from avp_agents.errors import ConfigurationError

if TYPE_CHECKING:
    from avp_agents.engine.latent_engine import LatentEngine
    from avp_agents.evals.quality.arms import Arm, Project
    from avp_agents.evals.quality.summary import Summary

N = TypeVar("N", int, float)


def bench_quality(
    task: Annotated[str, typer.Argument(help="humaneval, gsm8k, math, debugbench, hotpotqa or comprehension.")],
    model: Annotated[str | None, typer.Option(help="Name or folder. Default: SmolLM2-135M-Instruct.")] = None,
    source: Annotated[str | None, typer.Option(help="The researchers' model in cross-model modes.")] = None,
    modes: Annotated[
        str,
        typer.Option(
            help="Comma-separated: direct, latent, text, prefill, shuffled, text-capped, projection, text-cross-model."
        ),
    ] = ("direct,latent,text,prefill,shuffled"),
    team: Annotated[str, typer.Option(help="pair, chain or fan-in.")] = "pair",
    data: Annotated[Path | None, typer.Option(help="A local copy of the task, as JSON lines.")] = None,
    problems: Annotated[int | None, typer.Option(min=1, help="How many problems, from the first.")] = None,
    seeds: Annotated[str, typer.Option(help="Comma-separated.")] = "0",
    temperature: Annotated[float, typer.Option(min=0, help="Of everything that is decoded.")] = 0.0,
    steps: Annotated[str, typer.Option(help="Latent steps; several make one arm each.")] = "20",
    method: Annotated[str, typer.Option(help="soft, ridge, rescale or auto; several make one arm each.")] = "auto",
    renormalise: Annotated[str, typer.Option(help="yes, no or auto; several make one arm each.")] = "auto",
    latent_temperature: Annotated[str, typer.Option(help="Of the latent step; several make one arm each.")] = "1",
    strategy: Annotated[str, typer.Option(help="How parallel researchers are joined: replay, splice.")] = "replay",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "bfloat16",
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ...")] = None,
    concurrency: Annotated[int, typer.Option(min=1, help="Answers worked on at once.")] = 16,
    out: Annotated[Path | None, typer.Option(help="Folder of the run; a run that is there is resumed.")] = None,
    unsafe: Annotated[bool, typer.Option("--unsafe", help="Run generated code without a sandbox.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the summary as JSON.")] = False,
) -> None:
    """Answer a task's problems with every mode, paired, and say which is better and what it took."""
    with contextlib.redirect_stdout(sys.stderr), ExitStack() as opened:
        from avp_agents.evals.quality.arms import TEAMS, Bench
        from avp_agents.evals.quality.run import Plan, RunFolder, run
        from avp_agents.evals.quality.summary import summarise
        from avp_agents.evals.quality.tasks import task_named
        from avp_agents.evals.sandbox import check_sandbox, sandboxed, unprotected

        if team not in TEAMS:
            raise ConfigurationError(f"Unknown team {team!r}; choose one of {', '.join(TEAMS)}.")
        chosen = task_named(task)
        if chosen.runs_code and not unsafe:
            check_sandbox()
        arms = _arms(modes, steps, method, renormalise, latent_temperature, strategy)
        items = chosen.load(data, problems)
        console = progress_console()
        with console.status("Loading the model"):
            engine = _engine(opened, model, dtype, device)
            other = _engine(opened, source, dtype, device) if source is not None else None
            about = {
                "task": task, "team": team, "model": Path(engine.model_path).name, "fingerprint": engine.fingerprint,
                "dtype": engine.dtype, "device": str(engine.device), "temperature": temperature,
                "source": other.fingerprint if other is not None else None,
            }  # fmt: skip
        plan = Plan(arms, items, _numbers(seeds, int), about)
        folder = RunFolder(out or Path("runs", f"{task}-{team}-{engine.fingerprint[:8]}"), plan)
        bench = Bench(engine, chosen, TEAMS[team], temperature, other, _projection(other, engine))
        with _progress() as progress:
            bar = progress.add_task(task)
            run(
                bench, plan, folder,
                run_program=unprotected if unsafe else sandboxed, concurrency=concurrency,
                report=lambda done, of: progress.update(bar, completed=done, total=of),
            )  # fmt: skip
        summary = summarise(folder.path)
    if as_json:
        print_json(summary.to_json())
    else:
        _show(summary)
        result_console().print(f"Results are in {folder.path}; `avp-agents report {folder.path}` draws them.")


def report(run: Annotated[Path, typer.Argument(help="Folder of a run of `avp-agents bench quality`.")]) -> None:
    """Draw a run as one HTML file."""
    from avp_agents.evals.quality.report import write_report

    result_console().print(f"Written: {write_report(run)}", soft_wrap=True)


def _engine(opened: ExitStack, model: str | None, dtype: str, device: str | None) -> LatentEngine:
    from avp_agents.engine.latent_engine import LatentEngine
    from avp_agents.store import MemoryStore

    # batch-invariant, so that an answer does not depend on which others are worked on beside it
    return opened.enter_context(
        LatentEngine.from_pretrained(model, dtype=dtype, device=device, store=MemoryStore(), batch_invariant=True)
    )


def _projection(source: LatentEngine | None, target: LatentEngine) -> Project | None:
    if source is None:
        return None
    return lambda thought: target.crossing.project(source.crossing.express(thought))


def _arms(modes: str, steps: str, method: str, renormalise: str, temperature: str, strategy: str) -> list[Arm]:
    from avp_agents.evals.quality.arms import arms_named

    def optional(text: str, values: dict[str, Any]) -> list[Any]:
        return [_choice(name, values | {"auto": None}) for name in _names(text)]

    return arms_named(
        _names(modes),
        steps=_numbers(steps, int),
        methods=optional(method, {name: name for name in ("soft", "ridge", "rescale")}),
        strategies=[_choice(name, {"replay": "replay", "splice": "splice"}) for name in _names(strategy)],
        renormalise=optional(renormalise, {"yes": True, "no": False}),
        latent_temperatures=_numbers(temperature, float),
    )


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _numbers(text: str, kind: Callable[[str], N]) -> list[N]:
    try:
        return [kind(name) for name in _names(text)]
    except ValueError:
        raise ConfigurationError(f"{text!r} is not a list of numbers such as 0,10,20.") from None


def _choice(name: str, values: dict[str, Any]) -> Any:
    if name not in values:
        raise ConfigurationError(f"{name!r} is none of {', '.join(values)}.")
    return values[name]


def _progress() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=progress_console())


def _show(summary: Summary) -> None:
    from avp_agents.evals.quality.report import verdict

    table = Table("arm", title=f"{summary.about['task']}: {summary.about['model']}")
    for column in ("right", "95 % interval", "read", "latent", "decoded", "bytes", "seconds"):
        table.add_column(column, justify="right")
    for arm in summary.arms:
        low, high = arm.interval
        table.add_row(
            arm.name, f"{arm.right}/{arm.answers}", f"{100 * low:.0f} to {100 * high:.0f} %",
            *(f"{arm.tokens[kind]:.0f}" for kind in ("read", "latent", "decoded")),
            f"{arm.bytes:,.0f}", f"{arm.total_seconds:.1f}",
        )  # fmt: skip
    console = result_console()
    console.print(table)
    for line in _verdicts(summary.comparisons, verdict):
        console.print(line)


def _verdicts(comparisons: Sequence[Any], verdict: Callable[[Any], str]) -> list[str]:
    return [
        f"{c.one} / {c.other}: {c.only_one} to {c.only_other}, p = {c.p:.3f} (Holm {c.p_holm:.3f}): {verdict(c)}; "
        f"{c.same_answers} equal answers"
        for c in comparisons
    ]
