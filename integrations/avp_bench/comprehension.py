"""``avp-agents bench comprehension``: what reaches another model, the text that is read again or the projected vector?

A source model reads a short paragraph of invented facts and a question, and thinks. A target model, with other weights,
is then asked the question. The arms differ in what it gets, and are paired per paragraph:

    text                    what the source decoded about it, as text; not the paragraph
    reread + vector         the paragraph, read again, and the source's thought as a vector
    reread                  the paragraph, read again, in the same places (an empty answer stands where the vector was)
    reread as messages      the paragraph as a message before the question: what engines do unless told otherwise
    reread + other vector   the paragraph, and the thought about another paragraph (control)
    vector                  the thought alone
    other vector            the thought about another paragraph alone (control)

A vector is worth its place where *reread + vector* beats *reread*, and carries content where it beats the control.
"""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from importlib.resources import files
from typing import Any

from avp_agents.context import Context
from avp_agents.crossing.thought import SpokenMessage, Thought
from avp_agents.engine.latent_engine import LatentEngine
from avp_agents.errors import ConfigurationError
from avp_bench.statistics import holm, mcnemar_p, wilson

STEPS = 20
ANSWER_TOKENS = 12
TEXT_TOKENS = 64
ARMS = ("text", "reread as messages", "reread + vector", "reread", "reread + other vector", "vector", "other vector")
COMPARED = (
    ("reread + vector", "reread"),
    ("reread + vector", "reread as messages"),
    ("reread + vector", "reread + other vector"),
    ("reread as messages", "text"),
    ("vector", "other vector"),
)
ALPHA = 0.05
_CONCURRENT = 8
_READ = "Read this text, then think about the question.\n\nText: {paragraph}\n\nQuestion: {question}"
_ASK = "{question} Answer with one or two words."


@dataclass(frozen=True)
class Passage:
    """One paragraph with a question and the answers that count as right."""

    paragraph: str
    question: str
    answers: tuple[str, ...]

    def is_right(self, answer: str) -> bool:
        """Whether the answer holds one of the right ones as whole words."""
        said = f" {_words(answer)} "
        return any(f" {_words(right)} " in said for right in self.answers)


def read_items(count: int | None = None) -> list[Passage]:
    """The package's paragraphs, or the first `count` of them.

    Raises:
        ConfigurationError: There are not so many, or fewer than two are asked for.
    """
    lines = files("avp_bench").joinpath("data/comprehension.jsonl").read_text(encoding="utf-8").splitlines()
    items = [Passage(row["paragraph"], row["question"], tuple(row["answers"])) for row in map(json.loads, lines)]
    if count is not None and not 2 <= count <= len(items):
        raise ConfigurationError(
            f"There are {len(items)} paragraphs, and an arm needs another one: take 2 to {len(items)}."
        )
    return items[:count]


@dataclass(frozen=True)
class Said:
    """What the source has for one item: its thought, and its text."""

    thought: Thought
    text: str


class Comprehension:
    """The study for one direction.

    Args:
        source: Reads and thinks.
        target: Answers.
        items: At least two.
        report: Told what is going on.
    """

    def __init__(
        self, source: LatentEngine, target: LatentEngine, items: Sequence[Passage], report: Callable[[str], None]
    ) -> None:
        self._source, self._target, self._items, self._report = source, target, items, report

    def run(self) -> dict[str, Any]:
        """All arms on all items.

        Returns:
            JSON data: vocabulary overlap, per arm right answers with Wilson's interval, McNemar's exact p of the pairs
            that matter (as it is, and Holm's), sizes, and every answer.
        """
        shared = self._target.crossing.shared_vocabulary(self._source.crossing)
        self._report(f"{len(self._items)} paragraphs are read by the source")
        said = self._parallel(self._listen, self._items)
        answers = {}
        for arm in ARMS:
            self._report(f"Arm {arm}: {len(self._items)} questions")
            answers[arm] = self._parallel(lambda i, arm=arm: self._answer(arm, i, said), range(len(said)))
        right = {
            arm: [item.is_right(answer) for item, answer in zip(self._items, given, strict=True)]
            for arm, given in answers.items()
        }
        p_values = {f"{one} / {other}": mcnemar_p(right[one], right[other]) for one, other in COMPARED}
        adjusted = holm(p_values)
        better = sum(right["reread + vector"]) > sum(right["reread"])
        adds = better and adjusted["reread + vector / reread"] < ALPHA
        return {
            "source": self._source.model_path,
            "target": self._target.model_path,
            "items": len(self._items),
            "steps": STEPS,
            "shared_tokens": len(shared),
            "share_of_source": shared.share_of_source,
            "share_of_target": shared.share_of_target,
            "median_shared_mass": statistics.median(self._mass(one.thought) for one in said),
            "median_bytes": {
                "vector": statistics.median(len(replace(one.thought, messages=()).encode()) for one in said),
                "reread + vector": statistics.median(len(one.thought.encode()) for one in said),
                "text": statistics.median(len(one.text.encode()) for one in said),
            },
            "right": {arm: sum(verdicts) for arm, verdicts in right.items()},
            "wilson_95": {arm: wilson(sum(verdicts), len(verdicts)) for arm, verdicts in right.items()},
            "mcnemar_p": p_values,
            "holm_p": adjusted,
            "vector_adds": adds,
            "answers": answers,
        }

    def _listen(self, item: Passage) -> Said:
        """What the source thinks and says about an item."""
        prompt = _READ.format(paragraph=item.paragraph, question=item.question)
        context = self._source.think(prompt, steps=STEPS)
        thought = self._source.crossing.express(context)
        text = self._source.generate(prompt, max_tokens=TEXT_TOKENS).text
        return Said(thought, text)

    def _answer(self, arm: str, index: int, said: Sequence[Said]) -> str:
        """The target's answer to an item's question."""
        question, own = _ASK.format(question=self._items[index].question), said[index]
        if arm == "reread as messages":
            messages = [*(message.to_chat() for message in own.thought.messages), {"role": "user", "content": question}]
            return self._target.generate(messages, max_tokens=ANSWER_TOKENS).text
        context = self._handed(arm, own, said[(index + len(said) // 2) % len(said)])
        return self._target.generate(question, context=context, max_tokens=ANSWER_TOKENS).text

    def _handed(self, arm: str, own: Said, other: Said) -> Context:
        crossing, thought = self._target.crossing, own.thought
        if arm == "text":
            thought = replace(thought, messages=(SpokenMessage("assistant", own.text),))
        if "other" in arm:
            thought = replace(thought, distributions=other.thought.distributions, origin=other.thought.origin)
        if "vector" not in arm:
            thought = replace(thought, distributions=())
        if arm.endswith("vector") and "reread" not in arm:
            thought = replace(thought, messages=())
        return crossing.project(thought)

    def _mass(self, thought: Thought) -> float:
        return statistics.fmean(self._target.crossing.embeddings_of(thought).mass)

    @staticmethod
    def _parallel(call: Callable[[Any], Any], inputs: Sequence[Any]) -> list[Any]:
        with ThreadPoolExecutor(_CONCURRENT) as pool:
            return list(pool.map(call, inputs))


def _words(text: str) -> str:
    """Lower case, words and numbers only, with single spaces."""
    return " ".join(re.findall(r"\w+", text.lower()))
