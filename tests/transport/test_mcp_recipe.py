"""The recipe over MCP runs; on a tiny model, so its answers mean nothing."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest
from serving import free_port
from tiny_models import TinyModels

pytest.importorskip("mcp_types", reason='version 2 of mcp is not installed: pip install "avp-agents[mcp]"')

RECIPE = Path(__file__).parents[2] / "recipes" / "mcp_researcher_solver.py"


def test_a_researcher_and_a_solver_in_two_processes(
    models: TinyModels, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every mode crosses; a server that knows nothing of contexts is read as text."""
    ports = ["--port", str(free_port()), "--notes-port", str(free_port())]
    monkeypatch.setattr(sys, "argv", ["recipe", "--model", models.path("llama"), *ports])
    runpy.run_path(str(RECIPE), run_name="__main__")
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if "wrong:" in line or "right:" in line]
    assert [row[:2] for row in rows[1:4]] == [["kv", "kv"], ["replay", "replay"], ["text", "text"]]
    assert (rows[0][0], rows[0][1] in ("kv", "replay")) == ("handshake", True)
    assert rows[4][:3] == ["plain", "MCP", "text"]
