"""The store of jobs: what was accepted is there, ends once, and is nobody else's."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from poet_serving.jobs import MAX_ATTEMPTS, JobError, JobStatus, JobStore


class Clock:
    """Seconds that pass when told to."""

    def __init__(self) -> None:
        self.now = 1_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Of a new database of each kind."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'jobs.db'}"
    pytest.importorskip("psycopg")
    created: str = request.getfixturevalue("postgresql")()
    return created


@pytest.fixture
def store(url: str, tmp_path: Path, clock: Clock) -> Iterator[JobStore]:
    store = JobStore(url, tmp_path / "content", clock=clock)
    yield store
    store.close()


def test_a_job_waits_is_done_and_is_kept(store: JobStore, clock: Clock) -> None:
    job, new = store.submit("me", {"prompt": "a star"}, files={"reference": b"picture"})
    assert new
    assert (job.status, job.progress, job.created_at, job.body) == (JobStatus.QUEUED, 0, 1_000, {"prompt": "a star"})
    assert store.file(job.id, "reference").read_bytes() == b"picture"
    clock.now = 1_007
    [taken] = store.claim(5)
    assert (taken.id, taken.status, taken.attempts) == (job.id, JobStatus.IN_PROGRESS, 1)
    assert store.claim(5) == []
    assert store.complete(job.id, {"seed": 3}, {"video.mp4": b"film"}, lasts=100)
    done = store.get(job.id, "me")
    assert (done.status, done.progress, done.result, done.error) == (JobStatus.COMPLETED, 100, {"seed": 3}, None)
    assert (done.completed_at, done.expires_at) == (1_007, 1_107)
    assert store.file(job.id, "video.mp4").read_bytes() == b"film"
    assert store.get(job.id).progress == 100
    assert not store.fail(job.id, "late", "too late")
    assert not store.complete(job.id, {}, {"video.mp4": b"another film"})
    assert store.get(job.id).result == {"seed": 3}
    assert store.file(job.id, "video.mp4").read_bytes() == b"film"
    assert store.file(job.id, "reference").read_bytes() == b"picture"
    assert [path.name for path in store.content.iterdir()] == [job.id]


def test_nobody_sees_anothers_jobs(store: JobStore) -> None:
    mine, _ = store.submit("me", {})
    store.submit("you", {})
    for call in (store.get, store.delete):
        with pytest.raises(JobError, match="there is no video") as raised:
            call(mine.id, "you")
        assert raised.value.code == "not_found"
    assert [job.id for job in store.list("me")[0]] == [mine.id]
    with pytest.raises(JobError, match="there is no video"):
        store.list("you", after=mine.id)
    assert (store.count(JobStatus.QUEUED), store.count(JobStatus.QUEUED, "me")) == (2, 1)
    assert len({store.submit("me", {})[0].id for _ in range(50)}) == 50
    assert all(len(job.id) == 46 for job in store.list("me", limit=100)[0])


def test_pages_hold_every_job_once_in_either_order(store: JobStore) -> None:
    ids = [store.submit("me", {"number": number})[0].id for number in range(7)]
    for order, expected in (("asc", ids), ("desc", ids[::-1])):
        found: list[str] = []
        more = True
        while more:
            page, more = store.list("me", after=found[-1] if found else None, limit=3, order=order)  # type: ignore[arg-type]
            assert 1 <= len(page) <= 3
            found += [job.id for job in page]
        assert found == expected


def test_a_key_of_ones_own_makes_one_job_however_often_it_comes(store: JobStore, tmp_path: Path) -> None:
    first, new = store.submit("me", {"prompt": "a"}, files={"reference": b"x"}, idempotency_key="k")
    again, newer = store.submit("me", {"prompt": "a"}, files={"reference": b"x"}, idempotency_key="k")
    assert (new, newer, again.id) == (True, False, first.id)
    for body, files in (({"prompt": "b"}, {"reference": b"x"}), ({"prompt": "a"}, {"reference": b"y"})):
        with pytest.raises(JobError, match="used for another request") as raised:
            store.submit("me", body, files=files, idempotency_key="k")
        assert raised.value.code == "idempotency_conflict"
    other, new = store.submit("you", {"prompt": "b"}, idempotency_key="k")
    assert new
    assert other.id != first.id
    found: list[str] = []
    files = {"reference": b"x"}
    threads = [
        threading.Thread(target=lambda: found.append(store.submit("me", {}, files=files, idempotency_key="race")[0].id))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    assert len(set(found)) == 1
    folders = {path.name for path in (tmp_path / "content").iterdir()}
    assert folders == {first.id, found[0]}
    store.delete(first.id, "me")
    assert store.submit("me", {"prompt": "new"}, idempotency_key="k")[1]


def test_two_threads_never_do_the_same_job(store: JobStore) -> None:
    for number in range(60):
        store.submit("me", {"number": number})
    taken: list[str] = []
    lock = threading.Lock()

    def work() -> None:
        while jobs := store.claim(3):
            with lock:
                taken.extend(job.id for job in jobs)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(taken) == len(set(taken)) == 60


def test_after_a_start_what_was_being_done_waits_again_and_what_never_ends_is_failed(
    store: JobStore, url: str, tmp_path: Path
) -> None:
    job, _ = store.submit("me", {})
    done, _ = store.submit("me", {})
    (tmp_path / "content" / ".unfinished-abc").mkdir()
    (tmp_path / "content" / "video_nobody").mkdir()
    with pytest.raises(JobError, match="in use by another server"):
        JobStore(url, tmp_path / "content")
    for attempt in range(1, MAX_ATTEMPTS + 1):
        assert [one.id for one in store.claim(1)] == [job.id]
        store.close()
        store = JobStore(url, tmp_path / "content")
        assert store.recover() == (attempt < MAX_ATTEMPTS)
    ended = store.get(job.id)
    assert ended.status is JobStatus.FAILED
    assert ended.error == {"code": "server_stopped", "message": "the server ended 3 times while it did this job."}
    assert store.get(done.id).status is JobStatus.QUEUED
    assert list((tmp_path / "content").iterdir()) == []
    store.close()


def test_what_a_kill_leaves_of_a_file_that_is_being_made_goes_with_the_next_start(store: JobStore) -> None:
    with store.workspace() as folder:
        (folder / "clip.mp4").write_bytes(b"half a cl")
        assert [path.parent for path in store.content.rglob("clip.mp4")] == [folder]
        store.recover()
        assert list(store.content.iterdir()) == []


def test_what_is_deleted_while_it_is_done_leaves_nothing(store: JobStore, tmp_path: Path) -> None:
    job, _ = store.submit("me", {}, files={"reference": b"x"})
    store.claim(1)
    assert store.delete(job.id, "me").status is JobStatus.IN_PROGRESS
    assert not store.complete(job.id, {}, {"video.mp4": b"film"})
    assert not store.fail(job.id, "code", "message")
    assert list((tmp_path / "content").iterdir()) == []


def test_what_has_expired_goes_and_then_the_oldest_until_there_is_room(store: JobStore, clock: Clock) -> None:
    ids = [store.submit("me", {})[0].id for _ in range(6)]
    store.claim(5)
    for number, name in enumerate(ids[:4]):
        assert store.complete(name, {}, {"video.mp4": bytes(100)}, lasts=10 if number == 2 else None)
    assert store.fail(ids[4], "code", "message")
    assert store.sweep() == []
    clock.now += 11
    assert store.sweep() == [ids[2]]
    assert store.sweep(max_bytes=200) == [ids[0]]
    assert store.sweep(max_bytes=200) == []
    assert [job.id for job in store.list("me", order="asc")[0]] == [ids[1], ids[3], ids[4], ids[5]]
    assert not store.file(ids[0], "video.mp4").exists()
    assert store.file(ids[1], "video.mp4").exists()


SUBMIT_FOR_EVER = """
import sys
from pathlib import Path
from poet_serving.jobs import JobStore
store = JobStore(sys.argv[1], Path(sys.argv[2]))
for number in range(10_000):
    job, _ = store.submit("me", {"number": number}, files={"reference": b"x" * 5000}, idempotency_key=str(number))
    print(job.id, flush=True)
    for taken in store.claim(1):
        store.complete(taken.id, {"number": taken.body["number"]}, {"video.mp4": b"y" * 5000})
"""


def test_what_was_accepted_before_a_kill_is_there_and_whole(url: str, tmp_path: Path) -> None:
    command = [sys.executable, "-c", SUBMIT_FOR_EVER, url, str(tmp_path / "content")]
    accepted: list[str] = []
    for wanted in (3, 17, 8):
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            for _ in range(wanted):
                accepted.append(process.stdout.readline().strip())
            os.kill(process.pid, signal.SIGKILL)
            accepted += process.stdout.read().split()
    store = JobStore(url, tmp_path / "content")
    store.recover()
    for name in accepted:
        job = store.get(name)
        assert store.file(name, "reference").stat().st_size == 5000
        if job.status is JobStatus.COMPLETED:
            assert store.file(name, "video.mp4").stat().st_size == 5000
            assert job.result == {"number": job.body["number"]}
    jobs, _ = store.list("me", limit=1000)
    assert len({job.body["number"] for job in jobs}) == len(jobs)  # the same key never made two
    assert {path.name for path in (tmp_path / "content").iterdir()} == {job.id for job in jobs}


def test_a_place_that_cannot_be_used_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(JobError, match="cannot be kept"):
        JobStore(f"sqlite:///{tmp_path / 'nowhere' / 'jobs.db'}", tmp_path / "content")
    with pytest.raises(JobError, match="cannot be kept"):
        JobStore(f"sqlite:///{tmp_path / 'jobs.db'}", tmp_path / "file" / "content")
    with pytest.raises(JobError, match=r"cannot be kept in .*cannot be read"):
        JobStore("nonsense", tmp_path / "content")


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # psycopg's own, of a connection that never came to be
def test_a_database_that_cannot_be_reached_is_told_without_its_password(tmp_path: Path) -> None:
    with pytest.raises(JobError, match=r"ada:\*\*\*@.*driver is missing") as missing:
        JobStore("mysql+pymysql://ada:s3cret@localhost/jobs", tmp_path / "content")
    assert "s3cret" not in str(missing.value)
    pytest.importorskip("psycopg")
    with pytest.raises(JobError, match=r"ada:\*\*\*@") as gone:
        JobStore(f"postgresql://ada:s3cret@/jobs?host={tmp_path}", tmp_path / "content")
    assert "s3cret" not in str(gone.value)


def test_a_job_that_is_given_back_waits_again_unless_it_may_be_what_went_wrong(store: JobStore) -> None:
    job, _ = store.submit("me", {})
    for _ in range(2 * MAX_ATTEMPTS):
        store.claim(1)
        assert store.release(job.id)
    for number in range(1, MAX_ATTEMPTS + 1):
        [taken] = store.claim(1)
        assert taken.attempts == number
        assert store.release(job.id, suspect=True) == (number < MAX_ATTEMPTS)
    failed = store.get(job.id)
    assert failed.error is not None
    assert (failed.status, failed.error["code"]) == (JobStatus.FAILED, "server_stopped")
    assert not store.release(job.id)


def test_many_at_once_do_not_all_take_the_last_place(store: JobStore) -> None:
    refused: list[str] = []

    def ask() -> None:
        try:
            store.submit("me", {}, max_open=3, max_queued=5)
        except JobError as error:
            refused.append(error.code)

    threads = [threading.Thread(target=ask) for _ in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert store.count(JobStatus.QUEUED) == 3
    assert refused == ["too_many_jobs"] * 9
    for number in range(2):
        store.submit(f"other {number}", {}, max_open=3, max_queued=5)
    with pytest.raises(JobError) as full:
        store.submit("another", {}, max_open=3, max_queued=5)
    assert full.value.code == "queue_full"
    known, _ = store.submit("one more", {}, idempotency_key="k")
    assert store.submit("one more", {}, idempotency_key="k", max_open=1, max_queued=5) == (known, False)


def test_two_servers_do_not_share_a_database(store: JobStore, url: str, tmp_path: Path) -> None:
    with pytest.raises(JobError, match="the database is in use by another server"):
        JobStore(url, tmp_path / "other")
    store.close()
    JobStore(url, tmp_path / "other").close()


def test_a_job_is_found_by_its_key(store: JobStore) -> None:
    job, _ = store.submit("me", {"prompt": "a"}, idempotency_key="k")
    found = store.job_of_key("me", "k")
    assert found is not None
    assert found.id == job.id
    assert store.job_of_key("you", "k") is None
    assert store.job_of_key("me", "other") is None
    store.delete(job.id)
    assert store.job_of_key("me", "k") is None


def test_where_there_is_no_room_nothing_is_written(store: JobStore, monkeypatch: pytest.MonkeyPatch) -> None:
    store.submit("me", {}, max_open=1)
    monkeypatch.setattr(store, "put_files", lambda *_: pytest.fail("written"))
    with pytest.raises(JobError, match="at most 1 jobs"):
        store.submit("me", {}, files={"reference": b"x"}, max_open=1)


def test_a_job_that_failed_over_the_servers_end_expires_too(store: JobStore, clock: Clock) -> None:
    job, _ = store.submit("me", {}, files={"reference": b"x"})
    for _ in range(MAX_ATTEMPTS):
        store.claim(1)
        store.recover(lasts=5)
    assert store.get(job.id).expires_at == clock.now + 5
    clock.now += 5
    assert store.sweep() == [job.id]
