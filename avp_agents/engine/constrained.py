"""Sampling under a grammar."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from typing_extensions import override

from avp_agents.answer.grammar import Constraint
from avp_agents.engine.core.sampling import RowSampler, SamplingParams


class ConstrainedSampler(RowSampler):
    """A `RowSampler` whose tokens a constraint allows.

    Args:
        params, prompt_ids: As for `RowSampler`.
        constraint: What the answer may be.
    """

    masks = True

    def __init__(self, params: SamplingParams, prompt_ids: Iterable[int], constraint: Constraint) -> None:
        super().__init__(params, prompt_ids)
        self._constraint = constraint

    @override
    def takes(self, most_likely: int) -> bool:
        return super().takes(most_likely) and self._constraint.allows(most_likely)

    @override
    def settled(self, token_id: int) -> int:
        settled = self._constraint.settled(token_id)
        self.was_cut = self._constraint.was_cut
        return settled

    @override
    def accept(self, token_id: int) -> None:
        super().accept(token_id)
        self._constraint.accept(token_id)

    @override
    def masked(self, scores: torch.Tensor) -> torch.Tensor:
        allowed = torch.from_numpy(self._constraint.mask(len(scores))).to(scores.device)
        return scores.masked_fill(~allowed, -math.inf)
