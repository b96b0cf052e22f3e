"""Many clients that come and go leave nothing behind.

``AVP_SOAK_REQUESTS`` sets how many requests are made; 2000 is a soak.
"""

from __future__ import annotations

import asyncio
import gc
import os
import random
import time

import psutil
import pytest
from serving import serving

from avp_agents import LatentEngine
from avp_agents.errors import AvpError
from avp_agents.transport import RemoteEngine
from avp_agents.transport.server import ServerLimits

REQUESTS = int(os.environ.get("AVP_SOAK_REQUESTS", "96"))
CONCURRENCY = 16
GROWTH_OBJECTS = 4000
"""Objects, not the process's size: torch keeps what it prepares for each shape of a batch, with or without a server."""


@pytest.mark.timeout(3600)
def test_random_disconnects_leak_nothing(engine: LatentEngine) -> None:
    """No sequence, no stored context, no object, no connection."""
    with serving(engine, limits=ServerLimits(context_seconds=3600)) as url:
        outcomes = soak(url, REQUESTS // 4, seed=1)
        settle(engine)
        with RemoteEngine(url, token="token-of-one") as remote:
            remote.store.discard(remote.store.list())
            process = psutil.Process()
            before, files = living_objects(), process.num_fds()
            outcomes |= soak(url, REQUESTS, seed=2)
            settle(engine)
            assert remote.generate("still there", max_tokens=1).finish_reason == "length"
            remote.store.discard(remote.store.list())
            assert remote.store.stats().contexts == 0
        assert living_objects() - before < GROWTH_OBJECTS
        assert process.num_fds() <= files + CONCURRENCY
        stats = engine.stats()
        assert (stats.running, stats.waiting) == (0, 0)
    assert {"answered", "left"} <= outcomes


def soak(url: str, count: int, *, seed: int) -> set[str]:
    """Make requests, and leave some of them at a random moment; returns how they ended."""
    outcomes: set[str] = set()

    async def main() -> None:
        chance, allowed = random.Random(seed), asyncio.Semaphore(CONCURRENCY)
        remote = RemoteEngine(url, token="token-of-one")

        async def one(number: int) -> None:
            async with allowed:
                try:
                    async with asyncio.timeout(chance.choice([0.01, 0.05, 0.2, 30])):
                        thought = await remote.athink(f"request {number}", steps=2)
                        await remote.agenerate("go on", context=thought, max_tokens=chance.randint(1, 12))
                    outcomes.add("answered")
                except TimeoutError:
                    outcomes.add("left")
                except AvpError as error:
                    outcomes.add(type(error).__name__)

        await asyncio.gather(*(one(number) for number in range(count)))
        await remote.aclose()
        remote.close()

    asyncio.run(main())
    return outcomes


def living_objects() -> int:
    """How many objects there are."""
    gc.collect()
    return len(gc.get_objects())


def settle(engine: LatentEngine) -> None:
    """Wait until the engine has nothing more to do."""
    latest = time.monotonic() + 30
    while (engine.stats().running or engine.stats().waiting) and time.monotonic() < latest:
        time.sleep(0.05)
