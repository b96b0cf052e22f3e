"""``avp-agents serve``: one model for many graph workers, over HTTP. ``avp-agents add-token``: who may use it."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from avp_agents.cli.console import progress_console, result_console
from avp_agents.errors import ConfigurationError

if TYPE_CHECKING:
    from starlette.applications import Starlette

    from avp_agents.engine.latent_engine import LatentEngine
    from avp_agents.transport.server import Access, Binding, ServerLimits

TOKEN_VARIABLE = "AVP_SERVE_TOKEN"


def serve(
    model: Annotated[
        str | None, typer.Argument(help="Name or folder of a Hugging Face model. Default: SmolLM2-135M-Instruct.")
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 8300,
    name: Annotated[str | None, typer.Option(help="Name that clients know the model by. Default: as given.")] = None,
    tokens: Annotated[
        Path | None,
        typer.Option(help=f"File of token digests, see add-token. Or set {TOKEN_VARIABLE} to a single token."),
    ] = None,
    without_token: Annotated[
        bool, typer.Option("--without-token", help="Let every program on this machine in; on loopback only.")
    ] = False,
    allow_host: Annotated[list[str] | None, typer.Option(help="A further name that requests may use.")] = None,
    certificate: Annotated[Path | None, typer.Option(help="Certificate (PEM): speak TLS.")] = None,
    private_key: Annotated[Path | None, typer.Option(help="Its private key (PEM).")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ... Default: an accelerator if there is one.")] = None,
    max_batch: Annotated[int, typer.Option(min=1, help="Most requests that are computed at once.")] = 16,
    kv_pool_mib: Annotated[
        int | None,
        typer.Option(min=1, help="MiB for KV-caches. Default: 2048 on a CPU, 60 % of an accelerator's free memory."),
    ] = None,
    batch_invariant: Annotated[
        bool,
        typer.Option(
            "--batch-invariant",
            help="Answers do not depend on what else is computed; a step costs that of --max-batch.",
        ),
    ] = False,
    concurrency: Annotated[int, typer.Option(min=1, help="Most requests at a time, per namespace.")] = 64,
    rate: Annotated[float | None, typer.Option(help="Most requests a second, per namespace.")] = None,
    contexts: Annotated[int, typer.Option(min=1, help="Most stored contexts, per namespace.")] = 10_000,
    upload_mib: Annotated[int, typer.Option(min=1, help="Largest context that may be uploaded, in MiB.")] = 1024,
    store: Annotated[
        str | None,
        typer.Option(help="Where contexts are kept for several servers: redis://..., s3://... Default: a folder here."),
    ] = None,
    mcp: Annotated[bool, typer.Option("--mcp", help="Also offer tools and contexts over MCP, at /mcp.")] = False,
) -> None:
    """Serve a model: think, generate and contexts for RemoteEngine, and an OpenAI-compatible chat endpoint."""
    _require_server_packages()
    from avp_agents.models import resolve_model
    from avp_agents.transport.server import Binding, ServerLimits

    binding = Binding(host, port, certificate, private_key)
    limits = ServerLimits(concurrency=concurrency, rate=rate, contexts=contexts, upload_bytes=upload_mib * 2**20)
    access = _access(host, tokens, without_token, frozenset(allow_host or ()))
    if store is not None:
        from avp_agents.store import open_store

        # what is wrong with it is said before minutes go into loading a model
        open_store(store).close()
    extensions = [_mcp_endpoint()] if mcp else []
    folder, shown = resolve_model(model), _shown_name(name, model)
    pool = kv_pool_mib * 2**20 if kv_pool_mib is not None else None
    settings = {"max_batch": max_batch, "kv_pool_bytes": pool, "batch_invariant": batch_invariant}
    load = partial(_load, folder, dtype=dtype, device=device, **settings)
    _run(load, shown, store, binding, limits, access, extensions)


def add_token(
    tokens: Annotated[Path, typer.Argument(help="The file; created if it is not there.")],
    namespace: Annotated[str, typer.Argument(help="What the token opens; contexts are not shared between namespaces.")],
) -> None:
    """Make a token for a namespace, add its digest to a tokens file, and print the token. It is shown only once."""
    from avp_agents.transport.server.access import add_token as add

    typer.echo(add(tokens, namespace))


def _load(folder: str, **options: Any) -> LatentEngine:
    """An engine with its weights in memory."""
    from transformers.utils import logging

    from avp_agents.engine.latent_engine import LatentEngine

    logging.disable_progress_bar()
    engine = LatentEngine.from_pretrained(folder, **options)
    engine.load()
    return engine


def _run(
    load: Callable[[], LatentEngine],
    name: str,
    store: str | None,
    binding: Binding,
    limits: ServerLimits,
    access: Access,
    extensions: Sequence[Callable[[Starlette], None]],
) -> None:
    """Load the model, and serve until the process is told to stop."""
    import asyncio

    from avp_agents.store import default_store, open_store
    from avp_agents.transport.server import create_app
    from avp_agents.transport.server import serve as serve_app

    console = progress_console()
    with console.status("Loading the model"):
        engine = load()
    with engine:
        open_for = default_store if store is None else partial(open_store, store)
        app = create_app(
            lambda namespace: engine.for_store(open_for(namespace)), model=name, access=access, limits=limits
        )
        for extend in extensions:
            extend(app)
        console.print(f"Serving [bold]{escape(name)}[/] at {escape(binding.url)}; stop with Ctrl-C.")
        asyncio.run(serve_app(app, binding, limits))
    result_console().print("Stopped.")


def _mcp_endpoint() -> Callable[[Starlette], None]:
    from avp_agents.transport.mcp import mount

    return mount


def _access(host: str, tokens: Path | None, without_token: bool, hosts: frozenset[str]) -> Access:
    """Who may ask, from the options and the environment."""
    from avp_agents.transport.server import Access, TokenFile
    from avp_agents.transport.server.access import OneToken, is_loopback

    loopback, single = is_loopback(host), os.environ.get(TOKEN_VARIABLE)
    ways = [way for way in (tokens, single, without_token or None) if way is not None]
    if len(ways) != 1:
        raise ConfigurationError(
            f"Say who may use the server, in one way: --tokens FILE (see `avp-agents add-token`), {TOKEN_VARIABLE}, "
            "or, on a loopback address, --without-token."
        )
    if without_token and not loopback:
        raise ConfigurationError(f"--without-token is for loopback addresses only, and {host} is not one.")
    known = TokenFile(tokens) if tokens is not None else OneToken(single) if single is not None else None
    return Access(known, loopback, hosts)


def _shown_name(name: str | None, model: str | None) -> str:
    """A model's name for clients: of a folder its last part, since paths are nobody's business."""
    from avp_agents.models.embedded import NAME

    given = name or model or NAME
    return os.path.basename(os.path.normpath(given)) if os.path.exists(given) else given


def _require_server_packages() -> None:
    try:
        import granian
        import starlette  # noqa: F401
    except ModuleNotFoundError as error:
        raise ConfigurationError(
            f'`avp-agents serve` needs {error.name}. Install it with: pip install "avp-agents[server]"'
        ) from error
    del granian
