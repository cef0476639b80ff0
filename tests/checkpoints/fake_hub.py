"""A hub on this machine, as far as its client asks for: revisions, lists of files, files."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha1
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

MAIN, OLD = "a" * 40, "b" * 40


class FakeHub:
    """Repositories by name and commit. `cut` files end too early; `served` are those asked for."""

    def __init__(self) -> None:
        self.commits = {"main": MAIN, "v1": OLD, MAIN: MAIN, OLD: OLD}
        self.files: dict[str, dict[str, bytes]] = {MAIN: {}, OLD: {}}
        self.cut: set[str] = set()
        self.served: list[str] = []
        self.url = ""


@contextmanager
def serving(hub: FakeHub) -> Iterator[FakeHub]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *arguments: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            path, _, _ = self.path.partition("?")
            match path.strip("/").split("/"):
                case ["api", "models", "some", "model", *rest]:
                    self._api(rest)
                case ["some", "model", "resolve", revision, *name]:
                    self._file(hub.commits.get(revision), "/".join(name))
                case _:
                    self._error("RepoNotFound")

        def _api(self, rest: list[str]) -> None:
            revision = rest[1] if len(rest) > 1 else "main"
            commit = hub.commits.get(revision)
            if commit is None:
                self._error("RevisionNotFound")
            elif rest[:1] == ["tree"]:
                files = hub.files[commit].items()
                entries = [
                    {"type": "file", "path": name, "size": len(data), "oid": _oid(data)}
                    for name, data in files
                ]
                self._json(entries)
            else:
                siblings = [
                    {"rfilename": name, "size": len(data)}
                    for name, data in hub.files[commit].items()
                ]
                self._json({"id": "some/model", "sha": commit, "siblings": siblings})

        def _file(self, commit: str | None, name: str) -> None:
            data = hub.files.get(commit or "", {}).get(name)
            if data is None:
                self._error("EntryNotFound")
                return
            self.send_response(200)
            self.send_header("X-Repo-Commit", commit or "")
            self.send_header("ETag", f'"{_oid(data)}"')
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if self.command == "GET":
                hub.served.append(name)
                if name in hub.cut:
                    self.wfile.write(data[: len(data) // 2])
                    self.close_connection = True
                else:
                    self.wfile.write(data)

        def _json(self, value: object) -> None:
            data = json.dumps(value).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def _error(self, code: str) -> None:
            self.send_response(404)
            self.send_header("X-Error-Code", code)
            self.send_header("Content-Length", "0")
            self.end_headers()

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    hub.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _oid(data: bytes) -> str:
    return sha1(data).hexdigest()
