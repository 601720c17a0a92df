"""The file that an instance travels in: JSON lines that the tables give their types, sealed by a hash."""

from __future__ import annotations

import binascii
import gzip
import hashlib
import io
import json
import zlib
from base64 import b64decode, urlsafe_b64encode
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import date
from functools import partial
from math import isfinite
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, NoReturn, cast

import sqlalchemy as sa

from models import Base, Moment
from wire import is_text

LONGEST = 2**20  # bytes of a line: a request, and so a row, holds far less
BUFFER = 2**18  # bytes
DEEPEST = 64  # objects and lists in one another
_LAST_MOMENT = 253_402_300_799  # the end of the year 9999, and of Python's calendar
_LARGEST = 2**63 - 1
_GZIP = b"\x1f\x8b"
# Receivers of webhooks wrote what is in these: a byte of theirs must not keep an instance from moving.
_HEARD = ("deliveries.response_body", "deliveries.error")

Reader = Callable[[Any], Any]  # what the file has, as the database takes it; raises ValueError


class CrateError(Exception):
    """Why a file cannot be written or taken in; its text is a sentence for the operator."""


class Header(NamedTuple):
    """The first line."""

    lanyard: str
    schema: str
    exported_at: str
    rows: dict[str, int]  # how many of each table, in the order in which they come
    numbers: dict[str, int]  # the highest number that each table ever gave to a row


class Row(NamedTuple):
    """A row, its values as the database keeps them, and where it was."""

    table: sa.Table
    values: dict[str, Any]
    line: int
    size: int  # bytes of the line


def kept_type(column: sa.Column[Any]) -> sa.types.TypeEngine[Any]:
    """The type that the database itself has for the column: a Moment is an integer there."""
    if isinstance(column.type, sa.JSON):
        return sa.JSON(none_as_null=True)
    return column.type.impl_instance if isinstance(column.type, sa.types.TypeDecorator) else column.type


class Packing:
    """Writes the file, line by line."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._hash = hashlib.sha256()

    def head(self, header: Header) -> None:
        """Write the first line."""
        self._put(header._asdict())

    def rows(self, table: sa.Table, rows: Iterable[Any]) -> None:
        """Write rows of the table; each has the values of its columns, in their order."""
        names = [column.name for column in table.columns]
        writers = [(column.name, write) for column in table.columns if (write := _writer(column))]
        for row in rows:
            values = dict(zip(names, row, strict=True))
            for name, write in writers:
                if values[name] is not None:
                    values[name] = write(values[name])
            self._put([table.name, values])

    def seal(self) -> None:
        """Write the last line: all is there, and this is its hash."""
        self._put({"sha256": self._hash.hexdigest()})

    def _put(self, document: Any) -> None:
        line = _encode(document).encode() + b"\n"
        if len(line) > LONGEST:
            raise CrateError(f"A row takes {len(line)} bytes, more than a line of the file may have.")
        self._hash.update(line)
        self._stream.write(line)


@contextmanager
def packing(file: Path, *, squeezed: bool) -> Iterator[Packing]:
    """Write the file.

    :param squeezed: with gzip.
    """
    with open(file, "wb", buffering=BUFFER) as plain:
        if not squeezed:
            yield Packing(plain)
            return
        # No name in it: it would be the draft's.
        with gzip.GzipFile("", "wb", fileobj=plain) as gz, io.BufferedWriter(cast(Any, gz), BUFFER) as stream:
            yield Packing(cast(BinaryIO, stream))


class Crate:
    """Reads the file, whoever wrote it: no line is believed before it was looked at."""

    def __init__(self, stream: BinaryIO, *, nul: bool) -> None:
        self._stream = stream
        self._nul = nul
        self._hash = hashlib.sha256()
        self._line = 0
        self.header = self._read_header()

    def rows(self) -> Iterator[Row]:
        """Every row, in order.

        :raises CrateError: at the first line that will not do, and after the last if it was not the last.
        """
        for name, count in self.header.rows.items():
            table = Base.metadata.tables[name]
            read = partial(_read_row, {c.name: _reader(c, nul=self._nul) for c in table.columns})
            for _ in range(count):
                line = self._next()
                yield Row(table, self._row(name, line, read), self._line, len(line))
        self._check_seal()

    def _row(self, name: str, line: bytes, read: Reader) -> dict[str, Any]:
        match self._parse(line):
            case [str(told), values] if told == name:
                try:
                    return cast(dict[str, Any], read(values))
                except ValueError as error:
                    self._refuse(f"{name}{error}")
            case [str(told), _] if told not in Base.metadata.tables:
                self._refuse("a row of a table that Lanyard does not have")
            case _:
                self._refuse(f"a row of {name} was to be there")

    def _read_header(self) -> Header:
        document = self._parse(self._next())
        if not isinstance(document, dict) or set(document) != set(Header._fields):
            raise CrateError("It is no export of Lanyard's: its first line does not say so.")
        header = Header(**document)
        if not all(isinstance(text, str) and len(text) < 64 and text.isprintable() for text in header[:3]):
            self._refuse("the version, the schema or the time is no text")
        for counts in (header.rows, header.numbers):
            if not isinstance(counts, dict) or not all(
                type(count) is int and 0 <= count <= _LARGEST for count in counts.values()
            ):
                self._refuse("what is counted has no numbers")
        return header

    def _check_seal(self) -> None:
        right = {"sha256": self._hash.hexdigest()}
        if self._parse(self._next()) != right or self._read(1):
            raise CrateError("It is not what was exported: it was altered, or damaged on its way.")

    def _next(self) -> bytes:
        line = self._read(LONGEST + 1)
        self._line += 1
        if len(line) > LONGEST:
            self._refuse("it is longer than any that Lanyard writes")
        if not line.endswith(b"\n"):
            raise CrateError(f"It is cut short: it ends in line {self._line}.")
        self._hash.update(line)
        return line

    def _read(self, size: int) -> bytes:
        try:
            return self._stream.readline(size)
        except (EOFError, zlib.error, gzip.BadGzipFile):
            raise CrateError(f"It is cut short or damaged: gzip cannot read line {self._line + 1}.") from None

    def _parse(self, line: bytes) -> Any:
        try:
            return _decode(line.decode())
        except UnicodeDecodeError:
            self._refuse("it is not UTF-8")
        except (ValueError, RecursionError):
            self._refuse("it is no JSON that Lanyard writes")

    def _refuse(self, what: str) -> NoReturn:
        raise CrateError(f"Line {self._line} will not do: {what}.")


@contextmanager
def unpacking(file: Path, *, nul: bool) -> Iterator[Crate]:
    """Read the file, squeezed or not.

    :param nul: whether texts may hold NUL.
    :raises CrateError: when it is none, or its first line will not do.
    """
    with open(file, "rb") as plain:
        squeezed = plain.peek(2)[:2] == _GZIP
        with gzip.GzipFile(fileobj=plain, mode="rb") if squeezed else plain as stream:
            yield Crate(cast(BinaryIO, stream), nul=nul)


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number")


_encode = json.JSONEncoder(separators=(",", ":")).encode
_decode = json.JSONDecoder(parse_constant=_refuse_constant).decode


def _writer(column: sa.Column[Any]) -> Callable[[Any], Any] | None:
    """What makes JSON of the column's values, where something must."""
    kept = kept_type(column)
    if isinstance(kept, sa.LargeBinary):
        return lambda value: urlsafe_b64encode(value).rstrip(b"=").decode()
    return date.isoformat if isinstance(kept, sa.Date) else None


def _read_row(readers: dict[str, Reader], found: Any) -> dict[str, Any]:
    if not isinstance(found, dict):
        raise ValueError(" is no object of columns")
    if found.keys() != readers.keys():
        odd = sorted(map(ascii, found.keys() ^ readers.keys()))[0]
        raise ValueError(f" has a column too few or too many: {odd[:64]}")
    for name, read in readers.items():
        try:
            found[name] = read(found[name])
        except ValueError as error:
            raise ValueError(f".{name} {error}") from None
    return found


def _reader(column: sa.Column[Any], *, nul: bool) -> Reader:
    """What checks a value of the column's in a file, and makes of it what the database takes."""
    read = _reader_of(column, nul)
    if column.nullable:
        return lambda value: None if value is None else read(value)
    return read


def _reader_of(column: sa.Column[Any], nul: bool) -> Reader:
    match kept_type(column):
        case sa.Boolean():
            return _read_flag
        case sa.Integer():
            is_moment = isinstance(column.type, Moment)
            return (
                partial(_read_whole, -_LAST_MOMENT, _LAST_MOMENT)
                if is_moment
                else partial(_read_whole, -_LARGEST, _LARGEST)
            )
        case sa.LargeBinary():
            return _read_bytes
        case sa.Date():
            return _read_date
        case sa.JSON():
            return partial(_read_object, nul)
        case sa.String() as text:
            return partial(_read_text, text.length or LONGEST, nul, str(column) in _HEARD)
    raise TypeError(f"{column} is of a type that no file has")


def _read_flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError("is neither true nor false")
    return value


def _read_whole(low: int, high: int, value: Any) -> int:
    if type(value) is not int or not low <= value <= high:
        raise ValueError(f"is no whole number from {low} to {high}")
    return value


def _read_bytes(value: Any) -> bytes:
    if not isinstance(value, str) or not value.isascii():
        raise ValueError("is not base64url")
    try:
        return b64decode(value + "=" * (-len(value) % 4), b"-_", validate=True)
    except binascii.Error:
        raise ValueError("is not base64url") from None


def _read_date(value: Any) -> date:
    try:
        found = date.fromisoformat(value)
    except (TypeError, ValueError):
        found = None
    if found is None or found.isoformat() != value:
        raise ValueError("is no date as 2026-06-01")
    return found


def _read_text(longest: int, nul: bool, lenient: bool, value: Any) -> str:
    if not isinstance(value, str) or len(value) > longest:
        raise ValueError("is no text, or longer than there is room for")
    text = value.replace("\0", "\N{REPLACEMENT CHARACTER}") if lenient and not nul else value
    if not is_text(text.replace("\0", "") if nul else text):
        raise ValueError("holds a NUL or half a character, which the database cannot keep")
    return text


def _read_object(nul: bool, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError("is no object")
    _check_inner(value, nul, DEEPEST)
    return value


def _check_inner(value: Any, nul: bool, depth: int) -> None:
    """Look at everything in a JSON value."""
    if isinstance(value, str):
        _read_text(LONGEST, nul, False, value)
    elif isinstance(value, float) and not isfinite(value):
        raise ValueError("holds a number that is too large")
    elif isinstance(value, dict | list):
        if not depth:
            raise ValueError("is nested too deeply")
        for inner in (*value, *value.values()) if isinstance(value, dict) else value:
            _check_inner(inner, nul, depth - 1)
