"""How the commands speak: tables for people, JSON for programs, faults as click tells them."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import click
from flask.cli import AppGroup
from marshmallow import Schema, ValidationError

from api import Problem, refuse
from schemas import PAGE_SIZE_MAX

NAME_WIDTH = 24  # characters of a free text in a table

as_json = click.option("--json", "as_json", is_flag=True, help="For programs: JSON.")

Columns = Mapping[str, Callable[[dict[str, Any]], Any]]  # a heading, and what to show of a row below it


class Room(AppGroup):
    """A group of commands in which a Problem is told as an error of the command's."""

    def invoke(self, ctx: click.Context) -> Any:
        """click's hook."""
        with told():
            return super().invoke(ctx)


@contextmanager
def told() -> Iterator[None]:
    """Tell a Problem the way click tells errors: exit code 2 for bad input, field by field, else 1."""
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


def load(schema: Schema, given: Mapping[str, Any]) -> dict[str, Any]:
    """The options that were given, through the schema that the API's fields go through.

    :raises Problem: when they will not do.
    """
    try:
        loaded: dict[str, Any] = schema.load(
            {name: value for name, value in given.items() if value is not None}
        )
    except ValidationError as error:
        refuse(error.messages_dict)
    return loaded


def paged(command: Callable[..., None]) -> Callable[..., None]:
    """The options of a command that lists what the API pages through."""
    for option in (
        as_json,
        click.option("--all", "everything", is_flag=True, help="All pages; with --json one object a line."),
        click.option("--after", metavar="N", help="The page that follows: what the last one named."),
        click.option("--limit", metavar="N", help=f"How many, up to {PAGE_SIZE_MAX}.  [default: 50]"),
    ):
        command = option(command)
    return command


def show_pages(
    page: Callable[[dict[str, Any]], dict[str, Any]],
    query: dict[str, Any],
    answer: Schema,
    columns: Columns,
    *,
    everything: bool,
    as_json: bool,
) -> None:
    """Print a page, or all from there on.

    :param page: finds the page that a query asks for, as `answer` tells it.
    """
    pages = _follow(page, query, answer) if everything else iter([_dump(answer, page(query))])
    if everything and as_json:
        for found in pages:
            for row in _rows(found):
                click.echo(json.dumps(row))
        return
    if as_json:
        show_json(next(pages))
        return
    rows: list[dict[str, Any]] = []
    following = None
    for found in pages:
        rows += _rows(found)
        following = found["next"]
    show_table(columns, rows)
    if following:
        click.echo(f"There are more: --after {following}, or --all.", err=True)


def show_table(columns: Columns, rows: Sequence[dict[str, Any]]) -> None:
    """Print aligned columns under their headings, the last one cut where a terminal ends."""
    lines = [list(columns), *([_cell(value(row)) for value in columns.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    room = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    for line in lines:
        text = "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        click.echo(text[:room])


def show_fields(document: Mapping[str, Any]) -> None:
    """Print one thing, a field a line."""
    width = max(map(len, document))
    for name, value in document.items():
        click.echo(f"{name.ljust(width)}  {_cell(value)}")


def show_json(document: Any) -> None:
    """Print one JSON document."""
    click.echo(json.dumps(document, indent=2))


def note(text: str) -> None:
    """Say something to the person at the terminal: not data, so not on standard output."""
    click.echo(text, err=True)


@contextmanager
def progress(label: str, length: int = 0) -> Iterator[Any]:
    """A progress bar on a terminal's standard error, and nothing anywhere else."""
    hidden = not sys.stderr.isatty()
    with click.progressbar(length=length, label=label, file=sys.stderr, hidden=hidden) as bar:
        yield bar


def printable(text: str) -> str:
    """The text without what could steer the operator's terminal: others wrote it."""
    return "".join(c if c.isprintable() else "?" for c in text)


def shortened(text: str) -> str:
    """A free text, as much of it as a table has room for."""
    return text if len(text) <= NAME_WIDTH else text[: NAME_WIDTH - 1] + "…"


def _follow(
    page: Callable[[dict[str, Any]], dict[str, Any]], query: dict[str, Any], answer: Schema
) -> Iterator[dict[str, Any]]:
    after = query["after"]
    while True:
        found = _dump(answer, page(query | {"limit": PAGE_SIZE_MAX, "after": after}))
        yield found
        if found["next"] is None:
            return
        after = int(found["next"])


def _dump(answer: Schema, found: dict[str, Any]) -> dict[str, Any]:
    dumped: dict[str, Any] = answer.dump(found)
    return dumped


def _rows(page: dict[str, Any]) -> list[dict[str, Any]]:
    return next(value for value in page.values() if isinstance(value, list))


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
