"""Serves the page on the loopback address, to this machine alone, under a path that only this run's address names."""

from __future__ import annotations

import errno
import json
import re
import secrets
import socketserver
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs

from busigen import __version__
from busigen.errors import BusigenError, UsageError
from busigen.runtime.viewing.page import ASSETS, asset
from busigen.runtime.viewing.pairs import Pairs, Query, picture

ADDRESS = "127.0.0.1"
MOST = 500  # Pairs in one answer
_IDLE_SECONDS = 60.0  # After which a connection that says nothing is closed

# The port may be another one, where it is forwarded. Any other name was made to lead here, by a page of its owner's.
_LOCAL_HOST = re.compile(r"(?:127\.0\.0\.1|localhost|\[::1\])(?::[0-9]{1,5})?", re.IGNORECASE)
_PAIR = re.compile(r"pair/((?:[0-9]{3,10}/)?[0-9]{9})/(pair\.json|(image|mask|healthy)\.png|(outline)\.svg)")
_METHODS = ("GET", "HEAD")
_TYPES = {
    "html": "text/html; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "json": "application/json",
    "png": "image/png",
    "svg": "image/svg+xml",
    "txt": "text/plain; charset=utf-8",
}
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    # Pixels may be a patient's: no browser is to keep them on its disk.
    "Cache-Control": "no-store",
}


class ViewServer(ThreadingHTTPServer):
    """Shows a dataset's pairs at ``url`` while `serve_forever` runs; a UsageError where the port cannot be had."""

    daemon_threads = True

    def __init__(self, pairs: Pairs, port: int = 0) -> None:
        self.pairs, self.about = pairs, pairs.about()
        # Other users of this machine reach the port as well, and are not told the path.
        self.base = f"/{secrets.token_urlsafe(16)}/"
        try:
            super().__init__((ADDRESS, port), _Handler)
        except (OSError, OverflowError) as error:
            taken = isinstance(error, OSError) and error.errno == errno.EADDRINUSE
            why = "another program uses it" if taken else getattr(error, "strerror", None) or str(error)
            fix = "Give another --port, from 1024 to 65535, or none: then one that is free is taken."
            raise UsageError(f"--port {port} cannot be had: {why}.", fix=fix) from error

    def server_bind(self) -> None:
        """Bind without asking for this machine's name, which may go out to a name server."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = ADDRESS, self.server_address[1]

    @property
    def url(self) -> str:
        """The page's address."""
        return f"http://{ADDRESS}:{self.server_port}{self.base}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of a browser that went away."""


class _NotFound(Exception):
    """Nothing is served at a path."""


class _Handler(BaseHTTPRequestHandler):
    server: ViewServer
    protocol_version = "HTTP/1.1"
    server_version, sys_version = f"busigen/{__version__}", ""
    timeout = _IDLE_SECONDS
    wbufsize = -1  # Headers and body go out together
    disable_nagle_algorithm = True

    def parse_request(self) -> bool:
        """Read a request's headers, and refuse what no browser on this machine would ask of this page."""
        if not super().parse_request():
            return False
        hosts = self.headers.get_all("Host") or []
        if len(hosts) != 1 or not _LOCAL_HOST.fullmatch(hosts[0]):
            self._refuse(HTTPStatus.FORBIDDEN, "Only http://127.0.0.1 and http://localhost are answered.")
        elif self.command not in _METHODS:
            self._refuse(HTTPStatus.METHOD_NOT_ALLOWED, "Nothing can be changed here: only GET and HEAD are answered.")
        elif not self.path.startswith(self.server.base):
            self._refuse(HTTPStatus.NOT_FOUND, "Open the whole address that busigen view has printed.")
        else:
            return True
        return False

    def do_GET(self) -> None:  # http.server's name.
        """Answer a request."""
        path, _, query = self.path.removeprefix(self.server.base).partition("?")
        try:
            kind, content = self._answer(path, parse_qs(query, max_num_fields=100))
        except (_NotFound, KeyError):
            self._send(HTTPStatus.NOT_FOUND, "txt", b"There is nothing here.")
        except (UsageError, ValueError) as error:
            said = str(error).replace("--where", "The filter")
            self._send(HTTPStatus.BAD_REQUEST, "txt", said.encode("utf-8", "replace"))
        except (BusigenError, OSError) as error:
            self._send(HTTPStatus.INTERNAL_SERVER_ERROR, "txt", str(error).encode("utf-8", "replace"))
        except Exception as error:
            said = f"{type(error).__name__}: {error}. This is a bug: report it."
            self._send(HTTPStatus.INTERNAL_SERVER_ERROR, "txt", said.encode("utf-8", "replace"))
        else:
            self._send(HTTPStatus.OK, kind, content)

    do_HEAD = do_GET

    def _answer(self, path: str, query: dict[str, list[str]]) -> tuple[str, bytes]:
        """A path's content and its type; a KeyError or `_NotFound` where there is nothing, or a BusigenError."""
        pairs = self.server.pairs
        if path == "" or path in ASSETS:
            return (path or "view.html").rpartition(".")[2], asset(path or "view.html").encode()
        if path == "about.json":
            return "json", _json(self.server.about)
        if path == "pairs.json":
            asked = _query(query)
            order, first = pairs.order(asked), _whole(query, "first", 0)
            shown = order[first : first + min(_whole(query, "count", 60), MOST)]
            return "json", _json({"total": len(order), "pairs": pairs.tiles(shown, asked.sort)})
        if (found := _PAIR.fullmatch(path)) is None:
            raise _NotFound
        row = pairs.row_of(found[1])
        if found[2] == "pair.json":
            return "json", _json(self._pair(row, _query(query)))
        if found[3] == "healthy":
            if (origin := pairs.origin(row)) is None:
                raise _NotFound
            return "png", pairs.beside.png(origin)
        return found[2].rpartition(".")[2], picture(pairs.member(row), found[3] or found[4])

    def _pair(self, row: int, query: Query) -> dict[str, Any]:
        pairs = self.server.pairs
        order, origin = pairs.order(query), pairs.origin(row)
        here = (order == row).nonzero()[0].tolist()
        around = [None, None] if not here else [n if 0 <= n < len(order) else None for n in (here[0] - 1, here[0] + 1)]
        try:
            problems = pairs.problems(row, pairs.member(row))
        except BusigenError as error:
            problems = [str(error)]
        return {
            "name": pairs.name_of(row),
            "row": pairs.row(row),
            "refused": pairs.refused(row),
            "problems": problems,
            "beside": origin and origin.caption,
            "total": len(order),
            "rank": here[0] if here else None,
            "before": None if around[0] is None else pairs.name_of(int(order[around[0]])),
            "after": None if around[1] is None else pairs.name_of(int(order[around[1]])),
        }

    def _refuse(self, status: HTTPStatus, reason: str) -> None:
        """Answer a request that is not read any further, and close."""
        self.close_connection = True
        self._send(status, "txt", reason.encode())

    def _send(self, status: HTTPStatus, kind: str, content: bytes) -> None:
        self.send_response(status)
        for name, value in _HEADERS.items():
            self.send_header(name, value)
        if status == HTTPStatus.METHOD_NOT_ALLOWED:
            self.send_header("Allow", ", ".join(_METHODS))
        if self.close_connection:
            self.send_header("Connection", "close")
        self.send_header("Content-Type", _TYPES[kind])
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)
        self.wfile.flush()

    def log_message(self, *arguments: Any) -> None:
        """Log nothing: each page asks for a hundred pictures."""


def _query(query: dict[str, list[str]]) -> Query:
    return Query(tuple(query.get("where", ())), query.get("sort", [""])[0], query.get("down") == ["1"])


def _whole(query: dict[str, list[str]], name: str, default: int) -> int:
    text = query.get(name, [str(default)])[0]
    if not re.fullmatch("[0-9]{1,9}", text):
        raise UsageError(f"{name} is {text!r}.", fix="Give a whole number.")
    return int(text)


def _json(value: Any) -> bytes:
    return json.dumps(value, allow_nan=False).encode()
