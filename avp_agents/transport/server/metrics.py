"""Counters in Prometheus' text format."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_BUCKETS = (0.005, 0.025, 0.1, 0.5, 2.5, 10.0, 60.0, 300.0)

Labels = tuple[tuple[str, str], ...]


class Metrics:
    """What the server has done. Used on the event loop only."""

    def __init__(self) -> None:
        self._counters: dict[str, dict[Labels, float]] = defaultdict(lambda: defaultdict(float))
        self._durations: dict[str, list[int]] = defaultdict(lambda: [0] * (len(_BUCKETS) + 1))
        self._seconds: dict[str, float] = defaultdict(float)

    def count(self, name: str, amount: float = 1, **labels: str) -> None:
        """Add to a counter; `name` without prefix and ``_total``."""
        self._counters[name][tuple(sorted(labels.items()))] += amount

    def request(self, route: str, status: int, seconds: float) -> None:
        """Note a finished request."""
        self.count("requests", route=route, status=str(status))
        place = next((i for i, bound in enumerate(_BUCKETS) if seconds <= bound), len(_BUCKETS))
        self._durations[route][place] += 1
        self._seconds[route] += seconds

    def render(self, gauges: Mapping[str, float]) -> str:
        """Everything, with gauges as they are now."""
        lines: list[str] = []
        for name, series in sorted(self._counters.items()):
            lines.append(f"# TYPE avp_{name}_total counter")
            lines += [f"avp_{name}_total{_braces(labels)} {value:g}" for labels, value in sorted(series.items())]
        lines.append("# TYPE avp_request_seconds histogram")
        for route in sorted(self._durations):
            lines += self._histogram(route)
        for name, value in gauges.items():
            lines += [f"# TYPE avp_{name} gauge", f"avp_{name} {value:g}"]
        return "\n".join(lines) + "\n"

    def _histogram(self, route: str) -> Iterable[str]:
        total = 0
        for bound, count in zip((*map(str, _BUCKETS), "+Inf"), self._durations[route], strict=True):
            total += count
            yield f"avp_request_seconds_bucket{_braces((('le', bound), ('route', route)))} {total}"
        yield f"avp_request_seconds_count{_braces((('route', route),))} {total}"
        yield f"avp_request_seconds_sum{_braces((('route', route),))} {self._seconds[route]:g}"


def _braces(labels: Labels) -> str:
    inner = ",".join(f'{name}="{_escaped(value)}"' for name, value in labels)
    return "{" + inner + "}" if inner else ""


def _escaped(value: str) -> str:
    return value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
