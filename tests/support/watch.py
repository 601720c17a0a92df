"""Look for secrets in everything that is logged."""

from __future__ import annotations

import logging
import re

from flask import Flask, Response
from support.instances import ADMIN_TOKEN


class Watch(logging.Handler):
    """Keeps what is logged in this process, and the secrets and tokens that its apps gave out."""

    SECRET = re.compile(r"(?:cs|rt|whsec)_[\w-]{40,}|eyJ[\w-]+\.[\w-]+\.[\w-]+")

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []
        self.secrets = {ADMIN_TOKEN}

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(self.format(record))

    def read(self, app: Flask, response: Response) -> None:
        """Look for secrets in an answer."""
        if response.is_json:
            self.secrets.update(self.SECRET.findall(response.get_data(as_text=True)))

    def leaks(self) -> list[str]:
        """The lines that a secret is in, or all of one but its prefix and hint."""
        text = "\n".join(self.lines)
        leaked = [secret[11:] for secret in self.secrets if secret[11:] in text]
        return [line for line in self.lines if any(part in line for part in leaked)]
