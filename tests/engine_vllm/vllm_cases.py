"""The conversations that parity is shown with: a researcher thinks, a solver answers, a reviewer goes on from that."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from avp_agents import Context, Engine, Generation, LatentSegment, TokenSegment
from avp_agents.context import LatentRecipe

FINGERPRINT = "ab" * 32
HIDDEN = 576
RECIPE = LatentRecipe("soft", 256, 1.0, False, 3)

STEPS = 20
TOKENS = 32

_NOTES = (
    "Meeting notes of the harbour committee. The ferry to the north island carries 24 cars and 180 people. It leaves "
    "at seven, at half past nine, at noon and at four. In winter the noon crossing is left out on days of strong wind. "
    "A car pays 17 crowns, a person 3 crowns, a bicycle nothing. Last month 2 of 96 crossings were cancelled. The new "
    "pier will be 40 metres longer than the old one, which is 110 metres long, and is to be built from local stone. "
    "The committee asks for a second ticket booth, because on market days people wait for up to 25 minutes. "
)


@dataclass(frozen=True)
class Case:
    """What the researcher, the solver and the reviewer are told."""

    research: str
    solve: str
    review: str = "Say it again in one short sentence."


CASES = (
    Case("Analyze: 24 * 17 + 3", "Solve step by step: 24 * 17 + 3"),
    Case("What do we know about the planet Mars?", "Name three facts about the planet Mars."),
    Case(_NOTES + "What matters in these notes?", "How much does a full ferry earn on one crossing?"),
    Case(_NOTES * 2 + "Which of this concerns money?", "List the prices."),
    Case("Write down what a binary search needs.", "Write a binary search in Python."),
    Case(_NOTES + "Think about the pier.", "How long will the new pier be?"),
)
OTHER = Case("Think about bananas and how they are grown on plantations.", "")
"""A thought about something else, for the control."""


@dataclass(frozen=True)
class Reference:
    """What a `LatentEngine` made of a case.

    Attributes:
        case: Which one.
        thought: The researcher's context.
        answer: The solver's, on top of it.
        review: The reviewer's, on top of that.
        control: The solver's on top of the same prompt with another thought's latents.
        other: The context that `control` was on top of.
    """

    case: Case
    thought: Context
    answer: Generation
    review: Generation
    control: Generation
    other: Context


def thought_behind(token_ids: tuple[int, ...], *, dtype: str = "float32", seed: int = 0) -> Context:
    """A context of made-up latent steps."""
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(3, HIDDEN, generator=generator).to(getattr(torch, dtype))
    return Context(FINGERPRINT, dtype, (TokenSegment(token_ids), LatentSegment(latents, RECIPE)))


def solve(engine: Engine, case: Case, thought: Context) -> Generation:
    return engine.generate(case.solve, context=without_kv(thought), max_tokens=TOKENS, min_tokens=TOKENS)


def review(engine: Engine, case: Case, answered: Context) -> Generation:
    return engine.generate(case.review, context=without_kv(answered), max_tokens=TOKENS, min_tokens=TOKENS)


def without_kv(context: Context) -> Context:
    """Its lineage alone, as it travels."""
    return Context(context.fingerprint, context.dtype, context.lineage, context.readout)
