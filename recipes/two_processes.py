"""A researcher in one process, a solver in another, and every way to hand over between them.

    pip install "avp-agents[server]"
    python recipes/two_processes.py
    python recipes/two_processes.py --solver Qwen/Qwen2.5-0.5B-Instruct     # another model: projection or text

The researcher's model is served by `avp-agents serve`; it reads a report and thinks 20 latent steps. The solver loads
its own model here and answers a question on what it is handed: the KV-cache (kv), the lineage to prefill (replay), what
the researcher was about to say (projection), or its words (text). The last rows show what the handshake chooses by
itself, on the loopback and on a link of 10 Mbit/s.
"""

import argparse
import os
import secrets
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx

from avp_agents import LatentEngine
from avp_agents.errors import HandshakeError, TransportError
from avp_agents.protocol.handshake import MODES, CrossingMode
from avp_agents.transport import RemoteEngine
from avp_agents.transport.client import hand_over

REPORT = (
    "The lighthouse on Gull Island was built in 1871 by the engineer Martha Lindqvist, after three ships had been "
    "lost on the reef in a single winter. Its first lamp burned whale oil, and two keepers carried the oil up one "
    "hundred and forty steps every evening. In 1902 the lamp was changed to acetylene, which burned brighter and "
    "needed one keeper only. The last keeper, Jonas Aber, lived on the island with his wife and a dog until 1958, "
    "when the light was connected to the mainland by a cable and became automatic. The tower is thirty-two metres "
    "high and painted in red and white bands, so that sailors can tell it from the grey tower at Cape Morrow. A "
    "storm in 1987 broke the gallery, and the repair took eleven months because stone had to be brought by boat "
    "from the quarry at Havn. Since 2004 the keeper's house has been a small museum. It shows the old lens, the "
    "logbooks of the keepers, and a model of the reef. About nine thousand people visit it every summer; in "
    "winter the ferry does not run, and the island belongs to the birds. The society that owns the museum plans "
    "to open the tower itself to visitors, but the stairs would have to be made safe first, and the money for "
    "that has not been found."
)
TASK = "Who built the lighthouse, and when?"
QUESTION = "According to the report, which engineer built the lighthouse?"
RIGHT = "Lindqvist"


@dataclass(frozen=True)
class Row:
    """One handover, and the answer on top of it."""

    link: str
    asked: str
    mode: str
    bytes: int
    handover_ms: float
    prefill_ms: float
    answer: str


class SlowStream(httpx.SyncByteStream):
    def __init__(self, stream: Any, bytes_per_second: float) -> None:
        self.stream, self.bytes_per_second = stream, bytes_per_second

    def __iter__(self) -> Iterator[bytes]:
        for chunk in self.stream:
            time.sleep(len(chunk) / self.bytes_per_second)
            yield chunk

    def close(self) -> None:
        self.stream.close()


class SlowTransport(httpx.BaseTransport):
    """HTTP/2 over a link of a limited rate."""

    def __init__(self, bits_per_second: float) -> None:
        self.transport, self.rate = httpx.HTTPTransport(http1=False, http2=True), bits_per_second / 8

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        response = self.transport.handle_request(request)
        response.stream = SlowStream(response.stream, self.rate)
        return response


@contextmanager
def served(model: str | None, port: int) -> Iterator[tuple[str, str]]:
    """`avp-agents serve` in a process of its own; yields URL and token."""
    token, url = secrets.token_urlsafe(32), f"http://127.0.0.1:{port}"
    command = [sys.executable, "-c", "from avp_agents.cli import app; app()", "serve", *([model] if model else [])]
    process = subprocess.Popen([*command, "--port", str(port)], env=os.environ | {"AVP_SERVE_TOKEN": token})
    try:
        while process.poll() is None:
            try:
                httpx.get(f"{url}/health", trust_env=False)
                break
            except httpx.TransportError:
                time.sleep(0.2)
        else:
            sys.exit("The researcher's server ended before it answered; what it said is above.")
        yield url, token
    finally:
        process.terminate()
        process.wait(30)


def solve(solver: LatentEngine, source: RemoteEngine, handle: Any, link: str, mode: CrossingMode | None) -> Row:
    """Hand over in one mode and answer."""
    context = hand_over(handle, source, solver, mode=mode, text_tokens=64)
    answer = solver.generate(QUESTION, context=context, max_tokens=24)
    handoff = context.handoff
    assert handoff is not None
    return Row(
        link, mode or "handshake", handoff.mode, handoff.bytes, handoff.milliseconds,
        1e3 * answer.usage.prefill_seconds, " ".join(answer.text.split()),
    )  # fmt: skip


def compare(researcher: str | None, solver_model: str | None, port: int) -> list[Row]:
    """Every mode once on the loopback, then what the handshake chooses there and at 10 Mbit/s."""
    rows = []
    with served(researcher, port) as (url, token), LatentEngine.from_pretrained(solver_model) as solver:
        with RemoteEngine(url, token=token) as remote:
            thought = remote.think(f"Read this report.\n\n{REPORT}\n\n{TASK}", steps=20)
            handle = remote.store.put(thought, agent="researcher")
            for mode in MODES:
                try:
                    solve(solver, remote, handle, "loopback", mode)  # warms up what is made once
                    rows.append(solve(solver, remote, handle, "loopback", mode))
                except HandshakeError as error:
                    print(error)
            rows.append(solve(solver, remote, handle, "loopback", None))
        with RemoteEngine(url, token=token, transport=SlowTransport(10e6)) as slow:
            rows.append(solve(solver, slow, handle, "10 Mbit/s", None))
    return rows


def show(rows: list[Row]) -> None:
    print(f"{'link':<10} {'asked':<10} {'mode':<11}{'bytes':>12}{'handover ms':>13}{'prefill ms':>12}  answer")
    for row in rows:
        verdict = "right" if RIGHT in row.answer else "wrong"
        times = f"{row.handover_ms:>13.0f}{row.prefill_ms:>12.0f}"
        print(f"{row.link:<10} {row.asked:<10} {row.mode:<11}{row.bytes:>12}{times}  {verdict}: {row.answer[:60]}")
    bytes_by_mode = {row.mode: row.bytes for row in rows if row.asked == row.mode}
    if {"kv", "replay"} <= bytes_by_mode.keys():
        print(f"replay moves {bytes_by_mode['replay'] / bytes_by_mode['kv']:.2%} of the bytes that kv moves")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--researcher", help="model that is served; default: SmolLM2-135M-Instruct")
    parser.add_argument("--solver", help="model of this process; default: SmolLM2-135M-Instruct")
    parser.add_argument("--port", type=int, default=8300)
    arguments = parser.parse_args()
    try:
        show(compare(arguments.researcher, arguments.solver, arguments.port))
    except TransportError as error:
        sys.exit(f"The researcher could not be reached: {error}")


if __name__ == "__main__":
    main()
