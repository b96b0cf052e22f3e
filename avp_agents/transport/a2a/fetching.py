"""Fetching what another agent's message points to, without being made to reach anything else.

The URL comes from outside. So its host must be one that the receiver expects from this sender; every address that the
name resolves to is checked; and the connection goes to the address that was checked, never to a name that is resolved
again. Redirects are not followed, and size and time are bounded.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
import ssl
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import httpx

from avp_agents.errors import ConfigurationError, LimitExceededError, TransportError
from avp_agents.protocol.handshake import LinkMeter

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Resolve = Callable[[str, int], Awaitable[Sequence[str]]]
"""Gives the addresses of a host."""

_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
_PORTS = {"https": 443, "http": 80}


async def resolve_host(host: str, port: int) -> Sequence[str]:
    """All addresses that the system's resolver has for a host.

    Raises:
        OSError: There are none.
    """
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [str(address[0]) for *_, address in found]


@dataclass(frozen=True)
class UrlPolicy:
    """What a receiver fetches.

    Attributes:
        hosts: Names that URLs may have, exactly as they are written there, each with its port where that is not the
            scheme's own: ``"agents.example.com"``, ``"10.0.0.7:8300"``.
        networks: Private networks that may be reached all the same, such as ``"10.0.0.0/8"``. By default none: no
            loopback, link-local, private, shared, multicast or reserved address, in whatever spelling. Only in these
            networks may a URL be plain HTTP.
        max_bytes: Largest payload.
        seconds: How long a payload may take in all.
        stall_seconds: How long connecting, and the next piece of a payload, may take.
        certificates: A file of certificates to trust instead of the system's.
        resolve: Gives a host's addresses.
        meter: Learns how fast payloads come.
    """

    hosts: frozenset[str]
    networks: Sequence[str] = ()
    max_bytes: int = 2**30
    seconds: float = 300.0
    stall_seconds: float = 10.0
    certificates: str | None = None
    resolve: Resolve = field(default=resolve_host, repr=False)
    meter: LinkMeter = field(default_factory=LinkMeter, repr=False, compare=False)

    def __post_init__(self) -> None:
        if isinstance(self.hosts, str) or self.max_bytes < 1 or not self.seconds > 0 or not self.stall_seconds > 0:
            raise ConfigurationError("A UrlPolicy has a set of hosts, and a positive size and times.")
        self.allowed_networks  # noqa: B018 - says now what is malformed

    @cached_property
    def allowed_networks(self) -> tuple[ipaddress.IPv4Network | ipaddress.IPv6Network, ...]:
        """`networks`, parsed.

        Raises:
            ConfigurationError: One is malformed.
        """
        try:
            return tuple(ipaddress.ip_network(network) for network in self.networks)
        except ValueError as error:
            raise ConfigurationError(f"A UrlPolicy's networks are written as 10.0.0.0/8: {error}.") from error

    @cached_property
    def tls(self) -> ssl.SSLContext:
        """What certificates are checked with."""
        return ssl.create_default_context(cafile=self.certificates)

    def check_url(self, text: str) -> httpx.URL:
        """The URL, if it may be fetched at all.

        Raises:
            TransportError: It may not.
        """
        try:
            url = httpx.URL(text)
        except (httpx.InvalidURL, ValueError, TypeError) as error:
            raise TransportError(f"A payload's URL is malformed: {error}.") from error
        if url.scheme not in _PORTS or url.userinfo or not url.host or url.fragment:
            raise TransportError("A payload's URL must be http(s) with a host, without a user and without a fragment.")
        host = _host(url)
        named = host if url.port is None else f"{_bracketed(host)}:{url.port}"
        if named not in self.hosts:
            raise TransportError(f"Payloads are not fetched from {named[:100]!r}; add it to UrlPolicy.hosts.")
        return url

    def check_addresses(self, url: httpx.URL, addresses: Sequence[str]) -> list[Address]:
        """The addresses of a URL's host, if all of them may be reached.

        A name that leads to one address outside and to one inside is not to be trusted with either.

        Raises:
            TransportError: There are none, or one may not be reached.
        """
        checked = [self._checked(url, address) for address in dict.fromkeys(addresses)]
        if not checked:
            raise TransportError(f"{url.host} has no address.")
        return checked

    def _checked(self, url: httpx.URL, text: str) -> Address:
        try:
            address = ipaddress.ip_address(text)
        except ValueError as error:
            raise TransportError(f"{url.host} resolves to {text[:60]!r}, which is no address.") from error
        reached = _reached(address)
        if any(reached in network for network in self.allowed_networks if network.version == reached.version):
            return address
        if not _is_public(reached):
            raise TransportError(
                f"{url.host} resolves to {address}, which is not a public address; add its network to "
                "UrlPolicy.networks if payloads may come from there."
            )
        if url.scheme != "https":
            raise TransportError(f"A payload at a public address must be https, not {url.scheme}.")
        return address


async def fetch(text: str, policy: UrlPolicy, *, token: str | None) -> bytearray:
    """The bytes at a URL that came from outside.

    Args:
        text: The URL; untrusted.
        policy: What may be fetched.
        token: Bearer token for the server; sent only to a host of the policy.

    Raises:
        TransportError: It may not be fetched, or could not be.
        LimitExceededError: It is larger than allowed.
    """
    url = policy.check_url(text)
    started = time.perf_counter()
    try:
        async with asyncio.timeout(policy.seconds):
            addresses = policy.check_addresses(url, await _resolved(url, policy))
            data = await _from_any(url, addresses, policy, token)
    except TimeoutError as error:
        raise TransportError(f"{url.host} did not send the payload within {policy.seconds:g} s.") from error
    policy.meter.note(len(data), time.perf_counter() - started)
    return data


async def _resolved(url: httpx.URL, policy: UrlPolicy) -> Sequence[str]:
    try:
        async with asyncio.timeout(policy.stall_seconds):
            return await policy.resolve(_host(url), _port(url))
    except (OSError, UnicodeError) as error:
        if isinstance(error, TimeoutError):
            raise TransportError(f"{url.host} was not resolved within {policy.stall_seconds:g} s.") from error
        raise TransportError(f"{url.host} cannot be resolved: {error}.") from error


async def _from_any(url: httpx.URL, addresses: Sequence[Address], policy: UrlPolicy, token: str | None) -> bytearray:
    """The payload, from the first address that can be connected to."""
    *others, last = addresses
    for address in others:
        try:
            return await _from_address(url, address, policy, token)
        except (httpx.ConnectError, httpx.ConnectTimeout):
            continue
    try:
        return await _from_address(url, last, policy, token)
    except httpx.TransportError as error:
        raise TransportError(f"{url.host} did not send the payload: {str(error) or type(error).__name__}.") from error


async def _from_address(url: httpx.URL, address: Address, policy: UrlPolicy, token: str | None) -> bytearray:
    """Connect to an address; the host's name is what the request and the certificate are about."""
    headers = {"host": url.netloc.decode("ascii"), "accept-encoding": "identity"}
    if token is not None:
        headers["authorization"] = f"Bearer {token}"
    async with httpx.AsyncClient(
        verify=policy.tls,
        timeout=policy.stall_seconds,
        follow_redirects=False,
        trust_env=False,  # a proxy would resolve the name again
    ) as client:
        request = client.build_request("GET", url.copy_with(host=str(address)), headers=headers)
        request.extensions["sni_hostname"] = _host(url)
        response = await client.send(request, stream=True)
        try:
            return await _body(response, policy)
        finally:
            await response.aclose()


async def _body(response: httpx.Response, policy: UrlPolicy) -> bytearray:
    if response.is_redirect:
        raise TransportError("The payload's URL redirects, and redirects are not followed.")
    if response.status_code != 200:
        raise TransportError(f"The payload's server answers with status {response.status_code}.")
    if response.headers.get("content-encoding", "identity") != "identity":
        raise TransportError("The payload's server compresses it although it was asked not to.")
    declared = response.headers.get("content-length", "0")
    if not declared.isascii() or not declared.isdigit() or len(declared) > 18 or int(declared) > policy.max_bytes:
        raise _too_large(policy)
    data = bytearray()
    async for piece in response.aiter_raw():
        if len(data) + len(piece) > policy.max_bytes:
            raise _too_large(policy)
        data += piece
    return data


def _reached(address: Address) -> Address:
    """The address that packets go to in the end, where an IPv6 address stands for an IPv4 one."""
    if isinstance(address, ipaddress.IPv4Address):
        return address
    if address.ipv4_mapped is not None:
        return address.ipv4_mapped
    if address in _NAT64:
        return ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    return address


def _is_public(address: Address) -> bool:
    if address.is_multicast or address.is_reserved or address.is_unspecified or not address.is_global:
        return False
    # tunnels end wherever the sender wants them to
    return isinstance(address, ipaddress.IPv4Address) or (address.sixtofour is None and address.teredo is None)


def _too_large(policy: UrlPolicy) -> LimitExceededError:
    return LimitExceededError(f"The payload is larger than the {policy.max_bytes} bytes of UrlPolicy.max_bytes.")


def _host(url: httpx.URL) -> str:
    """In ASCII, whatever alphabet the URL was written in: names are compared and resolved in one form only."""
    return url.raw_host.decode("ascii")


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _port(url: httpx.URL) -> int:
    return url.port if url.port is not None else _PORTS[url.scheme]
