"""A process that imports torch once and then forks workers, each like a process of its own over one disk store.

Reads ``JOB FOLDER SEED`` lines from standard input, answers each with ``started PID``, and with ``ended PID STATUS``
when the worker is done or killed. Workers report on the same pipe; lines of less than 4096 bytes are whole.
"""

from __future__ import annotations

import os
import random
import sys
import threading
import traceback
from functools import cache

from avp_agents.context import Context
from avp_agents.store import DiskStore
from avp_agents.testing import make_context
from avp_agents.testing.contexts import assert_same_kv, assert_same_lineage
from avp_agents.testing.store_suite import TENANT

RECIPES = 6
TURNS = 4
HEAD_DIM = 256


@cache
def context_of(path: str) -> Context:
    """The context at the end of a path of seeds, "3.0.5": always the same values, so that any reader can check it."""
    context = None
    for seed in path.split("."):
        context = make_context(parent=context, seed=int(seed), kv_short=1, head_dim=HEAD_DIM)
    assert context is not None
    return context


def check(found: Context, path: str, *, whole_kv: bool = False) -> None:
    """The context at the end of a path, and what there is of its KV-cache, bit for bit.

    A segment that others go on from may have got the one position that its own cache lacked.
    """
    expected = context_of(path)
    assert_same_lineage(found, expected)
    kv = make_context(parent=expected, kv_short=0, head_dim=HEAD_DIM).kv
    assert kv is not None
    assert found.kv_len >= expected.kv_len or not whole_kv, "a KV-cache that was put must be there"
    if found.kv_len:
        assert_same_kv(found, expected.with_kv(kv.to_host(0, found.kv_len)))


def random_path(numbers: random.Random) -> str:
    """Few first seeds, so that workers share segments."""
    return ".".join(str(numbers.randrange(RECIPES)) for _ in range(numbers.randrange(1, TURNS + 1)))


def report(*words: object) -> None:
    """One line to whoever reads the pipe."""
    os.write(1, (" ".join(map(str, words)) + "\n").encode())


def write_until_killed(store: DiskStore, numbers: random.Random) -> None:
    """Put contexts and delete some again; say so after each put and before each delete."""
    scope = str(os.getpid())
    while True:
        path = random_path(numbers)
        handle = store.put(context_of(path), scope=scope, text=path)
        report("stored", os.getpid(), handle.id, path)
        if numbers.random() < 0.3:
            report("deleting", os.getpid(), handle.id)
            store.delete(handle)


def churn(store: DiskStore, numbers: random.Random) -> None:
    """Put, read, drop and delete contexts that other workers use too; report what stays."""
    scope = str(os.getpid())
    for turn in range(12):
        path = f"{random_path(numbers)}.{turn}"
        handle = store.put(context_of(path), scope=scope, text=path)
        check(store.get(handle, scope=scope), path, whole_kv=True)
        if turn % 3 == 0:
            store.drop_kv(handle)
        if turn % 3 == 1:
            assert store.delete(handle)
        else:
            report("stored", os.getpid(), handle.id, path)
        if turn % 4 == 0:
            store.prune()


JOBS = {"write": write_until_killed, "churn": churn}


def main() -> None:
    """Fork a worker for each line."""
    for line in sys.stdin:
        job, folder, seed = line.split()
        pid = os.fork()
        if pid == 0:
            try:
                JOBS[job](DiskStore(folder, namespace=TENANT), random.Random(int(seed)))
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        report("started", pid)
        threading.Thread(target=lambda pid=pid: report("ended", pid, os.waitpid(pid, 0)[1])).start()


if __name__ == "__main__":
    main()
