"""The default model from the Hugging Face hub, at a pinned revision, every file checked."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from avp_agents.models.manifest import FileRecord, Manifest
from avp_agents.models.progress import download_bar
from avp_agents.models.source import SourceFailedError

SECONDS_TO_ANSWER = 3.0
"""What a hub that does not answer costs, once for connecting and once for reading."""

WHOLE_MODEL = ("*.safetensors", "*.json", "*.jinja", "*.model", "merges.txt", "vocab.txt")
"""What is downloaded of any other model that is named by its hub id."""


@dataclass(frozen=True)
class HubSource:
    """Files of one revision of a hub repository, with their sizes and checksums; small files first."""

    repository: str
    revision: str
    files: Mapping[str, FileRecord]

    def __str__(self) -> str:
        return f"Hugging Face hub, {self.repository} at {self.revision[:12]}"

    def fetch_into(self, folder: Path, console: Console | None) -> None:
        """Put the files into `folder`, by way of the hub's own cache (where they may lie already).

        Raises:
            SourceFailedError: The hub does not answer, or a file is not what it should be.
        """
        from huggingface_hub import constants
        from huggingface_hub.file_download import repo_folder_name

        cache = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=self.repository, repo_type="model")
        total = sum(record.bytes for record in self.files.values())
        snapshot = self._cached()
        if snapshot is None:
            with download_bar(console, self.repository, cache, total), _silent_hub():
                snapshot = self._download()
        for name in self.files:
            _take_over(snapshot / name, folder / name)
        if damage := Manifest(str(self), dict(self.files)).find_damage(folder, checksums=True):
            raise SourceFailedError(damage)

    def _cached(self) -> Path | None:
        """The revision's folder in the hub's cache; None unless all files are there."""
        from huggingface_hub.errors import LocalEntryNotFoundError

        try:
            snapshot = self._snapshot(cached=True)
        except LocalEntryNotFoundError:
            return None
        return snapshot if all((snapshot / name).is_file() for name in self.files) else None

    def _download(self) -> Path:
        """The revision's folder in the hub's cache, its files downloaded."""
        from huggingface_hub import HfApi

        try:
            # One request without the patience that the client has for downloads: does the hub answer at all?
            HfApi().model_info(self.repository, revision=self.revision, timeout=SECONDS_TO_ANSWER)
            return self._snapshot(cached=False)
        except Exception as error:  # the client lets the errors of its HTTP library through, and that one changes
            raise SourceFailedError(_reason(error)) from error

    def _snapshot(self, *, cached: bool) -> Path:
        """The revision's folder, as the hub's client knows it; with `cached`, nobody is asked."""
        from huggingface_hub import snapshot_download

        wanted = [*self.files]
        return Path(
            snapshot_download(self.repository, revision=self.revision, allow_patterns=wanted, local_files_only=cached)
        )


def download_any(repository: str) -> Path:
    """The folder of a whole model in the hub's own cache, downloaded if need be.

    Raises:
        SourceFailedError: The hub does not have it or does not answer, and the cache does not hold it.
    """
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repository, allow_patterns=list(WHOLE_MODEL)))
    except Exception as error:  # see HubSource._download
        raise SourceFailedError(_reason(error)) from error


def _reason(error: Exception) -> str:
    """An error in one line, with the error that caused it where that says more."""
    root = error.__cause__ or error
    text = " ".join(str(root).split()) or type(root).__name__
    return f"{type(root).__name__}: {text[:300]}"


def _take_over(source: Path, target: Path) -> None:
    """The file under another name; a second copy only where the disk cannot link."""
    source = source.resolve()
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


@contextmanager
def _silent_hub() -> Iterator[None]:
    """No progress bars from the hub's client beside ours."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    if are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()
