"""Sessions: who talks to whom, until when. Small, in memory, free of any transport.

A session is opened after a handshake and named by a random id. Whoever presents the id resumes it, if the session has
not expired and the presenter is of the tenant that opened it.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from avp_agents.errors import ConfigurationError, SessionError
from avp_agents.protocol.handshake import Hello

_ID_BYTES = 24
_MAX_ID = 64


@dataclass(frozen=True)
class Session:
    """One conversation between two engines.

    Attributes:
        id: 32 random URL-safe characters; knowing it is what allows to resume.
        namespace: The tenant it was opened for.
        local: This side.
        remote: The other side.
        opened: Seconds on the table's clock.
        expires: When it ends, unless it is resumed before.
    """

    id: str
    namespace: str
    local: Hello
    remote: Hello
    opened: float
    expires: float


class SessionTable:
    """The sessions of one process. Thread-safe; bounded: a new session beyond `limit` ends the one idle the longest.

    Args:
        seconds: How long a session lasts after it was opened or last resumed.
        limit: Most sessions at once.
        clock: Where time comes from, in seconds; it must not run backwards.

    Raises:
        ConfigurationError: `seconds` or `limit` is not positive.
    """

    def __init__(
        self, *, seconds: float = 3600.0, limit: int = 10_000, clock: Callable[[], float] = time.monotonic
    ) -> None:
        if not seconds > 0 or limit < 1:
            raise ConfigurationError("A session table needs a positive number of seconds and room for one session.")
        self._seconds, self._limit, self._clock = seconds, limit, clock
        self._lock = threading.Lock()
        self._sessions: OrderedDict[str, Session] = OrderedDict()

    def __len__(self) -> int:
        """Sessions that have not expired."""
        with self._lock:
            self._drop_expired()
            return len(self._sessions)

    def open(self, namespace: str, local: Hello, remote: Hello) -> Session:
        """A new session."""
        now = self._clock()
        session = Session(secrets.token_urlsafe(_ID_BYTES), namespace, local, remote, now, now + self._seconds)
        with self._lock:
            self._drop_expired()
            while len(self._sessions) >= self._limit:
                self._sessions.popitem(last=False)
            self._sessions[session.id] = session
        return session

    def resume(self, session_id: object, namespace: str) -> Session:
        """The session with this id, its time starting anew.

        Args:
            session_id: Untrusted.
            namespace: The tenant that asks.

        Raises:
            SessionError: There is no such session of this tenant, or it has expired. Shake hands again.
        """
        if not isinstance(session_id, str) or len(session_id) > _MAX_ID:
            raise SessionError("Not a session id.")
        with self._lock:
            self._drop_expired()
            found = self._sessions.get(session_id)
            # one answer for both, so that nobody learns which ids other tenants have
            if found is None or found.namespace != namespace:
                raise SessionError("There is no such session, or it has expired. Shake hands again.")
            resumed = Session(
                found.id, found.namespace, found.local, found.remote, found.opened, self._clock() + self._seconds
            )
            self._sessions[found.id] = resumed
            self._sessions.move_to_end(found.id)
        return resumed

    def close(self, session_id: str, namespace: str) -> None:
        """End a session; one that is not there, or another tenant's, is left alone."""
        with self._lock:
            found = self._sessions.get(session_id)
            if found is not None and found.namespace == namespace:
                del self._sessions[session_id]

    def _drop_expired(self) -> None:
        """Sessions are kept in the order in which they expire, since all last equally long."""
        now = self._clock()
        while self._sessions:
            oldest = next(iter(self._sessions.values()))
            if oldest.expires > now:
                return
            del self._sessions[oldest.id]
