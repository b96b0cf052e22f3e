"""A run as one HTML file that needs no network: what came out, pictures, tables, and every answer."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from avp_bench.quality.ablation import Ablation
from avp_bench.quality.plots import plots
from avp_bench.quality.run_folder import read_lines
from avp_bench.quality.summary import ArmComparison, Summary, summarise

_STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.55 system-ui, "DejaVu Sans", sans-serif; max-width: 60rem; margin: 2.5rem auto; padding: 0 1.2rem;
  color: #1c2733; background: #fff; }
h1 { font-size: 1.7rem; margin-bottom: .2rem; } h2 { font-size: 1.2rem; margin: 2.4rem 0 .4rem; }
table { border-collapse: collapse; width: 100%; font-size: .88rem; font-variant-numeric: tabular-nums; }
th { font-weight: 600; border-bottom: 2px solid #b9c4d0; vertical-align: bottom; }
th, td { text-align: right; padding: .35rem .55rem; } td { border-bottom: 1px solid #e3e8ee; }
th:first-child, td:first-child { text-align: left; } td:first-child { white-space: nowrap; }
code { white-space: nowrap; } .wide { overflow-x: auto; } .note, .facts { color: #5a6877; font-size: .9rem; }
.findings li { margin: .25rem 0; } .decided { font-weight: 600; }
figure { margin: 1.8rem 0; } figure svg { width: 100%; height: auto; } figcaption { font-weight: 600; }
figcaption span { display: block; font-weight: 400; color: #5a6877; font-size: .9rem; }
.grid { display: flex; flex-wrap: wrap; gap: 2px; align-items: center; }
table.squares td:first-child { width: 1%; }
.grid i { width: .7rem; height: .7rem; border-radius: 2px; background: #e4934a; }
.grid i.right { background: #5b9a68; } .grid i.some { background: #cdbb6a; }
.legend i { display: inline-block; width: .7rem; height: .7rem; border-radius: 2px; margin: 0 .3rem 0 .8rem; }
details { border-bottom: 1px solid #e3e8ee; padding: .3rem 0; } summary { cursor: pointer; }
pre { background: #f5f7f9; padding: .7rem; border-radius: 4px; overflow-x: auto; white-space: pre-wrap;
  font-size: .82rem; }
"""
_FACTS = {
    "dtype": "dtype", "device": "device", "temperature": "temperature", "seeds": "seeds", "source": "second model",
    "fingerprint": "weights",
}  # fmt: skip


def write_report(folder: Path) -> Path:
    """Write ``report.html`` and ``summary.json`` into a run's folder.

    Returns:
        The page's path.

    Raises:
        ConfigurationError: The folder holds no run, or matplotlib is missing.
    """
    summary = summarise(folder)
    page = report_html(summary, read_lines(folder / "answers.jsonl"))
    (folder / "summary.json").write_text(json.dumps(summary.to_json(), indent=1, ensure_ascii=False), encoding="utf-8")
    file = folder / "report.html"
    file.write_text(page, encoding="utf-8")
    return file


def report_html(summary: Summary, answers: Iterable[dict[str, object]]) -> str:
    """The whole page.

    Args:
        summary: The run.
        answers: Rows of ``answers.jsonl``.
    """
    title = f"{summary.about['task']}, answered by {summary.about['model']}"
    pictures = "".join(
        f"<figure><figcaption>{escape(plot.title)}<span>{escape(plot.caption)}</span></figcaption>{plot.svg}</figure>"
        for plot in plots(summary)
    )
    sections = {
        "What came out": _findings(summary) + pictures,
        "Arms": _arms(summary),
        "Paired comparisons": _comparisons(summary),
        "Variants": "".join(map(_ablation, summary.ablations)),
        "Problem by problem": _grid(summary),
        "Answers": _answers(summary, answers),
    }
    body = "".join(f"<h2>{escape(name)}</h2>{content}" for name, content in sections.items() if content)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width"><title>'
        f"{escape(title)}</title><style>{_STYLE}</style></head><body><h1>{escape(title)}</h1>{_facts(summary)}{body}"
        "</body></html>"
    )


def verdict(comparison: ArmComparison) -> str:
    """Which arm is better, in words; undecided where chance may explain the difference."""
    if not comparison.decided:
        return "undecided"
    return f"{comparison.one if comparison.only_one > comparison.only_other else comparison.other} is better"


def figure(p: float) -> str:
    """A p value, three digits."""
    return "< 0.001" if p < 0.0005 else f"{p:.3f}"


def p_shown(p: float) -> str:
    """A p value within a sentence."""
    return f"p {figure(p)}" if p < 0.0005 else f"p = {figure(p)}"


def _facts(summary: Summary) -> str:
    about = summary.about
    shown = [f"{name} {_shown(about[key])}" for key, name in _FACTS.items() if about.get(key) not in (None, "")]
    return f"<p class=facts>{len(about['items'])} problems; {escape('; '.join(shown))}</p>"


def _shown(value: object) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return value[:12] if isinstance(value, str) else str(value)


def _findings(summary: Summary) -> str:
    """The questions of a run and what it says to each, in words."""
    lines: list[str] = []
    for c in summary.comparisons:
        figures = f"solved by the first alone {c.only_one}, by the second alone {c.only_other}; {p_shown(c.p_holm)}"
        lines.append(f"<b>{escape(c.one)} or {escape(c.other)}</b>: {escape(verdict(c))} ({escape(figures)}).")
        if c.other.startswith("shuffled"):
            lines.append(
                f"<b>Does the context carry anything?</b> With another problem's context {c.pairs - c.same_answers} of "
                f"{c.pairs} answers read differently."
            )
    lines += [
        f"<b>Time</b>: {escape(s.text)} took {s.ratio:.1f} times as long as {escape(s.latent)}; the decoding of the "
        f"answer alone sets the limit, {s.limit:.1f} times."
        for s in summary.speeds
    ]
    lines += [f"<b>Variants</b>: {escape(ablation.verdict)}" for ablation in summary.ablations]
    return f"<ul class=findings>{''.join(f'<li>{line}</li>' for line in lines)}</ul>" if lines else ""


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
        "<p class=note>Means of tokens and bytes, medians of seconds, per answer. Bytes are what had to move from the "
        "researchers to the solver: 0 where a context was handed over by reference, within one process. Answers were "
        "worked on side by side unless the run had <code>--concurrency 1</code>, so seconds are those of a busy "
        "engine.</p>"
    )


def _comparisons(summary: Summary) -> str:
    head = ("arms", "only the first", "only the second", "p (McNemar)", "p (Holm)", "equal answers", "verdict")
    rows = [
        (
            f"{c.one} / {c.other}", str(c.only_one), str(c.only_other), figure(c.p), figure(c.p_holm),
            f"{c.same_answers}/{c.pairs}", verdict(c),
        )
        for c in summary.comparisons
    ]  # fmt: skip
    if not rows:
        return ""
    return _table(head, rows) + (
        "<p class=note>Problems that one arm alone solved, and how likely so uneven a split is by chance. Undecided "
        "means just that: not that the arms are equal.</p>"
    )


def _ablation(ablation: Ablation) -> str:
    choosing, held_out = ablation.problems
    head = (
        f"instead of {ablation.baseline}", f"right, of {choosing} that choose", "baseline",
        f"right, of {held_out} held out", "baseline", "p (McNemar)", "p (Holm)",
    )  # fmt: skip
    rows = [
        (
            v.name, f"{v.choosing[0]:g}", f"{v.choosing[1]:g}", f"{v.held_out[0]:g}", f"{v.held_out[1]:g}",
            figure(v.p), figure(v.p_holm),
        )
        for v in ablation.variants
    ]  # fmt: skip
    return f"{_table(head, rows)}<p class=note>{escape(ablation.verdict)}</p>"


def _grid(summary: Summary) -> str:
    """A square per arm and problem."""
    items = summary.about["items"]
    rows: list[str] = []
    for arm in summary.arms:
        scores = summary.verdicts[arm.name]
        squares = "".join(
            f'<i class="{"right" if scores[item] == 1 else "some" if scores[item] else "wrong"}" '
            f'title="{escape(str(item), quote=True)}"></i>'
            for item in items
            if item in scores
        )
        rows.append(f"<tr><td>{escape(arm.name)}</td><td><div class=grid>{squares}</div></td></tr>")
    legend = (
        '<p class="note legend"><i style="background:#5b9a68"></i>right<i style="background:#e4934a"></i>wrong'
        '<i style="background:#cdbb6a"></i>right with some seeds; the problems stand in the same order in every row</p>'
    )
    return f"<table class=squares>{''.join(rows)}</table>{legend}"


def _answers(summary: Summary, answers: Iterable[dict[str, object]]) -> str:
    by_item: dict[object, list[dict[str, object]]] = {item: [] for item in summary.about["items"]}
    for row in answers:
        by_item[row["item"]].append(row)
    return "".join(
        f"<details><summary>{escape(f'{item}: {_outcome(rows)}')}</summary>{''.join(map(_answer, rows))}</details>"
        for item, rows in by_item.items()
        if rows
    )


def _outcome(rows: Sequence[dict[str, object]]) -> str:
    right = sum(bool(row["right"]) for row in rows)
    return f"{right} of {len(rows)} right"


def _answer(row: dict[str, object]) -> str:
    head = f"{row['arm']}, seed {row['seed']}: {'right' if row['right'] else 'wrong'} ({row['finish_reason']})"
    return f"<p class=note>{escape(head)}</p><pre>{escape(str(row['answer']))}</pre>"


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    def line(cells: tuple[str, ...], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    return f"<div class=wide><table>{line(head, 'th')}{''.join(line(row, 'td') for row in rows)}</table></div>"
