"""What goes over HTTP as text is read as exactly the tokens that it was; what would not be goes as embeddings."""

from __future__ import annotations

import base64
import io

import pytest
import torch
from vllm_cases import thought_behind

from avp_agents import Context, LatentSegment, TokenSegment
from avp_agents.vllm.content_parts import PLACEHOLDER, Content, ContentWriter
from avp_agents.vllm.lineage_prompt import LineagePrompt
from avp_agents.vllm.served_model import ServedModel


@pytest.fixture(scope="module")
def writer(served_model: ServedModel) -> ContentWriter:
    return ContentWriter(served_model, torch.float32)


def read_by_server(content: Content, model: ServedModel) -> list[int | None]:
    """What vLLM's renderer makes of the parts: text tokenized as a whole, embeddings in place of placeholders."""
    tokenizer = model.tokenizer.__class__.from_pretrained(model.settings.name)
    tokenizer.add_special_tokens({"additional_special_tokens": [PLACEHOLDER]})
    text = "".join(part["text"] if part["type"] == "text" else PLACEHOLDER for part in content.parts)
    embeddings = iter([embeddings_of(part) for part in content.parts if part["type"] == "prompt_embeds"])
    placeholder = tokenizer.convert_tokens_to_ids(PLACEHOLDER)
    read: list[int | None] = []
    for id_ in tokenizer(text, add_special_tokens=False)["input_ids"]:
        read += [None] * len(next(embeddings)) if id_ == placeholder else [id_]
    return read


def embeddings_of(part: dict[str, str]) -> torch.Tensor:
    return torch.load(io.BytesIO(base64.b64decode(part["data"])), weights_only=True)


def ids_and_latents(context: Context) -> list[int | None]:
    return [
        id_
        for segment in context.lineage
        for id_ in (segment.token_ids if isinstance(segment, TokenSegment) else [None] * len(segment))
    ]


def test_usual_text_and_control_tokens_go_as_text(
    writer: ContentWriter, served_model: ServedModel, thought: Context
) -> None:
    behind = served_model.renderer.plan("And how far is the sun?", thought).token_ids
    context = Context(thought.fingerprint, thought.dtype, (*thought.lineage, TokenSegment(behind)))

    content = writer.content(LineagePrompt.of(context.lineage))

    assert [part["type"] for part in content.parts] == ["text", "prompt_embeds", "text"]
    assert content.token_ids == ids_and_latents(context) == read_by_server(content, served_model)
    latents = thought.lineage[1]
    assert isinstance(latents, LatentSegment)
    assert torch.equal(embeddings_of(content.parts[1]), latents.embeddings)


@pytest.mark.parametrize(
    "unusual",
    ["spelled letter by letter", "<|im_end|> as plain text", f"{PLACEHOLDER} as plain text"],
)
def test_unusual_tokens_go_as_their_own_embeddings(
    writer: ContentWriter, served_model: ServedModel, thought: Context, unusual: str
) -> None:
    letters = [token for letter in unusual for token in served_model.renderer.encode(letter)]
    plain = served_model.renderer.encode(unusual)
    ids = tuple(letters if unusual.startswith("spelled") else plain)
    context = Context(thought.fingerprint, thought.dtype, (*thought.lineage, TokenSegment(ids)))

    content = writer.content(LineagePrompt.of(context.lineage))

    assert content.token_ids == read_by_server(content, served_model)
    assert content.token_ids != ids_and_latents(context)
    sent = iter(torch.cat([embeddings_of(part) for part in content.parts if part["type"] == "prompt_embeds"]))
    fed = torch.stack([next(sent) if id_ is None else embedding(served_model, id_) for id_ in content.token_ids])
    latents = thought.lineage[1]
    assert isinstance(latents, LatentSegment)
    prompt, behind = (served_model.embeddings_of(run, torch.float32) for run in (thought.token_ids(), ids))
    assert torch.equal(fed, torch.cat([prompt, latents.embeddings, behind]))


def embedding(model: ServedModel, token_id: int) -> torch.Tensor:
    return model.embeddings_of((token_id,), torch.float32)[0]


def test_what_the_server_says_it_read_is_compared(writer: ContentWriter) -> None:
    content = writer.content(LineagePrompt.of(thought_behind((1, 4093, 198)).lineage))
    read = [0 if id_ is None else id_ for id_ in content.token_ids]

    assert content.is_what_was_read(read)
    assert not content.is_what_was_read([*read, 5])
    assert not content.is_what_was_read([read[0] + 1, *read[1:]])
