"""The recipe of two A2A agents runs; on a tiny model, so its answers mean nothing."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest
from serving import free_port
from tiny_models import TinyModels

pytest.importorskip("a2a", reason='a2a-sdk is not installed: pip install "avp-agents[a2a]"')

RECIPE = Path(__file__).parents[2] / "recipes" / "a2a_researcher_solver.py"


def test_two_agents_in_two_processes(
    models: TinyModels, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thought crosses raw and by URL; an agent that announces nothing gets text."""
    ports = ["--port", str(free_port()), "--frames-port", str(free_port())]
    monkeypatch.setattr(sys, "argv", ["recipe", "--model", models.path("llama"), *ports])
    runpy.run_path(str(RECIPE), run_name="__main__")
    rows = [line.split()[:2] for line in capsys.readouterr().out.splitlines() if "wrong:" in line or "right:" in line]
    assert rows[0] == ["raw", "replay"]
    assert (rows[1][0], rows[1][1] in ("kv", "replay")) == ("url", True)
    assert rows[2] == ["none", "text"]
