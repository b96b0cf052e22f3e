"""The benchmarks of two processes: a link of a given rate, where two modes cross over, and the commands as a whole."""

from __future__ import annotations

import json
import math
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

sys.path.append(str(Path(__file__).parents[1] / "engine"))

from tiny_models import TinyModels

from avp_agents.cli import app
from avp_agents.errors import ConfigurationError
from avp_agents.protocol.handshake import CrossingMode
from avp_bench import handoff, handoff_crossover, soak
from avp_bench.handoff import read_questions
from avp_bench.handoff_crossover import find_crossover
from avp_bench.handoff_link import limited_link
from avp_bench.served_model import served_model
from avp_bench.soak import LIVE, Round, SoakResult


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny random model's folder."""
    return TinyModels(tmp_path_factory.mktemp("benched")).path("llama")


@pytest.fixture
def echo() -> Iterator[str]:
    """A server that sends back what it gets, one connection at a time."""
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve() -> None:
            connection, _ = listening.accept()
            with connection:
                while data := connection.recv(2**16):
                    connection.sendall(data)

        serving = threading.Thread(target=serve)
        serving.start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        serving.join(10)


def run(*arguments: str) -> tuple[int, Any]:
    """Exit code and JSON of a benchmark."""
    result = CliRunner().invoke(app, ["bench", *arguments, "--dtype", "float32", "--device", "cpu", "--json"])
    assert result.stdout, result.stderr
    return result.exit_code, json.loads(result.stdout)


def test_a_link_passes_bytes_on_unchanged_and_no_faster(echo: str) -> None:
    """200 kB at 1 MB/s take a fifth of a second each way."""
    sent = bytes(range(256)) * 800
    with limited_link(echo, 1e6) as url:
        host, port = url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as connection:
            started = time.monotonic()
            sending = threading.Thread(target=lambda: (connection.sendall(sent), connection.shutdown(socket.SHUT_WR)))
            sending.start()
            received = b"".join(iter(lambda: connection.recv(2**16), b""))
            seconds = time.monotonic() - started
            sending.join()
    assert received == sent
    assert seconds > 0.9 * len(sent) / 1e6


def test_the_crossover_and_the_switch_are_found() -> None:
    """8 MB or half a second: equal at 16 MB/s; a handshake that switches a fifth too early is seen to."""

    def seconds(speed: float, mode: CrossingMode) -> float:
        return 8e6 / speed if mode == "kv" else 0.5

    found = find_crossover(
        seconds, lambda speed: "kv" if speed > 13e6 else "replay", slowest=1e6, repeats=1, fastest=4e8
    )

    assert found is not None
    assert found.measured == pytest.approx(16e6, rel=0.05)
    assert found.ratio == pytest.approx(13 / 16, rel=0.1)
    told = found.to_json()
    assert told["measured_mbit"] == pytest.approx(8e-6 * found.measured)
    speeds = [one["bytes_per_second"] for one in told["timed"]]
    assert speeds == sorted(speeds)


@pytest.mark.parametrize("replay_seconds", [0.0, math.inf])
def test_where_one_mode_always_wins_there_is_no_crossover(replay_seconds: float) -> None:
    """A free replay beats every link, and one that never ends none."""
    found = find_crossover(
        lambda speed, mode: 8e6 / speed if mode == "kv" else replay_seconds,
        lambda _: "kv",
        slowest=1e6,
        repeats=1,
    )

    assert found is None


def test_handoffs_between_two_processes(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every mode is in the table; at 10 Mbit/s and on the loopback the handshake says what it chose."""
    monkeypatch.setattr(handoff_crossover, "_HALVINGS", 1)
    monkeypatch.setattr(handoff, "TEXT_TOKENS", 8)  # the tiny model reads bytes: the report fills most of its window

    code, result = run("handoff", "--model", model, "--questions", "2", "--repeats", "1")

    assert code == 0
    rows = {row["mode"]: row for row in result["modes"]}
    assert list(rows) == ["kv", "replay", "projection", "text"]
    assert all(row["done"] == mode for mode, row in rows.items())
    assert result["prompt_tokens"] >= 300
    assert rows["kv"]["same"] == rows["replay"]["same"] == result["questions"] == 2
    assert rows["replay"]["bytes"] < rows["kv"]["bytes"]
    assert [choice["link"] for choice in result["choices"]] == ["loopback", "10 Mbit/s"]
    assert result["choices"][1]["bits_per_second"] < 12e6


def test_the_report_answers_its_questions() -> None:
    """And there are only so many."""
    assert all(item.is_right(item.paragraph) and not item.is_right(item.question) for item in read_questions())
    with pytest.raises(ConfigurationError, match="8 questions"):
        read_questions(9)


def test_a_soak(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Clients wait, give up and vanish; the store is back at its live contexts after each round."""
    monkeypatch.setattr(soak, "ROUNDS", 4)
    monkeypatch.setattr(soak, "PATIENCE_SECONDS", 0.2)
    monkeypatch.setattr(soak, "FLAT_MIB", math.inf)  # so few requests are all warm-up

    code, result = run("soak", "--model", model, "--requests", "48")

    assert code == 0
    assert result["leaks"] == []
    assert {"answered", "left", "dropped"} == set(result["outcomes"])
    assert sum(result["outcomes"].values()) == 48
    assert [one["kept"] for one in result["rounds"]] == [LIVE] * 4
    assert max(one["made"] for one in result["rounds"]) > LIVE


def test_a_soak_says_what_leaks() -> None:
    """Memory that goes on growing after the first quarter, and contexts that stay."""
    flat = [Round(100 * n, 50, LIVE, 900.0 + 100 * min(n, 1), 20) for n in range(8)]
    growing = [Round(100 * n, 50, LIVE + n, 900.0 + 100 * n, 20) for n in range(8)]

    assert SoakResult({}, 1.0, tuple(flat)).leaks == []
    leaks = SoakResult({}, 1.0, tuple(growing)).leaks
    assert "memory grew by 400.0 MiB" in leaks[0]
    assert "10 contexts" in leaks[1]


def test_a_server_that_does_not_start_says_why(tmp_path: Path) -> None:
    """The end of what it printed."""
    with (
        pytest.raises(ConfigurationError, match=r"did not start: .*no-such-model"),
        served_model(str(tmp_path / "no-such-model")),
    ):
        pass
