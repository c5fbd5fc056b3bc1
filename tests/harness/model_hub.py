"""A server that speaks as much of the Hugging Face hub as downloading a model of it needs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import urlsplit

from tests.harness.hashing import hash_of

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@contextmanager
def serving(
    folder: Path, name: str, revision: str, *, claimed: int | None = None, gated: bool = False
) -> Iterator[tuple[str, list[str]]]:
    """The address of a hub with one model, whose files are a folder's, and the paths of files that were fetched.

    ``claimed`` is the size that the hub says each file has, by default the true one; ``gated`` models are for those who
    were given access.
    """
    fetched: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            place = urlsplit(self.path).path
            for known in (revision, COMMIT):
                if place == f"/api/models/{name}/revision/{known}":
                    files = [{"rfilename": path, "size": claimed or size} for path, size in _sizes(folder).items()]
                    return self._send(_json({"id": name, "sha": COMMIT, "siblings": files}))
                if place == f"/api/models/{name}/tree/{known}":
                    files = [{"type": "file", "path": p, "size": n, "oid": COMMIT} for p, n in _sizes(folder).items()]
                    return self._send(_json(files))
                file = place.removeprefix(f"/{name}/resolve/{known}/")
                if file != place and gated:
                    return self._send(b"{}", {"X-Error-Code": "GatedRepo"}, status=403)
                if file != place and (folder / file).is_file():
                    content = (folder / file).read_bytes()
                    if self.command == "GET":
                        fetched.append(file)
                    return self._send(content, {"X-Repo-Commit": COMMIT, "ETag": f'"{hash_of(folder / file)}"'})
            missing = "RevisionNotFound" if f"/{name}/" in place else "RepoNotFound"
            return self._send(b"{}", {"X-Error-Code": missing}, status=404)

        do_HEAD = do_GET

        def _send(self, content: bytes, headers: dict[str, str] | None = None, *, status: int = 200) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            for key, value in (headers or {}).items():
                self.send_header(key, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", fetched
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _sizes(folder: Path) -> dict[str, int]:
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in folder.rglob("*") if path.is_file()}


def _json(value: object) -> bytes:
    return json.dumps(value).encode()
