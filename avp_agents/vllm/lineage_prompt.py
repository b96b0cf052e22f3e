"""A lineage as vLLM's prompt: token ids, and embeddings at the positions of latent steps.

Only the latent embeddings are of the context; the rows of the other positions are zeros that vLLM does not look at. Its
prefix cache hashes them with the ids, so contexts that differ in their latents only are never taken for one another.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from avp_agents.context import LatentSegment, Segment, SplicedSegment, TokenSegment
from avp_agents.errors import UnsupportedModelError
from avp_agents.lineage import concatenated


@dataclass(frozen=True, eq=False)
class LineagePrompt:
    """What is prefilled, in order.

    Attributes:
        segments: Token ids and latent embeddings; none of them is empty, and token segments do not stand side by side.
    """

    segments: tuple[TokenSegment | LatentSegment, ...]

    @classmethod
    def of(cls, lineage: Sequence[Segment]) -> LineagePrompt:
        """The prompt for a lineage.

        Raises:
            UnsupportedModelError: It has splices: vLLM computes every position behind all positions before it.
        """
        segments: list[TokenSegment | LatentSegment] = []
        for segment in concatenated(lineage):
            if isinstance(segment, SplicedSegment):
                raise UnsupportedModelError(
                    "The context was joined by strategy='splice', and vLLM cannot compute positions that do not see "
                    "all of those before them. Join the contexts with strategy='replay', or go on with a LatentEngine."
                )
            segments.append(segment)
        return cls(tuple(segments))

    def __len__(self) -> int:
        return sum(len(segment) for segment in self.segments)

    @property
    def is_text(self) -> bool:
        """Whether there are token ids only."""
        return all(isinstance(segment, TokenSegment) for segment in self.segments)

    def token_ids(self, placeholder: int | None = None) -> list[int]:
        """One id per position.

        Args:
            placeholder: Stands at latent positions; None repeats a token of the prompt, so that a repetition penalty
                sees no token that is not there.
        """
        if placeholder is None:
            placeholder = next((s.token_ids[0] for s in self.segments if isinstance(s, TokenSegment)), 0)
        ids: list[int] = []
        for segment in self.segments:
            ids += segment.token_ids if isinstance(segment, TokenSegment) else [placeholder] * len(segment)
        return ids

    def is_token(self) -> list[bool]:
        """Per position, whether its token id counts."""
        return [isinstance(segment, TokenSegment) for segment in self.segments for _ in range(len(segment))]

    def embeddings(self, dtype: torch.dtype) -> torch.Tensor:
        """``[positions, hidden]``: the latent embeddings in their places, zeros elsewhere."""
        hidden = next(s.embeddings.shape[1] for s in self.segments if isinstance(s, LatentSegment))
        rows = torch.zeros(len(self), hidden, dtype=dtype)
        start = 0
        for segment in self.segments:
            if isinstance(segment, LatentSegment):
                rows[start : start + len(segment)] = segment.embeddings
            start += len(segment)
        return rows
