"""A researcher behind MCP in one process, a solver in another: the researcher's thought becomes the solver's context.

    pip install "avp-agents[mcp]"
    python recipes/mcp_researcher_solver.py

`avp-agents serve --mcp` runs the researcher's model. It reads a report and thinks 20 latent steps; the solver takes the
thought over MCP by the mode that the handshake chooses, by each mode that one can ask for, and answers a question. The
last row is a server that knows nothing of contexts: its resource is read as text.
"""

import argparse
import asyncio
import os
import secrets
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import httpx

from avp_agents import Context, LatentEngine
from avp_agents.protocol.handshake import CrossingMode
from avp_agents.transport.mcp import McpContexts

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
NOTES = "notes://lighthouse"


def serve_notes(port: int) -> None:
    """An MCP server like any other, with a text resource."""
    from mcp.server.mcpserver import MCPServer

    server = MCPServer("notes", log_level="ERROR")

    @server.resource(NOTES)
    def lighthouse() -> str:
        return REPORT

    server.run("streamable-http", host="127.0.0.1", port=port)


@contextmanager
def process(command: list[str], url: str, **environment: str) -> Iterator[None]:
    """Another process that answers at a URL."""
    started = subprocess.Popen([sys.executable, *command], env=os.environ | environment)
    try:
        while started.poll() is None:
            try:
                httpx.get(url, trust_env=False)
                break
            except httpx.TransportError:
                time.sleep(0.2)
        else:
            sys.exit(f"{url} was to be served, but the server ended; what it said is above.")
        yield
    finally:
        started.terminate()
        started.wait(30)


async def answer(solver: LatentEngine, context: Context, asked: str) -> None:
    """Answer on a context, and say how it came."""
    told = await solver.agenerate(QUESTION, context=context, max_tokens=24)
    handoff, text = context.handoff, " ".join(told.text.split())
    assert handoff is not None
    verdict = "right" if RIGHT in text else "wrong"
    print(f"{asked:<10} {handoff.mode:<7}{handoff.bytes:>10}{handoff.milliseconds:>7.0f}  {verdict}: {text[:48]}")
    if handoff.estimated_ms:
        print(f"{'':<10} {handoff.reason}; estimated: {dict(handoff.estimated_ms)} ms")


async def compare(researcher_url: str, token: str, notes_url: str, solver: LatentEngine) -> None:
    """Every way over MCP, and the way of a server that knows nothing of it."""
    print(f"{'asked':<10} {'mode':<7}{'bytes':>10}{'ms':>7}  answer")
    async with McpContexts(researcher_url, token=token) as researcher:
        handle = await researcher.think(f"Read this report.\n\n{REPORT}\n\n{TASK}", steps=20)
        modes: tuple[CrossingMode | None, ...] = (None, "kv", "replay", "text")
        for mode in modes:
            context = await researcher.hand_over(handle, solver, mode=mode, text_tokens=40)
            await answer(solver, context, mode or "handshake")
    async with McpContexts(notes_url) as notes:
        await answer(solver, await notes.hand_over(NOTES, solver), "plain MCP")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="of both sides; default: SmolLM2-135M-Instruct")
    parser.add_argument("--port", type=int, default=8300, help="the researcher's")
    parser.add_argument("--notes-port", type=int, default=8301, help="the plain server's")
    parser.add_argument("--notes", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    port, notes_port = arguments.port, arguments.notes_port
    if arguments.notes:
        serve_notes(notes_port)
        return
    token, url, notes = secrets.token_urlsafe(32), f"http://127.0.0.1:{port}", f"http://127.0.0.1:{notes_port}/mcp"
    serve = ["-c", "from avp_agents.cli import app; app()", "serve", "--mcp", "--port", str(port)]
    served = process([*serve, *([arguments.model] if arguments.model else [])], f"{url}/health", AVP_SERVE_TOKEN=token)
    plain = process([__file__, "--notes", "--notes-port", str(notes_port)], notes)
    with served, plain, LatentEngine.from_pretrained(arguments.model) as solver:
        asyncio.run(compare(f"{url}/mcp", token, notes, solver))


if __name__ == "__main__":
    main()
