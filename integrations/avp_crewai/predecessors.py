"""Which tasks a task builds on, and what text CrewAI put into its prompt for them.

A task's predecessors are those of its ``context``, or by CrewAI's own rule the tasks before it. CrewAI writes their
outputs into the prompt as one block. The block is found by making it again, with CrewAI's own functions from the same
outputs, and looking for exactly that; never by the words around it, which other languages and versions change.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from crewai.agent.utils import format_task_with_context
from crewai.task import Task
from crewai.tasks.conditional_task import ConditionalTask
from crewai.tasks.task_output import TaskOutput
from crewai.utilities.constants import NOT_SPECIFIED
from crewai.utilities.formatter import aggregate_raw_outputs_from_task_outputs

from avp_agents.prompt.chat_messages import Message


@dataclass(frozen=True)
class Predecessor:
    """A task that came before, and what it put out."""

    task: Task
    output: TaskOutput

    @property
    def name(self) -> str:
        """What people call it."""
        return self.task.name or self.task.description

    @property
    def key(self) -> str:
        """The task's id, which no other task of any crew has."""
        return str(self.task.id)


@dataclass(frozen=True)
class HandedText:
    """The block that CrewAI put into a prompt for a task's predecessors.

    Attributes:
        predecessors: Whose outputs it holds, in order.
        text: The block, with what CrewAI writes around the outputs.
        index: The message that holds it.
    """

    predecessors: tuple[Predecessor, ...]
    text: str
    index: int

    def reduced_to(self, kept: Sequence[Predecessor], messages: Sequence[Message]) -> list[Message]:
        """The messages with a block of the `kept` predecessors' outputs only; with no block where there are none."""
        message = messages[self.index]
        content = message["content"].replace(self.text, _block(kept), 1)
        return [*messages[: self.index], {**message, "content": content}, *messages[self.index + 1 :]]


def find_handed_text(task: Task, crew: Any, messages: Sequence[Message]) -> HandedText | None:
    """The block for `task`'s predecessors; None where it has none, or where the prompt does not hold it as it was made.

    Args:
        task: The task that runs.
        crew: Its crew, if it has one.
        messages: The prompt.
    """
    for predecessors in _candidates(task, crew):
        block = _block(predecessors)
        for index, message in enumerate(messages):
            content = message["content"]
            if not block.strip() or message["role"] != "user" or not isinstance(content, str):
                continue
            # CrewAI strips the end of a message
            text = block if block in content else block.rstrip() if content.endswith(block.rstrip()) else ""
            if text:
                return HandedText(tuple(predecessors), text, index)
    return None


def _candidates(task: Task, crew: Any) -> list[list[Predecessor]]:
    """The outputs that CrewAI may have put together for a task."""
    context: Any = task.context
    if context is not NOT_SPECIFIED:
        return [_with_output(context or [])]
    tasks: list[Task] = getattr(crew, "tasks", [])
    place = next((i for i, other in enumerate(tasks) if other.id == task.id), 0)
    earlier = _with_output(tasks[:place])
    if not task.async_execution:
        return [earlier]
    return [[other for other in earlier if not other.task.async_execution][-1:]]


def _with_output(tasks: Sequence[Task]) -> list[Predecessor]:
    found = []
    for task in tasks:
        output = task.output
        if output is None and isinstance(task, ConditionalTask):
            output = task.get_skipped_task_output()
        if output is not None:
            found.append(Predecessor(task, output))
    return found


def _block(predecessors: Sequence[Predecessor]) -> str:
    """What CrewAI appends to a task's prompt for these outputs."""
    outputs = [predecessor.output for predecessor in predecessors]
    return format_task_with_context("", aggregate_raw_outputs_from_task_outputs(outputs))
