"""What a request may ask the store connector for, and when a prompt is the context that it names. Needs no vLLM."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from vllm_cases import FINGERPRINT, HIDDEN, RECIPE

from avp_agents import Context, LatentSegment, TokenSegment
from avp_agents.context import Segment
from avp_agents.errors import ConfigurationError
from avp_agents.vllm.lineage_prompt import LineagePrompt
from avp_agents.vllm.plugin.kv_request import FIELD, KvRequest, PromptStart

ONE, OTHER = "avp:1:" + "a" * 32, "avp:1:" + "b" * 32
LATENTS = torch.randn(3, HIDDEN, generator=torch.Generator().manual_seed(1))
LINEAGE: tuple[Segment, ...] = (TokenSegment((5, 6, 7)), LatentSegment(LATENTS, RECIPE), TokenSegment((8, 9)))

EMBEDDINGS = torch.randn(12, HIDDEN, generator=torch.Generator().manual_seed(2))


def embed(token_ids: tuple[int, ...]) -> torch.Tensor:
    """The model's input embeddings."""
    return EMBEDDINGS[list(token_ids)]


def _start(lineage: tuple[Segment, ...], length: int | None = None) -> PromptStart:
    """A prompt as vLLM has it once it was sent there."""
    prompt = LineagePrompt.of(lineage)
    mask = None if prompt.is_text else prompt.is_token()
    rows = None if prompt.is_text else prompt.embeddings(torch.float32)
    return PromptStart.of(prompt.token_ids(), mask, rows, len(prompt) if length is None else length)


@pytest.mark.parametrize("asked", [KvRequest(load=ONE, positions=7), KvRequest(save=ONE)], ids=["load", "save"])
def test_a_request_is_read_as_it_was_written(asked: KvRequest) -> None:
    assert KvRequest.parse(json.loads(json.dumps(asked.transfer_params()))[FIELD]) == asked
    assert asked.handle_id == ONE


@pytest.mark.parametrize(
    "stated",
    [
        None,
        "avp:1:" + "a" * 32,
        {},
        {"load": ONE},
        {"load": ONE, "positions": 0},
        {"load": ONE, "positions": True},
        {"load": ONE, "positions": 4, "save": OTHER},
        {"load": "/etc/passwd", "positions": 4},
        {"save": "../" + ONE},
        {"save": 7},
        {"save": ONE, "path": "/tmp/kv"},
    ],
)
def test_anything_but_an_id_is_refused(stated: Any) -> None:
    with pytest.raises(ConfigurationError, match=FIELD):
        KvRequest.parse(stated)


def test_contexts_that_are_loaded_have_salts_of_their_own() -> None:
    salts = {KvRequest(load=handle, positions=1).salt for handle in (ONE, OTHER)}

    assert len(salts) == 2
    assert None not in salts
    assert KvRequest(load=ONE, positions=9).salt in salts
    assert KvRequest(save=ONE).salt is None


def test_a_prompt_begins_with_the_context_it_was_made_of() -> None:
    assert _start(LINEAGE).begins(LINEAGE, embed)
    assert _start(LINEAGE[:1]).begins(LINEAGE, embed)
    assert _start(LINEAGE, length=4).begins(LINEAGE, embed)
    assert _start((*LINEAGE, TokenSegment((10, 11))), length=8).begins(LINEAGE, embed)


def test_where_the_context_was_cut_into_segments_does_not_matter() -> None:
    cut = (TokenSegment((5,)), TokenSegment((6, 7)), *LINEAGE[1:])
    assert _start(LINEAGE).begins(cut, embed)


@pytest.mark.parametrize(
    "lineage",
    [
        (TokenSegment((5, 6, 1)), *LINEAGE[1:]),
        (*LINEAGE[:2], TokenSegment((8, 1))),
        (LINEAGE[0], LatentSegment(LATENTS + 1e-3, RECIPE), LINEAGE[2]),
        (TokenSegment((5, 6, 7, 1, 1, 1, 8, 9)),),
        (LINEAGE[0], LatentSegment(LATENTS[:2], RECIPE), TokenSegment((1, 8, 9))),
        LINEAGE[:2],
    ],
    ids=["token", "last token", "latents", "no latents", "fewer latents", "shorter"],
)
def test_another_context_is_told_apart(lineage: tuple[Segment, ...]) -> None:
    assert not _start(LINEAGE).begins(lineage, embed)


def test_a_token_that_was_sent_as_its_embedding_is_recognised_by_it() -> None:
    """Over HTTP, text that a tokenizer would cut otherwise is sent as input embeddings."""
    rows = torch.zeros(8, HIDDEN)
    rows[3:6] = LATENTS
    rows[1] = EMBEDDINGS[6]
    ids, mask = [5, 0, 7, 0, 0, 0, 8, 9], [True, False, True, False, False, False, True, True]
    sent = PromptStart.of(ids, mask, rows, 8)

    assert sent.begins(LINEAGE, embed)
    assert not sent.begins((TokenSegment((5, 8, 7)), *LINEAGE[1:]), embed)
    rows[1] = 0
    assert not PromptStart.of(ids, mask, rows, 8).begins(LINEAGE, embed)


def test_a_context_without_latents_is_told_by_its_tokens() -> None:
    text = Context(FINGERPRINT, "float32", (TokenSegment((5, 6, 7)),))

    assert _start(text.lineage).begins(text.lineage, embed)
    assert not _start(text.lineage).begins((TokenSegment((5, 6, 8)),), embed)
