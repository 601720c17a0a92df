"""The bytes of a request as they come in, until they are all there."""

from __future__ import annotations

import re

from wire import MAX_BODY

MAX_HEAD = 64 * 1024  # bytes

_LENGTHS = re.compile(rb"^content-length[ \t]*:(.*)$", re.IGNORECASE | re.MULTILINE)
_LENGTH = re.compile(rb"[ \t]*([0-9]{1,18})[ \t\r]*")
_CODINGS = re.compile(rb"^transfer-encoding[ \t]*:(.*)$", re.IGNORECASE | re.MULTILINE)
_CHUNKED = re.compile(rb"[ \t]*chunked[ \t\r]*", re.IGNORECASE)
_EXPECT = re.compile(rb"^expect:[ \t]*100-continue[ \t]*\r\n", re.IGNORECASE | re.MULTILINE)
_ORIGINS = re.compile(rb"^origin:[ \t]*([!-~]+)[ \t]*\r\n", re.IGNORECASE | re.MULTILINE)
_CHUNK_SIZE = re.compile(rb"([0-9A-Fa-f]{1,8})[ \t]*(;[^\r\n]*)?")


class Refused(Exception):
    """A request that is answered before it has arrived whole, by the status given."""

    def __init__(self, status: int) -> None:
        self.status = status


class Arrival:
    """The bytes of a request as they come in, and whether they are all there (RFC 9112 §6)."""

    def __init__(self) -> None:
        self.data = bytearray()
        self.is_waiting_for_go_ahead = False
        self._had_go_ahead = False
        self._body_at: int | None = None
        # Where the body ends; with chunks, where the next one is told of.
        self._end = 0
        self._chunked = False

    def add(self, data: bytes) -> bool:
        """Take in more bytes; returns whether the request is whole.

        :raises Refused: when it is longer than a request may be, or another could take its length for
            something else: then what follows might be taken for a request (RFC 9112 §11.2).
        """
        self.data += data
        if self._body_at is None and not self._find_body():
            return False
        if self._chunked:
            return self._skip_chunks()
        return len(self.data) >= self._end

    def _find_body(self) -> bool:
        # RFC 9112 §2.2: empty lines before a request are passed over.
        self.data = self.data.lstrip(b"\r\n")
        at = self.data.find(b"\r\n\r\n")
        if max(at, 0) > MAX_HEAD or (at < 0 and len(self.data) > MAX_HEAD):
            raise Refused(431)
        if at < 0:
            return False
        self._body_at = self._end = at + 4
        head = bytes(self.data[: at + 2])
        codings, lengths = _CODINGS.findall(head), _LENGTHS.findall(head)
        if codings and not (len(codings) == 1 and _CHUNKED.fullmatch(codings[0])):
            raise Refused(501)
        if len(lengths) + len(codings) > 1:
            raise Refused(400)
        self._chunked = bool(codings)
        if lengths:
            length = _LENGTH.fullmatch(lengths[0])
            if length is None:
                raise Refused(400)
            if int(length[1]) > MAX_BODY:
                raise Refused(413)
            self._end += int(length[1])
        # RFC 9110 §10.1.1: a client of HTTP/1.0 would not know what to make of it.
        is_new = head.partition(b"\r\n")[0].endswith(b"HTTP/1.1")
        self.is_waiting_for_go_ahead = is_new and _EXPECT.search(head) is not None
        return True

    def _skip_chunks(self) -> bool:
        while (line_end := self.data.find(b"\r\n", self._end)) >= 0:
            size = _CHUNK_SIZE.fullmatch(self.data, self._end, line_end)
            if size is None:
                raise Refused(400)
            if int(size[1], 16) == 0:
                # Trailers may follow; an empty line ends them.
                return self.data.find(b"\r\n\r\n", line_end) >= 0 or self._too_long()
            self._end = line_end + 2 + int(size[1], 16) + 2
            if self._end > len(self.data):
                break
        return self._too_long()

    def _too_long(self) -> bool:
        # Twice, for chunks as small as they get are mostly framing.
        if max(self._end, len(self.data)) - (self._body_at or 0) > 2 * MAX_BODY:
            raise Refused(413)
        return False

    def go_ahead(self) -> bytes:
        """What to send to a client that waits for it before it sends its body (RFC 9110 §10.1.1)."""
        self.is_waiting_for_go_ahead, self._had_go_ahead = False, True
        return b"HTTP/1.1 100 Continue\r\n\r\n"

    def origin(self) -> str | None:
        """The `Origin` that a request names, as far as it has come."""
        end = self.data.find(b"\r\n\r\n")
        found = _ORIGINS.findall(self.data, 0, end + 2 if end >= 0 else len(self.data))
        return bytes(found[0]).decode() if len(found) == 1 else None

    def take(self) -> bytes:
        """The bytes, for the parser, which is not to give a go-ahead of its own."""
        return _EXPECT.sub(b"", bytes(self.data), count=1) if self._had_go_ahead else bytes(self.data)
