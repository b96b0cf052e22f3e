"""What the protocol's tests share: a context with everything that a frame can carry, and its frame."""

from __future__ import annotations

import pytest
from frame_samples import KEY

from avp_agents.context import Context
from avp_agents.protocol import encode_context
from avp_agents.testing.contexts import make_context


@pytest.fixture
def context() -> Context:
    """Lineage with latents, readout, KV-cache."""
    return make_context(seed=1)


@pytest.fixture
def frame_bytes(context: Context) -> bytearray:
    """The frame of `context`."""
    return bytearray(encode_context(context, key=KEY).assemble())
