"""``avp-agents inspect``: what a frame holds, its sizes and checks, without loading its payloads."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from avp_agents.cli.console import print_json, result_console
from avp_agents.cli.url_source import url_source
from avp_agents.errors import ConfigurationError

if TYPE_CHECKING:
    from avp_agents.protocol import FrameReport
    from avp_agents.protocol.frame_inspection import ByteSource


def inspect(
    frame: Annotated[str, typer.Argument(help="A file, or an http(s) URL that answers range requests.")],
    verify: Annotated[
        bool, typer.Option("--verify", help="Read the payloads too, and compare their checksums.")
    ] = False,
    namespace: Annotated[
        str | None, typer.Option(help="Check the MAC with this namespace's key (AVP_STORE_KEY, or the key file).")
    ] = None,
    token: Annotated[
        str | None,
        typer.Option(
            help="Bearer token for a URL of `avp-agents serve`, whose MACs are made with it.", envvar="AVP_TOKEN"
        ),
    ] = None,
    max_mib: Annotated[int, typer.Option(min=1, help="Refuse larger frames.")] = 16 * 1024,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")] = False,
) -> None:
    """Say what a frame holds. Exit code 1 where it is no frame, is damaged, or its MAC is another key's."""
    from avp_agents.protocol import Limits, inspect_frame
    from avp_agents.store import Namespace
    from avp_agents.transport.wire import frame_key

    limits = Limits(frame_bytes=max_mib << 20, value_bytes=max_mib << 20)
    key = None
    if namespace is not None:
        key = Namespace.load(namespace).key
    elif token is not None and "://" in frame:
        key = frame_key(token)
    with _source(frame, token) as source:
        report = inspect_frame(source, key=key, verify=verify, limits=limits)
    if as_json:
        print_json(report.to_json())
    else:
        _show(frame, report)
    if report.authentic is False:
        raise typer.Exit(code=1)


@contextmanager
def _source(frame: str, token: str | None) -> Iterator[ByteSource]:
    from avp_agents.protocol.frame_inspection import FileSource

    if "://" in frame:
        with url_source(frame, token) as source:
            yield source
        return
    path = Path(frame)
    if not path.is_file():
        raise ConfigurationError(f"There is no file {frame}.")
    try:
        yield FileSource(path)
    except OSError as error:
        raise ConfigurationError(f"{frame} cannot be read: {error.strerror}.") from error


def _show(frame: str, report: FrameReport) -> None:
    console = result_console()
    found = report.to_json()
    console.print(f"[bold]{escape(frame)}[/]  {found['kind']}, frame version {found['version']}")
    facts = Table(box=None, show_header=False, pad_edge=False)
    for name, value in _facts(found):
        facts.add_row(name, escape(value))
    console.print(facts)
    table = Table("section", "layer", "dtype", "shape", "stored as")
    table.add_column("bytes", justify="right")
    table.add_column("xxh3-128")
    for section in found["sections"]:
        table.add_row(
            section["kind"],
            str(section.get("layer", "")),
            section["dtype"],
            "×".join(map(str, section["shape"])),
            _storage(section),
            f"{section['bytes']:,}",
            section["xxh3_128"][:16] + "…",
        )
    console.print(table)


def _facts(found: dict[str, Any]) -> Iterator[tuple[str, str]]:
    yield "bytes", f"{found['bytes']:,}, of which {found['bytes_read']:,} were read"
    if found["fingerprint"] is not None:
        yield "model", f"{found['fingerprint']}, {found['dtype']}"
    if found["kind"] == "context":
        yield "positions", f"{found['positions']:,}, of which {found['kv_positions']:,} have keys and values"
    yield "lengths", "agree with each other and with the file"
    yield "checksums", "all sections match theirs" if found["verified"] else "not compared (--verify)"
    covered = "keys and values too" if found["kv_authenticated"] else "not keys and values"
    verdicts = {None: "not checked (--namespace)", True: "matches", False: "DOES NOT MATCH: another key, or altered"}
    yield "MAC", f"{verdicts[found['authentic']]}; it covers lineage and metadata, {covered}"


def _storage(section: dict[str, Any]) -> str:
    parts = []
    if "int8" in section:
        parts.append(f"int8, rms error {section['int8']['rms_error']:.2%}")
    if "compression" in section:
        parts.append(section["compression"])
    return ", ".join(parts) or "as it is"
