"""The list of a fetched model's files with their checksums, kept beside them."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

MANIFEST_NAME = "avp-manifest.json"
_FORMAT = 1
_BLOCK = 1 << 20


@dataclass(frozen=True)
class FileRecord:
    """A file's size in bytes and its SHA-256, 64 hex digits."""

    bytes: int
    sha256: str

    @classmethod
    def of(cls, path: Path) -> FileRecord:
        """Read `path` and take its measures."""
        return cls(path.stat().st_size, sha256_of(path))


@dataclass(frozen=True)
class Manifest:
    """What a fetched model consists of.

    Attributes:
        source: Where it came from, for people.
        files: Every file of the folder by name, the manifest itself left out.
    """

    source: str
    files: dict[str, FileRecord]

    @classmethod
    def of_folder(cls, folder: Path, source: str) -> Manifest:
        """Take the measures of all files in `folder`."""
        return cls(source, {path.name: FileRecord.of(path) for path in sorted(folder.iterdir())})

    @classmethod
    def read(cls, folder: Path) -> Manifest | None:
        """The manifest of `folder`; None where there is none that this release can read."""
        try:
            content = json.loads((folder / MANIFEST_NAME).read_text(encoding="utf-8"))
            if content["format"] != _FORMAT:
                return None
            files = {name: FileRecord(int(r["bytes"]), str(r["sha256"])) for name, r in content["files"].items()}
            return cls(str(content["source"]), files)
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None

    def write(self, folder: Path) -> None:
        """Put the manifest into `folder`."""
        content = {"format": _FORMAT, **asdict(self)}
        (folder / MANIFEST_NAME).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

    @property
    def nbytes(self) -> int:
        """Bytes of all files."""
        return sum(record.bytes for record in self.files.values())

    def find_damage(self, folder: Path, *, checksums: bool) -> str | None:
        """What is wrong with the files in `folder`; None if nothing is.

        Args:
            folder: Where they lie.
            checksums: Read every byte, instead of comparing sizes only.
        """
        for name, expected in self.files.items():
            path = folder / name
            if not path.is_file():
                return f"{name} is missing"
            if (size := path.stat().st_size) != expected.bytes:
                return f"{name} has {size} bytes instead of {expected.bytes}"
            if checksums and (digest := sha256_of(path)) != expected.sha256:
                return f"{name} has SHA-256 {digest} instead of {expected.sha256}"
        return None


def sha256_of(path: Path) -> str:
    """A file's SHA-256, 64 hex digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()
