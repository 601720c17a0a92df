"""The SSRF guard: which targets are refused, and that what was checked is what is dialled."""

from __future__ import annotations

import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import UTC, datetime, timedelta
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from flask.testing import FlaskClient
from support.callers import OPERATOR

from webhooks import ssrf

INSIDE = [
    "127.0.0.1", "127.8.9.10", "10.0.0.1", "172.16.0.1", "172.31.255.255", "192.168.1.1", "169.254.169.254",
    "100.64.0.1", "0.0.0.1", "192.0.0.8", "192.0.2.1", "192.88.99.1", "198.18.0.1", "198.51.100.1",
    "203.0.113.1", "224.0.0.1", "239.255.255.255", "240.0.0.1", "255.255.255.255", "::", "::1",
    "::ffff:127.0.0.1", "::ffff:10.0.0.1", "fe80::1", "fe80::1%eth0", "fc00::1", "fd12:3456::1", "fec0::1",
    "ff02::1", "2001:db8::1", "2002:7f00:1::", "2001:0:4136:e378::1", "64:ff9b::7f00:1", "64:ff9b:1::1",
    "100::1", "::127.0.0.1", "::ffff:0:127.0.0.1", "3fff::1", "5f00::1",
    "168.63.129.16", "::ffff:168.63.129.16", "34.118.224.1", "34.118.239.255", "2600:2d00:0:4::1",
    "161.26.0.10", "166.8.0.1", "166.11.255.255", "nonsense", "",
]  # fmt: skip


@pytest.mark.parametrize("address", INSIDE)
def test_a_private_address_is_not_public(address: str) -> None:
    assert not ssrf.is_public(address)


PUBLIC = [
    "1.1.1.1", "93.184.216.34", "2606:4700::1111", "::ffff:1.1.1.1",
    "168.63.129.15", "168.63.129.17", "34.118.223.255", "34.118.240.0", "166.7.255.255", "166.12.0.0",
]  # fmt: skip


@pytest.mark.parametrize("address", PUBLIC)
def test_a_public_address_is_public(address: str) -> None:
    assert ssrf.is_public(address)


BAD_URLS = [
    "", "hooks", "//example.com/", "http://example.com/", "ftp://example.com/", "file:///etc/passwd",
    "https://", "https:///path", "https://user:pw@example.com/", "https://user@example.com/",
    "https://example.com:0/", "https://example.com:99999/", "https://example.com:x/", "https://[::1/",
    "https://example.com/#top", "https://exa mple.com/", "https://example.com/é", "https://éxample.com/",
    'https://example.com/"', "https://example.com\\@127.0.0.1/", "https://example.com/\n", "javascript:x",
]  # fmt: skip


@pytest.mark.parametrize("url", BAD_URLS)
def test_a_url_that_is_no_plain_https_url_is_refused(url: str) -> None:
    with pytest.raises(ssrf.Refused):
        ssrf.parse(url, allow_private=False)


def test_plain_http_is_for_private_targets() -> None:
    target = ssrf.parse("http://localhost:9000/hook?a=b", allow_private=True)
    assert (target.hostname, target.port, target.path, target.query) == ("localhost", 9000, "/hook", "a=b")


SPELLINGS = [
    "https://127.0.0.1/", "https://127.1/", "https://2130706433/", "https://0x7f000001/", "https://0x7f.1/",
    "https://0177.0.0.1/", "https://017700000001/", "https://[::1]/", "https://[::ffff:127.0.0.1]/",
    "https://localhost/", "https://localhost./", "https://LOCALHOST/", "https://169.254.169.254/latest",
    "https://[fe80::1]/", "https://0/", "https://10.0.0.1:8443/hook", "https://no-such-host.invalid/",
]  # fmt: skip


@pytest.mark.parametrize("url", SPELLINGS)
def test_a_private_host_is_refused_at_creation_in_any_spelling(client: FlaskClient, url: str) -> None:
    body = {"name": "x", "url": url, "events": ["*"]}
    response = client.post("/api/webhooks", json=body, headers=OPERATOR)
    assert response.status_code == 400, response.text
    assert list(response.json["fields"]) == ["url"]


@pytest.mark.parametrize("address", INSIDE[:-2])
def test_every_private_address_is_refused_at_creation(client: FlaskClient, address: str) -> None:
    host = f"[{address}]" if ":" in address else address
    body = {"name": "x", "url": f"https://{host}/", "events": ["*"]}
    response = client.post("/api/webhooks", json=body, headers=OPERATOR)
    assert (response.status_code, list(response.json["fields"])) == (400, ["url"])


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Decide what names resolve to."""

    def decide(*addresses: str) -> None:
        found: list[Any] = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (a, 443)) for a in addresses]
        monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **kwargs: found)

    return decide


def resolve(target: SplitResult) -> list[tuple[str, int]]:
    return ssrf.resolve(target, ssrf.deadline(), allow_private=False)


@pytest.mark.parametrize("address", INSIDE[:-2])
def test_a_name_that_resolves_to_a_private_address_is_refused(
    answers: Callable[..., None], address: str
) -> None:
    target = ssrf.parse("https://hooks.example.com/", allow_private=False)
    answers("1.1.1.1")
    assert resolve(target) == [("1.1.1.1", 443)]
    answers(address)
    with pytest.raises(ssrf.Refused):
        resolve(target)


def test_one_private_address_among_several_is_enough(answers: Callable[..., None]) -> None:
    target = ssrf.parse("https://hooks.example.com/", allow_private=False)
    answers("1.1.1.1")
    assert resolve(target) == [("1.1.1.1", 443)]
    answers("1.1.1.1", "10.0.0.1")
    with pytest.raises(ssrf.Refused):
        resolve(target)


class Receiver:
    """A socket that answers each connection as it is told, byte for byte."""

    def __init__(self, answer: Callable[[socket.socket], None], *, listen_first: bool = True) -> None:
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        self.heard = b""
        self._answer = answer
        self._listen_first = listen_first
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        connection, _ = self.listener.accept()
        with connection:
            if self._listen_first:
                self.heard = connection.recv(65_536)
            self._answer(connection)
        self.listener.close()


def post(receiver: Receiver) -> ssrf.Outcome:
    target = ssrf.parse(f"http://hooks.example.com:{receiver.port}/hook", allow_private=True)
    return ssrf.post(target, [("127.0.0.1", receiver.port)], b"{}", {"webhook-id": "evt_1"}, ssrf.deadline())


def test_the_checked_address_is_dialled_under_the_hosts_name() -> None:
    receiver = Receiver(lambda c: c.sendall(OK))
    assert post(receiver) == ssrf.Outcome(200, "ok")
    assert b"POST /hook HTTP/1.1\r\n" in receiver.heard
    assert f"Host: hooks.example.com:{receiver.port}\r\n".encode() in receiver.heard


OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"


def test_the_checked_addresses_are_dialled_in_turn() -> None:
    receiver = Receiver(lambda c: c.sendall(OK))
    target = ssrf.parse(f"http://hooks.example.com:{receiver.port}/", allow_private=True)
    addresses = [(address, receiver.port) for address in ("::1", "127.0.0.2", "127.0.0.1")]
    assert ssrf.post(target, addresses, b"{}", {}, ssrf.deadline()).status == 200
    with pytest.raises(ConnectionRefusedError):
        ssrf.post(target, addresses[:2], b"{}", {}, ssrf.deadline())


@contextmanager
def silent(address: str) -> Iterator[tuple[str, int]]:
    """A place that takes no connection: the queue of its listener is full."""
    with socket.create_server((address, 0), backlog=0) as listener, ExitStack() as waiting:
        for _ in range(3):
            client = waiting.enter_context(socket.socket())
            client.setblocking(False)
            client.connect_ex(listener.getsockname())
        yield listener.getsockname()


def test_an_address_that_hangs_leaves_time_for_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ssrf, "TIMEOUT", 2.0)
    receiver = Receiver(lambda c: c.sendall(OK))
    target = ssrf.parse(f"http://hooks.example.com:{receiver.port}/", allow_private=True)
    with silent("127.0.0.1") as first, silent("127.0.0.1") as second:
        addresses = [first, second, ("127.0.0.1", receiver.port)]
        started = time.monotonic()
        assert ssrf.post(target, addresses, b"{}", {}, ssrf.deadline()).status == 200
        assert time.monotonic() - started > 1, "they have hung"
        with pytest.raises(TimeoutError):
            ssrf.post(target, [first, second], b"{}", {}, ssrf.deadline())
    assert 3 < time.monotonic() - started < 4.5


def test_a_lookup_that_hangs_ends_at_the_deadline(
    client: FlaskClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ssrf, "TIMEOUT", 0.1)
    released = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **kwargs: released.wait(10) and [])
    body = {"name": "x", "url": "https://hooks.example.com/", "events": ["*"]}
    response = client.post("/api/webhooks", json=body, headers=OPERATOR)
    released.set()
    assert (response.status_code, response.json["fields"]) == (400, {"url": ["The host has no address."]})


def test_redirects_are_not_followed() -> None:
    answer = b"HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1:1/\r\nContent-Length: 0\r\n\r\n"
    assert post(Receiver(lambda c: c.sendall(answer))).status == 302


def test_an_answer_is_read_to_a_limit() -> None:
    receiver = Receiver(lambda c: c.sendall(b"HTTP/1.1 200 OK\r\n\r\n" + b"x" * 1_000_000))
    assert post(receiver).body == "x" * 1024


def test_a_receiver_that_drips_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ssrf, "TIMEOUT", 0.5)
    enough = threading.Event()

    def drip(connection: socket.socket) -> None:
        with suppress(OSError):
            connection.sendall(b"HTTP/1.1 200 OK\r\n")
            while not enough.wait(0.05):
                connection.sendall(b"X: y\r\n")

    try:
        with pytest.raises((OSError, HTTPException)):
            post(Receiver(drip))
    finally:
        enough.set()


_DRIP = """
from gevent import monkey
monkey.patch_all()
import socket, threading, time
from webhooks import ssrf

def drip(listener):
    connection = listener.accept()[0]
    connection.sendall(b"\\x16\\x03\\x03\\x40\\x00")  # the head of a long TLS record
    for _ in range(50):
        connection.sendall(b"\\x02")
        time.sleep(0.2)

ssrf.TIMEOUT = 0.5
listener = socket.create_server(("127.0.0.1", 0))
threading.Thread(target=drip, args=[listener], daemon=True).start()
started = time.monotonic()
address = listener.getsockname()
target = ssrf.parse("https://localhost:%d/" % address[1], allow_private=False)
try:
    ssrf.post(target, [address], b"", {}, ssrf.deadline())
except TimeoutError as error:
    print(error, time.monotonic() - started < 4)
"""


def test_a_tls_handshake_that_drips_is_cut_off() -> None:
    """Under gevent, as the server delivers."""
    command = [sys.executable, "-c", _DRIP]
    assert subprocess.check_output(command, text=True, timeout=30) == "no response within 0 seconds True\n"


@pytest.mark.parametrize(
    "endless",
    [b"Transfer-Encoding: chunked\r\n\r\n-1\r\n", b"Transfer-Encoding: chunked\r\n\r\n-5\r\n", b"\r\n"],
    ids=["a chunk of -1", "a chunk of -5", "no length"],
)
def test_a_long_answer_is_read_to_a_limit(endless: bytes) -> None:
    sent = 0

    def flood(connection: socket.socket) -> None:
        nonlocal sent
        with suppress(OSError):
            connection.sendall(b"HTTP/1.1 200 OK\r\n" + endless)
            for _ in range(2000):
                sent += connection.send(b"x" * 65_536)

    answer = post(Receiver(flood))
    assert answer.status == 200
    assert len(answer.body) <= ssrf.BODY_LIMIT
    assert sent < 20_000_000, "it was not read to its end"


def test_headers_without_end_are_no_answer() -> None:
    def flood(connection: socket.socket) -> None:
        with suppress(OSError):
            connection.sendall(b"HTTP/1.1 100 Continue\r\n\r\n" * 100_000)

    with pytest.raises((OSError, HTTPException)):
        post(Receiver(flood))


def test_an_answer_that_is_not_http_is_an_error() -> None:
    with pytest.raises(HTTPException):
        post(Receiver(lambda c: c.sendall(b"SSH-2.0-OpenSSH\r\n")))


def certificate_for(name: str, folder: Path) -> ssl.SSLContext:
    """A server's TLS settings with a certificate for `name`, and `folder/ca.pem`, which vouches for it."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    now = datetime.now(UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
        .sign(key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    plain = (serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    (folder / "ca.pem").write_bytes(made.public_bytes(pem))
    (folder / "both.pem").write_bytes(made.public_bytes(pem) + key.private_bytes(pem, *plain))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "both.pem")
    return context


@pytest.mark.parametrize(
    ("trusted", "certified", "works"),
    [
        (True, "hooks.example.com", True),
        (True, "other.example.com", False),
        (False, "hooks.example.com", False),
    ],
    ids=["right", "another name", "nobody vouches"],
)
def test_the_certificate_is_checked_for_the_name_not_the_address(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trusted: bool, certified: str, works: bool
) -> None:
    context = certificate_for(certified, tmp_path)
    if trusted:
        monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.pem"))

    def answer_in_tls(connection: socket.socket) -> None:
        with suppress(OSError), context.wrap_socket(connection, server_side=True) as tls:
            tls.recv(65_536)
            tls.sendall(b"HTTP/1.1 204 No Content\r\n\r\n")

    receiver = Receiver(answer_in_tls, listen_first=False)
    target = ssrf.parse(f"https://hooks.example.com:{receiver.port}/", allow_private=False)
    ssrf._tls.cache_clear()
    request = (target, [("127.0.0.1", receiver.port)], b"{}", {}, ssrf.deadline())
    if works:
        assert ssrf.post(*request).status == 204
    else:
        with pytest.raises(ssl.SSLCertVerificationError):
            ssrf.post(*request)
