"""The wall around webhooks: which addresses may be told, and a POST that goes to the checked one only."""

from __future__ import annotations

import http.client
import io
import ipaddress
import socket
import ssl
import time
from contextlib import suppress
from typing import Any, NamedTuple
from urllib.parse import urlsplit

TIMEOUT = 10.0  # seconds for all of it: the connection, the request, the answer
ANSWER_LIMIT = 1024  # bytes kept of an answer
HEARD_LIMIT = 65_536  # bytes read of it, headers included

Address = ipaddress.IPv4Address | ipaddress.IPv6Address

# Beyond what Python calls not global: ranges that lead back inside, by translation or by tunnel.
_REFUSED = [
    ipaddress.ip_network(network)
    for network in (
        "0.0.0.0/8",
        "100.64.0.0/10",
        "192.0.0.0/24",
        "192.88.99.0/24",
        "198.18.0.0/15",
        "240.0.0.0/4",
        "2001::/23",
        "2002::/16",
        "3fff::/20",
    )
]
# All that is given out of IPv6 so far: whatever lies beyond is refused without a list.
_IPV6 = ipaddress.ip_network("2000::/3")


class Refused(Exception):
    """A target that webhooks do not go to; its text says why."""


class Target(NamedTuple):
    """A URL taken apart."""

    scheme: str
    host: str
    port: int
    path: str
    host_header: str


class Answer(NamedTuple):
    """What a receiver said: its status, the first kilobyte, and how long it asks to wait (seconds)."""

    status: int
    body: str
    retry_after: str | None


def parse(url: str, *, allow_private: bool) -> Target:
    """Take a webhook's URL apart.

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
        raise Refused("The URL must begin with https:// (or LANYARD_WEBHOOK_ALLOW_PRIVATE be 1).")
    if not parts.hostname or port == 0:
        raise Refused("The URL must name a host.")
    if "@" in parts.netloc:
        raise Refused("The URL must not hold credentials.")
    path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    return Target(
        parts.scheme, parts.hostname, port or (443 if parts.scheme == "https" else 80), path, parts.netloc
    )


def resolve(target: Target, *, allow_private: bool) -> str:
    """The address to connect to, whatever the spelling of the host.

    :raises Refused: when the name has no address, or any of its addresses is not a public one.
    """
    try:
        found = socket.getaddrinfo(target.host, target.port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        raise Refused("The host has no address.") from None
    addresses = [str(entry[4][0]) for entry in found]
    # One private address among several is enough to refuse: which one is dialled is chance.
    if not allow_private and not all(is_public(address) for address in addresses):
        raise Refused("The host has a private address.")
    return addresses[0]


def is_public(text: str) -> bool:
    """Whether an address is one of the public internet's."""
    try:
        address: Address = ipaddress.ip_address(text.partition("%")[0])
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    if mapped is not None:
        address = mapped
    if not address.is_global or address.is_multicast or (address.version == 6 and address not in _IPV6):
        return False
    return not any(address in network for network in _REFUSED if network.version == address.version)


def post(target: Target, address: str, body: bytes, headers: dict[str, str]) -> Answer:
    """POST to the address that was checked; redirects are not followed, and no proxy is asked.

    :raises OSError: when there is no answer within TIMEOUT.
    :raises http.client.HTTPException: when the answer is not HTTP.
    """
    deadline = time.monotonic() + TIMEOUT
    sock = socket.create_connection((address, target.port), timeout=TIMEOUT)
    try:
        if target.scheme == "https":
            # The certificate is checked for the name, not for the address.
            context = ssl.create_default_context()
            name = target.host.rstrip(".")
            sock = context.wrap_socket(sock, server_hostname=name, do_handshake_on_connect=False)
            sock.settimeout(_left(deadline))
            sock.do_handshake()
        sock.settimeout(_left(deadline))
        sock.sendall(_request(target, body, headers))
        response = http.client.HTTPResponse(_Heard(sock, deadline), method="POST")  # type: ignore[arg-type]
        response.begin()
        return Answer(response.status, _beginning(response), response.headers.get("Retry-After"))
    finally:
        sock.close()


def _request(target: Target, body: bytes, headers: dict[str, str]) -> bytes:
    lines = {"Host": target.host_header, "Content-Length": str(len(body)), "Connection": "close", **headers}
    head = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
    return f"POST {target.path} HTTP/1.1\r\n{head}\r\n".encode("ascii") + body


def _beginning(response: http.client.HTTPResponse) -> str:
    # The status is what counts: a body that is broken or never ends takes nothing from it.
    with suppress(OSError, http.client.HTTPException, ValueError):
        return response.read(ANSWER_LIMIT).decode(errors="replace")
    return ""


class _Heard(io.RawIOBase):
    """What a receiver says, to a limit of bytes and of time: http.client itself knows neither."""

    def __init__(self, sock: socket.socket, deadline: float) -> None:
        super().__init__()
        self._sock = sock
        self._deadline = deadline
        self._room = HEARD_LIMIT

    def makefile(self, mode: str) -> io.BufferedReader:
        """What http.client asks of a socket."""
        return io.BufferedReader(self)

    def readable(self) -> bool:
        """It is."""
        return True

    def readinto(self, buffer: Any) -> int:
        """The next bytes, or none when there are no more, or have been enough."""
        view = memoryview(buffer)[: self._room]
        if not view:
            return 0
        self._sock.settimeout(_left(self._deadline))
        count = self._sock.recv_into(view)
        self._room -= count
        return count


def _left(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError(f"no answer within {TIMEOUT:.0f} seconds")
    return left
