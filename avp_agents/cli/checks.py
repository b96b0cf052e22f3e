"""What ``avp-agents doctor`` looks at. Each check reads something and says what to do where it is not as it should be."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, metadata, version
from typing import Literal

import psutil
from packaging.requirements import Requirement

import avp_agents

Verdict = Literal["ok", "note", "problem"]

GIB = 1 << 30
_ROOM_FOR_DEMO = 2 * GIB


@dataclass(frozen=True)
class Finding:
    """What one check found.

    Attributes:
        subject: What was looked at.
        verdict: ``"problem"`` keeps the demo from running; ``"note"`` is worth knowing.
        detail: What was found.
        advice: What to do; empty where nothing is to be done.
    """

    subject: str
    verdict: Verdict
    detail: str
    advice: str = ""


def run_checks() -> list[Finding]:
    """All findings, in the order people read them."""
    return [finding for check in CHECKS for finding in check()]


def _python() -> Iterator[Finding]:
    system = f"{platform.system()} {platform.machine()}"
    yield Finding("python", "ok", f"{platform.python_version()} on {system}, avp-agents {avp_agents.__version__}")


def _packages() -> Iterator[Finding]:
    """The packages that the engine and the demo cannot do without."""
    for name, extra in (
        ("torch", ""),
        ("transformers", ""),
        ("langchain-core", "langgraph"),
        ("langgraph", "langgraph"),
    ):
        try:
            yield Finding(name, "ok", version(name))
        except PackageNotFoundError:
            target = f"avp-agents[{extra}]" if extra else "avp-agents"
            yield Finding(name, "problem", "not installed", f"pip install '{target}'")


def _extras() -> Iterator[Finding]:
    """Which optional parts are complete, as the distribution's own metadata lists them."""
    own = metadata("avp-agents")
    requirements = [Requirement(line) for line in own.get_all("Requires-Dist") or ()]
    complete, absent = [], []
    for extra in own.get_all("Provides-Extra") or ():
        (complete if all(map(_installed, _brought_by(extra, requirements))) else absent).append(extra)
    detail = f"installed: {', '.join(complete) or 'none'}; not installed: {', '.join(absent) or 'none'}"
    advice = f"where you need one: pip install 'avp-agents[{absent[0]}]'" if absent else ""
    yield Finding("extras", "ok", detail, advice)


def _brought_by(extra: str, requirements: Iterable[Requirement]) -> list[Requirement]:
    """The requirements that only this extra adds, on this Python."""
    return [
        r
        for r in requirements
        if r.marker and not r.marker.evaluate({"extra": ""}) and r.marker.evaluate({"extra": extra})
    ]


def _installed(requirement: Requirement) -> bool:
    try:
        return requirement.specifier.contains(version(requirement.name), prereleases=True)
    except PackageNotFoundError:
        return False


def _compute() -> Iterator[Finding]:
    """Where the model will run, in which dtype, on how many threads."""
    try:
        import torch

        from avp_agents.engine.packed_linear import can_pack
    except ImportError as error:
        yield Finding(
            "device",
            "problem",
            f"torch cannot be imported: {error}",
            "reinstall it: pip install --force-reinstall torch",
        )
        return
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            card = torch.cuda.get_device_properties(index)
            yield Finding(f"device cuda:{index}", "ok", f"{card.name}, {card.total_memory / GIB:.0f} GiB")
    elif torch.accelerator.is_available():
        yield Finding("device", "ok", str(torch.accelerator.current_accelerator()))
    else:
        fast = can_pack(torch.device("cpu"), torch.bfloat16)
        dtype = "bfloat16 is fast here" if fast else "no fast bfloat16 here, float32 is used"
        yield Finding("device", "ok", f"cpu, {torch.backends.cpu.get_cpu_capability()}; {dtype}")
    yield _threads(
        torch.get_num_threads(),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
    )


def _threads(threads: int, cores: int) -> Finding:
    detail = f"{threads} for torch, {cores} cores, OMP_NUM_THREADS={os.environ.get('OMP_NUM_THREADS', 'not set')}"
    if threads > cores:
        return Finding(
            "threads", "note", detail, f"more threads than cores slow each other down: export OMP_NUM_THREADS={cores}"
        )
    return Finding("threads", "ok", detail)


def _memory() -> Iterator[Finding]:
    memory = psutil.virtual_memory()
    detail = f"{memory.available / GIB:.1f} of {memory.total / GIB:.1f} GiB free"
    if memory.available < _ROOM_FOR_DEMO:
        yield Finding("memory", "note", detail, "the demo needs about 2 GiB; close something")
    else:
        yield Finding("memory", "ok", detail)
