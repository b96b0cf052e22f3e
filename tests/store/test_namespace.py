"""Where a namespace's key comes from, who may read it, and what is derived from it."""

from __future__ import annotations

import base64
import os
import subprocess
import sys
from pathlib import Path

import platformdirs
import pytest

from avp_agents.errors import ConfigurationError, NamespaceKeyError
from avp_agents.store.namespace import Namespace

KEY = bytes(range(32))


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's configuration folder, empty; no key in the environment."""
    monkeypatch.delenv("AVP_STORE_KEY", raising=False)
    monkeypatch.setattr(platformdirs, "user_config_path", lambda name: tmp_path / "config" / name)
    return tmp_path / "config" / "avp-agents"


@pytest.mark.parametrize(
    "text",
    [KEY.hex(), KEY.hex().upper(), base64.b64encode(KEY).decode(), base64.urlsafe_b64encode(KEY).decode().rstrip("=")],
    ids=["hex", "HEX", "base64", "base64url"],
)
def test_the_environment_s_key_may_be_hex_or_base64(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AVP_STORE_KEY", KEY.hex())
    expected = Namespace.load("tenant")

    monkeypatch.setenv("AVP_STORE_KEY", f" {text}\n")

    assert Namespace.load("tenant") == expected


@pytest.mark.parametrize("text", ["no key!", "00" * 31, base64.b64encode(b"short").decode(), "é" * 40])
def test_a_malformed_or_short_key_is_refused_with_a_way_to_make_one(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AVP_STORE_KEY", text)

    with pytest.raises(NamespaceKeyError, match=r"token_hex\(32\)"):
        Namespace.load("tenant")


def test_each_namespace_has_a_key_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AVP_STORE_KEY", KEY.hex())

    keys = {Namespace.load(name).key for name in ("a", "b", "default")}

    assert len(keys) == 3
    assert KEY not in keys


def test_without_a_key_one_is_made_and_kept(config: Path) -> None:
    first = Namespace.load("tenant")

    assert Namespace.load("tenant") == first
    assert (config / "store.key").stat().st_mode & 0o777 == 0o600
    assert config.stat().st_mode & 0o777 == 0o700
    assert [path.name for path in config.iterdir()] == ["store.key"]


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o602])
def test_a_key_that_others_can_read_or_write_is_refused(config: Path, mode: int) -> None:
    Namespace.load("tenant")
    (config / "store.key").chmod(mode)

    with pytest.raises(NamespaceKeyError, match="chmod 600"):
        Namespace.load("tenant")


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"00" * 16])
def test_a_damaged_key_file_is_refused(config: Path, content: bytes) -> None:
    Namespace.load("tenant")
    (config / "store.key").write_bytes(content)

    with pytest.raises(NamespaceKeyError, match=r"store\.key"):
        Namespace.load("tenant")


def test_a_folder_that_cannot_be_made_is_named(config: Path) -> None:
    config.parent.mkdir()
    config.write_text("a file where the folder should be")

    with pytest.raises(NamespaceKeyError, match="AVP_STORE_KEY"):
        Namespace.load("tenant")


def test_processes_that_start_at_once_agree_on_the_key(tmp_path: Path) -> None:
    script = "from avp_agents.store.namespace import Namespace; print(Namespace.load('tenant').tag)"
    environment = {name: value for name, value in os.environ.items() if name != "AVP_STORE_KEY"}
    environment |= {"HOME": str(tmp_path), "XDG_CONFIG_HOME": str(tmp_path / ".config")}

    starts = [
        subprocess.Popen([sys.executable, "-c", script], env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(4)
    ]
    tags = {process.communicate()[0].strip() for process in starts}

    assert len(tags) == 1
    assert tags != {""}


@pytest.mark.parametrize("name", ["", ".", "..", "../other", "a/b", "-a", "a b", "é", "a" * 65, "a\n"])
def test_names_that_could_leave_the_folder_are_refused(name: str) -> None:
    with pytest.raises(ConfigurationError, match="letters"):
        Namespace(name, KEY)


def test_a_short_key_is_refused() -> None:
    with pytest.raises(NamespaceKeyError, match="32 bytes"):
        Namespace("tenant", b"short")


def test_the_key_is_never_shown() -> None:
    namespace = Namespace("tenant", b"secret" * 6)

    assert "secret" not in f"{namespace} {namespace!r}"


def test_ids_are_keyed_by_name_key_and_purpose() -> None:
    namespaces = [Namespace("a", KEY), Namespace("b", KEY), Namespace("a", KEY[::-1])]

    ids = [namespace.handle_id("recipe", "")[6:] for namespace in namespaces]
    ids += [namespace.segment_id("recipe") for namespace in namespaces]
    tags = [namespace.tag for namespace in namespaces]
    macs = [namespace.mac("label").hexdigest() for namespace in namespaces]

    assert len({*ids, *tags, *macs}) == len(ids + tags + macs)


def test_recipe_and_scope_cannot_run_into_each_other() -> None:
    namespace = Namespace("tenant", KEY)

    assert namespace.handle_id("ab", "c") != namespace.handle_id("a", "bc")
