"""A lineage as token ids and embeddings."""

from __future__ import annotations

import pytest
import torch
from vllm_cases import HIDDEN, thought_behind

from avp_agents import LatentSegment, TokenSegment
from avp_agents.context import SplicedSegment
from avp_agents.errors import UnsupportedModelError
from avp_agents.vllm.lineage_prompt import LineagePrompt


def test_latents_stand_in_their_places() -> None:
    thought = thought_behind((5, 6, 7, 8))
    latents = thought.lineage[1]
    assert isinstance(latents, LatentSegment)

    prompt = LineagePrompt.of((*thought.lineage, TokenSegment((9,))))

    assert len(prompt) == 8
    assert not prompt.is_text
    assert prompt.token_ids(placeholder=0) == [5, 6, 7, 8, 0, 0, 0, 9]
    assert prompt.is_token() == [True] * 4 + [False] * 3 + [True]
    rows = prompt.embeddings(torch.float32)
    assert rows.shape == (8, HIDDEN)
    assert torch.equal(rows[4:7], latents.embeddings)
    assert not rows[:4].any()


def test_placeholders_add_no_token_that_a_repetition_penalty_would_see() -> None:
    assert set(LineagePrompt.of(thought_behind((5, 6)).lineage).token_ids()) == {5, 6}


def test_tokens_that_stand_side_by_side_are_one_run() -> None:
    prompt = LineagePrompt.of((TokenSegment((1, 2)), TokenSegment((3,)), TokenSegment(())))

    assert prompt.segments == (TokenSegment((1, 2, 3)),)
    assert prompt.is_text


def test_spliced_contexts_are_refused() -> None:
    spliced = SplicedSegment((TokenSegment((4, 5)),), prefix=1)

    with pytest.raises(UnsupportedModelError, match="strategy='replay'"):
        LineagePrompt.of((TokenSegment((1, 2, 3)), spliced))
