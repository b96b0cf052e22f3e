"""What a caller says to a vLLM that can think, and how the answer is read. Needs no vLLM."""

from __future__ import annotations

import base64
import json
from dataclasses import asdict
from typing import Any

import pytest
import torch
from safetensors.torch import save

from avp_agents.context import LatentRecipe
from avp_agents.errors import ConfigurationError, EngineError, NumericalError
from avp_agents.vllm.plugin.request import FIELD, ThoughtRequest, read_thought

STEPS = 4


def _answer(*, every_step: bool = False, **changes: Any) -> dict[str, Any]:
    """An answer of four steps whose hidden states turn by 90, 90, 0 and 90 degrees and whose entropy falls by one."""
    hidden = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [-1.0, 0.0], [0.0, -1.0]])
    read = slice(None) if every_step else slice(-1, None)
    tensors = {
        "embeddings": torch.arange(8.0).reshape(STEPS, 2),
        "hidden": hidden[read].contiguous(),
        "token_ids": torch.arange(10, dtype=torch.int32).reshape(5, 2)[read].contiguous(),
        "probabilities": torch.full((5, 2), 0.5)[read].contiguous(),
        "entropy": torch.tensor([5.0, 4.0, 3.0, 2.0, 1.0])[read].contiguous(),
    }
    tensors |= {name: value for name, value in changes.items() if isinstance(value, torch.Tensor)}
    recipe = asdict(LatentRecipe("soft", 256, 1.0, False, STEPS))
    recipe |= {name: value for name, value in changes.items() if name in recipe}
    return json.loads(json.dumps({FIELD: {"recipe": recipe, "tensors": base64.b64encode(save(tensors)).decode()}}))


def test_a_request_says_the_same_in_process_and_over_http() -> None:
    asked = ThoughtRequest(steps=20, method="soft", k=64, temperature=0.5)

    sampling, body = asked.sampling_options(), asked.http_body()

    assert sampling["max_tokens"] == body["max_tokens"] == asked.max_tokens > 20
    assert sampling["extra_args"]["kv_transfer_params"] == body["kv_transfer_params"]
    assert ThoughtRequest.parse(json.loads(json.dumps(body))["kv_transfer_params"][FIELD]) == asked


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "'steps'"),
        ("20", "'steps'"),
        ({"steps": 2, "method_": "soft"}, "some of"),
        ({"steps": -1}, "between 0 and 1024"),
        ({"steps": True}, "between 0 and 1024"),
        ({"steps": 2000}, "between 0 and 1024"),
        ({"steps": 2, "method": "magic"}, "Unknown latent method 'magic'"),
        ({"steps": 2, "k": 0}, "k must be at least 1"),
        ({"steps": 2, "k": "256"}, "k must be at least 1"),
        ({"steps": 2, "temperature": 0}, "positive and finite"),
        ({"steps": 2, "temperature": float("nan")}, "positive and finite"),
        ({"steps": 2, "renormalise": 1}, "renormalise"),
        ({"steps": 2, "stop_cosine": 2}, "stop_cosine"),
        ({"steps": 2, "stop_entropy": -1}, "stop_entropy"),
    ],
)
def test_malformed_requests_are_refused(options: Any, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        ThoughtRequest.parse(options)


def test_a_thought_is_read() -> None:
    thought = read_thought(_answer())

    assert thought.recipe == LatentRecipe("soft", 256, 1.0, False, STEPS)
    assert thought.embeddings.tolist() == torch.arange(8.0).reshape(STEPS, 2).tolist()
    assert thought.readout.hidden.tolist() == [0.0, -1.0]
    assert thought.readout.token_ids.tolist() == [8, 9]
    assert thought.readout.token_ids.dtype == torch.int64


@pytest.mark.parametrize(
    ("rule", "steps"),
    [
        ({"stop_cosine": 0.5}, 3),
        ({"stop_cosine": -0.5}, 1),
        ({"stop_entropy": 3.5}, 2),
        ({"stop_entropy": 9.0}, 0),
        ({"stop_entropy": 0.5}, STEPS),
        ({"stop_cosine": 0.5, "stop_entropy": 3.5}, 2),
    ],
)
def test_stopping_rules_cut_the_thought_where_they_hold(rule: dict[str, float], steps: int) -> None:
    thought = read_thought(_answer(every_step=True, **rule))

    assert len(thought.embeddings) == steps
    assert thought.readout.token_ids.tolist() == [2 * steps, 2 * steps + 1]
    assert thought.recipe.steps == STEPS


def test_nan_and_inf_are_reported_with_their_step() -> None:
    broken = torch.arange(8.0).reshape(STEPS, 2)
    broken[2, 1] = float("nan")
    with pytest.raises(NumericalError, match="latent step 2"):
        read_thought(_answer(embeddings=broken))
    with pytest.raises(NumericalError, match=f"latent step {STEPS}"):
        read_thought(_answer(hidden=torch.tensor([[float("inf"), 0.0]])))
    assert len(read_thought(_answer(every_step=True, embeddings=broken, stop_entropy=3.5)).embeddings) == 2


def test_an_answer_without_a_thought_says_why() -> None:
    for nothing in (None, {}, {"do_remote_prefill": False}):
        with pytest.raises(EngineError, match="start it with plugin_options"):
            read_thought(nothing)
    with pytest.raises(EngineError, match="needs a max_model_len of 600"):
        read_thought({FIELD: {"error": "a prompt of 577 positions needs a max_model_len of 600."}})
