"""docs/architecture.md lists the files that a call enters before the forward pass; here a real call is traced."""

from __future__ import annotations

import re
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from avp_agents import LatentEngine, MemoryStore
from avp_langgraph import AvpChatModel

ROOT = Path(__file__).parents[2]
MOST_FILES = 24


class Trace:
    """The project's files that any thread enters until the model's forward pass begins.

    Attributes:
        files: All of them.
        callers: Those that the caller's own thread enters, in order.
    """

    def __init__(self) -> None:
        self.files: set[str] = set()
        self.callers: list[str] = []
        self.is_on = False

    def __call__(self, frame: FrameType, event: str, argument: Any) -> None:
        if not self.is_on or event != "call":
            return
        if frame.f_code.co_qualname == "Forward.__call__":
            self.is_on = False
            return
        file = Path(frame.f_code.co_filename)
        name = str(file.relative_to(ROOT)) if file.is_relative_to(ROOT) else ""
        if not name.startswith(("avp_agents/", "integrations/")):
            return
        self.files.add(name)
        if threading.current_thread() is threading.main_thread() and name not in self.callers:
            self.callers.append(name)


@pytest.fixture
def trace() -> Iterator[Trace]:
    """Follows the threads that are started from now on, and this one."""
    traced = Trace()
    threading.setprofile(traced)
    yield traced
    threading.setprofile(None)
    sys.setprofile(None)


def listed_files() -> list[str]:
    """What the page says."""
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    section = page.partition("## The life of a request")[2].partition("\n## ")[0]
    return re.findall(r"^\d+\. `([^`]+)`", section, flags=re.MULTILINE)


def test_the_page_lists_the_files_that_a_call_enters(smollm2_path: Path, trace: Trace) -> None:
    with LatentEngine.from_pretrained(str(smollm2_path), store=MemoryStore()) as engine:
        # another tenant's call, so that nothing is left to be made at a first use
        AvpChatModel(engine=engine.for_store(MemoryStore()), max_tokens=1).invoke("Hi.")
        model = AvpChatModel(engine=engine, max_tokens=1)
        engine.load()
        sys.setprofile(trace)
        trace.is_on = True
        model.invoke("What is two plus two?")

    assert not trace.is_on, "the forward pass was not reached"
    listed = listed_files()
    assert trace.files == set(listed)
    assert trace.callers == [name for name in listed if name in trace.callers]
    assert len(listed) <= MOST_FILES
