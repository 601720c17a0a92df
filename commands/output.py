"""Output of the commands: tables for people, JSON for programs, errors in click's form."""

from __future__ import annotations

import json
import shutil
import sqlite3
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import click
from marshmallow import Schema, ValidationError
from sqlalchemy.exc import DBAPIError

from api import Problem, refuse
from database import error_text
from schemas import PAGE_SIZE_MAX

NAME_WIDTH = 24  # characters of a name in a table

as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON.")

# Headings of a table; under each a field of the row, or what a function makes of the row.
Columns = Mapping[str, str | Callable[[dict[str, Any]], Any]]


@contextmanager
def reported_errors() -> Iterator[None]:
    """Report errors as click does: exit code 2 for invalid input, field by field, else 1."""
    try:
        yield
    except Problem as problem:
        fields = problem.body.get("fields")
        if not fields:
            raise click.ClickException(problem.body["error_description"]) from None
        for name, messages in fields.items():
            for message in messages:
                click.echo(f"Error: {name}: {message}", err=True)
        raise click.exceptions.Exit(2) from None
    except DBAPIError as error:
        raise click.ClickException(f"The database: {error_text(error)}.") from None
    except BrokenPipeError:
        raise  # click ends the command quietly
    except (OSError, sqlite3.OperationalError) as error:
        raise click.ClickException(f"{error}.") from None


def load(schema: Schema, options: Mapping[str, Any]) -> dict[str, Any]:
    """Validate the options that were given by a schema of the API.

    :raises Problem: if they are invalid.
    """
    given = {name: value for name, value in options.items() if value not in (None, (), {})}
    try:
        loaded: dict[str, Any] = schema.load(given)
    except ValidationError as error:
        refuse(error.messages_dict)
    return loaded


def paged(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options of a command that prints pages of a list."""
    for option in (
        as_json,
        click.option("--all", "everything", is_flag=True, help="All pages; with --json one object a line."),
        click.option("--after", metavar="N", help="Print the page after N, which the page before named."),
        click.option("--limit", metavar="N", help=f"Rows of a page, up to {PAGE_SIZE_MAX}.  [default: 50]"),
    ):
        command = option(command)
    return command


def show_pages(
    page: Callable[[dict[str, Any]], dict[str, Any]],
    query: Schema,
    schema: Schema,
    columns: Columns,
    *,
    everything: bool,
    as_json: bool,
    **filters: str | None,
) -> None:
    """Print a page, or all pages from there on.

    :param page: returns the page for a query that `query` has loaded, for `schema` to dump.
    """
    pages = _pages(page, load(query, filters), schema, everything)
    if as_json:
        for document in pages:
            for item in _rows(document) if everything else [document]:
                click.echo(json.dumps(item, indent=None if everything else 2))
        return
    documents = list(pages)
    show_table(columns, [row for document in documents for row in _rows(document)])
    if following := documents[-1]["next"]:
        note(f"There are more: --after {following}, or --all.")


def _pages(
    page: Callable[[dict[str, Any]], dict[str, Any]], query: dict[str, Any], schema: Schema, everything: bool
) -> Iterator[dict[str, Any]]:
    if everything:
        query = query | {"limit": PAGE_SIZE_MAX}
    while True:
        document: dict[str, Any] = schema.dump(page(query))
        yield document
        if not everything or document["next"] is None:
            return
        query = query | {"after": int(document["next"])}


def _rows(document: Mapping[str, Any]) -> list[dict[str, Any]]:
    return next(value for value in document.values() if isinstance(value, list))


def show(document: Mapping[str, Any], as_json: bool, columns: Columns | None = None) -> None:
    """Print a document's only member: as a table if there are columns, else one field a line."""
    if as_json:
        show_json(document)
        return
    (content,) = document.values()
    if columns:
        show_table(columns, content)
    else:
        show_fields(content)


def show_table(columns: Columns, rows: Sequence[dict[str, Any]]) -> None:
    """Print aligned columns under their headings, cut at the width of the terminal."""
    values = [[row[of] if isinstance(of, str) else of(row) for of in columns.values()] for row in rows]
    lines = [list(columns), *(list(map(_cell, line)) for line in values)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    for line in lines:
        text = "  ".join(cell.ljust(size) for cell, size in zip(line, widths, strict=True)).rstrip()
        click.echo(text[:width])


def show_fields(document: Mapping[str, Any]) -> None:
    """Print one field a line."""
    width = max(map(len, document))
    for name, value in document.items():
        click.echo(f"{name.ljust(width)}  {_cell(value)}")


def show_json(document: Any) -> None:
    """Print one JSON document."""
    click.echo(json.dumps(document, indent=2))


def note(text: str) -> None:
    """Print a remark, which is not data, to standard error."""
    click.echo(text, err=True)


@contextmanager
def progress(label: str) -> Iterator[Callable[[int, int], None]]:
    """Show a progress bar if standard error is a terminal.

    Yields a function to call with the number of steps done, and of all steps.
    """
    hidden = not sys.stderr.isatty()
    with click.progressbar(length=0, label=label, file=sys.stderr, hidden=hidden) as bar:

        def advance(done: int, total: int) -> None:
            bar.length = total
            bar.update(done - bar.pos)

        yield advance


def printable(text: str) -> str:
    """Return the text with control characters replaced, which could control the operator's terminal."""
    return "".join(c if c.isprintable() else "?" for c in text)


def shortened(text: str) -> str:
    """Return at most NAME_WIDTH characters of the text."""
    return text if len(text) <= NAME_WIDTH else text[: NAME_WIDTH - 1] + "…"


def _cell(value: Any) -> str:
    if value is None or value in ("", [], {}):
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        value = " ".join(value)
    if isinstance(value, dict):
        value = " ".join(f"{name}={text}" for name, text in value.items())
    return printable(str(value))
