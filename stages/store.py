"""The results database of a workspace: the only module that imports duckdb.

The run records and artifacts are the truth, results.duckdb is a view of them in SQL: whatever happens to the file, it
is made anew. DuckDB lets one process write or many read, so every connection here is short, and one that finds the
database taken tries again for a bounded time. Our own writers queue at a lock of the workspace.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import duckdb
from filelock import Timeout
from tenacity import Retrying, retry_if_exception_type, stop_after_delay, wait_random

from blockpruner.durable import sync_folder
from blockpruner.errors import ArtifactError, StoreError
from stages.runs import RunRecord, RunStore
from stages.store_rows import RunRows, record_digest, rows_of
from stages.store_schema import (
    COLUMNS,
    CREATE,
    INFO_TABLE,
    SCHEMA_DIGEST,
    SKIPPED_TABLE,
    TABLES,
    delete_statement,
    insert_statement,
)
from stages.workspace import Warn, Workspace, log_warning

_CONFIG: dict[str, str | bool | int | float | list[str]] = {
    "enable_external_access": "false",
    "autoinstall_known_extensions": "false",
    "autoload_known_extensions": "false",
    "temp_directory": "",  # a query too large for the memory would be laid down beside the database, to the disk's end
}
_THEN_LOCKED = "SET enable_progress_bar = false; SET lock_configuration = true"
"""A bar would be drawn among the results; it can be set only once connected."""
_TABLES_HERE = """
SELECT table_name, column_name, data_type || if(is_nullable, '', ' NOT NULL')
FROM system.main.duckdb_columns() WHERE column_default IS NULL AND table_oid IN (
    SELECT table_oid FROM system.main.duckdb_tables() WHERE database_name = current_database() AND schema_name = 'main'
) AND database_name = current_database() AND schema_name = 'main'
"""
"""The columns of the tables that are tables: a view computes what it gives, and so does a column with a default."""
_READING = frozenset({duckdb.StatementType.SELECT, duckdb.StatementType.EXPLAIN, duckdb.StatementType.MULTI})
"""SELECT includes FROM, VALUES, SHOW, DESCRIBE and SUMMARIZE; MULTI is a PIVOT."""
_BUSY_WORDS = ("Could not set lock on file", "different configuration than existing connections")
_TORN_WORDS = (
    "not a valid DuckDB database file",
    "Could not read enough bytes",
    "Corrupt database file",
    "replaying WAL",
    "database does not exist",
)
_UNSTORABLE = (duckdb.DataError, duckdb.IntegrityError, duckdb.InvalidInputException, ValueError, OverflowError)
"""What a value that fits no column comes as: a number too large, a date out of range, a text that is not Unicode."""
_INTERRUPTED = "Query interrupted"
"""What DuckDB puts in the place of the error that a signal's handler raised while it computed."""
_TORN_TYPES = (duckdb.IOException, duckdb.SerializationException, duckdb.InternalException, duckdb.FatalException)

ResultT = TypeVar("ResultT")


class QueryResult(NamedTuple):
    """What a query gave."""

    columns: list[str]
    """Each name once: what the query gives twice is `a` and `a_1`."""
    rows: list[tuple[Any, ...]]


class _BusyError(StoreError):
    """Another process has the database open."""


class _UnusableError(StoreError):
    """The database file must be made anew; the message says what is wrong with it."""


class _MissingError(_UnusableError):
    """There is no database file."""


class ResultStore:
    """The results of all runs of one workspace, in SQL."""

    def __init__(self, path: Path, warn: Warn = log_warning, wait: float = 20.0) -> None:
        """The database `path`, in the workspace's folder. `wait`: seconds to wait for another process that has it."""
        self.path = path
        self._workspace = Workspace(path.parent)
        self._warn = warn
        self._wait = wait

    def ingest(self, record: RunRecord) -> bool:
        """Bring a run's rows up to date, and with them those of finished runs that could not be stored before.

        Never raises for the state of the database or the disk: False means that the rows wait in the artifacts, which
        was said, and the next ingest brings them.
        """
        deadline = time.monotonic() + self._wait
        try:
            with self._writing(deadline):
                self._healed(lambda: self._ingest_now(record, deadline), besides=record.run_id)
        except (StoreError, ArtifactError, duckdb.Error, OSError) as error:
            self._warn(
                f"the rows of run {record.run_id} are not in {self.path.name} yet ({_one_line(error)}); "
                "they wait in the artifacts, and the next run or `blockpruner db rebuild` brings them"
            )
            return False
        return True

    def query(self, sql: str, *, wait: float | None = None) -> QueryResult:
        """Answer one SQL query that reads; it can write nothing, attach nothing and read no file.

        Raises:
            StoreError: if there are no results yet, the database stays taken for `wait` seconds, or the query is wrong.
        """
        deadline = time.monotonic() + (self._wait if wait is None else wait)
        _check_text(sql)
        try:
            return self._query_now(sql, deadline)
        except _UnusableError as unusable:
            if not self._records():
                raise StoreError(
                    f"no results in {self.path.parent} yet; `blockpruner demo` or `blockpruner run` makes some"
                ) from None
            with self._said_plainly(f"{unusable}, and cannot be made"), self._writing(deadline):
                return self._healed(lambda: self._query_now(sql, deadline))

    def rebuild(self, records: Iterable[RunRecord] | None = None) -> int:
        """Make the database anew from the run records (all of the workspace's, if not told which), and count them.

        Raises:
            StoreError: if another process keeps the database open.
        """
        chosen = self._records() if records is None else list(records)
        deadline = time.monotonic() + self._wait
        with self._said_plainly("cannot be made"), self._writing(deadline):
            self._prove_free(deadline)
            self._build(chosen)
        return len(chosen)

    def names(self) -> list[str]:
        """Every name that a query can use: of tables, views and their columns.

        Raises:
            StoreError: as `query` does.
        """
        named = (
            "SELECT DISTINCT unnest([table_name, column_name]) FROM duckdb_columns() WHERE NOT internal ORDER BY ALL"
        )
        return [name for (name,) in self.query(named).rows]

    def forget(self, run_ids: Sequence[str]) -> None:
        """Take the rows of these runs out.

        Raises:
            StoreError: if the database stays taken, or cannot be written.
        """
        deadline = time.monotonic() + self._wait
        with self._said_plainly("cannot be written"), self._writing(deadline):
            self._healed(lambda: self._forget_now(run_ids, deadline))

    def _forget_now(self, run_ids: Sequence[str], deadline: float) -> None:
        with closing(self._connect(deadline, read_only=False)) as connection, _translated():
            _check_schema(connection)
            with _transaction(connection):
                for run_id in run_ids:
                    _delete_rows(connection, run_id)

    def _prove_free(self, deadline: float) -> None:
        """Wait until nobody has the file open: replacing it under another's hands would lose what that one writes."""
        try:
            self._connect(deadline, read_only=False).close()
        except _BusyError:
            raise
        except StoreError as error:  # whatever is wrong with the file, it is about to be replaced
            self._warn(f"{self.path.name} {error}")

    def _ingest_now(self, record: RunRecord, deadline: float) -> None:
        with closing(self._connect(deadline, read_only=False)) as connection, _translated():
            _check_schema(connection)
            known = "SELECT run_id, record_digest FROM runs UNION ALL SELECT run_id, record_digest FROM"
            stored = dict(connection.execute(f"{known} {SKIPPED_TABLE}").fetchall())
            self._put(connection, record)
            for other in self._records():
                if other.run_id != record.run_id and _is_late(other, stored):
                    self._put(connection, other)

    def _put(self, connection: duckdb.DuckDBPyConnection, record: RunRecord) -> None:
        """Store a run's rows; a record that no column can hold is said, remembered and left out, and stops no other."""
        try:
            _replace_rows(connection, rows_of(record, self._workspace, self._warn))
        except _UNSTORABLE as error:
            _skip(connection, record, _one_line(error))
            self._warn(
                f"run {record.run_id} is left out of {self.path.name}: its record {self._workspace.runs.name}/"
                f"{record.run_id}.json holds what the tables cannot ({_one_line(error)})"
            )

    def _query_now(self, sql: str, deadline: float) -> QueryResult:
        with closing(self._connect(deadline, read_only=True)) as connection, _translated():
            _check_schema(connection)
            statements = connection.extract_statements(sql)
            if len(statements) != 1 or statements[0].type not in _READING:
                raise StoreError("give one SQL statement that reads: SELECT, FROM, WITH, SHOW, DESCRIBE or EXPLAIN")
            return _answer(connection, statements[0])

    def _connect(self, deadline: float, *, read_only: bool) -> duckdb.DuckDBPyConnection:
        def attempt() -> duckdb.DuckDBPyConnection:
            if not self.path.is_file():
                raise _MissingError("is missing")
            if os.path.lexists(log := _log_of(self.path)) and not log.is_file():
                raise _UnusableError("is damaged")  # a pipe would be waited for
            with _translated():
                return _locked(self.path, read_only=read_only)

        retrying = Retrying(
            retry=retry_if_exception_type(_BusyError),
            stop=stop_after_delay(max(0.0, deadline - time.monotonic())),
            wait=wait_random(0.05, 0.25),
            reraise=True,
        )
        return retrying(attempt)

    @contextmanager
    def _writing(self, deadline: float) -> Iterator[None]:
        """Be the only one of our processes that writes; what one that was killed has left of a new database goes."""
        lock = self._workspace.lock("results")
        try:
            lock.acquire(timeout=max(0.0, deadline - time.monotonic()))
        except Timeout as error:
            raise _BusyError("another run is writing to the results database; try again later") from error
        try:
            for stale in self.path.parent.glob(f"{self.path.name}.tmp-*"):
                stale.unlink(missing_ok=True)
            yield
        finally:
            lock.release()

    def _healed(self, action: Callable[[], ResultT], besides: str | None = None) -> ResultT:
        """Do it; if the database file is missing, torn or of another version, make it anew and do it again.

        `besides`: the run whose rows the action itself brings.
        """
        try:
            return action()
        except _UnusableError as error:
            records = [record for record in self._records() if record.run_id != besides]
            is_first = isinstance(error, _MissingError) and all(record.status == "running" for record in records)
            if not is_first:
                self._warn(f"{self.path.name} {error}: made anew from {len(records)} run records and their artifacts")
            self._build(records)
        return action()

    def _build(self, records: Iterable[RunRecord]) -> None:
        """Write a whole new database beside the old one and rename it into place. Only with the writers' lock."""
        temporary = self.path.with_name(f"{self.path.name}.tmp-{os.getpid()}")
        with _translated(), closing(_locked(temporary)) as connection:
            connection.execute(CREATE)
            connection.execute(f"CREATE TABLE {INFO_TABLE} AS SELECT ? AS schema_digest", [SCHEMA_DIGEST])
            for record in records:
                self._put(connection, record)
            connection.execute("CHECKPOINT")  # closing would keep to itself that the disk is full
        # The old file's log of changes does not fit the new file, and DuckDB would refuse the two together.
        _log_of(self.path).unlink(missing_ok=True)
        temporary.replace(self.path)
        sync_folder(self.path.parent)

    @contextmanager
    def _said_plainly(self, what: str) -> Iterator[None]:
        """Turn the operating system's refusals into a user's error: the database `what`."""
        try:
            yield
        except OSError as error:
            raise StoreError(
                f"{self.path} {what} here from the run records ({error.strerror}); make the folder writable, "
                "or copy it and give the copy with --workspace DIR"
            ) from error

    def _records(self) -> list[RunRecord]:
        return RunStore(self._workspace.path, self._warn).list()


def _log_of(path: Path) -> Path:
    """Where DuckDB keeps the changes that are not in a database's file yet."""
    return path.with_name(f"{path.name}.wal")


def _locked(path: Path, *, read_only: bool = False) -> duckdb.DuckDBPyConnection:
    """A connection that reaches nothing but the database, which can be somebody else's, whoever asks it to."""
    return duckdb.connect(path, read_only=read_only, config=_CONFIG).execute(_THEN_LOCKED)


def _answer(connection: duckdb.DuckDBPyConnection, statement: duckdb.Statement) -> QueryResult:
    """What the statement gives. DuckDB heeds no signal while it computes, so that it does it in a thread of its own."""

    def compute() -> QueryResult:
        connection.execute(statement)
        return QueryResult(_unique([column[0] for column in connection.description or ()]), connection.fetchall())

    with ThreadPoolExecutor(max_workers=1) as pool:
        answer = pool.submit(compute)
        try:
            return answer.result()
        except KeyboardInterrupt:
            connection.interrupt()
            raise


def _replace_rows(connection: duckdb.DuckDBPyConnection, rows: RunRows) -> None:
    """Put a run's rows in place of those that are there, in one transaction."""
    with _transaction(connection):
        _delete_rows(connection, rows.runs[0].run_id)
        for table in TABLES:
            if columns := [list(column) for column in zip(*getattr(rows, table), strict=True)]:
                connection.execute(insert_statement(table), columns)


def _skip(connection: duckdb.DuckDBPyConnection, record: RunRecord, reason: str) -> None:
    """Remember that a run cannot be stored, in place of the rows that it has had."""
    with _transaction(connection):
        _delete_rows(connection, record.run_id)
        connection.execute(
            f"INSERT INTO {SKIPPED_TABLE} VALUES (?, ?, ?)", [record.run_id, record_digest(record), reason]
        )


def _delete_rows(connection: duckdb.DuckDBPyConnection, run_id: str) -> None:
    for table in (*TABLES, SKIPPED_TABLE):
        connection.execute(delete_statement(table), [run_id])


@contextmanager
def _transaction(connection: duckdb.DuckDBPyConnection) -> Iterator[None]:
    """All that the body changes, or nothing."""
    connection.begin()
    try:
        yield
        connection.commit()
    except BaseException:
        connection.rollback()
        raise


def _check_schema(connection: duckdb.DuckDBPyConnection) -> None:
    try:
        found = connection.execute(f"SELECT schema_digest FROM {INFO_TABLE}").fetchone()
    except duckdb.CatalogException:
        found = None
    if found != (SCHEMA_DIGEST,):
        raise _UnusableError("has the tables of another version")
    if not set(connection.execute(_TABLES_HERE).fetchall()) >= COLUMNS:
        raise _UnusableError("has other tables than BlockPruner makes")


def _check_text(sql: str) -> None:
    try:
        sql.encode()
    except UnicodeEncodeError as error:  # what Python makes of a terminal's bytes that are no text
        raise StoreError(
            f"the query is not valid text: character {error.start + 1} is no Unicode; write it in UTF-8"
        ) from error


def _unique(names: Sequence[str]) -> list[str]:
    """The names with a number behind each that has come before, so that no column hides another."""
    taken, unique = set(names), list[str]()
    for name in names:
        chosen, number = name, 0
        while chosen in unique or (number and chosen in taken):
            number += 1
            chosen = f"{name}_{number}"
        unique.append(chosen)
    return unique


def _is_late(record: RunRecord, stored: dict[str, str]) -> bool:
    """Whether a finished run is not in the database as its record has it. One under way stores its rows itself."""
    return record.status != "running" and stored.get(record.run_id) != record_digest(record)


@contextmanager
def _translated() -> Iterator[None]:
    """Turn DuckDB's errors into ours, and Ctrl-C or an order to end, which it makes an error, back into what it is."""
    try:
        yield
    except duckdb.Error as error:
        text = str(error)
        if any(words in text for words in _BUSY_WORDS):
            holder = re.search(r"PID (\d+)", text)
            who = f"process {holder[1]} has" if holder else "another connection has"
            raise _BusyError(f"{who} the results database open; close it there or try again later") from error
        if isinstance(error, duckdb.OutOfMemoryException):
            raise StoreError("the query needs more memory than there is; ask for less at once") from error
        from_the_file = isinstance(error, _TORN_TYPES) or type(error) is duckdb.Error  # not from the query's own words
        if from_the_file and any(words in text for words in _TORN_WORDS):
            raise _UnusableError("is damaged") from error
        raise StoreError(_one_line(error)) from error
    except RuntimeError as error:
        if str(error) != _INTERRUPTED:
            raise
        raise KeyboardInterrupt(_INTERRUPTED) from error


def _one_line(error: Exception) -> str:
    """The message without DuckDB's picture of where in the query it happened."""
    text = re.split(r"\n\s*LINE \d+:", str(error))[0]
    return " ".join(text.split())
