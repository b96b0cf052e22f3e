"""Contexts in an object storage: S3, Google Cloud Storage, Azure Blob Storage, or a folder."""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from typing import Any, TypeVar
from urllib.parse import urlsplit

from typing_extensions import override

from avp_agents.errors import ConfigurationError, StoreUnavailableError
from avp_agents.store.blobs import PAYLOAD_CHUNK, Blobs, Kind, Payloads, Reachability, rechunked, redacted, renewed
from avp_agents.store.checked_blobs import CheckedBlobs
from avp_agents.store.encryption import Encryption
from avp_agents.store.kv_shares import PayloadShares
from avp_agents.store.namespace import Namespace
from avp_agents.store.record_store import RecordStore

SCHEMES = ("s3", "gs", "az", "file")
LEASE_SECONDS = 20.0
"""A killed process's lock is free once others have watched it unchanged for this long."""

ABANDONED_SECONDS = 3600.0
"""A payload that nothing refers to after this long was left by a killed writer."""

_REMOVING = "locks/removing"
_POLL_SECONDS = 0.05
_CONNECTIONS = 8

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


class ObjectStore(RecordStore):
    """Keeps contexts in a bucket: durable, large and cheap, some tens of milliseconds for each request.

    Any number of workers write at the same time; whoever removes waits for them, and they for it. KV-caches are
    uploaded in parts and read in ranges, several at once. Workers' clocks should agree to within a second.

    Args:
        url: ``s3://bucket/prefix``, ``gs://bucket/prefix``, ``az://account/container/prefix`` or ``file:///folder``.
        namespace, byte_budget, ttl: See `RecordStore`. `delete` and a `byte_budget` that is reached list the namespace;
            with thousands of contexts, rather let `prune` or `discard` remove many at once.
        encryption: Seals everything that goes to the storage.
        max_kv_bytes: KV-caches larger than this are not kept. By default all are.
        options: The storage's own settings and credentials by obstore's names, as ``{"region": "eu-central-1"}`` or
            ``{"endpoint": "http://localhost:9000"}``. What is not given comes from the environment (``AWS_...``,
            ``GOOGLE_...``, ``AZURE_...``).
        timeout: Seconds for one request. Larger transfers are several requests.

    Raises:
        ConfigurationError: The URL or an option is unknown, or the package ``obstore`` is missing.

    Example:
        >>> store = ObjectStore("s3://contexts/team-a", namespace="team-a", encryption=Encryption.from_environment())
    """

    def __init__(
        self,
        url: str,
        *,
        namespace: Namespace | str = "default",
        byte_budget: int | None = None,
        ttl: float | None = None,
        max_kv_bytes: int | None = None,
        encryption: Encryption | None = None,
        options: Mapping[str, Any] | None = None,
        timeout: float = 10.0,
    ) -> None:
        tenant = Namespace.of(namespace)
        blobs = ObjectBlobs(url, tenant, options or {}, timeout)
        records = CheckedBlobs(blobs, tenant, encryption)
        super().__init__(
            records, PayloadShares(records, blobs), byte_budget=byte_budget, ttl=ttl, max_kv_bytes=max_kv_bytes
        )


class ObjectBlobs(Blobs, Payloads):
    """A namespace's objects, below ``<name>-<tag>/``.

    <kind>/<id>                 a small blob
    payload/<name>              a payload
    uses/<id>/<16 hex>          empty; that handle was used then, in microseconds since the epoch
    locks/writing/<random>      somebody adds
    locks/removing              somebody removes
    """

    def __init__(self, url: str, namespace: Namespace, options: Mapping[str, Any], timeout: float) -> None:
        try:
            import obstore
            from obstore.exceptions import BaseError
            from obstore.store import from_url
        except ModuleNotFoundError as error:
            raise ConfigurationError(
                'ObjectStore needs obstore. Install it with: pip install "avp-agents[objects]"'
            ) from error
        self._api: Any = obstore
        super().__init__(redacted(url))
        try:
            self._store: Any = _open(from_url, url, options, timeout)
        except (BaseError, ValueError, TypeError) as error:
            raise ConfigurationError(
                f"{self.place!r} cannot be opened: {error} Write s3://bucket/prefix, gs://..., az://... or file:///..."
            ) from error
        self._root = f"{namespace.name}-{namespace.tag[:8]}/"
        self._asking = Reachability(self.place, (BaseError, OSError))
        self._timeout = timeout
        self._workers = ThreadPoolExecutor(_CONNECTIONS, thread_name_prefix="avp-objects")
        self._held = threading.local()
        self._last_marks: dict[str, str] = {}

    @override
    def read(self, names: Sequence[str]) -> list[bytes | None]:
        """Several at once."""
        return self._at_once(self._get, names)

    @override
    def existing(self, names: Sequence[str]) -> set[str]:
        """Several at once."""
        return {name for name, entry in zip(names, self._at_once(self._head, names), strict=True) if entry is not None}

    @override
    def add(self, blobs: Mapping[str, bytes]) -> set[str]:
        """Segments at once, then handles."""
        added: set[str] = set()
        for are_handles in (False, True):
            names = [name for name in blobs if name.startswith("handles/") is are_handles]
            self._check_lease()
            created = self._at_once(lambda name: self._create(name, blobs[name]), names)
            added |= {name for name, new in zip(names, created, strict=True) if new}
        return added

    @override
    def write(self, blobs: Mapping[str, bytes]) -> None:
        """Several at once."""
        self._check_lease()
        self._at_once(lambda name: self._put(name, blobs[name]), blobs)

    @override
    def remove(self, names: Sequence[str]) -> None:
        """Kind by kind, many in one request."""
        for kind in dict.fromkeys(name.partition("/")[0] for name in names):
            self._check_lease()
            self._delete([name for name in names if name.startswith(f"{kind}/")])

    @override
    def sizes(self, kind: Kind) -> dict[str, int]:
        return {name: entry["size"] for name, entry in self._list(kind).items()}

    @override
    def use(self, handle_id: str) -> None:
        """The mark that this process left before is removed, others' when handles are."""
        mark = f"uses/{handle_id}/{time.time_ns() // 1000:016x}"
        self._put(mark, b"")
        before = self._last_marks.get(handle_id)
        self._last_marks[handle_id] = mark
        if before is not None and before != mark:
            self._delete([before])

    @override
    def uses(self, handle_id: str | None = None) -> dict[str, float]:
        found: dict[str, float] = {}
        folder = "uses" if handle_id is None else f"uses/{handle_id}"
        for name in self._list(folder):
            own_id, _, moment = f"{handle_id}/{name}".rpartition("/") if handle_id else name.rpartition("/")
            found[own_id] = max(int(moment, 16) / 1e6, found.get(own_id, 0.0))
        return found

    @override
    def forget_uses(self, handle_ids: Sequence[str]) -> None:
        if handle_ids:
            gone = set(handle_ids)
            self._delete([f"uses/{name}" for name in self._list("uses") if name.partition("/")[0] in gone])
            for handle_id in gone:
                self._last_marks.pop(handle_id, None)

    @override
    def read_payload(self, name: str, size: int) -> bytearray | None:
        """In ranges, several at once."""
        path, data = f"{self._root}payload/{name}", bytearray(size)

        def fetch(start: int) -> bool:
            stop = min(start + PAYLOAD_CHUNK, size)
            with self._asking(), suppress(FileNotFoundError):
                found = memoryview(self._api.get_range(self._store, path, start=start, end=stop))
                if len(found) == stop - start:
                    data[start:stop] = found
                    return True
            return False

        return data if all(self._at_once(fetch, range(0, size, PAYLOAD_CHUNK))) else None

    @override
    def write_payload(self, name: str, size: int, chunks: Iterable[bytes | memoryview]) -> None:
        """In parts, several at once, if it is larger than one."""
        path, pieces = f"{self._root}payload/{name}", rechunked(chunks, PAYLOAD_CHUNK)
        with self._asking():
            if size <= PAYLOAD_CHUNK:
                self._api.put(self._store, path, b"".join(pieces), use_multipart=False)
            else:
                parts = {"chunk_size": PAYLOAD_CHUNK, "max_concurrency": _CONNECTIONS}
                self._api.put(self._store, path, pieces, use_multipart=True, **parts)

    @override
    def remove_payloads(self, names: Sequence[str]) -> None:
        self._delete([f"payload/{name}" for name in names])

    @override
    def payload_sizes(self) -> dict[str, int]:
        return {name: entry["size"] for name, entry in self._list("payload").items()}

    @override
    def remove_abandoned(self, referred: set[str]) -> None:
        """Spares what is young; also removes marks of uses that later ones superseded."""
        oldest = datetime.now(UTC) - timedelta(seconds=ABANDONED_SECONDS)
        listed = self._list("payload")
        self._delete(
            [f"payload/{n}" for n, entry in listed.items() if n not in referred and entry["last_modified"] < oldest]
        )
        marks = sorted(self._list("uses"))
        latest = {name.partition("/")[0]: name for name in marks}
        self._delete([f"uses/{name}" for name in marks if name != latest[name.partition("/")[0]]])

    @override
    @contextmanager
    def writing(self) -> Iterator[None]:
        """Any number of writers at a time.

        Raises:
            StoreUnavailableError: Somebody was removing for longer than `_patience`.
        """
        own, watched, until = f"locks/writing/{secrets.token_hex(8)}", _Watched(), time.monotonic() + self._patience
        while True:
            while watched.alive(self._removing_lock()):
                self._wait(until)
            self._put(own, secrets.token_bytes(8))
            # who removes has announced it before it looks for writers, so at least one of us sees the other
            if not watched.alive(self._removing_lock()):
                break
            self._delete([own])
        with self._holding(own):
            yield

    @override
    @contextmanager
    def removing(self) -> Iterator[None]:
        """One at a time.

        Raises:
            StoreUnavailableError: Others were removing, or adding, for longer than `_patience`.
        """
        own, watched, until = _REMOVING, _Watched(), time.monotonic() + self._patience
        while not self._create(own, secrets.token_bytes(8)):
            lock = self._removing_lock()
            if lock and not watched.alive(lock):
                self._delete([own])
                continue
            self._wait(until)
        with self._holding(own):
            watched = _Watched()
            while writers := self._list("locks/writing"):
                if not watched.alive(writers):
                    self._delete([f"locks/writing/{name}" for name in writers])
                    continue
                self._wait(until)
            yield

    @override
    def close(self) -> None:
        self._workers.shutdown()

    @property
    def _patience(self) -> float:
        """Seconds to wait for others: long enough to see that one was killed."""
        return 2 * LEASE_SECONDS + self._timeout

    def _wait(self, until: float) -> None:
        if time.monotonic() > until:
            raise StoreUnavailableError(
                f"{self.place} was locked by others of this namespace for {self._patience:g} s. Try again."
            )
        time.sleep(_POLL_SECONDS)

    @contextmanager
    def _holding(self, name: str) -> Iterator[None]:
        """Renew a lock that was taken until the block ends; then release it."""
        self._held.since = time.monotonic()
        held = self._held.__dict__

        def renew() -> bool:
            asked = time.monotonic()
            self._put(name, secrets.token_bytes(8))
            held["since"] = asked
            return True

        try:
            with renewed(renew, LEASE_SECONDS / 4):
                yield
        finally:
            self._delete([name])

    def _check_lease(self) -> None:
        """Refuse to go on with a lock that others may take for a killed process's."""
        if time.monotonic() - self._held.since > LEASE_SECONDS / 2:
            raise StoreUnavailableError(f"{self.place}: this process was held up and lost its turn. Try again.")

    def _get(self, name: str) -> bytes | None:
        with self._asking(), suppress(FileNotFoundError):
            return bytes(self._api.get(self._store, self._root + name).bytes())
        return None

    def _removing_lock(self) -> dict[str, Any]:
        """The lock of who removes, by its name; nothing where nobody does."""
        entry = self._head(_REMOVING)
        return {} if entry is None else {_REMOVING: entry}

    def _head(self, name: str) -> Any | None:
        """Size, time and version of an object."""
        with self._asking(), suppress(FileNotFoundError):
            return self._api.head(self._store, self._root + name)
        return None

    def _put(self, name: str, data: bytes) -> None:
        with self._asking():
            self._api.put(self._store, self._root + name, data, use_multipart=False)

    def _create(self, name: str, data: bytes) -> bool:
        """Put a new object; False if there is one."""
        from obstore.exceptions import AlreadyExistsError

        with self._asking():
            try:
                self._api.put(self._store, self._root + name, data, mode="create")
            except AlreadyExistsError:
                return False
        return True

    def _delete(self, names: Sequence[str]) -> None:
        """Remove objects where they are there, many in one request where the storage can."""
        if not names:
            return
        with self._asking():
            try:
                self._api.delete(self._store, [self._root + name for name in names])
            except FileNotFoundError:
                for name in names:
                    with suppress(FileNotFoundError):
                        self._api.delete(self._store, self._root + name)

    def _list(self, folder: str) -> dict[str, Any]:
        """Size, time and version of each object in a folder, by name."""
        prefix = f"{self._root}{folder}/"
        with self._asking():
            entries = [entry for page in self._api.list(self._store, prefix) for entry in page]
        return {entry["path"].removeprefix(prefix): entry for entry in entries}

    def _at_once(self, action: Callable[[_Item], _Result], items: Iterable[_Item]) -> list[_Result]:
        return list(self._workers.map(action, items))


class _Watched:
    """Tells whether the owner of a lock still renews it, by this machine's clock alone."""

    def __init__(self) -> None:
        self._seen: dict[str, tuple[object, float]] = {}

    def alive(self, locks: Mapping[str, Any]) -> bool:
        """Whether any of these was new or different within the last lease."""
        now = time.monotonic()
        for name, entry in locks.items():
            version = (entry["e_tag"], entry["last_modified"])
            if name not in self._seen or self._seen[name][0] != version:
                self._seen[name] = (version, now)
        return any(now - self._seen[name][1] < LEASE_SECONDS for name in locks)


def _open(from_url: Callable[..., Any], url: str, options: Mapping[str, Any], timeout: float) -> Any:
    if urlsplit(url).scheme not in SCHEMES:
        raise ValueError("Its scheme is unknown.")
    if url.startswith("file:"):
        return from_url(url, mkdir=True, automatic_cleanup=False, **options)
    limit = timedelta(seconds=timeout)
    client: dict[str, Any] = {"timeout": limit, "connect_timeout": limit}
    if str(options.get("endpoint", "")).startswith("http://"):
        client["allow_http"] = True
    return from_url(url, client_options=client, retry_config={"max_retries": 2, "retry_timeout": limit}, **options)
