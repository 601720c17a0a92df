"""The doctor: looks at settings, files, clock, disk and database, and says what to do; changes nothing."""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

import sqlalchemy as sa

import auth
import keys
from api import rfc3339
from commands import backup
from config import LOOPBACK_NAMES, SettingError, Settings, unknown_names
from database import error_text, stored_secrets
from migrations import upgrade
from models import Agent, Delivery, Event, SigningKey, Webhook, is_encrypted, now
from storage import postgresql, sqlite
from webhooks import ssrf

OK, WARN, FAIL = "OK", "WARN", "FAIL"

BUILT = datetime(2026, 1, 1, tzinfo=UTC)  # no clock that is right shows an earlier time
CLOCK_LEEWAY = timedelta(minutes=1)
KEY_AGE = timedelta(days=365)
LITTLE_SPACE = 1024**3  # bytes
NO_SPACE = 64 * 1024**2
LARGE_WAL = 64 * 1024**2
OVERDUE = timedelta(minutes=10)


class Finding(NamedTuple):
    """What was found: OK, WARN or FAIL, about what, and what to do."""

    level: str
    subject: str
    text: str


def examine(settings: Settings | None = None) -> Iterator[Finding]:
    """Look at everything, the cheap first; `settings` are those of the environment unless given."""
    try:
        settings = settings or Settings.from_env()
    except SettingError as error:
        yield Finding(FAIL, "settings", error.message)
        return
    yield from _look_at_settings(settings)
    for look in (_look_at_server, _look_at_folder, _look_at_files, _look_at_admin_token, _look_at_disk):
        yield from look(settings)
    yield from _look_at_database(settings)


def _look_at_settings(settings: Settings) -> Iterator[Finding]:
    found = [f"Lanyard knows no setting {name}: is it misspelt?" for name in unknown_names()]
    public = settings.issuer.startswith("https:")
    if public and not settings.trusted_proxies:
        found.append(
            "LANYARD_ISSUER is https but LANYARD_TRUSTED_PROXIES is 0: all callers seem to come from the"
            " proxy's address, and share its throttle. Set it to the number of proxies."
        )
    if not public and settings.trusted_proxies:
        found.append("There are LANYARD_TRUSTED_PROXIES but LANYARD_ISSUER is http: set it to the https URL.")
    if settings.host not in LOOPBACK_NAMES and urlsplit(settings.issuer).hostname in LOOPBACK_NAMES:
        found.append(
            f"LANYARD_HOST {settings.host} serves others, but tokens name {settings.issuer}:"
            " set LANYARD_ISSUER."
        )
    if settings.webhook_allow_private and not settings.local:
        found.append(
            "LANYARD_WEBHOOK_ALLOW_PRIVATE=1 lets webhooks reach inside your network: unset it unless needed."
        )
    if not settings.uses_sqlite:
        alike = {
            "LANYARD_ADMIN_TOKEN": bool(settings.admin_token),
            "LANYARD_ISSUER": urlsplit(settings.issuer).hostname not in LOOPBACK_NAMES,
        }
        found += [f"{name} must be set, alike on all hosts." for name, is_set in alike.items() if not is_set]
    yield from _complain("settings", found, "They go together.")
    yield Finding(OK, "issuer", f"Tokens name {settings.issuer}.")


def _look_at_server(settings: Settings) -> Iterator[Finding]:
    if not settings.uses_sqlite:
        return  # of all hosts: told with the database
    try:
        runs = "A" if sqlite.is_serving(settings) else "No"
        yield Finding(OK, "server", f"{runs} server runs on this instance.")
    except OSError as error:
        yield Finding(WARN, "server", f"Cannot tell whether a server runs: {error}.")


def _look_at_folder(settings: Settings) -> Iterator[Finding]:
    for folder in {settings.instance, *([settings.database_file.parent] if settings.uses_sqlite else [])}:
        if not folder.is_dir():
            yield Finding(FAIL, "folder", f"There is no {folder}: start the server, or set LANYARD_INSTANCE.")
            continue
        if folder.stat().st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            yield Finding(FAIL, "folder", f"Others may change what is in {folder}: chmod go-w {folder}")
        elif not os.access(folder, os.W_OK | os.X_OK):
            yield Finding(FAIL, "folder", f"{folder} cannot be written to: run as its owner.")
        else:
            yield Finding(OK, "folder", f"{folder} is its owner's to change.")


def _look_at_files(settings: Settings) -> Iterator[Finding]:
    live = settings.database_file
    ours = settings.uses_sqlite and live.parent.is_dir()
    kept = sorted(live.parent.glob(f"{live.name}*")) if ours else []
    token = auth.admin_token_file(settings)
    files = [*kept, *([token] if token.exists() else [])]
    owner = live.stat().st_uid if live.exists() else None
    faults = []
    for file in files:
        found = file.stat()
        if found.st_mode & 0o077:
            faults.append(f"Others may read {file}: chmod 600 {file}")
        if owner is not None and found.st_uid != owner and file != token:
            faults.append(f"{file} is not owned by the owner of {live.name}: chown it.")
        if not os.access(file, os.R_OK | os.W_OK):
            faults.append(f"{file} cannot be read and written: run as its owner, uid {found.st_uid}.")
    yield from _complain("files", faults, f"{len(files)} files are their owner's alone.", level=FAIL)


def _look_at_admin_token(settings: Settings) -> Iterator[Finding]:
    file = auth.admin_token_file(settings)
    if settings.admin_token:
        yield Finding(OK, "admin token", "It is what LANYARD_ADMIN_TOKEN says.")
    elif not file.exists():
        yield Finding(
            WARN, "admin token", f"There is no {file}: nobody is the operator; the next start makes one."
        )
    else:
        try:
            auth.read_admin_token(file)
            yield Finding(OK, "admin token", f"It is in {file}.")
        except (OSError, ValueError, SettingError) as error:
            yield Finding(FAIL, "admin token", f"{error} Delete the file and restart for a new one.")


def _look_at_disk(settings: Settings) -> Iterator[Finding]:
    live = settings.database_file
    if not (settings.uses_sqlite and live.parent.is_dir()):
        return
    free = shutil.disk_usage(live.parent).free
    size = live.stat().st_size if live.exists() else 0
    told = f"{_megabytes(free)} are free, the database takes {_megabytes(size)}"
    if free < NO_SPACE:
        yield Finding(FAIL, "disk", f"{told}: make room, or nothing can be written.")
    elif free < max(LITTLE_SPACE, 2 * size):
        yield Finding(WARN, "disk", f"{told}: a backup or a VACUUM may not fit.")
    else:
        yield Finding(OK, "disk", f"{told}.")
    wal = Path(f"{live}-wal")
    waiting = wal.stat().st_size if wal.exists() else 0
    if waiting > LARGE_WAL:
        yield Finding(
            WARN, "wal", f"{wal.name} has {_megabytes(waiting)}: a reader holds it; restart the server."
        )
    else:
        yield Finding(OK, "wal", f"{_megabytes(waiting)} wait to be written into the database file.")


def _look_at_database(settings: Settings) -> Iterator[Finding]:
    if not settings.uses_sqlite:
        yield from _look_at_postgresql(settings)
        return
    file = settings.database_file
    if not file.exists():
        yield Finding(FAIL, "database", f"There is no {file}: start the server once, or restore a backup.")
        return
    try:
        schema = backup.check(file, str(file))
    except backup.BackupError as error:
        yield Finding(FAIL, "database", f"{error} Stop the server and restore a backup.")
        return
    yield Finding(OK, "database", f"{file} is sound.")
    if schema != (newest := upgrade.revisions()[-1]):
        yield Finding(
            WARN, "database", f"It has schema {schema}: start the server once, for schema {newest}."
        )
        return
    engine = sa.create_engine("sqlite://", creator=lambda: sqlite.open_read_only(file), poolclass=sa.NullPool)
    try:
        with engine.connect() as connection:
            yield from _look_at_references(connection)
            yield from _look_at_rows(connection, settings)
    except sa.exc.DatabaseError as error:
        yield Finding(FAIL, "database", f"{file} cannot be read: {error_text(error)}.")


def _look_at_postgresql(settings: Settings) -> Iterator[Finding]:
    name = settings.database_name
    try:
        with postgresql.session(settings) as connection:
            version = connection.exec_driver_sql("SHOW server_version").scalar()
            yield Finding(OK, "database", f"{name} answers: PostgreSQL {version}.")
            hosts = postgresql.hosts_serving(connection)
            told = f"Servers run on: {', '.join(hosts)}." if hosts else "No server runs on this database."
            yield Finding(OK, "server", told)
            yield from _look_at_promises(connection)
            if not sa.inspect(connection).has_table(Agent.__tablename__):
                yield Finding(
                    FAIL, "database", f"{name} has no tables yet: start a server, or restore a backup."
                )
                return
            yield from _look_at_rows(connection, settings)
    except sa.exc.DBAPIError as error:
        yield Finding(FAIL, "database", f"{name} cannot be read: {error_text(error)}.")


def _look_at_promises(connection: sa.Connection) -> Iterator[Finding]:
    """What a commit is worth there (SECURITY.md), and whether more connections can be had."""
    weak = [
        f"{name} is off: a power cut may undo what was acknowledged."
        for name in ("fsync", "full_page_writes", "synchronous_commit")
        if connection.exec_driver_sql(f"SHOW {name}").scalar() == "off"
    ]
    yield from _complain("durability", weak, "What is acknowledged survives a power cut.", level=FAIL)
    most = int(connection.exec_driver_sql("SHOW max_connections").scalar_one())
    used = connection.exec_driver_sql("SELECT count(*) FROM pg_stat_activity").scalar_one()
    full = [f"{used} of {most} are in use: raise max_connections."] if used > 0.8 * most else []
    yield from _complain("connections", full, f"{used} of {most} are in use.")


def _look_at_rows(connection: sa.Connection, settings: Settings) -> Iterator[Finding]:
    for look in (_look_at_clock, _look_at_keys, _look_at_seals, _look_at_webhooks):
        yield from look(connection, settings)


def _look_at_references(connection: sa.Connection) -> Iterator[Finding]:
    broken = connection.execute(sa.text("PRAGMA foreign_key_check")).all()
    if broken:
        tables = ", ".join(sorted({row[0] for row in broken}))
        yield Finding(
            FAIL, "database", f"{len(broken)} rows of {tables} belong to nothing: restore a backup."
        )


def _look_at_clock(connection: sa.Connection, settings: Settings) -> Iterator[Finding]:
    at = now()
    newest_event = sa.select(Event.created_at).order_by(Event.pk.desc()).limit(1)
    moments = [
        connection.scalar(sa.select(sa.func.max(Agent.updated_at))),
        connection.scalar(sa.select(sa.func.max(Agent.last_activity_at))),
        connection.scalar(sa.select(sa.func.max(SigningKey.created_at))),
        connection.scalar(newest_event),
    ]
    latest = max((moment for moment in moments if moment), default=at)
    if at < BUILT:
        yield Finding(FAIL, "clock", f"It is not {rfc3339(at)}: set the clock.")
    elif latest > at + CLOCK_LEEWAY:
        yield Finding(
            WARN,
            "clock",
            f"The database knows of {rfc3339(latest)}, the clock shows {rfc3339(at)}:"
            " set the clock, or, if it is right now, know that some things will expire late.",
        )
    else:
        yield Finding(OK, "clock", f"{rfc3339(at)}; nothing in the database is from the future.")


def _look_at_keys(connection: sa.Connection, settings: Settings) -> Iterator[Finding]:
    found = keys.list_keys(connection)
    if not found:
        yield Finding(FAIL, "keys", "There is no signing key: start the server, or restore a backup.")
        return
    signing = next(key for key in found if key.state in ("signing", "gone"))
    age = now() - signing.signs_from
    told = f"{signing.alg} key {signing.kid[:8]}… signs since {rfc3339(signing.signs_from)}"
    coming = [key for key in found if key.state == "published"]
    if coming:
        yield Finding(OK, "keys", f"{told}; the next one from {rfc3339(coming[0].signs_from)}.")
    elif found[0].alg != settings.signing_alg:
        yield Finding(WARN, "keys", f"{told}; the next start makes one for {settings.signing_alg}.")
    elif age > KEY_AGE:
        yield Finding(WARN, "keys", f"{told}, {age.days} days: ./lanyard keys rotate")
    else:
        due = rfc3339(signing.signs_from + KEY_AGE)
        yield Finding(OK, "keys", f"{told}; no next one is published, which is due by {due}.")


def _look_at_seals(connection: sa.Connection, settings: Settings) -> Iterator[Finding]:
    stored = [value for _, _, value in stored_secrets(connection)]
    secret_keys = settings.secret_keys
    unreadable = [value for value in stored if is_encrypted(value) and not is_encrypted(value, secret_keys)]
    if unreadable:
        count = f"{len(stored) - len(unreadable)} of {len(stored)}"
        yield Finding(
            FAIL,
            "secrets",
            f"LANYARD_SECRET_KEY decrypts {count} secrets in the database: add the key of the others.",
        )
        return
    outdated = [value for value in stored if secret_keys and not is_encrypted(value, secret_keys[:1])]
    if outdated:
        yield Finding(
            WARN,
            "secrets",
            f"{len(outdated)} of {len(stored)} are not encrypted with the newest key: stop all, start one.",
        )
    elif not secret_keys:
        yield Finding(
            WARN,
            "secrets",
            "LANYARD_SECRET_KEY is unset: signing keys and webhook secrets are in the database in clear.",
        )
    else:
        yield Finding(OK, "secrets", f"{len(stored)} that must be read back, encrypted with the newest key.")


def _look_at_webhooks(connection: sa.Connection, settings: Settings) -> Iterator[Finding]:
    found = [
        f"{name!r} is switched off: {reason or 'by the operator.'}"
        for name, reason in connection.execute(
            sa.select(Webhook.name, Webhook.disabled_reason).where(sa.not_(Webhook.is_active))
        )
    ]
    for name, url in connection.execute(sa.select(Webhook.name, Webhook.url).where(Webhook.is_active)):
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
    count = connection.scalar(sa.select(sa.func.count()).select_from(Webhook))
    yield from _complain("webhooks", found, f"{count}, none in trouble.")


def _complain(subject: str, found: list[str], praise: str, *, level: str = WARN) -> Iterator[Finding]:
    yield from (Finding(level, subject, complaint) for complaint in found)
    if not found:
        yield Finding(OK, subject, praise)


def _megabytes(size: int) -> str:
    return f"{size / 1024**2:,.1f} MiB"
