"""Teams at work: what each arm hands over, reads and decodes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from short_task import go, items

from avp_agents.errors import ConfigurationError
from avp_bench.quality.answering import Bench
from avp_bench.quality.arms import Arm
from avp_bench.quality.report import report_html
from avp_bench.quality.run_folder import read_lines
from avp_bench.quality.summary import summarise


def rows_of(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Answers by arm."""
    by_arm: dict[str, list[dict[str, Any]]] = {}
    for row in read_lines(folder / "answers.jsonl"):
        by_arm.setdefault(row["arm"], []).append(row)
    return by_arm


def test_every_mode_on_the_default_model(smol_bench: Bench, tmp_path: Path) -> None:
    modes = ("direct", "latent", "text", "prefill", "shuffled", "text-capped")
    go(smol_bench, tmp_path, [Arm(mode, mode, steps=3) for mode in modes], count=2)

    summary = summarise(tmp_path)
    cost = {arm.name: arm.tokens for arm in summary.arms}
    assert cost["latent"]["latent"] == cost["shuffled"]["latent"] == 3
    assert cost["prefill"]["latent"] == cost["text"]["latent"] == 0
    assert cost["text"]["decoded"] > cost["text-capped"]["decoded"] > cost["latent"]["decoded"]
    assert cost["text"]["read"] > cost["direct"]["read"]
    assert {c.one for c in summary.comparisons} == {"latent"}
    assert {c.other for c in summary.comparisons} == set(modes) - {"latent"}
    latent, shuffled = (rows_of(tmp_path)[name] for name in ("latent", "shuffled"))
    assert [row["answer"] for row in latent] != [row["answer"] for row in shuffled]


def test_larger_teams(tiny_bench: Bench, tmp_path: Path) -> None:
    """Four agents each; contexts are not read again, notes are."""
    arms = [Arm(f"{mode} {team}", mode, team, steps=2) for team in ("chain", "fan-in") for mode in ("latent", "text")]
    go(tiny_bench, tmp_path, arms, count=2)

    rows = rows_of(tmp_path)
    assert {row["tokens"]["latent"] for name in ("latent chain", "latent fan-in") for row in rows[name]} == {6}
    assert {row["tokens"]["decoded"] for row in rows["text chain"]} <= set(range(19, 23))
    assert {row["handoff"] for name in rows for row in rows[name]} == {"kv", "text"}
    assert rows["latent chain"][0]["tokens"]["read"] < rows["text chain"][0]["tokens"]["read"]


@pytest.fixture
def thinks(tiny_bench: Bench, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Prompts of the thoughts that the tiny engine was asked for."""
    prompts: list[str] = []
    think = tiny_bench.engine.think

    def counted(prompt: str, **options: Any) -> Any:
        prompts.append(prompt)
        return think(prompt, **options)

    monkeypatch.setattr(tiny_bench.engine, "think", counted)
    return prompts


def test_a_thought_is_made_once(tiny_bench: Bench, tmp_path: Path, thinks: list[str]) -> None:
    """The latent arm, its int8 variant and the shuffled arm of the problem before it share one."""
    bench = Bench(tiny_bench.engine, tiny_bench.task)
    arms = [Arm("latent", "latent"), Arm("latent[kv=int8]", "latent", kv="int8"), Arm("shuffled", "shuffled")]
    go(bench, tmp_path, arms, count=4)

    assert len(thinks) == len(set(thinks)) == 4
    assert {row["tokens"]["latent"] for rows in rows_of(tmp_path).values() for row in rows} == {20}


def test_ways_to_join_share_the_thoughts(tiny_bench: Bench, tmp_path: Path, thinks: list[str]) -> None:
    """Three researchers think once per problem, whatever becomes of their contexts; each arm has its own join."""
    bench = Bench(tiny_bench.engine, tiny_bench.task)
    arms = [Arm("replay", "latent", "fan-in", steps=2), Arm("splice", "latent", "fan-in", steps=2, strategy="splice")]
    go(bench, tmp_path, arms, count=2)

    assert len(thinks) == len(set(thinks)) == 6


def test_a_join_is_made_once(tiny_bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """For all seeds, and for the shuffled arm of the problem before."""
    joins: list[str] = []
    join = tiny_bench.engine.join

    def counted(contexts: Any, *, strategy: Any) -> Any:
        joins.append(strategy)
        return join(contexts, strategy=strategy)

    monkeypatch.setattr(tiny_bench.engine, "join", counted)
    bench, (one, other) = Bench(tiny_bench.engine, tiny_bench.task), items(2)
    latent, shuffled = (Arm(mode, mode, "fan-in", steps=2) for mode in ("latent", "shuffled"))
    for arm, item, seed in ((latent, one, 0), (latent, one, 7), (shuffled, other, 1)):
        bench.answer(arm, item, one, seed)

    assert joins == ["replay"]


def test_thoughts_that_are_joined_as_text_are_put_into_words(smol_bench: Bench, tiny_bench: Bench) -> None:
    """The tiny model says nothing but spaces: its solver gets the question alone."""
    one, other = items(2)
    arm = Arm("text", "latent", "fan-in", steps=2, strategy="text")
    made, silent = smol_bench.answer(arm, one, other, 0), tiny_bench.answer(arm, one, other, 0)

    in_words = [stage for stage in made.stages if stage.role.endswith("in words")]
    assert [stage.usage.latent_steps for stage in made.stages[:3]] == [2, 2, 2]
    assert len(in_words) == 3
    assert all(stage.usage.completion_tokens > 0 and stage.usage.positions_reused > 0 for stage in in_words)
    assert made.handoff.mode == "kv"
    assert silent.handoff.mode == "none"


def test_an_int8_context_takes_bytes_and_no_reading(tiny_bench: Bench, tmp_path: Path) -> None:
    go(tiny_bench, tmp_path, [Arm("exact", "latent", steps=2), Arm("int8", "latent", steps=2, kv="int8")])
    exact, int8 = (rows_of(tmp_path)[name][0] for name in ("exact", "int8"))

    assert exact["bytes"] == 0
    assert int8["bytes"] > 50 * 2 * 32  # positions, keys and values, channels
    assert int8["handoff"] == exact["handoff"] == "kv"
    assert int8["tokens"]["read"] == exact["tokens"]["read"]


def test_the_solver_may_go_on_in_the_thoughts_own_turn(tiny_bench: Bench) -> None:
    one, other = items(2)
    new = tiny_bench.answer(Arm("new", "latent", steps=2), one, other, 0)
    same = tiny_bench.answer(Arm("same", "latent", steps=2, turn="same"), one, other, 0)

    assert new.stages[-1].read > 10
    assert same.stages[-1].read == 0
    assert same.handoff.mode == "kv"


@pytest.mark.parametrize(
    ("arm", "handoff"),
    [
        (Arm("both", "projection", steps=2), "projection"),
        (Arm("vector", "projection", steps=2, projected="vector"), "projection"),
        (Arm("text", "projection", steps=2, projected="text"), "reread"),
        (Arm("three vectors", "projection", "fan-in", steps=2), "projection"),
        (Arm("notes", "text-cross-model"), "text"),
    ],
    ids=lambda value: value.name if isinstance(value, Arm) else "",
)
def test_another_model_thinks(tiny_bench: Bench, arm: Arm, handoff: str) -> None:
    one, other = items(2)
    answer = tiny_bench.answer(arm, one, other, 0)
    alone = tiny_bench.answer(Arm("direct", "direct"), one, other, 0)

    assert answer.handoff.mode == handoff
    assert answer.handoff.bytes > 20
    read, read_alone = answer.stages[-1].read, alone.stages[-1].read
    assert read > read_alone
    if arm.name == "vector":
        assert read < read_alone + 60, "the source's question is not read again"


def test_several_seeds_count_as_one_problem(tiny_bench: Bench, tmp_path: Path) -> None:
    bench = Bench(tiny_bench.engine, tiny_bench.task, temperature=0.7)
    go(bench, tmp_path, [Arm("direct", "direct"), Arm("latent", "latent", steps=2)], seeds=(0, 1))

    summary = summarise(tmp_path)
    assert [arm.answers for arm in summary.arms] == [6, 6]
    (low, high), scores = summary.arms[0].interval, summary.verdicts["direct"]
    assert len(scores) == 3
    assert high - low > 0.5, "an interval of three problems, not of six answers"
    by_seed = {seed: [row["answer"] for row in rows_of(tmp_path)["direct"] if row["seed"] == seed] for seed in (0, 1)}
    assert by_seed[0] != by_seed[1]


def test_runs_that_could_show_nothing_are_refused(tiny_bench: Bench, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="all seeds give the same answers"):
        go(tiny_bench, tmp_path / "seeds", [Arm("direct", "direct")], seeds=(0, 1))
    with pytest.raises(ConfigurationError, match="at least two problems"):
        go(tiny_bench, tmp_path / "one", [Arm("shuffled", "shuffled")], count=1)
    with pytest.raises(ConfigurationError, match="pass --source"):
        go(Bench(tiny_bench.engine, tiny_bench.task), tmp_path / "alone", [Arm("projection", "projection")])


def test_the_report_of_a_run_holds_its_answers(tiny_bench: Bench, tmp_path: Path) -> None:
    go(tiny_bench, tmp_path, [Arm("direct", "direct")], count=2)
    rows = read_lines(tmp_path / "answers.jsonl")
    page = report_html(summarise(tmp_path), rows)

    assert json.loads((tmp_path / "run.json").read_text())["items"] == ["0", "1"]
    assert all(f"{row['item']}: {int(row['right'])} of 1 right" in page for row in rows)
