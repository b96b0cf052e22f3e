"""Running code that a model wrote: another process that can neither reach the network, nor write outside of a temporary
folder, nor start processes, nor outlive its limits.

What keeps it in are user, network and process namespaces (``unshare``), Landlock for files, seccomp for system calls,
and resource limits. Where the system lacks one of them nothing is run.
"""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from avp_agents.errors import ConfigurationError

SECONDS = 10
"""Seconds that a program may take, by the clock."""
_LAUNCHER = Path(__file__).with_name("sandbox_launcher.py")
# when the first process in there ends, or this one is killed, all of them are
_NAMESPACES = ("unshare", "--user", "--map-current-user", "--net", "--ipc", "--pid", "--fork", "--kill-child", "--")
_PROBE = """
import os, socket
try:
    open(os.path.expanduser("/tmp/avp-sandbox-probe"), "w")
except OSError:
    pass
else:
    raise SystemExit("files outside of its folder can be written")
open("inside", "w").write("x")
try:
    socket.create_connection(("127.0.0.1", 9), timeout=1)
except ConnectionRefusedError:
    raise SystemExit("the network can be reached")
except OSError:
    pass
try:
    os.fork()
except OSError:
    pass
else:
    raise SystemExit("processes can be started")
"""


@dataclass(frozen=True)
class Verdict:
    """How a program ended.

    Attributes:
        passed: It ran to its last line. One that ends itself before that has not shown anything.
        reason: ``"passed"``, ``"timeout"``, the last line of its error output, or its exit status.
    """

    passed: bool
    reason: str


RunProgram = Callable[[str], Verdict]
"""Runs a Python program and says how it ended."""


def sandboxed(program: str) -> Verdict:
    """Run a Python program in the sandbox.

    Raises:
        ConfigurationError: No sandbox can be set up here; the message says why.
    """
    check_sandbox()
    return _run(program, isolated=True)


def unprotected(program: str) -> Verdict:
    """Run a Python program with nothing but a time limit and a temporary folder. It can do whatever its user can."""
    return _run(program, isolated=False)


@cache
def check_sandbox() -> None:
    """Set up a sandbox once and see whether it holds.

    Raises:
        ConfigurationError: It cannot be set up, or does not hold.
    """
    advice = "Use Linux 5.13 or newer with user namespaces, or pass --unsafe in a machine that may be harmed."
    if shutil.which("unshare") is None:
        raise ConfigurationError(f"Generated code cannot be run safely: there is no `unshare` (util-linux). {advice}")
    verdict = _run(_PROBE, isolated=True)
    if not verdict.passed:
        raise ConfigurationError(f"Generated code cannot be run safely: {verdict.reason}. {advice}")


def _run(program: str, *, isolated: bool) -> Verdict:
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        file = Path(folder, "program.py")
        # how the last line ends the program is drawn anew each time, so that no other way of ending looks the same
        end = 64 + secrets.randbelow(128)
        file.write_text(f"{program}\n\n__import__('os')._exit({end})\n", encoding="utf-8")
        launcher = [*_NAMESPACES, sys.executable, "-I", str(_LAUNCHER)] if isolated else [sys.executable, "-I"]
        try:
            ended = subprocess.run(
                [*launcher, str(file)], cwd=folder, env={"PATH": os.defpath, "HOME": folder}, stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, timeout=SECONDS, start_new_session=True,
                check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return Verdict(False, "timeout")
    if ended.returncode == end:
        return Verdict(True, "passed")
    lines = ended.stderr[-2000:].decode(errors="replace").strip().splitlines()
    return Verdict(False, lines[-1] if lines else f"exit status {ended.returncode}")
