"""A server of a few listed files, for this machine alone."""

from __future__ import annotations

import http.server
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import BinaryIO
from urllib.parse import unquote, urlsplit

HOST = "127.0.0.1"
POLICY = (
    "default-src 'none'; script-src 'self' 'wasm-unsafe-eval'; style-src 'self'; connect-src "
    "'self'; worker-src 'self' blob:; img-src data:; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'"
)
"""What the page may do: nothing but what this server gives it."""
_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".mjs": "text/javascript; charset=utf-8",
    ".json": "application/json",
    ".wasm": "application/wasm",
}
_CHUNK = 1 << 20


@dataclass(frozen=True)
class Resource:
    """What one path of the server gives."""

    open: Callable[[], BinaryIO]
    size: int
    """Bytes."""

    @classmethod
    def of_bytes(cls, data: bytes) -> Resource:
        """What is in memory."""
        import io

        return cls(lambda: io.BytesIO(data), len(data))

    @classmethod
    def of_file(cls, path: Path) -> Resource:
        """A file as it is now."""
        return cls(lambda: path.open("rb"), path.stat().st_size)


class Loopback(http.server.ThreadingHTTPServer):
    """Serves some paths on 127.0.0.1, and nothing else: no folder is listed, no path is followed.

    Args:
        resources: by path, `/` first.
        port: 0 takes one that is free.

    Raises:
        OSError: the port is taken.
    """

    daemon_threads = True

    def __init__(self, resources: Mapping[str, Resource], port: int) -> None:
        self.resources = resources
        super().__init__((HOST, port), _Handler)

    @property
    def address(self) -> str:
        """What to type into a browser."""
        return f"http://{HOST}:{self.server_port}/"


class _Handler(http.server.BaseHTTPRequestHandler):
    server: Loopback
    protocol_version = "HTTP/1.1"
    server_version = "bakeout"
    sys_version = ""

    def do_GET(self) -> None:
        self._answer(whole=True)

    def do_HEAD(self) -> None:
        self._answer(whole=False)

    def _answer(self, *, whole: bool) -> None:
        # A page of another site that resolves its own name to this machine is refused.
        names = {f"{name}:{self.server.server_port}" for name in (HOST, "localhost")}
        if self.headers.get("Host") not in names:
            self._refuse(HTTPStatus.FORBIDDEN)
            return
        path = unquote(urlsplit(self.path).path)
        found = self.server.resources.get(path)
        if found is None:
            self._refuse(HTTPStatus.NOT_FOUND)
            return
        self.send_response(HTTPStatus.OK)
        kind = _TYPES.get(Path(path).suffix if path != "/" else ".html")
        self.send_header("Content-Type", kind or "application/octet-stream")
        self.send_header("Content-Length", str(found.size))
        self._common_headers()
        if whole:
            with found.open() as file:
                while chunk := file.read(_CHUNK):
                    self.wfile.write(chunk)

    def _refuse(self, status: HTTPStatus) -> None:
        self.send_response(status)
        self.send_header("Content-Length", "0")
        self._common_headers()

    def _common_headers(self) -> None:
        self.send_header("Content-Security-Policy", POLICY)
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Cache-Control", "no-store")
        self.send_header("Referrer-Policy", "no-referrer")
        # With these two a browser lets WebAssembly use several threads.
        self.send_header("Cross-Origin-Opener-Policy", "same-origin")
        self.send_header("Cross-Origin-Embedder-Policy", "require-corp")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing: the terminal is the user's."""
