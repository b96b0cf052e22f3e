"""SmolLM2 and Qwen2.5-Coder, in both directions: what they share, and that facts cross, also between processes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from avp_agents import LatentEngine, MemoryStore, Namespace
from avp_agents.transport import RemoteEngine
from avp_agents.transport.client import hand_over
from avp_bench.comprehension import read_items
from avp_bench.served_model import served_model

PARAGRAPHS = 2

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


@pytest.mark.parametrize("reader", ["SmolLM2", "Qwen"])
def test_the_wire_gives_the_tokens_of_one_process(smol_and_qwen: Pair, reader: str) -> None:
    """One model reads and thinks behind `avp-agents serve`, the other one answers here: rereading, and on a vector."""
    source, target = smol_and_qwen if reader == "SmolLM2" else smol_and_qwen[::-1]
    with (
        served_model(source.model_path, "--device", "cpu") as server,
        RemoteEngine(server.url, token=server.token) as remote,
    ):
        for item in read_items(PARAGRAPHS):
            prompt, question = f"{item.paragraph} {item.question}", f"{item.question} Answer with one word."
            here, there = source.think(prompt, steps=4), remote.think(prompt, steps=4)
            vector = target.crossing.project(source.crossing.express(here))
            for in_one_process, over_the_wire in (
                (here, hand_over(there, remote, target)),
                (vector, hand_over(there, remote, target, mode="projection")),
            ):
                expected = target.generate(question, context=in_one_process, max_tokens=6)
                assert target.generate(question, context=over_the_wire, max_tokens=6).token_ids == expected.token_ids
