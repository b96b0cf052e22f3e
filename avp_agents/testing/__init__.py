"""Suites that other implementations run against themselves.

>>> from avp_agents.testing import ContextStoreConformance
>>> class TestMyStore(ContextStoreConformance):
...     def make_store(self, **options):
...         return MyStore("redis://localhost", **options)
"""

from avp_agents.testing.contexts import make_context
from avp_agents.testing.store_conformance import ContextStoreConformance

__all__ = ["ContextStoreConformance", "make_context"]
