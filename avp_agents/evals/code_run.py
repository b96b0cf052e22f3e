"""Running a model's code apart: another process, limits on time and memory, no network, a temporary folder."""

from __future__ import annotations

import resource
import shutil
import subprocess
import sys
import tempfile

from avp_agents.errors import ConfigurationError

SECONDS = 10
MEMORY_BYTES = 2**30


def passes(program: str) -> bool:
    """Whether a Python program ends without an error within its limits.

    Raises:
        ConfigurationError: This system cannot cut a process off from the network.
    """
    with tempfile.TemporaryDirectory() as folder:
        command = [*_without_network(), sys.executable, "-I", "-c", program]
        try:
            ended = subprocess.run(
                command, cwd=folder, env={"PATH": ""}, stdin=subprocess.DEVNULL, capture_output=True,
                timeout=2 * SECONDS, preexec_fn=_limit, check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return False
    return ended.returncode == 0


def _without_network() -> list[str]:
    unshare = shutil.which("unshare")
    if unshare is None:
        raise ConfigurationError("Running generated code needs `unshare` (util-linux) to cut it off from the network.")
    command = [unshare, "--net", "--map-root-user", "--"]
    if subprocess.run([*command, shutil.which("true") or "true"], capture_output=True, check=False).returncode:
        raise ConfigurationError(
            "This system does not let `unshare` cut a process off from the network; run it in a VM."
        )
    return command


def _limit() -> None:
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))
    resource.setrlimit(resource.RLIMIT_NPROC, (256, 256))
