"""A run in a process of its own, to be killed: ``python run_worker.py TOKENIZER SECONDS FOLDER ...``"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from short_task import SHORT, go, random_engine

from avp_bench.quality.answering import Bench
from avp_bench.quality.arms import Arm

ARMS = [Arm(mode, mode, steps=3) for mode in ("direct", "latent", "text", "prefill", "shuffled")]


def main(tokenizer: str, seconds: str, *folders: str) -> None:
    """Do the same run in every folder; after each answer wait, so that there is time to kill it."""
    with random_engine(Path(tokenizer), seed=0) as engine:
        for folder in folders:
            go(
                Bench(engine, SHORT, temperature=0.7), Path(folder), ARMS, count=5, seeds=(0, 1),
                report=lambda done, of: time.sleep(float(seconds)),
            )  # fmt: skip


if __name__ == "__main__":
    main(*sys.argv[1:])
