"""A network link of a given rate: a TCP proxy that passes bytes on no faster, in a process of its own.

    python -m avp_bench.handoff_link 127.0.0.1:8300 1250000      # 10 Mbit/s; prints the port it listens on

Both directions have a token bucket each, which all connections share, as they would share a cable. It imports nothing
of the package, so that it starts at once and takes no part in what is measured.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

BURST_SECONDS = 0.002
"""How much of a second's bytes may pass at once, after a pause."""
_LARGEST_PIECE = 2**16
_SMALLEST_PIECE = 2**10


@contextmanager
def limited_link(url: str, bytes_per_second: float) -> Iterator[str]:
    """A link to a server; yields the URL at its near end.

    Args:
        url: Of the server, ``http://host:port``.
        bytes_per_second: Of each direction.
    """
    scheme, _, target = url.partition("://")
    command = [sys.executable, "-m", __spec__.name, target, str(bytes_per_second)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield f"{scheme}://127.0.0.1:{int(process.stdout.readline())}"
        finally:
            process.terminate()


class Bucket:
    """Lets so many bytes a second through."""

    def __init__(self, bytes_per_second: float) -> None:
        self._rate, self._free_at = bytes_per_second, 0.0
        self.piece = int(min(_LARGEST_PIECE, max(_SMALLEST_PIECE, bytes_per_second * BURST_SECONDS)))

    async def pass_on(self, size: int) -> None:
        """Wait until `size` bytes may have passed."""
        now = time.monotonic()
        self._free_at = max(self._free_at, now - BURST_SECONDS) + size / self._rate
        if (wait := self._free_at - now) > 0:
            await asyncio.sleep(wait)


async def serve(host: str, port: int, bytes_per_second: float) -> None:
    """Listen on a free port of the loopback, say which, and pass everything on to ``host:port``."""
    up, down = Bucket(bytes_per_second), Bucket(bytes_per_second)

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far_reader, far_writer = await asyncio.open_connection(host, port, limit=2 * _LARGEST_PIECE)
        await asyncio.gather(_carry(reader, far_writer, up), _carry(far_reader, writer, down))
        far_writer.close()
        writer.close()

    server = await asyncio.start_server(connected, "127.0.0.1", 0, limit=2 * _LARGEST_PIECE)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


async def _carry(source: asyncio.StreamReader, target: asyncio.StreamWriter, bucket: Bucket) -> None:
    """One direction of one connection, until its sender ends it or either side breaks the connection."""
    try:
        while data := await source.read(bucket.piece):
            await bucket.pass_on(len(data))
            target.write(data)
            await target.drain()
        target.write_eof()
    except OSError:
        target.close()


if __name__ == "__main__":
    host, _, port = sys.argv[1].rpartition(":")
    with suppress(KeyboardInterrupt):
        asyncio.run(serve(host, int(port), float(sys.argv[2])))
