"""Lets libFuzzer choose the frame decoder's inputs: ``python tests/fuzz/atheris_frames.py -runs=1000000 -seed=1``.

Needs ``pip install atheris`` (CPython 3.11 to 3.13) beside avp-agents. Arguments are libFuzzer's. It starts from the
published vectors; an input's first byte says whether the rest gets right MACs and checksums before it is decoded. What
may happen to an input is what `fuzz_frames.decode` asserts; one that takes longer than a second, or a process that
grows above 2 GB, ends the run with a report.
"""

from __future__ import annotations

import random
import sys
import tempfile
from pathlib import Path

import atheris  # pyright: ignore[reportMissingImports, reportMissingModuleSource]

with atheris.instrument_imports(include=["avp_agents.protocol"]):  # pyright: ignore[reportAttributeAccessIssue]
    from fuzz_frames import CORPUS, authentic, changed, decode

LIMITS = ("-timeout=1", "-rss_limit_mb=2048", "-max_len=4096")
SIGNED = b"\1"


def decode_one(data: bytes) -> None:
    """One input."""
    decode(authentic(data[1:]) if data[:1] == SIGNED else data[1:])


def mutate(data: bytes, most: int, seed: int) -> bytes:
    """libFuzzer's own changes, or those that keep a frame's structure."""
    choose = random.Random(seed)
    if choose.random() < 0.5:
        return atheris.Mutate(data, most)
    return (SIGNED + changed(data[1:], choose))[:most]


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as corpus:
        for number, frame in enumerate(CORPUS):
            Path(corpus, str(number)).write_bytes(SIGNED + frame)
        atheris.Setup([sys.argv[0], *LIMITS, *sys.argv[1:], corpus], decode_one, custom_mutator=mutate)
        atheris.Fuzz()
