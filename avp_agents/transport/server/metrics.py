"""What the server has done, in Prometheus' text format."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Metric, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from prometheus_client.registry import Collector

CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4
_BUCKETS = (0.005, 0.025, 0.1, 0.5, 2.5, 10.0, 60.0, 300.0)


class Metrics:
    """Counters of one server, in a registry of their own.

    Attributes:
        clients_gone: Clients that left before their answer's end.
        positions: Positions by kind: prompt, reused, latent, completion.
    """

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._requests = Counter("avp_requests", "Requests answered.", ("route", "status"), registry=self._registry)
        self._seconds = Histogram(
            "avp_request_seconds",
            "Time to the end of the answer.",
            ("route",),
            buckets=_BUCKETS,
            registry=self._registry,
        )
        self.clients_gone = Counter("avp_clients_gone", "Clients that left early.", registry=self._registry)
        self.positions = Counter("avp_positions", "Positions, by kind.", ("kind",), registry=self._registry)
        self._gauges: dict[str, Gauge] = {}

    def request(self, route: str, status: int, seconds: float) -> None:
        """Note a finished request."""
        self._requests.labels(route, str(status)).inc()
        self._seconds.labels(route).observe(seconds)

    def render(self, gauges: Mapping[str, float]) -> str:
        """Everything, with gauges as they are now."""
        for name, value in gauges.items():
            if name not in self._gauges:
                self._gauges[name] = Gauge(f"avp_{name}", f"{name.replace('_', ' ')} now.", registry=self._registry)
            self._gauges[name].set(value)
        return generate_latest(_WithoutBirths(self._registry)).decode()


class _WithoutBirths(Collector):
    """A registry without the times at which its series began."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry

    def collect(self) -> Iterable[Metric]:
        """All metrics."""
        for metric in self._registry.collect():
            metric.samples = [sample for sample in metric.samples if not sample.name.endswith("_created")]
            yield metric
