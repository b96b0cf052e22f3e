"""The bench measures what it says, on a shape with random weights small enough for a test."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig

from avp_agents.errors import ModelNotFoundError
from avp_bench.engine_bench import EngineBench, machine
from avp_bench.random_weights import random_engine
from avp_bench.timing import medians, read_bandwidth


@pytest.fixture
def shape(tmp_path: Path) -> str:
    """A configuration without weights; its vocabulary holds the default model's ids."""
    config = LlamaConfig(
        vocab_size=49152, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=2048, tie_word_embeddings=True,
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    return str(tmp_path)


def test_a_shape_without_weights_can_be_timed(shape: str) -> None:
    """Steps, batches, prefill and thinkers come out as positive figures, JSON-able, in their units."""
    with random_engine(shape, torch.float32, "cpu", None) as engine:
        bench = EngineBench(engine, None, None, repeats=1, tokens=4)
        figures = [*bench.steps(), *bench.decode(), *bench.prefill(), *bench.thinkers(), *bench.fork()]
        where = machine(engine)

    assert where["dtype"] == "float32"
    assert json.loads(json.dumps(where)) == where
    values = {figure.name: figure.value for figure in figures}
    assert all(value is not None and value > 0 for value in values.values())
    assert {"latent step", "decode step", "batch 8", "latent step / decode step"} <= values.keys()


def test_an_unknown_shape_is_named(tmp_path: Path) -> None:
    """A configuration that does not exist is a clear error."""
    with pytest.raises(ModelNotFoundError, match="nowhere"):
        random_engine(str(tmp_path / "nowhere"), torch.float32, "cpu", None)


def test_medians_interleave_and_leave_the_warm_up_out() -> None:
    """Variants take turns; the first round does not count."""
    order: list[str] = []
    given = {"a": iter([9.0, 1.0, 2.0, 3.0]), "b": iter([9.0, 5.0, 5.0, 6.0])}

    def variant(name: str) -> float:
        order.append(name)
        return next(given[name])

    assert medians({"a": lambda: variant("a"), "b": lambda: variant("b")}, repeats=3) == {"a": 2.0, "b": 5.0}
    assert order == ["a", "b"] * 4


def test_calls_without_figures_of_their_own_are_timed() -> None:
    """Returning None has the call itself timed."""
    assert medians({"sleep": lambda: time.sleep(0.01)}, repeats=1)["sleep"] >= 0.01
    assert read_bandwidth(torch.device("cpu"), gigabytes=0.01, repeats=1) > 0
