"""Importing avp_crewai: what it says without CrewAI, and what it does not load."""

from __future__ import annotations

import subprocess
import sys

import pytest

WITHOUT_CREWAI = """
import importlib.util

find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "crewai" else find_spec(name, *rest)
import avp_crewai
"""


def test_without_crewai_it_says_what_to_install() -> None:
    done = subprocess.run([sys.executable, "-c", WITHOUT_CREWAI], capture_output=True, text=True, check=False)

    assert done.returncode == 1
    assert 'pip install "avp-agents[crewai]"' in done.stderr.splitlines()[-1]


def test_importing_loads_neither_crewai_nor_torch() -> None:
    code = "import sys, avp_crewai; print('torch' in sys.modules, 'crewai' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert done.stdout.split() == ["False", "False"]


def test_public_names_are_there() -> None:
    import avp_crewai

    for name in avp_crewai.__all__:
        assert getattr(avp_crewai, name) is not None
        assert name in dir(avp_crewai)
    with pytest.raises(AttributeError, match="no attribute 'AvpLlm'"):
        avp_crewai.AvpLlm  # noqa: B018
