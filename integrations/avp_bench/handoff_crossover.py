"""Where moving a KV-cache and rebuilding it take equally long, and whether the handshake switches there.

Both are found by bisection over the link's speed, on a logarithmic scale: the crossover by timing both modes at each
speed, the switch by letting the handshake choose on a link of that speed which it has never met before.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from avp_agents.protocol.handshake import CrossingMode

FASTEST = 4e8
"""Bytes per second: about what a process can pass on on the loopback."""
_HALVINGS = 6

Seconds = Callable[[float, CrossingMode], float]
"""How long a handover takes at so many bytes per second, in a mode."""
Chosen = Callable[[float], str]
"""What the handshake chooses at so many bytes per second."""


@dataclass(frozen=True)
class Timed:
    """Both modes at one speed, medians."""

    bytes_per_second: float
    kv_seconds: float
    replay_seconds: float


@dataclass(frozen=True)
class Crossover:
    """Two speeds that should be one.

    Attributes:
        measured: Bytes per second at which both modes take equally long.
        switch: Bytes per second at which the handshake's choice changes.
        timed: What the first one was read from.
    """

    measured: float
    switch: float
    timed: tuple[Timed, ...]

    @property
    def ratio(self) -> float:
        """The switch's place, 1 where it is right."""
        return self.switch / self.measured

    def to_json(self) -> dict[str, Any]:
        """As JSON data; speeds in Mbit/s."""
        return {
            "measured_mbit": 8e-6 * self.measured,
            "switch_mbit": 8e-6 * self.switch,
            "ratio": self.ratio,
            "timed": [asdict(one) for one in self.timed],
        }


def find_crossover(
    seconds: Seconds, chosen: Chosen, *, slowest: float, repeats: int, fastest: float = FASTEST
) -> Crossover | None:
    """The crossover and the switch between `slowest` and `fastest`, in bytes per second.

    Args:
        seconds: Times one handover.
        chosen: Lets the handshake choose once.
        slowest, fastest: Where to look.
        repeats: Handovers per mode and speed; the median counts, of choices the majority.

    Returns:
        None where one mode is quicker, or chosen, on all of these links.
    """
    timed: list[Timed] = []

    def kv_is_quicker(speed: float) -> bool:
        pairs = [(seconds(speed, "kv"), seconds(speed, "replay")) for _ in range(repeats)]
        kv, replay = (statistics.median(column) for column in zip(*pairs, strict=True))
        timed.append(Timed(speed, kv, replay))
        return kv < replay

    def kv_is_chosen(speed: float) -> bool:
        choices = [chosen(speed) for _ in range(repeats)]
        return 2 * choices.count("kv") > repeats

    measured = _turning_point(kv_is_quicker, slowest, fastest)
    switch = _turning_point(kv_is_chosen, slowest, fastest)
    if measured is None or switch is None:
        return None
    return Crossover(measured, switch, tuple(sorted(timed, key=lambda one: one.bytes_per_second)))


def _turning_point(holds: Callable[[float], bool], slowest: float, fastest: float) -> float | None:
    """The speed from which on something holds; None where it holds on all links or on none."""
    low, high = slowest, fastest
    for _ in range(_HALVINGS):
        middle = math.sqrt(low * high)
        low, high = (low, middle) if holds(middle) else (middle, high)
    if (low == slowest and holds(slowest)) or (high == fastest and not holds(fastest)):
        return None
    return math.sqrt(low * high)
