"""Running the application: granian, in this process, on this process's event loop."""

from __future__ import annotations

import asyncio
import signal
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from granian.constants import Interfaces
from granian.http import HTTP1Settings, HTTP2Settings
from granian.server.embed import Server
from starlette.applications import Starlette
from starlette.types import ASGIApp

from avp_agents.errors import ConfigurationError
from avp_agents.transport.server.limits import ServerLimits

CONNECTIONS = 4096
GRACE_SECONDS = 5.0
_HEADER_BYTES = 64 * 1024
_STREAMS = 128


@dataclass(frozen=True)
class Binding:
    """Where the server listens.

    Attributes:
        host: An address of this machine.
        port: Its port.
        certificate, private_key: Files in PEM form; both or none. With them the server speaks TLS only.
    """

    host: str = "127.0.0.1"
    port: int = 8300
    certificate: Path | None = None
    private_key: Path | None = None

    def __post_init__(self) -> None:
        if (self.certificate is None) != (self.private_key is None):
            raise ConfigurationError("TLS needs both a certificate and a private key.")
        for path in (self.certificate, self.private_key):
            if path is not None and not path.is_file():
                raise ConfigurationError(f"There is no file {path}.")

    @property
    def url(self) -> str:
        """What clients connect to."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'https' if self.certificate else 'http'}://{host}:{self.port}"


async def serve(
    app: Starlette, binding: Binding, limits: ServerLimits, *, stopped: asyncio.Event | None = None
) -> None:
    """Serve until `stopped` is set, or, without it, until SIGINT or SIGTERM.

    HTTP/1.1 and HTTP/2 (with TLS as negotiated, without it by prior knowledge) share the port. Requests that run get
    five seconds to end.

    Args:
        app: The application.
        binding: Where to listen.
        limits: Of which the time for a request's header is taken here.
        stopped: Ends the server.

    Raises:
        ConfigurationError: The address cannot be listened on.
    """
    server, stop = _server(app, binding, limits), stopped or asyncio.Event()
    if stopped is None:
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, stop.set)
    async with app.router.lifespan_context(app):
        serving = asyncio.create_task(_run(server, binding))
        stopping = asyncio.create_task(stop.wait())
        await asyncio.wait({serving, stopping}, return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        server.stop()
        # connections that clients keep open would otherwise hold it for ever
        await asyncio.wait({serving}, timeout=GRACE_SECONDS)
        serving.cancel()
        with suppress(asyncio.CancelledError):
            await serving


async def _run(server: Server, binding: Binding) -> None:
    try:
        await server.serve()
    except (OSError, RuntimeError) as error:
        raise ConfigurationError(f"Cannot listen on {binding.url}: {error}. Choose another host or port.") from error


def _server(app: ASGIApp, binding: Binding, limits: ServerLimits) -> Server:
    return Server(
        app,
        address=binding.host,
        port=binding.port,
        interface=Interfaces.ASGINL,
        websockets=False,
        log_enabled=False,
        # granian counts idle connections: with its default of 128, as many silent clients would shut everybody out
        backlog=1024,
        backpressure=CONNECTIONS,
        http1_settings=HTTP1Settings(header_read_timeout=int(1000 * limits.read_seconds)),
        http2_settings=HTTP2Settings(
            max_concurrent_streams=_STREAMS,
            max_headers_size=_HEADER_BYTES,
        ),
        ssl_cert=binding.certificate,
        ssl_key=binding.private_key,
    )
