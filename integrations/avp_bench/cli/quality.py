"""``avp-agents bench quality`` and ``avp-agents report``: are answers on a handed-over context as good?"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer
from rich import box
from rich.markup import escape
from rich.table import Table

from avp_agents.cli.console import print_json, progress_console, result_console
from avp_agents.errors import ConfigurationError
from avp_bench.cli.options import Dtype, Model, Problems, counting

if TYPE_CHECKING:
    from avp_agents.engine.latent_engine import LatentEngine
    from avp_bench.quality.summary import Summary

N = TypeVar("N", int, float)
VARIED = "Options that vary (several values make an arm each)"


def bench_quality(
    task: Annotated[str, typer.Argument(help="humaneval, gsm8k, math, debugbench, hotpotqa or comprehension.")],
    model: Model = None,
    source: Annotated[str | None, typer.Option(help="The researchers' model in cross-model modes.")] = None,
    modes: Annotated[
        str,
        typer.Option(help="direct, latent, text, prefill, shuffled, text-capped, projection, text-cross-model."),
    ] = "direct,latent,text,prefill,shuffled",
    team: Annotated[str, typer.Option(help="pair, chain, fan-in; several make arms of each mode in each.")] = "pair",
    data: Annotated[Path | None, typer.Option(help="A local copy of the task, as JSON lines.")] = None,
    problems: Problems = None,
    seeds: Annotated[str, typer.Option(help="Several need a temperature.")] = "0",
    temperature: Annotated[float, typer.Option(min=0, help="Of everything that is decoded.")] = 0.0,
    steps: Annotated[str, typer.Option(help="Latent steps, e.g. 20,0,5,10,40,80.", rich_help_panel=VARIED)] = "20",
    method: Annotated[str, typer.Option(help="auto, soft, ridge, rescale.", rich_help_panel=VARIED)] = "auto",
    renormalise: Annotated[
        str,
        typer.Option(help="Latent embeddings get the embeddings' mean norm: auto, yes, no.", rich_help_panel=VARIED),
    ] = "auto",
    latent_temperature: Annotated[str, typer.Option(help="Of soft latent steps.", rich_help_panel=VARIED)] = "1",
    turn: Annotated[
        str, typer.Option(help="The solver gets a new turn, or goes on in the same one.", rich_help_panel=VARIED)
    ] = "new",
    kv: Annotated[
        str, typer.Option(help="KV-cache that is handed over: exact, int8.", rich_help_panel=VARIED)
    ] = "exact",
    projected: Annotated[
        str, typer.Option(help="What crosses between models: both, vector, text.", rich_help_panel=VARIED)
    ] = "both",
    strategy: Annotated[
        str, typer.Option(help="How fan-in's researchers are joined: replay, splice, text.", rich_help_panel=VARIED)
    ] = "replay",
    dtype: Dtype = "bfloat16",
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ...")] = None,
    concurrency: Annotated[int, typer.Option(min=1, help="Answers worked on at once; 1 to compare seconds.")] = 32,
    out: Annotated[Path | None, typer.Option(help="Folder of the run; a run that is there is resumed.")] = None,
    unsafe: Annotated[bool, typer.Option("--unsafe", help="Run generated code without a sandbox.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the summary as JSON.")] = False,
) -> None:
    """Answer a task's problems with every mode, paired, and say which is better and what it took.

    Lists are comma-separated. Of options that vary, the first value is the baseline's; each further one makes an arm
    that differs from it in that alone, and half of the problems are held out to decide whether it is better.
    """
    with contextlib.redirect_stdout(sys.stderr), ExitStack() as opened:
        from avp_bench.quality.answering import Bench
        from avp_bench.quality.arms import arms_named
        from avp_bench.quality.run import run
        from avp_bench.quality.run_folder import Plan, RunFolder
        from avp_bench.quality.summary import summarise
        from avp_bench.quality.tasks import task_named
        from avp_bench.sandbox import check_sandbox, sandboxed, unprotected

        chosen = task_named(task)
        options = {
            "steps": _numbers(steps, int),
            "method": _choices(method, {"auto": None, "soft": "soft", "ridge": "ridge", "rescale": "rescale"}),
            "renormalise": _choices(renormalise, {"auto": None, "yes": True, "no": False}),
            "latent_temperature": _numbers(latent_temperature, float),
            "turn": _choices(turn, ["new", "same"]),
            "kv": _choices(kv, ["exact", "int8"]),
            "projected": _choices(projected, ["both", "vector", "text"]),
            "strategy": _choices(strategy, ["replay", "splice", "text"]),
        }
        arms = arms_named(_names(modes), _names(team), options)
        if chosen.runs_code and not unsafe:
            check_sandbox()
        items = chosen.load(data, problems)
        with progress_console().status("Loading the model"):
            engine = _engine(opened, model, dtype, device, concurrency)
            other = _engine(opened, source, dtype, device, concurrency) if source is not None else None
            about = {
                "task": task, "model": Path(engine.model_path).name, "fingerprint": engine.fingerprint,
                "dtype": engine.dtype, "device": str(engine.device), "temperature": temperature,
                "concurrency": concurrency,
                "source": Path(other.model_path).name if other is not None else None,
                "source_fingerprint": other.fingerprint if other is not None else None,
            }  # fmt: skip
        plan = Plan(arms, items, _numbers(seeds, int), about)
        folder = RunFolder(out or Path("runs", f"{task}-{'-'.join(_names(team))}-{engine.fingerprint[:8]}"), plan)
        bench = Bench(engine, chosen, temperature, other)
        with counting(task) as report:
            run_program = unprotected if unsafe else sandboxed
            run(bench, plan, folder, run_program=run_program, concurrency=concurrency, report=report)
        summary = summarise(folder.path)
    if as_json:
        print_json(summary.to_json())
    else:
        _show(summary)
        result_console().print(f"Results are in {folder.path}; `avp-agents report {folder.path}` draws them.")


def report(run: Annotated[Path, typer.Argument(help="Folder of a run of `avp-agents bench quality`.")]) -> None:
    """Draw a run as one HTML file."""
    from avp_bench.quality.report import write_report

    result_console().print(f"Written: {write_report(run)}", soft_wrap=True)


def _engine(opened: ExitStack, model: str | None, dtype: str, device: str | None, concurrency: int) -> LatentEngine:
    from avp_agents.engine.latent_engine import LatentEngine
    from avp_agents.store import MemoryStore

    # batch-invariant, so that an answer does not depend on which others are worked on beside it
    engine = LatentEngine.from_pretrained(
        model, dtype=dtype, device=device, store=MemoryStore(), batch_invariant=True, max_batch=concurrency
    )
    return opened.enter_context(engine)


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _numbers(text: str, kind: Callable[[str], N]) -> list[N]:
    try:
        numbers = [kind(name) for name in _names(text)]
    except ValueError:
        numbers = []
    if not numbers:
        raise ConfigurationError(f"{text!r} is not a list of numbers such as 0,10,20.")
    return numbers


def _choices(text: str, allowed: Sequence[str] | dict[str, Any]) -> list[Any]:
    """What the names stand for; by default themselves."""
    names, values = _names(text), allowed if isinstance(allowed, dict) else {name: name for name in allowed}
    if unknown := [name for name in names if name not in values]:
        raise ConfigurationError(f"{unknown[0]!r} is none of {', '.join(values)}.")
    if not names:
        raise ConfigurationError(f"Choose from {', '.join(values)}.")
    return [values[name] for name in names]


def _show(summary: Summary) -> None:
    from avp_bench.quality.report import p_shown, verdict

    title = f"{summary.about['task']}: {summary.about['model']}"
    # narrow enough for 80 columns; where an arm's name is long, it is the name that wraps
    table = Table(title=title, box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("arm", overflow="fold")
    for column in ("right", "95 %", "read", "latent", "decoded", "bytes", "seconds"):
        table.add_column(column, justify="right", no_wrap=True)
    for arm in summary.arms:
        low, high = arm.interval
        table.add_row(
            escape(arm.name), f"{arm.right}/{arm.answers}", f"{100 * low:.0f} to {100 * high:.0f} %",
            *(f"{arm.tokens[kind]:.0f}" for kind in ("read", "latent", "decoded")),
            f"{arm.bytes:,.0f}", f"{arm.total_seconds:.1f}",
        )  # fmt: skip
    console = result_console()
    console.print(table)
    for c in summary.comparisons:
        console.print(
            f"{c.one} / {c.other}: {c.only_one} to {c.only_other}, {p_shown(c.p_holm)}: {verdict(c)}; "
            f"{c.same_answers} of {c.pairs} answers are equal",
            markup=False,
        )
    for speed in summary.speeds:
        console.print(
            f"{speed.text} took {speed.ratio:.1f} times as long as {speed.latent}; {speed.limit:.1f} is the limit that "
            "the answer's own decoding sets",
            markup=False,
        )
    for ablation in summary.ablations:
        console.print(ablation.verdict, markup=False)
