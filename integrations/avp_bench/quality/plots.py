"""Pictures of a run, as SVG text: accuracy, time by phase, tokens, and accuracy against latent steps."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from avp_agents.errors import ConfigurationError
from avp_bench.quality.summary import PHASES, ArmSummary, Summary
from avp_bench.quality.teams import TEAMS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_PHASE_COLOURS = {"prefill": "#9aa8b8", "latent": "#e4934a", "decode": "#4a7fb5"}
_TOKEN_COLOURS = {
    "read": _PHASE_COLOURS["prefill"], "latent": _PHASE_COLOURS["latent"], "decoded": _PHASE_COLOURS["decode"],
}  # fmt: skip
_LINE_COLOURS = ("#e4934a", "#4a7fb5", "#5b9a68", "#9a5b8f", "#7a7a7a", "#b8543f", "#3f8f9a", "#8a7a3f")
_INK = "#2f4b66"


@dataclass(frozen=True)
class Plot:
    """A picture.

    Attributes:
        title: What it shows.
        caption: How to read it.
        svg: The picture.
    """

    title: str
    caption: str
    svg: str


def plots(summary: Summary) -> list[Plot]:
    """All pictures that the run has data for.

    Raises:
        ConfigurationError: matplotlib is not installed.
    """
    curves = [_accuracy(summary), _time(summary), _tokens(summary), _steps(summary), _teams(summary)]
    return [plot for plot in curves if plot is not None]


def _accuracy(summary: Summary) -> Plot:
    figure, axes = _bars(summary.arms)
    for row, arm in enumerate(summary.arms):
        low, high = arm.interval
        axes.plot([100 * low, 100 * high], [row, row], color=_INK, linewidth=2, alpha=0.55, solid_capstyle="butt")
        axes.plot(100 * arm.accuracy, row, "o", color=_INK)
        axes.annotate(f"{arm.right}/{arm.answers}", (100 * high, row), (6, -3), textcoords="offset points", fontsize=9)
    axes.set_xlim(0, 108)
    axes.set_xticks(range(0, 101, 20))
    axes.set_xlabel("right answers, %")
    axes.grid(axis="x", alpha=0.25)
    return Plot(
        "Accuracy", "Dots are shares of right answers, lines are 95 % intervals (Wilson). Intervals that overlap may "
        "still differ: the arms answered the same problems, so what counts are the paired tests below.", _svg(figure),
    )  # fmt: skip


def _time(summary: Summary) -> Plot:
    figure, axes = _bars(summary.arms)
    for row, arm in enumerate(summary.arms):
        left = 0.0
        for who, hatch in (("researchers", "///"), ("solver", "")):
            for phase in PHASES:
                seconds = arm.seconds[who][phase]
                axes.barh(row, seconds, 0.6, left, color=_PHASE_COLOURS[phase], hatch=hatch, edgecolor="white")
                left += seconds
        # the dotted line may pass where the label stands
        behind = {"facecolor": "white", "edgecolor": "none", "pad": 1}
        axes.annotate(f"{left:.1f} s", (left, row), (5, -3), textcoords="offset points", fontsize=9, bbox=behind)
    entries = [*((phase, _PHASE_COLOURS[phase], "") for phase in PHASES), ("researchers", "#c8c8c8", "///")]
    _legend(figure, entries)
    caption = "Hatched: the researchers. Plain: the solver."
    if summary.speeds:
        latent = next(arm for arm in summary.arms if arm.name == summary.speeds[0].latent)
        axes.axvline(latent.seconds["solver"]["decode"], color=_INK, linestyle=":", linewidth=1.4)
        caption += f" Dotted: what decoding {latent.name}'s answer alone takes, the limit of what can be saved."
    axes.set_xlabel("median seconds per answer")
    axes.margins(x=0.14)
    return Plot("Time by phase", caption, _svg(figure))


def _tokens(summary: Summary) -> Plot:
    figure, axes = _bars(summary.arms)
    for row, arm in enumerate(summary.arms):
        left = 0.0
        for kind, colour in _TOKEN_COLOURS.items():
            axes.barh(row, arm.tokens[kind], 0.6, left, color=colour, edgecolor="white")
            left += arm.tokens[kind]
        axes.annotate(f"{left:.0f}", (left, row), (5, -3), textcoords="offset points", fontsize=9)
    _legend(figure, [(kind, colour, "") for kind, colour in _TOKEN_COLOURS.items()])
    axes.set_xlabel("tokens and latent steps per answer")
    axes.margins(x=0.14)
    caption = "Means of all agents together. Reading a token costs far less time than decoding one or a latent step."
    return Plot("Tokens", caption, _svg(figure))


def _steps(summary: Summary) -> Plot | None:
    """Accuracy of latent arms that differ in their steps alone, where a run has several."""
    arms = [arm for arm in summary.arms if arm.mode == "latent" and arm.name in _names_by_steps(summary)]
    teams = dict.fromkeys(arm.team for arm in arms)
    lines = {team: sorted((a for a in arms if a.team == team), key=lambda arm: arm.steps) for team in teams}
    lines = {team: line for team, line in lines.items() if len(line) > 1}
    if not lines:
        return None
    figure, axes = _figure(3.4)
    for (team, line), colour in zip(lines.items(), _LINE_COLOURS, strict=False):
        xs = [arm.steps for arm in line]
        low, high = ([100 * arm.interval[side] for arm in line] for side in (0, 1))
        axes.fill_between(xs, low, high, alpha=0.15, color=colour, linewidth=0)
        axes.plot(xs, [100 * arm.accuracy for arm in line], "o-", color=colour, label=team)
        axes.set_xticks(xs)
    if len(lines) > 1:
        axes.legend(frameon=False, fontsize=9)
    axes.set_xlabel("latent steps per researcher")
    axes.set_ylabel("right answers, %")
    axes.set_ylim(0, 100)
    axes.grid(axis="y", alpha=0.25)
    caption = "The latent arm with other numbers of steps and nothing else changed; bands are 95 % intervals."
    return Plot("Accuracy against latent steps", caption, _svg(figure))


def _names_by_steps(summary: Summary) -> set[str]:
    """Latent arms that differ from their team's baseline in nothing but their steps."""
    ignored = ("name", "team", "steps")
    options = {arm["name"]: {k: v for k, v in arm.items() if k not in ignored} for arm in summary.about["arms"]}
    baselines = {arm.team: arm.name for arm in reversed(summary.arms) if arm.mode == "latent" and arm.is_baseline}
    return {
        arm.name for arm in summary.arms if arm.team in baselines and options[arm.name] == options[baselines[arm.team]]
    }


def _teams(summary: Summary) -> Plot | None:
    """Tokens against the number of agents, where a run has several teams."""
    baselines = [arm for arm in summary.arms if arm.is_baseline and arm.mode != "direct"]
    teams = sorted(dict.fromkeys(arm.team for arm in baselines), key=lambda team: TEAMS[team].agents)
    if len(teams) < 2:
        return None
    figure, axes = _figure(3.4)
    places = {team: place for place, team in enumerate(teams)}
    modes = dict.fromkeys(arm.mode for arm in baselines)
    for mode, colour in zip(modes, _LINE_COLOURS, strict=False):
        line = sorted((places[arm.team], arm.total_tokens) for arm in baselines if arm.mode == mode)
        axes.plot(*zip(*line, strict=True), "o-", color=colour, label=mode)
    axes.set_xticks(range(len(teams)), [f"{TEAMS[team].agents} agents\n{team}" for team in teams])
    axes.set_ylabel("tokens and latent steps")
    axes.set_ylim(bottom=0)
    axes.grid(axis="y", alpha=0.25)
    axes.legend(frameon=False, fontsize=9)
    caption = (
        "Means per answer. Text is decoded once and read by everybody who comes later; a context is not read again."
    )
    return Plot("Tokens against the number of agents", caption, _svg(figure))


def _bars(arms: Sequence[ArmSummary]) -> tuple[Figure, Axes]:
    """Axes with a row per arm."""
    figure, axes = _figure(1.1 + 0.4 * len(arms))
    axes.set_yticks(range(len(arms)), [arm.name for arm in arms])
    axes.set_ylim(len(arms) - 0.4, -0.6)
    return figure, axes


def _figure(height: float) -> tuple[Figure, Axes]:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigurationError("Plots need matplotlib: `pip install avp-agents[evals]`.") from None
    figure = Figure(figsize=(7.6, height), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _legend(figure: Figure, entries: list[tuple[str, str, str]]) -> None:
    from matplotlib.patches import Patch

    patches = [Patch(facecolor=colour, hatch=hatch, edgecolor="white", label=name) for name, colour, hatch in entries]
    figure.legend(handles=patches, fontsize=9, frameon=False, loc="outside upper right", ncols=len(entries))


def _svg(figure: Figure) -> str:
    import matplotlib

    written = io.StringIO()
    # the same picture byte for byte in every run, and text that can be selected
    with matplotlib.rc_context({"svg.hashsalt": "avp-agents", "svg.fonttype": "none", "font.family": "sans-serif"}):
        figure.savefig(written, format="svg", metadata={"Date": None})
    return "<svg" + written.getvalue().partition("<svg")[2]
