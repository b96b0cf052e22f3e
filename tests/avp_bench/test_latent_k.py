"""The study of k: paired verdicts and what they are computed from."""

from __future__ import annotations

from pathlib import Path

from avp_agents import LatentEngine
from avp_agents.store import MemoryStore
from avp_bench import latent_k
from avp_bench.quality.tasks import TASKS, Item

PROBLEM = {
    "task_id": "0",
    "prompt": 'def total(numbers):\n    """Sum."""\n',
    "entry_point": "total",
    "test": "def check(candidate):\n    assert candidate([1, 2, 3]) == 6\n",
}


def test_both_forms_of_the_soft_embedding_are_compared_on_the_same_problems(smollm2_path: Path) -> None:
    """256 of 49,152 tokens give nearly the embeddings of all of them; the curves cover every step asked for."""
    items: list[Item] = [TASKS["humaneval"].item(0, PROBLEM)]
    with LatentEngine.from_pretrained(str(smollm2_path), dtype="float32", store=MemoryStore()) as engine:
        result = latent_k.run(engine, items, 4, lambda _: None)
    assert result["problems"] == 1
    assert result["median_cosine_between_arms"][1] > 0.99
    assert set(result["median_norm"]["full"]) == set(latent_k.CURVE)
    assert result["mcnemar_p"]["k=256 / full"] == 1.0
