"""Sessions are named by random ids, belong to a tenant, expire, and are bounded in number."""

from __future__ import annotations

import pytest

from avp_agents.errors import ConfigurationError, SessionError
from avp_agents.protocol.handshake import Hello, VocabularySketch
from avp_agents.protocol.session import SessionTable

LOCAL = Hello("a" * 64, "bfloat16", VocabularySketch("1" * 64, 1, (5,)))
REMOTE = Hello("b" * 64, "float32", VocabularySketch("2" * 64, 1, (6,)))


class Clock:
    """A clock that tests move."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def table(clock: Clock) -> SessionTable:
    return SessionTable(seconds=60, limit=3, clock=clock)


def test_a_session_knows_both_sides(table: SessionTable) -> None:
    """Its id is long, random and all that is needed to come back to it."""
    session, another = (table.open("tenant", LOCAL, REMOTE) for _ in range(2))

    assert (session.local, session.remote) == (LOCAL, REMOTE)
    assert len(session.id) == 32
    assert session.id != another.id
    assert table.resume(session.id, "tenant") == session


def test_resuming_starts_the_time_anew(table: SessionTable, clock: Clock) -> None:
    """A session that is used does not expire; one that is not does."""
    used, idle = table.open("tenant", LOCAL, REMOTE), table.open("tenant", LOCAL, REMOTE)
    clock.now += 40
    assert table.resume(used.id, "tenant").expires == clock.now + 60
    clock.now += 40

    assert len(table) == 1
    assert table.resume(used.id, "tenant").opened == used.opened
    with pytest.raises(SessionError, match="Shake hands again"):
        table.resume(idle.id, "tenant")


def test_another_tenants_session_is_like_none(table: SessionTable) -> None:
    """The error does not tell which ids exist, and nobody can close it."""
    session = table.open("tenant", LOCAL, REMOTE)
    with pytest.raises(SessionError) as others:
        table.resume(session.id, "other")
    with pytest.raises(SessionError) as unknown:
        table.resume("x" * 32, "tenant")
    table.close(session.id, "other")

    assert str(others.value) == str(unknown.value)
    assert table.resume(session.id, "tenant").id == session.id


@pytest.mark.parametrize("session_id", [None, 7, "x" * 65, ["id"]])
def test_ids_are_untrusted(table: SessionTable, session_id: object) -> None:
    """Whatever comes in as an id is refused as one."""
    with pytest.raises(SessionError):
        table.resume(session_id, "tenant")


def test_the_table_is_bounded(table: SessionTable) -> None:
    """A session too many ends the one that was idle the longest."""
    first, second, third = (table.open("tenant", LOCAL, REMOTE) for _ in range(3))
    table.resume(first.id, "tenant")
    table.open("tenant", LOCAL, REMOTE)

    assert len(table) == 3
    with pytest.raises(SessionError):
        table.resume(second.id, "tenant")
    assert table.resume(first.id, "tenant")
    assert table.resume(third.id, "tenant")


def test_a_closed_session_is_over(table: SessionTable) -> None:
    """Closing it twice changes nothing."""
    session = table.open("tenant", LOCAL, REMOTE)
    table.close(session.id, "tenant")
    table.close(session.id, "tenant")

    assert len(table) == 0
    with pytest.raises(SessionError):
        table.resume(session.id, "tenant")


@pytest.mark.parametrize("options", [{"seconds": 0}, {"limit": 0}])
def test_a_table_needs_time_and_room(options: dict[str, float]) -> None:
    """Options are checked where they are given."""
    with pytest.raises(ConfigurationError):
        SessionTable(**options)  # pyright: ignore[reportArgumentType]
