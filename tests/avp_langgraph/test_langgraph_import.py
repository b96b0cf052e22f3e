"""What importing the integration does where LangChain is, and where it is not."""

from __future__ import annotations

import subprocess
import sys

import pytest

import avp_langgraph


def test_every_public_name_is_there() -> None:
    for name in avp_langgraph.__all__:
        assert getattr(avp_langgraph, name)
    with pytest.raises(AttributeError, match="no attribute 'JoinedNode'"):
        _ = avp_langgraph.JoinedNode


def test_making_a_model_imports_no_torch() -> None:
    code = "import sys; from avp_langgraph import AvpChatModel; AvpChatModel(); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_without_langchain_it_says_what_to_install() -> None:
    code = "import sys; sys.modules['langchain_core'] = None; import avp_langgraph"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)

    assert 'pip install "avp-agents[langgraph]"' in done.stderr
