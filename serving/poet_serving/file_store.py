"""Uploaded files and batches of requests, in the same database as the jobs, under the same rules.

A file's bytes come before its row, and a folder that neither a row nor an open batch needs is rubbish. A batch is a row
that says which file holds its lines and how it stands; its lines are jobs, and what became of each is a row until the
batch has ended. This module knows rows and files; what a line means and how a batch is carried out belong to
`poet_serving.api.batches`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import secrets
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Literal, TypeVar

from sqlalchemy import JSON, Index, String, Text, delete, func, select, update
from sqlalchemy.orm import Mapped, mapped_column

from poet_serving.database import Base, JobError, key_conflict
from poet_serving.jobs import JobStore

__all__ = ["Batch", "FileStore", "StoredFile"]

CONTENT: Final = "content"
ENDED: Final = ("completed", "failed", "cancelled")


class _File(Base):
    __tablename__ = "files"
    __table_args__ = (Index("files_by_owner", "owner", "number"),)

    number: Mapped[int] = mapped_column(primary_key=True, autoincrement=True)
    id: Mapped[str] = mapped_column(String(64), unique=True)
    owner: Mapped[str] = mapped_column(String(64))
    purpose: Mapped[str] = mapped_column(String(32))
    filename: Mapped[str] = mapped_column(String(256))
    size_bytes: Mapped[int]
    created_at: Mapped[float]


class _Batch(Base):
    __tablename__ = "batches"
    __table_args__ = (Index("batches_by_owner", "owner", "number"),)

    number: Mapped[int] = mapped_column(primary_key=True, autoincrement=True)
    id: Mapped[str] = mapped_column(String(64), unique=True)
    owner: Mapped[str] = mapped_column(String(64))
    input_file: Mapped[str] = mapped_column(String(64))
    endpoint: Mapped[str] = mapped_column(String(64))
    window: Mapped[str] = mapped_column(String(16))
    status: Mapped[str] = mapped_column(String(16))
    created_at: Mapped[float]
    ended_at: Mapped[float | None]
    total: Mapped[int] = mapped_column(default=0)
    completed: Mapped[int] = mapped_column(default=0)
    failed: Mapped[int] = mapped_column(default=0)
    output_file: Mapped[str | None] = mapped_column(String(64))
    error_file: Mapped[str | None] = mapped_column(String(64))
    errors: Mapped[list[dict[str, Any]] | None] = mapped_column(JSON)
    told: Mapped[dict[str, str] | None] = mapped_column(JSON)


class _BatchKey(Base):
    """An Idempotency-Key: whose, and for which batch and request."""

    __tablename__ = "batch_keys"

    owner: Mapped[str] = mapped_column(String(64), primary_key=True)
    key: Mapped[str] = mapped_column(String(256), primary_key=True)
    request_sha256: Mapped[str] = mapped_column(String(64))
    batch: Mapped[str] = mapped_column(String(64))


class _BatchLine(Base):
    """What became of a line of a batch that is open."""

    __tablename__ = "batch_lines"

    batch: Mapped[str] = mapped_column(String(64), primary_key=True)
    number: Mapped[int] = mapped_column(primary_key=True)
    is_completed: Mapped[bool]
    result: Mapped[str] = mapped_column(Text)


@dataclasses.dataclass(frozen=True, kw_only=True)
class StoredFile:
    """A file as it stands.

    Attributes:
        id: unguessable.
        owner: whose.
        purpose: what it was uploaded for.
        filename: the client's own name for it; never used as a path.
        size_bytes: of its content.
        created_at: Unix seconds.
    """

    id: str
    owner: str
    purpose: str
    filename: str
    size_bytes: int
    created_at: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Batch:
    """A batch as it stands.

    Attributes:
        id: unguessable.
        owner: whose.
        input_file: id of the file of its lines.
        endpoint: where every line would be posted.
        window: in which it should be done, in the caller's words.
        status: "in_progress", "cancelling", or one of `ENDED`.
        created_at, ended_at: Unix seconds.
        total, completed, failed: lines.
        output_file, error_file: ids of the files of its results, or None.
        errors: why it failed as a whole, or None.
        told: the caller's metadata, or None.
    """

    id: str
    owner: str
    input_file: str
    endpoint: str
    window: str
    status: str
    created_at: float
    ended_at: float | None
    total: int
    completed: int
    failed: int
    output_file: str | None
    error_file: str | None
    errors: Sequence[Mapping[str, Any]] | None
    told: Mapping[str, str] | None


Row = TypeVar("Row", _File, _Batch)


class FileStore:
    """The files and batches beside a store of jobs.

    Args:
        jobs: gives the database and the directory.

    Raises:
        JobError: they cannot be used.
    """

    def __init__(self, jobs: JobStore) -> None:
        self._jobs = jobs
        jobs.add_tables()
        with jobs.session() as session:
            known = set(session.scalars(select(_File.id)).all())
            known |= set(session.scalars(select(_Batch.input_file).where(_Batch.status.not_in(ENDED))).all())
        for path in jobs.content.glob("file_*"):
            if path.name not in known:  # of a server that was killed while it accepted or deleted one
                shutil.rmtree(path, ignore_errors=True)

    def put(self, owner: str, purpose: str, filename: str, content: bytes) -> StoredFile:
        """Accept a file; when this returns it is stored.

        Args:
            owner: whose.
            purpose: what for.
            filename: the client's own name for it.
            content: its bytes.

        Raises:
            JobError: the store cannot be written.
        """
        name = f"file_{secrets.token_hex(20)}"
        self._jobs.put_files(name, {CONTENT: content})
        row = _File(
            id=name,
            owner=owner,
            purpose=purpose,
            filename=filename[:256],
            size_bytes=len(content),
            created_at=self._jobs.now(),
        )
        try:
            with self._jobs.session(writes=True) as session:
                session.add(row)
                session.flush()
                return _plain(StoredFile, row)
        except JobError:
            self._jobs.remove_files(name)
            raise

    def get(self, id: str, owner: str) -> StoredFile:
        """Read what is known of a file.

        Raises:
            JobError: there is none, or it is somebody else's.
        """
        with self._jobs.session() as session:
            return _plain(StoredFile, self._row(session, _File, id, owner))

    def path(self, id: str, owner: str) -> Path:
        """Where a file's content lies.

        Raises:
            JobError: there is none, or it is somebody else's.
        """
        return self._jobs.content / self.get(id, owner).id / CONTENT

    def list(
        self, owner: str, *, purpose: str | None, after: str | None, limit: int, order: Literal["asc", "desc"]
    ) -> tuple[Sequence[StoredFile], bool]:
        """A page of an owner's files, and whether there are more.

        Raises:
            JobError: there is no file `after`.
        """
        with self._jobs.session() as session:
            found = self._page(session, _File, owner, after, order)
            if purpose is not None:
                found = found.where(_File.purpose == purpose)
            rows = session.scalars(found.limit(limit + 1)).all()
            return [_plain(StoredFile, row) for row in rows[:limit]], len(rows) > limit

    def delete(self, id: str, owner: str) -> None:
        """Remove a file; its bytes stay for as long as an open batch may read them.

        Raises:
            JobError: there is none, or it is somebody else's.
        """
        with self._jobs.session(writes=True) as session:
            session.delete(self._row(session, _File, id, owner))
            session.flush()
            is_needed = self._is_needed(session, id)
        if not is_needed:
            self._jobs.remove_files(id)

    def used_bytes(self, owner: str) -> int:
        """Size of all files of an owner."""
        with self._jobs.session() as session:
            total = select(func.coalesce(func.sum(_File.size_bytes), 0)).where(_File.owner == owner)
            return int(session.scalars(total).one())

    def begin(
        self,
        owner: str,
        input_file: str,
        endpoint: str,
        window: str,
        told: Mapping[str, str] | None,
        *,
        total: int,
        idempotency_key: str | None = None,
        max_open: int | None = None,
    ) -> tuple[Batch, bool]:
        """Accept a batch; when this returns it is stored.

        Args:
            owner: whose.
            input_file: id of the file of its lines.
            endpoint: where every line would be posted.
            window: in which it should be done.
            told: the caller's metadata.
            total: lines.
            idempotency_key: the caller's own name for the request: a second one gets the batch of the first.
            max_open: batches of the owner that may be open, this one included; None: any number.

        Returns:
            The batch, and whether it is new.

        Raises:
            JobError: there is no such file, the key was used for another request, there is no room
                ("too_many_batches"), or the store cannot be written.
        """
        digest = _digest(input_file, endpoint, window, told)
        with self._jobs.session(writes=True) as session:
            if idempotency_key is not None:
                known = self._of_key(session, owner, idempotency_key, digest)
                if known is not None:
                    return known, False
            self._row(session, _File, input_file, owner)
            is_open = (_Batch.owner == owner) & _Batch.status.not_in(ENDED)
            count = int(session.scalars(select(func.count()).select_from(_Batch).where(is_open)).one())
            if max_open is not None and count >= max_open:
                message = f"a key must have at most {max_open} batches at a time. Wait for some to end."
                raise JobError(message, "too_many_batches")
            row = _Batch(
                id=f"batch_{secrets.token_hex(20)}",
                owner=owner,
                input_file=input_file,
                endpoint=endpoint,
                window=window,
                status="in_progress",
                created_at=self._jobs.now(),
                total=total,
                told=None if told is None else dict(told),
            )
            session.add(row)
            if idempotency_key is not None:
                session.add(_BatchKey(owner=owner, key=idempotency_key, request_sha256=digest, batch=row.id))
            session.flush()
            return _plain(Batch, row), True

    def batch_of_key(
        self,
        owner: str,
        input_file: str,
        endpoint: str,
        window: str,
        told: Mapping[str, str] | None,
        *,
        idempotency_key: str,
    ) -> Batch | None:
        """The batch that `begin` accepted under a key, or None.

        Raises:
            JobError: the key was used for another request.
        """
        with self._jobs.session() as session:
            return self._of_key(session, owner, idempotency_key, _digest(input_file, endpoint, window, told))

    def batch(self, id: str, owner: str) -> Batch:
        """Read a batch.

        Raises:
            JobError: there is none, or it is somebody else's.
        """
        with self._jobs.session() as session:
            return _plain(Batch, self._row(session, _Batch, id, owner))

    def batches(self, owner: str, *, after: str | None, limit: int) -> tuple[Sequence[Batch], bool]:
        """A page of an owner's batches, newest first, and whether there are more.

        Raises:
            JobError: there is no batch `after`.
        """
        with self._jobs.session() as session:
            rows = session.scalars(self._page(session, _Batch, owner, after, "desc").limit(limit + 1)).all()
            return [_plain(Batch, row) for row in rows[:limit]], len(rows) > limit

    def open_batches(self) -> Sequence[Batch]:
        """All batches that have not ended, of every owner."""
        with self._jobs.session() as session:
            found = select(_Batch).where(_Batch.status.not_in(ENDED)).order_by(_Batch.number)
            return [_plain(Batch, row) for row in session.scalars(found).all()]

    def input_path(self, batch: Batch) -> Path:
        """Where the lines of an open batch lie, also where their file was deleted since.

        Raises:
            JobError: they are not there.
        """
        path = self._jobs.content / batch.input_file / CONTENT
        if not path.exists():
            raise JobError(f"the batch's file {batch.input_file!r} is gone.", "not_found")
        return path

    def end_line(self, id: str, number: int, result: str, *, is_completed: bool) -> bool:
        """Write down what became of a line of an open batch, and count it.

        Args:
            id: of the batch.
            number: of the line.
            result: as it is to stand in a file of results.
            is_completed: in which of them.

        Returns:
            False if it was written down before, or the batch has ended: nothing changes then.
        """
        with self._jobs.session(writes=True) as session:
            row = session.scalars(select(_Batch).where((_Batch.id == id) & _Batch.status.not_in(ENDED))).first()
            if row is None or session.get(_BatchLine, (id, number)) is not None:
                return False
            session.add(_BatchLine(batch=id, number=number, is_completed=is_completed, result=result))
            row.completed, row.failed = row.completed + is_completed, row.failed + (not is_completed)
            return True

    def ended_lines(self, id: str) -> set[int]:
        """Numbers of the lines of an open batch of which is written down what became of them."""
        with self._jobs.session() as session:
            return set(session.scalars(select(_BatchLine.number).where(_BatchLine.batch == id)).all())

    def results(self, id: str, *, is_completed: bool) -> Sequence[str]:
        """What `end_line` wrote down of an open batch, in the order of the lines."""
        with self._jobs.session() as session:
            wanted = (_BatchLine.batch == id) & (_BatchLine.is_completed == is_completed)
            return session.scalars(select(_BatchLine.result).where(wanted).order_by(_BatchLine.number)).all()

    def note(self, id: str, **values: Any) -> bool:
        """Write down how a batch stands; of one that has ended nothing changes, and False comes back.

        What only an open batch needs goes when it ends: what became of its lines, and a file that was deleted.
        """
        has_ended, unneeded = values.get("status") in ENDED, None
        if has_ended:
            values["ended_at"] = self._jobs.now()
        with self._jobs.session(writes=True) as session:
            is_open = (_Batch.id == id) & _Batch.status.not_in(ENDED)
            if values.get("status") == "cancelling":
                is_open &= _Batch.status == "in_progress"
            changed = bool(session.execute(update(_Batch).where(is_open).values(**values)).rowcount)  # type: ignore[attr-defined]
            if changed and has_ended:
                session.execute(delete(_BatchLine).where(_BatchLine.batch == id))
                name = session.scalars(select(_Batch.input_file).where(_Batch.id == id)).one()
                unneeded = None if self._is_needed(session, name) else name
        if unneeded is not None:
            self._jobs.remove_files(unneeded)
        return changed

    @staticmethod
    def _is_needed(session: Any, id: str) -> bool:
        """Whether the bytes of a file are needed: it was not deleted, or an open batch may read its lines."""
        reads = (_Batch.input_file == id) & _Batch.status.not_in(ENDED)
        found = select(_File.id).where(_File.id == id), select(_Batch.id).where(reads)
        return any(session.scalars(each).first() is not None for each in found)

    @staticmethod
    def _of_key(session: Any, owner: str, key: str, digest: str) -> Batch | None:
        known = session.get(_BatchKey, (owner, key))
        if known is None:
            return None
        if known.request_sha256 != digest:
            raise key_conflict()
        return _plain(Batch, session.scalars(select(_Batch).where(_Batch.id == known.batch)).one())

    @staticmethod
    def _row(session: Any, table: type[Row], id: str, owner: str) -> Row:
        row: Row | None = session.scalars(select(table).where((table.id == id) & (table.owner == owner))).first()
        if row is None:
            kind = "file" if table is _File else "batch"
            raise JobError(f"there is no {kind} {id[:100]!r}.", "not_found")
        return row

    def _page(self, session: Any, table: type[Row], owner: str, after: str | None, order: str) -> Any:
        found = select(table).where(table.owner == owner)
        if after is not None:
            place = self._row(session, table, after, owner).number
            found = found.where(table.number > place if order == "asc" else table.number < place)
        return found.order_by(table.number.asc() if order == "asc" else table.number.desc())


Plain = TypeVar("Plain", StoredFile, Batch)


def _plain(kind: type[Plain], row: Any) -> Plain:
    return kind(**{field.name: getattr(row, field.name) for field in dataclasses.fields(kind)})


def _digest(*asked: Any) -> str:
    """sha256 in hex of what is asked for, plain values."""
    return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()
