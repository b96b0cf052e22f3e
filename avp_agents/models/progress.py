"""Progress bars of a download, drawn from how much has arrived on the disk."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

_SECONDS_BETWEEN_LOOKS = 0.2


@contextmanager
def download_bar(console: Console | None, text: str, folder: Path, total: int) -> Iterator[None]:
    """Show how far `folder` has grown towards `total` bytes; nothing without a terminal."""
    if console is None or not console.is_terminal:
        yield
        return
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    before, done = _bytes_below(folder), threading.Event()
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(text, total=total)

        def look() -> None:
            while not done.wait(_SECONDS_BETWEEN_LOOKS):
                bar.update(task, completed=min(total, _bytes_below(folder) - before))

        watcher = threading.Thread(target=look, name="avp-download-bar", daemon=True)
        watcher.start()
        try:
            yield
        finally:
            done.set()
            watcher.join()


@contextmanager
def working(console: Console | None, text: str) -> Iterator[None]:
    """Show that something is going on; nothing without a terminal."""
    if console is None or not console.is_terminal:
        yield
        return
    with console.status(text):
        yield


def _bytes_below(folder: Path) -> int:
    """Bytes of all files below `folder`, some of which may vanish while they are counted."""
    total = 0
    for path in folder.rglob("*"):
        try:
            if path.is_file() and not path.is_symlink():
                total += path.stat().st_size
        except FileNotFoundError:
            continue
    return total
