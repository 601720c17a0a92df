"""The wall around webhooks: which addresses may be told, and a POST that goes to the checked one only."""

from __future__ import annotations

import http.client
import ipaddress
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import NamedTuple
from urllib.parse import urlsplit

TIMEOUT = 10.0  # seconds for all of it: the connection, the request, the answer
ANSWER_LIMIT = 1024  # bytes kept of an answer

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
        "64:ff9b::/96",
        "64:ff9b:1::/48",
        "100::/64",
        "2001::/23",
        "2002::/16",
        "fc00::/7",
        "fec0::/10",
    )
]


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
        raise Refused("The URL must begin with https://.")
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
    if not address.is_global or address.is_multicast or address.is_unspecified:
        return False
    return not any(address in network for network in _REFUSED if network.version == address.version)


def post(target: Target, address: str, body: bytes, headers: dict[str, str]) -> Answer:
    """POST to the address that was checked; redirects are not followed, and no proxy is asked.

    :raises OSError: when it cannot be done within TIMEOUT.
    :raises http.client.HTTPException: when the answer is not HTTP.
    """
    began = time.monotonic()
    with _connect(target, address) as connection:
        connection.request("POST", target.path, body, {"Host": target.host_header, **headers})
        response = connection.getresponse()
        text = response.read(ANSWER_LIMIT).decode(errors="replace")
    # An answer that was cut off looks like one that ended.
    if time.monotonic() - began >= TIMEOUT:
        raise TimeoutError(f"no whole answer within {TIMEOUT:.0f} seconds")
    return Answer(response.status, text, response.headers.get("Retry-After"))


@contextmanager
def _connect(target: Target, address: str) -> Iterator[http.client.HTTPConnection]:
    connection = http.client.HTTPConnection(target.host, target.port, timeout=TIMEOUT)
    connection.sock = socket.create_connection((address, target.port), timeout=TIMEOUT)
    # A socket's timeout is for each read: one that sends a byte now and then would never meet it.
    deadline = threading.Timer(TIMEOUT, _cut, [connection])
    deadline.start()
    try:
        if target.scheme == "https":
            # The certificate is checked for the name, not for the address.
            context = ssl.create_default_context()
            connection.sock = context.wrap_socket(connection.sock, server_hostname=target.host)
        yield connection
    finally:
        deadline.cancel()
        connection.close()


def _cut(connection: http.client.HTTPConnection) -> None:
    with suppress(OSError, AttributeError):  # it is closed already
        connection.sock.shutdown(socket.SHUT_RDWR)
