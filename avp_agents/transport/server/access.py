"""Who may ask: bearer tokens and the namespaces they open, and which sites' requests are taken."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import os
import re
import secrets
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol
from urllib.parse import urlsplit

from avp_agents.errors import AuthenticationError, ConfigurationError
from avp_agents.store import Namespace
from avp_agents.transport.problems import Refusal

_LINE = re.compile(r"sha256:(?P<digest>[0-9a-f]{64})\s+(?P<namespace>\S+)")
_TOKEN_BYTES = 32
_OPEN_NAMESPACE = "default"


@dataclass(frozen=True)
class Token:
    """A token's digest and the namespace it opens. The token itself is kept nowhere."""

    digest: bytes
    namespace: str


class Tokens(Protocol):
    """Where tokens are looked up."""

    def entries(self) -> Iterable[Token]:
        """All of them."""
        ...


@dataclass(frozen=True)
class OneToken:
    """A single token, for a single namespace."""

    token: str = field(repr=False)
    namespace: str = _OPEN_NAMESPACE

    def entries(self) -> Iterable[Token]:
        """It."""
        return (Token(token_digest(self.token), self.namespace),)


class TokenFile:
    """Tokens in a file, one per line: ``sha256:<64 hex digits> <namespace>``; ``#`` begins a comment.

    The file is read again when it changes, so that a token can be revoked while the server runs.

    Raises:
        ConfigurationError: The file cannot be read, can be written by other users, or a line is malformed.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._stamp: tuple[int, int] | None = None
        self._entries: tuple[Token, ...] = ()
        self.entries()

    def entries(self) -> Iterable[Token]:
        """The tokens as the file has them now."""
        try:
            status = self._path.stat()
            if status.st_mode & 0o022:
                raise ConfigurationError(f"{self._path} can be written by other users. Run: chmod go-w '{self._path}'")
            stamp = (status.st_mtime_ns, status.st_size)
            with self._lock:
                if stamp != self._stamp:
                    self._entries = tuple(_read_lines(self._path))
                    self._stamp = stamp
                return self._entries
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigurationError(f"Cannot read the tokens file {self._path}: {error}.") from error


def add_token(path: Path, namespace: str) -> str:
    """Make a token for a namespace, append its digest to a tokens file (which is created), and return the token.

    Raises:
        ConfigurationError: The namespace's name is malformed, or the file cannot be written.
    """
    Namespace(namespace, b"\0" * _TOKEN_BYTES)
    token = secrets.token_urlsafe(_TOKEN_BYTES)
    try:
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "w") as file:
            file.write(f"sha256:{token_digest(token).hex()} {namespace}\n")
    except OSError as error:
        raise ConfigurationError(f"Cannot write the tokens file {path}: {error}.") from error
    return token


def token_digest(token: str) -> bytes:
    """SHA-256. A token has 256 random bits, so no slow or salted hash is needed."""
    return hashlib.sha256(token.encode(errors="surrogatepass")).digest()


def _read_lines(path: Path) -> Iterable[Token]:
    for number, line in enumerate(path.read_text("utf-8").splitlines(), start=1):
        text = line.partition("#")[0].strip()
        if not text:
            continue
        found = _LINE.fullmatch(text)
        if found is None:
            raise ConfigurationError(f"{path}, line {number}: expected 'sha256:<64 hex digits> <namespace>'.")
        yield Token(bytes.fromhex(found["digest"]), found["namespace"])


@dataclass(frozen=True)
class Access:
    """What a request must show.

    Attributes:
        tokens: None lets everybody in, as the namespace ``"default"``; only a server on a loopback address may.
        loopback: The server is bound to a loopback address. Then the Host and the Origin must name one too, so that no
            web page that the user visits can reach it (DNS rebinding).
        hosts: Further names that the Host may have; with a server that is not on loopback, the only ones, if any.
    """

    tokens: Tokens | None
    loopback: bool
    hosts: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        if self.tokens is None and not self.loopback:
            raise ConfigurationError("A server that others can reach needs tokens; bind it to 127.0.0.1, or pass some.")

    def check_site(self, headers: Mapping[str, str]) -> None:
        """Refuse a request that a web page of another site caused.

        Raises:
            Refusal: 403.
        """
        host = _host_name("//" + headers.get("host", ""))
        if (self.loopback or self.hosts) and not self._is_ours(host):
            raise _refused(f"The Host {host!r} is not this server's; pass --allow-host to serve under that name.")
        origin = headers.get("origin")
        if self.loopback and origin is not None and not self._is_ours(_host_name(origin)):
            raise _refused(f"Requests of the site {origin!r} are not taken.")

    def namespace(self, headers: Mapping[str, str]) -> str:
        """The namespace that the request's token opens.

        Raises:
            Refusal: 401.
        """
        if self.tokens is None:
            return _OPEN_NAMESPACE
        scheme, _, token = headers.get("authorization", "").partition(" ")
        presented = token_digest(token.strip())
        namespace = None
        # all of them, and in constant time: how long it takes says nothing about which token comes close
        for known in self.tokens.entries():
            if hmac.compare_digest(known.digest, presented):
                namespace = known.namespace
        if scheme.lower() != "bearer" or namespace is None:
            error = AuthenticationError("Send a token that this server knows: 'Authorization: Bearer <token>'.")
            raise Refusal(401, error, headers={"www-authenticate": "Bearer"})
        return namespace

    def _is_ours(self, host: str) -> bool:
        return host in self.hosts or (self.loopback and is_loopback(host))


def is_loopback(host: str) -> bool:
    """Whether a host name or address is this machine's own loopback."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _host_name(url: str) -> str:
    try:
        return urlsplit(url).hostname or ""
    except ValueError:
        return ""


def _refused(message: str) -> Refusal:
    return Refusal(403, AuthenticationError(message))
