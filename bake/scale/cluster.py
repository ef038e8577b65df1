"""Connecting to a Ray cluster, or starting one."""

from __future__ import annotations

import logging
import os
import re
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import chdir, contextmanager
from typing import Any

from bake.errors import ScaleError, printable, short
from bake.files.scratch import Scratch
from bake.scale.crew import Crew

LOCAL = "local"
"""In place of an address: a Ray of this run's own, on this machine's cores."""
ANSWER_SECONDS = 10
"""How long a cluster may take to answer."""
_LONGEST_FOLDER = 36
"""Most characters of a folder in which Ray's sockets can lie, whose names are long themselves."""
_QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_BACKEND_LOG_LEVEL": "fatal",
    "RAY_NUM_REDIS_GET_RETRIES": "1",
    "RAY_gcs_rpc_server_connect_timeout_s": "5",
    "RAY_py_gcs_connect_timeout_s": str(ANSWER_SECONDS),
}
"""Ray tells nobody of this run, says nothing by itself, and does not wait for minutes."""


@contextmanager
def cluster(address: str | None) -> Iterator[Crew | None]:
    """Connect to a Ray cluster, or start one of this run's own, which ends with the block.

    Args:
        address: HOST:PORT as `ray start --head` prints it, on a machine of the cluster; `LOCAL`; or
            None, for no crew and no Ray.

    Raises:
        ScaleError: Ray is not installed, or does not answer there.
    """
    if address is None:
        yield None
        return
    if address != LOCAL:
        _check_answers(address)
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    try:
        import ray
    except ImportError as error:
        raise ScaleError("--ray: Ray is not here; pip install 'bakeout[scale]'") from error
    # It prints what happens to workers to stdout, and tells the cluster the command line.
    ray._private.worker.print_to_stdstream = lambda *_args, **_options: None
    ray._private.utils.get_entrypoint_name = lambda: "bakeout"
    where = "--ray" if address == LOCAL else f"--ray {address}"
    own: dict[str, Any] = {}
    if address == LOCAL:
        logs = Scratch("ray")
        own["include_dashboard"] = False
        if len(logs.name) <= _LONGEST_FOLDER:
            own["_temp_dir"] = logs.name
    terminate = signal.getsignal(signal.SIGTERM)
    logging.getLogger("ray").setLevel(logging.CRITICAL)
    try:
        with _silent(), chdir(os.sep):  # whose files every worker could import before any others
            ray.init(address=address, log_to_driver=False, configure_logging=False, **own)
    except SystemExit as ended:  # Ray makes that of SIGTERM
        raise KeyboardInterrupt from ended
    except Exception as error:  # Ray raises every kind
        reason = printable(short(next(iter(str(error).splitlines()), type(error).__name__)))
        raise ScaleError(
            f"{where}: does not start ({reason}); expected a cluster of Ray {ray.__version__}, and "
            "this to be one of its machines"
        ) from error
    try:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, terminate)  # which Ray takes for itself
        yield Crew(ray, where)
    finally:
        ray.shutdown()


@contextmanager
def _silent() -> Iterator[None]:
    """Within the block, nothing that is written to stderr is seen: Ray's C++ writes there."""
    sys.stderr.flush()
    seen, nothing = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 2)
    try:
        yield
    finally:
        os.dup2(seen, 2)
        os.close(seen)
        os.close(nothing)


def _check_answers(address: str) -> None:
    host, _, port = address.rpartition(":")
    if not re.fullmatch(r"[\w.-]+:[0-9]{1,5}|\[[0-9a-f:]+\]:[0-9]{1,5}", address):
        raise ScaleError(
            f"--ray {short(printable(address))}: is no address; expected HOST:PORT, as `ray start "
            "--head` prints it, or nothing for a Ray of this machine's own"
        )
    try:
        socket.create_connection((host.strip("[]"), int(port)), ANSWER_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise ScaleError(
            f"--ray {address}: does not answer ({error}); expected the HOST:PORT that `ray start "
            "--head` prints. Start it, or leave the address out"
        ) from error
