"""Which arms a run has: modes, teams, and options that vary one at a time."""

from __future__ import annotations

from typing import Any

import pytest

from avp_agents.errors import ConfigurationError
from avp_bench.quality.arms import OPTIONS, Arm, arms_named

BASELINE: dict[str, list[Any]] = {name: [getattr(Arm("x", "latent"), name)] for name in OPTIONS}


def names(modes: list[str], teams: list[str], **options: list[Any]) -> list[str]:
    return [arm.name for arm in arms_named(modes, teams, BASELINE | options)]


def test_options_vary_one_at_a_time_and_only_where_they_matter() -> None:
    assert names(["direct", "latent", "text"], ["pair"], steps=[20, 0, 80], method=[None, "ridge"]) == [
        "direct", "latent", "latent[steps=0]", "latent[steps=80]", "latent[method=ridge]", "text",
    ]  # fmt: skip


def test_an_arm_has_the_baselines_other_options() -> None:
    _, variant = arms_named(["latent"], ["pair"], BASELINE | {"steps": [10], "latent_temperature": [1.0, 0.5]})
    assert variant.name == "latent[latent-temperature=0.5]"
    assert variant.think_options == {"steps": 10, "temperature": 0.5}


def test_several_teams_have_every_mode_each_and_direct_once() -> None:
    assert names(["direct", "latent"], ["pair", "fan-in"], strategy=["replay", "splice"], turn=["new", "same"]) == [
        "direct", "latent[team=pair]", "latent[team=pair, turn=same]", "latent[team=fan-in]",
        "latent[team=fan-in, strategy=splice]",
    ]  # fmt: skip


def test_what_does_not_go_together_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="Unknown mode 'telepathy'; choose from direct"):
        names(["telepathy"], ["pair"])
    with pytest.raises(ConfigurationError, match="Unknown team"):
        names(["latent"], ["crowd"])
    with pytest.raises(ConfigurationError, match="at least one mode"):
        names([], ["pair"])
    for options in ({"turn": ["same"], "steps": [0]}, {"turn": ["same", "new"], "steps": [20, 0]}):
        with pytest.raises(ConfigurationError, match="needs latent steps"):
            names(["latent"], ["pair"], **options)
    with pytest.raises(ConfigurationError, match="never read its own question"):
        names(["shuffled"], ["pair"], turn=["same"])
    with pytest.raises(ConfigurationError, match="a pair or a chain"):
        names(["latent"], ["fan-in"], turn=["same"])
