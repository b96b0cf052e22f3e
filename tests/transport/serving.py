"""A real server on a real port, in a thread of its own."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import httpx
from starlette.applications import Starlette

from avp_agents import LatentEngine, MemoryStore, Namespace
from avp_agents.transport.server import Access, Binding, ServerLimits, create_app, serve
from avp_agents.transport.server.access import Token, token_digest

MODEL = "tiny"


class KnownTokens:
    """Tokens of two namespaces: ``"one"`` and ``"two"``."""

    def entries(self) -> list[Token]:
        return [Token(token_digest(f"token-of-{name}"), name) for name in ("one", "two")]


def engine_for(engine: LatentEngine) -> Callable[[str], LatentEngine]:
    """Each namespace's engine, with a memory store of its own."""
    return lambda name: engine.for_store(MemoryStore(namespace=Namespace(name, name.encode() * 32)))


@contextmanager
def serving(
    engine: LatentEngine,
    *,
    access: Access | None = None,
    limits: ServerLimits | None = None,
    extend: Callable[[Starlette], None] = lambda app: None,
    name: str = MODEL,
    **binding: Any,
) -> Iterator[str]:
    """Serve an engine; yields the URL."""
    allowed = limits or ServerLimits()
    app = create_app(
        engine_for(engine), model=name, access=access or Access(KnownTokens(), loopback=True), limits=allowed
    )
    extend(app)
    with running(app, Binding(port=free_port(), **binding), allowed) as url:
        yield url


@contextmanager
def running(app: Starlette, where: Binding, allowed: ServerLimits) -> Iterator[str]:
    """Run an application; yields the URL."""
    loop = asyncio.new_event_loop()
    stopped = asyncio.Event()
    thread = threading.Thread(
        target=lambda: loop.run_until_complete(serve(app, where, allowed, stopped=stopped)), name="server"
    )
    thread.start()
    try:
        _wait_until_up(where)
        yield where.url
    finally:
        loop.call_soon_threadsafe(stopped.set)
        thread.join(20)
        assert not thread.is_alive(), "the server did not stop"
        loop.close()


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]


def token(namespace: str) -> dict[str, str]:
    """The header that opens a namespace."""
    return {"authorization": f"Bearer token-of-{namespace}"}


def _wait_until_up(where: Binding) -> None:
    for _ in range(200):
        try:
            httpx.get(f"{where.url}/health", verify=False, trust_env=False)
            return
        except httpx.TransportError:
            time.sleep(0.05)
    raise AssertionError(f"nothing answers at {where.url}")


def open_engine(folder: str, namespace: str = "transport-tests") -> LatentEngine:
    """A float32 engine with a small pool and a memory store."""
    store = MemoryStore(namespace=Namespace(namespace, b"k" * 32))
    return LatentEngine.from_pretrained(folder, dtype="float32", device="cpu", kv_pool_bytes=8 << 20, store=store)
