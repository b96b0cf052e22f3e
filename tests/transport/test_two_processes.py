"""The recipe of two processes runs; on a tiny model, so its answers mean nothing."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
from serving import free_port
from tiny_models import TinyModels

RECIPE = Path(__file__).parents[2] / "recipes" / "two_processes.py"


def test_a_researcher_and_a_solver_in_two_processes(models: TinyModels, capsys: pytest.CaptureFixture[str]) -> None:
    """Every mode crosses; the handshake's choice is in the table, too."""
    recipe = runpy.run_path(str(RECIPE))
    compare = recipe["compare"]
    compare.__globals__["REPORT"] = "the quick brown fox jumps over the lazy dog"
    rows = compare(models.path("llama"), models.path("llama"), free_port())
    assert [row.mode for row in rows[:4]] == ["kv", "replay", "projection", "text"]
    kv, replay, *_ = rows
    assert replay.bytes < kv.bytes
    assert kv.answer == replay.answer
    assert [(row.link, row.asked) for row in rows[4:]] == [("loopback", "handshake"), ("10 Mbit/s", "handshake")]
    recipe["show"](rows)
    assert "of the bytes that kv moves" in capsys.readouterr().out
