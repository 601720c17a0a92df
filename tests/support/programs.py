"""Other people's programs that tests run: nginx, node and what else there is."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from config import HERE

DEPLOY = HERE / "deploy"
PATH = f"{os.environ['PATH']}:/usr/sbin:/usr/local/sbin"


def needs(program: str, package: str) -> pytest.MarkDecorator:
    found = shutil.which(program, path=PATH)
    return pytest.mark.skipif(not found, reason=f"no {program}: apt-get install {package}")


NODE = HERE / "tests/node"


needs_node = pytest.mark.skipif(
    not shutil.which("node") or not (NODE / "node_modules").is_dir(),
    reason="needs node, and `npm ci` in tests/node",
)


def write_nginx_configuration(folder: Path, port: int, upstream: int, locations: str) -> Path:
    """What is shipped, with this test's ports and certificate, and `locations` in the place of its own."""
    key, certificate = folder / "key.pem", folder / "certificate.pem"
    make = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"]
    make += ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"]
    subprocess.run([*make, "-keyout", key, "-out", certificate], check=True, capture_output=True)
    text = (DEPLOY / "nginx.conf").read_text()
    for old, new in {
        "server 127.0.0.1:8080": f"server 127.0.0.1:{upstream}",
        "listen 443 ssl": f"listen 127.0.0.1:{port} ssl",
        "/etc/ssl/certs/id.example.com.pem": str(certificate),
        "/etc/ssl/private/id.example.com.key": str(key),
    }.items():
        assert old in text
        text = text.replace(old, new)
    if locations:
        text, count = re.subn(r"    location (/|= /metrics) \{\n.*?\n    \}\n", "", text, flags=re.DOTALL)
        assert count == 2
        text = text.replace("    error_page 403", f"{locations}\n    error_page 403")
    folders = [f"{kind}_temp_path {folder}/{kind};" for kind in ("client_body", "proxy", "fastcgi")]
    folders += [f"{kind}_temp_path {folder}/{kind};" for kind in ("uwsgi", "scgi")]
    user = "user root;" if os.geteuid() == 0 else ""
    main = folder / "nginx.conf"
    main.write_text(
        f"daemon off; worker_processes 1; pid {folder}/pid; error_log {folder}/error.log; {user}\n"
        f"events {{}}\nhttp {{ access_log off; {' '.join(folders)}\n{text}\n}}\n"
    )
    return main


@contextmanager
def nginx(folder: Path, port: int, upstream: int, locations: str = "") -> Iterator[None]:
    """nginx running in the folder until the end."""
    configuration = write_nginx_configuration(folder, port, upstream, locations)
    program = str(shutil.which("nginx", path=PATH))
    with subprocess.Popen([program, "-p", folder, "-c", configuration], stderr=subprocess.PIPE) as process:
        try:
            wait_for(process, port)
            yield
        finally:
            process.terminate()


def wait_for(process: subprocess.Popen[bytes], port: int) -> None:
    until = time.monotonic() + 10
    while time.monotonic() < until and process.poll() is None:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            time.sleep(0.05)
    process.terminate()
    assert process.stderr
    raise AssertionError(f"nginx did not start: {process.stderr.read().decode()}")


through_nginx = needs("nginx", "nginx-light")
