"""What a run is said to show: paired tests, held-out halves, and one page for people."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner
from written_run import write_run

from avp_agents.cli import app
from avp_agents.errors import ConfigurationError
from avp_bench.quality.arms import Arm
from avp_bench.quality.report import write_report
from avp_bench.quality.summary import Summary, summarise
from avp_bench.statistics import holm, mcnemar_p, wilson

BASELINE = Arm("latent", "latent")
BETTER, WORSE = Arm("latent[steps=10]", "latent", steps=10), Arm("latent[steps=80]", "latent", steps=80)


def alternating(first: bool, second: bool, count: int = 40) -> list[bool]:
    """Verdicts on problems that choose and problems that are held out, in turn."""
    return [first, second] * (count // 2)


def variants_of(folder: Path, better: list[bool]) -> Summary:
    """A baseline that solves nothing, and two variants."""
    right = {"latent": [False] * len(better), BETTER.name: better, WORSE.name: [False] * len(better)}
    return summarise(write_run(folder, [BASELINE, BETTER, WORSE], right))


def test_exact_figures() -> None:
    """By hand: 5 against 0 is 2 / 2**5; Holm's smallest of two is doubled; Wilson's interval of 7 of 8."""
    assert mcnemar_p([True] * 5 + [True], [False] * 5 + [True]) == pytest.approx(0.0625)
    assert mcnemar_p([True, False], [False, True]) == 1.0
    assert holm({"a": 0.01, "b": 0.04}) == {"a": 0.02, "b": 0.04}
    assert wilson(7, 8) == (pytest.approx(0.529, abs=1e-3), pytest.approx(0.978, abs=1e-3))
    assert wilson(0, 0) == (0.0, 1.0)


def test_comparisons_are_made_between_modes_of_one_team(tmp_path: Path) -> None:
    arms = [
        Arm("direct", "direct"), Arm("latent", "latent"), BETTER, Arm("text", "text"),
        Arm("latent[team=chain]", "latent", "chain"), Arm("text[team=chain]", "text", "chain"),
    ]  # fmt: skip
    right = {arm.name: [arm.mode == "latent"] * 8 for arm in arms}
    summary = summarise(write_run(tmp_path, arms, right))

    assert [(c.one, c.other) for c in summary.comparisons] == [
        ("latent", "direct"), ("latent", "text"), ("latent[team=chain]", "direct"),
        ("latent[team=chain]", "text[team=chain]"),
    ]  # fmt: skip
    assert all(c.only_one == 8 and c.only_other == 0 and c.p == pytest.approx(2 / 2**8) for c in summary.comparisons)
    assert all(c.p_holm == pytest.approx(4 * c.p) and c.decided for c in summary.comparisons)
    speed = summary.speeds[0]
    assert (speed.ratio, speed.limit) == (pytest.approx(19.9 / 6.7), pytest.approx(19.9 / 5))


@pytest.mark.parametrize(
    ("better", "candidate", "is_better", "words"),
    [
        (alternating(True, True), BETTER.name, True, "is better than latent"),
        (alternating(True, False), BETTER.name, False, "Undecided"),
        (alternating(False, True), None, False, "No variant beats latent"),
        (alternating(True, True, count=8), BETTER.name, False, "Undecided"),
    ],
    ids=["both halves", "lucky choice", "not chosen", "too few problems"],
)
def test_a_default_changes_only_where_the_held_out_half_confirms_it(
    tmp_path: Path, better: list[bool], candidate: str | None, is_better: bool, words: str
) -> None:
    (ablation,) = variants_of(tmp_path, better).ablations

    assert (ablation.candidate, ablation.is_better) == (candidate, is_better)
    assert words in ablation.verdict
    assert sum(ablation.problems) == len(better)


def test_a_run_that_is_none_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="holds no run"):
        summarise(tmp_path)
    write_run(tmp_path, [BASELINE], {"latent": [True]})
    (tmp_path / "answers.jsonl").write_text("")
    with pytest.raises(ConfigurationError, match="no answers yet"):
        summarise(tmp_path)


def test_the_report_fetches_nothing_and_escapes_answers(tmp_path: Path) -> None:
    teams = [
        Arm(f"{mode}[team={team}]", mode, team) for team in ("pair", "chain", "fan-in") for mode in ("latent", "text")
    ]
    steps = [Arm(f"latent[team=pair, steps={n}]", "latent", steps=n) for n in (0, 10, 80)]
    arms = [Arm("direct", "direct"), teams[0], *steps, *teams[1:], Arm("shuffled", "shuffled")]
    write_run(tmp_path, arms, {arm.name: alternating(arm.mode == "latent", True, 12) for arm in arms})
    page = write_report(tmp_path).read_text()

    for title in (
        "Accuracy",
        "Time by phase",
        "Tokens",
        "Accuracy against latent steps",
        "Tokens against the number of agents",
    ):
        assert f"<figcaption>{title}<span>" in page
    assert page.count("<svg") == 5
    fetched = r"""(?:src|href)\s*=\s*["'](?!#)|@import|url\((?!#)|<script|<link|<iframe"""
    assert not re.findall(fetched, page)
    assert "&lt;b&gt;True&lt;/b&gt;" in page
    assert "<b>True</b>" not in page
    assert json.loads((tmp_path / "summary.json").read_text())["about"]["task"] == "invented"


@pytest.mark.usefixtures("smollm2_path")
def test_the_commands(tmp_path: Path) -> None:
    options = ["--problems", "2", "--modes", "latent,shuffled", "--steps", "2,1", "--out", str(tmp_path / "run")]
    done = CliRunner().invoke(app, ["bench", "quality", "comprehension", *options, "--json"])
    assert done.exit_code == 0, done.stderr
    assert [arm["name"] for arm in json.loads(done.stdout)["arms"]] == [
        "latent",
        "latent[steps=1]",
        "shuffled",
    ]

    again = CliRunner().invoke(app, ["bench", "quality", "comprehension", *options])
    assert again.exit_code == 0, again.stderr
    assert "latent / shuffled" in again.stdout
    assert "latent[steps=1]" in again.stdout
    assert CliRunner().invoke(app, ["report", str(tmp_path / "run")]).exit_code == 0
    assert (tmp_path / "run" / "report.html").is_file()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["chess"], "Unknown task 'chess'"),
        (["gsm8k", "--steps", "many"], "not a list of numbers"),
        (["gsm8k", "--kv", "int4"], "'int4' is none of exact, int8"),
        (["gsm8k", "--turn", ","], "Choose from new, same"),
        (["gsm8k", "--data", "nowhere.jsonl"], "no file nowhere.jsonl"),
    ],
)
def test_bad_options_are_named_before_a_model_is_loaded(options: list[str], message: str) -> None:
    done = CliRunner().invoke(app, ["bench", "quality", *options])
    assert done.exit_code == 1
    assert message in done.stderr
