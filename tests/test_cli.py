"""The command line: what it prints for people and for machines, and how it ends."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from avp_agents import __version__
from avp_agents.cli import app, checks
from avp_agents.demo import AgentRun, Comparison, GraphRun
from avp_agents.errors import EngineBusyError

runner = CliRunner()
command_line = importlib.import_module("avp_agents.cli.app")
QUICK = ("--steps", "3", "--max-tokens", "6", "--researcher-tokens", "12", "--question", "What is 3 * 4?")


def run_command(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """The installed command, in a process of its own."""
    command = [str(Path(sys.executable).parent / "avp-agents"), *arguments]
    env = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(command, capture_output=True, text=True, timeout=280, check=False, env=env)


class TestUsage:
    def test_help_names_every_command(self) -> None:
        result = runner.invoke(app, ["--help"])

        assert result.exit_code == 0
        for command in ("demo", "doctor"):
            assert command in result.stdout

    def test_the_benches_are_mounted(self) -> None:
        result = runner.invoke(app, ["bench", "--help"])

        assert result.exit_code == 0
        assert "quality" in result.stdout

    def test_without_the_benches_it_says_what_to_install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(command_line, "entry_points", lambda group: ())
        core = command_line.make_app()
        shown, refused = runner.invoke(core, ["--help"]), runner.invoke(core, ["bench", "engine", "--repeats", "1"])

        assert all(command in shown.stdout for command in ("demo", "doctor", "serve", "inspect", "size"))
        assert refused.exit_code == 1
        assert 'pip install "avp-agents[evals]"' in refused.stderr

    def test_version(self) -> None:
        assert runner.invoke(app, ["--version"]).stdout.strip() == __version__

    def test_help_does_not_import_torch(self) -> None:
        code = "import sys\nfrom avp_agents.cli import app\nassert 'torch' not in sys.modules"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)

        assert done.returncode == 0, done.stderr

    @pytest.mark.parametrize(
        "arguments",
        [
            ["demo", "--steps", "0"],
            ["demo", "--max-tokens", "-1"],
            ["demo", "--researcher-tokens", "many"],
            ["demo", "--question", "  "],
            ["demo", "--colour"],
            ["demonstrate"],
        ],
    )
    def test_bad_usage_exits_with_2_and_prints_no_result(self, arguments: list[str]) -> None:
        result = runner.invoke(app, arguments)

        assert result.exit_code == 2
        assert result.stdout == ""
        assert result.stderr


@pytest.mark.usefixtures("smollm2_path")
class TestDemo:
    def test_json_is_all_that_stands_on_stdout(self) -> None:
        done = run_command("demo", "--json", *QUICK)

        assert done.returncode == 0, done.stderr
        result = json.loads(done.stdout)
        assert set(result) == {"latent", "text", "ratio"}
        figures = {"seconds", "tokens_decoded", "positions_reused", "bytes_handed_over", "mode", "answer"}
        assert set(result["latent"]) == set(result["text"]) == figures
        latent, text = result["latent"], result["text"]
        assert (latent["mode"], text["mode"]) == ("kv", "text")
        assert 1 <= latent["tokens_decoded"] <= 6 < text["tokens_decoded"] <= 18
        assert latent["positions_reused"] > 20
        assert 0 < latent["bytes_handed_over"] < 300
        assert latent["answer"]
        assert text["answer"]
        assert result["ratio"] == pytest.approx(text["seconds"] / latent["seconds"], rel=0.01)

    def test_tables_show_each_agent_of_both_graphs(self) -> None:
        done = run_command("demo", *QUICK)

        assert done.returncode == 0, done.stderr
        assert "researcher ──kv──▶ solver" in done.stdout
        assert "researcher ──text──▶ solver" in done.stdout
        assert "text / latent =" in done.stdout

    def test_a_folder_without_a_model_ends_in_one_line(self, tmp_path: Path) -> None:
        done = run_command("demo", "--model", str(tmp_path), "--json", *QUICK, HF_HUB_OFFLINE="1")

        assert done.returncode == 1
        assert done.stdout == ""
        assert "Traceback" not in done.stderr
        assert done.stderr.splitlines()[-1].startswith("Error: ")
        assert str(tmp_path) in done.stderr.splitlines()[-1]


class TestErrors:
    def test_an_error_raised_on_purpose_is_one_line(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse() -> None:
            raise EngineBusyError("The queue is\nfull [64 requests].")

        monkeypatch.setattr(checks, "run_checks", refuse)
        result = runner.invoke(app, ["doctor"])

        assert result.exit_code == 1
        assert result.stderr == "Error: The queue is full [64 requests].\n"

    def test_a_missing_framework_names_the_extra(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delitem(sys.modules, "avp_langgraph.demo", raising=False)
        monkeypatch.setitem(sys.modules, "langgraph.graph", None)
        result = runner.invoke(app, ["demo"])

        assert result.exit_code == 1
        assert "pip install 'avp-agents[langgraph]'" in result.stderr
        assert result.stdout == ""

    def test_an_unknown_framework_names_the_known_ones(self) -> None:
        result = runner.invoke(app, ["demo", "--framework", "autogen"])

        assert result.exit_code == 1
        assert "Registered: crewai, langgraph." in result.stderr


class TestDoctor:
    @pytest.mark.usefixtures("smollm2_path")
    def test_says_that_the_demo_can_run(self) -> None:
        done = run_command("doctor", "--json")

        report: dict[str, Any] = json.loads(done.stdout)
        assert done.returncode == 0, done.stdout
        assert report["demo_can_run"] is True
        subjects = [finding["subject"] for finding in report["findings"]]
        for subject in ("python", "torch", "transformers", "langgraph", "threads", "memory", "default model", "demo"):
            assert subject in subjects

    def test_table_for_people_names_what_to_do(self, monkeypatch: pytest.MonkeyPatch) -> None:
        findings = [
            checks.Finding("torch", "ok", "2.13.0"),
            checks.Finding("langgraph", "problem", "not installed", "pip install 'avp-agents[langgraph]'"),
        ]
        monkeypatch.setattr(checks, "run_checks", lambda: findings)
        result = runner.invoke(app, ["doctor"])

        assert result.exit_code == 1
        assert "pip install 'avp-agents[langgraph]'" in result.stdout
        assert "The demo cannot run" in result.stdout

    def test_a_key_that_others_can_read_is_a_problem(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        key = tmp_path / "avp-agents" / "store.key"
        key.parent.mkdir()
        key.write_text("ab" * 32)
        key.chmod(0o644)
        monkeypatch.delenv("AVP_STORE_KEY", raising=False)
        monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
        result = runner.invoke(app, ["doctor", "--json"])

        (finding,) = [f for f in json.loads(result.stdout)["findings"] if f["subject"] == "store key"]
        assert result.exit_code == 1
        assert finding["verdict"] == "problem"
        assert f"chmod 600 '{key}'" in finding["detail"] + finding["advice"]

    def test_more_threads_than_cores_is_worth_a_note(self) -> None:
        assert checks.threads_finding(threads=8, cores=2).verdict == "note"
        assert checks.threads_finding(threads=2, cores=2).verdict == "ok"


class TestComparison:
    def test_sums_agents_and_divides_seconds(self) -> None:
        thinker = AgentRun("researcher", 1.0, 20, 0, 0, 0, "none", "")
        writer = AgentRun("researcher", 5.0, 0, 200, 0, 0, "none", "Facts.")
        solver = AgentRun("solver", 1.0, 0, 30, 60, 200, "kv", "90")
        comparison = Comparison(GraphRun((thinker, solver), 2.0), GraphRun((writer, solver), 6.0))

        assert comparison.ratio == 3.0
        assert comparison.to_json()["text"] == {
            "seconds": 6.0, "tokens_decoded": 230, "positions_reused": 60, "bytes_handed_over": 200,
            "mode": "kv", "answer": "90",
        }  # fmt: skip
