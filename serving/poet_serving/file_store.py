"""Uploaded files and batches of requests, in the same database as the jobs, under the same rules.

A file's bytes come before its row, and a folder without a row is rubbish. A batch is a row that says which file holds
its lines and how it stands; its lines are jobs. This module knows rows and files; what a line means and how a batch is
carried out belong to `poet_serving.api.batches`.
"""

from __future__ import annotations

import dataclasses
import secrets
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Literal, TypeVar

from sqlalchemy import JSON, Index, String, func, select, update
from sqlalchemy.orm import Mapped, mapped_column

from poet_serving.jobs import Base, JobError, JobStore

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
        for path in jobs.content.glob("file_*"):
            if path.name not in known:  # of a server that was killed while it accepted one
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
        """Remove a file.

        Raises:
            JobError: there is none, or it is somebody else's.
        """
        with self._jobs.session(writes=True) as session:
            session.delete(self._row(session, _File, id, owner))
        self._jobs.remove_files(id)

    def used_bytes(self, owner: str) -> int:
        """Size of all files of an owner."""
        with self._jobs.session() as session:
            total = select(func.coalesce(func.sum(_File.size_bytes), 0)).where(_File.owner == owner)
            return int(session.scalars(total).one())

    def begin(
        self, owner: str, input_file: str, endpoint: str, window: str, total: int, told: Mapping[str, str] | None
    ) -> Batch:
        """Accept a batch; when this returns it is stored.

        Args:
            owner: whose.
            input_file: id of the file of its lines.
            endpoint: where every line would be posted.
            window: in which it should be done.
            total: lines.
            told: the caller's metadata.
        """
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
        with self._jobs.session(writes=True) as session:
            session.add(row)
            session.flush()
            return _plain(Batch, row)

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

    def note(self, id: str, **values: Any) -> bool:
        """Write down how a batch stands; of one that has ended nothing changes, and False comes back."""
        if values.get("status") in ENDED:
            values["ended_at"] = self._jobs.now()
        with self._jobs.session(writes=True) as session:
            is_open = (_Batch.id == id) & _Batch.status.not_in(ENDED)
            if values.get("status") == "cancelling":
                is_open &= _Batch.status == "in_progress"
            changed = session.execute(update(_Batch).where(is_open).values(**values))
            return bool(changed.rowcount)  # type: ignore[attr-defined]

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
