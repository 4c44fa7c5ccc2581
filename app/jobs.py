"""Jobs and their events, kept in SQLite so that pages, workers, command lines and restarts share one state.

A running job belongs to a process, its owner, which renews a lease about once a second. Whoever looks may `reap`:
a job whose owner died becomes `interrupted`, and only the owner can write events or end its job.
"""

from __future__ import annotations

import sqlite3
import threading
import time
import uuid
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import TypeAdapter

from ..pipelines.errors import InputError
from ..pipelines.events import EVENT, Done, Event, Failed, Interrupted, Stopped
from ..pipelines.requests import TrainRequest
from ..training.checkpoint import resumable
from .processes import is_alive, this_process
from .requests import AnyRequest, Request
from .settings import Home

JobState = Literal["queued", "running", "done", "stopped", "failed", "interrupted"]
JobKind = Literal["generate", "train", "tool", "effect", "compose"]
FINAL_STATES: tuple[JobState, ...] = ("done", "stopped", "failed", "interrupted")
LEASE = 4.0  # seconds a heartbeat is good for
PATIENCE = 30.0  # seconds of silence after which even a living owner counts as hung (a long library load is silent)
ANY_DEVICE = "auto"
REQUEST: TypeAdapter[AnyRequest] = TypeAdapter(Request)

SCHEMA = """
CREATE TABLE IF NOT EXISTS jobs (
    number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, kind TEXT NOT NULL, request TEXT NOT NULL,
    state TEXT NOT NULL, device TEXT NOT NULL, owner TEXT NOT NULL DEFAULT '', heartbeat REAL NOT NULL DEFAULT 0,
    cancel INTEGER NOT NULL DEFAULT 0, resumable INTEGER NOT NULL DEFAULT 0, parent TEXT NOT NULL DEFAULT '',
    created REAL NOT NULL, started REAL, finished REAL);
CREATE INDEX IF NOT EXISTS jobs_by_state ON jobs (state, number);
CREATE TABLE IF NOT EXISTS events (
    job TEXT NOT NULL, seq INTEGER NOT NULL, body TEXT NOT NULL, PRIMARY KEY (job, seq)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS workers (device TEXT PRIMARY KEY, owner TEXT NOT NULL, heartbeat REAL NOT NULL);
CREATE TABLE IF NOT EXISTS servers (owner TEXT PRIMARY KEY, heartbeat REAL NOT NULL);
"""


@dataclass(frozen=True)
class Job:
    """One run: a request and what became of it.

    Args:
        id: Sortable by time; also the name of its folder.
        device: Where it runs or ran; "auto" while queued: the first free worker takes it.
        created: Seconds since 1970, as are `started` and `finished` (None until it happened).
        resumable: A checkpoint was kept; `Studio.resume` goes on from it.
        parent: Id of the job this one resumes, or "".
        cancelling: Somebody asked it to stop.
    """

    id: str
    kind: JobKind
    request: AnyRequest
    state: JobState
    device: str
    created: float
    started: float | None
    finished: float | None
    resumable: bool
    folder: Path
    parent: str = ""
    cancelling: bool = False

    @property
    def finished_already(self) -> bool:
        return self.state in FINAL_STATES


def checkpoint_of(job: Job) -> Path | None:
    """Find the checkpoint a job can be resumed from: its own, or the one it started from."""
    if not isinstance(job.request, TrainRequest):
        return None
    places = [job.folder / "checkpoint"]
    if job.request.resume_from:
        places.append(Path(job.request.resume_from))
    return next((place for place in places if resumable(place)), None)


class JobStore:
    """The table of jobs. Safe to use from several threads and processes; every thread has its own connection."""

    def __init__(self, home: Home) -> None:
        self.home = home
        self._lock = threading.Lock()
        self._connections: dict[int, tuple[threading.Thread, sqlite3.Connection]] = {}
        home.root.mkdir(parents=True, exist_ok=True)
        for statement in SCHEMA.split(";"):
            self._connection().execute(statement)

    def close(self) -> None:
        """Close every connection; call when no thread uses the store any more."""
        with self._lock:
            for _, connection in self._connections.values():
                connection.close()
            self._connections.clear()

    # Jobs

    def submit(
        self,
        request: AnyRequest,
        *,
        parent: str = "",
        device: str = ANY_DEVICE,
        owner: str = "",
    ) -> Job:
        """Add a job: queued, or with an `owner` running in that process at once."""
        now = time.time()
        job_id = f"{time.strftime('%y%m%d-%H%M%S', time.localtime(now))}-{uuid.uuid4().hex[:6]}"
        state, started = ("running", now) if owner else ("queued", None)
        values = (job_id, request.kind, request.to_json(), state, device, owner, now, parent, now, started)
        with self._write() as db:
            db.execute(
                "INSERT INTO jobs (id, kind, request, state, device, owner, heartbeat, parent, created, started)"
                " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                values,
            )
        return self.job(job_id)

    def job(self, job_id: str) -> Job:
        """Read one job.

        Raises:
            InputError: There is no such job.
        """
        row = self._connection().execute("SELECT * FROM jobs WHERE id = ?", (job_id,)).fetchone()
        if row is None:
            raise InputError(f"There is no job {job_id}.", "Look at the list of jobs for its id.")
        return self._job(row)

    def jobs(self, limit: int = 50, kind: JobKind | None = None, state: JobState | None = None) -> list[Job]:
        """List jobs, newest first."""
        rows = self._connection().execute(
            "SELECT * FROM jobs WHERE (?1 IS NULL OR kind = ?1) AND (?2 IS NULL OR state = ?2)"
            " ORDER BY number DESC LIMIT ?3",
            (kind, state, limit),
        )
        return [self._job(row) for row in rows]

    def claim(self, device: str, owner: str | None = None) -> Job | None:
        """Take the oldest queued job a worker of `device` may run; no two callers get the same one."""
        owner, now = owner or this_process(), time.time()
        if not self._connection().execute("SELECT 1 FROM jobs WHERE state = 'queued' LIMIT 1").fetchall():
            return None  # asked ten times a second: look without taking the write lock
        with self._write() as db:
            row = db.execute(
                "UPDATE jobs SET state = 'running', device = ?1, owner = ?2, heartbeat = ?3, started = ?3"
                " WHERE number = (SELECT number FROM jobs WHERE state = 'queued'"
                " AND device IN (?1, ?4) ORDER BY number LIMIT 1)"
                " RETURNING *",
                (device, owner, now, ANY_DEVICE),
            ).fetchall()
        return self._job(row[0]) if row else None

    def set_request(self, job_id: str, request: AnyRequest) -> None:
        """Replace the request by its completed form (drawn seed, adapter hashes)."""
        with self._write() as db:
            db.execute("UPDATE jobs SET request = ? WHERE id = ?", (request.to_json(), job_id))

    def cancel(self, job_id: str) -> None:
        """Ask a job to stop: a queued one is stopped here and now, a running one at its next step."""
        self.job(job_id)
        with self._write() as db:
            ended = db.execute(
                "UPDATE jobs SET state = 'stopped', finished = ? WHERE id = ? AND state = 'queued'",
                (time.time(), job_id),
            ).rowcount
            if ended:
                _insert_events(db, job_id, [Stopped()])
            else:
                db.execute("UPDATE jobs SET cancel = 1 WHERE id = ? AND state = 'running'", (job_id,))

    def cancel_asked(self, job_id: str) -> bool:
        row = self._connection().execute("SELECT cancel FROM jobs WHERE id = ?", (job_id,)).fetchone()
        return bool(row and row["cancel"])

    def finish(self, job_id: str, event: Event, owner: str | None = None) -> bool:
        """Record the last event of a job and its state in one step.

        Returns:
            False when the job no longer belongs to `owner`, for instance after its lease ran out.
        """
        state = _state_after(event)
        resumable = isinstance(event, Stopped | Interrupted) and event.resumable
        with self._write() as db:
            ended = db.execute(
                "UPDATE jobs SET state = ?, finished = ?, resumable = ?"
                " WHERE id = ? AND state = 'running' AND owner = ?",
                (state, time.time(), resumable, job_id, owner or this_process()),
            ).rowcount
            if ended:
                _insert_events(db, job_id, [event])
        return bool(ended)

    def fail_queued(self, event: Failed) -> None:
        """End every queued job with `event`, when no worker can be started."""
        for job in self.jobs(limit=1000, state="queued"):
            with self._write() as db:
                if db.execute(
                    "UPDATE jobs SET state = 'failed', finished = ? WHERE id = ? AND state = 'queued'",
                    (time.time(), job.id),
                ).rowcount:
                    _insert_events(db, job.id, [event])

    def reap(self, patience: float = PATIENCE) -> list[Job]:
        """Turn running jobs without a living owner into `interrupted` ones; gives those it turned.

        An owner on this host counts as dead when its process is gone, on another host when its lease ran out. A
        process that lives but has been silent for `patience` seconds counts as hung.
        """
        reaped: list[Job] = []
        rows = self._connection().execute("SELECT * FROM jobs WHERE state = 'running'").fetchall()
        for row in rows:
            if _lives(row["owner"], row["heartbeat"], patience):
                continue
            job = self._job(row)
            event = Interrupted(resumable=checkpoint_of(job) is not None)
            if self.finish(job.id, event, owner=row["owner"]):
                reaped.append(self.job(job.id))
        return reaped

    # Events

    def append(self, job_id: str, events: Iterable[Event], owner: str | None = None) -> bool:
        """Add events in one transaction, renewing the lease; False when the job no longer belongs to `owner`."""
        with self._write() as db:
            owned = db.execute(
                "UPDATE jobs SET heartbeat = ? WHERE id = ? AND state = 'running' AND owner = ?",
                (time.time(), job_id, owner or this_process()),
            ).rowcount
            if owned:
                _insert_events(db, job_id, events)
        return bool(owned)

    def events(self, job_id: str, after: int = 0) -> list[tuple[int, Event]]:
        """Give the events numbered above `after` (numbers count from 1 in each job)."""
        rows = self._connection().execute(
            "SELECT seq, body FROM events WHERE job = ? AND seq > ? ORDER BY seq", (job_id, after)
        )
        return [(row["seq"], EVENT.validate_json(row["body"])) for row in rows]

    # Workers and servers

    def register_worker(self, device: str, owner: str | None = None) -> bool:
        """Become the worker of a device; False when another one lives."""
        owner = owner or this_process()
        with self._write() as db:
            row = db.execute("SELECT * FROM workers WHERE device = ?", (device,)).fetchone()
            if row is not None and row["owner"] != owner and _lives(row["owner"], row["heartbeat"], PATIENCE):
                return False
            db.execute("INSERT OR REPLACE INTO workers VALUES (?, ?, ?)", (device, owner, time.time()))
        return True

    def beat_worker(self, device: str) -> bool:
        """Renew a worker's heartbeat; False when another process took its place."""
        with self._write() as db:
            return bool(
                db.execute(
                    "UPDATE workers SET heartbeat = ? WHERE device = ? AND owner = ?",
                    (time.time(), device, this_process()),
                ).rowcount
            )

    def leave_worker(self, device: str) -> None:
        with self._write() as db:
            db.execute("DELETE FROM workers WHERE device = ? AND owner = ?", (device, this_process()))

    def worker(self, device: str) -> str | None:
        """Name the living worker of a device."""
        row = self._connection().execute("SELECT * FROM workers WHERE device = ?", (device,)).fetchone()
        return row["owner"] if row is not None and _lives(row["owner"], row["heartbeat"], PATIENCE) else None

    def beat_server(self) -> None:
        with self._write() as db:
            db.execute("INSERT OR REPLACE INTO servers VALUES (?, ?)", (this_process(), time.time()))

    def leave_server(self) -> None:
        with self._write() as db:
            db.execute("DELETE FROM servers WHERE owner = ?", (this_process(),))

    def has_server(self) -> bool:
        """Say whether any page is being served from this home."""
        rows = self._connection().execute("SELECT * FROM servers").fetchall()
        return any(_lives(row["owner"], row["heartbeat"], PATIENCE) for row in rows)

    # Inside

    def _job(self, row: sqlite3.Row) -> Job:
        return Job(
            id=row["id"],
            kind=row["kind"],
            request=REQUEST.validate_json(row["request"]),
            state=row["state"],
            device=row["device"],
            created=row["created"],
            started=row["started"],
            finished=row["finished"],
            resumable=bool(row["resumable"]),
            folder=self.home.job(row["id"]),
            parent=row["parent"],
            cancelling=bool(row["cancel"]),
        )

    def _connection(self) -> sqlite3.Connection:
        thread = threading.current_thread()
        known = self._connections.get(threading.get_ident())
        if known is not None and known[0] is thread:
            return known[1]
        connection = _open(self.home.database)
        with self._lock:
            for ident, (owner, old) in list(self._connections.items()):
                if not owner.is_alive():
                    old.close()
                    del self._connections[ident]
            self._connections[threading.get_ident()] = (thread, connection)
        return connection

    @contextmanager
    def _write(self) -> Generator[sqlite3.Connection]:
        connection = self._connection()
        connection.execute("BEGIN IMMEDIATE")
        try:
            yield connection
            connection.execute("COMMIT")
        except BaseException:
            connection.rollback()
            raise


def _open(path: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(path, timeout=10, isolation_level=None, check_same_thread=False)
    connection.row_factory = sqlite3.Row
    for attempt in range(100):  # switching to WAL ignores the busy timeout
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            break
        except sqlite3.OperationalError:
            if attempt == 99:
                raise
            time.sleep(0.02)
    connection.execute("PRAGMA synchronous = NORMAL")  # with WAL: no disk flush per event, never a broken file
    return connection


def _insert_events(db: sqlite3.Connection, job_id: str, events: Iterable[Event]) -> None:
    last = db.execute("SELECT COALESCE(MAX(seq), 0) FROM events WHERE job = ?", (job_id,)).fetchone()[0]
    rows = [(job_id, last + index, event.model_dump_json()) for index, event in enumerate(events, start=1)]
    db.executemany("INSERT INTO events VALUES (?, ?, ?)", rows)


def _state_after(event: Event) -> JobState:
    endings: dict[type, JobState] = {Done: "done", Stopped: "stopped", Failed: "failed", Interrupted: "interrupted"}
    return endings[type(event)]


def _lives(owner: str, heartbeat: float, patience: float) -> bool:
    silent = time.time() - heartbeat
    alive = is_alive(owner)
    if alive is None:
        return silent < LEASE
    return alive and silent < patience
