"""Code that a model wrote is run where it can harm nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from avp_bench import sandbox
from avp_bench.sandbox import sandboxed


def test_a_program_that_ends_without_an_error_passes() -> None:
    """The standard library, files in its own folder and threads are there."""
    program = "import threading, math\nopen('own', 'w').write('x')\nt = threading.Thread(target=math.sqrt, args=(4,))\n"
    assert sandboxed(f"{program}t.start(); t.join()\nassert open('own').read() == 'x'").passed


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("assert 1 == 2", "AssertionError"),
        ("x = bytearray(2**31)", "MemoryError"),
        ("import os\nwhile True: os.fork()", "not permitted"),
        ("import os\nos.posix_spawn('/bin/true', ['true'], {})", "not permitted"),
        ("import socket\nsocket.create_connection(('127.0.0.1', 9), 1)", "not permitted"),
        ("import socket\nsocket.socket(socket.AF_UNIX).connect('/run/any.sock')", "not permitted"),
        ("open('big', 'wb').write(bytes(2**25))", "too large"),
        ("import os\nos.kill(-1, 9)", "No such process"),
    ],
    ids=["wrong", "memory", "fork bomb", "process", "network", "local socket", "disk", "kill"],
)
def test_a_hostile_program_fails_and_says_why(program: str, reason: str) -> None:
    verdict = sandboxed(program)
    assert not verdict.passed
    assert reason in verdict.reason


@pytest.mark.parametrize("ending", ["raise SystemExit", "import os; os._exit(0)", "quit()"])
def test_a_program_that_ends_before_its_last_line_has_not_passed(ending: str) -> None:
    verdict = sandboxed(f"{ending}\nassert 1 == 2")
    assert not verdict.passed
    assert verdict.reason


def test_files_of_others_stay(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("here")
    tmp_path.chmod(0o777)
    victim.chmod(0o666)
    assert "Permission denied" in sandboxed(f"import os\nos.remove({str(victim)!r})").reason
    assert "Permission denied" in sandboxed(f"open({str(victim)!r}, 'w')").reason
    assert victim.read_text() == "here"


def test_an_endless_program_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    sandbox.check_sandbox()
    monkeypatch.setattr(sandbox, "SECONDS", 1)
    assert sandboxed("while True: pass").reason == "timeout"
