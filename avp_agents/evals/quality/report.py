"""A run as one HTML file that needs no network: what was run, pictures, tables, and what is undecided."""

from __future__ import annotations

from html import escape
from pathlib import Path

from avp_agents.evals.quality.plots import plots
from avp_agents.evals.quality.summary import Comparison, Summary, summarise

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 56rem; margin: 2rem auto; padding: 0 1rem; color: #1c2733; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; }
th, td { text-align: right; padding: .3rem .6rem; border-bottom: 1px solid #dde3ea; }
th:first-child, td:first-child { text-align: left; }
figure { margin: 1.5rem 0; } figure svg { width: 100%; height: auto; }
figcaption, h2 { font-weight: 600; } .note { color: #5a6877; } .decided { font-weight: 600; }
"""


def write_report(folder: Path) -> Path:
    """Write ``report.html`` into a run's folder.

    Returns:
        Its path.

    Raises:
        ConfigurationError: The folder holds no run, or matplotlib is missing.
    """
    file = folder / "report.html"
    file.write_text(report_html(summarise(folder)), encoding="utf-8")
    return file


def report_html(summary: Summary) -> str:
    """The whole page."""
    about = summary.about
    title = f"{about['task']}: {about['model']}"
    figures = "".join(
        f"<figure><figcaption>{escape(name)}</figcaption>{svg}</figure>" for name, svg in plots(summary).items()
    )
    facts = ", ".join(
        f"{name} {escape(str(value))}"
        for name, value in about.items()
        if name not in ("arms", "items", "task", "model")
    )
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(title)}</title><style>{_STYLE}</style>'
        f"<h1>{escape(title)}</h1><p class=note>{len(about['items'])} problems; {facts}</p>"
        f"{figures}<h2>Arms</h2>{_arms(summary)}<h2>Paired comparisons</h2>{_verdicts(summary)}</html>"
    )


def _arms(summary: Summary) -> str:
    head = ("arm", "right", "accuracy", "95 % interval", "read", "latent", "decoded", "bytes", "seconds")
    rows = [
        (
            arm.name, f"{arm.right}/{arm.answers}", f"{100 * arm.accuracy:.1f} %",
            f"{100 * arm.interval[0]:.1f} to {100 * arm.interval[1]:.1f}", f"{arm.tokens['read']:.0f}",
            f"{arm.tokens['latent']:.0f}", f"{arm.tokens['decoded']:.0f}", f"{arm.bytes:,.0f}",
            f"{arm.total_seconds:.1f}",
        )
        for arm in summary.arms
    ]  # fmt: skip
    return _table(head, rows) + (
        "<p class=note>Means of tokens and bytes, medians of seconds, per answer. Tokens that were reused from a "
        "KV-cache do not count as read. Answers were worked on side by side, so seconds are those of a busy engine.</p>"
    )


def _verdicts(summary: Summary) -> str:
    head = ("arms", "only the first", "only the second", "p (McNemar)", "p (Holm)", "equal answers", "verdict")
    rows = [
        (
            f"{c.one} / {c.other}", str(c.only_one), str(c.only_other), f"{c.p:.3f}", f"{c.p_holm:.3f}",
            str(c.same_answers), verdict(c),
        )
        for c in summary.comparisons
    ]  # fmt: skip
    return _table(head, rows) if rows else "<p>There is one arm only.</p>"


def verdict(comparison: Comparison) -> str:
    """Which arm is better, in words; undecided where chance may explain the difference."""
    if not comparison.decided:
        return "undecided"
    return f"{comparison.one if comparison.only_one > comparison.only_other else comparison.other} is better"


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    def line(cells: tuple[str, ...], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    return f"<table>{line(head, 'th')}{''.join(line(row, 'td') for row in rows)}</table>"
