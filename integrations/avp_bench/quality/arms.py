"""Arms: the ways to answer that a run compares.

    direct             the solver alone
    latent             researchers think, the solver answers on their context
    text               researchers write notes, the solver reads them
    prefill            as latent, without a single latent step (control: is it the steps?)
    shuffled           as latent, on the thought about another problem (control: does the context carry anything?)
    text-capped        as text, with as many tokens per researcher as latent steps (control: the same compute)
    projection         another model thinks, and what of its thought fits the solver's model is projected into it
    text-cross-model   another model writes the notes

Every solver is asked the same question for the same form of answer. Options vary one at a time: the first value of each
is the baseline's, and every further value makes an arm that differs from the baseline in it alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, cast, get_args

from avp_agents.context import LatentMethod
from avp_agents.engine.protocol import JoinStrategy
from avp_agents.errors import ConfigurationError
from avp_bench.quality.teams import TEAMS

Mode = Literal["direct", "latent", "text", "prefill", "shuffled", "text-capped", "projection", "text-cross-model"]
MODES: tuple[str, ...] = get_args(Mode)
CROSS_MODEL = ("projection", "text-cross-model")
Turn = Literal["new", "same"]
KvForm = Literal["exact", "int8"]
Projected = Literal["both", "vector", "text"]

_VARIED = {
    "latent": ("steps", "method", "renormalise", "latent_temperature", "turn", "kv", "strategy"),
    "projection": ("steps", "method", "renormalise", "latent_temperature", "projected"),
}
_CHAINED_ONLY, _PARALLEL_ONLY = ("turn",), ("strategy",)


@dataclass(frozen=True)
class Arm:
    """One way to answer.

    Attributes:
        name: Names it in results: its mode, and in brackets what differs from the mode's baseline.
        mode: See the module's summary.
        team: Who works before the solver.
        steps: Latent steps per researcher.
        method: The latent step; None is the model's own default.
        renormalise: Whether latent embeddings get the mean norm of input embeddings; None is the method's default.
        latent_temperature: Of the soft latent step.
        turn: ``"new"``: the solver gets a turn of its own and the question again; ``"same"``: the last researcher is
            told the form of the answer, and the solver goes on in its turn.
        kv: ``"int8"``: what the solver gets went through a frame with its KV-cache rounded to int8.
        projected: What crosses between models: ``"vector"`` (about 2 kB), ``"text"`` (what was read, read again), both.
        strategy: How the contexts of parallel researchers are joined; for ``"text"`` they are asked to say in words
            what they found out.

    Raises:
        ConfigurationError: The options do not go together.
    """

    name: str
    mode: Mode
    team: str = "pair"
    steps: int = 20
    method: LatentMethod | None = None
    renormalise: bool | None = None
    latent_temperature: float = 1.0
    turn: Turn = "new"
    kv: KvForm = "exact"
    projected: Projected = "both"
    strategy: JoinStrategy = "replay"

    def __post_init__(self) -> None:
        if self.turn == "same" and (TEAMS[self.team].parallel or not self.latent_steps):
            raise ConfigurationError(
                "The turn of a thought goes on only where there is one: turn=same needs latent steps, and a pair or a "
                "chain."
            )
        if self.turn == "same" and self.mode == "shuffled":
            raise ConfigurationError("With turn=same the arm shuffled would never read its own question.")

    @property
    def latent_steps(self) -> int:
        """Steps that its researchers run: 0 in the prefill control."""
        return 0 if self.mode == "prefill" else self.steps

    @property
    def think_options(self) -> dict[str, Any]:
        """For `LatentEngine.think`."""
        options: dict[str, Any] = {"steps": self.latent_steps, "temperature": self.latent_temperature}
        given = {"method": self.method, "renormalise": self.renormalise}
        return options | {name: value for name, value in given.items() if value is not None}


OPTIONS = tuple(field.name for field in fields(Arm) if field.name not in ("name", "mode", "team"))
"""The options that arms vary in."""


def arms_named(modes: Sequence[str], teams: Sequence[str], options: Mapping[str, Sequence[Any]]) -> list[Arm]:
    """Per team the baseline of every mode, followed by its variants; ``direct`` once, since it has no team.

    Args:
        modes: Names of modes.
        teams: Names of teams.
        options: Values of `OPTIONS`, the baseline's first.

    Raises:
        ConfigurationError: There is no such mode or team, or the options do not go together.
    """
    _check(modes, MODES, "mode")
    _check(teams, tuple(TEAMS), "team")
    arms: list[Arm] = []
    for team in dict.fromkeys(teams):
        for mode in dict.fromkeys(modes):
            if mode != "direct" or team == teams[0]:
                arms += _baseline_and_variants(cast(Mode, mode), team, options, several_teams=len(set(teams)) > 1)
    return arms


def _check(names: Sequence[str], known: Sequence[str], what: str) -> None:
    if not names:
        raise ConfigurationError(f"Name at least one {what}: {', '.join(known)}.")
    if unknown := [name for name in names if name not in known]:
        raise ConfigurationError(f"Unknown {what} {unknown[0]!r}; choose from {', '.join(known)}.")


def _baseline_and_variants(
    mode: Mode, team: str, options: Mapping[str, Sequence[Any]], *, several_teams: bool
) -> list[Arm]:
    baseline = {name: values[0] for name, values in options.items()}
    place = {"team": team} if several_teams and mode != "direct" else {}
    excluded = _CHAINED_ONLY if TEAMS[team].parallel else _PARALLEL_ONLY
    varied = [name for name in _VARIED.get(mode, ()) if name not in excluded]
    variants = [{name: value} for name in varied for value in dict.fromkeys(options.get(name, ())[1:])]
    return [
        Arm(_named(mode, place | variant), mode, team, **(baseline | variant))
        for variant in ({}, *variants)
        if not variant or any(baseline[name] != value for name, value in variant.items())
    ]


def _named(mode: str, differing: Mapping[str, Any]) -> str:
    shown = ", ".join(f"{name.replace('_', '-')}={value}" for name, value in differing.items())
    return f"{mode}[{shown}]" if shown else mode
