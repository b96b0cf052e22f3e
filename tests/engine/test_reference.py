"""The judge is judged: the reference against transformers' own generation and against a cached loop in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from reference import Reference
from tiny_models import SLIDING, SUPPORTED, TinyModels
from transformers import DynamicCache

PROMPT = "What is the sum of 24 and 17? Think before you answer."


@pytest.mark.parametrize("family", SUPPORTED)
def test_greedy_decoding_is_what_transformers_generates(family: str, tiny: TinyModels) -> None:
    """Without latent steps the reference is `model.generate`."""
    reference = Reference(tiny.path(family))
    prompt = reference.render(PROMPT)

    answer = reference.generate(prompt, 16).token_ids

    generated = reference.model.generate(torch.tensor([prompt]), max_new_tokens=16, do_sample=False)
    assert answer == tuple(generated[0, len(prompt) :].tolist())


@pytest.mark.parametrize("family", SUPPORTED)
def test_latent_steps_are_those_of_a_cached_loop(family: str, tiny: TinyModels) -> None:
    """Running the whole sequence again for every position computes what a KV-cache computes."""
    reference = Reference(tiny.path(family), torch.float64)
    prompt = reference.render(PROMPT)

    thought = reference.think(prompt, 5, k=32)

    cached = cached_latent_loop(reference, prompt, 5, k=32)
    # norms and attention's softmax are float32 inside transformers, whatever the dtype
    torch.testing.assert_close(thought.embeddings, cached, rtol=0, atol=1e-6)


@torch.no_grad()
def cached_latent_loop(reference: Reference, prompt: list[int], steps: int, *, k: int) -> torch.Tensor:
    """`Reference.think` with transformers' own cache and nothing of the reference's."""
    model: Any = reference.model
    table = model.get_input_embeddings()(torch.arange(reference.vocabulary))
    cache, inputs, fed = DynamicCache(config=model.config), model.get_input_embeddings()(torch.tensor([prompt])), []
    for _ in range(steps):
        logits = model(inputs_embeds=inputs, cache=cache, use_cache=True).logits[0, -1, : reference.vocabulary]
        values, ids = logits.topk(k)
        fed.append(torch.softmax(values, -1) @ table[ids])
        inputs = fed[-1][None, None]
    return torch.stack(fed)


@pytest.mark.parametrize("family", SLIDING)
def test_the_windows_of_the_tiny_models_matter(family: str, tiny: TinyModels) -> None:
    """A sliding model answers otherwise without its window, so an engine that loses it is found out."""
    reference, windowless = Reference(tiny.path(family)), Reference(tiny.path(family))
    windowless.model.config.sliding_window = 10_000
    prompt = reference.render(PROMPT)

    assert reference.generate(prompt, 16).token_ids != windowless.generate(prompt, 16).token_ids


@pytest.mark.parametrize("family", SUPPORTED)
def test_the_positions_of_the_tiny_models_matter(family: str, tiny: TinyModels) -> None:
    """Two exchanged tokens far from the end change the next token's distribution clearly."""
    reference = Reference(tiny.path(family))
    prompt = reference.render(PROMPT)
    exchanged = [*prompt[:-9], prompt[-8], prompt[-9], *prompt[-7:]]

    change = reference.last(prompt)[0].log_softmax(-1) - reference.last(exchanged)[0].log_softmax(-1)

    assert change.abs().max() > 0.1


def test_the_tokenizer_is_smaller_than_the_padded_models_tables(tiny: TinyModels) -> None:
    """The padded model has rows that no token stands for, and counting them changes the latent steps."""
    reference, counting = Reference(tiny.path("padded")), Reference(tiny.path("padded"))
    counting.vocabulary = counting.model.config.vocab_size
    prompt = reference.render(PROMPT)

    assert len(reference.tokenizer) < reference.model.config.vocab_size
    assert not torch.allclose(reference.think(prompt, 1).embeddings, counting.think(prompt, 1).embeddings, rtol=0.1)
