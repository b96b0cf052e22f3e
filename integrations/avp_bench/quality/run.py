"""Running all arms on all problems, batched through the engine; `run_folder` keeps what was answered."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any

from avp_agents.errors import ConfigurationError
from avp_bench.quality.answering import Bench, TeamAnswer
from avp_bench.quality.arms import CROSS_MODEL
from avp_bench.quality.run_folder import Key, Plan, RunFolder
from avp_bench.sandbox import RunProgram


def run(
    bench: Bench,
    plan: Plan,
    folder: RunFolder,
    *,
    run_program: RunProgram,
    concurrency: int,
    report: Callable[[int, int], None],
) -> None:
    """Answer what is not answered yet.

    Args:
        bench: Engine and task.
        plan: What to run.
        folder: Where results go, and what of them is there.
        run_program: Runs code answers.
        concurrency: Answers that are worked on at once.
        report: Told how many answers of how many are there.

    Raises:
        ConfigurationError: Another process works on the run, or the plan makes no sense.
    """
    _check(plan, bench)
    arms = {arm.name: arm for arm in plan.arms}
    positions = {item.id: index for index, item in enumerate(plan.items)}

    def answer(key: Key) -> None:
        name, item_id, seed = key
        index = positions[item_id]
        item, other = plan.items[index], plan.items[(index + 1) % len(plan.items)]
        made = bench.answer(arms[name], item, other, _seed_of(seed, index))
        right = bench.task.right(item, made.text, run_program)
        folder.add(*_rows(key, made, right))

    with folder.ours(), ThreadPoolExecutor(concurrency) as pool:
        done = folder.done()
        todo = [key for key in plan.in_order() if key not in done]
        report(len(done), len(done) + len(todo))
        for finished, future in enumerate(_in_flight(pool, answer, todo, 2 * concurrency), len(done) + 1):
            future.result()
            report(finished, len(done) + len(todo))
        folder.finish()


def _check(plan: Plan, bench: Bench) -> None:
    if len(set(plan.seeds)) > 1 and bench.temperature == 0:
        raise ConfigurationError("At temperature 0 all seeds give the same answers: pass one, or --temperature 0.7.")
    if len(plan.items) < 2 and any(arm.mode == "shuffled" for arm in plan.arms):
        raise ConfigurationError("The arm shuffled thinks about another problem: take at least two problems.")
    if bench.source is None and (crossing := [arm.name for arm in plan.arms if arm.mode in CROSS_MODEL]):
        raise ConfigurationError(f"The arm {crossing[0]} needs a second model: pass --source.")
    if len({item.id for item in plan.items}) < len(plan.items):
        raise ConfigurationError("Two problems have the same id; results could not be told apart.")


def _in_flight(
    pool: ThreadPoolExecutor, work: Callable[[Key], None], todo: Sequence[Key], most: int
) -> Iterator[Future[None]]:
    """Submit a few at a time, so that an error ends the run soon."""
    waiting: set[Future[None]] = set()
    for key in todo:
        waiting.add(pool.submit(work, key))
        if len(waiting) >= most:
            ready, waiting = wait(waiting, return_when=FIRST_COMPLETED)
            yield from ready
    yield from waiting


def _rows(key: Key, made: TeamAnswer, right: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    names = dict(zip(("arm", "item", "seed"), key, strict=True))
    usages = [stage.usage for stage in made.stages]
    tokens = {
        "read": sum(stage.read for stage in made.stages),
        "latent": sum(usage.latent_steps for usage in usages),
        "decoded": sum(usage.completion_tokens for usage in usages),
    }
    answer = {
        "right": right, "answer": made.text, "finish_reason": made.finish_reason, "tokens": tokens,
        "handoff": made.handoff.mode, "bytes": made.handoff.bytes,
    }  # fmt: skip
    seconds = [
        {
            "role": stage.role,
            "prefill": round(stage.usage.prefill_seconds, 4),
            "latent": round(stage.usage.latent_seconds, 4),
            "decode": round(stage.usage.decode_seconds, 4),
            "queue": round(stage.usage.queue_seconds, 4),
        }
        for stage in made.stages
    ]
    return names | answer, names | {"stages": seconds}


def _seed_of(seed: int, index: int) -> int:
    return seed * 1_000_003 + index
