"""What the sources of the default model have in common."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from rich.console import Console


class SourceFailedError(Exception):
    """A source could not serve the model. Never leaves `avp_agents.models`: it becomes a line of an error message."""


class Source(Protocol):
    """Where the default model can come from; ``str(source)`` names it for people."""

    def fetch_into(self, folder: Path, console: Console | None) -> None:
        """Put an ordinary Hugging Face folder's files into the empty `folder`.

        Raises:
            SourceFailedError: It cannot.
        """
        ...
