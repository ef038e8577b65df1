"""A sweep's study in a PostgreSQL, which processes on several machines share."""

from __future__ import annotations

import hashlib
import os
import socket
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from bake.errors import OutputError, ScaleError, printable, short

ANSWER_SECONDS = 10
"""How long a storage may take to answer."""
_EXPECTED = "postgresql://USER@HOST:PORT/DATABASE"
_KINDS = ("postgresql", "postgresql+psycopg", "postgres")
_ALIVE = {"keepalives_idle": 30, "keepalives_interval": 10, "keepalives_count": 3}
"""A machine that is not heard of for a minute is gone, in both directions (seconds, tries)."""
_MUTEX = "bakeout sweep"


class SharedStore:
    """A study in a PostgreSQL. What this process holds there, the server takes back when the
    process or its machine dies: advisory locks of a session of its own.

    Args:
        storage: URL of the database. A password in it is shown to nobody.
        name: of the study.

    Raises:
        OutputError: the name does not fit into it.
        ScaleError: that is no such URL, its driver is not installed, or it does not answer.
    """

    def __init__(self, storage: str, name: str) -> None:
        if len(name) > 512 or not name.isprintable():
            raise OutputError(
                f"output {printable(short(name))}: names a study; expected at most 512 characters "
                "that can be shown"
            )
        self.name, self.worker = name, worker_name()
        self._url, place = _read(storage)
        self.where = f"--storage {place}, study {printable(name)}"
        with self._answering():
            self._connect()

    def _connect(self) -> None:
        from sqlalchemy import create_engine
        from sqlalchemy.pool import NullPool

        self._options = {"connect_timeout": ANSWER_SECONDS, "keepalives": 1, **_ALIVE}
        engine = create_engine(self._url, poolclass=NullPool, connect_args=self._options)
        self._session = engine.connect().execution_options(isolation_level="AUTOCOMMIT")
        for name, setting in _ALIVE.items():
            self._session.exec_driver_sql(f"SET tcp_{name} = {setting}")
        self._ask("pg_advisory_lock", self.worker)

    def open(self) -> Any:
        """For Optuna; within `locked`."""
        from optuna.storages import RDBStorage

        url = self._url.render_as_string(hide_password=False)
        for brace in "{}":  # Optuna takes them for its own
            url = url.replace(brace, 2 * brace)
        engine = {"pool_pre_ping": True, "connect_args": self._options}
        try:
            return RDBStorage(url, engine_kwargs=engine)
        except RuntimeError:
            raise ScaleError(
                f"{self.where}: holds tables of another version of Optuna; expected the same on "
                "all machines. Install it there, or name another database"
            ) from None

    @contextmanager
    def locked(self) -> Iterator[None]:
        """One process at a time, on all machines; the server drops the lock with the session."""
        from sqlalchemy.exc import SQLAlchemyError

        with self._answering():
            try:
                self._ask("pg_advisory_lock", _MUTEX)
            except SQLAlchemyError:  # the server was started anew
                self.close()
                self._connect()
                self._ask("pg_advisory_lock", _MUTEX)
            try:
                yield
            finally:
                with suppress(SQLAlchemyError):  # it went with the session
                    self._ask("pg_advisory_unlock", _MUTEX)

    def lives(self, worker: str) -> bool:
        """Whether a process is there that had this name."""
        if self._ask("pg_try_advisory_lock", worker):
            self._ask("pg_advisory_unlock", worker)
            return False
        return True

    def close(self) -> None:
        """Let others see that this process is gone."""
        if not self._session.closed:
            self._session.invalidate()  # whatever the server says
            self._session.close()

    def _ask(self, function: str, lock: str) -> Any:
        digest = hashlib.sha256(lock.encode()).digest()
        key = int.from_bytes(digest[:8], "big", signed=True)
        return self._session.exec_driver_sql(f"SELECT {function}({key})").scalar()

    @contextmanager
    def _answering(self) -> Iterator[None]:
        from optuna.exceptions import StorageInternalError
        from sqlalchemy.exc import SQLAlchemyError

        try:
            yield
        except ImportError:
            raise ScaleError(
                "--storage: psycopg is not here; pip install 'bakeout[scale]'"
            ) from None
        except (SQLAlchemyError, StorageInternalError) as error:
            reason = _reason(error)
            for secret in (self._url.password, self._url.query.get("password")):
                reason = reason.replace(str(secret), "…") if secret else reason
            raise ScaleError(
                f"{self.where}: cannot be used ({printable(short(reason))}); expected a "
                "PostgreSQL in whose database tables may be made. Start it, or correct the URL"
            ) from None


def worker_name() -> str:
    """Of this process, and of no other one anywhere."""
    return f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"


def _read(storage: str) -> tuple[Any, str]:
    """(the URL for SQLAlchemy, what of it may be shown).

    Raises:
        ScaleError: it is none of a PostgreSQL.
    """
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import ArgumentError

    try:
        url = make_url(storage)
    except (ArgumentError, ValueError):
        url = None
    # What stands behind an @ that belongs to the password must not be taken for a host.
    if url is None or "@" in f"{url.host}{url.database}":
        raise ScaleError(
            f"--storage: is no URL; expected {_EXPECTED}, with %40 for an @ in user or password"
        )
    if url.drivername not in _KINDS:
        raise ScaleError(
            f"--storage {short(printable(url.drivername))}://…: is of no known kind; expected "
            f"{_EXPECTED}"
        )
    url = url.set(drivername="postgresql+psycopg")
    place = f"{url.host or ''}{f':{url.port}' if url.port else ''}/{url.database or ''}"
    return url, printable(short(f"postgresql://{place}"))


def _reason(error: BaseException) -> str:
    """The first line of what the server or its driver says."""
    cause: BaseException | None = error
    while cause is not None:
        if (original := getattr(cause, "orig", None)) is not None:
            error = original
        cause = cause.__cause__
    return next(iter(str(error).splitlines()), type(error).__name__)
