"""Pictures of a run, as SVG text: accuracy, time by phase, tokens, and accuracy against latent steps."""

from __future__ import annotations

import io
import re
from typing import TYPE_CHECKING

from avp_agents.errors import ConfigurationError
from avp_agents.evals.quality.summary import PHASES, Summary

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_PHASE_COLOURS = {"prefill": "#9aa8b8", "latent": "#e4934a", "decode": "#4a7fb5"}
_DOT = "#2f4b66"


def plots(summary: Summary) -> dict[str, str]:
    """SVG text by title.

    Raises:
        ConfigurationError: matplotlib is not installed.
    """
    drawn = {
        "Accuracy, with 95 % intervals": _accuracy(summary),
        "Median seconds per answer, by phase": _time(summary),
        "Mean tokens per answer": _tokens(summary),
    }
    if (curve := _steps(summary)) is not None:
        drawn["Accuracy against latent steps"] = curve
    return drawn


def _accuracy(summary: Summary) -> str:
    figure, axes = _bars(len(summary.arms))
    for row, arm in enumerate(summary.arms):
        low, high = arm.interval
        axes.plot([100 * low, 100 * high], [row, row], color=_DOT, linewidth=2)
        axes.plot(100 * arm.accuracy, row, "o", color=_DOT)
        axes.annotate(f"{arm.right}/{arm.answers}", (100 * high, row), (6, -3), textcoords="offset points", fontsize=8)
    _name_rows(axes, summary)
    axes.set_xlim(0, 105)
    axes.set_xlabel("right answers, %")
    return _svg(figure)


def _time(summary: Summary) -> str:
    figure, axes = _bars(len(summary.arms))
    for row, arm in enumerate(summary.arms):
        left = 0.0
        for who, hatch in (("researchers", "//"), ("solver", "")):
            for phase in PHASES:
                seconds = arm.seconds[who][phase]
                axes.barh(row, seconds, 0.6, left, color=_PHASE_COLOURS[phase], hatch=hatch, edgecolor="white")
                left += seconds
        axes.annotate(f"{left:.1f} s", (left, row), (5, -3), textcoords="offset points", fontsize=8)
    _name_rows(axes, summary)
    _legend(axes, [*((phase, _PHASE_COLOURS[phase], "") for phase in PHASES), ("researchers", "#dddddd", "//")])
    axes.set_xlabel("seconds")
    axes.margins(x=0.12)
    return _svg(figure)


def _tokens(summary: Summary) -> str:
    figure, axes = _bars(len(summary.arms))
    kinds = (("read", "prefill"), ("latent", "latent"), ("decoded", "decode"))
    for row, arm in enumerate(summary.arms):
        left = 0.0
        for kind, phase in kinds:
            axes.barh(row, arm.tokens[kind], 0.6, left, color=_PHASE_COLOURS[phase], edgecolor="white")
            left += arm.tokens[kind]
    _name_rows(axes, summary)
    _legend(axes, [(kind, _PHASE_COLOURS[phase], "") for kind, phase in kinds])
    axes.set_xlabel("tokens and latent steps")
    return _svg(figure)


def _steps(summary: Summary) -> str | None:
    """Accuracy of latent arms by their number of steps, where a run has several."""
    steps = {
        arm["name"]: arm["steps"] for arm in summary.about["arms"] if re.match(r"latent\[steps=\d+\]$", arm["name"])
    }
    arms = sorted((arm for arm in summary.arms if arm.name in steps), key=lambda arm: steps[arm.name])
    if len(arms) < 2:
        return None
    figure, axes = _figure(3.2)
    xs = [steps[arm.name] for arm in arms]
    axes.fill_between(xs, [100 * a.interval[0] for a in arms], [100 * a.interval[1] for a in arms], alpha=0.2)
    axes.plot(xs, [100 * arm.accuracy for arm in arms], "o-", color=_DOT)
    axes.set_xlabel("latent steps")
    axes.set_ylabel("right answers, %")
    axes.set_ylim(0, 100)
    return _svg(figure)


def _bars(rows: int):
    return _figure(0.9 + 0.42 * rows)


def _figure(height: float):
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigurationError("Plots need matplotlib: `pip install avp-agents[evals]`.") from None
    figure = Figure(figsize=(7.2, height), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _name_rows(axes, summary: Summary) -> None:
    axes.set_yticks(range(len(summary.arms)), [arm.name for arm in summary.arms])
    axes.invert_yaxis()


def _legend(axes, entries: list[tuple[str, str, str]]) -> None:
    from matplotlib.patches import Patch

    patches = [Patch(facecolor=colour, hatch=hatch, edgecolor="white", label=name) for name, colour, hatch in entries]
    axes.legend(handles=patches, fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(0, -0.22), ncols=4)


def _svg(figure: Figure) -> str:
    written = io.StringIO()
    figure.savefig(written, format="svg", metadata={"Date": None})
    return written.getvalue().partition("<svg")[1] + written.getvalue().partition("<svg")[2]
