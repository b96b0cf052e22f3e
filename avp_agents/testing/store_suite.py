"""The ground that the parts of the store suite stand on: stores to test, and namespaces."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

import pytest

from avp_agents.store import ContextStore, Namespace
from avp_agents.testing.contexts import make_context

TENANT = Namespace("tenant", b"k" * 32)
SAME_NAME_OTHER_KEY = Namespace("tenant", b"x" * 32)
OTHER_NAME = Namespace("other", b"k" * 32)
SHORT_TTL = 0.5


class StoreSuite(ABC):
    """Where the stores under test come from."""

    @abstractmethod
    def make_store(self, **options: Any) -> ContextStore:
        """A store over this test's own backend.

        Called several times in some tests: stores of one namespace may then share what they hold, stores of different
        namespaces must not. A test begins with an empty backend.

        Args:
            options: ``namespace`` (a `Namespace`, always), ``byte_budget`` and ``ttl`` (some tests).
        """

    @pytest.fixture
    def store(self) -> Iterator[ContextStore]:
        """An unbounded store that keeps what it has."""
        store = self.make_store(namespace=TENANT)
        yield store
        store.close()

    def size_of_one(self, *, kv: bool = True) -> int:
        """Bytes that count against `byte_budget` for one context of `make_context`'s default size."""
        probe = self.make_store(namespace=Namespace("probe", b"p" * 32))
        handle = probe.put(make_context(), kv=kv)
        stats = probe.stats()
        probe.delete(handle)
        probe.close()
        return stats.lineage_bytes + stats.kv_bytes
