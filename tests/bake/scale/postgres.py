"""A PostgreSQL of the tests' own."""

from __future__ import annotations

import os
import pwd
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

USER, PASSWORD = "sweeper", "p@ss/{word}"
QUOTED = "p%40ss%2F%7Bword%7D"


class Server:
    """A server on a port of this machine, whose only user has a password.

    Args:
        programs: folder of initdb and pg_ctl.
        folder: for its data.
        account: keyword arguments for subprocess: as root it does not start.
    """

    def __init__(self, programs: Path, folder: Path, account: dict[str, Any]) -> None:
        self._programs, self._data, self._account = programs, folder / "data", account
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.place = f"127.0.0.1:{self.port}/postgres"
        self.url = f"postgresql://{USER}:{QUOTED}@{self.place}"
        (secret := folder / "secret").write_text(PASSWORD)
        secret.chmod(0o644)
        self._run("initdb", f"--username={USER}", f"--pwfile={secret}", "-A", "password", "-N")
        with (self._data / "postgresql.conf").open("a") as file:
            file.write(f"listen_addresses = '127.0.0.1'\nport = {self.port}\nfsync = off\n")
            file.write(f"unix_socket_directories = '{folder}'\n")

    def start(self) -> None:
        self._run("pg_ctl", "-w", "-l", str(self._data / "log"), "start")

    def stop(self) -> None:
        self._run("pg_ctl", "-w", "-m", "immediate", "stop")

    def _run(self, program: str, *arguments: str) -> None:
        command = [str(self._programs / program), "-D", str(self._data), *arguments]
        subprocess.run(
            command, check=True, cwd="/", stdout=subprocess.DEVNULL, timeout=60, **self._account
        )


def programs_here() -> Path | None:
    """Folder of PostgreSQL's programs, the newest of them."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda p: int(p.parts[4]))
    initdb = found[-1] if found else shutil.which("initdb")
    return None if initdb is None else Path(initdb).resolve().parent


@contextmanager
def running_server() -> Iterator[Server]:
    """A server for as long as the block takes; without PostgreSQL the test is skipped."""
    programs = programs_here()
    if programs is None:
        pytest.skip("PostgreSQL is not installed")
    account: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="pg-", dir="/tmp") as name:
        if os.getuid() == 0:
            known = {entry.pw_name: entry for entry in pwd.getpwall()}
            other = known.get("postgres") or known["nobody"]
            account = {"user": other.pw_uid, "group": other.pw_gid, "extra_groups": []}
            os.chown(name, other.pw_uid, other.pw_gid)
        server = Server(programs, Path(name), account)
        server.start()
        try:
            yield server
        finally:
            server.stop()
