"""Vocabulary-mediated projection: from what the source was about to say to input embeddings of the target.

    e = Σ p(b) E[id(b)],  then scaled to the mean norm of the target's input embeddings

p is the source's next-token distribution over the byte strings b that the target has a token for, renormalised; E are
the target's own input embeddings. Nothing is trained, and one vector holds about as much as one token can.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from avp_agents.crossing.thought import MAX_PIECE, MAX_TOKENS, ByteDistribution
from avp_agents.crossing.token_bytes import TokenBytes
from avp_agents.errors import ProjectionError

if TYPE_CHECKING:
    import torch

    from avp_agents.crossing.vocabulary import SharedVocabulary


def express(vocabulary: TokenBytes, token_ids: Sequence[int], probabilities: Sequence[float]) -> ByteDistribution:
    """A next-token distribution as bytes; tokens that stand for none are left out, and their probability with them.

    Args:
        vocabulary: The source's.
        token_ids: Likeliest first.
        probabilities: Theirs, of the whole distribution.
    """
    rows = [
        (piece, probability)
        for id_, probability in zip(token_ids, probabilities, strict=True)
        if (piece := vocabulary.pieces[id_]) is not None and len(piece) <= MAX_PIECE
    ][:MAX_TOKENS]
    return ByteDistribution(tuple(piece for piece, _ in rows), tuple(float(p) for _, p in rows))


@dataclass(frozen=True, eq=False)
class Projection:
    """Input embeddings of the target.

    Attributes:
        embeddings: ``[n, hidden]`` float32.
        mass: ``[n]``, how much of the source's probability each one stands for, 0 to 1.
    """

    embeddings: torch.Tensor
    mass: tuple[float, ...]


class Projector:
    """Makes input embeddings of one target model.

    Args:
        vocabulary: The target's.
        embed: Ids ``[...]`` to input embeddings ``[..., hidden]``, the architecture's scale included.
        mean_norm: Mean norm of those embeddings over the vocabulary.
        device: Where they are.
    """

    def __init__(
        self,
        vocabulary: TokenBytes,
        embed: Callable[[torch.Tensor], torch.Tensor],
        mean_norm: float,
        device: torch.device,
    ) -> None:
        self._vocabulary, self._embed, self._mean_norm, self._device = vocabulary, embed, mean_norm, device

    def __call__(self, distributions: Sequence[ByteDistribution]) -> Projection:
        """One vector per distribution.

        Raises:
            ProjectionError: A distribution names no token that the target has.
        """
        import torch

        vectors, masses = [], []
        for distribution in distributions:
            ids, weights = self._matched(distribution)
            rows = self._embed(torch.tensor(ids, device=self._device)).float()
            vectors.append(torch.tensor(weights, device=self._device) @ rows)
            masses.append(float(sum(weights)))
        return Projection(self._scaled(torch.stack(vectors)), tuple(masses))

    def from_hidden(self, hidden: torch.Tensor, head: torch.Tensor, shared: SharedVocabulary) -> Projection:
        """The same from hidden states, over the whole shared vocabulary, where the source's head is at hand.

        Args:
            hidden: ``[n, source hidden]``, the source's last hidden states after the final norm.
            head: ``[source rows, source hidden]``, the source's output head. Logits are hidden @ headᵀ: for models
                whose head path scales or caps logits, use their readout's distribution.
            shared: The pair's, source to target.
        """
        import torch

        source_ids = torch.from_numpy(shared.source_ids.astype(np.int64)).to(head.device)
        target_ids = torch.from_numpy(shared.target_ids.astype(np.int64))
        logits = hidden.to(head.device).float() @ head.float().T
        whole = torch.softmax(logits, dim=-1)[:, source_ids]
        mass = whole.sum(dim=-1, keepdim=True)
        mixed = (whole / mass).to(self._device) @ self._embed(target_ids.to(self._device)).float()
        return Projection(self._scaled(mixed), tuple(mass[:, 0].tolist()))

    def _matched(self, distribution: ByteDistribution) -> tuple[list[int], list[float]]:
        ids = self._vocabulary.ids
        pairs = [
            (ids[piece], probability)
            for piece, probability in zip(distribution.pieces, distribution.probabilities, strict=True)
            if piece in ids and probability > 0
        ]
        if not pairs:
            raise ProjectionError(
                "None of the tokens that the source was about to say exists in this model's vocabulary; hand its text "
                "over instead."
            )
        return [id_ for id_, _ in pairs], [probability for _, probability in pairs]

    def _scaled(self, vectors: torch.Tensor) -> torch.Tensor:
        return vectors * (self._mean_norm / vectors.norm(dim=-1, keepdim=True).clamp_min(1e-6))
