"""SmolLM2 and Qwen2.5-Coder, in both directions: what they share, and that facts cross."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from avp_agents import LatentEngine, MemoryStore, Namespace
from avp_agents.evals.comprehension import read_items

Pair = tuple[LatentEngine, LatentEngine]


@pytest.fixture(scope="module")
def smol_and_qwen(smollm2_path: Path, qwen_path: Path) -> Iterator[Pair]:
    """Both models, on one store."""
    store = MemoryStore(namespace=Namespace("cross-model-tests", b"k" * 32))
    options: dict[str, Any] = {"device": "cpu", "kv_pool_bytes": 128 * 2**20, "store": store}
    with (
        LatentEngine.from_pretrained(str(smollm2_path), **options) as smol,
        LatentEngine.from_pretrained(str(qwen_path), **options) as qwen,
    ):
        smol.load()
        qwen.load()
        yield smol, qwen


def test_their_vocabularies_meet_in_bytes(smol_and_qwen: Pair) -> None:
    """Four fifths of SmolLM2's tokens are Qwen's, too; the hello's sketch sees that."""
    smol, qwen = (engine.crossing for engine in smol_and_qwen)

    shared = qwen.shared_vocabulary(smol)

    assert len(shared) == 39_234
    assert shared.share_of_source == pytest.approx(0.798, abs=0.001)
    assert smol.hello().vocabulary.overlap(qwen.hello().vocabulary) == pytest.approx(0.798, abs=0.1)


def test_a_fact_crosses(smol_and_qwen: Pair) -> None:
    """SmolLM2 reads and thinks; Qwen, which got nothing but that context, answers."""
    smol, qwen = smol_and_qwen
    item = read_items()[0]
    thought = smol.think(f"{item.paragraph} {item.question}", steps=4)

    answer = qwen.generate(f"{item.question} Answer with one word.", context=thought, max_tokens=4)

    assert answer.handoff.mode == "reread"
    assert item.is_right(answer.text)


def test_a_thought_is_two_kilobytes(smol_and_qwen: Pair) -> None:
    """Its vector stands for nearly all of what was about to be said."""
    smol, qwen = smol_and_qwen
    expressed = qwen.crossing.express(qwen.think("What is the capital of France?", steps=4), reread=False)

    assert 1000 < len(expressed.encode()) < 3500
    assert smol.crossing.embeddings_of(expressed).mass[0] > 0.5
