"""Runs that were never run: folders with the verdicts that a test wants."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from avp_bench.quality.arms import Arm


def write_run(folder: Path, arms: Sequence[Arm], right: Mapping[str, Sequence[bool]]) -> Path:
    """A run's folder.

    Args:
        folder: Where.
        arms: Its arms.
        right: Per arm, whether each problem was solved.
    """
    folder.mkdir(parents=True, exist_ok=True)
    items = [f"problem/{i}" for i in range(len(next(iter(right.values()))))]
    about = {
        "task": "invented", "model": "nobody", "dtype": "bfloat16", "device": "cpu", "temperature": 0.0, "seeds": [0],
        "source": None, "fingerprint": "ab" * 32, "items": items, "arms": [asdict(arm) for arm in arms],
    }  # fmt: skip
    (folder / "run.json").write_text(json.dumps(about))
    with (folder / "answers.jsonl").open("w") as answers, (folder / "times.jsonl").open("w") as times:
        for arm in arms:
            for item, verdict in zip(items, right[arm.name], strict=True):
                key = {"arm": arm.name, "item": item, "seed": 0}
                answers.write(json.dumps(key | _answer(arm, verdict)) + "\n")
                times.write(json.dumps(key | {"stages": _stages(arm)}) + "\n")
    return folder


def _answer(arm: Arm, verdict: bool) -> dict[str, object]:
    thinks = arm.mode in ("latent", "prefill", "shuffled")
    read, decoded = (300, 150) if thinks else (650, 500) if "text" in arm.mode else (150, 150)
    return {
        "right": verdict, "answer": f"<b>{verdict}</b> says {arm.mode}", "finish_reason": "stop",
        "tokens": {"read": read, "latent": arm.latent_steps if thinks else 0, "decoded": decoded},
        "handoff": "kv", "bytes": 0 if thinks else 1500,
    }  # fmt: skip


def _stages(arm: Arm) -> list[dict[str, object]]:
    latent, decode = (0.0, 14.0) if "text" in arm.mode else (0.04 * arm.latent_steps, 0.0)
    researcher = {"role": "researcher 1", "prefill": 0.4, "latent": latent, "decode": decode, "queue": 0.0}
    solver = {"role": "solver", "prefill": 0.5, "latent": 0.0, "decode": 5.0, "queue": 0.0}
    return [solver] if arm.mode == "direct" else [researcher, solver]
