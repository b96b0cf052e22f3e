"""How much one client may ask for, how fast, and how slow it may be."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from avp_agents.errors import ConfigurationError, LimitExceededError
from avp_agents.transport.problems import Refusal


@dataclass(frozen=True)
class ServerLimits:
    """Limits of a server; where it says so, per namespace.

    Attributes:
        body_bytes: Largest JSON body.
        upload_bytes: Largest uploaded context.
        uploads: Unfinished uploads per namespace.
        upload_seconds: How long an unfinished upload may rest.
        contexts: Stored contexts per namespace.
        context_seconds: How long a context lasts after its last use, unless a client put it into the store to stay.
        concurrency: Requests at a time per namespace.
        rate: Requests per second per namespace, with bursts of twice as many; None is no limit.
        request_seconds: Longest think, answer or replay, waiting in the engine's queue included.
        read_seconds: How long a client may take to send the next piece of a body.
        write_seconds: How long a client may take to receive the next piece of a response.
    """

    body_bytes: int = 4 * 2**20
    upload_bytes: int = 2**30
    uploads: int = 4
    upload_seconds: float = 120.0
    contexts: int = 10_000
    context_seconds: float = 3600.0
    concurrency: int = 64
    rate: float | None = None
    request_seconds: float = 600.0
    read_seconds: float = 20.0
    write_seconds: float = 30.0

    def __post_init__(self) -> None:
        for name in self.__dataclass_fields__:
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ConfigurationError(f"{name} must be positive, not {value}.")


class Throttle:
    """Rate and concurrency of every namespace. Used on the event loop only.

    Args:
        limits: See there.
        clock: Seconds.
    """

    def __init__(self, limits: ServerLimits, clock: Callable[[], float] = time.monotonic) -> None:
        self._limits, self._clock = limits, clock
        self._running: dict[str, int] = {}
        self._allowance: dict[str, tuple[float, float]] = {}

    @property
    def running(self) -> int:
        """Requests of all namespaces."""
        return sum(self._running.values())

    @contextmanager
    def entered(self, namespace: str) -> Iterator[None]:
        """Count one request while it runs.

        Raises:
            Refusal: 429.
        """
        running = self._running.get(namespace, 0)
        if running >= self._limits.concurrency:
            raise _too_many(f"{running} requests of this namespace are running already.", 1)
        self._spend(namespace)
        self._running[namespace] = running + 1
        try:
            yield
        finally:
            self._running[namespace] -= 1

    def _spend(self, namespace: str) -> None:
        """Take one from the namespace's allowance, which grows by `rate` a second up to twice that."""
        rate = self._limits.rate
        if rate is None:
            return
        now, most = self._clock(), max(1.0, 2 * rate)
        left, since = self._allowance.get(namespace, (most, now))
        left = min(most, left + (now - since) * rate)
        if left < 1:
            raise _too_many(f"More than {rate:g} requests a second.", (1 - left) / rate)
        self._allowance[namespace] = (left - 1, now)


def _too_many(message: str, seconds: float) -> Refusal:
    error = LimitExceededError(f"{message} Try again later.")
    return Refusal(429, error, headers={"retry-after": str(max(1, round(seconds)))})
