"""A researcher in one process, a solver in another, one Redis between them; see docs/deployment.md.

    pip install "avp-agents[langgraph,redis,server]"
    export AVP_STORE_KEY=$(python -c "import secrets; print(secrets.token_hex(32))")
    redis-server --port 6379 &
    python recipes/cluster/worker.py research &
    python recipes/cluster/worker.py solve &
    python recipes/cluster/worker.py ask "A shop sells pens at 3 dollars each. How much do 14 pens cost?"

The researcher thinks 20 latent steps and puts a handle on the next queue; the solver answers on top of the thought.
Stop the researcher before the solver takes its turn: the thought's lineage is in Redis, and the solver replays it.

    AVP_STORE_URL   the Redis, redis://127.0.0.1:6379/0 by default
    AVP_MODEL       name or folder of the model, SmolLM2-135M-Instruct by default
    AVP_DTYPE       float32, bfloat16 or float16; the same for all workers that replay each other's contexts exactly
    AVP_URL         an `avp-agents serve` that runs the model, with AVP_SERVE_TOKEN; by default each worker runs its own
    AVP_VLLM_URL    or a vLLM server that does
"""

import argparse
import json
import os
import uuid
from typing import Any

from langchain_core.messages import BaseMessage, HumanMessage, SystemMessage, messages_from_dict, messages_to_dict
from langgraph.graph import START, MessagesState, StateGraph
from langgraph.graph.state import CompiledStateGraph
from redis import Redis

from avp_agents import LatentEngine
from avp_agents.engine.protocol import Engine
from avp_agents.store import open_store
from avp_agents.transport import RemoteEngine
from avp_langgraph import AvpChatModel

RESEARCH = SystemMessage("Work out which quantities the question is about and how they depend on each other.")
SOLVE = SystemMessage("Answer the question step by step.")


def store_url() -> str:
    return os.environ.get("AVP_STORE_URL", "redis://127.0.0.1:6379/0")


def open_engine() -> Engine:
    """The model as the environment says: on a server, or in this process."""
    model, dtype = os.environ.get("AVP_MODEL") or None, os.environ.get("AVP_DTYPE") or None
    if url := os.environ.get("AVP_URL"):
        # contexts stay on that server, which was started with --store
        return RemoteEngine(url, token=os.environ.get("AVP_SERVE_TOKEN"))
    store = open_store(store_url())
    if url := os.environ.get("AVP_VLLM_URL"):
        from avp_agents.vllm import VllmEngine

        return VllmEngine.from_server(url, model, dtype=dtype, store=store)
    return LatentEngine.from_pretrained(model, dtype=dtype, store=store)


def build_graph(role: str, engine: Engine, *, latent_steps: int = 20, max_tokens: int = 128) -> CompiledStateGraph:
    """The graph of one worker. It could have any number of nodes."""
    model = AvpChatModel(engine=engine, max_tokens=max_tokens)
    if role == "research":
        model = AvpChatModel(engine=engine, mode="latent", latent_steps=latent_steps)

    def work(state: MessagesState) -> dict[str, Any]:
        return {"messages": [model.invoke([RESEARCH if role == "research" else SOLVE, *state["messages"]])]}

    return StateGraph(MessagesState).add_node(role, work).add_edge(START, role).compile()


def push(queue: Redis, name: str, thread: str, messages: list[BaseMessage]) -> None:
    queue.rpush(f"cluster:{name}", json.dumps({"thread": thread, "messages": messages_to_dict(messages)}))


def pop(queue: Redis, name: str) -> tuple[str, list[BaseMessage]]:
    _, job = queue.blpop([f"cluster:{name}"])  # pyright: ignore[reportGeneralTypeIssues]
    job = json.loads(job)
    return job["thread"], messages_from_dict(job["messages"])


def work(role: str, graph: CompiledStateGraph, queue: Redis) -> None:
    """Take one job, and hand its messages on. A handle among them is honoured in its thread only."""
    thread, messages = pop(queue, role)
    result = graph.invoke({"messages": messages}, {"configurable": {"thread_id": thread}})
    push(queue, "solve" if role == "research" else f"answered:{thread}", thread, result["messages"])


def ask(question: str, queue: Redis) -> None:
    thread = uuid.uuid4().hex
    push(queue, "research", thread, [HumanMessage(question)])
    _, [*_, answer] = pop(queue, f"answered:{thread}")
    handoff = answer.response_metadata["avp"]
    print(f"handed over by {handoff['mode']} ({handoff['reason']}), {handoff['positions_reused']} positions reused")
    print(answer.text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("role", choices=["research", "solve", "ask"])
    parser.add_argument("question", nargs="?", default="A shop sells pens at 3 dollars each. How much do 14 pens cost?")
    parser.add_argument("--jobs", type=int, help="stop after so many; by default go on for ever")
    arguments = parser.parse_args()
    queue = Redis.from_url(store_url(), decode_responses=True, socket_timeout=None)  # jobs may be long in coming
    if arguments.role == "ask":
        ask(arguments.question, queue)
        return
    graph, done = build_graph(arguments.role, open_engine()), 0
    while arguments.jobs is None or done < arguments.jobs:
        work(arguments.role, graph, queue)
        done += 1


if __name__ == "__main__":
    main()
