"""``avp-agents bench soak``: many clients that come and go; does a server leak memory or contexts?

A model is served by `avp-agents serve` in a process of its own. Clients work on it in rounds: half of them wait for
their answers, a quarter give up in the middle of a request and say so, a quarter just drop the connection (in a think,
an answer, a chat completion or the download of a KV-cache). After each round everything but a few pinned contexts is
discarded, the store has to be back at just those, and the server's memory is read.

Memory is what the process has of its own, without mapped files, which the system takes back when it likes. It may grow
while pools and caches fill: the first quarter of the rounds is the warm-up. Flat is what grows by no more than
`FLAT_MIB` from then on.
"""

from __future__ import annotations

import asyncio
import json
import random
import statistics
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any
from urllib.parse import urlsplit

import psutil

from avp_agents.errors import AvpError, TransportError
from avp_agents.handle import ContextHandle
from avp_agents.transport import RemoteEngine
from avp_agents.transport.wire import API
from avp_bench.served_model import ModelServer

FLAT_MIB = 16.0
ROUNDS = 16
LIVE = 3
MOST_TOKENS = 12
PATIENCE_SECONDS = 1.5
"""How long those who leave stay at most."""
SETTLE_SECONDS = 60.0
SERVER_OPTIONS = ("--kv-pool-mib", "128", "--batch-invariant")
"""On a CPU, memory for KV-caches is taken when it is first written to, and kernels are kept for each number of rows
that was ever computed. A small pool and few batch sizes are complete after the warm-up: then growth is a leak."""
_MIB = 2**20


@dataclass(frozen=True)
class Round:
    """The server after a round.

    Attributes:
        requests: Made so far.
        made: Contexts that were in the store when the round ended.
        kept: Those left when all but the live ones were discarded.
        memory_mib: The process's own resident memory then.
        files: Files and sockets that it holds open.
    """

    requests: int
    made: int
    kept: int
    memory_mib: float
    files: int


@dataclass(frozen=True)
class SoakResult:
    """What a soak found.

    Attributes:
        outcomes: How many requests ended how: ``"answered"``, ``"left"``, ``"dropped"``, or an error's class.
        seconds: How long it took.
        rounds: The server after each.
    """

    outcomes: dict[str, int]
    seconds: float
    rounds: tuple[Round, ...]

    @property
    def growth_mib(self) -> float:
        """Growth of memory after the warm-up: the last quarter of the rounds against the second one, medians."""
        quarter = max(1, len(self.rounds) // 4)
        early, late = self.rounds[quarter : 2 * quarter] or self.rounds, self.rounds[-quarter:]
        return statistics.median(r.memory_mib for r in late) - statistics.median(r.memory_mib for r in early)

    @property
    def leaks(self) -> list[str]:
        """What leaked, in words."""
        found = []
        if self.growth_mib > FLAT_MIB:
            found.append(f"memory grew by {self.growth_mib:.1f} MiB after the warm-up")
        if left := [r.kept for r in self.rounds if r.kept != LIVE]:
            found.append(f"up to {max(left)} contexts were left where {LIVE} are live")
        return found

    def to_json(self) -> dict[str, Any]:
        """As JSON data."""
        return asdict(self) | {"growth_mib": self.growth_mib, "leaks": self.leaks}


class Soak:
    """One soak of one server.

    Args:
        server: Nobody else uses it meanwhile.
        concurrency: Requests at a time.
        seed: Of who leaves, and when.
        report: Told what is going on.
    """

    def __init__(self, server: ModelServer, concurrency: int, seed: int, report: Callable[[str], None]) -> None:
        self._server, self._concurrency, self._report = server, concurrency, report
        self._chance = random.Random(seed)
        self._process = psutil.Process(server.pid)
        self._outcomes: Counter[str] = Counter()
        self._live: list[ContextHandle] = []
        self._model = ""

    def run(self, requests: int) -> SoakResult:
        """Make so many requests.

        Raises:
            TransportError: The server does not come to rest after a round.
        """
        started = time.monotonic()
        with RemoteEngine(self._server.url, token=self._server.token) as remote:
            self._model = remote.model_path
            self._live = [_pinned(remote, number) for number in range(LIVE)]
            rounds, made = [], 0
            for number in range(ROUNDS):
                count = requests * (number + 1) // ROUNDS - made
                asyncio.run(self._round(range(made, made + count)))
                made += count
                rounds.append(self._rest(remote, made))
                last = rounds[-1]
                self._report(f"{made} of {requests} requests; {last.memory_mib:.0f} MiB, {last.kept} contexts")
        return SoakResult(dict(self._outcomes), time.monotonic() - started, tuple(rounds))

    async def _round(self, numbers: Sequence[int]) -> None:
        """One round's requests, `concurrency` at a time."""
        allowed = asyncio.Semaphore(self._concurrency)
        remote = RemoteEngine(self._server.url, token=self._server.token)

        async def one(work: Awaitable[str]) -> None:
            async with allowed:
                try:
                    self._outcomes[await work] += 1
                except AvpError as error:
                    self._outcomes[type(error).__name__] += 1

        await asyncio.gather(*(one(self._client(remote, number)) for number in numbers))
        await remote.aclose()
        remote.close()

    def _client(self, remote: RemoteEngine, number: int) -> Awaitable[str]:
        """A client of a random kind."""
        kind, patience = self._chance.random(), self._chance.uniform(0, PATIENCE_SECONDS)
        tokens = self._chance.randint(1, MOST_TOKENS)
        if kind < 0.5:
            return self._answered(remote, number, tokens)
        if kind < 0.75:
            return self._left(remote, number, tokens, patience)
        method, path, body = self._chance.choice(self._requests(number, tokens))
        return self._dropped(method, path, body, patience)

    async def _answered(self, remote: RemoteEngine, number: int, tokens: int) -> str:
        thought = await remote.athink(f"Request {number} is about the sea.", steps=2)
        await remote.agenerate("Go on.", context=thought, max_tokens=tokens)
        return "answered"

    async def _left(self, remote: RemoteEngine, number: int, tokens: int, patience: float) -> str:
        """Give up; the client tells the server."""
        try:
            async with asyncio.timeout(patience):
                return await self._answered(remote, number, tokens)
        except TimeoutError:
            return "left"

    async def _dropped(self, method: str, path: str, body: Any, patience: float) -> str:
        """Break the connection, as a client does that crashed."""
        where = urlsplit(self._server.url)
        content = json.dumps(body).encode() if body is not None else b""
        head = (
            f"{method} {path} HTTP/1.1\r\nHost: {where.netloc}\r\nAuthorization: Bearer {self._server.token}\r\n"
            f"Connection: close\r\nContent-Length: {len(content)}\r\n\r\n"
        )
        reader, writer = await asyncio.open_connection(where.hostname, where.port)
        try:
            writer.write(head.encode() + content)
            async with asyncio.timeout(patience):
                answer = await reader.read(-1)
            status = answer[len("HTTP/1.1 ") :][:3].decode()
            return "answered" if status == "200" else f"status {status}"
        except TimeoutError:
            return "dropped"
        except OSError as error:
            raise TransportError(f"The server broke the connection: {error}") from error
        finally:
            writer.transport.abort()

    def _requests(self, number: int, tokens: int) -> list[tuple[str, str, Any]]:
        """What a client that drops its connection may have asked for."""
        prompt, live = f"Request {number} is about the land.", self._live[number % LIVE].id
        chat = {"model": self._model, "messages": [{"role": "user", "content": prompt}], "max_tokens": tokens}
        return [
            ("POST", f"{API}/think", {"prompt": prompt, "steps": 4}),
            ("POST", f"{API}/generate", {"prompt": prompt, "options": {"max_tokens": tokens}}),
            ("POST", "/v1/chat/completions", chat | {"stream": True}),
            ("GET", f"{API}/contexts/{live}/frame?kv=1", None),
        ]

    def _rest(self, remote: RemoteEngine, made: int) -> Round:
        """Wait until nothing runs, discard what the round left, and look at the server."""
        _wait_until_idle(remote)
        live = {handle.id for handle in self._live}
        before = remote.store.stats().contexts
        remote.store.discard(handle for handle in remote.store.list() if handle.id not in live)
        return Round(made, before, remote.store.stats().contexts, self._memory() / _MIB, self._process.num_fds())

    def _memory(self) -> int:
        """The server's resident bytes; without mapped files, where the system tells."""
        memory = self._process.memory_info()
        return memory.rss - getattr(memory, "shared", 0)


def _pinned(remote: RemoteEngine, number: int) -> ContextHandle:
    """A context that stays."""
    handle = remote.store.put(remote.think(f"Live context {number}.", steps=4))
    remote.store.pin(handle)
    return handle


def _wait_until_idle(remote: RemoteEngine) -> None:
    """Wait until this question is the only request that runs.

    Raises:
        TransportError: It never is.
    """
    latest = time.monotonic() + SETTLE_SECONDS
    while time.monotonic() < latest:
        text = remote.connection.get_bytes("/metrics", {}).decode()
        if any(line.startswith("avp_requests_running") and float(line.split()[-1]) == 1 for line in text.splitlines()):
            return
        time.sleep(0.1)
    raise TransportError(f"Requests still run {SETTLE_SECONDS:.0f} s after all clients left.")
