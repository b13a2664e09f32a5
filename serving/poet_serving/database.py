"""The jobs' database: opened by one server at a time, SQLite or whatever SQLAlchemy knows.

What is committed is on the disk, and whoever writes does so alone. This module knows connections and transactions; what
the rows mean belongs to `poet_serving.jobs` and `poet_serving.file_store`.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from sqlalchemy import Engine, create_engine, event, func, make_url, select
from sqlalchemy.exc import ArgumentError, IntegrityError, SQLAlchemyError
from sqlalchemy.orm import DeclarativeBase, Session

from poet.errors import PoetError

__all__ = ["Base", "Database", "JobError", "key_conflict"]

_log = logging.getLogger(__name__)

_WRITES: Final = "poet_writes"  # an execution option of ours
_WRITER: Final = 0x706F6574  # numbers of PostgreSQL's locks: of whoever writes,
_SERVER: Final = 0x706F6575  # and of the server that has the database


class JobError(PoetError, RuntimeError):
    """The store cannot do what was asked.

    Args:
        message: for a person.
        code: for a program: "idempotency_conflict", "not_found" or "store_unavailable".
    """

    def __init__(self, message: str, code: str) -> None:
        super().__init__(message)
        self.code = code


def key_conflict() -> JobError:
    """What whoever sends another request under a known Idempotency-Key is told."""
    message = "this Idempotency-Key was used for another request. Send a new key with a new request."
    return JobError(message, "idempotency_conflict")


class Base(DeclarativeBase):
    """Of all tables of the database."""


class Database:
    """Connections to a database, which no other server has meanwhile.

    Args:
        url: as SQLAlchemy writes them; the tables of `Base` are made if missing.

    Raises:
        JobError: it cannot be used, or another server uses it.
    """

    def __init__(self, url: str) -> None:
        with contextlib.ExitStack() as open_now:
            try:
                self._engine = create_engine(url, pool_pre_ping=True)  # one that was started again is no trouble
                open_now.callback(self._engine.dispose)
                if self._engine.dialect.name == "sqlite":
                    _make_sqlite_durable(self._engine)
                open_now.enter_context(_alone_with(self._engine))
                self.add_tables()
            except (ImportError, OSError, SQLAlchemyError) as error:
                message = f"jobs cannot be kept in {_without_password(url)}: {error}"
                if isinstance(error, ImportError):
                    message += ". The database's driver is missing; for PostgreSQL install openpoet[postgresql]."
                raise JobError(message, "store_unavailable") from error
            self._open = open_now.pop_all()

    def add_tables(self) -> None:
        """Make the tables of `Base` that are missing."""
        Base.metadata.create_all(self._engine)

    def close(self) -> None:
        """Close the connections, and let another server have the database."""
        self._open.close()

    @contextlib.contextmanager
    def session(self, *, writes: bool = False) -> Iterator[Session]:
        """One transaction; one that `writes` may wait for another such.

        Raises:
            JobError: the database cannot be reached.
        """
        with Session(self._engine.execution_options(**{_WRITES: writes}), expire_on_commit=False) as session:
            try:
                with session.begin():
                    if writes and self._engine.dialect.name == "postgresql":  # SQLite's own lock is taken at BEGIN
                        session.execute(select(func.pg_advisory_xact_lock(_WRITER)))
                    yield session
            except IntegrityError:
                raise
            except SQLAlchemyError as error:
                _log.error("the jobs' database cannot be used: %s", error)
                message = "the jobs' database cannot be used; the server's log says why. Try again."
                raise JobError(message, "store_unavailable") from error


@contextlib.contextmanager
def _alone_with(engine: Engine) -> Iterator[None]:
    """Keep other servers off a database, whose jobs they would take; their directories of files are others.

    Raises:
        JobError: another server uses it.
    """
    busy = JobError(
        "the database is in use by another server. Stop it, or name another with --database.", "store_unavailable"
    )
    if engine.dialect.name == "postgresql":
        with engine.connect() as connection:  # the lock lasts as long as the connection
            if not connection.scalar(select(func.pg_try_advisory_lock(_SERVER))):
                raise busy
            connection.commit()
            yield
    elif engine.dialect.name == "sqlite" and engine.url.database not in (None, "", ":memory:"):
        with Path(f"{engine.url.database}.lock").open("wb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise busy from error
            yield
    else:
        yield


def _without_password(url: str) -> str:
    try:
        return make_url(url).render_as_string(hide_password=True)
    except ArgumentError:
        return "a database whose URL cannot be read"


def _make_sqlite_durable(engine: Engine) -> None:
    """One writer at a time from the start of a transaction, and what is committed is on the disk."""

    @event.listens_for(engine, "connect")
    def connect(connection: Any, _: Any) -> None:
        connection.isolation_level = None  # transactions are begun below
        for setting in ("journal_mode=WAL", "synchronous=FULL", "busy_timeout=30000", "foreign_keys=ON"):
            connection.execute(f"PRAGMA {setting}")

    @event.listens_for(engine, "begin")
    def begin(connection: Any) -> None:
        writes = connection.get_execution_options().get(_WRITES)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")
