"""Plans: acts that are written once, and carried out in a thread or on an event loop."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Generator, Iterator

import pytest

from avp_agents.agent.steps import Flow, Plan, Telling, arun, ask, astream, in_thread, run, stream


def half(number: int) -> int:
    if number % 2:
        raise ValueError(f"{number} is odd")
    return number // 2


async def ahalf(number: int) -> int:
    await asyncio.sleep(0)
    return half(number)


def halved_until_odd(number: int) -> Plan[int]:
    try:
        while True:
            number = yield from ask(half, ahalf, number)
    except ValueError:
        return number


def in_both(plan: Callable[[], Telling[object, object]]) -> list[object]:
    return [run(plan()), asyncio.run(arun(plan()))]


def test_a_plan_gets_answers_and_errors() -> None:
    assert in_both(lambda: halved_until_odd(24)) == [3, 3]


def test_an_error_that_a_plan_does_not_expect_ends_it() -> None:
    with pytest.raises(ValueError, match="3 is odd"):
        run(ask(half, ahalf, 3))
    with pytest.raises(ValueError, match="3 is odd"):
        asyncio.run(arun(ask(half, ahalf, 3)))


def test_what_has_no_twin_runs_in_a_thread() -> None:
    assert in_both(lambda: in_thread(half, 8)) == [4, 4]


class Letters:
    """Pieces of a word, and whether they were closed."""

    def __init__(self) -> None:
        self.closed = 0

    def open(self) -> Generator[str]:
        try:
            yield from "abc"
        finally:
            self.closed += 1

    async def aopen(self) -> AsyncGenerator[str]:
        try:
            for letter in "abc":
                yield letter
        finally:
            self.closed += 1

    def plan(self) -> Telling[str, str]:
        def twice(letter: str) -> Iterator[str]:
            yield from letter * 2

        yield "begin"
        last = yield from Flow(self.open, self.aopen, twice)
        yield "end"
        return last


def test_pieces_are_given_out_as_they_come_and_the_last_is_the_answer() -> None:
    async def collected() -> list[str]:
        return [out async for out in astream(Letters().plan())]

    told = ["begin", "a", "a", "b", "b", "c", "c", "end"]
    assert list(stream(Letters().plan())) == told
    assert asyncio.run(collected()) == told
    assert in_both(Letters().plan) == ["c", "c"]


def test_leaving_early_closes_what_is_open() -> None:
    letters = Letters()

    async def leave() -> None:
        pieces = astream(letters.plan())
        assert [await anext(pieces), await anext(pieces)] == ["begin", "a"]
        await pieces.aclose()

    pieces = stream(letters.plan())
    assert [next(pieces), next(pieces)] == ["begin", "a"]
    pieces.close()
    assert letters.closed == 1
    asyncio.run(leave())
    assert letters.closed == 2
