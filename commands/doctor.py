"""Checks of settings, files, clock, disk and database, each with its remedy; they change nothing."""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

import sqlalchemy as sa

import auth
import keys
from api import rfc3339
from commands import backup
from config import LOOPBACK_NAMES, SERVED_NAMES, SettingError, Settings, ignored_variables
from database import error_text, stored_secrets
from migrations import upgrade
from models import Agent, Delivery, Event, SigningKey, Webhook, is_encrypted, now
from storage import postgresql, sqlite
from webhooks import ssrf

OK, WARN, FAIL = "OK", "WARN", "FAIL"

BUILT = datetime(2026, 1, 1, tzinfo=UTC)  # a clock that shows an earlier time is wrong
CLOCK_LEEWAY = timedelta(minutes=1)
KEY_AGE = timedelta(days=365)
LITTLE_SPACE = 1024**3  # bytes
NO_SPACE = 64 * 1024**2
LARGE_WAL = 64 * 1024**2
OVERDUE = timedelta(minutes=10)

Results = Iterable[tuple[str, str]]  # level and text


class Finding(NamedTuple):
    """Result of a check: OK, WARN or FAIL, the subject, and a text with the remedy."""

    level: str
    subject: str
    text: str


def examine(settings: Settings | None = None) -> Iterator[Finding]:
    """Run all checks, the cheap ones first, with the settings given or those that the server has noted."""
    try:
        settings = settings or _settings_of_server()
    except SettingError as error:
        yield Finding(FAIL, "settings", error.message)
        return
    yield from _run(CHECKS, settings)
    if settings.uses_sqlite:
        yield from _run(SQLITE_CHECKS, settings)
        yield from _examine_sqlite(settings)
    else:
        yield from _examine_postgresql(settings)


def _settings_of_server() -> Settings:
    settings = Settings.from_env()
    settings.check_same_database()
    return replace(
        settings, **{name: value for name, value in settings.read_served().items() if name in SERVED_NAMES}
    )


def _run(checks: Iterable[Callable[..., Results]], *arguments: object) -> Iterator[Finding]:
    for check in checks:
        subject = check.__name__.removeprefix("_check_").replace("_", " ")
        for level, text in check(*arguments):
            yield Finding(level, subject, text)


def _problems(level: str, problems: list[str], otherwise: str) -> Results:
    yield from ((level, problem) for problem in problems)
    if not problems:
        yield OK, otherwise


def _check_settings(settings: Settings) -> Results:
    found = ignored_variables()
    is_https = settings.issuer.startswith("https:")
    is_local = urlsplit(settings.issuer).hostname in LOOPBACK_NAMES
    if is_https and not settings.trusted_proxies:
        found.append(
            "LANYARD_ISSUER is https but LANYARD_TRUSTED_PROXIES is 0: all callers seem to have the"
            " proxy's address, and share its throttle. Set it to the number of proxies."
        )
    if not is_https and settings.trusted_proxies:
        found.append("LANYARD_TRUSTED_PROXIES is set but LANYARD_ISSUER is http: set it to the https URL.")
    if settings.host not in LOOPBACK_NAMES and is_local:
        found.append(
            f"LANYARD_HOST {settings.host} serves other machines, but tokens name {settings.issuer}:"
            " set LANYARD_ISSUER."
        )
    if settings.webhook_allow_private and not settings.local:
        found.append(
            "LANYARD_WEBHOOK_ALLOW_PRIVATE=1 lets webhooks reach inside your network: unset it unless needed."
        )
    if not settings.uses_sqlite:
        required = {"LANYARD_ADMIN_TOKEN": bool(settings.admin_token), "LANYARD_ISSUER": not is_local}
        found += [f"{name} must be set, to the same on all hosts." for name in required if not required[name]]
    yield from _problems(WARN, found, "They are consistent.")
    yield OK, f"Tokens name {settings.issuer}."


def _check_server(settings: Settings) -> Results:
    try:
        yield OK, f"{'A' if sqlite.is_serving(settings) else 'No'} server runs on this instance."
    except OSError as error:
        yield WARN, f"Cannot tell whether a server runs: {error}."


def _check_folder(settings: Settings) -> Results:
    for folder in {settings.instance, *([settings.database_file.parent] if settings.uses_sqlite else [])}:
        if not folder.is_dir():
            yield FAIL, f"There is no {folder}: start the server, or set LANYARD_INSTANCE."
        elif folder.stat().st_mode & stat.S_IWOTH:
            yield FAIL, f"Other users may change files in {folder}: chmod go-w {folder}"
        elif not os.access(folder, os.W_OK | os.X_OK):
            yield FAIL, f"{folder} cannot be written to: run as its owner."
        elif folder.stat().st_mode & stat.S_IWGRP:
            gid = folder.stat().st_gid
            yield WARN, f"Group {gid} may change files in {folder}: chmod g-w, unless the server needs it."
        else:
            yield OK, f"Only its owner may write to {folder}."


def _check_files(settings: Settings) -> Results:
    database, token = settings.database_file, auth.admin_token_file(settings)
    files = sorted(database.parent.glob(f"{database.name}*")) if settings.uses_sqlite else []
    owner = database.stat().st_uid if database.exists() else None
    found = []
    for file in [*files, *([token] if token.exists() else [])]:
        status = file.stat()
        if status.st_mode & 0o077:
            found.append(f"Other users may read {file}: chmod 600 {file}")
        if owner is not None and status.st_uid != owner and file != token:
            found.append(f"{file} is not owned by the owner of {database.name}: chown it.")
        if not os.access(file, os.R_OK | os.W_OK):
            found.append(f"{file} cannot be read and written: run as its owner, uid {status.st_uid}.")
    yield from _problems(FAIL, found, "Only their owner may read and write them.")


def _check_admin_token(settings: Settings) -> Results:
    file = auth.admin_token_file(settings)
    if settings.admin_token:
        yield OK, "It is set by LANYARD_ADMIN_TOKEN."
    elif not file.exists():
        yield WARN, f"There is no {file}: nobody can act as the operator; the next start makes one."
    else:
        try:
            auth.read_admin_token(file)
            yield OK, f"It is in {file}."
        except (OSError, ValueError, SettingError) as error:
            yield FAIL, f"{error} Delete the file and restart for a new one."


def _check_disk(settings: Settings) -> Results:
    if not settings.database_file.parent.is_dir():
        return
    free = shutil.disk_usage(settings.database_file.parent).free
    size = _size(settings.database_file)
    text = f"{_megabytes(free)} are free, the database takes {_megabytes(size)}"
    if free < NO_SPACE:
        yield FAIL, f"{text}: free some space, or nothing can be written."
    elif free < max(LITTLE_SPACE, 2 * size):
        yield WARN, f"{text}: a backup or a VACUUM may not fit."
    else:
        yield OK, f"{text}."
    reserve, needed = sqlite.reserve_size(settings), _megabytes(2 * sqlite.RESERVE)
    if reserve is None:
        yield WARN, f"No reserve lets access be ended on a full disk: a server makes one with {needed} free."
    elif reserve < sqlite.RESERVE:
        yield FAIL, f"The disk was full, and the reserve is used: no token until {needed} are free."


def _check_wal(settings: Settings) -> Results:
    wal = Path(f"{settings.database_file}-wal")
    size = _size(wal)
    if size > LARGE_WAL:
        yield WARN, f"{wal.name} has {_megabytes(size)}: a reader blocks its checkpoint; restart the server."
    else:
        yield OK, f"{_megabytes(size)} are not yet copied into the database file."


def _size(file: Path) -> int:
    return file.stat().st_size if file.exists() else 0


def _megabytes(size: int) -> str:
    return f"{size / 1024**2:,.1f} MiB"


def _examine_sqlite(settings: Settings) -> Iterator[Finding]:
    file = settings.database_file
    if not file.exists():
        yield Finding(FAIL, "database", f"There is no {file}: start the server once, or restore a backup.")
        return
    try:
        schema = backup.check(file, str(file))
        yield Finding(OK, "database", f"{file} passes its integrity check.")
        if schema != upgrade.revisions()[-1]:
            yield Finding(
                WARN, "database", f"Its schema {schema} is old: start the server once to upgrade it."
            )
            return
        with sqlite.read_only_engine(file).connect() as connection:
            if broken := connection.exec_driver_sql("PRAGMA foreign_key_check").all():
                tables = ", ".join(sorted({row[0] for row in broken}))
                text = f"{len(broken)} rows of {tables} refer to rows that are missing: restore a backup."
                yield Finding(FAIL, "database", text)
            yield from _run(ROW_CHECKS, connection, settings)
    except (backup.BackupError, SettingError) as error:
        yield Finding(FAIL, "database", f"{error} Stop the server and restore a backup.")
    except sa.exc.DatabaseError as error:
        yield Finding(FAIL, "database", f"{file} cannot be read: {error_text(error)}.")


def _examine_postgresql(settings: Settings) -> Iterator[Finding]:
    name = settings.database_name
    try:
        with postgresql.session(settings) as connection:
            version = connection.exec_driver_sql("SHOW server_version").scalar()
            yield Finding(OK, "database", f"{name} answers: PostgreSQL {version}.")
            yield from _run(POSTGRESQL_CHECKS, connection)
            if sa.inspect(connection).has_table(Agent.__tablename__):
                yield from _run(ROW_CHECKS, connection, settings)
                return
            yield Finding(FAIL, "database", f"{name} has no tables yet: start a server or restore a backup.")
    except sa.exc.DBAPIError as error:
        yield Finding(FAIL, "database", f"{name} cannot be read: {error_text(error)}.")


def _check_hosts(connection: sa.Connection) -> Results:
    hosts = postgresql.hosts_serving(connection)
    yield OK, f"Servers run on: {', '.join(hosts)}." if hosts else "No server runs on this database."


def _check_durability(connection: sa.Connection) -> Results:
    """Check the settings on which SECURITY.md's promise about commits depends."""
    weak = [
        f"{name} is off: a power cut may undo what was acknowledged."
        for name in ("fsync", "full_page_writes", "synchronous_commit")
        if connection.exec_driver_sql(f"SHOW {name}").scalar() == "off"
    ]
    yield from _problems(FAIL, weak, "What is acknowledged survives a power cut.")


def _check_connections(connection: sa.Connection) -> Results:
    most = int(connection.exec_driver_sql("SHOW max_connections").scalar_one())
    used = connection.exec_driver_sql("SELECT count(*) FROM pg_stat_activity").scalar_one()
    if used > 0.8 * most:
        yield WARN, f"{used} of {most} are in use: raise max_connections."
    else:
        yield OK, f"{used} of {most} are in use."


def _check_clock(connection: sa.Connection, settings: Settings) -> Results:
    at = now()
    newest_event = sa.select(Event.created_at).order_by(Event.pk.desc()).limit(1)
    columns = (Agent.updated_at, Agent.last_activity_at, SigningKey.created_at)
    times = [connection.scalar(sa.select(sa.func.max(column))) for column in columns]
    times.append(connection.scalar(newest_event))
    latest = max(filter(None, times), default=at)
    if at < BUILT:
        yield FAIL, f"It is not {rfc3339(at)}: set the clock."
    elif latest > at + CLOCK_LEEWAY:
        yield (
            WARN,
            f"The database knows of {rfc3339(latest)}, the clock shows {rfc3339(at)}:"
            " set the clock; if it is right now, some rows will expire late.",
        )
    else:
        yield OK, f"{rfc3339(at)}; no time in the database is later."


def _check_keys(connection: sa.Connection, settings: Settings) -> Results:
    found = keys.list_keys(connection)
    if not found:
        yield FAIL, "There is no signing key: start the server, or restore a backup."
        return
    signing = next(key for key in found if key.state in ("signing", "gone"))
    age = now() - signing.signs_from
    text = f"{signing.alg} key {signing.kid[:8]}… signs since {rfc3339(signing.signs_from)}"
    coming = [key for key in found if key.state == "published"]
    if coming:
        yield OK, f"{text}; the next one from {rfc3339(coming[0].signs_from)}."
    elif found[0].alg != settings.signing_alg:
        yield WARN, f"{text}; the next start makes one for {settings.signing_alg}."
    elif age > KEY_AGE:
        yield WARN, f"{text}, {age.days} days: ./lanyard keys rotate"
    else:
        yield OK, f"{text}; the next rotation is due by {rfc3339(signing.signs_from + KEY_AGE)}."


def _check_secrets(connection: sa.Connection, settings: Settings) -> Results:
    stored = [value for _, _, value in stored_secrets(connection)]
    secret_keys = settings.secret_keys
    unreadable = sum(is_encrypted(value) and not is_encrypted(value, secret_keys) for value in stored)
    outdated = sum(not is_encrypted(value, secret_keys[:1]) for value in stored)
    total = len(stored)
    if unreadable:
        yield FAIL, f"LANYARD_SECRET_KEY does not decrypt {unreadable} of {total}: add the key of these."
    elif not secret_keys:
        yield WARN, "LANYARD_SECRET_KEY is unset: signing keys and webhook secrets are stored in clear."
    elif outdated:
        yield (
            WARN,
            f"{outdated} of {total} are not encrypted with the newest key: stop all servers, start one.",
        )
    else:
        yield OK, f"{total} signing keys and webhook secrets are encrypted with the newest key."


def _check_webhooks(connection: sa.Connection, settings: Settings) -> Results:
    found = []
    columns = (Webhook.name, Webhook.url, Webhook.is_active, Webhook.disabled_reason)
    webhooks = connection.execute(sa.select(*columns)).all()
    for name, url, is_active, reason in webhooks:
        if not is_active:
            found.append(f"{name!r} is switched off: {reason or 'by the operator.'}")
            continue
        try:
            ssrf.parse(url, allow_private=settings.webhook_allow_private)
        except ssrf.Refused as refusal:
            found.append(f"{name!r} gets nothing: {refusal}")
    dead = sa.select(Webhook.id, sa.func.count()).join(Delivery).where(Delivery.status == "dead")
    found += [
        f"{count} deliveries are dead: ./lanyard webhooks deliveries {id_} --status dead"
        for id_, count in connection.execute(dead.group_by(Webhook.pk))
    ]
    late = sa.select(sa.func.count()).select_from(Delivery).join(Webhook)
    overdue = connection.scalar(late.where(Webhook.is_active, Delivery.next_attempt_at < now() - OVERDUE))
    if overdue:
        found.append(f"{overdue} deliveries are overdue: does the server run?")
    yield from _problems(WARN, found, f"{len(webhooks)}, all without problems.")


CHECKS = (_check_settings, _check_folder, _check_files, _check_admin_token)
SQLITE_CHECKS = (_check_server, _check_disk, _check_wal)
POSTGRESQL_CHECKS = (_check_hosts, _check_durability, _check_connections)
ROW_CHECKS = (_check_clock, _check_keys, _check_secrets, _check_webhooks)
