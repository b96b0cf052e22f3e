"""The comprehension study: its paragraphs are sound, its scoring is fair, and it runs from end to end."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig

from avp_agents import LatentEngine
from avp_agents.errors import ConfigurationError
from avp_bench.comprehension import ARMS, Comprehension, Passage, read_items
from avp_bench.random_weights import random_engine
from avp_bench.statistics import holm, mcnemar_p, wilson


@pytest.fixture
def two_shapes(tmp_path: Path) -> Iterator[tuple[LatentEngine, LatentEngine]]:
    """Two models of random weights and different widths, with the default model's tokenizer."""
    shapes = []
    for hidden in (16, 32):
        config = LlamaConfig(
            vocab_size=49152, hidden_size=hidden, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=1, max_position_embeddings=1024, tie_word_embeddings=True,
        )  # fmt: skip
        config.save_pretrained(tmp_path / str(hidden))
        shapes.append(str(tmp_path / str(hidden)))
    with (
        random_engine(shapes[0], torch.float32, "cpu", None) as source,
        random_engine(shapes[1], torch.float32, "cpu", None) as target,
    ):
        yield source, target


def test_every_paragraph_answers_its_question() -> None:
    """At least 60, each with an answer that it holds, and no question twice."""
    items = read_items()

    assert len(items) >= 60
    assert len({item.question for item in items}) == len(items)
    assert all(item.is_right(item.paragraph) for item in items)
    assert not any(item.is_right(item.question) for item in items)
    assert max(len(item.paragraph.split()) for item in items) < 80


@pytest.mark.parametrize(
    ("answer", "right"),
    [("Old Tom.", True), ("They are called OLD TOM, I think", True), ("Old Tommy", False), ("Tom", False), ("", False)],
)
def test_an_answer_counts_by_whole_words(answer: str, right: bool) -> None:
    """Case and punctuation make no difference; parts of words do not count."""
    assert Passage("", "", ("Old Tom",)).is_right(answer) is right


@pytest.mark.parametrize("count", [1, 1000])
def test_the_number_of_paragraphs_is_checked(count: int) -> None:
    """The controls need another paragraph, and there are only so many."""
    with pytest.raises(ConfigurationError, match="paragraphs"):
        read_items(count)


def test_the_study_runs_from_end_to_end(two_shapes: tuple[LatentEngine, LatentEngine]) -> None:
    """Every arm answers every question; the result is JSON, and says whether the vector adds anything."""
    steps: list[str] = []

    result = Comprehension(*two_shapes, read_items(2), steps.append).run()

    assert json.loads(json.dumps(result))["items"] == 2
    assert result["right"].keys() == result["wilson_95"].keys() == set(ARMS)
    assert all(len(answers) == 2 for answers in result["answers"].values())
    assert result["share_of_source"] == result["share_of_target"] == 1.0
    assert result["vector_adds"] is False
    assert len(steps) == 1 + len(ARMS)


def test_mcnemar_counts_only_pairs_that_differ() -> None:
    """0 of 6 differing pairs one way has p = 2 / 64."""
    assert mcnemar_p([True] * 6 + [True, False], [False] * 6 + [True, False]) == pytest.approx(2 / 64)
    assert mcnemar_p([True, False], [True, False]) == 1.0


def test_wilson_intervals_stay_between_zero_and_one() -> None:
    """Known values: 8 of 10, none of 10, nothing asked."""
    assert wilson(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert wilson(0, 10)[0] == pytest.approx(0.0, abs=1e-12)
    assert wilson(0, 0) == (0.0, 1.0)


def test_holm_corrects_for_the_number_of_questions() -> None:
    """The smallest p is multiplied by how many there are; none falls below one before it."""
    adjusted = holm({"a": 0.04, "b": 0.01, "c": 0.03})

    assert adjusted == {"b": pytest.approx(0.03), "c": pytest.approx(0.06), "a": pytest.approx(0.06)}
