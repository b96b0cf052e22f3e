"""The checkpointers that contexts have to live with: in memory, SQLite, and Postgres where it is installed."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

from langgraph.checkpoint.base import BaseCheckpointSaver

HAS_POSTGRES = bool(shutil.which("initdb") and shutil.which("pg_ctl") and find_spec("psycopg"))
KINDS = ["memory", "sqlite", *(["postgres"] if HAS_POSTGRES else [])]


@contextmanager
def postgres_server() -> Iterator[str]:
    """The URL of a server of its own, on a socket in a folder of its own."""
    owner = "nobody" if os.getuid() == 0 else None  # the server refuses to run as root
    with tempfile.TemporaryDirectory(prefix="avp-pg-") as root:
        if owner is not None:
            shutil.chown(root, owner)
        data, log = f"{root}/data", f"{root}/log"

        def call(*command: str) -> None:
            subprocess.run(command, check=True, user=owner, cwd=root, stdout=subprocess.DEVNULL, timeout=60)

        call("initdb", "--no-sync", "--auth=trust", "--username=avp", data)
        call("pg_ctl", "-w", "-l", log, "-o", f"-c listen_addresses='' -k {root} -F", "-D", data, "start")
        try:
            yield f"postgresql://avp@/postgres?host={root}"
        finally:
            call("pg_ctl", "-m", "immediate", "-D", data, "stop")


@contextmanager
def open_postgres(url: str) -> Iterator[BaseCheckpointSaver[Any]]:
    """An empty checkpointer on a server; what others left there is dropped."""
    from langgraph.checkpoint.postgres import PostgresSaver

    with PostgresSaver.from_conn_string(url) as saver:
        saver.conn.execute("DROP SCHEMA public CASCADE")  # pyright: ignore[reportAttributeAccessIssue]
        saver.conn.execute("CREATE SCHEMA public")  # pyright: ignore[reportAttributeAccessIssue]
        saver.setup()
        yield saver
