"""Vocabulary-mediated projection is the expected input embedding under the shared, renormalised distribution."""

from __future__ import annotations

import pytest
import torch

from avp_agents.crossing import ByteDistribution, Projector, TokenBytes, express, shared_vocabulary
from avp_agents.errors import ProjectionError

MEAN_NORM = 3.0
SOURCE = TokenBytes((b"a", None, b"b", b"c"))
TARGET = TokenBytes((b"c", b"b", None, b"x"))
TABLE = torch.tensor([[1.0, 0.0, 0.0], [0.0, 2.0, 0.0], [9.0, 9.0, 9.0], [0.0, 0.0, 5.0]])


@pytest.fixture
def project() -> Projector:
    return Projector(TARGET, lambda ids: TABLE[ids], MEAN_NORM, torch.device("cpu"))


def test_a_readout_is_expressed_in_bytes() -> None:
    """Tokens without bytes are left out with their probability; the order stays."""
    assert express(SOURCE, [1, 3, 2], [0.5, 0.3, 0.1]) == ByteDistribution((b"c", b"b"), (0.3, 0.1))


def test_the_vector_is_the_expected_embedding_at_the_mean_norm(project: Projector) -> None:
    """Only shared bytes count; what they leave out is told as the missing mass."""
    found = project([ByteDistribution((b"a", b"c", b"b"), (0.4, 0.3, 0.1))])

    expected = 0.75 * TABLE[0] + 0.25 * TABLE[1]
    assert torch.allclose(found.embeddings[0], expected * MEAN_NORM / expected.norm())
    assert found.mass[0] == pytest.approx(0.4)


def test_several_distributions_are_several_vectors(project: Projector) -> None:
    """In order, each at the mean norm."""
    found = project([ByteDistribution((b"c",), (0.2,)), ByteDistribution((b"b",), (1.0,))])

    assert torch.allclose(found.embeddings, torch.tensor([[3.0, 0.0, 0.0], [0.0, 3.0, 0.0]]))


def test_nothing_in_common_is_an_error(project: Projector) -> None:
    """There is no vector to make."""
    with pytest.raises(ProjectionError, match="None of the tokens"):
        project([ByteDistribution((b"a",), (1.0,))])


def test_a_hidden_state_projects_like_its_whole_distribution(project: Projector) -> None:
    """Where the source's head is at hand: softmax over all its rows, restricted to the shared ones."""
    head = torch.randn(4, 5, generator=torch.Generator().manual_seed(0))
    hidden = torch.randn(2, 5, generator=torch.Generator().manual_seed(1))
    whole = torch.softmax(hidden @ head.T, dim=-1)

    found = project.from_hidden(hidden, head, shared_vocabulary(SOURCE, TARGET))

    told = project([express(SOURCE, range(4), row.tolist()) for row in whole])
    assert torch.allclose(found.embeddings, told.embeddings, atol=1e-6)
    assert found.mass == pytest.approx(told.mass)
