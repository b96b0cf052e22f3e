"""A researcher and a solver as A2A agents, in two processes: the message hands over the researcher's thought.

    pip install "avp-agents[a2a]"
    python recipes/a2a_researcher_solver.py

The solver's card announces that it takes contexts. The researcher reads a report, thinks 20 latent steps, and sends the
question with its thought: as raw bytes, as a URL of its own server, and (to an agent whose card says nothing of
contexts) as text. The solver answers, and says in which mode it took what it was handed.
"""

import argparse
import asyncio
import os
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
from a2a.client import A2ACardResolver, ClientConfig, create_client
from a2a.helpers import get_message_text
from a2a.server.agent_execution import AgentExecutor, RequestContext
from a2a.server.events import EventQueue
from a2a.server.request_handlers import DefaultRequestHandler
from a2a.server.routes import create_agent_card_routes, create_jsonrpc_routes
from a2a.server.tasks import InMemoryTaskStore
from a2a.types import AgentCapabilities, AgentCard, AgentInterface, AgentSkill, Message, Part, Role, SendMessageRequest
from starlette.applications import Starlette

from avp_agents import LatentEngine
from avp_agents.store import default_store
from avp_agents.transport import RemoteEngine
from avp_agents.transport.a2a import UrlPolicy, announce, announcement_of, offer, receive
from avp_agents.transport.server import Access, Binding, ServerLimits, create_app, serve
from avp_agents.transport.server.access import OneToken

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
READ = f"Read this report.\n\n{REPORT}\n\nWho built the lighthouse, and when?"
QUESTION = "According to the report, which engineer built the lighthouse?"
RIGHT = "Lindqvist"
WELL_KNOWN = "/.well-known/agent-card.json"


class Solver(AgentExecutor):
    """Answers on the context that a message hands over, or on its text alone."""

    def __init__(self, engine: LatentEngine, token: str, urls: UrlPolicy) -> None:
        self.engine, self.token, self.urls = engine, token, urls

    async def execute(self, context: RequestContext, event_queue: EventQueue) -> None:
        assert context.message is not None
        received = await receive(context.message, self.engine, token=self.token, urls=self.urls)
        answer = await self.engine.agenerate(received.text, context=received.context, max_tokens=24)
        text, handoff = " ".join(answer.text.split()), received.handoff
        how = f"{handoff.mode:<7}{handoff.bytes:>10}{handoff.milliseconds:>7.0f}"
        parts = [Part(text=f"{how}  {'right' if RIGHT in text else 'wrong'}: {text[:48]}")]
        await event_queue.enqueue_event(Message(role=Role.ROLE_AGENT, parts=parts, message_id=uuid.uuid4().hex))

    async def cancel(self, context: RequestContext, event_queue: EventQueue) -> None:
        """The engine frees the sequence when `execute` is cancelled."""


def card(url: str) -> AgentCard:
    """What the solver says of itself."""
    return AgentCard(
        name="solver", description="Answers questions.", version="1",
        supported_interfaces=[AgentInterface(url=url, protocol_binding="JSONRPC", protocol_version="1.0")],
        capabilities=AgentCapabilities(streaming=False),
        default_input_modes=["text/plain"], default_output_modes=["text/plain"],
        skills=[AgentSkill(id="answer", name="answer", description="Answers a question.", tags=["questions"])],
    )  # fmt: skip


def serve_solver(model: str | None, port: int, frames_port: int, token: str) -> None:
    """The solver's process: an agent that takes contexts at /, and the same one as a plain agent at /plain."""
    url = f"http://127.0.0.1:{port}"
    urls = UrlPolicy(frozenset({f"127.0.0.1:{frames_port}"}), networks=["127.0.0.0/8"])
    with LatentEngine.from_pretrained(model) as engine:
        engine.load()
        speaking, plain = card(f"{url}/a2a"), card(f"{url}/plain")
        announce(speaking, engine, url_bytes=urls.max_bytes)
        handler = DefaultRequestHandler(Solver(engine, token, urls), InMemoryTaskStore(), speaking)
        routes = [
            *create_agent_card_routes(speaking), *create_jsonrpc_routes(handler, "/a2a"),
            *create_agent_card_routes(plain, card_url=f"/plain{WELL_KNOWN}"), *create_jsonrpc_routes(handler, "/plain"),
        ]  # fmt: skip
        asyncio.run(serve(Starlette(routes=routes), Binding(port=port), ServerLimits()))


async def ask(http: httpx.AsyncClient, agent: str, engine: LatentEngine | RemoteEngine, token: str) -> str:
    """Send an agent the question with what the researcher thinks."""
    read = await A2ACardResolver(http, agent).get_agent_card()
    thought = await engine.athink(READ, steps=20)
    words = (await engine.agenerate(READ, max_tokens=64)).text
    handed = await offer(thought, engine, to=announcement_of(read), text=words, token=token, agent="researcher")
    asking = Message(role=Role.ROLE_USER, parts=[*handed, Part(text=QUESTION)], message_id=uuid.uuid4().hex)
    client = await create_client(read, client_config=ClientConfig(httpx_client=http, streaming=False))
    answers = [event.message async for event in client.send_message(SendMessageRequest(message=asking))]
    return get_message_text(answers[-1])


async def research(model: str | None, solver: str, frames_port: int, token: str) -> None:
    """The researcher's process: its engine, and a server from which payloads can be fetched."""
    with LatentEngine.from_pretrained(model) as engine:
        app = create_app(
            lambda name: engine.for_store(default_store(name)), model="researcher", access=Access(OneToken(token), True)
        )
        stopped, binding = asyncio.Event(), Binding(port=frames_port)
        serving = asyncio.create_task(serve(app, binding, ServerLimits(), stopped=stopped))
        print(f"{'payload':<9}{'mode':<7}{'bytes':>10}{'ms':>7}  answer")
        async with httpx.AsyncClient(timeout=120, trust_env=False) as http:
            print(f"{'raw':<9}{await ask(http, solver, engine, token)}")
            with RemoteEngine(binding.url, token=token) as served:
                print(f"{'url':<9}{await ask(http, solver, served, token)}")
                await served.aclose()
            print(f"{'none':<9}{await ask(http, f'{solver}/plain', engine, token)}")
        stopped.set()
        await serving


@contextmanager
def solver_process(model: str | None, port: int, frames_port: int, token: str) -> Iterator[str]:
    """The solver in a process of its own; yields its URL."""
    command = [sys.executable, __file__, "--solve", "--port", str(port), "--frames-port", str(frames_port)]
    command += ["--model", model] if model else []
    process = subprocess.Popen(command, env=os.environ | {"AVP_SHARED_TOKEN": token})
    url = f"http://127.0.0.1:{port}"
    try:
        while process.poll() is None:
            try:
                httpx.get(f"{url}{WELL_KNOWN}", trust_env=False)
                break
            except httpx.TransportError:
                time.sleep(0.2)
        else:
            sys.exit("The solver ended before it answered; what it said is above.")
        yield url
    finally:
        process.terminate()
        process.wait(30)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="of both agents; default: SmolLM2-135M-Instruct")
    parser.add_argument("--port", type=int, default=8310, help="the solver's")
    parser.add_argument("--frames-port", type=int, default=8311, help="of the server that the researcher's URLs name")
    parser.add_argument("--solve", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.solve:
        serve_solver(arguments.model, arguments.port, arguments.frames_port, os.environ["AVP_SHARED_TOKEN"])
        return
    token = uuid.uuid4().hex
    with solver_process(arguments.model, arguments.port, arguments.frames_port, token) as solver:
        asyncio.run(research(arguments.model, solver, arguments.frames_port, token))


if __name__ == "__main__":
    main()
