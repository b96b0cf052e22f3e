"""Chains of agents: what they compute grows linearly with contexts, quadratically with text."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest
from typer.testing import CliRunner

from avp_agents import LatentEngine, MemoryStore, Namespace
from avp_agents.cli import app
from avp_agents.errors import ConfigurationError
from avp_bench import chain


@pytest.fixture(scope="module")
def costs(smollm2_path: Path) -> list[chain.ChainCost]:
    store = MemoryStore(namespace=Namespace("chain-tests", b"k" * 32))
    with LatentEngine.from_pretrained(str(smollm2_path), dtype="float32", device="cpu", store=store) as engine:
        return chain.run(engine, 4, steps=2, tokens=3, report=lambda line: None)


def second_differences(values: list[int]) -> list[int]:
    steps = [after - before for before, after in pairwise(values)]
    return [after - before for before, after in pairwise(steps)]


def test_positions_computed(costs: list[chain.ChainCost]) -> None:
    """Each agent more costs the same with contexts (its prompt and steps), and more than the one before with text."""
    [latent], [text] = (second_differences([getattr(cost, name) for cost in costs]) for name in ("latent", "text"))

    assert abs(latent) <= 3  # system prompts differ in length by some tokens
    assert text >= 3 + 3


def test_tokens_decoded(costs: list[chain.ChainCost]) -> None:
    assert [cost.latent_decoded for cost in costs] == [3, 3, 3]
    assert [cost.text_decoded for cost in costs] == [6, 9, 12]


@pytest.mark.parametrize("ending", [".svg", ".png"])
def test_the_plot(costs: list[chain.ChainCost], tmp_path: Path, ending: str) -> None:
    file = tmp_path / f"chain{ending}"
    chain.save_plot(costs, file)

    assert file.stat().st_size > 5_000
    with pytest.raises(ConfigurationError, match="Cannot draw"):
        chain.save_plot(costs, tmp_path / "chain.xyz")


def test_there_are_eight_roles() -> None:
    for agents in (1, 9):
        with pytest.raises(ConfigurationError, match="2 to 8 agents"):
            chain.run(None, agents, steps=1, tokens=1, report=print)  # pyright: ignore[reportArgumentType]


def test_the_command_prints_json(costs: list[chain.ChainCost], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chain, "run", lambda *args, **options: costs)
    result = CliRunner().invoke(app, ["bench", "chain", "--agents", "4", "--json"])

    assert [row["agents"] for row in json.loads(result.stdout)["chains"]] == [2, 3, 4]
