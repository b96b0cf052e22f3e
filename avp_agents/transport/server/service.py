"""What all handlers work with: tenants, limits, metrics."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from starlette.requests import Request

from avp_agents.errors import ConfigurationError
from avp_agents.protocol.session import SessionTable
from avp_agents.transport.server.limits import ServerLimits, Throttle
from avp_agents.transport.server.metrics import Metrics
from avp_agents.transport.server.tenants import Tenant, Tenants
from avp_agents.transport.server.uploads import Uploads
from avp_agents.usage import Usage

_TELLING_POSITIONS = 64
"""Shorter prefills say little about long ones."""


@dataclass(frozen=True)
class Service:
    """The parts of one server.

    Attributes:
        tenants: The namespaces.
        limits: See there.
        throttle: Rate and concurrency.
        uploads: Those that have not ended.
        sessions: Of clients that shook hands.
        metrics: What the server has done.
        model: The name under which the model is served.
    """

    tenants: Tenants
    limits: ServerLimits
    throttle: Throttle
    uploads: Uploads
    sessions: SessionTable
    model: str
    metrics: Metrics = field(default_factory=Metrics)
    _prefill_rates: deque[float] = field(default_factory=lambda: deque(maxlen=32))

    @property
    def prefill_rate(self) -> float | None:
        """Positions per second that the engine prefilled lately; None before it prefilled anything long enough."""
        return median(self._prefill_rates) if self._prefill_rates else None

    async def tenant(self, request: Request) -> Tenant:
        """Whose request it is; the gate has checked the token."""
        return await self.tenants.of(request.state.namespace)

    def allowed_seconds(self, asked: Any) -> float:
        """The time that a request gets: what it asks for, within the server's limit.

        Raises:
            ConfigurationError: It is not a positive number.
        """
        if asked is None:
            return self.limits.request_seconds
        if type(asked) not in (int, float) or not asked > 0:
            raise ConfigurationError(f"timeout must be a positive number of seconds, not {asked!r}.")
        return min(float(asked), self.limits.request_seconds)

    def note_usage(self, usage: Usage | None) -> None:
        """Count what a request took."""
        if usage is None:
            return
        counts = {
            "prompt": usage.prompt_tokens,
            "reused": usage.positions_reused,
            "latent": usage.latent_steps,
            "completion": usage.completion_tokens,
        }
        fed = usage.prompt_tokens - usage.positions_reused
        if fed >= _TELLING_POSITIONS and usage.prefill_seconds > 0:
            self._prefill_rates.append(fed / usage.prefill_seconds)
        for kind, count in counts.items():
            self.metrics.positions.labels(kind).inc(count)
