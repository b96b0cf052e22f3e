"""A prompt with embeddings as the content parts of a chat message, which is how vLLM's HTTP interface takes one.

The server makes token ids of text by itself. Not every sequence of ids is what its text is tokenized to: a model may
decode a word in unusual pieces, and a text that spells a control token is not that token. So the server's tokenizer is
run here first, and where its ids would differ, the tokens' own input embeddings are sent instead of their text. What
the server says it has read is compared once more.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from tokenizers import AddedToken, Tokenizer

from avp_agents.context import LatentSegment, TokenSegment
from avp_agents.vllm.lineage_prompt import LineagePrompt
from avp_agents.vllm.served_model import ServedModel

PLACEHOLDER = "<prompt_embeds>"
"""What the server puts in place of embeddings before it tokenizes; its tokenizer knows it as one token."""

TEMPLATE = "{% for message in messages %}{% for part in message['content'] %}{{ part['text'] }}{% endfor %}{% endfor %}"
"""A chat template that adds nothing: the prompt was rendered here, with the model's own."""

_ATTEMPTS = 8

Piece = tuple[int, ...] | torch.Tensor
"""Token ids, or embeddings ``[positions, hidden]``."""


@dataclass(frozen=True)
class Content:
    """One message's content.

    Attributes:
        parts: As the chat interface takes them.
        token_ids: What the server must come to; None where embeddings stand.
    """

    parts: list[dict[str, Any]]
    token_ids: list[int | None]

    def is_what_was_read(self, token_ids: Sequence[int]) -> bool:
        """Whether the server's ids are the prompt's."""
        if len(token_ids) != len(self.token_ids):
            return False
        return all(own is None or own == read for own, read in zip(self.token_ids, token_ids, strict=True))


class ContentWriter:
    """Writes prompts for one model's server. Safe to use from many threads.

    Args:
        model: The model.
        dtype: What vLLM holds it in.
    """

    def __init__(self, model: ServedModel, dtype: torch.dtype) -> None:
        self._model, self._dtype = model, dtype
        backend = cast("Any", model.tokenizer).backend_tokenizer
        self._tokenizer = Tokenizer.from_str(backend.to_str())
        self._tokenizer.add_special_tokens([AddedToken(PLACEHOLDER, special=True, normalized=False)])
        self._placeholder = self._tokenizer.token_to_id(PLACEHOLDER)

    def content(self, prompt: LineagePrompt) -> Content:
        """The content of a prompt.

        Raises:
            ModelNotFoundError: Its text has other token ids than the prompt, and the model's weights are not at hand.
            UnsupportedModelError: The same, and the model does more than look its input embeddings up.
        """
        pieces: list[Piece] = [_piece(segment) for segment in prompt.segments]
        for attempt in range(_ATTEMPTS + 1):
            changed = self._embedded(pieces, whole=attempt == _ATTEMPTS)
            if changed is None:
                break
            pieces = changed
        parts = [self._part(piece) for piece in pieces]
        token_ids: list[int | None] = []
        for piece in pieces:
            token_ids += [None] * len(piece) if isinstance(piece, torch.Tensor) else piece
        return Content(parts, token_ids)

    def _embedded(self, pieces: list[Piece], *, whole: bool) -> list[Piece] | None:
        """The pieces with embeddings where text would be read otherwise; None where all of it is read as it is.

        Args:
            pieces: In order.
            whole: Embed all of a run of text that is read otherwise, not only what differs.
        """
        text = "".join(PLACEHOLDER if isinstance(piece, torch.Tensor) else self._text(piece) for piece in pieces)
        read = self._runs(self._tokenizer.encode(text, add_special_tokens=False).ids)
        wanted = [piece for piece in pieces if not isinstance(piece, torch.Tensor)]
        if read == wanted:
            return None
        whole = whole or len(read) != len(wanted)  # some text spells the placeholder itself
        runs = iter(read)
        changed: list[Piece] = []
        for piece in pieces:
            if isinstance(piece, torch.Tensor) or ((theirs := next(runs, ())) == piece and not whole):
                changed.append(piece)
            else:
                changed += self._split(piece, theirs, whole=whole)
        return changed

    def _split(self, ids: tuple[int, ...], read: tuple[int, ...], *, whole: bool) -> list[Piece]:
        """A run of text with its middle, which is read otherwise, as embeddings."""
        start, stop = (0, len(ids)) if whole else _difference(ids, read)
        middle = self._model.embeddings_of(ids[start:stop], self._dtype)
        return [piece for piece in (ids[:start], middle, ids[stop:]) if len(piece)]

    def _runs(self, ids: Sequence[int]) -> list[tuple[int, ...]]:
        """The ids between placeholders; runs of none are left out."""
        runs: list[list[int]] = [[]]
        for id_ in ids:
            if id_ == self._placeholder:
                runs.append([])
            else:
                runs[-1].append(id_)
        return [tuple(run) for run in runs if run]

    def _text(self, ids: tuple[int, ...]) -> str:
        return self._tokenizer.decode(list(ids), skip_special_tokens=False)

    def _part(self, piece: Piece) -> dict[str, Any]:
        if not isinstance(piece, torch.Tensor):
            return {"type": "text", "text": self._text(piece)}
        buffer = io.BytesIO()
        torch.save(piece.to(self._dtype).contiguous(), buffer)
        return {"type": "prompt_embeds", "data": base64.b64encode(buffer.getvalue()).decode()}


def _piece(segment: TokenSegment | LatentSegment) -> Piece:
    return segment.token_ids if isinstance(segment, TokenSegment) else segment.embeddings


def _difference(ids: tuple[int, ...], read: tuple[int, ...]) -> tuple[int, int]:
    """Where ids are read otherwise, ``start:stop``, at least one id wide."""
    shorter = min(len(ids), len(read))
    start = next((i for i in range(shorter) if ids[i] != read[i]), shorter)
    behind = shorter - start
    same = next((i for i in range(behind) if ids[-1 - i] != read[-1 - i]), behind)
    start = min(start, len(ids) - 1)
    return start, max(start + 1, len(ids) - same)
