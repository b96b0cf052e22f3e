"""Teams: who works before the solver, and what each of them is told."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Team:
    """Who works before the solver.

    Attributes:
        name: As on the command line.
        briefs: What each of them is told, before the question.
        parallel: They work side by side and are joined, instead of one after another.
    """

    name: str
    briefs: tuple[str, ...]
    parallel: bool

    @property
    def agents(self) -> int:
        """Researchers and the solver."""
        return len(self.briefs) + 1


TEAMS = {
    team.name: team
    for team in (
        Team("pair", ("Work out how to solve the task below. A colleague writes the answer.",), False),
        Team(
            "chain",
            (
                "Plan how to solve the task below. Colleagues go on from your plan.",
                "Look for mistakes and gaps in the plan so far.",
                "Put together the best way to solve the task. A colleague writes the answer.",
            ),
            False,
        ),
        Team(
            "fan-in",
            (
                "Collect what the task below gives and asks. A colleague writes the answer.",
                "Find the method that solves the task below. A colleague writes the answer.",
                "Name the mistakes that are easily made in the task below. A colleague writes the answer.",
            ),
            True,
        ),
    )
}
