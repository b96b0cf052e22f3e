"""A URL that bytes can be read from anywhere in it, by range requests."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from avp_agents.errors import AuthenticationError, ConfigurationError, TransportError

if TYPE_CHECKING:
    import httpx

_CONTENT_RANGE = re.compile(r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18})")
_SECONDS = 30.0


class UrlSource:
    """A URL as a `ByteSource`. Each read is a range request that is hung up on once it has delivered.

    Args:
        client: Follows no redirects.
        url: What to read.
    """

    def __init__(self, client: httpx.Client, url: str) -> None:
        self._client, self._url, self._size = client, url, 0

    def size(self) -> int:
        """Length in bytes.

        Raises:
            TransportError, AuthenticationError: As for `read`.
        """
        if not self._size:
            self.read(0, 1)
        return self._size

    def read(self, offset: int, length: int) -> bytes:
        """Bytes from the URL.

        Raises:
            TransportError: The server cannot be reached, refuses, does not answer ranges, or changed the file.
            AuthenticationError: It wants a token, or another one.
        """
        if not length:
            return b""
        import httpx

        data = bytearray()
        # open-ended, since servers that resume downloads often know no other range
        try:
            with self._client.stream("GET", self._url, headers={"range": f"bytes={offset}-"}) as response:
                self._check(response, offset)
                for chunk in response.iter_raw():
                    data += chunk[: length - len(data)]
                    if len(data) == length:
                        return bytes(data)
        except httpx.HTTPError as error:
            raise TransportError(f"{self._url} cannot be read: {error or type(error).__name__}.") from error
        raise TransportError(f"{self._url} ended {length - len(data)} bytes early.")

    def _check(self, response: httpx.Response, offset: int) -> None:
        """The answer is the range that was asked for, of the same file as before."""
        if response.status_code in (401, 403):
            raise AuthenticationError(f"{self._url} wants a token, or another one: --token or AVP_TOKEN.")
        if response.status_code == 200:
            raise TransportError(f"{self._url} does not answer range requests; download it and inspect the file.")
        if response.status_code != 206:
            raise TransportError(f"{self._url} answers {response.status_code}; redirects are not followed.")
        found = _CONTENT_RANGE.fullmatch(response.headers.get("content-range", ""))
        encoded = response.headers.get("content-encoding", "identity") != "identity"
        if found is None or int(found[1]) != offset or encoded:
            raise TransportError(f"{self._url} answers with another range than was asked for.")
        size = int(found[3])
        if self._size not in (0, size):
            raise TransportError(f"{self._url} changed while it was read.")
        self._size = size


@contextmanager
def url_source(url: str, token: str | None) -> Iterator[UrlSource]:
    """A source for an http or https URL.

    Raises:
        ConfigurationError: The URL is another one, or httpx is not installed.
    """
    try:
        import httpx
    except ImportError as error:
        raise ConfigurationError("URLs need httpx: pip install 'avp-agents[server]'.") from error
    try:
        parsed = httpx.URL(url)
    except httpx.InvalidURL as error:
        raise ConfigurationError(f"{url} is not a URL: {error}.") from error
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise ConfigurationError("Only http and https URLs can be inspected.")
    headers = {"accept-encoding": "identity"} | ({"authorization": f"Bearer {token}"} if token else {})
    with httpx.Client(headers=headers, timeout=_SECONDS, follow_redirects=False) as client:
        yield UrlSource(client, url)
