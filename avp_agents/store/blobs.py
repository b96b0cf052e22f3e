"""The backends of a durable store: named bytes of one namespace, and an order among its writers.

Small blobs are named ``kind/id``: ``handles``, ``pins``, ``segments``, ``kv`` (what a payload holds and which it is)
and ``payloads`` (its bytes, where another server keeps it).
Payloads, the KV-caches themselves, may be hundreds of megabytes; they have a name of their own for each writing, so
they never change and are written without holding anybody up.
"""

from __future__ import annotations

import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from threading import Event, Lock, Thread
from typing import ClassVar, Literal
from urllib.parse import urlsplit, urlunsplit

from avp_agents.errors import IntegrityError, StoreUnavailableError

log = logging.getLogger(__name__)

Kind = Literal["handles", "pins", "segments", "kv", "payloads"]

PAYLOAD_CHUNK = 8 << 20
"""Payloads cross the network in requests of this many bytes."""

PAUSE = 5.0
"""Seconds for which a server that did not answer is not asked again."""


class Blobs(ABC):
    """One namespace's bytes in a folder or on a server. Thread-safe.

    Every method raises `StoreUnavailableError` where a server does not answer in time or refuses, `StoreError` where a
    file system does.

    Args:
        place: Where they are, for messages; without credentials.

    Attributes:
        place: As given.
        integrity_failures: Records found torn or altered through this object.
        cheap_to_read: Whether `prune` can afford to read every record, to find those that are torn.
    """

    cheap_to_read: ClassVar[bool] = False

    def __init__(self, place: str) -> None:
        self.place = place
        self.integrity_failures = 0
        self._count_lock = Lock()

    def report(self, what: str, reason: IntegrityError) -> None:
        """Count and log a record that will be treated as absent."""
        with self._count_lock:
            self.integrity_failures += 1
        log.warning("%s in %s is torn or altered (%s); it is treated as absent.", what, self.place, reason)

    @abstractmethod
    def read(self, names: Sequence[str]) -> list[bytes | None]:
        """Small blobs, in this order; None where there is none."""

    @abstractmethod
    def existing(self, names: Sequence[str]) -> set[str]:
        """Those of the small blobs that are there."""

    @abstractmethod
    def add(self, blobs: Mapping[str, bytes]) -> set[str]:
        """Write those small blobs that are not there yet, and say which. Within `writing`.

        Nobody finds a handle among them without all that came before it.
        """

    @abstractmethod
    def write(self, blobs: Mapping[str, bytes]) -> None:
        """Write or replace small blobs; whoever reads one finds the old bytes or the new. Within `writing`."""

    @abstractmethod
    def remove(self, names: Sequence[str]) -> None:
        """Remove small blobs, in this order, where they are there. Within `removing`; ``payloads`` also `writing`."""

    @abstractmethod
    def sizes(self, kind: Kind) -> dict[str, int]:
        """Bytes of all small blobs of a kind, by id."""

    def ids(self, kind: Kind) -> list[str]:
        """All small blobs of a kind."""
        return list(self.sizes(kind))

    @abstractmethod
    def use(self, handle_id: str) -> None:
        """Note a handle's use as of now."""

    @abstractmethod
    def uses(self, handle_id: str | None = None) -> dict[str, float]:
        """When handles (one, or all) were last used, by the clock of `now`."""

    def forget_uses(self, handle_ids: Sequence[str]) -> None:  # noqa: B027  (nothing to do where uses go with handles)
        """Forget when handles were used. Within `removing`."""

    def now(self) -> float:
        """Seconds since the epoch; by this machine's clock, unless the place has one."""
        return time.time()

    @abstractmethod
    def writing(self) -> AbstractContextManager[None]:
        """Held while blobs are written: nobody is within `removing` meanwhile, but others may be within `writing`."""

    def removing(self) -> AbstractContextManager[None]:
        """Held while blobs are removed: nobody else is within `writing` or `removing` meanwhile. Includes `writing`.

        The same as `writing` where only one writes at a time.
        """
        return self.writing()

    def close(self) -> None:  # noqa: B027  (a folder holds nothing open)
        """Close connections."""


class Payloads(ABC):
    """Where a namespace's payloads lie. Thread-safe; raises as `Blobs` does."""

    @abstractmethod
    def read_payload(self, name: str, size: int) -> bytearray | None:
        """A payload of `size` bytes; None unless it is there in that size."""

    @abstractmethod
    def write_payload(self, name: str, size: int, chunks: Iterable[bytes | memoryview]) -> None:
        """Write `size` bytes under a new name. What a killed writer leaves goes away after a while."""

    def keep_payload(self, name: str, size: int) -> None:  # noqa: B027  (nothing to do where what is young is spared)
        """The payload is about to be referred to. Within `Blobs.writing`."""

    @abstractmethod
    def remove_payloads(self, names: Sequence[str]) -> None:
        """Remove payloads where they are there. Within `Blobs.writing`."""

    @abstractmethod
    def payload_sizes(self) -> dict[str, int]:
        """Bytes of all payloads, by name."""

    def remove_abandoned(self, referred: set[str]) -> None:
        """Remove payloads that nothing refers to, unless something may yet. Within `Blobs.removing`.

        Whoever is still writing a payload has not kept it yet, so that it is not among those that have a size.
        """
        self.remove_payloads([name for name in self.payload_sizes() if name not in referred])

    @abstractmethod
    def close(self) -> None:
        """Close connections."""


@contextmanager
def renewed(renew: Callable[[], bool], every: float) -> Iterator[None]:
    """Renew a lease on a thread of its own until the block ends, or until `renew` says that it is no longer ours."""
    done = Event()

    def keep() -> None:
        while not done.wait(every):
            try:
                if not renew():
                    return
            except StoreUnavailableError:
                return

    thread = Thread(target=keep, name="avp-store-lease", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


class Reachability:
    """Turns a server's errors into `StoreUnavailableError`, and after one leaves the server alone for `PAUSE` seconds.

    A graph that goes on without the store then waits for one timeout, not for one at each of its steps.
    """

    def __init__(self, place: str, errors: tuple[type[BaseException], ...]) -> None:
        self._place, self._errors = place, errors
        self._lock = Lock()
        self._silent_until = 0.0

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Around every request.

        Raises:
            StoreUnavailableError: The request failed, or one did less than `PAUSE` seconds ago.
        """
        with self._lock:
            left = self._silent_until - time.monotonic()
        if left > 0:
            raise StoreUnavailableError(
                f"{self._place} did not answer and is asked again in {left:.1f} s. Check that it runs."
            )
        try:
            yield
        except self._errors as error:
            with self._lock:
                self._silent_until = time.monotonic() + PAUSE
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            raise StoreUnavailableError(
                f"{self._place} cannot be used: {reason}. Check that it runs, and address and credentials."
            ) from error


def rechunked(parts: Iterable[bytes | memoryview], size: int) -> Iterator[bytes]:
    """The same bytes in pieces of `size`, the last one perhaps shorter."""
    pending = bytearray()
    for part in parts:
        view = memoryview(part).cast("B")
        while len(pending) + len(view) >= size:
            taken = size - len(pending)
            yield bytes(pending) + bytes(view[:taken])
            pending.clear()
            view = view[taken:]
        pending += view
    if pending:
        yield bytes(pending)


def gathered(size: int, chunk: Callable[[int], bytes | None]) -> bytearray | None:
    """The `size` bytes whose pieces of `PAYLOAD_CHUNK` are `chunk(0)`, `chunk(1)`, ...; None unless all are there."""
    data = bytearray(size)
    for index, start in enumerate(range(0, size, PAYLOAD_CHUNK)):
        piece = chunk(index)
        if piece is None or len(piece) != min(PAYLOAD_CHUNK, size - start):
            return None
        data[start : start + len(piece)] = piece
    return data


def in_batches(items: Sequence[str], size: int = 1000) -> Iterator[Sequence[str]]:
    """Items in runs of at most `size`."""
    for start in range(0, len(items), size):
        yield items[start : start + size]


def redacted(url: str) -> str:
    """A URL as it may be shown: without user, password and query."""
    parts = urlsplit(url)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))
