"""SSRF guard: which addresses webhooks may be sent to, and a POST that connects to checked ones only."""

from __future__ import annotations

import http.client
import io
import ipaddress
import socket
import ssl
import time
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import suppress
from functools import cache
from typing import Any, NamedTuple
from urllib.parse import SplitResult, urlsplit

import gevent
from gevent import monkey, threadpool

TIMEOUT = 10.0  # seconds for the addresses, the connection, the request and the response together
BODY_LIMIT = 1024  # bytes of a response's body that are stored
READ_LIMIT = 65_536  # bytes of a response that are read, headers included

# Beyond what Python calls not global: ranges that lead to private addresses by translation or tunnel,
# and ranges that only later Pythons know.
_TUNNELS = "192.0.0.0/24 192.88.99.0/24 2001::/23 2002::/16 3fff::/20"
# Public by their number, but inside of a cloud by its documentation: Azure's platform (learn.microsoft.com,
# "What is IP address 168.63.129.16?"); the Services of a GKE cluster (cloud.google.com/kubernetes-engine, the
# "GKE-managed Service range"); IBM Cloud's services (cloud.ibm.com, VPC API, "reserved address ranges").
_CLOUDS = "168.63.129.16 34.118.224.0/20 2600:2d00:0:4::/64 161.26.0.0/16 166.8.0.0/14"
_REFUSED = [ipaddress.ip_network(network) for network in f"{_TUNNELS} {_CLOUDS}".split()]
_IPV6_GLOBAL = ipaddress.ip_network("2000::/3")  # all that IANA has allocated of IPv6's unicast space


class Refused(Exception):
    """A target that webhooks may not be sent to; the text says why."""


class Outcome(NamedTuple):
    """The result of a POST; without a response, `status` is None and `error` says why."""

    status: int | None = None
    body: str | None = None  # its first BODY_LIMIT bytes
    retry_after: str | None = None
    error: str | None = None

    @property
    def is_success(self) -> bool:
        """Whether the status is 2xx."""
        return self.status is not None and 200 <= self.status < 300


def parse(url: str, *, allow_private: bool) -> SplitResult:
    """Split a webhook's URL into its parts.

    :raises Refused: unless it is an absolute https URL (http too when private targets are allowed)
        without credentials or a fragment.
    """
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        raise Refused("This is not a URL.") from None
    if not url.isascii() or not url.isprintable() or any(c in url for c in ' "<>\\^`{|}#'):
        raise Refused("The URL must be printable ASCII without spaces, quotes, brackets or a fragment.")
    if parts.scheme != "https" and not (allow_private and parts.scheme == "http"):
        raise Refused("The URL must begin with https:// unless LANYARD_WEBHOOK_ALLOW_PRIVATE is 1.")
    if not parts.hostname or port == 0:
        raise Refused("The URL must name a host.")
    if "@" in parts.netloc:
        raise Refused("The URL must not hold credentials.")
    return parts


def deadline() -> float:
    """Return when an attempt that begins now must have ended, on the monotonic clock."""
    return time.monotonic() + TIMEOUT


@cache  # not made before a worker is forked
def _resolvers() -> Executor:
    """Return native threads for lookups alone: those of names that no server answers for take long.

    gevent resolves all names of the process, also the database's, in ten threads.
    """
    is_patched = monkey.is_module_patched("threading")
    return threadpool.ThreadPoolExecutor(64) if is_patched else ThreadPoolExecutor(64)


def resolve(target: SplitResult, until: float, *, allow_private: bool) -> list[tuple[str, int]]:
    """Return the addresses to connect to, each with the port, however the host is spelt.

    :raises Refused: when the name has no address, or any of its addresses is not a public one.
    """
    host, port = target.hostname or "", target.port or (443 if target.scheme == "https" else 80)
    addresses: list[str] = []
    with suppress(TimeoutError):
        addresses = _resolvers().submit(_look_up, host, port).result(_remaining(until))
    if not addresses:
        raise Refused("The host has no address.")
    # Refuse for one private address among several: the order of the addresses is the resolver's.
    if not allow_private and not all(is_public(address) for address in addresses):
        raise Refused("The host has a private address.")
    return [(address, port) for address in addresses]


def _look_up(host: str, port: int) -> list[str]:
    """Return a host's addresses, in the resolver's order; none when the lookup fails."""
    getaddrinfo = monkey.get_original("socket", "getaddrinfo")  # gevent's would use its own threads
    try:
        return [str(entry[4][0]) for entry in getaddrinfo(host, port, type=socket.SOCK_STREAM)]
    except (OSError, UnicodeError):
        return []  # gevent would log an exception in the thread


def is_public(text: str) -> bool:
    """Whether an address belongs to the public internet."""
    try:
        address = ipaddress.ip_address(text.partition("%")[0])
    except ValueError:
        return False
    if address.version == 6:
        address = address.ipv4_mapped or address
    if not address.is_global or address.is_multicast:
        return False
    if address.version == 6 and address not in _IPV6_GLOBAL:
        return False
    return not any(address in network for network in _REFUSED)


def post(
    target: SplitResult, addresses: list[tuple[str, int]], body: bytes, headers: dict[str, str], until: float
) -> Outcome:
    """POST to the first of the checked addresses that takes a connection, without redirects or a proxy.

    :raises OSError: when there is no response by `until`.
    :raises http.client.HTTPException: when the response is not HTTP.
    """
    # gevent applies a socket's timeout to each read of a TLS handshake, not to the whole.
    with gevent.Timeout(_remaining(until) + 1, _no_response()):
        sock = _connect(addresses, until)
        try:
            if target.scheme == "https":
                # The certificate is checked for the name, not for the address.
                name = (target.hostname or "").rstrip(".")
                sock.settimeout(_remaining(until))
                sock = _tls().wrap_socket(sock, server_hostname=name)
            sock.settimeout(_remaining(until))
            sock.sendall(_request(target, body, headers))
            response = http.client.HTTPResponse(_Reader(sock, until), method="POST")  # type: ignore[arg-type]
            response.begin()
            return Outcome(response.status, _beginning(response), response.headers.get("Retry-After"))
        finally:
            sock.close()


def _connect(addresses: list[tuple[str, int]], until: float) -> socket.socket:
    """Try the addresses in turn, each with an equal share of the time that is left.

    :raises OSError: the last one's, when none takes the connection.
    """
    *others, last = addresses
    for tried, address in enumerate(others):
        with suppress(OSError):
            return socket.create_connection(address, _remaining(until) / (len(addresses) - tried))
    return socket.create_connection(last, _remaining(until))


@cache  # it takes 25 ms to read the certificates of the authorities
def _tls() -> ssl.SSLContext:
    return ssl.create_default_context()


def _request(target: SplitResult, body: bytes, headers: dict[str, str]) -> bytes:
    path = (target.path or "/") + (f"?{target.query}" if target.query else "")
    lines = {"Host": target.netloc, "Content-Length": str(len(body)), "Connection": "close", **headers}
    head = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
    return f"POST {path} HTTP/1.1\r\n{head}\r\n".encode("ascii") + body


def _beginning(response: http.client.HTTPResponse) -> str:
    # The status decides: it counts even when the body is malformed or never ends.
    with suppress(OSError, http.client.HTTPException, ValueError):
        return response.read(BODY_LIMIT).decode(errors="replace")
    return ""


class _Reader(socket.SocketIO):
    """Read up to READ_LIMIT bytes until a deadline: http.client limits neither bytes nor total time."""

    def __init__(self, sock: socket.socket, until: float) -> None:
        super().__init__(sock, "r")
        self._socket, self._until, self._limit = sock, until, READ_LIMIT

    def makefile(self, mode: str) -> io.BufferedReader:
        """Return a file, as http.client calls it on a socket."""
        return io.BufferedReader(self)

    def readinto(self, buffer: Any) -> int | None:
        """Read the next bytes, or none at the limit or the end of the response."""
        self._socket.settimeout(_remaining(self._until))
        count = super().readinto(memoryview(buffer)[: self._limit]) if self._limit else 0
        self._limit -= count or 0
        return count


def _remaining(until: float) -> float:
    seconds = until - time.monotonic()
    if seconds <= 0:
        raise _no_response()
    return seconds


def _no_response() -> TimeoutError:
    return TimeoutError(f"no response within {TIMEOUT:.0f} seconds")
