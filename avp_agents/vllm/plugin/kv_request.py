"""The caller's side of moving keys and values: what a request may ask the store connector for.

A request names contexts by the ids of their handles, never by paths. Over HTTP it stands in ``kv_transfer_params``,
with the salt in ``cache_salt``. Needs no vLLM.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from avp_agents.context import LatentSegment, Segment, TokenSegment
from avp_agents.errors import ConfigurationError
from avp_agents.handle import HANDLE_ID

FIELD = "avp_kv"
"""The key of ``kv_transfer_params`` under which request and answer stand."""
CONNECTOR = "StoreConnector"


@dataclass(frozen=True)
class KvRequest:
    """What is to be moved.

    Attributes:
        load: Id of a stored context that the prompt begins with, whose keys and values take the prefill's place.
        positions: How many of them.
        save: Id of the stored context that the prompt is, whose keys and values go to the store.

    Raises:
        ConfigurationError: It is neither, or an id or a number is malformed.
    """

    load: str | None = None
    positions: int = 0
    save: str | None = None

    def __post_init__(self) -> None:
        handle_id = self.handle_id
        if (self.load is None) == (self.save is None) or not HANDLE_ID.fullmatch(str(handle_id)):
            raise ConfigurationError(f"{FIELD} names one context, to 'load' or to 'save', by its handle's id.")
        if self.load is not None and (type(self.positions) is not int or self.positions < 1):
            raise ConfigurationError(f"{FIELD} loads at least one position, not {self.positions!r}.")

    @classmethod
    def parse(cls, stated: Any) -> KvRequest:
        """What a request's `FIELD` says.

        Raises:
            ConfigurationError: It is malformed.
        """
        if not isinstance(stated, Mapping) or stated.keys() not in ({"load", "positions"}, {"save"}):
            raise ConfigurationError(f"{FIELD} is an object with 'load' and 'positions', or with 'save'.")
        return cls(**stated)

    @property
    def handle_id(self) -> str | None:
        """The context's."""
        return self.load if self.load is not None else self.save

    @property
    def salt(self) -> str | None:
        """The ``cache_salt`` that a loading request needs.

        What was loaded gets into vLLM's prefix cache. The salt keeps it from requests that begin with the same ids and
        did not ask for it, and from those that ask for another context.
        """
        return None if self.load is None else hashlib.sha256(f"{FIELD}:{self.load}".encode()).hexdigest()

    def transfer_params(self) -> dict[str, Any]:
        """For ``kv_transfer_params``."""
        asked = {"save": self.save} if self.load is None else {"load": self.load, "positions": self.positions}
        return {FIELD: asked}


@dataclass(frozen=True, eq=False)
class PromptStart:
    """The first positions of a prompt as vLLM has it, to be compared with the lineage of the context it names.

    Attributes:
        token_ids: One per position.
        is_token: Per position, whether the id counts; elsewhere there is an embedding.
        embeddings: ``[positions without a token, hidden]``, in order.
    """

    token_ids: list[int]
    is_token: list[bool]
    embeddings: torch.Tensor | None

    @classmethod
    def of(
        cls, token_ids: Sequence[int], is_token: Sequence[bool] | None, embeddings: torch.Tensor | None, length: int
    ) -> PromptStart:
        """Of a request of vLLM's: ids ``[n]``, mask ``[n]`` (None: all are tokens), embeddings ``[n, hidden]``."""
        mask = [True] * length if is_token is None else list(is_token[:length])
        rows = None
        if embeddings is not None and not all(mask):
            rows = embeddings[:length][torch.tensor(mask).logical_not()].clone()
        return cls(list(token_ids[:length]), mask, rows)

    def __len__(self) -> int:
        return len(self.token_ids)

    def begins(self, lineage: Sequence[Segment], embed: Callable[[tuple[int, ...]], torch.Tensor]) -> bool:
        """Whether a lineage begins with these positions.

        Args:
            lineage: A context's.
            embed: The model's input embeddings ``[n, hidden]`` of token ids. Over HTTP, a token may have been sent as
                its own (`content_parts`).
        """
        ids: list[int | None] = []
        latents: list[torch.Tensor] = []
        for segment in lineage:
            room = len(self) - len(ids)
            if not room:
                break
            if isinstance(segment, TokenSegment):
                ids += segment.token_ids[:room]
            elif isinstance(segment, LatentSegment):
                latents += segment.embeddings[:room]
                ids += [None] * min(room, len(segment))
            else:
                return False
        if len(ids) < len(self):
            return False
        if any(
            counts and own != stated for own, stated, counts in zip(ids, self.token_ids, self.is_token, strict=True)
        ):
            return False
        embedded = [own for own, counts in zip(ids, self.is_token, strict=True) if not counts]
        return self._holds(embedded, latents, embed)

    def _holds(
        self,
        embedded: Sequence[int | None],
        latents: Sequence[torch.Tensor],
        embed: Callable[[tuple[int, ...]], torch.Tensor],
    ) -> bool:
        """Whether the embeddings are those of these tokens, and where there is none (None), the latents in order."""
        if self.embeddings is None or not embedded:
            return not embedded
        tokens = tuple(own for own in embedded if own is not None)
        of_tokens, of_latents = iter(embed(tokens) if tokens else ()), iter(latents)
        rows = [next(of_latents if own is None else of_tokens) for own in embedded]
        return torch.equal(self.embeddings, torch.stack(rows).to(self.embeddings.dtype))
