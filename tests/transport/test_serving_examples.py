"""The examples in README and docs/serving.md run word for word; only the port is another one."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from serving import serving

pytest.importorskip("openai", reason="the official client is not installed: pip install openai")

from avp_agents import LatentEngine
from avp_agents.transport.server import Access
from avp_agents.transport.server.access import OneToken

ROOT = Path(__file__).parents[2]
PAGES = ("README.md", "docs/serving.md")
MODEL, TOKEN, URL = "SmolLM2-135M-Instruct", "a-token", "http://127.0.0.1:8300"
_EXAMPLE = re.compile(r"<!-- example: (\w+) -->\n```\w+\n(.*?)```", re.DOTALL)


def examples(name: str) -> list[str]:
    """All examples of a name, as the pages print them."""
    found = [
        text for page in PAGES for kind, text in _EXAMPLE.findall((ROOT / page).read_text("utf-8")) if kind == name
    ]
    assert found, f"no page has an example marked {name!r}"
    return found


@pytest.fixture(scope="module")
def url(engine: LatentEngine) -> Iterator[str]:
    """A server as the pages start it: one token, and the default model's name (the model itself is a tiny one)."""
    with serving(engine, access=Access(OneToken(TOKEN), loopback=True), name=MODEL) as url:
        yield url


def test_curl(url: str) -> None:
    """Answers, with a handle."""
    for example in examples("curl"):
        assert URL in example
        command = ["bash", "-euo", "pipefail", "-c", f"TOKEN={TOKEN}\n{example.replace(URL, url)}"]
        told = json.loads(subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout)
        assert told["choices"][0]["message"]["avp_context"]["id"].startswith("avp:1:")
        assert told["usage"]["completion_tokens"] > 0


def test_the_openai_client(url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The second turn goes on with the first one's context."""
    monkeypatch.setenv("TOKEN", TOKEN)
    for example in examples("openai"):
        assert URL in example
        exec(compile(example.replace(URL, url), "the openai example", "exec"), {})
        mode, cached = capsys.readouterr().out.split("\n")[-2].split()
        assert mode == "kv"
        assert int(cached) > 10
