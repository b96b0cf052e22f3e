"""The promises of every context store, as a pytest class. A backend passes it or it is not one.

>>> class TestMyStore(ContextStoreConformance):
...     def make_store(self, **options):
...         return MyStore("redis://localhost", **options)

It needs neither an engine nor a model: contexts are made of small random tensors.
"""

from avp_agents.testing.store_lifetimes import StoreLifetimes
from avp_agents.testing.store_values import StoreValues


class ContextStoreConformance(StoreValues, StoreLifetimes):
    """Subclass it, name it ``Test...``, and override `make_store`."""
