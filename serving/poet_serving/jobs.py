"""Jobs that survive: what was accepted, what became of it, and its files.

A job is a row of a database; its files lie in a directory of their own. Files come first and are renamed into place,
the row that names them last, so a kill at any moment leaves a job that is whole or one that is still to be done. One
process has a store at a time, with as many threads as it likes. Whoever asks says on whose behalf (`owner`), and sees
no other's jobs. This module knows rows and files; what a job asks for and how it is done belong to others.
"""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import hashlib
import json
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Literal

from sqlalchemy import JSON, ForeignKey, Index, String, UniqueConstraint, delete, func, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Mapped, Session, mapped_column

from poet.errors import ConfigError
from poet.training.processes import alone_in
from poet_serving.database import Base, Database, JobError, key_conflict

__all__ = ["Base", "Job", "JobError", "JobStatus", "JobStore"]

MAX_ATTEMPTS: Final = 3
UNFINISHED: Final = ".unfinished-"


class JobStatus(enum.StrEnum):
    """Where a job stands, in OpenAI's words."""

    QUEUED = "queued"
    IN_PROGRESS = "in_progress"
    COMPLETED = "completed"
    FAILED = "failed"


class _Row(Base):
    __tablename__ = "jobs"
    __table_args__ = (Index("jobs_by_owner", "owner", "number"), Index("jobs_by_status", "status", "number"))

    number: Mapped[int] = mapped_column(primary_key=True, autoincrement=True)
    id: Mapped[str] = mapped_column(String(64), unique=True)
    owner: Mapped[str] = mapped_column(String(64))
    status: Mapped[str] = mapped_column(String(16))
    body: Mapped[dict[str, Any]] = mapped_column(JSON)
    progress: Mapped[int] = mapped_column(default=0)
    attempts: Mapped[int] = mapped_column(default=0)
    created_at: Mapped[float]
    completed_at: Mapped[float | None]
    expires_at: Mapped[float | None]
    size_bytes: Mapped[int] = mapped_column(default=0)
    result: Mapped[dict[str, Any] | None] = mapped_column(JSON)
    error: Mapped[dict[str, Any] | None] = mapped_column(JSON)


class _Key(Base):
    """An Idempotency-Key: whose, and for which job and request."""

    __tablename__ = "idempotency_keys"
    __table_args__ = (UniqueConstraint("owner", "key"),)

    number: Mapped[int] = mapped_column(primary_key=True, autoincrement=True)
    owner: Mapped[str] = mapped_column(String(64))
    key: Mapped[str] = mapped_column(String(256))
    request_sha256: Mapped[str] = mapped_column(String(64))
    job: Mapped[int] = mapped_column(ForeignKey("jobs.number", ondelete="CASCADE"))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """A job as it stood when it was read.

    Attributes:
        id: unguessable.
        owner: on whose behalf; "" where there are no keys.
        status: where it stands.
        body: what was asked for.
        progress: percent.
        attempts: times that it was begun.
        created_at, completed_at, expires_at: Unix seconds; None: not yet, or never.
        result: what it became, or None.
        error: {"code", "message"} of one that failed, or None.
    """

    id: str
    owner: str
    status: JobStatus
    body: Mapping[str, Any]
    progress: int
    attempts: int
    created_at: float
    completed_at: float | None
    expires_at: float | None
    result: Mapping[str, Any] | None
    error: Mapping[str, Any] | None


class JobStore:
    """The jobs of a service.

    Args:
        url: of the database, as SQLAlchemy writes them; tables are made if missing.
        content: directory of the jobs' files; made if missing.
        clock: seconds since 1970.

    Raises:
        JobError: the database or the directory cannot be used, or another process uses it.
    """

    def __init__(self, url: str, content: Path, *, clock: Callable[[], float] = time.time) -> None:
        self.content, self._clock = content, clock
        try:
            content.mkdir(parents=True, exist_ok=True)
            self._lock = contextlib.ExitStack()
            self._lock.enter_context(alone_in(content))
        except ConfigError as error:
            message = f"{content} is in use by another server. Stop it, or name another directory with --data."
            raise JobError(message, "store_unavailable") from error
        except OSError as error:
            raise JobError(f"jobs cannot be kept in {content}: {error}", "store_unavailable") from error
        try:
            self._database = Database(url)
        except JobError:
            self._lock.close()
            raise

    def add_tables(self) -> None:
        """See `Database.add_tables`."""
        self._database.add_tables()

    def now(self) -> float:
        """Seconds since 1970, by the store's clock."""
        return self._clock()

    def close(self) -> None:
        """Close the connections, and let another process have the store."""
        self._database.close()
        self._lock.close()

    def session(self, *, writes: bool = False) -> contextlib.AbstractContextManager[Session]:
        """See `Database.session`."""
        return self._database.session(writes=writes)

    def submit(
        self,
        owner: str,
        body: Mapping[str, Any],
        *,
        files: Mapping[str, bytes] | None = None,
        idempotency_key: str | None = None,
        asked: Mapping[str, Any] | None = None,
        max_open: int | None = None,
        max_queued: int | None = None,
    ) -> tuple[Job, bool]:
        """Accept a job; when this returns it is stored.

        Args:
            owner: on whose behalf.
            body: what is asked for, plain values.
            files: that belong to it, by plain names.
            idempotency_key: the caller's own name for the request: a second one gets the job of the first.
            asked: by what two requests of one key are told to be the same; None: by their bodies.
            max_open: jobs of the owner that may wait or be at work, this one included; None: any number.
            max_queued: jobs of all owners that may wait, this one included; None: any number.

        Returns:
            The job, and whether it is new.

        Raises:
            JobError: the key was used for another request, there is no room ("too_many_jobs", "queue_full"), or the
                store cannot be written.
        """
        digest = _digest(body if asked is None else asked, files)
        if idempotency_key is not None and (known := self._of_key(owner, idempotency_key, digest)) is not None:
            return known, False
        name = f"video_{secrets.token_hex(20)}"
        try:
            if files:
                with self.session() as session:  # before anything is written; counted again below
                    _check_room(session, owner, max_open, max_queued)
                self.put_files(name, files)
            with self.session(writes=True) as session:
                _check_room(session, owner, max_open, max_queued)
                row = _Row(
                    id=name,
                    owner=owner,
                    status=JobStatus.QUEUED,
                    body=dict(body),
                    progress=0,
                    attempts=0,
                    created_at=self._clock(),
                    size_bytes=sum(map(len, (files or {}).values())),
                )
                session.add(row)
                session.flush()
                if idempotency_key is not None:
                    key = _Key(owner=owner, key=idempotency_key, request_sha256=digest, job=row.number)
                    session.add(key)
                    session.flush()
                job = _job(row)
        except IntegrityError:  # the same key came twice at once
            self.remove_files(name)
            known = None if idempotency_key is None else self._of_key(owner, idempotency_key, digest)
            if known is None:
                raise
            return known, False
        except JobError:
            self.remove_files(name)
            raise
        return job, True

    def get(self, id: str, owner: str | None = None) -> Job:
        """Read a job.

        Args:
            id: its name.
            owner: on whose behalf; None reads anybody's.

        Raises:
            JobError: there is none, or it is somebody else's: nobody can tell which.
        """
        with self.session() as session:
            return _job(self._row(session, id, owner))

    def list(
        self, owner: str, *, after: str | None = None, limit: int = 20, order: Literal["asc", "desc"] = "desc"
    ) -> tuple[Sequence[Job], bool]:
        """Read some of an owner's jobs, by the order in which they were accepted.

        Args:
            owner: whose.
            after: name of the job after which to go on.
            limit: jobs at most.
            order: oldest first ("asc"), or newest.

        Returns:
            Jobs, and whether there are more.

        Raises:
            JobError: there is no job `after`.
        """
        with self.session() as session:
            found = select(_Row).where(_Row.owner == owner)
            if after is not None:
                place = self._row(session, after, owner).number
                found = found.where(_Row.number > place if order == "asc" else _Row.number < place)
            found = found.order_by(_Row.number.asc() if order == "asc" else _Row.number.desc()).limit(limit + 1)
            rows = session.scalars(found).all()
            return [_job(row) for row in rows[:limit]], len(rows) > limit

    def count(self, status: JobStatus, owner: str | None = None) -> int:
        """Count the jobs that stand there; of one owner, or of all."""
        with self.session() as session:
            found = select(func.count()).where(_Row.status == status)
            if owner is not None:
                found = found.where(_Row.owner == owner)
            return int(session.scalars(found).one())

    def claim(self, count: int) -> Sequence[Job]:
        """Take the oldest jobs that wait, to do them; nobody else takes them too.

        Args:
            count: jobs at most.
        """
        with self.session(writes=True) as session:
            found = select(_Row).where(_Row.status == JobStatus.QUEUED).order_by(_Row.number).limit(count)
            rows = session.scalars(found.with_for_update(skip_locked=True)).all()
            for row in rows:
                row.status, row.attempts = JobStatus.IN_PROGRESS, row.attempts + 1
            session.flush()
            return [_job(row) for row in rows]

    def complete(
        self, id: str, result: Mapping[str, Any], files: Mapping[str, bytes], *, lasts: float | None = None
    ) -> bool:
        """Keep what a job became: its files, then the row that says so.

        Args:
            id: its name.
            result: plain values.
            files: by plain names.
            lasts: seconds that it is kept for; None: for ever.

        Returns:
            False if the job was deleted or ended meanwhile; nothing is kept then.
        """
        staged = self._stage(files)
        try:
            with self.session(writes=True) as session:
                found = select(_Row).where((_Row.id == id) & (_Row.status == JobStatus.IN_PROGRESS))
                row = session.scalars(found.with_for_update()).first()
                if row is None:
                    return False
                self._settle(staged, id)
                row.status, row.progress, row.result = JobStatus.COMPLETED, 100, dict(result)
                row.completed_at = self._clock()
                row.expires_at = None if lasts is None else row.completed_at + lasts
                row.size_bytes += sum(map(len, files.values()))
            return True
        finally:
            shutil.rmtree(staged, ignore_errors=True)

    def fail(self, id: str, code: str, message: str, *, lasts: float | None = None) -> bool:
        """Keep why a job could not be done; False if it was deleted or ended meanwhile."""
        expires = None if lasts is None else self._clock() + lasts
        values = {"error": {"code": code, "message": message}, "expires_at": expires}
        return self._end(id, JobStatus.FAILED, values)

    def release(self, id: str, *, suspect: bool = False, lasts: float | None = None) -> bool:
        """Give back a job that was not done: it waits again.

        Args:
            id: its name.
            suspect: whether it may itself be what went wrong, as where the engine ended over it: it counts as begun,
                and fails once it was begun `MAX_ATTEMPTS` times.
            lasts: seconds that one that fails is kept for; None: for ever.

        Returns:
            Whether it waits again.
        """
        with self.session(writes=True) as session:
            running = (_Row.id == id) & (_Row.status == JobStatus.IN_PROGRESS)
            row = session.scalars(select(_Row).where(running).with_for_update()).first()
            if row is None:
                return False
            if not suspect:
                row.attempts -= 1
            return self._requeue(row, lasts)

    def _requeue(self, row: _Row, lasts: float | None) -> bool:
        """Let a job wait again, or fail it if it was begun too often; says whether it waits."""
        if row.attempts >= MAX_ATTEMPTS:
            row.status, row.completed_at = JobStatus.FAILED, self._clock()
            row.expires_at = None if lasts is None else row.completed_at + lasts
            message = f"the server ended {row.attempts} times while it did this job."
            row.error = {"code": "server_stopped", "message": message}
            return False
        row.status, row.progress = JobStatus.QUEUED, 0
        return True

    def delete(self, id: str, owner: str | None = None) -> Job:
        """Remove a job and its files; returns it as it stood.

        Raises:
            JobError: there is none, or it is somebody else's.
        """
        with self.session(writes=True) as session:
            row = self._row(session, id, owner)
            job = _job(row)
            session.execute(delete(_Key).where(_Key.job == row.number))
            session.delete(row)
        self.remove_files(id)
        return job

    def recover(self, *, lasts: float | None = None) -> int:
        """After a start: what was being done waits again, and what is half written goes.

        A job that was begun `MAX_ATTEMPTS` times and never ended is failed: it may be what ends the server.

        Args:
            lasts: seconds that such a one is kept for; None: for ever.

        Returns:
            Jobs that wait again.
        """
        with self.session(writes=True) as session:
            rows = session.scalars(select(_Row).where(_Row.status == JobStatus.IN_PROGRESS)).all()
            again = sum(self._requeue(row, lasts) for row in rows)
            known = set(session.scalars(select(_Row.id)).all())
        for path in self.content.iterdir():
            if path.name.startswith(UNFINISHED) or (path.name.startswith("video_") and path.name not in known):
                shutil.rmtree(path, ignore_errors=True)
        return again

    def sweep(self, max_bytes: int | None = None) -> Sequence[str]:
        """Delete what has expired, and the oldest ended jobs where all files together are too large.

        Args:
            max_bytes: of all jobs' files; None: no limit.

        Returns:
            Names of the jobs that went.
        """
        with self.session() as session:
            expired = select(_Row.id, _Row.size_bytes).where(_Row.expires_at <= self._clock())
            sizes: dict[str, int] = dict(session.execute(expired.order_by(_Row.number)).all())
            total = int(session.scalars(select(func.coalesce(func.sum(_Row.size_bytes), 0))).one())
            total -= sum(sizes.values())
            if max_bytes is not None and total > max_bytes:
                has_ended = _Row.status.in_([JobStatus.COMPLETED, JobStatus.FAILED])
                oldest = select(_Row.id, _Row.size_bytes).where(has_ended & (_Row.size_bytes > 0)).order_by(_Row.number)
                with session.execute(oldest.execution_options(yield_per=100)) as rows:
                    for name, size in rows:
                        if total <= max_bytes:
                            break
                        if name not in sizes:
                            sizes[name] = size
                            total -= size
        gone = list(sizes)
        for name in gone:
            with contextlib.suppress(JobError):  # deleted meanwhile
                self.delete(name)
        return gone

    def file(self, id: str, name: str) -> Path:
        """Where a job's file lies; the name is one of ours, never a client's."""
        return self.content / id / name

    def put_files(self, id: str, files: Mapping[str, bytes]) -> None:
        """Keep files under a name; each appears whole.

        Raises:
            JobError: the directory cannot be written.
        """
        self._settle(self._stage(files), id)

    @contextlib.contextmanager
    def workspace(self) -> Iterator[Path]:
        """A directory for files that are being made; what a kill leaves there goes with the next start.

        Raises:
            JobError: it cannot be made.
        """
        folder = self.content / f"{UNFINISHED}{secrets.token_hex(8)}"
        try:
            folder.mkdir()
        except OSError as error:
            raise JobError(f"{self.content} cannot be written: {error.strerror}", "store_unavailable") from error
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _stage(self, files: Mapping[str, bytes]) -> Path:
        """Write files into a directory of no job, through to the disk; nothing is left of it where that fails."""
        staged = self.content / f"{UNFINISHED}{secrets.token_hex(8)}"
        try:
            staged.mkdir()
            for name, content in files.items():
                with (staged / name).open("wb") as file:
                    file.write(content)
                    file.flush()
                    os.fsync(file.fileno())
            _sync(staged)
        except OSError as error:
            shutil.rmtree(staged, ignore_errors=True)
            raise JobError(f"{self.content} cannot be written: {error.strerror}", "store_unavailable") from error
        return staged

    def _settle(self, staged: Path, id: str) -> None:
        """Give staged files to a job: each appears whole."""
        folder = self.content / id
        try:
            if folder.is_dir():
                for path in staged.iterdir():
                    path.replace(folder / path.name)
                _sync(folder)
            else:
                staged.rename(folder)
            _sync(self.content)
        except OSError as error:
            raise JobError(f"{folder} cannot be written: {error.strerror}", "store_unavailable") from error

    def _end(self, id: str, status: JobStatus, values: Mapping[str, Any]) -> bool:
        with self.session(writes=True) as session:
            running = (_Row.id == id) & _Row.status.in_([JobStatus.QUEUED, JobStatus.IN_PROGRESS])
            changed = session.execute(
                update(_Row).where(running).values(status=status, completed_at=self._clock(), **values)
            )
            return bool(changed.rowcount)  # type: ignore[attr-defined]

    def job_of_key(self, owner: str, key: str) -> Job | None:
        """The job that was accepted under an Idempotency-Key of this owner; None: there is none, or it was deleted."""
        with self.session() as session:
            known = session.scalars(select(_Key).where((_Key.owner == owner) & (_Key.key == key))).first()
            row = None if known is None else session.get(_Row, known.job)
            return None if row is None else _job(row)

    def _of_key(self, owner: str, key: str, digest: str) -> Job | None:
        with self.session() as session:
            known = session.scalars(select(_Key).where((_Key.owner == owner) & (_Key.key == key))).first()
            if known is None:
                return None
            if known.request_sha256 != digest:
                raise key_conflict()
            row = session.get(_Row, known.job)
            return None if row is None else _job(row)

    def _row(self, session: Session, id: str, owner: str | None) -> _Row:
        found = select(_Row).where(_Row.id == id)
        if owner is not None:
            found = found.where(_Row.owner == owner)
        row = session.scalars(found).first()
        if row is None:
            raise JobError(f"there is no video {id[:100]!r}.", "not_found")
        return row

    def remove_files(self, id: str) -> None:
        """Remove the files of a name; renamed first, so that a kill in between leaves nothing that looks whole."""
        gone = self.content / f"{UNFINISHED}{secrets.token_hex(8)}"
        with contextlib.suppress(OSError):
            (self.content / id).rename(gone)
            shutil.rmtree(gone, ignore_errors=True)


def _check_room(session: Session, owner: str, max_open: int | None, max_queued: int | None) -> None:
    """Count inside the transaction that adds a job, so that many at once do not all find the last place free."""
    waiting = _Row.status == JobStatus.QUEUED
    if max_open is not None:
        is_open = (_Row.owner == owner) & (waiting | (_Row.status == JobStatus.IN_PROGRESS))
        if int(session.scalars(select(func.count()).where(is_open)).one()) >= max_open:
            message = f"a key must have at most {max_open} jobs at a time. Wait for some to end."
            raise JobError(message, "too_many_jobs")
    if max_queued is not None and int(session.scalars(select(func.count()).where(waiting)).one()) >= max_queued:
        raise JobError("the queue is full.", "queue_full")


def _job(row: _Row) -> Job:
    values = {field.name: getattr(row, field.name) for field in dataclasses.fields(Job)}
    return Job(**values | {"status": JobStatus(row.status)})


def _digest(body: Mapping[str, Any], files: Mapping[str, bytes] | None) -> str:
    """sha256 in hex of what is asked for."""
    said = hashlib.sha256(json.dumps(body, sort_keys=True).encode())
    for name, content in sorted((files or {}).items()):
        said.update(f"\0{name}\0{len(content)}\0".encode() + content)
    return said.hexdigest()


def _sync(directory: Path) -> None:
    """Bring the names of a directory to the disk."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
