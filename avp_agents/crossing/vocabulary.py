"""Which tokens of two models stand for the same bytes. Kept between processes as index arrays, and nothing else."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from avp_agents.crossing.token_bytes import TokenBytes

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class SharedVocabulary:
    """Pairs of ids, one of each model, that stand for the same bytes.

    Attributes:
        source_ids: ``[n]`` int32, ascending. Every source id whose bytes the target has.
        target_ids: ``[n]`` int32, the target's id for the same bytes. Several source ids may share one.
        source_tokens: How many ids of the source stand for bytes.
        target_tokens: The same of the target.
    """

    source_ids: np.ndarray
    target_ids: np.ndarray
    source_tokens: int
    target_tokens: int

    def __len__(self) -> int:
        return len(self.source_ids)

    @property
    def share_of_source(self) -> float:
        """Share of the source's tokens that the target has."""
        return len(self) / max(1, self.source_tokens)

    @property
    def share_of_target(self) -> float:
        """Share of the target's tokens that the source has."""
        return len(np.unique(self.target_ids)) / max(1, self.target_tokens)


def shared_vocabulary(source: TokenBytes, target: TokenBytes) -> SharedVocabulary:
    """Match two vocabularies by bytes."""
    ids = target.ids
    pairs = [(i, ids[piece]) for i, piece in enumerate(source.pieces) if piece is not None and piece in ids]
    table = np.asarray(pairs, dtype=np.int32).reshape(-1, 2)
    return SharedVocabulary(
        source_ids=np.ascontiguousarray(table[:, 0]),
        target_ids=np.ascontiguousarray(table[:, 1]),
        source_tokens=sum(piece is not None for piece in source.pieces),
        target_tokens=sum(piece is not None for piece in target.pieces),
    )


def cached_shared_vocabulary(
    folder: Path,
    fingerprints: tuple[str, str],
    source: Callable[[], TokenBytes],
    target: Callable[[], TokenBytes],
) -> SharedVocabulary:
    """`shared_vocabulary`, kept in `folder` under both fingerprints; a file that cannot be read is made anew.

    Args:
        folder: Where the files are; made if it is missing.
        fingerprints: The source's and the target's.
        source, target: Their vocabularies; asked for only where there is no file.
    """
    file = folder / f"{fingerprints[0]}-{fingerprints[1]}.safetensors"
    if file.exists():
        try:
            return _read(file)
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            log.warning("The shared vocabulary in %s cannot be read (%s); it is made again.", file, error)
    shared = shared_vocabulary(source(), target())
    _write(file, shared)
    return shared


def _write(file: Path, shared: SharedVocabulary) -> None:
    """Written beside its place and then renamed, so that nobody reads half a file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    counts = np.asarray([shared.source_tokens, shared.target_tokens], dtype=np.int32)
    unfinished = file.with_suffix(f".{os.getpid()}.{id(shared):x}.part")
    save_file({"source_ids": shared.source_ids, "target_ids": shared.target_ids, "tokens": counts}, unfinished)
    unfinished.replace(file)


def _read(file: Path) -> SharedVocabulary:
    arrays = load_file(file)
    source_ids, target_ids, tokens = arrays["source_ids"], arrays["target_ids"], arrays["tokens"]
    if source_ids.shape != target_ids.shape or source_ids.ndim != 1 or tokens.shape != (2,):
        raise ValueError("its arrays do not fit together")
    if any(array.dtype != np.int32 or (array.size and array.min() < 0) for array in arrays.values()):
        raise ValueError("its arrays are not ids")
    return SharedVocabulary(source_ids, target_ids, int(tokens[0]), int(tokens[1]))
