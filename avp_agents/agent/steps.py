"""Acts that are written once, as generators, and carried out in a thread or on an event loop.

def answer(engine, handle):                                         # a plan
    context = yield from ask(engine.resolve, engine.aresolve, handle)
    yield f"on {len(context)} positions"                            # is given out
    return (yield from ask(engine.generate, engine.agenerate, "And?", context=context))

run(answer(engine, handle))                 await arun(answer(engine, handle))
for each in stream(answer(...))             async for each in astream(answer(...))
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator, Iterable, Iterator
from contextlib import aclosing, closing
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, ParamSpec, Protocol, TypeVar, cast

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)
Out = TypeVar("Out")
P = ParamSpec("P")


class ClosableIterator(Iterator[T_co], Protocol[T_co]):
    """An iterator that can be left early."""

    def close(self) -> None:
        """End it."""
        ...


@dataclass(frozen=True)
class Wait(Generic[T_co]):
    """Something that a plan waits for; ``yield from`` it gives the answer."""

    call: Callable[[], T_co]
    acall: Callable[[], Awaitable[T_co]]

    def __iter__(self) -> Generator[Wait[T_co], object, T_co]:
        return cast("T_co", (yield self))


@dataclass(frozen=True)
class Flow(Generic[T, Out]):
    """Something that comes in pieces, of which a plan waits for the last one.

    Attributes:
        open, aopen: Begin it; it is closed in any case.
        read: What is given out for each piece on the way.
    """

    open: Callable[[], ClosableIterator[T]]
    aopen: Callable[[], AsyncGenerator[T]]
    read: Callable[[T], Iterable[Out]]

    def __iter__(self) -> Generator[Flow[T, Out], object, T]:
        return cast("T", (yield self))


Plan = Generator[Wait[object], object, T]
"""Waits for steps, and returns something."""

Telling = Generator[Wait[object] | Flow[Any, Out] | Out, object, T]
"""A plan that gives something out on the way, itself or from the pieces that it waits for."""


def ask(
    call: Callable[P, T], acall: Callable[P, Awaitable[T]], /, *args: P.args, **kwargs: P.kwargs
) -> Generator[Wait[T], object, T]:
    """Call a verb, or on an event loop its twin."""
    return (yield from Wait(partial(call, *args, **kwargs), partial(acall, *args, **kwargs)))


def in_thread(call: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Generator[Wait[T], object, T]:
    """Call something that waits and has no twin; an event loop leaves it to a thread."""
    waiting = partial(call, *args, **kwargs)
    return (yield from Wait(waiting, partial(asyncio.to_thread, waiting)))


def stream(plan: Telling[Out, object]) -> Generator[Out]:
    """Carry a plan out in this thread. Closing the generator ends what is going on."""
    with closing(plan):
        try:
            asked = next(plan)
            while True:
                try:
                    answer: object = None
                    if isinstance(asked, Wait):
                        answer = asked.call()
                    elif isinstance(asked, Flow):
                        with closing(asked.open()) as pieces:
                            for answer in pieces:
                                yield from asked.read(answer)
                    else:
                        yield asked
                except Exception as error:
                    asked = plan.throw(error)
                else:
                    asked = plan.send(answer)
        except StopIteration:
            return


async def astream(plan: Telling[Out, object]) -> AsyncGenerator[Out]:
    """`stream` on an event loop, which it does not block."""
    with closing(plan):
        try:
            asked = next(plan)
            while True:
                try:
                    answer: object = None
                    if isinstance(asked, Wait):
                        answer = await asked.acall()
                    elif isinstance(asked, Flow):
                        async with aclosing(asked.aopen()) as pieces:
                            async for answer in pieces:
                                for out in asked.read(answer):
                                    yield out
                    else:
                        yield asked
                except Exception as error:
                    asked = plan.throw(error)
                else:
                    asked = plan.send(answer)
        except StopIteration:
            return


def run(plan: Telling[object, T]) -> T:
    """Carry a plan out in this thread; what it gives out on the way is dropped."""
    *_, result = stream(_with_result(plan))
    return cast("T", result)


async def arun(plan: Telling[object, T]) -> T:
    """`run` on an event loop."""
    *_, result = [out async for out in astream(_with_result(plan))]
    return cast("T", result)


def _with_result(plan: Telling[object, T]) -> Telling[object, None]:
    """A plan that gives its result out, last."""
    yield (yield from plan)
