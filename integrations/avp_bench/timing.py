"""Side-by-side timing: variants take turns, so that a slow minute of the machine hits all of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor

import torch

Variant = Callable[[], float | None]
"""Does the work once; returns the seconds that count, or None to have the whole call timed."""


def medians(variants: Mapping[str, Variant], repeats: int) -> dict[str, float]:
    """Median seconds of each variant over interleaved repeats, after one warm-up of each.

    Args:
        variants: What to time, by name.
        repeats: Timed rounds.
    """
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for repeat in range(repeats + 1):
        for name, variant in variants.items():
            measured = _seconds(variant)
            if repeat:
                seconds[name].append(measured)
    return {name: statistics.median(values) for name, values in seconds.items()}


def read_bandwidth(device: torch.device, *, gigabytes: float = 0.5, repeats: int = 5) -> float:
    """Bytes per second that `device` reads from its memory, measured by summing a tensor.

    On a thread that ends with it: its worker threads would slow the engine's down.
    """

    def measure() -> float:
        tensor = torch.ones(int(gigabytes * 2**30) // 4, dtype=torch.float32, device=device)

        def read() -> None:
            tensor.sum().item()

        return tensor.numel() * 4 / medians({"read": read}, repeats)["read"]

    with ThreadPoolExecutor(1) as once:
        return once.submit(measure).result()


def _seconds(variant: Variant) -> float:
    started = time.perf_counter()
    own = variant()
    return time.perf_counter() - started if own is None else own
